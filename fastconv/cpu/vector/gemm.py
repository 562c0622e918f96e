"""The microkernels of the matrix products that all passes of a convolution are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from numba import types
from numba.extending import intrinsic

from .call import vector_function
from .emit import I64, Block, Emitter, Int, Ints, Mask, Ptr, Var, Vec, fma, ir
from .tile import Tile, tile_of

ADD, BIAS, RELU = 1, 2, 4  # what a microkernel does as it stores, in this order; and
PACK, READ = 8, 16  # that it is to pack the panel, or to do without

# Runs of memory that a vector of a panel may come from if the microkernel is to pack it
MOST_RUNS = 2
# Panels whose vectors have up to so many runs are packed without a branch: those of 7 pixels in a row have 4.
FIXED_RUNS = 4


class Rows(NamedTuple):
    """Accumulators of a microkernel: rows, and vectors in each."""

    rows: int
    vectors: int


def run_stride(lanes: int) -> int:
    """Integers that the table of `pack_panel` has for each vector: how many runs, and two for each of them."""
    return 1 + 2 * max(lanes, FIXED_RUNS)


class Run(NamedTuple):
    """A run of memory in the table of `pack_panel`: the place of lane 0, and the bits of its lanes."""

    place: Int
    bits: Int


def run_of(entry: Ints, number: Int | int) -> Run:
    at = entry + (entry.e.number(number) * 2 + 1)
    return Run(at[0], at[1])


def load_runs(at: Ptr, runs: list[Run]) -> Vec:
    """A vector: the first run is loaded whole, each further one replaces the lanes from its own on."""
    value = (at + runs[0].place).vector()
    for run in runs[1:]:
        value = (at + run.place).vector(mask=at.e.mask_of_bits(run.bits), otherwise=value)
    return value


def finish(
    sums: Block, flags: Int, held: Callable[[], list[Vec]], biases: Callable[[], list[Vec]] | None = None
) -> None:
    """The sums as the flags ADD, BIAS and RELU want them, the last two only if there are `biases`.

    `held` loads what the output holds and `biases` the bias, both for each of the sums.
    """
    e = flags.e
    for _ in e.when(flags.has(ADD), sums):
        for n, value in enumerate(held()):
            sums.values[n] += value
    if biases is None:
        return
    for _ in e.when(flags.has(BIAS), sums):
        for n, value in enumerate(biases()):
            sums.values[n] += value
    for _ in e.when(flags.has(RELU), sums):
        sums.values[:] = [value.relu() for value in sums.values]


def _finished(total, flags, held, bias):
    """`finish` of one sum, for the plain siblings."""
    if flags & ADD:
        total += held
    if flags & BIAS:
        total += bias
    return max(total, 0) if flags & RELU else total


def _multiply(
    sums: Block, depth: Int, a: Ptr, panel: Ptr, columns_of: Callable[[Int, Ptr], list[Vec]]
) -> None:
    """Add the products over k; `columns_of` gives row k of the panel, whose place it is told too."""
    e, (rows, vectors) = depth.e, sums.shape
    for k in e.range(depth, sums):
        a_k = a + k * rows
        (a_k + depth * rows).prefetch()  # the next rows, if these are packed
        x = columns_of(k, panel + k * e.tile.columns)
        for i in range(rows):
            w = a_k[i].broadcast()
            for j in range(vectors):
                sums[i, j] = fma(w, x[j], sums[i, j])


def _packed_columns(vectors: int) -> Callable[[Int, Ptr], list[Vec]]:
    """What gives a row of a packed panel, for `_multiply`."""
    return lambda k, panel_k: [(panel_k + j * k.e.lanes).vector() for j in range(vectors)]


@vector_function(restrict="a panel c")
def contract(
    e: Emitter, depth: Int, a: Ptr, panel: Ptr, c: Ptr, flags: Int, pitch: Int, bias: Ptr, source: Ptr, offsets: Ints,
    runs: Ints, ahead: Int, *, variant: Rows,
) -> None:  # fmt: skip
    """The microkernel: C[i, j] = sum over k < depth of A[k, i] * B[k, j], for the rows i and the vectors of columns j.

        a      [depth][rows]                 packed weights
        panel  [depth][columns of a tile]    B: packed pixels
        c      [rows][pitch]

    depth >= 1; of the panel the first vectors are read, fewer than it has for the last pixels of all. The sum over k
    is one chain of multiply-adds from k = 0 upwards for each element, so an element has the same bits in any tile.
    Then, of `flags`, ADD adds what C held, BIAS adds bias[i], and RELU replaces what is below zero by zero.

    With PACK the panel is written, not read: row k of B is then what `pack_panel` takes from ``source + offsets[k]`` by
    the table `runs`, and the arithmetic hides the copying. The vectors must be all of the tile, each of at most
    MOST_RUNS runs, and the tile one that `packs`; on others the flag must not be set. `ahead` is fetched into the
    cache, as the panel after this one. READ is the same for vectors of one run, without writing the panel.
    """
    rows, vectors = variant
    lanes = e.lanes
    places = [c + (pitch * i + j * lanes) for i in range(rows) for j in range(vectors)]
    for place in places:
        place.prefetch(write=True)
    sums = e.zeros(rows, vectors)
    if e.tile.packs and vectors == e.tile.vectors:
        entries = [runs + j * run_stride(lanes) for j in range(vectors)]
        for is_packed in e.branch((flags & (PACK | READ)).equals(0), sums):
            if is_packed:
                _multiply(sums, depth, a, panel, _packed_columns(vectors))
                continue
            for packs in e.branch((flags & READ).equals(0), sums):
                known = [[run_of(entry, m) for m in range(MOST_RUNS if packs else 1)] for entry in entries]

                def unpacked(k: Int, panel_k: Ptr, packs: bool = packs, known: list = known) -> list[Vec]:
                    at, x = source + offsets[k], []
                    for j in range(vectors):
                        x.append(load_runs(at, known[j]))
                        if packs:
                            (panel_k + j * lanes).store(x[j])
                            (at + (known[j][0].place + ahead)).prefetch()
                    return x

                _multiply(sums, depth, a, panel, unpacked)
    else:
        _multiply(sums, depth, a, panel, _packed_columns(vectors))

    def biases() -> list[Vec]:
        each = [bias[i].broadcast() for i in range(rows)]
        return [each[i] for i in range(rows) for _ in range(vectors)]

    finish(sums, flags, lambda: [place.vector() for place in places], biases)
    for place, value in zip(places, sums.values, strict=True):
        place.store(value)


@contract.plain
def contract_plain(depth, a, panel, c, flags, pitch, bias, source, offsets, runs, ahead, *, variant, tile):
    rows, vectors = variant
    for k in range(depth if flags & (PACK | READ) else 0):
        for j in range(vectors * tile.lanes):
            vector, lane = divmod(j, tile.lanes)
            count, *table = runs[vector * run_stride(tile.lanes) :]
            places = [table[2 * m] for m in range(max(count, 1)) if m == 0 or table[2 * m + 1] >> lane & 1]
            panel[k * tile.columns + j] = source[offsets[k] + places[-1] + lane]
    for i in range(rows):
        for j in range(vectors * tile.lanes):
            total = sum(a[k * rows + i] * panel[k * tile.columns + j] for k in range(depth))
            c[i * pitch + j] = _finished(total, flags, c[i * pitch + j], bias[i] if flags & BIAS else 0)


@vector_function(restrict="a panel c")
def contract_packed(e: Emitter, depth: Int, a: Ptr, panel: Ptr, c: Ptr, flags: Int, *, variant: Rows) -> None:
    """`contract` from a packed panel into sums that are a tile themselves: C is [rows][columns of a tile].

    Of the flags there is ADD alone. Winograd's products take this form.
    """
    rows, vectors = variant
    places = [c + (i * e.tile.columns + j * e.lanes) for i in range(rows) for j in range(vectors)]
    for place in places:
        place.prefetch(write=True)
    sums = e.zeros(rows, vectors)
    _multiply(sums, depth, a, panel, _packed_columns(vectors))
    finish(sums, flags, lambda: [place.vector() for place in places])
    for place, value in zip(places, sums.values, strict=True):
        place.store(value)


@contract_packed.plain
def contract_packed_plain(depth, a, panel, c, flags, *, variant, tile):
    contract_plain(depth, a, panel, c, flags, tile.columns, None, None, None, None, 0, variant=variant, tile=tile)


@vector_function(restrict="a panel sums")
def contract_narrow(e: Emitter, rows: Int, depth: Int, a: Ptr, panel: Ptr, sums: Ptr) -> None:
    """sums[j * narrow_pitch + i] = sum over k < depth of A[k, i] * B[k, j], for i < rows, j < narrow_columns.

    Operands and chains are those of `contract`, but the rows are the lanes: for few columns, which would fill a small
    part of a vector. `narrow_columns` and `narrow_pitch` are those of the tile; where there are none it must not be
    called. A, packed as [depth][rows], is read to its end and no further, the sums are written in whole vectors.
    """
    t, lanes = e.tile, e.lanes
    parts = range(t.narrow_pitch // lanes)
    masks = [e.mask(rows - v * lanes) for v in parts]
    totals = e.zeros(t.narrow_columns, len(parts))
    for k in e.range(depth, totals):
        a_k, panel_k = a + k * rows, panel + k * t.columns
        w = [(a_k + v * lanes).vector(mask=masks[v]) for v in parts]
        for j in range(t.narrow_columns):
            x = panel_k[j].broadcast()
            for v in parts:
                totals[j, v] = fma(w[v], x, totals[j, v])
    for n, value in enumerate(totals.values):
        (sums + n * lanes).store(value)


@contract_narrow.plain
def contract_narrow_plain(rows, depth, a, panel, sums, *, tile):
    for j in range(tile.narrow_columns):
        for i in range(tile.narrow_pitch):
            known = i < rows
            total = sum(a[k * rows + i] * panel[k * tile.columns + j] for k in range(depth)) if known else 0
            sums[j * tile.narrow_pitch + i] = total


MOST_ROWS = 4  # rows of pixels in a tile of `contract_pixels`
MOST_TAPS = 6  # columns of its filters


class PixelRows(NamedTuple):
    """What `contract_pixels` is compiled for: whole rows of output pixels."""

    rows: int  # of pixels
    pixels: int  # in a row
    step: int  # elements of the source from one pixel of a row to the next
    seen: tuple[tuple[int, int], ...]  # first pixel that sees each column of the filter, and the one after the last


def pixel_rows(t: Tile, pixels: int) -> int:
    """How many rows of so many pixels are a tile of `contract_pixels`."""
    return min(MOST_ROWS, t.pixels // pixels)


@vector_function(restrict="w source c")
def contract_pixels(
    e: Emitter, channels: Int, tap_rows: Int, of_rows: Ints, of_taps: Ints, w: Ptr, w_pitch: Int, source: Ptr,
    pitch: Int, sources: Ints, c: Ptr, places: Ints, flags: Int, bias: Ptr, *, variant: PixelRows,
) -> None:  # fmt: skip
    """The microkernel with pixels of whole output rows as rows, output channels in the lanes, and no zeros of padding.

    C_r[i, j] = sum over channel q, tap row t, column k, with i in seen[k], of
    ``w[q * w_pitch + of_rows[2t + 1] + k * columns + j] * source[q * pitch + sources[r] + of_rows[2t] + of_taps[k] +
    i * step]``

    for each of the rows r of pixels i, and the columns j of the tile, which are output channels. Row r is at
    ``c + places[r]``, [i][columns]. Products with zeros of the padding are not computed, nor are the zeros read: `seen`
    leaves out columns, and the caller tap rows. The sum is one chain of multiply-adds in the order of q, t, k. Without
    its zero products it has the bits that `contract` gives it, if the weights are finite. `flags` (ADD, BIAS, RELU) are
    as there, where `bias` has a number for each column. channels, tap_rows >= 1.
    """
    rows, pixels, step, seen = variant
    lanes, columns, vectors = e.lanes, e.tile.columns, e.tile.vectors
    sums = e.zeros(rows, pixels, vectors)
    of_row = [c + places[r] for r in range(rows)]
    targets = [of_row[r] + (i * columns + j * lanes) for r, i, j in sums.indices()]
    # Read from a table, though they are mostly known: if LLVM knew which taps see the same pixels, it would keep these
    # in registers there are not enough of, and the product would take a quarter more time (AVX-512).
    tap_places = [of_taps[k] for k in range(len(seen))]
    starts = [sources[r] for r in range(rows)]
    for q in e.range(channels, sums):
        source_q, w_q = source + q * pitch, w + q * w_pitch
        for t in e.range(tap_rows, sums):
            entry = of_rows + t * 2
            row, w_row = entry[0], w_q + entry[1]
            row_starts = [source_q + (row + start) for start in starts]
            for k, (first, end) in enumerate(seen):
                weights = [(w_row + (k * columns + j * lanes)).vector() for j in range(vectors)]
                for r in range(rows):
                    at = row_starts[r] + tap_places[k]
                    for i in range(first, end):
                        pixel = at[i * step].broadcast()
                        for j in range(vectors):
                            sums[r, i, j] = fma(pixel, weights[j], sums[r, i, j])

    def biases() -> list[Vec]:
        each = [(bias + j * lanes).vector() for j in range(vectors)]
        return [each[j] for _, _, j in sums.indices()]

    finish(sums, flags, lambda: [target.vector() for target in targets], biases)
    for target, value in zip(targets, sums.values, strict=True):
        target.store(value)


@contract_pixels.plain
def contract_pixels_plain(
    channels, tap_rows, of_rows, of_taps, w, w_pitch, source, pitch, sources, c, places, flags, bias, *, variant, tile
):  # fmt: skip
    rows, pixels, step, seen = variant
    for r, i, j in itertools.product(range(rows), range(pixels), range(tile.columns)):
        total = 0
        for q, t in itertools.product(range(channels), range(tap_rows)):
            from_row, w_row = of_rows[2 * t : 2 * t + 2]
            for k, (first, end) in enumerate(seen):
                if first <= i < end:
                    weight = w[q * w_pitch + w_row + k * tile.columns + j]
                    total += weight * source[q * pitch + sources[r] + from_row + of_taps[k] + i * step]
        place = places[r] + i * tile.columns + j
        c[place] = _finished(total, flags, c[place], bias[j])


class PixelTile(NamedTuple):
    """What `contract_pixels_by_channels` is compiled for: pixels, and vectors of output channels."""

    pixels: int
    vectors: int


@vector_function(restrict="w source c")
def contract_pixels_by_channels(
    e: Emitter, depth: Int, offsets: Ints, w: Ptr, rows: Int, source: Ptr, step: Int, c: Ptr, pitch: Int, flags: Int,
    bias: Ptr, *, variant: PixelTile,
) -> None:  # fmt: skip
    """The microkernel with neighbouring pixels as rows and output channels in the lanes, which packs nothing.

    C[i, j] = sum over k < depth of ``w[k * rows + j] * source[i * step + offsets[k]]``

    for the pixels i of the variant, and j < rows, which are in its vectors. Pixel i is at ``c + i * pitch``. The sum is
    one chain of multiply-adds in the order of k, so it has the bits that `contract` gives it. `flags` (ADD, BIAS, RELU)
    are those of `contract`, where `bias` has a number for each j. depth >= 1. Tiles without masks read and write whole
    vectors, of weights, bias and C.
    """
    pixels, vectors = variant
    mask = e.mask(rows - (vectors - 1) * e.lanes) if e.tile.masks else None

    def mask_of(j: int) -> Mask | None:
        return mask if j == vectors - 1 else None

    def load(pointer: Ptr, j: int) -> Vec:
        return (pointer + j * e.lanes).vector(mask=mask_of(j))

    sums = e.zeros(pixels, vectors)
    places = [c + pitch * i for i in range(pixels)]
    for i, j in sums.indices():
        (places[i] + j * e.lanes).prefetch(write=True)
    # LLVM would keep the places of all pixels, or all their values, in registers there are not enough of: 0.65 of the
    # speed (AVX-512). So every third place is worked out anew, from one it does not know.
    double, triple = step * 2, step * 3
    for k in e.range(depth, sums):
        pixel = (source + offsets[k]).opaque()
        w_k = w + k * rows
        weights = [load(w_k, j) for j in range(vectors)]
        for i in range(pixels):
            if i and not i % 3:
                pixel = (pixel + triple).opaque()
            at = pixel if i % 3 == 0 else pixel + (step if i % 3 == 1 else double)
            x = at[0].broadcast()
            for j in range(vectors):
                sums[i, j] = fma(x, weights[j], sums[i, j])

    def biases() -> list[Vec]:
        each = [load(bias, j) for j in range(vectors)]
        return [each[j] for _, j in sums.indices()]

    finish(sums, flags, lambda: [load(places[i], j) for i, j in sums.indices()], biases)
    for i, j in sums.indices():
        (places[i] + j * e.lanes).store(sums[i, j], mask_of(j))


@contract_pixels_by_channels.plain
def contract_pixels_by_channels_plain(
    depth, offsets, w, rows, source, step, c, pitch, flags, bias, *, variant, tile
):  # fmt: skip
    pixels, vectors = variant
    for i, j in itertools.product(range(pixels), range(rows if tile.masks else vectors * tile.lanes)):
        total = sum(w[k * rows + j] * source[i * step + offsets[k]] for k in range(depth))
        c[i * pitch + j] = _finished(total, flags, c[i * pitch + j], bias[j])


@vector_function(restrict="a panel c")
def _weight_gradient_tile(
    e: Emitter, runs: Int, run_offset: Ints, length: Int, step: Int, a: Ptr, row_offset: Ints, panel: Ptr, c: Ptr,
    pitch: Int, prefetch: Ptr, line_step: Int, block_step: Int, *, variant: Rows,
) -> None:  # fmt: skip
    rows, vectors = variant
    lanes, columns = e.lanes, vectors * e.lanes
    c_rows = [c + pitch * i for i in range(rows)]
    places = [c_row + j * lanes for c_row in c_rows for j in range(vectors)]
    starts = [a + row_offset[i] for i in range(rows)]
    sums = Block((rows, vectors), [place.vector() for place in places])
    for r in e.range(runs, sums):
        offset = run_offset[r]
        row = [start + offset for start in starts]
        before = r * length
        panel_run = panel + before * columns
        for k in e.range(length, sums):
            panel_k, place = panel_run + k * columns, k * step
            pixel = before + k
            line, block = (pixel & (lanes - 1)) * line_step, (pixel >> (lanes.bit_length() - 1)) * block_step
            (prefetch + (line + block)).prefetch(locality=2)
            x = [(panel_k + j * lanes).vector() for j in range(vectors)]
            for i in range(rows):
                w = row[i][place].broadcast()
                for j in range(vectors):
                    sums[i, j] = fma(w, x[j], sums[i, j])
    for place, value in zip(places, sums.values, strict=True):
        place.store(value)


@vector_function()
def weight_gradient_kernel(
    e: Emitter, rows: Int, vectors: Int, runs: Int, run_offset: Ints, length: Int, step: Int, a: Ptr, row_offset: Ints,
    panel: Ptr, c: Ptr, pitch: Int, prefetch: Ptr, line_step: Int, block_step: Int,
) -> None:  # fmt: skip
    """The microkernel of the weight gradient: C[i, j] += sum over runs r and k < length of A_i[r, k] * B[r, k, j].

    Row i of A is read in place, A_i[r, k] = a[row_offset[i] + run_offset[r] + k * step]: a run is a row of output
    pixels, and the taps of the kernel are the same rows at other offsets, so nothing is packed. B is packed as
    [r][k][columns], columns = vectors * lanes; row i of C is at ``c + i * pitch``. 1 <= rows <= gradient_rows,
    1 <= vectors <= gradient_vectors, runs >= 1, length >= 1. The sum runs over r, then k, in one chain.

    With each pixel, the number n of all, one cache line that is read afterwards is prefetched: that of
    ``prefetch + n % lanes * line_step + n // lanes * block_step``, which need not exist.
    """
    shapes = {
        n * 8 + v: Rows(n, v) for n in range(1, e.tile.gradient_rows + 1) for v in range(1, e.tile.gradient_vectors + 1)
    }
    for case in e.switch(rows * 8 + vectors, list(shapes)):
        if case is not None:
            _weight_gradient_tile.emit_call(
                e, runs, run_offset, length, step, a, row_offset, panel, c, pitch, prefetch, line_step, block_step,
                variant=shapes[case],
            )  # fmt: skip


@weight_gradient_kernel.plain
def weight_gradient_kernel_plain(
    rows, vectors, runs, run_offset, length, step, a, row_offset, panel, c, pitch, prefetch, line_step, block_step, *,
    tile,
):  # fmt: skip
    columns = vectors * tile.lanes
    for i, j, r, k in itertools.product(range(rows), range(columns), range(runs), range(length)):
        c[i * pitch + j] += a[row_offset[i] + run_offset[r] + k * step] * panel[(r * length + k) * columns + j]


@vector_function(restrict="panel")
def pack_panel(
    e: Emitter, panel: Ptr, source: Ptr, channels: Int, channel_pitch: Int, taps: Int, tap_offset: Ints, runs: Ints,
    ahead: Int,
) -> None:  # fmt: skip
    """Fill panel[(c, tap)][column] with the elements of `source` that a row of pixels reads at this channel and tap.

    The pixels of vector j of the panel come from ``runs[j * run_stride]`` runs of memory, each described by two
    integers: the place that lane 0 would have if the run began there, relative to
    ``source + c * channel_pitch + tap_offset[tap]``, and the bits of the lanes from its first pixel on. There are at
    least FIXED_RUNS entries; those beyond the number have no bits and the place of another. Up to `columns` elements
    after a run may be read, and are not used. What lies `ahead` elements further on is fetched into the cache.
    """
    t, lanes = e.tile, e.lanes
    entries = [runs + j * run_stride(lanes) for j in range(t.vectors)]
    counts = [entry[0] for entry in entries]
    most = counts[0]
    for count in counts[1:]:
        most = (count > most).choose(count, most)
    # where the microkernel packs panels of few runs, there is no need for loops of their own
    forms = [FIXED_RUNS] if t.packs else list(range(1, FIXED_RUNS + 1))
    most = (most < forms[0]).choose(e.number(forms[0]), most)
    for most_runs in e.switch(most, forms):
        fixed = most_runs or FIXED_RUNS
        known = [[run_of(entry, m) for m in range(fixed)] for entry in entries]
        to, at_c = Var(panel), Var(source)
        for _ in e.range(channels, to, at_c):
            for tap in e.range(taps, to):
                at = at_c.value + tap_offset[tap]
                for j in range(t.vectors):
                    value = Var(load_runs(at, known[j]))
                    for _ in e.when(counts[j] > fixed, value) if most_runs is None else ():
                        for m in e.range(counts[j] - fixed, value):
                            run = run_of(entries[j], m + fixed)
                            mask = e.mask_of_bits(run.bits)
                            value.value = (at + run.place).vector(mask=mask, otherwise=value.value)
                    (to.value + j * lanes).store(value.value)
                    if fixed == 1:
                        (at + (known[j][0].place + ahead)).prefetch()
                to.value += t.columns
            at_c.value += channel_pitch


@pack_panel.plain
def pack_panel_plain(panel, source, channels, channel_pitch, taps, tap_offset, runs, ahead, *, tile):
    for c, tap, column in itertools.product(range(channels), range(taps), range(tile.columns)):
        vector, lane = divmod(column, tile.lanes)
        count, *table = runs[vector * run_stride(tile.lanes) :]
        places = [table[2 * m] for m in range(max(count, 1)) if m == 0 or table[2 * m + 1] >> lane & 1]
        from_ = source[c * channel_pitch + tap_offset[tap] + places[-1] + lane]
        panel[(c * taps + tap) * tile.columns + column] = from_


@intrinsic
def run_table_stride(typingctx, like):
    """In compiled code: `run_stride` of the tile for what the pointer `like` points to."""

    def codegen(context, builder, sig, args):
        return ir.Constant(I64, run_stride(tile_of(sig.args[0]).lanes))

    return types.int64(like), codegen
