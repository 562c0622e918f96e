"""Arrays whose elements are more than 2**31 apart: an offset kept in 32 bits would wrap around."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv as fc

pytestmark = pytest.mark.slow  # 8 GiB of address space, of which next to nothing is touched

FAR = 2**31 + 4096


@pytest.fixture
def far(tmp_path):
    """``far(array)``: the same values, the halves of the first axis more than 2**31 elements apart in a sparse file."""

    def spread(array):
        name = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        memory = np.memmap(name, array.dtype, "w+", shape=FAR + array.size)
        strides = (FAR * array.itemsize, *array.strides[1:])
        assert len(array) == 2
        view = np.lib.stride_tricks.as_strided(np.asarray(memory), array.shape, strides)
        view[...] = array
        return view

    return spread


@pytest.mark.parametrize(
    ("algorithm", "groups"), [("direct", 1), ("winograd", 1), ("fft", 1), ("direct", 2), ("direct", 4)]
)
def test_convolution(algorithm, groups, far):
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(s, np.float32) for s in ((2, 4, 20, 20), (8, 4 // groups, 3, 3), (2, 8, 20, 20)))
    options = {"padding": 1, "groups": groups, "algorithm": algorithm}
    y = far(np.zeros_like(dy))
    assert fc.conv2d(far(x), w, out=y, **options) is y
    np.testing.assert_array_equal(y, fc.conv2d(x, w, **options))
    dx = far(np.zeros_like(x))
    fc.conv2d_input_grad(x.shape, w, far(dy), out=dx, **options)
    np.testing.assert_array_equal(dx, fc.conv2d_input_grad(x.shape, w, dy, **options))
    dw = fc.conv2d_weight_grad(far(x), w.shape, far(dy), **options)
    np.testing.assert_array_equal(dw, fc.conv2d_weight_grad(x, w.shape, dy, **options))


def test_channels_last_and_weights(far):
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((2, 9, 9, 5), np.float32), rng.standard_normal((2, 5, 3, 3), np.float32)
    np.testing.assert_array_equal(fc.conv2d(far(x), far(w), layout="NHWC"), fc.conv2d(x, w, layout="NHWC"))


def test_softmax_cross_entropy(far):
    rng = np.random.default_rng(2)
    for shape in ((2, 1000), (2, 10, 7, 7)):
        z = rng.standard_normal(shape, np.float32)
        t = rng.integers(0, shape[1], (2, *shape[2:]))
        grad = far(np.zeros_like(z))
        loss, _ = fc.softmax_cross_entropy_with_grad(far(z), t, grad_out=grad)
        expected = fc.softmax_cross_entropy_with_grad(z, t)
        assert loss == expected[0]
        np.testing.assert_array_equal(grad, expected[1])
        np.testing.assert_array_equal(fc.softmax(far(z)), fc.softmax(z))
