"""The `fastconv` command: ``fastconv info``, ``fastconv demo`` and ``fastconv bench``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import __version__
from .backends import BackendUnavailableError, backends, cuda_status, get_num_threads

# What the demo imports beyond fastconv's own dependencies, by module; pip knows them by other names.
DEMO_MODULES = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}

# CPU features that decide how fast the kernels can be, by the start of LLVM's names for them.
SIMD = ("amx", "avx", "bf16", "dotprod", "f16c", "fma", "fp-armv8", "fullfp16", "neon", "sse4", "sve")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (by default the process's arguments) and return its exit status."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (BackendUnavailableError, CommandError, OSError) as error:
        print(f"fastconv {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastconv {options.command}: interrupted", file=sys.stderr)
        return 130


class CommandError(Exception):
    """The command cannot run as asked. The message says why and what to do; the user sees no traceback."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastconv", description="Convolution with gradients and softmax cross-entropy for NumPy and CUDA arrays."
    )
    parser.add_argument("--version", action="version", version=f"fastconv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser(
        "info",
        help="show versions, backends, CPU features, threads and cache",
        description="Show what fastconv runs on here: versions, backends, CPU features, threads and cache.",
    )
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="train a small network on real images",
        description="Train a small convolutional network on real images with fastconv and NumPy alone, check its "
        "gradients against finite differences, and draw what it learned.",
    )
    demo.add_argument(
        "--images", choices=("digits", "photos"), default="digits",
        help="scikit-learn's handwritten digits (the default), or 3 x 224 x 224 crops of its two photographs",
    )  # fmt: skip
    demo.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="where the kernels run (default: cpu)")
    demo.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N",
        help="of the split, the weights and the batches (default: 0)",
    )  # fmt: skip
    demo.add_argument(
        "--epochs", type=_at_least(1), metavar="N",
        help="passes over the training images (default: what trains the chosen images well)",
    )  # fmt: skip
    demo.add_argument(
        "--output", type=Path, metavar="FILE",
        help="the picture to write (default: fastconv-demo-IMAGES.png)",
    )  # fmt: skip
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench",
        help="measure fastconv beside its peers",
        description="Measure fastconv beside its peers (torch, onnxruntime, OpenVINO, JAX, SciPy, NumPy: those that "
        "are installed) on the layers of published networks or on your own.",
    )
    importlib.import_module("fastconv.bench.command").add_options(bench)
    bench.set_defaults(run=_bench)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


# ---------------------------------------------------------------------------------------------------------------------
# fastconv demo
# ---------------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    missing = [name for module, name in DEMO_MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(
            f'the demo also needs {" and ".join(missing)}. Install what it needs with `pip install "fastconv[demo]"`.'
        )
    from . import demo

    picture = options.output or Path(f"fastconv-demo-{options.images}.png")
    try:
        demo.check_picture_file(picture)
    except ValueError as error:
        raise CommandError(f"--output: {error}") from None
    result = demo.run(
        options.images, picture, backend=options.backend, seed=options.seed, epochs=options.epochs
    )  # fmt: skip
    return 0 if result.gradients_agree else 1


# ---------------------------------------------------------------------------------------------------------------------
# fastconv bench
# ---------------------------------------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("rich") is None:
        raise CommandError(
            'the benchmarks also need rich. Install what they need with `pip install "fastconv[bench]"`.'
        )
    command = importlib.import_module("fastconv.bench.command")
    try:
        return command.main(options)
    except command.UsageError as error:
        raise CommandError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# fastconv info
# ---------------------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    for title, value in _facts():
        print(textwrap.fill(value, 100, initial_indent=f"{title:<18}", subsequent_indent=" " * 18,
                            break_long_words=False, break_on_hyphens=False))  # fmt: skip
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    import llvmlite.binding as llvm

    from .cpu import threads

    yield "fastconv", f"{__version__}, in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    for package in ("numpy", "numba", "llvmlite", "tbb", "numba-cuda"):
        yield package, _version(package)

    yield "backends", ", ".join(backends())
    usable, reason = cuda_status()
    if not usable:
        yield "no cuda backend", reason

    features = sorted(name for name, on in llvm.get_host_cpu_features().items() if on and name.startswith(SIMD))
    yield "cpu", llvm.get_host_cpu_name()
    yield "cpu features", " ".join(features) or "none known"
    yield "threading layer", threads.load_layer()
    yield "threads", str(get_num_threads())
    yield "cache", _cache_folder()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cache_folder() -> str:
    """Where Numba keeps the compiled CPU kernels: beside the source, or in the user's cache folder."""
    from numba.core.caching import FunctionCache

    from .cpu import threads

    try:
        return FunctionCache(threads.set_num_threads).cache_path
    except RuntimeError as error:
        return f"none, kernels are compiled anew in every process ({error})"
