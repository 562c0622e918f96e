"""The one place that judges what the user passed and words the errors. Both backends get checked arrays.

What only the losses ask is in `loss_arguments`.

Every message names the function and the argument, says what came and what was expected. A wrong type or dtype is a
TypeError, a wrong value or shape a ValueError. Nothing has been computed or written when one is raised.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends import home_of
from .geometry import PADDING_MODES, ConvGeometry, output_size

DTYPES = ("float32", "float64", "float16", "bfloat16")
_COMMON = (np.dtype(np.float32), np.dtype(np.float64))  # asked first: the name of a dtype takes 1 us
LAYOUTS = {1: ("NCL", "NLC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
ALGORITHMS = ("auto", "direct", "winograd", "fft", "loops")
ACTIVATIONS = (None, "relu")
PADDING_WORDS = ("valid", "same", "full")

_AXES = {1: "W", 2: "HW", 3: "DHW"}
_SPATIAL = {1: "*K (1 size)", 2: "*K (2 sizes)", 3: "*K (3 sizes)"}


def one_of(choices: Iterable[object]) -> str:
    return "expected one of " + ", ".join(map(repr, choices))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def common_dtype(function: str, **arrays: Any) -> np.dtype:
    """Return the one floating-point dtype of all `arrays` (None: not given), or raise TypeError."""
    first, dtype = "", None
    for name, array in arrays.items():
        if array is None or array.dtype is dtype:
            continue
        if array.dtype not in _COMMON and array.dtype.name not in DTYPES:
            raise TypeError(
                f"{function}: {name} has dtype {array.dtype.name} (expected float32, float64, float16 or bfloat16)"
            )
        if not array.dtype.isnative:
            raise TypeError(
                f"{function}: {name} has the byte order of another machine (expected native {array.dtype.name})"
            )
        if dtype is None:
            first, dtype = name, array.dtype
        elif array.dtype != dtype:
            raise TypeError(
                f"{function}: {name} is {array.dtype.name}, but {first} is {dtype.name} "
                "(expected one dtype for all arrays of a call)"
            )
    if dtype is None:
        raise TypeError(f"{function}: no array was given")
    return dtype


def check_shape(function: str, argument: str, array: Any, expected: tuple[int, ...], why: str = "") -> None:
    if tuple(array.shape) != expected:
        raise ValueError(
            f"{function}: {argument} has shape {tuple(array.shape)} (expected {expected}{why and ' ' + why})"
        )


def check_output(
    function: str, home: Any, out: Any, shape: tuple[int, ...], dtype: np.dtype, argument: str = "out", **inputs: Any
) -> None:
    """Judge the caller's own output array: exact shape and dtype, writable, apart from every input."""
    check_shape(function, argument, out, shape)
    if not out.dtype.isnative:
        raise TypeError(
            f"{function}: {argument} has the byte order of another machine (expected native {dtype.name})"
        )
    if out.dtype != dtype:
        raise TypeError(f"{function}: {argument} is {out.dtype.name} (expected {dtype.name})")
    if not home.is_writable(out):
        raise ValueError(
            f"{function}: {argument} cannot be written (expected a writable array whose elements do not share memory)"
        )
    for name, array in inputs.items():
        if array is not None and home.overlap(out, array):
            raise ValueError(f"{function}: {argument} overlaps {name} in memory (expected an array of its own)")


def check_accumulate(function: str, accumulate: object, out: object) -> bool:
    if not isinstance(accumulate, (bool, np.bool_)):
        raise TypeError(f"{function}: accumulate is a {type(accumulate).__name__} (expected True or False)")
    if accumulate and out is None:
        raise ValueError(f"{function}: accumulate=True adds into out, but out is None (expected an array)")
    return bool(accumulate)


def check_apart(function: str, home: Any, name: str, array: Any, other_name: str, other: Any) -> None:
    """Two outputs of the caller must not share memory."""
    if home.overlap(array, other):
        raise ValueError(f"{function}: {name} overlaps {other_name} in memory (expected an array of its own)")


def check_flag(function: str, argument: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {argument} is a {type(value).__name__} (expected True or False)")


# ---------------------------------------------------------------------------------------------------------------------
# Convolution: numbers
# ---------------------------------------------------------------------------------------------------------------------


# Strides, dilations and paddings up to here: products of two of them, and their sums, fit into 64 bits.
_MOST = 2**31 - 1


def _integer(function: str, argument: str, value: object, least: int, most: int | None = None) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{function}: {argument} holds a {type(value).__name__} (expected integers)"
        ) from None
    if number < least:
        raise ValueError(f"{function}: {argument} is {number} (expected at least {least})")
    if most is not None and number > most:
        raise ValueError(f"{function}: {argument} is {number} (expected at most {most})")
    return number


def _is_sequence(value: object) -> bool:
    return isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _per_dimension(function: str, argument: str, value: Any, ndim: int, least: int) -> tuple[int, ...]:
    """An int, or one per spatial dimension, as a tuple."""
    if not _is_sequence(value):
        return (_integer(function, argument, value, least, _MOST),) * ndim
    if len(value) != ndim:
        raise ValueError(
            f"{function}: {argument} is {value!r} (expected an int or {ndim} of them, one per spatial dimension)"
        )
    return tuple(_integer(function, argument, v, least, _MOST) for v in value)


def _padding(
    function: str, value: Any, input_size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """Every kind of padding as (before, after), one of each per spatial dimension."""
    ndim = len(kernel)
    if isinstance(value, str):
        if value not in PADDING_WORDS:
            raise ValueError(f"{function}: padding is {value!r} ({one_of(PADDING_WORDS)}, or integers)")
        if value == "valid":
            total = (0,) * ndim
        elif value == "full":
            each = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
            return each, each
        else:  # "same": ceil(size / stride) positions; an odd total puts the extra zero after
            total = tuple(
                max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
                for size, k, s, d in zip(input_size, kernel, stride, dilation, strict=True)
            )
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    if _is_sequence(value) and len(value) == ndim and all(_is_sequence(v) for v in value):
        if any(len(pair) != 2 for pair in value):
            raise ValueError(f"{function}: padding is {value!r} (expected (before, after) pairs)")
        return (
            tuple(_integer(function, "padding", pair[0], 0, _MOST) for pair in value),
            tuple(_integer(function, "padding", pair[1], 0, _MOST) for pair in value),
        )
    if _is_sequence(value) and len(value) != ndim:
        raise ValueError(
            f"{function}: padding is {value!r} (expected an int, {ndim} ints or {ndim} (before, after) pairs, one per "
            f"spatial dimension, or one of {', '.join(map(repr, PADDING_WORDS))})"
        )
    each = _per_dimension(function, "padding", value, ndim, 0)
    return each, each


def check_choice(function: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{function}: {argument} is {value!r} ({one_of(choices)})")


# ---------------------------------------------------------------------------------------------------------------------
# Convolution: shapes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a user's array becomes the kernels' (N, C, D, H, W) view: transposed, then indexed with new axes."""

    axes: tuple[int, ...]
    index: tuple[Any, ...]

    @functools.cached_property
    def _in_order(self) -> bool:
        return self.axes == tuple(range(len(self.axes)))

    def __call__(self, array: Any) -> Any:
        return (array if self._in_order else array.transpose(self.axes))[self.index]


@dataclass(frozen=True)
class ConvPlan:
    """What one set of shapes and options means: the geometry, the user's shapes, and their canonical forms."""

    geometry: ConvGeometry
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    activation_form: Form  # of input, output and their gradients
    weight_form: Form


def _spatial_index(ndim: int) -> tuple[Any, ...]:
    return (None,) * (3 - ndim) + (slice(None),) * ndim


def _activation_form(ndim: int, kind: str, channels_last: bool) -> Form:
    every = slice(None)
    if kind == "bare":
        return Form(tuple(range(ndim)), (None, None, *_spatial_index(ndim)))
    if kind == "unbatched":
        axes = (ndim, *range(ndim)) if channels_last else tuple(range(ndim + 1))
        return Form(axes, (None, every, *_spatial_index(ndim)))
    axes = (0, ndim + 1, *range(1, ndim + 1)) if channels_last else tuple(range(ndim + 2))
    return Form(axes, (every, every, *_spatial_index(ndim)))


def _user_shape(kind: str, channels_last: bool, batch: int, channels: int, size: tuple[int, ...]) -> tuple[int, ...]:
    if kind == "bare":
        return size
    shape = (*size, channels) if channels_last else (channels, *size)
    return shape if kind == "unbatched" else (batch, *shape)


def _came(argument: str, shape: tuple[int, ...]) -> str:
    """What came, for a message: an array has a shape; `input_size`, `weight_shape` and the like are one."""
    return f"{argument} is {shape}" if argument.endswith(("_size", "_shape")) else f"{argument} has shape {shape}"


def _expected_shape(argument: str) -> str:
    return argument if argument.endswith(("_size", "_shape")) else f"{argument} shape"


def _split_shape(
    function: str, argument: str, shape: tuple[int, ...], weight_name: str, weight_shape: tuple[int, ...],
    weight_channels: str, ndim: int, layout: str,
) -> tuple[str, int, int, tuple[int, ...]]:  # fmt: skip
    """Return (kind, batch, channels, spatial size) of an input's shape, kind being "batched", "unbatched" or "bare".

    `weight_channels` are the first two sizes of the weight in the words of a message.
    """
    channels_last = layout == LAYOUTS[ndim][1]
    if len(weight_shape) == ndim:
        if len(shape) != ndim:
            raise ValueError(
                f"{function}: {_came(argument, shape)} and {_came(weight_name, weight_shape)} (expected {ndim} "
                f"dimensions of both, or {_expected_shape(weight_name)} ({weight_channels}, {_SPATIAL[ndim]}))"
            )
        _check_no_zero(function, argument, shape, shape)
        _check_no_zero(function, weight_name, weight_shape, weight_shape)
        return "bare", 1, 1, shape
    if len(weight_shape) != ndim + 2:
        raise ValueError(
            f"{function}: {_came(weight_name, weight_shape)} (expected {ndim + 2} dimensions, ({weight_channels}, "
            f"{_SPATIAL[ndim]}))"
        )
    if len(shape) not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"{function}: {_came(argument, shape)} (expected {ndim + 2} dimensions in layout {layout!r}, or "
            f"{ndim + 1} without the batch)"
        )
    batched = len(shape) == ndim + 2
    batch, rest = (shape[0], shape[1:]) if batched else (1, shape)
    channels, size = (rest[-1], rest[:-1]) if channels_last else (rest[0], rest[1:])
    _check_no_zero(function, argument, shape, rest, " but the batch" if batched else "")
    _check_no_zero(function, weight_name, weight_shape, weight_shape)
    return "batched" if batched else "unbatched", batch, channels, size


def _check_no_zero(
    function: str, argument: str, shape: tuple[int, ...], sizes: tuple[int, ...], but: str = ""
) -> None:
    if 0 in sizes:
        raise ValueError(f"{function}: {_came(argument, shape)} (expected no size of 0{but})")


_MOST_ELEMENTS = 2**60  # 2**63 bytes of the widest dtype


def _is_too_large(shape: tuple[int, ...]) -> bool:
    """Whether no array can have this shape; NumPy leaves sizes of 0 out when it judges that."""
    return math.prod(n or 1 for n in shape) >= _MOST_ELEMENTS


def _check_elements(
    function: str, result: str, shape_with: Callable[..., tuple[int, ...]], options: dict[str, tuple[Any, Any, Any]],
    shapes: str,
) -> None:  # fmt: skip
    """Judge the number of elements of a result; the message names the options that make them so many.

    `options` holds by name what came, what it means, and the default; `shape_with` makes the shape of such meanings.
    `shapes` says which shapes came: they are to blame where the defaults of all options would not help.
    """
    meant = {name: meaning for name, (_, meaning, _) in options.items()}
    shape = shape_with(**meant)
    if not _is_too_large(shape):
        return
    default = {name: value for name, (_, _, value) in options.items()}
    causes = []
    if not _is_too_large(shape_with(**default)):
        causes = [name for name in options if not _is_too_large(shape_with(**{**meant, name: default[name]}))]
        causes = causes or [name for name in options if meant[name] != default[name]]
    what = " and ".join(f"{name} is {options[name][0]!r}" for name in causes) or shapes
    raise ValueError(
        f"{function}: {what}, with which the {result} would have shape {shape} (expected fewer than 2**60 elements)"
    )


def shape_of(function: str, argument: str, shape: Any) -> tuple[int, ...]:
    """A shape that the user spelled out (`input_size`, `weight_size`)."""
    if not _is_sequence(shape):
        raise TypeError(f"{function}: {argument} is a {type(shape).__name__} (expected a shape, a tuple of ints)")
    return tuple(_integer(function, argument, n, 0) for n in shape)


def _judged_shape(function: str, argument: str, shape: Any) -> tuple[int, ...]:
    """The shape of an array, or one that was spelled out, which may be of more elements than an array can have."""
    sizes = shape_of(function, argument, shape)
    if argument.endswith(("_size", "_shape")) and _is_too_large(sizes):
        raise ValueError(f"{function}: {argument} is {sizes} (expected fewer than 2**60 elements)")
    return sizes


_PLAIN = frozenset((int, str))


def _is_plain(values: tuple[Any, ...]) -> bool:
    """Whether a cache may remember the answer to `values`: 1, 1.0 and True are one key, but not one answer."""
    if _PLAIN.issuperset(map(type, values)):
        return True
    return all(type(value) in _PLAIN or (type(value) is tuple and _is_plain(value)) for value in values)


def convolution_plan(
    function: str, ndim: int, input_shape: Any, weight_shape: Any, stride: Any, padding: Any, dilation: Any,
    groups: Any, padding_mode: Any, layout: Any, *, input_name: str = "input", weight_name: str = "weight",
) -> ConvPlan:  # fmt: skip
    """Judge the shapes and options of a convolution and return what they mean; the same question is answered once."""
    question = (
        function, ndim, input_shape, weight_shape, stride, padding, dilation, groups, padding_mode, layout,
        input_name, weight_name,
    )  # fmt: skip
    options = (stride, padding, dilation, groups, padding_mode, layout)
    shapes_are_tuples = type(input_shape) is type(weight_shape) is tuple
    if shapes_are_tuples and _is_plain(input_shape + weight_shape) and _is_plain(options):
        return _convolution_plan(*question)
    return _convolution_plan.__wrapped__(*question)


@functools.lru_cache(maxsize=4096)
def _convolution_plan(
    function: str, ndim: int, input_shape: Any, weight_shape: Any, stride: Any, padding: Any, dilation: Any,
    groups: Any, padding_mode: Any, layout: Any, input_name: str, weight_name: str,
) -> ConvPlan:  # fmt: skip
    check_choice(function, "padding_mode", padding_mode, PADDING_MODES)
    check_choice(function, "layout", layout, LAYOUTS[ndim])
    input_shape = _judged_shape(function, input_name, input_shape)
    weight_shape = _judged_shape(function, weight_name, weight_shape)
    groups = _integer(function, "groups", groups, 1)
    kind, batch, channels, size = _split_shape(
        function, input_name, input_shape, weight_name, weight_shape, "O, C/groups", ndim, layout
    )
    out_channels, per_group = (1, 1) if kind == "bare" else weight_shape[:2]
    kernel = weight_shape[-ndim:]
    if channels % groups:
        raise ValueError(f"{function}: {input_name} has {channels} channels, which groups={groups} does not divide")
    if per_group != channels // groups:
        raise ValueError(
            f"{function}: {weight_name} has {per_group} input channels per group, but {input_name} has {channels} "
            f"channels and groups={groups} (expected {_expected_shape(weight_name)} (O, {channels // groups}, *K))"
        )
    if out_channels % groups:
        raise ValueError(
            f"{function}: {weight_name} has {out_channels} output channels, which groups={groups} does not divide"
        )
    strides = _per_dimension(function, "stride", stride, ndim, 1)
    dilations = _per_dimension(function, "dilation", dilation, ndim, 1)
    before, after = _padding(function, padding, size, kernel, strides, dilations)
    geometry = _geometry(
        function, input_name, weight_name, batch, channels, out_channels, groups, size, kernel, strides, dilations,
        before, after, padding_mode,
    )  # fmt: skip
    channels_last = layout == LAYOUTS[ndim][1]
    output_shape = _user_shape(kind, channels_last, batch, out_channels, geometry.output_size[3 - ndim :])

    def shape_with(padding: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
        each = zip(size, kernel, strides, dilations, *padding, strict=True)
        return _user_shape(kind, channels_last, batch, out_channels, tuple(max(0, output_size(*one)) for one in each))

    nothing = (0,) * ndim
    _check_elements(
        function, "output", shape_with, {"padding": (padding, (before, after), (nothing, nothing))},
        f"{_came(input_name, input_shape)} and {_came(weight_name, weight_shape)}",
    )  # fmt: skip
    return ConvPlan(
        geometry,
        input_shape,
        weight_shape,
        output_shape,
        _activation_form(ndim, kind, channels_last),
        _activation_form(ndim, "bare" if kind == "bare" else "batched", False),
    )


def _geometry(
    function: str, input_name: str, weight_name: str, batch: int, channels: int, out_channels: int, groups: int,
    size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...],
    before: tuple[int, ...], after: tuple[int, ...], padding_mode: str,
) -> ConvGeometry:  # fmt: skip
    ndim = len(size)
    for axis, s, k, d, a, b in zip(_AXES[ndim], size, kernel, dilation, before, after, strict=True):
        if padding_mode == "reflect" and max(a, b) >= s:
            raise ValueError(
                f"{function}: padding of {max(a, b)} reflects more than the {s} elements of {input_name} in dimension "
                f"{axis} (expected padding < size)"
            )
        if padding_mode == "circular" and max(a, b) > s:
            raise ValueError(
                f"{function}: padding of {max(a, b)} wraps around the {s} elements of {input_name} in dimension {axis} "
                "more than once (expected padding <= size)"
            )
        if output_size(s, k, 1, d, a, b) < 1:
            raise ValueError(
                f"{function}: {weight_name} spans {d * (k - 1) + 1} elements in dimension {axis}, but {input_name} has "
                f"{s} and {a + b} of padding (expected a kernel no larger than the padded input)"
            )
    # From the size of the padded input on there is one window whatever the stride, with which kernels take more memory.
    stride = tuple(min(step, a + s + b) for step, a, s, b in zip(stride, before, size, after, strict=True))
    lead = 3 - ndim

    def three(values: tuple[int, ...], one: int) -> tuple[int, int, int]:
        d, h, w = (one,) * lead + values
        return d, h, w

    return ConvGeometry(
        batch, channels, out_channels, groups, three(size, 1), three(kernel, 1), three(stride, 1), three(dilation, 1),
        three(before, 0), three(after, 0), padding_mode,
    )  # fmt: skip


def transposed_convolution_plan(
    function: str, ndim: int, input_shape: Any, weight_shape: Any, stride: Any, padding: Any, output_padding: Any,
    groups: Any, dilation: Any, padding_mode: Any, layout: Any,
) -> ConvPlan:  # fmt: skip
    """Judge a transposed convolution: return the plan of the convolution of which it is the input gradient.

    In that plan `output_shape` is the shape of the caller's input and `input_shape` that of the result.
    """
    question = (
        function, ndim, tuple(input_shape), tuple(weight_shape), stride, padding, output_padding, groups, dilation,
        padding_mode, layout,
    )  # fmt: skip
    return _transposed_plan(*question) if _is_plain(question) else _transposed_plan.__wrapped__(*question)


@functools.lru_cache(maxsize=4096)
def _transposed_plan(
    function: str, ndim: int, input_shape: Any, weight_shape: Any, stride: Any, padding: Any, output_padding: Any,
    groups: Any, dilation: Any, padding_mode: Any, layout: Any,
) -> ConvPlan:  # fmt: skip
    check_choice(function, "padding_mode", padding_mode, PADDING_MODES)
    check_choice(function, "layout", layout, LAYOUTS[ndim])
    groups = _integer(function, "groups", groups, 1)
    kind, batch, channels, size = _split_shape(
        function, "input", input_shape, "weight", weight_shape, "C, O/groups", ndim, layout
    )
    weight_in, per_group = (1, 1) if kind == "bare" else weight_shape[:2]
    kernel = weight_shape[-ndim:]
    if weight_in != channels:
        raise ValueError(
            f"{function}: weight has {weight_in} input channels, but input has {channels} "
            f"(expected weight shape ({channels}, O/groups, *K))"
        )
    if channels % groups:
        raise ValueError(f"{function}: input has {channels} channels, which groups={groups} does not divide")
    strides = _per_dimension(function, "stride", stride, ndim, 1)
    dilations = _per_dimension(function, "dilation", dilation, ndim, 1)
    extra = _per_dimension(function, "output_padding", output_padding, ndim, 0)
    result, before, after = _transposed_sizes(function, size, kernel, padding, strides, dilations, extra)
    for e, s, d in zip(extra, strides, dilations, strict=True):
        if e >= max(s, d):
            raise ValueError(
                f"{function}: output_padding is {e} (expected less than stride={s} or dilation={d}, whichever is more)"
            )
    if min(result) < 1:
        raise ValueError(
            f"{function}: padding is {padding!r}, with which the result would have size {result} (expected less "
            "padding or a larger kernel or input)"
        )
    out_channels = per_group * groups
    geometry = _geometry(
        function, "the result", "weight", batch, out_channels, channels, groups, result, kernel, strides, dilations,
        before, after, padding_mode,
    )  # fmt: skip
    channels_last = layout == LAYOUTS[ndim][1]
    result_shape = _user_shape(kind, channels_last, batch, out_channels, result)

    def shape_with(stride: Any, dilation: Any, output_padding: Any) -> tuple[int, ...]:
        sizes = _transposed_sizes(function, size, kernel, padding, stride, dilation, output_padding)[0]
        return _user_shape(kind, channels_last, batch, out_channels, sizes)

    one, none = (1,) * ndim, (0,) * ndim
    _check_elements(
        function, "result", shape_with,
        {
            "stride": (stride, strides, one),
            "dilation": (dilation, dilations, one),
            "output_padding": (output_padding, extra, none),
        },
        f"{_came('input', input_shape)} and {_came('weight', weight_shape)}",
    )  # fmt: skip
    return ConvPlan(
        geometry,
        result_shape,
        weight_shape,
        input_shape,
        _activation_form(ndim, kind, channels_last),
        _activation_form(ndim, "bare" if kind == "bare" else "batched", False),
    )


def _transposed_sizes(
    function: str, size: tuple[int, ...], kernel: tuple[int, ...], padding: Any, strides: tuple[int, ...],
    dilations: tuple[int, ...], extra: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """The size of the result, and the padding (before, after) of the convolution that is being transposed."""
    # the words mean the padding of that convolution: "same" makes size * stride of size
    grown = tuple(n * s for n, s in zip(size, strides, strict=True))
    before, after = _padding(function, padding, grown, kernel, strides, dilations)
    spans = tuple((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, strides, dilations, kernel, strict=True))
    result = tuple(span - a - b + e for span, a, b, e in zip(spans, before, after, extra, strict=True))
    if isinstance(padding, str) and padding == "same" and not any(extra):
        result = grown
    # What the last window does not reach (output_padding) is a negative padding after: elements no window reads.
    return result, before, tuple(span - n - a for span, n, a in zip(spans, result, before, strict=True))


def bias_gradient_form(function: str, shape: tuple[int, ...], layout: object) -> tuple[Form, int]:
    """Return the canonical form of a `grad_output` of this shape and layout, and its number of channels.

    A layout says the number of spatial dimensions; an array with more of them than that is taken by its own number.
    """
    check_choice(function, "layout", layout, tuple(name for names in LAYOUTS.values() for name in names))
    ndim = next(n for n, names in LAYOUTS.items() if layout in names)
    channels_last = layout == LAYOUTS[ndim][1]
    if layout == "NCHW" and len(shape) == 5:
        ndim = 3
    if len(shape) not in (ndim, ndim + 1, ndim + 2):
        raise ValueError(
            f"{function}: grad_output has shape {shape} (expected {ndim + 2} dimensions in layout {layout!r}, "
            f"{ndim + 1} without the batch, or a bare {ndim}-D array)"
        )
    kind = ("bare", "unbatched", "batched")[len(shape) - ndim]
    channels = 1 if kind == "bare" else shape[-1] if channels_last else shape[-ndim - 1]
    return _activation_form(ndim, kind, channels_last), channels


def check_needs(
    function: str, needs: Any, choices: tuple[str, ...] = ("input", "weight", "bias")
) -> tuple[str, ...]:
    """The gradients that a backward function was asked for."""
    if not isinstance(needs, (str, tuple, list, set, frozenset)):
        raise TypeError(
            f"{function}: needs is a {type(needs).__name__} (expected a tuple of {', '.join(map(repr, choices))})"
        )
    names = (needs,) if isinstance(needs, str) else tuple(needs)
    for name in names:
        check_choice(function, "needs", name, choices)
    return names


def check_prepared(
    function: str, ndim: int, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    padding_mode: Any, backend: str,
) -> tuple[Any, Any]:  # fmt: skip
    """Judge the weight, bias and options of a prepared convolution, as far as that is possible without an input.

    Returns what it keeps of them: copies of arrays in the memory of the host, since the packed weights must not part
    from what the caller may change later.
    """
    home = home_of(function, backend, weight=weight, bias=bias)
    w = home.admit(function, "weight", weight)
    b = None if bias is None else home.admit(function, "bias", bias)
    common_dtype(function, weight=w, bias=b)
    if w.ndim not in (ndim, ndim + 2):
        raise ValueError(
            f"{function}: weight has shape {tuple(w.shape)} (expected {ndim + 2} dimensions, (O, C/groups, "
            f"{_SPATIAL[ndim]}))"
        )
    _check_no_zero(function, "weight", tuple(w.shape), tuple(w.shape))
    if b is not None:
        check_shape(function, "bias", b, (1 if w.ndim == ndim else w.shape[0],), "one per output channel")
    check_choice(function, "padding_mode", padding_mode, PADDING_MODES)
    groups = _integer(function, "groups", groups, 1)
    if w.shape[0] % groups and w.ndim == ndim + 2:
        raise ValueError(f"{function}: weight has {w.shape[0]} output channels, which groups={groups} does not divide")
    strides = _per_dimension(function, "stride", stride, ndim, 1)
    dilations = _per_dimension(function, "dilation", dilation, ndim, 1)
    _padding(function, padding, (1,) * ndim, tuple(w.shape[-ndim:]), strides, dilations)
    return _kept(home, weight, w), _kept(home, bias, b)


def _kept(home: Any, given: Any, admitted: Any) -> Any:
    if home.name == "cpu":
        return None if admitted is None else admitted.copy()
    return given.copy() if isinstance(given, np.ndarray) else given
