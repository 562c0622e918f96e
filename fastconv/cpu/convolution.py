"""Convolution on the CPU: forward pass and the gradients of weight, input and bias.

The entry functions take arrays in the canonical form (N, C, D, H, W), weights (O, C/groups, KD, KH, KW), as views of
whatever strides the caller's arrays have, and fill `out`. `cuda_kernels.convolution` has the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import prange, types

from ..geometry import ConvGeometry
from . import contraction
from .jit import array_of, kernel, output_of
from .threads import get_num_threads

_size3 = types.UniTuple(types.int64, 3)
_table = array_of(types.int64, 1)
# the index of a prange loop is unsigned, and Numba makes unsigned // signed a float: hence int64(task) below
_tables = types.UniTuple(_table, 3)


def _through_float32(operation: Callable[..., None]) -> Callable[..., None]:
    """Let an operation on float32 take float16 and bfloat16: converted on the way in, rounded once on the way out."""

    @functools.wraps(operation)
    def converting(*arguments):
        *inputs, out = arguments
        if out.dtype.itemsize != 2:
            return operation(*arguments)
        inputs = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in inputs]
        result = out.astype(np.float32)  # its values matter where the operation accumulates
        operation(*inputs, result)
        out[...] = result

    return converting


def _elements(array: np.ndarray) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(step // array.itemsize for step in array.strides)


def _readable(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if its elements do not lie at multiples of their size (a field of a record)."""
    if array.flags.aligned and not any(step % array.itemsize for step in array.strides):
        return array
    return np.ascontiguousarray(array)


def _into_writable(operation: Callable[..., None]) -> Callable[..., None]:
    """Let an operation fill an `out` whose elements do not lie at multiples of their size, by way of one that does."""

    @functools.wraps(operation)
    def writing(*arguments):
        *inputs, out = arguments
        whole = _readable(out)
        operation(*inputs, whole)
        if whole is not out:
            out[...] = whole

    return writing


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
    geometry: ConvGeometry, dtype: np.dtype, x: tuple[int, ...], y: tuple[int, ...], workers: int
) -> tuple[contraction.Blocks, contraction.Plan]:
    axes = _axes(geometry)
    in_place = contraction.can_stay_in_place(axes, x, y)
    blocks = contraction.make_blocks(
        dtype, geometry.groups, geometry.out_channels_per_group, geometry.in_channels_per_group, axes, in_place
    )
    zeros = geometry.padding_mode == "zeros"
    return blocks, contraction.plan_correlation(dtype, geometry.batch, blocks, axes, x, y, zeros, in_place, workers)


def _pack_forward(blocks: contraction.Blocks, weight: np.ndarray) -> np.ndarray:
    """Rows are output channels, and the reduction is (input channel, tap)."""
    row, channel, *taps = _elements(weight)
    tap_offset = _offsets(weight.shape[2:], taps)
    return contraction.pack_weights(
        blocks, weight.dtype, contraction._address(weight), blocks.rows * row, row, channel, tap_offset
    )


def _offsets(shape: tuple[int, ...], steps: list[int]) -> np.ndarray:
    """Offset of every element of a small array of these strides, in order."""
    offsets = np.zeros(1, np.int64)
    for n, step in zip(shape, steps, strict=True):
        offsets = (offsets[:, None] + np.arange(n) * step).ravel()
    return offsets


@_through_float32
@_into_writable
def forward(
    geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, relu: bool, out: np.ndarray
) -> None:
    """out = input convolved with weight, plus bias, through max(0, .) if relu."""
    if out.size == 0:
        return
    input, weight = _readable(input), _readable(weight)
    blocks, plan = _forward_plan(geometry, out.dtype, _elements(input), _elements(out), get_num_threads())
    packed = _pack_forward(blocks, weight)
    if bias is not None:
        bias = np.ascontiguousarray(bias)
    contraction.correlate(plan, input, packed, out, bias, relu, False)


@_through_float32
def weight_grad(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, accumulate: bool, out: np.ndarray
) -> None:
    """out (+)= gradient of the weight, shape (O, C/groups, KD, KH, KW)."""
    weight_grad_kernel[out.dtype](
        input, grad_output, accumulate, *geometry.input_coordinates, geometry.stride, geometry.dilation, out
    )


@kernel(
    lambda real: types.void(
        array_of(real, 5), array_of(real, 5), types.boolean, _table, _table, _table, _size3, _size3, output_of(real, 5)
    )
)
def weight_grad_kernel(x, dy, accumulate, source_d, source_h, source_w, stride, dilation, dw):
    batch, _, out_d, out_h, out_w = dy.shape
    out_channels, per_group, kernel_d, kernel_h, kernel_w = dw.shape
    out_per_group = out_channels * per_group // x.shape[1]
    zero = x.dtype.type(0)
    for task in prange(out_channels * per_group):
        o, c = divmod(np.int64(task), per_group)
        channel = o // out_per_group * per_group + c
        for i in range(kernel_d):
            for j in range(kernel_h):
                for k in range(kernel_w):
                    total = zero
                    for n in range(batch):
                        for d in range(out_d):
                            xd = source_d[d * stride[0] + i * dilation[0]]
                            for h in range(out_h):
                                xh = source_h[h * stride[1] + j * dilation[1]]
                                row = zero  # summed row by row: shorter sums round less
                                for v in range(out_w):
                                    xw = source_w[v * stride[2] + k * dilation[2]]
                                    inside = xd >= 0 and xh >= 0 and xw >= 0
                                    value = x[n, channel, xd, xh, xw] if inside else zero
                                    row += dy[n, o, d, h, v] * value
                                total += row
                    if accumulate:
                        total += dw[o, c, i, j, k]
                    dw[o, c, i, j, k] = total


@_through_float32
def input_grad(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, bias: np.ndarray | None, relu: bool,
    accumulate: bool, out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu (both for the transposed convolution)."""
    if bias is None:
        bias = np.zeros(geometry.in_channels, out.dtype)
    firsts, wheres = zip(*geometry.padded_coordinates, strict=True)
    input_grad_kernel[out.dtype](
        weight, grad_output, bias, relu, accumulate, firsts, wheres, geometry.stride, geometry.dilation, out
    )


@kernel(
    lambda real: types.void(
        array_of(real, 5), array_of(real, 5), array_of(real, 1), types.boolean, types.boolean, _tables, _tables,
        _size3, _size3, output_of(real, 5),
    )  # fmt: skip
)
def input_grad_kernel(w, dy, bias, relu, accumulate, firsts, wheres, stride, dilation, dx):
    batch, in_channels, in_d, in_h, in_w = dx.shape
    _, out_channels, out_d, out_h, out_w = dy.shape
    _, per_group, kernel_d, kernel_h, kernel_w = w.shape
    out_per_group = out_channels * per_group // in_channels
    first_d, first_h, first_w = firsts
    where_d, where_h, where_w = wheres
    zero = w.dtype.type(0)
    for task in prange(batch * in_channels):
        n, channel = divmod(np.int64(task), in_channels)
        group, c = divmod(channel, per_group)
        for d in range(in_d):
            for h in range(in_h):
                for v in range(in_w):
                    total = bias[channel]
                    # every place this element has in the padded input, and there every tap that meets an output
                    for a in range(first_d[d], first_d[d + 1]):
                        for i in range(kernel_d):
                            p = where_d[a] - i * dilation[0]
                            if p < 0 or p % stride[0] != 0 or p // stride[0] >= out_d:
                                continue
                            for b in range(first_h[h], first_h[h + 1]):
                                for j in range(kernel_h):
                                    q = where_h[b] - j * dilation[1]
                                    if q < 0 or q % stride[1] != 0 or q // stride[1] >= out_h:
                                        continue
                                    for e in range(first_w[v], first_w[v + 1]):
                                        for k in range(kernel_w):
                                            r = where_w[e] - k * dilation[2]
                                            if r < 0 or r % stride[2] != 0 or r // stride[2] >= out_w:
                                                continue
                                            for f in range(out_per_group):
                                                o = group * out_per_group + f
                                                total += (
                                                    w[o, c, i, j, k]
                                                    * dy[n, o, p // stride[0], q // stride[1], r // stride[2]]
                                                )
                    if accumulate:
                        total += dx[n, channel, d, h, v]
                    if relu and total < zero:
                        total = zero
                    dx[n, channel, d, h, v] = total


@_through_float32
def bias_grad(grad_output: np.ndarray, accumulate: bool, out: np.ndarray) -> None:
    """out (+)= grad_output summed over everything but its channels."""
    bias_grad_kernel[out.dtype](grad_output, accumulate, out)


@kernel(lambda real: types.void(array_of(real, 5), types.boolean, output_of(real, 1)))
def bias_grad_kernel(dy, accumulate, db):
    batch, channels, out_d, out_h, out_w = dy.shape
    for o in prange(channels):
        total = 0.0  # float64: the sum may run over millions of elements
        for n in range(batch):
            for d in range(out_d):
                for h in range(out_h):
                    for v in range(out_w):
                        total += dy[n, o, d, h, v]
        if accumulate:
            total += db[o]
        db[o] = total
