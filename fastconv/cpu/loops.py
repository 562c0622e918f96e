"""Convolution and softmax cross-entropy as explicit loops: the definitions, and what every faster method is tested by.

These are the kernels of `cuda_kernels.convolution` and `cuda_kernels.softmax_cross_entropy`, word for word. There, one
thread computes one element of the result; here, one iteration of a `prange` loop does. No iteration depends on another,
so the result has the same bits for any number of threads, and for a sample whatever the batch. Arrays have any strides.
Sums are formed in the type of the elements, from the first term to the last.

Positions, taps and input coordinates have three dimensions, with sizes of one where the caller has fewer. Which input
element a tap reads is a table (`geometry.input_coordinates`), so that one kernel serves all paddings.

The decorator is Numba's own. `@kernel` compiles what is under it on first use, for the type of the elements, into
Numba's cache where one can be written, and runs it on one thread where no parallel loop may be started; see `jit`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange, types

from ..geometry import ConvGeometry
from .jit import array_of, kernel, output_of

__all__ = ["cross_entropy", "forward", "input_grad", "softmax", "weight_grad"]

_size3 = types.UniTuple(types.int64, 3)
_table = array_of(types.int64, 1)
_tables = types.UniTuple(_table, 3)


@njit(error_model="numpy")
def _position(index, shape):
    """The five coordinates of element `index` of an array of this shape, counted in C order."""
    rest, v = divmod(np.int64(index), shape[4])  # signed: the index of a prange loop is not
    rest, h = divmod(rest, shape[3])
    rest, d = divmod(rest, shape[2])
    n, c = divmod(rest, shape[1])
    return n, c, d, h, v


def _aligned(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if its elements do not lie at addresses of their type (a field of a record)."""
    return array if array.flags.aligned else array.copy()


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


def forward(
    geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, relu: bool, out: np.ndarray
) -> None:
    """out = input convolved with weight, plus bias, through max(0, .) if relu."""
    bias = np.empty(0, out.dtype) if bias is None else bias
    forward_kernel[out.dtype](
        _aligned(input), _aligned(weight), _aligned(bias), relu, *geometry.input_coordinates, geometry.stride,
        geometry.dilation, out,
    )  # fmt: skip


@kernel(
    lambda element: types.void(
        array_of(element, 5), array_of(element, 5), array_of(element, 1), types.boolean, _table, _table, _table,
        _size3, _size3, output_of(element, 5),
    )  # fmt: skip
)
@njit(parallel=True, error_model="numpy", nogil=True)
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
    zero = y.dtype.type(0)
    out_per_group = y.shape[1] * w.shape[1] // x.shape[1]
    per_group, kernel_d, kernel_h, kernel_w = w.shape[1:]
    shape, biased = y.shape, bias.size > 0
    for index in prange(y.size):
        n, o, d, h, v = _position(index, shape)
        first = o // out_per_group * per_group  # the first input channel of this group
        total = bias[o] if biased else zero
        for c in range(per_group):
            for i in range(kernel_d):
                xd = source_d[d * stride[0] + i * dilation[0]]
                for j in range(kernel_h):
                    xh = source_h[h * stride[1] + j * dilation[1]]
                    for k in range(kernel_w):
                        xw = source_w[v * stride[2] + k * dilation[2]]
                        # a zero of the padding is a value like any other: it is multiplied, not skipped
                        inside = xd >= 0 and xh >= 0 and xw >= 0
                        value = x[n, first + c, xd, xh, xw] if inside else zero
                        total += w[o, c, i, j, k] * value
        if relu and total.real < 0:  # .real: complex numbers have no order
            total = zero
        y[n, o, d, h, v] = total


def weight_grad(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, accumulate: bool, out: np.ndarray
) -> None:
    """out (+)= gradient of the weight, shape (O, C/groups, KD, KH, KW)."""
    weight_grad_kernel[out.dtype](
        _aligned(input), _aligned(grad_output), accumulate, *geometry.input_coordinates, geometry.stride,
        geometry.dilation, out,
    )  # fmt: skip


@kernel(
    lambda element: types.void(
        array_of(element, 5), array_of(element, 5), types.boolean, _table, _table, _table, _size3, _size3,
        output_of(element, 5),
    )  # fmt: skip
)
@njit(parallel=True, error_model="numpy", nogil=True)
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
    zero = dw.dtype.type(0)
    batch, out_channels, out_d, out_h, out_w = dy.shape
    per_group = dw.shape[1]
    out_per_group = out_channels * per_group // x.shape[1]
    shape = dw.shape
    for index in prange(dw.size):
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
                        value = x[n, channel, xd, xh, xw] if inside else zero
                        row += dy[n, o, d, h, v] * value
                    image += row
            total += image
        if accumulate:
            total += dw[o, c, i, j, k]
        dw[o, c, i, j, k] = total


def input_grad(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, bias: np.ndarray | None, relu: bool,
    accumulate: bool, out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu (both for the transposed convolution)."""
    bias = np.empty(0, out.dtype) if bias is None else bias
    firsts, wheres = zip(*geometry.padded_coordinates, strict=True)
    input_grad_kernel[out.dtype](
        _aligned(weight), _aligned(grad_output), _aligned(bias), relu, accumulate, firsts, wheres, geometry.stride,
        geometry.dilation, out,
    )  # fmt: skip


# One loop for each dimension of places and of taps: the equation, which helpers would take apart.
@kernel(
    lambda element: types.void(
        array_of(element, 5), array_of(element, 5), array_of(element, 1), types.boolean, types.boolean, _tables,
        _tables, _size3, _size3, output_of(element, 5),
    )  # fmt: skip
)
@njit(parallel=True, error_model="numpy", nogil=True)
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
    zero = dx.dtype.type(0)
    out_d, out_h, out_w = dy.shape[2:]
    per_group, kernel_d, kernel_h, kernel_w = w.shape[1:]
    out_per_group = dy.shape[1] * per_group // dx.shape[1]
    first_d, first_h, first_w = firsts
    where_d, where_h, where_w = wheres
    shape, biased = dx.shape, bias.size > 0
    for index in prange(dx.size):
        n, channel, d, h, v = _position(index, shape)
        group, c = divmod(channel, per_group)
        total = bias[channel] if biased else zero
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
                                    grad = dy[n, o, p // stride[0], q // stride[1], r // stride[2]]
                                    total += w[o, c, i, j, k] * grad
        if accumulate:
            total += dx[n, channel, d, h, v]
        if relu and total.real < 0:  # .real: complex numbers have no order
            total = zero
        dx[n, channel, d, h, v] = total


@kernel(lambda element: types.void(array_of(element, 5), types.boolean, output_of(element, 1)))
@njit(parallel=True, error_model="numpy", nogil=True)
def bias_grad_kernel(
    dy,  # (N, O, PD, PH, PW)
    accumulate,
    db,  # (O,)
):
    """db[o] = sum over n, p of  dy[n, o, p]"""
    batch, _, out_d, out_h, out_w = dy.shape
    for o in prange(db.size):
        total = 0.0  # float64: the sum may run over millions of elements
        for n in range(batch):
            for d in range(out_d):
                for h in range(out_h):
                    for v in range(out_w):
                        total += dy[n, o, d, h, v]
        if accumulate:
            total += db[o]
        db[o] = total


# ---------------------------------------------------------------------------------------------------------------------
# Softmax cross-entropy
# ---------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _place(index, shape):
    """(n, d, h, v) of position `index` of logits of this shape (N, C, D, H, W), counted in C order."""
    rest, v = divmod(np.int64(index), shape[4])
    rest, h = divmod(rest, shape[3])
    n, d = divmod(rest, shape[2])
    return n, d, h, v


def _three_space_axes(array: np.ndarray | None, first: int, dtype: np.dtype) -> np.ndarray:
    """The array with three axes of positions, which begin at `first`; one of no elements if there is none."""
    if array is None:
        return np.empty((0,) * (first + 3), dtype)
    if array.ndim - first > 3:
        raise ValueError(f"softmax cross-entropy as plain loops takes at most 3 position axes, got {array.shape}")
    return array[(slice(None),) * first + (None,) * (3 - (array.ndim - first))]


def cross_entropy(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray | None, grad_output: np.ndarray | float | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, logit_softcap: float,
    loss: np.ndarray | None, grad: np.ndarray | None, lse: np.ndarray | None, first_position: int = 0,
) -> tuple[int, int] | None:  # fmt: skip
    """Fill those of `loss`, `grad` and `lse` that are given: float32 or float64, of at most three axes of positions.

    Returns None, or (position, label) of the first label out of range, with nothing written. Positions are counted from
    `first_position`.
    """
    dtype, hard = logits.dtype, target.dtype.kind in "iu"
    real, classes, positions = dtype.type, logits.shape[1], logits.size // logits.shape[1]
    labels = None
    if hard:
        flat = target.reshape(-1)
        wrong = np.flatnonzero((flat != ignore_index) & ((flat < 0) | (flat >= classes)))
        if wrong.size:
            return first_position + int(wrong[0]), int(flat[wrong[0]])
        labels = target.astype(np.int64, copy=False)
    reduced = loss is not None and reduction != "none"
    rows = grad_output if isinstance(grad_output, np.ndarray) and grad_output.ndim else None
    scale = 1.0 if grad_output is None or rows is not None else float(grad_output)  # one number for all positions
    labels = _three_space_axes(labels, 1, np.dtype(np.int64))
    weight = np.empty(0, dtype) if weight is None else _aligned(weight)
    denominator, divisor = np.empty(0, dtype), 1
    if reduction == "mean":
        if hard:
            denominator = np.empty(1, dtype)
            _sum_label_weights(labels, weight, ignore_index, classes, denominator)
        else:
            divisor = positions
    row_loss = np.empty(positions if reduced else 0, dtype)
    cross_entropy_kernel[dtype](
        _aligned(_three_space_axes(logits, 2, dtype)), _aligned(labels),
        _aligned(_three_space_axes(None if hard else target, 2, dtype)), weight,
        _aligned(_three_space_axes(rows, 1, dtype)), ignore_index, real(scale / divisor if divisor else scale),
        denominator, real(1 - label_smoothing), real(label_smoothing / classes), real(z_loss), real(logit_softcap),
        _three_space_axes(None if reduced else loss, 1, dtype), row_loss, _three_space_axes(grad, 2, dtype),
        _three_space_axes(lse, 1, dtype),
    )  # fmt: skip
    if loss is not None and reduced:
        _sum(row_loss, denominator, divisor, loss[None])
    return None


@njit(error_model="numpy")
def capped(z, softcap):
    return softcap * math.tanh(z / softcap) if softcap != 0 else z


@njit(error_model="numpy")
def coefficient(probabilities, weight, label, keep, even, n, c, d, h, v):
    zero, one = weight.dtype.type(0), weight.dtype.type(1)
    y = probabilities[n, c, d, h, v] if probabilities.size > 0 else (one if c == label else zero)
    q = keep * y + even
    if weight.size > 0 and q != zero:  # the weight of a class that takes no part does not matter
        q *= weight[c]
    return q


# One function: statement by statement the twin of that of cuda_kernels/softmax_cross_entropy.py.
@kernel(
    lambda element: types.void(
        array_of(element, 5), array_of(types.int64, 4), array_of(element, 5), array_of(element, 1),
        array_of(element, 4), types.int64, element, array_of(element, 1), element, element, element, element,
        output_of(element, 4), output_of(element, 1), output_of(element, 5), output_of(element, 4),
    )  # fmt: skip
)
@njit(parallel=True, error_model="numpy", nogil=True)
def cross_entropy_kernel(
    logits,  # (N, C, D, H, W)
    labels,  # (N, D, H, W), or no elements; so all arrays from here on
    probabilities,  # (N, C, D, H, W)
    weight,  # (C,)
    grad_output,  # (N, D, H, W)
    ignore_index, scale,
    denominator,  # (1,)
    keep, even, z_loss, softcap,  # keep = 1 - smoothing, even = smoothing / C
    loss,  # (N, D, H, W)
    row_loss,  # (N * D * H * W,), of those that are summed
    grad,  # (N, C, D, H, W)
    lse,  # (N, D, H, W)
):  # fmt: skip
    """For each position, z its logits (softcapped if asked) and y its target (one-hot for a label):

        m = max z_c,  lse = m + log(sum exp(z_c - m)),  p_c = exp(z_c - lse),  q_c = w_c * (keep * y_c + even)
        loss = sum_c q_c * (lse - z_c) + z_loss * lse**2
        grad_c = p_c * (sum q + 2 * z_loss * lse) - q_c
    """
    # Longer than a screen: the three readings of a row share what they find, and the last may overwrite the row.
    real = logits.dtype.type
    zero, one, low, nan = real(0), real(1), real(-np.inf), real(np.nan)
    shape = logits.shape
    classes = shape[1]
    for index in prange(shape[0] * shape[2] * shape[3] * shape[4]):
        n, d, h, v = _place(index, shape)
        label, ignored, wrong = np.int64(-1), False, False
        if labels.size > 0:
            label = np.int64(labels[n, d, h, v])
            ignored = label == ignore_index
            wrong = not ignored and (label < 0 or label >= classes)

        # 1. The maximum. A nan is passed over here and found in the sum.
        top = low
        for c in range(classes):
            z = capped(logits[n, c, d, h, v], softcap)
            if z > top:
                top = z
        if top == low:  # -inf - -inf would be nan
            top = zero

        # 2. The sum of exponentials, with the rounding error of each addition carried to the next (Kahan 1965).
        total, carried, coefficient_sum = zero, zero, zero
        for c in range(classes):
            term = math.exp(capped(logits[n, c, d, h, v], softcap) - top) - carried
            increased = total + term
            carried = (increased - total) - term
            total = increased
            coefficient_sum += coefficient(probabilities, weight, label, keep, even, n, c, d, h, v)
        log_sum = math.log(total) if total != zero else low
        log_sum_exp = top + log_sum
        if lse.size > 0:
            lse[n, d, h, v] = log_sum_exp

        # 3. Loss and gradient.
        outer = scale
        if denominator.size > 0:
            outer /= denominator[0]
        if grad_output.size > 0:
            outer *= grad_output[n, d, h, v]
        two_z_loss = z_loss + z_loss
        slope = two_z_loss * log_sum_exp if z_loss != zero else zero
        factor = (coefficient_sum + slope) * outer / total
        value = z_loss * log_sum_exp * log_sum_exp if z_loss != zero else zero
        for c in range(classes):
            z = capped(logits[n, c, d, h, v], softcap)
            q = coefficient(probabilities, weight, label, keep, even, n, c, d, h, v)
            if q != zero:  # a class of coefficient 0 adds 0, even at z = -inf
                value += q * (log_sum - (z - top))
            if grad.size > 0:
                g = math.exp(z - top) * factor - q * outer
                if softcap != zero:
                    u = z / softcap
                    g *= one - u * u
                if ignored:
                    g = zero
                elif wrong:
                    g = nan
                grad[n, c, d, h, v] = g
        if ignored:
            value = zero
        elif wrong:
            value = nan
        if loss.size > 0:
            loss[n, d, h, v] = value
        if row_loss.size > 0:
            row_loss[index] = value


@kernel(
    lambda element: types.void(
        array_of(types.int64, 4), array_of(element, 1), types.int64, types.int64, output_of(element, 1)
    )
)
@njit(parallel=True, error_model="numpy", nogil=True)
def label_weight_kernel(
    labels,  # (N, D, H, W)
    weight,  # (C,), or no elements
    ignore_index,
    classes,
    weights,  # (N * D * H * W,)
):
    """What each position counts in the mean: the weight of its class, 0 if it is ignored or out of range."""
    zero, one = weights.dtype.type(0), weights.dtype.type(1)
    _, depth, height, width = labels.shape
    for index in prange(weights.size):
        n, d, h, v = _place(index, (0, 0, depth, height, width))
        label = np.int64(labels[n, d, h, v])
        value = zero
        if label != ignore_index and label >= 0 and label < classes:
            value = weight[label] if weight.size > 0 else one
        weights[index] = value


PARTIAL_SUMS = 1024  # that a sum over positions is split into, whatever the number of threads


def _sum_label_weights(
    labels: np.ndarray, weight: np.ndarray, ignore_index: int, classes: int, out: np.ndarray
) -> None:
    """out[0] = what the labels count in the mean."""
    weights = np.empty(labels.size, out.dtype)
    label_weight_kernel[out.dtype](_aligned(labels), weight, ignore_index, classes, weights)
    _sum(weights, np.empty(0, out.dtype), 1, out)


def _sum(values: np.ndarray, denominator: np.ndarray, divisor: int, out: np.ndarray) -> None:
    """out[0] = sum of the values / denominator[0] (nan if 0; unless empty) / divisor."""
    partial = np.empty(min(PARTIAL_SUMS, values.size), out.dtype)
    partial_sum_kernel[out.dtype](values, partial)
    sum_kernel[out.dtype](partial, denominator, out.dtype.type(divisor), out)


@kernel(lambda element: types.void(array_of(element, 1), output_of(element, 1)))
@njit(parallel=True, error_model="numpy", nogil=True)
def partial_sum_kernel(
    values,  # (M,)
    partial,  # (P,)
):
    """partial[i] = values[i] + values[i + P] + values[i + 2 * P] + ..."""
    zero = partial.dtype.type(0)
    for i in prange(partial.size):
        total = zero
        for j in range(i, values.size, partial.size):
            total += values[j]
        partial[i] = total


@kernel(lambda element: types.void(array_of(element, 1), array_of(element, 1), element, output_of(element, 1)))
@njit(error_model="numpy", nogil=True)
def sum_kernel(
    values,  # (P,)
    denominator,  # (1,), or no elements
    divisor,
    out,  # (1,)
):
    """out[0] = sum of the values / denominator[0] / divisor"""
    zero, nan = out.dtype.type(0), out.dtype.type(np.nan)
    total = zero
    for i in range(values.size):
        total += values[i]
    if denominator.size > 0:
        total = total / denominator[0] if denominator[0] != zero else nan
    out[0] = total / divisor


def softmax(logits: np.ndarray, log: bool, out: np.ndarray) -> None:
    """out = softmax of the logits over axis 1, or its logarithm."""
    z = _aligned(_three_space_axes(logits, 2, out.dtype))
    softmax_kernel[out.dtype](z, log, _three_space_axes(out, 2, out.dtype))


@kernel(lambda element: types.void(array_of(element, 5), types.boolean, output_of(element, 5)))
@njit(parallel=True, error_model="numpy", nogil=True)
def softmax_kernel(
    logits,  # (N, C, D, H, W)
    log,
    out,  # (N, C, D, H, W)
):
    """out[n, c, p] = exp(z_c - m) / sum over c of exp(z_c - m),  m = max z_c; or its logarithm"""
    zero, low = out.dtype.type(0), out.dtype.type(-np.inf)
    shape = logits.shape
    classes = shape[1]
    for index in prange(shape[0] * shape[2] * shape[3] * shape[4]):
        n, d, h, v = _place(index, shape)
        top = low
        for c in range(classes):
            z = logits[n, c, d, h, v]
            if z > top:
                top = z
        if top == low:  # -inf - -inf would be nan
            top = zero
        total, carried = zero, zero
        for c in range(classes):
            term = math.exp(logits[n, c, d, h, v] - top) - carried
            increased = total + term
            carried = (increased - total) - term
            total = increased
        log_sum = math.log(total) if total != zero else low
        for c in range(classes):
            z = logits[n, c, d, h, v] - top
            out[n, c, d, h, v] = z - log_sum if log else math.exp(z) / total
