"""Operations on float32 and float64 arrays made operations on arrays of any floating-point type and alignment.

float16 and bfloat16 arrays are converted to float32, some samples at a time, and results are rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..geometry import ConvGeometry
from ..packed import PackedWeights
from . import half


def readable(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy if its elements do not lie at multiples of their size (a field of a record)."""
    if array.flags.aligned and not math.gcd(*array.strides) % array.itemsize:
        return array
    return np.ascontiguousarray(array)


# float32 memory for slices of float16 and bfloat16 arrays: so much, or as much as Winograd's form of a 3x3 weight takes
# where that is more, since weights are packed, or their gradient added to, for each slice. It must not depend on the
# number of threads: the weight gradient is the sum of those of the slices.
SLICE_BYTES = 2 * 1024 * 1024
SLICE_WEIGHTS = 4


def _slices(geometry: ConvGeometry, *arrays: np.ndarray) -> Iterator[tuple[ConvGeometry, slice]]:
    """The batch as runs of samples of these arrays that may be float32 at a time (one sample at the least)."""
    sample = max(1, sum(math.prod(array.shape[1:]) for array in arrays))
    weights = geometry.out_channels * geometry.in_channels_per_group * math.prod(geometry.kernel_size)
    most = max(1, max(SLICE_BYTES // 4, SLICE_WEIGHTS * weights) // sample)
    if most >= geometry.batch:
        yield geometry, slice(None)
        return
    for first in range(0, geometry.batch, most):
        end = min(first + most, geometry.batch)
        yield replace(geometry, batch=end - first), slice(first, end)


def _result(out: np.ndarray, accumulate: bool) -> np.ndarray:
    """float32 memory for `out`, with its values where an operation adds to them."""
    return out.astype(np.float32) if accumulate else np.empty(out.shape, np.float32)


def forward_through_float32(
    operation: Callable[..., None], geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray,
    bias: np.ndarray | None, relu: bool, algorithm: str, packed: PackedWeights | None, out: np.ndarray,
) -> None:  # fmt: skip
    w = weight.astype(np.float32)
    b = None if bias is None else bias.astype(np.float32)
    for some, part in _slices(geometry, input, out):
        result = _result(out[part], False)
        operation(some, input[part].astype(np.float32), w, b, relu, algorithm, packed, result)
        half.narrow(result, out[part])


def input_grad_through_float32(
    operation: Callable[..., None], geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray,
    bias: np.ndarray | None, relu: bool, accumulate: bool, algorithm: str, out: np.ndarray,
) -> None:  # fmt: skip
    w = weight.astype(np.float32)
    b = None if bias is None else bias.astype(np.float32)
    for some, part in _slices(geometry, grad_output, out):
        result = _result(out[part], accumulate)
        operation(some, w, grad_output[part].astype(np.float32), b, relu, accumulate, algorithm, result)
        half.narrow(result, out[part])


def weight_grad_through_float32(
    operation: Callable[..., None], geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray,
    accumulate: bool, algorithm: str, out: np.ndarray,
) -> None:  # fmt: skip
    result = _result(out, accumulate)
    for some, part in _slices(geometry, input, grad_output):
        x, dy = input[part].astype(np.float32), grad_output[part].astype(np.float32)
        operation(some, x, dy, accumulate, algorithm, result)
        accumulate = True
    half.narrow(result, out)


def bias_grad_through_float32(
    operation: Callable[..., None], grad_output: np.ndarray, accumulate: bool, out: np.ndarray
) -> None:
    """Some channels at a time, since the sum over samples is one of float64 numbers."""
    most = max(1, SLICE_BYTES // (4 * max(1, grad_output[:, :1].size)))
    for first in range(0, len(out), most):
        some = slice(first, first + most)
        result = _result(out[some], accumulate)
        operation(grad_output[:, some].astype(np.float32), accumulate, result)
        half.narrow(result, out[some])


def on_reals(through_float32: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let an operation that fills a float32 or float64 `out`, its last argument, fill any.

    float16 and bfloat16 are converted on the way in, and rounded once on the way out, by `through_float32`. Where the
    elements of `out` do not lie at multiples of their size, the operation fills an array where they do.
    """

    def decorate(operation: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(operation)
        def converting(*arguments: Any) -> None:
            out = arguments[-1]
            if out.dtype.itemsize == 2:
                through_float32(operation, *arguments)
                return
            result = readable(out)
            operation(*arguments[:-1], result)
            if result is not out:
                out[...] = result

        return converting

    return decorate
