"""The choice of an algorithm: what it depends on, what it may not, what it says, and the error of each algorithm."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from numba import njit

import fastconv as fc
from fastconv import algorithms, arguments
from fastconv.cpu import convolution, methods
from fastconv.cpu.methods import transforms
from helpers import LAYOUTS, functions, integers, normal
from shapes import CASES

SINGLE = np.dtype(np.float32)


def geometry(input, weight, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    ndim = len(input) - 2
    return arguments.convolution_plan(
        "test", ndim, input, weight, stride, padding, dilation, groups, padding_mode, LAYOUTS[ndim][0]
    ).geometry


def fastest(operation, *shape, **options):
    return chosen(operation, geometry(*shape, **options)).algorithm


def chosen(operation, shape, algorithm="auto"):
    """The method that runs an algorithm on arrays in C order."""
    return methods.choose(methods.problem_of(operation, shape, SINGLE, algorithm))


# Clear cases on either side of each boundary.
CHOICES = [
    ("1x1", ((1, 256, 56, 56), (64, 256, 1, 1)), {}, "direct"),
    ("3x3 of three channels", ((1, 3, 224, 224), (64, 3, 3, 3)), {"padding": 1}, "direct"),
    ("3x3 stride 2", ((1, 128, 56, 56), (128, 128, 3, 3)), {"padding": 1, "stride": 2}, "direct"),
    ("3x3 of many channels", ((1, 128, 56, 56), (128, 128, 3, 3)), {"padding": 1}, "winograd"),
    ("5x5 depthwise", ((1, 96, 56, 56), (96, 1, 5, 5)), {"padding": 2, "groups": 96}, "direct"),
    ("7x7 plane", ((1, 1, 512, 512), (1, 1, 7, 7)), {"padding": 3}, "direct"),
    ("63x63 plane", ((1, 1, 512, 512), (1, 1, 63, 63)), {"padding": 31}, "fft"),
    ("63x63 on few pixels", ((1, 1, 70, 70), (1, 1, 63, 63)), {}, "direct"),
    ("63x63 with a stride that skips most of it", ((1, 1, 512, 512), (1, 1, 63, 63)), {"stride": 16}, "direct"),
    ("15x15 of many channels", ((1, 32, 128, 128), (32, 32, 15, 15)), {"padding": 7}, "fft"),
    ("4096 taps", ((1, 1, 200_000), (1, 1, 4096)), {}, "fft"),
    ("16 taps", ((1, 1, 200_000), (1, 1, 16)), {}, "direct"),
    ("9x9x9 of channels", ((1, 8, 40, 40, 40), (8, 8, 9, 9, 9)), {}, "fft"),
    ("3x3x3", ((1, 8, 40, 40, 40), (8, 8, 3, 3, 3)), {}, "direct"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "options", "expected"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
def test_choice(shape, options, expected):
    assert fastest("forward", *shape, **options) == expected


def test_every_algorithm_is_chosen_for_a_gradient():
    plane = ((1, 1, 512, 512), (1, 1, 63, 63)), {"padding": 31}
    layer = ((1, 128, 56, 56), (128, 128, 3, 3)), {"padding": 1}
    assert [fastest(op, *plane[0], **plane[1]) for op in ("input_grad", "weight_grad")] == ["fft", "fft"]
    assert [fastest(op, *layer[0], **layer[1]) for op in ("input_grad", "weight_grad")] == ["winograd", "winograd"]


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [(64, (56, 56), "winograd"), (16, (14, 14), "winograd"), (8, (56, 56), "direct"), (16, (7, 7), "direct"),
     (512, (7, 7), "winograd"), (512, (4, 4), "direct"), (64, (1, 2000), "direct")],
)  # fmt: skip
def test_choice_for_weight_gradients(channels, size, expected):
    shapes = (1, channels, *size), (channels, channels, 3, 3)
    assert fastest("weight_grad", *shapes, padding=1) == expected


def test_tiles_that_reach_far_beyond_the_image_do_not_pay():
    long = geometry((1, 128, 1, 2000), (128, 128, 3, 3), padding=1)
    assert chosen("forward", long).algorithm == "direct"
    (winograd,) = (method for method in methods.METHODS["forward"] if method.name == "winograd")
    assert "tiles reach beyond 1x2000 pixels" in winograd.slower(methods.problem_of("forward", long, SINGLE))


@pytest.mark.parametrize("operation", methods.OPERATIONS)
def test_the_choice_does_not_depend_on_batch_threads_or_history(operation):
    before = fc.get_num_threads()
    shapes = [(c[1], c[2]) for c in CHOICES]
    expected = [fastest(operation, *shape, **options) for shape, options in shapes]
    try:
        for threads, batch in itertools.product((1, 7), (1, 64)):
            fc.set_num_threads(threads)
            methods.forget_plans()
            chosen = [
                fastest(operation, (batch, *shape[0][1:]), shape[1], **options)
                for shape, options in reversed(shapes)
            ]
            assert chosen[::-1] == expected
    finally:
        fc.set_num_threads(before)


def test_the_choice_is_what_runs(monkeypatch):
    """For every pass of the public functions, asked once."""
    asked = []
    original = convolution.run
    monkeypatch.setattr(convolution, "run", lambda problem, *rest: asked.append(problem) or original(problem, *rest))
    x, w = np.ones((1, 1, 9, 9), np.float32), np.ones((1, 1, 3, 3), np.float32)
    y = fc.conv2d(x, w)
    fc.conv2d_backward(x, w, y)
    fc.conv_transpose2d(y, w)
    assert [problem.operation for problem in asked] == ["forward", "input_grad", "weight_grad", "input_grad"]
    assert {problem.algorithm for problem in asked} == {"auto"}
    x, w = np.ones((1, 1, 200, 200), np.float32), np.ones((1, 1, 99, 99), np.float32)
    assert chosen("forward", geometry(x.shape, w.shape)).algorithm == "fft"
    np.testing.assert_array_equal(fc.conv2d(x, w), fc.conv2d(x, w, algorithm="fft"))
    assert methods.plan_of(asked[-2]).method.name == methods.plan_of(asked[-1]).method.name == "fft"


REFUSED = [
    ("winograd", "conv2d", (1, 8, 9, 9), (8, 8, 5, 5), {}),
    ("winograd", "conv2d", (1, 8, 9, 9), (8, 8, 3, 3), {"stride": 2}),
    ("winograd", "conv2d", (1, 8, 9, 9), (8, 8, 3, 3), {"dilation": 2}),
    ("winograd", "conv2d", (1, 8, 9, 9), (8, 4, 3, 3), {"groups": 2}),
    ("winograd", "conv1d", (1, 8, 9), (8, 8, 3), {}),
    ("winograd", "conv3d", (1, 2, 5, 5, 5), (2, 2, 3, 3, 3), {}),
    ("fft", "conv2d", (1, 8, 9, 9), (8, 8, 1, 1), {}),
    ("fft", "conv1d", (1, 8, 9), (8, 8, 1), {}),
]


@pytest.mark.parametrize(("algorithm", "function", "input", "weight", "options"), REFUSED, ids=lambda v: str(v))
def test_forced_where_it_does_not_apply(algorithm, function, input, weight, options):
    x, w = np.ones(input, np.float32), np.ones(weight, np.float32)
    reason = algorithms.why_not(algorithm, "forward", geometry(input, weight, **options), SINGLE, "cpu")
    with pytest.raises(ValueError) as error:
        getattr(fc, function)(x, w, algorithm=algorithm, **options)
    assert str(error.value) == f"{function}: algorithm={algorithm!r} does not apply: {reason}"


@pytest.mark.parametrize("algorithm", ["winograd", "fft"])
def test_cuda_is_direct(algorithm):
    x, w = np.ones((1, 2, 5, 5), np.float32), np.ones((2, 2, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"conv2d: algorithm='.*' does not apply: the cuda backend has the direct"):
        fc.conv2d(x, w, algorithm=algorithm, backend="cuda")
    large = geometry((1, 1, 512, 512), (1, 1, 63, 63))
    assert algorithms.why_not("auto", "forward", large, SINGLE, "cuda") is None


def test_loops_in_every_function(backend, rng):
    """On whole numbers they give what the direct sum gives, for every function that takes an algorithm."""
    x, w, b = integers(rng, (2, 4, 5, 4), "float32"), integers(rng, (6, 2, 3, 2), "float32"), integers(rng, (6,))
    b, dy = b.astype(np.float32), integers(rng, (2, 6, 3, 3), "float32")
    calls = {
        "conv": lambda **o: fc.conv2d(x, w, b, activation="relu", **o),
        "1d": lambda **o: fc.conv1d(x[:, :, 0], w[:, :, 0], b, **o),
        "3d": lambda **o: fc.conv3d(x[:, :, None], w[:, :, None], b, padding_mode="circular", padding=1, **o),
        "weight": lambda **o: fc.conv2d_weight_grad(x, w.shape, dy, **o),
        "input": lambda **o: fc.conv2d_input_grad(x.shape, w, dy, **o),
        "backward": lambda **o: fc.conv2d_backward(x, w, dy, **o),
        "transpose": lambda **o: fc.conv_transpose2d(dy, w, b[:4], stride=2, **o),
    }
    for name, call in calls.items():
        options = {"groups": 2, "backend": backend}
        result, expected = call(algorithm="loops", **options), call(algorithm="direct", **options)
        for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
            np.testing.assert_array_equal(one, other, name)


def test_loops_of_a_prepared_convolution_and_of_jitted_code(rng):
    x, w = normal(rng, (2, 3, 9, 8), "float32"), normal(rng, (4, 3, 3, 3), "float32")
    expected = fc.conv2d(x, w, padding=1, algorithm="loops")
    op = fc.Conv2d(w, padding=1, algorithm="loops")
    for _ in range(2):
        np.testing.assert_array_equal(op(x), expected)

    @njit
    def caller(x, w):
        return fc.conv2d(x, w, padding=1, algorithm="loops")

    np.testing.assert_array_equal(caller(x, w), expected)
    assert not np.array_equal(fc.conv2d(x, w, padding=1), expected), "it was not the loops that ran"


@pytest.mark.parametrize("operation", methods.OPERATIONS)
def test_the_choice_always_applies(operation):
    for case in CASES:
        options = {name: value for name, value in case.options.items() if name != "algorithm"}
        shape = geometry(case.input, case.weight, **options)
        algorithm = chosen(operation, shape).algorithm
        assert algorithm != "loops"  # the last resort, and what the others are tested by
        assert algorithms.why_not(algorithm, operation, shape, SINGLE, "cpu") is None


# ---------------------------------------------------------------------------------------------------------------------
# The error of each algorithm, as docs/accuracy.md has it over whole networks
# ---------------------------------------------------------------------------------------------------------------------

LAYERS = [
    ((1, 64, 28, 28), (64, 64, 3, 3), {"padding": 1}),
    ((1, 512, 7, 7), (64, 512, 3, 3), {"padding": 1}),
    ((2, 32, 40, 40), (32, 32, 7, 7), {"padding": 3}),
    ((1, 1, 128, 128), (1, 1, 31, 31), {"padding": 15}),
    ((1, 16, 40, 40), (16, 1, 7, 7), {"padding": 3, "groups": 16}),
    ((1, 3, 64, 64), (32, 3, 7, 7), {"padding": 3, "stride": 2}),
    ((2, 4, 4000), (4, 4, 257), {}),
    ((1, 8, 12, 12, 12), (8, 8, 5, 5, 5), {"padding": 2}),
]


def expected_error(algorithm, operation, shape, dtype):
    problem = methods.problem_of(operation, shape, dtype, algorithm)
    return methods.choose(problem).error(problem)


def errors(operation, shape, weight, options, dtype, offset, rng):
    """{algorithm: (rms error, largest error, expected rms error)}, relative to the rms result, against float64."""
    found = geometry(shape, weight, **options)
    f = functions(len(shape) - 2)
    out = (shape[0], weight[0], *found.output_size[3 - (len(shape) - 2) :])
    x, w, dy = (normal(rng, s, dtype) for s in (shape, weight, out))
    x, dy = x + x.dtype.type(offset), dy + x.dtype.type(offset)

    def run(algorithm, change=lambda a: a):
        a, b, c = map(change, (x, w, dy))
        if operation == "forward":
            return f.conv(a, b, algorithm=algorithm, **options)
        if operation == "input_grad":
            return f.input_grad(shape, b, c, algorithm=algorithm, **options)
        return f.weight_grad(a, weight, c, algorithm=algorithm, **options)

    exact = run("direct", lambda a: a.astype(np.float64))
    unit = np.sqrt(np.mean(exact**2))
    result = {}
    for algorithm in ("direct", "winograd", "fft", "loops"):
        if algorithms.why_not(algorithm, operation, found, SINGLE, "cpu") is None:
            error = run(algorithm) - exact
            expected = expected_error(algorithm, operation, found, np.dtype(dtype))
            result[algorithm] = np.sqrt(np.mean(error**2)) / unit, np.abs(error).max() / unit, expected
    return result


@pytest.mark.parametrize("operation", methods.OPERATIONS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_expected_error(operation, layer, rng):
    """What `explain` says is right within a factor of two above, and no more than six times too much."""
    for algorithm, (rms, _, expected) in errors(operation, *layer, "float32", 0, rng).items():
        assert expected / 6 < rms < 2 * expected, algorithm


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("operation", methods.OPERATIONS)
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if max(layer[1][2:]) >= 5], ids=str)
def test_fft_against_the_direct_sum(operation, layer, offset, rng):
    """rms within 3 times, largest error within 4 times, on kernels of 5 and more, offset data included."""
    found = errors(operation, *layer, "float32", offset, rng)
    assert found["fft"][0] < 3 * found["direct"][0]
    assert found["fft"][1] < 4 * found["direct"][1]


def test_expected_error_scales_with_the_precision():
    shape = geometry((1, 32, 40, 40), (32, 32, 7, 7), padding=3)
    for algorithm, operation in itertools.product(("direct", "fft", "loops"), methods.OPERATIONS):
        single, double = (expected_error(algorithm, operation, shape, np.dtype(d)) for d in ("f4", "f8"))
        assert single / double == pytest.approx(2.0**29)


def test_cost_is_that_of_one_sample():
    one = geometry((1, 32, 128, 128), (32, 32, 15, 15), padding=7)
    eight = dataclasses.replace(one, batch=8)
    assert transforms.direct_nanoseconds(one) == transforms.direct_nanoseconds(eight)

    def flops(algorithm, shape):
        problem = methods.problem_of("forward", shape, SINGLE, algorithm)
        return methods.choose(problem).flops(problem)

    for algorithm in ("direct", "fft", "loops"):
        assert flops(algorithm, eight) == pytest.approx(8 * flops(algorithm, one), rel=1e-9)
    assert flops("fft", one) < flops("direct", one) / 5
