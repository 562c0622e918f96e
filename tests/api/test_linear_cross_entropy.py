"""Linear cross-entropy against the loops of `fastconv.reference`, torch and the unfused path; its own promises."""

from __future__ import annotations

import itertools
import os
import warnings

import numpy as np
import pytest

import fastconv as fc
from fastconv import linear_loss, reference
from fastconv.cpu import linear_cross_entropy as on_cpu
from fastconv.cuda_kernels import linear_cross_entropy as on_cuda
from helpers import DTYPES, VIEWS, output_of, run_python
from tolerance import assert_same_bits

NAMES = ("loss", "hidden", "weight", "bias")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 5 rows, blocks of 7 and 4 classes: several of each, of unequal sizes, in problems a test can afford."""
    monkeypatch.setattr(linear_loss, "VECTOR", 1)
    for floor in (on_cpu, on_cuda):
        monkeypatch.setattr(floor, "chunk_sizes", lambda classes, features, dtype: (5, 7, 4))


def problem(rng, rows=13, features=6, classes=17, dtype="float64", kind="index", ignored=False):
    """(hidden, weight, target, bias, class weights) of random numbers."""
    dtype = DTYPES[dtype]
    hidden = rng.standard_normal((rows, features)).astype(dtype)
    weight = rng.standard_normal((classes, features)).astype(dtype)
    bias = rng.standard_normal(classes).astype(dtype)
    if kind == "index":
        target = rng.integers(0, classes, rows)
        if ignored:
            target[::3] = -100
    else:
        target = rng.random((rows, classes)).astype(dtype)
    return hidden, weight, target, bias, (0.1 + rng.random(classes)).astype(dtype)


def assert_close(actual, exact, rtol=1e-12, term=0.0):
    """Within `rtol` of the largest element, and of the largest term that an element is the sum of."""
    actual, exact = np.asarray(actual).astype(np.float64), np.asarray(exact)
    assert actual.shape == exact.shape
    np.testing.assert_allclose(actual, exact, rtol=0, atol=rtol * (np.abs(exact).max(initial=0) + term))


def unfused(hidden, weight, target, bias, class_weight, **options):
    """The same with the logits stored, in float64 by NumPy and `softmax_cross_entropy_with_grad`."""
    x, w = hidden.astype(np.float64), weight.astype(np.float64)
    t = target if target.dtype.kind in "iu" else target.astype(np.float64)
    z = x @ w.T + (0 if bias is None else bias.astype(np.float64))
    cw = None if class_weight is None else class_weight.astype(np.float64)
    loss, g, lse = fc.softmax_cross_entropy_with_grad(z, t, cw, return_lse=True, **options)
    return loss, g @ w, g.T @ x, g.sum(axis=0), lse


# ---------------------------------------------------------------------------------------------------------------------
# Against the reference, torch and the unfused path
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reference(rng, backend, kind, reduction):
    x, w, t, b, cw = problem(rng, 7, 3, 9, kind=kind, ignored=True)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 3.0}
    exact = reference.linear_cross_entropy(x, w, t, b, cw, **options)
    actual = fc.linear_cross_entropy_with_grad(x, w, t, b, class_weight=cw, backend=backend, **options)
    for name, result, expected in zip(NAMES, actual, exact, strict=True):
        assert result.dtype == np.float64, name
        assert_close(result, expected)
    loss = fc.linear_cross_entropy(x, w, t, b, class_weight=cw, backend=backend, **options)
    assert_same_bits(loss, actual.loss)


OPTIONS = [
    dict(zip(("kind", "reduction", "weighted", "biased", "label_smoothing"), values, strict=True))
    for values in itertools.product(
        ("index", "probability"), ("none", "mean", "sum"), (False, True), (False, True), (0.0, 0.3)
    )
]
OPTIONS += [options | {"ignore_index": i} for options in OPTIONS if options["kind"] == "index" for i in (-100, 3)]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_options_are_those_of_torch(rng, options):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    options = dict(options)
    kind, weighted, biased = options.pop("kind"), options.pop("weighted"), options.pop("biased")
    x, w, t, b, cw = problem(rng, kind=kind)
    if "ignore_index" in options:
        t[::4] = options["ignore_index"]
    b, cw = b if biased else None, cw if weighted else None
    tx, tw, tb = (None if a is None else torch.from_numpy(a).requires_grad_() for a in (x, w, b))
    expected = torch.nn.functional.linear_cross_entropy(
        tx, tw, torch.from_numpy(t), linear_bias=tb, weight=None if cw is None else torch.from_numpy(cw), **options
    )
    expected.sum().backward()
    actual = fc.linear_cross_entropy_with_grad(x, w, t, b, class_weight=cw, **options)
    assert_close(actual.loss, expected.detach().numpy())
    assert_close(actual.hidden, tx.grad.numpy())
    assert_close(actual.weight, tw.grad.numpy())
    if biased:
        assert_close(actual.bias, tb.grad.numpy())
    else:
        assert actual.bias is None


SHAPES = {
    "one row": (1, 5, 40),
    "one class": (6, 5, 1),
    "one feature": (9, 1, 8),
    "one of each": (1, 1, 1),
    "fewer rows than a panel": (19, 33, 70),
    "a chunk and one row": (129, 64, 3000),
    "primes": (211, 97, 1009),
    "several chunks and blocks": (300, 700, 12_000),
    "few classes": (5000, 20, 3),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_unfused(rng, shape, dtype):
    """With the chunks of a real call."""
    x, w, t, b, cw = problem(rng, *shape, dtype=dtype, ignored=shape[0] > 3)
    w *= w.dtype.type(shape[1] ** -0.5)
    options = {"z_loss": 1e-3, "label_smoothing": 0.05}
    *exact, exact_lse = unfused(x, w, t, b, cw, **options)
    *actual, lse = fc.linear_cross_entropy_with_grad(x, w, t, b, class_weight=cw, return_lse=True, **options)
    coefficient = cw.max() / cw[t[t >= 0]].sum()  # the p and the y of p - y, which may cancel
    terms = (0, coefficient * np.abs(w).max(), coefficient * np.abs(x).max(), coefficient, 0)
    eps = (64 + len(x) ** 0.5) * np.finfo(DTYPES[dtype]).eps
    for result, expected, term in zip((*actual, lse), (*exact, exact_lse), terms, strict=True):
        assert result.dtype == DTYPES[dtype]
        assert_close(result, expected, rtol=eps, term=term)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_short_floats_are_rounded_once(rng, backend, dtype, kind, reduction):
    """However many chunks the gradient of the weight is summed over."""
    x, w, t, b, cw = problem(rng, dtype=dtype, kind=kind, ignored=True)
    *exact, exact_lse = unfused(x, w, t, b, cw, reduction=reduction)
    *actual, lse = fc.linear_cross_entropy_with_grad(
        x, w, t, b, class_weight=cw, reduction=reduction, return_lse=True, backend=backend
    )
    half_ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    for result, expected in zip((*actual, lse), (*exact, exact_lse), strict=True):
        assert result.dtype == DTYPES[dtype]
        error = np.abs(result.astype(np.float64) - expected)
        allowed = 1.001 * half_ulp * np.abs(expected) + 64 * 2.0**-24 * np.abs(expected).max() + 2.0**-24
        assert (error <= allowed).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_any_leading_axes(rng, backend, lead, kind):
    rows = int(np.prod(lead))
    x, w, t, b, _ = problem(rng, rows, 5, 6, kind=kind)
    flat = fc.linear_cross_entropy_with_grad(x, w, t, b, reduction="none", return_lse=True)
    shaped = fc.linear_cross_entropy_with_grad(
        x.reshape(*lead, 5), w, t.reshape(lead if kind == "index" else (*lead, 6)), b, reduction="none",
        return_lse=True, backend=backend,
    )  # fmt: skip
    for result, expected, shape in zip(shaped, flat, (lead, (*lead, 5), w.shape, b.shape, lead), strict=True):
        assert result.shape == shape
        assert_close(result.reshape(expected.shape), expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(rng, backend, view):
    x, w, t, b, cw = problem(rng, kind="probability")
    options = {"reduction": "none", "backend": backend}
    expected = fc.linear_cross_entropy_with_grad(x, w, t, b, class_weight=cw, **options)
    x, w, t, b, cw = map(VIEWS[view], (x, w, t, b, cw))
    out = VIEWS["strided"](np.zeros(len(x)))
    actual = fc.linear_cross_entropy_with_grad(x, w, t, b, class_weight=cw, out=out, **options)
    assert actual.loss is out
    for result, wanted in zip(actual, expected, strict=True):
        assert_close(result, wanted)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_type(rng, dtype):
    x, w, t, b, _ = problem(rng)
    expected = fc.linear_cross_entropy_with_grad(x, w, t, b)
    for result, wanted in zip(fc.linear_cross_entropy_with_grad(x, w, t.astype(dtype), b), expected, strict=True):
        assert_same_bits(result, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Its own promises
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def number_of_threads():
    before = fc.get_num_threads()
    yield
    fc.set_num_threads(before)


@pytest.mark.usefixtures("number_of_threads")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(300, 300, 6000), (2000, 64, 10)], ids=str)
def test_same_bits_for_any_number_of_threads(rng, shape, dtype):
    x, w, t, b, _ = problem(rng, *shape, dtype=dtype, ignored=True)
    fc.set_num_threads(1)
    expected = fc.linear_cross_entropy_with_grad(x, w, t, b, label_smoothing=0.1)
    for threads in (2, 3, 7):
        fc.set_num_threads(threads)
        for result, wanted in zip(
            fc.linear_cross_entropy_with_grad(x, w, t, b, label_smoothing=0.1), expected, strict=True
        ):
            assert_same_bits(result, wanted)


@pytest.mark.parametrize("classes", [1, 3, 70, 5000])
def test_a_row_has_the_same_bits_whatever_its_batch(rng, classes):
    x, w, t, b, _ = problem(rng, 700, 40, classes, dtype="float32")
    whole = fc.linear_cross_entropy_with_grad(x, w, t, b, reduction="none", needs="hidden")
    for first, end in ((0, 1), (5, 7), (100, 433), (699, 700)):
        part = fc.linear_cross_entropy_with_grad(
            x[first:end], w, t[first:end], b, reduction="none", needs="hidden"
        )
        assert_same_bits(part.loss, whole.loss[first:end])
        assert_same_bits(part.hidden, whole.hidden[first:end])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows_are_exactly_zero(rng, backend, reduction):
    x, w, t, b, cw = problem(rng)
    ignored = rng.random(len(t)) < 0.5
    t[ignored] = 2
    options = {"class_weight": cw, "ignore_index": 2, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1}
    ignored = t == 2
    assert 0 < ignored.sum() < len(t)
    result = fc.linear_cross_entropy_with_grad(x, w, t, b, backend=backend, **options)
    assert_same_bits(result.hidden[ignored], np.zeros((ignored.sum(), x.shape[1])))
    kept = fc.linear_cross_entropy_with_grad(x[~ignored], w, t[~ignored], b, **options)
    assert_close(result.weight, kept.weight)
    assert_close(result.bias, kept.bias)
    assert_close(result.hidden[~ignored], kept.hidden)


@pytest.mark.parametrize("needs", [(), "weight", ("hidden",), ["bias", "weight"]], ids=str)
def test_only_what_is_asked_for(rng, backend, needs):
    x, w, t, b, _ = problem(rng)
    everything = fc.linear_cross_entropy_with_grad(x, w, t, b, backend=backend)
    result = fc.linear_cross_entropy_with_grad(x, w, t, b, needs=needs, backend=backend)
    assert_same_bits(result.loss, everything.loss)
    for name in NAMES[1:]:
        if name in needs:
            assert_same_bits(getattr(result, name), getattr(everything, name))
        else:
            assert getattr(result, name) is None


def test_the_loss_alone_computes_no_gradient(rng, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a gradient was computed")

    for product in ("hidden_grad", "weight_grad", "bias_grad"):
        monkeypatch.setattr(linear_loss._Chunks, product, refuse)
    x, w, t, b, _ = problem(rng)
    fc.linear_cross_entropy(x, w, t, b)
    with pytest.raises(AssertionError, match="a gradient was computed"):
        fc.linear_cross_entropy_with_grad(x, w, t, b)


def test_results(rng):
    x, w, t, b, _ = problem(rng)
    result = fc.linear_cross_entropy_with_grad(x, w, t, b)
    assert isinstance(result, fc.LinearCrossEntropyGrads)
    assert result.loss.shape == ()
    loss, lse = fc.linear_cross_entropy(x, w, t, b, return_lse=True)
    assert_same_bits(loss, result.loss)
    assert_close(lse, np.log(np.exp(x @ w.T + b).sum(axis=1)))
    *same, lse_too = fc.linear_cross_entropy_with_grad(x, w, t, b, return_lse=True)
    assert_same_bits(lse_too, lse)
    assert [assert_same_bits(a, e) for a, e in zip(same, result, strict=True)] == [None] * 4


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize(("reduction", "value"), [("mean", np.nan), ("sum", 0.0), ("none", None)])
def test_no_rows(rng, backend, kind, reduction, value):
    x, w, t, b, _ = problem(rng, rows=0, kind=kind)
    result = fc.linear_cross_entropy_with_grad(x, w, t, b, reduction=reduction, backend=backend)
    if value is None:
        assert result.loss.shape == (0,)
    else:
        np.testing.assert_array_equal(result.loss, value)
    assert result.hidden.shape == x.shape
    assert_same_bits(result.weight, np.zeros_like(w))
    assert_same_bits(result.bias, np.zeros_like(b))


def test_every_row_ignored(rng, backend):
    x, w, t, b, _ = problem(rng)
    result = fc.linear_cross_entropy_with_grad(x, w, np.full_like(t, -100), b, backend=backend)
    assert np.isnan(result.loss)
    for gradient in result[1:]:
        np.testing.assert_array_equal(gradient, 0)


def test_a_nan_stays_in_its_row(rng):
    """And in the gradients that sum over rows; it takes the fast way (an infinite weight in a padded one does not)."""
    x, w, t, b, _ = problem(rng, 40, 8, 30)
    clean = fc.linear_cross_entropy_with_grad(x, w, t, b, reduction="none")
    x[7, 2] = np.nan
    result = fc.linear_cross_entropy_with_grad(x, w, t, b, reduction="none")
    others = np.arange(len(x)) != 7
    assert np.isnan(result.loss[7])
    assert np.isnan(result.hidden[7]).all()
    assert np.isnan(result.weight).all()
    assert_same_bits(result.loss[others], clean.loss[others])
    assert_same_bits(result.hidden[others], clean.hidden[others])


def test_memory():
    """Beyond inputs and results less than a tenth of the logits: what the process holds at the most, in its own run."""
    code = """
        import sys
        import numpy as np
        import fastconv as fc

        def status(field):
            line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
            return int(line.split()[1]) * 1024

        fc.set_num_threads(2)
        rows, features, classes = 2048, 64, 32000
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((rows, features), dtype=np.float32)
        weight = rng.standard_normal((classes, features), dtype=np.float32)
        target = rng.integers(classes, size=rows)
        for function in (fc.linear_cross_entropy, fc.linear_cross_entropy_with_grad):
            function(hidden, weight[:2000], target % 2000)  # compiled, on two threads, for classes side by side
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak begins anew
            before = status("VmRSS")
            result = function(hidden, weight, target)
            results = sum(a.nbytes for a in result if a is not None) if isinstance(result, tuple) else 0
            print((status("VmHWM") - before - results) / (rows * classes * 4))
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process' memory can be reset on Linux only")
    parts = [float(line) for line in output_of(run_python(code, timeout=300)).split()]
    assert len(parts) == 2
    assert max(parts) < 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 200), (200, 1), (3, 70), (16, 16), (17, 130), (31, 64), (144, 1024), (5, 63), (8, 1000)]
)
def test_columns(rng, shape, dtype):
    rows = rng.standard_normal(shape).astype(dtype)
    columns = on_cpu.columns(rows)
    assert columns.flags.c_contiguous
    assert_same_bits(columns, rows.T)


@pytest.mark.parametrize("floor", [on_cpu, on_cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "features"), [(1, 1), (32_000, 1024), (128_256, 4096), (10, 500_000)])
def test_chunk_sizes(floor, dtype, classes, features):
    rows, block, grad_block = floor.chunk_sizes(classes, features, DTYPES[dtype])
    assert floor.LEAST_ROWS <= rows <= floor.MOST_ROWS
    assert min(block, grad_block) >= 1
    itemsize = max(4, DTYPES[dtype].itemsize)
    assert rows == floor.LEAST_ROWS or rows * max(classes, features) * itemsize <= floor.CHUNK_BYTES
    assert block == 1 or block * features * itemsize <= floor.BLOCK_BYTES


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize(("total", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (23, 8), (10, 4), (129, 127), (3, 1)])
def test_parts_are_even(total, most, unit):
    parts = list(linear_loss._even(total, most, unit))
    assert [i for first, end in parts for i in range(first, end)] == list(range(total))
    assert all(first % unit == 0 for first, _ in parts)
    lengths = [-(-(end - first) // unit) for first, end in parts]
    assert sum(lengths) == -(-total // unit)
    assert max(lengths, default=0) <= max(1, most // unit)
    assert not parts or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("kind", [int, np.uint8, np.int64])
def test_an_integer_is_the_label_of_one_row(rng, backend, kind):
    hidden, weight = rng.standard_normal(3), rng.standard_normal((5, 3))
    for label in (1, 4):
        options = {"ignore_index": 4, "reduction": "sum", "backend": backend}
        loss = fc.linear_cross_entropy(hidden, weight, kind(label), **options)
        results = fc.linear_cross_entropy_with_grad(hidden, weight, kind(label), **options)
        expected = fc.linear_cross_entropy_with_grad(hidden, weight, np.array(label), **options)
        assert_same_bits(loss, expected.loss)
        for a, b in zip(results[:3], expected[:3], strict=True):
            assert_same_bits(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, TARGET = np.zeros((4, 3)), np.zeros((5, 3)), np.zeros(4, int)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_with_grad"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": np.zeros((5, 2))}, ValueError, r"hidden has 3 features, but weight has shape \(5, 2\)"),
        ({"weight": np.zeros((5, 3, 1))}, ValueError, r"weight has shape \(5, 3, 1\) \(expected \(C, H\)"),
        ({"weight": np.zeros((0, 3))}, ValueError, r"weight has shape \(0, 3\)"),
        ({"hidden": np.zeros((4, 0)), "weight": np.zeros((5, 0))}, ValueError, r"weight has shape \(5, 0\)"),
        ({"hidden": np.zeros(())}, ValueError, r"hidden has shape \(\)"),
        ({"weight": WEIGHT.astype(np.float32)}, TypeError, "weight is float32, but hidden is float64"),
        ({"bias": np.zeros(3)}, ValueError, r"bias has shape \(3,\) \(expected \(5,\) one per class\)"),
        ({"class_weight": np.zeros(3)}, ValueError, r"class_weight has shape \(3,\) \(expected \(5,\)"),
        ({"class_weight": np.zeros(5, np.float32)}, TypeError, "class_weight is float32, but hidden is float64"),
        ({"target": np.zeros(3, int)}, ValueError,
         r"target holds class indices of shape \(3,\), but hidden has shape \(4, 3\) \(expected \(4,\)"),
        ({"target": np.zeros((4, 4))}, ValueError, r"target holds probabilities of shape \(4, 4\) \(expected \(4, 5\)"),
        ({"target": np.zeros((4, 5), np.float32)}, TypeError, "target is float32, but hidden is float64"),
        ({"target": np.zeros(4, bool)}, TypeError, "target has dtype bool .* of the type of hidden, float64"),
        ({"target": np.zeros((4, 5)), "ignore_index": 1}, ValueError, "ignore_index is 1, but target holds prob"),
        ({"target": np.array([0, 1, 5, 9])}, ValueError, r"target\[2\] is 5, but weight has C=5 classes"),
        ({"target": np.array([0, -1, 0, 0])}, ValueError, r"target\[1\] is -1"),
        ({"target": 1}, ValueError, r"target holds .* of shape \(\), but hidden has shape \(4, 3\) \(expected \(4,\)"),
        ({"hidden": np.zeros(3), "target": True}, TypeError, "target is a bool"),
        ({"hidden": np.zeros(3), "target": 5}, ValueError, "target is 5, but weight has C=5 classes"),
        ({"hidden": np.zeros(3), "target": 2**70}, ValueError, r"target is \d+ \(expected a 64-bit integer\)"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing is 2"),
        ({"z_loss": -1}, ValueError, "z_loss is -1"),
        ({"logit_softcap": 0}, ValueError, "logit_softcap is 0"),
        ({"return_lse": "yes"}, TypeError, "return_lse is a str"),
        ({"check": 1}, TypeError, "check is a int"),
        ({"hidden": [[1.0, 2.0, 3.0]]}, TypeError, "hidden is a list"),
        ({"out": np.zeros(1)}, ValueError, r"out has shape \(1,\) \(expected \(\)\)"),
        ({"out": np.zeros((), np.float32)}, TypeError, "out is float32"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
    ],
)
def test_errors_name_the_argument(name, change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(fc, name)(**arguments)


def test_float16_beyond_its_range_is_infinite():
    """As in torch, and with no warning of a conversion that the caller did not ask for."""
    hidden, weight = np.full((4, 2), 200, np.float16), np.array([[100, 0], [-100, 0]], np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = fc.linear_cross_entropy_with_grad(hidden, weight, np.ones(4, int), reduction="sum")
    assert np.isinf(results.loss)


def test_errors_of_needs():
    with pytest.raises(ValueError, match=r"needs is 'input'.*'hidden', 'weight', 'bias'"):
        fc.linear_cross_entropy_with_grad(HIDDEN, WEIGHT, TARGET, needs="input")
    with pytest.raises(TypeError, match="needs is a int"):
        fc.linear_cross_entropy_with_grad(HIDDEN, WEIGHT, TARGET, needs=3)


def test_a_bad_label_is_found_before_anything_is_written(backend):
    out = np.full((), 77.0)
    labels = np.array([[0, 1], [2, -3]])
    with pytest.raises(ValueError, match=r"target\[1, 1\] is -3, but weight has C=5 classes"):
        fc.linear_cross_entropy(HIDDEN.reshape(2, 2, 3), WEIGHT, labels, out=out, backend=backend)
    assert out == 77


def test_out_must_be_apart():
    hidden = np.zeros((4, 3))
    with pytest.raises(ValueError, match="out overlaps hidden"):
        fc.linear_cross_entropy(hidden, WEIGHT, TARGET, out=hidden[:, 0], reduction="none")
