"""How the CPU kernels are compiled: lazily, once per floating-point type, into Numba's cache.

A kernel is written once, as explicit loops over `prange`, with one signature per floating-point type. The signature is
explicit so that any array a user brings (contiguous or not, read-only or not) reaches the one compiled version. It is
compiled a second time, for one thread, only where a parallel loop must not be started (`threads.parallel_allowed`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types

from . import threads

# error_model="numpy": a division by zero is inf or nan, not an exception, so that loops can be vectorised.
OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}

REAL = {np.dtype(np.float32): types.float32, np.dtype(np.float64): types.float64}


def array_of(real: Any, ndim: int) -> types.Array:
    """An array argument that is only read: any strides, read-only or not."""
    return types.Array(real, ndim, "A", readonly=True)


def output_of(real: Any, ndim: int) -> types.Array:
    """An array argument that is written: any strides."""
    return types.Array(real, ndim, "A")


class Kernel:
    """A function of loops, compiled on first use for each floating-point type: ``kernel[dtype](...)``."""

    def __init__(self, function: Callable[..., None], signature: Callable[[Any], Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.signature = signature

    @functools.cache  # noqa: B019 - kernels live as long as the module
    def compiled(self, dtype: np.dtype | None = None, parallel: bool = True) -> Callable[..., None]:
        """The kernel for one floating-point type (None: it has no use for one), as parallel or serial loops."""
        threads.load_layer()
        signature = self.signature(REAL.get(dtype))
        function = self.function
        if not parallel:
            # Numba's cache tells functions apart by name and code, not by options: without a name of its own the
            # serial version would be found in place of the parallel one.
            function = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_serial")
            function.__qualname__ = function.__name__
            function.__module__ = self.function.__module__
        return numba.njit(signature, parallel=parallel, **OPTIONS)(function)

    def __getitem__(self, dtype: np.dtype) -> Callable[..., None]:
        compiled = self.compiled(dtype, threads.parallel_allowed())

        def run(*arguments: Any) -> None:
            with threads.exclusive():
                compiled(*arguments)

        return run


def kernel(signature: Callable[[Any], Any]) -> Callable[[Callable[..., None]], Kernel]:
    """Make a `Kernel` of a function; `signature` gives its Numba signature for a floating-point type."""
    return lambda function: Kernel(function, signature)
