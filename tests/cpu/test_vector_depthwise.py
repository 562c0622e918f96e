"""The kernels of depthwise convolutions, each against its plain sibling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastconv.cpu.records import Record
from fastconv.cpu.vector import depthwise_channels as channels_of
from fastconv.cpu.vector import depthwise_planes as planes_of
from fastconv.cpu.vector import depthwise_rows as rows_of
from fastconv.cpu.vector.gemm import ADD, BIAS, RELU
from fastconv.cpu.vector.tile import tile
from vectors import DTYPES, agree, memory, tile_for, whole_numbers

of_each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)

FLAGS = (0, ADD, BIAS, RELU, ADD | BIAS | RELU)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a plane, from a slab
# ---------------------------------------------------------------------------------------------------------------------


def row_sizes(dtype: np.dtype) -> list[tuple[int, int]]:
    """(rows, columns) around the blocks of every shape, and around several of them."""
    n = tile_for(dtype).lanes
    columns = [1, n // 2, n // 2 + 1, n - 1, n, n + 1, 2 * n, 2 * n + 1, 3 * n, 4 * n, 4 * n + 1, 5 * n + 1, 9 * n + 1]
    return [*((7 + 3, width) for width in columns), *((rows, n + 3) for rows in (1, 2, 3, 4, 6, 7, 14))]


@of_each_type
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


@of_each_type
def test_the_blocks_of_correlate_rows(dtype: np.dtype, rng: np.random.Generator) -> None:
    """One after the other, with what is added and the least value given as numbers."""
    for shape in rows_of.shapes_of(tile_for(dtype)):
        width = shape.lanes * shape.vectors
        for columns in {width, width - shape.lanes // 2}:
            y, x, w = (whole_numbers(rng, 40 * (width + 9), dtype) for _ in range(3))
            arguments = y, width + 2, x, width + 5, w, 2, 2, np.array([3, 0]), 2, columns, 1, 2.0, -3.0
            variant = rows_of.CorrelationBlock(rows_of.Taps(3, 2), shape)
            agree(rows_of.correlate_row_blocks, dtype, arguments, variant)


@of_each_type
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


@of_each_type
def test_the_blocks_of_accumulate_rows(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    for lanes, columns in ((t.lanes, 2 * t.lanes + 1), (t.lanes // 2, t.lanes // 2 - 1 or 1)):
        if lanes < 4:
            continue
        sums, x, dy = (whole_numbers(rng, 30 * (columns + 20), dtype) for _ in range(3))
        arguments = sums, 3, x, columns + 9, np.array([4, 1]), dy, columns + 1, 2, columns
        agree(rows_of.accumulate_row_blocks, dtype, arguments, rows_of.GradientBlock(rows_of.Taps(3, 2), 2, 2, lanes))


@of_each_type
def test_sum_lanes(dtype: np.dtype, rng: np.random.Generator) -> None:
    agree(rows_of.sum_lanes, dtype, (memory(rng, 5, dtype), whole_numbers(rng, 4 * tile_for(dtype).lanes, dtype), 3))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels, each a vector of channels
# ---------------------------------------------------------------------------------------------------------------------


def neighbours(dtype: np.dtype) -> list[channels_of.Neighbours]:
    t = tile_for(dtype)
    alone = [channels_of.Neighbours(taps, stride) for taps, stride in channels_of.CHANNEL_TAPS]
    return [*alone, channels_of.Neighbours(3, 1, 2), channels_of.Neighbours(2, 1, t.lanes)]


def record(kind: type[Record], **values: int) -> Any:
    made = kind.zeros()
    for name in kind.fields:
        setattr(made, name, values.pop(name, 0))
    assert not values
    return made


@of_each_type
def test_correlate_pixels(dtype: np.dtype, rng: np.random.Generator) -> None:
    """Columns around every block, with and without what lies beside the plane, one run of neighbours and several."""
    n, blocks, depths = tile_for(dtype).lanes, 2, 2
    reach = np.array([2, 1, 2, 0, 0, 3])  # of two rows
    for case in neighbours(dtype):
        for k, columns in enumerate((1, 3, 14, 14 + 7 + 4 + 2 + 1)):
            widths, flags = 1 + k % 2, FLAGS[k] & ~BIAS
            reached = (columns - 1) * case.stride + case.taps
            low, high = (case.taps - 1, reached - case.taps + 1) if widths == 1 and columns > 3 else (0, 1 << 40)
            x_column, y_column = blocks * n + 1, blocks * n + 2
            steps = record(
                channels_of.Steps, y_row=columns * y_column + 3, y_column=y_column, x_row=(reached + 2) * x_column,
                x_column=x_column, x_depth=5 * n, x_height=3 * n, x_width=2 * x_column, w_depth=4 * n, w_height=n,
                w_width=2 * n, w_block=(case.weights + 14) * n, widths=widths, x_prefetch=k * 40, y_prefetch=7,
            )  # fmt: skip
            y = whole_numbers(rng, 2 * (columns + 1) * y_column + 9, dtype)
            x = whole_numbers(rng, 4 * (reached + 4) * x_column + 30 * n, dtype)
            w, bias = (whole_numbers(rng, 2 * (case.weights + 20) * n, dtype) for _ in range(2))
            arguments = (
                y, x, w, bias, np.zeros(n, dtype), reach, blocks, 2, columns, low, high, depths, steps, flags,
            )  # fmt: skip
            agree(channels_of.correlate_pixels, dtype, arguments, case)


@of_each_type
def test_a_block_of_correlate_pixels(dtype: np.dtype, rng: np.random.Generator) -> None:
    n = tile_for(dtype).lanes
    steps = record(
        channels_of.Steps, y_row=8 * n, y_column=n, x_row=9 * n, x_column=n, x_height=9 * n, w_height=3 * n, widths=1,
        w_block=20 * n,
    )  # fmt: skip
    y, x, w, bias = (whole_numbers(rng, 60 * n, dtype) for _ in range(4))
    arguments = y, x, w, bias, np.zeros(n, dtype), np.array([1, 0, 2]), 1, 1, 1, 3, 1, steps, 1, 0.0
    agree(
        channels_of.correlate_pixel_blocks, dtype, arguments, channels_of.PixelBlock(channels_of.Neighbours(3, 1), 2)
    )


@of_each_type
@pytest.mark.parametrize("in_place", [False, True])
def test_accumulate_pixels(dtype: np.dtype, rng: np.random.Generator, in_place: bool) -> None:
    """Columns around those at once; in place, with rows and columns of taps beside the plane, and prefetches."""
    t = tile_for(dtype)
    n, blocks, rows = t.lanes, 2, 3
    for case in neighbours(dtype):
        for tap_rows in channels_of.gradient_tap_rows(t, case.weights):
            for columns in (1, 3, 4, 9):
                reached = (columns - 1) * case.stride + case.taps
                x_column = blocks * n if in_place or case.taps == 1 else n
                many = blocks if in_place or case.taps == 1 else 1
                steps = record(
                    channels_of.GradientSteps, sums_row=(case.weights + 1) * n,
                    sums_block=tap_rows * (case.weights + 2) * n, x_row=2 * (reached + 1) * x_column,
                    x_height=(reached + 1) * x_column, x_column=x_column, dy_row=(columns + 2) * blocks * n,
                    dy_column=blocks * n + 1, row=2, height=1,
                )  # fmt: skip
                sums = whole_numbers(rng, 2 * (tap_rows + 1) * (case.weights + 2) * n, dtype)
                x = whole_numbers(rng, (2 * rows + tap_rows) * (reached + 2) * x_column, dtype)
                dy = whole_numbers(rng, rows * (columns + 3) * (blocks + 1) * n, dtype)
                low, high = min(case.taps - 1, 1), reached - (case.taps > 2)
                arguments = (
                    sums, x, dy, np.zeros((reached + 1) * x_column, dtype), many, rows, columns, low, high, -1,
                    tap_rows + 3, 64, 32, steps,
                )  # fmt: skip
                agree(channels_of.accumulate_pixels, dtype, arguments, channels_of.TapRows(case, tap_rows, in_place))


# ---------------------------------------------------------------------------------------------------------------------
# Planes that are read in place
# ---------------------------------------------------------------------------------------------------------------------

with_masks = pytest.mark.skipif(not tile(32).masks, reason="planes are read in place only by vectors that have masks")
# columns of the filter written out, and in a loop; weights that fit into registers, and that do not
PLANE_TAPS = [(2, 1), (3, 1), (4, 1), (15, 1), (2, 2), (3, 2), (5, 2)]


def some_lanes(rng: np.random.Generator, count: int, lanes: int) -> np.ndarray:
    """Masks: all lanes, then some that begin or end a vector."""
    bits = [(1 << lanes) - 1, *((1 << int(rng.integers(1, lanes + 1))) - 1 for _ in range(count - 1))]
    return np.array([b if n % 2 == 0 else ((1 << lanes) - 1) ^ (b >> 1) for n, b in enumerate(bits)])


@of_each_type
@with_masks
@pytest.mark.parametrize(("taps", "stride"), PLANE_TAPS)
def test_correlate_planes(dtype: np.dtype, rng: np.random.Generator, taps: int, stride: int) -> None:
    """Parts of every width, blocks of rows that overlap or not, rows above and below the plane that are not there."""
    planes, depths, height = 2, 2, 9
    assert taps in planes_of.PLANE_TAPS[stride]
    for n, part in enumerate(planes_of.row_parts(tile_for(dtype))):
        for many, rows in ((4, 4), (7, 8))[n % 2 :][:1]:
            masks = some_lanes(rng, part.vectors + len(planes_of.plane_loads(part, taps, stride)), part.lanes)
            x_row, y_row, flags = 2 * part.columns + taps + 40, part.columns + 3, FLAGS[rows % len(FLAGS)] & ~ADD
            steps = record(
                planes_of.PlaneSteps, y_plane=rows * y_row + 1, y_row=y_row, x_plane=depths * height * x_row,
                x_depth=height * x_row, x_row=x_row, w_plane=taps * taps * depths + 1, w_depth=taps * taps,
                w_height=taps, w_width=1, bias=2,
            )  # fmt: skip
            y = whole_numbers(rng, planes * (rows + 1) * y_row + 3 * part.columns, dtype)
            x = whole_numbers(rng, (planes * depths * height + 1) * x_row, dtype)
            w = whole_numbers(rng, planes * (taps * taps * depths + 1), dtype)
            arguments = (
                masks, y, x, w, whole_numbers(rng, 2 * planes, dtype), -2, height, depths, planes, rows, 0,
                x if rows == 8 else None, y if rows == 8 else None, steps, flags,
            )  # fmt: skip
            agree(planes_of.correlate_planes, dtype, arguments, planes_of.RowBlock(taps, stride, many, part))


@of_each_type
@with_masks
@pytest.mark.parametrize(("taps", "stride"), [(t, s) for s, some in planes_of.GRADIENT_TAPS.items() for t in some])
def test_accumulate_planes(dtype: np.dtype, rng: np.random.Generator, taps: int, stride: int) -> None:
    t, planes, runs, height = tile_for(dtype), 2, 2, 9
    for lanes in (t.lanes // 2, t.lanes):
        for rows in (-(-taps // stride), 6):
            masks = some_lanes(rng, 1 + len(planes_of.plane_loads(planes_of.Part(lanes, 1), taps, stride)), lanes)
            masks[0] = (1 << (lanes - 1)) - 1
            if stride == 1:  # a lane of the input that no lane of the gradient reads is not there
                masks[1:] &= masks[0]
            x_row, dy_row = 2 * lanes + taps + 2 * t.lanes, lanes + 3
            steps = record(
                planes_of.PlaneGradientSteps, sums_plane=(taps * taps + 1) * t.lanes, dy_plane=runs * rows * dy_row,
                dy_run=rows * dy_row, dy_row=dy_row, x_plane=runs * height * x_row, x_run=height * x_row, x_row=x_row,
            )  # fmt: skip
            sums = whole_numbers(rng, planes * (taps * taps + 1) * t.lanes, dtype)
            dy = whole_numbers(rng, (planes * runs * rows + 1) * dy_row, dtype)
            x = whole_numbers(rng, (planes * runs * height + 1) * x_row, dtype)
            ahead = x if rows == 6 else None
            arguments = (
                masks, sums, dy, x, np.zeros(x_row, dtype), -1, height, planes, runs, rows, ahead, ahead, steps,
            )  # fmt: skip
            agree(planes_of.accumulate_planes, dtype, arguments, planes_of.Taps(taps, stride, lanes))


@of_each_type
@with_masks
@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("taps", [2, 3, 4, 7])
def test_spread_planes_by_two(dtype: np.dtype, rng: np.random.Generator, taps: int, parity: int) -> None:
    planes, height = 2, 6
    for lanes in (tile_for(dtype).lanes // 2, tile_for(dtype).lanes):
        for pairs, y_rows in ((4, 8), (6, 11)):
            masks = some_lanes(rng, 2 + len(planes_of.spread_shifts(taps, parity)), lanes)
            for n, shift in enumerate(planes_of.spread_shifts(taps, parity)):
                masks[2 + n] &= -1 << max(0, -shift)  # nothing is before the first column
            x_row, y_row, flags = lanes + 20, 2 * lanes + 3, FLAGS[pairs % len(FLAGS)] & ~ADD
            steps = record(
                planes_of.PlaneSteps, y_plane=2 * pairs * y_row + 1, y_row=y_row, x_plane=height * x_row,
                x_row=x_row, w_plane=taps * taps + 1, w_height=1, w_width=taps, bias=1,
            )  # fmt: skip
            y = whole_numbers(rng, planes * (2 * pairs + 1) * y_row, dtype)
            x = whole_numbers(rng, (planes * height + 3) * x_row, dtype)
            w = whole_numbers(rng, planes * (taps * taps + 1), dtype)
            arguments = (
                masks, y, x, w, whole_numbers(rng, planes, dtype), -1, height, 1, planes, pairs, y_rows,
                x if pairs == 6 else None, y if pairs == 6 else None, steps, flags,
            )  # fmt: skip
            agree(planes_of.spread_planes_by_two, dtype, arguments, planes_of.Spreading(taps, parity, lanes))
