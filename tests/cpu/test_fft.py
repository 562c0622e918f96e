"""Convolution by FFT: every case of `shapes.CASES` with more than one tap, in one tile and in many; its promises.

On small whole numbers the exact results are whole numbers, and a result is right if it rounds to them.
"""

from __future__ import annotations

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv import arguments
from fastconv.cpu import fft, tasks
from helpers import LAYOUTS, VIEWS, channels_last, functions, integers, normal
from shapes import CASES, SMALL, Case
from tolerance import assert_same_bits

WITH_TAPS = [case for case in CASES if math.prod(case.weight[2:]) > 1]
BY_NAME = {case.name: case for case in WITH_TAPS}
# One of each kind, for what does not depend on the numbers.
KINDS = [
    BY_NAME[name]
    for name in (
        "1d_causal", "1d_long_kernel", "3x3_full", "3x3_stride2", "dilated_strided", "groups3_odd",
        "depthwise_multiplier2", "reflect_uneven", "circular_once_around", "3x1", "1x5", "3d_strided", "primes_large",
        "plane_15x15",
    )
]  # fmt: skip
PASSES = ("forward", "weight", "input")


@pytest.fixture
def tiny(monkeypatch):
    """Tiles little larger than the kernel, a few of them at a time, a few filters at a time."""

    def forget():
        for cached in (fft.make_tiling, fft._forward_source, fft._input_grad_source, fft._weight_grad_sources):
            cached.cache_clear()

    forget()
    monkeypatch.setattr(fft, "_candidates", lambda span, positions, most: [1 if span == 1 else span + 2 + span % 2])
    monkeypatch.setattr(fft, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(fft, "SPECTRA_BYTES", 4096)
    yield
    monkeypatch.undo()
    forget()


def operands(case, rng, dtype="float32", make=integers):
    """x, w, b, dy."""
    return tuple(make(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1], case.output))


def of_batch(case, batch):
    """The case without the values it keeps for its own batch."""
    return dataclasses.replace(case, input=(batch, *case.input[1:]))


def run(case, which, arrays, **extra):
    f, options = functions(case.ndim), {**case.options, "algorithm": "fft", **extra}
    x, w, b, dy = arrays
    if which == "forward":
        return f.conv(x, w, b, **options)
    if which == "weight":
        return f.weight_grad(x, case.weight, dy, **options)
    return f.input_grad(case.input, w, dy, **options)


def exact(case, which, arrays):
    x, w, b, dy = (a.astype(np.float64) for a in arrays)
    if which == "forward":
        return oracle.convolution(x, w, b, **case.plain_options)
    if which == "weight":
        return oracle.weight_grad(x, dy, weight_shape=case.weight, **case.plain_options)
    return oracle.input_grad(w, dy, input_shape=case.input, **case.plain_options)


def assert_rounds_to(actual, expected):
    """Whole numbers up to some thousands: float32 is off by a few thousandths at most."""
    assert actual.shape == expected.shape
    np.testing.assert_array_less(np.abs(actual - expected), 0.05)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", WITH_TAPS, ids=str)
def test_every_pass(case, dtype, rng):
    arrays = operands(case, rng, dtype)
    for which in PASSES:
        result = run(case, which, arrays)
        assert result.dtype == dtype
        assert_rounds_to(result, exact(case, which, arrays))


@pytest.mark.parametrize("case", [c for c in SMALL if c in WITH_TAPS] + KINDS, ids=str)
def test_many_tiles(case, tiny, rng):
    arrays = operands(case, rng)
    for which in PASSES:
        assert_rounds_to(run(case, which, arrays), exact(case, which, arrays))


def test_tiny_settings_make_many_tiles_chunks_and_blocks(tiny, monkeypatch, rng):
    case = BY_NAME["primes_large"]
    calls = {"_tiles": 0, "_spectra": 0}
    for name in calls:
        original = getattr(fft, name)

        def counted(*a, name=name, original=original):
            calls[name] += 1
            return original(*a)

        monkeypatch.setattr(fft, name, counted)
    run(case, "forward", operands(case, rng))
    assert calls["_tiles"] > 10
    assert calls["_spectra"] - calls["_tiles"] > 1


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_bias_relu_accumulate_and_any_strides(case, rng):
    arrays = operands(case, rng)
    assert_rounds_to(
        run(case, "forward", arrays, activation="relu"), np.maximum(exact(case, "forward", arrays), 0)
    )
    for which, shape in zip(PASSES, (case.output, case.weight, case.input), strict=True):
        plain = run(case, which, arrays)
        for name, view in VIEWS.items():
            if name in ("strided", "transposed", "reversed"):
                out = view(np.full(shape, np.nan, np.float32))
                assert run(case, which, arrays, out=out) is out
                assert_same_bits(out, plain)
            assert_same_bits(run(case, which, tuple(view(a) for a in arrays)), plain)
        if which != "forward":
            start = integers(rng, shape, "float32")
            out = start.copy()
            run(case, which, arrays, out=out, accumulate=True)
            np.testing.assert_array_equal(out, start + plain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_formats(dtype, rng):
    case = BY_NAME["kernel_7x7"]
    arrays = operands(case, rng, dtype, lambda rng, shape, dtype: np.sign(integers(rng, shape, dtype)))
    for which in PASSES:
        result = run(case, which, arrays)
        assert result.dtype == arrays[0].dtype
        np.testing.assert_allclose(
            result.astype(np.float64), exact(case, which, arrays), rtol=2.0 ** (-8 if dtype == "bfloat16" else -11),
            atol=1e-4,
        )  # fmt: skip


def test_channels_last_and_transposed(rng):
    case = BY_NAME["kernel_9x9"]
    x, w, b, dy = operands(case, rng)
    y = fc.conv2d(channels_last(x), w, b, padding="same", algorithm="fft", layout=LAYOUTS[2][1])
    assert_same_bits(np.moveaxis(y, -1, 1), run(case, "forward", (x, w, b, dy)))
    bias = integers(rng, (case.input[1],), "float32")
    up = fc.conv_transpose2d(dy, w, bias, padding=4, algorithm="fft")
    np.testing.assert_array_less(np.abs(up - fc.conv_transpose2d(dy, w, bias, padding=4, algorithm="direct")), 0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------------------------------

LARGE = [
    Case("plane", "one plane", (1, 1, 90, 101), (1, 1, 21, 19), padding="same"),
    Case("signal", "one dimension", (1, 1, 5000), (1, 1, 300)),
    Case("channels", "a sum in the frequency domain", (2, 12, 40, 41), (9, 12, 9, 9), padding=4),
    Case("volume", "three dimensions", (1, 2, 17, 18, 19), (3, 2, 7, 7, 7), padding=3),
    Case("depthwise", "groups", (3, 8, 40, 41), (8, 1, 13, 13), padding=6, groups=8),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_error_is_relative_to_the_norms_of_the_operands(case, offset, dtype, rng):
    """|error| <= 2 eps log2(points of a tile) |filter| |tile|, of the 2-norms, summed over the terms of the sum.

    A transform of n points has an error of at most about eps log2(n) in the 2-norm (Higham, Accuracy and stability of
    numerical algorithms, section 24.1), and there are three of them.
    """
    x, w, b, dy = operands(case, rng, dtype, normal)
    x, dy = x + x.dtype.type(offset), dy + x.dtype.type(offset)
    geometry = arguments.convolution_plan(
        "test", case.ndim, case.input, case.weight, case.stride, case.padding, case.dilation, case.groups,
        case.padding_mode, LAYOUTS[case.ndim][0],
    ).geometry  # fmt: skip
    for which, operation in zip(PASSES, ("forward", "weight_grad", "input_grad"), strict=True):
        tiling = fft.make_tiling(operation, geometry)
        one, other = {"forward": (x, w), "weight": (x, dy), "input": (w, dy)}[which]
        norms = np.linalg.norm(one.astype(np.float64)) * np.linalg.norm(other.astype(np.float64))
        allowed = 2 * np.finfo(dtype).eps * math.log2(math.prod(tiling.tile)) * norms
        error = np.abs(run(case, which, (x, w, b * 0, dy)) - exact(case, which, (x, w, b * 0, dy)))
        assert error.max() <= allowed


# ---------------------------------------------------------------------------------------------------------------------
# Determinism
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = fc.get_num_threads()
    yield fc.set_num_threads
    fc.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [*LARGE, BY_NAME["primes_large"], BY_NAME["reflect_uneven"]], ids=str)
def test_any_number_of_threads(case, dtype, threads, rng):
    arrays = operands(case, rng, dtype, normal)
    threads(1)
    expected = [run(case, which, arrays) for which in PASSES]
    for n in (2, 3, 7):
        threads(n)
        for which, result in zip(PASSES, expected, strict=True):
            assert_same_bits(run(case, which, arrays), result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_sample_in_any_batch(case, dtype, rng):
    case = of_batch(case, 5)
    x, w, b, dy = operands(case, rng, dtype, normal)
    whole = run(case, "forward", (x, w, b, dy)), run(case, "input", (x, w, b, dy))
    for part in (slice(0, 1), slice(2, 3), slice(1, 4)):
        some = of_batch(case, len(x[part]))
        arrays = x[part], w, b, dy[part]
        assert_same_bits(run(some, "forward", arrays), whole[0][part])
        assert_same_bits(run(some, "input", arrays), whole[1][part])


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite, or too large
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38], ids=str)
@pytest.mark.parametrize("case", [BY_NAME["kernel_7x7"], BY_NAME["3x3_stride2"], BY_NAME["replicate_far"]], ids=str)
def test_special_values_stay_in_their_sample_and_windows(case, value, rng):
    """A sample that holds one is the direct sum, bit for bit; the samples beside it keep the bits of the FFT."""
    case = of_batch(case, 4)
    x, w, b, dy = operands(case, rng)
    clean = run(case, "forward", (x, w, b, dy)), run(case, "input", (x, w, b, dy))
    x[1].flat[rng.integers(x[1].size)] = dy[2].flat[rng.integers(dy[2].size)] = value
    with np.errstate(invalid="ignore", over="ignore"):
        y, dx = run(case, "forward", (x, w, b, dy)), run(case, "input", (x, w, b, dy))
        direct = [run(case, which, (x, w, b, dy), algorithm="direct") for which in PASSES]
        dw = run(case, "weight", (x, w, b, dy))
        start = integers(rng, case.input, "float32")
        added = start.copy()
        run(case, "input", (x, w, b, dy), out=added, accumulate=True)
    assert_same_bits(y[1], direct[0][1])
    assert_same_bits(y[[0, 2, 3]], clean[0][[0, 2, 3]])
    assert_same_bits(dx[2], direct[2][2])
    assert_same_bits(dx[[0, 1, 3]], clean[1][[0, 1, 3]])
    np.testing.assert_array_equal(added[[0, 1, 3]], (start + clean[1])[[0, 1, 3]])
    np.testing.assert_array_equal(added[2], start[2] + direct[2][2])
    assert_same_bits(dw, direct[1])
    w.flat[0] = value
    assert_same_bits(
        run(case, "forward", (x, w, b, dy)), run(case, "forward", (x, w, b, dy), algorithm="direct")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_without_scipy(case, monkeypatch, rng):
    monkeypatch.setattr(fft, "library", lambda: np.fft)
    arrays = operands(case, rng)
    for which in PASSES:
        assert_rounds_to(run(case, which, arrays), exact(case, which, arrays))
    assert fft._spectra(np.ones((1, 1, 1, 4, 4), np.float32), fft.Tiling((1, 2, 2), (1, 3, 3), (1, 4, 4), 0, 0)).dtype \
        == np.complex64  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "weight"),
    [((1, 1, 2_000_000), (1, 1, 4000)), ((40, 3, 200, 200), (2, 3, 31, 31)), ((1, 64, 40, 40), (64, 1, 31, 31))],
    ids=str,
)
def test_memory_is_bounded(shape, weight, rng):
    """By the workspace that is told, whatever the size of the input; the memory that threads keep included."""
    ndim = len(shape) - 2
    groups = shape[1] // weight[1]
    x, w = normal(rng, shape, "float32"), normal(rng, weight, "float32")
    geometry = arguments.convolution_plan(
        "test", ndim, shape, weight, 1, 0, 1, groups, "zeros", LAYOUTS[ndim][0]
    ).geometry
    told = fft.workspace("forward", geometry, x.dtype)
    tasks._local.__dict__.pop("workspaces", None)
    out = functions(ndim).conv(x, w, groups=groups, algorithm="fft")
    tasks._local.__dict__.pop("workspaces", None)
    tracemalloc.start()
    functions(ndim).conv(x, w, groups=groups, algorithm="fft", out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told / 4 < peak < 1.1 * told + 200_000
    assert told < 40e6


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_one_tap_has_nothing_to_transform(ndim):
    x, w = np.ones((1, 2, *(4,) * ndim), np.float32), np.ones((3, 2, *(1,) * ndim), np.float32)
    f = functions(ndim)
    for call in (
        lambda: f.conv(x, w, algorithm="fft"),
        lambda: f.weight_grad(x, w.shape, np.ones((1, 3, *(4,) * ndim), np.float32), algorithm="fft"),
    ):
        with pytest.raises(ValueError, match=r"algorithm='fft' does not apply: the kernel is a single tap"):
            call()
