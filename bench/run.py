"""Running the measurements: which processes there are, whose turn it is, and what becomes of failures.

Both protocols (README.md has their reasons) are the same few jobs to worker processes:

    alone         a process for each side, with the waiting policy that its library has by default; the processes take
                  turns, layer by layer and round by round, while all others sleep
    interleaved   one process for all, whose threads wait passively; the calls take turns, sample by sample

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

# Until the threads of the side before have stopped spinning: OpenMP runtimes spin for 200 ms at most by default.
SETTLE_SECONDS = 0.25
# How long the microkernel's rate is measured between two rounds.
PEAK_SECONDS = 0.05
# What makes a small case, on which a library loads its code, of one whose memory is measured.
MEMORY_WARM_UP = {"batch": 1, "size": (8, 8)}


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
    memory: bool = False  # measure memory instead of time


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

    def __init__(self, settings: Settings, cache: Path) -> None:
        self.settings, self.cache = settings, cache
        self.prepared: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._log = cache / f"worker-{id(self)}.log"

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
        self, case: Case, which: str, names: Sequence[str], tell: Callable[[str], object] = lambda _: None
    ) -> list[results.Row]:
        """The rows of one pass of one layer: of every peer in `names` that can do it, the failed ones with a note."""
        if self.settings.memory:
            return self._with_memory(case, which, names, tell)
        rows: dict[str, results.Row] = {}
        for name in names:
            tell(f"{case.network} {case.name} {which}: checking {name}")
            answer = self._prepare(case, which, name)
            if "unsupported" in answer:
                continue
            rows[name] = self._row(case, which, name, answer)
        rows = self._with_times(case, rows, tell)
        for process in self._processes.values():
            process.prepared.clear()
            if process._process is not None:
                process.ask("forget")
        for file in self._cache.glob("*.npz"):
            file.unlink()
        return results.with_ratios(list(rows.values()))

    def _row(self, case: Case, which: str, name: str, answer: dict[str, Any]) -> results.Row:
        settings = self.settings
        itemsize = {"float64": 8, "float32": 4}.get(settings.dtype, 2)
        return results.Row(
            machine=results.machine_name(self._facts), backend=settings.backend, protocol=settings.protocol,
            network=case.network, case=case.name, op=case.op, which=which, dtype=settings.dtype, batch=case.batch,
            threads=settings.threads, peer=name, flops=case.flops(which), bytes=case.bytes(which, itemsize),
            count=case.count, date=results.today(), commit=results.commit(), version=answer.get("version", ""),
            note=answer.get("failed", ""),
        )  # fmt: skip

    def _process(self, name: str) -> Process:
        side = "all" if self.settings.protocol == "interleaved" else peers.PEERS[name, self.settings.backend].modules[0]
        return self._processes.setdefault(side, Process(self.settings, self._cache))

    def _turn(self, process: Process) -> Process:
        """The process, now that the one before it is asleep."""
        if process is not self._last and self._last is not None:
            time.sleep(SETTLE_SECONDS)
        self._last = process
        return process

    def _prepare(self, case: Case, which: str, name: str) -> dict[str, Any]:
        process = self._process(name)
        before = list(process.prepared)
        job = {"case": cases.as_message(case), "which": which, "dtype": self.settings.dtype}
        try:
            answer = process.ask("prepare", peer=name, backend=self.settings.backend, **job)
        except WorkerDied as error:
            for other in before:  # they were prepared in the process that died
                with contextlib.suppress(WorkerDied):
                    process.ask("prepare", peer=other, backend=self.settings.backend, **job)
                    process.prepared.append(other)
            return {"failed": str(error)}
        if "failed" not in answer and "unsupported" not in answer:
            process.prepared.append(name)
        return answer

    def _with_memory(
        self, case: Case, which: str, names: Sequence[str], tell: Callable[[str], object]
    ) -> list[results.Row]:
        """The rows with what a first call needs, each peer in a new process."""
        settings = self.settings
        warm = dataclasses.replace(case, **MEMORY_WARM_UP)
        rows = []
        for name in names:
            tell(f"{case.network} {case.name} {which}: memory of {name}")
            process = Process(settings, self._cache)
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
        return rows

    def _with_times(
        self, case: Case, rows: dict[str, results.Row], tell: Callable[[str], object]
    ) -> dict[str, results.Row]:
        samples: dict[str, list[float]] = {name: [] for name, row in rows.items() if not row.note}
        peaks: list[dict[str, float]] = []
        notes: dict[str, str] = {}
        for turn in range(self.settings.rounds):
            peaks.append(self._peak(copy=turn == 0 or isinstance(case, CrossEntropyCase)))
            order = [name for name in samples if name not in notes]
            order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
            together = [order] if self.settings.protocol == "interleaved" else [[name] for name in order]
            for group in filter(None, together):
                tell(f"{case.network} {case.name}: round {turn + 1}, {', '.join(group)}")
                process = self._turn(self._process(group[0]))
                lost = [name for name in group if name not in process.prepared]
                notes.update(dict.fromkeys(lost, "its process died with another peer"))
                group = [name for name in group if name not in lost]
                if not group:
                    continue
                try:
                    answer = process.ask("measure", names=group, seconds=self.settings.seconds)
                except WorkerDied as error:
                    answer = {"failed": str(error)}
                if "failed" in answer:
                    notes.update(dict.fromkeys(group, answer["failed"]))
                for name, values in answer.get("samples", {}).items():
                    samples[name] += values
        peak = max((p["gflops"] for p in peaks if "gflops" in p), default=None)
        copy = max((p["copy"] for p in peaks if "copy" in p), default=None)
        timed = {}
        for name, row in rows.items():
            row = dataclasses.replace(row, peak_gflops=peak, copy_gbs=copy)
            if name in notes:
                row = dataclasses.replace(row, note=notes[name])
            timed[name] = row if row.note else results.with_samples(row, samples[name], case.unit)
        return timed

    def _peak(self, copy: bool) -> dict[str, float]:
        """The rates of the machine in this minute, of its memory if `copy`; of a GPU they are not known."""
        if self.settings.backend != "cpu":
            return {}
        process = self._turn(self._process("fastconv"))
        try:
            answer = process.ask("peak", dtype=self.settings.dtype, copy=copy, seconds=PEAK_SECONDS)
        except WorkerDied:
            return {}
        return {name: value for name, value in answer.items() if name != "failed"}


def available(names: Sequence[str], backend: str) -> tuple[list[str], dict[str, str]]:
    """Those of the peers that can be run here, and why the others cannot."""
    skipped = {}
    for name in names:
        reason = peers.PEERS[name, backend].missing()
        if reason is not None:
            skipped[name] = reason
    return [name for name in names if name not in skipped], skipped
