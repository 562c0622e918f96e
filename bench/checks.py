"""Whether a peer's result is right, against float64, before its time is taken.

The plain loops of fastconv.reference would take hours on a real layer. A convolution is checked by a random projection
instead (Freivalds, Fast probabilistic algorithms, 1979): with v = +1 or -1 at random for each output channel,

    sum over o of v[o] * y[n, o, p]  =  (x convolved with the single filter sum over o of v[o] * w[o])[n, p]

whose right side costs 1/O of the convolution and depends on every element of y. The weight gradient is projected over
its output channels, the input gradient over its input channels, each within its group. An element that is wrong shows
unless its error is within what rounding may do to the whole projection; tests show that the projections are those of
fastconv.reference. Cross-entropy is evaluated in float64 as it is.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .cases import Case, ConvolutionCase, CrossEntropyCase

# How far a result may be off, in units of eps * sqrt(number of terms) * norm of the terms. Plain summation in any order
# takes about 0.3 (tests/support/tolerance.py); peers may use Winograd's transforms or an FFT, which take several times
# as much.
ALLOWANCE = 16.0

# Elements that are in float64 at a time.
BLOCK = 1 << 24


class Disagreement(Exception):
    """A result is not that of the reference. The message says where and by how much."""


def check(case: Case, which: str, operands: dict[str, np.ndarray], result: Sequence[np.ndarray], cache: Path) -> None:
    """Raise Disagreement unless `result` is that of pass `which` of `case`.

    `result` has the one array of a convolution, or the loss and, for "with_grad", the gradient. What was expected is
    kept in the folder `cache`, for the other peers.
    """
    if isinstance(case, ConvolutionCase):
        _check_convolution(case, which, operands, result[0], cache)
    else:
        _check_cross_entropy(case, operands, result)


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------


def _check_convolution(
    case: ConvolutionCase, which: str, operands: dict[str, np.ndarray], result: np.ndarray, cache: Path
) -> None:
    shape = {
        "forward": case.output_shape,
        "weight_grad": case.weight_shape,
        "input_grad": case.input_shape,
    }[which]
    if result.shape != shape:
        raise Disagreement(f"shape {result.shape}, expected {shape}")
    dtype = operands["input"].dtype
    file = cache / f"{case.network}-{case.name}-{case.batch}-{which}-{dtype}.npz"
    if file.exists():
        with np.load(file) as saved:
            expected, norm = saved["expected"], saved["norm"]
    else:
        expected, norm = expected_projection(case, which, operands)
        with tempfile.NamedTemporaryFile(dir=cache, suffix=".npz", delete=False) as file_to_be:
            np.savez(file_to_be, expected=expected, norm=norm)
        os.replace(file_to_be.name, file)
    precise = np.float64 if dtype.itemsize == 8 else np.float32
    allowed = ALLOWANCE * np.finfo(precise).eps * math.sqrt(_terms(case, which)) * norm
    if dtype.itemsize == 2:  # computed in float32 and rounded once
        allowed = allowed + 4 * 2.0 ** (-8 if dtype.name == "bfloat16" else -11) * norm
    actual = projection(case, which, result)
    off = np.abs(actual - expected)
    if not np.all(off <= allowed):  # nan is wrong
        ratio = np.where(off <= allowed, 0.0, np.nan_to_num(off, nan=np.inf) / np.maximum(allowed, 1e-300))
        at = tuple(map(int, np.unravel_index(np.argmax(ratio), ratio.shape)))
        raise Disagreement(
            f"{np.count_nonzero(ratio)} of {ratio.size} projected values differ from the float64 reference; "
            f"at {at} by {off[at]:.3g} where rounding may do {allowed[at]:.3g}"
        )


def _terms(case: ConvolutionCase, which: str) -> int:
    """Products that are summed for one element."""
    if which == "weight_grad":
        return math.prod(case.output_shape) // case.out_channels
    channels = case.in_channels if which == "forward" else case.out_channels
    return channels // case.groups * math.prod(case.kernel)


def _signs(case: ConvolutionCase, which: str) -> np.ndarray:
    """+1 or -1 for each channel that is projected, (groups, channels per group)."""
    channels = case.in_channels if which == "input_grad" else case.out_channels
    return np.random.default_rng(channels).choice([-1.0, 1.0], (case.groups, channels // case.groups))


def projection(case: ConvolutionCase, which: str, result: np.ndarray) -> np.ndarray:
    """The channels of `result` summed with their signs: (N, G, *S), for the weight gradient (G, C/G, *K)."""
    v, g = _signs(case, which), case.groups
    if which == "weight_grad":
        return np.einsum("goc...,go->gc...", result.astype(np.float64).reshape(g, -1, *result.shape[1:]), v)
    n, _, *size = result.shape
    total = np.zeros((n, g, *size))
    for sample in range(n):  # one at a time in float64
        total[sample] = np.einsum("gc...,gc->g...", result[sample].astype(np.float64).reshape(g, -1, *size), v)
    return total


def expected_projection(
    case: ConvolutionCase, which: str, operands: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What `projection` should give, and the Euclidean norm of all products that were summed for it."""
    expected = _project(case, which, operands, _signs(case, which), lambda a: a)
    squares = _project(case, which, operands, np.ones_like(_signs(case, which)), np.square)
    return expected, np.sqrt(squares)


def _project(case, which, operands, v, change):
    """The projection with factors `v`, of operands that went through `change` in float64."""
    g, size = case.groups, case.size
    n, _, *out = case.output_shape

    def in_groups(name):  # one sample in float64, (G, channels of a group, *size)
        a = operands[name]
        for sample in a:
            yield change(sample.astype(np.float64)).reshape(g, -1, *a.shape[2:])

    def padded(samples):
        width = ((0, 0), (0, 0), *((p, p) for p in case.padding))
        return (np.pad(sample, width) for sample in samples)

    weight = change(operands["weight"].astype(np.float64)).reshape(g, -1, *case.weight_shape[1:])
    taps = list(np.ndindex(*case.kernel))
    if which == "forward":
        filters = np.einsum("goc...,go->gc...", weight, v)
        result = np.zeros((n, g, *out))
        for y, x in zip(result, padded(in_groups("input")), strict=True):
            for tap in taps:
                for some in _blocks(x, case):
                    y += np.einsum("gc...,gc->g...", x[:, some][_read_by(case, tap)], filters[(..., *tap)][:, some])
        return result
    if which == "weight_grad":
        result = np.zeros((g, case.in_channels // g, *case.kernel))
        for x, dy in zip(padded(in_groups("input")), in_groups("grad_output"), strict=True):
            slope = np.einsum("go...,go->g...", dy, v).reshape(g, -1)
            for tap in taps:
                for some in _blocks(x, case):
                    read = x[:, some][_read_by(case, tap)]
                    read = read.reshape(*read.shape[:2], -1)
                    result[(slice(None), some, *tap)] += np.einsum("gcp,gp->gc", read, slope)
        return result
    filters = np.einsum("goc...,gc->go...", weight, v)
    result = np.zeros((n, g, *size))
    for dx, dy in zip(result, in_groups("grad_output"), strict=True):
        whole = np.zeros((g, 1, *(s + 2 * p for s, p in zip(size, case.padding, strict=True))))
        for tap in taps:
            whole[_read_by(case, tap)][:, 0] += np.einsum("go...,go->g...", dy, filters[(..., *tap)])
        inside = tuple(slice(p, p + s) for s, p in zip(size, case.padding, strict=True))
        dx += whole[(slice(None), 0, *inside)]
    return result


def _read_by(case: ConvolutionCase, tap: Sequence[int]) -> tuple[slice, ...]:
    """The elements of a padded array (G, C, *S) that this tap reads, for all output positions."""
    out = case.output_shape[2:]
    return (
        slice(None),
        slice(None),
        *(
            slice(k * d, k * d + (o - 1) * s + 1, s)
            for k, d, o, s in zip(tap, case.dilation, out, case.stride, strict=True)
        ),
    )


def _blocks(x: np.ndarray, case: ConvolutionCase) -> Iterator[slice]:
    """The channels, so many at a time that einsum's copies stay small."""
    channels = x.shape[1]
    step = max(1, BLOCK * channels // x.size)
    return (slice(c, min(c + step, channels)) for c in range(0, channels, step))


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------------------------------


def _check_cross_entropy(case: CrossEntropyCase, operands: dict[str, np.ndarray], result: Sequence[np.ndarray]) -> None:
    """Loss and gradient against - sum of y log p and (p - y) / positions, in float64, some rows at a time."""
    eps = 2.0**-23 if operands["logits"].dtype.itemsize < 8 else 2.0**-52
    rounded = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(operands["logits"].dtype.name, 0.0)
    reduced = ALLOWANCE * eps * math.sqrt(case.classes)
    positions = case.batch * math.prod(case.size)
    gradient = result[1] if len(result) > 1 else None
    if gradient is not None and gradient.shape != case.logits_shape:
        raise Disagreement(f"gradient of shape {gradient.shape}, expected {case.logits_shape}")
    loss = 0.0
    # Every row along the classes for itself: whole spatial planes, or as many samples as fit.
    step = max(1, BLOCK // math.prod(case.logits_shape[1:]))
    for n in range(0, case.batch, step):
        some = slice(n, n + step)
        z = operands["logits"][some].astype(np.float64)
        target = operands["target"][some]
        if case.target == "index":
            y = np.zeros(z.shape)
            np.put_along_axis(y, np.expand_dims(target, 1), 1.0, axis=1)
        else:
            y = target.astype(np.float64)
        largest = z.max(axis=1, keepdims=True)
        log_p = z - largest - np.log(np.exp(z - largest).sum(axis=1, keepdims=True))
        loss -= float((y * log_p).sum())
        if gradient is None:
            continue
        p, total = np.exp(log_p), y.sum(axis=1, keepdims=True)
        expected = (p * total - y) / positions
        allowed = ((ALLOWANCE * eps * (1 + np.abs(log_p)) + reduced) * p + ALLOWANCE * eps * y) / positions
        allowed += rounded * np.abs(expected) + (2.0**-24 if rounded == 2.0**-11 else 0.0)
        off = np.abs(gradient[some].astype(np.float64) - expected)
        if not np.all(off <= allowed):
            bad = int(np.count_nonzero(~(off <= allowed)))
            raise Disagreement(
                f"{bad} of {off.size} gradients differ from the float64 reference, by up to {off.max():.3g}"
            )
    loss /= positions
    allowed_loss = (ALLOWANCE * eps * math.sqrt(positions) + reduced + rounded) * abs(loss)
    if not abs(float(result[0]) - loss) <= allowed_loss:
        raise Disagreement(f"loss {float(result[0])!r}, expected {loss!r} within {allowed_loss:.3g}")
