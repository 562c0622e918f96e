"""The pages of docs/ about the CUDA kernels' machine code say what the recorded rows of the gate say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import codegen_table

DOCS = Path(__file__).parents[2] / "docs"
HOPPER = {row["kernel"]: row for row in codegen_table.read() if row["architecture"] == "sm_90"}
ISSUED = 132 * 4 * 1.98e9  # instructions of a warp a second
CEILINGS = {"float64": 34, "tf32": 495, "bfloat16": 990}  # TFLOP/s; of float32 67
# kernel, multiply-adds of the loop, instructions of the loop, bound by them, bound by units, per cent
BOUNDS = re.findall(
    r"^\| (\S+) \| (\d+) (\w+) \| (\d+) \| ([\d.]+) \| (\d+) \| (\d+) \|$",
    (DOCS / "cuda-predictions.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_the_figures_are_those_of_the_recorded_rows():
    expected = codegen_table.page(codegen_table.read())
    assert codegen_table.PAGE.read_text(encoding="utf-8") == expected, "run tests/support/codegen_table.py"


def test_there_are_bounds():
    assert len(BOUNDS) > 8


@pytest.mark.parametrize(("kernel", "multiplies", "opcode", "instructions", "bound", "units", "percent"), BOUNDS)
def test_a_bound_follows_from_the_counted_instructions(
    kernel, multiplies, opcode, instructions, bound, units, percent
):
    row = HOPPER[kernel]
    assert (multiplies, opcode) == (row["hot count"], row["hot opcode"])
    assert int(row["hot instructions"]) < int(instructions) < int(row["instructions"])  # the loop around the hot block
    kind = next((name for name in CEILINGS if name in kernel), "float32")
    flops = {"tf32": 2048, "bfloat16": 4096}.get(kind, 64)
    exact = int(multiplies) / int(instructions) * ISSUED * flops / 1e12
    assert float(bound) == pytest.approx(exact, abs=0.051)
    assert int(units) == CEILINGS.get(kind, 67)
    assert int(percent) == round(100 * min(exact, int(units)) / int(units))
