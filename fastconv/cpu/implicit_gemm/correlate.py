"""The product of the forward pass and of the input gradient: `correlate`, whose columns are output pixels."""

from __future__ import annotations

from .. import tasks
from ..jit import helper
from ..vector import tile as machine
from ..vector.gemm import ADD, BIAS, RELU, contract, contract_narrow
from ..vector.memory import at, fill_zero, integers_at, no_inline, offset
from .panels import find_parts, load_tile, store_tile, take_panel
from .parameters import Correlation, as_common
from .slab import find_rows


@helper
def _contract_narrow(rows, count, depth, a, panel, tile, flags, bias, sums):
    """`contract` of the first `count` columns, `narrow_columns` at most, into as many columns of `tile`.

    `sums` is room for those of `contract_narrow`.
    """
    no_inline()
    contract_narrow(rows, depth, a, panel, sums)
    for i in range(rows):
        row = offset(tile, i * machine.columns(tile))
        for j in range(count):
            value = sums[j * machine.narrow_pitch(tile) + i]
            row[j] = value + row[j] if flags & ADD else value
            if flags & BIAS:
                row[j] += bias[i]
            if flags & RELU and row[j] < 0:
                row[j] = 0


@helper
def _multiply_panels(
    p, weights, first_panel, last_panel, packing_panel, depth, start, stop, panels, slab, slab_place, channels,
    first_tap, last_tap, flags, once, first_row, first_column, y, bias, tile, table,
):  # fmt: skip
    """Multiply panels first_panel .. last_panel of rows with the panels of pixels start .. stop; add that to `y`.

    The product with the panel of rows number `packing_panel` packs those of pixels, or has them packed. `slab_place` is
    the place of the slab in the input, if that is read in place; `y` and `bias` are those of the group.
    """
    no_inline()
    lanes, columns = machine.lanes(tile), machine.columns(tile)
    plane = p.plane
    narrow_sums, parts = offset(tile, machine.tile_rows(tile) * columns), offset(table, p.run_table)
    first_o = first_panel * p.row_channels // p.row_panels
    for i in range(first_panel, last_panel):
        o = i * p.row_channels // p.row_panels
        rows = (i + 1) * p.row_channels // p.row_panels - o
        a, channel_bias = offset(weights, (o - first_o) * depth), offset(bias, o)
        kernels = offset(p.kernels, rows * (columns // lanes + 1))
        for pixel in range(start, stop, columns):
            end = min(pixel + columns, stop)
            panel = offset(panels, (pixel - start) * depth)
            vectors, rest = (end - pixel) // lanes, (end - pixel) % lanes
            if rest > machine.narrow_columns(tile):
                vectors, rest = vectors + 1, 0
            how = flags
            if i == packing_panel:
                how |= take_panel(
                    p, panel, slab, table, slab_place, channels, first_tap, last_tap, pixel, end, vectors, once,
                    first_row, first_column,
                )  # fmt: skip
            n = pixel // plane if plane else 0
            whole = plane and end - pixel == columns and end <= (n + 1) * plane
            if not whole:
                find_parts(as_common(p), parts, pixel, end)
            place, pitch = offset(y, o * p.output.c), p.output.c
            if whole:
                place = offset(place, n * p.output.n + pixel - n * plane)
            elif flags & ADD:
                load_tile(as_common(p), place, tile, parts, rows)
            target = place
            if not whole:
                target, pitch = tile, columns
            if vectors > 0:
                contract(
                    kernels[vectors], depth, a, panel, target, how, pitch, channel_bias, slab,
                    offset(p.depth_offset, first_tap), table, p.ahead,
                )  # fmt: skip
            if rest > 0:
                done = vectors * lanes
                _contract_narrow(
                    rows, rest, depth, a, offset(panel, done), offset(tile, done), flags, channel_bias, narrow_sums
                )
            if not whole:
                store_tile(as_common(p), place, tile, parts, rows)


@tasks.body(Correlation)
def correlate(task, worker, p, real):
    """Task = a range of output channels and one of output pixels, in one group."""
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    panels = offset(slab, p.slab.elements)
    own_weights = offset(panels, p.panel_elements)
    tile = offset(own_weights, p.weight_elements)
    table = integers_at(p.header.scratch + (worker + 1) * p.header.scratch_bytes - p.table_bytes)
    columns, out_w = machine.columns(real), p.out.w

    # what this task computes: channels first_panel .. last_panel of a group, pixels first .. last
    part, rest = task % p.row_tasks, task // p.row_tasks
    block, group = rest % p.pixel_tasks, rest // p.pixel_tasks
    first_panel, last_panel = part * p.row_panels // p.row_tasks, (part + 1) * p.row_panels // p.row_tasks
    if p.chunks:  # long rows: a part of one row
        row, chunk = block // p.chunks, block % p.chunks
        first = row * out_w + chunk * p.chunk
        last = min(first + p.chunk, (row + 1) * out_w)
        first_column = chunk * p.chunk
    else:
        all_panels = (p.pixels + columns - 1) // columns
        first = block * all_panels // p.pixel_tasks * columns
        last = min((block + 1) * all_panels // p.pixel_tasks * columns, p.pixels)
        first_column = 0
    first_row, last_row = first // out_w, (last - 1) // out_w + 1

    x = offset(p.operands.x, group * p.input_group)
    y = offset(p.operands.y, group * p.output_group)
    w = offset(p.operands.w, group * p.row_channels * p.channels * p.taps)
    bias = offset(p.operands.bias, group * p.row_channels)
    task_o = first_panel * p.row_channels // p.row_panels
    rows_table = offset(table, p.row_table)
    # is a panel used by one product alone? In place the product that packs is faster, since it fetches ahead
    once = last_panel - first_panel == 1 and not p.slab.in_place
    listed = 0 if p.slab.in_place else find_rows(as_common(p), rows_table, first_row, last_row)
    if p.padded:
        fill_zero(slab, p.slab.elements)

    reduced = 0  # how much of the reduction has been done
    for c in range(0, p.channels, p.block_channels):
        channels = min(p.block_channels, p.channels - c)
        from_c = offset(x, c * p.input.c)
        if p.slab.in_place:
            slab = from_c
        else:
            tasks.call_with(p.slab.fill_body, (
                p, slab, from_c, channels, rows_table, listed, first_column * p.slab.width.stride, table,
            ))  # fmt: skip
        for tap in range(0, p.taps, p.block_taps):
            last_tap = min(tap + p.block_taps, p.taps)
            depth = channels * (last_tap - tap)
            flags = ADD if reduced > 0 or p.operands.add else 0
            if reduced + depth == p.channels * p.taps:
                flags |= (BIAS if p.operands.has_bias else 0) | (RELU if p.operands.relu else 0)
            for start in range(first, last, p.group * columns):
                stop = min(start + p.group * columns, last)
                for panel in range(first_panel, last_panel, p.weight_panels):
                    panel_end = min(panel + p.weight_panels, last_panel)
                    first_o = panel * p.row_channels // p.row_panels
                    weights = offset(w, p.row_channels * reduced + first_o * depth)
                    if p.pack_rows:
                        weights = offset(own_weights, (first_o - task_o) * depth if p.weights_stay else 0)
                    if p.pack_rows and (start == first or not p.weights_stay):
                        tasks.call_with(p.pack_rows, (
                            p.packing, weights, group, panel, panel_end, c, channels, tap, last_tap, tile,
                        ))  # fmt: skip
                    _multiply_panels(
                        p, weights, panel, panel_end, first_panel, depth, start, stop, panels, slab,
                        group * p.input_group + c * p.input.c, channels, tap, last_tap, flags, once, first_row,
                        first_column, y, bias, tile, table,
                    )  # fmt: skip
            reduced += depth
