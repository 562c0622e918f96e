"""Softmax cross-entropy against the plain loops of `fastconv.reference`, against torch, and its own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastconv as fc
from fastconv import reference
from helpers import DTYPES, VIEWS, normal
from tolerance import assert_same_bits

# Shapes and what each is there for. Groups of vectors have 64 lanes, pieces 2048 elements, 1 MiB of exponentials is
# kept; the simulator runs the small ones.
SHAPES = {
    "one class": (3, 1),
    "two classes": (5, 2),
    "few classes, one tile by position": (32, 10),
    "few classes, several tiles": (1100, 10),
    "last count by position": (7, 63),
    "first count by class": (7, 64),
    "tail of a tile by class": (3, 65),
    "image net": (2, 1000),
    "several pieces": (2, 9001),
    "many pieces": (2, 70_001),
    "more exponentials than are kept": (1, 270_001),
    "no batch": (11,),
    "one sample": (1, 130),
    "middle axis": (2, 5, 7),
    "segmentation": (2, 3, 9, 11),
    "volume": (2, 3, 2, 3, 5),
    "middle axis, runs shorter than a tile": (3, 100, 49),
    "middle axis, two units": (2, 1100, 70),
    "middle axis, more exponentials than are kept": (1, 5000, 3),
}
ON_SIMULATOR = 500  # elements: the kernels there have one thread for each position, and one loop over its classes


def cases(*names):
    return pytest.mark.parametrize("shape", [SHAPES[name] for name in names] or list(SHAPES.values()), ids=str)


@pytest.fixture(autouse=True)
def _small_on_the_simulator(request):
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if values.get("backend") == "cuda" and np.prod(values.get("shape", (1,))) > ON_SIMULATOR:
        pytest.skip(f"more than {ON_SIMULATOR} elements take long in the simulator")


def positions_of(shape):
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def problem(rng, shape, dtype="float64", kind="index", weighted=False, ignored=False):
    """(logits, target, weight) of random numbers."""
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = (3 * rng.standard_normal(shape)).astype(DTYPES[dtype])
    if kind == "index":
        target = np.asarray(rng.integers(0, classes, positions_of(shape)))
        if ignored:
            target = np.where(rng.random(target.shape) < 0.3, -100, target)
    else:
        target = rng.random(shape).astype(DTYPES[dtype])
    weight = (0.1 + rng.random(classes)).astype(DTYPES[dtype]) if weighted else None
    return logits, target, weight


def expected(logits, target, weight=None, grad_output=1.0, **options):
    """The reference on the user's shapes."""
    if logits.ndim == 1:
        loss, gradient = reference.softmax_cross_entropy(
            logits[None], np.asarray(target)[None], weight, grad_output, **options
        )
        return (loss[0] if options.get("reduction") == "none" else loss), gradient[0]
    return reference.softmax_cross_entropy(logits, target, weight, grad_output, **options)


def assert_close(actual, exact, dtype, scale=1.0):
    """Within 16 roundings of the precision computed in, relative to the value plus the terms it is made of."""
    dtype = DTYPES[dtype]
    actual = np.asarray(actual)
    assert actual.dtype == dtype
    assert actual.shape == exact.shape
    eps = np.finfo(np.float64 if dtype.itemsize == 8 else np.float32).eps
    allowed = 16 * eps * (np.abs(exact) + scale)
    if dtype.itemsize == 2:  # and one rounding to the short format
        allowed = allowed + np.abs(exact) * (2.0**-8 if dtype.name == "bfloat16" else 2.0**-11) + 2.0**-24
    error = np.abs(actual.astype(np.float64) - exact)
    assert (error <= allowed).all(), f"error {error.max():.3g} at {np.unravel_index(error.argmax(), error.shape)}"


def scale_of(target, reduction, weight, exact_loss_scale=1.0):
    """The largest coefficient of a gradient: what p and y are multiplied with."""
    heaviest = 1.0 if weight is None else float(weight.max())
    return heaviest * exact_loss_scale


# ---------------------------------------------------------------------------------------------------------------------
# Against the reference
# ---------------------------------------------------------------------------------------------------------------------


@cases()
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_reference(rng, backend, shape, dtype, kind):
    logits, target, weight = problem(rng, shape, dtype, kind, weighted=True)
    options = {"reduction": "none", "label_smoothing": 0.1}
    exact_loss, exact_gradient = expected(logits, target, weight, **options)
    mass = 1.0 if kind == "index" else float(target.sum(axis=0 if logits.ndim == 1 else 1).max())
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, weight, backend=backend, **options)
    assert_close(loss, np.asarray(exact_loss), dtype, scale=8 * mass)
    assert_close(gradient, exact_gradient, dtype, scale=mass)
    assert_same_bits(fc.softmax_cross_entropy(logits, target, weight, backend=backend, **options), loss)
    assert_same_bits(fc.softmax_cross_entropy_grad(logits, target, weight, backend=backend, **options), gradient)


@cases("few classes, one tile by position", "tail of a tile by class", "middle axis", "segmentation", "no batch")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_dtypes(rng, backend, shape, dtype, reduction):
    logits, target, _ = problem(rng, shape, dtype)
    exact_loss, exact_gradient = expected(logits, target, reduction=reduction)
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, reduction=reduction, backend=backend)
    assert_close(loss, np.asarray(exact_loss), dtype, scale=1.0 if reduction != "sum" else 10.0 * target.size)
    assert_close(gradient, exact_gradient, dtype)


@cases("few classes, one tile by position", "tail of a tile by class", "middle axis", "segmentation", "several pieces")
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{"z_loss": 0.01}, {"logit_softcap": 2.5}, {"z_loss": 0.3, "logit_softcap": 30}])
def test_extras(rng, backend, shape, kind, reduction, options):
    logits, target, weight = problem(rng, shape, "float64", kind, weighted=True, ignored=True)
    options = options | {"reduction": reduction, "label_smoothing": 0.2}
    exact_loss, exact_gradient = expected(logits, target, weight, **options)
    loss, gradient, lse = fc.softmax_cross_entropy_with_grad(
        logits, target, weight, return_lse=True, backend=backend, **options
    )
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-12)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-11, atol=1e-11 * np.abs(exact_gradient).max())
    cap = options.get("logit_softcap")
    capped = logits if cap is None else cap * np.tanh(logits / cap)
    exact_lse = np.apply_along_axis(reference.log_sum_exp, 1, capped)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-13, atol=1e-14)  # m + log(sum) may cancel


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_finite_differences(rng, backend, kind, reduction):
    logits, target, weight = problem(rng, (3, 4, 2), "float64", kind, weighted=True)
    options = {
        "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.05, "logit_softcap": 4.0, "backend": backend
    }  # fmt: skip
    gradient = fc.softmax_cross_entropy_grad(logits, target, weight, **options)
    step = 1e-5
    for at in np.ndindex(logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[at] += sign * step
            ends.append(float(fc.softmax_cross_entropy(moved, target, weight, **options)))
        assert abs((ends[0] - ends[1]) / (2 * step) - gradient[at]) < 1e-8


# ---------------------------------------------------------------------------------------------------------------------
# Against torch: the truth table of the options
# ---------------------------------------------------------------------------------------------------------------------


@cases("few classes, one tile by position", "first count by class", "middle axis", "segmentation", "no batch")
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_torch(rng, backend, shape, kind, weighted, reduction, smoothing):
    torch = pytest.importorskip("torch", reason="torch is what this test compares with")
    logits, target, weight = problem(rng, shape, "float64", kind, weighted, ignored=True)
    tensor = torch.from_numpy(logits.copy()).requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        tensor, torch.from_numpy(target), None if weight is None else torch.from_numpy(weight), reduction=reduction,
        label_smoothing=smoothing,
    )  # fmt: skip
    grad_output = rng.standard_normal(loss.shape)
    loss.backward(torch.as_tensor(grad_output, dtype=torch.float64))
    options = {"reduction": reduction, "label_smoothing": smoothing, "backend": backend}
    all_ignored = shape == (11,) and kind == "index" and target == -100
    ours = fc.softmax_cross_entropy(logits, target, weight, **options)
    np.testing.assert_allclose(ours, loss.detach().numpy(), rtol=1e-12, atol=1e-12)
    gradient = fc.softmax_cross_entropy_grad(logits, target, weight, np.asarray(grad_output), **options)
    theirs = np.zeros_like(logits) if all_ignored else tensor.grad.numpy()
    np.testing.assert_allclose(gradient, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torch_tensors(rng, reduction):
    torch = pytest.importorskip("torch", reason="torch is what this test compares with")
    logits, target = torch.randn(4, 7, dtype=torch.float32), torch.tensor([1, 2, 3, 6])
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, reduction=reduction)
    assert isinstance(loss, torch.Tensor)
    assert isinstance(gradient, torch.Tensor)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, reduction=reduction))
    torch.testing.assert_close(fc.softmax(logits), torch.softmax(logits, 1))
    buffer = logits.clone()
    result = fc.softmax_cross_entropy_with_grad(buffer, target, reduction=reduction, grad_out=buffer)[1]
    assert result is buffer
    assert torch.equal(buffer, gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Values at the edge
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [5, 70, 9001])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_minus_infinity_is_probability_zero(rng, backend, classes, dtype):
    if backend == "cuda" and classes > 100:
        pytest.skip("long rows take minutes in the simulator")
    logits, _, _ = problem(rng, (4, classes), dtype)
    logits[:, ::2] = -np.inf
    logits[1, :] = -np.inf
    logits[1, classes - 1] = 2.0  # nothing finite before the last class
    target = np.array([1, classes - 1, 3, 1])
    exact_loss, exact_gradient = expected(logits, target, reduction="none")
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, reduction="none", backend=backend)
    assert_close(loss, exact_loss, dtype)
    assert_close(gradient, exact_gradient, dtype)
    assert (gradient[[0, 2, 3], ::2][:, : classes // 2] == 0).all()
    assert fc.softmax_cross_entropy(logits, np.array([0, 1, 0, 0]), reduction="none", backend=backend).tolist() == (
        [np.inf] * 4
    )
    one_hot = np.zeros(logits.shape, logits.dtype)
    np.put_along_axis(one_hot, target[:, None], 1, 1)
    assert_close(fc.softmax_cross_entropy(logits, one_hot, reduction="none", backend=backend), exact_loss, dtype)


@pytest.mark.parametrize("classes", [4, 80])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_logits(backend, classes, dtype):
    huge = 0.9 * float(np.finfo(dtype).max)
    logits = np.zeros((3, classes), dtype)
    logits[0, 1], logits[1, 2], logits[2, :] = huge, -huge, huge
    target = np.array([1, 0, 3])
    exact_loss, exact_gradient = expected(logits, target, reduction="none")
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, reduction="none", backend=backend)
    assert_close(loss, exact_loss, dtype)
    assert_close(gradient, exact_gradient, dtype)
    for smoothing in (0.0, 0.1):
        loss = fc.softmax_cross_entropy(
            logits.astype("float64"), target, reduction="none", label_smoothing=smoothing, backend=backend
        )
        assert np.isfinite(loss).all() or dtype == "float64"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@cases("few classes, one tile by position", "tail of a tile by class", "middle axis", "segmentation")
def test_nan_stays_in_its_row(rng, backend, shape, bad):
    logits, target, _ = problem(rng, shape, "float32")
    clean_loss, clean = fc.softmax_cross_entropy_with_grad(logits, target, reduction="none", backend=backend)
    spoilt = logits.copy()
    spoilt[(1, 2, *(0,) * (len(shape) - 2))] = bad
    row = (1, *(0,) * (len(shape) - 2))
    loss, gradient = fc.softmax_cross_entropy_with_grad(spoilt, target, reduction="none", backend=backend)
    rows, clean_rows = np.moveaxis(gradient, 1, -1), np.moveaxis(clean, 1, -1)
    assert np.isnan(rows[row]).all()
    assert np.isnan(loss[row])
    others = np.ones(loss.shape, bool)
    others[row] = False
    assert_same_bits(rows[others], clean_rows[others])
    assert_same_bits(loss[others], clean_loss[others])


@pytest.mark.parametrize("kind", ["softmax", "log_softmax", "loss"])
@pytest.mark.parametrize("classes", [3, 100])
def test_a_row_of_minus_infinity_is_nan(backend, kind, classes):
    logits = np.full((2, classes), -np.inf, np.float32)
    if kind == "loss":
        assert np.isnan(fc.softmax_cross_entropy(logits, np.array([0, 1]), backend=backend))
    else:
        assert np.isnan(getattr(fc, kind)(logits, backend=backend)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Ignored positions
# ---------------------------------------------------------------------------------------------------------------------


@cases("few classes, one tile by position", "tail of a tile by class", "middle axis", "segmentation")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 1, -1])
@pytest.mark.parametrize("return_lse", [False, True])
def test_ignored_positions_are_exactly_zero(rng, backend, shape, smoothing, ignore_index, return_lse):
    logits, target, weight = problem(rng, shape, "float32", weighted=True)
    target.reshape(-1)[::2] = ignore_index
    np.moveaxis(logits, 1, -1)[target == ignore_index] = np.nan
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "backend": backend}
    for reduction in ("none", "mean"):
        loss, gradient, *_ = fc.softmax_cross_entropy_with_grad(
            logits, target, weight, reduction=reduction, return_lse=return_lse, **options
        )
        rows = np.moveaxis(gradient, 1, -1)
        assert_same_bits(rows[target == ignore_index], np.zeros_like(rows[target == ignore_index]))
        assert np.isfinite(gradient).all()
        assert np.isfinite(loss).all()
        if reduction == "none":
            assert (loss[target == ignore_index] == 0).all()


@pytest.mark.parametrize("classes", [3, 100])
def test_all_ignored(backend, classes):
    logits, target = np.ones((2, classes), np.float32), np.full(2, -100)
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, backend=backend)
    assert np.isnan(loss)
    assert_same_bits(gradient, np.zeros_like(logits))
    assert fc.softmax_cross_entropy(logits, target, reduction="sum", backend=backend) == 0


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_that_weigh_nothing(backend, classes, smoothing):
    """The mean over a weight of zero is nan, also where smoothing leaves a loss to divide."""
    logits, target = np.ones((2, classes)), np.array([0, -100])
    weight = np.arange(float(classes))
    options = {"label_smoothing": smoothing, "backend": backend}
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, weight, **options)
    assert np.isnan(loss)
    assert np.isnan(gradient[0]).all()
    assert_same_bits(gradient[1], np.zeros(classes))
    alone = fc.softmax_cross_entropy(logits, target, weight, reduction="sum", **options)
    assert np.isfinite(alone)
    assert (alone > 0) == (smoothing > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(6, 10), (3, 70), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_views(rng, backend, view, shape, kind):
    logits, target, weight = problem(rng, shape, "float32", kind, weighted=True)
    change = VIEWS[view]
    exact_loss, exact_gradient = expected(logits, target, weight, reduction="none")
    loss, gradient = fc.softmax_cross_entropy_with_grad(
        change(logits), change(target), change(weight), reduction="none", backend=backend
    )
    mass = 1 if kind == "index" else float(target.sum(1).max())
    assert_close(loss, exact_loss, "float32", 8 * mass)
    assert_close(gradient, exact_gradient, "float32", mass)
    if view == "read_only":
        return
    out, grad_out = change(np.zeros(loss.shape, np.float32)), change(np.zeros_like(logits))
    results = fc.softmax_cross_entropy_with_grad(
        change(logits), change(target), change(weight), reduction="none", out=out, grad_out=grad_out, backend=backend
    )
    assert results[0] is out
    assert results[1] is grad_out
    assert_same_bits(out, loss)
    assert_same_bits(grad_out, gradient)


@cases("few classes, one tile by position", "tail of a tile by class", "middle axis", "segmentation",
       "more exponentials than are kept", "middle axis, more exponentials than are kept")  # fmt: skip
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_gradient_over_the_logits(rng, backend, shape, kind, cap):
    logits, target, weight = problem(rng, shape, "float32", kind, weighted=True, ignored=True)
    options = {"logit_softcap": cap, "backend": backend}
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, weight, **options)
    buffer = logits.copy()
    in_place = fc.softmax_cross_entropy_with_grad(buffer, target, weight, grad_out=buffer, **options)
    assert in_place[1] is buffer
    assert_same_bits(in_place[0], loss)
    assert_same_bits(buffer, gradient)
    buffer = logits.copy()
    assert fc.softmax_cross_entropy_grad(buffer, target, weight, out=buffer, **options) is buffer
    assert_same_bits(buffer, gradient)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">u8"]
)
def test_labels_of_any_integer_type(rng, backend, dtype):
    logits, target, _ = problem(rng, (6, 10), "float32")
    assert_same_bits(
        fc.softmax_cross_entropy_grad(logits, target.astype(dtype), backend=backend),
        fc.softmax_cross_entropy_grad(logits, target, backend=backend),
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0), (0, 100)], ids=str)
def test_empty(backend, shape):
    logits = np.zeros(shape, np.float32)
    target = np.zeros(positions_of(shape), int)
    loss, gradient = fc.softmax_cross_entropy_with_grad(logits, target, backend=backend)
    assert np.isnan(loss)
    assert gradient.shape == shape
    assert fc.softmax_cross_entropy(logits, target, reduction="sum", backend=backend) == 0
    assert fc.softmax_cross_entropy(logits, target, reduction="none", backend=backend).shape == positions_of(shape)
    assert fc.softmax(logits, backend=backend).shape == shape


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_axis(rng, backend, axis, kind):
    shape = (3, 4, 5, 6)
    logits, target, _ = problem(rng, shape, "float32", kind)
    moved = np.ascontiguousarray(np.moveaxis(logits, 1, axis))
    moved_target = np.ascontiguousarray(np.moveaxis(target, 1, axis)) if kind == "probability" else target
    exact_loss, exact = expected(logits, target, reduction="none")
    loss, gradient = fc.softmax_cross_entropy_with_grad(
        moved, moved_target, axis=axis, reduction="none", backend=backend
    )
    mass = 1 if kind == "index" else 4
    assert_close(loss, exact_loss, "float32", 8 * mass)
    assert_close(np.moveaxis(gradient, axis, 1), exact, "float32", mass)


def test_grad_output(rng, backend):
    logits, target, _ = problem(rng, (4, 6), "float64")
    plain = fc.softmax_cross_entropy_grad(logits, target, backend=backend)
    for two in (2.0, 2, np.float64(2), np.array(2.0)):
        np.testing.assert_array_equal(
            fc.softmax_cross_entropy_grad(logits, target, None, two, backend=backend), 2 * plain
        )
    rows = rng.standard_normal(4)
    np.testing.assert_allclose(
        fc.softmax_cross_entropy_grad(logits, target, None, rows, reduction="none", backend=backend),
        expected(logits, target, None, rows, reduction="none")[1],
        rtol=1e-12,
        atol=1e-15,
    )


@pytest.mark.parametrize("options", [{}, {"ignore_index": 3, "label_smoothing": 0.1, "return_lse": True}], ids=str)
@pytest.mark.parametrize("kind", [int, np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_an_integer_is_the_label_of_one_row(rng, backend, kind, options):
    """What `labels[0]` is: a NumPy integer, where an array of labels has an array of no dimensions."""
    logits, weight = rng.standard_normal(5), rng.random(5)
    for function in (fc.softmax_cross_entropy, fc.softmax_cross_entropy_grad, fc.softmax_cross_entropy_with_grad):
        for label in (0, 3):
            results, expected = (
                function(logits, target, weight, backend=backend, **options)
                for target in (kind(label), np.array(label))
            )
            if not isinstance(results, tuple):
                results, expected = (results,), (expected,)
            for a, b in zip(results, expected, strict=True):
                assert_same_bits(a, b)


def test_a_negative_integer_that_is_ignored(rng, backend):
    logits = rng.standard_normal(5)
    for label in (-100, np.int64(-100)):
        loss, gradient = fc.softmax_cross_entropy_with_grad(logits, label, reduction="sum", backend=backend)
        assert loss == 0
        assert not gradient.any()


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------


@cases()
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax(rng, backend, shape, dtype):
    logits, _, _ = problem(rng, shape, dtype)
    axis = min(1, len(shape) - 1)
    z = logits.astype(np.float64)
    eps = np.finfo(dtype).eps
    exact = np.apply_along_axis(reference.softmax, axis, z)
    exact_log = np.apply_along_axis(reference.log_softmax, axis, z)
    p, log_p = fc.softmax(logits, backend=backend), fc.log_softmax(logits, backend=backend)
    assert p.dtype == log_p.dtype == logits.dtype
    # relative: z - max is rounded once, exp and the sum a few times
    assert (np.abs(p - exact) <= eps * (6 + np.ptp(z)) * exact).all()
    assert (np.abs(log_p - exact_log) <= eps * (4 + np.abs(exact_log)) * 2).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_softmax_axis_and_dtype(rng, backend, axis, dtype):
    logits = normal(rng, (3, 4, 5), dtype)
    exact = np.apply_along_axis(reference.softmax, axis, logits.astype(np.float64))
    assert_close(fc.softmax(logits, axis, backend=backend), exact, dtype)
    out = np.empty_like(logits)
    assert fc.log_softmax(logits, axis, out=out, backend=backend) is out
    assert_close(out, np.apply_along_axis(reference.log_softmax, axis, logits.astype(np.float64)), dtype)
    buffer = logits.copy()
    fc.log_softmax(buffer, axis, out=buffer, backend=backend)
    assert_same_bits(buffer, out)


def test_softmax_of_one_dimension(backend):
    for axis in (None, 0, -1):
        p = fc.softmax(np.array([0.0, np.log(3.0)]), axis, backend=backend)
        np.testing.assert_allclose(p, [0.25, 0.75], rtol=1e-15)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (2, 3, 4, 2)], ids=str)
def test_no_axis_is_the_class_axis(rng, backend, shape):
    logits = rng.standard_normal(shape)
    target = rng.integers(shape[1], size=positions_of(shape))
    for function in (fc.softmax, fc.log_softmax):
        assert_same_bits(function(logits, None, backend=backend), function(logits, 1, backend=backend))
        assert_same_bits(function(logits, backend=backend), function(logits, axis=1, backend=backend))
    loss = fc.softmax_cross_entropy(logits, target, axis=None, backend=backend)
    assert_same_bits(loss, fc.softmax_cross_entropy(logits, target, axis=1, backend=backend))


# ---------------------------------------------------------------------------------------------------------------------
# Determinism
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2000, 10), (300, 1000), (5, 70_001), (6, 21, 4000), (16, 1000, 49)], ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_same_bits_for_any_number_of_threads(rng, shape, kind):
    logits, target, weight = problem(rng, shape, "float32", kind, weighted=True, ignored=True)
    before = fc.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            fc.set_num_threads(threads)
            results.append(fc.softmax_cross_entropy_with_grad(logits, target, weight, label_smoothing=0.1))
    finally:
        fc.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert_same_bits(loss, results[0][0])
        assert_same_bits(gradient, results[0][1])


@pytest.mark.parametrize("shape", [(700, 10), (130, 64), (6, 1000), (3, 70_001), (5, 21, 40), (4, 1000, 49)], ids=str)
def test_same_bits_for_a_sample_in_any_batch(rng, shape):
    logits, target, weight = problem(rng, shape, "float32", weighted=True)
    options = {"reduction": "none", "label_smoothing": 0.1, "return_lse": True}
    together = fc.softmax_cross_entropy_with_grad(logits, target, weight, **options)
    for n in (0, 1, shape[0] - 1):
        alone = fc.softmax_cross_entropy_with_grad(logits[n : n + 1], target[n : n + 1], weight, **options)
        for a, b in zip(together, alone, strict=True):
            assert_same_bits(a[n : n + 1], b)


@pytest.mark.parametrize("shape", [(70, 60_001), (3, 21, 66_701)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gradient_larger_than_the_caches(rng, shape, smoothing):
    """It is stored past them; alone, each sample is stored as usual. Odd sizes: rows begin anywhere in a cache line."""
    logits = rng.standard_normal(shape, np.float32)
    target = rng.integers(0, shape[1], positions_of(shape))
    options = {"reduction": "sum", "label_smoothing": smoothing}
    together = fc.softmax_cross_entropy_grad(logits, target, **options)
    assert together.nbytes >= 16 * 2**20
    for n in range(shape[0]):
        alone = fc.softmax_cross_entropy_grad(logits[n : n + 1], target[n : n + 1], **options)
        assert_same_bits(together[n : n + 1], alone)
    fc.softmax_cross_entropy_grad(logits, target, out=logits, **options)
    assert_same_bits(logits, together)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "at", "label", "where"),
    [
        ((4, 10), (3,), 10, "target[3] is 10, but logits have C=10 classes (expected 0 <= target < 10, "),
        ((4, 100), (2,), -1, "target[2] is -1, but logits have C=100 classes (expected 0 <= target < 100, "),
        ((2, 3, 4, 5), (1, 2, 3), 7, "target[1, 2, 3] is 7, but logits have C=3 classes (expected 0 <= target < 3, "),
        ((5,), (), 5, "target is 5, but logits have C=5 classes (expected 0 <= target < 5, "),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("check", [False, True])
def test_bad_label(backend, shape, at, label, where, in_place, check):
    logits = np.ones(shape, np.float32)
    target = np.zeros(positions_of(shape), np.int64)
    target[at] = label
    out = np.full((), 7, np.float32)
    grad_out = logits if in_place else np.full(shape, 7, np.float32)
    before = grad_out.copy()
    with pytest.raises(ValueError) as error:
        fc.softmax_cross_entropy_with_grad(logits, target, check=check, out=out, grad_out=grad_out, backend=backend)
    assert str(error.value) == f"softmax_cross_entropy_with_grad: {where}or ignore_index=-100)"
    assert out == 7
    assert_same_bits(grad_out, before)


@pytest.mark.parametrize("dtype", ["uint64", ">u8"])
def test_a_label_that_would_wrap_around(backend, dtype):
    target = np.array([2**64 - 100], dtype)  # -100 as int64
    with pytest.raises(ValueError, match=r"target\[0\] is 18446744073709551516, but logits have C=3"):
        fc.softmax_cross_entropy(np.ones((1, 3), np.float32), target, backend=backend)


_Z, _T = np.ones((2, 3), np.float32), np.array([0, 1])
_PAIR = np.ones((2, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("error", "arguments", "options", "text"),
    [
        (TypeError, ([[1.0]], _T), {}, "logits is a list (expected an array: NumPy, or an object with "
         "__array_interface__, __cuda_array_interface__ or __dlpack__)"),
        (TypeError, (_Z.astype(int), _T), {},
         "logits has dtype int64 (expected float32, float64, float16 or bfloat16)"),
        (TypeError, (_Z, _T > 0), {}, "target has dtype bool (expected class indices of an integer type, or "
         "probabilities of the type of logits, float32)"),
        (TypeError, (_Z, _Z.astype("float64")), {},
         "target is float64, but logits is float32 (expected one dtype)"),
        (TypeError, (_Z, _T, np.ones(3)), {},
         "weight is float64, but logits is float32 (expected one dtype for all arrays of a call)"),
        (TypeError, (np.ma.masked_array(_Z), _T), {},
         "logits is a masked array, whose mask would be ignored (expected a plain array)"),
        (ValueError, (_Z, np.array([0, 1, 2])), {}, "target holds class indices of shape (3,), but logits have shape "
         "(2, 3) (expected (2,), one index per position)"),
        (ValueError, (_Z, np.ones((2, 4), np.float32)), {},
         "target holds probabilities of shape (2, 4) (expected (2, 3), the shape of logits)"),
        (ValueError, (_Z, _T, np.ones(4, np.float32)), {}, "weight has shape (4,) (expected (3,) one per class)"),
        (ValueError, (np.ones((), np.float32), _T), {},
         "logits have shape () (expected (C,), (N, C) or (N, C, *S))"),
        (ValueError, (np.ones((2, 0), np.float32), _T), {}, "logits have shape (2, 0) (expected at least one class)"),
        (ValueError, (_Z, _T), {"reduction": "avg"},
         "reduction is 'avg' (expected one of 'none', 'mean', 'sum')"),
        (ValueError, (_Z, _T), {"reduction": None}, "reduction is None (expected one of 'none', 'mean', 'sum')"),
        (ValueError, (_Z, _T), {"reduction": ["mean"]},
         "reduction is ['mean'] (expected one of 'none', 'mean', 'sum')"),
        (TypeError, (_Z, _T), {"ignore_index": 1.5}, "ignore_index is a float (expected an int)"),
        (ValueError, (_Z, _Z), {"ignore_index": 1}, "ignore_index is 1, but target holds probabilities (expected class "
         "indices, or a negative ignore_index, which ignores none)"),
        (ValueError, (_Z, _T), {"ignore_index": 2**63},
         "ignore_index is 9223372036854775808 (expected a 64-bit integer)"),
        (ValueError, (_Z, _T), {"label_smoothing": 1.5},
         "label_smoothing is 1.5 (expected a number between 0 and 1)"),
        (ValueError, (_Z, _T), {"label_smoothing": np.nan},
         "label_smoothing is nan (expected a number between 0 and 1)"),
        (TypeError, (_Z, _T), {"label_smoothing": "a"},
         "label_smoothing is a str (expected a number between 0 and 1)"),
        (ValueError, (_Z, _T), {"z_loss": -1}, "z_loss is -1.0 (expected a finite number of at least 0)"),
        (ValueError, (_Z, _T), {"logit_softcap": 0},
         "logit_softcap is 0.0 (expected a positive finite number or None)"),
        (TypeError, (_Z, _T), {"return_lse": 1}, "return_lse is a int (expected True or False)"),
        (TypeError, (_Z, _T), {"check": None}, "check is a NoneType (expected True or False)"),
        (TypeError, (_Z, _T), {"axis": 0.5}, "axis is a float (expected an int or None)"),
        (TypeError, (_Z, _T), {"axis": True}, "axis is a bool (expected an int or None)"),
        (TypeError, (_Z, _T), {"axis": [1]}, "axis is a list (expected an int or None)"),
        (ValueError, (_Z, _T), {"axis": 2}, "axis is 2, but logits have shape (2, 3) (expected -2 <= axis < 2)"),
        (ValueError, (_Z[0], 0), {"axis": 1}, "axis is 1, but logits have shape (3,) (expected -1 <= axis < 1)"),
        (TypeError, (_Z[0], True), {}, "target is a bool (expected an array: NumPy, or an object with "
         "__array_interface__, __cuda_array_interface__ or __dlpack__)"),
        (TypeError, (_Z[0], np.True_), {}, "target is a bool (expected an array: NumPy, or an object with "
         "__array_interface__, __cuda_array_interface__ or __dlpack__)"),
        (TypeError, (_Z[0], 1.0), {}, "target is a float (expected an array: NumPy, or an object with "
         "__array_interface__, __cuda_array_interface__ or __dlpack__)"),
        (ValueError, (_Z, 1), {}, "target holds class indices of shape (), but logits have shape (2, 3) (expected "
         "(2,), one index per position)"),
        (ValueError, (_Z[0], 3), {}, "target is 3, but logits have C=3 classes (expected 0 <= target < 3, or "
         "ignore_index=-100)"),
        (ValueError, (_Z[0], np.int8(-1)), {"check": True}, "target is -1, but logits have C=3 classes (expected "
         "0 <= target < 3, or ignore_index=-100)"),
        (ValueError, (_Z[0], np.uint64(2**64 - 100)), {}, "target is 18446744073709551516, but logits have C=3 classes "
         "(expected 0 <= target < 3, or ignore_index=-100)"),
        (ValueError, (_Z[0], 2**64), {}, "target is 18446744073709551616 (expected a 64-bit integer)"),
        (ValueError, (_Z[0], -(2**63) - 1), {}, "target is -9223372036854775809 (expected a 64-bit integer)"),
        (ValueError, (_Z, _T), {"backend": "tpu"}, "backend is 'tpu' (expected one of 'auto', 'cpu', 'cuda')"),
        (ValueError, (_Z, _T), {"out": np.ones(2, np.float32)}, "out has shape (2,) (expected ())"),
        (TypeError, (_Z, _T), {"out": np.ones(())}, "out is float64 (expected float32)"),
        (ValueError, (_Z, _T), {"grad_out": np.ones(3, np.float32)}, "grad_out has shape (3,) (expected (2, 3))"),
        (ValueError, (_PAIR[0], _T), {"grad_out": _PAIR[0]}, "grad_out overlaps logits in memory (expected an array "
         "of its own)"),
        (ValueError, (_Z, _PAIR[0]), {"grad_out": _PAIR[0]}, "grad_out overlaps target in memory (expected an array "
         "of its own)"),
        (ValueError, (_Z, _T), {"grad_out": np.broadcast_to(np.ones(3, np.float32), (2, 3))},
         "grad_out cannot be written (expected a writable array whose elements do not share memory)"),
    ],
)  # fmt: skip
def test_errors(backend, error, arguments, options, text):
    options = {"backend": backend} | options
    with pytest.raises(error) as caught:
        fc.softmax_cross_entropy_with_grad(*arguments, **options)
    assert str(caught.value) == f"softmax_cross_entropy_with_grad: {text}"


def test_errors_of_grad_output(backend):
    with pytest.raises(ValueError, match=r"^softmax_cross_entropy_grad: grad_output has shape \(2,\) \(expected \(\) "):
        fc.softmax_cross_entropy_grad(_Z, _T, None, np.ones(2, np.float32), backend=backend)
    with pytest.raises(TypeError, match=r"^softmax_cross_entropy_grad: grad_output is float64, but logits is float32"):
        fc.softmax_cross_entropy_grad(_Z, _T, None, np.ones(()), backend=backend)
    with pytest.raises(ValueError, match=r"^softmax_cross_entropy_grad: out has shape \(1,\)"):
        fc.softmax_cross_entropy_grad(_Z, _T, out=np.ones(1, np.float32), backend=backend)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_errors_of_softmax(backend, function):
    run = getattr(fc, function)
    for logits, axis in ((_Z, 2), (_Z, -3), (_Z[0], 1), (_Z[0], -2)):
        ndim = logits.ndim
        with pytest.raises(ValueError) as error:
            run(logits, axis, backend=backend)
        expected = f"axis is {axis}, but logits have shape {logits.shape} (expected {-ndim} <= axis < {ndim})"
        assert str(error.value) == f"{function}: {expected}"
    with pytest.raises(ValueError, match=rf"^{function}: out has shape \(2,\) \(expected \(2, 3\)\)$"):
        run(_Z, out=np.ones(2, np.float32), backend=backend)


def test_the_budget_catches_a_wrong_value():
    exact = np.array([0.25, -0.25])
    assert_close(exact.astype(np.float32), exact, "float32")
    with pytest.raises(AssertionError):
        assert_close((exact * (1 + 1e-4)).astype(np.float32), exact, "float32", scale=0)


def test_the_gradient_for_probabilities_that_do_not_sum_to_one():
    """p * sum(y) - y: what p - y would be is far off."""
    z, y = np.array([[0.0, np.log(3.0)]]), np.array([[1.0, 1.0]])
    np.testing.assert_allclose(fc.softmax_cross_entropy_grad(z, y, reduction="sum"), [[-0.5, 0.5]], atol=1e-15)


@pytest.mark.parametrize(("cap", "bits"), list(itertools.product([None, 3.0], ["float32", "float64"])))
def test_loss_alone_does_not_depend_on_what_else_is_asked_for(rng, cap, bits):
    logits, target, _ = problem(rng, (5, 300), bits)
    plain = fc.softmax_cross_entropy(logits, target, logit_softcap=cap)
    assert_same_bits(fc.softmax_cross_entropy_with_grad(logits, target, logit_softcap=cap)[0], plain)
    assert_same_bits(fc.softmax_cross_entropy(logits, target, logit_softcap=cap, return_lse=True)[0], plain)
