"""The microkernels of the matrix products that all passes of a convolution are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .call import vector_function
from .emit import Block, Emitter, Int, Ints, Ptr, Vec, fma

ADD, BIAS, RELU = 1, 2, 4  # what a microkernel does as it stores, in this order; and
PACK, READ = 8, 16  # that it is to pack the panel, or to do without

# Runs of memory that a vector of a panel may come from if the microkernel is to pack it
MOST_RUNS = 2
# Panels whose vectors have up to so many runs are packed without a branch: those of 7 pixels in a row have 4.
FIXED_RUNS = 4


class Rows(NamedTuple):
    """Accumulators of a microkernel: rows, and vectors in each."""

    rows: int
    vectors: int


def run_stride(lanes: int) -> int:
    """Integers that the table of `pack_panel` has for each vector: how many runs, and two for each of them."""
    return 1 + 2 * max(lanes, FIXED_RUNS)


class Run(NamedTuple):
    """A run of memory in the table of `pack_panel`: the place of lane 0, and the bits of its lanes."""

    place: Int
    bits: Int


def run_of(entry: Ints, number: Int | int) -> Run:
    at = entry + (entry.e.number(number) * 2 + 1)
    return Run(at[0], at[1])


def load_runs(at: Ptr, runs: list[Run]) -> Vec:
    """A vector: the first run is loaded whole, each further one replaces the lanes from its own on."""
    value = (at + runs[0].place).vector()
    for run in runs[1:]:
        value = (at + run.place).vector(mask=at.e.mask_of_bits(run.bits), otherwise=value)
    return value


def finish(
    sums: Block, flags: Int, held: Callable[[], list[Vec]], biases: Callable[[], list[Vec]] | None = None
) -> None:
    """The sums as the flags ADD, BIAS and RELU want them, the last two only if there are `biases`.

    `held` loads what the output holds and `biases` the bias, both for each of the sums.
    """
    e = flags.e
    for _ in e.when(flags.has(ADD), sums):
        for n, value in enumerate(held()):
            sums.values[n] += value
    if biases is None:
        return
    for _ in e.when(flags.has(BIAS), sums):
        for n, value in enumerate(biases()):
            sums.values[n] += value
    for _ in e.when(flags.has(RELU), sums):
        sums.values[:] = [value.relu() for value in sums.values]


@vector_function(restrict="a panel c")
def contract(
    e: Emitter, depth: Int, a: Ptr, panel: Ptr, c: Ptr, flags: Int, pitch: Int, bias: Ptr, source: Ptr, offsets: Ints,
    runs: Ints, ahead: Int, *, variant: Rows,
) -> None:  # fmt: skip
    """The microkernel: C[i, j] = sum over k < depth of A[k, i] * B[k, j], for the rows i and the vectors of columns j.

        a      [depth][rows]                 packed weights
        panel  [depth][columns of a tile]    B: packed pixels
        c      [rows][pitch]

    depth >= 1; of the panel the first vectors are read, fewer than it has for the last pixels of all. The sum over k
    is one chain of multiply-adds from k = 0 upwards for each element, so an element has the same bits in any tile.
    Then, of `flags`, ADD adds what C held, BIAS adds bias[i], and RELU replaces what is below zero by zero.

    With PACK the panel is written, not read: row k of B is then what `pack_panel` takes from ``source + offsets[k]`` by
    the table `runs`, and the arithmetic hides the copying. The vectors must be all of the tile, each of at most
    MOST_RUNS runs, and the tile one that `packs`; on others the flag must not be set. `ahead` is fetched into the
    cache, as the panel after this one. READ is the same for vectors of one run, without writing the panel.
    """
    rows, vectors = variant
    lanes = e.lanes
    places = [c + (pitch * i + j * lanes) for i in range(rows) for j in range(vectors)]
    for place in places:
        place.prefetch(write=True)

    def multiply(sums: Block, columns_of: Callable[[Int, Ptr], list[Vec]]) -> None:
        """Add the products over k; `columns_of` gives row k of the panel, whose place it is told too."""
        for k in e.range(depth, sums):
            a_k = a + k * rows
            (a_k + depth * rows).prefetch()  # the next rows, if these are packed
            x = columns_of(k, panel + k * e.tile.columns)
            for i in range(rows):
                w = a_k[i].broadcast()
                for j in range(vectors):
                    sums[i, j] = fma(w, x[j], sums[i, j])

    def packed(k: Int, panel_k: Ptr) -> list[Vec]:
        return [(panel_k + j * lanes).vector() for j in range(vectors)]

    sums = e.zeros(rows, vectors)
    if e.tile.packs and vectors == e.tile.vectors:
        entries = [runs + j * run_stride(lanes) for j in range(vectors)]
        for is_packed in e.branch((flags & (PACK | READ)).equals(0), sums):
            if is_packed:
                multiply(sums, packed)
                continue
            for packs in e.branch((flags & READ).equals(0), sums):
                known = [[run_of(entry, m) for m in range(MOST_RUNS if packs else 1)] for entry in entries]

                def unpacked(k: Int, panel_k: Ptr, packs: bool = packs, known: list = known) -> list[Vec]:
                    at, x = source + offsets[k], []
                    for j in range(vectors):
                        x.append(load_runs(at, known[j]))
                        if packs:
                            (panel_k + j * lanes).store(x[j])
                            (at + (known[j][0].place + ahead)).prefetch()
                    return x

                multiply(sums, unpacked)
    else:
        multiply(sums, packed)

    def biases() -> list[Vec]:
        each = [bias[i].broadcast() for i in range(rows)]
        return [each[i] for i in range(rows) for _ in range(vectors)]

    finish(sums, flags, lambda: [place.vector() for place in places], biases)
    for place, value in zip(places, sums.values, strict=True):
        place.store(value)


@contract.plain
def contract_plain(depth, a, panel, c, flags, pitch, bias, source, offsets, runs, ahead, *, variant, tile):
    rows, vectors = variant
    for k in range(depth if flags & (PACK | READ) else 0):
        for j in range(vectors * tile.lanes):
            vector, lane = divmod(j, tile.lanes)
            count, *table = runs[vector * run_stride(tile.lanes) :]
            places = [table[2 * m] for m in range(max(count, 1)) if m == 0 or table[2 * m + 1] >> lane & 1]
            panel[k * tile.columns + j] = source[offsets[k] + places[-1] + lane]
    for i in range(rows):
        for j in range(vectors * tile.lanes):
            total = sum(a[k * rows + i] * panel[k * tile.columns + j] for k in range(depth))
            if flags & ADD:
                total += c[i * pitch + j]
            if flags & BIAS:
                total += bias[i]
            if flags & RELU:
                total = max(total, 0)
            c[i * pitch + j] = total
