"""Arrays, streams and launches of the CUDA backend, as far as they can be judged without a GPU.

What the simulator cannot run (streams, devices, foreign libraries) is tested on stand-ins that record what was asked of
them; `test_cuda_codegen.py` checks that numba-cuda takes the arguments of a launch as they are.
"""

import re
import sys
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import fastconv as fc
from fastconv.cuda_kernels import _cuda, convolution, jit, linear_cross_entropy, softmax_cross_entropy
from fastconv.cuda_kernels._cuda import DeviceArray, cuda

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64]

simulator_only = pytest.mark.skipif(not _cuda.SIMULATOR, reason="reads device memory as host memory")


def describe(array: np.ndarray) -> DeviceArray:
    """A `DeviceArray` of host memory, which is what the simulator's device memory is."""
    return DeviceArray(array.ctypes.data, array.shape, array.strides, array.dtype, array)


def of_library(name: str, **attributes: object) -> object:
    """An object whose class says that it is of array library `name`."""
    return type("Array", (), {"__module__": f"{name}.arrays", **attributes})()


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------

EVERY = slice(None)


@pytest.mark.parametrize(
    ("axes", "index"),
    [
        ((0, 1, 2), (EVERY, EVERY, None, None, EVERY)),  # NCL
        ((0, 2, 1), (EVERY, EVERY, None, None, EVERY)),  # NLC
        ((2, 0, 1), (None, EVERY, None, EVERY, EVERY)),  # unbatched HWC
        ((0, 1, 2), (None, None)),  # fewer items than axes
        ((1, 2, 0), (None, Ellipsis, None)),
        ((0, 1, 2), (Ellipsis, EVERY, None, EVERY)),
        ((0, 1, 2), Ellipsis),
        ((0, 1, 2), (slice(1, 2), slice(None, 2))),
        ((2, 1, 0), (slice(-3, None), None, Ellipsis, slice(0, 1))),
        ((0, 1, 2), (EVERY, slice(2, 2))),
    ],
)
def test_views_are_those_of_numpy(axes, index):
    base = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)[:, ::-1, ::2]
    expected = base.transpose(axes)[index]
    view = describe(base).transpose(axes)[index]
    assert view.shape == expected.shape
    assert view.ndim == expected.ndim
    assert view.size == expected.size
    assert view.dtype == expected.dtype
    np.testing.assert_array_equal(view.as_numpy(), expected)


@pytest.mark.parametrize("index", [0, (EVERY, 1), slice(0, 2, 2), slice(None, None, -1), np.array([True, False])])
def test_other_indices_are_refused(index):
    with pytest.raises(TypeError, match="expected None, Ellipsis or slices of step 1"):
        describe(np.zeros((2, 3)))[index]


def test_axes_must_be_a_permutation():
    with pytest.raises(ValueError, match=r"axes are \(0, 0\)"):
        describe(np.zeros((2, 3))).transpose((0, 0))


def test_overlap_is_judged_by_element():
    base = np.zeros((4, 8), np.float32)
    assert _cuda.overlap(describe(base), describe(base[::-1]))
    assert _cuda.overlap(describe(base[:, 2:5]), describe(base[:, 4:]))
    assert not _cuda.overlap(describe(base[:, :4]), describe(base[:, 4:]))  # interleaved rows, no common element
    assert not _cuda.overlap(describe(base[:, ::2]), describe(base[:, 1::2]))
    assert not _cuda.overlap(describe(base), describe(np.zeros((0, 8), np.float32)))


def test_overlap_does_not_read_memory():
    here = DeviceArray(4096, (1 << 20, 1 << 20), None, np.float32, None)
    assert _cuda.overlap(here, DeviceArray(4096 + 4 * (1 << 30), (8,), None, np.float32, None))
    assert not _cuda.overlap(here, DeviceArray(4096 + 4 * (1 << 40), (8,), None, np.float32, None))


# ---------------------------------------------------------------------------------------------------------------------
# Copies and launches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_keep_every_value(dtype, rng):
    host = (rng.standard_normal((3, 4, 5)) * 100).astype(dtype)[::-1, :, ::2]
    device = _cuda.to_device(host)
    assert device.is_contiguous
    assert device.dtype == host.dtype
    out = np.zeros((5, 4, 3), dtype).transpose(2, 1, 0)[:, :, :3]
    assert _cuda.to_host(device, out=out) is out
    np.testing.assert_array_equal(out.view(), host)
    np.testing.assert_array_equal(_cuda.to_host(device), host)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [EVERY, np.s_[1:, ::-2], np.s_[::-1, :1]])
def test_copying_out_of_a_strided_view(dtype, index, gpu, monkeypatch, rng):
    """What numba-cuda copies is a run of memory with the array in it, which is taken out of it."""
    base = (rng.standard_normal((4, 6)) * 100).astype(dtype)
    expected, copied = base.T[index], []

    def numba_array(run):
        assert run.is_contiguous
        assert base.ctypes.data <= run.pointer <= run.pointer + run.nbytes <= base.ctypes.data + base.nbytes
        return SimpleNamespace(copy_to_host=lambda stream: copied.append(stream) or run.as_numpy().copy())

    waited = []
    monkeypatch.setattr(_cuda, "_numba_array", numba_array)
    monkeypatch.setattr(_cuda, "_stream", lambda handle: handle)
    monkeypatch.setattr(_cuda, "_synchronize", waited.append)
    array = describe(expected)
    array.stream = 7
    actual = _cuda.to_host(array)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    assert copied == waited == [7]


@cuda.jit
def count_visits(visits):
    for i in range(cuda.grid(1), visits.size, cuda.gridsize(1)):
        visits[i] += 1


@pytest.mark.parametrize("elements", [0, 1, 3, 4, 5, 13, 1000])
def test_every_element_is_visited_once(elements):
    visits = _cuda.to_device(np.zeros(elements, np.int64))
    _cuda.launch(count_visits, elements, visits)
    np.testing.assert_array_equal(_cuda.to_host(visits), np.ones(elements, np.int64))


def test_results_are_arrays_of_the_library_of_the_input():
    like = cuda.to_device(np.zeros((2, 3), np.float32))
    result, array = _cuda.empty((4, 5), np.dtype(np.float64), like)
    assert type(result) is type(like)
    assert array.shape == result.shape == (4, 5)
    assert array.dtype == np.float64
    again, _ = _cuda.empty((4,), np.dtype(np.float32), _cuda.admit(like))  # a DeviceArray stands for its owner
    assert type(again) is type(like)


@simulator_only
def test_the_simulator_takes_no_foreign_arrays():
    with pytest.raises(TypeError, match=r"torch\.arrays\.Array.*asks for the simulator"):
        _cuda.admit(of_library("torch"))


# ---------------------------------------------------------------------------------------------------------------------
# Foreign arrays on a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Let the module believe in a GPU, device 0. Returns what `cuda.core` says of the next array to be admitted."""
    view = SimpleNamespace(
        ptr=4096, shape=(2, 3), strides=None, dtype=np.dtype(np.float32), device_id=0, readonly=False,
        is_device_accessible=True,
    )  # fmt: skip
    monkeypatch.setattr(_cuda, "SIMULATOR", False)
    monkeypatch.setattr(_cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_cuda, "_exported", lambda obj: view)
    return view


def jax_array(**attributes):
    return of_library("jaxlib", __dlpack__=None, **attributes)


def test_an_array_is_taken_where_it_is(gpu):
    gpu.strides, gpu.dtype, gpu.readonly = (-3, 1), np.dtype(ml_dtypes.bfloat16), True
    obj = jax_array()
    array = _cuda.admit(obj)
    assert (array.pointer, array.shape, array.strides) == (4096, (2, 3), (-6, 2))
    assert array.dtype == ml_dtypes.bfloat16
    assert array.owner is obj
    assert not array.writeable


@pytest.mark.parametrize("installed", [True, False])
def test_a_bfloat16_tensor_is_taken_by_its_bits(installed, gpu, monkeypatch):
    """torch has bfloat16 without ml_dtypes, cuda.core does not."""
    if not installed:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    torch = ModuleType("torch")
    torch.bfloat16, torch.int16 = object(), object()
    torch.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=11))
    monkeypatch.setitem(sys.modules, "torch", torch)
    bits = of_library("torch")
    tensor = of_library(
        "torch", dtype=torch.bfloat16, device="cuda:0", __dlpack__=None,
        view=lambda self, dtype: bits if dtype is torch.int16 else pytest.fail("viewed as something else"),
    )  # fmt: skip
    gpu.dtype, gpu.strides = np.dtype(np.int16), (1, 2)
    monkeypatch.setattr(_cuda, "_exported", lambda obj: gpu if obj is bits else pytest.fail("not by its bits"))
    array = _cuda.admit(tensor)
    assert (array.dtype.name, array.dtype.itemsize, array.stored_dtype) == ("bfloat16", 2, np.uint16)
    assert (array.strides, array.owner, array.stream) == ((2, 4), tensor, 11)
    assert (array.dtype == ml_dtypes.bfloat16) == installed
    assert array[:1].dtype == array.dtype


def test_an_array_of_another_device_is_refused(gpu):
    gpu.device_id = 1
    with pytest.raises(ValueError, match="on CUDA device 1, but the current device is 0"):
        _cuda.admit(jax_array())


CALLS_OF_TWO_DEVICES = {
    "input": lambda far, near: fc.conv2d(far((1, 1, 4, 4)), near((1, 1, 3, 3))),
    "weight": lambda far, near: fc.conv2d(near((1, 1, 4, 4)), far((1, 1, 3, 3))),
    "bias": lambda far, near: fc.conv2d(near((1, 1, 4, 4)), near((1, 1, 3, 3)), far((1,))),
    "out": lambda far, near: fc.conv2d(near((1, 1, 4, 4)), near((1, 1, 3, 3)), out=far((1, 1, 2, 2))),
    "grad_output": lambda far, near: fc.conv2d_weight_grad(near((1, 1, 4, 4)), (1, 1, 3, 3), far((1, 1, 2, 2))),
    "logits": lambda far, near: fc.softmax_cross_entropy(far((2, 3)), near((2,), np.int64)),
    "target": lambda far, near: fc.softmax_cross_entropy_grad(near((2, 3)), far((2,), np.int64)),
    "grad_out": lambda far, near: fc.softmax_cross_entropy_with_grad(
        near((2, 3)), near((2,), np.int64), grad_out=far((2, 3))
    ),
    "class_weight": lambda far, near: fc.linear_cross_entropy(
        near((2, 3)), near((4, 3)), near((2,), np.int64), class_weight=far((4,))
    ),
}


@pytest.mark.parametrize("name", CALLS_OF_TWO_DEVICES)
@pytest.mark.parametrize("current", [0, 1])
def test_a_call_with_arrays_of_two_devices_is_refused_by_name(name, current, gpu, monkeypatch):
    """Whichever of them is the current device: the argument that is named is the one on the other."""
    monkeypatch.setattr(sys.modules["fastconv.backends"], "cuda_status", lambda: (True, ""))  # not fc.backends()
    monkeypatch.setattr(_cuda, "current_device", lambda: current)
    monkeypatch.setattr(_cuda, "_exported", lambda obj: obj.view)
    for module in (_cuda, convolution, linear_cross_entropy, softmax_cross_entropy):
        monkeypatch.setattr(module, "launch", lambda *a: pytest.fail("launched"))
    monkeypatch.setattr(_cuda, "empty", lambda shape, dtype, like: (None, DeviceArray(4096, shape, None, dtype, None)))

    def on(device):
        def array(shape, dtype=np.float32):
            view = SimpleNamespace(**{**vars(gpu), "shape": shape, "dtype": np.dtype(dtype), "device_id": device})
            return jax_array(view=view, __dlpack_device__=lambda self: (2, device))

        return array

    message = rf": {name} cannot be read as a CUDA array: it is on CUDA device {1 - current}, but the current device is"
    with pytest.raises(TypeError, match=message):
        CALLS_OF_TWO_DEVICES[name](on(1 - current), on(current))


@pytest.mark.parametrize("change", [{"ptr": 4098}, {"strides": (3, 1), "dtype": np.dtype("f4"), "ptr": 4097}])
def test_a_misaligned_array_is_refused(gpu, change):
    """A misaligned load would end the process's CUDA context."""
    vars(gpu).update(change)
    with pytest.raises(ValueError, match="not aligned to 4 bytes"):
        _cuda.admit(jax_array())


def test_host_memory_is_refused(gpu):
    gpu.is_device_accessible = False
    with pytest.raises(ValueError, match="cannot read its memory"):
        _cuda.admit(jax_array())


def test_a_tensor_that_requires_grad_is_refused(gpu):
    with pytest.raises(TypeError, match=r"requires grad \(expected tensor.detach"):
        _cuda.admit(jax_array(requires_grad=True))


def test_an_empty_array_has_no_address_to_ask_about(gpu, monkeypatch):
    monkeypatch.setattr(_cuda, "_exported", lambda obj: pytest.fail("the driver was asked about a null pointer"))
    interface = {"shape": (0, 3), "typestr": "<f4", "data": (0, False), "version": 3}
    array = _cuda.admit(of_library("other", __cuda_array_interface__=interface))
    assert array.shape == (0, 3)
    assert array.size == 0


def test_the_stream_is_that_of_the_library(monkeypatch):
    torch, cupy = ModuleType("torch"), ModuleType("cupy")
    torch.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream={"cuda:0": 11}[device]))
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=12))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert _cuda.current_stream(of_library("torch", device="cuda:0")) == 11
    assert _cuda.current_stream(of_library("cupy")) == 12
    assert _cuda.current_stream(of_library("numba", stream=0)) == 0
    assert _cuda.current_stream(of_library("numba", stream=SimpleNamespace(handle=13))) == 13
    assert _cuda.current_stream(of_library("other", __cuda_array_interface__={"stream": 14})) == 14
    assert _cuda.current_stream(of_library("other", __cuda_array_interface__={"stream": None})) == 0
    assert _cuda.current_stream(jax_array()) == 0


class RecordingKernel:
    def __init__(self, events):
        self.events = events

    def __getitem__(self, configuration):
        return lambda *arguments: self.events.append(("launch", configuration[2]))


def test_a_launch_waits_for_the_streams_of_its_arrays_and_they_for_it(gpu, monkeypatch):
    events = []
    monkeypatch.setattr(_cuda, "_order", lambda first, then: events.append((first, "before", then)))
    monkeypatch.setattr(_cuda, "_stream", lambda handle: handle)
    monkeypatch.setattr(_cuda, "_blocks", lambda elements: 1)

    def on(stream):
        return DeviceArray(4096, (1,), None, np.float32, None, stream)

    _cuda.launch(RecordingKernel(events), 1, on(5), on(5), 7, True)
    assert events == [("launch", 5)]
    events.clear()
    _cuda.launch(RecordingKernel(events), 1, on(-1), on(5), on(0), on(5))  # -1: a table that every stream may read
    assert events == [(0, "before", 5), ("launch", 5), (5, "before", 0)]


def test_a_result_is_handed_over_behind_its_kernel(gpu, monkeypatch):
    """JAX works on a stream of its own: it must wait for the kernel, and it says so by the argument of __dlpack__."""
    events = []
    monkeypatch.setattr(_cuda, "_order", lambda first, then: events.append((first, then)))
    gpu.__dlpack__ = lambda **options: ("capsule", options)
    namespace = SimpleNamespace(
        from_dlpack=lambda x: (x.__dlpack_device__(), x.__dlpack__(stream=9, max_version=(1, 0)))
    )
    result = of_library("numba", stream=0)
    assert _cuda.deliver(result, jax_array(__array_namespace__=lambda self: namespace)) == (
        (2, 0),
        ("capsule", {"stream": -1, "max_version": (1, 0)}),
    )
    assert events == [(0, 9)]
    assert _cuda.deliver(result, of_library("torch")) is result


# ---------------------------------------------------------------------------------------------------------------------
# Reasons
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"implementation": "Built-in"}, r'numba-cuda is not installed.*pip install "fastconv\[cuda\]"'),
        ({"usable": False, "error": "no driver\nfound"}, r"not usable \(no driver found\).*Install the driver"),
        ({"usable": False, "error": None}, r'NVVM.*not installed.*pip install "fastconv\[cuda\]"'),
        ({"gpus": []}, r"shows no GPU \(CUDA_VISIBLE_DEVICES='9'\)"),
        ({}, "^$"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(gpu, monkeypatch, state, reason):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    monkeypatch.setattr(
        _cuda,
        "cuda",
        SimpleNamespace(
            implementation=state.get("implementation", "NVIDIA"),
            is_available=lambda: state.get("usable", True),
            cuda_error=lambda: state.get("error"),
            gpus=state.get("gpus", ["gpu"]),
        ),
    )
    monkeypatch.setattr(_cuda, "load_compiler", lambda: None)
    usable, text = _cuda.available()
    assert usable == (not state)
    assert re.search(reason, text)


# ---------------------------------------------------------------------------------------------------------------------
# Element types
# ---------------------------------------------------------------------------------------------------------------------


@simulator_only
def test_bfloat16_is_rounded_to_nearest_even(rng):
    bfloat16 = jit.ELEMENTS["bfloat16"]
    bits = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)
    ties = rng.integers(0, 1 << 16, 2_000, dtype=np.uint32) << 16 | 0x8000
    special = np.array([0, 1 << 31, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x7F7F8000], np.uint32)
    for x in np.concatenate([bits, ties, special]).view(np.float32):
        expected = ml_dtypes.bfloat16(x)
        stored = bfloat16.store(x)
        back = bfloat16.load(stored)
        assert back.dtype == np.float32
        if np.isnan(x):
            assert np.isnan(back)
        else:
            assert stored == expected.view(np.uint16)
            assert back == np.float32(expected)
