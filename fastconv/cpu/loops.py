"""Convolution as plain loops."""

from __future__ import annotations

import numpy as np
from numba import prange, types

from ..geometry import ConvGeometry
from .jit import array_of, kernel, output_of

_size3 = types.UniTuple(types.int64, 3)
# the index of a prange loop is unsigned, and Numba makes unsigned // signed a float: hence int64(task) below
_tables = types.UniTuple(array_of(types.int64, 1), 3)


def input_grad(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, bias: np.ndarray | None, relu: bool,
    accumulate: bool, out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu."""
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
