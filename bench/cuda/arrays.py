"""Arrays of a device, whosever they are: torch's, or else CuPy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .. import results
from ..peers import Unsupported

# float32 arrays that tensor cores may multiply, as torch calls it.
TF32 = "tf32"
DTYPES = ("float32", TF32, "bfloat16", "float16", "float64")


class Library(Protocol):
    """Whose arrays everybody works on."""

    name: str

    def put(self, array: np.ndarray, dtype: str) -> Any: ...
    def normal(self, shape: Sequence[int], dtype: str, scale: float, seed: int) -> Any: ...
    def integers(self, high: int, shape: Sequence[int], seed: int) -> Any: ...
    def probabilities(self, shape: Sequence[int], dtype: str, seed: int) -> Any: ...
    def empty(self, shape: Sequence[int], dtype: str) -> Any: ...
    def poison(self, array: Any) -> None: ...
    def has_nan(self, array: Any) -> bool: ...
    def host(self, array: Any) -> np.ndarray: ...
    def distance(self, a: Any, b: Any) -> float: ...
    def mean_loss(self, logits: Any, target: Any) -> float: ...
    def synchronize(self) -> None: ...


class Torch:
    """torch's arrays; `device` is "cpu" in tests."""

    name = "torch"

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self.torch, self.device = torch, device
        if device == "cuda" and not torch.cuda.is_available():
            raise Unsupported("torch finds no CUDA device")
        torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms on the first call
        allow_tf32(torch, False)

    def _dtype(self, dtype: str) -> Any:
        return getattr(self.torch, "float32" if dtype == TF32 else dtype)

    def put(self, array: np.ndarray, dtype: str) -> Any:
        made = self.torch.from_numpy(np.array(array, order="C")).to(self.device)
        return made.to(self._dtype(dtype)) if array.dtype.kind == "f" else made

    def _generator(self, seed: int) -> Any:
        return self.torch.Generator(self.device).manual_seed(seed)

    def normal(self, shape: Sequence[int], dtype: str, scale: float, seed: int) -> Any:
        made = self.torch.empty(tuple(shape), dtype=self._dtype(dtype), device=self.device)
        return made.normal_(0, scale, generator=self._generator(seed))

    def integers(self, high: int, shape: Sequence[int], seed: int) -> Any:
        return self.torch.randint(high, tuple(shape), device=self.device, generator=self._generator(seed))

    def probabilities(self, shape: Sequence[int], dtype: str, seed: int) -> Any:
        made = self.torch.rand(tuple(shape), device=self.device, generator=self._generator(seed))
        return (made / made.sum(1, keepdim=True)).to(self._dtype(dtype))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self.torch.empty(tuple(shape), dtype=self._dtype(dtype), device=self.device)

    def poison(self, array: Any) -> None:
        array.fill_(math.nan)

    def has_nan(self, array: Any) -> bool:
        return bool(array.isnan().any())

    def host(self, array: Any) -> np.ndarray:
        made = array.detach()
        return (made.double() if made.is_floating_point() else made).cpu().numpy()

    def distance(self, a: Any, b: Any) -> float:
        """||a - b|| / ||b||"""
        difference = (a - b).flatten().float() if a.element_size() < 8 else (a - b).flatten()
        whole = b.flatten().float() if b.element_size() < 8 else b.flatten()
        return float(difference.norm() / whole.norm())

    def mean_loss(self, logits: Any, target: Any) -> float:
        """In float64, some samples at a time."""
        loss = self.torch.nn.functional.cross_entropy
        step = max(1, (1 << 26) // (logits[0].numel()))
        return sum(
            float(loss(logits[n : n + step].detach().double(), _as_double(target[n : n + step]), reduction="sum"))
            for n in range(0, len(logits), step)
        ) / (logits.numel() // logits.shape[1])

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def _as_double(target: Any) -> Any:
    return target.double() if target.is_floating_point() else target


def allow_tf32(torch: Any, allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


class Cupy:
    """CuPy's arrays; `xp` is NumPy in tests."""

    name = "cupy"

    def __init__(self, xp: Any = None) -> None:
        if xp is None:
            import cupy as xp
        self.xp = xp

    def _dtype(self, dtype: str) -> str:
        if dtype == "bfloat16":
            raise Unsupported("bfloat16 arrays need torch")
        return "float32" if dtype == TF32 else dtype

    def put(self, array: np.ndarray, dtype: str) -> Any:
        return self.xp.asarray(array.astype(self._dtype(dtype)) if array.dtype.kind == "f" else array)

    def normal(self, shape: Sequence[int], dtype: str, scale: float, seed: int) -> Any:
        made = self.xp.random.default_rng(seed).standard_normal(tuple(shape), dtype=np.float32)
        made *= np.float32(scale)
        return made.astype(self._dtype(dtype), copy=False)

    def integers(self, high: int, shape: Sequence[int], seed: int) -> Any:
        return self.xp.random.default_rng(seed).integers(0, high, tuple(shape))

    def probabilities(self, shape: Sequence[int], dtype: str, seed: int) -> Any:
        made = self.xp.random.default_rng(seed).random(tuple(shape), dtype=np.float32)
        made /= made.sum(axis=1, keepdims=True)
        return made.astype(self._dtype(dtype), copy=False)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self.xp.empty(tuple(shape), self._dtype(dtype))

    def poison(self, array: Any) -> None:
        array.fill(math.nan)

    def has_nan(self, array: Any) -> bool:
        return bool(self.xp.isnan(array).any())

    def host(self, array: Any) -> np.ndarray:
        made = array.get() if hasattr(array, "get") else np.asarray(array)
        return made.astype(np.float64) if made.dtype.kind == "f" else made

    def distance(self, a: Any, b: Any) -> float:
        return float(self.xp.linalg.norm((a - b).ravel()) / self.xp.linalg.norm(b.ravel()))

    def mean_loss(self, logits: Any, target: Any) -> float:
        xp, total = self.xp, 0.0
        step = max(1, (1 << 26) // logits[0].size)
        for n in range(0, len(logits), step):
            z = logits[n : n + step].astype("float64")
            z -= z.max(axis=1, keepdims=True)
            z -= xp.log(xp.exp(z).sum(axis=1, keepdims=True))
            y = target[n : n + step]
            picked = z * y if y.dtype.kind == "f" else xp.take_along_axis(z, xp.expand_dims(y, 1), axis=1)
            total -= float(picked.sum())
        return total / (logits.size // logits.shape[1])

    def synchronize(self) -> None:
        if hasattr(self.xp, "cuda"):
            self.xp.cuda.get_current_stream().synchronize()


def library() -> Library:
    """torch's arrays, or else CuPy's. Raises Unsupported where neither can be used."""
    reasons = []
    for make in (Torch, Cupy):
        try:
            return make()
        except Exception as error:  # a broken installation raises OSErrors and others, too
            reasons.append(f"{make.name}: {results.note_of(error)}")
    raise Unsupported(f"no array library for the GPU ({'; '.join(reasons)})")


def set_precision(arrays: Library, dtype: str) -> None:
    """Of float32, for everybody."""
    import fastconv as fc

    allow = getattr(fc, "set_float32_precision", None)
    if allow is not None:
        allow("tf32" if dtype == TF32 else "ieee")
    if isinstance(arrays, Torch):
        allow_tf32(arrays.torch, dtype == TF32)
