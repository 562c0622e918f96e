"""Running an operation as many independent tasks on the threads.

An operation is a *body* (task, worker, parameters) compiled once per floating-point type as a C function, and one of
the two drivers of the whole package calls it for every task: parallel or serial. This split is a matter of compile
time: Numba compiles the body of a `prange` loop several times over (16 s for the forward convolution as a prange, 2 to
3 s as a C function). Bodies get all their numbers from an array of int64 parameters, allocate nothing, and use the
scratch memory of their worker. Threads take tasks as they become free, so a slow thread takes fewer: the result of a
task must not depend on its worker, nor on other tasks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from . import simd, threads
from .jit import REAL, compiled, kernel

# Parameters that every body shares. The others begin at FIRST.
COUNTER, SCRATCH, SCRATCH_BYTES, FIRST = range(4)

# Below this a parallel call (2 to 3 us on tbb, 70 us on a sleeping omp) costs more than it saves.
SERIAL_FLOPS = 1_000_000

_MOST_KEPT = 64 * 1024 * 1024  # bytes of packed weights; the largest layer of VGG-16 has 36 MiB of them for Winograd

_local = threading.local()


@intrinsic
def _integers(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def _call(typingctx, body, task, worker, parameters):
    """Call the C function at address `body`."""

    def codegen(context, builder, sig, args):
        i64, i8 = ir.IntType(64), ir.IntType(8)
        function = ir.FunctionType(ir.VoidType(), [i64, i64, i64.as_pointer(), i8.as_pointer()]).as_pointer()
        real = ir.Constant(i8.as_pointer(), None)
        parameters = builder.inttoptr(args[3], i64.as_pointer())
        builder.call(builder.inttoptr(args[0], function), [args[1], args[2], parameters, real])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@kernel(lambda _: types.void(*[types.int64] * 4))
def _drive(body, tasks, workers, parameters):
    for worker in prange(workers):
        task = simd.fetch_add(_integers(parameters), 1)  # parameters[COUNTER]
        while task < tasks:
            _call(body, task, np.int64(worker), parameters)
            task = simd.fetch_add(_integers(parameters), 1)


class Body:
    """A task body, compiled on first use for each floating-point type: ``body.address(dtype)``.

    The function takes (task, worker, parameters, real): two integers, the pointer to the parameters, and a null
    pointer whose only use is its type, the floating-point type of the operation.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.__doc__ = function.__doc__
        self.function = function

    @functools.cache  # noqa: B019 - bodies live as long as the module
    def address(self, dtype: np.dtype) -> int:
        signature = types.void(types.int64, types.int64, types.CPointer(types.int64), types.CPointer(REAL[dtype]))
        self._compiled = getattr(self, "_compiled", [])  # the function must outlive its address
        self._compiled.append(compiled(numba.cfunc, signature, self.function))
        return self._compiled[-1].address


def _scratch(size: int) -> int:
    """Address of `size` bytes of this Python thread's own scratch memory, aligned to a cache line."""
    kept, address = getattr(_local, "scratch", (0, 0))
    if kept < size:
        _local.scratch_buffer = buffer = np.empty(size + 64, np.uint8)
        address = -(-buffer.__array_interface__["data"][0] // 64) * 64  # kept, because asking for it takes 1 us
        _local.scratch = size, address
    return address


def workspace(elements: int, dtype: np.dtype, slot: int = 0) -> np.ndarray:
    """Memory for weights that are packed for one call, kept by this Python thread for the next call.

    Fresh memory costs a page fault every 4 KiB: half the time of packing 512 x 512 kernels. The memory is good until
    the thread asks for the same slot again.
    """
    kept = _local.__dict__.setdefault("workspaces", {})
    buffer = kept.get(slot)
    size = elements * dtype.itemsize
    if buffer is None or buffer.nbytes < size:
        if size > _MOST_KEPT:
            return np.empty(elements, dtype)
        buffer = kept[slot] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype)


def run(body: Body, dtype: np.dtype, tasks: int, parameters: np.ndarray, scratch: int, flops: int) -> None:
    """Call `body` for every task below `tasks`.

    `parameters` is an int64 array with FIRST free places at its beginning, used by this call alone; `scratch` is in
    bytes, for each worker; `flops`, the work of the whole call, decides whether it is worth waking threads.
    """
    address = body.address(dtype)
    serial = flops < SERIAL_FLOPS or tasks == 1 or not threads.parallel_allowed()
    workers = 1 if serial else min(tasks, threads.get_num_threads())
    scratch = -(-scratch // 64) * 64
    parameters[COUNTER] = 0
    parameters[SCRATCH] = _scratch(scratch * workers)
    parameters[SCRATCH_BYTES] = scratch
    drive: Any = _drive.compiled(parallel=workers > 1)
    where = parameters.__array_interface__["data"][0]
    if workers == 1:
        drive(address, tasks, 1, where)
    else:
        with threads.exclusive():
            drive(address, tasks, workers, where)
