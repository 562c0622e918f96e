"""Depthwise convolutions of whole planes that are read in place, with a row along the vectors.

A row of output is cut into parts of one or two vectors; a kernel computes several rows of a part, of many planes. Lanes
that are not there, beside the plane, are left out by masks, and rows that are not there by branches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from ..records import Integer, Record
from .call import vector_function
from .depthwise_rows import meeting
from .emit import Block, Emitter, Fields, Int, Ints, Mask, Ptr, Var, Vec, fma, interleave, separate
from .gemm import BIAS, RELU
from .tile import Tile

# Rows of output that have their accumulators in registers: seven, since the planes of so many networks have 7, 14, 28,
# 56 and 112, or four, where that leaves fewer rows over.
PLANE_ROWS = (7, 4)
# Rows (and columns) of the filter, by stride. With stride 1, a weight of each row, and two vectors of seven rows of
# output, are in registers; with stride 2, the first half of one vector must hold what follows the last of a row.
PLANE_TAPS = {1: range(2, 16), 2: range(2, 6)}
# Those of the weight gradient: an accumulator for each, and the rows of the output gradient that share a row of input,
# are in registers. With 5 x 5 and 7 x 7, in several passes, it took 1.0 to 1.2 times as long as by channels (AVX-512).
GRADIENT_TAPS = {1: range(2, 5), 2: range(2, 4)}
PLANE_PAIRS = 4  # pairs of rows of an input gradient with stride 2 at once: 16 accumulators
SPREAD_TAPS = range(2, 8)  # two columns of weights are in registers as well


class Part(NamedTuple):
    """A part of a row of output."""

    lanes: int
    vectors: int

    @property
    def columns(self) -> int:
        return self.lanes * self.vectors


def row_parts(t: Tile) -> tuple[Part, ...]:
    """The parts of a row of output that there are functions for, by width."""
    return Part(t.lanes // 2, 1), Part(t.lanes, 1), Part(t.lanes, 2)


def plane_loads(part: Part, taps: int, stride: int) -> list[int]:
    """Where the vectors that are loaded for a row of input begin, after what the first tap of the first lane reads."""
    if stride == 1:
        return [k + n * part.lanes for k in range(taps) for n in range(part.vectors)]
    return [n * part.lanes for n in range(2 * part.vectors + 1)]


def prefetch_next(
    turn: Int, x_prefetch: Ptr, inputs: int, y_prefetch: Ptr, outputs: int, writes: bool = True
) -> None:
    """Prefetch the turn-th `inputs` elements from x_prefetch on, and `outputs` elements from y_prefetch on; null: none.

    They go to the second nearest caches: what is being computed fills the nearest. With every line prefetched into
    that, too, rows of 112 took 1.5 times as long (AVX-512).
    """
    e = turn.e
    for _ in e.when(x_prefetch.address().differs(0)):
        for pointer, elements, write in ((x_prefetch, inputs, False), (y_prefetch, outputs, writes)):
            first = pointer + turn * elements
            for n in range(0, elements, 64 // e.size):
                (first + n).prefetch(write, locality=2)


class PlaneSteps(Record):
    """From one to the next, in elements: of output, input, weights and bias of `correlate_planes`."""

    y_plane: Integer
    y_row: Integer
    x_plane: Integer
    x_depth: Integer
    x_row: Integer
    w_plane: Integer
    w_depth: Integer
    w_height: Integer
    w_width: Integer
    bias: Integer


class RowBlock(NamedTuple):
    """What a function of `correlate_planes` is for: rows of output at once, for square filters of so many taps."""

    taps: int
    stride: int
    rows: int
    part: Part


@vector_function(restrict="masks y x w bias")
def correlate_planes(
    e: Emitter, masks: Ints, y: Ptr, x: Ptr, w: Ptr, bias: Ptr, first_row: Int, height: Int, depths: Int, planes: Int,
    rows: Int, y_rows: Int, x_prefetch: Ptr, y_prefetch: Ptr, steps: Fields[PlaneSteps], flags: Int, *,
    variant: RowBlock,
) -> None:  # fmt: skip
    """A part of `rows` >= PLANE_ROWS[-1] rows of `planes` planes of output: y[r, q] = sum over d, h, k of w * x.

    The rows at once are at most `rows`. y[r, q] reads row first_row + stride * r + h of the input, whose rows are 0 to
    height - 1, and there x[stride * q + k]: x, y and w are where row 0, column 0 (which need not exist) and tap 0 of
    the first plane of each are. `masks` has one for each vector of a row of output, and one for each of `plane_loads`:
    bits of the lanes that exist. What does not exist is left out if it is a row, and is zero if it is a lane; no memory
    of it is read or written. All counts >= 1; y_rows is not used.
    The sum is one chain of multiply-adds for every element, whatever the rows and vectors: with stride 1 in the order
    of d, k, h, with stride 2 in that of d, h, k. Then `bias` is added, one number for each plane, or the same for all
    without the flag BIAS, and RELU replaces what is below zero by zero. Meanwhile, if x_prefetch is not null and the
    stride 1, as many cache lines as are read are prefetched from there on, one after the other, and as many as are
    written from y_prefetch on.
    """
    taps, stride, many, (lanes, vectors) = variant
    s = steps.load()
    leasts = _least(e, flags).broadcast(lanes)
    bias_step = flags.has(BIAS).choose(s.bias, e.number(0))
    last = rows - many
    reached = stride * (many - 1) + taps

    def mask_at(place: Int | int) -> Mask:
        return e.mask_of_bits(masks[place], lanes)

    for n in e.range(rows.blocks_of(many)):
        done = (n * many).at_most(last)  # the last block may overlap the one before
        first = first_row + done * stride
        within = [(first + i).below(height) for i in range(reached)]
        x_plane, y_plane = Var(x + s.x_row * first), Var(y + done * s.y_row)
        w_plane, bias_plane = Var(w), Var(bias)
        for m in e.range(planes, x_plane, y_plane, w_plane, bias_plane):
            if stride == 1:  # with stride 2, four times as much to prefetch gained nothing
                elements = many * variant.part.columns
                prefetch_next(n * planes + m, x_prefetch, elements, y_prefetch, elements)
            x_now, w_now, sums = Var(x_plane.value), Var(w_plane.value), e.zeros(many, vectors, lanes=lanes)
            for _ in e.range(depths, x_now, w_now, sums):
                if stride == 1:
                    _add_columns(sums, variant, x_now.value, w_now.value, s, within, mask_at)
                else:
                    _add_rows_by_two(sums, variant, x_now.value, w_now.value, s, within, mask_at)
                x_now.value, w_now.value = x_now.value + s.x_depth, w_now.value + s.w_depth

            added = bias_plane.value[0].broadcast(lanes)
            stored = [mask_at(k) for k in range(vectors)]
            for (r, k), value in zip(sums.indices(), sums.values, strict=True):
                (y_plane.value + s.y_row * r + k * lanes).store((value + added).at_least(leasts), stored[k])
            x_plane.value, y_plane.value = x_plane.value + s.x_plane, y_plane.value + s.y_plane
            w_plane.value, bias_plane.value = w_plane.value + s.w_plane, bias_plane.value + bias_step


def _least(e: Emitter, flags: Int):
    return flags.has(RELU).choose(e.real(0.0), e.real(-math.inf))


def _weight(w: Ptr, s, a: int, k: Int | int, lanes: int) -> Vec:
    return w[s.w_height * a + s.w_width * k].broadcast(lanes)


def _load_row(start: Ptr, masks: list[Mask], lanes: int) -> list[Vec]:
    return [(start + n * lanes).vector(mask=mask) for n, mask in enumerate(masks)]


def _each_row(
    variant: RowBlock, sums: Block, within: list, s, add: Callable[[Int, list[tuple[int, int]]], None]
) -> None:  # fmt: skip
    """add(offset of a row, (row of output, row of the filter) of each that reads it), for each row there is.

    The branches also keep LLVM from loading more rows at once than there are registers for.
    """
    e = s.x_row.e
    for i, is_there in enumerate(within):
        found = meeting(i, variant.rows, variant.stride, variant.taps)
        if found:
            for _ in e.when(is_there, sums):
                add(s.x_row * i, found)


def _add_columns(
    sums: Block, variant: RowBlock, x: Ptr, w: Ptr, s, within: list, mask_at: Callable[[Int | int], Mask]
) -> None:  # fmt: skip
    """One column of the filter after the other, so that its weights are in registers."""
    taps, _, _, (lanes, vectors) = variant
    e = x.e

    def add_column(k: Int) -> None:
        x_tap, weights = x + k, [_weight(w, s, a, k, lanes) for a in range(taps)]
        entry = k * vectors + vectors
        loaded = [mask_at(entry + n) for n in range(vectors)]

        def add(row: Int, found: list[tuple[int, int]]) -> None:
            for n, value in enumerate(_load_row(x_tap + row, loaded, lanes)):
                for r, a in found:
                    sums[r, n] = fma(weights[a], value, sums[r, n])

        _each_row(variant, sums, within, s, add)

    if taps <= 3:  # a loop took 1.1 to 1.2 times as long
        for number in range(taps):
            add_column(e.number(number))
    else:
        for k in e.range(taps, sums):
            add_column(k)


def _add_rows_by_two(
    sums: Block, variant: RowBlock, x: Ptr, w: Ptr, s, within: list, mask_at: Callable[[Int | int], Mask]
) -> None:  # fmt: skip
    """One row of input after the other, so that its even and odd places are separated once."""
    taps, _, _, (lanes, vectors) = variant
    e = x.e
    loaded = [mask_at(vectors + n) for n in range(2 * vectors + 1)]
    few = taps * taps <= 9  # weights that fit into registers
    kept = {(a, k): _weight(w, s, a, k, lanes) for a in range(taps) for k in range(taps) if few}

    def add(row: Int, found: list[tuple[int, int]]) -> None:
        vectors_of_row = [*_load_row(x + row, loaded, lanes), e.undefined(lanes)]
        pairs = [separate(*vectors_of_row[n : n + 2]) for n in range(0, len(vectors_of_row), 2)]
        for k in range(taps):
            values = [pair[k % 2] for pair in pairs]
            if k > 1:
                shifted = [k // 2 + n for n in range(lanes)]
                values = [one.pick(shifted, other) for one, other in itertools.pairwise(values)]
            for r, a in found:
                each = kept[a, k] if few else _weight(w, s, a, k, lanes)
                for n in range(vectors):
                    sums[r, n] = fma(each, values[n], sums[r, n])

    _each_row(variant, sums, within, s, add)


def _is_there(masks, place: int, lane: int) -> bool:
    return bool(masks[place] >> lane & 1)


@correlate_planes.plain
def correlate_planes_plain(
    masks, y, x, w, bias, first_row, height, depths, planes, rows, y_rows, x_prefetch, y_prefetch, steps, flags, *,
    variant, tile,
):  # fmt: skip
    taps, stride, _, (lanes, vectors) = variant
    for plane, r, q in itertools.product(range(planes), range(rows), range(lanes * vectors)):
        if not _is_there(masks, q // lanes, q % lanes):
            continue
        total = 0
        for d, h, k in itertools.product(range(depths), range(taps), range(taps)):
            row = first_row + stride * r + h
            load = (k * vectors + q // lanes, q % lanes) if stride == 1 else divmod(2 * q + k, lanes)
            if 0 <= row < height and _is_there(masks, vectors + load[0], load[1]):
                weight = w[plane * steps.w_plane + d * steps.w_depth + h * steps.w_height + k * steps.w_width]
                total += weight * x[plane * steps.x_plane + d * steps.x_depth + row * steps.x_row + stride * q + k]
        total += bias[plane * steps.bias if flags & BIAS else 0]
        y[plane * steps.y_plane + r * steps.y_row + q] = max(total, 0) if flags & RELU else total


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


class PlaneGradientSteps(Record):
    """From one to the next, in elements: of `accumulate_planes`."""

    sums_plane: Integer
    dy_plane: Integer
    dy_run: Integer
    dy_row: Integer
    x_plane: Integer
    x_run: Integer
    x_row: Integer


class Taps(NamedTuple):
    """What a function of `accumulate_planes` is for: square filters."""

    taps: int
    stride: int
    lanes: int


@vector_function(restrict="masks sums dy x zeros")
def accumulate_planes(
    e: Emitter, masks: Ints, sums: Ptr, dy: Ptr, x: Ptr, zeros: Ptr, first_row: Int, height: Int, planes: Int,
    runs: Int, rows: Int, x_prefetch: Ptr, dy_prefetch: Ptr, steps: Fields[PlaneGradientSteps], *, variant: Taps,
) -> None:  # fmt: skip
    """sums[h, k] += sum over q of dy[r, q] * x[stride * r + h, stride * q + k], of a part of `rows` rows of `planes`
    planes, each of `runs` runs (samples, or planes of the depth).

    As for `correlate_planes`, with parts of one vector, and one mask for a row of dy; and rows of input that do not
    exist are read from `zeros`, which is row 0 where they begin, since zero times an infinite gradient is nan. Each of
    the sums is a vector of partial sums, which `sum_lanes` adds up. rows >= taps / stride, rounded up. If x_prefetch
    is not null, as many cache lines as each run reads are prefetched meanwhile, from there and from dy_prefetch on.
    """
    taps, stride, lanes = variant
    s = steps.load()
    window = -(-taps // stride)
    zero = e.zero(lanes)
    exists, places = e.mask_of_bits(masks[0], lanes), plane_loads(Part(lanes, 1), taps, stride)
    loaded = [e.mask_of_bits(masks[1 + n], lanes) for n in range(len(places))]

    def load_row(at: Ptr) -> list[Vec]:
        """What each column of the filter reads; zeros in lanes that do not exist, since infinity times zero is nan."""
        loads = [(at + n).vector(mask=mask) for n, mask in zip(places, loaded, strict=True)]
        if stride == 1:
            return loads
        pairs = separate(*loads[:2]), separate(loads[2], e.undefined(lanes))
        values = []
        for k in range(taps):
            shifted = [k // 2 + n for n in range(lanes)]
            value = pairs[0][k % 2].pick(shifted, pairs[1][k % 2]) if k > 1 else pairs[0][k]
            values.append(exists.choose(value, zero))
        return values

    sums_plane, dy_plane, x_plane = Var(sums), Var(dy), Var(x)
    for _ in e.range(planes, sums_plane, dy_plane, x_plane):
        targets = [sums_plane.value + n * e.lanes for n in range(taps * taps)]
        dy_run, x_run = Var(dy_plane.value), Var(x_plane.value)
        totals = Block((taps, taps), [target.vector(lanes) for target in targets])
        for _ in e.range(runs, dy_run, x_run, totals):

            def add(j: Int, gradients: dict[int, Vec], x_now: Ptr = x_run.value, totals: Block = totals) -> None:
                """Rows stride * j + n, n < stride, of the input, with rows j - m of the gradient, gradients[m]."""
                for n in range(stride):
                    found = [(value, stride * m + n) for m, value in gradients.items() if stride * m + n < taps]
                    if not found:
                        continue
                    at = first_row + (j * stride + n)
                    start = at.below(height).choose(x_now + at * s.x_row, zeros)
                    for k, value in enumerate(load_row(start)):
                        for gradient, a in found:
                            totals[a, k] = fma(gradient, value, totals[a, k])

            def gradient_row(j: Int, dy_now: Ptr = dy_run.value) -> Vec:
                return (dy_now + j * s.dy_row).vector(mask=exists)

            newest: list[Vec] = []  # the last rows of the output gradient, the newest first
            for n in range(window - 1):
                newest = [gradient_row(e.number(n)), *newest]
                add(e.number(n), dict(enumerate(newest)))
            held = Block.of(newest)
            for k in e.range(rows - (window - 1), held, totals):
                j = k + (window - 1)
                prefetch_next(k, x_prefetch, stride * stride * lanes, dy_prefetch, lanes, False)
                newest = [gradient_row(j), *held.values]
                add(j, dict(enumerate(newest)))
                held.values[:] = newest[: window - 1]
            for n in range(window - 1):
                add(rows + n, {m: held[m - n - 1] for m in range(n + 1, window)})
            dy_run.value, x_run.value = dy_run.value + s.dy_run, x_run.value + s.x_run
        for value, target in zip(totals.values, targets, strict=True):
            target.store(value)
        sums_plane.value, dy_plane.value = sums_plane.value + s.sums_plane, dy_plane.value + s.dy_plane
        x_plane.value = x_plane.value + s.x_plane


@accumulate_planes.plain
def accumulate_planes_plain(
    masks, sums, dy, x, zeros, first_row, height, planes, runs, rows, x_prefetch, dy_prefetch, steps, *, variant, tile
):  # fmt: skip
    taps, stride, lanes = variant
    for plane, run, r, q in itertools.product(range(planes), range(runs), range(rows), range(lanes)):
        if not _is_there(masks, 0, q):
            continue
        gradient = dy[plane * steps.dy_plane + run * steps.dy_run + r * steps.dy_row + q]
        for h, k in itertools.product(range(taps), range(taps)):
            row = first_row + stride * r + h
            load = (k, q) if stride == 1 else divmod(2 * q + k, lanes)
            if 0 <= row < height and _is_there(masks, 1 + load[0], load[1]):
                at = plane * steps.x_plane + run * steps.x_run + row * steps.x_row + stride * q + k
                sums[plane * steps.sums_plane + (h * taps + k) * tile.lanes + q] += gradient * x[at]


# ---------------------------------------------------------------------------------------------------------------------
# The input gradient with stride 2
# ---------------------------------------------------------------------------------------------------------------------


class Spreading(NamedTuple):
    """What a function of `spread_planes_by_two` is for: square filters, and the parity of the taps of even elements."""

    taps: int
    parity: int
    lanes: int


def spread_shifts(taps: int, parity: int) -> dict[int, list[tuple[int, int]]]:
    """By the distance of an output gradient from a pair of elements: (tap, element of the pair) that meet there."""
    shifts: dict[int, list[tuple[int, int]]] = {}
    for tap in range(taps):
        phase = (tap - parity) % 2
        shifts.setdefault((phase + parity - tap) // 2, []).append((tap, phase))
    return dict(sorted(shifts.items()))


# One function: its accumulators are registers from the first tap to the last.
@vector_function(restrict="masks y x w bias")
def spread_planes_by_two(
    e: Emitter, masks: Ints, y: Ptr, x: Ptr, w: Ptr, bias: Ptr, first_row: Int, height: Int, depths: Int, planes: Int,
    pairs: Int, y_rows: Int, x_prefetch: Ptr, y_prefetch: Ptr, steps: Fields[PlaneSteps], flags: Int, *,
    variant: Spreading,
) -> None:  # fmt: skip
    """The input gradient with stride 2, with the arguments of `correlate_planes`, by which it can be called.

    There are `pairs` >= PLANE_PAIRS pairs of rows of y, of which the first y_rows rows exist; a part is a vector of
    pairs of columns, and has two masks for what is stored, and one for each of `spread_shifts`. Row 2p + f of y is the
    sum of the taps h of which f + parity - h is even, each at row first_row + p + (f + parity - h) / 2 of x; and the
    same for columns, without first_row. `depths` and its steps are not used.
    """
    taps, parity, lanes = variant
    s = steps.load()
    shifts = spread_shifts(taps, parity)
    stored = [e.mask_of_bits(masks[n], lanes) for n in range(2)]
    loaded = {shift: e.mask_of_bits(masks[2 + n], lanes) for n, shift in enumerate(shifts)}
    leasts = _least(e, flags).broadcast(lanes)
    bias_step = flags.has(BIAS).choose(s.bias, e.number(0))
    last = pairs - PLANE_PAIRS
    for block in e.range(pairs.blocks_of(PLANE_PAIRS)):
        done = (block * PLANE_PAIRS).at_most(last)  # the last block may overlap the one before
        first = first_row + done
        rows = range(min(shifts), PLANE_PAIRS + max(shifts))
        within = {i: (first + i).below(height) for i in rows}
        exists = [done * 2 + r < y_rows for r in range(2 * PLANE_PAIRS)]
        x_plane, y_plane = Var(x + s.x_row * first), Var(y + done * 2 * s.y_row)
        w_plane, bias_plane = Var(w), Var(bias)
        for m in e.range(planes, x_plane, y_plane, w_plane, bias_plane):
            elements = PLANE_PAIRS * lanes
            prefetch_next(block * planes + m, x_prefetch, elements, y_prefetch, 4 * elements)
            sums = e.zeros(PLANE_PAIRS, 2, 2, lanes=lanes)  # of each row its even columns, and its odd ones
            for shift, columns in shifts.items():
                weights = {
                    (a, k): _weight(w_plane.value, s, a, k, lanes) for a in range(taps) for k, _ in columns
                }
                for i in rows:
                    for _ in e.when(within[i], sums):
                        value = (x_plane.value + (s.x_row * i + shift)).vector(mask=loaded[shift])
                        for distance, found in shifts.items():
                            pair = i - distance
                            if 0 <= pair < PLANE_PAIRS:
                                for (a, f), (k, g) in itertools.product(found, columns):
                                    sums[pair, f, g] = fma(weights[a, k], value, sums[pair, f, g])
            added = bias_plane.value[0].broadcast(lanes)
            for row in range(2 * PLANE_PAIRS):
                for _ in e.when(exists[row]):
                    target = y_plane.value + s.y_row * row
                    values = [(sums[row // 2, row % 2, g] + added).at_least(leasts) for g in range(2)]
                    for n, value in enumerate(interleave(*values)):
                        (target + n * lanes).store(value, stored[n])
            x_plane.value, y_plane.value = x_plane.value + s.x_plane, y_plane.value + s.y_plane
            w_plane.value, bias_plane.value = w_plane.value + s.w_plane, bias_plane.value + bias_step


@spread_planes_by_two.plain
def spread_planes_by_two_plain(
    masks, y, x, w, bias, first_row, height, depths, planes, pairs, y_rows, x_prefetch, y_prefetch, steps, flags, *,
    variant, tile,
):  # fmt: skip
    taps, parity, lanes = variant
    shifts = list(spread_shifts(taps, parity))
    for plane, row, column in itertools.product(range(planes), range(min(2 * pairs, y_rows)), range(2 * lanes)):
        if not _is_there(masks, *divmod(column, lanes)):
            continue
        total = bias[plane * steps.bias if flags & BIAS else 0]
        for h, k in itertools.product(range(taps), range(taps)):
            (down, odd_h), (right, odd_k) = (divmod(n % 2 + parity - tap, 2) for n, tap in ((row, h), (column, k)))
            if odd_h or odd_k:
                continue
            from_row = first_row + row // 2 + down
            if 0 <= from_row < height and _is_there(masks, 2 + shifts.index(right), column // 2):
                weight = w[plane * steps.w_plane + h * steps.w_height + k * steps.w_width]
                total += weight * x[plane * steps.x_plane + from_row * steps.x_row + column // 2 + right]
        y[plane * steps.y_plane + row * steps.y_row + column] = max(total, 0) if flags & RELU else total
