"""The public softmax and cross-entropy functions: check, dispatch.

Everything the user passes is judged in `arguments` and `loss_arguments`, `backends` says where the arrays live, and
the kernels are in `cpu.softmax_cross_entropy` and `cuda_kernels.softmax_cross_entropy` under the same names.
"""

from __future__ import annotations

from typing import Any

from . import arguments, loss_arguments
from .backends import home_of

__all__ = [
    "log_softmax",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_grad",
    "softmax_cross_entropy_with_grad",
]


def _cross_entropy(
    function, logits, target, weight, grad_output, ignore_index, reduction, label_smoothing, axis, z_loss,
    logit_softcap, return_lse, check, wants_loss, wants_grad, out, grad_out, backend,
):  # fmt: skip
    scale = grad_output if grad_output is None or loss_arguments.is_number(grad_output) else None
    slope = grad_output if scale is None else None
    label = loss_arguments.single_label(function, target)
    home = home_of(
        function, backend, logits=logits, target=target if label is None else None, weight=weight, grad_output=slope,
        out=out, grad_out=grad_out,
    )  # fmt: skip
    z = home.admit(function, "logits", logits)
    t = home.admit(function, "target", target if label is None else label)
    w = None if weight is None else home.admit(function, "weight", weight)
    dy = None if slope is None else home.admit(function, "grad_output", slope)
    dtype = arguments.common_dtype(function, logits=z, weight=w, grad_output=dy)
    form, position_form, classes, positions = loss_arguments.class_form(function, z.shape, axis)
    if classes == 0:
        raise ValueError(f"{function}: logits have shape {tuple(z.shape)} (expected at least one class)")
    indices = loss_arguments.check_target(function, t, dtype, positions, tuple(z.shape))
    ignored, smoothing, penalty, cap = loss_arguments.check_cross_entropy(
        function, indices, ignore_index, reduction, label_smoothing, z_loss, logit_softcap
    )
    if w is not None:
        arguments.check_shape(function, "weight", w, (classes,), "one per class")
    loss_shape = positions if reduction == "none" else ()
    if dy is not None:
        arguments.check_shape(function, "grad_output", dy, loss_shape, "the shape of the loss")
    if return_lse is not False:
        arguments.check_flag(function, "return_lse", return_lse)
    if check is not False:
        arguments.check_flag(function, "check", check)
    inputs: dict[str, Any] = {"logits": z, "target": t, "weight": w, "grad_output": dy}
    grad_name = "grad_out" if wants_loss else "out"
    loss = gradient = lse = None
    deliver = []
    if wants_loss:
        loss, finish = home.output(function, out, loss_shape, dtype, logits)
        if out is not None:
            arguments.check_output(function, home, loss, loss_shape, dtype, **inputs)
        deliver.append((loss, finish))
    if wants_grad:
        gradient, finish = home.output(function, grad_out, z.shape, dtype, logits, grad_name)
        if grad_out is not None:
            if grad_out is logits:
                del inputs["logits"]
            arguments.check_output(function, home, gradient, tuple(z.shape), dtype, grad_name, **inputs)
            if out is not None:
                arguments.check_apart(function, home, grad_name, gradient, "out", loss)
        deliver.append((gradient, finish))
    if return_lse:
        lse, finish = home.output(function, None, positions, dtype, logits)
        deliver.append((lse, finish))
    if dy is not None and reduction == "none":
        dy = position_form(dy)
    if check and indices:
        home.show_labels(function, t)
    bad = home.operation("softmax_cross_entropy").cross_entropy(
        form(z), position_form(t) if indices else form(t), w, scale if dy is None else dy, ignored, reduction,
        smoothing, penalty, cap,
        position_form(loss) if wants_loss and reduction == "none" else loss,
        None if gradient is None else form(gradient),
        None if lse is None else position_form(lse),
    )  # fmt: skip
    if bad is not None:
        position, label = bad
        raise loss_arguments.bad_label(function, position, label, positions, classes, ignored)
    results = tuple(array if finish is None else finish() for array, finish in deliver)
    return results if len(results) > 1 else results[0]


def _softmax(function, logits, axis, log, out, backend):
    home = home_of(function, backend, logits=logits, out=out)
    z = home.admit(function, "logits", logits)
    dtype = arguments.common_dtype(function, logits=z)
    form = loss_arguments.class_form(function, z.shape, axis)[0]
    result, finish = home.output(function, out, z.shape, dtype, logits)
    if out is not None:
        inputs: dict[str, Any] = {} if out is logits else {"logits": z}
        arguments.check_output(function, home, result, tuple(z.shape), dtype, **inputs)
    home.operation("softmax_cross_entropy").softmax(form(z), log, form(result))
    return result if finish is None else finish()


def softmax_cross_entropy(
    logits, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, axis=None, z_loss=0.0,
    logit_softcap=None, return_lse=False, check=False, out=None, backend="auto",
):  # fmt: skip
    """Cross-entropy between the softmax of `logits` and `target`.

    For each position, with p = softmax(z) and y the target, one-hot for a class index,

        q_c = w_c * ((1 - label_smoothing) * y_c + label_smoothing / C)
        loss = - sum over c of q_c * log p_c  +  z_loss * lse**2,    lse = log(sum over c of exp(z_c))

    (`reference.softmax_cross_entropy`; Goodfellow, Bengio and Courville, Deep Learning, section 6.2.2.3.) Weights,
    `ignore_index`, `label_smoothing` and the reductions mean what they mean in torch.nn.functional.cross_entropy.

    Parameters
    ----------
    logits : array (N, C), (C,) or (N, C, *S), any strides
        float32, float64, float16 or bfloat16. -inf is probability 0; a row that holds nan gives nan.
    target : class indices of any integer type, (N,), () or (N, *S); or probabilities of the logits' dtype and shape
        A Python or NumPy integer is one index, ().
        Probabilities need not sum to one. A class of coefficient q_c = 0 adds nothing to the loss, even where p_c is 0.
        One out of range raises ValueError before anything is written. On a CUDA device, unless `check` is True, the
        host does not wait to see them: one out of range makes the loss and the gradient of its position nan, and the
        error comes later.
    weight : array (C,) of class weights, of the logits' dtype, or None
    ignore_index : a class index whose positions have loss 0 and gradient 0
    reduction : "mean", "sum" or "none"
        The mean divides by the sum of the weights of the labels that are not ignored; by the number of positions when
        `target` holds probabilities. It is nan when every position is ignored.
    label_smoothing : number between 0 and 1
    axis : the class axis; None is axis 1, or axis 0 of logits (C,)
    z_loss : number >= 0; adds z_loss * lse**2 to the loss of each position that is not ignored, before the reduction
    logit_softcap : None, or a number that puts cap * tanh(z / cap) in the place of every logit z, -inf included
    return_lse : also return lse, of the softcapped logits, ignored positions included
    check : wait for class indices that are on a CUDA device, and judge them first, as those on the host always are
        If it is False, the next call that waits for the device raises the ValueError: one with check=True, or with
        backend="cuda" and NumPy arrays. True is not for calls that are captured in a CUDA graph.
    out : array of the loss' shape and dtype that overlaps no input; it is filled and returned
    backend : "auto" (where the arrays live), "cpu" or "cuda"

    Returns
    -------
    loss : array of the logits' dtype, () for "mean" and "sum", the shape of the positions, (N, *S), for "none"
    lse : with return_lse=True: array of the shape of the positions. The result is then the tuple (loss, lse).

    Raises
    ------
    ValueError for a wrong value or shape, a class index out of range included (nothing is written then, but see
    `check`); TypeError for a wrong type or dtype; BackendUnavailableError.

    >>> import numpy as np, fastconv as fc
    >>> logits = np.log(np.array([[1., 3.], [1., 1.]]))
    >>> loss = fc.softmax_cross_entropy(logits, np.array([1, 0]), reduction="none")
    >>> np.exp(-loss).round(6).tolist()
    [0.75, 0.5]
    """
    return _cross_entropy(
        "softmax_cross_entropy", logits, target, weight, None, ignore_index, reduction, label_smoothing, axis, z_loss,
        logit_softcap, return_lse, check, True, False, out, None, backend,
    )  # fmt: skip


def softmax_cross_entropy_grad(
    logits, target, weight=None, grad_output=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0,
    axis=None, z_loss=0.0, logit_softcap=None, return_lse=False, check=False, out=None, backend="auto",
):  # fmt: skip
    """Gradient of `softmax_cross_entropy` with respect to `logits`.

    For each position, with q as there,

        dloss/dz_c = p_c * (sum(q) + 2 * z_loss * lse) - q_c        p - y for a target that sums to one, no options

    times `grad_output`, divided as the mean is, and times 1 - tanh(z_c / cap)**2 with a `logit_softcap`
    (`reference.softmax_cross_entropy` and the derivation above it). Exactly 0 at ignored positions.

    `grad_output` is the gradient of the loss: None for one, a number, or an array of the loss' shape and dtype. `out`
    is an array of the logits' shape and dtype, `logits` itself allowed: the gradient then overwrites the logits. The
    other arguments are those of `softmax_cross_entropy`. Returns an array of the logits' shape, with return_lse=True
    the tuple (gradient, lse). Raises as `softmax_cross_entropy`.

    >>> import numpy as np, fastconv as fc
    >>> logits = np.log(np.array([[1., 3.]]))
    >>> fc.softmax_cross_entropy_grad(logits, np.array([1])).round(6).tolist()
    [[0.25, -0.25]]
    """
    return _cross_entropy(
        "softmax_cross_entropy_grad", logits, target, weight, grad_output, ignore_index, reduction, label_smoothing,
        axis, z_loss, logit_softcap, return_lse, check, False, True, None, out, backend,
    )  # fmt: skip


def softmax_cross_entropy_with_grad(
    logits, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, axis=None, z_loss=0.0,
    logit_softcap=None, return_lse=False, check=False, out=None, grad_out=None, backend="auto",
):  # fmt: skip
    """`softmax_cross_entropy` and its gradient with respect to `logits`, in one pass over the logits.

    `grad_out` is an array of the logits' shape and dtype to fill with the gradient, `logits` itself allowed: the
    gradient then overwrites the logits, with no second buffer. The other arguments are those of
    `softmax_cross_entropy`. Returns (loss, gradient), with return_lse=True (loss, gradient, lse). With
    reduction="none" the gradient is that of the sum of the losses. Raises as `softmax_cross_entropy`.

    >>> import numpy as np, fastconv as fc
    >>> logits = np.log(np.array([[1., 3.]]))
    >>> loss, gradient = fc.softmax_cross_entropy_with_grad(logits, np.array([1]))
    >>> float(np.exp(-loss).round(6)), gradient.round(6).tolist()
    (0.75, [[0.25, -0.25]])
    """
    return _cross_entropy(
        "softmax_cross_entropy_with_grad", logits, target, weight, None, ignore_index, reduction, label_smoothing,
        axis, z_loss, logit_softcap, return_lse, check, True, True, out, grad_out, backend,
    )  # fmt: skip


def softmax(logits, axis=None, *, out=None, backend="auto"):
    """exp(z_c) / sum over d of exp(z_d) along `axis` (`reference.softmax`).

    `logits` has any shape and strides; float32, float64, float16 or bfloat16. `axis` is an int, or None for the class
    axis of `softmax_cross_entropy`: axis 1, or axis 0 in one dimension (not all axes, as in SciPy). `out`, of the same
    shape and dtype, may be `logits` itself. Returns an array of the logits' shape and dtype. A row that is all -inf
    gives nan. Raises ValueError for a wrong value or shape, TypeError for a wrong type or dtype,
    BackendUnavailableError.

    >>> import numpy as np, fastconv as fc
    >>> fc.softmax(np.log(np.array([[1., 3.]]))).round(6).tolist()
    [[0.25, 0.75]]
    """
    return _softmax("softmax", logits, axis, False, out, backend)


def log_softmax(logits, axis=None, *, out=None, backend="auto"):
    """z_c - log(sum over d of exp(z_d)) along `axis`: the logarithm of `softmax` (`reference.log_softmax`).

    Arguments, result and errors are those of `softmax`.

    >>> import numpy as np, fastconv as fc
    >>> np.exp(fc.log_softmax(np.log(np.array([1., 3.])))).round(6).tolist()
    [0.25, 0.75]
    """
    return _softmax("log_softmax", logits, axis, True, out, backend)
