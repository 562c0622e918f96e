"""The table of methods, the plans that were made by it, and how a problem is run.

The first method of the table that applies and pays computes; the last applies always. What a method finds that it
cannot compute, since values are not finite, it hands on, and the first method after it that can does so.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ...packed import PackedWeights
from ..problem import Method, Operands, Plan, Problem

METHODS: dict[str, tuple[Method, ...]] = {}  # by operation; filled by the package

# The names that `only` leaves.
_left: tuple[str, ...] | None = None


def allowed(name: str) -> bool:
    """Does `only` leave this one?"""
    return _left is None or name in _left


def asked_for(problem: Problem, method: Method) -> bool:
    """Is it the user's choice, so that it need not pay?"""
    return (_left is not None and not problem.after) or problem.algorithm == method.algorithm != "direct"


def candidates(problem: Problem) -> Iterator[Method]:
    """The methods that may run a problem if they apply, in order."""
    table = METHODS[problem.operation]
    if problem.after:
        names = [method.name for method in table]
        place = names.index(problem.after)
        values = table[place].values
        yield from (method for method in table[place + 1 :] if method.values > values)
        return
    for method in table:
        if problem.algorithm in ("auto", method.algorithm) and (method.composed or allowed(method.name)):
            yield method


def choose(problem: Problem) -> Method:
    """The method that runs a problem."""
    for method in candidates(problem):
        if method.cannot(problem) is None and (asked_for(problem, method) or method.slower(problem) is None):
            return method
    raise ValueError(f"no method for {problem}")


@functools.lru_cache(maxsize=4096)
def plan_of(problem: Problem) -> Plan:
    """The plan of the method that runs a problem."""
    return choose(problem).plan(problem)


_Answer = TypeVar("_Answer")
_asked_in_turn: list[Callable[[], None]] = []


def asked_in_turn(question: Callable[[Problem], _Answer]) -> Callable[[Problem], _Answer]:
    """Answer once what methods of the table ask one after the other, of a problem that is being planned."""
    answered = functools.lru_cache(maxsize=4)(question)
    _asked_in_turn.append(answered.cache_clear)
    return answered


def forget_plans() -> None:
    """Make all plans anew, after a change to what they depend on."""
    plan_of.cache_clear()
    for forget in _asked_in_turn:
        forget()


@contextlib.contextmanager
def only(*names: str) -> Iterator[None]:
    """Within this context these methods alone are in the table, and the first that applies runs, if it pays or not.

    Methods that are composed of others stay, with these others. What is handed on goes to any that is next. For tests.
    """
    global _left
    before, _left = _left, names
    forget_plans()
    try:
        yield
    finally:
        _left = before
        forget_plans()


def run(
    problem: Problem, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None,
    out: np.ndarray,
) -> None:  # fmt: skip
    """Compute `out`, by the method of the table and those that it hands on to."""
    plan = plan_of(problem)
    redo = plan.run(operands, bias, relu, packed, out)
    if redo is not None:
        _hand_on(problem._replace(after=plan.method.name), redo, operands, bias, relu, packed, out)


def _hand_on(
    problem: Problem, redo: np.ndarray | bool, operands: Operands, bias: np.ndarray | None, relu: bool,
    packed: PackedWeights | None, out: np.ndarray,
) -> None:  # fmt: skip
    """Compute again what a method could not: everything, or the samples of a mask, neighbouring ones together."""
    if redo is True:
        run(problem, operands, bias, relu, packed, out)
        return
    array, weight = operands
    for some, samples in runs_of_samples(redo):
        if some:
            part = problem._replace(geometry=replace(problem.geometry, batch=samples.stop - samples.start))
            run(part, (array[samples], weight), bias, relu, packed, out[samples])


def runs_of_samples(mask: np.ndarray | bool) -> Iterator[tuple[bool, slice]]:
    """The batch as runs of neighbouring samples with the same answer."""
    mask = np.asarray(mask)
    ends = [*(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    for first, end in itertools.pairwise([0, *ends]):
        yield bool(mask[first]), slice(first, end)
