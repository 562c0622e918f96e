"""Convolutions as matrix products, in the block simulator: every shape they apply to, tile, layout and schedule.

Here in float32; the other types, by the same kernels, are in `test_tensor_cores.py`; planted mistakes in
`test_simulator_mutations.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from block_simulator import SCHEDULES
from fastconv.arguments import convolution_plan
from fastconv.cuda_kernels import _cuda, convolution, implicit_gemm, implicit_gemm_weight_grad, offsets, tiles
from helpers import channels_first, channels_last, integers, normal
from shapes import CASES, Case
from simulation import aligned, device, simulated
from tolerance import assert_accurate, assert_same_bits, expect

pytestmark = pytest.mark.skipif(
    not _cuda.SIMULATOR, reason="the tables would be on the GPU, where the tests of convolution run these kernels"
)

TINY = tiles.Tile(16, 16, 4, 4)  # several tiles, and tails of all sides, on small shapes
SMALL = tiles.Tile(32, 32, 4, 4)  # two warps
MOST_MACS = 6_000

APPLICABLE = [
    case for case in CASES
    if case.padding_mode == "zeros" and case.macs <= MOST_MACS
    and (case.groups == 1 or min(case.weight[1], case.weight[0] // case.groups) >= implicit_gemm.LEAST_ROWS)
]  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    """``run(operation, case, *arrays, last=..., tile=..., schedule=..., **options) -> result``.

    `last`: input and output are channels-last. `shift`: all arrays begin this many elements behind a multiple of 16.
    """

    def run(operation, case, first, second, bias=None, *, last=False, relu=False, start=None, tile=TINY,
            schedule=("forward", "late"), precision="ieee", shift=0):  # fmt: skip
        for module in (implicit_gemm, implicit_gemm_weight_grad):
            monkeypatch.setattr(module, "launch_blocks", simulated(schedule))
        monkeypatch.setattr(implicit_gemm, "get_float32_precision", lambda: precision)
        monkeypatch.setattr(implicit_gemm, "choose_tile", lambda *sizes: tile)
        monkeypatch.setattr(implicit_gemm_weight_grad, "weight_tile", lambda *sizes: tile)
        implicit_gemm._plans.cache_clear()
        implicit_gemm_weight_grad.weight_plan.cache_clear()
        names = ("NLC", "NHWC", "NDHWC") if last else ("NCL", "NCHW", "NCDHW")
        shape = (case.input[0], *case.input[2:], case.input[1]) if last else case.input
        plan = convolution_plan(
            "conv", case.ndim, shape, case.weight, case.stride, case.padding, case.dilation, case.groups, "zeros",
            names[case.ndim - 1],
        )  # fmt: skip

        def canonical(array, weight=False):
            made = array if weight or not last else channels_first(channels_last(array))
            form = aligned(made, shift)[(..., *[None] * (5 - made.ndim), *[slice(None)] * case.ndim)]
            return form, device(form)

        shapes = {"forward": case.output, "weight_grad": case.weight, "input_grad": case.input}
        kinds = {
            "forward": (False, True, False), "weight_grad": (False, False, True), "input_grad": (True, False, False)
        }  # fmt: skip
        result, out = canonical(
            np.full(shapes[operation], np.nan, first.dtype) if start is None else start, kinds[operation][2]
        )
        (_, a), (_, b) = canonical(first, kinds[operation][0]), canonical(second, kinds[operation][1])
        c = convolution._none(first.dtype) if bias is None else device(bias)
        extra = {
            "forward": (c, relu), "weight_grad": (start is not None,), "input_grad": (c, relu, start is not None),
        }  # fmt: skip
        assert getattr(implicit_gemm, operation)(plan.geometry, a, b, *extra[operation], out)
        return result.reshape(shapes[operation])

    return run


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


OPERATIONS = ["forward", "weight_grad", "input_grad"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("case", APPLICABLE, ids=str)
def test_every_shape(case, last, operation, run, rng):
    arrays = operands(operation, case, lambda shape: normal(rng, shape, "float32"))
    assert_accurate(run(operation, case, *arrays, last=last), expect(reference(operation, case), *arrays))


ORDINARY = Case("ordinary", "tails on all sides", (2, 5, 7, 6), (9, 5, 3, 3), stride=(1, 2), padding=1)
GROUPED = Case("grouped", "two groups, sums stored four at a time", (1, 8, 4, 6), (16, 4, 3, 3), padding=1, groups=2)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids="-".join)
@pytest.mark.parametrize("case", [ORDINARY, GROUPED], ids=str)
def test_every_schedule(case, schedule, operation, run, rng):
    arrays = operands(operation, case, lambda shape: integers(rng, shape, "float32"))
    expected = reference(operation, case)(*arrays)
    np.testing.assert_array_equal(run(operation, case, *arrays, tile=SMALL, schedule=schedule), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_tile_has_the_same_bits(operation, run, rng):
    case = Case("tall", "more rows and columns than one tile", (1, 7, 9, 17), (133, 7, 1, 2))
    if operation == "input_grad":
        case = Case("wide", "many input channels", (1, 133, 9, 17), (5, 133, 1, 2))
    arrays = operands(operation, case, lambda shape: normal(rng, shape, "float32"))
    expected = run(operation, case, *arrays, tile=TINY)
    for tile in tiles.TILES:
        assert_same_bits(run(operation, case, *arrays, tile=tile), expected)


@pytest.mark.parametrize("case", [ORDINARY, GROUPED], ids=str)
@pytest.mark.parametrize("operation", ["forward", "input_grad"])
@pytest.mark.parametrize("last", [False, True])
def test_bias_and_relu(case, operation, last, run, rng):
    arrays = operands(operation, case, lambda shape: integers(rng, shape, "float32"))
    channels = case.weight[0] if operation == "forward" else case.input[1]
    bias = integers(rng, (channels,), "float32")
    expected = reference(operation, case)(*arrays) + bias.reshape(-1, 1, 1)
    np.testing.assert_array_equal(run(operation, case, *arrays, bias, last=last), expected)
    np.testing.assert_array_equal(run(operation, case, *arrays, bias, last=last, relu=True), np.maximum(expected, 0))


@pytest.mark.parametrize("operation", ["weight_grad", "input_grad"])
def test_accumulate(operation, run, rng):
    arrays = operands(operation, GROUPED, lambda shape: integers(rng, shape, "float32"))
    start = integers(rng, GROUPED.weight if operation == "weight_grad" else GROUPED.input, "float32")
    expected = reference(operation, GROUPED)(*arrays) + start
    np.testing.assert_array_equal(run(operation, GROUPED, *arrays, start=start), expected)


def test_a_sum_of_several_parts(run, rng, monkeypatch):
    monkeypatch.setattr(implicit_gemm_weight_grad, "LEAST_POSITIONS", 8)
    arrays = operands("weight_grad", ORDINARY, lambda shape: integers(rng, shape, "float32"))
    assert implicit_gemm_weight_grad.positions_of_part(9, 45, 1, 42) < 42
    np.testing.assert_array_equal(run("weight_grad", ORDINARY, *arrays), reference("weight_grad", ORDINARY)(*arrays))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_few_samples_at_a_time(operation, run, rng, monkeypatch):
    """As for arrays beyond the reach of 32-bit offsets."""
    case = Case("batch", "samples one after the other", (5, 3, 4, 5), (6, 3, 3, 3), padding=1)
    arrays = operands(operation, case, lambda shape: integers(rng, shape, "float32"))
    # 3-channel samples of 60 elements, 6-channel ones of 120, the weight 162: two samples at once
    for module in (implicit_gemm, offsets):
        monkeypatch.setattr(module, "MOST_ELEMENTS", 250)
    for module in (implicit_gemm, implicit_gemm_weight_grad):
        monkeypatch.setattr(module, "ENOUGH_BLOCKS", 0.5)
    np.testing.assert_array_equal(run(operation, case, *arrays), reference(operation, case)(*arrays))


def test_a_sample_has_the_same_bits_in_any_batch(run, rng):
    whole = Case("three", "", (3, 5, 6, 7), (9, 5, 3, 3), padding=1)
    one = Case("one", "", (1, 5, 6, 7), (9, 5, 3, 3), padding=1)
    x, w = operands("forward", whole, lambda shape: normal(rng, shape, "float32"))
    assert_same_bits(run("forward", whole, x, w)[1:2], run("forward", one, x[1:2], w))


def test_a_zero_of_the_padding_is_a_value(run):
    """0 * inf is nan at the border, inf inside; what fills up a tile touches nothing."""
    x, w = np.ones((1, 1, 1, 5), np.float32), np.full((1, 1, 1, 3), 1, np.float32)
    w[..., 0] = np.inf
    case = Case("infinite", "", x.shape, w.shape, padding=((0, 0), (1, 1)))
    np.testing.assert_array_equal(run("forward", case, x, w).ravel(), [np.nan, *[np.inf] * 4])


def test_from_the_public_functions(rng, monkeypatch):
    import fastconv as fc

    launched = []
    for module in (implicit_gemm, implicit_gemm_weight_grad):
        monkeypatch.setattr(module, "launch_blocks", lambda *a: launched.append(a[0]) or simulated()(*a))
    monkeypatch.setattr(convolution, "has_engine", lambda: True)
    x, w, dy = (integers(rng, shape, "float32") for shape in [ORDINARY.input, ORDINARY.weight, ORDINARY.output])
    options = {**ORDINARY.options, "backend": "cuda"}
    del options["padding_mode"]
    np.testing.assert_array_equal(fc.conv2d(x, w, **options), reference("forward", ORDINARY)(x, w))
    grads = fc.conv2d_backward(x, w, dy, **options, needs=("input", "weight"))
    np.testing.assert_array_equal(grads.input, reference("input_grad", ORDINARY)(w, dy))
    np.testing.assert_array_equal(grads.weight, reference("weight_grad", ORDINARY)(x, dy))
    assert len(launched) == 4  # two phases of the stride


@pytest.mark.parametrize(
    "sizes", [(64, 32 * 56 * 56, 1), (2048, 49, 1), (512, 32 * 49, 1), (3, 10**6, 1), (4, 100, 32)]
)
def test_the_choice_of_tile(sizes):
    tile = tiles.choose_tile(*sizes)
    assert tile in tiles.TILES
    assert 2 * sizes[0] > tile.rows or tile.rows == min(t.rows for t in tiles.TILES)


@pytest.mark.parametrize("tile", [*tiles.TILES, *tiles.WIDE_TILES, *tiles.TENSOR_TILES])
def test_tiles_can_be_fetched_and_multiplied(tile):
    assert tile.rows % tile.thread_rows == tile.columns % tile.thread_columns == 0
    assert tile.thread_rows % 4 == tile.thread_columns % 4 == 0
    assert tile.threads % tile.columns == 0 or tile.columns % tile.threads == 0
