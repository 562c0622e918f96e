"""Does the algorithm that a caller asks for apply? On the CPU `cpu.methods` knows, and chooses if none is asked for."""

from __future__ import annotations

import numpy as np

from .arguments import ALGORITHMS, check_choice
from .geometry import ConvGeometry


def why_not(algorithm: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, backend: str) -> str | None:
    """Why `algorithm` does not apply to `operation` on this shape and backend; None if it does."""
    if algorithm in ("auto", "direct", "loops"):
        return None
    if backend != "cpu":
        return f"the {backend} backend has the direct algorithm and the loops only"
    from .cpu import methods  # which imports Numba

    return methods.why_not(algorithm, methods.problem_of(operation, geometry, dtype, algorithm))


def check(
    function: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, algorithm: str, backend: str
) -> None:
    """Raise ValueError if there is no such algorithm, or it does not apply."""
    check_choice(function, "algorithm", algorithm, ALGORITHMS)
    if algorithm in ("auto", "direct"):
        return
    reason = why_not(algorithm, operation, geometry, dtype, backend)
    if reason is not None:
        raise ValueError(f"{function}: algorithm={algorithm!r} does not apply: {reason}")
