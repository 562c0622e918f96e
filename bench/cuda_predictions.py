"""docs/cuda-predictions.md: how long the kernels should take on an H200, from what can be counted without one.

    .venv-cuda/bin/python -m fastconv.bench.cuda_predictions     # after `make test-cuda`, which installs the compiler

Each layer is planned as a launch would plan it, on arrays that do not exist; its kernels are compiled for sm_90a, and
the instructions in their machine code are counted. Nothing is run, and no figure of the page is a measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from . import cases
from .cases import Case, ConvolutionCase, CrossEntropyCase

PAGE = Path(__file__).parent.parent / "docs" / "cuda-predictions.md"
TESTS = Path(__file__).parent.parent / "tests" / "support"

# The H200: what a copy reaches, read and written; the rest from NVIDIA's data sheet and the CUDA programming guide.
COPY = 4.3e12  # bytes per second
FLOPS = 67e12  # float32, multiply-adds of 128 lanes in each of 132 multiprocessors at 1.98 GHz
# by arithmetic: dense, the tensor cores' for tf32 and 16-bit types, the ordinary units' for float64
CEILINGS = {"float32": FLOPS, "float64": 34e12, "tf32": 495e12, "float16": 990e12, "bfloat16": 990e12}
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.98e9
ISSUED = MULTIPROCESSORS * SCHEDULERS * CLOCK  # instructions of a warp per second
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32  # of a multiprocessor
LAUNCH = 2.5e-6  # seconds from one kernel of a stream to the next, at least
MULTIPLIES = ("FFMA", "HMMA", "DFMA")
# Cycles of a multiprocessor's shared memory, 128 bytes in each, for what a warp does to it on the tensor cores' way.
SHARED_CYCLES = {"LDSM.16.M88.4": 4, "LDSM.16.MT88.4": 4, "LDGSTS": 4, "STS.128": 4, "LDS.128": 4}
# Multiplications and additions of one instruction of a warp
FLOPS_OF = {"HMMA.16816": 4096, "HMMA.1688": 2048, "DFMA": 64}

BATCH = 32
ARCHITECTURE = (9, 0)


class Table(NamedTuple):
    """One network, in one arithmetic and one order of the dimensions."""

    network: str
    passes: tuple[str, ...]
    kind: str = "float32"
    narrow: bool = False  # the layers of several groups alone
    last: bool = False  # channels last


CONVOLUTIONS = ("forward", "input_grad", "weight_grad")
TABLES = [
    Table("resnet50", CONVOLUTIONS),
    Table("resnet50", CONVOLUTIONS, "tf32", last=True),
    Table("resnet50", CONVOLUTIONS, "bfloat16", last=True),
    Table("resnet50", ("forward",), "float64"),
    Table("vgg16", ("forward",)),
    Table("vgg16", ("forward",), "tf32", last=True),
    Table("vgg16", ("forward",), "bfloat16", last=True),
    Table("mobilenet_v2", CONVOLUTIONS, narrow=True),
    Table("mobilenet_v2", ("forward",), "bfloat16", narrow=True),
    Table("convnext_tiny", ("forward", "weight_grad"), narrow=True),
    Table("audio", ("forward",), narrow=True),
    Table("cross_entropy", ("with_grad", "softmax")),
    Table("cross_entropy", ("with_grad",), "bfloat16"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Launches of a layer
# ---------------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel whose threads work together, as it would be launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def module(self) -> str:
        return self.kernel.function.__module__.rpartition(".")[2]

    @property
    def numbers(self) -> list[int]:
        return [int(n) for n in next(a for a in self.arguments if isinstance(a, tuple))]


_places = itertools.count(1)


def _array(shape: Iterable[int], dtype: Any = np.float32, last: bool = False) -> Any:
    """An array at a place of its own; `last`: its second axis lies closest together."""
    from fastconv.cuda_kernels._cuda import DeviceArray

    shape, place = tuple(shape), next(_places) << 40
    if not last:
        return DeviceArray(place, shape, None, dtype, None)
    made = DeviceArray(place, (shape[0], *shape[2:], shape[1]), None, dtype, None)
    return made.transpose((0, len(shape) - 1, *range(1, len(shape) - 1)))


class Small(NamedTuple):
    """A kernel of one thread for each element: weights put in order, parts of a gradient added."""

    bytes: int


@contextlib.contextmanager
def _recorded(kind: str) -> Iterator[tuple[list[Launch], list[Small]]]:
    """The launches that the kernels' entries make, on arrays that do not exist."""
    from fastconv.cuda_kernels import depthwise, implicit_gemm, softmax_rows
    from fastconv.cuda_kernels._cuda import DeviceArray

    launches: list[Launch] = []
    small: list[Small] = []

    def launch(kernel: Any, elements: int, *arguments: Any) -> None:
        small.append(Small(sum(a.nbytes for a in arguments if isinstance(a, DeviceArray))))

    def launch_blocks(kernel: Any, grid: Any, *arguments: Any) -> None:
        launches.append(Launch(kernel, grid if isinstance(grid, tuple) else (grid,), arguments))

    stand_ins: dict[str, Any] = {
        "launch_blocks": launch_blocks,
        "launch": launch,
        "upload": lambda *tables: tuple(_array((len(t),), t.dtype) for t in tables),
        "scratch": lambda shape, dtype, like: _array(shape, dtype),
        "current_device": lambda: 0,
        "get_float32_precision": lambda: "tf32" if kind == "tf32" else "ieee",
    }
    with contextlib.ExitStack() as stack:
        for module in (depthwise, implicit_gemm, softmax_rows):
            for name, value in stand_ins.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
            for cached in ("_plans", "_weight_plan"):
                if hasattr(module, cached):
                    getattr(module, cached).cache_clear()
                    stack.callback(getattr(module, cached).cache_clear)
        yield launches, small


def _dtype(kind: str) -> Any:
    if kind == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype("float32" if kind == "tf32" else kind)


def launches(case: Case, which: str, kind: str, last: bool = False) -> tuple[list[Launch], list[Small]]:
    """Those of one pass of a layer; none of the first where no kernel of blocks takes it."""
    from fastconv.arguments import convolution_plan
    from fastconv.cuda_kernels import depthwise, implicit_gemm, softmax_rows

    dtype = _dtype(kind)
    with _recorded(kind) as found:
        if isinstance(case, CrossEntropyCase):
            if case.size:
                return found
            z = _array((case.batch, case.classes, 1, 1, 1), dtype)
            if which == "softmax":
                softmax_rows.softmax_rows(z, False, z)
                return found
            soft = case.target == "probabilities"
            labels = _array((0,) * 4 if soft else (case.batch, 1, 1, 1), np.int64)
            target = _array(z.shape if soft else (0,) * 5, dtype)
            rows, no_rows, none = _array((case.batch, 1, 1, 1), dtype), _array((0,) * 4, dtype), _array((0,), dtype)
            one, zero = np.float32(1), np.float32(0)
            softmax_rows.cross_entropy_rows(
                z, labels, target, none, no_rows, -100, one, _array((0,)), one, zero, zero, zero, rows, _array((0,)),
                z, rows, _array((1,), np.int64), 0,
            )  # fmt: skip
            return found
        plan = convolution_plan(
            case.op, case.ndim, case.input_shape, case.weight_shape, case.stride, case.padding, case.dilation,
            case.groups, "zeros", ("NCL", "NCHW", "NCDHW")[case.ndim - 1],
        )  # fmt: skip
        ones = (1,) * (3 - case.ndim)
        x, w, y = (
            _array((*shape[:2], *ones, *shape[2:]), dtype, last and shape != case.weight_shape)
            for shape in (case.input_shape, case.weight_shape, case.output_shape)
        )
        bias = _array((0,), dtype)
        entries: dict[str, Callable[[Any], bool]] = {
            "forward": lambda module: module.forward(plan.geometry, x, w, bias, False, y),
            "weight_grad": lambda module: module.weight_grad(plan.geometry, x, y, False, w),
            "input_grad": lambda module: module.input_grad(plan.geometry, w, y, bias, False, False, x),
        }
        any(entries[which](module) for module in (depthwise, implicit_gemm))
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Instructions
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def machine_code(kernel: Any) -> Any:
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import codegen

    _, cubin = codegen.compile_for_launch(kernel.compiled, kernel.signature, ARCHITECTURE)
    return codegen.inspect_code(cubin)


def _total(blocks: Iterable[Any]) -> int:
    return sum(sum(block.values()) for block in blocks)


def _has(block: Any, *prefixes: str) -> bool:
    return any(opcode.startswith(prefixes) for opcode in block)


def _hot_block(code: Any) -> Any:
    return max(code.blocks, key=lambda block: sum(n for op, n in block.items() if op.startswith(MULTIPLIES)))


def _steps(launch: Launch) -> int:
    """How often a thread of a product goes through the innermost loop: over the terms, or the positions of a part."""
    from fastconv.cuda_kernels.tiles import ARITHMETIC

    operand = launch.kernel.signature[0].dtype.name  # of 16-bit numbers, and of tf32, the bits
    depth = ARITHMETIC[{"uint16": "bfloat16", "uint32": "tf32"}.get(operand, operand)].depth
    return math.ceil(launch.numbers[2 if launch.kernel.__name__ == "gather" else 3] / depth)


def _loop(code: Any) -> Any:
    """The shortest loop around the hot block: the multiplications of a step, and the fetching of the next."""
    most = sum(n for op, n in _hot_block(code).items() if op.startswith(MULTIPLIES))
    around = [
        loop for loop in code.loops if sum(n for op, n in loop.items() if op.startswith(MULTIPLIES)) >= most
    ]  # fmt: skip
    return min(around, key=lambda loop: _total([loop]))


def instructions(launch: Launch) -> float:
    """Of one thread, about. Of the ways to store a result the longest is taken, where only one can be."""
    code = machine_code(launch.kernel)
    everything = _total(code.blocks)
    if launch.module == "softmax_rows":
        return 0.0 if _is_read_twice(launch) else everything
    numbers = launch.numbers
    if launch.module == "implicit_gemm":
        return everything + (_steps(launch) - 1) * _total([_loop(code)])
    alternatives = _total(
        b for b in code.blocks if any(op in ("STG.E", "LDG.E", "STG.E.U16", "LDG.E.U16") for op in b)
    )
    if launch.kernel.__name__ == "gather":
        vectors = any(op.startswith(("STG.E.128", "STG.E.64")) for op in code.opcodes)
        planes = numbers[8] * numbers[24] * numbers[29]
        body = _total(b for b in code.blocks if _has(b, "FFMA"))
        return everything - (alternatives if vectors else 0) + (planes - 1) * body
    lanes = 32 if launch.kernel.__name__ == "weight_grad" and _is_channels_last(launch) else 1
    body = _total(b for b in code.blocks if _has(b, "FFMA", "LDG"))
    patches = math.ceil(numbers[9] / (launch.kernel.threads // lanes))
    return everything + (patches - 1) * body


def multiplications(launch: Launch) -> float:
    """Multiplications and additions of a warp on the tensor cores or the float64 units, also in what fills up tiles."""
    if launch.module != "implicit_gemm":
        return 0.0
    hot = _hot_block(machine_code(launch.kernel))
    return _steps(launch) * sum(
        n * flops for op, n in hot.items() for prefix, flops in FLOPS_OF.items() if op.startswith(prefix)
    )


def shared_cycles(launch: Launch) -> float:
    """Cycles in which a warp on the tensor cores' way has the shared memory of its multiprocessor for itself."""
    code = machine_code(launch.kernel)
    if launch.module != "implicit_gemm" or not any(op.startswith("HMMA") for op in code.opcodes):
        return 0.0
    return _steps(launch) * sum(
        n * cycles
        for op, n in _loop(code).items()
        for prefix, cycles in SHARED_CYCLES.items()
        if op.startswith(prefix)
    )


def _is_read_twice(launch: Launch) -> bool:
    """Is the row too long for the registers? Most code of its kernel is then for options that nobody asked for."""
    from fastconv.cuda_kernels import softmax_rows

    classes, logits = launch.arguments[1], launch.arguments[2]
    dtype = {"uint16": "bfloat16"}.get(logits.dtype.name, logits.dtype.name)  # as its bits
    return softmax_rows.group_for(dtype, classes, True).vectors == 0


def _is_channels_last(launch: Launch) -> bool:
    return launch.numbers[15] == 1


def blocks_at_once(launch: Launch) -> int:
    """Blocks that a multiprocessor holds."""
    code, threads = machine_code(launch.kernel), launch.kernel.threads
    registers = REGISTERS // (-(-code.registers // 8) * 8 * threads)
    return max(1, min(registers, SHARED // max(code.shared, 1), THREADS // threads, BLOCKS))


# ---------------------------------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one pass of a layer, in seconds."""

    case: Case
    which: str
    kind: str
    launches: list[Launch]
    small: list[Small]
    memory: float
    issue: float
    multiply: float  # on the tensor cores, or the float64 units
    shared: float

    @property
    def bounds(self) -> dict[str, float]:
        unit = "float64 units" if self.kind == "float64" else "tensor cores"
        return {
            "memory": self.memory, "instructions": self.issue, unit: self.multiply, "shared memory": self.shared
        }  # fmt: skip

    @property
    def bound(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def seconds(self) -> float:
        beside = sum(small.bytes for small in self.small) / COPY
        return max(self.bounds.values()) + beside + LAUNCH * (len(self.launches) + len(self.small))


def moved_bytes(case: Case, which: str, itemsize: int) -> int:
    """As `case.bytes`; softmax reads and writes its rows and has no labels."""
    if which == "softmax" and isinstance(case, CrossEntropyCase):
        return 2 * itemsize * math.prod(case.logits_shape)
    return case.bytes(which, itemsize)


def predict(case: Case, which: str, kind: str, last: bool = False) -> Prediction | None:
    """None where a simple kernel, one thread for each element, does the pass."""
    found, small = launches(case, which, kind, last)
    if not found:
        return None
    itemsize = _dtype(kind).itemsize
    issue, multiply, shared, moved = 0.0, 0.0, 0.0, moved_bytes(case, which, itemsize)
    for launch in found:
        if launch.module == "softmax_rows" and _is_read_twice(launch):
            moved += itemsize * case.batch * case.classes  # type: ignore[union-attr]
        warps = launch.blocks * launch.kernel.threads / 32
        full = MULTIPROCESSORS * blocks_at_once(launch)
        # the last wave takes as long as a full one, and a first that is not full as long as its busiest multiprocessor
        if launch.blocks >= full:
            uneven = math.ceil(launch.blocks / full) * full / launch.blocks
        else:
            uneven = math.ceil(launch.blocks / MULTIPROCESSORS) * MULTIPROCESSORS / launch.blocks
        issue += warps * instructions(launch) / ISSUED * uneven
        multiply += warps * multiplications(launch) / CEILINGS[kind] * uneven
        shared += warps * shared_cycles(launch) / (MULTIPROCESSORS * CLOCK) * uneven
    return Prediction(case, which, kind, found, small, moved / COPY, issue, multiply, shared)


def for_gpu(case: Case) -> Case:
    """At the batches of `bench.cuda`."""
    from .cuda import LEAST_LOGITS

    if isinstance(case, CrossEntropyCase):
        return dataclasses.replace(case, batch=max(case.batch, -(-LEAST_LOGITS // case.classes)))
    return case if case.batch == 1 else dataclasses.replace(case, batch=max(case.batch, BATCH))


def _name(launch: Launch) -> str:
    code = machine_code(launch.kernel)
    return f"{launch.module}.{launch.kernel.__name__}, {code.registers} registers"


class Section(NamedTuple):
    """A table of the page."""

    title: str
    table: Table
    which: str
    predictions: list[Prediction]

    @property
    def lines(self) -> Iterator[str]:
        ceiling = CEILINGS[self.table.kind]
        for found in self.predictions:
            case, seconds = found.case, found.seconds
            flops = case.flops("forward" if self.which == "softmax" else self.which)
            moved = moved_bytes(case, self.which, _dtype(self.table.kind).itemsize)
            times = " | ".join(f"{1e3 * t:.4f}" for t in (*found.bounds.values(), seconds))
            largest = max(found.launches, key=lambda launch: launch.blocks)
            yield (
                f"| {case.name} | {_name(largest)} | {len(found.launches) + len(found.small)} | {flops / 1e9:.2f} | "
                f"{moved / 1e6:.1f} | {times} | {flops / seconds / 1e12:.1f} | "
                f"{100 * flops / seconds / ceiling:.0f} | {100 * moved / seconds / COPY:.0f} | {found.bound} |"
            )

    @property
    def summary(self) -> str:
        """All layers, each as often as the network has it."""
        seconds = sum(p.case.count * p.seconds for p in self.predictions)
        flops = sum(p.case.count * p.case.flops(p.which) for p in self.predictions if self.which != "softmax")
        moved = sum(
            p.case.count * moved_bytes(p.case, self.which, _dtype(self.table.kind).itemsize) for p in self.predictions
        )
        rate = flops / seconds
        bounds = sorted({p.bound for p in self.predictions})
        return (
            f"| {self.title} | {len(self.predictions)} | {1e3 * seconds:.3f} | {rate / 1e12:.1f} | "
            f"{100 * rate / CEILINGS[self.table.kind]:.0f} | {100 * moved / seconds / COPY:.0f} | {', '.join(bounds)} |"
        )


def sections(tables: Iterable[Table], tell: Callable[[str], object] = print) -> Iterator[Section]:
    """One for each network, pass and arithmetic of which any layer is done by a kernel of blocks."""
    for table in tables:
        for which in table.passes:
            found = []
            for case in map(for_gpu, cases.network(table.network)):
                if table.narrow and isinstance(case, ConvolutionCase) and case.groups == 1:
                    continue
                prediction = predict(case, which, table.kind, table.last)
                if prediction is not None:
                    tell(f"{table.network} {case.name} {which} {table.kind}: {1e3 * prediction.seconds:.4f} ms")
                    found.append(prediction)
            if found:
                title = f"{table.network}, {which}, {table.kind}{', channels last' * table.last}"
                yield Section(title, table, which, found)


def mixes(kernels: Iterable[Any]) -> Iterator[str]:
    """A line for each kernel: its resources, and what its instructions are."""
    for kernel in kernels:
        code = machine_code(kernel)
        total = sum(code.opcodes.values())

        def count(*prefixes: str, code=code) -> int:
            return sum(n for op, n in code.opcodes.items() if op.startswith(prefixes))

        hot = max(MULTIPLIES, key=code.share)
        multiplies, of = code.share(hot)
        yield (
            f"| {kernel.function.__module__.rpartition('.')[2]}.{kernel.__name__} | {kernel.threads} | "
            f"{code.registers} | {code.shared} | {total} | {hot} {multiplies} of {of} | "
            f"{_total([_loop(code)]) if code.loops and multiplies else '-'} | {count('LDGSTS')} | "
            f"{count('LDG.E.128', 'LDG.E.64')} of {count('LDG')} | "
            f"{count('STG.E.128', 'STG.E.64')} of {count('STG')} | "
            f"{count('LDS') - count('LDSM')} | {count('LDSM')} | {count('STS')} | {count('SHFL')} | {count('MUFU')} |"
        )


HEAD = f"""# Predicted times of the CUDA kernels on an H200

**Predictions, not measurements.** No kernel has been run for this page: `bench/cuda_predictions.py` counts bytes,
flops and the instructions in the machine code for sm_90a (CUDA 13.0), and divides them by what an H200 can do:
{COPY / 1e12:g} TB/s for a copy, {FLOPS / 1e12:g} TFLOP/s of float32 outside the tensor cores
and {CEILINGS["float64"] / 1e12:g} of float64, {CEILINGS["tf32"] / 1e12:g} of tf32
and {CEILINGS["bfloat16"] / 1e12:g} of bfloat16 on them (dense),
{ISSUED / 1e12:.3f} * 10^12 instructions of a warp a second. `make bench-cuda` measures; its rows are in bench/results.

A prediction is the largest of four times, {1e6 * LAUNCH:g} us for each launch, and the bytes of the small kernels
beside it (weights put in order, parts of a gradient added):

- *memory*: both operands read once and the result written once, at the rate of a copy;
- *instructions*: those of every warp, issued at one per scheduler and clock, the multiprocessors as evenly loaded as
  the number of blocks lets them be;
- *units*: the multiplications of whole tiles and steps, at the rate of the tensor cores or of the float64 units
  (those of float32 are among the instructions);
- *shared*: on the tensor cores' way, what the warps load from shared memory and copy into it, at 128 bytes a clock.

It leaves out what is not known without a GPU: waiting for memory and barriers that other warps do not cover, conflicts
of shared memory banks, operands read more than once from beyond the caches, the second-level cache's hits, and the
clock under load. The rate of the tensor cores is that of `wgmma`; `mma.sync`, which the kernels use, was found to reach
about 63 % of it on this architecture (Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking, 2024). So the times are lower bounds in kind; where a kernel has several ways to store a result, the
longest was counted. Rows of logits too long for the registers count as read twice, their instructions not; of the
kernel for probabilities one pass through its loops is counted, of cross-entropy the one launch that reads the logits.
Batch {BATCH}, cross-entropy on at least 2^26 logits; layers without a line are done by the simple kernels.
"""

SUMMARY = """
## All layers of a network

Each as often as the network has it.

| network, pass, arithmetic | layers | predicted ms | TFLOP/s | % of the arithmetic's ceiling | % of copy | bound by |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
"""

CODE = """
## Machine code

*loop*: all instructions of the innermost loop around the hot block, the fetching of the next step included.

| kernel | threads | registers | shared bytes | instructions | hot block | loop | LDGSTS | wide loads | wide stores \
| LDS | LDSM | STS | SHFL | MUFU |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

TABLE = """
| layer | kernel | launches | GFLOP | MB | memory ms | instructions ms | units ms | shared ms | predicted ms | TFLOP/s \
| % of ceiling | % of copy | bound |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


def page(tables: Iterable[Table], tell: Callable[[str], object] = print) -> str:
    made = list(sections(tables, tell))
    used = dict.fromkeys(launch.kernel for s in made for p in s.predictions for launch in p.launches)
    parts = [HEAD, SUMMARY, "\n".join(section.summary for section in made), "\n"]
    parts += [CODE, "\n".join(mixes(used)), "\n"]
    for section in made:
        parts += [f"\n## {section.title}\n", TABLE, "\n".join(section.lines), "\n"]
    return "".join(parts)


if __name__ == "__main__":
    os.environ.pop("NUMBA_ENABLE_CUDASIM", None)
    PAGE.write_text(page(TABLES), encoding="utf-8")
    print(f"written: {PAGE}")
