"""The compiler of task bodies: Numba's, without the work that these functions do not need.

They are loops over integers and pointers: no closures, no objects, no exceptions. Two classes, for Numba's
`pipeline_class`: `BodyCompiler`, and `HelperCompiler` for functions that only bodies call. With these and
`without_collector` a first convolution takes 3.3 s; it was 5.1 s with the compiler that Numba has for any function.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from llvmlite.binding import Linkage
from numba import types
from numba.core import typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager

from .records import RecordPointer

# Of the passes of Numba's own compiler, those that change anything in such functions, in the same order
_PASSES = {
    untyped_passes.TranslateByteCode: "analyzing bytecode",
    untyped_passes.FixupArgs: "fix up args",
    untyped_passes.IRProcessing: "processing IR",
    untyped_passes.InlineInlinables: "inline inlinable functions",
    untyped_passes.ReconstructSSA: "ssa",
    typed_passes.NopythonTypeInference: "nopython frontend",
    typed_passes.PreLowerStripPhis: "remove phis nodes",
    typed_passes.IRLegalization: "ensure IR is legal prior to lowering",
    typed_passes.AnnotateTypes: "annotate types",
    typed_passes.NativeLowering: "native lowering",
    typed_passes.NoPythonBackend: "nopython mode backend",
}

_SCALARS = (types.Integer, types.Float, types.Boolean, types.CPointer, RecordPointer)
_signatures: dict[Any, Any] = {}  # what `_Typing` has found out: by function and types of its arguments


class _Typing:
    """Numba's typing context, which asks only once what an operator or an intrinsic makes of some scalar types.

    For every ``+`` Numba tries a dozen templates, NumPy's ufuncs among them: 0.2 ms, in all a tenth of the time.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, func: Any, args: Any, kws: Any) -> Any:
        known = isinstance(func, types.Function) and not kws and all(isinstance(arg, _SCALARS) for arg in args)
        if not known:
            return self._context.resolve_function_type(func, args, kws)
        key = func, tuple(args)
        signature = _signatures.get(key)
        if signature is None:
            signature = self._context.resolve_function_type(func, args, kws)
            if signature is not None:
                _signatures[key] = signature
        return signature


class _Shared(JITCodeLibrary):
    """Code whose modules may have functions of LLVM in common, which are there once when they are linked."""

    def create_ir_module(self, name: str) -> Any:
        module = super().create_ir_module(name)
        module.shares_functions = True  # see `vector.call.Kernel.function`
        return module


class _Whole(_Shared):
    """The code of a body and of all it calls, which nothing else calls by name, so LLVM may adapt it to its callers."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal
        super()._optimize_final_module()


class BodyCompiler(CompilerBase):
    """The passes that a body needs."""

    library = _Whole

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.typingctx = _Typing(self.state.typingctx)

    def define_pipelines(self) -> list[PassManager]:
        self.state.library = self.library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        passes = PassManager("fastconv")
        for each, purpose in _PASSES.items():
            passes.add_pass(each, purpose)
        passes.finalize()
        return [passes]


class _Part(_Shared):
    """Code that is only ever linked into that of bodies: it is optimised and made machine code there, not here too."""

    def _optimize_functions(self, ll_module: Any) -> None:
        pass

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    @property
    def codegen(self) -> _Part:
        return self

    def set_env(self, env_name: str, env: Any) -> None:
        """There is no machine code yet that would want to know the environment, where Python objects are."""


class HelperCompiler(BodyCompiler):
    """The same for a function whose callers are all compiled code."""

    library = _Part


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """While a function is compiled, let cyclic garbage be.

    Half a million objects are made and most of them kept: the collector looks them through 480 times for a first
    convolution, which takes 0.3 s and saves 24 MB of 220.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
