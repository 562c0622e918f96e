"""Methods of the input gradient that are made of others' results: of its phases, and of that of a padded input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...geometry import ConvGeometry
from ...packed import PackedWeights
from .. import channels_last, implicit_gemm, padding, phases, tasks
from ..problem import FINITE_WEIGHTS, Method, Operands, Plan, Problem, Redo, contiguous
from .products import Products, choose_product, offsets_of, scratch_of, workers_of_product
from .table import plan_of, run
from .transforms import FFT


@dataclass(frozen=True)
class Phase:
    """The elements of the input gradient that see the same taps: every stride-th element in each dimension.

    Or several of these as rows of one product (`phases.Rows`), by the place of the first of them.
    """

    where: tuple[slice, ...]  # of the input gradient (N, C, D, H, W)
    part: int
    packed: slice  # of the packed weights of all phases
    product: implicit_gemm.Plan


@dataclass(frozen=True)
class Part:
    """Products of as many rows, whose weights are packed together. Rows are (phase, channel)."""

    groups: int
    phases: int
    channels: int
    packing: implicit_gemm.Packing
    packed: slice

    def bias_of_rows(self, bias: np.ndarray) -> np.ndarray:
        return np.tile(bias.reshape(self.groups, 1, self.channels), (1, self.phases, 1)).ravel()


class Phased(Method):
    """A product for each phase of the stride, by the methods that are asked for them."""

    name = "phased"
    values = FINITE_WEIGHTS  # the zeros around the output gradient are no outputs: see `PhasedPlan.run`
    composed = True

    def cannot(self, problem: Problem) -> str | None:
        mode = problem.geometry.padding_mode
        return None if mode == "zeros" else f"padding_mode is {mode!r}, and phases are of zeros (see `padded`)"

    def plan(self, problem: Problem) -> Plan:
        geometry, dtype = problem.geometry, problem.dtype
        w, dx = problem.steps(problem.weight), problem.steps(problem.input)
        shape = (geometry.out_channels, geometry.in_channels_per_group, *geometry.kernel_size)
        rows = phases.choose_rows(geometry, dtype, w, dx)
        if rows.order:
            w = problem.steps(phases.in_order(np.empty(shape, dtype), rows.order).strides)
        reached: dict[int, list[phases.Correlation]] = {}  # by the number of phases that are rows
        untouched = []
        for number, each in phases.correlations(geometry, rows):
            if all(each.taps):
                reached.setdefault(number, []).append(each)
            else:
                untouched.append(each.where)
        kept = problem.add or sum(map(len, reached.values())) > 1
        made: list[Phase] = []
        parts: list[Part] = []
        names: list[str] = []
        for number, correlations in reached.items():
            name = _plan_part(problem, shape, w, kept, rows, number, correlations, made, parts)
            names += [] if name in names else [name]
        size = parts[-1].packed.stop if parts else 0
        padded = any(phase.product.parameters["padded"] for phase in made)
        return PhasedPlan(
            self, dtype, tuple(made), tuple(parts), rows.order, tuple(untouched), size, padded, problem.add,
            problem.workers, tuple(names),
        )  # fmt: skip


def _plan_part(
    problem: Problem, shape: tuple[int, ...], w: tuple[int, ...], kept: bool, rows: phases.Rows, number: int,
    correlations: list[phases.Correlation], made: list[Phase], parts: list[Part],
) -> str:  # fmt: skip
    """Add the products of as many rows to what was made; return the name of the method.

    The reduction is (output channel, tap of the phase).
    """
    geometry, dtype = problem.geometry, problem.dtype
    dy, dx = problem.steps(problem.output), problem.steps(problem.input)
    groups, channels = geometry.groups, geometry.in_channels_per_group
    group_steps = geometry.out_channels_per_group * dy[1], channels * dx[1]
    packing_steps = geometry.out_channels_per_group * w[0], w[1], w[0]  # of group, row and channel
    row_step = dx[1]
    if number > 1 and rows.each_channel:
        groups, channels, group_steps = channels, 1, (0, dx[1])
        packing_steps = w[1], w[1], w[0]
    if number > 1 and channels == 1:
        row_step = geometry.dilation[rows.axis] * dx[2 + rows.axis]
        packing_steps = packing_steps[0], w[2 + rows.axis], w[0]
    axes = [each.axes for each in correlations]
    products = Products(
        dtype, geometry.batch,
        [
            implicit_gemm.make_blocks(
                dtype, groups, number * channels, geometry.out_channels_per_group, each,
                implicit_gemm.can_stay_in_place(each, dy),
            )
            for each in axes
        ],
        axes, dy, (dx[0], row_step, *(step * stride for step, stride in zip(dx[2:], geometry.stride, strict=True))),
        True, workers_of_product(problem), kept, packing_steps[1] == 1, group_steps,
    )  # fmt: skip
    method = choose_product(problem, products)
    begin = size = parts[-1].packed.stop if parts else 0
    blocks = method.cut(products)
    plans = [method.plan_product(products, cut, each) for cut, each in zip(blocks, axes, strict=True)]
    places = []
    for each, cut, plan in zip(correlations, blocks, plans, strict=True):
        needed = 0 if plan.packs else cut.packed_size
        made.append(Phase(each.where, len(parts), slice(size, size + needed), plan))
        places.append(size - begin)
        size += needed
    padded = any(plan.parameters["padded"] for plan in plans)
    offsets = [offsets_of(each.taps, w[2:]) for each in correlations]
    if len(correlations) == 1:
        packing = implicit_gemm.plan_packing(
            blocks[0], shape, w, dtype.itemsize, packing_steps, offsets[0], check_finite=padded
        )
    else:
        packing = implicit_gemm.plan_phase_packing(
            blocks, places, shape, w, dtype.itemsize, packing_steps, offsets, check_finite=padded
        )
    parts.append(Part(groups, number, channels, packing, slice(begin, size)))
    return method.name


@dataclass(frozen=True)
class PhasedPlan(Plan):
    """The products of all phases, and what no tap reaches."""

    method: Method
    dtype: np.dtype
    phases: tuple[Phase, ...]
    packings: tuple[Part, ...]
    order: tuple[int, ...] | None  # see `phases.Rows`
    untouched: tuple[tuple[slice, ...], ...]  # `where` of elements that no tap reaches
    packed_size: int
    padded: bool  # does a phase see zeros around the output gradient?
    add: bool
    workers: int
    parts: tuple[str, ...]

    @property
    def workspace(self) -> int:
        scratch = max((scratch_of(phase.product, self.workers) for phase in self.phases), default=0)
        return scratch + (self.packed_size + channels_last.READ_BEYOND) * self.dtype.itemsize

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        grad_output, weight = operands
        memory = tasks.workspace(self.packed_size + channels_last.READ_BEYOND, self.dtype)
        if self.order:
            weight = phases.in_order(weight, self.order)
        unpacked = [implicit_gemm.Unpacked(part.packing, weight) for part in self.packings]
        stages = []
        if self.packed_size:
            for part, weights in zip(self.packings, unpacked, strict=True):
                stages.append(implicit_gemm.packing(weights, part.groups, memory[part.packed]))
        # The zeros around grad_output are no outputs: times an infinite weight they would make a nan where there is no
        # such product.
        if self.padded and self.add:  # once added to, `out` cannot be computed a second time
            tasks.run_stages(self.dtype, stages)
            stages = []
            if not all(weights.finite() for weights in unpacked):
                return True
        if self.untouched and bias is None and not self.add:
            out[...] = 0  # one pass over memory that lies together, not one for each of them
        else:
            for where in self.untouched:
                _fill_without_taps(out[where], bias, relu, self.add)
        biases = [None if bias is None else part.bias_of_rows(bias) for part in self.packings]
        waits = len(stages)
        for phase in self.phases:
            stages.append(
                implicit_gemm.correlation(
                    phase.product, grad_output,
                    unpacked[phase.part] if phase.product.packs else memory[phase.packed], out[phase.where],
                    biases[phase.part], relu, self.add, waits,
                )
            )  # fmt: skip
        tasks.run_stages(self.dtype, stages)
        return None if all(weights.finite() for weights in unpacked) else True


def _fill_without_taps(out: np.ndarray, bias: np.ndarray | None, relu: bool, add: bool) -> None:
    """The gradient of elements that no window reaches is zero."""
    value = out if add else np.zeros((), out.dtype)
    if bias is not None:
        value = value + bias[None, :, None, None, None]
    out[...] = np.maximum(value, 0) if relu else value


class Padded(Method):
    """Of the other padding modes: the gradient of the padded input, then added up where its elements stand.

    One sample at a time, since the padded gradient is memory on top.
    """

    name = "padded"
    composed = True
    inner = "direct"  # the algorithm of the padded gradient

    def cannot(self, problem: Problem) -> str | None:
        return "the padding is zeros" if problem.geometry.padding_mode == "zeros" else None

    def plan(self, problem: Problem) -> Plan:
        geometry = problem.geometry
        size = _padded_size(geometry)
        one = replace(
            geometry, batch=1, input_size=size, pad_before=(0, 0, 0), pad_after=(0, 0, 0), padding_mode="zeros"
        )
        shape = (1, geometry.in_channels, *size)
        inner = problem._replace(
            algorithm=self.inner, geometry=one, input=contiguous(shape, problem.dtype), kept=False, add=False, after=""
        )
        return PaddedPlan(self, geometry, inner, shape, problem.add, (plan_of(inner).method.name,))


def _padded_size(geometry: ConvGeometry) -> tuple[int, int, int]:
    d, h, w = map(len, geometry.input_coordinates)
    return d, h, w


class PaddedByFft(Padded):
    """The same by the FFT."""

    name = "padded_fft"
    composed = False
    algorithm = "fft"
    inner = "fft"

    def cannot(self, problem: Problem) -> str | None:
        return FFT.cannot_transform(problem) or super().cannot(problem)

    def slower(self, problem: Problem) -> str | None:
        return FFT.slower(problem)

    def why(self, problem: Problem) -> str:
        return FFT.why(problem)

    def flops(self, problem: Problem) -> int:
        return FFT.flops(problem)

    def error(self, problem: Problem) -> float:
        return FFT.error(problem)


@dataclass(frozen=True)
class PaddedPlan(Plan):
    """The problem of the padded gradient of a sample, which is added up after."""

    method: Method
    geometry: ConvGeometry
    inner: Problem
    shape: tuple[int, ...]
    add: bool
    parts: tuple[str, ...]

    @property
    def workspace(self) -> int:
        return plan_of(self.inner).workspace + math.prod(self.shape) * self.inner.dtype.itemsize

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        grad_output, weight = operands
        padded = np.empty(self.shape, out.dtype)
        if bias is None:
            bias = np.zeros(self.geometry.in_channels, out.dtype)
        for n in range(self.geometry.batch):
            run(self.inner, (grad_output[n : n + 1], weight), None, False, None, padded)
            padding.fold(self.geometry, padded[0], bias, relu, self.add, out[n])
        return None


PHASED, PADDED, PADDED_BY_FFT = Phased(), Padded(), PaddedByFft()
