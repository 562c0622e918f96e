"""Running task bodies: addresses, and stages that wait for the stages before them."""

import numpy as np
import pytest

import fastconv as fc
from fastconv.cpu import tasks
from fastconv.cpu.records import Integer, Reals


class Arrays(tasks.Parameters):
    values: Reals
    sums: Reals
    count: Integer


@tasks.body(Arrays)
def _put(task, worker, p, real):
    """values[task] += task + 1, after a while that differs from task to task."""
    values = p.values
    for _ in range(task * 37 % 11 * 200):
        values[task] += 1
    for _ in range(task * 37 % 11 * 200):
        values[task] -= 1
    values[task] += task + 1


@tasks.body(Arrays)
def _add_up(task, worker, p, real):
    for i in range(p.count):
        p.sums[task] += p.values[i]


@pytest.fixture
def all_threads():
    before = fc.get_num_threads()
    yield
    fc.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_stage_sees_all_that_the_stages_before_it_wrote(threads, all_threads):
    fc.set_num_threads(threads)
    dtype = np.dtype(np.float64)
    for _ in range(50):
        values, sums = np.zeros(40), np.zeros(60)
        one = Arrays.of(values=tasks.data_address(values), sums=tasks.data_address(sums), count=20)
        rest, last = one.copy(), one.copy()
        rest["values"] += 20 * values.itemsize
        last["count"] = 40
        tasks.run_stages(dtype, (
            (_put, 20, one, 64, 10**9, 0), (_put, 20, rest, 64, 0, 0), (_add_up, 60, last, 64, 0, 2),
        ))  # fmt: skip
        assert (sums == 2 * sum(range(1, 21))).all()


def _views():
    a = np.arange(24.0).reshape(4, 6)
    frozen = a.copy()
    frozen.flags.writeable = False
    record = np.zeros(3, [("tag", "i1"), ("value", "f4")])
    return {
        "whole": a, "sliced": a[1:, 2:], "backwards": a[::-1, ::-1], "transposed": a.T, "read-only": frozen,
        "unaligned": record["value"], "empty": a[:0], "number": a[1, 2, ...],
        "broadcast": np.broadcast_to(a[1], (5, 6)),
    }  # fmt: skip


@pytest.mark.parametrize("name", _views())
def test_the_address_is_the_one_that_numpy_states(name):
    array = _views()[name]
    assert tasks.data_address(array) == array.__array_interface__["data"][0] == array.ctypes.data
