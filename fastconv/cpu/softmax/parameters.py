"""What both ways of softmax cross-entropy share: their sizes, what a task is told, and the softcap.

How it runs. There are two ways, each with a task body of its own; the vector loops of both are in `vector.softmax`:

    by class      class axis contiguous: one position at a time, along its classes
    by position   otherwise: up to WIDEST positions side by side, a tile of them with a row for each class; also for few
                  classes, where a vector of classes would be mostly empty

By class, a row is read once, in pieces that stay in the innermost cache: the maximum of a piece, its exponentials
relative to the maximum so far, and their sum, which is corrected where the maximum grows (Milakov and Gimelshein 2018).
The next piece is fetched meanwhile, and the lines it will be written to, so that memory and arithmetic work at the same
time. The exponentials are kept where the gradient will be, or in scratch memory in the second cache where that is
written past the caches, and need only be multiplied to become the gradient: one exp for each element. What is read and
written is then what a copy of the array reads and writes. By position the logits are worked on in place when
there are DIRECT_FROM positions side by side; else a tile is filled, worked on and written back whole. Where the
exponentials are too many to be kept they are computed again from the logits.

Each lane of a vector keeps a maximum and a sum of its own; by class they are then combined in a fixed tree. So an
operation on an element is the same instruction wherever the element lies, and the bits of a position's results depend
on C and on which of the two ways its strides choose: not on threads, batch or place in the batch. No lane adds
more than 64 numbers (128 with vectors of SSE or NEON) before float64 takes over.
"""

from __future__ import annotations

import numba

from .. import tasks
from ..elementary import tanh
from ..jit import helper
from ..records import Double, Doubles, Integer, Integers, Reals, Record
from ..vector.memory import out_of_line

LANES = 64  # each width of a tile by position is a multiple of it: 4 AVX-512 or 8 AVX2 vectors of float32
PIECE = 2048  # classes at once: 8 KB of float32, a quarter of a small L1, half of it with the exponentials
COLUMN_PIECE = 4096  # elements of a tile by position whose coefficients are made at once
TILE_BYTES = 16 * 1024  # of a tile by position, where its classes allow
KEPT_BYTES = 1024 * 1024  # most exponentials that are kept: the L2 of a Zen 4, half of that of a Golden Cove core
PAST_CACHE = 16 * 1024 * 1024  # bytes of gradient from which it would not stay in a cache anyway
WIDEST = 512  # lanes of a tile by position
DIRECT_FROM = 32  # positions side by side from which they are worked on in place, without a copy into a tile
BY_POSITION_BELOW = 64  # classes; below, contiguous classes are transposed into a tile by position
TASK = 32_768  # elements of a task, about 10 us: small beside a whole call, large beside the 0.1 us of starting it
ALONE = 8192  # elements up to which a call does not go through `tasks.run`, whose 3 us are felt
# Each way is compiled in two variants. This constant is False in the plain one, from which Numba cuts the branches that
# ask for it before it spends a third of the compile time on them: soft targets, label smoothing, softcap, log_softmax,
# exponentials that are not kept, and by class a gradient with other strides than 1.
GENERAL = True
FLOPS = 10  # of an element, for the choice between serial and parallel: serial below 100 000 elements


# A function that is called in one place is inlined before types are inferred: each that is not costs 50 ms to compile.
inline_once = numba.njit(error_model="numpy", inline="always")


class Array(Record):
    """An array (N, C, S): its first element, null where it is not given, and the elements from each to the next."""

    values: Reals
    n: Integer
    c: Integer
    s: Integer


class Rows(Record):
    """An array (N, S), in the same way."""

    values: Reals
    n: Integer
    s: Integer


class Labels(Record):
    """An array (N, S) of labels."""

    values: Integers
    n: Integer
    s: Integer


class Parameters(tasks.Parameters):
    """What a task body is told."""

    logits: Array
    grad: Array
    labels: Labels
    soft: Array  # targets that are probabilities
    weight: Reals
    grad_output: Rows
    loss: Rows
    lse: Rows
    partial: Doubles  # the loss of each unit
    task_units: Integer  # units of a task
    units: Integer
    classes: Integer
    positions: Integer
    space: Integer  # positions of a sample
    ignore_index: Integer
    width: Integer  # lanes of a tile by position
    run: Integer  # positions that are cut into tiles together: a sample, or all of them
    parts: Integer  # units of a run
    direct: Integer  # by position: are the logits worked on in place?
    in_grad: Integer  # are the exponentials kept where the gradient will be?
    kept: Integer  # are they kept at all?
    past_cache: Integer
    log: Integer
    scale: Double
    label_smoothing: Double
    z_loss: Double
    logit_softcap: Double


@helper
def soften(values, count, cap, inverse):
    out_of_line()
    for i in range(count):
        values[i] = cap * tanh(values[i] * inverse)  # a division would take as long as half of tanh


@helper
def bend(values, softened, count, inverse, one):
    """The gradient of the softcapped logits as that of the logits."""
    out_of_line()
    for i in range(count):
        u = softened[i] * inverse
        values[i] = values[i] * (one - u * u)
