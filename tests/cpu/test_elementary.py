"""exp, log and tanh of `fastconv.cpu.elementary`: their error in units in the last place, special values, vectors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numba import njit

from fastconv.cpu import elementary
from fastconv.cpu.vector import softmax

FUNCTIONS = ("exp", "log", "tanh")
# What is promised, in units in the last place of the exact result.
PROMISE = {"exp": 1.1, "log": 1.0, "tanh": 3.0}
# A stride through the bit patterns of float32 that is prime, so that it meets every exponent and all low bits.
STRIDE = 1009


def _loop(name):
    function = getattr(elementary, name)

    @njit
    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return loop


LOOPS = {name: _loop(name) for name in FUNCTIONS}


def evaluate(name, x):
    y = np.empty_like(x)
    LOOPS[name](x, y)
    return y


def errors(y, exact):
    """The errors of y in units in the last place of `exact`, which is in a longer format; nan where exact is not."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(y.dtype)
        finite = np.isfinite(rounded)
        place = np.spacing(np.where(finite, np.abs(rounded), 1)).astype(exact.dtype)
        error = np.abs(y.astype(exact.dtype) - exact) / place
    same = (y == rounded) | (np.isnan(y) & np.isnan(rounded))
    return np.where(finite, error, np.where(same, 0, np.inf))


def check_float32(name, bits):
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        exact = getattr(np, name)(x.astype(np.float64))
    error = errors(evaluate(name, x), exact)
    if name == "exp":  # half a place beyond the largest number, exp rounds up to inf: both neighbours are within 1
        top = np.float32(np.finfo(np.float32).max)
        near = np.isinf(error) & (exact < float(top) * (1 + 2.0**-24))
        error[near] = 1
    worst = np.argmax(error)
    assert error[worst] <= PROMISE[name], f"{name}({x[worst]!r}): {error[worst]:.3f} units in the last place"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_sampled(name):
    check_float32(name, np.arange(0, 2**32, STRIDE, dtype=np.uint64).astype(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_float32(name):
    block = 2**24
    for start in range(0, 2**32, block):
        check_float32(name, np.arange(start, start + block, dtype=np.uint64).astype(np.uint32))


def sweep(name):
    """Arguments of float64 that cover what the function does: its whole range, and close to where it is hardest."""
    rng = np.random.default_rng(1)
    n = 200_000
    tiny = np.exp2(rng.uniform(-1074, 0, n)) * rng.choice([-1, 1], n)
    if name == "exp":
        ties = (np.arange(-1074, 1024) + 0.5) * np.log(2)  # where the reduced argument changes sign
        return np.concatenate([rng.uniform(-745, 709.7, n), rng.uniform(-1, 1, n), tiny, ties, np.nextafter(ties, 0)])
    if name == "log":
        roots = np.exp2(np.arange(-1022, 1023) + 0.5)
        return np.concatenate(
            [np.exp2(rng.uniform(-1074, 1023, n)), rng.uniform(0.5, 2, n), 1 + 1e-3 * rng.uniform(-1, 1, n), roots]
        )
    return np.concatenate([rng.uniform(-25, 25, n), rng.uniform(-1, 1, n), tiny])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(name):
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("NumPy has no format longer than float64 on this platform to compare with")
    x = sweep(name)
    exact = getattr(np, name)(x.astype(np.longdouble))
    error = errors(evaluate(name, x), exact)
    worst = np.argmax(error)
    assert error[worst] <= PROMISE[name], f"{name}({x[worst]!r}): {error[worst]:.3f} units in the last place"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype):
    tiny, most = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    inf, nan = dtype(np.inf), dtype(np.nan)
    table = {
        "exp": [(-inf, 0), (inf, inf), (nan, nan), (0, 1), (-0.0, 1), (most, inf), (-most, 0), (tiny, 1)],
        "log": [(-inf, nan), (inf, inf), (nan, nan), (0, -inf), (-0.0, -inf), (1, 0), (-1, nan), (-tiny, nan)],
        "tanh": [(-inf, -1), (inf, 1), (nan, nan), (0, 0), (most, 1), (-most, -1), (tiny, tiny)],
    }
    for name, rows in table.items():
        x, expected = (np.array(column, dtype) for column in zip(*rows, strict=True))
        np.testing.assert_array_equal(evaluate(name, x), expected, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_reaches_into_the_subnormal_numbers(dtype):
    smallest = float(np.finfo(dtype).smallest_subnormal)
    x = np.log(smallest * np.array([0.45, 0.55, 1, 3, 100], np.longdouble)).astype(dtype)
    np.testing.assert_array_equal(evaluate("exp", x), (smallest * np.array([0, 1, 1, 3, 100])).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_vector_and_a_scalar_give_the_same_bits(name, dtype):
    x = np.abs(np.random.default_rng(2).standard_normal(1003)).astype(dtype)
    together = evaluate(name, x)
    alone = np.concatenate([evaluate(name, x[i : i + 1]) for i in range(len(x))])
    assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_loops_are_vectorised(name, dtype):
    evaluate(name, np.ones(1, dtype))
    code = next(
        text for signature, text in LOOPS[name].inspect_llvm().items() if str(np.dtype(dtype)) in str(signature[0])
    )
    element = "float" if dtype == np.float32 else "double"
    assert re.search(rf"<\d+ x {element}> @llvm\.(fmuladd|fma)\.", code), "no vector multiply-add in the loop"
    assert not re.search(r"call .*@(exp|log|tanh)f?\(", code), "a call of the C library is left"


# ---------------------------------------------------------------------------------------------------------------------
# The vector loops of softmax, `softmax.span_...`
# ---------------------------------------------------------------------------------------------------------------------

SPANS = (1, 5, 16, 63, 64, 65, 130, 1000, 4097)


def maximum(x, like):
    return softmax.span_maximum.run(x.dtype, (x, x.size))


def exponentials(x, base, y):
    return softmax.span_exponentials.run(x.dtype, (y, x, x.size, base, 2048))


def scale(x, factor, y, past_cache):
    softmax.span_scale.run(x.dtype, (y, x, x.size, factor, past_cache))


def products(q, x, base, sums):
    softmax.span_products.run(x.dtype, (q, x, x.size, base, sums, 2048))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_of_a_span_are_those_of_exp(dtype):
    if dtype == np.float32:
        x = np.arange(2**31, 2**32, STRIDE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    else:
        x = -np.abs(sweep("exp"))
    y = np.empty(x.size + 16, dtype)
    exponentials(x, dtype(0), y)
    np.testing.assert_array_equal(y[: x.size], evaluate("exp", x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SPANS)
def test_spans(n, dtype):
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(dtype)
    assert maximum(x, dtype(0)) == x.max()
    y = np.full(n + 64, 7, dtype)
    total = exponentials(x, x.max(), y)
    assert (y[n:] == 7).all(), "beyond the end"
    np.testing.assert_array_equal(y[:n], evaluate("exp", x - x.max()))
    assert total == pytest.approx(y[:n].sum(dtype=np.float64), rel=float(64 * np.finfo(dtype).eps))
    q = rng.random(n).astype(dtype)
    q[::2] = 0
    x[::2] = -np.inf  # where q is 0
    sums = np.array([1.0, 2.0])
    products(q, x, dtype(0.5), sums)
    terms = q[1::2].astype(np.float64) * (x[1::2].astype(np.float64) - 0.5)
    exact = [1 + terms.sum(), 2 + q.sum(dtype=np.float64)]
    most = [1 + np.abs(terms).sum(), exact[1]]  # what the roundings are relative to
    np.testing.assert_allclose(sums, exact, rtol=0, atol=(n / 64 + 4) * np.finfo(dtype).eps * max(most))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SPANS)
@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("past_cache", [False, True])
def test_scaling_a_span(n, dtype, start, past_cache):
    x = np.random.default_rng(n).standard_normal(n).astype(dtype)
    y = np.full(start + n + 3, 7, dtype)
    scale(x, dtype(3), y[start : start + n], past_cache)
    np.testing.assert_array_equal(y[start : start + n], x * dtype(3))
    assert (np.delete(y, np.s_[start : start + n]) == 7).all(), "outside the span"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_maximum_of_a_span_passes_over_nan(dtype):
    x = np.array([np.nan, -np.inf, 3, np.nan, 2] + 70 * [np.nan], dtype)
    assert maximum(x, dtype(0)) == 3
    assert maximum(x[3:4], dtype(0)) == -np.inf
