"""Winograd convolution: 3 x 3 kernels of stride 1 with a quarter (4 x 4 tiles) of the multiplications.

    Y = A^T [ (G w G^T) * (B^T d B) ] A          for every tile of m x m outputs, d its (m + 2) x (m + 2) inputs

summed over channels inside the brackets, which makes (m + 2)^2 matrix products (output channels x channels x tiles),
one for each element xi of the transformed tile (Lavin and Gray 2016). All of it is fused for a block of tiles that
stays in L2: the inputs of the block go through the slab and the panels of `implicit_gemm` as if this were a kernel of
m + 2 taps and stride m, each panel row of tiles is transformed into U[xi][channel][tile], the microkernel multiplies it
with the transformed weights V[xi][channel][row], and the result goes through the output transform straight into the
output.

An infinite or nan input spreads over its whole tile here, beyond the windows that hold it, and large finite inputs may
overflow on the way. So every output is looked at before it is stored, and a sample with an infinite or nan output is
computed again by the direct sum, which has the right ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..geometry import ConvGeometry
from . import tasks
from .implicit_gemm.blocks import SLAB_BYTES, Axis, Blocks, slab_shape
from .implicit_gemm.panels import find_runs
from .implicit_gemm.parameters import Correlation
from .implicit_gemm.plan import Plan, microkernels, plan_correlation
from .implicit_gemm.slab import find_rows
from .jit import helper
from .records import Integer, Integers, Reals, copy_of
from .vector import move
from .vector import tile as machine
from .vector.gemm import ADD, contract_packed, pack_panel, run_stride, run_table_stride
from .vector.memory import at, fill_zero, integers_at, no_inline, offset, pointer_address
from .vector.tile import tile
from .vector.winograd import transform_input, transform_output, transform_weight


class Tiles(Correlation):
    """Parameters beyond those of the direct sum, whose pixels are the tiles here."""

    m: Integer  # outputs of a tile in each dimension
    points: Integer
    image_h: Integer
    image_w: Integer
    block: Integer  # panels of tiles that are transformed before they are multiplied
    row_group: Integer  # panels of output channels whose products are transformed together
    u_pitch: Integer  # from point to point of the transformed inputs
    u_elements: Integer  # parts of the scratch memory
    m_elements: Integer
    v_slack: Integer
    suspects: Integers  # of each sample: has it to be computed again?


class Weights(tasks.Parameters):
    """Parameters of transforming weights."""

    w: Reals
    w_end: Integer  # the address behind the last element
    row_step: Integer
    channel_step: Integer
    tap_offset: Integers
    contiguous: Integer  # are the taps of a kernel neighbours in memory?
    backwards: Integer  # are they taken from the last to the first?
    v: Reals
    rows: Integer
    channels: Integer
    panels: Integer
    m: Integer


# Channels added in one chain: the sums here are larger than the results, and round accordingly. 16 to 24 give the
# least error from 64 to 512 channels; 24 costs 3 % over 32.
CHAIN = 24
_SLACK = 32  # elements after each V[xi], where whole-vector stores may end
_U_BYTES = 1024 * 1024  # transformed inputs of a block of tiles, if more than one panel of them
_M_BYTES = 192 * 1024


@helper
def _store_tiles(p, y, outputs, tile, end, m):
    """Put the outputs [row of the tile][tile, column of the tile] of tiles tile .. end where they belong in a plane."""
    out_h, out_w = p.out.h, p.out.w
    pitch = machine.columns(outputs) * m
    column = 0
    while tile < end:
        row = tile // out_w
        count = min(end - tile, (row + 1) * out_w - tile)
        n, h, w = row // out_h, row % out_h * m, (tile - row * out_w) * m
        length = min(p.image_w - w, count * m)
        for i in range(min(m, p.image_h - h)):
            target = offset(y, n * p.output.n + (h + i) * p.output.h + w * p.output.w)
            source = offset(outputs, i * pitch + column * m)
            if p.output.w == 1:
                move.copy_span(target, source, length)
            else:
                for k in range(length):
                    target[k * p.output.w] = source[k]
        column += count
        tile += count


@helper
def _transform_inputs(p, u, inputs, slab, channels, tables, panels):
    """U[panel][xi][channel][tile] for the channels that are in the slab."""
    no_inline()
    columns, lanes = machine.columns(slab), machine.lanes(slab)
    table_pitch = columns // lanes * run_table_stride(slab)
    for k in range(channels):
        for q in range(panels):
            table = offset(tables, q * table_pitch)
            pack_panel(inputs, offset(slab, k * p.slab.channel_pitch), 1, 0, p.points, p.tap_offset, table, 0)
            target = offset(u, q * p.points * p.u_pitch + k * columns)
            for lane in range(0, columns, lanes):
                transform_input(p.m, offset(target, lane), p.u_pitch, offset(inputs, lane), columns)


@helper
def _multiply(p, products, u, group, group_end, tiles):
    """M[panel][xi][row][tile] of a group of panels of output channels, for one panel of tiles."""
    no_inline()
    columns, lanes, depth = machine.columns(u), machine.lanes(u), p.channels
    vectors, kernels_pitch = (tiles + lanes - 1) // lanes, columns // lanes + 1
    for xi in range(p.points):
        panel = offset(u, xi * p.u_pitch)
        for i in range(group, group_end):
            o = i * p.row_channels // p.row_panels
            rows = (i + 1) * p.row_channels // p.row_panels - o
            v = offset(p.operands.w, p.points * (o * depth + i * p.v_slack))
            v = offset(v, xi * (rows * depth + p.v_slack))
            place = offset(products, ((i - group) * p.points * machine.tile_rows(u) + xi * rows) * columns)
            for c in range(0, depth, CHAIN):
                contract_packed(
                    p.kernels[rows * kernels_pitch + vectors], min(CHAIN, depth - c), offset(v, c * rows),
                    offset(panel, c * columns), place, ADD if c else 0,
                )  # fmt: skip


@helper
def _transform_outputs(p, products, outputs, suspect, group, group_end, tile, end):
    """From M to the outputs of tiles tile .. end, in a group of panels of output channels."""
    no_inline()
    columns, lanes, y, bias = machine.columns(outputs), machine.lanes(outputs), p.operands.y, p.operands.bias
    for i in range(group, group_end):
        o = i * p.row_channels // p.row_panels
        rows = (i + 1) * p.row_channels // p.row_panels - o
        place = offset(products, (i - group) * p.points * machine.tile_rows(outputs) * columns)
        for row in range(rows):
            for first in range(0, end - tile, lanes):
                transform_output(
                    p.m, offset(outputs, first * p.m), columns * p.m, offset(place, row * columns + first),
                    rows * columns, offset(bias, o + row), p.operands.relu, offset(suspect, first),
                )  # fmt: skip
            _store_tiles(p, offset(y, (o + row) * p.output.c), outputs, tile, end, p.m)


@tasks.body(Tiles)
def _winograd(task, worker, p, real):
    """Task = a range of tiles and a range of output channels."""
    slab = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    u = offset(slab, p.slab.elements)
    products = offset(u, p.u_elements)
    inputs = offset(products, p.m_elements)
    columns, lanes = machine.columns(real), machine.lanes(real)
    outputs = offset(inputs, p.points * columns)
    suspect = offset(outputs, p.m * p.m * columns)
    tables = integers_at(p.header.scratch + (worker + 1) * p.header.scratch_bytes - p.table_bytes)
    table_pitch = columns // lanes * run_table_stride(real)
    tables_end = offset(tables, p.block * table_pitch)
    rows_table = offset(tables_end, 4)
    out_h, out_w = p.out.h, p.out.w

    part, block = task % p.row_tasks, task // p.row_tasks
    first_panel, last_panel = part * p.row_panels // p.row_tasks, (part + 1) * p.row_panels // p.row_tasks
    if p.chunks:
        row, chunk = block // p.chunks, block % p.chunks
        first_column = chunk * p.chunk
        first = row * out_w + first_column
        last = min(first + p.chunk, (row + 1) * out_w)
    else:
        all_panels = (p.pixels + columns - 1) // columns
        first_column = 0
        first = block * all_panels // p.pixel_tasks * columns
        last = min((block + 1) * all_panels // p.pixel_tasks * columns, p.pixels)
    if p.padded:
        fill_zero(slab, p.slab.elements)

    for start in range(first, last, p.block * columns):
        stop = min(start + p.block * columns, last)
        first_row, last_row = start // out_w, (stop - 1) // out_w + 1
        panels = (stop - start + columns - 1) // columns
        for q in range(panels):
            tile = start + q * columns
            table = offset(tables, q * table_pitch)
            find_runs(p, table, tile, min(tile + columns, stop), first_row, first_column, real)
        listed = find_rows(p, rows_table, first_row, last_row)
        if start != first and p.padded:
            fill_zero(slab, p.slab.elements)
        for c in range(0, p.channels, p.block_channels):
            channels = min(p.block_channels, p.channels - c)
            tasks.call_with(p.slab.fill_body, (
                p, slab, offset(p.operands.x, c * p.input.c), channels, rows_table, listed,
                first_column * p.slab.width.stride, tables_end,
            ))  # fmt: skip
            _transform_inputs(p, offset(u, c * columns), inputs, slab, channels, tables, panels)
        # some panels of output channels at a time
        fill_zero(suspect, panels * columns)
        for group in range(first_panel, last_panel, p.row_group):
            group_end = min(group + p.row_group, last_panel)
            for q in range(panels):
                tile = start + q * columns
                end = min(tile + columns, stop)
                _multiply(p, products, offset(u, q * p.points * p.u_pitch), group, group_end, end - tile)
                _transform_outputs(p, products, outputs, offset(suspect, q * columns), group, group_end, tile, end)
        for tile in range(start, stop):
            if suspect[tile - start] != 0:
                p.suspects[tile // out_w // out_h] = 1


@tasks.body(Weights)
def _transform_weights(task, worker, p, real):
    """Task = one panel of output channels: V[xi][channel][row] = (G w G^T)[xi]."""
    offsets, step, m, channels = p.tap_offset, p.row_step, p.m, p.channels
    lanes = machine.lanes(real)
    points = (m + 2) * (m + 2)
    o = task * p.rows // p.panels
    rows = (task + 1) * p.rows // p.panels - o
    w = offset(p.w, o * step)
    v = offset(p.v, points * (o * channels + task * _SLACK))
    pitch = rows * channels + _SLACK
    kernels = at(real, p.header.scratch + worker * p.header.scratch_bytes)  # [tap][row]
    flipped = p.contiguous and p.backwards
    for c in range(channels):
        first = (rows - 1) // lanes * lanes
        while first >= 0:  # the last rows first: what they write too much is at the beginning of the next channel
            count = min(lanes, rows - first)
            source = offset(w, c * p.channel_step + first * step)
            taken = 0
            last = offset(source, (count - 1) * step + lanes)
            if p.contiguous and step >= 0 and pointer_address(last) <= p.w_end:
                move.transpose(kernels, lanes, source, step, count, 4 * p.channel_step)
                taken = min(9, lanes)
            for tap in range(taken, 9):
                place = tap if p.contiguous else offsets[tap]
                for k in range(lanes):
                    kernels[tap * lanes + k] = source[min(k, count - 1) * step + place]
            transform_weight(
                m, offset(v, c * rows + first), pitch, offset(kernels, 8 * lanes if flipped else 0),
                -lanes if flipped else lanes,
            )  # fmt: skip
            first -= lanes


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def why_not(operation: str, geometry: ConvGeometry) -> str | None:
    """Why Winograd does not apply; None if it does."""
    if geometry.kernel_size != (1, 3, 3):
        return f"the kernel is {geometry.kernel_size} in (D, H, W) (expected two dimensions and a 3 x 3 kernel)"
    if geometry.input_size[0] != 1 or geometry.output_size[0] != 1:
        return "the convolution is three-dimensional (expected two dimensions)"
    if geometry.stride != (1, 1, 1) or geometry.dilation != (1, 1, 1):
        return "stride and dilation must be 1"
    if geometry.groups != 1:
        return f"groups is {geometry.groups} (expected 1)"
    if operation == "input_grad" and geometry.padding_mode != "zeros":
        return f"the input gradient of padding_mode={geometry.padding_mode!r} is computed directly"
    return None


def tile_size(geometry: ConvGeometry, operation: str) -> int:
    """Outputs of a tile in each dimension, 2 or 4: whichever multiplies less, 2 if equal: it rounds less."""
    size = geometry.input_size if operation == "input_grad" else geometry.output_size

    def cost(m: int) -> int:
        return -(-size[1] // m) * -(-size[2] // m) * (m + 2) ** 2

    return 2 if cost(2) <= cost(4) else 4


def tile_axis(out: int, m: int, source: np.ndarray, before: int, size: int) -> Axis:
    """Tiles of m outputs as the outputs of a correlation with kernels of m + 2 taps and stride m."""
    tiles = -(-out // m)
    needed = tiles * m + 2
    padded = np.full(max(needed, len(source)), -1, np.int64)
    padded[: len(source)] = source
    return Axis(tiles, m + 2, m, 1, padded[:needed].copy(), before, size)


def plan(
    geometry: ConvGeometry, operation: str, dtype: np.dtype, x: tuple[int, ...], y: tuple[int, ...], workers: int
) -> Plan:
    """The plan for arrays of these strides, in elements."""
    t = tile(dtype.itemsize * 8)
    m = tile_size(geometry, operation)
    points = (m + 2) ** 2
    if operation == "forward":
        rows, channels = geometry.out_channels, geometry.in_channels
        image = geometry.output_size
        source = [
            tile_axis(image[i], m, geometry.input_coordinates[i], geometry.pad_before[i], geometry.input_size[i])
            for i in (1, 2)
        ]
    else:  # the correlation of the output gradient with the kernel turned around
        rows, channels = geometry.in_channels, geometry.out_channels
        image = geometry.input_size
        source = []
        for i in (1, 2):
            before = 2 - geometry.pad_before[i]
            p = np.arange(image[i] + 2, dtype=np.int64) - before
            table = np.where((p >= 0) & (p < geometry.output_size[i]), p, -1)
            source.append(tile_axis(image[i], m, table, before, geometry.output_size[i]))
    one = Axis(1, 1, 1, 1, np.zeros(1, np.int64), 0, 1)
    axes = (one, *source)
    u_pitch = channels * t.columns + 16
    block = max(1, _U_BYTES // (points * u_pitch * dtype.itemsize))
    block = min(block, -(-geometry.batch * axes[1].out * axes[2].out // t.columns))
    slab = slab_shape(axes, block * t.columns, 1, t.columns)
    block_channels = max(1, min(channels, SLAB_BYTES // (slab.channel * dtype.itemsize)))
    blocks = Blocks(1, rows, channels, points, block_channels, points, -(-rows // t.rows))
    zeros = operation == "input_grad" or geometry.padding_mode == "zeros"
    tiles = plan_correlation(dtype, geometry.batch, blocks, axes, x, y, zeros, False, workers, block)

    row_group = max(1, min(blocks.panels, _M_BYTES // (points * t.rows * t.columns * dtype.itemsize)))
    u_size = block * points * u_pitch
    m_size = row_group * points * t.rows * t.columns
    slab = slab_shape(axes, block * t.columns, geometry.batch, t.columns)
    table_bytes = -(-(block * t.vectors * run_stride(t.lanes) + 4 + slab.table) * 8 // 64) * 64
    p = Tiles.beginning_with(tiles.parameters)
    p.panel_elements, p.table_bytes = 0, table_bytes
    p.kernels = microkernels(dtype, rows, blocks.panels, False)
    p.m, p.points, p.image_h, p.image_w, p.block, p.row_group = m, points, image[1], image[2], block, row_group
    p.u_pitch, p.u_elements, p.m_elements, p.v_slack = u_pitch, u_size, m_size, _SLACK
    elements = int(p.slab.elements) + u_size + m_size + (points + m * m + block) * t.columns
    return replace(tiles, parameters=np.asarray(p), scratch=elements * dtype.itemsize + table_bytes)


def transformed_size(rows: int, channels: int, m: int, dtype: np.dtype) -> int:
    """Elements of the transformed weights."""
    panels = -(-rows // tile(dtype.itemsize * 8).rows)
    return (m + 2) ** 2 * (rows * channels + panels * _SLACK)


def transform_weights(
    weight: np.ndarray, dtype: np.dtype, operation: str, m: int, strides: tuple[int, ...], keep: bool = False
) -> np.ndarray:
    """V for the forward pass or the input gradient, [panel of rows][xi][channel][row]; in a workspace unless `keep`."""
    t = tile(dtype.itemsize * 8)
    out_step, in_step, _, *steps = strides
    offsets = (np.arange(3)[:, None] * steps[0] + np.arange(3) * steps[1]).ravel().astype(np.int64)
    contiguous = np.array_equal(offsets, np.arange(9))
    if operation == "forward":
        rows, channels, row_step, channel_step = *weight.shape[:2], out_step, in_step
    else:
        channels, rows, channel_step, row_step = *weight.shape[:2], out_step, in_step
        if not contiguous:
            offsets = offsets[::-1].copy()
        else:
            offsets = np.zeros(9, np.int64)  # read forwards, used backwards
    panels = -(-rows // t.rows)
    size = transformed_size(rows, channels, m, dtype)
    v = np.empty(size, dtype) if keep else tasks.workspace(size, dtype)
    p = Weights.of(
        w=tasks.data_address(weight), w_end=np.lib.array_utils.byte_bounds(weight)[1], row_step=row_step,
        channel_step=channel_step, tap_offset=tasks.data_address(offsets), contiguous=contiguous,
        backwards=operation == "input_grad", v=tasks.data_address(v), rows=rows, channels=channels, panels=panels, m=m,
    )  # fmt: skip
    scratch = max(9, t.lanes) * t.lanes * dtype.itemsize
    tasks.run(_transform_weights, dtype, panels, p, scratch, 16 * v.size)
    return v


def run(
    plan: Plan, input: np.ndarray, v: np.ndarray, bias: np.ndarray | None, relu: bool, out: np.ndarray
) -> np.ndarray:
    """Fill `out`; return the samples (bool) that have to be computed again by the direct sum."""
    if bias is None:
        bias = np.zeros(out.shape[1], out.dtype)
    flags = np.zeros(len(out), np.int64)
    parameters = copy_of(plan.parameters)
    parameters["operands"] = (
        tasks.data_address(input), tasks.data_address(v), tasks.data_address(out), tasks.data_address(bias), True, relu,
        False,
    )  # fmt: skip
    parameters["suspects"] = tasks.data_address(flags)
    tasks.run(_winograd, out.dtype, plan.tasks, parameters, plan.scratch, plan.flops)
    return flags != 0
