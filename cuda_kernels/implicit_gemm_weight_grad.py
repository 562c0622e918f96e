"""The weight gradient of `implicit_gemm`: a matrix product whose terms are output positions.

They are summed in parts of a fixed number of positions, by the shape alone; `partial_sums` adds the parts.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
from numba import from_dtype, types

from ..geometry import ConvGeometry
from ._cuda import DeviceArray, cuda, launch, launch_blocks, upload
from .implicit_gemm_tables import list_terms, padded_to_steps
from .intrinsics import load4, u32
from .jit import BlockKernel, flat, inlined
from .offsets import Strides, as_uint32
from .partial_sums import add_parts_kernel, parts_of_gradient
from .tiles import ARITHMETIC, ENOUGH_BLOCKS, Tile, product

__all__ = ["WeightPass", "launch_passes", "positions_of_part", "weight_kernel", "weight_plan", "weight_tile"]

# Positions that one block sums, at least: shorter chains cost more to add up than they gain.
LEAST_POSITIONS = 512
WEIGHT_NUMBERS = 24


def positions_of_part(rows: int, columns: int, groups: int, positions: int, kind: str = "float32") -> int:
    """How many positions go into one part of the sum: by the shape alone, so that the bits are the same everywhere."""
    tile, depth = weight_tile(rows, columns, kind), ARITHMETIC[kind].depth
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns) * groups
    parts = max(1, min(2 * ENOUGH_BLOCKS // tiles, positions // LEAST_POSITIONS))
    return -(-positions // parts // depth) * depth


def weight_tile(rows: int, columns: int, kind: str) -> Tile:
    """The largest tile that both sides more than half fill: the parts of the sum make the blocks."""
    tiles = ARITHMETIC[kind].tiles
    return next((t for t in tiles if 2 * rows > t.rows and 2 * columns > t.columns), tiles[-1])


def _columns_of_weights(geometry: ConvGeometry, source: Strides) -> tuple[np.ndarray, np.ndarray]:
    """Deltas and offsets in the input of each column (channel, tap) of the weight gradient."""
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    channels, tap = list_terms(geometry.in_channels_per_group, taps)
    deltas = tap * geometry.dilation - np.array(geometry.pad_before)
    return deltas, channels * source[1] + deltas @ np.array(source[2:], np.int64)


@functools.lru_cache(maxsize=1024)
def weight_plan(
    kind: str, geometry: ConvGeometry, source: Strides, grad: Strides, device: int
) -> tuple[tuple[np.uint32, ...], int, DeviceArray]:
    """Numbers, parts of the sum, and table of the columns."""
    deltas, offsets = _columns_of_weights(geometry, source)
    rows, columns = geometry.out_channels_per_group, len(offsets)
    counts = geometry.output_size
    positions = geometry.batch * int(np.prod(counts))
    part = positions_of_part(rows, columns, geometry.groups, positions, kind)
    numbers = as_uint32(
        rows, columns, positions, part, grad[1], rows * grad[1], geometry.in_channels_per_group * source[1],
        *counts, *geometry.stride, *geometry.input_size, grad[0], *grad[2:], source[0],
    )  # fmt: skip
    steps = as_uint32(*np.multiply(source[2:], geometry.stride).tolist())
    (table,) = upload(padded_to_steps(np.column_stack([offsets, deltas]), 0, 1))
    return (*numbers, *steps), -(-positions // part), table


class WeightPass(NamedTuple):
    """What the weight gradient sums over some samples."""

    input: DeviceArray
    grad_output: DeviceArray
    numbers: tuple[np.uint32, ...]
    parts: int
    table: DeviceArray


def launch_passes(kind: str, passes: list[WeightPass], groups: int, accumulate: bool, out: DeviceArray) -> None:
    arithmetic = ARITHMETIC[kind]
    rows, columns = map(int, passes[0].numbers[:2])
    tile = weight_tile(rows, columns, kind)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    partial = parts_of_gradient(sum(p.parts for p in passes), arithmetic.real, accumulate, passes[0].input, out)
    first = 0
    for x, dy, numbers, parts, table in passes:
        launch_blocks(
            weight_kernel(kind, tile), (tiles, parts, groups), dy.flat(arithmetic.operand), x.flat(arithmetic.operand),
            table.flat(), numbers, partial.samples(first, parts).flat(),
        )  # fmt: skip
        first += parts
    if partial.pointer != out.pointer:
        launch(add_parts_kernel[out.dtype], out.size, partial, accumulate, out)


# A factory: what its nested functions share is decided once, for one tile.
@functools.cache
def weight_kernel(kind: str, tile: Tile) -> BlockKernel:
    """One part of the sum of a tile of the weight gradient; the terms are output positions."""
    arithmetic = ARITHMETIC[kind]
    (
        a_stage, b_stage, row_of_stage, (row_run, row_spacing, row_jump), (column_run, column_spacing, column_jump),
        (words_a, words_b), place_a, place_b, _, origin, step, put, _,
    ) = product(tile, kind)  # fmt: skip
    rows_of_tile, columns_of_tile, thread_rows, thread_columns = tile
    threads, chunk, depth = tile.threads, arithmetic.chunk, arithmetic.depth
    chunks = depth // chunk
    a_size, b_size = 2 * a_stage, 2 * b_stage
    apart = threads // chunks  # each thread fetches one chunk of positions, of rows and columns this far apart
    fetched_a, fetched_b = rows_of_tile // apart, columns_of_tile // apart
    size_a, size_b = fetched_a * chunk, fetched_b * chunk
    operand, word, real = map(from_dtype, map(np.dtype, arithmetic[:3]))
    nothing, zero = arithmetic.operand(0), arithmetic.real(0)

    @inlined
    def fetch_position(
        grad, source, exists, n, d, h, w, row, rows, numbers, base_grad, base_source, columns, next_a, next_b, v
    ):
        """The output gradients of position v of the chunk, and what the taps meet there."""
        (
            _, _, _, _, grad_row, _, _, _, _, _, step_d, step_h, step_w, size_d, size_h, size_w,
            grad_n, grad_d, grad_h, grad_w, source_n, source_d, source_h, source_w,
        ) = numbers  # fmt: skip
        at = u32(base_grad + n * grad_n + d * grad_d + h * grad_h + w * grad_w)
        for i in range(fetched_a):
            r = u32(row + i * apart)
            next_a[i * chunk + v] = grad[u32(at + r * grad_row)] if exists and r < rows else nothing
        at = u32(base_source + n * source_n + d * source_d + h * source_h + w * source_w)
        d, h, w = u32(d * step_d), u32(h * step_h), u32(w * step_w)
        for i in range(fetched_b):
            inside = (
                u32(d + columns[i, 1]) < size_d and u32(h + columns[i, 2]) < size_h and u32(w + columns[i, 3]) < size_w
            )
            next_b[i * chunk + v] = source[u32(at + columns[i, 0])] if exists and inside else nothing

    @inlined
    def following(n, d, h, w, count_d, count_h, count_w):
        """The position after this one."""
        w = u32(w + 1)
        if w == count_w:
            w, h = u32(0), u32(h + 1)
        if h == count_h:
            h, d = u32(0), u32(d + 1)
        if d == count_d:
            d, n = u32(0), u32(n + 1)
        return n, d, h, w

    @inlined
    def fetch(grad, source, first, last, row, rows, numbers, base_grad, base_source, columns, next_a, next_b):
        count_d, count_h, count_w = numbers[7:10]
        line = u32(first // count_w)
        w = u32(first - line * count_w)
        plane = u32(line // count_h)
        h = u32(line - plane * count_h)
        n = u32(plane // count_d)
        d = u32(plane - n * count_d)
        for v in range(chunk):
            fetch_position(
                grad, source, u32(first + v) < last, n, d, h, w, row, rows, numbers, base_grad, base_source, columns,
                next_a, next_b, v,
            )  # fmt: skip
            n, d, h, w = following(n, d, h, w, count_d, count_h, count_w)

    @inlined
    def store_stage(a, b, a_at, b_at, next_a, next_b):
        for i in range(fetched_a):
            put(a, u32(a_at + i * apart * row_of_stage), next_a, i)
        for i in range(fetched_b):
            put(b, u32(b_at + i * apart * row_of_stage), next_b, i)

    def weight_grad(grad, source, table, numbers, partial):
        rows, columns, positions, part, _, grad_group, source_group = numbers[:7]
        a = cuda.shared.array(a_size, word, alignment=16)
        b = cuda.shared.array(b_size, word, alignment=16)
        sums = cuda.local.array((thread_rows, thread_columns), real)
        ra = cuda.local.array(words_a, word)
        rb = cuda.local.array(words_b, word)
        next_a = cuda.local.array(size_a, operand)
        next_b = cuda.local.array(size_b, operand)
        own_columns = cuda.local.array((fetched_b, 4), types.uint32)
        t, group = u32(cuda.threadIdx.x), u32(cuda.blockIdx.z)
        row_tiles = u32((rows + rows_of_tile - 1) // rows_of_tile)
        column_tile = u32(u32(cuda.blockIdx.x) // row_tiles)
        first_row = u32((u32(cuda.blockIdx.x) - column_tile * row_tiles) * rows_of_tile)
        first_column = u32(column_tile * columns_of_tile)
        k = u32(u32(cuda.blockIdx.y) * part)
        last = min(u32(k + part), positions)

        own, term = u32(t // chunks), u32(t % chunks * chunk)
        for i in range(fetched_b):  # columns that do not exist repeat the last, and are not stored
            e = load4(table, u32(4 * min(u32(first_column + own + i * apart), u32(columns - 1))))
            for j in range(4):
                own_columns[i, j] = e[j]
        a_at, b_at = place_a(own, u32(t % chunks)), place_b(own, u32(t % chunks))
        row, base_grad, base_source = u32(first_row + own), u32(group * grad_group), u32(group * source_group)

        for i in range(thread_rows):
            for j in range(thread_columns):
                sums[i, j] = zero
        fetch(
            grad, source, u32(k + term), last, row, rows, numbers, base_grad, base_source, own_columns, next_a, next_b
        )
        store_stage(a, b, a_at, b_at, next_a, next_b)
        cuda.syncthreads()
        row_of_thread, column_of_thread, from_a, from_b = origin(t)
        stage = u32(0)
        while k < last:
            k = u32(k + depth)
            if k < last:
                fetch(
                    grad, source, u32(k + term), last, row, rows, numbers, base_grad, base_source, own_columns,
                    next_a, next_b,
                )  # fmt: skip
            step(a, b, u32(stage * a_stage + from_a), u32(stage * b_stage + from_b), sums, ra, rb)
            stage = u32(1 - stage)
            if k < last:
                store_stage(a, b, u32(stage * a_stage + a_at), u32(stage * b_stage + b_at), next_a, next_b)
            cuda.syncthreads()

        at = u32(u32(u32(cuda.blockIdx.y) * u32(cuda.gridDim.z) + group) * rows)
        for i in range(thread_rows):
            r = u32(first_row + row_of_thread + i // row_run * row_jump + i % row_run * row_spacing)
            if r < rows:
                for j in range(thread_columns):
                    in_tile = column_of_thread + j // column_run * column_jump + j % column_run * column_spacing
                    column = u32(first_column + in_tile)
                    if column < columns:
                        partial[u32(u32(at + r) * columns + column)] = sums[i, j]

    words = flat(types.uint32)
    signature = (flat(operand), flat(operand), words, types.UniTuple(types.uint32, WEIGHT_NUMBERS), flat(real))
    return BlockKernel(weight_grad, threads, signature, 1 if arithmetic.tensor else None)
