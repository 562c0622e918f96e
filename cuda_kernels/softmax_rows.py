"""Softmax and cross-entropy where the classes of a position lie next to each other: one row, one group of threads.

A group is a warp, or a whole block. It reads its row once, 128 bits at a time, into registers, and writes the gradient
from there: one read and one write of the logits. Rows too long for the registers of a block, and the rarer options
(probabilities, smoothing, a softcap), are read twice, the first time with the maximum and the sum carried along
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018); a short row is then still in a cache. The
equations are those of `softmax_cross_entropy`.

A row may begin anywhere. Between its first and its last aligned address it consists of vectors of 16 bytes; the few
elements before and after, its edges, have a thread each.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from ._cuda import DeviceArray, cuda, launch_blocks, scratch
from .intrinsics import (
    load4,
    pack_bfloat16,
    pack_float16,
    store4,
    u32,
    unpack_bfloat16,
    unpack_float16,
)
from .jit import ELEMENTS, BlockKernel, array_of, device_function, flat, inlined

__all__ = ["add_label_weights", "add_values", "cross_entropy_rows", "row_stride", "softmax_rows"]

ALL_LANES = 0xFFFFFFFF
BLOCK = 128  # threads of a block of several groups


# ---------------------------------------------------------------------------------------------------------------------
# Vectors of 16 bytes
# ---------------------------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """How 16 bytes of an element type are read into float32 registers, and written."""

    word: types.Type
    width: int
    load: Callable[..., None]  # (words, vector, registers, first register)
    store: Callable[..., None]


@inlined
def _load_float32(words, vector, registers, first):
    a = load4(words, np.uint64(vector * 4))
    for i in range(4):
        registers[first + i] = a[i]


@inlined
def _store_float32(words, vector, registers, first):
    store4(
        words, np.uint64(vector * 4), registers[first], registers[first + 1], registers[first + 2], registers[first + 3]
    )


def _halves(unpack: Any, pack: Any) -> Vectors:
    @inlined
    def load(words, vector, registers, first):
        a = load4(words, np.uint64(vector * 4))
        for i in range(4):
            pair = unpack(a[i])
            registers[first + 2 * i] = pair[0]
            registers[first + 2 * i + 1] = pair[1]

    @inlined
    def store(words, vector, registers, first):
        store4(
            words, np.uint64(vector * 4), pack(registers[first], registers[first + 1]),
            pack(registers[first + 2], registers[first + 3]), pack(registers[first + 4], registers[first + 5]),
            pack(registers[first + 6], registers[first + 7]),
        )  # fmt: skip

    return Vectors(types.uint32, 8, load, store)


VECTORS = {
    "float32": Vectors(types.float32, 4, _load_float32, _store_float32),
    "float16": _halves(unpack_float16, pack_float16),
    "bfloat16": _halves(unpack_bfloat16, pack_bfloat16),
}


# ---------------------------------------------------------------------------------------------------------------------
# Which group for which row
# ---------------------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """`threads` per row (a warp or a block), each holding `vectors` of it in registers; 0: the row is read twice."""

    threads: int
    vectors: int

    @property
    def block(self) -> int:
        return max(self.threads, BLOCK)

    @property
    def rows(self) -> int:
        return self.block // self.threads


# In order of size. 8 vectors of float32 are 32 registers of a thread, 4 vectors of 16-bit numbers as well.
GROUPS = {
    4: [Group(32, 1), Group(32, 4), Group(128, 4), Group(256, 8), Group(512, 8), Group(1024, 8)],
    8: [Group(32, 1), Group(32, 4), Group(128, 4), Group(256, 4), Group(512, 4), Group(1024, 4)],
}
# For rows that are read twice: few threads for short rows, so that each has several vectors. Not more than 256: the
# compiler spills with the registers that a larger block leaves to a thread.
SHORT_ROW, SHORT, LONG = 1024, Group(32, 0), Group(256, 0)


def group_for(dtype: str, classes: int, once: bool) -> Group:
    """The smallest group that holds the vectors of a row; `once`: it need not be read twice for another reason."""
    width = VECTORS[dtype].width
    if once:
        for group in GROUPS[width]:
            if group.threads * group.vectors * width >= classes:
                return group
    return SHORT if classes <= SHORT_ROW else LONG


def row_stride(array: DeviceArray, class_axis: int | None = 1) -> int | None:
    """Elements from one position to the next in the order of positions; None where they have no one step.

    `class_axis` is left out, unless it is None; there the step must be one element.
    """
    axes = list(zip(array.shape, array.strides, strict=True))
    if class_axis is not None:
        n, s = axes.pop(class_axis)
        if n > 1 and s != array.dtype.itemsize:
            return None
    axes = [(n, s) for n, s in axes if n > 1]
    if any(outer != n * inner for (_, outer), (n, inner) in itertools.pairwise(axes)):
        return None
    step = axes[-1][1] if axes else 0
    return step // array.dtype.itemsize if step >= 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# What the threads of a group do together
# ---------------------------------------------------------------------------------------------------------------------


@inlined
def _warp_max(x):
    for i in range(5):
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, 16 >> i))
    return x


@inlined
def _warp_sum(x):
    for i in range(5):
        x += cuda.shfl_xor_sync(ALL_LANES, x, 16 >> i)
    return x


def _over_group(reduce_warp: Callable[..., Any], threads: int, neutral: Any, place: int) -> Callable[..., Any]:
    """``(x, scratch) -> the reduction of x over the group``; a block has a part of `scratch` for each reduction."""
    if threads == 32:

        @inlined
        def over_warp(x, scratch):
            return reduce_warp(x)

        return over_warp
    warps = threads // 32

    @inlined
    def over_block(x, scratch):
        x = reduce_warp(x)
        t = cuda.threadIdx.x
        if t % 32 == 0:
            scratch[place + t // 32] = x
        cuda.syncthreads()
        x = scratch[place + t % 32] if t % 32 < warps else neutral
        return reduce_warp(x)

    return over_block


@inlined
def _fill(registers, first, count, value):
    for i in range(count):
        registers[first + i] = value


def _row_parts(width: int) -> Callable[..., Any]:
    """``(start, classes, t)``: how a row from element `start` on divides into vectors and edges.

    That is: elements before the first vector, vectors, the element that is the edge of thread t, and if it has one.
    """

    @inlined
    def parts(start, classes, t):
        before = min(u32(-start % width), u32(classes))
        whole = u32(u32(classes - before) // width)
        after = u32(before + whole * width)  # the first element behind the last vector
        edge = t if t < width else u32(after + t - width)
        return before, whole, edge, t < before or (t >= width and edge < classes)

    return parts


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
    by_position = [_by_position(a) for a in (labels, grad_output, loss, lse)]
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


def _row_steps(dtype: str, *arrays: DeviceArray) -> list[int] | None:
    """Elements from row to row of each array; None unless a row begins at the same place of a vector in all."""
    steps = [row_stride(a) for a in arrays]
    if dtype not in VECTORS or None in steps or any(a.pointer % 16 for a in arrays):
        return None
    known = [s for s in steps if s is not None]
    return known if all((s - known[0]) % VECTORS[dtype].width == 0 for s in known) else None


def _views(array: DeviceArray, dtype: str) -> tuple[DeviceArray, DeviceArray]:
    return array.flat(), array.flat(np.float32 if dtype == "float32" else np.uint32)


def _by_position(array: DeviceArray) -> DeviceArray | None:
    """An array (N, D, H, W) as one of positions."""
    if not array.size:
        return DeviceArray(0, (0,), None, array.dtype, None, stream=-1)
    step = row_stride(array, None)
    if step is None:
        return None
    itemsize = array.dtype.itemsize
    return DeviceArray(array.pointer, (array.size,), (step * itemsize,), array.dtype, array.owner, array.stream)


# Where the arguments of both kernels below lie: elements, the same memory in words, and elements from row to row.
def _flat_pair(dtype: str) -> tuple[types.Type, ...]:
    return flat(ELEMENTS[dtype].stored), flat(VECTORS[dtype].word), types.int64


def _label_array(dtype: str) -> types.Array:
    return array_of(getattr(types, dtype), 1)


@functools.cache
def cross_entropy_row_kernel(dtype: str, group: Group, label_dtype: str = "int64") -> BlockKernel:
    """The kernel of `cross_entropy_rows` for this group."""
    element = ELEMENTS[dtype].stored
    signature = (
        types.int64, types.int64, *_flat_pair(dtype), *_flat_pair(dtype), *_flat_pair(dtype),
        _label_array(label_dtype), array_of(element, 1), array_of(element, 1), types.int64, types.float32,
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
    row_parts, write_loss = _row_parts(width), _loss_writer(dtype)
    group_max = _over_group(_warp_max, threads, low, 0)
    group_sum = _over_group(_warp_sum, threads, zero, 32)

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
    row_parts, write_loss = _row_parts(width), _loss_writer(dtype)
    group_max = _over_group(_warp_max, threads, low, 0)
    group_sum = _over_group(_warp_sum, threads, zero, 32)
    group_mass = _over_group(_warp_sum, threads, zero, 64)
    group_cross = _over_group(_warp_sum, threads, zero, 96)

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
    row_parts = _row_parts(width)
    group_max = _over_group(_warp_max, threads, low, 0)
    group_sum = _over_group(_warp_sum, threads, zero, 32)

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


# ---------------------------------------------------------------------------------------------------------------------
# Sums over positions
# ---------------------------------------------------------------------------------------------------------------------

SUM_THREADS = 1024
# Positions that one block adds. More are taken apart, and the sums of the blocks added by one more block.
MOST_OF_A_BLOCK = 1 << 16


def _real(dtype: np.dtype) -> np.dtype:
    return np.dtype(ELEMENTS[dtype.name].real)


def _none(dtype: np.dtype) -> DeviceArray:
    return DeviceArray(0, (0,), None, dtype, None, stream=-1)


def add_values(values: DeviceArray, denominator: DeviceArray, divisor: float, out: DeviceArray) -> None:
    """out[0] = sum of the values / denominator[0] (nan if 0; unless empty) / divisor, always in the same order.

    `values` and `denominator` are of the type that `out`'s is summed in.
    """
    real = _real(out.dtype)
    blocks = -(-values.size // MOST_OF_A_BLOCK)
    if blocks > 1:
        partial = scratch((blocks,), real, values)
        launch_blocks(add_values_kernel(real.name), blocks, values, _none(real), real.type(1), partial)
        values = partial
    launch_blocks(add_values_kernel(out.dtype.name), 1, values, denominator, real.type(divisor), out)


def add_label_weights(
    labels: DeviceArray, weight: DeviceArray, ignore_index: int, classes: int, out: DeviceArray
) -> bool:
    """out[0] = sum of the weights of the labels' classes, 1 each if `weight` is empty; `out` is of the type of sums.

    Labels that are ignored or out of range count nothing. False, with nothing done, where they have no one step.
    """
    by_position = _by_position(labels)
    if by_position is None:
        return False
    blocks = -(-labels.size // MOST_OF_A_BLOCK)
    partial = scratch((blocks,), out.dtype, out) if blocks > 1 else out
    kernel = add_label_weights_kernel(weight.dtype.name, labels.dtype.name)
    launch_blocks(kernel, max(1, blocks), by_position, weight, ignore_index, classes, partial)
    if blocks > 1:
        add_values(partial, _none(out.dtype), 1, out)
    return True


@functools.cache
def add_values_kernel(dtype: str) -> BlockKernel:
    """The kernel of `add_values` for results of this type."""
    real, store = ELEMENTS[dtype].real, ELEMENTS[dtype].store
    number = numba.from_dtype(np.dtype(real))
    zero, nan = real(0), real(np.nan)
    sum_of_block = _over_group(_warp_sum, SUM_THREADS, zero, 0)

    def add_values(values, denominator, divisor, out):
        shared = cuda.shared.array(32, number)
        first = np.int64(cuda.blockIdx.x) * MOST_OF_A_BLOCK
        total = zero
        for i in range(first + cuda.threadIdx.x, min(first + MOST_OF_A_BLOCK, values.size), SUM_THREADS):
            total += values[i]
        total = sum_of_block(total, shared)
        if cuda.threadIdx.x == 0:
            if denominator.size > 0:
                total = total / denominator[0] if denominator[0] != zero else nan
            out[np.int64(cuda.blockIdx.x)] = store(total / divisor)

    signature = (array_of(number, 1), array_of(number, 1), number, array_of(ELEMENTS[dtype].stored, 1))
    return BlockKernel(add_values, SUM_THREADS, signature)


@functools.cache
def add_label_weights_kernel(dtype: str, label_dtype: str = "int64") -> BlockKernel:
    """The kernel of `add_label_weights` for weights of this type: a sum for each block."""
    element, real, load = ELEMENTS[dtype].stored, ELEMENTS[dtype].real, ELEMENTS[dtype].load
    number = numba.from_dtype(np.dtype(real))
    zero, one = real(0), real(1)
    sum_of_block = _over_group(_warp_sum, SUM_THREADS, zero, 0)

    def add_label_weights(labels, weight, ignore_index, classes, sums):
        shared = cuda.shared.array(32, number)
        first = np.int64(cuda.blockIdx.x) * MOST_OF_A_BLOCK
        total = zero
        for i in range(first + cuda.threadIdx.x, min(first + MOST_OF_A_BLOCK, labels.size), SUM_THREADS):
            label = np.int64(labels[i])
            if label != ignore_index and label >= 0 and label < classes:
                total += load(weight[label]) if weight.size > 0 else one
        total = sum_of_block(total, shared)
        if cuda.threadIdx.x == 0:
            sums[np.int64(cuda.blockIdx.x)] = total

    signature = _label_array(label_dtype), array_of(element, 1), types.int64, types.int64, array_of(number, 1)
    return BlockKernel(add_label_weights, SUM_THREADS, signature)
