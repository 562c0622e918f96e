"""The code-generation gate: every CUDA kernel, compiled as a launch would compile it, and its machine code inspected.

Needs the packages of the cuda-dev extra, but no GPU: ``make test-cuda``. sm_80 and sm_90a always, the others with the
slow tests. What is promised of each kernel: no spilled registers, no stack, no local memory, no float64 instruction
unless it computes in float64, 64-bit indices, and a budget of registers.
"""

import numpy as np
import pytest
from numba import types

import codegen
from fastconv.arguments import convolution_plan
from fastconv.cuda_kernels import _cuda, convolution, linear_cross_entropy, softmax_cross_entropy
from fastconv.cuda_kernels._cuda import DeviceArray, cuda
from fastconv.cuda_kernels.jit import ELEMENTS, Kernel, array_of
from helpers import output_of, run_python

pytestmark = pytest.mark.codegen

ARCHITECTURES = [
    (8, 0),
    (9, 0),
    *(pytest.param(cc, marks=pytest.mark.slow) for cc in [(7, 5), (8, 6), (8, 9), (10, 0), (12, 0)]),
]

# Registers per thread. Measured with the 13.0 toolkit over all architectures and types, rounded up to the next step
# at which fewer threads fit a multiprocessor (65536 registers: 64 let 1024 threads in, 128 let 512 in).
REGISTERS = {
    "forward_kernel": 80,
    "weight_grad_kernel": 80,
    "input_grad_kernel": 128,
    "bias_grad_kernel": 64,
    "cross_entropy_kernel": 96,
    "label_weight_kernel": 64,
    "narrow_kernel": 64,
    "partial_sum_kernel": 64,
    "sum_kernel": 64,
    "softmax_kernel": 80,
    "widen_kernel": 64,
}

KERNELS = {
    name: value
    for module in (convolution, linear_cross_entropy, softmax_cross_entropy)
    for name, value in vars(module).items()
    if isinstance(value, Kernel)
}


@pytest.fixture(autouse=True)
def compiler():
    if _cuda.SIMULATOR:
        pytest.fail("the simulator has no compiler: run this file with FASTCONV_TEST_GPU=1")
    if getattr(cuda, "implementation", None) != "NVIDIA":
        pytest.fail("the gate is for numba-cuda, which is not installed (expected the cuda-dev extra)")


def test_kernels_compile_without_what_numpy_removed():
    """As with NumPy 2.5, which has no `row_stack`: a process of its own, since the first compilation imports it."""
    code = """
        import numpy as np
        if vars(np).pop("row_stack", None):
            np.__all__.remove("row_stack")
        from numba import types
        from fastconv.cuda_kernels import convolution, linear_cross_entropy, softmax_cross_entropy
        from fastconv.cuda_kernels._cuda import cuda
        from fastconv.cuda_kernels.jit import ELEMENTS
        for kernel in (convolution.forward_kernel, linear_cross_entropy.widen_kernel, softmax_cross_entropy.sum_kernel):
            element = ELEMENTS["float32"]
            ptx, _ = cuda.compile(
                kernel.factory(element), types.void(*kernel.signature(element)), device=False, abi="numba", cc=(8, 0),
                output="ptx",
            )
            print(ptx.count(".entry"), hasattr(np, "row_stack"))
    """
    assert output_of(run_python(code)).splitlines() == ["1 False"] * 3


def name_of(architecture):
    return f"sm_{architecture[0]}{architecture[1]}"


def test_every_kernel_has_a_budget():
    assert REGISTERS.keys() == KERNELS.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name_of)
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name, dtype, architecture):
    kernel = KERNELS[name]
    compiled, cubin = codegen.compile_for_launch(kernel[dtype], kernel.signature(ELEMENTS[dtype]), architecture)
    code = codegen.inspect_code(cubin)
    codegen.record(f"{name}-{dtype}", architecture, _cuda.THREADS, code, REGISTERS[name])
    assert sum(code.opcodes.values()) > 100  # the disassembly was understood
    assert code.complaints(registers=REGISTERS[name], float64=dtype == "float64") == []
    assert codegen.narrow_integers(compiled) == set()


@pytest.mark.parametrize("labels", [types.int32, types.uint8, types.uint64], ids=str)
def test_labels_of_other_integer_types(labels):
    kernel, element = KERNELS["cross_entropy_kernel"], ELEMENTS["float32"]
    signature = list(kernel.signature(element))
    signature[1] = array_of(labels, 4)
    _, cubin = codegen.compile_for_launch(kernel["float32"], tuple(signature), (8, 0))
    code = codegen.inspect_code(cubin)
    assert code.complaints(registers=REGISTERS["cross_entropy_kernel"], float64=False) == []


def test_the_row_function_compiles_in_a_user_kernel():
    @cuda.jit
    def losses(logits, labels, grad, loss):
        i = cuda.grid(1)
        if i < logits.shape[0]:
            loss[i] = softmax_cross_entropy.softmax_cross_entropy_row(logits[i], labels[i], grad[i])

    matrix, vector = types.float32[:, ::1], types.float32[::1]
    _, cubin = codegen.compile_for_launch(losses, (matrix, types.int64[::1], matrix, vector), (9, 0))
    assert codegen.inspect_code(cubin).complaints(registers=64, float64=False) == []


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of a launch are those that were compiled for
# ---------------------------------------------------------------------------------------------------------------------


def device_array(*shape, dtype=np.float32):
    """An array of memory that is never touched, in Fortran order to have strides worth passing."""
    strides = np.dtype(dtype).itemsize * np.cumprod([1, *shape])[:-1]
    return DeviceArray(1 << 20, shape, [int(s) for s in strides], dtype, None)


def scratch(shape, dtype, like):
    """What stands in the place of `_cuda.scratch`: at another address than all other arrays."""
    return DeviceArray(1 << 30, shape, None, dtype, None)


@pytest.fixture
def launches(monkeypatch):
    """Record launches instead of making them."""
    recorded = []
    for module in (convolution, linear_cross_entropy, softmax_cross_entropy):
        monkeypatch.setattr(module, "launch", lambda *launch: recorded.append(launch))
    monkeypatch.setattr(convolution, "current_device", lambda: 0)
    for module in (convolution, softmax_cross_entropy):
        monkeypatch.setattr(module, "has_engine", lambda: False)
    monkeypatch.setattr(
        convolution, "upload", lambda *tables: tuple(device_array(len(t), dtype=t.dtype) for t in tables)
    )
    monkeypatch.setattr(softmax_cross_entropy, "scratch", scratch)
    monkeypatch.setattr(softmax_cross_entropy, "bad_label_record", lambda: device_array(1, dtype=np.int64))
    monkeypatch.setattr(linear_cross_entropy, "_one", lambda dtype, device: device_array(1, dtype=dtype))
    monkeypatch.setattr(linear_cross_entropy, "current_device", lambda: 0)
    monkeypatch.setattr(linear_cross_entropy, "empty", lambda shape, dtype, like: device_array(*shape, dtype=dtype))
    convolution._input_coordinates.cache_clear()
    convolution._padded_coordinates.cache_clear()
    yield recorded
    convolution._input_coordinates.cache_clear()
    convolution._padded_coordinates.cache_clear()


def launch_everything(dtype):
    x, w, y, b = (device_array(*s, dtype=dtype) for s in [(2, 4, 1, 5, 6), (6, 2, 1, 3, 3), (2, 6, 1, 3, 4), (6,)])
    geometry = convolution_plan("conv2d", 2, (2, 4, 5, 6), (6, 2, 3, 3), 1, 0, 1, 2, "zeros", "NCHW").geometry
    convolution.forward(geometry, x, w, b, True, "direct", None, y)
    convolution.forward(geometry, x, w, None, False, "direct", None, y)
    convolution.weight_grad(geometry, x, y, True, "direct", w)
    convolution.input_grad(geometry, w, y, b, False, False, "direct", x)
    convolution.bias_grad(y, False, b)
    z, labels = device_array(3, 5, dtype=dtype), device_array(3, dtype=np.int64)
    loss, rows, c = device_array(dtype=dtype), device_array(3, dtype=dtype), device_array(5, dtype=dtype)
    softmax_cross_entropy.cross_entropy(z, labels, c, None, -100, "mean", 0.1, 0.0, 0.0, loss, z, None)
    softmax_cross_entropy.cross_entropy(z, labels, None, rows, -100, "none", 0.0, 0.0, 0.0, rows, None, rows)
    softmax_cross_entropy.cross_entropy(z, z, None, 2.0, -100, "mean", 0.0, 0.1, 30.0, loss, None, None)
    softmax_cross_entropy.softmax(z, True, z)
    real = np.float64 if np.dtype(dtype).itemsize == 8 else np.float32
    linear_cross_entropy._widen(z, device_array(3, 5, dtype=real))
    linear_cross_entropy.deliver(device_array(3, dtype=real), rows)
    linear_cross_entropy.judge(labels, None, -100, 5, True, z)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_launches_pass_what_was_compiled(launches, dtype):
    """The types that numba-cuda finds in the arguments are the kernel's signature, and it can pass every argument."""
    import ml_dtypes

    launch_everything(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    seen = set()
    for kernel, elements, *arguments in launches:
        name = kernel.py_func.__name__
        assert isinstance(elements, int)
        matching = [d for d in ELEMENTS if KERNELS[name][d] is kernel]
        assert len(matching) == 1
        signature = KERNELS[name].signature(ELEMENTS[matching[0]])
        assert tuple(kernel.typeof_pyval(a) for a in arguments) == signature
        assert parameters(signature, arguments) == expected_parameters(arguments)
        seen.add(name)
    assert seen == KERNELS.keys()


def parameters(signature, arguments):
    """What numba-cuda hands to the driver."""
    from numba.cuda import dispatcher

    kernel = dispatcher._Kernel.__new__(dispatcher._Kernel)
    kernel.extensions = []
    made = []
    for kind, argument in zip(signature, arguments, strict=True):
        kernel._prepare_args(kind, argument, 0, [], made)
    return [getattr(p, "value", p) for p in made]


def expected_parameters(arguments):
    made = []
    for a in arguments:
        if isinstance(a, tuple):
            made += expected_parameters(a)
        elif isinstance(a, DeviceArray):
            made += [0, 0, a.size, a.dtype.itemsize, a.pointer, *a.shape, *a.strides]
        else:
            made.append(a)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The gate can fail
# ---------------------------------------------------------------------------------------------------------------------


def complaints_about(function, *signature):
    _, cubin = codegen.compile_for_launch(cuda.jit(function), signature, (8, 0))
    return " ".join(codegen.inspect_code(cubin).complaints(registers=64, float64=False))


def test_the_gate_passes_a_clean_kernel():
    def clean(x, y):
        i = cuda.grid(1)
        if i < x.size:
            y[i] = x[i] * np.float32(0.5) + np.float32(1)

    assert complaints_about(clean, types.float32[:], types.float32[:]) == ""


def test_the_gate_finds_a_float64_sum():
    def leak(x, y):
        total = 0.0
        for i in range(x.size):
            total += x[i]
        y[0] = total

    assert "float64 instructions DADD" in complaints_about(leak, types.float32[:], types.float32[:])


def test_the_gate_finds_a_float64_constant():
    def leak(x, y):
        i = cuda.grid(1)
        if i < x.size:
            y[i] = x[i] * 0.5 + 1

    assert "float64 instructions" in complaints_about(leak, types.float32[:], types.float32[:])


def test_the_gate_finds_an_array_that_leaves_the_registers():
    def spill(x, y):
        kept = cuda.local.array(256, types.float32)
        for i in range(256):
            kept[i] = x[i]
        for i in range(x.size):
            y[i] = kept[np.int64(x[i])]

    found = complaints_about(spill, types.float32[:], types.float32[:])
    assert "bytes of stack" in found
    assert "loads and stores of local memory" in found


def test_the_gate_finds_a_kernel_over_its_registers():
    kernel = KERNELS["forward_kernel"]
    _, cubin = codegen.compile_for_launch(kernel["float32"], kernel.signature(ELEMENTS["float32"]), (8, 0))
    assert "registers (budget 16)" in " ".join(codegen.inspect_code(cubin).complaints(registers=16, float64=False))


def test_the_gate_finds_an_index_of_32_bits():
    def narrow(x):
        i = np.int32(cuda.grid(1))
        if i < x.size:
            x[i] = i

    compiled, _ = codegen.compile_for_launch(cuda.jit(narrow), (types.float32[:],), (8, 0))
    assert codegen.narrow_integers(compiled) == {"int32"}
