"""The kernels for rows of classes, in the block simulator: every group of threads, row start, option and schedule."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from block_simulator import SCHEDULES
from fastconv import reference
from fastconv.cuda_kernels import _cuda, position_sums, row_groups, softmax_rows
from fastconv.cuda_kernels import softmax_cross_entropy as operation
from fastconv.cuda_kernels._cuda import DeviceArray
from simulation import device, simulated

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def aligned(shape, dtype, row=None, start=0):
    """Uninitialised (N, C) whose rows are `row` elements apart, at an address that is a multiple of 16."""
    n, c = shape
    row = c if row is None else row
    itemsize = np.dtype(dtype).itemsize
    memory = np.zeros((start + n * row) * itemsize + 16, np.uint8)
    skip = -memory.ctypes.data % 16
    flat = memory[skip : skip + (start + n * row) * itemsize].view(dtype)[start:]
    return np.lib.stride_tricks.as_strided(flat, shape, (row * itemsize, itemsize))


def nothing(dtype, ndim):
    return DeviceArray(0, (0,) * ndim, None, dtype, None, stream=-1)


def cross_entropy(monkeypatch, logits, target, schedule, group, weight=None, grad_output=None, **options):
    """Losses, gradient and lse of rows (N, C) by the kernel of `group`, the gradient over the logits if asked.

    With the option `bad_position`, an array of one number, counted from row 100 on.
    """
    monkeypatch.setattr(softmax_rows, "launch_blocks", simulated(schedule))
    monkeypatch.setattr(softmax_rows, "group_for", lambda dtype, classes, once: group)
    n, classes = logits.shape
    dtype, hard = logits.dtype, target.dtype.kind in "iu"
    smoothing = options.get("label_smoothing", 0.0)
    row = logits.strides[0] // dtype.itemsize
    grad = logits if options.get("in_place") else aligned((n, classes), dtype, row)
    loss, lse, row_loss = np.zeros(n, dtype), np.zeros(n, dtype), np.zeros(n, np.float32)

    def form(array):
        return device(array)[..., None, None, None]

    done = softmax_rows.cross_entropy_rows(
        form(logits), form(target) if hard else nothing(np.int64, 4), nothing(dtype, 5) if hard else form(target),
        nothing(dtype, 1) if weight is None else device(weight),
        nothing(dtype, 4) if grad_output is None else form(grad_output),
        options.get("ignore_index", -100), np.float32(1), nothing(np.float32, 1), np.float32(1 - smoothing),
        np.float32(smoothing / classes), np.float32(options.get("z_loss", 0)),
        np.float32(options.get("logit_softcap") or 0), form(loss), device(row_loss), form(grad), form(lse),
        device(options["bad_position"]) if "bad_position" in options else nothing(np.int64, 1), 100,
    )  # fmt: skip
    assert done
    np.testing.assert_array_equal(loss, row_loss.astype(dtype))
    return loss, grad, lse


def check(actual, expected, dtype):
    """Losses and gradients are made of a few exponentials and one sum: some roundings of float32, one of the dtype."""
    place = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=place + 1e-5, atol=(place / 64) or 3e-7)


ONCE = {"float32": [(32, 1), (32, 4), (256, 8)], "float16": [(32, 1), (128, 4)], "bfloat16": [(32, 4), (256, 4)]}
ROWS = [(dtype, row_groups.Group(*group)) for dtype, groups in ONCE.items() for group in groups]
TWICE = [(dtype, group) for dtype in ONCE for group in (row_groups.SHORT, row_groups.LONG)]
# rows that begin at every place of a vector, are shorter than one, end in one, fill the registers
SIZES = [1, 2, 7, 16, 33, 131]


@pytest.mark.parametrize(("dtype", "group"), ROWS + TWICE)
@pytest.mark.parametrize("classes", SIZES)
def test_rows_of_every_start_and_length(dtype, group, classes, monkeypatch, rng):
    if group.vectors:
        classes = min(classes, group.threads * group.vectors * row_groups.VECTORS[dtype].width)
    kind = DTYPES[dtype]
    logits = aligned((5, classes), kind)
    logits[...] = rng.standard_normal(logits.shape).astype(kind)
    labels = rng.integers(0, classes, 5)
    labels[3] = -100
    weight = (rng.random(classes) + 0.5).astype(kind)
    expected = reference.softmax_cross_entropy(logits, labels, weight, reduction="none")
    loss, grad, lse = cross_entropy(monkeypatch, logits, labels, ("shuffled", "late"), group, weight)
    check(loss, expected[0], dtype)
    check(grad, expected[1], dtype)
    check(lse, [reference.log_sum_exp(z) for z in logits.astype(np.float64)], dtype)


@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids="-".join)
@pytest.mark.parametrize(("dtype", "group"), [ROWS[2], ROWS[6], TWICE[1], TWICE[5]])
def test_every_schedule(dtype, group, schedule, monkeypatch, rng):
    kind = DTYPES[dtype]
    logits = aligned((2, 300), kind, 302)
    logits[...] = (3 * rng.standard_normal(logits.shape)).astype(kind)
    labels = rng.integers(0, 300, 2)
    expected = reference.softmax_cross_entropy(logits, labels, reduction="none", z_loss=0.1)
    loss, grad, _ = cross_entropy(monkeypatch, logits, labels, schedule, group, z_loss=0.1, in_place=True)
    check(loss, expected[0], dtype)
    check(grad, expected[1], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_vocabulary(dtype, monkeypatch, rng):
    """262,144 classes, the gradient over the logits."""
    classes = 262_144
    logits = aligned((1, classes), DTYPES[dtype])
    logits[...] = (3 * rng.standard_normal(logits.shape)).astype(DTYPES[dtype])
    label = np.array([classes - 1])
    expected = reference.softmax_cross_entropy(logits, label, reduction="none")
    loss, grad, _ = cross_entropy(monkeypatch, logits, label, SCHEDULES[0], row_groups.LONG, in_place=True)
    check(loss, expected[0], dtype)
    check(grad, expected[1], dtype)


OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"logit_softcap": 2.0},
    {"label_smoothing": 0.1, "z_loss": 0.5, "logit_softcap": 5.0},
]


@pytest.mark.parametrize(("dtype", "group"), TWICE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("hard", [True, False])
def test_every_option(dtype, group, options, hard, monkeypatch, rng):
    kind, shape = DTYPES[dtype], (3, 21)
    logits = aligned(shape, kind)
    logits[...] = rng.standard_normal(shape).astype(kind)
    weight, slope = (rng.random(21) + 0.5).astype(kind), rng.standard_normal(3).astype(kind)
    if hard:
        target = rng.integers(0, 21, 3)
    else:
        target = aligned(shape, kind)
        target[...] = rng.random(shape).astype(kind)
        target[:, 4] = 0
    expected = reference.softmax_cross_entropy(logits, target, weight, slope, reduction="none", **options)
    loss, grad, _ = cross_entropy(monkeypatch, logits, target, ("reverse", "late"), group, weight, slope, **options)
    scale = 8 if dtype == "bfloat16" else 4  # sums of terms of both signs, each rounded as the inputs are not
    place = {"float32": 3e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(loss.astype(float), expected[0], rtol=scale * place)
    np.testing.assert_allclose(grad.astype(float), expected[1], rtol=scale * place, atol=place / 4)


@pytest.mark.parametrize(("dtype", "group"), [ROWS[1], ROWS[2], TWICE[0], TWICE[1]])
def test_special_values(dtype, group, monkeypatch):
    """-inf is probability 0, a nan stays in its row, a row of -inf is nan, a wrong label is nan in its row only."""
    logits = aligned((6, 9), np.float32)
    logits[...] = 0
    logits[0, :8] = -np.inf
    logits[1, 2] = np.nan
    logits[2] = -np.inf
    logits[5] = 1000, *[-1000] * 8
    labels = np.array([8, 0, 0, 9, -1, 1])
    loss, grad, _ = cross_entropy(monkeypatch, logits, labels, ("forward", "late"), group)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, True, True, False])
    np.testing.assert_array_equal(np.isnan(grad).all(1), [False, True, True, True, True, False])
    assert loss[0] == 0
    assert loss[5] == 2000
    np.testing.assert_array_equal(grad[0], 0)
    np.testing.assert_array_equal(grad[5], [1, -1, *[0] * 7])


FAR = {
    np.int64: [2**31, 2**32 + 1, 2**63 - 1, -1, -(2**31), -(2**63)],
    np.int32: [2**31 - 1, -(2**31)],
    np.uint64: [2**63, 2**64 - 1, 2**32],
    np.uint8: [255, 9],
}


@pytest.mark.parametrize(("dtype", "group"), [ROWS[0], ROWS[2], ROWS[3], TWICE[0], TWICE[1]])
@pytest.mark.parametrize("kind", FAR)
def test_a_label_however_far_out_of_range_touches_nothing_but_its_row(kind, dtype, group, monkeypatch, rng):
    """The host has not seen the labels: no read or write is out of bounds (the simulator would say so), only nan."""
    wrong = FAR[kind]
    labels = np.array([8, *wrong, 0], kind)
    logits = aligned((len(labels), 9), DTYPES[dtype])
    logits[...] = rng.standard_normal(logits.shape)
    weight = np.ones(9, DTYPES[dtype])
    position = np.array([1000])
    loss, grad, _ = cross_entropy(
        monkeypatch, logits, labels, ("shuffled", "late"), group, weight, in_place=True, bad_position=position
    )
    assert position == 101  # the first of them, whichever thread came first
    bad = np.array([False, *[True] * len(wrong), False])
    np.testing.assert_array_equal(np.isnan(loss), bad)
    np.testing.assert_array_equal(np.isnan(grad), np.repeat(bad[:, None], 9, axis=1))


@pytest.mark.parametrize(("dtype", "group"), ROWS + TWICE)
@pytest.mark.parametrize("log", [False, True])
def test_softmax(dtype, group, log, monkeypatch, rng):
    monkeypatch.setattr(softmax_rows, "launch_blocks", simulated())
    monkeypatch.setattr(softmax_rows, "group_for", lambda dtype, classes, once: group)
    kind = DTYPES[dtype]
    logits = aligned((3, 61), kind)
    logits[...] = (4 * rng.standard_normal(logits.shape)).astype(kind)
    out = aligned((3, 61), kind)
    assert softmax_rows.softmax_rows(device(logits)[..., None, None, None], log, device(out)[..., None, None, None])
    function = reference.log_softmax if log else reference.softmax
    check(out, [function(z) for z in logits.astype(np.float64)], dtype)


def test_groups_hold_their_rows():
    """Every row that is read once fits the registers of its group; the next smaller group would not hold it."""
    for (dtype, vectors), classes in itertools.product(row_groups.VECTORS.items(), [1, 128, 129, 1000, 8192, 32000]):
        group = row_groups.group_for(dtype, classes, True)
        groups = row_groups.GROUPS[vectors.width]
        capacity = [g.threads * g.vectors * vectors.width for g in groups]
        assert capacity == sorted(capacity)
        assert group == groups[np.searchsorted(capacity, classes)]
        assert row_groups.group_for(dtype, capacity[-1] + 1, True) == row_groups.LONG
        assert row_groups.group_for(dtype, classes, False).vectors == 0


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 3), np.float32),  # classes not next to each other
        np.zeros((2, 8), np.float64),
        aligned((2, 9), np.float32)[:, 1:],  # not at a multiple of 16 bytes
        np.zeros((2, 8), np.float32)[::-1],
        np.zeros((0, 8), np.float32),
    ],
    ids=["middle axis", "float64", "misaligned", "reversed", "empty"],
)
def test_what_is_no_row_is_left_to_the_simple_kernels(array, monkeypatch):
    monkeypatch.setattr(softmax_rows, "launch_blocks", lambda *arguments: pytest.fail("launched"))
    form = device(array)[(..., *[None] * (5 - array.ndim))]
    assert not softmax_rows.softmax_rows(form, False, form)


@pytest.mark.skipif(not _cuda.SIMULATOR, reason="the small kernels around it run in Numba's simulator")
def test_from_the_entry_function(monkeypatch, rng):
    import fastconv as fc

    for module in (softmax_rows, position_sums):
        monkeypatch.setattr(module, "launch_blocks", simulated())
    monkeypatch.setattr(operation, "has_engine", lambda: True)
    used = []
    monkeypatch.setattr(
        operation, "cross_entropy_rows", lambda *a: used.append(softmax_rows.cross_entropy_rows(*a)) or used[-1]
    )
    logits, labels = aligned((4, 40), np.float32), rng.integers(0, 40, 4)
    logits[...] = rng.standard_normal((4, 40))
    expected = reference.softmax_cross_entropy(logits, labels)
    loss, grad = fc.softmax_cross_entropy_with_grad(logits, labels, backend="cuda")
    check(loss, expected[0], "float32")
    check(grad, expected[1], "float32")
    assert len(used) == 1
