"""What the CUDA kernels do that the CPU's do not: labels that the host has not seen, functions for the user's kernels.

What both backends do is tested once for both, in the tests that take the `backend` fixture.
"""

import numpy as np
import pytest

import fastconv as fc
from fastconv import reference
from fastconv.arguments import convolution_plan
from fastconv.cuda_kernels import _cuda, convolution, linear_cross_entropy, softmax_cross_entropy
from fastconv.cuda_kernels._cuda import admit, cuda, to_device, to_host

needs_gpu = pytest.mark.skipif(
    _cuda.SIMULATOR or not _cuda.available()[0], reason="needs a GPU: the simulator takes hours for so many elements"
)


def cross_entropy(logits, target, weight=None, grad_output=None, reduction="none", smoothing=0.0, grad=None):
    """Loss and gradient as NumPy arrays, and what the entry function returns. `target` is a DeviceArray."""
    shape = (logits.shape[0], *logits.shape[2:])
    z = to_device(logits)
    loss = to_device(np.full(shape if reduction == "none" else (), 7, logits.dtype))
    grad = z if grad == "logits" else to_device(np.full(logits.shape, 7, logits.dtype))
    wrong = softmax_cross_entropy.cross_entropy(
        z, target, weight, grad_output, -100, reduction, smoothing, 0.0, 0.0, loss, grad, None
    )
    return to_host(loss), to_host(grad), wrong


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8])
def test_a_label_on_the_device_out_of_range_is_nan_in_its_row_only(rng, dtype):
    logits = rng.standard_normal((5, 3))
    wrong, right = np.array([1, 3, -100, -1, 0], dtype), np.array([1, -100, -100, -100, 0])
    loss, grad, reported = cross_entropy(logits, admit(cuda.to_device(wrong)))
    expected_loss, expected_grad, _ = cross_entropy(logits, to_device(right))
    bad = np.array([False, True, False, True, False])
    assert reported is None
    assert np.isnan(loss[bad]).all()
    assert np.isnan(grad[bad]).all()
    np.testing.assert_array_equal(loss[~bad], expected_loss[~bad])
    np.testing.assert_array_equal(grad[~bad], expected_grad[~bad])


def test_a_label_on_the_device_out_of_range_makes_the_mean_nan_and_spares_the_other_rows(rng):
    logits = rng.standard_normal((3, 4))
    loss, grad, _ = cross_entropy(logits, admit(cuda.to_device(np.array([1, 4, 2]))), reduction="mean")
    assert np.isnan(loss)
    assert np.isnan(grad[1]).all()
    assert np.isfinite(grad[[0, 2]]).all()


@pytest.mark.parametrize("wrong", [2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_label_on_the_device_however_far_out_of_range(wrong, reduction, rng):
    logits, weight = rng.standard_normal((3, 4)), to_device(np.ones(4))
    labels = admit(cuda.to_device(np.array([3, wrong, 0])))
    loss, grad, _ = cross_entropy(logits, labels, weight, reduction=reduction)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False] if reduction == "none" else True)
    np.testing.assert_array_equal(np.isnan(grad).all(1), [False, True, False])


def test_a_label_that_came_from_the_host_is_reported_and_nothing_is_written(rng):
    labels = np.array([[0, 2], [-100, 3]])
    target = to_device(labels)
    target.host = labels
    loss, grad, wrong = cross_entropy(rng.standard_normal((2, 3, 2)), target)
    assert wrong == (3, 3)
    assert (loss == 7).all()
    assert (grad == 7).all()


# ---------------------------------------------------------------------------------------------------------------------
# What the host hears of labels on the device
# ---------------------------------------------------------------------------------------------------------------------

LATER = (
    r"an earlier call had class indices out of range in its target on this device, the first at position {} \(in C "
    r"order\).*with check=True"
)


@pytest.fixture
def waits(monkeypatch):
    """The dtypes of what was copied from the device so far. Begins and ends with nothing to report."""
    _cuda.bad_label_record()
    _cuda.take_bad_label(0)
    copied = []
    monkeypatch.setattr(_cuda, "to_host", lambda array, **k: copied.append(array.dtype) or to_host(array, **k))
    with fc.use_backend("cuda"):
        yield copied
    assert _cuda.take_bad_label(0) is None


def on_device(logits, labels):
    return cuda.to_device(np.asarray(logits, np.float32)), cuda.to_device(np.asarray(labels))


CALLS = {
    "loss": lambda z, t, **options: fc.softmax_cross_entropy(z, t, reduction="none", **options),
    "grad": lambda z, t, **options: fc.softmax_cross_entropy_grad(z, t, reduction="mean", **options),
    "with_grad": lambda z, t, **options: fc.softmax_cross_entropy_with_grad(z, t, grad_out=z, **options)[0],
    "linear": lambda z, t, **options: fc.linear_cross_entropy_with_grad(z, z, t, **options).loss,
}


@pytest.mark.parametrize("name", CALLS)
def test_with_check_a_bad_label_is_an_error_at_once_and_nothing_is_written(name, waits, rng):
    logits = rng.standard_normal((5, 5)).astype(np.float32)
    z, t = on_device(logits, np.array([0, 4, -100, 5, -1], np.int16))
    source = "weight has" if name == "linear" else "logits have"
    with pytest.raises(ValueError, match=rf"cross_entropy\w*: target\[3\] is 5, but {source} C=5 classes"):
        CALLS[name](z, t, check=True)
    np.testing.assert_array_equal(z.copy_to_host(), logits)
    assert waits == [np.int16, np.int64]  # the labels, and what calls before have met


@pytest.mark.parametrize("name", CALLS)
def test_with_check_good_labels_give_the_same_bits(name, waits, rng):
    arrays = rng.standard_normal((4, 4)), [0, 3, -100, 1]
    checked = CALLS[name](*on_device(*arrays), check=True)
    waits.clear()
    np.testing.assert_array_equal(checked.copy_to_host(), CALLS[name](*on_device(*arrays)).copy_to_host())
    assert waits == []


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("listener", ["check", "copies", "another function"])
def test_a_bad_label_is_an_error_of_the_next_call_that_waits(name, listener, waits, rng):
    z, t = on_device(rng.standard_normal((6, 6)), [0, 5, -100, 1, 6, -1])
    right = on_device(np.zeros((2, 3)), [0, 2])
    CALLS[name](z, t)
    fc.softmax_cross_entropy(*right)  # waits for nothing, and changes nothing
    fc.softmax(right[0])
    assert waits == []
    listen = {
        "check": lambda: fc.softmax_cross_entropy(*right, check=True),
        "copies": lambda: fc.softmax_cross_entropy(np.zeros((2, 3)), np.array([0, 2]), backend="cuda"),
        "another function": lambda: fc.conv2d(np.zeros((3, 3)), np.zeros((2, 2)), backend="cuda"),
    }[listener]
    with pytest.raises(ValueError, match=LATER.format(4)):
        listen()
    listen()  # once


def test_of_several_calls_the_lowest_position_is_told(waits):
    for labels in ([0, 0, 0, 9], [0, 9, 9, 9], [0, 0, 9, 0]):
        fc.softmax_cross_entropy(*on_device(np.zeros((4, 3)), labels))
    with pytest.raises(ValueError, match=LATER.format(1)):
        fc.softmax_cross_entropy(*on_device(np.zeros((1, 3)), [0]), check=True)


def test_positions_are_counted_through_the_chunks(waits, monkeypatch):
    """The linear cross-entropy takes its rows in chunks; of a target of two axes positions are counted in C order."""
    monkeypatch.setattr(linear_cross_entropy, "chunk_sizes", lambda classes, features, dtype: (16, 8, 8))
    labels = np.zeros((5, 9), int)
    labels[3, 7] = 4
    hidden, weight = cuda.to_device(np.zeros((5, 9, 2))), cuda.to_device(np.zeros((4, 2)))
    fc.linear_cross_entropy(hidden, weight, cuda.to_device(labels))
    with pytest.raises(ValueError, match=LATER.format(3 * 9 + 7)):
        fc.softmax(np.zeros((1, 2)), backend="cuda")
    with pytest.raises(ValueError, match=r"target\[3, 7\] is 4, but weight has C=4"):
        fc.linear_cross_entropy(hidden, weight, cuda.to_device(labels), check=True)


@pytest.mark.parametrize("label", [2, np.int64(2)])
def test_an_integer_label_goes_where_the_logits_are(label, waits, rng):
    """It is judged on the host, which waits for nothing."""
    logits = rng.standard_normal(5).astype(np.float32)
    z, t = on_device(logits, 2)
    loss = fc.softmax_cross_entropy(z, label)
    assert type(loss) is type(z)
    with pytest.raises(ValueError, match="target is 7, but logits have C=5 classes"):
        fc.softmax_cross_entropy(z, type(label)(7))
    assert waits == []
    np.testing.assert_array_equal(loss.copy_to_host(), fc.softmax_cross_entropy(z, t).copy_to_host())


def test_check_reads_labels_of_any_strides(waits, rng):
    labels = np.full((2, 8, 4), 9, np.int16)
    labels[:, ::2, 1:] = 0
    labels[1, 4, 3] = 7
    z, t = on_device(rng.standard_normal((2, 7, 4, 3)), labels)
    with pytest.raises(ValueError, match=r"target\[1, 2, 2\] is 7, but logits have C=7 classes"):
        fc.softmax_cross_entropy(z, t[:, ::2, 1:], check=True)


def test_probabilities_are_not_waited_for(waits):
    z, t = on_device(np.zeros((2, 3)), np.ones((2, 3), np.float32))
    fc.softmax_cross_entropy(z, t, check=True)
    assert waits == []


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------------------------------


def test_the_gradient_may_overwrite_the_logits(rng):
    logits, labels = rng.standard_normal((4, 3, 2, 2)).astype(np.float32), rng.integers(0, 3, (4, 2, 2))
    loss, grad, _ = cross_entropy(logits, to_device(labels))
    same_loss, in_place, _ = cross_entropy(logits, to_device(labels), grad="logits")
    np.testing.assert_array_equal(same_loss, loss)
    np.testing.assert_array_equal(in_place, grad)


@pytest.mark.parametrize("positions", [1, softmax_cross_entropy.PARTIAL_SUMS, softmax_cross_entropy.PARTIAL_SUMS + 7])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sums_over_positions_are_complete(positions, reduction, rng):
    """Every position counts once, whether each of the partial sums has one term or some have two."""
    labels = rng.integers(0, 2, positions)
    loss, _, _ = cross_entropy(np.zeros((positions, 2)), to_device(labels), reduction=reduction)
    assert loss == pytest.approx(np.log(2) * (positions if reduction == "sum" else 1), rel=1e-12)


def test_a_gradient_of_the_loss_may_be_one_number_on_the_device(rng):
    logits, labels = rng.standard_normal((4, 3, 2)), rng.integers(0, 3, (4, 2))
    _, grad, _ = cross_entropy(logits, to_device(labels), grad_output=to_device(np.array(2.5)), reduction="mean")
    _, expected, _ = cross_entropy(logits, to_device(labels), grad_output=2.5, reduction="mean")
    np.testing.assert_allclose(grad, expected, rtol=1e-15)


def test_four_position_axes(rng):
    logits, labels = rng.standard_normal((2, 3, 2, 1, 3, 2)), rng.integers(0, 3, (2, 2, 1, 3, 2))
    loss, grad, _ = cross_entropy(logits, to_device(labels))
    flat_loss, flat_grad, _ = cross_entropy(logits.reshape(2, 3, 12), to_device(labels.reshape(2, 12)))
    np.testing.assert_array_equal(loss.reshape(2, 12), flat_loss)
    np.testing.assert_array_equal(grad.reshape(2, 3, 12), flat_grad)


def test_four_position_axes_that_cannot_be_merged_are_refused():
    z = to_device(np.zeros((2, 2, 2, 2, 3, 2)))
    with pytest.raises(ValueError, match="at most 3 position axes"):
        softmax_cross_entropy.softmax(z.transpose((0, 4, 5, 3, 2, 1)), False, to_device(np.zeros((2, 3, 2, 2, 2, 2))))


# ---------------------------------------------------------------------------------------------------------------------
# For the user's own kernels
# ---------------------------------------------------------------------------------------------------------------------


@cuda.jit
def rows(logits, labels, grad, loss):
    i = cuda.grid(1)
    if i < logits.shape[0]:
        loss[i] = softmax_cross_entropy.softmax_cross_entropy_row(logits[i], labels[i], grad[i])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_row_function_in_a_user_kernel(rng, dtype):
    logits, labels = rng.standard_normal((4, 5)).astype(dtype), np.array([0, 4, 2, 5])
    loss, grad = np.zeros(4, dtype), np.zeros((4, 5), dtype)
    rows[2, 2](logits, labels, grad, loss)
    for i in range(3):
        expected = reference.cross_entropy_position(logits[i].astype(np.float64), np.eye(5)[labels[i]])
        np.testing.assert_allclose(loss[i], expected[0], rtol=10 * np.finfo(dtype).eps)
        np.testing.assert_allclose(grad[i], expected[1], rtol=10 * np.finfo(dtype).eps)
    assert np.isnan(loss[3])
    assert np.isnan(grad[3]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


def test_tables_are_copied_once_for_a_geometry(monkeypatch):
    uploads = []
    monkeypatch.setattr(convolution, "upload", lambda *tables: uploads.append(len(tables)) or _cuda.upload(*tables))
    convolution._input_coordinates.cache_clear()
    x, w, y = (to_device(np.ones(shape, np.float32)) for shape in [(1, 1, 1, 3, 3), (1, 1, 1, 2, 2), (1, 1, 1, 2, 2)])
    for _ in range(2):
        geometry = convolution_plan("conv2d", 2, (1, 1, 3, 3), (1, 1, 2, 2), 1, 0, 1, 1, "zeros", "NCHW").geometry
        convolution.forward(geometry, x, w, None, False, "direct", None, y)
        convolution.weight_grad(geometry, x, y, False, "direct", w)
    assert uploads == [3]


@pytest.mark.parametrize("algorithm", ["loops", "direct"])
def test_loops_skip_the_faster_kernels(algorithm, monkeypatch, rng):
    """Where the device has what those need, they are asked for every algorithm but the loops."""
    asked = []
    monkeypatch.setattr(convolution, "has_engine", lambda: True)
    for module in (convolution.depthwise, convolution.implicit_gemm):
        for name in ("forward", "weight_grad", "input_grad"):
            monkeypatch.setattr(module, name, lambda *_: asked.append(1))
    x, w = rng.standard_normal((1, 2, 4, 4)), rng.standard_normal((3, 2, 2, 2))
    options = {"algorithm": algorithm, "backend": "cuda"}
    y = fc.conv2d(x, w, **options)
    np.testing.assert_allclose(y, fc.conv2d(x, w), rtol=1e-12, atol=1e-12)
    fc.conv2d_weight_grad(x, w.shape, y, **options)
    fc.conv2d_input_grad(x.shape, w, y, **options)
    assert len(asked) == (0 if algorithm == "loops" else 6)


def test_indices_do_not_wrap_around():
    shape = (3, 5, 1 << 12, 1 << 13, 1 << 14)
    for place in [(2, 4, 4095, 8191, 16383), (1, 0, 7, 0, 1), (0, 0, 0, 0, 0)]:
        index = int(np.ravel_multi_index(place, shape))
        assert convolution._position(index, shape) == place
        position = int(np.ravel_multi_index((place[0], *place[2:]), (3, *shape[2:])))
        assert softmax_cross_entropy._place(position, shape) == (place[0], *place[2:])


@needs_gpu
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    import fastconv as fc

    size = (1 << 31) + 1000
    x = np.zeros((1, 1, size), np.float16)
    x[..., -1000:] = np.arange(1000) % 7
    y = fc.conv1d(cuda.to_device(x), cuda.to_device(np.array([[[1, 2]]], np.float16)))
    tail = y[0, 0, size - 1001 :].copy_to_host()
    np.testing.assert_array_equal(tail, x[0, 0, -1001:-1] + 2 * x[0, 0, -1000:])
