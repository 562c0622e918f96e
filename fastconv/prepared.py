"""Prepared convolutions: weights packed once, for a pipeline that calls them many times."""

from __future__ import annotations

from typing import Any, ClassVar

from . import arguments, conv
from .packed import PackedWeights

__all__ = ["Conv1d", "Conv2d", "Conv3d"]


class _Prepared:
    _ndim: ClassVar[int]

    def __init__(
        self, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, *,
        padding_mode: str = "zeros", activation: str | None = None, layout: str | None = None, algorithm: str = "auto",
        backend: str = "auto",
    ) -> None:  # fmt: skip
        name = type(self).__name__
        layout = arguments.LAYOUTS[self._ndim][0] if layout is None else layout
        arguments.check_choice(name, "layout", layout, arguments.LAYOUTS[self._ndim])
        arguments.check_choice(name, "activation", activation, arguments.ACTIVATIONS)
        arguments.check_choice(name, "algorithm", algorithm, arguments.ALGORITHMS)
        self.weight, self.bias = arguments.check_prepared(
            name, self._ndim, weight, bias, stride, padding, dilation, groups, padding_mode, backend
        )
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode, self.activation, self.layout = padding_mode, activation, layout
        self.algorithm, self.backend = algorithm, backend
        self._packed = PackedWeights()

    def __call__(self, input: Any, *, out: Any = None) -> Any:
        return conv.forward(
            type(self).__name__, self._ndim, input, self.weight, self.bias, self.stride, self.padding, self.dilation,
            self.groups, self.padding_mode, self.layout, self.activation, self.algorithm, out, self.backend,
            self._packed,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._packed = PackedWeights()

    def __repr__(self) -> str:
        options = ("stride", "padding", "dilation", "groups", "padding_mode", "activation", "layout", "algorithm")
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
        weight = f"weight of shape {tuple(self.weight.shape)}"
        return f"{type(self).__name__}({weight}, bias={self.bias is not None}, {said})"


class Conv1d(_Prepared):
    """`conv1d` with its weight packed once: the same bits as ``conv1d(input, weight, bias, ...)``, call after call.

    The arguments are those of `conv1d`. Weights and biases in the memory of the host are copied. The weight is packed
    at the first call with an input of a new kind and kept; where the FFT runs, so are the spectra of the weight for the
    last sizes of the input, up to 64 MiB. One object may be called by several threads at once; pickling it keeps the
    weights and packs again where it is loaded. ``op(input, out=array)`` fills an array. Raises as `conv1d`.

    >>> import numpy as np, fastconv as fc
    >>> op = fc.Conv1d(np.ones((4, 3, 3), np.float32), padding=1)
    >>> op(np.ones((2, 3, 8), np.float32)).shape
    (2, 4, 8)
    """

    _ndim = 1


class Conv2d(_Prepared):
    """`conv2d` with its weight packed once: the same bits as ``conv2d(input, weight, bias, ...)``, call after call.

    The arguments are those of `conv2d`. Weights and biases in the memory of the host are copied. The weight is packed
    at the first call with an input of a new kind and kept; where the FFT runs, so are the spectra of the weight for the
    last sizes of the input, up to 64 MiB. One object may be called by several threads at once; pickling it keeps the
    weights and packs again where it is loaded. ``op(input, out=array)`` fills an array. Raises as `conv2d`.

    >>> import numpy as np, fastconv as fc
    >>> op = fc.Conv2d(np.ones((4, 3, 3, 3), np.float32), padding=1, activation="relu")
    >>> op(np.ones((2, 3, 8, 8), np.float32)).shape
    (2, 4, 8, 8)
    """

    _ndim = 2


class Conv3d(_Prepared):
    """`conv3d` with its weight packed once: the same bits as ``conv3d(input, weight, bias, ...)``, call after call.

    The arguments are those of `conv3d`. Weights and biases in the memory of the host are copied. The weight is packed
    at the first call with an input of a new kind and kept; where the FFT runs, so are the spectra of the weight for the
    last sizes of the input, up to 64 MiB. One object may be called by several threads at once; pickling it keeps the
    weights and packs again where it is loaded. ``op(input, out=array)`` fills an array. Raises as `conv3d`.

    >>> import numpy as np, fastconv as fc
    >>> op = fc.Conv3d(np.ones((4, 3, 3, 3, 3), np.float32), padding=1)
    >>> op(np.ones((2, 3, 8, 8, 8), np.float32)).shape
    (2, 4, 8, 8, 8)
    """

    _ndim = 3
