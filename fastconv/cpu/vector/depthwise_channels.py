"""Depthwise convolutions with channels in the lanes: each pixel a vector, or several side by side."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from ..records import Integer, Record
from .call import vector_function
from .depthwise_rows import meeting
from .emit import Block, Bool, Emitter, Fields, Int, Ints, Ptr, Real, Var, Vec, fma
from .gemm import ADD, RELU
from .tile import Tile


class Neighbours(NamedTuple):
    """What reads neighbouring pixels of a row, one for each tap.

    With n lane rotations, n lanes after the other are a group, every lane of which sees the pixels of all: with the
    weights [tap][rotation] those of the lane `rotation` further on, around the end of the group.
    """

    taps: int
    stride: int  # of neighbouring outputs
    lane_rotations: int = 1

    @property
    def weights(self) -> int:
        return self.taps * self.lane_rotations


# (taps, stride) that there are functions for
CHANNEL_TAPS = ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1), (3, 2), (5, 2), (7, 2))


def rotated(value: Vec, rotation: int, lane_rotations: int) -> Vec:
    """Each lane has that of the lane `rotation` further on, around the end of its group."""
    if rotation == 0:
        return value
    n = lane_rotations
    return value.pick([lane // n * n + (lane + rotation) % n for lane in range(value.lanes)])


def rotated_plain(value, rotation, lane_rotations):
    return np.roll(value.reshape(-1, lane_rotations), -rotation, axis=1).ravel()


def pixels_at_once(t: Tile) -> tuple[int, ...]:
    """Pixels of a row of output that have their accumulators in registers, beside the weights of a row of up to seven
    taps: multiples of seven, since the planes of so many networks have 7, 14, 28, 56 and 112 columns."""
    return (14, 7, 4, 2, 1) if t.registers == 32 else (7, 4, 2, 1)


class Steps(Record):
    """From one to the next, in elements: of output, input and weights of `correlate_pixels`."""

    y_row: Integer
    y_column: Integer
    x_row: Integer
    x_column: Integer  # of neighbours
    # between the planes, rows and runs of neighbours that the taps read
    x_depth: Integer
    x_height: Integer
    x_width: Integer
    w_depth: Integer
    w_height: Integer
    w_width: Integer
    w_block: Integer  # between the weights of blocks of channels, and between their biases
    widths: Integer  # runs of neighbours in a row of taps
    x_prefetch: Integer  # how far on in x to prefetch, after the last plane of the taps; 0 is not at all
    y_prefetch: Integer


class PixelBlock(NamedTuple):
    neighbours: Neighbours
    pixels: int


@vector_function(restrict="y x w bias zeros")
def correlate_pixel_blocks(
    e: Emitter, y: Ptr, x: Ptr, w: Ptr, bias: Ptr, zeros: Ptr, reach: Ints, blocks: Int, rows: Int, low: Int,
    high: Int, depths: Int, steps: Fields[Steps], add: Int, least: Real, *, variant: PixelBlock,
) -> None:  # fmt: skip
    """`correlate_pixels` for as many columns as a block has pixels, of all rows."""
    (taps, stride, _), many = variant
    s = steps.load()
    x_prefetch = s.x_prefetch.differs(0).choose(s.x_prefetch + (depths - 1) * s.x_depth, e.number(0))
    reached = stride * (many - 1) + taps
    outside = {}  # neighbours that may lie beside the plane: every output reads one that does not
    for i in range(reached):
        left, right = e.number(i) < low, e.number(i) >= high
        if i < taps - 1 and i > stride * (many - 1):
            outside[i] = left | right
        elif i < taps - 1:
            outside[i] = left
        elif i > stride * (many - 1):
            outside[i] = right
    leasts = least.broadcast()
    y_row = Var(y)
    for r in e.range(rows, y_row):
        entry = reach + r * 3
        first_row, first_tap, heights = (entry[n] for n in range(3))
        y_block, x_block = Var(y_row.value), Var(x + first_row * s.x_row)
        w_block, bias_block = Var(w + first_tap * s.w_height), Var(bias)
        for _ in e.range(blocks, y_block, x_block, w_block, bias_block):
            targets = [y_block.value + s.y_column * q for q in range(many)]
            for _ in e.when(x_prefetch.differs(0)):
                # what the columns of a row further down read, but for what its neighbours to the left have prefetched
                start, first = x_block.value + x_prefetch, max(taps - stride, 0)
                for h in range(stride):
                    for i in range(first, first + stride * many):
                        (start + (s.x_row * h + s.x_column * i)).prefetch(locality=2)
                for target in targets:
                    (target + s.y_prefetch).prefetch(write=True, locality=2)
            sums = e.zeros(many)
            for _ in e.when(add.differs(0), sums):
                sums.values[:] = [target.vector() for target in targets]

            x_depth, w_depth = Var(x_block.value), Var(w_block.value)
            for _ in e.range(depths, x_depth, w_depth, sums):
                x_height, w_height = Var(x_depth.value), Var(w_depth.value)
                for _ in e.range(heights, x_height, w_height, sums):
                    x_width, w_width = Var(x_height.value), Var(w_height.value)
                    for _ in e.range(s.widths, x_width, w_width, sums):
                        _add_taps(sums, variant.neighbours, x_width.value, s.x_column, w_width.value, outside, zeros)
                        x_width.value, w_width.value = x_width.value + s.x_width, w_width.value + s.w_width
                    x_height.value, w_height.value = x_height.value + s.x_height, w_height.value + s.w_height
                x_depth.value, w_depth.value = x_depth.value + s.x_depth, w_depth.value + s.w_depth

            added = bias_block.value.vector()
            for value, target in zip(sums.values, targets, strict=True):
                target.store((value + added).at_least(leasts))
            y_block.value, x_block.value = y_block.value + e.lanes, x_block.value + e.lanes
            w_block.value, bias_block.value = w_block.value + s.w_block, bias_block.value + s.w_block
        y_row.value = y_row.value + s.y_row


def _add_taps(
    sums: Block, neighbours: Neighbours, x: Ptr, x_column: Int, w: Ptr, outside: dict[int, Bool], zeros: Ptr
) -> None:  # fmt: skip
    """The products of a run of neighbours, for each of the pixels that have sums."""
    (taps, stride, rotations), many, e = neighbours, len(sums.values), x.e
    weights = [(w + n * e.lanes).vector() for n in range(taps * rotations)]
    for i in range(stride * (many - 1) + taps):
        found = meeting(i, many, stride, taps)
        if not found:
            continue
        place = x + x_column * i
        value = (outside[i].choose(zeros, place) if i in outside else place).vector()
        for rotation in range(rotations):
            turned = rotated(value, rotation, rotations)
            for q, a in found:
                sums[q] = fma(weights[a * rotations + rotation], turned, sums[q])


@correlate_pixel_blocks.plain
def correlate_pixel_blocks_plain(
    y, x, w, bias, zeros, reach, blocks, rows, low, high, depths, steps, add, least, *, variant, tile
):  # fmt: skip
    flags = (ADD if add else 0) | (RELU if least == 0 else 0)
    correlate_pixels_plain(
        y, x, w, bias, zeros, reach, blocks, rows, variant.pixels, low, high, depths, steps, flags,
        variant=variant.neighbours, tile=tile,
    )  # fmt: skip


@vector_function()
def correlate_pixels(
    e: Emitter, y: Ptr, x: Ptr, w: Ptr, bias: Ptr, zeros: Ptr, reach: Ints, blocks: Int, rows: Int, columns: Int,
    low: Int, high: Int, depths: Int, steps: Fields[Steps], flags: Int, *, variant: Neighbours,
) -> None:  # fmt: skip
    """Rows of output pixels, each a vector of channels: y[r, q] = sum over d, h, k, a of w[..] * x[..].

    Row r has its first tap at ``x + reach[3r] * x_row`` and ``w + reach[3r + 1] * w_height`` and reach[3r + 2] rows of
    taps, x_height and w_height from one another, in each of `depths` planes of them; a row of taps is `widths` runs of
    `taps` neighbours, which are x_column from one another. Column q of the output is stride * x_column further on in x,
    and y_column in y. All counts >= 1. ADD and RELU of `flags` are as for `gemm.contract`; `bias` is a vector, and
    read always.
    Of the neighbours a row reads, counted from its first, those before `low` and those from `high` on are not read:
    they are the vector `zeros`. There are at most taps - 1 on either side, and none if `widths` is not 1.
    If x_prefetch is not 0, the cache lines of `stride` rows, x_row from one another, that begin so far after the first
    tap of a row in the last plane are prefetched, and those of the output y_prefetch further on.
    And the same for `blocks` blocks of channels: vectors that follow one another in x and y, w_block in w and `bias`.
    The sum of an element is one chain of multiply-adds, in the order of d, h, k, a, that begins with what y holds if
    ADD is set. With lane rotations the chain goes through them for each tap.
    """
    add = flags & ADD
    least = flags.has(RELU).choose(e.real(0.0), e.real(-math.inf))
    s = steps.load()
    done = e.number(0)
    for many in pixels_at_once(e.tile):
        count = (columns - done).quotient(many)
        for _ in e.when(count > 0):
            for k in e.range(count):
                first = done + k * many
                place = first * variant.stride
                correlate_pixel_blocks.emit_call(
                    e, y + first * s.y_column, x + place * s.x_column, w, bias, zeros, reach, blocks, rows,
                    low - place, high - place, depths, steps, add, least, variant=PixelBlock(variant, many),
                )  # fmt: skip
        done = done + count * many


@correlate_pixels.plain
def correlate_pixels_plain(
    y, x, w, bias, zeros, reach, blocks, rows, columns, low, high, depths, steps, flags, *, variant, tile
):  # fmt: skip
    taps, stride, rotations = variant
    n = tile.lanes
    for block, r, q in itertools.product(range(blocks), range(rows), range(columns)):
        first_row, first_tap, heights = reach[3 * r : 3 * r + 3]
        to = block * n + r * steps.y_row + q * steps.y_column
        total = y[to : to + n] if flags & ADD else 0
        for d, h, k in itertools.product(range(depths), range(heights), range(steps.widths)):
            x_at = block * n + first_row * steps.x_row + d * steps.x_depth + h * steps.x_height + k * steps.x_width
            w_at = block * steps.w_block + d * steps.w_depth + (first_tap + h) * steps.w_height + k * steps.w_width
            for i in range(stride * q, stride * q + taps):
                at = x_at + i * steps.x_column
                value = x[at : at + n] if low <= i < high else zeros
                for rotation in range(rotations):
                    total = total + w[w_at : w_at + n] * rotated_plain(value, rotation, rotations)
                    w_at += n
        total = total + bias[block * steps.w_block :][:n]
        y[to : to + n] = np.maximum(total, 0) if flags & RELU else total


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------

_GRADIENT_PIXELS = 4  # pixels of the output gradient at once


def gradient_tap_rows(t: Tile, weights: int) -> tuple[int, ...]:
    """Numbers of rows of so many weights that `accumulate_pixels` takes at once: there is an accumulator for each."""
    return tuple(n for n in (1, 2, 3, 5) if n == 1 or n * weights + _GRADIENT_PIXELS + 1 < t.registers)


class TapRows(NamedTuple):
    """What a function of `accumulate_pixels` is for."""

    neighbours: Neighbours
    rows: int  # of the filter
    in_place: bool


class GradientSteps(Record):
    """From one to the next, in elements: of what `accumulate_pixels` reads and adds to."""

    sums_row: Integer
    sums_block: Integer
    x_row: Integer  # between what rows of the output gradient read
    x_height: Integer  # between what rows of taps read
    x_column: Integer  # of neighbours
    dy_row: Integer
    dy_column: Integer
    # the same two steps of x, in rows of the plane
    row: Integer
    height: Integer


# One function: its accumulators are registers from the first pixel to the last.
@vector_function(restrict="sums x dy zeros")
def accumulate_pixels(
    e: Emitter, sums: Ptr, x: Ptr, dy: Ptr, zeros: Ptr, blocks: Int, rows: Int, columns: Int, low: Int, high: Int,
    first_row: Int, plane_rows: Int, x_prefetch: Int, dy_prefetch: Int, steps: Fields[GradientSteps], *,
    variant: TapRows,
) -> None:  # fmt: skip
    """sums[h, a] += sum over r < rows, q < columns of dy[r, q] * x[r, h, stride * q + a], each a vector of channels.

    a < taps, h < the rows of taps, one of `gradient_tap_rows`. The sum is made first, in the order of r, then q, and
    then added. And the same for `blocks` blocks of channels: vectors that follow one another in x and dy, sums_block in
    `sums`. With lane rotations: sums[h, a, rotation], of dy times the pixels of the lane `rotation` further on.
    In place, row (r, h) of x is row first_row + r * row + h * height of the plane, whose rows are 0 to plane_rows - 1.
    Where it is not one, the zeros at `zeros` are read, and so they are for neighbours, counted from the first that is
    read, before `low` and from `high` on. If dy_prefetch is not 0, the cache lines so much further on in dy are
    prefetched, and those x_prefetch further on in x. Else, all exist, a vector from one another if taps > 1; none of
    this is used.
    """
    (taps, stride, rotations), tap_rows, in_place = variant
    s = steps.load()

    def within(value: Int, least: Int, most: Int) -> Int:
        value = (value < least).choose(least, value)
        return (value > most).choose(most, value)

    # Columns before `inner` read something to the left of the plane, those from `outer` on something to the right: one
    # at a time. Where it was asked of every neighbour of four columns as well, 3 x 3 took 1.1 to 1.4 times as long.
    inner, outer = e.number(0), columns
    if in_place:
        inner = within((low + (stride - 1)).quotient(stride), inner, columns)
        outer = within((high - (taps - stride)).quotient(stride), inner, columns)
    full = (outer - inner).quotient(_GRADIENT_PIXELS)
    last = inner + full * _GRADIENT_PIXELS
    there = high - low
    spans = [(e.number(0), 1, inner), (inner, _GRADIENT_PIXELS, full), (last, 1, columns - last)]

    sums_block, x_block, dy_block = Var(sums), Var(x), Var(dy)
    for _ in e.range(blocks, sums_block, x_block, dy_block):
        x_row, dy_row, totals = Var(x_block.value), Var(dy_block.value), e.zeros(tap_rows, taps, rotations)
        for r in e.range(rows, x_row, dy_row, totals):
            starts = []
            for h in range(tap_rows):
                at = first_row + (r * s.row + s.height * h)
                start = x_row.value + s.x_height * h
                starts.append(at.below(plane_rows).choose(start, zeros) if in_place else start)
            for first, many, count in spans if in_place else spans[1:]:
                for _ in e.when(count > 0, totals):
                    for k in e.range(count, totals):
                        place = first + k * many
                        neighbour = place * stride
                        x_at, dy_at = neighbour * s.x_column, dy_row.value + place * s.dy_column
                        exists = None
                        if in_place and many == 1:
                            from_low = neighbour - low
                            exists = [(from_low + i).below(there) for i in range(taps)]
                        gradients = [(dy_at + s.dy_column * q).vector() for q in range(many)]
                        _add_products(
                            totals, gradients, [start + x_at for start in starts], variant, s.x_column, exists, zeros
                        )
                        if in_place and many > 1:
                            for _ in e.when(dy_prefetch.differs(0)):
                                for q in range(many):
                                    (dy_at + (dy_prefetch + s.dy_column * q)).prefetch(locality=2)
                                begin = x_row.value + (x_at + x_prefetch)
                                for h in range(max(tap_rows - stride, 0), tap_rows):  # no row before has these
                                    for i in range(stride * many):
                                        (begin + (s.x_height * h + s.x_column * i)).prefetch(locality=2)
            x_row.value, dy_row.value = x_row.value + s.x_row, dy_row.value + s.dy_row
        for (h, a, rotation), value in zip(totals.indices(), totals.values, strict=True):
            target = sums_block.value + (s.sums_row * h + (a * rotations + rotation) * e.lanes)
            target.store(value + target.vector())
        sums_block.value, x_block.value = sums_block.value + s.sums_block, x_block.value + e.lanes
        dy_block.value = dy_block.value + e.lanes


def _add_products(
    totals: Block, gradients: list[Vec], x_rows: list[Ptr], variant: TapRows, x_column: Int, exists: list | None,
    zeros: Ptr,
) -> None:  # fmt: skip
    """Those of neighbouring pixels of the gradient with what they read, of which some may have to exist."""
    (taps, stride, rotations), _, in_place = variant
    e, many = zeros.e, len(gradients)
    for h, x_tap in enumerate(x_rows):
        for i in range(stride * (many - 1) + taps):
            found = meeting(i, many, stride, taps)
            if not found:
                continue
            # numbers in the instructions where they are known: these are too many for registers
            at = x_tap + (e.number(i * e.lanes) if not in_place and taps > 1 else x_column * i)
            value = (exists[i].choose(at, zeros) if exists else at).vector()
            for rotation in range(rotations):
                turned = rotated(value, rotation, rotations)
                for q, a in found:
                    totals[h, a, rotation] = fma(gradients[q], turned, totals[h, a, rotation])


@accumulate_pixels.plain
def accumulate_pixels_plain(
    sums, x, dy, zeros, blocks, rows, columns, low, high, first_row, plane_rows, x_prefetch, dy_prefetch, steps, *,
    variant, tile,
):  # fmt: skip
    (taps, stride, rotations), tap_rows, in_place = variant
    n = tile.lanes
    for block, r, q, h in itertools.product(range(blocks), range(rows), range(columns), range(tap_rows)):
        within = 0 <= first_row + r * steps.row + h * steps.height < plane_rows
        gradient = dy[block * n + r * steps.dy_row + q * steps.dy_column :][:n]
        to = block * steps.sums_block + h * steps.sums_row
        for i in range(stride * q, stride * q + taps):
            at = block * n + r * steps.x_row + h * steps.x_height + i * steps.x_column
            value = x[at : at + n] if not in_place or (within and low <= i < high) else np.zeros(n)
            for rotation in range(rotations):
                sums[to : to + n] += gradient * rotated_plain(value, rotation, rotations)
                to += n
