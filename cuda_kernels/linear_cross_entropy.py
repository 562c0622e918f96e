"""What the chunked linear cross-entropy needs of CUDA besides convolution and softmax cross-entropy.

`fastconv.linear_loss` has the algorithm; the functions are those of `fastconv.cpu.linear_cross_entropy`, with the same
arguments in the same order, on `DeviceArray`s. Labels that the host knows are judged there; of others see
`softmax_cross_entropy`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import _cuda
from ._cuda import DeviceArray, cuda, current_device, launch, upload
from .jit import Element, array_of, kernel
from .softmax_cross_entropy import (
    _first_wrong_label,
    _nothing,
    _real,
    _real_type,
    _sum,
    _sum_label_weights,
    sum_kernel,
)

# Bytes of the logits that exist at one time, and of the weight that are used at one time: products of some thousand
# rows and columns, which fill a GPU.
CHUNK_BYTES = 256 * 1024 * 1024
LEAST_ROWS = 1024
MOST_ROWS = 64 * 1024
BLOCK_BYTES = 256 * 1024 * 1024


def chunk_sizes(classes: int, features: int, dtype: np.dtype) -> tuple[int, int, int]:
    """Most rows of a chunk, most classes of a block of the logits, and of a block of their gradient."""
    itemsize = max(dtype.itemsize, 4)  # of what is computed in
    rows = min(MOST_ROWS, max(LEAST_ROWS, CHUNK_BYTES // (max(classes, features) * itemsize)))
    block = max(1, BLOCK_BYTES // (features * itemsize))
    return rows, block, block


def flattened(array: DeviceArray, lead: int) -> DeviceArray:
    """The first `lead` axes as one, without a copy."""
    if lead == 0:
        return array[None]
    view = array
    for _ in range(lead - 1):
        merged = view.merge(0)
        if merged is None:
            raise ValueError(
                f"linear cross-entropy on CUDA takes arrays whose first {lead} axes are contiguous with each other; "
                f"got shape {array.shape} and strides {array.strides}"
            )
        view = merged
    return view


def empty(shape: tuple[int, ...], dtype: np.dtype, like: DeviceArray) -> DeviceArray:
    return _cuda.empty(shape, dtype, like)[1]


def computable(array: DeviceArray) -> DeviceArray:
    """The array, of one or two axes, in the type that is computed in: a copy where it is not."""
    real = np.dtype(_real(array.dtype))
    if array.dtype == real:
        return array
    wide = empty(array.shape, real, array)
    _widen(array, wide)
    return wide


def _widen(array: DeviceArray, out: DeviceArray) -> None:
    launch(widen_kernel[array.dtype], array.size, _matrix(array), _matrix(out))


def columns(rows: DeviceArray) -> DeviceArray:
    """The transposed matrix."""
    return rows.transpose((1, 0))


def deliver(source: DeviceArray, out: DeviceArray) -> None:
    """out = source, of the same one or two axes, rounded to the type of `out`."""
    launch(narrow_kernel[out.dtype], out.size, _matrix(source), _matrix(out))


def judge(
    target: DeviceArray, weight: DeviceArray | None, ignore_index: int, classes: int, mean: bool, like: DeviceArray
) -> tuple[tuple[int, int] | None, Any, Any]:
    """Look at the flat target before anything is computed.

    Returns (position and label of the first class index out of range, what the loss is divided by, what the gradient is
    multiplied with), None for what there is not.
    """
    if target.dtype.kind not in "iu":
        count = float(target.shape[0])
        return None, *((count, 1 / count if count else np.inf) if mean else (None, None))
    if target.host is not None:
        wrong = _first_wrong_label(np.asarray(target.host), classes, ignore_index)
        if wrong is not None:
            return wrong, None, None
    if not mean:
        return None, None, None
    real = np.dtype(_real(like.dtype))
    count = target.shape[0]
    total, scale = (empty(shape, real, like) for shape in ((1,), ()))
    weights = _nothing(real, 1) if weight is None else weight
    _sum_label_weights(target[:, None, None, None], weights, ignore_index, classes, total)
    launch(sum_kernel[real], 1, _one(real, current_device()), total, real.type(1), scale[None])
    return None, total, scale


@functools.cache
def _one(dtype: np.dtype, device: int) -> DeviceArray:
    return upload(np.ones(1, dtype))[0]


def reduce(losses: DeviceArray, divisor: DeviceArray | float | None, out: DeviceArray) -> None:
    """out = sum of the losses, divided by `divisor` unless that is None; nan where that is 0."""
    if isinstance(divisor, DeviceArray):
        _sum(losses, divisor, 1, out[None])
    else:
        _sum(losses, _nothing(_real(out.dtype), 1), 1 if divisor is None else divisor, out[None])


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def _matrix(array: DeviceArray) -> DeviceArray:
    return array if array.ndim == 2 else array[None]


@kernel(lambda element: (array_of(element.stored, 2), array_of(_real_type(element), 2)))
def widen_kernel(element: Element):
    load = element.load

    def widen_kernel(source, out):
        for index in range(cuda.grid(1), out.size, cuda.gridsize(1)):
            row, column = divmod(index, out.shape[1])
            out[row, column] = load(source[row, column])

    return widen_kernel


@kernel(lambda element: (array_of(_real_type(element), 2), array_of(element.stored, 2)))
def narrow_kernel(element: Element):
    store = element.store

    def narrow_kernel(source, out):
        for index in range(cuda.grid(1), out.size, cuda.gridsize(1)):
            row, column = divmod(index, out.shape[1])
            out[row, column] = store(source[row, column])

    return narrow_kernel
