"""What the cross-entropy functions and softmax judge of what the user passed, beside `arguments`."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import numpy as np

from .arguments import DTYPES, Form, check_choice, one_of

REDUCTIONS = ("none", "mean", "sum")


def class_form(function: str, shape: Any, axis: Any) -> tuple[Form, Form, int, tuple[int, ...]]:
    """What `axis` of logits of this shape means: (form of logits, form of positions, C, shape of positions).

    The forms make (N, C, *S) and (N, *S) of the user's arrays. No axis, None, is axis 1, or 0 in one dimension.
    """
    try:
        return _class_form(function, tuple(shape), axis)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    raise TypeError(f"{function}: axis is a {type(axis).__name__} (expected an int or None)")


@functools.lru_cache(maxsize=4096, typed=True)
def _class_form(function: str, shape: tuple[int, ...], axis: Any) -> tuple[Form, Form, int, tuple[int, ...]]:
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(f"{function}: logits have shape () (expected (C,), (N, C) or (N, C, *S))")
    if axis is None:
        axis = min(1, ndim - 1)
    elif isinstance(axis, (bool, np.bool_)) or not hasattr(axis, "__index__"):
        raise TypeError(f"{function}: axis is a {type(axis).__name__} (expected an int or None)")
    number = operator.index(axis)
    if not -ndim <= number < ndim:
        raise ValueError(
            f"{function}: axis is {number}, but logits have shape {shape} (expected {-ndim} <= axis < {ndim})"
        )
    number %= ndim
    every = slice(None)
    rest = tuple(a for a in range(ndim) if a != number)
    positions = tuple(shape[a] for a in rest)
    if ndim == 1:
        return Form((0,), (None, every)), Form((), (None,)), shape[0], positions
    order = (rest[0], number, *rest[1:])
    return Form(order, (every,) * ndim), Form(tuple(range(ndim - 1)), (every,) * (ndim - 1)), shape[number], positions


def linear_form(function: str, hidden: Any, weight: Any) -> tuple[tuple[int, ...], int]:
    """What a linear layer of these shapes makes of them: (shape of positions, C)."""
    hidden, weight = tuple(hidden), tuple(weight)
    if len(weight) != 2 or 0 in weight:
        raise ValueError(f"{function}: weight has shape {weight} (expected (C, H), at least one class and feature)")
    if not hidden:
        raise ValueError(f"{function}: hidden has shape () (expected (N, {weight[1]}), or any (*, {weight[1]}))")
    if hidden[-1] != weight[1]:
        raise ValueError(
            f"{function}: hidden has {hidden[-1]} features, but weight has shape {weight} (expected hidden of shape "
            f"(*, {weight[1]}))"
        )
    return hidden[:-1], weight[0]


def single_label(function: str, target: object) -> np.ndarray | None:
    """A class index that is a Python or NumPy integer, as `labels[0]` is, as an array; None for any other target."""
    if isinstance(target, (bool, np.bool_)) or not isinstance(target, (int, np.integer)):
        return None
    number = int(target)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{function}: target is {number} (expected a 64-bit integer)")
    return np.array(number, np.int64 if number < 2**63 else np.uint64)


def check_target(
    function: str, target: Any, dtype: np.dtype, positions: tuple[int, ...], probabilities: tuple[int, ...],
    operand: str = "logits", shape: tuple[int, ...] | None = None,
) -> bool:  # fmt: skip
    """Whether the target holds class indices, of the shape `positions`; otherwise it holds probabilities.

    `operand` is the argument that has the positions and the type, `shape` its shape where it has no classes.
    """
    has = "logits have" if operand == "logits" else f"{operand} has"
    if target.dtype.kind in "iu":
        if tuple(target.shape) != positions:
            raise ValueError(
                f"{function}: target holds class indices of shape {tuple(target.shape)}, but {has} shape "
                f"{shape or probabilities} (expected {positions}, one index per position)"
            )
        return True
    if target.dtype.name not in DTYPES:
        raise TypeError(
            f"{function}: target has dtype {target.dtype.name} (expected class indices of an integer type, or "
            f"probabilities of the type of {operand}, {dtype.name})"
        )
    if target.dtype != dtype:
        raise TypeError(
            f"{function}: target is {target.dtype.name}, but {operand} is {dtype.name} (expected one dtype)"
        )
    if tuple(target.shape) != probabilities:
        raise ValueError(
            f"{function}: target holds probabilities of shape {tuple(target.shape)} (expected {probabilities}, "
            f"{'the shape of logits' if shape is None else 'one per class of each position'})"
        )
    return False


def _real(function: str, argument: str, value: Any, expected: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__} (expected {expected})")
    return float(value)


def check_cross_entropy(
    function: str, indices: bool, ignore_index: Any, reduction: Any, label_smoothing: Any, z_loss: Any,
    logit_softcap: Any,
) -> tuple[int, float, float, float]:  # fmt: skip
    """Judge the options; return (ignore_index, label_smoothing, z_loss, logit_softcap), 0 standing for no cap."""
    try:
        return _check_cross_entropy(
            function, indices, ignore_index, reduction, label_smoothing, z_loss, logit_softcap
        )
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    return _check_cross_entropy.__wrapped__(
        function, indices, ignore_index, reduction, label_smoothing, z_loss, logit_softcap
    )


@functools.lru_cache(maxsize=4096, typed=True)
def _check_cross_entropy(
    function: str, indices: bool, ignore_index: Any, reduction: Any, label_smoothing: Any, z_loss: Any,
    logit_softcap: Any,
) -> tuple[int, float, float, float]:  # fmt: skip
    if reduction is None:
        raise ValueError(f"{function}: reduction is None ({one_of(REDUCTIONS)})")
    check_choice(function, "reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, (bool, np.bool_)) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"{function}: ignore_index is a {type(ignore_index).__name__} (expected an int)")
    ignored = operator.index(ignore_index)
    if not -(2**63) <= ignored < 2**63:
        raise ValueError(f"{function}: ignore_index is {ignored} (expected a 64-bit integer)")
    if ignored >= 0 and not indices:
        raise ValueError(
            f"{function}: ignore_index is {ignored}, but target holds probabilities (expected class indices, or a "
            "negative ignore_index, which ignores none)"
        )
    smoothing = _real(function, "label_smoothing", label_smoothing, "a number between 0 and 1")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{function}: label_smoothing is {smoothing} (expected a number between 0 and 1)")
    penalty = _real(function, "z_loss", z_loss, "a number of at least 0")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"{function}: z_loss is {penalty} (expected a finite number of at least 0)")
    if logit_softcap is None:
        return ignored, smoothing, penalty, 0.0
    cap = _real(function, "logit_softcap", logit_softcap, "a positive number or None")
    if not 0 < cap < math.inf:
        raise ValueError(f"{function}: logit_softcap is {cap} (expected a positive finite number or None)")
    return ignored, smoothing, penalty, cap


def is_number(value: object) -> bool:
    """A Python or NumPy number, as opposed to an array (of no dimensions perhaps)."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))


def bad_label(
    function: str, position: int, label: int, positions: tuple[int, ...], classes: int, ignore_index: int,
    source: str = "logits have",
) -> ValueError:  # fmt: skip
    """The error for a class index out of range, naming its row, its value and C."""
    where = ", ".join(str(int(i)) for i in np.unravel_index(position, positions)) if positions else ""
    return ValueError(
        f"{function}: target{where and f'[{where}]'} is {label}, but {source} C={classes} classes (expected "
        f"0 <= target < {classes}, or ignore_index={ignore_index})"
    )
