"""The sums of `contraction.correlate` for small planes with zeros around them, without the products with these zeros.

Of the products of a 3x3 kernel with a plane of 7 x 7 pixels and its border, 18 % are with zeros of the border; of 14 x
14 pixels 9 %, of 28 x 28 pixels 5 %. The panels of `correlate` are consecutive pixels, most of which need the tap that
some need not. Here the operands are exchanged: the rows of the microkernel's tile are the pixels of whole output rows,
its columns output channels (`simd.contract_pixels`). All pixels of an output row have the same rows of the filter
inside the plane, so the others are left out; and which pixels a column of the filter sees is known when the microkernel
is compiled. Pixels are read one by one, for each into all lanes: nothing is packed into panels, and rows whose elements
are neighbours in memory are read in the image as it lies, stride included; others in the slab of `correlate`.

A task is some samples and some panels of output channels. Their sums stay in its memory, [panel][pixel][channel], and
are transposed into the output once, at the end; each block of the weights is used for all pixels before the next.

The blocks of the reduction are those of `correlate`, and so is the order of the sum in them. What is left out would add
zeros, so the result has the same bits. Only zero times a weight that is not finite would be nan: the packing of the
weights takes note of these, and the next of `methods` computes where a zero of the padding is a number like others.
"""

from __future__ import annotations

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
    CHANNEL_PITCH,
    CHANNELS,
    CHUNK,
    FILL,
    IN_PLACE,
    OUT_D,
    OUT_H,
    OUT_W,
    PACKING,
    PADDED,
    PANEL_SIZE,
    PANELS,
    PIXEL_TASKS,
    PIXELS,
    RELU,
    ROW_CHANNELS,
    ROW_TABLE,
    ROW_TASKS,
    SLAB_SIZE,
    TABLE_BYTES,
    TAPS,
    WEIGHT_SIZE,
    X_C,
    X_GROUP,
    X_N,
    Y_GROUP,
    Y_O,
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

# Parameters beyond those of `correlate`.
TAP_COLUMNS, SAMPLE_PITCH, CLASSES, CLASS_TABLE, PLANES_END = range(contraction.END, contraction.END + 5)

# The table of classes of output rows (or pieces of these), those that the same taps of the filter see: of each class
# its number of tap rows, and of output rows, and where in the table these are listed: tap rows by their places in the
# source and in the weights of a channel, output rows by their places in the source and in the sums of a sample; how
# many output rows are a tile, and the addresses of the microkernels of so many and of one.
TAP_ROW_COUNT, ROW_COUNT, TAP_ROWS_AT, ROWS_AT, AT_ONCE, KERNEL, KERNEL_OF_ONE, CLASS_FIELDS = range(8)

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


@_jit
def _move_sums(p, y, sums, tile, runs, pixel, last, load):
    """Pixels pixel .. last of the output channels of a panel, from their sums [pixel][channel], or into them."""
    simd.keep_apart()
    lanes, columns = simd.lanes(sums), simd.columns(sums)
    while pixel < last:
        count = min(columns, last - pixel)
        contraction.find_runs(p, runs, pixel, pixel + count)
        if load:
            contraction.load_tile(p, y, tile, runs, columns)
        for j in range(0, count, lanes):
            for i in range(0, columns, lanes):
                of_pixels, of_channels = simd.offset(sums, j * columns + i), simd.offset(tile, i * columns + j)
                if load:
                    simd.transpose_block(of_pixels, columns, of_channels, columns, lanes, min(lanes, count - j))
                else:
                    simd.transpose_block(of_channels, columns, of_pixels, columns, min(lanes, count - j), lanes)
        if not load:
            contraction.store_tile(p, y, tile, runs, columns)
        sums = simd.offset(sums, count * columns)
        pixel += count


@_jit
def _contract_planes(p, channels, weights, source, samples, sums, places, flags, bias):
    """Add a block of the reduction to the sums of some samples, for a panel of output channels."""
    simd.keep_apart()
    columns = simd.columns(sums)
    of_sample = p[OUT_D] * p[OUT_H] * p[OUT_W] * columns
    classes, of_taps = simd.at(p, p[CLASS_TABLE]), simd.at(p, p[TAP_COLUMNS])
    sources = simd.offset(places, simd.MOST_ROWS)
    for f in range(p[CLASSES]):
        kind = simd.offset(classes, f * CLASS_FIELDS)
        of_rows, rows = simd.offset(classes, kind[TAP_ROWS_AT]), simd.offset(classes, kind[ROWS_AT])
        row, count = 0, kind[ROW_COUNT] * samples
        while row < count:
            many, kernel = kind[AT_ONCE], kind[KERNEL]
            if count - row < many:
                many, kernel = 1, kind[KERNEL_OF_ONE]
            for r in range(many):
                n, k = (row + r) // kind[ROW_COUNT], (row + r) % kind[ROW_COUNT]
                sources[r] = n * p[SAMPLE_PITCH] + rows[2 * k]
                places[r] = n * of_sample + rows[2 * k + 1]
            simd.contract_pixels(
                kernel, channels, kind[TAP_ROW_COUNT], of_rows, of_taps, weights, p[TAPS] * columns, source,
                p[CHANNEL_PITCH], sources, sums, places, flags, bias,
            )  # fmt: skip
            row += many


@tasks.Body
def _correlate_planes(task, worker, p, real):
    scratch = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    sums = simd.offset(scratch, p[SLAB_SIZE])
    own_weights = simd.offset(sums, p[PANEL_SIZE])
    tile = simd.offset(own_weights, p[WEIGHT_SIZE])
    table = simd.at(p, p[tasks.SCRATCH] + (worker + 1) * p[tasks.SCRATCH_BYTES] - p[TABLE_BYTES])
    runs, rows_table = simd.offset(table, 2 * simd.MOST_ROWS), simd.offset(table, p[ROW_TABLE])
    own = simd.offset(rows_table, -contraction.OWN_FIELDS)
    columns, out_rows = simd.columns(real), p[OUT_D] * p[OUT_H]
    plane = out_rows * p[OUT_W]

    # what this task computes: panels first .. last of a group, for some samples
    part, rest = task % p[ROW_TASKS], task // p[ROW_TASKS]
    block, group = rest % p[PIXEL_TASKS], rest // p[PIXEL_TASKS]
    first, last = part * p[PANELS] // p[ROW_TASKS], (part + 1) * p[PANELS] // p[ROW_TASKS]
    samples = p[PIXELS] // plane
    first_n, last_n = block * samples // p[PIXEL_TASKS], (block + 1) * samples // p[PIXEL_TASKS]
    of_panel = (last_n - first_n) * plane * columns

    x = simd.offset(simd.at(real, p[X]), group * p[X_GROUP])
    y = simd.offset(simd.at(real, p[Y]), group * p[Y_GROUP] + first * columns * p[Y_O])
    w = simd.offset(simd.at(real, p[W]), group * p[ROW_CHANNELS] * p[CHANNELS] * p[TAPS])
    bias = simd.offset(simd.at(real, p[BIAS]), group * p[ROW_CHANNELS] + first * columns)
    if p[ADD]:
        for i in range(last - first):
            _move_sums(
                p, simd.offset(y, i * columns * p[Y_O]), simd.offset(sums, i * of_panel), tile, runs, first_n * plane,
                last_n * plane, True,
            )  # fmt: skip
    reduced = 0  # how much of the reduction has been done
    for c in range(0, p[CHANNELS], p[BLOCK_CHANNELS]):
        channels = min(p[BLOCK_CHANNELS], p[CHANNELS] - c)
        depth = channels * p[TAPS]
        flags = simd.ADD if reduced > 0 or p[ADD] else 0
        if c + channels == p[CHANNELS]:
            flags |= (simd.BIAS if p[BIAS] else 0) | (simd.RELU if p[RELU] else 0)
        weights = simd.offset(w, p[ROW_CHANNELS] * reduced + first * columns * depth)
        if p[PACKING]:
            weights = own_weights
            contraction.pack_own(
                p, worker, own, weights, group, tile, first, last, c, channels, np.int64(0), p[TAPS]
            )
        for n in range(first_n, last_n, p[CHUNK]):
            stop = min(n + p[CHUNK], last_n)
            source = simd.offset(x, c * p[X_C] + n * p[X_N])
            if not p[IN_PLACE]:
                listed = contraction.find_rows(p, rows_table, n * out_rows, stop * out_rows)
                tasks.ask(
                    p[FILL], (p, scratch, simd.offset(x, c * p[X_C]), channels, rows_table, listed, 0, table)
                )
                source = scratch
            for i in range(last - first):
                _contract_planes(
                    p, channels, simd.offset(weights, i * columns * depth), source, stop - n,
                    simd.offset(sums, i * of_panel + (n - first_n) * plane * columns), table, flags,
                    simd.offset(bias, i * columns),
                )  # fmt: skip
        reduced += depth
    for i in range(last - first):
        _move_sums(
            p, simd.offset(y, i * columns * p[Y_O]), simd.offset(sums, i * of_panel), tile, runs, first_n * plane,
            last_n * plane, False,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


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
    t = simd.tile(dtype.itemsize * 8)
    shared = sum(batch * cut.groups * (cut.rows // t.columns) for cut in blocks)  # panels of a sample
    if not t.pixels or shared < _LEAST_BUSY * workers * _ceil(shared, workers):
        return None
    for cut, (depth, height, width) in zip(blocks, axes, strict=True):
        if (
            width.taps > simd.MOST_TAPS
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


@tasks.Body
def _list_kernel(shape, rows, table, real):
    simd.list_pixel_kernel(shape, rows, table, real)


@functools.cache
def _kernel(dtype: np.dtype, shape: int, rows: int) -> int:
    """Address of the microkernel for a shape (see `simd.pixel_shape`) and a number of rows."""
    table = np.zeros(1, np.int64)
    _list_kernel.call(dtype, shape, rows, table)
    return int(table[0])


def _pieces(t: simd.Tile, width: Axis) -> list[tuple[int, int]]:
    """The first pixel of each piece of an output row, and its end: as few as there can be, as long as one another."""
    number = _ceil(width.out, t.pixels)
    return [(i * width.out // number, (i + 1) * width.out // number) for i in range(number)]


def _class_table(
    dtype: np.dtype, axes: tuple[Axis, ...], of_tap: tuple[int, int], of_pixel: tuple[int, int, int], first: int
) -> tuple[int, np.ndarray]:
    """The number of classes, and their table.

    `of_tap` is how far apart in the source taps are (in depth and height), `of_pixel` output pixels; the first pixel of
    all begins at `first`.
    """
    t = simd.tile(dtype.itemsize * 8)
    depth, height, width = axes
    classes: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    for d, h in itertools.product(range(depth.out), range(height.out)):
        classes.setdefault(tuple(itertools.product(_inside(depth, d), _inside(height, h))), []).append((d, h))
    pieces = _pieces(t, width)
    heads: list[int] = []
    lists: list[int] = []
    for (taps, rows), (begin, end) in itertools.product(classes.items(), pieces):
        place = CLASS_FIELDS * len(classes) * len(pieces) + len(lists)
        seen = [(max(low, begin) - begin, min(high, end) - begin) for low, high in _seen(width)]
        shape = simd.pixel_shape(end - begin, of_pixel[2], [each if each[0] < each[1] else (0, 0) for each in seen])
        at_once = simd.pixel_rows(t, end - begin)
        heads += [len(taps), len(rows), place, place + 2 * len(taps)]
        heads += [at_once, _kernel(dtype, shape, at_once), _kernel(dtype, shape, 1)]
        for i, j in taps:
            lists += [i * of_tap[0] + j * of_tap[1], (i * height.taps + j) * width.taps * t.columns]
        for d, h in rows:
            lists.append(first + d * of_pixel[0] + h * of_pixel[1] + begin * of_pixel[2])
            lists.append(((d * height.out + h) * width.out + begin) * t.columns)
    return len(classes) * len(pieces), np.array(heads + lists, np.int64)


def plan_correlation(
    dtype: np.dtype, batch: int, blocks: Blocks, axes: tuple[Axis, ...], x: Strides, y: Strides, workers: int,
    packed: bool, group_steps: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """`contraction.plan_correlation` for `blocks` of `cut`, and zeros around the input."""
    t = simd.tile(dtype.itemsize * 8)
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
    pixel_tasks = _ceil(batch, samples)
    samples = _ceil(batch, pixel_tasks)
    panels = max(1, min(fit // samples, WEIGHT_BYTES // (t.columns * blocks.depth * size)))
    row_tasks = _ceil(blocks.panels, panels)
    if blocks.groups * pixel_tasks * row_tasks < 8 * workers:  # as many for each worker
        # More than one each, unless those of other panels all copy the same input: 2 to 12 % of the time of one sample.
        least = 2 * workers if in_place else workers
        row_tasks = max(row_tasks, _ceil(least, blocks.groups * pixel_tasks))
        row_tasks = min(blocks.panels, _ceil(row_tasks, workers) * workers)
        pixel_tasks = min(batch, max(pixel_tasks, _ceil(least, blocks.groups * row_tasks)))
        samples = _ceil(batch, pixel_tasks)
    panels = _ceil(blocks.panels, row_tasks)
    packs = not packed and (
        pixel_tasks == 1 or pixel_tasks * blocks.packed_size <= contraction.AGAIN_WEIGHTS * workers
    )

    of_input = blocks.block_channels * math.prod(a.size for a in axes) * size
    chunk = max(1, min(samples, SOURCE_BYTES // of_input))
    slab = contraction.slab_shape(axes, chunk * plane, chunk, t.columns)
    slab_size = 0 if in_place else _ceil(blocks.block_channels * slab.channel + 2 * t.columns, 16) * 16
    sum_size = panels * samples * plane * t.columns
    weight_size = panels * t.columns * blocks.depth if packs else 0
    row_table = 2 * simd.MOST_ROWS + 1 + 2 * t.columns + contraction.OWN_FIELDS
    table_bytes = _ceil((row_table + (0 if in_place else slab.table)) * 8, 64) * 64
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
        tap_columns = contraction.tap_offsets(axes, slab)[: width.taps].copy()
        pitch, sample_pitch = slab.channel, depth.out * segment
    classes, table = _class_table(dtype, axes, of_tap, of_pixel, first)

    parameters = np.zeros(PLANES_END, np.int64)
    contraction.set_common(parameters, dtype, batch, axes, slab, x, y, True, in_place)
    parameters[PADDED] = False
    parameters[[ROW_CHANNELS, CHANNELS, PANELS]] = blocks.rows, blocks.channels, blocks.panels
    parameters[[BLOCK_CHANNELS, CHANNEL_PITCH, SAMPLE_PITCH]] = blocks.block_channels, pitch, sample_pitch
    parameters[[PIXEL_TASKS, ROW_TASKS, CHUNK]] = pixel_tasks, row_tasks, chunk
    parameters[[X_GROUP, Y_GROUP]] = group_steps or (blocks.channels * x[1], blocks.rows * y[1])
    parameters[[SLAB_SIZE, PANEL_SIZE, WEIGHT_SIZE]] = slab_size, sum_size, weight_size
    parameters[[TABLE_BYTES, ROW_TABLE]] = table_bytes, row_table
    parameters[[TAP_COLUMNS, CLASSES, CLASS_TABLE]] = address(tap_columns), classes, address(table)
    tables = (depth.source, height.source, width.source, tap_columns, table)
    flops = 2 * batch * plane * blocks.rows * blocks.groups * blocks.channels * blocks.taps
    number = blocks.groups * pixel_tasks * row_tasks
    return Plan(parameters, tables, number, scratch, flops, packs, _correlate_planes)
