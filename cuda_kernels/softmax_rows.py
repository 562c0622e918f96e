"""Softmax and cross-entropy where the classes of a position lie next to each other: one row, one group of threads.

A group is a warp, or a whole block. It reads its row once, 128 bits at a time, into registers, and writes the gradient
from there: one read and one write of the logits. Rows too long for the registers of a block, and the rarer options
(probabilities, smoothing, a softcap), are read twice, the first time with the maximum and the sum carried along
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018); a short row is then still in a cache. The
equations are those of `softmax_cross_entropy`.

A row may begin anywhere. Between its first and its last aligned address it consists of vectors of 16 bytes; the few
elements before and after, its edges, have a thread each. This division, and the groups, are in `row_groups`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from ._cuda import DeviceArray, cuda, launch_blocks
from .intrinsics import u32
from .jit import ELEMENTS, BlockKernel, array_of, device_function, flat, inlined
from .row_groups import (
    VECTORS,
    Group,
    array_by_position,
    group_for,
    label_array,
    over_group,
    row_parts_of,
    row_stride,
    warp_max,
    warp_sum,
)

__all__ = ["cross_entropy_rows", "softmax_rows"]


# ---------------------------------------------------------------------------------------------------------------------
# Both kernels
# ---------------------------------------------------------------------------------------------------------------------


def _row_steps(dtype: str, *arrays: DeviceArray) -> list[int] | None:
    """Elements from row to row of each array; None unless a row begins at the same place of a vector in all."""
    steps = [row_stride(a) for a in arrays]
    if dtype not in VECTORS or None in steps or any(a.pointer % 16 for a in arrays):
        return None
    known = [s for s in steps if s is not None]
    return known if all((s - known[0]) % VECTORS[dtype].width == 0 for s in known) else None


def _views(array: DeviceArray, dtype: str) -> tuple[DeviceArray, DeviceArray]:
    return array.flat(), array.flat(np.float32 if dtype == "float32" else np.uint32)


# Where the arguments of both kernels below lie: elements, the same memory in words, and elements from row to row.
def _flat_pair(dtype: str) -> tuple[types.Type, ...]:
    return flat(ELEMENTS[dtype].stored), flat(VECTORS[dtype].word), types.int64


@inlined
def _fill(registers, first, count, value):
    for i in range(count):
        registers[first + i] = value


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------------------------------


# A launch and its fourteen arguments, in the order of the kernel.
def cross_entropy_rows(
    logits: DeviceArray, labels: DeviceArray, probabilities: DeviceArray, weight: DeviceArray,
    grad_output: DeviceArray, ignore_index: int, scale: Any, denominator: DeviceArray, keep: Any, even: Any,
    z_loss: Any, softcap: Any, loss: DeviceArray, row_loss: DeviceArray, grad: DeviceArray, lse: DeviceArray,
    bad_position: DeviceArray, first_position: int,
) -> bool:  # fmt: skip
    """The arguments of `cross_entropy_kernel`. False, with nothing done, where the arrays do not lie in rows."""
    dtype = logits.dtype.name
    steps = _row_steps(dtype, *(a for a in (logits, probabilities, grad) if a.size))
    by_position = [array_by_position(a) for a in (labels, grad_output, loss, lse)]
    if not logits.size or steps is None or None in by_position:
        return False
    classes, rows = logits.shape[1], logits.size // logits.shape[1]
    dense = bool(probabilities.size) or even != 0
    group = group_for(dtype, classes, not dense and softcap == 0)
    kernel = cross_entropy_row_kernel(dtype, group, labels.dtype.name)
    remaining = iter(steps)
    arguments: list[Any] = []
    for a in (logits, probabilities, grad):
        arguments += [*_views(a, dtype), next(remaining) if a.size else 0]
    labels, grad_output, loss, lse = by_position
    launch_blocks(
        kernel, -(-rows // group.rows), rows, classes, *arguments, labels, weight, grad_output, ignore_index, scale,
        denominator, keep, even, z_loss, softcap, loss, row_loss, lse, bad_position, first_position,
    )  # fmt: skip
    return True


@inlined
def _judged(labels, row, t, classes, ignore_index, bad_position, first_position):
    """The label of a row, and whether it is ignored or wrong; thread 0 notes the position of a wrong one.

    Here, before the row is in registers: later, the compiler has none left for it in the largest group.
    """
    label = np.int64(labels[row])
    ignored = label == ignore_index
    wrong = not ignored and (label < 0 or label >= classes)
    if wrong and t == 0 and bad_position.size > 0:
        cuda.atomic.min(bad_position, 0, first_position + row)
    return label, ignored, wrong


def _loss_writer(dtype: str) -> Callable[..., None]:
    """``(row, value, log_sum_exp, ignored, wrong, ...)``: what the one thread of a row that has them writes."""
    store = ELEMENTS[dtype].store
    zero, nan = np.float32(0), np.float32(np.nan)

    @inlined
    def write(row, value, log_sum_exp, ignored, wrong, loss, row_loss, lse):
        if ignored:
            value = zero
        elif wrong:
            value = nan
        if lse.size > 0:
            lse[row] = store(log_sum_exp)
        if loss.size > 0:
            loss[row] = store(value)
        if row_loss.size > 0:
            row_loss[row] = value

    return write


@functools.cache
def cross_entropy_row_kernel(dtype: str, group: Group, label_dtype: str = "int64") -> BlockKernel:
    """The kernel of `cross_entropy_rows` for this group."""
    element = ELEMENTS[dtype].stored
    signature = (
        types.int64, types.int64, *_flat_pair(dtype), *_flat_pair(dtype), *_flat_pair(dtype),
        label_array(label_dtype), array_of(element, 1), array_of(element, 1), types.int64, types.float32,
        array_of(types.float32, 1), types.float32, types.float32, types.float32, types.float32, array_of(element, 1),
        array_of(types.float32, 1), array_of(element, 1), array_of(types.int64, 1), types.int64,
    )  # fmt: skip
    if not group.vectors:
        return BlockKernel(_read_twice(dtype, group), group.block, signature)
    # A row of 16-bit numbers fits 64 registers of a thread, 1024 threads on a multiprocessor; without being told, the
    # compiler takes 80 for some types. The 8 vectors of float32 need up to 76.
    resident = 1024 // group.block if VECTORS[dtype].width == 8 else None
    return BlockKernel(_read_once(dtype, group), group.block, signature, resident)


# One function: the row is in registers from its maximum to its gradient.
def _read_once(dtype: str, group: Group) -> Callable[..., None]:
    """Labels, and neither smoothing nor a softcap; the row stays in registers."""
    width, load, store = VECTORS[dtype].width, ELEMENTS[dtype].load, ELEMENTS[dtype].store
    load_vector, store_vector = VECTORS[dtype].load, VECTORS[dtype].store
    real = np.float32
    zero, low, nan = real(0), real(-np.inf), real(np.nan)
    threads, vectors, rows_per_block = group.threads, group.vectors, group.rows
    held = vectors * width
    row_parts, write_loss = row_parts_of(width), _loss_writer(dtype)
    group_max = over_group(warp_max, threads, low, 0)
    group_sum = over_group(warp_sum, threads, zero, 32)

    def cross_entropy_rows(
        rows, classes, logits, logit_words, logit_step, targets, target_words, target_step, grad, grad_words,
        grad_step, labels, weight, grad_output, ignore_index, scale, denominator, keep, even, z_loss, softcap, loss,
        row_loss, lse, bad_position, first_position,
    ):  # fmt: skip
        scratch = cuda.shared.array(64, types.float32)
        z = cuda.local.array(held, types.float32)
        t = u32(u32(cuda.threadIdx.x) % threads)
        row = np.int64(cuda.blockIdx.x) * rows_per_block + cuda.threadIdx.x // threads
        if row >= rows:  # of a block of several rows, whose threads never wait for each other
            return
        start, grad_start = row * logit_step, row * grad_step
        before, whole, edge, has_edge = row_parts(start, classes, t)
        first, grad_first = (start + before) // width, (grad_start + before) // width

        label, ignored, wrong = _judged(labels, row, t, classes, ignore_index, bad_position, first_position)
        # before any thread writes the gradient, which may be over the logits
        label_z = load(logits[np.uint64(start + label)]) if not (ignored or wrong) else zero

        # 1. Maximum, and sum of exponentials. A nan is passed over in the maximum and met again in the sum.
        edge_z = load(logits[np.uint64(start + edge)]) if has_edge else low
        for v in range(vectors):
            place = u32(t + v * threads)
            if place < whole:
                load_vector(logit_words, np.uint64(first + place), z, v * width)
            else:
                _fill(z, v * width, width, low)
        top = max(low, edge_z)
        for i in range(held):
            top = max(top, z[i])
        top = group_max(top, scratch)
        if top == low:  # -inf - -inf would be nan
            top = zero
        edge_z = real(math.exp(edge_z - top))
        total = edge_z
        for i in range(held):
            z[i] = real(math.exp(z[i] - top))  # the gradient needs no more
            total += z[i]
        total = group_sum(total, scratch)

        # 2. The loss, from one thread.
        log_sum = real(math.log(total)) if total != zero else low
        log_sum_exp = top + log_sum
        mass, value, slope = zero, zero, zero
        if not (ignored or wrong):
            mass = keep * load(weight[label]) if weight.size > 0 else keep
        if mass != zero:
            value = mass * (log_sum - (label_z - top))
        if z_loss != zero:
            slope = (z_loss + z_loss) * log_sum_exp
            value += z_loss * log_sum_exp * log_sum_exp
        if t == 0:
            write_loss(row, value, log_sum_exp, ignored, wrong, loss, row_loss, lse)

        # 3. The gradient.
        if grad.size == 0:
            return
        outer = scale
        if denominator.size > 0:
            outer /= denominator[0]
        if grad_output.size > 0:
            outer *= load(grad_output[row])
        factor, at_label = (mass + slope) * outer / total, mass * outer
        fixed, to = ignored or wrong, nan if wrong else zero
        if has_edge:
            g = edge_z * factor - (at_label if edge == u32(label) else zero)
            grad[np.uint64(grad_start + edge)] = store(to if fixed else g)
        label_vector, label_place = u32(u32(label - before) // width), u32(u32(label - before) % width)
        for v in range(vectors):
            place = u32(t + v * threads)
            if place < whole:
                if fixed:
                    _fill(z, v * width, width, to)
                else:
                    for i in range(width):
                        z[v * width + i] *= factor
                    if place == label_vector:  # one thread of the group
                        for i in range(width):
                            z[v * width + i] -= at_label if i == label_place else zero
                store_vector(grad_words, np.uint64(grad_first + place), z, v * width)

    return cross_entropy_rows


# One function with all options, which the compiler cuts to those that are asked for.
def _read_twice(dtype: str, group: Group) -> Callable[..., None]:
    """Every option, and rows of any length."""
    width, load, store = VECTORS[dtype].width, ELEMENTS[dtype].load, ELEMENTS[dtype].store
    load_vector, store_vector = VECTORS[dtype].load, VECTORS[dtype].store
    real = np.float32
    zero, one, low, nan = real(0), real(1), real(-np.inf), real(np.nan)
    threads, rows_per_block = group.threads, group.rows
    row_parts, write_loss = row_parts_of(width), _loss_writer(dtype)
    group_max = over_group(warp_max, threads, low, 0)
    group_sum = over_group(warp_sum, threads, zero, 32)
    group_mass = over_group(warp_sum, threads, zero, 64)
    group_cross = over_group(warp_sum, threads, zero, 96)

    @device_function
    def capped(z, softcap):
        return softcap * real(math.tanh(z / softcap)) if softcap != zero else z

    @inlined
    def coefficient(y, weight, c, label, with_labels, keep, even):
        """q_c, from the probability y or the label."""
        q = keep * ((one if c == label else zero) if with_labels else y) + even
        if weight.size > 0 and q != zero:  # the weight of a class that takes no part does not matter
            q *= load(weight[c])
        return q

    def accounting(count: int) -> Callable[..., Any]:
        @inlined
        def account(z, y, c, sums, softcap, weight, label, with_labels, keep, even):
            """Carry `count` classes from c into sums: maximum, sum of exp, of q, and of q (z - maximum)."""
            before = sums[0]
            for i in range(count):
                z[i] = capped(z[i], softcap)
                sums[0] = max(sums[0], z[i])
            anchor = zero if sums[0] == low else sums[0]
            if sums[0] > before:  # the sums so far are relative to another maximum
                sums[1] *= real(math.exp(before - anchor))
                sums[3] += sums[2] * ((zero if before == low else before) - anchor)
            for i in range(count):
                sums[1] += real(math.exp(z[i] - anchor))
                q = coefficient(y[i], weight, np.int64(c + i), label, with_labels, keep, even)
                sums[2] += q
                if q != zero:  # a class of coefficient 0 adds 0, even at z = -inf
                    sums[3] += q * (z[i] - anchor)

        return account

    def differentiating(count: int) -> Callable[..., None]:
        @inlined
        def differentiate(z, y, c, top, factor, outer, softcap, weight, label, with_labels, keep, even, fixed, to):
            """`count` logits from class c become their gradient, or `to` if that is `fixed`."""
            for i in range(count):
                x = capped(z[i], softcap)
                q = coefficient(y[i], weight, np.int64(c + i), label, with_labels, keep, even)
                g = real(math.exp(x - top)) * factor - q * outer
                if softcap != zero:
                    u = x / softcap
                    g *= one - u * u
                z[i] = to if fixed else g

        return differentiate

    account_vector, account_edge = accounting(width), accounting(1)
    differentiate_vector, differentiate_edge = differentiating(width), differentiating(1)

    def cross_entropy_rows(
        rows, classes, logits, logit_words, logit_step, targets, target_words, target_step, grad, grad_words,
        grad_step, labels, weight, grad_output, ignore_index, scale, denominator, keep, even, z_loss, softcap, loss,
        row_loss, lse, bad_position, first_position,
    ):  # fmt: skip
        scratch = cuda.shared.array(128, types.float32)
        z = cuda.local.array(width, types.float32)
        y = cuda.local.array(width, types.float32)
        sums = cuda.local.array(4, types.float32)
        t = u32(u32(cuda.threadIdx.x) % threads)
        row = np.int64(cuda.blockIdx.x) * rows_per_block + cuda.threadIdx.x // threads
        if row >= rows:
            return
        start, target_start, grad_start = row * logit_step, row * target_step, row * grad_step
        before, whole, edge, has_edge = row_parts(start, classes, t)  # all three begin at the same place of a vector
        first, target_first = (start + before) // width, (target_start + before) // width
        grad_first = (grad_start + before) // width

        with_labels, given = labels.size > 0, targets.size > 0
        label, ignored, wrong = np.int64(-1), False, False
        if with_labels:
            label, ignored, wrong = _judged(labels, row, t, classes, ignore_index, bad_position, first_position)

        # 1. Maximum and sums, of this thread relative to its own maximum.
        sums[0], sums[1], sums[2], sums[3] = low, zero, zero, zero
        _fill(y, 0, width, zero)
        for place in range(t, whole, threads):
            load_vector(logit_words, np.uint64(first + place), z, 0)
            if given:
                load_vector(target_words, np.uint64(target_first + place), y, 0)
            account_vector(z, y, before + place * width, sums, softcap, weight, label, with_labels, keep, even)
        if has_edge:
            z[0] = load(logits[np.uint64(start + edge)])
            if given:
                y[0] = load(targets[np.uint64(target_start + edge)])
            account_edge(z, y, edge, sums, softcap, weight, label, with_labels, keep, even)
        mine = zero if sums[0] == low else sums[0]
        top = group_max(sums[0], scratch)
        if top == low:  # -inf - -inf would be nan
            top = zero
        mass = sums[2]
        total = group_sum(sums[1] * real(math.exp(mine - top)) if sums[1] != zero else zero, scratch)
        cross = group_cross(sums[3] + (mass * (mine - top) if mass != zero else zero), scratch)
        mass = group_mass(mass, scratch)

        # 2. The loss, from one thread: the sum of q (lse - z), by way of lse - max.
        log_sum = real(math.log(total)) if total != zero else low
        log_sum_exp = top + log_sum
        slope, value = zero, zero
        if mass != zero or cross != zero:
            value = mass * log_sum - cross
        if z_loss != zero:
            slope = (z_loss + z_loss) * log_sum_exp
            value += z_loss * log_sum_exp * log_sum_exp
        if t == 0:
            write_loss(row, value, log_sum_exp, ignored, wrong, loss, row_loss, lse)

        # 3. The gradient. Each thread writes what it read itself, so it may be over the logits.
        if grad.size == 0:
            return
        outer = scale
        if denominator.size > 0:
            outer /= denominator[0]
        if grad_output.size > 0:
            outer *= load(grad_output[row])
        factor = (mass + slope) * outer / total
        fixed, to = ignored or wrong, nan if wrong else zero
        for place in range(t, whole, threads):
            load_vector(logit_words, np.uint64(first + place), z, 0)
            if given:
                load_vector(target_words, np.uint64(target_first + place), y, 0)
            differentiate_vector(
                z, y, before + place * width, top, factor, outer, softcap, weight, label, with_labels, keep, even,
                fixed, to,
            )  # fmt: skip
            store_vector(grad_words, np.uint64(grad_first + place), z, 0)
        if has_edge:
            z[0] = load(logits[np.uint64(start + edge)])
            if given:
                y[0] = load(targets[np.uint64(target_start + edge)])
            differentiate_edge(
                z, y, edge, top, factor, outer, softcap, weight, label, with_labels, keep, even, fixed, to
            )
            grad[np.uint64(grad_start + edge)] = store(z[0])

    return cross_entropy_rows


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------


def softmax_rows(logits: DeviceArray, log: bool, out: DeviceArray) -> bool:
    """The arguments of `softmax_kernel`. False, with nothing done, where the arrays do not lie in rows."""
    dtype = logits.dtype.name
    steps = _row_steps(dtype, logits, out)
    if not logits.size or steps is None:
        return False
    classes, rows = logits.shape[1], logits.size // logits.shape[1]
    group = group_for(dtype, classes, True)
    launch_blocks(
        softmax_row_kernel(dtype, group, log), -(-rows // group.rows), rows, classes, *_views(logits, dtype), steps[0],
        *_views(out, dtype), steps[1],
    )  # fmt: skip
    return True


# One function: the row is in registers from its maximum to its result.
@functools.cache
def softmax_row_kernel(dtype: str, group: Group, log: bool) -> BlockKernel:
    """The kernel of `softmax_rows` for this group."""
    width, load, store = VECTORS[dtype].width, ELEMENTS[dtype].load, ELEMENTS[dtype].store
    load_vector, store_vector = VECTORS[dtype].load, VECTORS[dtype].store
    real = np.float32
    zero, one, low = real(0), real(1), real(-np.inf)
    threads, vectors, rows_per_block = group.threads, group.vectors, group.rows
    held, once = max(vectors, 1) * width, vectors > 0
    row_parts = row_parts_of(width)
    group_max = over_group(warp_max, threads, low, 0)
    group_sum = over_group(warp_sum, threads, zero, 32)

    @device_function
    def shifted(z, top):
        return z - top if log else real(math.exp(z - top))

    @device_function
    def scaled(z, log_sum, inverse):
        return z - log_sum if log else z * inverse

    def softmax_rows(rows, classes, logits, logit_words, logit_step, out, out_words, out_step):
        scratch = cuda.shared.array(64, types.float32)
        z = cuda.local.array(held, types.float32)
        t = u32(u32(cuda.threadIdx.x) % threads)
        row = np.int64(cuda.blockIdx.x) * rows_per_block + cuda.threadIdx.x // threads
        if row >= rows:
            return
        start, out_start = row * logit_step, row * out_step
        before, whole, edge, has_edge = row_parts(start, classes, t)
        first, out_first = (start + before) // width, (out_start + before) // width

        edge_z = load(logits[np.uint64(start + edge)]) if has_edge else low
        top = max(low, edge_z)
        if once:
            for v in range(vectors):
                place = u32(t + v * threads)
                if place < whole:
                    load_vector(logit_words, np.uint64(first + place), z, v * width)
                else:
                    _fill(z, v * width, width, low)
            for i in range(held):
                top = max(top, z[i])
        else:
            total = zero
            for place in range(t, whole, threads):
                load_vector(logit_words, np.uint64(first + place), z, 0)
                earlier = top
                for i in range(width):
                    top = max(top, z[i])
                anchor = zero if top == low else top
                if top > earlier:
                    total *= real(math.exp(earlier - anchor))
                for i in range(width):
                    total += real(math.exp(z[i] - anchor))
        mine = zero if top == low else top
        top = group_max(top, scratch)
        if top == low:  # -inf - -inf would be nan
            top = zero
        if once:
            total = zero
            for i in range(held):
                z[i] = shifted(z[i], top)
                total += real(math.exp(z[i])) if log else z[i]
        elif total != zero:
            total *= real(math.exp(mine - top))
        total = group_sum(total + real(math.exp(edge_z - top)), scratch)
        log_sum, inverse = real(math.log(total)) if total != zero else low, one / total

        if has_edge:
            out[np.uint64(out_start + edge)] = store(scaled(shifted(edge_z, top), log_sum, inverse))
        if once:
            for v in range(vectors):
                place = u32(t + v * threads)
                if place < whole:
                    for i in range(width):
                        z[v * width + i] = scaled(z[v * width + i], log_sum, inverse)
                    store_vector(out_words, np.uint64(out_first + place), z, v * width)
        else:
            for place in range(t, whole, threads):
                load_vector(logit_words, np.uint64(first + place), z, 0)
                for i in range(width):
                    z[i] = scaled(shifted(z[i], top), log_sum, inverse)
                store_vector(out_words, np.uint64(out_first + place), z, 0)

    signature = (types.int64, types.int64, *_flat_pair(dtype), *_flat_pair(dtype))
    return BlockKernel(softmax_rows, group.block, signature)
