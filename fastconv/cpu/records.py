"""Records: blocks of parameters with names, which Python fills and compiled code reads.

    class Axis(Record):
        source: Integers  # which input coordinate stands at a padded one
        before: Integer
        size: Integer

    class Correlation(Record):
        x: Reals
        height: Axis
        width: Axis

In Python, ``p = Correlation.zeros()`` is a NumPy record (`numpy.recarray` without a dimension) whose fields are
attributes, nested ones too: ``p.height.before = 1``. Fields that are pointers hold addresses.

In compiled code, the parameter of a body that is declared for the record reads ``p.height.before`` as a load from a
constant offset, ``p.height`` as the inner record, ``p.x`` as a pointer to numbers of the body's floating-point type.
Fields can be set as well. A pointer to a record (``PointerTo[Entry]``) is one to the first of a table of them:
``table[i].place``.

Each field takes 8 bytes; a record that another one inherits from is its beginning. A field cannot have the name of an
attribute of NumPy's arrays, such as ``size`` or ``sum``: Python would read that instead.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import PrimitiveModel, register_default
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_getattr_generic, lower_setattr_generic

_I64 = ir.IntType(64)


class Integer:
    """A field: int64. (Logical values are 0 and 1.)"""


class Double:
    """A field: float64."""


class Reals:
    """A field: the address of numbers of the operation's floating-point type."""


class Integers:
    """A field: the address of int64 numbers."""


class Doubles:
    """A field: the address of float64 numbers."""


class Record:
    """A block of parameters: its annotations are its fields, in their order."""

    dtype: ClassVar[np.dtype]
    fields: ClassVar[dict[str, tuple[int, Any]]]  # by name: offset in bytes, and annotation

    def __init_subclass__(cls) -> None:
        cls.fields, described, offset = {}, [], 0
        for name, kind in get_type_hints(cls, localns=vars(cls)).items():
            if name in ("dtype", "fields"):
                continue
            if hasattr(np.recarray, name):
                raise TypeError(f"{cls.__name__}: a field cannot be called {name!r}, which every array has already")
            of = kind.dtype if isinstance(kind, type) and issubclass(kind, Record) else _NUMPY.get(kind, np.dtype("i8"))
            cls.fields[name] = offset, kind
            described.append((name, of))
            offset += of.itemsize
        cls.dtype = np.dtype(described)

    @classmethod
    def cleared(cls) -> np.ndarray:
        """One record, all of whose fields are 0. (`numpy.zeros` goes field by field and takes ten times as long.)"""
        return np.ndarray((), cls.dtype, bytearray(cls.dtype.itemsize))

    @classmethod
    def zeros(cls) -> Any:
        """The same as a `numpy.recarray`, whose fields are attributes."""
        return cls.cleared().view(np.recarray)

    @classmethod
    def of(cls, **values: Any) -> np.ndarray:
        """One record, from the values of all its fields; those of a nested record are a tuple.

        An array of no dimension, whose fields are `record[name]`: that takes a sixth of the time of filling `zeros`.
        """
        return np.array(tuple([values[name] for name in cls.fields]), cls.dtype)

    @classmethod
    def beginning_with(cls, record: np.ndarray) -> Any:
        """One record whose first fields are those of another one, of a kind that this one inherits from."""
        result = cls.zeros()
        for name in record.dtype.names or ():
            result[name] = record[name]
        return result

    @classmethod
    def table(cls, rows: Any) -> np.ndarray:
        """An array of records, from tuples of all their fields."""
        return np.array([tuple(row) for row in rows], cls.dtype)


def copy_of(record: np.ndarray) -> np.ndarray:
    """A copy of one record, as one block of memory: ``record.copy()`` goes field by field, 60 us for a hundred."""
    return np.ndarray((), record.dtype, bytearray(record.tobytes()))


_NUMPY = {Double: np.dtype("f8")}


_Pointee = TypeVar("_Pointee", bound=Record)


class PointerTo(Generic[_Pointee]):
    """A field: the address of a record, or of the first of a table of them."""


class RecordPointer(types.Type):
    """In compiled code: a record of this kind in memory, with this floating-point type."""

    def __init__(self, record: type[Record], real: Any) -> None:
        self.record, self.real = record, real
        super().__init__(name=f"record({record.__module__}.{record.__qualname__}, {real})")

    def type_of(self, name: str) -> Any:
        if name not in self.record.fields:
            return None
        kind = self.record.fields[name][1]
        if get_origin(kind) is PointerTo:
            return RecordPointer(get_args(kind)[0], self.real)
        if kind in _NUMBA:
            return _NUMBA[kind]
        return types.CPointer(self.real) if kind is Reals else RecordPointer(kind, self.real)

    def is_nested(self, name: str) -> bool:
        kind = self.record.fields[name][1]
        return isinstance(kind, type) and issubclass(kind, Record)


_NUMBA = {
    Integer: types.int64, Double: types.float64, Integers: types.CPointer(types.int64),
    Doubles: types.CPointer(types.float64),
}  # fmt: skip


@register_default(RecordPointer)
class _Model(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _I64.as_pointer())


@infer_getattr
class _Fields(AttributeTemplate):
    key = RecordPointer

    def generic_resolve(self, kind: Any, name: str) -> Any:
        return kind.type_of(name)


@infer_global(operator.getitem)
class _Element(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        table, index = args
        if isinstance(table, RecordPointer) and isinstance(index, types.Integer):
            return signature(table, table, types.int64)
        return None


def beginning(record: type[Record]) -> Any:
    """``first(p)`` of compiled code: a pointer to the record that p's begins with, which it inherits from.

    Helpers that get this are compiled once, not again for each kind of record.
    """

    @intrinsic
    def first(typingctx, pointer):
        def codegen(context, builder, sig, args):
            return args[0]

        return RecordPointer(record, pointer.real)(pointer), codegen

    return first


def record_at(record: type[Record]) -> Any:
    """``place(address, like)`` of compiled code: the record at an address.

    `like` is a number, or a pointer to numbers, of its floating-point type.
    """

    @intrinsic
    def place(typingctx, address, like):
        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], _I64.as_pointer())

        return RecordPointer(record, getattr(like, "dtype", like))(types.int64, like), codegen

    return place


@intrinsic(prefer_literal=True)
def field(typingctx, record, name):
    """The pointer to a field of integers in compiled code: ``field(p, "counter")``."""
    if not isinstance(record, RecordPointer) or record.type_of(name.literal_value) != types.int64:
        return None

    def codegen(context, builder, sig, args):
        return _place(builder, record, args[0], name.literal_value)

    return types.CPointer(types.int64)(record, name), codegen


def _place(builder: Any, kind: RecordPointer, pointer: Any, name: str) -> Any:
    return builder.gep(pointer, [ir.Constant(_I64, kind.record.fields[name][0] // 8)])


@lower_getattr_generic(RecordPointer)
def _get(context, builder, kind, pointer, name):
    place = _place(builder, kind, pointer, name)
    if kind.is_nested(name):
        return place
    return builder.load(builder.bitcast(place, context.get_value_type(kind.type_of(name)).as_pointer()))


@lower_setattr_generic(RecordPointer)
def _set(context, builder, sig, args, name):
    kind, of_value = sig.args
    of_field = kind.type_of(name)
    value = context.cast(builder, args[1], of_value, of_field)
    place = _place(builder, kind, args[0], name)
    builder.store(value, builder.bitcast(place, context.get_value_type(of_field).as_pointer()))


@lower_builtin(operator.getitem, RecordPointer, types.Integer)
def _element(context, builder, sig, args):
    kind = sig.args[0]
    size = ir.Constant(_I64, kind.record.dtype.itemsize // 8)
    return builder.gep(args[0], [builder.mul(args[1], size)])

