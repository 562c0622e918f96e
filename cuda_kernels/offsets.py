"""Offsets of 32 bits: the strides and numbers that the kernels of convolution count in, and how far they reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..geometry import ConvGeometry
from ._cuda import DeviceArray

__all__ = ["MOST_ELEMENTS", "Strides", "as_uint32", "extent", "split_batch", "strides_in_elements"]

MOST_ELEMENTS = 2**31 - 1

Strides = tuple[int, ...]


def strides_in_elements(array: DeviceArray) -> Strides:
    return tuple(s // array.dtype.itemsize for s in array.strides)


def as_uint32(*values: int) -> tuple[np.uint32, ...]:
    return tuple(np.uint32(int(v) & 0xFFFFFFFF) for v in values)


def extent(array: DeviceArray, samples: int | None = None) -> int:
    """Elements from the first to the last, of the first `samples` if given."""
    shape = array.shape if samples is None else (samples, *array.shape[1:])
    return sum((n - 1) * s for n, s in zip(shape, array.strides, strict=True)) // array.dtype.itemsize + 1


def split_batch(geometry: ConvGeometry, *arrays: DeviceArray) -> Iterator[tuple[ConvGeometry, list[DeviceArray]]]:
    """The whole batch, or as many samples at a time as 32-bit offsets reach."""
    if all(extent(a) <= MOST_ELEMENTS for a in arrays):
        yield geometry, list(arrays)
        return
    most = max(n for n in _halvings(geometry.batch) if all(extent(a, n) <= MOST_ELEMENTS for a in arrays))
    for first in range(0, geometry.batch, most):
        count = min(most, geometry.batch - first)
        yield dataclasses.replace(geometry, batch=count), [a.samples(first, count) for a in arrays]


def _halvings(n: int) -> Iterator[int]:
    while n:
        yield n
        n //= 2
