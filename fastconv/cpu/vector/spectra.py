"""Products of spectra: what a convolution is in the frequency domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .call import vector_function
from .emit import Emitter, Int, Ptr, fma

SPECTRA_ROWS = 4  # most rows at once: 8 accumulators, enough to hide the latency of a multiply-add


class Rows(NamedTuple):
    rows: int
    conjugate: bool


@vector_function(restrict="a b c")
def _multiply_rows(
    e: Emitter, vectors: Int, terms: Int, a: Ptr, a_row: Int, a_term: Int, b: Ptr, b_term: Int, c: Ptr, c_row: Int,
    add: Int, *, variant: Rows,
) -> None:  # fmt: skip
    """`multiply_spectra` of a number of rows that is known."""
    rows, conjugate = variant
    lanes = range(e.lanes)
    signs = e.constants([1.0, -1.0] * (e.lanes // 2) if conjugate else [-1.0, 1.0] * (e.lanes // 2))
    adds = add.differs(0)
    for v in e.range(vectors):
        place = v * e.lanes
        sums = e.zeros(rows, 2)
        for t in e.range(terms, sums):
            right = (b + (place + t * b_term)).vector()
            real, imaginary = right.pick([k & ~1 for k in lanes]), right.pick([k | 1 for k in lanes])
            left = a + (place + t * a_term)
            for i in range(rows):  # (re, im) * Re b, and (im, re) * Im b
                value = (left + a_row * i).vector()
                sums[i, 0] = fma(value, real, sums[i, 0])
                sums[i, 1] = fma(value.pick([k ^ 1 for k in lanes]), imaginary, sums[i, 1])
        for i in range(rows):
            total = sums[i, 0] * signs + sums[i, 1] if conjugate else sums[i, 0] + sums[i, 1] * signs
            target = c + (place + c_row * i)
            target.store(adds.choose(total + target.vector(), total))


@vector_function(restrict="a b c")
def multiply_spectra(
    e: Emitter, rows: Int, vectors: Int, terms: Int, a: Ptr, a_row: Int, a_term: Int, b: Ptr, b_term: Int, c: Ptr,
    c_row: Int, conjugate: Int, add: Int,
) -> None:  # fmt: skip
    """C[i, f] (+)= sum over t < terms of A[i, t, f] * B[t, f] for i < rows, in complex numbers (re, im, re, im, ...).

        a  [rows][terms][vectors * lanes]   A, of steps a_row and a_term, in real elements as all of them
        b  [terms][vectors * lanes]         B, of step b_term
        c  [rows][vectors * lanes]          C, of step c_row

    f runs over the complex numbers of `vectors` vectors. 1 <= rows <= SPECTRA_ROWS; vectors and terms >= 1. With
    `conjugate` = 1 (else it is 0) it is the conjugate of A, and with `add` not 0 the sum is added to what C held. The
    sum runs over t in one chain for each element.
    """
    for case in e.switch(rows * 2 + conjugate, range(2, 2 * SPECTRA_ROWS + 2)):
        if case is not None:
            _multiply_rows.emit_call(
                e, vectors, terms, a, a_row, a_term, b, b_term, c, c_row, add, variant=Rows(case // 2, case % 2 == 1)
            )


def _complex(array: Sequence[float], place: int) -> complex:
    return complex(array[place], array[place + 1])


@multiply_spectra.plain
def multiply_spectra_plain(
    rows, vectors, terms, a, a_row, a_term, b, b_term, c, c_row, conjugate, add, *, tile
):  # fmt: skip
    for i in range(rows):
        for f in range(0, vectors * tile.lanes, 2):
            total = _complex(c, i * c_row + f) if add else 0j
            for t in range(terms):
                left, right = _complex(a, i * a_row + t * a_term + f), _complex(b, t * b_term + f)
                total += (left.conjugate() if conjugate else left) * right
            c[i * c_row + f], c[i * c_row + f + 1] = total.real, total.imag
