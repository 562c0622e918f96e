"""A typed layer over LLVM's instructions, in which vector kernels read as loops.

Two kinds of loop stand side by side:

    for i in range(rows):            Python's: written out while the kernel is generated
    for k in e.range(depth, sums):   the machine's: one block of code, run `depth` >= 1 times, that carries `sums`

Everything is a typed value with operators (`Int`, `Bool`, `Real`, `Vec`, `Mask`, `Ptr`), so ``panel + k * columns`` is
a pointer, ``(panel + k * columns).vector()`` a load and ``fma(w, x, total)`` a multiply-add. Values never change. What
changes in a machine's loop or branch is a `Block` of values (``sums[i, j] = ...``) or a `Var` (``at.value += pitch``)
that is named as carried. Nothing here is particular to convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, Protocol, TypeVar

from llvmlite import ir

from .tile import Tile

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


class Carried(Protocol):
    """What a machine's loop or branch may change."""

    values: list[Any]


@dataclass
class Emitter:
    """Where a kernel is written: the end of a function, the type of its elements, the vectors of the machine."""

    builder: ir.IRBuilder
    element: ir.Type
    tile: Tile

    @property
    def module(self) -> ir.Module:
        return self.builder.module

    @property
    def lanes(self) -> int:
        return self.tile.lanes

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 4 if self.element == F32 else 8

    # -- constants ----------------------------------------------------------------------------------------------------

    def number(self, n: int | Int) -> Int:
        return n if isinstance(n, Int) else Int(self, ir.Constant(I64, n))

    def real(self, x: float) -> Real:
        return Real(self, ir.Constant(self.element, x))

    def constant(self, x: float, lanes: int | None = None) -> Vec:
        """A vector of the same number in every lane."""
        lanes = lanes or self.lanes
        return Vec(self, ir.Constant(ir.VectorType(self.element, lanes), [float(x)] * lanes))

    def constants(self, values: Sequence[float]) -> Vec:
        """A vector of these numbers."""
        return Vec(self, ir.Constant(ir.VectorType(self.element, len(values)), [float(x) for x in values]))

    def zero(self, lanes: int | None = None) -> Vec:
        return self.constant(0.0, lanes)

    def zeros(self, *shape: int, lanes: int | None = None) -> Block:
        return Block(shape, [self.zero(lanes) for _ in range(math.prod(shape))])

    def undefined(self, lanes: int | None = None) -> Vec:
        return Vec(self, ir.Constant(ir.VectorType(self.element, lanes or self.lanes), ir.Undefined))

    # -- masks --------------------------------------------------------------------------------------------------------

    def mask(self, count: Int, lanes: int | None = None) -> Mask:
        """The first `count` lanes of a vector; none if that is negative, all from `lanes` on."""
        return self.mask_of_bits(self.lane_bits(count, lanes), lanes)

    def lane_bits(self, count: Int, lanes: int | None = None) -> Int:
        """The bits of the first `count` lanes of a vector; none if that is negative."""
        lanes = lanes or self.lanes
        count = (count < 0).choose(self.number(0), count)
        count = (count > lanes).choose(self.number(lanes), count)
        return (self.number(1) << count) - 1

    def mask_of_bits(self, bits: Int, lanes: int | None = None) -> Mask:
        """The lanes whose bits are set."""
        lanes, b = lanes or self.lanes, self.builder
        return Mask(self, b.bitcast(b.trunc(bits.ir, ir.IntType(lanes)), ir.VectorType(I1, lanes)))

    def mask_of(self, lanes: Sequence[bool]) -> Mask:
        """A mask that is known."""
        return Mask(self, ir.Constant(ir.VectorType(I1, len(lanes)), [int(each) for each in lanes]))

    # -- loops and branches -------------------------------------------------------------------------------------------

    def range(self, stop: Int | int, *carried: Carried) -> Iterator[Int]:
        """The machine's loop: yields its index once, for the one block of code that is run `stop` >= 1 times.

        What `carried` hold when the block ends is what they hold when it begins again.
        """
        b, stop = self.builder, self.number(stop)
        before, head, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(head)
        b.position_at_end(head)
        k = b.phi(I64)
        k.add_incoming(ir.Constant(I64, 0), before)
        phis = []
        for each in carried:
            for n, value in enumerate(each.values):
                phi = b.phi(value.ir.type)
                phi.add_incoming(value.ir, before)
                phis.append(phi)
                each.values[n] = value.like(phi)
        yield Int(self, k)
        following = b.add(k, ir.Constant(I64, 1))
        k.add_incoming(following, b.block)
        for phi, value in zip(phis, itertools.chain(*(each.values for each in carried)), strict=True):
            phi.add_incoming(value.ir, b.block)
        b.cbranch(b.icmp_signed("<", following, stop.ir), head, done)
        b.position_at_end(done)

    def when(self, condition: Bool, *changed: Carried) -> Iterator[None]:
        """``for _ in e.when(condition, x)``: what follows runs if the condition holds; `x` may change in it."""
        for yes in self.branch(condition, *changed):
            if yes:
                yield

    def branch(self, condition: Bool, *changed: Carried) -> Iterator[bool]:
        """``for yes in e.branch(condition, x)``: yields True to write what is done if it holds, then False for else."""
        b = self.builder
        inside, otherwise, after = (b.append_basic_block(name) for name in ("then", "else", "after"))
        b.cbranch(condition.ir, inside, otherwise)
        yield from self._alternatives({True: inside, False: otherwise}, after, changed)

    def switch(self, value: Int, cases: Sequence[int], *changed: Carried) -> Iterator[int | None]:
        """Yields each of the cases, to write what is done if `value` is it, then None, for any other value."""
        b = self.builder
        blocks: dict[int | None, Any] = {case: b.append_basic_block(f"case_{case}") for case in cases}
        blocks[None], after = b.append_basic_block("no_case"), b.append_basic_block("after")
        switch = b.switch(value.ir, blocks[None])
        for case in cases:
            switch.add_case(ir.Constant(I64, case), blocks[case])
        yield from self._alternatives(blocks, after, changed)

    def _alternatives(self, blocks: dict[Any, Any], after: Any, changed: Sequence[Carried]) -> Iterator[Any]:
        """Yield each key with the builder in its block; then go on at `after`, with what they left in `changed`."""
        b = self.builder
        before = [list(each.values) for each in changed]
        ends = []
        for key, block in blocks.items():
            b.position_at_end(block)
            for each, values in zip(changed, before, strict=True):
                each.values[:] = values
            yield key
            if not b.block.is_terminated:  # else the function has returned there
                ends.append((b.block, [value for each in changed for value in each.values]))
                b.branch(after)
        b.position_at_end(after)
        places = [(each, n) for each in changed for n in range(len(each.values))]
        for place, (each, n) in enumerate(places):
            phi = b.phi(before[changed.index(each)][n].ir.type)
            for block, values in ends:
                phi.add_incoming(values[place].ir, block)
            each.values[n] = each.values[n].like(phi)

    def ret(self, value: Value | None = None) -> None:
        """Return from the function."""
        if value is None:
            self.builder.ret_void()
        else:
            self.builder.ret(value.ir)

    # -- LLVM's own functions -----------------------------------------------------------------------------------------

    def llvm(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call the function of this name that LLVM has."""
        kind = ir.FunctionType(result, [each.type for each in arguments])
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.builder.call(function, arguments)


@dataclass(frozen=True, eq=False)
class Value:
    """Something in a register."""

    e: Emitter
    ir: Any

    def like(self, value: Any) -> Any:
        """Another value of this kind."""
        return type(self)(self.e, value)


class Bool(Value):
    def __and__(self, other: Bool) -> Bool:
        return Bool(self.e, self.e.builder.and_(self.ir, other.ir))

    def __or__(self, other: Bool) -> Bool:
        return Bool(self.e, self.e.builder.or_(self.ir, other.ir))

    def choose(self, yes: Any, no: Any) -> Any:
        """`yes` if it holds, else `no`: both are computed."""
        return yes.like(self.e.builder.select(self.ir, yes.ir, no.ir))

    def broadcast(self, lanes: int | None = None) -> Mask:
        return Mask(self.e, _broadcast(self.e.builder, self.ir, lanes or self.e.lanes))


class Int(Value):
    """64 bits; comparisons and quotients are those of signed numbers."""

    def _with(self, operation: str, other: Int | int) -> Int:
        return Int(self.e, getattr(self.e.builder, operation)(self.ir, self.e.number(other).ir))

    def _compared(self, sign: str, other: Int | int) -> Bool:
        return Bool(self.e, self.e.builder.icmp_signed(sign, self.ir, self.e.number(other).ir))

    def __add__(self, other: Int | int) -> Int:
        return self._with("add", other)

    def __radd__(self, other: int) -> Int:
        return self.e.number(other) + self

    def __sub__(self, other: Int | int) -> Int:
        return self._with("sub", other)

    def __rsub__(self, other: int) -> Int:
        return self.e.number(other) - self

    def __mul__(self, other: Int | int) -> Int:
        return self._with("mul", other)

    def __rmul__(self, other: int) -> Int:
        return self.e.number(other) * self

    def quotient(self, other: Int | int) -> Int:
        """Rounded towards zero, unlike Python's ``//``."""
        return self._with("sdiv", other)

    def remainder(self, other: Int | int) -> Int:
        return self._with("srem", other)

    def __and__(self, other: Int | int) -> Int:
        return self._with("and_", other)

    def __lshift__(self, other: Int | int) -> Int:
        return self._with("shl", other)

    def __rshift__(self, other: Int | int) -> Int:
        """Zeros come in from the left."""
        return self._with("lshr", other)

    def __lt__(self, other: Int | int) -> Bool:
        return self._compared("<", other)

    def __le__(self, other: Int | int) -> Bool:
        return self._compared("<=", other)

    def __gt__(self, other: Int | int) -> Bool:
        return self._compared(">", other)

    def __ge__(self, other: Int | int) -> Bool:
        return self._compared(">=", other)

    def equals(self, other: Int | int) -> Bool:
        return self._compared("==", other)

    def differs(self, other: Int | int) -> Bool:
        return self._compared("!=", other)

    def below(self, other: Int | int) -> Bool:
        """0 <= self < other, in one comparison, for other >= 0."""
        return Bool(self.e, self.e.builder.icmp_unsigned("<", self.ir, self.e.number(other).ir))

    def has(self, flag: int) -> Bool:
        """Is a bit of `flag` set?"""
        return (self & flag).differs(0)

    def at_most(self, other: Int | int) -> Int:
        """The smaller of the two."""
        other = self.e.number(other)
        return (self < other).choose(self, other)

    def blocks_of(self, n: int) -> Int:
        """How many blocks of n that is, the last one perhaps not full; for self >= 0."""
        return (self + (n - 1)).quotient(n)


class Real(Value):
    """A number of the kernel's floating-point type, or of float64."""

    def broadcast(self, lanes: int | None = None) -> Vec:
        return Vec(self.e, _broadcast(self.e.builder, self.ir, lanes or self.e.lanes))

    def __add__(self, other: Real) -> Real:
        return Real(self.e, self.e.builder.fadd(self.ir, other.ir))


class Mask(Value):
    """A bit for each lane."""

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.e, self.e.builder.and_(self.ir, other.ir))

    def choose(self, yes: Vec, no: Vec) -> Vec:
        """`yes` in the lanes of the mask, `no` in the others."""
        return yes.like(self.e.builder.select(self.ir, yes.ir, no.ir))

    def bits(self) -> Int:
        b = self.e.builder
        return Int(self.e, b.zext(b.bitcast(self.ir, ir.IntType(self.ir.type.count)), I64))


class Vec(Value):
    @property
    def lanes(self) -> int:
        return self.ir.type.count

    def _with(self, operation: str, other: Vec) -> Vec:
        return Vec(self.e, getattr(self.e.builder, operation)(self.ir, other.ir))

    def __add__(self, other: Vec) -> Vec:
        return self._with("fadd", other)

    def __sub__(self, other: Vec) -> Vec:
        return self._with("fsub", other)

    def __mul__(self, other: Vec) -> Vec:
        return self._with("fmul", other)

    def __lt__(self, other: Vec) -> Mask:
        """False where one is nan."""
        return Mask(self.e, self.e.builder.fcmp_ordered("<", self.ir, other.ir))

    def __gt__(self, other: Vec) -> Mask:
        """False where one is nan."""
        return Mask(self.e, self.e.builder.fcmp_ordered(">", self.ir, other.ir))

    def differs(self, other: Vec) -> Mask:
        """True where one is nan."""
        return Mask(self.e, self.e.builder.fcmp_unordered("!=", self.ir, other.ir))

    def is_nan(self) -> Mask:
        return Mask(self.e, self.e.builder.fcmp_unordered("uno", self.ir, self.ir))

    def at_least(self, least: Vec) -> Vec:
        """The larger of the two in each lane, in which nan stays nan."""
        return (self < least).choose(least, self)

    def relu(self) -> Vec:
        """max(x, 0), in which nan stays nan."""
        return self.at_least(self.e.zero(self.lanes))

    def pick(self, lanes: Sequence[int], other: Vec | None = None) -> Vec:
        """The lanes of these numbers, of self followed by `other` (by itself again, if there is none)."""
        second = self if other is None else other
        numbers = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return Vec(self.e, self.e.builder.shuffle_vector(self.ir, second.ir, numbers))

    @property
    def suffix(self) -> str:
        """What LLVM appends to the names of its functions for this type."""
        return f"v{self.lanes}f32" if self.ir.type.element == F32 else f"v{self.lanes}f64"

    def halves(self) -> tuple[Vec, Vec]:
        n, none = self.lanes, Vec(self.e, ir.Constant(self.ir.type, ir.Undefined))
        return self.pick(range(n // 2), none), self.pick(range(n // 2, n), none)

    def widened(self) -> Vec:
        """In float64."""
        wide = ir.VectorType(F64, self.lanes)
        return self if self.ir.type == wide else Vec(self.e, self.e.builder.fpext(self.ir, wide))

    def as_integers(self) -> IntVec:
        """The bits of the elements."""
        kind = ir.VectorType(I32 if self.ir.type.element == F32 else I64, self.lanes)
        return IntVec(self.e, self.e.builder.bitcast(self.ir, kind))

    def __getitem__(self, lane: int) -> Real:
        return Real(self.e, self.e.builder.extract_element(self.ir, ir.Constant(I32, lane)))


class IntVec(Value):
    """A vector of integers of as many bits as the elements."""

    def _with(self, operation: str, other: IntVec | int) -> IntVec:
        kind = self.ir.type
        second = other.ir if isinstance(other, IntVec) else ir.Constant(kind, [other] * kind.count)
        return IntVec(self.e, getattr(self.e.builder, operation)(self.ir, second))

    def __sub__(self, other: IntVec | int) -> IntVec:
        return self._with("sub", other)

    def __lshift__(self, other: int) -> IntVec:
        return self._with("shl", other)

    def __rshift__(self, other: int) -> IntVec:
        """Zeros come in from the left."""
        return self._with("lshr", other)

    def as_numbers(self) -> Vec:
        """The elements that have these bits."""
        kind = F32 if self.ir.type.element == I32 else F64
        return Vec(self.e, self.e.builder.bitcast(self.ir, ir.VectorType(kind, self.ir.type.count)))


class Ptr(Value):
    """Elements in memory: `p + n` is n elements on, `p[n]` an element, `p.vector()` the vector that begins here."""

    @property
    def element(self) -> ir.Type:
        return self.ir.type.pointee

    def __add__(self, n: Int | int) -> Any:
        return self.like(self.e.builder.gep(self.ir, [self.e.number(n).ir]))

    def __getitem__(self, n: Int | int) -> Any:
        return (Int if self.element == I64 else Real)(self.e, self.e.builder.load((self + n).ir))

    def __setitem__(self, n: Int | int, value: Int | Real) -> None:
        self.e.builder.store(value.ir, (self + n).ir)

    def _as_vector(self, lanes: int | None) -> Any:
        return self.e.builder.bitcast(self.ir, ir.VectorType(self.element, lanes or self.e.lanes).as_pointer())

    def vector(self, lanes: int | None = None, mask: Mask | None = None, otherwise: float | Vec = 0.0) -> Vec:
        """The vector that begins here; with a mask its lanes, and `otherwise` in the others, which are not read."""
        e = self.e
        if mask is None:
            value = e.builder.load(self._as_vector(lanes))
            value.align = 4
            return Vec(e, value)
        lanes = mask.ir.type.count
        rest = otherwise if isinstance(otherwise, Vec) else e.constant(otherwise, lanes)
        name = f"llvm.masked.load.{rest.suffix}.p0"
        place = self._as_vector(lanes)
        return Vec(e, e.llvm(name, rest.ir.type, place, ir.Constant(I32, 4), mask.ir, rest.ir))

    def store(self, value: Vec, mask: Mask | None = None) -> None:
        """Store the vector here; with a mask its lanes alone."""
        e, place = self.e, self.e.builder.bitcast(self.ir, value.ir.type.as_pointer())
        if mask is None:
            e.builder.store(value.ir, place).align = 4
        else:
            name = f"llvm.masked.store.{value.suffix}.p0"
            e.llvm(name, ir.VoidType(), value.ir, place, ir.Constant(I32, 4), mask.ir)

    def store_past_cache(self, value: Vec) -> None:
        """Store a whole vector at a multiple of its size, without reading its cache line first."""
        e = self.e
        store = e.builder.store(value.ir, e.builder.bitcast(self.ir, value.ir.type.as_pointer()))
        store.align = value.lanes * e.size
        store.set_metadata("nontemporal", e.module.add_metadata([ir.Constant(I32, 1)]))

    def prefetch(self, write: bool = False, locality: int = 3) -> None:
        """Ask for the cache line of this address, which need not be one that can be read.

        `locality` is LLVM's: 3 is into all caches, 2 is not into the nearest one.
        """
        e = self.e
        place = e.builder.bitcast(self.ir, I8.as_pointer())
        options = [ir.Constant(I32, n) for n in (int(write), locality, 1)]
        e.llvm("llvm.prefetch.p0", ir.VoidType(), place, *options)

    def address(self) -> Int:
        return Int(self.e, self.e.builder.ptrtoint(self.ir, I64))

    def opaque(self) -> Any:
        """The same pointer, of which LLVM does not know where it comes from."""
        kind = ir.FunctionType(self.ir.type, [self.ir.type])
        return self.like(self.e.builder.asm(kind, "", "=r,0", [self.ir], False))


class Ints(Ptr):
    """A table of integers."""


class Doubles(Ptr):
    """Numbers of float64, whatever the type of the kernel."""


class Double(Real):
    """A number of float64, whatever the type of the kernel."""


R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Fields(Value, Generic[R]):
    """A record of integers in memory: the annotation is ``steps: Fields[Steps]``."""

    record: Any

    def load(self) -> Any:
        """All of its fields, as values with their names; in memory they need no longer stay the same."""
        words = {name: offset // 8 for name, (offset, _) in self.record.fields.items()}
        memory = Ints(self.e, self.ir)
        return SimpleNamespace(**{name: memory[word] for name, word in words.items()})


class Block:
    """Values by index, which a machine's loop may carry: ``sums[i, j]``."""

    def __init__(self, shape: tuple[int, ...], values: Sequence[Any]) -> None:
        self.shape, self.values = shape, list(values)

    @classmethod
    def of(cls, values: Sequence[Any]) -> Block:
        """One index."""
        return cls((len(values),), values)

    def _place(self, index: int | tuple[int, ...]) -> int:
        place = 0
        for n, i in zip(self.shape, index if isinstance(index, tuple) else (index,), strict=True):
            place = place * n + i
        return place

    def __getitem__(self, index: int | tuple[int, ...]) -> Any:
        return self.values[self._place(index)]

    def __setitem__(self, index: int | tuple[int, ...], value: Any) -> None:
        self.values[self._place(index)] = value

    def indices(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.shape))


class Var:
    """One value that a machine's loop may carry: ``at.value += pitch``."""

    def __init__(self, value: Any) -> None:
        self.values = [value]

    @property
    def value(self) -> Any:
        return self.values[0]

    @value.setter
    def value(self, value: Any) -> None:
        self.values[0] = value


def _broadcast(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(scalar.type, lanes)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    every = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), every)


def fma(x: Vec, y: Vec, z: Vec) -> Vec:
    """x * y + z, rounded once where the machine can."""
    e = x.e
    if not e.tile.fma:
        return x * y + z
    return Vec(e, e.llvm(f"llvm.fma.{x.suffix}", x.ir.type, x.ir, y.ir, z.ir))


def interleave(x: Vec, y: Vec) -> tuple[Vec, Vec]:
    """x0 y0 x1 y1 ..., as two vectors."""
    n = x.lanes
    low, high = ([k // 2 + start + k % 2 * n for k in range(n)] for start in (0, n // 2))
    return x.pick(low, y), x.pick(high, y)


def separate(x: Vec, y: Vec) -> tuple[Vec, Vec]:
    """The elements at even and at odd places of x followed by y: the reverse of `interleave`."""
    n = x.lanes
    return x.pick([2 * k for k in range(n)], y), x.pick([2 * k + 1 for k in range(n)], y)


def transposed(rows: Sequence[Vec]) -> list[Vec]:
    """As many vectors as they have lanes, as the rows of a matrix, transposed; of fewer each block of as many lanes."""
    rows, n = list(rows), rows[0].lanes
    step = len(rows) // 2
    while step:  # exchange the off-diagonal blocks of size `step` within each pair of blocks
        for i in range(len(rows)):
            if not i & step:
                x, y = rows[i], rows[i + step]
                rows[i] = x.pick([k if not k & step else n + k - step for k in range(n)], y)
                rows[i + step] = x.pick([k + step if not k & step else n + k for k in range(n)], y)
        step //= 2
    return rows


def reduced(values: Sequence[Vec], combine: Callable[[Vec, Vec], Vec]) -> Real:
    """All lanes of a power of two of vectors combined into one number, always in the same order."""
    values = list(values)
    while len(values) > 1:
        values = [combine(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
    value = values[0]
    while value.lanes > 1:
        value = combine(*value.halves())
    return value[0]
