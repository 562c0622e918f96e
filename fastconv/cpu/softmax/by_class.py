"""Softmax cross-entropy by class: one position at a time, along its classes."""

from __future__ import annotations

import math

import numpy as np

from ..elementary import tanh
from ..jit import helper
from ..vector.memory import at, given, offset, out_of_line, rounded
from ..vector.move import copy_span, drain_stores, stream_block
from ..vector.softmax import span_exponentials, span_gradient, span_maximum, span_products, span_scale
from .parameters import GENERAL, PIECE, bend, soften


@helper
def _row_coefficients(out, soft, y, step, weighted, weight, count, keep, even):
    """q_c = w_c * (keep * y_c + even): without the one-hot part when the targets are class indices.

    Nothing of the parameters is read here: LLVM takes `out` for a place where they might be, and would not vectorise.
    """
    out_of_line()
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


@helper
def _line_out(to, step, line, count, past_cache):
    """Elements of the gradient, `step` apart, from consecutive ones."""
    out_of_line()
    if step == 1:
        stream_block(to, count, line, count, np.int64(1), count, past_cache)
    else:
        for i in range(count):
            to[i * step] = line[i]


# One function, however long: its parts share some twenty values, and are cut by GENERAL, which is a global of this one
# alone. Each function of its own would take 50 ms to compile.
def by_class(task, worker, p, real):
    classes, space, kept, past_cache, in_grad = p.classes, p.space, p.kept != 0, p.past_cache != 0, p.in_grad != 0
    logits, grad, soft, weight = p.logits.values, p.grad.values, p.soft.values, p.weight
    labels, loss, lse = p.labels.values, p.loss.values, p.lse.values
    grad_output, partial = p.grad_output.values, p.partial
    zero, one, low = rounded(0.0, real), rounded(1.0, real), rounded(-np.inf, real)
    cap, smoothing = rounded(p.logit_softcap, real), p.label_smoothing
    inverse = one / cap
    keep, even = rounded(1.0 - smoothing, real), rounded(smoothing / classes, real)
    if GENERAL:
        dense = given(p.soft.values) or (given(p.labels.values) and smoothing > 0)
        # q is the target itself
        raw_target = given(p.soft.values) and p.soft.c == 1 and smoothing == 0 and not given(p.weight)
        labels_only = not dense and cap == zero and p.log == 0 and p.grad.c == 1

    # Scratch memory of this worker: the sums of `span_products`, three pieces, a base for each piece, the tile.
    here = p.header.scratch + worker * p.header.scratch_bytes
    sums = at(p.partial, here)
    coefficients = at(real, here + 64)
    softened = offset(coefficients, PIECE)
    line = offset(softened, PIECE)
    bases = offset(line, PIECE)
    tile = offset(bases, (classes // PIECE // 64 + 1) * 64)
    capped = offset(tile, (classes + 15) // 16 * 16) if kept else softened
    filled = np.int64(-1)  # the first class of the piece that `coefficients` are of

    for position in range(task * p.task_units, min((task + 1) * p.task_units, p.units)):
        n, s = divmod(position, space)
        z = offset(logits, n * p.logits.n + s * p.logits.s)
        y = offset(soft, n * p.soft.n + s * p.soft.s)
        to = offset(grad, n * p.grad.n + s * p.grad.s)
        label = np.int64(-1)
        if given(p.labels.values):
            t = labels[n * p.labels.n + s * p.labels.s]
            label = t if t != p.ignore_index else label
        ignored = given(p.labels.values) and label < 0
        if GENERAL and given(p.soft.values):
            filled = np.int64(-1)
        z_label = zero
        if label >= 0:
            z_label = z[label]  # before the exponentials overwrite it

        # 1. Maximum and sum of exponentials, piece by piece. `base` is the maximum so far, or 0 where that is -inf:
        # -inf - -inf would be nan.
        top, base, total = low, zero, 0.0
        sums[0] = sums[1] = 0.0
        if not ignored or given(p.lse.values):
            for start in range(0, classes, PIECE):
                count = min(PIECE, classes - start)
                source, powers = offset(z, start), offset(to if in_grad else tile, start)
                if GENERAL:
                    if cap != zero:
                        softer = offset(capped, start) if kept else capped
                        copy_span(softer, source, count)
                        soften(softer, count, cap, inverse)
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
                    q = offset(y, start) if raw_target else coefficients
                    if not raw_target and filled != start:
                        _row_coefficients(
                            coefficients, given(p.soft.values), offset(y, start * p.soft.c), p.soft.c, given(p.weight),
                            offset(weight, start), count, keep, even,
                        )  # fmt: skip
                        filled = start
                    span_products(q, source, count, base, sums, np.int64(PIECE))
                total += span_exponentials(powers, source, count, base, np.int64(PIECE))

        # 2. Loss, and the factors of the gradient.
        log_sum = math.log(total)
        log_sum_exp = np.float64(base) + log_sum
        q_z, q_sum, q_label, slope, outer = sums[0], sums[1], 0.0, 1.0, p.scale
        if not given(p.labels.values) and not given(p.soft.values):  # softmax itself
            q_sum = 1.0
        if label >= 0:
            q_label = 1.0 - smoothing
            if GENERAL and cap != zero:
                z_label = cap * tanh(z_label * inverse)
                u = np.float64(z_label * inverse)
                slope = 1.0 - u * u
            if given(p.weight):
                q_label *= np.float64(weight[label])
            q_sum += q_label
            q_z += q_label * (np.float64(z_label) - np.float64(base)) if q_label != 0.0 else 0.0
        if given(p.grad_output.values):
            outer *= np.float64(grad_output[n * p.grad_output.n + s * p.grad_output.s])
        value = q_sum * log_sum - q_z
        if p.z_loss != 0.0:
            value += p.z_loss * log_sum_exp * log_sum_exp
            q_sum += 2.0 * p.z_loss * log_sum_exp
        if ignored:
            value = 0.0
        factor, label_term = q_sum * outer / total, q_label * outer * slope
        partial[position] = value
        if given(p.loss.values):
            loss[n * p.loss.n + s * p.loss.s] = value
        if given(p.lse.values):
            lse[n * p.lse.n + s * p.lse.s] = log_sum_exp
        if not given(p.grad.values):
            continue

        # 3. The gradient (or the softmax), piece by piece.
        if ignored:
            for c in range(classes):
                to[c * p.grad.c] = zero
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
                        soften(softer, count, cap, inverse)
                    source = softer
                if not kept and p.log == 0:
                    span_exponentials(line, source, count, base, np.int64(PIECE))
                    powers = line
            if kept and bases[start // PIECE] != base:
                moved *= math.exp(np.float64(bases[start // PIECE]) - np.float64(base))
            scale, taken = rounded(moved, real), rounded(label_term, real)
            if GENERAL and not labels_only:
                if p.log != 0:
                    shift = rounded(log_sum, real)
                    for i in range(count):
                        line[i] = (source[i] - base) - shift
                elif dense:
                    q = offset(y, start) if raw_target else coefficients
                    if not raw_target and filled != start:
                        _row_coefficients(
                            coefficients, given(p.soft.values), offset(y, start * p.soft.c), p.soft.c, given(p.weight),
                            offset(weight, start), count, keep, even,
                        )  # fmt: skip
                        filled = start
                    span_gradient(line, powers, q, count, scale, rounded(outer, real))
                else:
                    span_scale(line, powers, count, scale, False)
                if cap != zero:
                    bend(line, source, count, inverse, one)
                if start <= label < start + count:
                    line[label - start] = line[label - start] - taken
                _line_out(offset(to, start * p.grad.c), p.grad.c, line, count, past_cache)
                continue
            here = start <= label < start + count
            power = powers[label - start] if here else zero  # before it is scaled where it is
            span_scale(offset(to, start), powers, count, scale, past_cache)
            if here:
                to[label] = power * scale - taken
    if past_cache:
        drain_stores()
