"""The table of methods: its order and protocol, what a problem is, the cache of plans, and what is handed on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastconv as fc
from fastconv.arguments import ALGORITHMS, LAYOUTS, convolution_plan
from fastconv.cpu import convolution, methods
from fastconv.cpu.methods import table
from fastconv.cpu.problem import ANY_VALUES, FINITE_OPERANDS, FINITE_WEIGHTS, Method, Plan
from shapes import CASES

BY_NAME = {case.name: case for case in CASES}
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def geometry(case):
    options = (case.stride, case.padding, case.dilation, case.groups, case.padding_mode)
    return convolution_plan("test", case.ndim, case.input, case.weight, *options, LAYOUTS[case.ndim][0]).geometry


def problem(case, operation="forward", algorithm="auto", dtype=SINGLE):
    return methods.problem_of(operation, geometry(case), dtype, algorithm)


@pytest.fixture
def ran(monkeypatch):
    """The names of the methods that were planned, in order, each time they are looked up."""
    names = []
    original = table.plan_of

    def plan_of(problem):
        plan = original(problem)
        names.append(plan.method.name)
        return plan

    plan_of.cache_clear = original.cache_clear
    monkeypatch.setattr(table, "plan_of", plan_of)
    methods.forget_plans()
    yield names
    methods.forget_plans()


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", methods.OPERATIONS)
def test_every_method_has_its_protocol(operation):
    every = methods.METHODS[operation]
    assert len({method.name for method in every}) == len(every)
    for method in every:
        assert method.algorithm in ALGORITHMS[1:]
        assert FINITE_OPERANDS <= method.values <= ANY_VALUES
        assert method.__class__.__doc__


@pytest.mark.parametrize("operation", methods.OPERATIONS)
def test_the_last_applies_always_to_any_values(operation):
    last = methods.METHODS[operation][-1]
    assert last.values == ANY_VALUES
    for case, dtype in itertools.product(CASES, (SINGLE, DOUBLE)):
        assert last.why_not(problem(case, operation, dtype=dtype)) is None


@pytest.mark.parametrize("operation", methods.OPERATIONS)
def test_reasons_are_sentences(operation):
    """Of one line, each; and every method but the last is refused for some shape."""
    refused = set()
    for case in CASES:
        asked = problem(case, operation)
        for method in methods.METHODS[operation]:
            reason = method.why_not(asked)
            if reason is not None:
                refused.add(method.name)
                assert len(reason) > 5
                assert len(f"    not {method.name}: {reason}") <= 120
                assert "\n" not in reason
                assert reason[-1] not in " .,"
        assert methods.choose(asked).why(asked)
    always = {"implicit_gemm", "loops"}
    assert refused >= {method.name for method in methods.METHODS[operation]} - always


@pytest.mark.parametrize("operation", methods.OPERATIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_that_applies_and_pays(operation, algorithm):
    for case in CASES[::3]:
        asked = problem(case, operation, algorithm)
        some = [m for m in methods.METHODS[operation] if algorithm in ("auto", m.algorithm)]
        if all(method.cannot(asked) for method in some):
            with pytest.raises(ValueError, match="no method for"):
                methods.choose(asked)
            continue
        chosen = methods.choose(asked)
        assert chosen in some
        if algorithm in ("auto", "direct"):
            assert [m.why_not(asked) is None for m in some].index(True) == some.index(chosen)


def test_the_choice_is_that_of_the_plan():
    for operation, case in itertools.product(methods.OPERATIONS, CASES[::5]):
        asked = problem(case, operation)
        plan = methods.plan_of(asked)
        assert isinstance(plan, Plan)
        assert plan.method is methods.choose(asked)
        assert plan.workspace > 0
        assert plan.method.flops(asked) > 0
        assert 0 < plan.method.error(asked) < 1e-5


class Doubling(Method):
    """Twice the right answer, so that it is seen."""

    name = "doubling"

    def cannot(self, problem):
        return None if problem.geometry.kernel_size == (1, 3, 3) else "the kernel is not 3 x 3"

    def plan(self, problem):
        return DoublingPlan(self, problem)


class DoublingPlan(Plan):
    def __init__(self, method, problem):
        self.method, self.problem = method, problem

    @property
    def workspace(self):
        return 12345

    def run(self, operands, bias, relu, packed, out):
        table.run(self.problem._replace(after="doubling"), operands, bias, relu, packed, out)
        out *= 2
        return None


@pytest.fixture
def doubling(monkeypatch):
    method = Doubling()
    method.values = FINITE_OPERANDS
    monkeypatch.setitem(methods.METHODS, "forward", (method, *methods.METHODS["forward"]))
    methods.forget_plans()
    yield
    methods.forget_plans()


def test_a_method_at_the_front_is_found_run_and_explained(doubling, rng):
    case = BY_NAME["3x3_same"]
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (case.input, case.weight))
    with methods.only("implicit_gemm"):
        right = fc.conv2d(x, w, padding="same")
    np.testing.assert_array_equal(fc.conv2d(x, w, padding="same"), 2 * right)
    np.testing.assert_array_equal(fc.Conv2d(w, padding="same")(x), 2 * right)
    e = fc.explain(case.input, case.weight, padding="same")
    assert (e.method, e.algorithm, e.workspace) == ("doubling", "direct", 12345)
    assert "  method     doubling" in str(e).splitlines()
    assert e.other_methods["implicit_gemm"] == "applies, but doubling comes first"
    assert fc.explain((1, 2, 5, 5), (3, 2, 2, 2)).other_methods["doubling"] == "the kernel is not 3 x 3"


# ---------------------------------------------------------------------------------------------------------------------
# Problems and plans
# ---------------------------------------------------------------------------------------------------------------------


def test_a_problem_is_integers():
    """As many for every problem, and others for every other problem."""
    seen = {}
    for case, operation, dtype in itertools.product(CASES, methods.OPERATIONS, (SINGLE, DOUBLE)):
        asked = problem(case, operation, dtype=dtype)
        for each in (asked, asked._replace(kept=True), asked._replace(add=True), asked._replace(workers=7),
                     asked._replace(input=asked.input[::-1]), asked._replace(algorithm="direct")):  # fmt: skip
            flat = each.integers()
            assert all(type(n) is int for n in flat)
            assert seen.setdefault(flat, each) == each
    assert len({len(flat) for flat in seen}) == 1


def test_equal_problems_are_one_plan():
    case = BY_NAME["3x3_same"]
    one, other = problem(case), methods.problem_of("forward", geometry(case), np.dtype("f4"))
    assert one is not other
    assert methods.plan_of(one) is methods.plan_of(other)


def test_functions_prepared_and_explain_share_the_plans(rng):
    """One cache: a plan made for one of them is found by the others."""
    case = BY_NAME["both_channels"]
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (case.input, case.weight))
    methods.forget_plans()
    fc.explain(case.input, case.weight, padding=1)
    planned = methods.plan_of.cache_info()
    fc.conv2d(x, w, padding=1)
    fc.conv2d(x, w, padding=1, activation="relu")
    found = methods.plan_of.cache_info()
    assert found.misses == planned.misses
    assert found.hits == planned.hits + 2
    op = fc.Conv2d(w, padding=1)
    op(x)
    op(x)
    assert methods.plan_of.cache_info().misses == found.misses + 1  # weights that are kept are packed beforehand


def test_the_cache_is_bounded():
    assert 0 < methods.plan_of.cache_info().maxsize <= 4096


@pytest.mark.parametrize("names", [("implicit_gemm",), ("channels_last", "implicit_gemm")])
def test_only(names, ran, rng):
    case = BY_NAME["both_channels"]
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (case.input, case.weight))
    fc.conv2d(x, w, padding=1)
    with methods.only(*names):
        fc.conv2d(x, w, padding=1)
        dx = fc.conv2d_input_grad(x.shape, w, fc.conv2d(x, w, padding=1), padding=1)
    assert ran[1:3] == ["implicit_gemm"] * 2
    assert ran[3] == "phased"
    assert dx.shape == x.shape
    with methods.only("depthwise"), pytest.raises(ValueError, match="no method for"):
        fc.conv2d(x, w, padding=1)
    fc.conv2d(x, w, padding=1)
    assert ran[-1] == ran[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is handed on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "name"), [("winograd", "winograd"), ("fft", "fft")])
def test_samples_are_handed_on(algorithm, name, ran, rng):
    """Neighbouring ones together, to the direct sum, and no others."""
    x, w = rng.standard_normal((5, 8, 9, 9)).astype(np.float32), rng.standard_normal((7, 8, 3, 3)).astype(np.float32)
    right = fc.conv2d(x, w, algorithm=algorithm)
    x[1, 0, 0, 0], x[2, 3, 4, 5], x[4, 7, 8, 8] = np.nan, np.inf, -np.inf
    ran.clear()
    y = fc.conv2d(x, w, algorithm=algorithm)
    assert ran[0] == name
    assert len(ran) == 3  # samples 1 and 2, and 4
    assert set(ran[1:]) <= {"small_planes", "implicit_gemm"}
    np.testing.assert_array_equal(y, np.where([[[[k]]] for k in (1, 0, 0, 1, 0)], right, fc.conv2d(
        x, w, algorithm="direct"
    )))  # fmt: skip


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_gradient_is_handed_on_as_far_as_it_must(accumulate, ran, rng):
    """From Winograd to the products of phases, which find weights that are not finite, and from there to the loops."""
    w, dy = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((7, 8, 3, 3), (2, 7, 9, 9)))
    w[3, 2, 1, 1] = np.inf
    start = np.ones((2, 8, 9, 9), np.float32)
    options = {"padding": 1, "out": start.copy(), "accumulate": True} if accumulate else {"padding": 1}
    dx = fc.conv2d_input_grad(start.shape, w, dy, algorithm="winograd", **options)
    assert [key for key, _ in itertools.groupby(ran)][-3:] == ["winograd", "phased", "loops"]
    finite = np.where(np.isinf(w), 0, w)
    right = fc.conv2d_input_grad(start.shape, finite, dy, padding=1, algorithm="direct") + np.float32(accumulate)
    others = [c for c in range(8) if c != 2]
    np.testing.assert_array_equal(dx[:, others], right[:, others])
    assert not np.isfinite(dx[:, 2]).all()


def test_small_planes_hand_on_infinite_weights(ran, rng):
    x, w = rng.standard_normal((8, 64, 7, 7)).astype(np.float32), rng.standard_normal((64, 64, 3, 3)).astype(np.float32)
    for op in (lambda: fc.conv2d(x, w, padding=1, algorithm="direct"), lambda: fc.Conv2d(w, padding=1)(x)):
        w[5, 6, 0, 0] = 1
        op()
        first = ran.pop()
        w[5, 6, 0, 0] = np.inf
        y = op()
        assert np.isnan(y[:, 5]).any()
        assert np.isfinite(np.delete(y, 5, axis=1)).all()
        if first == "small_planes":
            assert ran[0] == "small_planes"
            assert ran[-1] in ("channels_last", "implicit_gemm")
        ran.clear()


def test_handing_on_comes_to_an_end():
    """A method hands on to others that can do with more values only."""
    for operation in methods.OPERATIONS:
        for method in methods.METHODS[operation]:
            asked = problem(BY_NAME["3x3_same"], operation)._replace(after=method.name)
            later = list(table.candidates(asked))
            assert all(other.values > method.values for other in later)
            assert later or method.values == ANY_VALUES
    names = {m.name for m in methods.METHODS["input_grad"] if m.values == FINITE_WEIGHTS}
    assert {"phased", "depthwise"} <= names


def test_runs_of_samples():
    found = list(table.runs_of_samples(np.array([True, True, False, True])))
    assert found == [(True, slice(0, 2)), (False, slice(2, 3)), (True, slice(3, 4))]
    assert list(table.runs_of_samples(np.array([False]))) == [(False, slice(0, 1))]


def test_entries_make_their_problems(monkeypatch, rng):
    """Strides are those of the arrays, in the places of input, weight and output."""
    asked = []
    monkeypatch.setattr(convolution, "run", lambda problem, operands, *rest: asked.append((problem, operands)))
    x, w = np.empty((2, 3, 5, 6), np.float32), np.empty((4, 3, 3, 3), np.float32)
    dy = np.empty((2, 3, 4, 4), np.float32).transpose(0, 3, 1, 2)
    fc.conv2d(x, w)
    fc.conv2d_weight_grad(x, w.shape, dy, out=np.empty_like(w), accumulate=True)
    fc.conv2d_input_grad(x.shape, w, dy, algorithm="direct")
    forward, weight_grad, input_grad = (problem for problem, _ in asked)
    assert [p.operation for p in (forward, weight_grad, input_grad)] == ["forward", "weight_grad", "input_grad"]
    assert [p.add for p in (forward, weight_grad, input_grad)] == [False, True, False]
    assert input_grad.algorithm == "direct"
    for p in (forward, weight_grad, input_grad):
        assert p.input[:2] == x.strides[:2]
        assert p.weight[:2] == w.strides[:2]
    assert weight_grad.output[:2] == input_grad.output[:2] == dy.strides[:2]
    assert [[a.shape[1] for a in operands] for _, operands in asked] == [[3, 3], [3, 4], [4, 3]]
