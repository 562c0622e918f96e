"""The tables of `implicit_gemm`: what each term, and each column, of a matrix product meets in the source."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..geometry import ConvGeometry
from .offsets import Strides

__all__ = [
    "Gather", "column_numbers", "forward_gather", "input_grad_gathers", "list_terms", "padded_to_steps", "source_table",
]  # fmt: skip

FAR = 1 << 30  # added to a coordinate, puts it outside of any array


class Gather(NamedTuple):
    """One pass over `source`, all numbers in elements. Of the tables, a row per term (channel, tap)."""

    rows: int  # of a group
    columns: int
    terms: int
    counts: tuple[int, int, int]  # columns of one sample, per dimension
    step: tuple[int, int, int]
    size: tuple[int, int, int]  # of the source
    deltas: np.ndarray  # (terms, 3)
    channels: np.ndarray  # (terms,): channel of the group
    weights: np.ndarray  # (terms,): offset from the row's first weight
    origin: tuple[int, int, int]  # of the result's positions, and the distance of two
    pace: tuple[int, int, int]

    @property
    def checked(self) -> bool:
        """May a coordinate be outside the source?"""
        last = np.multiply(np.subtract(self.counts, 1), self.step)
        return bool((self.deltas < 0).any() or (self.deltas + last >= self.size).any())


def list_terms(
    channels: int, taps: list[tuple[int, int, int]], channels_together: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Channel and tap (terms, 3) of each term: channel by channel, or tap by tap with the channels together."""
    if channels_together:
        return np.tile(np.arange(channels), len(taps)), np.repeat(np.reshape(taps, (-1, 3)), channels, axis=0)
    return np.repeat(np.arange(channels), len(taps)), np.tile(np.reshape(taps, (-1, 3)), (channels, 1))


def forward_gather(geometry: ConvGeometry, weight: Strides, channels_together: bool) -> Gather:
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    channels, tap = list_terms(geometry.in_channels_per_group, taps, channels_together)
    return Gather(
        geometry.out_channels_per_group, geometry.batch * int(np.prod(geometry.output_size)), len(channels),
        geometry.output_size, geometry.stride, geometry.input_size,
        tap * geometry.dilation - np.array(geometry.pad_before), channels, channels * weight[1] + tap @ weight[2:],
        (0, 0, 0), (1, 1, 1),
    )  # fmt: skip


def input_grad_gathers(geometry: ConvGeometry, weight: Strides, channels_together: bool) -> Iterator[Gather]:
    for phase in itertools.product(*map(range, geometry.stride)):
        # input positions q = origin + stride * j, and the taps k with k * dilation = phase (mod stride)
        origin = [(p - b) % s for p, b, s in zip(phase, geometry.pad_before, geometry.stride, strict=True)]
        counts = [len(range(q, n, s)) for q, n, s in zip(origin, geometry.input_size, geometry.stride, strict=True)]
        if 0 in counts:
            continue
        taps = [
            [k for k in range(size) if (k * d - p) % s == 0]
            for size, d, p, s in zip(geometry.kernel_size, geometry.dilation, phase, geometry.stride, strict=True)
        ]
        channels, tap = list_terms(geometry.out_channels_per_group, list(itertools.product(*taps)), channels_together)
        deltas = (np.array(origin) + geometry.pad_before - tap * geometry.dilation) // np.array(geometry.stride)
        yield Gather(
            geometry.in_channels_per_group, geometry.batch * int(np.prod(counts)), len(channels), tuple(counts),
            (1, 1, 1), geometry.output_size, deltas, channels, channels * weight[0] + tap @ weight[2:], tuple(origin),
            geometry.stride,
        )  # fmt: skip


def padded_to_steps(table: np.ndarray, fill: int, step: int) -> np.ndarray:
    """A whole number of steps of so many rows, at least one, as 32-bit numbers that wrap around."""
    missing = max(-len(table) % step, step - len(table))
    filler = np.full((missing, *table.shape[1:]), fill, np.int64)
    return (np.concatenate([table, filler]).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32).reshape(-1)


def source_table(gather: Gather, source: Strides, chunk: int, step: int) -> np.ndarray:
    """Offset and the three deltas of every chunk's first term; the rows that fill up a step are outside the source."""
    offsets = gather.channels * source[1] + gather.deltas @ np.array(source[2:], np.int64)
    return padded_to_steps(np.column_stack([offsets, gather.deltas])[::chunk], FAR, step)


def column_numbers(gather: Gather, source: Strides) -> list[int]:
    """What makes of a column its sample and coordinates in the source, and their offset."""
    return [*gather.counts, *gather.step, *gather.size, source[0], *np.multiply(source[2:], gather.step).tolist()]
