"""fc.explain: its fields, its text, and its errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fastconv as fc
from fastconv.arguments import ALGORITHMS
from fastconv.cpu import convolution, methods
from fastconv.cpu.methods import METHODS, OPERATIONS
from fastconv.cpu.vector.tile import tile
from shapes import CASES

PLANE = (1, 1, 512, 512), (1, 1, 63, 63)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_case(op):
    """Shapes, flops and bytes are those of the convolution, in one to three dimensions."""
    for case in CASES:
        if case.padding_mode != "zeros":
            continue
        options = {k: v for k, v in case.options.items() if k in ("stride", "padding", "dilation", "groups")}
        e = fc.explain(case.input, case.weight, **options, op=op)
        assert (e.input_shape, e.weight_shape, e.output_shape) == (case.input, case.weight, case.output)
        assert e.direct_flops == 2 * case.macs
        sizes = (case.input, case.weight, case.output)
        assert e.bytes == 4 * sum(int(np.prod(shape)) for shape in sizes)
        assert e.workspace > 0
        assert 0 < e.error < 1e-5
        assert {e.algorithm, *e.others} == set(ALGORITHMS) - {"auto"}
        assert e.algorithm not in e.others
        assert e.reason
        assert all(e.others.values())
        assert {e.method, *e.other_methods} == {method.name for method in METHODS[op]}
        assert e.method not in e.other_methods
        assert all(e.other_methods.values())


def test_it_says_what_runs():
    for shape, options in (
        (PLANE, {"padding": "same"}),
        (((1, 1, 512, 512), (1, 1, 7, 7)), {"padding": "same"}),
        (((1, 128, 56, 56), (128, 128, 3, 3)), {"padding": 1}),
    ):
        e = fc.explain(*shape, **options)
        x, w = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in shape)
        y = fc.conv2d(x, w, **options)
        np.testing.assert_array_equal(y, fc.conv2d(x, w, **options, algorithm=e.algorithm))
        assert y.shape == e.output_shape


def test_text():
    text = str(fc.explain(*PLANE, padding="same"))
    assert repr(fc.explain(*PLANE, padding="same")) == text
    first, *lines = text.splitlines()
    assert first == "forward of (1, 1, 512, 512) with (1, 1, 63, 63) -> (1, 1, 512, 512), float32"
    others = len(ALGORITHMS) - 2
    other_methods = sum(method.name not in ALGORITHMS for method in METHODS["forward"])  # the others are said before
    assert [line.split()[0] for line in lines] == [
        "algorithm", *["not"] * others, "method", *["not"] * other_methods, "arithmetic", "memory", "workspace",
        "error",
    ]  # fmt: skip
    assert lines[0].startswith("  algorithm  fft: about ")
    assert max(map(len, lines)) <= 120


def test_forced():
    e = fc.explain((1, 1, 64, 64), (1, 1, 5, 5), algorithm="fft")
    assert (e.algorithm, e.reason) == ("fft", "asked for")
    assert "direct is faster" in e.others["direct"]
    e = fc.explain(*PLANE, algorithm="direct")
    assert e.algorithm == "direct"
    assert e.others["fft"] == "would be faster than direct"


@pytest.fixture
def two_threads():
    """The choice between methods of the direct sum may depend on how many there are."""
    before = fc.get_num_threads()
    fc.set_num_threads(2)
    yield
    fc.set_num_threads(before)


# (shapes, options, pass, layout) and the method, with vectors that have masks
METHODS_OF = [
    (((8, 64, 7, 7), (64, 64, 3, 3)), {"padding": 1}, "forward", "NCHW", "small_planes"),
    (((8, 64, 56, 56), (64, 64, 3, 3)), {"padding": 1}, "forward", "NCHW", "implicit_gemm"),
    (((8, 64, 56, 56), (64, 64, 3, 3)), {"padding": 1}, "forward", "NHWC", "channels_last"),
    (((8, 64, 56, 56), (64, 64, 3, 3)), {"padding": 1}, "input_grad", "NHWC", "phased"),
    (((8, 64, 56, 56), (64, 64, 3, 3)), {"padding": 1, "padding_mode": "reflect"}, "input_grad", "NHWC", "padded"),
    (((8, 96, 56, 56), (96, 1, 3, 3)), {"padding": 1, "groups": 96}, "forward", "NHWC", "depthwise_channels"),
    (((8, 96, 56, 56), (96, 1, 3, 3)), {"padding": 1, "groups": 96}, "forward", "NCHW", "depthwise_planes"),
    (((8, 96, 56, 56), (96, 4, 3, 3)), {"padding": 1, "groups": 24}, "forward", "NHWC", "grouped"),
]


@pytest.mark.skipif(not tile(32).masks, reason="which method runs is another choice on another tile")
@pytest.mark.parametrize(("shapes", "options", "op", "layout", "expected"), METHODS_OF)
@pytest.mark.usefixtures("two_threads")
def test_method_and_layout(shapes, options, op, layout, expected, monkeypatch):
    """What is planned for a call with such arrays is what is said."""
    input, weight = shapes
    if layout == "NHWC":
        input = (input[0], *input[2:], input[1])
    e = fc.explain(input, weight, op=op, layout=layout, algorithm="direct", **options)
    assert e.method == expected
    if expected == "phased":
        assert e.parts == ("channels_last",)
        assert "phased of channels_last" in str(e)
    ran = []
    original = convolution.run
    monkeypatch.setattr(convolution, "run", lambda problem, *rest: ran.append(problem) or original(problem, *rest))
    x, w, dy = (np.ones(shape, np.float32) for shape in (input, weight, e.output_shape))
    common = {"layout": layout, "algorithm": "direct", **options}
    if op == "forward":
        fc.conv2d(x, w, **common)
    else:
        fc.conv2d_input_grad(x.shape, w, dy, **common)
    (problem,) = ran
    plan = methods.plan_of(problem)
    assert (plan.method.name, plan.parts, plan.workspace) == (e.method, e.parts, e.workspace)


def test_padding_mode_and_layout_are_judged():
    with pytest.raises(ValueError, match="explain: layout is 'NCL' "):
        fc.explain(*PLANE, layout="NCL")
    with pytest.raises(ValueError, match="explain: padding_mode is 'mirror' "):
        fc.explain(*PLANE, padding_mode="mirror")
    with pytest.raises(ValueError, match="does not apply: the input gradient of padding_mode='reflect'"):
        fc.explain((1, 8, 9, 9), (8, 8, 3, 3), padding=1, padding_mode="reflect", op="input_grad", algorithm="winograd")


def test_empty_batch():
    e = fc.explain((0, 3, 8, 8), (4, 3, 3, 3))
    assert (e.output_shape, e.workspace, e.direct_flops) == ((0, 4, 6, 6), 0, 0)


@pytest.mark.parametrize("op", OPERATIONS)
def test_loops(op):
    e = fc.explain(*PLANE, op=op)
    assert e.others["loops"] == "applies always, but fft is faster"
    e = fc.explain(*PLANE, op=op, algorithm="loops")
    assert (e.algorithm, e.reason, e.workspace) == ("loops", "asked for", 0)
    assert e.flops == e.direct_flops
    assert "by the definition" not in str(e)
    assert e.others["fft"] == "would be faster than loops"


@pytest.mark.parametrize("dtype", ["float32", np.float64, np.dtype("f2"), "bfloat16", ml_dtypes.bfloat16], ids=str)
def test_dtypes(dtype):
    e = fc.explain(*PLANE, dtype=dtype)
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    size = {"float32": 4, "float64": 8}.get(name, 2)
    assert e.dtype == name
    assert e.bytes == size * (512**2 + 63**2 + 450**2)
    least, most = {"float32": (1e-8, 1e-6), "float64": (1e-17, 1e-15), "float16": (1e-4, 1e-3),
                   "bfloat16": (1e-3, 1e-2)}[name]  # fmt: skip
    assert least < e.error < most


@pytest.mark.parametrize(
    ("input", "weight", "output"),
    [((20,), (3,), (18,)), ((9, 8), (3, 3), (7, 6)), ((2, 20), (4, 2, 3), (4, 18)),
     ((2, 9, 8), (4, 2, 3, 3), (4, 7, 6))],
)
def test_bare_and_unbatched_shapes(input, weight, output):
    assert fc.explain(input, weight).output_shape == output


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        (PLANE, {"op": "backward"}, ValueError, "explain: op is 'backward' (expected one of"),
        (PLANE, {"algorithm": "magic"}, ValueError, "explain: algorithm is 'magic' (expected one of"),
        (PLANE, {"algorithm": "winograd"}, ValueError, "explain: algorithm='winograd' does not apply: the kernel is"),
        (PLANE, {"dtype": "int32"}, TypeError, "explain: dtype is int32 (expected float32, float64, float16 or"),
        (PLANE, {"dtype": "nonsense"}, TypeError, "explain: dtype is nonsense (expected float32"),
        (PLANE, {"stride": 0}, ValueError, "explain: stride is 0 (expected at least 1)"),
        (((1, 1, 8, 8), 3), {}, TypeError, "explain: weight_shape is a int (expected a shape"),
        ((8, (1, 1, 3, 3)), {}, TypeError, "explain: input_shape is a int (expected a shape"),
        (((1, 2, 8, 8), (1, 1, 3, 3)), {}, ValueError, "explain: weight_shape has 1 input channels per group"),
        (((1, 1, 8, 8), (1, 1, 9, 9)), {}, ValueError, "explain: weight_shape spans 9 elements"),
        (((1, 1, 8, 8), (1,) * 6), {}, ValueError, "explain: weight_shape is (1, 1, 1, 1, 1, 1) (expected (O,"),
        (((1, 1, 8, 8), ()), {}, ValueError, "explain: weight_shape is () (expected (O, C/groups"),
    ],
)  # fmt: skip
def test_errors(arguments, options, kind, text):
    with pytest.raises(kind) as error:
        fc.explain(*arguments, **options)
    assert str(error.value).startswith(text)
