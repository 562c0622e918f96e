"""pytest-benchmark suite of the convolutions: forward pass, weight gradient, input gradient (suite.py says how)."""

from __future__ import annotations

from fastconv.bench import suite
from fastconv.bench.cases import ConvolutionCase


@suite.parameters(ConvolutionCase)
def test_convolution(benchmark, case, which, peer, tmp_path):
    suite.measure(benchmark, case, which, peer, tmp_path)
