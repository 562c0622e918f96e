"""One operation, one name on both floors: the modules of fastconv.cpu and fastconv.cuda_kernels have the same entries.

The rule: every file of a floor is an operation, unless it is listed below as machinery with what it is for. The entries
of an operation are its public functions that run on the host: not those that begin with an underscore, and not compiled
ones (kernels, device functions, intrinsics), which may differ as the machines do. A file has its entries, their
arguments and the order of those on both floors.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from fastconv import cpu, cuda_kernels

MACHINERY = {
    cpu: {
        "__init__": "says what the folder is",
        "channels_last": "the same sum of arrays whose channels are neighbours in memory",
        "compiler": "Numba's compiler, as the CPU kernels use it",
        "contraction": "the names of implicit_gemm under its name before",
        "depthwise": "the kernels of convolution for one input channel a group",
        "depthwise_channels": "the same with channels in the lanes of the vectors",
        "depthwise_planes": "the same with whole planes, read where they lie",
        "elementary": "exp, log and tanh in vectors; CUDA has its own",
        "fft": "convolution by Fourier transforms; CUDA has the direct sum only",
        "fft_bodies": "its loops",
        "half": "float16 in vectors; CUDA has instructions for it",
        "jit": "how kernels are compiled",
        "records": "blocks of parameters with names",
        "simd": "vector instructions",
        "small_planes": "the same sum without the products with zeros around small planes",
        "tasks": "runs an operation as tasks on the threads",
        "threads": "the threading layer",
        "winograd": "convolution by Winograd's transforms; CUDA has the direct sum only",
        "winograd_gradient": "the same for the weight gradient",
    },
    cuda_kernels: {
        "__init__": "says what the folder is",
        "_cuda": "device arrays and launches",
        "channel_sums": "the faster kernel of the gradient of a bias",
        "depthwise": "the kernels of convolution for few channels in a group",
        "implicit_gemm": "the faster kernels of convolution, as matrix products",
        "intrinsics": "instructions that Numba has no name for",
        "jit": "how kernels are compiled",
        "softmax_rows": "the faster kernels of softmax_cross_entropy, for rows of classes",
        "tiles": "matrix products in registers and shared memory",
    },
}
FLOORS = list(MACHINERY)


def files(floor) -> set[str]:
    return {path.stem for path in Path(floor.__path__[0]).glob("*.py")}


def operations(floor) -> set[str]:
    return files(floor) - set(MACHINERY[floor])


def entries(module) -> dict[str, list[str]]:
    """The arguments of each entry function, in order."""
    return {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def differences(first: dict[str, list[str]], second: dict[str, list[str]]) -> list[str]:
    found = [f"{name} is on one side only" for name in sorted(first.keys() ^ second.keys())]
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            found.append(f"{name} takes {first[name]} and {second[name]}")
    return found


def test_machinery_is_there():
    """A file that has gone must not keep its exception."""
    for floor in FLOORS:
        assert set(MACHINERY[floor]) <= files(floor)


def test_same_operations():
    assert operations(cpu) == operations(cuda_kernels)
    assert {"convolution", "softmax_cross_entropy"} <= operations(cpu)


@pytest.mark.parametrize("operation", sorted(operations(cpu) | operations(cuda_kernels)))
def test_same_entries(operation):
    sides = [entries(importlib.import_module(f"{floor.__name__}.{operation}")) for floor in FLOORS]
    assert sides[0], "an operation without an entry"
    assert differences(*sides) == []


@pytest.mark.parametrize("operation", sorted(operations(cpu)))
def test_each_operation_has_its_test_file(operation):
    assert list(Path(__file__).parents[1].glob(f"*/test_{operation}.py"))


def test_entries_of_convolution():
    """The rule finds what it should: neither nothing nor everything."""
    assert set(entries(importlib.import_module("fastconv.cpu.convolution"))) == {
        "forward", "weight_grad", "input_grad", "bias_grad",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({"f": ["x"]}, {"f": ["x"]}, []),
        ({"f": ["x"], "g": []}, {"f": ["x"]}, ["g is on one side only"]),
        ({"f": ["x", "y"]}, {"f": ["y", "x"]}, ["f takes ['x', 'y'] and ['y', 'x']"]),
        ({"f": ["x"]}, {"f": ["x", "y"]}, ["f takes ['x'] and ['x', 'y']"]),
    ],
)
def test_the_comparison_can_fail(first, second, found):
    assert differences(first, second) == found
