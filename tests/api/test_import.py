"""Importing fastconv is cheap: it compiles nothing, starts no threads, and leaves CUDA and other libraries alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import json

import pytest

import fastconv as fc
from helpers import output_of, run_python

# What an import costs beyond NumPy, which the caller has imported anyway. It takes a twentieth of this.
MOST_SECONDS = 0.5

PROBE = """
    import json, pathlib, sys, threading, time
    import numpy
    already = set(sys.modules)
    begin = time.perf_counter()
    {statement}
    seconds = time.perf_counter() - begin
    new = set(sys.modules) - already
    status = pathlib.Path("/proc/self/status")  # counts the threads that Python does not know of, on Linux
    lines = status.read_text().splitlines() if status.exists() else []
    threads = max([threading.active_count(), *(int(line.split()[1]) for line in lines if line.startswith("Threads:"))])
    print(json.dumps({{"seconds": seconds, "modules": sorted(new), "threads": threads}}))
"""
FOREIGN = ("torch", "cupy", "jax", "ml_dtypes", "matplotlib", "rich", "sklearn", "scipy", "hypothesis", "llvmlite")


def violations(statement: str) -> set[str]:
    """What an import statement does that it should not, in the best of two fresh processes."""
    runs = [json.loads(output_of(run_python(PROBE.format(statement=statement), OMP_NUM_THREADS="1",
                                            OPENBLAS_NUM_THREADS="1"))) for _ in range(2)]  # fmt: skip
    found = set()
    if min(run["seconds"] for run in runs) > MOST_SECONDS:
        found.add("slow")
    modules = set(runs[0]["modules"])
    if any(name == "numba" or name.startswith("numba.") for name in modules):
        found.add("numba")
    if any(name.startswith("numba.cuda") for name in modules):
        found.add("cuda")
    if modules & set(FOREIGN):
        found.add("foreign")
    if runs[0]["threads"] > 1:
        found.add("threads")
    return found


def test_dir_shows_the_public_names():
    """In a fresh process, where nothing has been used: names that are loaded when they are asked for included."""
    code = """
        import fastconv as fc
        shown = dir(fc)
        print(sorted(set(shown) ^ set(fc.__all__)))
        print(all(hasattr(fc, name) for name in shown))
    """
    hidden, there = output_of(run_python(code)).splitlines()
    dunders = ast.literal_eval(hidden)
    assert all(name.startswith("__") and name.endswith("__") for name in dunders)
    assert {"__all__", "__doc__", "__file__", "__name__", "__path__", "__spec__"} <= set(dunders)
    assert there == "True"


def test_dir_shows_no_module():
    for module in ("conv", "loss", "arguments", "backends", "cpu", "cuda_kernels", "jitted"):
        importlib.import_module(f"fastconv.{module}")
    assert not [name for name in dir(fc) if inspect.ismodule(getattr(fc, name))]


def test_import_is_cheap():
    """Without Numba nothing can be compiled."""
    assert violations("import fastconv") == set()


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import fastconv.cuda_kernels._cuda", {"numba", "cuda", "foreign"}),
        ("import numba; numba.njit('f8(f8)')(lambda x: x)", {"numba", "foreign"}),
        ("import hypothesis", {"foreign"}),
        ("time.sleep(0.6)", {"slow"}),
        ("threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", {"threads"}),
    ],
)
def test_the_check_can_fail(statement, found):
    assert violations(statement) - {"slow"} == found - {"slow"}
    if "slow" in found:
        assert "slow" in violations(statement)
