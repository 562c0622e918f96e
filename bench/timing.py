"""How calls are timed: the one loop behind all benchmarks here.

Calls take turns, a sample of each in every round: the clock of the processor, its neighbours and the state of the
caches then disturb all of them alike. Each has been called before the first sample, so that nothing is compiled,
allocated or woken up in one. Whoever measures takes the best of the samples, since what disturbs a measurement only
ever makes it slower, and the median beside it, since a user meets the disturbances too.

Only the standard library is imported, so that a worker process can read its environment before any library does.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
Order = Callable[[Sequence[Name], int], Sequence[Name]]  # the names in the order of this round

# A sample is as many calls as take this long, so that the clock's resolution and a call's overhead stay out of it.
SAMPLE_SECONDS = 1e-3
LEAST_SAMPLES = 3


def seconds_of(call: Callable[[], Any], count: int = 1, wait: Callable[[], object] | None = None) -> float:
    """Seconds of one of `count` calls in a row; `wait` returns when the last of them has ended."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    if wait is not None:
        wait()
    return (time.perf_counter() - begin) / count


def as_given(names: Sequence[Name], turn: int) -> Sequence[Name]:
    """Always the same order: of two calls, neither ever follows itself and finds its own arrays in the caches."""
    return names


def rotated(names: Sequence[Name], turn: int) -> Sequence[Name]:
    """Each round begins with the next name, so that none is always the one after a pause."""
    first = turn % max(1, len(names))
    return [*names[first:], *names[:first]]


def drawn(seed: int = 0) -> Order:
    """A new random order for each round, so that none always follows the same other."""
    generator = random.Random(seed)
    return lambda names, turn: generator.sample(list(names), len(names))


def by_turns(
    samplers: Mapping[Name, Callable[[], Iterable[float]]],
    *,
    seconds: float = 0.0,
    least: int = 1,
    patience: float = math.inf,
    order: Order = rotated,
) -> dict[Name, list[float]]:
    """What the samplers return, in rounds until `seconds` have passed and there were `least`.

    A round that takes longer than `patience` is the last one. The samplers have been warmed up.
    """
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    end, turn = time.perf_counter() + seconds, 0
    while True:
        begin = time.perf_counter()
        for name in order(list(samplers), turn):
            samples[name] += samplers[name]()
        turn += 1
        now = time.perf_counter()
        if now - begin > patience or (now >= end and turn >= least):
            return samples


def single_calls(
    calls: Mapping[Name, Callable[[], Any]], *, seconds: float = 0.0, least: int = 1, order: Order = rotated
) -> dict[Name, list[float]]:
    """Seconds of each call, a sample being one call, after one call of each that does not count.

    For calls that are longer than the resolution of the clock, about a microsecond.
    """
    for call in calls.values():
        call()
    samplers = {name: (lambda call=call: [seconds_of(call)]) for name, call in calls.items()}
    return by_turns(samplers, seconds=seconds, least=least, order=order)


def repeated_calls(
    calls: Sequence[tuple[Callable[[], Any], Callable[[], object] | None]], seconds: float
) -> list[list[float]]:
    """Seconds of each (call, wait), a sample being as many calls as take a millisecond; the garbage collector is off.

    Takes `seconds` for each call, and at least three samples unless a single call is longer than that. A call that is
    longer than all its samples should be is warmed up once, others twice.
    """
    counts = []
    for call, wait in calls:
        taken = seconds_of(call, 1, wait)  # caches and threads wake up
        if taken < seconds:
            taken = seconds_of(call, 1, wait)
        counts.append(max(1, round(SAMPLE_SECONDS / max(taken, 1e-7))))
    samplers = {
        at: (lambda call=call, wait=wait, count=count: [seconds_of(call, count, wait)])
        for at, ((call, wait), count) in enumerate(zip(calls, counts, strict=True))
    }
    whole = seconds * len(calls)
    gc.collect()
    gc.disable()
    try:
        return list(by_turns(samplers, seconds=whole, least=LEAST_SAMPLES, patience=whole).values())
    finally:
        gc.enable()
