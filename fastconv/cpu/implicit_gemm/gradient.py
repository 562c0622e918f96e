"""The product of the weight gradient: rows (channel, tap), columns output channels, and a sum over output pixels."""

from __future__ import annotations

import math

import numpy as np

from .. import tasks
from ..jit import helper
from ..records import copy_of
from ..tasks import data_address
from ..vector import move
from ..vector import tile as machine
from ..vector.gemm import weight_gradient_kernel
from ..vector.memory import at, copy_vector, fill_zero, integers_at, no_inline, offset
from ..vector.tile import Tile, tile
from .blocks import (
    SLAB_BYTES,
    Axis,
    SlabShape,
    Strides,
    ceil_div,
    flatten,
    is_flat,
    offsets_of_taps,
    pixel_step,
    slab_shape,
    tap_offsets,
)  # fmt: skip
from .parameters import WeightGradient, as_common
from .plan import Plan, aliases, pitch_of_pixels, set_common, set_pixel_slab
from .slab import find_rows_and_zeros


@helper
def row_place(p, row):
    """Where in a channel of the output a row (batch, depth, height) begins."""
    return row // p.out.h // p.out.d * p.output.n + row // p.out.h % p.out.d * p.output.d + row % p.out.h * p.output.h


# One branch for each memory layout, where the innermost loops are vectors.
@helper
def _pack_gradient(p, panel, dy, channels, width, first_row, last_row, first_column, length):
    """panel[row][k][j] = dy[channel j] at output pixel (row, first_column + k); for j >= channels any number."""
    no_inline()
    lanes, image = machine.lanes(panel), p.out.d * p.out.h
    step, channel_step = p.output.w, p.output.c
    row = first_row
    while row < last_row:
        source = offset(dy, row_place(p, row) + first_column * step)
        rows = 1
        if p.plane and not p.chunks:  # the rows of an image follow one another
            rows = min(last_row, (row // image + 1) * image) - row
        count = rows * length
        for j in range(0, width, lanes):
            part = offset(source, j * channel_step)
            if step == 1 and count >= lanes and j < channels:
                for k in range(0, count - lanes + 1, lanes):
                    move.transpose(
                        offset(panel, k * width + j), width, offset(part, k), channel_step, channels - j,
                        move.PREFETCH * lanes,
                    )
                if count % lanes:  # the last block overlaps the one before
                    k = count - lanes
                    move.transpose(
                        offset(panel, k * width + j), width, offset(part, k), channel_step, channels - j,
                        move.PREFETCH * lanes,
                    )
            elif channel_step == 1 and j + lanes <= channels:
                for k in range(count):
                    copy_vector(offset(panel, k * width + j), offset(part, k * step))
            elif channel_step == 1 and j < channels:
                move.copy_block(offset(panel, j), width, part, step, count, channels - j)
            else:
                for i in range(lanes):
                    for k in range(count):
                        if j + i < channels:
                            panel[k * width + j + i] = part[i * channel_step + k * step]
                        else:
                            panel[k * width + j + i] = 0
        panel = offset(panel, count * width)
        row += rows


@helper
def store_gradient(p, tile, group, first_channel, rows, first_vector, last_vector, dw):
    """Add the tile [vector panel][row][column] into dw, or put it there: dw[o, c, tap] = tile[row (c, tap)][o]."""
    no_inline()
    lanes = machine.lanes(tile)
    tap_offset = p.tap_offset
    panel = first_vector * p.vector_panels // p.vectors
    while panel * p.vectors // p.vector_panels < first_vector:
        panel += 1
    start = first_vector
    while start < last_vector:
        stop = (panel + 1) * p.vectors // p.vector_panels
        width = (stop - start) * lanes
        source = offset(tile, (start - first_vector) * lanes * rows)
        first_o, last_o = start * lanes, min(stop * lanes, p.row_channels)
        if p.dw.o == 1 and not p.operands.add:  # output channels are neighbours in dw
            for row in range(rows):
                place = (first_channel + row // p.taps) * p.dw.c + tap_offset[row % p.taps]
                target = offset(dw, group * p.dw.group + first_o + place)
                move.copy_span(target, offset(source, row * width), last_o - first_o)
            first_o = last_o
        for o in range(first_o, last_o, lanes):
            count = min(lanes, p.row_channels - o)
            target = offset(dw, group * p.dw.group + o * p.dw.o)
            from_o = offset(source, o - start * lanes)
            i = 0
            if p.consecutive and count == lanes:  # the rows (c, tap) follow one another in dw too
                begin = offset(target, first_channel * p.dw.c)
                while i + lanes <= rows:
                    place = offset(begin, i)
                    if p.operands.add:
                        move.transpose_add(place, p.dw.o, offset(from_o, i * width), width, lanes, 0)
                    else:
                        move.transpose(place, p.dw.o, offset(from_o, i * width), width, lanes, 0)
                    i += lanes
            for row in range(i, rows):
                place = (first_channel + row // p.taps) * p.dw.c + tap_offset[row % p.taps]
                for j in range(count):
                    if p.operands.add:
                        target[place + j * p.dw.o] += from_o[row * width + j]
                    else:
                        target[place + j * p.dw.o] = from_o[row * width + j]
        start = stop
        panel += 1


@helper
def _find_unit_rows(p, run_offset, first_row, last_row, first_column):
    """Where in the slab, or the input, the output rows of a unit read the first element of their first tap."""
    out_h = p.out.h
    for row in range(first_row, last_row):
        if p.slab.in_place:
            run_offset[row - first_row] = row * p.input.n + first_column * p.slab.pixel_step
        else:
            segment = row // out_h - first_row // out_h
            h = row % out_h - (first_row % out_h if segment == 0 else 0)
            slab_row = segment * p.slab.depth.taps * p.slab.segment_rows + h * p.slab.height.stride
            run_offset[row - first_row] = slab_row * p.slab.row_pitch


@helper
def _add_products(
    p, tile, channels, vectors, source, run_offset, runs, length, packed, prefetch, cached, line_step, block_step
):  # fmt: skip
    """Add the products of a unit's pixels with some vectors of output channels to the tile [(channel, tap)][column].

    While they are multiplied, what is at `prefetch` is fetched into the cache, a vector of channels with each block of
    rows; after that a line that is `cached` already, again and again.
    """
    no_inline()
    lanes, by_tap = machine.lanes(tile), p.by_tap
    width = vectors * lanes
    # The rows (channel, tap) are multiplied some at a time: those that follow one another, or neighbouring channels of
    # one tap
    parts, of_part = (p.taps, channels) if by_tap else (np.int64(1), channels * p.taps)
    row_panels = (of_part + machine.gradient_rows(tile) - 1) // machine.gradient_rows(tile)
    for i in range(parts * row_panels):
        number, row = i // row_panels, i % row_panels * of_part // row_panels
        place = (row * p.taps + number) * width if by_tap else row * width
        weight_gradient_kernel(
            (i % row_panels + 1) * of_part // row_panels - row, vectors, runs, run_offset, length, p.slab.pixel_step,
            source, offset(p.row_offset, number * by_tap + row), packed, offset(tile, place),
            p.taps * width if by_tap else width, prefetch, line_step, block_step,
        )  # fmt: skip
        if i + 1 < vectors and p.prefetch:
            prefetch = offset(prefetch, lanes * p.output.c)
        else:
            prefetch, line_step, block_step = cached, np.int64(0), np.int64(0)


@tasks.body(WeightGradient)
def add_weight_gradient(task, worker, p, real):
    """Task = a block of input channels, a block of output channels, and a part of the pixels, in one group."""
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    panels = offset(slab, p.slab.elements)
    tile = offset(panels, p.panel_elements)
    run_offset = integers_at(p.header.scratch + (worker + 1) * p.header.scratch_bytes - p.table_bytes)
    rows_table = offset(run_offset, p.row_table)
    lanes = machine.lanes(real)
    out_w = p.out.w

    split, rest = task % p.splits, task // p.splits
    out_block, rest = rest % p.out_blocks, rest // p.out_blocks
    block, group = rest % p.channel_blocks, rest // p.channel_blocks
    first_channel = block * p.channels // p.channel_blocks
    channels = (block + 1) * p.channels // p.channel_blocks - first_channel
    first_panel = out_block * p.vector_panels // p.out_blocks
    last_panel = (out_block + 1) * p.vector_panels // p.out_blocks
    first_vector = first_panel * p.vectors // p.vector_panels
    last_vector = last_panel * p.vectors // p.vector_panels
    rows = channels * p.taps
    x = offset(p.operands.x, (group * p.channels + first_channel) * p.input.c)
    dy = offset(p.operands.dy, group * p.row_channels * p.output.c)
    source = x if p.slab.in_place else slab
    fill_zero(tile, rows * (last_vector - first_vector) * lanes)

    first_unit = split * p.units // p.splits
    for unit in range(first_unit, (split + 1) * p.units // p.splits):
        # a unit is some whole rows of output pixels, or a part of one long row
        if p.chunks:
            first_row = unit // p.chunks
            last_row = first_row + 1
            first_column = unit % p.chunks * p.chunk
            length = min(p.chunk, out_w - first_column)
        else:
            first_row = unit * p.unit_rows
            last_row = min(first_row + p.unit_rows, p.pixels // out_w)
            first_column = 0
            length = out_w
        if not p.slab.in_place:
            listed, zeros = find_rows_and_zeros(as_common(p), rows_table, first_row, last_row)
            if p.padded and (unit == first_unit or zeros or p.chunks):  # else its zeros are where they were
                fill_zero(slab, p.slab.elements)
            first_u = first_column * p.slab.width.stride
            tasks.call_with(p.slab.fill_body, (p, slab, x, channels, rows_table, listed, first_u, run_offset))
        _find_unit_rows(p, run_offset, first_row, last_row, first_column)
        for panel in range(first_panel, last_panel):
            start = panel * p.vectors // p.vector_panels
            vectors = (panel + 1) * p.vectors // p.vector_panels - start
            width = vectors * lanes
            packed = panels
            if p.packed:
                packed = offset(dy, row_place(p, first_row) + first_column * width)
            else:
                _pack_gradient(
                    p, panels, offset(dy, start * lanes * p.output.c), min(width, p.row_channels - start * lanes),
                    width, first_row, last_row, first_column, length,
                )  # fmt: skip
            # What is packed next: the next channels of these pixels, or the first channels of the pixels after them
            prefetch, line_step, block_step = panels, np.int64(0), np.int64(0)
            if p.prefetch:
                line_step, block_step = p.output.c if p.output.w == 1 else p.output.w, lanes * p.output.w
                pixel, vector = row_place(p, first_row) + first_column * p.output.w, start + vectors
                if panel == last_panel - 1:
                    vector = first_vector
                    pixel = pixel + length * p.output.w if first_column + length < out_w else row_place(p, last_row)
                prefetch = offset(dy, pixel + vector * lanes * p.output.c)
            _add_products(
                p, offset(tile, (start - first_vector) * lanes * rows), channels, vectors, source, run_offset,
                last_row - first_row, length, packed, prefetch, panels, line_step, block_step,
            )  # fmt: skip
    if p.splits == 1:
        store_gradient(p, tile, group, first_channel, rows, first_vector, last_vector, p.operands.dw)
    else:
        target = offset(p.operands.partial, task * p.tile_elements)
        for i in range(rows * (last_vector - first_vector) * lanes):
            target[i] = tile[i]


@tasks.body(WeightGradient)
def sum_splits(task, worker, p, real):
    """Add up the parts of the pixels, in order, into the first; then store. Task = as above, but all parts."""
    out_block, rest = task % p.out_blocks, task // p.out_blocks
    block, group = rest % p.channel_blocks, rest // p.channel_blocks
    first_channel = block * p.channels // p.channel_blocks
    rows = ((block + 1) * p.channels // p.channel_blocks - first_channel) * p.taps
    first_vector = out_block * p.vector_panels // p.out_blocks * p.vectors // p.vector_panels
    last_vector = (out_block + 1) * p.vector_panels // p.out_blocks * p.vectors // p.vector_panels
    tile = offset(p.operands.partial, task * p.splits * p.tile_elements)
    size = rows * (last_vector - first_vector) * machine.lanes(real)
    for split in range(1, p.splits):
        part = offset(tile, split * p.tile_elements)
        for i in range(size):
            tile[i] += part[i]
    store_gradient(p, tile, group, first_channel, rows, first_vector, last_vector, p.operands.dw)




# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------

# Bytes of the operands of a weight gradient from where on the gradient of the output is prefetched: of 3
# channels to 64 of 224 x 224 it takes 0.84 of the time then. With less, which the third cache holds, nothing changes.
PREFETCH_BYTES = 16 * 1024 * 1024

_UNIT_PIXELS = 448  # output pixels of a unit of the weight gradient
TILE_BYTES = 512 * 1024  # most accumulators of a task
_PARTIAL_BYTES = 2 * 1024 * 1024  # most memory for the sums of parts of the pixels, of all threads
# What it costs to transpose an element of the output gradient, and to copy one whose neighbours are not neighbours in
# memory into the slab, to copying one of a whole row. For 14 layers the cut chosen is within 4 % of the best one tried.
_GRADIENT_COST, _STRIDED_COST = 1.5, 3
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


_MOST_ROWS_BY_TAP = 1.2

# Transposing a vector takes as long as so many products of it; every row of a block takes one more for its splats. By
# this 1x1 layers are exchanged where that took 0.64 to 1.0 of the time (16 channels to 96, 64 to 256, 512 to 2048), and
# not where it took 1.1 times as long (24 to 144).
_TRANSPOSE_COST = 15


def is_better_exchanged(dtype: np.dtype, rows: int, channels: int) -> bool:
    """Should the weight gradient of a 1x1 kernel be computed as that of the exchanged operands?

    One of them is transposed and its channels fill whole vectors, the other is read in place: the sums are the same.
    """
    t = tile(dtype.itemsize * 8)

    def cost(transposed: int, other: int) -> int:
        vectors = ceil_div(transposed, t.lanes)
        return vectors * (other + _TRANSPOSE_COST) + ceil_div(vectors, t.gradient_vectors) * other

    return cost(channels, rows) < cost(rows, channels)


def gradient_blocks(
    groups: int, rows: int, channels: int, taps: int, pixels: int, units: int, slab_channel: int,
    slab_cost: float, t: Tile, size: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Into how many blocks the input channels, the output channels and the pixels of a weight gradient are cut.

    Each block of input channels packs the gradient of the output again, each block of output channels the input, and
    each part of the pixels has sums of its own. Of all cuts whose sums (and slab, of `slab_channel` elements a channel,
    0 where the input stays in place) fit the cache, and that are enough tasks, this is the one that costs least.
    """
    vectors = ceil_div(rows, t.lanes)
    vector_panels = ceil_div(vectors, t.gradient_vectors)
    whole = groups * channels * taps * vectors * t.lanes  # elements of all sums
    most_splits = max(1, _PARTIAL_BYTES // (whole * size))
    best = (math.inf, 1, 1, 1)
    for out_blocks in range(1, vector_panels + 1):
        out_vectors = min(vectors, ceil_div(vector_panels, out_blocks) * t.gradient_vectors)
        of_channel = out_vectors * t.lanes * taps * size
        most = max(1, min(channels, TILE_BYTES // of_channel))
        if slab_channel:
            most = max(1, min(most, SLAB_BYTES // (slab_channel * size)))
        channel_blocks = ceil_div(channels, most)
        splits = min(units, ceil_div(_GRADIENT_TASKS, groups * channel_blocks * out_blocks), most_splits)
        if groups * channel_blocks * out_blocks * splits < _GRADIENT_TASKS:
            enough = ceil_div(_GRADIENT_TASKS, groups * out_blocks * splits)
            most_blocks = ceil_div(channels * taps, 6 * t.gradient_rows)
            channel_blocks = min(channels, max(channel_blocks, min(enough, most_blocks)))
        # where it cannot be helped: sums of one channel beyond the cache, and fewer tasks than threads can share
        too_large = max(0, of_channel - TILE_BYTES) * ceil_div(channels, channel_blocks)
        too_few = max(0, _GRADIENT_TASKS - groups * channel_blocks * out_blocks * splits)
        cost = (
            _GRADIENT_COST * groups * channel_blocks * vectors * t.lanes * pixels
            + slab_cost * out_blocks * groups * channels * slab_channel * units
            + (2 * splits * whole if splits > 1 else 0)
            + whole * pixels // t.lanes * too_few // (4 * _GRADIENT_TASKS)
            + too_large * pixels
        )
        best = min(best, (cost, channel_blocks, out_blocks, splits))
    return best[1:]


def _cut_pixels(batch: int, axes: tuple[Axis, ...], in_place: bool, t: Tile) -> tuple[SlabShape, int, int, int]:
    """The slab of a unit of pixels, its output rows, the number of units, and pixels of a part of a long row or 0."""
    depth, height, width = axes
    rows = batch * depth.out * height.out
    slab = slab_shape(axes, _UNIT_PIXELS, batch, t.columns)
    if slab.chunk or (in_place and width.out > _UNIT_PIXELS):
        parts = ceil_div(width.out, min(_UNIT_PIXELS, slab.chunk or _UNIT_PIXELS))  # the slab has room for its chunk
        chunk = ceil_div(width.out, parts)
        return slab, 1, rows * ceil_div(width.out, chunk), chunk
    unit_rows = max(1, _UNIT_PIXELS // width.out)
    return slab_shape(axes, unit_rows * width.out, batch, t.columns), unit_rows, ceil_div(rows, unit_rows), 0


def plan_weight_gradient(
    dtype: np.dtype, batch: int, groups: int, rows: int, channels: int, axes: tuple[Axis, ...], x: Strides, dy: Strides,
    dw: tuple[int, int, int], w_taps: np.ndarray, zeros: bool, in_place: bool,
) -> Plan:  # fmt: skip
    """Plan dw[o, c, k] = sum over n, p of dy[n, o, p] * x[n, c, u(p, k)]; `rows` is output channels in a group.

    `dw` has the strides of group, o and c. Where the channels of a pixel are neighbours in x, the slab has them so too:
    the microkernel reads one element after the other, as far apart as they may be.
    """
    t = tile(dtype.itemsize * 8)
    size = dtype.itemsize
    last = not in_place and channels > 1 and x[1] == 1  # are the channels of a pixel neighbours?
    if in_place or last:
        batch, axes, x, dy = flatten(batch, axes, x, dy)
    depth, height, width = axes
    if last and all(a.is_identity() for a in axes) and depth.out == height.out == 1:
        in_place = not aliases(x[4], 1, dtype)
    taps = math.prod(a.taps for a in axes)
    plane = depth.out * height.out * width.out
    pixels = batch * plane

    slab, unit_rows, units, chunk = _cut_pixels(batch, axes, in_place, t)
    chunks = ceil_div(width.out, chunk) if chunk else 0
    vectors = ceil_div(rows, t.lanes)
    vector_panels = ceil_div(vectors, t.gradient_vectors)

    channel_blocks, out_blocks, splits = gradient_blocks(
        groups, rows, channels, taps, pixels, units, 0 if in_place else slab.channel,
        1 if x[4] == 1 or last else _STRIDED_COST, t, size,
    )  # fmt: skip
    block_channels = ceil_div(channels, channel_blocks)

    tap_offset, pitch = tap_offsets(axes, slab), x[1] if in_place else slab.channel
    slab_size = block_channels * slab.channel + 2 * t.columns
    if last and not in_place:
        pixel_pitch, pitch = pitch_of_pixels(block_channels, width.stride, dtype), 1
        row = slab.row_length * pixel_pitch
        slab_size = slab.table // 2 * row
        tap_offset = offsets_of_taps(
            axes, [slab.segment_rows * row, height.dilation * row, width.dilation * pixel_pitch]
        )
    row_offset = np.arange(block_channels, dtype=np.int64)[:, None] * pitch + tap_offset
    # With a stride, every tap of a pixel is on another line of a channels-last slab, which is too many for the nearest
    # cache: channels of one tap together take 0.75 of the time with AVX2, 1 to 0.97 with AVX-512. But their number
    # should not leave too many rows empty (a fifth: 1.25 times as long), and without a stride it pays no more.
    of_tap = ceil_div(block_channels, t.gradient_rows) * t.gradient_rows
    by_tap = last and width.stride > 1 and of_tap <= _MOST_ROWS_BY_TAP * block_channels
    row_offset = (row_offset.T if by_tap else row_offset).ravel()
    slab_size = 0 if in_place else ceil_div(slab_size, 16) * 16
    panel_size = ceil_div((chunk or unit_rows * width.out) * t.gradient_vectors * t.lanes, 16) * 16
    tile_size = block_channels * taps * min(vectors, ceil_div(vector_panels, out_blocks) * t.gradient_vectors) * t.lanes
    row_table = max(unit_rows, 4)
    table_bytes = ceil_div((row_table + slab.table) * 8, 64) * 64

    p = WeightGradient.zeros()
    set_common(p, dtype, batch, axes, slab, x, dy, zeros, in_place)
    if last and in_place:
        p.slab.pixel_step = x[4]
    elif last:
        set_pixel_slab(p, dtype, slab.row_length, pixel_pitch, width.stride)
    p.row_channels, p.channels, p.chunk, p.chunks = rows, channels, chunk, chunks
    p.slab.elements, p.panel_elements, p.tile_elements = slab_size, panel_size, tile_size
    p.table_bytes, p.row_table = table_bytes, row_table
    p.dw, p.tap_offset = dw, data_address(w_taps)
    p.consecutive = dw[2] == taps and bool((np.diff(w_taps) == 1).all())
    p.row_offset, p.unit_rows, p.units, p.splits = data_address(row_offset), unit_rows, units, splits
    p.channel_blocks, p.out_blocks, p.by_tap = channel_blocks, out_blocks, block_channels if by_tap else 0
    p.vectors, p.vector_panels = vectors, vector_panels
    # Is the gradient of the output a packed panel in memory already?
    out, steps = (batch, *(a.out for a in axes)), (dy[0], *dy[2:])
    together = dy[1] == 1 and is_flat(out, steps) and pixel_step(out, steps) == rows
    p.packed = together and vector_panels == 1 and rows == vectors * t.lanes
    operands = batch * groups * (rows * plane + channels * math.prod(a.size for a in axes))
    p.prefetch = operands * size >= PREFETCH_BYTES
    scratch = (slab_size + panel_size + tile_size) * size + table_bytes
    number = groups * channel_blocks * out_blocks * splits
    tables = (depth.source, height.source, width.source, w_taps, row_offset)
    return Plan(np.asarray(p), tables, number, scratch, 2 * pixels * rows * groups * channels * taps)


def weight_gradient(plan: Plan, x: np.ndarray, dy: np.ndarray, dw: np.ndarray, add: bool) -> None:
    """Run a plan on arrays of the strides it was made for."""
    parameters = copy_of(plan.parameters)
    splits = int(parameters["splits"])
    partial = np.empty(plan.tasks * int(parameters["tile_elements"]) if splits > 1 else 0, dw.dtype)
    parameters["operands"] = data_address(x), data_address(dy), data_address(dw), add, data_address(partial)
    stages: list[tasks.Stage] = [(add_weight_gradient, plan.tasks, parameters, plan.scratch, plan.flops, 0)]
    if splits > 1:
        stages.append((sum_splits, plan.tasks // splits, copy_of(parameters), 64, 16 * partial.size, 1))
    tasks.run_stages(dw.dtype, stages)

