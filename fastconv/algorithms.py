"""Which algorithm runs a convolution: the caller's choice, or the one that is fastest for the shape.

`choose` is asked once for every call. Its answer depends on the shape of one sample, the element type and the pass
alone, never on the number of threads, the batch or what ran before, so that results stay the same bits.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from .arguments import ALGORITHMS, check_choice
from .geometry import ConvGeometry

OPERATIONS = ("forward", "input_grad", "weight_grad")

# Operations a nanosecond of the direct sum on one core, in float32: with one channel in one dimension, and otherwise.
# Measured by `python -m bench.crossover fft` on AVX2, as the rates of the FFT in `cpu.fft` are; docs/algorithms.md has
# the table of an AVX-512 machine, which the same rates fit. float64 halves all of them.
DIRECT_RATE_OF_LINES, DIRECT_RATE = 60.0, 90.0

# The FFT must promise to be this much faster: the estimates are right within a third, its error is of another kind, and
# a second thread makes it 1.1 to 1.8 times faster where the direct sum becomes 1.9 times faster.
FFT_MARGIN = 1.6

# Terms that the direct sum adds in one chain on AVX-512 (`cpu.contraction.PANEL_BYTES`; twice as many on AVX2),
# unless there is one channel.
LONGEST_CHAIN = 384

# Winograd pays for planes of at least so many pixels, from so many channels times the square root of the pixels on:
# from 79 channels of 14 x 14, 40 of 28 x 28 and 20 of 56 x 56 pixels. Fewer leave its transforms, that of the weights
# included, more time than they save. Measured by `python -m bench.crossover winograd` (docs/algorithms.md); since the
# choice must not depend on the batch, it is between what pays for one sample and for four.
WINOGRAD_PIXELS, WINOGRAD_SIZE = 14 * 14, 1100

# The same of the weight gradient, whose transforms have no weights among them: from 16 channels of 14 x 14 pixels on,
# 32 of 7 x 7.
WINOGRAD_GRADIENT_CHANNELS, WINOGRAD_GRADIENT_PIXELS, WINOGRAD_GRADIENT_SIZE = 16, 7 * 7, 224

# Times fewer multiplications than the definition that its transforms take: 4 if the tiles are whole, less where they
# reach far beyond the image, which is never made up for.
WINOGRAD_SAVES = 1.6


def why_not(algorithm: str, operation: str, geometry: ConvGeometry, dtype: np.dtype, backend: str) -> str | None:
    """Why `algorithm` does not apply to `operation` on this shape and backend; None if it does."""
    if algorithm in ("auto", "direct", "loops"):
        return None
    if backend != "cpu":
        return f"the {backend} backend has the direct algorithm and the loops only"
    from .cpu import fft, winograd  # which import Numba

    if algorithm == "winograd":
        return winograd.why_not(operation, geometry)
    return fft.why_not(operation, geometry)


def why_slower(algorithm: str, operation: str, geometry: ConvGeometry) -> str | None:
    """Why `algorithm`, which applies, is not expected to be the fastest for one sample; None if it is."""
    from .cpu import fft

    if algorithm == "winograd":
        channels = min(geometry.in_channels, geometry.out_channels)
        size = geometry.input_size if operation == "input_grad" else geometry.output_size
        pixels, fewest, least, enough = size[1] * size[2], 1, WINOGRAD_PIXELS, WINOGRAD_SIZE
        if operation == "weight_grad":
            fewest, least, enough = WINOGRAD_GRADIENT_CHANNELS, WINOGRAD_GRADIENT_PIXELS, WINOGRAD_GRADIENT_SIZE
        if pixels < least:
            return f"it pays from {least} pixels on, here are {pixels}"
        fewest = max(fewest, math.ceil(enough / math.sqrt(pixels)))
        if channels < fewest:
            return f"of {size[1]}x{size[2]} pixels it pays from {fewest} channels on, here are {channels}"
        saved = geometry.flops / max(1, flops("winograd", operation, geometry))
        if saved < WINOGRAD_SAVES:
            return f"its tiles reach beyond {size[1]}x{size[2]} pixels: {saved:.3g} times fewer multiplications"
        return None
    direct, by_fft = direct_nanoseconds(geometry), fft.nanoseconds(operation, geometry)
    if FFT_MARGIN * by_fft < direct:
        return None
    return f"about {by_fft / 1e6:.3g} ms of one core for a sample, against {direct / 1e6:.3g} ms of the direct sum"


def why(algorithm: str, operation: str, geometry: ConvGeometry) -> str:
    """Why "auto" takes this one, which is not the direct sum."""
    if algorithm == "winograd":
        saved = geometry.flops / flops("winograd", operation, geometry)
        return f"{saved:.3g} times fewer multiplications than the definition, of enough channels and pixels"
    from .cpu import fft

    by_fft, direct = fft.nanoseconds(operation, geometry), direct_nanoseconds(geometry)
    return f"about {by_fft / 1e6:.3g} ms of one core for a sample, against {direct / 1e6:.3g} ms of the direct sum"


def direct_nanoseconds(geometry: ConvGeometry) -> float:
    """What the direct sum costs for one sample on one core, roughly."""
    lines = geometry.in_channels_per_group == 1 and geometry.kernel_size[:2] == (1, 1)
    return geometry.flops / max(geometry.batch, 1) / (DIRECT_RATE_OF_LINES if lines else DIRECT_RATE)


@functools.lru_cache(maxsize=4096)
def fastest(operation: str, geometry: ConvGeometry, dtype: np.dtype, backend: str) -> str:
    """The algorithm of "auto": the first that applies and pays, of Winograd, FFT and the direct sum."""
    if backend != "cpu" or max(geometry.kernel_size) < 3:
        return "direct"
    for algorithm in ("winograd", "fft"):
        applies = why_not(algorithm, operation, geometry, dtype, backend) is None
        if applies and why_slower(algorithm, operation, geometry) is None:
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


def flops(algorithm: str, operation: str, geometry: ConvGeometry) -> int:
    """Additions and multiplications, those of the transforms included where they are more than a small part."""
    from .cpu import fft, winograd

    if algorithm == "winograd":
        m = winograd.tile_size(geometry, operation)
        height, width = (geometry.input_size if operation == "input_grad" else geometry.output_size)[1:]
        tiles = geometry.batch * -(-height // m) * -(-width // m)
        return 2 * tiles * (m + 2) ** 2 * geometry.in_channels * geometry.out_channels
    if algorithm == "fft":
        return fft.flops(operation, geometry)
    return geometry.flops


def expected_error(algorithm: str, operation: str, geometry: ConvGeometry, dtype: np.dtype) -> float:
    """The rms error for data of unit variance, relative to the rms result; docs/accuracy.md has what was measured.

    A chain of n multiply-adds of random terms has an error of about eps * sqrt(n / 50): each rounds a partial sum that
    has grown as a random walk. How long the chains are is the algorithm's; a transform of n points adds
    eps**2 * 0.1 log2(n) to the square, three times (for the spectra of both operands, and back).
    """
    from .cpu import fft, winograd

    eps = float(np.finfo(dtype).eps)
    if operation == "weight_grad":
        terms = geometry.batch * math.prod(geometry.output_size)
    elif operation == "input_grad":
        terms = geometry.out_channels_per_group * math.prod(geometry.kernel_size)
    else:
        terms = geometry.in_channels_per_group * math.prod(geometry.kernel_size)
    if algorithm == "winograd":
        # F(4x4, 3x3) has numbers of up to 4 where the sum has 1
        if operation == "weight_grad":  # a chain of tiles for each part of them, of which there are more or less 4
            tiles = terms / winograd.tile_size(geometry, operation) ** 2
            return eps * math.sqrt(6 + tiles / 16)
        # chains of channels, and a chain of those
        channels = terms / 9
        growth = math.sqrt(6 + 0.49 * min(channels, winograd.CHAIN) + 0.023 * channels)
        return eps * growth / (1 if winograd.tile_size(geometry, operation) == 4 else 2)
    if algorithm == "fft":
        tiling = fft.make_tiling(operation, geometry)
        added = terms / math.prod(geometry.kernel_size)
        if operation == "weight_grad":
            added = geometry.batch * math.prod(tiling.count)
        return eps * math.sqrt(0.3 * math.log2(math.prod(tiling.tile)) + added / 50)
    if algorithm == "loops":
        # one chain; that of the weight gradient is one of rows, and of images, whose sums are chains
        depth, height, width = geometry.output_size
        chain: float = geometry.batch + depth * height + width if operation == "weight_grad" else terms
    elif operation == "weight_grad":
        # split over tasks, the fewer the more channels there are; not where channels are the lanes of depthwise vectors
        chain = terms if geometry.in_channels_per_group == 1 else terms / 4
    elif geometry.in_channels_per_group == 1 or terms <= LONGEST_CHAIN:
        chain = terms
    else:
        chain = LONGEST_CHAIN + terms / LONGEST_CHAIN
    return eps * math.sqrt(max(chain, 1) / 50)
