"""Convolution as a matrix product whose second operand is read in place, through tables of offsets.

The forward pass is a `Gather`: with columns j, the output positions of all samples, and terms k = (channel, tap),

    out[row, j] = sum over k of  weight[row, k] * source[sample(j), channel(k), step * j + delta(k)]

where a source coordinate outside its array is a zero. The input gradient is one gather for each phase of the stride:
the input positions q with (q + before) mod stride = phase meet the taps of that phase only, at output coordinates
j + delta(k), so that nothing is multiplied in vain (Dumoulin and Visin, A guide to convolution arithmetic, ch. 4).
The weight gradient sums over positions; its columns are the (channel, tap):

    grad[row, (channel, tap)] = sum over j of  grad_output[row, j] * input[sample(j), channel, step * j + delta]

in parts of a fixed number of positions, which a second kernel adds in order. Offsets are 32-bit: arrays of 2**31
elements or more are taken a few samples at a time, and left to the simple kernels if one sample is too large.

The same kernels serve every type, by the products of `tiles`: float32 and float64 on the ordinary units; float16,
bfloat16 and, where the user allows it, float32 rounded to tf32 on the tensor cores, all three summed in float32. There
weights are copied 16 bytes at a time, from an ordered copy where they do not lie like that, and so is a source whose
channels lie together; any other source goes through registers. What a sum adds, and in which order, depends on the
shape and the order of the dimensions in memory, not on what is aligned.

Here are the gathers; the tables are in `implicit_gemm_tables`, the weight gradient in `implicit_gemm_weight_grad`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numba import from_dtype, types

from ..backends import get_float32_precision
from ..geometry import ConvGeometry
from ._cuda import DeviceArray, cuda, current_device, launch, launch_blocks, scratch, upload
from .implicit_gemm_tables import (
    Gather,
    column_numbers,
    forward_gather,
    input_grad_gathers,
    padded_to_steps,
    source_table,
)
from .implicit_gemm_weight_grad import WeightPass, launch_passes, weight_plan
from .intrinsics import copy16_async, copy_commit, copy_wait_all, copy_wait_all_but_one, load4, round_tf32, store4, u32
from .jit import BlockKernel, Element, array_of, flat, inlined, kernel
from .offsets import MOST_ELEMENTS, Strides, as_uint32, extent, split_batch, strides_in_elements
from .tiles import ARITHMETIC, ENOUGH_BLOCKS, Tile, choose_tile, product

__all__ = ["forward", "input_grad", "weight_grad"]

LEAST_ROWS = 4  # channels of a group: fewer leave most of a tile empty, in every one of many groups

# How a thread stores its sums: one by one; several positions at once, for channels first; several rows, for channels
# last.
ONE_BY_ONE, POSITIONS, ROWS = 0, 1, 2


# ---------------------------------------------------------------------------------------------------------------------
# Gathers: the forward pass and the input gradient
# ---------------------------------------------------------------------------------------------------------------------

GATHER_NUMBERS = 26
# Steps whose operands are in shared memory at one time, where all are copied there: three of the largest tile of the
# tensor cores are its 48 KiB. A copy then has the time of two steps to arrive, of the two that others take one.
STAGES = 3


class Plan(NamedTuple):
    """A gather as the kernel takes it."""

    gather: Gather
    numbers: tuple[np.uint32, ...]
    terms: DeviceArray
    weights: DeviceArray
    chunked: bool  # the chunks of the source are copied 16 bytes at a time
    ordered: tuple[int, int, int] | None  # groups, rows and terms of an ordered copy of the weights


@functools.lru_cache(maxsize=1024)
def _plans(
    operation: str, kind: str, geometry: ConvGeometry, weight: Strides, source: Strides, out: Strides,
    aligned: tuple[bool, bool], device: int,
) -> list[Plan]:  # fmt: skip
    """The gathers of an operation; strides count elements. `aligned`: are weight and source, to 16 bytes?"""
    arithmetic = ARITHMETIC[kind]
    chunk, depth = arithmetic.chunk, arithmetic.depth
    channels_together = arithmetic.tensor and source[1] == 1
    if operation == "forward":
        gathers = [forward_gather(geometry, weight, channels_together)]
        weight_row, channels = weight[0], geometry.in_channels_per_group
    else:
        gathers = list(input_grad_gathers(geometry, weight, channels_together))
        weight_row, channels = weight[1], geometry.out_channels_per_group
    weight_group = geometry.out_channels_per_group * weight[0]
    plans = []
    for gather in gathers:
        sizes_and_strides = zip((geometry.batch, *gather.size), (source[0], *source[2:]), strict=True)
        chunks_aligned = channels % chunk == 0 and all(s % chunk == 0 for n, s in sizes_and_strides if n > 1)
        chunked = channels_together and aligned[1] and chunks_aligned
        ordered, row, group = None, weight_row, weight_group
        in_place = (
            aligned[0] and all(s % chunk == 0 for s in (gather.terms, weight_row, weight_group))
            and np.array_equal(gather.weights, np.arange(gather.terms))
        )  # fmt: skip
        if arithmetic.tensor and gather.terms and not in_place:
            row = -(-gather.terms // chunk) * chunk
            group = gather.rows * row
            ordered = geometry.groups, gather.rows, row
        numbers = as_uint32(
            gather.rows, gather.columns, gather.terms, row, group, channels * source[1],
            *column_numbers(gather, source),
            out[0], out[1], gather.rows * out[1], *np.multiply(out[2:], gather.pace).tolist(),
            int(np.dot(out[2:], gather.origin)),
        )  # fmt: skip
        every = chunk if chunked else 1
        terms = source_table(gather, source, every, depth // every)
        plans.append(
            Plan(gather, numbers, *upload(terms, padded_to_steps(gather.weights, 0, depth)), chunked, ordered)
        )
    return plans


def _storing(gather: Gather, out: DeviceArray, run: int, modes: tuple[int, ...]) -> int:
    """How the kernel may store its sums, `run` at once in one of `modes`."""
    n, row, *space = strides_in_elements(out)
    if out.pointer % min(16, run * out.dtype.itemsize):
        return ONE_BY_ONE
    positions = int(np.prod(gather.counts))
    dense = [gather.counts[1] * gather.counts[2], gather.counts[2], 1]
    lie_together = all(c == 1 or s == d for c, s, d in zip(gather.counts, space, dense, strict=True))
    if lie_together and gather.pace == (1, 1, 1) and positions % run == n % run == row % run == 0:
        return POSITIONS if POSITIONS in modes else ONE_BY_ONE
    if row == 1 and gather.rows % run == 0 and all(s % run == 0 for s in (n, *space)):
        return ROWS if ROWS in modes else ONE_BY_ONE
    return ONE_BY_ONE


def _gather(
    operation: str, geometry: ConvGeometry, weight: DeviceArray, source: DeviceArray, bias: DeviceArray, relu: bool,
    accumulate: bool, out: DeviceArray,
) -> None:  # fmt: skip
    kind = _kind(out.dtype)
    arithmetic = ARITHMETIC[kind]
    strides = strides_in_elements(weight), strides_in_elements(source), strides_in_elements(out)
    aligned = weight.pointer % 16 == 0, source.pointer % 16 == 0
    rows_together = arithmetic.tensor and strides[2][1] == 1
    modes = ((ROWS,) if rows_together else (POSITIONS,)) if arithmetic.tensor else (POSITIONS, ROWS)
    for plan in _plans(operation, kind, geometry, *strides, aligned, current_device()):
        gather = plan.gather
        tile = choose_tile(gather.rows, gather.columns, geometry.groups, arithmetic.tiles)
        row_tiles, column_tiles = -(-gather.rows // tile.rows), -(-gather.columns // tile.columns)
        storing = ONE_BY_ONE if accumulate else _storing(gather, out, arithmetic.run, modes)
        launch_blocks(
            gather_kernel(kind, tile, gather.checked, plan.chunked, rows_together),
            (row_tiles * column_tiles, geometry.groups),
            _ordered(operation, plan, geometry, weight).flat(arithmetic.operand), source.flat(arithmetic.operand),
            _as(bias, arithmetic.result), plan.terms.flat(), plan.weights.flat(), plan.numbers, np.uint32(row_tiles),
            np.uint32(storing), relu, accumulate, out.flat(arithmetic.result),
        )  # fmt: skip


def _as(array: DeviceArray, dtype: type) -> DeviceArray:
    """The same memory as elements of another type of the same size."""
    return DeviceArray(array.pointer, array.shape, array.strides, dtype, array.owner, array.stream, array.writeable)


def _ordered(operation: str, plan: Plan, geometry: ConvGeometry, weight: DeviceArray) -> DeviceArray:
    """The weights of a gather, the terms of a row in their order and each row at a multiple of 16 bytes."""
    if plan.ordered is None:
        return weight
    copy = scratch(plan.ordered, weight.stored_dtype, weight)
    strides = strides_in_elements(weight)
    group, row = geometry.out_channels_per_group * strides[0], strides[0 if operation == "forward" else 1]
    launch(
        order_kernel[weight.dtype], copy.size, weight.flat(), plan.weights.flat(), plan.gather.terms, group, row, copy
    )
    return copy


@kernel(
    lambda element: (
        flat(element.stored), flat(types.uint32), types.int64, types.int64, types.int64, array_of(element.stored, 3),
    )
)  # fmt: skip
def order_kernel(element: Element):
    """The weights of each group and row by the offsets of their terms, and zeros behind them."""
    store, zero = element.store, element.real(0)

    def order_kernel(weight, offsets, terms, group_stride, row_stride, ordered):
        _, rows, pitch = ordered.shape
        for index in range(cuda.grid(1), ordered.size, cuda.gridsize(1)):
            rest, k = divmod(index, pitch)
            group, row = divmod(rest, rows)
            if k < terms:
                ordered[group, row, k] = weight[group * group_stride + row * row_stride + offsets[k]]
            else:
                ordered[group, row, k] = store(zero)

    return order_kernel


def _resident(kind: str, tile: Tile, checked: bool) -> int | None:
    """Two blocks of the largest tile, which alone would hide little latency. Without checks of coordinates its float32
    kernel fits by itself, and would be made to spill. The compiler saves registers for more of the smaller tiles by
    itself, and on the tensor cores moves or spills them for it in the innermost loop: only of the tile of 32 rows it
    takes up to 190 if it may, and 168 with the same loop if there are to be three blocks (four would spill).
    """
    tensor = ARITHMETIC[kind].tensor
    if tile.rows * tile.columns == 128 * 128 and (tensor or checked):
        return 2
    if tensor:
        return 3 if (tile.rows, tile.threads) == (32, 128) else 1
    # Of small tiles it saves too many (48, and spills for sm_86 to sm_90), or too few (84, which lets two blocks in).
    return {("float32", 64, 64): 4, ("float32", 32, 64): 8, ("float64", 64, 64): 3}.get((kind, tile.rows, tile.columns))


# A factory: what its nested functions share is decided once, for one tile.
@functools.cache
def gather_kernel(
    kind: str, tile: Tile, checked: bool, chunked: bool = False, rows_together: bool = False
) -> BlockKernel:
    """The kernel of a `Gather`.

    `checked`: coordinates may be outside the source. On the tensor cores, `chunked`: the chunks of the source are
    copied 16 bytes at a time; `rows_together`: the rows lie together in the result.
    """
    arithmetic = ARITHMETIC[kind]
    (
        a_stage, b_stage, row_of_stage, (row_run, row_spacing, row_jump), (column_run, column_spacing, column_jump),
        (words_a, words_b), place_a, place_b, ahead, origin, step, put, store_run,
    ) = product(tile, kind, rows_together, wide=True, packed=chunked)  # fmt: skip
    rows_of_tile, columns_of_tile, thread_rows, thread_columns = tile
    threads, chunk, run = tile.threads, arithmetic.chunk, arithmetic.run
    chunks = arithmetic.depth // chunk
    a_size, b_size = (STAGES if chunked else 2) * a_stage, (STAGES if chunked else 2) * b_stage
    operand, word, real, result = map(from_dtype, map(np.dtype, arithmetic[:4]))
    load, store = arithmetic.load, arithmetic.store
    nothing, zero = arithmetic.operand(0), arithmetic.real(0)
    tensor, rounded = arithmetic.tensor, kind == "tf32"
    # Each thread fetches one chunk of several rows of the weights. Of the source, one chunk of several columns where
    # chunks lie together in memory; elsewhere several chunks of one column: there neighbours are close in memory.
    rows_apart = threads // chunks
    fetched_a = rows_of_tile // rows_apart
    columns_apart = threads // chunks if chunked else columns_of_tile
    chunks_apart = chunks if chunked else threads // columns_of_tile
    own_columns = columns_of_tile // columns_apart
    fetched_b = own_columns * (chunks // chunks_apart)
    size_a, size_b = (1 if tensor else fetched_a), (1 if chunked else fetched_b * chunk)

    @inlined
    def place(column, count_d, count_h, count_w):
        """Sample and coordinates of a column."""
        line = u32(column // count_w)
        w = u32(column - line * count_w)
        plane = u32(line // count_h)
        h = u32(line - plane * count_h)
        n = u32(plane // count_d)
        return n, u32(plane - n * count_d), h, w

    if tensor:

        @inlined
        def fetch_a(weight, weight_terms, first, row, rows, k, last, weight_row, a, at, next_a):
            for i in range(fetched_a):
                r = u32(row + i * rows_apart)
                start = u32(first + r * weight_row + k * chunk)
                copy16_async(a, u32(at + i * rows_apart * row_of_stage), weight, start, r < rows and k < last)

    else:

        @inlined
        def fetch_a(weight, weight_terms, first, row, rows, k, last, weight_row, a, at, next_a):
            start = u32(first + weight_terms[k])
            for i in range(fetched_a):
                r = u32(row + i * rows_apart)
                next_a[i] = weight[u32(start + r * weight_row)] if r < rows and k < last else nothing

    if chunked:

        @inlined
        def fetch_b(source, source_terms, columns, size_d, size_h, size_w, k, terms, b, at, next_b):
            e = load4(source_terms, u32(4 * k))
            for i in range(fetched_b):
                d, h, w = u32(columns[i, 1] + e[1]), u32(columns[i, 2] + e[2]), u32(columns[i, 3] + e[3])
                inside = d < size_d and h < size_h and w < size_w
                copy16_async(b, u32(at + i * columns_apart * row_of_stage), source, u32(columns[i, 0] + e[0]), inside)

    else:

        @inlined
        def fetch_b(source, source_terms, columns, size_d, size_h, size_w, k, terms, b, at, next_b):
            first = np.int64(u32(4 * chunk * k))
            for i in range(fetched_b * chunk):
                e = load4(source_terms, first + 4 * (i // chunk * chunks_apart * chunk + i % chunk))
                if checked:
                    d, h, w = u32(columns[0, 1] + e[1]), u32(columns[0, 2] + e[2]), u32(columns[0, 3] + e[3])
                    inside = d < size_d and h < size_h and w < size_w
                else:
                    inside = u32((k + i // chunk * chunks_apart) * chunk + i % chunk) < terms
                next_b[i] = source[u32(columns[0, 0] + e[0])] if inside else nothing

    # Here and in `fetch_b` places are of 64 bits, as in `product`: of the loops of the largest float32 tile 30 of 710
    # instructions go, of the 64x128 tile of bfloat16 100 of 636.
    @inlined
    def round_chunk(stage, at):
        x = load4(stage, at)
        store4(stage, at, round_tf32(x[0]), round_tf32(x[1]), round_tf32(x[2]), round_tf32(x[3]))

    @inlined
    def round_stage(a, b, a_at, b_at):
        """What this thread has copied, as tf32: the tensor cores ignore the lower bits, they do not round."""
        if rounded:
            for i in range(fetched_a):
                round_chunk(a, u32(a_at + i * rows_apart * row_of_stage))
            if chunked:
                for i in range(fetched_b):
                    round_chunk(b, u32(b_at + i * columns_apart * row_of_stage))

    @inlined
    def store_stage(a, b, a_at, b_at, next_a, next_b):
        """What this thread has fetched is in the stage; the other threads see it after the next barrier."""
        to_a, to_b = np.int64(a_at), np.int64(b_at)
        if not tensor:
            for i in range(fetched_a):
                put(a, np.uint64(to_a + i * rows_apart * row_of_stage), next_a, i)
        for i in range(fetched_b):
            put(b, np.uint64(ahead(to_b, i * chunks_apart)), next_b, i)
        if tensor:
            copy_wait_all()
            round_stage(a, b, a_at, b_at)

    @inlined
    def finished(x, relu):
        return zero if relu and x < zero else x

    if run == 4:

        @inlined
        def store_sums(out, at, sums, i, j, down, across, relu):
            """A run of sums, down the rows or across the columns."""
            store_run(
                out, at, finished(sums[i, j], relu), finished(sums[i + down, j + across], relu),
                finished(sums[i + 2 * down, j + 2 * across], relu),
                finished(sums[i + 3 * down, j + 3 * across], relu),
            )  # fmt: skip

    else:

        @inlined
        def store_sums(out, at, sums, i, j, down, across, relu):
            store_run(out, at, finished(sums[i, j], relu), finished(sums[i + down, j + across], relu))

    @inlined
    def store_column(sums, j, column, first_row, out_start, to, storing, relu, accumulate, out):
        """The sums of one column, several at once if they lie together."""
        out_n, out_row, out_d, out_h, out_w, count_d, count_h, count_w, rows, columns = to
        if column < columns:
            n, d, h, w = place(column, count_d, count_h, count_w)
            at = u32(out_start + n * out_n + d * out_d + h * out_h + w * out_w)
            for g in range(thread_rows // row_run):
                r = u32(first_row + g * row_jump)
                if row_spacing == 1 and storing == ROWS:
                    if r < rows:
                        store_sums(out, u32(at + r), sums, row_run * g, j, 1, 0, relu)
                else:
                    for i in range(row_run):
                        if u32(r + i * row_spacing) < rows:
                            place_of_sum = u32(at + u32(r + i * row_spacing) * out_row)
                            x = sums[row_run * g + i, j]
                            if accumulate:
                                x += load(out[place_of_sum])
                            out[place_of_sum] = store(finished(x, relu))

    # Written out: the compiler does not unroll a loop of that size, and its sums would leave the registers.
    @inlined
    def store_columns(sums, j, column, first_row, out_start, to, storing, relu, accumulate, out):
        """Four columns, of one run or of two."""
        third = 2 * column_spacing if column_run == 4 else column_jump
        store_column(sums, j, column, first_row, out_start, to, storing, relu, accumulate, out)
        store_column(
            sums, j + 1, u32(column + column_spacing), first_row, out_start, to, storing, relu, accumulate, out
        )
        store_column(sums, j + 2, u32(column + third), first_row, out_start, to, storing, relu, accumulate, out)
        store_column(
            sums, j + 3, u32(column + third + column_spacing), first_row, out_start, to, storing, relu, accumulate, out
        )

    # One function: its accumulators are registers, which no call of another may take from it.
    def gather(
        weight, source, bias, source_terms, weight_terms, numbers, row_tiles, storing, relu, accumulate, out
    ):
        (
            rows, columns, terms, weight_row, weight_group, source_group, count_d, count_h, count_w, step_d, step_h,
            step_w, size_d, size_h, size_w, source_n, source_d, source_h, source_w, out_n, out_row, out_group, out_d,
            out_h, out_w, out_start,
        ) = numbers  # fmt: skip
        a = cuda.shared.array(a_size, word, alignment=16)
        b = cuda.shared.array(b_size, word, alignment=16)
        sums = cuda.local.array((thread_rows, thread_columns), real)
        ra = cuda.local.array(words_a, word)
        rb = cuda.local.array(words_b, word)
        next_a = cuda.local.array(size_a, operand)
        next_b = cuda.local.array(size_b, operand)
        own = cuda.local.array((own_columns, 4), types.uint32)
        t, block, group = u32(cuda.threadIdx.x), u32(cuda.blockIdx.x), u32(cuda.blockIdx.y)
        column_tile = u32(block // row_tiles)  # blocks of the same columns are neighbours, and share the source
        first_row = u32((block - column_tile * row_tiles) * rows_of_tile)
        first_column = u32(column_tile * columns_of_tile)

        # What this thread fetches. Columns that do not exist repeat the last, and are not stored.
        row, k_a = u32(first_row + t // chunks), u32(t % chunks)
        a_at = place_a(t // chunks, k_a)
        if chunked:
            column, k_b = u32(t // chunks), u32(t % chunks)
        else:
            column, k_b = u32(t % columns_of_tile), u32(t // columns_of_tile)
        b_at = place_b(column, k_b)
        for i in range(own_columns):
            j = min(u32(first_column + column + i * columns_apart), u32(columns - 1))
            n, d, h, w = place(j, count_d, count_h, count_w)
            own[i, 0] = u32(group * source_group + n * source_n + d * source_d + h * source_h + w * source_w)
            own[i, 1], own[i, 2], own[i, 3] = u32(d * step_d), u32(h * step_h), u32(w * step_w)
        first_weight = u32(group * weight_group)
        last = u32((terms + (chunk - 1)) // chunk)  # from here on, the steps count chunks

        for i in range(thread_rows):
            for j in range(thread_columns):
                sums[i, j] = zero
        if chunked:
            # Nothing passes through registers: copies for the next steps are under way while one is multiplied. Each
            # step commits a group, of no copies at the end, so that all groups but the last are of finished steps.
            for i in range(STAGES - 1):
                if i * chunks < last:
                    fetch_a(
                        weight, weight_terms, first_weight, row, rows, u32(i * chunks + k_a), last, weight_row, a,
                        u32(i * a_stage + a_at), next_a,
                    )  # fmt: skip
                    fetch_b(
                        source, source_terms, own, size_d, size_h, size_w, u32(i * chunks + k_b), terms, b,
                        u32(i * b_stage + b_at), next_b,
                    )  # fmt: skip
                copy_commit()
            row_of_thread, column_of_thread, from_a, from_b = origin(t)
            stage, k = u32(0), u32(0)
            while k < last:
                copy_wait_all_but_one()
                round_stage(a, b, u32(stage * a_stage + a_at), u32(stage * b_stage + b_at))
                cuda.syncthreads()  # all have waited for this stage, and are done with the one before
                before = u32(stage + (STAGES - 1)) if stage == 0 else u32(stage - 1)
                later = u32(k + (STAGES - 1) * chunks)
                if later < last:
                    fetch_a(
                        weight, weight_terms, first_weight, row, rows, u32(later + k_a), last, weight_row, a,
                        u32(before * a_stage + a_at), next_a,
                    )  # fmt: skip
                    fetch_b(
                        source, source_terms, own, size_d, size_h, size_w, u32(later + k_b), terms, b,
                        u32(before * b_stage + b_at), next_b,
                    )  # fmt: skip
                copy_commit()
                step(a, b, u32(stage * a_stage + from_a), u32(stage * b_stage + from_b), sums, ra, rb)
                stage = u32(0) if stage == STAGES - 1 else u32(stage + 1)
                k = u32(k + chunks)
        else:
            if last > 0:  # else a phase of the stride that no tap meets
                fetch_a(weight, weight_terms, first_weight, row, rows, k_a, last, weight_row, a, a_at, next_a)
                fetch_b(source, source_terms, own, size_d, size_h, size_w, k_b, terms, b, b_at, next_b)
                if tensor:
                    copy_commit()
                store_stage(a, b, a_at, b_at, next_a, next_b)
            cuda.syncthreads()
            row_of_thread, column_of_thread, from_a, from_b = origin(t)
            stage, k = u32(0), u32(0)
            while k < last:
                k = u32(k + chunks)
                if k < last:
                    fetch_a(
                        weight, weight_terms, first_weight, row, rows, u32(k + k_a), last, weight_row, a,
                        u32((1 - stage) * a_stage + a_at), next_a,
                    )  # fmt: skip
                    fetch_b(
                        source, source_terms, own, size_d, size_h, size_w, u32(k + k_b), terms, b,
                        u32((1 - stage) * b_stage + b_at), next_b,
                    )  # fmt: skip
                    if tensor:
                        copy_commit()
                step(a, b, u32(stage * a_stage + from_a), u32(stage * b_stage + from_b), sums, ra, rb)
                stage = u32(1 - stage)
                if k < last:
                    store_stage(a, b, u32(stage * a_stage + a_at), u32(stage * b_stage + b_at), next_a, next_b)
                cuda.syncthreads()

        first_row, first_column = u32(first_row + row_of_thread), u32(first_column + column_of_thread)
        if bias.size > 0:
            for i in range(thread_rows):
                r = u32(first_row + i // row_run * row_jump + i % row_run * row_spacing)
                term = load(bias[np.int64(group * rows + r)]) if r < rows else zero
                for j in range(thread_columns):
                    sums[i, j] += term
        out_start = u32(out_start + group * out_group)
        if column_spacing == 1 and storing == POSITIONS:
            positions = u32(count_d * count_h * count_w)
            for g in range(thread_columns // column_run):
                column = u32(first_column + g * column_jump)
                if column < columns:
                    n = u32(column // positions)
                    at = u32(out_start + n * out_n + (column - n * positions))
                    for i in range(thread_rows):
                        r = u32(first_row + i // row_run * row_jump + i % row_run * row_spacing)
                        if r < rows:
                            store_sums(out, u32(at + r * out_row), sums, i, column_run * g, 0, 1, relu)
            return
        to = (out_n, out_row, out_d, out_h, out_w, count_d, count_h, count_w, rows, columns)
        store_columns(sums, 0, first_column, first_row, out_start, to, storing, relu, accumulate, out)
        if thread_columns > 4:
            second = u32(first_column + 4 // column_run * column_jump)
            store_columns(sums, 4, second, first_row, out_start, to, storing, relu, accumulate, out)

    words = flat(types.uint32)
    signature = (
        flat(operand), flat(operand), array_of(result, 1), words, words, types.UniTuple(types.uint32, GATHER_NUMBERS),
        types.uint32, types.uint32, types.boolean, types.boolean, flat(result),
    )  # fmt: skip
    return BlockKernel(gather, threads, signature, _resident(kind, tile, checked))


# ---------------------------------------------------------------------------------------------------------------------
# Entries: False, with nothing done, for what is left to the simple kernels
# ---------------------------------------------------------------------------------------------------------------------


def forward(
    geometry: ConvGeometry, input: DeviceArray, weight: DeviceArray, bias: DeviceArray, relu: bool, out: DeviceArray
) -> bool:
    if not _applies(geometry, weight, input, out):
        return False
    for part, (x, y) in split_batch(geometry, input, out):
        _gather("forward", part, weight, x, bias, relu, False, y)
    return True


def input_grad(
    geometry: ConvGeometry, weight: DeviceArray, grad_output: DeviceArray, bias: DeviceArray, relu: bool,
    accumulate: bool, out: DeviceArray,
) -> bool:  # fmt: skip
    if not _applies(geometry, weight, grad_output, out):
        return False
    for part, (dy, dx) in split_batch(geometry, grad_output, out):
        _gather("input_grad", part, weight, dy, bias, relu, accumulate, dx)
    return True


def weight_grad(
    geometry: ConvGeometry, input: DeviceArray, grad_output: DeviceArray, accumulate: bool, out: DeviceArray
) -> bool:
    if not _applies(geometry, input, grad_output) or out.size > MOST_ELEMENTS // (2 * ENOUGH_BLOCKS):
        return False
    kind, device = _kind(out.dtype), current_device()
    passes = [
        WeightPass(x, dy, *weight_plan(kind, samples, strides_in_elements(x), strides_in_elements(dy), device))
        for samples, (x, dy) in split_batch(geometry, input, grad_output)
    ]
    launch_passes(kind, passes, geometry.groups, accumulate, out)
    return True


def _kind(dtype: np.dtype) -> str:
    """The arithmetic for arrays of this type."""
    return "tf32" if dtype == np.float32 and get_float32_precision() == "tf32" else dtype.name


def _applies(geometry: ConvGeometry, *arrays: DeviceArray) -> bool:
    """Zeros for padding, groups of some channels, no negative strides, no sample too large for 32-bit offsets.

    Nothing here depends on the batch: a sample has the same bits whatever batch it is in.
    """
    narrow = min(geometry.in_channels_per_group, geometry.out_channels_per_group) < LEAST_ROWS
    return (
        geometry.padding_mode == "zeros"
        and not (narrow and geometry.groups > 1)
        and all(a.size > 0 and min(a.strides) >= 0 for a in arrays)
        and all(extent(a, 1) <= MOST_ELEMENTS for a in arrays)
    )
