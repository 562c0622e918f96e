"""Depthwise convolutions with channels in the lanes of the vectors: every channel is a plane of its own, but all do the
same.

A *block* is as many channels as a vector has lanes. In channels-last arrays a pixel of it is a vector as it lies, and
is read in place, a few blocks side by side; the zeros beside the plane are a vector of their own that stands in for
what is not there. From channels-first arrays a tile of the planes is copied, through transposes in registers and with
its border, into the *slab* in the nearest caches, a strip of rows at a time; so it is wherever not every element meets
some input, or the filter is wider than what is unrolled, and in those weight gradients where that is faster. From there
on no stride, no row end and no plane of few pixels leaves a lane empty, and no two lanes ever meet. Results go directly
into channels-last arrays, and through the same transposes into channels-first ones.

Groups of n channels, as many in as out, are the sum of n such convolutions: the lanes of a group are turned around
once for each, so that each meets every channel of its group.

The forward pass and the input gradient are one body, with phases as in `depthwise`. Rows of taps that meet nothing but
the zeros around the plane are left out, but where a weight is infinite or nan: then the product is nan, and must be
seen. What is added up in which order depends on the filter alone, and in the weight gradient on the shape: never on
threads, and in the first two never on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..geometry import ConvGeometry
from . import simd, tasks
from .contraction import Strides, address
from .depthwise import AHEAD_BYTES, Line, Lines, Phase, Plan, address_of, cut
from .jit import helper as _jit

# Parameters of the bodies (int64, in this order), and
(
    X, W, Y, BIAS, RELU, ADD,
    X_N, X_C, X_D, X_H, X_W, Y_N, Y_C, Y_D, Y_H, Y_W, X_PIXELS, Y_PIXELS, X_ROWS, Y_ROWS,
    CHANNELS, BATCH, UNITS, UNIT_TASKS, SPLITS, GROUP, IN_PLACE, STRIP, AHEAD, Y_AHEAD, ZEROS, TAPS, TAPS_HW, TAPS_W,
    X_PLACES, Y_PLACES, W_PLACES, ROW_PITCH, PLANE_PITCH, SLAB_SIZE, OUT_ROW, OUT_PLANE, OUT_SIZE, DEPTH, HEIGHT,
    WIDTH, END,
) = (*range(tasks.FIRST, tasks.FIRST + 44), *(tasks.FIRST + 43 + 12 * n for n in range(1, 4)))  # fmt: skip
# those of a dimension, from DEPTH, HEIGHT and WIDTH on, and
SOURCE, BEFORE, SIZE, STRIDE, STEP, OUT, FULL, TILE, TILES, REACH, PHASES, TABLE = range(12)
# those of a phase, in the table of its dimension: FIRST to TAP_STEP as in `depthwise`; PIECES are where a table of the
# pieces that its taps are cut into begins, WITHIN and EVERY tables of three numbers for each element: where it meets
# its first tap, which one, and how many (of those within the input, and of all).
FIRST, COUNT, SHIFT, START, TAP_STEP, PIECES, WITHIN, EVERY, PHASE_FIELDS = range(9)
FUNCTION, BLOCKS, BLOCK_TAPS, BLOCK_WEIGHTS = range(4)

SLAB_BYTES = 256 * 1024  # with the output beside it and what streams through, a half of the L2 caches of today
# Blocks side by side that are read in place, at most: neighbouring cache lines of every pixel. With 2 to 4, layers that
# do not fit into the caches took 1.2 to 1.4 times as long; the others are within a tenth from 2 to 16 (AVX-512).
_GROUP = 9
# Pixels of output, at least, that are computed before more rows are copied into the slab: what was copied is still in
# the nearest cache. With 100 or 10000, 3 x 3 taps took 1.1 to 1.3 times as long.
_STRIP_PIXELS = 400
# Taps of a row with which the weight gradient reads x in place: each pixel once for every row of the filter, if it has
# several. Pixels of 240 to 1152 channels share so few sets of the nearest cache that 5 x 5 and 7 x 7 took 1.2 to 2.7
# times as long as from the slab, if planes were in a cache. 3 x 3 took a half or less of the time for 12 MB and more,
# and with stride 2; with stride 1, in a cache, up to 1.2 times as long (the columns at the edges are taken one by one).
_MOST_TAPS_IN_PLACE = 3
IN_PLACE_BYTES = 8 * 1024 * 1024  # of input and gradient, from where on that is done with stride 1
# In one dimension, columns of output from what is computed to what is asked for: a fifth faster than without. And, of a
# weight gradient, the columns of a tile and the most blocks of a group, so that memory is read in one piece, or in few.
# With 64 columns and 9 blocks, 512 and 1536 channels took 1.2 to 1.4 times as long.
_AHEAD_COLUMNS, _TILE_COLUMNS, _TILE_GROUP = 28, 16, 32
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads

_EVERYTHING = 1 << 40  # more pixels than any row has


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
    """The reverse of `load_tile`."""
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
    p, y, y_d, y_h, y_w, x, x_d, x_h, x_w, blocks, in_place, w, bias, zeros, flags, every, first_d, last_d, first_h,
    last_h, first_w, last_w,
):  # fmt: skip
    """A tile of the output of `blocks` blocks, which begins at y, from pixels whose padded coordinate 0 is at x."""
    lanes = simd.lanes(x)
    depths, heights, widths = simd.at(p, p[DEPTH + TABLE]), simd.at(p, p[HEIGHT + TABLE]), simd.at(p, p[WIDTH + TABLE])
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
                first = in_width[SHIFT] + first_w * p[WIDTH + STRIDE]
                step = p[WIDTH + STRIDE] if pieces[BLOCK_TAPS] == 1 else 1  # from a neighbour to the next
                low, high, ahead = 0, _EVERYTHING, 0
                if in_place:
                    ahead = p[AHEAD]
                    low = -((first - p[WIDTH + BEFORE]) // step)
                    high = -((first - p[WIDTH + BEFORE] - p[WIDTH + SIZE]) // step)
                for d in range(first_d, min(last_d, in_depth[COUNT])):
                    simd.call_correlate_pixels(
                        pieces[FUNCTION],
                        simd.offset(
                            y, (in_depth[FIRST] + (d - first_d) * p[DEPTH + STEP]) * y_d + in_height[FIRST] * y_h
                            + in_width[FIRST] * y_w,
                        ),
                        p[HEIGHT + STEP] * y_h, p[WIDTH + STEP] * y_w,
                        simd.offset(x, reach_d[3 * d] * x_d + first * x_w), x_h, step * x_w,
                        simd.offset(w, (reach_d[3 * d + 1] * p[TAPS_HW] + in_width[START]) * lanes),
                        (p[TAPS] + 1) * lanes, reach_h, blocks, rows, columns, low, high,
                        reach_d[3 * d + 2], in_depth[TAP_STEP] * x_d, p[TAPS_HW] * lanes,
                        in_height[TAP_STEP] * x_h, p[TAPS_W] * lanes,
                        pieces[BLOCKS], pieces[BLOCK_TAPS] * in_width[TAP_STEP] * x_w, pieces[BLOCK_WEIGHTS] * lanes,
                        ahead and ahead + (reach_d[3 * d + 2] - 1) * in_depth[TAP_STEP] * x_d, x_h, p[Y_AHEAD], zeros,
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


@_jit
def _place(p, unit):
    """Group of blocks, sample and first element in each dimension of a unit.

    Units that share a slab follow one another, since its border is written once; without one, those that share memory.
    """
    tiles = p[DEPTH + TILES] * p[HEIGHT + TILES] * p[WIDTH + TILES]
    if p[IN_PLACE]:
        tile, rest = unit % tiles, unit // tiles
        n, group = rest % p[BATCH], rest // p[BATCH]
    else:
        n, rest = unit % p[BATCH], unit // p[BATCH]
        groups = p[UNITS] // (p[BATCH] * tiles)
        group, tile = rest % groups, rest // groups
    first_w = tile % p[WIDTH + TILES] * p[WIDTH + TILE]
    first_h = tile // p[WIDTH + TILES] % p[HEIGHT + TILES] * p[HEIGHT + TILE]
    first_d = tile // p[WIDTH + TILES] // p[HEIGHT + TILES] * p[DEPTH + TILE]
    return group, n, tile, first_d, first_h, first_w


@_jit
def _correlate_in_place(
    p, x, y, blocks, w, bias, zeros, flags, first_d, last_d, first_h, last_h, first_w, last_w
):  # fmt: skip
    """A tile of `blocks` blocks of a sample, whose first channels are at x and y."""
    origin = p[DEPTH + BEFORE] * p[X_D] + p[HEIGHT + BEFORE] * p[X_H] + p[WIDTH + BEFORE] * p[X_W]
    out_d, out_h, out_w = first_d * p[DEPTH + STEP], first_h * p[HEIGHT + STEP], first_w * p[WIDTH + STEP]
    y = simd.offset(y, out_d * p[Y_D] + out_h * p[Y_H] + out_w * p[Y_W])
    _correlate_tile(
        p, y, p[Y_D], p[Y_H], p[Y_W], simd.offset(x, -origin), p[X_D], p[X_H], p[X_W], blocks, True,
        w, bias, zeros, flags, False, first_d, last_d, first_h, last_h, first_w, last_w,
    )  # fmt: skip


@_jit
def _correlate_block(
    p, slab, x, y, channels, w, bias, zeros, flags, finite, first_d, last_d, first_h, last_h, first_w, last_w
):  # fmt: skip
    """A tile of a block of a sample, whose first channel is at x and y, by way of the slab."""
    lanes = simd.lanes(slab)
    out = simd.offset(slab, p[SLAB_SIZE])
    depth = min((last_d - first_d) * p[DEPTH + STEP], p[DEPTH + FULL] - first_d * p[DEPTH + STEP])
    width = min((last_w - first_w) * p[WIDTH + STEP], p[WIDTH + FULL] - first_w * p[WIDTH + STEP])
    y = simd.offset(y, first_d * p[DEPTH + STEP] * p[Y_D] + first_w * p[WIDTH + STEP] * p[Y_W])
    box_d, box_h, box_w = first_d * p[DEPTH + STRIDE], first_h * p[HEIGHT + STRIDE], first_w * p[WIDTH + STRIDE]
    pixels = simd.offset(slab, -(box_d * p[PLANE_PITCH] + box_h * p[ROW_PITCH] + box_w * lanes))
    filled = box_h
    for h in range(first_h, last_h, p[STRIP]):
        end = min(h + p[STRIP], last_h)
        reached = (end - 1) * p[HEIGHT + STRIDE] + p[HEIGHT + REACH]
        _fill_slab(
            p, simd.offset(slab, (filled - box_h) * p[ROW_PITCH]), x, channels,
            box_d, (last_d - 1 - first_d) * p[DEPTH + STRIDE] + p[DEPTH + REACH], filled, reached - filled,
            box_w, (last_w - 1 - first_w) * p[WIDTH + STRIDE] + p[WIDTH + REACH],
        )  # fmt: skip
        filled = reached
        target = simd.offset(y, h * p[HEIGHT + STEP] * p[Y_H])
        if p[Y_PIXELS] and channels == lanes:
            _correlate_tile(
                p, target, p[Y_D], p[Y_H], p[Y_W], pixels, p[PLANE_PITCH], p[ROW_PITCH], lanes, 1, False, w, bias,
                zeros, flags, not finite, first_d, last_d, h, end, first_w, last_w,
            )  # fmt: skip
        else:
            height = min((end - h) * p[HEIGHT + STEP], p[HEIGHT + FULL] - h * p[HEIGHT + STEP])
            if p[ADD]:
                _load_tile(p, out, target, channels, depth, height, width)
            _correlate_tile(
                p, out, p[OUT_PLANE], p[OUT_ROW], lanes, pixels, p[PLANE_PITCH], p[ROW_PITCH], lanes, 1, False, w,
                bias, zeros, flags, not finite, first_d, last_d, h, end, first_w, last_w,
            )  # fmt: skip
            _store_tile(p, target, out, channels, depth, height, width)


@tasks.Body
def _correlate(task, worker, p, real):
    """Task = a range of units: (tile, group of blocks, sample)."""
    lanes = simd.lanes(real)
    slab = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    zeros = simd.offset(slab, p[SLAB_SIZE] + p[OUT_SIZE])
    weights = simd.offset(zeros, lanes)
    simd.fill_zero(zeros, lanes)
    flags = (simd.ADD if p[ADD] else 0) | (simd.RELU if p[RELU] else 0)
    loaded, zeroed, finite = -1, -1, True
    for unit in range(task * p[UNITS] // p[UNIT_TASKS], (task + 1) * p[UNITS] // p[UNIT_TASKS]):
        group, n, tile, first_d, first_h, first_w = _place(p, unit)
        last_d = min(first_d + p[DEPTH + TILE], p[DEPTH + OUT])
        last_h = min(first_h + p[HEIGHT + TILE], p[HEIGHT + OUT])
        last_w = min(first_w + p[WIDTH + TILE], p[WIDTH + OUT])
        first = group * p[GROUP] * lanes
        last = min(first + p[GROUP] * lanes, p[CHANNELS])
        if group != loaded:
            loaded, finite = group, True
            for c in range(first, last, lanes):
                w = simd.offset(weights, (c - first) * (p[TAPS] + 1))
                if not _load_weights(p, w, simd.offset(w, p[TAPS] * lanes), c, min(lanes, last - c)):
                    finite = False
        x = simd.offset(simd.at(real, p[X]), n * p[X_N])
        y = simd.offset(simd.at(real, p[Y]), n * p[Y_N])
        if p[IN_PLACE] and finite:
            blocks = (last - first) // lanes
            if blocks > 0:
                _correlate_in_place(
                    p, simd.offset(x, first), simd.offset(y, first), blocks, weights,
                    simd.offset(weights, p[TAPS] * lanes), zeros, flags, first_d, last_d, first_h, last_h, first_w,
                    last_w,
                )  # fmt: skip
            first += blocks * lanes
        if tile != zeroed and first < last:
            simd.fill_zero(slab, p[SLAB_SIZE])
            zeroed = tile
        for c in range(first, last, lanes):
            w = simd.offset(weights, (c - group * p[GROUP] * lanes) * (p[TAPS] + 1))
            _correlate_block(
                p, slab, simd.offset(x, c * p[X_C]), simd.offset(y, c * p[Y_C]), min(lanes, last - c), w,
                simd.offset(w, p[TAPS] * lanes), zeros, flags, finite, first_d, last_d, first_h, last_h, first_w,
                last_w,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _accumulate_tile(
    p, sums, x, x_d, x_h, x_w, dy, y_d, y_h, y_w, blocks, in_place, zeros, first_d, first_h, first_w, depth, height,
    width, x_ahead, dy_ahead,
):  # fmt: skip
    """Add what a tile of the output gradient of `blocks` blocks contributes to sums [block][tap][lane].

    What the first tap of its first element meets is at x. What comes next is x_ahead and dy_ahead further on.
    """
    lanes = simd.lanes(x)
    in_depth, in_height, in_width = (
        simd.at(p, p[DEPTH + TABLE]), simd.at(p, p[HEIGHT + TABLE]), simd.at(p, p[WIDTH + TABLE])
    )  # fmt: skip
    source_d = simd.at(p, p[DEPTH + SOURCE])
    pieces, groups = simd.offset(in_width, in_width[PIECES]), simd.offset(in_height, in_height[PIECES])
    step = p[WIDTH + STRIDE] if pieces[BLOCK_TAPS] == 1 else 1  # from a neighbour to the next
    low, high, first_row, rows = 0, _EVERYTHING, 0, _EVERYTHING
    if in_place:
        before = p[WIDTH + BEFORE] - first_w * p[WIDTH + STRIDE]
        low, high = -(-before // step), -(-(before + p[WIDTH + SIZE]) // step)
        first_row = first_h * p[HEIGHT + STRIDE] - p[HEIGHT + BEFORE]
    for d in range(depth):
        for a in range(p[TAPS] // p[TAPS_HW]):
            at_d = d * p[DEPTH + STRIDE] + a * in_depth[TAP_STEP]
            if in_place:
                rows = p[HEIGHT + SIZE] if source_d[first_d * p[DEPTH + STRIDE] + at_d] >= 0 else 0
            tap = 0
            for group in range(groups[0]):
                function, taps = groups[1 + 2 * group], groups[2 + 2 * group]
                for piece in range(pieces[BLOCKS]):
                    e = piece * pieces[BLOCK_TAPS]
                    simd.call_accumulate_pixels(
                        function,
                        simd.offset(sums, (a * p[TAPS_HW] + tap * p[TAPS_W] + piece * pieces[BLOCK_WEIGHTS]) * lanes),
                        p[TAPS_W] * lanes, p[TAPS] * lanes,
                        simd.offset(x, at_d * x_d + tap * in_height[TAP_STEP] * x_h + e * in_width[TAP_STEP] * x_w),
                        p[HEIGHT + STRIDE] * x_h, in_height[TAP_STEP] * x_h, step * x_w,
                        simd.offset(dy, d * y_d), y_h, y_w, blocks, height, width, low, high,
                        first_row + tap * in_height[TAP_STEP], p[HEIGHT + STRIDE], in_height[TAP_STEP], rows,
                        x_ahead, dy_ahead, zeros,
                    )  # fmt: skip
                tap += taps


@tasks.Body
def _weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile, batch) of a range of groups of blocks."""
    lanes = simd.lanes(real)
    slab = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    out = simd.offset(slab, p[SLAB_SIZE])
    zeros = simd.offset(out, p[OUT_SIZE])
    sums = simd.offset(zeros, p[ZEROS])
    simd.fill_zero(zeros, p[ZEROS])
    part, split = task % p[UNIT_TASKS], task // p[UNIT_TASKS]
    size = p[GROUP] * lanes
    groups = (p[CHANNELS] + size - 1) // size
    zeroed = -1  # the tile whose border is in the slab
    for group in range(part * groups // p[UNIT_TASKS], (part + 1) * groups // p[UNIT_TASKS]):
        first = group * size
        channels = min(size, p[CHANNELS] - first)
        blocks = channels // lanes if p[IN_PLACE] else 0
        simd.fill_zero(sums, p[GROUP] * p[TAPS] * lanes)
        for unit in range(split * p[UNITS] // p[SPLITS], (split + 1) * p[UNITS] // p[SPLITS]):
            _, n, tile, first_d, first_h, first_w = _place(p, unit)
            depth = min(p[DEPTH + TILE], p[DEPTH + OUT] - first_d)
            height = min(p[HEIGHT + TILE], p[HEIGHT + OUT] - first_h)
            width = min(p[WIDTH + TILE], p[WIDTH + OUT] - first_w)
            box_d, box_h, box_w = first_d * p[DEPTH + STRIDE], first_h * p[HEIGHT + STRIDE], first_w * p[WIDTH + STRIDE]
            x = simd.offset(simd.at(real, p[X]), n * p[X_N] + first * p[X_C])
            dy = simd.offset(
                simd.at(real, p[Y]),
                n * p[Y_N] + first * p[Y_C] + first_d * p[Y_D] + first_h * p[Y_H] + first_w * p[Y_W],
            )
            if blocks > 0:
                box = simd.offset(
                    x, (box_d - p[DEPTH + BEFORE]) * p[X_D] + (box_h - p[HEIGHT + BEFORE]) * p[X_H]
                    + (box_w - p[WIDTH + BEFORE]) * p[X_W],
                )  # fmt: skip
                x_ahead, dy_ahead = 0, 0
                if p[AHEAD]:
                    _, after, _, d, h, w = _place(p, unit + 1)
                    after, d, h, w = after - n, d - first_d, h - first_h, w - first_w
                    dy_ahead = after * p[Y_N] + d * p[Y_D] + h * p[Y_H] + w * p[Y_W]
                    x_ahead = (
                        after * p[X_N] + d * p[DEPTH + STRIDE] * p[X_D] + h * p[HEIGHT + STRIDE] * p[X_H]
                        + w * p[WIDTH + STRIDE] * p[X_W]
                    )  # fmt: skip
                _accumulate_tile(
                    p, sums, box, p[X_D], p[X_H], p[X_W], dy, p[Y_D], p[Y_H], p[Y_W], blocks, True, zeros, first_d,
                    first_h, first_w, depth, height, width, x_ahead, dy_ahead,
                )  # fmt: skip
            c = blocks * lanes
            if c == channels:
                continue
            if tile != zeroed:
                simd.fill_zero(slab, p[SLAB_SIZE])
                zeroed = tile
            _fill_slab(
                p, slab, simd.offset(x, c * p[X_C]), channels - c,
                box_d, (depth - 1) * p[DEPTH + STRIDE] + p[DEPTH + REACH],
                box_h, (height - 1) * p[HEIGHT + STRIDE] + p[HEIGHT + REACH],
                box_w, (width - 1) * p[WIDTH + STRIDE] + p[WIDTH + REACH],
            )  # fmt: skip
            dy = simd.offset(dy, c * p[Y_C])
            y_d, y_h, y_w = p[Y_D], p[Y_H], p[Y_W]
            if not p[Y_PIXELS] or channels - c < lanes:
                _load_tile(p, out, dy, channels - c, depth, height, width)
                dy, y_d, y_h, y_w = out, p[OUT_PLANE], p[OUT_ROW], lanes
            _accumulate_tile(
                p, simd.offset(sums, c * p[TAPS]), slab, p[PLANE_PITCH], p[ROW_PITCH], lanes, dy, y_d, y_h, y_w, 1,
                False, zeros, first_d, first_h, first_w, depth, height, width, 0, 0,
            )  # fmt: skip
        for c in range(0, channels, lanes):
            simd.collect_planes(
                simd.offset(simd.at(real, p[W]), (split * p[CHANNELS] + first + c) * p[TAPS]), p[TAPS],
                simd.offset(sums, c * p[TAPS]), lanes, p[TAPS], min(lanes, channels - c),
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _correlate_function(taps, stride, arguments, real):
    simd.correlate_pixels(taps, stride, arguments, real)


def _accumulate_function(taps, kind, arguments, real):
    simd.accumulate_pixels(taps, kind, arguments, real)


def _places(line: Line, phase: Phase) -> np.ndarray:
    """The padded coordinates (element, tap) where each element of a phase meets each tap."""
    elements = np.arange(phase.count, dtype=np.int64) * line.stride + phase.shift
    return elements[:, None] + np.arange(len(phase.taps), dtype=np.int64) * phase.tap_step


def _met(line: Line, phase: Phase, start: int, within: bool) -> np.ndarray:
    """For each element of a phase: where it meets its first tap, which tap that is, and how many there are.

    Of all taps, or of those within the input, but at least one, so that there is something to sum: zeros.
    """
    places = _places(line, phase)
    inside = line.source[places] >= 0 if within else np.ones(places.shape, bool)
    first, count = inside.argmax(axis=1), np.maximum(inside.sum(axis=1), 1)
    return np.stack([places[np.arange(phase.count), first], start + first, count], axis=1)


def _taps_at_once(phase: Phase, stride: int) -> int:
    """Neighbouring taps of a row, out of simd.CHANNEL_TAPS, that a row can be cut into."""
    taps = [n for n, each in simd.CHANNEL_TAPS if each == stride and len(phase.taps) % n == 0]
    return max(taps, default=1) if phase.tap_step == 1 else 1


def _phase_table(line: Line, pieces: Callable[[Phase], list[int]], turns: int = 1) -> np.ndarray:
    """The table of the phases of a dimension, with so many weights for each tap."""
    fields: list[int] = []
    rest: list[int] = []
    start, size = 0, len(line.phases) * PHASE_FIELDS
    for phase in line.phases:
        begin = []
        for part in (
            np.array(pieces(phase), np.int64),
            *(_met(line, phase, start, within) for within in (True, False)),
        ):
            begin.append(size + len(rest))
            rest += map(int, part.ravel())
        fields += [phase.first, phase.count, phase.shift, start * turns, phase.tap_step, *begin]
        start += len(phase.taps)
    return np.array(fields + rest, np.int64)


def _sizes(line: Line) -> list[int]:
    """Sizes of a tile in one dimension: as even as they can be, for every number of tiles."""
    return sorted({-(-line.out // n) for n in range(1, line.out + 1)})


def _row_pitch(width: Line, out: int) -> int:
    """Pixels from row to row of the slab: an odd number, so that a column of pixels is spread over the cache."""
    return width.length(out) | 1


def _tile(lines: Lines, lanes: int, budget: int, least_tiles: int, most_columns: int) -> tuple[int, int, int]:
    """Elements of each phase in a tile: those with the least to copy for each, in at most `budget` elements."""
    depth, height, width = lines
    w = -(-width.out // -(-width.out // most_columns))
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
    dtype: np.dtype, lines: Lines, least_tiles: int, gradient: bool, in_place: bool, x: Strides, y: Strides,
    group: int, turns: int = 1,
) -> tuple[np.ndarray, list[np.ndarray], int]:  # fmt: skip
    """What both bodies need to know; the tables that hold it; the number of tiles of a plane."""
    t = simd.tile(dtype.itemsize * 8)
    lanes = t.lanes
    depth, height, width = lines
    most_columns = _TILE_COLUMNS if gradient and in_place and height.out == 1 else _MOST_COLUMNS
    d, h, w = tile = _tile(lines, lanes * group, SLAB_BYTES // dtype.itemsize, least_tiles, most_columns)
    taps = [len(line.taps) for line in lines]
    pitch = _row_pitch(width, w) * lanes
    plane_pitch = height.length(h) * pitch
    full = [sum(phase.count for phase in line.phases) for line in lines]
    out_row = min(w * width.step, full[2]) * lanes
    out_plane = min(h * height.step, full[1]) * out_row

    def row_pieces(phase: Phase) -> list[int]:
        n = _taps_at_once(phase, width.stride)
        kind = simd.turning_kind(width.stride if n > 1 else 1, turns)
        function = 0 if gradient else address_of(_correlate_function, n, kind, dtype)
        return [function, len(phase.taps) // n, n, n * turns]

    def column_pieces(phase: Phase) -> list[int]:
        """The rows of the filter that the weight gradient takes at once, each with a function of its own."""
        n = _taps_at_once(width.phases[0], width.stride)
        groups = cut(len(phase.taps), simd.gradient_tap_rows(t, n * turns)) if gradient else ()
        table = [len(groups)]
        for rows in groups:
            kind = simd.pixel_kind(width.stride if n > 1 else 1, turns, rows, in_place)
            table += address_of(_accumulate_function, n, kind, dtype), rows
        return table

    tables = [
        _phase_table(depth, lambda _: []),
        _phase_table(height, column_pieces),
        _phase_table(width, row_pieces, turns),
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
    w_places = (order[..., None] * turns + np.arange(turns)).astype(np.int64).ravel() * lanes

    parameters = np.zeros(END, np.int64)
    parameters[X_N:CHANNELS] = *x, *y, x[1] == 1, y[1] == 1, x_rows, y_rows
    parameters[TAPS:DEPTH] = (
        *(turns * math.prod(taps[a:]) for a in range(3)), address(x_places), address(y_places), address(w_places),
        pitch, plane_pitch, depth.length(d) * plane_pitch, out_row, out_plane, min(d * depth.step, full[0]) * out_plane,
    )  # fmt: skip
    for first, line, n, whole, table in zip((DEPTH, HEIGHT, WIDTH), lines, tile, full, tables, strict=True):
        parameters[first : first + TABLE + 1] = (
            address(line.source), line.before, line.size, line.stride, line.step, line.out, whole, n,
            -(-line.out // n), line.reach, len(line.phases), address(table),
        )  # fmt: skip
    kept = [*tables, x_places, y_places, w_places, *(line.source for line in lines)]
    return parameters, kept, math.prod(-(-line.out // n) for line, n in zip(lines, tile, strict=True))


def _can_stay_in_place(lines: Lines, x: Strides, y: Strides) -> bool:
    """Can pixels be read where they are? Then every output meets some of them in each dimension."""
    if not x[1] == y[1] == 1:
        return False
    for line in lines[:2]:
        if not all((line.source[_places(line, phase)] >= 0).any(axis=1).all() for phase in line.phases):
            return False
    width = lines[2]
    for phase in width.phases:
        taps = len(phase.taps)
        if _taps_at_once(phase, width.stride) != taps:
            return False
        step, stride = (width.stride, 1) if taps == 1 else (1, width.stride)
        left = -(-(width.before - phase.shift) // step)
        right = (phase.count - 1) * stride + taps + ((phase.shift - width.before - width.size) // step)
        if max(left, right) >= taps:
            return False
    return True


def plan_correlation(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, x: Strides, y: Strides, workers: int, turns: int = 1,
    order: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray,
) -> Plan:  # fmt: skip
    """Plan y[n, c] = sum over k of w[c, k] * x[n, c, u(k)], with strides of x and y in elements.

    With `turns`, groups have so many channels, and the sum is also over t < turns: of w[c, k, t] times the pixels of
    the channel t after c, around the end of its group. `order` makes these weights of those that are given.
    """
    lanes = simd.tile(dtype.itemsize * 8).lanes
    blocks = -(-channels // lanes)
    in_place = _can_stay_in_place(lines, x, y)
    group = -(-blocks // -(-blocks // _GROUP)) if in_place else 1
    groups = -(-blocks // group)
    parameters, tables, tiles = _parameters(
        dtype, lines, -(-2 * workers // (batch * groups)), False, in_place, x, y, group, turns
    )
    units = batch * groups * tiles
    pixels = (line.size for line in lines), (sum(phase.count for phase in line.phases) for line in lines)
    size = batch * channels * sum(map(math.prod, pixels)) * dtype.itemsize
    _, height, width = lines
    ahead, y_ahead = _AHEAD_COLUMNS * width.stride * x[4], _AHEAD_COLUMNS * width.step * y[4]
    if height.out > 1:  # the rows that the next row of output is the first to meet
        ahead = max(1 + (len(phase.taps) - 1) * phase.tap_step for phase in height.phases) * x[3]
        y_ahead = height.step * y[3]
    strip = -(-_STRIP_PIXELS // int(parameters[OUT_ROW] // lanes * lines[1].step))
    parameters[CHANNELS:TAPS] = (
        channels, batch, units, min(units, 8 * workers), 1, group, in_place, strip,
        ahead if size > AHEAD_BYTES else 0, y_ahead, lanes,
    )  # fmt: skip
    unit_tasks = int(parameters[UNIT_TASKS])
    scratch = parameters[SLAB_SIZE] + parameters[OUT_SIZE] + (1 + group * (parameters[TAPS] + 1)) * lanes
    outputs = math.prod(sum(f.count * len(f.taps) for f in line.phases) for line in lines)
    return Plan(
        _correlate, parameters, tuple(tables), unit_tasks, int(scratch) * dtype.itemsize,
        2 * batch * channels * outputs * turns, order,
    )  # fmt: skip


def plan_groups(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, y: Strides, forward: bool, workers: int
) -> Plan:
    """Plan the forward pass or the input gradient of groups as `applies_to_groups` says, from strides in elements."""
    per_group = geometry.in_channels_per_group
    taps = math.prod(geometry.kernel_size)
    channel, tap, turn = np.ogrid[: geometry.in_channels, :taps, :per_group]
    within = channel % per_group
    other = (within + turn) % per_group
    if forward:
        places = (channel * per_group + other) * taps + tap
    else:  # rows are input channels, and the sum is over output channels
        places = ((channel - within + other) * per_group + within) * taps + tap
    return plan_correlation(
        dtype, geometry.batch, geometry.in_channels, lines, x, y, workers, per_group, lambda w: np.take(w, places)
    )


def plan_weight_gradient(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, x: Strides, dy: Strides, turns: int = 1,
    order: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray,
) -> Plan:  # fmt: skip
    """Plan dw[c, k] = sum over n, p of dy[n, c, p] * x[n, c, u(p, k)], with strides of x and dy in elements.

    With `turns`, it is dw[c, k, t], as for `plan_correlation`, of which `order` makes what is asked for.
    """
    lanes = simd.tile(dtype.itemsize * 8).lanes
    blocks = -(-channels // lanes)
    _, height, width = lines
    columns = -(-width.out // -(-width.out // _MOST_COLUMNS))
    zeros = lanes
    if any((line.source < 0).any() for line in lines[:2]):  # a whole row of them
        zeros += width.length(columns) * x[4]
    size = batch * channels * (math.prod(line.size for line in lines) + math.prod(line.out for line in lines))
    large = size * dtype.itemsize > IN_PLACE_BYTES
    in_place = _can_stay_in_place(lines, x, dy) and lanes <= zeros <= SLAB_BYTES // dtype.itemsize
    in_place = in_place and (len(width.taps) <= _MOST_TAPS_IN_PLACE or len(height.taps) == 1)
    in_place = in_place and (large or width.stride > 1)
    most = _TILE_GROUP if height.out == 1 else _GROUP
    group = -(-blocks // -(-blocks // most)) if in_place else 1
    groups = -(-blocks // group)
    parameters, tables, tiles = _parameters(dtype, lines, 1, True, in_place, x, dy, group, turns)
    units = batch * tiles
    splits = min(units, -(-_GRADIENT_TASKS // groups))
    group_tasks = min(groups, 4 * _GRADIENT_TASKS)
    parameters[CHANNELS:TAPS] = (
        channels, batch, units, group_tasks, splits, group, in_place, 1, large, 0, zeros if in_place else lanes
    )  # fmt: skip
    scratch = sum(parameters[[SLAB_SIZE, OUT_SIZE, ZEROS]]) + group * parameters[TAPS] * lanes
    flops = 2 * batch * channels * turns * math.prod(line.out * len(line.taps) for line in lines)
    return Plan(
        _weight_gradient, parameters, tuple(tables), group_tasks * splits, int(scratch) * dtype.itemsize, flops, order,
        splits,
    )  # fmt: skip


def plan_weight_gradient_of_groups(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, dy: Strides
) -> Plan:
    """Plan the weight gradient of groups as `applies_to_groups` says, from strides in elements."""
    per_group = geometry.in_channels_per_group
    taps = math.prod(geometry.kernel_size)
    channel, other, tap = np.ogrid[: geometry.out_channels, :per_group, :taps]
    places = (channel * taps + tap) * per_group + (other - channel) % per_group
    return plan_weight_gradient(
        dtype, geometry.batch, geometry.in_channels, lines, x, dy, per_group, lambda total: np.take(total, places)
    )


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
# Channels of a group whose convolution is a sum of depthwise ones. With 2 and 4 that takes 0.1 to 0.4 of the time of
# the contraction, with 8 0.5 to 0.7; with 16, for whose weights there are no registers, 1.5.
_MOST_TURNS = 8
_MOST_SUMS = 24  # of a row of the filter, that its weight gradient has in registers


def applies_to_groups(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, y: Strides, weight_gradient: bool = False
) -> bool:
    """Are these groups of few channels, as many in as out, that are neighbours in memory and fill vectors together?

    Each of them is the sum of as many depthwise convolutions as a group has channels.
    """
    t = simd.tile(dtype.itemsize * 8)
    per_group = geometry.in_channels_per_group
    return (
        1 < per_group == geometry.out_channels_per_group <= min(_MOST_TURNS, t.lanes)
        and t.rows > 8  # registers for the weights of all taps and turns
        and t.lanes % per_group == 0
        and x[1] == y[1] == 1
        and applies(replace(geometry, groups=geometry.in_channels), dtype, lines, x, y, weight_gradient)
        and not (weight_gradient and per_group * _taps_at_once(lines[2].phases[0], lines[2].stride) > _MOST_SUMS)
    )


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
    if math.prod(len(line.taps) for line in lines) != taps:  # filters are read whole; an input smaller than the stride
        return False  # does not meet every tap
    along_rows = x[4] == y[4] == width.stride == width.step == 1 and taps <= _FEW_TAPS and width.out >= _LONG_ROW
    if along_rows and not weight_gradient:
        return False
    slab = lines[0].length(1) * lines[1].length(1) * _row_pitch(width, min(width.out, _MOST_COLUMNS))
    return taps <= _MOST_TAPS and slab * lanes * dtype.itemsize <= _MOST_SLAB
