"""pytest-benchmark suite of softmax cross-entropy: the loss, and loss and gradient in one (suite.py says how)."""

from __future__ import annotations

from fastconv.bench import suite
from fastconv.bench.cases import CrossEntropyCase


@suite.parameters(CrossEntropyCase)
def test_softmax_cross_entropy(benchmark, case, which, peer, tmp_path):
    suite.measure(benchmark, case, which, peer, tmp_path)
