"""Branch-free exp, log and tanh of float32 and float64 scalars, for use inside jitted loops.

The functions of libm are calls, one per element: a loop that makes them is not vectorised. These are straight-line
arithmetic with selects, so LLVM turns a plain loop over them into vectors of whatever width the machine has. No
fast-math flag is used: every rounding is the one that is written, -inf, nan, subnormal numbers and overflow come out as
in libm, and a scalar and a vector evaluation give the same bits.

    exp(x)     2**n * exp(r),  x = n*log(2) + r,  |r| <= log(2)/2   (Cody and Waite 1980, ch. 6), error <= 1.1 ulp
    log(x)     k*log(2) + log(m),  x = 2**k * m,  m in [sqrt(1/2), sqrt(2))   (fdlibm, e_log.c), error <= 1 ulp
    tanh(x)    e / (e + 2),  e = exp(2*x) - 1 by the same reduction, error <= 3 ulp

`tests/test_elementary.py` measures the errors. The polynomials of exp are minimax fits (Remez) of the relative error:
3.1e-9 for float32, 3.6e-18 for float64, a twentieth of the unit roundoff.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

__all__ = ["exp", "log", "multiply_add", "tanh"]

# Per format: integer type, stored mantissa bits, exponent bias, bits of sqrt(1/2) (in float64 of its upper half).
_FORMATS = {
    types.float32: (ir.IntType(32), 23, 127, 0x3F3504F3),
    types.float64: (ir.IntType(64), 52, 1023, 0x3FE6A09E00000000),
}


def _shift(mantissa_bits: int, bias: int) -> float:
    """Added to a small number, it rounds that to an integer n and leaves n + 2*bias in the low bits of the sum."""
    return 1.5 * 2.0**mantissa_bits + 2 * bias


def _bits(value: float, float_type: Any) -> int:
    if float_type == types.float32:
        return int(np.float32(value).view(np.uint32))
    return int(np.float64(value).view(np.uint64))


def _unbiased(float_type: Any) -> int:
    """Subtracted from the bits of n + `_shift`, it leaves n + 2*bias: both halves of that are biased exponents."""
    _, mantissa_bits, bias, _ = _FORMATS[float_type]
    return _bits(_shift(mantissa_bits, bias) - 2 * bias, float_type)


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a*b + c, rounded once where the machine has a fused multiply-add and twice where it would be a library call."""

    def codegen(context, builder, signature, args):
        kind = args[0].type
        name = f"llvm.fmuladd.{'f32' if isinstance(kind, ir.FloatType) else 'f64'}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return (a(a, a, a), codegen) if a in _FORMATS else None


@intrinsic
def _times_power_of_two(typingctx, p, shifted):
    """p * 2**n, given n + `_shift`. Two factors, so that subnormal results round once and overflow gives inf."""

    def codegen(context, builder, signature, args):
        significand, shifted = args
        integer, mantissa_bits, _, _ = _FORMATS[p]
        k = builder.sub(builder.bitcast(shifted, integer), ir.Constant(integer, _unbiased(p)))
        low = builder.lshr(k, ir.Constant(integer, 1))
        for half in (low, builder.sub(k, low)):
            factor = builder.bitcast(builder.shl(half, ir.Constant(integer, mantissa_bits)), significand.type)
            significand = builder.fmul(significand, factor)
        return significand

    return (p(p, p), codegen) if p in _FORMATS else None


@intrinsic
def _exponent_and_significand(typingctx, x):
    """(k, m) as floats with x = 2**k * m and m in [sqrt(1/2), sqrt(2)), for positive normal x."""

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        integer, mantissa_bits, _, root_half = _FORMATS[kind]
        distance = builder.sub(builder.bitcast(args[0], integer), ir.Constant(integer, root_half))
        fraction = builder.and_(distance, ir.Constant(integer, (1 << mantissa_bits) - 1))
        m = builder.bitcast(builder.add(fraction, ir.Constant(integer, root_half)), args[0].type)
        # The exponent as a float without a conversion, which 64-bit integers do not have in every vector unit.
        magic = 1.5 * 2.0**mantissa_bits
        k = builder.ashr(distance, ir.Constant(integer, mantissa_bits))
        k = builder.bitcast(builder.add(k, ir.Constant(integer, _bits(magic, kind))), args[0].type)
        k = builder.fsub(k, ir.Constant(args[0].type, magic))
        return context.make_tuple(builder, signature.return_type, [k, m])

    return (types.UniTuple(x, 2)(x), codegen) if x in _FORMATS else None


# ---------------------------------------------------------------------------------------------------------------------
# float32
# ---------------------------------------------------------------------------------------------------------------------

_f32 = np.float32
_ZERO_32, _ONE_32, _TWO_32, _HALF_32 = _f32(0), _f32(1), _f32(2), _f32(0.5)
_INF_32, _NAN_32 = _f32(np.inf), _f32(np.nan)
_LOW_32, _HIGH_32 = _f32(-104), _f32(89)  # exp is 0 below and inf above
_SHIFT_32 = _f32(_shift(23, 127))
_LOG2E_32 = _f32(1.44269504088896341)
_LN2_HIGH_32, _LN2_LOW_32 = _f32(0.693359375), _f32(-2.12194440e-4)  # n * high is exact for every exponent n
_E0_32, _E1_32, _E2_32 = _f32(0.49999993447824193), _f32(0.16666520631614354), _f32(0.04166838803865017)
_E3_32, _E4_32 = _f32(0.008368716886888523), _f32(0.0013814599017809138)
_TINY_32, _LIFT_32, _LIFT_EXPONENT_32 = _f32(2.0**-126), _f32(2.0**25), _f32(25)
_L1_32, _L2_32 = _f32(0.66666662693), _f32(0.40000972152)
_L3_32, _L4_32 = _f32(0.28498786688), _f32(0.24279078841)
_LOG_HIGH_32, _LOG_LOW_32 = _f32(6.9313812256e-01), _f32(9.0580006145e-06)
_TANH_END_32 = _f32(10)


@njit(inline="always")
def _reduced_32(x):
    """(r, (exp(r) - 1 - r) / r**2, n + shift) for x = n*log(2) + r."""
    shifted = multiply_add(x, _LOG2E_32, _SHIFT_32)
    n = shifted - _SHIFT_32
    r = multiply_add(n, -_LN2_HIGH_32, x)
    r = multiply_add(n, -_LN2_LOW_32, r)
    q = multiply_add(_E4_32, r, _E3_32)
    q = multiply_add(q, r, _E2_32)
    q = multiply_add(q, r, _E1_32)
    return r, multiply_add(q, r, _E0_32), shifted


def _exp_32(x):
    x = _LOW_32 if x < _LOW_32 else x  # nan fails both comparisons and passes through
    x = _HIGH_32 if x > _HIGH_32 else x
    r, q, shifted = _reduced_32(x)
    return _times_power_of_two(multiply_add(multiply_add(q, r, _ONE_32), r, _ONE_32), shifted)


def _log_32(x):
    small = x < _TINY_32
    k, m = _exponent_and_significand(x * _LIFT_32 if small else x)
    k = k - _LIFT_EXPONENT_32 if small else k
    f = m - _ONE_32
    s = f / (_TWO_32 + f)
    z = s * s
    w = z * z
    tail = z * multiply_add(w, _L3_32, _L1_32) + w * multiply_add(w, _L4_32, _L2_32)
    half_square = _HALF_32 * f * f
    y = multiply_add(s, half_square + tail, k * _LOG_LOW_32) - half_square + f + k * _LOG_HIGH_32
    y = y if x < _INF_32 else x  # inf and nan
    y = -_INF_32 if x == _ZERO_32 else y
    return _NAN_32 if x < _ZERO_32 else y


def _tanh_32(x):
    x = -_TANH_END_32 if x < -_TANH_END_32 else x
    x = _TANH_END_32 if x > _TANH_END_32 else x
    r, q, shifted = _reduced_32(x + x)
    expm1 = multiply_add(q, r * r, r)
    power = _times_power_of_two(_ONE_32, shifted)
    e = multiply_add(power, expm1, power - _ONE_32)
    return e / (e + _TWO_32)


# ---------------------------------------------------------------------------------------------------------------------
# float64
# ---------------------------------------------------------------------------------------------------------------------

_LOW_64, _HIGH_64 = -746.0, 710.0
_SHIFT_64 = _shift(52, 1023)
_LOG2E_64 = 1.4426950408889634074
_LN2_HIGH_64, _LN2_LOW_64 = 6.93145751953125e-1, 1.42860682030941723212e-6
_E0_64, _E1_64, _E2_64 = 0.50000000000000106, 1.6666666666666413e-01, 4.1666666666530157e-02
_E3_64, _E4_64, _E5_64 = 8.3333333334944637e-03, 1.3888888943630380e-03, 1.9841269506575747e-04
_E6_64, _E7_64 = 2.4801493098635330e-05, 2.7557586375678646e-06
_E8_64, _E9_64 = 2.7630248473168031e-07, 2.5000061183251387e-08
_TINY_64, _LIFT_64 = 2.0**-1022, 2.0**54
_LOG_HIGH_64, _LOG_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10


@njit(inline="always")
def _reduced_64(x):
    shifted = multiply_add(x, _LOG2E_64, _SHIFT_64)
    n = shifted - _SHIFT_64
    r = multiply_add(n, -_LN2_HIGH_64, x)
    r = multiply_add(n, -_LN2_LOW_64, r)
    q = multiply_add(_E9_64, r, _E8_64)
    q = multiply_add(q, r, _E7_64)
    q = multiply_add(q, r, _E6_64)
    q = multiply_add(q, r, _E5_64)
    q = multiply_add(q, r, _E4_64)
    q = multiply_add(q, r, _E3_64)
    q = multiply_add(q, r, _E2_64)
    q = multiply_add(q, r, _E1_64)
    return r, multiply_add(q, r, _E0_64), shifted


def _exp_64(x):
    x = _LOW_64 if x < _LOW_64 else x
    x = _HIGH_64 if x > _HIGH_64 else x
    r, q, shifted = _reduced_64(x)
    return _times_power_of_two(multiply_add(multiply_add(q, r, 1.0), r, 1.0), shifted)


def _log_64(x):
    small = x < _TINY_64
    k, m = _exponent_and_significand(x * _LIFT_64 if small else x)
    k = k - 54.0 if small else k
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = multiply_add(w, multiply_add(w, 1.531383769920937332e-01, 2.222219843214978396e-01), 3.999999999940941908e-01)
    even = multiply_add(w, 1.479819860511658591e-01, 1.818357216161805012e-01)
    even = multiply_add(w, multiply_add(w, even, 2.857142874366239149e-01), 6.666666666666735130e-01)
    half_square = 0.5 * f * f
    tail = z * even + w * odd
    y = multiply_add(s, half_square + tail, k * _LOG_LOW_64) - half_square + f + k * _LOG_HIGH_64
    y = y if x < np.inf else x
    y = -np.inf if x == 0.0 else y
    return np.nan if x < 0.0 else y


def _tanh_64(x):
    x = -20.0 if x < -20.0 else x
    x = 20.0 if x > 20.0 else x
    r, q, shifted = _reduced_64(x + x)
    expm1 = multiply_add(q, r * r, r)
    power = _times_power_of_two(1.0, shifted)
    e = multiply_add(power, expm1, power - 1.0)
    return e / (e + 2.0)


class ExpConstants(NamedTuple):
    """What exp is made of, for `vector.softmax`, which has the same operations in the same order on vectors."""

    low: Any
    log2e: Any
    shift: Any
    ln2_high: Any
    ln2_low: Any
    polynomial: tuple[Any, ...]  # of (exp(r) - 1 - r) / r**2, the highest power first
    mantissa_bits: int
    unbiased: int  # see `_unbiased`


EXP_CONSTANTS = {
    types.float32: ExpConstants(
        _LOW_32, _LOG2E_32, _SHIFT_32, _LN2_HIGH_32, _LN2_LOW_32, (_E4_32, _E3_32, _E2_32, _E1_32, _E0_32), 23,
        _unbiased(types.float32),
    ),
    types.float64: ExpConstants(
        _LOW_64, _LOG2E_64, _SHIFT_64, _LN2_HIGH_64, _LN2_LOW_64,
        (_E9_64, _E8_64, _E7_64, _E6_64, _E5_64, _E4_64, _E3_64, _E2_64, _E1_64, _E0_64), 52, _unbiased(types.float64),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One name for both
# ---------------------------------------------------------------------------------------------------------------------


def exp(x):
    """e**x of a float32 or float64 scalar, in jitted code only."""
    raise NotImplementedError("exp: call it from a function compiled by numba.njit")


def log(x):
    """The natural logarithm of a float32 or float64 scalar, in jitted code only."""
    raise NotImplementedError("log: call it from a function compiled by numba.njit")


def tanh(x):
    """The hyperbolic tangent of a float32 or float64 scalar, in jitted code only."""
    raise NotImplementedError("tanh: call it from a function compiled by numba.njit")


def _give(name, kernel_32, kernel_64) -> None:
    # error_model="numpy": a division that may raise is a branch, and a loop with a branch is not vectorised. Without
    # wrappers for callers from Python and C, which the functions do not have, they compile in half the time.
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

    @overload(name, jit_options=options)
    def choose(x):
        return {types.float32: kernel_32, types.float64: kernel_64}.get(x)


_give(exp, _exp_32, _exp_64)
_give(log, _log_32, _log_64)
_give(tanh, _tanh_32, _tanh_64)
