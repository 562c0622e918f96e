"""What a convolution would do, without doing it: which algorithm runs, why, what it costs and how exact it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import algorithms, arguments
from .geometry import ConvGeometry

__all__ = ["Explanation", "explain"]

_ALL = ("direct", "winograd", "fft", "loops")
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
    algorithm="auto",
):  # fmt: skip
    """Say which algorithm a convolution of these shapes runs on the CPU and why, what it costs and how exact it is.

    Nothing is computed. On CUDA every convolution is direct.

    Parameters
    ----------
    input_shape, weight_shape : the shapes (N, C, *S) and (O, C/groups, *K) of `conv1d`, `conv2d` or `conv3d`
        The number of dimensions is that of the weight; unbatched and bare shapes are read as there.
    stride, padding, dilation, groups : as there
    dtype : "float32", "float64", "float16" or "bfloat16", or a NumPy dtype
    op : "forward", "input_grad" or "weight_grad"
    algorithm : "auto", or the one to explain

    Returns
    -------
    Explanation, with the fields algorithm, reason, others (why not those), workspace, error, flops, direct_flops,
    bytes, and the shapes; it prints as a text.

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
    """
    function = "explain"
    arguments.check_choice(function, "op", op, algorithms.OPERATIONS)
    name = _dtype_name(dtype)
    weight_shape = arguments.shape_of(function, "weight_shape", weight_shape)
    ndim = _dimensions(weight_shape)
    plan = arguments.convolution_plan(
        function, ndim, input_shape, weight_shape, stride, padding, dilation, groups, "zeros",
        arguments.LAYOUTS[ndim][0], input_name="input_shape", weight_name="weight_shape",
    )  # fmt: skip
    geometry, precision = plan.geometry, _DOUBLE if name == "float64" else _SINGLE
    chosen = algorithms.choose(function, op, geometry, precision, algorithm, "cpu")
    sizes = (plan.input_shape, plan.weight_shape, plan.output_shape)
    return Explanation(
        op=op,
        input_shape=plan.input_shape,
        weight_shape=plan.weight_shape,
        output_shape=plan.output_shape,
        dtype=name,
        algorithm=chosen,
        reason=_reason(chosen, algorithm, op, geometry),
        others={other: _against(other, chosen, op, geometry, precision) for other in _ALL if other != chosen},
        workspace=_workspace(chosen, op, geometry, precision) + _conversions(name, sizes),
        error=math.hypot(algorithms.expected_error(chosen, op, geometry, precision), _ROUNDING.get(name, 0.0)),
        flops=algorithms.flops(chosen, op, geometry),
        direct_flops=geometry.flops,
        bytes=sum(map(math.prod, sizes)) * {"float32": 4, "float64": 8}.get(name, 2),
    )


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


def _reason(chosen: str, asked: str, op: str, geometry: ConvGeometry) -> str:
    if asked != "auto":
        return "asked for"
    if chosen == "direct":
        return "no other both applies and pays"
    return algorithms.why(chosen, op, geometry)


def _against(other: str, chosen: str, op: str, geometry: ConvGeometry, dtype: np.dtype) -> str:
    """Why not this one."""
    if other in ("direct", "loops"):
        return f"applies always, but {algorithms.fastest(op, geometry, dtype, 'cpu')} is faster"
    reason = algorithms.why_not(other, op, geometry, dtype, "cpu")
    return reason or algorithms.why_slower(other, op, geometry) or f"would be faster than {chosen}"


def _conversions(name: str, sizes: tuple[tuple[int, ...], ...]) -> int:
    """16-bit arrays are converted as a whole."""
    return 4 * sum(map(math.prod, sizes)) if name in ("float16", "bfloat16") else 0


def _workspace(algorithm: str, op: str, geometry: ConvGeometry, dtype: np.dtype) -> int:
    """What the call takes: exact for the FFT and for Winograd's weight gradient, else packed weights and blocks."""
    from .cpu import contraction, fft, threads, winograd, winograd_gradient

    if algorithm == "loops":
        return 0
    if algorithm == "fft":
        return fft.workspace(op, geometry, dtype)
    weights = geometry.out_channels * geometry.in_channels_per_group * math.prod(geometry.kernel_size) * dtype.itemsize
    blocks = contraction.SLAB_BYTES + contraction.GROUP_BYTES
    if algorithm == "winograd" and op == "weight_grad":
        return winograd_gradient.workspace(geometry, dtype)
    if algorithm == "winograd":
        m = winograd.tile_size(geometry, op)
        weights = weights * (m + 2) ** 2 // 9
        blocks += winograd._U_BYTES + winograd._M_BYTES
    elif op == "weight_grad":
        weights, blocks = 0, blocks + contraction._TILE_BYTES
    return weights + threads.get_num_threads() * blocks
