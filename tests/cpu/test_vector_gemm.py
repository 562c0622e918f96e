"""The microkernels of matrix products, each against its plain sibling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastconv.cpu.vector import gemm
from vectors import DTYPES, agree, tile_for, whole_numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype: np.dtype, rng: np.random.Generator) -> None:
    """Every number of rows and of vectors, each with what it may do to the sums, and an output wider than they are."""
    t = tile_for(dtype)
    no_table = np.zeros(1, np.int64)
    for rows, vectors in itertools.product({1, 2, t.rows - 1, t.rows}, range(1, t.vectors + 1)):
        for flags in (0, gemm.ADD, gemm.BIAS, gemm.RELU, gemm.ADD | gemm.BIAS | gemm.RELU):
            depth, pitch = 5, t.columns + 3
            a, panel = whole_numbers(rng, depth * rows, dtype), whole_numbers(rng, depth * t.columns, dtype)
            c, bias = whole_numbers(rng, rows * pitch, dtype), whole_numbers(rng, rows, dtype)
            agree(
                gemm.contract, dtype, (depth, a, panel, c, flags, pitch, bias, a, no_table, no_table, 0),
                gemm.Rows(rows, vectors),
            )  # fmt: skip
