"""What is installed: every module, importable without the repository, under one version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fastconv as fc

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=cwd, env=os.environ | environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_installed_package_has_its_cuda_kernels(tmp_path):
    assert python("import fastconv.cuda_kernels as kernels; print(len(kernels.__path__))", tmp_path) == "1"


def test_no_top_level_package_is_called_cuda_kernels(tmp_path):
    code = "import importlib.util; print(importlib.util.find_spec('cuda_kernels'))"
    assert python(code, tmp_path) == "None"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy of the sources so that the working tree stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastconv", "cuda_kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    python("from setuptools import build_meta; build_meta.build_wheel('dist')", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {f"fastconv/{path.relative_to(ROOT / 'fastconv')}" for path in (ROOT / "fastconv").rglob("*.py")}
    expected |= {f"fastconv/{path.relative_to(ROOT)}" for path in (ROOT / "cuda_kernels").rglob("*.py")}
    expected |= {f"fastconv/{path.relative_to(ROOT)}" for path in (ROOT / "bench").rglob("*.py")}
    expected |= {f"fastconv/{path.relative_to(ROOT)}" for path in (ROOT / "bench" / "shapes").glob("*.csv")}
    expected |= {"fastconv/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_imports_without_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import fastconv, fastconv.cuda_kernels as kernels; print(fastconv.__file__); print(kernels.__file__)"
    for line in python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines():
        assert Path(line).is_relative_to(tmp_path / "site")


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fc.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == fc.__version__


def test_no_python_is_too_new():
    """Numba's versions have limits of their own; one here would outlive them, and hold back every later Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    classifiers = set(project["classifiers"])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= classifiers
    assert list(project["classifiers"]) == sorted(project["classifiers"])
    # `make` refuses what pip would refuse
    condition = re.search(r"import sys; sys\.exit\((.*)\)'", (ROOT / "Makefile").read_text())[1]
    for version, refused in ((3, 10, 18), True), ((3, 11, 0), False), ((3, 13, 9), False), ((3, 15, 0), False):
        assert eval(condition, {"sys": SimpleNamespace(version_info=version)}) is refused


def test_type_checkers_see_the_public_names():
    """A strict type checker takes a name for exported by a typed package only where `__all__` lists it."""
    public = {name for name, value in vars(fc).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert sorted(fc.__all__) == sorted(public | {"__version__"})
