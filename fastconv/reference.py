"""The equations as plain loops in float64: the oracle of every test, and the page to read first.

Nothing here is fast. Every function is the equation it cites, on NumPy float64 arrays, and nothing else.

The textbook example
--------------------
X is 3 x 3, W is 2 x 2, and Z = X . W slides W over X without flipping it:

    z_11 = w_11 x_11 + w_12 x_12 + w_21 x_21 + w_22 x_22, ...    so  dz_kl / dw_ij = x_(k+i-1)(l+j-1)

>>> import numpy as np
>>> X = np.array([[1., 2., 3.], [4., 5., 6.], [7., 8., 9.]])
>>> W = np.array([[1., 0.], [0., -1.]])
>>> convolution(X[None, None], W[None, None])[0, 0].tolist()
[[-4.0, -4.0], [-4.0, -4.0]]

With zeros of one less than the kernel around X ("full" padding) every element of X meets every tap and Z is 4 x 4:

>>> convolution(X[None, None], W[None, None], padding=((1, 1), (1, 1)))[0, 0].tolist()
[[-1.0, -2.0, -3.0, 0.0], [-4.0, -4.0, -4.0, 3.0], [-7.0, -4.0, -4.0, 6.0], [0.0, 7.0, 8.0, 9.0]]

The weight gradient sums over all output positions: dL/dw_ij = sum over k, l of dL/dz_kl * x_(k+i-1)(l+j-1). (Written
with an indicator for "this output position" the sum is easily lost.) The loss that sums Z gives

>>> convolution_weight_grad(X[None, None], (1, 1, 2, 2), np.ones((1, 1, 2, 2)))[0, 0].tolist()
[[12.0, 16.0], [24.0, 28.0]]

The centred form z_ij = sum over s, t from -floor(k/2) to floor(k/2) of w_st x_(i+s)(j+t) holds for odd k only: for even
k that range has k + 1 taps. The form used here, u = o*stride + k*dilation - before, holds for every k.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

Pairs = Sequence[tuple[int, int]]


def _coordinate(u: int, size: int, padding_mode: str) -> int | None:
    """The input coordinate that stands at coordinate u of the padded input (u < 0: before it); None is a zero."""
    if 0 <= u < size:
        return u
    if padding_mode == "reflect":
        return -u if u < 0 else 2 * (size - 1) - u
    if padding_mode == "replicate":
        return 0 if u < 0 else size - 1
    if padding_mode == "circular":
        return u % size
    return None


def _options(
    ndim: int, stride: Sequence[int] | None, padding: Pairs | None, dilation: Sequence[int] | None
) -> tuple[Sequence[int], Pairs, Sequence[int]]:
    return stride or (1,) * ndim, padding or ((0, 0),) * ndim, dilation or (1,) * ndim


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Pairs, dilation: Sequence[int]
) -> tuple[int, ...]:
    """(size + before + after - dilation*(kernel - 1) - 1)//stride + 1, per dimension."""
    return tuple(
        (s + a + b - d * (k - 1) - 1) // t + 1
        for s, k, t, (a, b), d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def _meetings(
    input_shape: Sequence[int], weight_shape: Sequence[int], stride: Sequence[int] | None, padding: Pairs | None,
    dilation: Sequence[int] | None, groups: int, padding_mode: str,
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]]:  # fmt: skip
    """Every product of the convolution: index of y, index of w, and index of x (None: a zero of the padding)."""
    batch, _, *size = input_shape
    out_channels, per_group, *kernel = weight_shape
    stride, padding, dilation = _options(len(size), stride, padding, dilation)
    positions = output_size(size, kernel, stride, padding, dilation)
    for n, o, *p in itertools.product(range(batch), range(out_channels), *map(range, positions)):
        first = o // (out_channels // groups) * per_group
        for c, *k in itertools.product(range(per_group), *map(range, kernel)):
            at = [
                _coordinate(pi * si + ki * di - before, size_i, padding_mode)
                for pi, si, ki, di, (before, _), size_i in zip(p, stride, k, dilation, padding, size, strict=True)
            ]
            inside = None if None in at else (n, first + c, *at)
            yield (n, o, *p), (o, c, *k), inside  # type: ignore[misc]


def convolution(
    input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, stride: Sequence[int] | None = None,
    padding: Pairs | None = None, dilation: Sequence[int] | None = None, groups: int = 1, padding_mode: str = "zeros",
) -> np.ndarray:  # fmt: skip
    """y[n, o, p] = b[o] + sum over c, k of w[o, c, k] * x[n, c, p*stride + k*dilation - before].

    In any number of dimensions: p, k, stride, dilation and before are vectors. What lies outside x is what
    `padding_mode` says; a zero is multiplied like any other value (0 * inf is nan). Goodfellow, Bengio and Courville,
    Deep Learning, eq. 9.6, with stride, dilation and groups.
    """
    x, w = np.asarray(input, np.float64), np.asarray(weight, np.float64)
    ndim = x.ndim - 2
    positions = output_size(x.shape[2:], w.shape[2:], *_options(ndim, stride, padding, dilation))
    y = np.zeros((x.shape[0], w.shape[0], *positions))
    if bias is not None:
        y += np.asarray(bias, np.float64).reshape(-1, *(1,) * ndim)
    for at_y, at_w, at_x in _meetings(x.shape, w.shape, stride, padding, dilation, groups, padding_mode):
        y[at_y] += w[at_w] * (0.0 if at_x is None else x[at_x])
    return y


def convolution_weight_grad(
    input: np.ndarray, weight_shape: Sequence[int], grad_output: np.ndarray, stride: Sequence[int] | None = None,
    padding: Pairs | None = None, dilation: Sequence[int] | None = None, groups: int = 1, padding_mode: str = "zeros",
) -> np.ndarray:  # fmt: skip
    """dL/dw[o, c, k] = sum over n, p of dL/dy[n, o, p] * x[n, c, p*stride + k*dilation - before].

    From dy[n, o, p]/dw[o, c, k] = x[n, c, p*stride + k*dilation - before] and the chain rule, which sums over every
    output that w[o, c, k] takes part in.
    """
    x, dy = np.asarray(input, np.float64), np.asarray(grad_output, np.float64)
    dw = np.zeros(tuple(weight_shape))
    for at_y, at_w, at_x in _meetings(x.shape, dw.shape, stride, padding, dilation, groups, padding_mode):
        dw[at_w] += dy[at_y] * (0.0 if at_x is None else x[at_x])
    return dw


def convolution_input_grad(
    input_shape: Sequence[int], weight: np.ndarray, grad_output: np.ndarray, stride: Sequence[int] | None = None,
    padding: Pairs | None = None, dilation: Sequence[int] | None = None, groups: int = 1, padding_mode: str = "zeros",
) -> np.ndarray:  # fmt: skip
    """dL/dx[n, c, q] = sum over o, p, k with p*stride + k*dilation - before = q of dL/dy[n, o, p] * w[o, c, k].

    For the padding modes other than zeros, q also stands for its images in the padding. Only outputs that exist are
    summed. This is the transposed convolution: Dumoulin and Visin, A guide to convolution arithmetic, chapter 4.
    """
    w, dy = np.asarray(weight, np.float64), np.asarray(grad_output, np.float64)
    dx = np.zeros(tuple(input_shape))
    for at_y, at_w, at_x in _meetings(dx.shape, w.shape, stride, padding, dilation, groups, padding_mode):
        if at_x is not None:
            dx[at_x] += dy[at_y] * w[at_w]
    return dx


def convolution_bias_grad(grad_output: np.ndarray) -> np.ndarray:
    """dL/db[o] = sum over n, p of dL/dy[n, o, p], since dy[n, o, p]/db[o] = 1."""
    dy = np.asarray(grad_output, np.float64)
    db = np.zeros(dy.shape[1])
    for index in np.ndindex(dy.shape):
        db[index[1]] += dy[index]
    return db
