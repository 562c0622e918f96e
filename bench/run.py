"""Running the measurements: which processes there are, whose turn it is, and what becomes of failures.

The protocols (README.md has their reasons) are the same few jobs to worker processes:

    alone         a process for each side, with the waiting policy that its library has by default; the processes take
                  turns, layer by layer and round by round, while all others sleep
    interleaved   one process for all, whose threads wait passively; the calls take turns, sample by sample
    memory        a new process for each peer, pass and layer, and the memory of one call instead of its time

and between the rounds the microkernel's own rate is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cases, peers, results
from .cases import Case, CrossEntropyCase

# Until the threads of the side before have stopped spinning, where the system does not tell: OpenMP runtimes spin for
# 200 ms at most by default.
SETTLE_SECONDS = 0.25
# A side whose threads are not asleep by then has some that never sleep, and is reported.
SETTLE_TIMEOUT = 2.0
# How long the microkernel's rate is measured between two rounds.
PEAK_SECONDS = 0.05
# Of operands: the passes of layers with more are prepared one at a time, or the copies of all peers would fill the
# memory. Those of smaller layers are measured together, and the sides change turns less often.
TOGETHER_BYTES = 256 << 20


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    protocol: str = "alone"
    backend: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 3
    seconds: float = 0.2  # of sampling, for each peer in each round
    timeout: float = 600.0  # for one job of a worker

    @property
    def memory(self) -> bool:
        """Whether memory is measured, not time."""
        return self.protocol == "memory"


def environment(threads: int, passive: bool, memory: bool = False) -> dict[str, str]:
    """The environment of a worker: the threads of every library, and that nothing spins if they share the CPUs."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NUMBA_ENABLE_CUDASIM", "FASTCONV_BACKEND")
    }
    count = str(threads)
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    own = dict.fromkeys(pools, count)
    # Memory that is freed goes back to the system, or the next peak would hide in it (glibc).
    if memory:
        own |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    # XLA takes as many threads as there are CPUs, which `worker.pin` sees to.
    if passive:
        own |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    else:
        for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
            inherited.pop(name, None)
    return inherited | own


class WorkerDied(Exception):
    """The process ended, or did not answer in time. The message says which."""


class Process:
    """A worker process, started anew when it has died."""

    def __init__(self, side: str, settings: Settings, cache: Path) -> None:
        self.side, self.settings, self.cache = side, settings, cache
        self.prepared: list[tuple[str, str]] = []  # pass and peer
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._log = cache / f"worker-{id(self)}.log"

    @property
    def running(self) -> bool:
        return self._process is not None

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """The answer to a job. Raises WorkerDied."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"do": do, **job}) + "\n")
            process.stdin.flush()
            answer = self._answers.get(timeout=self.settings.timeout)
        except (BrokenPipeError, queue.Empty) as error:
            answer = "" if isinstance(error, BrokenPipeError) else None
        if not answer:
            self.close(kill=True)
            if answer is None:
                raise WorkerDied(f"no answer within {self.settings.timeout:g} s")
            raise WorkerDied(f"the process ended with {_status(process.returncode)}")
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        settings = self.settings
        passive = settings.protocol == "interleaved"
        with self._log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastconv.bench.worker"],
                env=environment(settings.threads, passive, settings.memory),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert process.stdin is not None
        answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(process, answers), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"threads": settings.threads, "spinning": not passive, "cache": str(self.cache)}),
                  file=process.stdin, flush=True)  # fmt: skip
        self._process, self._answers, self.prepared = process, answers, []
        return process

    def settle(self) -> None:
        """Wait until every thread of the process sleeps. Raises WorkerDied if some never do."""
        if self._process is None:
            return
        folder = Path(f"/proc/{self._process.pid}/task")
        if not folder.exists():
            time.sleep(SETTLE_SECONDS)
            return
        end = time.perf_counter() + SETTLE_TIMEOUT
        quiet = 0
        while quiet < 3:  # looks in a row: a thread that yields or polls is seen asleep now and then
            if time.perf_counter() > end:
                raise WorkerDied(f"its threads still ran {SETTLE_TIMEOUT:g} s after the last call")
            time.sleep(0.005)
            quiet = quiet + 1 if not any(map(_runs, folder.iterdir())) else 0

    def close(self, kill: bool = False) -> None:
        process, self._process, self.prepared = self._process, None, []
        if process is None:
            return
        if kill:
            process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _forward(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Move the answers to a queue, whose reader can stop waiting; an empty one is the end."""
    for line in process.stdout:  # type: ignore[union-attr]
        answers.put(line)
    answers.put("")


def _runs(task: Path) -> bool:
    """Whether a thread, as its folder in /proc, is running or ready to run."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except (OSError, IndexError):  # it ended
        return False


def _status(returncode: int) -> str:
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-returncode).name}"
    return f"status {returncode}"


class Session:
    """The worker processes of one run; a context manager."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stack = contextlib.ExitStack()
        self._processes: dict[str, Process] = {}
        self._last: Process | None = None
        self._restless: set[str] = set()

    def __enter__(self) -> Session:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fastconv-bench-"))
        self._cache = Path(folder)
        self._facts = results.machine()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.close(kill=exception[0] is not None)
        self._stack.close()

    def measure(
        self, case: Case, passes: Sequence[str], names: Sequence[str], tell: Callable[[str], object] = lambda _: None
    ) -> list[results.Row]:
        """The rows of one layer: of each pass and every peer in `names` that can do it, the failed ones with a note."""
        if self.settings.memory:
            return [row for which in passes for row in self._with_memory(case, which, names, tell)]
        itemsize = _itemsize(self.settings.dtype)
        if case.bytes("forward", itemsize) > TOGETHER_BYTES:
            groups = [[which] for which in passes]
        else:
            groups = [list(passes)]
        return [row for group in groups for row in self._measure_together(case, group, names, tell)]

    def _measure_together(
        self, case: Case, passes: Sequence[str], names: Sequence[str], tell: Callable[[str], object]
    ) -> list[results.Row]:
        rows: dict[tuple[str, str], results.Row] = {}
        for name in names:
            for which in passes:
                tell(f"{case.network} {case.name} {which}: checking {name}")
                answer = self._prepare(case, which, name)
                if "unsupported" not in answer:
                    rows[which, name] = self._row(case, which, name, answer)
        rows = self._with_times(case, rows, tell)
        for process in self._processes.values():
            if process.running:
                with contextlib.suppress(WorkerDied):
                    process.ask("forget")
            process.prepared.clear()
        for file in self._cache.glob("*.npz"):
            file.unlink()
        return [
            row
            for which in passes
            for row in results.with_ratios([row for (this, _), row in rows.items() if this == which])
        ]

    def _row(self, case: Case, which: str, name: str, answer: dict[str, Any]) -> results.Row:
        settings = self.settings
        itemsize = _itemsize(settings.dtype)
        return results.Row(
            machine=results.machine_name(self._facts), backend=settings.backend, protocol=settings.protocol,
            network=case.network, case=case.name, op=case.op, which=which, dtype=settings.dtype, batch=case.batch,
            threads=settings.threads, peer=name, flops=case.flops(which), bytes=case.bytes(which, itemsize),
            count=case.count, date=results.today(), commit=results.commit(), version=answer.get("version", ""),
            note=answer.get("failed", ""),
        )  # fmt: skip

    def _process(self, name: str) -> Process:
        side = "all" if self.settings.protocol == "interleaved" else peers.PEERS[name, self.settings.backend].modules[0]
        if side not in self._processes:
            self._processes[side] = Process(side, self.settings, self._cache)
        return self._processes[side]

    def _turn(self, process: Process) -> Process:
        """The process, now that the one before it is asleep."""
        before, self._last = self._last, process
        if before is not None and before is not process:
            try:
                before.settle()
            except WorkerDied as error:
                if before.side not in self._restless:
                    print(f"fastconv bench: {before.side}: {error}; others may be slowed", file=sys.stderr)
                self._restless.add(before.side)
        return process

    def _prepare(self, case: Case, which: str, name: str) -> dict[str, Any]:
        process = self._process(name)
        before = list(process.prepared)
        job = {"case": cases.as_message(case), "dtype": self.settings.dtype, "backend": self.settings.backend}
        try:
            answer = process.ask("prepare", which=which, peer=name, **job)
        except WorkerDied as error:
            for other in before:  # they were prepared in the process that died
                with contextlib.suppress(WorkerDied):
                    process.ask("prepare", which=other[0], peer=other[1], **job)
                    process.prepared.append(other)
            return {"failed": str(error)}
        if "failed" not in answer and "unsupported" not in answer:
            process.prepared.append((which, name))
        return answer

    def _with_memory(
        self, case: Case, which: str, names: Sequence[str], tell: Callable[[str], object]
    ) -> list[results.Row]:
        """The rows with what a first call needs, each peer in a new process."""
        settings = self.settings
        warm = case.small()
        rows = []
        for name in names:
            tell(f"{case.network} {case.name} {which}: memory of {name}")
            process = Process(name, settings, self._cache)
            try:
                answer = process.ask(
                    "memory", warm=cases.as_message(warm), case=cases.as_message(case), which=which,
                    dtype=settings.dtype, peer=name, backend=settings.backend,
                )  # fmt: skip
            except WorkerDied as error:
                answer = {"failed": str(error)}
            process.close()
            if "unsupported" not in answer:
                memory = answer["bytes"] / 1e6 if "bytes" in answer else None
                rows.append(dataclasses.replace(self._row(case, which, name, answer), memory_mb=memory))
        return results.with_ratios(rows)

    def _with_times(
        self, case: Case, rows: dict[tuple[str, str], results.Row], tell: Callable[[str], object]
    ) -> dict[tuple[str, str], results.Row]:
        samples: dict[tuple[str, str], list[float]] = {key: [] for key, row in rows.items() if not row.note}
        peaks: list[dict[str, float]] = []
        notes: dict[tuple[str, str], str] = {}
        for turn in range(self.settings.rounds):
            peaks.append(self._peak(copy=turn == 0 or isinstance(case, CrossEntropyCase)))
            for group in self._turns([key for key in samples if key not in notes], turn):
                tell(f"{case.network} {case.name}: round {turn + 1}, {', '.join(name for _, name in group)}")
                process = self._turn(self._process(group[0][1]))
                lost = [key for key in group if key not in process.prepared]
                notes.update(dict.fromkeys(lost, "its process died with another peer"))
                group = [key for key in group if key not in lost]
                if not group:
                    continue
                try:
                    answer = process.ask("measure", jobs=group, seconds=self.settings.seconds)
                except WorkerDied as error:
                    answer = {"failed": str(error)}
                if "failed" in answer:
                    notes.update(dict.fromkeys(group, answer["failed"]))
                for key, values in zip(group, answer.get("samples", []), strict=False):
                    samples[key] += values
        peak = max((p["gflops"] for p in peaks if "gflops" in p), default=None)
        copy = max((p["copy"] for p in peaks if "copy" in p), default=None)
        timed = {}
        for key, row in rows.items():
            row = dataclasses.replace(row, peak_gflops=peak, copy_gbs=copy)
            if key in notes:
                row = dataclasses.replace(row, note=notes[key])
            timed[key] = row if row.note else results.with_samples(row, samples[key], case.unit)
        return timed

    def _turns(self, keys: Sequence[tuple[str, str]], turn: int) -> list[list[tuple[str, str]]]:
        """Who is measured after whom, and who together; each round begins with another one."""
        groups: dict[Any, list[tuple[str, str]]] = {}
        for key in keys:  # by pass where the peers take turns sample by sample, else by side
            which, name = key
            groups.setdefault(which if self.settings.protocol == "interleaved" else self._process(name), []).append(key)
        found = [group[turn % len(group) :] + group[: turn % len(group)] for group in groups.values()]
        if not found:
            return []
        found = found[turn % len(found) :] + found[: turn % len(found)]
        return found if self.settings.protocol == "interleaved" else [[key] for group in found for key in group]

    def _peak(self, copy: bool) -> dict[str, float]:
        """The rates of the machine in this minute, of its memory if `copy`; of a GPU they are not known."""
        if self.settings.backend != "cpu":
            return {}
        process = self._turn(self._process("fastconv"))
        try:
            answer = process.ask("peak", dtype=self.settings.dtype, copy=copy, seconds=PEAK_SECONDS)
        except WorkerDied:
            return {}
        if "failed" in answer:
            raise RuntimeError(f"bench: the peak of this machine could not be measured: {answer['failed']}")
        return answer


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def available(names: Sequence[str], backend: str) -> tuple[list[str], dict[str, str]]:
    """Those of the peers that can be run here, and why the others cannot."""
    skipped = {}
    for name in names:
        reason = peers.PEERS[name, backend].missing()
        if reason is not None:
            skipped[name] = reason
    return [name for name in names if name not in skipped], skipped
