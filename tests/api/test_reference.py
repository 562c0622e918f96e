"""The oracles: the textbook example by hand, plain loops against NumPy, and the error budget against wrong results."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv import reference
from helpers import DTYPES, integers, normal
from shapes import CASES, SMALL, TRANSPOSED
from tolerance import assert_accurate, assert_same_bits, expect

# ---------------------------------------------------------------------------------------------------------------------
# The textbook's toy example, by hand
# ---------------------------------------------------------------------------------------------------------------------

# X = a b c    W = 2 3    z_11 = 2*1 + 3*2 + 5*4 + 7*5 = 63, and so on
#     d e f        5 7
#     g h i
X = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
W = np.array([[2.0, 3.0], [5.0, 7.0]])
Z = [
    [2 * 1 + 3 * 2 + 5 * 4 + 7 * 5, 2 * 2 + 3 * 3 + 5 * 5 + 7 * 6],
    [2 * 4 + 3 * 5 + 5 * 7 + 7 * 8, 2 * 5 + 3 * 6 + 5 * 8 + 7 * 9],
]
Z_FULL = [
    [7 * 1, 5 * 1 + 7 * 2, 5 * 2 + 7 * 3, 5 * 3],
    [3 * 1 + 7 * 4, 63, 80, 2 * 3 + 5 * 6],
    [3 * 4 + 7 * 7, 114, 131, 2 * 6 + 5 * 9],
    [3 * 7, 2 * 7 + 3 * 8, 2 * 8 + 3 * 9, 2 * 9],
]
# A gradient that differs from position to position, so that a dropped sum or a wrong pairing shows.
DZ = np.array([[1.0, 10.0], [100.0, 1000.0]])
DW = [  # dL/dw_ij = sum over k, l of dL/dz_kl * x_(k+i-1)(l+j-1)
    [1 * 1 + 10 * 2 + 100 * 4 + 1000 * 5, 1 * 2 + 10 * 3 + 100 * 5 + 1000 * 6],
    [1 * 4 + 10 * 5 + 100 * 7 + 1000 * 8, 1 * 5 + 10 * 6 + 100 * 8 + 1000 * 9],
]
DX = [  # each x collects from the windows it was in
    [1 * 2, 1 * 3 + 10 * 2, 10 * 3],
    [1 * 5 + 100 * 2, 1 * 7 + 10 * 5 + 100 * 3 + 1000 * 2, 10 * 7 + 1000 * 3],
    [100 * 5, 100 * 7 + 1000 * 5, 1000 * 7],
]


def test_textbook_valid(backend):
    assert Z == [[63, 80], [114, 131]]
    assert fc.conv2d(X, W, backend=backend).tolist() == Z
    assert reference.convolution(X[None, None], W[None, None])[0, 0].tolist() == Z


def test_textbook_full(backend):
    assert fc.conv2d(X, W, padding="full", backend=backend).tolist() == Z_FULL
    assert fc.conv2d(X, W, padding=1, backend=backend).tolist() == Z_FULL, "full is one less than the kernel around"
    padded = reference.convolution(X[None, None], W[None, None], padding=((1, 1), (1, 1)))
    assert padded[0, 0].tolist() == Z_FULL


def test_textbook_gradients(backend):
    assert fc.conv2d_weight_grad(X, (2, 2), DZ, backend=backend).tolist() == DW
    assert fc.conv2d_input_grad((3, 3), W, DZ, backend=backend).tolist() == DX
    assert fc.conv_bias_grad(DZ, backend=backend).tolist() == [1111.0]
    assert reference.convolution_weight_grad(X[None, None], (1, 1, 2, 2), DZ[None, None])[0, 0].tolist() == DW
    assert reference.convolution_input_grad((1, 1, 3, 3), W[None, None], DZ[None, None])[0, 0].tolist() == DX
    assert reference.convolution_bias_grad(DZ[None, None]).tolist() == [1111.0]


def test_textbook_local_derivative():
    """dz_kl / dw_ij = x_(k+i-1)(l+j-1): one output position at a time."""
    for (k, l), (i, j) in itertools.product(np.ndindex(2, 2), np.ndindex(2, 2)):
        only = np.zeros((1, 1, 2, 2))
        only[0, 0, k, l] = 1
        dw = reference.convolution_weight_grad(X[None, None], (1, 1, 2, 2), only)
        assert dw[0, 0, i, j] == X[k + i, l + j]


def test_textbook_centred_form():
    """z_ij = sum over s, t from -floor(k/2) to floor(k/2) of w_st x_(i+s)(j+t), for odd k, with zeros around."""
    plane, w = np.arange(20.0).reshape(4, 5), np.arange(9.0).reshape(3, 3) - 3
    z = reference.convolution(plane[None, None], w[None, None], padding=((1, 1), (1, 1)))[0, 0]
    for i, j in np.ndindex(4, 5):
        inside = [(s, t) for s in (-1, 0, 1) for t in (-1, 0, 1) if 0 <= i + s < 4 and 0 <= j + t < 5]
        assert z[i, j] == sum(w[1 + s, 1 + t] * plane[i + s, j + t] for s, t in inside)


def test_examples_of_the_reference():
    assert doctest.testmod(reference).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# The NumPy oracle against the plain loops: whole numbers, so both are exact
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_oracle(case, rng):
    x, w, dy = (integers(rng, shape) for shape in (case.input, case.weight, case.output))
    b, plain = integers(rng, case.weight[:1]), case.plain_options
    y = reference.convolution(x, w, b, **plain)
    assert y.shape == case.output
    np.testing.assert_array_equal(oracle.convolution(x, w, b, **plain), y)
    np.testing.assert_array_equal(
        oracle.weight_grad(x, dy, weight_shape=case.weight, **plain),
        reference.convolution_weight_grad(x, case.weight, dy, **plain),
    )
    np.testing.assert_array_equal(
        oracle.input_grad(w, dy, input_shape=case.input, **plain),
        reference.convolution_input_grad(case.input, w, dy, **plain),
    )
    np.testing.assert_array_equal(oracle.bias_grad(dy), reference.convolution_bias_grad(dy))


@pytest.mark.parametrize("case", [c for c in TRANSPOSED if c.macs < 2000], ids=str)
def test_oracle_transposed(case, rng):
    """A transposed convolution is the input gradient of the convolution with the same arguments."""
    x, w = integers(rng, case.input), integers(rng, case.weight)
    plain = case.convolution.plain_options
    np.testing.assert_array_equal(
        oracle.transposed(x, w, result_shape=case.output, **plain),
        reference.convolution_input_grad(case.output, w, x, **plain),
    )


def test_names_of_the_table_are_unique_and_reasons_given():
    for table in (CASES, TRANSPOSED):
        names = [case.name for case in table]
        assert len(set(names)) == len(names)
        assert all(case.why for case in table)


# ---------------------------------------------------------------------------------------------------------------------
# The error budget: passes honest evaluations, fails wrong ones
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def product(rng, request):
    """A reduction of 700 terms, its expectation and operands."""
    dtype = getattr(request, "param", "float32")
    a, b = normal(rng, (40, 700), dtype), normal(rng, (700, 50), dtype)
    return a, b, expect(np.matmul, a, b)


@pytest.mark.parametrize("product", list(DTYPES), indirect=True)
def test_budget_passes_sums_in_other_orders(product):
    a, b, expected = product
    wide = np.float64 if a.dtype == np.float64 else np.float32
    a_wide, b_wide = a.astype(wide), b.astype(wide)
    one_by_one = np.zeros(expected.exact.shape, wide)
    for t in range(a.shape[1]):
        one_by_one += a_wide[:, t, None] * b_wide[t]
    blocked = sum(a_wide[:, t : t + 100] @ b_wide[t : t + 100] for t in range(0, 700, 100))
    backwards = a_wide[:, ::-1] @ b_wide[::-1]
    for result in (one_by_one, blocked, backwards, expected.exact):
        assert_accurate(result.astype(a.dtype), expected)


def _one_wrong(result):
    result[3, 4] += 0.01


def _one_nan(result):
    result[3, 4] = np.nan


def _one_infinite(result):
    result[3, 4] = np.inf


def _two_swapped(result):
    result[[0, 1], 0] = result[[1, 0], 0]


@pytest.mark.parametrize("spoil", [_one_wrong, _one_nan, _one_infinite, _two_swapped])
@pytest.mark.parametrize("product", ["float32", "float64"], indirect=True)
def test_budget_fails_a_wrong_element(product, spoil):
    _, _, expected = product
    result = expected.exact.astype(product[0].dtype)
    assert_accurate(result, expected)
    spoil(result)
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(result, expected)


@pytest.mark.parametrize("product", list(DTYPES), indirect=True)
def test_budget_fails_a_dropped_term(product):
    a, b, expected = product
    result = a[:, :-1].astype(np.float64) @ b[:-1].astype(np.float64)
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(result.astype(a.dtype), expected)


@pytest.mark.parametrize(
    ("product", "shorter"),
    [("float64", "float32"), ("float32", "float16"), ("float32", "bfloat16"), ("float16", "bfloat16")],
    indirect=["product"],
)
def test_budget_fails_a_shorter_format_on_the_way(product, shorter):
    a, b, expected = product
    rounded = [m.astype(DTYPES[shorter]).astype(np.float64) for m in (a, b)]
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(np.matmul(*rounded).astype(a.dtype), expected)


def test_budget_fails_tensor_float32(product):
    """Operands cut to ten bits of mantissa, as tensor cores do."""
    a, b, expected = product
    short = [(m.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for m in (a, b)]
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(np.matmul(*short).astype(np.float32), expected)


@pytest.mark.parametrize("product", ["float16", "bfloat16"], indirect=True)
def test_budget_fails_a_sum_in_sixteen_bits(product):
    a, b, expected = product
    total = np.zeros(expected.exact.shape, a.dtype)
    for t in range(a.shape[1]):
        total += a[:, t, None] * b[t]
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(total, expected)


def test_budget_wants_zero_where_there_is_nothing_to_sum():
    expected = expect(lambda a: a * 0, np.ones(3, np.float32))
    assert_accurate(np.zeros(3, np.float32), expected)
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(np.full(3, 1e-30, np.float32), expected)


def test_budget_fails_a_wrong_shape():
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(np.zeros((1, 3)), expect(np.add, np.ones(3), np.ones(3)))


def test_same_bits_sees_the_sign_of_zero_and_the_dtype():
    assert_same_bits(np.array([0.0, np.nan]), np.array([0.0, np.nan]))
    with pytest.raises(AssertionError, match="1 elements differ"):
        assert_same_bits(np.array([0.0]), np.array([-0.0]))
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(np.zeros(1), np.zeros(1, np.float32))
