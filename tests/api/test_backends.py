"""Which backend runs: the argument, the choice of the thread or task, the environment, and where the arrays live."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from conftest import ON_GPU

import fastconv as fc
from fastconv.backends import _chosen
from fastconv.cpu import convolution as on_cpu
from fastconv.cuda_kernels import convolution as on_cuda
from fastconv.cuda_kernels._cuda import cuda
from helpers import DTYPES, integers, output_of, run_python

X, W = np.ones((1, 1, 3), np.float32), np.ones((1, 1, 2), np.float32)
ONE_OF = "(expected one of 'auto', 'cpu', 'cuda')"


@pytest.fixture
def ran(monkeypatch):
    """The backends of the forward passes so far."""
    calls = []
    for name, module in (("cpu", on_cpu), ("cuda", on_cuda)):

        def forward(*arguments, name=name, forward=module.forward):
            calls.append(name)
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", forward)
    return calls


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    """Each test begins, and leaves the next one, without a choice."""
    monkeypatch.delenv("FASTCONV_BACKEND", raising=False)
    token = _chosen.set(None)
    yield
    _chosen.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def test_backends():
    assert fc.backends() == ("cpu", "cuda")


def test_argument_over_choice_over_environment(ran, monkeypatch):
    fc.conv1d(X, W)
    assert ran == ["cpu"], "NumPy arrays live on the CPU"
    monkeypatch.setenv("FASTCONV_BACKEND", "cuda")
    fc.conv1d(X, W)
    assert ran[1:] == ["cuda"]
    fc.set_backend("cpu")
    fc.conv1d(X, W)
    assert ran[2:] == ["cpu"]
    fc.conv1d(X, W, backend="cuda")
    assert ran[3:] == ["cuda"]
    fc.set_backend("auto")  # where the arrays live, whatever the environment says
    fc.conv1d(X, W)
    assert ran[4:] == ["cpu"]
    fc.conv1d(X, W, backend="auto")
    assert ran[5:] == ["cpu"]
    monkeypatch.setenv("FASTCONV_BACKEND", "")
    _chosen.set(None)
    fc.conv1d(X, W)
    assert ran[6:] == ["cpu"], "an empty variable is none"


def test_use_backend(ran):
    with fc.use_backend("cuda"):
        fc.conv1d(X, W)
        with fc.use_backend("cpu"):
            fc.conv1d(X, W)
        fc.conv1d(X, W)
    fc.conv1d(X, W)
    assert ran == ["cuda", "cpu", "cuda", "cpu"]
    with pytest.raises(KeyError), fc.use_backend("cuda"):
        raise KeyError
    fc.conv1d(X, W)
    assert ran[4:] == ["cpu"], "an error ends the block like any other way out"


def test_choice_of_a_thread_is_its_own(ran):
    fc.set_backend("cuda")
    thread = threading.Thread(target=lambda: (fc.conv1d(X, W), fc.set_backend("cuda"), fc.conv1d(X, W)))
    thread.start()
    thread.join()
    assert ran == ["cpu", "cuda"], "a thread begins without a choice"
    other = threading.Thread(target=lambda: fc.set_backend("cpu"))
    other.start()
    other.join()
    fc.conv1d(X, W)
    assert ran[2:] == ["cuda"]


def test_choice_of_a_task_is_its_own(ran):
    async def task(name, turn, other):
        with fc.use_backend(name):
            for _ in range(2):
                turn.set()
                await other.wait()  # both are inside their blocks
                fc.conv1d(X, W)
                await asyncio.sleep(0)

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("cpu", first, second), task("cuda", second, first))
        fc.conv1d(X, W)

    asyncio.run(both())
    assert sorted(ran[:4]) == ["cpu", "cpu", "cuda", "cuda"]
    assert ran[0] != ran[1], "the tasks did not take turns"
    assert ran[4:] == ["cpu"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fc.set_backend("gpu"), f"set_backend: backend is 'gpu' {ONE_OF}"),
        (lambda: fc.set_backend(None), f"set_backend: backend is None {ONE_OF}"),
        (lambda: fc.use_backend("CUDA").__enter__(), f"use_backend: backend is 'CUDA' {ONE_OF}"),
        (lambda: fc.conv1d(X, W, backend="tpu"), f"conv1d: backend is 'tpu' {ONE_OF}"),
    ],
)
def test_unknown_name(call, text):
    with pytest.raises(ValueError) as info:
        call()
    assert str(info.value) == text


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("FASTCONV_BACKEND", "gpu")
    with pytest.raises(ValueError) as info:
        fc.conv1d(X, W)
    assert str(info.value) == f"conv1d: the environment variable FASTCONV_BACKEND is 'gpu' {ONE_OF}"
    fc.conv1d(X, W, backend="cpu")  # not asked


# ---------------------------------------------------------------------------------------------------------------------
# Where the arrays live
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_device_arrays_stay_on_the_device(dtype, ran, rng):
    """Numba in, Numba out; `out` and `accumulate` on the device too; any strides."""
    x, w, b = (integers(rng, shape, dtype) for shape in ((2, 3, 6), (4, 3, 3), (4,)))
    dx, dw, db = (cuda.to_device(a) for a in (x, w, b))
    y = fc.conv1d(dx, dw, db, padding=1)
    assert ran == ["cuda"]
    assert type(y) is type(cuda.device_array(1)), type(y)
    expected = fc.conv1d(x, w, b, padding=1)
    np.testing.assert_array_equal(y.copy_to_host(), expected)
    grads = fc.conv1d_backward(dx, dw, y, padding=1)
    for grad, exact in zip(grads, fc.conv1d_backward(x, w, expected, padding=1), strict=True):
        assert type(grad) is type(y)
        np.testing.assert_array_equal(grad.copy_to_host(), exact)
    out = cuda.to_device(np.zeros_like(w))
    assert fc.conv1d_weight_grad(dx, w.shape, y, padding=1, out=out, accumulate=True) is out
    np.testing.assert_array_equal(out.copy_to_host(), grads.weight.copy_to_host())
    flipped = fc.conv1d(cuda.to_device(np.asfortranarray(x)), dw, db, padding=1)
    np.testing.assert_array_equal(flipped.copy_to_host(), expected)


def test_numpy_arrays_are_copied_in_and_out(ran):
    out = np.zeros((1, 1, 2), np.float32)
    assert fc.conv1d(X, W, out=out, backend="cuda") is out
    assert type(fc.conv1d(X, W, backend="cuda")) is np.ndarray
    assert ran == ["cuda", "cuda"]
    assert out.tolist() == [[[2, 2]]]


@pytest.mark.parametrize("form", ["argument", "choice", "environment"])
def test_cpu_with_device_arrays(form, monkeypatch):
    x, w = cuda.to_device(X), cuda.to_device(W)
    argument = "auto"
    if form == "argument":
        argument = "cpu"
    elif form == "choice":
        fc.set_backend("cpu")
    else:
        monkeypatch.setenv("FASTCONV_BACKEND", "cpu")
    with pytest.raises(TypeError) as info:
        fc.conv1d(x, w, backend=argument)
    assert str(info.value) == 'conv1d: input lives on a CUDA device, but backend="cpu" was asked for'


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_arrays_of_two_homes(backend):
    device = cuda.to_device(X)
    before = np.full((1, 1, 2), 7, np.float32)
    for call, places in [
        (lambda: fc.conv1d(device, W, backend=backend), "input on cuda, weight on cpu"),
        (lambda: fc.conv1d(X, cuda.to_device(W), backend=backend), "input on cpu, weight on cuda"),
        (lambda: fc.conv1d(device, cuda.to_device(W), np.ones(1, np.float32), backend=backend),
         "input on cuda, weight on cuda, bias on cpu"),
        (lambda: fc.conv1d(device, cuda.to_device(W), out=before, backend=backend),
         "input on cuda, weight on cuda, out on cpu"),
        (lambda: fc.conv1d_weight_grad(X, (1, 1, 2), cuda.to_device(W), backend=backend),
         "input on cpu, grad_output on cuda"),
    ]:  # fmt: skip
        with pytest.raises(TypeError) as info:
            call()
        function = str(info.value).partition(":")[0]
        assert str(info.value) == f"{function}: the arrays of one call must live in one place, but got {places}"
    assert (before == 7).all()


def test_a_device_of_another_kind():
    class Elsewhere:
        def __dlpack_device__(self):
            return 8, 0  # Metal

    with pytest.raises(TypeError) as info:
        fc.conv1d(Elsewhere(), W)
    assert str(info.value) == "conv1d: input lives on a device of DLPack type 8 (expected CPU or CUDA)"


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_out_with_axes_that_interleave(dtype, backend):
    """Strides that no simple rule calls free of overlap, and that are: elements 0, 2, 3 and 5 of six."""
    itemsize = DTYPES[dtype].itemsize
    memory = np.full(6, 7, DTYPES[dtype])
    out = np.lib.stride_tricks.as_strided(memory, (1, 2, 2), (0, 3 * itemsize, 2 * itemsize))
    x, w = np.ones((1, 1, 3), DTYPES[dtype]), np.array([[[1, 1]], [[0, 0]]], DTYPES[dtype])
    assert fc.conv1d(x, w, out=out, backend=backend) is out
    assert memory.tolist() == [2, 7, 2, 0, 7, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Without CUDA
# ---------------------------------------------------------------------------------------------------------------------

WITHOUT_CUDA = """
    import sys
    import numpy as np
    {setup}
    import fastconv as fc
    assert fc.backends() == ("cpu",), fc.backends()
    assert issubclass(fc.BackendUnavailableError, RuntimeError)
    x, w = np.ones((1, 1, 3), np.float32), np.ones((1, 1, 2), np.float32)
    out = np.full((1, 1, 2), 7, np.float32)
    for call in (
        lambda: fc.conv1d(x, w, out=out, backend="cuda"), lambda: fc.set_backend("cuda"),
        lambda: fc.use_backend("cuda").__enter__(),
    ):
        try:
            call()
        except fc.BackendUnavailableError as error:
            print(error)
        else:
            raise SystemExit("no error")
    assert (out == 7).all()
    assert fc.conv1d(x, w).tolist() == [[[2.0, 2.0]]], "the CPU still works"
"""
UNAVAILABLE = [f"{name}: the cuda backend cannot run here: " for name in ("conv1d", "set_backend", "use_backend")]


def test_no_gpu():
    """With whatever is installed here, but no GPU to be seen: what is missing, and what to do."""
    lines = output_of(run_python(WITHOUT_CUDA.format(setup=""), CUDA_VISIBLE_DEVICES="")).splitlines()
    assert len(lines) == 3
    for line, beginning in zip(lines, UNAVAILABLE, strict=True):
        assert line.startswith(beginning), line
        reason = line.removeprefix(beginning)
        assert reason.startswith(("the package numba-cuda is not installed.", "the CUDA compiler (NVVM) is not",
                                  "the NVIDIA driver ")), line  # fmt: skip
        assert any(remedy in reason for remedy in ('Install it with `pip install "fastconv[cuda]"`.',
                                                   "Install the driver of an NVIDIA GPU", "Make one visible.")), line


def test_numba_cuda_that_cannot_be_imported():
    setup = "sys.modules['numba.cuda'] = None"
    lines = output_of(run_python(WITHOUT_CUDA.format(setup=setup))).splitlines()
    for line, beginning in zip(lines, UNAVAILABLE, strict=True):
        assert line.startswith(beginning + "numba.cuda cannot be imported ("), line
        assert line.endswith('). Install it with `pip install "fastconv[cuda]"`.'), line


def test_the_variable_is_read_in_a_fresh_process():
    code = """
        import numpy as np, fastconv as fc
        x = np.ones((1, 1, 3), np.float32)
        try:
            fc.conv1d(x, x)
        except fc.BackendUnavailableError as error:
            print("cuda was asked for")
    """
    process = run_python(code, FASTCONV_BACKEND="cuda", CUDA_VISIBLE_DEVICES="")
    assert output_of(process) == "cuda was asked for"


@pytest.mark.skipif(ON_GPU, reason="the simulator is not used in a run on a GPU")
def test_the_simulator_counts_as_cuda():
    code = "import fastconv as fc; print(fc.backends())"
    assert output_of(run_python(code, NUMBA_ENABLE_CUDASIM="1")) == "('cpu', 'cuda')"


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


def test_number_of_threads():
    before = fc.get_num_threads()
    assert before >= 1
    try:
        for n in (1, 2, np.int64(3), 1000):
            fc.set_num_threads(n)
            assert fc.get_num_threads() == n
            fc.conv1d(X, W)
        of_thread = []
        thread = threading.Thread(target=lambda: of_thread.append(fc.get_num_threads()))
        thread.start()
        thread.join()
        assert of_thread == [before], "the number is the calling thread's own"
    finally:
        fc.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_large_results_begin_at_a_cache_line(dtype, rng):
    x, w = integers(rng, (1, 2, 301, 311), dtype), integers(rng, (3, 2, 3, 3), dtype)
    y = fc.conv2d(x, w)
    for result in (y, fc.conv2d_input_grad(x.shape, w, y), fc.softmax(y)):
        assert result.nbytes > 256 * 1024
        assert result.ctypes.data % 64 == 0
        assert result.flags.c_contiguous
        assert result.flags.writeable
        assert result.dtype == dtype
