"""What softmax cross-entropy does in vectors: on spans of numbers side by side, and on the columns of a tile.

Spans are the classes of one position, columns the positions of a tile that has a row for each class. Sums are made in
the element type, in each lane of each vector by itself, and continued in float64, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numba import types

from ..elementary import EXP_CONSTANTS
from .call import vector_function
from .emit import F32, I32, Block, Bool, Carried, Double, Doubles, Emitter, Int, Mask, Ptr, Real, Var, Vec, fma, ir
from .emit import reduced as in_fixed_order
from .move import stream

# Vectors in flight: an exponential is a chain of 12 operations of 4 cycles each, so that one alone would use a fifth of
# the multiply-add units.
_GROUP = 4

SUM_ROWS = 64  # rows of a tile that are added in the element type before float64 takes over


class Group(NamedTuple):
    """Vectors side by side: where they begin, and the lanes that are there, where not all of them are."""

    places: list[Int]
    masks: list[Mask | None]

    def load(self, source: Ptr, otherwise: float = 0.0) -> list[Vec]:
        pairs = zip(self.places, self.masks, strict=True)
        return [(source + place).vector(mask=mask, otherwise=otherwise) for place, mask in pairs]

    def store(self, target: Ptr, values: Sequence[Vec]) -> None:
        for place, mask, value in zip(self.places, self.masks, values, strict=True):
            (target + place).store(value, mask)


def _groups(count: Int, *carried: Carried) -> Iterator[Group]:
    """The groups of `count` elements: yields one for all that are whole, in a loop, and one for what is left."""
    e = count.e
    size = _GROUP * e.lanes
    groups, left = count.quotient(size), count.remainder(size)
    for _ in e.when(groups > 0, *carried):
        for k in e.range(groups, *carried):
            yield Group([k * size + v * e.lanes for v in range(_GROUP)], [None] * _GROUP)
    for _ in e.when(left > 0, *carried):
        masks: list[Mask | None] = [e.mask(left - v * e.lanes) for v in range(_GROUP)]
        yield Group([groups * size + v * e.lanes for v in range(_GROUP)], masks)


def _exp(x: Vec) -> Vec:
    """exp(x) for x <= 0 or nan: the operations of `elementary.exp`, and its bits, without the test for overflow."""
    e = x.e
    kind = types.float32 if e.element == F32 else types.float64
    c = EXP_CONSTANTS[kind]
    x = x.at_least(e.constant(c.low))  # nan passes
    shifted = fma(x, e.constant(c.log2e), e.constant(c.shift))
    n = shifted - e.constant(c.shift)
    r = fma(n, e.constant(-c.ln2_high), x)
    r = fma(n, e.constant(-c.ln2_low), r)
    value = e.constant(c.polynomial[0])
    for coefficient in (*c.polynomial[1:], 1.0, 1.0):
        value = fma(value, r, e.constant(coefficient))
    if e.lanes * e.size == 64:  # one instruction of AVX-512 in the place of seven
        name, bits = ("ps", ir.IntType(16)) if e.element == F32 else ("pd", ir.IntType(8))
        options = ir.Constant(bits, -1), ir.Constant(I32, 4)
        return Vec(e, e.llvm(f"llvm.x86.avx512.mask.scalef.{name}.512", x.ir.type, value.ir, n.ir, n.ir, *options))
    k = shifted.as_integers() - c.unbiased
    low = k >> 1
    for half in (low, k - low):
        value = value * (half << c.mantissa_bits).as_numbers()
    return value


def _larger(value: Vec, most: Vec) -> Vec:
    """The larger of two vectors: `most` where `value` is nan."""
    return (value > most).choose(value, most)


def _product(q: Vec, x: Vec, so_far: Vec) -> Vec:
    """so_far + q * x, and so_far where q is 0, even for x = -inf."""
    zero = q.e.zero()
    return fma(q, q.differs(zero).choose(x, zero), so_far)


def _total(values: Sequence[Vec]) -> Double:
    """The sum of all lanes, in float64."""
    total = in_fixed_order([value.widened() for value in values], lambda x, y: x + y)
    return Double(total.e, total.ir)


# ---------------------------------------------------------------------------------------------------------------------
# Spans
# ---------------------------------------------------------------------------------------------------------------------


@vector_function()
def span_maximum(e: Emitter, source: Ptr, count: Int) -> Real:
    """The largest of `count` >= 0 numbers: nan is passed over, and the result is -inf when nothing else is there."""
    most = Block.of([e.constant(-math.inf)] * _GROUP)
    for group in _groups(count, most):
        for v, value in enumerate(group.load(source, -math.inf)):
            most[v] = _larger(value, most[v])
    return in_fixed_order(most.values, _larger)


@span_maximum.plain
def span_maximum_plain(source, count, *, tile):
    return max((x for x in source[:count] if not math.isnan(x)), default=-math.inf)


@vector_function()
def span_exponentials(e: Emitter, target: Ptr, source: Ptr, count: Int, base: Real, ahead: Int) -> Double:
    """target[i] = exp(source[i] - base) for i < count, where no number is larger than base; return their sum.

    `source` may be `target`. What is `ahead` elements further on in both is fetched into the cache.
    """
    bases = base.broadcast()
    sums = e.zeros(_GROUP)
    for group in _groups(count, sums):
        for place in group.places:
            (source + (place + ahead)).prefetch()
            (target + (place + ahead)).prefetch(write=True)
        powers = [_exp(value - bases) for value in group.load(source, -math.inf)]
        group.store(target, powers)
        for v, power in enumerate(powers):
            sums[v] += power
    return _total(sums.values)


@span_exponentials.plain
def span_exponentials_plain(target, source, count, base, ahead, *, tile):
    total = 0.0
    for i in range(count):
        target[i] = np.exp(source[i] - base)
        total += float(target[i])
    return total


@vector_function()
def span_scale(e: Emitter, target: Ptr, source: Ptr, count: Int, factor: Real, past_cache: Bool) -> None:
    """target[i] = source[i] * factor for i < count; if `past_cache`, with stores that leave the caches alone.

    `source` may be `target`. See `move.drain_stores` for what is to follow such stores.
    """
    factors = {n: factor.broadcast(n) for n in (1 << k for k in range(e.lanes.bit_length()))}
    stream(target, source, count, past_cache, lambda value: value * factors[value.lanes])


@span_scale.plain
def span_scale_plain(target, source, count, factor, past_cache, *, tile):
    for i in range(count):
        target[i] = source[i] * factor


@vector_function()
def span_products(
    e: Emitter, coefficients: Ptr, source: Ptr, count: Int, base: Real, sums: Doubles, ahead: Int
) -> None:
    """sums[0] += sum of q[i] * (source[i] - base), sums[1] += sum of q[i], for i < count and q the coefficients.

    Where q is 0, 0 is added even for source = -inf. A lane adds count / (4 vectors) numbers in the element type. The
    coefficients `ahead` elements further on are fetched into the cache.
    """
    bases = base.broadcast()
    parts = e.zeros(2, _GROUP)
    for group in _groups(count, parts):
        for place in group.places:
            (coefficients + (place + ahead)).prefetch()
        q_values, z_values = group.load(coefficients), group.load(source)
        for v, (q, z) in enumerate(zip(q_values, z_values, strict=True)):
            parts[0, v] = _product(q, z - bases, parts[0, v])
        for v, q in enumerate(q_values):
            parts[1, v] += q
    for n in range(2):
        sums[n] = sums[n] + _total([parts[n, v] for v in range(_GROUP)])


@span_products.plain
def span_products_plain(coefficients, source, count, base, sums, ahead, *, tile):
    for i in range(count):
        if coefficients[i] != 0:
            sums[0] += float(coefficients[i] * (source[i] - base))
            sums[1] += float(coefficients[i])


@vector_function()
def span_gradient(
    e: Emitter, target: Ptr, powers: Ptr, coefficients: Ptr, count: Int, scale: Real, outer: Real
) -> None:
    """target[i] = powers[i] * scale - coefficients[i] * outer for i < count."""
    scales, outers = scale.broadcast(), outer.broadcast()
    for group in _groups(count):
        pairs = zip(group.load(powers), group.load(coefficients), strict=True)
        group.store(target, [power * scales - q * outers for power, q in pairs])


@span_gradient.plain
def span_gradient_plain(target, powers, coefficients, count, scale, outer, *, tile):
    for i in range(count):
        target[i] = powers[i] * scale - coefficients[i] * outer


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


@vector_function()
def raise_maxima(e: Emitter, top: Ptr, source: Ptr, pitch: Int, rows: Int, count: Int) -> None:
    """top[j] = the largest of top[j] and source[r * pitch + j] for r < rows, j < count, nan aside; rows >= 1."""
    for group in _groups(count):
        row, most = Var(source), Block.of(group.load(top))
        for _ in e.range(rows, row, most):
            for v, value in enumerate(group.load(row.value)):
                most[v] = _larger(value, most[v])
            row.value = row.value + pitch
        group.store(top, most.values)


@raise_maxima.plain
def raise_maxima_plain(top, source, pitch, rows, count, *, tile):
    for j in range(count):
        for r in range(rows):
            if source[r * pitch + j] > top[j]:
                top[j] = source[r * pitch + j]


@vector_function()
def column_exponentials(
    e: Emitter, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, rows: Int, count: Int, base: Ptr,
    total: Doubles, ahead: Ptr, ahead_pitch: Int,
) -> None:  # fmt: skip
    """target[r, j] = exp(source[r, j] - base[j]) for r < rows, j < count; their sum over r is added to total[j].

        target  [rows][target_pitch]
        source  [rows][source_pitch]   may be `target`
        base    [count]                no number of a column is larger
        total   [count in whole groups of vectors]   of columns that are not there, each row adds 1
        ahead   [rows][ahead_pitch]    fetched into the cache, not read

    rows >= 1.
    """
    blocks = rows.blocks_of(SUM_ROWS)
    for group in _groups(count):
        bases = group.load(base)
        totals = Block.of([(total + place).vector() for place in group.places])
        to, row, further = Var(target), Var(source), Var(ahead)
        for block in e.range(blocks, to, row, further, totals):
            parts = e.zeros(_GROUP)
            for _ in e.range((rows - block * SUM_ROWS).at_most(SUM_ROWS), to, row, further, parts):
                for place in group.places:
                    (further.value + place).prefetch()
                powers = [_exp(z - low) for z, low in zip(group.load(row.value), bases, strict=True)]
                group.store(to.value, powers)
                for v, power in enumerate(powers):
                    parts[v] += power
                to.value, row.value = to.value + target_pitch, row.value + source_pitch
                further.value = further.value + ahead_pitch
            for v in range(_GROUP):
                totals[v] += parts[v].widened()
        for place, value in zip(group.places, totals.values, strict=True):
            (total + place).store(value)


@column_exponentials.plain
def column_exponentials_plain(
    target, target_pitch, source, source_pitch, rows, count, base, total, ahead, ahead_pitch, *, tile
):  # fmt: skip
    for r in range(rows):
        for j in range(count):
            target[r * target_pitch + j] = np.exp(source[r * source_pitch + j] - base[j])
            total[j] += float(target[r * target_pitch + j])
    for j in range(count, -(-count // (_GROUP * tile.lanes)) * _GROUP * tile.lanes):
        total[j] += rows


@vector_function()
def column_products(
    e: Emitter, coefficients: Ptr, source: Ptr, rows: Int, width: Int, base: Ptr, weighted: Doubles,
    coefficient_sum: Doubles,
) -> None:  # fmt: skip
    """Over rows r: weighted[j] += sum of q[r, j] * (source[r, j] - base[j]), coefficient_sum[j] += sum of q[r, j].

        coefficients  [rows][width]   q; where it is 0, 0 is added even for source = -inf
        source        [rows][width]
        base, weighted, coefficient_sum  [width]

    1 <= rows <= SUM_ROWS; `width` is a multiple of the elements of a group of vectors.
    """
    for group in _groups(width):
        bases = group.load(base)
        q_row, z_row, parts = Var(coefficients), Var(source), e.zeros(2, _GROUP)
        for _ in e.range(rows, q_row, z_row, parts):
            q_values, z_values = group.load(q_row.value), group.load(z_row.value)
            for v, (q, z, low) in enumerate(zip(q_values, z_values, bases, strict=True)):
                parts[0, v] = _product(q, z - low, parts[0, v])
            for v, q in enumerate(q_values):
                parts[1, v] += q
            q_row.value, z_row.value = q_row.value + width, z_row.value + width
        for n, sums in enumerate((weighted, coefficient_sum)):
            for v, place in enumerate(group.places):
                at = sums + place
                at.store(at.vector() + parts[n, v].widened())


@column_products.plain
def column_products_plain(coefficients, source, rows, width, base, weighted, coefficient_sum, *, tile):
    for r in range(rows):
        for j in range(width):
            q = coefficients[r * width + j]
            if q != 0:
                weighted[j] += float(q * (source[r * width + j] - base[j]))
                coefficient_sum[j] += float(q)


@vector_function()
def scale_columns(e: Emitter, values: Ptr, pitch: Int, rows: Int, count: Int, factor: Ptr) -> None:
    """values[r * pitch + j] *= factor[j] for r < rows, j < count; rows >= 1."""
    for group in _groups(count):
        row, factors = Var(values), group.load(factor)
        for _ in e.range(rows, row):
            group.store(row.value, [x * y for x, y in zip(group.load(row.value), factors, strict=True)])
            row.value = row.value + pitch


@scale_columns.plain
def scale_columns_plain(values, pitch, rows, count, factor, *, tile):
    for r in range(rows):
        for j in range(count):
            values[r * pitch + j] *= factor[j]
