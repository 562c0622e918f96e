"""The error of each algorithm against float64, over the layers of shapes/, as the table of docs/figures/accuracy.md.

    python -m bench.accuracy              # prints the table
    python -m bench.accuracy --write      # and puts it into docs/figures/accuracy.md

A layer runs with a batch of one, in float32, by every algorithm that applies to it; the same numbers in float64 by the
direct sum are the truth (which the tests compare with plain loops). Errors are relative to the root mean square of the
result. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fastconv as fc
from fastconv import algorithms, arguments
from fastconv.cpu import methods

from . import cases, tables

DOCUMENT = Path(__file__).parents[1] / "docs" / "figures" / "accuracy.md"
COMMAND = "python -m bench.accuracy --write"
MOST_FLOPS = 2e9  # larger layers take minutes, and have neighbours whose sums are as long
OFFSET = 3.0  # added to inputs and output gradients of unit variance
ALGORITHMS = ("direct", "winograd", "fft")
NETWORKS = ("resnet50", "vgg16", "mobilenet_v2", "convnext_tiny", "audio", "medical", "planes")


@dataclasses.dataclass
class Errors:
    """Of the layers of one row of the table, relative to the rms result."""

    rms: list[float] = dataclasses.field(default_factory=list)
    largest: list[float] = dataclasses.field(default_factory=list)
    rms_ratio: list[float] = dataclasses.field(default_factory=list)  # to those of the direct sum
    largest_ratio: list[float] = dataclasses.field(default_factory=list)
    promised: list[float] = dataclasses.field(default_factory=list)


def geometry_of(case: cases.ConvolutionCase):
    layout = arguments.LAYOUTS[case.ndim][0]
    return arguments.convolution_plan(
        "accuracy", case.ndim, case.input_shape, case.weight_shape, case.stride, case.padding, case.dilation,
        case.groups, "zeros", layout,
    ).geometry  # fmt: skip


def pass_of(case: cases.ConvolutionCase, operation: str) -> Callable[..., np.ndarray]:
    """The pass as a function of the operands and keywords."""
    tail = (case.stride, case.padding, case.dilation, case.groups)
    if operation == "forward":
        return lambda x, w, dy, **kw: getattr(fc, case.op)(x, w, None, *tail, **kw)
    if operation == "input_grad":
        return lambda x, w, dy, **kw: getattr(fc, f"{case.op}_input_grad")(x.shape, w, dy, *tail, **kw)
    return lambda x, w, dy, **kw: getattr(fc, f"{case.op}_weight_grad")(x, w.shape, dy, *tail, **kw)


def relative_errors(run: Callable[..., np.ndarray], operands: list[np.ndarray], names: list[str]) -> dict:
    """{algorithm: (rms error, largest error)}, relative to the rms result."""
    exact = run(*(a.astype(np.float64) for a in operands), algorithm="direct")
    unit = np.sqrt(np.mean(exact**2))
    found = {}
    for name in names:
        error = run(*operands, algorithm=name) - exact
        found[name] = float(np.sqrt(np.mean(error**2)) / unit), float(np.abs(error).max() / unit)
    return found


def measure(networks: tuple[str, ...], offset: float, progress: Callable[[str], None]) -> Iterator[tuple]:
    """(network, operation, algorithm, Errors) of every row of the table."""
    for network in networks:
        for operation in methods.OPERATIONS:
            rows: dict[str, Errors] = {}
            for case in cases.network(network):
                case = dataclasses.replace(case, batch=1)
                geometry = geometry_of(case)
                if geometry.flops > MOST_FLOPS:
                    continue
                single = np.dtype(np.float32)
                names = [a for a in ALGORITHMS if algorithms.why_not(a, operation, geometry, single, "cpu") is None]
                operands = case.operands(single)
                values = [operands["input"] + np.float32(offset), operands["weight"],
                          operands["grad_output"] + np.float32(offset)]  # fmt: skip
                found = relative_errors(pass_of(case, operation), values, names)
                for name, (rms, largest) in found.items():
                    row = rows.setdefault(name, Errors())
                    row.rms.append(rms)
                    row.largest.append(largest)
                    row.rms_ratio.append(rms / max(found["direct"][0], 1e-30))
                    row.largest_ratio.append(largest / max(found["direct"][1], 1e-30))
                    problem = methods.problem_of(operation, geometry, single, name)
                    row.promised.append(methods.choose(problem).error(problem))
                progress(f"{network} {operation} {case.name} {found}")
            for name in ALGORITHMS:
                if name in rows:
                    yield network, operation, name, rows[name]


def table(networks: tuple[str, ...], progress: Callable[[str], None]) -> str:
    titles = (
        "data", "network", "pass", "algorithm", "layers", "rms error, median", "worst", "largest error, worst",
        "rms, by that of the direct sum, worst", "largest, by that of the direct sum, worst",
    )  # fmt: skip
    rows = []
    for what, offset in (("unit variance", 0.0), (f"offset by {OFFSET:g}", OFFSET)):
        for network, operation, name, e in measure(networks, offset, progress):
            ratios = ("", "") if name == "direct" else (f"{max(e.rms_ratio):.2f}", f"{max(e.largest_ratio):.2f}")
            errors = (np.median(e.rms), max(e.rms), max(e.largest))
            rows.append([what, network, operation, name, len(e.rms), *(f"{x:.1e}" for x in errors), *ratios])
    return tables.table(titles, rows, words=4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--verbose", action="store_true", help="print every layer")
    options = parser.parse_args()
    text = table(tuple(options.networks), print if options.verbose else lambda line: None)
    print(text)
    if options.write:
        tables.write(DOCUMENT, COMMAND, text)


if __name__ == "__main__":
    main()
