"""The kernels of depthwise convolutions, each against its plain sibling."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv.cpu.vector import depthwise_rows as rows_of
from fastconv.cpu.vector.gemm import ADD, BIAS, RELU
from vectors import DTYPES, agree, memory, tile_for, whole_numbers

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)

FLAGS = (0, ADD, BIAS, RELU, ADD | BIAS | RELU)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a plane, from a slab
# ---------------------------------------------------------------------------------------------------------------------


def row_sizes(dtype: np.dtype) -> list[tuple[int, int]]:
    """(rows, columns) around the blocks of every shape, and around several of them."""
    n = tile_for(dtype).lanes
    columns = [1, n // 2, n // 2 + 1, n - 1, n, n + 1, 2 * n, 2 * n + 1, 3 * n, 4 * n, 4 * n + 1, 5 * n + 1, 9 * n + 1]
    return [*((7 + 3, width) for width in columns), *((rows, n + 3) for rows in (1, 2, 3, 4, 6, 7, 14))]


@pytest.mark.parametrize("taps", rows_of.SHARED_ROWS, ids=str)
def test_correlate_rows(dtype: np.dtype, rng: np.random.Generator, taps: rows_of.Taps) -> None:
    depth, offsets = 3, np.array([2, 0, 5])
    for n, (rows, columns) in enumerate(row_sizes(dtype)):
        y_pitch, x_pitch, w_pitch = columns + 3, columns + 7, depth + 1
        y = whole_numbers(rng, rows * y_pitch, dtype)
        reached = taps.stride * (rows - 1) + taps.rows
        x = whole_numbers(rng, reached * x_pitch + 2 * tile_for(dtype).lanes, dtype)
        w, bias = whole_numbers(rng, taps.rows * w_pitch, dtype), whole_numbers(rng, 1, dtype)
        arguments = y, y_pitch, x, x_pitch, w, w_pitch, depth, offsets, rows, columns, FLAGS[n % len(FLAGS)], bias
        agree(rows_of.correlate_rows, dtype, arguments, taps)


def test_the_blocks_of_correlate_rows(dtype: np.dtype, rng: np.random.Generator) -> None:
    """One after the other, with what is added and the least value given as numbers."""
    for shape in rows_of.shapes_of(tile_for(dtype)):
        width = shape.lanes * shape.vectors
        for columns in {width, width - shape.lanes // 2}:
            y, x, w = (whole_numbers(rng, 40 * (width + 9), dtype) for _ in range(3))
            arguments = y, width + 2, x, width + 5, w, 2, 2, np.array([3, 0]), 2, columns, 1, 2.0, -3.0
            variant = rows_of.CorrelationBlock(rows_of.Taps(3, 2), shape)
            agree(rows_of.correlate_row_blocks, dtype, arguments, variant)


@pytest.mark.parametrize("taps", rows_of.SHARED_ROWS, ids=str)
def test_accumulate_rows(dtype: np.dtype, rng: np.random.Generator, taps: rows_of.Taps) -> None:
    t = tile_for(dtype)
    for rows, columns in row_sizes(dtype):
        for depth in {1, rows_of.columns_at_once(t, taps.rows) + 1}:
            dy_pitch, x_pitch, pitch = columns + 3, columns + 11, depth + 1
            offsets = rng.permutation(11)[:depth]
            sums = whole_numbers(rng, taps.rows * pitch * t.lanes, dtype)
            reached = taps.stride * (rows - 1) + taps.rows
            x = whole_numbers(rng, reached * x_pitch + 2 * t.lanes, dtype)
            dy = whole_numbers(rng, rows * dy_pitch, dtype)
            x[(reached - 1) * x_pitch + columns + offsets.max() :] = np.inf  # beyond what is used
            arguments = sums, pitch, x, x_pitch, offsets, depth, dy, dy_pitch, rows, columns
            agree(rows_of.accumulate_rows, dtype, arguments, taps)


def test_the_blocks_of_accumulate_rows(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    for lanes, columns in ((t.lanes, 2 * t.lanes + 1), (t.lanes // 2, t.lanes // 2 - 1 or 1)):
        if lanes < 4:
            continue
        sums, x, dy = (whole_numbers(rng, 30 * (columns + 20), dtype) for _ in range(3))
        arguments = sums, 3, x, columns + 9, np.array([4, 1]), dy, columns + 1, 2, columns
        agree(rows_of.accumulate_row_blocks, dtype, arguments, rows_of.GradientBlock(rows_of.Taps(3, 2), 2, 2, lanes))


def test_sum_lanes(dtype: np.dtype, rng: np.random.Generator) -> None:
    agree(rows_of.sum_lanes, dtype, (memory(rng, 5, dtype), whole_numbers(rng, 4 * tile_for(dtype).lanes, dtype), 3))
