"""What the tests of the block kernels share: launches in the block simulator, host arrays as those of a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from block_simulator import BlockSimulator
from fastconv.cuda_kernels._cuda import DeviceArray


def simulated(schedule: tuple[str, str] = ("forward", "late")) -> Callable[..., None]:
    """A `launch_blocks` that runs the kernel in the block simulator, on arrays of the host."""

    def launch_blocks(kernel: Any, grid: int | tuple[int, ...], *arguments: Any) -> None:
        memory = [a.as_numpy() if isinstance(a, DeviceArray) else a for a in arguments]
        BlockSimulator(*schedule).launch(kernel.function, grid, kernel.threads, *memory)

    return launch_blocks


def device(array: np.ndarray) -> DeviceArray:
    """A host array passed off as one of the device."""
    return DeviceArray(array.ctypes.data, array.shape, array.strides, array.dtype, array)


def aligned(array: np.ndarray, elements: int = 0) -> np.ndarray:
    """The same values and strides, at an address that is a multiple of 16, as memory of the device is.

    Or at one so many elements behind it.
    """
    extent = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) + array.itemsize
    memory = np.zeros(extent + 16 + elements * array.itemsize, np.uint8)
    skip = -memory.ctypes.data % 16 + elements * array.itemsize
    view = np.ndarray(array.shape, array.dtype, memory, skip, array.strides)
    view[...] = array
    return view
