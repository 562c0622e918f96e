"""Depthwise convolutions with channels in the lanes of the vectors: every channel is a plane of its own, but all do the
same.

A *block* is as many channels as a vector has lanes. In channels-last arrays a pixel of it is a vector as it lies, and
is read in place, a few blocks side by side; the zeros beside the plane are a vector of their own that stands in for
what is not there. From channels-first arrays a tile of the planes is copied, through transposes in registers and with
its border, into the *slab* in the nearest caches, a strip of rows at a time; so it is wherever not every element reads
some input, or the filter is wider than what is unrolled, and in those weight gradients where that is faster. From there
on no stride, no row end and no plane of few pixels leaves a lane empty, and no two lanes ever meet. Results go directly
into channels-last arrays, and through the same transposes into channels-first ones.

Groups of n channels, as many in as out, are the sum of n such convolutions: the lanes of a group are rotated
once for each, so that each reads every channel of its group.

The forward pass and the input gradient are one body, with phases as in `depthwise`. Rows of taps that read nothing but
the zeros around the plane are left out, but where a weight is infinite or nan: then the product is nan, and must be
seen. What is added up in which order depends on the filter alone, and in the weight gradient on the shape: never on
threads, and in the first two never on the batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from .depthwise import PREFETCH_BYTES, Line, Lines, Phase, Plan, cut
from .depthwise_channels_tasks import Parameters, PhaseEntry, TapGroup, WidthPhase, correlate, weight_gradient
from .depthwise_tasks import NO_OPERANDS
from .implicit_gemm import Strides
from .tasks import data_address
from .vector.depthwise_channels import (
    CHANNEL_TAPS,
    GradientSteps,
    Neighbours,
    Steps,
    TapRows,
    accumulate_pixels,
    correlate_pixels,
    gradient_tap_rows,
)
from .vector.tile import tile as tile_for

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
# In one dimension, columns of output from what is computed to what is prefetched: a fifth faster than without. And, of
# a weight gradient, the columns of a tile and the most blocks of a group, so that memory is read in one piece, or in
# few. With 64 columns and 9 blocks, 512 and 1536 channels took 1.2 to 1.4 times as long (AVX-512).
_PREFETCH_COLUMNS, _TILE_COLUMNS, _TILE_GROUP = 28, 16, 32
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


def _places(line: Line, phase: Phase) -> np.ndarray:
    """The padded coordinates (element, tap) where each element of a phase reads with each tap."""
    elements = np.arange(phase.count, dtype=np.int64) * line.stride + phase.shift
    return elements[:, None] + np.arange(len(phase.taps), dtype=np.int64) * phase.tap_step


def _met(line: Line, phase: Phase, start: int, within: bool) -> np.ndarray:
    """For each element of a phase: where it reads with its first tap, which tap that is, and how many there are.

    Of all taps, or of those within the input, but at least one, so that there is something to sum: zeros.
    """
    places = _places(line, phase)
    inside = line.source[places] >= 0 if within else np.ones(places.shape, bool)
    first, count = inside.argmax(axis=1), np.maximum(inside.sum(axis=1), 1)
    return np.stack([places[np.arange(phase.count), first], start + first, count], axis=1)


def _taps_at_once(phase: Phase, stride: int) -> int:
    """Neighbouring taps of a row, out of CHANNEL_TAPS, that a row can be cut into."""
    taps = [n for n, each in CHANNEL_TAPS if each == stride and len(phase.taps) % n == 0]
    return max(taps, default=1) if phase.tap_step == 1 else 1


def _neighbours(phase: Phase, stride: int, lane_rotations: int) -> Neighbours:
    """What reads the taps of a row."""
    taps = _taps_at_once(phase, stride)
    return Neighbours(taps, stride if taps > 1 else 1, lane_rotations)


def _phase_entries(line: Line, kept: list[np.ndarray], weights: int = 1) -> list[tuple[int, ...]]:
    """What stands in the table of the phases of a dimension, with so many weights for each tap.

    `kept` are arrays whose addresses are in it.
    """
    entries, start = [], 0
    for phase in line.phases:
        reads = [_met(line, phase, start, within) for within in (True, False)]
        kept += reads
        entries.append((
            phase.first, phase.count, phase.shift, start * weights, phase.tap_step, *map(data_address, reads)
        ))  # fmt: skip
        start += len(phase.taps)
    return entries


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


@dataclass(frozen=True)
class _Layout:
    """How a plane is cut into tiles, and the steps (as in a `Box`) of one in the slab and in the copy of the output."""

    lanes: int
    tile: tuple[int, int, int]
    tiles: int
    slab: tuple[int, int, int]
    slab_size: int
    copy: tuple[int, int, int]
    copy_size: int


def _layout(dtype: np.dtype, lines: Lines, blocks: int, least_tiles: int, most_columns: int) -> _Layout:
    """For a group of so many blocks of channels."""
    lanes = tile_for(dtype.itemsize * 8).lanes
    depth, height, width = lines
    d, h, w = _tile(lines, lanes * blocks, SLAB_BYTES // dtype.itemsize, least_tiles, most_columns)
    row = _row_pitch(width, w) * lanes
    plane = height.length(h) * row
    copied_row = min(w * width.step, width.whole) * lanes
    copied_plane = min(h * height.step, height.whole) * copied_row
    return _Layout(
        lanes, (d, h, w), math.prod(-(-line.out // n) for line, n in zip(lines, (d, h, w), strict=True)),
        (plane, row, lanes), depth.length(d) * plane,
        (copied_plane, copied_row, lanes), min(d * depth.step, depth.whole) * copied_plane,
    )  # fmt: skip


def _common_fields(
    lines: Lines, layout: _Layout, x: Strides, y: Strides, lane_rotations: int, kept: list[np.ndarray]
) -> dict[str, Any]:
    """What both bodies need to know; `kept` are arrays whose addresses are in it."""
    lanes, (_, h, w) = layout.lanes, layout.tile
    _, height, width = lines
    taps = [len(line.taps) for line in lines]
    # whole rows that follow one another in the array are one run of pixels
    whole_rows = 0 <= width.before <= width.length(w) - width.size
    x_rows = whole_rows and w == width.out and x[3] == width.size * x[4]
    y_rows = w == width.out and y[3] == width.whole * y[4]
    columns = min(width.size, width.length(w))
    rows = min(height.size, height.length(h)) if x_rows else 1
    x_places = (np.arange(rows)[:, None] * layout.slab[1] + np.arange(columns) * lanes).astype(np.int64)
    y_places = np.arange(layout.copy[0] // lanes, dtype=np.int64) * lanes
    order = np.arange(math.prod(taps)).reshape(taps)
    for axis, line in enumerate(lines):
        order = order.take(np.argsort(line.taps), axis)
    w_places = (order[..., None] * lane_rotations + np.arange(lane_rotations)).astype(np.int64).ravel() * lanes
    kept += [x_places, y_places, w_places, *(line.source for line in lines)]
    dimensions = [
        (
            data_address(line.source), line.before, line.size, line.stride, line.step, line.out, line.whole, n,
            -(-line.out // n), line.reach, len(line.phases),
        )
        for line, n in zip(lines, layout.tile, strict=True)
    ]  # fmt: skip
    return {
        "operands": NO_OPERANDS, "x": x, "y": y, "x_pixels": x[1] == 1, "y_pixels": y[1] == 1, "x_rows": x_rows,
        "y_rows": y_rows, "taps": lane_rotations * math.prod(taps),
        "taps_of_plane": lane_rotations * math.prod(taps[1:]), "taps_of_row": lane_rotations * taps[2],
        "x_places": data_address(x_places), "y_places": data_address(y_places), "w_places": data_address(w_places),
        "slab": layout.slab_size, "copied": layout.copy_size,
        **dict(zip(("depth", "height", "width"), dimensions, strict=True)),
    }  # fmt: skip


def _tables(
    lines: Lines, lane_rotations: int, function: Callable[[Neighbours], int], kept: list[np.ndarray]
) -> dict[str, int]:
    """The tables of the phases: addresses of their records, with `function` for the runs of each phase of a row."""
    depth, height, width = lines
    widths = []
    for entry, phase in zip(_phase_entries(width, kept, lane_rotations), width.phases, strict=True):
        run = _neighbours(phase, width.stride, lane_rotations)
        widths.append((*entry, function(run), len(phase.taps) // run.taps, run.taps, run.weights))
    tables = {
        "depths": PhaseEntry.table(_phase_entries(depth, kept)),
        "heights": PhaseEntry.table(_phase_entries(height, kept)),
        "widths": WidthPhase.table(widths),
    }
    kept += tables.values()
    return {name: data_address(table) for name, table in tables.items()}


def _column_step(run: Neighbours, width: Line) -> int:
    """Pixels from a neighbour to the next."""
    return width.stride if run.taps == 1 else 1


def _steps(
    lines: Lines, lanes: int, lane_rotations: int, x: Sequence[int], y: Sequence[int], prefetch: tuple[int, int]
) -> np.ndarray:
    """A table of `Steps` for every phase, from those of input and output as in a `Box`."""
    taps = [len(line.taps) for line in lines]
    table = []
    for depth, height, width in itertools.product(*(line.phases for line in lines)):
        run = _neighbours(width, lines[2].stride, lane_rotations)
        table.append((
            lines[1].step * y[1], lines[2].step * y[2], x[1], _column_step(run, lines[2]) * x[2],
            depth.tap_step * x[0], height.tap_step * x[1], run.taps * width.tap_step * x[2],
            lane_rotations * taps[1] * taps[2] * lanes, lane_rotations * taps[2] * lanes, run.weights * lanes,
            (lane_rotations * math.prod(taps) + 1) * lanes, len(width.taps) // run.taps, *prefetch,
        ))  # fmt: skip
    return Steps.table(table)


def _can_stay_in_place(lines: Lines, x: Strides, y: Strides) -> bool:
    """Can pixels be read where they are? Then every output reads some of them in each dimension."""
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
    dtype: np.dtype, batch: int, channels: int, lines: Lines, x: Strides, y: Strides, workers: int,
    lane_rotations: int = 1, order: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray,
) -> Plan:  # fmt: skip
    """Plan y[n, c] = sum over k of w[c, k] * x[n, c, u(k)], with strides of x and y in elements.

    With `lane_rotations`, groups have so many channels, and the sum is also over t, below that: of w[c, k, t] times the
    pixels of the channel t after c, around the end of its group. `order` makes these weights of those that are given.
    """
    lanes = tile_for(dtype.itemsize * 8).lanes
    all_blocks = -(-channels // lanes)
    in_place = _can_stay_in_place(lines, x, y)
    blocks = -(-all_blocks // -(-all_blocks // _GROUP)) if in_place else 1
    groups = -(-all_blocks // blocks)
    layout = _layout(dtype, lines, blocks, -(-2 * workers // (batch * groups)), _MOST_COLUMNS)
    units = batch * groups * layout.tiles
    unit_tasks = min(units, 8 * workers)
    _, height, width = lines
    size = batch * channels * (math.prod(line.size for line in lines) + math.prod(line.whole for line in lines))
    prefetch, y_prefetch = _PREFETCH_COLUMNS * width.stride * x[4], _PREFETCH_COLUMNS * width.step * y[4]
    if height.out > 1:  # the rows that the next row of output is the first to read
        prefetch = max(1 + (len(phase.taps) - 1) * phase.tap_step for phase in height.phases) * x[3]
        y_prefetch = height.step * y[3]
    if size * dtype.itemsize <= PREFETCH_BYTES:
        prefetch = 0
    kept: list[np.ndarray] = []
    fields = _common_fields(lines, layout, x, y, lane_rotations, kept)
    for name, source, target, ahead in (
        ("in_place", x[2:], y[2:], prefetch), ("to_y", layout.slab, y[2:], 0), ("to_copy", layout.slab, layout.copy, 0)
    ):  # fmt: skip
        steps = _steps(lines, lanes, lane_rotations, source, target, (ahead, y_prefetch))
        kept.append(steps)
        fields[name] = source, target, data_address(steps), 0
    parameters = Parameters.of(
        **fields, channels=channels, batch=batch, units=units, unit_tasks=unit_tasks, splits=1, blocks=blocks,
        reads_in_place=in_place, strip=-(-_STRIP_PIXELS // (layout.copy[1] // lanes * height.step)), prefetches=0,
        blank=lanes, tap_groups=0, groups=0,
        **_tables(lines, lane_rotations, functools.partial(correlate_pixels.address, dtype), kept),
    )  # fmt: skip
    scratch = layout.slab_size + layout.copy_size + (1 + blocks * (fields["taps"] + 1)) * lanes
    outputs = math.prod(sum(f.count * len(f.taps) for f in line.phases) for line in lines)
    return Plan(
        correlate, parameters, tuple(kept), unit_tasks, scratch * dtype.itemsize,
        2 * batch * channels * outputs * lane_rotations, order,
    )  # fmt: skip


def plan_groups(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, y: Strides, forward: bool, workers: int
) -> Plan:
    """Plan the forward pass or the input gradient of groups as `applies_to_groups` says, from strides in elements."""
    per_group = geometry.in_channels_per_group
    taps = math.prod(geometry.kernel_size)
    channel, tap, rotation = np.ogrid[: geometry.in_channels, :taps, :per_group]
    within = channel % per_group
    other = (within + rotation) % per_group
    if forward:
        places = (channel * per_group + other) * taps + tap
    else:  # rows are input channels, and the sum is over output channels
        places = ((channel - within + other) * per_group + within) * taps + tap
    return plan_correlation(
        dtype, geometry.batch, geometry.in_channels, lines, x, y, workers, per_group, lambda w: np.take(w, places)
    )


def plan_weight_gradient(
    dtype: np.dtype, batch: int, channels: int, lines: Lines, x: Strides, dy: Strides, lane_rotations: int = 1,
    order: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray,
) -> Plan:  # fmt: skip
    """Plan dw[c, k] = sum over n, p of dy[n, c, p] * x[n, c, u(p, k)], with strides of x and dy in elements.

    With `lane_rotations`, it is dw[c, k, t], as for `plan_correlation`, of which `order` makes what is asked for.
    """
    t = tile_for(dtype.itemsize * 8)
    lanes, all_blocks = t.lanes, -(-channels // t.lanes)
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
    zeros = zeros if in_place else lanes
    most = _TILE_GROUP if height.out == 1 else _GROUP
    blocks = -(-all_blocks // -(-all_blocks // most)) if in_place else 1
    groups = -(-all_blocks // blocks)
    layout = _layout(dtype, lines, blocks, 1, _TILE_COLUMNS if in_place and height.out == 1 else _MOST_COLUMNS)
    units = batch * layout.tiles
    splits = min(units, -(-_GRADIENT_TASKS // groups))
    group_tasks = min(groups, 4 * _GRADIENT_TASKS)
    kept: list[np.ndarray] = []
    fields = _common_fields(lines, layout, x, dy, lane_rotations, kept)
    (phase_h,) = height.phases
    run = _neighbours(width.phases[0], width.stride, lane_rotations)
    for name, source, gradient in (
        ("in_place", x[2:], dy[2:]), ("to_y", layout.slab, dy[2:]), ("to_copy", layout.slab, layout.copy)
    ):  # fmt: skip
        steps = GradientSteps.table([(
            fields["taps_of_row"] * lanes, fields["taps"] * lanes, height.stride * source[1],
            phase_h.tap_step * source[1], _column_step(run, width) * source[2], *gradient[1:], height.stride,
            phase_h.tap_step,
        )])  # fmt: skip
        kept.append(steps)
        fields[name] = source, gradient, 0, data_address(steps)
    tap_groups = TapGroup.table(
        (accumulate_pixels.address(dtype, TapRows(run, rows, in_place)), rows)
        for rows in cut(len(phase_h.taps), gradient_tap_rows(t, run.weights))
    )
    kept.append(tap_groups)
    parameters = Parameters.of(
        **fields, channels=channels, batch=batch, units=units, unit_tasks=group_tasks, splits=splits, blocks=blocks,
        reads_in_place=in_place, strip=1, prefetches=large, blank=zeros, tap_groups=len(tap_groups),
        groups=data_address(tap_groups), **_tables(lines, lane_rotations, lambda _: 0, kept),
    )  # fmt: skip
    scratch = layout.slab_size + layout.copy_size + zeros + blocks * fields["taps"] * lanes
    flops = 2 * batch * channels * lane_rotations * math.prod(line.out * len(line.taps) for line in lines)
    return Plan(
        weight_gradient, parameters, tuple(kept), group_tasks * splits, scratch * dtype.itemsize, flops, order, splits
    )


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
# the implicit matrix product, with 8 0.5 to 0.7; with 16, for whose weights there are no registers, 1.5.
_MOST_ROTATIONS = 8
_MOST_SUMS = 24  # of a row of the filter, that its weight gradient has in registers


def applies_to_groups(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, y: Strides, weight_gradient: bool = False
) -> bool:
    """Are these groups of few channels, as many in as out, that are neighbours in memory and fill vectors together?

    Each of them is the sum of as many depthwise convolutions as a group has channels.
    """
    t = tile_for(dtype.itemsize * 8)
    per_group = geometry.in_channels_per_group
    return (
        1 < per_group == geometry.out_channels_per_group <= min(_MOST_ROTATIONS, t.lanes)
        and t.rows > 8  # registers for the weights of all taps and rotations
        and t.lanes % per_group == 0
        and x[1] == y[1] == 1
        and applies(replace(geometry, groups=geometry.in_channels), dtype, lines, x, y, weight_gradient)
        and not (weight_gradient and per_group * _taps_at_once(lines[2].phases[0], lines[2].stride) > _MOST_SUMS)
    )


def applies(
    geometry: ConvGeometry, dtype: np.dtype, lines: Lines, x: Strides, y: Strides, weight_gradient: bool = False
) -> bool:
    """Is this a convolution for the functions of this module, with strides of input and output in elements?"""
    lanes = tile_for(dtype.itemsize * 8).lanes
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
        return False  # does not read with every tap
    along_rows = x[4] == y[4] == width.stride == width.step == 1 and taps <= _FEW_TAPS and width.out >= _LONG_ROW
    if along_rows and not weight_gradient:
        return False
    slab = lines[0].length(1) * lines[1].length(1) * _row_pitch(width, min(width.out, _MOST_COLUMNS))
    return taps <= _MOST_TAPS and slab * lanes * dtype.itemsize <= _MOST_SLAB
