"""The weight gradient by Winograd: the forward algorithm of `winograd`, turned around.

    dw = G^T [ sum over tiles of (B^T d B) * (A dy A^T) ] G

with dy a tile of m x m output gradients and d its (m + 2) x (m + 2) inputs. It is the derivative of
y = A^T [(G w G^T) * (B^T d B)] A with respect to w (Lavin and Gray 2016 have the forward pass). Where the definition
multiplies each element of dy with 9 of d, this takes (m + 2)^2 products a tile: a quarter for m = 4. The sum over the
tiles of all samples makes a matrix product of each element xi of the transformed tile:

    U[xi][tile][channel] = B^T d B,  V[xi][tile][output channel] = A dy A^T,  M[xi][channel][output channel] += U^T V

A task has a block of channels, a block of output channels, and a part of the tiles, which it goes through some rows of
tiles at a time: both operands are transposed, so that channels are the lanes of vectors, and transformed into U and V;
`gemm.weight_gradient_kernel`, the microkernel of the direct weight gradient, adds their product to M, which stays in
the cache. At the end M becomes the gradient of the kernels.

An infinite or nan operand, or an overflow on the way, makes the result infinite or nan, and spreads over all nine taps
of a kernel, some of which may not meet it. So every element is looked at before it is stored, and if one of them is
infinite or nan the direct sum computes all of them again.
"""

from __future__ import annotations

import math

import numpy as np

from ..geometry import ConvGeometry
from . import tasks
from .implicit_gemm.blocks import Strides
from .implicit_gemm.gradient import store_gradient, sum_splits
from .implicit_gemm.parameters import Strides as Steps
from .implicit_gemm.parameters import WeightGradient, as_weight_gradient
from .implicit_gemm.plan import Plan
from .jit import helper
from .records import Integer, Integers, Record, copy_of
from .tasks import data_address
from .vector import move
from .vector import tile as machine
from .vector.gemm import weight_gradient_kernel
from .vector.memory import at, fill_zero, no_inline, offset
from .vector.tile import Tile, tile
from .vector.winograd import transform_output_gradient, transform_pixels, transform_weight_gradient
from .winograd import tile_axis, tile_size


class Image(Record):
    """The input, or the gradient of the output, whose tiles are transformed."""

    step: Steps
    source_h: Integers  # which element stands at a padded coordinate: see `implicit_gemm.Axis`
    source_w: Integers
    before_w: Integer
    elements_w: Integer
    only_zeros: Integer  # is everything around it zero?
    span: Integer  # pixels of a tile in each dimension


class Gradient(WeightGradient):
    """Parameters beyond those of the direct weight gradient."""

    tiles_h: Integer  # tiles of a sample, down and across
    tiles_w: Integer
    all_rows: Integer  # rows of tiles of all samples
    m: Integer  # outputs of a tile in each dimension
    u_row: Integer  # rows of U and V (the tiles of a unit) and their pitch for xi
    u_pitch: Integer
    v_pitch: Integer
    m_pitch: Integer
    u_elements: Integer  # parts of the scratch memory
    v_elements: Integer
    m_elements: Integer
    pixels_elements: Integer
    suspects: Integers  # where to say that the direct sum is needed
    image: Image
    gradient: Image


@helper
def _take_pixels(d, pixels, plane, channels, first_h, height, first_w, width):
    """pixels[i][j][lane] = channel `lane` at the padded coordinates (first_h + i, first_w + j) of a plane."""
    no_inline()
    lanes, step, channel_step = machine.lanes(pixels), d.step.w, d.step.c
    source_h, source_w = d.source_h, d.source_w
    low = max(d.before_w, first_w)
    count = max(0, min(d.before_w + d.elements_w, first_w + width) - low)
    low -= first_w
    for i in range(height):
        row = offset(pixels, i * width * lanes)
        if source_h[first_h + i] < 0:
            fill_zero(row, width * lanes)
            continue
        line = offset(plane, source_h[first_h + i] * d.step.h)
        source = offset(line, (low + first_w - d.before_w) * step)
        target = offset(row, low * lanes)
        if step == 1:
            for k in range(0, count, lanes):
                if channels == lanes:
                    move.transpose_start(
                        offset(target, k * lanes), offset(source, k), channel_step, min(lanes, count - k)
                    )
                else:
                    move.transpose_block(
                        offset(target, k * lanes), lanes, offset(source, k), channel_step, channels,
                        min(lanes, count - k),
                    )  # fmt: skip
        elif channel_step == 1 and count > 0:
            move.copy_block(target, lanes, source, step, count, channels)
        else:
            for k in range(count):
                for lane in range(channels):
                    target[k * lanes + lane] = source[k * step + lane * channel_step]
        left, right = min(low, width), min(low, width) + count
        fill_zero(row, left * lanes)
        fill_zero(offset(row, right * lanes), (width - right) * lanes)
        if not d.only_zeros:
            for j in range(width):
                from_w = source_w[first_w + j]
                if (j < left or j >= right) and from_w >= 0:
                    for lane in range(channels):
                        row[j * lanes + lane] = line[from_w * step + lane * channel_step]


@helper
def _transform(p, d, source, channels, target, tile_pitch, xi_pitch, pixels, first_row, last_row, first_column, width):
    """target[xi * xi_pitch + tile * tile_pitch + channel] for rows of `width` tiles: B^T d B, or A dy A^T."""
    no_inline()
    m, tiles_h, span, lanes = p.m, p.tiles_h, d.span, machine.lanes(pixels)
    pixel_width = (width - 1) * m + span
    for first in range(0, channels, lanes):
        if channels - first < lanes:  # those that are not there are added up too
            fill_zero(pixels, p.pixels_elements)
        row, place = first_row, offset(target, first)
        while row < last_row:  # those of one sample
            n, h = row // tiles_h, row % tiles_h
            rows = min(last_row - row, tiles_h - h)
            _take_pixels(
                d, pixels, offset(source, n * d.step.n + first * d.step.c), min(lanes, channels - first), h * m,
                (rows - 1) * m + span, first_column * m, pixel_width,
            )  # fmt: skip
            for i in range(rows):
                for j in range(width):
                    tile, pitch = offset(pixels, (i * pixel_width + j) * m * lanes), pixel_width * lanes
                    if span == m:
                        transform_output_gradient(m, place, xi_pitch, tile, pitch)
                    else:
                        transform_pixels(m, place, xi_pitch, tile, pitch)
                    place = offset(place, tile_pitch)
            row += rows


# One function: what the three steps of a part of the tiles share is most of its variables.
@tasks.body(Gradient)
def _gradient(task, worker, p, real):
    """Task = a block of channels, a block of output channels, and a part of the tiles."""
    m, lanes = p.m, machine.lanes(real)
    points = (m + 2) * (m + 2)
    u = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    v = offset(u, p.u_elements)
    sums = offset(v, p.v_elements)
    suspect = offset(sums, p.m_elements)
    pixels = offset(suspect, lanes)
    row_offset = p.row_offset  # 0, 1, 2, ...
    tiles_w = p.tiles_w

    split, rest = task % p.splits, task // p.splits
    out_block, block = rest % p.out_blocks, rest // p.out_blocks
    first_channel = block * p.channels // p.channel_blocks
    channels = (block + 1) * p.channels // p.channel_blocks - first_channel
    first_panel = out_block * p.vector_panels // p.out_blocks
    last_panel = (out_block + 1) * p.vector_panels // p.out_blocks
    first_vector = first_panel * p.vectors // p.vector_panels
    last_vector = last_panel * p.vectors // p.vector_panels
    row_panels = (channels + machine.gradient_rows(real) - 1) // machine.gradient_rows(real)
    x_fields, dy_fields = p.image, p.gradient
    x = offset(p.operands.x, first_channel * x_fields.step.c)
    dy = p.operands.dy
    fill_zero(sums, p.m_elements + lanes)  # and what is suspect

    for unit in range(split * p.units // p.splits, (split + 1) * p.units // p.splits):
        # a unit is some whole rows of tiles, or a piece of a long one
        if p.chunks:
            first_row, first_column = unit // p.chunks, unit % p.chunks * p.chunk
            last_row = first_row + 1
            width = min(p.chunk, tiles_w - first_column)
        else:
            first_row, first_column = unit * p.unit_rows, 0
            last_row = min(first_row + p.unit_rows, p.all_rows)
            width = tiles_w
        _transform(
            p, x_fields, x, channels, u, p.u_row, p.u_pitch, pixels, first_row, last_row, first_column, width
        )
        for panel in range(first_panel, last_panel):
            first = panel * p.vectors // p.vector_panels
            vectors = (panel + 1) * p.vectors // p.vector_panels - first
            row = vectors * lanes
            _transform(
                p, dy_fields, offset(dy, first * lanes * dy_fields.step.c),
                min(row, p.row_channels - first * lanes), v, row, p.v_pitch * row + lanes, pixels, first_row,
                last_row, first_column, width,
            )  # fmt: skip
            part = offset(sums, (first - first_vector) * lanes * (p.m_pitch + 1) * points)
            for xi in range(points):
                for i in range(row_panels):
                    c = i * channels // row_panels
                    rows = (i + 1) * channels // row_panels - c
                    products = offset(part, xi * (p.m_pitch * row + lanes) + c * row)
                    weight_gradient_kernel(
                        rows, vectors, 1, row_offset, (last_row - first_row) * width, p.u_row,
                        offset(u, xi * p.u_pitch + c), row_offset,
                        offset(v, xi * (p.v_pitch * row + lanes)), products, row,
                        offset(products, rows * row), lanes, lanes * lanes,  # the next ones are asked for
                    )  # fmt: skip

    # u and v are needed no more: their memory takes the kernels, [vector panel][(channel, tap)][column]
    for panel in range(first_panel, last_panel):
        first = panel * p.vectors // p.vector_panels
        row = ((panel + 1) * p.vectors // p.vector_panels - first) * lanes
        part = offset(sums, (first - first_vector) * lanes * (p.m_pitch + 1) * points)
        kernels = offset(u, (first - first_vector) * lanes * channels * 9)
        for c in range(channels):
            for vector in range(0, row, lanes):
                transform_weight_gradient(
                    m, offset(kernels, c * 9 * row + vector), row, offset(part, c * row + vector),
                    p.m_pitch * row + lanes, suspect,
                )  # fmt: skip
    for lane in range(lanes):
        if suspect[lane] != 0:
            p.suspects[0] = 1
    if p.splits == 1:
        store_gradient(
            as_weight_gradient(p), u, 0, first_channel, channels * 9, first_vector, last_vector, p.operands.dw
        )
    else:
        size = channels * 9 * (last_vector - first_vector) * lanes
        move.copy_span(offset(p.operands.partial, task * p.tile_elements), u, size)


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------

# Tiles that are multiplied at a time, by the size of an element, and most of M of a task: all the memory of a task is
# less than 2 MiB. 64 tiles and 640 KiB are 0 to 5 % slower for large layers, 32 tiles 1 to 6 %.
_UNIT_TILES = {4: 44, 8: 28}
_SUMS_BYTES = 1200 * 1024
_PARTIAL_BYTES = 2 * 1024 * 1024  # most memory for the kernels of parts of the tiles, of all threads
_TASKS = 16  # enough to share out evenly; a fixed number, so that the bits do not depend on the threads
_WORTH_SHARING = 3_000_000  # operations: fewer take longer in several tasks than in one
# Vector operations of transforming `lanes` channels of a tile of the input, and of the output gradient; and of `lanes`
# kernels at the end, for a tile of m = 4.
_INPUT_COST, _OUTPUT_COST, _KERNEL_COST = 400, 300, 300


def _cut(geometry: ConvGeometry, m: int, units: int, tiles: int, t: Tile, size: int) -> tuple[int, int, int]:
    """Into how many blocks the input channels, the output channels and the units of tiles are cut.

    Each block of input channels transforms the output gradient again, each block of output channels the input, and each
    part of the tiles has kernels of its own. Of all cuts whose sums fit the cache this is the one that costs least.
    """
    channels, vectors = geometry.in_channels, -(-geometry.out_channels // t.lanes)
    points = (m + 2) ** 2
    vector_panels = -(-vectors // t.gradient_vectors)
    most_splits = max(1, _PARTIAL_BYTES // (9 * channels * vectors * t.lanes * size))
    best: tuple[float, int, int, int] = (math.inf, 1, 1, 1)
    for out_blocks in range(1, vector_panels + 1):
        out_vectors = min(vectors, -(-vector_panels // out_blocks) * t.gradient_vectors)
        most = max(1, _SUMS_BYTES // (points * out_vectors * t.lanes * size))
        least_blocks = -(-channels // most)
        for channel_blocks in range(least_blocks, min(channels, 4 * least_blocks + 16) + 1):
            blocks = out_blocks * channel_blocks
            splits = min(units, -(-_TASKS // blocks), most_splits)
            rows = -(-channels // channel_blocks)
            cost: float = (
                _INPUT_COST * out_blocks * channel_blocks * -(-rows // t.lanes) * tiles
                + _OUTPUT_COST * channel_blocks * vectors * tiles
                + _KERNEL_COST * splits * channels * vectors
                + points * vectors * tiles * channel_blocks * -(-rows // t.gradient_rows) * t.gradient_rows
            )
            if 2 * points * tiles * channels * vectors * t.lanes > _WORTH_SHARING:
                cost *= 1 + max(0, _TASKS - blocks * splits) / (8 * blocks * splits)  # threads without a task
            best = min(best, (cost, channel_blocks, out_blocks, splits))
    return best[1:]


def plan(geometry: ConvGeometry, dtype: np.dtype, x: Strides, dy: Strides, dw: Strides) -> Plan:
    """The plan for arrays of these strides, in elements."""
    t = tile(dtype.itemsize * 8)
    size = dtype.itemsize
    m = tile_size(geometry, "weight_grad")
    points = (m + 2) ** 2
    batch, out_size = geometry.batch, geometry.output_size
    inputs = [
        tile_axis(out_size[i], m, geometry.input_coordinates[i], geometry.pad_before[i], geometry.input_size[i])
        for i in (1, 2)
    ]
    outputs = [tile_axis(out_size[i], m, np.arange(out_size[i]), 0, out_size[i]) for i in (1, 2)]
    tiles_h, tiles_w = (axis.out for axis in inputs)
    rows = batch * tiles_h
    most_tiles = _UNIT_TILES[size]
    if tiles_w > most_tiles:
        chunk = -(-tiles_w // -(-tiles_w // most_tiles))
        unit_rows, chunks = 1, -(-tiles_w // chunk)
        units = rows * chunks
    else:
        chunk = chunks = 0
        units = -(-rows // (most_tiles // tiles_w))
        unit_rows = -(-rows // units)
        units = -(-rows // unit_rows)
    width = chunk or tiles_w

    vectors = -(-geometry.out_channels // t.lanes)
    vector_panels = -(-vectors // t.gradient_vectors)
    channel_blocks, out_blocks, splits = _cut(geometry, m, units, rows * tiles_w, t, size)
    block = -(-geometry.in_channels // channel_blocks)
    block_width = min(vectors, -(-vector_panels // out_blocks) * t.gradient_vectors) * t.lanes
    u_row = -(-block // t.lanes) * t.lanes
    u_pitch, v_pitch = unit_rows * width * u_row + 16, unit_rows * width
    u_size = points * u_pitch
    v_size = points * (v_pitch * min(vectors, t.gradient_vectors) + 1) * t.lanes
    m_size = points * (block + 1) * block_width
    kernels = block * 9 * block_width
    v_size += max(0, -(-(kernels - u_size - v_size) // 16) * 16)
    # rows of pixels of a sample's tiles, and what `transpose_start` writes too much
    pixels_size = (((min(unit_rows, tiles_h) - 1) * m + m + 2) * ((width - 1) * m + m + 2) + t.lanes) * t.lanes
    offsets = (np.arange(3)[:, None] * dw[3] + np.arange(3) * dw[4]).ravel().astype(np.int64)
    row_offset = np.arange(t.gradient_rows, dtype=np.int64)

    p = Gradient.zeros()
    p.tiles_h, p.tiles_w, p.all_rows, p.m, p.chunk, p.chunks = tiles_h, tiles_w, rows, m, chunk, chunks
    p.taps, p.row_channels, p.channels = 9, geometry.out_channels, geometry.in_channels
    p.dw, p.tap_offset = (0, *dw[:2]), data_address(offsets)
    p.consecutive = dw[1] == 9 and np.array_equal(offsets, np.arange(9))
    p.row_offset, p.unit_rows, p.units, p.splits = data_address(row_offset), unit_rows, units, splits
    p.channel_blocks, p.out_blocks, p.vectors, p.vector_panels = channel_blocks, out_blocks, vectors, vector_panels
    p.u_row, p.u_pitch, p.v_pitch, p.m_pitch, p.tile_elements = u_row, u_pitch, v_pitch, block, kernels
    p.u_elements, p.v_elements, p.m_elements, p.pixels_elements = u_size, v_size, m_size, pixels_size
    for name, strides, (down, across), zeros, span in (
        ("image", x, inputs, geometry.padding_mode == "zeros", m + 2), ("gradient", dy, outputs, True, m)
    ):  # fmt: skip
        p[name] = (
            strides, data_address(down.source), data_address(across.source), across.before, across.size, zeros, span,
        )  # fmt: skip
    scratch = (u_size + v_size + m_size + t.lanes + pixels_size) * size
    flops = 2 * points * rows * tiles_w * geometry.in_channels * geometry.out_channels
    tables = (offsets, row_offset, *(axis.source for axis in (*inputs, *outputs)))
    return Plan(np.asarray(p), tables, channel_blocks * out_blocks * splits, scratch, flops)


def partial_size(plan: Plan) -> int:
    """Elements of the kernels of all parts of the tiles; 0 if there is one part."""
    return plan.tasks * int(plan.parameters["tile_elements"]) if plan.parameters["splits"] > 1 else 0


def run(plan: Plan, x: np.ndarray, dy: np.ndarray, dw: np.ndarray) -> bool:
    """Fill `dw`; return False if the direct sum has to do so instead."""
    parameters = copy_of(plan.parameters)
    needed = np.zeros(1, np.int64)
    partial = np.empty(partial_size(plan), dw.dtype)
    parameters["operands"] = data_address(x), data_address(dy), data_address(dw), False, data_address(partial)
    parameters["suspects"] = data_address(needed)
    stages: list[tasks.Stage] = [(_gradient, plan.tasks, parameters, plan.scratch, plan.flops, 0)]
    if partial.size:
        blocks = plan.tasks // int(parameters["splits"])
        stages.append((sum_splits, blocks, copy_of(parameters), 64, 16 * partial.size, 1))
    tasks.run_stages(dw.dtype, stages)
    return not needed[0]
