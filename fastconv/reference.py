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
import math
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


# ---------------------------------------------------------------------------------------------------------------------
# Softmax cross-entropy
# ---------------------------------------------------------------------------------------------------------------------
#
# The gradient, derived. For one position with logits z_1..z_C, p_i = exp(z_i) / sum over d of exp(z_d), and a target y,
#
#     L = - sum over i of y_i log p_i,      dp_i / dz_c = p_c (1 - p_c) for i = c,  - p_i p_c for i != c
#
#     dL / dz_c = - sum over i of (y_i / p_i) dp_i / dz_c
#               = - (y_c / p_c) p_c (1 - p_c)  +  sum over i != c of (y_i / p_i) p_i p_c
#               = - y_c + p_c y_c + p_c * (sum over i != c of y_i)
#               = p_c * sum(y) - y_c
#
# In the terms of i != c it is y_i / p_i that belongs, each its own: written with y_c / p_c, as the textbook's step is,
# nothing cancels the p_i. Only when the y sum to one is the result p - y.
#
# Class weights w and label smoothing put q_c = w_c * ((1 - smoothing) * y_c + smoothing / C) in the place of y_c: the
# loss is - sum q_c log p_c and its gradient p_c * sum(q) - q_c. `z_loss` adds z_loss * lse^2 with lse = log sum exp z,
# whose gradient is 2 * z_loss * lse * p_c. `logit_softcap` puts cap * tanh(z / cap) in the place of z, and multiplies
# the gradient by 1 - tanh(z / cap)^2.


def _largest_and_rest(z: np.ndarray) -> tuple[float, float]:
    """(m, sum over c of exp(z_c - m)) with m the largest z: what keeps exp from overflowing."""
    m = max(float(value) for value in z)
    return m, math.fsum(math.exp(float(value) - m) for value in z)


def log_sum_exp(z: np.ndarray) -> float:
    """log(sum over c of exp(z_c)) = m + log(sum over c of exp(z_c - m)) (Goodfellow et al., Deep Learning, 4.1)."""
    m, total = _largest_and_rest(z)
    return m + math.log(total)


def softmax(z: np.ndarray) -> np.ndarray:
    """p_c = exp(z_c) / sum over d of exp(z_d), of logits z (C,) (Goodfellow et al., Deep Learning, eq. 4.1).

    >>> softmax(np.array([0.0, np.log(3.0)])).round(15).tolist()
    [0.25, 0.75]
    """
    m, total = _largest_and_rest(z)
    return np.array([math.exp(float(value) - m) / total for value in z])


def log_softmax(z: np.ndarray) -> np.ndarray:
    """log p_c = z_c - log sum over d of exp(z_d), of logits z (C,) (Goodfellow et al., Deep Learning, eq. 6.30)."""
    m, total = _largest_and_rest(z)
    return np.array([(float(value) - m) - math.log(total) for value in z])


def cross_entropy_position(
    z: np.ndarray, q: np.ndarray, z_loss: float = 0.0, logit_softcap: float | None = None
) -> tuple[float, np.ndarray]:
    """Loss and gradient of one position with logits z (C,) and coefficients q (C,): the derivation above.

    One-hot q, p - y:

    >>> loss, gradient = cross_entropy_position(np.array([0.0, np.log(3.0)]), np.array([0.0, 1.0]))
    >>> gradient.round(15).tolist()
    [0.25, -0.25]

    Coefficients that sum to two, p * sum(y) - y:

    >>> cross_entropy_position(np.array([0.0, np.log(3.0)]), np.array([1.0, 1.0]))[1].round(15).tolist()
    [-0.5, 0.5]
    """
    slope = np.ones(len(z))
    if logit_softcap is not None:
        ratio = np.array([math.tanh(float(value) / logit_softcap) for value in z])
        z, slope = logit_softcap * ratio, 1.0 - ratio**2
    lse, p, log_p = log_sum_exp(z), softmax(z), log_softmax(z)
    total = math.fsum(float(value) for value in q)
    # a class that does not count (q_c = 0) adds nothing, even with probability 0
    loss = z_loss * lse * lse - math.fsum(float(q[c]) * log_p[c] for c in range(len(z)) if q[c] != 0)
    gradient = np.array([(p[c] * (total + 2 * z_loss * lse) - q[c]) * slope[c] for c in range(len(z))])
    return loss, gradient


def softmax_cross_entropy(
    logits: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    grad_output: np.ndarray | float = 1.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and dLoss/dlogits of logits (N, C, *S), with class indices (N, *S) or probabilities (N, C, *S).

    The options are those of torch.nn.functional.cross_entropy: "mean" divides by the weights of the labels that count,
    and by the number of positions when the targets are probabilities.
    """
    z = np.moveaxis(logits.astype(np.float64), 1, -1)
    classes = z.shape[-1]
    w = np.ones(classes) if weight is None else weight.astype(np.float64)
    indices = target.dtype.kind in "iu"
    losses, gradient, denominator = np.zeros(z.shape[:-1]), np.zeros(z.shape), 0.0
    for position in itertools.product(*map(range, losses.shape)):
        y = np.zeros(classes)
        if indices:
            label = int(target[position])
            if label == ignore_index:
                continue
            y[label] = 1.0
            denominator += w[label]
        else:
            y[:] = np.moveaxis(target, 1, -1)[position]
            denominator += 1.0
        q = w * ((1.0 - label_smoothing) * y + label_smoothing / classes)
        losses[position], gradient[position] = cross_entropy_position(z[position], q, z_loss, logit_softcap)
    scale = np.broadcast_to(np.asarray(grad_output, np.float64), losses.shape if reduction == "none" else ())
    loss = losses
    if reduction != "none":
        loss = np.array(math.fsum(float(value) for value in losses.flat))
    if reduction == "mean":
        loss, scale = (np.divide(a, denominator) if denominator else a * math.nan for a in (loss, scale))
    ignored = np.zeros(losses.shape, bool) if not indices else target == ignore_index
    for position in itertools.product(*map(range, losses.shape)):
        if not ignored[position]:
            gradient[position] *= scale[position] if reduction == "none" else scale
    return loss, np.moveaxis(gradient, -1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy of the logits of a linear layer
# ---------------------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    bias: np.ndarray | None = None,
    class_weight: np.ndarray | None = None,
    **options: object,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loss, dLoss/dhidden, dLoss/dweight, dLoss/dbias of hidden x (N, H), weight w (C, H), bias b (C,).

        z[n, c] = b[c] + sum over h of w[c, h] * x[n, h]        (Goodfellow et al., Deep Learning, eq. 6.28)

    and, with g = dLoss/dz of `softmax_cross_entropy` (whose `options` these are), by the chain rule

        dLoss/dx[n, h] = sum over c of g[n, c] * w[c, h]
        dLoss/dw[c, h] = sum over n of g[n, c] * x[n, h],    dLoss/db[c] = sum over n of g[n, c]

    >>> x, w = np.array([[1.0, 0.0]]), np.log(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> linear_cross_entropy(x, w, np.array([1]))[2].round(15).tolist()
    [[0.25, 0.0], [-0.25, 0.0]]
    """
    x, w = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    b = np.zeros(len(w)) if bias is None else np.asarray(bias, np.float64)
    z = np.zeros((len(x), len(w)))
    for n, c in np.ndindex(z.shape):
        z[n, c] = b[c] + math.fsum(float(w[c, h] * x[n, h]) for h in range(w.shape[1]))
    loss, g = softmax_cross_entropy(z, target, class_weight, **options)  # type: ignore[arg-type]
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(len(w))
    for n, c in np.ndindex(z.shape):
        for h in range(w.shape[1]):
            dx[n, h] += g[n, c] * w[c, h]
            dw[c, h] += g[n, c] * x[n, h]
        db[c] += g[n, c]
    return loss, dx, dw, db
