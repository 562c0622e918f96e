"""Convolution with the vectors and tiles of processors other than this one, which runs their instructions too."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import output_of
from processors import PROCESSORS, needs_x86, run_on

CODE = """
    import sys
    import numpy as np
    import oracle
    from fastconv.cpu.vector.tile import tile
    from helpers import channels_first, channels_last, functions, integers
    from shapes import CASES
    from fastconv.arguments import LAYOUTS

    rng = np.random.default_rng(0)
    for case in CASES:
        f, plain = functions(case.ndim), case.plain_options
        x, w, dy = (integers(rng, s, sys.argv[1]) for s in (case.input, case.weight, case.output))
        y = oracle.convolution(x, w, **plain)
        dw = oracle.weight_grad(x, dy, weight_shape=w.shape, **plain)
        dx = oracle.input_grad(w, dy, input_shape=x.shape, **plain)
        same = lambda a, b: np.testing.assert_array_equal(a, b, str(case))
        same(f.conv(x, w, **case.options), y)
        same(f.weight_grad(x, w.shape, dy, **case.options), dw)
        same(f.input_grad(x.shape, w, dy, **case.options), dx)
        options = {**case.options, "layout": LAYOUTS[case.ndim][1]}
        x, dy = channels_last(x), channels_last(dy)
        same(channels_first(f.conv(x, w, **options)), y)
        same(f.weight_grad(x, w.shape, dy, **options), dw)
        same(channels_first(f.input_grad(x.shape, w, dy, **options)), dx)
    print(tile(8 * x.itemsize).lanes)
"""


@needs_x86
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_case(name: str, dtype: str) -> None:
    lanes = output_of(run_on(name, CODE, dtype))
    assert int(lanes) == PROCESSORS[name].lanes(np.dtype(dtype).itemsize)
