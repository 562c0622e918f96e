"""Convolution on the CPU: forward pass and the gradients of weight, input and bias.

The entry functions take arrays in the canonical form (N, C, D, H, W), weights (O, C/groups, KD, KH, KW), as views of
whatever strides the caller's arrays have, and fill `out`. `cuda_kernels.convolution` has the same functions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import prange, types

from ..geometry import ConvGeometry
from . import (
    channels_last,
    contraction,
    depthwise,
    depthwise_channels,
    depthwise_planes,
    fft,
    half,
    loops,
    simd,
    small_planes,
    tasks,
    winograd,
    winograd_gradient,
)
from .jit import array_of, kernel, output_of
from .threads import get_num_threads

if TYPE_CHECKING:
    from ..prepared import PackedWeights

Strides = tuple[int, ...]

_tables = types.UniTuple(array_of(types.int64, 1), 3)


def _in_elements(strides: Strides, dtype: np.dtype) -> Strides:
    size = dtype.itemsize
    return tuple([step // size for step in strides])


def _elements(array: np.ndarray) -> Strides:
    """Strides in elements."""
    return _in_elements(array.strides, array.dtype)


def _readable(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if its elements do not lie at multiples of their size (a field of a record)."""
    if array.flags.aligned and not math.gcd(*array.strides) % array.itemsize:
        return array
    return np.ascontiguousarray(array)


# float32 memory for slices of float16 and bfloat16 arrays: so much, or as much as Winograd's form of a 3x3 weight takes
# where that is more, since weights are packed, or their gradient added to, for each slice. It must not depend on the
# number of threads: the weight gradient is the sum of those of the slices.
_SLICE_BYTES = 2 * 1024 * 1024
_SLICE_WEIGHTS = 4


def _slices(geometry: ConvGeometry, *arrays: np.ndarray) -> Iterator[tuple[ConvGeometry, slice]]:
    """The batch as runs of samples of these arrays that may be float32 at a time (one sample at the least)."""
    sample = max(1, sum(math.prod(array.shape[1:]) for array in arrays))
    weights = geometry.out_channels * geometry.in_channels_per_group * math.prod(geometry.kernel_size)
    most = max(1, max(_SLICE_BYTES // 4, _SLICE_WEIGHTS * weights) // sample)
    if most >= geometry.batch:
        yield geometry, slice(None)
        return
    for first in range(0, geometry.batch, most):
        end = min(first + most, geometry.batch)
        yield replace(geometry, batch=end - first), slice(first, end)


def _result(out: np.ndarray, accumulate: bool) -> np.ndarray:
    """float32 memory for `out`, with its values where an operation adds to them."""
    return out.astype(np.float32) if accumulate else np.empty(out.shape, np.float32)


def _forward_through_float32(
    operation: Callable[..., None], geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray,
    bias: np.ndarray | None, relu: bool, algorithm: str, packed: PackedWeights | None, out: np.ndarray,
) -> None:  # fmt: skip
    w = weight.astype(np.float32)
    b = None if bias is None else bias.astype(np.float32)
    for some, part in _slices(geometry, input, out):
        result = _result(out[part], False)
        operation(some, input[part].astype(np.float32), w, b, relu, algorithm, packed, result)
        half.narrow(result, out[part])


def _input_grad_through_float32(
    operation: Callable[..., None], geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray,
    bias: np.ndarray | None, relu: bool, accumulate: bool, algorithm: str, out: np.ndarray,
) -> None:  # fmt: skip
    w = weight.astype(np.float32)
    b = None if bias is None else bias.astype(np.float32)
    for some, part in _slices(geometry, grad_output, out):
        result = _result(out[part], accumulate)
        operation(some, w, grad_output[part].astype(np.float32), b, relu, accumulate, algorithm, result)
        half.narrow(result, out[part])


def _weight_grad_through_float32(
    operation: Callable[..., None], geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray,
    accumulate: bool, algorithm: str, out: np.ndarray,
) -> None:  # fmt: skip
    result = _result(out, accumulate)
    for some, part in _slices(geometry, input, grad_output):
        x, dy = input[part].astype(np.float32), grad_output[part].astype(np.float32)
        operation(some, x, dy, accumulate, algorithm, result)
        accumulate = True
    half.narrow(result, out)


def _bias_grad_through_float32(
    operation: Callable[..., None], grad_output: np.ndarray, accumulate: bool, out: np.ndarray
) -> None:
    """Some channels at a time, since the sum over samples is one of float64 numbers."""
    most = max(1, _SLICE_BYTES // (4 * max(1, grad_output[:, :1].size)))
    for first in range(0, len(out), most):
        some = slice(first, first + most)
        result = _result(out[some], accumulate)
        operation(grad_output[:, some].astype(np.float32), accumulate, result)
        half.narrow(result, out[some])


def _on_reals(through_float32: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let an operation that fills a float32 or float64 `out`, its last argument, fill any.

    float16 and bfloat16 are converted on the way in, and rounded once on the way out, by `through_float32`. Where the
    elements of `out` do not lie at multiples of their size, the operation fills an array where they do.
    """

    def decorate(operation: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(operation)
        def converting(*arguments: Any) -> None:
            out = arguments[-1]
            if out.dtype.itemsize == 2:
                through_float32(operation, *arguments)
                return
            result = _readable(out)
            operation(*arguments[:-1], result)
            if result is not out:
                out[...] = result

        return converting

    return decorate


def _axes(geometry: ConvGeometry) -> tuple[contraction.Axis, ...]:
    return tuple(
        contraction.Axis(*fields)
        for fields in zip(
            geometry.output_size, geometry.kernel_size, geometry.stride, geometry.dilation,
            geometry.input_coordinates, geometry.pad_before, geometry.input_size, strict=True,
        )
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _forward_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, w: Strides, y: Strides, workers: int, packed: bool,
    finite: bool = True,
) -> tuple[contraction.Blocks, contraction.Packing, contraction.Plan]:  # fmt: skip
    """How the reduction is cut, how weights are packed, and the product; from strides in bytes.

    If the weights are `finite`, products with zeros around the input may be left out.
    """
    x, w, y = (_in_elements(strides, dtype) for strides in (x, w, y))
    axes, x = contraction.fold_strides(_axes(geometry), x)
    in_place = contraction.can_stay_in_place(axes, x)
    blocks = contraction.make_blocks(
        dtype, geometry.groups, geometry.out_channels_per_group, geometry.in_channels_per_group, axes, in_place
    )
    # rows are output channels, and the reduction is (input channel, tap)
    row, channel, *steps = w
    shape = (geometry.out_channels, geometry.in_channels_per_group, *geometry.kernel_size)
    offsets = _offsets([range(n) for n in geometry.kernel_size], steps)
    steps_of_rows = blocks.rows * row, row, channel
    zeros = geometry.padding_mode == "zeros"
    small = small_planes.cut_all(dtype, geometry.batch, [blocks], [axes], workers) if zeros and finite else None
    needed = small_planes.needed([axes]) if small else 1
    if last := channels_last.cut_all(dtype, [blocks], [axes], x, y, needed):
        blocks = last[0]
        packing = contraction.plan_packing(blocks, shape, w, dtype.itemsize, steps_of_rows, offsets)
        return blocks, packing, channels_last.plan_correlation(
            dtype, geometry.batch, blocks, axes, x, y, zeros, workers, packed
        )
    if small:
        blocks = small[0]
        packing = contraction.plan_packing(blocks, shape, w, dtype.itemsize, steps_of_rows, offsets, check_finite=True)
        return blocks, packing, small_planes.plan_correlation(
            dtype, geometry.batch, blocks, axes, x, y, workers, packed=packed
        )
    packing = contraction.plan_packing(blocks, shape, w, dtype.itemsize, steps_of_rows, offsets)
    batch, axes, x, y = contraction.fold_batch(geometry.batch, axes, x, y)
    in_place = contraction.can_stay_in_place(axes, x)
    plan = contraction.plan_correlation(dtype, batch, blocks, axes, x, y, zeros, in_place, workers, packed=packed)
    return blocks, packing, plan


def _depthwise_plan(
    geometry: ConvGeometry, dtype: np.dtype, lines: depthwise.Lines, rows: int, channels: int, x: Strides, y: Strides,
    zeros: bool, forward: bool, add: bool, workers: int,
) -> depthwise.Plan:  # fmt: skip
    """A correlation of groups of `channels` planes in and `rows` planes out, by what is fastest for it."""
    by_channels = depthwise_channels.applies(geometry, dtype, lines, x, y)
    by_planes = channels == 1 and not add and depthwise_planes.applies(dtype, lines, x, y, zeros)
    if by_planes and (not by_channels or depthwise_planes.pays(dtype, lines)):
        return depthwise_planes.plan_correlation(
            dtype, geometry.batch, geometry.groups, rows, lines, x, y, forward, workers
        )
    if channels == rows == 1 and not add and not forward and depthwise_planes.applies_by_two(dtype, lines, x, y):
        return depthwise_planes.plan_input_gradient_by_two(
            dtype, geometry.batch, geometry.groups, lines, x, y, workers
        )
    if by_channels:
        return depthwise_channels.plan_correlation(dtype, geometry.batch, geometry.groups, lines, x, y, workers)
    return depthwise.plan_correlation(
        dtype, geometry.batch, geometry.groups, rows, channels, lines, x, y, zeros, workers
    )


def _forward_lines(geometry: ConvGeometry) -> depthwise.Lines:
    depth, height, width = map(depthwise.forward_line, _axes(geometry))
    return depth, height, width


@functools.lru_cache(maxsize=1024)
def _small_groups_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, y: Strides, forward: bool, workers: int
) -> depthwise.Plan | None:
    """The forward pass or input gradient of groups of few channels; None if that is not the way. Strides in bytes."""
    x, y = _in_elements(x, dtype), _in_elements(y, dtype)
    lines = _forward_lines(geometry) if forward else _backward_lines(geometry)
    if not depthwise_channels.applies_to_groups(geometry, dtype, lines, x, y):
        return None
    return depthwise_channels.plan_groups(geometry, dtype, lines, x, y, forward, workers)


@functools.lru_cache(maxsize=1024)
def _depthwise_forward_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, y: Strides, workers: int
) -> depthwise.Plan:
    """From strides in bytes."""
    x, y = _in_elements(x, dtype), _in_elements(y, dtype)
    depth, height, width = map(depthwise.forward_line, _axes(geometry))
    return _depthwise_plan(
        geometry, dtype, (depth, height, width), geometry.out_channels_per_group, 1, x, y,
        geometry.padding_mode == "zeros", True, False, workers,
    )  # fmt: skip


def _offsets(places: Sequence[Sequence[int]], steps: Sequence[int]) -> np.ndarray:
    """Offset in memory of every combination of these places in each dimension, in order."""
    offsets = np.zeros(1, np.int64)
    for each, step in zip(places, steps, strict=True):
        offsets = (offsets[:, None] + np.array(each, np.int64) * step).ravel()
    return offsets


@_on_reals(_forward_through_float32)
def forward(
    geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, relu: bool,
    algorithm: str, packed: PackedWeights | None, out: np.ndarray,
) -> None:  # fmt: skip
    """out = input convolved with weight, plus bias, through max(0, .) if relu.

    `packed` keeps the weights of a prepared convolution as the kernels want them.
    """
    if out.size == 0:
        return
    input, weight = _readable(input), _readable(weight)
    if algorithm == "loops":
        loops.forward(geometry, input, weight, bias, relu, out)
        return
    if algorithm == "winograd":
        _winograd_forward(geometry, input, weight, bias, relu, packed, out)
        return
    if algorithm == "fft":
        for some, run, safe in _safe_runs("forward", geometry, input, weight):
            if safe:
                fft.forward(some, input[run], weight, bias, relu, packed, out[run])
            else:
                forward(some, input[run], weight, bias, relu, "direct", packed, out[run])
        return
    if bias is not None:
        bias = np.ascontiguousarray(bias)
    if depthwise.applies(geometry):
        strides = input.strides, out.strides
        depthwise_plan = _depthwise_forward_plan(geometry, out.dtype, *strides, get_num_threads())
        depthwise.correlate(depthwise_plan, input, weight, out, bias, relu, False)
        return
    if geometry.groups > 1:
        groups_plan = _small_groups_plan(geometry, out.dtype, input.strides, out.strides, True, get_num_threads())
        if groups_plan is not None:
            depthwise.correlate(groups_plan, input, weight, out, bias, relu, False)
            return
    finite = _contract_forward(geometry, input, weight, bias, relu, packed, out, finite=True)
    if not finite:
        _contract_forward(geometry, input, weight, bias, relu, packed, out, finite=False)


def _contract_forward(
    geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, relu: bool,
    packed: PackedWeights | None, out: np.ndarray, finite: bool,
) -> bool:  # fmt: skip
    """Is `out` right? Not if the plan is one for `finite` weights, and they are not."""
    workers = tasks.workers(contraction.work(geometry.flops))
    blocks, packing, plan = _forward_plan(
        geometry, out.dtype, input.strides, weight.strides, out.strides, workers, packed is not None, finite
    )
    if packed is not None:
        kept, right = packed.get(("direct", out.dtype, blocks), lambda: _packed_alone(blocks, packing, weight))
        if right:
            tasks.run_stages(out.dtype, [contraction.correlation(plan, input, kept, out, bias, relu, False)])
        return right
    unpacked = contraction.Unpacked(packing, weight)
    weights: np.ndarray | contraction.Unpacked = unpacked
    stages = []
    if not plan.packs:
        weights = tasks.workspace(blocks.packed_size + channels_last.READ_BEYOND, out.dtype)
        stages.append(contraction.packing(unpacked, blocks.groups, weights))
    stages.append(contraction.correlation(plan, input, weights, out, bias, relu, False, waits=len(stages)))
    tasks.run_stages(out.dtype, stages)
    return unpacked.finite()


def _packed_alone(
    blocks: contraction.Blocks, packing: contraction.Packing, weight: np.ndarray
) -> tuple[np.ndarray, bool]:
    """The packed weights, in memory of their own, and are they finite (known if the packing is one that looks)?"""
    packed = np.empty(blocks.packed_size + channels_last.READ_BEYOND, weight.dtype)
    unpacked = contraction.Unpacked(packing, weight)
    tasks.run_stages(weight.dtype, [contraction.packing(unpacked, blocks.groups, packed)])
    return packed, unpacked.finite()


def _safe_runs(
    operation: str, geometry: ConvGeometry, array: np.ndarray, weight: np.ndarray
) -> Iterator[tuple[ConvGeometry, slice, bool]]:
    """The batch as runs of samples that `fft` may be used on and runs that it may not: decided sample by sample."""
    safe = fft.safe_samples(operation, geometry, array, weight)
    ends = [*(np.flatnonzero(np.diff(safe)) + 1).tolist(), geometry.batch]
    for first, end in itertools.pairwise([0, *ends]):
        yield replace(geometry, batch=end - first), slice(first, end), bool(safe[first])


def _winograd_forward(geometry, input, weight, bias, relu, packed, out):
    m = winograd.tile_size(geometry, "forward")

    def transform(keep: bool) -> np.ndarray:
        return winograd.transform_weights(weight, out.dtype, "forward", m, _elements(weight), keep)

    v = transform(False) if packed is None else packed.get(("winograd", out.dtype, m), lambda: transform(True))
    strides = _elements(input), _elements(out)
    if bias is not None:
        bias = np.ascontiguousarray(bias)
    again = winograd.run(geometry, "forward", input, v, bias, relu, out, strides, get_num_threads())
    for n in np.flatnonzero(again):
        one = slice(n, n + 1)
        forward(replace(geometry, batch=1), input[one], weight, bias, relu, "direct", packed, out[one])


def _winograd_input_grad(geometry, weight, grad_output, bias, relu, out):
    m = winograd.tile_size(geometry, "input_grad")
    v = winograd.transform_weights(weight, out.dtype, "input_grad", m, _elements(weight))
    strides = _elements(grad_output), _elements(out)
    again = winograd.run(geometry, "input_grad", grad_output, v, bias, relu, out, strides, get_num_threads())
    for n in np.flatnonzero(again):
        one = slice(n, n + 1)
        input_grad(replace(geometry, batch=1), weight, grad_output[one], bias, relu, False, "direct", out[one])


@functools.lru_cache(maxsize=1024)
def _depthwise_weight_grad_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, dy: Strides
) -> depthwise.Plan:
    """From strides in bytes."""
    x, dy = _in_elements(x, dtype), _in_elements(dy, dtype)
    depth, height, width = map(depthwise.forward_line, _axes(geometry))
    lines = (depth, height, width)
    zeros, rows = geometry.padding_mode == "zeros", geometry.out_channels_per_group
    by_channels = depthwise_channels.applies(geometry, dtype, lines, x, dy, weight_gradient=True)
    by_planes = depthwise_planes.applies(dtype, lines, x, dy, zeros, weight_gradient=True)
    if by_planes and (not by_channels or depthwise_planes.pays(dtype, lines, weight_gradient=True)):
        return depthwise_planes.plan_weight_gradient(dtype, geometry.batch, geometry.groups, rows, lines, x, dy)
    if by_channels:
        return depthwise_channels.plan_weight_gradient(dtype, geometry.batch, geometry.groups, lines, x, dy)
    return depthwise.plan_weight_gradient(dtype, geometry.batch, geometry.groups, rows, lines, x, dy, zeros)


@functools.lru_cache(maxsize=1024)
def _turning_weight_grad_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, dy: Strides
) -> depthwise.Plan | None:
    """Of groups of few channels, as `_small_groups_plan`; None if that is not the way. From strides in bytes."""
    lines, x, dy = _forward_lines(geometry), _in_elements(x, dtype), _in_elements(dy, dtype)
    if not depthwise_channels.applies_to_groups(geometry, dtype, lines, x, dy, weight_gradient=True):
        return None
    return depthwise_channels.plan_weight_gradient_of_groups(geometry, dtype, lines, x, dy)


# Groups of so few channels in and out fill a quarter of the contraction's vectors of output channels, or less. Channel
# by channel, as depthwise convolutions of whole planes, their weight gradient takes 0.25 to 0.8 of the time; more where
# the operands do not stay in the cache, since they are read for each channel, and where there is little to do.
_FEW_IN_GROUP = 4
_MOST_READ_AGAIN = 64 * 1024 * 1024  # bytes, of all channels
_LEAST_BY_CHANNEL = 2_000_000  # operations


@functools.lru_cache(maxsize=1024)
def _small_groups_weight_grad_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, dy: Strides
) -> depthwise.Plan | None:
    """Of every n-th channel, where groups have n; None if that is not the way. From strides in bytes."""
    one = replace(geometry, in_channels=geometry.groups)
    sample = geometry.in_channels * math.prod(geometry.input_size)
    sample += geometry.out_channels * math.prod(geometry.output_size)
    if (
        geometry.groups == 1
        or max(geometry.in_channels_per_group, geometry.out_channels_per_group) > _FEW_IN_GROUP
        or geometry.flops < _LEAST_BY_CHANNEL
        or geometry.in_channels_per_group * geometry.batch * sample * dtype.itemsize > _MOST_READ_AGAIN
        or not depthwise.applies(one)
    ):
        return None
    x = (x[0], x[1] * geometry.in_channels_per_group, *x[2:])
    depth, height, width = map(depthwise.forward_line, _axes(one))
    elements = _in_elements(x, dtype), _in_elements(dy, dtype)
    zeros = geometry.padding_mode == "zeros"
    if not depthwise_planes.applies(dtype, (depth, height, width), *elements, zeros, weight_gradient=True):
        return None
    return _depthwise_weight_grad_plan(one, dtype, x, dy)


@functools.lru_cache(maxsize=1024)
def _weight_grad_plan(
    geometry: ConvGeometry, dtype: np.dtype, x: Strides, dy: Strides, dw: Strides
) -> tuple[contraction.Plan, bool]:
    """The plan, and if it is for exchanged operands; from strides in bytes."""
    x, dy, dw = (_in_elements(strides, dtype) for strides in (x, dy, dw))
    axes, x = contraction.fold_strides(_axes(geometry), x)
    batch, axes, x, dy = contraction.fold_batch(geometry.batch, axes, x, dy)
    shape = tuple(axis.out for axis in axes)
    in_place = contraction.can_stay_in_place(axes, x) and contraction.is_flat(shape, dy[2:])
    rows, channels = geometry.out_channels_per_group, geometry.in_channels_per_group
    steps = rows * dw[0], dw[0], dw[1]
    exchanged = (
        in_place
        and contraction.can_stay_in_place(axes, dy)
        and contraction.is_better_exchanged(dtype, rows, channels)
    )
    if exchanged:  # dw[o, c] = sum of dy[o] * x[c] over the pixels: the gradient of dy's weights for x, transposed
        rows, channels, x, dy, steps = channels, rows, dy, x, (steps[0], steps[2], steps[1])
    offsets = _offsets([range(n) for n in geometry.kernel_size], dw[2:])
    plan = contraction.plan_weight_gradient(
        dtype, batch, geometry.groups, rows, channels, axes, x, dy, steps, offsets, geometry.padding_mode == "zeros",
        in_place,
    )  # fmt: skip
    return plan, exchanged


@_on_reals(_weight_grad_through_float32)
def weight_grad(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, accumulate: bool, algorithm: str,
    out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the weight, shape (O, C/groups, KD, KH, KW)."""
    if grad_output.size == 0:
        if not accumulate:
            out[...] = 0
        return
    input, grad_output = _readable(input), _readable(grad_output)
    if algorithm == "loops":
        loops.weight_grad(geometry, input, grad_output, accumulate, out)
        return
    if algorithm == "fft" and fft.weight_grad(geometry, input, grad_output, accumulate, out):
        return
    if algorithm == "winograd":
        result = np.empty(out.shape, out.dtype) if accumulate else out
        if winograd_gradient.run(
            geometry, input, grad_output, result, (_elements(input), _elements(grad_output), _elements(result))
        ):
            if accumulate:
                out += result
            return
    if depthwise.applies(geometry):
        depthwise_plan = _depthwise_weight_grad_plan(geometry, out.dtype, input.strides, grad_output.strides)
        depthwise.weight_gradient(depthwise_plan, input, grad_output, out, accumulate)
        return
    if geometry.groups > 1:
        turning_plan = _turning_weight_grad_plan(geometry, out.dtype, input.strides, grad_output.strides)
        if turning_plan is not None:
            depthwise.weight_gradient(turning_plan, input, grad_output, out, accumulate)
            return
    small_plan = _small_groups_weight_grad_plan(geometry, out.dtype, input.strides, grad_output.strides)
    if small_plan is not None:
        channels = geometry.in_channels_per_group
        for c in range(channels):
            depthwise.weight_gradient(small_plan, input[:, c::channels], grad_output, out[:, c : c + 1], accumulate)
        return
    plan, exchanged = _weight_grad_plan(geometry, out.dtype, input.strides, grad_output.strides, out.strides)
    if exchanged:
        input, grad_output = grad_output, input
    contraction.weight_gradient(plan, input, grad_output, out, accumulate)


@dataclass(frozen=True)
class _Phase:
    """The elements of the input gradient that see the same taps: every stride-th element in each dimension.

    Or several of these as rows of one product (`_Rows`), by the place of the first of them.
    """

    where: tuple[slice, ...]  # of the input gradient (N, C, D, H, W)
    part: int
    packed: slice  # of the packed weights of all phases
    plan: contraction.Plan


@dataclass(frozen=True)
class _Part:
    """Products of as many rows, whose weights are packed together. Rows are (phase, channel)."""

    groups: int
    phases: int
    channels: int
    packing: contraction.Packing
    packed: slice

    def bias_of_rows(self, bias: np.ndarray) -> np.ndarray:
        return np.tile(bias.reshape(self.groups, 1, self.channels), (1, self.phases, 1)).ravel()


@dataclass(frozen=True)
class _Phases:
    each: tuple[_Phase, ...]
    parts: tuple[_Part, ...]
    order: tuple[int, ...] | None  # see `_Rows`
    untouched: tuple[tuple[slice, ...], ...]  # `where` of elements that no tap reaches
    packed_size: int
    padded: bool  # does a phase see zeros around the output gradient?


def _phase_axis(
    first: int, size: int, taps: int, stride: int, dilation: int, before: int, out: int
) -> tuple[tuple[int, ...], contraction.Axis]:
    """Input elements first, first + stride, ... as a correlation with the output gradient; its taps, and its axis.

    Input element q is met by tap k in output position p = (q + before - k*dilation)/stride, if that is an integer. For
    q = first + stride*t this is t plus a number per tap: stride 1, dilation 1 of the output, taps in falling order.
    """
    meeting = tuple(k for k in range(taps) if (first + before - k * dilation) % stride == 0)[::-1]
    count = -(-(size - first) // stride)
    if not meeting:
        return meeting, contraction.Axis(count, 0, 1, 1, np.zeros(0, np.int64), 0, out)
    shift = (first + before - meeting[0] * dilation) // stride
    step = dilation // math.gcd(stride, dilation)
    p = np.arange(count + (len(meeting) - 1) * step, dtype=np.int64) + shift
    source = np.where((p >= 0) & (p < out), p, -1)
    return meeting, contraction.Axis(count, len(meeting), 1, step, source, -shift, out)


def _phase_runs(
    size: int, taps: int, stride: int, dilation: int, before: int, out: int
) -> list[tuple[int, ...]]:
    """The phases of a dimension, those together that may be rows of one product.

    What tap k gives to input element q, tap k + 1 gives to q + dilation, from the same output position. So phases that
    are `dilation` apart have the same product, with the next taps, if they have as many, of the same output positions.
    """
    runs: dict[int, list[int]] = {}  # by the last phase
    seen = {}
    for first in range(min(stride, size)):
        meeting, axis = _phase_axis(first, size, taps, stride, dilation, before, out)
        seen[first] = axis.out, len(meeting), axis.before
        joins = bool(meeting) and seen.get(first - dilation) == seen[first]
        runs[first] = [*(runs.pop(first - dilation) if joins else []), first]
    return sorted(map(tuple, runs.values()))


_Runs = tuple[list[tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Rows:
    """What the rows of the products of an input gradient are: (phase of one axis, input channel).

    The few channels of a phase alone would leave most rows of the microkernel's tile without work.
    """

    runs: _Runs  # phases of each axis, those together that are rows of one product
    axis: int = 0  # whose phases are rows, if any are
    each_channel: bool = False  # is a channel a group of its own? Else the phases of all are evenly spaced in memory
    order: tuple[int, ...] | None = None  # axes of the weight from outer to inner, where its memory must have them so


def _choose_rows(geometry: ConvGeometry, dtype: np.dtype, w: Strides, dx: Strides) -> _Rows:
    """From strides in elements."""
    runs = tuple(
        map(
            _phase_runs, geometry.input_size, geometry.kernel_size, geometry.stride, geometry.dilation,
            geometry.pad_before, geometry.output_size,
        )
    )  # fmt: skip
    alone: _Runs = tuple([(first,) for first in sorted(itertools.chain(*each))] for each in runs)
    channels = geometry.in_channels_per_group
    spaced = [channels == 1 or geometry.dilation[a] * dx[2 + a] == channels * dx[1] for a in range(3)]
    lengths = [max(map(len, each)) for each in runs]
    axis = max(range(3), key=lambda a: (lengths[a] > 1 and spaced[a], lengths[a], a))
    each_channel = not spaced[axis]
    if (
        channels >= simd.tile(dtype.itemsize * 8).rows
        or lengths[axis] == 1
        or (each_channel and (geometry.groups > 1 or lengths[axis] <= channels))
    ):
        return _Rows(alone)
    joined = tuple(each if a == axis else alone[a] for a, each in enumerate(runs))
    order = None
    if channels > 1 and not each_channel and w[2 + axis] != channels * w[1]:
        order = (0, *(2 + other for other in range(3) if other != axis), 2 + axis, 1)
    return _Rows(joined, axis, each_channel, order)


def _in_order(weight: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """The same array, contiguous with its axes in this order from outer to inner."""
    return np.ascontiguousarray(weight.transpose(order)).transpose(np.argsort(order))


def _backward_lines(geometry: ConvGeometry) -> depthwise.Lines:
    each = []
    for size, taps, stride, dilation, before, positions in zip(
        geometry.input_size, geometry.kernel_size, geometry.stride, geometry.dilation, geometry.pad_before,
        geometry.output_size, strict=True,
    ):  # fmt: skip
        phases = [
            _phase_axis(first, size, taps, stride, dilation, before, positions) for first in range(min(stride, size))
        ]
        each.append(depthwise.backward_line(tuple(phases), stride, positions))
    depth, height, width = each
    return depth, height, width


@functools.lru_cache(maxsize=1024)
def _depthwise_input_grad_plan(
    geometry: ConvGeometry, dtype: np.dtype, dy: Strides, dx: Strides, add: bool, workers: int
) -> depthwise.Plan:
    """From strides in bytes."""
    dy, dx = _in_elements(dy, dtype), _in_elements(dx, dtype)
    return _depthwise_plan(
        geometry, dtype, _backward_lines(geometry), 1, geometry.out_channels_per_group, dy, dx, True, False, add,
        workers,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _input_grad_phases(
    geometry: ConvGeometry, dtype: np.dtype, w: Strides, dy: Strides, dx: Strides, workers: int, packed: bool
) -> _Phases:
    """From strides in bytes. The reduction is (output channel, tap of the phase)."""
    w, dy, dx = (_in_elements(strides, dtype) for strides in (w, dy, dx))
    shape = (geometry.out_channels, geometry.in_channels_per_group, *geometry.kernel_size)
    rows = _choose_rows(geometry, dtype, w, dx)
    if rows.order:
        w = _elements(_in_order(np.empty(shape, dtype), rows.order))
    reached: dict[int, list] = {}  # by the number of phases that are rows
    untouched = []
    for runs in itertools.product(*rows.runs):
        first = tuple(run[0] for run in runs)
        taps, axes = zip(
            *map(
                _phase_axis, first, geometry.input_size, geometry.kernel_size, geometry.stride, geometry.dilation,
                geometry.pad_before, geometry.output_size,
            ),
            strict=True,
        )  # fmt: skip
        where = (slice(None), slice(None), *map(slice, first, (None,) * 3, geometry.stride))
        if all(taps):
            reached.setdefault(len(runs[rows.axis]), []).append((where, axes, _offsets(taps, w[2:])))
        else:
            untouched.append(where)
    packed = packed or sum(map(len, reached.values())) > 1
    phases: list[_Phase] = []
    parts: list[_Part] = []
    size = 0
    for number, products in reached.items():
        each_channel = number > 1 and rows.each_channel
        groups, channels = geometry.groups, geometry.in_channels_per_group
        group_steps = geometry.out_channels_per_group * dy[1], channels * dx[1]
        packing_steps = geometry.out_channels_per_group * w[0], w[1], w[0]  # of group, row and channel
        row_step = dx[1]
        if each_channel:
            groups, channels, group_steps = channels, 1, (0, dx[1])
            packing_steps = w[1], w[1], w[0]
        if number > 1 and channels == 1:
            row_step = geometry.dilation[rows.axis] * dx[2 + rows.axis]
            packing_steps = packing_steps[0], w[2 + rows.axis], w[0]
        y = (dx[0], row_step, *(step * stride for step, stride in zip(dx[2:], geometry.stride, strict=True)))
        begin, blocks, offsets = size, [], []
        cuts = [
            contraction.make_blocks(
                dtype, groups, number * channels, geometry.out_channels_per_group, axes,
                contraction.can_stay_in_place(axes, dy),
            )
            for _, axes, _ in products
        ]  # fmt: skip
        all_axes = [axes for _, axes, _ in products]
        small = small_planes.cut_all(dtype, geometry.batch, cuts, all_axes, workers, packing_steps[1] == 1)
        needed = small_planes.needed(all_axes) if small else 1
        last = channels_last.cut_all(dtype, cuts, all_axes, dy, y, needed)
        for (where, axes, of_taps), cut in zip(products, last or small or cuts, strict=True):
            if last:
                plan = channels_last.plan_correlation(
                    dtype, geometry.batch, cut, axes, dy, y, True, workers, packed, group_steps
                )
            elif small:
                plan = small_planes.plan_correlation(
                    dtype, geometry.batch, cut, axes, dy, y, workers, packed=packed, group_steps=group_steps
                )
            else:
                batch, folded, from_, to = contraction.fold_batch(geometry.batch, axes, dy, y)
                in_place = contraction.can_stay_in_place(folded, from_)
                plan = contraction.plan_correlation(
                    dtype, batch, cut, folded, from_, to, True, in_place, workers, packed=packed,
                    group_steps=group_steps,
                )  # fmt: skip
            needed = 0 if plan.packs else cut.packed_size
            phases.append(_Phase(where, len(parts), slice(size, size + needed), plan))
            blocks.append(cut)
            offsets.append(of_taps)
            size += needed
        padded = any(phase.plan.parameters[contraction.PADDED] for phase in phases[-len(products) :])
        if len(products) == 1:
            packing = contraction.plan_packing(
                blocks[0], shape, w, dtype.itemsize, packing_steps, offsets[0], check_finite=padded
            )
        else:
            places = [phase.packed.start - begin for phase in phases[-len(products) :]]
            packing = contraction.plan_phase_packing(
                blocks, places, shape, w, dtype.itemsize, packing_steps, offsets, check_finite=padded
            )
        parts.append(_Part(groups, number, channels, packing, slice(begin, size)))
    padded = any(phase.plan.parameters[contraction.PADDED] for phase in phases)
    return _Phases(tuple(phases), tuple(parts), rows.order, tuple(untouched), size, padded)


@_on_reals(_input_grad_through_float32)
def input_grad(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, bias: np.ndarray | None, relu: bool,
    accumulate: bool, algorithm: str, out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu (both for the transposed convolution)."""
    if out.size == 0:
        return
    weight, grad_output = _readable(weight), _readable(grad_output)
    if algorithm == "loops":
        loops.input_grad(geometry, weight, grad_output, bias, relu, accumulate, out)
        return
    if bias is not None:
        bias = np.ascontiguousarray(bias)
    if algorithm == "winograd":
        result = np.empty_like(out) if accumulate else out  # a sample may have to be computed twice
        _winograd_input_grad(geometry, weight, grad_output, bias, relu, result)
        if accumulate:
            np.add(out, result, out=out)
        return
    if geometry.padding_mode != "zeros":
        _folded_input_grad(geometry, weight, grad_output, bias, relu, accumulate, algorithm, out)
        return
    if algorithm == "fft":
        for some, run, safe in _safe_runs("input_grad", geometry, grad_output, weight):
            if safe:
                fft.input_grad(some, weight, grad_output[run], bias, relu, accumulate, out[run])
            else:
                input_grad(some, weight, grad_output[run], bias, relu, accumulate, "direct", out[run])
        return
    if depthwise.applies(geometry):
        if not np.isfinite(weight).all():  # as below
            _summed_input_grad(geometry, weight, grad_output, bias, relu, accumulate, out)
            return
        strides = grad_output.strides, out.strides
        plan = _depthwise_input_grad_plan(geometry, out.dtype, *strides, accumulate, get_num_threads())
        depthwise.correlate(plan, grad_output, weight, out, bias, relu, accumulate)
        return
    if geometry.groups > 1 and np.isfinite(weight).all():  # as above
        strides = grad_output.strides, out.strides
        groups_plan = _small_groups_plan(geometry, out.dtype, *strides, False, get_num_threads())
        if groups_plan is not None:
            depthwise.correlate(groups_plan, grad_output, weight, out, bias, relu, accumulate)
            return
    workers = tasks.workers(contraction.work(geometry.flops))
    phases = _input_grad_phases(
        geometry, out.dtype, weight.strides, grad_output.strides, out.strides, workers, accumulate
    )
    memory = tasks.workspace(phases.packed_size + channels_last.READ_BEYOND, out.dtype)
    if phases.order:
        weight = _in_order(weight, phases.order)
    unpacked = [contraction.Unpacked(part.packing, weight) for part in phases.parts]
    stages = []
    if phases.packed_size:
        for part, weights in zip(phases.parts, unpacked, strict=True):
            stages.append(contraction.packing(weights, part.groups, memory[part.packed]))
    # The zeros around grad_output are no outputs: times an infinite weight they would make a nan where there is no such
    # product. The plain loops sum only what exists.
    if phases.padded and accumulate:  # once added to, `out` cannot be computed a second time
        tasks.run_stages(out.dtype, stages)
        stages = []
        if not all(weights.finite() for weights in unpacked):
            _summed_input_grad(geometry, weight, grad_output, bias, relu, accumulate, out)
            return
    if phases.untouched and bias is None and not accumulate:
        out[...] = 0  # one pass over memory that lies together, not one for each of them
    else:
        for where in phases.untouched:
            _fill_without_taps(out[where], bias, relu, accumulate)
    biases = [None if bias is None else part.bias_of_rows(bias) for part in phases.parts]
    waits = len(stages)
    for phase in phases.each:
        stages.append(
            contraction.correlation(
                phase.plan, grad_output, unpacked[phase.part] if phase.plan.packs else memory[phase.packed],
                out[phase.where], biases[phase.part], relu, accumulate, waits,
            )
        )  # fmt: skip
    tasks.run_stages(out.dtype, stages)
    if not all(weights.finite() for weights in unpacked):
        _summed_input_grad(geometry, weight, grad_output, bias, relu, accumulate, out)


def _fill_without_taps(out: np.ndarray, bias: np.ndarray | None, relu: bool, accumulate: bool) -> None:
    """The gradient of elements that no window reaches is zero."""
    value = out if accumulate else np.zeros((), out.dtype)
    if bias is not None:
        value = value + bias[None, :, None, None, None]
    out[...] = np.maximum(value, 0) if relu else value


def _folded_input_grad(geometry, weight, grad_output, bias, relu, accumulate, algorithm, out):
    """Input gradient of the other padding modes: that of the padded input, then added up where its elements stand.

    One sample at a time, since the padded gradient is memory on top.
    """
    padded_size = tuple(map(len, geometry.input_coordinates))
    one = replace(
        geometry, batch=1, input_size=padded_size, pad_before=(0, 0, 0), pad_after=(0, 0, 0), padding_mode="zeros"
    )
    padded = np.empty((1, geometry.in_channels, *padded_size), out.dtype)
    if bias is None:
        bias = np.zeros(geometry.in_channels, out.dtype)
    firsts, wheres = zip(*geometry.padded_coordinates, strict=True)
    for n in range(geometry.batch):
        input_grad(one, weight, grad_output[n : n + 1], None, False, False, algorithm, padded)
        fold_kernel[out.dtype](padded[0], bias, relu, accumulate, firsts, wheres, out[n])


@kernel(
    lambda real: types.void(
        array_of(real, 4), array_of(real, 1), types.boolean, types.boolean, _tables, _tables, output_of(real, 4)
    )
)
def fold_kernel(padded, bias, relu, accumulate, firsts, wheres, dx):
    channels, in_d, in_h, in_w = dx.shape
    first_d, first_h, first_w = firsts
    where_d, where_h, where_w = wheres
    zero = padded.dtype.type(0)
    for c in prange(channels):
        for d in range(in_d):
            for h in range(in_h):
                for v in range(in_w):
                    total = zero
                    for a in range(first_d[d], first_d[d + 1]):
                        for b in range(first_h[h], first_h[h + 1]):
                            for e in range(first_w[v], first_w[v + 1]):
                                total += padded[c, where_d[a], where_h[b], where_w[e]]
                    if accumulate:
                        total += dx[c, d, h, v]
                    total += bias[c]
                    if relu and total < zero:
                        total = zero
                    dx[c, d, h, v] = total


def _summed_input_grad(geometry, weight, grad_output, bias, relu, accumulate, out):
    loops.input_grad(geometry, weight, grad_output, bias, relu, accumulate, out)


@_on_reals(_bias_grad_through_float32)
def bias_grad(grad_output: np.ndarray, accumulate: bool, out: np.ndarray) -> None:
    """out (+)= grad_output summed over everything but its channels."""
    loops.bias_grad_kernel[out.dtype](grad_output, accumulate, out)
