"""Everything that needs a CUDA runtime: the one file that imports `numba.cuda`, and the arrays and launches on top.

Import it lazily and inside ``try/except Exception``: a broken CUDA installation raises RuntimeErrors here, not only
ImportErrors. With ``NUMBA_ENABLE_CUDASIM=1`` the same code runs in Numba's simulator, where the device's memory is the
host's and a launch runs the kernel's Python source.

An operation sees `DeviceArray`: shape, dtype, strides and address of memory that somebody else owns. Nothing here
waits for the device, except `to_host`, `take_bad_label` and the first use of a table (`upload`). So a call on device
arrays with ``out=`` can be captured in a CUDA graph, once it has been made before: by then its kernels are loaded, its
tables are on the device and its memory between kernels is there (`scratch`).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import cuda, types
from numba.core import config
from numpy.typing import DTypeLike

from ..backends import installed
from .lender import Lender

__all__ = [
    "DeviceArray",
    "admit",
    "available",
    "bad_label_record",
    "cuda",
    "current_device",
    "current_stream",
    "deliver",
    "empty",
    "has_engine",
    "launch",
    "launch_blocks",
    "load_compiler",
    "overlap",
    "scratch",
    "take_bad_label",
    "to_device",
    "to_host",
    "upload",
]

SIMULATOR = bool(config.ENABLE_CUDASIM)

# Threads of a block. Few, so that a small result still spreads over the multiprocessors; the kernels share nothing
# between threads, so nothing asks for more.
THREADS = 128
# Blocks of a grid. At least this many, because numba-cuda warns of fewer (those without work leave at once); at most
# this many per multiprocessor, enough to fill it several times over: threads with more than one element step on.
MIN_BLOCKS = 128
BLOCKS_PER_MULTIPROCESSOR = 32
# The simulator runs every thread as a Python thread: two blocks of two walk the whole indexing at the least cost.
SIMULATED_GRID, SIMULATED_THREADS = 2, 2

LEGACY_STREAM = 1  # CU_STREAM_LEGACY, the default stream's handle where 0 is not allowed (DLPack)
_DLPACK_CUDA = 2

_simulator_lock = threading.RLock()  # the simulator knows one launch at a time


# numba-cuda 0.30.4 names this function, which NumPy 2.5 removed, where it implements NumPy's for kernels.
if not SIMULATOR:
    Lender("numba.cuda.np.arrayobj", {"row_stack": np.vstack}).install()


# ---------------------------------------------------------------------------------------------------------------------
# Can CUDA run here?
# ---------------------------------------------------------------------------------------------------------------------


def available() -> tuple[bool, str]:
    """Return (can kernels run here?, and if not: what is missing and what to do about it)."""
    if SIMULATOR:
        return True, ""
    if getattr(cuda, "implementation", "") != "NVIDIA":
        return False, 'the package numba-cuda is not installed. Install it with `pip install "fastconv[cuda]"`.'
    if not cuda.is_available():
        error = cuda.cuda_error()
        if error is None:
            return False, 'the CUDA compiler (NVVM) is not installed. Install it with `pip install "fastconv[cuda]"`.'
        reason = " ".join(error.split()).rstrip(".: ")
        return False, (
            f"the NVIDIA driver is not usable ({reason}). Install the driver of an NVIDIA GPU, version 580 or newer; "
            "without a GPU, NUMBA_ENABLE_CUDASIM=1 runs the kernels in Numba's simulator."
        )
    if len(cuda.gpus) == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        return False, f"the NVIDIA driver shows no GPU{hint}. Make one visible."
    try:
        load_compiler()
    except Exception as error:  # AttributeError and others, of what one of them names and the other has changed
        return False, (
            f"{installed('numba-cuda', 'numba', 'numpy')} do not work together ({type(error).__name__}: {error}). "
            'Install the numba-cuda of `pip install "fastconv[cuda]"`, or if it is that one, an older numpy.'
        )
    return True, ""


def load_compiler() -> None:
    """Load what numba-cuda loads at its first compilation, which later ones find there; it needs no GPU."""
    from numba.core.compiler_lock import global_compiler_lock
    from numba.cuda.descriptor import cuda_target

    with global_compiler_lock:
        cuda_target.typing_context.refresh()
        cuda_target.target_context.refresh()


def current_device() -> int:
    """Return the number of the device that launches of this thread run on."""
    return 0 if SIMULATOR else cuda.get_current_device().id


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def _contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


class DeviceArray:
    """What a kernel needs to know of an array in device memory. It owns nothing, but keeps the owner alive.

    `strides` are in bytes, as NumPy's. `stream` is the handle of the stream that the owner's library works on.
    `host` is for the caller of `to_device`, to remember what was copied.
    """

    __slots__ = ("dtype", "host", "owner", "pointer", "shape", "stream", "strides", "writeable")

    __cuda_memory__ = True  # numba-cuda: pass `_strided_memory_view_shim` to kernels, as for its own arrays

    def __init__(
        self,
        pointer: int,
        shape: Sequence[int],
        strides: Sequence[int] | None,
        dtype: DTypeLike,
        owner: Any,
        stream: int = 0,
        writeable: bool = True,
    ) -> None:
        self.pointer = pointer
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.strides = _contiguous_strides(self.shape, self.dtype.itemsize) if strides is None else tuple(strides)
        self.owner = owner
        self.stream = stream
        self.writeable = writeable
        self.host: Any = None

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype.name}, strides={self.strides})"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """In C order, whatever the strides of dimensions of one element."""
        expected = _contiguous_strides(self.shape, self.dtype.itemsize)
        return self.size == 0 or all(
            n == 1 or s == e for n, s, e in zip(self.shape, self.strides, expected, strict=True)
        )

    def _view(self, shape: Sequence[int], strides: Sequence[int]) -> DeviceArray:
        view = DeviceArray(self.pointer, shape, strides, self.dtype, self.owner, self.stream, self.writeable)
        view.host = self.host
        return view

    def broadcast_to(self, shape: Sequence[int]) -> DeviceArray:
        """An array of one element in every place of `shape`, as `numpy.broadcast_to`."""
        if self.size != 1:
            raise ValueError(f"DeviceArray.broadcast_to: the array has shape {self.shape} (expected one element)")
        return self._view(shape, (0,) * len(shape))

    def merge(self, axis: int) -> DeviceArray | None:
        """The same memory with `axis` and the next as one axis, or None where its strides do not allow that."""
        (m, n), (outer, inner) = self.shape[axis : axis + 2], self.strides[axis : axis + 2]
        if self.size and m > 1 and n > 1 and outer != n * inner:
            return None
        step = outer if n == 1 else inner
        return self._view(
            (*self.shape[:axis], m * n, *self.shape[axis + 2 :]),
            (*self.strides[:axis], step, *self.strides[axis + 2 :]),
        )

    def transpose(self, axes: Sequence[int]) -> DeviceArray:
        """The same memory with its axes in another order, as `numpy.ndarray.transpose`."""
        if sorted(axes) != list(range(self.ndim)):
            raise ValueError(
                f"DeviceArray.transpose: axes are {tuple(axes)} (expected each of 0..{self.ndim - 1} once)"
            )
        return self._view([self.shape[a] for a in axes], [self.strides[a] for a in axes])

    def __getitem__(self, index: Any) -> DeviceArray:
        """A part of the same memory, with axes of size 1 put in: `index` holds None, Ellipsis and slices of step 1."""
        items = index if isinstance(index, tuple) else (index,)
        known = sum(item is not None and item is not Ellipsis for item in items)
        shape, strides, axis, offset = [], [], 0, 0
        for item in items:
            if item is None:
                shape.append(1)
                strides.append(0)
                continue
            if item is Ellipsis:
                count = self.ndim - known
                shape += self.shape[axis : axis + count]
                strides += self.strides[axis : axis + count]
                axis += count
                continue
            if not isinstance(item, slice) or item.step not in (None, 1):
                raise TypeError(f"DeviceArray: index {item!r} (expected None, Ellipsis or slices of step 1)")
            first, end, _ = item.indices(self.shape[axis])
            shape.append(max(0, end - first))
            strides.append(self.strides[axis])
            offset += first * self.strides[axis]
            axis += 1
        view = self._view((*shape, *self.shape[axis:]), (*strides, *self.strides[axis:]))
        view.pointer += offset
        return view

    def samples(self, first: int, count: int) -> DeviceArray:
        """`count` elements of the first axis, from `first` on."""
        view = self._view((count, *self.shape[1:]), self.strides)
        view.pointer += first * self.strides[0]
        return view

    def flat(self, dtype: DTypeLike | None = None) -> FlatArray:
        """The memory from the first element to the last as one run, gaps included, in elements of `dtype`.

        The strides must not be negative. A part of an element of `dtype` at the end is left out.
        """
        stored = self.stored_dtype if dtype is None else np.dtype(dtype)
        if any(s < 0 and n > 1 for n, s in zip(self.shape, self.strides, strict=True)):
            raise ValueError(f"DeviceArray.flat: the strides are {self.strides} (expected none below zero)")
        extent = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + self.dtype.itemsize
        count = extent // stored.itemsize if self.size else 0
        return FlatArray(self.pointer, (count,), None, stored, self.owner, self.stream, self.writeable)

    # -- as a kernel's argument

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype the kernels read: NumPy has no bfloat16, so they take its bits."""
        return np.dtype(np.uint16) if self.dtype.name == "bfloat16" else self.dtype

    @property
    def _numba_type_(self) -> types.Array:
        # Always of any strides and writable: one compiled version per kernel and dtype, whatever the caller brings.
        return types.Array(numba.from_dtype(self.stored_dtype), self.ndim, "A")

    @property
    def _strided_memory_view_shim(self) -> SimpleNamespace:
        """What numba-cuda's `_Kernel._prepare_args` reads of an array."""
        return SimpleNamespace(
            ptr=self.pointer,
            shape=self.shape,
            dtype=self.stored_dtype,
            size=self.size,
            _layout=SimpleNamespace(strides_in_bytes=self.strides),
        )

    def as_numpy(self) -> np.ndarray:
        """A NumPy array at the same address: to compare addresses, and in the simulator also to read and write."""
        if self.size == 0:
            return np.empty(self.shape, self.stored_dtype)
        interface = {
            "data": (self.pointer, not self.writeable),
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.stored_dtype.str,
            "version": 3,
        }
        return np.asarray(SimpleNamespace(__array_interface__=interface, owner=self.owner))


class FlatArray(DeviceArray):
    """One run of device memory, for kernels that compute offsets themselves."""

    __slots__ = ()

    @property
    def _numba_type_(self) -> types.Array:
        return types.Array(numba.from_dtype(self.stored_dtype), 1, "C")


def overlap(a: DeviceArray, b: DeviceArray) -> bool:
    """Do two arrays share an element? Answered from addresses alone: True as well where that takes too long."""
    first, second = a.as_numpy(), b.as_numpy()
    if not np.may_share_memory(first, second):
        return False
    try:
        return bool(np.shares_memory(first, second, max_work=100_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


# ---------------------------------------------------------------------------------------------------------------------
# The caller's libraries
# ---------------------------------------------------------------------------------------------------------------------


def _library(obj: Any) -> str:
    return type(obj).__module__.partition(".")[0]


def current_stream(obj: Any) -> int:
    """Return the handle of the stream that the library of the device array `obj` works on now (0: the default)."""
    library = _library(obj)
    if library == "torch":
        return int(sys.modules["torch"].cuda.current_stream(obj.device).cuda_stream)
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    if library == "numba":
        return int(obj.stream.handle) if obj.stream else 0
    if not hasattr(obj, "__dlpack__"):
        return int(obj.__cuda_array_interface__.get("stream") or 0)
    return 0  # DLPack makes the default stream wait for the array (`_exported`)


class bfloat(np.void):  # NumPy adds the bits to the name of the type: the dtype is "bfloat16"
    """What stands for bfloat16 where ml_dtypes is not installed: two bytes, which only the kernels compute with."""


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype((bfloat, [("bits", np.uint16)]))
    return np.dtype(ml_dtypes.bfloat16)


def _exported(obj: Any) -> Any:
    """The memory behind `obj` as a `cuda.core` StridedMemoryView, by DLPack or else the CUDA array interface."""
    from cuda.core.utils import StridedMemoryView

    # torch, CuPy and Numba say which stream they work on, and `launch` orders the streams: -1 opts out of the
    # protocol's ordering. JAX does not say: it makes the default stream wait.
    ordered = _library(obj) in ("torch", "cupy", "numba") or not hasattr(obj, "__dlpack__")
    return StridedMemoryView.from_any_interface(obj, stream_ptr=-1 if ordered else LEGACY_STREAM)


def admit(obj: Any) -> DeviceArray:
    """Return the device array `obj` (CuPy, Numba, PyTorch, JAX, ...) as a `DeviceArray`, without a copy.

    Raises TypeError for a tensor that requires grad, ValueError for an array that the current device cannot use.
    """
    if SIMULATOR:
        return _admit_simulated(obj)
    if getattr(obj, "requires_grad", False):
        raise TypeError("it requires grad (expected tensor.detach())")
    interface = None if hasattr(obj, "__dlpack__") else obj.__cuda_array_interface__
    if interface is not None and 0 in interface["shape"]:  # no address to ask the driver about
        return DeviceArray(0, interface["shape"], None, np.dtype(interface["typestr"]), obj, current_stream(obj))
    if _library(obj) == "torch" and obj.dtype == sys.modules["torch"].bfloat16:
        # by its bits: cuda.core knows bfloat16 only with ml_dtypes, which torch does not need
        view, dtype = _exported(obj.view(sys.modules["torch"].int16)), _bfloat16()
    else:
        view = _exported(obj)
        dtype = obj.dtype if isinstance(getattr(obj, "dtype", None), np.dtype) else view.dtype
    strides = None if view.strides is None else [s * dtype.itemsize for s in view.strides]
    array = DeviceArray(view.ptr, view.shape, strides, dtype, obj, current_stream(obj), not view.readonly)
    if not view.is_device_accessible:
        raise ValueError("a CUDA device cannot read its memory")
    if view.device_id != current_device():
        raise ValueError(
            f"it is on CUDA device {view.device_id}, but the current device is {current_device()} "
            "(expected all arrays of a call on the current device)"
        )
    if array.pointer % dtype.itemsize or any(s % dtype.itemsize for s in array.strides):
        raise ValueError(f"its elements are not aligned to {dtype.itemsize} bytes")
    return array


def _admit_simulated(obj: Any) -> DeviceArray:
    memory = getattr(obj, "_ary", None)
    if not isinstance(memory, np.ndarray):
        raise TypeError(
            f"it is a {type(obj).__module__}.{type(obj).__name__}, but NUMBA_ENABLE_CUDASIM=1 asks for the simulator "
            "(expected an array of the simulator's numba.cuda, or NumPy)"
        )
    return DeviceArray(
        memory.ctypes.data, memory.shape, memory.strides, memory.dtype, obj, writeable=memory.flags.writeable
    )


def empty(shape: Sequence[int], dtype: DTypeLike, like: Any) -> tuple[Any, DeviceArray]:
    """Allocate device memory in the array library of `like`; return that library's array and its `DeviceArray`.

    For results; what is only handed from kernel to kernel is `scratch`.
    `like` is a user's array or a `DeviceArray`, which stands for its owner. Where the library has no arrays that can
    be written (JAX), the memory is Numba's and `deliver` hands it over when it is filled.
    """
    if isinstance(like, DeviceArray):
        like = like.owner
    dtype = np.dtype(dtype)
    library = _library(like)
    if library == "torch":
        torch = sys.modules["torch"]
        result = torch.empty(tuple(shape), dtype=getattr(torch, dtype.name), device=like.device)
    elif library == "cupy":
        result = sys.modules["cupy"].empty(tuple(shape), dtype)
    else:
        result = cuda.device_array(tuple(shape), dtype, stream=getattr(like, "stream", 0) if library == "numba" else 0)
    return result, admit(result)


class _Block:
    """Device memory on loan: it goes back where it came from when nobody knows it any more."""

    __slots__ = ("_free", "memory")

    def __init__(self, free: list[Any], memory: Any) -> None:
        self._free, self.memory = free, memory

    def __del__(self) -> None:
        self._free.append(self.memory)


_LEAST_BLOCK = 512  # bytes; larger blocks are powers of two
_blocks_of: dict[tuple[int, int, int], list[Any]] = {}  # by device, stream and size: what is not on loan


def scratch(shape: Sequence[int], dtype: DTypeLike, like: DeviceArray) -> DeviceArray:
    """Device memory for what one kernel of a call leaves to the next.

    It belongs to the stream of `like`: what is launched there later may have the same memory again. torch has such an
    allocator, which also knows of the graphs that it captures. For all others the blocks are kept here, and never given
    back: a captured graph goes on using those that it met. It must not be replayed beside other calls on its stream.
    """
    if _library(like.owner) == "torch":
        return empty(shape, dtype, like)[1]
    kind = np.dtype(dtype)
    size = _LEAST_BLOCK
    while size < math.prod(shape) * kind.itemsize:
        size *= 2
    stream = max(like.stream, 0)
    free = _blocks_of.setdefault((current_device(), stream, size), [])
    try:
        memory = free.pop()
    except IndexError:
        memory = admit(cuda.device_array(size, np.uint8, stream=_stream(stream)))
    return DeviceArray(memory.pointer, shape, None, kind, _Block(free, memory), stream)


def deliver(result: Any, like: Any) -> Any:
    """Return `result`, which `empty` made and a kernel has filled, as an array of the library of `like`."""
    if _library(like) in ("torch", "cupy", "numba") or not hasattr(like, "__array_namespace__"):
        return result
    return like.__array_namespace__().from_dlpack(_Handover(result))


class _Handover:
    """Exports an array by DLPack such that the consumer's stream waits for the kernel that fills it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, current_device()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream != -1:
            _order(current_stream(self.array), 0 if stream in (None, LEGACY_STREAM) else stream)
        return _exported(self.array).__dlpack__(stream=-1, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def to_device(array: np.ndarray) -> DeviceArray:
    """Copy a NumPy array of any strides to the device."""
    host = np.array(array, order="C", copy=True)
    stored = host.view(np.uint16) if host.dtype.name == "bfloat16" else host
    memory = cuda.to_device(stored.reshape(-1))
    device = admit(memory)
    return DeviceArray(device.pointer, array.shape, None, array.dtype, memory, device.stream)


def to_host(array: DeviceArray, out: np.ndarray | None = None) -> np.ndarray:
    """Wait for the device and copy `array` into `out`, a NumPy array of its shape, or a new one.

    What lies between the elements of an array with gaps is copied with them.
    """
    if out is None:
        out = np.empty(array.shape, array.dtype)
    if array.size == 0:
        return out
    if SIMULATOR:
        out[...] = array.as_numpy().view(array.dtype)
        return out
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    before = -sum(r for r in reach if r < 0)  # bytes from the lowest address to the first element
    size = before + sum(r for r in reach if r > 0) + array.dtype.itemsize
    run = DeviceArray(array.pointer - before, (size,), None, np.uint8, array.owner, array.stream)
    host = _numba_array(run).copy_to_host(stream=_stream(array.stream))
    _synchronize(array.stream)
    out[...] = np.ndarray(array.shape, array.dtype, host, before, array.strides)
    return out


def _numba_array(array: DeviceArray) -> Any:
    """A contiguous `array` as one of numba-cuda, which copies it."""
    interface = {
        "data": (array.pointer, False),
        "shape": array.shape,
        "strides": None,
        "typestr": array.stored_dtype.str,
        "version": 3,
    }
    return cuda.from_cuda_array_interface(interface, owner=array.owner, sync=False)


def upload(*arrays: np.ndarray) -> tuple[DeviceArray, ...]:
    """Copy small tables to the device, to be kept and read from any stream: it waits until they are there."""
    tables = tuple(to_device(array) for array in arrays)
    _synchronize(0)
    for table in tables:
        table.stream = -1  # of no stream: no launch has to wait
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Labels out of range
# ---------------------------------------------------------------------------------------------------------------------

NO_POSITION = np.iinfo(np.int64).max
_bad_label_records: dict[int, DeviceArray] = {}  # by device


def bad_label_record() -> DeviceArray:
    """One int64 of the current device: the lowest position at which a kernel met a label out of range.

    One for all streams, and kept for good: a call inside a CUDA graph, on a stream of its own, allocates nothing and
    writes to what later calls look at.
    """
    device = current_device()
    if device not in _bad_label_records:
        _bad_label_records.setdefault(device, upload(np.array([NO_POSITION]))[0])
    return _bad_label_records[device]


def take_bad_label(stream: int) -> int | None:
    """Wait for `stream`; return the position in the current device's record, which is cleared, or None."""
    record = _bad_label_records.get(current_device())
    if record is None:
        return None
    record = DeviceArray(record.pointer, (1,), None, record.dtype, record.owner, stream)
    position = int(to_host(record)[0])
    if position == NO_POSITION:
        return None
    if SIMULATOR:
        record.as_numpy()[0] = NO_POSITION
    else:
        _numba_array(record).copy_to_device(np.array([NO_POSITION]), stream=_stream(stream))
    return position


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def _stream(handle: int) -> Any:
    return cuda.external_stream(handle) if handle else 0


def _synchronize(handle: int) -> None:
    if not SIMULATOR:
        (_stream(handle) or cuda.default_stream()).synchronize()


def _order(first: int, then: int) -> None:
    """Make the stream `then` wait for what the stream `first` has been given so far; the host does not wait."""
    if first != then and not SIMULATOR:
        event = cuda.event(timing=False)
        event.record(_stream(first))
        event.wait(_stream(then))


def _blocks(elements: int) -> int:
    if SIMULATOR:
        return SIMULATED_GRID
    most = BLOCKS_PER_MULTIPROCESSOR * cuda.get_current_device().MULTIPROCESSOR_COUNT
    return max(MIN_BLOCKS, min(-(-elements // THREADS), most))


def launch(kernel: Any, elements: int, *arguments: Any) -> None:
    """Run a grid-stride `kernel` over `elements` results, on the stream of its first array that has one.

    The arrays may come from libraries that work on different streams: the launch then waits, on the device, for the
    other streams, and they for the launch.
    """
    if elements == 0:
        return
    if SIMULATOR:
        _simulate(kernel, arguments)
        return
    with _ordered(arguments) as stream:
        kernel[_blocks(elements), THREADS, stream](*arguments)


def has_engine() -> bool:
    """Can the kernels run here that need a block's shared memory, asynchronous copies and the like (sm_80)?"""
    return not SIMULATOR and cuda.get_current_device().compute_capability >= (8, 0)


def launch_blocks(kernel: Any, grid: int | tuple[int, ...], *arguments: Any) -> None:
    """Run a `jit.BlockKernel` as a grid of blocks of its own size, with streams as in `launch`."""
    with _ordered(arguments) as stream:
        kernel.compiled[grid, kernel.threads, stream](*arguments)


@contextlib.contextmanager
def _ordered(arguments: Sequence[Any]) -> Iterator[Any]:
    """The stream to launch on; the streams of the other arguments come before, and after."""
    streams = [a.stream for a in arguments if isinstance(a, DeviceArray) and a.stream >= 0]
    stream = streams[0] if streams else 0
    others = sorted(set(streams) - {stream})
    for other in others:
        _order(other, stream)
    yield _stream(stream)
    for other in others:
        _order(stream, other)


def _simulate(kernel: Any, arguments: Sequence[Any]) -> None:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    def view(argument: Any) -> Any:
        if isinstance(argument, DeviceArray):
            return FakeCUDAArray(argument.as_numpy())
        return tuple(map(view, argument)) if isinstance(argument, tuple) else argument

    with _simulator_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy scalars: a GPU does not warn of inf - inf either
        kernel[SIMULATED_GRID, SIMULATED_THREADS](*map(view, arguments))
