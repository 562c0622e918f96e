"""The command: its options, and the processes that do the jobs."""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import results
from ..peers import Unsupported
from .arrays import DTYPES, library
from .clock import CudaTimer
from .jobs import STEPS, Job, checks, measurements, plan, run
from .peers import version
from .run import BATCH, Bench, DeviceLost, summary

BUDGET = 440.0  # seconds after which nothing more is begun,
LATE = 20.0  # and how much later what was begun must have ended
SHARE_OF_CHECKS = 0.4  # of the budget, at most, for the small shapes: most of it is the compiler's
PATIENCE = 60.0  # seconds of a job, after which it hangs; the longest compile some kernels

ENDED = "ended"  # what a worker says when it has done its jobs, in the place of the number of the one it is at


def supervise(command: Sequence[str], tell: Callable[[str], object] = print) -> int:
    """Do the jobs in a process of `command`; where it dies, go on in another with the job after. Returns its exit code.

    Memory that an error has spoilt, a device that is lost until the process ends, a crash of the driver, a kernel that
    never ends: none of them reaches the next job.
    """
    start, died = 0, False
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "job"
        while True:
            code = subprocess.run([*command, "--worker", str(progress), "--start", str(start)]).returncode
            said = progress.read_text() if progress.exists() else ""
            if said == ENDED:
                return 1 if died else code
            if not said or int(said) < start:
                tell(f"FAILED: the process ended with code {code} before its first job")
                return code or 1
            tell(f"FAILED: the process ended with code {code} in job {said}; going on with the next")
            start, died = int(said) + 1, True


def watched(bench: Bench, progress: Path) -> Callable[[int], None]:
    """Says which job is begun, and ends the process, with a traceback, if that hangs."""

    def begun(number: int) -> None:
        progress.write_text(str(number))
        faulthandler.dump_traceback_later(min(PATIENCE, max(bench.left, 0) + LATE), exit=True)

    return begun


def find_package() -> None:
    """Let `fastconv` find its kernels and benchmarks in a checkout, where they have folders of their own."""
    root = Path(__file__).resolve().parents[2]
    if importlib.util.find_spec("fastconv") is None:
        sys.path.insert(0, str(root))
    import fastconv

    if importlib.util.find_spec("fastconv.cuda_kernels") is None:
        fastconv.__path__.append(str(root))


def name_of_gpu() -> str:
    from fastconv.cuda_kernels._cuda import cuda

    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.cuda", description="Check and time the kernels on a CUDA GPU, unattended."
    )
    made.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                      help="after which nothing more is begun; the rest is named (default: %(default)g)")  # fmt: skip
    made.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "measured", metavar="FOLDER",
                      help="where <gpu>.csv and <gpu>.json are written (default: bench/measured)")  # fmt: skip
    made.add_argument("--dtype", type=_words, default=list(DTYPES), metavar="NAME,...",
                      help=f"of {', '.join(DTYPES)} (default: all)")  # fmt: skip
    made.add_argument("--only", metavar="REGEX", help="the layers of which 'network name' matches")
    made.add_argument("--passes", type=_words, metavar="NAME,...", help="of these passes only")
    made.add_argument("--batch", type=int, default=BATCH, help="of the networks' layers (default: %(default)d)")
    made.add_argument("--check-only", action="store_true", help="check the kernels, time nothing")
    made.add_argument("--no-check", action="store_true", help="leave out the small shapes against the reference")
    for name, kind in (("worker", Path), ("start", int), ("deadline", float)):  # from one process to the next
        made.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure as the options say; 0 if every check passed, 2 if nothing can run here."""
    begin = time.monotonic()  # one clock for all processes
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    unknown = [name for name in options.dtype if name not in DTYPES]
    if unknown:
        parser().error(f"--dtype: {unknown[0]!r} is none of {', '.join(DTYPES)}")
    if options.worker is not None:
        return work(options)
    deadline = begin + options.budget
    return supervise([sys.executable, "-u", "-m", str(__package__), *given, "--deadline", str(deadline)])


def work(options: argparse.Namespace) -> int:
    """The jobs from the one that the options say."""
    begin = time.monotonic()

    def ended(code: int) -> int:
        faulthandler.cancel_dump_traceback_later()
        options.worker.write_text(ENDED)
        return code

    find_package()
    import fastconv as fc
    from fastconv.backends import cuda_status

    usable, reason = cuda_status()
    if not usable:
        print(f"no benchmark: {reason}")
        return ended(2)
    try:
        arrays = library()
    except Unsupported as error:
        print(f"no benchmark: {error}")
        return ended(2)
    gpu = name_of_gpu()
    machine = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output / f"{machine}.csv"
    bench = Bench(arrays, CudaTimer(), machine, output, options.deadline, options.batch)
    print(f"{gpu}; fastconv {fc.__version__}, {version('torch')}, {version('cupy')}; arrays of {arrays.name}")

    steps = [step for step in STEPS if step[3] in options.dtype]
    if options.passes:
        steps = [(names, narrow, tuple(w for w in passes if w in options.passes), dtype)
                 for names, narrow, passes, dtype in steps]  # fmt: skip
    jobs: list[Job] = []
    if not options.no_check:
        jobs += checks(bench, options.dtype)
        bench.checks_until = begin + (1.0 if options.check_only else SHARE_OF_CHECKS) * bench.left
    if not options.check_only:
        jobs += measurements(bench, options.dtype, plan(steps, options.only))
    if options.start == 0:
        results.write_machine(output.with_suffix(".json"), results.machine() | {"gpu": gpu})
    else:
        bench.peaks = json.loads(output.with_suffix(".json").read_text()).get("peaks", {})
    try:
        run(bench, jobs, options.start, watched(bench, options.worker))
    except DeviceLost:
        return 1
    if output.exists():
        for text in summary(results.read(output)):
            print(text)
    print(f"{bench.done} measurements in {time.monotonic() - begin:.0f} s, "
          f"{len(bench.failures)} failures, written to {output}")  # fmt: skip
    return ended(1 if bench.failures else 0)
