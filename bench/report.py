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

NOTHING = "No results are committed yet.\n"


class Results:
    """The rows of one machine, and what the machine is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = results.read(path)
        facts = path.with_suffix(".json")
        self.facts: dict[str, Any] = json.loads(facts.read_text()) if facts.exists() else {}

    def groups(self) -> Iterator[tuple[tuple[str, str, int], list[Row]]]:
        """The rows of the networks by (backend, dtype, threads), of the protocol to be quoted."""
        found: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.rows:
            if not row.network.startswith("growth_"):
                found.setdefault((row.backend, row.dtype, row.threads), []).append(row)
        for key, rows in found.items():
            alone = [row for row in rows if row.protocol == "alone"]
            yield key, alone or rows


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
        for (backend, dtype, threads), rows in machine.groups():
            parts.append(_tables(machine, backend, dtype, threads, rows))
        plots = sorted(folder.glob(f"{machine.path.stem}-*.svg"))
        if plots:
            links = ", ".join(
                f"[{path.stem.removeprefix(machine.path.stem + '-').replace('-', ' ').replace('_', ' ')}]"
                f"(bench/results/{path.name})"
                for path in plots
            )
            parts.append(f"Plots: {links}.\n")
    if not any(row.backend == "cuda" for machine in machines for row in machine.rows):
        parts.append("CUDA: n/a. No run on a GPU is recorded.\n")
    return "\n".join(parts)


def _tables(machine: Results, backend: str, dtype: str, threads: int, rows: list[Row]) -> str:
    lines = [_heading(machine, backend, dtype, threads, rows), ""]
    for op, unit in (("conv", "GFLOP/s"), ("softmax", "GB/s")):
        some = [row for row in rows if row.op.startswith(op)]
        if some:
            lines += [*_summary(some, unit), ""]
    losses = _losses(rows)
    if losses:
        lines += [*losses, ""]
    failed = [row for row in rows if row.note]
    if failed:
        lines += ["Failed: " + "; ".join(f"{r.peer} on {r.network} {r.case} {r.which} ({r.note})" for r in failed), ""]
    return "\n".join(lines)


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
        peak = f" The microkernel alone ran at {low:.0f} to {high:.0f} GFLOP/s in the same minutes."
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


def _roofline(pyplot: Any, rows: list[Row], title: str) -> Any:
    """GFLOP/s against flops per byte, under the measured peak and the measured bandwidth."""
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    peak = max(row.peak_gflops for row in rows if row.peak_gflops)
    copy = max(row.copy_gbs for row in rows if row.copy_gbs)
    intensity = [row.flops / row.bytes for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    corner = peak / copy
    xs = sorted({low, min(max(corner, low), high), high})
    axes.plot(xs, [min(peak, copy * x) for x in xs], color="black",
              label=f"{peak:.0f} GFLOP/s (microkernel), {copy:.0f} GB/s (copy)")  # fmt: skip
    for name, marker in (("fastconv", "o"), ("torch", "x"), ("torch channels-last", "+"), ("onnxruntime", "1")):
        some = [row for row in rows if row.peer == name and row.which == "forward"]
        if some:
            axes.scatter(
                [r.flops / r.bytes for r in some], [r.rate for r in some], marker=marker, label=name, alpha=0.7
            )
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that must be moved", ylabel="GFLOP/s",
             title=f"Forward convolutions, {title}")  # fmt: skip
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    return figure


def _ratio_bars(pyplot: Any, rows: list[Row], title: str) -> Any:
    """A bar for each layer and peer: how many times faster fastconv is; a panel for each pass."""
    passes = list(dict.fromkeys(row.which for row in rows))
    layers = list(dict.fromkeys(row.case for row in rows))
    shown = [n for n in dict.fromkeys(row.peer for row in rows) if not n.startswith(("fastconv", "reference"))]
    height = max(3.0, 0.12 * len(layers) * (len(shown) + 1) + 1)
    figure, panels = pyplot.subplots(1, len(passes), figsize=(5 * len(passes) + 1, height), sharey=True, squeeze=False)
    thickness = 1 / (len(shown) + 1)
    for axes, which in zip(panels[0], passes, strict=True):
        for index, name in enumerate(shown):
            found = {row.case: row.ratio for row in rows if (row.which, row.peer) == (which, name)}
            at = [n for n, layer in enumerate(layers) if layer in found]
            # bars begin at 1: to the right fastconv is faster
            axes.barh([n + index * thickness for n in at], [found[layers[n]] - 1 for n in at], thickness, left=1,
                      color=f"C{index}", label=name)  # fmt: skip
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xscale="log", title=which, xlabel="fastconv is ... times as fast")
        axes.grid(True, axis="x", which="both", alpha=0.2)
    panels[0][0].set_yticks([n + thickness * (len(shown) - 1) / 2 for n in range(len(layers))], layers, fontsize=7)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
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
    for name in dict.fromkeys(row.peer for row in rows):
        points = sorted((int(row.case.partition("=")[2]), y) for row in rows if row.peer == name and (y := value(row)))
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        fitted = f", slope {slope(xs, ys):.2f}" if len(set(xs)) > 1 else ""
        axes.plot(xs, ys, marker="o", label=f"{name}{fitted}")
    against = "image size" if question in ("size", "memory") else question
    axes.set(xscale="log", yscale="log", xlabel=against, ylabel="peak memory of a call, MB" if memory else "ms (best)",
             title=f"64 -> 64 channels, 56 x 56, 3 x 3, batch 4: {rows[0].which}, {against} varied")  # fmt: skip
    ticks = sorted({int(row.case.partition("=")[2]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
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
