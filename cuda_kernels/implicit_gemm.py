"""Convolution as a matrix product whose second operand is read in place, through tables of offsets. float32.

The forward pass is a `Gather`: with columns j, the output positions of all samples, and terms k = (channel, tap),

    out[row, j] = sum over k of  weight[row, k] * source[sample(j), channel(k), step * j + delta(k)]

where a source coordinate outside its array is a zero. The input gradient is one gather for each phase of the stride:
the input positions q with (q + before) mod stride = phase meet the taps of that phase only, at output coordinates
j + delta(k), so that nothing is multiplied in vain (Dumoulin and Visin, A guide to convolution arithmetic, ch. 4).
The weight gradient sums over positions; its columns are the (channel, tap):

    grad[row, (channel, tap)] = sum over j of  grad_output[row, j] * input[sample(j), channel, step * j + delta]

in parts of a fixed number of positions, which a second kernel adds in order. Offsets are 32-bit: arrays of 2**31
elements or more are taken a few samples at a time, and left to the simple kernels if one sample is too large.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import types

from ..geometry import ConvGeometry
from ._cuda import DeviceArray, cuda, current_device, empty, launch, launch_blocks, upload
from .intrinsics import load4, store4, u32
from .jit import BlockKernel, Element, array_of, flat, inlined, kernel
from .tiles import DEPTH, ENOUGH_BLOCKS, TILES, Tile, choose_tile, stepper

__all__ = ["forward", "input_grad", "weight_grad"]

MOST_ELEMENTS = 2**31 - 1
LEAST_ROWS = 4  # channels of a group: fewer leave most of a tile empty, in every one of many groups
FAR = 1 << 30  # added to a coordinate, puts it outside of any array

# How a thread stores its sums: one by one; four positions at once, for channels first; four rows, for channels last.
ONE_BY_ONE, POSITIONS, ROWS = 0, 1, 2

Strides = tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


class Gather(NamedTuple):
    """One pass over `source`, all numbers in elements. Of the tables, a row per term (channel, tap)."""

    rows: int  # of a group
    columns: int
    terms: int
    counts: tuple[int, int, int]  # columns of one sample, per dimension
    step: tuple[int, int, int]
    size: tuple[int, int, int]  # of the source
    deltas: np.ndarray  # (terms, 3)
    channels: np.ndarray  # (terms,): channel of the group
    weights: np.ndarray  # (terms,): offset from the row's first weight
    origin: tuple[int, int, int]  # of the result's positions, and the distance of two
    pace: tuple[int, int, int]

    @property
    def checked(self) -> bool:
        """May a coordinate be outside the source?"""
        last = np.multiply(np.subtract(self.counts, 1), self.step)
        return bool((self.deltas < 0).any() or (self.deltas + last >= self.size).any())


def _terms(channels: int, taps: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Channel and tap (terms, 3) of each term; the taps of one channel follow each other."""
    return np.repeat(np.arange(channels), len(taps)), np.tile(np.reshape(taps, (-1, 3)), (channels, 1))


def _forward_gather(geometry: ConvGeometry, weight: Strides) -> Gather:
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    channels, tap = _terms(geometry.in_channels_per_group, taps)
    return Gather(
        geometry.out_channels_per_group, geometry.batch * int(np.prod(geometry.output_size)), len(channels),
        geometry.output_size, geometry.stride, geometry.input_size,
        tap * geometry.dilation - np.array(geometry.pad_before), channels, channels * weight[1] + tap @ weight[2:],
        (0, 0, 0), (1, 1, 1),
    )  # fmt: skip


def _input_grad_gathers(geometry: ConvGeometry, weight: Strides) -> Iterator[Gather]:
    for phase in itertools.product(*map(range, geometry.stride)):
        # input positions q = origin + stride * j, and the taps k with k * dilation = phase (mod stride)
        origin = [(p - b) % s for p, b, s in zip(phase, geometry.pad_before, geometry.stride, strict=True)]
        counts = [len(range(q, n, s)) for q, n, s in zip(origin, geometry.input_size, geometry.stride, strict=True)]
        if 0 in counts:
            continue
        taps = [
            [k for k in range(size) if (k * d - p) % s == 0]
            for size, d, p, s in zip(geometry.kernel_size, geometry.dilation, phase, geometry.stride, strict=True)
        ]
        channels, tap = _terms(geometry.out_channels_per_group, list(itertools.product(*taps)))
        deltas = (np.array(origin) + geometry.pad_before - tap * geometry.dilation) // np.array(geometry.stride)
        yield Gather(
            geometry.in_channels_per_group, geometry.batch * int(np.prod(counts)), len(channels), tuple(counts),
            (1, 1, 1), geometry.output_size, deltas, channels, channels * weight[0] + tap @ weight[2:], tuple(origin),
            geometry.stride,
        )  # fmt: skip


def _padded_to_steps(table: np.ndarray, fill: int) -> np.ndarray:
    """A whole number of steps of DEPTH rows, at least one, as 32-bit numbers that wrap around."""
    missing = max(-len(table) % DEPTH, DEPTH - len(table))
    filler = np.full((missing, *table.shape[1:]), fill, np.int64)
    return (np.concatenate([table, filler]).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32).reshape(-1)


def _source_table(gather: Gather, source: Strides) -> np.ndarray:
    """Offset and the three deltas of each term; the rows that fill up a step are outside the source."""
    offsets = gather.channels * source[1] + gather.deltas @ np.array(source[2:], np.int64)
    return _padded_to_steps(np.column_stack([offsets, gather.deltas]), FAR)


def _column_numbers(gather: Gather, source: Strides) -> list[int]:
    """What makes of a column its sample and coordinates in the source, and their offset."""
    return [*gather.counts, *gather.step, *gather.size, source[0], *np.multiply(source[2:], gather.step).tolist()]


def _elements(array: DeviceArray) -> Strides:
    return tuple(s // array.dtype.itemsize for s in array.strides)


def _numbers(*values: int) -> tuple[np.uint32, ...]:
    return tuple(np.uint32(int(v) & 0xFFFFFFFF) for v in values)


# ---------------------------------------------------------------------------------------------------------------------
# Gathers: the forward pass and the input gradient
# ---------------------------------------------------------------------------------------------------------------------

GATHER_NUMBERS = 26


class Plan(NamedTuple):
    """A gather as the kernel takes it."""

    gather: Gather
    numbers: tuple[np.uint32, ...]
    terms: DeviceArray
    weights: DeviceArray


@functools.lru_cache(maxsize=1024)
def _plans(
    operation: str, geometry: ConvGeometry, weight: Strides, source: Strides, out: Strides, device: int
) -> list[Plan]:
    """The gathers of an operation; the strides of its arrays count elements."""
    if operation == "forward":
        gathers = [_forward_gather(geometry, weight)]
        weight_row, source_channels = weight[0], geometry.in_channels_per_group
    else:
        gathers = list(_input_grad_gathers(geometry, weight))
        weight_row, source_channels = weight[1], geometry.out_channels_per_group
    plans = []
    for gather in gathers:
        numbers = _numbers(
            gather.rows, gather.columns, gather.terms,
            weight_row, geometry.out_channels_per_group * weight[0], source_channels * source[1],
            *_column_numbers(gather, source),
            out[0], out[1], gather.rows * out[1], *np.multiply(out[2:], gather.pace).tolist(),
            int(np.dot(out[2:], gather.origin)),
        )  # fmt: skip
        plans.append(Plan(gather, numbers, *upload(_source_table(gather, source), _padded_to_steps(gather.weights, 0))))
    return plans


def _storing(gather: Gather, out: DeviceArray) -> int:
    """How the kernel may store its sums."""
    n, row, *space = _elements(out)
    if out.pointer % 16:
        return ONE_BY_ONE
    positions = int(np.prod(gather.counts))
    dense = [gather.counts[1] * gather.counts[2], gather.counts[2], 1]
    lie_together = all(c == 1 or s == d for c, s, d in zip(gather.counts, space, dense, strict=True))
    if lie_together and gather.pace == (1, 1, 1) and positions % 4 == n % 4 == row % 4 == 0:
        return POSITIONS
    if row == 1 and gather.rows % 4 == 0 and all(s % 4 == 0 for s in (n, *space)):
        return ROWS
    return ONE_BY_ONE


def _gather(
    operation: str, geometry: ConvGeometry, weight: DeviceArray, source: DeviceArray, bias: DeviceArray, relu: bool,
    accumulate: bool, out: DeviceArray,
) -> None:  # fmt: skip
    strides = _elements(weight), _elements(source), _elements(out)
    for plan in _plans(operation, geometry, *strides, current_device()):
        gather = plan.gather
        tile = choose_tile(gather.rows, gather.columns, geometry.groups)
        row_tiles, column_tiles = -(-gather.rows // tile.rows), -(-gather.columns // tile.columns)
        storing = ONE_BY_ONE if accumulate else _storing(gather, out)
        launch_blocks(
            gather_kernel(tile, gather.checked), (row_tiles * column_tiles, geometry.groups), weight.flat(),
            source.flat(), bias, plan.terms.flat(), plan.weights.flat(), plan.numbers, np.uint32(row_tiles),
            np.uint32(storing), relu, accumulate, out.flat(),
        )  # fmt: skip


@functools.cache
def gather_kernel(tile: Tile, checked: bool) -> BlockKernel:
    """The kernel of a `Gather`; `checked`: coordinates may be outside the source."""
    rows_of_tile, columns_of_tile, thread_rows, thread_columns = tile
    threads = tile.threads
    row_pitch, column_pitch = tile.row_pitch, tile.column_pitch
    a_stage, b_stage = DEPTH * row_pitch, DEPTH * column_pitch
    a_size, b_size = 2 * a_stage, 2 * b_stage
    columns_of_threads = columns_of_tile // thread_columns
    row_jump, column_jump = rows_of_tile // (thread_rows // 4), columns_of_tile // (thread_columns // 4)
    # Each thread fetches one column and several terms of the source, one term and several rows of the weights.
    terms_apart, rows_apart = threads // columns_of_tile, threads // DEPTH
    fetched_a, fetched_b = rows_of_tile // rows_apart, DEPTH // terms_apart
    step = stepper(tile)
    zero = np.float32(0)

    @inlined
    def place(column, count_d, count_h, count_w):
        """Sample and coordinates of a column."""
        line = u32(column // count_w)
        w = u32(column - line * count_w)
        plane = u32(line // count_h)
        h = u32(line - plane * count_h)
        n = u32(plane // count_d)
        return n, u32(plane - n * count_d), h, w

    @inlined
    def fetch_a(weight, weight_terms, first, row, rows, k, terms, weight_row, ra):
        at = u32(first + weight_terms[k])
        for i in range(fetched_a):
            r = u32(row + i * rows_apart)
            ra[i] = weight[u32(at + r * weight_row)] if r < rows and k < terms else zero

    @inlined
    def fetch_b(source, source_terms, first, d, h, w, size_d, size_h, size_w, k, terms, rb):
        for i in range(fetched_b):
            term = u32(k + i * terms_apart)
            e = load4(source_terms, u32(4 * term))
            if checked:
                inside = u32(d + e[1]) < size_d and u32(h + e[2]) < size_h and u32(w + e[3]) < size_w
            else:
                inside = term < terms
            rb[i] = source[u32(first + e[0])] if inside else zero

    @inlined
    def store_stage(a, b, a_at, b_at, ra, rb):
        for i in range(fetched_a):
            a[u32(a_at + i * rows_apart)] = ra[i]
        for i in range(fetched_b):
            b[u32(b_at + i * terms_apart * column_pitch)] = rb[i]

    @inlined
    def finished(x, relu):
        return zero if relu and x < zero else x

    @inlined
    def store_column(sums, j, column, first_row, out_start, to, storing, relu, accumulate, out):
        """The sums of one column, in fours if they lie together."""
        out_n, out_row, out_d, out_h, out_w, count_d, count_h, count_w, rows, columns = to
        if column < columns:
            n, d, h, w = place(column, count_d, count_h, count_w)
            at = u32(out_start + n * out_n + d * out_d + h * out_h + w * out_w)
            for g in range(thread_rows // 4):
                r = u32(first_row + g * row_jump)
                if storing == ROWS:
                    if r < rows:
                        store4(
                            out, u32(at + r), finished(sums[4 * g, j], relu), finished(sums[4 * g + 1, j], relu),
                            finished(sums[4 * g + 2, j], relu), finished(sums[4 * g + 3, j], relu),
                        )  # fmt: skip
                else:
                    for i in range(4):
                        if u32(r + i) < rows:
                            place_of_sum = u32(at + u32(r + i) * out_row)
                            x = sums[4 * g + i, j]
                            if accumulate:
                                x += out[place_of_sum]
                            out[place_of_sum] = finished(x, relu)

    # Written out: the compiler does not unroll a loop of that size, and its sums would leave the registers.
    @inlined
    def store_columns(sums, j, column, first_row, out_start, to, storing, relu, accumulate, out):
        store_column(sums, j, column, first_row, out_start, to, storing, relu, accumulate, out)
        store_column(sums, j + 1, u32(column + 1), first_row, out_start, to, storing, relu, accumulate, out)
        store_column(sums, j + 2, u32(column + 2), first_row, out_start, to, storing, relu, accumulate, out)
        store_column(sums, j + 3, u32(column + 3), first_row, out_start, to, storing, relu, accumulate, out)

    def gather(
        weight, source, bias, source_terms, weight_terms, numbers, row_tiles, storing, relu, accumulate, out
    ):
        (
            rows, columns, terms, weight_row, weight_group, source_group, count_d, count_h, count_w, step_d, step_h,
            step_w, size_d, size_h, size_w, source_n, source_d, source_h, source_w, out_n, out_row, out_group, out_d,
            out_h, out_w, out_start,
        ) = numbers  # fmt: skip
        a = cuda.shared.array(a_size, types.float32, alignment=16)
        b = cuda.shared.array(b_size, types.float32, alignment=16)
        sums = cuda.local.array((thread_rows, thread_columns), types.float32)
        ra = cuda.local.array(thread_rows, types.float32)
        rb = cuda.local.array(thread_columns, types.float32)
        next_a = cuda.local.array(fetched_a, types.float32)
        next_b = cuda.local.array(fetched_b, types.float32)
        t, block, group = u32(cuda.threadIdx.x), u32(cuda.blockIdx.x), u32(cuda.blockIdx.y)
        column_tile = u32(block // row_tiles)  # blocks of the same columns are neighbours, and share the source
        first_row = u32((block - column_tile * row_tiles) * rows_of_tile)
        first_column = u32(column_tile * columns_of_tile)

        # What this thread fetches. Columns that do not exist repeat the last, and are not stored.
        row, a_term = u32(first_row + t // DEPTH), u32(t % DEPTH)
        a_at = u32(a_term * row_pitch + t // DEPTH)
        column, b_term = u32(first_column + t % columns_of_tile), u32(t // columns_of_tile)
        b_at = u32(b_term * column_pitch + t % columns_of_tile)
        n, d, h, w = place(min(column, u32(columns - 1)), count_d, count_h, count_w)
        first = u32(group * source_group + n * source_n + d * source_d + h * source_h + w * source_w)
        d, h, w = u32(d * step_d), u32(h * step_h), u32(w * step_w)
        first_weight = u32(group * weight_group)

        for i in range(thread_rows):
            for j in range(thread_columns):
                sums[i, j] = zero
        if terms > 0:  # else a phase of the stride that no tap meets
            fetch_a(weight, weight_terms, first_weight, row, rows, a_term, terms, weight_row, next_a)
            fetch_b(source, source_terms, first, d, h, w, size_d, size_h, size_w, b_term, terms, next_b)
            store_stage(a, b, a_at, b_at, next_a, next_b)
        cuda.syncthreads()
        row_of_thread = u32(t // columns_of_threads * 4)
        column_of_thread = u32(t % columns_of_threads * 4)
        stage, k = u32(0), u32(0)
        while k < terms:
            k = u32(k + DEPTH)
            if k < terms:
                fetch_a(
                    weight, weight_terms, first_weight, row, rows, u32(k + a_term), terms, weight_row, next_a
                )
                fetch_b(
                    source, source_terms, first, d, h, w, size_d, size_h, size_w, u32(k + b_term), terms, next_b
                )
            step(a, b, u32(stage * a_stage + row_of_thread), u32(stage * b_stage + column_of_thread), sums, ra, rb)
            stage = u32(1 - stage)
            if k < terms:
                store_stage(a, b, u32(stage * a_stage + a_at), u32(stage * b_stage + b_at), next_a, next_b)
            cuda.syncthreads()

        first_row, first_column = u32(first_row + row_of_thread), u32(first_column + column_of_thread)
        if bias.size > 0:
            for i in range(thread_rows):
                r = u32(first_row + i // 4 * row_jump + i % 4)
                term = bias[np.int64(group * rows + r)] if r < rows else zero
                for j in range(thread_columns):
                    sums[i, j] += term
        out_start = u32(out_start + group * out_group)
        if storing == POSITIONS:
            positions = u32(count_d * count_h * count_w)
            for g in range(thread_columns // 4):
                column = u32(first_column + g * column_jump)
                if column < columns:
                    n = u32(column // positions)
                    at = u32(out_start + n * out_n + (column - n * positions))
                    for i in range(thread_rows):
                        r = u32(first_row + i // 4 * row_jump + i % 4)
                        if r < rows:
                            store4(
                                out, u32(at + r * out_row), finished(sums[i, 4 * g], relu),
                                finished(sums[i, 4 * g + 1], relu), finished(sums[i, 4 * g + 2], relu),
                                finished(sums[i, 4 * g + 3], relu),
                            )  # fmt: skip
            return
        to = (out_n, out_row, out_d, out_h, out_w, count_d, count_h, count_w, rows, columns)
        store_columns(sums, 0, first_column, first_row, out_start, to, storing, relu, accumulate, out)
        if thread_columns > 4:
            store_columns(
                sums, 4, u32(first_column + column_jump), first_row, out_start, to, storing, relu, accumulate, out
            )

    real, words = flat(types.float32), flat(types.uint32)
    signature = (
        real, real, array_of(types.float32, 1), words, words, types.UniTuple(types.uint32, GATHER_NUMBERS),
        types.uint32, types.uint32, types.boolean, types.boolean, real,
    )  # fmt: skip
    return BlockKernel(gather, threads, signature)


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------

# Positions that one block sums, at least: shorter chains cost more to add up than they gain.
LEAST_POSITIONS = 512
WEIGHT_NUMBERS = 24


def positions_of_part(rows: int, columns: int, groups: int, positions: int) -> int:
    """How many positions go into one part of the sum: by the shape alone, so that the bits are the same everywhere."""
    tile = _weight_tile(rows, columns)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns) * groups
    parts = max(1, min(2 * ENOUGH_BLOCKS // tiles, positions // LEAST_POSITIONS))
    return -(-positions // parts // DEPTH) * DEPTH


def _weight_tile(rows: int, columns: int) -> Tile:
    """The largest tile that both sides more than half fill: the parts of the sum make the blocks."""
    return next((t for t in TILES if 2 * rows > t.rows and 2 * columns > t.columns), TILES[-1])


def _columns_of_weights(geometry: ConvGeometry, source: Strides) -> tuple[np.ndarray, np.ndarray]:
    """Deltas and offsets in the input of each column (channel, tap) of the weight gradient."""
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    channels, tap = _terms(geometry.in_channels_per_group, taps)
    deltas = tap * geometry.dilation - np.array(geometry.pad_before)
    return deltas, channels * source[1] + deltas @ np.array(source[2:], np.int64)


@functools.lru_cache(maxsize=1024)
def _weight_plan(
    geometry: ConvGeometry, source: Strides, grad: Strides, device: int
) -> tuple[tuple[np.uint32, ...], int, DeviceArray]:
    """Numbers, positions in a part, and table of the columns."""
    deltas, offsets = _columns_of_weights(geometry, source)
    rows, columns = geometry.out_channels_per_group, len(offsets)
    counts = geometry.output_size
    positions = geometry.batch * int(np.prod(counts))
    part = positions_of_part(rows, columns, geometry.groups, positions)
    numbers = _numbers(
        rows, columns, positions, part, grad[1], rows * grad[1], geometry.in_channels_per_group * source[1],
        *counts, *geometry.stride, *geometry.input_size, grad[0], *grad[2:], source[0],
    )  # fmt: skip
    steps = _numbers(*np.multiply(source[2:], geometry.stride).tolist())
    (table,) = upload(_padded_to_steps(np.column_stack([offsets, deltas]), 0))
    return (*numbers, *steps), part, table


def _weight_grad(
    geometry: ConvGeometry, input: DeviceArray, grad_output: DeviceArray, accumulate: bool, out: DeviceArray
) -> None:
    numbers, part, table = _weight_plan(geometry, _elements(input), _elements(grad_output), current_device())
    rows, columns, positions = map(int, numbers[:3])
    tile = _weight_tile(rows, columns)
    parts = -(-positions // part)
    partial = empty((parts, out.size), np.float32, input)[1]
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    launch_blocks(
        weight_kernel(tile), (tiles, parts, geometry.groups), grad_output.flat(), input.flat(), table.flat(), numbers,
        partial.flat(),
    )  # fmt: skip
    launch(add_parts_kernel[out.dtype], out.size, partial, accumulate, out)


@functools.cache
def weight_kernel(tile: Tile) -> BlockKernel:
    """One part of the sum of a tile of the weight gradient; the terms are output positions."""
    rows_of_tile, columns_of_tile, thread_rows, thread_columns = tile
    threads = tile.threads
    row_pitch, column_pitch = tile.row_pitch, tile.column_pitch
    a_stage, b_stage = DEPTH * row_pitch, DEPTH * column_pitch
    a_size, b_size = 2 * a_stage, 2 * b_stage
    columns_of_threads = columns_of_tile // thread_columns
    row_jump, column_jump = rows_of_tile // (thread_rows // 4), columns_of_tile // (thread_columns // 4)
    apart = threads // DEPTH  # each thread fetches one position, of rows and columns this far apart
    fetched_a, fetched_b = rows_of_tile // apart, columns_of_tile // apart
    step = stepper(tile)
    zero = np.float32(0)

    @inlined
    def fetch(grad, source, first, last, row, rows, numbers, base_grad, base_source, columns, next_a, next_b):
        """The output gradients of one position, and what the taps meet there."""
        (
            _, _, _, _, grad_row, _, _, count_d, count_h, count_w, step_d, step_h, step_w, size_d, size_h, size_w,
            grad_n, grad_d, grad_h, grad_w, source_n, source_d, source_h, source_w,
        ) = numbers  # fmt: skip
        line = u32(first // count_w)
        w = u32(first - line * count_w)
        plane = u32(line // count_h)
        h = u32(line - plane * count_h)
        n = u32(plane // count_d)
        d = u32(plane - n * count_d)
        exists = first < last
        at = u32(base_grad + n * grad_n + d * grad_d + h * grad_h + w * grad_w)
        for i in range(fetched_a):
            r = u32(row + i * apart)
            next_a[i] = grad[u32(at + r * grad_row)] if exists and r < rows else zero
        at = u32(base_source + n * source_n + d * source_d + h * source_h + w * source_w)
        d, h, w = u32(d * step_d), u32(h * step_h), u32(w * step_w)
        for i in range(fetched_b):
            inside = (
                u32(d + columns[i, 1]) < size_d and u32(h + columns[i, 2]) < size_h and u32(w + columns[i, 3]) < size_w
            )
            next_b[i] = source[u32(at + columns[i, 0])] if exists and inside else zero

    @inlined
    def store_stage(a, b, a_at, b_at, next_a, next_b):
        for i in range(fetched_a):
            a[u32(a_at + i * apart)] = next_a[i]
        for i in range(fetched_b):
            b[u32(b_at + i * apart)] = next_b[i]

    def weight_grad(grad, source, table, numbers, partial):
        rows, columns, positions, part, _, grad_group, source_group = numbers[:7]
        a = cuda.shared.array(a_size, types.float32, alignment=16)
        b = cuda.shared.array(b_size, types.float32, alignment=16)
        sums = cuda.local.array((thread_rows, thread_columns), types.float32)
        ra = cuda.local.array(thread_rows, types.float32)
        rb = cuda.local.array(thread_columns, types.float32)
        next_a = cuda.local.array(fetched_a, types.float32)
        next_b = cuda.local.array(fetched_b, types.float32)
        own_columns = cuda.local.array((fetched_b, 4), types.uint32)
        t, group = u32(cuda.threadIdx.x), u32(cuda.blockIdx.z)
        row_tiles = u32((rows + rows_of_tile - 1) // rows_of_tile)
        column_tile = u32(u32(cuda.blockIdx.x) // row_tiles)
        first_row = u32((u32(cuda.blockIdx.x) - column_tile * row_tiles) * rows_of_tile)
        first_column = u32(column_tile * columns_of_tile)
        k = u32(u32(cuda.blockIdx.y) * part)
        last = min(u32(k + part), positions)

        own, term = u32(t // DEPTH), u32(t % DEPTH)
        for i in range(fetched_b):  # columns that do not exist repeat the last, and are not stored
            e = load4(table, u32(4 * min(u32(first_column + own + i * apart), u32(columns - 1))))
            for j in range(4):
                own_columns[i, j] = e[j]
        a_at, b_at = u32(term * row_pitch + own), u32(term * column_pitch + own)
        row, base_grad, base_source = u32(first_row + own), u32(group * grad_group), u32(group * source_group)

        for i in range(thread_rows):
            for j in range(thread_columns):
                sums[i, j] = zero
        fetch(
            grad, source, u32(k + term), last, row, rows, numbers, base_grad, base_source, own_columns, next_a, next_b
        )
        store_stage(a, b, a_at, b_at, next_a, next_b)
        cuda.syncthreads()
        row_of_thread = u32(t // columns_of_threads * 4)
        column_of_thread = u32(t % columns_of_threads * 4)
        stage = u32(0)
        while k < last:
            k = u32(k + DEPTH)
            if k < last:
                fetch(
                    grad, source, u32(k + term), last, row, rows, numbers, base_grad, base_source, own_columns,
                    next_a, next_b,
                )  # fmt: skip
            step(a, b, u32(stage * a_stage + row_of_thread), u32(stage * b_stage + column_of_thread), sums, ra, rb)
            stage = u32(1 - stage)
            if k < last:
                store_stage(a, b, u32(stage * a_stage + a_at), u32(stage * b_stage + b_at), next_a, next_b)
            cuda.syncthreads()

        at = u32(u32(u32(cuda.blockIdx.y) * u32(cuda.gridDim.z) + group) * rows)
        for i in range(thread_rows):
            r = u32(first_row + row_of_thread + i // 4 * row_jump + i % 4)
            if r < rows:
                for j in range(thread_columns):
                    column = u32(first_column + column_of_thread + j // 4 * column_jump + j % 4)
                    if column < columns:
                        partial[u32(u32(at + r) * columns + column)] = sums[i, j]

    real, words = flat(types.float32), flat(types.uint32)
    signature = (real, real, words, types.UniTuple(types.uint32, WEIGHT_NUMBERS), real)
    return BlockKernel(weight_grad, threads, signature)


@kernel(lambda element: (array_of(element.stored, 2), types.boolean, array_of(element.stored, 5)))
def add_parts_kernel(element: Element):
    """The parts of each weight's gradient, added in order."""
    load, store, zero = element.load, element.store, element.real(0)

    def add_parts_kernel(partial, accumulate, grad):
        _, channels, kernel_d, kernel_h, kernel_w = grad.shape
        for index in range(cuda.grid(1), grad.size, cuda.gridsize(1)):
            total = zero
            for part in range(partial.shape[0]):
                total += load(partial[part, index])
            rest, w = divmod(index, kernel_w)
            rest, h = divmod(rest, kernel_h)
            rest, d = divmod(rest, kernel_d)
            o, c = divmod(rest, channels)
            if accumulate:
                total += load(grad[o, c, d, h, w])
            grad[o, c, d, h, w] = store(total)

    return add_parts_kernel


# ---------------------------------------------------------------------------------------------------------------------
# Entries: False, with nothing done, for what is left to the simple kernels
# ---------------------------------------------------------------------------------------------------------------------


def forward(
    geometry: ConvGeometry, input: DeviceArray, weight: DeviceArray, bias: DeviceArray, relu: bool, out: DeviceArray
) -> bool:
    if not _applies(geometry, weight, input, out):
        return False
    for part, (x, y) in _samples(geometry, input, out):
        _gather("forward", part, weight, x, bias, relu, False, y)
    return True


def input_grad(
    geometry: ConvGeometry, weight: DeviceArray, grad_output: DeviceArray, bias: DeviceArray, relu: bool,
    accumulate: bool, out: DeviceArray,
) -> bool:  # fmt: skip
    if not _applies(geometry, weight, grad_output, out):
        return False
    for part, (dy, dx) in _samples(geometry, grad_output, out):
        _gather("input_grad", part, weight, dy, bias, relu, accumulate, dx)
    return True


def weight_grad(
    geometry: ConvGeometry, input: DeviceArray, grad_output: DeviceArray, accumulate: bool, out: DeviceArray
) -> bool:
    if not _applies(geometry, input, grad_output) or out.size > MOST_ELEMENTS // (2 * ENOUGH_BLOCKS):
        return False
    for i, (part, (x, dy)) in enumerate(_samples(geometry, input, grad_output)):
        _weight_grad(part, x, dy, accumulate or i > 0, out)
    return True


def _extent(array: DeviceArray, samples: int | None = None) -> int:
    """Elements from the first to the last, of the first `samples` if given."""
    shape = array.shape if samples is None else (samples, *array.shape[1:])
    return sum((n - 1) * s for n, s in zip(shape, array.strides, strict=True)) // array.dtype.itemsize + 1


def _applies(geometry: ConvGeometry, *arrays: DeviceArray) -> bool:
    """float32, zeros for padding, groups of some channels, no negative strides, no sample too large for 32-bit offsets.

    Nothing here depends on the batch: a sample has the same bits whatever batch it is in.
    """
    narrow = min(geometry.in_channels_per_group, geometry.out_channels_per_group) < LEAST_ROWS
    return (
        geometry.padding_mode == "zeros"
        and not (narrow and geometry.groups > 1)
        and all(a.dtype == np.float32 and a.size > 0 and min(a.strides) >= 0 for a in arrays)
        and all(_extent(a, 1) <= MOST_ELEMENTS for a in arrays)
    )


def _samples(geometry: ConvGeometry, *arrays: DeviceArray) -> Iterator[tuple[ConvGeometry, list[DeviceArray]]]:
    """The whole batch, or as many samples at a time as 32-bit offsets reach."""
    if all(_extent(a) <= MOST_ELEMENTS for a in arrays):
        yield geometry, list(arrays)
        return
    most = max(n for n in _halvings(geometry.batch) if all(_extent(a, n) <= MOST_ELEMENTS for a in arrays))
    for first in range(0, geometry.batch, most):
        count = min(most, geometry.batch - first)
        yield dataclasses.replace(geometry, batch=count), [a.samples(first, count) for a in arrays]


def _halvings(n: int) -> Iterator[int]:
    while n:
        yield n
        n //= 2
