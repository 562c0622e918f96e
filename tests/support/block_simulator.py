"""Run a CUDA kernel's Python source block by block, with what Numba's simulator lacks, and find its races.

Every CUDA thread is a greenlet, so a schedule is deterministic: the order in which the threads of a block run between
two barriers. The simulator knows warp shuffles and votes, the project's instructions
(`fastconv.cuda_kernels.intrinsics`, by their emulations) and asynchronous copies. It raises `SimulationError` for

- an index out of bounds (negative ones too: a GPU does not wrap them around) and a misaligned vector access;
- a shared element that two threads touch, one of them writing, with no barrier in between, whatever the schedule;
- threads of a block that wait at different barriers, or threads of a warp that meet different instructions.

Of the atomic operations it knows the minimum in global memory.

Shared and local memory begins as nan (integers: all bits set, a nan in every floating-point format), so that what was
never written shows. It does not model rounding inside the tensor cores, Numba's integer types or time. Unlike Numba's
simulator it needs no environment variable: a process can simulate a kernel and compile it.
"""

from __future__ import annotations

import itertools
import random
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import greenlet
import numpy as np

from fastconv.cuda_kernels import intrinsics
from fastconv.cuda_kernels._cuda import cuda

WARP = 32

ORDERS = ("forward", "reverse", "shuffled", "skewed")
LANDINGS = ("late", "early")
# An asynchronous copy may land at any time between its issue and the wait for it: at both ends.
SCHEDULES = [(order, landing) for order in ORDERS for landing in LANDINGS]


class SimulationError(RuntimeError):
    """The kernel did what has no defined result on a GPU."""


class Dim3:
    __slots__ = ("x", "y", "z")

    def __init__(self, sizes: int | Sequence[int]) -> None:
        self.x, self.y, self.z = (*((sizes,) if isinstance(sizes, int) else sizes), 1, 1)[:3]


def _numpy_dtype(dtype: Any) -> np.dtype:
    return np.dtype(getattr(dtype, "name", dtype))


def _poisoned(shape: Any, dtype: Any) -> np.ndarray:
    array = np.empty(shape, _numpy_dtype(dtype))
    array.fill(np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max if array.dtype.kind == "u" else -1)
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


class Memory:
    """An array as a kernel sees it: bounds checked, no negative indices, vectors aligned to their own size.

    A vector is aligned in its array and in memory, where no more than 16 bytes are asked for.
    """

    __slots__ = ("address", "array", "dtype", "name", "shape", "size")

    def __init__(self, array: np.ndarray, name: str = "global memory") -> None:
        self.array = array
        self.dtype, self.shape, self.size = array.dtype, array.shape, array.size
        self.name = name
        self.address = array.__array_interface__["data"][0]

    def _check(self, index: Any) -> None:
        places, shape = index if isinstance(index, tuple) else (index,), self.shape
        if len(places) == len(shape):
            for i, n in zip(places, shape):  # noqa: B905 - `strict` costs as much as the rest
                if not 0 <= i < n:
                    break
            else:
                return
        raise SimulationError(f"{self.name}: index {index} is out of bounds of {shape}")

    def __getitem__(self, index: Any) -> Any:
        self._check(index)
        return self.array[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._check(index)
        self.array[index] = value

    def _vector(self, start: int, count: int) -> None:
        if self.array.ndim != 1:
            raise SimulationError(f"{self.name}: a vector access to an array of {self.array.ndim} dimensions")
        size = self.dtype.itemsize
        if start % count or (self.address + start * size) % min(16, count * size):
            raise SimulationError(f"{self.name}: misaligned access to {count} elements at {start}")
        if not 0 <= start <= self.size - count:
            raise SimulationError(f"{self.name}: {count} elements at {start} are out of bounds of {self.size}")

    def read(self, start: int, count: int) -> np.ndarray:
        self._vector(start, count)
        return self.array[start : start + count].copy()

    def write(self, start: int, values: Sequence[Any] | np.ndarray) -> None:
        self._vector(start, len(values))
        self.array[start : start + len(values)] = values


class SharedMemory(Memory):
    """Shared memory that knows who touched each element since the last barrier.

    A barrier of the block orders everything before it. What another lane of the same warp did is also ordered by a
    barrier or a collective of the warp: a clock counts those of each warp.
    """

    __slots__ = ("barriers", "block", "readers", "under_way", "writers")

    def __init__(self, array: np.ndarray, block: Block) -> None:
        super().__init__(array, "shared memory")
        self.block = block
        self.barriers = block.barriers  # those of the block before what the following two have seen
        self.writers: dict[int, tuple[int, int]] = {}  # element -> thread and its warp's clock
        self.readers: dict[int, dict[int, int]] = {}  # element -> the same of several threads
        self.under_way: Counter[int] = Counter()  # asynchronous copies into each element that nobody has waited for

    def _now(self) -> tuple[int, int]:
        """The thread that runs, and the clock of its warp."""
        block, rank = self.block, greenlet.getcurrent().rank
        if self.barriers != block.barriers:
            self.barriers = block.barriers
            self.writers.clear()
            self.readers.clear()
        return rank, block.warp_barriers[rank // WARP]

    def _race(self, rank: int, what: str, element: int, thread: int) -> SimulationError:
        return SimulationError(
            f"shared memory: race at element {element}: thread {rank} {what} thread {thread} "
            "with no barrier in between"
        )

    def _landed(self, elements: range) -> None:
        for element in elements:
            if self.under_way.get(element):
                raise SimulationError(
                    f"shared memory: element {element} is used while an asynchronous copy is under way"
                )

    def issue(self, start: int, count: int) -> None:
        """A copy into these elements begins: it may land at once, over what is still in use."""
        self._vector(start, count)
        self._note_writes(range(start, start + count))
        self.under_way.update(range(start, start + count))

    def land(self, start: int, values: np.ndarray) -> None:
        """The thread that issued the copy has waited for it."""
        self.under_way.subtract(range(start, start + len(values)))
        self.write(start, values)

    def _note_reads(self, elements: range) -> None:
        if self.under_way:
            self._landed(elements)
        rank, clock = self._now()
        writers, readers = self.writers, self.readers
        for element in elements:
            writer = writers.get(element)
            if writer is not None:
                thread, then = writer
                if thread != rank and (thread // WARP != rank // WARP or then >= clock):
                    raise self._race(rank, "reads what was written by", element, thread)
            seen = readers.get(element)
            if seen is None:
                readers[element] = {rank: clock}
            else:
                seen[rank] = clock

    def _note_writes(self, elements: range) -> None:
        if self.under_way:
            self._landed(elements)
        rank, clock = self._now()
        writers, readers = self.writers, self.readers
        for element in elements:
            writer = writers.get(element)
            if writer is not None:
                thread, then = writer
                if thread != rank and (thread // WARP != rank // WARP or then >= clock):
                    raise self._race(rank, "writes over", element, thread)
            seen = readers.pop(element, None)
            if seen is not None:
                for thread, then in seen.items():
                    if thread != rank and (thread // WARP != rank // WARP or then >= clock):
                        raise self._race(rank, "writes what is still read by", element, thread)
            writers[element] = rank, clock

    def _flat(self, index: Any) -> range:
        element = int(np.ravel_multi_index(index, self.shape)) if isinstance(index, tuple) else int(index)
        return range(element, element + 1)

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        self._note_reads(self._flat(index))
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._note_writes(self._flat(index))

    def read(self, start: int, count: int) -> np.ndarray:
        values = super().read(start, count)
        self._note_reads(range(start, start + count))
        return values

    def write(self, start: int, values: Sequence[Any] | np.ndarray) -> None:
        super().write(start, values)
        self._note_writes(range(start, start + len(values)))


# ---------------------------------------------------------------------------------------------------------------------
# A block
# ---------------------------------------------------------------------------------------------------------------------


class Thread(greenlet.greenlet):
    """One CUDA thread: where it is, what it waits for, and its asynchronous copies that have not landed."""

    def __init__(self, run: Callable[[], Any], rank: int, index: Dim3) -> None:
        super().__init__(run)
        self.rank, self.index = rank, index
        self.waits: tuple[Any, ...] = ("start",)
        self.answer: Any = None
        self.given: Any = None
        self.shared_arrays = 0
        self.issued: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []


class Block:
    """The threads of one block, run in turns until all have returned."""

    def __init__(self, simulator: BlockSimulator, kernel: Callable[..., None], index: Dim3, arguments: tuple) -> None:
        self.simulator, self.index = simulator, index
        self.barriers = 0
        self.shared: list[SharedMemory] = []
        size = simulator.block_size
        self.main = greenlet.getcurrent()
        indices = ((x, y, z) for z in range(size.z) for y in range(size.y) for x in range(size.x))
        self.threads = [Thread(lambda: kernel(*arguments), rank, Dim3(i)) for rank, i in enumerate(indices)]
        self.warp_barriers = [0] * -(-len(self.threads) // WARP)

    def wait(self, *what: Any) -> Any:
        thread = greenlet.getcurrent()
        thread.waits = what
        return self.main.switch()

    def _turn(self, thread: Thread) -> None:
        thread.switch(thread.answer) if thread else thread.switch()
        if thread.dead:
            thread.waits = ("end",)
            if thread.issued or any(thread.groups):
                raise SimulationError(f"thread {thread.rank} returned with asynchronous copies under way")

    def run(self) -> None:
        ready = list(self.threads)
        while ready:
            for thread in self.simulator.turn_order(ready):
                self._turn(thread)
            ready = list(self._released())

    def _released(self) -> Iterator[Thread]:
        """The threads that can go on: a warp that has met one collective, or all threads at one barrier."""
        released = False
        for warp in range(len(self.warp_barriers)):
            lanes = self.threads[warp * WARP : (warp + 1) * WARP]
            if all(lane.waits[0] == "warp" for lane in lanes):
                names = {lane.waits[1] for lane in lanes}
                if len(names) > 1 or len(lanes) < WARP:
                    raise SimulationError(f"warp {warp}: {len(lanes)} lanes meet {sorted(names)}")
                self.warp_barriers[warp] += 1
                for lane, answer in zip(lanes, lanes[0].waits[2]([lane.given for lane in lanes]), strict=True):
                    lane.answer, lane.waits = answer, ("start",)
                released = True
                yield from lanes
            elif any(lane.waits[0] == "start" for lane in lanes):
                released = True
                yield from (lane for lane in lanes if lane.waits[0] == "start")
        if released:
            return
        waiting = Counter(thread.waits[:2] for thread in self.threads)
        if set(waiting) == {("barrier",)}:
            self.barriers += 1
            for thread in self.threads:
                thread.answer, thread.waits = None, ("start",)
            yield from self.threads
        elif set(waiting) != {("end",)}:
            raise SimulationError(f"the threads of a block wait for different things: {dict(waiting)}")


# ---------------------------------------------------------------------------------------------------------------------
# What stands in the place of `numba.cuda`
# ---------------------------------------------------------------------------------------------------------------------


class BlockSimulator:
    """Runs kernels: ``BlockSimulator(order, landing).launch(kernel, grid, block, *arguments)``.

    NumPy arrays among the arguments are global memory and changed in place. A kernel is a Python function, or what
    ``cuda.jit`` made of one.
    """

    def __init__(self, order: str = "forward", landing: str = "late", seed: int = 0) -> None:
        if order not in ORDERS or landing not in LANDINGS:
            raise ValueError(f"BlockSimulator: no schedule {order!r}, {landing!r}")
        self.order, self.landing = order, landing
        self.random = random.Random(seed)
        self.shared = types.SimpleNamespace(array=self._shared_array)
        self.local = types.SimpleNamespace(array=lambda shape, dtype: _poisoned(shape, dtype))
        self.atomic = types.SimpleNamespace(min=self._atomic_min)

    # -- launches

    def launch(self, kernel: Any, grid: int | Sequence[int], block: int | Sequence[int], *arguments: Any) -> None:
        function = self._bound(_python_function(kernel), {})
        memory = tuple(Memory(a) if isinstance(a, np.ndarray) else a for a in arguments)
        self.grid_size, self.block_size = Dim3(grid), Dim3(block)
        blocks = itertools.product(*map(range, (self.grid_size.z, self.grid_size.y, self.grid_size.x)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy scalars: a GPU does not warn of inf - inf either
            for z, y, x in blocks:
                self.block = Block(self, function, Dim3((x, y, z)), memory)
                self.block.run()

    def turn_order(self, ready: list[Thread]) -> list[Thread]:
        if self.order == "reverse":
            return ready[::-1]
        if self.order == "shuffled":
            self.random.shuffle(ready)
        if self.order == "skewed":  # one warp runs as far ahead as the barriers let it
            first = min(thread.rank // WARP for thread in ready)
            return [thread for thread in ready if thread.rank // WARP == first]
        return ready

    def _bound(self, function: types.FunctionType, known: dict[Any, Any]) -> types.FunctionType:
        """A copy of `function` in which CUDA and the project's instructions are those of this simulator."""
        if function in known:
            return known[function]
        scope = dict(function.__globals__)
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        bound = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
        known[function] = bound
        for name in function.__code__.co_names:
            if name in scope:
                scope[name] = self._replaced(scope[name], known)
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            cell.cell_contents = self._replaced(original.cell_contents, known)
        return bound

    def _replaced(self, value: Any, known: dict[Any, Any]) -> Any:
        if value is cuda:
            return self
        emulation = intrinsics.emulation_of(value)
        if emulation is not None:
            return types.MethodType(emulation, self)
        function = _python_function(value)
        if isinstance(function, types.FunctionType) and (function is not value or _is_ours(function)):
            return self._bound(function, known)
        return value

    # -- where a thread is

    @property
    def thread(self) -> Thread:
        return greenlet.getcurrent()

    threadIdx = property(lambda self: greenlet.getcurrent().index)
    blockIdx = property(lambda self: self.block.index)
    blockDim = property(lambda self: self.block_size)
    gridDim = property(lambda self: self.grid_size)
    laneid = property(lambda self: greenlet.getcurrent().rank % WARP)

    def grid(self, dimensions: int) -> int:
        if dimensions != 1:
            raise NotImplementedError("BlockSimulator.grid: one dimension only")
        return self.blockIdx.x * self.blockDim.x + self.threadIdx.x

    def gridsize(self, dimensions: int) -> int:
        if dimensions != 1:
            raise NotImplementedError("BlockSimulator.gridsize: one dimension only")
        return self.gridDim.x * self.blockDim.x

    # -- memory and barriers

    def _shared_array(self, shape: Any, dtype: Any, alignment: int | None = None) -> SharedMemory:
        """Each place in the source is one array of the block: the threads reach them in the same order."""
        thread, shared = self.thread, self.block.shared
        if thread.shared_arrays == len(shared):
            shared.append(SharedMemory(_poisoned(shape, dtype), self.block))
        thread.shared_arrays += 1
        return shared[thread.shared_arrays - 1]

    def _atomic_min(self, memory: Memory, index: Any, value: Any) -> Any:
        if isinstance(memory, SharedMemory):
            raise NotImplementedError("BlockSimulator.atomic.min: global memory only")
        old = memory[index]
        memory[index] = min(old, value)
        return old

    def syncthreads(self) -> None:
        self.block.wait("barrier")

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        self.collective("syncwarp", None, lambda given: given)

    def collective(self, name: str, given: Any, combine: Callable[[list], Sequence]) -> Any:
        """All lanes of the warp give something, and get each its own part of ``combine(list of 32)``."""
        self.thread.given = given
        return self.block.wait("warp", name, combine)

    def _shuffle(self, name: str, mask: int, value: Any, source: Callable[[int], int]) -> Any:
        if mask != 0xFFFFFFFF:
            raise NotImplementedError(f"BlockSimulator.{name}: full warps only")

        def combine(given: list) -> list:
            sources = [from_(lane) for lane, (_, from_) in enumerate(given)]
            return [given[s if 0 <= s < WARP else lane][0] for lane, s in enumerate(sources)]

        return self.collective(name, (value, source), combine)

    def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
        return self._shuffle("shfl_sync", mask, value, lambda lane: source % WARP)

    def shfl_xor_sync(self, mask: int, value: Any, bits: int) -> Any:
        return self._shuffle("shfl_xor_sync", mask, value, lambda lane: lane ^ bits)

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        return self._shuffle("shfl_down_sync", mask, value, lambda lane: lane + delta)

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        return self._shuffle("shfl_up_sync", mask, value, lambda lane: lane - delta)

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        return self.collective(
            "ballot_sync", bool(predicate), lambda given: [sum(b << i for i, b in enumerate(given))] * WARP
        )

    def any_sync(self, mask: int, predicate: Any) -> bool:
        return self.collective("any_sync", bool(predicate), lambda given: [any(given)] * WARP)

    def all_sync(self, mask: int, predicate: Any) -> bool:
        return self.collective("all_sync", bool(predicate), lambda given: [all(given)] * WARP)


def _python_function(value: Any) -> Any:
    """The Python function behind what ``cuda.jit`` made, by Numba's compiler or its simulator."""
    return getattr(value, "py_func", None) or getattr(value, "fn", None) or value


def _is_ours(function: types.FunctionType) -> bool:
    return function.__module__.startswith("fastconv.cuda_kernels") or "<locals>" in function.__qualname__
