"""docs/cuda-predictions.md: how long the kernels should take on an H200, from what can be counted without one.

    .venv-cuda/bin/python -m fastconv.bench.cuda_predictions     # after `make test-cuda`, which installs the compiler

Each layer is planned as a launch would plan it, on arrays that do not exist; its kernels are compiled for sm_90a, and
the instructions in their machine code are counted. Nothing is run, and no figure of the page is a measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
TESTS = Path(__file__).parent.parent / "tests"

# The H200: what a copy reaches, read and written; the rest from NVIDIA's data sheet and the CUDA programming guide.
COPY = 4.3e12  # bytes per second
FLOPS = 67e12  # float32, multiply-adds of 128 lanes in each of 132 multiprocessors at 1.98 GHz
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.98e9
ISSUED = MULTIPROCESSORS * SCHEDULERS * CLOCK  # instructions of a warp per second
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32  # of a multiprocessor
LAUNCH = 2.5e-6  # seconds from one kernel of a stream to the next, at least
CEILINGS = {"tf32": 495e12, "bfloat16": 990e12}

BATCH = 32
ARCHITECTURE = (9, 0)
LAYERS = [
    ("resnet50", False, ("forward", "input_grad"), "float32"),
    ("vgg16", False, ("forward",), "float32"),
    ("mobilenet_v2", True, ("forward",), "float32"),
    ("convnext_tiny", True, ("forward", "weight_grad"), "float32"),
    ("audio", True, ("forward",), "float32"),
    ("cross_entropy", False, ("with_grad",), "float32"),
    ("cross_entropy", False, ("with_grad",), "bfloat16"),
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


def _array(shape: Iterable[int], dtype: Any = np.float32) -> Any:
    from fastconv.cuda_kernels._cuda import DeviceArray

    return DeviceArray(1 << 20, tuple(shape), None, dtype, None)


@contextlib.contextmanager
def _recorded() -> Iterator[list[Launch]]:
    """The launches that the kernels' entries make, on arrays that do not exist."""
    from fastconv.cuda_kernels import depthwise, implicit_gemm, softmax_rows

    launches: list[Launch] = []

    def launch_blocks(kernel: Any, grid: Any, *arguments: Any) -> None:
        launches.append(Launch(kernel, grid if isinstance(grid, tuple) else (grid,), arguments))

    stand_ins: dict[str, Any] = {
        "launch_blocks": launch_blocks,
        "launch": lambda *arguments: None,  # the sum of parts, small beside them
        "upload": lambda *tables: tuple(_array((len(t),), t.dtype) for t in tables),
        "empty": lambda shape, dtype, like: (None, _array(shape, dtype)),
        "current_device": lambda: 0,
        "multiprocessors": lambda: MULTIPROCESSORS,
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
        yield launches


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def launches(case: Case, which: str, dtype: str) -> list[Launch]:
    """Those of one pass of a layer; none where no kernel of blocks takes it."""
    from fastconv.arguments import convolution_plan
    from fastconv.cuda_kernels import depthwise, implicit_gemm, softmax_rows

    kind = _dtype(dtype)
    with _recorded() as found:
        if isinstance(case, CrossEntropyCase):
            if case.size:
                return []
            z = _array((case.batch, case.classes, 1, 1, 1), kind).transpose((0, 1, 2, 3, 4))
            rows = _array((case.batch, 1, 1, 1), kind)
            none = _array((0,), kind), _array((0,) * 5, kind)
            one, zero = np.float32(1), np.float32(0)
            softmax_rows.cross_entropy_rows(
                z, _array((case.batch, 1, 1, 1), np.int64), none[1], none[0], rows, -100, one, _array((0,)), one, zero,
                one, one, rows, _array((0,)), z, rows,
            )  # fmt: skip
            return found
        plan = convolution_plan(
            case.op, case.ndim, case.input_shape, case.weight_shape, case.stride, case.padding, case.dilation,
            case.groups, "zeros", ("NCL", "NCHW", "NCDHW")[case.ndim - 1],
        )  # fmt: skip
        ones = (1,) * (3 - case.ndim)
        x, w, y = (
            _array((*shape[:2], *ones, *shape[2:]), kind)
            for shape in (case.input_shape, case.weight_shape, case.output_shape)
        )
        bias = _array((0,), kind)
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


def instructions(launch: Launch) -> float:
    """Of one thread, about. Of the ways to store a result the longest is taken, where only one can be."""
    code = machine_code(launch.kernel)
    hot = max(code.blocks, key=lambda block: sum(n for op, n in block.items() if op.startswith(("FFMA", "HMMA"))))
    everything = _total(code.blocks)
    if launch.module == "softmax_rows":
        return 0.0 if _is_read_twice(launch) else everything
    numbers = launch.numbers
    if launch.module == "implicit_gemm":
        # the fetching and storing of a stage is there twice: before the loop, and in it
        stage = _total(b for b in code.blocks if b is not hot and _has(b, "LDG", "STS", "LDGSTS")) / 2
        steps = math.ceil((numbers[2] if launch.kernel.__name__ == "gather" else numbers[3]) / 8)
        return everything + (steps - 1) * (_total([hot]) + stage)
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
    dtype: str
    launches: list[Launch]
    memory: float
    issue: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue) + LAUNCH * len(self.launches)


def predict(case: Case, which: str, dtype: str) -> Prediction | None:
    """None where a simple kernel, one thread for each element, does the pass."""
    found = launches(case, which, dtype)
    if not found:
        return None
    itemsize = _dtype(dtype).itemsize
    issue, moved = 0.0, case.bytes(which, itemsize)
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
    return Prediction(case, which, dtype, found, moved / COPY, issue)


def for_gpu(case: Case) -> Case:
    """At the batches of `bench.cuda`."""
    from .cuda import LEAST_LOGITS

    if isinstance(case, CrossEntropyCase):
        return dataclasses.replace(case, batch=max(case.batch, -(-LEAST_LOGITS // case.classes)))
    return case if case.batch == 1 else dataclasses.replace(case, batch=max(case.batch, BATCH))


def _name(launch: Launch) -> str:
    code = machine_code(launch.kernel)
    return f"{launch.module}.{launch.kernel.__name__}, {code.registers} registers"


def rows(
    layers: Iterable[tuple[str, bool, tuple[str, ...], str]], tell: Callable[[str], object] = print
) -> Iterator[tuple[str, list[str]]]:
    """(title, lines of a table) for each network, pass and arithmetic."""
    for network, narrow, passes, dtype in layers:
        for which in passes:
            lines = []
            for case in map(for_gpu, cases.network(network)):
                if narrow and isinstance(case, ConvolutionCase) and case.groups == 1:
                    continue
                found = predict(case, which, dtype)
                if found is None:
                    continue
                tell(f"{network} {case.name} {which} {dtype}: {1e3 * found.seconds:.4f} ms")
                flops, moved = case.flops(which), case.bytes(which, _dtype(dtype).itemsize)
                rate, traffic = flops / found.seconds, moved / found.seconds
                largest = max(found.launches, key=lambda launch: launch.blocks)
                bound = "memory" if found.memory > found.issue else "instructions"
                lines.append(
                    f"| {case.name} | {_name(largest)} | {flops / 1e9:.2f} | {moved / 1e6:.1f} | "
                    f"{1e3 * found.memory:.4f} | {1e3 * found.issue:.4f} | {1e3 * found.seconds:.4f} | "
                    f"{rate / 1e12:.1f} | {100 * rate / FLOPS:.0f} | {100 * traffic / COPY:.0f} | {bound} |"
                )
            if lines:
                yield f"{network}, {which}, {dtype}", lines


def mixes(kernels: Iterable[Any]) -> Iterator[str]:
    """A line for each kernel: its resources, and what its instructions are."""
    for kernel in kernels:
        code = machine_code(kernel)
        total = sum(code.opcodes.values())

        def count(*prefixes: str, code=code) -> int:
            return sum(n for op, n in code.opcodes.items() if op.startswith(prefixes))

        multiplies, of = code.share("FFMA")
        yield (
            f"| {kernel.function.__module__.rpartition('.')[2]}.{kernel.__name__} | {kernel.threads} | "
            f"{code.registers} | {code.shared} | {total} | {count('FFMA')} | {multiplies} of {of} | "
            f"{count('LDG.E.128', 'LDG.E.64')} of {count('LDG')} | "
            f"{count('STG.E.128', 'STG.E.64')} of {count('STG')} | "
            f"{count('LDS')} | {count('STS')} | {count('SHFL')} | {count('MUFU')} |"
        )


HEAD = f"""# Predicted times of the CUDA kernels on an H200

**Predictions, not measurements.** No kernel has been run for this page: `bench/cuda_predictions.py` counts bytes,
flops and the instructions in the machine code for sm_90a (CUDA 13.0), and divides them by what an H200 can do:
{COPY / 1e12:g} TB/s for a copy, {FLOPS / 1e12:g} TFLOP/s of float32 outside the tensor cores
({CEILINGS["tf32"] / 1e12:g} TFLOP/s of tf32 and {CEILINGS["bfloat16"] / 1e12:g} of bfloat16 with them),
{ISSUED / 1e12:.3f} * 10^12 instructions of a warp a second. `make bench-cuda` measures; its rows are in bench/results.

A prediction is the larger of two times, and {1e6 * LAUNCH:g} us for each launch:

- *memory*: both operands read once and the result written once, at the rate of a copy;
- *instructions*: those of every warp, issued at one per scheduler and clock, the multiprocessors as evenly loaded as
  the number of blocks lets them be.

It leaves out what is not known without a GPU: waiting for memory and barriers that other warps do not cover, conflicts
of shared memory banks, operands read more than once from beyond the caches, the second-level cache's hits, and the
clock under load. So the times are lower bounds in kind; where a kernel has several ways to store a result, the longest
was counted. Rows of logits too long for the registers count as read twice, their instructions not. Batch {BATCH},
cross-entropy on at least 2^26 logits; layers without a line are done by the simple kernels.
The products on the tensor cores are not on this page: how busy their pipelines are is no matter of counting
instructions.

## Machine code

| kernel | threads | registers | shared bytes | instructions | FFMA | FFMA in the hot block | wide loads | wide stores \
| LDS | STS | SHFL | MUFU |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

TABLE = """
| layer | kernel | GFLOP | MB | memory ms | instructions ms | predicted ms | TFLOP/s | % of 67 | % of copy | bound |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""


def page(layers: Iterable[tuple[str, bool, tuple[str, ...], str]], tell: Callable[[str], object] = print) -> str:
    tables = list(rows(layers, tell))
    used: dict[Any, None] = {}
    for network, narrow, passes, dtype in layers:
        for case in map(for_gpu, cases.network(network)):
            if not narrow or not isinstance(case, ConvolutionCase) or case.groups > 1:
                for which in passes:
                    used.update(dict.fromkeys(launch.kernel for launch in launches(case, which, dtype)))
    parts = [HEAD, "\n".join(mixes(used)), "\n"]
    for title, lines in tables:
        parts += [f"\n## {title}\n", TABLE, "\n".join(lines), "\n"]
    return "".join(parts)


if __name__ == "__main__":
    os.environ.pop("NUMBA_ENABLE_CUDASIM", None)
    PAGE.write_text(page(LAYERS), encoding="utf-8")
    print(f"written: {PAGE}")
