"""What the pytest-benchmark suites share: their parameters, and how one of them is run.

    python -m pytest bench/bench_convolution.py --benchmark-group-by=param:case,param:which
    BENCH=quick python -m pytest bench/bench_*.py -k "resnet50 and forward"

All peers run in the one process of pytest, so no thread may spin while it waits: this module is imported before them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np
import pytest

from . import cases, checks, peers

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parameters(kind: type) -> pytest.MarkDecorator:
    """Every peer on every pass of every layer of `kind`; of the quick selection where BENCH=quick."""
    if os.environ.get("BENCH") == "quick":
        chosen = cases.quick()
    else:
        chosen = [case for name in cases.NETWORKS for case in cases.network(name)]
    return pytest.mark.parametrize(
        ("case", "which", "peer"),
        [
            pytest.param(case, which, peer, id=f"{case.network}-{case.name}-{which}-{peer}")
            for case in chosen
            if isinstance(case, kind)
            for which in case.passes
            for peer in peers.names("cpu")
        ],
    )


def measure(benchmark: Any, case: cases.Case, which: str, peer: str, folder: Path) -> None:
    """Prepare the peer, check its result and time it; skip what it cannot do, with the reason."""
    this = peers.PEERS[peer, "cpu"]
    reason = this.missing()
    if reason is not None:
        pytest.skip(reason)
    problem = peers.Problem(case, which, case.operands(np.dtype(np.float32)), THREADS, spinning=False)
    try:
        prepared = this.prepare(problem)
    except peers.Unsupported as error:
        pytest.skip(f"{peer} {error}")
    with prepared.context():
        checks.check(case, which, problem.operands, prepared.fetch(prepared.call()), folder)
        benchmark.group = f"{case.network} {case.name} {which}"
        benchmark.extra_info.update(version=this.version(), threads=THREADS, unit=case.unit)
        benchmark(prepared.call)
    if benchmark.stats is not None:  # None with --benchmark-disable
        amount = case.flops(which) if case.unit == "GFLOP/s" else case.bytes(which, 4)
        benchmark.extra_info["rate"] = amount / benchmark.stats.stats.min / 1e9
