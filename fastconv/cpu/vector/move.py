"""Data movers: copies in vectors that read and write no element but those they are to, by strides and by transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numba import types
from numba.extending import intrinsic

from .call import vector_function
from .emit import (
    Block,
    Bool,
    Emitter,
    Int,
    Ints,
    Mask,
    Ptr,
    Var,
    Vec,
    interleave,
    separate,
    transposed,
)

# Vectors: how far ahead of a stream of rows to prefetch. Reading 512 x 512 kernels of 3 x 3 for the input gradient took
# a third less time by it on a Zen 4; 8 and 16 were no better.
PREFETCH = 4

# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


@vector_function()
def copy_block(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, count: Int
) -> None:
    """target[r * target_pitch + i] = source[r * source_pitch + i] for r < rows, i < count; rows >= 1, count >= 0.

    The last vector of a row ends with the row and may overlap the one before; a row below a vector has a mask instead.
    The two must not overlap in memory.
    """
    last = count - e.lanes
    for short in e.branch(last < 0):
        to, at = Var(target), Var(source)
        if short:
            mask = e.mask(count)
            for _ in e.range(rows, to, at):
                to.value.store(at.value.vector(mask=mask), mask)
                to.value, at.value = to.value + target_pitch, at.value + source_pitch
        else:
            vectors = count.blocks_of(e.lanes)
            for _ in e.range(rows, to, at):
                for k in e.range(vectors):
                    place = (k * e.lanes).at_most(last)
                    (to.value + place).store((at.value + place).vector())
                to.value, at.value = to.value + target_pitch, at.value + source_pitch


@copy_block.plain
def copy_block_plain(target, target_pitch, source, source_pitch, rows, count, *, tile):
    for r in range(rows):
        for i in range(count):
            target[r * target_pitch + i] = source[r * source_pitch + i]


@vector_function(inline=True)
def copy_span(e: Emitter, target: Ptr, source: Ptr, count: Int) -> None:
    """target[i] = source[i] for i < count: a `copy_block` of one row."""
    copy_block.emit_call(e, target, e.number(0), source, e.number(0), e.number(1), count)


def stream(target: Ptr, source: Ptr, count: Int, past_cache: Bool, change: Callable[[Vec], Vec]) -> None:
    """target = change(source) for `count` >= 0 elements; if `past_cache`, with stores that leave the caches alone.

    An ordinary store first reads the line that it changes. What is larger than the caches and written once is better
    off without: 8 bytes of memory traffic for a float32 that is read and one that is written, instead of 12. Such
    stores are for whole lines; what is left at both ends is stored by halves, quarters and so on of a vector.
    """
    e = target.e
    to, at = Var(target), Var(source)

    def part(number: Int) -> None:
        """As many elements as the lowest bits of `number` say."""
        lanes = e.lanes // 2
        while lanes:
            for _ in e.when(number.has(lanes), to, at):
                to.value.store(change(at.value.vector(lanes)))
                to.value, at.value = to.value + lanes, at.value + lanes
            lanes //= 2

    unaligned = ((0 - target.address()) & (e.lanes * e.size - 1)).quotient(e.size)
    head = past_cache.choose(unaligned, e.number(0)).at_most(count)
    part(head)
    rest = count - head
    whole, left = rest.quotient(e.lanes), rest.remainder(e.lanes)
    for past in e.branch(past_cache):
        for _ in e.when(whole > 0):
            for k in e.range(whole):
                place = to.value + k * e.lanes
                value = change((at.value + k * e.lanes).vector())
                if past:
                    place.store_past_cache(value)
                else:
                    place.store(value)
    to.value, at.value = to.value + whole * e.lanes, at.value + whole * e.lanes
    part(left)


@vector_function(restrict="target source")
def stream_block(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, count: Int, past_cache: Bool
) -> None:
    """`copy_block`, if `past_cache` with stores that leave the caches alone: see `drain_stores`."""
    to, at = Var(target), Var(source)
    for _ in e.range(rows, to, at):
        stream(to.value, at.value, count, past_cache, lambda value: value)
        to.value, at.value = to.value + target_pitch, at.value + source_pitch


@stream_block.plain
def stream_block_plain(target, target_pitch, source, source_pitch, rows, count, past_cache, *, tile):
    copy_block_plain(target, target_pitch, source, source_pitch, rows, count, tile=tile)


@intrinsic
def drain_stores(typingctx):
    """Wait until the stores past the caches are seen by other threads: they overtake the ordinary ones."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@vector_function()
def fetch_span(e: Emitter, source: Ptr, count: Int) -> None:
    """Prefetch `count` >= 1 elements from `source` on. They need not exist."""
    line = 64 // e.size
    for k in e.range(count.blocks_of(line)):
        (source + k * line).prefetch()


@fetch_span.plain
def fetch_span_plain(source, count, *, tile):
    """Nothing is read."""


# ---------------------------------------------------------------------------------------------------------------------
# Every second element, and every fourth
# ---------------------------------------------------------------------------------------------------------------------


@vector_function()
def copy_every_second(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, count: Int
) -> None:
    """target[r * target_pitch + i] = source[r * source_pitch + 2 * i] for r < rows, i < count; rows, count >= 1."""
    for k in e.range(count.blocks_of(e.lanes)):
        first = k * e.lanes
        left = (count - first) * 2 - 1
        masks = [e.mask(left - j) for j in (0, e.lanes)]
        mask = e.mask(count - first)
        to, at = Var(target + first), Var(source + first * 2)
        for _ in e.range(rows, to, at):
            both = [(at.value + j * e.lanes).vector(mask=masks[j]) for j in range(2)]
            to.value.store(separate(*both)[0], mask)
            to.value, at.value = to.value + target_pitch, at.value + source_pitch


@copy_every_second.plain
def copy_every_second_plain(target, target_pitch, source, source_pitch, rows, count, *, tile):
    for r in range(rows):
        for i in range(count):
            target[r * target_pitch + i] = source[r * source_pitch + 2 * i]


@vector_function()
def spread_every_second(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, count: Int
) -> None:
    """target[r * target_pitch + 2 * i] = source[r * source_pitch + i] for r < rows, i < count; rows, count >= 1."""
    n = e.lanes
    even = e.mask_of([k % 2 == 0 for k in range(n)])
    for k in e.range(count.blocks_of(n)):
        first = k * n
        left = (count - first) * 2
        masks = [e.mask(left - j * n) & even for j in range(2)]
        read = e.mask(count - first)
        to, at = Var(target + first * 2), Var(source + first)
        for _ in e.range(rows, to, at):
            value = at.value.vector(mask=read)
            for j, part in enumerate(interleave(value, value)):
                (to.value + j * n).store(part, masks[j])
            to.value, at.value = to.value + target_pitch, at.value + source_pitch


@spread_every_second.plain
def spread_every_second_plain(target, target_pitch, source, source_pitch, rows, count, *, tile):
    for r in range(rows):
        for i in range(count):
            target[r * target_pitch + 2 * i] = source[r * source_pitch + i]


def _separate_row(targets: Sequence[Ptr], source: Ptr, count: Int) -> None:
    """targets[k % n][k // n] = source[k] for k < count, n targets, a power of two."""
    e, n = source.e, len(targets)
    step = e.lanes * n
    whole, rest = count.quotient(step), count.remainder(step)
    for _ in e.when(whole > 0):
        for k in e.range(whole):
            values = [(source + k * step + j * e.lanes).vector() for j in range(n)]
            for target, value in zip(targets, _by_place(values), strict=True):
                (target + k * e.lanes).store(value)
    for _ in e.when(rest > 0):
        start = source + whole * step
        values = [(start + j * e.lanes).vector(mask=e.mask(rest - j * e.lanes)) for j in range(n)]
        for r, (target, value) in enumerate(zip(targets, _by_place(values), strict=True)):
            (target + whole * e.lanes).store(value, e.mask((rest + (n - 1 - r)).quotient(n)))


def _by_place(vectors: Sequence[Vec]) -> list[Vec]:
    """A power of two of vectors, so that each holds the elements of one place modulo their number."""
    if len(vectors) == 1:
        return list(vectors)
    pairs = [separate(vectors[k], vectors[k + 1]) for k in range(0, len(vectors), 2)]
    even, odd = _by_place([p[0] for p in pairs]), _by_place([p[1] for p in pairs])
    return [v for pair in zip(even, odd, strict=True) for v in pair]


@vector_function(restrict="even odd source")
def separate_2(
    e: Emitter, even: Ptr, odd: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, count: Int
) -> None:
    """Copy `rows` >= 1 rows of `count` >= 0 elements, those at even places to `even`, the others to `odd`."""
    to_even, to_odd, at = Var(even), Var(odd), Var(source)
    for _ in e.range(rows, to_even, to_odd, at):
        _separate_row([to_even.value, to_odd.value], at.value, count)
        to_even.value, to_odd.value = to_even.value + target_pitch, to_odd.value + target_pitch
        at.value = at.value + source_pitch


@separate_2.plain
def separate_2_plain(even, odd, target_pitch, source, source_pitch, rows, count, *, tile):
    for r in range(rows):
        for k in range(count):
            (odd if k % 2 else even)[r * target_pitch + k // 2] = source[r * source_pitch + k]


@vector_function()
def separate_4(e: Emitter, target: Ptr, places: Ints, source: Ptr, count: Int) -> None:
    """target[places[k % 4] + k // 4] = source[k] for k < count."""
    _separate_row([target + places[r] for r in range(4)], source, count)


@separate_4.plain
def separate_4_plain(target, places, source, count, *, tile):
    for k in range(count):
        target[places[k % 4] + k // 4] = source[k]


@vector_function(restrict="target even odd")
def join_rows(
    e: Emitter, target: Ptr, target_pitch: Int, even: Ptr, odd: Ptr, source_pitch: Int, rows: Int, count: Int
) -> None:
    """The reverse of `separate_2`: `count` >= 1 elements of each row, taken from `even` and `odd` in turn.

    Of these whole vectors are read.
    """
    n = e.lanes
    to, at_even, at_odd = Var(target), Var(even), Var(odd)
    for _ in e.range(rows, to, at_even, at_odd):
        for k in e.range(count.blocks_of(2 * n)):
            both = [(at.value + k * n).vector() for at in (at_even, at_odd)]
            for j, value in enumerate(interleave(*both)):
                place = k * (2 * n) + j * n
                left = count - place
                for full in e.branch(left >= n):
                    (to.value + place).store(value, None if full else e.mask(left))
        to.value = to.value + target_pitch
        at_even.value, at_odd.value = at_even.value + source_pitch, at_odd.value + source_pitch


@join_rows.plain
def join_rows_plain(target, target_pitch, even, odd, source_pitch, rows, count, *, tile):
    for r in range(rows):
        for k in range(count):
            target[r * target_pitch + k] = (odd if k % 2 else even)[r * source_pitch + k // 2]


# ---------------------------------------------------------------------------------------------------------------------
# Transposes
# ---------------------------------------------------------------------------------------------------------------------


def _transpose_four(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, columns: Int
) -> None:
    """`transpose_block` of as many rows as lanes and at most four columns, or the other way round: returns then.

    Images of three channels are made of such blocks, and small groups. All vectors would take three times as long (Zen
    4).
    """
    n = e.lanes

    def masks(count: Int) -> list[Mask]:
        """For each of four rows, all lanes or none."""
        bits = [(e.number(i) < count).choose(e.number(-1), e.number(0)) for i in range(4)]
        return [e.mask_of_bits(each) for each in bits]

    for _ in e.when(rows.equals(n) & (columns <= 4)):
        mask = e.mask(columns, 4)
        loaded = [(source + source_pitch * i).vector(mask=mask) for i in range(n)]
        joined = []
        for q in range(4):
            parts = loaded[q::4]
            while len(parts) > 1:
                every = range(2 * parts[0].lanes)
                parts = [x.pick(every, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
            joined += parts
        for k, (value, of_row) in enumerate(zip(transposed(joined), masks(columns), strict=True)):
            (target + target_pitch * k).store(value, of_row)
        e.ret()
    for _ in e.when(columns.equals(n) & (rows <= 4)):
        mask = e.mask(rows, 4)
        loaded = [(source + source_pitch * i).vector(mask=of_row) for i, of_row in enumerate(masks(rows))]
        for q, value in enumerate(transposed(loaded)):
            for k in range(n // 4):
                (target + target_pitch * (4 * k + q)).store(value.pick(range(4 * k, 4 * k + 4)), mask)
        e.ret()


@vector_function()
def transpose_block(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, columns: Int
) -> None:
    """target[k * target_pitch + i] = source[i * source_pitch + k] for i < rows, k < columns, both 1 to `lanes`."""
    if e.lanes > 4:
        _transpose_four(e, target, target_pitch, source, source_pitch, rows, columns)

    def each(count: Int, lanes: Int, pointer: Ptr, pitch: Int):
        """Place and lanes of each row; none of those that do not exist, whose place is that of the last."""
        mask, last, none = e.mask(lanes), count - 1, e.mask_of([False] * e.lanes)
        for i in range(e.lanes):
            exists = e.number(i) < count
            yield pointer + pitch * exists.choose(e.number(i), last), exists.choose(mask, none)

    values = [place.vector(mask=mask) for place, mask in each(rows, columns, source, source_pitch)]
    for value, (place, mask) in zip(transposed(values), each(columns, rows, target, target_pitch), strict=True):
        place.store(value, mask)


@transpose_block.plain
def transpose_block_plain(target, target_pitch, source, source_pitch, rows, columns, *, tile):
    for i in range(rows):
        for k in range(columns):
            target[k * target_pitch + i] = source[i * source_pitch + k]


@vector_function(restrict="target")
def transpose_start(e: Emitter, target: Ptr, source: Ptr, source_pitch: Int, columns: Int) -> None:
    """target[k * lanes + i] = source[i * source_pitch + k] for i < lanes, k < columns, 0 < columns <= lanes.

    Nothing else is read; zeros are written for k from `columns` up to `lanes`.
    """
    mask, rows = e.mask(columns), []
    for i in range(e.lanes):
        place = source + source_pitch * i
        rows.append(place.vector(mask=mask))
        (place + PREFETCH * e.lanes).prefetch()
    for k, row in enumerate(transposed(rows)):
        (target + k * e.lanes).store(row)


@transpose_start.plain
def transpose_start_plain(target, source, source_pitch, columns, *, tile):
    for i in range(tile.lanes):
        for k in range(tile.lanes):
            target[k * tile.lanes + i] = source[i * source_pitch + k] if k < columns else 0


def _transpose(
    target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, ahead: Int, add: bool
) -> None:
    e, last, loaded = source.e, rows - 1, []
    for i in range(e.lanes):
        place = source + source_pitch * (e.number(i) < rows).choose(e.number(i), last)
        loaded.append(place.vector())
        (place + ahead).prefetch()
    for k, row in enumerate(transposed(loaded)):
        place = target + target_pitch * k
        place.store(place.vector() + row if add else row)


@vector_function()
def transpose(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, ahead: Int
) -> None:
    """target[k * target_pitch + i] = source[i * source_pitch + k] for i, k < lanes.

    Rows of the source from `rows` on are read as the last of these. Stores are whole vectors in the order of k, so
    where target_pitch < lanes a store overwrites what the one before wrote too much. What lies `ahead` elements after
    each row is prefetched, wherever that is: rows far apart are too many streams for the processor to do it.
    """
    _transpose(target, target_pitch, source, source_pitch, rows, ahead, add=False)


@transpose.plain
def transpose_plain(target, target_pitch, source, source_pitch, rows, ahead, *, tile):
    for k in range(tile.lanes):
        for i in range(tile.lanes):
            target[k * target_pitch + i] = source[min(i, rows - 1) * source_pitch + k]


@vector_function()
def transpose_add(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, ahead: Int
) -> None:
    """`transpose`, added to what the target holds."""
    _transpose(target, target_pitch, source, source_pitch, rows, ahead, add=True)


@transpose_add.plain
def transpose_add_plain(target, target_pitch, source, source_pitch, rows, ahead, *, tile):
    for k in range(tile.lanes):
        for i in range(tile.lanes):
            target[k * target_pitch + i] += source[min(i, rows - 1) * source_pitch + k]


# ---------------------------------------------------------------------------------------------------------------------
# Pixels of `lanes` channels each
# ---------------------------------------------------------------------------------------------------------------------


def _with_channels(e: Emitter, channels: Int, write: Callable[[Mask | None], None]) -> None:
    """Written for whole vectors of channels, and with the mask of those there are."""
    for whole in e.branch(channels >= e.lanes):
        write(None if whole else e.mask(channels))


@vector_function(restrict="target source")
def spread_pixels(e: Emitter, target: Ptr, places: Ints, source: Ptr, pitch: Int, pixels: Int, channels: Int) -> None:
    """target[places[k] + c] = source[k * pitch + c] for k < pixels, c < lanes; zeros for c from `channels` on.

    pixels, channels >= 1.
    """

    def write(mask: Mask | None) -> None:
        at = Var(source)
        for k in e.range(pixels, at):
            (target + places[k]).store(at.value.vector(mask=mask))
            at.value = at.value + pitch

    _with_channels(e, channels, write)


@spread_pixels.plain
def spread_pixels_plain(target, places, source, pitch, pixels, channels, *, tile):
    for k in range(pixels):
        for c in range(tile.lanes):
            target[places[k] + c] = source[k * pitch + c] if c < channels else 0


@vector_function(restrict="target source")
def collect_pixels(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, pitch: Int, pixels: Int, channels: Int
) -> None:
    """target[k * target_pitch + c] = source[k * pitch + c] for k < pixels, c < channels (a vector of them at most).

    Of the source whole vectors are read. pixels, channels >= 1.
    """

    def write(mask: Mask | None) -> None:
        to, at = Var(target), Var(source)
        for _ in e.range(pixels, to, at):
            to.value.store(at.value.vector(), mask)
            to.value, at.value = to.value + target_pitch, at.value + pitch

    _with_channels(e, channels, write)


@collect_pixels.plain
def collect_pixels_plain(target, target_pitch, source, pitch, pixels, channels, *, tile):
    for k in range(pixels):
        for c in range(min(channels, tile.lanes)):
            target[k * target_pitch + c] = source[k * pitch + c]


def _blocks_of_pixels(pixels: Int, write: Callable[[Int, Mask | None], None]) -> None:
    """write(first, mask) for blocks of `lanes` pixels, the last of which may overlap the one before: the mask is None;
    for fewer pixels than one block, the mask of those there are."""
    e = pixels.e
    last = pixels - e.lanes
    for fewer in e.branch(last < 0):
        if fewer:
            write(e.number(0), e.mask(pixels))
        else:
            for k in e.range(pixels.blocks_of(e.lanes)):
                write((k * e.lanes).at_most(last), None)


def _planes_of(pointer: Ptr, pitch: Int, channels: Int) -> list[Ptr]:
    """Pointers to `lanes` planes, to the last of them again for those there are not."""
    e, last = pointer.e, channels - 1
    return [pointer + pitch * e.number(i).at_most(last) for i in range(e.lanes)]


@vector_function(restrict="target source")
def spread_planes(e: Emitter, target: Ptr, places: Ints, source: Ptr, pitch: Int, pixels: Int, channels: Int) -> None:
    """target[places[k] + c] = source[c * pitch + k] for k < pixels, c < lanes; the last channel again from `channels`
    on.

    Pixels may be stored in any order, and more than once. pixels, channels >= 1.
    """
    planes = _planes_of(source, pitch, channels)

    def write(first: Int, mask: Mask | None) -> None:
        rows = [(plane + first).vector(mask=mask) for plane in planes]
        last = pixels - 1
        for k, row in reversed(list(enumerate(transposed(rows)))):
            index = first + k
            if mask is not None:  # a pixel that is not there goes where the last one is stored after it
                index = index.at_most(last)
            (target + places[index]).store(row)

    _blocks_of_pixels(pixels, write)


@spread_planes.plain
def spread_planes_plain(target, places, source, pitch, pixels, channels, *, tile):
    for k in range(pixels):
        for c in range(tile.lanes):
            target[places[k] + c] = source[min(c, channels - 1) * pitch + k]


@vector_function(restrict="target source")
def collect_planes(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, pitch: Int, pixels: Int, channels: Int
) -> None:
    """target[c * target_pitch + k] = source[k * pitch + c] for k < pixels, c < channels (a vector of them at most).

    Of the source whole vectors are read. pixels, channels >= 1.
    """
    planes = _planes_of(target, target_pitch, channels)

    def write(first: Int, mask: Mask | None) -> None:
        at = [source + (first + k) * pitch for k in range(e.lanes)]
        if mask is not None:
            last = source + (pixels - 1) * pitch
            at = [(e.number(k) < pixels).choose(place, last) for k, place in enumerate(at)]
        rows = transposed([place.vector() for place in at])
        for plane, row in reversed(list(zip(planes, rows, strict=True))):  # the last channel overwrites what is not one
            (plane + first).store(row, mask)

    _blocks_of_pixels(pixels, write)


@collect_planes.plain
def collect_planes_plain(target, target_pitch, source, pitch, pixels, channels, *, tile):
    for c in range(min(channels, tile.lanes)):
        for k in range(pixels):
            target[c * target_pitch + k] = source[k * pitch + c]


# ---------------------------------------------------------------------------------------------------------------------
# A look at values
# ---------------------------------------------------------------------------------------------------------------------


@vector_function()
def count_not_finite(e: Emitter, values: Ptr, vectors: Int) -> Int:
    """A number that is not 0 if an infinity or nan is among the `vectors` >= 1 vectors at `values`."""
    total = Block.of([e.zero()])
    for k in e.range(vectors, total):
        total[0] += (values + k * e.lanes).vector() * e.zero()  # 0 * inf and 0 * nan are nan, and stay
    return total[0].is_nan().bits()


@count_not_finite.plain
def count_not_finite_plain(values, vectors, *, tile):
    lanes = values[: vectors * tile.lanes].reshape(vectors, tile.lanes)
    return sum(1 << lane for lane in range(tile.lanes) if not np.isfinite(lanes[:, lane]).all())
