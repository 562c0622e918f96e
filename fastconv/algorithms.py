"""Which algorithm runs a convolution: the caller's choice, or the one that is fastest for the shape.

`choose` is asked once for every call. Its answer depends on the shape of one sample, the element type and the pass
alone, never on the number of threads, the batch or what ran before, so that results stay the same bits.
"""

from __future__ import annotations

import functools

import numpy as np

from .arguments import ALGORITHMS, check_choice
from .geometry import ConvGeometry

OPERATIONS = ("forward", "input_grad", "weight_grad")

# Operations a nanosecond of the direct algorithm on one core, in float32, by the channels of a group. Measured by
# `python -m bench.crossover` on AVX2 (docs/algorithms.md has the tables). float64 and two threads change these and the
# costs of the FFT (`fft.TRANSFORM_RATE` and its neighbours) alike.
DIRECT_RATE = {"plane": 60.0, "matrix": 90.0}

# The FFT must promise to be this much faster: the estimates are right within a third, and its error is another kind.
FFT_MARGIN = 1.5

# Winograd pays from this many channels on both sides, of at least this many output pixels: fewer leave its transforms
# and its (m + 2)^2 small matrix products more time than the direct sum takes.
WINOGRAD_CHANNELS, WINOGRAD_PIXELS = 32, 14 * 14


def why_not(algorithm: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, backend: str) -> str | None:
    """Why `algorithm` does not apply to `operation` on this shape and backend; None if it does."""
    if algorithm in ("auto", "direct"):
        return None
    if backend != "cpu":
        return f"the {backend} backend has the direct algorithm only"
    from .cpu import fft, winograd  # which import Numba

    if algorithm == "winograd":
        return winograd.why_not(operation, geometry)
    return fft.why_not(operation, geometry)


def why_slower(algorithm: str, operation: str, geometry: ConvGeometry) -> str | None:
    """Why `algorithm`, which applies, is not expected to be the fastest for one sample; None if it is."""
    from .cpu import fft

    if algorithm == "winograd":
        channels = min(geometry.in_channels, geometry.out_channels)
        size = geometry.output_size if operation == "forward" else geometry.input_size
        if channels < WINOGRAD_CHANNELS:
            return f"it pays from {WINOGRAD_CHANNELS} channels on, here are {channels}"
        if size[1] * size[2] < WINOGRAD_PIXELS:
            return f"it pays from {WINOGRAD_PIXELS} pixels on, here are {size[1] * size[2]}"
        return None
    direct, by_fft = direct_nanoseconds(geometry), fft.nanoseconds(operation, geometry)
    if FFT_MARGIN * by_fft < direct:
        return None
    return f"about {by_fft / 1e6:.3g} ms of one core for a sample, against {direct / 1e6:.3g} ms of the direct sum"


def direct_nanoseconds(geometry: ConvGeometry) -> float:
    """What the direct sum costs for one sample on one core, roughly."""
    kind = "plane" if geometry.in_channels_per_group == 1 else "matrix"
    return geometry.flops / max(geometry.batch, 1) / DIRECT_RATE[kind]


@functools.lru_cache(maxsize=4096)
def fastest(operation: str, geometry: ConvGeometry, dtype: np.dtype, backend: str) -> str:
    """The algorithm of "auto": the first that applies and pays, of Winograd, FFT and the direct sum."""
    if backend != "cpu" or max(geometry.kernel_size) < 3:
        return "direct"
    for algorithm in ("winograd", "fft"):
        if why_not(algorithm, operation, geometry, dtype, backend) is None:
            if why_slower(algorithm, operation, geometry) is None:
                return algorithm
    return "direct"


def choose(
    function: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, algorithm: str, backend: str
) -> str:
    """Return the algorithm to run; raise ValueError if the one asked for does not apply."""
    check_choice(function, "algorithm", algorithm, ALGORITHMS)
    if algorithm == "auto":
        return fastest(operation, geometry, dtype, backend)
    reason = why_not(algorithm, operation, geometry, dtype, backend)
    if reason is not None:
        raise ValueError(f"{function}: algorithm={algorithm!r} does not apply: {reason}")
    return algorithm
