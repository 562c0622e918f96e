"""Methods of convolutions with few channels in a group: depthwise ones, and small groups as sums of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...packed import PackedWeights
from .. import depthwise, depthwise_channels, depthwise_planes, phases
from ..problem import ANY_VALUES, FINITE_GROUPS, FINITE_WEIGHTS, Method, Operands, Plan, Problem, Redo, Strides
from .products import axes_of
from .table import asked_in_turn, plan_of


@asked_in_turn
def lines_of(problem: Problem) -> depthwise.Lines:
    """The dimensions of a pass, as the modules of depthwise kernels have them."""
    if problem.operation == "input_grad":
        return phases.backward_lines(problem.geometry)
    depth, height, width = map(depthwise.forward_line, axes_of(problem.geometry))
    return depth, height, width


def _ends(problem: Problem) -> tuple[Strides, Strides]:
    """Strides in elements, of the array that is read and of the one that is written or that is the gradient."""
    x, y = problem.steps(problem.input), problem.steps(problem.output)
    return (y, x) if problem.operation == "input_grad" else (x, y)


def _filters(problem: Problem) -> tuple[int, int]:
    """Planes that are written and read for a group."""
    per_group = problem.geometry.out_channels_per_group
    return (1, per_group) if problem.operation == "input_grad" else (per_group, 1)


@dataclass(frozen=True)
class DepthwisePlan(Plan):
    """A plan of one of the modules of depthwise kernels."""

    method: Method
    problem: Problem
    plan: depthwise.Plan

    @property
    def workspace(self) -> int:
        parts = 0
        if self.problem.operation == "weight_grad":
            geometry = self.problem.geometry
            parts = self.plan.splits * geometry.out_channels * geometry.in_channels_per_group * self.problem.taps
        threads = min(self.plan.tasks, self.problem.workers)
        return threads * self.plan.scratch + self.plan.parameters.nbytes + parts * self.problem.dtype.itemsize

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        array, other = operands
        if self.problem.operation == "weight_grad":
            depthwise.weight_gradient(self.plan, array, other, out, self.problem.add)
            return None
        # The zeros around an output gradient are no outputs: times an infinite weight they would make a nan where there
        # is no such product.
        if self.problem.operation == "input_grad" and not np.isfinite(other).all():
            return True
        depthwise.correlate(self.plan, array, other, out, bias, relu, self.problem.add)
        return None


class _OneChannel(Method):
    """For one input channel in a group."""

    def __init__(self, operation: str) -> None:
        self.values = FINITE_WEIGHTS if operation == "input_grad" else ANY_VALUES

    def cannot(self, problem: Problem) -> str | None:
        geometry = problem.geometry
        if geometry.in_channels_per_group != 1:
            return f"a group has {geometry.in_channels_per_group} input channels (expected 1)"
        if problem.operation == "input_grad" and geometry.padding_mode != "zeros":
            return f"padding_mode is {geometry.padding_mode!r} (see `padded`)"
        if not depthwise.applies(geometry):
            return "there are more filters of a plane, or larger ones, than its memory is for"
        return self._cannot_lines(problem, lines_of(problem))

    def _cannot_lines(self, problem: Problem, lines: depthwise.Lines) -> str | None:
        return None


class DepthwisePlanes(_OneChannel):
    """Planes that are read in place."""

    name = "depthwise_planes"

    def _cannot_lines(self, problem: Problem, lines: depthwise.Lines) -> str | None:
        if _filters(problem)[1] != 1 or (problem.add and problem.operation != "weight_grad"):
            return "it writes the sum over one filter, and adds it to nothing"
        if not depthwise_planes.applies(
            problem.dtype, lines, *_ends(problem), problem.geometry.padding_mode == "zeros",
            weight_gradient=problem.operation == "weight_grad",
        ):  # fmt: skip
            return "it takes neighbouring pixels with zeros around, square filters, and vectors with masks"
        return None

    def slower(self, problem: Problem) -> str | None:
        of_weight, lines = problem.operation == "weight_grad", lines_of(problem)
        by_channels = depthwise_channels.applies(
            problem.geometry, problem.dtype, lines, *_ends(problem), weight_gradient=of_weight
        )
        if by_channels and not depthwise_planes.pays(problem.dtype, lines, weight_gradient=of_weight):
            return "too many lanes of its vectors would be empty: depthwise_channels takes less time"
        return None

    def plan(self, problem: Problem) -> Plan:
        geometry, (rows, _), lines = problem.geometry, _filters(problem), lines_of(problem)
        if problem.operation == "weight_grad":
            plan = depthwise_planes.plan_weight_gradient(
                problem.dtype, geometry.batch, geometry.groups, rows, lines, *_ends(problem)
            )
        else:
            plan = depthwise_planes.plan_correlation(
                problem.dtype, geometry.batch, geometry.groups, rows, lines, *_ends(problem),
                problem.operation == "forward", problem.workers,
            )  # fmt: skip
        return DepthwisePlan(self, problem, plan)


class DepthwisePlanesByTwo(_OneChannel):
    """Input gradients of stride 2, in pairs of pixels."""

    name = "depthwise_planes_by_two"

    def _cannot_lines(self, problem: Problem, lines: depthwise.Lines) -> str | None:
        if _filters(problem) != (1, 1) or problem.add:
            return "it writes the sum over one filter, and adds it to nothing"
        if not depthwise_planes.applies_by_two(problem.dtype, lines, *_ends(problem)):
            return "it takes neighbouring pixels, square filters of stride 2, and vectors with masks"
        return None

    def plan(self, problem: Problem) -> Plan:
        geometry = problem.geometry
        return DepthwisePlan(self, problem, depthwise_planes.plan_input_gradient_by_two(
            problem.dtype, geometry.batch, geometry.groups, lines_of(problem), *_ends(problem), problem.workers
        ))  # fmt: skip


class DepthwiseChannels(_OneChannel):
    """Channels in the lanes of the vectors."""

    name = "depthwise_channels"

    def _cannot_lines(self, problem: Problem, lines: depthwise.Lines) -> str | None:
        if not depthwise_channels.applies(
            problem.geometry, problem.dtype, lines, *_ends(problem),
            weight_gradient=problem.operation == "weight_grad",
        ):  # fmt: skip
            return "it takes as many channels out as in, enough for the lanes of vectors, with zeros around"
        return None

    def plan(self, problem: Problem) -> Plan:
        geometry, lines = problem.geometry, lines_of(problem)
        if problem.operation == "weight_grad":
            plan = depthwise_channels.plan_weight_gradient(
                problem.dtype, geometry.batch, geometry.groups, lines, *_ends(problem)
            )
        else:
            plan = depthwise_channels.plan_correlation(
                problem.dtype, geometry.batch, geometry.groups, lines, *_ends(problem), problem.workers
            )
        return DepthwisePlan(self, problem, plan)


class DepthwiseRows(_OneChannel):
    """Rows of a tile of a plane, from a copy with its border."""

    name = "depthwise"

    def plan(self, problem: Problem) -> Plan:
        geometry, (rows, channels), lines = problem.geometry, _filters(problem), lines_of(problem)
        zeros = geometry.padding_mode == "zeros"
        if problem.operation == "weight_grad":
            plan = depthwise.plan_weight_gradient(
                problem.dtype, geometry.batch, geometry.groups, rows, lines, *_ends(problem), zeros
            )
        else:
            plan = depthwise.plan_correlation(
                problem.dtype, geometry.batch, geometry.groups, rows, channels, lines, *_ends(problem), zeros,
                problem.workers,
            )  # fmt: skip
        return DepthwisePlan(self, problem, plan)


class Grouped(Method):
    """Groups of few channels that are neighbours in memory, each as the sum of as many depthwise convolutions."""

    name = "grouped"

    def __init__(self, operation: str) -> None:
        self.values = FINITE_GROUPS if operation == "input_grad" else ANY_VALUES

    def cannot(self, problem: Problem) -> str | None:
        geometry = problem.geometry
        if geometry.groups == 1:
            return "groups is 1"
        if problem.operation == "input_grad" and geometry.padding_mode != "zeros":
            return f"padding_mode is {geometry.padding_mode!r} (see `padded`)"
        if not depthwise_channels.applies_to_groups(
            geometry, problem.dtype, lines_of(problem), *_ends(problem),
            weight_gradient=problem.operation == "weight_grad",
        ):  # fmt: skip
            return "it takes groups of few channels, as many out as in, that are neighbours in memory"
        return None

    def plan(self, problem: Problem) -> Plan:
        geometry, dtype, lines = problem.geometry, problem.dtype, lines_of(problem)
        if problem.operation == "weight_grad":
            plan = depthwise_channels.plan_weight_gradient_of_groups(geometry, dtype, lines, *_ends(problem))
        else:
            plan = depthwise_channels.plan_groups(
                geometry, dtype, lines, *_ends(problem), problem.operation == "forward", problem.workers
            )
        return DepthwisePlan(self, problem, plan)


# Groups of so few channels in and out fill a quarter of the matrix product's vectors of output channels, or less.
# Channel by channel, as depthwise convolutions of whole planes, their weight gradient takes 0.25 to 0.8 of the time;
# more where the operands do not stay in the cache, since they are read for each channel, and where there is little to
# do.
FEW_IN_GROUP = 4
MOST_READ_AGAIN = 64 * 1024 * 1024  # bytes, of all channels
LEAST_BY_CHANNEL = 2_000_000  # operations


class GroupedByChannel(Method):
    """The weight gradient of small groups: of every n-th channel, where groups have n, as depthwise convolutions."""

    name = "grouped_by_channel"

    def cannot(self, problem: Problem) -> str | None:
        geometry, one = problem.geometry, self._of_one_channel(problem)
        if geometry.groups == 1:
            return "groups is 1"
        if max(geometry.in_channels_per_group, geometry.out_channels_per_group) > FEW_IN_GROUP:
            return f"a group has more than {FEW_IN_GROUP} channels"
        if not depthwise.applies(one.geometry) or not depthwise_planes.applies(
            one.dtype, lines_of(one), *_ends(one), geometry.padding_mode == "zeros", weight_gradient=True
        ):
            return "a channel of each group is no convolution for depthwise_planes"
        return None

    def slower(self, problem: Problem) -> str | None:
        geometry = problem.geometry
        if geometry.flops < LEAST_BY_CHANNEL:
            return f"it pays from {LEAST_BY_CHANNEL} operations on, here are {geometry.flops}"
        sample = geometry.in_channels * math.prod(geometry.input_size)
        sample += geometry.out_channels * math.prod(geometry.output_size)
        read = geometry.in_channels_per_group * geometry.batch * sample * problem.dtype.itemsize
        return f"{read} bytes would be read, more than caches hold" if read > MOST_READ_AGAIN else None

    @staticmethod
    def _of_one_channel(problem: Problem) -> Problem:
        geometry, x = problem.geometry, problem.input
        x = (x[0], x[1] * geometry.in_channels_per_group, *x[2:])
        return problem._replace(
            algorithm="direct", geometry=replace(geometry, in_channels=geometry.groups), input=x, after=""
        )

    def plan(self, problem: Problem) -> Plan:
        plan = plan_of(self._of_one_channel(problem))
        return ByChannelPlan(self, plan, problem.geometry.in_channels_per_group, (plan.method.name,))


@dataclass(frozen=True)
class ByChannelPlan(Plan):
    """The same plan for every channel of a group."""

    method: Method
    plan: Plan
    channels: int
    parts: tuple[str, ...]

    @property
    def workspace(self) -> int:
        return self.plan.workspace

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        input, grad_output = operands
        for c in range(self.channels):
            self.plan.run((input[:, c :: self.channels], grad_output), None, False, None, out[:, c : c + 1])
        return None
