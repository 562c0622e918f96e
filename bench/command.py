"""`fastconv bench`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import cases, peers, results, run
from .cases import Case

if TYPE_CHECKING:  # rich is of the bench extra; the options are wanted without it, for --help
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

PASSES = ("forward", "weight_grad", "input_grad", "with_grad")
OPS = ("conv1d", "conv2d", "conv3d", "softmax_cross_entropy")
DTYPES = ("float32", "float64", "float16", "bfloat16")

# BENCH=quick: the rows of cases.QUICK, the strongest peers, and short samples.
QUICK_PEERS = ("fastconv", "torch", "torch channels-last", "onnxruntime")
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.1

# BENCH=readme: what the README's tables and plots show, as options, in parts that can be measured one by one.
README: dict[str, tuple[str, ...]] = {
    "networks": (
        "--layers resnet50,vgg16,mobilenet_v2 --peer 'torch,onnxruntime,fastconv prepared' "
        "--protocol alone,interleaved --seconds 0.1",
    ),
    "more": (
        "--layers efficientnet_b0,convnext_tiny,audio,planes,cliffs,cross_entropy,small,small_cross_entropy "
        "--peer torch,onnxruntime,scipy --seconds 0.1",
        "--layers medical --only 'enc[4-6]|depthwise' --peer torch,onnxruntime --seconds 0.1",
    ),
    "float64": ("--layers cliffs --peer torch --dtype float64 --seconds 0.1",),
    "growth": ("--growth all --peer torch",),
    "memory": (
        r"--layers resnet50 --only '^conv1$|layer.\.0\.conv[23]' --peer torch "
        "--protocol memory --dtype float32,float64",
    ),
}


class UsageError(Exception):
    """The command cannot do what it was asked for; the message says why."""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _one_of(choices: Sequence[str]):
    def words(text: str) -> list[str]:
        chosen = _words(text)
        for word in chosen:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(choices)}")
        return chosen

    return words


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 3600")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fastconv bench`. Several values are given with commas between them."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("--quick", action="store_true", help="a selection of layers and peers, in under 5 minutes")
    what.add_argument("--readme", type=_one_of([*README, "all"]), metavar="PART,...",
                      help=f"what the README shows, whatever else is said here: {', '.join(README)}, all")  # fmt: skip
    what.add_argument("--layers", type=_one_of(cases.NETWORKS), metavar="NAME,...",
                      help=f"built-in tables of layers: {', '.join(cases.NETWORKS)} (default: all)")  # fmt: skip
    what.add_argument("--shapes", type=Path, action="append", metavar="FILE",
                      help="a table of your own instead; bench/README.md describes its columns")  # fmt: skip
    what.add_argument("--growth", type=_one_of([*cases.GROWTH, "all"]), metavar="QUESTION,...",
                      help=f"one layer of which one size grows instead: {', '.join(cases.GROWTH)}, all")  # fmt: skip
    what.add_argument("--only", metavar="REGEX", help="of these, the layers whose name matches")
    what.add_argument("--op", type=_one_of(OPS), metavar="OP,...", help=f"of these, the operations: {', '.join(OPS)}")
    what.add_argument("--passes", type=_one_of(PASSES), metavar="PASS,...",
                      help="forward, weight_grad, input_grad; for cross-entropy forward, with_grad")  # fmt: skip
    what.add_argument("--batch", type=_positive, metavar="N", help="instead of the batch in the table")
    what.add_argument("--dtype", type=_one_of(DTYPES), default=["float32"], metavar="DTYPE,...",
                      help=f"{', '.join(DTYPES)} (default: float32)")  # fmt: skip
    what.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    what.add_argument("--peer", type=_words, metavar="NAME,...",
                      help="whom to measure beside fastconv (default: all that are installed); "
                      f"on the CPU {', '.join(peers.names('cpu'))}; a library stands for all its forms")  # fmt: skip

    how = parser.add_argument_group("how it is measured")
    how.add_argument("--protocol", type=_one_of(results.PROTOCOLS), default=["alone"], metavar="NAME,...",
                     help="alone: the time of each side alone in its process (the default); interleaved: of all in one "
                     "process; memory: the peak memory of a call, each in a new process")  # fmt: skip
    how.add_argument("--threads", type=_positive, metavar="N", help="default: one for each CPU")
    how.add_argument("--rounds", type=_positive, metavar="N", help="how often the sides take turns (default: 3)")
    how.add_argument("--seconds", type=_seconds, metavar="S",
                     help="of sampling for each peer, pass and round (default: 0.2)")  # fmt: skip
    how.add_argument("--timeout", type=_seconds, default=600.0, metavar="S",
                     help="after which a peer that does not answer is given up (default: 600)")  # fmt: skip

    to = parser.add_argument_group("where it goes")
    to.add_argument("--output", type=Path, default=Path("fastconv-bench.csv"), metavar="FILE",
                    help="the CSV file to update, or a folder, in which it is named for the machine "
                    "(default: fastconv-bench.csv)")  # fmt: skip
    to.add_argument("--compare", type=Path, metavar="OLD.csv",
                    help="fail if a ratio to a peer is more than 10%% below that of an earlier file")  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Measure as the options say; return the exit status. Raises UsageError, and OSError."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=400)  # a file or a log has room for every column
    try:
        old = results.read(options.compare) if options.compare else None
        runs = list(_runs(options))
        plan = [(case, settings, passes, _peers(one)) for one in runs for case, settings, passes in _plan(one)]
        facts = results.machine()
        path = options.output
        if path.suffix != ".csv":
            path = path / f"{results.machine_name(facts)}.csv"
        elif not path.parent.is_dir():
            raise UsageError(f"--output: the folder {path.parent} does not exist")
        kept = results.read(path) if path.exists() else []
    except (cases.ShapesError, results.ResultsError) as error:
        raise UsageError(str(error)) from None
    wanted = list(dict.fromkeys(name for *_, names in plan for name in names))
    available, skipped = run.available(wanted, options.backend)
    for name, reason in skipped.items():
        console.print(f"without {name}: {reason}")
    if not plan:
        raise UsageError("nothing to measure: no layer and pass is left by --only, --op and --passes")
    if options.backend == "cuda" and facts["gpu"] is None:
        raise UsageError("--backend cuda: nvidia-smi finds no GPU here, and times of a simulator say nothing")
    _warn_if_busy(console)

    begin = time.perf_counter()
    new: list[results.Row] = []
    with _progress(console) as progress:
        bar = progress.add_task("", total=len(plan))
        for settings, steps in _by_settings(plan):
            with run.Session(settings) as session:
                for case, passes, names in steps:
                    some = [name for name in names if name in available]
                    rows = session.measure(case, passes, some, lambda text: progress.update(bar, description=text))
                    new += rows
                    results.write(path, results.merge(kept, new))
                    for row in rows:
                        if row.note:
                            console.print(f"[yellow]{row.network} {row.case} {row.which}, {row.peer}:[/] {row.note}")
                    progress.advance(bar)
    results.write_machine(path.with_suffix(".json"), facts)
    for table in tables(new):
        console.print(table)
    console.print(f"{len(new)} rows in {time.perf_counter() - begin:.0f} s, written to {path}")
    if old is not None:
        worse = results.regressions(old, new)
        console.print(
            f"{results.compared(old, new)} ratios compared with {options.compare}, {len(worse)} fell by more than 10%"
        )
        for text in worse:
            console.print(f"[red]{text}[/]")
        return 1 if worse else 0
    return 0


def _runs(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options themselves, or those of the parts of the README."""
    if not options.readme:
        yield options
        return
    parser = argparse.ArgumentParser()
    add_options(parser)
    for part in README if "all" in options.readme else options.readme:
        for text in README[part]:
            one = parser.parse_args(shlex.split(text))
            one.threads, one.timeout, one.backend = options.threads, options.timeout, options.backend
            yield one


def _plan(options: argparse.Namespace) -> Iterator[tuple[Case, run.Settings, list[str]]]:
    """What to measure, in order: the case, how, and its passes."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.threads is not None and options.threads > available:
        raise UsageError(f"--threads {options.threads}: this process may use {available} CPUs")
    common = run.Settings(
        backend=options.backend,
        threads=options.threads or available,
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else run.Settings.rounds),
        seconds=options.seconds or (QUICK_SECONDS if options.quick else run.Settings.seconds),
        timeout=options.timeout,
    )  # fmt: skip
    for protocol in options.protocol:
        for dtype in options.dtype:
            settings = dataclasses.replace(common, protocol=protocol, dtype=dtype)
            yield from _layers(options, settings)
            yield from _growth(options, settings, available)


def _layers(options: argparse.Namespace, settings: run.Settings) -> Iterator[tuple[Case, run.Settings, list[str]]]:
    for case in _cases(options):
        if options.only and not re.search(options.only, case.name):
            continue
        if options.op and case.op not in options.op:
            continue
        if options.batch:
            case = dataclasses.replace(case, batch=options.batch)
        passes = [which for which in case.passes if not options.passes or which in options.passes]
        if passes:
            yield case, settings, passes


def _growth(
    options: argparse.Namespace, settings: run.Settings, available: int
) -> Iterator[tuple[Case, run.Settings, list[str]]]:
    questions = list(cases.GROWTH) if options.growth and "all" in options.growth else options.growth or []
    for question in questions:
        for case in cases.growth(question):
            this = settings
            if question == "memory":
                this = dataclasses.replace(settings, protocol="memory")
            if question == "threads":
                threads = int(case.name.partition("=")[2])
                if threads > available:
                    continue
                this = dataclasses.replace(settings, threads=threads)
            passes = [which for which in options.passes or ["forward"] if which in case.passes]
            if passes:
                yield case, this, passes


def _cases(options: argparse.Namespace) -> Iterable[Case]:
    try:
        if options.shapes:
            return [case for path in options.shapes for case in cases.read(path)]
        if options.layers:
            return [case for name in options.layers for case in cases.network(name)]
        if options.growth:
            return []
        return cases.quick() if options.quick else [case for name in cases.NETWORKS for case in cases.network(name)]
    except UnicodeDecodeError as error:
        raise UsageError(f"--shapes: not a text file ({error})") from None


def _by_settings(
    plan: Sequence[tuple[Case, run.Settings, list[str], list[str]]],
) -> Iterator[tuple[run.Settings, list[tuple[Case, list[str], list[str]]]]]:
    """The steps of equal settings together, in the order in which the settings first appear."""
    steps: dict[run.Settings, list[tuple[Case, list[str], list[str]]]] = {}
    for case, settings, passes, names in plan:
        steps.setdefault(settings, []).append((case, passes, names))
    yield from steps.items()


def _peers(options: argparse.Namespace) -> list[str]:
    """The peers to measure, plain fastconv always among them: it is what the ratios refer to."""
    known = peers.names(options.backend)
    if options.peer is None:
        return [name for name in known if not options.quick or name in QUICK_PEERS]
    chosen = ["fastconv"]
    for word in options.peer:
        family = [name for name in peers.FAMILIES.get(word, (word,)) if name in known]
        if not family:
            raise UsageError(f"--peer: {word!r} is none of {', '.join(known)} (backend {options.backend})")
        chosen += [name for name in family if name not in chosen]
    return chosen


def _warn_if_busy(console: Console) -> None:
    """A second program on the same CPUs makes every figure worthless; say so."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        console.print(f"[yellow]the load of this machine was {os.getloadavg()[0]:.1f} in the last minute: "
                      "times mean something only when nothing else runs[/]")  # fmt: skip


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"), console=console,
        transient=True, disable=not sys.stderr.isatty() and not console.is_terminal,
    )  # fmt: skip


def tables(rows: Sequence[results.Row]) -> Iterator[Table]:
    """A table for each network: a line for each pass of a layer, a column for each peer."""
    from rich.table import Table

    groups: dict[tuple[str, ...], list[results.Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.dtype, row.backend, row.protocol), []).append(row)
    for (network, dtype, backend, protocol), group in groups.items():
        names = list(dict.fromkeys(row.peer for row in group))
        unit = "MB" if protocol == "memory" else next((row.unit for row in group if row.unit), "")
        meaning = "how many times as much it needs" if protocol == "memory" else "how many times as fast fastconv is"
        table = Table(title=f"{network}, {dtype}, {backend}, {protocol}: {unit} (in brackets: {meaning})")
        for column in ("layer", "pass", "batch", "threads"):
            table.add_column(column, no_wrap=True)
        table.add_column("peak", justify="right")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for pair in dict.fromkeys(row.pair for row in group):
            here = {row.peer: row for row in group if row.pair == pair}
            one = next(iter(here.values()))
            peak = {"GFLOP/s": one.peak_gflops, "GB/s": one.copy_gbs}.get(unit)
            table.add_row(
                one.case, one.which, str(one.batch), str(one.threads), f"{peak:.0f}" if peak else "",
                *(_cell(here.get(name)) for name in names),
            )  # fmt: skip
        yield table


def _cell(row: results.Row | None) -> str:
    if row is None:
        return ""
    if row.note:
        return "[red]failed[/]"
    value = row.memory_mb if row.protocol == "memory" else row.rate
    if value is None:
        return ""
    if row.peer == "fastconv" or row.ratio is None:
        return f"{value:.1f}" + ("" if row.percent_of_peak is None else f" {row.percent_of_peak:.0f}%")
    colour = "green" if row.ratio >= 1 else "red"
    return f"{value:.1f} [{colour}]({row.ratio:.2f}x)[/]"
