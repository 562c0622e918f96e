"""The convolution engine: every pass of a convolution as the same blocked matrix product.

    out[i, j] += sum over r of A[i, r] * B[r, j]

    pass              rows i              reduction r                      columns j
    forward           output channels     (channel, tap)                   output pixels
    input gradient    input channels      (output channel, tap of phase)   input pixels of the phase
    weight gradient   (channel, tap)      output pixels                    output channels

Where the input has few channels, rows of the input gradient are phases of one dimension too: (phase, input channel).

`correlate` is the first two. Its columns are consecutive pixels of the flattened (batch, depth, height, width) index of
the output, so the ends of short rows cost nothing. A task is a range of pixels and of output channels. For one block of
channels at a time it copies the input rows its pixels need, with their halo, into the *slab* (this is where stride,
padding and any memory layout are absorbed: rows are split by phase of the stride, so that consecutive pixels are
consecutive in memory; a 1x1 kernel reads the image as it lies). For each channel and tap the values of `columns` pixels
are a row of a *panel* [r][columns], which is multiplied with the packed weights [r][rows] by the microkernel
`simd.contract_packing`, for some output channels after the other. The first of these products writes the panel, where
its pixels come from few pieces of memory: the arithmetic hides the copying, which took up to a fifth of the time. If it
is the only one, it reads the slab and writes no panel: two thirds of the time where there are 3 or 4 rows of weights.
There is no im2col of the image: slab and panels stay in the cache of the core.

Where many products are with zeros around a small plane, `small_planes` computes the same sums without these. Where the
channels of a pixel are neighbours in memory, `channels_last` computes them without the transposes it would take to have
pixels along the vectors; the weight gradient reads such an image element by element, as far apart as they lie.

The reduction is cut into blocks whose size depends only on the number of channels and taps, and each block is one chain
of multiply-adds: an output element has the same bits for any split into tasks, any number of threads and any batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import simd, tasks
from .jit import helper as _jit
from .tasks import Body, address

# Blocking, in bytes. A group of panels stays in L2 and is read from there for each panel of output channels, whose
# weights stay in L1 meanwhile: so each row of the output is written as many panels at a time. With panels of 48 KiB
# layers of many channels (1x1 of 1024, 3x3 of 512) are 2 to 4 % faster than with 24 KiB, since sums are stored less
# often. Groups of 48, 192 and 320 KiB made no difference beyond the noise of 5 % for 14 layers.
PANEL_BYTES = 48 * 1024
GROUP_BYTES = 96 * 1024
WEIGHT_BYTES = 256 * 1024
SLAB_BYTES = 384 * 1024

# Tasks pack the weights themselves where the panels of all pixels fit L2 together (OWN_GROUP_BYTES), or where their
# weights do (OWN_WEIGHT_BYTES) and packing them in every task is cheaper than waiting for it as a stage of its own.
# With planes of 7 x 7 that takes 3 to 8 % off the forward pass. They are packed OWN_BLOCK_BYTES at a time.
OWN_GROUP_BYTES = 384 * 1024
OWN_WEIGHT_BYTES = 256 * 1024
OWN_BLOCK_BYTES = 128 * 1024
# Bytes of the operands of a weight gradient from where on the gradient of the output is asked for ahead of time: of 3
# channels to 64 of 224 x 224 it takes 0.84 of the time then. With less, which the third cache holds, nothing changes.
AHEAD_BYTES = 16 * 1024 * 1024
AGAIN_WEIGHTS = 8 * 1024  # elements for each thread

# Parameters of the `correlate` body (int64, in this order).
(
    X, W, Y, BIAS, RELU, ADD,
    X_N, X_C, X_D, X_H, X_W, Y_N, Y_O, Y_D, Y_H, Y_W,
    OUT_D, OUT_H, OUT_W, PIXELS, ROW_CHANNELS, CHANNELS,
    TAPS, KERNEL_D, SPAN_H, SPAN_W, STRIDE_D, STRIDE_H, STRIDE_W, DILATION_D,
    SOURCE_D, SOURCE_H, SOURCE_W, PADDED_W, BEFORE_W, SIZE_W, ZEROS, PADDED,
    TAP_OFFSET, BLOCK_CHANNELS, BLOCK_TAPS, PANELS, PIXEL_TASKS, CHUNK, CHUNKS, ROW_TASKS, GROUP, WEIGHT_PANELS,
    IN_PLACE, EXTENT, PLANE, SEGMENTS, SEGMENT_ROWS, PHASE_PITCH, ROW_PITCH, ROW_LENGTH, CHANNEL_PITCH,
    SLAB_SIZE, PANEL_SIZE, WEIGHT_SIZE, TABLE_BYTES, RUN_TABLE, ROW_TABLE, DEPTH_OFFSET, AHEAD, PACKING, PACKING_BODY,
    WEIGHTS_STAY, X_GROUP, Y_GROUP, KERNELS, FILL, PIXEL_PITCH, PIXEL_STEP, END,
) = range(tasks.FIRST, tasks.FIRST + 75)  # fmt: skip

# Those of the weight gradient: the same for the slab, where Y stands for the gradient of the output; and
(
    W_GROUP, W_O, W_C, W_TAP_OFFSET, W_FLAT, ROW_OFFSET, UNIT_ROWS, UNITS, SPLITS, CHANNEL_BLOCKS, OUT_BLOCKS, VECTORS,
    VECTOR_PANELS, PARTIAL, TILE_SIZE, Y_PACKED, BY_TAP, GRADIENT_END,
) = range(END, END + 18)  # fmt: skip

# Those of packing weights.
(
    FROM, TO, FROM_BEGIN, FROM_END, GROUP_STEP, ROW_STEP, CHANNEL_STEP, OFFSETS, CONSECUTIVE, RUN_CHANNELS,
    P_ROWS, P_CHANNELS, P_TAPS, P_BLOCK_CHANNELS, P_BLOCK_TAPS, P_PANELS, P_TASKS, CHECK_FINITE, NOT_FINITE,
    PHASES, PHASE_TABLE, TAP_TABLE, WINDOWS, WINDOW_TABLE, ASCENDING, TARGET_BYTES, PACK_END,
) = range(tasks.FIRST, tasks.FIRST + 27)  # fmt: skip
# What `_correlate` asks for where its tasks pack their own weights: see `_pack_rows`.
(
    OWN_PACKING, OWN_TO, OWN_GROUP, OWN_FIRST_PANEL, OWN_LAST_PANEL, OWN_CHANNEL, OWN_CHANNELS, OWN_FIRST_TAP,
    OWN_LAST_TAP, OWN_BLOCK, OWN_FIELDS,
) = range(11)  # fmt: skip
# The tables of packing several phases: of a phase; of a tap, whose part of the reduction (TAP_FIRST, TAP_COUNT) and
# place in it are those of its phase; of taps within a vector of one another; and of where a tap is to be written: in
# how many channels its next block begins, the place, and the elements of the block from there on.
PHASE_TO, PHASE_TAPS, PHASE_BLOCK, PHASE_BLOCK_TAPS, PHASE_FIELDS = range(5)
FROM_TAP, TAP_PHASE, TAP_FIRST, TAP_COUNT, TAP_ROW, TAP_FIELDS = range(6)
FIRST_TAP, LAST_TAP, LOWEST, WINDOW_FIELDS = range(4)
UNTIL_BLOCK, TARGET, TARGET_LEFT, TARGET_FIELDS = range(4)


# ---------------------------------------------------------------------------------------------------------------------
# From the image into the slab
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _copy_row(row, phase_pitch, source, step, stride, count, first, places):
    """Elements 0 .. count of `source` (`step` apart) become the padded coordinates first .. first + count of `row`.

    Padded coordinate u lies at (u % stride) * phase_pitch + u // stride; `places` has those of the first four.
    """
    simd.keep_apart()
    if step == 1 and stride == 1:
        simd.copy_span(simd.offset(row, first), source, count)
    elif step == 1 and stride == 2:
        simd.separate_2(row, places, source, count)
    elif step == 1 and stride == 4:
        simd.separate_4(row, places, source, count)
    elif step == 2 and stride == 1:
        simd.copy_every_second(simd.offset(row, first), 0, source, 0, 1, count)
    elif stride == 1:
        target = simd.offset(row, first)
        for i in range(count):
            target[i] = source[i * step]
    else:
        lanes = simd.lanes(row)
        phase, place = first % stride, first // stride
        before = min((stride - phase) % stride, count)  # elements of a stride that is not whole
        whole = (count - before) // stride if step == 1 else 0  # strides, to be transposed
        i = 0
        while i < count:
            if i == before and whole > 0:
                for k in range(0, whole, lanes):
                    for r in range(0, stride, lanes):
                        simd.transpose_block(
                            simd.offset(row, r * phase_pitch + place + k), phase_pitch,
                            simd.offset(source, i + k * stride + r), stride, min(lanes, whole - k),
                            min(lanes, stride - r),
                        )  # fmt: skip
                i += whole * stride
                place += whole
                whole = 0
                continue
            row[phase * phase_pitch + place] = source[i * step]
            i += 1
            phase += 1
            if phase == stride:
                phase = 0
                place += 1


@_jit
def _copy_channels(rows, pitch, phase_pitch, source, step, channels, stride, count, first):
    """`_copy_row` for up to `lanes` channels that are neighbours in memory, and `pitch` apart in the slab."""
    simd.keep_apart()
    lanes = simd.lanes(rows)
    for r in range(min(stride, count)):
        place = (first + r) % stride * phase_pitch + (first + r) // stride
        length = (count - r + stride - 1) // stride
        for k in range(0, length, lanes):
            simd.transpose_block(
                simd.offset(rows, place + k), pitch, simd.offset(source, (r + k * stride) * step), stride * step,
                min(lanes, length - k), channels,
            )  # fmt: skip


@_jit
def _find_rows_and_zeros(p, rows, first_row, last_row):
    """List the input rows that output rows first_row .. last_row need; return their number, and if others are zeros.

    An output row is one (batch, depth, height). Those of one (batch, depth) are a segment, whose input rows lie
    together in the slab: [channel][segment][depth tap][row]. Entered are the row's place in the first channel of the
    input, and its place in the slab.
    """
    simd.keep_apart()
    out_d, out_h = p[OUT_D], p[OUT_H]
    source_d, source_h = simd.at(p, p[SOURCE_D]), simd.at(p, p[SOURCE_H])
    count = 0
    zeros = False
    first_segment, last_segment = first_row // out_h, (last_row - 1) // out_h
    for segment in range(first_segment, last_segment + 1):
        n, d = segment // out_d, segment % out_d
        h = max(first_row, segment * out_h) - segment * out_h
        h_end = min(last_row, (segment + 1) * out_h) - segment * out_h
        height = (h_end - 1 - h) * p[STRIDE_H] + p[SPAN_H]
        for i in range(p[KERNEL_D]):
            from_d = source_d[d * p[STRIDE_D] + i * p[DILATION_D]]
            place = ((segment - first_segment) * p[KERNEL_D] + i) * p[SEGMENT_ROWS]
            for r in range(height):
                from_h = source_h[h * p[STRIDE_H] + r]
                if r % p[STRIDE_H] >= p[SPAN_H]:
                    continue  # between the windows
                if from_d < 0 or from_h < 0:
                    zeros = True
                    continue
                rows[2 * count] = n * p[X_N] + from_d * p[X_D] + from_h * p[X_H]
                rows[2 * count + 1] = (place + r) * p[ROW_PITCH]
                count += 1
    return count, zeros


@_jit
def find_rows(p, rows, first_row, last_row):
    """`_find_rows_and_zeros` for those who write zeros everywhere first."""
    count, _ = _find_rows_and_zeros(p, rows, first_row, last_row)
    return count


# What a body says to one of those that fill its slab: where its own parameters, the slab and the first channel of the
# input are, how many channels, the table and the number of rows (see `find_rows`), the padded coordinate that the slab
# rows begin with, and where there is room for four integers.
FILL_FOR, FILL_SLAB, FILL_FROM, FILL_CHANNELS, FILL_ROWS, FILL_COUNT, FILL_FIRST, FILL_PLACES = range(8)


@tasks.Body
def _fill_whole_rows(task, worker, a, real):
    """`_fill_slab` where the elements of a row are neighbours, zeros are around them, and the stride is 1, 2 or 4."""
    p, rows, places = simd.at(a, a[FILL_FOR]), simd.at(a, a[FILL_ROWS]), simd.at(a, a[FILL_PLACES])
    stride, first_u = p[STRIDE_W], a[FILL_FIRST]
    low = max(p[BEFORE_W], first_u)
    count = min(p[BEFORE_W] + p[SIZE_W], first_u + p[ROW_LENGTH]) - low
    if count <= 0:
        return
    for r in range(4):
        v = low - first_u + r
        places[r] = v % stride * p[PHASE_PITCH] + v // stride
    source = simd.offset(simd.at(real, a[FILL_FROM]), low - p[BEFORE_W])
    target = simd.at(real, a[FILL_SLAB])
    for _ in range(a[FILL_CHANNELS]):
        for k in range(a[FILL_COUNT]):
            row, elements = simd.offset(target, rows[2 * k + 1]), simd.offset(source, rows[2 * k])
            if stride == 1:
                simd.copy_span(simd.offset(row, places[0]), elements, count)
            elif stride == 2:
                simd.separate_2(row, places, elements, count)
            else:
                simd.separate_4(row, places, elements, count)
        source, target = simd.offset(source, p[X_C]), simd.offset(target, p[CHANNEL_PITCH])


@tasks.Body
def _fill_slab(task, worker, a, real):
    """Copy the rows listed by `find_rows` of some channels into the slab, from any layout and with any padding."""
    p, rows, places = simd.at(a, a[FILL_FOR]), simd.at(a, a[FILL_ROWS]), simd.at(a, a[FILL_PLACES])
    slab, x = simd.at(real, a[FILL_SLAB]), simd.at(real, a[FILL_FROM])
    channels, count, first_u = a[FILL_CHANNELS], a[FILL_COUNT], a[FILL_FIRST]
    step, stride = p[X_W], p[STRIDE_W]
    source_w = simd.at(p, p[SOURCE_W])
    phase_pitch = p[PHASE_PITCH]
    low = max(p[BEFORE_W], first_u)  # padded coordinates that are input elements: low .. high
    high = min(p[BEFORE_W] + p[SIZE_W], first_u + p[ROW_LENGTH])
    end = min(p[PADDED_W], first_u + p[ROW_LENGTH])
    for r in range(4):
        v = low - first_u + r
        places[r] = v % stride * phase_pitch + v // stride
    begin = simd.offset(x, (low - p[BEFORE_W]) * step)
    if p[X_C] == 1 and step > 1:
        for c in range(0, channels, simd.lanes(slab)):
            block = min(simd.lanes(slab), channels - c)
            for k in range(count):
                _copy_channels(
                    simd.offset(slab, rows[2 * k + 1] + c * p[CHANNEL_PITCH]), p[CHANNEL_PITCH], phase_pitch,
                    simd.offset(begin, rows[2 * k] + c), step, block, stride, high - low, low - first_u,
                )  # fmt: skip
    elif high > low:
        # Rows of a plane beyond L2 that are short or not consecutive are fetched early: 1x1 layers of stride 2 take 2
        # to 10 % less time by it. Rows of less than a vector are not worth the question.
        length = (high - low) * step
        for c in range(channels):
            source, target = simd.offset(begin, c * p[X_C]), simd.offset(slab, c * p[CHANNEL_PITCH])
            for k in range(count):
                if length >= simd.lanes(slab):  # the same row of the next channel
                    simd.fetch_span(simd.offset(source, p[X_C] + rows[2 * k]), length)
                _copy_row(
                    simd.offset(target, rows[2 * k + 1]), phase_pitch, simd.offset(source, rows[2 * k]), step, stride,
                    high - low, low - first_u, places,
                )  # fmt: skip
    if not p[ZEROS]:
        for c in range(channels):
            for k in range(count):
                source = simd.offset(x, c * p[X_C] + rows[2 * k])
                row = simd.offset(slab, c * p[CHANNEL_PITCH] + rows[2 * k + 1])
                for u in range(first_u, end):
                    if (u < low or u >= high) and source_w[u] >= 0:
                        v = u - first_u
                        row[v % stride * phase_pitch + v // stride] = source[source_w[u] * step]


@tasks.Body
def _fill_pixels(task, worker, a, real):
    """`_fill_slab` for a slab of [row][pixel][channel], from an image whose channels are neighbours in memory."""
    p, rows = simd.at(a, a[FILL_FOR]), simd.at(a, a[FILL_ROWS])
    slab, x = simd.at(real, a[FILL_SLAB]), simd.at(real, a[FILL_FROM])
    channels, first_u = a[FILL_CHANNELS], a[FILL_FIRST]
    pitch, step, source_w = p[PIXEL_PITCH], p[X_W], simd.at(p, p[SOURCE_W])
    low = max(p[BEFORE_W], first_u)  # padded coordinates that are input elements: low .. high
    high = min(p[BEFORE_W] + p[SIZE_W], first_u + p[ROW_LENGTH])
    end = min(p[PADDED_W], first_u + p[ROW_LENGTH])
    for k in range(a[FILL_COUNT]):
        source, target = simd.offset(x, rows[2 * k]), simd.offset(slab, rows[2 * k + 1])
        if high > low:
            place, begin = simd.offset(target, (low - first_u) * pitch), (low - p[BEFORE_W]) * step
            if pitch == channels and step == channels:
                simd.copy_span(place, simd.offset(source, begin), (high - low) * channels)
            else:
                simd.copy_block(place, pitch, simd.offset(source, begin), step, high - low, channels)
        if not p[ZEROS]:
            for u in range(first_u, end):
                if (u < low or u >= high) and source_w[u] >= 0:
                    place = simd.offset(target, (u - first_u) * pitch)
                    simd.copy_span(place, simd.offset(source, source_w[u] * step), channels)


# ---------------------------------------------------------------------------------------------------------------------
# From the slab into panels
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def find_pieces(p, table, pixel, end, first_row, first_column, like):
    """Write the table of `simd.pack_panel` for pixels pixel .. end; return the largest place of a pixel.

    The pixels are split where an output row ends. A piece is entered in the table of every vector it has pixels in.
    """
    simd.keep_apart()
    out_h, out_w = p[OUT_H], p[OUT_W]
    if p[IN_PLACE]:  # the pixels of a plane follow one another
        out_w *= p[OUT_D] * out_h
    lanes, stride = simd.lanes(like), simd.piece_table_stride(like)
    for vector in range(simd.columns(like) // lanes):
        table[vector * stride] = 0
        table[vector * stride + 1] = 0
    column = 0
    largest = 0
    while pixel < end:
        row = pixel // out_w
        w = pixel - row * out_w
        length = min(end - pixel, out_w - w)
        if p[IN_PLACE]:
            place = row * p[X_N] + w
        else:
            segment = row // out_h - first_row // out_h
            h = row % out_h - (first_row % out_h if segment == 0 else 0)
            place = (segment * p[KERNEL_D] * p[SEGMENT_ROWS] + h * p[STRIDE_H]) * p[ROW_PITCH] + w - first_column
        for vector in range(column // lanes, (column + length - 1) // lanes + 1):
            entry = simd.offset(table, vector * stride)
            entry[2 * entry[0] + 1] = place - column + vector * lanes
            entry[2 * entry[0] + 2] = -1 << max(0, column - vector * lanes)
            entry[0] += 1
        largest = max(largest, place + length - 1)
        column += length
        pixel += length
    for vector in range(simd.columns(like) // lanes):
        entry = simd.offset(table, vector * stride)
        for piece in range(entry[0], simd.FIXED_PIECES):
            entry[2 * piece + 1] = entry[1]
            entry[2 * piece + 2] = 0
    return largest


@_jit
def _pack_exactly(p, panel, source, table, channels, first_tap, last_tap, count):
    """`simd.pack_panel` element by element, for pixels at the very end of the input: nothing else is read.

    Done for all channels, not only the last, this was 31 of 249 us of a layer of MobileNetV2 (384 channels to 64).
    """
    simd.keep_apart()
    tap_offset = simd.at(p, p[TAP_OFFSET])
    lanes, stride = simd.lanes(panel), simd.piece_table_stride(panel)
    for c in range(channels):
        for tap in range(first_tap, last_tap):
            for column in range(count):
                entry = simd.offset(table, column // lanes * stride)
                piece = entry[0] - 1
                while not entry[2 * piece + 2] >> column % lanes & 1:
                    piece -= 1
                panel[column] = source[c * p[CHANNEL_PITCH] + tap_offset[tap] + entry[2 * piece + 1] + column % lanes]
            panel = simd.offset(panel, simd.columns(panel))


@_jit
def _take_panel(
    p, panel, slab, table, slab_place, channels, first_tap, last_tap, pixel, end, vectors, once, first_row, first_column
):  # fmt: skip
    """Pack the panel of pixels pixel .. end; or return PACK if the first product is to, by the table of pieces.

    Or READ, if it is used `once` and the product can do without. The product is of so many `vectors`. A slab that is
    the input in place begins with its element `slab_place`.
    """
    simd.keep_apart()
    lanes, columns = simd.lanes(panel), simd.columns(panel)
    largest = find_pieces(p, table, pixel, end, first_row, first_column, panel)
    inside = channels  # so many channels whose vectors end inside the input: in place, the last may be the end of it
    after = largest + slab_place + (channels - 1) * p[X_C] + 2 * columns - p[EXTENT]
    if p[IN_PLACE] and after > 0:
        inside = max(0, channels - (after + p[X_C] - 1) // p[X_C]) if p[X_C] > 0 else 0
    if simd.packs(panel) and inside == channels and vectors * lanes == columns:
        pieces = 0  # of a vector, at most
        for vector in range(vectors):
            pieces = max(pieces, table[vector * simd.piece_table_stride(panel)])
        if pieces == 1 and once:
            return simd.READ
        if pieces <= simd.MOST_PIECES:
            return simd.PACK
    taps, tap_offset = last_tap - first_tap, simd.offset(simd.at(p, p[TAP_OFFSET]), first_tap)
    if inside > 0:
        simd.pack_panel(panel, slab, inside, p[CHANNEL_PITCH], taps, tap_offset, table, p[AHEAD])
    if inside < channels:
        _pack_exactly(
            p, simd.offset(panel, inside * taps * columns), simd.offset(slab, inside * p[CHANNEL_PITCH]), table,
            channels - inside, first_tap, last_tap, end - pixel,
        )  # fmt: skip
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Weights into panels of rows
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _pack_run(target, rows, source, row_step, length, left, begin, end):
    """target[k][row] = source[row * row_step + k] for k < length.

    `left` is how many rows of the target are still to be written, these included: a block of whole vectors may write
    beyond its own, where later ones follow. Memory outside begin .. end is not read.
    """
    simd.keep_apart()
    lanes = simd.lanes(target)
    for k in range(0, length, lanes):
        low = simd.offset(source, k)
        high = simd.offset(low, (rows - 1) * row_step + lanes)
        inside = simd.address_of(low) >= simd.address_of(begin) and simd.address_of(high) <= simd.address_of(end)
        if inside and row_step >= 0 and (left - k - lanes) * rows >= lanes:
            first = (rows - 1) // lanes * lanes
            while first >= 0:  # the last columns first: what they write too much is at the beginning of the next row
                part, place = simd.offset(low, first * row_step), simd.offset(target, k * rows + first)
                simd.transpose(place, rows, part, row_step, rows - first, simd.AHEAD * lanes)
                first -= lanes
        else:
            for j in range(k, min(k + lanes, length)):
                for row in range(rows):
                    target[j * rows + row] = source[row * row_step + j]


@_jit
def _find_window(offsets, length, lanes):
    """How many of the first `length` offsets lie within a vector of one another, and the lowest of these."""
    lowest = highest = offsets[0]
    count = 1
    while count < length:
        lower, higher = min(lowest, offsets[count]), max(highest, offsets[count])
        if higher - lower >= lanes:
            break
        lowest, highest = lower, higher
        count += 1
    return count, lowest


# A transposed block costs as much as copying so many of its columns element by element.
_TRANSPOSED_COLUMNS = 6


@_jit
def _pack_taps(target, rows, source, row_step, offsets, length, count, lowest, left, begin, end, block, ahead):
    """target[k][row] = source[row * row_step + offsets[k]] for k < length; the rest as for `_pack_run`.

    Taps that lie within a vector of one another are taken from one transposed block, for which there is room at
    `block`: `count` and `lowest` are those of the first.
    """
    simd.keep_apart()
    lanes = simd.lanes(target)
    k = 0
    while True:
        low = simd.offset(source, lowest)
        high = simd.offset(low, (rows - 1) * row_step + lanes)
        inside = simd.address_of(low) >= simd.address_of(begin) and simd.address_of(high) <= simd.address_of(end)
        if count >= _TRANSPOSED_COLUMNS and inside and row_step >= 0 and (left - k - count) * rows >= lanes:
            first = (rows - 1) // lanes * lanes
            while first >= 0:
                simd.transpose(block, lanes, simd.offset(low, first * row_step), row_step, rows - first, ahead)
                for j in range(k, k + count):
                    column = simd.offset(block, (offsets[j] - lowest) * lanes)
                    simd.copy_vector(simd.offset(target, j * rows + first), column)
                first -= lanes
        else:
            for j in range(k, k + count):
                place, element = simd.offset(target, j * rows), simd.offset(source, offsets[j])
                for row in range(rows):
                    place[row] = element[0]
                    element = simd.offset(element, row_step)
        k += count
        if k >= length:
            break
        count, lowest = _find_window(simd.offset(offsets, k), length - k, lanes)


_RUNS_AT_ONCE = 8  # the bounds of a panel are found once for so many: half the time of one by one


@_jit
def _pack_rows(p, packed, group, first_panel, last_panel, first_channel, channels, first_tap, last_tap, block, like):
    """Panels of a group's weights for one block of the reduction: [panel][(channel, tap)][row].

    `p` are the parameters of packing, `block` is room for lanes x lanes elements. Memory before and after the array of
    weights is not read.
    """
    simd.keep_apart()
    begin, end, offsets = simd.at(like, p[FROM_BEGIN]), simd.at(like, p[FROM_END]), simd.at(p, p[OFFSETS])
    lanes, row_step = simd.lanes(like), p[ROW_STEP]
    depth = channels * (last_tap - first_tap)
    first_o, last_o = first_panel * p[P_ROWS] // p[P_PANELS], last_panel * p[P_ROWS] // p[P_PANELS]
    w = simd.offset(simd.at(like, p[FROM]), group * p[GROUP_STEP] + first_channel * p[CHANNEL_STEP])
    # a run: the taps of a channel, or of all where these follow one another in memory too
    runs = 1 if p[RUN_CHANNELS] else channels
    length = depth // runs
    done = 0  # runs
    if row_step == 1 and length == 1:  # rows follow one another: some runs at once, for each panel
        while done < runs:
            source = simd.offset(w, done * p[CHANNEL_STEP] + offsets[first_tap])
            some = min(_RUNS_AT_ONCE, runs - done)
            # the last vector of a row may write into the next one, never into the panel that follows
            fits = (depth - done - some) * (p[P_ROWS] // p[P_PANELS]) >= lanes
            after = simd.offset(source, max((some - 1) * p[CHANNEL_STEP], 0) + last_o + lanes)
            if not fits or simd.address_of(after) > simd.address_of(end):
                break
            for i in range(first_panel, last_panel):
                o = i * p[P_ROWS] // p[P_PANELS]
                rows = (i + 1) * p[P_ROWS] // p[P_PANELS] - o
                target = simd.offset(packed, (o - first_o) * depth + done * rows)
                for run in range(some):
                    for first in range(0, rows, lanes):
                        simd.copy_vector(
                            simd.offset(target, run * rows + first),
                            simd.offset(source, run * p[CHANNEL_STEP] + o + first),
                        )
            done += some
    count, lowest = _find_window(simd.offset(offsets, first_tap), last_tap - first_tap, lanes)
    for i in range(first_panel, last_panel):
        o = i * p[P_ROWS] // p[P_PANELS]
        rows = (i + 1) * p[P_ROWS] // p[P_PANELS] - o
        panel = simd.offset(packed, (o - first_o) * depth)
        for run in range(done, runs):
            target = simd.offset(panel, run * length * rows)
            source = simd.offset(w, run * p[CHANNEL_STEP] + o * row_step)
            left = (runs - run) * length
            if p[CONSECUTIVE] and (p[RUN_CHANNELS] or length >= lanes):
                _pack_run(target, rows, simd.offset(source, offsets[first_tap]), row_step, length, left, begin, end)
            else:
                _pack_taps(
                    target, rows, source, row_step, simd.offset(offsets, first_tap), length, count, lowest, left,
                    begin, end, block, 2 * p[CHANNEL_STEP],
                )  # fmt: skip
    if p[CHECK_FINITE]:
        _check_finite(p, packed, (last_o - first_o) * depth)


@_jit
def _check_finite(p, packed, size):
    """Note in the parameters of packing if one of `size` packed weights is not finite."""
    simd.keep_apart()
    lanes = simd.lanes(packed)
    not_finite = simd.count_not_finite(packed, size // lanes) if size >= lanes else 0
    for k in range(size // lanes * lanes, size):
        if packed[k] * 0 != 0:
            not_finite = 1
    if not_finite:
        simd.fetch_add(simd.offset(p, NOT_FINITE), 1)


@tasks.Body
def _pack_weights(task, worker, p, real):
    """Task = some panels of output channels of one group: [block of the reduction][panel][r][rows].

    Or, with task < 0, what OWN says: some panels and one block of the reduction, for a task of `_correlate`.
    """
    if task < 0:
        _pack_rows(
            simd.at(p, p[OWN_PACKING]), simd.at(real, p[OWN_TO]), p[OWN_GROUP], p[OWN_FIRST_PANEL], p[OWN_LAST_PANEL],
            p[OWN_CHANNEL], p[OWN_CHANNELS], p[OWN_FIRST_TAP], p[OWN_LAST_TAP], simd.at(real, p[OWN_BLOCK]), real,
        )  # fmt: skip
        return
    part, group = task % p[P_TASKS], task // p[P_TASKS]
    first_panel, last_panel = part * p[P_PANELS] // p[P_TASKS], (part + 1) * p[P_PANELS] // p[P_TASKS]
    o = first_panel * p[P_ROWS] // p[P_PANELS]
    packed = simd.offset(simd.at(real, p[TO]), group * p[P_ROWS] * p[P_CHANNELS] * p[P_TAPS])
    block = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    reduced = 0
    for c in range(0, p[P_CHANNELS], p[P_BLOCK_CHANNELS]):
        channels = min(p[P_BLOCK_CHANNELS], p[P_CHANNELS] - c)
        for tap in range(0, p[P_TAPS], p[P_BLOCK_TAPS]):
            last_tap = min(tap + p[P_BLOCK_TAPS], p[P_TAPS])
            depth = channels * (last_tap - tap)
            panel = simd.offset(packed, p[P_ROWS] * reduced + o * depth)
            _pack_rows(p, panel, group, first_panel, last_panel, c, channels, tap, last_tap, block, real)
            reduced += depth


@_jit
def _find_targets(p, targets, c, group, o, rows):
    """Where each tap of channel c is to be written, for the panel of `rows` rows from o on: see TARGET_FIELDS."""
    taps, phases = simd.at(p, p[TAP_TABLE]), simd.at(p, p[PHASE_TABLE])
    for t in range(p[P_TAPS]):
        tap, target = simd.offset(taps, t * TAP_FIELDS), simd.offset(targets, t * TARGET_FIELDS)
        size = tap[TAP_COUNT] * rows  # of a channel
        target[UNTIL_BLOCK] -= 1
        target[TARGET] += size
        target[TARGET_LEFT] -= size
        if c == 0 or target[UNTIL_BLOCK] == 0:
            phase = simd.offset(phases, tap[TAP_PHASE] * PHASE_FIELDS)
            channels = min(phase[PHASE_BLOCK], p[P_CHANNELS] - c)
            block = (group * p[P_CHANNELS] + c) * p[P_ROWS] * phase[PHASE_TAPS]
            panel = channels * (tap[TAP_FIRST] * p[P_ROWS] + o * tap[TAP_COUNT])
            target[UNTIL_BLOCK] = channels
            target[TARGET] = phase[PHASE_TO] + block + panel + tap[TAP_ROW] * rows
            target[TARGET_LEFT] = channels * size - tap[TAP_ROW] * rows


@tasks.Body
def _pack_phases(task, worker, p, real):
    """Task = some panels of rows of one group, for several phases, each packed as by `_pack_weights`.

    A phase has some of the taps of the filter. The taps of all are taken from memory together, in an order in which the
    places of each phase ascend, where there is one.
    """
    lanes = simd.lanes(real)
    block = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    targets = simd.at(p, p[tasks.SCRATCH] + (worker + 1) * p[tasks.SCRATCH_BYTES] - p[TARGET_BYTES])
    phases, taps, windows = simd.at(p, p[PHASE_TABLE]), simd.at(p, p[TAP_TABLE]), simd.at(p, p[WINDOW_TABLE])
    begin, end, packed = simd.at(real, p[FROM_BEGIN]), simd.at(real, p[FROM_END]), simd.at(real, p[TO])
    row_step, all_rows = p[ROW_STEP], p[P_ROWS]

    part, group = task % p[P_TASKS], task // p[P_TASKS]
    w = simd.offset(simd.at(real, p[FROM]), group * p[GROUP_STEP])
    first_panel, last_panel = part * p[P_PANELS] // p[P_TASKS], (part + 1) * p[P_PANELS] // p[P_TASKS]
    for panel in range(first_panel, last_panel):
        o = panel * all_rows // p[P_PANELS]
        rows = (panel + 1) * all_rows // p[P_PANELS] - o
        for c in range(p[P_CHANNELS]):
            _find_targets(p, targets, c, group, o, rows)
            source = simd.offset(w, c * p[CHANNEL_STEP] + o * row_step)
            for v in range(p[WINDOWS]):
                window = simd.offset(windows, v * WINDOW_FIELDS)
                low = simd.offset(source, window[LOWEST])
                high = simd.offset(low, (rows - 1) * row_step + lanes)
                transposed = (
                    simd.address_of(low) >= simd.address_of(begin)
                    and simd.address_of(high) <= simd.address_of(end)
                    and row_step > 1
                    and window[LAST_TAP] - window[FIRST_TAP] >= _TRANSPOSED_COLUMNS
                )
                first = (rows - 1) // lanes * lanes
                while first >= 0:
                    if transposed:
                        simd.transpose(
                            block, lanes, simd.offset(low, first * row_step), row_step, rows - first,
                            2 * p[CHANNEL_STEP],
                        )  # fmt: skip
                    for t in range(window[FIRST_TAP], window[LAST_TAP]):
                        tap, its = simd.offset(taps, t * TAP_FIELDS), simd.offset(targets, t * TARGET_FIELDS)
                        target = simd.offset(packed, its[TARGET] + first)
                        if transposed:
                            column = simd.offset(block, (tap[FROM_TAP] - window[LOWEST]) * lanes)
                            if p[ASCENDING] and its[TARGET_LEFT] >= rows + lanes:
                                simd.copy_vector(target, column)  # what is too much, others write over
                            else:
                                simd.copy_span(target, column, min(lanes, rows - first))
                        elif row_step == 1:
                            simd.copy_span(target, simd.offset(source, tap[FROM_TAP] + first), min(lanes, rows - first))
                        else:
                            element = simd.offset(source, tap[FROM_TAP] + first * row_step)
                            for k in range(min(lanes, rows - first)):
                                target[k] = element[0]
                                element = simd.offset(element, row_step)
                    first -= lanes
        if p[CHECK_FINITE]:
            for f in range(p[PHASES]):
                phase = simd.offset(phases, f * PHASE_FIELDS)
                for c in range(0, p[P_CHANNELS], phase[PHASE_BLOCK]):
                    channels = min(phase[PHASE_BLOCK], p[P_CHANNELS] - c)
                    for tap in range(0, phase[PHASE_TAPS], phase[PHASE_BLOCK_TAPS]):
                        count = min(phase[PHASE_BLOCK_TAPS], phase[PHASE_TAPS] - tap)
                        place = (group * p[P_CHANNELS] + c) * all_rows * phase[PHASE_TAPS]
                        place += phase[PHASE_TO] + channels * (tap * all_rows + o * count)
                        _check_finite(p, simd.offset(packed, place), rows * channels * count)


# ---------------------------------------------------------------------------------------------------------------------
# From the accumulators into the output
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def find_runs(p, runs, pixel, end):
    """List where in a channel of the output the pixels pixel .. end are: number of runs; place and length of each."""
    simd.keep_apart()
    out_d, out_h, out_w = p[OUT_D], p[OUT_H], p[OUT_W]
    row_length = p[PLANE] if p[PLANE] else out_w  # a plane whose pixels are consecutive is one row
    count = 0
    while pixel < end:
        row = pixel // row_length
        place = pixel - row * row_length
        length = min(end - pixel, row_length - place)
        if p[PLANE]:
            place += row * p[Y_N]
        else:
            n, d, h = row // out_h // out_d, row // out_h % out_d, row % out_h
            place = n * p[Y_N] + d * p[Y_D] + h * p[Y_H] + place * p[Y_W]
        runs[2 * count + 1] = place
        runs[2 * count + 2] = length
        count += 1
        pixel += length
    runs[0] = count


@_jit
def load_tile(p, y, tile, runs, rows):
    """Copy the pixels of the runs of `rows` output channels, of any strides, into the tile [row][column]."""
    simd.keep_apart()
    lanes, columns, step, channel_step = simd.lanes(tile), simd.columns(tile), p[Y_W], p[Y_O]
    j = 0
    for run in range(runs[0]):
        source, length = simd.offset(y, runs[2 * run + 1]), runs[2 * run + 2]
        if channel_step == 1 and step > 1:
            for i in range(0, rows, lanes):
                for k in range(0, length, lanes):
                    simd.transpose_block(
                        simd.offset(tile, i * columns + j + k), columns, simd.offset(source, k * step + i), step,
                        min(lanes, length - k), min(lanes, rows - i),
                    )  # fmt: skip
        elif step == 1:
            simd.copy_block(simd.offset(tile, j), columns, source, channel_step, rows, length)
        elif step == 2:
            simd.copy_every_second(simd.offset(tile, j), columns, source, channel_step, rows, length)
        else:
            for i in range(rows):
                for k in range(length):
                    tile[i * columns + j + k] = source[i * channel_step + k * step]
        j += length


@_jit
def store_tile(p, y, tile, runs, rows):
    """The reverse of `load_tile`."""
    simd.keep_apart()
    lanes, columns, step, channel_step = simd.lanes(tile), simd.columns(tile), p[Y_W], p[Y_O]
    j = 0
    for run in range(runs[0]):
        target, length = simd.offset(y, runs[2 * run + 1]), runs[2 * run + 2]
        if channel_step == 1 and step > 1:
            for i in range(0, rows, lanes):
                for k in range(0, length, lanes):
                    simd.transpose_block(
                        simd.offset(target, k * step + i), step, simd.offset(tile, i * columns + j + k), columns,
                        min(lanes, rows - i), min(lanes, length - k),
                    )  # fmt: skip
        elif step == 1:
            simd.copy_block(target, channel_step, simd.offset(tile, j), columns, rows, length)
        elif step == 2:
            simd.spread_every_second(target, channel_step, simd.offset(tile, j), columns, rows, length)
        else:
            for i in range(rows):
                for k in range(length):
                    target[i * channel_step + k * step] = tile[i * columns + j + k]
        j += length


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def _contract_few(rows, count, depth, a, panel, tile, flags, bias, sums):
    """`simd.contract` of the first `count` columns, `few` of the tile at most, into as many columns of `tile`.

    `sums` is room for those of `simd.contract_few`.
    """
    simd.keep_apart()
    simd.contract_few(rows, depth, a, panel, sums)
    for i in range(rows):
        row = simd.offset(tile, i * simd.columns(tile))
        for j in range(count):
            value = sums[j * simd.few_pitch(tile) + i]
            row[j] = value + row[j] if flags & simd.ADD else value
            if flags & simd.BIAS:
                row[j] += bias[i]
            if flags & simd.RELU and row[j] < 0:
                row[j] = 0


@_jit
def pack_own(
    p, worker, own, weights, group, block, first_panel, last_panel, channel, channels, first_tap, last_tap
):  # fmt: skip
    """Have a task pack its weights itself (see `_pack_rows`); `own` is room for OWN_FIELDS integers."""
    simd.keep_apart()
    own[OWN_PACKING], own[OWN_TO], own[OWN_GROUP] = p[PACKING], simd.address_of(weights), group
    own[OWN_FIRST_PANEL], own[OWN_LAST_PANEL], own[OWN_BLOCK] = first_panel, last_panel, simd.address_of(block)
    own[OWN_CHANNEL], own[OWN_CHANNELS], own[OWN_FIRST_TAP], own[OWN_LAST_TAP] = channel, channels, first_tap, last_tap
    tasks.call(p[PACKING_BODY], np.int64(-1), worker, simd.address_of(own))


@tasks.Body
def _correlate(task, worker, p, real):
    scratch = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    panels = simd.offset(scratch, p[SLAB_SIZE])
    own_weights = simd.offset(panels, p[PANEL_SIZE])
    tile = simd.offset(own_weights, p[WEIGHT_SIZE])
    few_sums = simd.offset(tile, simd.tile_rows(real) * simd.columns(real))
    table = simd.at(p, p[tasks.SCRATCH] + (worker + 1) * p[tasks.SCRATCH_BYTES] - p[TABLE_BYTES])
    kernels = simd.at(p, p[KERNELS])
    columns = simd.columns(real)
    out_w = p[OUT_W]

    # what this task computes: channels first_panel .. last_panel of a group, pixels first .. last
    part, rest = task % p[ROW_TASKS], task // p[ROW_TASKS]
    block, group = rest % p[PIXEL_TASKS], rest // p[PIXEL_TASKS]
    first_panel, last_panel = part * p[PANELS] // p[ROW_TASKS], (part + 1) * p[PANELS] // p[ROW_TASKS]
    if p[CHUNKS]:  # long rows: a piece of one row
        row, chunk = block // p[CHUNKS], block % p[CHUNKS]
        first = row * out_w + chunk * p[CHUNK]
        last = min(first + p[CHUNK], (row + 1) * out_w)
        first_column = chunk * p[CHUNK]
    else:
        all_panels = (p[PIXELS] + columns - 1) // columns
        first = block * all_panels // p[PIXEL_TASKS] * columns
        last = min((block + 1) * all_panels // p[PIXEL_TASKS] * columns, p[PIXELS])
        first_column = 0
    first_row, last_row = first // out_w, (last - 1) // out_w + 1

    x = simd.offset(simd.at(real, p[X]), group * p[X_GROUP])
    y = simd.offset(simd.at(real, p[Y]), group * p[Y_GROUP])
    w = simd.offset(simd.at(real, p[W]), group * p[ROW_CHANNELS] * p[CHANNELS] * p[TAPS])
    bias = simd.at(real, p[BIAS])
    task_o = first_panel * p[ROW_CHANNELS] // p[PANELS]
    slab, runs, rows_table = scratch, simd.offset(table, p[RUN_TABLE]), simd.offset(table, p[ROW_TABLE])
    own = simd.offset(rows_table, -OWN_FIELDS)
    # is a panel used by one product alone? In place the product that packs is faster, since it fetches ahead
    once = last_panel - first_panel == 1 and not p[IN_PLACE]
    listed = 0 if p[IN_PLACE] else find_rows(p, rows_table, first_row, last_row)
    if p[PADDED]:
        simd.fill_zero(slab, p[SLAB_SIZE])

    reduced = 0  # how much of the reduction has been done
    for c in range(0, p[CHANNELS], p[BLOCK_CHANNELS]):
        channels = min(p[BLOCK_CHANNELS], p[CHANNELS] - c)
        if p[IN_PLACE]:
            slab = simd.offset(x, c * p[X_C])
        else:
            tasks.ask(p[FILL], (
                p, slab, simd.offset(x, c * p[X_C]), channels, rows_table, listed, first_column * p[STRIDE_W], table,
            ))  # fmt: skip
        for tap in range(0, p[TAPS], p[BLOCK_TAPS]):
            last_tap = min(tap + p[BLOCK_TAPS], p[TAPS])
            depth = channels * (last_tap - tap)
            offsets = simd.offset(simd.at(p, p[DEPTH_OFFSET]), tap)
            flags = simd.ADD if reduced > 0 or p[ADD] else 0
            if reduced + depth == p[CHANNELS] * p[TAPS]:
                flags |= (simd.BIAS if p[BIAS] else 0) | (simd.RELU if p[RELU] else 0)
            for start in range(first, last, p[GROUP] * columns):
                stop = min(start + p[GROUP] * columns, last)
                for panel_block in range(first_panel, last_panel, p[WEIGHT_PANELS]):
                    panel_end = min(panel_block + p[WEIGHT_PANELS], last_panel)
                    first_o = panel_block * p[ROW_CHANNELS] // p[PANELS]
                    weights = simd.offset(w, p[ROW_CHANNELS] * reduced + first_o * depth)
                    if p[PACKING]:
                        weights = simd.offset(own_weights, (first_o - task_o) * depth if p[WEIGHTS_STAY] else 0)
                    if p[PACKING] and (start == first or not p[WEIGHTS_STAY]):
                        pack_own(
                            p, worker, own, weights, group, tile, panel_block, panel_end, c, channels, tap, last_tap
                        )
                    for i in range(panel_block, panel_end):
                        o = i * p[ROW_CHANNELS] // p[PANELS]
                        rows = (i + 1) * p[ROW_CHANNELS] // p[PANELS] - o
                        a = simd.offset(weights, (o - first_o) * depth)
                        channel_bias = simd.offset(bias, group * p[ROW_CHANNELS] + o)
                        for pixel in range(start, stop, columns):
                            end = min(pixel + columns, stop)
                            panel = simd.offset(panels, (pixel - start) * depth)
                            lanes = simd.lanes(real)
                            vectors, rest = (end - pixel) // lanes, (end - pixel) % lanes
                            if rest > simd.few(real):
                                vectors, rest = vectors + 1, 0
                            how = flags
                            if i == first_panel:
                                how |= _take_panel(
                                    p, panel, slab, table, group * p[X_GROUP] + c * p[X_C], channels, tap, last_tap,
                                    pixel, end, vectors, once, first_row, first_column,
                                )  # fmt: skip
                            plane = p[PLANE]  # pixels of an output plane, 0 where they are not consecutive
                            n = pixel // plane if plane else 0
                            whole = plane and end - pixel == columns and end <= (n + 1) * plane
                            if not whole:
                                find_runs(p, runs, pixel, end)
                            place, pitch = simd.offset(y, o * p[Y_O]), p[Y_O]
                            if whole:
                                place = simd.offset(place, n * p[Y_N] + pixel - n * plane)
                            elif flags & simd.ADD:
                                load_tile(p, place, tile, runs, rows)
                            target = place
                            if not whole:
                                target, pitch = tile, columns
                            if vectors > 0:
                                simd.contract_packing(
                                    kernels, rows, vectors, depth, a, panel, target, how, pitch, channel_bias, slab,
                                    offsets, table, p[AHEAD],
                                )  # fmt: skip
                            if rest > 0:
                                done = vectors * lanes
                                _contract_few(
                                    rows, rest, depth, a, simd.offset(panel, done), simd.offset(tile, done), flags,
                                    channel_bias, few_sums,
                                )  # fmt: skip
                            if not whole:
                                store_tile(p, place, tile, runs, rows)
            reduced += depth


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient
# ---------------------------------------------------------------------------------------------------------------------


@_jit
def row_place(p, row):
    """Where in a channel of the output a row (batch, depth, height) begins."""
    return row // p[OUT_H] // p[OUT_D] * p[Y_N] + row // p[OUT_H] % p[OUT_D] * p[Y_D] + row % p[OUT_H] * p[Y_H]


@_jit
def _pack_gradient(p, panel, dy, channels, width, first_row, last_row, first_column, length):
    """panel[row][k][j] = dy[channel j] at output pixel (row, first_column + k); for j >= channels any number."""
    simd.keep_apart()
    lanes, image = simd.lanes(panel), p[OUT_D] * p[OUT_H]
    step, channel_step = p[Y_W], p[Y_O]
    row = first_row
    while row < last_row:
        source = simd.offset(dy, row_place(p, row) + first_column * step)
        rows = 1
        if p[PLANE] and not p[CHUNKS]:  # the rows of an image lie one after the other
            rows = min(last_row, (row // image + 1) * image) - row
        count = rows * length
        for j in range(0, width, lanes):
            part = simd.offset(source, j * channel_step)
            if step == 1 and count >= lanes and j < channels:
                for k in range(0, count - lanes + 1, lanes):
                    simd.transpose(
                        simd.offset(panel, k * width + j), width, simd.offset(part, k), channel_step, channels - j,
                        simd.AHEAD * lanes,
                    )
                if count % lanes:  # the last block overlaps the one before
                    k = count - lanes
                    simd.transpose(
                        simd.offset(panel, k * width + j), width, simd.offset(part, k), channel_step, channels - j,
                        simd.AHEAD * lanes,
                    )
            elif channel_step == 1 and j + lanes <= channels:
                for k in range(count):
                    simd.copy_vector(simd.offset(panel, k * width + j), simd.offset(part, k * step))
            elif channel_step == 1 and j < channels:
                simd.copy_block(simd.offset(panel, j), width, part, step, count, channels - j)
            else:
                for i in range(lanes):
                    for k in range(count):
                        if j + i < channels:
                            panel[k * width + j + i] = part[i * channel_step + k * step]
                        else:
                            panel[k * width + j + i] = 0
        panel = simd.offset(panel, count * width)
        row += rows


@_jit
def store_gradient(p, tile, group, first_channel, rows, first_vector, last_vector, dw):
    """Add the tile [vector panel][row][column] into dw, or put it there: dw[o, c, tap] = tile[row (c, tap)][o]."""
    simd.keep_apart()
    lanes = simd.lanes(tile)
    tap_offset = simd.at(p, p[W_TAP_OFFSET])
    panel = first_vector * p[VECTOR_PANELS] // p[VECTORS]
    while panel * p[VECTORS] // p[VECTOR_PANELS] < first_vector:
        panel += 1
    start = first_vector
    while start < last_vector:
        stop = (panel + 1) * p[VECTORS] // p[VECTOR_PANELS]
        width = (stop - start) * lanes
        source = simd.offset(tile, (start - first_vector) * lanes * rows)
        first_o, last_o = start * lanes, min(stop * lanes, p[ROW_CHANNELS])
        if p[W_O] == 1 and not p[ADD]:  # output channels are neighbours in dw
            for row in range(rows):
                place = (first_channel + row // p[TAPS]) * p[W_C] + tap_offset[row % p[TAPS]]
                target = simd.offset(dw, group * p[W_GROUP] + first_o + place)
                simd.copy_span(target, simd.offset(source, row * width), last_o - first_o)
            first_o = last_o
        for o in range(first_o, last_o, lanes):
            count = min(lanes, p[ROW_CHANNELS] - o)
            target = simd.offset(dw, group * p[W_GROUP] + o * p[W_O])
            from_o = simd.offset(source, o - start * lanes)
            i = 0
            if p[W_FLAT] and count == lanes:  # the rows (c, tap) follow one another in dw too
                begin = simd.offset(target, first_channel * p[W_C])
                while i + lanes <= rows:
                    place = simd.offset(begin, i)
                    if p[ADD]:
                        simd.transpose_add(place, p[W_O], simd.offset(from_o, i * width), width, lanes, 0)
                    else:
                        simd.transpose(place, p[W_O], simd.offset(from_o, i * width), width, lanes, 0)
                    i += lanes
            for row in range(i, rows):
                place = (first_channel + row // p[TAPS]) * p[W_C] + tap_offset[row % p[TAPS]]
                for j in range(count):
                    if p[ADD]:
                        target[place + j * p[W_O]] += from_o[row * width + j]
                    else:
                        target[place + j * p[W_O]] = from_o[row * width + j]
        start = stop
        panel += 1


@tasks.Body
def _weight_gradient(task, worker, p, real):
    """Task = a block of input channels, a block of output channels, and a part of the pixels, in one group."""
    slab = simd.at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    panels = simd.offset(slab, p[SLAB_SIZE])
    tile = simd.offset(panels, p[PANEL_SIZE])
    run_offset = simd.at(p, p[tasks.SCRATCH] + (worker + 1) * p[tasks.SCRATCH_BYTES] - p[TABLE_BYTES])
    rows_table = simd.offset(run_offset, p[ROW_TABLE])
    row_offset = simd.at(p, p[ROW_OFFSET])
    lanes = simd.lanes(real)
    out_h, out_w = p[OUT_H], p[OUT_W]

    split, rest = task % p[SPLITS], task // p[SPLITS]
    out_block, rest = rest % p[OUT_BLOCKS], rest // p[OUT_BLOCKS]
    block, group = rest % p[CHANNEL_BLOCKS], rest // p[CHANNEL_BLOCKS]
    first_channel = block * p[CHANNELS] // p[CHANNEL_BLOCKS]
    channels = (block + 1) * p[CHANNELS] // p[CHANNEL_BLOCKS] - first_channel
    first_panel = out_block * p[VECTOR_PANELS] // p[OUT_BLOCKS]
    last_panel = (out_block + 1) * p[VECTOR_PANELS] // p[OUT_BLOCKS]
    first_vector = first_panel * p[VECTORS] // p[VECTOR_PANELS]
    last_vector = last_panel * p[VECTORS] // p[VECTOR_PANELS]
    rows = channels * p[TAPS]
    # The rows (channel, tap) are multiplied some at a time: those that follow one another, or neighbouring channels of
    # one tap
    by_tap = p[BY_TAP]
    parts, of_part = (p[TAPS], channels) if by_tap else (np.int64(1), rows)
    row_panels = (of_part + simd.gradient_rows(real) - 1) // simd.gradient_rows(real)
    x = simd.offset(simd.at(real, p[X]), (group * p[CHANNELS] + first_channel) * p[X_C])
    dy = simd.offset(simd.at(real, p[Y]), group * p[ROW_CHANNELS] * p[Y_O])
    source = x if p[IN_PLACE] else slab
    simd.fill_zero(tile, rows * (last_vector - first_vector) * lanes)

    first_unit = split * p[UNITS] // p[SPLITS]
    for unit in range(first_unit, (split + 1) * p[UNITS] // p[SPLITS]):
        # a unit is some whole rows of output pixels, or a piece of one long row
        if p[CHUNKS]:
            first_row = unit // p[CHUNKS]
            last_row = first_row + 1
            first_column = unit % p[CHUNKS] * p[CHUNK]
            length = min(p[CHUNK], out_w - first_column)
        else:
            first_row = unit * p[UNIT_ROWS]
            last_row = min(first_row + p[UNIT_ROWS], p[PIXELS] // out_w)
            first_column = 0
            length = out_w
        if not p[IN_PLACE]:
            listed, zeros = _find_rows_and_zeros(p, rows_table, first_row, last_row)
            if p[PADDED] and (unit == first_unit or zeros or p[CHUNKS]):  # else its zeros are where they were
                simd.fill_zero(slab, p[SLAB_SIZE])
            tasks.ask(
                p[FILL], (p, slab, x, channels, rows_table, listed, first_column * p[STRIDE_W], run_offset)
            )
        for row in range(first_row, last_row):
            if p[IN_PLACE]:
                run_offset[row - first_row] = row * p[X_N] + first_column * p[PIXEL_STEP]
            else:
                segment = row // out_h - first_row // out_h
                h = row % out_h - (first_row % out_h if segment == 0 else 0)
                run_offset[row - first_row] = (segment * p[KERNEL_D] * p[SEGMENT_ROWS] + h * p[STRIDE_H]) * p[ROW_PITCH]
        for panel in range(first_panel, last_panel):
            start = panel * p[VECTORS] // p[VECTOR_PANELS]
            vectors = (panel + 1) * p[VECTORS] // p[VECTOR_PANELS] - start
            width = vectors * lanes
            packed = panels
            if p[Y_PACKED]:
                packed = simd.offset(dy, row_place(p, first_row) + first_column * width)
            else:
                _pack_gradient(
                    p, panels, simd.offset(dy, start * lanes * p[Y_O]), min(width, p[ROW_CHANNELS] - start * lanes),
                    width, first_row, last_row, first_column, length,
                )  # fmt: skip
            part = simd.offset(tile, (start - first_vector) * lanes * rows)
            # While these are multiplied, what is packed next is asked for, a vector of channels with each block of
            # rows: the next channels of these pixels, or the first channels of the pixels after them.
            ahead, line_step, block_step = panels, np.int64(0), np.int64(0)
            if p[AHEAD]:
                line_step, block_step = p[Y_O] if p[Y_W] == 1 else p[Y_W], lanes * p[Y_W]
                if panel < last_panel - 1:
                    place = row_place(p, first_row) + first_column * p[Y_W] + (start + vectors) * lanes * p[Y_O]
                elif first_column + length < out_w:
                    place = row_place(p, first_row) + (first_column + length) * p[Y_W] + first_vector * lanes * p[Y_O]
                else:
                    place = row_place(p, last_row) + first_vector * lanes * p[Y_O]
                ahead = simd.offset(dy, place)
            for i in range(parts * row_panels):
                number, row = i // row_panels, i % row_panels * of_part // row_panels
                place = (row * p[TAPS] + number) * width if by_tap else row * width
                simd.accumulate_outer(
                    (i % row_panels + 1) * of_part // row_panels - row, vectors, last_row - first_row, run_offset,
                    length, p[PIXEL_STEP], source, simd.offset(row_offset, number * by_tap + row), packed,
                    simd.offset(part, place), p[TAPS] * width if by_tap else width, ahead, line_step, block_step,
                )  # fmt: skip
                if i + 1 < vectors and p[AHEAD]:
                    ahead = simd.offset(ahead, lanes * p[Y_O])
                else:  # a line that is in the cache, again and again
                    ahead, line_step, block_step = panels, np.int64(0), np.int64(0)
    if p[SPLITS] == 1:
        store_gradient(p, tile, group, first_channel, rows, first_vector, last_vector, simd.at(real, p[W]))
    else:
        target = simd.offset(simd.at(real, p[PARTIAL]), task * p[TILE_SIZE])
        for i in range(rows * (last_vector - first_vector) * lanes):
            target[i] = tile[i]


@tasks.Body
def sum_splits(task, worker, p, real):
    """Add up the parts of the pixels, in order, into the first; then store. Task = as above, but all parts."""
    out_block, rest = task % p[OUT_BLOCKS], task // p[OUT_BLOCKS]
    block, group = rest % p[CHANNEL_BLOCKS], rest // p[CHANNEL_BLOCKS]
    first_channel = block * p[CHANNELS] // p[CHANNEL_BLOCKS]
    rows = ((block + 1) * p[CHANNELS] // p[CHANNEL_BLOCKS] - first_channel) * p[TAPS]
    first_vector = out_block * p[VECTOR_PANELS] // p[OUT_BLOCKS] * p[VECTORS] // p[VECTOR_PANELS]
    last_vector = (out_block + 1) * p[VECTOR_PANELS] // p[OUT_BLOCKS] * p[VECTORS] // p[VECTOR_PANELS]
    tile = simd.offset(simd.at(real, p[PARTIAL]), task * p[SPLITS] * p[TILE_SIZE])
    size = rows * (last_vector - first_vector) * simd.lanes(real)
    for split in range(1, p[SPLITS]):
        part = simd.offset(tile, split * p[TILE_SIZE])
        for i in range(size):
            tile[i] += part[i]
    store_gradient(p, tile, group, first_channel, rows, first_vector, last_vector, simd.at(real, p[W]))


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------

Strides = tuple[int, ...]  # of N, C, D, H, W

_PIXELS_TO_FIT = 448  # output pixels whose input rows must fit the slab: enough to use each packed weight often
_PANELS_PER_TASK = 28
_LONG_ROW = 16  # panels in an output row from which a task is a piece of one row


@dataclass(frozen=True)
class Axis:
    """One dimension of a correlation: output position o and tap k read u = o * stride + k * dilation.

    `source` says which input coordinate stands at u (-1: a zero); from `before` on, `size` elements long, that is
    u - before.
    """

    out: int
    taps: int
    stride: int
    dilation: int
    source: np.ndarray
    before: int
    size: int

    @property
    def span(self) -> int:
        return (self.taps - 1) * self.dilation + 1

    def is_identity(self) -> bool:
        return self.taps == self.stride == 1 and self.before == 0 and self.out == self.size

    def reads_every_nth(self) -> bool:
        """Is this no more than every stride-th element of the input?"""
        return self.taps == 1 and self.before == 0 and (self.out - 1) * self.stride < self.size


@dataclass(frozen=True)
class Blocks:
    """How the reduction over (channel, tap) and the rows are cut; this alone decides how weights are packed."""

    groups: int
    rows: int  # output channels in a group
    channels: int  # input channels in a group
    taps: int
    block_channels: int
    block_taps: int
    panels: int  # panels of rows in a group

    @property
    def depth(self) -> int:
        return self.block_channels * self.block_taps

    @property
    def packed_size(self) -> int:
        return self.groups * self.rows * self.channels * self.taps


def fold_strides(axes: tuple[Axis, ...], x: Strides) -> tuple[tuple[Axis, ...], Strides]:
    """Where a kernel has one tap, its stride is a stride of the input: elements between are not even copied."""
    folded, steps = list(axes), list(x)
    for i, axis in enumerate(axes):
        if axis.stride > 1 and axis.reads_every_nth():
            folded[i] = Axis(axis.out, 1, 1, 1, np.arange(axis.out, dtype=np.int64), 0, axis.out)
            steps[2 + i] *= axis.stride
    return tuple(folded), tuple(steps)


def fold_batch(
    batch: int, axes: tuple[Axis, ...], x: Strides, y: Strides
) -> tuple[int, tuple[Axis, ...], Strides, Strides]:
    """Images of one pixel as the pixels of one row: read and written by transposes, not each as a row of its own."""
    if batch == 1 or any(axis.out > 1 or not axis.is_identity() for axis in axes):
        return batch, axes, x, y
    row = Axis(batch, 1, 1, 1, np.arange(batch, dtype=np.int64), 0, batch)
    return 1, (*axes[:2], row), (0, x[1], 0, 0, x[0]), (0, y[1], 0, 0, y[0])


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def make_blocks(
    dtype: np.dtype, groups: int, rows: int, channels: int, axes: tuple[Axis, ...], in_place: bool
) -> Blocks:
    """Cut the reduction so that a panel stays in L1 and the slab of a few hundred pixels in L2.

    It must depend on nothing but the shape of one sample: the cuts decide the bits of the result.
    """
    t = simd.tile(dtype.itemsize * 8)
    taps = math.prod(a.taps for a in axes)
    longest = max(8, PANEL_BYTES // (t.columns * dtype.itemsize))
    if taps <= longest:
        most = max(1, longest // taps)
        if not in_place:
            slab = slab_shape(axes, min(_PIXELS_TO_FIT, math.prod(a.out for a in axes)), 1, t.columns)
            most = min(most, max(1, SLAB_BYTES // (slab.channel * dtype.itemsize)))
        block_channels, block_taps = _ceil(channels, _ceil(channels, most)), taps
    else:
        block_channels, block_taps = 1, _ceil(taps, _ceil(taps, longest))
    panels = _ceil(rows, t.rows)
    if panels > 8:  # an even number, since two threads may share them
        panels = _ceil(panels, 2) * 2
    return Blocks(groups, rows, channels, taps, block_channels, block_taps, panels)


@dataclass(frozen=True)
class Slab:
    chunk: int  # 0, or the pixels of a piece of a long row
    segments: int
    segment_rows: int
    phase: int
    row: int
    row_length: int  # padded coordinates that a row holds
    channel: int
    table: int  # integers of `find_rows`


def slab_shape(axes: tuple[Axis, ...], pixels: int, images: int, columns: int) -> Slab:
    """The slab for any `pixels` consecutive output pixels of `images` images: its pitches, in elements."""
    depth, height, width = axes
    chunk = 0
    if width.out >= _LONG_ROW * columns:
        pieces = _ceil(width.out, _PANELS_PER_TASK * columns)
        chunk = _ceil(_ceil(width.out, pieces), columns) * columns
    rows = 1 if chunk else min(images * depth.out * height.out, (pixels + width.out - 2) // width.out + 1)
    segments = min(images * depth.out, (rows + height.out - 2) // height.out + 1)
    segment_rows = (min(height.out, rows) - 1) * height.stride + height.span
    length = ((chunk or width.out) - 1) * width.stride + width.span
    phase = _ceil(length, width.stride)
    row = phase * width.stride
    rows_of_channel = segments * depth.taps * segment_rows
    return Slab(chunk, segments, segment_rows, phase, row, length, rows_of_channel * row, 2 * rows_of_channel)


@dataclass(frozen=True)
class Plan:
    """Everything about one `_correlate` call, or one of another body of its parameters, but the addresses."""

    parameters: np.ndarray
    tables: tuple[np.ndarray, ...]  # whose addresses stand in the parameters
    tasks: int
    scratch: int
    flops: int
    packs: bool = False  # the tasks want `Unpacked` weights
    body: Body = _correlate


def is_flat(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Are the pixels (D, H, W) of a plane evenly spaced in memory?"""
    real = [(n, step) for n, step in zip(shape, strides, strict=True) if n > 1]
    return all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(real))


def _pixel_step(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How far apart neighbouring pixels are. Axes of one pixel, whose stride may be any, have no say; of a pixel: 1."""
    return next((step for n, step in zip(reversed(shape), reversed(strides), strict=True) if n > 1), 1)


def are_consecutive(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Are the pixels of a plane neighbours in memory?"""
    return _pixel_step(shape, strides) == 1 and is_flat(shape, strides)


def can_stay_in_place(axes: tuple[Axis, ...], x: Strides) -> bool:
    """Is this a matrix product on the image as it lies in memory: kernel and stride 1, no padding, flat planes?"""
    shape = tuple(a.out for a in axes)
    return all(a.is_identity() for a in axes) and are_consecutive(shape, x[2:]) and min(x) >= 0


def flatten(
    batch: int, axes: tuple[Axis, ...], x: Strides, y: Strides
) -> tuple[int, tuple[Axis, ...], Strides, Strides]:
    """A matrix product on the image as it lies (kernel and stride 1, no padding), with its pixels as one row.

    Those of all samples, or of each, whichever are evenly spaced in both arrays; if none are, what came.
    """
    if not all(a.is_identity() for a in axes):
        return batch, axes, x, y
    out = batch, *(a.out for a in axes)
    for samples, shape in ((1, out), (batch, out[1:])):
        steps = [(each[0], *each[2:])[-len(shape) :] for each in (x, y)]
        if all(is_flat(shape, each) for each in steps):
            size = math.prod(shape)
            from_, to = [_pixel_step(shape, each) for each in steps]
            one = Axis(1, 1, 1, 1, axes[0].source, 0, 1)
            row = Axis(size, 1, 1, 1, axes[0].source, 0, size)
            return samples, (one, one, row), (x[0], x[1], 0, 0, from_), (y[0], y[1], 0, 0, to)
    return batch, axes, x, y


def is_padded(axes: tuple[Axis, ...]) -> bool:
    """Does any window reach outside the input?"""
    return any(a.before > 0 or (a.out - 1) * a.stride + a.span > a.before + a.size for a in axes)


def tap_offsets(axes: tuple[Axis, ...], slab: Slab) -> np.ndarray:
    """Where in the slab each tap finds its element, relative to the first tap of the same pixel."""
    _, height, width = axes
    i, j, k = np.meshgrid(*(np.arange(a.taps, dtype=np.int64) for a in axes), indexing="ij")
    u = k * width.dilation
    return (
        (i * slab.segment_rows + j * height.dilation) * slab.row + u % width.stride * slab.phase + u // width.stride
    ).ravel()


def offsets_of_taps(axes: tuple[Axis, ...], steps: Sequence[int]) -> np.ndarray:
    """`tap_offsets` where taps that are neighbours in a dimension are as far apart as `steps` says."""
    i, j, k = np.meshgrid(*(np.arange(a.taps, dtype=np.int64) for a in axes), indexing="ij")
    return (i * steps[0] + j * steps[1] + k * steps[2]).ravel()


def set_common(
    parameters: np.ndarray, dtype: np.dtype, batch: int, axes: tuple[Axis, ...], slab: Slab, x: Strides, y: Strides,
    zeros: bool, in_place: bool,
) -> None:  # fmt: skip
    """The parameters that all passes share: strides, sizes, and where the slab has what."""
    depth, height, width = axes
    out = tuple(a.out for a in axes)
    parameters[X_N : X_W + 1] = x
    parameters[Y_N : Y_W + 1] = y
    parameters[[OUT_D, OUT_H, OUT_W, PIXELS]] = *out, batch * math.prod(out)
    parameters[[TAPS, KERNEL_D, SPAN_H, SPAN_W]] = math.prod(a.taps for a in axes), depth.taps, height.span, width.span
    parameters[[STRIDE_D, STRIDE_H, STRIDE_W, DILATION_D]] = depth.stride, height.stride, width.stride, depth.dilation
    parameters[[SOURCE_D, SOURCE_H, SOURCE_W]] = [address(a.source) for a in axes]
    parameters[[PADDED_W, BEFORE_W, SIZE_W]] = len(width.source), width.before, width.size
    parameters[[ZEROS, PADDED, IN_PLACE]] = zeros, is_padded(axes), in_place
    parameters[PLANE] = math.prod(out) if y[4] == 1 and are_consecutive(out, y[2:]) else 0
    parameters[[SEGMENTS, SEGMENT_ROWS, PHASE_PITCH]] = slab.segments, slab.segment_rows, slab.phase
    parameters[[ROW_PITCH, ROW_LENGTH]] = slab.row, slab.row_length
    parameters[CHANNEL_PITCH] = x[1] if in_place else slab.channel
    parameters[PIXEL_STEP] = 1
    if not in_place:
        whole_rows = x[4] == 1 and zeros and width.stride in (1, 2, 4)
        parameters[FILL] = (_fill_whole_rows if whole_rows else _fill_slab).address(dtype)


# Pixels that are a multiple of so many bytes apart fall on few lines of the first cache: with 4 KiB, the 14 pixels of a
# tile of `channels_last` drive one another out of it (1x1 of 1024 channels: 0.8 of the speed).
_ALIASING_BYTES = 2048


def aliases(pitch: int, stride: int, dtype: np.dtype) -> bool:
    """Do pixels so far apart (in elements, and a stride between them) fall on few lines of the cache?"""
    return pitch * stride * dtype.itemsize % _ALIASING_BYTES == 0


def pitch_of_pixels(channels: int, stride: int, dtype: np.dtype) -> int:
    """How far apart pixels are in a slab of [row][pixel][channel]."""
    return channels + simd.tile(dtype.itemsize * 8).lanes * aliases(channels, stride, dtype)


def set_pixel_slab(parameters: np.ndarray, dtype: np.dtype, row_length: int, pitch: int, stride: int) -> None:
    """Those parameters that `set_common` has for a slab of planes, for one of [row][pixel][channel]."""
    parameters[[PIXEL_PITCH, PIXEL_STEP, ROW_PITCH]] = pitch, pitch * stride, row_length * pitch
    parameters[FILL] = _fill_pixels.address(dtype)


@tasks.Body
def _list_microkernels(rows, output, table, real):
    simd.list_microkernels(rows, output, table, real)


@functools.cache
def _microkernel_table(dtype: np.dtype, output: bool) -> np.ndarray:
    t = simd.tile(dtype.itemsize * 8)
    return np.zeros((t.rows + 1, t.vectors + 1), np.int64)


def microkernels(dtype: np.dtype, rows: int, panels: int, output: bool) -> int:
    """Address of the table of microkernels, in which are those for `rows` rows in so many panels.

    They are those of `simd.contract_packing`, or of `simd.contract`.
    """
    table = _microkernel_table(dtype, output)
    for n in range(rows // panels, _ceil(rows, panels) + 1):
        if not table[n, -1]:
            _list_microkernels.call(dtype, n, int(output), table[n])
    return address(table)


def plan_correlation(
    dtype: np.dtype, batch: int, blocks: Blocks, axes: tuple[Axis, ...], x: Strides, y: Strides, zeros: bool,
    in_place: bool, workers: int, slab_panels: int = 0, packed: bool = True,
    group_steps: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """Plan y[n, i, o] = sum over c, k of w[i, c, k] * x[n, c, u(o, k)], with strides of x and y in elements.

    The slab has room for the pixels of a task, or for `slab_panels` panels of them. Weights that are not `packed` yet
    may be packed by the tasks: see `Plan.packs`. `group_steps` is how far apart the groups are in x and in y, if not as
    far as all channels of a group.
    """
    t = simd.tile(dtype.itemsize * 8)
    size = dtype.itemsize
    if in_place:
        batch, axes, x, y = flatten(batch, axes, x, y)
    x_group, y_group = group_steps or (blocks.channels * x[1], blocks.rows * y[1])
    depth, height, width = axes
    plane = depth.out * height.out * width.out
    pixels = batch * plane
    all_panels = _ceil(pixels, t.columns)

    per_task = min(_PANELS_PER_TASK, all_panels)
    while True:
        slab = slab_shape(axes, (slab_panels or per_task) * t.columns, batch, t.columns)
        if (
            in_place
            or slab_panels
            or slab.chunk
            or per_task <= 4
            or blocks.block_channels * slab.channel * size <= SLAB_BYTES
        ):
            break
        per_task = _ceil(per_task, 2)
    chunk = 0 if in_place else slab.chunk
    if chunk:
        chunks = _ceil(width.out, chunk)
        pixel_tasks = batch * depth.out * height.out * chunks
    else:
        chunks = 0
        pixel_tasks = _ceil(all_panels, per_task)
        if blocks.groups * pixel_tasks < 4 * workers:  # smaller tasks, as long as packing stays a small part of them
            pixel_tasks = max(pixel_tasks, min(_ceil(4 * workers, blocks.groups), all_panels // 8))
        if blocks.groups == 1 and 1 < pixel_tasks < 8 * workers:  # as many for each worker: 3 for 2 are as slow as 4
            pixel_tasks = min(_ceil(pixel_tasks, workers) * workers, all_panels)
    row_tasks = 1
    if blocks.groups * pixel_tasks < workers:
        row_tasks = min(blocks.panels, _ceil(workers, blocks.groups * pixel_tasks))

    group = max(
        1, min(per_task if not chunk else _ceil(chunk, t.columns), GROUP_BYTES // (blocks.depth * t.columns * size))
    )
    # Do the tasks pack the weights they need? That saves writing and reading them beyond L2, and a stage that the
    # product waits for, but weights are packed again by every task of other pixels.
    task_weights = _ceil(blocks.panels, row_tasks) * t.rows * blocks.depth
    weights_stay = task_weights * size <= OWN_WEIGHT_BYTES
    if pixel_tasks == 1 and all_panels * blocks.depth * t.columns * size <= OWN_GROUP_BYTES:
        group = all_panels
    packs = not packed and (
        group >= all_panels or (weights_stay and pixel_tasks * blocks.packed_size <= AGAIN_WEIGHTS * workers)
    )
    at_once = OWN_BLOCK_BYTES if packs and not weights_stay else WEIGHT_BYTES
    weight_panels = max(1, at_once // (t.rows * blocks.depth * size))

    slab_size = 0 if in_place else _ceil(blocks.block_channels * slab.channel + 2 * t.columns, 16) * 16
    panel_size = _ceil((group * blocks.depth + 1) * t.columns, 16) * 16
    weight_size = 0
    if packs:
        weight_size = _ceil(task_weights if weights_stay else weight_panels * t.rows * blocks.depth, 16) * 16
    run_table = t.vectors * simd.piece_stride(t)
    row_table = run_table + 1 + 2 * t.columns + OWN_FIELDS
    table_bytes = _ceil((row_table + slab.table) * 8, 64) * 64
    scratch = (slab_size + panel_size + weight_size + t.rows * t.columns + t.few * t.few_pitch) * size + table_bytes

    tap_offset = tap_offsets(axes, slab)
    channel_pitch = x[1] if in_place else slab.channel
    depth_offset = (np.arange(blocks.block_channels, dtype=np.int64)[:, None] * channel_pitch + tap_offset).ravel()
    tables = (depth.source, height.source, width.source, tap_offset, depth_offset)

    parameters = np.zeros(END, np.int64)
    set_common(parameters, dtype, batch, axes, slab, x, y, zeros, in_place)
    parameters[[ROW_CHANNELS, CHANNELS, PANELS]] = blocks.rows, blocks.channels, blocks.panels
    if not slab_panels:  # else the products are those of the caller
        parameters[KERNELS] = microkernels(dtype, blocks.rows, blocks.panels, True)
    parameters[[BLOCK_CHANNELS, BLOCK_TAPS, TAP_OFFSET]] = blocks.block_channels, blocks.block_taps, address(tap_offset)
    parameters[[PIXEL_TASKS, ROW_TASKS, CHUNK, CHUNKS]] = pixel_tasks, row_tasks, chunk, chunks
    parameters[GROUP] = group
    parameters[[WEIGHT_PANELS, WEIGHT_SIZE, WEIGHTS_STAY]] = weight_panels, weight_size, weights_stay
    parameters[[X_GROUP, Y_GROUP]] = x_group, y_group
    parameters[EXTENT] = (batch - 1) * x[0] + (blocks.groups - 1) * x_group + (blocks.channels - 1) * x[1] + plane
    parameters[[SLAB_SIZE, PANEL_SIZE, TABLE_BYTES, ROW_TABLE]] = slab_size, panel_size, table_bytes, row_table
    parameters[[RUN_TABLE, DEPTH_OFFSET]] = run_table, address(depth_offset)
    parameters[AHEAD] = t.columns if in_place else 0  # the next panel, while this one is packed
    flops = 2 * pixels * blocks.rows * blocks.groups * blocks.channels * blocks.taps
    return Plan(parameters, tables, blocks.groups * pixel_tasks * row_tasks, scratch, flops, packs)


def work(flops: int) -> int:
    """What `tasks.SERIAL_FLOPS` is to be compared with: these operations take half the time of those of other bodies.

    Threads pay from 1.8 to 3 million on, for weight gradients, depthwise convolutions and packing from about 1 million.
    """
    return flops // 2


def correlation(
    plan: Plan, x: np.ndarray, weights: np.ndarray | Unpacked, y: np.ndarray, bias: np.ndarray | None, relu: bool,
    add: bool, waits: int = 0,
) -> tasks.Stage:  # fmt: skip
    """A plan on arrays of the strides it was made for, to be run once, when the first `waits` stages are done.

    The weights are packed, unless the plan says that its tasks pack them.
    """
    parameters = plan.parameters.copy()
    packed = 0
    if isinstance(weights, Unpacked):
        parameters[[PACKING, PACKING_BODY]] = address(weights.parameters), _pack_weights.address(y.dtype)
    else:
        packed = address(weights)
    parameters[X:X_N] = address(x), packed, address(y), 0 if bias is None else address(bias), relu, add
    return plan.body, plan.tasks, parameters, plan.scratch, work(plan.flops), waits


@dataclass(frozen=True)
class Packing:
    """How weights of one shape and memory layout are packed: all but the addresses."""

    body: tasks.Body
    parameters: np.ndarray
    tables: tuple[np.ndarray, ...]  # whose addresses stand in the parameters
    scratch: int
    below: int  # bytes of the array before its first element (negative strides), and from there to its end
    above: int


PACKING_TASKS = 16  # for a group: several panels each, which read whole cache lines where rows are neighbours in memory


def plan_packing(
    blocks: Blocks, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, steps: tuple[int, int, int],
    offsets: np.ndarray, check_finite: bool = False,
) -> Packing:  # fmt: skip
    """Plan the packing of an array of `shape` and `strides` (in elements).

    Its weight of a group, row and channel is `steps` elements (each) from the first, that of a tap `offsets`.
    """
    consecutive = bool((np.diff(offsets) == 1).all())
    parameters = _packing_parameters(blocks, steps, check_finite)
    parameters[[OFFSETS, CONSECUTIVE]] = address(offsets), consecutive
    parameters[RUN_CHANNELS] = consecutive and steps[2] == blocks.taps
    parameters[[P_TAPS, P_BLOCK_CHANNELS, P_BLOCK_TAPS]] = blocks.taps, blocks.block_channels, blocks.block_taps
    lanes = simd.tile(itemsize * 8).lanes
    return Packing(_pack_weights, parameters, (offsets,), lanes * lanes * itemsize, *_extent(shape, strides, itemsize))


def plan_phase_packing(
    blocks: Sequence[Blocks], places: Sequence[int], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int,
    steps: tuple[int, int, int], offsets: Sequence[np.ndarray], check_finite: bool,
) -> Packing:  # fmt: skip
    """Plan the packing of one array for several products at once, each with other taps of the same rows and channels.

    `blocks`, `offsets` and where in the packed weights they begin (`places`) are given for each of the products.
    """
    lanes = simd.tile(itemsize * 8).lanes
    phases = np.array(
        [(place, each.taps, each.block_channels, each.block_taps) for place, each in zip(places, blocks, strict=True)],
        np.int64,
    )
    table = []
    for f, (each, of_taps) in enumerate(zip(blocks, offsets, strict=True)):
        for tap, offset in enumerate(of_taps.tolist()):
            first = tap // each.block_taps * each.block_taps
            table.append((offset, f, first, min(each.block_taps, each.taps - first), tap - first))
    table.sort(reverse=True)  # the taps of a phase are listed from the last to the first
    ascending = all(
        [tap for _, phase, *tap in table if phase == f] == sorted(tap for _, phase, *tap in table if phase == f)
        for f in range(len(blocks))
    )
    windows, first = [], 0
    for t in range(1, len(table) + 1):
        if t == len(table) or table[first][0] - table[t][0] >= lanes:
            windows.append((first, t, table[t - 1][0]))
            first = t
    tables = phases, np.array(table, np.int64), np.array(windows, np.int64)
    parameters = _packing_parameters(blocks[0], steps, check_finite)
    parameters[[PHASES, PHASE_TABLE, TAP_TABLE]] = len(blocks), address(tables[0]), address(tables[1])
    parameters[[WINDOWS, WINDOW_TABLE, ASCENDING]] = len(windows), address(tables[2]), ascending
    parameters[[P_TAPS, TARGET_BYTES]] = len(table), len(table) * TARGET_FIELDS * 8
    scratch = lanes * lanes * itemsize + int(parameters[TARGET_BYTES])
    return Packing(_pack_phases, parameters, tables, scratch, *_extent(shape, strides, itemsize))


def _packing_parameters(blocks: Blocks, steps: tuple[int, int, int], check_finite: bool) -> np.ndarray:
    parameters = np.zeros(PACK_END, np.int64)
    parameters[[GROUP_STEP, ROW_STEP, CHANNEL_STEP]] = steps
    parameters[[P_ROWS, P_CHANNELS, P_PANELS]] = blocks.rows, blocks.channels, blocks.panels
    parameters[[P_TASKS, CHECK_FINITE]] = min(blocks.panels, PACKING_TASKS), check_finite
    return parameters


def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Bytes of an array before its first element (negative strides), and from there to its end."""
    ends = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return sum(end for end in ends if end < 0) * itemsize, (sum(end for end in ends if end > 0) + 1) * itemsize


class Unpacked:
    """Weights as they lie in memory, for tasks to pack."""

    def __init__(self, plan: Packing, w: np.ndarray) -> None:
        first = address(w)
        self.plan = plan
        self.parameters = plan.parameters.copy()
        self.parameters[FROM:GROUP_STEP] = first, 0, first + plan.below, first + plan.above

    def finite(self) -> bool:
        """Were all weights that were packed finite? Known afterwards, and only if `check_finite` was asked for."""
        return not self.parameters[NOT_FINITE]


def packing(weights: Unpacked, groups: int, packed: np.ndarray) -> tasks.Stage:
    """Packing of weights for `correlation` into `packed`, to be run once."""
    plan, parameters = weights.plan, weights.parameters
    parameters[TO] = address(packed)
    # counted as 16 operations an element, since reading and writing is most of the work
    return plan.body, groups * int(parameters[P_TASKS]), parameters, plan.scratch, 16 * packed.size, 0


_UNIT_PIXELS = 448  # output pixels of a unit of the weight gradient
_TILE_BYTES = 512 * 1024  # most accumulators of a task
_PARTIAL_BYTES = 2 * 1024 * 1024  # most memory for the sums of parts of the pixels, of all threads
# What it costs to transpose an element of the output gradient, and to copy one whose neighbours are not neighbours in
# memory into the slab, to copying one of a whole row. For 14 layers the cut chosen is within 4 % of the best one tried.
_GRADIENT_COST, _STRIDED_COST = 1.5, 3
_GRADIENT_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads


_MOST_ROWS_BY_TAP = 1.2

# Transposing a vector takes as long as so many products of it; every row of a block takes one more for its splats. By
# this 1x1 layers are exchanged where that took 0.64 to 1.0 of the time (16 channels to 96, 64 to 256, 512 to 2048), and
# not where it took 1.1 times as long (24 to 144).
_TRANSPOSE_COST = 15


def is_better_exchanged(dtype: np.dtype, rows: int, channels: int) -> bool:
    """Should the weight gradient of a 1x1 kernel be computed as that of the exchanged operands?

    One of them is transposed and its channels fill whole vectors, the other is read as it lies: the sums are the same.
    """
    t = simd.tile(dtype.itemsize * 8)

    def cost(transposed: int, other: int) -> int:
        vectors = _ceil(transposed, t.lanes)
        return vectors * (other + _TRANSPOSE_COST) + _ceil(vectors, t.gradient_vectors) * other

    return cost(channels, rows) < cost(rows, channels)


def _gradient_blocks(
    groups: int, rows: int, channels: int, taps: int, pixels: int, units: int, slab_channel: int,
    slab_cost: float, t: simd.Tile, size: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Into how many blocks the input channels, the output channels and the pixels of a weight gradient are cut.

    Each block of input channels packs the gradient of the output again, each block of output channels the input, and
    each part of the pixels has sums of its own. Of all cuts whose sums (and slab, of `slab_channel` elements a channel,
    0 where the input stays in place) fit the cache, and that are enough tasks, this is the one that costs least.
    """
    vectors = _ceil(rows, t.lanes)
    vector_panels = _ceil(vectors, t.gradient_vectors)
    whole = groups * channels * taps * vectors * t.lanes  # elements of all sums
    most_splits = max(1, _PARTIAL_BYTES // (whole * size))
    best = (math.inf, 1, 1, 1)
    for out_blocks in range(1, vector_panels + 1):
        out_vectors = min(vectors, _ceil(vector_panels, out_blocks) * t.gradient_vectors)
        of_channel = out_vectors * t.lanes * taps * size
        most = max(1, min(channels, _TILE_BYTES // of_channel))
        if slab_channel:
            most = max(1, min(most, SLAB_BYTES // (slab_channel * size)))
        channel_blocks = _ceil(channels, most)
        splits = min(units, _ceil(_GRADIENT_TASKS, groups * channel_blocks * out_blocks), most_splits)
        if groups * channel_blocks * out_blocks * splits < _GRADIENT_TASKS:
            enough = _ceil(_GRADIENT_TASKS, groups * out_blocks * splits)
            most_blocks = _ceil(channels * taps, 6 * t.gradient_rows)
            channel_blocks = min(channels, max(channel_blocks, min(enough, most_blocks)))
        # where it cannot be helped: sums of one channel beyond the cache, and fewer tasks than threads can share
        too_large = max(0, of_channel - _TILE_BYTES) * _ceil(channels, channel_blocks)
        too_few = max(0, _GRADIENT_TASKS - groups * channel_blocks * out_blocks * splits)
        cost = (
            _GRADIENT_COST * groups * channel_blocks * vectors * t.lanes * pixels
            + slab_cost * out_blocks * groups * channels * slab_channel * units
            + (2 * splits * whole if splits > 1 else 0)
            + whole * pixels // t.lanes * too_few // (4 * _GRADIENT_TASKS)
            + too_large * pixels
        )
        best = min(best, (cost, channel_blocks, out_blocks, splits))
    return best[1:]


def plan_weight_gradient(
    dtype: np.dtype, batch: int, groups: int, rows: int, channels: int, axes: tuple[Axis, ...], x: Strides, dy: Strides,
    dw: tuple[int, int, int], w_taps: np.ndarray, zeros: bool, in_place: bool,
) -> Plan:  # fmt: skip
    """Plan dw[o, c, k] = sum over n, p of dy[n, o, p] * x[n, c, u(p, k)]; `rows` is output channels in a group.

    `dw` has the strides of group, o and c. Where the channels of a pixel are neighbours in x, the slab has them so too:
    the microkernel reads one element after the other, as far apart as they may be.
    """
    t = simd.tile(dtype.itemsize * 8)
    size = dtype.itemsize
    last = not in_place and channels > 1 and x[1] == 1  # are the channels of a pixel neighbours?
    if in_place or last:
        batch, axes, x, dy = flatten(batch, axes, x, dy)
    depth, height, width = axes
    if last and all(a.is_identity() for a in axes) and depth.out == height.out == 1:
        in_place = not aliases(x[4], 1, dtype)
    taps = math.prod(a.taps for a in axes)
    plane = depth.out * height.out * width.out
    pixels = batch * plane

    slab = slab_shape(axes, _UNIT_PIXELS, batch, t.columns)
    if slab.chunk or (in_place and width.out > _UNIT_PIXELS):
        pieces = _ceil(width.out, min(_UNIT_PIXELS, slab.chunk or _UNIT_PIXELS))  # the slab has room for its chunk
        chunk = _ceil(width.out, pieces)
        unit_rows, chunks = 1, _ceil(width.out, chunk)
        units = batch * depth.out * height.out * chunks
    else:
        chunk = chunks = 0
        unit_rows = max(1, _UNIT_PIXELS // width.out)
        units = _ceil(batch * depth.out * height.out, unit_rows)
        slab = slab_shape(axes, unit_rows * width.out, batch, t.columns)
    vectors = _ceil(rows, t.lanes)
    vector_panels = _ceil(vectors, t.gradient_vectors)

    channel_blocks, out_blocks, splits = _gradient_blocks(
        groups, rows, channels, taps, pixels, units, 0 if in_place else slab.channel,
        1 if x[4] == 1 or last else _STRIDED_COST, t, size,
    )  # fmt: skip
    block_channels = _ceil(channels, channel_blocks)

    tap_offset, pitch = tap_offsets(axes, slab), x[1] if in_place else slab.channel
    slab_size = block_channels * slab.channel + 2 * t.columns
    if last and not in_place:
        pixel_pitch, pitch = pitch_of_pixels(block_channels, width.stride, dtype), 1
        row = slab.row_length * pixel_pitch
        slab_size = slab.table // 2 * row
        tap_offset = offsets_of_taps(
            axes, [slab.segment_rows * row, height.dilation * row, width.dilation * pixel_pitch]
        )
    row_offset = np.arange(block_channels, dtype=np.int64)[:, None] * pitch + tap_offset
    # With a stride, every tap of a pixel is on another line of a channels-last slab, which is too many for the nearest
    # cache: channels of one tap together take 0.75 of the time with AVX2, 1 to 0.97 with AVX-512. But their number
    # should not leave too many rows empty (a fifth: 1.25 times as long), and without a stride it pays no more.
    of_tap = _ceil(block_channels, t.gradient_rows) * t.gradient_rows
    by_tap = last and width.stride > 1 and of_tap <= _MOST_ROWS_BY_TAP * block_channels
    row_offset = (row_offset.T if by_tap else row_offset).ravel()
    slab_size = 0 if in_place else _ceil(slab_size, 16) * 16
    panel_size = _ceil((chunk or unit_rows * width.out) * t.gradient_vectors * t.lanes, 16) * 16
    tile_size = block_channels * taps * min(vectors, _ceil(vector_panels, out_blocks) * t.gradient_vectors) * t.lanes
    row_table = max(unit_rows, 4)
    table_bytes = _ceil((row_table + slab.table) * 8, 64) * 64

    parameters = np.zeros(GRADIENT_END, np.int64)
    set_common(parameters, dtype, batch, axes, slab, x, dy, zeros, in_place)
    if last and in_place:
        parameters[PIXEL_STEP] = x[4]
    elif last:
        set_pixel_slab(parameters, dtype, slab.row_length, pixel_pitch, width.stride)
    parameters[[ROW_CHANNELS, CHANNELS, CHUNK, CHUNKS]] = rows, channels, chunk, chunks
    parameters[[SLAB_SIZE, PANEL_SIZE, TABLE_BYTES, TILE_SIZE]] = slab_size, panel_size, table_bytes, tile_size
    parameters[ROW_TABLE] = row_table
    parameters[[W_GROUP, W_O, W_C, W_TAP_OFFSET]] = *dw, address(w_taps)
    parameters[W_FLAT] = dw[2] == taps and bool((np.diff(w_taps) == 1).all())
    parameters[[ROW_OFFSET, UNIT_ROWS, UNITS, SPLITS]] = address(row_offset), unit_rows, units, splits
    parameters[[CHANNEL_BLOCKS, OUT_BLOCKS, BY_TAP]] = channel_blocks, out_blocks, block_channels if by_tap else 0
    parameters[[VECTORS, VECTOR_PANELS]] = vectors, vector_panels
    # Is the gradient of the output a panel as it lies?
    out, steps = (batch, *(a.out for a in axes)), (dy[0], *dy[2:])
    together = dy[1] == 1 and is_flat(out, steps) and _pixel_step(out, steps) == rows
    parameters[Y_PACKED] = together and vector_panels == 1 and rows == vectors * t.lanes
    operands = batch * groups * (rows * plane + channels * math.prod(a.size for a in axes))
    parameters[AHEAD] = operands * size >= AHEAD_BYTES
    scratch = (slab_size + panel_size + tile_size) * size + table_bytes
    number = groups * channel_blocks * out_blocks * splits
    tables = (depth.source, height.source, width.source, w_taps, row_offset)
    return Plan(parameters, tables, number, scratch, 2 * pixels * rows * groups * channels * taps)


def weight_gradient(plan: Plan, x: np.ndarray, dy: np.ndarray, dw: np.ndarray, add: bool) -> None:
    """Run a plan on arrays of the strides it was made for."""
    parameters = plan.parameters.copy()
    parameters[X : BIAS] = address(x), address(dw), address(dy)
    parameters[ADD] = add
    splits = int(parameters[SPLITS])
    if splits > 1:
        partial = np.empty(plan.tasks * int(parameters[TILE_SIZE]), dw.dtype)
        parameters[PARTIAL] = address(partial)
    stages: list[tasks.Stage] = [(_weight_gradient, plan.tasks, parameters, plan.scratch, plan.flops, 0)]
    if splits > 1:
        stages.append((sum_splits, plan.tasks // splits, parameters.copy(), 64, 16 * partial.size, 1))
    tasks.run_stages(dw.dtype, stages)
