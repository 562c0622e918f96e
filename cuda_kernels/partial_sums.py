"""Gradients that are summed in parts: where the parts go, and the kernel that adds them in order."""

from __future__ import annotations

import numpy as np
from numba import from_dtype, types

from ._cuda import DeviceArray, cuda, scratch
from .jit import Element, array_of, kernel

__all__ = ["add_parts_kernel", "parts_of_gradient"]


def parts_of_gradient(
    parts: int, real: type, accumulate: bool, like: DeviceArray, out: DeviceArray
) -> DeviceArray:
    """Where the parts of a weight gradient go: (parts, out.size), or `out` itself where it is the only one."""
    if parts == 1 and not accumulate and out.is_contiguous and out.dtype == real:
        return DeviceArray(out.pointer, (1, out.size), None, out.dtype, out.owner, out.stream, out.writeable)
    return scratch((parts, out.size), real, like)


@kernel(
    lambda element: (array_of(from_dtype(np.dtype(element.real)), 2), types.boolean, array_of(element.stored, 5))
)
def add_parts_kernel(element: Element):
    """The parts of each weight's gradient, added in order and rounded once."""
    load, store, zero = element.load, element.store, element.real(0)

    def add_parts_kernel(partial, accumulate, grad):
        _, channels, kernel_d, kernel_h, kernel_w = grad.shape
        for index in range(cuda.grid(1), grad.size, cuda.gridsize(1)):
            total = zero
            for part in range(partial.shape[0]):
                total += partial[part, index]
            rest, w = divmod(index, kernel_w)
            rest, h = divmod(rest, kernel_h)
            rest, d = divmod(rest, kernel_d)
            o, c = divmod(rest, channels)
            if accumulate:
                total += load(grad[o, c, d, h, w])
            grad[o, c, d, h, w] = store(total)

    return add_parts_kernel
