"""One operation, one name on both floors: the modules of fastconv.cpu and fastconv.cuda_kernels have the same entries.

The rule: every file of a floor is an operation, unless it is listed below as machinery with what it is for. The entries
of an operation are its public functions that run on the host: not those that begin with an underscore, and not compiled
ones (kernels, device functions, intrinsics), which may differ as the machines do. A file has its entries, their
arguments and the order of those on both floors.

The plain kernels are the same word for word: those of `cpu.loops` and those of the operations on CUDA have the same
names, arguments and comments, and the same statements but for what the machine makes different (`without_machine`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import textwrap
import tokenize
from pathlib import Path

import pytest

from fastconv import cpu, cuda_kernels
from fastconv.cpu import loops
from fastconv.cpu.jit import Kernel as CpuKernel
from fastconv.cuda_kernels import convolution, softmax_cross_entropy
from fastconv.cuda_kernels.jit import ELEMENTS
from fastconv.cuda_kernels.jit import Kernel as CudaKernel

MACHINERY = {
    cpu: {
        "__init__": "says what the folder is",
        "channels_last": "the same sum of arrays whose channels are neighbours in memory",
        "compiler": "Numba's compiler, as the CPU kernels use it",
        "depthwise": "the kernels of convolution for one input channel a group",
        "depthwise_channels": "the same with channels in the lanes of the vectors",
        "depthwise_channels_tasks": "its tasks",
        "depthwise_planes": "the same with whole planes, read where they lie",
        "depthwise_tasks": "the tasks of depthwise",
        "elementary": "exp, log and tanh in vectors; CUDA has its own",
        "fft": "convolution by Fourier transforms; CUDA has the direct sum only",
        "fft_bodies": "its tasks",
        "half": "float16 in vectors; CUDA has instructions for it",
        "jit": "how kernels are compiled",
        "loops": "the plain kernels, those of convolution and softmax_cross_entropy on CUDA; compared below",
        "padding": "adds up the gradient of a padded input",
        "phases": "what of an input gradient is computed together",
        "problem": "what a method of convolution is asked and answers",
        "reals": "arrays of any floating-point type as float32 or float64",
        "records": "parameters with names, as Python and compiled code see them",
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
        "depthwise": "convolution of few channels in a group",
        "depthwise_kernels": "its kernels",
        "implicit_gemm": "the faster kernels of convolution, as matrix products",
        "implicit_gemm_tables": "the offsets of what they multiply",
        "implicit_gemm_weight_grad": "their weight gradient",
        "intrinsics": "instructions that Numba has no name for",
        "jit": "how kernels are compiled",
        "lender": "NumPy functions that numba-cuda names and NumPy has no more",
        "offsets": "offsets of 32 bits",
        "partial_sums": "gradients that are summed in parts",
        "position_sums": "sums over the positions of a loss, by blocks",
        "row_groups": "the groups of threads and the vectors of softmax_rows",
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


# ---------------------------------------------------------------------------------------------------------------------
# The plain kernels
# ---------------------------------------------------------------------------------------------------------------------

# Arguments that a kernel has on CUDA alone.
CUDA_ONLY = {
    "bad_position": "the host does not see labels that are on the device, which has a record of the first bad one",
    "first_position": "the same",
}
# Kernels whose statements differ.
OTHER_SUM = {"bias_grad_kernel": "one chain in float64, which CUDA has few units for: there row by row"}


def plain_kernels() -> dict[str, tuple[str, str]]:
    """The source of each plain kernel, on the CPU and on CUDA."""
    sources: list[dict[str, str]] = []
    for modules, kind in (([loops], CpuKernel), ([convolution, softmax_cross_entropy], CudaKernel)):
        sources.append({})
        for name, value in (item for module in modules for item in vars(module).items()):
            if isinstance(value, kind):
                function = value.function if kind is CpuKernel else value.factory(ELEMENTS["float32"])
                assert function.__name__ == name
                sources[-1][name] = textwrap.dedent(inspect.getsource(function))
    first, second = sources
    assert first.keys() == second.keys()
    return {name: (first[name], second[name]) for name in first}


class _WithoutMachine(ast.NodeTransformer):
    def visit_Call(self, node):
        """Conversions between what is stored and what is computed with; how the machine shares out the elements."""
        self.generic_visit(node)
        match ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]:
            case ("load" | "store" | "real"), [_]:
                return node.args[0]
            case "np.int64", ["index"]:  # unsigned in a prange loop
                return node.args[0]
            case "prange", [_]:
                return ast.Call(ast.Name("each"), node.args, [])
            case "range", ["cuda.grid(1)", _, "cuda.gridsize(1)"]:
                return ast.Call(ast.Name("each"), [node.args[1]], [])
        return node

    def visit_Assign(self, node):
        """The type of the elements and its constants, which the CPU takes from an array and CUDA from a closure."""
        names = {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
        if names <= {"real", "zero", "one", "low", "nan"}:
            return None
        return self.generic_visit(node)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        return node.value if node.attr == "real" else node

    def visit_Name(self, node):
        return ast.Constant(0) if node.id == "zero" else node

    def visit_If(self, node):
        """The record of bad labels, and the one thread that does what one thread can."""
        self.generic_visit(node)
        test = ast.unparse(node.test)
        return None if test == "bad_position.size > 0" else node.body if test == "cuda.grid(1) == 0" else node


def without_machine(source: str) -> str:
    """The statements of a kernel, without what its machine asks for, as text."""
    function = ast.parse(source).body[0]
    function.decorator_list = []
    function.args.args = [argument for argument in function.args.args if argument.arg not in CUDA_ONLY]
    return ast.unparse(ast.fix_missing_locations(_WithoutMachine().visit(function)))


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [c for c in found if "fmt: skip" not in c and "labels that the host does not see" not in c]


def arguments_of(source: str) -> list[str]:
    return [argument.arg for argument in ast.parse(source).body[0].args.args]


def part(module, name: str) -> str:
    """The source of the function of this name that the kernels of a module call."""
    source = Path(module.__file__).read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    (found,) = [ast.get_source_segment(source, node) for node in functions if node.name == name]
    return textwrap.dedent(found)


PLAIN = plain_kernels()


def test_plain_kernels_are_there():
    assert set(PLAIN) == {
        "forward_kernel", "weight_grad_kernel", "input_grad_kernel", "bias_grad_kernel", "cross_entropy_kernel",
        "label_weight_kernel", "partial_sum_kernel", "sum_kernel", "softmax_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_kernels_stand_under_the_decorator(name):
    """Literally: ``@njit(parallel=True, ...)`` is the line above, but for the one that is the work of one thread."""
    *_, decorator = ast.parse(PLAIN[name][0]).body[0].decorator_list
    parallel = "" if name == "sum_kernel" else "parallel=True, "
    assert ast.unparse(decorator) == f"njit({parallel}error_model='numpy', nogil=True)"


@pytest.mark.parametrize("name", PLAIN)
def test_plain_kernels_take_the_same_arguments(name):
    on_cpu, on_cuda = map(arguments_of, PLAIN[name])
    assert on_cpu == [argument for argument in on_cuda if argument not in CUDA_ONLY]


def test_exceptions_of_plain_kernels_are_there():
    """What is excepted above must not be so for nothing."""
    assert set(CUDA_ONLY) == {a for _, on_cuda in PLAIN.values() for a in arguments_of(on_cuda)} & set(CUDA_ONLY)
    assert all(without_machine(PLAIN[name][0]) != without_machine(PLAIN[name][1]) for name in OTHER_SUM)


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in OTHER_SUM])
def test_plain_kernels_are_the_same_word_for_word(name):
    on_cpu, on_cuda = PLAIN[name]
    assert without_machine(on_cpu) == without_machine(on_cuda)


@pytest.mark.parametrize(
    ("name", "module"),
    [("_position", convolution), ("_place", softmax_cross_entropy), ("capped", softmax_cross_entropy),
     ("coefficient", softmax_cross_entropy)],
)  # fmt: skip
def test_what_plain_kernels_call_is_the_same(name, module):
    assert without_machine(part(loops, name)) == without_machine(part(module, name))


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in OTHER_SUM])
def test_comments_of_plain_kernels_are_the_same(name):
    on_cpu, on_cuda = PLAIN[name]
    assert [c for c in comments(on_cpu) if not c.startswith("# .real")] == comments(on_cuda)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("* value", "+ value"),  # another sum
        ("total.real < 0", "total.real <= 0"),
        ("w[o, c, i, j, k]", "w[o, c, k, j, i]"),
        ("prange(y.size)", "prange(y.size - 1)"),
        ("xd >= 0 and xh >= 0", "xh >= 0"),
        ("relu,", "rectify,"),
    ],
)
def test_a_change_of_one_side_is_found(old, new):
    on_cpu, on_cuda = PLAIN["forward_kernel"]
    assert old in on_cpu
    assert without_machine(on_cpu.replace(old, new)) != without_machine(on_cuda)
