"""The plain loops: right for any values, and the last of the table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...packed import PackedWeights
from .. import loops
from ..problem import Method, Operands, Plan, Problem, Redo


class Loops(Method):
    """The sums of the definition, one after the other."""

    name = "loops"
    algorithm = "loops"

    def cannot(self, problem: Problem) -> str | None:
        return None

    def plan(self, problem: Problem) -> Plan:
        return LoopsPlan(self, problem)


@dataclass(frozen=True)
class LoopsPlan(Plan):
    """Nothing is planned."""

    method: Method
    problem: Problem

    @property
    def workspace(self) -> int:
        """A bias of zeros, where there is none."""
        geometry = self.problem.geometry
        channels = geometry.in_channels if self.problem.operation == "input_grad" else geometry.out_channels
        return channels * self.problem.dtype.itemsize

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        array, weight = operands
        loops.input_grad(self.problem.geometry, weight, array, bias, relu, self.problem.add, out)
        return None


LOOPS = Loops()
