"""Convolutions with one input channel in a group: depthwise ones, and filters of a single plane.

A group is a plane of input and few planes of output (as many as the channel multiplier says), each the plane
correlated with a filter of its own. There is no matrix product in that, and little arithmetic for each element read, so
the engine of `contraction` would spend its time on packing. Here a tile of the plane is copied once, with its border,
into the *slab* in the nearest caches (this is where stride, padding and any memory layout are absorbed, as there), and
`correlate_rows` reads from it whole vectors of a row, several output rows at a time.

The same body does the forward pass and the input gradient. In the input gradient, a *phase* in a dimension is every
stride-th element: those that see the same taps of the filter. The phases of a tile share its slab, and the phases of a
row are put together as it is stored. In the forward pass there is one phase.

What is added up in which order depends on the filter alone: the bits of an element depend neither on the tile it is in,
nor on threads or batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import types

from ..geometry import ConvGeometry
from . import tasks
from .compiler import BodyCompiler
from .contraction import Axis, Strides, address
from .jit import REAL, compiled
from .jit import helper as _jit
from .records import Integer, Reals, Record
from .vector import gemm, move
from .vector.depthwise_rows import SHARED_ROWS, Taps, accumulate_rows, correlate_rows, sum_lanes
from .vector.memory import at, fill_zero, offset
from .vector.tile import lanes as lanes_of
from .vector.tile import tile as tile_for

# Parameters of the bodies (int64, in this order), and
(
    X, W, Y, BIAS, RELU, ADD,
    X_N, X_C, X_D, X_H, X_W, Y_N, Y_O, Y_D, Y_H, Y_W,
    GROUPS, ROWS, CHANNELS, PLANES, PLANE_TASKS, ZEROS, TAPS, TAPS_H, TAPS_W, OFFSETS,
    PHASE_PITCH, ROW_PITCH, PLANE_PITCH, SLAB_SIZE, TILE_ROWS, TILE_PITCH, TILE_SIZE,
    UNITS, SPLITS, COPY, DEPTH, HEIGHT, WIDTH, END,
) = (*range(tasks.FIRST, tasks.FIRST + 37), *(tasks.FIRST + 36 + 11 * n for n in range(1, 4)))  # fmt: skip
# those of a dimension, from DEPTH, HEIGHT and WIDTH on, and
SOURCE, BEFORE, SIZE, STRIDE, STEP, OUT, TILE, TILES, REACH, PHASES, TABLE = range(11)
# those of a phase, in the table of its dimension.
FIRST, COUNT, PHASE_TAPS, SHIFT, TAP_STEP, START, CLASSES, BLOCKS, PHASE_FIELDS = range(9)



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


SLAB_BYTES = 192 * 1024
# Rows of the filter that `correlate_rows` takes at once. With up to seven, filters of 7x7 to 15x15 took 1.3 to 1.9
# times as long on planes of 512 x 512 (AVX-512).
_MOST_SHARED = 5
_TILE_BYTES = 64 * 1024  # rows that are put together before they are stored, where they cannot be stored at once
# Input and output together, in bytes, from where on they are asked for ahead of time: pieces of rows, or of pixels, are
# not what the processor foresees. Of arrays that were in no cache, those of 5 to 24 MB took 1.1 to 2.3 times as long
# without (one thread; two: up to 1.5). Where calls follow one another, those of 4 to 16 MB, which the third cache holds
# then, take up to 8 % longer with it, and those of 24 MB 0.7 to 0.9 times as long.
PREFETCH_BYTES = 16 * 1024 * 1024
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


# ---------------------------------------------------------------------------------------------------------------------
# From the plane into the slab
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _fill_rows(p, slab, x, rows, first_u, length):
    """Copy `rows` rows of input that follow one another from `x` on; padded coordinate first_u is where they begin."""
    before, size, stride = p[WIDTH + BEFORE], p[WIDTH + SIZE], p[WIDTH + STRIDE]
    step, phase_pitch, pitch = p[X_W], p[PHASE_PITCH], p[ROW_PITCH]
    low, high = max(before, first_u), min(before + size, first_u + length)  # coordinates that are input elements
    count, first = high - low, low - first_u
    if count > 0:
        source = offset(x, (low - before) * step)
        if step == 1 and stride == 1:
            move.copy_block(offset(slab, first), pitch, source, p[X_H], rows, count)
        elif step == 1 and stride == 2:
            even = offset(slab, first % 2 * phase_pitch + first // 2)
            odd = offset(slab, (first + 1) % 2 * phase_pitch + (first + 1) // 2)
            move.separate_2(even, odd, pitch, source, p[X_H], rows, count)
        else:
            for phase in range(stride):
                i = (phase - first) % stride  # the first of these elements that is of this phase
                target = offset(slab, phase * phase_pitch + (first + i) // stride)
                for r in range(rows):
                    for k in range((count - i + stride - 1) // stride):
                        target[r * pitch + k] = source[r * p[X_H] + (i + k * stride) * step]
    if not p[ZEROS]:
        source_w = at(p, p[WIDTH + SOURCE])
        for v in range(length):
            u = first_u + v
            if u < low or u >= high:
                place = v % stride * phase_pitch + v // stride
                for r in range(rows):
                    slab[r * pitch + place] = x[r * p[X_H] + source_w[u] * step]


@_jit
def _fill_slab(p, slab, x, first_d, depth, first_h, height, first_w, width):
    """Copy a box of padded coordinates of one plane. What is zero was written before."""
    before, size = p[HEIGHT + BEFORE], p[HEIGHT + SIZE]
    source_d, source_h = at(p, p[DEPTH + SOURCE]), at(p, p[HEIGHT + SOURCE])
    low = min(max(before - first_h, 0), height)
    high = max(min(before + size - first_h, height), low)
    for d in range(depth):
        from_d = source_d[first_d + d]
        if from_d < 0:
            continue
        plane, target = offset(x, from_d * p[X_D]), offset(slab, d * p[PLANE_PITCH])
        r = 0
        while r < height:
            rows = high - low if r == low and high > low else 1
            from_h = source_h[first_h + r]
            if from_h >= 0:
                _fill_rows(
                    p, offset(target, r * p[ROW_PITCH]), offset(plane, from_h * p[X_H]), rows, first_w, width
                )
            r += rows


# ---------------------------------------------------------------------------------------------------------------------
# From the slab into the output
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _filter(p, target, pitch, rows, columns, slab, w, in_depth, in_height, in_width, flags, bias):
    """Rows of output of one phase, from the part of the slab where their first tap finds its first element."""
    taps_d, taps_w = in_depth[PHASE_TAPS], in_width[PHASE_TAPS]
    row_step = in_height[CLASSES] * p[HEIGHT + STRIDE] * p[ROW_PITCH]
    tap_step = in_height[TAP_STEP] * p[ROW_PITCH]
    offsets = offset(at(p, p[OFFSETS]), in_width[START])
    blocks = offset(in_height, in_height[BLOCKS])
    last = blocks[0] - 1
    for a in range(taps_d):
        plane = offset(slab, a * in_depth[TAP_STEP] * p[PLANE_PITCH])
        plane_w = offset(w, ((in_depth[START] + a) * p[TAPS_H] + in_height[START]) * p[TAPS_W] + in_width[START])
        for block in range(blocks[0]):
            function, shared, i = blocks[3 * block + 1], blocks[3 * block + 2], blocks[3 * block + 3]
            change = flags & gemm.ADD if a == 0 and block == 0 else gemm.ADD
            if a == taps_d - 1 and block == last:
                change |= flags & (gemm.BIAS | gemm.RELU)
            correlate_rows(
                function, target, pitch, offset(plane, i * tap_step), tap_step if shared else row_step,
                offset(plane_w, i * p[TAPS_W]), p[TAPS_W], taps_w, offsets, rows, columns, change, bias,
            )  # fmt: skip


@_jit
def _store(p, y, pitch, rows, tile, first_w, last_w, flags, bias):
    """Put the phases of `rows` rows together: tile [phase][row][column] into y, of any strides."""
    table = at(p, p[WIDTH + TABLE])
    step, source_pitch = p[Y_W], p[TILE_PITCH]
    if p[WIDTH + PHASES] == 2 and p[WIDTH + STEP] == 2 and step == 1 and flags == 0:
        counts = min(last_w, table[COUNT]) + min(last_w, table[PHASE_FIELDS + COUNT]) - 2 * first_w
        odd = offset(tile, p[TILE_SIZE])
        move.join_rows(offset(y, 2 * first_w), pitch, tile, odd, source_pitch, rows, counts)
        return
    for phase in range(p[WIDTH + PHASES]):
        in_width = offset(table, phase * PHASE_FIELDS)
        for r in range(rows):
            source = offset(tile, phase * p[TILE_SIZE] + r * source_pitch)
            place = r * pitch + (in_width[FIRST] + first_w * p[WIDTH + STEP]) * step
            for q in range(min(last_w, in_width[COUNT]) - first_w):
                value = source[q]
                if flags & gemm.ADD:
                    value += y[place]
                if flags & gemm.BIAS:
                    value += bias[0]
                if flags & gemm.RELU and value < 0:
                    y[place] = 0
                else:
                    y[place] = value
                place += p[WIDTH + STEP] * step


@_jit
def _correlate_plane(p, y, slab, tile, w, bias, flags, first_d, last_d, first_h, last_h, first_w, last_w):
    """A tile of an output plane, from the slab and the filter `w`."""
    depths, heights, widths = at(p, p[DEPTH + TABLE]), at(p, p[HEIGHT + TABLE]), at(p, p[WIDTH + TABLE])
    for i in range(p[DEPTH + PHASES]):
        in_depth = offset(depths, i * PHASE_FIELDS)
        for j in range(p[HEIGHT + PHASES]):
            in_height = offset(heights, j * PHASE_FIELDS)
            classes = in_height[CLASSES]
            pitch = classes * p[HEIGHT + STEP] * p[Y_H]
            taps = in_depth[PHASE_TAPS] * in_height[PHASE_TAPS]
            straight = p[WIDTH + STEP] == 1 and p[Y_W] == 1 and taps > 0
            for d in range(first_d, min(last_d, in_depth[COUNT])):
                for first in range(first_h, min(first_h + classes, min(last_h, in_height[COUNT]))):
                    rows = min(last_h, in_height[COUNT]) - first
                    if classes > 1:
                        rows = (rows + classes - 1) // classes
                    r = 0
                    while r < rows:
                        h = first + r * classes
                        count = rows if straight else min(p[TILE_ROWS], rows - r)
                        r += count
                        target = offset(
                            y, (in_depth[FIRST] + d * p[DEPTH + STEP]) * p[Y_D]
                            + (in_height[FIRST] + h * p[HEIGHT + STEP]) * p[Y_H],
                        )  # fmt: skip
                        source = offset(
                            slab, ((d - first_d) * p[DEPTH + STRIDE] + in_depth[SHIFT]) * p[PLANE_PITCH]
                            + ((h - first_h) * p[HEIGHT + STRIDE] + in_height[SHIFT]) * p[ROW_PITCH],
                        )  # fmt: skip
                        for k in range(p[WIDTH + PHASES]):
                            in_width = offset(widths, k * PHASE_FIELDS)
                            columns = min(last_w, in_width[COUNT]) - first_w
                            part = offset(tile, k * p[TILE_SIZE])
                            if taps * in_width[PHASE_TAPS] == 0:
                                fill_zero(part, p[TILE_SIZE])
                            elif columns > 0:
                                _filter(
                                    p, offset(target, first_w) if straight else part,
                                    pitch if straight else p[TILE_PITCH], count, columns, source, w, in_depth,
                                    in_height, in_width, flags if straight else 0, bias,
                                )  # fmt: skip
                        if not straight:
                            _store(p, target, pitch, count, tile, first_w, last_w, flags, bias)


@tasks.Body
def _correlate(task, worker, p, real):
    """Task = a tile of the plane, and a range of planes (batch, group)."""
    slab = at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    tile = offset(slab, p[SLAB_SIZE])
    part, rest = task % p[PLANE_TASKS], task // p[PLANE_TASKS]
    first_w = rest % p[WIDTH + TILES] * p[WIDTH + TILE]
    rest = rest // p[WIDTH + TILES]
    first_h = rest % p[HEIGHT + TILES] * p[HEIGHT + TILE]
    first_d = rest // p[HEIGHT + TILES] * p[DEPTH + TILE]
    last_d = min(first_d + p[DEPTH + TILE], p[DEPTH + OUT])
    last_h = min(first_h + p[HEIGHT + TILE], p[HEIGHT + OUT])
    last_w = min(first_w + p[WIDTH + TILE], p[WIDTH + OUT])
    depth = (last_d - 1 - first_d) * p[DEPTH + STRIDE] + p[DEPTH + REACH]
    height = (last_h - 1 - first_h) * p[HEIGHT + STRIDE] + p[HEIGHT + REACH]
    width = (last_w - 1 - first_w) * p[WIDTH + STRIDE] + p[WIDTH + REACH]
    if p[ZEROS]:
        fill_zero(slab, p[SLAB_SIZE])
    for plane in range(part * p[PLANES] // p[PLANE_TASKS], (part + 1) * p[PLANES] // p[PLANE_TASKS]):
        n, group = plane // p[GROUPS], plane % p[GROUPS]
        for c in range(p[CHANNELS]):
            flags = gemm.ADD if c > 0 or p[ADD] else 0
            if c == p[CHANNELS] - 1:
                flags |= (gemm.BIAS if p[BIAS] else 0) | (gemm.RELU if p[RELU] else 0)
            x = offset(at(real, p[X]), n * p[X_N] + (group * p[CHANNELS] + c) * p[X_C])
            _fill_slab(
                p, slab, x, first_d * p[DEPTH + STRIDE], depth, first_h * p[HEIGHT + STRIDE], height,
                first_w * p[WIDTH + STRIDE], width,
            )  # fmt: skip
            for i in range(p[ROWS]):
                o = group * p[ROWS] + i
                y = offset(at(real, p[Y]), n * p[Y_N] + o * p[Y_O])
                w = offset(at(real, p[W]), (o * p[CHANNELS] + c) * p[TAPS])
                bias = offset(at(real, p[BIAS]), o)
                _correlate_plane(
                    p, y, slab, tile, w, bias, flags, first_d, last_d, first_h, last_h, first_w, last_w
                )


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _accumulate_plane(p, sums, slab, copy, dy, first_d, last_d, first_h, last_h, first_w, last_w):
    """Add what a tile of a plane of the output gradient contributes to the gradient of its filter."""
    in_depth, in_height = at(p, p[DEPTH + TABLE]), at(p, p[HEIGHT + TABLE])
    offsets = at(p, p[OFFSETS])
    blocks = offset(in_height, in_height[BLOCKS])
    classes, columns = in_height[CLASSES], last_w - first_w
    row_step = classes * p[HEIGHT + STRIDE] * p[ROW_PITCH]
    tap_step = in_height[TAP_STEP] * p[ROW_PITCH]
    for d in range(first_d, last_d):
        gradient = offset(dy, d * p[Y_D] + first_h * p[Y_H] + first_w * p[Y_W])
        pitch = p[Y_H]
        if p[COPY]:  # rows whose elements do not follow one another
            pitch = columns
            for h in range(last_h - first_h):
                for q in range(columns):
                    copy[h * columns + q] = gradient[h * p[Y_H] + q * p[Y_W]]
            gradient = copy
        for first in range(min(classes, last_h - first_h)):
            rows = last_h - first_h - first
            if classes > 1:
                rows = (rows + classes - 1) // classes
            source = offset(
                slab, (d - first_d) * p[DEPTH + STRIDE] * p[PLANE_PITCH] + first * p[HEIGHT + STRIDE] * p[ROW_PITCH]
            )
            for a in range(in_depth[PHASE_TAPS]):
                plane = offset(source, a * in_depth[TAP_STEP] * p[PLANE_PITCH])
                for block in range(blocks[0]):
                    function, shared, i = blocks[3 * block + 1], blocks[3 * block + 2], blocks[3 * block + 3]
                    accumulate_rows(
                        function, offset(sums, (a * p[TAPS_H] + i) * p[TAPS_W] * lanes_of(sums)), p[TAPS_W],
                        offset(plane, i * tap_step), tap_step if shared else row_step, offsets, p[TAPS_W],
                        offset(gradient, first * pitch), classes * pitch, rows, columns,
                    )  # fmt: skip


@tasks.Body
def _weight_gradient(task, worker, p, real):
    """Task = a part of the units (tile, batch) of a range of groups."""
    slab = at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    copy = offset(slab, p[SLAB_SIZE])
    sums = offset(copy, p[TILE_SIZE])
    part, split = task % p[PLANE_TASKS], task // p[PLANE_TASKS]
    batch = p[PLANES]
    filters = p[ROWS] * p[TAPS]
    zeroed = -1  # the tile whose border is in the slab
    for group in range(part * p[GROUPS] // p[PLANE_TASKS], (part + 1) * p[GROUPS] // p[PLANE_TASKS]):
        fill_zero(sums, filters * lanes_of(real))
        for unit in range(split * p[UNITS] // p[SPLITS], (split + 1) * p[UNITS] // p[SPLITS]):
            tile, n = unit // batch, unit % batch
            first_w = tile % p[WIDTH + TILES] * p[WIDTH + TILE]
            first_h = tile // p[WIDTH + TILES] % p[HEIGHT + TILES] * p[HEIGHT + TILE]
            first_d = tile // p[WIDTH + TILES] // p[HEIGHT + TILES] * p[DEPTH + TILE]
            last_d = min(first_d + p[DEPTH + TILE], p[DEPTH + OUT])
            last_h = min(first_h + p[HEIGHT + TILE], p[HEIGHT + OUT])
            last_w = min(first_w + p[WIDTH + TILE], p[WIDTH + OUT])
            if p[ZEROS] and tile != zeroed:
                fill_zero(slab, p[SLAB_SIZE])
                zeroed = tile
            _fill_slab(
                p, slab, offset(at(real, p[X]), n * p[X_N] + group * p[X_C]),
                first_d * p[DEPTH + STRIDE], (last_d - 1 - first_d) * p[DEPTH + STRIDE] + p[DEPTH + REACH],
                first_h * p[HEIGHT + STRIDE], (last_h - 1 - first_h) * p[HEIGHT + STRIDE] + p[HEIGHT + REACH],
                first_w * p[WIDTH + STRIDE], (last_w - 1 - first_w) * p[WIDTH + STRIDE] + p[WIDTH + REACH],
            )  # fmt: skip
            for i in range(p[ROWS]):
                _accumulate_plane(
                    p, offset(sums, i * p[TAPS] * lanes_of(real)), slab, copy,
                    offset(at(real, p[Y]), n * p[Y_N] + (group * p[ROWS] + i) * p[Y_O]),
                    first_d, last_d, first_h, last_h, first_w, last_w,
                )  # fmt: skip
        sum_lanes(
            offset(at(real, p[W]), (split * p[GROUPS] + group) * filters), sums, filters
        )


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Output elements first, first + step, ... of one dimension, `count` of them, that meet the same `taps`.

    Element t of them meets the i-th of these taps at padded coordinate t * stride + shift + i * tap_step.
    """

    first: int
    count: int
    taps: tuple[int, ...]
    shift: int
    tap_step: int

    @property
    def reach(self) -> int:
        return self.shift + (len(self.taps) - 1) * self.tap_step + 1 if self.taps else 1


@dataclass(frozen=True)
class Line:
    """One dimension of the correlation: its padded input (`source`, as in `contraction.Axis`), and its phases."""

    stride: int  # between what consecutive elements of a phase meet
    step: int  # between consecutive elements of a phase
    source: np.ndarray
    before: int
    size: int
    phases: tuple[Phase, ...]

    @property
    def out(self) -> int:
        return max(phase.count for phase in self.phases)

    @property
    def whole(self) -> int:
        """Elements of all phases together."""
        return sum(phase.count for phase in self.phases)

    @property
    def reach(self) -> int:
        return max(phase.reach for phase in self.phases)

    @functools.cached_property
    def taps(self) -> tuple[int, ...]:
        return tuple(tap for phase in self.phases for tap in phase.taps)

    def length(self, out: int) -> int:
        return (out - 1) * self.stride + self.reach


Lines = tuple[Line, Line, Line]


def forward_line(axis: Axis) -> Line:
    phase = Phase(0, axis.out, tuple(range(axis.taps)), 0, axis.dilation)
    return Line(axis.stride, 1, axis.source, axis.before, axis.size, (phase,))


def backward_line(phases: tuple[tuple[tuple[int, ...], Axis], ...], stride: int, size: int) -> Line:
    """From the taps of each phase, and the correlation with the output gradient (`size` elements) that it is."""
    start = min((-axis.before for taps, axis in phases if taps), default=0)  # the first coordinate that any phase meets
    made = tuple(
        Phase(first, axis.out, taps, -axis.before - start if taps else 0, axis.dilation)
        for first, (taps, axis) in enumerate(phases)
    )
    line = Line(1, stride, np.zeros(0, np.int64), -start, size, made)
    u = np.arange(line.length(line.out), dtype=np.int64) + start
    return Line(1, stride, np.where((u >= 0) & (u < size), u, -1), -start, size, made)


@functools.cache
def cut(taps: int, allowed: tuple[int, ...]) -> tuple[int, ...]:
    """Cut a number of rows of the filter into numbers that there is a function for, as few as possible."""
    if taps == 0:
        return ()
    ways = ((*cut(taps - rows, allowed), rows) for rows in sorted(allowed, reverse=True) if rows <= taps)
    return min(ways, key=len)


_functions: list[Any] = []  # they must outlive their addresses


@functools.cache
def address_of(function: Callable[..., None], taps: int, stride: int, dtype: np.dtype) -> int:
    """Address of a function (taps, stride, arguments, real) for these taps and stride, compiled on first use.

    Not a part of the bodies, since Numba would compile every one of them with each, three times over.
    """
    signature = types.void(
        types.literal(taps), types.literal(stride), types.CPointer(types.int64), types.CPointer(REAL[dtype])
    )
    _functions.append(compiled(numba.cfunc, signature, function, pipeline_class=BodyCompiler))
    return _functions[-1].address


def _phase_table(line: Line, kernel: Any | None, dtype: np.dtype) -> np.ndarray:
    """The table of the phases of a dimension, with the blocks of rows of the filter that `kernel` takes at once.

    Output rows share the rows they read where a tap of one is another tap of the next: with a dilation, that is true of
    every tap_step-th row, a *class*.
    """
    table: list[int] = []
    blocks: list[int] = []
    start = 0
    for n, phase in enumerate(line.phases):
        divisor = math.gcd(line.stride, phase.tap_step)
        ratio, classes = line.stride // divisor, phase.tap_step // divisor
        most = _MOST_SHARED if kernel is correlate_rows else math.inf
        shared = [rows for rows, stride in SHARED_ROWS if stride == ratio and rows <= most]
        if not shared or len(phase.taps) == 1:
            shared, classes = [1], 1
        cuts = cut(len(phase.taps), (1, *shared)) if kernel else ()
        place = len(line.phases) * PHASE_FIELDS + len(blocks) - n * PHASE_FIELDS
        table += [phase.first, phase.count, len(phase.taps), phase.shift, phase.tap_step, start, classes, place]
        blocks.append(len(cuts))
        i = 0
        for rows in cuts:
            blocks += [kernel.address(dtype, Taps(rows, ratio if rows > 1 else 1)), rows > 1, i]
            i += rows
        start += len(phase.taps)
    return np.array(table + blocks, np.int64)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _tile(lines: Lines, lanes: int, budget: int) -> tuple[int, int, int]:
    """Elements of each phase and dimension in a tile, so that its slab has at most `budget` elements, if it can."""
    depth, height, width = lines
    d, h, w = 1, 1, width.out

    def size() -> int:
        return depth.length(d) * height.length(h) * _row_pitch(width, w, lanes)[1]

    h = min(height.out, 8)
    while w > 8 * lanes and max(size(), len(width.phases) * w) > budget:
        w = _ceil(_ceil(w, 2), 4 * lanes) * 4 * lanes
    room = budget // (depth.length(1) * _row_pitch(width, w, lanes)[1])
    h = max(1, min(height.out, (room - height.reach) // height.stride + 1))
    h = _ceil(height.out, _ceil(height.out, h))
    room = budget // (height.length(h) * _row_pitch(width, w, lanes)[1])
    d = max(1, min(depth.out, (room - depth.reach) // depth.stride + 1))
    return d, h, w


def _row_pitch(width: Line, out: int, lanes: int) -> tuple[int, int]:
    """Elements between the phases of the stride in a row of the slab, and between rows; a vector may be written and
    read beyond what is used."""
    phase = _ceil(_ceil(width.length(out), width.stride) + lanes, 4) * 4
    return phase, phase * width.stride


def _parameters(
    dtype: np.dtype, lines: Lines, kernel: Any
) -> tuple[np.ndarray, tuple[np.ndarray, ...], int]:
    """What both bodies need to know of the lines; the tables that hold it; the number of tiles of a plane."""
    lanes = tile_for(dtype.itemsize * 8).lanes
    tile = _tile(lines, lanes, SLAB_BYTES // dtype.itemsize)
    depth, height, width = lines
    phase_pitch, row_pitch = _row_pitch(width, tile[2], lanes)
    plane_pitch = height.length(tile[1]) * row_pitch
    slab_size = _ceil(depth.length(tile[0]) * plane_pitch + lanes, 16) * 16

    # Only the height is walked by `kernel`. The tables of the others have no blocks.
    tables = tuple(_phase_table(line, kernel if line is height else None, dtype) for line in lines)
    u = np.concatenate([np.arange(len(f.taps), dtype=np.int64) * f.tap_step + f.shift for f in width.phases])
    offsets = u % width.stride * phase_pitch + u // width.stride
    taps = tuple(len(line.taps) for line in lines)
    parameters = np.zeros(END, np.int64)
    parameters[TAPS : SLAB_SIZE + 1] = (
        math.prod(taps), *taps[1:], address(offsets), phase_pitch, row_pitch, plane_pitch, slab_size
    )  # fmt: skip
    for first, line, n, table in zip((DEPTH, HEIGHT, WIDTH), lines, tile, tables, strict=True):
        parameters[first : first + TABLE + 1] = (
            address(line.source), line.before, line.size, line.stride, line.step, line.out, n, _ceil(line.out, n),
            line.reach, len(line.phases), address(table),
        )  # fmt: skip
    tiles = math.prod(_ceil(line.out, n) for line, n in zip(lines, tile, strict=True))
    return parameters, (*tables, offsets, *(line.source for line in lines)), tiles


def plan_correlation(
    dtype: np.dtype, batch: int, groups: int, rows: int, channels: int, lines: Lines, x: Strides, y: Strides,
    zeros: bool, workers: int,
) -> Plan:  # fmt: skip
    """Plan y[n, g, i] = sum over c, k of w[g, i, c, k] * x[n, g, c, u(k)], with strides of x and y in elements."""
    parameters, tables, tiles = _parameters(dtype, lines, correlate_rows)
    lanes, phases = tile_for(dtype.itemsize * 8).lanes, len(lines[2].phases)
    planes = batch * groups
    plane_tasks = min(planes, _ceil(8 * workers, tiles))
    tile_pitch = _ceil(int(parameters[WIDTH + TILE]), lanes) * lanes
    most_rows = _TILE_BYTES // (phases * tile_pitch * dtype.itemsize)
    tile_rows = max(1, min(most_rows, 8, int(parameters[HEIGHT + TILE])))
    parameters[X_N:TAPS] = (*x, *y, groups, rows, channels, planes, plane_tasks, zeros)
    parameters[TILE_ROWS : TILE_SIZE + 1] = tile_rows, tile_pitch, tile_rows * tile_pitch
    scratch = int(parameters[SLAB_SIZE] + phases * parameters[TILE_SIZE]) * dtype.itemsize
    outputs = math.prod(sum(f.count * max(1, len(f.taps)) for f in line.phases) for line in lines)
    return Plan(
        _correlate, parameters, tables, tiles * plane_tasks, scratch, 2 * planes * rows * channels * outputs,
        order=functools.partial(order_weights, lines),
    )  # fmt: skip


def plan_weight_gradient(
    dtype: np.dtype, batch: int, groups: int, rows: int, lines: Lines, x: Strides, dy: Strides, zeros: bool
) -> Plan:
    """Plan dw[g, i, k] = sum over n, p of dy[n, g, i, p] * x[n, g, u(p, k)], with strides of x and dy in elements."""
    parameters, tables, tiles = _parameters(dtype, lines, accumulate_rows)
    units = batch * tiles
    splits = min(units, _ceil(_GRADIENT_TASKS, groups))
    group_tasks = min(groups, 4 * _GRADIENT_TASKS)
    copy = dy[4] != 1
    parameters[X_N:TAPS] = (*x, *dy, groups, rows, 1, batch, group_tasks, zeros)
    parameters[TILE_SIZE] = copy * _ceil(int(parameters[HEIGHT + TILE] * parameters[WIDTH + TILE]), 16) * 16
    parameters[UNITS : COPY + 1] = units, splits, copy
    sums = rows * int(parameters[TAPS]) * tile_for(dtype.itemsize * 8).lanes
    scratch = int(parameters[SLAB_SIZE] + parameters[TILE_SIZE] + sums) * dtype.itemsize
    flops = 2 * batch * groups * rows * math.prod(line.out * len(line.taps) for line in lines)
    return Plan(
        _weight_gradient, parameters, tables, group_tasks * splits, scratch, flops, splits=splits
    )


def order_weights(lines: Lines, w: np.ndarray) -> np.ndarray:
    """The weights (O, 1, KD, KH, KW) with the taps of each phase one after the other."""
    for axis, line in enumerate(lines, start=2):
        if line.taps != tuple(range(w.shape[axis])):
            w = w.take(line.taps, axis)
    return np.ascontiguousarray(w)


# ---------------------------------------------------------------------------------------------------------------------
# Running a plan: of this module, of `depthwise_channels` or of `depthwise_planes`
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything about one call but the addresses, which are the first parameters of all bodies."""

    body: tasks.Body
    parameters: np.ndarray
    tables: tuple[np.ndarray, ...]  # whose addresses stand in the parameters
    tasks: int
    scratch: int
    flops: int
    # What makes of the weights (O, C/groups, KD, KH, KW) what the body reads, or of what the body writes the gradient
    # of the weights; and the number of parts that is the sum of.
    order: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    splits: int = 1


def correlate(
    plan: Plan, x: np.ndarray, w: np.ndarray, y: np.ndarray, bias: np.ndarray | None, relu: bool, add: bool
) -> None:
    """Run a plan on arrays of the strides it was made for, and weights of any strides."""
    w = plan.order(w)
    parameters = plan.parameters.copy()
    operands = address(x), address(w), address(y), 0 if bias is None else address(bias), relu, add
    if parameters.ndim:
        parameters[X:X_N] = operands
    else:
        parameters["operands"] = operands
    tasks.run(plan.body, x.dtype, plan.tasks, parameters, plan.scratch, plan.flops)


def weight_gradient(plan: Plan, x: np.ndarray, dy: np.ndarray, dw: np.ndarray, add: bool) -> None:
    """Run a plan on arrays of the strides it was made for; dw of any strides."""
    parts = np.empty((plan.splits, *dw.shape), dw.dtype)
    parameters = plan.parameters.copy()
    if parameters.ndim:
        parameters[[X, W, Y]] = address(x), address(parts), address(dy)
    else:
        parameters["operands"] = address(x), address(parts), address(dy), 0, False, False
    tasks.run(plan.body, dw.dtype, plan.tasks, parameters, plan.scratch, plan.flops)
    total = parts[0] if plan.splits == 1 else np.add.reduce(parts)  # one part after the other
    total = plan.order(total).reshape(dw.shape)
    if add:
        dw += total
    else:
        dw[...] = total


# ---------------------------------------------------------------------------------------------------------------------
# Where it pays
# ---------------------------------------------------------------------------------------------------------------------

_FEW_CHANNELS = 4
_MOST_SLAB = 1024 * 1024  # bytes
_MOST_SUMS = 512 * 1024


@functools.lru_cache(maxsize=1024)
def applies(geometry: ConvGeometry) -> bool:
    """Is this a convolution for the functions of this module?"""
    if geometry.in_channels_per_group != 1 or (geometry.groups == 1 and geometry.out_channels > _FEW_CHANNELS):
        return False
    # what a worker needs at the least, for float64: the slab of one short row, and the sums of the weight gradient
    depth, height, width = (
        (k - 1) * dilation + 1 for k, dilation in zip(geometry.kernel_size, geometry.dilation, strict=True)
    )
    slab = 8 * depth * height * (width + 128 * geometry.stride[2])
    return slab <= _MOST_SLAB and 64 * geometry.out_channels_per_group * math.prod(geometry.kernel_size) <= _MOST_SUMS
