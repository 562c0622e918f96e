"""From the slab into column panels, and from accumulators into the output: pixels in runs, wherever a row ends.

A *run* is some consecutive pixels of a panel that are neighbours in the slab, a *part* some that are evenly spaced in
the output.
"""

from __future__ import annotations

from ..jit import helper
from ..vector import move
from ..vector import tile as machine
from ..vector.gemm import FIXED_RUNS, MOST_RUNS, PACK, READ, pack_panel, run_table_stride
from ..vector.memory import no_inline, offset
from .parameters import as_common


@helper
def find_runs(p, table, pixel, end, first_row, first_column, like):
    """Write the table of `pack_panel` for pixels pixel .. end; return the largest place of a pixel.

    The pixels are split where an output row ends. A run is entered in the table of every vector it has pixels in.
    """
    no_inline()
    out_h, out_w = p.out.h, p.out.w
    if p.slab.in_place:  # the pixels of a plane follow one another
        out_w *= p.out.d * out_h
    lanes, stride = machine.lanes(like), run_table_stride(like)
    for vector in range(machine.columns(like) // lanes):
        table[vector * stride] = 0
        table[vector * stride + 1] = 0
    column = 0
    largest = 0
    while pixel < end:
        row = pixel // out_w
        w = pixel - row * out_w
        length = min(end - pixel, out_w - w)
        if p.slab.in_place:
            place = row * p.input.n + w
        else:
            segment = row // out_h - first_row // out_h
            h = row % out_h - (first_row % out_h if segment == 0 else 0)
            slab_row = segment * p.slab.depth.taps * p.slab.segment_rows + h * p.slab.height.stride
            place = slab_row * p.slab.row_pitch + w - first_column
        for vector in range(column // lanes, (column + length - 1) // lanes + 1):
            entry = offset(table, vector * stride)
            entry[2 * entry[0] + 1] = place - column + vector * lanes
            entry[2 * entry[0] + 2] = -1 << max(0, column - vector * lanes)
            entry[0] += 1
        largest = max(largest, place + length - 1)
        column += length
        pixel += length
    for vector in range(machine.columns(like) // lanes):
        entry = offset(table, vector * stride)
        for run in range(entry[0], FIXED_RUNS):
            entry[2 * run + 1] = entry[1]
            entry[2 * run + 2] = 0
    return largest


@helper
def _pack_exactly(p, panel, source, table, channels, first_tap, last_tap, count):
    """`pack_panel` element by element, for pixels at the very end of the input: nothing else is read.

    Done for all channels, not only the last, this was 31 of 249 us of a layer of MobileNetV2 (384 channels to 64).
    """
    no_inline()
    tap_offset = p.tap_offset
    lanes, stride = machine.lanes(panel), run_table_stride(panel)
    for c in range(channels):
        for tap in range(first_tap, last_tap):
            for column in range(count):
                entry = offset(table, column // lanes * stride)
                run = entry[0] - 1
                while not entry[2 * run + 2] >> column % lanes & 1:
                    run -= 1
                place = entry[2 * run + 1] + column % lanes
                panel[column] = source[c * p.slab.channel_pitch + tap_offset[tap] + place]
            panel = offset(panel, machine.columns(panel))


@helper
def take_panel(
    p, panel, slab, table, slab_place, channels, first_tap, last_tap, pixel, end, vectors, once, first_row, first_column
):  # fmt: skip
    """Pack the panel of pixels pixel .. end; or return PACK if the first product is to, by the table of runs.

    Or READ, if it is used `once` and the product can do without. The product is of so many `vectors`. A slab that is
    the input in place begins with its element `slab_place`.
    """
    no_inline()
    lanes, columns = machine.lanes(panel), machine.columns(panel)
    largest = find_runs(as_common(p), table, pixel, end, first_row, first_column, panel)
    inside = channels  # so many channels whose vectors end inside the input: in place, the last may be the end of it
    after = largest + slab_place + (channels - 1) * p.input.c + 2 * columns - p.extent
    if p.slab.in_place and after > 0:
        inside = max(0, channels - (after + p.input.c - 1) // p.input.c) if p.input.c > 0 else 0
    if machine.packs(panel) and inside == channels and vectors * lanes == columns:
        most = 0  # runs of a vector
        for vector in range(vectors):
            most = max(most, table[vector * run_table_stride(panel)])
        if most == 1 and once:
            return READ
        if most <= MOST_RUNS:
            return PACK
    taps, tap_offset = last_tap - first_tap, offset(p.tap_offset, first_tap)
    if inside > 0:
        pack_panel(panel, slab, inside, p.slab.channel_pitch, taps, tap_offset, table, p.ahead)
    if inside < channels:
        _pack_exactly(
            p, offset(panel, inside * taps * columns), offset(slab, inside * p.slab.channel_pitch), table,
            channels - inside, first_tap, last_tap, end - pixel,
        )  # fmt: skip
    return 0


@helper
def find_parts(p, parts, pixel, end):
    """List where in a channel of the output the pixels pixel .. end are: number of parts; place and length of each."""
    no_inline()
    out_d, out_h, out_w = p.out.d, p.out.h, p.out.w
    row_length = p.plane if p.plane else out_w  # a plane whose pixels are consecutive is one row
    count = 0
    while pixel < end:
        row = pixel // row_length
        place = pixel - row * row_length
        length = min(end - pixel, row_length - place)
        if p.plane:
            place += row * p.output.n
        else:
            n, d, h = row // out_h // out_d, row // out_h % out_d, row % out_h
            place = n * p.output.n + d * p.output.d + h * p.output.h + place * p.output.w
        parts[2 * count + 1] = place
        parts[2 * count + 2] = length
        count += 1
        pixel += length
    parts[0] = count


@helper
def load_tile(p, y, tile, parts, rows):
    """Copy the pixels of the parts of `rows` output channels, of any strides, into the tile [row][column]."""
    no_inline()
    lanes, columns, step, channel_step = machine.lanes(tile), machine.columns(tile), p.output.w, p.output.c
    j = 0
    for part in range(parts[0]):
        source, length = offset(y, parts[2 * part + 1]), parts[2 * part + 2]
        if channel_step == 1 and step > 1:
            for i in range(0, rows, lanes):
                for k in range(0, length, lanes):
                    move.transpose_block(
                        offset(tile, i * columns + j + k), columns, offset(source, k * step + i), step,
                        min(lanes, length - k), min(lanes, rows - i),
                    )  # fmt: skip
        elif step == 1:
            move.copy_block(offset(tile, j), columns, source, channel_step, rows, length)
        elif step == 2:
            move.copy_every_second(offset(tile, j), columns, source, channel_step, rows, length)
        else:
            for i in range(rows):
                for k in range(length):
                    tile[i * columns + j + k] = source[i * channel_step + k * step]
        j += length


@helper
def store_tile(p, y, tile, parts, rows):
    """The reverse of `load_tile`."""
    no_inline()
    lanes, columns, step, channel_step = machine.lanes(tile), machine.columns(tile), p.output.w, p.output.c
    j = 0
    for part in range(parts[0]):
        target, length = offset(y, parts[2 * part + 1]), parts[2 * part + 2]
        if channel_step == 1 and step > 1:
            for i in range(0, rows, lanes):
                for k in range(0, length, lanes):
                    move.transpose_block(
                        offset(target, k * step + i), step, offset(tile, i * columns + j + k), columns,
                        min(lanes, rows - i), min(lanes, length - k),
                    )  # fmt: skip
        elif step == 1:
            move.copy_block(target, channel_step, offset(tile, j), columns, rows, length)
        elif step == 2:
            move.spread_every_second(target, channel_step, offset(tile, j), columns, rows, length)
        else:
            for i in range(rows):
                for k in range(length):
                    target[i * channel_step + k * step] = tile[i * columns + j + k]
        j += length
