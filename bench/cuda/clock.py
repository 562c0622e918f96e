"""The clock of the device, and what the device can do at most by it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from .. import results, timing
from ..peers import Unsupported
from .arrays import TF32, Library, Torch, allow_tf32


class Timer(Protocol):
    def host(self, call: Callable[[], Any], count: int) -> float: ...
    def device(self, call: Callable[[], Any], count: int, host: float) -> list[float]: ...


class CudaTimer:
    """Times of the default stream, on which all of them work."""

    NAP = 100_000  # nanoseconds; the device sleeps between none and twice as long
    FLUSH_BYTES = 128 << 20  # more than any second-level cache has

    def __init__(self, cuda: Any = None) -> None:
        if cuda is None:
            from fastconv.cuda_kernels._cuda import cuda
        self.cuda = cuda
        self._source = cuda.device_array(self.FLUSH_BYTES, np.uint8)
        self._target = cuda.device_array(self.FLUSH_BYTES, np.uint8)
        self._sleep = cuda.jit(sleep_kernel(cuda))

    def host(self, call: Callable[[], Any], count: int) -> float:
        """Seconds in which the host gets rid of a call: what it costs to launch."""
        self.cuda.synchronize()
        seconds = timing.seconds_of(call, count)
        self.cuda.synchronize()
        return seconds

    def device(self, call: Callable[[], Any], count: int, host: float) -> list[float]:
        """Seconds of the device for each of some calls, of which one takes the host about `host` seconds."""
        events = [(self.cuda.event(), self.cuda.event()) for _ in range(count)]
        naps = math.ceil(2 * count * (host + 100e-6) / (1e-9 * self.NAP))
        with _without_warnings():
            self._sleep[1, 1](naps)
        for before, after in events:
            self._target.copy_to_device(self._source)
            before.record()
            call()
            after.record()
        events[-1][1].synchronize()
        return [1e-3 * self.cuda.event_elapsed_time(*pair) for pair in events]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """A launch of one block is on purpose."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copy_rate(timer: Timer) -> float:
    """GB/s of a copy of 1 GiB, bytes read and written."""
    cuda = timer.cuda  # type: ignore[attr-defined]
    size = 1 << 30
    source, target = (cuda.device_array(size, np.uint8) for _ in range(2))
    return 2 * size / min(timer.device(lambda: target.copy_to_device(source), 10, 1e-4)) / 1e9


CHAINS, LINKS, REPEATS = 8, 8, 512  # multiply-adds of a thread that do not wait for each other, in a row, and how often


def sleep_kernel(cuda: Any) -> Callable[..., None]:
    def sleep(naps):
        for _ in range(naps):
            cuda.nanosleep(np.uint32(CudaTimer.NAP))

    return sleep


def multiply_add_kernel(cuda: Any, dtype: str) -> Callable[..., None]:
    import numba

    number, kind = np.dtype(dtype).type, numba.from_dtype(np.dtype(dtype))

    def chains(out, a, b):
        sums = cuda.local.array(CHAINS, kind)
        for i in range(CHAINS):
            sums[i] = a * number(i + cuda.threadIdx.x)
        for _ in range(REPEATS):
            for _ in range(LINKS):
                for i in range(CHAINS):
                    sums[i] = sums[i] * a + b
        total = sums[0]
        for i in range(1, CHAINS):
            total += sums[i]
        if total == b:  # never, but the compiler does not know
            out[0] = total

    return chains


def multiply_add_rate(timer: Timer, dtype: str) -> float:
    """GFLOP/s of multiply-adds in registers, with 2048 threads on each multiprocessor."""
    cuda = timer.cuda  # type: ignore[attr-defined]
    number = np.dtype(dtype).type
    kernel = cuda.jit(multiply_add_kernel(cuda, dtype))
    threads, blocks = 256, 64 * cuda.get_current_device().MULTIPROCESSOR_COUNT
    out = cuda.device_array(1, number)
    call = lambda: kernel[blocks, threads](out, number(0.999), number(0.5))  # noqa: E731
    call()
    return 2 * CHAINS * LINKS * REPEATS * threads * blocks / min(timer.device(call, 5, 1e-4)) / 1e9


def matrix_rate(timer: Timer, dtype: str, arrays: Library, size: int = 8192) -> float:
    """GFLOP/s of torch's product of two matrices, of normal numbers."""
    if not isinstance(arrays, Torch):
        raise Unsupported("needs torch")
    allow_tf32(arrays.torch, dtype == TF32)
    a, b = (arrays.normal((size, size), dtype, 1.0, seed) for seed in range(2))
    out = arrays.empty((size, size), dtype)
    call = lambda: arrays.torch.matmul(a, b, out=out)  # noqa: E731
    call()
    return 2 * size**3 / min(timer.device(call, 5, 1e-4)) / 1e9


def peaks(timer: Timer, arrays: Library, dtypes: Iterable[str], tell: Callable[[str], object]) -> dict[str, float]:
    """What this device can do at most: "copy" in GB/s, and GFLOP/s by arithmetic, those that can be measured."""
    found: dict[str, float] = {}
    jobs: dict[str, Callable[[], float]] = {"copy": lambda: copy_rate(timer)}
    for dtype in dtypes:
        if dtype in ("float32", "float64"):
            jobs[dtype] = lambda dtype=dtype: multiply_add_rate(timer, dtype)  # type: ignore[misc]
        else:
            jobs[dtype] = lambda dtype=dtype: matrix_rate(timer, dtype, arrays)  # type: ignore[misc]
    for name, job in jobs.items():
        try:
            found[name] = job()
            tell(f"peak {name}: {found[name]:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}")
        except Exception as error:  # a peak that cannot be measured leaves its percentages out, and no more
            tell(f"peak {name}: not measured ({results.note_of(error)})")
    return found
