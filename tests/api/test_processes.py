"""Threads, forks, spawned processes, threading layers, and the cache of compiled kernels: in processes of their own.

A script that dies takes no other test with it; the answers it prints are compared with what this process computes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import fastconv as fc
from helpers import output_of, run_python

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# Convolutions with the work for several threads, whole numbers, and a checksum that is exact.
WORK = """
    import json, os, sys, threading
    import numpy as np
    import numba
    import fastconv as fc

    def work(seed):
        rng = np.random.default_rng(seed)
        channels = 8 + seed
        x = rng.integers(-3, 4, (2, channels, 24, 25)).astype(np.float32)
        w = rng.integers(-3, 4, (16, channels, 3, 3)).astype(np.float32)
        y = fc.conv2d(x, w, padding=1)
        grads = fc.conv2d_backward(x, w, np.sign(y), padding=1)
        return [float((a * (1 + np.arange(a.size).reshape(a.shape) % 5)).sum(dtype=np.float64)) for a in (y, *grads)]

    def in_threads(count, rounds):
        results, errors = [None] * count, []
        start = threading.Barrier(count)
        def run(i):
            try:
                start.wait()
                for _ in range(rounds):
                    results[i] = work(i)
            except BaseException as error:
                errors.append(repr(error))
        threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        return results

    def in_fork(function):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(send, json.dumps(function()).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(send)
        with os.fdopen(receive) as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"the child ended with status {status}"
        return json.loads(text)
"""
COUNT = 4

FORK_HANGS = pytest.mark.xfail(
    reason="a child forked while another thread computes may wait for ever for locks of TBB's or Numba's that it held",
    strict=False,
)


def answer(process: subprocess.CompletedProcess):
    """What the last line printed holds: Numba prints a warning of its own before a fork."""
    return json.loads(output_of(process).splitlines()[-1])


@pytest.fixture(scope="module")
def expected():
    """What `work` gives for each seed, computed here and judged against NumPy."""
    scope: dict = {}
    lines = [line[4:] for line in WORK.splitlines()]
    exec("\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("def in_threads"))]), scope)
    return [scope["work"](seed) for seed in range(COUNT)]


# ---------------------------------------------------------------------------------------------------------------------
# Threads and forks, on every threading layer
# ---------------------------------------------------------------------------------------------------------------------

THREADS_AND_FORKS = """
    before = work(0)                                       # starts the layer
    results = {"threads": in_threads(4, 5)}
    if hasattr(os, "fork"):
        results["fork"] = in_fork(lambda: [work(i) for i in range(4)])
        results["threads in a fork"] = in_fork(lambda: in_threads(4, 2))
        results["fork of a fork"] = in_fork(lambda: in_fork(lambda: [work(i) for i in range(4)]))
    results["after"] = in_threads(4, 2)
    results["layer"] = numba.threading_layer()
    print(json.dumps(results))
"""


@pytest.mark.parametrize("layer", ["default", "omp", "workqueue"])
def test_threads_and_forks(layer, expected):
    """Several Python threads at once; a forked child, its threads and its own child; and the parent goes on."""
    process = run_python(WORK + THREADS_AND_FORKS, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="4")
    if layer == "omp" and "No threading layer could be loaded" in process.stderr:
        pytest.skip("Numba was built without OpenMP here")
    results = answer(process)
    used = results.pop("layer")
    assert used == layer or layer == "default"
    for how, values in results.items():
        assert values == expected, how


FORK_OF_BUSY_THREADS = """
    [work(i) for i in range(4)]  # compiles everything: a child of a thread that compiles would wait for it for ever
    stop = threading.Event()
    def busy(i):
        while not stop.is_set():
            work(i)
    threads = [threading.Thread(target=busy, args=(i,)) for i in range(2)]
    for thread in threads: thread.start()
    results = [in_fork(lambda: [work(i) for i in range(4)]) for _ in range(20)]
    stop.set()
    for thread in threads: thread.join()
    print(json.dumps(results))
"""


@needs_fork
@FORK_HANGS
@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_fork_while_threads_compute(layer, expected):
    """A child is made in the middle of the other threads' work, as by a server that computes while it forks."""
    process = run_python(WORK + FORK_OF_BUSY_THREADS, timeout=30, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="4")
    assert answer(process) == [expected] * 20


POOL = WORK + """
    import multiprocessing
    if __name__ == "__main__":
        results = {"here": [work(i) for i in range(4)]}
        for method in multiprocessing.get_all_start_methods():
            with multiprocessing.get_context(method).Pool(2) as pool:
                results[method] = pool.map(work, range(4), chunksize=2)
        print(json.dumps(results))
"""


def test_multiprocessing(tmp_path, expected):
    """Pools of every start method, after the parent has used its threads."""
    script = tmp_path / "pool.py"
    script.write_text("\n".join(line[4:] for line in POOL.splitlines()))
    # spawned children import the script by its path, so it must be the main program
    environment = {**os.environ, "PYTHONPATH": str(Path(fc.__file__).parent.parent), "NUMBA_NUM_THREADS": "2"}
    process = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    results = answer(process)
    assert "spawn" in results
    for how, values in results.items():
        assert values == expected, how


# ---------------------------------------------------------------------------------------------------------------------
# The cache of compiled kernels
# ---------------------------------------------------------------------------------------------------------------------

CONVOLUTION = """
    import numpy as np
    import fastconv as fc
    print(fc.conv1d(np.ones((1, 1, 5), np.float32), np.ones((1, 1, 2), np.float32)).tolist())
"""
TWOS = "[[[2.0, 2.0, 2.0, 2.0]]]"
# Where the kernel does not matter, the one that compiles fastest.
SUM = """
    import numpy as np
    import fastconv as fc
    print(fc.conv_bias_grad(np.ones((2, 3, 4, 5), np.float32)).tolist())
"""
FORTIES = "[40.0, 40.0, 40.0]"


def cached_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".nbi", ".nbc"))


def state_of(files: list[Path]) -> list[tuple[str, int]]:
    return [(path.name, path.stat().st_mtime_ns) for path in files]


def test_cache_shared_and_cut_off(tmp_path):
    """Two processes fill one empty cache at once, a third uses it, and files that were cut off are made again."""
    run = partial(run_python, CONVOLUTION, NUMBA_CACHE_DIR=str(tmp_path))
    with ThreadPoolExecutor() as pool:
        for process in [pool.submit(run) for _ in range(2)]:
            assert output_of(process.result()) == TWOS
    files = cached_files(tmp_path)
    assert {path.suffix for path in files} == {".nbi", ".nbc"}, "nothing was cached"
    state = state_of(files)
    assert output_of(run()) == TWOS
    assert state_of(cached_files(tmp_path)) == state, "a kernel was compiled although it was in the cache"
    for suffix in (".nbi", ".nbc"):  # the index of a function, and the code of one signature
        for path in files:
            if path.suffix == suffix:
                content = path.read_bytes()
                path.write_bytes(content[: len(content) // 2])
        assert output_of(run()) == TWOS, f"{suffix} files were cut off"
        state = state_of(cached_files(tmp_path))
        assert output_of(run()) == TWOS
        assert state_of(cached_files(tmp_path)) == state, "the cache was not made whole"


@pytest.fixture
def read_only_install(tmp_path):
    """A copy of the package in which no file can be made, by the superuser either: the cache's folder is a file."""
    copy = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fc.__file__).parent, copy / "fastconv", ignore=ignore)
    for folder in [copy / "fastconv", *(p for p in (copy / "fastconv").rglob("*") if p.is_dir())]:
        (folder / "__pycache__").write_text("not a folder")
    return copy


NOT_A_FOLDER = "/dev/null/home"


@pytest.mark.parametrize("home", ["writable", "unwritable"])
def test_read_only_install(home, read_only_install, tmp_path):
    """The kernels are cached in the user's folder; where that cannot be either, they are compiled in every process."""
    folder = NOT_A_FOLDER if home == "unwritable" else str(tmp_path / "home")
    process = run_python(
        SUM, cwd=tmp_path, PYTHONPATH=str(read_only_install), NUMBA_CACHE_DIR=None, HOME=folder, XDG_CACHE_HOME=None,
        LOCALAPPDATA=folder, PYTHONDONTWRITEBYTECODE="1", IPYTHONDIR=None,
    )  # fmt: skip
    assert output_of(process) == FORTIES
    if home == "writable":
        assert cached_files(tmp_path / "home"), "nothing was cached"


def test_unwritable_cache_folder():
    """NUMBA_CACHE_DIR names a place where nothing can be made."""
    assert output_of(run_python(SUM, NUMBA_CACHE_DIR="/dev/null/cache")) == FORTIES
