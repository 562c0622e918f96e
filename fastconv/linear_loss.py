"""Cross-entropy of the logits of a linear layer, without ever storing all of them.

With hidden X (N, H), weight W (C, H) and bias b the logits are Z = X W^T + b, and with G = dLoss/dZ

    dLoss/dX = G W,    dLoss/dW = G^T X,    dLoss/db = sum over n of G_n

For a large vocabulary Z is by far the largest array of the step: N*C numbers, where X and W have N*H and C*H. But a row
of G needs nothing but its own row of Z, and what the mean divides by is known from the target alone. So the rows are
taken a *chunk* at a time: the logits of the chunk are made, the fused cross-entropy overwrites them with their
gradient, and that is multiplied out before the next chunk (as Liger Kernel does on GPUs: Hsu et al. 2024).

The three products are convolutions of kernel size 1, in which every large operand is read as it lies in memory:

    product          in channels   out channels   pixels     image                  kernel
    Z^T = W X^T      features      classes        rows       X^T                    W
    dX  = G W        rows          classes        features   W  (output gradient)   G^T
    dW  = G^T X      classes       rows           features   X  (output gradient)   G

The last two are input gradients, which add to their result: dX over *blocks* of classes, which bound the memory for
packed operands, and dW over the chunks. Chunks and blocks depend on nothing but C, H and the type, so a row has the
same bits whatever batch it is in, and everything the same bits for any number of threads.

float16 and bfloat16 are computed in float32 and rounded once: chunk by chunk, and at the end for the gradient of the
weight, whose sum over the chunks is kept in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import arguments, loss_arguments
from .backends import home_of
from .geometry import ConvGeometry

__all__ = ["LinearCrossEntropyGrads", "linear_cross_entropy", "linear_cross_entropy_with_grad"]


class LinearCrossEntropyGrads(NamedTuple):
    """The loss and its gradients; None for one that was not asked for, and for the bias where there is none."""

    loss: Any
    hidden: Any
    weight: Any
    bias: Any


NEEDS = ("hidden", "weight", "bias")
VECTOR = 16  # rows of a chunk are in vectors of at most so many: a chunk of one more would compute 15 in vain


# ---------------------------------------------------------------------------------------------------------------------
# The chunks
# ---------------------------------------------------------------------------------------------------------------------


def _even(total: int, most: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """`total` in parts of at most `most`, almost equally long, beginning at multiples of `unit`: (first, end) each."""
    units = -(-total // unit)
    parts = -(-units // max(1, most // unit))
    for i in range(parts):
        yield i * units // parts * unit, min((i + 1) * units // parts * unit, total)


def _product(in_channels: int, out_channels: int, pixels: int) -> ConvGeometry:
    """A matrix product as a convolution."""
    none, one = (0, 0, 0), (1, 1, 1)
    return ConvGeometry(1, in_channels, out_channels, 1, (1, 1, pixels), one, one, one, none, none, "zeros")


def _image(matrix: Any) -> Any:
    """(channels, pixels) as (N, C, D, H, W)."""
    return matrix[None, :, None, None, :]


def _kernel(matrix: Any) -> Any:
    """(out channels, in channels) as (O, C, KD, KH, KW)."""
    return matrix[:, :, None, None, None]


def _transposed(matrix: Any) -> Any:
    return matrix.transpose((1, 0))


class _Chunks:
    """The three products and the cross-entropy of one call, on flat arrays: hidden (N, H), target (N,) or (N, C)."""

    def __init__(self, home: Any, hidden: Any, weight: Any, bias: Any) -> None:
        self.here = home.operation("linear_cross_entropy")
        self.convolution = home.operation("convolution")
        self.cross_entropy = home.operation("softmax_cross_entropy").cross_entropy
        self.real = np.dtype(np.float64 if hidden.dtype.itemsize == 8 else np.float32)
        self.hidden, self.weight = hidden, weight
        self.bias = None if bias is None else self.here.computable(bias)
        (self.rows, self.features), self.classes = hidden.shape, weight.shape[0]
        self.most_rows, self.block, self.grad_block = self.here.chunk_sizes(
            self.classes, self.features, hidden.dtype
        )

    def empty(self, *shape: int) -> Any:
        return self.here.empty(shape, self.real, self.hidden)

    def accumulator(self, out: Any) -> Any:
        """`out`, or an array of its shape in the type that is computed in."""
        return out if out is None or out.dtype == self.real else self.empty(*out.shape)

    def weight_blocks(self, most: int) -> Iterator[tuple[slice, Any]]:
        """The classes and their part of the weight, a block of at most `most` at a time."""
        for first, end in _even(self.classes, most):
            yield slice(first, end), self.here.computable(self.weight[first:end])

    def make_logits(self, x: Any, z: Any) -> None:
        xt = _image(self.here.columns(x))
        for c, w in self.weight_blocks(self.block):
            bias = None if self.bias is None else self.bias[c]
            geometry = _product(self.features, w.shape[0], x.shape[0])
            out = _image(_transposed(z[:, c]))
            self.convolution.forward(geometry, xt, _kernel(w), bias, False, "direct", None, out)

    def hidden_grad(self, g: Any, out: Any) -> None:
        for c, w in self.weight_blocks(self.grad_block):
            geometry = _product(g.shape[0], w.shape[0], self.features)
            self.convolution.input_grad(
                geometry, _kernel(_transposed(g[:, c])), _image(w), None, False, c.start > 0, "direct", _image(out)
            )

    def weight_grad(self, x: Any, g: Any, accumulate: bool, out: Any) -> None:
        for first, end in _even(self.classes, self.grad_block):
            geometry = _product(end - first, x.shape[0], self.features)
            self.convolution.input_grad(
                geometry, _kernel(g[:, first:end]), _image(x), None, False, accumulate, "direct",
                _image(out[first:end]),
            )  # fmt: skip

    def bias_grad(self, g: Any, accumulate: bool, out: Any) -> None:
        self.convolution.bias_grad(_image(_transposed(g)), accumulate, out)

    def no_rows(self, dw: Any, db: Any) -> None:
        """The gradients of a loss over nothing are zero."""
        nothing = self.empty(0, self.classes)
        if dw is not None:
            geometry = replace(_product(self.features, self.classes, 1), batch=0)
            x = self.empty(0, self.features)
            self.convolution.weight_grad(geometry, _kernel(x), _kernel(nothing), False, "direct", _kernel(dw))
        if db is not None:
            self.bias_grad(nothing, False, db)

    def run(
        self, target: Any, class_weight: Any, scale: Any, ignored: int, smoothing: float, penalty: float, cap: float,
        losses: Any, lse: Any, dhidden: Any, dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        """Fill those of the outputs that are given, `losses` and `lse` being (N,)."""
        dw, db = self.accumulator(dweight), self.accumulator(dbias)
        wants_grad = not (dhidden is None and dweight is None and dbias is None)
        chunks = list(_even(self.rows, self.most_rows, VECTOR))
        if not chunks:
            self.no_rows(dw, db)
        buffer = self.empty(max((end - first for first, end in chunks), default=0), self.classes)
        for first, end in chunks:
            chunk, z = slice(first, end), buffer[: end - first]
            x = self.here.computable(self.hidden[chunk])
            y = target[chunk]
            self.make_logits(x, z)
            self.cross_entropy(
                z, y if y.dtype.kind in "iu" else self.here.computable(y), class_weight, scale, ignored, "none",
                smoothing, penalty, cap, losses[chunk], z if wants_grad else None, None if lse is None else lse[chunk],
                first,
            )  # fmt: skip
            if dhidden is not None:
                dx = self.accumulator(dhidden[chunk])
                self.hidden_grad(z, dx)
                if dx.dtype != dhidden.dtype:
                    self.here.deliver(dx, dhidden[chunk])
            if dw is not None:
                self.weight_grad(x, z, first > 0, dw)
            if db is not None:
                self.bias_grad(z, first > 0, db)
        for sums, out in ((dw, dweight), (db, dbias)):
            if sums is not out:
                self.here.deliver(sums, out)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def _linear_cross_entropy(
    function, hidden, weight, target, bias, needs, class_weight, ignore_index, reduction, label_smoothing, z_loss,
    logit_softcap, return_lse, check, out, backend,
):  # fmt: skip
    label = loss_arguments.single_label(function, target)
    home = home_of(
        function, backend, hidden=hidden, weight=weight, target=target if label is None else None, bias=bias,
        class_weight=class_weight, out=out,
    )  # fmt: skip
    x, w = home.admit(function, "hidden", hidden), home.admit(function, "weight", weight)
    t = home.admit(function, "target", target if label is None else label)
    b = None if bias is None else home.admit(function, "bias", bias)
    cw = None if class_weight is None else home.admit(function, "class_weight", class_weight)
    dtype = arguments.common_dtype(function, hidden=x, weight=w, bias=b, class_weight=cw)
    positions, classes = loss_arguments.linear_form(function, x.shape, w.shape)
    for name, array in (("bias", b), ("class_weight", cw)):
        if array is not None:
            arguments.check_shape(function, name, array, (classes,), "one per class")
    indices = loss_arguments.check_target(
        function, t, dtype, positions, (*positions, classes), "hidden", tuple(x.shape)
    )
    options = loss_arguments.check_cross_entropy(
        function, indices, ignore_index, reduction, label_smoothing, z_loss, logit_softcap
    )
    arguments.check_flag(function, "return_lse", return_lse)
    arguments.check_flag(function, "check", check)

    loss_shape = positions if reduction == "none" else ()
    loss, deliver = home.output(function, out, loss_shape, dtype, hidden)
    if out is not None:
        arguments.check_output(
            function, home, loss, loss_shape, dtype, hidden=x, weight=w, target=t, bias=b, class_weight=cw
        )
    grads = {
        name: home.output(function, None, array.shape, dtype, hidden)
        for name, array in zip(NEEDS, (x, w, b), strict=True)
        if name in needs and array is not None
    }
    dx, dw, db = (grads[name][0] if name in grads else None for name in NEEDS)

    if check and indices:
        home.show_labels(function, t)
    lead, here = len(positions), home.operation("linear_cross_entropy")
    flat_target = here.flattened(t, lead)
    chunks = _Chunks(home, here.flattened(x, lead), w, b)
    cw = None if cw is None else here.computable(cw)
    bad, divisor, scale = here.judge(flat_target, cw, options[0], classes, reduction == "mean", chunks.hidden)
    if bad is not None:
        position, label = bad
        raise loss_arguments.bad_label(function, position, label, positions, classes, options[0], "weight has")
    lse = home.output(function, None, positions, dtype, hidden) if return_lse else None
    losses, lses = chunks.empty(chunks.rows), chunks.empty(chunks.rows) if return_lse else None
    chunks.run(
        flat_target, cw, scale, *options, losses, lses, None if dx is None else here.flattened(dx, lead), dw, db
    )
    if reduction == "none":
        here.deliver(losses, here.flattened(loss, lead))
    else:
        here.reduce(losses, divisor, loss)
    if lse is not None:
        here.deliver(lses, here.flattened(lse[0], lead))

    def finished(result):
        array, finish = result
        return array if finish is None else finish()

    return (
        finished((loss, deliver)),
        *(finished(grads[name]) if name in grads else None for name in NEEDS),
        None if lse is None else finished(lse),
    )


def linear_cross_entropy(
    hidden, weight, target, bias=None, *, class_weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
    z_loss=0.0, logit_softcap=None, return_lse=False, check=False, out=None, backend="auto",
):  # fmt: skip
    """`softmax_cross_entropy` of the logits ``hidden @ weight.T + bias``, which are never stored whole.

    For each position, with x its row of `hidden`, p = softmax(z) and y the target, one-hot for a class index,

        z_c = sum over h of weight[c, h] * x_h  +  bias_c
        q_c = class_weight_c * ((1 - label_smoothing) * y_c + label_smoothing / C)
        loss = - sum over c of q_c * log p_c  +  z_loss * lse**2,    lse = log(sum over c of exp(z_c))

    (`reference.linear_cross_entropy`.) The logits are made and used a chunk of rows at a time. This is
    torch.nn.functional.linear_cross_entropy, whose `input`, `linear_weight`, `linear_bias` and `weight` are `hidden`,
    `weight`, `bias` and `class_weight` here.

    Parameters
    ----------
    hidden : array (N, H), (H,) or (*, H), any strides
        float32, float64, float16 or bfloat16; the last two are computed in float32.
    weight : array (C, H), of the same dtype
    target : class indices of any integer type, (N,), () or (*,), a Python or NumPy integer included; or probabilities
        (N, C), (C,) or (*, C)
    bias : array (C,) or None
    class_weight : array (C,) of class weights, or None
    ignore_index, reduction, label_smoothing, z_loss, logit_softcap, check : as in `softmax_cross_entropy`
    return_lse : also return lse, of the softcapped logits, ignored positions included
    out : array of the loss' shape and dtype that overlaps no input; it is filled and returned
    backend : "auto" (where the arrays live), "cpu" or "cuda"

    Returns
    -------
    loss : array of the dtype of `hidden`, () for "mean" and "sum", the shape of the positions, (*,), for "none"
    lse : with return_lse=True: array of the shape of the positions. The result is then the tuple (loss, lse).

    Raises
    ------
    ValueError for a wrong value or shape, a class index out of range included (nothing is written then, but see `check`
    in `softmax_cross_entropy`); TypeError for a wrong type or dtype; BackendUnavailableError.

    >>> import numpy as np, fastconv as fc
    >>> hidden, weight = np.array([[1., 0.]]), np.log(np.array([[1., 5.], [3., 5.]]))
    >>> loss = fc.linear_cross_entropy(hidden, weight, np.array([1]))
    >>> float(np.exp(-loss).round(6))
    0.75
    """
    loss, _, _, _, lse = _linear_cross_entropy(
        "linear_cross_entropy", hidden, weight, target, bias, (), class_weight, ignore_index, reduction,
        label_smoothing, z_loss, logit_softcap, return_lse, check, out, backend,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


def linear_cross_entropy_with_grad(
    hidden, weight, target, bias=None, *, needs=NEEDS, class_weight=None, ignore_index=-100, reduction="mean",
    label_smoothing=0.0, z_loss=0.0, logit_softcap=None, return_lse=False, check=False, out=None, backend="auto",
):  # fmt: skip
    """`linear_cross_entropy` and its gradients with respect to `hidden`, `weight` and `bias`, chunk by chunk.

    With G the gradient with respect to the logits (see `softmax_cross_entropy_grad`), for flat positions n,

        dloss/dhidden = G @ weight,    dloss/dweight = G.T @ hidden,    dloss/dbias_c = sum over n of G_nc

    `needs` names the gradients to compute. With reduction="none" they are those of the sum of the losses. Rows of the
    first are exactly 0 at ignored positions (as long as the weight is finite). The other arguments are those of
    `linear_cross_entropy`.

    Returns `LinearCrossEntropyGrads` (loss, hidden, weight, bias), with None for a gradient that was not asked for and
    where there is no bias; with return_lse=True the tuple (loss, hidden, weight, bias, lse). The gradients have the
    shapes and the dtype of what they are gradients of. Raises as `linear_cross_entropy`.

    >>> import numpy as np, fastconv as fc
    >>> hidden, weight = np.array([[1., 0.]]), np.log(np.array([[1., 5.], [3., 5.]]))
    >>> loss, dhidden, dweight, dbias = fc.linear_cross_entropy_with_grad(hidden, weight, np.array([1]))
    >>> float(np.exp(-loss).round(6)), dweight.round(6).tolist(), dbias is None
    (0.75, [[0.25, 0.0], [-0.25, 0.0]], True)
    """
    function = "linear_cross_entropy_with_grad"
    wanted = arguments.check_needs(function, needs, NEEDS)
    *results, lse = _linear_cross_entropy(
        function, hidden, weight, target, bias, wanted, class_weight, ignore_index, reduction, label_smoothing, z_loss,
        logit_softcap, return_lse, check, out, backend,
    )  # fmt: skip
    return (*results, lse) if return_lse else LinearCrossEntropyGrads(*results)
