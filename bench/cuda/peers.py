"""Who is compared: one pass of one case on the device, as each library computes it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cases import Case, ConvolutionCase, CrossEntropyCase
from ..peers import Unsupported, torch_call
from .arrays import TF32, Library, Torch


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
