"""What the first call of each function costs: seconds in a new process, with an empty cache and with a filled one.

    python -m bench.first_call            # prints the table; about three minutes

Kernels are compiled when they are first called, and kept on disk. Each line has a cache folder of its own, so that
nothing is shared with the lines before; in use, functions share kernels, and later ones cost less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from . import tables

# What is called, on arrays so small that compiling is all the time there is.
SETUP = """
import json, time
begin = time.perf_counter()
import numpy as np
import fastconv as fc
imported = time.perf_counter() - begin
real = np.{dtype}
rng = np.random.default_rng(0)
x, w, dy = (rng.standard_normal((2, 16, 28, 28)).astype(real), rng.standard_normal((16, 16, 3, 3)).astype(real),
            rng.standard_normal((2, 16, 28, 28)).astype(real))
d = rng.standard_normal((16, 1, 3, 3)).astype(real)
z, t = rng.standard_normal((32, 10)).astype(real), rng.integers(10, size=32)
begin = time.perf_counter()
{call}
print(json.dumps([imported, time.perf_counter() - begin]))
"""
CALLS = {
    "conv2d": "fc.conv2d(x, w, padding=1, algorithm='direct')",
    "conv2d, Winograd": "fc.conv2d(x, w, padding=1, algorithm='winograd')",
    "conv2d, FFT": "fc.conv2d(x, w, padding=1, algorithm='fft')",
    "conv2d, depthwise": "fc.conv2d(x, d, padding=1, groups=16)",
    "conv2d_weight_grad": "fc.conv2d_weight_grad(x, w.shape, dy, padding=1)",
    "conv2d_input_grad": "fc.conv2d_input_grad(x.shape, w, dy, padding=1, algorithm='direct')",
    "conv2d_backward": "fc.conv2d_backward(x, w, dy, padding=1)",
    "softmax_cross_entropy": "fc.softmax_cross_entropy(z, t)",
    "softmax_cross_entropy_with_grad": "fc.softmax_cross_entropy_with_grad(z, t)",
}
# A training step: what the calls above cost when they come in one process.
CALLS["all of these"] = "\n".join(CALLS.values())
# What a process pays for Numba before it compiles or loads anything.
NUMBA = """from numba.core.registry import cpu_target
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()"""
DTYPES = ("float32", "float64")


def seconds(call: str, dtype: str, cache: str) -> tuple[float, float]:
    """Of importing fastconv and of the call, in a new process with the given cache folder."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(call=call, dtype=dtype)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{call} failed:\n{done.stderr}")
    imported, called = json.loads(done.stdout)
    return imported, called


def main() -> None:
    imports = []
    print(*tables.head(["first call", "dtype", "compiled, s", "from the cache, s"], words=2), sep="\n")
    for dtype in DTYPES:
        for name, call in CALLS.items():
            with tempfile.TemporaryDirectory(prefix="fastconv-first-call-") as cache:
                cold = seconds(call, dtype, cache)
                warm = min((seconds(call, dtype, cache) for _ in range(2)), key=lambda pair: pair[1])
            imports += [cold[0], warm[0]]
            print(tables.row([name, dtype, f"{cold[1]:.2f}", f"{warm[1]:.3f}"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="fastconv-first-call-") as cache:
        numba = min(seconds(NUMBA, "float32", cache)[1] for _ in range(3))
    print(f"\n`import fastconv`: {min(imports):.2f} s at best, NumPy included.")
    print(f"Of every first call, importing and setting up Numba takes {numba:.2f} s.")


if __name__ == "__main__":
    main()
