"""Planning and running `correlate`: the forward pass and the input gradient."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import tasks
from ..records import copy_of
from ..tasks import Body, data_address
from ..vector.gemm import Rows, contract, contract_packed, run_stride
from ..vector.tile import tile
from .blocks import (
    GROUP_BYTES,
    PANELS_PER_TASK,
    SLAB_BYTES,
    Axis,
    Blocks,
    SlabShape,
    Strides,
    are_consecutive,
    ceil_div,
    flatten,
    is_padded,
    slab_shape,
    tap_offsets,
)  # fmt: skip
from .correlate import correlate
from .parameters import Correlation
from .slab import fill_pixels, fill_slab, fill_whole_rows
from .weights import Unpacked, pack_rows

WEIGHT_BYTES = 256 * 1024

# Tasks pack the weights themselves where the panels of all pixels fit L2 together (OWN_GROUP_BYTES), or where their
# weights do (OWN_WEIGHT_BYTES) and packing them in every task is cheaper than waiting for it as a stage of its own.
# With planes of 7 x 7 that takes 3 to 8 % off the forward pass. They are packed OWN_BLOCK_BYTES at a time.
OWN_GROUP_BYTES = 384 * 1024
OWN_WEIGHT_BYTES = 256 * 1024
OWN_BLOCK_BYTES = 128 * 1024
AGAIN_WEIGHTS = 8 * 1024  # elements for each thread


@dataclass(frozen=True)
class Plan:
    """Everything about one call of `correlate`, or of another body with its parameters, but the operands."""

    parameters: np.ndarray  # a record: see `parameters`
    tables: tuple[np.ndarray, ...]  # whose addresses stand in the parameters
    tasks: int
    scratch: int
    flops: int
    packs: bool = False  # the tasks want `Unpacked` weights
    body: Body = correlate


def set_common(
    p: Any, dtype: np.dtype, batch: int, axes: tuple[Axis, ...], slab: SlabShape, x: Strides, y: Strides, zeros: bool,
    in_place: bool,
) -> None:  # fmt: skip
    """The parameters that all passes share: strides, sizes, and where the slab has what."""
    depth, height, width = axes
    out = tuple(a.out for a in axes)
    p.input, p.output, p.out, p.pixels = x, y, out, batch * math.prod(out)
    p.taps, p.padded = math.prod(a.taps for a in axes), is_padded(axes)
    p.plane = math.prod(out) if y[4] == 1 and are_consecutive(out, y[2:]) else 0
    s = p.slab
    s.depth = data_address(depth.source), depth.stride, depth.dilation, depth.taps
    s.height = data_address(height.source), height.stride, height.span
    s.width = data_address(width.source), len(width.source), width.stride, width.before, width.size
    s.only_zeros, s.in_place = zeros, in_place
    s.segment_rows, s.phase_pitch, s.row_pitch, s.row_length = slab.segment_rows, slab.phase, slab.row, slab.row_length
    s.channel_pitch, s.pixel_step = x[1] if in_place else slab.channel, 1
    if not in_place:
        whole_rows = x[4] == 1 and zeros and width.stride in (1, 2, 4)
        s.fill_body = (fill_whole_rows if whole_rows else fill_slab).address(dtype)


# Pixels that are a multiple of so many bytes apart fall on few lines of the L1 cache: with 4 KiB, the 14 pixels of a
# tile of `channels_last` drive one another out of it (1x1 of 1024 channels: 0.8 of the speed).
_ALIASING_BYTES = 2048


def aliases(pitch: int, stride: int, dtype: np.dtype) -> bool:
    """Do pixels so far apart (in elements, and a stride between them) fall on few lines of the cache?"""
    return pitch * stride * dtype.itemsize % _ALIASING_BYTES == 0


def pitch_of_pixels(channels: int, stride: int, dtype: np.dtype) -> int:
    """How far apart pixels are in a slab of [row][pixel][channel]."""
    return channels + tile(dtype.itemsize * 8).lanes * aliases(channels, stride, dtype)


def set_pixel_slab(p: Any, dtype: np.dtype, row_length: int, pitch: int, stride: int) -> None:
    """Those parameters that `set_common` has for a slab of planes, for one of [row][pixel][channel]."""
    s = p.slab
    s.pixel_pitch, s.pixel_step, s.row_pitch = pitch, pitch * stride, row_length * pitch
    s.fill_body = fill_pixels.address(dtype)


@functools.cache
def _microkernel_table(dtype: np.dtype, kernel: Any) -> np.ndarray:
    t = tile(dtype.itemsize * 8)
    return np.zeros((t.rows + 1, t.vectors + 1), np.int64)


def microkernels(dtype: np.dtype, rows: int, panels: int, output: bool) -> int:
    """Address of the table of microkernels by rows and vectors, in which are those for `rows` rows in so many panels.

    They are those of `gemm.contract`, or without an `output` those of `gemm.contract_packed`. Each number of rows is
    compiled when it is first met: all of them together take 1 s with AVX-512.
    """
    kernel = contract if output else contract_packed
    table = _microkernel_table(dtype, kernel)
    vectors = range(1, table.shape[1])
    for n in range(rows // panels, ceil_div(rows, panels) + 1):
        if not table[n, -1]:
            table[n, 1:] = kernel.addresses(dtype, tuple(Rows(n, v) for v in vectors))
    return data_address(table)


def _cut_pixels(
    dtype: np.dtype, batch: int, blocks: Blocks, axes: tuple[Axis, ...], in_place: bool, workers: int, slab_panels: int
) -> tuple[SlabShape, int, int, int]:  # fmt: skip
    """The slab of a task, most panels of pixels of one, tasks by pixels, and parts of a long row or 0."""
    t = tile(dtype.itemsize * 8)
    depth, height, width = axes
    all_panels = ceil_div(batch * depth.out * height.out * width.out, t.columns)
    per_task = min(PANELS_PER_TASK, all_panels)
    while True:
        slab = slab_shape(axes, (slab_panels or per_task) * t.columns, batch, t.columns)
        if (
            in_place
            or slab_panels
            or slab.chunk
            or per_task <= 4
            or blocks.block_channels * slab.channel * dtype.itemsize <= SLAB_BYTES
        ):
            break
        per_task = ceil_div(per_task, 2)
    if slab.chunk and not in_place:
        chunks = ceil_div(width.out, slab.chunk)
        return slab, per_task, batch * depth.out * height.out * chunks, chunks
    pixel_tasks = ceil_div(all_panels, per_task)
    if blocks.groups * pixel_tasks < 4 * workers:  # smaller tasks, as long as packing stays a small part of them
        pixel_tasks = max(pixel_tasks, min(ceil_div(4 * workers, blocks.groups), all_panels // 8))
    if blocks.groups == 1 and 1 < pixel_tasks < 8 * workers:  # as many for each worker: 3 for 2 are as slow as 4
        pixel_tasks = min(ceil_div(pixel_tasks, workers) * workers, all_panels)
    return slab, per_task, pixel_tasks, 0


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
    t = tile(dtype.itemsize * 8)
    size = dtype.itemsize
    if in_place:
        batch, axes, x, y = flatten(batch, axes, x, y)
    x_group, y_group = group_steps or (blocks.channels * x[1], blocks.rows * y[1])
    depth, height, width = axes
    plane = depth.out * height.out * width.out
    pixels = batch * plane
    all_panels = ceil_div(pixels, t.columns)

    slab, per_task, pixel_tasks, chunks = _cut_pixels(dtype, batch, blocks, axes, in_place, workers, slab_panels)
    chunk = slab.chunk if chunks else 0
    row_tasks = 1
    if blocks.groups * pixel_tasks < workers:
        row_tasks = min(blocks.panels, ceil_div(workers, blocks.groups * pixel_tasks))

    group = max(
        1, min(per_task if not chunk else ceil_div(chunk, t.columns), GROUP_BYTES // (blocks.depth * t.columns * size))
    )
    # Do the tasks pack the weights they need? That saves writing and reading them beyond L2, and a stage that the
    # product waits for, but weights are packed again by every task of other pixels.
    task_weights = ceil_div(blocks.panels, row_tasks) * t.rows * blocks.depth
    weights_stay = task_weights * size <= OWN_WEIGHT_BYTES
    if pixel_tasks == 1 and all_panels * blocks.depth * t.columns * size <= OWN_GROUP_BYTES:
        group = all_panels
    packs = not packed and (
        group >= all_panels or (weights_stay and pixel_tasks * blocks.packed_size <= AGAIN_WEIGHTS * workers)
    )
    at_once = OWN_BLOCK_BYTES if packs and not weights_stay else WEIGHT_BYTES
    weight_panels = max(1, at_once // (t.rows * blocks.depth * size))

    slab_size = 0 if in_place else ceil_div(blocks.block_channels * slab.channel + 2 * t.columns, 16) * 16
    panel_size = ceil_div((group * blocks.depth + 1) * t.columns, 16) * 16
    weight_size = 0
    if packs:
        weight_size = ceil_div(task_weights if weights_stay else weight_panels * t.rows * blocks.depth, 16) * 16
    run_table = t.vectors * run_stride(t.lanes)
    row_table = run_table + 1 + 2 * t.columns
    table_bytes = ceil_div((row_table + slab.table) * 8, 64) * 64
    tile_size = t.rows * t.columns + t.narrow_columns * t.narrow_pitch
    scratch = (slab_size + panel_size + weight_size + tile_size) * size + table_bytes

    tap_offset = tap_offsets(axes, slab)
    channel_pitch = x[1] if in_place else slab.channel
    depth_offset = (np.arange(blocks.block_channels, dtype=np.int64)[:, None] * channel_pitch + tap_offset).ravel()
    tables = (depth.source, height.source, width.source, tap_offset, depth_offset)

    p = Correlation.zeros()
    set_common(p, dtype, batch, axes, slab, x, y, zeros, in_place)
    p.row_channels, p.channels, p.row_panels = blocks.rows, blocks.channels, blocks.panels
    if not slab_panels:  # else the products are those of the caller
        p.kernels = microkernels(dtype, blocks.rows, blocks.panels, True)
    p.block_channels, p.block_taps = blocks.block_channels, blocks.block_taps
    p.tap_offset, p.depth_offset = data_address(tap_offset), data_address(depth_offset)
    p.pixel_tasks, p.row_tasks, p.chunk, p.chunks = pixel_tasks, row_tasks, chunk, chunks
    p.group, p.weight_panels, p.weights_stay = group, weight_panels, weights_stay
    p.input_group, p.output_group = x_group, y_group
    p.extent = (batch - 1) * x[0] + (blocks.groups - 1) * x_group + (blocks.channels - 1) * x[1] + plane
    p.slab.elements, p.panel_elements, p.weight_elements = slab_size, panel_size, weight_size
    p.table_bytes, p.row_table, p.run_table = table_bytes, row_table, run_table
    p.ahead = t.columns if in_place else 0  # the next panel, while this one is packed
    flops = 2 * pixels * blocks.rows * blocks.groups * blocks.channels * blocks.taps
    return Plan(np.asarray(p), tables, blocks.groups * pixel_tasks * row_tasks, scratch, flops, packs)


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
    parameters = copy_of(plan.parameters)
    packed = 0
    if isinstance(weights, Unpacked):
        parameters["packing"], parameters["pack_rows"] = data_address(weights.parameters), pack_rows.address(y.dtype)
    else:
        packed = data_address(weights)
    of_bias = 0 if bias is None else data_address(bias)
    parameters["operands"] = data_address(x), packed, data_address(y), of_bias, bias is not None, relu, add
    return plan.body, plan.tasks, parameters, plan.scratch, work(plan.flops), waits
