"""Sums over the positions of a loss: of its values, and of the weights of its labels, always in the same order."""

from __future__ import annotations

import functools

import numba
import numpy as np
from numba import types

from ._cuda import DeviceArray, cuda, launch_blocks, scratch
from .jit import ELEMENTS, BlockKernel, array_of
from .row_groups import array_by_position, label_array, over_group, warp_sum

__all__ = ["add_label_weights", "add_values"]

SUM_THREADS = 1024
# Positions that one block adds. More are taken apart, and the sums of the blocks added by one more block.
MOST_OF_A_BLOCK = 1 << 16


def _real(dtype: np.dtype) -> np.dtype:
    return np.dtype(ELEMENTS[dtype.name].real)


def _none(dtype: np.dtype) -> DeviceArray:
    return DeviceArray(0, (0,), None, dtype, None, stream=-1)


def add_values(values: DeviceArray, denominator: DeviceArray, divisor: float, out: DeviceArray) -> None:
    """out[0] = sum of the values / denominator[0] (nan if 0; unless empty) / divisor, always in the same order.

    `values` and `denominator` are of the type that `out`'s is summed in.
    """
    real = _real(out.dtype)
    blocks = -(-values.size // MOST_OF_A_BLOCK)
    if blocks > 1:
        partial = scratch((blocks,), real, values)
        launch_blocks(add_values_kernel(real.name), blocks, values, _none(real), real.type(1), partial)
        values = partial
    launch_blocks(add_values_kernel(out.dtype.name), 1, values, denominator, real.type(divisor), out)


def add_label_weights(
    labels: DeviceArray, weight: DeviceArray, ignore_index: int, classes: int, out: DeviceArray
) -> bool:
    """out[0] = sum of the weights of the labels' classes, 1 each if `weight` is empty; `out` is of the type of sums.

    Labels that are ignored or out of range count nothing. False, with nothing done, where they have no one step.
    """
    by_position = array_by_position(labels)
    if by_position is None:
        return False
    blocks = -(-labels.size // MOST_OF_A_BLOCK)
    partial = scratch((blocks,), out.dtype, out) if blocks > 1 else out
    kernel = add_label_weights_kernel(weight.dtype.name, labels.dtype.name)
    launch_blocks(kernel, max(1, blocks), by_position, weight, ignore_index, classes, partial)
    if blocks > 1:
        add_values(partial, _none(out.dtype), 1, out)
    return True


@functools.cache
def add_values_kernel(dtype: str) -> BlockKernel:
    """The kernel of `add_values` for results of this type."""
    real, store = ELEMENTS[dtype].real, ELEMENTS[dtype].store
    number = numba.from_dtype(np.dtype(real))
    zero, nan = real(0), real(np.nan)
    sum_of_block = over_group(warp_sum, SUM_THREADS, zero, 0)

    def add_values(values, denominator, divisor, out):
        shared = cuda.shared.array(32, number)
        first = np.int64(cuda.blockIdx.x) * MOST_OF_A_BLOCK
        total = zero
        for i in range(first + cuda.threadIdx.x, min(first + MOST_OF_A_BLOCK, values.size), SUM_THREADS):
            total += values[i]
        total = sum_of_block(total, shared)
        if cuda.threadIdx.x == 0:
            if denominator.size > 0:
                total = total / denominator[0] if denominator[0] != zero else nan
            out[np.int64(cuda.blockIdx.x)] = store(total / divisor)

    signature = (array_of(number, 1), array_of(number, 1), number, array_of(ELEMENTS[dtype].stored, 1))
    return BlockKernel(add_values, SUM_THREADS, signature)


@functools.cache
def add_label_weights_kernel(dtype: str, label_dtype: str = "int64") -> BlockKernel:
    """The kernel of `add_label_weights` for weights of this type: a sum for each block."""
    element, real, load = ELEMENTS[dtype].stored, ELEMENTS[dtype].real, ELEMENTS[dtype].load
    number = numba.from_dtype(np.dtype(real))
    zero, one = real(0), real(1)
    sum_of_block = over_group(warp_sum, SUM_THREADS, zero, 0)

    def add_label_weights(labels, weight, ignore_index, classes, sums):
        shared = cuda.shared.array(32, number)
        first = np.int64(cuda.blockIdx.x) * MOST_OF_A_BLOCK
        total = zero
        for i in range(first + cuda.threadIdx.x, min(first + MOST_OF_A_BLOCK, labels.size), SUM_THREADS):
            label = np.int64(labels[i])
            if label != ignore_index and label >= 0 and label < classes:
                total += load(weight[label]) if weight.size > 0 else one
        total = sum_of_block(total, shared)
        if cuda.threadIdx.x == 0:
            sums[np.int64(cuda.blockIdx.x)] = total

    signature = label_array(label_dtype), array_of(element, 1), types.int64, types.int64, array_of(number, 1)
    return BlockKernel(add_label_weights, SUM_THREADS, signature)
