"""Depthwise convolutions of planes that are read and written where they lie, with a row along the vectors.

For channels-first arrays, on machines whose vector loads and stores can leave lanes out (AVX-512): the lanes of a mask
stand for what lies beside a row, and rows above and below the plane are left out, so that nothing is copied, neither
with its border as in `depthwise` nor through transposes as in `depthwise_channels`. A row of output is cut into
*pieces* of one or two vectors, and `simd.correlate_planes` computes several rows of a piece at a time, of many planes
in one call.

Taps that meet nothing but the zeros around the plane would make a nan of a weight that is infinite or nan, and that
must be seen: with such weights rows are read from a copy that has its zeros. What is added up in which order depends
on the filter alone: the bits depend neither on threads nor on the batch.
"""

from __future__ import annotations

import math

import numpy as np

from . import simd, tasks
from .contraction import Strides, address
from .depthwise import PREFETCH_BYTES, Line, Lines, Plan, address_of
from .jit import helper as _jit
from .vector import gemm, move
from .vector.depthwise_rows import sum_lanes
from .vector.memory import at, fill_zero, offset
from .vector.tile import lanes as lanes_of
from .vector.tile import tile as tile_for

# Parameters of the body (int64, in this order).
(
    X, W, Y, BIAS, RELU, ADD,
    X_N, X_C, X_D, X_H, Y_N, Y_O, Y_D, Y_H, W_FIRST, W_D, W_H, W_W, TAPS,
    CHANNELS, ROWS, AT_ONCE, CHUNKS, OUT_D, OUT_H, STEP, Y_ROWS, TILES, UNITS, UNIT_TASKS, PIECES, PIECE_SIZE, TABLE,
    CONSTANTS, BATCH, SPLITS, CHECK, WIDTH, HEIGHT, STRIDE_H, FIRST_H, TAPS_H, DEPTH, STRIDE_D, FIRST_D, TAPS_D,
    TAP_STEP, AHEAD, END,
) = range(tasks.FIRST, tasks.FIRST + 49)  # fmt: skip
# The table of the pieces: for each of them, and then its masks (see `simd.call_correlate_planes`)
FUNCTION, COLUMN, FIRST_COLUMN, MASKS = range(4)

# Input of one call: many planes share the work that is done for each call, and their rows are still in the nearest
# caches when the next piece of them is computed. From 16 to 64 KiB within a tenth of one another.
_CALL_BYTES = 32 * 1024
_SUMS_BYTES = 16 * 1024  # sums of a weight gradient that are filled by one call
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


@_jit
def _correlate_rows(
    p, y, x, x_plane, x_depth, x_row, first_h, height, depths, w, planes, rows, y_rows, bias, ahead, x_ahead, y_ahead
):  # fmt: skip
    """`rows` rows of `planes` planes of output, from planes of `height` rows of input, of which the first tap of the
    first row of output meets row first_h. What is at x_ahead and y_ahead, which are null if not `ahead`, comes next."""
    table = at(p, p[TABLE])
    bias_step, flags = p[ROWS] if p[BIAS] else 0, gemm.RELU if p[RELU] else 0
    for k in range(p[PIECES]):
        piece = offset(table, k * p[PIECE_SIZE])
        done = ahead * planes * rows * piece[COLUMN]
        simd.call_correlate_planes(
            piece[FUNCTION], offset(piece, MASKS), offset(y, piece[COLUMN]), p[ROWS] * p[Y_O], p[Y_H],
            offset(x, piece[FIRST_COLUMN]), x_plane, x_depth, x_row, first_h, height, depths,
            w, p[ROWS] * p[TAPS], p[W_D], p[W_H], p[W_W], planes, rows, y_rows, bias, bias_step,
            offset(x_ahead, done // p[STEP]), offset(y_ahead, done * p[STEP]), flags,
        )  # fmt: skip


@_jit
def _place(p, unit):
    """Where a unit is: sample, first channel, plane of the depth, first row and the row after the last."""
    tile, rest = unit % p[TILES], unit // p[TILES]
    d, rest = rest % p[OUT_D], rest // p[OUT_D]
    h, end = tile * p[OUT_H] // p[TILES], (tile + 1) * p[OUT_H] // p[TILES]
    return rest // p[CHUNKS], rest % p[CHUNKS] * p[AT_ONCE], d, h, end


@_jit
def _all_finite(values, count):
    lanes = lanes_of(values)
    vectors = count // lanes
    if vectors > 0 and move.count_not_finite(values, vectors) != 0:
        return False
    total = values[0] * 0
    for k in range(vectors * lanes, count):
        total += values[k] * 0  # 0 * inf and 0 * nan are nan, and stay
    return total == 0


@_jit
def _copy_rows(p, target, x, first_d, first_h, rows):
    """All rows [tap of the depth][row] that a tile of a plane of output meets, with zeros where there are none."""
    fill_zero(target, p[TAPS_D] * rows * p[WIDTH])
    low, high = max(first_h, 0), min(first_h + rows, p[HEIGHT])
    for a in range(p[TAPS_D]):
        d = first_d + a * p[TAP_STEP]
        if 0 <= d < p[DEPTH] and low < high:
            move.copy_block(
                offset(target, (a * rows + low - first_h) * p[WIDTH]), p[WIDTH],
                offset(x, d * p[X_D] + low * p[X_H]), p[X_H], high - low, p[WIDTH],
            )  # fmt: skip


@tasks.Body
def _correlate(task, worker, p, real):
    """Task = a range of units: (sample, some channels, plane of the depth, tile of rows)."""
    scratch = at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    last = (task + 1) * p[UNITS] // p[UNIT_TASKS]
    for unit in range(task * p[UNITS] // p[UNIT_TASKS], last):
        ahead, x_ahead, y_ahead = 0, at(real, 0), at(real, 0)
        if p[AHEAD] and unit + 1 < last:
            n, channel, d, h, _ = _place(p, unit + 1)
            ahead = 1
            x_ahead = offset(
                at(real, p[X]), n * p[X_N] + channel * p[X_C] + (d + p[TAPS_D] - 1) * p[X_D] + h * p[X_H]
            )
            y_ahead = offset(
                at(real, p[Y]), n * p[Y_N] + channel * p[Y_O] + d * p[Y_D] + h * p[STEP] * p[Y_H]
            )
        n, channel, d, h, end = _place(p, unit)
        channels, rows = min(p[AT_ONCE], p[CHANNELS] - channel), end - h
        y_rows = p[Y_ROWS] - h * p[STEP]
        weights = offset(at(real, p[W]), channel * p[ROWS] * p[TAPS])
        x = offset(at(real, p[X]), n * p[X_N] + channel * p[X_C])
        y = offset(
            at(real, p[Y]), n * p[Y_N] + channel * p[ROWS] * p[Y_O] + d * p[Y_D] + h * p[STEP] * p[Y_H]
        )
        first_h, first_d = h * p[STRIDE_H] + p[FIRST_H], d * p[STRIDE_D] + p[FIRST_D]
        low = max(-(first_d // p[TAP_STEP]), 0)  # taps of the depth from here on, and before `high`, meet a plane
        high = min((p[DEPTH] - 1 - first_d) // p[TAP_STEP] + 1, p[TAPS_D])
        finite = not p[CHECK] or _all_finite(weights, channels * p[ROWS] * p[TAPS])
        for i in range(p[ROWS]):
            w = offset(weights, i * p[TAPS] + p[W_FIRST])
            y_i = offset(y, i * p[Y_O])
            bias = at(real, p[CONSTANTS])
            if p[BIAS]:
                bias = offset(at(real, p[BIAS]), channel * p[ROWS] + i)
            if finite:
                _correlate_rows(
                    p, y_i, offset(x, (first_d + low * p[TAP_STEP]) * p[X_D]), p[X_C], p[TAP_STEP] * p[X_D],
                    p[X_H], first_h, p[HEIGHT], high - low, offset(w, low * p[W_D]), channels, rows, y_rows, bias,
                    ahead, x_ahead, y_ahead,
                )  # fmt: skip
                continue
            copied = (rows - 1) * p[STRIDE_H] + p[TAPS_H]
            for c in range(channels):
                _copy_rows(p, scratch, offset(x, c * p[X_C]), first_d, first_h, copied)
                _correlate_rows(
                    p, offset(y_i, c * p[ROWS] * p[Y_O]), scratch, 0, copied * p[WIDTH], p[WIDTH], 0, copied,
                    p[TAPS_D], offset(w, c * p[ROWS] * p[TAPS]), 1, rows, y_rows,
                    offset(bias, c * p[ROWS] if p[BIAS] else 0), 0, at(real, 0), at(real, 0),
                )  # fmt: skip


@_jit
def _accumulate_rows(p, sums, dy, x, zeros, first_h, planes, runs, rows, ahead, x_ahead, dy_ahead):
    """Add what `rows` rows of `runs` samples of `planes` planes of the output gradient contribute to `sums`. The first
    tap of the first row meets row first_h of x. What is at x_ahead and dy_ahead, null if not `ahead`, comes next."""
    lanes = lanes_of(sums)
    table = at(p, p[TABLE])
    size = p[ROWS] * p[TAPS]
    for i in range(p[ROWS]):
        for d in range(p[OUT_D]):
            for a in range(p[TAPS_D]):
                at_d = d * p[STRIDE_D] + p[FIRST_D] + a * p[TAP_STEP]
                within = 0 <= at_d < p[DEPTH]
                for k in range(p[PIECES]):
                    piece = offset(table, k * p[PIECE_SIZE])
                    column = piece[FIRST_COLUMN]
                    done = ahead * rows * piece[COLUMN]
                    simd.call_accumulate_planes(
                        piece[FUNCTION], offset(piece, MASKS),
                        offset(sums, (i * p[TAPS] + a * (p[TAPS] // p[TAPS_D])) * lanes), size * lanes,
                        offset(dy, i * p[Y_O] + d * p[Y_D] + piece[COLUMN]), p[ROWS] * p[Y_O], p[Y_N],
                        p[Y_H], offset(x, at_d * p[X_D] + column), p[X_C], p[X_N], p[X_H],
                        offset(zeros, column), first_h, p[HEIGHT] if within else 0, planes, runs, rows,
                        offset(x_ahead, done * p[STRIDE_H] * p[STRIDE_H]), offset(dy_ahead, done),
                    )  # fmt: skip


@tasks.Body
def _weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile of rows, sample) of a range of channels."""
    lanes = lanes_of(real)
    sums = at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    zeros = at(real, p[CONSTANTS])
    part, split = task % p[CHUNKS], task // p[CHUNKS]
    channel, end = part * p[CHANNELS] // p[CHUNKS], (part + 1) * p[CHANNELS] // p[CHUNKS]
    size = p[ROWS] * p[TAPS]
    while channel < end:
        channels = min(p[AT_ONCE], end - channel)
        fill_zero(sums, channels * size * lanes)
        unit, last = split * p[UNITS] // p[SPLITS], (split + 1) * p[UNITS] // p[SPLITS]
        while unit < last:
            tile, n = unit // p[BATCH], unit % p[BATCH]
            runs = min(p[BATCH] - n, last - unit)
            unit += runs
            h = tile * p[OUT_H] // p[TILES]
            rows, first_h = (tile + 1) * p[OUT_H] // p[TILES] - h, h * p[STRIDE_H] + p[FIRST_H]
            x = offset(at(real, p[X]), n * p[X_N] + channel * p[X_C])
            dy = offset(at(real, p[Y]), n * p[Y_N] + channel * p[ROWS] * p[Y_O] + h * p[Y_H])
            if not p[AHEAD]:
                _accumulate_rows(
                    p, sums, dy, x, zeros, first_h, channels, runs, rows, 0, at(real, 0), at(real, 0)
                )
                continue
            for c in range(channels):  # whole rows of a run, since these follow one another in memory
                for m in range(runs):
                    x_now, dy_now = offset(x, c * p[X_C] + m * p[X_N]), offset(dy, c * p[Y_O] + m * p[Y_N])
                    x_step, dy_step = p[X_N], p[Y_N]
                    if m + 1 == runs:
                        x_step, dy_step = p[X_C] - m * p[X_N], p[Y_O] - m * p[Y_N]
                    _accumulate_rows(
                        p, offset(sums, c * size * lanes), dy_now, x_now, zeros, first_h, 1, 1, rows, 1,
                        offset(x_now, first_h * p[X_H] + x_step), offset(dy_now, dy_step),
                    )  # fmt: skip
        sum_lanes(
            offset(at(real, p[W]), (split * p[CHANNELS] + channel) * size), sums, channels * size
        )
        channel += channels


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _correlate_function(taps, kind, arguments, real):
    simd.correlate_planes(taps, kind, arguments, real)


def _accumulate_function(taps, kind, arguments, real):
    simd.accumulate_planes(taps, kind, arguments, real)


def _spread_function(taps, kind, arguments, real):
    simd.spread_planes_by_two(taps, kind, arguments, real)


def _rows_at_once(rows: int) -> int:
    """Those of `simd.PLANE_ROWS`, no more than there are, with which the fewest rows are computed twice."""
    return min((most for most in simd.PLANE_ROWS if most <= rows), key=lambda most: -(-rows // most) * most)


def _lane_bits(low: int, high: int, lanes: int) -> int:
    """The bits of lanes low .. high, of those there are."""
    return sum(1 << lane for lane in range(max(low, 0), min(high, lanes)))


def _shapes(count: int, dtype: np.dtype, most: int) -> list[tuple[int, int, int]]:
    """(index in `simd.plane_shapes`, lanes, vectors) of the pieces, of `most` vectors, of a row of `count` elements."""
    shapes = [(n, *shape) for n, shape in enumerate(simd.plane_shapes(tile_for(dtype.itemsize * 8)))]
    shapes = [shape for shape in shapes if shape[2] <= most]
    pieces = []
    while count > 0:
        pieces.append(next((s for s in shapes if count <= s[1] * s[2]), shapes[-1]))
        count -= pieces[-1][1] * pieces[-1][2]
    return pieces


def _pieces(line: Line, dtype: np.dtype, rows: int | None) -> np.ndarray:
    """The table of the pieces of a row of output, for `rows` rows at a time; None is the weight gradient."""
    (phase,) = line.phases
    taps, first = len(phase.taps), 0
    table = []
    for shape, lanes, vectors in _shapes(phase.count, dtype, 1 if rows is None else 2):
        column = first * line.stride + phase.shift - line.before
        kind = simd.plane_kind(line.stride, shape, rows or 0)
        function = address_of(_accumulate_function if rows is None else _correlate_function, taps, kind, dtype)
        stored = [_lane_bits(0, phase.count - first - n * lanes, lanes) for n in range(vectors)]
        places = [column + at for at in simd.plane_loads(lanes, vectors, taps, line.stride)]
        loaded = [_lane_bits(-place, line.size - place, lanes) for place in places]
        if rows is None and line.stride == 1:  # zero times what a lane that is not there would meet may be nan
            loaded = [bits & stored[0] for bits in loaded]
        table.append([function, first, column, *stored, *loaded])
        first += lanes * vectors
    size = max(map(len, table))
    return np.array([piece + [0] * (size - len(piece)) for piece in table], np.int64)


def _parity(line: Line) -> int:
    """Of the taps that meet even elements of an input gradient with stride 2."""
    return line.phases[0].taps[0] % 2


def _first(line: Line) -> int:
    """The output gradient that element 0 of an input gradient with stride 2 would be at distance 0 of."""
    phase = line.phases[0]
    return phase.shift - line.before - (_parity(line) - phase.taps[0]) // 2


def _pieces_by_two(line: Line, dtype: np.dtype) -> np.ndarray:
    """The table of the pieces of a row of pairs of an input gradient with stride 2."""
    taps, count, first = len(line.taps), sum(phase.count for phase in line.phases), 0
    table = []
    for shape, lanes, _ in _shapes(line.out, dtype, 1):
        function = address_of(_spread_function, taps, simd.plane_kind(_parity(line), shape, 0), dtype)
        stored = [_lane_bits(0, count - 2 * first - n * lanes, lanes) for n in range(2)]
        places = [first + _first(line) + shift for shift in simd.spread_shifts(taps, _parity(line))]
        loaded = [_lane_bits(-place, line.size - place, lanes) for place in places]
        table.append([function, 2 * first, first + _first(line), *stored, *loaded])
        first += lanes
    return np.array(table, np.int64)


def _geometry(lines: Lines) -> tuple[int, ...]:
    """The parameters from WIDTH on, but for the last."""
    depth, height, width = lines
    first_h, first_d = (line.phases[0].shift - line.before for line in (height, depth))
    return (
        width.size, height.size, height.stride, first_h, len(height.taps), depth.size, depth.stride, first_d,
        len(depth.taps), depth.phases[0].tap_step,
    )  # fmt: skip


def _asks_ahead(
    dtype: np.dtype, batch: int, channels: int, rows: int, lines: Lines, x: Strides, y: Strides
) -> bool:
    """Does a unit ask for the memory of the next one? That is one piece where whole planes follow one another."""
    elements = 0
    for strides, sizes in (
        (x, [line.size for line in lines]), (y, [sum(phase.count for phase in line.phases) for line in lines])
    ):  # fmt: skip
        if any(strides[k] != math.prod(sizes[k - 1 :]) for k in (1, 2, 3) if k != 2 or sizes[0] > 1):
            return False
        elements += batch * channels * math.prod(sizes)
    return rows == 1 and elements * dtype.itemsize > PREFETCH_BYTES


def _tiles(rows: int, row_bytes: int, least: int) -> int:
    """Into how many tiles of at least so many rows a plane is cut."""
    tile = max(1, _CALL_BYTES // (row_bytes * least)) * least
    return min(-(-rows // tile), rows // least)


def plan_correlation(
    dtype: np.dtype, batch: int, channels: int, rows: int, lines: Lines, x: Strides, y: Strides, check: bool,
    workers: int,
) -> Plan:  # fmt: skip
    """Plan y[n, c, i] = sum over k of w[c, i, k] * x[n, c, u(k)], with strides of x and y in elements.

    With `check`, weights need not be finite.
    """
    depth, height, width = lines
    at_once = _rows_at_once(height.out)
    pieces, no_bias = _pieces(width, dtype, at_once), np.array([-0.0], dtype)  # adding which changes nothing
    taps = [len(line.taps) for line in lines]
    row_bytes = max(width.size, width.out) * dtype.itemsize
    tiles, planes = _tiles(height.out, row_bytes, at_once), 1
    if tiles == depth.out == 1:
        planes = max(1, min(channels, _CALL_BYTES // (row_bytes * height.size)))
    tile = -(-height.out // tiles)
    chunks = -(-channels // planes)
    units = batch * chunks * depth.out * tiles
    unit_tasks = min(units, 8 * workers)
    # weights in the order of `taps`, which falls in the input gradient
    sizes = taps[1] * taps[2], taps[2], 1
    falls = [line.taps[0] > line.taps[-1] for line in lines]
    first = sum((n - 1) * size for n, size, falling in zip(taps, sizes, falls, strict=True) if falling)
    steps = [-size if falling else size for size, falling in zip(sizes, falls, strict=True)]
    copied = taps[0] * ((tile - 1) * height.stride + taps[1]) * width.size + tile_for(dtype.itemsize * 8).lanes
    parameters = np.zeros(END, np.int64)
    parameters[X_N:END] = (
        *x[:4], *y[:4], first, *steps, math.prod(taps),
        channels, rows, planes, chunks, depth.out, height.out, 1, height.out, tiles, units, unit_tasks, *pieces.shape,
        address(pieces), address(no_bias), batch, 1, check, *_geometry(lines),
        _asks_ahead(dtype, batch, channels, rows, lines, x, y),
    )  # fmt: skip
    flops = 2 * batch * channels * rows * math.prod(line.out * len(line.taps) for line in lines)
    scratch = copied * dtype.itemsize if check else 0
    return Plan(_correlate, parameters, (pieces, no_bias), unit_tasks, scratch, flops)


def plan_input_gradient_by_two(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, dy: Strides, dx: Strides, workers: int
) -> Plan:
    """Plan the input gradient of a depthwise convolution with stride 2, with strides of dy and dx in elements."""
    _, height, width = lines
    pieces, no_bias = _pieces_by_two(width, dtype), np.array([-0.0], dtype)
    taps = len(height.taps)
    row_bytes = 2 * width.out * dtype.itemsize
    tiles, planes = _tiles(height.out, 2 * row_bytes, simd.PLANE_PAIRS), 1
    if tiles == 1:
        planes = max(1, min(channels, _CALL_BYTES // (2 * row_bytes * height.out)))
    chunks = -(-channels // planes)
    units = batch * chunks * tiles
    unit_tasks = min(units, 8 * workers)
    dx_rows = sum(phase.count for phase in height.phases)
    parameters = np.zeros(END, np.int64)
    parameters[X_N:END] = (
        *dy[:4], *dx[:4], 0, taps * taps, taps, 1, taps * taps,
        channels, 1, planes, chunks, 1, height.out, 2, dx_rows, tiles, units, unit_tasks, *pieces.shape,
        address(pieces), address(no_bias), batch, 1, False, width.size, height.size, 1, _first(height), taps, 1, 0, 0,
        1, 1, _asks_ahead(dtype, batch, channels, 1, lines, dy, dx),
    )  # fmt: skip
    flops = 2 * batch * channels * height.size * width.size * taps * taps
    return Plan(_correlate, parameters, (pieces, no_bias), unit_tasks, 0, flops)


def plan_weight_gradient(
    dtype: np.dtype, batch: int, channels: int, rows: int, lines: Lines, x: Strides, dy: Strides
) -> Plan:
    """Plan dw[c, i, k] = sum over n, p of dy[n, c, i, p] * x[n, c, u(p, k)], with strides of x and dy in elements."""
    depth, height, width = lines
    lanes = tile_for(dtype.itemsize * 8).lanes
    pieces, zeros = _pieces(width, dtype, None), np.zeros(width.size, dtype)
    taps = math.prod(len(line.taps) for line in lines)
    sums = rows * taps * lanes
    tiles = _tiles(height.out, max(width.size, width.out) * dtype.itemsize, len(height.taps))
    units = batch * tiles
    splits = min(units, -(-_GRADIENT_TASKS // channels))
    chunks = min(channels, 4 * _GRADIENT_TASKS)
    planes = max(1, min(-(-channels // chunks), _SUMS_BYTES // (sums * dtype.itemsize)))
    parameters = np.zeros(END, np.int64)
    parameters[X_N:END] = (
        *x[:4], *dy[:4], 0, 0, 0, 0, taps,
        channels, rows, planes, chunks, depth.out, height.out, 1, height.out, tiles, units, chunks * splits,
        *pieces.shape, address(pieces), address(zeros), batch, splits, False, *_geometry(lines),
        depth.out == 1 and len(pieces) > 1 and _asks_ahead(dtype, batch, channels, rows, lines, x, dy),
    )  # fmt: skip
    flops = 2 * batch * channels * rows * math.prod(line.out * len(line.taps) for line in lines)
    return Plan(
        _weight_gradient, parameters, (pieces, zeros), chunks * splits, planes * sums * dtype.itemsize, flops,
        splits=splits,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Where it pays
# ---------------------------------------------------------------------------------------------------------------------

# Cycles for a vector of output beyond one for each tap: here, for vectors with empty lanes and rows computed twice as
# well; and in `depthwise_channels`, which has two transposes, but no such waste. Of arrays in the caches, 3x3 to 7x7,
# stride 1, these were 2 to 5 and 13 to 16 cycles on AVX-512.
_OVERHEAD, _OVERHEAD_OF_CHANNELS = 3, 14
_MOST_COPIED = 1024 * 1024  # bytes of rows, for the fewest rows of output at once, where weights are not finite


def applies(
    dtype: np.dtype, lines: Lines, x: Strides, y: Strides, zeros: bool, weight_gradient: bool = False
) -> bool:
    """Is this a correlation for the functions of this module, with strides of input and output in elements?"""
    if not zeros or not tile_for(dtype.itemsize * 8).masks or not x[4] == y[4] == 1:
        return False
    for line in lines:
        rising = tuple(range(len(line.taps)))
        if len(line.phases) > 1 or not rising or line.taps not in (rising, rising[::-1]):
            return False
    depth, height, width = lines
    taps, stride = len(height.taps), height.stride
    if len(width.taps) != taps or width.stride != stride:
        return False
    if not height.phases[0].tap_step == width.phases[0].tap_step == 1:
        return False
    if weight_gradient:
        return taps in simd.GRADIENT_TAPS.get(stride, ()) and height.out >= taps
    places = np.arange(depth.out)[:, None] * depth.stride + depth.phases[0].shift
    places = places + np.arange(len(depth.taps)) * depth.phases[0].tap_step
    if not (depth.source[places] >= 0).any(axis=1).all():
        return False
    copied = len(depth.taps) * (stride * (max(simd.PLANE_ROWS) - 1) + taps) * width.size * dtype.itemsize
    return (
        taps in simd.PLANE_TAPS.get(stride, ()) and height.out >= min(simd.PLANE_ROWS) and copied <= _MOST_COPIED
    )


def applies_by_two(dtype: np.dtype, lines: Lines, dy: Strides, dx: Strides) -> bool:
    """Is this an input gradient for `plan_input_gradient_by_two`?"""
    depth, *others = lines
    if not tile_for(dtype.itemsize * 8).masks or not dy[4] == dx[4] == 1:
        return False
    if not depth.out == depth.step == depth.size == len(depth.taps) == 1:
        return False
    for line in others:
        if line.step != 2 or len(line.phases) != 2 or not all(f.taps and f.tap_step == 1 for f in line.phases):
            return False
    height, width = others
    return (
        len(height.taps) == len(width.taps)
        and len(height.taps) in simd.SPREAD_TAPS
        and _parity(height) == _parity(width)
        and height.out >= simd.PLANE_PAIRS
    )


def pays(dtype: np.dtype, lines: Lines, weight_gradient: bool = False) -> bool:
    """Is this faster than `depthwise_channels`?"""
    _, height, width = lines
    taps = math.prod(len(line.taps) for line in lines)
    shapes = _shapes(width.out, dtype, 1 if weight_gradient else 2)
    waste = sum(lanes * vectors for _, lanes, vectors in shapes) / width.out
    if not weight_gradient:
        at_once = _rows_at_once(height.out)
        waste *= -(-height.out // at_once) * at_once / height.out
    return (taps + _OVERHEAD) * waste <= taps + _OVERHEAD_OF_CHANNELS
