"""What a call on device arrays costs beside its kernels' work: launches, allocations, copies, waiting for the device.

With ``out=`` given, a call that was made before allocates nothing, copies nothing and waits for nothing, so that it can
be captured in a CUDA graph. Counted in the simulators, where the launches are those of a real device.
"""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest

import fastconv as fc
from fastconv.cuda_kernels import (
    _cuda,
    channel_sums,
    convolution,
    depthwise,
    implicit_gemm,
    implicit_gemm_weight_grad,
    position_sums,
    softmax_cross_entropy,
    softmax_rows,
)
from fastconv.cuda_kernels._cuda import cuda
from helpers import integers
from simulation import simulated
from tolerance import assert_same_bits

pytestmark = pytest.mark.skipif(not _cuda.SIMULATOR, reason="the calls are counted where the simulator takes them")


@pytest.fixture
def counted(monkeypatch):
    """What was done so far: "launch", "allocation", "copy", "wait"."""
    counts = Counter()

    def counting(what, function):
        def call(*arguments, **options):
            counts[what] += 1
            return function(*arguments, **options)

        return call

    for module in (
        channel_sums, depthwise, implicit_gemm, implicit_gemm_weight_grad, position_sums, softmax_rows,
    ):  # fmt: skip
        monkeypatch.setattr(module, "launch_blocks", counting("launch", simulated()))
    for module in (convolution, softmax_cross_entropy):
        monkeypatch.setattr(module, "has_engine", lambda: True)
    monkeypatch.setattr(_cuda, "_simulate", counting("launch", _cuda._simulate))
    monkeypatch.setattr(_cuda, "_synchronize", counting("wait", _cuda._synchronize))
    for name, what in {"device_array": "allocation", "to_device": "copy", "synchronize": "wait"}.items():
        monkeypatch.setattr(_cuda.cuda, name, counting(what, getattr(cuda, name)))
    for module in (convolution, implicit_gemm, implicit_gemm_weight_grad):
        for cached in ("_plans", "weight_plan", "_input_coordinates", "_padded_coordinates"):
            if hasattr(module, cached):
                getattr(module, cached).cache_clear()
    yield counts
    fc.set_float32_precision("ieee")
    for cached in (implicit_gemm._plans, implicit_gemm_weight_grad.weight_plan):
        cached.cache_clear()


def on_device(rng, shape, dtype=np.float32):
    return cuda.to_device(integers(rng, shape, dtype))


def convolution_calls(x_shape, w_shape, dtype="float32", precision="ieee", **options):
    """The calls of a convolution, each with the arrays it fills."""

    def calls(rng):
        fc.set_float32_precision(precision)
        x, w = on_device(rng, x_shape, dtype), on_device(rng, w_shape, dtype)
        size = fc.conv2d(np.zeros(x_shape, np.float32), np.zeros(w_shape, np.float32), **options).shape
        y, dy, dx, dw, db = (on_device(rng, shape, dtype) for shape in (size, size, x_shape, w_shape, w_shape[:1]))
        return {
            "forward": (lambda: fc.conv2d(x, w, **options, out=y), [y]),
            "input_grad": (lambda: fc.conv2d_input_grad(x_shape, w, dy, **options, out=dx), [dx]),
            "weight_grad": (lambda: fc.conv2d_weight_grad(x, w_shape, dy, **options, out=dw), [dw]),
            "bias_grad": (lambda: fc.conv_bias_grad(dy, out=db), [db]),
        }

    return calls


def cross_entropy_calls(rows, classes, **options):
    def calls(rng):
        z, labels = on_device(rng, (rows, classes)), cuda.to_device(np.arange(rows) % classes)
        weight = cuda.to_device((1 + np.arange(classes) % 2).astype(np.float32))
        shape = (rows,) if options.get("reduction") == "none" else ()
        loss, grad = cuda.to_device(np.zeros(shape, np.float32)), on_device(rng, (rows, classes))
        return {
            "loss": (lambda: fc.softmax_cross_entropy(z, labels, weight, **options, out=loss), [loss]),
            "grad": (lambda: fc.softmax_cross_entropy_grad(z, labels, weight, **options, out=grad), [grad]),
            "with_grad": (
                lambda: fc.softmax_cross_entropy_with_grad(z, labels, weight, **options, out=loss, grad_out=grad),
                [loss, grad],
            ),
            "softmax": (lambda: fc.softmax(z, out=grad), [grad]),
        }

    return calls


# Calls, and how many launches each of them takes. The mean of a loss needs the sum of the labels' weights before the
# rows, and the sum of the losses after them; a weight gradient in parts their sum; a product on the tensor cores an
# ordered copy of weights that do not lie as they are multiplied; an input gradient a launch for each phase of the
# stride.
COSTS = {
    "products": (
        convolution_calls((1, 8, 6, 8), (8, 8, 3, 3), padding=1),
        {"forward": 1, "input_grad": 1, "weight_grad": 1, "bias_grad": 1},
    ),
    "products, stride 2": (
        convolution_calls((1, 8, 6, 8), (8, 8, 3, 3), padding=1, stride=2),
        {"forward": 1, "input_grad": 4, "weight_grad": 1},
    ),
    "products of several parts": (
        convolution_calls((2, 4, 4, 4), (4, 4, 1, 1)), {"forward": 1, "input_grad": 1, "weight_grad": 2}
    ),
    "tensor cores": (
        convolution_calls((1, 8, 6, 8), (8, 8, 3, 3), precision="tf32", padding=1),
        {"forward": 1, "input_grad": 2, "weight_grad": 1},
    ),
    "tensor cores, float16": (
        convolution_calls((1, 8, 6, 8), (8, 8, 3, 3), dtype="float16", padding=1),
        {"forward": 1, "input_grad": 2, "weight_grad": 2},
    ),
    "depthwise": (
        convolution_calls((1, 4, 8, 8), (4, 1, 3, 3), padding=1, groups=4),
        {"forward": 1, "input_grad": 1, "weight_grad": 1},
    ),
    "cross-entropy, mean": (
        cross_entropy_calls(5, 40), {"loss": 3, "grad": 2, "with_grad": 3, "softmax": 1}
    ),
    "cross-entropy, sum": (
        cross_entropy_calls(5, 40, reduction="sum"), {"loss": 2, "grad": 1, "with_grad": 2}
    ),
    "cross-entropy, none": (
        cross_entropy_calls(5, 40, reduction="none"), {"loss": 1, "grad": 1, "with_grad": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, (_, costs) in COSTS.items() for call in costs])
def test_a_call_only_launches(name, call, counted, rng, monkeypatch):
    if "several parts" in name:
        monkeypatch.setattr(implicit_gemm_weight_grad, "LEAST_POSITIONS", 16)
    calls, costs = COSTS[name]
    function, filled = calls(rng)[call]
    result = function()
    assert all(r is array for r, array in zip(result if isinstance(result, tuple) else [result], filled, strict=True))
    first = [array.copy_to_host() for array in filled]
    for array in filled:
        array.copy_to_device(np.full(array.shape, 7, array.dtype))
    gc.collect()
    counted.clear()
    function()
    assert counted == {"launch": costs[call]}
    for array, expected in zip(filled, first, strict=True):
        assert_same_bits(array.copy_to_host(), expected)


def test_memory_between_kernels_is_used_again_but_never_twice_at_a_time(counted):
    like = _cuda.to_device(np.zeros(3, np.float32))
    first = _cuda.scratch((100,), np.float32, like)
    second = _cuda.scratch((100,), np.float32, like)
    assert first.pointer != second.pointer
    assert not _cuda.overlap(first, second)
    pointer = first.pointer
    view = first[10:20].flat()
    del first
    assert _cuda.scratch((128,), np.float32, like).pointer != pointer  # a view of it is still known
    del view
    assert _cuda.scratch((65,), np.float64, like).pointer != pointer  # of more bytes
    counted.clear()
    assert _cuda.scratch((128,), np.float32, like).pointer == pointer
    assert not counted


def test_memory_between_kernels_belongs_to_a_stream(monkeypatch):
    like, other = (_cuda.to_device(np.zeros(3, np.float32)) for _ in range(2))
    monkeypatch.setattr(_cuda, "_stream", lambda handle: 0)
    other.stream = 7
    pointer = _cuda.scratch((33,), np.float32, like).pointer
    assert _cuda.scratch((33,), np.float32, other).pointer != pointer
    assert _cuda.scratch((33,), np.float32, other).stream == 7
    assert _cuda.scratch((33,), np.float32, like).pointer == pointer


@pytest.mark.parametrize("positions", [1, 1023, 1024, 5000])
def test_sums_of_one_block_and_of_several(positions, monkeypatch, rng):
    monkeypatch.setattr(position_sums, "launch_blocks", simulated(("shuffled", "late")))
    monkeypatch.setattr(position_sums, "MOST_OF_A_BLOCK", 2048)
    position_sums.add_values_kernel.cache_clear()
    position_sums.add_label_weights_kernel.cache_clear()
    labels, weight = rng.integers(-1, 5, positions), np.array([1, 2, 4, 8], np.float32)
    counts = np.array([weight[label] if 0 <= label < 4 and label != 2 else 0 for label in labels], np.float32)
    out = _cuda.to_device(np.full(1, np.nan, np.float32))
    position_sums.add_values(_cuda.to_device(counts), position_sums._none(np.dtype(np.float32)), 2, out)
    assert _cuda.to_host(out) == counts.sum() / 2
    target = _cuda.to_device(labels)[:, None, None, None]
    assert position_sums.add_label_weights(target, _cuda.to_device(weight), 2, 4, out)
    assert _cuda.to_host(out) == counts.sum()
    position_sums.add_values_kernel.cache_clear()
    position_sums.add_label_weights_kernel.cache_clear()


def test_what_is_counted(counted, rng):
    """Without `out` a result is allocated; the first call of a shape copies its tables and waits for them."""
    x, w = on_device(rng, (1, 8, 4, 4)), on_device(rng, (8, 8, 3, 3))
    counted.clear()
    fc.conv2d(x, w)
    assert counted == {"launch": 1, "allocation": 1, "copy": 2, "wait": 1}
    counted.clear()
    fc.conv2d(x, w).copy_to_host()
    assert counted == {"launch": 1, "allocation": 1}
