"""Small planes with zeros around them: which layers go that way, and the same bits as with the zeros multiplied."""

import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv.cpu import implicit_gemm, methods, small_planes
from fastconv.cpu.vector.tile import tile
from helpers import (
    LAYOUTS,
    SUPPORT,
    channels_last,
    functions,
    integers,
    normal,
    output_of,
    reversed_,
    run_python,
    strided,
)
from processors import PROCESSORS, needs_x86, run_on
from shapes import Case
from tolerance import assert_same_bits

# Channels are whole panels of output channels, for float32 (32 of AVX-512) and float64 (16).
CASES = [
    Case("7x7", "rows of two samples or of one in a tile", (4, 32, 7, 7), (64, 32, 3, 3), padding=1),
    Case("14x14", "one row in a tile", (2, 32, 14, 14), (32, 32, 3, 3), padding=1),
    Case("14x14_stride2", "phases of one, two and four taps", (2, 32, 14, 14), (64, 32, 3, 3), stride=2, padding=1),
    Case("deep", "several blocks of the reduction", (2, 128, 5, 6), (32, 128, 3, 3), padding=1),
    Case("one_pixel", "one of nine taps", (9, 32, 1, 1), (32, 32, 3, 3), padding=1),
    Case("four_rows", "four rows and fewer in a tile", (1, 32, 9, 3), (32, 32, 3, 3), padding=1),
    Case("oblong", "another kernel", (2, 32, 4, 13), (32, 32, 2, 5), padding=((1, 0), (2, 3))),
    Case("dilated", "dilation, and columns that see nothing", (2, 32, 8, 5), (32, 32, 3, 3), padding=4, dilation=4),
    Case("uneven", "strides, dilation and padding that differ", (2, 32, 13, 11), (32, 32, 3, 4), stride=(2, 3),
         padding=((2, 1), (3, 4)), dilation=(1, 2)),
    Case("full", "more output than input", (2, 32, 6, 6), (32, 32, 3, 3), padding="full"),
    Case("groups", "groups of whole panels", (2, 64, 7, 7), (128, 32, 3, 3), padding=1, groups=2),
    Case("1d", "one dimension", (4, 32, 9), (32, 32, 5), padding=2),
    Case("3d", "three dimensions", (2, 32, 3, 4, 5), (32, 32, 3, 2, 3), padding=(1, 1, 1)),
    Case("pieces", "output rows in two pieces, of 8 and 7 pixels", (2, 32, 3, 15), (32, 32, 3, 3), padding=1),
    Case("three_pieces", "the one in the middle sees no zeros beside it", (2, 32, 4, 31), (32, 32, 3, 3), padding=1),
    Case("1x1", "no zeros, but weights that are packed faster for the gradient", (2, 32, 7, 7), (64, 32, 1, 1)),
    Case("1x1_stride2", "the same, written to every second pixel", (2, 32, 9, 13), (64, 32, 1, 1), stride=2),
    Case("many_samples", "several tasks of other samples", (50, 32, 7, 7), (32, 32, 3, 3), padding=1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def two_threads():
    """So few that the panels of the samples of every case keep them busy."""
    before = fc.get_num_threads()
    fc.set_num_threads(2)
    yield
    fc.set_num_threads(before)


def _results(case: Case, operands, last: bool) -> dict[str, np.ndarray]:
    """Forward and input gradient, in every way that their products may end."""
    x, w, b, dy, start = operands
    options, f = {**case.options, "layout": LAYOUTS[case.ndim][last]}, functions(case.ndim)
    if last:
        x, dy, start = map(channels_last, (x, dy, start))
    prepared = getattr(fc, f"Conv{case.ndim}d")(w, b, activation="relu", **options)
    return {
        "forward": f.conv(x, w, **options),
        "relu": f.conv(x, w, b, activation="relu", **options),
        "prepared": prepared(x),
        "input": f.input_grad(x.shape, w, dy, **options),
        "added": f.input_grad(x.shape, w, dy, accumulate=True, out=start.copy(), **options),
    }


def _operands(case: Case, make, rng, dtype):
    shapes = case.input, case.weight, case.weight[:1], case.output, case.input
    return [make(rng, shape, dtype) for shape in shapes]


@pytest.mark.skipif(not tile(32).masks, reason="what goes that way is another choice on another tile")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_these_cases_go_that_way(case: Case, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    planned = []
    plan = small_planes.plan_correlation

    def planning(*arguments, **options):
        planned.append(arguments)
        return plan(*arguments, **options)

    monkeypatch.setattr(small_planes, "plan_correlation", planning)
    methods.forget_plans()
    x, w, _, dy, _ = _operands(case, normal, rng, np.float32)
    f = functions(case.ndim)
    f.conv(x, w, **case.options)
    assert len(planned) == (not case.name.startswith("1x1"))
    planned.clear()
    f.input_grad(x.shape, w, dy, **case.options)
    assert bool(planned) == (case.name != "full")  # there are no zeros around what is more than the input


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_are_those_of_all_products(case: Case, dtype, last: bool, rng) -> None:
    operands = _operands(case, normal, rng, dtype)
    results = _results(case, operands, last)
    with methods.only("implicit_gemm"):
        expected = _results(case, operands, last)
    for name, result in results.items():
        assert_same_bits(result, expected[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_are_exact(case: Case, dtype, rng) -> None:
    operands = x, w, b, dy, start = _operands(case, integers, rng, dtype)
    results, plain = _results(case, operands, False), case.plain_options
    y = oracle.convolution(x, w, **plain)
    relu = np.maximum(oracle.convolution(x, w, b, **plain), 0)
    dx = oracle.input_grad(w, dy, input_shape=case.input, **plain)
    expected = {"forward": y, "relu": relu, "prepared": relu, "input": dx, "added": dx + start}
    for name, result in results.items():
        np.testing.assert_array_equal(result, expected[name], name)


@pytest.mark.parametrize("view", [strided, reversed_])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_arrays_of_any_strides(case: Case, view, rng) -> None:
    x, w, b, dy, start = _operands(case, integers, rng, np.float32)
    results, f = _results(case, (x, w, b, dy, start), False), functions(case.ndim)
    out = view(np.empty(case.output, np.float32))
    f.conv(view(x), view(w), view(b), activation="relu", out=out, **case.options)
    np.testing.assert_array_equal(out, results["relu"])
    f.input_grad(x.shape, view(w), view(dy), accumulate=True, out=(out := view(start)), **case.options)
    np.testing.assert_array_equal(out, results["added"])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_and_any_number_of_threads(case: Case, last: bool, rng) -> None:
    x, w, b, dy, start = _operands(case, normal, rng, np.float32)
    fc.set_num_threads(1)
    expected = _results(case, (x, w, b, dy, start), last)
    for threads in (2, 3, 7):
        fc.set_num_threads(threads)
        for name, result in _results(case, (x, w, b, dy, start), last).items():
            assert_same_bits(result, expected[name])
    one = slice(len(x) - 1, None)
    for name, result in _results(case, (x[one], w, b, dy[one], start[one]), last).items():
        assert_same_bits(result, expected[name][one])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_that_are_not_finite(case: Case, value: float, rng) -> None:
    """A zero of the padding times such a weight is nan in the forward pass; the gradient has no such product."""
    x, w, b, dy, start = _operands(case, integers, rng, np.float32)
    w.flat[rng.integers(w.size)] = value
    with np.errstate(invalid="ignore"):
        y = oracle.convolution(x, w, b, **case.plain_options)
        dx = oracle.input_grad(w, dy, input_shape=case.input, **case.plain_options)
        relu = np.where(y < 0, 0, y)
    results = _results(case, (x, w, b, dy, start), False)
    np.testing.assert_array_equal(results["relu"], relu)
    np.testing.assert_array_equal(results["prepared"], relu)
    np.testing.assert_array_equal(results["input"], dx)
    np.testing.assert_array_equal(results["added"], dx + start)


@pytest.mark.skipif(not tile(32).masks, reason="what goes that way is another choice on another tile")
def test_what_is_left_to_the_other_product() -> None:
    """Output rows that are too long, channels that do not fill panels, and where there is little to leave out."""
    dtype = np.dtype(np.float32)

    def axis(out: int, taps: int = 3, before: int = 1, stride: int = 1) -> implicit_gemm.Axis:
        size = out * stride
        source = np.arange(-before, (out - 1) * stride + taps - before)
        source[(source < 0) | (source >= size)] = -1
        return implicit_gemm.Axis(out, taps, stride, 1, source, before, size)

    one = axis(1, 1, 0)

    def goes(height: implicit_gemm.Axis, width: implicit_gemm.Axis, rows: int = 64, workers: int = 2) -> bool:
        axes = (one, height, width)
        blocks = implicit_gemm.make_blocks(dtype, 1, rows, 64, axes, False)
        return small_planes.cut_all(dtype, 3, [blocks], [axes], workers) is not None

    assert goes(axis(7), axis(7))
    assert goes(axis(14), axis(14))
    assert goes(axis(14, stride=2), axis(14, stride=2))
    assert goes(axis(15), axis(15))
    assert not goes(axis(56), axis(56))  # the sums of a plane would not stay in the cache
    assert not goes(axis(7), axis(7), rows=65)
    assert goes(axis(7), axis(7), workers=6)
    assert not goes(axis(7), axis(7), workers=4)  # two of four would have nothing to do half of the time
    assert not goes(axis(7), axis(7), workers=8)
    assert not goes(axis(7, 1, 0), axis(7, 1, 0))
    assert not goes(axis(7), axis(7, 7, 3))
    assert not goes(axis(7, 2, 4), axis(7))  # output rows that see nothing


@needs_x86
@pytest.mark.parametrize("processor", ["avx2", "avx"])
def test_other_tiles(processor: str) -> None:
    """With 16 registers and half as long vectors, with and without multiply-adds."""
    code = """
        import numpy as np
        import oracle
        from fastconv.cpu import small_planes
        from fastconv.cpu.vector.tile import tile
        from test_small_planes import CASES, _operands, _results, integers
        planned = []
        plan = small_planes.plan_correlation
        small_planes.plan_correlation = lambda *a, **o: planned.append(a) or plan(*a, **o)
        for case in CASES[:3]:
            x, w, b, dy, start = _operands(case, integers, np.random.default_rng(0), np.float32)
            for last in (False, True):
                results = _results(case, (x, w, b, dy, start), last)
                y, dx = results["forward"], results["added"] - (np.moveaxis(start, 1, -1) if last else start)
                if last:
                    y, dx = np.moveaxis(y, -1, 1), np.moveaxis(dx, -1, 1)
                np.testing.assert_array_equal(y, oracle.convolution(x, w, **case.plain_options))
                np.testing.assert_array_equal(dx, oracle.input_grad(w, dy, input_shape=x.shape, **case.plain_options))
        assert planned
        print(tile(32).lanes)
    """
    process = run_on(processor, code, path=[str(Path(__file__).parent)])
    assert int(output_of(process)) == PROCESSORS[processor].lanes(4)


GUARDED = """
    import sys
    import numpy as np
    from guarded import guarded, seen
    from helpers import functions
    from test_small_planes import CASES
    rng, count = np.random.default_rng(0), 0
    for case in CASES:
        f = functions(case.ndim)
        for x, w, b, dy in seen([rng.standard_normal(s).astype(sys.argv[1])
                                 for s in (case.input, case.weight, case.weight[:1], case.output)]):
            for end in (False, True):
                f.conv(x, w, b, out=guarded(dy, end), **case.options)
                f.input_grad(x.shape, w, dy, out=guarded(x, end), **case.options)
                count += 1
    print(count)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by way of Linux' libc")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_read_or_written_outside_the_arrays(dtype: str) -> None:
    process = run_python(GUARDED, dtype, path=[SUPPORT, str(Path(__file__).parent)], timeout=600)
    assert int(output_of(process)) == 12 * len(CASES)
