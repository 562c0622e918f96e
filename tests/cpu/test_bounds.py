"""Nothing is read or written outside the caller's arrays: they lie against pages of memory that may not be touched.

A kernel that reads whole vectors, or ahead, ends the process here; the result of such a read is mostly thrown away, so
that no other test sees it.
"""

from __future__ import annotations

import sys

import pytest

from helpers import SUPPORT, output_of, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by way of Linux' libc")

GUARDED = """
    import ctypes, faulthandler, mmap, sys
    sys.path.insert(0, sys.argv[1])
    faulthandler.enable()
    import numpy as np
    import fastconv as fc
    from helpers import LAYOUTS, VIEWS, functions
    from shapes import CASES

    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE

    def guarded(array, at_end):
        # the same values and strides, against a page that may not be touched
        order = np.argsort([-abs(step) for step in array.strides], kind="stable")
        flip = tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)
        packed = np.ascontiguousarray(array[flip].transpose(order))
        pages = -(-packed.nbytes // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        first = page + (pages * page - packed.nbytes if at_end else 0)
        copy = np.frombuffer(memory, packed.dtype, packed.size, first).reshape(packed.shape)
        copy[...] = packed
        for closed in (base, base + (pages + 1) * page):
            assert libc.mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0) == 0
        return copy.transpose(np.argsort(order))[flip]

    def seen(arrays):
        # every array at the beginning and at the end of its memory, in three orders of its axes
        for view in (lambda a: a, VIEWS["reversed"], VIEWS["channels_last_memory"]):
            for at_end in (False, True):
                yield [guarded(view(a), at_end) if a.ndim else a for a in arrays]
"""

CONVOLUTIONS = """
    rng, dtype, algorithm = np.random.default_rng(0), np.dtype(sys.argv[2]), sys.argv[3]
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
    rng, dtype = np.random.default_rng(0), np.dtype(sys.argv[2])
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
    process = run_python(GUARDED + CONVOLUTIONS, SUPPORT, dtype, algorithm, timeout=600)
    assert int(output_of(process)) > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_stay_within_their_arrays(dtype):
    assert int(output_of(run_python(GUARDED + LOSSES, SUPPORT, dtype, timeout=600))) > 0


def test_a_read_beyond_the_end_is_found():
    process = run_python(
        GUARDED + "    np.lib.stride_tricks.as_strided(guarded(np.ones(5, np.float32), True), (6,)).sum()",
        SUPPORT,
    )
    assert process.returncode < 0
