"""One test body, every backend: the `backend` fixture runs a test on the CPU and on CUDA.

Without a GPU, CUDA means Numba's simulator, which needs its environment variable before numba is imported, hence here.
`FASTCONV_TEST_GPU=1` runs the same tests on a real GPU instead.
"""

import gc
import os

ON_GPU = os.environ.get("FASTCONV_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
# More threads than cores, so that the tests of determinism have seven to split over on any machine.
os.environ.setdefault("NUMBA_NUM_THREADS", "7")

import numba  # noqa: E402, F401 - before fastconv, which then registers with it also where it is not installed
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from shapes import SIMULATOR_MACS  # noqa: E402


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backend to pass to the function under test."""
    return request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that are the same in every run, and differ from test to test."""
    return np.random.default_rng(sum(request.node.name.encode()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the collector of garbage leave out the tests themselves, millions of objects that stay."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the simulator is too slow for: shapes of many multiplications (`shapes.SIMULATOR_MACS`).

    The simulated kernels have one thread per element and no blocks, so these shapes have no tails for them to miss.
    """
    if ON_GPU:
        return

    def too_slow(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        return values.get("backend") == "cuda" and getattr(values.get("case"), "macs", 0) > SIMULATOR_MACS

    deselected = [item for item in items if too_slow(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not too_slow(item)]
