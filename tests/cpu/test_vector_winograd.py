"""The transforms of Winograd convolution, each against its plain sibling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastconv.cpu.vector import winograd
from vectors import DTYPES, agree, tile_for, whole_numbers

# Coefficients for tiles of 2 x 2 are powers of two, and results of whole numbers exact; those for 4 x 4 are not.
CASES = list(itertools.product(DTYPES, winograd.TILES))
TRANSFORMS = {  # how many elements are read and written
    "transform_input": (lambda m: (m + 2) ** 2, lambda m: (m + 2) ** 2),
    "transform_weight": (lambda m: 9, lambda m: (m + 2) ** 2),
}
OF_ROWS = {  # and those whose source has rows of vectors
    "transform_pixels": lambda m: m + 2,
    "transform_output_gradient": lambda m: m,
}


def tolerance(dtype: np.dtype, m: int) -> float:
    return 0 if m == 2 else 32 * float(np.finfo(dtype).eps)


def with_gaps(lanes: int, count: int) -> tuple[int, int]:
    """A pitch that is no multiple of the lanes, and elements of an array of so many vectors."""
    pitch = lanes + 3
    return pitch, pitch * count


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("dtype", "m"), CASES, ids=str)
def test_transforms(name: str, dtype: np.dtype, m: int, rng: np.random.Generator) -> None:
    (reads, writes), lanes = TRANSFORMS[name], tile_for(dtype).lanes
    pitch, size = with_gaps(lanes, reads(m))
    target_pitch, target_size = with_gaps(lanes, writes(m))
    source, target = whole_numbers(rng, size, dtype), whole_numbers(rng, target_size + lanes, dtype)
    agree(getattr(winograd, name), dtype, (m, target, target_pitch, source, pitch), relative=tolerance(dtype, m))


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize(("dtype", "m"), CASES, ids=str)
def test_transforms_of_rows(name: str, dtype: np.dtype, m: int, rng: np.random.Generator) -> None:
    n, lanes = OF_ROWS[name](m), tile_for(dtype).lanes
    pitch = (n + 1) * lanes
    target_pitch, target_size = with_gaps(lanes, (m + 2) ** 2)
    source, target = whole_numbers(rng, n * pitch, dtype), whole_numbers(rng, target_size + lanes, dtype)
    agree(getattr(winograd, name), dtype, (m, target, target_pitch, source, pitch), relative=tolerance(dtype, m))


@pytest.mark.parametrize("relu", [0, 1])
@pytest.mark.parametrize(("dtype", "m"), CASES, ids=str)
def test_transform_output(dtype: np.dtype, m: int, relu: int, rng: np.random.Generator) -> None:
    """With bias, through max(0, .) or not, and an infinite product in one lane, whose outputs are left aside."""
    lanes = tile_for(dtype).lanes
    pitch, size = with_gaps(lanes, (m + 2) ** 2)
    target_pitch = m * lanes + 5
    source, target = whole_numbers(rng, size, dtype), whole_numbers(rng, target_pitch * m + lanes, dtype)
    bias, suspect = whole_numbers(rng, 1, dtype), np.zeros(lanes, dtype)
    arguments = (m, target, target_pitch, source, pitch, bias, relu, suspect)
    agree(winograd.transform_output, dtype, arguments, relative=tolerance(dtype, m))

    source[pitch * (m + 3) + 1] = np.inf
    winograd.transform_output.run(dtype, arguments)
    np.testing.assert_array_equal(np.isnan(suspect), np.arange(lanes) == 1)


@pytest.mark.parametrize(("dtype", "m"), CASES, ids=str)
def test_transform_weight_gradient(dtype: np.dtype, m: int, rng: np.random.Generator) -> None:
    lanes = tile_for(dtype).lanes
    pitch, size = with_gaps(lanes, (m + 2) ** 2)
    target_pitch, target_size = with_gaps(lanes, 9)
    source, target = whole_numbers(rng, size, dtype), whole_numbers(rng, target_size + lanes, dtype)
    suspect = np.zeros(lanes, dtype)
    arguments = (m, target, target_pitch, source, pitch, suspect)
    agree(winograd.transform_weight_gradient, dtype, arguments, relative=tolerance(dtype, m))

    source[pitch * (m + 3)] = np.nan
    winograd.transform_weight_gradient.run(dtype, arguments)
    np.testing.assert_array_equal(np.isnan(suspect), np.arange(lanes) == 0)


@pytest.mark.parametrize("m", winograd.TILES)
def test_matrices_make_a_convolution(m: int, rng: np.random.Generator) -> None:
    """A^T [(G w) * (B^T d)] is the correlation of d with w, which is what the three matrices are for."""
    at, g, bt = winograd.matrices(m)
    d, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ d)), np.correlate(d, w, "valid"), rtol=0, atol=1e-14 * 50)
