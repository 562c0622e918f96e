"""The public functions inside jitted code: ``fc.conv2d(x, w)`` in the body of the user's own ``@njit`` function.

Such a call is typed here from the types of its arguments, and compiled to a call of the Python function of that name,
under the GIL, which the kernels let go of while they compute. So there is one judge of arguments and one plan for each
shape, with the caches they have, and results and errors are those of Python; it costs what the call from Python costs.
An error inside a `prange` loop is as lost as any error there is in Numba.

What was considered and not taken:

`numba.extending.overload` binds keyword-only parameters to the last positional arguments (`fold_arguments` in Numba),
so ``fc.conv2d(x, w, layout="NHWC")`` fails, and it compiles one more function for every way to call. ``objmode`` can
have its error neither caught by ``try`` nor raised in a ``prange`` loop: the caller gets a SystemError. Compiling the
planning of a convolution (shapes, blocks, tables) into every caller would cost it seconds, for microseconds in a call.

A user function compiled with ``cache=True`` keeps the name of `_run` and its first arguments, and outlives this version
of fastconv. Whoever changes what they mean gives `_run` another name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import ForceLiteralArg, TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin
from numba.np.numpy_support import as_dtype

from . import arguments, conv, linear_loss, loss

__all__ = ["register"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name)
    for module in (conv, loss, linear_loss)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

_OPERANDS = {"input", "weight", "bias", "grad_output", "logits", "hidden", "class_weight"}  # of one floating-point type
_ARRAYS = {*_OPERANDS, "target", "out", "grad_out"}


def _is_none(kind: Any) -> bool:
    return kind is None or isinstance(kind, types.NoneType)


def _without_none(kind: Any) -> Any:
    return kind.type if isinstance(kind, types.Optional) else kind


def _is_option(kind: Any) -> bool:
    """Whether a value of this Numba type can be handed to Python as one of the options of a call."""
    kind = _without_none(kind)
    if isinstance(kind, types.BaseTuple):
        return all(map(_is_option, kind))
    if isinstance(kind, types.List):
        return _is_option(kind.dtype)
    return isinstance(
        kind, (types.Literal, types.NoneType, types.Integer, types.Float, types.Boolean, types.UnicodeType, types.Array)
    )


def _constant(kind: Any) -> Any:
    """The value that a type stands for, or raise ValueError."""
    if isinstance(kind, types.Literal):
        return kind.literal_value
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.BaseTuple):
        return tuple(map(_constant, kind))
    raise ValueError(kind)


class _Call:
    """One call in jitted code: the Numba types of the arguments that were given, by name."""

    def __init__(self, function: str, args: tuple[Any, ...], kws: dict[str, Any]) -> None:
        self.function = function
        self.signature = inspect.signature(FUNCTIONS[function])
        try:
            self.given = self.signature.bind(*args, **kws).arguments
        except TypeError as error:
            raise TypingError(f"{function}: {error}") from None
        for name, kind in self.given.items():
            self._check(name, kind)
        self.dtype = self._common_dtype()

    def _check(self, name: str, kind: Any) -> None:
        if _is_none(kind) and self.signature.parameters[name].default is None:
            return
        if name not in _ARRAYS:
            if not _is_option(kind):
                raise TypingError(f"{self.function}: {name} is a {kind} (expected numbers, strings, tuples or None)")
        elif name in ("out", "grad_out") and isinstance(kind, types.Optional):
            raise TypingError(f"{self.function}: {name} may be None (expected an array, or None in every call)")
        elif not isinstance(_without_none(kind), types.Array) and not self._is_number(name, kind):
            raise TypingError(f"{self.function}: {name} is a {kind} (expected an array)")

    def _is_number(self, name: str, kind: Any) -> bool:
        """Whether an array stands here that may also be a number: one class index, or the gradient of the loss."""
        if name == "target":
            return isinstance(_without_none(kind), types.Integer)
        return self.function == "softmax_cross_entropy_grad" and name == "grad_output" and _is_option(kind)

    def _common_dtype(self) -> Any:
        operands = {name: self.array(name) for name in self.given if name in _OPERANDS}
        arrays = {name: kind for name, kind in operands.items() if isinstance(kind, types.Array)}
        try:
            arguments.common_dtype(
                self.function, **{name: SimpleNamespace(dtype=as_dtype(kind.dtype)) for name, kind in arrays.items()}
            )
        except TypeError as error:
            raise TypingError(str(error)) from None
        return next(iter(arrays.values())).dtype

    def array(self, name: str) -> Any:
        return _without_none(self.given[name])

    def literal(self, name: str, why: str) -> Any:
        """The value of an argument that decides the type of the result."""
        if name not in self.given:
            return self.signature.parameters[name].default
        kind = self.given[name]
        if isinstance(kind, types.UnicodeType):  # compile the caller for the value, if it knows it
            raise ForceLiteralArg({list(self.signature.parameters).index(name)}, self._fold)
        try:
            return _constant(kind)
        except ValueError:
            raise TypingError(f"{self.function}: {name} is a {kind} (expected a literal: {why})") from None

    def _fold(self, args: tuple[Any, ...], kws: dict[str, Any]) -> tuple[Any, ...]:
        bound = self.signature.bind(*args, **dict(kws)).arguments
        return tuple(bound.get(name) for name in self.signature.parameters)

    def needed(self, grads: list[Any]) -> list[Any]:
        """Of the types of all gradients, those that `needs` asks for; none in the place of the others."""
        every = self.signature.parameters["needs"].default
        try:
            needs = _constant(self.given["needs"]) if "needs" in self.given else every
        except ValueError:
            raise TypingError(
                f"{self.function}: needs is a {self.given['needs']} (expected literal strings: they decide the "
                "type of the result)"
            ) from None
        needs = (needs,) if isinstance(needs, str) else needs
        if not isinstance(needs, tuple):
            names = ", ".join(map(repr, every))
            raise TypingError(f"{self.function}: needs is {needs!r} (expected a tuple of {names})")
        return [kind if name in needs else types.none for name, kind in zip(every, grads, strict=True)]

    def result(self, ndim: int, out: str = "out") -> Any:
        """`out` if it was given; otherwise a fresh array, or a number if it would have no dimensions."""
        if not _is_none(self.given.get(out)):
            return self.given[out]
        return types.Array(self.dtype, ndim, "C") if ndim else self.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def _like(argument: str) -> Callable[[_Call], Any]:
    """A result of as many dimensions as this argument: a batch, one sample, or a bare plane."""
    return lambda call: call.result(call.array(argument).ndim)


def _weight_ndim(ndim: int, activation: Any) -> int:
    """A bare plane has a bare kernel, and any other input the weight (O, C/groups, *K)."""
    return ndim if activation.ndim == ndim else ndim + 2


def _weight_grad(ndim: int) -> Callable[[_Call], Any]:
    return lambda call: call.result(_weight_ndim(ndim, call.array("input")))


def _backward(ndim: int) -> Callable[[_Call], Any]:
    def result(call: _Call) -> Any:
        x = call.array("input")
        every = [types.Array(call.dtype, n, "C") for n in (x.ndim, _weight_ndim(ndim, x), 1)]
        return types.BaseTuple.from_types(call.needed(every), conv.ConvGrads)

    return result


def _linear_cross_entropy(call: _Call) -> Any:
    positions = call.array("hidden").ndim - 1
    decides = positions and _is_none(call.given.get("out"))
    each = decides and call.literal("reduction", "it decides the type of the loss") == "none"
    results = [call.result(positions if each else 0)]
    if call.function == "linear_cross_entropy_with_grad":
        bias = types.none if _is_none(call.given.get("bias")) else types.Array(call.dtype, 1, "C")
        results += call.needed([types.Array(call.dtype, positions + 1, "C"), types.Array(call.dtype, 2, "C"), bias])
    if call.literal("return_lse", "it decides the type of the result"):
        results.append(types.Array(call.dtype, positions, "C") if positions else call.dtype)
    elif len(results) > 1:
        return types.BaseTuple.from_types(results, linear_loss.LinearCrossEntropyGrads)
    return types.BaseTuple.from_types(results) if len(results) > 1 else results[0]


def _cross_entropy(wants_loss: bool, wants_grad: bool) -> Callable[[_Call], Any]:
    def result(call: _Call) -> Any:
        logits = call.array("logits")
        results = []
        if wants_loss:
            decides = logits.ndim > 1 and _is_none(call.given.get("out"))
            each = decides and call.literal("reduction", "it decides the type of the loss") == "none"
            results.append(call.result(logits.ndim - 1 if each else 0))
        if wants_grad:
            results.append(call.result(logits.ndim, "grad_out" if wants_loss else "out"))
        if call.literal("return_lse", "it decides the type of the result"):
            results.append(types.Array(call.dtype, logits.ndim - 1, "C") if logits.ndim > 1 else call.dtype)
        return types.BaseTuple.from_types(results) if len(results) > 1 else results[0]

    return result


def _results() -> dict[str, Callable[[_Call], Any]]:
    """What each function returns, in Numba types."""
    rules = {
        "conv_bias_grad": lambda call: call.result(1),
        "softmax": _like("logits"),
        "log_softmax": _like("logits"),
        "softmax_cross_entropy": _cross_entropy(True, False),
        "softmax_cross_entropy_grad": _cross_entropy(False, True),
        "softmax_cross_entropy_with_grad": _cross_entropy(True, True),
        "linear_cross_entropy": _linear_cross_entropy,
        "linear_cross_entropy_with_grad": _linear_cross_entropy,
    }
    for ndim in (1, 2, 3):
        rules[f"conv{ndim}d"] = rules[f"conv_transpose{ndim}d"] = _like("input")
        rules[f"conv{ndim}d_input_grad"] = _like("grad_output")
        rules[f"conv{ndim}d_weight_grad"] = _weight_grad(ndim)
        rules[f"conv{ndim}d_backward"] = _backward(ndim)
    return rules


_NUMBER = -1


def _ndims(kind: Any) -> tuple[int | None, ...]:
    """The dimensions of each result, `_NUMBER` where an array of none is to become a number, None for None."""
    if isinstance(kind, types.BaseTuple):
        return tuple(n for each in kind for n in _ndims(each))
    kind = _without_none(kind)
    return (None,) if _is_none(kind) else (kind.ndim if isinstance(kind, types.Array) else _NUMBER,)


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------

# What jitted code raises by itself, so that its `try` can handle it; by place, from 1. Anything else
# (KeyboardInterrupt) ends the jitted function.
_ERRORS = (ValueError, TypeError, MemoryError)


def _run(
    function: str, names: tuple[str, ...], constants: dict[str, Any], ndims: tuple[int | None, ...], *values: Any
) -> tuple[int, Any]:
    """Call a public function for jitted code: (0, its result), or (the place in `_ERRORS` from 1, the message)."""
    given = constants | dict(zip(names, values, strict=True))
    try:
        given["backend"] = _cpu_backend(function, given.get("backend", "auto"))
        answer = FUNCTIONS[function](**given)
    except _ERRORS as error:
        return next(i for i, kind in enumerate(_ERRORS, 1) if isinstance(error, kind)), str(error)
    results = answer if isinstance(answer, tuple) else (answer,)
    delivered = tuple(a[()] if n == _NUMBER else a for a, n in zip(results, ndims, strict=True))
    # Reading an array as one of other dimensions would read other memory.
    if any(n is not None and n >= 0 and a is not None and a.ndim != n for a, n in zip(results, ndims, strict=True)):
        raise RuntimeError(
            f"{function}: the result has {[getattr(a, 'ndim', None) for a in results]} dimensions, but the calling "
            f"function was compiled for {list(ndims)}; was it cached with another version of fastconv?"
        )
    if answer is not results:
        return 0, delivered[0]
    return 0, type(answer)(*delivered) if hasattr(answer, "_fields") else delivered


def _cpu_backend(function: str, backend: Any) -> Any:
    """Jitted code holds NumPy arrays and runs on the CPU, whatever the backend of calls from Python."""
    if backend == "cuda":
        raise ValueError(f"{function}: backend is 'cuda' inside jitted code (expected 'auto' or 'cpu')")
    return "cpu" if backend == "auto" else backend


def _emit(context: Any, builder: Any, function: str, sig: Any, values: Any) -> None:
    """The body of a native function that calls `_run`, and returns its result or raises its error."""
    constants, dynamic = {}, []
    for name, kind, value in zip(sig.pysig.parameters, sig.args, values, strict=True):
        try:
            constants[name] = _constant(kind)
        except ValueError:
            dynamic.append((name, kind, value))
    names = tuple(name for name, _, _ in dynamic)
    call = functools.partial(_run, function, names, constants, _ndims(sig.return_type))

    pyapi, environment = context.get_python_api(builder), context.get_env_manager(builder)
    result, message = (
        cgutils.alloca_once_value(builder, cgutils.get_null_value(context.get_value_type(kind)))
        for kind in (sig.return_type, types.unicode_type)
    )
    gil = pyapi.gil_ensure()
    objects = []
    for _, kind, value in dynamic:
        context.nrt.incref(builder, kind, value)  # boxing takes a reference
        objects.append(pyapi.from_native_value(kind, value, environment))
    answer = pyapi.call_function_objargs(pyapi.unserialize(pyapi.serialize_object(call)), objects)
    for each in objects:
        pyapi.decref(each)
    with cgutils.if_unlikely(builder, cgutils.is_null(builder, answer)):
        pyapi.gil_release(gil)
        context.call_conv.return_exc(builder)

    error = pyapi.long_as_longlong(pyapi.tuple_getitem(answer, 0))
    payload = pyapi.tuple_getitem(answer, 1)
    failed = cgutils.alloca_once_value(builder, cgutils.false_bit)
    with builder.if_else(cgutils.is_null(builder, error), likely=True) as (fine, wrong):
        for branch, kind, place in ((fine, sig.return_type, result), (wrong, types.unicode_type, message)):
            with branch:
                native = pyapi.to_native_value(kind, payload)
                builder.store(native.value, place)
                builder.store(native.is_error, failed)
                if native.cleanup is not None:
                    native.cleanup()
    pyapi.decref(answer)
    pyapi.gil_release(gil)
    with cgutils.if_unlikely(builder, builder.load(failed)):
        context.call_conv.return_exc(builder)
    for place, exception in enumerate(_ERRORS, 1):
        with cgutils.if_unlikely(builder, builder.icmp_signed("==", error, error.type(place))):
            context.call_conv.return_dynamic_user_exc(
                builder, exception, (builder.load(message),), (types.unicode_type,)
            )
    context.call_conv.return_value(builder, builder.load(result))


def _lowering(function: str) -> Callable[..., Any]:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        """Call a function of its own, since only the return from a function can be caught by a `try` around it."""
        convention = context.call_conv
        native = ir.Function(
            builder.module, convention.get_function_type(sig.return_type, sig.args),
            builder.module.get_unique_name(f"fastconv_{function}"),
        )  # fmt: skip
        native.linkage = "internal"
        convention.decorate_function(native, list(sig.pysig.parameters), sig.args)
        body = ir.IRBuilder(native.append_basic_block("entry"))
        _emit(context, body, function, sig, convention.decode_arguments(body, sig.args, native))
        status, result = convention.call_function(builder, native, sig.return_type, sig.args, args)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return result

    return lower


def _template(function: str, result: Callable[[_Call], Any]) -> type:
    class Template(AbstractTemplate):
        prefer_literal = True
        metadata = {"target": "cpu"}  # noqa: RUF012 - Numba's name for it

        def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
            call = _Call(function, args, kws)
            sig = signature(result(call), *call.given.values())
            # Numba folds the keywords of the call into the order of these parameters.
            parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in call.given]
            return sig.replace(pysig=inspect.Signature(parameters))

    return Template


@functools.cache
def register() -> None:
    """Make the public functions known to Numba. Called once, by Numba (entry point `numba_extensions`) or on import."""
    results = _results()
    for name, function in FUNCTIONS.items():
        infer_global(function)(_template(name, results[name]))
        lower_builtin(function, types.VarArg(types.Any))(_lowering(name))
