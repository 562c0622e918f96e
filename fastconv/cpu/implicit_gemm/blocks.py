"""What a product is: its axes, the blocks it is cut into, and the shape of the slab."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..vector.tile import tile

# Blocking, in bytes. A group of panels stays in L2 and is read from there for each panel of output channels, whose
# weights stay in L1 meanwhile: so each row of the output is written as many panels at a time. With panels of 48 KiB
# layers of many channels (1x1 of 1024, 3x3 of 512) are 2 to 4 % faster than with 24 KiB, since sums are stored less
# often. Groups of 48, 192 and 320 KiB made no difference beyond the noise of 5 % for 14 layers.
PANEL_BYTES = 48 * 1024
GROUP_BYTES = 96 * 1024
SLAB_BYTES = 384 * 1024

Strides = tuple[int, ...]  # of N, C, D, H, W

_PIXELS_TO_FIT = 448  # output pixels whose input rows must fit the slab: enough to use each packed weight often
PANELS_PER_TASK = 28
_LONG_ROW = 16  # panels in an output row from which a task is a part of one row


@dataclass(frozen=True)
class Axis:
    """One dimension of a correlation: output position o and tap k read u = o * stride + k * dilation.

    `source` says which input coordinate stands at u (-1: a zero); from `before` on, `size` elements long, that is
    u - before.
    """

    out: int
    taps: int
    stride: int
    dilation: int
    source: np.ndarray
    before: int
    size: int

    @property
    def span(self) -> int:
        return (self.taps - 1) * self.dilation + 1

    def is_identity(self) -> bool:
        return self.taps == self.stride == 1 and self.before == 0 and self.out == self.size

    def reads_every_nth(self) -> bool:
        """Is this no more than every stride-th element of the input?"""
        return self.taps == 1 and self.before == 0 and (self.out - 1) * self.stride < self.size


@dataclass(frozen=True)
class Blocks:
    """How the reduction over (channel, tap) and the rows are cut; this alone decides how weights are packed."""

    groups: int
    rows: int  # output channels in a group
    channels: int  # input channels in a group
    taps: int
    block_channels: int
    block_taps: int
    panels: int  # panels of rows in a group

    @property
    def depth(self) -> int:
        return self.block_channels * self.block_taps

    @property
    def packed_size(self) -> int:
        return self.groups * self.rows * self.channels * self.taps


def fold_strides(axes: tuple[Axis, ...], x: Strides) -> tuple[tuple[Axis, ...], Strides]:
    """Where a kernel has one tap, its stride is a stride of the input: elements between are not even copied."""
    folded, steps = list(axes), list(x)
    for i, axis in enumerate(axes):
        if axis.stride > 1 and axis.reads_every_nth():
            folded[i] = Axis(axis.out, 1, 1, 1, np.arange(axis.out, dtype=np.int64), 0, axis.out)
            steps[2 + i] *= axis.stride
    return tuple(folded), tuple(steps)


def fold_batch(
    batch: int, axes: tuple[Axis, ...], x: Strides, y: Strides
) -> tuple[int, tuple[Axis, ...], Strides, Strides]:
    """Images of one pixel as the pixels of one row: read and written by transposes, not each as a row of its own."""
    if batch == 1 or any(axis.out > 1 or not axis.is_identity() for axis in axes):
        return batch, axes, x, y
    row = Axis(batch, 1, 1, 1, np.arange(batch, dtype=np.int64), 0, batch)
    return 1, (*axes[:2], row), (0, x[1], 0, 0, x[0]), (0, y[1], 0, 0, y[0])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_blocks(
    dtype: np.dtype, groups: int, rows: int, channels: int, axes: tuple[Axis, ...], in_place: bool
) -> Blocks:
    """Cut the reduction so that a panel stays in L1 and the slab of a few hundred pixels in L2.

    It must depend on nothing but the shape of one sample: the cuts decide the bits of the result.
    """
    t = tile(dtype.itemsize * 8)
    taps = math.prod(a.taps for a in axes)
    longest = max(8, PANEL_BYTES // (t.columns * dtype.itemsize))
    if taps <= longest:
        most = max(1, longest // taps)
        if not in_place:
            slab = slab_shape(axes, min(_PIXELS_TO_FIT, math.prod(a.out for a in axes)), 1, t.columns)
            most = min(most, max(1, SLAB_BYTES // (slab.channel * dtype.itemsize)))
        block_channels, block_taps = ceil_div(channels, ceil_div(channels, most)), taps
    else:
        block_channels, block_taps = 1, ceil_div(taps, ceil_div(taps, longest))
    panels = ceil_div(rows, t.rows)
    if panels > 8:  # an even number, since two threads may share them
        panels = ceil_div(panels, 2) * 2
    return Blocks(groups, rows, channels, taps, block_channels, block_taps, panels)


@dataclass(frozen=True)
class SlabShape:
    chunk: int  # 0, or the pixels of a part of a long row
    segments: int
    segment_rows: int
    phase: int
    row: int
    row_length: int  # padded coordinates that a row holds
    channel: int
    table: int  # integers of `find_rows`


def slab_shape(axes: tuple[Axis, ...], pixels: int, images: int, columns: int) -> SlabShape:
    """The slab for any `pixels` consecutive output pixels of `images` images: its pitches, in elements."""
    depth, height, width = axes
    chunk = 0
    if width.out >= _LONG_ROW * columns:
        parts = ceil_div(width.out, PANELS_PER_TASK * columns)
        chunk = ceil_div(ceil_div(width.out, parts), columns) * columns
    rows = 1 if chunk else min(images * depth.out * height.out, (pixels + width.out - 2) // width.out + 1)
    segments = min(images * depth.out, (rows + height.out - 2) // height.out + 1)
    segment_rows = (min(height.out, rows) - 1) * height.stride + height.span
    length = ((chunk or width.out) - 1) * width.stride + width.span
    phase = ceil_div(length, width.stride)
    row = phase * width.stride
    rows_of_channel = segments * depth.taps * segment_rows
    return SlabShape(chunk, segments, segment_rows, phase, row, length, rows_of_channel * row, 2 * rows_of_channel)


def is_flat(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Are the pixels (D, H, W) of a plane evenly spaced in memory?"""
    real = [(n, step) for n, step in zip(shape, strides, strict=True) if n > 1]
    return all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(real))


def pixel_step(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How far apart neighbouring pixels are. Axes of one pixel, whose stride may be any, have no say; of a pixel: 1."""
    return next((step for n, step in zip(reversed(shape), reversed(strides), strict=True) if n > 1), 1)


def are_consecutive(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Are the pixels of a plane neighbours in memory?"""
    return pixel_step(shape, strides) == 1 and is_flat(shape, strides)


def can_stay_in_place(axes: tuple[Axis, ...], x: Strides) -> bool:
    """Is this a matrix product on the image in place: kernel and stride 1, no padding, flat planes?"""
    shape = tuple(a.out for a in axes)
    return all(a.is_identity() for a in axes) and are_consecutive(shape, x[2:]) and min(x) >= 0


def flatten(
    batch: int, axes: tuple[Axis, ...], x: Strides, y: Strides
) -> tuple[int, tuple[Axis, ...], Strides, Strides]:
    """A matrix product on the image in place (kernel and stride 1, no padding), with its pixels as one row.

    Those of all samples, or of each, whichever are evenly spaced in both arrays; if none are, what came.
    """
    if not all(a.is_identity() for a in axes):
        return batch, axes, x, y
    out = batch, *(a.out for a in axes)
    for samples, shape in ((1, out), (batch, out[1:])):
        steps = [(each[0], *each[2:])[-len(shape) :] for each in (x, y)]
        if all(is_flat(shape, each) for each in steps):
            size = math.prod(shape)
            from_, to = [pixel_step(shape, each) for each in steps]
            one = Axis(1, 1, 1, 1, axes[0].source, 0, 1)
            row = Axis(size, 1, 1, 1, axes[0].source, 0, size)
            return samples, (one, one, row), (x[0], x[1], 0, 0, from_), (y[0], y[1], 0, 0, to)
    return batch, axes, x, y


def is_padded(axes: tuple[Axis, ...]) -> bool:
    """Does any window reach outside the input?"""
    return any(a.before > 0 or (a.out - 1) * a.stride + a.span > a.before + a.size for a in axes)


def tap_offsets(axes: tuple[Axis, ...], slab: SlabShape) -> np.ndarray:
    """Where in the slab each tap finds its element, relative to the first tap of the same pixel."""
    _, height, width = axes
    i, j, k = np.meshgrid(*(np.arange(a.taps, dtype=np.int64) for a in axes), indexing="ij")
    u = k * width.dilation
    return (
        (i * slab.segment_rows + j * height.dilation) * slab.row + u % width.stride * slab.phase + u // width.stride
    ).ravel()


def offsets_of_taps(axes: tuple[Axis, ...], steps: Sequence[int]) -> np.ndarray:
    """`tap_offsets` where taps that are neighbours in a dimension are as far apart as `steps` says."""
    i, j, k = np.meshgrid(*(np.arange(a.taps, dtype=np.int64) for a in axes), indexing="ij")
    return (i * steps[0] + j * steps[1] + k * steps[2]).ravel()
