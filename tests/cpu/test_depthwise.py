"""Convolutions of one input channel per group: shapes at the edges of the vectors, blocks and tiles of their kernels.

The cases of `shapes.CASES` run on these kernels too, in test_convolution.py; here are those that only they care about.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv.cpu import depthwise, depthwise_channels, depthwise_planes, methods
from fastconv.cpu.vector.depthwise_channels import Steps
from fastconv.cpu.vector.depthwise_rows import SHARED_ROWS
from fastconv.cpu.vector.tile import tile
from fastconv.geometry import PADDING_MODES, ConvGeometry
from helpers import (
    LAYOUTS,
    VIEWS,
    channels_first,
    channels_last,
    functions,
    integers,
    normal,
    output_of,
)
from processors import PROCESSORS, needs_x86, run_on
from shapes import Case
from tolerance import assert_accurate, assert_same_bits, expect


def filters(name, channels, size, kernel, batch=2, multiplier=1, **options):
    """A case of `channels` groups."""
    return Case(
        name, "", (batch, channels, *size), (channels * multiplier, 1, *kernel), groups=channels, **options
    )


CASES = [
    # widths around the half, one, two and four vectors of every tile; heights around the seven, four, two and one rows
    *(filters(f"width_{n}", 2, (5, n), (3, 3), padding=1) for n in (5, 6, 12, 13, 20, 24, 47, 48, 63, 64, 80, 97, 130)),
    *(filters(f"height_{n}", 2, (n, 9), (5, 5), padding=2) for n in (1, 2, 3, 4, 6, 7, 8, 11, 13, 14, 15, 20)),
    *(filters(f"height_{n}_wide", 1, (n, 60), (3, 3), padding=1) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    # every number of filter rows, whole and cut into several; of columns, around what the weight gradient takes at once
    *(filters(f"rows_{n}", 2, (n + 5, 10), (n, 2), padding=(n // 2, 1)) for n in range(1, 17)),
    *(filters(f"columns_{n}", 2, (6, n + 9), (3, n)) for n in (1, 2, 4, 5, 6, 7, 8, 9, 11, 13, 17)),
    # stride 2: odd and even sizes, shared rows for three, five and seven rows of the filter
    *(
        filters(f"stride2_{k}x{k}_{h}x{w}", 3, (h, w), (k, k), stride=2, padding=k // 2)
        for k in (2, 3, 4, 5, 7, 8)
        for h, w in ((9, 17), (14, 32), (13, 70))
    ),
    filters("stride2_even_pair", 3, (16, 33), (3, 3), stride=2, padding=((0, 1), (0, 1))),
    filters("stride2_height", 2, (15, 20), (5, 3), stride=(2, 1), padding=2),
    filters("stride2_width", 2, (15, 41), (5, 3), stride=(1, 2), padding=2),
    filters("stride3", 2, (17, 50), (5, 4), stride=3, padding=1),
    filters("stride4_dilated", 2, (21, 43), (3, 3), stride=4, dilation=(2, 3), padding=2),
    filters("stride_over_kernel", 2, (13, 40), (1, 1), stride=2),
    filters("stride_over_size", 2, (2, 3), (2, 2), stride=5, padding=2),
    # dilation: rows that share what they read are not neighbours
    *(filters(f"dilated_{d}", 2, (19, 23), (3, 3), dilation=d, padding=d) for d in (2, 3, 4, 9)),
    filters("dilated_stride2", 2, (19, 23), (3, 3), dilation=2, stride=2, padding=2),
    filters("dilated_3_stride2", 2, (19, 23), (5, 3), dilation=(3, 1), stride=2, padding=(6, 1)),
    # multipliers, single planes
    *(filters(f"multiplier_{m}", 3, (9, 18), (3, 3), multiplier=m, padding=1) for m in (2, 3, 5)),
    filters("multiplier_stride2", 3, (9, 18), (5, 5), multiplier=2, padding=2, stride=2),
    *(filters(f"plane_{k}x{k}", 1, (40, 45), (k, k), batch=1, padding="same") for k in (9, 15, 31)),
    filters("plane_to_4", 1, (20, 33), (3, 3), multiplier=4, padding=1),
    # tiles: planes and rows beyond the slab
    filters("tiles_of_rows", 1, (300, 290), (3, 3), batch=1, padding=1),
    filters("tiles_of_rows_stride2", 1, (301, 401), (5, 3), batch=1, padding=2, stride=2),
    filters("tiles_of_columns", 1, (3, 60_000), (2, 3), batch=1, padding=1),
    # one dimension
    filters("1d_k4_channels", 17, (300,), (4,), padding=((3, 0),)),
    filters("1d_k4", 5, (200,), (4,), padding=((3, 0),)),
    filters("1d_long", 2, (70_001,), (4,), padding=((3, 0),)),
    filters("1d_long_stride2", 1, (120_001,), (5,), stride=2, padding=2),
    filters("1d_k400", 2, (3000,), (400,), stride=160),
    filters("1d_k1000", 1, (2500,), (1000,), padding=300),
    # three dimensions
    filters("3d_3x3x3", 2, (5, 8, 17), (3, 3, 3), padding=1),
    filters("3d_stride2", 2, (5, 9, 18), (3, 3, 3), padding=1, stride=2),
    filters("3d_tiles", 1, (20, 60, 60), (3, 3, 3), batch=1, padding=1),
    filters("3d_dilated_multiplier", 2, (9, 9, 10), (2, 3, 2), multiplier=2, dilation=(3, 2, 1), padding=1),
    # other padding
    *(filters(f"{mode}", 2, (11, 37), (5, 7), padding=3, padding_mode=mode) for mode in PADDING_MODES[1:]),
    *(
        filters(f"{mode}_stride2", 2, (11, 38), (5, 7), padding=((4, 1), (3, 2)), stride=2, padding_mode=mode)
        for mode in PADDING_MODES[1:]
    ),
    filters("circular_tiles", 1, (260, 300), (3, 3), batch=1, padding=1, padding_mode="circular"),
    filters("padding_over_input", 2, (2, 3), (3, 3), padding=7),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}

# more channels than half a vector of every machine: the vectors hold channels, in both layouts
CHANNEL_CASES = [
    *(filters(f"channels_{n}", n, (5, 6), (3, 3), padding=1) for n in (8, 13, 16, 17, 32, 37)),
    # fewer pixels than a vector, rows that are and are not runs of their own, widths around the pixels at once
    *(
        filters(f"channels_{h}x{w}", 19, (h, w), (3, 3), padding=1)
        for h, w in ((1, 1), (2, 3), (7, 7), (9, 14), (3, 29))
    ),
    *(filters(f"channels_{k}x{k}", 18, (9, 17), (k, k), padding=k // 2) for k in (1, 2, 4, 5, 6, 7, 9, 11)),
    *(
        filters(f"channels_stride2_{k}x{k}", 18, (10, 13), (k, k), stride=2, padding=k // 2) for k in (2, 3, 4, 5, 7)
    ),
    filters("channels_stride3", 17, (11, 19), (4, 5), stride=3, padding=2),
    filters("channels_stride_over_kernel", 17, (11, 19), (2, 2), stride=3),
    filters("channels_stride_over_size", 17, (3, 12), (5, 1), stride=(5, 1), padding=((1, 1), (0, 0))),
    filters("channels_dilated", 17, (11, 19), (3, 3), dilation=(2, 3), padding=(2, 3)),
    filters("channels_dilated_stride2", 17, (11, 19), (3, 3), dilation=3, stride=2, padding=3),
    filters("channels_columns_left", 17, (8, 12), (3, 3), stride=2),
    filters("channels_padding_over_input", 17, (2, 3), (3, 3), padding=7),
    filters("channels_tiles", 17, (90, 70), (7, 7), batch=1, padding=3),
    filters("channels_tiles_stride2", 17, (151, 90), (5, 5), batch=1, padding=2, stride=2),
    filters("channels_1d", 17, (1000,), (6,), padding=((5, 0),)),
    filters("channels_1d_k40", 17, (500,), (40,), stride=2, padding=7),
    filters("channels_3d", 17, (4, 5, 6), (3, 3, 3), padding=1),
    filters("channels_3d_stride2", 17, (5, 6, 7), (3, 3, 3), padding=1, stride=2),
    filters("channels_3d_tiles", 17, (12, 20, 30), (3, 3, 3), batch=1, padding=1),
]  # fmt: skip
BY_NAME |= {case.name: case for case in CHANNEL_CASES}


# those of the above that vectors of a row of a plane are for where the processor has masks, and what is at their edges
PLANE_CASES = [
    *(
        filters(f"planes_{h}x{w}", 5, (h, w), (3, 3), padding=1)
        for h, w in ((4, 8), (5, 9), (6, 17), (8, 16), (11, 33), (7, 80))
    ),
    *(filters(f"planes_{k}x{k}", 3, (15, 21), (k, k), padding=k // 2) for k in (2, 4, 6, 7, 8, 11, 15)),
    *(filters(f"planes_stride2_{k}x{k}", 3, (29, 67), (k, k), stride=2, padding=k // 2) for k in (2, 3, 4, 5)),
    filters("planes_stride2_tiles", 2, (301, 203), (3, 3), batch=1, stride=2, padding=1),
    filters("planes_stride2_wide_padding", 3, (17, 40), (5, 5), stride=2, padding=((5, 8), (7, 2))),
    filters("planes_wide_padding", 3, (6, 7), (3, 3), padding=((9, 4), (6, 21))),
    filters("planes_many", 700, (7, 7), (3, 3), batch=1, padding=1),
    filters("planes_tiles", 2, (210, 160), (5, 5), batch=1, padding=2),
    filters("planes_small_tiles", 1, (29, 1000), (3, 3), batch=1, padding=1),
    filters("planes_small_tiles_of_4", 1, (13, 3000), (3, 3), batch=1, padding=1),
    filters("planes_3d", 3, (6, 9, 13), (3, 3, 3), padding=1),
    filters("planes_3d_stride2_dilated", 3, (9, 15, 30), (2, 3, 3), stride=(1, 2, 2), dilation=(3, 1, 1), padding=1),
]  # fmt: skip
BY_NAME |= {case.name: case for case in PLANE_CASES}
ALL_CASES = [*CASES, *CHANNEL_CASES, *PLANE_CASES]


@pytest.fixture
def no_masks():
    """As where vectors have no masks: the kernels that planes are not read in place by."""
    with methods.only("depthwise_channels", "depthwise"):
        yield


def bodies(monkeypatch, cases):
    """The module of the body that runs each of these cases forward."""
    seen = []
    monkeypatch.setattr(depthwise, "correlate", lambda plan, *_: seen.append(plan.body.function.__module__))
    for case in cases:
        x, w = np.zeros(case.input, np.float32), np.zeros(case.weight, np.float32)
        functions(case.ndim).conv(x, w, **case.options)
    assert len(seen) == len(cases)
    return [name.rpartition(".")[2] for name in seen]


@pytest.mark.usefixtures("no_masks")
def test_the_cases_run_on_these_kernels(monkeypatch):
    assert set(bodies(monkeypatch, CASES)) == {"depthwise_tasks"}


@pytest.mark.usefixtures("no_masks")
def test_where_vectors_hold_channels(monkeypatch):
    assert set(bodies(monkeypatch, CHANNEL_CASES)) == {"depthwise_channels_tasks"}


@pytest.mark.skipif(not tile(32).masks, reason="vectors of this processor have no masks")
def test_where_planes_are_read_in_place(monkeypatch):
    assert set(bodies(monkeypatch, PLANE_CASES)) == {"depthwise_planes"}


SOME = [
    BY_NAME[name]
    for name in (
        "width_13", "height_11", "rows_12", "stride2_5x5_13x70", "stride2_4x4_9x17", "stride3", "dilated_3",
        "multiplier_stride2", "plane_to_4", "1d_k4", "1d_k400", "3d_stride2", "reflect_stride2", "tiles_of_rows",
        "channels_13", "channels_2x3", "channels_stride2_5x5", "channels_stride3", "channels_tiles",
        "channels_3d_stride2", "planes_11x33", "planes_stride2_5x5", "planes_stride2_tiles",
        "planes_wide_padding", "planes_3d_stride2_dilated",
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in ALL_CASES), *((case, "float64") for case in SOME)],
    ids=str,
)
def test_passes(case, dtype, rng):
    """Forward with bias and both gradients against the oracle, in either layout."""
    f, plain = functions(case.ndim), case.plain_options
    x, w, b, dy = (normal(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1], case.output))
    y = expect(lambda x, w, b: oracle.convolution(x, w, b, **plain), x, w, b)
    dw = expect(lambda x, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **plain), x, dy)
    dx = expect(lambda w, dy: oracle.input_grad(w, dy, input_shape=case.input, **plain), w, dy)
    assert_accurate(f.conv(x, w, b, **case.options), y)
    assert_accurate(f.weight_grad(x, case.weight, dy, **case.options), dw)
    assert_accurate(f.input_grad(case.input, w, dy, **case.options), dx)

    x, dy = channels_last(x), channels_last(dy)
    options = {**case.options, "layout": LAYOUTS[case.ndim][1]}
    assert_accurate(channels_first(f.conv(x, w, b, **options)), y)
    assert_accurate(f.weight_grad(x, case.weight, dy, **options), dw)
    assert_accurate(channels_first(f.input_grad(x.shape, w, dy, **options)), dx)


@pytest.mark.skipif(not tile(32).masks, reason="there are no other kernels for them on this processor")
@pytest.mark.parametrize("case", [case for case in [*CASES, *CHANNEL_CASES] if case.ndim > 1], ids=str)
@pytest.mark.usefixtures("no_masks")
def test_passes_without_masks(case, rng):
    test_passes(case, "float32", rng)


@pytest.fixture
def with_prefetches(monkeypatch):
    """As for arrays that are in no cache."""
    for module in (depthwise_channels, depthwise_planes):
        monkeypatch.setattr(module, "PREFETCH_BYTES", 0)
    monkeypatch.setattr(depthwise_channels, "IN_PLACE_BYTES", 0)
    methods.forget_plans()
    yield
    methods.forget_plans()


@pytest.mark.parametrize("case", [*CHANNEL_CASES, *PLANE_CASES], ids=str)
@pytest.mark.usefixtures("with_prefetches")
def test_passes_with_prefetches(case, rng):
    test_passes(case, "float32", rng)


@pytest.mark.parametrize(("planes", "prefetches"), [(1, False), (120, True)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_which_arrays_are_prefetched(layout, planes, prefetches, monkeypatch):
    """Those of more than 16 MiB together."""
    seen = []
    monkeypatch.setattr(depthwise, "correlate", lambda plan, *_: seen.append(plan))
    x, w = np.zeros((planes, 16, 40, 40), np.float32), np.zeros((16, 1, 3, 3), np.float32)
    fc.conv2d(x if layout == "NCHW" else channels_last(x), w, padding=1, groups=16, layout=layout)
    (plan,) = seen
    if plan.body is depthwise_planes._correlate:
        assert bool(plan.parameters["prefetches"]) == prefetches
    elif layout == "NHWC":
        steps = next(table for table in plan.tables if table.dtype == Steps.dtype)
        assert bool(steps["x_prefetch"].any()) == prefetches


@pytest.mark.parametrize("case", SOME, ids=str)
def test_bits(case, rng):
    """The same for any number of threads, and for a sample in any batch."""
    f = functions(case.ndim)
    batch = (5, *case.input[1:])
    x, w = normal(rng, batch, "float32"), normal(rng, case.weight, "float32")
    dy = normal(rng, (5, *case.output[1:]), "float32")
    before = fc.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 7):
            fc.set_num_threads(threads)
            y = f.conv(x, w, activation="relu", **case.options)
            results.append((y, *f.backward(x, w, dy, needs=("input", "weight"), **case.options)[:2]))
    finally:
        fc.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)
    for n in range(5):
        y = f.conv(x[n : n + 1], w, activation="relu", **case.options)
        assert_same_bits(y[0], results[0][0][n])
        dx = f.input_grad(x[n : n + 1].shape, w, dy[n : n + 1], **case.options)
        assert_same_bits(dx[0], results[0][1][n])


@pytest.mark.parametrize("case", SOME, ids=str)
def test_views_and_accumulate(case, rng):
    """On whole numbers: bias, relu, accumulate, and arrays of any strides in and out."""
    f, plain = functions(case.ndim), case.plain_options
    x, w, b, dy = (integers(rng, shape) for shape in (case.input, case.weight, case.weight[:1], case.output))
    expected = (
        np.maximum(oracle.convolution(x, w, b, **plain), 0),
        oracle.weight_grad(x, dy, np.ones(case.weight), weight_shape=case.weight, **plain),
        oracle.input_grad(w, dy, 1, input_shape=case.input, **plain),
    )
    for view in ("strided", "reversed", "transposed"):
        see = VIEWS[view]
        out = [see(np.ones(a.shape)) for a in expected]
        f.conv(see(x), see(w), see(b), activation="relu", out=out[0], **case.options)
        f.weight_grad(see(x), w.shape, see(dy), out=out[1], accumulate=True, **case.options)
        f.input_grad(x.shape, see(w), see(dy), out=out[2], accumulate=True, **case.options)
        for one, other in zip(out, expected, strict=True):
            np.testing.assert_array_equal(one, other, view)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_special_values_stay_local(case, value, rng):
    """Each of several places of one nan or infinity, in every operand."""
    f, plain = functions(case.ndim), case.plain_options
    for spoiled in range(3):
        for _ in range(3):
            x, w, dy = operands = [integers(rng, s) for s in (case.input, case.weight, case.output)]
            operands[spoiled].flat[rng.integers(operands[spoiled].size)] = value
            with np.errstate(invalid="ignore"):
                if spoiled != 2:
                    np.testing.assert_array_equal(f.conv(x, w, **case.options), oracle.convolution(x, w, **plain))
                if spoiled != 1:
                    exact = oracle.weight_grad(x, dy, weight_shape=case.weight, **plain)
                    np.testing.assert_array_equal(f.weight_grad(x, w.shape, dy, **case.options), exact)
                if spoiled != 0:
                    exact = oracle.input_grad(w, dy, input_shape=case.input, **plain)
                    np.testing.assert_array_equal(f.input_grad(x.shape, w, dy, **case.options), exact)


def test_scratch_stays_small():
    """Below 2 MiB for each worker, whatever the image and filter."""
    shapes = [
        ((1, 1, 1, 1, 10_000_000), (1, 1, 4), (1, 2, 160)),
        ((1, 1, 1, 1, 1_000_000), (1, 1, 5000), (1, 2, 160)),
        ((1, 1, 1, 9000, 9000), (1, 15, 15), (1, 2, 8)),
        ((1, 1, 1, 9000, 9000), (1, 3, 3), (1, 2)),
        ((1, 1, 1, 64, 1_000_000), (1, 3, 3), (1, 2)),
        ((1, 1, 1, 64, 1_000_000), (1, 31, 31), (1, 2, 8)),
        ((1, 1, 300, 300, 300), (3, 3, 3), (1, 2, 8)),
    ]
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        for shape, kernel, strides in shapes:
            for stride in strides:
                plans = plans_of(shape, kernel, stride, dtype)
                assert all(plan.scratch < 2**21 for plan in plans), (shape, kernel, stride, dtype)


def plans_of(shape, kernel, stride, dtype):
    one = (1, 1, 1)
    geometry = ConvGeometry(
        shape[0], shape[1], shape[1], shape[1], shape[2:], kernel, (1, 1, stride), one, (0, 0, 0), (0, 0, 0), "zeros"
    )
    assert depthwise.applies(geometry)
    return [
        methods.plan_of(methods.problem_of(operation, geometry, dtype, "direct", workers=2)).plan
        for operation in methods.OPERATIONS
    ]


def test_blocks_of_filter_rows():
    """Every number of rows is cut into rows that there is a function for, as few as possible."""
    allowed = {stride: (1, *(rows for rows, s in SHARED_ROWS if s == stride)) for stride in (1, 2)}
    for stride, rows in allowed.items():
        for taps in range(1, 40):
            cut = depthwise.cut(taps, rows)
            assert sum(cut) == taps
            assert set(cut) <= set(rows)
            assert len(cut) <= -(-taps // 7) + 2, (stride, taps)


@needs_x86
@pytest.mark.parametrize(("processor", "dtype"), [("avx2", "float32"), ("sse", "float64")])
def test_other_vectors(processor, dtype):
    """With the vectors of older processors, on whole numbers. Few cases, since each compiles functions of its own."""
    code = """
        import sys
        import numpy as np
        import oracle, test_depthwise
        from fastconv.arguments import LAYOUTS
        from helpers import functions, integers
        rng = np.random.default_rng(0)
        for name in ("width_13", "stride2_3x3_13x70", "multiplier_3", "1d_k4", "channels_13", "channels_stride2_5x5"):
            case = test_depthwise.BY_NAME[name]
            f, plain = functions(case.ndim), case.plain_options
            x, w, dy = (integers(rng, s, sys.argv[1]) for s in (case.input, case.weight, case.output))
            y, dw = f.conv(x, w, **case.options), f.weight_grad(x, w.shape, dy, **case.options)
            dx = f.input_grad(x.shape, w, dy, **case.options)
            np.testing.assert_array_equal(y, oracle.convolution(x, w, **plain), case.name)
            np.testing.assert_array_equal(dw, oracle.weight_grad(x, dy, weight_shape=w.shape, **plain), case.name)
            np.testing.assert_array_equal(dx, oracle.input_grad(w, dy, input_shape=x.shape, **plain), case.name)
            last = dict(case.options, layout=LAYOUTS[case.ndim][1])  # which is read in place
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
            np.testing.assert_array_equal(np.moveaxis(f.conv(x, w, **last), -1, 1), y, case.name)
            np.testing.assert_array_equal(np.moveaxis(f.input_grad(x.shape, w, dy, **last), -1, 1), dx, case.name)
        from fastconv.cpu.vector.tile import tile
        print(tile(8 * x.itemsize).lanes)
    """
    process = run_on(processor, code, dtype, path=[str(Path(__file__).parent)])
    assert int(output_of(process)) == PROCESSORS[processor].lanes(np.dtype(dtype).itemsize)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("per_group", [2, 4, 8])
@pytest.mark.parametrize(
    ("groups", "size", "kernel", "options"),
    [
        (32, (9, 31), 3, {"padding": 1}),
        (3, (14, 7), 1, {}),
        (5, (11, 20), 5, {"padding": 2, "stride": 2}),
        (4, (16, 15), 4, {"padding": 1, "stride": 3}),
        (5, (13, 12), 3, {"padding": 2, "dilation": (1, 2)}),
        (2, (9, 30), 3, {"padding": 4, "dilation": 3, "stride": 2}),
    ],
)
def test_groups_of_few_channels(groups, size, kernel, options, per_group, dtype, rng):
    """Channels-last, these are sums of depthwise convolutions; small integers, so every sum is exact."""
    channels = groups * per_group
    case = Case("", "", (3, channels, *size), (channels, per_group, kernel, kernel), groups=groups, **options)
    x, w, b, dy = (integers(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1], case.output))
    y = oracle.convolution(x, w, b, **case.plain_options)
    last = {**case.options, "layout": "NHWC"}
    np.testing.assert_array_equal(fc.conv2d(channels_last(x), w, b, **last), channels_last(y))
    np.testing.assert_array_equal(
        fc.conv2d(channels_last(x), w, b, activation="relu", **last), np.maximum(channels_last(y), 0)
    )
    dx = channels_last(oracle.input_grad(w, dy, input_shape=case.input, **case.plain_options))
    for weight in (w, np.asfortranarray(w)):
        got = fc.conv2d_input_grad(dx.shape, weight, channels_last(dy), **last)
        np.testing.assert_array_equal(got, dx)
    fc.conv2d_input_grad(dx.shape, w, channels_last(dy), out=got, accumulate=True, **last)
    np.testing.assert_array_equal(got, 2 * dx)
    dw = oracle.weight_grad(x, dy, weight_shape=w.shape, **case.plain_options)
    for out in (np.ones(w.shape, dtype), np.ones(w.shape[::-1], dtype).T):
        for accumulate in (True, False):
            out[...] = 1
            fc.conv2d_weight_grad(
                channels_last(x), w.shape, channels_last(dy), out=out, accumulate=accumulate, **last
            )
            np.testing.assert_array_equal(out, dw + accumulate)
    infinite = w.copy()
    infinite[0, 0, 0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        expected = channels_last(oracle.convolution(x, infinite, b, **case.plain_options))
    np.testing.assert_array_equal(fc.conv2d(channels_last(x), infinite, b, **last), expected)


@pytest.mark.parametrize("per_group", [2, 4, 8])
def test_groups_of_few_channels_in_any_batch_and_by_any_threads(per_group, rng):
    """A sample alone, in a batch, prepared or not has the same bits, for any number of threads."""
    x, w = normal(rng, (5, 57, 61, 40), np.float32), normal(rng, (40, per_group, 3, 3), np.float32)
    options = {"padding": 1, "groups": 40 // per_group, "layout": "NHWC", "algorithm": "direct"}

    def results(part):
        y = fc.conv2d(x[part], w, **options)
        assert_same_bits(fc.Conv2d(w, **options)(x[part]), y)
        return y, fc.conv2d_input_grad(y.shape, w, y, **options)

    before = fc.get_num_threads()
    try:
        fc.set_num_threads(1)
        expected = results(slice(None))
        dw = fc.conv2d_weight_grad(x, w.shape, expected[0], **options)
        for part in (slice(0, 1), slice(2, 4)):
            for actual, whole in zip(results(part), expected, strict=True):
                assert_same_bits(actual, whole[part])
        fc.set_num_threads(2)
        for actual, whole in zip(results(slice(None)), expected, strict=True):
            assert_same_bits(actual, whole)
        assert_same_bits(fc.conv2d_weight_grad(x, w.shape, expected[0], **options), dw)
    finally:
        fc.set_num_threads(before)


def test_who_computes_groups_of_few_channels():
    def geometry(groups, per_group, out_per_group):
        return ConvGeometry(
            batch=2, in_channels=groups * per_group, out_channels=groups * out_per_group, groups=groups,
            input_size=(1, 9, 9), kernel_size=(1, 3, 3), stride=(1, 1, 1), dilation=(1, 1, 1), pad_before=(0, 1, 1),
            pad_after=(0, 1, 1), padding_mode="zeros",
        )  # fmt: skip

    def has_plan(groups, per_group, out_per_group, last=True):
        g = geometry(groups, per_group, out_per_group)
        problem = methods.problem_of("forward", g, np.dtype(np.float32), "direct", workers=2)
        if last:
            x, y = (
                np.empty((2, 1, 9, 9, n), np.float32).transpose(0, 4, 1, 2, 3) for n in (g.in_channels, g.out_channels)
            )
            problem = problem._replace(input=x.strides, output=y.strides)
        return methods.choose(problem).name == "grouped"

    t = tile(32)
    for n in (2, 4, 8):
        assert has_plan(5, n, n) == (t.rows > 8 and t.lanes % n == 0)
        assert not has_plan(5, n, n, last=False)
    assert not any((has_plan(5, 3, 3), has_plan(5, 4, 8), has_plan(5, 16, 16), has_plan(5, 1, 2)))
