"""The microkernels of matrix products, each against its plain sibling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastconv.cpu.vector import gemm
from vectors import DTYPES, agree, memory, tile_for, whole_numbers

FLAGS = 0, gemm.ADD, gemm.BIAS, gemm.RELU, gemm.ADD | gemm.BIAS | gemm.RELU
NO_TABLE = np.zeros(1, np.int64)


def run_table(lanes: int, vectors: int, first: list[int], gap: int) -> tuple[np.ndarray, int]:
    """The table of vectors of neighbouring pixels that are interrupted, by `gap` elements, before these columns.

    Returns the end of the last run too. Unused entries are as `pack_panel` wants them.
    """
    table = np.zeros((vectors, gemm.run_stride(lanes)), np.int64)
    starts = [0, *first]
    for vector in range(vectors):
        count = 0
        for number, (begin, end) in enumerate(itertools.pairwise([*starts, vectors * lanes])):
            if begin < (vector + 1) * lanes and end > vector * lanes:
                bits = -1 << max(0, begin - vector * lanes)
                table[vector, 1 + 2 * count : 3 + 2 * count] = vector * lanes + number * gap, bits
                count += 1
        table[vector, 0] = count
        for entry in range(count, gemm.FIXED_RUNS):
            table[vector, 1 + 2 * entry] = table[vector, 1]
    return table.ravel(), vectors * lanes + len(first) * gap


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype: np.dtype, rng: np.random.Generator) -> None:
    """Every number of rows and of vectors, each with what it may do to the sums, and an output wider than they are."""
    t = tile_for(dtype)
    for rows, vectors in itertools.product({1, 2, t.rows - 1, t.rows}, range(1, t.vectors + 1)):
        for flags in FLAGS:
            depth, pitch = 5, t.columns + 3
            a, panel = whole_numbers(rng, depth * rows, dtype), whole_numbers(rng, depth * t.columns, dtype)
            c, bias = whole_numbers(rng, rows * pitch, dtype), whole_numbers(rng, rows, dtype)
            agree(
                gemm.contract, dtype, (depth, a, panel, c, flags, pitch, bias, a, NO_TABLE, NO_TABLE, 0),
                gemm.Rows(rows, vectors),
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_packs_the_panel_or_reads_its_source(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    if not t.packs:
        pytest.skip("the tile of this processor has panels packed beforehand")
    for rows, interrupted in itertools.product({1, t.rows}, ([], [3], [t.lanes - 1, t.columns - 1])):
        depth, pitch = 4, t.columns
        runs, end = run_table(t.lanes, t.vectors, interrupted, gap=5)
        offsets = rng.permutation(depth) * 3
        source = whole_numbers(rng, end + 3 * depth + t.columns, dtype)
        a, bias = whole_numbers(rng, depth * rows, dtype), whole_numbers(rng, rows, dtype)
        panel, c = memory(rng, depth * t.columns, dtype), whole_numbers(rng, rows * pitch, dtype)
        for flags in FLAGS:
            arguments = depth, a, panel, c, flags | gemm.PACK, pitch, bias, source, offsets, runs, 64
            agree(gemm.contract, dtype, arguments, gemm.Rows(rows, t.vectors))
            if not interrupted:
                read = [each.copy() if each is panel or each is c else each for each in arguments]
                read[4] = flags | gemm.READ
                gemm.contract.run(dtype, read, gemm.Rows(rows, t.vectors))
                packed = [each.copy() if each is panel or each is c else each for each in arguments]
                gemm.contract.run(dtype, packed, gemm.Rows(rows, t.vectors))
                np.testing.assert_array_equal(read[3], packed[3])
                np.testing.assert_array_equal(read[2], panel)  # not written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_packed(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    for rows, vectors, flags in itertools.product({1, t.rows}, range(1, t.vectors + 1), (0, gemm.ADD)):
        for depth in (1, 6):
            a, panel = whole_numbers(rng, depth * rows, dtype), whole_numbers(rng, depth * t.columns, dtype)
            c = whole_numbers(rng, (rows + 1) * t.columns, dtype)
            agree(gemm.contract_packed, dtype, (depth, a, panel, c, flags), gemm.Rows(rows, vectors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_narrow(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    if not t.narrow_columns:
        pytest.skip("the tile of this processor has no such columns")
    for rows, depth in itertools.product(range(1, t.rows + 1), (1, 5)):
        a, panel = whole_numbers(rng, depth * rows, dtype), whole_numbers(rng, depth * t.columns, dtype)
        sums = memory(rng, t.narrow_columns * t.narrow_pitch + 3, dtype)
        agree(gemm.contract_narrow, dtype, (rows, depth, a, panel, sums))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_pixels(dtype: np.dtype, rng: np.random.Generator) -> None:
    """Columns of a filter that see all pixels of a row, some, one and none; rows that lie anywhere."""
    t = tile_for(dtype)
    if not t.pixels:
        pytest.skip("the tile of this processor has no such products")
    all_seen, some, single = ((0, 3), (0, 3), (0, 3)), ((1, 3), (0, 3), (0, 2), (0, 0)), ((0, 1),)
    shapes = [(3, 1, all_seen), (3, 2, some), (1, 1, single), (t.pixels, 1, ((0, t.pixels), (2, t.pixels)))]
    for pixels, step, seen in shapes:
        for rows in {1, gemm.pixel_rows(t, pixels)}:
            channels, tap_rows, pitch, w_pitch = 3, 2, 170, len(seen) * 2 * t.columns + 5
            of_rows = np.array([4, 0, 60, len(seen) * t.columns])
            of_taps, sources = np.arange(len(seen)) * 2, np.arange(gemm.MOST_ROWS) * 11
            places = np.arange(gemm.MOST_ROWS)[::-1] * (pixels * t.columns + 7)
            w, source = whole_numbers(rng, channels * w_pitch, dtype), whole_numbers(rng, channels * pitch, dtype)
            c, bias = memory(rng, gemm.MOST_ROWS * (pixels * t.columns + 7), dtype), memory(rng, t.columns, dtype)
            for flags in FLAGS:
                agree(
                    gemm.contract_pixels, dtype,
                    (channels, tap_rows, of_rows, of_taps, w, w_pitch, source, pitch, sources, c, places, flags, bias),
                    gemm.PixelRows(rows, pixels, step, seen),
                )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_pixels_by_channels(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    for pixels, vectors in itertools.product({1, 2, 4, t.rows}, range(1, t.vectors + 1)):
        for left in (0, 1):  # lanes of the last vector that have no channel
            rows, depth, step = vectors * t.lanes - left, 3, 5
            pitch = vectors * t.lanes + 3
            offsets = rng.permutation(depth) * 7
            w = whole_numbers(rng, depth * rows + t.lanes, dtype)
            source = whole_numbers(rng, pixels * step + 7 * depth, dtype)
            c, bias = memory(rng, pixels * pitch, dtype), whole_numbers(rng, vectors * t.lanes, dtype)
            for flags in FLAGS:
                agree(
                    gemm.contract_pixels_by_channels, dtype,
                    (depth, offsets, w, rows, source, step, c, pitch, flags, bias), gemm.PixelTile(pixels, vectors),
                )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_kernel(dtype: np.dtype, rng: np.random.Generator) -> None:
    t = tile_for(dtype)
    shapes = itertools.product(range(1, t.gradient_rows + 1), range(1, t.gradient_vectors + 1))
    for (rows, vectors), (runs, length, step) in itertools.product(shapes, ((1, 1, 1), (3, 5, 2))):
        columns = vectors * t.lanes
        run_offset, row_offset = np.arange(runs) * 13, rng.permutation(rows) * 3
        a = whole_numbers(rng, runs * 13 + rows * 3 + length * step, dtype)
        panel = whole_numbers(rng, runs * length * columns, dtype)
        c = whole_numbers(rng, rows * (columns + 2), dtype)
        agree(
            gemm.weight_gradient_kernel, dtype,
            (rows, vectors, runs, run_offset, length, step, a, row_offset, panel, c, columns + 2, panel, 64, 8),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_panel(dtype: np.dtype, rng: np.random.Generator) -> None:
    """From one run of memory up to one for every pixel."""
    t = tile_for(dtype)
    for interrupted in ([], [1], [1, 2], [1, 2, 3], range(1, min(6, t.columns)), range(1, t.columns)):
        runs, end = run_table(t.lanes, t.vectors, list(interrupted), gap=3)
        channels, taps, channel_pitch = 2, 3, 40
        tap_offset = rng.permutation(taps) * 9
        source = memory(rng, end + channels * channel_pitch + 9 * taps + t.columns, dtype)
        panel = memory(rng, (channels * taps + 1) * t.columns, dtype)
        agree(gemm.pack_panel, dtype, (panel, source, channels, channel_pitch, taps, tap_offset, runs, 64))
