"""Benchmarks on a CUDA GPU, unattended: ``python -m bench.cuda`` in a checkout, ``make bench-cuda``.

Every kernel is first checked on small odd shapes: against fastconv.reference, and the matrix products in every tile
against sums in float64. Then the layers of shapes/, at the batch of a GPU, are checked and timed beside torch (cuDNN),
CuPy and Liger-Kernel, whichever are installed, and the rows go to results/<gpu>.csv like those of the CPU. Needs
numba-cuda and one of torch and CuPy; nothing has to be installed of fastconv itself.

Nothing ends the run before its time but the machine: an error is told and counted, and the next job begins. Jobs run in
a process of their own; where it dies, loses the device or hangs, another goes on with the job after the one it was at.

How a call is timed. The device is first made to sleep, until the host has queued a sample of calls: no time of the host
is in the result, and the time that a call costs the host is measured apart. Before each call the second-level cache is
overwritten. A sample is the time between two events around one call; peers take turns.

How a result is checked. All of it: poisoned with nan before the call, and without nan after it; where torch is
installed, close to torch's own float32 result. Some elements, corners among them: against the sum in float64 on the
host, within what rounding may do.

The peaks that rates are compared with are measured in the same run: a copy far larger than the caches, multiply-adds
in registers for float32 and float64, torch's product of two large matrices for what the tensor cores compute.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import gc
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np

from . import cases, results
from .cases import Case, ConvolutionCase, CrossEntropyCase
from .checks import ALLOWANCE, Disagreement
from .peers import Unsupported, torch_call

# float32 arrays that tensor cores may multiply, as torch calls it.
TF32 = "tf32"
DTYPES = ("float32", TF32, "bfloat16", "float16", "float64")

BATCH = 32  # of the two-dimensional networks, whose tables have the batch of a CPU
LEAST_LOGITS = 1 << 26  # of cross-entropy, whose batch grows until there are as many: more than the caches hold
SAMPLES, ROUNDS = 5, 3  # of each peer in a round
BUDGET = 440.0  # seconds after which nothing more is begun,
LATE = 20.0  # and how much later what was begun must have ended
SHARE_OF_CHECKS = 0.4  # of the budget, at most, for the small shapes: most of it is the compiler's
PATIENCE = 60.0  # seconds of a job, after which it hangs; the longest compile some kernels

# What a sum in this arithmetic may be off, relative to the norm of its terms, and after rounding the result.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, TF32: 2.0**-10, "float16": 2.0**-23, "bfloat16": 2.0**-23}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# How far fastconv's result as a whole may be from torch's, ||difference|| / ||torch's||: both round.
NEAR = {"float64": 1e-12, "float32": 1e-4, TF32: 3e-3, "float16": 3e-3, "bfloat16": 2e-2}

CHECKED = [
    ConvolutionCase("check", "odd", 2, 5, (7, 6), 9, (3, 3), (1, 2), (1, 1), (1, 1), 1),
    ConvolutionCase("check", "tall", 1, 18, (5, 6), 133, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    ConvolutionCase("check", "grouped", 2, 16, (8, 8), 24, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    ConvolutionCase("check", "pointwise", 3, 32, (5, 7), 40, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ConvolutionCase("check", "depthwise", 2, 7, (12, 16), 7, (3, 3), (1, 1), (1, 1), (1, 1), 7),
    ConvolutionCase("check", "depthwise.odd", 2, 7, (9, 13), 7, (5, 5), (2, 2), (2, 2), (1, 1), 7),
    ConvolutionCase("check", "depthwise.wide", 1, 3, (16, 12), 3, (9, 9), (1, 1), (4, 4), (1, 1), 3),
    ConvolutionCase("check", "causal", 2, 6, (40,), 6, (4,), (1,), (3,), (1,), 6),
    ConvolutionCase("check", "dilated", 2, 12, (33,), 8, (3,), (1,), (4,), (4,), 1),
    ConvolutionCase("check", "volume", 1, 6, (5, 6, 7), 8, (3, 3, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    ConvolutionCase("check", "plane", 1, 1, (37, 41), 1, (7, 7), (1, 1), (3, 3), (1, 1), 1),
    CrossEntropyCase("check", "short rows", 37, 10, (), "index"),
    CrossEntropyCase("check", "rows", 9, 1000, (), "index"),
    CrossEntropyCase("check", "probabilities", 9, 1001, (), "probabilities"),
    CrossEntropyCase("check", "long rows", 3, 70001, (), "index"),
    CrossEntropyCase("check", "positions", 2, 19, (8, 12), "index"),
]

# Of a matrix product, more than one of the largest tiles each way, tails on both sides; and one without padding, which
# has kernels of its own.
EVERY_TILE = [
    ConvolutionCase("check", "tiles", 3, 24, (8, 7), 132, (3, 1), (1, 1), (1, 0), (1, 1), 1),
    ConvolutionCase("check", "tiles, pointwise", 3, 40, (8, 7), 132, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]

DEPTHWISE = "mobilenet_v2,efficientnet_b0,convnext_tiny,audio,cliffs"
GRADIENTS = ("weight_grad", "input_grad")
# In the order of what is wanted most, should the time not suffice: (networks, layers of few channels per group only?,
# passes, arithmetic).
STEPS: list[tuple[str, bool, tuple[str, ...], str]] = [
    ("resnet50,vgg16", False, ("forward",), "float32"),
    (DEPTHWISE, True, ("forward",), "float32"),
    ("cross_entropy", False, ("forward", "with_grad"), "float32"),
    ("resnet50,vgg16", False, ("forward",), "bfloat16"),
    ("resnet50,vgg16", False, ("forward",), TF32),
    ("cross_entropy", False, ("with_grad",), "bfloat16"),
    ("resnet50,vgg16", False, GRADIENTS, "float32"),
    (DEPTHWISE, True, GRADIENTS, "float32"),
    (DEPTHWISE, True, ("forward", *GRADIENTS), "bfloat16"),
    ("resnet50,vgg16", False, GRADIENTS, "bfloat16"),
    ("audio,cliffs,medical,planes,unet", False, ("forward", *GRADIENTS), "float32"),
    ("resnet50,vgg16", False, GRADIENTS, TF32),
    ("mobilenet_v2,efficientnet_b0", False, ("forward", *GRADIENTS), "float32"),
    ("cliffs", False, ("forward",), "float64"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of a device
# ---------------------------------------------------------------------------------------------------------------------


class Library(Protocol):
    """Whose arrays everybody works on."""

    name: str

    def put(self, array: np.ndarray, dtype: str) -> Any: ...
    def normal(self, shape: Sequence[int], dtype: str, scale: float, seed: int) -> Any: ...
    def integers(self, high: int, shape: Sequence[int], seed: int) -> Any: ...
    def probabilities(self, shape: Sequence[int], dtype: str, seed: int) -> Any: ...
    def empty(self, shape: Sequence[int], dtype: str) -> Any: ...
    def poison(self, array: Any) -> None: ...
    def has_nan(self, array: Any) -> bool: ...
    def host(self, array: Any) -> np.ndarray: ...
    def distance(self, a: Any, b: Any) -> float: ...
    def mean_loss(self, logits: Any, target: Any) -> float: ...
    def synchronize(self) -> None: ...


class Torch:
    """torch's arrays; `device` is "cpu" in tests."""

    name = "torch"

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self.torch, self.device = torch, device
        if device == "cuda" and not torch.cuda.is_available():
            raise Unsupported("torch finds no CUDA device")
        torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms on the first call
        allow_tf32(torch, False)

    def _dtype(self, dtype: str) -> Any:
        return getattr(self.torch, "float32" if dtype == TF32 else dtype)

    def put(self, array: np.ndarray, dtype: str) -> Any:
        made = self.torch.from_numpy(np.array(array, order="C")).to(self.device)
        return made.to(self._dtype(dtype)) if array.dtype.kind == "f" else made

    def _generator(self, seed: int) -> Any:
        return self.torch.Generator(self.device).manual_seed(seed)

    def normal(self, shape: Sequence[int], dtype: str, scale: float, seed: int) -> Any:
        made = self.torch.empty(tuple(shape), dtype=self._dtype(dtype), device=self.device)
        return made.normal_(0, scale, generator=self._generator(seed))

    def integers(self, high: int, shape: Sequence[int], seed: int) -> Any:
        return self.torch.randint(high, tuple(shape), device=self.device, generator=self._generator(seed))

    def probabilities(self, shape: Sequence[int], dtype: str, seed: int) -> Any:
        made = self.torch.rand(tuple(shape), device=self.device, generator=self._generator(seed))
        return (made / made.sum(1, keepdim=True)).to(self._dtype(dtype))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self.torch.empty(tuple(shape), dtype=self._dtype(dtype), device=self.device)

    def poison(self, array: Any) -> None:
        array.fill_(math.nan)

    def has_nan(self, array: Any) -> bool:
        return bool(array.isnan().any())

    def host(self, array: Any) -> np.ndarray:
        made = array.detach()
        return (made.double() if made.is_floating_point() else made).cpu().numpy()

    def distance(self, a: Any, b: Any) -> float:
        """||a - b|| / ||b||"""
        difference = (a - b).flatten().float() if a.element_size() < 8 else (a - b).flatten()
        whole = b.flatten().float() if b.element_size() < 8 else b.flatten()
        return float(difference.norm() / whole.norm())

    def mean_loss(self, logits: Any, target: Any) -> float:
        """In float64, some samples at a time."""
        loss = self.torch.nn.functional.cross_entropy
        step = max(1, (1 << 26) // (logits[0].numel()))
        return sum(
            float(loss(logits[n : n + step].detach().double(), _as_double(target[n : n + step]), reduction="sum"))
            for n in range(0, len(logits), step)
        ) / (logits.numel() // logits.shape[1])

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def _as_double(target: Any) -> Any:
    return target.double() if target.is_floating_point() else target


def allow_tf32(torch: Any, allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


class Cupy:
    """CuPy's arrays; `xp` is NumPy in tests."""

    name = "cupy"

    def __init__(self, xp: Any = None) -> None:
        if xp is None:
            import cupy as xp
        self.xp = xp

    def _dtype(self, dtype: str) -> str:
        if dtype == "bfloat16":
            raise Unsupported("bfloat16 arrays need torch")
        return "float32" if dtype == TF32 else dtype

    def put(self, array: np.ndarray, dtype: str) -> Any:
        return self.xp.asarray(array.astype(self._dtype(dtype)) if array.dtype.kind == "f" else array)

    def normal(self, shape: Sequence[int], dtype: str, scale: float, seed: int) -> Any:
        made = self.xp.random.default_rng(seed).standard_normal(tuple(shape), dtype=np.float32)
        made *= np.float32(scale)
        return made.astype(self._dtype(dtype), copy=False)

    def integers(self, high: int, shape: Sequence[int], seed: int) -> Any:
        return self.xp.random.default_rng(seed).integers(0, high, tuple(shape))

    def probabilities(self, shape: Sequence[int], dtype: str, seed: int) -> Any:
        made = self.xp.random.default_rng(seed).random(tuple(shape), dtype=np.float32)
        made /= made.sum(axis=1, keepdims=True)
        return made.astype(self._dtype(dtype), copy=False)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self.xp.empty(tuple(shape), self._dtype(dtype))

    def poison(self, array: Any) -> None:
        array.fill(math.nan)

    def has_nan(self, array: Any) -> bool:
        return bool(self.xp.isnan(array).any())

    def host(self, array: Any) -> np.ndarray:
        made = array.get() if hasattr(array, "get") else np.asarray(array)
        return made.astype(np.float64) if made.dtype.kind == "f" else made

    def distance(self, a: Any, b: Any) -> float:
        return float(self.xp.linalg.norm((a - b).ravel()) / self.xp.linalg.norm(b.ravel()))

    def mean_loss(self, logits: Any, target: Any) -> float:
        xp, total = self.xp, 0.0
        step = max(1, (1 << 26) // logits[0].size)
        for n in range(0, len(logits), step):
            z = logits[n : n + step].astype("float64")
            z -= z.max(axis=1, keepdims=True)
            z -= xp.log(xp.exp(z).sum(axis=1, keepdims=True))
            y = target[n : n + step]
            picked = z * y if y.dtype.kind == "f" else xp.take_along_axis(z, xp.expand_dims(y, 1), axis=1)
            total -= float(picked.sum())
        return total / (logits.size // logits.shape[1])

    def synchronize(self) -> None:
        if hasattr(self.xp, "cuda"):
            self.xp.cuda.get_current_stream().synchronize()


def library() -> Library:
    """torch's arrays, or else CuPy's. Raises Unsupported where neither can be used."""
    reasons = []
    for make in (Torch, Cupy):
        try:
            return make()
        except Exception as error:  # a broken installation raises OSErrors and others, too
            reasons.append(f"{make.name}: {_said(error)}")
    raise Unsupported(f"no array library for the GPU ({'; '.join(reasons)})")


# ---------------------------------------------------------------------------------------------------------------------
# Who is compared
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One pass of one case, in one arithmetic, with the operands in device memory."""

    case: Case
    which: str
    dtype: str
    library: Library
    operands: dict[str, Any]

    @property
    def result_shape(self) -> tuple[int, ...]:
        if isinstance(self.case, CrossEntropyCase):
            return self.case.logits_shape
        shapes = {
            "forward": self.case.output_shape, "weight_grad": self.case.weight_shape,
            "input_grad": self.case.input_shape,
        }  # fmt: skip
        return shapes[self.which]

    def convolution(self) -> ConvolutionCase:
        if not isinstance(self.case, ConvolutionCase):
            raise Unsupported("has no cross-entropy")
        return self.case


def operands(case: Case, dtype: str, arrays: Library) -> dict[str, Any]:
    """As `case.operands`, made on the device: normal, such that results are of about unit variance."""
    if isinstance(case, CrossEntropyCase):
        logits = arrays.normal(case.logits_shape, dtype, 3.0, 1)
        if case.target == "index":
            return {"logits": logits, "target": arrays.integers(case.classes, (case.batch, *case.size), 2)}
        return {"logits": logits, "target": arrays.probabilities(case.logits_shape, dtype, 2)}
    return {
        "input": arrays.normal(case.input_shape, dtype, 1.0, 1),
        "weight": arrays.normal(case.weight_shape, dtype, 1 / math.sqrt(math.prod(case.weight_shape[1:])), 2),
        "grad_output": arrays.normal(case.output_shape, dtype, 1.0, 3),
    }


@dataclass(frozen=True)
class Prepared:
    """``call()`` returns the result, or loss and gradient; `context` is that of all calls."""

    call: Callable[[], Any]
    result: Callable[[Any], Any] = lambda r: r  # with channels first


def _fastconv(problem: Problem, layout: str | None = None) -> Prepared:
    import fastconv as fc

    arrays = dict(problem.operands)
    if problem.dtype == TF32 and not hasattr(fc, "set_float32_precision"):
        raise Unsupported("this version has no tf32")
    if isinstance(problem.case, CrossEntropyCase):
        if layout is not None:
            raise Unsupported("cross-entropy has one layout")
        if problem.which == "forward":
            return Prepared(lambda: fc.softmax_cross_entropy(arrays["logits"], arrays["target"]))
        out = problem.library.empty(problem.result_shape, problem.dtype)
        problem.library.poison(out)
        return Prepared(
            lambda: fc.softmax_cross_entropy_with_grad(arrays["logits"], arrays["target"], grad_out=out)
        )
    case = problem.case
    options = (case.stride, case.padding, case.dilation, case.groups)
    form: dict[str, Any] = {}
    back: Callable[[Any], Any] = lambda r: r  # noqa: E731
    shape = problem.result_shape
    if layout is not None:
        form["layout"] = layout
        for name in ("input", "grad_output"):
            arrays[name] = _contiguous(_moved(arrays[name], 1, -1))
        if problem.which != "weight_grad":
            shape = (shape[0], *shape[2:], shape[1])
            back = lambda r: _moved(r, -1, 1)  # noqa: E731
    out = problem.library.empty(shape, problem.dtype)
    problem.library.poison(out)
    x, w, dy = arrays["input"], arrays["weight"], arrays["grad_output"]
    if problem.which == "forward":
        function = getattr(fc, case.op)
        return Prepared(lambda: function(x, w, None, *options, out=out, **form), back)
    function = getattr(fc, f"{case.op}_{problem.which}")
    if problem.which == "weight_grad":
        return Prepared(lambda: function(x, case.weight_shape, dy, *options, out=out, **form), back)
    return Prepared(lambda: function(shape, w, dy, *options, out=out, **form), back)


def _moved(array: Any, source: int, target: int) -> Any:
    """numpy.moveaxis, of any library."""
    return array.movedim(source, target) if hasattr(array, "movedim") else np.moveaxis(array, source, target)


def _contiguous(array: Any) -> Any:
    return array.contiguous() if hasattr(array, "contiguous") else array.copy()


def _fastconv_last(problem: Problem) -> Prepared:
    case = problem.convolution()
    return _fastconv(problem, {1: "NLC", 2: "NHWC", 3: "NDHWC"}[case.ndim])


def _torch(problem: Problem, channels_last: bool = False) -> Prepared:
    if not isinstance(problem.library, Torch):
        raise Unsupported("not installed")
    return Prepared(torch_call(problem.case, problem.which, problem.operands, channels_last))


def _cupy(problem: Problem) -> Prepared:
    """CuPy's convolutions are of single planes (cupyx.scipy); for cross-entropy it has what NumPy has."""
    if problem.dtype not in ("float32", "float64"):
        raise Unsupported("is measured in float32 and float64")
    try:
        import cupy
    except ImportError:
        raise Unsupported("not installed") from None
    arrays = {name: cupy.from_dlpack(array) for name, array in problem.operands.items()}
    if isinstance(problem.case, ConvolutionCase):
        case = problem.case
        if problem.which != "forward" or math.prod(case.input_shape[:2]) * case.out_channels > 1:
            raise Unsupported("convolves single planes only")
        if case.ndim != 2 or max(*case.stride, *case.dilation) > 1 or any(2 * p + 1 != k for p, k in zip(
            case.padding, case.kernel, strict=True
        )):  # fmt: skip
            raise Unsupported("has padding to the same size only")
        from cupyx.scipy import signal

        plane, kernel = arrays["input"][0, 0], arrays["weight"][0, 0]
        return Prepared(lambda: signal.correlate(plane, kernel, "same")[None, None])
    z, target = arrays["logits"], arrays["target"]
    positions = z.size // problem.case.classes

    def call() -> Any:
        shifted = z - z.max(axis=1, keepdims=True)
        log_p = shifted - cupy.log(cupy.exp(shifted).sum(axis=1, keepdims=True))
        y = target
        if problem.case.target == "index":
            y = cupy.moveaxis(cupy.eye(problem.case.classes, dtype=z.dtype)[target], -1, 1)
        loss = -(y * log_p).sum() / positions
        return loss if problem.which == "forward" else (loss, (cupy.exp(log_p) - y) / positions)

    if problem.case.target == "index" and problem.case.classes > 4096:
        raise Unsupported("would need a one-hot matrix of the size of the classes squared")
    return Prepared(call)


def _liger(problem: Problem) -> Prepared:
    """Liger-Kernel's fused cross-entropy, which overwrites the logits with the gradient."""
    if not isinstance(problem.case, CrossEntropyCase):
        raise Unsupported("has no convolution")
    if problem.case.size or problem.case.target != "index" or problem.which == "forward":
        raise Unsupported("is measured on logits (N, C) and class indices, with the gradient")
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        raise Unsupported("not installed") from None
    if not isinstance(problem.library, Torch):
        raise Unsupported("needs torch")
    torch = problem.library.torch
    # Its first call, which is checked, sees the logits, the later ones gradients in their place: other values, equal
    # work. Others need the logits, so it has a copy.
    logits, target = problem.operands["logits"].detach().clone().requires_grad_(), problem.operands["target"]

    def call() -> Any:
        with torch.enable_grad():
            loss = liger_cross_entropy(logits, target)
            return loss, torch.autograd.grad(loss, logits)[0]

    return Prepared(call)


PEERS: dict[str, Callable[[Problem], Prepared]] = {
    "fastconv": _fastconv,
    "fastconv channels-last": _fastconv_last,
    "torch": _torch,
    "torch channels-last": lambda problem: _torch(problem, channels_last=True),
    "cupy": _cupy,
    "liger": _liger,
}
PACKAGES = {"fastconv": "fastconv", "torch": "torch", "cupy": "cupy", "liger": "liger_kernel"}


def version(peer: str) -> str:
    import importlib.metadata

    name = PACKAGES.get(peer.partition(" ")[0], peer)
    module = sys.modules.get(name)
    said = getattr(module, "__version__", None)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        said = said or importlib.metadata.version(name)
    return f"{name} {said or 'unknown'}"


# ---------------------------------------------------------------------------------------------------------------------
# Is it right?
# ---------------------------------------------------------------------------------------------------------------------


def _places(shape: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """The first and the last element, and others at random."""
    rng = np.random.default_rng(math.prod(shape))
    yield (0,) * len(shape)
    yield tuple(n - 1 for n in shape)
    for _ in range(count - 2):
        yield tuple(int(rng.integers(n)) for n in shape)


def _windows(case: ConvolutionCase, position: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The taps that an output position meets, and the input coordinates where it does, for each dimension."""
    taps, places = [], []
    for at, n, k, s, p, d in zip(
        position, case.size, case.kernel, case.stride, case.padding, case.dilation, strict=True
    ):
        tap = np.arange(k)
        place = at * s - p + tap * d
        inside = (place >= 0) & (place < n)
        taps.append(tap[inside])
        places.append(place[inside])
    return taps, places


def _cut(array: Any, leading: tuple[Any, ...], places: Sequence[np.ndarray], arrays: Library) -> np.ndarray:
    """array[*leading, places of each dimension], on the host in float64: the box around them travels, no more."""
    if any(len(p) == 0 for p in places):
        return np.zeros(0)
    box = tuple(slice(int(p[0]), int(p[-1]) + 1) for p in places)
    cut = arrays.host(array[(*leading, *box)])
    for axis, p in enumerate(places):
        cut = np.take(cut, p - p[0], axis=cut.ndim - len(places) + axis)
    return cut


def expected_element(problem: Problem, at: tuple[int, ...]) -> tuple[float, float, int]:
    """One element of a convolution in float64: its value, the norm of its terms, and their number."""
    case, which, arrays = problem.convolution(), problem.which, problem.library
    x, w, dy = (problem.operands[name] for name in ("input", "weight", "grad_output"))
    inputs, outputs = case.in_channels // case.groups, case.out_channels // case.groups
    if which == "forward":
        n, o, *position = at
        group = o // outputs
        taps, places = _windows(case, position)
        a = _cut(x, (n, slice(group * inputs, (group + 1) * inputs)), places, arrays)
        b = _cut(w, (o, slice(None)), taps, arrays)
    elif which == "weight_grad":
        o, c, *tap = at
        channel = o // outputs * inputs + c
        positions, places = [], []
        for k, n, m, s, p, d in zip(
            tap, case.size, case.output_shape[2:], case.stride, case.padding, case.dilation, strict=True
        ):
            where = np.arange(m) * s - p + k * d
            inside = (where >= 0) & (where < n)
            positions.append(np.arange(m)[inside])
            places.append(where[inside])
        a = _cut(x, (slice(None), channel), places, arrays)
        b = _cut(dy, (slice(None), o), positions, arrays)
    else:
        n, channel, *position = at
        group, c = divmod(channel, inputs)
        taps, places = [], []
        for q, m, k, s, p, d in zip(
            position, case.output_shape[2:], case.kernel, case.stride, case.padding, case.dilation, strict=True
        ):
            tap = np.arange(k)
            meets = q + p - tap * d
            inside = (meets % s == 0) & (meets >= 0) & (meets // s < m)
            order = np.argsort(meets[inside] // s, kind="stable")
            taps.append(tap[inside][order])
            places.append((meets[inside] // s)[order])
        some = slice(group * outputs, (group + 1) * outputs)
        a = _cut(dy, (n, some), places, arrays)
        b = arrays.host(w[some, c])
        for axis, tap in enumerate(taps):
            b = np.take(b, tap, axis=b.ndim - len(taps) + axis)
    if a.size == 0 or b.size == 0:
        return 0.0, 0.0, 0
    terms = a * b
    return float(terms.sum()), float(np.sqrt(np.square(terms).sum())), terms.size


def check(problem: Problem, result: Any, count: int = 16) -> None:
    """Raise Disagreement unless the result is right, as far as some of its elements tell."""
    arrays = problem.library
    whole = result[-1] if isinstance(result, tuple) else result
    if arrays.has_nan(whole):
        raise Disagreement("there are nan in the result: elements that were not written, or that are wrong")
    if isinstance(problem.case, CrossEntropyCase):
        _check_cross_entropy(problem, result, count)
        return
    if tuple(whole.shape) != problem.result_shape:
        raise Disagreement(f"shape {tuple(whole.shape)}, expected {problem.result_shape}")
    if problem.which == "weight_grad":
        count //= 2  # of these an element is a sum over whole planes
    for at in _places(problem.result_shape, count):
        value, norm, terms = expected_element(problem, at)
        actual = float(arrays.host(whole[at]))
        allowed = ALLOWANCE * EPSILON[problem.dtype] * math.sqrt(max(terms, 1)) * norm
        allowed += 4 * ROUNDING.get(problem.dtype, 0.0) * norm
        if not abs(actual - value) <= allowed:
            raise Disagreement(f"element {at} is {actual!r}, expected {value!r} within {allowed:.3g}")


def _check_cross_entropy(problem: Problem, result: Any, count: int) -> None:
    arrays, case = problem.library, problem.case
    assert isinstance(case, CrossEntropyCase)
    logits, target = problem.operands["logits"], problem.operands["target"]
    positions = case.batch * math.prod(case.size)
    rounding = ROUNDING.get(problem.dtype, 0.0)
    epsilon = EPSILON["float32" if problem.dtype != "float64" else "float64"]
    relative = ALLOWANCE * epsilon * math.sqrt(case.classes) + rounding
    loss = float(arrays.host(result[0] if isinstance(result, tuple) else result))
    expected = arrays.mean_loss(logits, target)
    allowed = (relative + ALLOWANCE * epsilon * math.sqrt(positions)) * abs(expected)
    if not abs(loss - expected) <= allowed:
        raise Disagreement(f"the loss is {loss!r}, expected {expected!r} within {allowed:.3g}")
    if not isinstance(result, tuple):
        return
    for n, *position in _places((case.batch, *case.size), count):
        row = (n, slice(None), *position)
        z = arrays.host(logits[row])
        p = np.exp(z - z.max())
        p /= p.sum()
        if case.target == "index":
            y = np.zeros(case.classes)
            y[int(arrays.host(target[(n, *position)]))] = 1
        else:
            y = arrays.host(target[row])
        exact = (p * y.sum() - y) / positions
        actual = arrays.host(result[1][row])
        off = np.abs(actual - exact)
        bound = (relative * 4) * (p + y) / positions + rounding * np.abs(exact) + (2.0**-24 if rounding else 1e-30)
        if not np.all(off <= bound):
            at = int(np.argmax(off - bound))
            raise Disagreement(f"gradient {at} of row {(n, *position)} is {actual[at]!r}, expected {exact[at]!r}")


@functools.lru_cache(maxsize=1)  # both layouts are checked, one after the other
def _reference(case: Case, which: str, dtype: str, arrays: Library) -> tuple[np.ndarray, ...]:
    """The result in float64, of exactly the operands that were given."""
    from fastconv import reference

    host = {name: arrays.host(array) for name, array in operands(case, dtype, arrays).items()}
    if isinstance(case, CrossEntropyCase):
        result = reference.softmax_cross_entropy(host["logits"], host["target"])
        return result[:1] if which == "forward" else result
    x, w, dy = host["input"], host["weight"], host["grad_output"]
    options = (case.stride, tuple((p, p) for p in case.padding), case.dilation, case.groups)
    if which == "forward":
        return (reference.convolution(x, w, None, *options),)
    if which == "weight_grad":
        return (reference.convolution_weight_grad(x, case.weight_shape, dy, *options),)
    return (reference.convolution_input_grad(case.input_shape, w, dy, *options),)


def check_small(case: Case, which: str, dtype: str, arrays: Library, peer: str = "fastconv") -> None:
    """Every element of a small case against fastconv.reference. Raises Disagreement, Unsupported."""
    problem = Problem(case, which, dtype, arrays, operands(case, dtype, arrays))
    prepared = PEERS[peer](problem)
    raw = prepared.call()
    result = raw if isinstance(raw, tuple) else (prepared.result(raw),)
    epsilon = EPSILON[dtype] * ALLOWANCE
    wanted = _reference(case, which, dtype, arrays)
    if isinstance(case, CrossEntropyCase):
        check(problem, raw, count=case.batch)
        scale = [abs(float(wanted[0])) + 1, 1.0 / (case.batch * math.prod(case.size))]
        terms = case.classes
    else:
        # of unit variance, but for the weight gradient, which sums over positions
        scale = [math.sqrt(math.prod(case.output_shape) / case.out_channels) if which == "weight_grad" else 4.0]
        terms = case.flops(which) // 2 // math.prod(problem.result_shape) + 1
    for got, exact, size in zip(result, wanted, scale[: len(wanted)], strict=True):
        actual = arrays.host(got)
        allowed = epsilon * math.sqrt(terms) * size + 4 * ROUNDING.get(dtype, 0.0) * np.abs(exact)
        if problem.dtype == "float16":
            allowed = allowed + 2.0**-24  # the distance of two numbers near zero
        off = np.abs(actual - exact)
        if actual.shape != exact.shape or not np.all(off <= allowed):
            raise Disagreement(f"off by up to {np.nanmax(off) if off.size else math.nan:.3g} from the reference")


@contextlib.contextmanager
def only_tile(number: int) -> Iterator[None]:
    """Let the matrix products take the tile of this number, whatever the shape."""
    from fastconv.cuda_kernels import implicit_gemm, tiles

    with (
        mock.patch.object(implicit_gemm, "choose_tile", lambda rows, columns, groups, choice: choice[number]),
        mock.patch.object(
            implicit_gemm, "_weight_tile", lambda rows, columns, kind: tiles.ARITHMETIC[kind].tiles[number]
        ),
    ):
        yield


def check_tile(case: Case, which: str, dtype: str, arrays: Library, peer: str, tile: int) -> None:
    """Some elements of a matrix product in this tile: too many for the reference's loops. Raises Disagreement."""
    problem = Problem(case, which, dtype, arrays, operands(case, dtype, arrays))
    prepared = PEERS[peer](problem)
    with only_tile(tile):
        check(problem, prepared.result(prepared.call()), 256)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


class Timer(Protocol):
    def host(self, call: Callable[[], Any], count: int) -> float: ...
    def device(self, call: Callable[[], Any], count: int, host: float) -> list[float]: ...


class CudaTimer:
    """Times of the default stream, on which all of them work."""

    NAP = 100_000  # nanoseconds; the device sleeps between none and twice as long
    FLUSH_BYTES = 128 << 20  # more than any second-level cache has

    def __init__(self, cuda: Any = None) -> None:
        if cuda is None:
            from fastconv.cuda_kernels._cuda import cuda
        self.cuda = cuda
        self._source = cuda.device_array(self.FLUSH_BYTES, np.uint8)
        self._target = cuda.device_array(self.FLUSH_BYTES, np.uint8)
        self._sleep = cuda.jit(sleep_kernel(cuda))

    def host(self, call: Callable[[], Any], count: int) -> float:
        """Seconds in which the host gets rid of a call: what it costs to launch."""
        self.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        seconds = (time.perf_counter() - begin) / count
        self.cuda.synchronize()
        return seconds

    def device(self, call: Callable[[], Any], count: int, host: float) -> list[float]:
        """Seconds of the device for each of some calls, of which one takes the host about `host` seconds."""
        events = [(self.cuda.event(), self.cuda.event()) for _ in range(count)]
        naps = math.ceil(2 * count * (host + 100e-6) / (1e-9 * self.NAP))
        with _without_warnings():
            self._sleep[1, 1](naps)
        for before, after in events:
            self._target.copy_to_device(self._source)
            before.record()
            call()
            after.record()
        events[-1][1].synchronize()
        return [1e-3 * self.cuda.event_elapsed_time(*pair) for pair in events]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """A launch of one block is on purpose."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copy_rate(timer: Timer) -> float:
    """GB/s of a copy of 1 GiB, bytes read and written."""
    cuda = timer.cuda  # type: ignore[attr-defined]
    size = 1 << 30
    source, target = (cuda.device_array(size, np.uint8) for _ in range(2))
    return 2 * size / min(timer.device(lambda: target.copy_to_device(source), 10, 1e-4)) / 1e9


CHAINS, LINKS, REPEATS = 8, 8, 512  # multiply-adds of a thread that do not wait for each other, in a row, and how often


def sleep_kernel(cuda: Any) -> Callable[..., None]:
    def sleep(naps):
        for _ in range(naps):
            cuda.nanosleep(np.uint32(CudaTimer.NAP))

    return sleep


def multiply_add_kernel(cuda: Any, dtype: str) -> Callable[..., None]:
    import numba

    number, kind = np.dtype(dtype).type, numba.from_dtype(np.dtype(dtype))

    def chains(out, a, b):
        sums = cuda.local.array(CHAINS, kind)
        for i in range(CHAINS):
            sums[i] = a * number(i + cuda.threadIdx.x)
        for _ in range(REPEATS):
            for _ in range(LINKS):
                for i in range(CHAINS):
                    sums[i] = sums[i] * a + b
        total = sums[0]
        for i in range(1, CHAINS):
            total += sums[i]
        if total == b:  # never, but the compiler does not know
            out[0] = total

    return chains


def multiply_add_rate(timer: Timer, dtype: str) -> float:
    """GFLOP/s of multiply-adds in registers, with 2048 threads on each multiprocessor."""
    cuda = timer.cuda  # type: ignore[attr-defined]
    number = np.dtype(dtype).type
    kernel = cuda.jit(multiply_add_kernel(cuda, dtype))
    threads, blocks = 256, 64 * cuda.get_current_device().MULTIPROCESSOR_COUNT
    out = cuda.device_array(1, number)
    call = lambda: kernel[blocks, threads](out, number(0.999), number(0.5))  # noqa: E731
    call()
    return 2 * CHAINS * LINKS * REPEATS * threads * blocks / min(timer.device(call, 5, 1e-4)) / 1e9


def matrix_rate(timer: Timer, dtype: str, arrays: Library, size: int = 8192) -> float:
    """GFLOP/s of torch's product of two matrices, of normal numbers."""
    if not isinstance(arrays, Torch):
        raise Unsupported("needs torch")
    allow_tf32(arrays.torch, dtype == TF32)
    a, b = (arrays.normal((size, size), dtype, 1.0, seed) for seed in range(2))
    out = arrays.empty((size, size), dtype)
    call = lambda: arrays.torch.matmul(a, b, out=out)  # noqa: E731
    call()
    return 2 * size**3 / min(timer.device(call, 5, 1e-4)) / 1e9


def peaks(timer: Timer, arrays: Library, dtypes: Iterable[str], tell: Callable[[str], object]) -> dict[str, float]:
    """What this device can do at most: "copy" in GB/s, and GFLOP/s by arithmetic, those that can be measured."""
    found: dict[str, float] = {}
    jobs: dict[str, Callable[[], float]] = {"copy": lambda: copy_rate(timer)}
    for dtype in dtypes:
        if dtype in ("float32", "float64"):
            jobs[dtype] = lambda dtype=dtype: multiply_add_rate(timer, dtype)  # type: ignore[misc]
        else:
            jobs[dtype] = lambda dtype=dtype: matrix_rate(timer, dtype, arrays)  # type: ignore[misc]
    for name, job in jobs.items():
        try:
            found[name] = job()
            tell(f"peak {name}: {found[name]:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}")
        except Exception as error:  # a peak that cannot be measured leaves its percentages out, and no more
            tell(f"peak {name}: not measured ({_said(error)})")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


class DeviceLost(Exception):
    """After an error nothing runs on the device in this process."""


@dataclass
class Bench:
    """What a run needs, and what it has found. Tests make it of arrays and timers of the host."""

    arrays: Library
    timer: Timer
    machine: str
    output: Path
    deadline: float  # of time.monotonic
    batch: int = BATCH
    least_logits: int = LEAST_LOGITS
    samples: int = SAMPLES
    rounds: int = ROUNDS
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    peers: Sequence[str] = tuple(PEERS)
    tell: Callable[[str], object] = print
    failures: list[str] = dataclasses.field(default_factory=list)
    done: int = 0
    checks_until: float = math.inf  # of time.monotonic
    right: int = 0  # checks
    unchecked: int = 0  # for want of time
    commit: str = dataclasses.field(default_factory=results.commit)

    @property
    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.deadline - time.monotonic()

    def guarded(self, what: str, job: Callable[[], Any]) -> Any:
        """The job's result, or None and a line that says what went wrong. Raises DeviceLost."""
        try:
            return job()
        except Unsupported:
            return None
        except Exception as error:  # whatever one case does, the others have their turn
            self.failures.append(f"{what}: {_said(error)}")
            self.tell(f"FAILED {self.failures[-1]}")
            if not isinstance(error, Disagreement):
                traceback.print_exc(limit=-4)
            self._forget()
        try:
            self.arrays.synchronize()
        except Exception as error:
            raise DeviceLost(_said(error)) from error
        return None

    def _forget(self) -> None:
        """Give back the memory of an error's frames, whatever filled it."""
        gc.collect()
        torch = getattr(self.arrays, "torch", None)
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def check(self, case: Case, which: str, dtype: str, peer: str, tile: int | None = None) -> None:
        """fastconv on a small shape against fastconv.reference, in the tile of this number if given."""
        if time.monotonic() > self.checks_until:
            self.unchecked += 1
            return

        def one() -> bool:
            _set_precision(self.arrays, dtype)
            if tile is None:
                check_small(case, which, dtype, self.arrays, peer)
            else:
                check_tile(case, which, dtype, self.arrays, peer, tile)
            return True

        self.right += bool(self.guarded(name_of_check(case, which, dtype, peer, tile), one))

    def tell_checks(self) -> None:
        skipped = f", SKIPPED {self.unchecked} for want of time" if self.unchecked else ""
        self.tell(f"checked: {self.right} right, {len(self.failures)} wrong{skipped}")

    def note(self, **facts: Any) -> None:
        """Write facts about the machine to the file beside the rows."""
        file = self.output.with_suffix(".json")
        known = json.loads(file.read_text()) if file.exists() else {}
        results.write_machine(file, known | facts)

    def measure_peaks(self, dtypes: Sequence[str]) -> None:
        self.peaks = peaks(self.timer, self.arrays, dtypes, self.tell)
        self.note(peaks=self.peaks)

    def measure(self, case: Case, which: str, dtype: str) -> list[results.Row]:
        """The rows of one pass of one layer, written to the file as well."""
        case = self.for_gpu(case)
        given = self.guarded(f"{case.network} {case.name} {dtype}", lambda: operands(case, dtype, self.arrays))
        if given is None:
            return []
        problem = Problem(case, which, dtype, self.arrays, given)
        rows: dict[str, results.Row] = {}
        calls: dict[str, Callable[[], Any]] = {}
        theirs: Any = None
        for peer in sorted(self.peers, key=lambda p: not p.startswith("torch")):  # fastconv is compared with torch
            what = f"{case.network} {case.name} {which} {dtype} {peer}"
            before = len(self.failures)

            def prepare(peer=peer, theirs=theirs) -> tuple[Callable[[], Any], Any]:
                _set_precision(self.arrays, dtype)
                prepared = PEERS[peer](problem)
                raw = prepared.call()
                result = raw if isinstance(raw, tuple) else prepared.result(raw)
                check(problem, result)
                if theirs is not None and peer.startswith("fastconv"):
                    self._compare(problem, result, theirs)
                return prepared.call, result

            made = self.guarded(what, prepare)
            if made is None and len(self.failures) == before:
                continue  # the peer does not do this
            note = "" if made is not None else self.failures[-1].removeprefix(f"{what}: ")
            rows[peer] = self._row(case, which, dtype, peer, note)
            if made is not None:
                calls[peer] = made[0]
                if peer == "torch":
                    theirs = made[1]
        timed = self._times(case, which, dtype, calls)
        for peer, samples in timed.items():
            if samples:
                rows[peer] = results.with_samples(rows[peer], samples, case.unit)
            else:
                rows[peer] = dataclasses.replace(rows[peer], note=self.failures[-1])
        found = results.with_ratios([rows[peer] for peer in self.peers if peer in rows])
        self._save(found)
        self.done += 1
        if found:
            self.tell(line(found))
        return found

    def for_gpu(self, case: Case) -> Case:
        """With the batch of a GPU, unless the table has more."""
        if isinstance(case, CrossEntropyCase):
            row = case.classes * math.prod(case.size)
            return dataclasses.replace(case, batch=max(case.batch, -(-self.least_logits // row)))
        if case.network in ("planes", "medical", "check") or case.batch == 1:
            return case
        return dataclasses.replace(case, batch=max(case.batch, self.batch))

    def _compare(self, problem: Problem, result: Any, theirs: Any) -> None:
        ours, them = ((r[-1] if isinstance(r, tuple) else r) for r in (result, theirs))
        off = self.arrays.distance(ours, them)
        if not off <= NEAR[problem.dtype]:
            raise Disagreement(f"as a whole {off:.3g} away from torch's result (expected {NEAR[problem.dtype]:g})")

    def _times(
        self, case: Case, which: str, dtype: str, calls: dict[str, Callable[[], Any]]
    ) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {peer: [] for peer in calls}
        hosts: dict[str, float] = {}
        order = list(calls)
        for turn in range(self.rounds):
            for peer in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:

                def sample(peer=peer) -> list[float]:
                    _set_precision(self.arrays, dtype)
                    if peer not in hosts:
                        hosts[peer] = self.timer.host(calls[peer], 2)
                    return self.timer.device(calls[peer], self.samples, hosts[peer])

                if peer in hosts or turn == 0:
                    found = self.guarded(f"{case.network} {case.name} {which} {dtype} {peer}", sample)
                    samples[peer] += found or []
        return samples

    def _row(self, case: Case, which: str, dtype: str, peer: str, note: str) -> results.Row:
        itemsize = {"float64": 8, "float32": 4, TF32: 4}.get(dtype, 2)
        return results.Row(
            machine=self.machine, backend="cuda", protocol="interleaved", network=case.network, case=case.name,
            op=case.op, which=which, dtype=dtype, batch=case.batch, threads=1, peer=peer, flops=case.flops(which),
            bytes=case.bytes(which, itemsize), count=case.count, peak_gflops=self.peaks.get(dtype),
            copy_gbs=self.peaks.get("copy"), date=results.today(), commit=self.commit, version=version(peer),
            note=note[:300],
        )  # fmt: skip

    def _save(self, rows: Sequence[results.Row]) -> None:
        kept = results.read(self.output) if self.output.exists() else []
        results.write(self.output, results.merge(kept, rows))

    def measure_launches(self) -> dict[str, float]:
        """Microseconds of the host for a small call, by peer and operation, into arrays that are there already."""
        costs: dict[str, float] = {}
        small = [
            (ConvolutionCase("launch", "conv2d", 1, 4, (8, 8), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1), "forward"),
            (CrossEntropyCase("launch", "cross-entropy", 8, 16, (), "index"), "with_grad"),
        ]
        for (case, which), peer in itertools.product(small, ("fastconv", "torch")):

            def one(case=case, which=which, peer=peer) -> float:
                problem = Problem(case, which, "float32", self.arrays, operands(case, "float32", self.arrays))
                call = PEERS[peer](problem).call
                self.timer.host(call, 10)
                return min(self.timer.host(call, 100) for _ in range(3))

            seconds = self.guarded(f"launch {case.name} {peer}", one)
            if seconds is not None:
                costs[f"{peer} {case.name}"] = round(1e6 * seconds, 2)
                self.tell(f"launch {case.name}: {peer} takes the host {1e6 * seconds:.1f} us a call")
        self.note(launch_us=costs)
        return costs


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _set_precision(arrays: Library, dtype: str) -> None:
    """Of float32, for everybody."""
    import fastconv as fc

    allow = getattr(fc, "set_float32_precision", None)
    if allow is not None:
        allow("tf32" if dtype == TF32 else "ieee")
    if isinstance(arrays, Torch):
        allow_tf32(arrays.torch, dtype == TF32)


def plan(
    steps: Sequence[tuple[str, bool, tuple[str, ...], str]], only: str | None = None
) -> list[tuple[Case, str, str]]:
    """(layer, pass, arithmetic) in order, each once."""
    found: dict[tuple[Case, str, str], None] = {}
    for networks, narrow, passes, dtype in steps:
        for name in networks.split(","):
            for case in cases.network(name):
                if narrow and (not isinstance(case, ConvolutionCase) or case.groups == 1):
                    continue
                if only and not re.search(only, f"{name} {case.name}"):
                    continue
                for which in passes:
                    if which in case.passes:
                        found[case, which, dtype] = None
    return list(found)


def line(rows: Sequence[results.Row]) -> str:
    """One line of the table that is printed as it grows: fastconv's time and rates, and the ratios to the peers."""
    ours = next((row for row in rows if row.peer == "fastconv"), None)
    first = rows[0]
    words = [f"{first.network} {first.case}", first.which, first.dtype, f"batch {first.batch}:"]
    if ours is not None and ours.best_ms:
        seconds = 1e-3 * ours.best_ms
        rate, moved = ours.flops / seconds / 1e9, ours.bytes / seconds / 1e9
        words.append(f"{ours.best_ms:.4f} ms, {rate:.0f} GFLOP/s{_percent(rate, ours.peak_gflops)},")
        words.append(f"{moved:.0f} GB/s{_percent(moved, ours.copy_gbs)}")
    for row in rows:
        if row.peer != "fastconv" and not row.note:
            words.append(f"| {row.peer} {row.ratio:.2f}x" if row.ratio else f"| {row.peer} {row.best_ms:.4f} ms")
        elif row.note:
            words.append(f"| {row.peer} FAILED")
    return " ".join(words)


def _percent(value: float, of: float | None) -> str:
    return f" ({100 * value / of:.0f}%)" if of else ""


def summary(rows: Iterable[results.Row]) -> Iterator[str]:
    """The geometric mean of each network, pass and arithmetic to the better layout of torch, best and worst layer."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    ours: dict[tuple[Any, ...], float] = {}
    theirs: dict[tuple[Any, ...], float] = {}
    for row in rows:
        side = ours if row.is_fastconv else theirs if row.peer.startswith("torch") else None
        if side is not None and row.best_ms is not None:
            side[row.pair] = min(side.get(row.pair, math.inf), row.best_ms)
    for row in rows:
        if row.pair in ours and row.pair in theirs:
            ratios.setdefault((row.network, row.which, row.dtype), {})[row.case] = theirs[row.pair] / ours[row.pair]
    for (network, which, dtype), found in ratios.items():
        worst, best = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
        yield (
            f"{network} {which} {dtype}: {results.geometric_mean(found.values()):.2f}x torch over {len(found)} layers; "
            f"worst {worst} {found[worst]:.2f}x, best {best} {found[best]:.2f}x"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Jobs, and the processes that do them
# ---------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    name: str
    do: Callable[[], object]


def name_of_check(case: Case, which: str, dtype: str, peer: str, tile: int | None) -> str:
    return f"check {case.name} {which} {dtype} {peer}{'' if tile is None else f' tile {tile}'}"


def checks(
    bench: Bench, dtypes: Sequence[str], chosen: Sequence[Case] = tuple(CHECKED),
    in_every_tile: Sequence[Case] = tuple(EVERY_TILE),
) -> list[Job]:  # fmt: skip
    """Small odd shapes in both layouts: first those of every arithmetic, then those in every tile."""
    from fastconv.cuda_kernels.tiles import ARITHMETIC

    every: list[tuple[Case, str, int | None]] = [(c, d, None) for d in dtypes for c in chosen]
    every += [(c, d, tile) for d in dtypes for c in in_every_tile for tile in range(len(ARITHMETIC[d].tiles))]
    jobs = []
    for case, dtype, tile in every:
        for which, peer in itertools.product(case.passes, ("fastconv", "fastconv channels-last")):
            job = functools.partial(bench.check, case, which, dtype, peer, tile)
            jobs.append(Job(name_of_check(case, which, dtype, peer, tile), job))
    return [*jobs, Job("sum of the checks", bench.tell_checks)]


def measurements(bench: Bench, dtypes: Sequence[str], planned: Sequence[tuple[Case, str, str]]) -> list[Job]:
    return [
        Job("peaks", lambda: bench.measure_peaks(dtypes)),
        Job("launches", bench.measure_launches),
        *(
            Job(f"{case.network} {case.name} {which} {dtype}", functools.partial(bench.measure, case, which, dtype))
            for case, which, dtype in planned
        ),
    ]


def run(bench: Bench, jobs: Sequence[Job], start: int = 0, begun: Callable[[int], object] = abs) -> None:
    """Do the jobs from `start` on until the time is up; `begun` hears the number of each. Raises DeviceLost."""
    for number, job in enumerate(jobs[start:], start):
        if bench.left < 0:
            bench.tell(f"SKIPPED {len(jobs) - number} of {len(jobs)} jobs: out of time, the first of them {job.name}")
            break
        begun(number)
        try:
            job.do()
        except DeviceLost as error:
            bench.tell(f"FAILED {job.name}: the device is lost ({error})")
            raise


ENDED = "ended"  # what a worker says when it has done its jobs, in the place of the number of the one it is at


def supervise(command: Sequence[str], tell: Callable[[str], object] = print) -> int:
    """Do the jobs in a process of `command`; where it dies, go on in another with the job after. Returns its exit code.

    Memory that an error has spoilt, a device that is lost until the process ends, a crash of the driver, a kernel that
    never ends: none of them reaches the next job.
    """
    start, died = 0, False
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "job"
        while True:
            code = subprocess.run([*command, "--worker", str(progress), "--start", str(start)]).returncode
            said = progress.read_text() if progress.exists() else ""
            if said == ENDED:
                return 1 if died else code
            if not said or int(said) < start:
                tell(f"FAILED: the process ended with code {code} before its first job")
                return code or 1
            tell(f"FAILED: the process ended with code {code} in job {said}; going on with the next")
            start, died = int(said) + 1, True


def _watched(bench: Bench, progress: Path) -> Callable[[int], None]:
    """Says which job is begun, and ends the process, with a traceback, if that hangs."""

    def begun(number: int) -> None:
        progress.write_text(str(number))
        faulthandler.dump_traceback_later(min(PATIENCE, max(bench.left, 0) + LATE), exit=True)

    return begun


def find_package() -> None:
    """Let `fastconv` find its kernels and benchmarks in a checkout, where they have folders of their own."""
    root = Path(__file__).resolve().parent.parent
    if importlib.util.find_spec("fastconv") is None:
        sys.path.insert(0, str(root))
    import fastconv

    if importlib.util.find_spec("fastconv.cuda_kernels") is None:
        fastconv.__path__.append(str(root))


def name_of_gpu() -> str:
    from fastconv.cuda_kernels._cuda import cuda

    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.cuda", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                      help="after which nothing more is begun; the rest is named (default: %(default)g)")  # fmt: skip
    made.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER",
                      help="where <gpu>.csv and <gpu>.json are written (default: bench/results)")  # fmt: skip
    made.add_argument("--dtype", type=_words, default=list(DTYPES), metavar="NAME,...",
                      help=f"of {', '.join(DTYPES)} (default: all)")  # fmt: skip
    made.add_argument("--only", metavar="REGEX", help="the layers of which 'network name' matches")
    made.add_argument("--passes", type=_words, metavar="NAME,...", help="of these passes only")
    made.add_argument("--batch", type=int, default=BATCH, help="of the networks' layers (default: %(default)d)")
    made.add_argument("--check-only", action="store_true", help="check the kernels, time nothing")
    made.add_argument("--no-check", action="store_true", help="leave out the small shapes against the reference")
    for name, kind in (("worker", Path), ("start", int), ("deadline", float)):  # from one process to the next
        made.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure as the options say; 0 if every check passed, 2 if nothing can run here."""
    begin = time.monotonic()  # one clock for all processes
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    unknown = [name for name in options.dtype if name not in DTYPES]
    if unknown:
        parser().error(f"--dtype: {unknown[0]!r} is none of {', '.join(DTYPES)}")
    if options.worker is not None:
        return work(options)
    deadline = begin + options.budget
    return supervise([sys.executable, "-u", "-m", f"{__package__}.cuda", *given, "--deadline", str(deadline)])


def work(options: argparse.Namespace) -> int:
    """The jobs from the one that the options say."""
    begin = time.monotonic()

    def ended(code: int) -> int:
        faulthandler.cancel_dump_traceback_later()
        options.worker.write_text(ENDED)
        return code

    find_package()
    import fastconv as fc
    from fastconv.backends import cuda_status

    usable, reason = cuda_status()
    if not usable:
        print(f"no benchmark: {reason}")
        return ended(2)
    try:
        arrays = library()
    except Unsupported as error:
        print(f"no benchmark: {error}")
        return ended(2)
    gpu = name_of_gpu()
    machine = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output / f"{machine}.csv"
    bench = Bench(arrays, CudaTimer(), machine, output, options.deadline, options.batch)
    print(f"{gpu}; fastconv {fc.__version__}, {version('torch')}, {version('cupy')}; arrays of {arrays.name}")

    steps = [step for step in STEPS if step[3] in options.dtype]
    if options.passes:
        steps = [(names, narrow, tuple(w for w in passes if w in options.passes), dtype)
                 for names, narrow, passes, dtype in steps]  # fmt: skip
    jobs: list[Job] = []
    if not options.no_check:
        jobs += checks(bench, options.dtype)
        bench.checks_until = begin + (1.0 if options.check_only else SHARE_OF_CHECKS) * bench.left
    if not options.check_only:
        jobs += measurements(bench, options.dtype, plan(steps, options.only))
    if options.start == 0:
        results.write_machine(output.with_suffix(".json"), results.machine() | {"gpu": gpu})
    else:
        bench.peaks = json.loads(output.with_suffix(".json").read_text()).get("peaks", {})
    try:
        run(bench, jobs, options.start, _watched(bench, options.worker))
    except DeviceLost:
        return 1
    if output.exists():
        for text in summary(results.read(output)):
            print(text)
    print(f"{bench.done} measurements in {time.monotonic() - begin:.0f} s, "
          f"{len(bench.failures)} failures, written to {output}")  # fmt: skip
    return ended(1 if bench.failures else 0)


if __name__ == "__main__":
    sys.exit(main())
