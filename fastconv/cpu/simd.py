"""All LLVM of the package: the vector tile of this machine, the microkernels, and vector copies.

Plain scalar loops do not keep a block of accumulators in vector registers; the functions here do, because they are
written as LLVM vectors. They are generated for any element type, number of lanes, rows and vectors, as functions of
their own (noinline, internal), and reach Numba code as intrinsics on typed pointers, which carry the element type.

A *pointer* here is Numba's ``CPointer(float32)`` or ``CPointer(float64)``: indexing it neither wraps around nor checks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))


def _i64(n: int) -> ir.Constant:
    return ir.Constant(_I64, n)


# ---------------------------------------------------------------------------------------------------------------------
# The tile
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How the microkernels use the vector registers for one element type."""

    lanes: int  # elements in a vector
    vectors: int  # vectors in a row of the panel: `lanes * vectors` columns
    rows: int  # most rows of accumulators: rows * vectors + vectors + 1 registers
    gradient_vectors: int  # the same two for `accumulate_outer`, whose rows have an address each
    gradient_rows: int
    fma: bool  # without the instruction, llvm.fma is a library call, hundreds of times slower
    packs: bool  # can the microkernel pack the panel as it multiplies? That takes masks, and registers to spare
    masks: bool = False  # are vectors loaded and stored as fast with a mask as without?
    few: int = 0  # so many columns or fewer take less time by `contract_few` than as a vector of columns
    pixels: int = 0  # most pixels of an output row that `contract_pixels` takes; 0: it is not used

    @property
    def columns(self) -> int:
        return self.lanes * self.vectors

    @property
    def few_pitch(self) -> int:
        """Elements between the columns of `contract_few`'s sums: the rows of a tile in whole vectors."""
        return -(-self.rows // self.lanes) * self.lanes


@functools.cache
def _features() -> tuple[str, frozenset[str]]:
    """Architecture and features that Numba compiles for (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included)."""
    from numba.core.registry import cpu_target

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.partition("-")[0], frozenset(f[1:] for f in features.split(",") if f.startswith("+"))


@functools.cache
def tile(bits: int) -> Tile:
    """The tile of this machine for elements of 32 or 64 bits.

    14 x 2 vectors of AVX-512 take 28 + 2 + 1 of 32 registers, 6 x 2 of AVX and SSE 12 + 2 + 1 of 16, 8 x 3 of NEON
    24 + 3 + 1 of 32. A multiply-add has a latency of 4 and two are started a cycle, so 8 accumulators would do; more
    rows and columns mean fewer loads for each. Up to 4 columns take as long by `contract_few` as 4 of 14 rows of a
    vector: an image of 7 x 7 has 49 pixels, three vectors and one pixel. The tile of `contract_pixels` is of the same
    rows and vectors.
    """
    architecture, features = _features()
    if architecture in ("aarch64", "arm64"):
        return Tile(128 // bits, 3, 8, 3, 6, True, False)
    if "avx512f" in features:
        return Tile(512 // bits, 2, 14, 4, 6, True, True, True, 4, 14)
    if "avx" in features:
        return Tile(256 // bits, 2, 6, 2, 6, "fma" in features, False, pixels=6)
    return Tile(128 // bits, 2, 6, 2, 6, "fma" in features, False)


def _element(pointer: types.CPointer) -> ir.Type:
    return ir.FloatType() if pointer.dtype == types.float32 else ir.DoubleType()


def _tile_of(pointer: types.CPointer) -> Tile:
    return tile(pointer.dtype.bitwidth)


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


def _load(b: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType) -> ir.Value:
    value = b.load(b.bitcast(pointer, vector.as_pointer()))
    value.align = 4
    return value


def _store(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    b.store(value, b.bitcast(pointer, value.type.as_pointer())).align = 4


def _splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(scalar.type, lanes)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    )


def _opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The value, of which LLVM does not know where it comes from."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)


def _multiply_add(b: ir.IRBuilder, module: ir.Module, fma: bool, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    if not fma:
        return b.fadd(b.fmul(x, y), z)
    kind = "f32" if isinstance(x.type.element, ir.FloatType) else "f64"
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(x.type, [x.type] * 3), f"llvm.fma.v{x.type.count}{kind}"
    )
    return b.call(function, [x, y, z])


def _prefetch(b: ir.IRBuilder, module: ir.Module, pointer: ir.Value, write: bool = False, locality: int = 3) -> None:
    """Ask for the cache line at `pointer`, which need not be an address that can be read.

    `locality` is LLVM's: 3 is into all caches, 2 is not into the nearest one.
    """
    byte = _I8.as_pointer()
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    b.call(function, [b.bitcast(pointer, byte), *(ir.Constant(_I32, n) for n in (int(write), locality, 1))])


def _internal(module: ir.Module, name: str, arguments: list[ir.Type]) -> tuple[ir.Function, bool]:
    """A function of its own in this module, and whether it still needs a body.

    Modules that are linked to the code of a body share it. In those of other functions it must be internal: a call of a
    function that another library has too goes to that one, which may be too far away for the call.
    """
    if name in module.globals:
        return module.globals[name], False
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr" if getattr(module, "shares_functions", False) else "internal"
    for attribute in ("noinline", "nounwind", "optsize"):  # what is to be unrolled is written so
        function.attributes.add(attribute)
    # What does not fit into the registers is kept on the stack, which may begin anywhere: half of the vectors then lie
    # across two cache lines, and rows of a filter of 15 x 15 took 1.7 times as long in every second process.
    function.attributes.alignstack = 64
    return function, True


class _Loop:
    """A counted loop `for k in range(start, stop)` that carries values: with start < stop, at least one turn."""

    def __init__(self, b: ir.IRBuilder, name: str, stop: ir.Value, carried: list[ir.Value]) -> None:
        self.b, self.stop, self.before = b, stop, b.block
        self.head, self.done = b.append_basic_block(name), b.append_basic_block(name + ".done")
        b.branch(self.head)
        b.position_at_end(self.head)
        self.k = b.phi(_I64)
        self.k.add_incoming(_i64(0), self.before)
        self.values = [b.phi(v.type) for v in carried]
        for phi, v in zip(self.values, carried, strict=True):
            phi.add_incoming(v, self.before)

    def close(self, values: list[ir.Value]) -> None:
        b = self.b
        following = b.add(self.k, _i64(1))
        self.k.add_incoming(following, b.block)
        for phi, v in zip(self.values, values, strict=True):
            phi.add_incoming(v, b.block)
        b.cbranch(b.icmp_signed("<", following, self.stop), self.head, self.done)
        b.position_at_end(self.done)


def _switch(b: ir.IRBuilder, value: ir.Value, cases: dict[int, ir.Function], arguments: list[ir.Value]) -> None:
    """Call cases[value](*arguments)."""
    end = b.append_basic_block("called")
    default = b.append_basic_block("no_case")
    switch = b.switch(value, default)
    for number, function in cases.items():
        block = b.append_basic_block(f"case_{number}")
        switch.add_case(_i64(number), block)
        b.position_at_end(block)
        b.call(function, arguments)
        b.branch(end)
    b.position_at_end(default)
    b.branch(end)
    b.position_at_end(end)


# ---------------------------------------------------------------------------------------------------------------------
# The microkernel
# ---------------------------------------------------------------------------------------------------------------------

ADD, BIAS, RELU = 1, 2, 4  # what a microkernel does as it stores, in this order


def _where(b: ir.IRBuilder, condition: ir.Value, values: list[ir.Value], change) -> list[ir.Value]:
    """`change(values)` if the condition holds, else the values."""
    before, inside, after = b.block, b.append_basic_block("then"), b.append_basic_block("after")
    b.cbranch(condition, inside, after)
    b.position_at_end(inside)
    changed = change(values)
    inside = b.block
    b.branch(after)
    b.position_at_end(after)
    result = []
    for old, new in zip(values, changed, strict=True):
        phi = b.phi(old.type)
        phi.add_incoming(old, before)
        phi.add_incoming(new, inside)
        result.append(phi)
    return result


def _finish_sums(
    b: ir.IRBuilder, flags: ir.Value, sums: list[ir.Value], targets: Callable[[], list[ir.Value]],
    biases: Callable[[], list[ir.Value]] | None,
) -> list[ir.Value]:  # fmt: skip
    """The sums as the flags ADD, BIAS and RELU want them, the last two only if there are `biases`.

    `targets` loads what the output holds and `biases` the bias, both for each of the sums.
    """

    def is_set(flag: int) -> ir.Value:
        return b.icmp_signed("!=", b.and_(flags, _i64(flag)), _i64(0))

    def add(loaded: Callable[[], list[ir.Value]]) -> Callable[[list[ir.Value]], list[ir.Value]]:
        return lambda values: [b.fadd(value, other) for value, other in zip(values, loaded(), strict=True)]

    def replace_negative(values: list[ir.Value]) -> list[ir.Value]:
        zero = ir.Constant(values[0].type, [0.0] * values[0].type.count)
        return [b.select(b.fcmp_ordered("<", value, zero), zero, value) for value in values]  # nan stays nan

    values = _where(b, is_set(ADD), sums, add(targets))
    if biases:
        values = _where(b, is_set(BIAS), values, add(biases))
        values = _where(b, is_set(RELU), values, replace_negative)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Pointers and constants
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def at(typingctx, like, address):
    """The pointer to `address`, an integer, of the type of the pointer `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return like(like, types.int64), codegen


@intrinsic
def keep_apart(typingctx):
    """First in a helper of a body: it is not inlined, and its loops are neither vectorised nor unrolled by LLVM.

    For everything but the innermost loops, which are written as vectors here: without it a first convolution takes
    0.8 s longer, and later ones as long.
    """

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def offset(typingctx, pointer, elements):
    """The pointer `elements` further on."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


def _tile_constant(field: str):
    @intrinsic
    def constant(typingctx, like):
        def codegen(context, builder, sig, args):
            return _i64(int(getattr(_tile_of(sig.args[0]), field)))

        return types.int64(like), codegen

    return constant


lanes = _tile_constant("lanes")
columns = _tile_constant("columns")
tile_rows = _tile_constant("rows")
gradient_rows = _tile_constant("gradient_rows")
gradient_vectors = _tile_constant("gradient_vectors")


@intrinsic
def fetch_add(typingctx, pointer, amount):
    """Add to the integer at `pointer` as one step that no other thread can interrupt; return what it held."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


# ---------------------------------------------------------------------------------------------------------------------
# Vector copies
# ---------------------------------------------------------------------------------------------------------------------


def _copier(vectors_of):
    """An intrinsic that copies a fixed number of vectors: all loads before all stores."""

    @intrinsic
    def copy(typingctx, target, source):
        def codegen(context, builder, sig, args):
            element, t = _element(sig.args[0]), _tile_of(sig.args[0])
            count, width = vectors_of(t)
            vector = ir.VectorType(element, width)
            values = [_load(builder, builder.gep(args[1], [_i64(j * width)]), vector) for j in range(count)]
            for j, value in enumerate(values):
                _store(builder, value, builder.gep(args[0], [_i64(j * width)]))
            return context.get_dummy_value()

        return types.void(target, target), codegen

    return copy


copy_vector = _copier(lambda t: (1, t.lanes))


def _masked_load(
    b: ir.IRBuilder, module: ir.Module, pointer: ir.Value, bits: ir.Value, otherwise: ir.Value
) -> ir.Value:
    """Load the lanes whose bit is set; the others keep their value, and their memory is not touched."""
    vector = otherwise.type
    n, kind = vector.count, "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    mask = ir.VectorType(_I1, n)
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(vector, [vector.as_pointer(), _I32, mask, vector]), f"llvm.masked.load.v{n}{kind}.p0"
    )
    chosen = b.bitcast(b.trunc(bits, ir.IntType(n)), mask)
    return b.call(function, [b.bitcast(pointer, vector.as_pointer()), ir.Constant(_I32, 4), chosen, otherwise])


def _lane_bits(b: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """The bits of lanes 0 .. count of a vector; none if count is negative."""
    count = b.select(b.icmp_signed("<", count, _i64(0)), _i64(0), count)
    count = b.select(b.icmp_signed(">", count, _i64(lanes)), _i64(lanes), count)
    return b.sub(b.shl(_i64(1), count), _i64(1))


def _load_up_to(
    b: ir.IRBuilder, module: ir.Module, pointer: ir.Value, vector: ir.VectorType, count: ir.Value
) -> ir.Value:
    """The first `count` elements of a vector (none if negative), zeros after; no other memory is read."""
    bits = _lane_bits(b, count, vector.count)
    return _masked_load(b, module, pointer, bits, ir.Constant(vector, [0.0] * vector.count))


def _separator(phases: int):
    """An intrinsic that separates elements by their place modulo `phases` (a power of two)."""

    @intrinsic
    def separate(typingctx, target, place, source, count):
        def codegen(context, builder, sig, args):
            element, t = _element(sig.args[0]), _tile_of(sig.args[0])
            pointer = element.as_pointer()
            function, new = _internal(
                builder.module, f"fastconv_separate_{phases}_{element}", [pointer, _I64.as_pointer(), pointer, _I64]
            )
            if new:
                _write_separate(builder.module, function, ir.VectorType(element, t.lanes), phases)
            builder.call(function, args)
            return context.get_dummy_value()

        return types.void(target, types.CPointer(types.int64), target, types.int64), codegen

    return separate


def _write_separate(module: ir.Module, function: ir.Function, vector: ir.VectorType, phases: int) -> None:
    target, place, source, count = function.args
    n = vector.count
    b = ir.IRBuilder(function.append_basic_block("entry"))
    whole, rest = b.sdiv(count, _i64(n * phases)), b.srem(count, _i64(n * phases))
    places = [b.gep(target, [b.load(b.gep(place, [_i64(r)]))]) for r in range(phases)]

    def place_of(block: ir.Value) -> list[ir.Value]:
        return [b.gep(at, [b.mul(block, _i64(n))]) for at in places]

    blocks, tail, last, end = (b.append_basic_block(name) for name in ("blocks", "tail", "last", "end"))
    b.cbranch(b.icmp_signed(">", whole, _i64(0)), blocks, tail)
    b.position_at_end(blocks)
    loop = _Loop(b, "loop", whole, [])
    start = b.gep(source, [b.mul(loop.k, _i64(n * phases))])
    values = [_load(b, b.gep(start, [_i64(j * n)]), vector) for j in range(phases)]
    for value, at in zip(_unweave(b, values), place_of(loop.k), strict=True):
        _store(b, value, at)
    loop.close([])
    b.branch(tail)
    b.position_at_end(tail)
    b.cbranch(b.icmp_signed(">", rest, _i64(0)), last, end)
    b.position_at_end(last)
    start = b.gep(source, [b.mul(whole, _i64(n * phases))])
    values = [
        _load_up_to(b, module, b.gep(start, [_i64(j * n)]), vector, b.sub(rest, _i64(j * n))) for j in range(phases)
    ]
    for r, (value, at) in enumerate(zip(_unweave(b, values), place_of(whole), strict=True)):
        mask = _lane_mask(b, b.sdiv(b.add(rest, _i64(phases - 1 - r)), _i64(phases)), n)
        _store_lanes(b, module, value, at, mask)
    b.branch(end)
    b.position_at_end(end)
    b.ret_void()


def _unweave(b: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """A power of two of vectors, so that each holds the elements of one place modulo their number."""
    if len(vectors) == 1:
        return vectors
    pairs = [_separate(b, vectors[k], vectors[k + 1]) for k in range(0, len(vectors), 2)]
    even, odd = _unweave(b, [p[0] for p in pairs]), _unweave(b, [p[1] for p in pairs])
    return [v for pair in zip(even, odd, strict=True) for v in pair]


def _interleave(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x0 y0 x1 y1 ..., as two vectors."""
    n = x.type.count
    low, high = ([k // 2 + start + k % 2 * n for k in range(n)] for start in (0, n // 2))
    return tuple(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, n), lanes)) for lanes in (low, high))


def _separate(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The elements at even and at odd places of x followed by y."""
    n = x.type.count
    even, odd = ([2 * k + start for k in range(n)] for start in (0, 1))
    return tuple(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, n), lanes)) for lanes in (even, odd))


separate_2, separate_4 = _separator(2), _separator(4)
separate_2.__doc__ = "target[place[k % 2] + k // 2] = source[k] for k < count, and similarly separate_4."


def _copy_block_function(module: ir.Module, element: ir.Type, n: int) -> ir.Function:
    pointer = element.as_pointer()
    function, new = _internal(module, f"fastconv_copy_{element}", [pointer, _I64, pointer, _I64, _I64, _I64])
    if not new:
        return function
    target, target_pitch, source, source_pitch, rows, count = function.args
    vector = ir.VectorType(element, n)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    whole, rest = b.sdiv(count, _i64(n)), b.srem(count, _i64(n))
    mask, end_of_whole = _lane_mask(b, rest, n), b.mul(whole, _i64(n))
    row = _Loop(b, "rows", rows, [target, source])
    to, come_from = row.values
    vectors, tail, last, end = (b.append_basic_block(name) for name in ("vectors", "tail", "last", "end"))
    b.cbranch(b.icmp_signed(">", whole, _i64(0)), vectors, tail)
    b.position_at_end(vectors)
    loop = _Loop(b, "loop", whole, [])
    at = b.mul(loop.k, _i64(n))
    _store(b, _load(b, b.gep(come_from, [at]), vector), b.gep(to, [at]))
    loop.close([])
    b.branch(tail)
    b.position_at_end(tail)
    b.cbranch(b.icmp_signed(">", rest, _i64(0)), last, end)
    b.position_at_end(last)
    value = _load_lanes(b, module, b.gep(come_from, [end_of_whole]), mask, vector)
    _store_lanes(b, module, value, b.gep(to, [end_of_whole]), mask)
    b.branch(end)
    b.position_at_end(end)
    row.close([b.gep(to, [target_pitch]), b.gep(come_from, [source_pitch])])
    b.ret_void()
    return function


@intrinsic
def fetch_span(typingctx, source, elements):
    """Ask for `elements` elements from `source` on, which are read soon. They need not exist."""

    def codegen(context, builder, sig, args):
        element = _element(sig.args[0])
        module, line = builder.module, 16 if isinstance(element, ir.FloatType) else 8
        function, new = _internal(module, f"fastconv_fetch_span_{element}", [element.as_pointer(), _I64])
        if new:
            source, elements = function.args
            b = ir.IRBuilder(function.append_basic_block("entry"))
            loop = _Loop(b, "lines", b.sdiv(b.add(elements, _i64(line - 1)), _i64(line)), [])
            _prefetch(b, module, b.gep(source, [b.mul(loop.k, _i64(line))]))
            loop.close([])
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    return types.void(source, types.int64), codegen


@intrinsic
def copy_span(typingctx, target, source, count):
    """Copy `count` elements, neither reading nor writing beyond them."""

    def codegen(context, builder, sig, args):
        function = _copy_block_function(builder.module, _element(sig.args[0]), _tile_of(sig.args[0]).lanes)
        target, source, count = args
        builder.call(function, [target, _i64(0), source, _i64(0), _i64(1), count])
        return context.get_dummy_value()

    return types.void(target, target, types.int64), codegen


@intrinsic
def copy_block(typingctx, target, target_pitch, source, source_pitch, rows, count):
    """Copy `rows` >= 1 rows of `count` elements, neither reading nor writing beyond them."""

    def codegen(context, builder, sig, args):
        function = _copy_block_function(builder.module, _element(sig.args[0]), _tile_of(sig.args[0]).lanes)
        builder.call(function, args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(target, i, target, i, i, i), codegen


@intrinsic
def copy_every_second(typingctx, target, target_pitch, source, source_pitch, rows, count):
    """target[r, i] = source[r, 2 * i] for r < rows, i < count, neither reading nor writing beyond; rows, count >= 1."""

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        module, pointer = builder.module, element.as_pointer()
        function, new = _internal(
            module, f"fastconv_copy_every_second_{element}", [pointer, _I64, pointer, _I64, _I64, _I64]
        )
        if new:
            target, target_pitch, source, source_pitch, rows, count = function.args
            vector = ir.VectorType(element, t.lanes)
            b = ir.IRBuilder(function.append_basic_block("entry"))
            loop = _Loop(b, "vectors", b.sdiv(b.add(count, _i64(t.lanes - 1)), _i64(t.lanes)), [])
            first = b.mul(loop.k, _i64(t.lanes))
            left = b.sub(b.mul(b.sub(count, first), _i64(2)), _i64(1))
            masks = [_lane_mask(b, b.sub(left, _i64(j)), t.lanes) for j in (0, t.lanes)]
            mask = _lane_mask(b, b.sub(count, first), t.lanes)
            row = _Loop(b, "rows", rows, [b.gep(target, [first]), b.gep(source, [b.mul(first, _i64(2))])])
            to, come_from = row.values
            values = [
                _load_lanes(b, module, b.gep(come_from, [_i64(j * t.lanes)]), masks[j], vector) for j in range(2)
            ]
            _store_lanes(b, module, _separate(b, *values)[0], to, mask)
            row.close([b.gep(to, [target_pitch]), b.gep(come_from, [source_pitch])])
            loop.close([])
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(target, i, target, i, i, i), codegen


@intrinsic
def fill_zero(typingctx, target, elements):
    """Write `elements` zeros."""

    def codegen(context, builder, sig, args):
        size = builder.mul(args[1], _i64(sig.args[0].dtype.bitwidth // 8))
        cgutils.memset(builder, args[0], size, 0)
        return context.get_dummy_value()

    return types.void(target, types.int64), codegen


@intrinsic
def spread_every_second(typingctx, target, target_pitch, source, source_pitch, rows, count):
    """target[r, 2 * i] = source[r, i] for r < rows, i < count; nothing else is read or written; rows, count >= 1."""

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        module, pointer, n = builder.module, element.as_pointer(), t.lanes
        function, new = _internal(
            module, f"fastconv_spread_every_second_{element}", [pointer, _I64, pointer, _I64, _I64, _I64]
        )
        if new:
            target, target_pitch, source, source_pitch, rows, count = function.args
            vector = ir.VectorType(element, n)
            b = ir.IRBuilder(function.append_basic_block("entry"))
            loop = _Loop(b, "vectors", b.sdiv(b.add(count, _i64(n - 1)), _i64(n)), [])
            first = b.mul(loop.k, _i64(n))
            left = b.mul(b.sub(count, first), _i64(2))
            even = ir.Constant(ir.VectorType(_I1, n), [1 - k % 2 for k in range(n)])
            masks = [b.and_(_lane_mask(b, b.sub(left, _i64(j * n)), n), even) for j in range(2)]
            read = _lane_mask(b, b.sub(count, first), n)
            row = _Loop(b, "rows", rows, [b.gep(target, [b.mul(first, _i64(2))]), b.gep(source, [first])])
            to, come_from = row.values
            value = _load_lanes(b, module, come_from, read, vector)
            for j, part in enumerate(_interleave(b, value, value)):
                _store_lanes(b, module, part, b.gep(to, [_i64(j * n)]), masks[j])
            row.close([b.gep(to, [target_pitch]), b.gep(come_from, [source_pitch])])
            loop.close([])
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(target, i, target, i, i, i), codegen


def _transpose_vectors(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """As many vectors as they have lanes, as the rows of a matrix, transposed; of fewer each block of as many lanes."""
    rows, n = list(rows), rows[0].type.count

    def pick(x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, n), lanes))

    step = len(rows) // 2
    while step:  # exchange the off-diagonal blocks of size `step` within each pair of blocks
        for i in range(len(rows)):
            if not i & step:
                x, y = rows[i], rows[i + step]
                rows[i] = pick(x, y, [k if not k & step else n + k - step for k in range(n)])
                rows[i + step] = pick(x, y, [k + step if not k & step else n + k for k in range(n)])
        step //= 2
    return rows


def _transpose_four(
    b: ir.IRBuilder, module: ir.Module, element: ir.Type, n: int, arguments: Sequence[ir.Value]
) -> None:
    """`transpose_block` of n rows and at most four columns, or the other way round, in vectors of four: returns then.

    Images of three channels are made of such blocks, and small groups. All n vectors would take three times as long.
    """
    target, target_pitch, source, source_pitch, rows, columns = arguments
    vector, four, blocks = ir.VectorType(element, n), ir.VectorType(element, 4), n // 4

    def select(value: ir.Value, other: ir.Value, lanes: Sequence[int]) -> ir.Value:
        return b.shuffle_vector(value, other, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))

    def masks(count: ir.Value) -> list[ir.Value]:
        every = ir.IntType(n)
        bits = [
            b.select(b.icmp_signed("<", _i64(i), count), ir.Constant(every, -1), ir.Constant(every, 0))
            for i in range(4)
        ]
        return [b.bitcast(each, ir.VectorType(_I1, n)) for each in bits]

    def place(pointer: ir.Value, pitch: ir.Value, row: int) -> ir.Value:
        return b.gep(pointer, [b.mul(pitch, _i64(row))])

    def begin(long: ir.Value, short: ir.Value) -> ir.Block:
        """Continue for blocks of n by at most four; where to go on for others."""
        inside, otherwise = b.append_basic_block("four"), b.append_basic_block("more")
        fits = b.and_(b.icmp_signed("==", long, _i64(n)), b.icmp_signed("<=", short, _i64(4)))
        b.cbranch(fits, inside, otherwise)
        b.position_at_end(inside)
        return otherwise

    otherwise = begin(rows, columns)
    mask = _lane_mask(b, columns, 4)
    loaded = [_load_lanes(b, module, place(source, source_pitch, i), mask, four) for i in range(n)]
    joined = []
    for q in range(4):
        parts = loaded[q::4]
        while len(parts) > 1:
            lanes = range(2 * parts[0].type.count)
            parts = [select(x, y, lanes) for x, y in zip(parts[::2], parts[1::2], strict=True)]
        joined += parts
    for k, (value, of_row) in enumerate(zip(_transpose_vectors(b, joined), masks(columns), strict=True)):
        _store_lanes(b, module, value, place(target, target_pitch, k), of_row)
    b.ret_void()
    b.position_at_end(otherwise)

    otherwise = begin(columns, rows)
    mask = _lane_mask(b, rows, 4)
    loaded = [
        _load_lanes(b, module, place(source, source_pitch, i), of_row, vector) for i, of_row in enumerate(masks(rows))
    ]
    for q, value in enumerate(_transpose_vectors(b, loaded)):
        for k in range(blocks):
            part = select(value, value, range(4 * k, 4 * k + 4))
            _store_lanes(b, module, part, place(target, target_pitch, 4 * k + q), mask)
    b.ret_void()
    b.position_at_end(otherwise)


@intrinsic
def transpose_block(typingctx, target, target_pitch, source, source_pitch, rows, columns):
    """target[k * target_pitch + i] = source[i * source_pitch + k] for i < rows, k < columns, both at most `lanes`.

    Nothing else is read or written.
    """

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        module, pointer, n = builder.module, element.as_pointer(), t.lanes
        function, new = _internal(
            module, f"fastconv_transpose_block_{element}", [pointer, _I64, pointer, _I64, _I64, _I64]
        )
        if new:
            target, target_pitch, source, source_pitch, rows, columns = function.args
            vector = ir.VectorType(element, n)
            b = ir.IRBuilder(function.append_basic_block("entry"))
            if n > 4:
                _transpose_four(b, module, element, n, function.args)

            def each(count: ir.Value, lanes: ir.Value, pointer: ir.Value, pitch: ir.Value):
                """Place and lanes of each row; none of those that do not exist, whose place is that of the last."""
                mask, last = _lane_mask(b, lanes, n), b.sub(count, _i64(1))
                none = ir.Constant(mask.type, [0] * n)
                for i in range(n):
                    exists = b.icmp_signed("<", _i64(i), count)
                    row = b.select(exists, _i64(i), last)
                    yield b.gep(pointer, [b.mul(pitch, row)]), b.select(exists, mask, none)

            values = [
                _load_lanes(b, module, place, mask, vector) for place, mask in each(rows, columns, source, source_pitch)
            ]
            places = each(columns, rows, target, target_pitch)
            for value, (place, mask) in zip(_transpose_vectors(b, values), places, strict=True):
                _store_lanes(b, module, value, place, mask)
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(target, i, target, i, i, i), codegen


def _load_transposed(
    b: ir.IRBuilder, module: ir.Module, vector: ir.VectorType, source: ir.Value, pitch: ir.Value, count: ir.Value,
    ahead: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """The transposed block of the `count` rows at `source`, the last of which stands for those that do not exist."""
    last = b.sub(count, _i64(1))
    rows = []
    for i in range(vector.count):
        row = b.select(b.icmp_signed("<", _i64(i), count), _i64(i), last)
        place = b.gep(source, [b.mul(pitch, row)])
        rows.append(_load(b, place, vector))
        _prefetch(b, module, b.gep(place, [ahead]))
    return _transpose_vectors(b, rows)


@intrinsic
def transpose_start(typingctx, target, source, source_pitch, columns):
    """target[k * lanes + i] = source[i * source_pitch + k] for i < lanes, k < columns, 0 < columns <= lanes.

    Nothing else is read; zeros are written for k from `columns` up to `lanes`.
    """

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        module, pointer, n = builder.module, element.as_pointer(), t.lanes
        function, new = _internal(module, f"fastconv_transpose_start_{element}", [pointer, pointer, _I64, _I64])
        if new:
            target, source, pitch, columns = function.args
            target.add_attribute("noalias")
            vector = ir.VectorType(element, n)
            b = ir.IRBuilder(function.append_basic_block("entry"))
            mask = _lane_mask(b, columns, n)
            rows = []
            for i in range(n):
                place = b.gep(source, [b.mul(pitch, _i64(i))])
                rows.append(_load_lanes(b, module, place, mask, vector))
                _prefetch(b, module, b.gep(place, [_i64(AHEAD * n)]))
            for k, row in enumerate(_transpose_vectors(b, rows)):
                _store(b, row, b.gep(target, [_i64(k * n)]))
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    return types.void(target, target, types.int64, types.int64), codegen


# Vectors: how far ahead of a stream of rows to fetch. Reading 512 x 512 kernels of 3 x 3 for the input gradient takes a
# third less time by it; 8 and 16 are no better.
AHEAD = 4


def _transposer(add: bool, meaning: str):
    @intrinsic
    def transpose(typingctx, target, target_pitch, source, source_pitch, rows, ahead):
        def codegen(context, builder, sig, args):
            element = _element(sig.args[0])
            function, new = _internal(
                builder.module, f"fastconv_transpose_{element}_{add}",
                [element.as_pointer(), _I64, element.as_pointer(), _I64, _I64, _I64],
            )  # fmt: skip
            if new:
                target, target_pitch, source, source_pitch, count, ahead = function.args
                vector = ir.VectorType(element, _tile_of(sig.args[0]).lanes)
                b = ir.IRBuilder(function.append_basic_block("entry"))
                rows_of_block = _load_transposed(b, builder.module, vector, source, source_pitch, count, ahead)
                for k, row in enumerate(rows_of_block):
                    place = b.gep(target, [b.mul(target_pitch, _i64(k))])
                    _store(b, b.fadd(_load(b, place, vector), row) if add else row, place)
                b.ret_void()
            builder.call(function, args)
            return context.get_dummy_value()

        i = types.int64
        return types.void(target, i, target, i, i, i), codegen

    transpose.__doc__ = meaning
    return transpose


transpose = _transposer(False, """target[k * target_pitch + i] = source[i * source_pitch + k], i, k < lanes.

Rows of the source from `rows` on are read as the last of these. Stores are whole vectors in the order of k, so where
target_pitch < lanes a store overwrites what the one before wrote too much. What lies `ahead` elements after each row is
fetched into the cache, wherever that is: rows far apart are too many streams for the processor to do it.
""")  # fmt: skip
transpose_add = _transposer(True, "The same, added to what the target holds.")


@intrinsic
def count_not_finite(typingctx, values, count):
    """A number that is not 0 if an infinity or nan is among the `count` vectors at `values`."""

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        vector = ir.VectorType(element, t.lanes)
        function, new = _internal(
            builder.module, f"fastconv_finite_{element}", [element.as_pointer(), _I64, _I64.as_pointer()]
        )
        if new:
            b = ir.IRBuilder(function.append_basic_block("entry"))
            zero = ir.Constant(vector, [0.0] * t.lanes)
            loop = _Loop(b, "vectors", function.args[1], [zero])
            value = _load(b, b.gep(function.args[0], [b.mul(loop.k, _i64(t.lanes))]), vector)
            total = b.fadd(loop.values[0], b.fmul(value, zero))  # 0 * inf and 0 * nan are nan, and stay
            loop.close([total])
            bits = b.bitcast(b.fcmp_unordered("uno", total, total), ir.IntType(t.lanes))
            b.store(b.zext(bits, _I64), function.args[2])
            b.ret_void()
        result = cgutils.alloca_once(builder, _I64)
        builder.call(function, [args[0], args[1], result])
        return builder.load(result)

    return types.int64(values, types.int64), codegen


@intrinsic
def address_of(typingctx, pointer):
    """The address a pointer holds, as an integer."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], _I64)

    return types.int64(pointer), codegen


# ---------------------------------------------------------------------------------------------------------------------
# Single-channel correlation: rows of a plane against the taps of one filter
# ---------------------------------------------------------------------------------------------------------------------


def _lane_mask(b: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """Lanes 0 .. count of a vector; none if count is negative."""
    return b.bitcast(b.trunc(_lane_bits(b, count, lanes), ir.IntType(lanes)), ir.VectorType(_I1, lanes))


def _load_lanes(
    b: ir.IRBuilder, module: ir.Module, pointer: ir.Value, mask: ir.Value, vector: ir.VectorType, otherwise: float = 0.0
) -> ir.Value:
    """The lanes of the mask; `otherwise` in the others, whose memory is not touched."""
    n, kind = vector.count, "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    function = cgutils.get_or_insert_function(
        module,
        ir.FunctionType(vector, [vector.as_pointer(), _I32, mask.type, vector]),
        f"llvm.masked.load.v{n}{kind}.p0",
    )
    rest = ir.Constant(vector, [otherwise] * n)
    return b.call(function, [b.bitcast(pointer, vector.as_pointer()), ir.Constant(_I32, 4), mask, rest])


def _store_lanes(b: ir.IRBuilder, module: ir.Module, value: ir.Value, pointer: ir.Value, mask: ir.Value) -> None:
    vector = value.type
    n, kind = vector.count, "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), _I32, mask.type]),
        f"llvm.masked.store.v{n}{kind}.p0",
    )  # fmt: skip
    b.call(function, [value, b.bitcast(pointer, vector.as_pointer()), ir.Constant(_I32, 4), mask])


# (rows of the filter at once, stride between the output rows): output rows that share input rows share their loads
SHARED_ROWS = ((1, 1), (2, 1), (3, 1), (5, 1), (7, 1), (3, 2), (5, 2), (7, 2))


def _row_shapes(t: Tile) -> list[tuple[int, int, int]]:
    """(lanes, vectors, rows) of blocks of the output, by width: an accumulator for each vector and row, and a splat for
    each row of the filter. Seven rows, since the planes of so many networks have 7, 14, 28, 56 and 112."""
    half = [(t.lanes // 2, 1, 7)] if t.lanes >= 8 else []
    if t.rows > 8:  # 32 registers
        return [*half, (t.lanes, 1, 7), (t.lanes, 2, 7), (t.lanes, 4, 4)]
    return [*half, (t.lanes, 1, 7), (t.lanes, 2, 4)]


def _correlate_rows_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int, rows: int, lanes: int, vectors: int
) -> ir.Function:
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_correlate_rows_{element}_{taps}_{stride}_{rows}_{lanes}x{vectors}",
        [pointer, _I64, pointer, _I64, pointer, _I64, _I64, table, _I64, _I64, _I64, element, element],
    )  # fmt: skip
    if not new:
        return function
    y, y_pitch, x, x_pitch, w, w_pitch, depth, offsets, blocks, columns, add, bias, least = function.args
    for p in (y, x, w):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, lanes)
    zero = ir.Constant(vector, [0.0] * lanes)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    bias, least = _splat(b, bias, lanes), _splat(b, least, lanes)
    # the last vector ends with the row, and may overlap the one before; a row below one vector has a mask instead
    places = [_i64(n * lanes) for n in range(vectors)]
    masked = vectors == 1
    if masked:
        mask = _lane_mask(b, columns, lanes)
    else:
        places[-1] = b.sub(columns, _i64(lanes))
        places[1:-1] = [b.select(b.icmp_signed("<", p, places[-1]), p, places[-1]) for p in places[1:-1]]

    block = _Loop(b, "blocks", blocks, [x, y])
    x_block, y_block = block.values
    targets = [b.gep(y_block, [b.add(b.mul(y_pitch, _i64(r)), place)]) for r in range(rows) for place in places]
    before, adding, start = b.block, b.append_basic_block("add"), b.append_basic_block("start")
    b.cbranch(b.icmp_signed("!=", add, _i64(0)), adding, start)
    b.position_at_end(adding)
    held = [_load_lanes(b, module, p, mask, vector) if masked else _load(b, p, vector) for p in targets]
    adding = b.block
    b.branch(start)
    b.position_at_end(start)
    sums = []
    for value in held:
        phi = b.phi(vector)
        phi.add_incoming(zero, before)
        phi.add_incoming(value, adding)
        sums.append(phi)

    starts = [b.gep(x_block, [b.mul(x_pitch, _i64(i))]) for i in range(stride * (rows - 1) + taps)]
    loop = _Loop(b, "taps", depth, sums)
    offset = b.load(b.gep(offsets, [loop.k]))
    weights = []
    for a in range(taps):
        weights.append(_splat(b, b.load(b.gep(w, [b.add(b.mul(w_pitch, _i64(a)), loop.k)])), lanes))
    sums = list(loop.values)
    for i, start in enumerate(starts):
        meeting = [(r, i - stride * r) for r in range(rows) if 0 <= i - stride * r < taps]
        if not meeting:
            continue
        at = b.gep(start, [offset])
        for n, place in enumerate(places):
            value = _load(b, b.gep(at, [place]), vector)
            for r, a in meeting:
                sums[r * vectors + n] = _multiply_add(b, module, t.fma, weights[a], value, sums[r * vectors + n])
    loop.close(sums)
    for value, target in zip(sums, targets, strict=True):
        value = b.fadd(value, bias)
        value = b.select(b.fcmp_ordered("<", value, least), least, value)  # nan stays nan
        if masked:
            _store_lanes(b, module, value, target, mask)
        else:
            _store(b, value, target)
    block.close([
        b.gep(x_block, [b.mul(x_pitch, _i64(rows * stride))]), b.gep(y_block, [b.mul(y_pitch, _i64(rows))])
    ])  # fmt: skip
    b.ret_void()
    return function


def _correlate_rows_dispatcher(module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int) -> ir.Function:
    """Cuts rows and columns into what the generated functions take."""
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_correlate_rows_{element}_{taps}_{stride}",
        [pointer, _I64, pointer, _I64, pointer, _I64, _I64, table, _I64, _I64, _I64, element, element],
    )  # fmt: skip
    if not new:
        return function
    y, y_pitch, x, x_pitch, w, w_pitch, depth, offsets, rows, columns, *end = function.args
    shapes = _row_shapes(t)
    b = ir.IRBuilder(function.append_basic_block("entry"))

    # as many vectors of a row at once as there are functions for, but two for the last ones, which may overlap
    most = shapes[-1][1]
    all_vectors = b.sdiv(b.add(columns, _i64(t.lanes - 1)), _i64(t.lanes))
    pieces = b.sdiv(b.add(all_vectors, _i64(most - 1)), _i64(most))
    piece = _Loop(b, "pieces", pieces, [_i64(0)])
    first = piece.values[0]
    left = b.sub(columns, first)
    almost = b.icmp_signed("<=", left, _i64((most + 1) * t.lanes))
    width = b.select(almost, _i64((most - 1) * t.lanes), _i64(most * t.lanes))
    width = b.select(b.icmp_signed("<=", left, _i64(most * t.lanes)), left, width)
    shape = _i64(len(shapes) - 1)
    for n in reversed(range(len(shapes) - 1)):
        fits = b.icmp_signed("<=", width, _i64(shapes[n][0] * shapes[n][1]))
        shape = b.select(fits, _i64(n), shape)

    # rows: as many blocks of the most as there are, then the rest
    done = _i64(0)
    for height in (None, 2, 1):
        if height is None:
            *others, most_rows = (_i64(most) for _, _, most in shapes)
            blocks = b.sdiv(rows, most_rows)
            for n, other in enumerate(others):
                here = b.icmp_signed("==", shape, _i64(n))
                most_rows = b.select(here, other, most_rows)
                blocks = b.select(here, b.sdiv(rows, other), blocks)  # by a constant: no division
        else:
            most_rows = _i64(height)
            blocks = b.sdiv(b.sub(rows, done), most_rows)
        call, after = b.append_basic_block("rows"), b.append_basic_block("rows_done")
        b.cbranch(b.icmp_signed(">", blocks, _i64(0)), call, after)
        b.position_at_end(call)
        arguments = [
            b.gep(y, [b.add(b.mul(done, y_pitch), first)]), y_pitch,
            b.gep(x, [b.add(b.mul(b.mul(done, _i64(stride)), x_pitch), first)]), x_pitch, w, w_pitch, depth, offsets,
            blocks, width, *end,
        ]  # fmt: skip
        cases = {
            n: _correlate_rows_function(module, element, t, taps, stride, height or most, lanes, vectors)
            for n, (lanes, vectors, most) in enumerate(shapes)
        }
        _switch(b, shape, cases, arguments)
        b.branch(after)
        b.position_at_end(after)
        done = b.add(done, b.mul(blocks, most_rows))
    piece.close([b.add(first, width)])
    b.ret_void()
    return function


def _literal_function(dispatcher, doc: str):
    """An intrinsic (taps, stride, arguments, real) for a C function of its own.

    (taps, stride), one of SHARED_ROWS, are literals; `arguments` points to the arguments, 8 bytes each, and the
    null pointer `real` carries the element type. They are loaded one by one, which is what atomic loads are: LLVM would
    load them as vectors, and such a load waits until the scalars just stored have left the store buffer. That was half
    of the time for a plane of 7 x 7.
    """

    @intrinsic(prefer_literal=True)
    def function(typingctx, taps, stride, arguments, real):
        def codegen(context, builder, sig, args):
            element, t = _element(real), _tile_of(real)
            inner = dispatcher(builder.module, element, t, taps.literal_value, stride.literal_value)
            values = []
            for n, kind in enumerate(inner.function_type.args):
                place = builder.gep(args[2], [_i64(n)])
                values.append(builder.load_atomic(builder.bitcast(place, kind.as_pointer()), "monotonic", 8))
            builder.call(inner, values)
            return context.get_dummy_value()

        return types.void(taps, stride, arguments, real), codegen

    function.__doc__ = doc
    return function


def _call_compiled(builder: ir.IRBuilder, address: ir.Value, arguments: list[ir.Value], pointer: ir.Type) -> None:
    """Call a C function compiled from one of `_literal_function`."""
    memory = cgutils.alloca_once(builder, ir.ArrayType(_I64, len(arguments)))
    first = builder.bitcast(memory, _I64.as_pointer())
    for n, value in enumerate(arguments):
        builder.store(value, builder.bitcast(builder.gep(first, [_i64(n)]), value.type.as_pointer()))
    kinds = [_I64, _I64, first.type, pointer]
    function = ir.FunctionType(ir.VoidType(), kinds).as_pointer()
    real = ir.Constant(pointer, None)
    builder.call(builder.inttoptr(address, function), [_i64(0), _i64(0), first, real])


correlate_rows = _literal_function(_correlate_rows_dispatcher, """What `call_rows` calls.""")


@intrinsic
def call_rows(typingctx, address, y, y_pitch, x, x_pitch, w, w_pitch, depth, offsets, rows, columns, flags, bias):
    """y[r, q] = sum over a < taps, k < depth of w[a, k] * x[stride * r + a, q + offsets[k]], r < rows, q < columns.

    `address` is that of a C function compiled from `correlate_rows` for this (taps, stride). The pitches are those of
    the first index; `flags` and `bias` (one number) are as for `contract`. depth, rows, columns >= 1.
    The sum, which begins with what y holds if ADD is set, is one chain of multiply-adds in the order of k, then a, for
    every element, whatever the rows and columns. Up to a vector of x beyond a row may be read, and is not used; nothing
    of y is touched but y[r, q].
    """
    i, table = types.int64, types.CPointer(types.int64)
    signature = types.void(i, y, i, y, i, y, i, i, table, i, i, i, y)

    def codegen(context, builder, sig, args):
        element = _element(sig.args[1])
        *between, flags, bias = args[1:]

        def is_set(flag: int) -> ir.Value:
            return builder.icmp_signed("!=", builder.and_(flags, _i64(flag)), _i64(0))

        some_number = builder.select(is_set(BIAS), bias, args[5])  # there may be no memory at `bias`
        bias = builder.select(is_set(BIAS), builder.load(some_number), ir.Constant(element, -0.0))
        least = builder.select(is_set(RELU), ir.Constant(element, 0.0), ir.Constant(element, -math.inf))
        arguments = [*between, builder.and_(flags, _i64(ADD)), bias, least]
        _call_compiled(builder, args[0], arguments, element.as_pointer())
        return context.get_dummy_value()

    return signature, codegen


def _taps_at_once(t: Tile, taps: int) -> int:
    """Columns of the filter whose gradients are summed at once: an accumulator for each, and for each of its rows."""
    wanted = {1: 4, 7: 3}.get(taps, taps)
    registers = 32 if t.rows > 8 else 16
    return max(1, min(wanted, (registers - 2 - _GRADIENT_ROWS) // taps))


_GRADIENT_ROWS = 4  # rows of the output gradient at once


def _accumulate_rows_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int, many: int, rows: int, lanes: int
) -> ir.Function:
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_accumulate_rows_{element}_{taps}_{stride}_{many}_{rows}_{lanes}",
        [pointer, _I64, pointer, _I64, table, pointer, _I64, _I64, _I64],
    )  # fmt: skip
    if not new:
        return function
    sums, pitch, x, x_pitch, offsets, dy, dy_pitch, blocks, columns = function.args
    for p in (sums, x, dy):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, lanes)
    zero = ir.Constant(vector, [0.0] * lanes)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    places = [
        b.gep(sums, [b.mul(b.add(b.mul(pitch, _i64(a)), _i64(j)), _i64(t.lanes))])
        for a in range(taps)
        for j in range(many)
    ]
    shifts = [b.load(b.gep(offsets, [_i64(j)])) for j in range(many)]
    full = b.sdiv(columns, _i64(lanes))
    rest = b.srem(columns, _i64(lanes))
    mask = _lane_mask(b, rest if lanes == t.lanes else columns, lanes)
    block = _Loop(b, "blocks", blocks, [x, dy, *(_load(b, p, vector) for p in places)])
    x_block, dy_block, *values = block.values
    x_rows = [b.gep(x_block, [b.mul(x_pitch, _i64(i))]) for i in range(stride * (rows - 1) + taps)]
    dy_rows = [b.gep(dy_block, [b.mul(dy_pitch, _i64(r))]) for r in range(rows)]

    def add(values: list[ir.Value], column: ir.Value, masked: bool) -> list[ir.Value]:
        values = list(values)
        at = [b.gep(row, [column]) for row in dy_rows]
        gradients = [_load_lanes(b, module, p, mask, vector) if masked else _load(b, p, vector) for p in at]
        for i, row in enumerate(x_rows):
            meeting = [(r, i - stride * r) for r in range(rows) if 0 <= i - stride * r < taps]
            for j in range(many if meeting else 0):
                value = _load(b, b.gep(row, [b.add(column, shifts[j])]), vector)
                if masked:  # what lies beyond the row may be infinite, and times zero be nan
                    value = b.select(mask, value, zero)
                for r, a in meeting:
                    n = a * many + j
                    values[n] = _multiply_add(b, module, t.fma, gradients[r], value, values[n])
        return values

    def add_full(values: list[ir.Value]) -> list[ir.Value]:
        loop = _Loop(b, "vectors", full, values)
        values = add(loop.values, b.mul(loop.k, _i64(lanes)), False)
        loop.close(values)
        return values

    if lanes == t.lanes:
        values = _where(b, b.icmp_signed(">", full, _i64(0)), values, add_full)
        values = _where(
            b, b.icmp_signed(">", rest, _i64(0)), values, lambda vs: add(vs, b.mul(full, _i64(lanes)), True)
        )
    else:
        values = add(values, _i64(0), True)
    block.close([
        b.gep(x_block, [b.mul(x_pitch, _i64(rows * stride))]), b.gep(dy_block, [b.mul(dy_pitch, _i64(rows))]), *values,
    ])  # fmt: skip
    for value, place in zip(values, places, strict=True):
        _store(b, value, place)
    b.ret_void()
    return function


def _accumulate_rows_dispatcher(module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int) -> ir.Function:
    """Cuts rows and columns of the filter into what the generated functions take."""
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_accumulate_rows_{element}_{taps}_{stride}",
        [pointer, _I64, pointer, _I64, table, _I64, pointer, _I64, _I64, _I64],
    )  # fmt: skip
    if not new:
        return function
    sums, pitch, x, x_pitch, offsets, depth, dy, dy_pitch, rows, columns = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    widths = [t.lanes // 2, t.lanes] if t.lanes >= 8 else [t.lanes]
    narrow = b.zext(b.icmp_signed("<=", columns, _i64(widths[0])), _I64) if len(widths) > 1 else _i64(0)

    def columns_from(first: ir.Value, many: int) -> None:
        done = _i64(0)
        for height in (_GRADIENT_ROWS, 2, 1):
            blocks = b.sdiv(b.sub(rows, done), _i64(height))

            def call(_: list[ir.Value], height=height, blocks=blocks, done=done) -> list[ir.Value]:
                arguments = [
                    b.gep(sums, [b.mul(first, _i64(t.lanes))]), pitch,
                    b.gep(x, [b.mul(b.mul(done, _i64(stride)), x_pitch)]), x_pitch, b.gep(offsets, [first]),
                    b.gep(dy, [b.mul(done, dy_pitch)]), dy_pitch, blocks, columns,
                ]  # fmt: skip
                cases = {
                    n: _accumulate_rows_function(module, element, t, taps, stride, many, height, lanes)
                    for n, lanes in enumerate(reversed(widths))
                }
                _switch(b, narrow, cases, arguments)
                return []

            _where(b, b.icmp_signed(">", blocks, _i64(0)), [], call)
            done = b.add(done, b.mul(blocks, _i64(height)))

    first = _i64(0)
    for many in sorted({_taps_at_once(t, taps), 1}, reverse=True):
        count = b.sdiv(b.sub(depth, first), _i64(many))

        def every(_: list[ir.Value], many=many, count=count, first=first) -> list[ir.Value]:
            loop = _Loop(b, "columns", count, [])
            columns_from(b.add(first, b.mul(loop.k, _i64(many))), many)
            loop.close([])
            return []

        _where(b, b.icmp_signed(">", count, _i64(0)), [], every)
        first = b.add(first, b.mul(count, _i64(many)))
    b.ret_void()
    return function


accumulate_rows = _literal_function(_accumulate_rows_dispatcher, """What `call_accumulate` calls.""")


@intrinsic
def call_accumulate(typingctx, address, sums, pitch, x, x_pitch, offsets, depth, dy, dy_pitch, rows, columns):
    """sums[a, k] += sum over r < rows, q < columns of dy[r, q] * x[stride * r + a, q + offsets[k]].

    `address` is that of a C function compiled from `accumulate_rows` for this (taps, stride); a < taps, k < depth. Each
    of the sums is a vector of partial sums, which `sum_lanes` adds up, and `pitch` counts vectors. Up to a vector of x
    beyond a row may be read, and is not used; of dy nothing is read but dy[r, q].
    """
    i, table = types.int64, types.CPointer(types.int64)
    signature = types.void(i, sums, i, sums, i, table, i, sums, i, i, i)

    def codegen(context, builder, sig, args):
        _call_compiled(builder, args[0], args[1:], _element(sig.args[1]).as_pointer())
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def sum_lanes(typingctx, target, sums, count):
    """target[k] = the sum of the lanes of vector k of `sums`, for k < count, count >= 1: always in the same order."""

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        pointer = element.as_pointer()
        function, new = _internal(builder.module, f"fastconv_sum_lanes_{element}", [pointer, pointer, _I64])
        if new:
            target, sums, count = function.args
            b = ir.IRBuilder(function.append_basic_block("entry"))
            loop = _Loop(b, "vectors", count, [])
            value = _load(b, b.gep(sums, [b.mul(loop.k, _i64(t.lanes))]), ir.VectorType(element, t.lanes))
            half = t.lanes // 2
            while half:
                low, high = (
                    b.shuffle_vector(
                        value, ir.Constant(value.type, ir.Undefined),
                        ir.Constant(ir.VectorType(_I32, half), list(range(start, start + half))),
                    )
                    for start in (0, half)
                )  # fmt: skip
                value = b.fadd(low, high)
                half //= 2
            b.store(b.extract_element(value, ir.Constant(_I32, 0)), b.gep(target, [loop.k]))
            loop.close([])
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    return types.void(target, target, types.int64), codegen


def _copy_rows_function(module: ir.Module, element: ir.Type, t: Tile) -> ir.Function:
    pointer = element.as_pointer()
    function, new = _internal(module, f"fastconv_copy_rows_{element}", [pointer, _I64, pointer, _I64, _I64, _I64])
    if not new:
        return function
    target, target_pitch, source, source_pitch, rows, count = function.args
    for p in (target, source):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, t.lanes)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    short, long, end = (b.append_basic_block(name) for name in ("short", "long", "end"))
    last = b.sub(count, _i64(t.lanes))
    vectors = b.sdiv(b.add(count, _i64(t.lanes - 1)), _i64(t.lanes))
    b.cbranch(b.icmp_signed("<", last, _i64(0)), short, long)
    b.position_at_end(short)
    mask = _lane_mask(b, count, t.lanes)
    row = _Loop(b, "short_rows", rows, [target, source])
    _store(b, _load_lanes(b, module, row.values[1], mask, vector), row.values[0])
    row.close([b.gep(row.values[0], [target_pitch]), b.gep(row.values[1], [source_pitch])])
    b.branch(end)
    b.position_at_end(long)
    row = _Loop(b, "rows", rows, [target, source])
    loop = _Loop(b, "vectors", vectors, [])
    place = b.mul(loop.k, _i64(t.lanes))
    place = b.select(b.icmp_signed("<", place, last), place, last)
    _store(b, _load(b, b.gep(row.values[1], [place]), vector), b.gep(row.values[0], [place]))
    loop.close([])
    row.close([b.gep(row.values[0], [target_pitch]), b.gep(row.values[1], [source_pitch])])
    b.branch(end)
    b.position_at_end(end)
    b.ret_void()
    return function


@intrinsic
def copy_rows(typingctx, target, target_pitch, source, source_pitch, rows, count):
    """Copy `rows` >= 1 rows of `count` >= 1 elements. A row below a vector is stored as one, with zeros at its end."""

    def codegen(context, builder, sig, args):
        builder.call(_copy_rows_function(builder.module, _element(sig.args[0]), _tile_of(sig.args[0])), args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(target, i, target, i, i, i), codegen


@intrinsic
def split_rows(typingctx, even, odd, target_pitch, source, source_pitch, rows, count):
    """Copy `rows` rows of `count` elements, those at even places to `even`, the others to `odd`.

    The last vector of each may write zeros beyond its row.
    """

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        pointer, module = element.as_pointer(), builder.module
        function, new = _internal(
            module, f"fastconv_split_rows_{element}", [pointer, pointer, _I64, pointer, _I64, _I64, _I64]
        )
        if new:
            even, odd, target_pitch, source, source_pitch, rows, count = function.args
            vector = ir.VectorType(element, t.lanes)
            b = ir.IRBuilder(function.append_basic_block("entry"))
            pairs = b.sdiv(b.add(count, _i64(2 * t.lanes - 1)), _i64(2 * t.lanes))
            row = _Loop(b, "rows", rows, [even, odd, source])
            loop = _Loop(b, "pairs", pairs, [])
            halves = []
            for j in range(2):
                place = b.add(b.mul(loop.k, _i64(2 * t.lanes)), _i64(j * t.lanes))
                mask = _lane_mask(b, b.sub(count, place), t.lanes)
                halves.append(_load_lanes(b, module, b.gep(row.values[2], [place]), mask, vector))
            for start in range(2):
                lanes_of = ir.Constant(ir.VectorType(_I32, t.lanes), [start + 2 * n for n in range(t.lanes)])
                target = b.gep(row.values[start], [b.mul(loop.k, _i64(t.lanes))])
                _store(b, b.shuffle_vector(*halves, lanes_of), target)
            loop.close([])
            even_, odd_, source_ = row.values
            row.close([b.gep(even_, [target_pitch]), b.gep(odd_, [target_pitch]), b.gep(source_, [source_pitch])])
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(even, even, i, even, i, i, i), codegen


@intrinsic
def join_rows(typingctx, target, target_pitch, even, odd, source_pitch, rows, count):
    """The reverse of `split_rows`: target[r, 2i] = even[r, i], target[r, 2i + 1] = odd[r, i], `count` elements."""

    def codegen(context, builder, sig, args):
        element, t = _element(sig.args[0]), _tile_of(sig.args[0])
        pointer, module = element.as_pointer(), builder.module
        function, new = _internal(
            module, f"fastconv_join_rows_{element}", [pointer, _I64, pointer, pointer, _I64, _I64, _I64]
        )
        if new:
            target, target_pitch, even, odd, source_pitch, rows, count = function.args
            for p in (target, even, odd):
                p.add_attribute("noalias")
            vector = ir.VectorType(element, t.lanes)
            b = ir.IRBuilder(function.append_basic_block("entry"))
            pairs = b.sdiv(b.add(count, _i64(2 * t.lanes - 1)), _i64(2 * t.lanes))
            row = _Loop(b, "rows", rows, [target, even, odd])
            loop = _Loop(b, "pairs", pairs, [])
            sources = [_load(b, b.gep(p, [b.mul(loop.k, _i64(t.lanes))]), vector) for p in row.values[1:]]
            for j in range(2):
                half = j * t.lanes // 2
                order = [half + n // 2 + n % 2 * t.lanes for n in range(t.lanes)]
                value = b.shuffle_vector(*sources, ir.Constant(ir.VectorType(_I32, t.lanes), order))
                place = b.add(b.mul(loop.k, _i64(2 * t.lanes)), _i64(j * t.lanes))
                left = b.sub(count, place)
                full, part, done = (b.append_basic_block(name) for name in ("full", "part", "stored"))
                at = b.gep(row.values[0], [place])
                b.cbranch(b.icmp_signed(">=", left, _i64(t.lanes)), full, part)
                b.position_at_end(full)
                _store(b, value, at)
                b.branch(done)
                b.position_at_end(part)
                _store_lanes(b, module, value, at, _lane_mask(b, left, t.lanes))
                b.branch(done)
                b.position_at_end(done)
            loop.close([])
            row.close([
                b.gep(row.values[0], [target_pitch]),
                *(b.gep(p, [source_pitch]) for p in row.values[1:]),
            ])  # fmt: skip
            b.ret_void()
        builder.call(function, args)
        return context.get_dummy_value()

    i = types.int64
    return types.void(target, i, target, target, i, i, i), codegen


# ---------------------------------------------------------------------------------------------------------------------
# Depthwise convolution with a vector of channels: pixels of `lanes` channels each
# ---------------------------------------------------------------------------------------------------------------------


def _pixel_mover(name: str, meaning: str, write):
    """An intrinsic (target, table or pitch, source, pitch, pixels, channels), pixels and channels >= 1."""

    @intrinsic
    def move(typingctx, target, where, source, pitch, pixels, channels):
        def codegen(context, builder, sig, args):
            element, t = _element(sig.args[0]), _tile_of(sig.args[0])
            kinds = [value.type for value in args]
            function, new = _internal(builder.module, f"fastconv_{name}_{element}", kinds)
            if new:
                write(builder.module, function, ir.VectorType(element, t.lanes))
            builder.call(function, args)
            return context.get_dummy_value()

        i = types.int64
        return types.void(target, where, target, i, i, i), codegen

    move.__doc__ = meaning
    return move


def _with_channels(module: ir.Module, function: ir.Function, vector: ir.VectorType, write) -> None:
    """A body for whole vectors of channels, and one with a mask: write(b, load, store)."""
    channels = function.args[-1]
    b = ir.IRBuilder(function.append_basic_block("entry"))
    whole, part, end = (b.append_basic_block(name) for name in ("whole", "part", "end"))
    b.cbranch(b.icmp_signed(">=", channels, _i64(vector.count)), whole, part)
    b.position_at_end(whole)
    write(b, lambda pointer: _load(b, pointer, vector), lambda value, pointer: _store(b, value, pointer))
    b.branch(end)
    b.position_at_end(part)
    mask = _lane_mask(b, channels, vector.count)
    write(
        b, lambda pointer: _load_lanes(b, module, pointer, mask, vector),
        lambda value, pointer: _store_lanes(b, module, value, pointer, mask),
    )  # fmt: skip
    b.branch(end)
    b.position_at_end(end)
    b.ret_void()


def _write_spread_pixels(module: ir.Module, function: ir.Function, vector: ir.VectorType) -> None:
    target, places, source, pitch, pixels, _ = function.args
    for p in (target, source):
        p.add_attribute("noalias")

    def write(b: ir.IRBuilder, load, _) -> None:
        loop = _Loop(b, "pixels", pixels, [source])
        place = b.load(b.gep(places, [loop.k]))
        _store(b, load(loop.values[0]), b.gep(target, [place]))
        loop.close([b.gep(loop.values[0], [pitch])])

    _with_channels(module, function, vector, write)


def _write_collect_pixels(module: ir.Module, function: ir.Function, vector: ir.VectorType) -> None:
    target, target_pitch, source, pitch, pixels, _ = function.args
    for p in (target, source):
        p.add_attribute("noalias")

    def write(b: ir.IRBuilder, _, store) -> None:
        loop = _Loop(b, "pixels", pixels, [target, source])
        store(_load(b, loop.values[1], vector), loop.values[0])
        loop.close([b.gep(loop.values[0], [target_pitch]), b.gep(loop.values[1], [pitch])])

    _with_channels(module, function, vector, write)


def _blocks_of_pixels(b: ir.IRBuilder, pixels: ir.Value, n: int, write) -> None:
    """write(first, mask) for blocks of n pixels, the last of which may overlap the one before: the mask is None; for
    fewer pixels than one block, the mask of those there are."""
    last = b.sub(pixels, _i64(n))
    few, many, end = (b.append_basic_block(name) for name in ("few", "many", "moved"))
    b.cbranch(b.icmp_signed("<", last, _i64(0)), few, many)
    b.position_at_end(few)
    write(_i64(0), _lane_mask(b, pixels, n))
    b.branch(end)
    b.position_at_end(many)
    loop = _Loop(b, "blocks", b.sdiv(b.add(pixels, _i64(n - 1)), _i64(n)), [])
    first = b.mul(loop.k, _i64(n))
    write(b.select(b.icmp_signed("<", first, last), first, last), None)
    loop.close([])
    b.branch(end)
    b.position_at_end(end)


def _planes_of(b: ir.IRBuilder, pointer: ir.Value, pitch: ir.Value, channels: ir.Value, n: int) -> list[ir.Value]:
    """Pointers to n planes, to the last of them again for those there are not."""
    last = b.sub(channels, _i64(1))
    indices = [b.select(b.icmp_signed("<", _i64(i), last), _i64(i), last) for i in range(n)]
    return [b.gep(pointer, [b.mul(pitch, index)]) for index in indices]


def _write_spread_planes(module: ir.Module, function: ir.Function, vector: ir.VectorType) -> None:
    target, places, source, pitch, pixels, channels = function.args
    for p in (target, source):
        p.add_attribute("noalias")
    n = vector.count
    b = ir.IRBuilder(function.append_basic_block("entry"))
    planes = _planes_of(b, source, pitch, channels, n)

    def write(first: ir.Value, mask: ir.Value | None) -> None:
        at = [b.gep(plane, [first]) for plane in planes]
        rows = [_load(b, p, vector) if mask is None else _load_lanes(b, module, p, mask, vector) for p in at]
        last = b.sub(pixels, _i64(1))
        for k, row in reversed(list(enumerate(_transpose_vectors(b, rows)))):
            index = b.add(first, _i64(k))
            if mask is not None:  # a pixel that is not there goes where the last one is stored after it
                index = b.select(b.icmp_signed("<", index, last), index, last)
            _store(b, row, b.gep(target, [b.load(b.gep(places, [index]))]))

    _blocks_of_pixels(b, pixels, n, write)
    b.ret_void()


def _write_collect_planes(module: ir.Module, function: ir.Function, vector: ir.VectorType) -> None:
    target, target_pitch, source, pitch, pixels, channels = function.args
    for p in (target, source):
        p.add_attribute("noalias")
    n = vector.count
    b = ir.IRBuilder(function.append_basic_block("entry"))
    planes = _planes_of(b, target, target_pitch, channels, n)

    def write(first: ir.Value, mask: ir.Value | None) -> None:
        at = [b.gep(source, [b.mul(b.add(first, _i64(k)), pitch)]) for k in range(n)]
        if mask is not None:
            last = b.gep(source, [b.mul(b.sub(pixels, _i64(1)), pitch)])
            at = [b.select(b.icmp_signed("<", _i64(k), pixels), p, last) for k, p in enumerate(at)]
        rows = _transpose_vectors(b, [_load(b, p, vector) for p in at])
        for plane, row in reversed(list(zip(planes, rows, strict=True))):  # the last channel overwrites what is not one
            place = b.gep(plane, [first])
            if mask is None:
                _store(b, row, place)
            else:
                _store_lanes(b, module, row, place, mask)

    _blocks_of_pixels(b, pixels, n, write)
    b.ret_void()


spread_pixels = _pixel_mover("spread_pixels", """target[places[k] + c] = source[k * pitch + c].

Zeros for c from `channels` on.
""", _write_spread_pixels)  # fmt: skip
spread_planes = _pixel_mover("spread_planes", """target[places[k] + c] = source[c * pitch + k].

The last channel again for c from `channels` on. Pixels may be stored in any order, and more than once.
""", _write_spread_planes)  # fmt: skip
collect_pixels = _pixel_mover(
    "collect_pixels", """target[k * target_pitch + c] = source[k * pitch + c], c < channels.""", _write_collect_pixels
)
collect_planes = _pixel_mover(
    "collect_planes", """target[c * target_pitch + k] = source[k * pitch + c], c < channels.""", _write_collect_planes
)

# (taps of a row at once, stride): pixels that several of these taps meet are loaded once
CHANNEL_TAPS = ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1), (3, 2), (5, 2), (7, 2))


def turning_kind(stride: int, turns: int) -> int:
    """Stride and turns of a function as one number: that of a single turn is its stride."""
    return (turns - 1) * 16 + stride


def _turned(b: ir.IRBuilder, value: ir.Value, turn: int, turns: int) -> ir.Value:
    """Each lane has that of the lane `turn` further on, around the end of its group of `turns` lanes."""
    if turn == 0:
        return value
    places = [lane // turns * turns + (lane + turn) % turns for lane in range(value.type.count)]
    return b.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _pixels_at_once(t: Tile) -> tuple[int, ...]:
    """Pixels of a row of output that have their accumulators in registers, beside the weights of a row of up to seven
    taps: multiples of seven, since the planes of so many networks have 7, 14, 28, 56 and 112 columns."""
    return (14, 7, 4, 2, 1) if t.rows > 8 else (7, 4, 2, 1)


def _correlate_pixels_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, kind: int, many: int
) -> ir.Function:
    """A block of `many` columns of all rows."""
    stride, turns = kind % 16, kind // 16 + 1
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_correlate_pixels_{element}_{taps}_{kind}_{many}",
        [pointer, _I64, _I64, pointer, _I64, _I64, pointer, _I64, table, *[_I64] * 16, pointer, pointer, element],
    )  # fmt: skip
    if not new:
        return function
    (
        y, y_row, y_pitch, x, x_row, x_pitch, w, w_block, reach, blocks, rows, low, high, depths, x_depth, w_depth,
        x_height, w_height, widths, x_width, w_width, x_ahead, x_next, y_ahead, add, zeros, bias, least,
    ) = function.args  # fmt: skip
    for p in (y, x, w, zeros, bias):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, t.lanes)
    zero = ir.Constant(vector, [0.0] * t.lanes)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    outside = {}  # neighbours that may lie beside the plane: every output meets one that does not
    for i in range(stride * (many - 1) + taps):
        left, right = b.icmp_signed("<", _i64(i), low), b.icmp_signed(">=", _i64(i), high)
        if i < taps - 1 and i > stride * (many - 1):
            outside[i] = b.or_(left, right)
        elif i < taps - 1:
            outside[i] = left
        elif i > stride * (many - 1):
            outside[i] = right
    least = _splat(b, least, t.lanes)
    row = _Loop(b, "rows", rows, [y])
    entry = b.gep(reach, [b.mul(row.k, _i64(3))])
    first_row, first_tap, heights = (b.load(b.gep(entry, [_i64(n)])) for n in range(3))
    x_row, w_row = b.gep(x, [b.mul(first_row, x_row)]), b.gep(w, [b.mul(first_tap, w_height)])
    block = _Loop(b, "blocks", blocks, [row.values[0], x_row, w_row, bias])
    y_now, x_now, w_now, bias_now = block.values
    targets = [b.gep(y_now, [b.mul(y_pitch, _i64(q))]) for q in range(many)]

    def ask_ahead(_: list[ir.Value]) -> list[ir.Value]:
        """For what the columns of a row further down meet, but for what its neighbours to the left have asked for."""
        start, first = b.gep(x_now, [x_ahead]), max(taps - stride, 0)
        for h in range(stride):
            for i in range(first, first + stride * many):
                at = b.add(b.mul(x_next, _i64(h)), b.mul(x_pitch, _i64(i)))
                _prefetch(b, module, b.gep(start, [at]), locality=2)
        for target in targets:
            _prefetch(b, module, b.gep(target, [y_ahead]), write=True, locality=2)
        return []

    _where(b, b.icmp_signed("!=", x_ahead, _i64(0)), [], ask_ahead)
    sums = _where(
        b, b.icmp_signed("!=", add, _i64(0)), [zero] * many, lambda _: [_load(b, p, vector) for p in targets]
    )
    depth = _Loop(b, "depths", depths, [x_now, w_now, *sums])
    height = _Loop(b, "heights", heights, depth.values)
    width = _Loop(b, "widths", widths, height.values)
    x_now, w_now, *sums = width.values
    weights = [_load(b, b.gep(w_now, [_i64(n * t.lanes)]), vector) for n in range(taps * turns)]
    for i in range(stride * (many - 1) + taps):
        meeting = [(q, i - stride * q) for q in range(many) if 0 <= i - stride * q < taps]
        if not meeting:
            continue
        place = b.gep(x_now, [b.mul(x_pitch, _i64(i))])
        value = _load(b, b.select(outside[i], zeros, place) if i in outside else place, vector)
        for turn in range(turns):
            turned = _turned(b, value, turn, turns)
            for q, a in meeting:
                sums[q] = _multiply_add(b, module, t.fma, weights[a * turns + turn], turned, sums[q])
    width.close([b.gep(x_now, [x_width]), b.gep(w_now, [w_width]), *sums])
    height.close([b.gep(height.values[0], [x_height]), b.gep(height.values[1], [w_height]), *sums])
    depth.close([b.gep(depth.values[0], [x_depth]), b.gep(depth.values[1], [w_depth]), *sums])
    added = _load(b, bias_now, vector)
    for value, target in zip(sums, targets, strict=True):
        value = b.fadd(value, added)
        _store(b, b.select(b.fcmp_ordered("<", value, least), least, value), target)  # nan stays nan
    lanes = _i64(t.lanes)
    block.close(
        [b.gep(p, [step]) for p, step in zip(block.values, (lanes, lanes, w_block, w_block), strict=True)]
    )
    row.close([b.gep(row.values[0], [y_row])])
    b.ret_void()
    return function


def _correlate_pixels_dispatcher(module: ir.Module, element: ir.Type, t: Tile, taps: int, kind: int) -> ir.Function:
    """Cuts the columns into what the generated functions take."""
    stride = kind % 16
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_correlate_pixels_{element}_{taps}_{kind}",
        [pointer, _I64, _I64, pointer, _I64, _I64, pointer, _I64, table, *[_I64] * 17, pointer, pointer, element],
    )  # fmt: skip
    if not new:
        return function
    (
        y, y_row, y_pitch, x, x_row, x_pitch, w, w_block, reach, blocks, rows, columns, low, high, depths, x_depth,
        w_depth, x_height, w_height, widths, x_width, w_width, x_ahead, x_next, y_ahead, add, zeros, bias, least,
    ) = function.args  # fmt: skip
    b = ir.IRBuilder(function.append_basic_block("entry"))
    done = _i64(0)
    for many in _pixels_at_once(t):
        count = b.sdiv(b.sub(columns, done), _i64(many))

        def every(_: list[ir.Value], many=many, count=count, done=done) -> list[ir.Value]:
            loop = _Loop(b, "blocks", count, [])
            first = b.add(done, b.mul(loop.k, _i64(many)))
            place = b.mul(first, _i64(stride))
            b.call(
                _correlate_pixels_function(module, element, t, taps, kind, many),
                [
                    b.gep(y, [b.mul(first, y_pitch)]), y_row, y_pitch, b.gep(x, [b.mul(place, x_pitch)]), x_row,
                    x_pitch, w, w_block, reach, blocks, rows, b.sub(low, place), b.sub(high, place), depths, x_depth,
                    w_depth, x_height, w_height, widths, x_width, w_width, x_ahead, x_next, y_ahead, add, zeros,
                    bias, least,
                ],
            )  # fmt: skip
            loop.close([])
            return []

        _where(b, b.icmp_signed(">", count, _i64(0)), [], every)
        done = b.add(done, b.mul(count, _i64(many)))
    b.ret_void()
    return function


correlate_pixels = _literal_function(_correlate_pixels_dispatcher, """What `call_correlate_pixels` calls.""")


@intrinsic
def call_correlate_pixels(
    typingctx, address, y, y_row, y_pitch, x, x_row, x_pitch, w, w_block, reach, blocks, rows, columns, low, high,
    depths, x_depth, w_depth, x_height, w_height, widths, x_width, w_width, x_ahead, x_next, y_ahead, zeros, flags,
    bias,
):  # fmt: skip
    """Rows of output pixels, each a vector of channels: y[r, q] = sum over d, h, k, a of w[..] * x[..].

    `address` is that of a C function compiled from `correlate_pixels` for this (taps, stride), one of CHANNEL_TAPS; or
    for (taps, `turning_kind`), where taps meet channels of a group: see below. Row
    r has its first tap at ``x + reach[3r] * x_row`` and ``w + reach[3r + 1] * w_height`` and reach[3r + 2] rows of
    taps, x_height and w_height from one another, in each of `depths` planes of them; a row of taps is `widths` times
    `taps` neighbours, x_pitch from one another. Column q of the output is stride * x_pitch further on in x, and y_pitch
    in y. All counts >= 1. `flags` are as for `contract`; `bias` is a vector, and read always.
    Of the neighbours a row meets, counted from its first, those before `low` and those from `high` on are not read:
    they are the vector `zeros`. There are at most taps - 1 on either side, and none if `widths` is not 1.
    If x_ahead is not 0, the cache lines of `stride` rows, x_next from one another, that begin x_ahead after the first
    tap of a row are asked for, and those of the output y_ahead further on.
    And the same for `blocks` blocks of channels: vectors that follow one another in x and y, w_block in w and `bias`.
    The sum of an element is one chain of multiply-adds, in the order of d, h, k, a, that begins with what y holds if
    ADD is set.
    With n turns, n lanes after the other are a group, every lane of which sees the pixels of all: with the weights
    [tap][turn] those of the lane `turn` further on, around the end of the group. The chain goes through them for each
    tap.
    """
    i, table = types.int64, types.CPointer(types.int64)
    signature = types.void(i, y, i, i, y, i, i, y, i, table, *[i] * 16, y, i, y)

    def codegen(context, builder, sig, args):
        element = _element(sig.args[1])
        *between, zeros, flags, bias = args[1:]
        relu = builder.icmp_signed("!=", builder.and_(flags, _i64(RELU)), _i64(0))
        least = builder.select(relu, ir.Constant(element, 0.0), ir.Constant(element, -math.inf))
        arguments = [*between, builder.and_(flags, _i64(ADD)), zeros, bias, least]
        _call_compiled(builder, args[0], arguments, element.as_pointer())
        return context.get_dummy_value()

    return signature, codegen


_GRADIENT_PIXELS = 4  # pixels of the output gradient at once


def gradient_tap_rows(t: Tile, weights: int) -> tuple[int, ...]:
    """Numbers of rows of so many weights that `accumulate_pixels` takes at once: there is an accumulator for each."""
    registers = 32 if t.rows > 8 else 16
    return tuple(n for n in (1, 2, 3, 5) if n == 1 or n * weights + _GRADIENT_PIXELS + 1 < registers)


def _accumulate_pixels_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int, turns: int, tap_rows: int, in_place: bool
) -> ir.Function:
    pointer = element.as_pointer()
    function, new = _internal(
        module, f"fastconv_accumulate_pixels_{element}_{taps}_{stride}_{turns}_{tap_rows}_{in_place}",
        [pointer, *[_I64] * 2, pointer, *[_I64] * 3, pointer, *[_I64] * 13, pointer],
    )  # fmt: skip
    if not new:
        return function
    (
        sums, sums_pitch, sums_block, x, x_row, x_height, x_pitch, dy, dy_row, dy_pitch, blocks, rows, columns, low,
        high, first_row, row_step, tap_step, height, x_ahead, dy_ahead, zeros,
    ) = function.args  # fmt: skip
    for p in (sums, x, dy, zeros):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, t.lanes)
    zero = ir.Constant(vector, [0.0] * t.lanes)
    b = ir.IRBuilder(function.append_basic_block("entry"))


    def within(value: ir.Value, least: ir.Value, most: ir.Value) -> ir.Value:
        value = b.select(b.icmp_signed("<", value, least), least, value)
        return b.select(b.icmp_signed(">", value, most), most, value)

    # Columns before `inner` meet something to the left of the plane, those from `outer` on something to the right: one
    # at a time. Where it was asked of every neighbour of four columns as well, 3 x 3 took 1.1 to 1.4 times as long.
    inner, outer = _i64(0), columns
    if in_place:
        inner = within(b.sdiv(b.add(low, _i64(stride - 1)), _i64(stride)), inner, columns)
        outer = within(b.sdiv(b.sub(high, _i64(taps - stride)), _i64(stride)), inner, columns)
    full = b.sdiv(b.sub(outer, inner), _i64(_GRADIENT_PIXELS))
    last = b.add(inner, b.mul(full, _i64(_GRADIENT_PIXELS)))
    there = b.sub(high, low)
    block = _Loop(b, "blocks", blocks, [sums, x, dy])
    sums_now, x_block, dy_block = block.values
    row = _Loop(b, "rows", rows, [x_block, dy_block, *[zero] * (taps * turns * tap_rows)])
    x_now, dy_now, *values = row.values
    starts = []
    for h in range(tap_rows):
        at = b.add(first_row, b.add(b.mul(row.k, row_step), b.mul(tap_step, _i64(h))))
        start = b.gep(x_now, [b.mul(x_height, _i64(h))])
        starts.append(b.select(b.icmp_unsigned("<", at, height), start, zeros) if in_place else start)

    def add(values: list[ir.Value], first: ir.Value, many: int, count: ir.Value) -> list[ir.Value]:
        loop = _Loop(b, "pixels", count, values)
        values = list(loop.values)
        place = b.add(first, b.mul(loop.k, _i64(many)))
        neighbour = b.mul(place, _i64(stride))
        x_at, dy_at = b.mul(neighbour, x_pitch), b.gep(dy_now, [b.mul(place, dy_pitch)])
        reached = stride * (many - 1) + taps
        from_low = b.sub(neighbour, low)
        asked = reached if in_place and many == 1 else 0
        exists = [b.icmp_unsigned("<", b.add(from_low, _i64(i)), there) for i in range(asked)]
        gradients = [_load(b, b.gep(dy_at, [b.mul(dy_pitch, _i64(q))]), vector) for q in range(many)]
        for h, start in enumerate(starts):
            x_tap = b.gep(start, [x_at])
            for i in range(reached):
                meeting = [(q, i - stride * q) for q in range(many) if 0 <= i - stride * q < taps]
                if not meeting:
                    continue
                known = not in_place and taps > 1  # numbers in the instructions: these are too many for registers
                at = b.gep(x_tap, [_i64(i * t.lanes) if known else b.mul(x_pitch, _i64(i))])
                value = _load(b, b.select(exists[i], at, zeros) if exists else at, vector)
                for turn in range(turns):
                    turned = _turned(b, value, turn, turns)
                    for q, a in meeting:
                        n = (h * taps + a) * turns + turn
                        values[n] = _multiply_add(b, module, t.fma, gradients[q], turned, values[n])

        def ask(_: list[ir.Value]) -> list[ir.Value]:
            for q in range(many):
                _prefetch(b, module, b.gep(dy_at, [b.add(dy_ahead, b.mul(dy_pitch, _i64(q)))]), locality=2)
            start = b.gep(x_now, [b.add(x_at, x_ahead)])
            for h in range(max(tap_rows - stride, 0), tap_rows):  # those that no row before has asked for
                for i in range(stride * many):
                    at = b.add(b.mul(x_height, _i64(h)), b.mul(x_pitch, _i64(i)))
                    _prefetch(b, module, b.gep(start, [at]), locality=2)
            return []

        if in_place and many > 1:
            _where(b, b.icmp_signed("!=", dy_ahead, _i64(0)), [], ask)
        loop.close(values)
        return values

    spans = (_i64(0), 1, inner), (inner, _GRADIENT_PIXELS, full), (last, 1, b.sub(columns, last))
    for first, many, count in spans if in_place else spans[1:]:
        change = functools.partial(add, first=first, many=many, count=count)
        values = _where(b, b.icmp_signed(">", count, _i64(0)), values, change)
    row.close([b.gep(x_now, [x_row]), b.gep(dy_now, [dy_row]), *values])
    for n, value in enumerate(values):
        h, weight = divmod(n, taps * turns)
        place = b.gep(sums_now, [b.add(b.mul(sums_pitch, _i64(h)), _i64(weight * t.lanes))])
        _store(b, b.fadd(value, _load(b, place, vector)), place)
    lanes = _i64(t.lanes)
    block.close([b.gep(p, [step]) for p, step in zip(block.values, (sums_block, lanes, lanes), strict=True)])
    b.ret_void()
    return function


def pixel_kind(stride: int, turns: int, tap_rows: int, in_place: bool) -> int:
    """Stride, turns, rows of the filter, and whether it reads in place, of a function as one number."""
    return (turning_kind(stride, turns) * 16 + tap_rows) * 2 + in_place


def _accumulate_pixels_of_kind(module: ir.Module, element: ir.Type, t: Tile, taps: int, kind: int) -> ir.Function:
    turning, tap_rows = divmod(kind // 2, 16)
    return _accumulate_pixels_function(
        module, element, t, taps, turning % 16, turning // 16 + 1, tap_rows, kind % 2 == 1
    )


accumulate_pixels = _literal_function(_accumulate_pixels_of_kind, """What `call_accumulate_pixels` calls.""")


@intrinsic
def call_accumulate_pixels(
    typingctx, address, sums, sums_pitch, sums_block, x, x_row, x_height, x_pitch, dy, dy_row, dy_pitch, blocks, rows,
    columns, low, high, first_row, row_step, tap_step, height, x_ahead, dy_ahead, zeros,
):  # fmt: skip
    """sums[h, a] += sum over r < rows, q < columns of dy[r, q] * x[r, h, stride * q + a], each a vector of channels.

    `address` is that of a C function compiled from `accumulate_pixels` for these taps and this `pixel_kind`; a < taps,
    h < tap_rows, one of `gradient_tap_rows`. The sum is made first, in the order of r, then q, and then added. And the
    same for `blocks` blocks of channels: vectors that follow one another in x and dy, sums_block in `sums`. With turns,
    as of `call_correlate_pixels`, these are sums[h, a, turn], of dy times the pixels of the lane `turn` further on.
    In place, row (r, h) of x is row first_row + r * row_step + h * tap_step of the plane, whose rows are 0 to
    height - 1. Where it is not one, the zeros at `zeros` are read, and so they are for neighbours, counted from the
    first that is met, before `low` and from `high` on. If dy_ahead is not 0, the cache lines so much further on in dy
    are asked for, and those x_ahead further on in x. Else, all exist, a vector from one another if taps > 1; none of
    this is used.
    """
    i = types.int64
    signature = types.void(i, sums, i, i, sums, i, i, i, sums, *[i] * 13, sums)

    def codegen(context, builder, sig, args):
        _call_compiled(builder, args[0], args[1:], _element(sig.args[1]).as_pointer())
        return context.get_dummy_value()

    return signature, codegen


# ---------------------------------------------------------------------------------------------------------------------
# Depthwise convolution of whole planes that are read where they lie
# ---------------------------------------------------------------------------------------------------------------------

# Rows of output that have their accumulators in registers: seven, since the planes of so many networks have 7, 14, 28,
# 56 and 112, or four, where that leaves fewer rows over.
PLANE_ROWS = (7, 4)
# Rows (and columns) of the filter, by stride. With stride 1, a weight of each row, and two vectors of seven rows of
# output, are in registers; with stride 2, the first half of one vector must hold what follows the last of a row.
PLANE_TAPS = {1: range(2, 16), 2: range(2, 6)}
# Those of the weight gradient: an accumulator for each, and the rows of the output gradient that share a row of input,
# are in registers. With 5 x 5 and 7 x 7, in several passes, it took 1.0 to 1.2 times as long as by channels.
GRADIENT_TAPS = {1: range(2, 5), 2: range(2, 4)}


def plane_shapes(t: Tile) -> tuple[tuple[int, int], ...]:
    """(lanes, vectors) of pieces of a row of output, by width."""
    return (t.lanes // 2, 1), (t.lanes, 1), (t.lanes, 2)


def plane_loads(lanes: int, vectors: int, taps: int, stride: int) -> list[int]:
    """Where the vectors that are loaded for a row of input begin, after what the first tap of the first lane meets."""
    if stride == 1:
        return [k + n * lanes for k in range(taps) for n in range(vectors)]
    return [n * lanes for n in range(2 * vectors + 1)]


def _correlate_planes_arguments(element: ir.Type) -> list[ir.Type]:
    pointer = element.as_pointer()
    return [
        _I64.as_pointer(), pointer, _I64, _I64, pointer, *[_I64] * 6, pointer, *[_I64] * 7, pointer, _I64, pointer,
        pointer, element,
    ]  # fmt: skip


def _ask_ahead(
    b: ir.IRBuilder, module: ir.Module, turn: ir.Value, x_ahead: ir.Value, inputs: int, y_ahead: ir.Value, outputs: int,
    writes: bool = True,
) -> None:  # fmt: skip
    """Ask for the turn-th `inputs` elements from x_ahead on, and `outputs` elements from y_ahead on; null is none.

    They go to the second nearest caches: what is being computed fills the nearest. With every line asked for there,
    too, rows of 112 took 1.5 times as long.
    """
    element = x_ahead.type.pointee
    line = 16 if isinstance(element, ir.FloatType) else 8  # elements

    def ask(_: list[ir.Value]) -> list[ir.Value]:
        for pointer, elements, write in ((x_ahead, inputs, False), (y_ahead, outputs, writes)):
            first = b.gep(pointer, [b.mul(turn, _i64(elements))])
            for n in range(0, elements, line):
                _prefetch(b, module, b.gep(first, [_i64(n)]), write, locality=2)
        return []

    _where(b, b.icmp_signed("!=", b.ptrtoint(x_ahead, _I64), _i64(0)), [], ask)


def _correlate_planes_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int, rows: int, lanes: int, vectors: int
) -> ir.Function:
    function, new = _internal(
        module, f"fastconv_correlate_planes_{element}_{taps}_{stride}_{rows}_{lanes}x{vectors}",
        _correlate_planes_arguments(element),
    )
    if not new:
        return function
    (
        piece, y, y_plane, y_row, x, x_plane, x_depth, x_row, first_row, height, depths, w, w_plane, w_depth, w_height,
        w_width, planes, count, _, bias, bias_step, x_ahead, y_ahead, least,
    ) = function.args  # fmt: skip
    for p in (piece, y, x, w, bias):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, lanes)
    zero = ir.Constant(vector, [0.0] * lanes)
    b = ir.IRBuilder(function.append_basic_block("entry"))

    def mask_at(place: ir.Value) -> ir.Value:
        bits = b.trunc(b.load(b.gep(piece, [place])), ir.IntType(lanes))
        return b.bitcast(bits, ir.VectorType(_I1, lanes))

    least = _splat(b, least, lanes)
    last = b.sub(count, _i64(rows))
    reached = stride * (rows - 1) + taps
    block = _Loop(b, "blocks", b.sdiv(b.add(count, _i64(rows - 1)), _i64(rows)), [])
    done = b.mul(block.k, _i64(rows))
    done = b.select(b.icmp_signed("<", done, last), done, last)  # the last block may overlap the one before
    first = b.add(first_row, b.mul(done, _i64(stride)))
    within = [b.icmp_unsigned("<", b.add(first, _i64(i)), height) for i in range(reached)]
    plane = _Loop(b, "planes", planes, [b.gep(x, [b.mul(x_row, first)]), b.gep(y, [b.mul(done, y_row)]), w, bias])
    x_plane_now, y_now, w_plane_now, bias_now = plane.values
    if stride == 1:  # with stride 2, four times as much to ask for gained nothing
        many = rows * lanes * vectors
        _ask_ahead(b, module, b.add(b.mul(block.k, planes), plane.k), x_ahead, many, y_ahead, many)
    loop = _Loop(b, "depths", depths, [x_plane_now, w_plane_now, *[zero] * (rows * vectors)])
    x_now, w_now, *sums = loop.values

    def weight(a: int, k: ir.Value) -> ir.Value:
        return _splat(b, b.load(b.gep(w_now, [b.add(b.mul(w_height, _i64(a)), b.mul(w_width, k))])), lanes)

    def load_row(start: ir.Value, masks: list[ir.Value]) -> list[ir.Value]:
        return [_load_lanes(b, module, b.gep(start, [_i64(n * lanes)]), m, vector) for n, m in enumerate(masks)]

    def each_row(sums: list[ir.Value], add_row) -> list[ir.Value]:
        """add_row(sums, offset of a row, the rows of output and of the filter that meet there) for each row there is.

        The branches also keep LLVM from loading more rows at once than there are registers for.
        """
        for i in range(reached):
            meeting = [(r, i - stride * r) for r in range(rows) if 0 <= i - stride * r < taps]
            if meeting:
                change = functools.partial(add_row, at=b.mul(x_row, _i64(i)), meeting=meeting)
                sums = _where(b, within[i], sums, change)
        return sums

    if stride == 1:  # one column of the filter after the other, so that its weights are in registers

        def add_column(sums: list[ir.Value], k: ir.Value) -> list[ir.Value]:
            x_tap, weights = b.gep(x_now, [k]), [weight(a, k) for a in range(taps)]
            entry = b.add(b.mul(k, _i64(vectors)), _i64(vectors))
            masks = [mask_at(b.add(entry, _i64(n))) for n in range(vectors)]

            def add_row(sums: list[ir.Value], at: ir.Value, meeting: list[tuple[int, int]]) -> list[ir.Value]:
                sums = list(sums)
                for n, value in enumerate(load_row(b.gep(x_tap, [at]), masks)):
                    for r, a in meeting:
                        m = r * vectors + n
                        sums[m] = _multiply_add(b, module, t.fma, weights[a], value, sums[m])
                return sums

            return each_row(sums, add_row)

        if taps <= 3:  # a loop took 1.1 to 1.2 times as long
            for k in range(taps):
                sums = add_column(sums, _i64(k))
        else:
            column = _Loop(b, "columns", _i64(taps), sums)
            sums = add_column(column.values, column.k)
            column.close(sums)
    else:  # one row of input after the other, so that its even and odd places are separated once
        masks = [mask_at(_i64(vectors + n)) for n in range(2 * vectors + 1)]
        few = taps * taps <= 9  # weights that fit into registers
        kept = {(a, k): weight(a, _i64(k)) for a in range(taps) for k in range(taps) if few}

        def add_row(sums: list[ir.Value], at: ir.Value, meeting: list[tuple[int, int]]) -> list[ir.Value]:
            sums = list(sums)
            found = [*load_row(b.gep(x_now, [at]), masks), ir.Constant(vector, ir.Undefined)]
            pairs = [_separate(b, *found[n : n + 2]) for n in range(0, len(found), 2)]
            for k in range(taps):
                values = [pair[k % 2] for pair in pairs]
                if k > 1:
                    shifted = ir.Constant(ir.VectorType(_I32, lanes), [k // 2 + n for n in range(lanes)])
                    values = [b.shuffle_vector(*neighbours, shifted) for neighbours in itertools.pairwise(values)]
                for r, a in meeting:
                    each = kept[a, k] if few else weight(a, _i64(k))
                    for n in range(vectors):
                        m = r * vectors + n
                        sums[m] = _multiply_add(b, module, t.fma, each, values[n], sums[m])
            return sums

        sums = each_row(sums, add_row)
    loop.close([b.gep(x_now, [x_depth]), b.gep(w_now, [w_depth]), *sums])

    added = _splat(b, b.load(bias_now), lanes)
    masks = [mask_at(_i64(n)) for n in range(vectors)]
    for m, value in enumerate(sums):
        r, n = divmod(m, vectors)
        value = b.fadd(value, added)
        value = b.select(b.fcmp_ordered("<", value, least), least, value)  # nan stays nan
        _store_lanes(b, module, value, b.gep(b.gep(y_now, [b.mul(y_row, _i64(r))]), [_i64(n * lanes)]), masks[n])
    plane.close([
        b.gep(p, [step]) for p, step in zip(plane.values, (x_plane, y_plane, w_plane, bias_step), strict=True)
    ])  # fmt: skip
    block.close([])
    b.ret_void()
    return function


def plane_kind(stride: int, shape: int, rows: int) -> int:
    """Stride, index in `plane_shapes` and rows of a function as one number."""
    return (stride * 16 + shape) * 16 + rows


def _correlate_planes_of_kind(module: ir.Module, element: ir.Type, t: Tile, taps: int, kind: int) -> ir.Function:
    stride, shape, rows = kind // 256, kind // 16 % 16, kind % 16
    return _correlate_planes_function(module, element, t, taps, stride, rows, *plane_shapes(t)[shape])


correlate_planes = _literal_function(_correlate_planes_of_kind, """What `call_correlate_planes` calls.""")


@intrinsic
def call_correlate_planes(
    typingctx, address, piece, y, y_plane, y_row, x, x_plane, x_depth, x_row, first_row, height, depths, w, w_plane,
    w_depth, w_height, w_width, planes, rows, y_rows, bias, bias_step, x_ahead, y_ahead, flags,
):  # fmt: skip
    """A piece of `rows` >= PLANE_ROWS[-1] rows of `planes` planes of output: y[r, q] = sum over d, h, k of w * x.

    `address` is that of a C function compiled from `correlate_planes` for these taps and this `plane_kind`, whose rows
    are at most `rows`. y[r, q] meets row first_row + stride * r + h of the input, whose rows are 0 to height - 1, and
    there x[stride * q + k]: x, y and w are where row 0, column 0 (which need not exist) and tap 0 of the first plane
    of each are; the pitches are those of plane, depth, row and column. `piece` has a mask for each vector of a row of
    output, and one for each of `plane_loads`: bits of the lanes that exist. What does not exist is left out if it is
    a row, and is zero if it is a lane; no memory of it is touched. All counts >= 1.
    The sum is one chain of multiply-adds for every element, whatever the rows and vectors: with stride 1 in the order
    of d, k, h, with stride 2 in that of d, h, k. Then `bias` is added, one number for each plane, and by `flags` RELU
    replaces what is below zero by zero. Meanwhile, if x_ahead is not null and the stride 1, as many cache lines as are
    read are asked for from there on, one after the other, and as many as are written from y_ahead on.

    Or, of a function from `spread_planes_by_two`, the input gradient with stride 2: `rows` >= PLANE_PAIRS counts pairs
    of rows of y, of which the first y_rows rows exist; a piece is a vector of pairs of columns, and has two masks for
    what is stored. Row 2p + f of y is the sum of the taps h of which f + parity - h is even, each at row first_row + p
    + (f + parity - h) / 2 of x; and the same for columns, without first_row. `depths` and its pitches are not used.
    """
    i, table = types.int64, types.CPointer(types.int64)
    signature = types.void(i, table, y, i, i, y, *[i] * 6, y, *[i] * 7, y, i, y, y, i)

    def codegen(context, builder, sig, args):
        element = _element(sig.args[2])
        *between, flags = args[1:]
        relu = builder.icmp_signed("!=", builder.and_(flags, _i64(RELU)), _i64(0))
        least = builder.select(relu, ir.Constant(element, 0.0), ir.Constant(element, -math.inf))
        _call_compiled(builder, args[0], [*between, least], element.as_pointer())
        return context.get_dummy_value()

    return signature, codegen


def _accumulate_planes_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, stride: int, lanes: int
) -> ir.Function:
    pointer, table = element.as_pointer(), _I64.as_pointer()
    function, new = _internal(
        module, f"fastconv_accumulate_planes_{element}_{taps}_{stride}_{lanes}",
        [table, pointer, _I64, pointer, *[_I64] * 3, pointer, *[_I64] * 3, pointer, *[_I64] * 5, pointer, pointer],
    )  # fmt: skip
    if not new:
        return function
    (
        piece, sums, sums_plane, dy, dy_plane, dy_run, dy_row, x, x_plane, x_run, x_row, zeros, first_row, height,
        planes, runs, count, x_ahead, dy_ahead,
    ) = function.args  # fmt: skip
    for p in (piece, sums, dy, x, zeros):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, lanes)
    zero = ir.Constant(vector, [0.0] * lanes)
    window = -(-taps // stride)
    b = ir.IRBuilder(function.append_basic_block("entry"))

    def mask_at(place: int) -> ir.Value:
        bits = b.trunc(b.load(b.gep(piece, [_i64(place)])), ir.IntType(lanes))
        return b.bitcast(bits, ir.VectorType(_I1, lanes))

    exists, places = mask_at(0), plane_loads(lanes, 1, taps, stride)
    masks = [mask_at(1 + n) for n in range(len(places))]
    plane = _Loop(b, "planes", planes, [sums, dy, x])
    sums_now, dy_plane_now, x_plane_now = plane.values
    targets = [b.gep(sums_now, [_i64(n * t.lanes)]) for n in range(taps * taps)]
    run = _Loop(b, "runs", runs, [dy_plane_now, x_plane_now, *(_load(b, target, vector) for target in targets)])
    dy_now, x_now, *totals = run.values

    def load_row(at: ir.Value) -> list[ir.Value]:
        """What each column of the filter meets; zeros in lanes that do not exist, since infinity times zero is nan."""
        loads = [_load_lanes(b, module, b.gep(at, [_i64(n)]), m, vector) for n, m in zip(places, masks, strict=True)]
        if stride == 1:
            return loads
        pairs = _separate(b, *loads[:2]), _separate(b, loads[2], ir.Constant(vector, ir.Undefined))
        values = []
        for k in range(taps):
            shifted = ir.Constant(ir.VectorType(_I32, lanes), [k // 2 + n for n in range(lanes)])
            value = b.shuffle_vector(pairs[0][k % 2], pairs[1][k % 2], shifted) if k > 1 else pairs[0][k]
            values.append(b.select(exists, value, zero))
        return values

    def step(j: ir.Value, gradients: dict[int, ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        """Rows stride * j + n, n < stride, of the input, with rows j - m of the output gradient, gradients[m]."""
        totals = list(totals)
        for n in range(stride):
            meeting = [(value, stride * m + n) for m, value in gradients.items() if stride * m + n < taps]
            if not meeting:
                continue
            at = b.add(first_row, b.add(b.mul(j, _i64(stride)), _i64(n)))
            start = b.select(b.icmp_unsigned("<", at, height), b.gep(x_now, [b.mul(at, x_row)]), zeros)
            for k, value in enumerate(load_row(start)):
                for gradient, a in meeting:
                    totals[a * taps + k] = _multiply_add(b, module, t.fma, gradient, value, totals[a * taps + k])
        return totals

    def load_gradient(j: ir.Value) -> ir.Value:
        return _load_lanes(b, module, b.gep(dy_now, [b.mul(j, dy_row)]), exists, vector)

    held: list[ir.Value] = []  # the last rows of the output gradient, the newest first
    for j in range(window - 1):
        held = [load_gradient(_i64(j)), *held]
        totals = step(_i64(j), dict(enumerate(held)), totals)
    main = _Loop(b, "rows", b.sub(count, _i64(window - 1)), [*held, *totals])
    held, totals = main.values[: window - 1], main.values[window - 1 :]
    j = b.add(main.k, _i64(window - 1))
    _ask_ahead(b, module, main.k, x_ahead, stride * stride * lanes, dy_ahead, lanes, False)
    held = [load_gradient(j), *held]
    totals = step(j, dict(enumerate(held)), totals)
    held = held[: window - 1]
    main.close([*held, *totals])
    for n in range(window - 1):
        totals = step(b.add(count, _i64(n)), {m: held[m - n - 1] for m in range(n + 1, window)}, totals)
    run.close([b.gep(dy_now, [dy_run]), b.gep(x_now, [x_run]), *totals])
    for value, target in zip(totals, targets, strict=True):
        _store(b, value, target)
    plane.close([
        b.gep(p, [step]) for p, step in zip(plane.values, (sums_plane, dy_plane, x_plane), strict=True)
    ])  # fmt: skip
    b.ret_void()
    return function


def _accumulate_planes_of_kind(module: ir.Module, element: ir.Type, t: Tile, taps: int, kind: int) -> ir.Function:
    return _accumulate_planes_function(module, element, t, taps, kind // 256, plane_shapes(t)[kind // 16 % 16][0])


accumulate_planes = _literal_function(_accumulate_planes_of_kind, """What `call_accumulate_planes` calls.""")


@intrinsic
def call_accumulate_planes(
    typingctx, address, piece, sums, sums_plane, dy, dy_plane, dy_run, dy_row, x, x_plane, x_run, x_row, zeros,
    first_row, height, planes, runs, rows, x_ahead, dy_ahead,
):  # fmt: skip
    """sums[h, k] += sum over q of dy[r, q] * x[stride * r + h, stride * q + k], of a piece of `rows` rows of `planes`
    planes, each of `runs` runs (samples, or planes of the depth).

    As for `call_correlate_planes`, from `accumulate_planes`, with pieces of one vector; and rows of input that do not
    exist are read from `zeros`, which is row 0 where they begin, since zero times an infinite gradient is nan. Each of
    the sums is a vector of partial sums, which `sum_lanes` adds up. rows >= taps / stride, rounded up. If x_ahead
    is not null, as many cache lines as each run reads are asked for meanwhile, from there and from dy_ahead on.
    """
    i, table = types.int64, types.CPointer(types.int64)
    signature = types.void(i, table, sums, i, sums, i, i, i, sums, i, i, i, sums, i, i, i, i, i, sums, sums)

    def codegen(context, builder, sig, args):
        _call_compiled(builder, args[0], args[1:], _element(sig.args[2]).as_pointer())
        return context.get_dummy_value()

    return signature, codegen


PLANE_PAIRS = 4  # pairs of rows of an input gradient with stride 2 at once: 16 accumulators
SPREAD_TAPS = range(2, 8)  # two columns of weights are in registers as well


def spread_shifts(taps: int, parity: int) -> dict[int, list[tuple[int, int]]]:
    """By the distance of an output gradient from a pair of elements: (tap, element of the pair) that meet there."""
    shifts: dict[int, list[tuple[int, int]]] = {}
    for tap in range(taps):
        phase = (tap - parity) % 2
        shifts.setdefault((phase + parity - tap) // 2, []).append((tap, phase))
    return dict(sorted(shifts.items()))


def _spread_planes_function(
    module: ir.Module, element: ir.Type, t: Tile, taps: int, parity: int, lanes: int
) -> ir.Function:
    function, new = _internal(
        module, f"fastconv_spread_planes_{element}_{taps}_{parity}_{lanes}", _correlate_planes_arguments(element)
    )
    if not new:
        return function
    (
        piece, y, y_plane, y_row, x, x_plane, _, x_row, first_row, height, _, w, w_plane, _, w_height, w_width, planes,
        count, y_rows, bias, bias_step, x_ahead, y_ahead, least,
    ) = function.args  # fmt: skip
    for p in (piece, y, x, w, bias):
        p.add_attribute("noalias")
    vector = ir.VectorType(element, lanes)
    zero = ir.Constant(vector, [0.0] * lanes)
    shifts = spread_shifts(taps, parity)
    b = ir.IRBuilder(function.append_basic_block("entry"))

    def mask_at(place: int) -> ir.Value:
        bits = b.trunc(b.load(b.gep(piece, [_i64(place)])), ir.IntType(lanes))
        return b.bitcast(bits, ir.VectorType(_I1, lanes))

    stored = [mask_at(0), mask_at(1)]
    masks = {shift: mask_at(2 + n) for n, shift in enumerate(shifts)}
    least = _splat(b, least, lanes)
    last = b.sub(count, _i64(PLANE_PAIRS))
    block = _Loop(b, "blocks", b.sdiv(b.add(count, _i64(PLANE_PAIRS - 1)), _i64(PLANE_PAIRS)), [])
    done = b.mul(block.k, _i64(PLANE_PAIRS))
    done = b.select(b.icmp_signed("<", done, last), done, last)  # the last block may overlap the one before
    first = b.add(first_row, done)
    rows = range(min(shifts), PLANE_PAIRS + max(shifts))
    within = {i: b.icmp_unsigned("<", b.add(first, _i64(i)), height) for i in rows}
    exists = [b.icmp_signed("<", b.add(b.mul(done, _i64(2)), _i64(r)), y_rows) for r in range(2 * PLANE_PAIRS)]
    begin = b.gep(x, [b.mul(x_row, first)]), b.gep(y, [b.mul(b.mul(done, _i64(2)), y_row)])
    plane = _Loop(b, "planes", planes, [*begin, w, bias])
    x_now, y_now, w_now, bias_now = plane.values
    turn, pairs = b.add(b.mul(block.k, planes), plane.k), PLANE_PAIRS * lanes
    _ask_ahead(b, module, turn, x_ahead, pairs, y_ahead, 4 * pairs)
    sums = [zero] * (4 * PLANE_PAIRS)  # of each row its even columns, and its odd ones
    for shift, columns in shifts.items():
        weights = {
            (a, k): _splat(b, b.load(b.gep(w_now, [b.add(b.mul(w_height, _i64(a)), b.mul(w_width, _i64(k)))])), lanes)
            for a in range(taps)
            for k, _ in columns
        }

        def add_row(sums: list[ir.Value], i: int, shift=shift, columns=columns, weights=weights) -> list[ir.Value]:
            sums = list(sums)
            at = b.gep(x_now, [b.add(b.mul(x_row, _i64(i)), _i64(shift))])
            value = _load_lanes(b, module, at, masks[shift], vector)
            for distance, meeting in shifts.items():
                pair = i - distance
                if not 0 <= pair < PLANE_PAIRS:
                    continue
                for a, f in meeting:
                    for k, g in columns:
                        n = 4 * pair + 2 * f + g
                        sums[n] = _multiply_add(b, module, t.fma, weights[a, k], value, sums[n])
            return sums

        for i in rows:
            sums = _where(b, within[i], sums, functools.partial(add_row, i=i))
    added = _splat(b, b.load(bias_now), lanes)

    def store(_: list[ir.Value], row: int) -> list[ir.Value]:
        target = b.gep(y_now, [b.mul(y_row, _i64(row))])
        values = []
        for value in sums[2 * row : 2 * row + 2]:
            value = b.fadd(value, added)
            values.append(b.select(b.fcmp_ordered("<", value, least), least, value))  # nan stays nan
        for n, value in enumerate(_interleave(b, *values)):
            _store_lanes(b, module, value, b.gep(target, [_i64(n * lanes)]), stored[n])
        return []

    for row in range(2 * PLANE_PAIRS):
        _where(b, exists[row], [], functools.partial(store, row=row))
    plane.close([
        b.gep(p, [step]) for p, step in zip(plane.values, (x_plane, y_plane, w_plane, bias_step), strict=True)
    ])  # fmt: skip
    block.close([])
    b.ret_void()
    return function


def _spread_planes_of_kind(module: ir.Module, element: ir.Type, t: Tile, taps: int, kind: int) -> ir.Function:
    return _spread_planes_function(module, element, t, taps, kind // 256, plane_shapes(t)[kind // 16 % 16][0])


spread_planes_by_two = _literal_function(_spread_planes_of_kind, """What `call_correlate_planes` may call.""")
