"""Channels-last arrays that are read and written without transposes: which layers go that way, and the same results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv.cpu import channels_last, implicit_gemm, methods
from fastconv.cpu.vector.tile import tile
from helpers import LAYOUTS, channels_first, functions, integers, normal, output_of
from helpers import channels_last as last_
from processors import needs_x86, run_on
from shapes import Case
from tolerance import assert_same_bits

# Output channels are whole vectors, a part of one, whole ones and a part of one; in one panel and in several.
CASES = [
    Case("rgb", "the first layer of many networks", (2, 3, 20, 33), (32, 3, 3, 3), padding=1),
    Case("stem", "stride, and a large kernel", (2, 3, 37, 30), (64, 3, 7, 7), stride=2, padding=3),
    Case("patches", "windows that do not overlap, in place", (2, 3, 16, 32), (48, 3, 4, 4), stride=4),
    Case("part", "part of a vector", (2, 5, 11, 17), (7, 5, 3, 3), padding=1),
    Case("one_channel_out", "one", (2, 6, 9, 10), (1, 6, 3, 3), padding=1),
    Case("one_channel_in", "one, whose pixels may be planes too", (2, 1, 9, 30), (20, 1, 5, 5), padding=2),
    Case("several", "whole vectors and a part of one, in panels", (2, 4, 9, 16), (75, 4, 3, 2)),
    Case("deep", "several blocks of the reduction", (1, 200, 5, 9), (40, 200, 3, 3), padding=1),
    Case("deep_1x1", "the same with pixels a multiple of 4 KiB apart", (3, 1024, 3, 5), (36, 1024, 1, 1)),
    Case("1x1", "all pixels of all samples are one row", (3, 17, 6, 7), (33, 17, 1, 1)),
    Case("1x1_stride2", "every second pixel of every second row", (2, 17, 9, 13), (33, 17, 1, 1), stride=2),
    Case("1x1_padded", "a row of zeros all around", (2, 9, 6, 7), (16, 9, 1, 1), padding=1),
    Case("long", "a row in several tasks", (1, 2, 2, 5000), (16, 2, 2, 3), padding=(0, 1)),
    Case("wide", "rows that are more than a task reads", (1, 96, 4, 700), (4, 96, 3, 3), padding=1),
    Case("dilated", "taps apart in both dimensions", (2, 4, 15, 14), (12, 4, 3, 3), padding=(3, 2), dilation=(3, 2)),
    Case("uneven", "strides, padding and taps that differ", (2, 4, 15, 23), (12, 4, 2, 4), stride=(3, 2),
         padding=((2, 0), (1, 3)), dilation=(2, 1)),
    Case("groups", "groups of more channels than the sums of planes take", (2, 36, 9, 9), (60, 9, 3, 3), padding=1,
         groups=4),
    Case("reflect", "a border that is not zero", (2, 3, 8, 19), (16, 3, 3, 3), padding=2, padding_mode="reflect"),
    Case("circular", "the same, across depth and long rows", (1, 2, 3, 4, 3000), (8, 2, 3, 1, 3), padding=(1, 0, 1),
         padding_mode="circular"),
    Case("replicate", "the same with a stride", (2, 3, 9, 9), (16, 3, 5, 5), padding=4, stride=3,
         padding_mode="replicate"),
    Case("full", "more output than input", (2, 5, 6, 6), (24, 5, 3, 3), padding="full"),
    Case("1d", "one dimension", (3, 12, 50), (24, 12, 5), padding=2, stride=2),
    Case("3d", "three dimensions", (2, 4, 5, 6, 17), (16, 4, 3, 3, 3), padding=1),
    Case("one_pixel", "images of one pixel", (5, 12, 1, 1), (16, 12, 3, 3), padding=1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch):
    """Every product that may goes this way, whether it pays or not; the plans of those that did."""
    plans = []
    plan = channels_last.plan_correlation
    monkeypatch.setattr(channels_last, "plan_correlation", lambda *a, **o: plans.append(a) or plan(*a, **o))
    with methods.only(*WAYS):
        yield plans


# Where the first does not apply, the second does.
WAYS = ("channels_last", "implicit_gemm")


def arrays(case: Case, make, rng: np.random.Generator, dtype) -> list[np.ndarray]:
    return [make(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1], case.output, case.input)]


def results(case: Case, operands, last: bool = True) -> dict[str, np.ndarray]:
    """Forward pass and gradients in every way that their products may end; with the channels in second place."""
    x, w, b, dy, start = operands
    options, f = {**case.options, "layout": LAYOUTS[case.ndim][last], "algorithm": "direct"}, functions(case.ndim)
    if last:
        x, dy, start = map(last_, (x, dy, start))
    kept = {name: value for name, value in options.items() if name != "algorithm"}
    prepared = getattr(fc, f"Conv{case.ndim}d")(w, b, activation="relu", **kept)
    found = {
        "forward": f.conv(x, w, **options),
        "relu": f.conv(x, w, b, activation="relu", **options),
        "input": f.input_grad(x.shape, w, dy, **options),
        "added": f.input_grad(x.shape, w, dy, accumulate=True, out=start.copy(), **options),
    }
    if case.name != "one_pixel":  # prepared convolutions choose the algorithm themselves, which may be another
        found["prepared"] = prepared(x)
    if last:
        found = {name: channels_first(array) for name, array in found.items()}
    found["weight"] = f.weight_grad(x, w.shape, dy, **options)
    return found


def exact(case: Case, operands) -> dict[str, np.ndarray]:
    x, w, b, dy, start = operands
    plain = case.plain_options
    relu = np.maximum(oracle.convolution(x, w, b, **plain), 0)
    dx = oracle.input_grad(w, dy, input_shape=case.input, **plain)
    return {
        "forward": oracle.convolution(x, w, **plain), "relu": relu, "prepared": relu, "input": dx, "added": dx + start,
        "weight": oracle.weight_grad(x, dy, weight_shape=w.shape, **plain),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_are_exact(case: Case, dtype, planned, rng) -> None:
    operands = arrays(case, integers, rng, dtype)
    expected = exact(case, operands)
    found = results(case, operands)
    assert planned
    for name, result in found.items():
        np.testing.assert_array_equal(result, expected[name], name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_are_those_of_channels_first(case: Case, dtype, rng) -> None:
    """The order of the sum is the same. (That of a weight gradient is cut by what its panels hold.)"""
    operands = arrays(case, normal, rng, dtype)
    expected = results(case, operands, last=False)
    for name, result in results(case, operands).items():
        if name != "weight":
            assert_same_bits(np.ascontiguousarray(result), expected[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_and_any_number_of_threads(case: Case, rng) -> None:
    x, w, b, dy, start = arrays(case, normal, rng, np.float32)
    before = fc.get_num_threads()
    try:
        fc.set_num_threads(1)
        expected = results(case, (x, w, b, dy, start))
        for threads in (2, 3, 7):
            fc.set_num_threads(threads)
            for name, result in results(case, (x, w, b, dy, start)).items():
                assert_same_bits(result, expected[name])
    finally:
        fc.set_num_threads(before)
    one = slice(len(x) - 1, None)
    for name, result in results(case, (x[one], w, b, dy[one], start[one])).items():
        if name != "weight":
            assert_same_bits(result, expected[name][one])


def test_some_channels_of_wider_pixels(rng) -> None:
    """Views whose pixels are further apart than their channels, of input and output; what is between is left alone."""
    case = Case("slice", "", (2, 6, 9, 15), (20, 6, 3, 3), padding=1)
    x, w, b, dy, _ = operands = arrays(case, integers, rng, np.float32)
    expected = exact(case, operands)
    wide = {
        name: np.full((2, 9, 15, channels + 5), 77, np.float32)
        for name, channels in {"x": 6, "dy": 20, "y": 20, "dx": 6}.items()
    }
    inside = {name: array[..., 2:-3] for name, array in wide.items()}
    inside["x"][...], inside["dy"][...] = last_(x), last_(dy)
    options = {"padding": 1, "layout": "NHWC", "algorithm": "direct"}
    fc.conv2d(inside["x"], w, b, activation="relu", out=inside["y"], **options)
    fc.conv2d_input_grad(inside["dx"].shape, w, inside["dy"], out=inside["dx"], **options)
    dw = fc.conv2d_weight_grad(inside["x"], w.shape, inside["dy"], **options)
    np.testing.assert_array_equal(channels_first(inside["y"]), expected["relu"])
    np.testing.assert_array_equal(channels_first(inside["dx"]), expected["input"])
    np.testing.assert_array_equal(dw, expected["weight"])
    for array in wide.values():
        assert (array[..., :2] == 77).all()
        assert (array[..., -3:] == 77).all()


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("which", [np.s_[:, ::2], np.s_[::2, :]], ids=["rows", "samples"])
def test_every_second_row_of_one_pixel(which, vectors: int, rng) -> None:
    """The pixels of the output's gradient are further apart than its channels, and not by the step between columns."""
    channels = vectors * tile(32).lanes
    height = 4 if which[1].step else 1
    case = Case("column", "", (3, 5, height + 2, 3), (channels, 5, 3, 3))
    x, w, _, dy, _ = operands = arrays(case, integers, rng, np.float32)
    larger = np.full((6, 2 * height, 1, channels), 77, np.float32)
    view = larger[which][:3, :height]
    view[...] = last_(dy)
    dw = fc.conv2d_weight_grad(last_(x), w.shape, view, layout="NHWC", algorithm="direct")
    np.testing.assert_array_equal(dw, exact(case, operands)["weight"])


@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_reversed_pixels(case: Case, rng) -> None:
    """Rows and columns from the last to the first, so that steps in memory are negative."""
    x, w, _, dy, _ = operands = arrays(case, integers, rng, np.float32)
    expected = exact(case, operands)
    options = {**case.options, "layout": "NHWC", "algorithm": "direct"}
    x, dy = last_(x[:, :, ::-1, ::-1])[:, ::-1, ::-1], last_(dy[:, :, ::-1, ::-1])[:, ::-1, ::-1]
    np.testing.assert_array_equal(channels_first(fc.conv2d(x, w, **options)), expected["forward"])
    np.testing.assert_array_equal(
        channels_first(fc.conv2d_input_grad(x.shape, w, dy, **options)), expected["input"]
    )
    np.testing.assert_array_equal(fc.conv2d_weight_grad(x, w.shape, dy, **options), expected["weight"])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_not_finite(value: float, rng) -> None:
    """What is not finite stays with the windows that hold it, and with its own channel of the output."""
    case = CASES[3]
    x, w, b, dy, start = arrays(case, integers, rng, np.float32)
    clean = results(case, (x, w, b, dy, start))["forward"]
    x[1, 2, 4, 5] = value
    y = results(case, (x, w, b, dy, start))["forward"]
    seen = np.zeros(y.shape, bool)
    seen[1, :, 3:6, 4:7] = True
    np.testing.assert_array_equal(y[~seen], clean[~seen])
    assert not np.isfinite(y[seen]).any() or (w == 0).any()
    x[1, 2, 4, 5] = 0
    w[5, 0, 1, 1] = value
    found = results(case, (x, w, b, dy, start))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found["forward"], oracle.convolution(x, w, **case.plain_options))
        dx = oracle.input_grad(w, dy, input_shape=case.input, **case.plain_options)
    np.testing.assert_array_equal(found["input"], dx)


@pytest.mark.skipif(not tile(32).masks, reason="what pays is another choice on another tile")
def test_what_pays() -> None:
    """Layers of few products for each element that is moved, and of channels that fill the vectors."""
    dtype = np.dtype(np.float32)

    def goes(rows: int, channels: int, taps: int, needed: float = 1, x=None, y=None) -> bool:
        source = np.arange(-(taps // 2), 56 + taps // 2)
        source[(source < 0) | (source >= 56)] = -1
        axis = implicit_gemm.Axis(56, taps, 1, 1, source, taps // 2, 56)
        axes = (implicit_gemm.Axis(1, 1, 1, 1, np.zeros(1, np.int64), 0, 1), axis, axis)
        blocks = implicit_gemm.make_blocks(dtype, 1, rows, channels, axes, False)
        x = x or (56 * 56 * channels, 1, 0, 56 * channels, channels)
        y = y or (56 * 56 * rows, 1, 0, 56 * rows, rows)
        return channels_last.cut_all(dtype, [blocks], [axes], x, y, needed) is not None

    assert goes(64, 3, 3)
    assert goes(16, 32, 1)
    assert goes(64, 64, 3)
    assert goes(64, 64, 1)
    assert not goes(3, 64, 3)  # a fifth of the lanes
    assert not goes(24, 24, 3)  # three quarters of the lanes, and many products
    assert goes(24, 24, 1)
    assert not goes(128, 128, 3, needed=0.9)  # one product in ten is with zeros around the plane
    assert not goes(64, 3, 3, x=(56 * 56 * 3, 56 * 56, 0, 56, 1))
    assert not goes(64, 3, 3, y=(56 * 56 * 64, 56 * 56, 0, 56, 1))


@needs_x86
@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by way of Linux' libc")
@pytest.mark.parametrize("processor", ["avx2", "sse"])
def test_other_tiles(processor: str) -> None:
    """Without masks a part of a vector goes through a tile; nothing outside the arrays is read or written."""
    code = """
    import numpy as np
    import test_channels_last as t
    from fastconv.cpu import methods
    from guarded import guarded
    t.last_ = lambda array: guarded(np.ascontiguousarray(np.moveaxis(array, 1, -1)), t.at_end)
    for case in t.CASES:
        operands = t.arrays(case, t.integers, np.random.default_rng(0), np.float32)
        expected = t.exact(case, operands)
        for t.at_end in (False, True):
            some = [guarded(array, t.at_end) for array in operands]
            with methods.only(*t.WAYS):
                found = t.results(case, some)
            for name, result in found.items():
                np.testing.assert_array_equal(result, expected[name], str(case) + " " + name)
    print(len(t.CASES))
    """
    process = run_on(processor, code, path=[str(Path(__file__).parent)])
    assert int(output_of(process)) == len(CASES)
