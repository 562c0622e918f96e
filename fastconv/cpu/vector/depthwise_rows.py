"""Rows of a plane with the taps of one filter, with a row along the vectors: from a slab that has its border."""

from __future__ import annotations

import math
from typing import NamedTuple

from .call import vector_function
from .emit import Block, Emitter, Int, Ints, Ptr, Real, Var, fma, reduced
from .gemm import ADD, BIAS, RELU
from .tile import Tile


class Taps(NamedTuple):
    """What a function of `correlate_rows` or `accumulate_rows` is for."""

    rows: int  # of the filter, at once
    stride: int  # rows of input between two rows of output


# Output rows that share input rows share their loads
SHARED_ROWS = (*(Taps(rows, 1) for rows in (1, 2, 3, 5, 7)), *(Taps(rows, 2) for rows in (3, 5, 7)))


class Shape(NamedTuple):
    """A block of the output: an accumulator for each row and vector."""

    rows: int
    lanes: int
    vectors: int


def shapes_of(t: Tile) -> list[Shape]:
    """The blocks of the output, by width. Beside the accumulators, a register for each row of the filter.

    Seven rows, since the planes of so many networks have 7, 14, 28, 56 and 112.
    """
    half = [Shape(7, t.lanes // 2, 1)] if t.lanes >= 8 else []
    if t.registers == 32:
        return [*half, Shape(7, t.lanes, 1), Shape(7, t.lanes, 2), Shape(4, t.lanes, 4)]
    return [*half, Shape(7, t.lanes, 1), Shape(4, t.lanes, 2)]


def meeting(i: int, outputs: int, stride: int, taps: int) -> list[tuple[int, int]]:
    """(output, tap) for each of so many outputs that reads input i with one of the taps."""
    return [(r, i - stride * r) for r in range(outputs) if 0 <= i - stride * r < taps]


class CorrelationBlock(NamedTuple):
    taps: Taps
    shape: Shape


@vector_function(restrict="y x w")
def correlate_row_blocks(
    e: Emitter, y: Ptr, y_pitch: Int, x: Ptr, x_pitch: Int, w: Ptr, w_pitch: Int, depth: Int, offsets: Ints,
    blocks: Int, columns: Int, add: Int, bias: Real, least: Real, *, variant: CorrelationBlock,
) -> None:  # fmt: skip
    """`blocks` blocks, one below the other, of what `correlate_rows` computes, of as many columns as fit into one."""
    taps, stride = variant.taps
    rows, lanes, vectors = variant.shape
    biases, leasts = bias.broadcast(lanes), least.broadcast(lanes)
    # the last vector ends with the row, and may overlap the one before; a row below one vector has a mask instead
    places = [e.number(n * lanes) for n in range(vectors)]
    mask = None
    if vectors == 1:
        mask = e.mask(columns, lanes)
    else:
        places[-1] = columns - lanes
        places[1:-1] = [place.at_most(places[-1]) for place in places[1:-1]]

    x_block, y_block = Var(x), Var(y)
    for _ in e.range(blocks, x_block, y_block):
        targets = [y_block.value + (y_pitch * r + place) for r in range(rows) for place in places]
        sums = e.zeros(rows, vectors, lanes=lanes)
        for _ in e.when(add.differs(0), sums):
            sums.values[:] = [target.vector(lanes, mask) for target in targets]
        starts = [x_block.value + x_pitch * i for i in range(stride * (rows - 1) + taps)]
        for k in e.range(depth, sums):
            offset = offsets[k]
            weights = [w[w_pitch * a + k].broadcast(lanes) for a in range(taps)]
            for i, start in enumerate(starts):
                found = meeting(i, rows, stride, taps)
                for n, place in enumerate(places if found else ()):
                    value = (start + offset + place).vector(lanes)
                    for r, a in found:
                        sums[r, n] = fma(weights[a], value, sums[r, n])
        for value, target in zip(sums.values, targets, strict=True):
            target.store((value + biases).at_least(leasts), mask)
        x_block.value, y_block.value = x_block.value + x_pitch * (rows * stride), y_block.value + y_pitch * rows


@correlate_row_blocks.plain
def correlate_row_blocks_plain(
    y, y_pitch, x, x_pitch, w, w_pitch, depth, offsets, blocks, columns, add, bias, least, *, variant, tile
):  # fmt: skip
    taps, stride = variant.taps
    for r in range(blocks * variant.shape.rows):
        for q in range(columns):
            total = y[r * y_pitch + q] if add else 0
            for k in range(depth):
                for a in range(taps):
                    total += w[a * w_pitch + k] * x[(stride * r + a) * x_pitch + q + offsets[k]]
            y[r * y_pitch + q] = max(total + bias, least)


@vector_function()
def correlate_rows(
    e: Emitter, y: Ptr, y_pitch: Int, x: Ptr, x_pitch: Int, w: Ptr, w_pitch: Int, depth: Int, offsets: Ints, rows: Int,
    columns: Int, flags: Int, bias: Ptr, *, variant: Taps,
) -> None:  # fmt: skip
    """y[r, q] = sum over a < taps, k < depth of w[a, k] * x[stride * r + a, q + offsets[k]], r < rows, q < columns.

    The pitches are those of the first index; `flags` and `bias` (one number, read if BIAS is set) are as for
    `gemm.contract`. depth, rows, columns >= 1; `variant` is one of SHARED_ROWS. The sum, which begins with what y holds
    if ADD is set, is one chain of multiply-adds in the order of k, then a, for every element, whatever the rows and
    columns. Up to a vector of x beyond a row may be read, and is not used; nothing of y is touched but y[r, q].
    """
    given = flags.has(BIAS).choose(bias, w)[0]  # there may be no memory at `bias`
    number = flags.has(BIAS).choose(given, e.real(-0.0))
    least = flags.has(RELU).choose(e.real(0.0), e.real(-math.inf))
    add = flags & ADD
    shapes = shapes_of(e.tile)

    # as many vectors of a row at once as there are functions for, but two for the last ones, which may overlap
    most = shapes[-1].vectors
    first = Var(e.number(0))
    for _ in e.range(columns.blocks_of(e.lanes).blocks_of(most), first):
        left = columns - first.value
        width = (left <= (most + 1) * e.lanes).choose(e.number((most - 1) * e.lanes), e.number(most * e.lanes))
        width = (left <= most * e.lanes).choose(left, width)
        shape = e.number(len(shapes) - 1)
        for n in reversed(range(len(shapes) - 1)):
            shape = (width <= shapes[n].lanes * shapes[n].vectors).choose(e.number(n), shape)

        # rows: as many blocks of the most as there are, then the rest
        done = e.number(0)
        for height in (None, 2, 1):
            if height is None:
                most_rows = e.number(shapes[-1].rows)
                blocks = rows.quotient(most_rows)
                for n, other in enumerate(shapes[:-1]):
                    here = shape.equals(n)
                    most_rows = here.choose(e.number(other.rows), most_rows)
                    blocks = here.choose(rows.quotient(other.rows), blocks)  # by a constant: no division
            else:
                most_rows = e.number(height)
                blocks = (rows - done).quotient(height)
            for _ in e.when(blocks > 0):
                y_now = y + (done * y_pitch + first.value)
                x_now = x + (done * variant.stride * x_pitch + first.value)
                for case in e.switch(shape, range(len(shapes))):
                    if case is not None:
                        each = shapes[case]._replace(rows=height or shapes[case].rows)
                        correlate_row_blocks.emit_call(
                            e, y_now, y_pitch, x_now, x_pitch, w, w_pitch, depth, offsets, blocks, width, add, number,
                            least, variant=CorrelationBlock(variant, each),
                        )  # fmt: skip
            done = done + blocks * most_rows
        first.value = first.value + width


@correlate_rows.plain
def correlate_rows_plain(
    y, y_pitch, x, x_pitch, w, w_pitch, depth, offsets, rows, columns, flags, bias, *, variant, tile
):  # fmt: skip
    taps, stride = variant
    for r in range(rows):
        for q in range(columns):
            total = y[r * y_pitch + q] if flags & ADD else 0
            for k in range(depth):
                for a in range(taps):
                    total += w[a * w_pitch + k] * x[(stride * r + a) * x_pitch + q + offsets[k]]
            if flags & BIAS:
                total += bias[0]
            if flags & RELU:
                total = max(total, 0)
            y[r * y_pitch + q] = total


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------

_GRADIENT_ROWS = 4  # rows of the output gradient at once


def columns_at_once(t: Tile, taps: int) -> int:
    """Columns of the filter whose gradients are summed at once: an accumulator for each, and for each of its rows."""
    wanted = {1: 4, 7: 3}.get(taps, taps)
    return max(1, min(wanted, (t.registers - 2 - _GRADIENT_ROWS) // taps))


class GradientBlock(NamedTuple):
    taps: Taps
    columns: int  # of the filter
    rows: int  # of the output gradient
    lanes: int


@vector_function(restrict="sums x dy")
def accumulate_row_blocks(
    e: Emitter, sums: Ptr, pitch: Int, x: Ptr, x_pitch: Int, offsets: Ints, dy: Ptr, dy_pitch: Int, blocks: Int,
    columns: Int, *, variant: GradientBlock,
) -> None:  # fmt: skip
    """`accumulate_rows` for some columns of the filter, and for `blocks` blocks of rows of dy; or half a vector of
    columns of dy, if the lanes are half of those of a vector."""
    (taps, stride), many, rows, lanes = variant
    places = [sums + (pitch * a + j) * e.lanes for a in range(taps) for j in range(many)]
    shifts = [offsets[j] for j in range(many)]
    full, rest = columns.quotient(lanes), columns.remainder(lanes)
    mask = e.mask(rest if lanes == e.lanes else columns, lanes)
    zero = e.zero(lanes)
    x_block, dy_block, totals = Var(x), Var(dy), Block((taps, many), [place.vector(lanes) for place in places])
    for _ in e.range(blocks, x_block, dy_block, totals):
        x_rows = [x_block.value + x_pitch * i for i in range(stride * (rows - 1) + taps)]
        dy_rows = [dy_block.value + dy_pitch * r for r in range(rows)]

        def add(column: Int, masked: bool, x_rows: list[Ptr] = x_rows, dy_rows: list[Ptr] = dy_rows) -> None:
            """Add the products of a vector of columns."""
            gradients = [(row + column).vector(lanes, mask if masked else None) for row in dy_rows]
            for i, row in enumerate(x_rows):
                found = meeting(i, rows, stride, taps)
                for j in range(many if found else 0):
                    value = (row + (column + shifts[j])).vector(lanes)
                    if masked:  # what lies beyond the row may be infinite, and times zero be nan
                        value = mask.choose(value, zero)
                    for r, a in found:
                        totals[a, j] = fma(gradients[r], value, totals[a, j])

        if lanes == e.lanes:
            for _ in e.when(full > 0, totals):
                for k in e.range(full, totals):
                    add(k * lanes, False)
            for _ in e.when(rest > 0, totals):
                add(full * lanes, True)
        else:
            add(e.number(0), True)
        x_block.value, dy_block.value = x_block.value + x_pitch * (rows * stride), dy_block.value + dy_pitch * rows
    for value, place in zip(totals.values, places, strict=True):
        place.store(value)


@accumulate_row_blocks.plain
def accumulate_row_blocks_plain(
    sums, pitch, x, x_pitch, offsets, dy, dy_pitch, blocks, columns, *, variant, tile
):  # fmt: skip
    accumulate_rows_plain(
        sums, pitch, x, x_pitch, offsets, variant.columns, dy, dy_pitch, blocks * variant.rows, columns,
        variant=variant.taps, tile=tile,
    )  # fmt: skip


@vector_function()
def accumulate_rows(
    e: Emitter, sums: Ptr, pitch: Int, x: Ptr, x_pitch: Int, offsets: Ints, depth: Int, dy: Ptr, dy_pitch: Int,
    rows: Int, columns: Int, *, variant: Taps,
) -> None:  # fmt: skip
    """sums[a, k] += sum over r < rows, q < columns of dy[r, q] * x[stride * r + a, q + offsets[k]].

    a < taps, k < depth; `variant` is one of SHARED_ROWS. Each of the sums is a vector of partial sums, that of the
    columns q of which q % lanes is its lane, which `sum_lanes` adds up, and `pitch` counts vectors. Up to a vector of x
    beyond a row may be read, and is not used; of dy nothing is read but dy[r, q].
    """
    widths = [e.lanes // 2, e.lanes] if e.lanes >= 8 else [e.lanes]
    narrow = columns <= widths[0] if len(widths) > 1 else None

    def columns_from(first: Int, many: int) -> None:
        done = e.number(0)
        for height in (_GRADIENT_ROWS, 2, 1):
            blocks = (rows - done).quotient(height)
            for _ in e.when(blocks > 0):
                arguments = (
                    sums + first * e.lanes, pitch, x + done * variant.stride * x_pitch, x_pitch, offsets + first,
                    dy + done * dy_pitch, dy_pitch, blocks, columns,
                )  # fmt: skip
                for is_narrow in e.branch(narrow) if narrow else (False,):
                    kind = GradientBlock(variant, many, height, widths[0 if is_narrow else -1])
                    accumulate_row_blocks.emit_call(e, *arguments, variant=kind)
            done = done + blocks * height

    first = e.number(0)
    for many in sorted({columns_at_once(e.tile, variant.rows), 1}, reverse=True):
        count = (depth - first).quotient(many)
        for _ in e.when(count > 0):
            for k in e.range(count):
                columns_from(first + k * many, many)
        first = first + count * many


@accumulate_rows.plain
def accumulate_rows_plain(
    sums, pitch, x, x_pitch, offsets, depth, dy, dy_pitch, rows, columns, *, variant, tile
):  # fmt: skip
    taps, stride = variant
    for a in range(taps):
        for k in range(depth):
            for r in range(rows):
                for q in range(columns):
                    place = (a * pitch + k) * tile.lanes + q % tile.lanes
                    sums[place] += dy[r * dy_pitch + q] * x[(stride * r + a) * x_pitch + q + offsets[k]]


@vector_function()
def sum_lanes(e: Emitter, target: Ptr, sums: Ptr, count: Int) -> None:
    """target[k] = the sum of the lanes of vector k of `sums`, for k < count, count >= 1: always in the same order."""
    for k in e.range(count):
        target[k] = reduced([(sums + k * e.lanes).vector()], lambda x, y: x + y)


@sum_lanes.plain
def sum_lanes_plain(target, sums, count, *, tile):
    for k in range(count):
        target[k] = sum(sums[k * tile.lanes : (k + 1) * tile.lanes])
