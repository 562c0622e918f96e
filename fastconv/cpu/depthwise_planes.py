"""Depthwise convolutions of planes that are read and written in place, with a row along the vectors.

For channels-first arrays, on machines whose vector loads and stores can leave lanes out (AVX-512): the lanes of a mask
stand for what lies beside a row, and rows above and below the plane are left out, so that nothing is copied, neither
with its border as in `depthwise` nor through transposes as in `depthwise_channels`. A row of output is cut into
*parts* of one or two vectors, and `correlate_planes` computes several rows of a part at a time, of many planes
in one call.

Taps that read nothing but the zeros around the plane would make a nan of a weight that is infinite or nan, and that
must be seen: with such weights rows are read from a copy that has its zeros. What is added up in which order depends
on the filter alone: the bits depend neither on threads nor on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import tasks
from .depthwise import PREFETCH_BYTES, Line, Lines, Plan
from .depthwise_tasks import NO_OPERANDS, Operands, RowSteps
from .implicit_gemm import Strides
from .jit import helper as _jit
from .records import Integer, Integers, PointerTo, Reals, Record
from .tasks import data_address
from .vector import gemm, move
from .vector.depthwise_planes import (
    GRADIENT_TAPS,
    PLANE_PAIRS,
    PLANE_ROWS,
    PLANE_TAPS,
    SPREAD_TAPS,
    Part,
    PlaneGradientSteps,
    PlaneSteps,
    RowBlock,
    Spreading,
    Taps,
    accumulate_planes,
    correlate_planes,
    plane_loads,
    row_parts,
    spread_planes_by_two,
    spread_shifts,
)
from .vector.depthwise_rows import sum_lanes
from .vector.memory import at, fill_zero, offset, pointer_address
from .vector.tile import lanes as lanes_of
from .vector.tile import tile as tile_for


class RowPart(Record):
    """A part of a row of output: its first column, that of the input which the first tap reads, and its masks."""

    function: Integer
    column: Integer
    first_column: Integer
    masks: Integers


class Dimension(Record):
    """A dimension of the input, and what reads it: the first tap of the first output reads the element `first`."""

    length: Integer
    stride: Integer
    first: Integer
    taps: Integer


class Depth(Dimension):
    tap_step: Integer


class Planes(tasks.Parameters):
    """What both bodies need to know."""

    operands: Operands
    x: RowSteps
    y: RowSteps
    channels: Integer
    rows: Integer  # output channels of a channel
    at_once: Integer  # channels
    chunks: Integer  # in which the channels are
    out_d: Integer
    out_h: Integer
    tiles: Integer  # of rows
    units: Integer
    parts: Integer
    row_parts: PointerTo[RowPart]
    taps: Integer  # of a filter
    depth: Depth
    height: Dimension
    prefetches: Integer
    constants: Reals  # for a correlation -0.0, adding which changes nothing; for a gradient a row of zeros


class Correlation(Planes):
    w_first: Integer  # place of the first tap: weights are read backwards in an input gradient
    w_depth: Integer
    step: Integer  # rows and columns of output for each of `out_h`
    y_rows: Integer
    unit_tasks: Integer
    check: Integer  # may weights be infinite or nan?
    width: Integer
    steps: PlaneSteps
    copy_steps: PlaneSteps  # where x is the copy that rows are read from with such weights


class WeightGradient(Planes):
    batch: Integer
    splits: Integer
    steps: PlaneGradientSteps


# Input of one call: many planes share the work that is done for each call, and their rows are still in the nearest
# caches when the next part of them is computed. From 16 to 64 KiB within a tenth of one another.
_CALL_BYTES = 32 * 1024
_SUMS_BYTES = 16 * 1024  # sums of a weight gradient that are filled by one call
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


@_jit
def _correlate_rows(
    p, steps, y, x, first_h, height, depths, w, planes, rows, y_rows, bias, ahead, x_ahead, y_ahead
):  # fmt: skip
    """`rows` rows of `planes` planes of output, from planes of `height` rows of input, of which the first tap of the
    first row of output reads row first_h. What is at x_ahead and y_ahead, which are null if not `ahead`, comes next."""
    flags = gemm.RELU if p.operands.relu else 0
    if pointer_address(p.operands.bias) != 0:
        flags |= gemm.BIAS
    for k in range(p.parts):
        part = p.row_parts[k]
        done = ahead * planes * rows * part.column
        correlate_planes(
            part.function, part.masks, offset(y, part.column), offset(x, part.first_column), w, bias, first_h, height,
            depths, planes, rows, y_rows, offset(x_ahead, done // p.step), offset(y_ahead, done * p.step), steps, flags,
        )  # fmt: skip


@_jit
def _place(p, unit):
    """Where a unit is: sample, first channel, plane of the depth, first row and the row after the last."""
    tile, rest = unit % p.tiles, unit // p.tiles
    d, rest = rest % p.out_d, rest // p.out_d
    h, end = tile * p.out_h // p.tiles, (tile + 1) * p.out_h // p.tiles
    return rest // p.chunks, rest % p.chunks * p.at_once, d, h, end


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
    """All rows [tap of the depth][row] that a tile of a plane of output reads, with zeros where there are none."""
    fill_zero(target, p.depth.taps * p.copy_steps.x_depth)
    low, high = max(first_h, 0), min(first_h + rows, p.height.length)
    for a in range(p.depth.taps):
        d = first_d + a * p.depth.tap_step
        if 0 <= d < p.depth.length and low < high:
            move.copy_block(
                offset(target, a * p.copy_steps.x_depth + (low - first_h) * p.width), p.width,
                offset(x, d * p.x.depth + low * p.x.row), p.x.row, high - low, p.width,
            )  # fmt: skip


@tasks.body(Correlation)
def _correlate(task, worker, p, real):
    """Task = a range of units: (sample, some channels, plane of the depth, tile of rows)."""
    scratch = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    last = (task + 1) * p.units // p.unit_tasks
    for unit in range(task * p.units // p.unit_tasks, last):
        ahead, x_ahead, y_ahead = 0, at(real, 0), at(real, 0)
        if p.prefetches and unit + 1 < last:
            n, channel, d, h, _ = _place(p, unit + 1)
            ahead = 1
            x_ahead = offset(
                p.operands.x,
                n * p.x.sample + channel * p.x.channel + (d + p.depth.taps - 1) * p.x.depth + h * p.x.row,
            )  # fmt: skip
            y_ahead = offset(
                p.operands.y, n * p.y.sample + channel * p.y.channel + d * p.y.depth + h * p.step * p.y.row
            )
        n, channel, d, h, end = _place(p, unit)
        channels, rows = min(p.at_once, p.channels - channel), end - h
        y_rows = p.y_rows - h * p.step
        weights = offset(p.operands.w, channel * p.rows * p.taps)
        x = offset(p.operands.x, n * p.x.sample + channel * p.x.channel)
        y = offset(
            p.operands.y, n * p.y.sample + channel * p.rows * p.y.channel + d * p.y.depth + h * p.step * p.y.row
        )
        first_h, first_d = h * p.height.stride + p.height.first, d * p.depth.stride + p.depth.first
        low = max(-(first_d // p.depth.tap_step), 0)  # taps of the depth from here on, and before `high`, read a plane
        high = min((p.depth.length - 1 - first_d) // p.depth.tap_step + 1, p.depth.taps)
        finite = not p.check or _all_finite(weights, channels * p.rows * p.taps)
        for i in range(p.rows):
            w = offset(weights, i * p.taps + p.w_first)
            y_i = offset(y, i * p.y.channel)
            bias, bias_step = p.constants, 0
            if pointer_address(p.operands.bias) != 0:
                bias, bias_step = offset(p.operands.bias, channel * p.rows + i), p.rows
            if finite:
                _correlate_rows(
                    p, p.steps, y_i, offset(x, (first_d + low * p.depth.tap_step) * p.x.depth), first_h,
                    p.height.length, high - low, offset(w, low * p.w_depth), channels, rows, y_rows, bias, ahead,
                    x_ahead, y_ahead,
                )  # fmt: skip
                continue
            copied = (rows - 1) * p.height.stride + p.height.taps
            for c in range(channels):
                _copy_rows(p, scratch, offset(x, c * p.x.channel), first_d, first_h, copied)
                _correlate_rows(
                    p, p.copy_steps, offset(y_i, c * p.rows * p.y.channel), scratch, 0, copied, p.depth.taps,
                    offset(w, c * p.rows * p.taps), 1, rows, y_rows, offset(bias, c * bias_step), 0, at(real, 0),
                    at(real, 0),
                )  # fmt: skip


@_jit
def _accumulate_rows(p, sums, dy, x, zeros, first_h, planes, runs, rows, ahead, x_ahead, dy_ahead):
    """Add what `rows` rows of `runs` samples of `planes` planes of the output gradient contribute to `sums`. The first
    tap of the first row reads row first_h of x. What is at x_ahead and dy_ahead, null if not `ahead`, comes next."""
    lanes = lanes_of(sums)
    stride = p.height.stride
    for i in range(p.rows):
        for d in range(p.out_d):
            for a in range(p.depth.taps):
                at_d = d * p.depth.stride + p.depth.first + a * p.depth.tap_step
                height = p.height.length if 0 <= at_d < p.depth.length else 0
                for k in range(p.parts):
                    part = p.row_parts[k]
                    done = ahead * rows * part.column
                    accumulate_planes(
                        part.function, part.masks, offset(sums, (i * p.taps + a * (p.taps // p.depth.taps)) * lanes),
                        offset(dy, i * p.y.channel + d * p.y.depth + part.column),
                        offset(x, at_d * p.x.depth + part.first_column), offset(zeros, part.first_column), first_h,
                        height, planes, runs, rows, offset(x_ahead, done * stride * stride), offset(dy_ahead, done),
                        p.steps,
                    )  # fmt: skip


@tasks.body(WeightGradient)
def _weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile of rows, sample) of a range of channels."""
    lanes = lanes_of(real)
    sums = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    part, split = task % p.chunks, task // p.chunks
    channel, end = part * p.channels // p.chunks, (part + 1) * p.channels // p.chunks
    size = p.rows * p.taps
    while channel < end:
        channels = min(p.at_once, end - channel)
        fill_zero(sums, channels * size * lanes)
        unit, last = split * p.units // p.splits, (split + 1) * p.units // p.splits
        while unit < last:
            tile, n = unit // p.batch, unit % p.batch
            runs = min(p.batch - n, last - unit)
            unit += runs
            h = tile * p.out_h // p.tiles
            rows, first_h = (tile + 1) * p.out_h // p.tiles - h, h * p.height.stride + p.height.first
            x = offset(p.operands.x, n * p.x.sample + channel * p.x.channel)
            dy = offset(p.operands.y, n * p.y.sample + channel * p.rows * p.y.channel + h * p.y.row)
            if not p.prefetches:
                _accumulate_rows(
                    p, sums, dy, x, p.constants, first_h, channels, runs, rows, 0, at(real, 0), at(real, 0)
                )
                continue
            for c in range(channels):  # whole rows of a run, since these follow one another in memory
                for m in range(runs):
                    x_now = offset(x, c * p.x.channel + m * p.x.sample)
                    dy_now = offset(dy, c * p.y.channel + m * p.y.sample)
                    x_step, dy_step = p.x.sample, p.y.sample
                    if m + 1 == runs:
                        x_step, dy_step = p.x.channel - m * p.x.sample, p.y.channel - m * p.y.sample
                    _accumulate_rows(
                        p, offset(sums, c * size * lanes), dy_now, x_now, p.constants, first_h, 1, 1, rows, 1,
                        offset(x_now, first_h * p.x.row + x_step), offset(dy_now, dy_step),
                    )  # fmt: skip
        sum_lanes(offset(p.operands.w, (split * p.channels + channel) * size), sums, channels * size)
        channel += channels


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def _rows_at_once(rows: int) -> int:
    """Those of `PLANE_ROWS`, no more than there are, with which the fewest rows are computed twice."""
    return min((most for most in PLANE_ROWS if most <= rows), key=lambda most: -(-rows // most) * most)


def _lane_bits(low: int, high: int, lanes: int) -> int:
    """The bits of lanes low .. high, of those there are."""
    return sum(1 << lane for lane in range(max(low, 0), min(high, lanes)))


def _parts(count: int, dtype: np.dtype, most: int) -> list[Part]:
    """The parts, of `most` vectors at most, of a row of `count` elements."""
    parts = [part for part in row_parts(tile_for(dtype.itemsize * 8)) if part.vectors <= most]
    found = []
    while count > 0:
        found.append(next((part for part in parts if count <= part.columns), parts[-1]))
        count -= found[-1].columns
    return found


def _part_table(entries: Sequence[tuple[int, int, int, list[int]]], kept: list[np.ndarray]) -> np.ndarray:
    """A table of `RowPart`, each with its masks, which are `kept`."""
    masks = [np.array(bits, np.int64) for *_, bits in entries]
    table = RowPart.table(
        (*entry[:3], data_address(bits)) for entry, bits in zip(entries, masks, strict=True)
    )
    kept += [table, *masks]
    return table


def _row_table(line: Line, dtype: np.dtype, rows: int | None, kept: list[np.ndarray]) -> np.ndarray:
    """The table of the parts of a row of output, for `rows` rows at a time; None is the weight gradient."""
    (phase,) = line.phases
    taps, first = len(phase.taps), 0
    entries = []
    for part in _parts(phase.count, dtype, 1 if rows is None else 2):
        lanes, vectors = part
        column = first * line.stride + phase.shift - line.before
        if rows is None:
            function = accumulate_planes.address(dtype, Taps(taps, line.stride, lanes))
        else:
            function = correlate_planes.address(dtype, RowBlock(taps, line.stride, rows, part))
        stored = [_lane_bits(0, phase.count - first - n * lanes, lanes) for n in range(vectors)]
        places = [column + place for place in plane_loads(part, taps, line.stride)]
        loaded = [_lane_bits(-place, line.size - place, lanes) for place in places]
        if rows is None and line.stride == 1:  # zero times what a lane that is not there would read may be nan
            loaded = [bits & stored[0] for bits in loaded]
        entries.append((function, first, column, [*stored, *loaded]))
        first += part.columns
    return _part_table(entries, kept)


def _parity(line: Line) -> int:
    """Of the taps of even elements of an input gradient with stride 2."""
    return line.phases[0].taps[0] % 2


def _first(line: Line) -> int:
    """The output gradient that element 0 of an input gradient with stride 2 would be at distance 0 of."""
    phase = line.phases[0]
    return phase.shift - line.before - (_parity(line) - phase.taps[0]) // 2


def _row_table_by_two(line: Line, dtype: np.dtype, kept: list[np.ndarray]) -> np.ndarray:
    """The table of the parts of a row of pairs of an input gradient with stride 2."""
    taps, first = len(line.taps), 0
    entries = []
    for lanes, _ in _parts(line.out, dtype, 1):
        function = spread_planes_by_two.address(dtype, Spreading(taps, _parity(line), lanes))
        stored = [_lane_bits(0, line.whole - 2 * first - n * lanes, lanes) for n in range(2)]
        places = [first + _first(line) + shift for shift in spread_shifts(taps, _parity(line))]
        loaded = [_lane_bits(-place, line.size - place, lanes) for place in places]
        entries.append((function, 2 * first, first + _first(line), [*stored, *loaded]))
        first += lanes
    return _part_table(entries, kept)


def _dimensions(lines: Lines) -> dict[str, Any]:
    depth, height, _ = lines
    first_d, first_h = (line.phases[0].shift - line.before for line in (depth, height))
    return {
        "depth": (depth.size, depth.stride, first_d, len(depth.taps), depth.phases[0].tap_step),
        "height": (height.size, height.stride, first_h, len(height.taps)),
    }


def _prefetches(
    dtype: np.dtype, batch: int, channels: int, rows: int, lines: Lines, x: Strides, y: Strides
) -> bool:
    """Does a unit prefetch the memory of the next one? That is one block where whole planes follow one another."""
    elements = 0
    for strides, sizes in (
        (x, [line.size for line in lines]), (y, [line.whole for line in lines])
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
    no_bias = np.array([-0.0], dtype)  # adding which changes nothing
    kept = [no_bias]
    table = _row_table(width, dtype, at_once, kept)
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
    w_steps = [-size if falling else size for size, falling in zip(sizes, falls, strict=True)]
    copied = ((tile - 1) * height.stride + taps[1]) * width.size  # elements, for each tap of the depth
    y_steps, w_plane = (rows * y[1], y[3]), rows * math.prod(taps)
    parameters = Correlation.of(
        operands=NO_OPERANDS, x=x[:4], y=y[:4], channels=channels, rows=rows, at_once=planes, chunks=chunks,
        out_d=depth.out, out_h=height.out, tiles=tiles, units=units, parts=len(table), row_parts=data_address(table),
        taps=math.prod(taps), **_dimensions(lines), prefetches=_prefetches(dtype, batch, channels, rows, lines, x, y),
        constants=data_address(no_bias), w_first=first, w_depth=w_steps[0], step=1, y_rows=height.out,
        unit_tasks=unit_tasks, check=check, width=width.size,
        steps=(*y_steps, x[1], depth.phases[0].tap_step * x[2], x[3], w_plane, *w_steps, rows),
        copy_steps=(*y_steps, 0, copied, width.size, w_plane, *w_steps, rows),
    )  # fmt: skip
    flops = 2 * batch * channels * rows * math.prod(line.out * len(line.taps) for line in lines)
    scratch = (taps[0] * copied + tile_for(dtype.itemsize * 8).lanes) * dtype.itemsize if check else 0
    return Plan(_correlate, parameters, tuple(kept), unit_tasks, scratch, flops)


def plan_input_gradient_by_two(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, dy: Strides, dx: Strides, workers: int
) -> Plan:
    """Plan the input gradient of a depthwise convolution with stride 2, with strides of dy and dx in elements."""
    _, height, width = lines
    no_bias = np.array([-0.0], dtype)
    kept = [no_bias]
    table = _row_table_by_two(width, dtype, kept)
    taps = len(height.taps)
    row_bytes = 2 * width.out * dtype.itemsize
    tiles, planes = _tiles(height.out, 2 * row_bytes, PLANE_PAIRS), 1
    if tiles == 1:
        planes = max(1, min(channels, _CALL_BYTES // (2 * row_bytes * height.out)))
    chunks = -(-channels // planes)
    units = batch * chunks * tiles
    unit_tasks = min(units, 8 * workers)
    parameters = Correlation.of(
        operands=NO_OPERANDS, x=dy[:4], y=dx[:4], channels=channels, rows=1, at_once=planes, chunks=chunks, out_d=1,
        out_h=height.out, tiles=tiles, units=units, parts=len(table), row_parts=data_address(table), taps=taps * taps,
        depth=(1, 1, 0, 1, 1), height=(height.size, 1, _first(height), taps),
        prefetches=_prefetches(dtype, batch, channels, 1, lines, dy, dx), constants=data_address(no_bias), w_first=0,
        w_depth=taps * taps, step=2, y_rows=height.whole, unit_tasks=unit_tasks, check=False, width=width.size,
        steps=(dx[1], dx[3], dy[1], dy[2], dy[3], taps * taps, taps * taps, taps, 1, 1),
        copy_steps=(0,) * len(PlaneSteps.fields),
    )  # fmt: skip
    flops = 2 * batch * channels * height.size * width.size * taps * taps
    return Plan(_correlate, parameters, tuple(kept), unit_tasks, 0, flops)


def plan_weight_gradient(
    dtype: np.dtype, batch: int, channels: int, rows: int, lines: Lines, x: Strides, dy: Strides
) -> Plan:
    """Plan dw[c, i, k] = sum over n, p of dy[n, c, i, p] * x[n, c, u(p, k)], with strides of x and dy in elements."""
    depth, height, width = lines
    lanes = tile_for(dtype.itemsize * 8).lanes
    zeros = np.zeros(width.size, dtype)
    kept = [zeros]
    table = _row_table(width, dtype, None, kept)
    taps = math.prod(len(line.taps) for line in lines)
    sums = rows * taps * lanes
    tiles = _tiles(height.out, max(width.size, width.out) * dtype.itemsize, len(height.taps))
    units = batch * tiles
    splits = min(units, -(-_GRADIENT_TASKS // channels))
    chunks = min(channels, 4 * _GRADIENT_TASKS)
    planes = max(1, min(-(-channels // chunks), _SUMS_BYTES // (sums * dtype.itemsize)))
    parts_follow = depth.out == 1 and len(table) > 1
    parameters = WeightGradient.of(
        operands=NO_OPERANDS, x=x[:4], y=dy[:4], channels=channels, rows=rows, at_once=planes, chunks=chunks,
        out_d=depth.out, out_h=height.out, tiles=tiles, units=units, parts=len(table),
        row_parts=data_address(table), taps=taps,
        **_dimensions(lines), constants=data_address(zeros), batch=batch, splits=splits,
        prefetches=parts_follow and _prefetches(dtype, batch, channels, rows, lines, x, dy),
        steps=(sums, rows * dy[1], dy[0], dy[3], x[1], x[0], x[3]),
    )  # fmt: skip
    flops = 2 * batch * channels * rows * math.prod(line.out * len(line.taps) for line in lines)
    return Plan(
        _weight_gradient, parameters, tuple(kept), chunks * splits, planes * sums * dtype.itemsize, flops,
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
        return taps in GRADIENT_TAPS.get(stride, ()) and height.out >= taps
    places = np.arange(depth.out)[:, None] * depth.stride + depth.phases[0].shift
    places = places + np.arange(len(depth.taps)) * depth.phases[0].tap_step
    if not (depth.source[places] >= 0).any(axis=1).all():
        return False
    copied = len(depth.taps) * (stride * (max(PLANE_ROWS) - 1) + taps) * width.size * dtype.itemsize
    return (
        taps in PLANE_TAPS.get(stride, ()) and height.out >= min(PLANE_ROWS) and copied <= _MOST_COPIED
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
        and len(height.taps) in SPREAD_TAPS
        and _parity(height) == _parity(width)
        and height.out >= PLANE_PAIRS
    )


def pays(dtype: np.dtype, lines: Lines, weight_gradient: bool = False) -> bool:
    """Is this faster than `depthwise_channels`?"""
    _, height, width = lines
    taps = math.prod(len(line.taps) for line in lines)
    parts = _parts(width.out, dtype, 1 if weight_gradient else 2)
    waste = sum(part.columns for part in parts) / width.out
    if not weight_gradient:
        at_once = _rows_at_once(height.out)
        waste *= -(-height.out // at_once) * at_once / height.out
    return (taps + _OVERHEAD) * waste <= taps + _OVERHEAD_OF_CHANNELS
