"""Instructions that Numba has no name for, each with the Python that stands for it in a simulation.

All PTX and LLVM of the project's kernels is here. Indices count elements of a one-dimensional array; they are unsigned
or known not to be negative, and nothing wraps around. What needs sm_80 says so.

An emulation is called with the simulator of the block first (`tests/block_simulator.py`): it reads and writes vectors
through the arrays' `read` and `write`, which check bounds and alignment, and knows the lanes of a warp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from ._cuda import SIMULATOR

__all__ = [
    "copy16_async",
    "copy_commit",
    "copy_wait_all",
    "copy_wait_all_but_one",
    "emulation_of",
    "load1_where",
    "load2_where",
    "load4",
    "load4_where",
    "load_matrices",
    "load_matrices_transposed",
    "mma_bfloat16",
    "mma_float16",
    "mma_tf32",
    "pack_bfloat16",
    "pack_float16",
    "round_tf32",
    "store2",
    "store4",
    "store_pair",
    "u32",
    "unpack_bfloat16",
    "unpack_float16",
]

_emulations: dict[int, Callable[..., Any]] = {}


def emulation_of(value: Any) -> Callable[..., Any] | None:
    """What stands for an instruction of this module in a simulation; None for any other value."""
    return _emulations.get(id(value))


class _Placeholder:
    """An instruction where there is no compiler: Numba's simulator, which cannot run the kernels that use it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name


def _instruction(emulation: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make an instruction of its Numba typing function, which returns signature and code generator."""

    def make(typing: Callable[..., Any]) -> Any:
        if SIMULATOR:
            made: Any = _Placeholder(typing.__name__)
        else:
            from numba.cuda.extending import intrinsic

            made = intrinsic(typing)
        _emulations[id(made)] = emulation
        return made

    return make


# ---------------------------------------------------------------------------------------------------------------------
# 32-bit integers
# ---------------------------------------------------------------------------------------------------------------------

# Numba computes with 64-bit integers; where a result is taken to 32 bits at once, the compiler computes with 32.
u32 = np.uint32


_emulations[id(u32)] = lambda simulator, value: int(value) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------------------
# Code generation
# ---------------------------------------------------------------------------------------------------------------------

if not SIMULATOR:
    from llvmlite import ir

    _F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index_type: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, value=array).data
    if index_type.bitwidth < 64:
        index = (builder.sext if index_type.signed else builder.zext)(index, _I64)
    return builder.gep(data, [index], inbounds=True)


def _address(builder: Any, pointer: Any, space: int) -> Any:
    """The pointer as the number that PTX takes: 32 bits in shared memory (space 3), 64 in global memory (space 1)."""
    there = builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(space))
    return builder.ptrtoint(there, _I32 if space == 3 else _I64)


def _tuple(context: Any, builder: Any, sig: Any, values: list[Any]) -> Any:
    return context.make_tuple(builder, sig.return_type, values)


def _assembly(
    builder: Any, text: str, constraints: str, result: Any, operands: list[Any], effects: bool = False,
    collective: bool = False,
) -> Any:  # fmt: skip
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    code = ir.InlineAsm(kind, text, ",".join(filter(None, [constraints, "~{memory}" * effects])), side_effect=effects)
    return builder.call(code, operands, attrs=("convergent",) if collective else ())


# ---------------------------------------------------------------------------------------------------------------------
# Vectors: 128-bit loads and stores of global or shared memory
# ---------------------------------------------------------------------------------------------------------------------


def _load4(simulator, array, index):
    return tuple(array.read(int(index), 4))


@_instruction(_load4)
def load4(typing_context, array, index):
    """Four consecutive elements of 32 or 64 bits, the first at a multiple of four."""
    sig = types.UniTuple(array.dtype, 4)(array, index)

    def generate(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        vector = builder.load(builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, 4).as_pointer()))
        vector.align = 16
        return _tuple(context, builder, sig, [builder.extract_element(vector, _I32(i)) for i in range(4)])

    return sig, generate


def _vector_store(count: int) -> Callable[..., Any]:
    def generate(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        kind = ir.VectorType(pointer.type.pointee, count)
        vector = ir.Constant(kind, ir.Undefined)
        for i in range(count):
            vector = builder.insert_element(vector, args[2 + i], _I32(i))
        # 64-bit elements are two vectors of 16 bytes, and aligned to that
        builder.store(vector, builder.bitcast(pointer, kind.as_pointer())).align = min(4 * count, 16)
        return context.get_dummy_value()

    return generate


def _store4(simulator, array, index, a, b, c, d):
    array.write(int(index), [a, b, c, d])


@_instruction(_store4)
def store4(typing_context, array, index, a, b, c, d):
    """Four elements of 32 or 64 bits, the first at a multiple of four."""
    t = array.dtype
    return types.void(array, index, t, t, t, t), _vector_store(4)


def _store2(simulator, array, index, a, b):
    array.write(int(index), [a, b])


@_instruction(_store2)
def store2(typing_context, array, index, a, b):
    """Two elements of 32 bits, the first at a multiple of two."""
    return types.void(array, index, array.dtype, array.dtype), _vector_store(2)


def _store_pair(simulator, array, index, word):
    array.write(int(index), [word & 0xFFFF, word >> 16])


@_instruction(_store_pair)
def store_pair(typing_context, array, index, word):
    """A word as two elements of 16 bits, the first, its lower half, at a multiple of two."""

    def generate(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        builder.store(args[2], builder.bitcast(pointer, _I32.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(array, index, types.uint32), generate


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of 16-bit numbers in a 32-bit word, the first in the lower half (sm_80)
# ---------------------------------------------------------------------------------------------------------------------


def _unpacked(dtype: str, word: Any) -> tuple[Any, Any]:
    low, high = np.uint32(word & 0xFFFF), np.uint32(word >> 16)
    if dtype == "bfloat16":
        return (low << np.uint32(16)).view(np.float32), (high << np.uint32(16)).view(np.float32)
    return np.float32(np.uint16(low).view(np.float16)), np.float32(np.uint16(high).view(np.float16))


def _bits16(dtype: str, value: Any) -> int:
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return int(np.float32(value).astype(np.float16).view(np.uint16))
    bits = int(np.float32(value).view(np.uint32))
    if np.isnan(value):
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


def _unpacking(text: str) -> Callable[..., Any]:
    def typing(typing_context, word):
        def generate(context, builder, sig, args):
            kind = ir.LiteralStructType([_F32, _F32])
            pair = _assembly(builder, text, "=f,=f,r", kind, list(args))
            return _tuple(context, builder, sig, [builder.extract_value(pair, i) for i in range(2)])

        return types.UniTuple(types.float32, 2)(types.uint32), generate

    return typing


unpack_float16 = _instruction(lambda simulator, word: _unpacked("float16", int(word)))(
    _unpacking("{ .reg .b16 %l, %h; mov.b32 {%l, %h}, $2; cvt.f32.f16 $0, %l; cvt.f32.f16 $1, %h; }")
)
unpack_bfloat16 = _instruction(lambda simulator, word: _unpacked("bfloat16", int(word)))(
    _unpacking("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }")
)


def _packing(text: str) -> Callable[..., Any]:
    def typing(typing_context, low, high):
        def generate(context, builder, sig, args):
            return _assembly(builder, text, "=r,f,f", _I32, list(args))

        return types.uint32(types.float32, types.float32), generate

    return typing


pack_float16 = _instruction(lambda simulator, low, high: _bits16("float16", low) | _bits16("float16", high) << 16)(
    _packing("cvt.rn.f16x2.f32 $0, $2, $1;")
)
pack_bfloat16 = _instruction(lambda simulator, low, high: _bits16("bfloat16", low) | _bits16("bfloat16", high) << 16)(
    _packing("cvt.rn.bf16x2.f32 $0, $2, $1;")
)


def _round_tf32(simulator, bits):
    bits = int(bits)
    return bits if bits & 0x7F800000 == 0x7F800000 else (bits + 0x1000) & 0xFFFFE000


@_instruction(_round_tf32)
def round_tf32(typing_context, bits):
    """The bits of a float32 rounded to the 10 bits of mantissa of tf32, ties away from zero."""

    def generate(context, builder, sig, args):
        value = builder.bitcast(args[0], _F32)
        return _assembly(builder, "cvt.rna.tf32.f32 $0, $1;", "=r,f", _I32, [value])

    return types.uint32(types.uint32), generate


# ---------------------------------------------------------------------------------------------------------------------
# Asynchronous copies from global to shared memory (sm_80)
# ---------------------------------------------------------------------------------------------------------------------


def _copy16_async(simulator, shared, to, source, start, valid):
    count = 16 // shared.dtype.itemsize
    to, start, valid = int(to), int(start), bool(valid)

    def values():
        if not valid:
            return np.zeros(count, shared.dtype)
        return source.read(start, 16 // source.dtype.itemsize).view(shared.dtype)

    shared.issue(to, count)
    if simulator.landing == "early":
        shared.array[to : to + count] = values()
    simulator.thread.issued.append(lambda: shared.land(to, values()))


@_instruction(_copy16_async)
def copy16_async(typing_context, shared, to, source, start, valid):
    """16 bytes into `shared`, from `source`, or zeros where not `valid`: the source is then not read."""
    sig = types.void(shared, to, source, start, types.boolean)

    def generate(context, builder, sig, args):
        there = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
        here = _pointer(context, builder, sig.args[2], args[2], sig.args[3], args[3])
        size = builder.select(builder.trunc(args[4], ir.IntType(1)), _I32(16), _I32(0))
        operands = [_address(builder, there, 3), _address(builder, here, 1), size]
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        _assembly(builder, text, "r,l,r", ir.VoidType(), operands, effects=True)
        return context.get_dummy_value()

    return sig, generate


def _bare(text: str) -> Callable[..., Any]:
    def typing(typing_context):
        def generate(context, builder, sig, args):
            _assembly(builder, text, "", ir.VoidType(), [], effects=True)
            return context.get_dummy_value()

        return types.void(), generate

    return typing


def _copy_commit(simulator):
    thread = simulator.thread
    thread.groups.append(thread.issued)
    thread.issued = []


def _waiting(remaining: int) -> Callable[..., None]:
    def wait(simulator):
        groups = simulator.thread.groups
        while len(groups) > remaining:
            for land in groups.pop(0):
                land()

    return wait


# A copy belongs to the group that its thread commits next; a thread waits for its own groups, oldest first, and sees
# what other threads copied after a barrier.
copy_commit = _instruction(_copy_commit)(_bare("cp.async.commit_group;"))
copy_wait_all = _instruction(_waiting(0))(_bare("cp.async.wait_group 0;"))
copy_wait_all_but_one = _instruction(_waiting(1))(_bare("cp.async.wait_group 1;"))


# ---------------------------------------------------------------------------------------------------------------------
# Tensor cores (sm_80). Fragments as in the PTX manual, "Matrix fragments for mma.m16n8k8 / m16n8k16"
# ---------------------------------------------------------------------------------------------------------------------


def _matrices(simulator, shared, row, transposed):
    """Lane i of the warp names row i % 8 of matrix i // 8; each row is 8 numbers of 16 bits, 4 words."""

    def combine(rows):
        matrices = np.array(rows, np.uint32).view(np.uint16).reshape(4, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 2, 1)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32)
        return [tuple(int(w) for w in words[:, lane]) for lane in range(32)]

    return simulator.collective("load_matrices", shared.read(int(row), 4), combine)


def _matrix_load(modifier: str) -> Callable[..., Any]:
    def typing(typing_context, shared, row):
        sig = types.UniTuple(types.uint32, 4)(shared, row)

        def generate(context, builder, sig, args):
            pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
            text = f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
            kind = ir.LiteralStructType([_I32] * 4)
            operands = [_address(builder, pointer, 3)]
            words = _assembly(builder, text, "=r,=r,=r,=r,r", kind, operands, effects=True, collective=True)
            return _tuple(context, builder, sig, [builder.extract_value(words, i) for i in range(4)])

        return sig, generate

    return typing


# Four 8x8 matrices of 16-bit numbers from an array of 32-bit words, lane i giving the start of row i % 8 of matrix
# i // 8. A lane gets the pair (2*(lane % 4), +1) of row lane // 4 of each; of the transposed matrices in the second.
load_matrices = _instruction(lambda simulator, shared, row: _matrices(simulator, shared, row, False))(_matrix_load(""))
load_matrices_transposed = _instruction(lambda simulator, shared, row: _matrices(simulator, shared, row, True))(
    _matrix_load(".trans")
)


def _values(kind: str, words: np.ndarray) -> np.ndarray:
    """The numbers in words of 32 bits, those of one word along a last axis."""
    if kind == "tf32":  # the lower 13 bits are not read
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = words[..., None].view(np.uint16)
    if kind == "float16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _mma(kind: str) -> Callable[..., Any]:
    """D = A B + C for a warp, A 16 x k, B k x 8, C and D 16 x 8 of float32; k = 8 for tf32, 16 for the 16-bit types."""
    depth = 8 if kind == "tf32" else 16
    pack = 1 if kind == "tf32" else 2
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    # [lane, word, number of the word] of A and B, [lane, number] of C and D
    row_a = (group[:, None] + [0, 8, 0, 8])[:, :, None]
    term_a = (place[:, None] * pack + np.array([0, 0, depth // 2, depth // 2]))[:, :, None] + np.arange(pack)
    term_b = (place[:, None] * pack + np.array([0, depth // 2]))[:, :, None] + np.arange(pack)
    column_b = group[:, None, None]
    row_c, column_c = group[:, None] + [0, 0, 8, 8], 2 * place[:, None] + [0, 1, 0, 1]

    def combine(given):
        a, b, c = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))
        a[row_a, term_a] = _values(kind, np.array([words for words, _, _ in given], np.uint32))
        b[term_b, column_b] = _values(kind, np.array([words for _, words, _ in given], np.uint32))
        c[row_c, column_c] = [sums for _, _, sums in given]
        with np.errstate(invalid="ignore", over="ignore"):
            d = (a @ b + c).astype(np.float32)
        return [tuple(sums) for sums in d[row_c, column_c]]

    def emulate(simulator, a, b, c):
        return simulator.collective(f"mma {kind}", (a, b, c), combine)

    return emulate


def _mma_typing(text: str) -> Callable[..., Any]:
    def typing(typing_context, a, b, c):
        word, real = types.uint32, types.float32
        sig = types.UniTuple(real, 4)(types.UniTuple(word, 4), types.UniTuple(word, 2), types.UniTuple(real, 4))

        def generate(context, builder, sig, args):
            operands = [builder.extract_value(args[m], i) for m, n in ((0, 4), (1, 2), (2, 4)) for i in range(n)]
            places = "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13}"
            constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
            kind = ir.LiteralStructType([_F32] * 4)
            sums = _assembly(builder, f"{text} {places};", constraints, kind, operands, collective=True)
            return _tuple(context, builder, sig, [builder.extract_value(sums, i) for i in range(4)])

        return sig, generate

    return typing


mma_tf32 = _instruction(_mma("tf32"))(_mma_typing("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"))
mma_float16 = _instruction(_mma("float16"))(_mma_typing("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"))
mma_bfloat16 = _instruction(_mma("bfloat16"))(_mma_typing("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"))


# ---------------------------------------------------------------------------------------------------------------------
# Guarded loads of what no kernel writes meanwhile: predicated, where the compiler would branch around a load
# ---------------------------------------------------------------------------------------------------------------------


def _guarded_load(count: int) -> Callable[[Callable[..., Any]], Any]:
    """An instruction ``(array, index, valid)``: `count` elements of one vector, or zeros where not `valid`."""

    def emulate(simulator, array, index, valid):
        return tuple(array.read(int(index), count)) if valid else (array.dtype.type(0),) * count

    def typing(typing_context, array, index, valid):
        sig = types.UniTuple(array.dtype, count)(array, index, types.boolean)
        kind, constraint, zero = {
            types.float32: ("f32", "f", "0f00000000"), types.float64: ("f64", "d", "0d0000000000000000"),
            types.uint32: ("u32", "r", "0"), types.uint16: ("u16", "h", "0"),
        }[array.dtype]  # fmt: skip
        places = ", ".join(f"${i}" for i in range(count))
        vector, target = ("", places) if count == 1 else (f".v{count}", f"{{{places}}}")
        text = (
            f"{{ .reg .pred %p; setp.ne.u32 %p, ${count + 1}, 0; "
            + " ".join(f"mov.{kind} ${i}, {zero};" for i in range(count))
            + f" @%p ld.global.nc{vector}.{kind} {target}, [${count}]; }}"
        )
        constraints = ",".join([f"=&{constraint}"] * count + ["l", "r"])  # &: written before the address is read

        def generate(context, builder, sig, args):
            pointer = _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1])
            valid = builder.zext(builder.trunc(args[2], ir.IntType(1)), _I32)
            one = pointer.type.pointee
            result = one if count == 1 else ir.LiteralStructType([one] * count)
            loaded = _assembly(builder, text, constraints, result, [_address(builder, pointer, 1), valid])
            values = [loaded] if count == 1 else [builder.extract_value(loaded, i) for i in range(count)]
            return _tuple(context, builder, sig, values)

        return sig, generate

    return _instruction(emulate)(typing)


load1_where = _guarded_load(1)
load2_where = _guarded_load(2)
load4_where = _guarded_load(4)
