"""The sums of `implicit_gemm` where the channels of a pixel are neighbours in memory, without transposes.

`correlate` wants pixels along its vectors: channels-last images are transposed on the way into its panels, and its
tiles on the way out, which can take longer than the products. Here output channels are along the vectors
(`gemm.contract_pixels_by_channels`). The rows of a tile are neighbouring pixels of an output row, read one by one, each
into all lanes; nothing is packed but the weights, and what is computed is stored where it belongs. Windows that stay
inside the image may be read in place; others are read from a slab, a copy of the rows that a task needs with their
border.

The blocks of the reduction are those of `correlate`, and so is the order of the sum in them: the bits are the same.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from . import tasks
from .implicit_gemm.blocks import (
    Axis,
    Blocks,
    SlabShape,
    Strides,
    ceil_div,
    flatten,
    is_padded,
    offsets_of_taps,
)  # fmt: skip
from .implicit_gemm.gradient import row_place
from .implicit_gemm.parameters import Correlation, as_common
from .implicit_gemm.plan import AGAIN_WEIGHTS, Plan, aliases, pitch_of_pixels, set_common, set_pixel_slab
from .implicit_gemm.slab import find_rows
from .jit import helper
from .records import Integer
from .tasks import data_address
from .vector import move
from .vector import tile as machine
from .vector.gemm import ADD, BIAS, RELU, PixelTile, contract_pixels_by_channels
from .vector.memory import at, fill_zero, integers_at, no_inline, offset
from .vector.tile import tile


class Pixels(Correlation):
    """Parameters beyond those of `implicit_gemm.correlate`."""

    rows: Integer  # output rows
    first: Integer  # where in the image the first window begins, if it is read in place
    through_tile: Integer  # are sums stored from a tile, since there are no masks for a part of a vector?


# What a task reads of the image, for a block of the reduction, and the weights that all its pixels are multiplied with
# before the next: both in L2.
SOURCE_BYTES = 256 * 1024
WEIGHT_BYTES = 256 * 1024
# Elements after the packed weights that may be read, though not used: a vector, on tiles without masks.
READ_BEYOND = 16
# Tasks for each thread; but each weight that a task reads is used for so many pixels, where there are as many.
_TASKS = 4
_LEAST_PIXELS = 56
# Moving an element through transposes, into panels or out of tiles, takes as long as so many of its products: from the
# times of a dozen layers with AVX-512, and with AVX2, which has no masks.
_TRANSPOSE_COST, _TRANSPOSE_COST_WITHOUT_MASKS = 12, 55


@helper
def _contract_row(p, depth, weights, first_panel, last_panel, source, y, pixels, flags, bias, tile):
    """Add a block of the reduction to neighbouring pixels of an output row, for some panels of output channels.

    `tile` is room for the pixels of a tile, and for its bias: a part of a vector is stored from there without masks.
    """
    no_inline()
    lanes, most, columns = machine.lanes(source), machine.tile_rows(source), machine.columns(source)
    step, offsets = p.slab.pixel_step, p.depth_offset
    first_o = first_panel * p.row_channels // p.row_panels
    parts = (pixels + most - 1) // most
    for k in range(parts):
        begin, end = k * pixels // parts, (k + 1) * pixels // parts
        o = first_o
        for panel in range(first_panel, last_panel):
            rows = (panel + 1) * p.row_channels // p.row_panels - o
            kernel = p.kernels[(rows + lanes - 1) // lanes * (most + 1) + end - begin]
            place, pitch, of_rows = offset(y, begin * p.output.w + o), p.output.w, offset(bias, o)
            target = place
            if p.through_tile:
                target, pitch = tile, columns
                if flags & ADD:
                    move.copy_block(tile, columns, place, p.output.w, end - begin, rows)
                if flags & BIAS:
                    of_rows = offset(tile, most * columns)
                    move.copy_span(of_rows, offset(bias, o), rows)
            contract_pixels_by_channels(
                kernel, depth, offsets, offset(weights, (o - first_o) * depth), rows,
                offset(source, begin * step), step, target, pitch, flags, of_rows,
            )  # fmt: skip
            if p.through_tile:
                move.copy_block(place, p.output.w, tile, columns, end - begin, rows)
            o += rows


@tasks.body(Pixels)
def correlate_pixels(task, worker, p, real):
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    own_weights = offset(slab, p.slab.elements)
    tile = offset(own_weights, p.weight_elements)
    rows_table = integers_at(p.header.scratch + (worker + 1) * p.header.scratch_bytes - p.table_bytes)
    out_d, out_h = p.out.d, p.out.h

    # what this task computes: panels first_panel .. last_panel of a group, and rows first .. last or pixels of one
    part, rest = task % p.row_tasks, task // p.row_tasks
    where, group = rest % p.pixel_tasks, rest // p.pixel_tasks
    first_panel, last_panel = part * p.row_panels // p.row_tasks, (part + 1) * p.row_panels // p.row_tasks
    first, last = where * p.rows // p.pixel_tasks, (where + 1) * p.rows // p.pixel_tasks
    first_pixel, pixels = np.int64(0), p.out.w
    if p.chunks:
        first, first_pixel = where // p.chunks, where % p.chunks * p.chunk
        last, pixels = first + 1, min(p.chunk, p.out.w - first_pixel)

    x = offset(p.operands.x, group * p.input_group)
    y = offset(p.operands.y, group * p.output_group)
    w = offset(p.operands.w, group * p.row_channels * p.channels * p.taps)
    bias = offset(p.operands.bias, group * p.row_channels)
    listed = 0 if p.slab.in_place else find_rows(as_common(p), rows_table, first, last)
    if p.padded and not p.slab.in_place:
        fill_zero(slab, p.slab.elements)
    reduced = 0  # how much of the reduction has been done
    for c in range(0, p.channels, p.block_channels):
        channels = min(p.block_channels, p.channels - c)
        depth = channels * p.taps
        flags = ADD if reduced > 0 or p.operands.add else 0
        if c + channels == p.channels:
            flags |= (BIAS if p.operands.has_bias else 0) | (RELU if p.operands.relu else 0)
        if not p.slab.in_place:
            tasks.call_with(p.slab.fill_body, (
                p, slab, offset(x, c * p.input.c), channels, rows_table, listed, first_pixel * p.slab.width.stride,
            ))  # fmt: skip
        for panel in range(first_panel, last_panel, p.weight_panels):
            panel_end = min(panel + p.weight_panels, last_panel)
            o = panel * p.row_channels // p.row_panels
            weights = offset(w, p.row_channels * reduced + o * depth)
            if p.pack_rows:
                weights = own_weights
                tasks.call_with(p.pack_rows, (
                    p.packing, weights, group, panel, panel_end, c, channels, 0, p.taps, tile,
                ))  # fmt: skip
            for row in range(first, last):
                n, d, h = row // out_h // out_d, row // out_h % out_d, row % out_h
                place = n * p.input.n + d * p.slab.depth.stride * p.input.d + h * p.slab.height.stride * p.input.h
                source = offset(x, p.first + place + first_pixel * p.slab.pixel_step + c * p.input.c)
                if not p.slab.in_place:
                    segment = row // out_h - first // out_h
                    h -= first % out_h if segment == 0 else 0
                    slab_row = segment * p.slab.depth.taps * p.slab.segment_rows + h * p.slab.height.stride
                    source = offset(slab, slab_row * p.slab.row_pitch)
                target = offset(y, row_place(as_common(p), row) + first_pixel * p.output.w)
                _contract_row(p, depth, weights, panel, panel_end, source, target, pixels, flags, bias, tile)
        reduced += depth


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel_table(dtype: np.dtype) -> np.ndarray:
    t = tile(dtype.itemsize * 8)
    return np.zeros((t.vectors + 1, t.rows + 1), np.int64)


def _kernels(dtype: np.dtype, blocks: Blocks, lengths: set[int]) -> int:
    """Address of the table of microkernels [vectors][pixels], in which are those that rows of these lengths take."""
    t = tile(dtype.itemsize * 8)
    table = _kernel_table(dtype)
    of_panels = {blocks.rows // blocks.panels, ceil_div(blocks.rows, blocks.panels)}
    for vectors, length in itertools.product({ceil_div(rows, t.lanes) for rows in of_panels}, lengths):
        parts = ceil_div(length, t.rows)
        for pixels in {length // parts, ceil_div(length, parts)}:
            if not table[vectors, pixels]:
                table[vectors, pixels] = contract_pixels_by_channels.address(dtype, PixelTile(pixels, vectors))
    return data_address(table)


def _vectors(rows: int, panels: int, lanes: int) -> int:
    return sum(ceil_div((i + 1) * rows // panels - i * rows // panels, lanes) for i in range(panels))


def cut_all(
    dtype: np.dtype, blocks: Sequence[Blocks], axes: Sequence[tuple[Axis, ...]], x: Strides, y: Strides, needed: float
) -> list[Blocks] | None:  # fmt: skip
    """`blocks`, of products of the same rows, with panels of output channels along the vectors.

    None if that does not apply, or takes longer than `correlate`, or `small_planes`, of which this part of the products
    is `needed`.
    """
    t = tile(dtype.itemsize * 8)
    rows, channels = blocks[0].rows, blocks[0].channels
    if (x[1] != 1 and channels > 1) or (y[1] != 1 and rows > 1):
        return None
    if y[4] == 1:  # pixels of one channel are neighbours: `correlate` stores them without a transpose
        return None
    if any(each.block_taps < each.taps for each in blocks):
        return None
    # the panels with the fewest vectors, of these the fewest panels
    candidates = ceil_div(rows, t.columns), ceil_div(rows, t.lanes)
    panels = min(candidates, key=lambda panels: (_vectors(rows, panels, t.lanes), panels))
    lanes = _vectors(rows, panels, t.lanes) * t.lanes
    transposed = _TRANSPOSE_COST if t.masks else _TRANSPOSE_COST_WITHOUT_MASKS
    here = otherwise = 0.0
    for each, of_axes in zip(blocks, axes, strict=True):
        pixels = math.prod(a.out for a in of_axes)
        moved = channels * math.prod(a.size for a in of_axes) / len(blocks) + rows * pixels
        here += lanes * channels * each.taps * pixels
        otherwise += needed * rows * channels * each.taps * pixels + transposed * moved
    return [replace(each, panels=panels) for each in blocks] if here <= otherwise else None


def plan_correlation(
    dtype: np.dtype, batch: int, blocks: Blocks, axes: tuple[Axis, ...], x: Strides, y: Strides, zeros: bool,
    workers: int, packed: bool, group_steps: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """`implicit_gemm.plan_correlation` for `blocks` of `cut_all`."""
    t = tile(dtype.itemsize * 8)
    size = dtype.itemsize
    batch, axes, x, y = flatten(batch, axes, x, y)
    depth, height, width = axes
    rows = batch * depth.out * height.out
    in_place = (
        not is_padded(axes)
        and blocks.block_channels == blocks.channels
        and not aliases(x[4], width.stride, dtype)
    )
    pitch = x[4] if in_place else pitch_of_pixels(blocks.block_channels, width.stride, dtype)

    def slab_of(rows_at_once: int, pixels: int) -> SlabShape:
        segments = min(batch * depth.out, (rows_at_once + height.out - 2) // height.out + 1)
        segment_rows = (min(height.out, rows_at_once) - 1) * height.stride + height.span
        length = (pixels - 1) * width.stride + width.span
        whole = segments * depth.taps * segment_rows
        row = length * pitch
        return SlabShape(pixels, segments, segment_rows, length, row, length, whole * row, 2 * whole)

    # A task is some rows; or some pixels of a row, where threads could share it or it is more than a task reads.
    wanted = ceil_div(_TASKS * workers, blocks.groups)
    parts = 1 if rows >= wanted else max(1, min(ceil_div(wanted, rows), width.out // _LEAST_PIXELS))
    pixels = ceil_div(width.out, parts)
    while pixels > t.rows and slab_of(1, pixels).channel * size > SOURCE_BYTES:
        pixels = ceil_div(pixels, 2)
    if pixels < width.out:
        pixels = min(width.out, ceil_div(pixels, t.rows) * t.rows)
    chunk, chunks, rows_at_once = 0, 0, 1
    if pixels < width.out:
        chunk, chunks = pixels, ceil_div(width.out, pixels)
        pixel_tasks = rows * chunks
    else:
        most = min(rows, max(ceil_div(rows, wanted), ceil_div(_LEAST_PIXELS, pixels)))
        sizes = range(1, most + 1)
        fit = bisect.bisect_right(sizes, SOURCE_BYTES, key=lambda n: slab_of(n, pixels).channel * size)
        pixel_tasks = ceil_div(rows, max(1, fit))
        rows_at_once = ceil_div(rows, pixel_tasks)
    slab = slab_of(rows_at_once, pixels)
    row_tasks = max(1, min(blocks.panels, ceil_div(wanted, pixel_tasks)))

    of_panel = ceil_div(blocks.rows, blocks.panels) * blocks.depth
    weight_panels = max(1, min(ceil_div(blocks.panels, row_tasks), WEIGHT_BYTES // (of_panel * size)))
    packs = not packed and (
        pixel_tasks == 1 or pixel_tasks * blocks.packed_size <= AGAIN_WEIGHTS * workers
    )
    slab_size = 0 if in_place else ceil_div(slab.channel, 16) * 16
    weight_size = ceil_div(weight_panels * of_panel, 16) * 16 if packs else 0
    table_bytes = ceil_div((0 if in_place else slab.table) * 8, 64) * 64
    tile_size = max(t.lanes * t.lanes, (t.rows + 1) * t.columns)  # or a block of weights to be packed
    scratch = (slab_size + weight_size + tile_size) * size + table_bytes

    channel, steps = 1, [slab.segment_rows * slab.row, height.dilation * slab.row, width.dilation * pitch]
    if in_place:
        channel, steps = x[1], [a.dilation * step for a, step in zip(axes, x[2:], strict=True)]
    offsets = np.arange(blocks.block_channels, dtype=np.int64)[:, None] * channel
    offsets = (offsets + offsets_of_taps(axes, steps)).ravel()

    p = Pixels.zeros()
    set_common(p, dtype, batch, axes, slab, x, y, zeros, in_place)
    p.row_channels, p.channels, p.row_panels = blocks.rows, blocks.channels, blocks.panels
    set_pixel_slab(p, dtype, slab.row_length, pitch, width.stride)
    p.block_channels, p.rows = blocks.block_channels, rows
    whole = all(i * blocks.rows // blocks.panels % t.lanes == 0 for i in range(blocks.panels + 1))
    p.through_tile = not t.masks and not whole
    p.first = -sum(a.before * step for a, step in zip(axes, x[2:], strict=True))
    p.pixel_tasks, p.row_tasks, p.chunk, p.chunks = pixel_tasks, row_tasks, chunk, chunks
    p.input_group, p.output_group = group_steps or (blocks.channels * x[1], blocks.rows * y[1])
    p.slab.elements, p.weight_elements, p.weight_panels = slab_size, weight_size, weight_panels
    p.table_bytes, p.depth_offset = table_bytes, data_address(offsets)
    p.kernels = _kernels(dtype, blocks, {pixels, width.out - (chunks - 1) * chunk if chunk else pixels})
    flops = 2 * rows * width.out * blocks.rows * blocks.groups * blocks.channels * blocks.taps
    tables = (depth.source, height.source, width.source, offsets)
    return Plan(np.asarray(p), tables, blocks.groups * pixel_tasks * row_tasks, scratch, flops, packs, correlate_pixels)
