"""Transposed convolution on every case of `shapes.TRANSPOSED`."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc
import oracle
from helpers import LAYOUTS, VIEWS, channels_first, channels_last, functions, integers, normal
from shapes import TRANSPOSED
from tolerance import assert_accurate, assert_same_bits, expect

FORMATS = ["float32-first", "float32-last", "float64-first", "float64-last", "float16-first", "bfloat16-last"]


def _bias_shape(case):
    return (case.output[1],)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_transposed(case, form, backend, rng):
    dtype, last = form.split("-")[0], form.endswith("last")
    x, w, b = (normal(rng, shape, dtype) for shape in (case.input, case.weight, _bias_shape(case)))
    y = functions(case.ndim).transpose(
        channels_last(x) if last else x, w, b, **case.options, layout=LAYOUTS[case.ndim][last], backend=backend
    )
    assert y.dtype == x.dtype
    plain = case.convolution.plain_options
    expected = expect(lambda x, w, b: oracle.transposed(x, w, b, result_shape=case.output, **plain), x, w, b)
    assert_accurate(channels_first(y) if last else y, expected)


@pytest.mark.parametrize("case", [c for c in TRANSPOSED if c.padding_mode == "zeros"], ids=str)
def test_against_torch(case, rng):
    """Whole numbers in float64, so both are exact. What torch lacks (pairs, words) is cropped from its full result."""
    torch = pytest.importorskip("torch", reason="torch is the second oracle, not a dependency")
    x, w, b = (integers(rng, shape) for shape in (case.input, case.weight, _bias_shape(case)))
    y = functions(case.ndim).transpose(x, w, b, **case.options)
    plain = case.convolution.plain_options
    whole = getattr(torch.nn.functional, f"conv_transpose{case.ndim}d")(
        torch.from_numpy(x), torch.from_numpy(w), stride=plain["stride"], dilation=plain["dilation"],
        groups=case.groups,
    )  # fmt: skip
    crop = [n for pair in reversed(plain["padding"]) for n in (-pair[0], -pair[1])]
    result = torch.nn.functional.pad(whole, crop) + torch.from_numpy(b).reshape(-1, *(1,) * case.ndim)
    np.testing.assert_array_equal(y, result.numpy())


@pytest.mark.parametrize("case", [c for c in TRANSPOSED if c.name in ("3x3_stride2", "dilated", "1d_stride2")], ids=str)
def test_arguments_as_in_torch(case, rng):
    """The same call, argument by position, gives the same result in both libraries."""
    torch = pytest.importorskip("torch", reason="torch is the second oracle, not a dependency")
    x, w, b = (integers(rng, shape) for shape in (case.input, case.weight, _bias_shape(case)))
    arguments = (case.stride, case.padding, case.output_padding, case.groups, case.dilation)
    name = f"conv_transpose{case.ndim}d"
    result = getattr(torch.nn.functional, name)(*map(torch.from_numpy, (x, w, b)), *arguments)
    np.testing.assert_array_equal(getattr(fc, name)(x, w, b, *arguments), result.numpy())


# output_padding beyond what any window reads cannot be written as the padding of a convolution
_WRITABLE = [case for case in TRANSPOSED if min(min(pair) for pair in case.convolution.pairs) >= 0]


@pytest.mark.parametrize("case", _WRITABLE, ids=str)
def test_is_the_input_gradient(case, backend, rng):
    """Of the convolution with the same arguments, bit for bit, wherever that convolution can be written."""
    x, w = normal(rng, case.input, "float32"), normal(rng, case.weight, "float32")
    y = functions(case.ndim).transpose(x, w, **case.options, backend=backend)
    dx = functions(case.ndim).input_grad(case.output, w, x, **case.convolution.options, backend=backend)
    assert_same_bits(y, dx)


@pytest.mark.parametrize("case", [c for c in TRANSPOSED if c.name in ("same", "gaps_after", "3d", "circular")], ids=str)
def test_relu_unbatched_out_and_views(case, backend, rng):
    transpose = functions(case.ndim).transpose
    x, w, b = (integers(rng, shape, "float32") for shape in (case.input, case.weight, _bias_shape(case)))
    y = transpose(x, w, b, **case.options, backend=backend)
    relu = transpose(x, w, b, **case.options, activation="relu", backend=backend)
    np.testing.assert_array_equal(relu, np.maximum(y, 0))
    np.testing.assert_array_equal(transpose(x[0], w, b, **case.options, backend=backend), y[0])
    for view in VIEWS.values():
        np.testing.assert_array_equal(transpose(view(x), view(w), view(b), **case.options, backend=backend), y)
    out = np.full((2, *y.shape), 7, np.float32)[0][..., ::-1]
    assert transpose(x, w, b, **case.options, out=out, backend=backend) is out
    np.testing.assert_array_equal(out, y)


def test_empty_batch_and_bare_plane(backend):
    x, w = np.ones((0, 2, 3, 4), np.float32), np.ones((2, 3, 2, 2), np.float32)
    y = fc.conv_transpose2d(x, w, stride=2, backend=backend)
    assert (y.shape, y.dtype) == ((0, 3, 6, 8), np.float32)
    plane, kernel = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 10.0], [100.0, 1000.0]])
    # every element stamps the kernel at its place
    expected = [[1, 12, 20], [103, 1234, 2040], [300, 3400, 4000]]
    assert fc.conv_transpose2d(plane, kernel, backend=backend).tolist() == expected
