"""Groups of threads and the rows they read: vectors of 16 bytes, how a row divides into them, and reductions.

What the kernels of `softmax_rows` and `position_sums` have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ._cuda import DeviceArray, cuda
from .intrinsics import (
    load4,
    pack_bfloat16,
    pack_float16,
    store4,
    u32,
    unpack_bfloat16,
    unpack_float16,
)
from .jit import array_of, inlined

__all__ = [
    "GROUPS", "LONG", "SHORT", "VECTORS", "Group", "Vectors", "array_by_position", "group_for", "label_array",
    "over_group", "row_parts_of", "row_stride", "warp_max", "warp_sum",
]  # fmt: skip

ALL_LANES = 0xFFFFFFFF
BLOCK = 128  # threads of a block of several groups


# ---------------------------------------------------------------------------------------------------------------------
# Vectors of 16 bytes
# ---------------------------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """How 16 bytes of an element type are read into float32 registers, and written."""

    word: types.Type
    width: int
    load: Callable[..., None]  # (words, vector, registers, first register)
    store: Callable[..., None]


@inlined
def _load_float32(words, vector, registers, first):
    a = load4(words, np.uint64(vector * 4))
    for i in range(4):
        registers[first + i] = a[i]


@inlined
def _store_float32(words, vector, registers, first):
    store4(
        words, np.uint64(vector * 4), registers[first], registers[first + 1], registers[first + 2], registers[first + 3]
    )


def _halves(unpack: Any, pack: Any) -> Vectors:
    @inlined
    def load(words, vector, registers, first):
        a = load4(words, np.uint64(vector * 4))
        for i in range(4):
            pair = unpack(a[i])
            registers[first + 2 * i] = pair[0]
            registers[first + 2 * i + 1] = pair[1]

    @inlined
    def store(words, vector, registers, first):
        store4(
            words, np.uint64(vector * 4), pack(registers[first], registers[first + 1]),
            pack(registers[first + 2], registers[first + 3]), pack(registers[first + 4], registers[first + 5]),
            pack(registers[first + 6], registers[first + 7]),
        )  # fmt: skip

    return Vectors(types.uint32, 8, load, store)


VECTORS = {
    "float32": Vectors(types.float32, 4, _load_float32, _store_float32),
    "float16": _halves(unpack_float16, pack_float16),
    "bfloat16": _halves(unpack_bfloat16, pack_bfloat16),
}


# ---------------------------------------------------------------------------------------------------------------------
# Which group for which row
# ---------------------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """`threads` per row (a warp or a block), each holding `vectors` of it in registers; 0: the row is read twice."""

    threads: int
    vectors: int

    @property
    def block(self) -> int:
        return max(self.threads, BLOCK)

    @property
    def rows(self) -> int:
        return self.block // self.threads


# In order of size. 8 vectors of float32 are 32 registers of a thread, 4 vectors of 16-bit numbers as well.
GROUPS = {
    4: [Group(32, 1), Group(32, 4), Group(128, 4), Group(256, 8), Group(512, 8), Group(1024, 8)],
    8: [Group(32, 1), Group(32, 4), Group(128, 4), Group(256, 4), Group(512, 4), Group(1024, 4)],
}
# For rows that are read twice: few threads for short rows, so that each has several vectors. Not more than 256: the
# compiler spills with the registers that a larger block leaves to a thread.
SHORT_ROW, SHORT, LONG = 1024, Group(32, 0), Group(256, 0)


def group_for(dtype: str, classes: int, once: bool) -> Group:
    """The smallest group that holds the vectors of a row; `once`: it need not be read twice for another reason."""
    width = VECTORS[dtype].width
    if once:
        for group in GROUPS[width]:
            if group.threads * group.vectors * width >= classes:
                return group
    return SHORT if classes <= SHORT_ROW else LONG


def row_stride(array: DeviceArray, class_axis: int | None = 1) -> int | None:
    """Elements from one position to the next in the order of positions; None where they have no one step.

    `class_axis` is left out, unless it is None; there the step must be one element.
    """
    axes = list(zip(array.shape, array.strides, strict=True))
    if class_axis is not None:
        n, s = axes.pop(class_axis)
        if n > 1 and s != array.dtype.itemsize:
            return None
    axes = [(n, s) for n, s in axes if n > 1]
    if any(outer != n * inner for (_, outer), (n, inner) in itertools.pairwise(axes)):
        return None
    step = axes[-1][1] if axes else 0
    return step // array.dtype.itemsize if step >= 0 else None


def array_by_position(array: DeviceArray) -> DeviceArray | None:
    """An array (N, D, H, W) as one of positions."""
    if not array.size:
        return DeviceArray(0, (0,), None, array.dtype, None, stream=-1)
    step = row_stride(array, None)
    if step is None:
        return None
    itemsize = array.dtype.itemsize
    return DeviceArray(array.pointer, (array.size,), (step * itemsize,), array.dtype, array.owner, array.stream)


def label_array(dtype: str) -> types.Array:
    return array_of(getattr(types, dtype), 1)


# ---------------------------------------------------------------------------------------------------------------------
# What the threads of a group do together
# ---------------------------------------------------------------------------------------------------------------------


@inlined
def warp_max(x):
    for i in range(5):
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 16 >> i))
    return x


@inlined
def warp_sum(x):
    for i in range(5):
        x += cuda.shfl_xor_sync(ALL_LANES, x, 16 >> i)
    return x


def over_group(reduce_warp: Callable[..., Any], threads: int, neutral: Any, place: int) -> Callable[..., Any]:
    """``(x, scratch) -> the reduction of x over the group``; a block has a part of `scratch` for each reduction."""
    if threads == 32:

        @inlined
        def over_warp(x, scratch):
            return reduce_warp(x)

        return over_warp
    warps = threads // 32

    @inlined
    def over_block(x, scratch):
        x = reduce_warp(x)
        t = cuda.threadIdx.x
        if t % 32 == 0:
            scratch[place + t // 32] = x
        cuda.syncthreads()
        x = scratch[place + t % 32] if t % 32 < warps else neutral
        return reduce_warp(x)

    return over_block


def row_parts_of(width: int) -> Callable[..., Any]:
    """``(start, classes, t)``: how a row from element `start` on divides into vectors and edges.

    That is: elements before the first vector, vectors, the element that is the edge of thread t, and if it has one.
    """

    @inlined
    def parts(start, classes, t):
        before = min(u32(-start % width), u32(classes))
        whole = u32(u32(classes - before) // width)
        after = u32(before + whole * width)  # the first element behind the last vector
        edge = t if t < width else u32(after + t - width)
        return before, whole, edge, t < before or (t >= width and edge < classes)

    return parts
