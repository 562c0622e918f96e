"""The vector kernels with the vectors and tiles of other processors: their tests again, all in one process for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import output_of
from processors import PROCESSORS, needs_x86, run_on

CODE = """
    import sys
    import pytest
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@needs_x86
@pytest.mark.parametrize("processor", PROCESSORS)
def test_kernels_agree_with_their_plain_siblings(processor: str) -> None:
    files = sorted(map(str, Path(__file__).parent.glob("test_vector_*.py")))
    assert " passed" in output_of(run_on(processor, CODE, *files))
