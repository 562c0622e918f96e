"""Weights into panels of rows: [group][block of the reduction][panel][(channel, tap)][row]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import tasks
from ..jit import helper
from ..records import Integer, Record, copy_of, record_at
from ..tasks import data_address
from ..vector import move
from ..vector import tile as machine
from ..vector.memory import at, copy_vector, no_inline, offset, pointer_address
from ..vector.tile import tile
from .blocks import Blocks
from .parameters import PackRows, Phase, Tap, WeightPacking, Window


class _Target(Record):
    """Where a tap is to be written next."""

    channels: Integer  # in so many its next block begins
    place: Integer
    left: Integer  # elements of the block from there on


_target_at = record_at(_Target)
TARGET_BYTES = _Target.dtype.itemsize


@helper
def _pack_run(target, rows, source, row_step, length, left, begin, end):
    """target[k][row] = source[row * row_step + k] for k < length.

    `left` is how many rows of the target are still to be written, these included: a block of whole vectors may write
    beyond its own, where later ones follow. Memory outside begin .. end is not read.
    """
    no_inline()
    lanes = machine.lanes(target)
    for k in range(0, length, lanes):
        low = offset(source, k)
        high = offset(low, (rows - 1) * row_step + lanes)
        inside = pointer_address(low) >= begin and pointer_address(high) <= end
        if inside and row_step >= 0 and (left - k - lanes) * rows >= lanes:
            first = (rows - 1) // lanes * lanes
            while first >= 0:  # the last columns first: what they write too much is at the beginning of the next row
                part, place = offset(low, first * row_step), offset(target, k * rows + first)
                move.transpose(place, rows, part, row_step, rows - first, move.PREFETCH * lanes)
                first -= lanes
        else:
            for j in range(k, min(k + lanes, length)):
                for row in range(rows):
                    target[j * rows + row] = source[row * row_step + j]


@helper
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


@helper
def _pack_taps(target, rows, source, row_step, offsets, length, count, lowest, left, begin, end, block, ahead):
    """target[k][row] = source[row * row_step + offsets[k]] for k < length; the rest as for `_pack_run`.

    Taps that lie within a vector of one another are taken from one transposed block, for which there is room at
    `block`: `count` and `lowest` are those of the first.
    """
    no_inline()
    lanes = machine.lanes(target)
    k = 0
    while True:
        low = offset(source, lowest)
        high = offset(low, (rows - 1) * row_step + lanes)
        inside = pointer_address(low) >= begin and pointer_address(high) <= end
        if count >= _TRANSPOSED_COLUMNS and inside and row_step >= 0 and (left - k - count) * rows >= lanes:
            first = (rows - 1) // lanes * lanes
            while first >= 0:
                move.transpose(block, lanes, offset(low, first * row_step), row_step, rows - first, ahead)
                for j in range(k, k + count):
                    column = offset(block, (offsets[j] - lowest) * lanes)
                    copy_vector(offset(target, j * rows + first), column)
                first -= lanes
        else:
            for j in range(k, k + count):
                place, element = offset(target, j * rows), offset(source, offsets[j])
                for row in range(rows):
                    place[row] = element[0]
                    element = offset(element, row_step)
        k += count
        if k >= length:
            break
        count, lowest = _find_window(offset(offsets, k), length - k, lanes)


_RUNS_AT_ONCE = 8  # the bounds of a panel are found once for so many: half the time of one by one


@helper
def _pack_panels(p, packed, group, first_panel, last_panel, first_channel, channels, first_tap, last_tap, block, like):
    """Panels of a group's weights for one block of the reduction: [panel][(channel, tap)][row].

    `p` are the parameters of packing, `block` is room for lanes x lanes elements. Memory before and after the array of
    weights is not read.
    """
    no_inline()
    begin, end, offsets = p.operands.begin, p.operands.end, p.offsets
    lanes, row_step = machine.lanes(like), p.row_step
    depth = channels * (last_tap - first_tap)
    first_o, last_o = first_panel * p.rows // p.panels, last_panel * p.rows // p.panels
    w = offset(p.operands.w, group * p.group_step + first_channel * p.channel_step)
    # a run: the taps of a channel, or of all where these follow one another in memory too
    runs = 1 if p.joined_channels else channels
    length = depth // runs
    done = 0  # runs
    if row_step == 1 and length == 1:  # rows follow one another: some runs at once, for each panel
        while done < runs:
            source = offset(w, done * p.channel_step + offsets[first_tap])
            some = min(_RUNS_AT_ONCE, runs - done)
            # the last vector of a row may write into the next one, never into the panel that follows
            fits = (depth - done - some) * (p.rows // p.panels) >= lanes
            after = offset(source, max((some - 1) * p.channel_step, 0) + last_o + lanes)
            if not fits or pointer_address(after) > end:
                break
            for i in range(first_panel, last_panel):
                o = i * p.rows // p.panels
                rows = (i + 1) * p.rows // p.panels - o
                target = offset(packed, (o - first_o) * depth + done * rows)
                for run in range(some):
                    for first in range(0, rows, lanes):
                        copy_vector(
                            offset(target, run * rows + first),
                            offset(source, run * p.channel_step + o + first),
                        )
            done += some
    count, lowest = _find_window(offset(offsets, first_tap), last_tap - first_tap, lanes)
    for i in range(first_panel, last_panel):
        o = i * p.rows // p.panels
        rows = (i + 1) * p.rows // p.panels - o
        panel = offset(packed, (o - first_o) * depth)
        for run in range(done, runs):
            target = offset(panel, run * length * rows)
            source = offset(w, run * p.channel_step + o * row_step)
            left = (runs - run) * length
            if p.consecutive and (p.joined_channels or length >= lanes):
                _pack_run(target, rows, offset(source, offsets[first_tap]), row_step, length, left, begin, end)
            else:
                _pack_taps(
                    target, rows, source, row_step, offset(offsets, first_tap), length, count, lowest, left,
                    begin, end, block, 2 * p.channel_step,
                )  # fmt: skip
    if p.check_finite:
        _check_finite(p, packed, (last_o - first_o) * depth)


@helper
def _check_finite(p, packed, size):
    """Note in the parameters of packing if one of `size` packed weights is not finite."""
    no_inline()
    lanes = machine.lanes(packed)
    not_finite = move.count_not_finite(packed, size // lanes) if size >= lanes else 0
    for k in range(size // lanes * lanes, size):
        if packed[k] * 0 != 0:
            not_finite = 1
    if not_finite:
        p.not_finite = 1


@tasks.body(PackRows)
def pack_rows(task, worker, p, real):
    """Panels of rows for one block of the reduction: for `pack_weights`, and by tasks that pack themselves."""
    _pack_panels(
        p.packing, p.packed, p.group, p.first_panel, p.last_panel, p.first_channel, p.channels, p.first_tap,
        p.last_tap, p.block, real,
    )  # fmt: skip


@tasks.body(WeightPacking)
def pack_weights(task, worker, p, real):
    """Task = some panels of output channels of one group."""
    part, group = task % p.tasks, task // p.tasks
    first_panel, last_panel = part * p.panels // p.tasks, (part + 1) * p.panels // p.tasks
    o = first_panel * p.rows // p.panels
    packed = offset(p.packed, group * p.rows * p.channels * p.taps)
    block = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    reduced = 0
    for c in range(0, p.channels, p.block_channels):
        channels = min(p.block_channels, p.channels - c)
        for tap in range(0, p.taps, p.block_taps):
            last_tap = min(tap + p.block_taps, p.taps)
            depth = channels * (last_tap - tap)
            panel = offset(packed, p.rows * reduced + o * depth)
            tasks.call_with(
                p.pack_rows, (p, panel, group, first_panel, last_panel, c, channels, tap, last_tap, block)
            )
            reduced += depth


@helper
def _find_targets(p, targets, c, group, o, rows):
    """Where each tap of channel c is to be written, for the panel of `rows` rows from o on."""
    taps, phases = p.tap_table, p.phase_table
    for t in range(p.taps):
        tap, target = taps[t], targets[t]
        size = tap.count * rows  # of a channel
        target.channels = target.channels - 1
        target.place = target.place + size
        target.left = target.left - size
        if c == 0 or target.channels == 0:
            phase = phases[tap.phase]
            channels = min(phase.block_channels, p.channels - c)
            block = (group * p.channels + c) * p.rows * phase.taps
            panel = channels * (tap.first * p.rows + o * tap.count)
            target.channels = channels
            target.place = phase.place + block + panel + tap.row * rows
            target.left = channels * size - tap.row * rows


# One loop for each of panel, channel, window, vector and tap: a helper for the inner ones has a dozen arguments.
@tasks.body(WeightPacking)
def pack_phases(task, worker, p, real):
    """Task = some panels of rows of one group, for several phases, each packed as by `pack_weights`.

    A phase has some of the taps of the filter. The taps of all are taken from memory together, in an order in which the
    places of each phase ascend, where there is one.
    """
    # The loops are one function, deep as they are: the inner ones are too short to be called.
    lanes = machine.lanes(real)
    block = at(real, p.header.scratch + worker * p.header.scratch_bytes)
    targets = _target_at(p.header.scratch + (worker + 1) * p.header.scratch_bytes - p.target_bytes, real)
    phases, taps, windows = p.phase_table, p.tap_table, p.window_table
    begin, end, packed = p.operands.begin, p.operands.end, p.packed
    row_step, all_rows = p.row_step, p.rows

    part, group = task % p.tasks, task // p.tasks
    w = offset(p.operands.w, group * p.group_step)
    first_panel, last_panel = part * p.panels // p.tasks, (part + 1) * p.panels // p.tasks
    for panel in range(first_panel, last_panel):
        o = panel * all_rows // p.panels
        rows = (panel + 1) * all_rows // p.panels - o
        for c in range(p.channels):
            _find_targets(p, targets, c, group, o, rows)
            source = offset(w, c * p.channel_step + o * row_step)
            for v in range(p.windows):
                window = windows[v]
                low = offset(source, window.lowest)
                high = offset(low, (rows - 1) * row_step + lanes)
                transposed = (
                    pointer_address(low) >= begin
                    and pointer_address(high) <= end
                    and row_step > 1
                    and window.end - window.first >= _TRANSPOSED_COLUMNS
                )
                first = (rows - 1) // lanes * lanes
                while first >= 0:
                    if transposed:
                        move.transpose(
                            block, lanes, offset(low, first * row_step), row_step, rows - first,
                            2 * p.channel_step,
                        )  # fmt: skip
                    for t in range(window.first, window.end):
                        tap, its = taps[t], targets[t]
                        target = offset(packed, its.place + first)
                        if transposed:
                            column = offset(block, (tap.place - window.lowest) * lanes)
                            if p.ascending and its.left >= rows + lanes:
                                copy_vector(target, column)  # what is too much is overwritten
                            else:
                                move.copy_span(target, column, min(lanes, rows - first))
                        elif row_step == 1:
                            move.copy_span(target, offset(source, tap.place + first), min(lanes, rows - first))
                        else:
                            element = offset(source, tap.place + first * row_step)
                            for k in range(min(lanes, rows - first)):
                                target[k] = element[0]
                                element = offset(element, row_step)
                    first -= lanes
        if p.check_finite:
            for f in range(p.phases):
                phase = phases[f]
                for c in range(0, p.channels, phase.block_channels):
                    channels = min(phase.block_channels, p.channels - c)
                    for tap in range(0, phase.taps, phase.block_taps):
                        count = min(phase.block_taps, phase.taps - tap)
                        place = (group * p.channels + c) * all_rows * phase.taps
                        place += phase.place + channels * (tap * all_rows + o * count)
                        _check_finite(p, offset(packed, place), rows * channels * count)


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


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
    p = _parameters(blocks, steps, check_finite)
    p.offsets, p.consecutive = data_address(offsets), consecutive
    p.joined_channels = consecutive and steps[2] == blocks.taps
    p.taps, p.block_channels, p.block_taps = blocks.taps, blocks.block_channels, blocks.block_taps
    lanes = tile(itemsize * 8).lanes
    scratch = lanes * lanes * itemsize
    return Packing(pack_weights, np.asarray(p), (offsets,), scratch, *_extent(shape, strides, itemsize))


def plan_phase_packing(
    blocks: Sequence[Blocks], places: Sequence[int], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int,
    steps: tuple[int, int, int], offsets: Sequence[np.ndarray], check_finite: bool,
) -> Packing:  # fmt: skip
    """Plan the packing of one array for several products at once, each with other taps of the same rows and channels.

    `blocks`, `offsets` and where in the packed weights they begin (`places`) are given for each of the products.
    """
    lanes = tile(itemsize * 8).lanes
    phases = Phase.table(
        (place, each.taps, each.block_channels, each.block_taps) for place, each in zip(places, blocks, strict=True)
    )
    table = []
    for f, (each, of_taps) in enumerate(zip(blocks, offsets, strict=True)):
        for tap, place in enumerate(of_taps.tolist()):
            first = tap // each.block_taps * each.block_taps
            table.append((place, f, first, min(each.block_taps, each.taps - first), tap - first))
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
    tables = phases, Tap.table(table), Window.table(windows)
    p = _parameters(blocks[0], steps, check_finite)
    p.phases, p.phase_table, p.tap_table = len(blocks), data_address(tables[0]), data_address(tables[1])
    p.windows, p.window_table, p.ascending = len(windows), data_address(tables[2]), ascending
    p.taps, p.target_bytes = len(table), len(table) * TARGET_BYTES
    scratch = lanes * lanes * itemsize + int(p.target_bytes)
    return Packing(pack_phases, np.asarray(p), tables, scratch, *_extent(shape, strides, itemsize))


def _parameters(blocks: Blocks, steps: tuple[int, int, int], check_finite: bool) -> Any:
    p = WeightPacking.zeros()
    p.group_step, p.row_step, p.channel_step = steps
    p.rows, p.channels, p.panels = blocks.rows, blocks.channels, blocks.panels
    p.tasks, p.check_finite = min(blocks.panels, PACKING_TASKS), check_finite
    return p


def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Bytes of an array before its first element (negative strides), and from there to its end."""
    ends = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return sum(end for end in ends if end < 0) * itemsize, (sum(end for end in ends if end > 0) + 1) * itemsize


class Unpacked:
    """Weights that are not packed, for tasks to pack."""

    def __init__(self, plan: Packing, w: np.ndarray) -> None:
        first = data_address(w)
        self.plan = plan
        self.parameters = copy_of(plan.parameters)
        self.parameters["operands"] = first, first + plan.below, first + plan.above

    def finite(self) -> bool:
        """Were all weights that were packed finite? Known afterwards, and only with `check_finite`."""
        return not self.parameters["not_finite"]


def packing(weights: Unpacked, groups: int, packed: np.ndarray) -> tasks.Stage:
    """Packing of weights for `correlation` into `packed`, to be run once."""
    plan, parameters = weights.plan, weights.parameters
    parameters["packed"] = data_address(packed)
    if plan.body is pack_weights:
        parameters["pack_rows"] = pack_rows.address(packed.dtype)
    # counted as 16 operations an element, since reading and writing is most of the work
    return plan.body, groups * int(parameters["tasks"]), parameters, plan.scratch, 16 * packed.size, 0
