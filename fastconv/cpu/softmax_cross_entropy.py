"""Softmax cross-entropy on the CPU: loss and gradient in one pass over rows that stay in cache.

Entry functions (`cuda_kernels.softmax_cross_entropy` has the same, with the same arguments in the same order):

    cross_entropy(logits, target, weight, grad_output, ignore_index, reduction, label_smoothing, z_loss, logit_softcap,
                  loss, grad, lse) -> None or (position, label) of the first label out of range
    softmax(logits, log, out) -> None

    logits       (N, C, *S), any strides, classes on axis 1; every other array is of its floating-point type
    target       (N, *S) class indices of any integer type, or (N, C, *S) probabilities
    weight       (C,) or None
    grad_output  None (one), a number, or an array: (N, *S) for "none", () for "mean" and "sum"
    reduction    "none", "mean" or "sum"
    loss         array to fill, (N, *S) for "none" and () otherwise, or None; the mean over no position is nan
    grad         array (N, C, *S) to fill, `logits` itself allowed, or None
    lse          array (N, *S) to fill with log(sum over c of exp(z_c)), or None
    log          False: softmax, True: its logarithm, into `out` (N, C, *S), `logits` itself allowed

`logit_softcap` 0 stands for none.

Positions are counted in C order over (N, *S). Labels are checked before anything is written: when a label is neither
`ignore_index` nor in [0, C), nothing has been. Ignored positions have loss 0 and gradient 0, whatever their logits.

The equations (`reference.softmax_cross_entropy`), for one position, with z the logits (softcapped if asked):

    m = max z_c,  e_c = exp(z_c - m),  lse = m + log(sum e_c),  p_c = e_c / sum e_c
    q_c = w_c * ((1 - smoothing) * y_c + smoothing/C)        y the target, one-hot for a class index
    loss = sum_c q_c * (log(sum e_c) - (z_c - m)) + z_loss * lse**2
    dloss/dz_c = p_c * (sum q + 2*z_loss*lse) - q_c

`softmax.parameters` says how it runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types

from . import half, tasks
from .jit import REAL, array_of, compiled, output_of
from .records import record_at
from .softmax.by_class import by_class
from .softmax.by_position import by_position
from .softmax.parameters import (
    ALONE,
    BY_POSITION_BELOW,
    COLUMN_PIECE,
    DIRECT_FROM,
    FLOPS,
    KEPT_BYTES,
    LANES,
    PAST_CACHE,
    PIECE,
    TASK,
    TILE_BYTES,
    WIDEST,
    Parameters,
)
from .vector.memory import at, offset

# A function that only compiled code calls
_part = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
_parameters = record_at(Parameters)


@_part
def _count_labels(labels, p, batch, space, ignore_index, classes):
    """Is one out of range, and how many count?"""
    runs, length, run_step, step = batch, space, p.labels.n, p.labels.s
    if space == 1:
        runs, length, step = 1, batch, run_step
    elif run_step == space * step:
        runs, length = 1, batch * space
    bad, used = 0, 0
    for run in range(runs):
        first = offset(labels, run * run_step)
        for i in range(length):
            t = first[i * step]
            counts = t != ignore_index
            bad += counts & (np.uint64(t) >= np.uint64(classes))
            used += counts
    return bad, used


@_part
def _set_array(field, array):
    field.values = at(field.values, array.ctypes.data)
    field.n, field.c = array.strides[0] // array.itemsize, array.strides[1] // array.itemsize
    field.s = array.strides[2] // array.itemsize


@_part
def _set_rows(field, array):
    field.values = at(field.values, array.ctypes.data)
    field.n, field.s = array.strides[0] // array.itemsize, array.strides[1] // array.itemsize


def _prepare(
    logits, labels, soft, weight, grad_output, ignore_index, mean, log, scale, smoothing, z_loss, cap, loss, grad, lse,
    partial, address, is_by_class, plain, body, scratch, alone,
):  # fmt: skip
    """Judge the labels and fill the parameters of the tasks, a record at `address`.

    Arrays of size 0 stand for those not given.

    Up to `alone` elements the tasks are run here: a small call is not to pay for the way through `tasks.run`. Returns
    the number of tasks that are left to run, or -1 - the position of a label out of range. `partial` gets the loss of
    each unit and, at its end, what the mean divides by.
    """
    batch, classes, space = logits.shape
    p = _parameters(address, logits)
    item = logits.itemsize
    denominator = np.float64(batch * space)
    if labels.size > 0:
        _set_rows(p.labels, labels)
        bad, used = _count_labels(p.labels.values, p, batch, space, ignore_index, classes)
        if bad:
            for position in range(batch * space):
                t = labels[position // space, position % space]
                if t != ignore_index and (t < 0 or t >= classes):
                    return -1 - position
        denominator = np.float64(used)
        if weight.size and mean:
            denominator = 0.0
            for n in range(batch):
                for s in range(space):
                    if labels[n, s] != ignore_index:
                        denominator += np.float64(weight[labels[n, s]])
    p.ignore_index = ignore_index
    p.classes, p.positions, p.space = classes, batch * space, space
    _set_array(p.logits, logits)
    if soft.size:
        _set_array(p.soft, soft)
    if grad.size:
        _set_array(p.grad, grad)
    if weight.size:
        p.weight = at(p.weight, weight.ctypes.data)
    if grad_output.size:
        _set_rows(p.grad_output, grad_output)
    if loss.size:
        _set_rows(p.loss, loss)
    if lse.size:
        _set_rows(p.lse, lse)
    p.log, p.label_smoothing, p.z_loss, p.logit_softcap = log, smoothing, z_loss, cap
    p.scale = scale / denominator if mean else scale
    # Over the logits themselves the lines are in a cache already.
    p.past_cache = batch * classes * space * item >= PAST_CACHE and grad.ctypes.data != logits.ctypes.data
    p.in_grad = plain and grad.size > 0 and not p.past_cache and p.grad.c == 1
    p.width, p.run, p.parts = 1, p.positions, p.positions
    if not is_by_class:
        p.direct = plain and space >= DIRECT_FROM and p.logits.s == 1
        p.in_grad = p.direct and grad.size > 0 and not p.past_cache and p.grad.s == 1
        if p.direct:
            p.run = space
        fits = TILE_BYTES // (classes * item)
        p.width = max(LANES, min(WIDEST, fits, p.run + LANES - 1) // LANES * LANES)
        p.parts = (p.run + p.width - 1) // p.width
    tiles = 2 if cap > 0 else 1  # with the softcapped logits, whose derivative is made of them
    p.kept = tiles * (classes + 15) // 16 * 16 * p.width * item <= KEPT_BYTES
    p.partial = at(p.partial, partial.ctypes.data)
    partial[p.positions] = denominator
    p.units = p.positions // p.run * p.parts
    p.task_units = max(1, TASK // (classes * p.width))
    count = (p.units + p.task_units - 1) // p.task_units
    if batch * classes * space > alone:
        return count
    p.header.scratch = scratch
    for task in range(count):
        tasks.call(body, task, 0, address)
    return 0


def _reduce(partial, units, mean):
    """The losses of all units, added in their order; divided, if `mean`, by the last of `partial`: nan if that is 0."""
    total = 0.0
    for unit in range(units):
        total += partial[unit]
    if mean:
        total = total / partial[-1] if partial[-1] != 0.0 else math.nan
    return total


_doubles = types.Array(types.float64, 1, "C")


@functools.cache
def _compiled(dtype: np.dtype) -> tuple[Callable[..., int], tuple[np.ndarray, ...]]:
    """For a floating-point type: `_prepare`, and arrays of 1 to 3 dimensions for what is not given."""
    real = REAL[dtype]
    signature = types.intp(
        array_of(real, 3), array_of(types.int64, 2), array_of(real, 3), array_of(real, 1), array_of(real, 2),
        types.int64, types.boolean, types.boolean, *(types.float64,) * 4, output_of(real, 2), output_of(real, 3),
        output_of(real, 2), _doubles, types.int64, types.boolean, types.boolean, *(types.intp,) * 3,
    )  # fmt: skip
    none = tuple(np.empty((0,) * ndim, dtype) for ndim in (1, 2, 3))
    return compiled(numba.njit, signature, _prepare, nogil=True), none


@functools.cache
def _compiled_reduce() -> Callable[[np.ndarray, int, bool], float]:
    return compiled(numba.njit, types.float64(_doubles, types.intp, types.boolean), _reduce, nogil=True)


def _plain(body: Callable[..., None]) -> Callable[..., None]:
    """The variant of a body in which GENERAL is False."""
    return FunctionType(body.__code__, {**body.__globals__, "GENERAL": False}, f"{body.__name__}_plain")


# [by class?][plain?]
_BODIES = tuple(
    (tasks.Body(body, Parameters), tasks.Body(_plain(body), Parameters)) for body in (by_position, by_class)
)
_NO_LABELS = np.empty((0, 0), np.int64)
_SCRATCH = KEPT_BYTES + 64 + max(12 * 8 * WIDEST + 2 * 8 * COLUMN_PIECE, 64 + (3 * PIECE + 64) * 8)


def _launch(
    logits, labels, soft, weight, grad_output, ignore_index, mean, log, scale, smoothing, z_loss, cap, loss, grad, lse
):  # fmt: skip
    """Run the kernels on flat arrays, None for those not given; return (status, loss reduced to a number)."""
    dtype = logits.dtype
    classes = logits.shape[1]
    is_by_class = classes >= BY_POSITION_BELOW and logits.strides[1] == dtype.itemsize
    item = dtype.itemsize
    plain = (
        soft is None
        and not log
        and cap == 0
        and (smoothing == 0 or labels is None)
        and classes * item * (1 if is_by_class else LANES) <= KEPT_BYTES
        and (not is_by_class or grad is None or grad.strides[1] == item)
    )
    body = _BODIES[is_by_class][plain]
    scratch = _SCRATCH + classes // PIECE * 8
    prepare, (none_1, none_2, none_3) = _compiled(dtype)
    parameters = Parameters.cleared()
    partial = np.empty(logits.shape[0] * logits.shape[2] + 1)
    count = prepare(
        logits,
        _NO_LABELS if labels is None else labels,
        none_3 if soft is None else soft,
        none_1 if weight is None else weight,
        none_2 if grad_output is None else grad_output,
        ignore_index, mean, log, scale, smoothing, z_loss, cap,
        none_2 if loss is None else loss,
        none_3 if grad is None else grad,
        none_2 if lse is None else lse,
        partial, tasks.data_address(parameters), is_by_class, plain, body.address(dtype),
        tasks.scratch_memory(scratch), ALONE,
    )  # fmt: skip
    if count < 0:
        return count, 0.0
    if count > 0:
        tasks.run(body, dtype, count, parameters, scratch, FLOPS * logits.size)
    return 0, _compiled_reduce()(partial, int(parameters["units"]), mean)


def cross_entropy(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray | None, grad_output: np.ndarray | float | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, logit_softcap: float,
    loss: np.ndarray | None, grad: np.ndarray | None, lse: np.ndarray | None, first_position: int = 0,
) -> tuple[int, int] | None:  # fmt: skip
    """Fill those of `loss`, `grad` and `lse` that are given; see the top of this file.

    Returns None, or (position, label) of the first label out of range, with nothing written. Positions are counted from
    `first_position`.
    """
    if logits.dtype.itemsize == 2:
        return _through_float32(
            logits, first_position, target, weight, grad_output, ignore_index, reduction, label_smoothing, z_loss,
            logit_softcap, loss, grad, lse,
        )  # fmt: skip
    scale = 1.0
    labels, soft = (_flat(target, 1), None) if target.dtype.kind in "iu" else (None, _flat(target, 2))
    if labels is not None and labels.dtype != np.int64:
        labels = _to_int64(labels)
    z = _flat(logits, 2)
    if not z.size:
        if loss is not None:
            loss[...] = math.nan if reduction == "mean" else 0.0
        return None
    if weight is not None and weight.strides[0] != weight.itemsize:
        weight = weight.copy()
    loss_flat = _flat_output(loss, 1) if reduction == "none" else None
    grad_flat, lse_flat = _flat_output(grad, 2), _flat_output(lse, 1)
    rows = None
    if reduction == "none" and isinstance(grad_output, np.ndarray):
        rows = _flat(grad_output, 1)
    elif grad_output is not None:
        scale = float(grad_output)
    status, reduced = _launch(
        z, labels, soft, weight, rows, ignore_index, reduction == "mean", False, scale, label_smoothing, z_loss,
        logit_softcap, loss_flat, grad_flat, lse_flat,
    )  # fmt: skip
    if status < 0:
        position = -1 - status
        return first_position + position, int(target.reshape(-1)[position])
    if loss is not None and reduction != "none":
        loss[...] = reduced
    _bring_back(loss_flat, loss)
    _bring_back(grad_flat, grad)
    _bring_back(lse_flat, lse)
    return None


def softmax(logits: np.ndarray, log: bool, out: np.ndarray) -> None:
    """out = softmax of the logits over axis 1, or its logarithm."""
    if logits.dtype.itemsize == 2:
        wide = np.empty(out.shape, np.float32)
        softmax(half.widened(logits), log, wide)
        half.narrow(wide, out)
        return
    if not logits.size:
        return
    flat = _flat_output(out, 2)
    _launch(_flat(logits, 2), None, None, None, None, 0, False, log, 1.0, 0.0, 0.0, 0.0, None, flat, None)
    _bring_back(flat, out)


def _through_float32(logits: np.ndarray, first_position: int, *arguments: Any) -> tuple[int, int] | None:
    """`cross_entropy` of float16 or bfloat16: converted on the way in, rounded once on the way out."""
    narrow = logits.dtype
    *inputs, loss, grad, lse = arguments
    inputs = [half.widened(a) if getattr(a, "dtype", None) == narrow else a for a in inputs]
    outputs = (loss, grad, lse)
    wide = [None if out is None else np.empty(out.shape, np.float32) for out in outputs]
    arguments = *inputs, *wide, first_position
    bad = cross_entropy(half.widened(logits), *arguments)
    if bad is None:
        for out, values in zip(outputs, wide, strict=True):
            if out is not None and values is not None:
                half.narrow(values, out)
    return bad


def _to_int64(labels: np.ndarray) -> np.ndarray:
    # of either byte order; what int64 cannot hold must not wrap around to a valid label
    if labels.dtype.kind == "u" and labels.itemsize == 8:
        labels = np.minimum(labels, np.uint64(np.iinfo(np.int64).max))
    return labels.astype(np.int64)


def _flat(array: np.ndarray, lead: int) -> np.ndarray:
    """The dimensions after the first `lead` as one: a view where the strides allow it, aligned in any case."""
    if array.ndim != lead + 1:
        array = array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))
    return array if array.flags.aligned else array.copy()


def _flat_output(array: np.ndarray | None, lead: int) -> np.ndarray | None:
    return None if array is None else _flat(array, lead)


def _bring_back(flat: np.ndarray | None, array: np.ndarray | None) -> None:
    """Copy the results home when the strides did not allow a flat view."""
    if flat is None or array is None or flat is array or flat.base is array:
        return
    if flat.base is None or flat.base is not array.base:
        array[...] = flat.reshape(array.shape)
