"""The benchmarks: shapes files, the check of peers against the reference, results files, and the pages made of them."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from fastconv import reference
from fastconv.bench import (
    accuracy,
    cases,
    checks,
    command,
    cross_entropy,
    crossover,
    first_call,
    peak,
    peers,
    plots,
    report,
    results,
    run,
    tables,
    worker,
)

HEADER = "name,batch,in_channels,size,out_channels,kernel,stride,padding,dilation,groups,count\n"
SMALL = [
    cases.ConvolutionCase("test", "grouped", 2, 4, (6, 5), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2),
    cases.ConvolutionCase("test", "depthwise", 2, 3, (9,), 3, (4,), (1,), (2,), (2,), 3),
    cases.ConvolutionCase("test", "volume", 1, 2, (4, 5, 3), 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1),
]
INDEX = cases.CrossEntropyCase("test", "index", 5, 7, (2,), "index")
SOFT = cases.CrossEntropyCase("test", "soft", 5, 7, (), "probabilities")


def exact(case, which, operands):
    """The reference's result of one pass, as a tuple."""
    if isinstance(case, cases.CrossEntropyCase):
        loss, gradient = reference.softmax_cross_entropy(operands["logits"], operands["target"])
        return (loss,) if which == "forward" else (loss, gradient)
    x, w, dy = (operands[name] for name in ("input", "weight", "grad_output"))
    options = (case.stride, tuple((p, p) for p in case.padding), case.dilation, case.groups)
    if which == "forward":
        return (reference.convolution(x, w, None, *options),)
    if which == "weight_grad":
        return (reference.convolution_weight_grad(x, case.weight_shape, dy, *options),)
    return (reference.convolution_input_grad(case.input_shape, w, dy, *options),)


EVERY_PASS = [
    pytest.param(case, which, id=f"{case.name}-{which}") for case in [*SMALL, INDEX, SOFT] for which in case.passes
]


# Shapes files


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_the_tables_of_layers_can_be_read(name):
    assert cases.network(name)


@pytest.mark.parametrize(("name", "layers"), [("resnet50", 53), ("vgg16", 13), ("mobilenet_v2", 52), ("unet", 19)])
def test_the_networks_have_all_their_layers(name, layers):
    assert sum(case.count for case in cases.network(name)) == layers


def test_the_quick_selection_names_rows_that_exist():
    assert len(cases.quick()) == sum(map(len, cases.QUICK.values()))


def test_a_case_survives_the_pipe():
    for case in (*SMALL, INDEX):
        assert cases.from_message(cases.as_message(case)) == case


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no header"),
        ("name,batch\na,1\n", "line 1: no column in_channels"),
        (HEADER, "no rows after the header"),
        (HEADER + "a,1,3,8x8,4,3x3,1,1,1,1\n", "line 2, column count: 10 values (expected 11"),
        (HEADER + "# comment\na,1,3,8x8,4,3x3,1,1,1,1,1\nb,one,3,8x8,4,3x3,1,1,1,1,1\n",
         "line 4, column batch: 'one' (expected a whole number)"),
        (HEADER + "a,0,3,8x8,4,3x3,1,1,1,1,1\n", "line 2, column batch: '0' (expected at least 1)"),
        (HEADER + "a,1,3,8x8,4,3,1,1,1,1,1\n", "line 2, column kernel: '3' has 1 dimensions, but size has 2"),
        (HEADER + "a,1,3,8x8,4,3x3,1x1x1,1,1,1,1\n", "line 2, column stride: '1x1x1' has 3 numbers (expected 1 or 2)"),
        (HEADER + "a,1,3,8x8,4,3x3,1,1,1,2,1\n", "line 2, column groups: 2 does not divide in_channels=3"),
        (HEADER + "a,1,3,2x2,4,5x5,1,0,1,1,1\n", "line 2, column kernel: '5x5' is larger than the padded input 2x2"),
        (HEADER + "a,1,3,8x8,4,3x3,1,1,1,1,1\n" * 2, "line 3, column name: 'a' is already the name of line 2"),
        ("name,batch,classes,size,target\na,8,10,-,labels\n", "line 2, column target: 'labels'"),
    ],
)  # fmt: skip
def test_a_malformed_shapes_file_names_line_and_column(tmp_path, text, said):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(cases.ShapesError) as error:
        cases.read(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


# The check of a peer's result


@pytest.mark.parametrize(("case", "which"), EVERY_PASS)
def test_the_reference_passes_the_check_and_a_wrong_element_does_not(case, which, tmp_path):
    operands = case.operands(np.dtype(np.float32))
    result = exact(case, which, operands)
    checks.check(case, which, operands, result, tmp_path)
    for at in (0, -1):
        wrong = [np.array(array, order="C") for array in result]
        flat = wrong[-1].reshape(-1)
        flat[at] += 0.01 * max(1.0, np.abs(flat).max())
        with pytest.raises(checks.Disagreement):
            checks.check(case, which, operands, wrong, tmp_path)
    with pytest.raises(checks.Disagreement):
        checks.check(case, which, operands, [np.full_like(array, np.nan) for array in result], tmp_path)


@pytest.mark.parametrize("name", ["fastconv", "fastconv channels-last", "fastconv prepared", "numpy", "reference",
                                  "torch", "torch channels-last"])  # fmt: skip
@pytest.mark.parametrize(("case", "which"), EVERY_PASS)
def test_peers_agree_with_the_reference(name, case, which, tmp_path):
    peer = peers.PEERS[name, "cpu"]
    if peer.missing():
        pytest.skip(f"{name}: {peer.missing()}")
    problem = peers.Problem(case, which, case.operands(np.dtype(np.float32)), 1, False)
    try:
        prepared = peer.prepare(problem)
    except peers.Unsupported as reason:
        pytest.skip(f"{name} {reason}")
    with prepared.context():
        checks.check(case, which, problem.operands, prepared.fetch(prepared.call()), tmp_path)


# Results


def row(peer="torch", ratio=None, **other):
    fields = {
        "machine": "test-machine", "backend": "cpu", "protocol": "alone", "network": "resnet50", "case": "conv1",
        "op": "conv2d", "which": "forward", "dtype": "float32", "batch": 4, "threads": 2, "flops": 10**9,
        "bytes": 10**8, "peak_gflops": 200.0, "copy_gbs": 20.0, "date": "2000-01-01", "commit": "0000000000",
        "version": f"{peer} 1.0",
    }  # fmt: skip
    return results.Row(peer=peer, ratio=ratio, **(fields | other))


def measured(peer, seconds, **other):
    return results.with_samples(row(peer, **other), [seconds, 1.5 * seconds, 2 * seconds], "GFLOP/s")


def example() -> list[results.Row]:
    """Made up: no machine measured this."""
    rows = []
    for case, ours, theirs, last in (("conv1", 0.01, 0.02, 0.015), ("conv2", 0.02, 0.01, 0.04)):
        rows += results.with_ratios([
            measured("fastconv", ours, case=case), measured("torch", theirs, case=case),
            measured("torch channels-last", last, case=case), row("onnxruntime", case=case, note="ended"),
        ])  # fmt: skip
    return rows


def test_what_follows_from_the_samples():
    this = measured("fastconv", 0.01)
    assert (this.best_ms, this.median_ms, this.samples) == (10.0, 15.0, 3)
    assert this.rate == pytest.approx(100.0)
    assert this.percent_of_peak == pytest.approx(50.0)
    ratios = {r.peer: r.ratio for r in example() if r.case == "conv1"}
    assert ratios == {"fastconv": 1.0, "torch": 2.0, "torch channels-last": 1.5, "onnxruntime": None}


def test_memory_below_a_megabyte_counts_as_one():
    rows = results.with_ratios([
        row("fastconv", protocol="memory", memory_mb=0.1), row("torch", protocol="memory", memory_mb=25.0),
        row("numpy", protocol="memory", memory_mb=0.0),
    ])  # fmt: skip
    assert [r.ratio for r in rows] == [1.0, 25.0, 1.0]


def test_plots_show_layers_in_the_order_of_the_network():
    names = [case.name for case in cases.network("resnet50")]
    assert plots.in_order([row(case=name) for name in reversed([*names, "mine"])]) == [*names, "mine"]


def test_a_results_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "results.csv"
    results.write(path, example())
    again = results.read(path)
    assert [r.key for r in again] == [r.key for r in example()]
    assert [r.ratio for r in again] == [r.ratio for r in example()]
    path.write_text(path.read_text().replace(",4,2,torch,", ",4,two,torch,", 1))
    with pytest.raises(results.ResultsError, match=r"results\.csv, line 3, column threads: 'two' is no number"):
        results.read(path)


def test_a_new_measurement_replaces_the_old_one():
    merged = results.merge(example(), [measured("torch", 0.5, case="conv2")])
    assert len(merged) == len(example())
    assert [r.best_ms for r in merged if (r.peer, r.case) == ("torch", "conv2")] == [500.0]


@pytest.mark.parametrize(("now", "worse"), [(1.0, 0), (0.91, 0), (0.89, 1)])
def test_a_ratio_that_fell_by_more_than_a_tenth_is_a_regression(now, worse):
    assert len(results.regressions([row(ratio=1.0)], [row(ratio=now, machine="other")])) == worse


# The report


def test_the_section_of_an_example(tmp_path):
    results.write(tmp_path / "example.csv", example())
    text = report.section(tmp_path)
    assert "| resnet50 | forward | 2 | 75.0 | 38 % | 1.00 (0.50 to 2.00) | 0.87 (0.50 to 1.50) | n/a |" in text
    assert "loses to the fastest of its peers: 1 of 2 cases" in text
    assert "| resnet50 conv2 | forward | torch | 0.50 |" in text
    assert "onnxruntime on resnet50 conv1 forward (ended)" in text
    assert "CUDA: n/a" in text


def test_the_section_has_both_protocols_the_overhead_and_the_memory(tmp_path):
    interleaved = results.with_ratios([
        measured("fastconv", 0.01, case="conv1", protocol="interleaved"),
        measured("torch", 0.03, case="conv1", protocol="interleaved"),
    ])  # fmt: skip
    small = [measured("fastconv", 1e-5, network="small"), measured("torch", 2e-5, network="small")]
    memory = results.with_ratios([
        row("fastconv", protocol="memory", memory_mb=10.0), row("torch", protocol="memory", memory_mb=25.0),
    ])  # fmt: skip
    results.write(tmp_path / "example.csv", [*example(), *interleaved, *small, *memory])
    text = report.section(tmp_path)
    assert "| alone | forward | 1 | 2.00 | " in text
    assert "| interleaved | forward | 1 | 3.00 | " in text
    assert "| conv1 | forward | 10.0 | 20.0 |" in text
    assert "| resnet50 | float32 | forward | torch 2.50 | 1 | 10.0 |" in text
    assert "| small |" not in text


def test_plots_of_an_example(tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    growth = [measured("torch", 0.01 * n, network="growth_batch", case=f"batch={n}") for n in (1, 2, 4)]
    results.write(tmp_path / "example.csv", example() + growth)
    drawn = {path.name for path in plots.draw(results.Results(tmp_path / "example.csv"), tmp_path, ["svg"])}
    tag = "cpu-float32-2threads"
    assert drawn == {f"example-{n}.svg" for n in (f"roofline-{tag}", f"ratios-resnet50-{tag}", "growth-batch-forward")}
    assert "slope 1.00" in (tmp_path / "example-growth-batch-forward.svg").read_text()


def test_slope_of_a_power_law():
    assert plots.slope([1, 2, 4, 8], [5, 20, 80, 320]) == pytest.approx(2)


@pytest.mark.parametrize(("page", "made"), [(report.PAGE, report.section), (report.README, report.short_section)],
                         ids=["performance.md", "README.md"])  # fmt: skip
def test_the_pages_are_those_of_the_results(page, made):
    text = page.read_text()
    assert tables.replaced(text, report.COMMAND, made()) == text, "run `make bench-report`"


def test_the_short_section_has_the_better_layout_of_torch_and_one_picture(tmp_path):
    few = [row("fastconv", 1.0, case="x", dtype="float64"), row("torch", 9.0, case="x", dtype="float64")]
    results.write(tmp_path / "example.csv", [*example(), *few])
    picture = tmp_path / "example-roofline-cpu-float32-2threads.svg"
    page = tmp_path / "docs" / "page.md"
    assert "![" not in report.short_section(tmp_path, page)
    picture.write_text("<svg/>")
    text = report.short_section(tmp_path, page)
    assert "| network | layers | forward |" in text
    assert "| resnet50 | 2 | 0.87 |" in text  # of 1.5 and 0.5
    assert "float32, 2 threads; fastconv 1.0, torch 1.0, torch channels-last 1.0; 2000-01-01." in text
    assert "Of these 2 cases (a layer and a pass) 1 are slower than the fastest of torch and onnxruntime." in text
    assert text.count("![") == 1
    assert "](../example-roofline-cpu-float32-2threads.svg)" in text


def test_a_folder_without_rows_has_no_tables(tmp_path):
    assert report.section(tmp_path) == report.short_section(tmp_path) == report.NOTHING


def test_rows_of_another_folder_make_a_page_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda machine, folder, suffixes: [])
    results.write(tmp_path / "mine.csv", example())
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith("# Measured here\n\nTimes as fast as PyTorch")
    assert "## mine: cpu, float32, 2 threads" in text
    assert report.main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err


PAGES_OF_COMMANDS = [
    (accuracy.DOCUMENT, accuracy.COMMAND),
    *((crossover.page(name), crossover.command(name)) for name in ("fft", "winograd")),
    *((cross_entropy.page(name), cross_entropy.command(name)) for name in cross_entropy.TABLES),
]


@pytest.mark.parametrize(("page", "written_by"), PAGES_OF_COMMANDS, ids=[name for _, name in PAGES_OF_COMMANDS])
def test_the_pages_have_a_table_where_a_command_puts_one(page, written_by):
    text = page.read_text(encoding="utf-8")
    assert "\nnew\n" in tables.replaced(text, written_by, "new")
    _, _, rest = text.partition(tables.begin(written_by))
    assert "\n| --- |" in rest.partition(tables.END)[0]


# The command, and what becomes of failures


def test_unknown_peers_are_refused():
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    with pytest.raises(command.UsageError, match="'tensorflow' is none of fastconv"):
        command._peers(parser.parse_args(["--peer", "tensorflow"]))
    assert command._peers(parser.parse_args(["--peer", "numpy"])) == ["fastconv", "numpy"]


def test_the_parts_of_the_readme_can_be_measured():
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert list(command._runs(parser.parse_args(["--quick"]))) == [parser.parse_args(["--quick"])]
    runs = list(command._runs(parser.parse_args(["--readme", "all", "--threads", "1"])))
    assert len(runs) == sum(map(len, command.README.values()))
    for one in runs:
        assert "torch" in command._peers(one)
        steps = list(command._plan(one))
        assert {settings.threads for case, settings, _ in steps if case.network != "growth_threads"} == {1}
    (memory,) = command._runs(parser.parse_args(["--readme", "memory"]))
    names = [case.name for case, settings, _ in command._plan(memory) if settings.dtype == "float64"]
    assert names == ["conv1", *(f"layer{n}.0.conv{k}" for n in range(1, 5) for k in (2, 3))]


def test_the_commands_of_the_page_can_be_given():
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    text = (report.FOLDER / "README.md").read_text()
    found = re.findall(r"`fastconv bench (--[^`]+)`", text) + re.findall(r'ARGS="(--[^"]+)"', text)
    given = [shlex.split(options) for options in found]
    assert len(given) > 8
    for options in given:
        if options != ["--help"]:
            one = parser.parse_args(options)
            assert one.shapes or all(list(command._plan(each)) for each in command._runs(one)), options


@pytest.mark.slow
def test_a_first_call_is_compiled_and_the_next_process_finds_it(tmp_path):
    call = first_call.CALLS["softmax_cross_entropy"]
    compiled = first_call.seconds(call, "float32", str(tmp_path))[1]
    files = set(tmp_path.rglob("*.nbc"))
    assert files
    assert first_call.seconds(call, "float32", str(tmp_path))[1] < compiled
    assert set(tmp_path.rglob("*.nbc")) == files
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        first_call.seconds("1 / 0", "float32", str(tmp_path))


def test_what_does_not_run_the_workers_simulator(monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    passive, default = run.environment(2, passive=True), run.environment(2, passive=False)
    assert passive["OMP_WAIT_POLICY"] == "passive"
    assert passive["OMP_NUM_THREADS"] == default["OMP_NUM_THREADS"] == "2"
    assert "OMP_WAIT_POLICY" not in default
    assert "NUMBA_ENABLE_CUDASIM" not in default


def test_a_process_that_dies_or_hangs_is_reported_and_another_one_started(tmp_path, monkeypatch):
    process = run.Process("test", run.Settings(timeout=60), tmp_path)
    assert process.ask("forget") == {}
    assert process.ask("measure", jobs=[["forward", "nobody"]], seconds=1)["failed"].startswith("KeyError")
    process._process.kill()
    with pytest.raises(run.WorkerDied, match="signal SIGKILL"):
        process.ask("forget")
    assert process.ask("forget") == {}
    process.close()
    monkeypatch.setattr(sys, "executable", "/bin/sleep")  # never answers: it knows no -m, and ends
    with pytest.raises(run.WorkerDied):
        process.ask("forget")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_peak(dtype):
    """That it is near what the processor can do, no test of this length can say."""
    assert 1 < peak.microkernel_rate(dtype, seconds=0.001) < 1e5


def test_a_peak_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(run.Process, "ask", lambda *_, **__: {"failed": "TypeError: contract()"})
    with run.Session(run.Settings(rounds=1)) as session, pytest.raises(RuntimeError, match=r"peak .* contract\(\)"):
        session._peak(copy=False)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["alone", "interleaved"])
def test_a_run_measures_every_peer(protocol):
    with run.Session(run.Settings(protocol=protocol, rounds=2, seconds=0.01)) as session:
        rows = session.measure(SMALL[0], ["forward", "input_grad"], ["fastconv", "numpy", "scipy correlate"])
    assert [(r.which, r.peer) for r in rows] == [
        (which, peer) for which in ("forward", "input_grad") for peer in ("fastconv", "numpy")
    ]
    assert [r.note for r in rows] == [""] * 4
    assert all(r.ratio and r.peak_gflops and r.samples >= 2 for r in rows)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of a process can be set back on Linux alone")
def test_memory_is_that_of_result_and_scratch():
    case = cases.ConvolutionCase("test", "wide", 4, 3, (256, 256), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    with run.Session(run.Settings(protocol="memory")) as session:
        ours, numpy = session.measure(case, ["forward"], ["fastconv", "numpy"])
    assert (ours.note, numpy.note) == ("", "")
    result, windows = 4 * 64 * 256 * 256 * 4 / 1e6, 4 * 27 * 256 * 256 * 4 / 1e6
    slack = 1.0  # Linux counts pages in batches for each CPU and thread, and adds them up later
    assert result - slack <= ours.memory_mb <= result + 8
    assert result + windows - slack <= numpy.memory_mb
    assert numpy.ratio == pytest.approx(numpy.memory_mb / ours.memory_mb)


class ScriptedProcess:
    """Answers as a worker would: of the peers, onnxruntime disagrees, JAX dies when it is timed, torch works."""

    def __init__(self, side, settings, cache):
        self.side, self.prepared, self.running = side, [], True

    def ask(self, do, **job):
        if do == "prepare":
            return {"failed": "disagrees: at (0,)"} if job["peer"] == "onnxruntime" else {"version": "1.0"}
        if do == "measure":
            if job["jobs"][0][1].startswith("jax"):
                self.prepared = []
                raise run.WorkerDied("the process ended with signal SIGSEGV")
            return {"samples": [[0.01 if peer == "fastconv" else 0.02] for _, peer in job["jobs"]]}
        return {"gflops": 100.0} if do == "peak" else {}

    def settle(self):
        pass

    def close(self, kill=False):
        pass


def test_a_peer_that_fails_or_disagrees_is_reported_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(run, "Process", ScriptedProcess)
    with run.Session(run.Settings(rounds=2)) as session:
        rows = session.measure(SMALL[0], ["forward"], ["fastconv", "onnxruntime", "jax", "jax channels-last", "torch"])
    assert {r.peer: (r.ratio, r.samples) for r in rows if not r.note} == {"fastconv": (1.0, 2), "torch": (2.0, 2)}
    assert {r.peer: r.note for r in rows if r.note} == {
        "onnxruntime": "disagrees: at (0,)",
        "jax": "the process ended with signal SIGSEGV",
        "jax channels-last": "its process died with another peer",
    }


def test_the_sides_take_turns_and_each_round_begins_with_another_one(tmp_path):
    session = run.Session(run.Settings())
    session._cache = tmp_path
    passes = ("forward", "input_grad")
    keys = [(which, peer) for peer in ("fastconv", "torch", "torch channels-last") for which in passes]
    first, second = ([peer for ((_, peer),) in session._turns(keys, turn)] for turn in (0, 1))
    assert first == ["fastconv"] * 2 + ["torch"] * 2 + ["torch channels-last"] * 2
    assert second == ["torch", "torch channels-last", "torch channels-last", "torch", "fastconv", "fastconv"]
    session.settings = run.Settings(protocol="interleaved")
    assert session._turns(keys, 0) == [[k for k in keys if k[0] == which] for which in passes]


def test_a_worker_reports_a_result_that_disagrees(tmp_path, monkeypatch):
    case = SMALL[0]

    def prepare(problem):
        wrong = exact(case, "forward", problem.operands)[0] + 1
        return peers.Prepared(lambda: wrong, lambda result: (result,))

    monkeypatch.setitem(peers.PEERS, ("wrong", "cpu"), peers.Peer("wrong", "cpu", ("numpy",), "numpy", prepare))
    answer = worker.Worker(1, False, tmp_path).answer(
        {"do": "prepare", "case": cases.as_message(case), "which": "forward", "dtype": "float32", "peer": "wrong",
         "backend": "cpu"}
    )  # fmt: skip
    assert answer["failed"].startswith("disagrees: ")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whether the threads of a process sleep on Linux alone")
def test_a_side_is_waited_for_until_its_threads_sleep(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SETTLE_TIMEOUT", 0.3)
    process = run.Process("test", run.Settings(timeout=60), tmp_path)
    assert process.ask("forget") == {}
    process.settle()
    monkeypatch.setattr(run, "_runs", lambda task: True)
    with pytest.raises(run.WorkerDied, match=r"its threads still ran 0\.3 s after the last call"):
        process.settle()
    process.close()


def test_every_operation_has_its_suite():
    folder = Path(report.FOLDER)
    operations = {path.stem for path in (folder.parent / "tests").glob("*/test_*.py")}
    suites = {path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")}
    assert suites == {"convolution", "softmax_cross_entropy"}
    assert {f"test_{name}" for name in suites} <= operations
