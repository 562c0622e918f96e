"""How the CPU kernels are compiled: lazily, once per floating-point type, into Numba's cache.

A kernel is written once, as explicit loops over `prange`, with one signature per element type. The signature is
explicit so that any array a user brings (contiguous or not, read-only or not) reaches the one compiled version. It is
compiled a second time, for one thread, only where a parallel loop must not be started (`threads.parallel_allowed`).

The kernels of `loops` stand under Numba's own ``@njit(parallel=True, ...)``. `kernel`, above it, takes the function and
the options from there: by itself, Numba would compile for the layouts of every call anew, could not be trusted to cache
(`compiled`), and would start parallel loops wherever the threading layer allows none.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache

from . import threads
from .compiler import HelperCompiler, without_collector

REAL = {np.dtype(np.float32): types.float32, np.dtype(np.float64): types.float64}

# A function that task bodies call. Only compiled code calls it: it needs no entry for Python or C.
helper = numba.njit(
    error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=HelperCompiler
)  # fmt: skip


def array_of(real: Any, ndim: int) -> types.Array:
    """An array argument that is only read: any strides, read-only or not."""
    return types.Array(real, ndim, "A", readonly=True)


def output_of(real: Any, ndim: int) -> types.Array:
    """An array argument that is written: any strides."""
    return types.Array(real, ndim, "A")


@functools.cache
def _fingerprint() -> str:
    """A name for the source of all kernels together."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compiled(decorator: Callable[..., Any], signature: Any, function: Callable[..., None], **options: Any) -> Any:
    """``decorator(signature, **options)(function)`` with Numba's cache, under a name that the cache can be trusted by.

    Numba tells cached functions apart by file, name, line and code: not by options, so that a serial version would be
    found in place of a parallel one, and not by what they call, so that a kernel would be found that was compiled with
    the intrinsics or constants of an older version of another file. Here the name carries both.
    """
    with without_collector():
        return _compiled(decorator, signature, function, **options)


def _compiled(decorator: Callable[..., Any], signature: Any, function: Callable[..., None], **options: Any) -> Any:
    kind = "".join(f"_{name}" for name, value in options.items() if value is True)
    twin = FunctionType(function.__code__, function.__globals__, function.__name__)
    twin.__qualname__ = f"{function.__name__}{kind}_{_fingerprint()}"
    twin.__module__ = function.__module__
    options["error_model"] = "numpy"  # a division by zero is inf or nan, not an exception, so loops can be vectorised
    try:
        return decorator(signature, cache=True, **options)(twin)
    except RuntimeError as error:
        if "cannot cache" not in str(error):  # neither the package nor the user's cache folder can be written
            raise
        return decorator(signature, **options)(twin)
    except (EOFError, IndexError, KeyError, ValueError, pickle.UnpicklingError):  # a cache file that was cut off
        FunctionCache(twin).flush()
        return decorator(signature, cache=True, **options)(twin)


_PARALLEL = {"parallel": True, "nogil": True}


class Kernel:
    """A function of loops, compiled on first use for each element type: ``kernel[dtype](...)``.

    `function` may stand under ``@njit``, whose options are then taken; otherwise it is compiled as parallel loops.
    """

    def __init__(self, function: Callable[..., None], signature: Callable[[Any], Any]) -> None:
        self.__doc__ = function.__doc__
        given = getattr(function, "targetoptions", _PARALLEL)
        self.options = {name: value for name, value in given.items() if name in _PARALLEL}
        self.function = getattr(function, "py_func", function)
        self.signature = signature

    @functools.cache  # noqa: B019 - kernels live as long as the module
    def compiled(self, dtype: np.dtype | None = None, parallel: bool = True) -> Callable[..., None]:
        """The kernel for one element type (None: it has no use for one), as parallel or serial loops."""
        threads.load_layer()
        options = self.options if parallel else {**self.options, "parallel": False}
        element = None if dtype is None else numba.from_dtype(dtype)
        return compiled(numba.njit, self.signature(element), self.function, **options)

    def __getitem__(self, dtype: np.dtype) -> Callable[..., None]:
        compiled = self.compiled(dtype, threads.parallel_allowed())

        def run(*arguments: Any) -> None:
            with threads.exclusive():
                compiled(*arguments)

        return run


def kernel(signature: Callable[[Any], Any]) -> Callable[[Callable[..., None]], Kernel]:
    """Make a `Kernel` of a function; `signature` gives its Numba signature for an element type."""
    return lambda function: Kernel(function, signature)
