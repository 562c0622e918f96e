"""NumPy functions that are no more, for a module of another package that still names them when it is imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["Lender"]


@contextlib.contextmanager
def _lent(functions: dict[str, Any]) -> Iterator[None]:
    vars(np).update(functions)
    try:
        yield
    finally:
        for name in functions:
            delattr(np, name)


class Lender:
    """An import hook: while `module` is imported, and no longer, NumPy has those `functions` that it has not itself.

    numba-cuda imports its array functions when it compiles for the first time, whoever asks for that: so it is the
    import that lends, and no call.
    """

    def __init__(self, module: str, functions: dict[str, Any]) -> None:
        self.module = module
        self.functions = {name: function for name, function in functions.items() if name not in vars(np)}

    def install(self) -> None:
        if self.functions and self.module not in sys.modules:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the other finders find, with a loader that lends."""
        if name != self.module:
            return None
        others = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_with_loan(module: Any) -> None:
                with _lent(self.functions):
                    execute(module)
                sys.meta_path.remove(self)

            spec.loader.exec_module = execute_with_loan  # type: ignore[method-assign]
        return spec
