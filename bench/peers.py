"""Those who are compared: fastconv and its peers, each in its own best form, on operands made alike for all.

A peer is a function from a `Problem` to a `Prepared`. It raises Unsupported, with the reason, for what it cannot do.
Conversion to its own arrays and layout, packing of weights, compilation and choice of algorithm happen in that
function; only `Prepared.call` is timed, and what is prepared there is the same for every call of a training step or of
a server, except where the list in README.md says that it is unfair, and to whom.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case, ConvolutionCase, CrossEntropyCase

Result = tuple[np.ndarray, ...]


class Unsupported(Exception):
    """The peer does not do this. The message says why."""


@dataclass(frozen=True)
class Problem:
    """One pass of one case, its operands as NumPy arrays, and the conditions."""

    case: Case
    which: str
    operands: dict[str, np.ndarray]
    threads: int
    spinning: bool  # whether the peer's threads may spin while they wait, as most do by default

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.operands.values())).dtype

    def convolution(self) -> ConvolutionCase:
        if not isinstance(self.case, ConvolutionCase):
            raise Unsupported("has no cross-entropy")
        return self.case


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to be timed."""

    call: Callable[[], Any]
    fetch: Callable[[Any], Result]  # what `call` returned, as NumPy arrays, channels first
    wait: Callable[[], object] | None = None  # until the device has done what was called
    context: Callable[[], Any] = contextlib.nullcontext  # in which the calls are made


@dataclass(frozen=True)
class Peer:
    name: str
    backend: str
    modules: tuple[str, ...]  # that it needs
    package: str  # whose version is recorded
    prepare: Callable[[Problem], Prepared]

    def missing(self) -> str | None:
        """Why the peer cannot be run here; None if it can."""
        absent = [module for module in self.modules if importlib.util.find_spec(module) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def version(self) -> str:
        """Name and version of its package, which has been imported."""
        module = importlib.import_module(self.package)
        return f"{self.package} {getattr(module, '__version__', None) or importlib.metadata.version(self.package)}"


PEERS: dict[tuple[str, str], Peer] = {}


def _peer(name: str, backend: str, modules: Sequence[str] = (), package: str | None = None):
    def register(prepare: Callable[[Problem], Prepared]) -> Callable[[Problem], Prepared]:
        PEERS[name, backend] = Peer(name, backend, tuple(modules), package or modules[0], prepare)
        return prepare

    return register


def names(backend: str) -> list[str]:
    return [name for name, where in PEERS if where == backend]


def _first_channels_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


# ---------------------------------------------------------------------------------------------------------------------
# fastconv
# ---------------------------------------------------------------------------------------------------------------------


def _fastconv_convolution(problem: Problem, arrays: dict[str, Any], layout: str | None = None) -> Callable[[], Any]:
    import fastconv as fc

    case = problem.convolution()
    options = (case.stride, case.padding, case.dilation, case.groups)
    form: dict[str, Any] = {} if layout is None else {"layout": layout}
    if problem.which == "forward":
        function = getattr(fc, case.op)
        return lambda: function(arrays["input"], arrays["weight"], None, *options, **form)
    function = getattr(fc, f"{case.op}_{problem.which}")
    dy = arrays["grad_output"]
    if problem.which == "weight_grad":
        return lambda: function(arrays["input"], case.weight_shape, dy, *options, **form)
    size = tuple(arrays["input"].shape)
    return lambda: function(size, arrays["weight"], dy, *options, **form)


def _fastconv_cross_entropy(problem: Problem, arrays: dict[str, Any]) -> Callable[[], Any]:
    import fastconv as fc

    function = {"forward": fc.softmax_cross_entropy, "with_grad": fc.softmax_cross_entropy_with_grad}[problem.which]
    return lambda: function(arrays["logits"], arrays["target"])


def _as_tuple(result: Any) -> Result:
    return result if isinstance(result, tuple) else (result,)


@_peer("fastconv", "cpu", ["numba"], "fastconv")
def _fastconv(problem: Problem) -> Prepared:
    if isinstance(problem.case, CrossEntropyCase):
        return Prepared(_fastconv_cross_entropy(problem, problem.operands), _as_tuple)
    return Prepared(_fastconv_convolution(problem, problem.operands), _as_tuple)


@_peer("fastconv channels-last", "cpu", ["numba"], "fastconv")
def _fastconv_channels_last(problem: Problem) -> Prepared:
    case = problem.convolution()
    layout = {1: "NLC", 2: "NHWC", 3: "NDHWC"}[case.ndim]
    arrays = {
        name: array if name == "weight" else _first_channels_last(array) for name, array in problem.operands.items()
    }

    def fetch(result: np.ndarray) -> Result:
        return (result if problem.which == "weight_grad" else np.moveaxis(result, -1, 1),)

    return Prepared(_fastconv_convolution(problem, arrays, layout), fetch)


@_peer("fastconv prepared", "cpu", ["numba"], "fastconv")
def _fastconv_prepared(problem: Problem) -> Prepared:
    import fastconv as fc

    case = problem.convolution()
    make = getattr(fc, f"Conv{case.ndim}d", None)
    if problem.which != "forward":
        raise Unsupported("prepared weights are for the forward pass")
    if make is None:
        raise Unsupported(f"this version has no Conv{case.ndim}d")
    op = make(problem.operands["weight"], None, case.stride, case.padding, case.dilation, case.groups)
    return Prepared(lambda: op(problem.operands["input"]), _as_tuple)


@_peer("fastconv", "cuda", ["numba"], "fastconv")
def _fastconv_cuda(problem: Problem) -> Prepared:
    from numba import cuda

    arrays = {name: cuda.to_device(array) for name, array in problem.operands.items()}
    if isinstance(problem.case, CrossEntropyCase):
        call = _fastconv_cross_entropy(problem, arrays)
    else:
        call = _fastconv_convolution(problem, arrays)
    return Prepared(call, lambda result: tuple(a.copy_to_host() for a in _as_tuple(result)), cuda.synchronize)


# ---------------------------------------------------------------------------------------------------------------------
# torch
# ---------------------------------------------------------------------------------------------------------------------


def _torch(problem: Problem, device: str, channels_last: bool) -> Prepared:
    import torch

    torch.set_num_threads(problem.threads)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise Unsupported("torch finds no CUDA device")
        torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms on the first call
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(array).to(device)

    def fetch(result: Any) -> Result:
        def array(t: Any) -> np.ndarray:
            t = t.detach().cpu()
            if t.dtype == torch.bfloat16:
                return t.view(torch.uint16).contiguous().numpy().view(problem.dtype)
            return t.numpy()

        return tuple(array(t) for t in (result if isinstance(result, tuple) else (result,)))

    wait = torch.cuda.synchronize if device == "cuda" else None
    tensors = {name: tensor(array) for name, array in problem.operands.items()}
    call = torch_call(problem.case, problem.which, tensors, channels_last)
    return Prepared(call, fetch, wait, contextlib.nullcontext if problem.which == "with_grad" else torch.inference_mode)


def torch_call(case: Case, which: str, tensors: dict[str, Any], channels_last: bool) -> Callable[[], Any]:
    """One pass of torch over tensors of any device. That of the loss with its gradient needs torch's grad mode."""
    import torch
    import torch.nn.functional as functional

    if isinstance(case, CrossEntropyCase):
        if channels_last:
            raise Unsupported("cross-entropy has one layout")
        logits, target = tensors["logits"].detach(), tensors["target"]
        if which == "forward":
            return lambda: functional.cross_entropy(logits, target)
        logits.requires_grad_()

        def with_grad() -> Any:
            loss = functional.cross_entropy(logits, target)
            return loss, torch.autograd.grad(loss, logits)[0]

        return with_grad
    if channels_last:
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(case.ndim)
        if layout is None:
            raise Unsupported("torch has no channels-last layout in 1-D")
        tensors = {name: t.contiguous(memory_format=layout) for name, t in tensors.items()}
    x, w, dy = (tensors[name] for name in ("input", "weight", "grad_output"))
    if which == "forward":
        convolve = getattr(functional, case.op)
        return lambda: convolve(x, w, None, case.stride, case.padding, case.dilation, case.groups)
    backward = torch.ops.aten.convolution_backward
    place = 0 if which == "input_grad" else 1
    options = (
        None, list(case.stride), list(case.padding), list(case.dilation), False, [0] * case.ndim, case.groups,
        [place == 0, place == 1, False],
    )  # fmt: skip
    return lambda: backward(dy, x, w, *options)[place]


for _device in ("cpu", "cuda"):
    for _name, _last in (("torch", False), ("torch channels-last", True)):
        _peer(_name, _device, ["torch"])(
            lambda problem, device=_device, last=_last: _torch(problem, device, last)  # type: ignore[misc]
        )


# ---------------------------------------------------------------------------------------------------------------------
# JAX
# ---------------------------------------------------------------------------------------------------------------------


def _jax(problem: Problem, platform: str, channels_last: bool) -> Prepared:
    import jax

    if problem.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    try:
        device = jax.devices("gpu" if platform == "cuda" else "cpu")[0]
    except RuntimeError as error:
        raise Unsupported(f"JAX finds no {platform} device: {error}") from None

    def put(array: np.ndarray) -> Any:
        return jax.device_put(array, device)

    def fetch(result: Any) -> Result:
        return tuple(np.asarray(a) for a in (result if isinstance(result, tuple) else (result,)))

    if isinstance(problem.case, CrossEntropyCase):
        if channels_last:
            raise Unsupported("cross-entropy has one layout")
        logits, target = put(problem.operands["logits"]), put(problem.operands["target"])
        positions = math.prod((problem.case.batch, *problem.case.size))
        soft = problem.case.target == "probabilities"

        def loss(z: Any, y: Any) -> Any:
            log_p = jax.nn.log_softmax(z, axis=1)
            picked = y * log_p if soft else jax.numpy.take_along_axis(log_p, y[:, None], 1)
            return -picked.sum() / positions

        function = jax.jit(loss if problem.which == "forward" else jax.value_and_grad(loss))
        return Prepared(lambda: jax.block_until_ready(function(logits, target)), fetch)

    case = problem.case
    letters = "DHW"[3 - case.ndim :]
    activations = f"N{letters}C" if channels_last else f"NC{letters}"
    weights = f"{letters}IO" if channels_last else f"OI{letters}"

    def form(array: np.ndarray, weight: bool) -> np.ndarray:
        if not channels_last:
            return array
        if weight:  # (O, I, *K) to (*K, I, O)
            return np.ascontiguousarray(np.moveaxis(array, (0, 1), (-1, -2)))
        return _first_channels_last(array)

    def back(result: Any) -> Result:
        array = np.asarray(result)
        if channels_last:
            array = (
                np.moveaxis(array, (-1, -2), (0, 1)) if problem.which == "weight_grad" else np.moveaxis(array, -1, 1)
            )
        return (array,)

    x, w, dy = (put(form(problem.operands[name], name == "weight")) for name in ("input", "weight", "grad_output"))

    def convolve(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, case.stride, [(p, p) for p in case.padding], rhs_dilation=case.dilation,
            dimension_numbers=(activations, weights, activations), feature_group_count=case.groups,
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip

    if problem.which == "forward":
        function, operands = jax.jit(convolve), (x, w)
    elif problem.which == "weight_grad":
        function = jax.jit(lambda x, dy: jax.linear_transpose(lambda w: convolve(x, w), w)(dy)[0])
        operands = (x, dy)
    else:
        function = jax.jit(lambda w, dy: jax.linear_transpose(lambda x: convolve(x, w), x)(dy)[0])
        operands = (w, dy)
    return Prepared(lambda: function(*operands).block_until_ready(), back)


for _device in ("cpu", "cuda"):
    for _name, _last in (("jax", False), ("jax channels-last", True)):
        _peer(_name, _device, ["jax"])(
            lambda problem, device=_device, last=_last: _jax(problem, device, last)  # type: ignore[misc]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Inference engines: forward only, weights prepared when the session is made
# ---------------------------------------------------------------------------------------------------------------------


def _inference(problem: Problem) -> ConvolutionCase:
    case = problem.convolution()
    if problem.which != "forward":
        raise Unsupported("is for inference: no gradients")
    if problem.dtype != np.float32:
        raise Unsupported("is measured in float32 only")
    return case


@_peer("onnxruntime", "cpu", ["onnxruntime", "onnx"])
def _onnxruntime(problem: Problem) -> Prepared:
    case = _inference(problem)
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=case.stride, pads=case.padding * 2, dilations=case.dilation,
        group=case.groups, kernel_shape=case.kernel,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.input_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, case.output_shape)],
        [numpy_helper.from_array(problem.operands["weight"], "w")],
    )  # fmt: skip
    # opset 17 is of IR version 8: no onnx package is too new for the runtime then
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if problem.spinning else "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": problem.operands["input"]}
    return Prepared(lambda: session.run(None, feed), tuple)


@_peer("openvino", "cpu", ["openvino"])
def _openvino(problem: Problem) -> Prepared:
    case = _inference(problem)
    import openvino
    from openvino import opset13

    x = opset13.parameter(case.input_shape, np.float32, "x")
    weight = problem.operands["weight"]
    pads = (list(case.stride), list(case.padding), list(case.padding), list(case.dilation))
    if case.groups == 1:
        y = opset13.convolution(x, opset13.constant(weight), *pads)
    else:
        grouped = weight.reshape(case.groups, -1, *weight.shape[1:])
        y = opset13.group_convolution(x, opset13.constant(grouped), *pads)
    compiled = openvino.Core().compile_model(
        openvino.Model([y], [x]),
        "CPU",
        # without the hint it may compute in bfloat16
        {"INFERENCE_NUM_THREADS": problem.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
    )
    request = compiled.create_infer_request()
    shared = openvino.Tensor(problem.operands["input"], shared_memory=True)
    request.set_input_tensor(shared)

    def fetch(_: Any) -> Result:
        return (request.get_output_tensor().data.copy(),)

    return Prepared(request.infer, fetch)


# ---------------------------------------------------------------------------------------------------------------------
# NumPy and SciPy
# ---------------------------------------------------------------------------------------------------------------------


@_peer("numpy", "cpu", ["numpy"])
def _numpy(problem: Problem) -> Prepared:
    """im2col, the way of every course: the windows as a matrix, one product by the BLAS; the gradients likewise."""
    if problem.dtype.itemsize < 4:
        raise Unsupported("NumPy has no fast product of 16-bit matrices")
    if isinstance(problem.case, CrossEntropyCase):
        return Prepared(_numpy_cross_entropy(problem, problem.case), _as_tuple)
    case = problem.case
    n, g, taps = case.batch, case.groups, math.prod(case.kernel)
    positions, axes = case.output_shape[2:], tuple(range(2, 2 + case.ndim))
    if n * case.in_channels * taps * math.prod(positions) * problem.dtype.itemsize > 4 << 30:
        raise Unsupported("the matrix of windows has more than 4 GiB")
    x, w, dy = (problem.operands[name] for name in ("input", "weight", "grad_output"))
    width = ((0, 0), (0, 0), *((p, p) for p in case.padding))
    w_matrix = w.reshape(g, case.out_channels // g, -1)
    steps = [slice(None, None, s) for s in case.stride]

    def columns() -> np.ndarray:  # (n, g, channels * taps, positions)
        span = tuple(d * (k - 1) + 1 for k, d in zip(case.kernel, case.dilation, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, width), span, axes)
        windows = windows[(slice(None), slice(None), *steps, *(slice(None, None, d) for d in case.dilation))]
        order = (0, 1, *(a + case.ndim for a in axes), *axes)
        return windows.transpose(order).reshape(n, g, -1, math.prod(positions))

    def forward() -> np.ndarray:
        return (w_matrix @ columns()).reshape(case.output_shape)

    def weight_grad() -> np.ndarray:
        slope = dy.reshape(n, g, case.out_channels // g, -1)
        return (slope @ columns().swapaxes(-1, -2)).sum(axis=0).reshape(case.weight_shape)

    def input_grad() -> np.ndarray:
        slope = dy.reshape(n, g, case.out_channels // g, -1)
        each = (w_matrix.swapaxes(-1, -2) @ slope).reshape(n, case.in_channels, *case.kernel, *positions)
        padded = np.zeros((n, case.in_channels, *(s + 2 * p for s, p in zip(case.size, case.padding, strict=True))),
                          x.dtype)  # fmt: skip
        for tap in np.ndindex(*case.kernel):
            read = tuple(
                slice(k * d, k * d + (o - 1) * s + 1, s)
                for k, d, o, s in zip(tap, case.dilation, positions, case.stride, strict=True)
            )
            padded[(slice(None), slice(None), *read)] += each[(slice(None), slice(None), *tap)]
        inside = (slice(p, p + s) for s, p in zip(case.size, case.padding, strict=True))
        return padded[(slice(None), slice(None), *inside)]

    calls = {"forward": forward, "weight_grad": weight_grad, "input_grad": input_grad}
    return Prepared(calls[problem.which], _as_tuple)


def _numpy_cross_entropy(problem: Problem, case: CrossEntropyCase) -> Callable[[], Any]:
    z, target = problem.operands["logits"], problem.operands["target"]
    positions = case.batch * math.prod(case.size)
    soft = case.target == "probabilities"
    at = target if soft else np.expand_dims(target, 1)

    def call() -> Any:
        shifted = z - z.max(axis=1, keepdims=True)
        p = np.exp(shifted)
        total = p.sum(axis=1, keepdims=True)
        log_total = np.log(total)
        picked = at * (shifted - log_total) if soft else np.take_along_axis(shifted, at, 1) - log_total
        loss = -picked.sum() / positions
        if problem.which == "forward":
            return loss
        p /= total
        if soft:
            p -= at
        else:
            np.put_along_axis(p, at, np.take_along_axis(p, at, 1) - 1, 1)
        p /= positions
        return loss, p

    return call


def _one_plane(problem: Problem) -> tuple[np.ndarray, np.ndarray, ConvolutionCase, str]:
    """Plane, kernel, and the words of SciPy for the padding: "valid" or "same"."""
    case = problem.convolution()
    if (case.batch, case.in_channels, case.out_channels) != (1, 1, 1):
        raise Unsupported("has no channels: single planes only")
    if problem.which != "forward":
        raise Unsupported("has no gradients")
    if set(case.stride) | set(case.dilation) != {1}:
        raise Unsupported("has neither stride nor dilation")
    if problem.dtype.itemsize < 4:
        raise Unsupported("has no 16-bit dtypes")
    if not any(case.padding):
        mode = "valid"
    elif all(2 * p + 1 == k for p, k in zip(case.padding, case.kernel, strict=True)):
        mode = "same"
    else:
        raise Unsupported("pads by none or half a kernel only")
    return problem.operands["input"][0, 0], problem.operands["weight"][0, 0], case, mode


def _plane(result: Any) -> Result:
    return (np.asarray(result)[None, None],)


@_peer("scipy correlate", "cpu", ["scipy"])
def _scipy_correlate(problem: Problem) -> Prepared:
    from scipy import signal

    x, w, _, mode = _one_plane(problem)
    method = signal.choose_conv_method(x, w, mode)
    return Prepared(lambda: signal.correlate(x, w, mode, method), _plane)


@_peer("scipy oaconvolve", "cpu", ["scipy"])
def _scipy_oaconvolve(problem: Problem) -> Prepared:
    from scipy import signal

    x, w, case, mode = _one_plane(problem)
    flipped = w[(slice(None, None, -1),) * case.ndim]
    return Prepared(lambda: signal.oaconvolve(x, flipped, mode), _plane)


@_peer("scipy ndimage", "cpu", ["scipy"])
def _scipy_ndimage(problem: Problem) -> Prepared:
    from scipy import ndimage

    x, w, case, mode = _one_plane(problem)
    if any(k % 2 == 0 for k in case.kernel):
        raise Unsupported("kernels of odd size only")
    inside = tuple(slice(k // 2, s - k // 2) if mode == "valid" else slice(None)
                   for k, s in zip(case.kernel, case.size, strict=True))  # fmt: skip
    return Prepared(lambda: ndimage.correlate(x, w, mode="constant")[inside], _plane)


# The plain loops take about 2 us for a product.
REFERENCE_PRODUCTS = 1_000_000


@_peer("reference", "cpu", ["numpy"], "fastconv")
def _reference(problem: Problem) -> Prepared:
    """The plain loops of fastconv.reference, in float64: what a student would write first."""
    from fastconv import reference

    case = problem.case
    size = case.flops(problem.which) // 2
    if size > REFERENCE_PRODUCTS:
        raise Unsupported(f"{size} products would take minutes in plain loops")
    if isinstance(case, CrossEntropyCase):
        z, y = problem.operands["logits"], problem.operands["target"]
        count = 1 if problem.which == "forward" else 2
        return Prepared(lambda: reference.softmax_cross_entropy(z, y)[:count], _as_tuple)
    x, w, dy = (problem.operands[name] for name in ("input", "weight", "grad_output"))
    options = (case.stride, tuple((p, p) for p in case.padding), case.dilation, case.groups)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: reference.convolution(x, w, None, *options),
        "weight_grad": lambda: reference.convolution_weight_grad(x, case.weight_shape, dy, *options),
        "input_grad": lambda: reference.convolution_input_grad(case.input_shape, w, dy, *options),
    }
    return Prepared(calls[problem.which], _as_tuple)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA only
# ---------------------------------------------------------------------------------------------------------------------


@_peer("cupy", "cuda", ["cupy"])
def _cupy(problem: Problem) -> Prepared:
    """CuPy has convolutions of single planes (cupyx.scipy), and what NumPy has for cross-entropy."""
    import cupy

    def fetch(result: Any) -> Result:
        return tuple(cupy.asnumpy(a) for a in _as_tuple(result))

    wait = cupy.cuda.get_current_stream().synchronize
    if isinstance(problem.case, CrossEntropyCase):
        z, target = cupy.asarray(problem.operands["logits"]), cupy.asarray(problem.operands["target"])
        positions = problem.case.batch * math.prod(problem.case.size)
        if problem.case.target == "index":  # CuPy has no put_along_axis
            y = cupy.moveaxis(cupy.eye(problem.case.classes, dtype=z.dtype)[target], -1, 1)
        else:
            y = target

        def call() -> Any:
            shifted = z - z.max(axis=1, keepdims=True)
            log_p = shifted - cupy.log(cupy.exp(shifted).sum(axis=1, keepdims=True))
            loss = -(y * log_p).sum() / positions
            return loss if problem.which == "forward" else (loss, (cupy.exp(log_p) - y) / positions)

        return Prepared(call, fetch, wait)
    from cupyx.scipy import signal

    x, w, _, mode = _one_plane(problem)
    plane, kernel = cupy.asarray(x), cupy.asarray(w)
    return Prepared(lambda: signal.correlate(plane, kernel, mode), lambda r: (cupy.asnumpy(r)[None, None],), wait)


@_peer("liger", "cuda", ["liger_kernel", "torch"], "liger_kernel")
def _liger(problem: Problem) -> Prepared:
    """Liger-Kernel's fused cross-entropy, which overwrites the logits with the gradient."""
    if not isinstance(problem.case, CrossEntropyCase):
        raise Unsupported("has no convolution")
    if problem.case.size or problem.case.target != "index":
        raise Unsupported("takes logits (N, C) and class indices")
    import torch
    from liger_kernel.transformers.functional import liger_cross_entropy

    if not torch.cuda.is_available():
        raise Unsupported("torch finds no CUDA device")
    logits = torch.from_numpy(problem.operands["logits"]).cuda()
    target = torch.from_numpy(problem.operands["target"]).cuda()
    if problem.which == "forward":
        return Prepared(
            lambda: liger_cross_entropy(logits, target), lambda r: (r.cpu().numpy(),), torch.cuda.synchronize,
            torch.inference_mode,
        )  # fmt: skip
    logits.requires_grad_()

    # The first call, which is checked, sees the logits. The later ones see gradients in their place, which changes
    # values but not work: a copy before every call would cost as much as the kernel.
    def call() -> Any:
        loss = liger_cross_entropy(logits, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    return Prepared(call, lambda r: tuple(a.detach().cpu().numpy() for a in r), torch.cuda.synchronize)


# Names that `--peer` understands for several peers at once.
FAMILIES = types.MappingProxyType(
    {
        "fastconv": ("fastconv", "fastconv channels-last", "fastconv prepared"),
        "torch": ("torch", "torch channels-last"),
        "jax": ("jax", "jax channels-last"),
        "scipy": ("scipy correlate", "scipy oaconvolve", "scipy ndimage"),
    }
)
