"""The gradient of a bias by blocks, in the block simulator: layouts, types, parts, schedules."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from block_simulator import ORDERS
from fastconv.cuda_kernels import _cuda, channel_sums, convolution
from fastconv.cuda_kernels._cuda import to_device, to_host
from helpers import DTYPES, channels_last, integers, normal
from simulation import simulated
from tolerance import assert_accurate, assert_same_bits, expect

pytestmark = pytest.mark.skipif(
    not _cuda.SIMULATOR, reason="there is no simulator on a GPU, where the tests of convolution run these kernels"
)


@pytest.fixture
def run(monkeypatch):
    """``run(grad_output, last, order, start)``: of an array (N, C, *S), `last`: whose channels lie together."""

    def run(dy, last=False, order="forward", start=None):
        monkeypatch.setattr(channel_sums, "launch_blocks", simulated((order, "late")))
        stored = to_device(np.ascontiguousarray(channels_last(dy)) if last else dy)
        array = stored.transpose((0, dy.ndim - 1, *range(1, dy.ndim - 1))) if last else stored
        form = array[(slice(None), slice(None), *[None] * (5 - dy.ndim))]
        out = to_device(np.full(dy.shape[1], np.nan, dy.dtype) if start is None else start)
        assert channel_sums.bias_grad(form, start is not None, out)
        return to_host(out)

    return run


SHAPES = [(2, 3, 5, 7), (1, 1, 300), (1, 5, 1, 1), (4, 2, 1)]
# Where the channels lie together a block takes 32 of them, otherwise one: there many channels are many blocks.
FIRST = [(False, shape) for shape in [*SHAPES, (3, 5, 4), (2, 3, 2, 3, 3)]]
LAST = [(True, shape) for shape in [*SHAPES, (3, 40, 4), (2, 33, 2, 3, 3)]]


@pytest.mark.parametrize(
    ("dtype", "last", "shape"),
    [*((dtype, *each) for dtype in DTYPES for each in FIRST + LAST), ("float32", False, (3, 40, 4))],
)
def test_every_layout_and_type(dtype, last, shape, run, rng):
    dy = normal(rng, shape, dtype)
    assert_accurate(run(dy, last), expect(oracle.bias_grad, dy))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("last", [False, True])
def test_every_schedule_and_several_parts(order, last, run, rng, monkeypatch):
    monkeypatch.setattr(channel_sums, "LEAST_POSITIONS", 1)
    dy = integers(rng, (3, 5, 20, 20), "float32")
    np.testing.assert_array_equal(run(dy, last, order), dy.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulate(dtype, run, rng):
    dy, start = integers(rng, (2, 3, 4, 5), dtype), integers(rng, (3,), dtype)
    expected = dy.astype(np.float64).sum((0, 2, 3)) + start.astype(np.float64)
    np.testing.assert_array_equal(run(dy, start=start).astype(np.float64), expected)


def test_the_order_of_a_sum_is_that_of_the_shape(run, rng):
    dy = normal(rng, (2, 3, 16, 16), "float32")
    assert_same_bits(run(dy, order="forward"), run(dy, order="shuffled"))


def test_what_is_left_to_the_simple_kernel(monkeypatch):
    monkeypatch.setattr(channel_sums, "launch_blocks", lambda *a: pytest.fail("launched"))
    out = to_device(np.zeros(2, np.float32))
    apart = to_device(np.zeros((1, 2, 1, 3, 8), np.float32))[:, :, :, :, 0:4]
    assert not channel_sums.bias_grad(apart, False, out)
    assert not channel_sums.bias_grad(to_device(np.zeros((0, 2, 1, 3, 4), np.float32)), False, out)


def test_from_the_public_function(rng, monkeypatch):
    import fastconv as fc

    used = []
    monkeypatch.setattr(channel_sums, "launch_blocks", lambda *a: used.append(a[0]) or simulated()(*a))
    monkeypatch.setattr(convolution, "has_engine", lambda: True)
    dy = integers(rng, (2, 3, 4, 5), "float32")
    expected = dy.sum((0, 2, 3))
    np.testing.assert_array_equal(fc.conv_bias_grad(dy, backend="cuda"), expected)
    np.testing.assert_array_equal(fc.conv_bias_grad(channels_last(dy), layout="NHWC", backend="cuda"), expected)
    assert len(used) == 2
