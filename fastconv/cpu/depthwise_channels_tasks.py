"""What a task of `depthwise_channels` does, and the parameters of it."""

from __future__ import annotations

from . import tasks
from .depthwise_tasks import ArraySteps, Operands
from .jit import helper as _jit
from .records import Integer, Integers, PointerTo, Record
from .vector import gemm, move
from .vector.depthwise_channels import GradientSteps, Steps, accumulate_pixels, correlate_pixels
from .vector.memory import at, fill_zero, offset, pointer_address
from .vector.tile import lanes as lanes_of

_EVERYTHING = 1 << 40  # more pixels than any row has


class PhaseEntry(Record):
    """A phase of a dimension: `Phase`, and which taps each of its elements reads."""

    first: Integer
    count: Integer
    shift: Integer
    start: Integer  # number of its first weight
    tap_step: Integer
    # three numbers for each element: where it reads its first tap, which one, and how many; of those within the input,
    # and of all
    within: Integers
    every: Integers


class WidthPhase(PhaseEntry):
    """Its taps are cut into runs of neighbours."""

    function: Integer
    runs: Integer
    neighbours: Integer
    weights: Integer  # of a run


class TapGroup(Record):
    """Rows of the filter that the weight gradient takes at once."""

    function: Integer
    rows: Integer


class Dimension(Record):
    """A dimension: `Line`, and its tiles."""

    source: Integers  # which input coordinate stands at a padded one; below 0: none
    before: Integer
    length: Integer
    stride: Integer
    step: Integer
    out: Integer
    whole: Integer  # elements of all phases together
    tile: Integer  # elements of each phase in a tile
    tiles: Integer
    reach: Integer
    phases: Integer


class Box(Record):
    """From one to the next, in elements."""

    depth: Integer
    row: Integer
    column: Integer


class Way(Record):
    """Where pixels are read and written: in the arrays, in the slab, or in what is copied to and from the output."""

    x: Box
    y: Box
    steps: PointerTo[Steps]  # for each phase
    gradient: PointerTo[GradientSteps]


class Parameters(tasks.Parameters):
    operands: Operands
    x: ArraySteps
    y: ArraySteps
    # do the channels of a pixel follow one another, and the rows of a tile?
    x_pixels: Integer
    y_pixels: Integer
    x_rows: Integer
    y_rows: Integer
    channels: Integer
    batch: Integer
    units: Integer
    unit_tasks: Integer
    splits: Integer
    blocks: Integer  # in a group that is read side by side
    reads_in_place: Integer
    strip: Integer  # rows of output that are computed before more are copied into the slab
    prefetches: Integer  # does a weight gradient?
    blank: Integer  # elements of zeros that stand in for what is not there
    # weights of a filter, of a plane of it and of a row
    taps: Integer
    taps_of_plane: Integer
    taps_of_row: Integer
    # where pixels, and weights, are copied to
    x_places: Integers
    y_places: Integers
    w_places: Integers
    slab: Integer  # elements
    copied: Integer  # elements of the output in the scratch memory
    depth: Dimension
    height: Dimension
    width: Dimension
    depths: PointerTo[PhaseEntry]
    heights: PointerTo[PhaseEntry]
    widths: PointerTo[WidthPhase]
    tap_groups: Integer
    groups: PointerTo[TapGroup]
    in_place: Way
    to_y: Way  # from the slab
    to_copy: Way  # from the slab


# ---------------------------------------------------------------------------------------------------------------------
# Between the arrays and the vectors of channels
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _spread(target, places, source, pixels_first, channel_step, pixel_step, count, channels):
    """Copy `count` pixels that follow one another in the array to target[places[k]]."""
    if pixels_first:
        move.spread_pixels(target, places, source, pixel_step, count, channels)
    else:
        move.spread_planes(target, places, source, channel_step, count, channels)


@_jit
def _fill_slab(p, slab, x, channels, first_d, depth, first_h, height, first_w, width):
    """Copy a box of padded coordinates of a block. What is zero was written before."""
    source_d, places = p.depth.source, p.x_places
    low_h = max(p.height.before, first_h)
    rows = min(p.height.before + p.height.length, first_h + height) - low_h
    low_w = max(p.width.before, first_w)
    columns = min(p.width.before + p.width.length, first_w + width) - low_w
    if rows <= 0 or columns <= 0:
        return
    runs, pixels = (1, rows * columns) if p.x_rows else (rows, columns)
    for d in range(depth):
        from_d = source_d[first_d + d]
        if from_d < 0:
            continue
        plane = offset(
            x, from_d * p.x.depth + (low_h - p.height.before) * p.x.row + (low_w - p.width.before) * p.x.column
        )
        target = offset(
            slab, d * p.to_copy.x.depth + (low_h - first_h) * p.to_copy.x.row + (low_w - first_w) * lanes_of(slab)
        )
        for r in range(runs):
            _spread(
                offset(target, r * p.to_copy.x.row), places, offset(plane, r * p.x.row), p.x_pixels, p.x.channel,
                p.x.column, pixels, channels,
            )  # fmt: skip


@_jit
def _load_tile(p, out, y, channels, depth, height, width):
    """Copy a box of the output (or of its gradient) into out [d][h][w][lane]."""
    places = p.y_places
    runs, pixels = (1, height * width) if p.y_rows else (height, width)
    for d in range(depth):
        for r in range(runs):
            _spread(
                offset(out, d * p.to_copy.y.depth + r * p.to_copy.y.row), places,
                offset(y, d * p.y.depth + r * p.y.row), p.y_pixels, p.y.channel, p.y.column, pixels, channels,
            )  # fmt: skip


@_jit
def _store_tile(p, y, out, channels, depth, height, width):
    """The reverse of `_load_tile`."""
    runs, pixels = (1, height * width) if p.y_rows else (height, width)
    for d in range(depth):
        for r in range(runs):
            target = offset(y, d * p.y.depth + r * p.y.row)
            source = offset(out, d * p.to_copy.y.depth + r * p.to_copy.y.row)
            if p.y_pixels:
                move.collect_pixels(target, p.y.column, source, lanes_of(out), pixels, channels)
            else:
                move.collect_planes(target, p.y.channel, source, lanes_of(out), pixels, channels)


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass and the input gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _correlate_tile(
    p, way, y, x, blocks, in_place, w, bias, zeros, flags, every, first_d, last_d, first_h, last_h, first_w, last_w
):  # fmt: skip
    """A tile of the output of `blocks` blocks, which begins at y, from pixels whose padded coordinate 0 is at x."""
    lanes = lanes_of(x)
    for i in range(p.depth.phases):
        depth = p.depths[i]
        reach_d = depth.every if every else depth.within
        for j in range(p.height.phases):
            height = p.heights[j]
            reach_h = offset(height.every if every else height.within, 3 * first_h)
            rows = min(last_h, height.count) - first_h
            for k in range(p.width.phases):
                width = p.widths[k]
                columns = min(last_w, width.count) - first_w
                if rows <= 0 or columns <= 0:
                    continue
                first = width.shift + first_w * p.width.stride
                low, high = 0, _EVERYTHING
                if in_place:
                    step = p.width.stride if width.neighbours == 1 else 1  # from a neighbour to the next
                    low = -((first - p.width.before) // step)
                    high = -((first - p.width.before - p.width.length) // step)
                steps = way.steps[(i * p.height.phases + j) * p.width.phases + k]
                for d in range(first_d, min(last_d, depth.count)):
                    at_d = depth.first + (d - first_d) * p.depth.step
                    correlate_pixels(
                        width.function,
                        offset(y, at_d * way.y.depth + height.first * way.y.row + width.first * way.y.column),
                        offset(x, reach_d[3 * d] * way.x.depth + first * way.x.column),
                        offset(w, (reach_d[3 * d + 1] * p.taps_of_plane + width.start) * lanes),
                        bias, zeros, reach_h, blocks, rows, columns, low, high, reach_d[3 * d + 2], steps, flags,
                    )  # fmt: skip


@_jit
def _load_weights(p, w, bias, first, channels):
    """Weights as [tap][lane], in the order of the phases, and the bias; return whether all weights are finite."""
    filters = offset(p.operands.w, first * p.taps)
    move.spread_planes(w, p.w_places, filters, p.taps, p.taps, channels)
    for k in range(lanes_of(w)):
        bias[k] = -0.0  # adding it changes nothing
    if pointer_address(p.operands.bias) != 0:
        given = offset(p.operands.bias, first)
        for k in range(channels):
            bias[k] = given[k]
    return move.count_not_finite(w, p.taps) == 0


@_jit
def _place(p, unit):
    """Group of blocks, sample and first element in each dimension of a unit.

    Units that share a slab follow one another, since its border is written once; without one, those that share memory.
    """
    tiles = p.depth.tiles * p.height.tiles * p.width.tiles
    if p.reads_in_place:
        tile, rest = unit % tiles, unit // tiles
        n, group = rest % p.batch, rest // p.batch
    else:
        n, rest = unit % p.batch, unit // p.batch
        groups = p.units // (p.batch * tiles)
        group, tile = rest % groups, rest // groups
    first_w = tile % p.width.tiles * p.width.tile
    first_h = tile // p.width.tiles % p.height.tiles * p.height.tile
    first_d = tile // p.width.tiles // p.height.tiles * p.depth.tile
    return group, n, tile, first_d, first_h, first_w


@_jit
def _correlate_in_place(
    p, x, y, blocks, w, bias, zeros, flags, first_d, last_d, first_h, last_h, first_w, last_w
):  # fmt: skip
    """A tile of `blocks` blocks of a sample, whose first channels are at x and y."""
    origin = p.depth.before * p.x.depth + p.height.before * p.x.row + p.width.before * p.x.column
    out_d, out_h, out_w = first_d * p.depth.step, first_h * p.height.step, first_w * p.width.step
    y = offset(y, out_d * p.y.depth + out_h * p.y.row + out_w * p.y.column)
    _correlate_tile(
        p, p.in_place, y, offset(x, -origin), blocks, True, w, bias, zeros, flags, False, first_d, last_d, first_h,
        last_h, first_w, last_w,
    )  # fmt: skip


@_jit
def _correlate_block(
    p, slab, x, y, channels, w, bias, zeros, flags, finite, first_d, last_d, first_h, last_h, first_w, last_w
):  # fmt: skip
    """A tile of a block of a sample, whose first channel is at x and y, by way of the slab."""
    lanes = lanes_of(slab)
    out = offset(slab, p.slab)
    depth = min((last_d - first_d) * p.depth.step, p.depth.whole - first_d * p.depth.step)
    width = min((last_w - first_w) * p.width.step, p.width.whole - first_w * p.width.step)
    y = offset(y, first_d * p.depth.step * p.y.depth + first_w * p.width.step * p.y.column)
    box_d, box_h, box_w = first_d * p.depth.stride, first_h * p.height.stride, first_w * p.width.stride
    pixels = offset(slab, -(box_d * p.to_copy.x.depth + box_h * p.to_copy.x.row + box_w * lanes))
    filled = box_h
    for h in range(first_h, last_h, p.strip):
        end = min(h + p.strip, last_h)
        reached = (end - 1) * p.height.stride + p.height.reach
        _fill_slab(
            p, offset(slab, (filled - box_h) * p.to_copy.x.row), x, channels,
            box_d, (last_d - 1 - first_d) * p.depth.stride + p.depth.reach, filled, reached - filled,
            box_w, (last_w - 1 - first_w) * p.width.stride + p.width.reach,
        )  # fmt: skip
        filled = reached
        target = offset(y, h * p.height.step * p.y.row)
        if p.y_pixels and channels == lanes:
            _correlate_tile(
                p, p.to_y, target, pixels, 1, False, w, bias, zeros, flags, not finite, first_d, last_d, h, end,
                first_w, last_w,
            )  # fmt: skip
        else:
            height = min((end - h) * p.height.step, p.height.whole - h * p.height.step)
            if p.operands.add:
                _load_tile(p, out, target, channels, depth, height, width)
            _correlate_tile(
                p, p.to_copy, out, pixels, 1, False, w, bias, zeros, flags, not finite, first_d, last_d, h, end,
                first_w, last_w,
            )  # fmt: skip
            _store_tile(p, target, out, channels, depth, height, width)


@tasks.body(Parameters)
def correlate(task, worker, p, real):
    """Task = a range of units: (tile, group of blocks, sample)."""
    lanes = lanes_of(real)
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    zeros = offset(slab, p.slab + p.copied)
    weights = offset(zeros, lanes)
    fill_zero(zeros, lanes)
    flags = (gemm.ADD if p.operands.add else 0) | (gemm.RELU if p.operands.relu else 0)
    loaded, zeroed, finite = -1, -1, True
    for unit in range(task * p.units // p.unit_tasks, (task + 1) * p.units // p.unit_tasks):
        group, n, tile, first_d, first_h, first_w = _place(p, unit)
        last_d = min(first_d + p.depth.tile, p.depth.out)
        last_h = min(first_h + p.height.tile, p.height.out)
        last_w = min(first_w + p.width.tile, p.width.out)
        first = group * p.blocks * lanes
        last = min(first + p.blocks * lanes, p.channels)
        if group != loaded:
            loaded, finite = group, True
            for c in range(first, last, lanes):
                w = offset(weights, (c - first) * (p.taps + 1))
                if not _load_weights(p, w, offset(w, p.taps * lanes), c, min(lanes, last - c)):
                    finite = False
        x = offset(p.operands.x, n * p.x.sample)
        y = offset(p.operands.y, n * p.y.sample)
        if p.reads_in_place and finite:
            blocks = (last - first) // lanes
            if blocks > 0:
                _correlate_in_place(
                    p, offset(x, first), offset(y, first), blocks, weights,
                    offset(weights, p.taps * lanes), zeros, flags, first_d, last_d, first_h, last_h, first_w,
                    last_w,
                )  # fmt: skip
            first += blocks * lanes
        if tile != zeroed and first < last:
            fill_zero(slab, p.slab)
            zeroed = tile
        for c in range(first, last, lanes):
            w = offset(weights, (c - group * p.blocks * lanes) * (p.taps + 1))
            _correlate_block(
                p, slab, offset(x, c * p.x.channel), offset(y, c * p.y.channel), min(lanes, last - c), w,
                offset(w, p.taps * lanes), zeros, flags, finite, first_d, last_d, first_h, last_h, first_w,
                last_w,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _accumulate_tile(
    p, way, sums, x, dy, blocks, in_place, zeros, first_d, first_h, first_w, depth, height, width, x_prefetch,
    dy_prefetch,
):  # fmt: skip
    """Add what a tile of the output gradient of `blocks` blocks contributes to sums [block][tap][lane].

    What the first tap of its first element reads is at x. What comes next is x_prefetch and dy_prefetch further on.
    """
    lanes = lanes_of(x)
    in_depth, in_height, in_width = p.depths[0], p.heights[0], p.widths[0]
    low, high, first_row, rows = 0, _EVERYTHING, 0, _EVERYTHING
    if in_place:
        step = p.width.stride if in_width.neighbours == 1 else 1  # from a neighbour to the next
        before = p.width.before - first_w * p.width.stride
        low, high = -(-before // step), -(-(before + p.width.length) // step)
        first_row = first_h * p.height.stride - p.height.before
    for d in range(depth):
        for a in range(p.taps // p.taps_of_plane):
            at_d = d * p.depth.stride + a * in_depth.tap_step
            if in_place:
                rows = p.height.length if p.depth.source[first_d * p.depth.stride + at_d] >= 0 else 0
            tap = 0
            for n in range(p.tap_groups):
                group = p.groups[n]
                at_h = tap * in_height.tap_step
                for run in range(in_width.runs):
                    at_w = run * in_width.neighbours * in_width.tap_step
                    accumulate_pixels(
                        group.function,
                        offset(sums, (a * p.taps_of_plane + tap * p.taps_of_row + run * in_width.weights) * lanes),
                        offset(x, at_d * way.x.depth + at_h * way.x.row + at_w * way.x.column),
                        offset(dy, d * way.y.depth), zeros, blocks, height, width, low, high, first_row + at_h, rows,
                        x_prefetch, dy_prefetch, way.gradient,
                    )  # fmt: skip
                tap += group.rows


@tasks.body(Parameters)
def weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile, batch) of a range of groups of blocks."""
    lanes = lanes_of(real)
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    out = offset(slab, p.slab)
    zeros = offset(out, p.copied)
    sums = offset(zeros, p.blank)
    fill_zero(zeros, p.blank)
    part, split = task % p.unit_tasks, task // p.unit_tasks
    size = p.blocks * lanes
    groups = (p.channels + size - 1) // size
    zeroed = -1  # the tile whose border is in the slab
    for group in range(part * groups // p.unit_tasks, (part + 1) * groups // p.unit_tasks):
        first = group * size
        channels = min(size, p.channels - first)
        blocks = channels // lanes if p.reads_in_place else 0
        fill_zero(sums, p.blocks * p.taps * lanes)
        for unit in range(split * p.units // p.splits, (split + 1) * p.units // p.splits):
            _, n, tile, first_d, first_h, first_w = _place(p, unit)
            depth = min(p.depth.tile, p.depth.out - first_d)
            height = min(p.height.tile, p.height.out - first_h)
            width = min(p.width.tile, p.width.out - first_w)
            box_d, box_h, box_w = first_d * p.depth.stride, first_h * p.height.stride, first_w * p.width.stride
            x = offset(p.operands.x, n * p.x.sample + first * p.x.channel)
            dy = offset(
                p.operands.y,
                n * p.y.sample + first * p.y.channel + first_d * p.y.depth + first_h * p.y.row + first_w * p.y.column,
            )
            if blocks > 0:
                box = offset(
                    x, (box_d - p.depth.before) * p.x.depth + (box_h - p.height.before) * p.x.row
                    + (box_w - p.width.before) * p.x.column,
                )  # fmt: skip
                x_prefetch, dy_prefetch = 0, 0
                if p.prefetches:
                    _, after, _, d, h, w = _place(p, unit + 1)
                    after, d, h, w = after - n, d - first_d, h - first_h, w - first_w
                    dy_prefetch = after * p.y.sample + d * p.y.depth + h * p.y.row + w * p.y.column
                    x_prefetch = (
                        after * p.x.sample + d * p.depth.stride * p.x.depth + h * p.height.stride * p.x.row
                        + w * p.width.stride * p.x.column
                    )  # fmt: skip
                _accumulate_tile(
                    p, p.in_place, sums, box, dy, blocks, True, zeros, first_d, first_h, first_w, depth, height, width,
                    x_prefetch, dy_prefetch,
                )  # fmt: skip
            c = blocks * lanes
            if c == channels:
                continue
            if tile != zeroed:
                fill_zero(slab, p.slab)
                zeroed = tile
            _fill_slab(
                p, slab, offset(x, c * p.x.channel), channels - c,
                box_d, (depth - 1) * p.depth.stride + p.depth.reach,
                box_h, (height - 1) * p.height.stride + p.height.reach,
                box_w, (width - 1) * p.width.stride + p.width.reach,
            )  # fmt: skip
            dy = offset(dy, c * p.y.channel)
            into = offset(sums, c * p.taps)
            if p.y_pixels and channels - c == lanes:
                _accumulate_tile(
                    p, p.to_y, into, slab, dy, 1, False, zeros, first_d, first_h, first_w, depth, height, width, 0, 0
                )
            else:
                _load_tile(p, out, dy, channels - c, depth, height, width)
                _accumulate_tile(
                    p, p.to_copy, into, slab, out, 1, False, zeros, first_d, first_h, first_w, depth, height, width,
                    0, 0,
                )  # fmt: skip
        for c in range(0, channels, lanes):
            move.collect_planes(
                offset(p.operands.w, (split * p.channels + first + c) * p.taps), p.taps,
                offset(sums, c * p.taps), lanes, p.taps, min(lanes, channels - c),
            )  # fmt: skip
