"""The phases of an input gradient: elements a stride apart, which the same taps of the kernel reach.

What is computed of each phase, and of which of them together, is `methods.input_gradient`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..geometry import ConvGeometry
from . import depthwise
from .implicit_gemm import Axis, Strides
from .vector.tile import tile


def phase_axis(
    first: int, size: int, taps: int, stride: int, dilation: int, before: int, out: int
) -> tuple[tuple[int, ...], Axis]:
    """Input elements first, first + stride, ... as a correlation with the output gradient; its taps, and its axis.

    Input element q is met by tap k in output position p = (q + before - k*dilation)/stride, if that is an integer. For
    q = first + stride*t this is t plus a number per tap: stride 1, dilation 1 of the output, taps in falling order.
    """
    meeting = tuple(k for k in range(taps) if (first + before - k * dilation) % stride == 0)[::-1]
    count = -(-(size - first) // stride)
    if not meeting:
        return meeting, Axis(count, 0, 1, 1, np.zeros(0, np.int64), 0, out)
    shift = (first + before - meeting[0] * dilation) // stride
    step = dilation // math.gcd(stride, dilation)
    p = np.arange(count + (len(meeting) - 1) * step, dtype=np.int64) + shift
    source = np.where((p >= 0) & (p < out), p, -1)
    return meeting, Axis(count, len(meeting), 1, step, source, -shift, out)


def phase_runs(
    size: int, taps: int, stride: int, dilation: int, before: int, out: int
) -> list[tuple[int, ...]]:
    """The phases of a dimension, those together that may be rows of one product.

    What tap k gives to input element q, tap k + 1 gives to q + dilation, from the same output position. So phases that
    are `dilation` apart have the same product, with the next taps, if they have as many, of the same output positions.
    """
    runs: dict[int, list[int]] = {}  # by the last phase
    seen = {}
    for first in range(min(stride, size)):
        meeting, axis = phase_axis(first, size, taps, stride, dilation, before, out)
        seen[first] = axis.out, len(meeting), axis.before
        joins = bool(meeting) and seen.get(first - dilation) == seen[first]
        runs[first] = [*(runs.pop(first - dilation) if joins else []), first]
    return sorted(map(tuple, runs.values()))


Runs = tuple[list[tuple[int, ...]], ...]


@dataclass(frozen=True)
class Rows:
    """What the rows of the products of an input gradient are: (phase of one axis, input channel).

    The few channels of a phase alone would leave most rows of the microkernel's tile without work.
    """

    runs: Runs  # phases of each axis, those together that are rows of one product
    axis: int = 0  # whose phases are rows, if any are
    each_channel: bool = False  # is a channel a group of its own? Else the phases of all are evenly spaced in memory
    order: tuple[int, ...] | None = None  # axes of the weight from outer to inner, where its memory must have them so


def choose_rows(geometry: ConvGeometry, dtype: np.dtype, w: Strides, dx: Strides) -> Rows:
    """From strides in elements."""
    runs = tuple(
        map(
            phase_runs, geometry.input_size, geometry.kernel_size, geometry.stride, geometry.dilation,
            geometry.pad_before, geometry.output_size,
        )
    )  # fmt: skip
    alone: Runs = tuple([(first,) for first in sorted(itertools.chain(*each))] for each in runs)
    channels = geometry.in_channels_per_group
    spaced = [channels == 1 or geometry.dilation[a] * dx[2 + a] == channels * dx[1] for a in range(3)]
    lengths = [max(map(len, each)) for each in runs]
    axis = max(range(3), key=lambda a: (lengths[a] > 1 and spaced[a], lengths[a], a))
    each_channel = not spaced[axis]
    if (
        channels >= tile(dtype.itemsize * 8).rows
        or lengths[axis] == 1
        or (each_channel and (geometry.groups > 1 or lengths[axis] <= channels))
    ):
        return Rows(alone)
    joined = tuple(each if a == axis else alone[a] for a, each in enumerate(runs))
    order = None
    if channels > 1 and not each_channel and w[2 + axis] != channels * w[1]:
        order = (0, *(2 + other for other in range(3) if other != axis), 2 + axis, 1)
    return Rows(joined, axis, each_channel, order)


def in_order(weight: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """The same array, contiguous with its axes in this order from outer to inner."""
    return np.ascontiguousarray(weight.transpose(order)).transpose(np.argsort(order))


def backward_lines(geometry: ConvGeometry) -> depthwise.Lines:
    each = []
    for size, taps, stride, dilation, before, positions in zip(
        geometry.input_size, geometry.kernel_size, geometry.stride, geometry.dilation, geometry.pad_before,
        geometry.output_size, strict=True,
    ):  # fmt: skip
        phases = [
            phase_axis(first, size, taps, stride, dilation, before, positions) for first in range(min(stride, size))
        ]
        each.append(depthwise.backward_line(tuple(phases), stride, positions))
    depth, height, width = each
    return depth, height, width




@dataclass(frozen=True)
class Correlation:
    """The elements of the input gradient from `first` on, as a correlation with the output gradient."""

    where: tuple[slice, ...]  # of the input gradient (N, C, D, H, W)
    taps: tuple[tuple[int, ...], ...]  # of the kernel, in each dimension
    axes: tuple[Axis, ...]


def correlations(geometry: ConvGeometry, rows: Rows) -> Iterator[tuple[int, Correlation]]:
    """Of every phase, or of several that are rows of one product, how many they are and what they are."""
    for runs in itertools.product(*rows.runs):
        first = tuple(run[0] for run in runs)
        taps, axes = zip(
            *map(
                phase_axis, first, geometry.input_size, geometry.kernel_size, geometry.stride, geometry.dilation,
                geometry.pad_before, geometry.output_size,
            ),
            strict=True,
        )  # fmt: skip
        where = (slice(None), slice(None), *map(slice, first, (None,) * 3, geometry.stride))
        yield len(runs[rows.axis]), Correlation(where, taps, axes)
