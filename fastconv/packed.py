"""The weights of a prepared convolution, in the layouts that kernels have asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class PackedWeights:
    """Weights in the layouts that kernels have asked for so far, each made once whatever thread asks first."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}
        self._bounded: dict[Any, np.ndarray] = {}  # the oldest first
        self._lock = threading.Lock()

    def get(self, layout: Any, pack: Callable[[], Any]) -> Any:
        """The weights in `layout` (any hashable that says all there is to say), made by `pack` if not there yet."""
        found = self._kept.get(layout)
        if found is None:
            with self._lock:
                found = self._kept.get(layout)
                if found is None:
                    found = self._kept[layout] = pack()
        return found

    def get_within(self, most_bytes: int, layout: Any, pack: Callable[[], np.ndarray]) -> np.ndarray:
        """The same for arrays that depend on the size of the input: the last ones that fit into `most_bytes` are kept.

        The bound is over all layouts asked for this way.
        """
        found = self._bounded.get(layout)
        if found is None:
            with self._lock:
                found = self._bounded.get(layout)
                if found is None:
                    found = pack()
                    kept = {**self._bounded, layout: found}
                    while sum(array.nbytes for array in kept.values()) > most_bytes:
                        del kept[next(iter(kept))]
                    self._bounded = kept  # as a whole: others may be reading the old one
        return found
