"""Methods that are one matrix product, or several: small planes, channels last, and the implicit matrix product.

The forward pass is one correlation of the input with the weights; a phase of an input gradient is one of the output
gradient. The methods here are asked for either: `Products`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...geometry import ConvGeometry
from ...packed import PackedWeights
from .. import channels_last, implicit_gemm, small_planes, tasks
from ..problem import FINITE_WEIGHTS, Method, Operands, Plan, Problem, Redo, Strides
from .table import allowed, asked_for, asked_in_turn

Axes = tuple[implicit_gemm.Axis, ...]


@dataclass(frozen=True)
class Products:
    """Correlations y[n, i, o] = sum over c, k of w[i, c, k] * x[n, c, u(o, k)] of the same rows i and channels c.

    Each has axes, and a cut of its reduction, of its own. Strides are in elements.
    """

    dtype: np.dtype
    batch: int
    cuts: list[implicit_gemm.Blocks]
    axes: list[Axes]
    source: Strides
    result: Strides
    zeros: bool  # is the source padded with zeros?
    workers: int
    kept: bool  # are the weights packed before the products?
    rows_are_neighbours: bool = False  # in the memory of the weights
    group_steps: tuple[int, int] | None = None  # how far apart groups are, if not all their channels


def axes_of(geometry: ConvGeometry) -> Axes:
    """The dimensions of a forward pass."""
    return tuple(
        implicit_gemm.Axis(*fields)
        for fields in zip(
            geometry.output_size, geometry.kernel_size, geometry.stride, geometry.dilation,
            geometry.input_coordinates, geometry.pad_before, geometry.input_size, strict=True,
        )
    )  # fmt: skip


def offsets_of(places: Sequence[Sequence[int]], steps: Sequence[int]) -> np.ndarray:
    """Offset in memory of every combination of these places in each dimension, in order."""
    offsets = np.zeros(1, np.int64)
    for each, step in zip(places, steps, strict=True):
        offsets = (offsets[:, None] + np.array(each, np.int64) * step).ravel()
    return offsets


def workers_of_product(problem: Problem) -> int:
    """How many threads the products of a problem are worth."""
    return problem.workers if implicit_gemm.work(problem.geometry.flops) >= tasks.SERIAL_FLOPS else 1


@asked_in_turn
def forward_product(problem: Problem) -> Products:
    """The forward pass. The reduction is (input channel, tap)."""
    geometry, dtype = problem.geometry, problem.dtype
    axes, x = implicit_gemm.fold_strides(axes_of(geometry), problem.steps(problem.input))
    blocks = implicit_gemm.make_blocks(
        dtype, geometry.groups, geometry.out_channels_per_group, geometry.in_channels_per_group, axes,
        implicit_gemm.can_stay_in_place(axes, x),
    )  # fmt: skip
    return Products(
        dtype, geometry.batch, [blocks], [axes], x, problem.steps(problem.output), geometry.padding_mode == "zeros",
        workers_of_product(problem), problem.kept,
    )  # fmt: skip


class ProductMethod(Method):
    """A method for `Products`, and so for the forward pass."""

    @abstractmethod
    def cannot_products(self, products: Products) -> str | None:
        """`cannot`, of products."""

    def slower_products(self, products: Products) -> str | None:
        """`slower`, of products."""
        return None

    @abstractmethod
    def cut(self, products: Products) -> list[implicit_gemm.Blocks]:
        """The cuts with panels of rows as the method has them."""

    @abstractmethod
    def plan_product(self, products: Products, blocks: implicit_gemm.Blocks, axes: Axes) -> implicit_gemm.Plan:
        """The plan of one of them."""

    def cannot(self, problem: Problem) -> str | None:
        return self.cannot_products(forward_product(problem))

    def slower(self, problem: Problem) -> str | None:
        return self.slower_products(forward_product(problem))

    def plan(self, problem: Problem) -> Plan:
        geometry, products, w = problem.geometry, forward_product(problem), problem.steps(problem.weight)
        (blocks,), (axes,) = self.cut(products), products.axes
        row, channel, *steps = w
        packing = implicit_gemm.plan_packing(
            blocks, (geometry.out_channels, geometry.in_channels_per_group, *geometry.kernel_size), w,
            problem.dtype.itemsize, (blocks.rows * row, row, channel),
            offsets_of([range(n) for n in geometry.kernel_size], steps), check_finite=self.values == FINITE_WEIGHTS,
        )  # fmt: skip
        plan = self.plan_product(products, blocks, axes)
        size = blocks.packed_size + channels_last.READ_BEYOND
        return CorrelationPlan(self, problem.dtype, blocks, packing, plan, size, problem.workers, problem.kept)


@dataclass(frozen=True)
class CorrelationPlan(Plan):
    """A forward pass as one product, of weights that are packed for it."""

    method: Method
    dtype: np.dtype
    blocks: implicit_gemm.Blocks
    packing: implicit_gemm.Packing
    product: implicit_gemm.Plan
    packed_size: int  # elements
    workers: int
    kept: bool

    @property
    def workspace(self) -> int:
        packed = 0 if self.product.packs or self.kept else self.packed_size * self.dtype.itemsize
        return packed + scratch_of(self.product, self.workers)

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        input, weight = operands
        if packed is not None:
            layout = "direct", self.dtype, self.blocks, self.method.values
            kept, right = packed.get(layout, lambda: self._packed_alone(weight))
            if right:
                tasks.run_stages(
                    self.dtype, [implicit_gemm.correlation(self.product, input, kept, out, bias, relu, False)]
                )
            return None if right else True
        unpacked = implicit_gemm.Unpacked(self.packing, weight)
        weights: np.ndarray | implicit_gemm.Unpacked = unpacked
        stages = []
        if not self.product.packs:
            weights = tasks.workspace(self.packed_size, self.dtype)
            stages.append(implicit_gemm.packing(unpacked, self.blocks.groups, weights))
        stages.append(implicit_gemm.correlation(self.product, input, weights, out, bias, relu, False, len(stages)))
        tasks.run_stages(self.dtype, stages)
        return None if unpacked.finite() else True

    def _packed_alone(self, weight: np.ndarray) -> tuple[np.ndarray, bool]:
        """The packed weights, in memory of their own, and are they finite (if the packing is one that looks)?"""
        packed = np.empty(self.packed_size, self.dtype)
        unpacked = implicit_gemm.Unpacked(self.packing, weight)
        tasks.run_stages(self.dtype, [implicit_gemm.packing(unpacked, self.blocks.groups, packed)])
        return packed, unpacked.finite()


def scratch_of(plan: implicit_gemm.Plan, workers: int) -> int:
    """Bytes of scratch memory of all threads, and of the parameters."""
    return min(plan.tasks, workers) * plan.scratch + plan.parameters.nbytes


class SmallPlanes(ProductMethod):
    """The pixels of whole small planes as rows, without the products with the zeros around them."""

    name = "small_planes"
    values = FINITE_WEIGHTS  # in the forward pass, a zero that is left out times these would be nan

    def cannot_products(self, products: Products) -> str | None:
        if not products.zeros:
            return "the padding is not zeros, with which products could be left out"
        if self._cut(products) is None:
            return "the planes are large, or few of their products are with zeros, or channels do not fill its panels"
        return None

    def slower_products(self, products: Products) -> str | None:
        needed = small_planes.needed(products.axes)
        if channels_last.cut_all(
            products.dtype, products.cuts, products.axes, products.source, products.result, needed
        ):
            return "channels_last takes less time, without transposes"
        return None

    def _cut(self, products: Products) -> list[implicit_gemm.Blocks] | None:
        return small_planes.cut_all(
            products.dtype, products.batch, products.cuts, products.axes, products.workers,
            products.rows_are_neighbours,
        )  # fmt: skip

    def cut(self, products: Products) -> list[implicit_gemm.Blocks]:
        return self._cut(products) or []

    def plan_product(self, products: Products, blocks: implicit_gemm.Blocks, axes: Axes) -> implicit_gemm.Plan:
        return small_planes.plan_correlation(
            products.dtype, products.batch, blocks, axes, products.source, products.result, products.workers,
            products.kept, products.group_steps,
        )  # fmt: skip


class ChannelsLast(ProductMethod):
    """Channels along the vectors, of images whose channels are neighbours in memory."""

    name = "channels_last"

    def cannot_products(self, products: Products) -> str | None:
        if not self._cut(products, math.inf):
            return "the channels of a pixel are not neighbours in memory, or the reduction is too long for one block"
        return None

    def slower_products(self, products: Products) -> str | None:
        if not self._cut(products, 1):
            return "channels would leave lanes of the vectors empty, for longer than transposes take"
        return None

    def _cut(self, products: Products, needed: float) -> list[implicit_gemm.Blocks] | None:
        return channels_last.cut_all(
            products.dtype, products.cuts, products.axes, products.source, products.result, needed
        )

    def cut(self, products: Products) -> list[implicit_gemm.Blocks]:
        return self._cut(products, math.inf) or []

    def plan_product(self, products: Products, blocks: implicit_gemm.Blocks, axes: Axes) -> implicit_gemm.Plan:
        return channels_last.plan_correlation(
            products.dtype, products.batch, blocks, axes, products.source, products.result, products.zeros,
            products.workers, products.kept, products.group_steps,
        )  # fmt: skip


class ImplicitGemm(ProductMethod):
    """Pixels along the vectors, from panels of the image: any shape, any strides."""

    name = "implicit_gemm"

    def cannot_products(self, products: Products) -> str | None:
        return None

    def cannot(self, problem: Problem) -> str | None:
        return None

    def slower(self, problem: Problem) -> str | None:
        return None

    def cut(self, products: Products) -> list[implicit_gemm.Blocks]:
        return products.cuts

    def plan_product(self, products: Products, blocks: implicit_gemm.Blocks, axes: Axes) -> implicit_gemm.Plan:
        batch, folded, x, y = implicit_gemm.fold_batch(products.batch, axes, products.source, products.result)
        return implicit_gemm.plan_correlation(
            products.dtype, batch, blocks, folded, x, y, products.zeros, implicit_gemm.can_stay_in_place(folded, x),
            products.workers, packed=products.kept, group_steps=products.group_steps,
        )  # fmt: skip

    def plan(self, problem: Problem) -> Plan:
        return self._weight_gradient(problem) if problem.operation == "weight_grad" else super().plan(problem)

    def _weight_gradient(self, problem: Problem) -> Plan:
        geometry, dtype = problem.geometry, problem.dtype
        x, dy, dw = map(problem.steps, (problem.input, problem.output, problem.weight))
        axes, x = implicit_gemm.fold_strides(axes_of(geometry), x)
        batch, axes, x, dy = implicit_gemm.fold_batch(geometry.batch, axes, x, dy)
        shape = tuple(axis.out for axis in axes)
        in_place = implicit_gemm.can_stay_in_place(axes, x) and implicit_gemm.is_flat(shape, dy[2:])
        rows, channels = geometry.out_channels_per_group, geometry.in_channels_per_group
        steps = rows * dw[0], dw[0], dw[1]
        exchanged = (
            in_place
            and implicit_gemm.can_stay_in_place(axes, dy)
            and implicit_gemm.is_better_exchanged(dtype, rows, channels)
        )
        if exchanged:  # dw[o, c] = sum of dy[o] * x[c] over the pixels: the gradient of dy's weights for x, transposed
            rows, channels, x, dy, steps = channels, rows, dy, x, (steps[0], steps[2], steps[1])
        offsets = offsets_of([range(n) for n in geometry.kernel_size], dw[2:])
        plan = implicit_gemm.plan_weight_gradient(
            dtype, batch, geometry.groups, rows, channels, axes, x, dy, steps, offsets,
            geometry.padding_mode == "zeros", in_place,
        )  # fmt: skip
        return WeightGradientPlan(self, plan, exchanged, dtype, problem.add, problem.workers)


@dataclass(frozen=True)
class WeightGradientPlan(Plan):
    """A weight gradient as one product; with `exchanged`, of the gradient and the input."""

    method: Method
    product: implicit_gemm.Plan
    exchanged: bool
    dtype: np.dtype
    add: bool
    workers: int

    @property
    def workspace(self) -> int:
        parameters = self.product.parameters
        parts = self.product.tasks * int(parameters["tile_elements"]) if parameters["splits"] > 1 else 0
        return parts * self.dtype.itemsize + scratch_of(self.product, self.workers)

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        input, grad_output = operands
        if self.exchanged:
            input, grad_output = grad_output, input
        implicit_gemm.weight_gradient(self.product, input, grad_output, out, self.add)
        return None


SMALL_PLANES, CHANNELS_LAST, IMPLICIT_GEMM = SmallPlanes(), ChannelsLast(), ImplicitGemm()

# In order, as in the table.
PRODUCTS: tuple[ProductMethod, ...] = (SMALL_PLANES, CHANNELS_LAST, IMPLICIT_GEMM)


def choose_product(problem: Problem, products: Products) -> ProductMethod:
    """The first that applies to these products of a problem, and pays."""
    for method in PRODUCTS:
        if (
            (problem.after or allowed(method.name))
            and method.cannot_products(products) is None
            and (asked_for(problem, method) or method.slower_products(products) is None)
        ):
            return method
    raise ValueError(f"no method for products of {problem}")
