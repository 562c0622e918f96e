"""Compile CUDA kernels without a GPU, exactly as a launch would, and read the machine code.

A launch of numba-cuda compiles LTO-IR for the device's architecture (sm_90a, not sm_90, on Hopper) and links it with
nvJitLink. `compile_for_launch` takes the same path with two private functions replaced, those that ask the device for
its architecture; numba-cuda is pinned. `inspect_code` reads registers, stack, shared and local memory, and the opcodes;
`record` keeps them for the tables of docs/figures/cuda-codegen.md (`codegen_table.py`).
"""

from __future__ import annotations

import collections
import contextlib
import csv
import functools
import io
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What a kernel must not use: memory of its own (spilled registers, arrays on the stack) and, unless it computes in
# float64, instructions of the float64 unit, which is slow or absent on most GPUs.
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")
FLOAT64 = re.compile(r"(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w*64H?|F2F\.F64|F2F\.\w+\.F64|F2I\.\S*F64|I2F\.F64)\b")

# Static shared memory a kernel may ask for on every architecture, and what Hopper and later reserve per block.
SHARED_LIMIT = 48 * 1024
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture."""

    registers: int
    stack: int
    shared: int
    local: int
    opcodes: collections.Counter[str]
    blocks: list[collections.Counter[str]]  # the same by basic block

    def share(self, pattern: str) -> tuple[int, int]:
        """Instructions whose opcode begins with `pattern`, and all instructions, of the block that has most of them.

        NOPs do not count: ptxas puts four behind every DFMA for sm_120, which has a float64 unit for two of 128 lanes,
        and they take the time of nothing else.
        """
        counts = [
            (sum(n for op, n in block.items() if op.startswith(pattern)), sum(block.values()) - block["NOP"])
            for block in self.blocks
        ]
        return max(counts)

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(n for opcode, n in self.opcodes.items() if pattern.match(opcode))

    def complaints(self, *, registers: int, float64: bool) -> list[str]:
        """What this kernel does that it must not; `registers` is its budget, `float64` says whether it may use them."""
        found = []
        if self.registers > registers:
            found.append(f"{self.registers} registers (budget {registers})")
        if self.stack or self.local:
            found.append(f"{self.stack} bytes of stack and {self.local} of local memory")
        if spills := self.count(LOCAL_MEMORY):
            found.append(f"{spills} loads and stores of local memory")
        if self.shared > SHARED_LIMIT + RESERVED_SHARED:
            found.append(f"{self.shared} bytes of shared memory")
        if not float64 and (leaks := sorted(op for op in self.opcodes if FLOAT64.match(op))):
            found.append(f"float64 instructions {', '.join(leaks)}")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the table
# ---------------------------------------------------------------------------------------------------------------------

# What a hot block is made of, and the instructions that tell how a kernel moves its data. 64 bits of float16 and
# bfloat16 are the four elements that 128 bits of float32 are.
MULTIPLIES = ("FFMA", "HMMA", "DFMA")
COUNTED = {
    "FFMA": ("FFMA",),
    "HMMA": ("HMMA",),
    "DFMA": ("DFMA",),
    "LDG": ("LDG.",),
    "LDG.128": ("LDG.E.128", "LDG.E.NA.128"),
    "LDG.64": ("LDG.E.64", "LDG.E.NA.64"),
    "LDGSTS": ("LDGSTS",),
    "LDS": ("LDS",),
    "LDS.128": ("LDS.128",),
    "LDSM": ("LDSM",),
    "STS": ("STS",),
    "STS.128": ("STS.128",),
    "STG": ("STG.",),
    "STG.128": ("STG.E.128",),
    "STG.64": ("STG.E.64",),
    "SHFL": ("SHFL",),
    "MUFU": ("MUFU",),
    "BAR": ("BAR",),
}
COLUMNS = (
    "kernel", "architecture", "threads", "registers", "budget", "static shared", "dynamic shared", "stack", "local",
    "spills", "instructions", "hot opcode", "hot count", "hot instructions", *COUNTED,
)  # fmt: skip


def record(
    kernel: str, architecture: tuple[int, int], threads: int, code: MachineCode, budget: int, dynamic_shared: int = 0
) -> None:
    """Append a row to the file that FASTCONV_CODEGEN_RECORD names, if it names one."""
    path = os.environ.get("FASTCONV_CODEGEN_RECORD")
    if not path:
        return
    hot = max(MULTIPLIES, key=code.share)
    reserved = RESERVED_SHARED if architecture >= (9, 0) else 0
    row = (
        kernel, "sm_{}{}".format(*architecture), threads, code.registers, budget, max(0, code.shared - reserved),
        dynamic_shared, code.stack, code.local, code.count(LOCAL_MEMORY), sum(code.opcodes.values()), hot,
        *code.share(hot),
        *(sum(n for op, n in code.opcodes.items() if op.startswith(those)) for those in COUNTED.values()),
    )  # fmt: skip
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


def _target(architecture: tuple[int, int]) -> tuple[int, int, str]:
    """What numba-cuda makes of a device's capability: the architecture-specific code from Hopper on."""
    return (*architecture, "a" if architecture >= (9, 0) else "")


@contextlib.contextmanager
def pretended_device(architecture: tuple[int, int]) -> Iterator[None]:
    """Let numba-cuda believe that the current device is of this compute capability."""
    from numba.cuda import codegen, dispatcher

    target = _target(architecture)
    asked, ensured = dispatcher.get_current_device, codegen.CUDACodeLibrary._ensure_cc
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=architecture)
    codegen.CUDACodeLibrary._ensure_cc = lambda self, cc: target if cc is None else cc
    try:
        yield
    finally:
        dispatcher.get_current_device, codegen.CUDACodeLibrary._ensure_cc = asked, ensured


@functools.lru_cache(maxsize=4)  # the tests of one kernel follow each other
def _lowered(kernel: Any, signature: tuple[Any, ...]) -> Any:
    """Numba's part of the work, which knows of no architecture and takes most of the time."""
    from numba.cuda import dispatcher

    with pretended_device((9, 0)):
        return dispatcher._Kernel(kernel.py_func, signature, **kernel.targetoptions)


def compile_for_launch(kernel: Any, signature: tuple[Any, ...], architecture: tuple[int, int]) -> tuple[Any, bytes]:
    """Return numba-cuda's compiled kernel and its cubin for a ``@cuda.jit`` function and the types of its arguments."""
    compiled = _lowered(kernel, tuple(signature))
    with pretended_device(architecture):
        return compiled, compiled._codelibrary.get_cubin(cc=_target(architecture)).code


def narrow_integers(compiled: Any) -> set[str]:
    """The integer types of a compiled kernel's variables that cannot count more than 2**31 elements.

    Unsigned types of up to 32 bits are not counted: the kernels handle the bits of floating-point numbers with them.
    """
    from numba import types

    kinds = compiled._type_annotation.typemap.values()
    integers = {k for k in kinds if isinstance(k, types.Integer) and not isinstance(k, types.Literal)}
    return {str(k) for k in integers if k.signed and k.bitwidth < 64}


def inspect_code(cubin: bytes) -> MachineCode:
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _run("cuobjdump", "-res-usage", cubin))
    if usage is None:
        raise RuntimeError("cuobjdump -res-usage says nothing of the kernel's resources")
    sass = _run("nvdisasm", "-c", cubin)
    return MachineCode(*map(int, usage.groups()), opcodes(sass), basic_blocks(sass))


def opcodes(sass: str) -> collections.Counter[str]:
    """Count the opcodes of a disassembly, leaving out predicates and operands."""
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    return collections.Counter(match[1] for match in map(instruction.search, sass.splitlines()) if match)


def basic_blocks(sass: str) -> list[collections.Counter[str]]:
    """The opcodes between one label or branch and the next."""
    parts = re.split(r"^\.L_\w+:.*$|^.*\b(?:BRA|EXIT|RET)\b.*$", sass, flags=re.MULTILINE)
    return [counted for counted in map(opcodes, parts) if counted]


def _run(tool: str, option: str, cubin: bytes) -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    path = find_nvidia_binary_utility(tool)
    if path is None:
        raise RuntimeError(f"{tool} is not installed (expected from the cuda-dev extra)")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
