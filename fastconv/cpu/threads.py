"""Threads: which layer runs Numba's parallel loops, how many threads it may use, and when it must not be used at all.

Numba picks the first of its layers that loads: tbb, omp, workqueue. Only tbb survives what users do with a library:

    tbb        calls from several Python threads and from forked children both work
    omp        a forked child is killed ("fork() called from a process already using GNU OpenMP")
    workqueue  two Python threads that call at once abort the process

So tbb is a dependency where it has a wheel, and is loaded here before Numba asks for it: Numba does not find the
libtbb that pip puts into a virtual environment by itself. On the other layers the calls are made safe instead: one at
a time on workqueue, on one thread in a forked child on omp and workqueue.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import sys
import threading
from typing import Any

import numba

_LIBTBB = {"linux": "libtbb.so.12", "win32": "tbb12.dll", "darwin": "libtbb.12.dylib"}

_local = threading.local()
_workqueue_lock = threading.RLock()
_no_lock = contextlib.nullcontext()
_in_forked_child = False


def _libtbb_path() -> str | None:
    """Where pip put the TBB library, if it is installed in this environment."""
    name = _LIBTBB.get(sys.platform)
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name == name), None)


@functools.cache
def load_layer() -> str:
    """Start Numba's threads, on tbb if it can be had, and return the name of the layer."""
    path = _libtbb_path()
    if path is not None and numba.config.THREADING_LAYER in ("default", "tbb", "safe", "threadsafe", "forksafe"):
        with contextlib.suppress(OSError):  # a library of another platform: Numba takes its next layer
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    from numba.np.ufunc.parallel import _launch_threads

    _launch_threads()
    return numba.threading_layer()


def _note_fork() -> None:
    global _in_forked_child, _workqueue_lock
    _in_forked_child = load_layer.cache_info().currsize > 0 and load_layer() != "tbb"
    _workqueue_lock = threading.RLock()  # the parent's may have been held by a thread that does not exist here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def parallel_allowed() -> bool:
    """Whether a parallel loop may be started here.

    Not in a child forked under omp or workqueue. Nor, on workqueue, in a thread that Python did not start: it may be
    one of Numba's, running the user's own `prange` loop, and a loop inside a loop aborts the process there.
    """
    if _in_forked_child:
        return False
    return load_layer() != "workqueue" or not isinstance(threading.current_thread(), threading._DummyThread)


def exclusive() -> Any:
    """A context in which no other Python thread starts a parallel loop, where the layer needs that."""
    return _workqueue_lock if load_layer() == "workqueue" else _no_lock


def set_num_threads(n: int) -> None:
    load_layer()
    mask = min(n, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(mask)
    _local.asked = (n, mask)


def get_num_threads() -> int:
    load_layer()  # before Numba starts its threads by itself to answer
    n, mask = getattr(_local, "asked", (0, 0))
    now = _numba_threads()()
    return n if now == mask else now


@functools.cache
def _numba_threads() -> Any:
    """The function of the threading layer behind `numba.get_num_threads`, which makes sure each time that it runs."""
    from numba.np.ufunc.parallel import _get_num_threads

    return _get_num_threads
