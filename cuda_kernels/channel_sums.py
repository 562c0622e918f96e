"""Sums over everything but the channels: the gradient of a bias, at the speed of memory.

A block sums a part of the positions of one channel, or where the channels lie together of 32 of them, one for each lane
of a warp. The threads of a channel take every 256th (or 8th) position of the part; they and then the parts are added in
an order that the shape alone decides.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
from numba import types

from ._cuda import DeviceArray, cuda, launch, launch_blocks
from .intrinsics import u32
from .jit import ELEMENTS, BlockKernel, flat
from .offsets import MOST_ELEMENTS, as_uint32, extent, strides_in_elements
from .partial_sums import add_parts_kernel, parts_of_gradient
from .tiles import ENOUGH_BLOCKS

__all__ = ["bias_grad"]

THREADS = 256
WARP = 32
# Positions of each thread, at least, before a sum is taken apart.
LEAST_POSITIONS = 16
NUMBERS = 7


def bias_grad(grad_output: DeviceArray, accumulate: bool, out: DeviceArray) -> bool:
    """out (+)= grad_output summed over everything but its channels.

    False, with nothing done, where the positions of an image have no one step, or offsets need more than 32 bits.
    """
    images = grad_output.merge(3)
    images = None if images is None else images.merge(2)
    if images is None or not images.size or min(images.strides) < 0 or extent(images) > MOST_ELEMENTS:
        return False
    batch, channels, size = images.shape
    strides = strides_in_elements(images)
    lanes = WARP if strides[1] == 1 and channels > 1 and strides[2] > 1 else 1
    blocks, count = -(-channels // lanes), batch * size
    parts = max(1, min(-(-4 * ENOUGH_BLOCKS // blocks), count // (THREADS // lanes * LEAST_POSITIONS)))
    part = -(-count // parts)
    parts = -(-count // part)
    partial = parts_of_gradient(parts, ELEMENTS[out.dtype.name].real, accumulate, grad_output, out)
    launch_blocks(
        bias_grad_kernel(out.dtype.name, lanes), (blocks, parts), images.flat(),
        as_uint32(channels, size, count, part, *strides), partial.flat(),
    )  # fmt: skip
    if partial.pointer != out.pointer:
        launch(add_parts_kernel[out.dtype], out.size, partial, accumulate, out[:, None, None, None, None])
    return True


@functools.cache
def bias_grad_kernel(dtype: str, lanes: int) -> BlockKernel:
    """One part of the sums of `lanes` neighbouring channels."""
    element, load, real = ELEMENTS[dtype].stored, ELEMENTS[dtype].load, ELEMENTS[dtype].real
    number = numba.from_dtype(np.dtype(real))
    zero = real(0)
    slots, warps = THREADS // lanes, THREADS // WARP
    shared_size = warps * lanes

    def bias_grad(grad, numbers, partial):
        channels, size, count, part, stride_n, stride_c, stride_p = numbers
        sums = cuda.shared.array(shared_size, number)
        t = u32(cuda.threadIdx.x)
        channel = u32(u32(cuda.blockIdx.x) * lanes + t % lanes)
        first = u32(u32(cuda.blockIdx.y) * part)
        last = min(u32(first + part), count)
        total = zero
        if channel < channels:
            for i in range(u32(first + t // lanes), last, slots):
                n = u32(u32(i) // size)
                p = u32(u32(i) - n * size)
                total += load(grad[u32(n * stride_n + channel * stride_c + p * stride_p)])
        if lanes == 1:
            for i in range(5):
                total += cuda.shfl_xor_sync(0xFFFFFFFF, total, 16 >> i)
        lane, warp = u32(t % WARP), u32(t // WARP)
        if lane < lanes:
            sums[u32(warp * lanes + lane)] = total
        cuda.syncthreads()
        if t < lanes and channel < channels:
            total = sums[t]
            for w in range(1, warps):
                total += sums[u32(w * lanes + t)]
            partial[u32(u32(cuda.blockIdx.y) * channels + channel)] = total

    signature = flat(element), types.UniTuple(types.uint32, NUMBERS), flat(number)
    return BlockKernel(bias_grad, THREADS, signature)
