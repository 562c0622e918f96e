"""The convolutions in NumPy, fast enough for shapes that the plain loops of `fastconv.reference` are too slow for.

Padding is made with numpy.pad and windows with sliding views: no coordinate formula is shared with the package. In the
precision of the arrays given. `test_reference.py` compares each function with the plain loops.
Shapes are (N, C, *S), (O, C/groups, *K) and (N, O, *P); padding is a (before, after) pair per dimension.
"""

from __future__ import annotations

import itertools

import numpy as np

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _windows(x, kernel, stride, padding, dilation, padding_mode):
    """The padded input as a view (N, C, *P, *K): what each tap meets at each position."""
    ndim = len(kernel)
    padded = np.pad(x, ((0, 0), (0, 0), *padding), mode=_PAD_MODES[padding_mode])
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + ndim)))
    positions, taps = (slice(None, None, s) for s in stride), (slice(None, None, d) for d in dilation)
    return view[(slice(None), slice(None), *positions, *taps)]


def _groups(groups, in_channels, out_channels):
    """(slice of input channels, slice of output channels) of each group."""
    c, o = in_channels // groups, out_channels // groups
    return [(slice(g * c, (g + 1) * c), slice(g * o, (g + 1) * o)) for g in range(groups)]


def convolution(x, w, bias=None, *, stride, padding, dilation, groups, padding_mode):
    ndim = x.ndim - 2
    windows = _windows(x, w.shape[2:], stride, padding, dilation, padding_mode)
    y = np.empty((x.shape[0], w.shape[0], *windows.shape[2 : 2 + ndim]), x.dtype)
    taps = list(range(2, 2 + ndim))
    for c, o in _groups(groups, x.shape[1], w.shape[0]):
        product = np.tensordot(windows[:, c], w[o], ([1, *(t + ndim for t in taps)], [1, *taps]))
        y[:, o] = np.moveaxis(product, -1, 1)
    return y if bias is None else y + bias.reshape(-1, *(1,) * ndim)


def weight_grad(x, dy, start=None, *, weight_shape, stride, padding, dilation, groups, padding_mode):
    """The gradient of the weight, added to `start`."""
    ndim = x.ndim - 2
    windows = _windows(x, weight_shape[2:], stride, padding, dilation, padding_mode)
    dw = np.empty(weight_shape, x.dtype)
    positions = [0, *range(2, 2 + ndim)]
    for c, o in _groups(groups, x.shape[1], weight_shape[0]):
        dw[o] = np.tensordot(dy[:, o], windows[:, c], (positions, positions))
    return dw if start is None else dw + start


def input_grad(w, dy, start=None, *, input_shape, stride, padding, dilation, groups, padding_mode):
    """The gradient of the input, added to `start` (anything that broadcasts)."""
    size, kernel, positions = input_shape[2:], w.shape[2:], dy.shape[2:]
    dx = np.zeros((*input_shape[:2], *(n + a + b for n, (a, b) in zip(size, padding, strict=True))), w.dtype)
    for c, o in _groups(groups, input_shape[1], w.shape[0]):
        products = np.tensordot(dy[:, o], w[o], ([1], [0]))  # (N, *P, C/groups, *K)
        for tap in itertools.product(*map(range, kernel)):
            met = tuple(
                slice(k * d, k * d + s * (p - 1) + 1, s)
                for k, d, s, p in zip(tap, dilation, stride, positions, strict=True)
            )
            dx[(slice(None), c, *met)] += np.moveaxis(products[(..., *tap)], -1, 1)
    for axis, (n, pair) in enumerate(zip(size, padding, strict=True), start=2):
        dx = _fold(dx, axis, n, pair, padding_mode)
    return dx if start is None else dx + start


def _fold(padded, axis, size, pair, padding_mode):
    """Add to each input element the gradients of its images in the padding of one dimension."""
    marks = {"constant_values": -1} if padding_mode == "zeros" else {}
    source = np.pad(np.arange(size), pair, mode=_PAD_MODES[padding_mode], **marks)
    padded = np.moveaxis(padded, axis, 0)
    folded = np.zeros((size, *padded.shape[1:]), padded.dtype)
    np.add.at(folded, source[source >= 0], padded[source >= 0])
    return np.moveaxis(folded, 0, axis)


def bias_grad(dy, start=None):
    db = dy.sum(axis=(0, *range(2, dy.ndim)))
    return db if start is None else db + start


def transposed(x, w, bias=None, *, result_shape, stride, padding, dilation, groups, padding_mode):
    """The whole transposed convolution, cropped to the result or filled up with zeros.

    With another padding mode than zeros, what would be cropped is folded back instead.
    """
    b = None if bias is None else bias.reshape(-1, *(1,) * (x.ndim - 2))
    if padding_mode != "zeros":
        return input_grad(
            w, x, b, input_shape=result_shape, stride=stride, padding=padding, dilation=dilation, groups=groups,
            padding_mode=padding_mode,
        )  # fmt: skip
    spans = tuple(
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(x.shape[2:], stride, dilation, w.shape[2:], strict=True)
    )
    whole = input_grad(
        w, x, input_shape=(*result_shape[:2], *spans), stride=stride, padding=((0, 0),) * len(spans),
        dilation=dilation, groups=groups, padding_mode="zeros",
    )  # fmt: skip
    y = np.zeros(result_shape, x.dtype)
    shown = tuple(slice(a, a + n) for (a, _), n in zip(padding, result_shape[2:], strict=True))
    part = whole[(..., *shown)]
    y[tuple(map(slice, part.shape))] = part
    return y if b is None else y + b
