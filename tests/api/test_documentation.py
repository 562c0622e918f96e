"""The examples of README and docs run, and their links lead somewhere. (test_contract runs docstrings.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastconv as fc

ROOT = Path(__file__).parents[2]
WITH_EXAMPLES = [ROOT / name for name in ("README.md", "docs/usage.md", "docs/equations.md")]
BLOCKS = [
    block
    for page in WITH_EXAMPLES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_examples(block, tmp_path):
    if "import cupy" in block:
        pytest.importorskip("cupy", reason="CuPy is not installed (it needs a GPU)")
    script = tmp_path / "readme.py"  # beside which Numba keeps what an example caches
    script.write_text(block)
    with fc.use_backend("auto"):  # what an example sets is as it was afterwards
        exec(compile(block, str(script), "exec"), {"__name__": "readme"})


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert links or page.name == "CHANGELOG.md"
    assert [link for link in links if not (page.parent / link).exists()] == []
