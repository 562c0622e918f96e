"""docs/figures/cuda-codegen.md: what the code-generation gate has measured of every kernel and architecture.

    rm -f tests/cuda/codegen.csv
    FASTCONV_CODEGEN_RECORD=tests/cuda/codegen.csv make test-cuda ARGS='-m codegen'
    .venv-cuda/bin/python tests/support/codegen_table.py

The gate appends a row for each kernel that it compiles (`codegen.record`), in as many runs as one likes; this script
keeps the last of each kernel and architecture, sorts the file and makes the page of it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from codegen import COLUMNS
from fastconv.bench import tables

ROOT = Path(__file__).parents[2]
TABLE, PAGE = ROOT / "tests" / "cuda" / "codegen.csv", ROOT / "docs" / "figures" / "cuda-codegen.md"

Row = dict[str, str]

HEAD = """# Machine code of the CUDA kernels: figures

What the columns mean, and how this page is made: [cuda-codegen](../cuda-codegen.md).
"""

FAMILIES = {
    "Softmax and cross-entropy, a row for a group of threads": (
        "rows-", "softmax-", "log_softmax-", "add_",
    ),
    "Matrix products, float32": ("gather-", "gather-unchecked-", "weight-"),
    "Matrix products, float64": ("gather-float64", "weight-float64"),
    "Matrix products on the tensor cores, tf32": ("gather-tf32", "weight-tf32"),
    "Matrix products on the tensor cores, float16 and bfloat16": (
        "gather-float16", "weight-float16", "gather-bfloat16", "weight-bfloat16",
    ),
    "Depthwise, and the gradient of a bias": ("depthwise-", "channel_sums-"),
    "One thread for each element": ("",),
}  # fmt: skip


def family(kernel: str) -> str:
    """The one whose prefix is the longest."""
    return max(FAMILIES, key=lambda name: max(len(p) if kernel.startswith(p) else -1 for p in FAMILIES[name]))


def read(path: Path = TABLE) -> list[Row]:
    """The last row of each kernel and architecture: kernels in the order of their first row."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file) if line and line[0] != COLUMNS[0]]
    rows: dict[tuple[str, str], Row] = {}
    for line in lines:
        row = dict(zip(COLUMNS, line, strict=True))
        rows[row["kernel"], row["architecture"]] = row
    kernels = list(dict.fromkeys(kernel for kernel, _ in rows))
    return sorted(rows.values(), key=lambda row: (kernels.index(row["kernel"]), _number(row["architecture"])))


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def _share(row: Row) -> str:
    count, total = int(row["hot count"]), int(row["hot instructions"])
    return f"{100 * count / total:.0f}" if count else "-"


def _among(row: Row, opcode: str) -> str:
    """The loads or stores, and how many of them are wide."""
    wide = sum(int(row[name]) for name in (f"{opcode}.128", f"{opcode}.64") if name in row)
    total = int(row[opcode]) - (int(row["LDSM"]) if opcode == "LDS" else 0)
    return f"{wide} of {total}" if total else "0"


def _table(kernels: dict[str, dict[str, Row]], architectures: list[str]) -> str:
    head = ["kernel", "threads", "shared", "stack, local, spills"]
    head += [f"registers {a}" for a in architectures] + [f"hot {a}" for a in architectures]
    head += ["hot sm_90", "LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "SHFL", "BAR"]
    lines = []
    for kernel, rows in kernels.items():
        hopper = rows["sm_90"]
        shared = sorted({int(row["static shared"]) for row in rows.values()})
        own = max(int(row[name]) for row in rows.values() for name in ("stack", "local", "spills"))
        cells = [kernel, hopper["threads"], "-".join(map(str, shared)), str(own)]
        cells += [rows[a]["registers"] if a in rows else "" for a in architectures]
        cells += [_share(rows[a]) if a in rows else "" for a in architectures]
        multiplies = f"{hopper['hot count']} {hopper['hot opcode']} of {hopper['hot instructions']}"
        cells.append(multiplies if int(hopper["hot count"]) else "-")
        cells += [_among(hopper, "LDG"), _among(hopper, "STG"), hopper["LDGSTS"]]
        cells += [_among(hopper, "LDS"), _among(hopper, "STS"), hopper["LDSM"], hopper["SHFL"], hopper["BAR"]]
        lines.append(cells)
    return tables.table(head, lines)


def page(rows: list[Row]) -> str:
    kernels: dict[str, dict[str, dict[str, Row]]] = {name: {} for name in FAMILIES}
    for row in rows:
        kernels[family(row["kernel"])].setdefault(row["kernel"], {})[row["architecture"]] = row
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["architecture"]] = counts.get(row["architecture"], 0) + 1
    within = sum(
        int(row["registers"]) <= int(row["budget"]) and row["stack"] == row["local"] == row["spills"] == "0"
        for row in rows
    )
    parts = [HEAD, f"\n{within} of the {len(rows)} compiled kernels fit their budget of registers and have no stack, "]
    parts.append("local memory or spilled\nregisters. Kernels by architecture: ")
    parts.append(", ".join(f"{name} {counts[name]}" for name in sorted(counts, key=_number)) + ".\n")
    for name, members in kernels.items():
        if members:
            architectures = sorted({a for rows in members.values() for a in rows}, key=_number)
            parts += [f"\n## {name}\n\n", _table(members, architectures), "\n"]
    return "".join(parts)


if __name__ == "__main__":
    found = read()
    write(found)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"written: {PAGE}, of {len(found)} rows")
