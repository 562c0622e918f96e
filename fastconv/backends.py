"""Where an array lives and which backend runs it.

A *home* is one of the two places a kernel can run, with the same methods on both, so that the public functions
are written once:

    admit(function, argument, obj)      the caller's object as an array the kernels understand, without a copy
    output(function, out, shape, ...)   the array a kernel fills, and what the caller gets back
    overlap(a, b)                       do two admitted arrays share memory?
    operation(name)                     the module of kernels: `convolution` or `softmax_cross_entropy`

On the CPU an admitted array is a NumPy array. On CUDA it is a `fastconv.cuda_kernels._cuda.DeviceArray`, which has the
same shape, dtype, strides and view operations (`transpose`, indexing with None) but lives on the device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

__all__ = [
    "BackendUnavailableError",
    "backends",
    "get_float32_precision",
    "get_num_threads",
    "set_backend",
    "set_float32_precision",
    "set_num_threads",
    "use_backend",
]

BACKENDS = ("auto", "cpu", "cuda")
_DLPACK_CPU = 1
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged

_chosen: ContextVar[str | None] = ContextVar("fastconv_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here. The message says what is missing and what to install."""


# ---------------------------------------------------------------------------------------------------------------------
# Choice of the backend
# ---------------------------------------------------------------------------------------------------------------------


def backends() -> tuple[str, ...]:
    """Return the backends that can run here: ``("cpu",)`` or ``("cpu", "cuda")``.

    >>> import fastconv as fc
    >>> "cpu" in fc.backends()
    True
    """
    return ("cpu", "cuda") if cuda_status()[0] else ("cpu",)


def _checked(function: str, name: object, argument: str = "backend") -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{function}: {argument} is {name!r} (expected one of {', '.join(map(repr, BACKENDS))})")
    return name


def set_backend(name: str) -> None:
    """Choose the backend of the calls that say ``backend="auto"``, in this thread or asyncio task.

    ``"auto"`` (the default) runs where the arrays live. Raises ValueError for another name and
    `BackendUnavailableError` when the backend cannot run here.

    >>> import fastconv as fc
    >>> fc.set_backend("cpu"); fc.set_backend("auto")
    """
    if _checked("set_backend", name) == "cuda":
        _require_cuda("set_backend")
    _chosen.set(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a ``with`` block.

    >>> import fastconv as fc
    >>> with fc.use_backend("cpu"):
    ...     pass
    """
    if _checked("use_backend", name) == "cuda":
        _require_cuda("use_backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _default_backend(function: str) -> str:
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    if "FASTCONV_BACKEND" not in os.environ:  # asked first: `get` raises and catches an exception, which takes 1 us
        return "auto"
    from_environment = os.environ["FASTCONV_BACKEND"]
    if not from_environment:
        return "auto"
    return _checked(function, from_environment, "the environment variable FASTCONV_BACKEND")


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------

FLOAT32_PRECISIONS = ("ieee", "tf32")  # the names of torch.backends.fp32_precision
_precision: ContextVar[str] = ContextVar("fastconv_float32_precision", default="ieee")


def set_float32_precision(precision: str) -> None:
    """Choose how CUDA convolutions of float32 arrays multiply, in this thread or asyncio task.

    ``"ieee"`` (the default) multiplies float32 numbers as they are. ``"tf32"`` allows the tensor cores of a GPU of
    compute capability 8.0 or newer: operands are rounded to 11 significant bits (an error of up to 2**-11 each, in the
    place of 2**-24), their products are exact and summed in float32. Older GPUs, the CPU, other dtypes and convolutions
    that the tensor cores' kernels do not apply to compute as before. The names are those of
    ``torch.backends.fp32_precision``. Raises ValueError for another name.

    >>> import fastconv as fc
    >>> fc.set_float32_precision("tf32"); fc.get_float32_precision()
    'tf32'
    >>> fc.set_float32_precision("ieee")
    """
    if not isinstance(precision, str) or precision not in FLOAT32_PRECISIONS:
        expected = ", ".join(map(repr, FLOAT32_PRECISIONS))
        raise ValueError(f"set_float32_precision: precision is {precision!r} (expected one of {expected})")
    _precision.set(precision)


def get_float32_precision() -> str:
    """Return how CUDA convolutions of float32 arrays multiply: ``"ieee"`` or ``"tf32"``.

    >>> import fastconv as fc
    >>> fc.get_float32_precision()
    'ieee'
    """
    return _precision.get()


@functools.cache
def cuda_status() -> tuple[bool, str]:
    """Return (can CUDA run here?, why not and what to do about it)."""
    try:
        cuda = importlib.import_module("fastconv.cuda_kernels._cuda")
    except Exception as error:  # a broken CUDA install raises RuntimeError and others, not only ImportError
        found = installed("numba-cuda", "numba", "numpy")
        return False, (
            f"numba.cuda cannot be imported ({type(error).__name__}: {error}; {found}). "
            'Install it with `pip install "fastconv[cuda]"`.'
        )
    return cuda.available()


def installed(*packages: str) -> str:
    """The versions of those of the packages that are installed, in words."""
    from importlib import metadata

    versions = []
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return ", ".join(versions)


def _require_cuda(function: str) -> Any:
    usable, reason = cuda_status()
    if not usable:
        raise BackendUnavailableError(f"{function}: the cuda backend cannot run here: {reason}")
    return importlib.import_module("fastconv.cuda_kernels._cuda")


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


def set_num_threads(n: int) -> None:
    """Let the CPU kernels called from this thread use at most `n` threads.

    Results do not depend on `n`. More threads than Numba's pool has (``NUMBA_NUM_THREADS``, by default the number of
    cores) share the pool. Raises TypeError unless `n` is an integer, ValueError unless it is positive.

    >>> import fastconv as fc
    >>> before = fc.get_num_threads(); fc.set_num_threads(1); fc.get_num_threads()
    1
    >>> fc.set_num_threads(before)
    """
    from .cpu import threads

    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"set_num_threads: n is a {type(n).__name__} (expected a positive int)")
    if n < 1:
        raise ValueError(f"set_num_threads: n is {n} (expected a positive int)")
    threads.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return how many threads the CPU kernels called from this thread may use.

    >>> import fastconv as fc
    >>> fc.get_num_threads() >= 1
    True
    """
    from .cpu import threads

    return threads.get_num_threads()


# ---------------------------------------------------------------------------------------------------------------------
# Where an array lives
# ---------------------------------------------------------------------------------------------------------------------


def _library(obj: object) -> str:
    return type(obj).__module__.partition(".")[0]


def _residence(function: str, argument: str, obj: object) -> str:
    """Return "cpu" or "cuda", where `obj` lives, or raise TypeError when it is not an array."""
    if isinstance(obj, np.ndarray):
        if isinstance(obj, np.ma.MaskedArray):
            raise TypeError(
                f"{function}: {argument} is a masked array, whose mask would be ignored (expected a plain array)"
            )
        return "cpu"
    # the simulator's device arrays pass for the NumPy arrays that they are made of
    if hasattr(obj, "__cuda_array_interface__") or type(obj).__module__.startswith("numba.cuda.simulator"):
        return "cuda"
    if hasattr(obj, "__dlpack_device__"):
        try:
            kind = int(obj.__dlpack_device__()[0])
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{function}: {argument} does not say where it lives: {error}") from error
        if kind == _DLPACK_CPU:
            return "cpu"
        if kind in _DLPACK_CUDA:
            return "cuda"
        raise TypeError(f"{function}: {argument} lives on a device of DLPack type {kind} (expected CPU or CUDA)")
    if hasattr(obj, "__array_interface__") and not isinstance(obj, np.generic):
        return "cpu"
    raise TypeError(
        f"{function}: {argument} is a {type(obj).__name__} (expected an array: NumPy, or an object with "
        "__array_interface__, __cuda_array_interface__ or __dlpack__)"
    )


_operation = functools.cache(importlib.import_module)
_NUMPY_OR_NOT_GIVEN = {np.ndarray, type(None)}


def home_of(function: str, backend: str, **operands: object) -> Cpu | Cuda:
    """Return the home that `function` runs in, from the backend asked for and where its operands live.

    `operands` are the arrays of the call by argument name; None stands for one that was not given.
    """
    if _checked(function, backend) == "auto":
        backend = _default_backend(function)
    if backend != "cuda" and _NUMPY_OR_NOT_GIVEN.issuperset(map(type, operands.values())):
        return CPU  # the common call, decided before anything slow
    residence = {name: _residence(function, name, obj) for name, obj in operands.items() if obj is not None}
    homes = set(residence.values())
    if backend == "cpu" and "cuda" in homes:
        name = next(name for name, home in residence.items() if home == "cuda")
        raise TypeError(f'{function}: {name} lives on a CUDA device, but backend="cpu" was asked for')
    if len(homes) > 1:
        places = ", ".join(f"{name} on {home}" for name, home in residence.items())
        raise TypeError(f"{function}: the arrays of one call must live in one place, but got {places}")
    if backend == "cuda" or "cuda" in homes:
        return Cuda(_require_cuda(function))
    return CPU


_LINE = 64  # bytes of a cache line
_ALIGNED_BYTES = 256 * 1024  # smaller arrays stay in a cache that is fast enough, and 1 us is more of their time


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A fresh array. A large one begins at a cache line, where NumPy's begin 16 bytes after one.

    There every vector that is stored lies across two lines: layers of three channels took 7 % longer.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _ALIGNED_BYTES:
        return np.empty(shape, dtype)
    buffer = np.empty(size + _LINE, np.uint8)
    begin = -buffer.ctypes.data % _LINE
    return buffer[begin : begin + size].view(dtype).reshape(shape)


class Cpu:
    """NumPy arrays, and whatever shares its CPU memory with NumPy: torch and JAX tensors, memory-mapped arrays."""

    name = "cpu"

    def admit(self, function: str, argument: str, obj: Any) -> np.ndarray:
        if type(obj) is np.ndarray:
            return obj
        _residence(function, argument, obj)
        if isinstance(obj, np.ndarray):
            return np.asarray(obj)
        try:
            if _library(obj) == "torch":
                return _torch_to_numpy(obj)
            if hasattr(obj, "__array_interface__"):
                return np.asarray(obj)
            return np.from_dlpack(obj)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{function}: {argument} cannot be read as a NumPy array: {error}") from error

    def output(
        self, function: str, out: Any, shape: tuple[int, ...], dtype: np.dtype, like: Any, argument: str = "out"
    ) -> tuple[np.ndarray, Callable[[], Any] | None]:
        """Return the array to fill and, unless that is what the caller gets, the function that makes the result.

        `out` is the caller's own array, to be checked by the caller of this method, or None for a fresh one of the
        array library of `like`.
        """
        if out is not None:
            return self.admit(function, argument, out), lambda: out
        array = _empty(shape, dtype)
        if isinstance(like, np.ndarray):
            return array, None
        return array, lambda: _as_library_of(like, array)

    def show_labels(self, function: str, labels: np.ndarray) -> None:
        """Let the host see the labels; here it always does."""

    def overlap(self, a: np.ndarray, b: np.ndarray) -> bool:
        if not np.may_share_memory(a, b):
            return False
        try:
            return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            return True  # undecided in reasonable time: refuse rather than risk reading what was just written

    def is_writable(self, a: Any) -> bool:
        """Not read-only, and no two elements in one place (a broadcast view), where writing would be a race."""
        writeable = a.flags.writeable if isinstance(a, np.ndarray) else a.writeable
        return writeable and not _shares_elements(a.shape, a.strides, a.dtype.itemsize)

    def operation(self, name: str) -> Any:
        return _operation(f"fastconv.cpu.{name}")


CPU = Cpu()


class Cuda:
    """Device arrays, used where they are; NumPy arrays are copied in, and their results out."""

    name = "cuda"

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def admit(self, function: str, argument: str, obj: Any) -> Any:
        if _residence(function, argument, obj) == "cpu":
            return self._copied(CPU.admit(function, argument, obj))
        try:
            return self._cuda.admit(obj)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{function}: {argument} cannot be read as a CUDA array: {error}") from error

    def output(
        self, function: str, out: Any, shape: tuple[int, ...], dtype: np.dtype, like: Any, argument: str = "out"
    ) -> tuple[Any, Callable[[], Any]]:
        if _residence(function, argument if out is not None else "input", like if out is None else out) == "cuda":
            if out is not None:
                return self.admit(function, argument, out), lambda: out
            result, array = self._cuda.empty(shape, dtype, like=like)
            return array, lambda: result
        host, deliver = CPU.output(function, out, shape, dtype, like, argument)
        array = self._copied(host)

        def copy_back() -> Any:
            self._cuda.to_host(array, out=host)
            self._raise_bad_label(function, array)
            return host if deliver is None else deliver()

        return array, copy_back

    def show_labels(self, function: str, labels: Any) -> None:
        """Let the host see labels that are on the device, and what kernels before have met: this waits for them."""
        if labels.host is None:
            labels.host = self._cuda.to_host(labels)
        self._raise_bad_label(function, labels)

    def _raise_bad_label(self, function: str, array: Any) -> None:
        """Raise ValueError if a kernel before, on the stream of `array` that was waited for, has met a bad label."""
        position = self._cuda.take_bad_label(array.stream)
        if position is not None:
            raise ValueError(
                f"{function}: an earlier call had class indices out of range in its target on this device, the first "
                f"at position {position} (in C order), and nan for the loss and the gradient there; with check=True "
                "that call raises the error itself"
            )

    def _copied(self, host: np.ndarray) -> Any:
        """A copy of `host` on the device, that remembers `host`: sharing is judged on the caller's own arrays.

        Labels in the byte order of another machine come in that of this one. (Other arrays are refused later.)
        """
        is_swapped = host.dtype.kind in "iu" and not host.dtype.isnative
        array = self._cuda.to_device(host.astype(host.dtype.newbyteorder("=")) if is_swapped else host)
        array.host = host
        return array

    def overlap(self, a: Any, b: Any) -> bool:
        if a.host is not None and b.host is not None:
            return CPU.overlap(a.host, b.host)
        return self._cuda.overlap(a, b)

    def is_writable(self, a: Any) -> bool:
        return CPU.is_writable(a) if a.host is None else CPU.is_writable(a.host)

    def operation(self, name: str) -> Any:
        return _operation(f"fastconv.cuda_kernels.{name}")


def _shares_elements(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Do two elements of an array of these strides lie in one place?"""
    axes = sorted((abs(step), n) for step, n in zip(strides, shape, strict=True) if n > 1)
    reach = itemsize  # of the axes so far
    for step, n in axes:
        if step < reach:
            break
        reach += (n - 1) * step
    else:
        return False
    if 0 in shape:
        return False
    if any(step == 0 for step, _ in axes):
        return True
    # Axes that interleave, which may still miss each other: look at every element.
    places = np.zeros(1, np.int64)
    for step, n in axes:
        places = np.add.outer(places, np.arange(n) * step).ravel()
    return bool((np.diff(np.sort(places)) < itemsize).any())


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    """A CPU torch tensor as NumPy array, without a copy. NumPy has no bfloat16 of its own: ml_dtypes brings it."""
    torch = sys.modules["torch"]
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        if tensor.requires_grad:
            raise TypeError("it requires grad (expected tensor.detach())")
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _as_library_of(like: Any, array: np.ndarray) -> Any:
    """`array` as an array of the library of `like`, sharing memory where that library can."""
    if _library(like) == "torch":
        torch = sys.modules["torch"]
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().asarray(array)
    return array
