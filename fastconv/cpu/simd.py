"""All LLVM of the package: the vector tile of this machine, the microkernels, and vector copies.

Plain scalar loops do not keep a block of accumulators in vector registers; the functions here do, because they are
written as LLVM vectors. They are generated for any element type, number of lanes, rows and vectors, as functions of
their own (noinline, internal), and reach Numba code as intrinsics on typed pointers, which carry the element type.

A *pointer* here is Numba's ``CPointer(float32)`` or ``CPointer(float64)``: indexing it neither wraps around nor checks.
"""

from __future__ import annotations

import functools
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
