"""Arrays against pages of memory that may not be touched: a kernel that reads or writes beyond them ends the process.

For processes of their own, on Linux.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
from collections.abc import Iterator, Sequence

import numpy as np

from helpers import VIEWS


def guarded(array: np.ndarray, at_end: bool) -> np.ndarray:
    """The same values and strides, with a closed page before the memory and one behind it: behind the last element, or
    with `at_end` false before the first one."""
    faulthandler.enable()
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    order = np.argsort([-abs(step) for step in array.strides], kind="stable")
    flip = tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)
    packed = np.ascontiguousarray(array[flip].transpose(order))
    pages = -(-packed.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first = page + (pages * page - packed.nbytes if at_end else 0)
    copy = np.frombuffer(memory, packed.dtype, packed.size, first).reshape(packed.shape)
    copy[...] = packed
    for closed in (base, base + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0) == 0
    return copy.transpose(np.argsort(order))[flip]


def seen(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Every array at the beginning and at the end of its memory, in three orders of its axes."""
    for view in (lambda a: a, VIEWS["reversed"], VIEWS["channels_last_memory"]):
        for at_end in (False, True):
            yield [guarded(view(a), at_end) if a.ndim else a for a in arrays]
