"""The demo learns what it says it learns, and its checks can fail."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc

pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")
pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from fastconv import demo


def small_network(rng: np.random.Generator) -> list[demo.Layer]:
    return [
        demo.make_layer(rng, 1, 2, kernel=3, padding=1),
        demo.make_layer(rng, 2, 3, kernel=2, stride=2, activation=None),
    ]


def small_data(rng: np.random.Generator, count: int = 12) -> demo.Dataset:
    """Images 1 x 4 x 4 of three classes, told apart by which of three rows is bright."""
    labels = np.arange(count) % 3
    images = rng.normal(0, 0.1, (count, 1, 4, 4)).astype(np.float32)
    images[np.arange(count), 0, labels] += 1
    return demo.Dataset(images, labels, images, labels, ["top", "middle", "bottom"])


def test_digits_are_learned_to_97_percent(tmp_path, capsys):
    result = demo.run("digits", tmp_path / "digits.png", seed=0)
    assert result.accuracy >= 0.97
    assert result.gradients_agree
    assert len(result.gradient_errors) == 8  # weight and bias of four layers
    assert result.accuracies[0] < 0.5 < result.accuracies[-1]
    shown = capsys.readouterr().out
    assert f"test accuracy {result.accuracy:.2%}" in shown
    assert "gradients agree" in shown
    for kernel in ("conv2d", "conv2d_weight_grad", "conv2d_input_grad", "conv_bias_grad"):
        assert result.timed.calls[kernel] > 0
        assert kernel in shown
    _assert_picture(tmp_path / "digits.png")


@pytest.mark.slow
def test_photos_are_told_apart(tmp_path):
    result = demo.run("photos", tmp_path / "photos.png", seed=0)
    assert result.accuracy >= 0.95
    assert result.gradients_agree
    _assert_picture(tmp_path / "photos.png")


def _assert_picture(path):
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape == (800, 1200, 4)
    assert picture[..., :3].std() > 0.05  # not a blank page


def test_forward_and_backward_are_the_same_on_every_backend(backend, rng):
    layers, data = small_network(rng), small_data(rng, 2)
    expected_loss, expected = demo.loss_and_grads(layers, data.train_images, data.train_labels, demo.Stopwatch())
    with fc.use_backend(backend):
        loss, grads = demo.loss_and_grads(layers, data.train_images, data.train_labels, demo.Stopwatch())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for got, want in zip(grads, expected, strict=True):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6)


def test_gradient_check_passes_and_leaves_the_network_alone(rng):
    layers, data = small_network(rng), small_data(rng)
    before = [(layer.weight.copy(), layer.bias.copy()) for layer in layers]
    errors = demo.gradient_check(layers, data.train_images, data.train_labels, rng)
    assert errors.keys() == {"layer 1 weight", "layer 1 bias", "layer 2 weight", "layer 2 bias"}
    assert max(errors.values()) <= demo.GRADIENT_TOLERANCE
    for layer, (weight, bias) in zip(layers, before, strict=True):
        assert np.array_equal(layer.weight, weight)
        assert np.array_equal(layer.bias, bias)


@pytest.mark.parametrize("function", ["conv2d_weight_grad", "conv2d_input_grad", "conv_bias_grad"])
def test_gradient_check_finds_a_wrong_gradient(function, rng, monkeypatch):
    layers, data = small_network(rng), small_data(rng)
    right = getattr(fc, function)

    def wrong(*arguments, **options):
        return 1.001 * right(*arguments, **options)

    wrong.__name__ = function
    monkeypatch.setattr(fc, function, wrong)
    errors = demo.gradient_check(layers, data.train_images, data.train_labels, rng)
    assert max(errors.values()) > demo.GRADIENT_TOLERANCE


def test_training_repeats_bit_for_bit():
    def losses_and_weights():
        rng = np.random.default_rng(5)
        data, layers = small_data(rng), small_network(rng)
        losses = list(demo.train(layers, data, 3, 4, 0.1, rng, demo.Stopwatch()))
        return losses, [layer.weight for layer in layers]

    (losses, weights), (again, weights_again) = losses_and_weights(), losses_and_weights()
    assert losses == again
    assert len(losses) == 9
    assert all(np.array_equal(w, v) for w, v in zip(weights, weights_again, strict=True))


def test_digits_are_split_without_overlap():
    data = demo.load_digits(np.random.default_rng(0))
    assert data.train_images.shape == (1438, 1, 8, 8)
    assert data.test_images.shape == (359, 1, 8, 8)
    assert data.train_images.dtype == np.float32
    assert data.train_images.max() == 1
    from sklearn.datasets import load_digits

    bunch = load_digits()
    together = np.concatenate([data.train_images, data.test_images])[:, 0] * 16
    assert sorted(map(bytes, together.astype(np.uint8))) == sorted(map(bytes, bunch.images.astype(np.uint8)))


def test_no_photo_pixel_is_both_trained_and_tested_on(monkeypatch):
    import sklearn.datasets

    left_and_right = np.zeros((427, 640, 3), np.uint8)
    left_and_right[:, 320:] = 255
    monkeypatch.setattr(
        sklearn.datasets, "load_sample_images", lambda: type("Bunch", (), {"images": [left_and_right] * 2})
    )
    data = demo.load_photos(np.random.default_rng(0), train_size=20, test_size=20)
    assert data.train_images.shape == data.test_images.shape == (20, 3, 224, 224)
    assert data.train_images.dtype == np.float32
    assert np.all(data.train_images == -1)
    assert np.all(data.test_images == 1)
    assert sorted(set(data.test_labels)) == [0, 1]
