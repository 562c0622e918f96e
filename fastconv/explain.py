"""What a convolution would do, without doing it: which algorithm runs, why, what it costs and how exact it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import algorithms, arguments
from .cpu.problem import OPERATIONS, Method, Problem

__all__ = ["Explanation", "explain"]

# rms of rounding the result to these, relative to the rms result: half a unit in the last place at most
_ROUNDING = {"float16": 0.2 * 2.0**-10, "bfloat16": 0.2 * 2.0**-7}
_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `print` shows it as a text."""

    op: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: str
    algorithm: str  # "direct", "winograd", "fft" or "loops"
    reason: str  # why this one
    others: dict[str, str]  # why not, for each of the others
    method: str  # which way of the algorithm, by its name in `fastconv.cpu.methods`
    parts: tuple[str, ...]  # the methods that it asks for products, if it does
    other_methods: dict[str, str]  # why not, for each of the other methods, in the order in which they are tried
    workspace: int  # bytes of memory beside the operands and the result, about, on the number of threads set now
    error: float  # rms error expected for data of unit variance, relative to the rms result (docs/accuracy.md)
    flops: int  # additions and multiplications of the algorithm
    direct_flops: int  # those of the definition
    bytes: int  # of the operands and the result, each counted once

    def __str__(self) -> str:
        lines = [
            f"{self.op} of {self.input_shape} with {self.weight_shape} -> {self.output_shape}, {self.dtype}",
            f"  algorithm  {self.algorithm}: {self.reason}",
            *(f"  not {name:<8} {reason}" for name, reason in self.others.items()),
            f"  method     {self.method}" + (f" of {', '.join(self.parts)}" if self.parts else ""),
            *(f"    not {name}: {reason}" for name, reason in self.other_methods.items() if name not in self.others),
            f"  arithmetic {self.flops / 1e9:.4g} GFLOP" + self._saving(),
            f"  memory     {_readable_bytes(self.bytes)} of operands and result, "
            f"{self.flops / self.bytes:.3g} FLOP for each byte",
            f"  workspace  {_readable_bytes(self.workspace)}",
            f"  error      {self.error:.2g} rms, relative to the rms result, for data of unit variance",
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _saving(self) -> str:
        return "" if self.algorithm in ("direct", "loops") else f", {self.direct_flops / 1e9:.4g} by the definition"


def _readable_bytes(n: int) -> str:
    return f"{n} bytes" if n < 1024 else f"{n / 1024:.4g} KiB" if n < 2**20 else f"{n / 2**20:.4g} MiB"


def explain(
    input_shape, weight_shape, stride=1, padding=0, dilation=1, groups=1, *, dtype="float32", op="forward",
    algorithm="auto", layout=None, padding_mode="zeros",
):  # fmt: skip
    """Say which algorithm a convolution of these shapes runs on the CPU and why, what it costs and how exact it is.

    And which method: an algorithm may have several, for some shapes and memory layouts each. Nothing is computed. On
    CUDA every convolution is direct.

    Parameters
    ----------
    input_shape, weight_shape : the shapes (N, C, *S) and (O, C/groups, *K) of `conv1d`, `conv2d` or `conv3d`
        The number of dimensions is that of the weight; unbatched and bare shapes are read as there.
    stride, padding, dilation, groups, padding_mode : as there
    layout : as there: the shapes are those of contiguous arrays in it. None: channels first
    dtype : "float32", "float64", "float16" or "bfloat16", or a NumPy dtype
    op : "forward", "input_grad" or "weight_grad"
    algorithm : "auto", or the one to explain

    Returns
    -------
    Explanation, with the fields algorithm, reason, others (why not those), method, parts (the methods that it asks for
    products), other_methods (why not those), workspace, error, flops, direct_flops, bytes, and the shapes; it prints as
    a text.

    Raises
    ------
    ValueError and TypeError as the convolution itself, also for an algorithm that does not apply.

    >>> import fastconv as fc
    >>> e = fc.explain((1, 1, 512, 512), (1, 1, 63, 63), padding="same")
    >>> e.algorithm, e.output_shape
    ('fft', (1, 1, 512, 512))
    >>> e.flops < e.direct_flops / 20
    True
    >>> fc.explain((8, 64, 56, 56), (64, 64, 1, 1), op="input_grad").others["winograd"]
    'the kernel is (1, 1, 1) in (D, H, W) (expected two dimensions and a 3 x 3 kernel)'
    >>> fc.explain((1, 56, 56, 64), (64, 64, 3, 3), padding=1, algorithm="direct", layout="NHWC").method
    'channels_last'
    """
    from .cpu import methods  # which imports Numba

    function = "explain"
    arguments.check_choice(function, "op", op, OPERATIONS)
    name = _dtype_name(dtype)
    weight_shape = arguments.shape_of(function, "weight_shape", weight_shape)
    ndim = _dimensions(weight_shape)
    plan = arguments.convolution_plan(
        function, ndim, input_shape, weight_shape, stride, padding, dilation, groups, padding_mode,
        arguments.LAYOUTS[ndim][0] if layout is None else layout, input_name="input_shape", weight_name="weight_shape",
    )  # fmt: skip
    precision = _DOUBLE if name == "float64" else _SINGLE
    algorithms.check(function, op, plan.geometry, precision, algorithm, "cpu")
    problem = _problem(plan, op, precision, algorithm)
    sizes = (plan.input_shape, plan.weight_shape, plan.output_shape)
    empty = problem.geometry.batch == 0
    planned = methods.plan_of(problem._replace(geometry=replace(problem.geometry, batch=1)) if empty else problem)
    method = planned.method
    words = [word for word in arguments.ALGORITHMS if word not in ("auto", method.algorithm)]
    return Explanation(
        op=op,
        input_shape=plan.input_shape,
        weight_shape=plan.weight_shape,
        output_shape=plan.output_shape,
        dtype=name,
        algorithm=method.algorithm,
        reason=method.why(problem) if algorithm == "auto" else "asked for",
        others={word: _against(word, method, problem) for word in words},
        method=method.name,
        parts=planned.parts,
        other_methods={
            other.name: _against_method(other, method, problem)
            for other in methods.METHODS[op]
            if other is not method
        },
        workspace=0 if empty else planned.workspace + _conversions(name, sizes),
        error=math.hypot(method.error(problem), _ROUNDING.get(name, 0.0)),
        flops=method.flops(problem),
        direct_flops=problem.geometry.flops,
        bytes=sum(map(math.prod, sizes)) * {"float32": 4, "float64": 8}.get(name, 2),
    )


def _problem(plan: arguments.ConvPlan, op: str, dtype: np.dtype, algorithm: str) -> Problem:
    """That of a call with contiguous arrays."""
    from .cpu import tasks  # which imports Numba

    def strides(shape: tuple[int, ...], form: Any) -> tuple[int, ...]:
        whole = tuple(dtype.itemsize * math.prod(shape[n + 1 :]) for n in range(len(shape)))
        return form(np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, whole)).strides

    x, w, y = (
        strides(shape, form)
        for shape, form in (
            (plan.input_shape, plan.activation_form), (plan.weight_shape, plan.weight_form),
            (plan.output_shape, plan.activation_form),
        )
    )  # fmt: skip
    return Problem(op, algorithm, plan.geometry, dtype, x, w, y, tasks.workers(plan.geometry.flops))


def _dtype_name(dtype: Any) -> str:
    try:
        name = dtype if isinstance(dtype, str) and dtype in arguments.DTYPES else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in arguments.DTYPES:
        raise TypeError(f"explain: dtype is {name} (expected float32, float64, float16 or bfloat16)")
    return name


def _dimensions(weight_shape: tuple[int, ...]) -> int:
    """Of (O, C/groups, *K), or of a bare signal or plane."""
    if len(weight_shape) in (1, 2):
        return len(weight_shape)
    if len(weight_shape) not in (3, 4, 5):
        raise ValueError(
            f"explain: weight_shape is {weight_shape} (expected (O, C/groups, *K) of 1 to 3 spatial dimensions)"
        )
    return len(weight_shape) - 2


def _against(word: str, chosen: Method, problem: Problem) -> str:
    """Why not this algorithm."""
    from .cpu import methods

    if word in ("direct", "loops"):
        fastest = methods.choose(problem._replace(algorithm="auto")).algorithm
        return f"applies always, but {fastest} is faster"
    every = [method for method in methods.METHODS[problem.operation] if method.algorithm == word]
    method = next((method for method in every if method.cannot(problem) is None), every[0])
    return method.why_not(problem) or f"would be faster than {chosen.algorithm}"


def _against_method(other: Method, chosen: Method, problem: Problem) -> str:
    if reason := other.why_not(problem):
        return reason
    if problem.algorithm not in ("auto", other.algorithm):
        return f"its algorithm is {other.algorithm!r}"
    return f"applies, but {chosen.name} comes first"


def _conversions(name: str, sizes: tuple[tuple[int, ...], ...]) -> int:
    """16-bit arrays are converted as a whole."""
    return 4 * sum(map(math.prod, sizes)) if name in ("float16", "bfloat16") else 0
