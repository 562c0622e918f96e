"""Bad input: the text of every error, on both backends, and nothing written to `out`."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import fastconv as fc
from fastconv.arguments import ALGORITHMS
from helpers import DTYPES

OUTPUTS = {
    "conv2d": (2, 4, 3, 2),
    "conv2d_weight_grad": (4, 6, 3, 3),
    "conv2d_input_grad": (2, 6, 5, 4),
    "conv2d_backward": None,
    "conv_transpose2d": (2, 6, 5, 4),
    "conv_bias_grad": (4,),
}


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def good_call(function):
    """Arguments that work, `out` included."""
    input, weight, grad_output = ones(2, 6, 5, 4), ones(4, 6, 3, 3), ones(2, 4, 3, 2)
    call = {
        "conv2d": {"input": input, "weight": weight, "bias": ones(4)},
        "conv2d_weight_grad": {"input": input, "weight_size": weight.shape, "grad_output": grad_output},
        "conv2d_input_grad": {"input_size": input.shape, "weight": weight, "grad_output": grad_output},
        "conv2d_backward": {"input": input, "weight": weight, "grad_output": grad_output},
        "conv_transpose2d": {"input": grad_output, "weight": weight, "bias": ones(6)},
        "conv_bias_grad": {"grad_output": grad_output},
    }[function]
    if OUTPUTS[function] is not None:
        call["out"] = np.full(OUTPUTS[function], 7, np.float32)
    return call


def call_with(function, changes, backend):
    call = {**good_call(function), "backend": backend, **changes}
    return call, lambda: getattr(fc, function)(**call)


@pytest.mark.parametrize("function", OUTPUTS)
def test_the_good_calls_are_good(function, backend):
    call, run = call_with(function, {}, backend)
    result = run()
    if "out" in call:
        assert result is call["out"]
        assert (result != 7).all()


_SHARED = ones(2000)


def _shared(shape, start=0):
    return _SHARED[start : start + int(np.prod(shape))].reshape(shape)


def _many(*shape):
    """One element in every place, so that nothing holds them all."""
    return np.broadcast_to(np.float32(1), shape)


def _read_only(*shape):
    array = ones(*shape)
    array.flags.writeable = False
    return array


_DTYPE = "(expected float32, float64, float16 or bfloat16)"
_ONE_DTYPE = "(expected one dtype for all arrays of a call)"
_AN_ARRAY = (
    "(expected an array: NumPy, or an object with __array_interface__, __cuda_array_interface__ or __dlpack__)"
)
_LAYOUT = "(expected one of 'NCHW', 'NHWC')"
_ALGORITHMS = f"(expected one of {', '.join(map(repr, ALGORITHMS))})"
_MODES = "(expected one of 'zeros', 'reflect', 'replicate', 'circular')"
_PADDING = (
    "(expected an int, 2 ints or 2 (before, after) pairs, one per spatial dimension, or one of 'valid', 'same', 'full')"
)

# function, changed arguments, error, its text after "function: "
ERRORS = [
    # arrays
    ("conv2d", {"input": [[1.0]]}, TypeError, f"input is a list {_AN_ARRAY}"),
    ("conv2d", {"weight": 3}, TypeError, f"weight is a int {_AN_ARRAY}"),
    ("conv2d", {"weight": None}, TypeError, f"weight is a NoneType {_AN_ARRAY}"),
    ("conv2d", {"bias": 1.5}, TypeError, f"bias is a float {_AN_ARRAY}"),
    ("conv2d", {"bias": np.float32(1)}, TypeError, f"bias is a float32 {_AN_ARRAY}"),
    ("conv2d", {"out": [1.0]}, TypeError, f"out is a list {_AN_ARRAY}"),
    ("conv2d_weight_grad", {"grad_output": "dy"}, TypeError, f"grad_output is a str {_AN_ARRAY}"),
    ("conv_bias_grad", {"grad_output": (1.0, 2.0)}, TypeError, f"grad_output is a tuple {_AN_ARRAY}"),
    ("conv2d", {"input": np.ma.ones((2, 6, 5, 4), np.float32)}, TypeError,
     "input is a masked array, whose mask would be ignored (expected a plain array)"),
    ("conv2d", {"out": np.ma.ones((2, 4, 3, 2), np.float32)}, TypeError,
     "out is a masked array, whose mask would be ignored (expected a plain array)"),
    # dtypes
    ("conv2d", {"input": ones(2, 6, 5, 4, dtype=np.int64)}, TypeError, f"input has dtype int64 {_DTYPE}"),
    ("conv2d", {"weight": ones(4, 6, 3, 3, dtype=np.uint8)}, TypeError, f"weight has dtype uint8 {_DTYPE}"),
    ("conv2d", {"bias": ones(4, dtype=bool)}, TypeError, f"bias has dtype bool {_DTYPE}"),
    ("conv2d", {"input": ones(2, 6, 5, 4, dtype=np.complex64)}, TypeError, f"input has dtype complex64 {_DTYPE}"),
    ("conv2d", {"input": ones(2, 6, 5, 4, dtype=object)}, TypeError, f"input has dtype object {_DTYPE}"),
    ("conv2d", {"input": ones(2, 6, 5, 4, dtype=ml_dtypes.float8_e4m3fn)}, TypeError,
     f"input has dtype float8_e4m3fn {_DTYPE}"),
    ("conv2d", {"input": ones(2, 6, 5, 4, dtype=">f4")}, TypeError,
     "input has the byte order of another machine (expected native float32)"),
    ("conv2d", {"weight": ones(4, 6, 3, 3, dtype=np.float64)}, TypeError,
     f"weight is float64, but input is float32 {_ONE_DTYPE}"),
    ("conv2d", {"bias": ones(4, dtype=np.float16)}, TypeError, f"bias is float16, but input is float32 {_ONE_DTYPE}"),
    ("conv2d_weight_grad", {"grad_output": ones(2, 4, 3, 2, dtype=ml_dtypes.bfloat16)}, TypeError,
     f"grad_output is bfloat16, but input is float32 {_ONE_DTYPE}"),
    ("conv2d_input_grad", {"grad_output": ones(2, 4, 3, 2, dtype=np.float64)}, TypeError,
     f"grad_output is float64, but weight is float32 {_ONE_DTYPE}"),
    ("conv2d_backward", {"grad_output": ones(2, 4, 3, 2, dtype=np.float64)}, TypeError,
     f"grad_output is float64, but input is float32 {_ONE_DTYPE}"),
    # shapes
    ("conv2d", {"input": ones(2, 4, 5, 4)}, ValueError,
     "weight has 6 input channels per group, but input has 4 channels and groups=1 (expected weight shape (O, 4, *K))"),
    ("conv2d", {"groups": 2}, ValueError,
     "weight has 6 input channels per group, but input has 6 channels and groups=2 (expected weight shape (O, 3, *K))"),
    ("conv2d", {"groups": 4}, ValueError, "input has 6 channels, which groups=4 does not divide"),
    ("conv2d", {"weight": ones(4, 2, 3, 3), "groups": 3}, ValueError,
     "weight has 4 output channels, which groups=3 does not divide"),
    ("conv2d", {"input": ones(2, 6, 5, 4, 1)}, ValueError,
     "input has shape (2, 6, 5, 4, 1) (expected 4 dimensions in layout 'NCHW', or 3 without the batch)"),
    ("conv2d", {"input": ones(5, 4)}, ValueError,
     "input has shape (5, 4) (expected 4 dimensions in layout 'NCHW', or 3 without the batch)"),
    ("conv2d", {"input": ones()}, ValueError,
     "input has shape () (expected 4 dimensions in layout 'NCHW', or 3 without the batch)"),
    ("conv2d", {"weight": ones(6, 3, 3)}, ValueError,
     "weight has shape (6, 3, 3) (expected 4 dimensions, (O, C/groups, *K (2 sizes)))"),
    ("conv2d", {"weight": ones()}, ValueError,
     "weight has shape () (expected 4 dimensions, (O, C/groups, *K (2 sizes)))"),
    ("conv2d", {"weight": ones(3, 3)}, ValueError,
     "input has shape (2, 6, 5, 4) and weight has shape (3, 3) (expected 2 dimensions of both, or weight shape "
     "(O, C/groups, *K (2 sizes)))"),
    ("conv2d", {"input": ones(2, 6, 0, 4)}, ValueError,
     "input has shape (2, 6, 0, 4) (expected no size of 0 but the batch)"),
    ("conv2d", {"input": ones(2, 0, 4, 6), "layout": "NHWC"}, ValueError,
     "input has shape (2, 0, 4, 6) (expected no size of 0 but the batch)"),
    ("conv2d", {"input": ones(6, 0, 4)}, ValueError, "input has shape (6, 0, 4) (expected no size of 0)"),
    ("conv2d", {"input": ones(0, 4), "weight": ones(3, 3)}, ValueError,
     "input has shape (0, 4) (expected no size of 0)"),
    ("conv2d", {"input": ones(2, 0, 5, 4), "weight": ones(4, 0, 3, 3)}, ValueError,
     "input has shape (2, 0, 5, 4) (expected no size of 0 but the batch)"),
    ("conv2d", {"weight": ones(0, 6, 3, 3)}, ValueError, "weight has shape (0, 6, 3, 3) (expected no size of 0)"),
    ("conv2d", {"weight": ones(4, 6, 3, 0)}, ValueError, "weight has shape (4, 6, 3, 0) (expected no size of 0)"),
    ("conv2d", {"bias": ones(3)}, ValueError, "bias has shape (3,) (expected (4,) one per output channel)"),
    ("conv2d", {"bias": ones(4, 1)}, ValueError, "bias has shape (4, 1) (expected (4,) one per output channel)"),
    ("conv2d", {"weight": ones(4, 6, 6, 3)}, ValueError,
     "weight spans 6 elements in dimension H, but input has 5 and 0 of padding (expected a kernel no larger than the "
     "padded input)"),
    ("conv2d", {"dilation": (1, 4), "padding": ((0, 0), (1, 2))}, ValueError,
     "weight spans 9 elements in dimension W, but input has 4 and 3 of padding (expected a kernel no larger than the "
     "padded input)"),
    ("conv2d_weight_grad", {"grad_output": ones(2, 4, 2, 2)}, ValueError,
     "grad_output has shape (2, 4, 2, 2) (expected (2, 4, 3, 2) the shape of the convolution's output)"),
    ("conv2d_input_grad", {"grad_output": ones(1, 4, 3, 2)}, ValueError,
     "grad_output has shape (1, 4, 3, 2) (expected (2, 4, 3, 2) the shape of the convolution's output)"),
    ("conv2d_backward", {"grad_output": ones(2, 4, 3, 2, 1)}, ValueError,
     "grad_output has shape (2, 4, 3, 2, 1) (expected (2, 4, 3, 2) the shape of the convolution's output)"),
    ("conv_bias_grad", {"grad_output": ones(2, 4, 3, 2, 1, 1)}, ValueError,
     "grad_output has shape (2, 4, 3, 2, 1, 1) (expected 4 dimensions in layout 'NCHW', 3 without the batch, or a bare "
     "2-D array)"),
    ("conv_bias_grad", {"grad_output": ones(3)}, ValueError,
     "grad_output has shape (3,) (expected 4 dimensions in layout 'NCHW', 3 without the batch, or a bare 2-D array)"),
    # shapes that are spelled out
    ("conv2d_weight_grad", {"weight_size": 3}, TypeError, "weight_size is a int (expected a shape, a tuple of ints)"),
    ("conv2d_weight_grad", {"weight_size": (4, 6, 3.0, 3)}, TypeError, "weight_size holds a float (expected integers)"),
    ("conv2d_weight_grad", {"weight_size": (4, 6, -3, 3)}, ValueError, "weight_size is -3 (expected at least 0)"),
    ("conv2d_weight_grad", {"weight_size": (4, 6, 0, 3)}, ValueError,
     "weight_size is (4, 6, 0, 3) (expected no size of 0)"),
    ("conv2d_weight_grad", {"weight_size": (4, 5, 3, 3)}, ValueError,
     "weight_size has 5 input channels per group, but input has 6 channels and groups=1 (expected weight_size "
     "(O, 6, *K))"),
    ("conv2d_weight_grad", {"weight_size": (4, 6, 3)}, ValueError,
     "weight_size is (4, 6, 3) (expected 4 dimensions, (O, C/groups, *K (2 sizes)))"),
    ("conv2d_weight_grad", {"weight_size": (3, 3)}, ValueError,
     "input has shape (2, 6, 5, 4) and weight_size is (3, 3) (expected 2 dimensions of both, or weight_size "
     "(O, C/groups, *K (2 sizes)))"),
    ("conv2d_weight_grad", {"weight_size": (2, 6, 2**30, 2**30)}, ValueError,
     "weight_size is (2, 6, 1073741824, 1073741824) (expected fewer than 2**60 elements)"),
    ("conv2d_weight_grad", {"weight_size": (2**57, 6, 1, 1)}, ValueError,
     "input has shape (2, 6, 5, 4) and weight_size is (144115188075855872, 6, 1, 1), with which the output would have "
     "shape (2, 144115188075855872, 5, 4) (expected fewer than 2**60 elements)"),
    ("conv2d_weight_grad", {"padding": 2**31 - 1}, ValueError,
     "padding is 2147483647, with which the output would have shape (2, 4, 4294967297, 4294967296) (expected fewer "
     "than 2**60 elements)"),
    ("conv2d_input_grad", {"input_size": (2, 6)}, ValueError,
     "input_size is (2, 6) (expected 4 dimensions in layout 'NCHW', or 3 without the batch)"),
    ("conv2d_input_grad", {"input_size": (5, 4), "weight": ones(3, 3, 3)}, ValueError,
     "weight has shape (3, 3, 3) (expected 4 dimensions, (O, C/groups, *K (2 sizes)))"),
    ("conv2d_input_grad", {"weight": ones(3, 3)}, ValueError,
     "input_size is (2, 6, 5, 4) and weight has shape (3, 3) (expected 2 dimensions of both, or weight shape "
     "(O, C/groups, *K (2 sizes)))"),
    ("conv2d_input_grad", {"input_size": (2, 6, 5, 0)}, ValueError,
     "input_size is (2, 6, 5, 0) (expected no size of 0 but the batch)"),
    ("conv2d_input_grad", {"input_size": (2**30, 6, 2**30, 4), "stride": 2**31 - 1}, ValueError,
     "input_size is (1073741824, 6, 1073741824, 4) (expected fewer than 2**60 elements)"),
    ("conv2d_input_grad", {"input_size": (0, 6, 5, 2**70)}, ValueError,
     f"input_size is (0, 6, 5, {2**70}) (expected fewer than 2**60 elements)"),
    ("conv2d_input_grad", {"input_size": None}, TypeError,
     "input_size is a NoneType (expected a shape, a tuple of ints)"),
    ("conv2d_input_grad", {"input_size": (2, 6, 5, True)}, TypeError, "input_size holds a bool (expected integers)"),
    ("conv2d_input_grad", {"input_size": (2, 6, 1, 1)}, ValueError,
     "weight spans 3 elements in dimension H, but input_size has 1 and 0 of padding (expected a kernel no larger than "
     "the padded input)"),
    # numbers
    ("conv2d", {"stride": 0}, ValueError, "stride is 0 (expected at least 1)"),
    ("conv2d", {"stride": (1, -2)}, ValueError, "stride is -2 (expected at least 1)"),
    ("conv2d", {"stride": (1, 1, 1)}, ValueError,
     "stride is (1, 1, 1) (expected an int or 2 of them, one per spatial dimension)"),
    ("conv2d", {"stride": ()}, ValueError, "stride is () (expected an int or 2 of them, one per spatial dimension)"),
    ("conv2d", {"stride": 1.0}, TypeError, "stride holds a float (expected integers)"),
    ("conv2d", {"stride": (1.0, 1.0)}, TypeError, "stride holds a float (expected integers)"),
    ("conv2d", {"stride": True}, TypeError, "stride holds a bool (expected integers)"),
    ("conv2d", {"stride": (True, 1)}, TypeError, "stride holds a bool (expected integers)"),
    ("conv2d", {"stride": None}, TypeError, "stride holds a NoneType (expected integers)"),
    ("conv2d", {"stride": "2"}, TypeError, "stride holds a str (expected integers)"),
    ("conv2d", {"stride": np.array(1.5)}, TypeError, "stride holds a ndarray (expected integers)"),
    ("conv2d", {"stride": np.array([1.5, 1])}, TypeError, "stride holds a float64 (expected integers)"),
    ("conv2d", {"stride": 2**31}, ValueError, "stride is 2147483648 (expected at most 2147483647)"),
    ("conv2d", {"dilation": 0}, ValueError, "dilation is 0 (expected at least 1)"),
    ("conv2d", {"dilation": [1]}, ValueError,
     "dilation is [1] (expected an int or 2 of them, one per spatial dimension)"),
    ("conv2d", {"dilation": 2**70}, ValueError, f"dilation is {2**70} (expected at most 2147483647)"),
    ("conv2d", {"groups": 0}, ValueError, "groups is 0 (expected at least 1)"),
    ("conv2d", {"groups": 1.0}, TypeError, "groups holds a float (expected integers)"),
    ("conv2d", {"groups": (1, 1)}, TypeError, "groups holds a tuple (expected integers)"),
    # padding
    ("conv2d", {"padding": -1}, ValueError, "padding is -1 (expected at least 0)"),
    ("conv2d", {"padding": ((0, 0), (0, -1))}, ValueError, "padding is -1 (expected at least 0)"),
    ("conv2d", {"padding": 1.5}, TypeError, "padding holds a float (expected integers)"),
    ("conv2d", {"padding": ((0.0, 0), (0, 0))}, TypeError, "padding holds a float (expected integers)"),
    ("conv2d", {"padding": (0, False)}, TypeError, "padding holds a bool (expected integers)"),
    ("conv2d", {"padding": (1, (1, 1))}, TypeError, "padding holds a tuple (expected integers)"),
    ("conv2d", {"padding": None}, TypeError, "padding holds a NoneType (expected integers)"),
    ("conv2d", {"padding": (1, 1, 1)}, ValueError, f"padding is (1, 1, 1) {_PADDING}"),
    ("conv2d", {"padding": ((1, 1),)}, ValueError, f"padding is ((1, 1),) {_PADDING}"),
    ("conv2d", {"padding": ((1, 1), (1, 1, 1))}, ValueError,
     "padding is ((1, 1), (1, 1, 1)) (expected (before, after) pairs)"),
    ("conv2d", {"padding": "SAME"}, ValueError,
     "padding is 'SAME' (expected one of 'valid', 'same', 'full', or integers)"),
    ("conv2d", {"padding": 2**31}, ValueError, "padding is 2147483648 (expected at most 2147483647)"),
    ("conv2d", {"padding": 2**31 - 1}, ValueError,
     "padding is 2147483647, with which the output would have shape (2, 4, 4294967297, 4294967296) (expected fewer "
     "than 2**60 elements)"),
    ("conv2d", {"padding": "full", "dilation": 2**31 - 1}, ValueError,
     "padding is 'full', with which the output would have shape (2, 4, 4294967299, 4294967298) (expected fewer than "
     "2**60 elements)"),
    ("conv2d", {"padding": ((2**31 - 1, 0), [0, 2**31 - 1])}, ValueError,
     "padding is ((2147483647, 0), [0, 2147483647]), with which the output would have shape "
     "(2, 4, 2147483650, 2147483649) (expected fewer than 2**60 elements)"),
    ("conv2d", {"padding": (5, 0), "padding_mode": "reflect"}, ValueError,
     "padding of 5 reflects more than the 5 elements of input in dimension H (expected padding < size)"),
    ("conv2d", {"padding": ((0, 0), (5, 0)), "padding_mode": "circular"}, ValueError,
     "padding of 5 wraps around the 4 elements of input in dimension W more than once (expected padding <= size)"),
    # words
    ("conv2d", {"padding_mode": "constant"}, ValueError, f"padding_mode is 'constant' {_MODES}"),
    ("conv2d", {"padding_mode": None}, ValueError, f"padding_mode is None {_MODES}"),
    ("conv2d", {"padding_mode": ["zeros"]}, ValueError, f"padding_mode is ['zeros'] {_MODES}"),
    ("conv2d", {"layout": "NCL"}, ValueError, f"layout is 'NCL' {_LAYOUT}"),
    ("conv2d", {"layout": 1}, ValueError, f"layout is 1 {_LAYOUT}"),
    ("conv_bias_grad", {"layout": "CHWN"}, ValueError,
     "layout is 'CHWN' (expected one of 'NCL', 'NLC', 'NCHW', 'NHWC', 'NCDHW', 'NDHWC')"),
    ("conv2d", {"activation": "gelu"}, ValueError, "activation is 'gelu' (expected one of None, 'relu')"),
    ("conv2d", {"activation": 1}, ValueError, "activation is 1 (expected one of None, 'relu')"),
    ("conv2d", {"algorithm": "magic"}, ValueError, f"algorithm is 'magic' {_ALGORITHMS}"),
    ("conv2d", {"algorithm": None}, ValueError, f"algorithm is None {_ALGORITHMS}"),
    ("conv2d", {"algorithm": np.ones(2)}, ValueError,
     f"algorithm is array([1., 1.]) {_ALGORITHMS}"),
    ("conv2d_weight_grad", {"algorithm": "magic"}, ValueError,
     f"algorithm is 'magic' {_ALGORITHMS}"),
    ("conv2d_input_grad", {"algorithm": "magic"}, ValueError,
     f"algorithm is 'magic' {_ALGORITHMS}"),
    ("conv2d_backward", {"algorithm": "magic", "needs": "bias"}, ValueError,
     f"algorithm is 'magic' {_ALGORITHMS}"),
    ("conv2d_backward", {"needs": ("weights",)}, ValueError,
     "needs is 'weights' (expected one of 'input', 'weight', 'bias')"),
    ("conv2d_backward", {"needs": None}, TypeError,
     "needs is a NoneType (expected a tuple of 'input', 'weight', 'bias')"),
    ("conv2d_backward", {"needs": 3}, TypeError, "needs is a int (expected a tuple of 'input', 'weight', 'bias')"),
    # out and accumulate
    ("conv2d", {"out": ones(2, 4, 2, 3)}, ValueError, "out has shape (2, 4, 2, 3) (expected (2, 4, 3, 2))"),
    ("conv2d", {"out": ones(2, 4, 3, 2, dtype=np.float64)}, TypeError, "out is float64 (expected float32)"),
    ("conv2d", {"out": ones(2, 4, 3, 2, dtype=">f4")}, TypeError,
     "out has the byte order of another machine (expected native float32)"),
    ("conv2d", {"out": _read_only(2, 4, 3, 2)}, ValueError,
     "out cannot be written (expected a writable array whose elements do not share memory)"),
    ("conv2d", {"out": np.lib.stride_tricks.as_strided(ones(1), (2, 4, 3, 2), (0, 0, 0, 0))}, ValueError,
     "out cannot be written (expected a writable array whose elements do not share memory)"),
    ("conv2d", {"out": np.lib.stride_tricks.as_strided(ones(99), (2, 4, 3, 2), (48, 12, 4, 4))}, ValueError,
     "out cannot be written (expected a writable array whose elements do not share memory)"),
    ("conv2d", {"input": _shared((2, 6, 5, 4)), "out": _shared((2, 4, 3, 2), 239)}, ValueError,
     "out overlaps input in memory (expected an array of its own)"),
    ("conv2d", {"weight": _shared((4, 6, 3, 3)), "out": _shared((2, 4, 3, 2))[..., ::-1]}, ValueError,
     "out overlaps weight in memory (expected an array of its own)"),
    ("conv2d", {"bias": _shared((4,), 47), "out": _shared((2, 4, 3, 2))}, ValueError,
     "out overlaps bias in memory (expected an array of its own)"),
    ("conv2d_weight_grad", {"grad_output": _shared((2, 4, 3, 2)), "out": _shared((4, 6, 3, 3), 47)}, ValueError,
     "out overlaps grad_output in memory (expected an array of its own)"),
    ("conv2d_input_grad", {"weight": _shared((4, 6, 3, 3)), "out": _shared((2, 6, 5, 4))}, ValueError,
     "out overlaps weight in memory (expected an array of its own)"),
    ("conv_bias_grad", {"grad_output": _shared((2, 4, 3, 2)), "out": _shared((4,), 47)}, ValueError,
     "out overlaps grad_output in memory (expected an array of its own)"),
    ("conv_bias_grad", {"out": ones(4, 1)}, ValueError, "out has shape (4, 1) (expected (4,))"),
    ("conv2d_weight_grad", {"out": None, "accumulate": True}, ValueError,
     "accumulate=True adds into out, but out is None (expected an array)"),
    ("conv2d_input_grad", {"accumulate": 1}, TypeError, "accumulate is a int (expected True or False)"),
    ("conv_bias_grad", {"accumulate": None}, TypeError, "accumulate is a NoneType (expected True or False)"),
    # transposed convolution
    ("conv_transpose2d", {"input": ones(2, 3, 3, 2)}, ValueError,
     "weight has 4 input channels, but input has 3 (expected weight shape (3, O/groups, *K))"),
    ("conv_transpose2d", {"groups": 3}, ValueError, "input has 4 channels, which groups=3 does not divide"),
    ("conv_transpose2d", {"bias": ones(4)}, ValueError, "bias has shape (4,) (expected (6,) one per output channel)"),
    ("conv_transpose2d", {"output_padding": 1}, ValueError,
     "output_padding is 1 (expected less than stride=1 or dilation=1, whichever is more)"),
    ("conv_transpose2d", {"stride": (2, 3), "output_padding": (1, 3)}, ValueError,
     "output_padding is 3 (expected less than stride=3 or dilation=1, whichever is more)"),
    ("conv_transpose2d", {"padding": 2}, ValueError,
     "padding is 2, with which the result would have size (1, 0) (expected less padding or a larger kernel or input)"),
    ("conv_transpose2d", {"weight": ones(4, 6, 3)}, ValueError,
     "weight has shape (4, 6, 3) (expected 4 dimensions, (C, O/groups, *K (2 sizes)))"),
    ("conv_transpose2d", {"weight": ones(3, 3)}, ValueError,
     "input has shape (2, 4, 3, 2) and weight has shape (3, 3) (expected 2 dimensions of both, or weight shape "
     "(C, O/groups, *K (2 sizes)))"),
    ("conv_transpose2d", {"input": ones(2, 4, 3, 0)}, ValueError,
     "input has shape (2, 4, 3, 0) (expected no size of 0 but the batch)"),
    ("conv_transpose2d", {"stride": (1.0, 1)}, TypeError, "stride holds a float (expected integers)"),
    ("conv_transpose2d", {"output_padding": -1}, ValueError, "output_padding is -1 (expected at least 0)"),
    ("conv_transpose2d", {"stride": 2**31 - 1, "dilation": 2**31 - 1}, ValueError,
     "stride is 2147483647 and dilation is 2147483647, with which the result would have shape "
     "(2, 6, 8589934589, 6442450942) (expected fewer than 2**60 elements)"),
    ("conv_transpose2d", {"stride": 2**31 - 1, "dilation": 2}, ValueError,
     "stride is 2147483647, with which the result would have shape (2, 6, 4294967299, 2147483652) (expected fewer than "
     "2**60 elements)"),
    ("conv_transpose2d", {"dilation": (2**31 - 1,) * 2}, ValueError,
     "dilation is (2147483647, 2147483647), with which the result would have shape (2, 6, 4294967297, 4294967296) "
     "(expected fewer than 2**60 elements)"),
    ("conv_transpose2d", {"weight": ones(4, 6, 1, 1), "dilation": 2**31 - 1, "output_padding": 2**31 - 2}, ValueError,
     "output_padding is 2147483646, with which the result would have shape (2, 6, 2147483649, 2147483648) (expected "
     "fewer than 2**60 elements)"),
    ("conv_transpose2d", {"padding": (4, 0), "padding_mode": "reflect", "dilation": 3}, ValueError,
     "padding of 4 reflects more than the 1 elements of the result in dimension H (expected padding < size)"),
    ("conv_transpose2d", {"out": ones(2, 6, 5, 5)}, ValueError, "out has shape (2, 6, 5, 5) (expected (2, 6, 5, 4))"),
    ("conv_transpose2d", {"activation": "tanh"}, ValueError, "activation is 'tanh' (expected one of None, 'relu')"),
    ("conv_transpose2d", {"algorithm": "magic"}, ValueError, f"algorithm is 'magic' {_ALGORITHMS}"),
    # backend
    ("conv2d", {"backend": "gpu"}, ValueError, "backend is 'gpu' (expected one of 'auto', 'cpu', 'cuda')"),
    ("conv2d", {"backend": None}, ValueError, "backend is None (expected one of 'auto', 'cpu', 'cuda')"),
    ("conv2d", {"backend": np.ones(2)}, ValueError,
     "backend is array([1., 1.]) (expected one of 'auto', 'cpu', 'cuda')"),
]  # fmt: skip


def _name(value):
    return re.sub(r"\W+", "-", f"{value[0]}-{','.join(value[1])}-{value[3][:40]}")


@pytest.mark.parametrize("case", ERRORS, ids=[f"{i}-{_name(case)}" for i, case in enumerate(ERRORS)])
def test_text_of_error(case, backend):
    """After a call that works, so that nothing remembered from it lets the bad one pass."""
    function, changes, error, text = case
    call_with(function, {}, backend)[1]()
    call, run = call_with(function, changes, backend)
    before = {name: value.copy() for name, value in call.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error) as info:
        run()
    assert str(info.value) == f"{function}: {text}"
    for name, value in before.items():
        np.testing.assert_array_equal(call[name], value, f"{name} was written")


def test_example_of_the_contract():
    with pytest.raises(ValueError) as info:
        fc.conv2d(ones(1, 6, 5, 5), ones(4, 4, 3, 3))
    assert str(info.value) == (
        "conv2d: weight has 4 input channels per group, but input has 6 channels and groups=1 "
        "(expected weight shape (O, 6, *K))"
    )


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: fc.Conv2d(ones(0, 6, 3, 3)), "Conv2d: weight has shape (0, 6, 3, 3) (expected no size of 0)"),
        (lambda: fc.explain((2, 6, 5, 0), (4, 6, 3, 3)),
         "explain: input_shape is (2, 6, 5, 0) (expected no size of 0 but the batch)"),
        (lambda: fc.explain((2, 6, 5, 4), (4, 5, 3, 3)),
         "explain: weight_shape has 5 input channels per group, but input_shape has 6 channels and groups=1 (expected "
         "weight_shape (O, 6, *K))"),
        (lambda: fc.explain((2**30, 6, 2**30, 4), (4, 6, 3, 3)),
         "explain: input_shape is (1073741824, 6, 1073741824, 4) (expected fewer than 2**60 elements)"),
        (lambda: fc.explain((2, 6, 5, 4), (4, 6, 3, 3), padding=2**31 - 1),
         "explain: padding is 2147483647, with which the output would have shape (2, 4, 4294967297, 4294967296) "
         "(expected fewer than 2**60 elements)"),
        (lambda: fc.conv2d(_many(2**20, 6, 2**10, 2**10), _many(2**21, 6, 1, 1)),
         "conv2d: input has shape (1048576, 6, 1024, 1024) and weight has shape (2097152, 6, 1, 1), with which the "
         "output would have shape (1048576, 2097152, 1024, 1024) (expected fewer than 2**60 elements)"),
        (lambda: fc.conv_transpose2d(_many(2**28, 4, 2**15, 2**15), ones(4, 6, 1, 1)),
         "conv_transpose2d: input has shape (268435456, 4, 32768, 32768) and weight has shape (4, 6, 1, 1), with which "
         "the result would have shape (268435456, 6, 32768, 32768) (expected fewer than 2**60 elements)"),
    ],
    ids=["prepared", "zero", "channels", "too large", "padding", "views", "transposed views"],
)  # fmt: skip
def test_texts_of_other_calls(run, text):
    with pytest.raises(ValueError) as error:
        run()
    assert str(error.value) == text


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", ["conv{}d", "conv{}d_weight_grad", "conv{}d_input_grad", "conv{}d_backward",
                                  "conv_transpose{}d"])  # fmt: skip
def test_every_function_names_itself(name, ndim):
    function = name.format(ndim)
    with pytest.raises(TypeError, match=rf"^{function}: \w+ is a list \(expected "):
        getattr(fc, function)([1], [1], [1])


def test_tensors_that_cannot_be_read(backend):
    """One that requires grad, whose gradient would be lost without a word; one without memory; a sparse one."""
    torch = pytest.importorskip("torch", reason="torch tensors are one of the array kinds that are accepted")
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(1, 1, 3, dtype=dtype, requires_grad=True), torch.ones(1, 1, 3, dtype=dtype)
        with pytest.raises(TypeError, match=r"^conv1d: input cannot be read as a NumPy array: .*requires grad"):
            fc.conv1d(x, w, backend=backend)
    meta = torch.ones(1, 1, 3, device="meta")
    with pytest.raises((TypeError, ValueError), match=r"^conv1d: input "):
        fc.conv1d(meta, w, backend=backend)
    sparse = torch.ones(3, 3).to_sparse()
    with pytest.raises((TypeError, ValueError), match=r"^conv2d: input "):
        fc.conv2d(sparse, torch.ones(1, 1), backend=backend)


# ---------------------------------------------------------------------------------------------------------------------
# Everything nasty in every place: an error that names the function, or a right result; never anything else
# ---------------------------------------------------------------------------------------------------------------------


NASTY = {
    "none": None,
    "list": [1.0, 2.0],
    "nested": [[1, 2], [3, 4]],
    "int": 3,
    "huge": 10**30,
    "negative": -3,
    "minus_huge": -(2**63) - 1,
    "float": 2.5,
    "nan": float("nan"),
    "bool": True,
    "string": "relu",
    "empty_string": "",
    "empty": (),
    "bytes": b"zeros",
    "object": object(),
    "type": np.ndarray,
    "set": {1, 2},
    "dict": {"a": 1},
    "ellipsis": ...,
    "numpy_scalar": np.float32(1),
    "numpy_int": np.int8(-1),
    "masked": np.ma.masked_array(np.ones((2, 6, 5, 4), np.float32), mask=True),
    "complex": ones(2, 6, 5, 4, dtype=np.complex128),
    "integers": ones(2, 6, 5, 4, dtype=np.int32),
    "big_endian": ones(2, 6, 5, 4, dtype=">f4"),
    "objects": ones(2, 6, 5, 4, dtype=object),
    "records": np.zeros(3, [("a", "f4")]),
    "dates": np.zeros((2, 6, 5, 4), "M8[s]"),
    "strings": np.full((2, 6, 5, 4), "a"),
    "long_double": ones(2, 6, 5, 4, dtype=np.longdouble),
    "zero_dimensional": ones(),
    "one_dimensional": ones(5),
    "seven_dimensional": ones(1, 1, 1, 1, 1, 1, 1),
    "zero_size": ones(2, 0, 5, 4),
    "all_zero_size": ones(0, 0, 0, 0),
    "other_dtype": ones(2, 6, 5, 4, dtype=np.float16),
    "wrong_shape": ones(3, 5, 2, 2),
    "recursive": (lambda a: (a.append(a), a)[1])([1]),
}


# What of it is good input after all.
HARMLESS = {
    ("conv2d", "bias", "none"), ("conv_transpose2d", "bias", "none"), *((f, "out", "none") for f in OUTPUTS),
    ("conv2d", "activation", "none"), ("conv2d", "activation", "string"),
    ("conv_transpose2d", "activation", "none"), ("conv_transpose2d", "activation", "string"),
    ("conv2d_weight_grad", "accumulate", "bool"), ("conv2d_input_grad", "accumulate", "bool"),
    ("conv_bias_grad", "accumulate", "bool"), ("conv2d_backward", "needs", "empty"),
}  # fmt: skip


def _error_of(run):
    try:
        run()
    except (TypeError, ValueError) as error:
        return error
    return None


@pytest.mark.parametrize("function", OUTPUTS)
def test_nasty_values_everywhere(function, backend):
    code = getattr(fc, function).__code__
    for argument in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        for name, value in NASTY.items():
            call, run = call_with(function, {argument: value}, backend)
            error = _error_of(run)
            assert (error is None) == ((function, argument, name) in HARMLESS), (argument, name, error)
            if error is not None:
                assert str(error).startswith(f"{function}: "), (argument, name, error)
                if argument != "out" and "out" in call:
                    assert (call["out"] == 7).all(), (argument, name)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes_are_all_accepted(dtype, backend):
    for function in OUTPUTS:
        call = good_call(function)
        call = {k: v.astype(DTYPES[dtype]) if isinstance(v, np.ndarray) else v for k, v in call.items()}
        getattr(fc, function)(**call, backend=backend)


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "error", "text"),
    [
        (0, ValueError, "set_num_threads: n is 0 (expected a positive int)"),
        (-1, ValueError, "set_num_threads: n is -1 (expected a positive int)"),
        (1.0, TypeError, "set_num_threads: n is a float (expected a positive int)"),
        (True, TypeError, "set_num_threads: n is a bool (expected a positive int)"),
        ("2", TypeError, "set_num_threads: n is a str (expected a positive int)"),
        (None, TypeError, "set_num_threads: n is a NoneType (expected a positive int)"),
    ],
)
def test_set_num_threads(n, error, text):
    before = fc.get_num_threads()
    with pytest.raises(error) as info:
        fc.set_num_threads(n)
    assert str(info.value) == text
    assert fc.get_num_threads() == before
