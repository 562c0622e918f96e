"""Every derived size of a convolution, for the forward pass and both gradients, in one, two and three dimensions.

A convolution in fewer dimensions is the three-dimensional one with leading dimensions of size one, so the kernels know
only arrays (N, C, D, H, W). In each dimension, output position o and kernel tap k meet at the *padded coordinate*

    u = o * stride + k * dilation,        0 <= u < before + size + after

and the padding mode says which input coordinate stands there: a table per dimension, from padded coordinate to input
coordinate (-1: a zero). Forward and weight gradient read it; the input gradient reads its inverse, since more than one
padded coordinate may be the same input element (reflect, replicate, circular).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

Size3 = tuple[int, int, int]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def output_size(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """Number of positions of a window of `kernel` taps over `size` elements and the padding around them."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def padded_to_input(size: int, before: int, after: int, mode: str) -> np.ndarray:
    """Table from padded coordinate to input coordinate, -1 where a zero stands.

    >>> padded_to_input(3, 2, 1, "reflect").tolist()
    [2, 1, 0, 1, 2, 1]
    """
    i = np.arange(-before, size + after, dtype=np.int64)
    if mode == "reflect":  # the edge element is not repeated: ... 2 1 | 0 1 2 | 1 0 ...
        return np.where(i < 0, -i, np.where(i >= size, 2 * (size - 1) - i, i))
    if mode == "replicate":
        return np.clip(i, 0, size - 1)
    if mode == "circular":
        return i % size
    return np.where((i >= 0) & (i < size), i, -1)


def input_to_padded(table: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `padded_to_input`: input coordinate i stands at padded coordinates where[first[i]:first[i + 1]].

    >>> first, where = input_to_padded(np.array([2, 1, 0, 1, 2, 1]), 3)
    >>> [where[first[i]:first[i + 1]].tolist() for i in range(3)]
    [[2], [1, 3, 5], [0, 4]]
    """
    where = np.argsort(table, kind="stable")
    where = where[np.count_nonzero(table < 0) :].astype(np.int64)
    first = np.searchsorted(table[where], np.arange(size + 1)).astype(np.int64)
    return first, where


@dataclass(frozen=True)
class ConvGeometry:
    """The sizes of one convolution: input (batch, in_channels, *input_size) -> (batch, out_channels, *output_size)."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    input_size: Size3
    kernel_size: Size3
    stride: Size3
    dilation: Size3
    pad_before: Size3
    pad_after: Size3
    padding_mode: str

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # computed once: a geometry is looked up in several caches at each call
        return self._hash

    @cached_property
    def output_size(self) -> Size3:
        d, h, w = (
            output_size(*sizes)
            for sizes in zip(
                self.input_size,
                self.kernel_size,
                self.stride,
                self.dilation,
                self.pad_before,
                self.pad_after,
                strict=True,
            )
        )
        return d, h, w

    @property
    def in_channels_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def out_channels_per_group(self) -> int:
        return self.out_channels // self.groups

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of one pass, the same for the forward pass and either gradient."""
        return (
            2
            * self.batch
            * self.out_channels
            * self.in_channels_per_group
            * int(np.prod(self.output_size, dtype=object))
            * int(np.prod(self.kernel_size, dtype=object))
        )

    @cached_property
    def input_coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`padded_to_input` of each dimension."""
        d, h, w = (
            padded_to_input(size, before, after, self.padding_mode)
            for size, before, after in zip(self.input_size, self.pad_before, self.pad_after, strict=True)
        )
        return d, h, w

    @cached_property
    def padded_coordinates(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """`input_to_padded` of each dimension, as (first, where)."""
        return tuple(
            input_to_padded(table, size) for table, size in zip(self.input_coordinates, self.input_size, strict=True)
        )
