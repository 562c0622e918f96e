"""From the image into the slab: the copy of the input rows that a task needs, with their border.

A body lists the rows it reads (`find_rows`) and calls one of the bodies `fill_*`, by its address, to copy them: each of
these is compiled once, when it is first needed, for all bodies that have a slab.
"""

from __future__ import annotations

from .. import tasks
from ..jit import helper
from ..vector import move
from ..vector import tile as machine
from ..vector.memory import no_inline, offset
from .parameters import Fill


# One branch for each stride that vectors can separate.
@helper
def _copy_row(row, phase_pitch, source, step, stride, count, first, places):
    """Elements 0 .. count of `source` (`step` apart) become the padded coordinates first .. first + count of `row`.

    Padded coordinate u lies at (u % stride) * phase_pitch + u // stride; `places` has those of the first four.
    """
    no_inline()
    if step == 1 and stride == 1:
        move.copy_span(offset(row, first), source, count)
    elif step == 1 and stride == 2:
        move.separate_2(offset(row, places[0]), offset(row, places[1]), 0, source, 0, 1, count)
    elif step == 1 and stride == 4:
        move.separate_4(row, places, source, count)
    elif step == 2 and stride == 1:
        move.copy_every_second(offset(row, first), 0, source, 0, 1, count)
    elif stride == 1:
        target = offset(row, first)
        for i in range(count):
            target[i] = source[i * step]
    else:
        lanes = machine.lanes(row)
        phase, place = first % stride, first // stride
        before = min((stride - phase) % stride, count)  # elements of a stride that is not whole
        whole = (count - before) // stride if step == 1 else 0  # strides, to be transposed
        i = 0
        while i < count:
            if i == before and whole > 0:
                for k in range(0, whole, lanes):
                    for r in range(0, stride, lanes):
                        move.transpose_block(
                            offset(row, r * phase_pitch + place + k), phase_pitch,
                            offset(source, i + k * stride + r), stride, min(lanes, whole - k),
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


@helper
def _copy_channels(rows, pitch, phase_pitch, source, step, channels, stride, count, first):
    """`_copy_row` for up to `lanes` channels that are neighbours in memory, and `pitch` apart in the slab."""
    no_inline()
    lanes = machine.lanes(rows)
    for r in range(min(stride, count)):
        place = (first + r) % stride * phase_pitch + (first + r) // stride
        length = (count - r + stride - 1) // stride
        for k in range(0, length, lanes):
            move.transpose_block(
                offset(rows, place + k), pitch, offset(source, (r + k * stride) * step), stride * step,
                min(lanes, length - k), channels,
            )  # fmt: skip


@helper
def find_rows_and_zeros(p, rows, first_row, last_row):
    """List the input rows that output rows first_row .. last_row read; return their number, and if others are zeros.

    An output row is one (batch, depth, height). Those of one (batch, depth) are a segment, whose input rows lie
    together in the slab: [channel][segment][depth tap][row]. Entered are the row's place in the first channel of the
    input, and its place in the slab.
    """
    no_inline()
    out_d, out_h = p.out.d, p.out.h
    source_d, source_h = p.slab.depth.source, p.slab.height.source
    count = 0
    zeros = False
    first_segment, last_segment = first_row // out_h, (last_row - 1) // out_h
    for segment in range(first_segment, last_segment + 1):
        n, d = segment // out_d, segment % out_d
        h = max(first_row, segment * out_h) - segment * out_h
        h_end = min(last_row, (segment + 1) * out_h) - segment * out_h
        height = (h_end - 1 - h) * p.slab.height.stride + p.slab.height.span
        for i in range(p.slab.depth.taps):
            from_d = source_d[d * p.slab.depth.stride + i * p.slab.depth.dilation]
            place = ((segment - first_segment) * p.slab.depth.taps + i) * p.slab.segment_rows
            for r in range(height):
                from_h = source_h[h * p.slab.height.stride + r]
                if r % p.slab.height.stride >= p.slab.height.span:
                    continue  # between the windows
                if from_d < 0 or from_h < 0:
                    zeros = True
                    continue
                rows[2 * count] = n * p.input.n + from_d * p.input.d + from_h * p.input.h
                rows[2 * count + 1] = (place + r) * p.slab.row_pitch
                count += 1
    return count, zeros


@helper
def find_rows(p, rows, first_row, last_row):
    """`find_rows_and_zeros` for bodies that write zeros everywhere first."""
    count, _ = find_rows_and_zeros(p, rows, first_row, last_row)
    return count


@tasks.body(Fill)
def fill_whole_rows(task, worker, a, real):
    """`fill_slab` where the elements of a row are neighbours, zeros are around them, and the stride is 1, 2 or 4."""
    p, rows, places = a.parameters, a.rows, a.places
    stride, first_u = p.slab.width.stride, a.first
    low = max(p.slab.width.before, first_u)
    count = min(p.slab.width.before + p.slab.width.elements, first_u + p.slab.row_length) - low
    if count <= 0:
        return
    for r in range(4):
        v = low - first_u + r
        places[r] = v % stride * p.slab.phase_pitch + v // stride
    source = offset(a.source, low - p.slab.width.before)
    target = a.slab
    for _ in range(a.channels):
        for k in range(a.count):
            row, elements = offset(target, rows[2 * k + 1]), offset(source, rows[2 * k])
            if stride == 1:
                move.copy_span(offset(row, places[0]), elements, count)
            elif stride == 2:
                move.separate_2(offset(row, places[0]), offset(row, places[1]), 0, elements, 0, 1, count)
            else:
                move.separate_4(row, places, elements, count)
        source, target = offset(source, p.input.c), offset(target, p.slab.channel_pitch)


@tasks.body(Fill)
def fill_slab(task, worker, a, real):
    """Copy the rows listed by `find_rows` of some channels into the slab, from any layout and with any padding."""
    p, rows, places = a.parameters, a.rows, a.places
    slab, x = a.slab, a.source
    channels, count, first_u = a.channels, a.count, a.first
    step, stride = p.input.w, p.slab.width.stride
    source_w = p.slab.width.source
    phase_pitch = p.slab.phase_pitch
    low = max(p.slab.width.before, first_u)  # padded coordinates that are input elements: low .. high
    high = min(p.slab.width.before + p.slab.width.elements, first_u + p.slab.row_length)
    end = min(p.slab.width.padded, first_u + p.slab.row_length)
    for r in range(4):
        v = low - first_u + r
        places[r] = v % stride * phase_pitch + v // stride
    begin = offset(x, (low - p.slab.width.before) * step)
    if p.input.c == 1 and step > 1:
        for c in range(0, channels, machine.lanes(slab)):
            block = min(machine.lanes(slab), channels - c)
            for k in range(count):
                _copy_channels(
                    offset(slab, rows[2 * k + 1] + c * p.slab.channel_pitch), p.slab.channel_pitch, phase_pitch,
                    offset(begin, rows[2 * k] + c), step, block, stride, high - low, low - first_u,
                )  # fmt: skip
    elif high > low:
        # Rows of a plane beyond L2 that are short or not consecutive are fetched early: 1x1 layers of stride 2 take 2
        # to 10 % less time by it. Rows of less than a vector are not worth the question.
        length = (high - low) * step
        for c in range(channels):
            source, target = offset(begin, c * p.input.c), offset(slab, c * p.slab.channel_pitch)
            for k in range(count):
                if length >= machine.lanes(slab):  # the same row of the next channel
                    move.fetch_span(offset(source, p.input.c + rows[2 * k]), length)
                _copy_row(
                    offset(target, rows[2 * k + 1]), phase_pitch, offset(source, rows[2 * k]), step, stride,
                    high - low, low - first_u, places,
                )  # fmt: skip
    if not p.slab.only_zeros:
        for c in range(channels):
            for k in range(count):
                source = offset(x, c * p.input.c + rows[2 * k])
                row = offset(slab, c * p.slab.channel_pitch + rows[2 * k + 1])
                for u in range(first_u, end):
                    if (u < low or u >= high) and source_w[u] >= 0:
                        v = u - first_u
                        row[v % stride * phase_pitch + v // stride] = source[source_w[u] * step]


@tasks.body(Fill)
def fill_pixels(task, worker, a, real):
    """`fill_slab` for a slab of [row][pixel][channel], from an image whose channels are neighbours in memory."""
    p, rows = a.parameters, a.rows
    slab, x = a.slab, a.source
    channels, first_u = a.channels, a.first
    pitch, step, source_w = p.slab.pixel_pitch, p.input.w, p.slab.width.source
    low = max(p.slab.width.before, first_u)  # padded coordinates that are input elements: low .. high
    high = min(p.slab.width.before + p.slab.width.elements, first_u + p.slab.row_length)
    end = min(p.slab.width.padded, first_u + p.slab.row_length)
    for k in range(a.count):
        source, target = offset(x, rows[2 * k]), offset(slab, rows[2 * k + 1])
        if high > low:
            place, begin = offset(target, (low - first_u) * pitch), (low - p.slab.width.before) * step
            if pitch == channels and step == channels:
                move.copy_span(place, offset(source, begin), (high - low) * channels)
            else:
                move.copy_block(place, pitch, offset(source, begin), step, high - low, channels)
        if not p.slab.only_zeros:
            for u in range(first_u, end):
                if (u < low or u >= high) and source_w[u] >= 0:
                    place = offset(target, (u - first_u) * pitch)
                    move.copy_span(place, offset(source, source_w[u] * step), channels)
