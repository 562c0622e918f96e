"""float16 to float32 and back: every float16, and float32 around every tie between two of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fastconv.cpu import half

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_float16_becomes_the_same_number():
    np.testing.assert_array_equal(half.widened(EVERY).view(np.uint32)[~np.isnan(EVERY)],
                                  EVERY[~np.isnan(EVERY)].astype(np.float32).view(np.uint32))  # fmt: skip
    assert np.isnan(half.widened(EVERY)[np.isnan(EVERY)]).all()


def test_rounding_is_that_of_numpy():
    finite = np.sort(EVERY[np.isfinite(EVERY)].astype(np.float32))
    ties = (finite[1:] + finite[:-1]) / 2
    rng = np.random.default_rng(0)
    some = rng.integers(0, 2**32, 10**5, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ends = np.array([65504, 65519.996, 65520, 65536, 1e38, np.inf, np.nan, 0, -0.0, 2**-24, 2**-25, 2**-26], np.float32)
    above, below = (np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf))
    x = np.concatenate([finite, ties, above, below, some, ends, -ends])
    out = np.empty(x.shape, np.float16)
    half.narrow(x, out)
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    nan = np.isnan(x)
    assert np.isnan(out[nan]).all()
    np.testing.assert_array_equal(out[~nan].view(np.uint16), expected[~nan].view(np.uint16))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_any_strides(dtype):
    memory = np.random.default_rng(1).standard_normal((6, 8, 5)).astype(dtype)
    view = memory[::2, ::-1].transpose(2, 0, 1)
    wide = half.widened(view)
    assert wide.flags.c_contiguous
    np.testing.assert_array_equal(wide, view.astype(np.float32))
    half.narrow(wide * np.float32(3), view)
    np.testing.assert_array_equal(view, (wide * np.float32(3)).astype(dtype))
