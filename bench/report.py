"""The README's section and the plots, made from the CSV files of results/: ``python -m fastconv.bench.report``.

Nothing in the section is written by hand, and a test fails when it is not what this makes of the files.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import cases, results
from .results import Row, geometric_mean

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# How many of the layers on which fastconv loses are listed; the CSV file has them all.
MOST_LOSSES = 12
# How many peers the plots show, the fastest ones: more bars for each layer cannot be told apart.
MOST_PEERS = 4
# Networks whose times are the overhead of a call: a table of microseconds in the place of rates.
OVERHEAD = ("small", "small_cross_entropy")

NOTHING = "No results are committed yet.\n"


class Results:
    """The rows of one machine, and what the machine is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = results.read(path)
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


def read_all(folder: Path = RESULTS) -> list[Results]:
    return [Results(path) for path in sorted(folder.glob("*.csv"))]


# ---------------------------------------------------------------------------------------------------------------------
# The README's section
# ---------------------------------------------------------------------------------------------------------------------


def section(folder: Path = RESULTS) -> str:
    """The Markdown between the markers."""
    machines = [machine for machine in read_all(folder) if machine.rows]
    if not machines:
        return NOTHING
    parts = []
    for machine in machines:
        for key, rows in machine.groups():
            parts.append(_tables(machine, key, rows))
        memory = [line for key, rows in machine.memory_groups() for line in _memory(key, rows)]
        if memory:
            parts.append("\n".join([*_MEMORY_HEAD, *memory, ""]))
        parts += _plot_links(machine, folder)
    if not any(row.backend == "cuda" for machine in machines for row in machine.rows):
        parts.append("CUDA: n/a. No run on a GPU is recorded.\n")
    return "\n".join(parts)


def _tables(machine: Results, key: tuple[str, str, int], rows: list[Row]) -> str:
    lines = [_heading(machine, *key, rows), ""]
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


def _plot_links(machine: Results, folder: Path) -> Iterator[str]:
    """The rooflines as pictures, the other plots as links, by kind."""
    stem = machine.path.stem
    kinds: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"{stem}-*.svg")):
        kind, _, rest = path.stem.removeprefix(f"{stem}-").partition("-")
        at = f"bench/results/{path.name}"
        if kind == "roofline":
            yield f"![Rate of each layer under the measured peak of the machine, {rest}]({at})\n"
        else:
            kinds.setdefault(kind, []).append(f"[{rest.replace('-', ' ').replace('_', ' ')}]({at})")
    titles = {"ratios": "Ratios layer by layer", "growth": "Growth"}
    for kind, links in kinds.items():
        yield f"{titles.get(kind, kind)}: {', '.join(links)}.\n"


def _heading(machine: Results, backend: str, dtype: str, threads: int, rows: list[Row]) -> str:
    facts = machine.facts
    described = [str(facts.get(name)) for name in ("llvm_cpu", "simd") if facts.get(name)]
    if facts.get("virtual"):
        described.append("virtual machine")
    if backend == "cuda":
        described.insert(0, str(facts.get("gpu")))
    where = f" ({', '.join(described)})" if described else ""
    versions = sorted({row.version for row in rows if row.version})
    dates, commits = sorted({row.date for row in rows}), sorted({row.commit for row in rows})
    # fastconv is the baseline; reference rows are of its package
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
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
        f"**{facts.get('cpu') or machine.path.stem}**{where}, {backend}, {dtype}, {threads} threads; {how}; {when}, "
        f"commit {', '.join(commits) or 'unknown'}; {', '.join(versions)}.{peak}"
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
        "| layers | pass | number | " + unit + " | of peak | " + " | ".join(columns) + " |",
        "| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(columns),
    ]  # fmt: skip
    for network, which in dict.fromkeys((row.network, row.which) for row in rows):
        here = [row for row in rows if (row.network, row.which) == (network, which)]
        ours = [row for row in here if row.peer == "fastconv" and row.rate is not None]
        if not ours:
            continue
        percents = [row.percent_of_peak for row in ours if row.percent_of_peak is not None]
        cells = [_spread(list(ratios(here, names).values())) for names in columns.values()]
        lines.append(
            f"| {network} | {which} | {len(ours)} | {_median(row.rate for row in ours):.1f} | "
            f"{f'{_median(percents):.0f} %' if percents else 'n/a'} | " + " | ".join(cells) + " |"
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
        "| protocol | pass | number | " + " | ".join(columns) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(columns),
    ]
    head = len(lines)
    for which in dict.fromkeys(row.which for row in alone):
        for rows in (alone, interleaved):
            here = [r for r in rows if r.which == which and (r.network, r.case, r.which, r.peer) in kept]
            if here:
                cells = [_spread(list(ratios(here, names).values())) for names in columns.values()]
                number = len({row.pair for row in here})
                lines.append(f"| {here[0].protocol} | {which} | {number} | " + " | ".join(cells) + " |")
    return lines if len(lines) > head else []


def _overhead(rows: list[Row]) -> list[str]:
    names = [name for name in dict.fromkeys(row.peer for row in rows) if name != "reference"]
    lines = [
        "Calls that are mostly overhead, best microseconds:",
        "",
        "| call | pass | " + " | ".join(names) + " |",
        "| --- | --- |" + " ---: |" * len(names),
    ]
    for case, which in dict.fromkeys((row.case, row.which) for row in rows):
        best = {r.peer: 1e3 * r.best_ms for r in rows if (r.case, r.which) == (case, which) and r.best_ms is not None}
        cells = (f"{best[name]:.1f}" if name in best else "n/a" for name in names)
        lines.append(f"| {case} | {which} | " + " | ".join(cells) + " |")
    return lines


_MEMORY_HEAD = [
    "Peak memory of one call, its result and the scratch it keeps included, each in a new process: what the peer needs "
    "relative to fastconv, geometric mean over the layers (lowest to highest).",
    "",
    "| layers | dtype | pass | number | fastconv, median MB | peers |",
    "| --- | --- | --- | ---: | ---: | --- |",
]


def _memory(key: tuple[str, str, int], rows: list[Row]) -> list[str]:
    """Lines of the table that `_MEMORY_HEAD` begins."""
    lines = []
    for network, which in dict.fromkeys((row.network, row.which) for row in rows):
        here = [row for row in rows if (row.network, row.which) == (network, which)]
        ours = [row for row in here if row.peer == "fastconv"]
        cells = [
            f"{name} {_spread(found)}"
            for name in dict.fromkeys(row.peer for row in here)
            if name not in ("fastconv", "reference") and (found := list(ratios(here, [name]).values()))
        ]
        lines.append(
            f"| {network} | {key[1]} | {which} | {len(ours)} | {_median(r.memory_mb for r in ours):.1f} | "
            + "; ".join(cells) + " |"
        )  # fmt: skip
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


def ratios(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """For each layer and pass, the ratio of the fastest of the peers `names` to fastconv."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row.peer in names and row.ratio is not None:
            best[row.pair] = min(best.get(row.pair, math.inf), row.ratio)
    return best


def _losses(rows: list[Row]) -> list[str]:
    """The layers on which the fastest peer is faster than fastconv, the worst first."""
    slower = []
    for pair in dict.fromkeys(row.pair for row in rows):
        peers = [r for r in rows if r.pair == pair and not r.is_fastconv and r.ratio is not None]
        fastest = min(peers, key=lambda r: r.ratio or math.inf, default=None)
        if fastest is not None and fastest.ratio is not None and fastest.ratio < 1:
            slower.append(fastest)
    total = len({row.pair for row in rows})
    lines = [f"Where fastconv loses to the fastest of its peers: {len(slower)} of {total} cases."]
    if not slower:
        return lines
    slower.sort(key=lambda row: row.ratio or 0)
    if len(slower) > MOST_LOSSES:
        lines[0] += f" The {MOST_LOSSES} worst:"
    lines += ["", "| layer | pass | fastest peer | speed relative to it |", "| --- | --- | --- | ---: |"]
    lines += [f"| {r.network} {r.case} | {r.which} | {r.peer} | {r.ratio:.2f} |" for r in slower[:MOST_LOSSES]]
    return lines


def with_section(text: str, new: str) -> str:
    """`text` with what is between the markers replaced; ValueError unless each is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}{END}{after}"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def plots(machine: Results, folder: Path = RESULTS, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Draw what the rows of a machine allow; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # no date in the file, and the same ids in every run: a plot that did not change is the same file
    matplotlib.rcParams["svg.hashsalt"] = "fastconv"
    written = []

    def save(figure: Any, name: str) -> None:
        for suffix in suffixes:
            path = folder / f"{machine.path.stem}-{name}.{suffix}"
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(path, metadata=metadata, dpi=120, bbox_inches="tight")
            written.append(path)
        pyplot.close(figure)

    for (backend, dtype, threads), rows in machine.groups():
        tag = f"{backend}-{dtype}-{threads}threads"
        convolutions = [row for row in rows if row.op.startswith("conv") and row.rate is not None]
        if any(row.peak_gflops and row.copy_gbs for row in convolutions):
            save(_roofline(pyplot, convolutions, f"{dtype}, {threads} threads"), f"roofline-{tag}")
        for network in dict.fromkeys(row.network for row in rows):
            here = [row for row in rows if row.network == network and row.ratio is not None]
            if any(not row.is_fastconv for row in here):
                save(_ratio_bars(pyplot, here, f"{network}, {dtype}, {threads} threads"), f"ratios-{network}-{tag}")
    for question in cases.GROWTH:
        rows = [row for row in machine.rows if row.network == f"growth_{question}" and not row.note]
        for which in dict.fromkeys(row.which for row in rows):
            some = [row for row in rows if row.which == which]
            save(_growth(pyplot, question, some), f"growth-{question}-{which}")
    return written


def _plain(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten where there is room, written out."""
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    subs = (1, 2, 5) if high / low < 300 else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _legend_below(figure: Any, handles: dict[str, Any]) -> None:
    """One legend for all panels, under them, where it hides nothing."""
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0),
                  ncols=min(len(handles), 5), frameon=False)  # fmt: skip


def _fastest(rows: list[Row]) -> list[str]:
    """The peers that come closest to fastconv, or beat it, by geometric mean: at most MOST_PEERS."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None and not row.peer.startswith(("fastconv", "reference")):
            found.setdefault(row.peer, []).append(row.ratio)
    return sorted(sorted(found, key=lambda name: geometric_mean(found[name]))[:MOST_PEERS], key=list(found).index)


def _roofline(pyplot: Any, rows: list[Row], title: str) -> Any:
    """GFLOP/s against flops per byte, under the measured peak and the measured bandwidth; a panel for each pass."""
    passes = list(dict.fromkeys(row.which for row in rows))
    figure, panels = pyplot.subplots(1, len(passes), figsize=(4.2 * len(passes) + 1, 4.5), sharex=True, sharey=True,
                                     squeeze=False)  # fmt: skip
    peak = max(row.peak_gflops for row in rows if row.peak_gflops)
    copy = max(row.copy_gbs for row in rows if row.copy_gbs)
    intensity = [row.flops / row.bytes for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    xs = sorted({low, min(max(peak / copy, low), high), high})
    handles: dict[str, Any] = {}
    markers = dict(zip(["fastconv", *_fastest(rows)], "ox+1^", strict=False))
    for axes, which in zip(panels[0], passes, strict=True):
        (handles[f"{peak:.0f} GFLOP/s (microkernel), {copy:.0f} GB/s (copy)"],) = axes.plot(
            xs, [min(peak, copy * x) for x in xs], color="black"
        )
        for index, (name, marker) in enumerate(markers.items()):
            some = [row for row in rows if row.peer == name and row.which == which]
            if some:
                handles[name] = axes.scatter(
                    [r.flops / r.bytes for r in some], [r.rate for r in some], marker=marker, s=30, alpha=0.7,
                    color=f"C{index}",
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="flops per byte that must be moved", title=which)
        axes.grid(True, which="both", alpha=0.2)
    panels[0][0].set_ylabel("GFLOP/s")
    _plain(panels[0][0].xaxis)
    _plain(panels[0][0].yaxis)
    figure.suptitle(f"Convolutions, {title}: every layer under what the machine can do")
    figure.tight_layout()
    _legend_below(figure, handles)
    return figure


def _in_order(rows: list[Row]) -> list[str]:
    """The names of the layers, in the order of their network."""
    measured = dict.fromkeys(row.case for row in rows)
    known = [case.name for case in cases.network(rows[0].network)] if rows[0].network in cases.NETWORKS else []
    return [name for name in known if name in measured] + [name for name in measured if name not in known]


def _ratio_bars(pyplot: Any, rows: list[Row], title: str) -> Any:
    """A bar for each layer and peer: how many times faster fastconv is; a panel for each pass."""
    passes = list(dict.fromkeys(row.which for row in rows))
    layers = _in_order(rows)
    shown = _fastest(rows)
    height = max(2.5, 0.1 * len(layers) * (len(shown) + 1) + 1)
    figure, panels = pyplot.subplots(1, len(passes), figsize=(4 * len(passes) + 2, height), sharey=True, squeeze=False)
    thickness = 1 / (len(shown) + 1)
    handles: dict[str, Any] = {}
    for axes, which in zip(panels[0], passes, strict=True):
        axes.set(xscale="log", title=which, xlabel="fastconv is ... times as fast")
        for index, name in enumerate(shown):
            found = {row.case: row.ratio for row in rows if (row.which, row.peer) == (which, name)}
            at = [n for n, layer in enumerate(layers) if layer in found]
            if at:  # bars begin at 1: to the right fastconv is faster
                handles[name] = axes.barh(
                    [n + index * thickness for n in at], [found[layers[n]] - 1 for n in at], thickness, left=1,
                    color=f"C{index}",
                )  # fmt: skip
        axes.axvline(1, color="black", linewidth=1)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.5), max(high, 2))  # so that a difference of some percent looks like one
        axes.grid(True, axis="x", which="both", alpha=0.2)
        _plain(axes.xaxis)
    panels[0][0].set_yticks([n + thickness * (len(shown) - 1) / 2 for n in range(len(layers))], layers, fontsize=7)
    panels[0][0].set_ylim(len(layers) - thickness, -1.5 * thickness)
    figure.suptitle(title)
    figure.tight_layout()
    _legend_below(figure, handles)
    return figure


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the exponent of a power law.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    return sum((a - mx) * (b - my) for a, b in zip(lx, ly, strict=True)) / sum((a - mx) ** 2 for a in lx)


def _growth(pyplot: Any, question: str, rows: list[Row]) -> Any:
    """Time, or memory, against the size that grows, on log axes, with the fitted slope of each peer."""
    memory = question == "memory"
    value: Callable[[Row], float | None] = (lambda row: row.memory_mb) if memory else (lambda row: row.best_ms)
    figure, axes = pyplot.subplots(figsize=(7, 5))
    handles: dict[str, Any] = {}
    for index, name in enumerate(dict.fromkeys(row.peer for row in rows)):
        points = sorted((int(row.case.partition("=")[2]), y) for row in rows if row.peer == name and (y := value(row)))
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        fitted = f", slope {slope(xs, ys):.2f}" if len(xs) > 1 else ""
        (handles[f"{name}{fitted}"],) = axes.plot(xs, ys, marker="osD^vx+*"[index % 8], alpha=0.8)
    against = {"size": "image size", "memory": "image size", "kernel": "kernel size", "threads": "number of threads"}
    what = against.get(question, question)
    base = cases.GROWTH_LAYER
    rest = {
        "channels": f"{base.in_channels} -> {base.out_channels} channels", "size": f"{base.size[0]} x {base.size[1]}",
        "kernel": f"kernel {base.kernel[0]} x {base.kernel[1]}", "batch": f"batch {base.batch}",
    }  # fmt: skip
    rest.pop("size" if memory else question, None)
    axes.set(xscale="log", yscale="log", xlabel=what, ylabel="peak memory of a call, MB" if memory else "ms (best)",
             title=f"How {'memory' if memory else 'time'} grows with the {what}\n"
             f"{rows[0].op} {rows[0].which}, {rows[0].dtype}; {', '.join(rest.values())}")  # fmt: skip
    ticks = sorted({int(row.case.partition("=")[2]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    _plain(axes.yaxis)
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    _legend_below(figure, handles)
    return figure


def main() -> int:
    """Draw the plots and rewrite the README's section."""
    if not README.exists():
        print(f"bench-report: {README} does not exist: run it in a clone of the repository", file=sys.stderr)
        return 1
    try:
        for machine in read_all():
            for path in plots(machine):
                print(path)
        text = README.read_text(encoding="utf-8")
        README.write_text(with_section(text, section()), encoding="utf-8")
    except ValueError as error:  # of a results file, or of the markers
        print(f"bench-report: {error}", file=sys.stderr)
        return 1
    print(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
