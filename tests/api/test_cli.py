"""The `fastconv` command, run as a user runs it: a process of its own, without the simulator of the other tests."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv as fc
from fastconv import cli


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "FASTCONV_"))}
    return subprocess.run(
        [sys.executable, "-m", "fastconv", *arguments],
        capture_output=True, text=True, cwd=cwd, env=inherited | environment, timeout=300, check=False,
    )  # fmt: skip


def test_info_shows_what_fastconv_runs_on(tmp_path):
    done = run("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}
    assert {"fastconv", "python", "numpy", "numba", "llvmlite", "tbb", "numba-cuda", "cpu", "cache"} <= rows.keys()
    assert rows["fastconv"].startswith(fc.__version__)
    assert rows["numba"] == importlib.metadata.version("numba")
    assert int(rows["threads"]) >= 1
    assert "cpu" in rows["backends"].split(", ")
    assert ("cuda" in rows["backends"]) != ("no cuda backend" in rows)
    assert rows["threading layer"] in ("tbb", "omp", "workqueue")
    assert rows["cpu features"]
    assert Path(rows["cache"]).is_absolute()


def test_info_says_that_threads_run_on_tbb(tmp_path):
    if not any(importlib.metadata.distributions(name="tbb")):
        pytest.skip("tbb is not installed: it has no wheel for this platform")
    assert "threading layer   tbb" in run("info", cwd=tmp_path).stdout


def test_info_says_why_there_is_no_cuda_backend_and_what_to_install(tmp_path):
    done = run("info", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    reason = done.stdout.partition("no cuda backend")[2]
    assert "nstall" in reason or "CUDA_VISIBLE_DEVICES" in reason


def test_info_names_the_cache_that_was_asked_for(tmp_path):
    assert str(tmp_path / "kernels") in run("info", cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kernels")).stdout


def test_the_installed_script_is_the_same_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fastconv")
    assert script.load() is cli.main


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "the following arguments are required: command"),
        (["train"], 2, "invalid choice: 'train'"),
        (["demo", "--images", "cats"], 2, "invalid choice: 'cats'"),
        (["demo", "--epochs", "0"], 2, "argument --epochs: 0 is less than 1"),
        (["demo", "--seed", "x"], 2, "argument --seed: invalid integer value: 'x'"),
        (["demo", "--seed", "-1"], 2, "argument --seed: -1 is less than 0"),
    ],
)
def test_wrong_arguments_are_refused_with_usage(arguments, status, said, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version_go_to_standard_output(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0
    assert "fastconv" in capsys.readouterr().out


def test_demo_without_its_packages_names_the_extra(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("rich", "sklearn") else find_spec(name)
    )
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "fastconv demo: the demo also needs rich and scikit-learn. "
        'Install what it needs with `pip install "fastconv[demo]"`.\n'
    )


def test_demo_without_a_gpu_says_so_before_it_trains(tmp_path):
    pytest.importorskip("rich", reason="the demo extra is not installed")
    done = run("demo", "--backend", "cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "cuda backend cannot run here" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_refuses_a_picture_it_could_not_write(tmp_path, capsys):
    pytest.importorskip("rich", reason="the demo extra is not installed")
    assert cli.main(["demo", "--output", str(tmp_path / "picture.docx")]) == 1
    assert "picture.docx is no picture matplotlib can write" in capsys.readouterr().err
    assert cli.main(["demo", "--output", str(tmp_path / "missing" / "picture.png")]) == 1
    assert f"the folder {tmp_path / 'missing'} does not exist" in capsys.readouterr().err


def test_an_interrupt_ends_the_command_without_a_traceback(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_facts", lambda: interrupted(None))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "fastconv info: interrupted\n"
