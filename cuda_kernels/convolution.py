"""Convolution on CUDA: forward pass and the gradients of weight, input and bias.

The entry functions are those of `fastconv.cpu.convolution`, the kernels those of `fastconv.cpu.loops`, word for word,
with the same arguments in the same order, on `DeviceArray`s in the canonical form (N, C, D, H, W), weights
(O, C/groups, KD, KH, KW), of any strides.

Where the device has what they need, the kernels of `depthwise`, of `implicit_gemm` and, for the gradient of a bias, of
`channel_sums` do what they apply to, unless the algorithm is "loops". Those here take any strides, types and paddings.
One thread computes one element of the result, from the first term of its sum to the last: no thread depends on another,
so the result depends neither on the grid nor on the batch around a sample. A thread steps by the size of the grid, and
all indices are 64-bit: arrays may have more than 2**31 elements. A kernel is written once for every type of element:
`load` makes a number to compute with of a stored one, `store` the other way round (`jit.Element`).
"""

from __future__ import annotations

import functools

import numpy as np
from numba import types

from ..geometry import ConvGeometry
from ..packed import PackedWeights
from . import channel_sums, depthwise, implicit_gemm
from ._cuda import DeviceArray, cuda, current_device, has_engine, launch, upload
from .jit import array_of, device_function, kernel

__all__ = ["bias_grad", "forward", "input_grad", "weight_grad"]

_size3 = types.UniTuple(types.int64, 3)
_table = array_of(types.int64, 1)
_tables = types.UniTuple(_table, 3)


@device_function
def _position(index, shape):
    """The five coordinates of element `index` of an array of this shape, counted in C order."""
    rest, v = divmod(index, shape[4])
    rest, h = divmod(rest, shape[3])
    rest, d = divmod(rest, shape[2])
    n, c = divmod(rest, shape[1])
    return n, c, d, h, v


@functools.lru_cache(maxsize=1024)
def _input_coordinates(geometry: ConvGeometry, device: int) -> tuple[DeviceArray, ...]:
    return upload(*geometry.input_coordinates)


@functools.lru_cache(maxsize=1024)
def _padded_coordinates(geometry: ConvGeometry, device: int) -> tuple[tuple[DeviceArray, ...], tuple[DeviceArray, ...]]:
    firsts, wheres = zip(*geometry.padded_coordinates, strict=True)
    return upload(*firsts), upload(*wheres)


def _none(dtype: np.dtype) -> DeviceArray:
    """A bias of no elements, which the kernels take for no bias."""
    return DeviceArray(0, (0,), None, dtype, None, stream=-1)


def _may_be_faster(algorithm: str) -> bool:
    """Whether the kernels that are not plain loops come first."""
    return algorithm != "loops" and has_engine()


def forward(
    geometry: ConvGeometry, input: DeviceArray, weight: DeviceArray, bias: DeviceArray | None, relu: bool,
    algorithm: str, packed: PackedWeights | None, out: DeviceArray,
) -> None:  # fmt: skip
    """out = input convolved with weight, plus bias, through max(0, .) if relu."""
    bias = _none(out.dtype) if bias is None else bias
    if _may_be_faster(algorithm) and any(
        m.forward(geometry, input, weight, bias, relu, out) for m in (depthwise, implicit_gemm)
    ):
        return
    launch(
        forward_kernel[out.dtype], out.size, input, weight, bias, relu,
        *_input_coordinates(geometry, current_device()), geometry.stride, geometry.dilation, out,
    )  # fmt: skip


@kernel(
    lambda element: (
        array_of(element.stored, 5), array_of(element.stored, 5), array_of(element.stored, 1), types.boolean,
        _table, _table, _table, _size3, _size3, array_of(element.stored, 5),
    )
)  # fmt: skip
def forward_kernel(element):
    load, store, zero = element.load, element.store, element.real(0)

    def forward_kernel(
        x,  # (N, C, D, H, W)
        w,  # (O, C/groups, KD, KH, KW)
        bias,  # (O,), or no elements
        relu,
        source_d,  # the input coordinate at each padded one, -1 where a zero stands
        source_h,
        source_w,
        stride,
        dilation,
        y,  # (N, O, PD, PH, PW)
    ):
        """y[n, o, p] = bias[o] + sum over c, k of  w[o, c, k] * x[n, first + c, source[p * stride + k * dilation]]"""
        out_per_group = y.shape[1] * w.shape[1] // x.shape[1]
        per_group, kernel_d, kernel_h, kernel_w = w.shape[1:]
        shape, biased = y.shape, bias.size > 0
        for index in range(cuda.grid(1), y.size, cuda.gridsize(1)):
            n, o, d, h, v = _position(index, shape)
            first = o // out_per_group * per_group  # the first input channel of this group
            total = load(bias[o]) if biased else zero
            for c in range(per_group):
                for i in range(kernel_d):
                    xd = source_d[d * stride[0] + i * dilation[0]]
                    for j in range(kernel_h):
                        xh = source_h[h * stride[1] + j * dilation[1]]
                        for k in range(kernel_w):
                            xw = source_w[v * stride[2] + k * dilation[2]]
                            # a zero of the padding is a value like any other: it is multiplied, not skipped
                            inside = xd >= 0 and xh >= 0 and xw >= 0
                            value = load(x[n, first + c, xd, xh, xw]) if inside else zero
                            total += load(w[o, c, i, j, k]) * value
            if relu and total < zero:
                total = zero
            y[n, o, d, h, v] = store(total)

    return forward_kernel


def weight_grad(
    geometry: ConvGeometry, input: DeviceArray, grad_output: DeviceArray, accumulate: bool, algorithm: str,
    out: DeviceArray,
) -> None:  # fmt: skip
    """out (+)= gradient of the weight, shape (O, C/groups, KD, KH, KW)."""
    if _may_be_faster(algorithm) and any(
        m.weight_grad(geometry, input, grad_output, accumulate, out) for m in (depthwise, implicit_gemm)
    ):
        return
    launch(
        weight_grad_kernel[out.dtype], out.size, input, grad_output, accumulate,
        *_input_coordinates(geometry, current_device()), geometry.stride, geometry.dilation, out,
    )  # fmt: skip


@kernel(
    lambda element: (
        array_of(element.stored, 5), array_of(element.stored, 5), types.boolean, _table, _table, _table, _size3,
        _size3, array_of(element.stored, 5),
    )
)  # fmt: skip
def weight_grad_kernel(element):
    load, store, zero = element.load, element.store, element.real(0)

    def weight_grad_kernel(
        x,  # (N, C, D, H, W)
        dy,  # (N, O, PD, PH, PW)
        accumulate,
        source_d,  # the input coordinate at each padded one, -1 where a zero stands
        source_h,
        source_w,
        stride,
        dilation,
        dw,  # (O, C/groups, KD, KH, KW)
    ):
        """dw[o, c, k] = sum over n, p of  dy[n, o, p] * x[n, first + c, source[p * stride + k * dilation]]"""
        batch, out_channels, out_d, out_h, out_w = dy.shape
        per_group = dw.shape[1]
        out_per_group = out_channels * per_group // x.shape[1]
        shape = dw.shape
        for index in range(cuda.grid(1), dw.size, cuda.gridsize(1)):
            o, c, i, j, k = _position(index, shape)
            channel = o // out_per_group * per_group + c
            total = zero
            for n in range(batch):
                image = zero
                for d in range(out_d):
                    xd = source_d[d * stride[0] + i * dilation[0]]
                    for h in range(out_h):
                        xh = source_h[h * stride[1] + j * dilation[1]]
                        row = zero  # summed row by row and image by image: shorter sums round less
                        for v in range(out_w):
                            xw = source_w[v * stride[2] + k * dilation[2]]
                            inside = xd >= 0 and xh >= 0 and xw >= 0
                            value = load(x[n, channel, xd, xh, xw]) if inside else zero
                            row += load(dy[n, o, d, h, v]) * value
                        image += row
                total += image
            if accumulate:
                total += load(dw[o, c, i, j, k])
            dw[o, c, i, j, k] = store(total)

    return weight_grad_kernel


def input_grad(
    geometry: ConvGeometry, weight: DeviceArray, grad_output: DeviceArray, bias: DeviceArray | None, relu: bool,
    accumulate: bool, algorithm: str, out: DeviceArray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu (both for the transposed convolution)."""
    bias = _none(out.dtype) if bias is None else bias
    if _may_be_faster(algorithm) and any(
        m.input_grad(geometry, weight, grad_output, bias, relu, accumulate, out) for m in (depthwise, implicit_gemm)
    ):
        return
    firsts, wheres = _padded_coordinates(geometry, current_device())
    launch(
        input_grad_kernel[out.dtype], out.size, weight, grad_output, bias, relu, accumulate, firsts, wheres,
        geometry.stride, geometry.dilation, out,
    )  # fmt: skip


# One loop for each dimension of places and of taps: the equation, which helpers would take apart.
@kernel(
    lambda element: (
        array_of(element.stored, 5), array_of(element.stored, 5), array_of(element.stored, 1), types.boolean,
        types.boolean, _tables, _tables, _size3, _size3, array_of(element.stored, 5),
    )
)  # fmt: skip
def input_grad_kernel(element):
    load, store, zero = element.load, element.store, element.real(0)

    def input_grad_kernel(
        w,  # (O, C/groups, KD, KH, KW)
        dy,  # (N, O, PD, PH, PW)
        bias,  # (C,), or no elements
        relu,
        accumulate,
        firsts,  # input coordinate q stands at the padded coordinates where[first[q]:first[q + 1]]
        wheres,
        stride,
        dilation,
        dx,  # (N, C, D, H, W)
    ):
        """dx[n, c, q] = sum over o, k, p with source[p * stride + k * dilation] = q of  w[o, c, k] * dy[n, o, p]"""
        # A loop over the padded coordinates and one over the taps for each dimension: nested as deep as the sum is.
        out_d, out_h, out_w = dy.shape[2:]
        per_group, kernel_d, kernel_h, kernel_w = w.shape[1:]
        out_per_group = dy.shape[1] * per_group // dx.shape[1]
        first_d, first_h, first_w = firsts
        where_d, where_h, where_w = wheres
        shape, biased = dx.shape, bias.size > 0
        for index in range(cuda.grid(1), dx.size, cuda.gridsize(1)):
            n, channel, d, h, v = _position(index, shape)
            group, c = divmod(channel, per_group)
            total = load(bias[channel]) if biased else zero
            # every place of this element in the padded input, and there every tap that reads it for some output
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
                                        grad = load(dy[n, o, p // stride[0], q // stride[1], r // stride[2]])
                                        total += load(w[o, c, i, j, k]) * grad
            if accumulate:
                total += load(dx[n, channel, d, h, v])
            if relu and total < zero:
                total = zero
            dx[n, channel, d, h, v] = store(total)

    return input_grad_kernel


def bias_grad(grad_output: DeviceArray, accumulate: bool, out: DeviceArray) -> None:
    """out (+)= grad_output summed over everything but its channels."""
    if has_engine() and channel_sums.bias_grad(grad_output, accumulate, out):
        return
    launch(bias_grad_kernel[out.dtype], out.size, grad_output, accumulate, out)


@kernel(lambda element: (array_of(element.stored, 5), types.boolean, array_of(element.stored, 1)))
def bias_grad_kernel(element):
    load, store, zero = element.load, element.store, element.real(0)

    def bias_grad_kernel(
        dy,  # (N, O, PD, PH, PW)
        accumulate,
        db,  # (O,)
    ):
        """db[o] = sum over n, p of  dy[n, o, p]"""
        batch, _, out_d, out_h, out_w = dy.shape
        for o in range(cuda.grid(1), db.size, cuda.gridsize(1)):
            total = zero
            for n in range(batch):
                image = zero
                for d in range(out_d):
                    for h in range(out_h):
                        row = zero  # summed row by row and image by image: shorter sums round less
                        for v in range(out_w):
                            row += load(dy[n, o, d, h, v])
                        image += row
                total += image
            if accumulate:
                total += load(db[o])
            db[o] = store(total)

    return bias_grad_kernel
