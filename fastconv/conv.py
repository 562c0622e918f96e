"""The public convolution functions: check, geometry, dispatch.

Everything the user passes is judged in `arguments`, every size is derived in `geometry`, `backends` says where the
arrays live, and the kernels are in `cpu.convolution` and `cuda_kernels.convolution` under the same names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import arguments
from .algorithms import check
from .backends import home_of

__all__ = [
    "ConvGrads",
    "conv1d",
    "conv1d_backward",
    "conv1d_input_grad",
    "conv1d_weight_grad",
    "conv2d",
    "conv2d_backward",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "conv3d",
    "conv3d_backward",
    "conv3d_input_grad",
    "conv3d_weight_grad",
    "conv_bias_grad",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]


class ConvGrads(NamedTuple):
    """The gradients of a convolution; None for one that was not asked for."""

    input: Any
    weight: Any
    bias: Any


# ---------------------------------------------------------------------------------------------------------------------
# The bodies, once for 1-D, 2-D and 3-D
# ---------------------------------------------------------------------------------------------------------------------


def forward(
    function, ndim, input, weight, bias, stride, padding, dilation, groups, padding_mode, layout, activation,
    algorithm, out, backend, packed=None,
):  # fmt: skip
    home = home_of(function, backend, input=input, weight=weight, bias=bias, out=out)
    x = home.admit(function, "input", input)
    w = home.admit(function, "weight", weight)
    b = None if bias is None else home.admit(function, "bias", bias)
    dtype = arguments.common_dtype(function, input=x, weight=w, bias=b)
    plan = arguments.convolution_plan(
        function, ndim, x.shape, w.shape, stride, padding, dilation, groups, padding_mode, layout
    )
    arguments.check_choice(function, "activation", activation, arguments.ACTIVATIONS)
    check(function, "forward", plan.geometry, dtype, algorithm, home.name)
    if b is not None:
        arguments.check_shape(function, "bias", b, (plan.geometry.out_channels,), "one per output channel")
    y, deliver = home.output(function, out, plan.output_shape, dtype, input)
    if out is not None:
        arguments.check_output(function, home, y, plan.output_shape, dtype, input=x, weight=w, bias=b)
    form = plan.activation_form
    home.operation("convolution").forward(
        plan.geometry, form(x), plan.weight_form(w), b, activation == "relu", algorithm, packed, form(y)
    )
    return y if deliver is None else deliver()


def _weight_grad(
    function, ndim, input, weight_size, grad_output, stride, padding, dilation, groups, padding_mode, layout,
    algorithm, out, accumulate, backend,
):  # fmt: skip
    home = home_of(function, backend, input=input, grad_output=grad_output, out=out)
    x = home.admit(function, "input", input)
    dy = home.admit(function, "grad_output", grad_output)
    dtype = arguments.common_dtype(function, input=x, grad_output=dy)
    plan = arguments.convolution_plan(
        function, ndim, x.shape, weight_size, stride, padding, dilation, groups, padding_mode, layout,
        weight_name="weight_size",
    )  # fmt: skip
    check(function, "weight_grad", plan.geometry, dtype, algorithm, home.name)
    arguments.check_shape(function, "grad_output", dy, plan.output_shape, "the shape of the convolution's output")
    accumulate = arguments.check_accumulate(function, accumulate, out)
    dw, deliver = home.output(function, out, plan.weight_shape, dtype, input)
    if out is not None:
        arguments.check_output(function, home, dw, plan.weight_shape, dtype, input=x, grad_output=dy)
    form = plan.activation_form
    home.operation("convolution").weight_grad(
        plan.geometry, form(x), form(dy), accumulate, algorithm, plan.weight_form(dw)
    )
    return dw if deliver is None else deliver()


def _input_grad(
    function, ndim, input_size, weight, grad_output, stride, padding, dilation, groups, padding_mode, layout,
    algorithm, out, accumulate, backend,
):  # fmt: skip
    home = home_of(function, backend, weight=weight, grad_output=grad_output, out=out)
    w = home.admit(function, "weight", weight)
    dy = home.admit(function, "grad_output", grad_output)
    dtype = arguments.common_dtype(function, weight=w, grad_output=dy)
    plan = arguments.convolution_plan(
        function, ndim, input_size, w.shape, stride, padding, dilation, groups, padding_mode, layout,
        input_name="input_size",
    )  # fmt: skip
    check(function, "input_grad", plan.geometry, dtype, algorithm, home.name)
    arguments.check_shape(function, "grad_output", dy, plan.output_shape, "the shape of the convolution's output")
    accumulate = arguments.check_accumulate(function, accumulate, out)
    dx, deliver = home.output(function, out, plan.input_shape, dtype, grad_output)
    if out is not None:
        arguments.check_output(function, home, dx, plan.input_shape, dtype, weight=w, grad_output=dy)
    form = plan.activation_form
    home.operation("convolution").input_grad(
        plan.geometry, plan.weight_form(w), form(dy), None, False, accumulate, algorithm, form(dx)
    )
    return dx if deliver is None else deliver()


def _transposed(
    function, ndim, input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, layout,
    activation, algorithm, out, backend,
):  # fmt: skip
    home = home_of(function, backend, input=input, weight=weight, bias=bias, out=out)
    x = home.admit(function, "input", input)
    w = home.admit(function, "weight", weight)
    b = None if bias is None else home.admit(function, "bias", bias)
    dtype = arguments.common_dtype(function, input=x, weight=w, bias=b)
    plan = arguments.transposed_convolution_plan(
        function, ndim, x.shape, w.shape, stride, padding, output_padding, groups, dilation, padding_mode, layout
    )
    arguments.check_choice(function, "activation", activation, arguments.ACTIVATIONS)
    check(function, "input_grad", plan.geometry, dtype, algorithm, home.name)
    if b is not None:
        arguments.check_shape(function, "bias", b, (plan.geometry.in_channels,), "one per output channel")
    y, deliver = home.output(function, out, plan.input_shape, dtype, input)
    if out is not None:
        arguments.check_output(function, home, y, plan.input_shape, dtype, input=x, weight=w, bias=b)
    form = plan.activation_form
    home.operation("convolution").input_grad(
        plan.geometry, plan.weight_form(w), form(x), b, activation == "relu", False, algorithm, form(y)
    )
    return y if deliver is None else deliver()


def _backward(
    function, ndim, input, weight, grad_output, stride, padding, dilation, groups, needs, padding_mode, layout,
    algorithm, backend,
):  # fmt: skip
    wanted = arguments.check_needs(function, needs)
    arguments.check_choice(function, "algorithm", algorithm, arguments.ALGORITHMS)
    home = home_of(function, backend, input=input, weight=weight, grad_output=grad_output)
    x, w = home.admit(function, "input", input), home.admit(function, "weight", weight)
    dy = home.admit(function, "grad_output", grad_output)
    arguments.common_dtype(function, input=x, weight=w, grad_output=dy)
    plan = arguments.convolution_plan(
        function, ndim, x.shape, w.shape, stride, padding, dilation, groups, padding_mode, layout
    )
    arguments.check_shape(function, "grad_output", dy, plan.output_shape, "the shape of the convolution's output")
    options = (stride, padding, dilation, groups, padding_mode, layout, algorithm, None, False, backend)
    return ConvGrads(
        _input_grad(function, ndim, plan.input_shape, weight, grad_output, *options) if "input" in wanted else None,
        _weight_grad(function, ndim, input, plan.weight_shape, grad_output, *options) if "weight" in wanted else None,
        _bias_grad(function, grad_output, layout, None, False, backend) if "bias" in wanted else None,
    )


def _bias_grad(function, grad_output, layout, out, accumulate, backend):
    home = home_of(function, backend, grad_output=grad_output, out=out)
    dy = home.admit(function, "grad_output", grad_output)
    dtype = arguments.common_dtype(function, grad_output=dy)
    form, channels = arguments.bias_gradient_form(function, tuple(dy.shape), layout)
    accumulate = arguments.check_accumulate(function, accumulate, out)
    db, deliver = home.output(function, out, (channels,), dtype, grad_output)
    if out is not None:
        arguments.check_output(function, home, db, (channels,), dtype, grad_output=dy)
    home.operation("convolution").bias_grad(form(dy), accumulate, db)
    return db if deliver is None else deliver()


# ---------------------------------------------------------------------------------------------------------------------
# 1-D
# ---------------------------------------------------------------------------------------------------------------------


def conv1d(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros", layout="NCL",
    activation=None, algorithm="auto", out=None, backend="auto",
):  # fmt: skip
    """Convolve (cross-correlate: the kernel is not flipped) `input` with `weight` in 1 dimension.

        y[n, o, p] = b[o] + sum over c, k of  w[o, c, k] * x[n, c, p*stride + k*dilation - before]

    (`reference.convolution`; Goodfellow, Bengio and Courville, Deep Learning, eq. 9.6.)

    Parameters
    ----------
    input : array (N, C, L), or (N, L, C) with layout="NLC"; without N: unbatched
        float32, float64, float16 or bfloat16, any strides.
    weight : array (O, C/groups, KL), of the input's dtype, in either layout.
        A bare signal (L,) with a bare kernel (KL,) gives a bare signal.
    bias : array (O,) or None
    stride, dilation : int, or one per spatial dimension
    padding : int; one per spatial dimension; a (before, after) pair per spatial dimension; or "valid" (none), "full"
        (dilation*(k-1) on both sides), "same" (output size ceil(size/stride), an odd total pads one more after)
    groups : int, a divisor of C and O
    padding_mode : "zeros", "reflect", "replicate" or "circular"
    activation : None or "relu", applied after the bias in the same pass
    algorithm : "auto" (by the shape: see `explain`), "direct", "winograd", "fft" or "loops" (the plain loops)
    out : array of the result's shape and dtype that overlaps no input; it is filled and returned
    backend : "auto" (where the arrays live), "cpu" or "cuda"

    Returns
    -------
    array (N, O, L') of the input's library and dtype, per dimension of size
        (size + before + after - dilation*(k-1) - 1)//stride + 1.

    Raises
    ------
    ValueError for a wrong value or shape, TypeError for a wrong type or dtype, BackendUnavailableError.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8), np.float32), np.ones((4, 3, 3), np.float32)
    >>> fc.conv1d(x, w, padding=1).shape
    (2, 4, 8)
    """
    return forward(
        "conv1d", 1, input, weight, bias, stride, padding, dilation, groups, padding_mode, layout, activation,
        algorithm, out, backend,
    )  # fmt: skip


def conv1d_weight_grad(
    input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros",
    layout="NCL", algorithm="auto", out=None, accumulate=False, backend="auto",
):  # fmt: skip
    """Gradient of `conv1d` with respect to its weight.

    The product of the output gradient and the input element that each tap met, summed over batch and output positions
    (`reference.convolution_weight_grad`).

    `weight_size` is the shape of the weight, `grad_output` has the shape of the output; the other arguments are those
    of `conv1d`. With ``accumulate=True`` the gradient is added to `out`. Returns an array of shape `weight_size`.
    Raises as `conv1d`.

    >>> import numpy as np, fastconv as fc
    >>> x, dy = np.ones((2, 3, 8), np.float32), np.ones((2, 4, 8), np.float32)
    >>> fc.conv1d_weight_grad(x, (4, 3, 3), dy, padding=1).shape
    (4, 3, 3)
    """
    return _weight_grad(
        "conv1d_weight_grad", 1, input, weight_size, grad_output, stride, padding, dilation, groups, padding_mode,
        layout, algorithm, out, accumulate, backend,
    )  # fmt: skip


def conv1d_input_grad(
    input_size, weight, grad_output, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros",
    layout="NCL", algorithm="auto", out=None, accumulate=False, backend="auto",
):  # fmt: skip
    """Gradient of `conv1d` with respect to its input.

    Each input element collects, from every output it took part in, that output's gradient times the tap that met it
    (`reference.convolution_input_grad`); with a padding mode other than "zeros" also through its images in the padding.

    `input_size` is the shape of the input in its layout, `grad_output` has the shape of the output; the other
    arguments are those of `conv1d`. With ``accumulate=True`` the gradient is added to `out`. Returns an array of
    shape `input_size`. Raises as `conv1d`.

    >>> import numpy as np, fastconv as fc
    >>> w, dy = np.ones((4, 3, 3), np.float32), np.ones((2, 4, 8), np.float32)
    >>> fc.conv1d_input_grad((2, 3, 8), w, dy, padding=1).shape
    (2, 3, 8)
    """
    return _input_grad(
        "conv1d_input_grad", 1, input_size, weight, grad_output, stride, padding, dilation, groups, padding_mode,
        layout, algorithm, out, accumulate, backend,
    )  # fmt: skip


def conv1d_backward(
    input, weight, grad_output, stride=1, padding=0, dilation=1, groups=1, *, needs=("input", "weight", "bias"),
    padding_mode="zeros", layout="NCL", algorithm="auto", backend="auto",
):  # fmt: skip
    """All gradients of `conv1d` that `needs` names, as `ConvGrads` (input, weight, bias), None for the others.

    The arguments are those of `conv1d`, `conv1d_weight_grad` and `conv_bias_grad`. Raises as they do.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8), np.float32), np.ones((4, 3, 3), np.float32)
    >>> grads = fc.conv1d_backward(x, w, fc.conv1d(x, w), needs=("weight", "bias"))
    >>> grads.input is None, grads.weight.shape, grads.bias.shape
    (True, (4, 3, 3), (4,))
    """
    return _backward(
        "conv1d_backward", 1, input, weight, grad_output, stride, padding, dilation, groups, needs, padding_mode,
        layout, algorithm, backend,
    )  # fmt: skip


def conv_transpose1d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, padding_mode="zeros",
    layout="NCL", activation=None, algorithm="auto", out=None, backend="auto",
):  # fmt: skip
    """Transposed convolution: the input gradient of a convolution, as a layer of its own.

    input (N, C, L) and weight (C, O/groups, KL) give (N, O, L'), per dimension of size
    (size - 1)*stride - before - after + dilation*(k - 1) + output_padding + 1. The words for `padding` name the
    padding of the convolution that is transposed: "valid" none, "full" dilation*(k-1), and "same" gives size*stride.
    `output_padding` (less than stride or dilation) adds to the end of the result. The other arguments are those of
    `conv1d`. (`reference.convolution_input_grad`; Dumoulin and Visin, A guide to convolution arithmetic, ch. 4.)
    Raises as `conv1d`.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8), np.float32), np.ones((3, 4, 3), np.float32)
    >>> fc.conv_transpose1d(x, w, stride=2, padding=1, output_padding=1).shape
    (2, 4, 16)
    """
    return _transposed(
        "conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation,
        padding_mode, layout, activation, algorithm, out, backend,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 2-D
# ---------------------------------------------------------------------------------------------------------------------


def conv2d(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros", layout="NCHW",
    activation=None, algorithm="auto", out=None, backend="auto",
):  # fmt: skip
    """Convolve (cross-correlate: the kernel is not flipped) `input` with `weight` in 2 dimensions.

        y[n, o, p, q] = b[o] + sum over c, k, l of
            w[o, c, k, l] * x[n, c, p*stride + k*dilation - before, q*stride + l*dilation - before]

    (`reference.convolution`; Goodfellow, Bengio and Courville, Deep Learning, eq. 9.6.)

    Parameters
    ----------
    input : array (N, C, H, W), or (N, H, W, C) with layout="NHWC"; without N: unbatched
        float32, float64, float16 or bfloat16, any strides.
    weight : array (O, C/groups, KH, KW), of the input's dtype, in either layout.
        A bare plane (H, W) with a bare kernel (KH, KW) gives the bare plane Z of the textbook.
    bias : array (O,) or None
    stride, dilation : int, or one per spatial dimension
    padding : int; one per spatial dimension; a (before, after) pair per spatial dimension; or "valid" (none), "full"
        (dilation*(k-1) on both sides), "same" (output size ceil(size/stride), an odd total pads one more after)
    groups : int, a divisor of C and O
    padding_mode : "zeros", "reflect", "replicate" or "circular"
    activation : None or "relu", applied after the bias in the same pass
    algorithm : "auto" (by the shape: see `explain`), "direct", "winograd", "fft" or "loops" (the plain loops)
    out : array of the result's shape and dtype that overlaps no input; it is filled and returned
    backend : "auto" (where the arrays live), "cpu" or "cuda"

    Returns
    -------
    array (N, O, H', W') of the input's library and dtype, per dimension of size
        (size + before + after - dilation*(k-1) - 1)//stride + 1.

    Raises
    ------
    ValueError for a wrong value or shape, TypeError for a wrong type or dtype, BackendUnavailableError.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    >>> fc.conv2d(x, w, padding=1).shape
    (2, 4, 8, 8)
    """
    return forward(
        "conv2d", 2, input, weight, bias, stride, padding, dilation, groups, padding_mode, layout, activation,
        algorithm, out, backend,
    )  # fmt: skip


def conv2d_weight_grad(
    input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros",
    layout="NCHW", algorithm="auto", out=None, accumulate=False, backend="auto",
):  # fmt: skip
    """Gradient of `conv2d` with respect to its weight.

    The product of the output gradient and the input element that each tap met, summed over batch and output positions
    (`reference.convolution_weight_grad`).

    `weight_size` is the shape of the weight, `grad_output` has the shape of the output; the other arguments are those
    of `conv2d`. With ``accumulate=True`` the gradient is added to `out`. Returns an array of shape `weight_size`.
    Raises as `conv2d`.

    >>> import numpy as np, fastconv as fc
    >>> x, dy = np.ones((2, 3, 8, 8), np.float32), np.ones((2, 4, 8, 8), np.float32)
    >>> fc.conv2d_weight_grad(x, (4, 3, 3, 3), dy, padding=1).shape
    (4, 3, 3, 3)
    """
    return _weight_grad(
        "conv2d_weight_grad", 2, input, weight_size, grad_output, stride, padding, dilation, groups, padding_mode,
        layout, algorithm, out, accumulate, backend,
    )  # fmt: skip


def conv2d_input_grad(
    input_size, weight, grad_output, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros",
    layout="NCHW", algorithm="auto", out=None, accumulate=False, backend="auto",
):  # fmt: skip
    """Gradient of `conv2d` with respect to its input.

    Each input element collects, from every output it took part in, that output's gradient times the tap that met it
    (`reference.convolution_input_grad`); with a padding mode other than "zeros" also through its images in the padding.

    `input_size` is the shape of the input in its layout, `grad_output` has the shape of the output; the other
    arguments are those of `conv2d`. With ``accumulate=True`` the gradient is added to `out`. Returns an array of
    shape `input_size`. Raises as `conv2d`.

    >>> import numpy as np, fastconv as fc
    >>> w, dy = np.ones((4, 3, 3, 3), np.float32), np.ones((2, 4, 8, 8), np.float32)
    >>> fc.conv2d_input_grad((2, 3, 8, 8), w, dy, padding=1).shape
    (2, 3, 8, 8)
    """
    return _input_grad(
        "conv2d_input_grad", 2, input_size, weight, grad_output, stride, padding, dilation, groups, padding_mode,
        layout, algorithm, out, accumulate, backend,
    )  # fmt: skip


def conv2d_backward(
    input, weight, grad_output, stride=1, padding=0, dilation=1, groups=1, *, needs=("input", "weight", "bias"),
    padding_mode="zeros", layout="NCHW", algorithm="auto", backend="auto",
):  # fmt: skip
    """All gradients of `conv2d` that `needs` names, as `ConvGrads` (input, weight, bias), None for the others.

    The arguments are those of `conv2d`, `conv2d_weight_grad` and `conv_bias_grad`. Raises as they do.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    >>> grads = fc.conv2d_backward(x, w, fc.conv2d(x, w), needs=("weight", "bias"))
    >>> grads.input is None, grads.weight.shape, grads.bias.shape
    (True, (4, 3, 3, 3), (4,))
    """
    return _backward(
        "conv2d_backward", 2, input, weight, grad_output, stride, padding, dilation, groups, needs, padding_mode,
        layout, algorithm, backend,
    )  # fmt: skip


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, padding_mode="zeros",
    layout="NCHW", activation=None, algorithm="auto", out=None, backend="auto",
):  # fmt: skip
    """Transposed convolution: the input gradient of a convolution, as a layer of its own.

    input (N, C, H, W) and weight (C, O/groups, KH, KW) give (N, O, H', W'), per dimension of size
    (size - 1)*stride - before - after + dilation*(k - 1) + output_padding + 1. The words for `padding` name the
    padding of the convolution that is transposed: "valid" none, "full" dilation*(k-1), and "same" gives size*stride.
    `output_padding` (less than stride or dilation) adds to the end of the result. The other arguments are those of
    `conv2d`. (`reference.convolution_input_grad`; Dumoulin and Visin, A guide to convolution arithmetic, ch. 4.)
    Raises as `conv2d`.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8, 8), np.float32), np.ones((3, 4, 3, 3), np.float32)
    >>> fc.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1).shape
    (2, 4, 16, 16)
    """
    return _transposed(
        "conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation,
        padding_mode, layout, activation, algorithm, out, backend,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 3-D
# ---------------------------------------------------------------------------------------------------------------------


def conv3d(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros", layout="NCDHW",
    activation=None, algorithm="auto", out=None, backend="auto",
):  # fmt: skip
    """Convolve (cross-correlate: the kernel is not flipped) `input` with `weight` in 3 dimensions.

        y[n, o, r, p, q] = b[o] + sum over c, j, k, l of  w[o, c, j, k, l] *
            x[n, c, r*stride + j*dilation - before, p*stride + k*dilation - before, q*stride + l*dilation - before]

    (`reference.convolution`; Goodfellow, Bengio and Courville, Deep Learning, eq. 9.6.)

    Parameters
    ----------
    input : array (N, C, D, H, W), or (N, D, H, W, C) with layout="NDHWC"; without N: unbatched
        float32, float64, float16 or bfloat16, any strides.
    weight : array (O, C/groups, KD, KH, KW), of the input's dtype, in either layout.
        A bare volume (D, H, W) with a bare kernel (KD, KH, KW) gives a bare volume.
    bias : array (O,) or None
    stride, dilation : int, or one per spatial dimension
    padding : int; one per spatial dimension; a (before, after) pair per spatial dimension; or "valid" (none), "full"
        (dilation*(k-1) on both sides), "same" (output size ceil(size/stride), an odd total pads one more after)
    groups : int, a divisor of C and O
    padding_mode : "zeros", "reflect", "replicate" or "circular"
    activation : None or "relu", applied after the bias in the same pass
    algorithm : "auto" (by the shape: see `explain`), "direct", "winograd", "fft" or "loops" (the plain loops)
    out : array of the result's shape and dtype that overlaps no input; it is filled and returned
    backend : "auto" (where the arrays live), "cpu" or "cuda"

    Returns
    -------
    array (N, O, D', H', W') of the input's library and dtype, per dimension of size
        (size + before + after - dilation*(k-1) - 1)//stride + 1.

    Raises
    ------
    ValueError for a wrong value or shape, TypeError for a wrong type or dtype, BackendUnavailableError.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8, 8, 8), np.float32), np.ones((4, 3, 3, 3, 3), np.float32)
    >>> fc.conv3d(x, w, padding=1).shape
    (2, 4, 8, 8, 8)
    """
    return forward(
        "conv3d", 3, input, weight, bias, stride, padding, dilation, groups, padding_mode, layout, activation,
        algorithm, out, backend,
    )  # fmt: skip


def conv3d_weight_grad(
    input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros",
    layout="NCDHW", algorithm="auto", out=None, accumulate=False, backend="auto",
):  # fmt: skip
    """Gradient of `conv3d` with respect to its weight.

    The product of the output gradient and the input element that each tap met, summed over batch and output positions
    (`reference.convolution_weight_grad`).

    `weight_size` is the shape of the weight, `grad_output` has the shape of the output; the other arguments are those
    of `conv3d`. With ``accumulate=True`` the gradient is added to `out`. Returns an array of shape `weight_size`.
    Raises as `conv3d`.

    >>> import numpy as np, fastconv as fc
    >>> x, dy = np.ones((2, 3, 8, 8, 8), np.float32), np.ones((2, 4, 8, 8, 8), np.float32)
    >>> fc.conv3d_weight_grad(x, (4, 3, 3, 3, 3), dy, padding=1).shape
    (4, 3, 3, 3, 3)
    """
    return _weight_grad(
        "conv3d_weight_grad", 3, input, weight_size, grad_output, stride, padding, dilation, groups, padding_mode,
        layout, algorithm, out, accumulate, backend,
    )  # fmt: skip


def conv3d_input_grad(
    input_size, weight, grad_output, stride=1, padding=0, dilation=1, groups=1, *, padding_mode="zeros",
    layout="NCDHW", algorithm="auto", out=None, accumulate=False, backend="auto",
):  # fmt: skip
    """Gradient of `conv3d` with respect to its input.

    Each input element collects, from every output it took part in, that output's gradient times the tap that met it
    (`reference.convolution_input_grad`); with a padding mode other than "zeros" also through its images in the padding.

    `input_size` is the shape of the input in its layout, `grad_output` has the shape of the output; the other
    arguments are those of `conv3d`. With ``accumulate=True`` the gradient is added to `out`. Returns an array of
    shape `input_size`. Raises as `conv3d`.

    >>> import numpy as np, fastconv as fc
    >>> w, dy = np.ones((4, 3, 3, 3, 3), np.float32), np.ones((2, 4, 8, 8, 8), np.float32)
    >>> fc.conv3d_input_grad((2, 3, 8, 8, 8), w, dy, padding=1).shape
    (2, 3, 8, 8, 8)
    """
    return _input_grad(
        "conv3d_input_grad", 3, input_size, weight, grad_output, stride, padding, dilation, groups, padding_mode,
        layout, algorithm, out, accumulate, backend,
    )  # fmt: skip


def conv3d_backward(
    input, weight, grad_output, stride=1, padding=0, dilation=1, groups=1, *, needs=("input", "weight", "bias"),
    padding_mode="zeros", layout="NCDHW", algorithm="auto", backend="auto",
):  # fmt: skip
    """All gradients of `conv3d` that `needs` names, as `ConvGrads` (input, weight, bias), None for the others.

    The arguments are those of `conv3d`, `conv3d_weight_grad` and `conv_bias_grad`. Raises as they do.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8, 8, 8), np.float32), np.ones((4, 3, 3, 3, 3), np.float32)
    >>> grads = fc.conv3d_backward(x, w, fc.conv3d(x, w), needs=("weight", "bias"))
    >>> grads.input is None, grads.weight.shape, grads.bias.shape
    (True, (4, 3, 3, 3, 3), (4,))
    """
    return _backward(
        "conv3d_backward", 3, input, weight, grad_output, stride, padding, dilation, groups, needs, padding_mode,
        layout, algorithm, backend,
    )  # fmt: skip


def conv_transpose3d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, padding_mode="zeros",
    layout="NCDHW", activation=None, algorithm="auto", out=None, backend="auto",
):  # fmt: skip
    """Transposed convolution: the input gradient of a convolution, as a layer of its own.

    input (N, C, D, H, W) and weight (C, O/groups, KD, KH, KW) give (N, O, D', H', W'), per dimension of size
    (size - 1)*stride - before - after + dilation*(k - 1) + output_padding + 1. The words for `padding` name the
    padding of the convolution that is transposed: "valid" none, "full" dilation*(k-1), and "same" gives size*stride.
    `output_padding` (less than stride or dilation) adds to the end of the result. The other arguments are those of
    `conv3d`. (`reference.convolution_input_grad`; Dumoulin and Visin, A guide to convolution arithmetic, ch. 4.)
    Raises as `conv3d`.

    >>> import numpy as np, fastconv as fc
    >>> x, w = np.ones((2, 3, 8, 8, 8), np.float32), np.ones((3, 4, 3, 3, 3), np.float32)
    >>> fc.conv_transpose3d(x, w, stride=2, padding=1, output_padding=1).shape
    (2, 4, 16, 16, 16)
    """
    return _transposed(
        "conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation,
        padding_mode, layout, activation, algorithm, out, backend,
    )  # fmt: skip


def conv_bias_grad(grad_output, *, layout="NCHW", out=None, accumulate=False, backend="auto"):
    """Gradient of a convolution with respect to its bias: `grad_output` summed over all but its channels.

    `grad_output` has the shape of the output in `layout`: (N, O, *S) or (N, *S, O), without N too; the layout names
    the number of spatial dimensions ("NCL", "NCHW", "NCDHW" and the channels-last ones). Returns an array (O,).
    With ``accumulate=True`` the gradient is added to `out`. Raises as `conv2d`. (`reference.convolution_bias_grad`.)

    >>> import numpy as np, fastconv as fc
    >>> fc.conv_bias_grad(np.ones((2, 3, 4, 5), np.float32)).tolist()
    [40.0, 40.0, 40.0]
    """
    return _bias_grad("conv_bias_grad", grad_output, layout, out, accumulate, backend)
