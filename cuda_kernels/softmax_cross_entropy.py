"""Softmax cross-entropy on CUDA: loss and gradient in one kernel, one thread for each position.

The entry functions are those of `fastconv.cpu.softmax_cross_entropy`, which says what the arguments mean, the kernels
those of `fastconv.cpu.loops`, word for word, with the same arguments in the same order, on `DeviceArray`s.

The kernels here take any strides. Where the classes of a position lie next to each other, those of `softmax_rows` are
used instead, if the device has what they need.

A thread reads its row three times: for the maximum, for the sum of exponentials, and for loss and gradient. In the last
it has read an element before it writes the same one, so the gradient may overwrite the logits. Sums over positions are
split by their number alone and added in a fixed order.

Labels that the host knows are judged there. The host does not wait to see those on the device: where one is out of
range, loss and gradient are nan, and the kernel lowers the device's record of bad positions to it. The lowest of all is
the same whichever thread comes first.

`softmax_cross_entropy_row` is for the user's own kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from ._cuda import DeviceArray, bad_label_record, cuda, has_engine, launch, scratch
from .jit import ELEMENTS, Element, array_of, device_function, kernel
from .position_sums import add_label_weights, add_values
from .softmax_rows import cross_entropy_rows, softmax_rows

__all__ = ["cross_entropy", "softmax", "softmax_cross_entropy_row"]

PARTIAL_SUMS = 1024  # that a sum over positions is split into: enough threads to read memory at a fair speed


# ---------------------------------------------------------------------------------------------------------------------
# Canonical form: (N, C, D, H, W), and (N, D, H, W) where there is no class
# ---------------------------------------------------------------------------------------------------------------------


def _three_space_axes(arrays: dict[str, tuple[DeviceArray, int]]) -> dict[str, DeviceArray]:
    """Bring arrays whose position axes begin at the given axis to three of them, the same way for all."""
    current: dict[str, tuple[Any, int]] = dict(arrays)
    while any(array.ndim - first > 3 for array, first in current.values()):
        count = next(array.ndim - first for array, first in current.values())
        for i in range(count - 1):
            merged = {name: array.merge(first + i) for name, (array, first) in current.items()}
            if all(array is not None for array in merged.values()):
                current = {name: (merged[name], first) for name, (_, first) in current.items()}
                break
        else:
            raise ValueError(
                "softmax cross-entropy on CUDA takes at most 3 position axes that are not contiguous with each other; "
                f"got strides {', '.join(f'{name} {array.strides}' for name, (array, _) in arrays.items())}"
            )
    return {
        name: array[(slice(None),) * first + (None,) * (3 - (array.ndim - first))]
        for name, (array, first) in current.items()
    }


def _nothing(dtype: Any, ndim: int) -> DeviceArray:
    """An argument that was not given: an array of no elements."""
    return DeviceArray(0, (0,) * ndim, None, dtype, None, stream=-1)


def _real(dtype: np.dtype) -> type:
    return ELEMENTS[dtype.name].real


def _real_type(element: Element) -> types.Type:
    return numba.from_dtype(np.dtype(element.real))


@device_function
def _place(index, shape):
    """(n, d, h, v) of position `index` of logits of this shape (N, C, D, H, W), counted in C order."""
    rest, v = divmod(index, shape[4])
    rest, h = divmod(rest, shape[3])
    n, d = divmod(rest, shape[2])
    return n, d, h, v


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: DeviceArray, target: DeviceArray, weight: DeviceArray | None, grad_output: DeviceArray | float | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, logit_softcap: float,
    loss: DeviceArray | None, grad: DeviceArray | None, lse: DeviceArray | None, first_position: int = 0,
) -> tuple[int, int] | None:  # fmt: skip
    """Fill those of `loss`, `grad` and `lse` that are given.

    Returns None, or (position, label) of the first label out of range, with nothing written, if the host knows the
    labels. Positions are counted from `first_position`.
    """
    real, hard = _real(logits.dtype), target.dtype.kind in "iu"
    classes = logits.shape[1]
    if hard and target.host is not None:
        wrong = _first_wrong_label(np.asarray(target.host), classes, ignore_index)
        if wrong is not None:
            return first_position + wrong[0], wrong[1]
    reduced = loss is not None and reduction != "none"
    scale = 1.0
    if grad_output is not None and not isinstance(grad_output, DeviceArray):
        scale, grad_output = float(grad_output), None

    given = {"logits": (logits, 2), "target": (target, 1 if hard else 2)}
    if grad_output is not None:
        if grad_output.ndim == 0:  # one number on the device, for all positions
            grad_output = grad_output.broadcast_to((logits.shape[0], *logits.shape[2:]))
        given["grad_output"] = grad_output, 1
    if loss is not None and not reduced:
        given["loss"] = loss, 1
    if grad is not None:
        given["grad"] = grad, 2
    if lse is not None:
        given["lse"] = lse, 1
    arrays = _three_space_axes(given)
    shape = arrays["logits"].shape
    positions = shape[0] * shape[2] * shape[3] * shape[4]

    labels = arrays["target"] if hard else _nothing(np.int64, 4)
    weight = _nothing(logits.dtype, 1) if weight is None else weight
    denominator, divisor = _nothing(real, 1), 1
    if reduction == "mean":
        if hard:
            denominator = scratch((1,), real, logits)
            _sum_label_weights(labels, weight, ignore_index, classes, denominator)
        else:
            divisor = positions
    row_loss = scratch((positions,), real, logits) if reduced else _nothing(real, 1)
    nowhere = _nothing(logits.dtype, 4)
    arguments = (
        arrays["logits"], labels, _nothing(logits.dtype, 5) if hard else arrays["target"], weight,
        arrays.get("grad_output", nowhere), ignore_index, real(scale / divisor if divisor else scale), denominator,
        real(1 - label_smoothing), real(label_smoothing / classes), real(z_loss), real(logit_softcap),
        arrays.get("loss", nowhere), row_loss, arrays.get("grad", _nothing(logits.dtype, 5)),
        arrays.get("lse", nowhere), bad_label_record() if hard and target.host is None else _nothing(np.int64, 1),
        first_position,
    )  # fmt: skip
    if not (has_engine() and cross_entropy_rows(*arguments)):
        launch(cross_entropy_kernel[logits.dtype], positions, *arguments)
    if loss is not None and reduced:
        _sum(row_loss, denominator, divisor, loss[None])
    return None


def _first_wrong_label(labels: np.ndarray, classes: int, ignore_index: int) -> tuple[int, int] | None:
    flat = labels.reshape(-1)
    wrong = (flat != ignore_index) & ((flat < 0) | (flat >= classes))
    if not wrong.any():
        return None
    position = int(wrong.argmax())
    return position, int(flat[position])


# One function: statement by statement the twin of that of cpu/loops.py.
@kernel(
    lambda element: (
        array_of(element.stored, 5), array_of(types.int64, 4), array_of(element.stored, 5),
        array_of(element.stored, 1), array_of(element.stored, 4), types.int64, _real_type(element),
        array_of(_real_type(element), 1), _real_type(element), _real_type(element), _real_type(element),
        _real_type(element), array_of(element.stored, 4), array_of(_real_type(element), 1),
        array_of(element.stored, 5), array_of(element.stored, 4), array_of(types.int64, 1), types.int64,
    )
)  # fmt: skip
def cross_entropy_kernel(element):
    load, store, real = element.load, element.store, element.real
    zero, one, low, nan = real(0), real(1), real(-np.inf), real(np.nan)

    @device_function
    def capped(z, softcap):
        return softcap * real(math.tanh(z / softcap)) if softcap != zero else z

    @device_function
    def coefficient(probabilities, weight, label, keep, even, n, c, d, h, v):
        y = load(probabilities[n, c, d, h, v]) if probabilities.size > 0 else (one if c == label else zero)
        q = keep * y + even
        if weight.size > 0 and q != zero:  # the weight of a class that takes no part does not matter
            q *= load(weight[c])
        return q

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
        bad_position, first_position,  # (1,), for labels that the host does not see
    ):  # fmt: skip
        """For each position, z its logits (softcapped if asked) and y its target (one-hot for a label):

            m = max z_c,  lse = m + log(sum exp(z_c - m)),  p_c = exp(z_c - lse),  q_c = w_c * (keep * y_c + even)
            loss = sum_c q_c * (lse - z_c) + z_loss * lse**2
            grad_c = p_c * (sum q + 2 * z_loss * lse) - q_c
        """
        # Longer than a screen: the three readings of a row share what they find, and the last may overwrite the row.
        shape = logits.shape
        classes = shape[1]
        for index in range(cuda.grid(1), shape[0] * shape[2] * shape[3] * shape[4], cuda.gridsize(1)):
            n, d, h, v = _place(index, shape)
            label, ignored, wrong = np.int64(-1), False, False
            if labels.size > 0:
                label = np.int64(labels[n, d, h, v])
                ignored = label == ignore_index
                wrong = not ignored and (label < 0 or label >= classes)

            # 1. The maximum. A nan is passed over here and found in the sum.
            top = low
            for c in range(classes):
                z = capped(load(logits[n, c, d, h, v]), softcap)
                if z > top:
                    top = z
            if top == low:  # -inf - -inf would be nan
                top = zero

            # 2. The sum of exponentials, with the rounding error of each addition carried to the next (Kahan 1965).
            total, carried, coefficient_sum = zero, zero, zero
            for c in range(classes):
                term = real(math.exp(capped(load(logits[n, c, d, h, v]), softcap) - top)) - carried
                increased = total + term
                carried = (increased - total) - term
                total = increased
                coefficient_sum += coefficient(probabilities, weight, label, keep, even, n, c, d, h, v)
            log_sum = real(math.log(total)) if total != zero else low
            log_sum_exp = top + log_sum
            if lse.size > 0:
                lse[n, d, h, v] = store(log_sum_exp)

            # 3. Loss and gradient.
            outer = scale
            if denominator.size > 0:
                outer /= denominator[0]
            if grad_output.size > 0:
                outer *= load(grad_output[n, d, h, v])
            two_z_loss = z_loss + z_loss
            slope = two_z_loss * log_sum_exp if z_loss != zero else zero
            factor = (coefficient_sum + slope) * outer / total
            value = z_loss * log_sum_exp * log_sum_exp if z_loss != zero else zero
            for c in range(classes):
                z = capped(load(logits[n, c, d, h, v]), softcap)
                q = coefficient(probabilities, weight, label, keep, even, n, c, d, h, v)
                if q != zero:  # a class of coefficient 0 adds 0, even at z = -inf
                    value += q * (log_sum - (z - top))
                if grad.size > 0:
                    g = real(math.exp(z - top)) * factor - q * outer
                    if softcap != zero:
                        u = z / softcap
                        g *= one - u * u
                    if ignored:
                        g = zero
                    elif wrong:
                        g = nan
                    grad[n, c, d, h, v] = store(g)
            if ignored:
                value = zero
            elif wrong:
                value = nan
                if bad_position.size > 0:
                    cuda.atomic.min(bad_position, 0, np.int64(first_position + index))
            if loss.size > 0:
                loss[n, d, h, v] = store(value)
            if row_loss.size > 0:
                row_loss[index] = value

    return cross_entropy_kernel


@kernel(
    lambda element: (
        array_of(types.int64, 4), array_of(element.stored, 1), types.int64, types.int64,
        array_of(_real_type(element), 1),
    )
)  # fmt: skip
def label_weight_kernel(element):
    load, zero, one = element.load, element.real(0), element.real(1)

    def label_weight_kernel(
        labels,  # (N, D, H, W)
        weight,  # (C,), or no elements
        ignore_index,
        classes,
        weights,  # (N * D * H * W,)
    ):
        """What each position counts in the mean: the weight of its class, 0 if it is ignored or out of range."""
        _, depth, height, width = labels.shape
        for index in range(cuda.grid(1), weights.size, cuda.gridsize(1)):
            n, d, h, v = _place(index, (0, 0, depth, height, width))
            label = np.int64(labels[n, d, h, v])
            value = zero
            if label != ignore_index and label >= 0 and label < classes:
                value = load(weight[label]) if weight.size > 0 else one
            weights[index] = value

    return label_weight_kernel


# ---------------------------------------------------------------------------------------------------------------------
# Sums over positions
# ---------------------------------------------------------------------------------------------------------------------


def _sum_label_weights(
    labels: DeviceArray, weight: DeviceArray, ignore_index: int, classes: int, out: DeviceArray
) -> None:
    """out[0] = what the labels count in the mean."""
    if has_engine() and add_label_weights(labels, weight, ignore_index, classes, out):
        return
    weights = scratch((labels.size,), out.dtype, out)
    launch(label_weight_kernel[weight.dtype], labels.size, labels, weight, ignore_index, classes, weights)
    _sum(weights, _nothing(out.dtype, 1), 1, out)


def _sum(values: DeviceArray, denominator: DeviceArray, divisor: int, out: DeviceArray) -> None:
    """out[0] = sum of the values / denominator[0] (nan if 0; unless empty) / divisor."""
    if has_engine():
        add_values(values, denominator, divisor, out)
        return
    real = _real(out.dtype)
    partial = scratch((min(PARTIAL_SUMS, values.size),), real, values)
    launch(partial_sum_kernel[real], partial.size, values, partial)
    launch(sum_kernel[out.dtype], 1, partial, denominator, real(divisor), out)


@kernel(lambda element: (array_of(_real_type(element), 1), array_of(_real_type(element), 1)))
def partial_sum_kernel(element):
    zero = element.real(0)

    def partial_sum_kernel(
        values,  # (M,)
        partial,  # (P,)
    ):
        """partial[i] = values[i] + values[i + P] + values[i + 2 * P] + ..."""
        for i in range(cuda.grid(1), partial.size, cuda.gridsize(1)):
            total = zero
            for j in range(i, values.size, partial.size):
                total += values[j]
            partial[i] = total

    return partial_sum_kernel


@kernel(
    lambda element: (
        array_of(_real_type(element), 1), array_of(_real_type(element), 1), _real_type(element),
        array_of(element.stored, 1),
    )
)  # fmt: skip
def sum_kernel(element):
    store, zero, nan = element.store, element.real(0), element.real(np.nan)

    def sum_kernel(
        values,  # (P,)
        denominator,  # (1,), or no elements
        divisor,
        out,  # (1,)
    ):
        """out[0] = sum of the values / denominator[0] / divisor"""
        if cuda.grid(1) == 0:
            total = zero
            for i in range(values.size):
                total += values[i]
            if denominator.size > 0:
                total = total / denominator[0] if denominator[0] != zero else nan
            out[0] = store(total / divisor)

    return sum_kernel


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------


def softmax(logits: DeviceArray, log: bool, out: DeviceArray) -> None:
    """out = softmax of the logits over axis 1, or its logarithm."""
    arrays = _three_space_axes({"logits": (logits, 2), "out": (out, 2)})
    shape = arrays["logits"].shape
    positions = shape[0] * shape[2] * shape[3] * shape[4]
    if not (has_engine() and softmax_rows(arrays["logits"], log, arrays["out"])):
        launch(softmax_kernel[logits.dtype], positions, arrays["logits"], log, arrays["out"])


@kernel(lambda element: (array_of(element.stored, 5), types.boolean, array_of(element.stored, 5)))
def softmax_kernel(element):
    load, store, real = element.load, element.store, element.real
    zero, low = real(0), real(-np.inf)

    def softmax_kernel(
        logits,  # (N, C, D, H, W)
        log,
        out,  # (N, C, D, H, W)
    ):
        """out[n, c, p] = exp(z_c - m) / sum over c of exp(z_c - m),  m = max z_c; or its logarithm"""
        shape = logits.shape
        classes = shape[1]
        for index in range(cuda.grid(1), shape[0] * shape[2] * shape[3] * shape[4], cuda.gridsize(1)):
            n, d, h, v = _place(index, shape)
            top = low
            for c in range(classes):
                z = load(logits[n, c, d, h, v])
                if z > top:
                    top = z
            if top == low:  # -inf - -inf would be nan
                top = zero
            total, carried = zero, zero
            for c in range(classes):
                term = real(math.exp(load(logits[n, c, d, h, v]) - top)) - carried
                increased = total + term
                carried = (increased - total) - term
                total = increased
            log_sum = real(math.log(total)) if total != zero else low
            for c in range(classes):
                z = load(logits[n, c, d, h, v]) - top
                out[n, c, d, h, v] = store(z - log_sum if log else real(math.exp(z)) / total)

    return softmax_kernel


# ---------------------------------------------------------------------------------------------------------------------
# For the user's own kernels
# ---------------------------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def softmax_cross_entropy_row(logits, label, grad):
    """Loss of one row of logits, from a thread of the user's own ``@cuda.jit`` kernel; its gradient goes to `grad`.

        loss = lse - z_label,  dloss/dz_c = p_c - [c == label]

    `logits` and `grad` are rows (C,) of float32 or float64 in any device memory (global, shared or local), and may be
    the same row; `label` is an integer. A label outside [0, C) gives nan.

    >>> from numba import cuda
    >>> from fastconv.cuda_kernels.softmax_cross_entropy import softmax_cross_entropy_row
    >>> @cuda.jit
    ... def losses(logits, labels, grad, loss):
    ...     i = cuda.grid(1)
    ...     if i < logits.shape[0]:
    ...         loss[i] = softmax_cross_entropy_row(logits[i], labels[i], grad[i])
    """
    real = logits.dtype.type
    classes = logits.shape[0]
    top = logits[0]
    for c in range(1, classes):
        if logits[c] > top:
            top = logits[c]
    total = real(0)
    for c in range(classes):
        total += real(math.exp(logits[c] - top))
    inside = 0 <= label < classes
    loss = real(math.log(total)) - (logits[label] - top) if inside else real(np.nan)
    for c in range(classes):
        p = real(math.exp(logits[c] - top)) / total
        grad[c] = (p - real(1) if c == label else p) if inside else real(np.nan)
    return loss
