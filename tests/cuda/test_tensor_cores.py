"""Convolutions on the tensor cores (tf32, float16, bfloat16) and in float64, in the block simulator.

The kernels are those that `test_implicit_gemm.py` runs in float32, with another arithmetic.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from test_implicit_gemm import GROUPED, OPERATIONS, ORDINARY, SMALL, operands, reference, run  # noqa: F401

import fastconv as fc
from block_simulator import SCHEDULES
from fastconv.cuda_kernels import _cuda, convolution, implicit_gemm, implicit_gemm_weight_grad, offsets, tiles
from helpers import DTYPES, integers, normal
from shapes import Case
from simulation import simulated
from tolerance import assert_accurate, assert_same_bits, expect

pytestmark = pytest.mark.skipif(
    not _cuda.SIMULATOR, reason="the tables would be on the GPU, where the tests of convolution run these kernels"
)

TENSOR = ["tf32", "float16", "bfloat16"]
KINDS = [*TENSOR, "float64"]

POINTWISE = Case("pointwise", "weights used where they are", (2, 8, 13), (12, 8, 1))
CHUNKED = Case("chunked", "chunks of channels, three steps", (1, 16, 4, 5), (40, 16, 2, 3), padding=1, dilation=(1, 2))
LONG = Case("long", "more than twice as many steps as stages", (1, 16, 3, 4), (24, 16, 3, 5), padding=(1, 2))
GROUPS = Case("groups", "eight channels in each of two groups", (1, 16, 4, 6), (16, 8, 3, 3), padding=1, groups=2)
VOLUME = Case(
    "volume", "three dimensions, pads of two sizes", (1, 4, 3, 5, 4), (6, 4, 2, 2, 3), stride=(1, 2, 1),
    padding=((0, 1), (1, 0), (2, 2)), dilation=(2, 1, 1),
)  # fmt: skip
SPARSE = Case("sparse", "positions of the input that no tap meets", (1, 8, 7), (8, 8, 1), stride=3)
SHAPES = [ORDINARY, GROUPED, POINTWISE, CHUNKED, GROUPS, VOLUME, SPARSE]

channel_orders = pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])


def options(kind):
    return {"precision": "tf32" if kind == "tf32" else "ieee", "tile": SMALL}


def numbers(kind, make):
    """A function of the random numbers and a shape: arrays of the type of this arithmetic, exact in it."""

    def made(rng, shape):
        array = make(rng, shape, "float32" if kind == "tf32" else kind)
        return round_tf32(array) if kind == "tf32" else array

    return made


def round_tf32(array):
    """The nearest numbers of 11 significant bits, ties away from zero."""
    return ((array.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def exactly(operation, case, arrays):
    """The result on small whole numbers, on which every sum is exact."""
    return reference(operation, case)(*(a.astype(np.float64) for a in arrays)).astype(arrays[0].dtype)


SHAPES_AND_KINDS = [
    *((case, kind) for case in SHAPES for kind in ("tf32", "float16")),
    *((case, kind) for case in (CHUNKED, VOLUME) for kind in ("bfloat16", "float64")),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@channel_orders
@pytest.mark.parametrize(("case", "kind"), SHAPES_AND_KINDS, ids=str)
def test_every_kind(case, kind, last, operation, run, rng):  # noqa: F811
    arrays = operands(operation, case, lambda shape: numbers(kind, normal)(rng, shape))
    actual = run(operation, case, *arrays, last=last, **options(kind))
    assert_accurate(actual, expect(reference(operation, case), *arrays))


@pytest.mark.parametrize("operation", OPERATIONS)
@channel_orders
def test_tf32_rounds_its_operands(operation, last, run, rng):  # noqa: F811
    """Whether they are copied or go through registers: neither cut off, nor multiplied as they are."""
    case = CHUNKED
    arrays = operands(operation, case, lambda shape: normal(rng, shape, "float32"))
    actual = run(operation, case, *arrays, last=last, **options("tf32"))
    assert_accurate(actual, expect(reference(operation, case), *map(round_tf32, arrays)))
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_accurate(actual, expect(reference(operation, case), *arrays))


@pytest.mark.parametrize("operation", ["forward", "input_grad"])
@channel_orders
@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_relu(kind, last, operation, run, rng):  # noqa: F811
    case = GROUPS if operation == "forward" else VOLUME
    arrays = operands(operation, case, lambda shape: integers(rng, shape, numbers(kind, normal)(rng, ()).dtype))
    channels = case.weight[0] if operation == "forward" else case.input[1]
    bias = integers(rng, (channels,), arrays[0].dtype)
    exact = reference(operation, case)(*(a.astype(np.float64) for a in arrays))
    exact += bias.astype(np.float64).reshape(-1, *[1] * case.ndim)
    actual = run(operation, case, *arrays, bias, last=last, relu=True, **options(kind))
    np.testing.assert_array_equal(actual, np.maximum(exact, 0).astype(actual.dtype))


@pytest.mark.parametrize("operation", ["weight_grad", "input_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulate(operation, kind, run, rng):  # noqa: F811
    dtype = DTYPES["float32" if kind == "tf32" else kind]
    arrays = operands(operation, GROUPS, lambda shape: integers(rng, shape, dtype))
    start = integers(rng, GROUPS.weight if operation == "weight_grad" else GROUPS.input, dtype)
    expected = exactly(operation, GROUPS, arrays).astype(np.float64) + start.astype(np.float64)
    np.testing.assert_array_equal(run(operation, GROUPS, *arrays, start=start, **options(kind)), expected.astype(dtype))


@pytest.mark.parametrize("operation", OPERATIONS)
@channel_orders
@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_any_alignment_has_the_same_bits(operation, last, kind, run, rng):  # noqa: F811
    arrays = operands(operation, CHUNKED, lambda shape: numbers(kind, normal)(rng, shape))
    expected = run(operation, CHUNKED, *arrays, last=last, **options(kind))
    assert_same_bits(run(operation, CHUNKED, *arrays, last=last, shift=1, **options(kind)), expected)


@pytest.mark.parametrize(
    ("operation", "last", "kind"),
    [("forward", True, "tf32"), ("forward", True, "float16"), ("forward", False, "float16"),
     ("weight_grad", False, "tf32")],
)  # fmt: skip
@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
def test_every_schedule(schedule, operation, last, kind, run, rng):  # noqa: F811
    case = LONG if last else CHUNKED
    arrays = operands(operation, case, lambda shape: integers(rng, shape, "float32" if kind == "tf32" else kind))
    actual = run(operation, case, *arrays, last=last, schedule=schedule, **options(kind))
    np.testing.assert_array_equal(actual, exactly(operation, case, arrays))


@pytest.mark.parametrize("channels", [8, 16, 32, 40, 72, 104])
@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_any_number_of_steps(kind, channels, run, rng):  # noqa: F811
    """Fewer than stages, as many, and more, with a last one that is not full."""
    case = Case("steps", "", (1, channels, 5), (9, channels, 1))
    arrays = operands("forward", case, lambda shape: integers(rng, shape, "float32" if kind == "tf32" else kind))
    for schedule in (("forward", "late"), ("skewed", "early")):
        actual = run("forward", case, *arrays, last=True, schedule=schedule, **options(kind))
        np.testing.assert_array_equal(actual, exactly("forward", case, arrays))


@pytest.mark.parametrize(
    ("kind", "last", "every"),
    [("bfloat16", False, tiles.TENSOR_TILES), ("bfloat16", True, tiles.TENSOR_TILES),
     ("float64", False, tiles.WIDE_TILES)],
    ids=["bfloat16-channels_first", "bfloat16-channels_last", "float64"],
)  # fmt: skip
def test_every_tile_has_the_same_bits(every, last, kind, run, rng):  # noqa: F811
    """More rows than one tile, in the forward pass; the weight gradient multiplies alike."""
    case = Case("tall", "", (1, 8, 5, 9), (136, 8, 1, 2))
    arrays = operands("forward", case, lambda shape: numbers(kind, normal)(rng, shape))
    expected = run("forward", case, *arrays, last=last, **options(kind))
    for tile in every:
        chosen = options(kind) | {"tile": tile}
        assert_same_bits(run("forward", case, *arrays, last=last, **chosen), expected)


def test_a_sum_of_several_parts(run, rng, monkeypatch):  # noqa: F811
    monkeypatch.setattr(implicit_gemm_weight_grad, "LEAST_POSITIONS", 8)
    arrays = operands("weight_grad", ORDINARY, lambda shape: integers(rng, shape, "bfloat16"))
    assert implicit_gemm_weight_grad.positions_of_part(9, 45, 1, 42, "bfloat16") == 32
    actual = run("weight_grad", ORDINARY, *arrays, **options("bfloat16"))
    np.testing.assert_array_equal(actual, exactly("weight_grad", ORDINARY, arrays))


def test_parts_of_a_gradient_are_added_before_they_are_rounded(run, monkeypatch):  # noqa: F811
    """In bfloat16 256 + 1 is 256: ten parts of one position each must not be lost one by one."""
    monkeypatch.setattr(implicit_gemm_weight_grad, "LEAST_POSITIONS", 1)
    case = Case("long", "", (1, 1, 352), (1, 1, 1))
    x, dy = np.zeros(case.input, DTYPES["bfloat16"]), np.ones(case.output, DTYPES["bfloat16"])
    x[0, 0, 0], x[0, 0, 32::32] = 256, 1
    assert implicit_gemm_weight_grad.positions_of_part(1, 1, 1, 352, "bfloat16") == 32
    np.testing.assert_array_equal(run("weight_grad", case, x, dy, **options("bfloat16")).astype(float), 266)


def test_samples_of_a_gradient_are_added_before_they_are_rounded(run, monkeypatch):  # noqa: F811
    """As above, for arrays beyond the reach of 32-bit offsets, which are taken one sample at a time."""
    case = Case("batch", "", (3, 1, 2), (1, 1, 1))
    x = np.array([256, 0, 1, 0, 0, 1]).reshape(case.input).astype(DTYPES["bfloat16"])
    for module in (implicit_gemm, offsets):
        monkeypatch.setattr(module, "MOST_ELEMENTS", 3)
    for module in (implicit_gemm, implicit_gemm_weight_grad):
        monkeypatch.setattr(module, "ENOUGH_BLOCKS", 0.5)
    actual = run("weight_grad", case, x, np.ones_like(x), **options("bfloat16"))
    np.testing.assert_array_equal(actual.astype(float), 258)


@pytest.mark.parametrize("kind", TENSOR)
def test_nan_and_infinity_stay_where_they_are(kind, run):  # noqa: F811
    dtype = "float32" if kind == "tf32" else kind
    x, w = np.ones((1, 8, 9)), np.ones((8, 8, 2))
    x[0, 1, 2], x[0, 3, 7] = np.inf, np.nan
    case = Case("special", "", x.shape, w.shape)
    actual = run("forward", case, x.astype(DTYPES[dtype]), w.astype(DTYPES[dtype]), **options(kind))
    np.testing.assert_array_equal(actual[0, 0].astype(float), [16, np.inf, np.inf, 16, 16, 16, np.nan, np.nan])


# ---------------------------------------------------------------------------------------------------------------------
# Which arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """The words that the stages of the launched kernels held, from calls of the public functions."""
    kinds = []
    make = implicit_gemm.gather_kernel
    monkeypatch.setattr(implicit_gemm, "gather_kernel", lambda kind, *a: kinds.append(kind) or make(kind, *a))
    monkeypatch.setattr(implicit_gemm, "launch_blocks", simulated())
    monkeypatch.setattr(convolution, "has_engine", lambda: True)
    yield kinds
    fc.set_float32_precision("ieee")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tf32_only_where_it_is_allowed(dtype, launched, rng):
    x, w = integers(rng, POINTWISE.input, dtype), integers(rng, POINTWISE.weight, dtype)
    fc.conv1d(x, w, backend="cuda")
    fc.set_float32_precision("tf32")
    fc.conv1d(x, w, backend="cuda")
    assert launched == [dtype, "tf32" if dtype == "float32" else dtype]


def test_precision_belongs_to_the_thread():
    seen = []
    fc.set_float32_precision("tf32")
    try:
        thread = threading.Thread(target=lambda: seen.append(fc.get_float32_precision()))
        thread.start()
        thread.join()
        assert (fc.get_float32_precision(), seen) == ("tf32", ["ieee"])
    finally:
        fc.set_float32_precision("ieee")


@pytest.mark.parametrize("precision", ["TF32", "highest", "", None, 32])
def test_unknown_precision(precision):
    message = r"^set_float32_precision: precision is .* \(expected one of 'ieee', 'tf32'\)$"
    with pytest.raises(ValueError, match=message):
        fc.set_float32_precision(precision)
    assert fc.get_float32_precision() == "ieee"


def test_a_device_without_tensor_cores_has_the_simple_kernels(launched, rng, monkeypatch):
    simple = []
    monkeypatch.setattr(convolution, "has_engine", lambda: False)
    monkeypatch.setattr(convolution, "launch", lambda kernel, *a: simple.append(kernel))
    fc.conv1d(integers(rng, (1, 4, 5), "bfloat16"), integers(rng, (4, 4, 1), "bfloat16"), backend="cuda")
    assert (len(simple), launched) == (1, [])
