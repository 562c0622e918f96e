"""One run: cases checked and timed, rows written as they are measured, failures told and counted."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import results, timing
from ..cases import Case, ConvolutionCase, CrossEntropyCase
from ..checks import Disagreement
from ..peers import Unsupported
from .arrays import TF32, Library, set_precision
from .checks import check, check_small, check_tile
from .clock import Timer, peaks
from .peers import PEERS, Problem, operands, version

BATCH = 32  # of the two-dimensional networks, whose tables have the batch of a CPU
LEAST_LOGITS = 1 << 26  # of cross-entropy, whose batch grows until there are as many: more than the caches hold
SAMPLES, ROUNDS = 5, 3  # of each peer in a round

# How far fastconv's result as a whole may be from torch's, ||difference|| / ||torch's||: both round.
NEAR = {"float64": 1e-12, "float32": 1e-4, TF32: 3e-3, "float16": 3e-3, "bfloat16": 2e-2}


class DeviceLost(Exception):
    """After an error nothing runs on the device in this process."""


@dataclass
class Bench:
    """What a run needs, and what it has found. Tests make it of arrays and timers of the host."""

    arrays: Library
    timer: Timer
    machine: str
    output: Path
    deadline: float  # of time.monotonic
    batch: int = BATCH
    least_logits: int = LEAST_LOGITS
    samples: int = SAMPLES
    rounds: int = ROUNDS
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    peers: Sequence[str] = tuple(PEERS)
    tell: Callable[[str], object] = print
    failures: list[str] = dataclasses.field(default_factory=list)
    done: int = 0
    checks_until: float = math.inf  # of time.monotonic
    right: int = 0  # checks
    unchecked: int = 0  # for want of time
    commit: str = dataclasses.field(default_factory=results.commit)

    @property
    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.deadline - time.monotonic()

    def guarded(self, what: str, job: Callable[[], Any]) -> Any:
        """The job's result, or None and a line that says what went wrong. Raises DeviceLost."""
        try:
            return job()
        except Unsupported:
            return None
        except Exception as error:  # whatever one case does, the others have their turn
            self.failures.append(f"{what}: {results.note_of(error)}")
            self.tell(f"FAILED {self.failures[-1]}")
            if not isinstance(error, Disagreement):
                traceback.print_exc(limit=-4)
            self._forget()
        try:
            self.arrays.synchronize()
        except Exception as error:
            raise DeviceLost(results.note_of(error)) from error
        return None

    def _forget(self) -> None:
        """Give back the memory of an error's frames, whatever filled it."""
        gc.collect()
        torch = getattr(self.arrays, "torch", None)
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def check(self, case: Case, which: str, dtype: str, peer: str, tile: int | None = None) -> None:
        """fastconv on a small shape against fastconv.reference, in the tile of this number if given."""
        if time.monotonic() > self.checks_until:
            self.unchecked += 1
            return

        def one() -> bool:
            set_precision(self.arrays, dtype)
            if tile is None:
                check_small(case, which, dtype, self.arrays, peer)
            else:
                check_tile(case, which, dtype, self.arrays, peer, tile)
            return True

        self.right += bool(self.guarded(name_of_check(case, which, dtype, peer, tile), one))

    def tell_checks(self) -> None:
        skipped = f", SKIPPED {self.unchecked} for want of time" if self.unchecked else ""
        self.tell(f"checked: {self.right} right, {len(self.failures)} wrong{skipped}")

    def note(self, **facts: Any) -> None:
        """Write facts about the machine to the file beside the rows."""
        file = self.output.with_suffix(".json")
        known = json.loads(file.read_text()) if file.exists() else {}
        results.write_machine(file, known | facts)

    def measure_peaks(self, dtypes: Sequence[str]) -> None:
        self.peaks = peaks(self.timer, self.arrays, dtypes, self.tell)
        self.note(peaks=self.peaks)

    def measure(self, case: Case, which: str, dtype: str) -> list[results.Row]:
        """The rows of one pass of one layer, written to the file as well."""
        case = self.for_gpu(case)
        given = self.guarded(f"{case.network} {case.name} {dtype}", lambda: operands(case, dtype, self.arrays))
        if given is None:
            return []
        problem = Problem(case, which, dtype, self.arrays, given)
        rows: dict[str, results.Row] = {}
        calls: dict[str, Callable[[], Any]] = {}
        theirs: Any = None
        for peer in sorted(self.peers, key=lambda p: not p.startswith("torch")):  # fastconv is compared with torch
            what = f"{case.network} {case.name} {which} {dtype} {peer}"
            before = len(self.failures)

            def prepare(peer=peer, theirs=theirs) -> tuple[Callable[[], Any], Any]:
                set_precision(self.arrays, dtype)
                prepared = PEERS[peer](problem)
                raw = prepared.call()
                result = raw if isinstance(raw, tuple) else prepared.result(raw)
                check(problem, result)
                if theirs is not None and peer.startswith("fastconv"):
                    self.compare(problem, result, theirs)
                return prepared.call, result

            made = self.guarded(what, prepare)
            if made is None and len(self.failures) == before:
                continue  # the peer does not do this
            note = "" if made is not None else self.failures[-1].removeprefix(f"{what}: ")
            rows[peer] = self._row(case, which, dtype, peer, note)
            if made is not None:
                calls[peer] = made[0]
                if peer == "torch":
                    theirs = made[1]
        timed = self._times(case, which, dtype, calls)
        for peer, samples in timed.items():
            if samples:
                rows[peer] = results.with_samples(rows[peer], samples, case.unit)
            else:
                rows[peer] = dataclasses.replace(rows[peer], note=self.failures[-1])
        found = results.with_ratios([rows[peer] for peer in self.peers if peer in rows])
        self._save(found)
        self.done += 1
        if found:
            self.tell(line(found))
        return found

    def for_gpu(self, case: Case) -> Case:
        """With the batch of a GPU, unless the table has more."""
        if isinstance(case, CrossEntropyCase):
            row = case.classes * math.prod(case.size)
            return dataclasses.replace(case, batch=max(case.batch, -(-self.least_logits // row)))
        if case.network in ("planes", "medical", "check") or case.batch == 1:
            return case
        return dataclasses.replace(case, batch=max(case.batch, self.batch))

    def compare(self, problem: Problem, result: Any, theirs: Any) -> None:
        ours, them = ((r[-1] if isinstance(r, tuple) else r) for r in (result, theirs))
        off = self.arrays.distance(ours, them)
        if not off <= NEAR[problem.dtype]:
            raise Disagreement(f"as a whole {off:.3g} away from torch's result (expected {NEAR[problem.dtype]:g})")

    def _times(
        self, case: Case, which: str, dtype: str, calls: dict[str, Callable[[], Any]]
    ) -> dict[str, list[float]]:
        """Seconds of each call, some samples of it in every turn: so many are queued while the device sleeps."""
        hosts: dict[str, float] = {}
        given_up: set[str] = set()

        def sampler(peer: str) -> Callable[[], list[float]]:
            def sample() -> list[float]:
                set_precision(self.arrays, dtype)
                if peer not in hosts:
                    hosts[peer] = self.timer.host(calls[peer], 2)
                return self.timer.device(calls[peer], self.samples, hosts[peer])

            def guarded() -> list[float]:
                if peer in given_up:
                    return []
                found = self.guarded(f"{case.network} {case.name} {which} {dtype} {peer}", sample)
                if peer not in hosts:  # not even the host could call it
                    given_up.add(peer)
                return found or []

            return guarded

        return timing.by_turns({peer: sampler(peer) for peer in calls}, least=self.rounds)

    def _row(self, case: Case, which: str, dtype: str, peer: str, note: str) -> results.Row:
        itemsize = {"float64": 8, "float32": 4, TF32: 4}.get(dtype, 2)
        return results.Row(
            machine=self.machine, backend="cuda", protocol="interleaved", network=case.network, case=case.name,
            op=case.op, which=which, dtype=dtype, batch=case.batch, threads=1, peer=peer, flops=case.flops(which),
            bytes=case.bytes(which, itemsize), count=case.count, peak_gflops=self.peaks.get(dtype),
            copy_gbs=self.peaks.get("copy"), date=results.today(), commit=self.commit, version=version(peer),
            note=note[:300],
        )  # fmt: skip

    def _save(self, rows: Sequence[results.Row]) -> None:
        kept = results.read(self.output) if self.output.exists() else []
        results.write(self.output, results.merge(kept, rows))

    def measure_launches(self) -> dict[str, float]:
        """Microseconds of the host for a small call, by peer and operation, into arrays that are there already."""
        costs: dict[str, float] = {}
        small = [
            (ConvolutionCase("launch", "conv2d", 1, 4, (8, 8), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1), "forward"),
            (CrossEntropyCase("launch", "cross-entropy", 8, 16, (), "index"), "with_grad"),
        ]
        for (case, which), peer in itertools.product(small, ("fastconv", "torch")):

            def one(case=case, which=which, peer=peer) -> float:
                problem = Problem(case, which, "float32", self.arrays, operands(case, "float32", self.arrays))
                call = PEERS[peer](problem).call
                self.timer.host(call, 10)
                return min(self.timer.host(call, 100) for _ in range(3))

            seconds = self.guarded(f"launch {case.name} {peer}", one)
            if seconds is not None:
                costs[f"{peer} {case.name}"] = round(1e6 * seconds, 2)
                self.tell(f"launch {case.name}: {peer} takes the host {1e6 * seconds:.1f} us a call")
        self.note(launch_us=costs)
        return costs


def name_of_check(case: Case, which: str, dtype: str, peer: str, tile: int | None) -> str:
    return f"check {case.name} {which} {dtype} {peer}{'' if tile is None else f' tile {tile}'}"


def line(rows: Sequence[results.Row]) -> str:
    """One line of the table that is printed as it grows: fastconv's time and rates, and the ratios to the peers."""
    ours = next((row for row in rows if row.peer == "fastconv"), None)
    first = rows[0]
    words = [f"{first.network} {first.case}", first.which, first.dtype, f"batch {first.batch}:"]
    if ours is not None and ours.best_ms:
        seconds = 1e-3 * ours.best_ms
        rate, moved = ours.flops / seconds / 1e9, ours.bytes / seconds / 1e9
        words.append(f"{ours.best_ms:.4f} ms, {rate:.0f} GFLOP/s{_percent(rate, ours.peak_gflops)},")
        words.append(f"{moved:.0f} GB/s{_percent(moved, ours.copy_gbs)}")
    for row in rows:
        if row.peer != "fastconv" and not row.note:
            words.append(f"| {row.peer} {row.ratio:.2f}x" if row.ratio else f"| {row.peer} {row.best_ms:.4f} ms")
        elif row.note:
            words.append(f"| {row.peer} FAILED")
    return " ".join(words)


def _percent(value: float, of: float | None) -> str:
    return f" ({100 * value / of:.0f}%)" if of else ""


def summary(rows: Iterable[results.Row]) -> Iterator[str]:
    """The geometric mean of each network, pass and arithmetic to the better layout of torch, best and worst layer."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    ours: dict[tuple[Any, ...], float] = {}
    theirs: dict[tuple[Any, ...], float] = {}
    for row in rows:
        side = ours if row.is_fastconv else theirs if row.peer.startswith("torch") else None
        if side is not None and row.best_ms is not None:
            side[row.pair] = min(side.get(row.pair, math.inf), row.best_ms)
    for row in rows:
        if row.pair in ours and row.pair in theirs:
            ratios.setdefault((row.network, row.which, row.dtype), {})[row.case] = theirs[row.pair] / ours[row.pair]
    for (network, which, dtype), found in ratios.items():
        worst, best = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
        yield (
            f"{network} {which} {dtype}: {results.geometric_mean(found.values()):.2f}x torch over {len(found)} layers; "
            f"worst {worst} {found[worst]:.2f}x, best {best} {found[best]:.2f}x"
        )
