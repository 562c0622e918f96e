"""The public functions inside the user's own jitted functions: same bits, same errors, same arguments."""

from __future__ import annotations

import inspect
import textwrap

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError

import fastconv as fc
from fastconv import jitted
from helpers import VIEWS, output_of, run_python

X = np.random.default_rng(1).standard_normal((2, 4, 7, 6))
W = np.random.default_rng(2).standard_normal((6, 2, 3, 2))
DY = np.random.default_rng(3).standard_normal((2, 6, 4, 3))
Z = np.random.default_rng(4).standard_normal((3, 5, 4))
T = np.random.default_rng(5).integers(0, 5, (3, 4))
OPTIONS = "stride=2, padding=((1, 1), (0, 1)), groups=2"
X1, W1, DY1 = (f"{name}[:, :, :, 0]" for name in ("x", "w", "dy"))
X3, W3 = "x.reshape((2, 4, 7, 3, 2))", "w.reshape((6, 2, 3, 2, 1))"
LINEAR = "z[:, :, 0], z.reshape((12, 5)), t[:, 0]"

CALLS = [
    ("conv1d", "fc.conv1d(x[:, :, :, 0], w[:, :, :, 0], None, 2, groups=2)"),
    ("conv2d", f"fc.conv2d(x, w, {OPTIONS})"),
    ("conv2d_positional", "fc.conv2d(x, w, None, (1, 2), 1, 1, 2)"),
    ("conv2d_words", 'fc.conv2d(x, w, padding="same", padding_mode="reflect", activation="relu", groups=2)'),
    ("conv2d_unbatched", "fc.conv2d(x[0], w, groups=2)"),
    ("conv2d_bare", 'fc.conv2d(x[0, 0], w[0, 0], padding="full")'),
    ("conv2d_bias", "fc.conv2d(x, w, bias=dy[0, :, 0, 0], groups=2)"),
    ("conv2d_layout", 'fc.conv2d(x.transpose((0, 2, 3, 1)), w, groups=2, layout="NHWC")'),
    ("weight_grad", f"fc.conv2d_weight_grad(x, w.shape, dy, {OPTIONS})"),
    ("weight_grad_bare", "fc.conv2d_weight_grad(x[0, 0], (4, 4), dy[0, 0])"),
    ("input_grad", f"fc.conv2d_input_grad(x.shape, w, dy, {OPTIONS})"),
    ("bias_grad", "fc.conv_bias_grad(dy)"),
    ("backward", f"fc.conv2d_backward(x, w, dy, {OPTIONS})"),
    ("backward_some", f'fc.conv2d_backward(x, w, dy, {OPTIONS}, needs=("weight", "bias"))'),
    ("transpose", "fc.conv_transpose2d(dy, w, None, 2, output_padding=1)"),
    ("conv1d_weight_grad", f"fc.conv1d_weight_grad({X1}, (6, 4, 4), {DY1})"),
    ("conv1d_input_grad", f"fc.conv1d_input_grad((2, 2, 6), {W1}, {DY1})"),
    ("conv1d_backward", f'fc.conv1d_backward({X1}, {W1}, {DY1}, 2, 1, groups=2, needs="bias")'),
    ("transpose1d", f"fc.conv_transpose1d({DY1}, {W1}, dy[0, :2, 0, 0])"),
    ("conv3d", f"fc.conv3d({X3}, {W3}, groups=2)"),
    ("conv3d_weight_grad", f"fc.conv3d_weight_grad({X3}, (6, 2, 3, 2, 1), fc.conv3d({X3}, {W3}, groups=2), groups=2)"),
    ("conv3d_input_grad", f"fc.conv3d_input_grad((2, 2, 6, 2, 3), {W3}, dy.reshape((2, 6, 4, 1, 3)))"),
    ("conv3d_backward", f"fc.conv3d_backward({X3}, {W3}, fc.conv3d({X3}, {W3}, groups=2), groups=2)"),
    ("transpose3d", f"fc.conv_transpose3d(dy.reshape((2, 6, 4, 1, 3)), {W3}, stride=(1, 2, 1))"),
    ("linear", f"fc.linear_cross_entropy({LINEAR})"),
    ("linear_none", f'fc.linear_cross_entropy({LINEAR}, reduction="none", return_lse=True)'),
    ("linear_one", "fc.linear_cross_entropy_with_grad(z[0, :, 0], z.reshape((12, 5)), t[0, 0:1].reshape(()))"),
    ("linear_with_grad", f"fc.linear_cross_entropy_with_grad({LINEAR}, x[0].copy().ravel()[:12])"),
    ("linear_some", f'fc.linear_cross_entropy_with_grad({LINEAR}, needs=("weight",))'),
    ("linear_lse", f"fc.linear_cross_entropy_with_grad({LINEAR}, return_lse=True)"),
    ("loss", "fc.softmax_cross_entropy(z, t)"),
    ("loss_none", 'fc.softmax_cross_entropy(z, t, reduction="none", label_smoothing=0.1)'),
    ("loss_grad", "fc.softmax_cross_entropy_grad(z, t, None, 2.0)"),
    ("loss_with_grad", 'fc.softmax_cross_entropy_with_grad(z, t, reduction="sum", ignore_index=1)'),
    ("loss_1d", "fc.softmax_cross_entropy_with_grad(z[0, :, 0], t[0, 0:1].reshape(()))"),
    ("loss_integer", "fc.softmax_cross_entropy(z[0, :, 0], t[0, 0])"),
    ("loss_integer_grad", "fc.softmax_cross_entropy_grad(z[0, :, 0], 2)"),
    ("loss_integer_ignored", "fc.softmax_cross_entropy_with_grad(z[0, :, 0], t[0, 0] * 0 - 100, reduction='sum')"),
    ("linear_integer", "fc.linear_cross_entropy(z[0, :, 0], z.reshape((12, 5)), t[0, 1])"),
    ("linear_integer_grad", "fc.linear_cross_entropy_with_grad(z[0, :, 0], z.reshape((12, 5)), 11)"),
    ("loss_lse", "fc.softmax_cross_entropy(z, t, return_lse=True, check=True)"),
    ("softmax", "fc.softmax(z, 2)"),
    ("softmax_default", "fc.softmax(z)"),
    ("softmax_none", "fc.softmax(z[0, :, 0], None)"),
    ("log_softmax", "fc.log_softmax(z, axis=0)"),
]


def function(call: str):
    scope = {"fc": fc}
    exec(f"def f(x, w, dy, z, t):\n    return {call}", scope)
    return scope["f"]


def same(a, b) -> bool:
    if isinstance(b, tuple):
        return len(a) == len(b) and type(a) is type(b) and all(map(same, a, b))
    return a is b is None or (np.shape(a) == np.shape(b) and np.array_equal(a, b))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("call", [call for _, call in CALLS])
def test_same_bits_as_from_python(call, dtype):
    f = function(call)
    args = (X.astype(dtype), W.astype(dtype), DY.astype(dtype), Z.astype(dtype), T)
    assert same(njit(f)(*args), f(*args))


@pytest.mark.parametrize("view", VIEWS)
def test_arrays_of_any_strides(view):
    assert same(_conv(VIEWS[view](X), VIEWS[view](W), 2), fc.conv2d(X, W, groups=2))


@njit
def _conv(x, w, groups):
    return fc.conv2d(x, w, groups=groups)


def test_out_is_returned():
    @njit
    def f(x, w, out):
        return fc.conv2d(x, w, out=out, groups=2)

    out = np.empty((2, 6, 5, 5))
    assert f(X, W, out) is out
    assert same(out, fc.conv2d(X, W, groups=2))


@pytest.mark.parametrize(("groups", "kind"), [(3, ValueError), (0, ValueError), (2.0, TypeError)])
def test_same_errors(groups, kind):
    with pytest.raises(kind) as expected:
        fc.conv2d(X, W, groups=groups)
    with pytest.raises(kind) as found:
        _conv(X, W, groups)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "call",
    [
        "fc.softmax(z[0, :, 0], 1)",
        "fc.log_softmax(z[0, :, 0], axis=1)",
        "fc.softmax(z, 3)",
        "fc.softmax_cross_entropy(z[0, :, 0], 0, axis=1)",
        "fc.softmax_cross_entropy(z[0, :, 0], t[0, 0] + 5)",
        "fc.softmax_cross_entropy(z[0], t[0, 0])",
        "fc.linear_cross_entropy(z[0, :, 0], z.reshape((12, 5)), -1)",
    ],
)
def test_same_errors_of_losses(call):
    f = function(call)
    with pytest.raises(ValueError) as expected:
        f(X, W, DY, Z, T)
    with pytest.raises(ValueError) as found:
        njit(f)(X, W, DY, Z, T)
    assert str(found.value) == str(expected.value)


def test_an_error_can_be_caught():
    @njit
    def f(x, w, groups):
        caught = False
        try:
            y = _conv(x, w, groups)
            caught = y.size == 0
        except Exception:
            caught = True
        return caught

    assert [f(X, W, 3), f(X, W, 2)] == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("fc.conv2d(1, w)", "conv2d: input is a .* .expected an array"),
        ("fc.conv2d(x, w, stride=2j)", "conv2d: stride is a complex128"),
        ("fc.conv2d(x, w.astype(np.float32))", "conv2d: weight is float32, but input is float64"),
        ("fc.softmax_cross_entropy(z[0, :, 0], True)", "softmax_cross_entropy: target is a .*bool.* .expected an"),
        ("fc.softmax_cross_entropy(z[0, :, 0], t[0, 0] > 0)", "softmax_cross_entropy: target is a bool"),
        ("fc.linear_cross_entropy(z[0, :, 0], z[0].T, 1.0)", "linear_cross_entropy: target is a float64"),
        ("fc.conv2d(x)", "conv2d: missing a required argument: 'weight'"),
        ("fc.conv2d(x, w, None, 1, 0, 1, 1, 'zeros')", "conv2d: too many positional arguments"),
    ],
)
def test_typing_errors_name_function_and_argument(call, message):
    f = function(call)
    f.__globals__["np"] = np
    with pytest.raises(TypingError, match=message):
        njit(f)(X, W, DY, Z, T)


def test_every_function_with_a_backend_is_there():
    public = {n for n in fc.__all__ if inspect.isfunction(getattr(fc, n)) and
              "backend" in inspect.signature(getattr(fc, n)).parameters}  # fmt: skip
    assert public == set(jitted.FUNCTIONS) == set(jitted._results())


def test_in_a_parallel_loop():
    @njit(parallel=True)
    def f(x, w, y):
        for i in prange(x.shape[0]):
            y[i] = fc.conv2d(x[i], w, groups=2)

    y = np.empty((2, 6, 5, 5))
    f(X, W, y)
    assert same(y, fc.conv2d(X, W, groups=2))


def test_a_cached_function_runs_in_a_fresh_process(tmp_path):
    (tmp_path / "user.py").write_text(textwrap.dedent("""
        import numba, numpy as np
        import fastconv as fc
        @numba.njit(cache=True)
        def f(x, w):
            return fc.conv2d(x, w).sum()
        print(f(np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2))), sum(f.stats.cache_hits.values()))
    """))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import user"
    runs = [output_of(run_python(code, str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path / "cache"))) for _ in range(2)]
    assert runs == ["16.0 0", "16.0 1"]
