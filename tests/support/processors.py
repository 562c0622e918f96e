"""Processors other than this one, which runs their instructions too: what Numba compiles for them, here.

Their code goes into Numba's cache, which tells processors apart: it is compiled once for all tests, and not again by
the next run of the tests.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from helpers import SUPPORT, run_python

_SSE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+cmov,+popcnt"


@dataclass(frozen=True)
class Processor:
    name: str  # LLVM's
    features: str
    vector_bytes: int

    def lanes(self, itemsize: int) -> int:
        return self.vector_bytes // itemsize


PROCESSORS = {
    "avx2": Processor("haswell", f"{_SSE},+avx,+avx2,+fma", 32),
    "avx": Processor("sandybridge", f"{_SSE},+avx", 32),  # without multiply-adds
    "sse": Processor("nehalem", _SSE, 16),
}

needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")


def run_on(processor: str, code: str, *arguments: str, path: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`helpers.run_python` with the vectors and tiles of a processor of `PROCESSORS`."""
    chosen = PROCESSORS[processor]
    return run_python(
        code, *arguments, path=[SUPPORT, *path], timeout=900, NUMBA_CPU_NAME=chosen.name,
        NUMBA_CPU_FEATURES=chosen.features,
    )  # fmt: skip
