"""The tables of measured rows, and the pages they stand in: ``python -m fastconv.bench.report``, ``make bench-report``.

The long tables go to docs/performance.md, one picture and one short table to the README, all from the CSV files of
results/. Nothing between the markers is written by hand, and a test fails when it is not what this makes of the files.
For the rows of a measurement of your own, name their folder: its page and its plots are written there.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import plots, tables
from .results import Results, Row, geometric_mean, ratios, read_all

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER.parent / "README.md"
PAGE = FOLDER.parent / "docs" / "performance.md"
COMMAND = "make bench-report"  # whose markers the pages have

# How many of the layers on which fastconv loses are listed; the CSV file has them all.
MOST_LOSSES = 12
# Networks whose times are the overhead of a call: a table of microseconds in the place of rates.
OVERHEAD = ("small", "small_cross_entropy")

NOTHING = "No results are committed yet.\n"
PASSES = {
    "forward": "forward", "weight_grad": "weight gradient", "input_grad": "input gradient",
    "with_grad": "loss and gradient",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The README: one picture, one short table
# ---------------------------------------------------------------------------------------------------------------------


def short_section(folder: Path = RESULTS, page: Path = README) -> str:
    """Of the conditions with the most layers that torch was measured on too: the roofline, and a table by network."""
    found = [
        (machine, key, rows)
        for machine in read_all(folder)
        for key, rows in machine.groups()
        if any(row.peer.startswith("torch") and row.ratio is not None for row in rows)
    ]
    if not found:
        return NOTHING
    machine, key, rows = max(found, key=lambda one: len({row.pair for row in one[2]}))
    rows = [row for row in rows if row.network not in OVERHEAD]
    picture = folder / f"{machine.path.stem}-roofline-{key[0]}-{key[1]}-{key[2]}threads.svg"
    passes = list(dict.fromkeys(row.which for row in rows))
    theirs = [name for name in dict.fromkeys(row.peer for row in rows) if name.startswith("torch")]
    lines: list[list[object]] = []
    for network in dict.fromkeys(row.network for row in rows):
        here = [row for row in rows if row.network == network]
        cells = []
        for which in passes:
            values = ratios([row for row in here if row.which == which], theirs).values()
            cells.append(f"{geometric_mean(values):.2f}" if values else "n/a")
        lines.append([network, len({row.case for row in here}), *cells])
    slower, total = _slower(rows)
    others = dict.fromkeys(row.peer.removesuffix(" channels-last") for row in rows if not row.is_fastconv)
    compared = [row for row in rows if row.peer == "fastconv" or row.peer in theirs]
    parts = [
        "Times as fast as PyTorch in the better of its two layouts (above 1 fastconv is faster), geometric mean over "
        f"the layers of each network.\n{_where(machine, *key)}; {_versions(compared)}; {_dates(compared)}.",
        tables.table(["network", "layers", *(PASSES[which] for which in passes)], lines),
        f"Of these {total} cases (a layer and a pass) {len(slower)} are slower than the fastest of {_listed(others)}.",
    ]
    if picture.exists():
        parts.append(f"![Rate of each layer under the measured peak of the machine]({_link(picture, page)})")
    return "\n\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# The long tables
# ---------------------------------------------------------------------------------------------------------------------


def section(folder: Path = RESULTS, page: Path = PAGE) -> str:
    """All tables, and links to all plots, of the rows in a folder."""
    machines = [machine for machine in read_all(folder) if machine.rows]
    if not machines:
        return NOTHING
    parts = []
    for machine in machines:
        for key, rows in machine.groups():
            parts.append(_tables(machine, key, rows))
        memory = [line for key, rows in machine.memory_groups() for line in _memory(key, rows)]
        if memory:
            parts.append(_memory_table(memory))
        parts += _plot_links(machine, folder, page)
    if not any(row.backend == "cuda" for machine in machines for row in machine.rows):
        parts.append("CUDA: n/a. No run on a GPU is recorded.\n")
    return "\n".join(parts)


def _tables(machine: Results, key: tuple[str, str, int], rows: list[Row]) -> str:
    backend, dtype, threads = key
    lines = [f"## {machine.path.stem}: {backend}, {dtype}, {threads} threads", "", _conditions(machine, key, rows), ""]
    large = [row for row in rows if row.network not in OVERHEAD]
    for op, unit in (("conv", "GFLOP/s"), ("softmax", "GB/s")):
        some = [row for row in large if row.op.startswith(op)]
        if some:
            lines += [*_summary(some, unit), ""]
    other = machine.protocol("interleaved", key) if rows[0].protocol == "alone" else []
    both = _both_protocols([r for r in large if r.op.startswith("conv")], other)
    if both:
        lines += [*both, ""]
    overhead = [row for row in rows if row.network in OVERHEAD]
    if overhead:
        lines += [*_overhead(overhead), ""]
    losses = _losses(rows)
    if losses:
        lines += [*losses, ""]
    failed = [row for row in rows if row.note]
    if failed:
        lines += ["Failed: " + "; ".join(f"{r.peer} on {r.network} {r.case} {r.which} ({r.note})" for r in failed), ""]
    return "\n".join(lines)


def _plot_links(machine: Results, folder: Path, page: Path) -> Iterator[str]:
    """The rooflines as pictures, the other plots as links, by kind."""
    stem = machine.path.stem
    kinds: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"{stem}-*.svg")):
        kind, _, rest = path.stem.removeprefix(f"{stem}-").partition("-")
        at = _link(path, page)
        if kind == "roofline":
            yield f"![Rate of each layer under the measured peak of the machine, {rest}]({at})\n"
        else:
            kinds.setdefault(kind, []).append(f"[{rest.replace('-', ' ').replace('_', ' ')}]({at})")
    titles = {"ratios": "Ratios layer by layer", "growth": "Growth"}
    for kind, links in kinds.items():
        yield f"{titles.get(kind, kind)}: {', '.join(links)}.\n"


def _where(machine: Results, backend: str, dtype: str, threads: int) -> str:
    facts = machine.facts
    described = [str(facts.get(name)) for name in ("llvm_cpu", "simd") if facts.get(name)]
    if facts.get("virtual"):
        described.append("virtual machine")
    if backend == "cuda":
        described.insert(0, str(facts.get("gpu")))
    where = f" ({', '.join(described)})" if described else ""
    return f"**{facts.get('cpu') or machine.path.stem}**{where}, {backend}, {dtype}, {threads} threads"


def _versions(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row.version for row in rows if row.version}))


def _dates(rows: Iterable[Row]) -> str:
    dates = sorted({row.date for row in rows})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _conditions(machine: Results, key: tuple[str, str, int], rows: list[Row]) -> str:
    commits = sorted({row.commit for row in rows})
    how = {
        "alone": "each side alone in its own process",
        "interleaved": "all sides interleaved in one process, passive waiting",
    }[rows[0].protocol]
    peaks = [row.peak_gflops for row in rows if row.peak_gflops]
    peak = ""
    if peaks:
        low, high = min(peaks), max(peaks)
        peak = (
            f" The microkernel alone ran at {low:.0f} to {high:.0f} GFLOP/s in the same minutes; rates count the "
            "multiplications of the direct sum, so an algorithm that needs fewer, or skips those by the padding, "
            "can be above that."
        )
    return (
        f"{_where(machine, *key)}; {how}; {_dates(rows)}, commit {', '.join(commits) or 'unknown'}; "
        f"{_versions(rows)}.{peak}"
    )


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The peers as columns: title, and whose best time counts. torch is also shown in the better of its layouts."""
    present = [name for name in dict.fromkeys(row.peer for row in rows) if name != "fastconv"]
    columns: dict[str, list[str]] = {}
    for name in present:
        columns[name] = [name]
        other = f"{name} channels-last"
        if other in present and not name.startswith("fastconv"):
            columns[f"{name}, better layout"] = [name, other]
    return {title: names for title, names in columns.items() if not title.endswith("channels-last")}


def _summary(rows: list[Row], unit: str) -> list[str]:
    columns = {t: n for t, n in _columns(rows).items() if t != "reference"}
    lines = [
        "Speed relative to each peer: geometric mean over the layers (lowest to highest); above 1 fastconv is faster. "
        "The rate is the median over the layers.",
        "",
        *tables.head(["network", "pass", "layers", unit, "of peak", *columns], words=2),
    ]
    for network, which in dict.fromkeys((row.network, row.which) for row in rows):
        here = [row for row in rows if (row.network, row.which) == (network, which)]
        ours = [row for row in here if row.peer == "fastconv" and row.rate is not None]
        if not ours:
            continue
        percents = [row.percent_of_peak for row in ours if row.percent_of_peak is not None]
        cells = [_spread(list(ratios(here, names).values())) for names in columns.values()]
        peak = f"{_median(percents):.0f} %" if percents else "n/a"
        lines.append(
            tables.row([network, which, len(ours), f"{_median(row.rate for row in ours):.1f}", peak, *cells])
        )
    return lines


def _both_protocols(alone: list[Row], interleaved: list[Row]) -> list[str]:
    """The ratios of both protocols over the layers that both have, or nothing."""
    kept = {(row.network, row.case, row.which, row.peer) for row in alone}
    kept &= {(row.network, row.case, row.which, row.peer) for row in interleaved}
    columns = {t: n for t, n in _columns(alone).items() if t != "reference"}
    lines = [
        "Both protocols, over the layers that were measured with both:",
        "",
        *tables.head(["protocol", "pass", "layers", *columns], words=2),
    ]
    head = len(lines)
    for which in dict.fromkeys(row.which for row in alone):
        for rows in (alone, interleaved):
            here = [r for r in rows if r.which == which and (r.network, r.case, r.which, r.peer) in kept]
            if here:
                cells = [_spread(list(ratios(here, names).values())) for names in columns.values()]
                number = len({row.pair for row in here})
                lines.append(tables.row([here[0].protocol, which, number, *cells]))
    return lines if len(lines) > head else []


def _overhead(rows: list[Row]) -> list[str]:
    names = [name for name in dict.fromkeys(row.peer for row in rows) if name != "reference"]
    lines = [
        "Calls that are mostly overhead, best microseconds:",
        "",
        *tables.head(["call", "pass", *names], words=2),
    ]
    for case, which in dict.fromkeys((row.case, row.which) for row in rows):
        best = {r.peer: 1e3 * r.best_ms for r in rows if (r.case, r.which) == (case, which) and r.best_ms is not None}
        cells = (f"{best[name]:.1f}" if name in best else "n/a" for name in names)
        lines.append(tables.row([case, which, *cells]))
    return lines


def _memory_table(lines: list[list[object]]) -> str:
    said = (
        "Peak memory of one call, its result and the scratch it keeps included, each in a new process: what the peer "
        "needs relative to fastconv, geometric mean over the layers (lowest to highest)."
    )
    titles = ["network", "dtype", "pass", "peers", "layers", "fastconv, median MB"]
    return f"## Memory\n\n{said}\n\n{tables.table(titles, lines, words=4)}\n"


def _memory(key: tuple[str, str, int], rows: list[Row]) -> list[list[object]]:
    """Rows of the table of memory, under one set of conditions."""
    lines: list[list[object]] = []
    for network, which in dict.fromkeys((row.network, row.which) for row in rows):
        here = [row for row in rows if (row.network, row.which) == (network, which)]
        ours = [row for row in here if row.peer == "fastconv"]
        cells = [
            f"{name} {_spread(found)}"
            for name in dict.fromkeys(row.peer for row in here)
            if name not in ("fastconv", "reference") and (found := list(ratios(here, [name]).values()))
        ]
        needed = f"{_median(r.memory_mb for r in ours):.1f}"
        lines.append([network, key[1], which, "; ".join(cells), len(ours), needed])
    return lines


def _median(values: Iterable[float | None]) -> float:
    known = sorted(value for value in values if value is not None)
    middle = len(known) // 2
    return known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _slower(rows: list[Row]) -> tuple[list[Row], int]:
    """The rows of the fastest peer where it is faster than fastconv, the worst first; and the number of all cases."""
    slower = []
    for pair in dict.fromkeys(row.pair for row in rows):
        peers = [r for r in rows if r.pair == pair and not r.is_fastconv and r.ratio is not None]
        fastest = min(peers, key=lambda r: r.ratio or math.inf, default=None)
        if fastest is not None and fastest.ratio is not None and fastest.ratio < 1:
            slower.append(fastest)
    return sorted(slower, key=lambda row: row.ratio or 0), len({row.pair for row in rows})


def _losses(rows: list[Row]) -> list[str]:
    """The layers on which the fastest peer is faster than fastconv."""
    slower, total = _slower(rows)
    lines = [f"Where fastconv loses to the fastest of its peers: {len(slower)} of {total} cases."]
    if not slower:
        return lines
    if len(slower) > MOST_LOSSES:
        lines[0] += f" The {MOST_LOSSES} worst:"
    worst = [(f"{r.network} {r.case}", r.which, r.peer, f"{r.ratio:.2f}") for r in slower[:MOST_LOSSES]]
    return [*lines, "", tables.table(["layer", "pass", "fastest peer", "speed relative to it"], worst, words=3)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots and write the tables; of another folder, into a page beside its rows."""
    parser = argparse.ArgumentParser(prog="python -m fastconv.bench.report", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of rows (default: the published ones)")
    folder = parser.parse_args(arguments).folder
    published = folder.resolve() == RESULTS.resolve()
    pages = [PAGE, README] if published else [folder / "performance.md"]
    missing = [path for path in (*(pages if published else ()), folder) if not path.exists()]
    if missing:
        print(f"bench-report: {missing[0]} does not exist: run it in a clone of the repository", file=sys.stderr)
        return 1
    try:
        for machine in read_all(folder):
            for path in plots.draw(machine, folder, ("svg", "png")):
                print(path)
        if published:
            tables.write(PAGE, COMMAND, section())
            tables.write(README, COMMAND, short_section())
        else:
            text = f"# Measured here\n\n{short_section(folder, pages[0])}\n{section(folder, pages[0])}"
            pages[0].write_text(text, encoding="utf-8")
    except ValueError as error:  # of a results file, or of the markers
        print(f"bench-report: {error}", file=sys.stderr)
        return 1
    print(*pages, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
