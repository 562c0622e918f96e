"""Running an operation as many independent tasks on the threads.

An operation is a *body* (task, worker, parameters) compiled once per floating-point type as a C function, and one of
the two drivers of the whole package calls it for every task: parallel or serial. This split is a matter of compile
time: Numba compiles the body of a `prange` loop several times over (16 s for the forward convolution as a prange, 2 s
as a C function). Bodies get all their numbers from an array of int64 parameters, allocate nothing, and use the
scratch memory of their worker. Threads take tasks as they become free, so a slow thread takes fewer: the result of a
task must not depend on its worker, nor on other tasks.

Work that needs the results of other work first (a product of weights that are packed for it) is a later *stage* of the
same call: threads are woken once, and a thread that finds the last task of a stage taken waits no longer than that one
task takes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import threads
from .compiler import BodyCompiler
from .jit import REAL, compiled, kernel
from .records import Integer, Record, RecordPointer, field, record_at
from .vector.memory import fetch_add


class Header(Record):
    """What every body's parameters begin with, filled by `run_stages`."""

    counter: Integer
    from_front: Integer
    from_back: Integer
    done: Integer
    scratch: Integer
    scratch_bytes: Integer
    body: Integer
    tasks: Integer
    waits: Integer
    next: Integer


_NO_HEADER = (0,) * len(Header.fields)


class Parameters(Record):
    """Those of a body: a subclass names the rest."""

    header: Header

    @classmethod
    def of(cls, **values: Any) -> np.ndarray:
        return super().of(header=_NO_HEADER, **values)


# Below this, about 25 us of one core, a parallel call costs more than it saves. An empty one takes 2 us on tbb, but a
# thread that has slept begins its first task 5 to 10 us later (70 us on omp), and with a cache of other data.
SERIAL_FLOPS = 1_000_000

_MOST_KEPT = 64 * 1024 * 1024  # bytes of packed weights; the largest layer of VGG-16 has 36 MiB of them for Winograd

_local = threading.local()


_header = record_at(Header)


@intrinsic
def call(typingctx, body, task, worker, parameters):
    """Call the compiled body at address `body`; `parameters` is an address too."""

    def codegen(context, builder, sig, args):
        i64, i8 = ir.IntType(64), ir.IntType(8)
        function = ir.FunctionType(ir.VoidType(), [i64, i64, i64.as_pointer(), i8.as_pointer()]).as_pointer()
        real = ir.Constant(i8.as_pointer(), None)
        parameters = builder.inttoptr(args[3], i64.as_pointer())
        builder.call(builder.inttoptr(args[0], function), [args[1], args[2], parameters, real])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def call_with(typingctx, body, arguments):
    """Call the compiled body at address `body` with the integers and pointers of the tuple as its parameters.

    A part of a body that not every call needs, or that several bodies have, is compiled once, when it is first needed,
    as a body that is reached by its address. (Task and worker are 0.)
    """
    kinds = list(arguments)

    def codegen(context, builder, sig, args):
        i64 = ir.IntType(64)
        memory = cgutils.alloca_once(builder, ir.ArrayType(i64, len(kinds)))
        first = builder.bitcast(memory, i64.as_pointer())
        for n, kind in enumerate(kinds):
            value = builder.extract_value(args[1], n)
            if isinstance(kind, types.CPointer | RecordPointer):
                value = builder.ptrtoint(value, i64)
            else:
                value = context.cast(builder, value, kind, types.int64)
            builder.store(value, builder.gep(first, [ir.Constant(i64, n)]))
        zero, real = ir.Constant(i64, 0), ir.Constant(ir.IntType(8).as_pointer(), None)
        function = ir.FunctionType(ir.VoidType(), [i64, i64, first.type, real.type]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [zero, zero, first, real])
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@intrinsic
def _finish(typingctx, counter):
    """Add one to the integer at `counter`, after everything this thread has written."""

    def codegen(context, builder, sig, args):
        builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "release")
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64)), codegen


@intrinsic
def _finished(typingctx, counter):
    """The integer at `counter`, before anything this thread reads from now on."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(types.CPointer(types.int64)), codegen


# A thread that waits for another spins so often, some microseconds; after that the other may be waiting for its core.
_SPINS = 2000

if sys.platform == "win32":

    @numba.njit
    def _let_others_run():
        pass
else:
    _let_others_run = types.ExternalFunction("sched_yield", types.int32())


@kernel(lambda _: types.void(types.int64, types.int64))
def _drive(first, workers):
    """Run the stages whose parameters are at `first` and, from there, at `next`."""
    for worker in prange(workers):
        stage = first
        while stage != 0:
            p = _header(stage, 0.0)
            body, tasks = p.body, p.tasks
            task = fetch_add(field(p, "counter"), 1)
            if p.waits and task < tasks:
                # Whoever comes here has found every task of the stages before taken, so threads are at work on those
                # that are not done, and these wait for nothing.
                before = first
                for _ in range(p.waits):
                    q = _header(before, 0.0)
                    spins = 0
                    while _finished(field(q, "done")) < q.tasks:
                        spins += 1
                        if spins > _SPINS:
                            _let_others_run()
                    before = q.next
            while task < tasks:
                # Every other thread begins with the last task, so that each meets neighbouring tasks, whose data is in
                # its cache, and the same ones in the next call: weight gradients take 1 to 5 % less time (Zen 4).
                if worker % 2 == 0:
                    task = fetch_add(field(p, "from_front"), 1)
                else:
                    task = tasks - 1 - fetch_add(field(p, "from_back"), 1)
                call(body, task, np.int64(worker), stage)
                _finish(field(p, "done"))
                task = fetch_add(field(p, "counter"), 1)
            stage = p.next


class Body:
    """A task body, compiled on first use for each floating-point type: ``body.address(dtype)``.

    The function takes (task, worker, parameters, real): two integers, the pointer to the parameters, and a null
    pointer whose only use is its type, the floating-point type of the operation.
    """

    def __init__(self, function: Callable[..., None], record: type[Record]) -> None:
        self.__doc__ = function.__doc__
        self.function = function
        self.record = record

    @functools.cache  # noqa: B019 - bodies live as long as the module
    def address(self, dtype: np.dtype) -> int:
        """Address of the function for a floating-point type."""
        real = REAL[dtype]
        signature = types.void(types.int64, types.int64, RecordPointer(self.record, real), types.CPointer(real))
        self._compiled = getattr(self, "_compiled", [])  # the function must outlive its address
        self._compiled.append(compiled(numba.cfunc, signature, self.function, pipeline_class=BodyCompiler))
        return self._compiled[-1].address


def body(record: type[Record]) -> Callable[[Callable[..., None]], Body]:
    """Make a `Body` of a function whose parameters are such a record."""
    return lambda function: Body(function, record)


# Where an array object has the address of its data: the first field after the header of every Python object
# (`PyArrayObject_fields` in numpy/ndarraytypes.h, part of NumPy's stable ABI).
_DATA = object.__basicsize__
_integer_at = ctypes.c_ssize_t.from_address


def data_address(array: np.ndarray) -> int:
    """Address of the first element. (`__array_interface__` and `ctypes.data` say the same, but take 1 us to do so.)"""
    return _integer_at(id(array) + _DATA).value


def scratch_memory(size: int) -> int:
    """Address of `size` bytes of this Python thread's own scratch memory, aligned to a cache line."""
    kept, place = getattr(_local, "scratch", (0, 0))
    if kept < size:
        _local.scratch_buffer = buffer = np.empty(size + 64, np.uint8)
        place = -(-data_address(buffer) // 64) * 64
        _local.scratch = size, place
    return place


def workspace(elements: int, dtype: np.dtype, slot: int = 0) -> np.ndarray:
    """Memory for weights that are packed for one call, kept by this Python thread for the next call.

    Fresh memory costs a page fault every 4 KiB: half the time of packing 512 x 512 kernels. The memory is good until
    the thread asks for the same slot again.
    """
    kept = _local.__dict__.setdefault("workspaces", {})
    buffer = kept.get(slot)
    if buffer is None or buffer.dtype is not dtype or buffer.size < elements:
        size = elements * dtype.itemsize
        if size > _MOST_KEPT:
            return np.empty(elements, dtype)
        if buffer is None or buffer.nbytes < size:
            buffer = np.empty(size, np.uint8)
        buffer = kept[slot] = buffer.view(np.uint8)[: buffer.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
    return buffer[:elements]


# Work of one body: (body, number of tasks, parameters, bytes of scratch for each worker, flops, number of the first
# stages that must be done before it begins). `parameters` is a record of the body's, used by one call alone.
Stage = tuple[Body, int, np.ndarray, int, int, int]


def run(body: Body, dtype: np.dtype, tasks: int, parameters: np.ndarray, scratch: int, flops: int) -> None:
    """Call `body` for every task below `tasks`; see `Stage` for the arguments."""
    run_stages(dtype, ((body, tasks, parameters, scratch, flops, 0),))


def workers(flops: int) -> int:
    """How many threads so much work is worth, one of `get_num_threads` at most."""
    return threads.get_num_threads() if flops >= SERIAL_FLOPS and threads.parallel_allowed() else 1


def run_stages(dtype: np.dtype, stages: Sequence[Stage]) -> None:
    """Call the body of every stage for every task, on the threads that the work of all stages is worth."""
    most = work = scratch = 0
    for _, tasks, _, size, flops, _ in stages:
        most, work, scratch = max(most, tasks), work + flops, max(scratch, size)
    many = min(most, workers(work))
    scratch = -(-scratch // 64) * 64
    place = scratch_memory(scratch * many)
    following = 0
    for body, tasks, parameters, _, _, waits in reversed(stages):
        header = 0, 0, 0, 0, place, scratch, body.address(dtype), tasks, waits, following
        parameters["header"] = header
        following = data_address(parameters)
    drive: Any = _drive.compiled(None, many > 1)
    if many <= 1:
        drive(following, 1)
    else:
        with threads.exclusive():
            drive(following, many)
