"""Softmax cross-entropy on the CPU: loss and gradient in one pass over rows that stay in cache.

Entry functions (`cuda_kernels.softmax_cross_entropy` has the same, with the same arguments in the same order):

    cross_entropy(logits, target, weight, grad_output, ignore_index, reduction, label_smoothing, z_loss, logit_softcap,
                  loss, grad, lse) -> None or (position, label) of the first label out of range
    softmax(logits, log, out) -> None

    logits       (N, C, *S), any strides, classes on axis 1; every other array is of its floating-point type
    target       (N, *S) class indices of any integer type, or (N, C, *S) probabilities
    weight       (C,) or None
    grad_output  None (one), a number, or an array: (N, *S) for "none", () for "mean" and "sum"
    reduction    "none", "mean" or "sum"
    loss         array to fill, (N, *S) for "none" and () otherwise, or None; the mean over no position is nan
    grad         array (N, C, *S) to fill, `logits` itself allowed, or None
    lse          array (N, *S) to fill with log(sum over c of exp(z_c)), or None
    log          False: softmax, True: its logarithm, into `out` (N, C, *S), `logits` itself allowed

`logit_softcap` 0 stands for none.

Positions are counted in C order over (N, *S). Labels are checked before anything is written: when a label is neither
`ignore_index` nor in [0, C), nothing has been. Ignored positions have loss 0 and gradient 0, whatever their logits.

The equations (`reference.softmax_cross_entropy`), for one position, with z the logits (softcapped if asked):

    m = max z_c,  e_c = exp(z_c - m),  lse = m + log(sum e_c),  p_c = e_c / sum e_c
    q_c = w_c * ((1 - smoothing) * y_c + smoothing/C)        y the target, one-hot for a class index
    loss = sum_c q_c * (log(sum e_c) - (z_c - m)) + z_loss * lse**2
    dloss/dz_c = p_c * (sum q + 2*z_loss*lse) - q_c

How it runs. There are two ways, each with a task body of its own; the vector loops of both are in `simd`:

    by class      class axis contiguous: one position at a time, along its classes
    by position   otherwise: up to WIDEST positions side by side, a tile of them with a row for each class; also for few
                  classes, where a vector of classes would be mostly empty

By class, a row is read once, in pieces that stay in the innermost cache: the maximum of a piece, its exponentials
relative to the maximum so far, and their sum, which is corrected where the maximum grows (Milakov and Gimelshein 2018).
The next piece is fetched meanwhile, and the lines it will be written to, so that memory and arithmetic work at the same
time. The exponentials are kept where the gradient will be, or in scratch memory in the second cache where that is
written past the caches, and need only be multiplied to become the gradient: one exp for each element. What is read and
written is then what a copy of the array reads and writes. By position the logits are worked on where they lie when
there are DIRECT_FROM positions side by side; else a tile is filled, worked on and written back whole. Where the
exponentials are too many to be kept they are computed again from the logits.

Each lane of a vector keeps a maximum and a sum of its own; by class they are then combined in a fixed tree. So an
operation on an element is the same instruction wherever the element lies, and the bits of a position's results depend
on C and on which of the two ways its strides choose: not on threads, batch or place in the batch. No lane adds
more than 64 numbers (128 with vectors of SSE or NEON) before float64 takes over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from . import half, tasks
from .elementary import log, tanh
from .jit import REAL, array_of, compiled, output_of
from .simd import (
    SUM_ROWS,
    at,
    column_exponentials,
    column_products,
    copy_span,
    drain_stores,
    fill_zero,
    move_rows,
    offset,
    raise_maxima,
    scale_columns,
    span_exponentials,
    span_gradient,
    span_maximum,
    span_products,
    span_scale,
)

LANES = 64  # each width of a tile by position is a multiple of it: 4 AVX-512 or 8 AVX2 vectors of float32
PIECE = 2048  # classes at once: 8 KB of float32, a quarter of a small L1, half of it with the exponentials
COLUMN_PIECE = 4096  # elements of a tile by position whose coefficients are made at once
TILE_BYTES = 16 * 1024  # of a tile by position, where its classes allow
KEPT_BYTES = 1024 * 1024  # most exponentials that are kept: the L2 of a Zen 4, half of that of a Golden Cove core
PAST_CACHE = 16 * 1024 * 1024  # bytes of gradient from which it would not stay in a cache anyway
WIDEST = 512  # lanes of a tile by position
DIRECT_FROM = 32  # positions side by side from which they are worked on where they lie, without a copy into a tile
BY_POSITION_BELOW = 64  # classes; below, contiguous classes are transposed into a tile by position
TASK = 32_768  # elements of a task, about 10 us: small beside a whole call, large beside the 0.1 us of starting it
ALONE = 8192  # elements up to which a call does not go through `tasks.run`, whose 3 us are felt
# Each way is compiled in two variants. This constant is False in the plain one, from which Numba cuts the branches that
# ask for it before it spends a third of the compile time on them: soft targets, label smoothing, softcap, log_softmax,
# exponentials that are not kept, and by class a gradient with other strides than 1.
GENERAL = True
FLOPS = 10  # of an element, for the choice between serial and parallel: serial below 100 000 elements

# What a task body is told. The first fields are those that `tasks.run` fills.
_PARAMETERS = np.dtype(
    [
        *((name, np.int64) for name in (
            *tasks.HEADER,
            "logits", "logits_n", "logits_c", "logits_s", "grad", "grad_n", "grad_c", "grad_s",
            "labels", "labels_n", "labels_s", "soft", "soft_n", "soft_c", "soft_s", "weight",
            "grad_output", "grad_output_n", "grad_output_s", "loss", "loss_n", "loss_s", "lse", "lse_n", "lse_s",
            "partial", "task_units", "units", "classes", "positions", "space", "ignore_index",
            "width", "run", "parts", "direct", "in_grad", "kept", "past_cache", "log",
        )),
        *((name, np.float64) for name in ("scale", "label_smoothing", "z_loss", "logit_softcap")),
    ]
)  # fmt: skip
_RECORD = numba.from_dtype(_PARAMETERS)

_inline = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
# A function that is called in one place is inlined before types are inferred: each that is not costs 50 ms to compile.
_inline_once = numba.njit(error_model="numpy", inline="always")


@intrinsic
def _keep_apart(typingctx):
    """Keep LLVM from copying the function that says so into each of its callers, and compiling every copy."""

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _record(typingctx, parameters):
    """The parameters of a task, an array of int64, as the record that they are."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(_RECORD)(parameters), codegen


@intrinsic
def _pointer(typingctx, address, like):
    """The pointer to `address` of numbers like `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(like)(address, like), codegen


@intrinsic
def _number(typingctx, value, like):
    """The float64 `value` in the floating-point type that the pointer `like` points to."""

    def codegen(context, builder, sig, args):
        return context.cast(builder, args[0], types.float64, like.dtype)

    return like.dtype(types.float64, like), codegen


# ---------------------------------------------------------------------------------------------------------------------
# Both ways
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _soften(values, count, cap, inverse):
    _keep_apart()
    for i in range(count):
        values[i] = cap * tanh(values[i] * inverse)  # a division would take as long as half of tanh


@_inline
def _bend(values, softened, count, inverse, one):
    """The gradient of the softcapped logits as that of the logits."""
    _keep_apart()
    for i in range(count):
        u = softened[i] * inverse
        values[i] = values[i] * (one - u * u)


# ---------------------------------------------------------------------------------------------------------------------
# By class
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _row_coefficients(out, soft, y, step, weighted, weight, count, keep, even):
    """q_c = w_c * (keep * y_c + even): without the one-hot part when the targets are class indices.

    Nothing of the parameters is read here: LLVM takes `out` for a place where they might be, and would not vectorise.
    """
    _keep_apart()
    if soft:
        if step == 1:
            copy_span(out, y, count)
        else:
            for i in range(count):
                out[i] = y[i * step]
        for i in range(count):
            out[i] = keep * out[i] + even
    else:
        for i in range(count):
            out[i] = even
    if weighted:
        for i in range(count):
            out[i] = out[i] * weight[i]


@_inline
def _line_out(to, step, line, count, past_cache):
    """Elements of the gradient, `step` apart, from consecutive ones."""
    _keep_apart()
    if step == 1:
        move_rows(to, count, line, count, np.int64(1), count, past_cache)
    else:
        for i in range(count):
            to[i * step] = line[i]


def _by_class(task, worker, parameters, real):
    p = numba.carray(_record(parameters), 1)[0]
    classes, space, kept, past_cache, in_grad = p.classes, p.space, p.kept != 0, p.past_cache != 0, p.in_grad != 0
    logits, grad, soft, weight = at(real, p.logits), at(real, p.grad), at(real, p.soft), at(real, p.weight)
    labels, loss, lse = at(parameters, p.labels), at(real, p.loss), at(real, p.lse)
    grad_output, partial = at(real, p.grad_output), _pointer(p.partial, 0.0)
    zero, one, low = _number(0.0, real), _number(1.0, real), _number(-np.inf, real)
    cap, smoothing = _number(p.logit_softcap, real), p.label_smoothing
    inverse = one / cap
    keep, even = _number(1.0 - smoothing, real), _number(smoothing / classes, real)
    if GENERAL:
        dense = p.soft != 0 or (p.labels != 0 and smoothing > 0)
        bare = p.soft != 0 and p.soft_c == 1 and smoothing == 0 and p.weight == 0  # q is the target itself
        simple = not dense and cap == zero and p.log == 0 and p.grad_c == 1

    # Scratch memory of this worker: the sums of `span_products`, three pieces, a base for each piece, the tile.
    here = p.scratch + worker * p.scratch_bytes
    sums = _pointer(here, 0.0)
    coefficients = at(real, here + 64)
    softened = offset(coefficients, PIECE)
    line = offset(softened, PIECE)
    bases = offset(line, PIECE)
    tile = offset(bases, (classes // PIECE // 64 + 1) * 64)
    capped = offset(tile, (classes + 15) // 16 * 16) if kept else softened
    filled = np.int64(-1)  # the first class of the piece that `coefficients` are of

    for position in range(task * p.task_units, min((task + 1) * p.task_units, p.units)):
        n, s = divmod(position, space)
        z = offset(logits, n * p.logits_n + s * p.logits_s)
        y = offset(soft, n * p.soft_n + s * p.soft_s)
        to = offset(grad, n * p.grad_n + s * p.grad_s)
        label = np.int64(-1)
        if p.labels != 0:
            t = labels[n * p.labels_n + s * p.labels_s]
            label = t if t != p.ignore_index else label
        ignored = p.labels != 0 and label < 0
        if GENERAL and p.soft != 0:
            filled = np.int64(-1)
        z_hit = zero
        if label >= 0:
            z_hit = z[label]  # before the exponentials overwrite it

        # 1. Maximum and sum of exponentials, piece by piece. `base` is the maximum so far, or 0 where that is -inf:
        # -inf - -inf would be nan.
        top, base, total = low, zero, 0.0
        sums[0] = sums[1] = 0.0
        if not ignored or p.lse != 0:
            for start in range(0, classes, PIECE):
                count = min(PIECE, classes - start)
                source, powers = offset(z, start), offset(to if in_grad else tile, start)
                if GENERAL:
                    if cap != zero:
                        softer = offset(capped, start) if kept else capped
                        copy_span(softer, source, count)
                        _soften(softer, count, cap, inverse)
                        source = softer
                    if not kept:
                        powers = line
                highest = span_maximum(source, count)
                if highest > top:
                    top = highest
                    change = np.float64(base) - np.float64(top)
                    total = total * math.exp(change) if total != 0.0 else 0.0  # 0 * inf when nothing was finite before
                    sums[0] += sums[1] * change if sums[1] != 0.0 else 0.0
                    base = top
                bases[start // PIECE] = base
                if GENERAL and dense:
                    q = offset(y, start) if bare else coefficients
                    if not bare and filled != start:
                        _row_coefficients(
                            coefficients, p.soft != 0, offset(y, start * p.soft_c), p.soft_c, p.weight != 0,
                            offset(weight, start), count, keep, even,
                        )  # fmt: skip
                        filled = start
                    span_products(q, source, count, base, sums, np.int64(PIECE))
                total += span_exponentials(powers, source, count, base, np.int64(PIECE))

        # 2. Loss, and the factors of the gradient.
        log_sum = math.log(total)
        log_sum_exp = np.float64(base) + log_sum
        q_z, q_sum, q_hit, slope, outer = sums[0], sums[1], 0.0, 1.0, p.scale
        if p.labels == 0 and p.soft == 0:  # softmax itself
            q_sum = 1.0
        if label >= 0:
            q_hit = 1.0 - smoothing
            if GENERAL and cap != zero:
                z_hit = cap * tanh(z_hit * inverse)
                u = np.float64(z_hit * inverse)
                slope = 1.0 - u * u
            if p.weight != 0:
                q_hit *= np.float64(weight[label])
            q_sum += q_hit
            q_z += q_hit * (np.float64(z_hit) - np.float64(base)) if q_hit != 0.0 else 0.0
        if p.grad_output != 0:
            outer *= np.float64(grad_output[n * p.grad_output_n + s * p.grad_output_s])
        value = q_sum * log_sum - q_z
        if p.z_loss != 0.0:
            value += p.z_loss * log_sum_exp * log_sum_exp
            q_sum += 2.0 * p.z_loss * log_sum_exp
        if ignored:
            value = 0.0
        factor, hit = q_sum * outer / total, q_hit * outer * slope
        partial[position] = value
        if p.loss != 0:
            loss[n * p.loss_n + s * p.loss_s] = value
        if p.lse != 0:
            lse[n * p.lse_n + s * p.lse_s] = log_sum_exp
        if p.grad == 0:
            continue

        # 3. The gradient (or the softmax), piece by piece.
        if ignored:
            for c in range(classes):
                to[c * p.grad_c] = zero
            continue
        for start in range(0, classes, PIECE):
            count = min(PIECE, classes - start)
            powers, moved = offset(to if in_grad else tile, start), factor
            if GENERAL:
                source = offset(z, start)
                if cap != zero:
                    softer = offset(capped, start) if kept else capped
                    if not kept:
                        copy_span(softer, source, count)
                        _soften(softer, count, cap, inverse)
                    source = softer
                if not kept and p.log == 0:
                    span_exponentials(line, source, count, base, np.int64(PIECE))
                    powers = line
            if kept and bases[start // PIECE] != base:
                moved *= math.exp(np.float64(bases[start // PIECE]) - np.float64(base))
            scale, taken = _number(moved, real), _number(hit, real)
            if GENERAL and not simple:
                if p.log != 0:
                    shift = _number(log_sum, real)
                    for i in range(count):
                        line[i] = (source[i] - base) - shift
                elif dense:
                    q = offset(y, start) if bare else coefficients
                    if not bare and filled != start:
                        _row_coefficients(
                            coefficients, p.soft != 0, offset(y, start * p.soft_c), p.soft_c, p.weight != 0,
                            offset(weight, start), count, keep, even,
                        )  # fmt: skip
                        filled = start
                    span_gradient(line, powers, q, count, scale, _number(outer, real))
                else:
                    span_scale(line, powers, count, scale, False)
                if cap != zero:
                    _bend(line, source, count, inverse, one)
                if start <= label < start + count:
                    line[label - start] = line[label - start] - taken
                _line_out(offset(to, start * p.grad_c), p.grad_c, line, count, past_cache)
                continue
            here = start <= label < start + count
            power = powers[label - start] if here else zero  # before it is scaled where it is
            span_scale(offset(to, start), powers, count, scale, past_cache)
            if here:
                to[label] = power * scale - taken
    if past_cache:
        drain_stores()


# ---------------------------------------------------------------------------------------------------------------------
# By position: between an array and a tile
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _run(space, n_step, s_step, position, left):
    """Where `position` is, and how many of the `left` positions from there on have which step between them."""
    if space == 1:
        return position * n_step, left, n_step
    n, s = divmod(position, space)
    return n * n_step + s * s_step, min(space - s, left), s_step


@_inline
def _fetch(tile, array, n_step, c_step, s_step, space, position, lanes, width, row, rows):
    """Fill rows `row` to `row + rows` of the tile of `lanes` positions from `position` on."""
    _keep_apart()
    j = 0
    while j < lanes:
        start, count, step = _run(space, n_step, s_step, position + j, lanes - j)
        source, to = offset(array, start + row * c_step), offset(tile, j)
        if step == 1:
            move_rows(to, width, source, c_step, rows, count, False)
        else:
            for i in range(count):
                for r in range(rows):
                    to[r * width + i] = source[r * c_step + i * step]
        j += count
    for r in range(rows):
        for j in range(lanes, width):
            tile[r * width + j] = tile[r * width]  # some number of the tile, never used


@_inline
def _deliver(tile, array, n_step, c_step, s_step, space, position, lanes, width, row, rows, past_cache):
    """The way back."""
    _keep_apart()
    j = 0
    while j < lanes:
        start, count, step = _run(space, n_step, s_step, position + j, lanes - j)
        source, to = offset(tile, j), offset(array, start + row * c_step)
        if step == 1:
            move_rows(to, c_step, source, width, rows, count, past_cache)
        else:
            for i in range(count):
                for r in range(rows):
                    to[r * c_step + i * step] = source[r * width + i]
        j += count


@_inline_once
def _fetch_labels(out, labels, p, position, lanes):
    """The labels of `lanes` positions, -1 for those that are ignored."""
    j = 0
    while j < lanes:
        start, count, step = _run(p.space, p.labels_n, p.labels_s, position + j, lanes - j)
        source, to = offset(labels, start), offset(out, j)
        for i in range(count):
            t = source[i * step]
            to[i] = t if t != p.ignore_index else -1
        j += count


@_inline
def _fetch_coefficients(tile, p, soft, weight, position, lanes, row, rows, keep, even):
    """q_c = w_c * (keep * y_c + even): without the one-hot part when the targets are class indices."""
    _keep_apart()
    width = p.width
    if p.soft != 0:
        _fetch(tile, soft, p.soft_n, p.soft_c, p.soft_s, p.space, position, lanes, width, row, rows)
        for i in range(rows * width):
            tile[i] = keep * tile[i] + even
    else:
        for i in range(rows * width):
            tile[i] = even
    if p.weight != 0:
        for r in range(rows):
            w = weight[row + r]
            for j in range(width):
                tile[r * width + j] = tile[r * width + j] * w


# ---------------------------------------------------------------------------------------------------------------------
# By position: on a tile
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _set(lane_values, width, value):
    for j in range(width):
        lane_values[j] = value


@_inline_once
def _sum(values, count):
    """In a fixed order: four chains of additions, since one alone would wait for each."""
    quarter = count // 4
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for j in range(quarter):
        a += values[j]
        b += values[quarter + j]
        c += values[2 * quarter + j]
        d += values[3 * quarter + j]
    for j in range(4 * quarter, count):
        d += values[j]
    return (a + b) + (c + d)


@_inline_once
def _correct(base, top, low, width, total, weighted, mass):
    """Bring what has been summed relative to the base to the maximum, which has grown."""
    for j in range(width):
        if top[j] > low and top[j] != base[j]:
            change = np.float64(base[j]) - np.float64(top[j])
            total[j] = total[j] * math.exp(change) if total[j] != 0.0 else 0.0  # 0 * inf when nothing was finite before
            weighted[j] = weighted[j] + mass[j] * change


def _by_position(task, worker, parameters, real):
    p = numba.carray(_record(parameters), 1)[0]
    classes, space, width, kept, past_cache = p.classes, p.space, p.width, p.kept != 0, p.past_cache != 0
    in_grad, run = p.in_grad != 0, p.run
    logits, grad, soft, weight = at(real, p.logits), at(real, p.grad), at(real, p.soft), at(real, p.weight)
    labels, loss, lse = at(parameters, p.labels), at(real, p.loss), at(real, p.lse)
    grad_output, partial = at(real, p.grad_output), _pointer(p.partial, 0.0)
    zero, one, low = _number(0.0, real), _number(1.0, real), _number(-np.inf, real)
    # Literals as arguments would be types of their own, and have `_fetch` and `_deliver` compiled twice.
    none, single, in_cache = np.int64(0), np.int64(1), np.bool_(False)
    cap, smoothing = _number(p.logit_softcap, real), p.label_smoothing
    inverse = one / cap
    keep, even = _number(1.0 - smoothing, real), _number(smoothing / classes, real)
    if GENERAL:
        dense = p.soft != 0 or (p.labels != 0 and smoothing > 0)

    # Scratch memory of this worker: vectors of `width` lanes, two pieces, the tile.
    here = p.scratch + worker * p.scratch_bytes
    lane_bytes = width * 8
    total = _pointer(here, 0.0)
    weighted, mass, hit = offset(total, width), offset(total, 2 * width), at(real, here + 3 * lane_bytes)
    q_hit, log_sum, outer = offset(total, 4 * width), offset(total, 5 * width), offset(total, 6 * width)
    label, top = at(parameters, here + 7 * lane_bytes), at(real, here + 8 * lane_bytes)
    base, factor, scale = offset(top, width), offset(top, 2 * width), offset(top, 3 * width)
    coefficients = offset(top, 4 * width)
    softened = offset(coefficients, COLUMN_PIECE)
    tile = offset(softened, COLUMN_PIECE)
    filled = np.int64(-1)  # the first class of the piece that `coefficients` are of, when they are of any position

    piece_rows = min(COLUMN_PIECE // width, np.int64(SUM_ROWS))
    block, step = classes, classes
    if GENERAL:
        block, step = classes if kept else piece_rows, piece_rows

    for unit in range(task * p.task_units, min((task + 1) * p.task_units, p.units)):
        n, s = divmod(unit, p.parts)
        position = n * run + s * width
        lanes = min(width, run - s * width)

        if GENERAL and p.soft != 0:
            filled = np.int64(-1)

        # 1. The labels, -1 where ignored, and their coefficients.
        ignored = 0
        if p.labels != 0:
            _fetch_labels(label, labels, p, position, lanes)
            for j in range(lanes, width):
                label[j] = -1
            for j in range(lanes):
                ignored += label[j] < 0
            for j in range(width):
                q_hit[j] = 1.0 - smoothing if label[j] >= 0 else 0.0
            if p.weight != 0:
                for j in range(lanes):
                    if label[j] >= 0:
                        q_hit[j] = q_hit[j] * np.float64(weight[label[j]])

        # 2. Maximum and sum of exponentials, block by block. `base` is the maximum so far, or 0 where that is -inf:
        # -inf - -inf would be nan. Where all is ignored nothing is read.
        _set(top, width, low)
        _set(base, width, zero)
        fill_zero(total, 4 * width)  # and `weighted`, `mass` and `hit`
        read = ignored < lanes or p.lse != 0
        z, z_pitch, powers, pitch = tile, width, tile, width
        if not GENERAL and p.direct != 0:
            z, z_pitch = offset(logits, n * p.logits_n + s * width * p.logits_s), p.logits_c
            if in_grad:
                powers, pitch = offset(grad, n * p.grad_n + s * width * p.grad_s), p.grad_c
        for row in range(0, classes if read else 0, block):
            block_rows = min(block, classes - row)
            if GENERAL and cap != zero and kept:
                z = offset(tile, classes * width)
            if GENERAL or p.direct == 0:
                _fetch(z, logits, p.logits_n, p.logits_c, p.logits_s, space, position, lanes, width, row, block_rows)
            if GENERAL and cap != zero:
                _soften(z, block_rows * width, cap, inverse)
            if p.labels != 0:
                for j in range(lanes):
                    r = label[j] - row
                    if 0 <= r < block_rows:  # not at -1
                        hit[j] = z[r * z_pitch + j]
            raise_maxima(top, z, z_pitch, block_rows, lanes)
            if GENERAL and row > 0:
                _correct(base, top, low, width, total, weighted, mass)
            for j in range(width):
                base[j] = top[j] if top[j] > low else base[j]
            if GENERAL and dense:
                for r in range(0, block_rows, piece_rows):
                    count = min(piece_rows, block_rows - r)
                    if p.soft != 0 or filled != row + r:
                        _fetch_coefficients(coefficients, p, soft, weight, position, lanes, row + r, count, keep, even)
                        filled = row + r
                    column_products(coefficients, offset(z, r * width), count, width, base, weighted, mass)
            next_n, next_s = divmod(position + lanes, space)  # of the next unit
            following = offset(logits, next_n * p.logits_n + row * p.logits_c + next_s * p.logits_s)
            column_exponentials(
                powers, pitch, z, z_pitch, block_rows, lanes, base, total, following, p.logits_c
            )
        for j in range(width):
            log_sum[j] = log(total[j])

        # 3. Loss, and the factors of the gradient, of each position: `weighted` becomes the loss. Short loops, which
        # LLVM turns into vectors: it gives up on one that would need many checks that its arrays do not overlap.
        _set(scale, width, one)
        if p.grad_output != 0:
            _fetch(
                scale, grad_output, p.grad_output_n, none, p.grad_output_s, space, position, lanes, width, none, single
            )
        for j in range(width):
            outer[j] = p.scale * np.float64(scale[j])
        if p.labels == 0 and p.soft == 0:  # softmax itself
            _set(mass, width, 1.0)
        if p.labels != 0:  # `hit` holds the logits at the labels
            for j in range(width):
                q = q_hit[j]
                weighted[j] = weighted[j] + (q * (np.float64(hit[j]) - np.float64(base[j])) if q != 0.0 else 0.0)
            for j in range(width):
                mass[j] = mass[j] + q_hit[j]
            if GENERAL and cap != zero:
                for j in range(width):
                    u = np.float64(hit[j] * inverse)
                    q_hit[j] = q_hit[j] * (1.0 - u * u)
            for j in range(width):
                hit[j] = q_hit[j] * outer[j]
        for j in range(width):
            weighted[j] = mass[j] * log_sum[j] - weighted[j]
        if p.z_loss != 0.0:
            for j in range(width):
                log_sum_exp = np.float64(base[j]) + log_sum[j]
                weighted[j] = weighted[j] + p.z_loss * log_sum_exp * log_sum_exp
                mass[j] = mass[j] + 2.0 * p.z_loss * log_sum_exp
        for j in range(width):
            factor[j] = mass[j] * outer[j] / total[j]
        masked = not read
        if GENERAL:
            masked |= ignored > 0
            if p.log != 0:
                for j in range(width):
                    factor[j] = log_sum[j]
            for j in range(width):
                scale[j] = outer[j]
        if ignored > 0:
            for j in range(lanes):
                if label[j] < 0:
                    weighted[j] = 0.0
                    factor[j] = zero  # makes zeros of the exponentials, unless there is a nan among them
                    masked |= total[j] != total[j]
        partial[unit] = _sum(weighted, lanes)
        if p.loss != 0:
            for j in range(width):
                top[j] = weighted[j]
            _deliver(top, loss, p.loss_n, none, p.loss_s, space, position, lanes, width, none, single, in_cache)
        if p.lse != 0:
            for j in range(width):
                top[j] = np.float64(base[j]) + log_sum[j]
            _deliver(top, lse, p.lse_n, none, p.lse_s, space, position, lanes, width, none, single, in_cache)
        if p.grad == 0:
            continue

        # 4. The gradient (or the softmax), all at once in the plain variant, else piece by piece.
        for row in range(0, classes, step):
            count = min(step, classes - row)
            here, scaled = offset(powers, row * pitch), True
            if GENERAL:
                if not kept:
                    here = tile
                if p.log != 0 or (read and not kept):
                    _fetch(here, logits, p.logits_n, p.logits_c, p.logits_s, space, position, lanes, width, row, count)
                    if cap != zero:
                        _soften(here, count * width, cap, inverse)
                if p.log != 0:
                    scaled = False
                    for r in range(count):
                        line = offset(here, r * width)
                        for j in range(width):
                            line[j] = (line[j] - base[j]) - factor[j]
                elif not kept:
                    column_exponentials(here, width, here, width, count, lanes, base, total, here, none)
            if scaled:
                scale_columns(here, pitch, count, lanes, factor)
            if GENERAL:
                if dense:
                    if filled != row:
                        _fetch_coefficients(coefficients, p, soft, weight, position, lanes, row, count, keep, even)
                        filled = row
                    for r in range(count):
                        line, q_line = offset(here, r * width), offset(coefficients, r * width)
                        for j in range(width):
                            line[j] = line[j] - q_line[j] * scale[j]
                bent = offset(z, row * width) if kept else softened
                if cap != zero and read and scaled and not kept:
                    _fetch(
                        softened, logits, p.logits_n, p.logits_c, p.logits_s, space, position, lanes, width, row, count
                    )
                    _soften(softened, count * width, cap, inverse)
                if cap != zero and read and scaled:
                    _bend(here, bent, count * width, inverse, one)
            if masked:
                for r in range(count):
                    line = offset(here, r * pitch)
                    for j in range(lanes):
                        line[j] = line[j] if label[j] >= 0 else zero
            if p.labels != 0:
                for j in range(lanes):
                    r = label[j] - row
                    if 0 <= r < count:
                        here[r * pitch + j] = here[r * pitch + j] - hit[j]
            if GENERAL or not in_grad:
                _deliver(
                    here, grad, p.grad_n, p.grad_c, p.grad_s, space, position, lanes, width, row, count, past_cache
                )
    if past_cache:
        drain_stores()


# ---------------------------------------------------------------------------------------------------------------------
# The entry functions
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _count_labels(labels, p, batch, space, ignore_index, classes):
    """Is one out of range, and how many count?"""
    runs, length, run_step, step = batch, space, p.labels_n, p.labels_s
    if space == 1:
        runs, length, step = 1, batch, run_step
    elif run_step == space * step:
        runs, length = 1, batch * space
    bad, used = 0, 0
    for run in range(runs):
        first = offset(labels, run * run_step)
        for i in range(length):
            t = first[i * step]
            counts = t != ignore_index
            bad += counts & (np.uint64(t) >= np.uint64(classes))
            used += counts
    return bad, used


def _prepare(
    logits, labels, soft, weight, grad_output, ignore_index, mean, log, scale, smoothing, z_loss, cap, loss, grad, lse,
    partial, words, by_class, plain, body, scratch, alone,
):  # fmt: skip
    """Judge the labels and fill `words`, the parameters of the tasks. Arrays of size 0 stand for those not given.

    Up to `alone` elements the tasks are run here: a small call is not to pay for the way through `tasks.run`. Returns
    the number of tasks that are left to run, or -1 - the position of a label out of range. `partial` gets the loss of
    each unit and, at its end, what the mean divides by.
    """
    batch, classes, space = logits.shape
    p = numba.carray(_record(_pointer(words.ctypes.data, np.int64(0))), 1)[0]
    item = logits.itemsize
    denominator = np.float64(batch * space)
    if labels.size > 0:
        p.labels, p.labels_n, p.labels_s = labels.ctypes.data, labels.strides[0] // 8, labels.strides[1] // 8
        bad, used = _count_labels(_pointer(p.labels, np.int64(0)), p, batch, space, ignore_index, classes)
        if bad:
            for position in range(batch * space):
                t = labels[position // space, position % space]
                if t != ignore_index and (t < 0 or t >= classes):
                    return -1 - position
        denominator = np.float64(used)
        if weight.size and mean:
            denominator = 0.0
            for n in range(batch):
                for s in range(space):
                    if labels[n, s] != ignore_index:
                        denominator += np.float64(weight[labels[n, s]])
    p.ignore_index = ignore_index
    p.classes, p.positions, p.space = classes, batch * space, space
    p.logits, p.logits_n = logits.ctypes.data, logits.strides[0] // item
    p.logits_c, p.logits_s = logits.strides[1] // item, logits.strides[2] // item
    if soft.size:
        p.soft, p.soft_n = soft.ctypes.data, soft.strides[0] // item
        p.soft_c, p.soft_s = soft.strides[1] // item, soft.strides[2] // item
    if grad.size:
        p.grad, p.grad_n = grad.ctypes.data, grad.strides[0] // item
        p.grad_c, p.grad_s = grad.strides[1] // item, grad.strides[2] // item
    if weight.size:
        p.weight = weight.ctypes.data
    if grad_output.size:
        p.grad_output, p.grad_output_n = grad_output.ctypes.data, grad_output.strides[0] // item
        p.grad_output_s = grad_output.strides[1] // item
    if loss.size:
        p.loss, p.loss_n, p.loss_s = loss.ctypes.data, loss.strides[0] // item, loss.strides[1] // item
    if lse.size:
        p.lse, p.lse_n, p.lse_s = lse.ctypes.data, lse.strides[0] // item, lse.strides[1] // item
    p.log, p.label_smoothing, p.z_loss, p.logit_softcap = log, smoothing, z_loss, cap
    p.scale = scale / denominator if mean else scale
    # Over the logits themselves the lines are in a cache already.
    p.past_cache = batch * classes * space * item >= PAST_CACHE and p.grad != p.logits
    p.in_grad = plain and grad.size > 0 and not p.past_cache and p.grad_c == 1
    p.width, p.run, p.parts = 1, p.positions, p.positions
    if not by_class:
        p.direct = plain and space >= DIRECT_FROM and p.logits_s == 1
        p.in_grad = p.direct and grad.size > 0 and not p.past_cache and p.grad_s == 1
        if p.direct:
            p.run = space
        fits = TILE_BYTES // (classes * item)
        p.width = max(LANES, min(WIDEST, fits, p.run + LANES - 1) // LANES * LANES)
        p.parts = (p.run + p.width - 1) // p.width
    tiles = 2 if cap > 0 else 1  # with the softcapped logits, whose derivative is made of them
    p.kept = tiles * (classes + 15) // 16 * 16 * p.width * item <= KEPT_BYTES
    p.partial = partial.ctypes.data
    partial[p.positions] = denominator
    p.units = p.positions // p.run * p.parts
    p.task_units = max(1, TASK // (classes * p.width))
    count = (p.units + p.task_units - 1) // p.task_units
    if batch * classes * space > alone:
        return count
    p.scratch = scratch
    for task in range(count):
        tasks.call(body, task, 0, words.ctypes.data)
    return 0


def _reduce(partial, units, mean):
    """The losses of all units, added in their order; divided, if `mean`, by the last of `partial`: nan if that is 0."""
    total = 0.0
    for unit in range(units):
        total += partial[unit]
    if mean:
        total = total / partial[-1] if partial[-1] != 0.0 else math.nan
    return total


_doubles = types.Array(types.float64, 1, "C")
_integers = types.Array(types.int64, 1, "C")


@functools.cache
def _compiled(dtype: np.dtype) -> tuple[Callable[..., int], tuple[np.ndarray, ...]]:
    """For a floating-point type: `_prepare`, and arrays of 1 to 3 dimensions for what is not given."""
    real = REAL[dtype]
    signature = types.intp(
        array_of(real, 3), array_of(types.int64, 2), array_of(real, 3), array_of(real, 1), array_of(real, 2),
        types.int64, types.boolean, types.boolean, *(types.float64,) * 4, output_of(real, 2), output_of(real, 3),
        output_of(real, 2), _doubles, _integers, types.boolean, types.boolean, *(types.intp,) * 3,
    )  # fmt: skip
    none = tuple(np.empty((0,) * ndim, dtype) for ndim in (1, 2, 3))
    return compiled(numba.njit, signature, _prepare, nogil=True), none


@functools.cache
def _compiled_reduce() -> Callable[[np.ndarray, int, bool], float]:
    return compiled(numba.njit, types.float64(_doubles, types.intp, types.boolean), _reduce, nogil=True)


def _plain(body: Callable[..., None]) -> Callable[..., None]:
    """The variant of a body in which GENERAL is False."""
    return FunctionType(body.__code__, {**body.__globals__, "GENERAL": False}, f"{body.__name__}_plain")


# [by class?][plain?]
_bodies = tuple((tasks.Body(body), tasks.Body(_plain(body))) for body in (_by_position, _by_class))
_NO_LABELS = np.empty((0, 0), np.int64)
_SCRATCH = KEPT_BYTES + 64 + max(12 * 8 * WIDEST + 2 * 8 * COLUMN_PIECE, 64 + (3 * PIECE + 64) * 8)
_WORDS = _PARAMETERS.itemsize // 8
_UNITS = list(_PARAMETERS.names or ()).index("units")


def _launch(
    logits, labels, soft, weight, grad_output, ignore_index, mean, log, scale, smoothing, z_loss, cap, loss, grad, lse
):  # fmt: skip
    """Run the kernels on flat arrays, None for those not given; return (status, loss reduced to a number)."""
    dtype = logits.dtype
    classes = logits.shape[1]
    by_class = classes >= BY_POSITION_BELOW and logits.strides[1] == dtype.itemsize
    item = dtype.itemsize
    plain = (
        soft is None
        and not log
        and cap == 0
        and (smoothing == 0 or labels is None)
        and classes * item * (1 if by_class else LANES) <= KEPT_BYTES
        and (not by_class or grad is None or grad.strides[1] == item)
    )
    body = _bodies[by_class][plain]
    scratch = _SCRATCH + classes // PIECE * 8
    prepare, (none_1, none_2, none_3) = _compiled(dtype)
    words = np.zeros(_WORDS, np.int64)
    partial = np.empty(logits.shape[0] * logits.shape[2] + 1)
    count = prepare(
        logits,
        _NO_LABELS if labels is None else labels,
        none_3 if soft is None else soft,
        none_1 if weight is None else weight,
        none_2 if grad_output is None else grad_output,
        ignore_index, mean, log, scale, smoothing, z_loss, cap,
        none_2 if loss is None else loss,
        none_3 if grad is None else grad,
        none_2 if lse is None else lse,
        partial, words, by_class, plain, body.address(dtype), tasks.scratch_memory(scratch), ALONE,
    )  # fmt: skip
    if count < 0:
        return count, 0.0
    if count > 0:
        tasks.run(body, dtype, count, words, scratch, FLOPS * logits.size)
    return 0, _compiled_reduce()(partial, words[_UNITS], mean)


def cross_entropy(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray | None, grad_output: np.ndarray | float | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, logit_softcap: float,
    loss: np.ndarray | None, grad: np.ndarray | None, lse: np.ndarray | None, first_position: int = 0,
) -> tuple[int, int] | None:  # fmt: skip
    """Fill those of `loss`, `grad` and `lse` that are given; see the top of this file.

    Returns None, or (position, label) of the first label out of range, with nothing written. Positions are counted from
    `first_position`.
    """
    if logits.dtype.itemsize == 2:
        return _through_float32(
            logits, first_position, target, weight, grad_output, ignore_index, reduction, label_smoothing, z_loss,
            logit_softcap, loss, grad, lse,
        )  # fmt: skip
    scale = 1.0
    labels, soft = (_flat(target, 1), None) if target.dtype.kind in "iu" else (None, _flat(target, 2))
    if labels is not None and labels.dtype != np.int64:
        labels = _to_int64(labels)
    z = _flat(logits, 2)
    if not z.size:
        if loss is not None:
            loss[...] = math.nan if reduction == "mean" else 0.0
        return None
    if weight is not None and weight.strides[0] != weight.itemsize:
        weight = weight.copy()
    loss_flat = _flat_output(loss, 1) if reduction == "none" else None
    grad_flat, lse_flat = _flat_output(grad, 2), _flat_output(lse, 1)
    rows = None
    if reduction == "none" and isinstance(grad_output, np.ndarray):
        rows = _flat(grad_output, 1)
    elif grad_output is not None:
        scale = float(grad_output)
    status, reduced = _launch(
        z, labels, soft, weight, rows, ignore_index, reduction == "mean", False, scale, label_smoothing, z_loss,
        logit_softcap, loss_flat, grad_flat, lse_flat,
    )  # fmt: skip
    if status < 0:
        position = -1 - status
        return first_position + position, int(target.reshape(-1)[position])
    if loss is not None and reduction != "none":
        loss[...] = reduced
    _bring_back(loss_flat, loss)
    _bring_back(grad_flat, grad)
    _bring_back(lse_flat, lse)
    return None


def softmax(logits: np.ndarray, log: bool, out: np.ndarray) -> None:
    """out = softmax of the logits over axis 1, or its logarithm."""
    if logits.dtype.itemsize == 2:
        wide = np.empty(out.shape, np.float32)
        softmax(half.widened(logits), log, wide)
        half.narrow(wide, out)
        return
    if not logits.size:
        return
    flat = _flat_output(out, 2)
    _launch(_flat(logits, 2), None, None, None, None, 0, False, log, 1.0, 0.0, 0.0, 0.0, None, flat, None)
    _bring_back(flat, out)


def _through_float32(logits: np.ndarray, first_position: int, *arguments: Any) -> tuple[int, int] | None:
    """`cross_entropy` of float16 or bfloat16: converted on the way in, rounded once on the way out."""
    narrow = logits.dtype
    *inputs, loss, grad, lse = arguments
    inputs = [half.widened(a) if getattr(a, "dtype", None) == narrow else a for a in inputs]
    outputs = (loss, grad, lse)
    wide = [None if out is None else np.empty(out.shape, np.float32) for out in outputs]
    arguments = *inputs, *wide, first_position
    bad = cross_entropy(half.widened(logits), *arguments)
    if bad is None:
        for out, values in zip(outputs, wide, strict=True):
            if out is not None and values is not None:
                half.narrow(values, out)
    return bad


def _to_int64(labels: np.ndarray) -> np.ndarray:
    # of either byte order; what int64 cannot hold must not wrap around to a valid label
    if labels.dtype.kind == "u" and labels.itemsize == 8:
        labels = np.minimum(labels, np.uint64(np.iinfo(np.int64).max))
    return labels.astype(np.int64)


def _flat(array: np.ndarray, lead: int) -> np.ndarray:
    """The dimensions after the first `lead` as one: a view where the strides allow it, aligned in any case."""
    if array.ndim != lead + 1:
        array = array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))
    return array if array.flags.aligned else array.copy()


def _flat_output(array: np.ndarray | None, lead: int) -> np.ndarray | None:
    return None if array is None else _flat(array, lead)


def _bring_back(flat: np.ndarray | None, array: np.ndarray | None) -> None:
    """Copy the results home when the strides did not allow a flat view."""
    if flat is None or array is None or flat is array or flat.base is array:
        return
    if flat.base is None or flat.base is not array.base:
        array[...] = flat.reshape(array.shape)
