"""The timing loop that all benchmarks share, on a clock that is set by hand, and the tables it ends in."""

from __future__ import annotations

import gc

import pytest

from fastconv.bench import tables, timing


class Clock:
    """Stands in for `time`: a call takes as long as it says."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def perf_counter(self):
        return self.now

    def call(self, name, seconds):
        def take():
            self.called.append(name)
            self.now += seconds

        return take

    def calls(self, *seconds):
        return [(self.call(at, taken), None) for at, taken in enumerate(seconds)]


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_samples_take_turns(clock):
    first, second = timing.repeated_calls(clock.calls(0.0005, 0.002), 0.1)
    assert first == pytest.approx([0.0005] * len(first))  # of one call, though a sample is of two
    assert second == pytest.approx([0.002] * len(second))
    assert len(first) == len(second) == 67  # of 3 ms each, until 0.2 s have passed
    assert clock.called[:10] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]  # two warm-ups each, then turns that turn


def test_a_call_that_is_longer_than_its_samples_should_be_is_not_repeated(clock):
    assert timing.repeated_calls(clock.calls(5.0), 0.1) == [[5.0]]
    assert len(clock.called) == 2
    clock.now = 0.0
    assert timing.repeated_calls(clock.calls(0.09), 0.1) == [pytest.approx([0.09] * timing.LEAST_SAMPLES)]


def test_the_end_of_the_last_call_is_waited_for(clock):
    def wait():
        clock.now += 1.0

    assert timing.seconds_of(clock.call("a", 2.0), 4, wait) == pytest.approx((4 * 2.0 + 1.0) / 4)


def test_the_garbage_collector_is_off_while_calls_are_repeated(clock):
    seen = []

    def call():
        seen.append(gc.isenabled())
        clock.now += 1.0

    timing.repeated_calls([(call, None)], 0.5)
    assert seen == [True, False]  # the warm-up, and the sample
    assert gc.isenabled()

    def fail():
        if not gc.isenabled():
            raise RuntimeError("in a sample")
        clock.now += 1.0

    with pytest.raises(RuntimeError, match="in a sample"):
        timing.repeated_calls([(fail, None)], 0.5)
    assert gc.isenabled()


def test_single_calls_are_warmed_up_once_and_take_turns(clock):
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 3.0)}
    samples = timing.single_calls(calls, seconds=7.0, least=3)
    assert samples == {"a": [1.0] * 3, "b": [3.0] * 3}  # three rounds, though two are 8 seconds
    assert "".join(clock.called) == "ab" + "ab" + "ba" + "ab"
    clock.called.clear()
    samples = timing.single_calls(calls, seconds=15.0, least=1, order=timing.as_given)
    assert samples == {"a": [1.0] * 4, "b": [3.0] * 4}  # 16 seconds
    assert "".join(clock.called) == "ab" * 5


def test_a_drawn_order_has_every_name_and_changes():
    order = timing.drawn()
    names = ["a", "b", "c", "d"]
    orders = {tuple(order(names, turn)) for turn in range(20)}
    assert all(sorted(one) == names for one in orders)
    assert len(orders) > 5
    assert names == ["a", "b", "c", "d"]


def test_each_round_begins_with_the_next_name():
    assert [timing.rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert timing.rotated([], 3) == []


def test_a_sampler_may_have_several_samples_or_none(clock):
    samples = timing.by_turns({"a": lambda: [1.0, 2.0], "b": list}, least=2)
    assert samples == {"a": [1.0, 2.0, 1.0, 2.0], "b": []}


# Tables


def test_a_table():
    assert tables.table(["layer", "ms"], [["a", 1.5], ["b", ""]]) == (
        "| layer | ms |\n| --- | --: |\n| a | 1.5 |\n| b |  |"
    )  # fmt: skip
    assert tables.head(["a", "b", "c"], words=2)[1] == "| --- | --- | --: |"


def test_what_is_between_the_markers_of_a_command_is_replaced(tmp_path):
    one, two = (f"{tables.begin(f'make {name}')}\nold {name}\n{tables.END}\n" for name in ("one", "two"))
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n{one}between\n{two}The end.\n")
    tables.write(page, "make two", "new\n")
    assert page.read_text() == f"Text.\n{one}between\n{two.replace('old two', 'new')}The end.\n"


@pytest.mark.parametrize(
    "text",
    ["no markers", tables.begin("it"), f"{tables.END} {tables.begin('it')}", f"{tables.begin('it')}{tables.END}" * 2],
)
def test_markers_that_are_missing_or_twice_are_an_error(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: expected <!-- table: it --> once"):
        tables.write(page, "it", "new")
    assert page.read_text() == text
