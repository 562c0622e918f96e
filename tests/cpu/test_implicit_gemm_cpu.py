"""The CPU engine's own choices: who packs the weights, of any memory layout, and how a weight gradient is cut."""

import numpy as np
import pytest

import fastconv as fc
import oracle
from fastconv.cpu import methods
from fastconv.cpu.implicit_gemm import SLAB_BYTES, TILE_BYTES, gradient, is_better_exchanged
from fastconv.cpu.phases import choose_rows, phase_runs
from fastconv.cpu.vector.tile import tile as tile_of
from fastconv.geometry import ConvGeometry
from helpers import channels_first, channels_last, fortran_last, integers, reversed_, strided, transposed

# (input shape, output channels, kernel, stride): all pixels fit the cache, and tasks pack the weights; or they do not.
FEW = [((4, 40, 7, 7), 70, (3, 3), 1), ((3, 24, 9, 9), 33, (5, 5), 2), ((2, 520, 5, 5), 65, (1, 1), 1)]
MANY = [((4, 40, 56, 56), 70, (3, 3), 1), ((3, 24, 90, 90), 33, (5, 5), 2), ((2, 300, 64, 64), 65, (1, 1), 1)]
LAYOUTS = {"fortran": fortran_last, "reversed": reversed_, "strided": strided, "transposed": transposed}


def _case(case, dtype, rng):
    shape, out_channels, kernel, stride = case
    x, w = integers(rng, shape, dtype), integers(rng, (out_channels, shape[1], *kernel), dtype)
    return x, w, {"stride": stride, "padding": kernel[0] // 2, "algorithm": "direct"}


@pytest.mark.parametrize("few", [True, False])
def test_who_packs_the_weights(few: bool) -> None:
    """The cases below are what they are meant to be."""
    for shape, out_channels, kernel, stride in FEW if few else MANY:
        size = (1, *shape[2:])
        pad = (0, kernel[0] // 2, kernel[1] // 2)
        geometry = ConvGeometry(
            batch=shape[0], in_channels=shape[1], out_channels=out_channels, groups=1, input_size=size,
            kernel_size=(1, *kernel), stride=(1, stride, stride), dilation=(1, 1, 1), pad_before=pad, pad_after=pad,
            padding_mode="zeros",
        )  # fmt: skip
        problem = methods.problem_of("forward", geometry, np.dtype(np.float32), "direct", workers=2)
        assert methods.plan_of(problem).product.packs == few


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*FEW, *MANY])
def test_weights_of_any_memory_layout(case, layout: str, dtype: type, rng: np.random.Generator) -> None:
    """Small integers: every sum is exact, so the results are those of the oracle to the bit."""
    x, w, options = _case(case, dtype, rng)
    pads = [(options["padding"],) * 2] * 2
    known = {"stride": (options["stride"],) * 2, "padding": pads, "dilation": (1, 1), "groups": 1}
    view = LAYOUTS[layout](w)
    y = oracle.convolution(x, w, padding_mode="zeros", **known)
    np.testing.assert_array_equal(fc.conv2d(x, view, **options), y)
    dx = oracle.input_grad(w, y, input_shape=x.shape, padding_mode="zeros", **known)
    np.testing.assert_array_equal(fc.conv2d_input_grad(x.shape, view, y, **options), dx)


# (input shape, output channels, kernel, strides, dilations, groups): phases of few and many taps, several windows of
# taps, more taps than a block of the reduction has, phases without taps
PHASES = [
    ((2, 20, 11, 11), 70, (3, 3), (2, 2), (1, 1), 1), ((1, 6, 13, 15), 40, (7, 7), (3, 2), (1, 1), 2),
    ((1, 2, 1, 2100), 3, (1, 1001), (1, 2), (1, 1), 1), ((2, 30, 9, 9), 34, (3, 3), (4, 3), (2, 1), 2),
    ((1, 64, 8, 8), 64, (5, 5), (2, 2), (2, 2), 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("case", PHASES)
def test_weights_of_all_phases(case, layout: str, dtype: type, rng: np.random.Generator) -> None:
    """The phases of a strided input gradient take their taps from the weights together."""
    shape, out_channels, kernel, stride, dilation, groups = case
    w = integers(rng, (out_channels, shape[1] // groups, *kernel), dtype)
    known = {"stride": stride, "padding": [(1, 1), (0, 2)], "dilation": dilation, "groups": groups}
    y = oracle.convolution(np.zeros(shape, dtype), w, padding_mode="zeros", **known)
    y = integers(rng, y.shape, dtype)
    dx = oracle.input_grad(w, y, input_shape=shape, padding_mode="zeros", **known)
    view = LAYOUTS.get(layout, np.ascontiguousarray)(w)
    np.testing.assert_array_equal(fc.conv2d_input_grad(shape, view, y, algorithm="direct", **known), dx)
    np.testing.assert_array_equal(
        fc.conv2d_input_grad(shape, view, y, algorithm="direct", out=np.ones_like(dx), accumulate=True, **known), dx + 1
    )


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        # size, taps, stride, dilation, padding before, output positions
        ((24, 8, 8, 1, 0, 3), [range(8)]),  # touching windows: one tap each
        ((23, 8, 8, 1, 0, 2), [range(7), [7]]),  # the last has one element less
        ((30, 6, 4, 1, 0, 7), [range(2), range(2, 4)]),  # two taps, one tap
        ((28, 6, 4, 1, 1, 6), [[0], range(1, 3), [3]]),  # the first and the last of two taps see other windows
        ((28, 5, 7, 3, 0, 3), [[0, 3, 6], [1], [2, 5], [4]]),  # the taps read 0, 3, 6, 7 + 2 and 7 + 5
        ((9, 3, 1, 1, 1, 9), [[0]]),
        ((12, 2, 3, 1, 0, 4), [range(2), [2]]),  # the third is reached by no tap
    ],
)
def test_phases_that_are_rows_of_one_product(sizes, runs) -> None:
    """A window of the same position reads the elements of a run, with neighbouring taps."""
    assert phase_runs(*sizes) == [tuple(run) for run in runs]


# (input shape, output channels, kernel, strides, padding, dilations, groups), and how rows are chosen for an input
# gradient with channels first and last: (are phases rows, each channel alone)
ROWS = [
    (((2, 1, 1, 803), 16, (1, 50), (1, 20), (0, 30), (1, 1), 1), (True, False), (True, False)),
    (((1, 1, 700, 1), 9, (30, 1), (16, 1), (7, 0), (3, 1), 1), (True, False), (True, False)),
    (((2, 3, 24, 33), 20, (8, 8), (8, 8), (0, 0), (1, 1), 1), (True, True), (True, False)),
    (((1, 6, 17, 16), 8, (4, 4), (4, 4), (0, 0), (1, 1), 2), (False, False), (False, False)),
    (((2, 16, 12, 12), 20, (4, 4), (4, 4), (0, 0), (1, 1), 1), (False, False), (False, False)),
    (((1, 2, 1, 4000), 10, (1, 1200), (1, 1100), (0, 1), (1, 1), 2), (True, False), (True, False)),
]


@pytest.mark.parametrize("form", ["first", "last", *LAYOUTS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("case", "first", "last"), ROWS)
def test_phases_as_rows(case, first, last, dtype, form, rng: np.random.Generator) -> None:
    """Small integers: every sum is exact. With bias and relu, as a transposed convolution has them, and added to."""
    shape, out_channels, kernel, stride, padding, dilation, groups = case
    known = {"stride": stride, "padding": [(p, p) for p in padding], "dilation": dilation, "groups": groups}
    w = integers(rng, (out_channels, shape[1] // groups, *kernel), dtype)
    dy = oracle.convolution(np.zeros(shape, dtype), w, padding_mode="zeros", **known)
    dy = integers(rng, dy.shape, dtype)
    dx = oracle.input_grad(w, dy, input_shape=shape, padding_mode="zeros", **known)
    view = LAYOUTS.get(form, np.ascontiguousarray)
    options = {**known, "layout": "NHWC" if form == "last" else "NCHW", "algorithm": "direct"}
    if form == "last":
        dy, dx = channels_last(dy), channels_last(dx)
    if form in ("first", "last"):
        plane = np.empty((*shape[:2], 1, *shape[2:]), dtype)
        plane = np.moveaxis(channels_last(plane), -1, 1) if form == "last" else plane
        geometry = ConvGeometry(
            batch=shape[0], in_channels=shape[1], out_channels=out_channels, groups=groups,
            input_size=(1, *shape[2:]), kernel_size=(1, *kernel), stride=(1, *stride), dilation=(1, *dilation),
            pad_before=(0, *padding), pad_after=(0, *padding), padding_mode="zeros",
        )  # fmt: skip
        of_weight, of_plane = (
            tuple(step // plane.itemsize for step in array.strides) for array in (w[:, :, None], plane)
        )
        rows = choose_rows(geometry, plane.dtype, of_weight, of_plane)
        are_rows = any(len(run) > 1 for run in rows.runs[rows.axis])
        assert (are_rows, rows.each_channel) == (last if form == "last" else first)
    for add in (False, True):
        out = view(np.ones(dx.shape, dtype))
        assert fc.conv2d_input_grad(dx.shape, view(w), view(dy), out=out, accumulate=add, **options) is out
        np.testing.assert_array_equal(out, dx + add)
    b = integers(rng, shape[1:2], dtype)
    extra = [
        n - ((p - 1) * s - 2 * a + d * (k - 1) + 1)
        for n, p, s, a, d, k in zip(
            shape[2:], dy.shape[1:3] if form == "last" else dy.shape[2:], stride, padding, dilation, kernel, strict=True
        )
    ]
    y = fc.conv_transpose2d(
        view(dy), view(w), b, stride, padding, extra, groups, dilation, activation="relu", layout=options["layout"],
        algorithm="direct", out=view(np.ones(dx.shape, dtype)),
    )  # fmt: skip
    np.testing.assert_array_equal(y, np.maximum(dx + (b if form == "last" else b[:, None, None]), 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("taps", [1, 3])
def test_pixels_beyond_the_last_vector(taps: int, dtype: type, rng: np.random.Generator) -> None:
    """Few of them are multiplied with rows for lanes, more as a vector that is not full: the bits are the same."""
    t = tile_of(np.dtype(dtype).itemsize * 8)
    lanes, few = t.lanes, t.narrow_columns
    assert few < lanes
    x = rng.standard_normal((1, 410, 4 * lanes)).astype(dtype)
    w, bias = rng.standard_normal((37, 410, taps)).astype(dtype), rng.standard_normal(37).astype(dtype)
    x[0, 3, 2], w[5, 7] = np.nan, np.inf
    options = {"bias": bias, "activation": "relu", "algorithm": "direct"}
    whole = fc.conv1d(x, w, **options)
    dy = rng.standard_normal(whole.shape).astype(dtype)
    dx = fc.conv1d_input_grad(x.shape, w, dy, algorithm="direct")
    for pixels in range(1, 2 * lanes + few + 2):
        width = pixels + taps - 1
        y = fc.conv1d(x[..., :width], w, **options)
        np.testing.assert_array_equal(y, whole[..., :pixels])
        added = np.ones((1, 410, pixels), dtype)
        start = taps - 1  # inputs that all windows of the taps see in both
        of_some = np.ascontiguousarray(dy[..., : pixels + start])
        shape = (1, 410, pixels + 2 * start)
        some = fc.conv1d_input_grad(shape, w, of_some, algorithm="direct")[..., start : start + pixels]
        np.testing.assert_array_equal(some, dx[..., start : start + pixels])
        fc.conv1d_input_grad(
            (1, 410, pixels), w[..., :1], of_some[..., :pixels], algorithm="direct", out=added, accumulate=True
        )
        alone = fc.conv1d_input_grad((1, 410, pixels), w[..., :1], of_some[..., :pixels], algorithm="direct")
        np.testing.assert_array_equal(added, 1 + alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("channels", "out_channels"), [(16, 96), (96, 16), (37, 150), (5, 70)])
def test_weight_gradient_of_exchanged_operands(channels, out_channels, groups, accumulate, dtype, rng) -> None:
    """That of a 1x1 kernel transposes the operand with fewer channels."""
    t = np.dtype(dtype)
    assert is_better_exchanged(t, 96, 16)
    assert not is_better_exchanged(t, 16, 96)
    x = integers(rng, (3, groups * channels, 9, 7), dtype)
    dy = integers(rng, (3, groups * out_channels, 9, 7), dtype)
    shape = (groups * out_channels, channels, 1, 1)
    exact = np.einsum("ngohw,ngchw->goc", *(a.reshape(3, groups, -1, 9, 7) for a in (dy, x))).reshape(shape)
    for out in (np.ones(shape, dtype), np.ones(shape[::-1], dtype).T, np.ones((*shape[:2], 1, 3), dtype)[..., ::3]):
        dw = fc.conv2d_weight_grad(x, shape, dy, groups=groups, out=out, accumulate=accumulate)
        np.testing.assert_array_equal(dw, exact + accumulate)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("channels", "out_channels", "stride"), [(2, 2, 1), (3, 4, 1), (4, 3, 2), (3, 3, 1)])
def test_weight_gradient_of_small_groups(channels, out_channels, stride, accumulate, dtype, rng) -> None:
    """It is computed channel by channel; small integers, so every sum is exact."""
    groups, size = 24, (1, 37, 41)
    geometry = ConvGeometry(
        batch=2, in_channels=groups * channels, out_channels=groups * out_channels, groups=groups, input_size=size,
        kernel_size=(1, 3, 3), stride=(1, stride, stride), dilation=(1, 1, 1), pad_before=(0, 1, 1),
        pad_after=(0, 1, 1), padding_mode="zeros",
    )  # fmt: skip
    x = integers(rng, (2, groups * channels, *size), dtype)
    dy = integers(rng, (2, groups * out_channels, *geometry.output_size), dtype)
    plan = methods.plan_of(methods.problem_of("weight_grad", geometry, x.dtype, "direct"))
    assert (plan.method.name == "grouped_by_channel") == tile_of(x.itemsize * 8).masks
    x, dy = x[:, :, 0], dy[:, :, 0]
    shape = (groups * out_channels, channels, 3, 3)
    known = {"stride": (stride, stride), "padding": [(1, 1)] * 2, "dilation": (1, 1), "groups": groups}
    exact = oracle.weight_grad(x, dy, weight_shape=shape, padding_mode="zeros", **known)
    for out in (np.ones(shape, dtype), np.ones(shape[::-1], dtype).T, np.ones((*shape[:3], 9), dtype)[..., ::3]):
        dw = fc.conv2d_weight_grad(x, shape, dy, out=out, accumulate=accumulate, **known)
        np.testing.assert_array_equal(dw, exact + accumulate)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("size", "stride"), [((47, 33), 1), ((60, 71), 2), ((5, 1050), 1), ((2, 6), 1)])
def test_weight_gradient_of_padded_images_in_parts(size, stride, mode, last, dtype, ahead, monkeypatch, rng) -> None:
    """Rows at the edges of images, between them, and pieces of long rows follow one another in a slab."""
    if ahead:
        monkeypatch.setattr(gradient, "PREFETCH_BYTES", 0)
    methods.forget_plans()
    shape = 71, 3, 3, 3
    known = {"stride": (stride, stride), "padding": [(2, 2)] * 2, "dilation": (2, 2), "padding_mode": mode}
    x = integers(rng, (3, 3, *size), dtype)
    dy = integers(rng, (3, 71, *[(n - 1) // stride + 1 for n in size]), dtype)
    exact = oracle.weight_grad(x, dy, weight_shape=shape, groups=1, **known)
    if last:
        x, dy = (channels_first(channels_last(a)) for a in (x, dy))
    np.testing.assert_array_equal(fc.conv2d_weight_grad(x, shape, dy, **known), exact)
    methods.forget_plans()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("case", [FEW[0], MANY[0], FEW[1], MANY[1]])
def test_infinite_weights_meet_no_zeros_that_are_not_there(case, accumulate: bool, rng: np.random.Generator) -> None:
    """The input gradient at the border: taps whose window does not exist are no products, so there is no 0 x inf."""
    x, w, options = _case(case, np.float32, rng)
    w[1, 2] = np.inf
    y = np.ones(fc.conv2d(x, np.zeros_like(w), **options).shape, np.float32)
    out = np.ones_like(x)
    dx = fc.conv2d_input_grad(x.shape, w, y, out=out, accumulate=accumulate, **options)
    finite = np.where(np.isinf(w), 0, w)
    expected = fc.conv2d_input_grad(x.shape, finite, y, **options) + np.float32(accumulate)
    expected[:, 2] = np.inf
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize(
    ("rows", "channels", "taps", "pixels", "units", "slab"),
    [(2048, 512, 1, 196, 1, 0), (512, 512, 9, 196, 1, 324), (64, 64, 1, 12544, 28, 0), (3, 5, 9, 10**6, 2000, 600),
     (1, 1, 1, 1, 1, 0), (40000, 8, 1, 64, 1, 64)],
)  # fmt: skip
def test_cut_of_a_weight_gradient(rows: int, channels: int, taps: int, pixels: int, units: int, slab: int) -> None:
    """No more blocks than there is to cut, and their sums and slab fit the cache."""
    tile = tile_of(32)
    channel_blocks, out_blocks, splits = gradient.gradient_blocks(
        1, rows, channels, taps, pixels, units, slab, 1, tile, 4
    )
    panels = -(-rows // (tile.lanes * tile.gradient_vectors))
    assert 1 <= channel_blocks <= channels
    assert 1 <= out_blocks <= panels
    assert 1 <= splits <= units
    block = -(-channels // channel_blocks)
    width = -(-panels // out_blocks) * tile.gradient_vectors * tile.lanes
    assert block == 1 or block * taps * min(width, -(-rows // tile.lanes) * tile.lanes) * 4 <= TILE_BYTES
    assert block == 1 or block * slab * 4 <= SLAB_BYTES
