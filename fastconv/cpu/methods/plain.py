"""The plain loops: right for any values, and the last of the table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...packed import PackedWeights
from .. import loops
from ..problem import Method, Operands, Plan, Problem, Redo, epsilon, terms_of_sum


class Loops(Method):
    """The sums of the definition, one after the other."""

    name = "loops"
    algorithm = "loops"

    def cannot(self, problem: Problem) -> str | None:
        return None

    def error(self, problem: Problem) -> float:
        """Of one chain; that of the weight gradient is one of rows, and of images, whose sums are chains."""
        geometry, chain = problem.geometry, terms_of_sum(problem)
        if problem.operation == "weight_grad":
            chain = geometry.batch + math.prod(geometry.output_size[:2]) + geometry.output_size[2]
        return epsilon(problem) * math.sqrt(max(chain, 1) / 50)

    def plan(self, problem: Problem) -> Plan:
        return LoopsPlan(self, problem)


@dataclass(frozen=True)
class LoopsPlan(Plan):
    """Nothing is planned."""

    method: Method
    problem: Problem

    @property
    def workspace(self) -> int:
        return 0

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        (array, other), geometry, add = operands, self.problem.geometry, self.problem.add
        if self.problem.operation == "forward":
            loops.forward(geometry, array, other, bias, relu, out)
        elif self.problem.operation == "weight_grad":
            loops.weight_grad(geometry, array, other, add, out)
        else:
            loops.input_grad(geometry, other, array, bias, relu, add, out)
        return None


LOOPS = Loops()
