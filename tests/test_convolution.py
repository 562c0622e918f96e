"""Convolution and its gradients: forward, weight, input, bias, on every case of `shapes.CASES`."""

from __future__ import annotations

import pytest

import oracle
from helpers import LAYOUTS, channels_first, channels_last, functions, normal
from shapes import CASES
from tolerance import assert_accurate, expect

# 16-bit arrays are converted to float32 before anything looks at their layout: one layout each will do.
FORMATS = ["float32-first", "float32-last", "float64-first", "float64-last", "float16-first", "bfloat16-last"]


class Layout:
    """The case's arrays in one layout: `store` makes the caller's array of an (N, C, *S) one, `load` turns it back."""

    def __init__(self, case, name):
        self.last = name == "last"
        self.name = LAYOUTS[case.ndim][self.last]
        self.store = channels_last if self.last else lambda a: a
        self.load = channels_first if self.last else lambda a: a

    def shape(self, shape):
        return (shape[0], *shape[2:], shape[1]) if self.last else shape


@pytest.fixture(params=FORMATS)
def dtype_and_layout(request):
    return request.param.split("-")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype_and_layout, backend, rng):
    dtype, layout = dtype_and_layout[0], Layout(case, dtype_and_layout[1])
    x, w, b = (normal(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1]))
    y = functions(case.ndim).conv(layout.store(x), w, b, **case.options, layout=layout.name, backend=backend)
    assert y.dtype == x.dtype
    expected = expect(lambda x, w, b: oracle.convolution(x, w, b, **case.plain_options), x, w, b)
    assert_accurate(layout.load(y), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_grad(case, dtype_and_layout, backend, rng):
    dtype, layout = dtype_and_layout[0], Layout(case, dtype_and_layout[1])
    x, dy = normal(rng, case.input, dtype), normal(rng, case.output, dtype)
    dw = functions(case.ndim).weight_grad(
        layout.store(x), case.weight, layout.store(dy), **case.options, layout=layout.name, backend=backend
    )
    assert dw.dtype == x.dtype
    expected = expect(
        lambda x, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **case.plain_options), x, dy
    )
    assert_accurate(dw, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_grad(case, dtype_and_layout, backend, rng):
    dtype, layout = dtype_and_layout[0], Layout(case, dtype_and_layout[1])
    w, dy = normal(rng, case.weight, dtype), normal(rng, case.output, dtype)
    dx = functions(case.ndim).input_grad(
        layout.shape(case.input), w, layout.store(dy), **case.options, layout=layout.name, backend=backend
    )
    assert dx.dtype == w.dtype
    expected = expect(lambda w, dy: oracle.input_grad(w, dy, input_shape=case.input, **case.plain_options), w, dy)
    assert_accurate(layout.load(dx), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_grad(case, dtype_and_layout, backend, rng):
    dtype, layout = dtype_and_layout[0], Layout(case, dtype_and_layout[1])
    dy = normal(rng, case.output, dtype)
    db = functions(case.ndim).bias_grad(layout.store(dy), layout=layout.name, backend=backend)
    assert db.dtype == dy.dtype
    assert_accurate(db, expect(oracle.bias_grad, dy))
