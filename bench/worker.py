"""A process that prepares, checks and times peers: one side alone, or all of them interleaved.

Started by `run`, it reads jobs from standard input and writes answers to standard output, each a line of JSON. Between
jobs it blocks on the pipe, so its threads sleep while another side is measured. The environment that it is started in
decides how many threads there are and how they wait (`run.environment`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from . import results, timing


def pin(threads: int) -> None:
    """Keep the process on as many CPUs as it has threads, the same ones for every side."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Worker:
    """What the process holds between jobs: the operands of one case, and the peers prepared for its passes."""

    def __init__(self, threads: int, spinning: bool, cache: Path) -> None:
        self.threads, self.spinning, self.cache = threads, spinning, cache
        self.operands_of: Any = None
        self.operands: dict[str, Any] = {}
        self.prepared: dict[tuple[str, str], Any] = {}  # by pass and peer

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"do_{job.pop('do')}")(**job)

    def do_prepare(self, case: dict[str, Any], which: str, dtype: str, peer: str, backend: str) -> dict[str, Any]:
        """Prepare a peer and check its first result."""
        from . import cases, checks, peers

        self._use_threads()
        this = cases.from_message(case)
        if self.operands_of != (this, dtype):
            self.prepared.clear()
            self.operands_of, self.operands = (this, dtype), this.operands(_dtype(dtype))
        problem = peers.Problem(this, which, self.operands, self.threads, self.spinning)
        try:
            prepared = peers.PEERS[peer, backend].prepare(problem)
            with prepared.context():
                result = prepared.fetch(prepared.call())
            checks.check(this, which, self.operands, result, self.cache)
        except peers.Unsupported as reason:
            return {"unsupported": str(reason)}
        except checks.Disagreement as what:
            return {"failed": f"disagrees: {what}"}
        self.prepared[which, peer] = prepared
        return {"version": peers.PEERS[peer, backend].version()}

    def do_measure(self, jobs: list[list[str]], seconds: float) -> dict[str, Any]:
        """Time the prepared `jobs`, each a pass and a peer, taking turns; their samples in the same order."""
        chosen = [self.prepared[which, peer] for which, peer in jobs]
        with contextlib.ExitStack() as contexts:
            for one in chosen:
                contexts.enter_context(one.context())
            return {"samples": timing.repeated_calls([(one.call, one.wait) for one in chosen], seconds)}

    def do_peak(self, dtype: str, copy: bool, seconds: float) -> dict[str, Any]:
        """The microkernel's rate, that of 16-bit types in float32, as they are computed; `copy`: memory's as well."""
        from . import peak

        self._use_threads()
        precise = "float64" if dtype == "float64" else "float32"
        answer = {"gflops": peak.microkernel_rate(precise, seconds)}
        if copy:
            answer["copy"] = peak.copy_rate(seconds)
        return answer

    def do_memory(
        self, warm: dict[str, Any], case: dict[str, Any], which: str, dtype: str, peer: str, backend: str
    ) -> dict[str, Any]:
        """Bytes that the first call of a peer needs at its peak, its result and the scratch it keeps included.

        For a new process: its first call, on the small case `warm`, loads or compiles the code. Linux only: there
        alone the high-water mark of a process can be set back.
        """
        from . import cases, checks, peers

        self._use_threads()
        try:
            for message in (warm, case):
                this = cases.from_message(message)
                operands = this.operands(_dtype(dtype))
                problem = peers.Problem(this, which, operands, self.threads, self.spinning)
                prepared = peers.PEERS[peer, backend].prepare(problem)
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")
                before = _status("VmRSS")
                with prepared.context():
                    result = prepared.call()
                    most = _status("VmHWM")
                    checks.check(this, which, operands, prepared.fetch(result), self.cache)
                del prepared, result
        except peers.Unsupported as reason:
            return {"unsupported": str(reason)}
        except checks.Disagreement as what:
            return {"failed": f"disagrees: {what}"}
        return {"bytes": max(0, most - before), "version": peers.PEERS[peer, backend].version()}

    def do_forget(self) -> dict[str, Any]:
        """Drop what was prepared; the operands stay for another pass of the same case."""
        self.prepared.clear()
        gc.collect()
        return {}

    def _use_threads(self) -> None:
        import fastconv

        fastconv.set_num_threads(self.threads)


def _dtype(name: str) -> Any:
    import numpy as np

    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def _private_output() -> TextIO:
    """The pipe of answers, on which no library can print: their standard output goes to standard error."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return pipe


def main() -> None:
    output = _private_output()
    settings = json.loads(sys.stdin.readline())
    pin(settings["threads"])
    worker = Worker(settings["threads"], settings["spinning"], Path(settings["cache"]))
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # whatever a peer raises is reported, and the next one has its turn
            traceback.print_exc()
            answer = {"failed": results.note_of(error)}
        print(json.dumps(answer), file=output, flush=True)


if __name__ == "__main__":
    main()
