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

How it runs. Everything is done on a *tile* of scratch memory, `rows` times `width` numbers, by loops over `width`, a
multiple of 64, that LLVM turns into vectors without remainders. There are two ways to fill it:

    by class      class axis contiguous: one position at a time, consecutive classes side by side in the tile
    by position   otherwise: consecutive positions side by side, one tile row for each class; also for few classes,
                  where a vector of classes would be mostly empty

In both, each of the `width` lanes keeps a running maximum and sum; by class they are then combined in a fixed tree.
So an operation on an element is the same instruction wherever the element lies, and the bits of a position's results
depend on C and on which of the two ways its strides choose: not on threads, batch or place in the batch. A tile that
holds all classes keeps exp(z - m) for the gradient; longer ones are read in pieces, with the maximum corrected as it
grows (Milakov and Gimelshein 2018), and read again for the gradient. Sums are float64 between pieces of 64 rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from . import tasks
from .elementary import exp, log, tanh
from .jit import REAL, array_of, compiled, output_of
from .simd import at, offset

LANES = 64  # of a tile by class; every width is a multiple of it: 4 AVX-512 or 8 AVX2 vectors of float32
PIECE = 4096  # elements that are loaded and used at once: 16 KB of float32, half of a small L1
TILE_BYTES = 256 * 1024  # a tile that keeps its exponentials: half of a 512 KB L2
WIDEST = 512  # lanes of a tile by position
BY_POSITION_BELOW = 64  # classes; below, contiguous classes are transposed into a tile by position
TASK = 32_768  # elements of a task, about 10 us: small beside a whole call, large beside the 0.1 us of starting it
ALONE = 8192  # elements up to which a call does not go through `tasks.run`, whose 3 us are felt
FLOPS = 10  # of an element, for the choice between serial and parallel: serial below 100 000 elements

# What a task body is told. The first fields are those that `tasks.run` fills.
_PARAMETERS = np.dtype(
    [
        *((name, np.int64) for name in (
            "counter", "scratch", "scratch_bytes",
            "logits", "logits_n", "logits_c", "logits_s", "grad", "grad_n", "grad_c", "grad_s",
            "labels", "labels_n", "labels_s", "soft", "soft_n", "soft_c", "soft_s", "weight", "weight_c",
            "grad_output", "grad_output_n", "grad_output_s", "loss", "loss_n", "loss_s", "lse", "lse_n", "lse_s",
            "partial", "task_units", "units", "classes", "positions", "space", "ignore_index",
            "by_class", "width", "tile_rows", "log",
        )),
        *((name, np.float64) for name in ("scale", "label_smoothing", "z_loss", "logit_softcap")),
    ]
)  # fmt: skip
_RECORD = numba.from_dtype(_PARAMETERS)

_inline = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
# A function that is called in one place is inlined before types are inferred: each that is not costs 50 ms to compile.
_inline_once = numba.njit(error_model="numpy", inline="always")


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
# Between an array and a tile
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _copy(to, to_step, source, source_step, count):
    if to_step == 1 and source_step == 1:
        for i in range(count):
            to[i] = source[i]
    else:
        for i in range(count):
            to[i * to_step] = source[i * source_step]


@_inline
def _fetch(tile, array, n_step, c_step, s_step, space, by_class, position, lanes, width, row, rows, classes, fill):
    """Fill rows `row` to `row + rows` of the tile of `lanes` positions from `position` on."""
    if by_class:
        n, s = divmod(position, space)
        first = row * width
        count = min(rows * width, classes - first)
        _copy(tile, 1, offset(array, n * n_step + first * c_step + s * s_step), c_step, count)
        for i in range(count, rows * width):
            tile[i] = fill
        return
    if c_step == 1 and space == 1:  # few contiguous classes: a transposition, position by position
        for j in range(lanes):
            source = offset(array, (position + j) * n_step + row)
            for r in range(rows):
                tile[r * width + j] = source[r]
    else:
        j = 0
        while j < lanes:  # a run of positions that are neighbours in space
            n, s = divmod(position + j, space)
            count = min(space - s, lanes - j)
            source = offset(array, n * n_step + row * c_step + s * s_step)
            for r in range(rows):
                _copy(offset(tile, r * width + j), 1, offset(source, r * c_step), s_step, count)
            j += count
    if lanes < width:
        for r in range(rows):
            for j in range(lanes, width):
                tile[r * width + j] = tile[r * width]  # some number of the tile, never used


@_inline
def _deliver(tile, array, n_step, c_step, s_step, space, by_class, position, lanes, width, row, rows, classes):
    """The way back."""
    if by_class:
        n, s = divmod(position, space)
        first = row * width
        count = min(rows * width, classes - first)
        _copy(offset(array, n * n_step + first * c_step + s * s_step), c_step, tile, 1, count)
    elif c_step == 1 and space == 1:
        for j in range(lanes):
            to = offset(array, (position + j) * n_step + row)
            for r in range(rows):
                to[r] = tile[r * width + j]
    else:
        j = 0
        while j < lanes:
            n, s = divmod(position + j, space)
            count = min(space - s, lanes - j)
            to = offset(array, n * n_step + row * c_step + s * s_step)
            for r in range(rows):
                _copy(offset(to, r * c_step), s_step, offset(tile, r * width + j), 1, count)
            j += count


@_inline
def _fetch_logits(tile, p, logits, position, lanes, row, rows, cap, fill):
    _fetch(
        tile, logits, p.logits_n, p.logits_c, p.logits_s, p.space, p.by_class, position, lanes, p.width, row, rows,
        p.classes, fill,
    )  # fmt: skip
    if cap != 0:
        for i in range(rows * p.width):
            tile[i] = cap * tanh(tile[i] / cap)
        if p.by_class:
            for i in range(p.classes - row * p.width, rows * p.width):  # the cap made the fill finite
                tile[i] = fill


@_inline
def _fetch_coefficients(tile, p, soft, weight, position, lanes, row, rows, keep, even, zero):
    """q_c = w_c * (keep * y_c + even): without the one-hot part when the targets are class indices."""
    width = p.width
    if p.soft != 0:
        _fetch(
            tile, soft, p.soft_n, p.soft_c, p.soft_s, p.space, p.by_class, position, lanes, width, row, rows,
            p.classes, zero,
        )  # fmt: skip
        for i in range(rows * width):
            tile[i] = keep * tile[i] + even
    else:
        for i in range(rows * width):
            tile[i] = even
    if p.by_class:
        count = min(rows * width, p.classes - row * width)
        if p.weight != 0:
            for i in range(count):
                tile[i] = tile[i] * weight[(row * width + i) * p.weight_c]
        for i in range(count, rows * width):
            tile[i] = zero
    elif p.weight != 0:
        for r in range(rows):
            w = weight[(row + r) * p.weight_c]
            for j in range(width):
                tile[r * width + j] = tile[r * width + j] * w


# ---------------------------------------------------------------------------------------------------------------------
# On a tile
# ---------------------------------------------------------------------------------------------------------------------


@_inline
def _set(lane_values, width, value):
    for j in range(width):
        lane_values[j] = value


@_inline_once
def _raise_maximum(top, tile, rows, width):
    for r in range(rows):
        line = offset(tile, r * width)
        for j in range(width):
            z = line[j]
            t = top[j]
            top[j] = z if z > t else t  # a nan is passed over here and met again in the sum


@_inline_once
def _move_base(base, top, low, width, started, total, weighted, mass):
    """Bring base up to top, and with it what has been summed relative to it."""
    for j in range(width):
        new = top[j] if top[j] > low else base[j]
        if started and new != base[j]:
            change = np.float64(base[j]) - np.float64(new)
            total[j] = total[j] * exp(change) if total[j] != 0.0 else 0.0  # 0 * inf when nothing was finite before
            weighted[j] = weighted[j] + mass[j] * change
        base[j] = new


@_inline_once
def _exponentials(tile, rows, width, top, part, total, zero):
    """tile = exp(tile - top), and its sum over the rows added to total."""
    for start in range(0, rows, 64):
        _set(part, width, zero)
        for r in range(start, min(start + 64, rows)):
            line = offset(tile, r * width)
            for j in range(width):
                e = exp(line[j] - top[j])
                line[j] = e
                part[j] = part[j] + e
        for j in range(width):
            total[j] = total[j] + np.float64(part[j])


@_inline_once
def _add_coefficients(tile, coefficients, rows, width, base, weighted, mass):
    """Add sum_c q_c * (z_c - base) to `weighted`, sum_c q_c to `mass`; where q_c is 0, 0 is added even at z = -inf."""
    for r in range(rows):
        line, q_line = offset(tile, r * width), offset(coefficients, r * width)
        for j in range(width):
            q = np.float64(q_line[j])
            z = np.float64(line[j]) - np.float64(base[j])
            weighted[j] = weighted[j] + (q * z if q != 0.0 else 0.0)
            mass[j] = mass[j] + q


@_inline_once
def _tree_maximum(values):
    half = LANES // 2
    while half > 0:
        for j in range(half):
            a, b = values[j], values[j + half]
            values[j] = b if b > a else a
        half //= 2


@_inline
def _tree_sum(values):
    half = LANES // 2
    while half > 0:
        for j in range(half):
            values[j] = values[j] + values[j + half]
        half //= 2


# ---------------------------------------------------------------------------------------------------------------------
# One unit of work: a position by class, up to `width` positions by position
# ---------------------------------------------------------------------------------------------------------------------


def _body(task, worker, parameters, real):
    p = numba.carray(_record(parameters), 1)[0]
    classes, space, by_class, width = p.classes, p.space, p.by_class, p.width
    logits, grad, soft, weight = at(real, p.logits), at(real, p.grad), at(real, p.soft), at(real, p.weight)
    labels, loss, lse = at(parameters, p.labels), at(real, p.loss), at(real, p.lse)
    grad_output, partial = at(real, p.grad_output), _pointer(p.partial, 0.0)
    zero, one, low = _number(0.0, real), _number(1.0, real), _number(-np.inf, real)
    cap, smoothing = _number(p.logit_softcap, real), p.label_smoothing
    keep, even = _number(1.0 - smoothing, real), _number(smoothing / classes, real)
    dense = p.soft != 0 or (p.labels != 0 and smoothing > 0)

    # Scratch memory of this worker: vectors of `width` lanes, two pieces, the tile.
    here = p.scratch + worker * p.scratch_bytes
    lane_bytes = width * 8
    total, weighted = _pointer(here, 0.0), _pointer(here + lane_bytes, 0.0)
    mass, log_sum = _pointer(here + 2 * lane_bytes, 0.0), _pointer(here + 3 * lane_bytes, 0.0)
    label = at(parameters, here + 4 * lane_bytes)
    top, base = at(real, here + 5 * lane_bytes), at(real, here + 6 * lane_bytes)
    part, factor = at(real, here + 7 * lane_bytes), at(real, here + 8 * lane_bytes)
    scale, hit = at(real, here + 9 * lane_bytes), at(real, here + 10 * lane_bytes)
    batch_index, space_index = at(parameters, here + 11 * lane_bytes), at(parameters, here + 12 * lane_bytes)
    coefficients = at(real, here + 13 * lane_bytes)
    again = offset(coefficients, PIECE)
    tile = offset(again, PIECE)

    rows = (classes + width - 1) // width if by_class else classes
    piece_rows = PIECE // width
    kept = rows <= p.tile_rows  # all exponentials fit the tile
    block = rows if kept else piece_rows

    for unit in range(task * p.task_units, min((task + 1) * p.task_units, p.units)):
        position = unit if by_class else unit * width
        lanes = 1 if by_class else min(width, p.positions - position)

        n, s = divmod(position, space)
        for j in range(lanes):  # where each lane's position is, without a division each
            batch_index[j], space_index[j] = n, s
            s += 1
            if s == space:
                n, s = n + 1, 0

        # 1. The labels: -1 where ignored. A unit that is ignored altogether has nothing read: what its tile happens to
        # hold goes through step 4 and is replaced by zeros there.
        ignored = 0
        if p.labels != 0:
            for j in range(lanes):
                n, s = batch_index[j], space_index[j]
                t = labels[n * p.labels_n + s * p.labels_s]
                if t == p.ignore_index:
                    t = -1
                    ignored += 1
                label[j] = t
        # 2. Maximum and sum of exponentials, block by block. `base` is the maximum so far, or 0 where that is -inf:
        # -inf - -inf would be nan.
        _set(top, width, low)
        _set(base, width, zero)
        _set(total, width, 0.0)
        _set(weighted, width, 0.0)
        _set(mass, width, 0.0)
        read = ignored < lanes or p.lse != 0
        for row in range(0, rows if read else 0, block):
            block_rows = min(block, rows - row)
            for r in range(0, block_rows, piece_rows):
                piece, count = offset(tile, r * width), min(piece_rows, block_rows - r)
                _fetch_logits(piece, p, logits, position, lanes, row + r, count, cap, low)
                _raise_maximum(top, piece, count, width)
            if by_class:
                _tree_maximum(top)
                _set(top, width, top[0])
            _move_base(base, top, low, width, row > 0, total, weighted, mass)
            if dense:
                for r in range(0, block_rows, piece_rows):
                    piece, count = offset(tile, r * width), min(piece_rows, block_rows - r)
                    _fetch_coefficients(
                        coefficients, p, soft, weight, position, lanes, row + r, count, keep, even, zero
                    )
                    _add_coefficients(piece, coefficients, count, width, base, weighted, mass)
            _exponentials(tile, block_rows, width, base, part, total, zero)
        if by_class:
            _tree_sum(total)
            if dense:
                _tree_sum(weighted)
                _tree_sum(mass)
        for j in range(lanes if by_class else width):
            log_sum[j] = log(total[j])

        # 3. Loss, and the factors of the gradient, of each position.
        unit_loss = 0.0
        for j in range(lanes):
            n, s = batch_index[j], space_index[j]
            log_sum_exp = np.float64(base[j]) + log_sum[j]
            if p.lse != 0:
                lse[n * p.lse_n + s * p.lse_s] = log_sum_exp
            q_sum, q_z, q_hit, slope = mass[j], weighted[j], 0.0, 1.0
            if p.labels == 0:
                if p.soft == 0:  # softmax itself
                    q_sum = 1.0
            elif label[j] >= 0:
                t = label[j]
                z = logits[n * p.logits_n + t * p.logits_c + s * p.logits_s]
                if cap != zero:
                    z = cap * tanh(z / cap)
                    slope = 1.0 - np.float64(z / cap) * np.float64(z / cap)
                q_hit = 1.0 - smoothing
                if p.weight != 0:
                    q_hit *= np.float64(weight[t * p.weight_c])
                q_sum += q_hit
                if q_hit != 0.0:
                    q_z += q_hit * (np.float64(z) - np.float64(base[j]))
            outer = p.scale
            if p.grad_output != 0:
                outer *= np.float64(grad_output[n * p.grad_output_n + s * p.grad_output_s])
            value = q_sum * log_sum[j] - q_z
            if p.z_loss != 0.0:
                value += p.z_loss * log_sum_exp * log_sum_exp
                q_sum += 2.0 * p.z_loss * log_sum_exp
            if p.labels != 0 and label[j] < 0:
                value = 0.0
            unit_loss += value
            if p.loss != 0:
                loss[n * p.loss_n + s * p.loss_s] = value
            factor[j] = log_sum[j] if p.log != 0 else q_sum * outer / total[j]
            scale[j] = outer
            hit[j] = q_hit * outer * slope
        if p.partial != 0:
            partial[unit] = unit_loss
        if p.grad == 0:
            continue

        # 4. The gradient (or the softmax), piece by piece.
        if by_class:
            _set(factor, width, factor[0])
            _set(scale, width, scale[0])
            _set(label, width, label[0])
        for row in range(0, rows, piece_rows):
            count = min(piece_rows, rows - row)
            here = offset(tile, row * width if kept else 0)
            if p.log != 0 or (read and not kept):
                _fetch_logits(here, p, logits, position, lanes, row, count, cap, low)
            if p.log != 0:
                for r in range(count):
                    line = offset(here, r * width)
                    for j in range(width):
                        line[j] = (line[j] - base[j]) - factor[j]
            else:
                if not kept:
                    for r in range(count):
                        line = offset(here, r * width)
                        for j in range(width):
                            line[j] = exp(line[j] - base[j])
                for r in range(count):
                    line = offset(here, r * width)
                    for j in range(width):
                        line[j] = line[j] * factor[j]
                if dense:
                    _fetch_coefficients(
                        coefficients, p, soft, weight, position, lanes, row, count, keep, even, zero
                    )
                    for r in range(count):
                        line, q_line = offset(here, r * width), offset(coefficients, r * width)
                        for j in range(width):
                            line[j] = line[j] - q_line[j] * scale[j]
                if cap != zero and read:
                    _fetch_logits(again, p, logits, position, lanes, row, count, cap, low)
                    for i in range(count * width):
                        u = again[i] / cap
                        here[i] = here[i] * (one - u * u)
                if ignored:
                    for r in range(count):
                        line = offset(here, r * width)
                        for j in range(width):
                            line[j] = line[j] if label[j] >= 0 else zero
            for j in range(lanes if p.labels != 0 else 0):
                r = label[j] - row * (width if by_class else 1)
                if label[j] >= 0 and 0 <= r < (count * width if by_class else count):
                    index = r if by_class else r * width + j
                    here[index] = here[index] - hit[j]
            _deliver(
                here, grad, p.grad_n, p.grad_c, p.grad_s, space, by_class, position, lanes, width, row, count,
                classes,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The entry functions
# ---------------------------------------------------------------------------------------------------------------------


def _prepare(
    logits, labels, soft, weight, grad_output, ignore_index, mean, log, scale, smoothing, z_loss, cap, loss, grad, lse,
    partial, words, body, scratch, alone,
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
        bad, used = False, 0
        for n in range(batch):
            for s in range(space):
                t = labels[n, s]
                counts = t != ignore_index
                bad |= counts & ((t < 0) | (t >= classes))
                used += counts
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
        p.labels, p.labels_n, p.labels_s = labels.ctypes.data, labels.strides[0] // 8, labels.strides[1] // 8
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
        p.weight, p.weight_c = weight.ctypes.data, weight.strides[0] // item
    if grad_output.size:
        p.grad_output, p.grad_output_n = grad_output.ctypes.data, grad_output.strides[0] // item
        p.grad_output_s = grad_output.strides[1] // item
    if loss.size:
        p.loss, p.loss_n, p.loss_s = loss.ctypes.data, loss.strides[0] // item, loss.strides[1] // item
    if lse.size:
        p.lse, p.lse_n, p.lse_s = lse.ctypes.data, lse.strides[0] // item, lse.strides[1] // item
    p.log, p.label_smoothing, p.z_loss, p.logit_softcap = log, smoothing, z_loss, cap
    p.scale = scale / denominator if mean else scale
    p.by_class = p.logits_c == 1 and classes >= BY_POSITION_BELOW
    p.width = LANES
    if not p.by_class:
        p.width = max(LANES, min(WIDEST, 2 * PIECE // classes, p.positions + LANES - 1) // LANES * LANES)
    p.tile_rows = TILE_BYTES // item // p.width
    p.partial = partial.ctypes.data
    partial[p.positions] = denominator
    p.units = p.positions if p.by_class else (p.positions + p.width - 1) // p.width
    p.task_units = max(1, TASK // (classes if p.by_class else classes * p.width))
    count = (p.units + p.task_units - 1) // p.task_units
    if batch * classes * space > alone:
        return count
    p.scratch = scratch
    for task in range(count):
        tasks._call(body, task, 0, words.ctypes.data)
    return 0


def _reduce(partial, units, mean):
    """The losses of all units, added in their order; divided, if `mean`, by the last of `partial`."""
    total = 0.0
    for unit in range(units):
        total += partial[unit]
    return total / partial[-1] if mean else total


_doubles = types.Array(types.float64, 1, "C")
_integers = types.Array(types.int64, 1, "C")


@functools.cache
def _compiled(dtype: np.dtype) -> tuple[Callable[..., int], int, tuple[np.ndarray, ...]]:
    """For a floating-point type: `_prepare`, the body's address, arrays of 1 to 3 dimensions for what is not given."""
    real = REAL[dtype]
    signature = types.intp(
        array_of(real, 3), array_of(types.int64, 2), array_of(real, 3), array_of(real, 1), array_of(real, 2),
        types.int64, types.boolean, types.boolean, *(types.float64,) * 4, output_of(real, 2), output_of(real, 3),
        output_of(real, 2), _doubles, _integers, types.intp, types.intp, types.intp,
    )  # fmt: skip
    none = tuple(np.empty((0,) * ndim, dtype) for ndim in (1, 2, 3))
    return compiled(numba.njit, signature, _prepare, nogil=True), _body_of.address(dtype), none


@functools.cache
def _compiled_reduce() -> Callable[[np.ndarray, int, bool], float]:
    return compiled(numba.njit, types.float64(_doubles, types.intp, types.boolean), _reduce, nogil=True)


_body_of = tasks.Body(_body)
_NO_LABELS = np.empty((0, 0), np.int64)
_SCRATCH = 13 * 8 * WIDEST + 2 * 8 * PIECE + TILE_BYTES
_WORDS = _PARAMETERS.itemsize // 8
_UNITS = list(_PARAMETERS.names or ()).index("units")


def _launch(
    logits, labels, soft, weight, grad_output, ignore_index, mean, log, scale, smoothing, z_loss, cap, loss, grad, lse
):  # fmt: skip
    """Run the kernels on flat arrays, None for those not given; return (status, loss reduced to a number)."""
    dtype = logits.dtype
    prepare, body, (none_1, none_2, none_3) = _compiled(dtype)
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
        partial, words, body, tasks._scratch(_SCRATCH), ALONE,
    )  # fmt: skip
    if count < 0:
        return count, 0.0
    if count > 0:
        tasks.run(_body_of, dtype, count, words, _SCRATCH, FLOPS * logits.size)
    return 0, _compiled_reduce()(partial, words[_UNITS], mean)


def cross_entropy(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray | None, grad_output: np.ndarray | float | None,
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float, logit_softcap: float,
    loss: np.ndarray | None, grad: np.ndarray | None, lse: np.ndarray | None,
) -> tuple[int, int] | None:  # fmt: skip
    """Fill those of `loss`, `grad` and `lse` that are given; see the top of this file."""
    if logits.dtype.itemsize == 2:
        return _through_float32(
            logits, target, weight, grad_output, ignore_index, reduction, label_smoothing, z_loss, logit_softcap, loss,
            grad, lse,
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
        return position, int(target.reshape(-1)[position])
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
        softmax(logits.astype(np.float32), log, wide)
        out[...] = wide
        return
    if not logits.size:
        return
    flat = _flat_output(out, 2)
    _launch(_flat(logits, 2), None, None, None, None, 0, False, log, 1.0, 0.0, 0.0, 0.0, None, flat, None)
    _bring_back(flat, out)


def _through_float32(logits: np.ndarray, *arguments: Any) -> tuple[int, int] | None:
    """`cross_entropy` of float16 or bfloat16: converted on the way in, rounded once on the way out."""
    narrow = logits.dtype
    *inputs, loss, grad, lse = arguments
    inputs = [a.astype(np.float32) if getattr(a, "dtype", None) == narrow else a for a in inputs]
    outputs = (loss, grad, lse)
    wide = [None if out is None else np.empty(out.shape, np.float32) for out in outputs]
    bad = cross_entropy(logits.astype(np.float32), *inputs, *wide)
    if bad is None:
        for out, values in zip(outputs, wide, strict=True):
            if out is not None:
                out[...] = values
    return bad


def _to_int64(labels: np.ndarray) -> np.ndarray:
    if labels.dtype == np.uint64:  # what int64 cannot hold must not wrap around to a valid label
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
