"""How the GPU kernels are written once for every floating-point type, and compiled lazily.

A kernel is the product of a factory: a function of an `Element`, which says how numbers are stored, and in which type
they are summed. float16 and bfloat16 are read and written as they are and summed in float32.

In the simulator a device function without anything of CUDA in it is the plain Python function, which is much cheaper to
call there than the simulator's wrapper.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy.typing import DTypeLike

from ._cuda import SIMULATOR, cuda

__all__ = ["ELEMENTS", "BlockKernel", "Element", "Kernel", "array_of", "device_function", "flat", "inlined", "kernel"]


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function`, scalars in and scalars out, callable from kernels; it is inlined."""
    return function if SIMULATOR else cuda.jit(device=True, inline="always")(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `device_function`, for longer ones that also take arrays: the compiler inlines them later, and sooner."""
    return function if SIMULATOR else cuda.jit(device=True, forceinline=True)(function)


# ---------------------------------------------------------------------------------------------------------------------
# Element types
# ---------------------------------------------------------------------------------------------------------------------


class Element(NamedTuple):
    """One floating-point type of arrays, as the kernels see it."""

    stored: types.Type  # element of the arrays
    real: type  # the NumPy type the kernels compute in
    load: Callable[..., Any]  # stored -> real
    store: Callable[..., Any]  # real -> stored, rounded to nearest, ties to even


@device_function
def _same(x):
    return x


@device_function
def _from_float16(x):
    return np.float32(x)


@device_function
def _to_float16(x):
    return np.float16(x)


@device_function
def _from_bfloat16(bits):
    # a bfloat16 is the upper half of the float32 of the same value
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@device_function
def _to_bfloat16(x):
    bits = np.uint32(x.view(np.uint32))
    if x != x:
        return np.uint16(0x7FC0)  # rounding would carry a nan's last bits into infinity
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + half) >> np.uint32(16))


ELEMENTS = {
    "float32": Element(types.float32, np.float32, _same, _same),
    "float64": Element(types.float64, np.float64, _same, _same),
    "float16": Element(types.float16, np.float32, _from_float16, _to_float16),
    "bfloat16": Element(types.uint16, np.float32, _from_bfloat16, _to_bfloat16),
}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def array_of(element: types.Type, ndim: int) -> types.Array:
    """An array argument of any strides (`DeviceArray._numba_type_`)."""
    return types.Array(element, ndim, "A")


class Kernel:
    """A kernel for each floating-point type: ``kernel[dtype]``, to be given to `_cuda.launch`.

    `factory(element)` returns the kernel's Python function, `signature(element)` the types of its arguments. The
    signature is what the offline compilation checks; a launch finds the same types in its arguments.
    """

    def __init__(self, factory: Callable[[Element], Any], signature: Callable[[Element], tuple[types.Type, ...]]):
        self.__name__ = factory.__name__
        self.__doc__ = factory.__doc__
        self.factory = factory
        self.signature = signature
        self._kernels: dict[str, Any] = {}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.factory(ELEMENTS["float32"]))

    def __getitem__(self, dtype: DTypeLike) -> Any:
        name = np.dtype(dtype).name
        compiled = self._kernels.get(name)
        if compiled is None:
            compiled = self._kernels[name] = cuda.jit(self.factory(ELEMENTS[name]))
        return compiled


def kernel(signature: Callable[[Element], tuple[types.Type, ...]]) -> Callable[[Callable[[Element], Any]], Kernel]:
    """Make a `Kernel` of a factory."""
    return lambda factory: Kernel(factory, signature)


def flat(element: types.Type) -> types.Array:
    """One run of memory (`_cuda.FlatArray`)."""
    return types.Array(element, 1, "C")


class BlockKernel:
    """A kernel whose threads work together, in blocks of `threads`; to be given to `_cuda.launch_blocks`.

    `function` is its Python source, `signature` the types of its arguments, `resident` how many blocks a
    multiprocessor must have registers for at least: given, the compiler does not save registers for more.
    """

    def __init__(
        self, function: Callable[..., None], threads: int, signature: tuple[types.Type, ...],
        resident: int | None = None,
    ) -> None:  # fmt: skip
        self.__name__ = function.__name__
        self.function, self.threads, self.signature, self.resident = function, threads, signature, resident

    @functools.cached_property
    def compiled(self) -> Any:
        # the bound lets the compiler give a thread as many registers as fit a block of this size, or several of them
        bounds = self.threads if self.resident is None else (self.threads, self.resident)
        return cuda.jit(launch_bounds=bounds)(self.function)
