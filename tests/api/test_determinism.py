"""The same bits for any number of threads, in any run, and for a sample whatever the batch around it."""

from __future__ import annotations

import dataclasses

import numba
import numpy as np
import pytest

import fastconv as fc
from helpers import LAYOUTS, channels_last, functions, normal, output_of, run_python
from shapes import CASES, TRANSPOSED, Case
from tolerance import assert_same_bits

THREADS = (1, 2, 3, 7)

# Layers with the work for several threads, and several blocks of every kind to share out.
LARGE = [
    Case("3x3", "many pixels", (3, 16, 30, 31), (20, 16, 3, 3), padding=1),
    Case("3x3_deep", "long reductions, few pixels", (2, 128, 7, 7), (70, 128, 3, 3), padding=1),
    Case("3x3_stride2", "phases", (3, 24, 29, 30), (33, 24, 3, 3), stride=2, padding=1),
    Case("1x1", "a matrix product", (3, 200, 14, 15), (90, 200, 1, 1)),
    Case("one_pixel", "a matrix product of few columns", (40, 300, 1, 1), (150, 300, 1, 1)),
    Case("stem", "few channels", (2, 3, 63, 65), (32, 3, 7, 7), stride=2, padding=3),
    Case("waveform", "phases as rows", (3, 1, 16000), (24, 1, 80), stride=16),
    Case("patches", "phases of three channels as rows", (3, 3, 112, 112), (48, 3, 8, 8), stride=8),
    Case("groups", "many small products", (3, 32, 21, 22), (32, 8, 3, 3), padding=1, groups=4),
    Case("small_groups", "weight gradients channel by channel", (3, 48, 40, 41), (64, 3, 3, 3), padding=1, groups=16),
    Case("depthwise", "one filter per channel", (3, 48, 40, 41), (48, 1, 5, 5), padding=2, groups=48),
    Case("reflect", "another padding mode", (3, 12, 30, 31), (20, 12, 3, 3), padding=2, padding_mode="reflect"),
    Case("1d", "one long dimension", (3, 12, 2000), (20, 12, 7), padding="same"),
    Case("3d", "three dimensions", (3, 8, 8, 12, 13), (12, 8, 3, 3, 3), padding=1),
    Case("one_sample", "nothing to share out but rows", (1, 16, 40, 41), (16, 16, 3, 3), padding=1),
]
# And shapes with tails of every kind.
SMALL_NAMES = (
    "3x3_same", "dilated_strided", "depthwise_multiplier2", "circular_once_around", "3d_strided", "straddle_one_pixel",
    "straddle", "primes_large", "terms_3x3_720", "terms_pixels_3280", "rows_17", "channels_47", "depthwise_width_33",
    "depthwise_15x15", "stem_7x7", "mamba_1d",
)  # fmt: skip
ALL = LARGE + [case for case in CASES if case.name in SMALL_NAMES]


@pytest.fixture(autouse=True)
def number_of_threads():
    before = fc.get_num_threads()
    yield
    fc.set_num_threads(before)


def results(case, arrays, last=False, algorithm="auto"):
    """Every operation on the operands of a case."""
    x, w, b, dy = arrays
    f, options = functions(case.ndim), {**case.options, "layout": LAYOUTS[case.ndim][last], "algorithm": algorithm}
    if last:
        x, dy = channels_last(x), channels_last(dy)
    return {
        "forward": f.conv(x, w, b, **options),
        "relu": f.conv(x, w, b, **options, activation="relu"),
        "input": f.input_grad(x.shape, w, dy, **options),
        "weight": f.weight_grad(x, w.shape, dy, **options),
        "bias": f.bias_grad(dy, layout=options["layout"]),
    }


def operands(case, rng, dtype):
    shapes = (case.input, case.weight, case.weight[:1], case.output)
    return tuple(normal(rng, shape, dtype) for shape in shapes)


def assert_all_same(actual, expected):
    for name, result in expected.items():
        try:
            assert_same_bits(actual[name], result)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_there_are_threads_to_share_out_to():
    assert max(THREADS) <= numba.config.NUMBA_NUM_THREADS
    assert all(2 * case.macs > 2_000_000 for case in LARGE), "too small to be shared out"


@pytest.mark.parametrize("algorithm", ["direct", "auto"])
@pytest.mark.parametrize("form", ["float32-first", "float32-last", "float64-first", "bfloat16-first"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_any_number_of_threads_and_any_run(case, form, algorithm, rng):
    dtype, last = form.split("-")[0], form.endswith("last")
    arrays = operands(case, rng, dtype)
    fc.set_num_threads(THREADS[0])
    expected = results(case, arrays, last, algorithm)
    for n in THREADS:
        fc.set_num_threads(n)
        for _ in range(2):
            assert_all_same(results(case, arrays, last, algorithm), expected)


@pytest.mark.parametrize("algorithm", ["direct", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_sample_in_any_batch(case, dtype, algorithm, rng):
    """Alone, in a batch of copies of others, first or last: what the samples before it add up to does not matter."""
    count = 5
    case = dataclasses.replace(case, input=(count, *case.input[1:]))
    x, w, b, dy = operands(case, rng, dtype)
    whole = results(case, (x, w, b, dy), algorithm=algorithm)
    for part in (slice(0, 1), slice(2, 3), slice(4, 5), slice(1, 4)):
        of_part = results(case, (x[part], w, b, dy[part]), algorithm=algorithm)
        for name in ("forward", "relu", "input"):
            assert_same_bits(of_part[name], whole[name][part])


@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_transposed(case, rng):
    x, w = normal(rng, (5, *case.input[1:]), "float32"), normal(rng, case.weight, "float32")
    b = normal(rng, (case.output[1],), "float32")
    transpose = functions(case.ndim).transpose
    fc.set_num_threads(1)
    expected = transpose(x, w, b, **case.options)
    for n in THREADS:
        fc.set_num_threads(n)
        assert_same_bits(transpose(x, w, b, **case.options), expected)
    assert_same_bits(transpose(x[3:4], w, b, **case.options), expected[3:4])


@pytest.mark.parametrize("case", [c for c in CASES if c.macs < 300], ids=str)
def test_cuda(case, rng):
    """On CUDA too: twice in a row, and a sample alone."""
    arrays = operands(case, rng, "float32")
    x, w, b, dy = arrays
    f, options = functions(case.ndim), {**case.options, "backend": "cuda"}
    for run in (
        lambda n: f.conv(x[n], w, b, **options),
        lambda n: f.input_grad(x[n].shape, w, dy[n], **options),
        lambda n: f.weight_grad(x[n], w.shape, dy[n], **options),
    ):
        assert_same_bits(run(slice(None)), run(slice(None)))
    last = slice(case.input[0] - 1, None)
    assert_same_bits(f.conv(x[last], w, b, **options), f.conv(x, w, b, **options)[last])
    assert_same_bits(
        f.input_grad(x[last].shape, w, dy[last], **options), f.input_grad(x.shape, w, dy, **options)[last]
    )


def test_another_process_with_another_pool():
    """The pool of threads is as large as the machine, or as NUMBA_NUM_THREADS says, and does not show in the result."""
    code = """
        import hashlib
        import numpy as np
        import fastconv as fc
        rng = np.random.default_rng(0)
        x, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 16, 30, 31), (20, 16, 3, 3)))
        y = fc.conv2d(x, w, padding=1)
        grads = fc.conv2d_backward(x, w, y, padding=1)
        print(hashlib.sha256(b"".join(a.tobytes() for a in (y, *grads))).hexdigest())
    """
    assert len({output_of(run_python(code, NUMBA_NUM_THREADS=n)) for n in ("1", "2", "5")}) == 1


def test_the_comparison_can_fail():
    one, other = {"forward": np.float32([1, 2])}, {"forward": np.nextafter(np.float32([1, 2]), np.float32(3))}
    with pytest.raises(AssertionError, match="forward: 2 elements differ"):
        assert_all_same(one, other)
