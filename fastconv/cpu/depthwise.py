"""Convolutions with one input channel in a group: depthwise ones, and filters of a single plane.

A group is a plane of input and few planes of output (as many as the channel multiplier says), each the plane
correlated with a filter of its own. There is no matrix product in that, and little arithmetic for each element read, so
the engine of `implicit_gemm` would spend its time on packing. Here a tile of the plane is copied once, with its border,
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

import numpy as np

from ..geometry import ConvGeometry
from . import depthwise_tasks, tasks
from .depthwise_tasks import NO_OPERANDS, FilterRows, Parameters, PhaseEntry
from .implicit_gemm import Axis, Strides
from .records import copy_of
from .tasks import data_address
from .vector.depthwise_rows import SHARED_ROWS, Taps, accumulate_rows, correlate_rows
from .vector.tile import tile as tile_for

SLAB_BYTES = 192 * 1024
# Rows of the filter that `correlate_rows` takes at once. With up to seven, filters of 7x7 to 15x15 took 1.3 to 1.9
# times as long on planes of 512 x 512 (AVX-512).
_MOST_SHARED = 5
_TILE_BYTES = 64 * 1024  # rows that are put together before they are stored, where they cannot be stored at once
# Input and output together, in bytes, from where on they are prefetched: parts of rows, or of pixels, are
# not what the processor foresees. Of arrays that were in no cache, those of 5 to 24 MB took 1.1 to 2.3 times as long
# without (one thread; two: up to 1.5). Where calls follow one another, those of 4 to 16 MB, which the third cache holds
# then, take up to 8 % longer with it, and those of 24 MB 0.7 to 0.9 times as long.
PREFETCH_BYTES = 16 * 1024 * 1024
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


@dataclass(frozen=True)
class Phase:
    """Output elements first, first + step, ... of one dimension, `count` of them, that read with the same `taps`.

    Element t of them reads padded coordinate t * stride + shift + i * tap_step with the i-th of these taps.
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
    """One dimension of the correlation: its padded input (`source`, as in `implicit_gemm.Axis`), and its phases."""

    stride: int  # between what consecutive elements of a phase read
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
    start = min((-axis.before for taps, axis in phases if taps), default=0)  # the first coordinate that any phase reads
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


def _phase_table(line: Line, kernel: Any | None, dtype: np.dtype, kept: list[np.ndarray]) -> np.ndarray:
    """The table of the phases of a dimension, with the rows of the filter that `kernel` takes at once; both are `kept`.

    Output rows share the rows they read where a tap of one is another tap of the next: with a dilation, that is true of
    every tap_step-th row, a *class*.
    """
    table = []
    start = 0
    for phase in line.phases:
        divisor = math.gcd(line.stride, phase.tap_step)
        ratio, classes = line.stride // divisor, phase.tap_step // divisor
        most = _MOST_SHARED if kernel is correlate_rows else math.inf
        shared = [rows for rows, stride in SHARED_ROWS if stride == ratio and rows <= most]
        if not shared or len(phase.taps) == 1:
            shared, classes = [1], 1
        blocks, first = [], 0
        if kernel is not None:
            for rows in cut(len(phase.taps), (1, *shared)):
                blocks.append((kernel.address(dtype, Taps(rows, ratio if rows > 1 else 1)), rows > 1, first))
                first += rows
        rows_at_once = FilterRows.table(blocks)
        kept.append(rows_at_once)
        table.append((
            phase.first, phase.count, len(phase.taps), phase.shift, phase.tap_step, start, classes, len(blocks),
            data_address(rows_at_once),
        ))  # fmt: skip
        start += len(phase.taps)
    kept.append(PhaseEntry.table(table))
    return kept[-1]


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


def _fields(
    dtype: np.dtype, lines: Lines, kernel: Any, kept: list[np.ndarray]
) -> tuple[dict[str, Any], tuple[int, int, int], int]:  # fmt: skip
    """What both bodies need to know of the lines, with arrays that are `kept`; the tile; the number of them."""
    lanes = tile_for(dtype.itemsize * 8).lanes
    tile = _tile(lines, lanes, SLAB_BYTES // dtype.itemsize)
    depth, height, width = lines
    phase_pitch, row_pitch = _row_pitch(width, tile[2], lanes)
    plane_pitch = height.length(tile[1]) * row_pitch
    u = np.concatenate([np.arange(len(f.taps), dtype=np.int64) * f.tap_step + f.shift for f in width.phases])
    offsets = u % width.stride * phase_pitch + u // width.stride
    kept += [offsets, *(line.source for line in lines)]
    # Only the height is walked by `kernel`. The tables of the others have no blocks.
    dimensions = [
        (
            data_address(line.source), line.before, line.size, line.stride, line.step, line.out, n, _ceil(line.out, n),
            line.reach, len(line.phases),
            data_address(_phase_table(line, kernel if line is height else None, dtype, kept)),
        )
        for line, n in zip(lines, tile, strict=True)
    ]  # fmt: skip
    taps = tuple(len(line.taps) for line in lines)
    fields = {
        "operands": NO_OPERANDS, "taps": math.prod(taps), "taps_h": taps[1], "taps_w": taps[2],
        "offsets": data_address(offsets), "phase_pitch": phase_pitch, "row_pitch": row_pitch,
        "plane_pitch": plane_pitch,
        "slab": _ceil(depth.length(tile[0]) * plane_pitch + lanes, 16) * 16,
        **dict(zip(("depth", "height", "width"), dimensions, strict=True)),
    }  # fmt: skip
    return fields, tile, math.prod(_ceil(line.out, n) for line, n in zip(lines, tile, strict=True))


def plan_correlation(
    dtype: np.dtype, batch: int, groups: int, rows: int, channels: int, lines: Lines, x: Strides, y: Strides,
    zeros: bool, workers: int,
) -> Plan:  # fmt: skip
    """Plan y[n, g, i] = sum over c, k of w[g, i, c, k] * x[n, g, c, u(k)], with strides of x and y in elements."""
    kept: list[np.ndarray] = []
    fields, tile, tiles = _fields(dtype, lines, correlate_rows, kept)
    lanes, phases = tile_for(dtype.itemsize * 8).lanes, len(lines[2].phases)
    planes = batch * groups
    plane_tasks = min(planes, _ceil(8 * workers, tiles))
    tile_pitch = _ceil(tile[2], lanes) * lanes
    tile_rows = max(1, min(_TILE_BYTES // (phases * tile_pitch * dtype.itemsize), 8, tile[1]))
    parameters = Parameters.of(
        **fields, x=x, y=y, groups=groups, rows=rows, channels=channels, planes=planes, plane_tasks=plane_tasks,
        has_zeros=zeros, tile_rows=tile_rows, tile_pitch=tile_pitch, tile=tile_rows * tile_pitch, units=0, splits=0,
        copies=False,
    )  # fmt: skip
    scratch = (fields["slab"] + phases * tile_rows * tile_pitch) * dtype.itemsize
    outputs = math.prod(sum(f.count * max(1, len(f.taps)) for f in line.phases) for line in lines)
    return Plan(
        depthwise_tasks.correlate, parameters, tuple(kept), tiles * plane_tasks, scratch,
        2 * planes * rows * channels * outputs, order=functools.partial(order_weights, lines),
    )  # fmt: skip


def plan_weight_gradient(
    dtype: np.dtype, batch: int, groups: int, rows: int, lines: Lines, x: Strides, dy: Strides, zeros: bool
) -> Plan:
    """Plan dw[g, i, k] = sum over n, p of dy[n, g, i, p] * x[n, g, u(p, k)], with strides of x and dy in elements."""
    kept: list[np.ndarray] = []
    fields, tile, tiles = _fields(dtype, lines, accumulate_rows, kept)
    units = batch * tiles
    splits = min(units, _ceil(_GRADIENT_TASKS, groups))
    group_tasks = min(groups, 4 * _GRADIENT_TASKS)
    copied = _ceil(tile[1] * tile[2], 16) * 16 if dy[4] != 1 else 0
    parameters = Parameters.of(
        **fields, x=x, y=dy, groups=groups, rows=rows, channels=1, planes=batch, plane_tasks=group_tasks,
        has_zeros=zeros, tile_rows=0, tile_pitch=0, tile=copied, units=units, splits=splits, copies=dy[4] != 1,
    )  # fmt: skip
    sums = rows * fields["taps"] * tile_for(dtype.itemsize * 8).lanes
    scratch = (fields["slab"] + copied + sums) * dtype.itemsize
    flops = 2 * batch * groups * rows * math.prod(line.out * len(line.taps) for line in lines)
    return Plan(
        depthwise_tasks.weight_gradient, parameters, tuple(kept), group_tasks * splits, scratch, flops, splits=splits
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
    parameters = copy_of(plan.parameters)
    of_bias = 0 if bias is None else data_address(bias)
    parameters["operands"] = data_address(x), data_address(w), data_address(y), of_bias, relu, add
    tasks.run(plan.body, x.dtype, plan.tasks, parameters, plan.scratch, plan.flops)


def weight_gradient(plan: Plan, x: np.ndarray, dy: np.ndarray, dw: np.ndarray, add: bool) -> None:
    """Run a plan on arrays of the strides it was made for; dw of any strides."""
    parts = np.empty((plan.splits, *dw.shape), dw.dtype)
    parameters = copy_of(plan.parameters)
    parameters["operands"] = data_address(x), data_address(parts), data_address(dy), 0, False, False
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
