"""Prepared convolutions: the bits of the plain functions, kept weights, threads, pickling, errors."""

import pickle
import re
import threading

import numpy as np
import pytest

import fastconv as fc
from fastconv.cpu import fft
from fastconv.packed import PackedWeights

CASES = {
    "direct": ((2, 5, 12, 13), (7, 5, 5, 5), {"stride": 2, "padding": 2}),
    "winograd": ((1, 64, 28, 28), (64, 64, 3, 3), {"padding": 1}),
    "depthwise": ((2, 6, 11, 9), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    "fft": ((2, 3, 40, 37), (4, 3, 15, 13), {"algorithm": "fft", "padding": 3}),
    "grouped": ((2, 6, 11, 9), (8, 3, 3, 3), {"groups": 2, "padding": "same", "padding_mode": "circular"}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("case", CASES)
def test_has_the_bits_of_the_plain_function(case: str, dtype: type, rng: np.random.Generator) -> None:
    input_shape, weight_shape, options = CASES[case]
    x, w = rng.standard_normal(input_shape).astype(dtype), rng.standard_normal(weight_shape).astype(dtype)
    b = rng.standard_normal(weight_shape[0]).astype(dtype)
    op = fc.Conv2d(w, b, activation="relu", **options)
    expected = fc.conv2d(x, w, b, activation="relu", **options)
    out = np.empty_like(expected)
    for _ in range(2):  # packs, then uses what it packed
        np.testing.assert_array_equal(op(x), expected)
        assert op(x, out=out) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("layout", [0, 1])
def test_every_dimension_and_layout(ndim: int, layout: int, backend: str, rng: np.random.Generator) -> None:
    name = fc.arguments.LAYOUTS[ndim][layout]
    x, w = rng.standard_normal((2, *(5,) * ndim, 3)), rng.standard_normal((4, 3, *(3,) * ndim))
    if layout == 0:
        x = np.moveaxis(x, -1, 1)
    op = getattr(fc, f"Conv{ndim}d")(w, layout=name, backend=backend)
    np.testing.assert_array_equal(op(x), getattr(fc, f"conv{ndim}d")(x, w, layout=name, backend=backend))


def test_inputs_of_many_sizes(rng: np.random.Generator) -> None:
    w = rng.standard_normal((9, 4, 3, 3)).astype(np.float32)
    op = fc.Conv2d(w)
    for size in (3, 7, 40, 600):
        x = rng.standard_normal((1, 4, 5, size)).astype(np.float32)
        np.testing.assert_array_equal(op(x), fc.conv2d(x, w))


def test_later_changes_of_the_weight_do_not_count(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((1, 2, 5, 5)), rng.standard_normal((3, 2, 3, 3))
    bias = np.zeros(3)
    expected = fc.conv2d(x, w, bias)
    op = fc.Conv2d(w, bias)
    w[...], bias[...] = 0, 1
    np.testing.assert_array_equal(op(x), expected)


def test_later_changes_of_a_tensor_do_not_count() -> None:
    torch = pytest.importorskip("torch", reason="a tensor of torch is what this test changes")
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    op = fc.Conv2d(w)
    w.zero_()
    y = op(x)
    assert isinstance(y, torch.Tensor)
    assert bool((y == 18).all())


@pytest.mark.parametrize(
    ("error", "options", "text"),
    [
        (ValueError, {"stride": 0}, "Conv2d: stride is 0 (expected at least 1)"),
        (ValueError, {"padding": -1}, "Conv2d: padding is -1 (expected at least 0)"),
        (ValueError, {"padding": "SAME"}, "Conv2d: padding is 'SAME' (expected one of 'valid', 'same', 'full', or"),
        (TypeError, {"dilation": 1.0}, "Conv2d: dilation holds a float (expected integers)"),
        (ValueError, {"groups": 2}, "Conv2d: weight has 3 output channels, which groups=2 does not divide"),
        (ValueError, {"padding_mode": "edge"}, "Conv2d: padding_mode is 'edge' (expected one of 'zeros',"),
    ],
    ids=str,
)
def test_options_are_judged_before_there_is_an_input(error: type, options: dict, text: str) -> None:
    with pytest.raises(error, match="^" + re.escape(text)):
        fc.Conv2d(np.ones((3, 2, 3, 3), np.float32), **options)


def test_pickled(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((1, 2, 5, 5)), rng.standard_normal((3, 2, 3, 3))
    op = fc.Conv2d(w, stride=2, padding=1)
    expected = op(x)
    loaded = pickle.loads(pickle.dumps(op))
    np.testing.assert_array_equal(loaded(x), expected)
    assert repr(loaded) == repr(op)


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_called_by_several_threads_at_once(algorithm: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 16, 20, 20)).astype(np.float32)
    w = rng.standard_normal((24, 16, 3, 3)).astype(np.float32)
    expected = fc.conv2d(x, w, algorithm=algorithm)
    op, results = fc.Conv2d(w, algorithm=algorithm), {}

    def call(n: int) -> None:
        results[n] = [op(x) for _ in range(5)]

    workers = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for result in results.values():
        for y in result:
            np.testing.assert_array_equal(y, expected)


@pytest.fixture
def made_spectra(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the spectra of weights that the FFT has kept or thrown away, in the order they were made."""
    made: list[int] = []
    original = PackedWeights.get_within

    def counting(self, most_bytes, layout, pack):  # type: ignore[no-untyped-def]
        def packing():  # type: ignore[no-untyped-def]
            spectra = pack()
            made.append(spectra.nbytes)
            return spectra

        return original(self, most_bytes, layout, packing)

    monkeypatch.setattr(PackedWeights, "get_within", counting)
    return made


def test_keeps_the_spectra_of_the_weight(made_spectra: list[int], rng: np.random.Generator) -> None:
    w = rng.standard_normal((3, 2, 500)).astype(np.float32)
    op = fc.Conv1d(w, padding="same", algorithm="fft")
    for size in (3000, 3000, 700, 3000, 700):  # two tilings
        x = rng.standard_normal((2, 2, size)).astype(np.float32)
        np.testing.assert_array_equal(op(x), fc.conv1d(x, w, padding="same", algorithm="fft"))
    assert len(made_spectra) == 2
    loaded = pickle.loads(pickle.dumps(op))
    np.testing.assert_array_equal(loaded(x), op(x))
    assert len(made_spectra) == 3


def test_spectra_kept_are_bounded(
    made_spectra: list[int], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    w = rng.standard_normal((3, 2, 500)).astype(np.float32)
    op = fc.Conv1d(w, padding="same", algorithm="fft")
    inputs = [rng.standard_normal((1, 2, size)).astype(np.float32) for size in (3000, 700)]
    for x in inputs:
        op(x)
    monkeypatch.setattr(fft, "SPECTRA_BYTES", sum(made_spectra) - 1)  # room for one of them
    small = fc.Conv1d(w, padding="same", algorithm="fft")
    for x in (*inputs, inputs[1], inputs[0]):
        np.testing.assert_array_equal(small(x), op(x))
    assert len(made_spectra) == 2 + 3  # the second was still there, the first no more
    monkeypatch.setattr(fft, "SPECTRA_BYTES", min(made_spectra) - 1)
    none = fc.Conv1d(w, padding="same", algorithm="fft")
    for _ in range(2):
        np.testing.assert_array_equal(none(inputs[0]), op(inputs[0]))


def test_errors() -> None:
    w = np.ones((4, 3, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"Conv2d: weight has shape \(3, 3, 3\) \(expected 4 dimensions"):
        fc.Conv2d(w[0])
    with pytest.raises(ValueError, match=r"Conv2d: bias has shape \(3,\) \(expected \(4,\) one per output channel\)"):
        fc.Conv2d(w, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="Conv2d: weight is a list"):
        fc.Conv2d([[1.0]])
    with pytest.raises(ValueError, match="Conv2d: layout is 'NCL'"):
        fc.Conv2d(w, layout="NCL")
    with pytest.raises(TypeError, match="Conv2d: weight is float32, but input is float64"):
        fc.Conv2d(w)(np.ones((1, 3, 5, 5)))
    with pytest.raises(ValueError, match="Conv2d: weight has 3 input channels per group, but input has 2 channels"):
        fc.Conv2d(w)(np.ones((1, 2, 5, 5), np.float32))
