"""The kernels of `depthwise`: a thread computes a patch of the result, or the sums of all taps over its patches.

In each dimension an `Axis` states which sources the results of a thread meet, with numbers that are constants of the
kernel: its loops are unrolled, and what no tap meets costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import types

from . import intrinsics
from ._cuda import cuda
from .intrinsics import load1_where, load2_where, load4_where, store2, store4, u32
from .jit import ELEMENTS, BlockKernel, array_of, flat, inlined

__all__ = ["THREADS", "VECTOR", "WARP", "Axis", "Patch", "gather_kernel", "weight_kernel"]

THREADS = 256
WARP = 32
WARPS = THREADS // WARP

VECTOR = 4  # elements of the longest vector: 128 bits of float32, 64 of the 16-bit types


# ---------------------------------------------------------------------------------------------------------------------
# One dimension
# ---------------------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """How the results of one thread meet their source along one dimension.

    Result o and tap k of the thread meet source ``(tap_step * k + result_step * o + offset) / divisor``, where that is
    a whole number, counted from the first that the thread reads: ``first + advance * thread``.
    """

    taps: int
    results: int
    sources: int
    tap_step: int
    result_step: int
    offset: int
    divisor: int
    first: int
    advance: int

    @classmethod
    def gather(
        cls, inverse: bool, taps: int, results: int, stride: int, dilation: int, before: int, vector: int
    ) -> Axis:
        """The axis of a forward pass, or of an input gradient if `inverse`; sources begin at multiples of `vector`."""
        tap_step, result_step, offset, divisor = dilation, stride, -before, 1
        if inverse:
            tap_step, result_step, offset, divisor = -dilation, 1, before, stride
        numbers = [tap_step * k + result_step * o + offset for k in range(taps) for o in range(results)]
        meetings = [n // divisor for n in numbers if n % divisor == 0]
        first = min(meetings) // vector * vector
        sources = -(-(max(meetings) + 1 - first) // vector) * vector
        return cls(
            taps, results, sources, tap_step, result_step, offset - divisor * first, divisor, first,
            result_step * results // divisor,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a source in registers
# ---------------------------------------------------------------------------------------------------------------------


def _number(dtype: str) -> types.Type:
    return types.float64 if dtype == "float64" else types.float32


def _array_type(dtype: str, vector: int) -> types.Array:
    """What a kernel takes an array for that it reads in vectors: pairs of 16-bit numbers are words."""
    if dtype in ("float16", "bfloat16"):
        return flat(types.uint32 if vector > 1 else types.uint16)
    return flat(ELEMENTS[dtype].stored)


def _reader(dtype: str, vector: int) -> Callable[..., tuple]:
    """``(array, at, valid)``: `vector` numbers from element `at` on, as the type they are summed in, or zeros."""
    if dtype in ("float32", "float64"):
        load = {1: load1_where, 2: load2_where, 4: load4_where}[vector]

        @inlined
        def read(array, at, valid):
            return load(array, at, valid)

        return read
    unpack = getattr(intrinsics, f"unpack_{dtype}")
    if vector == 1:

        @inlined
        def read(array, at, valid):
            return (unpack(u32(load1_where(array, at, valid)[0]))[0],)

    elif vector == 2:

        @inlined
        def read(array, at, valid):
            return unpack(load1_where(array, u32(at // 2), valid)[0])

    else:

        @inlined
        def read(array, at, valid):
            words = load2_where(array, u32(at // 2), valid)
            low, high = unpack(words[0]), unpack(words[1])
            return low[0], low[1], high[0], high[1]

    return read


def _line_reader(dtype: str, vector: int, count: int) -> Callable[..., None]:
    """``(array, at, column_stride, column, width, valid, line)``: `count` numbers of a row into `line`.

    They begin at `column`, which is at element `at`; those outside of the row's `width`, or of a row that is not
    `valid`, are zeros. A vector is inside or outside as a whole.
    """
    read = _reader(dtype, vector)

    @inlined
    def read_line(array, at, column_stride, column, width, valid, line):
        for i in range(0, count, vector):
            x = read(array, u32(at + i * column_stride), valid and u32(column + i) < width)
            for e in range(vector):
                line[i + e] = x[e]

    return read_line


# ---------------------------------------------------------------------------------------------------------------------
# Forward pass and input gradient
# ---------------------------------------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """What is constant in a kernel of this module."""

    dtype: str
    vector: int  # elements of one load
    channels_last: bool  # neighbouring threads differ by channel, otherwise by column
    deep: bool  # there is a third dimension
    rows: Axis
    columns: Axis

    @property
    def stored_vector(self) -> int:
        """Elements that may be stored at once."""
        return 1 if self.channels_last or self.vector == 1 else min(VECTOR, self.columns.results)


GATHER_NUMBERS = 36
WRAP = 1 << 32  # of 32-bit numbers: those from the half on stand for negative ones
HALF = WRAP // 2


def _in_sequence(functions: list[Callable[..., None]]) -> Callable[..., None]:
    """One function that calls them all: a loop that is unrolled, which the compiler would not do at its length."""
    if len(functions) == 1:
        return functions[0]
    first, then = _in_sequence(functions[: len(functions) // 2]), _in_sequence(functions[len(functions) // 2 :])

    @inlined
    def both(*arguments):
        first(*arguments)
        then(*arguments)

    return both


def _tap_reader(dtype: str, row_taps: int, column_taps: int) -> Callable[..., None]:
    """``(weight, at, stride_h, stride_w, taps)``: the taps that meet one plane."""
    read = _reader(dtype, 1)

    def row_of_taps(j):
        @inlined
        def row(weight, at, stride_h, stride_w, taps):
            for k in range(column_taps):
                taps[j, k] = read(weight, u32(at + j * stride_h + k * stride_w), True)[0]

        return row

    return _in_sequence([row_of_taps(j) for j in range(row_taps)])


def _multiplier(rows: Axis, columns: Axis, r: int, of_weights: bool) -> Callable[..., None]:
    """``(line, taps, results)``: what row r of the source adds to the results, or `of_weights` to the taps."""
    row_taps, row_tap_step = rows.taps, rows.tap_step
    row_results, row_result_step, row_meeting = rows.results, rows.result_step, rows.divisor * r - rows.offset
    column_taps, column_results, divisor = columns.taps, columns.results, columns.divisor
    tap_step, result_step, offset = columns.tap_step, columns.result_step, columns.offset

    @inlined
    def multiply(line, taps, results):
        for t in range(row_results):
            meeting = row_meeting - row_result_step * t
            j = meeting // row_tap_step
            if meeting % row_tap_step == 0 and j >= 0 and j < row_taps:
                for v in range(column_results):
                    for k in range(column_taps):
                        place = tap_step * k + result_step * v + offset
                        if place % divisor == 0:
                            if of_weights:
                                taps[j, k] += line[place // divisor] * results[t, v]
                            else:
                                results[t, v] += line[place // divisor] * taps[j, k]

    return multiply


def _plane_multiplier(patch: Patch, of_weights: bool) -> Callable[..., None]:
    """``(source, at, strides, row, column, sizes, inside, line, taps, results)``: what a plane of the source adds.

    The thread's source begins at row `row` and column `column`, which is element `at`; `strides` and `sizes` are those
    of rows and columns.
    """
    rows, columns = patch.rows, patch.columns
    read_line = _line_reader(patch.dtype, patch.vector, columns.sources)

    def row_of_source(r):
        multiply = _multiplier(rows, columns, r, of_weights)

        @inlined
        def add_row(source, at, strides, row, column, sizes, inside, line, taps, results):
            valid = inside and u32(row + r) < sizes[0]
            read_line(source, u32(at + r * strides[0]), strides[1], column, sizes[1], valid, line)
            multiply(line, taps, results)

        return add_row

    return _in_sequence([row_of_source(r) for r in range(rows.sources)])


# A factory: what its nested functions share is decided once, for one patch.
@functools.cache
def gather_kernel(patch: Patch) -> BlockKernel:
    """The forward pass and the input gradient: a thread computes a patch of the result."""
    dtype, vector, channels_last, deep, rows, columns = patch
    element = ELEMENTS[dtype]
    load, store, zero = element.load, element.store, element.real(0)
    number = _number(dtype)
    row_results, row_first, row_advance = rows.results, rows.first % WRAP, rows.advance
    column_results, column_first, column_advance = columns.results, columns.first % WRAP, columns.advance
    row_taps, column_taps, line_length = rows.taps, columns.taps, columns.sources
    read_taps, add_plane = _tap_reader(dtype, row_taps, column_taps), _plane_multiplier(patch, False)
    stored = patch.stored_vector
    store_vector = _writer(dtype, stored)

    @inlined
    def place(index, channels, across, down, depth):
        """Patch (column, row, plane), channel and sample of a thread."""
        if channels_last:
            rest = u32(index // channels)
            o = u32(index - rest * channels)
        else:
            rest, o = index, u32(0)
        line = u32(rest // across)
        x = u32(rest - line * across)
        plane = u32(line // down)
        y = u32(line - plane * down)
        z = u32(0)
        if deep:
            volume = u32(plane // depth)
            z = u32(plane - volume * depth)
            plane = volume
        if channels_last:
            return x, y, z, o, plane
        n = u32(plane // channels)
        return x, y, z, u32(plane - n * channels), n

    def gather(source, weight, bias, numbers, in_vectors, relu, accumulate, out, out_vectors):
        (
            threads, channels, across, down, depth, height, width, channels_per_group, sources, source_depth,
            source_height, source_width, source_n, source_group, source_c, source_d, source_h, source_w, weight_group,
            weight_result, weight_source, weight_d, weight_h, weight_w, planes, plane_tap_step, plane_result_step,
            plane_offset, plane_divisor, folds, fold_step, out_n, out_c, out_d, out_h, out_w,
        ) = numbers  # fmt: skip
        sums = cuda.local.array((row_results, column_results), number)
        taps = cuda.local.array((row_taps, column_taps), number)
        line = cuda.local.array(line_length, number)
        index = u32(u32(cuda.blockIdx.x) * THREADS + u32(cuda.threadIdx.x))
        if index >= threads:
            return
        x, y, z, o, n = place(index, channels, across, down, depth)
        group = u32(o // channels_per_group)
        first = zero
        if bias.size > 0:
            first = load(bias[np.int64(o)])
        for t in range(row_results):
            for v in range(column_results):
                sums[t, v] = first

        first_row, column = u32(y * row_advance + row_first), u32(x * column_advance + column_first)
        first_source = u32(n * source_n + group * source_group + column * source_w)
        first_weight = u32(group * weight_group + (o - group * channels_per_group) * weight_result)
        for c in range(sources):
            for i in range(planes):
                plane, inside = u32(0), True
                if deep:
                    plane = u32(i * plane_tap_step + z * plane_result_step + plane_offset)
                    inside = plane < HALF
                    if plane_divisor > 1:
                        if plane % plane_divisor != 0:
                            continue
                        plane = u32(plane // plane_divisor)
                    inside = inside and plane < source_depth
                for fold in range(folds):
                    row = u32(first_row + fold * fold_step)
                    at = u32(first_weight + c * weight_source + i * weight_d + fold * weight_h)
                    read_taps(weight, at, weight_h, weight_w, taps)
                    at = u32(first_source + c * source_c + plane * source_d + row * source_h)
                    add_plane(
                        source, at, (source_h, source_w), row, column, (source_height, source_width), inside, line,
                        taps, sums,
                    )  # fmt: skip

        row, column = u32(y * row_results), u32(x * column_results)
        at = u32(n * out_n + o * out_c + z * out_d + row * out_h + column * out_w)
        for t in range(row_results):
            if u32(row + t) < height:
                place_of_row = u32(at + t * out_h)
                if accumulate:
                    for v in range(column_results):
                        if u32(column + v) < width:
                            sums[t, v] += load(out[u32(place_of_row + v * out_w)])
                if relu:
                    for v in range(column_results):
                        sums[t, v] = zero if sums[t, v] < zero else sums[t, v]
                if in_vectors:
                    for v in range(0, column_results, stored):
                        if u32(column + v) < width:
                            store_vector(out_vectors, u32(place_of_row + v), sums, t, v)
                else:
                    for v in range(column_results):
                        if u32(column + v) < width:
                            out[u32(place_of_row + v * out_w)] = store(sums[t, v])

    elements = flat(element.stored)
    signature = (
        _array_type(dtype, vector), _array_type(dtype, 1), array_of(element.stored, 1),
        types.UniTuple(types.uint32, GATHER_NUMBERS), types.boolean, types.boolean, types.boolean, elements,
        _array_type(dtype, stored),
    )  # fmt: skip
    return BlockKernel(gather, THREADS, signature)


def _writer(dtype: str, vector: int) -> Callable[..., None]:
    """``(array, at, sums, t, v)``: store `vector` sums of row t, from column v on, at element `at`."""
    pack = getattr(intrinsics, f"pack_{dtype}", None)
    if vector == 1:
        store = ELEMENTS[dtype].store

        @inlined
        def write(array, at, sums, t, v):
            array[at] = store(sums[t, v])

    elif pack is None and vector == 2:

        @inlined
        def write(array, at, sums, t, v):
            store2(array, at, sums[t, v], sums[t, v + 1])

    elif pack is None:

        @inlined
        def write(array, at, sums, t, v):
            store4(array, at, sums[t, v], sums[t, v + 1], sums[t, v + 2], sums[t, v + 3])

    elif vector == 2:

        @inlined
        def write(array, at, sums, t, v):
            array[u32(at // 2)] = pack(sums[t, v], sums[t, v + 1])

    else:

        @inlined
        def write(array, at, sums, t, v):
            low, high = pack(sums[t, v], sums[t, v + 1]), pack(sums[t, v + 2], sums[t, v + 3])
            store2(array, u32(at // 2), low, high)

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Weight gradient
# ---------------------------------------------------------------------------------------------------------------------

WEIGHT_NUMBERS = 32


# A factory: what its nested functions share is decided once, for one patch.
@functools.cache
def weight_kernel(patch: Patch) -> BlockKernel:
    """One part of the sums of one filter, or with channels last of the filters of 32 neighbouring channels."""
    dtype, vector, channels_last, deep, rows, columns = patch
    zero, number = ELEMENTS[dtype].real(0), _number(dtype)
    row_results, row_first, row_advance = rows.results, rows.first % WRAP, rows.advance
    column_results, column_first, column_advance = columns.results, columns.first % WRAP, columns.advance
    row_taps, column_taps = rows.taps, columns.taps
    line_length = max(columns.sources, column_results)
    read_grads = _line_reader(dtype, vector, column_results)
    add_plane = _plane_multiplier(patch, True)
    lanes = WARP if channels_last else 1  # channels of a block
    slots = THREADS // lanes
    shared_size = WARPS * column_taps * lanes

    @inlined
    def sum_of_warp(x):
        """The same order in every lane's tree: lanes a power of two apart are added."""
        if not channels_last:
            x += cuda.shfl_xor_sync(0xFFFFFFFF, x, 16)
            x += cuda.shfl_xor_sync(0xFFFFFFFF, x, 8)
            x += cuda.shfl_xor_sync(0xFFFFFFFF, x, 4)
            x += cuda.shfl_xor_sync(0xFFFFFFFF, x, 2)
            x += cuda.shfl_xor_sync(0xFFFFFFFF, x, 1)
        return x

    def row_of_sums(j):
        """Row j of the block's filters: the warps' sums through shared memory, added in order."""

        @inlined
        def store_row(taps, warps, t, first_channel, channels, channel_step, at, partial):
            warp, lane = u32(t // WARP), u32(t % WARP)
            for k in range(column_taps):
                x = sum_of_warp(taps[j, k])
                if lane < lanes:
                    warps[u32((warp * column_taps + k) * lanes + lane)] = x
            cuda.syncthreads()
            for i in range(t, column_taps * lanes, THREADS):
                k = u32(i // lanes)
                channel = u32(i - k * lanes)
                total = zero
                for w in range(WARPS):
                    total += warps[u32(w * column_taps * lanes + i)]
                if u32(first_channel + channel) < channels:
                    partial[u32(at + channel * channel_step + j * column_taps + k)] = total
            cuda.syncthreads()

        return store_row

    store_sums = _in_sequence([row_of_sums(j) for j in range(row_taps)])

    def weight_grad(source, grad, numbers, partial):
        (
            channels, channels_per_group, sources, planes, folds, across, down, depth, patches, part, source_depth,
            source_height, source_width, source_n, source_group, source_c, source_d, source_h, source_w, grad_n, grad_c,
            grad_d, grad_h, grad_w, plane_tap_step, plane_result_step, plane_offset, fold_step, filters_of_channel,
            taps_of_filter, width, size,
        ) = numbers  # fmt: skip
        warps = cuda.shared.array(shared_size, number)
        taps = cuda.local.array((row_taps, column_taps), number)
        grads = cuda.local.array((row_results, column_results), number)
        line = cuda.local.array(line_length, number)
        t = u32(cuda.threadIdx.x)
        slot, lane = u32(t // lanes), u32(t % lanes)

        # block -> first channel, channel of the source in its group, plane of the filter and row of it
        rest = u32(u32(cuda.blockIdx.x) // folds)
        fold = u32(u32(cuda.blockIdx.x) - rest * folds)
        volume = u32(rest // planes)
        i = u32(rest - volume * planes)
        first_channel = u32(volume // sources)
        c = u32(volume - first_channel * sources)
        first_channel = u32(first_channel * lanes)
        o = u32(first_channel + lane)
        exists = o < channels
        group = u32(o // channels_per_group)

        for j in range(row_taps):
            for k in range(column_taps):
                taps[j, k] = zero
        p = u32(u32(cuda.blockIdx.y) * part)
        last = min(u32(p + part), patches)
        p = u32(p + slot)
        while p < last:
            rest = u32(p // across)
            x = u32(p - rest * across)
            n = u32(rest // down)
            y = u32(rest - n * down)
            z, plane, inside = u32(0), u32(0), exists
            if deep:
                rest = n
                n = u32(rest // depth)
                z = u32(rest - n * depth)
                plane = u32(i * plane_tap_step + z * plane_result_step + plane_offset)
                inside = inside and plane < source_depth
            row, column = u32(y * row_results), u32(x * column_results)
            at = u32(n * grad_n + o * grad_c + z * grad_d + row * grad_h + column * grad_w)
            for g in range(row_results):
                read_grads(grad, u32(at + g * grad_h), grad_w, column, width, exists, line)
                for v in range(column_results):
                    grads[g, v] = line[v]
            row = u32(u32(y * row_advance + row_first) + fold * fold_step)
            column = u32(x * column_advance + column_first)
            at = u32(n * source_n + group * source_group + c * source_c + plane * source_d)
            at = u32(at + row * source_h + column * source_w)
            add_plane(
                source, at, (source_h, source_w), row, column, (source_height, source_width), inside, line, taps, grads
            )
            p = u32(p + slots)

        at = u32(((first_channel * sources + c) * planes + i) * taps_of_filter + fold * column_taps)
        store_sums(
            taps, warps, t, first_channel, channels, filters_of_channel, u32(u32(cuda.blockIdx.y) * size + at), partial
        )

    arrays = _array_type(dtype, vector)
    signature = (arrays, arrays, types.UniTuple(types.uint32, WEIGHT_NUMBERS), flat(number))
    return BlockKernel(weight_grad, THREADS, signature)
