"""Methods by transforms: Winograd and the FFT. They are faster where they apply and pay, and one value spreads.

The choice depends on the shape of one sample, the element type and the pass alone, never on the number of threads, the
batch or strides, so that results stay the same bits. (docs/algorithms.md has what was measured.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...geometry import ConvGeometry
from ...packed import PackedWeights
from .. import fft, implicit_gemm, tasks, winograd, winograd_gradient
from ..problem import FINITE_OPERANDS, Method, Operands, Plan, Problem, Redo, epsilon, terms_of_sum
from .products import scratch_of
from .table import run, runs_of_samples

# Winograd pays for planes of at least so many pixels, from so many channels times the square root of the pixels on:
# from 79 channels of 14 x 14, 40 of 28 x 28 and 20 of 56 x 56 pixels. Fewer leave its transforms, that of the weights
# included, more time than they save. Measured by `python -m bench.crossover winograd` (docs/algorithms.md); since the
# choice must not depend on the batch, it is between what pays for one sample and for four.
WINOGRAD_PIXELS, WINOGRAD_SIZE = 14 * 14, 1100

# The same of the weight gradient, whose transforms have no weights among them: from 16 channels of 14 x 14 pixels on,
# 32 of 7 x 7.
WINOGRAD_GRADIENT_CHANNELS, WINOGRAD_GRADIENT_PIXELS, WINOGRAD_GRADIENT_SIZE = 16, 7 * 7, 224

# Least ratio of the multiplications of the definition to those of Winograd: 4 if the tiles are whole, less where they
# reach far beyond the image, which is never made up for.
WINOGRAD_SAVES = 1.6

# Operations a nanosecond of the direct sum on one core, in float32: with one channel in one dimension, and otherwise.
# Measured by `python -m bench.crossover fft` on AVX2, as the rates of the FFT in `cpu.fft` are; docs/algorithms.md has
# the table of an AVX-512 machine, which the same rates fit. float64 halves all of them.
DIRECT_RATE_OF_LINES, DIRECT_RATE = 60.0, 90.0

# The FFT must promise to be this much faster: the estimates are right within a third, its error is of another kind, and
# a second thread makes it 1.1 to 1.8 times faster where the direct sum becomes 1.9 times faster.
FFT_MARGIN = 1.6


class Winograd(Method):
    """3 x 3 kernels of stride 1 with a quarter of the multiplications."""

    name = "winograd"
    algorithm = "winograd"
    values = FINITE_OPERANDS

    def cannot(self, problem: Problem) -> str | None:
        return winograd.why_not(problem.operation, problem.geometry)

    def slower(self, problem: Problem) -> str | None:
        geometry, size = problem.geometry, _image(problem)
        channels = min(geometry.in_channels, geometry.out_channels)
        pixels, fewest, least, enough = size[0] * size[1], 1, WINOGRAD_PIXELS, WINOGRAD_SIZE
        if problem.operation == "weight_grad":
            fewest, least, enough = WINOGRAD_GRADIENT_CHANNELS, WINOGRAD_GRADIENT_PIXELS, WINOGRAD_GRADIENT_SIZE
        if pixels < least:
            return f"it pays from {least} pixels on, here are {pixels}"
        fewest = max(fewest, math.ceil(enough / math.sqrt(pixels)))
        if channels < fewest:
            return f"of {size[0]}x{size[1]} pixels it pays from {fewest} channels on, here are {channels}"
        saved = geometry.flops / max(1, self.flops(problem))
        if saved < WINOGRAD_SAVES:
            return f"its tiles reach beyond {size[0]}x{size[1]} pixels: {saved:.3g} times fewer multiplications"
        return None

    def why(self, problem: Problem) -> str:
        saved = problem.geometry.flops / self.flops(problem)
        return f"{saved:.3g} times fewer multiplications than the definition, of enough channels and pixels"

    def flops(self, problem: Problem) -> int:
        geometry, (height, width) = problem.geometry, _image(problem)
        m = winograd.tile_size(geometry, problem.operation)
        tiles = geometry.batch * -(-height // m) * -(-width // m)
        return 2 * tiles * (m + 2) ** 2 * geometry.in_channels * geometry.out_channels

    def error(self, problem: Problem) -> float:
        """F(4x4, 3x3) has numbers of up to 4 where the sum has 1."""
        terms, m = terms_of_sum(problem), winograd.tile_size(problem.geometry, problem.operation)
        if problem.operation == "weight_grad":  # a chain of tiles for each part of them, of which there are about 4
            return epsilon(problem) * math.sqrt(6 + terms / m**2 / 16)
        # chains of channels, and a chain of those
        channels = terms / 9
        growth = math.sqrt(6 + 0.49 * min(channels, winograd.CHAIN) + 0.023 * channels)
        return epsilon(problem) * growth / (1 if m == 4 else 2)

    def plan(self, problem: Problem) -> Plan:
        geometry, dtype = problem.geometry, problem.dtype
        x, w, y = map(problem.steps, (problem.input, problem.weight, problem.output))
        if problem.operation == "weight_grad":
            gradient = winograd_gradient.plan(geometry, dtype, x, y, w)
            return WinogradGradientPlan(self, gradient, dtype, problem.add, problem.workers)
        if problem.add:
            return AddedPlan(self, problem)
        source, target = (x, y) if problem.operation == "forward" else (y, x)
        tiles = winograd.plan(geometry, problem.operation, dtype, source, target, problem.workers)
        m = winograd.tile_size(geometry, problem.operation)
        return WinogradPlan(self, problem, tiles, m, w)


def _image(problem: Problem) -> tuple[int, int]:
    """Height and width of what is cut into tiles."""
    geometry = problem.geometry
    return (geometry.input_size if problem.operation == "input_grad" else geometry.output_size)[1:]


@dataclass(frozen=True)
class WinogradPlan(Plan):
    """A forward pass or an input gradient, which begins with the transform of the weights."""

    method: Method
    problem: Problem
    tiles: implicit_gemm.Plan
    m: int  # outputs of a tile in each dimension
    steps: tuple[int, ...]  # strides of the weight, in elements

    @property
    def workspace(self) -> int:
        weights = 0
        if not self.problem.kept:
            geometry = self.problem.geometry
            rows, channels = geometry.out_channels, geometry.in_channels
            if self.problem.operation == "input_grad":
                rows, channels = channels, rows
            weights = winograd.transformed_size(rows, channels, self.m, self.problem.dtype)
        return weights * self.problem.dtype.itemsize + scratch_of(self.tiles, self.problem.workers)

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        array, weight = operands

        def transform(keep: bool) -> np.ndarray:
            return winograd.transform_weights(
                weight, out.dtype, self.problem.operation, self.m, self.steps, keep
            )

        if packed is None:
            v = transform(False)
        else:
            v = packed.get(("winograd", out.dtype, self.m), lambda: transform(True))
        redo = winograd.run(self.tiles, array, v, bias, relu, out)
        return redo if redo.any() else None


class AddedPlan(Plan):
    """A result in an array of its own, which is then added: a sample may have to be computed twice."""

    def __init__(self, method: Method, problem: Problem) -> None:
        self.method = method
        self.problem = problem

    def _alone(self, result: np.ndarray) -> Problem:
        return self.problem._replace(algorithm=self.method.algorithm, input=result.strides, add=False)

    @property
    def workspace(self) -> int:
        geometry = self.problem.geometry
        elements = geometry.batch * geometry.in_channels * math.prod(geometry.input_size)
        inner = self.method.plan(self.problem._replace(add=False))
        return elements * self.problem.dtype.itemsize + inner.workspace

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        result = np.empty_like(out)
        run(self._alone(result), operands, bias, relu, packed, result)
        np.add(out, result, out=out)
        return None


@dataclass(frozen=True)
class WinogradGradientPlan(Plan):
    """A weight gradient, which is added where it is right."""

    method: Method
    gradient: implicit_gemm.Plan
    dtype: np.dtype
    add: bool
    workers: int

    @property
    def workspace(self) -> int:
        parts = winograd_gradient.partial_size(self.gradient) * self.dtype.itemsize
        return parts + tasks.workers(self.gradient.flops) * self.gradient.scratch

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        result = np.empty(out.shape, out.dtype) if self.add else out
        if not winograd_gradient.run(self.gradient, *operands, result):
            return True
        if self.add:
            out += result
        return None


class Fft(Method):
    """Large kernels, by the fast Fourier transform of tiles."""

    name = "fft"
    algorithm = "fft"
    values = FINITE_OPERANDS

    def cannot_transform(self, problem: Problem) -> str | None:
        """`cannot`, whatever the padding."""
        return fft.why_not(problem.operation, problem.geometry)

    def cannot(self, problem: Problem) -> str | None:
        mode = problem.geometry.padding_mode
        if (reason := self.cannot_transform(problem)) is None and problem.operation == "input_grad" and mode != "zeros":
            return f"padding_mode is {mode!r}: it computes the gradient of the padded input (see `padded_fft`)"
        return reason

    def slower(self, problem: Problem) -> str | None:
        geometry = problem.geometry
        if max(geometry.kernel_size) < 3:
            return "it pays for kernels of 3 taps or more in a dimension"
        by_fft, direct = fft.nanoseconds(problem.operation, geometry), direct_nanoseconds(geometry)
        return None if FFT_MARGIN * by_fft < direct else _both_times(by_fft, direct)

    def why(self, problem: Problem) -> str:
        return _both_times(fft.nanoseconds(problem.operation, problem.geometry), direct_nanoseconds(problem.geometry))

    def flops(self, problem: Problem) -> int:
        return fft.flops(problem.operation, problem.geometry)

    def error(self, problem: Problem) -> float:
        """A transform of n points adds eps**2 * 0.1 log2(n) to the square, three times: both operands, and back."""
        tiling = fft.make_tiling(problem.operation, problem.geometry)
        added = terms_of_sum(problem) / problem.taps
        if problem.operation == "weight_grad":
            added = problem.geometry.batch * math.prod(tiling.count)
        return epsilon(problem) * math.sqrt(0.3 * math.log2(math.prod(tiling.tile)) + added / 50)

    def plan(self, problem: Problem) -> Plan:
        return FftPlan(self, problem)


def direct_nanoseconds(geometry: ConvGeometry) -> float:
    """What the direct sum costs for one sample on one core, roughly."""
    lines = geometry.in_channels_per_group == 1 and geometry.kernel_size[:2] == (1, 1)
    return geometry.flops / max(geometry.batch, 1) / (DIRECT_RATE_OF_LINES if lines else DIRECT_RATE)


def _both_times(by_fft: float, direct: float) -> str:
    return f"about {by_fft / 1e6:.3g} ms of one core for a sample, against {direct / 1e6:.3g} ms of the direct sum"


@dataclass(frozen=True)
class FftPlan(Plan):
    """The samples that are safe, as runs of neighbouring ones. (The tiling is `fft`'s.)"""

    method: Method
    problem: Problem

    @property
    def workspace(self) -> int:
        return fft.workspace(self.problem.operation, self.problem.geometry, self.problem.dtype)

    def run(
        self, operands: Operands, bias: np.ndarray | None, relu: bool, packed: PackedWeights | None, out: np.ndarray
    ) -> Redo:
        operation, geometry, add = self.problem.operation, self.problem.geometry, self.problem.add
        array, weight = operands
        if operation == "weight_grad":
            return None if fft.weight_grad(geometry, array, weight, add, out) else True
        safe = fft.safe_samples(operation, geometry, array, weight)
        for is_safe, samples in runs_of_samples(safe):
            if not is_safe:
                continue
            some = replace(geometry, batch=samples.stop - samples.start)
            if operation == "forward":
                fft.forward(some, array[samples], weight, bias, relu, packed, out[samples])
            else:
                fft.input_grad(some, weight, array[samples], bias, relu, add, out[samples])
        return None if safe.all() else ~safe


WINOGRAD, FFT = Winograd(), Fft()
