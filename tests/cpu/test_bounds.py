"""Nothing is read or written outside the caller's arrays: they lie against pages of memory that may not be touched.

A kernel that reads whole vectors, or ahead, ends the process here; the result of such a read is mostly thrown away, so
that no other test sees it.
"""

from __future__ import annotations

import sys

import pytest

from helpers import SUPPORT, output_of, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by way of Linux' libc")

CONVOLUTIONS = """
    import sys
    import numpy as np
    from guarded import guarded, seen
    from helpers import LAYOUTS, functions
    from shapes import CASES
    rng, dtype, algorithm = np.random.default_rng(0), np.dtype(sys.argv[1]), sys.argv[2]
    count = 0
    for case in CASES:
        if case.macs > 3_000_000 or (dtype == np.float64 and case.macs > 100_000):
            continue
        f = functions(case.ndim)
        shapes = (case.input, case.weight, case.weight[:1], case.output)
        for x, w, b, dy in seen([rng.standard_normal(shape).astype(dtype) for shape in shapes]):
            options = {**case.options, "algorithm": algorithm}
            for call in (
                lambda: f.conv(x, w, b, out=guarded(dy, True), **options),
                lambda: f.conv(x, w, b, out=guarded(dy, False), **options),
                lambda: f.input_grad(x.shape, w, dy, out=guarded(x, True), **options),
                lambda: f.weight_grad(x, w.shape, dy, out=guarded(w, True), **options),
                lambda: f.bias_grad(dy, layout=LAYOUTS[case.ndim][0], out=guarded(b, True)),
            ):
                try:
                    call()
                    count += 1
                except ValueError as error:
                    assert "does not apply" in str(error), error
    print(count)
"""

LOSSES = """
    import sys
    import numpy as np
    import fastconv as fc
    from guarded import guarded, seen
    rng, dtype = np.random.default_rng(0), np.dtype(sys.argv[1])
    count = 0
    for shape in [(1,), (5, 1), (3, 5), (7, 8), (2, 17), (4, 33), (3, 100), (2, 4097), (1, 40_000), (2, 3, 5, 7),
                  (3, 21, 16, 3), (2, 40, 1, 9), (1, 1000, 33)]:
        positions = (shape[0], *shape[2:]) if len(shape) > 1 else ()
        classes = shape[1 if positions else 0]
        arrays = [rng.standard_normal(shape), rng.random(shape), rng.random(classes), rng.standard_normal(positions)]
        for z, y, w, dy in seen([np.asarray(a, dtype) for a in arrays]):
            labels = guarded(rng.integers(0, classes, positions).astype(np.int64), True) if positions else np.array(0)
            for target in (labels, y):
                for smoothing in (0.0, 0.1):
                    options = {"reduction": "none", "label_smoothing": smoothing}
                    fc.softmax_cross_entropy(z, target, w, **options)
                    fc.softmax_cross_entropy_grad(z, target, w, dy, out=guarded(z, True), **options)
                    own = guarded(z, False)
                    fc.softmax_cross_entropy_with_grad(own, target, w, grad_out=own, **options)
            fc.softmax(z, -1, out=guarded(z, True))
            fc.log_softmax(z, 0)
            count += 1
    for rows, features, classes in [(1, 1, 1), (3, 5, 7), (17, 16, 33), (5, 64, 1000), (130, 31, 50)]:
        shapes = [(rows, features), (classes, features), (classes,)]
        for x, w, b in seen([rng.standard_normal(shape).astype(dtype) for shape in shapes]):
            fc.linear_cross_entropy_with_grad(x, w, guarded(rng.integers(0, classes, rows), True), b)
            count += 1
    print(count)
"""


@pytest.mark.parametrize(
    ("dtype", "algorithm"),
    [("float32", "direct"), ("float64", "direct"), ("float32", "winograd"), ("float32", "fft")],
)
def test_convolutions_stay_within_their_arrays(dtype, algorithm):
    process = run_python(CONVOLUTIONS, dtype, algorithm, path=[SUPPORT], timeout=600)
    assert int(output_of(process)) > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_stay_within_their_arrays(dtype):
    assert int(output_of(run_python(LOSSES, dtype, path=[SUPPORT], timeout=600))) > 0


def test_a_read_beyond_the_end_is_found():
    code = """
        import numpy as np
        from guarded import guarded
        inside = guarded(np.ones(5, np.float32), True)
        print(inside.sum(), flush=True)
        print(np.lib.stride_tricks.as_strided(inside, (6,)).sum())
    """
    process = run_python(code, path=[SUPPORT])
    assert process.returncode < 0
    assert process.stdout == "5.0\n"
