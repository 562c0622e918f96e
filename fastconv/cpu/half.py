"""float16 to float32 and back, in vectors.

NumPy converts one number at a time, without the instructions for it: 2 ns each, 20 to 40 ns where the float16 is
subnormal, 400 ns where that raises its underflow flag, as for most numbers of the gradient of a mean. These loops of
integer arithmetic with selects, a quarter of a nanosecond each, need no such instructions and raise no flag. (They
follow F. Giesen's `float->half variants`.) bfloat16, whose conversion is a shift, is left to ml_dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import compiled

_HALF = np.dtype(np.float16)


@intrinsic
def _as_float(typingctx, bits):
    """The float32 of these 32 bits."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _as_bits(typingctx, number):
    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def _widen(source, target):
    """`source` holds the bits of float16."""
    for i in range(source.size):
        sign, rest = np.uint32(source[i] & 0x8000), np.uint32(source[i] & 0x7FFF)
        value = _as_float(np.uint32((rest << 13) + (112 << 23)))  # the exponent's bias is 15 there, 127 here
        value = np.float32(np.int32(rest)) * np.float32(2.0**-24) if rest < 0x400 else value
        bits = np.uint32(rest << 13 | 0x7F800000) if rest >= 0x7C00 else _as_bits(value)  # inf and nan
        target[i] = _as_float(np.uint32(bits | sign << 16))


def _narrow(source, target):
    """Rounded to nearest, ties to even; `target` takes the bits of float16."""
    for i in range(source.size):
        bits = _as_bits(source[i])
        rest = np.uint32(bits & 0x7FFFFFFF)
        normal = np.uint32((rest - (112 << 23) + 0xFFF + (rest >> 13 & 1)) >> 13)
        # One place of 0.5 is one of the subnormal numbers, so that the addition rounds to it.
        small = np.uint32(_as_bits(_as_float(rest) + np.float32(0.5)) - 0x3F000000)
        result = small if rest < 0x38800000 else normal
        result = np.uint32(0x7C00) if rest >= 0x47800000 else result
        result = np.uint32(0x7E00) if rest > 0x7F800000 else result
        target[i] = np.uint16(result | (bits >> 16 & 0x8000))


@functools.cache
def _loops() -> tuple[Callable[..., None], Callable[..., None]]:
    bits, floats = types.Array(types.uint16, 1, "C"), types.Array(types.float32, 1, "C")
    return (
        compiled(numba.njit, types.void(types.Array(types.uint16, 1, "C", readonly=True), floats), _widen, nogil=True),
        compiled(numba.njit, types.void(floats, bits), _narrow, nogil=True),
    )


def widened(array: np.ndarray) -> np.ndarray:
    """A float32 copy of a float16 or bfloat16 array, in C order."""
    if array.dtype != _HALF:
        return array.astype(np.float32, order="C")
    result = np.empty(array.shape, np.float32)
    _loops()[0](np.ascontiguousarray(array).reshape(-1).view(np.uint16), result.reshape(-1))
    return result


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """out = values, float32 in C order, rounded to the float16 or bfloat16 of `out`."""
    if out.dtype != _HALF:
        out[...] = values
        return
    whole = out if out.flags.c_contiguous and out.flags.aligned else np.empty(out.shape, _HALF)
    _loops()[1](values.reshape(-1), whole.reshape(-1).view(np.uint16))
    if whole is not out:
        out[...] = whole
