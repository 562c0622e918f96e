"""Convolutions of few channels per group (depthwise ones above all) at the speed of memory, and their gradients.

With one channel per group a weight meets one input plane only: there is no matrix product to tile, and a few
multiply-adds for each byte. A thread computes a patch of the result in registers, `rows` x `columns` of one plane. It
reads each row of its source once, by 128-bit loads where the rows are aligned, and a row serves all rows of the patch
whose windows it is in. Neighbouring threads read the border of a patch from the L1 cache: memory is read about once.

Both the forward pass and the input gradient gather: in each dimension, result position o and tap k meet the source at

    forward:         o * stride + k * dilation - before
    input gradient:  (o + before - k * dilation) / stride,  where that is a whole number

which an `Axis` states relative to the thread, with numbers that are constants of the kernel: its loops are unrolled,
and what no tap meets costs nothing. The weight gradient runs through the same patches with one sum for each tap, in
parts of a number of patches that the shape alone decides; warps, blocks and parts are then added in a fixed order.

The patch does not change the order of any sum: row by row of the source, and along each from one end to the other.

The kernels are in `depthwise_kernels`; here it is decided which patch they have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from ._cuda import DeviceArray, launch, launch_blocks
from .depthwise_kernels import THREADS, VECTOR, WARP, Axis, Patch, gather_kernel, weight_kernel
from .implicit_gemm import LEAST_ROWS
from .jit import ELEMENTS
from .offsets import MOST_ELEMENTS, as_uint32, extent, split_batch, strides_in_elements
from .partial_sums import add_parts_kernel, parts_of_gradient
from .tiles import ENOUGH_BLOCKS

__all__ = ["forward", "input_grad", "weight_grad"]

# Rows of a thread's patch: 3 x 3 filters then read 6 rows for 4, from the L1 cache for the most part.
PATCH_ROWS = 4
# Filters of more taps are done a row of taps at a time, each with its own reading of the source: unrolled, the kernel
# of 7 x 7 taps has 784 multiply-adds, and 109 registers.
MOST_UNROLLED_TAPS = 49
# Taps along a row, at most: their weights and the row they meet stay in registers.
MOST_COLUMNS = 32
# Strides of an input gradient, at most: a patch has whole periods of the stride.
MOST_STRIDE = 4
# Channels of a single group, at most: a thread goes through them one after the other.
MOST_SOURCES = 64
# The weight gradient: patches of each thread, at least, before a sum is taken apart.
LEAST_PATCHES = 4


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def _view(array: DeviceArray, vector: int) -> DeviceArray:
    """The array as the kernels take one that they read or write in vectors of this length."""
    if array.dtype.itemsize != 2:
        return array.flat()
    return array.flat(np.uint32 if vector > 1 else np.uint16)


def _is_channels_last(array: DeviceArray) -> bool:
    """Do neighbouring channels lie together, and columns apart?"""
    _, channels, _, _, width = array.shape
    _, c, _, _, w = strides_in_elements(array)
    return channels > 1 and c == 1 and width > 1 and w > 1


def _aligned(array: DeviceArray, vector: int) -> bool:
    """May the rows be read or written in vectors of so many elements?"""
    *outer, step = strides_in_elements(array)
    return (
        step == 1
        and array.shape[-1] % vector == 0
        and array.pointer % (vector * array.dtype.itemsize) == 0
        and all(s % vector == 0 for s, n in zip(outer, array.shape[:-1], strict=True) if n > 1)
    )


def _longest_vector(*arrays: DeviceArray) -> int:
    if arrays[0].dtype == np.float64 or any(_is_channels_last(a) for a in arrays):
        return 1
    return next((v for v in (VECTOR, 2) if all(_aligned(a, v) for a in arrays)), 1)


def _divisor_up_to(most: int, number: int) -> int:
    return next(n for n in range(most, 0, -1) if number % n == 0)


class _Shape(NamedTuple):
    """The patches of one operation."""

    patch: Patch
    across: int
    down: int
    folded: bool  # the rows of taps one by one

    @classmethod
    def of_gather(cls, geometry: ConvGeometry, inverse: bool, source: DeviceArray, out: DeviceArray) -> _Shape:
        result = geometry.input_size if inverse else geometry.output_size
        periods = geometry.stride if inverse else (1, 1, 1)
        last = _is_channels_last(source)
        vector = _longest_vector(source)
        if last or (vector == 1 and result[1] == 1):  # several results of a single row, or there would be but one
            width = periods[2] * max(1, VECTOR // periods[2])
        else:
            # a single row gives a thread little to wait for: two vectors then
            width = vector * periods[2] * (2 if result[1] == 1 and vector == VECTOR and periods[2] == 1 else 1)
        height = periods[1] * max(1, min(PATCH_ROWS, result[1]) // periods[1])
        if not inverse and geometry.stride[1] > 1:
            height = min(height, 2)  # more rows of the source for each of the result
        return cls._make_with(geometry, inverse, source, result, height, width, vector, last)

    @classmethod
    def of_weights(cls, geometry: ConvGeometry, input: DeviceArray, grad: DeviceArray) -> _Shape:
        """Patches that fill the output exactly: a position that does not exist must not meet an infinite input."""
        result = geometry.output_size
        last = _is_channels_last(input) and _is_channels_last(grad)
        vector = _longest_vector(input, grad)
        several = vector == 1 and (last or result[1] == 1)
        width = _divisor_up_to(VECTOR, result[2]) if several else vector
        if result[1] == 1 and vector > 1 and result[2] % (2 * vector) == 0:
            width *= 2
        height = _divisor_up_to(2 if geometry.stride[1] > 1 else PATCH_ROWS, result[1])
        return cls._make_with(geometry, False, input, result, height, width, vector, last)

    @classmethod
    def _make_with(cls, geometry, inverse, source, result, height, width, vector, last) -> _Shape:
        _, kernel_h, kernel_w = geometry.kernel_size
        folded = kernel_h * kernel_w > MOST_UNROLLED_TAPS
        if folded:
            height = 1
        rows, columns = (
            Axis.gather(inverse, taps, results, geometry.stride[i], geometry.dilation[i], geometry.pad_before[i], v)
            for i, taps, results, v in [(1, 1 if folded else kernel_h, height, 1), (2, kernel_w, width, vector)]
        )
        deep = geometry.kernel_size[0] > 1 or geometry.input_size[0] > 1 or geometry.output_size[0] > 1
        patch = Patch(source.dtype.name, vector, last, deep, rows, columns)
        return cls(patch, -(-result[2] // width), -(-result[1] // height), folded)


def _gather(
    geometry: ConvGeometry, inverse: bool, weight: DeviceArray, source: DeviceArray, bias: DeviceArray, relu: bool,
    accumulate: bool, out: DeviceArray,
) -> None:  # fmt: skip
    patch, across, down, folded = _Shape.of_gather(geometry, inverse, source, out)
    channels, sources = geometry.out_channels_per_group, geometry.in_channels_per_group
    w, x, y = strides_in_elements(weight), strides_in_elements(source), strides_in_elements(out)
    weight_result, weight_source = w[:2]
    plane_numbers = (geometry.dilation[0], geometry.stride[0], -geometry.pad_before[0], 1)
    fold_step = geometry.dilation[1]
    if inverse:
        channels, sources = sources, channels
        weight_result, weight_source = weight_source, weight_result
        plane_numbers = (-geometry.dilation[0], 1, geometry.pad_before[0], geometry.stride[0])
        fold_step = -fold_step
    batch, all_channels, depth, height, width = out.shape
    threads = batch * all_channels * depth * down * across
    numbers = as_uint32(
        threads, all_channels, across, down, depth, height, width, channels, sources, *source.shape[2:],
        x[0], sources * x[1], *x[1:], geometry.out_channels_per_group * w[0], weight_result, weight_source, *w[2:],
        geometry.kernel_size[0], *plane_numbers, geometry.kernel_size[1] if folded else 1, fold_step, *y,
    )  # fmt: skip
    stored = patch.stored_vector
    in_vectors = stored > 1 and _aligned(out, stored)
    launch_blocks(
        gather_kernel(patch), -(-threads // THREADS), _view(source, patch.vector), _view(weight, 1), bias, numbers,
        in_vectors, relu, accumulate, out.flat(), _view(out, stored),
    )  # fmt: skip


def parts_of_sum(blocks: int, slots: int, patches: int) -> int:
    """How many parts each sum of a weight gradient is taken in: by the shape alone."""
    return max(1, min(-(-4 * ENOUGH_BLOCKS // blocks), patches // (slots * LEAST_PATCHES)))


def _weight_grad(
    geometry: ConvGeometry, input: DeviceArray, grad_output: DeviceArray, accumulate: bool, out: DeviceArray
) -> None:
    patch, across, down, folded = _Shape.of_weights(geometry, input, grad_output)
    lanes = WARP if patch.channels_last else 1
    sources, planes = geometry.in_channels_per_group, geometry.kernel_size[0]
    folds = geometry.kernel_size[1] if folded else 1
    blocks = -(-geometry.out_channels // lanes) * sources * planes * folds
    batch, channels, depth, _, width = grad_output.shape
    patches = batch * depth * down * across
    parts = parts_of_sum(blocks, THREADS // lanes, patches)
    part = -(-patches // parts)
    parts = -(-patches // part)
    x, dy = strides_in_elements(input), strides_in_elements(grad_output)
    taps = geometry.kernel_size[1] * geometry.kernel_size[2]
    numbers = as_uint32(
        channels, geometry.out_channels_per_group, sources, planes, folds, across, down, depth, patches, part,
        *input.shape[2:], x[0], sources * x[1], *x[1:], *dy, geometry.dilation[0], geometry.stride[0],
        -geometry.pad_before[0], geometry.dilation[1], sources * planes * taps, taps, width, out.size,
    )  # fmt: skip
    partial = parts_of_gradient(parts, ELEMENTS[out.dtype.name].real, accumulate, input, out)
    launch_blocks(
        weight_kernel(patch), (blocks, parts), _view(input, patch.vector), _view(grad_output, patch.vector), numbers,
        partial.flat(),
    )  # fmt: skip
    if partial.pointer != out.pointer:
        launch(add_parts_kernel[out.dtype], out.size, partial, accumulate, out)


# ---------------------------------------------------------------------------------------------------------------------
# Entries: False, with nothing done, for what is left to other kernels
# ---------------------------------------------------------------------------------------------------------------------


def forward(
    geometry: ConvGeometry, input: DeviceArray, weight: DeviceArray, bias: DeviceArray, relu: bool, out: DeviceArray
) -> bool:
    """out = input convolved with weight, plus bias, through max(0, .) if relu."""
    channels = geometry.out_channels_per_group, geometry.in_channels_per_group
    if not _applies(geometry, *channels, weight, input, out):
        return False
    for part, (x, y) in split_batch(geometry, input, out):
        _gather(part, False, weight, x, bias, relu, False, y)
    return True


def input_grad(
    geometry: ConvGeometry, weight: DeviceArray, grad_output: DeviceArray, bias: DeviceArray, relu: bool,
    accumulate: bool, out: DeviceArray,
) -> bool:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu."""
    channels = geometry.in_channels_per_group, geometry.out_channels_per_group
    if not _applies(geometry, *channels, weight, grad_output, out) or max(geometry.stride[1:]) > MOST_STRIDE:
        return False
    if geometry.stride[1] > 1 and geometry.kernel_size[1] * geometry.kernel_size[2] > MOST_UNROLLED_TAPS:
        return False  # the rows of taps cannot be done one by one: which of them a result meets changes
    for part, (dy, dx) in split_batch(geometry, grad_output, out):
        _gather(part, True, weight, dy, bias, relu, accumulate, dx)
    return True


def weight_grad(
    geometry: ConvGeometry, input: DeviceArray, grad_output: DeviceArray, accumulate: bool, out: DeviceArray
) -> bool:
    """out (+)= gradient of the weight."""
    channels = geometry.out_channels_per_group, geometry.in_channels_per_group
    most = MOST_ELEMENTS // (4 * ENOUGH_BLOCKS)
    if not _applies(geometry, *channels, input, grad_output) or out.size > most:
        return False
    for i, (part, (x, dy)) in enumerate(split_batch(geometry, input, grad_output)):
        _weight_grad(part, x, dy, accumulate or i > 0, out)
    return True


def _applies(geometry: ConvGeometry, results: int, sources: int, *arrays: DeviceArray) -> bool:
    """Few channels in a group, zeros for padding, no negative strides, no sample too large for 32-bit offsets.

    `results` and `sources` are the channels of a group that are computed and read. Nothing here depends on the batch.
    """
    if geometry.groups > 1:
        narrow = min(results, sources) < LEAST_ROWS
    else:
        narrow = results < LEAST_ROWS and sources <= MOST_SOURCES
    return (
        narrow
        and geometry.padding_mode == "zeros"
        and geometry.kernel_size[2] <= MOST_COLUMNS
        and all(a.size > 0 and min(a.strides) >= 0 for a in arrays)
        and all(extent(a, 1) <= MOST_ELEMENTS for a in arrays)
    )
