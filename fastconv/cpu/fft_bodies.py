"""What of a convolution by Fourier transforms is loops: tiles copied out and in, and products of spectra."""

from __future__ import annotations

from numba import njit

from . import tasks
from .records import Integer, Integers, Reals, Record
from .vector.memory import fill_zero, offset
from .vector.move import copy_span
from .vector.spectra import SPECTRA_ROWS, multiply_spectra
from .vector.tile import lanes


class Numbers(Record):
    """One for each dimension."""

    d: Integer
    h: Integer
    w: Integer


class Tables(Record):
    """One for each dimension."""

    d: Integers
    h: Integers
    w: Integers


class Tiles(tasks.Parameters):
    """Tiles of an array that are copied, one after another in `tiles`, from it or to it."""

    array: Reals
    n_step: Integer  # of the array, in elements
    c_step: Integer
    step: Numbers
    tiles: Reals
    tile: Numbers  # points
    first_channel: Integer
    first_tile: Integer
    number: Integer  # of tiles of a channel
    count: Numbers  # tiles of a sample
    advance: Numbers  # points from a tile to the next


class Gather(Tiles):
    """Per dimension `tables` has the element of the array for every position of every tile, -1 for a zero."""

    tables: Tables
    used: Numbers  # points of a tile that are filled, the others are zero
    run_first: Integer  # positions run_first .. run_end of the last dimension follow one another in the array
    run_end: Integer


class Scatter(Tiles):
    """Of the points of a tile, shift .. shift + advance are results."""

    out: Numbers  # the size of the array
    stride: Numbers
    shift: Numbers
    bias: Reals
    relu: Integer
    add: Integer


class Operand(Record):
    """An array of spectra as the rows and columns of the matrix product that each frequency is, with steps in reals."""

    spectra: Reals
    row: Integer
    column: Integer
    group: Integer


class Multiply(tasks.Parameters):
    left: Operand  # its columns are terms
    right: Operand  # its rows are terms
    product: Operand
    rows: Integer
    columns: Integer
    terms: Integer
    reals: Integer  # of a spectrum: two for each frequency
    block: Integer  # reals of a task
    blocks: Integer
    column_block: Integer
    column_blocks: Integer
    conjugated: Integer
    add: Integer


@njit
def _place(p, tile):
    """(sample, first position in each dimension) of a tile, by its number."""
    rest, w = tile // p.count.w, tile % p.count.w
    rest, h = rest // p.count.h, rest % p.count.h
    return rest // p.count.d, rest % p.count.d * p.advance.d, h * p.advance.h, w * p.advance.w


@tasks.body(Gather)
def gather(task, worker, p, real):
    """Copy tile `task % number` of channel `task // number` from the array."""
    channel, tile = p.first_channel + task // p.number, p.first_tile + task % p.number
    n, d0, h0, w0 = _place(p, tile)
    table_d, table_h, table_w = offset(p.tables.d, d0), offset(p.tables.h, h0), offset(p.tables.w, w0)
    plane = offset(p.array, n * p.n_step + channel * p.c_step)
    row = offset(p.tiles, task * p.tile.d * p.tile.h * p.tile.w)
    used, step = p.used.w, p.step.w
    low = min(max(p.run_first - w0, 0), used)
    high = max(min(p.run_end - w0, used), low)
    for d in range(p.tile.d):
        for h in range(p.tile.h):
            if d >= p.used.d or h >= p.used.h or table_d[d] < 0 or table_h[h] < 0:
                fill_zero(row, p.tile.w)
            else:
                source = offset(plane, table_d[d] * p.step.d + table_h[h] * p.step.h)
                for w in range(low):
                    row[w] = source[table_w[w] * step] if table_w[w] >= 0 else 0
                if low < high:
                    run = offset(source, table_w[low] * step)
                    target = offset(row, low)
                    if step == 1:
                        copy_span(target, run, high - low)
                    else:
                        for w in range(high - low):
                            target[w] = run[w * step]
                for w in range(high, used):
                    row[w] = source[table_w[w] * step] if table_w[w] >= 0 else 0
                for w in range(used, p.tile.w):
                    row[w] = 0
            row = offset(row, p.tile.w)


@tasks.body(Scatter)
def scatter(task, worker, p, real):
    """Store every stride-th result of tile `task % number` of channel `task // number`, plus bias, through relu."""
    channel, tile = p.first_channel + task // p.number, p.first_tile + task % p.number
    n, d0, h0, w0 = _place(p, tile)
    plane = offset(p.array, n * p.n_step + channel * p.c_step)
    results = offset(p.tiles, task * p.tile.d * p.tile.h * p.tile.w)
    bias = p.bias[channel]
    stride_w, step = p.stride.w, p.step.w
    first_w, end_w = _strided(w0, p.advance.w, stride_w, p.out.w)
    first_d, end_d = _strided(d0, p.advance.d, p.stride.d, p.out.d)
    first_h, end_h = _strided(h0, p.advance.h, p.stride.h, p.out.h)
    for d in range(first_d, end_d):
        for h in range(first_h, end_h):
            place_d, place_h = d * p.stride.d - d0 + p.shift.d, h * p.stride.h - h0 + p.shift.h
            source = offset(results, (place_d * p.tile.h + place_h) * p.tile.w + p.shift.w - w0)
            row = offset(plane, d * p.step.d + h * p.step.h)
            relu = p.relu != 0
            if stride_w == 1 and step == 1 and not p.add:  # a loop that becomes vectors
                target = offset(row, first_w)
                source = offset(source, first_w)
                for w in range(end_w - first_w):
                    value = source[w] + bias
                    target[w] = 0 if relu and value < 0 else value
            else:
                for w in range(first_w, end_w):
                    value = source[w * stride_w] + bias
                    if p.add:
                        value += row[w * step]
                    row[w * step] = 0 if relu and value < 0 else value


@njit
def _strided(start, step, stride, size):
    """The multiples of the stride in start .. start + step, divided by it, up to `size`."""
    return (start + stride - 1) // stride, min((start + step + stride - 1) // stride, size)


@tasks.body(Multiply)
def multiply(task, worker, p, real):
    """At each frequency product[row, column] (+)= sum over terms of left[row, term] * right[term, column].

    A task has a block of frequencies that stays in L1 for all terms, and a block of columns, of one group.
    """
    block, rest = task % p.blocks, task // p.blocks
    column_block, group = rest % p.column_blocks, rest // p.column_blocks
    first = block * p.block
    reals = min(p.block, p.reals - first)
    left = offset(p.left.spectra, group * p.left.group + first)
    right = offset(p.right.spectra, group * p.right.group + first)
    product = offset(p.product.spectra, group * p.product.group + first)
    vectors = reals // lanes(real)
    rest_of_block = vectors * lanes(real)
    for row in range(0, p.rows, SPECTRA_ROWS):
        rows = min(SPECTRA_ROWS, p.rows - row)
        a = offset(left, row * p.left.row)
        for column in range(column_block * p.column_block, min((column_block + 1) * p.column_block, p.columns)):
            b = offset(right, column * p.right.column)
            c = offset(product, row * p.product.row + column * p.product.column)
            if vectors > 0:
                multiply_spectra(
                    rows, vectors, p.terms, a, p.left.row, p.left.column, b, p.right.row, c, p.product.row,
                    p.conjugated, p.add,
                )  # fmt: skip
            for k in range(rest_of_block, reals, 2):
                for i in range(rows):
                    _multiply_one(
                        p, offset(a, i * p.left.row + k), offset(b, k), offset(c, i * p.product.row + k)
                    )  # fmt: skip


@njit
def _multiply_one(p, a, b, c):
    """The product of one row and one column at one frequency."""
    re = im = a[0] * 0
    sign = -1 if p.conjugated else 1
    for term in range(p.terms):
        a_re, a_im = a[term * p.left.column], a[term * p.left.column + 1] * sign
        b_re, b_im = b[term * p.right.row], b[term * p.right.row + 1]
        re += a_re * b_re - a_im * b_im
        im += a_re * b_im + a_im * b_re
    if p.add:
        re += c[0]
        im += c[1]
    c[0], c[1] = re, im
