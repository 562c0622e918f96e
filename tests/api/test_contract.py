"""The public names and signatures: what users may rely on."""

from __future__ import annotations

import doctest
import inspect
import sys
from typing import NamedTuple

import pytest

import fastconv as fc


class Signature(NamedTuple):
    positional: str
    keyword_only: str


_MODE, _ALGORITHM, _BACKEND = "padding_mode='zeros'", "algorithm='auto'", "backend='auto'"
_TAIL = "stride=1, padding=0, dilation=1, groups=1"
_TRANSPOSED_TAIL = "stride=1, padding=0, output_padding=0, groups=1, dilation=1"


def _of_dimension(ndim: int) -> dict[str, Signature]:
    layout = f"layout={ {1: 'NCL', 2: 'NCHW', 3: 'NCDHW'}[ndim]!r}"
    forward = f"{_MODE}, {layout}, activation=None, {_ALGORITHM}, out=None, {_BACKEND}"
    gradient = f"{_MODE}, {layout}, {_ALGORITHM}, out=None, accumulate=False, {_BACKEND}"
    return {
        f"conv{ndim}d": Signature(f"input, weight, bias=None, {_TAIL}", forward),
        f"conv{ndim}d_weight_grad": Signature(f"input, weight_size, grad_output, {_TAIL}", gradient),
        f"conv{ndim}d_input_grad": Signature(f"input_size, weight, grad_output, {_TAIL}", gradient),
        f"conv{ndim}d_backward": Signature(
            f"input, weight, grad_output, {_TAIL}",
            f"needs=('input', 'weight', 'bias'), {_MODE}, {layout}, {_ALGORITHM}, {_BACKEND}",
        ),
        f"conv_transpose{ndim}d": Signature(f"input, weight, bias=None, {_TRANSPOSED_TAIL}", forward),
    }


FUNCTIONS = {
    **_of_dimension(1),
    **_of_dimension(2),
    **_of_dimension(3),
    "conv_bias_grad": Signature("grad_output", f"layout='NCHW', out=None, accumulate=False, {_BACKEND}"),
    "explain": Signature(
        f"input_shape, weight_shape, {_TAIL}",
        "dtype='float32', op='forward', algorithm='auto', layout=None, padding_mode='zeros'",  # None: channels first
    ),
    "backends": Signature("", ""),
    "set_backend": Signature("name", ""),
    "use_backend": Signature("name", ""),
    "set_float32_precision": Signature("precision", ""),
    "get_float32_precision": Signature("", ""),
    "set_num_threads": Signature("n", ""),
    "get_num_threads": Signature("", ""),
}
CLASSES = {"ConvGrads", "LinearCrossEntropyGrads", "BackendUnavailableError", "Conv1d", "Conv2d", "Conv3d"}

_LOSS = "ignore_index=-100, reduction='mean', label_smoothing=0.0, out=None, backend='auto'"
# Of these the keyword-only options are promised, but there may be more.
LOSSES = {
    "softmax_cross_entropy": Signature("logits, target, weight=None", _LOSS),
    "softmax_cross_entropy_grad": Signature("logits, target, weight=None, grad_output=None", _LOSS),
    "softmax_cross_entropy_with_grad": Signature("logits, target, weight=None", f"{_LOSS}, grad_out=None"),
    "softmax": Signature("logits, axis=None", ""),
    "log_softmax": Signature("logits, axis=None", ""),
    "linear_cross_entropy": Signature("hidden, weight, target, bias=None", f"{_LOSS}, class_weight=None"),
    "linear_cross_entropy_with_grad": Signature(
        "hidden, weight, target, bias=None", f"{_LOSS}, class_weight=None, needs=('hidden', 'weight', 'bias')"
    ),
}


def _signature(function) -> Signature:
    parts = {"positional": [], "keyword": []}
    for p in inspect.signature(function).parameters.values():
        assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY), p
        text = p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        parts["keyword" if p.kind is p.KEYWORD_ONLY else "positional"].append(text)
    return Signature(", ".join(parts["positional"]), ", ".join(parts["keyword"]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name):
    assert _signature(getattr(fc, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", LOSSES)
def test_signature_of_loss(name):
    signature, promised = _signature(getattr(fc, name)), LOSSES[name]
    assert signature.positional == promised.positional
    assert set(filter(None, promised.keyword_only.split(", "))) <= set(signature.keyword_only.split(", "))


def test_nothing_else_is_public():
    """A new public name comes with its signature."""
    names = {name for name, value in vars(fc).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert names == {*FUNCTIONS, *LOSSES, *CLASSES}


def test_classes():
    assert fc.ConvGrads._fields == ("input", "weight", "bias")
    assert fc.LinearCrossEntropyGrads._fields == ("loss", "hidden", "weight", "bias")
    assert issubclass(fc.ConvGrads, tuple)
    assert issubclass(fc.BackendUnavailableError, RuntimeError)
    assert isinstance(fc.__version__, str)


@pytest.mark.parametrize("name", sorted([*FUNCTIONS, *LOSSES, *CLASSES]))
def test_docstring(name):
    """Every public function says what it does, and shows an example that runs."""
    thing = getattr(fc, name)
    assert inspect.getdoc(thing)
    finder = doctest.DocTestFinder(recurse=False)
    examples = finder.find(inspect.unwrap(thing), name, globs={})
    if name not in {"ConvGrads", "LinearCrossEntropyGrads", "BackendUnavailableError"}:
        assert any(test.examples for test in examples), f"{name} shows no example"
    for test in examples:
        result = doctest.DocTestRunner(verbose=False).run(test, out=sys.stdout.write)
        assert result.failed == 0
