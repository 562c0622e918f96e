"""Convolution by the fast Fourier transform, for large kernels: the overlap-save method on tiles.

In the frequency domain a convolution is a product. Per tile of the padded input (circular, of `tile` points)

    forward          y  = IFFT( sum over c of  conj(W[o, c]) X[c] )       results 0 .. step
    input gradient   dx = IFFT( sum over o of  W[o, c] DY[o] )            results span - 1 .. tile
    weight gradient  dw = IFFT( sum over n, tiles of  conj(DY[o]) X[c] )  results 0 .. span

(Oppenheim and Schafer, Discrete-Time Signal Processing, section 8.7.3.) A tile gives step = tile - span + 1 results in
each dimension, since that many of its points see no wrap-around. The dilation is part of the kernel (`span` counts its
gaps) and the results between the strides are not stored: both cost what a convolution without them would. Dimensions in
which the kernel has one tap are not transformed.

Channels are summed in the frequency domain, and so are the tiles of the weight gradient: one inverse transform for
each result, however many terms it has. This sum is a body of its own over the vector function `multiply_spectra`,
not a matrix product for each frequency: the transforms leave the frequencies next to one another in memory, which is
how vectors want them, depthwise layers included; a matrix product would need a transposed copy of every spectrum, and
the bits of a BLAS depend on its threads. Here a frequency is one chain of multiply-adds over the channels.

The transforms are pocketfft's: by way of SciPy if it is installed, which transforms several lines in one vector and
shares lines out to threads, and of NumPy otherwise, which does neither. A line is transformed by the same operations
whatever lies beside it, so the bits depend neither on the threads nor on the batch.

Rounding errors are relative to the largest results of a tile, not to each (docs/accuracy.md), and one nan would fill
its tile. So operands are looked at first: a sample with a nan, an infinity or products that may overflow is summed
directly.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..geometry import ConvGeometry, Size3
from ..packed import PackedWeights
from . import tasks
from .fft_bodies import Gather, Multiply, Scatter, gather, multiply, scatter
from .tasks import data_address
from .threads import get_num_threads
from .vector.tile import tile as machine

# Bytes of the tiles, their spectra and the results that are in memory at a time, and of the spectra of weights, as far
# as one tile and one output channel allow. Chunks that stay in the last cache are 1.3 times faster than larger ones.
CHUNK_BYTES = 4 * 1024 * 1024
SPECTRA_BYTES = 64 * 1024 * 1024

_TILES, _PRODUCT = 1, 2  # the slots of `tasks.workspace` that are used

LARGEST_TILE = 2**20  # points, unless the kernel needs more: larger ones have no advantage

# What the parts cost on one core, for the choice of the tile and `methods`: operations a nanosecond of the
# transforms (2.5 n log2 n for n points) and of the products of spectra (8 for each frequency), and points a nanosecond
# that are copied. Measured in float32, with SciPy; the table of docs/algorithms.md shows how well they fit.
TRANSFORM_RATE, PRODUCT_RATE, COPY_RATE = 14.0, 30.0, 2.0
CALL_NANOSECONDS = 60_000  # Python's part


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How the results of one sample are cut into tiles, per dimension, as if stride and dilation were 1."""

    span: Size3  # taps of the kernel and the gaps between them
    positions: Size3  # forward and weight gradient: the outputs; input gradient: the elements of the (padded) input
    tile: Size3
    flops: float  # of one sample, and of the spectra of the weights
    nanoseconds: float  # of the same on one core, by the rates above

    @property
    def step(self) -> Size3:
        d, h, w = (t - s + 1 for t, s in zip(self.tile, self.span, strict=True))
        return d, h, w

    @property
    def count(self) -> Size3:
        d, h, w = (-(-p // s) for p, s in zip(self.positions, self.step, strict=True))
        return d, h, w

    @property
    def axes(self) -> tuple[int, ...]:
        """Dimensions that are transformed; the last of them with real numbers on one side."""
        return tuple(i for i in range(3) if self.tile[i] > 1)

    @property
    def spectrum(self) -> Size3:
        sizes = list(self.tile)
        sizes[self.axes[-1]] = sizes[self.axes[-1]] // 2 + 1
        return sizes[0], sizes[1], sizes[2]


@functools.cache
def _fast_sizes() -> np.ndarray:
    """Even numbers with no prime factor above 7, which transform fast, up to `LARGEST_TILE`; and 1."""
    sizes = {1}
    for prime in (2, 3, 5, 7):
        grown = sizes
        while grown:
            grown = {n * prime for n in grown if n * prime <= LARGEST_TILE}
            sizes |= grown
    return np.array([n for n in sorted(sizes) if n % 2 == 0], np.int64)


def _candidates(span: int, positions: int, most: int) -> list[int]:
    """Tile sizes to try in one dimension: at most `most`, from little over the kernel to everything in one tile."""
    if span == 1:
        return [1]
    fast, whole = _fast_sizes(), positions + span - 1
    first, last = np.searchsorted(fast, [min(span + 1, whole), whole])
    if last >= len(fast):
        whole_tile = 1 << (whole - 1).bit_length() if first >= len(fast) else int(fast[-1])
        return [*fast[first :: max(1, (len(fast) - int(first)) // most + 1)].tolist(), whole_tile]
    return sorted({int(n) for n in fast[np.unique(np.linspace(first, last, most).astype(np.int64))]})


@functools.lru_cache(maxsize=1024)
def make_tiling(operation: str, geometry: ConvGeometry) -> Tiling:
    """The tiles that cost least for one sample. They depend on nothing else, and decide the bits of the result."""
    span = _of_each(lambda k, d: d * (k - 1) + 1, geometry.kernel_size, geometry.dilation)
    if operation == "input_grad":
        zeros = geometry.padding_mode == "zeros"
        positions = geometry.input_size if zeros else _of_each(len, geometry.input_coordinates)
        outputs, per_group = geometry.in_channels, geometry.out_channels_per_group
    else:
        positions = _of_each(lambda p, s: (p - 1) * s + 1, geometry.output_size, geometry.stride)
        outputs, per_group = geometry.out_channels, geometry.in_channels_per_group
    pairs = outputs * per_group
    inputs = geometry.in_channels + geometry.out_channels - outputs
    transformed = sum(s > 1 for s in span)
    most = {0: 1, 1: 200, 2: 40, 3: 14}[transformed]
    each = [_candidates(s, p, most) for s, p in zip(span, positions, strict=True)]
    d, h, w = np.meshgrid(*each, indexing="ij")
    points = (d * h * w).astype(np.float64)
    tiles = np.ones_like(points)
    for size, s, p in zip((d, h, w), span, positions, strict=True):
        tiles *= np.ceil(p / (size - s + 1))
    transforms = (inputs + outputs) * tiles + pairs
    of_transforms = transforms * 2.5 * points * np.log2(np.maximum(points, 2))
    of_products = pairs * tiles * points / 2 * 8
    cost = (
        CALL_NANOSECONDS + of_transforms / TRANSFORM_RATE + of_products / PRODUCT_RATE + transforms * points / COPY_RATE
    )
    cost = np.where((points > LARGEST_TILE) & (points > points.min()), np.inf, cost)
    best = np.unravel_index(np.argmin(cost), cost.shape)
    tile = int(d[best]), int(h[best]), int(w[best])
    return Tiling(span, positions, tile, float(of_transforms[best] + of_products[best]), float(cost[best]))


def _of_each(function: Any, *values: Any) -> Size3:
    d, h, w = map(function, *values)
    return d, h, w


def why_not(operation: str, geometry: ConvGeometry) -> str | None:
    """Why a convolution cannot be done this way; None if it can."""
    if geometry.kernel_size == (1, 1, 1):
        return "the kernel is a single tap, so there is nothing to transform (expected a kernel of 2 taps or more)"
    return None


def nanoseconds(operation: str, geometry: ConvGeometry) -> float:
    """What one sample costs on one core, roughly."""
    return make_tiling(operation, geometry).nanoseconds


def flops(operation: str, geometry: ConvGeometry) -> int:
    """Additions and multiplications of a call."""
    return round(make_tiling(operation, geometry).flops) * max(geometry.batch, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def library() -> Any:
    """The module that transforms: scipy.fft, or numpy.fft where there is no SciPy."""
    return importlib.import_module("numpy.fft" if importlib.util.find_spec("scipy") is None else "scipy.fft")


def _options(array: np.ndarray) -> dict[str, Any]:
    if library().__name__ == "numpy.fft":
        return {}
    # waking SciPy's threads takes some 20 us
    return {"workers": get_num_threads() if array.size >= 2**15 else 1}


def _spectra(tiles: np.ndarray, tiling: Tiling) -> np.ndarray:
    """The spectra of arrays in the last three dimensions, filled up with zeros to the size of a tile."""
    *others, last = tiling.axes
    fft, options = library(), _options(tiles)
    spectra = fft.rfft(tiles, tiling.tile[last], last - 3, **options)
    for axis in reversed(others):
        spectra = _complex(fft.fft, spectra, tiling.tile[axis], axis - 3, options)
    return np.ascontiguousarray(spectra)


def _inverse(spectra: np.ndarray, tiling: Tiling, firsts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The results firsts .. firsts + counts of each tile; in the last dimension transformed, all of them."""
    *others, last = tiling.axes
    fft, options = library(), _options(spectra)
    for axis in others:
        spectra = _complex(fft.ifft, spectra, tiling.tile[axis], axis - 3, options)
        wanted = [slice(None)] * 5
        wanted[axis - 3] = slice(firsts[axis], firsts[axis] + counts[axis])
        spectra = spectra[tuple(wanted)]
    return np.ascontiguousarray(fft.irfft(spectra, tiling.tile[last], last - 3, **options))


def _complex(transform: Any, spectra: np.ndarray, n: int, axis: int, options: dict[str, Any]) -> np.ndarray:
    """A complex transform, in place where the library can."""
    if options and spectra.shape[axis] == n:
        return transform(spectra, n, axis, overwrite_x=True, **options)
    return transform(spectra, n, axis, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The three passes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the tiles of an array come from: per dimension the element at each position, -1 for a zero."""

    tables: tuple[np.ndarray, ...]
    used: Size3  # points of a tile that are filled
    run: tuple[int, int]  # positions in the last dimension whose elements follow one another


def _source(tables: Sequence[np.ndarray], tiling: Tiling, used: Size3) -> _Source:
    """`tables` from position to element, cut or filled up with zeros to the tiles."""
    whole = []
    for table, count, step, tile in zip(tables, tiling.count, tiling.step, tiling.tile, strict=True):
        filled = np.full((count - 1) * step + tile, -1, np.int64)
        part = table[: len(filled)]
        filled[: len(part)] = part
        whole.append(filled)
    last = whole[2]
    if (last < 0).all():  # every window lies in the padding
        return _Source(tuple(whole), used, (0, 0))
    first = int(np.argmax(last >= 0))
    breaks = np.flatnonzero(np.diff(last[first:]) != 1)
    return _Source(tuple(whole), used, (first, first + int(breaks[0]) + 1 if len(breaks) else len(last)))


def _strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(step // array.itemsize for step in array.strides)


def _tiles(array: np.ndarray, source: _Source, tiling: Tiling, channels: range, chunk: range) -> np.ndarray:
    """[channel][tile][D][H][W]: the tiles `chunk`, numbered over all samples, of these channels."""
    shape = (len(channels), len(chunk), *tiling.tile)
    tiles = tasks.workspace(math.prod(shape), array.dtype, _TILES).reshape(shape)
    n_step, c_step, *step = _strides(array)
    first, end = source.run
    parameters = Gather.of(
        array=data_address(array), n_step=n_step, c_step=c_step, step=tuple(step), tiles=data_address(tiles),
        tile=tiling.tile, first_channel=channels.start, first_tile=chunk.start, number=len(chunk), count=tiling.count,
        advance=tiling.step, tables=tuple(map(data_address, source.tables)), used=source.used, run_first=first,
        run_end=end,
    )  # fmt: skip
    tasks.run(gather, array.dtype, len(channels) * len(chunk), parameters, 64, 8 * tiles.size)
    return tiles


def _store(
    results: np.ndarray, out: np.ndarray, tiling: Tiling, stride: Size3, first: int, channels: range, chunk: range,
    bias: np.ndarray, relu: bool, add: bool,
) -> None:  # fmt: skip
    """The inverse of `_tiles`, of the results: each tile's begin at point `first` of its last transformed dimension."""
    shift = [0, 0, 0]
    shift[tiling.axes[-1]] = first
    n_step, c_step, *step = _strides(out)
    parameters = Scatter.of(
        array=data_address(out), n_step=n_step, c_step=c_step, step=tuple(step), tiles=data_address(results),
        tile=results.shape[2:], first_channel=channels.start, first_tile=chunk.start, number=len(chunk),
        count=tiling.count, advance=tiling.step, out=out.shape[2:], stride=stride, shift=tuple(shift),
        bias=data_address(bias), relu=relu, add=add,
    )  # fmt: skip
    tasks.run(scatter, out.dtype, len(channels) * len(chunk), parameters, 64, 8 * results.size)


def _product(
    left: np.ndarray, right: np.ndarray, out: np.ndarray, groups: int, conjugate: bool, add: bool
) -> None:
    """out[row, column] (+)= sum over terms of left[row, term] * right[term, column], for each group and frequency.

    left (groups * rows, terms, D, H, F), right (groups, terms, columns, ...), out (groups * rows, columns, ...), of
    spectra that are contiguous each.
    """
    frequencies = math.prod(out.shape[2:])
    rows, columns, terms = left.shape[0] // groups, out.shape[1], left.shape[1]
    real = np.dtype(out.real.dtype)
    lanes = machine(8 * real.itemsize).lanes
    left_row, left_term = (2 * step for step in _strides(left)[:2])
    right_group, right_term, right_column = (2 * step for step in _strides(right)[:3])
    out_row, out_column = (2 * step for step in _strides(out)[:2])
    block = lanes * min(128, max(4, 512 // terms))
    blocks = -(-2 * frequencies // block)
    column_block = 16
    column_blocks = -(-columns // column_block)
    parameters = Multiply.of(
        left=(data_address(left), left_row, left_term, rows * left_row),
        right=(data_address(right), right_term, right_column, right_group),
        product=(data_address(out), out_row, out_column, rows * out_row),
        rows=rows, columns=columns, terms=terms, reals=2 * frequencies, block=block, blocks=blocks,
        column_block=column_block, column_blocks=column_blocks, conjugated=conjugate, add=add,
    )  # fmt: skip
    work = 8 * groups * rows * columns * terms * frequencies
    tasks.run(multiply, real, groups * column_blocks * blocks, parameters, 64, work)


def _chunks(number: int, each: int) -> Iterator[range]:
    """range(number) in pieces of nearly the same length, of at most `each`."""
    pieces = -(-number // max(1, each))
    for i in range(pieces):
        yield range(i * number // pieces, (i + 1) * number // pieces)


@dataclass(frozen=True)
class _Block:
    """Rows and terms of the product of spectra whose filters are in memory together: whole groups, or a part of one."""

    rows: range
    terms: range
    groups: int


def _blocks(groups: int, rows: int, terms: int, most: int) -> list[_Block]:
    """Blocks of about `most` pairs of a row and a term; `rows` and `terms` are those of one group."""
    if rows * terms <= most:
        return [
            _Block(range(g.start * rows, g.stop * rows), range(g.start * terms, g.stop * terms), len(g))
            for g in _chunks(groups, most // (rows * terms))
        ]
    return [
        _Block(range(g * rows + part.start, g * rows + part.stop), range(g * terms, (g + 1) * terms), 1)
        for g in range(groups)
        for part in _chunks(rows, most // terms)
    ]


def _bytes_of_tile(tiling: Tiling, dtype: np.dtype) -> int:
    return math.prod(tiling.spectrum) * 2 * dtype.itemsize


def workspace(operation: str, geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of memory a call takes beside its operands and result, at the most."""
    tiling = make_tiling(operation, geometry)
    each = _bytes_of_tile(tiling, dtype)
    rows, terms = geometry.out_channels_per_group, geometry.in_channels_per_group
    if operation == "input_grad":
        rows, terms = terms, rows
    blocks = _blocks(geometry.groups, rows, terms, SPECTRA_BYTES // each)
    block = max(blocks, key=lambda b: len(b.rows) * len(b.terms) // b.groups)
    channels = len(block.rows) + len(block.terms)
    number = min(geometry.batch * math.prod(tiling.count), _tiles_of_chunk(channels, each))
    filters = len(block.rows) * len(block.terms) // block.groups
    return (filters + 2 * channels * number) * each


def _tiles_of_chunk(channels: int, each: int) -> int:
    return max(1, CHUNK_BYTES // (channels * each))


def _correlate(
    tiling: Tiling, groups: int, array: np.ndarray, source: _Source, filters: np.ndarray, conjugate: bool,
    first: Size3, stride: Size3, bias: np.ndarray | None, relu: bool, add: bool, out: np.ndarray,
    packed: PackedWeights | None = None,
) -> None:  # fmt: skip
    """out[n, row] = sum over terms of filters[row, term] with array[n, term].

    `filters` is (rows, terms of a group, D, H, W). With `conjugate` they are correlated, else convolved; the results of
    a tile begin at its point `first`. `packed` keeps their spectra.
    """
    bias = np.zeros(out.shape[1], out.dtype) if bias is None else np.ascontiguousarray(bias)
    terms = filters.shape[1]
    each = _bytes_of_tile(tiling, out.dtype)
    number = out.shape[0] * math.prod(tiling.count)
    for block in _blocks(groups, filters.shape[0] // groups, terms, SPECTRA_BYTES // each):
        left = _spectra_of_filters(tiling, filters[block.rows.start : block.rows.stop], block, out.dtype, packed)
        for chunk in _chunks(number, _tiles_of_chunk(len(block.rows) + len(block.terms), each)):
            right = _spectra(_tiles(array, source, tiling, block.terms, chunk), tiling)
            right = right.reshape(block.groups, terms, *right.shape[1:])
            shape = (len(block.rows), len(chunk), *tiling.spectrum)
            product = tasks.workspace(math.prod(shape), right.dtype, _PRODUCT).reshape(shape)
            _product(left, right, product, block.groups, conjugate, False)
            results = _inverse(product, tiling, first, tiling.step)
            _store(
                results, out, tiling, stride, first[tiling.axes[-1]], block.rows, chunk, bias, relu, add
            )
            del right, results  # before the next ones are made


def _spectra_of_filters(
    tiling: Tiling, filters: np.ndarray, block: _Block, dtype: np.dtype, packed: PackedWeights | None
) -> np.ndarray:
    if packed is None:
        return _spectra(filters, tiling)
    return packed.get_within(SPECTRA_BYTES, ("fft", dtype, tiling, block), lambda: _spectra(filters, tiling))


def _filters(weight: np.ndarray, dilation: Size3) -> np.ndarray:
    """The kernels with the gaps of their dilation."""
    if dilation == (1, 1, 1):
        return weight
    span = (d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
    filters = np.zeros((*weight.shape[:2], *span), weight.dtype)
    d, h, w = dilation
    filters[:, :, ::d, ::h, ::w] = weight
    return filters


def _magnitude(array: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """The largest magnitude; nan where there is one, and that without a copy of the array."""
    return np.maximum(array.max(axis=axis), -array.min(axis=axis)).astype(np.float64)


def _are_safe(tiling: Tiling, terms: int, dtype: np.dtype, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether operands this large stay finite in the frequency domain: a bound of the sums there is below overflow."""
    exponent = np.frexp(one)[1] + np.frexp(other)[1] + math.frexp(terms)[1] + 2 * math.frexp(math.prod(tiling.tile))[1]
    return np.isfinite(one) & np.isfinite(other) & (exponent < np.finfo(dtype).maxexp)


def safe_samples(operation: str, geometry: ConvGeometry, array: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For each sample of the array that is to be filtered, whether `forward` or `input_grad` may be used on it."""
    tiling = make_tiling(operation, geometry)
    terms = geometry.in_channels_per_group if operation == "forward" else geometry.out_channels_per_group
    return _are_safe(tiling, terms, array.dtype, _magnitude(array, (1, 2, 3, 4)), _magnitude(weight))


@functools.lru_cache(maxsize=256)
def _forward_source(geometry: ConvGeometry) -> _Source:
    tiling = make_tiling("forward", geometry)
    return _source(geometry.input_coordinates, tiling, tiling.tile)


def forward(
    geometry: ConvGeometry, input: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, relu: bool,
    packed: PackedWeights | None, out: np.ndarray,
) -> None:  # fmt: skip
    """out = input convolved with weight, plus bias, through max(0, .) if relu; for safe samples.

    `packed` keeps the spectra of the weight of a prepared convolution.
    """
    tiling = make_tiling("forward", geometry)
    _correlate(
        tiling, geometry.groups, input, _forward_source(geometry), _filters(weight, geometry.dilation), True, (0, 0, 0),
        geometry.stride, bias, relu, False, out, packed,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _input_grad_source(geometry: ConvGeometry) -> _Source:
    """The first tile begins span - 1 before its first result: position u is output (u + before - span + 1) / stride."""
    tiling = make_tiling("input_grad", geometry)
    tables = []
    for count, step, tile, before, span, stride, out in zip(
        tiling.count, tiling.step, tiling.tile, geometry.pad_before, tiling.span, geometry.stride,
        geometry.output_size, strict=True,
    ):  # fmt: skip
        place = np.arange((count - 1) * step + tile, dtype=np.int64) + before - (span - 1)
        output = place // stride
        tables.append(np.where((place % stride == 0) & (output >= 0) & (output < out), output, -1))
    return _source(tables, tiling, tiling.tile)


def input_grad(
    geometry: ConvGeometry, weight: np.ndarray, grad_output: np.ndarray, bias: np.ndarray | None, relu: bool,
    accumulate: bool, out: np.ndarray,
) -> None:  # fmt: skip
    """out (+)= gradient of the input under zero padding, plus bias, through max(0, .) if relu; for safe samples."""
    tiling = make_tiling("input_grad", geometry)
    rows, terms = geometry.in_channels_per_group, geometry.out_channels_per_group
    filters = _filters(weight, geometry.dilation)
    by_group = filters.reshape(geometry.groups, terms, rows, *filters.shape[2:]).swapaxes(1, 2)
    first = _of_each(lambda s: s - 1, tiling.span)
    _correlate(
        tiling, geometry.groups, grad_output, _input_grad_source(geometry),
        by_group.reshape(-1, terms, *filters.shape[2:]), False, first, (1, 1, 1), bias, relu, accumulate, out,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _weight_grad_sources(geometry: ConvGeometry) -> tuple[_Source, _Source]:
    tiling = make_tiling("weight_grad", geometry)
    tables = []
    for positions, stride in zip(tiling.positions, geometry.stride, strict=True):
        place = np.arange(positions, dtype=np.int64)
        tables.append(np.where(place % stride == 0, place // stride, -1))
    return _source(geometry.input_coordinates, tiling, tiling.tile), _source(tables, tiling, tiling.step)


def weight_grad(
    geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, accumulate: bool, out: np.ndarray
) -> bool:
    """out (+)= gradient of the weight. False, and nothing done, if an operand is not safe."""
    tiling = make_tiling("weight_grad", geometry)
    number = geometry.batch * math.prod(tiling.count)
    if not _are_safe(tiling, number, out.dtype, _magnitude(input), _magnitude(grad_output)):
        return False
    of_input, of_grad = _weight_grad_sources(geometry)
    each = _bytes_of_tile(tiling, out.dtype)
    rows, columns = geometry.out_channels_per_group, geometry.in_channels_per_group
    for block in _blocks(geometry.groups, rows, columns, SPECTRA_BYTES // each):
        total = np.empty((len(block.rows), columns, *tiling.spectrum), f"c{2 * out.itemsize}")
        for chunk in _chunks(number, _tiles_of_chunk(len(block.rows) + len(block.terms), each)):
            right = _spectra(_tiles(input, of_input, tiling, block.terms, chunk), tiling)
            left = _spectra(_tiles(grad_output, of_grad, tiling, block.rows, chunk), tiling)
            by_group = right.reshape(block.groups, columns, *right.shape[1:]).swapaxes(1, 2)
            _product(left, by_group, total, block.groups, True, chunk.start > 0)
            del left, right, by_group  # before the next ones are made
        taps = _inverse(total, tiling, (0, 0, 0), tiling.span)
        (span_d, d), (span_h, h), (span_w, w) = zip(tiling.span, geometry.dilation, strict=True)
        gradient = taps[:, :, :span_d:d, :span_h:h, :span_w:w]
        part = out[block.rows.start : block.rows.stop]
        if accumulate:
            part += gradient
        else:
            part[...] = gradient
    return True
