"""How the vector kernels are tested: each run from Python beside its sibling in plain loops, on numbers that are exact.

Small whole numbers have exact sums in any order, so the two must agree to the last bit. Arrays have guards around what
a kernel may write: whatever lies beyond must stay as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastconv.cpu.vector.tile import Tile, tile

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]


def tile_for(dtype: np.dtype) -> Tile:
    return tile(dtype.itemsize * 8)


def memory(rng: np.random.Generator, size: int, dtype: np.dtype) -> np.ndarray:
    """Numbers all of which differ, so that one that is in the wrong place is seen."""
    return rng.permutation(size).astype(dtype)


def whole_numbers(rng: np.random.Generator, size: int, dtype: np.dtype) -> np.ndarray:
    return rng.integers(-4, 5, size).astype(dtype)


def agree(
    kernel: Any, dtype: np.dtype, arguments: Sequence[Any], variant: Any = None, relative: float = 0.0
) -> Any:  # fmt: skip
    """Run `kernel` and its plain sibling on copies of the same arguments; all arrays must be the same after it.

    A kernel that rounds may differ by `relative` times the largest number of an array.

    The sibling is given the tile too (``tile=``), and the variant where there is one. Returns what the kernel returned,
    which must be what the sibling returned.
    """
    first, second = ([a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2))
    options = {} if variant is None else {"variant": variant}
    expected = kernel.reference(*second, tile=tile_for(dtype), **options)  # first: it checks its indices
    result = kernel.run(dtype, first, variant)
    for name, one, other in zip(kernel.kernel.names, first, second, strict=True):
        if isinstance(one, np.ndarray):
            _assert_same(one, other, relative, f"{kernel.kernel.name}, {variant}: {name}")
    if result is not None or expected is not None:
        _assert_same(np.asarray(result), np.asarray(expected), relative, f"{kernel.kernel.name}: result")
    return result


def _assert_same(one: np.ndarray, other: np.ndarray, relative: float, what: str) -> None:
    if relative == 0.0:
        np.testing.assert_array_equal(one, other, err_msg=what)
    else:
        largest = np.abs(other[np.isfinite(other)]).max(initial=0.0)
        np.testing.assert_allclose(one, other, rtol=0, atol=relative * largest, err_msg=what)
