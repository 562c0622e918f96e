"""The compiler of task bodies: what it leaves out changes no result."""

import gc

import numba
import numpy as np
import pytest
from numba.core.errors import TypingError

from fastconv.cpu import tasks
from fastconv.cpu.compiler import BodyCompiler, without_collector
from fastconv.cpu.jit import helper
from fastconv.cpu.records import Integer, Reals
from fastconv.cpu.vector import softmax


class Squares(tasks.Parameters):
    result: Reals
    limit: Integer


@helper
def _largest_square(limit):
    root = 0
    while (root + 1) * (root + 1) <= limit:
        root += 1
    return root * root


@helper
def _two_squares(limit):
    square = _largest_square(limit)
    return square, _largest_square(limit - square)


@tasks.body(Squares)
def _square(task, worker, p, real):
    first, second = _two_squares(p.limit + task)
    p.result[task] = first + second / 2


def test_helpers_are_compiled_in_the_body_alone(monkeypatch, tmp_path):
    # An empty cache: where the body was found in it, there would be no helpers to look at.
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    dtype = np.dtype(np.float64)
    result = np.zeros(20)
    parameters = Squares.of(result=tasks.data_address(result), limit=50)
    tasks.run(_square, dtype, 20, parameters, 64, 0)
    squares = np.arange(9) ** 2
    for task in range(20):
        first = squares[squares <= 50 + task].max()
        assert result[task] == first + squares[squares <= 50 + task - first].max() / 2
    (compiled,) = _two_squares.overloads.values()
    assert compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name) == 0


@pytest.mark.parametrize("of", [(7, 2), (2.5, np.uint8(3))], ids=str)
def test_operators_have_the_types_that_numba_gives_them(of):
    def every(a, b):
        return a + b, a - 1, a * b, a / b, a // b, a % b, a < b, -b, min(a, b), b + a

    expected = numba.njit(error_model="numpy")(every)
    result = numba.njit(error_model="numpy", pipeline_class=BodyCompiler)(every)
    for _ in range(2):  # the second time from what the first found out
        result = numba.njit(error_model="numpy", pipeline_class=BodyCompiler)(every)
        assert result(*of) == expected(*of)
        assert result.nopython_signatures == expected.nopython_signatures


def test_what_has_no_type_is_an_error_every_time():
    def sum_of(a, b):
        return a + b

    for _ in range(2):
        with pytest.raises(TypingError):
            numba.njit(pipeline_class=BodyCompiler)(sum_of)(1, "one")


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_afterwards(on):
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(RuntimeError, match="False"), without_collector():
            raise RuntimeError(gc.isenabled())
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


def test_generated_functions_of_other_code_are_its_own():
    """One that another library has too would be called there, which may be too far away for the call."""

    @numba.njit("float64(CPointer(float64), int64)")
    def largest(x, n):
        return softmax.span_maximum(x, n)

    (code,) = largest.inspect_llvm().values()
    (name,) = (line for line in code.splitlines() if line.startswith("define") and "span_maximum" in line)
    assert name.startswith("define internal ")
