"""Where the FFT and Winograd overtake the direct sum, over kernel, size and channels; docs/algorithms.md.

    python -m bench.crossover fft                 # prints the table
    python -m bench.crossover winograd --write    # and puts it into docs/algorithms.md

Each figure is the best of many calls, the two algorithms taking turns, so that what else runs on the machine disturbs
both alike. float32, stride 1, "same" padding. The FFT: forward pass, a batch of one, one thread. Winograd: forward pass
and input gradient, batches of one and four, all threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fastconv as fc

DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithms.md"
BEGIN, END = "<!-- table: python -m bench.crossover {} --write -->", "<!-- end of table -->"
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
    """Seconds of the best call of each, taking turns for `seconds`, at least three times."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
        turns += 1
    return best


CHANNELS = (16, 32, 48, 64, 128, 256)  # of Winograd, for each batch and size


def fft_rows() -> Iterator[str]:
    yield "| size | channels | kernel | direct, ms | FFT, ms | direct / FFT | auto takes | and loses |"
    yield "| --- | --- | --- | --: | --: | --: | --- | --: |"
    rng = np.random.default_rng(0)
    for size, channels, out_channels, groups, k in SHAPES:
        ndim = len(size)
        x = rng.standard_normal((1, channels, *size), np.float32)
        w = rng.standard_normal((out_channels, channels // groups, *(k,) * ndim), np.float32)
        conv = getattr(fc, f"conv{ndim}d")
        out = conv(x, w, padding="same", groups=groups)

        def call(algorithm: str, x=x, w=w, groups=groups, conv=conv, out=out) -> Callable[[], object]:
            return lambda: conv(x, w, padding="same", groups=groups, algorithm=algorithm, out=out)

        best = best_of({a: call(a) for a in ("direct", "fft")}, SECONDS)
        e = fc.explain(x.shape, w.shape, padding="same", groups=groups)
        faster = min(best, key=best.__getitem__)
        loss = max(0.0, best[e.algorithm] / best[faster] - 1)
        yield (
            f"| {'x'.join(map(str, size))} | {channels} -> {out_channels}{' depthwise' if groups > 1 else ''} | "
            f"{'x'.join([str(k)] * ndim)} | {1e3 * best['direct']:.3g} | {1e3 * best['fft']:.3g} | "
            f"{best['direct'] / best['fft']:.2f} | {e.algorithm} | {f'{100 * loss:.0f} %' if loss else ''} |"
        )


def winograd_rows() -> Iterator[str]:
    yield f"| batch | size | {' | '.join(f'{c} channels' for c in CHANNELS)} |"
    yield f"| --: | --- |{' --: |' * len(CHANNELS)}"
    rng = np.random.default_rng(0)
    for batch, n in ((b, n) for b in (1, 4) for n in (7, 14, 28, 56)):
        figures = []
        for channels in CHANNELS:
            x = rng.standard_normal((batch, channels, n, n), np.float32)
            w = rng.standard_normal((channels, channels, 3, 3), np.float32)
            y = np.empty_like(x)

            def forward(algorithm: str, x=x, w=w, y=y) -> Callable[[], object]:
                return lambda: fc.conv2d(x, w, padding=1, algorithm=algorithm, out=y)

            def backward(algorithm: str, x=x, w=w, y=y) -> Callable[[], object]:
                return lambda: fc.conv2d_input_grad(x.shape, w, x, padding=1, algorithm=algorithm, out=y)

            ratios = []
            for call in (forward, backward):
                best = best_of({a: call(a) for a in ("direct", "winograd")}, SECONDS / 4)
                ratios.append(f"{best['direct'] / best['winograd']:.2f}")
            auto = fc.explain(x.shape, w.shape, padding=1).algorithm
            figures.append(" / ".join(ratios) + (" (taken)" if auto == "winograd" else ""))
        yield f"| {batch} | {n}x{n} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("algorithm", choices=["fft", "winograd"])
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    options = parser.parse_args()
    if options.algorithm == "fft":
        fc.set_num_threads(1)
    lines = []
    for line in fft_rows() if options.algorithm == "fft" else winograd_rows():
        lines.append(line)
        print(line, flush=True)
    if options.write:
        begin = BEGIN.format(options.algorithm)
        before, rest = DOCUMENT.read_text().split(begin)
        DOCUMENT.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
