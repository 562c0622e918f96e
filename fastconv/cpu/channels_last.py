"""The sums of `contraction.correlate` where the channels of a pixel are neighbours in memory, without transposes.

`correlate` wants pixels along its vectors: channels-last images are transposed on the way into its panels, and its
tiles on the way out, which can take longer than the products. Here output channels are along the vectors
(`simd.contract_windows`). The rows of a tile are neighbouring pixels of an output row, read one by one, each into all
lanes; nothing is packed but the weights, and what is computed is stored where it belongs. Windows that stay inside the
image may be read as they lie in memory; others are read from a slab, a copy of the rows that a task needs with their
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

from . import contraction, simd, tasks
from .contraction import (
    ADD,
    BIAS,
    BLOCK_CHANNELS,
    CHANNELS,
    CHUNK,
    CHUNKS,
    DEPTH_OFFSET,
    FILL,
    IN_PLACE,
    KERNEL_D,
    KERNELS,
    OUT_D,
    OUT_H,
    OUT_W,
    OWN_FIELDS,
    PACKING,
    PADDED,
    PANELS,
    PIXEL_STEP,
    PIXEL_TASKS,
    RELU,
    ROW_CHANNELS,
    ROW_PITCH,
    ROW_TABLE,
    ROW_TASKS,
    SEGMENT_ROWS,
    SLAB_SIZE,
    STRIDE_D,
    STRIDE_H,
    STRIDE_W,
    TABLE_BYTES,
    TAPS,
    WEIGHT_PANELS,
    WEIGHT_SIZE,
    X_C,
    X_D,
    X_GROUP,
    X_H,
    X_N,
    Y_GROUP,
    Y_W,
    Axis,
    Blocks,
    Plan,
    Strides,
    W,
    X,
    Y,
    address,
)  # fmt: skip
from .jit import helper as _jit

# Parameters beyond those of `correlate`: output rows; where in the image the first window begins, if it is read in
# place; and are sums stored from a tile, since there are no masks for a part of a vector?
ROWS, FIRST, THROUGH_TILE, END = range(contraction.END, contraction.END + 4)

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


@_jit
def _contract_row(p, kernels, depth, weights, first_panel, last_panel, source, y, pixels, flags, bias, tile):
    """Add a block of the reduction to neighbouring pixels of an output row, for some panels of output channels.

    `tile` is room for the pixels of a tile, and for its bias: a part of a vector is stored from there without masks.
    """
    simd.keep_apart()
    lanes, most, columns = simd.lanes(source), simd.tile_rows(source), simd.columns(source)
    step, offsets = p[PIXEL_STEP], simd.at(p, p[DEPTH_OFFSET])
    first_o = first_panel * p[ROW_CHANNELS] // p[PANELS]
    pieces = (pixels + most - 1) // most
    for k in range(pieces):
        begin, end = k * pixels // pieces, (k + 1) * pixels // pieces
        o = first_o
        for panel in range(first_panel, last_panel):
            rows = (panel + 1) * p[ROW_CHANNELS] // p[PANELS] - o
            kernel = kernels[(rows + lanes - 1) // lanes * (most + 1) + end - begin]
            place, pitch, of_rows = simd.offset(y, begin * p[Y_W] + o), p[Y_W], simd.offset(bias, o)
            target = place
            if p[THROUGH_TILE]:
                target, pitch = tile, columns
                if flags & simd.ADD:
                    simd.copy_block(tile, columns, place, p[Y_W], end - begin, rows)
                if flags & simd.BIAS:
                    of_rows = simd.offset(tile, most * columns)
                    simd.copy_span(of_rows, simd.offset(bias, o), rows)
            simd.contract_windows(
                kernel, depth, offsets, simd.offset(weights, (o - first_o) * depth), rows,
                simd.offset(source, begin * step), step, target, pitch, flags, of_rows,
            )  # fmt: skip
            if p[THROUGH_TILE]:
                simd.copy_block(place, p[Y_W], tile, columns, end - begin, rows)
            o += rows


@tasks.Body
def _correlate(task, worker, p, real):
    slab = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    own_weights = simd.offset(slab, p[SLAB_SIZE])
    tile = simd.offset(own_weights, p[WEIGHT_SIZE])
    table = simd.at(p, p[tasks.SCRATCH] + (worker + 1) * p[tasks.SCRATCH_BYTES] - p[TABLE_BYTES])
    rows_table = simd.offset(table, p[ROW_TABLE])
    kernels, out_d, out_h = simd.at(p, p[KERNELS]), p[OUT_D], p[OUT_H]

    # what this task computes: panels first_panel .. last_panel of a group, and rows first .. last or pixels of one
    part, rest = task % p[ROW_TASKS], task // p[ROW_TASKS]
    where, group = rest % p[PIXEL_TASKS], rest // p[PIXEL_TASKS]
    first_panel, last_panel = part * p[PANELS] // p[ROW_TASKS], (part + 1) * p[PANELS] // p[ROW_TASKS]
    first, last = where * p[ROWS] // p[PIXEL_TASKS], (where + 1) * p[ROWS] // p[PIXEL_TASKS]
    first_pixel, pixels = np.int64(0), p[OUT_W]
    if p[CHUNKS]:
        first, first_pixel = where // p[CHUNKS], where % p[CHUNKS] * p[CHUNK]
        last, pixels = first + 1, min(p[CHUNK], p[OUT_W] - first_pixel)

    x = simd.offset(simd.at(real, p[X]), group * p[X_GROUP])
    y = simd.offset(simd.at(real, p[Y]), group * p[Y_GROUP])
    w = simd.offset(simd.at(real, p[W]), group * p[ROW_CHANNELS] * p[CHANNELS] * p[TAPS])
    bias = simd.offset(simd.at(real, p[BIAS]), group * p[ROW_CHANNELS])
    listed = 0 if p[IN_PLACE] else contraction.find_rows(p, rows_table, first, last)
    if p[PADDED] and not p[IN_PLACE]:
        simd.fill_zero(slab, p[SLAB_SIZE])
    reduced = 0  # how much of the reduction has been done
    for c in range(0, p[CHANNELS], p[BLOCK_CHANNELS]):
        channels = min(p[BLOCK_CHANNELS], p[CHANNELS] - c)
        depth = channels * p[TAPS]
        flags = simd.ADD if reduced > 0 or p[ADD] else 0
        if c + channels == p[CHANNELS]:
            flags |= (simd.BIAS if p[BIAS] else 0) | (simd.RELU if p[RELU] else 0)
        if not p[IN_PLACE]:
            tasks.ask(p[FILL], (
                p, slab, simd.offset(x, c * p[X_C]), channels, rows_table, listed, first_pixel * p[STRIDE_W],
            ))  # fmt: skip
        for panel in range(first_panel, last_panel, p[WEIGHT_PANELS]):
            panel_end = min(panel + p[WEIGHT_PANELS], last_panel)
            o = panel * p[ROW_CHANNELS] // p[PANELS]
            weights = simd.offset(w, p[ROW_CHANNELS] * reduced + o * depth)
            if p[PACKING]:
                weights = own_weights
                contraction.pack_own(
                    p, worker, simd.offset(rows_table, -OWN_FIELDS), weights, group, tile, panel, panel_end, c,
                    channels, np.int64(0), p[TAPS],
                )  # fmt: skip
            for row in range(first, last):
                n, d, h = row // out_h // out_d, row // out_h % out_d, row % out_h
                place = p[FIRST] + n * p[X_N] + d * p[STRIDE_D] * p[X_D] + h * p[STRIDE_H] * p[X_H]
                source = simd.offset(x, place + first_pixel * p[PIXEL_STEP] + c * p[X_C])
                if not p[IN_PLACE]:
                    segment = row // out_h - first // out_h
                    h -= first % out_h if segment == 0 else 0
                    source = simd.offset(
                        slab, (segment * p[KERNEL_D] * p[SEGMENT_ROWS] + h * p[STRIDE_H]) * p[ROW_PITCH]
                    )
                target = simd.offset(y, contraction.row_place(p, row) + first_pixel * p[Y_W])
                _contract_row(p, kernels, depth, weights, panel, panel_end, source, target, pixels, flags, bias, tile)
        reduced += depth


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@tasks.Body
def _list_kernel(pixels, vectors, table, real):
    simd.list_window_kernel(pixels, vectors, table, real)


@functools.cache
def _kernel_table(dtype: np.dtype) -> np.ndarray:
    t = simd.tile(dtype.itemsize * 8)
    return np.zeros((t.vectors + 1, t.rows + 1), np.int64)


def _kernels(dtype: np.dtype, blocks: Blocks, lengths: set[int]) -> int:
    """Address of the table of microkernels [vectors][pixels], in which are those that rows of these lengths take."""
    t = simd.tile(dtype.itemsize * 8)
    table = _kernel_table(dtype)
    of_panels = {blocks.rows // blocks.panels, _ceil(blocks.rows, blocks.panels)}
    for vectors, length in itertools.product({_ceil(rows, t.lanes) for rows in of_panels}, lengths):
        pieces = _ceil(length, t.rows)
        for pixels in {length // pieces, _ceil(length, pieces)}:
            if not table[vectors, pixels]:
                _list_kernel.call(dtype, pixels, vectors, table[vectors, pixels : pixels + 1])
    return address(table)


def _vectors(rows: int, panels: int, lanes: int) -> int:
    return sum(_ceil((i + 1) * rows // panels - i * rows // panels, lanes) for i in range(panels))


def cut_all(
    dtype: np.dtype, blocks: Sequence[Blocks], axes: Sequence[tuple[Axis, ...]], x: Strides, y: Strides, needed: float
) -> list[Blocks] | None:  # fmt: skip
    """`blocks`, of products of the same rows, with panels of output channels along the vectors.

    None if that does not apply, or takes longer than `correlate`, or `small_planes`, of which this part of the products
    is `needed`.
    """
    t = simd.tile(dtype.itemsize * 8)
    rows, channels = blocks[0].rows, blocks[0].channels
    if (x[1] != 1 and channels > 1) or (y[1] != 1 and rows > 1):
        return None
    if y[4] == 1:  # pixels of one channel are neighbours: `correlate` stores them without a transpose
        return None
    if any(each.block_taps < each.taps for each in blocks):
        return None
    # the panels with the fewest vectors, of these the fewest panels
    candidates = _ceil(rows, t.columns), _ceil(rows, t.lanes)
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
    """`contraction.plan_correlation` for `blocks` of `cut_all`."""
    t = simd.tile(dtype.itemsize * 8)
    size = dtype.itemsize
    batch, axes, x, y = contraction.flatten(batch, axes, x, y)
    depth, height, width = axes
    rows = batch * depth.out * height.out
    in_place = (
        not contraction.is_padded(axes)
        and blocks.block_channels == blocks.channels
        and not contraction.aliases(x[4], width.stride, dtype)
    )
    pitch = x[4] if in_place else contraction.pitch_of_pixels(blocks.block_channels, width.stride, dtype)

    def slab_of(rows_at_once: int, pixels: int) -> contraction.Slab:
        segments = min(batch * depth.out, (rows_at_once + height.out - 2) // height.out + 1)
        segment_rows = (min(height.out, rows_at_once) - 1) * height.stride + height.span
        length = (pixels - 1) * width.stride + width.span
        whole = segments * depth.taps * segment_rows
        row = length * pitch
        return contraction.Slab(pixels, segments, segment_rows, length, row, length, whole * row, 2 * whole)

    # A task is some rows; or some pixels of a row, where threads could share it or it is more than a task reads.
    wanted = _ceil(_TASKS * workers, blocks.groups)
    pieces = 1 if rows >= wanted else max(1, min(_ceil(wanted, rows), width.out // _LEAST_PIXELS))
    pixels = _ceil(width.out, pieces)
    while pixels > t.rows and slab_of(1, pixels).channel * size > SOURCE_BYTES:
        pixels = _ceil(pixels, 2)
    if pixels < width.out:
        pixels = min(width.out, _ceil(pixels, t.rows) * t.rows)
    chunk, chunks, rows_at_once = 0, 0, 1
    if pixels < width.out:
        chunk, chunks = pixels, _ceil(width.out, pixels)
        pixel_tasks = rows * chunks
    else:
        most = min(rows, max(_ceil(rows, wanted), _ceil(_LEAST_PIXELS, pixels)))
        sizes = range(1, most + 1)
        fit = bisect.bisect_right(sizes, SOURCE_BYTES, key=lambda n: slab_of(n, pixels).channel * size)
        pixel_tasks = _ceil(rows, max(1, fit))
        rows_at_once = _ceil(rows, pixel_tasks)
    slab = slab_of(rows_at_once, pixels)
    row_tasks = max(1, min(blocks.panels, _ceil(wanted, pixel_tasks)))

    of_panel = _ceil(blocks.rows, blocks.panels) * blocks.depth
    weight_panels = max(1, min(_ceil(blocks.panels, row_tasks), WEIGHT_BYTES // (of_panel * size)))
    packs = not packed and (
        pixel_tasks == 1 or pixel_tasks * blocks.packed_size <= contraction.AGAIN_WEIGHTS * workers
    )
    slab_size = 0 if in_place else _ceil(slab.channel, 16) * 16
    weight_size = _ceil(weight_panels * of_panel, 16) * 16 if packs else 0
    table_bytes = _ceil((OWN_FIELDS + (0 if in_place else slab.table)) * 8, 64) * 64
    tile_size = max(t.lanes * t.lanes, (t.rows + 1) * t.columns)  # or a block of weights to be packed
    scratch = (slab_size + weight_size + tile_size) * size + table_bytes

    channel, steps = 1, [slab.segment_rows * slab.row, height.dilation * slab.row, width.dilation * pitch]
    if in_place:
        channel, steps = x[1], [a.dilation * step for a, step in zip(axes, x[2:], strict=True)]
    offsets = np.arange(blocks.block_channels, dtype=np.int64)[:, None] * channel
    offsets = (offsets + contraction.offsets_of_taps(axes, steps)).ravel()

    parameters = np.zeros(END, np.int64)
    contraction.set_common(parameters, dtype, batch, axes, slab, x, y, zeros, in_place)
    parameters[[ROW_CHANNELS, CHANNELS, PANELS]] = blocks.rows, blocks.channels, blocks.panels
    contraction.set_pixel_slab(parameters, dtype, slab.row_length, pitch, width.stride)
    parameters[[BLOCK_CHANNELS, ROWS]] = blocks.block_channels, rows
    whole = all(i * blocks.rows // blocks.panels % t.lanes == 0 for i in range(blocks.panels + 1))
    parameters[THROUGH_TILE] = not t.masks and not whole
    parameters[FIRST] = -sum(a.before * step for a, step in zip(axes, x[2:], strict=True))
    parameters[[PIXEL_TASKS, ROW_TASKS, CHUNK, CHUNKS]] = pixel_tasks, row_tasks, chunk, chunks
    parameters[[X_GROUP, Y_GROUP]] = group_steps or (blocks.channels * x[1], blocks.rows * y[1])
    parameters[[SLAB_SIZE, WEIGHT_SIZE, WEIGHT_PANELS]] = slab_size, weight_size, weight_panels
    parameters[[TABLE_BYTES, ROW_TABLE, DEPTH_OFFSET]] = table_bytes, OWN_FIELDS, address(offsets)
    parameters[KERNELS] = _kernels(dtype, blocks, {pixels, width.out - (chunks - 1) * chunk if chunk else pixels})
    flops = 2 * rows * width.out * blocks.rows * blocks.groups * blocks.channels * blocks.taps
    tables = (depth.source, height.source, width.source, offsets)
    return Plan(parameters, tables, blocks.groups * pixel_tasks * row_tasks, scratch, flops, packs, _correlate)
