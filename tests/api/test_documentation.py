"""The README: its examples run, its links lead somewhere. (The examples of docstrings run in test_contract.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastconv as fc

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_readme_examples(block, tmp_path):
    if "import cupy" in block:
        pytest.importorskip("cupy", reason="CuPy is not installed (it needs a GPU)")
    script = tmp_path / "readme.py"  # beside which Numba keeps what an example caches
    script.write_text(block)
    with fc.use_backend("auto"):  # what an example sets is as it was afterwards
        exec(compile(block, str(script), "exec"), {"__name__": "readme"})


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", README)
    assert links
    assert [link for link in links if not (Path(__file__).parents[2] / link).exists()] == []
