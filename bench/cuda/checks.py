"""Whether a result on the device is right: elements of it in float64 on the host, or all of them for small shapes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from ..cases import Case, ConvolutionCase, CrossEntropyCase
from ..checks import ALLOWANCE, Disagreement
from .arrays import TF32, Library
from .peers import PEERS, Problem, operands

# What a sum in this arithmetic may be off, relative to the norm of its terms, and after rounding the result.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, TF32: 2.0**-10, "float16": 2.0**-23, "bfloat16": 2.0**-23}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}

CHECKED = [
    ConvolutionCase("check", "odd", 2, 5, (7, 6), 9, (3, 3), (1, 2), (1, 1), (1, 1), 1),
    ConvolutionCase("check", "tall", 1, 18, (5, 6), 133, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    ConvolutionCase("check", "grouped", 2, 16, (8, 8), 24, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    ConvolutionCase("check", "pointwise", 3, 32, (5, 7), 40, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ConvolutionCase("check", "depthwise", 2, 7, (12, 16), 7, (3, 3), (1, 1), (1, 1), (1, 1), 7),
    ConvolutionCase("check", "depthwise.odd", 2, 7, (9, 13), 7, (5, 5), (2, 2), (2, 2), (1, 1), 7),
    ConvolutionCase("check", "depthwise.wide", 1, 3, (16, 12), 3, (9, 9), (1, 1), (4, 4), (1, 1), 3),
    ConvolutionCase("check", "causal", 2, 6, (40,), 6, (4,), (1,), (3,), (1,), 6),
    ConvolutionCase("check", "dilated", 2, 12, (33,), 8, (3,), (1,), (4,), (4,), 1),
    ConvolutionCase("check", "volume", 1, 6, (5, 6, 7), 8, (3, 3, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    ConvolutionCase("check", "plane", 1, 1, (37, 41), 1, (7, 7), (1, 1), (3, 3), (1, 1), 1),
    CrossEntropyCase("check", "short rows", 37, 10, (), "index"),
    CrossEntropyCase("check", "rows", 9, 1000, (), "index"),
    CrossEntropyCase("check", "probabilities", 9, 1001, (), "probabilities"),
    CrossEntropyCase("check", "long rows", 3, 70001, (), "index"),
    CrossEntropyCase("check", "positions", 2, 19, (8, 12), "index"),
]

# Of a matrix product, more than one of the largest tiles each way, tails on both sides; and one without padding, which
# has kernels of its own.
EVERY_TILE = [
    ConvolutionCase("check", "tiles", 3, 24, (8, 7), 132, (3, 1), (1, 1), (1, 0), (1, 1), 1),
    ConvolutionCase("check", "tiles, pointwise", 3, 40, (8, 7), 132, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def _places(shape: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """The first and the last element, and others at random."""
    rng = np.random.default_rng(math.prod(shape))
    yield (0,) * len(shape)
    yield tuple(n - 1 for n in shape)
    for _ in range(count - 2):
        yield tuple(int(rng.integers(n)) for n in shape)


def _windows(case: ConvolutionCase, position: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The taps that fall inside the input at an output position, and the coordinates they read, for each dimension."""
    taps, places = [], []
    for at, n, k, s, p, d in zip(
        position, case.size, case.kernel, case.stride, case.padding, case.dilation, strict=True
    ):
        tap = np.arange(k)
        place = at * s - p + tap * d
        inside = (place >= 0) & (place < n)
        taps.append(tap[inside])
        places.append(place[inside])
    return taps, places


def _cut(array: Any, leading: tuple[Any, ...], places: Sequence[np.ndarray], arrays: Library) -> np.ndarray:
    """array[*leading, places of each dimension], on the host in float64: the box around them travels, no more."""
    if any(len(p) == 0 for p in places):
        return np.zeros(0)
    box = tuple(slice(int(p[0]), int(p[-1]) + 1) for p in places)
    cut = arrays.host(array[(*leading, *box)])
    for axis, p in enumerate(places):
        cut = np.take(cut, p - p[0], axis=cut.ndim - len(places) + axis)
    return cut


def expected_element(problem: Problem, at: tuple[int, ...]) -> tuple[float, float, int]:
    """One element of a convolution in float64: its value, the norm of its terms, and their number."""
    case, which, arrays = problem.convolution(), problem.which, problem.library
    x, w, dy = (problem.operands[name] for name in ("input", "weight", "grad_output"))
    inputs, outputs = case.in_channels // case.groups, case.out_channels // case.groups
    if which == "forward":
        n, o, *position = at
        group = o // outputs
        taps, places = _windows(case, position)
        a = _cut(x, (n, slice(group * inputs, (group + 1) * inputs)), places, arrays)
        b = _cut(w, (o, slice(None)), taps, arrays)
    elif which == "weight_grad":
        o, c, *tap = at
        channel = o // outputs * inputs + c
        positions, places = [], []
        for k, n, m, s, p, d in zip(
            tap, case.size, case.output_shape[2:], case.stride, case.padding, case.dilation, strict=True
        ):
            where = np.arange(m) * s - p + k * d
            inside = (where >= 0) & (where < n)
            positions.append(np.arange(m)[inside])
            places.append(where[inside])
        a = _cut(x, (slice(None), channel), places, arrays)
        b = _cut(dy, (slice(None), o), positions, arrays)
    else:
        n, channel, *position = at
        group, c = divmod(channel, inputs)
        taps, places = [], []
        for q, m, k, s, p, d in zip(
            position, case.output_shape[2:], case.kernel, case.stride, case.padding, case.dilation, strict=True
        ):
            tap = np.arange(k)
            start = q + p - tap * d  # of the window that reads this position by this tap
            inside = (start % s == 0) & (start >= 0) & (start // s < m)
            order = np.argsort(start[inside] // s, kind="stable")
            taps.append(tap[inside][order])
            places.append((start[inside] // s)[order])
        some = slice(group * outputs, (group + 1) * outputs)
        a = _cut(dy, (n, some), places, arrays)
        b = arrays.host(w[some, c])
        for axis, tap in enumerate(taps):
            b = np.take(b, tap, axis=b.ndim - len(taps) + axis)
    if a.size == 0 or b.size == 0:
        return 0.0, 0.0, 0
    terms = a * b
    return float(terms.sum()), float(np.sqrt(np.square(terms).sum())), terms.size


def check(problem: Problem, result: Any, count: int = 16) -> None:
    """Raise Disagreement unless the result is right, as far as some of its elements tell."""
    arrays = problem.library
    whole = result[-1] if isinstance(result, tuple) else result
    if arrays.has_nan(whole):
        raise Disagreement("there are nan in the result: elements that were not written, or that are wrong")
    if isinstance(problem.case, CrossEntropyCase):
        _check_cross_entropy(problem, result, count)
        return
    if tuple(whole.shape) != problem.result_shape:
        raise Disagreement(f"shape {tuple(whole.shape)}, expected {problem.result_shape}")
    if problem.which == "weight_grad":
        count //= 2  # of these an element is a sum over whole planes
    for at in _places(problem.result_shape, count):
        value, norm, terms = expected_element(problem, at)
        actual = float(arrays.host(whole[at]))
        allowed = ALLOWANCE * EPSILON[problem.dtype] * math.sqrt(max(terms, 1)) * norm
        allowed += 4 * ROUNDING.get(problem.dtype, 0.0) * norm
        if not abs(actual - value) <= allowed:
            raise Disagreement(f"element {at} is {actual!r}, expected {value!r} within {allowed:.3g}")


def _check_cross_entropy(problem: Problem, result: Any, count: int) -> None:
    arrays, case = problem.library, problem.case
    assert isinstance(case, CrossEntropyCase)
    logits, target = problem.operands["logits"], problem.operands["target"]
    positions = case.batch * math.prod(case.size)
    rounding = ROUNDING.get(problem.dtype, 0.0)
    epsilon = EPSILON["float32" if problem.dtype != "float64" else "float64"]
    relative = ALLOWANCE * epsilon * math.sqrt(case.classes) + rounding
    loss = float(arrays.host(result[0] if isinstance(result, tuple) else result))
    expected = arrays.mean_loss(logits, target)
    allowed = (relative + ALLOWANCE * epsilon * math.sqrt(positions)) * abs(expected)
    if not abs(loss - expected) <= allowed:
        raise Disagreement(f"the loss is {loss!r}, expected {expected!r} within {allowed:.3g}")
    if not isinstance(result, tuple):
        return
    for n, *position in _places((case.batch, *case.size), count):
        row = (n, slice(None), *position)
        z = arrays.host(logits[row])
        p = np.exp(z - z.max())
        p /= p.sum()
        if case.target == "index":
            y = np.zeros(case.classes)
            y[int(arrays.host(target[(n, *position)]))] = 1
        else:
            y = arrays.host(target[row])
        exact = (p * y.sum() - y) / positions
        actual = arrays.host(result[1][row])
        off = np.abs(actual - exact)
        bound = (relative * 4) * (p + y) / positions + rounding * np.abs(exact) + (2.0**-24 if rounding else 1e-30)
        if not np.all(off <= bound):
            at = int(np.argmax(off - bound))
            raise Disagreement(f"gradient {at} of row {(n, *position)} is {actual[at]!r}, expected {exact[at]!r}")


@functools.lru_cache(maxsize=1)  # both layouts are checked, one after the other
def _reference(case: Case, which: str, dtype: str, arrays: Library) -> tuple[np.ndarray, ...]:
    """The result in float64, of exactly the operands that were given."""
    from fastconv import reference

    host = {name: arrays.host(array) for name, array in operands(case, dtype, arrays).items()}
    if isinstance(case, CrossEntropyCase):
        result = reference.softmax_cross_entropy(host["logits"], host["target"])
        return result[:1] if which == "forward" else result
    x, w, dy = host["input"], host["weight"], host["grad_output"]
    options = (case.stride, tuple((p, p) for p in case.padding), case.dilation, case.groups)
    if which == "forward":
        return (reference.convolution(x, w, None, *options),)
    if which == "weight_grad":
        return (reference.convolution_weight_grad(x, case.weight_shape, dy, *options),)
    return (reference.convolution_input_grad(case.input_shape, w, dy, *options),)


def check_small(case: Case, which: str, dtype: str, arrays: Library, peer: str = "fastconv") -> None:
    """Every element of a small case against fastconv.reference. Raises Disagreement, Unsupported."""
    problem = Problem(case, which, dtype, arrays, operands(case, dtype, arrays))
    prepared = PEERS[peer](problem)
    raw = prepared.call()
    result = raw if isinstance(raw, tuple) else (prepared.result(raw),)
    epsilon = EPSILON[dtype] * ALLOWANCE
    wanted = _reference(case, which, dtype, arrays)
    if isinstance(case, CrossEntropyCase):
        check(problem, raw, count=case.batch)
        scale = [abs(float(wanted[0])) + 1, 1.0 / (case.batch * math.prod(case.size))]
        terms = case.classes
    else:
        # of unit variance, but for the weight gradient, which sums over positions
        scale = [math.sqrt(math.prod(case.output_shape) / case.out_channels) if which == "weight_grad" else 4.0]
        terms = case.flops(which) // 2 // math.prod(problem.result_shape) + 1
    for got, exact, size in zip(result, wanted, scale[: len(wanted)], strict=True):
        actual = arrays.host(got)
        allowed = epsilon * math.sqrt(terms) * size + 4 * ROUNDING.get(dtype, 0.0) * np.abs(exact)
        if problem.dtype == "float16":
            allowed = allowed + 2.0**-24  # the distance of two numbers near zero
        off = np.abs(actual - exact)
        if actual.shape != exact.shape or not np.all(off <= allowed):
            raise Disagreement(f"off by up to {np.nanmax(off) if off.size else math.nan:.3g} from the reference")


@contextlib.contextmanager
def only_tile(number: int) -> Iterator[None]:
    """Let the matrix products take the tile of this number, whatever the shape."""
    from fastconv.cuda_kernels import implicit_gemm, implicit_gemm_weight_grad, tiles

    with (
        mock.patch.object(implicit_gemm, "choose_tile", lambda rows, columns, groups, choice: choice[number]),
        mock.patch.object(
            implicit_gemm_weight_grad, "weight_tile",
            lambda rows, columns, kind: tiles.ARITHMETIC[kind].tiles[number],
        ),  # fmt: skip
    ):
        yield


def check_tile(case: Case, which: str, dtype: str, arrays: Library, peer: str, tile: int) -> None:
    """Some elements of a matrix product in this tile: too many for the reference's loops. Raises Disagreement."""
    problem = Problem(case, which, dtype, arrays, operands(case, dtype, arrays))
    prepared = PEERS[peer](problem)
    with only_tile(tile):
        check(problem, prepared.result(prepared.call()), 256)
