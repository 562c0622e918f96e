"""float16 and bfloat16 on the CPU: some samples at a time are converted, in bounded memory, to the bits of float32."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import fastconv as fc
from fastconv.cpu import reals, tasks
from helpers import DTYPES, LAYOUTS, channels_last, functions, integers, normal
from shapes import CASES, Case
from tolerance import assert_same_bits

NAMES = ("1x1", "3x3_stride2", "depthwise_multiplier2", "circular_once_around", "straddle", "3d_strided", "mamba_1d",
         "planes_of_one_pixel")  # fmt: skip
SLICED = [
    *(case for case in CASES if case.name in NAMES),
    Case("samples", "runs of samples, and a shorter one at the end", (7, 6, 9, 8), (5, 6, 3, 3), padding=1),
]


@pytest.fixture(params=[1, 1500, 4000])
def few_bytes(request, monkeypatch):
    """One sample at a time, and a few."""
    monkeypatch.setattr(reals, "SLICE_BYTES", request.param)
    monkeypatch.setattr(reals, "SLICE_WEIGHTS", 0)


def _results(case, x, w, b, dy, dx, dw, last, algorithm):
    f = functions(case.ndim)
    options = {**case.options, "layout": LAYOUTS[case.ndim][last]}
    chosen = {**options, "algorithm": algorithm}
    return {
        "forward": f.conv(x, w, b, **chosen, activation="relu"),
        "input": f.input_grad(x.shape, w, dy, **chosen),
        "input, added": f.input_grad(x.shape, w, dy, **chosen, out=dx.copy(), accumulate=True),
        "weight": f.weight_grad(x, w.shape, dy, **options),
        "weight, added": f.weight_grad(x, w.shape, dy, **options, out=dw.copy(), accumulate=True),
        "bias": f.bias_grad(dy, layout=options["layout"]),
        "bias, added": f.bias_grad(dy, layout=options["layout"], out=b.copy(), accumulate=True),
    }


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", SLICED, ids=str)
def test_slices_have_the_bits_of_float32_rounded_once(case, dtype, last, few_bytes, rng):
    # Whole numbers for the weight gradient, which sums over the slices: exact in any order.
    x, dy = (integers(rng, shape, dtype) for shape in (case.input, case.output))
    w, b = (normal(rng, shape, dtype) for shape in (case.weight, case.weight[:1]))
    dx, dw = integers(rng, case.input, dtype), integers(rng, case.weight, dtype)
    if last:
        x, dy, dx = map(channels_last, (x, dy, dx))
    arrays = (x, w, b, dy, dx, dw)
    for algorithm in ("direct", "winograd") if case.name == "samples" else ("direct",):
        actual = _results(case, *arrays, last, algorithm)
        expected = _results(case, *(a.astype(np.float32) for a in arrays), last, algorithm)
        for name, result in actual.items():
            assert_same_bits(result, expected[name].astype(DTYPES[dtype]))


def test_empty_batch(few_bytes):
    x, w, dy = np.ones((0, 3, 5, 5), np.float16), np.ones((4, 3, 3, 3), np.float16), np.ones((0, 4, 3, 3), np.float16)
    assert fc.conv2d(x, w).shape == (0, 4, 3, 3)
    assert fc.conv2d_input_grad(x.shape, w, dy).shape == x.shape
    dw = fc.conv2d_weight_grad(x, w.shape, dy, out=w, accumulate=True)
    assert (dw == 1).all()
    assert not fc.conv2d_weight_grad(x, w.shape, dy).any()
    assert not fc.conv_bias_grad(dy).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_memory_is_bounded(dtype, rng):
    """Of the operands, which are 7 MiB each in float32, one slice is converted at a time."""
    x, w = normal(rng, (40, 16, 52, 54), dtype), normal(rng, (16, 16, 3, 3), dtype)
    dy, y, dx, dw = (normal(rng, like.shape, dtype) for like in (x, x, x, w))
    calls = (
        lambda: fc.conv2d(x, w, padding=1, out=y),
        lambda: fc.conv2d_input_grad(x.shape, w, dy, padding=1, out=dx),
        lambda: fc.conv2d_weight_grad(x, w.shape, dy, padding=1, out=dw),
        lambda: fc.conv_bias_grad(dy),
    )
    before = fc.get_num_threads()
    fc.set_num_threads(2)  # each has memory of its own
    try:
        for call in calls:
            call()
            tasks._local.__dict__.clear()
            tracemalloc.start()
            call()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert 0.5 * 2**20 < peak < 5 * 2**20, peak
    finally:
        fc.set_num_threads(before)
