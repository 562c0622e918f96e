"""Convolution on the CPU: forward pass and the gradients of weight, input and bias.

The entry functions take arrays in the canonical form (N, C, D, H, W), weights (O, C/groups, KD, KH, KW), as views of
whatever strides the caller's arrays have, and fill `out`. `cuda_kernels.convolution` has the same functions. What
computes them is chosen in `methods`.
"""

from __future__ import annotations

import numpy as np

from ..geometry import ConvGeometry
from ..packed import PackedWeights
from . import loops
from .methods import Problem, run
from .reals import (
    bias_grad_through_float32,
    forward_through_float32,
    input_grad_through_float32,
    on_reals,
    readable,
    weight_grad_through_float32,
)
from .tasks import workers


@on_reals(forward_through_float32)
def forward(
    geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, relu: bool,
    algorithm: str, packed: PackedWeights | None, out: np.ndarray,
) -> None:  # fmt: skip
    """out = input convolved with weight, plus bias, through max(0, .) if relu.

    `packed` keeps the weights of a prepared convolution as the kernels want them.
    """
    if out.size == 0:
        return
    input, weight = readable(input), readable(weight)
    if bias is not None:
        bias = np.ascontiguousarray(bias)
    problem = Problem(
        "forward", algorithm, geometry, out.dtype, input.strides, weight.strides, out.strides,
        workers(geometry.flops), packed is not None,
    )  # fmt: skip
    run(problem, (input, weight), bias, relu, packed, out)


@on_reals(weight_grad_through_float32)
def weight_grad(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, accumulate: bool, algorithm: str,
    out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the weight, shape (O, C/groups, KD, KH, KW)."""
    if grad_output.size == 0:
        if not accumulate:
            out[...] = 0
        return
    input, grad_output = readable(input), readable(grad_output)
    problem = Problem(
        "weight_grad", algorithm, geometry, out.dtype, input.strides, out.strides, grad_output.strides,
        workers(geometry.flops), False, accumulate,
    )  # fmt: skip
    run(problem, (input, grad_output), None, False, None, out)


@on_reals(input_grad_through_float32)
def input_grad(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, bias: np.ndarray | None, relu: bool,
    accumulate: bool, algorithm: str, out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input, plus bias, through max(0, .) if relu (both for the transposed convolution)."""
    if out.size == 0:
        return
    weight, grad_output = readable(weight), readable(grad_output)
    if bias is not None:
        bias = np.ascontiguousarray(bias)
    problem = Problem(
        "input_grad", algorithm, geometry, out.dtype, out.strides, weight.strides, grad_output.strides,
        workers(geometry.flops), False, accumulate,
    )  # fmt: skip
    run(problem, (grad_output, weight), bias, relu, None, out)


@on_reals(bias_grad_through_float32)
def bias_grad(grad_output: np.ndarray, accumulate: bool, out: np.ndarray) -> None:
    """out (+)= grad_output summed over everything but its channels."""
    loops.bias_grad_kernel[out.dtype](grad_output, accumulate, out)
