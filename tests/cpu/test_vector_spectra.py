"""The product of spectra against its plain sibling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastconv.cpu.vector import spectra
from vectors import DTYPES, agree, tile_for, whole_numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, spectra.SPECTRA_ROWS + 1))
def test_multiply_spectra(dtype: np.dtype, rows: int, rng: np.random.Generator) -> None:
    """Every number of rows, of A and of its conjugate, stored and added, with steps larger than the vectors."""
    vectors, terms = 2, 3
    size = vectors * tile_for(dtype).lanes
    a_term, b_term, c_row = size + 2, size + 4, size + 6
    a_row = terms * a_term
    for conjugate, add in itertools.product((0, 1), (0, 1)):
        a, b, c = (whole_numbers(rng, n, dtype) for n in (rows * a_row, terms * b_term, rows * c_row))
        agree(
            spectra.multiply_spectra, dtype,
            (rows, vectors, terms, a, a_row, a_term, b, b_term, c, c_row, conjugate, add),
        )  # fmt: skip
