"""Records: what Python writes, compiled code reads under the same names, and the other way round."""

import numpy as np
import pytest

from fastconv.cpu import tasks
from fastconv.cpu.records import Double, Integer, Integers, PointerTo, Reals, Record, beginning, copy_of


class Entry(Record):
    place: Integer
    factor: Double


class Axis(Record):
    table: Integers
    before: Integer


class Scaling(tasks.Parameters):
    x: Reals
    entries: PointerTo[Entry]
    height: Axis
    width: Axis
    total: Integer


class Longer(Scaling):
    more: Integer


@tasks.body(Scaling)
def _scale(task, worker, p, real):
    entry = p.entries[task]
    place = entry.place + p.width.table[task] + p.height.before
    p.x[place] = p.x[place] * entry.factor
    p.width.before = place
    if task == 2:
        p.total = p.header.tasks + p.width.before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compiled_code_reads_and_writes_the_fields(dtype):
    x = np.arange(20, dtype=dtype)
    entries = Entry.table([(0, 2.0), (3, -1.0), (5, 0.5)])
    offsets = np.array([1, 1, 2])
    p = Scaling.zeros()
    p.x, p.entries, p.width.table = map(tasks.data_address, (x, entries, offsets))
    p.height.before = 2
    tasks.run(_scale, np.dtype(dtype), 3, p, 64, 0)
    expected = np.arange(20, dtype=dtype)
    expected[[3, 6, 9]] *= [2, -1, 0.5]
    np.testing.assert_array_equal(x, expected)
    assert p.total == 3 + 9
    assert p.width.before == 9
    assert p.height.before == 2


def test_a_record_that_inherits_begins_with_the_other():
    for name, (offset, _) in Scaling.fields.items():
        assert Longer.fields[name][0] == offset == Longer.dtype.fields[name][1]
    assert Longer.fields["more"][0] == Scaling.dtype.itemsize
    assert Scaling.fields["header"][0] == 0


def test_a_copy_is_a_record_of_its_own():
    p = Scaling.zeros()
    q = p.copy()
    q.height.before = 7
    assert (p.height.before, q.height.before) == (0, 7)


def test_a_copy_of_one_block():
    p = Scaling.zeros()
    p.total, p.width.before = 3, -5
    q = copy_of(p)
    assert q == p
    q["height"] = 1, 7
    assert (p.height.before, int(q["height"]["before"])) == (0, 7)
    assert q.flags.aligned


def test_a_record_of_all_its_values():
    p = Scaling.of(x=5, entries=6, height=(7, 8), width=(9, 10), total=11)
    assert p.dtype == Scaling.dtype
    assert p.shape == ()
    assert p["header"].item() == (0,) * len(tasks.Header.fields)
    assert (p["x"], p["height"]["table"], p["width"]["before"], p["total"]) == (5, 7, 10, 11)
    with pytest.raises(KeyError, match="width"):
        Scaling.of(x=5, entries=6, height=(7, 8), total=11)


def test_a_name_that_arrays_have_is_refused():
    with pytest.raises(TypeError, match="a field cannot be called 'size'"):
        type("Bad", (Record,), {"__annotations__": {"size": Integer}})


first_of = beginning(Scaling)


@tasks.body(Longer)
def _count(task, worker, p, real):
    first_of(p).total = p.header.tasks
    p.more = first_of(p).total + 1


def test_the_beginning_of_a_record_is_the_one_it_inherits_from():
    p = Longer.zeros()
    tasks.run(_count, np.dtype("float32"), 5, p, 64, 0)
    assert (p.total, p.more) == (5, 6)
