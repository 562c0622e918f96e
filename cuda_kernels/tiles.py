"""Tiles of a matrix product in registers and shared memory: what the kernels of `implicit_gemm` have in common.

A block computes `rows` x `columns` sums in steps of some terms. Shared memory has two stages: while the block
multiplies one, its threads fetch the other, so that one barrier per step is enough. Operands come in chunks: terms of
one row (or column) that one thread fetches and that lie together in a stage. A `Product` is what a kernel needs to know
of its tile:

- on the ordinary units (float32, float64) each thread reads its operands 128 bits at a time and multiplies them in
  groups of four rows and four columns; a chunk is one term, and the rows of a term lie together;
- on the tensor cores (tf32, float16, bfloat16) each warp multiplies fragments of 16 x 8 sums by 8 words of 32 bits, one
  tf32 or a pair of 16-bit numbers each; a chunk is 16 bytes, and the terms of a row lie together, as `ldmatrix` and
  16-byte copies want them. Both operands lie alike, so either can be the one of 16: that of the rows where the columns
  lie together in the result, that of the columns where the rows do, and two sums that lie together are in one thread.

Every sum is one chain over the terms in their order, whatever the tile: the result does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .intrinsics import (
    load4,
    load_matrices,
    mma_bfloat16,
    mma_float16,
    mma_tf32,
    pack_bfloat16,
    pack_float16,
    round_tf32,
    store2,
    store4,
    store_pair,
    u32,
    unpack_bfloat16,
    unpack_float16,
)
from .jit import inlined

__all__ = ["ARITHMETIC", "TILES", "Arithmetic", "Product", "Spread", "Tile", "choose_tile", "product"]


class Tile(NamedTuple):
    """Sizes of a tile, all multiples of four."""

    rows: int
    columns: int
    thread_rows: int
    thread_columns: int

    @property
    def threads(self) -> int:
        return self.rows // self.thread_rows * (self.columns // self.thread_columns)


# In order of preference, the largest first: it reads the least memory for each multiplication. 8 x 8 sums of a thread
# take 128 registers and 4 loads of 128 bits for 64 multiply-adds; 4 x 4 take 2 loads for 16.
TILES = [Tile(128, 128, 8, 8), Tile(64, 128, 8, 8), Tile(32, 128, 4, 8), Tile(64, 64, 4, 4), Tile(32, 64, 4, 4)]
# A float64 takes two registers: half the sums of a thread.
WIDE_TILES = [Tile(64, 128, 4, 8), *TILES[3:]]
# On the tensor cores a warp takes 32 or 16 rows and columns at least, and 16 terms of a source pass through registers.
TENSOR_TILES = [*TILES[:3], Tile(64, 64, 4, 8), Tile(32, 32, 4, 4)]

# Blocks that keep every multiprocessor of a large GPU busy (the H200 has 132).
ENOUGH_BLOCKS = 132


def choose_tile(rows: int, columns: int, groups: int, tiles: list[Tile] = TILES) -> Tile:
    """The largest tile that the rows more than half fill and that gives enough blocks, or else the smallest."""
    filled = [tile for tile in tiles if 2 * rows > tile.rows] or tiles[-1:]
    for tile in filled:
        if -(-rows // tile.rows) * -(-columns // tile.columns) * groups >= ENOUGH_BLOCKS:
            return tile
    return filled[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@inlined
def _same(x):
    return x


@inlined
def _from_float16(bits):
    return unpack_float16(u32(bits))[0]


@inlined
def _to_float16(x):
    return np.uint16(pack_float16(x, np.float32(0)))


@inlined
def _from_bfloat16(bits):
    return unpack_bfloat16(u32(bits))[0]


@inlined
def _to_bfloat16(x):
    return np.uint16(pack_bfloat16(x, np.float32(0)))


class Arithmetic(NamedTuple):
    """What a kernel multiplies, and on which unit.

    The tensor cores' operands are bits to the kernel, which moves them and never looks at their values.
    """

    operand: type  # NumPy type of an element of the operands,
    word: type  # of a stage in shared memory,
    real: type  # of the sums,
    result: type  # of an element of the result and the bias
    load: Callable[..., Any]  # result -> real
    store: Callable[..., Any]  # real -> result
    chunk: int  # terms of a row that lie together in a stage
    depth: int  # terms of a step
    run: int  # sums of a thread that may lie together in the result, and are then stored at once
    tiles: list[Tile]
    multiply: Any = None  # the instruction of the tensor cores
    pack: Any = None  # two sums as a word of two results

    @property
    def tensor(self) -> bool:
        return self.multiply is not None


DEPTH = 8  # terms of a step on the ordinary units,
CHUNKS = 4  # and chunks of a step on the tensor cores: 64 bytes of each row

ARITHMETIC = {
    "float32": Arithmetic(np.float32, np.float32, np.float32, np.float32, _same, _same, 1, DEPTH, 4, TILES),
    "float64": Arithmetic(np.float64, np.float64, np.float64, np.float64, _same, _same, 1, DEPTH, 4, WIDE_TILES),
    "tf32": Arithmetic(
        np.uint32, np.uint32, np.float32, np.float32, _same, _same, 4, 4 * CHUNKS, 2, TENSOR_TILES, mma_tf32
    ),
    "float16": Arithmetic(
        np.uint16, np.uint32, np.float32, np.uint16, _from_float16, _to_float16, 8, 8 * CHUNKS, 2, TENSOR_TILES,
        mma_float16, pack_float16,
    ),
    "bfloat16": Arithmetic(
        np.uint16, np.uint32, np.float32, np.uint16, _from_bfloat16, _to_bfloat16, 8, 8 * CHUNKS, 2, TENSOR_TILES,
        mma_bfloat16, pack_bfloat16,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Where the rows (or columns) of a thread's sums are: runs of `run`, `spacing` apart, every `jump` a run."""

    run: int
    spacing: int
    jump: int


class Product(NamedTuple):
    """How a block multiplies two stages of shared memory; sizes and places count words of it."""

    a_stage: int
    b_stage: int
    row: int  # from a chunk to that of another row, for each row between them, which are a multiple of 8
    rows: Spread
    columns: Spread
    fragments: tuple[int, int]  # words that a thread holds of either operand
    place_a: Callable[..., Any]  # (row, chunk) -> where in a stage the chunk begins
    place_b: Callable[..., Any]
    ahead: Callable[..., Any]  # (place of chunk c, n) -> that of chunk c + n, n a multiple of a power of two above c
    origin: Callable[..., Any]  # (thread) -> its first row and column, where it begins to read either stage
    step: Callable[..., None]  # (a, b, at_a, at_b, sums, words of a, words of b)
    put: Callable[..., None]  # (stage, at, fetched, i): store the chunk i of what a thread has fetched
    store_run: Callable[..., None]  # (out, at, *sums): `Arithmetic.run` sums that lie together in the result


def product(
    tile: Tile, kind: str, rows_together: bool = False, wide: bool = False, packed: bool = False
) -> Product:
    """The product of a tile of one `ARITHMETIC`; `rows_together`: the rows lie together in the result.

    `packed`, for the tensor cores: stages without padding, at the price of an instruction here and there.

    `wide`, for the ordinary units: places in shared memory are of 64 bits. These have no wraparound to keep, so what is
    added to them becomes part of the instruction: 542 in the hot block of the largest tile, not 599.
    """
    if ARITHMETIC[kind].tensor:
        return _tensor_product(tile, kind, rows_together, packed)
    return _ordinary_product(tile, wide)


def _ordinary_product(tile: Tile, wide: bool) -> Product:
    """Term k of row r of a stage is at k * (rows + 4) + r: eight terms of four rows then lie in different banks."""
    thread_rows, thread_columns = tile.thread_rows, tile.thread_columns
    row_groups, column_groups = thread_rows // 4, thread_columns // 4
    row_jump, column_jump = tile.rows // row_groups, tile.columns // column_groups
    row_pitch, column_pitch = tile.rows + 4, tile.columns + 4
    columns_of_threads = tile.columns // thread_columns
    place = np.int64 if wide else u32

    @inlined
    def place_a(row, chunk):
        return u32(chunk * row_pitch + row)

    @inlined
    def place_b(row, chunk):
        return u32(chunk * column_pitch + row)

    @inlined
    def ahead(at, n):
        return at + n * column_pitch

    @inlined
    def origin(t):
        row, column = u32(t // columns_of_threads * 4), u32(t % columns_of_threads * 4)
        return row, column, row, column

    @inlined
    def term(a, b, at_a, at_b, sums, ra, rb):
        for g in range(row_groups):
            x = load4(a, place(at_a + g * row_jump))
            for i in range(4):
                ra[4 * g + i] = x[i]
        for g in range(column_groups):
            x = load4(b, place(at_b + g * column_jump))
            for i in range(4):
                rb[4 * g + i] = x[i]
        for i in range(thread_rows):
            for j in range(thread_columns):
                sums[i, j] += ra[i] * rb[j]

    # Written out: the compiler does not unroll a loop of that size.
    @inlined
    def step(a, b, from_a, from_b, sums, ra, rb):
        at_a, at_b = place(from_a), place(from_b)
        term(a, b, at_a, at_b, sums, ra, rb)
        term(a, b, place(at_a + row_pitch), place(at_b + column_pitch), sums, ra, rb)
        term(a, b, place(at_a + 2 * row_pitch), place(at_b + 2 * column_pitch), sums, ra, rb)
        term(a, b, place(at_a + 3 * row_pitch), place(at_b + 3 * column_pitch), sums, ra, rb)
        term(a, b, place(at_a + 4 * row_pitch), place(at_b + 4 * column_pitch), sums, ra, rb)
        term(a, b, place(at_a + 5 * row_pitch), place(at_b + 5 * column_pitch), sums, ra, rb)
        term(a, b, place(at_a + 6 * row_pitch), place(at_b + 6 * column_pitch), sums, ra, rb)
        term(a, b, place(at_a + 7 * row_pitch), place(at_b + 7 * column_pitch), sums, ra, rb)

    @inlined
    def put(stage, at, fetched, i):
        stage[at] = fetched[i]

    @inlined
    def store_run(out, at, first, second, third, fourth):
        store4(out, at, first, second, third, fourth)

    return Product(
        DEPTH * row_pitch, DEPTH * column_pitch, 1, Spread(4, 1, row_jump), Spread(4, 1, column_jump),
        (thread_rows, thread_columns), place_a, place_b, ahead, origin, step, put, store_run,
    )  # fmt: skip


ROW = 4 * CHUNKS  # words of a row of a stage, on the tensor cores


def _rows_of_chunks(packed: bool) -> tuple[int, Callable[..., Any], Callable[..., Any]]:
    """From a row of a stage to the next; ``(row, chunk)``: the place of a chunk; ``(place, n)``: of the chunk n ahead.

    The same chunk of eight rows, which `ldmatrix` reads and eight threads store at a time, is to have all banks of
    shared memory. Four words of padding do that, or, `packed`, chunks that change places with each other: chunk c of
    row r is at c xor (r / 2 mod 4), since two rows fill the banks once. That takes an instruction where the padding is
    part of an address, and no room.
    """
    if packed:

        @inlined
        def place(row, chunk):
            return u32(row * ROW + (chunk ^ (row // 2 % CHUNKS)) * 4)

        @inlined
        def ahead(at, n):
            return at ^ (4 * n)

        return ROW, place, ahead
    pitch = ROW + 4

    @inlined
    def place(row, chunk):
        return u32(row * pitch + chunk * 4)

    @inlined
    def ahead(at, n):
        return at + 4 * n

    return pitch, place, ahead


# A factory: what its nested functions share is decided once, for one tile.
def _tensor_product(tile: Tile, kind: str, rows_together: bool, packed: bool) -> Product:
    """Chunks of rows are where `_rows_of_chunks` puts them.

    The instruction's first operand, of 16, is called the tall one here, its second, of 8, the short one. A thread holds
    of each 16 x 8 sums those of rows lane // 4 and lane // 4 + 8, and of columns lane % 4 * 2 and the next.
    """
    arithmetic = ARITHMETIC[kind]
    mma, pack = arithmetic.multiply, arithmetic.pack
    row_words, place, ahead = _rows_of_chunks(packed)
    if rows_together:
        tall, tall_sums, short_sums = tile.columns, tile.thread_columns, tile.thread_rows
    else:
        tall, tall_sums, short_sums = tile.rows, tile.thread_rows, tile.thread_columns
    tall_fragments, pairs_of_short = tall_sums // 2, short_sums // 4
    of_tall, of_short = 8 * tall_sums, 4 * short_sums  # of one warp
    warps = tall // of_tall

    @inlined
    def origin(t):
        lane, warp = u32(t % 32), u32(t // 32)
        first_tall, first_short = u32(warp % warps * of_tall), u32(warp // warps * of_short)
        # Each lane names one row, of 4 words, of the four 8x8 matrices that it loads at once. They come in the order in
        # which the instruction takes them, so that no register has to be moved: of the tall operand rows 0-7 and 8-15,
        # then their next words; of the short one both words of rows 0-7, then those of 8-15, which are a fragment more.
        at_tall = place(u32(first_tall + lane % 16), u32(lane // 16))
        at_short = place(u32(first_short + lane // 16 * 8 + lane % 8), u32(lane // 8 % 2))
        in_tall, in_short = u32(first_tall + lane // 4), u32(first_short + lane % 4 * 2)
        if rows_together:
            return in_short, in_tall, at_short, at_tall
        return in_tall, in_short, at_tall, at_short

    @inlined
    def fragments(stage, at, words, count):
        for i in range(count):
            x = load_matrices(stage, u32(at + i * 16 * row_words))
            for j in range(4):
                words[4 * i + j] = x[j]

    @inlined
    def multiply(sums, i, j, tall_words, first, second):
        """The 16 x 8 sums of tall fragment i and short fragment j."""
        words = tall_words[4 * i], tall_words[4 * i + 1], tall_words[4 * i + 2], tall_words[4 * i + 3]
        if rows_together:
            old = sums[2 * j, 2 * i], sums[2 * j + 1, 2 * i], sums[2 * j, 2 * i + 1], sums[2 * j + 1, 2 * i + 1]
            new = mma(words, (first, second), old)
            sums[2 * j, 2 * i], sums[2 * j + 1, 2 * i] = new[0], new[1]
            sums[2 * j, 2 * i + 1], sums[2 * j + 1, 2 * i + 1] = new[2], new[3]
        else:
            old = sums[2 * i, 2 * j], sums[2 * i, 2 * j + 1], sums[2 * i + 1, 2 * j], sums[2 * i + 1, 2 * j + 1]
            new = mma(words, (first, second), old)
            sums[2 * i, 2 * j], sums[2 * i, 2 * j + 1] = new[0], new[1]
            sums[2 * i + 1, 2 * j], sums[2 * i + 1, 2 * j + 1] = new[2], new[3]

    @inlined
    def part(tall_stage, short_stage, at_tall, at_short, sums, tall_words, short_words):
        fragments(tall_stage, at_tall, tall_words, tall_fragments)
        fragments(short_stage, at_short, short_words, pairs_of_short)
        for i in range(tall_fragments):
            for j in range(2 * pairs_of_short):
                multiply(sums, i, j, tall_words, short_words[2 * j], short_words[2 * j + 1])

    @inlined
    def step(a, b, at_a, at_b, sums, ra, rb):
        if rows_together:
            part(b, a, at_b, at_a, sums, rb, ra)
            part(b, a, u32(ahead(at_b, 2)), u32(ahead(at_a, 2)), sums, rb, ra)
        else:
            part(a, b, at_a, at_b, sums, ra, rb)
            part(a, b, u32(ahead(at_a, 2)), u32(ahead(at_b, 2)), sums, ra, rb)

    if pack is None:

        @inlined
        def put(stage, at, fetched, i):
            store4(
                stage, at, round_tf32(fetched[4 * i]), round_tf32(fetched[4 * i + 1]), round_tf32(fetched[4 * i + 2]),
                round_tf32(fetched[4 * i + 3]),
            )  # fmt: skip

        @inlined
        def store_run(out, at, first, second):
            store2(out, at, first, second)

    else:

        @inlined
        def word(fetched, i):
            return u32(u32(fetched[i]) | u32(fetched[i + 1]) << 16)

        @inlined
        def put(stage, at, fetched, i):
            store4(
                stage, at, word(fetched, 8 * i), word(fetched, 8 * i + 2), word(fetched, 8 * i + 4),
                word(fetched, 8 * i + 6),
            )  # fmt: skip

        @inlined
        def store_run(out, at, first, second):
            store_pair(out, at, pack(first, second))

    tall_spread, short_spread = Spread(2, 8, 16), Spread(2, 1, 8)
    words = 4 * tall_fragments, 4 * pairs_of_short
    return Product(
        tile.rows * row_words, tile.columns * row_words, row_words,
        short_spread if rows_together else tall_spread, tall_spread if rows_together else short_spread,
        words[::-1] if rows_together else words, place, place, ahead, origin, step, put, store_run,
    )  # fmt: skip
