"""The plain loops: against the reference, against the oracle on every case, and against the engine that they judge."""

from __future__ import annotations

import itertools
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv import reference
from fastconv.arguments import convolution_plan
from fastconv.cpu import loops, softmax_cross_entropy
from helpers import DTYPES, LAYOUTS, VIEWS, channels_first, channels_last, functions, integers, normal, run_python
from helpers import output_of as printed
from shapes import CASES, SMALL, TRANSPOSED
from tolerance import assert_accurate, assert_same_bits, expect

PRECISIONS = ["float32", "float64"]
THREADS = (1, 2, 3, 7)
BY_NAME = {case.name: case for case in CASES}
KINDS = [
    BY_NAME[name]
    for name in (
        "1d_causal", "1x1_stride2", "3x3_same", "dilated_strided", "depthwise", "groups2", "replicate_far",
        "reflect_uneven", "circular_once_around", "3d_strided", "primes",
    )
]  # fmt: skip


def operands(case, make, rng, dtype):
    """x, w, b, dy"""
    return tuple(make(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1], case.output))


def passes(case, algorithm="loops"):
    """The passes as functions of (x, w, b, dy), and the results' shapes."""
    f, options = functions(case.ndim), {**case.options, "algorithm": algorithm}
    return {
        "forward": (lambda x, w, b, dy, **kw: f.conv(x, w, b, **options, **kw), case.output),
        "relu": (lambda x, w, b, dy, **kw: f.conv(x, w, b, **options, activation="relu", **kw), case.output),
        "weight": (lambda x, w, b, dy, **kw: f.weight_grad(x, w.shape, dy, **options, **kw), case.weight),
        "input": (lambda x, w, b, dy, **kw: f.input_grad(x.shape, w, dy, **options, **kw), case.input),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference(case, rng):
    """On whole numbers every order of summation is exact: equal to the reference."""
    x, w, b, dy = operands(case, integers, rng, "float64")
    options = case.plain_options
    y = reference.convolution(x, w, b, **options)
    exact = {
        "forward": y,
        "relu": np.maximum(y, 0),
        "weight": reference.convolution_weight_grad(x, w.shape, dy, **options),
        "input": reference.convolution_input_grad(x.shape, w, dy, **options),
    }
    for dtype in PRECISIONS:
        arrays = [a.astype(dtype) for a in (x, w, b, dy)]
        for name, (run, _) in passes(case).items():
            result = run(*arrays)
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, exact[name], name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, rng):
    """Against the oracle; and on whole numbers every faster method of the direct sum gives what the loops give."""
    plain = case.plain_options
    for dtype in PRECISIONS:
        x, w, b, dy = operands(case, normal, rng, dtype)
        result = {name: run(x, w, b, dy) for name, (run, _) in passes(case).items()}
        expected = {
            "forward": expect(lambda x, w, b: oracle.convolution(x, w, b, **plain), x, w, b),
            "weight": expect(lambda x, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **plain), x, dy),
            "input": expect(lambda w, dy: oracle.input_grad(w, dy, input_shape=case.input, **plain), w, dy),
        }
        for name, exact in expected.items():
            assert_accurate(result[name], exact)
        assert_same_bits(result["relu"], np.maximum(result["forward"], 0))
    arrays = operands(case, integers, rng, "float32")
    for name, (run, _) in passes(case, "direct").items():
        np.testing.assert_array_equal(run(*arrays), passes(case)[name][0](*arrays), name)


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_transposed(case, rng):
    x, w, b = (integers(rng, shape, "float32") for shape in (case.input, case.weight, case.output[1:2]))
    transpose = functions(case.ndim).transpose
    options = {**case.options, "activation": "relu"}
    expected = transpose(x, w, b, **options)
    np.testing.assert_array_equal(transpose(x, w, b, **{**options, "algorithm": "loops"}), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_16_bits(case, dtype, rng):
    """Summed in float32 and rounded once, as with every algorithm."""
    arrays = operands(case, normal, rng, dtype)
    for run, _ in passes(case).values():
        wide = run(*(a.astype(np.float32) for a in arrays))
        assert_same_bits(run(*arrays), wide.astype(DTYPES[dtype]))


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_special_values_stay_local(case, value, rng):
    plain = case.plain_options
    exact = {
        "forward": lambda x, w, b, dy: oracle.convolution(x, w, b, **plain),
        "relu": lambda x, w, b, dy: np.maximum(oracle.convolution(x, w, b, **plain), 0),
        "weight": lambda x, w, b, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **plain),
        "input": lambda x, w, b, dy: oracle.input_grad(w, dy, input_shape=case.input, **plain),
    }
    for (name, operation), spoiled in itertools.product(exact.items(), range(4)):
        arrays = operands(case, integers, rng, "float32")
        arrays[spoiled].flat[rng.integers(arrays[spoiled].size)] = value
        with np.errstate(invalid="ignore"):
            expected = operation(*(a.astype(np.float64) for a in arrays))
        np.testing.assert_array_equal(passes(case)[name][0](*arrays), expected, name)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_empty_batch(dtype):
    x, w, dy = np.ones((0, 4, 5, 5), dtype), np.ones((6, 2, 3, 3), dtype), np.ones((0, 6, 3, 3), dtype)
    options = {"groups": 2, "algorithm": "loops"}
    assert fc.conv2d(x, w, **options).shape == dy.shape
    assert fc.conv2d_input_grad(x.shape, w, dy, **options).shape == x.shape
    start = np.full(w.shape, 3, dtype)
    assert_same_bits(fc.conv2d_weight_grad(x, w.shape, dy, **options), np.zeros_like(w))
    assert (fc.conv2d_weight_grad(x, w.shape, dy, out=start, accumulate=True, **options) == 3).all()


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_views(case, rng):
    """Strided, transposed, reversed, read-only, misaligned, broadcast: the same bits, and inputs left as they were."""
    arrays = operands(case, normal, rng, "float32")
    single = [np.broadcast_to(a.ravel()[:1].reshape((1,) * a.ndim), a.shape) for a in arrays]
    for run, _ in passes(case).values():
        expected = run(*arrays)
        for name, view in VIEWS.items():
            seen = [view(a) for a in arrays]
            assert_same_bits(run(*seen), expected)
            for array, original in zip(seen, arrays, strict=True):
                np.testing.assert_array_equal(array, original, name)
        assert_same_bits(run(*single), run(*(a.copy() for a in single)))


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_out_and_accumulate(case, rng):
    """`out` of any strides is filled, or added to, and nothing beside it is touched."""
    arrays = operands(case, integers, rng, "float32")
    views = [VIEWS[name] for name in ("strided", "transposed", "reversed", "misaligned")]
    for (which, (run, shape)), view in itertools.product(passes(case).items(), views):
        expected, start = run(*arrays), integers(rng, shape, "float32")
        out = view(np.full(shape, np.nan, np.float32))
        assert run(*arrays, out=out) is out
        np.testing.assert_array_equal(out, expected, which)
        if which in ("weight", "input"):
            out[...] = start
            assert run(*arrays, out=out, accumulate=True) is out
            np.testing.assert_array_equal(out, expected + start, which)
        if view is VIEWS["strided"]:
            out[...] = 77
            assert (out.base == 77).all(), "the elements between were written"


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_both_layouts_have_the_same_bits(case, rng):
    x, w, b, dy = operands(case, normal, rng, "float32")
    f, options = functions(case.ndim), {**case.options, "algorithm": "loops"}
    last = {**options, "layout": LAYOUTS[case.ndim][1]}
    xl, dyl = channels_last(x), channels_last(dy)
    assert_same_bits(channels_first(f.conv(xl, w, b, **last)), f.conv(x, w, b, **options))
    assert_same_bits(f.weight_grad(xl, w.shape, dyl, **last), f.weight_grad(x, w.shape, dy, **options))
    assert_same_bits(channels_first(f.input_grad(xl.shape, w, dyl, **last)), f.input_grad(x.shape, w, dy, **options))


def test_a_kernel_by_itself():
    """As the page shows it: arrays in the canonical form, the tables of the geometry."""
    geometry = convolution_plan("test", 2, (1, 2, 4, 4), (3, 2, 3, 3), 1, 1, 1, 1, "zeros", "NCHW").geometry
    x, w = np.ones((1, 2, 1, 4, 4), np.float32), np.ones((3, 2, 1, 3, 3), np.float32)
    y, none = np.empty((1, 3, 1, 4, 4), np.float32), np.empty(0, np.float32)
    loops.forward_kernel[y.dtype](
        x, w, none, False, *geometry.input_coordinates, geometry.stride, geometry.dilation, y
    )
    np.testing.assert_array_equal(y[0, 1, 0], [[8, 12, 12, 8], [12, 18, 18, 12], [12, 18, 18, 12], [8, 12, 12, 8]])


# ---------------------------------------------------------------------------------------------------------------------
# Threads and processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def number_of_threads():
    before = fc.get_num_threads()
    yield
    fc.set_num_threads(before)


@pytest.mark.parametrize("name", ["3x3_same", "groups2", "straddle", "video_3d", "circular_layer"])
def test_any_number_of_threads_and_any_batch(name, rng, number_of_threads):
    case = BY_NAME[name]
    x, w, b, dy = operands(case, normal, rng, "float32")
    for which, (run, _) in passes(case).items():
        fc.set_num_threads(1)
        expected = run(x, w, b, dy)
        for n, _ in itertools.product(THREADS, range(2)):
            fc.set_num_threads(n)
            assert_same_bits(run(x, w, b, dy), expected)
        if which != "weight":
            assert_same_bits(run(x[-1:], w, b, dy[-1:]), expected[-1:])


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_python_threads_and_a_forked_child(layer):
    """Two threads at once, then a child, where a layer may not start a parallel loop again."""
    code = """
        import os, sys, threading
        import numpy as np
        import fastconv as fc

        x, w = np.arange(98.0).reshape(1, 2, 7, 7), np.arange(36.0).reshape(2, 2, 3, 3)
        expected = fc.conv2d(x, w)
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(fc.conv2d(x, w, algorithm="loops"))) for _ in range(4)
        ]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(results) == 4 and all((y == expected).all() for y in results)
        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:
                os._exit(0 if (fc.conv2d(x, w, algorithm="loops") == expected).all() else 3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("done")
    """
    environment = {} if layer == "default" else {"NUMBA_THREADING_LAYER": layer}
    assert printed(run_python(code, NUMBA_NUM_THREADS="3", **environment)).splitlines()[-1] == "done"


# ---------------------------------------------------------------------------------------------------------------------
# Softmax cross-entropy
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = [(5, 1), (7, 3), (40, 65), (1, 1000), (2, 5, 7), (2, 3, 4, 5), (2, 3, 2, 2, 3), (1100, 2)]


def problem(rng, shape, dtype, kind):
    """Logits, target and class weights."""
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    target = rng.random(shape).astype(dtype)
    if kind == "labels":
        target = np.asarray(rng.integers(0, shape[1], (shape[0], *shape[2:])))
        target[rng.random(target.shape) < 0.3] = -100
    return logits, target, (0.1 + rng.random(shape[1])).astype(dtype)


def run_cross_entropy(module, logits, target, weight, grad_output, reduction, smoothing, z_loss, softcap, view=None):
    """(loss, grad, lse) of the plain loops or of the engine, filled into arrays that are seen through `view`."""
    view = view or (lambda a: a)
    positions = (logits.shape[0], *logits.shape[2:])
    loss = np.full(positions if reduction == "none" else (), 7, logits.dtype)
    loss = view(loss) if loss.ndim else loss
    grad, lse = view(np.full(logits.shape, 7, logits.dtype)), view(np.full(positions, 7, logits.dtype))
    wrong = module.cross_entropy(
        logits, target, weight, grad_output, -100, reduction, smoothing, z_loss, softcap, loss, grad, lse
    )
    assert wrong is None
    return loss, grad, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_cross_entropy(shape, dtype, kind, rng):
    """Every option, against the reference and against the engine."""
    logits, target, class_weight = problem(rng, shape, dtype, kind)
    eps = float(np.finfo(dtype).eps)
    each = rng.standard_normal((shape[0], *shape[2:])).astype(dtype)
    for reduction, weight, smoothing, (z_loss, softcap) in itertools.product(
        ("none", "mean", "sum"), (None, class_weight), (0.0, 0.1), ((0.0, 0.0), (0.01, 0.0), (0.3, 4.0))
    ):
        grad_output = {"none": each, "mean": 2.0, "sum": None}[reduction]
        arguments = logits, target, weight, grad_output, reduction, smoothing, z_loss, softcap
        loss, grad, lse = run_cross_entropy(loops, *arguments)
        exact_loss, exact_grad = reference.softmax_cross_entropy(
            logits, target, weight, 1.0 if grad_output is None else grad_output, reduction=reduction,
            label_smoothing=smoothing, z_loss=z_loss, logit_softcap=softcap or None,
        )  # fmt: skip
        total = 1.0 if kind == "labels" else float(target.sum(axis=1).max())
        terms = each.size if reduction == "sum" else 1
        np.testing.assert_allclose(loss, exact_loss, rtol=32 * eps, atol=64 * eps * total * terms)
        np.testing.assert_allclose(grad, exact_grad, rtol=32 * eps, atol=64 * eps * total * np.abs(exact_grad).max())
        for ours, engine in zip((loss, grad, lse), run_cross_entropy(softmax_cross_entropy, *arguments), strict=True):
            scale = max(1.0, np.abs(engine).max())
            np.testing.assert_allclose(ours, engine, rtol=32 * eps, atol=64 * eps * total * scale)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_of_views(kind, reduction, rng):
    """Any strides in and out, and the gradient over the logits, have the same bits."""
    logits, target, weight = problem(rng, (4, 5, 3), "float32", kind)
    rest = (None, reduction, 0.1, 0.01, 4.0)
    expected = run_cross_entropy(loops, logits, target, weight, *rest)
    for name, view in VIEWS.items():
        filled = view if name in ("strided", "transposed", "reversed") else None
        result = run_cross_entropy(loops, view(logits), view(target), view(weight), *rest, view=filled)
        for actual, same in zip(result, expected, strict=True):
            assert_same_bits(actual, same)
    loops.cross_entropy(logits, target, weight, None, -100, reduction, 0.1, 0.01, 4.0, None, logits, None)
    assert_same_bits(logits, expected[1])


def test_cross_entropy_on_any_number_of_threads(rng, number_of_threads):
    logits, target, weight = problem(rng, (2100, 3), "float32", "labels")
    fc.set_num_threads(1)
    expected = run_cross_entropy(loops, logits, target, weight, None, "mean", 0.1, 0.0, 0.0)
    for n in THREADS:
        fc.set_num_threads(n)
        result = run_cross_entropy(loops, logits, target, weight, None, "mean", 0.1, 0.0, 0.0)
        for actual, same in zip(result, expected, strict=True):
            assert_same_bits(actual, same)


def test_cross_entropy_at_the_edge():
    """Logits of -inf have probability 0; a nan, and a row of -inf, spoil their row alone; an ignored row is 0."""
    inf, nan = np.inf, np.nan
    logits = np.array([[0, -inf, 0], [nan, 1, 2], [-inf, -inf, -inf], [1e38, -1e38, 0], [nan, nan, nan]], np.float32)
    target = np.array([0, 1, 2, 0, -100])
    loss, grad, _ = run_cross_entropy(loops, logits, target, None, None, "none", 0.0, 0.0, 0.0)
    np.testing.assert_allclose(loss, [np.log(2), nan, nan, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(
        grad, [[-0.5, 0, 0.5], [nan] * 3, [nan] * 3, [0, 0, 0], [0, 0, 0]], rtol=1e-6, atol=1e-7
    )
    for ignored, expected in (("mean", nan), ("sum", 0)):
        result = run_cross_entropy(loops, logits, np.full(5, -100), None, None, ignored, 0.0, 0.0, 0.0)
        np.testing.assert_array_equal(result[0], np.float32(expected))
        assert not result[1].any()


def test_a_label_out_of_range_is_told_and_nothing_is_written():
    logits, loss, grad = np.zeros((2, 3, 2)), np.full((2, 2), 7.0), np.full((2, 3, 2), 7.0)
    target = np.array([[0, -100], [2, 3]], np.int16)
    arguments = (target, None, None, -100, "none", 0.0, 0.0, 0.0, loss, grad, None)
    assert loops.cross_entropy(logits, *arguments, 10) == (13, 3)
    assert (loss == 7).all()
    assert (grad == 7).all()


def test_more_position_axes_than_the_loops_have():
    z = np.zeros((2, 2, 2, 2, 3, 2))
    with pytest.raises(ValueError, match="at most 3 position axes"):
        loops.softmax(z, False, z.copy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax(shape, dtype, log, rng):
    logits, _, _ = problem(rng, shape, dtype, "labels")
    eps = float(np.finfo(dtype).eps)
    out, engine = np.full(shape, 7, dtype), np.full(shape, 7, dtype)
    loops.softmax(logits, log, out)
    softmax_cross_entropy.softmax(logits, log, engine)
    exact = np.apply_along_axis(reference.log_softmax if log else reference.softmax, 1, logits)
    np.testing.assert_allclose(out, exact, rtol=32 * eps, atol=8 * eps)
    np.testing.assert_allclose(out, engine, rtol=32 * eps, atol=8 * eps)


# ---------------------------------------------------------------------------------------------------------------------
# The page that shows them
# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
LADDER = (ROOT / "docs" / "ladder.md").read_text()
QUOTED = re.findall(r"^```python (\S+)\n(.*?)^```", LADDER, re.MULTILINE | re.DOTALL)


def test_the_page_quotes_every_rung():
    assert [path for path, _ in QUOTED] == [
        "fastconv/reference.py", "fastconv/cpu/loops.py", "cuda_kernels/convolution.py",
    ]  # fmt: skip
    assert LADDER.count("```") == 2 * len(QUOTED), "a block that names no file"


@pytest.mark.parametrize(("path", "code"), QUOTED, ids=[path for path, _ in QUOTED])
def test_the_page_quotes_what_the_files_have(path, code):
    """Whole lines that follow each other, but for the indentation of all of them."""
    lines, quoted = (ROOT / path).read_text().splitlines(), textwrap.dedent(code).splitlines()
    runs = (lines[i : i + len(quoted)] for i in range(len(lines)))
    assert any(textwrap.dedent("\n".join(run)).splitlines() == quoted for run in runs)


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", LADDER)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
