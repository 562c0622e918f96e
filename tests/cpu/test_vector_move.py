"""The data movers, each against its plain sibling: every length around the lanes, pitches wider than the rows."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv.cpu.vector import move
from vectors import DTYPES, agree, memory, tile_for

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def lengths(dtype: np.dtype, least: int = 1) -> list[int]:
    """Below, at and above one vector and several of them."""
    n = tile_for(dtype).lanes
    found = {least, 1, 2, 3, n - 1, n, n + 1, 2 * n - 1, 2 * n, 2 * n + 1, 4 * n, 4 * n + 3, 8 * n + 5}
    return sorted(each for each in found if each >= least)


def test_copy_block(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in lengths(dtype, 0):
        target, source = memory(rng, 600, dtype), memory(rng, 600, dtype)
        agree(move.copy_block, dtype, (target, count + 2, source, count + 5, 3, count))


@pytest.mark.parametrize("past_cache", [False, True])
def test_stream_block(dtype: np.dtype, rng: np.random.Generator, past_cache: bool) -> None:
    for count in lengths(dtype, 0):
        for first in range(3):  # where in its cache line a row begins
            target, source = memory(rng, 600, dtype)[first:], memory(rng, 600, dtype)
            agree(move.stream_block, dtype, (target, count + 2, source, count + 5, 3, count, past_cache))


def test_fetch_span(dtype: np.dtype, rng: np.random.Generator) -> None:
    agree(move.fetch_span, dtype, (memory(rng, 1, dtype), 1000))


@pytest.mark.parametrize("mover", [move.copy_every_second, move.spread_every_second])
def test_every_second(dtype: np.dtype, rng: np.random.Generator, mover) -> None:
    for count in lengths(dtype):
        target, source = memory(rng, 1200, dtype), memory(rng, 1200, dtype)
        agree(mover, dtype, (target, 2 * count + 2, source, 2 * count + 5, 3, count))


def test_separate_2(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in lengths(dtype, 0):
        even, odd, source = (memory(rng, 500, dtype) for _ in range(3))
        agree(move.separate_2, dtype, (even, odd, count // 2 + 3, source, count + 5, 3, count))


def test_separate_4(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in lengths(dtype, 0):
        target, source = memory(rng, 700, dtype), memory(rng, 300, dtype)
        agree(move.separate_4, dtype, (target, np.array([0, 500, 170, 340]), source, count))


def test_join_rows(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in lengths(dtype):
        target, even, odd = (memory(rng, 700, dtype) for _ in range(3))
        agree(move.join_rows, dtype, (target, count + 3, even, odd, count // 2 + 4, 3, count))


def test_transpose_block(dtype: np.dtype, rng: np.random.Generator) -> None:
    n = tile_for(dtype).lanes
    for rows in range(1, n + 1):
        for columns in range(1, n + 1):
            target, source = memory(rng, 600, dtype), memory(rng, 600, dtype)
            agree(move.transpose_block, dtype, (target, n + 3, source, n + 5, rows, columns))


def test_transpose_start(dtype: np.dtype, rng: np.random.Generator) -> None:
    n = tile_for(dtype).lanes
    for columns in range(1, n + 1):
        target, source = memory(rng, 600, dtype), memory(rng, 600, dtype)
        agree(move.transpose_start, dtype, (target, source, n + 5, columns))


@pytest.mark.parametrize("mover", [move.transpose, move.transpose_add])
def test_transpose(dtype: np.dtype, rng: np.random.Generator, mover) -> None:
    n = tile_for(dtype).lanes
    for rows in {1, n // 2, n}:
        target, source = memory(rng, 900, dtype), memory(rng, 900, dtype)
        agree(mover, dtype, (target, n + 3, source, n + 5, rows, 16))
    target, source = memory(rng, 900, dtype), memory(rng, 900, dtype)
    agree(move.transpose, dtype, (target, n // 2, source, n + 5, n, 16))  # each store over the end of the one before


@pytest.mark.parametrize("mover", [move.spread_pixels, move.spread_planes])
def test_spread(dtype: np.dtype, rng: np.random.Generator, mover) -> None:
    """From pixels of channels, and from planes of pixels."""
    n = tile_for(dtype).lanes
    for channels in {1, 2, n - 1, n}:
        for pixels in lengths(dtype):
            target, source = memory(rng, 3000, dtype), memory(rng, 3000, dtype)
            places = rng.permutation(pixels + 3)[:pixels] * n
            pitch = n + 1 if mover is move.spread_pixels else max(pixels, n) + 1
            agree(mover, dtype, (target, places, source, pitch, pixels, channels))


@pytest.mark.parametrize("mover", [move.collect_pixels, move.collect_planes])
def test_collect(dtype: np.dtype, rng: np.random.Generator, mover) -> None:
    n = tile_for(dtype).lanes
    for channels in {1, 2, n - 1, n}:
        for pixels in lengths(dtype):
            target, source = memory(rng, 3000, dtype), memory(rng, 3000, dtype)
            pitch = n + 1 if mover is move.collect_pixels else max(pixels, n) + 1
            agree(mover, dtype, (target, pitch, source, n + 3, pixels, channels))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_count_not_finite(dtype: np.dtype, rng: np.random.Generator, value: float) -> None:
    n = tile_for(dtype).lanes
    for place in (None, 0, n - 1, 2 * n, 3 * n - 1, 3 * n):
        values = memory(rng, 4 * n, dtype)
        if place is not None:
            values[place] = value
        found = agree(move.count_not_finite, dtype, (values, 3))
        assert (found != 0) == (place is not None and place < 3 * n)
