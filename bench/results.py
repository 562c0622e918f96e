"""Rows of results: a CSV file for each machine, one row for each peer, pass, layer and protocol.

A new measurement takes the place of the row it repeats; git has the history. The columns are described in README.md.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROTOCOLS = ("alone", "interleaved", "memory")

# Ratios count less memory than this as this much: allocators take it in steps, and keep some of it.
LEAST_MB = 1.0


@dataclass(frozen=True)
class Row:
    """One peer on one pass of one layer. Numbers that were not measured are None, and empty in the file."""

    machine: str
    backend: str
    protocol: str
    network: str
    case: str
    op: str
    which: str
    dtype: str
    batch: int
    threads: int
    peer: str
    best_ms: float | None = None
    median_ms: float | None = None
    spread_percent: float | None = None  # (3rd - 1st quartile) / median
    samples: int = 0
    rate: float | None = None  # of the best sample
    unit: str = ""
    percent_of_peak: float | None = None
    ratio: float | None = None  # best time (memory) of the peer / that of fastconv: > 1 where fastconv is better
    peak_gflops: float | None = None
    copy_gbs: float | None = None
    flops: int = 0
    bytes: int = 0
    memory_mb: float | None = None
    count: int = 1
    date: str = ""
    commit: str = ""
    version: str = ""
    note: str = ""  # why there are no numbers

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row is about."""
        return (*self.pair, self.peer)

    @property
    def pair(self) -> tuple[Any, ...]:
        """What the rows of all peers have in common."""
        return (
            self.machine, self.backend, self.protocol, self.network, self.case, self.op, self.which, self.dtype,
            self.batch, self.threads,
        )  # fmt: skip

    @property
    def cost(self) -> float | None:
        """What should be small: the time, or the memory, if that was measured."""
        if self.protocol == "memory":
            return None if self.memory_mb is None else max(self.memory_mb, LEAST_MB)
        return self.best_ms

    @property
    def is_fastconv(self) -> bool:
        return self.peer.startswith("fastconv")


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Row)}


class ResultsError(ValueError):
    """A results file cannot be read. The message names the file, the line and the column."""


def with_samples(row: Row, samples: Sequence[float], unit: str) -> Row:
    """The row with its times (in seconds) and what follows from them, but for the ratio."""
    best, median = min(samples), statistics.median(samples)
    spread = 0.0
    if len(samples) > 1:
        first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
        spread = 100 * (third - first) / median
    amount, peak = (row.flops, row.peak_gflops) if unit == "GFLOP/s" else (row.bytes, row.copy_gbs)
    rate = amount / best / 1e9
    return dataclasses.replace(
        row, best_ms=1e3 * best, median_ms=1e3 * median, spread_percent=spread, samples=len(samples), rate=rate,
        unit=unit, percent_of_peak=100 * rate / peak if peak else None,
    )  # fmt: skip


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows of one layer and pass, each with its ratio to plain fastconv."""
    ours = next((row.cost for row in rows if row.peer == "fastconv"), None)
    return [dataclasses.replace(row, ratio=row.cost / ours) if ours and row.cost is not None else row for row in rows]


def note_of(error: BaseException) -> str:
    """What a row says of an error in the place of figures: its type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def read(path: Path) -> list[Row]:
    """The rows of a results file. Raises ResultsError, OSError."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise ResultsError(f"{path}, line 1: columns {','.join(header)} (expected {','.join(COLUMNS)})")
        return [_parse(path, reader.line_num, values) for values in reader]


def _parse(path: Path, line: int, values: Sequence[str]) -> Row:
    if len(values) != len(COLUMNS):
        raise ResultsError(f"{path}, line {line}: {len(values)} values (expected {len(COLUMNS)})")
    fields: dict[str, Any] = {}
    for name, text in zip(COLUMNS, values, strict=True):
        kind = _KINDS[name]
        try:
            if kind == "str":
                fields[name] = text
            elif kind == "int":
                fields[name] = int(text)
            else:
                fields[name] = float(text) if text else None
        except ValueError:
            raise ResultsError(f"{path}, line {line}, column {name}: {text!r} is no number") from None
    return Row(**fields)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the file anew, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_text(getattr(row, name)) for name in COLUMNS] for row in rows)
    os.replace(new, path)


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The old rows, those that are measured again replaced in their places, and the others after them."""
    rows = {row.key: row for row in old}
    rows.update((row.key, row) for row in new)
    return list(rows.values())


def regressions(old: Iterable[Row], new: Iterable[Row], tolerance: float = 0.1) -> list[str]:
    """What got worse: each ratio to a peer that fell by more than `tolerance`, in words.

    Ratios are compared and not times, since the peer saw the same clock and the same neighbours.
    """
    before = {row.key[1:]: row for row in old}  # whatever the machine is called
    found = []
    for row in new:
        then = before.get(row.key[1:])
        if row.is_fastconv or then is None or then.ratio is None:
            continue
        where = f"{row.network} {row.case} {row.which} {row.dtype} batch {row.batch}, {row.threads} threads, {row.peer}"
        if row.ratio is not None and row.ratio < (1 - tolerance) * then.ratio:
            found.append(f"{where}: {then.ratio:.2f} -> {row.ratio:.2f}")
    return found


def compared(old: Iterable[Row], new: Iterable[Row]) -> int:
    """How many ratios `regressions` compares."""
    before = {row.key[1:] for row in old if row.ratio is not None}
    return sum(not row.is_fastconv and row.ratio is not None and row.key[1:] in before for row in new)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


class Results:
    """The rows of one machine, and what the machine is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path)
        facts = path.with_suffix(".json")
        self.facts: dict[str, Any] = json.loads(facts.read_text()) if facts.exists() else {}

    def groups(self) -> Iterator[tuple[tuple[str, str, int], list[Row]]]:
        """The timed rows of the networks by (backend, dtype, threads), of the protocol to be quoted."""
        for key, rows in self._by_conditions(lambda row: row.protocol != "memory"):
            alone = [row for row in rows if row.protocol == "alone"]
            yield key, alone or rows

    def _by_conditions(self, wanted: Callable[[Row], bool]) -> Iterator[tuple[tuple[str, str, int], list[Row]]]:
        found: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.rows:
            if not row.network.startswith("growth_") and wanted(row):
                found.setdefault((row.backend, row.dtype, row.threads), []).append(row)
        yield from found.items()

    def protocol(self, name: str, key: tuple[str, str, int]) -> list[Row]:
        """The rows of the networks of one protocol under the conditions `key`."""
        return next((rows for k, rows in self._by_conditions(lambda row: row.protocol == name) if k == key), [])

    def memory_groups(self) -> Iterator[tuple[tuple[str, str, int], list[Row]]]:
        """The rows of the networks whose memory was measured, by (backend, dtype, threads)."""
        yield from self._by_conditions(lambda row: row.protocol == "memory" and row.memory_mb is not None)


def read_all(folder: Path) -> list[Results]:
    return [Results(path) for path in sorted(folder.glob("*.csv"))]


def ratios(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """For each layer and pass, the ratio of the fastest of the peers `names` to fastconv."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row.peer in names and row.ratio is not None:
            best[row.pair] = min(best.get(row.pair, math.inf), row.ratio)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Where and when
# ---------------------------------------------------------------------------------------------------------------------


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """The commit of the sources, with + where they differ from it; empty where they are no git repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../fastconv", "../cuda_kernels")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> dict[str, Any]:
    """What decides how fast this machine is, as far as it tells."""
    import llvmlite.binding as llvm

    cpu = dict(_cpu_facts())
    features = llvm.get_host_cpu_features()
    simd = [name for name in ("avx512f", "avx2", "avx", "sve", "neon") if features.get(name)]
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "llvm_cpu": llvm.get_host_cpu_name(),
        "simd": simd[0] if simd else "none known",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": dict(_caches()),
        "memory_gb": _memory(),
        "virtual": "hypervisor" in cpu.get("flags", "").split(),
        "frequency_governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpu": _gpu(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def machine_name(facts: dict[str, Any]) -> str:
    """A name for a file: the CPU as LLVM calls it, its SIMD and how many there are; the GPU, if there is one.

    (The names that virtual machines give their CPUs often say less.)
    """
    parts = [facts["llvm_cpu"], facts["simd"], f"{facts['cpus']}cpus", facts["gpu"] or ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def write_machine(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _cpu_facts() -> Iterator[tuple[str, str]]:
    """The fields of the first CPU in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _caches() -> Iterator[tuple[str, str]]:
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_line(index / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            yield f"L{level}", size


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _line(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None
