"""The methods of a convolution on the CPU: one ordered table for each pass, in which the first that fits runs.

A call makes a `Problem`, which is looked up among the plans that were made; a new one is planned by the first method
of its table that applies and pays (`table.choose`). To add a method, write a class with the `Method` protocol, whose
`plan` returns a `Plan`, and put it into `METHODS` where it should be tried.
"""

from __future__ import annotations

import numpy as np

from ...geometry import ConvGeometry
from ..problem import OPERATIONS, Method, Plan, Problem, Strides, contiguous
from .groups import DepthwiseChannels, DepthwisePlanes, DepthwisePlanesByTwo, DepthwiseRows, Grouped, GroupedByChannel
from .input_gradient import PADDED, PADDED_BY_FFT, PHASED
from .plain import LOOPS
from .products import CHANNELS_LAST, IMPLICIT_GEMM, SMALL_PLANES
from .table import METHODS, choose, forget_plans, only, plan_of, run
from .transforms import FFT, WINOGRAD

__all__ = [
    "METHODS",
    "OPERATIONS",
    "Method",
    "Plan",
    "Problem",
    "Strides",
    "choose",
    "contiguous",
    "forget_plans",
    "only",
    "plan_of",
    "problem_of",
    "run",
    "why_not",
]

METHODS["forward"] = (
    WINOGRAD, FFT,
    DepthwisePlanes("forward"), DepthwiseChannels("forward"), DepthwiseRows("forward"), Grouped("forward"),
    SMALL_PLANES, CHANNELS_LAST, IMPLICIT_GEMM, LOOPS,
)  # fmt: skip
METHODS["input_grad"] = (
    WINOGRAD, PADDED_BY_FFT, FFT, PADDED,
    DepthwisePlanes("input_grad"), DepthwisePlanesByTwo("input_grad"), DepthwiseChannels("input_grad"),
    DepthwiseRows("input_grad"), Grouped("input_grad"),
    PHASED, LOOPS,
)  # fmt: skip
METHODS["weight_grad"] = (
    WINOGRAD, FFT,
    DepthwisePlanes("weight_grad"), DepthwiseChannels("weight_grad"), DepthwiseRows("weight_grad"),
    Grouped("weight_grad"), GroupedByChannel(),
    IMPLICIT_GEMM, LOOPS,
)  # fmt: skip


def problem_of(
    operation: str, geometry: ConvGeometry, dtype: np.dtype, algorithm: str = "auto", workers: int = 1
) -> Problem:
    """The problem of arrays in C order."""
    activations = (
        (geometry.batch, geometry.in_channels, *geometry.input_size),
        (geometry.batch, geometry.out_channels, *geometry.output_size),
    )
    weight = (geometry.out_channels, geometry.in_channels_per_group, *geometry.kernel_size)
    input, output = (contiguous(shape, dtype) for shape in activations)
    return Problem(operation, algorithm, geometry, dtype, input, contiguous(weight, dtype), output, workers)


def why_not(algorithm: str, problem: Problem) -> str | None:
    """Why no method of this algorithm applies to a problem; None if one does."""
    reasons = [m.cannot(problem) for m in METHODS[problem.operation] if m.algorithm == algorithm]
    return None if None in reasons else reasons[0]
