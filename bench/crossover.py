"""Where the FFT and Winograd overtake the direct sum, over kernel, size and channels; docs/figures/crossover-*.md.

    python -m bench.crossover fft                 # prints the table
    python -m bench.crossover winograd --write    # and puts it into docs/figures/, with its picture beside it

Each figure is the best of many calls, the two algorithms taking turns, so that what else runs on the machine disturbs
both alike. float32, stride 1, "same" padding. The FFT: forward pass, a batch of one, one thread. Winograd: forward pass
and both gradients, batches of one and four, all threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fastconv as fc

from . import tables, timing

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SECONDS = 0.5  # for each row, or figure

# (spatial size, in channels, out channels, groups), and the kernels to try in each dimension
SHAPES = [
    *(((n, n), 1, 1, 1, k) for n in (64, 256, 512) for k in (7, 15, 23, 31, 47, 63)),
    *(((56, 56), 32, 32, 32, k) for k in (7, 15, 23, 31)),
    *(((n, n), c, c, 1, k) for n in (56, 112) for c in (4, 16, 64) for k in (5, 7, 11, 15)),
    *(((n,), 1, 1, 1, k) for n in (4096, 65536, 1048576) for k in (64, 128, 256, 512, 1024, 4096) if k < n),
    *(((16384,), 16, 16, 1, k) for k in (16, 64, 256, 1024)),
    *(((n,) * 3, c, c, 1, k) for n, c in ((64, 1), (32, 8)) for k in (3, 5, 7, 9)),
]


def best_of(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds of the best call of each. Always the same order: of two calls each then follows the other one."""
    samples = timing.single_calls(calls, seconds=seconds, least=3, order=timing.as_given)
    return {name: min(values) for name, values in samples.items()}


CHANNELS = (16, 32, 48, 64, 128, 256)  # of Winograd, for each batch and size


@dataclass(frozen=True)
class Row:
    """What was measured: `line` of the table, and the point (x, gain) of the curve `curve` in the panel `panel`."""

    line: str
    points: tuple[tuple[str, str, float, float], ...]  # (panel, curve, x, direct / other)


FFT_HEAD = tables.head(
    ["size", "channels", "kernel", "direct, ms", "FFT, ms", "direct / FFT", "auto takes", "and loses"], words=3
)


def fft_row(size: tuple[int, ...], channels: int, out_channels: int, groups: int, k: int) -> Row:
    rng = np.random.default_rng(0)
    ndim = len(size)
    x = rng.standard_normal((1, channels, *size), np.float32)
    w = rng.standard_normal((out_channels, channels // groups, *(k,) * ndim), np.float32)
    conv = getattr(fc, f"conv{ndim}d")
    out = conv(x, w, padding="same", groups=groups)

    def call(algorithm: str) -> Callable[[], object]:
        return lambda: conv(x, w, padding="same", groups=groups, algorithm=algorithm, out=out)

    best = best_of({a: call(a) for a in ("direct", "fft")}, SECONDS)
    e = fc.explain(x.shape, w.shape, padding="same", groups=groups)
    loss = best[e.algorithm] / min(best.values()) - 1
    shape, kernel = "x".join(map(str, size)), "x".join([str(k)] * ndim)
    label = f"{channels} -> {out_channels}{' depthwise' if groups > 1 else ''}"
    gain = best["direct"] / best["fft"]
    figures = (f"{1e3 * best['direct']:.3g}", f"{1e3 * best['fft']:.3g}", f"{gain:.2f}")
    loses = f"{100 * loss:.0f} %" if loss > 0.02 else ""
    line = tables.row([shape, label, kernel, *figures, e.algorithm, loses])
    return Row(line, ((f"{ndim}-D", f"{shape}, {label}", k, gain),))


WINOGRAD_HEAD = tables.head(["batch", "size", *(f"{c} channels" for c in CHANNELS)], words=2)


def winograd_row(batch: int, n: int) -> Row:
    rng = np.random.default_rng(0)
    figures, points = [], []
    for channels in CHANNELS:
        x = rng.standard_normal((batch, channels, n, n), np.float32)
        w = rng.standard_normal((channels, channels, 3, 3), np.float32)
        y = np.empty_like(x)

        def forward(algorithm: str, x=x, w=w, y=y) -> Callable[[], object]:
            return lambda: fc.conv2d(x, w, padding=1, algorithm=algorithm, out=y)

        def backward(algorithm: str, x=x, w=w, y=y) -> Callable[[], object]:
            return lambda: fc.conv2d_input_grad(x.shape, w, x, padding=1, algorithm=algorithm, out=y)

        def of_weights(algorithm: str, x=x, w=w, y=y) -> Callable[[], object]:
            return lambda: fc.conv2d_weight_grad(x, w.shape, x, padding=1, algorithm=algorithm, out=w)

        ratios = []
        for name, op, call in (
            ("forward pass", "forward", forward), ("input gradient", "input_grad", backward),
            ("weight gradient", "weight_grad", of_weights),
        ):  # fmt: skip
            best = best_of({a: call(a) for a in ("direct", "winograd")}, SECONDS / 4)
            gain = best["direct"] / best["winograd"]
            taken = fc.explain(x.shape, w.shape, padding=1, op=op).algorithm == "winograd"
            ratios.append(f"**{gain:.2f}**" if taken else f"{gain:.2f}")
            points.append((f"{name}, batch {batch}", f"{n}x{n}", float(channels), gain))
        figures.append(" / ".join(ratios))
    return Row(tables.row([batch, f"{n}x{n}", *figures]), tuple(points))


def picture(algorithm: str, rows: list[Row]) -> Path:
    """Draw how many times as fast as the direct sum `algorithm` is, beside its table; return the file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastconv"  # the same bytes from the same figures
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for panel, curve, x, gain in (point for row in rows for point in row.points):
        panels.setdefault(panel, {}).setdefault(curve, []).append((x, gain))
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(12, 8), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (panel, curves) in zip(axes.flat, panels.items(), strict=False):
        for curve, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=curve)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(
            title=panel, xscale="log", yscale="log", ylabel=f"time of direct / {algorithm}",
            xlabel="taps of the kernel in each dimension" if algorithm == "fft" else "channels in and out",
        )  # fmt: skip
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_xticks([], minor=True)
        low, high = axis.get_ylim()
        gains = [g for g in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= g <= high]
        axis.set_yticks(gains, [f"{g:g}" for g in gains])
        axis.set_yticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path = FIGURES / f"crossover-{algorithm}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def page(algorithm: str) -> Path:
    return FIGURES / f"crossover-{algorithm}.md"


def command(algorithm: str) -> str:
    return f"python -m bench.crossover {algorithm} --write"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("algorithm", choices=["fft", "winograd"])
    parser.add_argument("--write", action="store_true", help="put the table and its picture into docs/figures/")
    options = parser.parse_args()
    if options.algorithm == "fft":
        fc.set_num_threads(1)
        head, cases = FFT_HEAD, [(fft_row, shape) for shape in SHAPES]
    else:
        head, cases = WINOGRAD_HEAD, [(winograd_row, (b, n)) for b in (1, 4) for n in (7, 14, 28, 56)]
    print(*head, sep="\n")
    rows = []
    for measure, case in cases:
        rows.append(measure(*case))
        print(rows[-1].line, flush=True)
    if options.write:
        table = "\n".join([*head, *(row.line for row in rows)])
        tables.write(page(options.algorithm), command(options.algorithm), table)
        picture(options.algorithm, rows)


if __name__ == "__main__":
    main()
