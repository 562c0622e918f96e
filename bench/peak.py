"""What this machine can do at most, measured: multiply-adds from the L1 cache, and bytes through memory.

The arithmetic peak is the rate of fastconv's own microkernel on panels that stay in the L1 cache: no packing, no
memory. It is an upper bound for every convolution by multiplication here, and it moves with the clock of the machine,
so it is measured in the same minute as each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from fastconv.cpu import tasks, threads
from fastconv.cpu.records import Integer, Reals
from fastconv.cpu.vector import gemm
from fastconv.cpu.vector.memory import at, offset
from fastconv.cpu.vector.tile import tile as tile_of

from . import timing

# Half of the smallest L1 data cache in use (32 KiB), so that both panels and the tile of results stay.
PANEL_BYTES = 16 * 1024
# Long enough that a task (about 50 us) dwarfs the driver's 2 to 3 us, short enough to share evenly.
REPEATS = 200
# Four times the largest L3 of a desktop; a server with more shows its cache, not its memory.
COPY_BYTES = 256 << 20


class Products(tasks.Parameters):
    kernel: Integer  # address of the microkernel
    rows: Integer
    columns: Integer
    depth: Integer


class Copy(tasks.Parameters):
    source: Reals
    target: Reals
    length: Integer  # of a task


@tasks.body(Products)
def _contract_panels(task, worker, p, real):
    kernel, rows, columns, depth = p.kernel, p.rows, p.columns, p.depth
    a = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    panel = offset(a, depth * rows)
    c = offset(panel, depth * columns)
    for k in range(depth * rows):  # not zeros: on them a processor may draw less power and clock higher
        a[k] = 0.5 + 0.001 * k
    for k in range(depth * columns):
        panel[k] = 1.5 - 0.001 * k
    for _ in range(REPEATS):
        gemm.contract_packed(kernel, depth, a, panel, c, 0)


@tasks.body(Copy)
def _copy(task, worker, p, real):
    source, target = offset(p.source, task * p.length), offset(p.target, task * p.length)
    for i in range(p.length):
        target[i] = source[i]


def microkernel_rate(dtype: np.dtype | type = np.float32, seconds: float = 0.1) -> float:
    """GFLOP/s of the microkernel on all threads of `fastconv.get_num_threads()`: the best of some 10 ms runs.

    `dtype` is float32 or float64.

    >>> microkernel_rate(np.float32, seconds=0.01) > 1
    True
    """
    dtype = np.dtype(dtype)
    tile = tile_of(8 * dtype.itemsize)
    depth = PANEL_BYTES // (dtype.itemsize * (tile.rows + tile.columns))
    scratch = dtype.itemsize * (depth * (tile.rows + tile.columns) + tile.rows * tile.columns)
    flops = 2 * REPEATS * depth * tile.rows * tile.columns
    workers = threads.get_num_threads()
    p = Products.zeros()
    p.kernel = gemm.contract_packed.address(dtype, gemm.Rows(tile.rows, tile.vectors))
    p.rows, p.columns, p.depth = tile.rows, tile.columns, depth

    def run(count: int) -> list[float]:
        work = count * flops
        return [timing.seconds_of(lambda: tasks.run(_contract_panels, dtype, count, np.asarray(p), scratch, work))]

    count = 16 * workers
    run(count)  # compiles, and wakes the threads
    count = max(count, int(0.01 * count / run(count)[0]))
    return count * flops / _best(lambda: run(count), seconds) / 1e9


def copy_rate(seconds: float = 0.1) -> float:
    """GB/s of copying an array far larger than the caches on all threads, read and written bytes counted."""
    values, target = _copy_arrays()
    length = 1 << 16

    def run() -> list[float]:
        p = Copy.zeros()
        p.source, p.target, p.length = tasks.data_address(values), tasks.data_address(target), length
        count = values.size // length
        return [timing.seconds_of(lambda: tasks.run(_copy, values.dtype, count, np.asarray(p), 64, values.size))]

    run()
    return 2 * values.nbytes / _best(run, seconds) / 1e9


@functools.cache
def _copy_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Kept, for the system takes longer to hand out their pages than to copy them."""
    values = np.ones(COPY_BYTES // 4, np.float32)
    return values, np.zeros_like(values)


def _best(run: Callable[[], list[float]], seconds: float) -> float:
    """The fewest seconds of at least three runs, and of as many as `seconds` allow."""
    return min(timing.by_turns({"run": run}, seconds=seconds, least=3)["run"])


if __name__ == "__main__":
    for name in ("float32", "float64"):
        print(f"{name}: {microkernel_rate(name, 1.0):.1f} GFLOP/s on {threads.get_num_threads()} threads")
    print(f"copy: {copy_rate(1.0):.1f} GB/s")
