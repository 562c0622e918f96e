"""What the tests of the benchmarks share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Garbage is collected between samples and after failures: of what was made there, not of all imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
