"""The benchmarks of a GPU, from the first check to the last row, on arrays and clocks of the host."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastconv import reference
from fastconv.bench import cases, checks, results
from fastconv.bench import cuda as bench
from fastconv.bench import cuda_predictions as predictions
from fastconv.cuda_kernels import implicit_gemm, softmax_rows, tiles
from helpers import output_of, run_python

ROOT = Path(__file__).parents[2]
GROUPED = cases.ConvolutionCase("test", "grouped", 2, 4, (6, 5), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2)
DEPTHWISE = cases.ConvolutionCase("test", "depthwise", 2, 3, (9,), 3, (4,), (1,), (2,), (2,), 3)
VOLUME = cases.ConvolutionCase("test", "volume", 1, 2, (4, 5, 3), 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1)
INDEX = cases.CrossEntropyCase("test", "index", 5, 7, (2,), "index")
SOFT = cases.CrossEntropyCase("test", "soft", 5, 7, (), "probabilities")
EVERY = [GROUPED, DEPTHWISE, VOLUME, INDEX, SOFT]
EVERY_PASS = [pytest.param(case, which, id=f"{case.name}-{which}") for case in EVERY for which in case.passes]


class HostTimer:
    """The clock of the host, for calls that have ended when they return."""

    def host(self, call, count):
        return min(self.device(call, count, 0.0))

    def device(self, call, count, host):
        samples = []
        for _ in range(count):
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
        return samples


@pytest.fixture(params=["torch", "cupy"])
def arrays(request):
    if request.param == "cupy":
        return bench.Cupy(np)  # which CuPy's interface is
    pytest.importorskip("torch")
    return bench.Torch("cpu")


@pytest.fixture
def said():
    return []


@pytest.fixture
def a_run(arrays, tmp_path, said):
    names = ("fastconv", "fastconv channels-last", "torch", "torch channels-last", "cupy", "liger")
    return bench.Bench(
        arrays, HostTimer(), "test-gpu", tmp_path / "test-gpu.csv", time.monotonic() + 600, batch=2, least_logits=1,
        samples=2, rounds=2, peaks={"copy": 100.0, "float32": 1000.0}, peers=names, tell=said.append,
    )  # fmt: skip


JOBS = [(case, which, "float32") for case in (GROUPED, INDEX) for which in case.passes]


def measure(a_run, planned, **options):
    """Do the measurements alone; return how many gave rows."""
    bench.run(a_run, bench.measurements(a_run, ["float32"], planned)[2:], **options)
    return a_run.done


def test_the_whole_run(a_run, said):
    assert measure(a_run, JOBS) == len(JOBS)
    assert a_run.failures == []
    rows = results.read(a_run.output)
    ours = [row for row in rows if row.peer == "fastconv"]
    assert [(row.case, row.which) for row in ours] == [(case.name, which) for case, which, _ in JOBS]
    assert all(row.best_ms > 0 and row.samples == 4 and row.ratio == 1 and row.backend == "cuda" for row in ours)
    assert ours[0].flops == GROUPED.flops("forward")
    assert ours[0].percent_of_peak == pytest.approx(ours[0].rate / 10, rel=1e-4)
    assert ours[-1].percent_of_peak == pytest.approx(ours[-1].rate, rel=1e-4)  # GB/s of 100
    others = {row.peer for row in rows} - {"fastconv"}
    expected = {"fastconv channels-last"}
    if a_run.arrays.name == "torch":
        expected |= {"torch", "torch channels-last"}
    assert others == expected
    assert len(said) == len(JOBS)
    assert "GB/s" in said[0]
    assert ("| torch" in said[0]) == (a_run.arrays.name == "torch")


def test_a_second_run_replaces_the_rows(a_run):
    measure(a_run, JOBS[:1])
    count = len(results.read(a_run.output))
    measure(a_run, JOBS[:2])
    assert len(results.read(a_run.output)) == 2 * count


def peer_that(change):
    def prepare(problem):
        prepared = bench._fastconv(problem)
        return bench.Prepared(lambda: change(prepared.call()))

    return prepare


def raise_error(result):
    raise MemoryError("no memory left\nat all")


def off_by_one(result):
    result[(-1,) * result.ndim] += 1
    return result


@pytest.mark.parametrize(
    ("change", "note"), [(raise_error, "MemoryError: no memory left"), (off_by_one, "Disagreement: element")]
)
def test_a_failure_is_a_row_and_the_run_goes_on(change, note, a_run, said, monkeypatch):
    monkeypatch.setitem(bench.PEERS, "broken", peer_that(change))
    a_run.peers = ("fastconv", "broken")
    assert measure(a_run, JOBS[:3]) == 3
    rows = [row for row in results.read(a_run.output) if row.peer == "broken"]
    assert len(rows) == len(a_run.failures) == 3
    assert all(row.note.startswith(note) and row.best_ms is None for row in rows)
    assert all(row.best_ms for row in results.read(a_run.output) if row.peer == "fastconv")
    assert sum(text.startswith("FAILED") for text in said) == 3


def test_operands_that_do_not_fit_are_a_failure_and_the_run_goes_on(a_run, monkeypatch):
    made = a_run.arrays.normal

    def normal(shape, dtype, scale, seed):
        if tuple(shape) == GROUPED.input_shape:
            raise MemoryError("too large")
        return made(shape, dtype, scale, seed)

    monkeypatch.setattr(a_run.arrays, "normal", normal)
    assert measure(a_run, [(GROUPED, "forward", "float32"), (INDEX, "forward", "float32")]) == 1
    assert len(a_run.failures) == 1
    assert {row.case for row in results.read(a_run.output)} == {"index"}


def test_an_error_while_timing_leaves_a_note(a_run, monkeypatch):
    class Failing(HostTimer):
        def device(self, call, count, host):
            raise RuntimeError("clock")

    a_run.timer = Failing()
    a_run.peers = ("fastconv",)
    measure(a_run, JOBS[:1])
    (row,) = results.read(a_run.output)
    assert "clock" in row.note
    assert row.best_ms is None


def test_what_there_is_no_time_for_is_named(a_run, said):
    a_run.deadline = a_run.checks_until = time.monotonic() - 1
    assert measure(a_run, JOBS) == 0
    assert said == [f"SKIPPED {len(JOBS)} of {len(JOBS)} jobs: out of time, the first of them "
                    "test grouped forward float32"]  # fmt: skip
    a_run.deadline += 600
    bench.run(a_run, bench.checks(a_run, ["float32"], [GROUPED], []))
    assert said[1:] == ["checked: 0 right, 0 wrong, SKIPPED 6 for want of time"]


def test_a_lost_device_ends_the_jobs_of_the_process(a_run, said, monkeypatch):
    def lost():
        raise RuntimeError("illegal address")

    monkeypatch.setitem(bench.PEERS, "fastconv", peer_that(raise_error))
    monkeypatch.setattr(a_run.arrays, "synchronize", lost)
    begun = []
    with pytest.raises(bench.DeviceLost):
        measure(a_run, JOBS, start=1, begun=begun.append)
    assert begun == [1]
    assert "the device is lost (RuntimeError: illegal address)" in said[-1]


WORKER = """
import faulthandler, os, pathlib, signal, sys, time
from fastconv.bench import cuda as bench
options = bench.parser().parse_args(sys.argv[2:])
ways = sys.argv[1].split(",")  # how each job ends
class Watched: left = 0.0
begun = bench._watched(Watched, options.worker)
bench.LATE = 0.3
for number in range(options.start, len(ways)):
    begun(number)
    with open(options.output, "a") as log:
        log.write(f"{number} ")
    if ways[number] == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if ways[number] == "lost":
        sys.exit(1)
    if ways[number] == "hangs":
        time.sleep(60)
faulthandler.cancel_dump_traceback_later()
options.worker.write_text(bench.ENDED)
sys.exit(0)
"""


@pytest.mark.parametrize(
    ("ways", "code", "failed"),
    [
        ("ends,ends", 0, []),
        ("ends,crashes,ends,crashes", 1, [1, 3]),
        ("lost,hangs,ends", 1, [0, 1]),
    ],
)
def test_where_a_process_dies_another_goes_on_with_the_next_job(ways, code, failed, said, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", WORKER, ways, "--output", str(log)]
    assert bench.supervise(command, said.append) == code
    assert log.read_text().split() == [str(i) for i in range(ways.count(",") + 1)]  # each once
    assert [re.search(r"in job (\d+); going on with the next", text)[1] for text in said] == list(map(str, failed))


def test_a_process_that_cannot_begin_is_not_tried_again(said):
    assert bench.supervise([sys.executable, "-c", "raise SystemExit(5)"], said.append) == 5
    assert said == ["FAILED: the process ended with code 5 before its first job"]


def test_a_whole_that_is_far_from_torchs_is_found(a_run):
    problem = bench.Problem(GROUPED, "forward", "float32", a_run.arrays, {})
    ours = a_run.arrays.normal(GROUPED.output_shape, "float32", 1.0, 1)
    a_run._compare(problem, ours, ours)
    with pytest.raises(checks.Disagreement, match="away from torch"):
        a_run._compare(problem, ours, 1.001 * ours)


# Checks


def exact(case, which, host):
    if isinstance(case, cases.CrossEntropyCase):
        loss, gradient = reference.softmax_cross_entropy(host["logits"], host["target"])
        return loss if which == "forward" else (loss, gradient)
    x, w, dy = (host[name] for name in ("input", "weight", "grad_output"))
    options = (case.stride, tuple((p, p) for p in case.padding), case.dilation, case.groups)
    if which == "forward":
        return reference.convolution(x, w, None, *options)
    if which == "weight_grad":
        return reference.convolution_weight_grad(x, case.weight_shape, dy, *options)
    return reference.convolution_input_grad(case.input_shape, w, dy, *options)


@pytest.mark.parametrize(("case", "which"), [p for p in EVERY_PASS if p.values[0].op.startswith("conv")])
def test_expected_elements_are_those_of_the_reference(case, which, arrays):
    problem = bench.Problem(case, which, "float64", arrays, bench.operands(case, "float64", arrays))
    host = {name: arrays.host(array) for name, array in problem.operands.items()}
    for at, value in np.ndenumerate(exact(case, which, host)):
        assert bench.expected_element(problem, at)[0] == pytest.approx(value, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("case", "which"), EVERY_PASS)
def test_the_reference_passes_the_check_and_a_wrong_element_does_not(case, which, arrays):
    problem = bench.Problem(case, which, "float32", arrays, bench.operands(case, "float32", arrays))
    host = {name: arrays.host(array) for name, array in problem.operands.items()}
    right = exact(case, which, host)

    def as_result(value):
        return tuple(map(as_result, value)) if isinstance(value, tuple) else arrays.put(np.asarray(value), "float32")

    bench.check(problem, as_result(right))
    whole = np.array(right[1] if isinstance(right, tuple) else right)
    for change in (math.nan, 0.01 * max(1.0, np.abs(whole).max())):
        wrong = np.array(whole)
        wrong[(-1,) * wrong.ndim] += change
        with pytest.raises(checks.Disagreement):
            bench.check(problem, as_result((right[0], wrong) if isinstance(right, tuple) else wrong))
    if isinstance(right, tuple):
        with pytest.raises(checks.Disagreement, match="loss"):
            bench.check(problem, as_result((right[0] * 1.01, right[1])))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_small_cases_are_checked_in_every_element(case, dtype, arrays, monkeypatch):
    for which in case.passes:
        bench.check_small(case, which, dtype, arrays)
        monkeypatch.setitem(bench.PEERS, "wrong", peer_that(
            lambda r: (r[0], r[1] * 1.5) if isinstance(r, tuple) else r * 1.5
        ))  # fmt: skip
        with pytest.raises(checks.Disagreement):
            bench.check_small(case, which, dtype, arrays, "wrong")


def test_the_checks_pass_with_the_kernels_of_the_cpu(a_run, said):
    quick = [case for case in bench.CHECKED if case.flops("forward") < 100_000]  # the reference is slow
    bench.run(a_run, bench.checks(a_run, ["float32"], quick))
    assert a_run.failures == []
    count = sum(len(c.passes) * (2 if c.op.startswith("conv") else 1) for c in quick)  # both layouts
    count += len(bench.EVERY_TILE) * 3 * 2 * len(tiles.TILES)
    assert said == [f"checked: {count} right, 0 wrong"]


def test_a_wrong_kernel_is_counted(a_run, said, monkeypatch):
    monkeypatch.setitem(bench.PEERS, "fastconv", peer_that(off_by_one))
    bench.run(a_run, bench.checks(a_run, ["float32"], [GROUPED], [GROUPED]))
    each = 1 + len(tiles.TILES)
    assert len(a_run.failures) == 3 * each
    assert said[-1] == f"checked: {3 * each} right, {3 * each} wrong"  # those in channels-last are not changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_tile_is_taken_once(dtype, monkeypatch, a_run):
    """By the forward pass and by the weight gradient, which choose in two places."""
    taken = []

    def check(problem, result, count):
        arithmetic = tiles.ARITHMETIC[dtype]
        chosen = implicit_gemm.choose_tile(1, 1, 1, arithmetic.tiles)
        assert chosen == implicit_gemm._weight_tile(1, 1, dtype)
        taken.append(chosen)

    monkeypatch.setattr(bench, "check", check)
    monkeypatch.setattr(bench, "operands", lambda case, dtype, arrays: {})
    monkeypatch.setitem(bench.PEERS, "fastconv", lambda problem: bench.Prepared(lambda: None))
    monkeypatch.setitem(bench.PEERS, "fastconv channels-last", lambda problem: bench.Prepared(lambda: None))
    one = bench.EVERY_TILE[:1]
    bench.run(a_run, bench.checks(a_run, [dtype], [], one))
    assert taken == [tile for tile in tiles.ARITHMETIC[dtype].tiles for _ in range(6)]
    assert implicit_gemm.choose_tile is tiles.choose_tile
    case, largest = one[0], tiles.TILES[0]
    rows, columns = case.out_channels, case.batch * math.prod(case.size)
    assert largest.rows < rows < 2 * largest.rows
    assert largest.columns < columns < 2 * largest.columns


def test_bfloat16_with_torch_alone():
    pytest.importorskip("torch")
    bench.check_small(GROUPED, "forward", "bfloat16", bench.Torch("cpu"))
    with pytest.raises(bench.Unsupported, match="need torch"):
        bench.operands(GROUPED, "bfloat16", bench.Cupy(np))


# The plan


def test_the_plan_has_each_measurement_once_and_the_wanted_first():
    jobs = bench.plan(bench.STEPS)
    assert len(set(jobs)) == len(jobs) > 500
    assert {case.network for case, _, _ in jobs[:30]} == {"resnet50", "vgg16"}
    assert {case.network for case, _, _ in jobs} >= {"cross_entropy", "mobilenet_v2", "medical", "audio", "planes"}
    assert {dtype for _, _, dtype in jobs} == {"float32", "float64", "bfloat16", "tf32"}


def test_layers_of_few_channels_can_be_chosen_and_layers_by_name():
    jobs = bench.plan([(bench.DEPTHWISE, True, ("forward",), "float32")])
    assert all(case.groups > 1 for case, _, _ in jobs)
    assert len(jobs) > 20
    jobs = bench.plan(bench.STEPS, "vgg16 features.0$")
    assert {case.name for case, _, _ in jobs} == {"features.0"}


def test_the_batch_is_that_of_a_gpu(a_run):
    a_run.batch, a_run.least_logits = 32, 1 << 20
    layer = cases.network("vgg16")[0]
    assert a_run.for_gpu(layer).batch == 32
    plane = cases.network("planes")[0]
    assert a_run.for_gpu(plane) == plane
    rows = {case.name: a_run.for_gpu(case).batch for case in cases.network("cross_entropy")}
    assert rows["imagenet"] == math.ceil((1 << 20) / 1000)
    assert rows["gemma"] == 256


def test_the_summary_takes_the_better_layout():
    def row(case, peer, best):
        return results.Row("m", "cuda", "interleaved", "net", case, "conv2d", "forward", "float32", 1, 1, peer, best)

    rows = [row("a", "fastconv", 2.0), row("a", "torch", 3.0), row("a", "torch channels-last", 1.0),
            row("b", "fastconv", 1.0), row("b", "fastconv channels-last", 0.5), row("b", "torch", 1.0),
            row("c", "torch", 9.0)]  # fmt: skip
    assert list(bench.summary(rows)) == ["net forward float32: 1.00x torch over 2 layers; worst a 0.50x, best b 2.00x"]


# The clock of a GPU, on one that is pretended


class PretendedCuda:
    """Records what is queued; each call of `work` takes the device a millisecond."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def jit(self, function):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *arguments: self.log.append((function.__name__, grid, arguments))

        return Kernel()

    def device_array(self, shape, dtype):
        return SimpleNamespace(copy_to_device=lambda other: self.log.append("flush"))

    def event(self):
        def record():
            self.log.append("event")
            made.time = self.now

        made = SimpleNamespace(record=record, synchronize=lambda: self.log.append("wait"), time=None)
        return made

    def event_elapsed_time(self, first, last):
        return last.time - first.time

    def synchronize(self):
        self.log.append("synchronize")

    def work(self):
        self.log.append("work")
        self.now += 1.0


def test_the_device_sleeps_until_a_sample_is_queued():
    cuda = PretendedCuda()
    timer = bench.CudaTimer(cuda)
    assert timer.device(cuda.work, 3, host=900e-6) == pytest.approx([1e-3] * 3)
    (name, grid, (naps,)), *rest = cuda.log
    assert (name, grid) == ("sleep", (1, 1))
    assert naps * bench.CudaTimer.NAP >= 2 * 3 * 1e6  # nanoseconds: twice the host's time, since a nap may be short
    assert rest == ["flush", "event", "work", "event"] * 3 + ["wait"]


def test_the_host_does_not_wait_for_the_device():
    cuda = PretendedCuda()
    assert bench.CudaTimer(cuda).host(cuda.work, 2) < 0.1
    assert cuda.log == ["synchronize", "work", "work", "synchronize"]


def test_a_peak_that_cannot_be_measured_is_left_out(said):
    timer = SimpleNamespace(cuda=SimpleNamespace(), device=lambda *a: [1.0])
    assert bench.peaks(timer, bench.Cupy(np), ["float32", "bfloat16"], said.append) == {}
    assert [text.partition(":")[0] for text in said] == ["peak copy", "peak float32", "peak bfloat16"]
    assert "needs torch" in said[-1]


def test_launch_costs_are_told_apart(a_run):
    costs = a_run.measure_launches()
    assert {"fastconv conv2d", "fastconv cross-entropy"} <= set(costs)
    assert all(us > 0 for us in costs.values())
    a_run.note(gpu="a name")
    assert json.loads(a_run.output.with_suffix(".json").read_text()) == {"launch_us": costs, "gpu": "a name"}


# From the command line


def test_without_a_gpu_it_says_so(capfd):
    assert bench.main(["--check-only"]) == 2
    assert capfd.readouterr().out.startswith("no benchmark: ")


def test_an_unknown_arithmetic_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--dtype", "int8"])
    assert "'int8' is none of float32, tf32" in capsys.readouterr().err


def test_it_runs_from_a_checkout_that_is_not_installed():
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import bench.cuda, importlib.util
import fastconv
assert importlib.util.find_spec("fastconv.cuda_kernels") is None
bench.cuda.find_package()
import fastconv.cuda_kernels._cuda as kernels, fastconv.bench.cases
print(kernels.__file__, flush=True)  # before what the process of the benchmark prints
print(bench.cuda.main(["--check-only"]))
"""
    done = run_python(code, cwd=ROOT, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, output_of(done)
    lines = done.stdout.splitlines()
    assert Path(lines[0]) == ROOT / "cuda_kernels" / "_cuda.py"
    assert lines[-1] == "2"


def test_a_worker_from_its_first_job_to_its_last(tmp_path, monkeypatch, capfd):
    """With the arrays and the clock of the host, and the peaks of another process where it did not begin."""
    pytest.importorskip("torch")
    monkeypatch.setattr(sys.modules["fastconv.backends"], "cuda_status", lambda: (True, ""))
    monkeypatch.setattr(bench, "library", lambda: bench.Torch("cpu"))
    monkeypatch.setattr(bench, "CudaTimer", HostTimer)
    monkeypatch.setattr(bench, "name_of_gpu", lambda: "Test GPU (2)")
    monkeypatch.setattr(bench, "plan", lambda steps, only: JOBS[:2])
    monkeypatch.setattr(bench, "CHECKED", [])
    monkeypatch.setattr(bench, "peaks", lambda timer, arrays, dtypes, tell: {"copy": 3.0, "float32": 2.0})

    def work(*options):
        deadline = str(time.monotonic() + 600)
        every = ["--dtype", "float32", "--output", str(tmp_path), "--worker", str(tmp_path / "job"), *options]
        return bench.work(bench.parser().parse_args([*every, "--deadline", deadline]))

    assert work("--start", "0", "--no-check") == 0
    assert (tmp_path / "job").read_text() == bench.ENDED
    assert json.loads((tmp_path / "test-gpu-2.json").read_text()).keys() >= {"gpu", "peaks", "launch_us"}
    rows = results.read(tmp_path / "test-gpu-2.csv")
    assert {(row.which, row.peak_gflops) for row in rows} == {("forward", 2.0), ("weight_grad", 2.0)}
    assert "2 measurements" in capfd.readouterr().out.splitlines()[-1]
    (tmp_path / "test-gpu-2.csv").unlink()
    assert work("--start", "3", "--no-check") == 0
    rows = results.read(tmp_path / "test-gpu-2.csv")
    assert {(row.which, row.peak_gflops) for row in rows} == {("weight_grad", 2.0)}


def test_it_needs_nothing_but_numba_and_an_array_library():
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
HIDDEN = {"tbb", "scipy", "ml_dtypes", "rich", "matplotlib", "pytest", "sklearn", "greenlet", "hypothesis", "cupy",
          "liger_kernel", "triton", "setuptools", "PIL", "pandas"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Hide())
import math, pathlib, tempfile, time
import bench.cuda as bench
bench.find_package()
from fastconv.backends import cuda_status
cuda_status()
print(bench.version("torch"), bench.version("liger"))
case = bench.CHECKED[0]
with tempfile.TemporaryDirectory() as folder:
    class Timer:
        def host(self, call, count): return 1e-3
        def device(self, call, count, host): call(); return [1e-3] * count
    output = pathlib.Path(folder) / "gpu.csv"
    run = bench.Bench(bench.Torch("cpu"), Timer(), "gpu", output, time.monotonic() + 100, batch=1)
    jobs = bench.checks(run, ["float32"], [case], [])
    jobs += bench.measurements(run, ["float32"], [(case, "forward", "float32")])
    bench.run(run, jobs)
    print(output.read_text())
"""
    pytest.importorskip("torch")
    done = run_python(code, cwd=ROOT, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, output_of(done)
    assert "checked: 6 right" in done.stdout, output_of(done)
    assert "torch channels-last" in done.stdout


# Predictions


@pytest.fixture
def code(monkeypatch):
    """Machine code that is easy to count: a hundred instructions, of 32 registers."""
    block = Counter({"FFMA": 60, "LDG.E.128.CONSTANT": 10, "IMAD": 30})
    made = SimpleNamespace(
        registers=32, shared=0, blocks=[block], loops=[block], opcodes=block, share=lambda prefix: (60, 100)
    )
    monkeypatch.setattr(predictions, "machine_code", lambda kernel: made)


LAYER = {case.name: case for case in cases.network("mobilenet_v2")}


@pytest.mark.parametrize("which", ["forward", "weight_grad", "input_grad"])
@pytest.mark.parametrize(
    ("name", "module"), [("features.1.conv.0.0", "depthwise"), ("features.1.conv.1", "implicit_gemm")]
)
def test_a_prediction_is_of_the_kernels_that_a_launch_would_take(name, module, which, code):
    case = predictions.for_gpu(LAYER[name])
    assert case.batch == 32
    found = predictions.predict(case, which, "float32")
    assert {launch.module for launch in found.launches} == {module}
    assert found.memory == case.bytes(which, 4) / 4.3e12
    assert found.seconds > max(found.memory, found.issue) > 0


def test_instructions_are_those_of_all_warps(code):
    case = predictions.for_gpu(LAYER["features.1.conv.0.0"])
    ((launch,), small) = predictions.launches(case, "forward", "float32")
    assert not small
    # patches of 4 x 4 of 32 x 32 planes of 112 x 112, 256 to a block; 8 blocks of 32 registers to a multiprocessor
    assert launch.blocks == 32 * 32 * 28 * 28 // 256
    waves = math.ceil(launch.blocks / (132 * 8))
    expected = waves * 132 * 8 * 8 * 100 / predictions.ISSUED
    assert predictions.predict(case, "forward", "float32").issue == pytest.approx(expected)


def matrix_product():
    """A layer of whole 128 x 128 tiles: 256 channels of 32 x 16 x 32 positions, 576 terms."""
    return cases.ConvolutionCase("test", "product", 32, 64, (16, 32), 256, (3, 3), (1, 1), (1, 1), (1, 1), 1)


def test_products_on_the_tensor_cores_take_steps_of_their_own_depth(monkeypatch):
    """16 terms of tf32, 32 of bfloat16: with the multiplications of whole tiles the units are busy for all flops."""
    case = matrix_product()
    for kind, opcode, flops in [("tf32", "HMMA.1688.F32.TF32", 2048), ("bfloat16", "HMMA.16816.F32.BF16", 4096)]:
        depth = {"tf32": 16, "bfloat16": 32}[kind]
        # of a warp: 128 x 128 x depth products by eight warps
        hot = Counter({opcode: 2 * 128 * 128 * depth // 8 // flops, "LDSM.16.M88.4": 12, "IMAD": 10})
        stage = Counter({"LDGSTS.E.BYPASS.LTC128B.128": 8, "IADD3": 30})
        code = hot + stage
        made = SimpleNamespace(registers=128, shared=40960, blocks=[hot, stage], loops=[code], opcodes=code)
        monkeypatch.setattr(predictions, "machine_code", lambda kernel, made=made: made)
        found = predictions.predict(case, "forward", kind, last=True)
        (launch,), steps = found.launches, 576 // depth
        assert launch.kernel.threads == 256
        assert launch.blocks == 2 * 128
        waves = 2 * 132 / launch.blocks  # blocks of the only wave, two to a multiprocessor
        assert found.multiply == pytest.approx(case.flops("forward") / predictions.CEILINGS[kind] * waves)
        cycles = launch.blocks * 8 * steps * (12 * 4 + 8 * 4)
        assert found.shared == pytest.approx(cycles / (132 * 1.98e9) * waves)
        assert len(found.small) == 1  # the weights put in order
        assert found.seconds > max(found.bounds.values()) + 2 * predictions.LAUNCH


@pytest.mark.parametrize("kind", ["float32", "tf32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("which", predictions.CONVOLUTIONS)
@pytest.mark.parametrize("last", [False, True])
def test_every_arithmetic_is_predicted(kind, which, last, code):
    found = predictions.predict(matrix_product(), which, kind, last)
    assert found.bound in found.bounds
    assert found.memory == matrix_product().bytes(which, {"float64": 8, "float32": 4, "tf32": 4}.get(kind, 2)) / 4.3e12


def test_rows_are_predicted(code):
    case = predictions.for_gpu(next(c for c in cases.network("cross_entropy") if not c.size))
    for which, passes in [("with_grad", 2), ("softmax", 2)]:
        found = predictions.predict(case, which, "float32")
        assert found.memory >= passes * 4 * case.batch * case.classes / 4.3e12
    layers = {c.name: predictions.for_gpu(c) for c in cases.network("cross_entropy")}
    for name, vectors in {"mnist": 1, "imagenet": 4, "imagenet.soft": 0, "llama2": 8, "llama3": 0}.items():
        ((launch,), _) = predictions.launches(layers[name], "with_grad", "float32")
        assert predictions._is_read_twice(launch) == (name == "llama3")
        groups = [*softmax_rows.GROUPS[4], softmax_rows.SHORT, softmax_rows.LONG]
        kernels = {softmax_rows.cross_entropy_row_kernel("float32", group, "int64"): group for group in groups}
        assert kernels[launch.kernel].vectors == vectors


def test_a_page_of_predictions(code, monkeypatch):
    monkeypatch.setattr(predictions.cases, "network", lambda name: [matrix_product()])
    table = predictions.Table("test", ("forward", "weight_grad"), "tf32", last=True)
    text = predictions.page([table], lambda line: None)
    for title in ("test, forward, tf32, channels last", "test, weight_grad, tf32, channels last"):
        assert f"\n## {title}\n" in text
        assert f"\n| {title} | 1 | " in text
    lines = [line for line in text.splitlines() if line.startswith("| product | ")]
    assert len(lines) == 2


def test_nothing_is_predicted_for_the_simple_kernels(code):
    wide = cases.ConvolutionCase("test", "wide", 1, 4, (80,), 4, (33,), (1,), (0,), (1,), 4)
    assert predictions.predict(wide, "forward", "float32") is None


def test_the_page_says_that_nothing_was_run():
    text = predictions.PAGE.read_text()
    assert text.startswith(predictions.HEAD)
    assert "**Predictions, not measurements.**" in text
