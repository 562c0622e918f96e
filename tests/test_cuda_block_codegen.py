"""The code-generation gate for the kernels whose threads work together: see `test_cuda_codegen.py`.

Beyond what is promised there: the instructions that make the kernel fast are in its machine code (128-bit loads,
asynchronous copies, tensor cores), and the multiplications' share of the innermost loop.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from fastconv.cuda_kernels import _cuda, softmax_rows
from fastconv.cuda_kernels._cuda import cuda
from fastconv.cuda_kernels.jit import BlockKernel

import codegen
from test_cuda_codegen import compiler, device_array, expected_parameters, name_of, parameters  # noqa: F401

pytestmark = pytest.mark.codegen

# The kernels need sm_80: older devices have the simple ones.
ARCHITECTURES = [
    (8, 0),
    (9, 0),
    *(pytest.param(cc, marks=pytest.mark.slow) for cc in [(8, 6), (8, 9), (10, 0), (12, 0)]),
]


class Budget(NamedTuple):
    kernel: BlockKernel
    registers: int
    required: dict[str, int]  # opcodes, and how many there must be at least
    hot: tuple[str, float] | None = None  # opcode, and its share of the block that has most of it


def row_budgets():
    once, twice = {"LDG.E.128": 1, "STG.E.128": 1, "SHFL": 10}, {"LDG.E.128": 2, "STG.E.128": 1, "SHFL": 10}
    for dtype, vectors in softmax_rows.VECTORS.items():
        groups = softmax_rows.GROUPS[vectors.width]
        chosen = [groups[1], groups[3], groups[-1]] if dtype == "float32" else [groups[3]]
        for group in chosen:
            kernel = softmax_rows.cross_entropy_row_kernel(dtype, group)
            budget = min(80, 65536 // group.block)
            yield (
                f"rows-{dtype}-{group.threads}x{group.vectors}",
                Budget(kernel, budget, once | {"LDG.E.128": group.vectors}),
            )
        for group in (softmax_rows.SHORT, softmax_rows.LONG):
            kernel = softmax_rows.cross_entropy_row_kernel(dtype, group)
            yield f"rows-{dtype}-{group.threads}-twice", Budget(kernel, 96, twice)
        for log in (False, True):
            kernel = softmax_rows.softmax_row_kernel(dtype, groups[3], log)
            yield f"{'log_' * log}softmax-{dtype}", Budget(kernel, 80, once | {"LDG.E.128": groups[3].vectors})
    kernel = softmax_rows.softmax_row_kernel("float32", softmax_rows.LONG, False)
    yield "softmax-float32-twice", Budget(kernel, 64, twice)


BUDGETS = dict(row_budgets())


def check(budget: Budget, architecture) -> codegen.MachineCode:
    _, cubin = codegen.compile_for_launch(budget.kernel.compiled, budget.kernel.signature, architecture)
    code = codegen.inspect_code(cubin)
    assert code.complaints(registers=budget.registers, float64=False) == []
    for opcode, least in budget.required.items():
        assert code.count(re.compile(re.escape(opcode))) >= least, f"{opcode}: {code.opcodes}"
    if budget.hot is not None:
        opcode, share = budget.hot
        count, total = code.share(opcode)
        assert count >= share * total, f"{count} {opcode} of {total} instructions"
    return code


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name_of)
@pytest.mark.parametrize("name", BUDGETS)
def test_machine_code(name, architecture):
    check(BUDGETS[name], architecture)


@pytest.mark.parametrize("dtype", softmax_rows.VECTORS)
def test_launches_of_rows_pass_what_was_compiled(dtype, monkeypatch):
    import ml_dtypes
    import numpy as np

    launches = []
    monkeypatch.setattr(softmax_rows, "launch_blocks", lambda *launch: launches.append(launch))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    z = device_array(40, 1, 1, 1, 3, dtype=kind).transpose((4, 0, 1, 2, 3))
    row, none5 = device_array(3, 1, 1, 1, dtype=kind), _cuda.DeviceArray(0, (0,) * 5, None, kind, None)
    none, real = _cuda.DeviceArray(0, (0,), None, kind, None), _cuda.DeviceArray(0, (0,), None, np.float32, None)
    numbers = [np.float32(1)] * 4
    labels = device_array(3, 1, 1, 1, dtype=np.int32)
    arguments = (labels, none5, none, row, -100, np.float32(1), real, *numbers[:1], np.float32(0), *numbers[:2])
    assert softmax_rows.cross_entropy_rows(z, *arguments, row, real, z, row)
    assert softmax_rows.softmax_rows(z, True, z)
    assert len(launches) == 2
    for kernel, _, *arguments in launches:
        assert tuple(cuda.jit(kernel.function).typeof_pyval(a) for a in arguments) == kernel.signature
        assert parameters(kernel.signature, arguments) == expected_parameters(arguments)


def test_the_gate_finds_a_missing_instruction():
    budget = BUDGETS["softmax-float32"]._replace(required={"LDGSTS": 1})
    with pytest.raises(AssertionError, match="LDGSTS"):
        check(budget, (8, 0))


def test_the_gate_finds_a_loop_of_too_few_multiplications():
    with pytest.raises(AssertionError, match="instructions"):
        check(BUDGETS["softmax-float32"]._replace(hot=("FFMA", 0.9)), (8, 0))
