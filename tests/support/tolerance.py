"""The one place that says how wrong a result may be.

Every operation here is a sum of products, y_i = sum over t of prod_t, evaluated in some order in some precision. Its
error is judged per element, relative to how large the partial sums of the element's own terms become:

    |y_i - exact_i| <= (e_plain + C * eps * sqrt(n_i)) * scale_i,    scale_i = |exact_i| + sqrt(sum over t of prod_t**2)

with n_i the number of terms, eps the machine epsilon of the precision that is computed in, and e_plain the largest
error, in the same unit, of a plain NumPy evaluation in that precision. Rounding errors of a sum behave as a random walk
(Higham and Mary, A new approach to probabilistic rounding error analysis, 2019): n_i roundings of at most eps/2 of a
partial sum give about 0.3 * eps * sqrt(n_i) * scale_i at the most that is likely. So C = 1 leaves room for any order
of summation, and none for a wrong term, a value rounded to a shorter format on the way, or a sum that stops short. An
element without terms must be exactly zero.

In float64 the yardstick is itself a plain evaluation in float64: e_plain is not seen, and taken as C * eps * sqrt(n_i).

float16 and bfloat16 are computed in float32 and rounded once: half a unit in the last place of the exact value comes on
top. `test_reference.py` shows that this catches errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

C = 1.0


@dataclass(frozen=True)
class Expected:
    """What a result should be, and by how much each of its elements may differ."""

    exact: np.ndarray  # float64
    allowed: np.ndarray


def _last_place(exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Half a unit in the last place of the values of `exact` in a 16-bit format, subnormal ones included."""
    if dtype.name == "float16":
        digits, least = 11, -14
    elif dtype.name == "bfloat16":
        digits, least = 8, -126
    else:
        return np.zeros_like(exact)
    exponent = np.frexp(exact)[1] - 1  # 2**exponent <= |exact|
    return np.ldexp(0.5, np.maximum(exponent, least) - (digits - 1))


def expect(operation: Callable[..., np.ndarray], *operands: np.ndarray | None) -> Expected:
    """The exact result of `operation` on `operands`, all of one dtype, and the error that dtype may have.

    `operation` is a sum of products, in which an operand appears once per product, and works in the precision of the
    arrays it is given: on their squares it gives the squared norm of the terms, on ones their number.
    """
    dtype = next(a.dtype for a in operands if a is not None)
    precision = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)

    def evaluate(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return operation(*(None if a is None else change(a) for a in operands))

    exact = evaluate(lambda a: a.astype(np.float64))
    scale = np.abs(exact) + np.sqrt(evaluate(lambda a: a.astype(np.float64) ** 2))
    random_walk = C * np.finfo(precision).eps * np.sqrt(evaluate(lambda a: np.ones(a.shape)))
    if precision == np.float64:
        error_of_plain = random_walk
    else:
        has_terms = scale > 0
        plain = evaluate(lambda a: a.astype(precision))
        error_of_plain = np.max(np.abs(plain - exact)[has_terms] / scale[has_terms], initial=0.0)
    return Expected(exact, (error_of_plain + random_walk) * scale + _last_place(exact, dtype))


def assert_accurate(actual: np.ndarray, expected: Expected) -> None:
    """Fail, naming the worst element, unless `actual` has the shape of `expected` and is within its allowed error."""
    actual = np.asarray(actual)
    assert actual.shape == expected.exact.shape, f"shape {actual.shape}, expected {expected.exact.shape}"
    if actual.size == 0:
        return
    error = np.abs(actual.astype(np.float64) - expected.exact)
    wrong = ~(error <= expected.allowed)  # nan is wrong
    if wrong.any():
        excess = np.where(wrong, np.nan_to_num(error, nan=np.inf) - expected.allowed, -np.inf)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {actual.size} elements are wrong; worst at {tuple(map(int, worst))}: "
            f"{actual[worst]!r}, exact {expected.exact[worst]!r}, allowed error {expected.allowed[worst]:.3g}"
        )


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Fail unless both arrays hold the same bits, the sign of zero and nan included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    bits = f"u{actual.dtype.itemsize}"
    a, b = np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits)
    different = np.argwhere(a != b)
    if len(different):
        at = tuple(different[0])
        raise AssertionError(f"{len(different)} elements differ; first at {at}: {actual[at]!r} and {expected[at]!r}")
