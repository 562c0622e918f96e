"""From a kernel in the language of `emit` to a function that compiled code calls: one decorator for all of them.

    @vector_function(restrict="target source")
    def copy(e: Emitter, target: Ptr, source: Ptr, count: Int) -> None: ...

makes of `copy` what bodies call as ``copy(target, source, count)``: a function of its own in their code, written once
for each type of element. A kernel that comes in many forms names what they differ in as its keyword `variant`:

    @vector_function(restrict="a panel c")
    def contract(e: Emitter, depth: Int, a: Ptr, ..., *, variant: Rows) -> None: ...

Each form is compiled by itself, when it is first asked for, and called by its address, which comes first:
``contract(kernel, depth, a, ...)`` with ``kernel = contract.address(dtype, Rows(14, 2))`` from Python. Either kind can
be run from Python for a test, as ``contract.run(dtype, arguments, variant)``, and has a sibling of plain loops beside
it (``@contract.plain``) that says, and computes, what it does.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from ..compiler import BodyCompiler
from ..jit import REAL, compiled
from ..records import RecordPointer
from .emit import F32, F64, I1, I64, Bool, Double, Doubles, Emitter, Fields, Int, Ints, Ptr, Real, Value, ir
from .tile import tile

_POINTER = ctypes.c_void_p


class _Kind(NamedTuple):
    """What an annotation means: to LLVM, to Numba and to ctypes; `None` stands for the type of the elements."""

    llvm: Callable[[ir.Type], ir.Type]
    numba: Callable[[Any], Any]
    c: Callable[[Any], Any]


_KINDS: dict[Any, _Kind] = {
    Int: _Kind(lambda _: I64, lambda _: types.int64, lambda _: ctypes.c_int64),
    Bool: _Kind(lambda _: I1, lambda _: types.boolean, lambda _: ctypes.c_bool),
    Real: _Kind(lambda element: element, lambda real: real, lambda real: _c_real(real)),
    Double: _Kind(lambda _: F64, lambda _: types.float64, lambda _: ctypes.c_double),
    Ptr: _Kind(lambda element: element.as_pointer(), lambda real: types.CPointer(real), lambda _: _POINTER),
    Ints: _Kind(lambda _: I64.as_pointer(), lambda _: types.CPointer(types.int64), lambda _: _POINTER),
    Doubles: _Kind(lambda _: F64.as_pointer(), lambda _: types.CPointer(types.float64), lambda _: _POINTER),
    type(None): _Kind(lambda _: ir.VoidType(), lambda _: types.void, lambda _: None),
}  # fmt: skip


def _kind_of(annotation: Any) -> _Kind:
    if get_origin(annotation) is Fields:
        (record,) = get_args(annotation)
        return _Kind(lambda _: I64.as_pointer(), lambda real: RecordPointer(record, real), lambda _: _POINTER)
    return _KINDS[annotation]


def _typed(annotation: Any, e: Emitter, value: ir.Value) -> Any:
    """The value as what the annotation says."""
    if get_origin(annotation) is Fields:
        return Fields(e, value, get_args(annotation)[0])
    return annotation(e, value)


def _c_real(real: Any) -> Any:
    return ctypes.c_float if real == types.float32 else ctypes.c_double


class Kernel:
    """A kernel, as it is written: its name, what it takes, and the functions of LLVM that are made of it."""

    def __init__(self, write: Callable[..., Value | None], restrict: Sequence[str]) -> None:
        hints = get_type_hints(write)
        self.write, self.restrict, self.name = write, restrict, write.__name__
        self.result = hints.pop("return")
        self.returns = _KINDS[self.result]
        self._kept: list[Any] = []
        self.has_variants = hints.pop("variant", None) is not None
        names = [name for name in inspect.signature(write).parameters if name not in ("e", "variant")]
        self.names, self.annotations = names, [hints[name] for name in names]
        self.kinds = [_kind_of(each) for each in self.annotations]

    def type_of(self, element: ir.Type) -> ir.FunctionType:
        return ir.FunctionType(self.returns.llvm(element), [kind.llvm(element) for kind in self.kinds])

    def signature(self, arguments: Sequence[Any]) -> Any:
        """Numba's signature; the elements are what the first pointer to some points to."""
        real = next(arguments[n].dtype for n, each in enumerate(self.annotations) if each is Ptr)
        return self.returns.numba(real)(*(kind.numba(real) for kind in self.kinds)), real

    def full_name(self, variant: Any) -> str:
        return "_".join(["fastconv", self.name, *map(_code, variant or ())])

    def function(self, module: ir.Module, element: ir.Type, variant: Any) -> ir.Function:
        """The function in this module, written if it is not there yet.

        Modules that are linked to the code of a body share it. In those of other functions it must be internal: a call
        of a function that another library has too goes to that one, which may be too far away for the call.
        """
        name = f"{self.full_name(variant)}_{element}"
        if name in module.globals:
            return module.globals[name]
        function = ir.Function(module, self.type_of(element), name)
        function.linkage = "linkonce_odr" if getattr(module, "shares_functions", False) else "internal"
        for attribute in ("noinline", "nounwind", "optsize"):  # what is to be unrolled is written so
            function.attributes.add(attribute)
        # What does not fit into the registers is kept on the stack, which may begin anywhere: half of the vectors then
        # lie across two cache lines, and rows of a filter of 15 x 15 took 1.7 times as long in every second process.
        function.attributes.alignstack = 64
        e = Emitter(ir.IRBuilder(function.append_basic_block("entry")), element, tile(32 if element == F32 else 64))
        arguments = []
        for argument, each, name in zip(function.args, self.annotations, self.names, strict=True):
            if name in self.restrict:
                argument.add_attribute("noalias")
            arguments.append(_typed(each, e, argument))
        options = {"variant": variant} if self.has_variants else {}
        result = self.write(e, *arguments, **options)
        if not e.builder.block.is_terminated:
            e.ret(result)
        return function

    def emit_call(self, e: Emitter, *arguments: Value, variant: Any = None) -> Any:
        """Call it from another kernel."""
        result = e.builder.call(self.function(e.module, e.element, variant), [each.ir for each in arguments])
        return None if self.result is type(None) else self.result(e, result)

    def address(self, dtype: np.dtype, variant: Any = None) -> int:
        """Address of the function for this type of element, compiled or from Numba's cache."""
        return self.addresses(dtype, (variant,))[0]

    @functools.cache  # noqa: B019 - kernels live as long as the module
    def addresses(self, dtype: np.dtype, variants: tuple[Any, ...]) -> tuple[int, ...]:
        """Those of several variants, which are compiled together: that takes less time than one by one."""
        kernel = self

        @intrinsic
        def emit(typingctx, places, real):
            def codegen(context, builder, sig, args):
                element = F32 if real.dtype == types.float32 else F64
                for n, variant in enumerate(variants):
                    function = kernel.function(builder.module, element, variant)
                    builder.store(builder.ptrtoint(function, I64), builder.gep(args[0], [ir.Constant(I64, n)]))
                return context.get_dummy_value()

            return types.void(places, real), codegen

        # Numba's cache tells functions apart by name: this one's says which kernel and variants it is of
        name = "_and_".join(["address_of", *map(self.full_name, variants)])
        store = FunctionType(_store_addresses.__code__, {"emit": emit}, name)
        store.__module__ = __name__
        signature = types.void(types.CPointer(types.int64), types.CPointer(REAL[dtype]))
        function = compiled(numba.cfunc, signature, store, pipeline_class=BodyCompiler)
        self._kept.append(function)  # the code must outlive its addresses
        places = (ctypes.c_int64 * len(variants))()
        ctypes.CFUNCTYPE(None, _POINTER, _POINTER)(function.address)(ctypes.addressof(places), None)
        return tuple(places)

    def run(self, dtype: np.dtype, arguments: Sequence[Any], variant: Any = None) -> Any:
        """Call it from Python, for a test; pointers are arrays (their first element)."""
        real = REAL[dtype]
        kinds = [kind.c(real) for kind in self.kinds]
        function = ctypes.CFUNCTYPE(self.returns.c(real), *kinds)(self.address(dtype, variant))
        return function(*(each.ctypes.data if isinstance(each, np.ndarray) else each for each in arguments))


def _store_addresses(places, real):
    emit(places, real)  # noqa: F821 - among its globals: see `Kernel.addresses`


def _code(part: Any) -> str:
    """A part of a variant, in a name."""
    if isinstance(part, tuple):
        return "x".join(map(_code, part))
    return str(int(part)) if isinstance(part, bool | int) else str(part)


def vector_function(restrict: str = "", inline: bool = False) -> Callable[[Callable[..., Value | None]], Any]:
    """Make an intrinsic of a kernel: see the top of this file.

    `restrict` names, separated by blanks, the pointers to memory that no other argument points to. An `inline` kernel
    is written into its caller instead of being a function of its own.

    The intrinsic has the attributes `kernel`, `address`, `addresses`, `run` and `emit_call` of `Kernel`, the decorator
    `plain`, and `reference`, what that was given.
    """

    def decorate(write: Callable[..., Value | None]) -> Any:
        kernel = Kernel(write, restrict.split())

        def define(typingctx, *arguments):
            signature, real = kernel.signature(arguments[1:] if kernel.has_variants else arguments)
            element = F32 if real == types.float32 else F64
            if kernel.has_variants:
                signature = signature.return_type(types.int64, *signature.args)

            def codegen(context, builder, sig, args):
                result = None
                if kernel.has_variants:
                    address, *args = args
                    result = builder.call(builder.inttoptr(address, kernel.type_of(element).as_pointer()), args)
                elif inline:
                    e = Emitter(builder, element, tile(real.bitwidth))
                    typed = [_typed(each, e, arg) for each, arg in zip(kernel.annotations, args, strict=True)]
                    value = write(e, *typed)
                    result = None if value is None else value.ir
                else:
                    result = builder.call(kernel.function(builder.module, element, None), args)
                return context.get_dummy_value() if sig.return_type == types.void else result

            return signature, codegen

        define.__name__, define.__doc__, define.__module__ = write.__name__, write.__doc__, write.__module__
        # Numba binds the arguments of a call by this: it would take those of `*arguments` for one tuple
        names = ["typingctx", *["function"] * kernel.has_variants, *kernel.names]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
        define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function: Any = intrinsic(define)
        for name in ("address", "addresses", "run", "emit_call"):
            setattr(function, name, getattr(kernel, name))
        function.kernel = kernel

        def plain(sibling: Callable[..., Any]) -> Callable[..., Any]:
            """Decorator of the sibling in plain loops, which takes the same arguments, with arrays for pointers."""
            function.reference = sibling
            return sibling

        function.plain = plain
        return function

    return decorate
