"""The vector kernels of softmax cross-entropy, each against its plain sibling.

Counts are those of the edges of a group of four vectors. What is beyond a count, in the last vector and in the gaps
between rows, must stay as it was.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastconv.cpu.vector import softmax
from vectors import DTYPES, agree, memory, tile_for, whole_numbers

ROUNDING = 8  # exponentials and sums of them differ by so many units of roundoff from those in Python


def counts(dtype: np.dtype) -> list[int]:
    lanes = tile_for(dtype).lanes
    return [1, lanes - 1, lanes, 3 * lanes + 1, 4 * lanes, 4 * lanes + 1, 9 * lanes + 2]


def roundoff(dtype: np.dtype) -> float:
    return ROUNDING * float(np.finfo(dtype).eps)


def in_whole_groups(count: int, dtype: np.dtype) -> int:
    group = 4 * tile_for(dtype).lanes
    return -(-count // group) * group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_maximum(dtype: np.dtype, rng: np.random.Generator) -> None:
    """With the largest number at either end, nan among them, and larger ones beyond the end."""
    for count in [0, *counts(dtype)]:
        values = memory(rng, count + 64, dtype)
        values[count:] = 1e6
        agree(softmax.span_maximum, dtype, (values, count))
        for place in (0, count - 1) if count else ():
            values[place] = 1e5
            assert agree(softmax.span_maximum, dtype, (values, count)) == 1e5
            values[place] = np.nan
            agree(softmax.span_maximum, dtype, (values, count))
    assert softmax.span_maximum.run(dtype, (np.full(9, np.nan, dtype), 9)) == -math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_exponentials(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in counts(dtype):
        source = -rng.exponential(3.0, count + 64).astype(dtype)
        source[0] = -math.inf
        agree(
            softmax.span_exponentials, dtype, (whole_numbers(rng, count + 64, dtype), source, count, 0.5, 100),
            relative=roundoff(dtype),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponentials_of_every_size(dtype: np.dtype) -> None:
    """From 1 to the smallest subnormal number and 0: each relative to itself."""
    source = np.linspace(-800, 0, 4096).astype(dtype)
    target = np.empty_like(source)
    softmax.span_exponentials.run(dtype, (target, source, source.size, 0.0, 0))
    exact = np.exp(source.astype(np.longdouble)).astype(dtype)
    np.testing.assert_allclose(target, exact, rtol=2 * np.finfo(dtype).eps, atol=np.finfo(dtype).smallest_subnormal)


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_scale(dtype: np.dtype, past_cache: bool, rng: np.random.Generator) -> None:
    """To places at every distance from the beginning of a cache line."""
    lanes = tile_for(dtype).lanes
    for count in [0, *counts(dtype)]:
        for first in {0, 1, lanes - 1}:
            arguments = whole_numbers(rng, count + 64, dtype), whole_numbers(rng, count + 64, dtype)
            room, source = (np.concatenate([np.zeros(first, dtype), each]) for each in arguments)
            agree(softmax.span_scale, dtype, (room, source, count, 3.0, past_cache))
            shifted = room.copy()[first:]
            expected = np.concatenate([source[first : first + count] * dtype.type(3), shifted[count:]])
            softmax.span_scale.run(dtype, (shifted, source[first:], count, 3.0, past_cache))
            np.testing.assert_array_equal(shifted, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_products(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in counts(dtype):
        q, z = (whole_numbers(rng, count + 64, dtype) for _ in range(2))
        z[: count // 2][q[: count // 2] == 0] = -math.inf  # times 0 adds nothing
        agree(softmax.span_products, dtype, (q, z, count, 2.0, np.array([3.0, 5.0]), 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_gradient(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in counts(dtype):
        target, powers, q = (whole_numbers(rng, count + 64, dtype) for _ in range(3))
        agree(softmax.span_gradient, dtype, (target, powers, q, count, 2.0, 3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raise_maxima(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in counts(dtype):
        for rows in (1, 3):
            pitch = count + 5
            source, top = memory(rng, rows * pitch + 64, dtype), np.full(count + 64, 9, dtype)
            source[pitch * (rows - 1)] = np.nan
            agree(softmax.raise_maxima, dtype, (top, source, pitch, rows, count))


@pytest.mark.parametrize("rows", [1, softmax.SUM_ROWS, softmax.SUM_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_exponentials(dtype: np.dtype, rows: int, rng: np.random.Generator) -> None:
    """The sum of a column is in float64 from the first 64 rows on."""
    for count in counts(dtype)[1::2]:
        pitch = count + 5
        source, base = -rng.exponential(3.0, rows * pitch + 64).astype(dtype), np.full(count + 64, 0.5, dtype)
        target, total = whole_numbers(rng, rows * (pitch + 1) + 64, dtype), np.zeros(in_whole_groups(count, dtype))
        agree(
            softmax.column_exponentials, dtype,
            (target, pitch + 1, source, pitch, rows, count, base, total, source, pitch), relative=roundoff(dtype),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_products(dtype: np.dtype, rng: np.random.Generator) -> None:
    for rows in (1, 7):
        width = in_whole_groups(1, dtype) * 2
        q, z = (whole_numbers(rng, rows * width, dtype) for _ in range(2))
        z[q == 0] = -math.inf
        base, weighted, of_q = whole_numbers(rng, width, dtype), np.ones(width), np.ones(width)
        agree(softmax.column_products, dtype, (q, z, rows, width, base, weighted, of_q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_columns(dtype: np.dtype, rng: np.random.Generator) -> None:
    for count in counts(dtype):
        for rows in (1, 3):
            pitch = count + 5
            values, factor = whole_numbers(rng, rows * pitch + 64, dtype), whole_numbers(rng, count + 64, dtype)
            agree(softmax.scale_columns, dtype, (values, pitch, rows, count, factor))
