"""What a task of `depthwise` does, and its parameters; and what those of every depthwise convolution begin with."""

from __future__ import annotations

from . import tasks
from .jit import helper as _jit
from .records import Integer, Integers, PointerTo, Reals, Record
from .vector import gemm, move
from .vector.depthwise_rows import accumulate_rows, correlate_rows, sum_lanes
from .vector.memory import at, fill_zero, offset, pointer_address
from .vector.tile import lanes as lanes_of


class Operands(Record):
    """What the parameters of each body begin with: the arrays of a call."""

    x: Reals
    w: Reals
    y: Reals  # the output, or in the weight gradient that of the output
    bias: Reals  # null: there is none
    relu: Integer
    add: Integer


NO_OPERANDS = (0,) * len(Operands.fields)


class RowSteps(Record):
    """From one to the next in an array, in elements."""

    sample: Integer
    channel: Integer
    depth: Integer
    row: Integer


class ArraySteps(RowSteps):
    column: Integer


class FilterRows(Record):
    """Rows of the filter that a function takes at once."""

    function: Integer
    shared: Integer  # do output rows share input rows in it?
    row: Integer  # the first one, among those of its phase


class PhaseEntry(Record):
    """A phase of a dimension: `Phase`, and its taps."""

    first: Integer
    count: Integer
    taps: Integer
    shift: Integer
    tap_step: Integer
    start: Integer  # number of its first tap
    classes: Integer  # output rows share what they read with every so-many-th
    blocks: Integer  # of rows of the filter
    rows: PointerTo[FilterRows]


class Dimension(Record):
    """A dimension: `Line`, and its tiles."""

    source: Integers  # which input coordinate stands at a padded one; below 0: none
    before: Integer
    length: Integer
    stride: Integer
    step: Integer
    out: Integer
    tile: Integer  # elements of each phase in a tile
    tiles: Integer
    reach: Integer
    phases: Integer
    entries: PointerTo[PhaseEntry]  # of the phases


class Parameters(tasks.Parameters):
    operands: Operands
    x: ArraySteps
    y: ArraySteps
    groups: Integer
    rows: Integer  # output channels of a group
    channels: Integer  # input channels of a group
    planes: Integer  # those of the output of all samples; in the weight gradient samples
    plane_tasks: Integer
    has_zeros: Integer  # is the border of zeros?
    taps: Integer  # of a filter
    taps_h: Integer
    taps_w: Integer
    offsets: Integers  # where the taps of a row are in the slab
    # of the slab: between the phases of the stride in a row, between rows, between planes, and all of it
    phase_pitch: Integer
    row_pitch: Integer
    plane_pitch: Integer
    slab: Integer
    # of the tile in which rows are put together, or copied: rows, between rows, and all of a phase
    tile_rows: Integer
    tile_pitch: Integer
    tile: Integer
    # of the weight gradient: (tile, sample), in so many parts; and is dy copied, as where it is not contiguous?
    units: Integer
    splits: Integer
    copies: Integer
    depth: Dimension
    height: Dimension
    width: Dimension


# ---------------------------------------------------------------------------------------------------------------------
# From the plane into the slab
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _fill_rows(p, slab, x, rows, first_u, length):
    """Copy `rows` rows of input that follow one another from `x` on; padded coordinate first_u is where they begin."""
    before, size, stride = p.width.before, p.width.length, p.width.stride
    step, phase_pitch, pitch = p.x.column, p.phase_pitch, p.row_pitch
    low, high = max(before, first_u), min(before + size, first_u + length)  # coordinates that are input elements
    count, first = high - low, low - first_u
    if count > 0:
        source = offset(x, (low - before) * step)
        if step == 1 and stride == 1:
            move.copy_block(offset(slab, first), pitch, source, p.x.row, rows, count)
        elif step == 1 and stride == 2:
            even = offset(slab, first % 2 * phase_pitch + first // 2)
            odd = offset(slab, (first + 1) % 2 * phase_pitch + (first + 1) // 2)
            move.separate_2(even, odd, pitch, source, p.x.row, rows, count)
        else:
            for phase in range(stride):
                i = (phase - first) % stride  # the first of these elements that is of this phase
                target = offset(slab, phase * phase_pitch + (first + i) // stride)
                for r in range(rows):
                    for k in range((count - i + stride - 1) // stride):
                        target[r * pitch + k] = source[r * p.x.row + (i + k * stride) * step]
    if not p.has_zeros:
        source_w = p.width.source
        for v in range(length):
            u = first_u + v
            if u < low or u >= high:
                place = v % stride * phase_pitch + v // stride
                for r in range(rows):
                    slab[r * pitch + place] = x[r * p.x.row + source_w[u] * step]


@_jit
def _fill_slab(p, slab, x, first_d, depth, first_h, height, first_w, width):
    """Copy a box of padded coordinates of one plane. What is zero was written before."""
    before, size = p.height.before, p.height.length
    source_d, source_h = p.depth.source, p.height.source
    low = min(max(before - first_h, 0), height)
    high = max(min(before + size - first_h, height), low)
    for d in range(depth):
        from_d = source_d[first_d + d]
        if from_d < 0:
            continue
        plane, target = offset(x, from_d * p.x.depth), offset(slab, d * p.plane_pitch)
        r = 0
        while r < height:
            rows = high - low if r == low and high > low else 1
            from_h = source_h[first_h + r]
            if from_h >= 0:
                _fill_rows(
                    p, offset(target, r * p.row_pitch), offset(plane, from_h * p.x.row), rows, first_w, width
                )
            r += rows


# ---------------------------------------------------------------------------------------------------------------------
# From the slab into the output
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _filter(p, target, pitch, rows, columns, slab, w, in_depth, in_height, in_width, flags, bias):
    """Rows of output of one phase, from the part of the slab where their first tap finds its first element."""
    taps_d, taps_w = in_depth.taps, in_width.taps
    row_step = in_height.classes * p.height.stride * p.row_pitch
    tap_step = in_height.tap_step * p.row_pitch
    offsets = offset(p.offsets, in_width.start)
    last = in_height.blocks - 1
    for a in range(taps_d):
        plane = offset(slab, a * in_depth.tap_step * p.plane_pitch)
        plane_w = offset(w, ((in_depth.start + a) * p.taps_h + in_height.start) * p.taps_w + in_width.start)
        for block in range(in_height.blocks):
            some = in_height.rows[block]
            change = flags & gemm.ADD if a == 0 and block == 0 else gemm.ADD
            if a == taps_d - 1 and block == last:
                change |= flags & (gemm.BIAS | gemm.RELU)
            correlate_rows(
                some.function, target, pitch, offset(plane, some.row * tap_step),
                tap_step if some.shared else row_step, offset(plane_w, some.row * p.taps_w), p.taps_w, taps_w, offsets,
                rows, columns, change, bias,
            )  # fmt: skip


@_jit
def _store(p, y, pitch, rows, tile, first_w, last_w, flags, bias):
    """Put the phases of `rows` rows together: tile [phase][row][column] into y, of any strides."""
    table = p.width.entries
    step, source_pitch = p.y.column, p.tile_pitch
    if p.width.phases == 2 and p.width.step == 2 and step == 1 and flags == 0:
        counts = min(last_w, table[0].count) + min(last_w, table[1].count) - 2 * first_w
        odd = offset(tile, p.tile)
        move.join_rows(offset(y, 2 * first_w), pitch, tile, odd, source_pitch, rows, counts)
        return
    for phase in range(p.width.phases):
        in_width = table[phase]
        for r in range(rows):
            source = offset(tile, phase * p.tile + r * source_pitch)
            place = r * pitch + (in_width.first + first_w * p.width.step) * step
            for q in range(min(last_w, in_width.count) - first_w):
                value = source[q]
                if flags & gemm.ADD:
                    value += y[place]
                if flags & gemm.BIAS:
                    value += bias[0]
                if flags & gemm.RELU and value < 0:
                    y[place] = 0
                else:
                    y[place] = value
                place += p.width.step * step


# One loop for each phase and each tile of a dimension.
@_jit
def _correlate_plane(p, y, slab, tile, w, bias, flags, first_d, last_d, first_h, last_h, first_w, last_w):
    """A tile of an output plane, from the slab and the filter `w`."""
    for i in range(p.depth.phases):
        in_depth = p.depth.entries[i]
        for j in range(p.height.phases):
            in_height = p.height.entries[j]
            classes = in_height.classes
            pitch = classes * p.height.step * p.y.row
            taps = in_depth.taps * in_height.taps
            straight = p.width.step == 1 and p.y.column == 1 and taps > 0
            for d in range(first_d, min(last_d, in_depth.count)):
                for first in range(first_h, min(first_h + classes, min(last_h, in_height.count))):
                    rows = min(last_h, in_height.count) - first
                    if classes > 1:
                        rows = (rows + classes - 1) // classes
                    r = 0
                    while r < rows:
                        h = first + r * classes
                        count = rows if straight else min(p.tile_rows, rows - r)
                        r += count
                        target = offset(
                            y, (in_depth.first + d * p.depth.step) * p.y.depth
                            + (in_height.first + h * p.height.step) * p.y.row,
                        )  # fmt: skip
                        source = offset(
                            slab, ((d - first_d) * p.depth.stride + in_depth.shift) * p.plane_pitch
                            + ((h - first_h) * p.height.stride + in_height.shift) * p.row_pitch,
                        )  # fmt: skip
                        for k in range(p.width.phases):
                            in_width = p.width.entries[k]
                            columns = min(last_w, in_width.count) - first_w
                            part = offset(tile, k * p.tile)
                            if taps * in_width.taps == 0:
                                fill_zero(part, p.tile)
                            elif columns > 0:
                                _filter(
                                    p, offset(target, first_w) if straight else part,
                                    pitch if straight else p.tile_pitch, count, columns, source, w, in_depth,
                                    in_height, in_width, flags if straight else 0, bias,
                                )  # fmt: skip
                        if not straight:
                            _store(p, target, pitch, count, tile, first_w, last_w, flags, bias)


@tasks.body(Parameters)
def correlate(task, worker, p, real):
    """Task = a tile of the plane, and a range of planes (batch, group)."""
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    tile = offset(slab, p.slab)
    part, rest = task % p.plane_tasks, task // p.plane_tasks
    first_w = rest % p.width.tiles * p.width.tile
    rest = rest // p.width.tiles
    first_h = rest % p.height.tiles * p.height.tile
    first_d = rest // p.height.tiles * p.depth.tile
    last_d = min(first_d + p.depth.tile, p.depth.out)
    last_h = min(first_h + p.height.tile, p.height.out)
    last_w = min(first_w + p.width.tile, p.width.out)
    depth = (last_d - 1 - first_d) * p.depth.stride + p.depth.reach
    height = (last_h - 1 - first_h) * p.height.stride + p.height.reach
    width = (last_w - 1 - first_w) * p.width.stride + p.width.reach
    if p.has_zeros:
        fill_zero(slab, p.slab)
    for plane in range(part * p.planes // p.plane_tasks, (part + 1) * p.planes // p.plane_tasks):
        n, group = plane // p.groups, plane % p.groups
        for c in range(p.channels):
            flags = gemm.ADD if c > 0 or p.operands.add else 0
            if c == p.channels - 1:
                flags |= gemm.RELU if p.operands.relu else 0
                flags |= gemm.BIAS if pointer_address(p.operands.bias) != 0 else 0
            x = offset(p.operands.x, n * p.x.sample + (group * p.channels + c) * p.x.channel)
            _fill_slab(
                p, slab, x, first_d * p.depth.stride, depth, first_h * p.height.stride, height,
                first_w * p.width.stride, width,
            )  # fmt: skip
            for i in range(p.rows):
                o = group * p.rows + i
                y = offset(p.operands.y, n * p.y.sample + o * p.y.channel)
                w = offset(p.operands.w, (o * p.channels + c) * p.taps)
                bias = offset(p.operands.bias, o)
                _correlate_plane(
                    p, y, slab, tile, w, bias, flags, first_d, last_d, first_h, last_h, first_w, last_w
                )


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _accumulate_plane(p, sums, slab, copy, dy, first_d, last_d, first_h, last_h, first_w, last_w):
    """Add what a tile of a plane of the output gradient contributes to the gradient of its filter."""
    in_depth, in_height = p.depth.entries[0], p.height.entries[0]
    offsets = p.offsets
    classes, columns = in_height.classes, last_w - first_w
    row_step = classes * p.height.stride * p.row_pitch
    tap_step = in_height.tap_step * p.row_pitch
    for d in range(first_d, last_d):
        gradient = offset(dy, d * p.y.depth + first_h * p.y.row + first_w * p.y.column)
        pitch = p.y.row
        if p.copies:  # rows whose elements do not follow one another
            pitch = columns
            for h in range(last_h - first_h):
                for q in range(columns):
                    copy[h * columns + q] = gradient[h * p.y.row + q * p.y.column]
            gradient = copy
        for first in range(min(classes, last_h - first_h)):
            rows = last_h - first_h - first
            if classes > 1:
                rows = (rows + classes - 1) // classes
            source = offset(
                slab, (d - first_d) * p.depth.stride * p.plane_pitch + first * p.height.stride * p.row_pitch
            )
            for a in range(in_depth.taps):
                plane = offset(source, a * in_depth.tap_step * p.plane_pitch)
                for block in range(in_height.blocks):
                    some = in_height.rows[block]
                    accumulate_rows(
                        some.function, offset(sums, (a * p.taps_h + some.row) * p.taps_w * lanes_of(sums)), p.taps_w,
                        offset(plane, some.row * tap_step), tap_step if some.shared else row_step, offsets, p.taps_w,
                        offset(gradient, first * pitch), classes * pitch, rows, columns,
                    )  # fmt: skip


@tasks.body(Parameters)
def weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile, batch) of a range of groups."""
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    copy = offset(slab, p.slab)
    sums = offset(copy, p.tile)
    part, split = task % p.plane_tasks, task // p.plane_tasks
    batch = p.planes
    filters = p.rows * p.taps
    zeroed = -1  # the tile whose border is in the slab
    for group in range(part * p.groups // p.plane_tasks, (part + 1) * p.groups // p.plane_tasks):
        fill_zero(sums, filters * lanes_of(real))
        for unit in range(split * p.units // p.splits, (split + 1) * p.units // p.splits):
            tile, n = unit // batch, unit % batch
            first_w = tile % p.width.tiles * p.width.tile
            first_h = tile // p.width.tiles % p.height.tiles * p.height.tile
            first_d = tile // p.width.tiles // p.height.tiles * p.depth.tile
            last_d = min(first_d + p.depth.tile, p.depth.out)
            last_h = min(first_h + p.height.tile, p.height.out)
            last_w = min(first_w + p.width.tile, p.width.out)
            if p.has_zeros and tile != zeroed:
                fill_zero(slab, p.slab)
                zeroed = tile
            _fill_slab(
                p, slab, offset(p.operands.x, n * p.x.sample + group * p.x.channel),
                first_d * p.depth.stride, (last_d - 1 - first_d) * p.depth.stride + p.depth.reach,
                first_h * p.height.stride, (last_h - 1 - first_h) * p.height.stride + p.height.reach,
                first_w * p.width.stride, (last_w - 1 - first_w) * p.width.stride + p.width.reach,
            )  # fmt: skip
            for i in range(p.rows):
                _accumulate_plane(
                    p, offset(sums, i * p.taps * lanes_of(real)), slab, copy,
                    offset(p.operands.y, n * p.y.sample + (group * p.rows + i) * p.y.channel),
                    first_d, last_d, first_h, last_h, first_w, last_w,
                )  # fmt: skip
        sum_lanes(
            offset(p.operands.w, (split * p.groups + group) * filters), sums, filters
        )
