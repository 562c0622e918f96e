"""Depthwise convolutions and others of few channels per group, in the block simulator."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import oracle
from block_simulator import ORDERS
from fastconv.arguments import convolution_plan
from fastconv.cuda_kernels import _cuda, convolution, depthwise, depthwise_kernels, offsets
from helpers import channels_first, channels_last, integers, normal
from shapes import CASES, Case
from simulation import aligned, device, simulated
from tolerance import assert_accurate, assert_same_bits, expect

pytestmark = pytest.mark.skipif(
    not _cuda.SIMULATOR, reason="there is no simulator on a GPU, where the tests of convolution run these kernels"
)

MOST_MACS = 2_000
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
OPERATIONS = ["forward", "weight_grad", "input_grad"]

# Beyond the table of all convolutions: vectors, patches of every kind, and their tails.
CASES_OF_PATCHES = [
    Case("vectors", "rows of whole vectors, a patch that is not full", (1, 2, 5, 8), (2, 1, 3, 3), padding=1, groups=2),
    Case("pairs", "rows of two elements' vectors", (2, 2, 4, 6), (2, 1, 3, 3), padding=1, groups=2),
    Case("halves", "stride 2, both gradients in vectors", (1, 2, 8, 16), (2, 1, 3, 3), stride=2, padding=1, groups=2),
    Case("odd halves", "stride 2, nothing aligned", (1, 3, 7, 9), (3, 1, 3, 3), stride=2, padding=1, groups=3),
    Case("thirds", "stride 3, taps that a phase does not have", (1, 2, 9, 12), (2, 1, 2, 2), stride=3, groups=2),
    Case("causal", "short causal filters in one dimension", (2, 2, 16), (2, 1, 4), padding=((3, 0),), groups=2),
    Case("causal tail", "a last vector that is not full", (1, 2, 21), (2, 1, 3), padding=((2, 0),), groups=2),
    Case("dilated", "dilation, more than the rows apart", (1, 2, 9, 8), (2, 1, 3, 3), padding=2, dilation=2, groups=2),
    Case("five", "the filters of MobileNetV3", (1, 2, 6, 8), (2, 1, 5, 5), padding=2, groups=2),
    Case("wide", "more taps than are unrolled: row by row", (1, 2, 9, 8), (2, 1, 8, 7), padding=3, groups=2),
    Case("volume", "three dimensions, strided in depth", (1, 2, 5, 4, 4), (2, 1, 3, 3, 3), stride=(2, 1, 1), padding=1,
         groups=2),  # fmt: skip
    Case("multiplied", "three filters for each channel", (1, 2, 4, 4), (6, 1, 3, 3), padding=1, groups=2),
    Case("pairs of channels", "two channels in a group", (1, 4, 4, 4), (4, 2, 3, 3), padding=1, groups=2),
    Case("plane", "one image, one filter", (1, 1, 7, 8), (1, 1, 3, 3), padding=1),
    Case("many channels", "more than a warp has lanes", (1, 37, 3, 4), (37, 1, 1, 3), groups=37),
]  # fmt: skip


def applies(case, operation):
    """What the module promises to take."""
    results, sources = case.weight[0] // case.groups, case.weight[1]
    strides = case.plain_options["stride"]
    if operation == "input_grad":
        results, sources = sources, results
        if max(strides[-2:]) > 4 or (max(strides[-2:-1], default=1) > 1 and np.prod(case.weight[-2:]) > 49):
            return False
    return case.weight[-1] <= 32 and (results < 4 if case.groups == 1 else min(results, sources) < 4)


FROM_THE_TABLE = [c for c in CASES if c.padding_mode == "zeros" and c.macs <= MOST_MACS]
APPLICABLE = [
    pytest.param(case, operation, last, id=f"{case}-{operation}{'-channels_last' * last}")
    for cases, layouts in [(CASES_OF_PATCHES, (False, True)), (FROM_THE_TABLE, (False,))]
    for case in cases
    for operation in OPERATIONS
    if applies(case, operation)
    for last in layouts
]


@pytest.fixture
def threads():
    """Of a block: two warps, the least that have anything to tell each other."""
    return 64


@pytest.fixture
def run(monkeypatch, threads):
    """``run(operation, case, first, second, ...) -> result``, all of them arrays with channels first."""

    for name, value in {"THREADS": threads, "WARPS": threads // 32}.items():
        monkeypatch.setattr(depthwise_kernels, name, value)
    monkeypatch.setattr(depthwise, "THREADS", threads)
    depthwise_kernels.gather_kernel.cache_clear()
    depthwise_kernels.weight_kernel.cache_clear()

    def run(operation, case, first, second, bias=None, *, last=False, relu=False, start=None, order="forward",
            offset=0):  # fmt: skip
        simulate = simulated((order, "late"))
        monkeypatch.setattr(depthwise, "launch_blocks", simulate)
        monkeypatch.setattr(depthwise, "launch", _cuda.launch)
        names = ("NLC", "NHWC", "NDHWC") if last else ("NCL", "NCHW", "NCDHW")
        shape = (case.input[0], *case.input[2:], case.input[1]) if last else case.input
        plan = convolution_plan(
            "conv", case.ndim, shape, case.weight, case.stride, case.padding, case.dilation, case.groups, "zeros",
            names[case.ndim - 1],
        )  # fmt: skip
        dtype = first.dtype

        def canonical(array, weight=False):
            made = array if weight or not last else channels_first(channels_last(array))
            form = shifted(aligned(made), offset)
            form = form[(..., *[None] * (5 - made.ndim), *[slice(None)] * case.ndim)]
            return form, device(form)

        shapes = {"forward": case.output, "weight_grad": case.weight, "input_grad": case.input}
        weights = {"forward": (0, 1, 0), "weight_grad": (0, 0, 1), "input_grad": (1, 0, 0)}[operation]
        result, out = canonical(np.full(shapes[operation], np.nan, dtype) if start is None else start, weights[2])
        (_, a), (_, b) = canonical(first, weights[0]), canonical(second, weights[1])
        c = convolution._none(dtype) if bias is None else device(bias)
        extra = {
            "forward": (c, relu), "weight_grad": (start is not None,), "input_grad": (c, relu, start is not None),
        }  # fmt: skip
        assert getattr(depthwise, operation)(plan.geometry, a, b, *extra[operation], out)
        return result.reshape(shapes[operation])

    return run


def shifted(array, elements):
    """The same values, `elements` behind an address that vectors may begin at."""
    if elements == 0:
        return array
    memory = np.empty(array.size + elements + 16 // array.itemsize, array.dtype)
    skip = -memory.ctypes.data % 16 // array.itemsize + elements
    view = memory[skip : skip + array.size].reshape(array.shape)
    view[...] = array
    return view


def operands(operation, case, make):
    shapes = {"forward": (case.input, case.weight), "weight_grad": (case.input, case.output),
              "input_grad": (case.weight, case.output)}  # fmt: skip
    return [make(shape) for shape in shapes[operation]]


def reference(operation, case):
    options = case.plain_options
    return {
        "forward": lambda x, w: oracle.convolution(x, w, **options),
        "weight_grad": lambda x, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **options),
        "input_grad": lambda w, dy: oracle.input_grad(w, dy, input_shape=case.input, **options),
    }[operation]


@pytest.mark.parametrize(("case", "operation", "last"), APPLICABLE)
def test_every_shape(case, operation, last, run, rng):
    arrays = operands(operation, case, lambda shape: normal(rng, shape, "float32"))
    assert_accurate(run(operation, case, *arrays, last=last), expect(reference(operation, case), *arrays))


NAMED = {case.name: case for case in CASES_OF_PATCHES}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["vectors", "pairs", "odd halves", "causal", "volume"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
def test_every_type(dtype, name, operation, run, rng):
    case = NAMED[name]
    arrays = operands(operation, case, lambda shape: integers(rng, shape, DTYPES[dtype]))
    expected = reference(operation, case)(*(a.astype(np.float64) for a in arrays))
    assert np.abs(expected).max() <= 256  # so that float16 and bfloat16 hold every result exactly
    np.testing.assert_array_equal(run(operation, case, *arrays).astype(np.float64), expected)


@pytest.mark.parametrize("threads", [256])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_every_schedule(last, order, run, rng):
    """Of the weight gradient, whose threads alone meet, in blocks of their real size."""
    case = NAMED["halves"]
    arrays = operands("weight_grad", case, lambda shape: integers(rng, shape, "float32"))
    actual = run("weight_grad", case, *arrays, last=last, order=order)
    np.testing.assert_array_equal(actual, reference("weight_grad", case)(*arrays))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_wherever_the_arrays_begin(dtype, offset, operation, run, rng):
    """No vectors, or shorter ones."""
    case = NAMED["vectors"]
    arrays = operands(operation, case, lambda shape: normal(rng, shape, "float32").astype(DTYPES[dtype]))
    actual, expected = run(operation, case, *arrays, offset=offset), run(operation, case, *arrays)
    if operation == "weight_grad":  # its patches, and so its sums, are others
        assert_accurate(actual, expect(reference(operation, case), *arrays))
    else:
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", ["vectors", "odd halves"])
@pytest.mark.parametrize("operation", ["forward", "input_grad"])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_bias_and_relu(name, operation, last, run, rng):
    case = NAMED[name]
    arrays = operands(operation, case, lambda shape: integers(rng, shape, "float32"))
    bias = integers(rng, (case.weight[0],), "float32")
    expected = reference(operation, case)(*arrays) + bias.reshape(-1, 1, 1)
    np.testing.assert_array_equal(run(operation, case, *arrays, bias, last=last), expected)
    np.testing.assert_array_equal(run(operation, case, *arrays, bias, last=last, relu=True), np.maximum(expected, 0))


@pytest.mark.parametrize("name", ["vectors", "odd halves"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("operation", ["weight_grad", "input_grad"])
def test_accumulate(operation, dtype, name, run, rng):
    case = NAMED[name]
    arrays = operands(operation, case, lambda shape: integers(rng, shape, dtype))
    start = integers(rng, case.weight if operation == "weight_grad" else case.input, dtype)
    expected = reference(operation, case)(*(a.astype(np.float64) for a in arrays)) + start
    np.testing.assert_array_equal(run(operation, case, *arrays, start=start), expected)


def test_relu_keeps_a_nan(run):
    x, w = np.full((1, 2, 3, 4), np.nan, np.float32), np.ones((2, 1, 1, 1), np.float32)
    case = Case("nan", "", x.shape, w.shape, groups=2)
    assert np.isnan(run("forward", case, x, w, relu=True)).all()


def test_a_zero_of_the_padding_is_a_value(run):
    """0 * inf is nan at the border, inf inside."""
    x, w = np.ones((1, 1, 1, 8), np.float32), np.ones((1, 1, 1, 3), np.float32)
    w[..., 0] = np.inf
    case = Case("infinite", "", x.shape, w.shape, padding=((0, 0), (1, 1)))
    np.testing.assert_array_equal(run("forward", case, x, w).ravel(), [np.nan, *[np.inf] * 7])


@pytest.mark.parametrize("name", ["vectors", "halves", "causal tail", "dilated"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_infinity_stays_in_its_windows(operation, name, run, rng):
    case = NAMED[name]
    arrays = operands(operation, case, lambda shape: np.abs(integers(rng, shape, "float32")) + 1)
    kind = 1 if operation == "input_grad" else 0
    arrays[kind][(0, 0, *[-1] * case.ndim)] = np.inf
    with np.errstate(invalid="ignore"):
        expected = reference(operation, case)(*arrays)
    np.testing.assert_array_equal(run(operation, case, *arrays), expected)


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_a_sum_of_several_parts(last, run, rng, monkeypatch):
    monkeypatch.setattr(depthwise, "LEAST_PATCHES", 1)
    case = Case("batch", "more patches than threads", (16, 3, 7, 9), (3, 1, 3, 3), stride=2, padding=1, groups=3)
    arrays = operands("weight_grad", case, lambda shape: integers(rng, shape, "float32"))
    assert depthwise.parts_of_sum(1 if last else 3, 2 if last else 64, 16 * 2 * 5) > 1
    expected = reference("weight_grad", case)(*arrays)
    np.testing.assert_array_equal(run("weight_grad", case, *arrays, last=last), expected)


def test_parts_are_for_sums_worth_it():
    assert depthwise.parts_of_sum(96, 256, 6272) == 6
    assert depthwise.parts_of_sum(960, 256, 10**6) == 1
    assert depthwise.parts_of_sum(1, 256, 100) == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_few_samples_at_a_time(operation, run, rng, monkeypatch):
    """As for arrays beyond the reach of 32-bit offsets."""
    case = Case("batch", "samples one after the other", (5, 2, 4, 8), (2, 1, 3, 3), padding=1, groups=2)
    arrays = operands(operation, case, lambda shape: integers(rng, shape, "float32"))
    monkeypatch.setattr(offsets, "MOST_ELEMENTS", 150)  # two samples of 64 elements
    monkeypatch.setattr(depthwise, "ENOUGH_BLOCKS", 1)
    np.testing.assert_array_equal(run(operation, case, *arrays), reference(operation, case)(*arrays))


def test_a_sample_has_the_same_bits_in_any_batch(run, rng):
    whole, one = (Case(str(n), "", (n, 2, 6, 8), (2, 1, 3, 3), padding=1, groups=2) for n in (3, 1))
    x, w = operands("forward", whole, lambda shape: normal(rng, shape, "float32"))
    assert_same_bits(run("forward", whole, x, w)[1:2], run("forward", one, x[1:2], w))


def test_from_the_public_functions(rng, monkeypatch):
    import fastconv as fc

    launched = []
    monkeypatch.setattr(depthwise, "launch_blocks", lambda *a: launched.append(a[0]) or simulated()(*a))
    monkeypatch.setattr(convolution, "has_engine", lambda: True)
    case = NAMED["pairs"]
    x, w, dy = (integers(rng, shape, "float32") for shape in [case.input, case.weight, case.output])
    options = {**case.options, "backend": "cuda"}
    del options["padding_mode"]
    np.testing.assert_array_equal(fc.conv2d(x, w, **options), reference("forward", case)(x, w))
    grads = fc.conv2d_backward(x, w, dy, **options, needs=("input", "weight"))
    np.testing.assert_array_equal(grads.input, reference("input_grad", case)(w, dy))
    np.testing.assert_array_equal(grads.weight, reference("weight_grad", case)(x, dy))
    assert [kernel.__name__ for kernel in launched] == ["gather", "gather", "weight_grad"]


REFUSED = {
    "a matrix product": Case("", "", (1, 8, 4, 4), (8, 8, 3, 3)),
    "groups of four": Case("", "", (1, 8, 4, 4), (8, 4, 3, 3), groups=2),
    "one result of many channels": Case("", "", (1, 65, 4, 4), (1, 65, 3, 3)),
    "a long filter": Case("", "", (1, 2, 40), (2, 1, 33), groups=2),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_left_to_others(case, run):
    x, w = np.zeros(case.input, np.float32), np.zeros(case.weight, np.float32)
    with pytest.raises(AssertionError):
        run("forward", case, x, w)


# ---------------------------------------------------------------------------------------------------------------------
# The plan of a patch
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("taps", "stride", "dilation", "before"), [(3, 1, 1, 1), (3, 2, 1, 0), (2, 3, 2, 4), (5, 2, 3, 1)]
)
@pytest.mark.parametrize("vector", [1, 4])
def test_an_axis_holds_every_meeting(taps, stride, dilation, before, inverse, vector):
    results = vector * stride
    axis = depthwise_kernels.Axis.gather(inverse, taps, results, stride, dilation, before, vector)
    assert axis.first % vector == axis.sources % vector == axis.advance % vector == 0
    for thread in range(3):
        for o in range(results):
            result = thread * results + o
            for k in range(taps):
                if inverse:
                    meets, source = divmod(result + before - k * dilation, stride)[::-1]
                else:
                    meets, source = 0, result * stride + k * dilation - before
                place = axis.tap_step * k + axis.result_step * o + axis.offset
                assert (place % axis.divisor == 0) == (meets == 0)
                if meets == 0:
                    assert 0 <= place // axis.divisor < axis.sources
                    assert axis.first + axis.advance * thread + place // axis.divisor == source
