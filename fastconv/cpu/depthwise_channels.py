"""Depthwise convolutions with channels in the lanes of the vectors: every channel is a plane of its own, but all do the
same.

A *block* is as many channels as a vector has lanes. A tile of its planes is copied, with its border, into the *slab*
in the nearest caches, where a pixel is a vector of channels: from channels-last arrays as it is, from channels-first
ones through transposes in registers. From there on no stride, no row end and no plane of few pixels leaves a lane
empty, and no two lanes ever meet. On planes of 7 x 7 to 28 x 28 that is 1.1 to 2.3 times as fast as `depthwise`, whose
vectors run along the rows, and three to four times on channels-last arrays. Results go directly into channels-last
arrays, and through the same transposes into channels-first ones.

The forward pass and the input gradient are one body, with phases as in `depthwise`. Rows of taps that meet nothing but
the zeros around the plane are left out, but where a weight is infinite or nan: then the product is nan, and must be
seen. What is added up in which order depends on the filter alone, and in the weight gradient on the shape: never on
threads, and in the first two never on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit

from ..geometry import ConvGeometry
from . import contraction, simd, tasks
from .contraction import Strides, address
from .depthwise import Line, Lines, Phase, address_of, cut, store_sum

# Parameters of the bodies (int64, in this order), and
(
    X, W, Y, BIAS, RELU, ADD,
    X_N, X_C, X_D, X_H, X_W, Y_N, Y_C, Y_D, Y_H, Y_W, X_PIXELS, Y_PIXELS, X_ROWS, Y_ROWS,
    CHANNELS, BATCH, UNITS, UNIT_TASKS, SPLITS, TAPS, TAPS_HW, TAPS_W, X_PLACES, Y_PLACES, W_PLACES,
    ROW_PITCH, PLANE_PITCH, SLAB_SIZE, OUT_ROW, OUT_PLANE, OUT_SIZE, DEPTH, HEIGHT, WIDTH, END,
) = (*range(tasks.FIRST, tasks.FIRST + 38), *(tasks.FIRST + 37 + 12 * n for n in range(1, 4)))  # fmt: skip
# those of a dimension, from DEPTH, HEIGHT and WIDTH on, and
SOURCE, BEFORE, SIZE, STRIDE, STEP, OUT, FULL, TILE, TILES, REACH, PHASES, TABLE = range(12)
# those of a phase, in the table of its dimension: FIRST to TAP_STEP as in `depthwise`; PIECES are where a table of the
# pieces that its taps are cut into begins, WITHIN and EVERY tables of three numbers for each element: where it meets
# its first tap, which one, and how many (of those within the input, and of all).
FIRST, COUNT, SHIFT, START, TAP_STEP, PIECES, WITHIN, EVERY, PHASE_FIELDS = range(9)
FUNCTION, BLOCKS, BLOCK_TAPS = range(3)

SLAB_BYTES = 256 * 1024  # with the output beside it and what streams through, a half of the L2 caches of today
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads

_jit = njit(error_model="numpy", nogil=True)


# ---------------------------------------------------------------------------------------------------------------------
# Between the arrays and the vectors of channels
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _spread(target, places, source, pixels_first, channel_step, pixel_step, count, channels):
    """Copy `count` pixels that follow one another in the array to target[places[k]]."""
    if pixels_first:
        simd.spread_pixels(target, places, source, pixel_step, count, channels)
    else:
        simd.spread_planes(target, places, source, channel_step, count, channels)


@_jit
def _fill_slab(p, slab, x, channels, first_d, depth, first_h, height, first_w, width):
    """Copy a box of padded coordinates of a block. What is zero was written before."""
    source_d, places = simd.at(p, p[DEPTH + SOURCE]), simd.at(p, p[X_PLACES])
    low_h = max(p[HEIGHT + BEFORE], first_h)
    rows = min(p[HEIGHT + BEFORE] + p[HEIGHT + SIZE], first_h + height) - low_h
    low_w = max(p[WIDTH + BEFORE], first_w)
    columns = min(p[WIDTH + BEFORE] + p[WIDTH + SIZE], first_w + width) - low_w
    if rows <= 0 or columns <= 0:
        return
    runs, pixels = (1, rows * columns) if p[X_ROWS] else (rows, columns)
    for d in range(depth):
        from_d = source_d[first_d + d]
        if from_d < 0:
            continue
        plane = simd.offset(
            x, from_d * p[X_D] + (low_h - p[HEIGHT + BEFORE]) * p[X_H] + (low_w - p[WIDTH + BEFORE]) * p[X_W]
        )
        target = simd.offset(
            slab, d * p[PLANE_PITCH] + (low_h - first_h) * p[ROW_PITCH] + (low_w - first_w) * simd.lanes(slab)
        )
        for r in range(runs):
            _spread(
                simd.offset(target, r * p[ROW_PITCH]), places, simd.offset(plane, r * p[X_H]), p[X_PIXELS], p[X_C],
                p[X_W], pixels, channels,
            )  # fmt: skip


@_jit
def _load_tile(p, out, y, channels, depth, height, width):
    """Copy a box of the output (or of its gradient) into out [d][h][w][lane]."""
    places = simd.at(p, p[Y_PLACES])
    runs, pixels = (1, height * width) if p[Y_ROWS] else (height, width)
    for d in range(depth):
        for r in range(runs):
            _spread(
                simd.offset(out, d * p[OUT_PLANE] + r * p[OUT_ROW]), places,
                simd.offset(y, d * p[Y_D] + r * p[Y_H]), p[Y_PIXELS], p[Y_C], p[Y_W], pixels, channels,
            )  # fmt: skip


@_jit
def _store_tile(p, y, out, channels, depth, height, width):
    """The reverse of `_load_tile`."""
    runs, pixels = (1, height * width) if p[Y_ROWS] else (height, width)
    for d in range(depth):
        for r in range(runs):
            target = simd.offset(y, d * p[Y_D] + r * p[Y_H])
            source = simd.offset(out, d * p[OUT_PLANE] + r * p[OUT_ROW])
            if p[Y_PIXELS]:
                simd.collect_pixels(target, p[Y_W], source, simd.lanes(out), pixels, channels)
            else:
                simd.collect_planes(target, p[Y_C], source, simd.lanes(out), pixels, channels)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass and the input gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _correlate_tile(
    p, y, y_d, y_h, y_w, slab, w, bias, flags, every, first_d, last_d, first_h, last_h, first_w, last_w
):  # fmt: skip
    """A tile of the output of a block, from the slab and the weights w [tap][lane]; y is where the tile begins."""
    lanes = simd.lanes(slab)
    depths, heights, widths = simd.at(p, p[DEPTH + TABLE]), simd.at(p, p[HEIGHT + TABLE]), simd.at(p, p[WIDTH + TABLE])
    origin = first_d * p[DEPTH + STRIDE] * p[PLANE_PITCH] + first_h * p[HEIGHT + STRIDE] * p[ROW_PITCH]
    slab = simd.offset(slab, -origin)
    met = EVERY if every else WITHIN
    for i in range(p[DEPTH + PHASES]):
        in_depth = simd.offset(depths, i * PHASE_FIELDS)
        reach_d = simd.offset(depths, in_depth[met])
        for j in range(p[HEIGHT + PHASES]):
            in_height = simd.offset(heights, j * PHASE_FIELDS)
            reach_h = simd.offset(heights, in_height[met] + 3 * first_h)
            rows = min(last_h, in_height[COUNT]) - first_h
            for k in range(p[WIDTH + PHASES]):
                in_width = simd.offset(widths, k * PHASE_FIELDS)
                pieces = simd.offset(widths, in_width[PIECES])
                columns = min(last_w, in_width[COUNT]) - first_w
                if rows <= 0 or columns <= 0:
                    continue
                for d in range(first_d, min(last_d, in_depth[COUNT])):
                    simd.call_correlate_pixels(
                        pieces[FUNCTION],
                        simd.offset(
                            y, (in_depth[FIRST] + (d - first_d) * p[DEPTH + STEP]) * y_d + in_height[FIRST] * y_h
                            + in_width[FIRST] * y_w,
                        ),
                        p[HEIGHT + STEP] * y_h, p[WIDTH + STEP] * y_w,
                        simd.offset(slab, reach_d[3 * d] * p[PLANE_PITCH] + in_width[SHIFT] * lanes),
                        p[WIDTH + STRIDE] * lanes,
                        simd.offset(w, (reach_d[3 * d + 1] * p[TAPS_HW] + in_width[START]) * lanes),
                        reach_h, rows, columns,
                        reach_d[3 * d + 2], in_depth[TAP_STEP] * p[PLANE_PITCH], p[TAPS_HW] * lanes,
                        in_height[TAP_STEP] * p[ROW_PITCH], p[TAPS_W] * lanes,
                        pieces[BLOCKS], pieces[BLOCK_TAPS] * in_width[TAP_STEP] * lanes, pieces[BLOCK_TAPS] * lanes,
                        flags, bias,
                    )  # fmt: skip


@_jit
def _load_weights(p, w, bias, first, channels):
    """Weights as [tap][lane], in the order of the phases, and the bias; return whether all weights are finite."""
    filters = simd.offset(simd.at(w, p[W]), first * p[TAPS])
    simd.spread_planes(w, simd.at(p, p[W_PLACES]), filters, p[TAPS], p[TAPS], channels)
    for k in range(simd.lanes(w)):
        bias[k] = -0.0  # adding it changes nothing
    if p[BIAS]:
        given = simd.offset(simd.at(w, p[BIAS]), first)
        for k in range(channels):
            bias[k] = given[k]
    return simd.count_not_finite(w, p[TAPS]) == 0


@tasks.Body
def _correlate(task, worker, p, real):
    """Task = a tile, and a range of (block, batch)."""
    lanes = simd.lanes(real)
    slab = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    out = simd.offset(slab, p[SLAB_SIZE])
    w = simd.offset(out, p[OUT_SIZE])
    bias = simd.offset(w, p[TAPS] * lanes)
    part, rest = task % p[UNIT_TASKS], task // p[UNIT_TASKS]
    first_w = rest % p[WIDTH + TILES] * p[WIDTH + TILE]
    rest = rest // p[WIDTH + TILES]
    first_h = rest % p[HEIGHT + TILES] * p[HEIGHT + TILE]
    first_d = rest // p[HEIGHT + TILES] * p[DEPTH + TILE]
    last_d = min(first_d + p[DEPTH + TILE], p[DEPTH + OUT])
    last_h = min(first_h + p[HEIGHT + TILE], p[HEIGHT + OUT])
    last_w = min(first_w + p[WIDTH + TILE], p[WIDTH + OUT])
    out_d, out_h, out_w = first_d * p[DEPTH + STEP], first_h * p[HEIGHT + STEP], first_w * p[WIDTH + STEP]
    depth = min(last_d * p[DEPTH + STEP], p[DEPTH + FULL]) - out_d
    height = min(last_h * p[HEIGHT + STEP], p[HEIGHT + FULL]) - out_h
    width = min(last_w * p[WIDTH + STEP], p[WIDTH + FULL]) - out_w
    flags = (simd.ADD if p[ADD] else 0) | (simd.RELU if p[RELU] else 0)
    simd.fill_zero(slab, p[SLAB_SIZE])
    loaded, finite = -1, True
    for unit in range(part * p[UNITS] // p[UNIT_TASKS], (part + 1) * p[UNITS] // p[UNIT_TASKS]):
        block, n = unit // p[BATCH], unit % p[BATCH]
        first = block * lanes
        channels = min(lanes, p[CHANNELS] - first)
        if block != loaded:
            loaded, finite = block, _load_weights(p, w, bias, first, channels)
        _fill_slab(
            p, slab, simd.offset(simd.at(real, p[X]), n * p[X_N] + first * p[X_C]), channels,
            first_d * p[DEPTH + STRIDE], (last_d - 1 - first_d) * p[DEPTH + STRIDE] + p[DEPTH + REACH],
            first_h * p[HEIGHT + STRIDE], (last_h - 1 - first_h) * p[HEIGHT + STRIDE] + p[HEIGHT + REACH],
            first_w * p[WIDTH + STRIDE], (last_w - 1 - first_w) * p[WIDTH + STRIDE] + p[WIDTH + REACH],
        )  # fmt: skip
        y = simd.offset(
            simd.at(real, p[Y]), n * p[Y_N] + first * p[Y_C] + out_d * p[Y_D] + out_h * p[Y_H] + out_w * p[Y_W]
        )
        if p[Y_PIXELS] and channels == lanes:
            _correlate_tile(
                p, y, p[Y_D], p[Y_H], p[Y_W], slab, w, bias, flags, not finite, first_d, last_d, first_h, last_h,
                first_w, last_w,
            )  # fmt: skip
        else:
            if p[ADD]:
                _load_tile(p, out, y, channels, depth, height, width)
            _correlate_tile(
                p, out, p[OUT_PLANE], p[OUT_ROW], lanes, slab, w, bias, flags, not finite, first_d, last_d, first_h,
                last_h, first_w, last_w,
            )  # fmt: skip
            _store_tile(p, y, out, channels, depth, height, width)


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _accumulate_tile(p, sums, slab, dy, y_d, y_h, y_w, depth, height, width):
    """Add what a tile of the output gradient of a block contributes to sums [tap][lane]."""
    lanes = simd.lanes(slab)
    in_depth, in_height, in_width = (
        simd.at(p, p[DEPTH + TABLE]), simd.at(p, p[HEIGHT + TABLE]), simd.at(p, p[WIDTH + TABLE])
    )  # fmt: skip
    pieces, groups = simd.offset(in_width, in_width[PIECES]), simd.offset(in_height, in_height[PIECES])
    tap_step = in_height[TAP_STEP] * p[ROW_PITCH]
    for d in range(depth):
        for a in range(p[TAPS] // p[TAPS_HW]):
            plane = simd.offset(slab, (d * p[DEPTH + STRIDE] + a * in_depth[TAP_STEP]) * p[PLANE_PITCH])
            tap = 0
            for group in range(groups[0]):
                for piece in range(pieces[BLOCKS]):
                    e = piece * pieces[BLOCK_TAPS]
                    simd.call_accumulate_pixels(
                        pieces[FUNCTION], groups[1 + group],
                        simd.offset(sums, (a * p[TAPS_HW] + tap * p[TAPS_W] + e) * lanes), p[TAPS_W] * lanes,
                        simd.offset(plane, tap * tap_step + e * in_width[TAP_STEP] * lanes),
                        p[HEIGHT + STRIDE] * p[ROW_PITCH], tap_step, p[WIDTH + STRIDE] * lanes,
                        simd.offset(dy, d * y_d), y_h, y_w, height, width,
                    )  # fmt: skip
                tap += groups[1 + group]


@tasks.Body
def _weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile, batch) of a range of blocks."""
    lanes = simd.lanes(real)
    slab = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    out = simd.offset(slab, p[SLAB_SIZE])
    sums = simd.offset(out, p[OUT_SIZE])
    part, split = task % p[UNIT_TASKS], task // p[UNIT_TASKS]
    blocks = (p[CHANNELS] + lanes - 1) // lanes
    zeroed = -1  # the tile whose border is in the slab
    for block in range(part * blocks // p[UNIT_TASKS], (part + 1) * blocks // p[UNIT_TASKS]):
        first = block * lanes
        channels = min(lanes, p[CHANNELS] - first)
        simd.fill_zero(sums, p[TAPS] * lanes)
        for unit in range(split * p[UNITS] // p[SPLITS], (split + 1) * p[UNITS] // p[SPLITS]):
            tile, n = unit // p[BATCH], unit % p[BATCH]
            first_w = tile % p[WIDTH + TILES] * p[WIDTH + TILE]
            first_h = tile // p[WIDTH + TILES] % p[HEIGHT + TILES] * p[HEIGHT + TILE]
            first_d = tile // p[WIDTH + TILES] // p[HEIGHT + TILES] * p[DEPTH + TILE]
            depth = min(p[DEPTH + TILE], p[DEPTH + OUT] - first_d)
            height = min(p[HEIGHT + TILE], p[HEIGHT + OUT] - first_h)
            width = min(p[WIDTH + TILE], p[WIDTH + OUT] - first_w)
            if tile != zeroed:
                simd.fill_zero(slab, p[SLAB_SIZE])
                zeroed = tile
            _fill_slab(
                p, slab, simd.offset(simd.at(real, p[X]), n * p[X_N] + first * p[X_C]), channels,
                first_d * p[DEPTH + STRIDE], (depth - 1) * p[DEPTH + STRIDE] + p[DEPTH + REACH],
                first_h * p[HEIGHT + STRIDE], (height - 1) * p[HEIGHT + STRIDE] + p[HEIGHT + REACH],
                first_w * p[WIDTH + STRIDE], (width - 1) * p[WIDTH + STRIDE] + p[WIDTH + REACH],
            )  # fmt: skip
            dy = simd.offset(
                simd.at(real, p[Y]),
                n * p[Y_N] + first * p[Y_C] + first_d * p[Y_D] + first_h * p[Y_H] + first_w * p[Y_W],
            )
            if p[Y_PIXELS] and channels == lanes:
                _accumulate_tile(p, sums, slab, dy, p[Y_D], p[Y_H], p[Y_W], depth, height, width)
            else:
                _load_tile(p, out, dy, channels, depth, height, width)
                _accumulate_tile(p, sums, slab, out, p[OUT_PLANE], p[OUT_ROW], lanes, depth, height, width)
        simd.collect_planes(
            simd.offset(simd.at(real, p[W]), (split * p[CHANNELS] + first) * p[TAPS]), p[TAPS], sums, lanes, p[TAPS],
            channels,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _correlate_function(taps, stride, arguments, real):
    simd.correlate_pixels(taps, stride, arguments, real)


def _accumulate_function(taps, stride, arguments, real):
    simd.accumulate_pixels(taps, stride, arguments, real)


def _met(line: Line, phase: Phase, start: int, within: bool) -> np.ndarray:
    """For each element of a phase: where it meets its first tap, which tap that is, and how many there are.

    Of all taps, or of those within the input, but at least one, so that there is something to sum: zeros.
    """
    places = np.arange(phase.count, dtype=np.int64)[:, None] * line.stride + phase.shift
    places = places + np.arange(len(phase.taps), dtype=np.int64) * phase.tap_step
    inside = line.source[places] >= 0 if within else np.ones(places.shape, bool)
    first, count = inside.argmax(axis=1), np.maximum(inside.sum(axis=1), 1)
    return np.stack([places[np.arange(phase.count), first], start + first, count], axis=1)


def _taps_at_once(phase: Phase, stride: int) -> int:
    """Neighbouring taps of a row, out of simd.CHANNEL_TAPS, that a row can be cut into."""
    taps = [n for n, each in simd.CHANNEL_TAPS if each == stride and len(phase.taps) % n == 0]
    return max(taps, default=1) if phase.tap_step == 1 else 1


def _phase_table(line: Line, scale: tuple[int, int], pieces: Callable[[Phase], list[int]]) -> np.ndarray:
    """The table of the phases of a dimension; `scale` is what a place and a tap count in the tables of elements."""
    fields: list[int] = []
    rest: list[int] = []
    start, size = 0, len(line.phases) * PHASE_FIELDS
    for phase in line.phases:
        begin = []
        for part in (
            np.array(pieces(phase), np.int64),
            *(_met(line, phase, start, within) * np.array((*scale, 1)) for within in (True, False)),
        ):
            begin.append(size + len(rest))
            rest += map(int, part.ravel())
        fields += [phase.first, phase.count, phase.shift, start, phase.tap_step, *begin]
        start += len(phase.taps)
    return np.array(fields + rest, np.int64)


def _sizes(line: Line) -> list[int]:
    """Sizes of a tile in one dimension: as even as they can be, for every number of tiles."""
    return sorted({-(-line.out // n) for n in range(1, line.out + 1)})


def _row_pitch(width: Line, out: int) -> int:
    """Pixels from row to row of the slab: an odd number, so that a column of pixels is spread over the cache."""
    return width.length(out) | 1


def _tile(lines: Lines, lanes: int, budget: int, least_tiles: int) -> tuple[int, int, int]:
    """Elements of each phase in a tile: those with the least to copy for each, in at most `budget` elements."""
    depth, height, width = lines
    w = -(-width.out // -(-width.out // _MOST_COLUMNS))
    pitch, out_pitch = _row_pitch(width, w), w * width.step
    best = (math.inf, 0, 1, 1)
    for d in _sizes(depth):
        for h in _sizes(height):
            size = depth.length(d) * height.length(h) * pitch + d * depth.step * h * height.step * out_pitch
            if size * lanes > budget and d * h > 1:
                break
            tiles = -(-depth.out // d) * -(-height.out // h) * -(-width.out // w)
            copied = depth.length(d) * height.length(h) / (d * h)
            best = min(best, (max(copied, 1e9 * (tiles < least_tiles)), -d * h, d, h))
    return best[2], best[3], w


def _parameters(
    dtype: np.dtype, lines: Lines, least_tiles: int, function: Callable[..., None], tap_rows: bool,
    x: Strides, y: Strides,
) -> tuple[np.ndarray, list[np.ndarray], int]:  # fmt: skip
    """What both bodies need to know; the tables that hold it; the number of tiles of a plane."""
    t = simd.tile(dtype.itemsize * 8)
    lanes = t.lanes
    d, h, w = tile = _tile(lines, lanes, SLAB_BYTES // dtype.itemsize, least_tiles)
    depth, height, width = lines
    taps = [len(line.taps) for line in lines]
    pitch = _row_pitch(width, w) * lanes
    plane_pitch = height.length(h) * pitch
    full = [sum(phase.count for phase in line.phases) for line in lines]
    out_row = min(w * width.step, full[2]) * lanes
    out_plane = min(h * height.step, full[1]) * out_row

    def row_pieces(phase: Phase) -> list[int]:
        n = _taps_at_once(phase, width.stride)
        return [address_of(function, n, width.stride if n > 1 else 1, dtype), len(phase.taps) // n, n]

    def column_pieces(phase: Phase) -> list[int]:
        groups = cut(len(phase.taps), simd.gradient_tap_rows(t, _taps_at_once(width.phases[0], width.stride)))
        return [len(groups), *groups]

    tables = [
        _phase_table(depth, (1, 1), lambda _: []),
        _phase_table(height, (pitch, taps[2] * lanes), column_pieces if tap_rows else lambda _: []),
        _phase_table(width, (1, 1), row_pieces),
    ]
    # whole rows that follow one another in the array are one run of pixels
    whole_rows = 0 <= width.before <= width.length(w) - width.size
    x_rows = whole_rows and w == width.out and x[3] == width.size * x[4]
    y_rows = w == width.out and y[3] == full[2] * y[4]
    columns = min(width.size, width.length(w))
    rows = min(height.size, height.length(h)) if x_rows else 1
    x_places = (np.arange(rows)[:, None] * pitch + np.arange(columns) * lanes).astype(np.int64)
    y_places = np.arange(out_plane // lanes, dtype=np.int64) * lanes
    order = np.arange(math.prod(taps)).reshape(taps)
    for axis, line in enumerate(lines):
        order = order.take(np.argsort(line.taps), axis)
    w_places = np.ascontiguousarray(order, np.int64) * lanes

    parameters = np.zeros(END, np.int64)
    parameters[X_N:CHANNELS] = *x, *y, x[1] == 1, y[1] == 1, x_rows, y_rows
    parameters[TAPS:DEPTH] = (
        math.prod(taps), taps[1] * taps[2], taps[2], address(x_places), address(y_places), address(w_places),
        pitch, plane_pitch, depth.length(d) * plane_pitch, out_row, out_plane, min(d * depth.step, full[0]) * out_plane,
    )  # fmt: skip
    for first, line, n, whole, table in zip((DEPTH, HEIGHT, WIDTH), lines, tile, full, tables, strict=True):
        parameters[first : first + TABLE + 1] = (
            address(line.source), line.before, line.size, line.stride, line.step, line.out, whole, n,
            -(-line.out // n), line.reach, len(line.phases), address(table),
        )  # fmt: skip
    kept = [*tables, x_places, y_places, w_places, *(line.source for line in lines)]
    return parameters, kept, math.prod(-(-line.out // n) for line, n in zip(lines, tile, strict=True))


def plan_correlation(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, x: Strides, y: Strides, workers: int
) -> contraction.Plan:
    """Plan y[n, c] = sum over k of w[c, k] * x[n, c, u(k)], with strides of x and y in elements."""
    lanes = simd.tile(dtype.itemsize * 8).lanes
    units = batch * -(-channels // lanes)
    parameters, tables, tiles = _parameters(
        dtype, lines, -(-2 * workers // units), _correlate_function, False, x, y
    )
    unit_tasks = min(units, -(-8 * workers // tiles))
    parameters[CHANNELS:TAPS] = channels, batch, units, unit_tasks, 1
    scratch = parameters[SLAB_SIZE] + parameters[OUT_SIZE] + (parameters[TAPS] + 1) * lanes
    outputs = math.prod(sum(f.count * len(f.taps) for f in line.phases) for line in lines)
    return contraction.Plan(
        parameters, tuple(tables), tiles * unit_tasks, int(scratch) * dtype.itemsize, 2 * batch * channels * outputs
    )


def plan_weight_gradient(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, x: Strides, dy: Strides
) -> contraction.Plan:
    """Plan dw[c, k] = sum over n, p of dy[n, c, p] * x[n, c, u(p, k)], with strides of x and dy in elements."""
    lanes = simd.tile(dtype.itemsize * 8).lanes
    blocks = -(-channels // lanes)
    parameters, tables, tiles = _parameters(dtype, lines, 1, _accumulate_function, True, x, dy)
    units = batch * tiles
    splits = min(units, -(-_GRADIENT_TASKS // blocks))
    block_tasks = min(blocks, 4 * _GRADIENT_TASKS)
    parameters[CHANNELS:TAPS] = channels, batch, units, block_tasks, splits
    scratch = parameters[SLAB_SIZE] + parameters[OUT_SIZE] + parameters[TAPS] * lanes
    flops = 2 * batch * channels * math.prod(line.out * len(line.taps) for line in lines)
    return contraction.Plan(
        parameters, tuple(tables), block_tasks * splits, int(scratch) * dtype.itemsize, flops
    )


def correlate(
    plan: contraction.Plan, x: np.ndarray, w: np.ndarray, y: np.ndarray, bias: np.ndarray | None, relu: bool, add: bool
) -> None:
    """Run a plan on arrays of the strides it was made for, and weights (C, 1, KD, KH, KW)."""
    w = np.ascontiguousarray(w)
    parameters = plan.parameters.copy()
    parameters[X:X_N] = address(x), address(w), address(y), 0 if bias is None else address(bias), relu, add
    tasks.run(_correlate, x.dtype, plan.tasks, parameters, plan.scratch, plan.flops)


def weight_gradient(plan: contraction.Plan, x: np.ndarray, dy: np.ndarray, dw: np.ndarray, add: bool) -> None:
    """Run a plan on arrays of the strides it was made for; dw of any strides."""
    parts = np.empty((int(plan.parameters[SPLITS]), *dw.shape), dw.dtype)
    parameters = plan.parameters.copy()
    parameters[[X, Y, W]] = address(x), address(dy), address(parts)
    tasks.run(_weight_gradient, dw.dtype, plan.tasks, parameters, plan.scratch, plan.flops)
    store_sum(parts, dw, add)


# ---------------------------------------------------------------------------------------------------------------------
# Where it pays
# ---------------------------------------------------------------------------------------------------------------------

_MOST_COLUMNS = 256
# Both transposes of a vector cost as much as some eight multiply-adds. Long rows of channels-first arrays need none of
# them in `depthwise`, which is 1.2 to 1.8 times faster for filters of four taps in one dimension, and no faster for
# nine in two.
_FEW_TAPS = 4
_LONG_ROW = 128
_MOST_TAPS = 1024
_MOST_SLAB = 1024 * 1024  # bytes


def applies(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, y: Strides, weight_gradient: bool = False
) -> bool:
    """Is this a convolution for the functions of this module, with strides of input and output in elements?"""
    lanes = simd.tile(dtype.itemsize * 8).lanes
    if geometry.padding_mode != "zeros" or not geometry.groups == geometry.in_channels == geometry.out_channels:
        return False
    if not all((strides[1] == 1 or strides[4] == 1) for strides in (x, y)):
        return False
    if geometry.groups < (2 if x[1] == y[1] == 1 else lanes // 2):
        return False
    if any(not phase.taps for line in lines for phase in line.phases):
        return False
    width, taps = lines[2], math.prod(geometry.kernel_size)
    along_rows = x[4] == y[4] == width.stride == width.step == 1 and taps <= _FEW_TAPS and width.out >= _LONG_ROW
    if along_rows and not weight_gradient:
        return False
    slab = lines[0].length(1) * lines[1].length(1) * _row_pitch(width, min(width.out, _MOST_COLUMNS))
    return taps <= _MOST_TAPS and slab * lanes * dtype.itemsize <= _MOST_SLAB
