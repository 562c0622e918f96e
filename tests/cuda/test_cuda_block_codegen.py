"""The code-generation gate for the kernels whose threads work together: see `test_cuda_codegen.py`.

Beyond what is promised there: the instructions that make the kernel fast are in its machine code (128-bit loads,
asynchronous copies, tensor cores), and the multiplications' share of the innermost loop.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import test_cuda_codegen
from test_cuda_codegen import (  # noqa: F401
    compiler,
    device_array,
    expected_parameters,
    name_of,
    parameters,
    scratch,
)

import codegen
import codegen_table
from fastconv.cuda_kernels import (
    _cuda,
    channel_sums,
    depthwise,
    depthwise_kernels,
    implicit_gemm,
    implicit_gemm_weight_grad,
    partial_sums,
    position_sums,
    row_groups,
    softmax_rows,
    tiles,
)
from fastconv.cuda_kernels._cuda import cuda
from fastconv.cuda_kernels.jit import ELEMENTS, BlockKernel

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
    float64: bool = False  # may it use the float64 unit?
    quick: bool = True  # is it compiled in every run of the gate, or in the slow tests?
    # Registers for sm_100 and sm_120. NVVM has a newer LLVM for them, which holds more of what is fetched at one
    # time; the innermost loops are the same, and bounds that bring the numbers down spill (7 x 7 depthwise: 16 bytes).
    blackwell: int | None = None

    def registers_for(self, architecture: tuple[int, int]) -> int:
        return self.blackwell if self.blackwell and architecture >= (10, 0) else self.registers


def row_budgets():
    once, twice = {"LDG.E.128": 1, "STG.E.128": 1, "SHFL": 10}, {"LDG.E.128": 2, "STG.E.128": 1, "SHFL": 10}
    for dtype, vectors in row_groups.VECTORS.items():
        groups = row_groups.GROUPS[vectors.width]
        chosen = [groups[1], groups[3], groups[-1]] if dtype == "float32" else [groups[3]]
        for group in chosen:
            kernel = softmax_rows.cross_entropy_row_kernel(dtype, group)
            budget = min(64 if vectors.width == 8 else 80, 65536 // group.block)
            yield (
                f"rows-{dtype}-{group.threads}x{group.vectors}",
                Budget(kernel, budget, once | {"LDG.E.128": group.vectors}),
            )
        for group in (row_groups.SHORT, row_groups.LONG):
            kernel = softmax_rows.cross_entropy_row_kernel(dtype, group)
            yield f"rows-{dtype}-{group.threads}-twice", Budget(kernel, 96, twice)
        for log in (False, True):
            kernel = softmax_rows.softmax_row_kernel(dtype, groups[3], log)
            yield f"{'log_' * log}softmax-{dtype}", Budget(kernel, 80, once | {"LDG.E.128": groups[3].vectors})
    kernel = softmax_rows.softmax_row_kernel("float32", row_groups.LONG, False)
    yield "softmax-float32-twice", Budget(kernel, 64, twice)
    for dtype in ELEMENTS:  # one block of 1024 threads: 64 registers each
        wide = dtype == "float64"
        reduction = {"SHFL": 20 if wide else 10, "BAR": 1}
        yield f"add_values-{dtype}", Budget(position_sums.add_values_kernel(dtype), 64, reduction, float64=wide)
        kernel = position_sums.add_label_weights_kernel(dtype)
        yield f"add_label_weights-{dtype}", Budget(kernel, 64, reduction, float64=wide)


def product_budgets():
    """Registers: what fits two blocks of the largest tile into a multiprocessor, three of the next."""
    registers = {(8, 8, 256): 128, (8, 8, 128): 168, (4, 8, 128): 128, (4, 4, 256): 64, (4, 4, 128): 80}
    for tile in tiles.TILES:
        budget = registers[tile.thread_rows, tile.thread_columns, tile.threads]
        terms = tile.thread_rows * tile.thread_columns * tiles.DEPTH
        required = {"LDS.128": 2 * (tile.thread_rows + tile.thread_columns), "FFMA": terms, "STG.E.128": 1}
        hot = ("FFMA", {512: 0.80, 256: 0.75, 128: 0.66}[terms])
        name = f"{tile.rows}x{tile.columns}"
        gather, unchecked = (implicit_gemm.gather_kernel("float32", tile, checked) for checked in (True, False))
        yield f"gather-{name}", Budget(gather, budget, required, hot)
        yield f"gather-unchecked-{name}", Budget(unchecked, budget, required, hot)
        del required["STG.E.128"]
        yield f"weight-{name}", Budget(implicit_gemm_weight_grad.weight_kernel("float32", tile), budget, required, hot)


def double_budgets():
    registers = {(4, 8, 256): 168, (4, 4, 256): 80, (4, 4, 128): 128}
    for tile in tiles.WIDE_TILES:
        budget = registers[tile.thread_rows, tile.thread_columns, tile.threads]
        terms = tile.thread_rows * tile.thread_columns * tiles.DEPTH
        required = {"LDS.128": 4 * (tile.thread_rows + tile.thread_columns), "DFMA": terms}
        hot = ("DFMA", {256: 0.65, 128: 0.55}[terms])
        kernels = {
            "gather": implicit_gemm.gather_kernel("float64", tile, True),
            "weight": implicit_gemm_weight_grad.weight_kernel("float64", tile),
        }
        for name, kernel in kernels.items():
            name = f"{name}-float64-{tile.rows}x{tile.columns}"
            yield (
                name,
                Budget(
                    kernel, budget, required, hot, float64=True, quick=tile == tiles.WIDE_TILES[0],
                    blackwell=max(budget, 96),  # measured: 84 of a 64x64 tile, which lets two blocks of 256 threads in
                ),
            )  # fmt: skip


def tensor_budgets():
    """The innermost loop of the tensor cores: nothing but the instruction, the loads of its operands and addresses.

    Where operands pass through registers the compiler puts some of the fetching there; where all are copied, which of
    the three stages is next (the loop around it is the shorter for it: 102 instructions of the 64 x 64 tile, which were
    112 with two stages and all of that outside). The weight gradient takes both
    that way, and its largest tile leaves no room for a second block. float16 has the code of bfloat16: one tile of it
    is enough.
    """
    instructions = {"tf32": "HMMA.1688.F32.TF32", "float16": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16"}
    registers = {(8, 8, 256): 128, (8, 8, 128): 184, (4, 8, 128): 128, (4, 4, 64): 128}
    # where 32 terms of 16 bits pass through registers, measured: up to 222, which lets two blocks in as 184 do; up to
    # 168, which lets three in (four would spill)
    wide = registers | {(8, 8, 128): 224, (4, 8, 128): 168}
    blackwell = wide
    for kind, instruction in instructions.items():
        for tile in tiles.TENSOR_TILES[: 1 if kind == "float16" else None]:
            largest = tile == tiles.TENSOR_TILES[0]
            shape = tile.thread_rows, tile.thread_columns, tile.threads
            budget = (registers if kind == "tf32" else wide)[shape]
            sums = tile.thread_rows * tile.thread_columns // 2  # of a thread, in the instructions of two parts
            fetched = tile.rows * tiles.CHUNKS // tile.threads, tile.columns * tiles.CHUNKS // tile.threads
            share = {32: 0.42, 16: 0.36, 8: 0.22}[sums]
            name = f"{kind}-{tile.rows}x{tile.columns}"
            for rows_together in (False, True):
                operands = tile.thread_rows, tile.thread_columns
                tall, short = operands[::-1] if rows_together else operands
                required = {instruction: sums, "LDSM.16.M88.4": tall + short // 2}
                store = {"STG.E.64" if kind == "tf32" else "STG.E": 1}
                for chunked in (False, True):
                    copies = {"LDGSTS.E.BYPASS": 2 * (fetched[0] + chunked * fetched[1]), "LDGDEPBAR": 2}
                    yield (
                        f"gather-{name}{'-chunked' * chunked}{'-rows' * rows_together}",
                        Budget(
                            implicit_gemm.gather_kernel(kind, tile, True, chunked, rows_together), budget,
                            required | copies | store, ("HMMA", (0.9 if chunked else 0.8) * share),
                            quick=largest and chunked == rows_together and (chunked or kind != "float16"),
                            blackwell=blackwell[shape],
                        ),
                    )  # fmt: skip
            required = {instruction: sums, "LDSM.16.M88.4": tile.thread_rows + tile.thread_columns // 2}
            yield (
                f"weight-{name}",
                Budget(
                    implicit_gemm_weight_grad.weight_kernel(kind, tile), max(budget, 192 if sums == 32 else 0),
                    required | {"STS.128": 2 * sum(fetched)}, ("HMMA", 0.8 * share),
                    quick=largest and kind != "float16", blackwell=max(blackwell[shape], 192 if sums == 32 else 0),
                ),
            )  # fmt: skip


def depthwise_patch(dtype, taps, rows, columns, vector, stride=1, inverse=False, last=False):
    """As `depthwise` makes them for filters of an odd size, padded by half of it."""
    height, width = (
        depthwise_kernels.Axis.gather(inverse, k, results, stride if k > 1 else 1, 1, k // 2, v)
        for k, results, v in zip(taps, (rows, columns), (1, vector), strict=True)
    )
    return depthwise_kernels.Patch(dtype, vector, last, False, height, width)


def depthwise_budgets():
    """Of each kernel its multiply-adds, all unrolled, and the loads and stores of whole vectors."""
    wide = {"LDG.E.128": 4, "STG.E.128": 4}
    patches = {
        "3x3": (("float32", (3, 3), 4, 4, 4), 64, wide | {"FFMA": 144}),
        "3x3-stride2": (("float32", (3, 3), 2, 4, 4, 2), 80, {"LDG.E.128": 10, "STG.E.128": 2, "FFMA": 72}),
        "7x7": (("float32", (7, 7), 4, 4, 4), 128, {"LDG.E.128": 30, "STG.E.128": 4, "FFMA": 784}),
        "1x4": (("float32", (1, 4), 1, 8, 4), 64, {"LDG.E.128": 2, "STG.E.128": 2, "FFMA": 32}),
        "3x3-channels_last": (("float32", (3, 3), 4, 4, 1, 1, False, True), 80, {"FFMA": 144}),
        "3x3-bfloat16": (("bfloat16", (3, 3), 4, 4, 4), 64, {"LDG.E.64": 4, "STG.E.64": 4, "FFMA": 144}),
        "3x3-float16": (("float16", (3, 3), 4, 4, 4), 64, {"LDG.E.64": 4, "STG.E.64": 4, "FFMA": 144}),
        "input-3x3-stride2": (("float32", (3, 3), 4, 8, 4, 2, True), 80, {"LDG.E.128": 3, "STG.E.128": 8, "FFMA": 72}),
    }  # fmt: skip
    for name, (patch, registers, required) in patches.items():
        kernel = depthwise_kernels.gather_kernel(depthwise_patch(*patch))
        yield f"depthwise-{name}", Budget(kernel, registers, required, blackwell=192 if name == "7x7" else None)
    patches = {
        "3x3": (("float32", (3, 3), 4, 4, 4), 64, {"LDG.E.128": 10, "FFMA": 144, "SHFL": 45}),
        "7x7": (("float32", (7, 7), 4, 4, 4), 128, {"LDG.E.128": 34, "FFMA": 784, "SHFL": 245}),
        "3x3-bfloat16": (("bfloat16", (3, 3), 4, 4, 4), 64, {"LDG.E.64": 10, "FFMA": 144, "SHFL": 45}),
        "3x3-channels_last": (("float32", (3, 3), 4, 4, 1, 1, False, True), 64, {"FFMA": 144}),
    }
    for name, (patch, registers, required) in patches.items():
        kernel = depthwise_kernels.weight_kernel(depthwise_patch(*patch))
        yield f"depthwise-weight-{name}", Budget(kernel, registers, required)


def channel_sum_budgets():
    for dtype in ELEMENTS:
        wide = dtype == "float64"
        for lanes, required in [(1, {"SHFL": 10 if wide else 5, "BAR": 1}), (32, {"BAR": 1})]:
            kernel = channel_sums.bias_grad_kernel(dtype, lanes)
            name = f"channel_sums-{dtype}{'-channels_last' * (lanes > 1)}"
            yield name, Budget(kernel, 64, required, float64=wide)


BUDGETS = dict(
    [
        *row_budgets(), *product_budgets(), *double_budgets(), *tensor_budgets(), *depthwise_budgets(),
        *channel_sum_budgets(),
    ]
)  # fmt: skip


def check(budget: Budget, architecture, name: str = "") -> codegen.MachineCode:
    _, cubin = codegen.compile_for_launch(budget.kernel.compiled, budget.kernel.signature, architecture)
    code = codegen.inspect_code(cubin)
    if name:
        codegen.record(name, architecture, budget.kernel.threads, code, budget.registers_for(architecture))
    assert code.complaints(registers=budget.registers_for(architecture), float64=budget.float64) == []
    for opcode, least in budget.required.items():
        assert code.count(re.compile(re.escape(opcode))) >= least, f"{opcode}: {code.opcodes}"
    if budget.hot is not None:
        opcode, share = budget.hot
        count, total = code.share(opcode)
        assert count >= share * total, f"{count} {opcode} of {total} instructions"
    return code


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name_of)
@pytest.mark.parametrize(
    "name", [name if budget.quick else pytest.param(name, marks=pytest.mark.slow) for name, budget in BUDGETS.items()]
)
def test_machine_code(name, architecture):
    check(BUDGETS[name], architecture, name)


@pytest.mark.parametrize("dtype", row_groups.VECTORS)
def test_launches_of_rows_pass_what_was_compiled(dtype, monkeypatch):
    import ml_dtypes
    import numpy as np

    launches = []
    for module in (softmax_rows, position_sums):
        monkeypatch.setattr(module, "launch_blocks", lambda *launch: launches.append(launch))
    monkeypatch.setattr(position_sums, "scratch", scratch)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    z = device_array(40, 1, 1, 1, 3, dtype=kind).transpose((4, 0, 1, 2, 3))
    row, none5 = device_array(3, 1, 1, 1, dtype=kind), _cuda.DeviceArray(0, (0,) * 5, None, kind, None)
    none, real = _cuda.DeviceArray(0, (0,), None, kind, None), _cuda.DeviceArray(0, (0,), None, np.float32, None)
    numbers = [np.float32(1)] * 4
    labels = device_array(3, 1, 1, 1, dtype=np.int32)
    arguments = (labels, none5, none, row, -100, np.float32(1), real, *numbers[:1], np.float32(0), *numbers[:2])
    assert softmax_rows.cross_entropy_rows(z, *arguments, row, real, z, row, device_array(1, dtype=np.int64), 0)
    assert softmax_rows.softmax_rows(z, True, z)
    position_sums.add_values(device_array(70000, dtype=np.float32), real, 1.0, device_array(1, dtype=kind))
    assert position_sums.add_label_weights(labels, none, -100, 3, device_array(1, dtype=np.float32))
    assert len(launches) == 5
    for kernel, _, *arguments in launches:
        assert tuple(cuda.jit(kernel.function).typeof_pyval(a) for a in arguments) == kernel.signature
        assert parameters(kernel.signature, arguments) == expected_parameters(arguments)


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("kind", tiles.ARITHMETIC)
def test_launches_of_products_pass_what_was_compiled(kind, last, monkeypatch):
    import ml_dtypes
    import numpy as np

    from fastconv.arguments import convolution_plan

    dtype = np.dtype({"tf32": "float32", "bfloat16": ml_dtypes.bfloat16}.get(kind, kind))
    launches, simple = [], []
    for module in (implicit_gemm, implicit_gemm_weight_grad):
        monkeypatch.setattr(module, "launch_blocks", lambda *launch: launches.append(launch))
        monkeypatch.setattr(module, "launch", lambda *launch: simple.append(launch))
        monkeypatch.setattr(module, "upload", lambda *t: tuple(device_array(len(a), dtype=a.dtype) for a in t))
    monkeypatch.setattr(implicit_gemm, "current_device", lambda: 0)
    monkeypatch.setattr(implicit_gemm, "get_float32_precision", lambda: "tf32" if kind == "tf32" else "ieee")
    for module in (implicit_gemm, partial_sums):
        monkeypatch.setattr(module, "scratch", scratch)
    implicit_gemm._plans.cache_clear()
    implicit_gemm_weight_grad.weight_plan.cache_clear()

    def image(n, c, *space):
        array = device_array(*((c, *space[::-1], n) if last else (*space[::-1], c, n)), dtype=dtype)
        return array.transpose((4, 0, 3, 2, 1) if last else (4, 3, 2, 1, 0))

    x, y = image(2, 16, 1, 5, 6), image(2, 16, 1, 3, 2)
    w, b = (device_array(*s, dtype=dtype) for s in [(16, 8, 1, 3, 3), (16,)])
    geometry = convolution_plan("conv2d", 2, (2, 16, 5, 6), (16, 8, 3, 3), (1, 2), 0, 1, 2, "zeros", "NCHW").geometry
    assert implicit_gemm.forward(geometry, x, w, b, True, y)
    assert implicit_gemm.input_grad(geometry, w, y, b, False, True, x)
    assert implicit_gemm.weight_grad(geometry, x, y, True, w)
    implicit_gemm._plans.cache_clear()
    implicit_gemm_weight_grad.weight_plan.cache_clear()
    assert len(launches) == 4
    for kernel, _, *arguments in launches:
        assert tuple(cuda.jit(kernel.function).typeof_pyval(a) for a in arguments) == kernel.signature
        made = [getattr(p, "value", p) for p in parameters(kernel.signature, arguments)]
        assert made == expected_parameters(arguments)
    assert len(simple) == (4 if tiles.ARITHMETIC[kind].tensor else 1)  # the weights in order, the sum of parts
    for (kernel, _, *arguments), made in zip(
        simple, [*[implicit_gemm.order_kernel] * (len(simple) - 1), partial_sums.add_parts_kernel], strict=True
    ):
        signature = made.signature(ELEMENTS[dtype.name])
        assert kernel is made[dtype]
        assert tuple(kernel.typeof_pyval(a) for a in arguments) == signature


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_launches_of_channel_sums_pass_what_was_compiled(dtype, last, monkeypatch):
    import ml_dtypes
    import numpy as np

    launches = []
    monkeypatch.setattr(channel_sums, "launch_blocks", lambda *launch: launches.append(launch))
    monkeypatch.setattr(partial_sums, "scratch", scratch)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = device_array(*((8, 5, 4, 1, 2) if last else (5, 4, 1, 8, 2)), dtype=kind)
    array = array.transpose((4, 0, 3, 2, 1) if last else (4, 3, 2, 1, 0))
    monkeypatch.setattr(channel_sums, "launch", lambda *launch: None)
    assert channel_sums.bias_grad(array, True, device_array(8, dtype=kind))
    ((kernel, _, *arguments),) = launches
    assert kernel is channel_sums.bias_grad_kernel(dtype, 32 if last else 1)
    assert tuple(cuda.jit(kernel.function).typeof_pyval(a) for a in arguments) == kernel.signature
    made = [getattr(p, "value", p) for p in parameters(kernel.signature, arguments)]
    assert made == expected_parameters(arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_launches_of_depthwise_pass_what_was_compiled(dtype, monkeypatch):
    import ml_dtypes
    import numpy as np

    from fastconv.arguments import convolution_plan

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    launches, sums = [], []
    monkeypatch.setattr(depthwise, "launch_blocks", lambda *launch: launches.append(launch))
    monkeypatch.setattr(depthwise, "launch", lambda *launch: sums.append(launch))
    monkeypatch.setattr(partial_sums, "scratch", scratch)
    x, w, y, b = (device_array(*s, dtype=kind) for s in [(2, 8, 1, 8, 8), (8, 1, 1, 3, 3), (2, 8, 1, 8, 8), (8,)])
    geometry = convolution_plan("conv2d", 2, (2, 8, 8, 8), (8, 1, 3, 3), 1, 1, 1, 8, "zeros", "NCHW").geometry
    assert depthwise.forward(geometry, x, w, b, True, y)
    assert depthwise.input_grad(geometry, w, y, b, False, True, x)
    assert depthwise.weight_grad(geometry, x, y, True, w)
    assert len(launches) == 3
    for kernel, _, *arguments in launches:
        assert tuple(cuda.jit(kernel.function).typeof_pyval(a) for a in arguments) == kernel.signature
        made = [getattr(p, "value", p) for p in parameters(kernel.signature, arguments)]
        assert made == expected_parameters(arguments)
    ((kernel, elements, *arguments),) = sums
    assert elements == w.size
    signature = partial_sums.add_parts_kernel.signature(ELEMENTS[dtype])
    assert tuple(kernel.typeof_pyval(a) for a in arguments) == signature


SIMPLE_TYPES = ["float32", "float16", "bfloat16"]
SIMPLE = {"parts": partial_sums.add_parts_kernel, "order": implicit_gemm.order_kernel}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name_of)
@pytest.mark.parametrize("dtype", SIMPLE_TYPES)
@pytest.mark.parametrize("name", SIMPLE)
def test_machine_code_of_simple_kernels(name, dtype, architecture):
    kernel = SIMPLE[name]
    _, cubin = codegen.compile_for_launch(kernel[dtype], kernel.signature(ELEMENTS[dtype]), architecture)
    code = codegen.inspect_code(cubin)
    codegen.record(f"{name}-{dtype}", architecture, _cuda.THREADS, code, 80)
    assert code.complaints(registers=80, float64=False) == []


def test_the_page_has_every_kernel_and_architecture():
    """docs/figures/cuda-codegen.md is made of rows that the gate has recorded, of all kernels that there are."""
    rows = codegen_table.read()
    blocks = [*BUDGETS, *(f"{name}-{dtype}" for name in SIMPLE for dtype in SIMPLE_TYPES)]
    simple = [f"{name}-{dtype}" for name in test_cuda_codegen.KERNELS for dtype in ELEMENTS]
    kernels = [(blocks, ARCHITECTURES), (simple, test_cuda_codegen.ARCHITECTURES)]
    assert {(row["kernel"], row["architecture"]) for row in rows} == {
        (name, name_of(getattr(architecture, "values", [architecture])[0]))
        for names, architectures in kernels
        for name in names
        for architecture in architectures
    }


def test_machine_code_of_the_measured_peak():
    """Nothing but multiply-adds in the loop of what the benchmarks of a GPU take for its peak."""
    from numba import types

    from fastconv.bench.cuda import clock

    real = types.float32
    kernel = cuda.jit(clock.multiply_add_kernel(cuda, "float32"))
    _, cubin = codegen.compile_for_launch(kernel, (types.Array(real, 1, "C"), real, real), (9, 0))
    code = codegen.inspect_code(cubin)
    assert code.complaints(registers=64, float64=False) == []
    count, total = code.share("FFMA")
    assert count >= 64
    assert count >= 0.9 * total


def test_the_gate_finds_a_missing_instruction():
    budget = BUDGETS["softmax-float32"]._replace(required={"LDGSTS": 1})
    with pytest.raises(AssertionError, match="LDGSTS"):
        check(budget, (8, 0))


def test_the_gate_finds_a_loop_of_too_few_multiplications():
    with pytest.raises(AssertionError, match="instructions"):
        check(BUDGETS["softmax-float32"]._replace(hot=("FFMA", 0.9)), (8, 0))
