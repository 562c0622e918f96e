"""Softmax cross-entropy by position: positions side by side, a tile of them with a row for each class."""

from __future__ import annotations

import math

import numpy as np

from ..elementary import log
from ..jit import helper
from ..vector.memory import at, fill_zero, given, offset, out_of_line, rounded
from ..vector.move import drain_stores, stream_block
from ..vector.softmax import SUM_ROWS, column_exponentials, column_products, raise_maxima, scale_columns
from .parameters import COLUMN_PIECE, GENERAL, bend, inline_once, soften

# ---------------------------------------------------------------------------------------------------------------------
# By position: between an array and a tile
# ---------------------------------------------------------------------------------------------------------------------


@helper
def _run(space, n_step, s_step, position, left):
    """Where `position` is, and how many of the `left` positions from there on have which step between them."""
    if space == 1:
        return position * n_step, left, n_step
    n, s = divmod(position, space)
    return n * n_step + s * s_step, min(space - s, left), s_step


@helper
def _fetch(tile, array, n_step, c_step, s_step, space, position, lanes, width, row, rows):
    """Fill rows `row` to `row + rows` of the tile of `lanes` positions from `position` on."""
    out_of_line()
    j = 0
    while j < lanes:
        start, count, step = _run(space, n_step, s_step, position + j, lanes - j)
        source, to = offset(array, start + row * c_step), offset(tile, j)
        if step == 1:
            stream_block(to, width, source, c_step, rows, count, False)
        else:
            for i in range(count):
                for r in range(rows):
                    to[r * width + i] = source[r * c_step + i * step]
        j += count
    for r in range(rows):
        for j in range(lanes, width):
            tile[r * width + j] = tile[r * width]  # some number of the tile, never used


@helper
def _deliver(tile, array, n_step, c_step, s_step, space, position, lanes, width, row, rows, past_cache):
    """The way back."""
    out_of_line()
    j = 0
    while j < lanes:
        start, count, step = _run(space, n_step, s_step, position + j, lanes - j)
        source, to = offset(tile, j), offset(array, start + row * c_step)
        if step == 1:
            stream_block(to, c_step, source, width, rows, count, past_cache)
        else:
            for i in range(count):
                for r in range(rows):
                    to[r * c_step + i * step] = source[r * width + i]
        j += count


@inline_once
def _fetch_labels(out, labels, p, position, lanes):
    """The labels of `lanes` positions, -1 for those that are ignored."""
    j = 0
    while j < lanes:
        start, count, step = _run(p.space, p.labels.n, p.labels.s, position + j, lanes - j)
        source, to = offset(labels, start), offset(out, j)
        for i in range(count):
            t = source[i * step]
            to[i] = t if t != p.ignore_index else -1
        j += count


@helper
def _fetch_coefficients(tile, p, soft, weight, position, lanes, row, rows, keep, even):
    """q_c = w_c * (keep * y_c + even): without the one-hot part when the targets are class indices."""
    out_of_line()
    width = p.width
    if given(p.soft.values):
        _fetch(tile, soft, p.soft.n, p.soft.c, p.soft.s, p.space, position, lanes, width, row, rows)
        for i in range(rows * width):
            tile[i] = keep * tile[i] + even
    else:
        for i in range(rows * width):
            tile[i] = even
    if given(p.weight):
        for r in range(rows):
            w = weight[row + r]
            for j in range(width):
                tile[r * width + j] = tile[r * width + j] * w


# ---------------------------------------------------------------------------------------------------------------------
# By position: on a tile
# ---------------------------------------------------------------------------------------------------------------------


@helper
def _set(lane_values, width, value):
    for j in range(width):
        lane_values[j] = value


@inline_once
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


@inline_once
def _correct(base, top, low, width, total, weighted, coefficient_sum):
    """Bring what has been summed relative to the base to the maximum, which has grown."""
    for j in range(width):
        if top[j] > low and top[j] != base[j]:
            change = np.float64(base[j]) - np.float64(top[j])
            total[j] = total[j] * math.exp(change) if total[j] != 0.0 else 0.0  # 0 * inf when nothing was finite before
            weighted[j] = weighted[j] + coefficient_sum[j] * change


# One function, however long: its parts share some thirty values, and are cut by GENERAL, which is a global of this one
# alone. Each function of its own would take 50 ms to compile.
def by_position(task, worker, p, real):
    classes, space, width, kept, past_cache = p.classes, p.space, p.width, p.kept != 0, p.past_cache != 0
    in_grad, run = p.in_grad != 0, p.run
    logits, grad, soft, weight = p.logits.values, p.grad.values, p.soft.values, p.weight
    labels, loss, lse = p.labels.values, p.loss.values, p.lse.values
    grad_output, partial = p.grad_output.values, p.partial
    zero, one, low = rounded(0.0, real), rounded(1.0, real), rounded(-np.inf, real)
    # Literals as arguments would be types of their own, and have `_fetch` and `_deliver` compiled twice.
    none, single, in_cache = np.int64(0), np.int64(1), np.bool_(False)
    cap, smoothing = rounded(p.logit_softcap, real), p.label_smoothing
    inverse = one / cap
    keep, even = rounded(1.0 - smoothing, real), rounded(smoothing / classes, real)
    if GENERAL:
        dense = given(p.soft.values) or (given(p.labels.values) and smoothing > 0)

    # Scratch memory of this worker: vectors of `width` lanes, two pieces, the tile.
    here = p.header.scratch + worker * p.header.scratch_bytes
    lane_bytes = width * 8
    total = at(p.partial, here)
    weighted, coefficient_sum = offset(total, width), offset(total, 2 * width)
    label_term = at(real, here + 3 * lane_bytes)
    q_label, log_sum, outer = offset(total, 4 * width), offset(total, 5 * width), offset(total, 6 * width)
    label, top = at(p.labels.values, here + 7 * lane_bytes), at(real, here + 8 * lane_bytes)
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

        if GENERAL and given(p.soft.values):
            filled = np.int64(-1)

        # 1. The labels, -1 where ignored, and their coefficients.
        ignored = 0
        if given(p.labels.values):
            _fetch_labels(label, labels, p, position, lanes)
            for j in range(lanes, width):
                label[j] = -1
            for j in range(lanes):
                ignored += label[j] < 0
            for j in range(width):
                q_label[j] = 1.0 - smoothing if label[j] >= 0 else 0.0
            if given(p.weight):
                for j in range(lanes):
                    if label[j] >= 0:
                        q_label[j] = q_label[j] * np.float64(weight[label[j]])

        # 2. Maximum and sum of exponentials, block by block. `base` is the maximum so far, or 0 where that is -inf:
        # -inf - -inf would be nan. Where all is ignored nothing is read.
        _set(top, width, low)
        _set(base, width, zero)
        fill_zero(total, 4 * width)  # and `weighted`, `coefficient_sum` and `label_term`
        read = ignored < lanes or given(p.lse.values)
        z, z_pitch, powers, pitch = tile, width, tile, width
        if not GENERAL and p.direct != 0:
            z, z_pitch = offset(logits, n * p.logits.n + s * width * p.logits.s), p.logits.c
            if in_grad:
                powers, pitch = offset(grad, n * p.grad.n + s * width * p.grad.s), p.grad.c
        for row in range(0, classes if read else 0, block):
            block_rows = min(block, classes - row)
            if GENERAL and cap != zero and kept:
                z = offset(tile, classes * width)
            if GENERAL or p.direct == 0:
                _fetch(z, logits, p.logits.n, p.logits.c, p.logits.s, space, position, lanes, width, row, block_rows)
            if GENERAL and cap != zero:
                soften(z, block_rows * width, cap, inverse)
            if given(p.labels.values):
                for j in range(lanes):
                    r = label[j] - row
                    if 0 <= r < block_rows:  # not at -1
                        label_term[j] = z[r * z_pitch + j]
            raise_maxima(top, z, z_pitch, block_rows, lanes)
            if GENERAL and row > 0:
                _correct(base, top, low, width, total, weighted, coefficient_sum)
            for j in range(width):
                base[j] = top[j] if top[j] > low else base[j]
            if GENERAL and dense:
                for r in range(0, block_rows, piece_rows):
                    count = min(piece_rows, block_rows - r)
                    if given(p.soft.values) or filled != row + r:
                        _fetch_coefficients(coefficients, p, soft, weight, position, lanes, row + r, count, keep, even)
                        filled = row + r
                    column_products(coefficients, offset(z, r * width), count, width, base, weighted, coefficient_sum)
            next_n, next_s = divmod(position + lanes, space)  # of the next unit
            following = offset(logits, next_n * p.logits.n + row * p.logits.c + next_s * p.logits.s)
            column_exponentials(
                powers, pitch, z, z_pitch, block_rows, lanes, base, total, following, p.logits.c
            )
        for j in range(width):
            log_sum[j] = log(total[j])

        # 3. Loss, and the factors of the gradient, of each position: `weighted` becomes the loss. Short loops, which
        # LLVM turns into vectors: it gives up on one that would need many checks that its arrays do not overlap.
        _set(scale, width, one)
        if given(p.grad_output.values):
            _fetch(
                scale, grad_output, p.grad_output.n, none, p.grad_output.s, space, position, lanes, width, none, single
            )
        for j in range(width):
            outer[j] = p.scale * np.float64(scale[j])
        if not given(p.labels.values) and not given(p.soft.values):  # softmax itself
            _set(coefficient_sum, width, 1.0)
        if given(p.labels.values):  # `label_term` holds the logits at the labels
            for j in range(width):
                q = q_label[j]
                weighted[j] = weighted[j] + (q * (np.float64(label_term[j]) - np.float64(base[j])) if q != 0.0 else 0.0)
            for j in range(width):
                coefficient_sum[j] = coefficient_sum[j] + q_label[j]
            if GENERAL and cap != zero:
                for j in range(width):
                    u = np.float64(label_term[j] * inverse)
                    q_label[j] = q_label[j] * (1.0 - u * u)
            for j in range(width):
                label_term[j] = q_label[j] * outer[j]
        for j in range(width):
            weighted[j] = coefficient_sum[j] * log_sum[j] - weighted[j]
        if p.z_loss != 0.0:
            for j in range(width):
                log_sum_exp = np.float64(base[j]) + log_sum[j]
                weighted[j] = weighted[j] + p.z_loss * log_sum_exp * log_sum_exp
                coefficient_sum[j] = coefficient_sum[j] + 2.0 * p.z_loss * log_sum_exp
        for j in range(width):
            factor[j] = coefficient_sum[j] * outer[j] / total[j]
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
        if given(p.loss.values):
            for j in range(width):
                top[j] = weighted[j]
            _deliver(top, loss, p.loss.n, none, p.loss.s, space, position, lanes, width, none, single, in_cache)
        if given(p.lse.values):
            for j in range(width):
                top[j] = np.float64(base[j]) + log_sum[j]
            _deliver(top, lse, p.lse.n, none, p.lse.s, space, position, lanes, width, none, single, in_cache)
        if not given(p.grad.values):
            continue

        # 4. The gradient (or the softmax), all at once in the plain variant, else piece by piece.
        for row in range(0, classes, step):
            count = min(step, classes - row)
            here, scaled = offset(powers, row * pitch), True
            if GENERAL:
                if not kept:
                    here = tile
                if p.log != 0 or (read and not kept):
                    _fetch(here, logits, p.logits.n, p.logits.c, p.logits.s, space, position, lanes, width, row, count)
                    if cap != zero:
                        soften(here, count * width, cap, inverse)
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
                        softened, logits, p.logits.n, p.logits.c, p.logits.s, space, position, lanes, width, row, count
                    )
                    soften(softened, count * width, cap, inverse)
                if cap != zero and read and scaled:
                    bend(here, bent, count * width, inverse, one)
            if masked:
                for r in range(count):
                    line = offset(here, r * pitch)
                    for j in range(lanes):
                        line[j] = line[j] if label[j] >= 0 else zero
            if given(p.labels.values):
                for j in range(lanes):
                    r = label[j] - row
                    if 0 <= r < count:
                        here[r * pitch + j] = here[r * pitch + j] - label_term[j]
            if GENERAL or not in_grad:
                _deliver(
                    here, grad, p.grad.n, p.grad.c, p.grad.s, space, position, lanes, width, row, count, past_cache
                )
    if past_cache:
        drain_stores()
