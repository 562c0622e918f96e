"""The plots of measured rows: rooflines, ratios layer by layer, growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import cases
from .results import Results, Row, geometric_mean

# How many peers the plots show, the fastest ones: more bars for each layer cannot be told apart.
MOST_PEERS = 4


def draw(machine: Results, folder: Path, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
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


def in_order(rows: list[Row]) -> list[str]:
    """The names of the layers, in the order of their network."""
    measured = dict.fromkeys(row.case for row in rows)
    known = [case.name for case in cases.network(rows[0].network)] if rows[0].network in cases.NETWORKS else []
    return [name for name in known if name in measured] + [name for name in measured if name not in known]


def _ratio_bars(pyplot: Any, rows: list[Row], title: str) -> Any:
    """A bar for each layer and peer: how many times faster fastconv is; a panel for each pass."""
    passes = list(dict.fromkeys(row.which for row in rows))
    layers = in_order(rows)
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
