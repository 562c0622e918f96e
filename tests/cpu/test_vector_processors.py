"""The tests of the vector kernels with the vectors and tiles of other processors, in a process for each of these."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import output_of
from processors import PROCESSORS, needs_x86, run_on

HERE = Path(__file__)
CODE = """
    import sys
    import pytest
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


# Each compiles every kernel, a minute or two where the cache is empty: the others are run by `make test-slow`.
ALWAYS = "avx2"


@needs_x86
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == ALWAYS else pytest.mark.slow) for name in PROCESSORS]
)
def test_vector_kernels(name: str) -> None:
    files = sorted(str(path) for path in HERE.parent.glob("test_vector_*.py") if path != HERE)
    printed = output_of(run_on(name, CODE, *files))
    assert " passed" in printed
    assert " failed" not in printed
