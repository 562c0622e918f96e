"""What is measured: layers read from the CSV files of shapes/, and the operands of each.

A shapes file begins with comment lines (#), then a header, then one row per layer. The header says what it holds:

    convolution     name,batch,in_channels,size,out_channels,kernel,stride,padding,dilation,groups,count
    cross-entropy   name,batch,classes,size,target

size and kernel have one number per spatial dimension, joined by x (`56x56`); stride, padding and dilation one number
for all dimensions, or one for each; count is how often the network has the layer. size is - for logits of (batch,
classes) alone; target is `index` or `probabilities`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = Path(__file__).parent / "shapes"
NETWORKS = tuple(sorted(path.stem for path in SHAPES.glob("*.csv")))

# One of each kind: what BENCH=quick measures. By network, the rows.
QUICK = {
    "resnet50": ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.1.conv1", "layer4.1.conv2"),
    "vgg16": ("features.12",),
    "mobilenet_v2": ("features.2.conv.1.0",),
    "convnext_tiny": ("features.1.0.block.0",),
    "audio": ("whisper.conv2",),
    "medical": ("nnunet.enc4.2",),
    "planes": ("photo.15x15",),
    "cross_entropy": ("mnist", "imagenet", "ade20k"),
    "small": ("cifar.3x3",),
    "small_cross_entropy": ("32x10",),
}


# In each dimension, of `small` cases: enough for two tiles of each algorithm.
SMALL_SIZE = 14


class ShapesError(ValueError):
    """A shapes file is malformed. The message names the file, the line and the column."""


@dataclass(frozen=True)
class ConvolutionCase:
    """One convolution layer; its name is unique within its network."""

    network: str
    name: str
    batch: int
    in_channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    count: int = 1

    passes = ("forward", "weight_grad", "input_grad")
    unit = "GFLOP/s"

    @property
    def ndim(self) -> int:
        return len(self.size)

    @property
    def op(self) -> str:
        return f"conv{self.ndim}d"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.in_channels, *self.size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (
            self.batch,
            self.out_channels,
            *(
                (s + 2 * p - d * (k - 1) - 1) // t + 1
                for s, k, t, p, d in zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
            ),
        )

    def flops(self, which: str) -> int:
        """Multiplications and additions, the same in every pass; those on the padding count, as is usual."""
        return 2 * math.prod(self.output_shape) * math.prod(self.weight_shape[1:])

    def bytes(self, which: str, itemsize: int) -> int:
        """What must be moved at least: both operands read once, the result written once."""
        return itemsize * sum(map(math.prod, (self.input_shape, self.weight_shape, self.output_shape)))

    def operands(self, dtype: np.dtype) -> dict[str, np.ndarray]:
        """input, weight, grad_output: normal, the weight scaled so that the output is of unit variance."""
        rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
        fan_in = math.prod(self.weight_shape[1:])
        x, w, dy = (
            rng.standard_normal(shape, np.float32) for shape in (self.input_shape, self.weight_shape, self.output_shape)
        )
        w /= np.float32(math.sqrt(fan_in))
        return {"input": x.astype(dtype), "weight": w.astype(dtype), "grad_output": dy.astype(dtype)}


    def small(self) -> ConvolutionCase:
        """A case on which a library loads the same code with as little memory as possible."""
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        least = (max(SMALL_SIZE, span - 2 * p) for span, p in zip(spans, self.padding, strict=True))
        return dataclasses.replace(self, batch=1, size=tuple(map(min, self.size, least)))


@dataclass(frozen=True)
class CrossEntropyCase:
    """Softmax cross-entropy of logits (batch, classes, *size)."""

    network: str
    name: str
    batch: int
    classes: int
    size: tuple[int, ...]
    target: str

    passes = ("forward", "with_grad")
    unit = "GB/s"
    op = "softmax_cross_entropy"
    count = 1

    @property
    def logits_shape(self) -> tuple[int, ...]:
        return self.batch, self.classes, *self.size

    def flops(self, which: str) -> int:
        """Roughly: a maximum, a subtraction, an exponential (as one) and a sum; with the gradient three more."""
        return (4 if which == "forward" else 7) * math.prod(self.logits_shape)

    def bytes(self, which: str, itemsize: int) -> int:
        """The logits (and probabilities) read once, the gradient written once; the labels, 8 bytes each, too."""
        logits = itemsize * math.prod(self.logits_shape)
        target = logits if self.target == "probabilities" else 8 * math.prod((self.batch, *self.size))
        return logits * (1 if which == "forward" else 2) + target

    def operands(self, dtype: np.dtype) -> dict[str, np.ndarray]:
        """logits, normal with deviation 3, and target."""
        rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
        logits = rng.standard_normal(self.logits_shape, np.float32)
        logits *= np.float32(3)
        if self.target == "index":
            target = rng.integers(self.classes, size=(self.batch, *self.size))
        else:
            target = rng.random(self.logits_shape, np.float32)
            target /= target.sum(axis=1, keepdims=True)
            target = target.astype(dtype)
        return {"logits": logits.astype(dtype), "target": target}


    def small(self) -> CrossEntropyCase:
        """A case on which a library loads the same code with as little memory as possible."""
        return dataclasses.replace(self, batch=1, size=tuple(min(s, SMALL_SIZE) for s in self.size))


Case = ConvolutionCase | CrossEntropyCase


def as_message(case: Case) -> dict[str, Any]:
    """The case as JSON can carry it; `from_message` makes it again."""
    return dataclasses.asdict(case)


def from_message(message: dict[str, Any]) -> Case:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in message.items()}
    return CrossEntropyCase(**values) if "classes" in values else ConvolutionCase(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def network(name: str) -> list[Case]:
    """The layers of one of `NETWORKS`."""
    return read(SHAPES / f"{name}.csv")


def quick() -> list[Case]:
    return [case for name, rows in QUICK.items() for case in network(name) if case.name in rows]


def read(path: Path) -> list[Case]:
    """The layers of a shapes file, whose name without .csv is their network. Raises ShapesError, OSError."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [(n, line) for n, line in enumerate(file, 1) if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ShapesError(f"{path}: no header (expected {','.join(_COLUMNS[0])} or {','.join(_COLUMNS[1])})")
    (at, header), rows = lines[0], lines[1:]
    columns = [name.strip() for name in next(csv.reader([header]))]
    if tuple(columns) not in _COLUMNS:
        likely = _COLUMNS[1 if "classes" in columns else 0]
        missing, unknown = [n for n in likely if n not in columns], [n for n in columns if n not in likely]
        said = [f"no column {n}" for n in missing] + [f"unknown column {n!r}" for n in unknown]
        raise ShapesError(
            f"{path}, line {at}: {', '.join(said) or 'columns in another order'} (expected {','.join(likely)})"
        )
    if not rows:
        raise ShapesError(f"{path}: no rows after the header")
    cases: list[Case] = []
    names: dict[str, int] = {}
    for at, line in rows:
        row = _Row(path, at, columns, next(csv.reader([line])))
        case = _cross_entropy(row) if "classes" in columns else _convolution(row)
        if case.name in names:
            raise row.error("name", f"{case.name!r} is already the name of line {names[case.name]}")
        names[case.name] = at
        cases.append(case)
    return cases


_COLUMNS = (
    tuple(field.name for field in dataclasses.fields(ConvolutionCase))[1:],
    tuple(field.name for field in dataclasses.fields(CrossEntropyCase))[1:],
)


class _Row:
    """One row of a file, whose fields are read with an error that says where they stand."""

    def __init__(self, path: Path, line: int, columns: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.line = path, line
        if len(values) != len(columns):
            column = columns[len(values)] if len(values) < len(columns) else f"number {len(columns) + 1}"
            raise self.error(column, f"{len(values)} values (expected {len(columns)}: {','.join(columns)})")
        self.values = {name: value.strip() for name, value in zip(columns, values, strict=True)}

    def error(self, column: str, what: str) -> ShapesError:
        return ShapesError(f"{self.path}, line {self.line}, column {column}: {what}")

    def text(self, column: str) -> str:
        if not self.values[column]:
            raise self.error(column, "empty")
        return self.values[column]

    def integer(self, column: str, least: int = 1) -> int:
        return self._integers(column, least, 1)[0]

    def sizes(self, column: str) -> tuple[int, ...]:
        return self._integers(column, 1, None)

    def per_dimension(self, column: str, ndim: int, least: int = 1) -> tuple[int, ...]:
        values = self._integers(column, least, None)
        if len(values) not in (1, ndim):
            raise self.error(column, f"{self.values[column]!r} has {len(values)} numbers (expected 1 or {ndim})")
        return values * ndim if len(values) == 1 else values

    def _integers(self, column: str, least: int, expected: int | None) -> tuple[int, ...]:
        text = self.text(column)
        if not re.fullmatch(r"\d+(x\d+)*", text, re.ASCII):
            form = "a whole number" if expected == 1 else "whole numbers joined by x"
            raise self.error(column, f"{text!r} (expected {form})")
        values = tuple(map(int, text.split("x")))
        if expected is not None and len(values) != expected:
            raise self.error(column, f"{text!r} (expected one number)")
        if min(values) < least:
            raise self.error(column, f"{text!r} (expected at least {least})")
        return values


def _convolution(row: _Row) -> ConvolutionCase:
    size = row.sizes("size")
    if len(size) > 3:
        raise row.error("size", f"{row.text('size')!r} has {len(size)} dimensions (expected 1, 2 or 3)")
    kernel = row.sizes("kernel")
    if len(kernel) != len(size):
        raise row.error("kernel", f"{row.text('kernel')!r} has {len(kernel)} dimensions, but size has {len(size)}")
    case = ConvolutionCase(
        network=row.path.stem,
        name=row.text("name"),
        batch=row.integer("batch"),
        in_channels=row.integer("in_channels"),
        size=size,
        out_channels=row.integer("out_channels"),
        kernel=kernel,
        stride=row.per_dimension("stride", len(size)),
        padding=row.per_dimension("padding", len(size), least=0),
        dilation=row.per_dimension("dilation", len(size)),
        groups=row.integer("groups"),
        count=row.integer("count"),
    )
    for column, channels in (("in_channels", case.in_channels), ("out_channels", case.out_channels)):
        if channels % case.groups:
            raise row.error("groups", f"{case.groups} does not divide {column}={channels}")
    if min(case.output_shape) < 1:
        raise row.error("kernel", f"{row.text('kernel')!r} is larger than the padded input {row.text('size')}")
    return case


def _cross_entropy(row: _Row) -> CrossEntropyCase:
    target = row.text("target")
    if target not in ("index", "probabilities"):
        raise row.error("target", f"{target!r} (expected index or probabilities)")
    return CrossEntropyCase(
        network=row.path.stem,
        name=row.text("name"),
        batch=row.integer("batch"),
        classes=row.integer("classes"),
        size=() if row.text("size") == "-" else row.sizes("size"),
        target=target,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Growth: one layer, of which one size is varied
# ---------------------------------------------------------------------------------------------------------------------

GROWTH_LAYER = ConvolutionCase(
    "growth", "base", batch=4, in_channels=64, size=(56, 56), out_channels=64, kernel=(3, 3), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), groups=1,
)  # fmt: skip


def _vary(question: str, values: Sequence[int], change: Callable[[int], dict[str, Any]]) -> Iterator[ConvolutionCase]:
    for value in values:
        yield dataclasses.replace(
            GROWTH_LAYER, network=f"growth_{question}", name=f"{question}={value}", **change(value)
        )


def growth(question: str) -> list[ConvolutionCase]:
    """The cases of one of `GROWTH`: the layer 64 -> 64 channels, 56 x 56, 3 x 3, batch 4, with one size varied."""
    return list(_vary(question, *GROWTH[question]))


GROWTH: dict[str, tuple[Sequence[int], Callable[[int], dict[str, Any]]]] = {
    "batch": ((1, 2, 4, 8, 16, 32), lambda n: {"batch": n}),
    "channels": ((8, 16, 32, 64, 128, 256), lambda c: {"in_channels": c, "out_channels": c}),
    "size": ((14, 28, 56, 112, 224), lambda s: {"size": (s, s)}),
    "kernel": ((1, 3, 5, 7, 11, 15), lambda k: {"kernel": (k, k), "padding": (k // 2, k // 2)}),
    "memory": ((14, 28, 56, 112, 224), lambda s: {"size": (s, s)}),
    "threads": ((1, 2, 4, 8, 16, 32, 64), lambda t: {}),
}
