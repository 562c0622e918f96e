"""The sums of `implicit_gemm` for small planes with zeros around them, without the products with these zeros.

Of the products of a 3x3 kernel with a plane of 7 x 7 pixels and its border, 18 % are with zeros of the border; of 14 x
14 pixels 9 %, of 28 x 28 pixels 5 %. The panels of `correlate` are consecutive pixels, most of which need the tap that
some need not. Here the operands are exchanged: the rows of the microkernel's tile are the pixels of whole output rows,
its columns output channels (`contract_pixels`). All pixels of an output row have the same rows of the filter
inside the plane, so the others are left out; and which pixels a column of the filter sees is known when the microkernel
is compiled. Pixels are read one by one, for each into all lanes: nothing is packed into panels, and rows whose elements
are neighbours in memory are read in the image itself, stride included; others in the slab of `correlate`.

A task is some samples and some panels of output channels. Their sums stay in its memory, [panel][pixel][channel], and
are transposed into the output once, at the end; each block of the weights is used for all pixels before the next.

The blocks of the reduction are those of `correlate`, and so is the order of the sum in them. What is left out would add
zeros, so the result has the same bits. Only zero times a weight that is not finite would be nan: the packing of the
weights takes note of these, and the next of `methods` computes where a zero of the padding is a number like others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from . import tasks
from .implicit_gemm.blocks import Axis, Blocks, Strides, ceil_div, slab_shape, tap_offsets
from .implicit_gemm.panels import find_parts, load_tile, store_tile
from .implicit_gemm.parameters import Correlation
from .implicit_gemm.plan import AGAIN_WEIGHTS, Plan, set_common
from .implicit_gemm.slab import find_rows
from .jit import helper
from .records import Integer, Integers, PointerTo, Record
from .tasks import data_address
from .vector import move
from .vector import tile as machine
from .vector.gemm import ADD, BIAS, MOST_ROWS, MOST_TAPS, RELU, PixelRows, contract_pixels, pixel_rows
from .vector.memory import at, integers_at, no_inline, offset
from .vector.tile import Tile, tile


class RowClass(Record):
    """Output rows, or parts of these, that the same taps of the filter see."""

    tap_row_count: Integer
    row_count: Integer  # of output rows
    tap_rows: Integers  # places of the tap rows: in the source, and in the weights of a channel
    rows: Integers  # places of the output rows: in the source, and in the sums of a sample
    at_once: Integer  # output rows of a tile
    kernel: Integer  # address of the microkernel of so many,
    kernel_of_one: Integer  # and of one


class Planes(Correlation):
    """Parameters beyond those of `implicit_gemm.correlate`."""

    tap_columns: Integers  # places in the source of the columns of the filter
    sample_pitch: Integer  # elements from sample to sample of the source
    classes: Integer
    class_table: PointerTo[RowClass]


# All these must be in L2 at once: sums of a task, its weights of one block of the reduction, and the rows of the source
# of some samples.
SUM_BYTES = 256 * 1024
WEIGHT_BYTES = 256 * 1024
SOURCE_BYTES = 192 * 1024
# At most this part of the products may be left for the exchange to pay. On AVX-512, 3x3 kernels without padding take as
# long either way, with 2.4 % of zeros (stride 2, 28 x 28 pixels) 4 to 9 % less. With 16 registers, where the tile has
# rows of 3 to 6 pixels and more loads for each product, it takes 0.75 to 0.9 of the time with 18 or 9 % of zeros (7 x 7
# pixels, 14 x 14), and up to 1.1 times as long with 5 %.
_MOST_SHARE, _MOST_SHARE_OF_16_REGISTERS = 0.98, 0.92
# Kernels of one tap have no zeros. Where rows are neighbours in the memory of the weights, which are then packed by
# copying whole vectors, 1x1 input gradients of 7 x 7 and 14 x 14 pixels take up to 17 % less time on AVX-512, and of 49
# pixels in all most of it; of more pixels as long either way, and forward passes, whose weights are transposed, a
# little longer.
_FEW_PIXELS = 1024
# So much of the threads' time must find work, whose least unit is one panel of output channels of one sample.
_LEAST_BUSY = 0.8


@helper
def _move_sums(p, y, sums, tile, parts, pixel, last, load):
    """Pixels pixel .. last of the output channels of a panel, from their sums [pixel][channel], or into them."""
    no_inline()
    lanes, columns = machine.lanes(sums), machine.columns(sums)
    while pixel < last:
        count = min(columns, last - pixel)
        find_parts(p, parts, pixel, pixel + count)
        if load:
            load_tile(p, y, tile, parts, columns)
        for j in range(0, count, lanes):
            for i in range(0, columns, lanes):
                of_pixels, of_channels = offset(sums, j * columns + i), offset(tile, i * columns + j)
                if load:
                    move.transpose_block(of_pixels, columns, of_channels, columns, lanes, min(lanes, count - j))
                else:
                    move.transpose_block(of_channels, columns, of_pixels, columns, min(lanes, count - j), lanes)
        if not load:
            store_tile(p, y, tile, parts, columns)
        sums = offset(sums, count * columns)
        pixel += count


@helper
def _contract_planes(p, channels, weights, source, samples, sums, places, flags, bias):
    """Add a block of the reduction to the sums of some samples, for a panel of output channels."""
    no_inline()
    columns = machine.columns(sums)
    of_sample = p.out.d * p.out.h * p.out.w * columns
    sources = offset(places, MOST_ROWS)
    for f in range(p.classes):
        kind = p.class_table[f]
        rows = kind.rows
        row, count = 0, kind.row_count * samples
        while row < count:
            many, kernel = kind.at_once, kind.kernel
            if count - row < many:
                many, kernel = 1, kind.kernel_of_one
            for r in range(many):
                n, k = (row + r) // kind.row_count, (row + r) % kind.row_count
                sources[r] = n * p.sample_pitch + rows[2 * k]
                places[r] = n * of_sample + rows[2 * k + 1]
            contract_pixels(
                kernel, channels, kind.tap_row_count, kind.tap_rows, p.tap_columns, weights, p.taps * columns, source,
                p.slab.channel_pitch, sources, sums, places, flags, bias,
            )  # fmt: skip
            row += many


@tasks.body(Planes)
def correlate_planes(task, worker, p, real):
    scratch = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    sums = offset(scratch, p.slab.elements)
    own_weights = offset(sums, p.panel_elements)
    tile = offset(own_weights, p.weight_elements)
    table = integers_at(p.header.scratch + (worker + 1) * p.header.scratch_bytes - p.table_bytes)
    parts, rows_table = offset(table, 2 * MOST_ROWS), offset(table, p.row_table)
    columns, out_rows = machine.columns(real), p.out.d * p.out.h
    plane = out_rows * p.out.w

    # what this task computes: panels first .. last of a group, for some samples
    part, rest = task % p.row_tasks, task // p.row_tasks
    block, group = rest % p.pixel_tasks, rest // p.pixel_tasks
    first, last = part * p.row_panels // p.row_tasks, (part + 1) * p.row_panels // p.row_tasks
    samples = p.pixels // plane
    first_n, last_n = block * samples // p.pixel_tasks, (block + 1) * samples // p.pixel_tasks
    of_panel = (last_n - first_n) * plane * columns

    x = offset(p.operands.x, group * p.input_group)
    y = offset(p.operands.y, group * p.output_group + first * columns * p.output.c)
    w = offset(p.operands.w, group * p.row_channels * p.channels * p.taps)
    bias = offset(p.operands.bias, group * p.row_channels + first * columns)
    if p.operands.add:
        for i in range(last - first):
            _move_sums(
                p, offset(y, i * columns * p.output.c), offset(sums, i * of_panel), tile, parts, first_n * plane,
                last_n * plane, True,
            )  # fmt: skip
    reduced = 0  # how much of the reduction has been done
    for c in range(0, p.channels, p.block_channels):
        channels = min(p.block_channels, p.channels - c)
        depth = channels * p.taps
        flags = ADD if reduced > 0 or p.operands.add else 0
        if c + channels == p.channels:
            flags |= (BIAS if p.operands.has_bias else 0) | (RELU if p.operands.relu else 0)
        weights = offset(w, p.row_channels * reduced + first * columns * depth)
        if p.pack_rows:
            weights = own_weights
            tasks.call_with(p.pack_rows, (p.packing, weights, group, first, last, c, channels, 0, p.taps, tile))
        for n in range(first_n, last_n, p.chunk):
            stop = min(n + p.chunk, last_n)
            source = offset(x, c * p.input.c + n * p.input.n)
            if not p.slab.in_place:
                listed = find_rows(p, rows_table, n * out_rows, stop * out_rows)
                tasks.call_with(
                    p.slab.fill_body, (p, scratch, offset(x, c * p.input.c), channels, rows_table, listed, 0, table)
                )
                source = scratch
            for i in range(last - first):
                _contract_planes(
                    p, channels, offset(weights, i * columns * depth), source, stop - n,
                    offset(sums, i * of_panel + (n - first_n) * plane * columns), table, flags,
                    offset(bias, i * columns),
                )  # fmt: skip
        reduced += depth
    for i in range(last - first):
        _move_sums(
            p, offset(y, i * columns * p.output.c), offset(sums, i * of_panel), tile, parts, first_n * plane,
            last_n * plane, False,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _inside(axis: Axis, position: int) -> list[int]:
    """The taps that see an element of the input, at an output position."""
    first = position * axis.stride - axis.before
    return [k for k in range(axis.taps) if 0 <= first + k * axis.dilation < axis.size]


def _seen(axis: Axis) -> list[tuple[int, int]]:
    """For each tap, the first and the end of the output positions where it sees an element of the input."""
    positions = [[o for o in range(axis.out) if k in _inside(axis, o)] for k in range(axis.taps)]
    return [(each[0], each[-1] + 1) if each else (0, 0) for each in positions]


def _products(axes: tuple[Axis, ...]) -> int:
    """Products of an input channel and an output channel that are not with zeros around the input."""
    return math.prod(sum(end - first for first, end in _seen(a)) for a in axes)


def needed(axes: Sequence[tuple[Axis, ...]]) -> float:
    """The part of the products that is not with zeros around the input."""
    return sum(map(_products, axes)) / sum(math.prod(a.out * a.taps for a in each) for each in axes)


def cut_all(
    dtype: np.dtype, batch: int, blocks: Sequence[Blocks], axes: Sequence[tuple[Axis, ...]], workers: int,
    neighbours: bool = False,
) -> list[Blocks] | None:  # fmt: skip
    """`blocks`, of products of the same rows, with panels of output channels that fill the columns of a tile.

    `neighbours` says if the rows are that in the memory of the weights. None if the products are better left to
    `correlate`, which can share out the pixels of a plane too.
    """
    t = tile(dtype.itemsize * 8)
    shared = sum(batch * cut.groups * (cut.rows // t.columns) for cut in blocks)  # panels of a sample
    if not t.pixels or shared < _LEAST_BUSY * workers * ceil_div(shared, workers):
        return None
    for cut, (depth, height, width) in zip(blocks, axes, strict=True):
        if (
            width.taps > MOST_TAPS
            or width.stride > t.pixels
            or cut.rows % t.columns
            or cut.block_taps < cut.taps
            or depth.out * height.out * width.out * t.columns * dtype.itemsize > SUM_BYTES
            or not all(_inside(a, o) for a in (depth, height) for o in range(a.out))
        ):
            return None
    all_products = sum(math.prod(a.out * a.taps for a in each) for each in axes)
    few_pixels = neighbours and batch * all_products <= _FEW_PIXELS and all(cut.taps == 1 for cut in blocks)
    most = _MOST_SHARE if t.masks else _MOST_SHARE_OF_16_REGISTERS
    if needed(axes) > most and not (few_pixels and t.masks):
        return None
    return [replace(cut, panels=cut.rows // t.columns) for cut in blocks]


def _row_parts(t: Tile, width: Axis) -> list[tuple[int, int]]:
    """The first pixel of each part of an output row, and its end: as few as there can be, as long as one another."""
    number = ceil_div(width.out, t.pixels)
    return [(i * width.out // number, (i + 1) * width.out // number) for i in range(number)]


def _class_table(
    dtype: np.dtype, axes: tuple[Axis, ...], of_tap: tuple[int, int], of_pixel: tuple[int, int, int], first: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The table of classes, and the lists of rows that it points to.

    `of_tap` is how far apart in the source taps are (in depth and height), `of_pixel` output pixels; the first pixel of
    all begins at `first`.
    """
    t = tile(dtype.itemsize * 8)
    depth, height, width = axes
    classes: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    for d, h in itertools.product(range(depth.out), range(height.out)):
        classes.setdefault(tuple(itertools.product(_inside(depth, d), _inside(height, h))), []).append((d, h))
    heads, lists = [], []
    for (taps, rows), (begin, end) in itertools.product(classes.items(), _row_parts(t, width)):
        seen = [(max(low, begin) - begin, min(high, end) - begin) for low, high in _seen(width)]
        seen = [each if each[0] < each[1] else (0, 0) for each in seen]
        at_once = pixel_rows(t, end - begin)
        kernels = [
            contract_pixels.address(dtype, PixelRows(n, end - begin, of_pixel[2], tuple(seen))) for n in (at_once, 1)
        ]
        tap_rows = [
            (i * of_tap[0] + j * of_tap[1], (i * height.taps + j) * width.taps * t.columns) for i, j in taps
        ]
        out_rows = [
            (
                first + d * of_pixel[0] + h * of_pixel[1] + begin * of_pixel[2],
                ((d * height.out + h) * width.out + begin) * t.columns,
            )
            for d, h in rows
        ]
        lists += [np.array(tap_rows, np.int64), np.array(out_rows, np.int64)]
        heads.append((len(taps), len(rows), *map(data_address, lists[-2:]), at_once, *kernels))
    return RowClass.table(heads), lists


def plan_correlation(
    dtype: np.dtype, batch: int, blocks: Blocks, axes: tuple[Axis, ...], x: Strides, y: Strides, workers: int,
    packed: bool, group_steps: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """`implicit_gemm.plan_correlation` for `blocks` of `cut`, and zeros around the input."""
    t = tile(dtype.itemsize * 8)
    size = dtype.itemsize
    depth, height, width = axes
    plane = math.prod(a.out for a in axes)
    in_place = x[4] == 1

    # Each task of other samples reads the weights again, each of other panels the input: what fits is shared out so
    # that both are about as much.
    of_panel = t.columns * blocks.channels * blocks.taps
    of_sample = blocks.channels * math.prod(a.size for a in axes)
    fit = max(1, SUM_BYTES // (plane * t.columns * size))
    samples = max(1, min(batch, fit, round(math.sqrt(fit * of_panel / of_sample))))
    pixel_tasks = ceil_div(batch, samples)
    samples = ceil_div(batch, pixel_tasks)
    panels = max(1, min(fit // samples, WEIGHT_BYTES // (t.columns * blocks.depth * size)))
    row_tasks = ceil_div(blocks.panels, panels)
    if blocks.groups * pixel_tasks * row_tasks < 8 * workers:  # as many for each worker
        # More than one each, unless those of other panels all copy the same input: 2 to 12 % of the time of one sample.
        least = 2 * workers if in_place else workers
        row_tasks = max(row_tasks, ceil_div(least, blocks.groups * pixel_tasks))
        row_tasks = min(blocks.panels, ceil_div(row_tasks, workers) * workers)
        pixel_tasks = min(batch, max(pixel_tasks, ceil_div(least, blocks.groups * row_tasks)))
        samples = ceil_div(batch, pixel_tasks)
    panels = ceil_div(blocks.panels, row_tasks)
    packs = not packed and (
        pixel_tasks == 1 or pixel_tasks * blocks.packed_size <= AGAIN_WEIGHTS * workers
    )

    of_input = blocks.block_channels * math.prod(a.size for a in axes) * size
    chunk = max(1, min(samples, SOURCE_BYTES // of_input))
    slab = slab_shape(axes, chunk * plane, chunk, t.columns)
    slab_size = 0 if in_place else ceil_div(blocks.block_channels * slab.channel + 2 * t.columns, 16) * 16
    sum_size = panels * samples * plane * t.columns
    weight_size = panels * t.columns * blocks.depth if packs else 0
    row_table = 2 * MOST_ROWS + 1 + 2 * t.columns
    table_bytes = ceil_div((row_table + (0 if in_place else slab.table)) * 8, 64) * 64
    scratch = (slab_size + sum_size + weight_size + t.columns * t.columns) * size + table_bytes

    if in_place:
        first = -(depth.before * x[2] + height.before * x[3] + width.before)
        of_tap = depth.dilation * x[2], height.dilation * x[3]
        of_pixel = depth.stride * x[2], height.stride * x[3], width.stride
        tap_columns = np.arange(width.taps, dtype=np.int64) * width.dilation
        pitch, sample_pitch = x[1], x[0]
    else:
        first, segment = 0, depth.taps * slab.segment_rows * slab.row
        of_tap = slab.segment_rows * slab.row, height.dilation * slab.row
        of_pixel = segment, height.stride * slab.row, 1
        tap_columns = tap_offsets(axes, slab)[: width.taps].copy()
        pitch, sample_pitch = slab.channel, depth.out * segment
    classes, lists = _class_table(dtype, axes, of_tap, of_pixel, first)

    p = Planes.zeros()
    set_common(p, dtype, batch, axes, slab, x, y, True, in_place)
    p.padded = False
    p.row_channels, p.channels, p.row_panels = blocks.rows, blocks.channels, blocks.panels
    p.block_channels, p.slab.channel_pitch, p.sample_pitch = blocks.block_channels, pitch, sample_pitch
    p.pixel_tasks, p.row_tasks, p.chunk = pixel_tasks, row_tasks, chunk
    p.input_group, p.output_group = group_steps or (blocks.channels * x[1], blocks.rows * y[1])
    p.slab.elements, p.panel_elements, p.weight_elements = slab_size, sum_size, weight_size
    p.table_bytes, p.row_table = table_bytes, row_table
    p.tap_columns, p.classes, p.class_table = data_address(tap_columns), len(classes), data_address(classes)
    tables = (depth.source, height.source, width.source, tap_columns, classes, *lists)
    flops = 2 * batch * plane * blocks.rows * blocks.groups * blocks.channels * blocks.taps
    number = blocks.groups * pixel_tasks * row_tasks
    return Plan(np.asarray(p), tables, number, scratch, flops, packs, correlate_planes)
