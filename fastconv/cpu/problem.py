"""What a method is asked and what it answers: `Problem`, `Method`, `Plan`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from ..arguments import ALGORITHMS
from ..geometry import PADDING_MODES, ConvGeometry
from ..packed import PackedWeights

Strides = tuple[int, ...]

OPERATIONS = ("forward", "input_grad", "weight_grad")

# What a method can do with operands that are not finite. A method that finds values it cannot do with hands on to one
# that can do with more of them: the levels only rise, so that comes to an end.
FINITE_OPERANDS = 0  # one value spreads over others: all operands must be finite, and so must be what they become
FINITE_GROUPS = 1  # weights must be finite; the products of phases, which need that in part, come next
FINITE_WEIGHTS = 2  # weights must be finite, at least where a zero outside an array would be multiplied with them
ANY_VALUES = 3

# Terms that the direct sum adds in one chain on AVX-512 (`contraction.PANEL_BYTES`; twice as many on AVX2), unless
# there is one channel.
LONGEST_CHAIN = 384


class Problem(NamedTuple):
    """All that the choice of a method and its plan depend on: the key of the plans.

    It is made and looked up in every call, hence a tuple, of few objects that are compared by identity first.
    """

    operation: str
    algorithm: str  # the user's word
    geometry: ConvGeometry
    dtype: np.dtype
    input: Strides  # in bytes, of the input or its gradient (N, C, D, H, W)
    weight: Strides  # of the weight or its gradient (O, C/groups, KD, KH, KW)
    output: Strides  # of the output or its gradient
    workers: int  # threads that the call is worth and may use
    kept: bool = False  # are packed weights kept for other calls?
    add: bool = False  # is the result added to what the array holds?
    after: str = ""  # the method that handed this on, if one did

    def steps(self, strides: Strides) -> Strides:
        """Strides in elements."""
        size = self.dtype.itemsize
        return tuple([step // size for step in strides])

    @property
    def taps(self) -> int:
        return math.prod(self.geometry.kernel_size)

    def integers(self) -> tuple[int, ...]:
        """The same as integers, as many for every problem. (What `after` names is no part of a caller's problem.)"""
        g = self.geometry
        return (
            OPERATIONS.index(self.operation), ALGORITHMS.index(self.algorithm),
            g.batch, g.in_channels, g.out_channels, g.groups, *g.input_size, *g.kernel_size, *g.stride, *g.dilation,
            *g.pad_before, *g.pad_after, PADDING_MODES.index(g.padding_mode), self.dtype.num,
            *self.input, *self.weight, *self.output, self.workers, int(self.kept), int(self.add),
        )  # fmt: skip


# What is left for another method: nothing, the samples of a mask, or everything. Of what is left, nothing has been
# added to the result, where a problem says `add`; otherwise it may hold anything.
Redo = np.ndarray | bool | None

Operands = tuple[np.ndarray, np.ndarray]


class Plan(ABC):
    """What a method will do for one problem: everything but the addresses of the arrays."""

    method: Method
    parts: tuple[str, ...] = ()  # names of the methods whose products it is made of

    @property
    @abstractmethod
    def workspace(self) -> int:
        """Bytes of memory that a call takes beside the operands and the result."""

    @abstractmethod
    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        """Compute `out` from (input, weight), (output gradient, weight) or (input, output gradient).

        `packed` keeps the weights of a prepared convolution as the method wants them. Returns what is to be redone.
        """


class Method(ABC):
    """A way to compute one or more of the passes of a convolution."""

    name: ClassVar[str]
    algorithm: ClassVar[str] = "direct"  # the user's word for it
    values: int = ANY_VALUES
    composed: ClassVar[bool] = False  # is it made of other methods' results?

    @abstractmethod
    def cannot(self, problem: Problem) -> str | None:
        """Why the method does not apply; None if it does."""

    def slower(self, problem: Problem) -> str | None:
        """Why the method, which applies, is not expected to be the fastest; None if it is."""
        return None

    def why_not(self, problem: Problem) -> str | None:
        """Why the method does not apply or does not pay; None if it does both."""
        return self.cannot(problem) or self.slower(problem)

    def why(self, problem: Problem) -> str:
        """Why "auto" takes this one."""
        return "no other both applies and pays"

    @abstractmethod
    def plan(self, problem: Problem) -> Plan:
        """What to do, of a problem that the method applies to."""

    def flops(self, problem: Problem) -> int:
        """Additions and multiplications, those of transforms included where they are more than a small part."""
        return problem.geometry.flops

    def error(self, problem: Problem) -> float:
        """The rms error for data of unit variance, relative to the rms result; docs/accuracy.md has what was measured.

        A chain of n multiply-adds of random terms has an error of about eps * sqrt(n / 50): each rounds a partial sum
        that has grown as a random walk. How long the chains are is the method's.
        """
        terms, geometry = terms_of_sum(problem), problem.geometry
        if problem.operation == "weight_grad":
            # split over tasks, the fewer the more channels there are; not where channels are the lanes of vectors
            chain = terms if geometry.in_channels_per_group == 1 else terms / 4
        elif geometry.in_channels_per_group == 1 or terms <= LONGEST_CHAIN:
            chain = terms
        else:
            chain = LONGEST_CHAIN + terms / LONGEST_CHAIN
        return epsilon(problem) * math.sqrt(max(chain, 1) / 50)


def contiguous(shape: tuple[int, ...], dtype: np.dtype) -> Strides:
    """The strides, in bytes, of an array in C order."""
    return tuple(dtype.itemsize * math.prod(shape[n + 1 :]) for n in range(len(shape)))


def epsilon(problem: Problem) -> float:
    return float(np.finfo(problem.dtype).eps)


def terms_of_sum(problem: Problem) -> int:
    """How many products an element of the result is the sum of."""
    geometry = problem.geometry
    if problem.operation == "weight_grad":
        return geometry.batch * math.prod(geometry.output_size)
    of_input = problem.operation == "input_grad"
    return problem.taps * (geometry.out_channels_per_group if of_input else geometry.in_channels_per_group)
