"""What the tests of convolution share: arrays of every dtype and memory layout, public functions by dimension."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

import fastconv as fc

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SUPPORT = str(Path(__file__).parent)  # for processes of their own that import what the tests share
LAYOUTS = {1: ("NCL", "NLC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES.get(dtype, dtype))


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype | str = "float64") -> np.ndarray:
    """Small whole numbers, on which every sum of the tests is exact in any order."""
    return rng.integers(-3, 4, shape).astype(DTYPES.get(dtype, dtype))


def channels_last(array: np.ndarray) -> np.ndarray:
    """(N, C, *S) as a contiguous (N, *S, C)."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def channels_first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 1)


def functions(ndim: int) -> SimpleNamespace:
    """The public functions of this number of dimensions, under names without it."""
    return SimpleNamespace(
        conv=getattr(fc, f"conv{ndim}d"),
        weight_grad=getattr(fc, f"conv{ndim}d_weight_grad"),
        input_grad=getattr(fc, f"conv{ndim}d_input_grad"),
        backward=getattr(fc, f"conv{ndim}d_backward"),
        transpose=getattr(fc, f"conv_transpose{ndim}d"),
        bias_grad=fc.conv_bias_grad,
    )


def strided(array: np.ndarray) -> np.ndarray:
    """The same values, every second element of a larger array in each dimension."""
    larger = np.full([2 * n + 1 for n in array.shape], 77, array.dtype)
    view = larger[(slice(1, None, 2),) * array.ndim]
    view[...] = array
    return view


def transposed(array: np.ndarray) -> np.ndarray:
    """The same values in the opposite order of memory."""
    return np.asfortranarray(array)


def reversed_(array: np.ndarray) -> np.ndarray:
    """The same values, all strides negative."""
    flip = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[flip])[flip]


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same values at an address that is no multiple of the item size."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    view = room[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def fortran_last(array: np.ndarray) -> np.ndarray:
    """(N, C, *S) values held channels-last in memory, as torch's channels_last format."""
    return channels_first(channels_last(array)) if array.ndim > 2 else np.asfortranarray(array)


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "strided": strided,
    "transposed": transposed,
    "reversed": reversed_,
    "read_only": read_only,
    "misaligned": misaligned,
    "channels_last_memory": fortran_last,
}


def run_python(
    code: str, *arguments: str, path: Sequence[str] = (), cwd: Path | None = None, timeout: float = 120,
    **environment: str | None,
):  # fmt: skip
    """Run `code` in an interpreter of its own that imports the same fastconv, and return the completed process.

    It may import from the folders of `path` too, such as `SUPPORT` and that of the test.

    Without the simulator and the number of threads of the test run; `environment` sets variables, None unsets one.
    """
    variables = dict(os.environ)
    for name in ("NUMBA_ENABLE_CUDASIM", "NUMBA_NUM_THREADS", "FASTCONV_BACKEND"):
        variables.pop(name, None)
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(fc.__file__).parent.parent), *path])
    for name, value in environment.items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), *arguments], env=variables, cwd=cwd, timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def output_of(process: subprocess.CompletedProcess) -> str:
    """What a process printed; fail with its error output if it failed."""
    assert process.returncode == 0, f"exit status {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process.stdout.strip()
