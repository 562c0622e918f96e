"""What softmax cross-entropy does and how fast, as the tables of docs/cross-entropy.md.

    python -m bench.cross_entropy                         # prints every table
    python -m bench.cross_entropy truth --write           # makes one, and puts it into its page of docs/

The tables: `speed` (fastconv, PyTorch and a copy of the array by turns in one process), `options` (the time of each
option by that of none), `memory`, `truth` (every combination of options against PyTorch in float64) and `functions`
(exp, log and tanh over every float32: some minutes).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np

import fastconv as fc
from fastconv.cpu import elementary

from . import results, tables, timing

DOCS = Path(__file__).parents[1] / "docs"
THREADS = 2
SHAPES = ((4096, 10), (1024, 1000), (256, 32000), (64, 128256), (4, 21, 256, 256), (8, 1000, 7, 7))
LINEAR = (2048, 1024, 32000)  # rows, features, classes
IN_A_ROUND_FOR = 2e6  # elements; of smaller arrays there are more rounds


def where() -> str:
    facts = results.machine()
    import torch

    return (
        f"{facts['cpu']} ({facts['llvm_cpu']}, {facts['simd']}), {THREADS} threads; NumPy {np.__version__}, "
        f"Numba {numba.__version__}, torch {torch.__version__}; {results.today()}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@numba.njit(parallel=True)
def _copy(source, target):
    for i in numba.prange(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


def by_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each call, in a new random order for each round: what precedes a call leaves other arrays in the
    caches, and each is measured as in a training step."""
    return timing.single_calls(calls, least=rounds, order=timing.drawn())


def data(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, dtype=np.float32), rng.integers(0, shape[1], (shape[0], *shape[2:]))


def speed() -> str:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(THREADS)
    fc.set_num_threads(THREADS)
    rows = []
    for shape in SHAPES:
        logits, target = data(shape)
        grad = np.empty_like(logits)
        leaf, labels = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(target)

        def torch_step(leaf=leaf, labels=labels):
            leaf.grad = None
            F.cross_entropy(leaf, labels).backward()

        flat = [a.reshape(shape[0], -1) for a in (logits, grad)]
        calls = {
            "given": lambda z=logits, t=target, g=grad: fc.softmax_cross_entropy_with_grad(z, t, grad_out=g),
            "fresh": lambda z=logits, t=target: fc.softmax_cross_entropy_with_grad(z, t),
            "torch": torch_step,
            "copy": lambda flat=flat: _copy(*flat),
        }
        times = by_turns(calls, 15 if logits.size > IN_A_ROUND_FOR else 100)
        best = {name: min(t) for name, t in times.items()}
        middle = {name: statistics.median(t) for name, t in times.items()}
        rows.append(
            [
                str(shape),
                *(f"{1e3 * best[name]:.3f}" for name in calls),
                *(f"{b['torch'] / b[name]:.1f}" for name in ("given", "fresh") for b in (best, middle)),
                f"{best['given'] / best['copy']:.2f}",
            ]
        )
    head = [
        "logits, float32", "into `grad_out`, ms", "fresh gradient, ms", "torch, ms", "copy, ms",
        "torch / `grad_out`, best", "median", "torch / fresh, best", "median", "`grad_out` / copy",
    ]  # fmt: skip
    logits, target = data((32, 10))
    small = by_turns({"small": lambda: fc.softmax_cross_entropy_with_grad(logits, target)}, 5000)["small"]
    rows_linear = linear_speed(torch, F)
    note = f"(32, 10): {1e6 * min(small):.1f} us a call at best, {1e6 * statistics.median(small):.1f} us in the median."
    return f"{where()}\n\n{tables.table(head, rows)}\n\n{note}\n\n{rows_linear}"


def linear_speed(torch: Any, F: Any) -> str:
    n, features, classes = LINEAR
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, features), dtype=np.float32)
    w = rng.standard_normal((classes, features), dtype=np.float32) / np.float32(np.sqrt(features))
    target = rng.integers(0, classes, n)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (x, w)]
    labels = torch.from_numpy(target)

    def torch_step(loss_of: Callable[..., Any]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss_of(*leaves, labels).backward()

    calls = {
        "fastconv.linear_cross_entropy_with_grad": lambda: fc.linear_cross_entropy_with_grad(x, w, target),
        "torch: cross_entropy(linear)": lambda: torch_step(lambda x, w, t: F.cross_entropy(F.linear(x, w), t)),
    }
    if hasattr(F, "linear_cross_entropy"):
        calls["torch: linear_cross_entropy"] = lambda: torch_step(F.linear_cross_entropy)
    flops = 3 * 2 * n * features * classes
    head = [f"hidden ({n}, {features}), weight ({classes}, {features})", "best, s", "median, s", "GFLOP/s"]
    rows = [
        [name, f"{min(t):.2f}", f"{statistics.median(t):.2f}", f"{flops / min(t) / 1e9:.0f}"]
        for name, t in by_turns(calls, 4).items()
    ]
    return tables.table(head, rows)


def options() -> str:
    fc.set_num_threads(THREADS)
    function = fc.softmax_cross_entropy_with_grad
    rows, names = [], []
    for shape in SHAPES:
        logits, target = data(shape)
        rng = np.random.default_rng(1)
        soft = rng.random(shape, dtype=np.float32)
        weight = rng.random(shape[1], dtype=np.float32)
        grad = np.empty_like(logits)
        half = logits.astype(np.float16)
        half_grad = np.empty_like(half)

        def by_hand(half=half, target=target, half_grad=half_grad):
            half_grad[...] = function(half.astype(np.float32), target)[1]

        kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
            "none": (target, {}),
            "weight": (target, {"weight": weight}),
            "z_loss": (target, {"z_loss": 1e-4}),
            "label_smoothing": (target, {"label_smoothing": 0.1}),
            "probabilities": (soft, {}),
            "logit_softcap": (target, {"logit_softcap": 30.0}),
        }
        calls: dict[str, Callable[[], Any]] = {
            name: lambda t=t, kw=kw, z=logits, g=grad: function(z, t, grad_out=g, **kw)
            for name, (t, kw) in kinds.items()
        }
        calls["float16"] = lambda z=half, t=target, g=half_grad: function(z, t, grad_out=g)
        calls["float16 by hand"] = by_hand
        times = by_turns(calls, 10 if logits.size > IN_A_ROUND_FOR else 50)
        names = list(calls)
        base = min(times["none"])
        rows.append([str(shape), f"{1e3 * base:.3f}", *(f"{min(times[name]) / base:.2f}" for name in names[1:])])
    return f"{where()}\n\n{tables.table(['logits', 'no option, ms', *names[1:]], rows)}"


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

_PEAK = """
import numpy as np, fastconv as fc

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

rng = np.random.default_rng(0)
fc.set_num_threads({threads})
{prepare}
{warm}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = status("VmRSS")
result = {call}
print(status("VmHWM") - before - sum(a.nbytes for a in {fresh}))
"""


def peak(prepare: str, warm: str, call: str, fresh: str) -> int:
    """Bytes above the inputs and results, in a new process on Linux."""
    code = _PEAK.format(threads=THREADS, prepare=prepare, warm=warm, call=call, fresh=fresh)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def memory() -> str:
    n, features, classes = LINEAR
    linear = (
        f"x = rng.standard_normal(({n}, {features}), dtype=np.float32)\n"
        f"w = rng.standard_normal(({classes}, {features}), dtype=np.float32)\nt = rng.integers(0, {classes}, {n})"
    )
    plain = (
        "z = rng.standard_normal((256, 32000), dtype=np.float32)\nt = rng.integers(0, 32000, 256)\n"
        "g = np.ones_like(z)\nfew = g[:16]"
    )
    cases = [
        (
            "softmax_cross_entropy_with_grad(z, t, grad_out=g)", 256 * 32000 * 4, plain,
            "fc.softmax_cross_entropy_with_grad(z[:16], t[:16], grad_out=g[:16])",
            "fc.softmax_cross_entropy_with_grad(z, t, grad_out=g)", "()",
        ),
        (
            "softmax_cross_entropy_with_grad(z, t, grad_out=z)", 256 * 32000 * 4, plain,
            "fc.softmax_cross_entropy_with_grad(few, t[:16], grad_out=few)",
            "fc.softmax_cross_entropy_with_grad(z, t, grad_out=z)", "()",
        ),
        (
            "linear_cross_entropy(x, w, t)", n * classes * 4, linear,
            "fc.linear_cross_entropy(x[:64], w[:64], t[:64] % 64)", "fc.linear_cross_entropy(x, w, t)", "()",
        ),
        (
            "linear_cross_entropy_with_grad(x, w, t)", n * classes * 4, linear,
            "fc.linear_cross_entropy_with_grad(x[:64], w[:64], t[:64] % 64)",
            "fc.linear_cross_entropy_with_grad(x, w, t)", "[a for a in result if a is not None]",
        ),
    ]  # fmt: skip
    rows = []
    for name, size, *code in cases:
        extra = min(peak(*code) for _ in range(2))  # the first run may compile
        rows.append([f"`{name}`", f"{size / 2**20:.1f}", f"{extra / 2**20:.1f}"])
    return tables.table(["call", "logits, MiB", "above inputs and results, MiB"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Truth
# ---------------------------------------------------------------------------------------------------------------------

TRUTH_SHAPES = ((64, 10), (33, 130), (3, 2500), (3, 7, 5), (2, 70, 6, 8))


def differences(
    rng: np.random.Generator, soft: bool, reduction: str, combination: dict[str, Any]
) -> tuple[float, float]:
    """The largest of loss and gradient between fastconv and PyTorch in float64, over the shapes, with grad_output."""
    import torch
    import torch.nn.functional as F

    most_loss = most_grad = 0.0
    for shape in TRUTH_SHAPES:
        logits = 3 * rng.standard_normal(shape)
        positions = (shape[0], *shape[2:])
        target = rng.random(shape) if soft else rng.integers(0, shape[1], positions)
        weight = rng.random(shape[1]) + 0.5 if combination["weight"] else None
        smoothing, ignore = combination["label_smoothing"], int(target.flat[0]) if combination["ignore_index"] else -100
        penalty, cap = combination["z_loss"], combination["logit_softcap"]
        slope = rng.standard_normal(positions if reduction == "none" else ())
        keywords: dict[str, Any] = {
            "ignore_index": ignore, "reduction": reduction, "label_smoothing": smoothing, "z_loss": penalty,
            "logit_softcap": cap,
        }  # fmt: skip
        loss = fc.softmax_cross_entropy(logits, target, weight, **keywords)
        grad = fc.softmax_cross_entropy_grad(logits, target, weight, slope, **keywords)
        leaf = torch.from_numpy(logits).requires_grad_()
        z = leaf if cap is None else cap * torch.tanh(leaf / cap)
        w = None if weight is None else torch.from_numpy(weight)
        t = torch.from_numpy(target)
        expected = F.cross_entropy(z, t, w, ignore_index=ignore, reduction=reduction, label_smoothing=smoothing)
        if penalty:  # PyTorch has no such option: added by its definition, divided as the loss is
            squares = penalty * torch.logsumexp(z, 1) ** 2
            counts = torch.ones(positions, dtype=torch.float64) if soft else (t != ignore).double()
            share = counts if w is None or soft else counts * w[t]
            squares = squares * counts
            expected = expected + {
                "none": squares, "sum": squares.sum(), "mean": squares.sum() / share.sum()
            }[reduction]  # fmt: skip
        expected.backward(torch.from_numpy(np.asarray(slope)))
        most_loss = max(most_loss, float(np.abs(loss - expected.detach().numpy()).max()))
        most_grad = max(most_grad, float(np.abs(grad - leaf.grad.numpy()).max()))
    return most_loss, most_grad


def truth() -> str:
    rng = np.random.default_rng(0)
    rows = []
    extras: list[dict[str, Any]] = [
        {"z_loss": 0.0, "logit_softcap": None},
        {"z_loss": 0.01, "logit_softcap": None},
        {"z_loss": 0.0, "logit_softcap": 5.0},
        {"z_loss": 0.01, "logit_softcap": 5.0},
    ]
    for soft, weighted, ignoring, smoothing, extra in itertools.product(
        (False, True), (False, True), (False, True), (0.0, 0.1), extras
    ):
        if soft and ignoring:
            continue  # probabilities have no label to ignore
        combination = {"weight": weighted, "ignore_index": ignoring, "label_smoothing": smoothing, **extra}
        cells = []
        for reduction in ("mean", "sum", "none"):
            cells += [f"{d:.0e}" for d in differences(rng, soft, reduction, combination)]
        rows.append(
            [
                "probabilities" if soft else "class indices", "yes" if weighted else "", "yes" if ignoring else "",
                f"{smoothing:g}" if smoothing else "", f"{extra['z_loss']:g}" if extra["z_loss"] else "",
                f"{extra['logit_softcap']:g}" if extra["logit_softcap"] else "", *cells,
            ]
        )  # fmt: skip
    head = ["target", "weight", "ignore_index", "label_smoothing", "z_loss", "logit_softcap"]
    head += [f"{reduction}: {what}" for reduction in ("mean", "sum", "none") for what in ("loss", "gradient")]
    return tables.table(head, rows)


# ---------------------------------------------------------------------------------------------------------------------
# exp, log and tanh
# ---------------------------------------------------------------------------------------------------------------------


def _loop(function: Callable[[float], float]) -> Callable[[np.ndarray, np.ndarray], None]:
    @numba.njit
    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return loop


def largest_error(x: np.ndarray, y: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """In units in the last place of the exact result, which is in a longer format, where that is finite; and where."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(y.dtype)
        judged = np.isfinite(rounded) & np.isfinite(y)
        place = np.spacing(np.where(judged, np.abs(rounded), 1)).astype(exact.dtype)
        error = np.where(judged, np.abs(y.astype(exact.dtype) - exact) / place, 0)
    worst = int(np.argmax(error))
    return float(error[worst]), float(x[worst])


def arguments_of(name: str) -> np.ndarray:
    """Two million float64 that cover what the function does, and close to where it is hardest."""
    rng = np.random.default_rng(1)
    n = 1_000_000
    if name == "exp":
        return np.concatenate([rng.uniform(-745, 709.7, n), rng.uniform(-1, 1, n)])
    if name == "log":
        return np.concatenate([np.exp2(rng.uniform(-1074, 1023, n)), rng.uniform(0.5, 2, n)])
    return np.concatenate([rng.uniform(-25, 25, n), rng.uniform(-1, 1, n)])


# Beyond, results are 0, 1, -1, infinite or nan, which `tests/cpu/test_elementary.py` compares with those of NumPy.
FLOAT32_RANGE = {"exp": (-128, 128), "log": (0, np.inf), "tanh": (-32, 32)}


def every_float32(low: float, high: float) -> Iterator[np.ndarray]:
    """All of them between `low` and `high`, in blocks of 2**24 neighbours: those of an even and an odd exponent."""
    for start in range(0, 2**32, 2**24):
        x = np.arange(start, start + 2**24, dtype=np.uint64).astype(np.uint32).view(np.float32)
        if low <= x[0] <= high:
            yield x


def functions() -> str:
    rows = []
    for name in ("exp", "log", "tanh"):
        loop = _loop(getattr(elementary, name))
        single = (0.0, 0.0)
        for x in every_float32(*FLOAT32_RANGE[name]):
            y = np.empty_like(x)
            loop(x, y)
            with np.errstate(all="ignore"):
                exact = getattr(np, name)(x.astype(np.float64))
            single = max(single, largest_error(x, y, exact))
        x = arguments_of(name)
        y = np.empty_like(x)
        loop(x, y)
        double = largest_error(x, y, getattr(np, name)(x.astype(np.longdouble)))
        rows.append([name, *(text for error, at in (single, double) for text in (f"{error:.3f}", f"{at:.9g}"))])
    head = ["function", "float32: largest error, ulp", "at", "float64: largest error, ulp", "at"]
    return tables.table(head, rows)


TABLES = {"speed": speed, "options": options, "memory": memory, "truth": truth, "functions": functions}


def page(name: str) -> Path:
    """Where the table stands: in the text, unless it is too long for that."""
    return DOCS / ("figures/cross-entropy-truth.md" if name == "truth" else "cross-entropy.md")


def command(name: str) -> str:
    return f"python -m bench.cross_entropy {name} --write"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cross_entropy", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--write", action="store_true", help="put the tables into the pages of docs/")
    chosen = parser.parse_args()
    # PyTorch's threads must not spin while another call is measured; it is imported by the tables that need it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in chosen.tables:
        text = TABLES[name]()
        print(text, flush=True)
        if chosen.write:
            tables.write(page(name), command(name), text)


if __name__ == "__main__":
    main()
