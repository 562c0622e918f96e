"""The weight gradient by Winograd: the forward algorithm of `winograd`, turned around.

    dw = G^T [ sum over tiles of (B^T d B) * (A dy A^T) ] G

with dy a tile of m x m output gradients and d its (m + 2) x (m + 2) inputs. It is the derivative of
y = A^T [(G w G^T) * (B^T d B)] A with respect to w (Lavin and Gray 2016 have the forward pass). Where the definition
multiplies each element of dy with 9 of d, this takes (m + 2)^2 products a tile: a quarter for m = 4. The sum over the
tiles of all samples makes a matrix product of each element xi of the transformed tile:

    U[xi][tile][channel] = B^T d B,  V[xi][tile][output channel] = A dy A^T,  M[xi][channel][output channel] += U^T V

A task has a block of channels, a block of output channels, and a part of the tiles, which it goes through some rows of
tiles at a time: both operands are transposed, so that channels are the lanes of vectors, and transformed into U and V;
`weight_gradient_kernel`, the microkernel of the direct weight gradient, adds their product to M, which stays in the
cache. At the end M becomes the gradient of the kernels.

An infinite or nan operand, or an overflow on the way, makes the result infinite or nan, and spreads over all nine taps
of a kernel, some of which may not meet it. So every element is looked at before it is stored, and if one of them is
infinite or nan the direct sum computes all of them again.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from ..geometry import ConvGeometry
from . import contraction, tasks
from .contraction import (
    BIAS,
    CHANNEL_BLOCKS,
    CHANNELS,
    CHUNK,
    CHUNKS,
    GRADIENT_END,
    OUT_BLOCKS,
    PARTIAL,
    ROW_CHANNELS,
    ROW_OFFSET,
    SPLITS,
    TAPS,
    TILE_SIZE,
    UNIT_ROWS,
    UNITS,
    VECTOR_PANELS,
    VECTORS,
    W_C,
    W_FLAT,
    W_GROUP,
    W_O,
    W_TAP_OFFSET,
    Strides,
    W,
    X,
    Y,
)  # fmt: skip
from .jit import helper as _jit
from .vector import tile as machine
from .vector.gemm import weight_gradient_kernel
from .vector.memory import at, fill_zero, no_inline, offset
from .vector.move import copy_block, copy_span, transpose_block, transpose_start
from .vector.winograd import transform_output_gradient, transform_pixels, transform_weight_gradient
from .winograd import tile_axis, tile_size

# Parameters beyond those of the direct weight gradient: the tiles of a sample, down and across; the outputs of a tile;
# rows of U and V (the tiles of a unit) and their pitch for xi; the parts of the scratch memory; where to say that the
# direct sum is needed; and of the input and the output gradient the fields below.
(
    TILES_H, TILES_W, ALL_ROWS, OUTPUTS, U_ROW, U_PITCH, V_PITCH, M_PITCH, U_SIZE, V_SIZE, M_SIZE, PIXELS_SIZE, FLAGS,
    INPUT,
) = range(GRADIENT_END, GRADIENT_END + 14)  # fmt: skip
STEP_N, STEP_C, STEP_H, STEP_W, SOURCE_H, SOURCE_W, BEFORE_W, SIZE_W, ZEROS, SPAN, FIELDS = range(11)
OUTPUT = INPUT + FIELDS
END = OUTPUT + FIELDS


@_jit
def _take_pixels(d, pixels, plane, channels, first_h, height, first_w, width):
    """pixels[i][j][lane] = channel `lane` at the padded coordinates (first_h + i, first_w + j) of a plane."""
    no_inline()
    lanes, step, channel_step = machine.lanes(pixels), d[STEP_W], d[STEP_C]
    source_h, source_w = at(d, d[SOURCE_H]), at(d, d[SOURCE_W])
    low = max(d[BEFORE_W], first_w)
    count = max(0, min(d[BEFORE_W] + d[SIZE_W], first_w + width) - low)
    low -= first_w
    for i in range(height):
        row = offset(pixels, i * width * lanes)
        if source_h[first_h + i] < 0:
            fill_zero(row, width * lanes)
            continue
        line = offset(plane, source_h[first_h + i] * d[STEP_H])
        source = offset(line, (low + first_w - d[BEFORE_W]) * step)
        target = offset(row, low * lanes)
        if step == 1:
            for k in range(0, count, lanes):
                if channels == lanes:
                    transpose_start(
                        offset(target, k * lanes), offset(source, k), channel_step, min(lanes, count - k)
                    )
                else:
                    transpose_block(
                        offset(target, k * lanes), lanes, offset(source, k), channel_step, channels,
                        min(lanes, count - k),
                    )  # fmt: skip
        elif channel_step == 1 and count > 0:
            copy_block(target, lanes, source, step, count, channels)
        else:
            for k in range(count):
                for lane in range(channels):
                    target[k * lanes + lane] = source[k * step + lane * channel_step]
        left, right = min(low, width), min(low, width) + count
        fill_zero(row, left * lanes)
        fill_zero(offset(row, right * lanes), (width - right) * lanes)
        if not d[ZEROS]:
            for j in range(width):
                from_w = source_w[first_w + j]
                if (j < left or j >= right) and from_w >= 0:
                    for lane in range(channels):
                        row[j * lanes + lane] = line[from_w * step + lane * channel_step]


@_jit
def _transform(p, d, source, channels, target, tile_pitch, xi_pitch, pixels, first_row, last_row, first_column, width):
    """target[xi * xi_pitch + tile * tile_pitch + channel] for rows of `width` tiles: B^T d B, or A dy A^T."""
    no_inline()
    m, tiles_h, span, lanes = p[OUTPUTS], p[TILES_H], d[SPAN], machine.lanes(pixels)
    pixel_width = (width - 1) * m + span
    for first in range(0, channels, lanes):
        if channels - first < lanes:  # those that are not there are added up too
            fill_zero(pixels, p[PIXELS_SIZE])
        row, place = first_row, offset(target, first)
        while row < last_row:  # those of one sample
            n, h = row // tiles_h, row % tiles_h
            rows = min(last_row - row, tiles_h - h)
            _take_pixels(
                d, pixels, offset(source, n * d[STEP_N] + first * d[STEP_C]), min(lanes, channels - first), h * m,
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


@tasks.Body
def _gradient(task, worker, p, real):
    """Task = a block of channels, a block of output channels, and a part of the tiles."""
    m, lanes = p[OUTPUTS], machine.lanes(real)
    points = (m + 2) * (m + 2)
    u = at(real, p[tasks.SCRATCH] + worker * p[tasks.SCRATCH_BYTES])
    v = offset(u, p[U_SIZE])
    sums = offset(v, p[V_SIZE])
    suspect = offset(sums, p[M_SIZE])
    pixels = offset(suspect, lanes)
    row_offset = at(p, p[ROW_OFFSET])  # 0, 1, 2, ...
    tiles_w = p[TILES_W]

    split, rest = task % p[SPLITS], task // p[SPLITS]
    out_block, block = rest % p[OUT_BLOCKS], rest // p[OUT_BLOCKS]
    first_channel = block * p[CHANNELS] // p[CHANNEL_BLOCKS]
    channels = (block + 1) * p[CHANNELS] // p[CHANNEL_BLOCKS] - first_channel
    first_panel = out_block * p[VECTOR_PANELS] // p[OUT_BLOCKS]
    last_panel = (out_block + 1) * p[VECTOR_PANELS] // p[OUT_BLOCKS]
    first_vector = first_panel * p[VECTORS] // p[VECTOR_PANELS]
    last_vector = last_panel * p[VECTORS] // p[VECTOR_PANELS]
    row_panels = (channels + machine.gradient_rows(real) - 1) // machine.gradient_rows(real)
    x_fields, dy_fields = offset(p, INPUT), offset(p, OUTPUT)
    x = offset(at(real, p[X]), first_channel * x_fields[STEP_C])
    dy = at(real, p[Y])
    fill_zero(sums, p[M_SIZE] + lanes)  # and what is suspect

    for unit in range(split * p[UNITS] // p[SPLITS], (split + 1) * p[UNITS] // p[SPLITS]):
        # a unit is some whole rows of tiles, or a piece of a long one
        if p[CHUNKS]:
            first_row, first_column = unit // p[CHUNKS], unit % p[CHUNKS] * p[CHUNK]
            last_row = first_row + 1
            width = min(p[CHUNK], tiles_w - first_column)
        else:
            first_row, first_column = unit * p[UNIT_ROWS], 0
            last_row = min(first_row + p[UNIT_ROWS], p[ALL_ROWS])
            width = tiles_w
        _transform(
            p, x_fields, x, channels, u, p[U_ROW], p[U_PITCH], pixels, first_row, last_row, first_column, width
        )
        for panel in range(first_panel, last_panel):
            first = panel * p[VECTORS] // p[VECTOR_PANELS]
            vectors = (panel + 1) * p[VECTORS] // p[VECTOR_PANELS] - first
            row = vectors * lanes
            _transform(
                p, dy_fields, offset(dy, first * lanes * dy_fields[STEP_C]),
                min(row, p[ROW_CHANNELS] - first * lanes), v, row, p[V_PITCH] * row + lanes, pixels, first_row,
                last_row, first_column, width,
            )  # fmt: skip
            part = offset(sums, (first - first_vector) * lanes * (p[M_PITCH] + 1) * points)
            for xi in range(points):
                for i in range(row_panels):
                    c = i * channels // row_panels
                    rows = (i + 1) * channels // row_panels - c
                    products = offset(part, xi * (p[M_PITCH] * row + lanes) + c * row)
                    weight_gradient_kernel(
                        rows, vectors, 1, row_offset, (last_row - first_row) * width, p[U_ROW],
                        offset(u, xi * p[U_PITCH] + c), row_offset,
                        offset(v, xi * (p[V_PITCH] * row + lanes)), products, row,
                        offset(products, rows * row), lanes, lanes * lanes,  # the next ones are asked for
                    )  # fmt: skip

    # u and v are needed no more: their memory takes the kernels, [vector panel][(channel, tap)][column]
    for panel in range(first_panel, last_panel):
        first = panel * p[VECTORS] // p[VECTOR_PANELS]
        row = ((panel + 1) * p[VECTORS] // p[VECTOR_PANELS] - first) * lanes
        part = offset(sums, (first - first_vector) * lanes * (p[M_PITCH] + 1) * points)
        kernels = offset(u, (first - first_vector) * lanes * channels * 9)
        for c in range(channels):
            for vector in range(0, row, lanes):
                transform_weight_gradient(
                    m, offset(kernels, c * 9 * row + vector), row, offset(part, c * row + vector),
                    p[M_PITCH] * row + lanes, suspect,
                )  # fmt: skip
    for lane in range(lanes):
        if suspect[lane] != 0:
            at(p, p[FLAGS])[0] = 1
    if p[SPLITS] == 1:
        contraction._store_gradient(
            p, u, 0, first_channel, channels * 9, first_vector, last_vector, at(real, p[W])
        )
    else:
        size = channels * 9 * (last_vector - first_vector) * lanes
        copy_span(offset(at(real, p[PARTIAL]), task * p[TILE_SIZE]), u, size)


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


def _cut(geometry: ConvGeometry, m: int, units: int, tiles: int, t: machine.Tile, size: int) -> tuple[int, int, int]:
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


@functools.lru_cache(maxsize=1024)
def _plan(geometry: ConvGeometry, dtype: np.dtype, x: Strides, dy: Strides, dw: Strides) -> contraction.Plan:
    """The plan for arrays of these strides, in elements."""
    t = machine.tile(dtype.itemsize * 8)
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

    p = np.zeros(END, np.int64)
    p[[TILES_H, TILES_W, ALL_ROWS, OUTPUTS, CHUNK, CHUNKS]] = tiles_h, tiles_w, rows, m, chunk, chunks
    p[[TAPS, ROW_CHANNELS, CHANNELS]] = 9, geometry.out_channels, geometry.in_channels
    p[[W_GROUP, W_O, W_C, W_TAP_OFFSET]] = 0, dw[0], dw[1], contraction.address(offsets)
    p[W_FLAT] = dw[1] == 9 and np.array_equal(offsets, np.arange(9))
    p[[ROW_OFFSET, UNIT_ROWS, UNITS, SPLITS]] = contraction.address(row_offset), unit_rows, units, splits
    p[[CHANNEL_BLOCKS, OUT_BLOCKS, VECTORS, VECTOR_PANELS]] = channel_blocks, out_blocks, vectors, vector_panels
    p[[U_ROW, U_PITCH, V_PITCH, M_PITCH, TILE_SIZE]] = u_row, u_pitch, v_pitch, block, kernels
    p[[U_SIZE, V_SIZE, M_SIZE, PIXELS_SIZE]] = u_size, v_size, m_size, pixels_size
    for place, strides, (down, across), zeros, span in (
        (INPUT, x, inputs, geometry.padding_mode == "zeros", m + 2), (OUTPUT, dy, outputs, True, m)
    ):  # fmt: skip
        p[place : place + FIELDS] = (
            strides[0], strides[1], strides[3], strides[4], contraction.address(down.source),
            contraction.address(across.source), across.before, across.size, zeros, span,
        )  # fmt: skip
    scratch = (u_size + v_size + m_size + t.lanes + pixels_size) * size
    flops = 2 * points * rows * tiles_w * geometry.in_channels * geometry.out_channels
    tables = (offsets, row_offset, *(axis.source for axis in (*inputs, *outputs)))
    return contraction.Plan(p, tables, channel_blocks * out_blocks * splits, scratch, flops)


def _partial_size(plan: contraction.Plan) -> int:
    """Elements of the kernels of all parts of the tiles; 0 if there is one part."""
    return plan.tasks * int(plan.parameters[TILE_SIZE]) if plan.parameters[SPLITS] > 1 else 0


def workspace(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes that a call takes beside its operands and result."""
    strides = (0,) * 5
    plan = _plan(geometry, dtype, strides, strides, strides)
    return tasks.workers(plan.flops) * plan.scratch + _partial_size(plan) * dtype.itemsize


def run(geometry: ConvGeometry, x: np.ndarray, dy: np.ndarray, dw: np.ndarray, strides: tuple[Strides, ...]) -> bool:
    """Fill `dw`; return False if the direct sum has to do so instead."""
    plan = _plan(geometry, dw.dtype, *strides)
    parameters = plan.parameters.copy()
    needed = np.zeros(1, np.int64)
    parameters[X:BIAS] = contraction.address(x), contraction.address(dw), contraction.address(dy)
    parameters[FLAGS] = contraction.address(needed)
    stages: list[tasks.Stage] = [(_gradient, plan.tasks, parameters, plan.scratch, plan.flops, 0)]
    partial = np.empty(_partial_size(plan), dw.dtype)
    if partial.size:
        parameters[PARTIAL] = contraction.address(partial)
        blocks = plan.tasks // int(parameters[SPLITS])
        stages.append((contraction._sum_splits, blocks, parameters.copy(), 64, 16 * partial.size, 1))
    tasks.run_stages(dw.dtype, stages)
    return not needed[0]
