"""Pointers in compiled code: Numba's ``CPointer``, whose indexing neither wraps around nor checks."""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I64, ir
from .tile import tile_of


@intrinsic
def at(typingctx, like, address):
    """The pointer to `address`, an integer, of the type of the pointer `like`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return like(like, types.int64), codegen


@intrinsic
def integers_at(typingctx, address):
    """The pointer to the table of integers at `address`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def offset(typingctx, pointer, elements):
    """The pointer `elements` further on."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic
def pointer_address(typingctx, pointer):
    """The address a pointer holds, as an integer."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], I64)

    return types.int64(pointer), codegen


@intrinsic
def given(typingctx, pointer):
    """Is the pointer not null?"""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), codegen


@intrinsic
def rounded(typingctx, value, like):
    """The float64 `value` in the floating-point type that the pointer `like` points to."""

    def codegen(context, builder, sig, args):
        return context.cast(builder, args[0], types.float64, like.dtype)

    return like.dtype(types.float64, like), codegen


@intrinsic
def out_of_line(typingctx):
    """First in a helper of a body: it is not inlined into each of its callers. LLVM makes vectors of its loops."""

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def no_inline(typingctx):
    """First in a helper of a body: it is not inlined, and its loops are neither vectorised nor unrolled by LLVM.

    For everything but the innermost loops, which are written as vectors: without it a first convolution takes 0.8 s
    longer, and later ones as long.
    """

    def codegen(context, builder, sig, args):
        builder.function.attributes.add("noinline")
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fetch_add(typingctx, pointer, amount):
    """Add to the integer at `pointer` as one step that no other thread can interrupt; return what it held."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


@intrinsic
def fill_zero(typingctx, target, elements):
    """Write `elements` zeros."""

    def codegen(context, builder, sig, args):
        size = builder.mul(args[1], ir.Constant(I64, sig.args[0].dtype.bitwidth // 8))
        cgutils.memset(builder, args[0], size, 0)
        return context.get_dummy_value()

    return types.void(target, types.int64), codegen


@intrinsic
def copy_vector(typingctx, target, source):
    """Copy one vector."""

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(args[0].type.pointee, tile_of(sig.args[0]).lanes).as_pointer()
        value = builder.load(builder.bitcast(args[1], kind))
        value.align = 4
        builder.store(value, builder.bitcast(args[0], kind)).align = 4
        return context.get_dummy_value()

    return types.void(target, target), codegen
