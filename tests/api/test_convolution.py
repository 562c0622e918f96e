"""Convolution and its gradients: forward, weight, input, bias, on every case of `shapes.CASES`."""

from __future__ import annotations

import tracemalloc
import warnings

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

import fastconv as fc
import oracle
from helpers import DTYPES, LAYOUTS, VIEWS, channels_first, channels_last, functions, integers, normal
from shapes import CASES, KERNELS, LAYERS, SMALL, Case
from tolerance import assert_accurate, assert_same_bits, expect

FORMATS = ["float32-first", "float32-last", "float64-first", "float64-last"]
# 16-bit arrays are converted to float32 before anything looks at their layout: one layout each will do, and the small
# cases, since what has the tails and the blocks of a reduction are the kernels of float32.
HALVES = ["float16-first", "bfloat16-last"]
EVERY = [
    pytest.param(case, *kind.split("-"), id=f"{kind}-{case}")
    for kinds, cases in ((FORMATS, CASES), (HALVES, SMALL)) for kind in kinds for case in cases
]  # fmt: skip
every_case = pytest.mark.parametrize(("case", "dtype", "layout"), EVERY)


class Layout:
    """The case's arrays in one layout: `store` makes the caller's array of an (N, C, *S) one, `load` turns it back."""

    def __init__(self, case, name):
        self.last = name == "last"
        self.name = LAYOUTS[case.ndim][self.last]
        self.store = channels_last if self.last else lambda a: a
        self.load = channels_first if self.last else lambda a: a

    def shape(self, shape):
        return (shape[0], *shape[2:], shape[1]) if self.last else shape


@every_case
def test_forward(case, dtype, layout, backend, rng):
    layout = Layout(case, layout)
    x, w, b = (normal(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1]))
    y = functions(case.ndim).conv(layout.store(x), w, b, **case.options, layout=layout.name, backend=backend)
    assert y.dtype == x.dtype
    expected = expect(lambda x, w, b: oracle.convolution(x, w, b, **case.plain_options), x, w, b)
    assert_accurate(layout.load(y), expected)


@every_case
def test_weight_grad(case, dtype, layout, backend, rng):
    layout = Layout(case, layout)
    x, dy = normal(rng, case.input, dtype), normal(rng, case.output, dtype)
    dw = functions(case.ndim).weight_grad(
        layout.store(x), case.weight, layout.store(dy), **case.options, layout=layout.name, backend=backend
    )
    assert dw.dtype == x.dtype
    expected = expect(
        lambda x, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **case.plain_options), x, dy
    )
    assert_accurate(dw, expected)


@every_case
def test_input_grad(case, dtype, layout, backend, rng):
    layout = Layout(case, layout)
    w, dy = normal(rng, case.weight, dtype), normal(rng, case.output, dtype)
    dx = functions(case.ndim).input_grad(
        layout.shape(case.input), w, layout.store(dy), **case.options, layout=layout.name, backend=backend
    )
    assert dx.dtype == w.dtype
    expected = expect(lambda w, dy: oracle.input_grad(w, dy, input_shape=case.input, **case.plain_options), w, dy)
    assert_accurate(layout.load(dx), expected)


# The gradient of a bias knows no more of a case than the shape of its result.
OF_RESULTS = {(dtype, layout, case.output): (case, dtype, layout) for case, dtype, layout in (p.values for p in EVERY)}


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [pytest.param(*each, id=f"{each[1]}-{each[2]}-{each[0]}") for each in OF_RESULTS.values()],
)
def test_bias_grad(case, dtype, layout, backend, rng):
    layout = Layout(case, layout)
    dy = normal(rng, case.output, dtype)
    db = functions(case.ndim).bias_grad(layout.store(dy), layout=layout.name, backend=backend)
    assert db.dtype == dy.dtype
    assert_accurate(db, expect(oracle.bias_grad, dy))


# ---------------------------------------------------------------------------------------------------------------------
# From here on mostly whole numbers, on which every order of summation is exact: no tolerance is needed
# ---------------------------------------------------------------------------------------------------------------------

BY_NAME = {case.name: case for case in CASES}
# One of each kind, for what does not depend on the numbers: views, out, bias, layouts.
KINDS = [
    BY_NAME[name]
    for name in (
        "1d_causal", "1x1_stride2", "3x3_same", "3x3_stride2", "dilated_strided", "depthwise", "groups2", "replicate",
        "3d_strided", "primes", "terms_3x3_324", "depthwise_width_33", "stem_7x7",
    )
]  # fmt: skip


def whole_operands(case, rng, dtype="float32"):
    """x, w, b, dy of small whole numbers."""
    return tuple(integers(rng, shape, dtype) for shape in (case.input, case.weight, case.weight[:1], case.output))


def passes(case, backend, **extra):
    """The four passes as functions of (x, w, b, dy), and the results' shapes."""
    f, options = functions(case.ndim), {**case.options, "backend": backend, **extra}
    layout = {"layout": LAYOUTS[case.ndim][0], "backend": backend}
    return {
        "forward": (lambda x, w, b, dy, **kw: f.conv(x, w, b, **options, **kw), case.output),
        "weight": (lambda x, w, b, dy, **kw: f.weight_grad(x, w.shape, dy, **options, **kw), case.weight),
        "input": (lambda x, w, b, dy, **kw: f.input_grad(x.shape, w, dy, **options, **kw), case.input),
        "bias": (lambda x, w, b, dy, **kw: f.bias_grad(dy, **layout, **kw), case.weight[:1]),
    }


PASSES = ["forward", "weight", "input", "bias"]


@pytest.mark.parametrize("case", SMALL + KERNELS + LAYERS, ids=str)
def test_against_torch(case, rng):
    """torch.nn.functional and its autograd as a second oracle, in float64 on whole numbers: equal.

    Of what a convolution is; tails and long reductions are known to the oracle of the tests above as well.
    """
    torch = pytest.importorskip("torch", reason="torch is the second oracle, not a dependency")
    x, w, b, dy = whole_operands(case, rng, "float64")
    leaves = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, w, b)]
    mode = {"zeros": "constant"}.get(case.padding_mode, case.padding_mode)
    pad = [n for pair in reversed(case.pairs) for n in pair]
    padded = torch.nn.functional.pad(leaves[0], pad, mode) if any(pad) else leaves[0]
    y = getattr(torch.nn.functional, f"conv{case.ndim}d")(
        padded, *leaves[1:], stride=case.stride, dilation=case.dilation, groups=case.groups
    )
    expected = [y, *torch.autograd.grad(y, [leaves[1], leaves[0], leaves[2]], torch.from_numpy(dy))]
    for (run, _), result in zip(passes(case, "cpu").values(), expected, strict=True):
        np.testing.assert_array_equal(run(x, w, b, dy), result.detach().numpy())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", ["3x3_same", "2x2_same", "1d_dilated_same", "3d_2x2x2"])
def test_arguments_as_in_torch(name, rng):
    """The same call, argument by position, means the same in torch.nn.functional and torch.nn.grad."""
    torch = pytest.importorskip("torch", reason="torch is the second oracle, not a dependency")
    case = BY_NAME[name]
    x, w, b, _ = whole_operands(case, rng, "float64")
    f, nn = functions(case.ndim), torch.nn
    for padding in (1, "same", "valid"):
        tail = (1, padding, case.dilation, 1)
        result = getattr(nn.functional, f"conv{case.ndim}d")(*map(torch.from_numpy, (x, w, b)), *tail)
        np.testing.assert_array_equal(f.conv(x, w, b, *tail), result.numpy())
        if padding == 1:
            dy = integers(rng, tuple(result.shape))
            tx, tw, tdy = map(torch.from_numpy, (x, w, dy))
            dw = getattr(nn.grad, f"conv{case.ndim}d_weight")(tx, w.shape, tdy, *tail)
            np.testing.assert_array_equal(f.weight_grad(x, w.shape, dy, *tail), dw.numpy())
            dx = getattr(nn.grad, f"conv{case.ndim}d_input")(x.shape, tw, tdy, *tail)
            np.testing.assert_array_equal(f.input_grad(x.shape, w, dy, *tail), dx.numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Padding: every way to write it
# ---------------------------------------------------------------------------------------------------------------------

# size, kernel, stride, dilation: (before, after) that "same" means, by hand: ceil(size/stride) windows, the last of
# which ends `after` beyond the input
SAME = [
    ((5, 3, 1, 1), (1, 1)),
    ((5, 2, 1, 1), (0, 1)),
    ((5, 4, 1, 1), (1, 2)),
    ((5, 1, 1, 1), (0, 0)),
    ((5, 3, 1, 2), (2, 2)),
    ((5, 2, 1, 3), (1, 2)),
    ((5, 3, 2, 1), (1, 1)),  # windows begin at -1, 1, 3
    ((6, 3, 2, 1), (0, 1)),  # 0, 2, 4
    ((6, 4, 2, 1), (1, 1)),  # -1, 1, 3
    ((7, 4, 2, 1), (1, 2)),  # -1, 1, 3, 5
    ((7, 2, 3, 1), (0, 1)),  # 0, 3, 6
    ((7, 2, 5, 1), (0, 0)),  # 0, 5: needs no padding
    ((8, 2, 5, 1), (0, 0)),  # 0, 5
    ((1, 3, 2, 2), (2, 2)),
]


@pytest.mark.parametrize(("sizes", "pair"), SAME)
def test_same_padding(sizes, pair, backend, rng):
    size, kernel, stride, dilation = sizes
    x, w = integers(rng, (2, 2, size), "float32"), integers(rng, (3, 2, kernel), "float32")
    options = {"stride": stride, "dilation": dilation, "backend": backend}
    y = fc.conv1d(x, w, padding="same", **options)
    assert y.shape[2] == -(-size // stride)
    np.testing.assert_array_equal(y, fc.conv1d(x, w, padding=(pair,), **options))


@pytest.mark.parametrize(
    ("word", "pairs"), [("valid", ((0, 0), (0, 0))), ("full", ((2, 2), (3, 3))), ("same", ((1, 1), (1, 2)))]
)
def test_padding_words(word, pairs, backend, rng):
    """Of a 3 x 2 kernel with dilation 1 and 3, for all passes."""
    x, w = integers(rng, (1, 2, 4, 5), "float32"), integers(rng, (2, 2, 3, 2), "float32")
    options = {"dilation": (1, 3), "backend": backend}
    y = fc.conv2d(x, w, padding=word, **options)
    np.testing.assert_array_equal(y, fc.conv2d(x, w, padding=pairs, **options))
    for grad, twin in zip(*(fc.conv2d_backward(x, w, y, padding=p, **options) for p in (word, pairs)), strict=True):
        np.testing.assert_array_equal(grad, twin)


@pytest.mark.parametrize(
    "padding",
    [(1, 2), [1, 2], np.array([1, 2]), (np.int64(1), np.uint8(2)), ((1, 1), (2, 2)), [[1, 1], [2, 2]], ([1, 1], (2, 2)),
     np.array([[1, 1], [2, 2]])],
    ids=repr,
)  # fmt: skip
def test_padding_spellings(padding, rng):
    x, w = integers(rng, (1, 2, 4, 5), "float32"), integers(rng, (2, 2, 3, 4), "float32")
    expected = oracle.convolution(
        x, w, stride=(1, 1), padding=((1, 1), (2, 2)), dilation=(1, 1), groups=1, padding_mode="zeros"
    )
    np.testing.assert_array_equal(fc.conv2d(x, w, padding=padding), expected)


@pytest.mark.parametrize("two", [(2, 1), [2, 1], np.array([2, 1]), (np.int32(2), np.uint8(1))], ids=repr)
def test_stride_and_dilation_spellings(two, rng):
    x, w = integers(rng, (1, 2, 7, 8), "float32"), integers(rng, (2, 2, 3, 2), "float32")
    plain = {"padding": ((0, 0), (0, 0)), "groups": 1, "padding_mode": "zeros"}
    expected = oracle.convolution(x, w, stride=(2, 1), dilation=(1, 1), **plain)
    np.testing.assert_array_equal(fc.conv2d(x, w, stride=two), expected)
    expected = oracle.convolution(x, w, stride=(1, 1), dilation=(2, 1), **plain)
    np.testing.assert_array_equal(fc.conv2d(x, w, dilation=two, groups=np.int64(1)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Bias, relu, shapes without batch, empty batch, backward
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_bias_and_relu(case, dtype, backend, rng):
    x, w, b, _ = whole_operands(case, rng, dtype)
    conv = functions(case.ndim).conv
    y = conv(x, w, **case.options, backend=backend)
    with_bias = oracle.convolution(
        *(a.astype(np.float64) for a in (x, w, b)), **case.plain_options
    )
    np.testing.assert_array_equal(
        y, oracle.convolution(x.astype(np.float64), w.astype(np.float64), **case.plain_options).astype(DTYPES[dtype])
    )
    np.testing.assert_array_equal(
        conv(x, w, b, **case.options, backend=backend), with_bias.astype(DTYPES[dtype]), "bias"
    )
    np.testing.assert_array_equal(
        conv(x, w, b, **case.options, activation="relu", backend=backend),
        np.maximum(with_bias, 0).astype(DTYPES[dtype]),
        "relu comes after the bias",
    )
    np.testing.assert_array_equal(
        conv(x, w, **case.options, activation="relu", backend=backend), np.maximum(y, np.zeros((), y.dtype))
    )


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_unbatched(case, last, backend, rng):
    """Without the batch dimension: the shapes of one sample, the bits of a batch of one."""
    x, w, b, dy = whole_operands(case, rng)
    layout = {"layout": LAYOUTS[case.ndim][last], "backend": backend}
    x, dy = (channels_last(a) if last else a for a in (x[:1], dy[:1]))
    f = functions(case.ndim)
    options = {**case.options, **layout}
    assert_same_bits(f.conv(x[0], w, b, **options), f.conv(x, w, b, **options)[0])
    batched, single = (
        f.backward(x, w, dy, **options),
        f.backward(x[0], w, dy[0], **options),
    )
    assert_same_bits(single.input, batched.input[0])
    assert_same_bits(single.weight, batched.weight)
    assert_same_bits(single.bias, batched.bias)
    assert_same_bits(f.bias_grad(dy[0], **layout), batched.bias)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_bare(ndim, backend, rng):
    """A bare signal, plane or volume with a bare kernel, for all passes."""
    size, kernel = (5, 4, 6)[:ndim], (2, 3, 2)[:ndim]
    x, w, b = integers(rng, size, "float32"), integers(rng, kernel, "float32"), integers(rng, (1,), "float32")
    f, options = functions(ndim), {"padding": 1, "stride": 2, "backend": backend}
    lead = (None, None)
    y = f.conv(x, w, b, **options)
    batched = f.conv(x[lead], w[lead], b, **options)
    assert y.ndim == ndim
    assert_same_bits(y, batched[0, 0])
    grads, expected = f.backward(x, w, y, **options), f.backward(x[lead], w[lead], batched, **options)
    assert_same_bits(grads.input, expected.input[0, 0])
    assert_same_bits(grads.weight, expected.weight[0, 0])
    assert_same_bits(grads.bias, expected.bias)
    for last in LAYOUTS[ndim]:
        assert_same_bits(f.conv(x, w, b, **options, layout=last), y)
        assert_same_bits(f.bias_grad(y, layout=last, backend=backend), expected.bias)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_backward(case, backend, rng):
    """All gradients at once are the gradients one by one, and None where not asked for."""
    x, w, _, dy = whole_operands(case, rng)
    f = functions(case.ndim)
    options = {**case.options, "backend": backend}
    single = {
        "input": f.input_grad(x.shape, w, dy, **options),
        "weight": f.weight_grad(x, w.shape, dy, **options),
        "bias": f.bias_grad(dy, layout=LAYOUTS[case.ndim][0], backend=backend),
    }
    wanted = [(), ("weight",), ["bias", "input"], ("input", "weight", "bias")]
    for needs in wanted if case.macs < 20_000 else wanted[-1:]:
        grads = f.backward(x, w, dy, **options, needs=needs)
        assert isinstance(grads, fc.ConvGrads)
        for name, grad in grads._asdict().items():
            if name in needs:
                assert_same_bits(grad, single[name])
            else:
                assert grad is None
    for grad, expected in zip(f.backward(x, w, dy, **options), single.values(), strict=True):
        assert_same_bits(grad, expected)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_empty_batch(ndim, dtype, backend):
    """Empty results, zero-filled weight and bias gradients."""
    kernel = (3,) * ndim
    x, w = np.ones((0, 2, *(5,) * ndim), DTYPES[dtype]), np.ones((4, 2, *kernel), DTYPES[dtype])
    f = functions(ndim)
    y = f.conv(x, w, np.ones(4, w.dtype), backend=backend)
    assert (y.shape, y.dtype) == ((0, 4, *kernel), w.dtype)
    grads = f.backward(x, w, y, backend=backend)
    assert (grads.input.shape, grads.input.dtype) == (x.shape, w.dtype)
    assert_same_bits(grads.weight, np.zeros_like(w))
    assert_same_bits(grads.bias, np.zeros(4, w.dtype))
    kept = np.full_like(w, 3)
    assert f.weight_grad(x, w.shape, y, out=kept, accumulate=True, backend=backend) is kept
    assert_same_bits(kept, np.full_like(w, 3))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_stride_beyond_the_input(groups, rng):
    """There is one window, and no more memory for it than for any other."""
    x, w = integers(rng, (2, 3, 8, 7), "float32"), integers(rng, (6, 3 // groups, 3, 3), "float32")
    y = fc.conv2d(x, w, groups=groups)[:, :, :1, :1]
    grads = fc.conv2d_backward(x[:, :, :3, :3], w, y, groups=groups)
    tracemalloc.start()
    try:
        for stride in (9, 1000, 2**31 - 1):
            np.testing.assert_array_equal(fc.conv2d(x, w, stride=stride, groups=groups), y)
            far = fc.conv2d_backward(x, w, y, stride=stride, groups=groups)
            np.testing.assert_array_equal(far.weight, grads.weight)
            np.testing.assert_array_equal(far.input[:, :, :3, :3], grads.input)
            assert not far.input[:, :, 3:].any()
            assert not far.input[:, :, :, 3:].any()
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Memory: any strides in and out, accumulate, inputs left as they were
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_views(case, which, backend, rng):
    """Strided, transposed, reversed, read-only and misaligned inputs give the same result and stay as they were."""
    operands = whole_operands(case, rng)
    run, _ = passes(case, backend)[which]
    expected = run(*operands)
    views = VIEWS if case.macs < 20_000 else {name: VIEWS[name] for name in ("reversed", "channels_last_memory")}
    for name, view in views.items():
        seen = [view(a) for a in operands]
        np.testing.assert_array_equal(run(*seen), expected, name)
        for array, original in zip(seen, operands, strict=True):
            np.testing.assert_array_equal(array, original, "inputs are only read")


SLENDER = [
    Case("columns", "outputs of one column, more than a vector of them", (3, 7, 24, 1), (10, 7, 5, 1)),
    Case("one_column_left", "a kernel as wide as the input", (2, 33, 35, 2), (21, 11, 1, 2), padding=(2, 0), groups=3),
    Case("strided_columns", "phases of one column", (1, 16, 9, 4), (12, 4, 3, 3), stride=(3, 5), padding=1, groups=4),
    Case("columns_1x1", "a matrix product of columns", (2, 5, 19, 1), (7, 5, 1, 1)),
    Case("lines", "one row of one plane", (1, 6, 4, 1, 1), (5, 6, 3, 1, 1), padding=1),
    Case("depthwise_columns", "the vectors of depthwise convolutions", (2, 16, 19, 1), (16, 1, 3, 1), groups=16),
    BY_NAME["one_pixel"],
]


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", SLENDER, ids=str)
def test_an_axis_of_one_element_has_any_stride(case, which, backend, rng):
    """Its stride leads nowhere: NumPy gives it that of an element, of zero, or one that points out of the array."""
    operands = whole_operands(case, rng)
    run, shape = passes(case, backend)[which]
    expected = run(*operands)
    for step in (4, 0, -4, 4096):
        for view in (VIEWS["reversed"], VIEWS["channels_last_memory"]):
            seen = [_with_stride_of_ones(view(a), step) for a in operands]
            frame = np.full((3, *shape), 77, np.float32)
            frame[1] = np.nan
            out = _with_stride_of_ones(frame[1, ..., ::-1, :] if len(shape) > 1 else frame[1], step)
            np.testing.assert_array_equal(run(*seen, out=out), expected, f"step {step}")
            assert (frame[::2] == 77).all(), "elements beside `out` were written"


def _with_stride_of_ones(array, step):
    steps = [step if n == 1 else old for n, old in zip(array.shape, array.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(array, array.shape, steps)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", KINDS[:8], ids=str)
def test_broadcast_inputs(case, which, backend, rng):
    """One number or one sample, seen as a whole array through strides of zero."""
    shapes = (case.input, case.weight, case.weight[:1], case.output)
    numbers = [integers(rng, (1,) * len(shape), "float32") + 1 for shape in shapes]
    seen = [np.broadcast_to(a, shape) for a, shape in zip(numbers, shapes, strict=True)]
    run, _ = passes(case, backend)[which]
    np.testing.assert_array_equal(run(*seen), run(*(a.copy() for a in seen)))


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_out(case, which, dtype, backend, rng):
    """`out` of any strides is filled, returned, and nothing beside it is touched."""
    operands = whole_operands(case, rng, dtype)
    run, shape = passes(case, backend)[which]
    expected = run(*operands)
    assert expected.shape == shape
    for name in ("strided", "transposed", "reversed"):
        out = VIEWS[name](np.full(shape, np.nan, DTYPES[dtype]))
        assert run(*operands, out=out) is out
        np.testing.assert_array_equal(out, expected, name)
        if name == "strided":
            out[...] = 77
            assert (out.base == 77).all(), "the elements between were written"


@pytest.mark.parametrize("which", ["weight", "input", "bias"])
@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_accumulate(case, which, dtype, backend, rng):
    operands = [a // 2 for a in whole_operands(case, rng, dtype)]
    run, shape = passes(case, backend)[which]
    start = integers(rng, shape, dtype)
    exact = run(*(a.astype(np.float64) for a in operands)) + start.astype(np.float64)
    for name in ("strided", "reversed"):
        out = VIEWS[name](start)
        assert run(*operands, out=out, accumulate=True) is out
        np.testing.assert_array_equal(out, exact.astype(DTYPES[dtype]), name)
    out = start.copy()
    run(*operands, out=out, accumulate=False)
    np.testing.assert_array_equal(out, run(*operands))


def test_inputs_may_be_one_array(backend, rng):
    """Only `out` must be apart."""
    x = integers(rng, (2, 2, 3, 3), "float32")
    np.testing.assert_array_equal(fc.conv2d(x, x, backend=backend), fc.conv2d(x, x.copy(), backend=backend))
    halves = np.zeros((2, 2, 2, 3, 3), np.float32)
    halves[0] = x
    out = halves[1, :, :, :1, :1]
    assert fc.conv2d(halves[0], x, out=out, backend=backend) is out
    np.testing.assert_array_equal(out, fc.conv2d(x, x, backend=backend))


# ---------------------------------------------------------------------------------------------------------------------
# Infinities and nan
# ---------------------------------------------------------------------------------------------------------------------

LOCAL = [
    BY_NAME[name]
    for name in (
        "1d_k3", "1d_long_kernel", "1x1_padded", "3x3_same", "3x3_stride2", "stride_over_kernel", "padding_over_kernel",
        "dilated_strided", "groups2", "depthwise", "depthwise_strided", "reflect_uneven", "replicate_far",
        "circular_once_around", "3d_strided", "rows_7", "rows_17", "channels_13", "pixels_33", "depthwise_width_17",
        "straddle", "primes_large", "terms_1x1_385", "terms_3x3_720", "terms_pixels_1426", "stem_7x7", "both_channels",
        "kernel_7x7", "patch_embedding", "speech_1d_uneven", "speech_1d_dilated", "spectrogram_patches",
    )
]  # fmt: skip


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("case", LOCAL, ids=str)
def test_special_values_stay_local(case, value, which, backend, rng):
    """One special value in one operand reaches the sums that hold it and no other, wherever it is put.

    A zero of the padding is multiplied like any other number, so that zero times infinity is nan there too.
    """
    plain = case.plain_options
    exact = {
        "forward": lambda x, w, b, dy: oracle.convolution(x, w, b, **plain),
        "weight": lambda x, w, b, dy: oracle.weight_grad(x, dy, weight_shape=case.weight, **plain),
        "input": lambda x, w, b, dy: oracle.input_grad(w, dy, input_shape=case.input, **plain),
        "bias": lambda x, w, b, dy: oracle.bias_grad(dy),
    }[which]
    run, _ = passes(case, backend)[which]
    for spoiled in range(4):
        operands = whole_operands(case, rng)
        operands[spoiled].flat[rng.integers(operands[spoiled].size)] = value
        with np.errstate(invalid="ignore"):
            expected = exact(*(a.astype(np.float64) for a in operands))
        np.testing.assert_array_equal(run(*operands), expected)


def test_zero_times_infinity_in_the_padding(backend):
    """As in torch: the tap that meets only padding at the corner makes that corner nan."""
    w = np.zeros((1, 1, 3, 3), np.float32)
    w[0, 0, 0, 0] = np.inf
    y = fc.conv2d(np.ones((1, 1, 3, 3), np.float32), w, padding=1, backend=backend)
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(y[0, 0], [[nan, nan, nan], [nan, inf, inf], [nan, inf, inf]])
    dy = np.array([[[[np.inf]]]], np.float32)  # a single window, whose first row and column are padding
    dw = fc.conv2d_weight_grad(np.ones((1, 1, 2, 2), np.float32), (1, 1, 3, 3), dy, padding=((1, 0), (1, 0)),
                               backend=backend)  # fmt: skip
    np.testing.assert_array_equal(dw[0, 0], [[nan, nan, nan], [nan, inf, inf], [nan, inf, inf]])


def test_relu_keeps_nan(backend):
    x = np.array([[[np.nan, -np.inf, np.inf, -1.0]]], np.float32)
    y = fc.conv1d(x, np.ones((1, 1, 1), np.float32), activation="relu", backend=backend)
    np.testing.assert_array_equal(y, [[[np.nan, 0, np.inf, 0]]])


def test_negative_zero(backend):
    """-0.0 is a zero: it changes no sum, and times infinity is nan."""
    x, w = np.full((1, 1, 4), -0.0, np.float32), np.array([[[1.0, -1.0]]], np.float32)
    np.testing.assert_array_equal(fc.conv1d(x, w, backend=backend), np.zeros((1, 1, 3)))
    assert np.isnan(fc.conv1d(x, w * np.float32(np.inf), backend=backend)).all()
    relu = fc.conv1d(x, w, padding=1, activation="relu", backend=backend)
    assert (relu == 0).all()


def test_float16_beyond_its_range_is_infinite():
    """As in torch, and with no warning of a conversion that the caller did not ask for."""
    x, w = np.full((1, 4, 9, 9), 60_000, np.float16), np.full((2, 4, 3, 3), 1, np.float16)
    dy = np.full((1, 2, 9, 9), 60_000, np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(fc.conv2d(x, w, padding=1)).all()
        for gradient in fc.conv2d_backward(x, w, dy, padding=1):
            assert np.isinf(gradient).all()


def test_extreme_numbers(backend):
    """The largest and the smallest, subnormal ones included, come through a 1x1 convolution unchanged."""
    for dtype in DTYPES.values():
        info = ml_dtypes.finfo(dtype)
        values = np.array([[[info.max, info.min, info.smallest_normal, info.smallest_subnormal]]], dtype)
        y = fc.conv1d(values, np.ones((1, 1, 1), dtype), backend=backend)
        assert_same_bits(y, values)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients are gradients
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def configurations(draw):
    """Any convolution, small."""
    ndim = draw(st.integers(1, 3))
    most = (8, 5, 3)[ndim - 1]
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    each = [
        (draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3)),
         draw(st.integers(0, 3)))
        for _ in range(ndim)
    ]  # fmt: skip
    kernel, stride, dilation, before, after = zip(*each, strict=True)
    word = draw(st.sampled_from([None, None, "same", "full", "valid"])) if mode in ("zeros", "replicate") else None
    size = []
    for k, d, a, b in zip(kernel, dilation, before, after, strict=True):
        span = d * (k - 1) + 1
        least = max(span - (0 if word else a + b), 1)
        if mode == "reflect":
            least = max(least, a + 1, b + 1)
        if mode == "circular":
            least = max(least, a, b)
        size.append(draw(st.integers(least, least + most)))
    out_per_group = draw(st.integers(1, 3))
    return Case(
        "", "", (draw(st.integers(1, 2)), groups * per_group, *size), (groups * out_per_group, per_group, *kernel),
        stride, word or tuple(zip(before, after, strict=True)), dilation, groups, mode,
    )  # fmt: skip


def _dot(a, b):
    return np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adjoint_identities(dtype, backend):
    """<conv(x, w), dy> = <x, input_grad> = <w, weight_grad>: all three are the same sum of whole numbers."""

    @hypothesis.settings(
        max_examples=150 if backend == "cpu" else 20, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(configurations(), st.integers(0, 2**32 - 1))
    def holds(case, seed):
        hypothesis.assume(case.macs < (50_000 if backend == "cpu" else 1000))
        x, w, b, dy = whole_operands(case, np.random.default_rng(seed), dtype)
        f, options = functions(case.ndim), {**case.options, "backend": backend}
        y = f.conv(x, w, **options)
        grads = f.backward(x, w, dy, **options)
        assert (y.shape, grads.input.shape, grads.weight.shape) == (case.output, case.input, case.weight)
        assert _dot(y, dy) == _dot(x, grads.input) == _dot(w, grads.weight)
        with_bias = f.conv(x, w, b, **options)
        assert _dot(with_bias, dy) - _dot(y, dy) == _dot(b, grads.bias)

    holds()


@pytest.mark.parametrize("case", [c for c in SMALL if c.macs < 700], ids=str)
def test_finite_differences(case, rng):
    """Of the loss L = sum(y**2)/2, quadratic in each operand: on whole numbers central differences are exact."""
    x, w, b, _ = whole_operands(case, rng, "float64")
    f = functions(case.ndim)

    def loss():
        return (f.conv(x, w, b, **case.options) ** 2).sum() / 2

    grads = f.backward(x, w, f.conv(x, w, b, **case.options), **case.options)
    for operand, grad in zip((x, w, b), grads, strict=True):
        for at in np.ndindex(operand.shape):
            operand[at] += 1
            above = loss()
            operand[at] -= 2
            below = loss()
            operand[at] += 1
            assert grad[at] == (above - below) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries
# ---------------------------------------------------------------------------------------------------------------------


class WithInterface:
    """Nothing but __array_interface__."""

    def __init__(self, array):
        self._array = array
        self.__array_interface__ = array.__array_interface__


class WithDLPack:
    """Nothing but __dlpack__ on the CPU."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Subclass(np.ndarray):
    """What units and image libraries make of arrays."""


@pytest.mark.parametrize("wrap", [WithInterface, WithDLPack], ids=["array_interface", "dlpack"])
def test_array_protocols(wrap, backend, rng):
    """NumPy arrays come back, and `out` is filled in place."""
    x, w, b, dy = whole_operands(BY_NAME["3x3_same"], rng)
    options = {"padding": 1, "backend": backend}
    y = fc.conv2d(wrap(x), wrap(w), wrap(b), **options)
    assert type(y) is np.ndarray
    assert_same_bits(y, fc.conv2d(x, w, b, **options))
    grads = fc.conv2d_backward(wrap(x), wrap(w), wrap(dy), **options)
    for grad, expected in zip(grads, fc.conv2d_backward(x, w, dy, **options), strict=True):
        assert type(grad) is np.ndarray
        assert_same_bits(grad, expected)
    out = np.full_like(y, np.nan)
    wrapped = wrap(out)
    assert fc.conv2d(x, w, b, **options, out=wrapped) is wrapped
    assert_same_bits(out, y)


def test_subclasses_and_memory_maps(tmp_path, rng):
    x, w, b, _ = whole_operands(BY_NAME["3x3_same"], rng)
    expected = fc.conv2d(x, w, b)
    mapped = np.memmap(tmp_path / "x", x.dtype, "w+", shape=x.shape)
    mapped[...] = x
    assert_same_bits(fc.conv2d(mapped, w, b), expected)
    y = fc.conv2d(x.view(Subclass), w.view(Subclass))
    assert type(y) is np.ndarray
    assert_same_bits(y, fc.conv2d(x, w))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_torch_tensors(dtype, backend, rng):
    """Tensors in, tensors out, of the same dtype; `out` is filled in place."""
    torch = pytest.importorskip("torch", reason="torch tensors are one of the array kinds that are accepted")
    case = BY_NAME["3x3_same"]
    arrays = whole_operands(case, rng, dtype)
    of_numpy = {"bfloat16": np.int16}.get(dtype, DTYPES[dtype])
    kind = getattr(torch, dtype)
    x, w, b, dy = (torch.from_numpy(a.view(of_numpy)).view(kind) for a in arrays)
    options = {"padding": 1, "backend": backend}
    y = fc.conv2d(x.to(memory_format=torch.channels_last), w, b, **options)
    grads = fc.conv2d_backward(x, w, dy, **options)
    expected = fc.conv2d(*arrays[:3], **options)
    results = [y, *grads, fc.conv_bias_grad(dy, backend=backend), fc.conv_transpose2d(dy, w, **options)]
    x_, w_, _, dy_ = arrays
    same = [expected, *fc.conv2d_backward(x_, w_, dy_, **options), fc.conv_bias_grad(dy_, backend=backend),
            fc.conv_transpose2d(dy_, w_, **options)]  # fmt: skip
    for result, array in zip(results, same, strict=True):
        assert isinstance(result, torch.Tensor)
        assert result.dtype == kind
        assert_same_bits(result.view(torch.int16).numpy().view(array.dtype) if dtype == "bfloat16" else result.numpy(),
                         array)  # fmt: skip
    out = torch.full_like(y, float("nan"))
    assert fc.conv2d(x, w, b, **options, out=out) is out
    assert torch.equal(out, y)
    assert fc.conv_bias_grad(dy, out=(db := torch.zeros_like(b)), accumulate=True, backend=backend) is db
    assert torch.equal(db, grads.bias)
