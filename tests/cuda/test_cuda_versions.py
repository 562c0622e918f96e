"""Versions of NumPy and numba-cuda: what NumPy has no more is lent to an import, and a pair that cannot work is named.

numba-cuda itself, compiling with a NumPy without `row_stack`, is in `test_cuda_codegen.py`.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType, SimpleNamespace

import numba
import numpy as np
import pytest

import fastconv as fc
from fastconv.backends import installed
from fastconv.cuda_kernels import _cuda
from fastconv.cuda_kernels.lender import Lender

_numbers = itertools.count()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that writes a module of a package and returns its name; it stands for numba-cuda's array functions."""
    package = f"stand_in_{next(_numbers)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)

    def write(source):
        (tmp_path / package / "arrays.py").write_text(source)
        importlib.invalidate_caches()
        return f"{package}.arrays"

    yield write
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def test_what_numpy_has_no_more_is_lent_for_one_import(stand_in):
    hooks = list(sys.meta_path)
    name = stand_in("import numpy as np\nstacked = np.no_longer_there\nalso = np.nor_this\n")
    Lender(name, {"no_longer_there": np.vstack, "nor_this": np.hstack}).install()
    importlib.import_module("json.tool")  # another module has nothing of it
    assert not hasattr(np, "no_longer_there")
    module = importlib.import_module(name)
    assert module.stacked is np.vstack
    assert module.also is np.hstack
    assert not hasattr(np, "no_longer_there")
    assert not hasattr(np, "nor_this")
    assert sys.meta_path == hooks
    assert module.__spec__.loader.get_source(name).startswith("import numpy")


def test_what_numpy_has_stays_its_own(stand_in):
    hooks, own = list(sys.meta_path), np.vstack
    name = stand_in("import numpy as np\nstacked = np.vstack\nlent = np.no_longer_there\n")
    Lender(name, {"vstack": np.hstack}).install()
    assert sys.meta_path == hooks, "there is nothing to lend"
    Lender(name, {"vstack": np.hstack, "no_longer_there": np.hstack}).install()
    module = importlib.import_module(name)
    assert module.stacked is own is np.vstack
    assert module.lent is np.hstack


def test_an_import_that_fails_leaves_numpy_as_it_was(stand_in):
    name = stand_in("import numpy as np\nnp.no_longer_there\nnp.what_nobody_lends\n")
    Lender(name, {"no_longer_there": np.vstack}).install()
    for _ in range(2):  # what numba-cuda does at every compilation until it succeeds
        with pytest.raises(AttributeError, match="what_nobody_lends"):
            importlib.import_module(name)
        assert not hasattr(np, "no_longer_there")


def test_nothing_is_lent_to_what_has_been_imported(stand_in):
    hooks = list(sys.meta_path)
    name = stand_in("")
    importlib.import_module(name)
    Lender(name, {"no_longer_there": np.vstack}).install()
    assert sys.meta_path == hooks


def test_a_module_that_is_not_there(stand_in):
    name = stand_in("").replace("arrays", "nothing")
    Lender(name, {"no_longer_there": np.vstack}).install()
    with pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(name)


@pytest.mark.parametrize(
    "error", [AttributeError("module 'numpy' has no attribute 'other_name'"), ImportError("cannot import name 'x'")]
)
def test_versions_that_cannot_work_are_named(monkeypatch, error):
    """Before the first kernel, with the same error from every way to ask for CUDA."""

    def refresh():
        raise error

    compiler = ModuleType("numba.cuda.descriptor")
    compiler.cuda_target = SimpleNamespace(
        typing_context=SimpleNamespace(refresh=refresh), target_context=SimpleNamespace(refresh=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "numba.cuda.descriptor", compiler)
    monkeypatch.setattr(_cuda, "SIMULATOR", False)
    monkeypatch.setattr(
        _cuda, "cuda", SimpleNamespace(implementation="NVIDIA", is_available=lambda: True, gpus=["gpu"])
    )
    versions = {"numba-cuda": "0.30.4", "numba": numba.__version__, "numpy": np.__version__}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    monkeypatch.setattr(sys.modules["fastconv.backends"], "cuda_status", _cuda.available)
    assert fc.backends() == ("cpu",)
    x, out = np.ones((1, 1, 3), np.float32), np.full((1, 1, 1), 7, np.float32)
    reason = (
        f"numba-cuda 0.30.4, numba {numba.__version__}, numpy {np.__version__} do not work together "
        f"({type(error).__name__}: {error}). Install "
    )
    for name, call in (
        ("conv1d", lambda: fc.conv1d(x, x, out=out, backend="cuda")),
        ("set_backend", lambda: fc.set_backend("cuda")),
    ):
        with pytest.raises(fc.BackendUnavailableError) as caught:
            call()
        assert str(caught.value).startswith(f"{name}: the cuda backend cannot run here: {reason}")
    assert out == 7


def test_versions_of_what_is_installed():
    found = installed("numba", "no-such-package-of-any-name", "numpy")
    assert found == f"numba {numba.__version__}, numpy {np.__version__}"
