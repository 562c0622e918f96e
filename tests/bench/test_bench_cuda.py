"""The benchmarks of a GPU, from the first check to the last row, on arrays and clocks of the host."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastconv import reference
from fastconv.bench import cases, checks, results
from fastconv.bench import peers as all_peers
from fastconv.bench.cuda import arrays as device_arrays
from fastconv.bench.cuda import checks as device_checks
from fastconv.bench.cuda import clock, command, jobs, peers, run
from fastconv.cuda_kernels import implicit_gemm, implicit_gemm_weight_grad, tiles
from helpers import output_of, run_python

ROOT = Path(__file__).parents[2]
GROUPED = cases.ConvolutionCase("test", "grouped", 2, 4, (6, 5), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2)
DEPTHWISE = cases.ConvolutionCase("test", "depthwise", 2, 3, (9,), 3, (4,), (1,), (2,), (2,), 3)
VOLUME = cases.ConvolutionCase("test", "volume", 1, 2, (4, 5, 3), 3, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1)
INDEX = cases.CrossEntropyCase("test", "index", 5, 7, (2,), "index")
SOFT = cases.CrossEntropyCase("test", "soft", 5, 7, (), "probabilities")
EVERY = [GROUPED, DEPTHWISE, VOLUME, INDEX, SOFT]
FASTCONV = peers.PEERS["fastconv"]  # which some tests replace
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
        return device_arrays.Cupy(np)  # which CuPy's interface is
    pytest.importorskip("torch")
    return device_arrays.Torch("cpu")


@pytest.fixture
def said():
    return []


@pytest.fixture
def a_run(arrays, tmp_path, said):
    names = ("fastconv", "fastconv channels-last", "torch", "torch channels-last", "cupy", "liger")
    return run.Bench(
        arrays, HostTimer(), "test-gpu", tmp_path / "test-gpu.csv", time.monotonic() + 600, batch=2, least_logits=1,
        samples=2, rounds=2, peaks={"copy": 100.0, "float32": 1000.0}, peers=names, tell=said.append,
    )  # fmt: skip


JOBS = [(case, which, "float32") for case in (GROUPED, INDEX) for which in case.passes]


def measure(a_run, planned, **options):
    """Do the measurements alone; return how many gave rows."""
    jobs.run(a_run, jobs.measurements(a_run, ["float32"], planned)[2:], **options)
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
        prepared = FASTCONV(problem)
        return peers.Prepared(lambda: change(prepared.call()))

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
    monkeypatch.setitem(peers.PEERS, "broken", peer_that(change))
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
    jobs.run(a_run, jobs.checks(a_run, ["float32"], [GROUPED], []))
    assert said[1:] == ["checked: 0 right, 0 wrong, SKIPPED 6 for want of time"]


def test_a_lost_device_ends_the_jobs_of_the_process(a_run, said, monkeypatch):
    def lost():
        raise RuntimeError("illegal address")

    monkeypatch.setitem(peers.PEERS, "fastconv", peer_that(raise_error))
    monkeypatch.setattr(a_run.arrays, "synchronize", lost)
    begun = []
    with pytest.raises(run.DeviceLost):
        measure(a_run, JOBS, start=1, begun=begun.append)
    assert begun == [1]
    assert "the device is lost (RuntimeError: illegal address)" in said[-1]


WORKER = """
import faulthandler, os, pathlib, signal, sys, time
from fastconv.bench.cuda import command
options = command.parser().parse_args(sys.argv[2:])
ways = sys.argv[1].split(",")  # how each job ends
class Watched: left = 0.0
begun = command.watched(Watched, options.worker)
command.LATE = 0.3
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
options.worker.write_text(command.ENDED)
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
    worker = [sys.executable, "-c", WORKER, ways, "--output", str(log)]
    assert command.supervise(worker, said.append) == code
    assert log.read_text().split() == [str(i) for i in range(ways.count(",") + 1)]  # each once
    assert [re.search(r"in job (\d+); going on with the next", text)[1] for text in said] == list(map(str, failed))


def test_a_process_that_cannot_begin_is_not_tried_again(said):
    assert command.supervise([sys.executable, "-c", "raise SystemExit(5)"], said.append) == 5
    assert said == ["FAILED: the process ended with code 5 before its first job"]


def test_a_whole_that_is_far_from_torchs_is_found(a_run):
    problem = peers.Problem(GROUPED, "forward", "float32", a_run.arrays, {})
    ours = a_run.arrays.normal(GROUPED.output_shape, "float32", 1.0, 1)
    a_run.compare(problem, ours, ours)
    with pytest.raises(checks.Disagreement, match="away from torch"):
        a_run.compare(problem, ours, 1.001 * ours)


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
    problem = peers.Problem(case, which, "float64", arrays, peers.operands(case, "float64", arrays))
    host = {name: arrays.host(array) for name, array in problem.operands.items()}
    for at, value in np.ndenumerate(exact(case, which, host)):
        assert device_checks.expected_element(problem, at)[0] == pytest.approx(value, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("case", "which"), EVERY_PASS)
def test_the_reference_passes_the_check_and_a_wrong_element_does_not(case, which, arrays):
    problem = peers.Problem(case, which, "float32", arrays, peers.operands(case, "float32", arrays))
    host = {name: arrays.host(array) for name, array in problem.operands.items()}
    right = exact(case, which, host)

    def as_result(value):
        return tuple(map(as_result, value)) if isinstance(value, tuple) else arrays.put(np.asarray(value), "float32")

    device_checks.check(problem, as_result(right))
    whole = np.array(right[1] if isinstance(right, tuple) else right)
    for change in (math.nan, 0.01 * max(1.0, np.abs(whole).max())):
        wrong = np.array(whole)
        wrong[(-1,) * wrong.ndim] += change
        with pytest.raises(checks.Disagreement):
            device_checks.check(problem, as_result((right[0], wrong) if isinstance(right, tuple) else wrong))
    if isinstance(right, tuple):
        with pytest.raises(checks.Disagreement, match="loss"):
            device_checks.check(problem, as_result((right[0] * 1.01, right[1])))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_small_cases_are_checked_in_every_element(case, dtype, arrays, monkeypatch):
    for which in case.passes:
        device_checks.check_small(case, which, dtype, arrays)
        monkeypatch.setitem(peers.PEERS, "wrong", peer_that(
            lambda r: (r[0], r[1] * 1.5) if isinstance(r, tuple) else r * 1.5
        ))  # fmt: skip
        with pytest.raises(checks.Disagreement):
            device_checks.check_small(case, which, dtype, arrays, "wrong")


def test_the_checks_pass_with_the_kernels_of_the_cpu(a_run, said):
    quick = [case for case in device_checks.CHECKED if case.flops("forward") < 100_000]  # the reference is slow
    jobs.run(a_run, jobs.checks(a_run, ["float32"], quick))
    assert a_run.failures == []
    count = sum(len(c.passes) * (2 if c.op.startswith("conv") else 1) for c in quick)  # both layouts
    count += len(device_checks.EVERY_TILE) * 3 * 2 * len(tiles.TILES)
    assert said == [f"checked: {count} right, 0 wrong"]


def test_a_wrong_kernel_is_counted(a_run, said, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "fastconv", peer_that(off_by_one))
    jobs.run(a_run, jobs.checks(a_run, ["float32"], [GROUPED], [GROUPED]))
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
        assert chosen == implicit_gemm_weight_grad.weight_tile(1, 1, dtype)
        taken.append(chosen)

    monkeypatch.setattr(device_checks, "check", check)
    monkeypatch.setattr(device_checks, "operands", lambda case, dtype, arrays: {})
    monkeypatch.setitem(peers.PEERS, "fastconv", lambda problem: peers.Prepared(lambda: None))
    monkeypatch.setitem(peers.PEERS, "fastconv channels-last", lambda problem: peers.Prepared(lambda: None))
    one = device_checks.EVERY_TILE[:1]
    jobs.run(a_run, jobs.checks(a_run, [dtype], [], one))
    assert taken == [tile for tile in tiles.ARITHMETIC[dtype].tiles for _ in range(6)]
    assert implicit_gemm.choose_tile is tiles.choose_tile
    case, largest = one[0], tiles.TILES[0]
    rows, columns = case.out_channels, case.batch * math.prod(case.size)
    assert largest.rows < rows < 2 * largest.rows
    assert largest.columns < columns < 2 * largest.columns


def test_bfloat16_with_torch_alone():
    pytest.importorskip("torch")
    device_checks.check_small(GROUPED, "forward", "bfloat16", device_arrays.Torch("cpu"))
    with pytest.raises(all_peers.Unsupported, match="need torch"):
        peers.operands(GROUPED, "bfloat16", device_arrays.Cupy(np))


# The plan


def test_the_plan_has_each_measurement_once_and_the_wanted_first():
    planned = jobs.plan(jobs.STEPS)
    assert len(set(planned)) == len(planned) > 500
    assert {case.network for case, _, _ in planned[:30]} == {"resnet50", "vgg16"}
    assert {case.network for case, _, _ in planned} >= {"cross_entropy", "mobilenet_v2", "medical", "audio", "planes"}
    assert {dtype for _, _, dtype in planned} == {"float32", "float64", "bfloat16", "tf32"}


def test_layers_of_few_channels_can_be_chosen_and_layers_by_name():
    planned = jobs.plan([(jobs.DEPTHWISE, True, ("forward",), "float32")])
    assert all(case.groups > 1 for case, _, _ in planned)
    assert len(planned) > 20
    planned = jobs.plan(jobs.STEPS, "vgg16 features.0$")
    assert {case.name for case, _, _ in planned} == {"features.0"}


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
    assert list(run.summary(rows)) == ["net forward float32: 1.00x torch over 2 layers; worst a 0.50x, best b 2.00x"]


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
    timer = clock.CudaTimer(cuda)
    assert timer.device(cuda.work, 3, host=900e-6) == pytest.approx([1e-3] * 3)
    (name, grid, (naps,)), *rest = cuda.log
    assert (name, grid) == ("sleep", (1, 1))
    assert naps * clock.CudaTimer.NAP >= 2 * 3 * 1e6  # nanoseconds: twice the host's time, since a nap may be short
    assert rest == ["flush", "event", "work", "event"] * 3 + ["wait"]


def test_the_host_does_not_wait_for_the_device():
    cuda = PretendedCuda()
    assert clock.CudaTimer(cuda).host(cuda.work, 2) < 0.1
    assert cuda.log == ["synchronize", "work", "work", "synchronize"]


def test_a_peak_that_cannot_be_measured_is_left_out(said):
    timer = SimpleNamespace(cuda=SimpleNamespace(), device=lambda *a: [1.0])
    assert clock.peaks(timer, device_arrays.Cupy(np), ["float32", "bfloat16"], said.append) == {}
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
    assert command.main(["--check-only"]) == 2
    assert capfd.readouterr().out.startswith("no benchmark: ")


def test_an_unknown_arithmetic_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--dtype", "int8"])
    assert "'int8' is none of float32, tf32" in capsys.readouterr().err


def test_it_runs_from_a_checkout_that_is_not_installed():
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import importlib.util
from bench.cuda import command
import fastconv
assert importlib.util.find_spec("fastconv.cuda_kernels") is None
command.find_package()
import fastconv.cuda_kernels._cuda as kernels, fastconv.bench.cases
print(kernels.__file__, flush=True)  # before what the process of the benchmark prints
print(command.main(["--check-only"]))
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
    monkeypatch.setattr(command, "library", lambda: device_arrays.Torch("cpu"))
    monkeypatch.setattr(command, "CudaTimer", HostTimer)
    monkeypatch.setattr(command, "name_of_gpu", lambda: "Test GPU (2)")
    monkeypatch.setattr(command, "plan", lambda steps, only: JOBS[:2])
    monkeypatch.setattr(run, "peaks", lambda timer, arrays, dtypes, tell: {"copy": 3.0, "float32": 2.0})

    def work(*options):
        deadline = str(time.monotonic() + 600)
        every = ["--dtype", "float32", "--output", str(tmp_path), "--worker", str(tmp_path / "job"), *options]
        return command.work(command.parser().parse_args([*every, "--deadline", deadline]))

    assert work("--start", "0", "--no-check") == 0
    assert (tmp_path / "job").read_text() == command.ENDED
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
from bench.cuda import arrays, checks, command, jobs, peers, run
command.find_package()
from fastconv.backends import cuda_status
cuda_status()
print(peers.version("torch"), peers.version("liger"))
case = checks.CHECKED[0]
with tempfile.TemporaryDirectory() as folder:
    class Timer:
        def host(self, call, count): return 1e-3
        def device(self, call, count, host): call(); return [1e-3] * count
    output = pathlib.Path(folder) / "gpu.csv"
    bench = run.Bench(arrays.Torch("cpu"), Timer(), "gpu", output, time.monotonic() + 100, batch=1)
    planned = jobs.checks(bench, ["float32"], [case], [])
    planned += jobs.measurements(bench, ["float32"], [(case, "forward", "float32")])
    jobs.run(bench, planned)
    print(output.read_text())
"""
    pytest.importorskip("torch")
    done = run_python(code, cwd=ROOT, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, output_of(done)
    assert "checked: 6 right" in done.stdout, output_of(done)
    assert "torch channels-last" in done.stdout
