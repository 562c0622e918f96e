"""Convolution and softmax cross-entropy kernels, forward and backward, written in Python and compiled by Numba."""

import sys as _sys

from .backends import (
    BackendUnavailableError,
    backends,
    get_float32_precision,
    get_num_threads,
    set_backend,
    set_float32_precision,
    set_num_threads,
    use_backend,
)
from .conv import (
    ConvGrads,
    conv1d,
    conv1d_backward,
    conv1d_input_grad,
    conv1d_weight_grad,
    conv2d,
    conv2d_backward,
    conv2d_input_grad,
    conv2d_weight_grad,
    conv3d,
    conv3d_backward,
    conv3d_input_grad,
    conv3d_weight_grad,
    conv_bias_grad,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from .explain import explain
from .linear_loss import LinearCrossEntropyGrads, linear_cross_entropy, linear_cross_entropy_with_grad
from .loss import (
    log_softmax,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_grad,
    softmax_cross_entropy_with_grad,
)
from .prepared import Conv1d, Conv2d, Conv3d

__all__ = [
    "BackendUnavailableError",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvGrads",
    "LinearCrossEntropyGrads",
    "__version__",
    "backends",
    "conv1d",
    "conv1d_backward",
    "conv1d_input_grad",
    "conv1d_weight_grad",
    "conv2d",
    "conv2d_backward",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "conv3d",
    "conv3d_backward",
    "conv3d_input_grad",
    "conv3d_weight_grad",
    "conv_bias_grad",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "explain",
    "get_float32_precision",
    "get_num_threads",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "log_softmax",
    "set_backend",
    "set_float32_precision",
    "set_num_threads",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_grad",
    "softmax_cross_entropy_with_grad",
    "use_backend",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    """The public names, and not the modules that define them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


# Numba asks for `jitted` by itself (the entry point `numba_extensions` in pyproject.toml), so that this import need not
# load Numba. Where Numba is there already it may have asked before this package was installed.
if "numba" in _sys.modules:
    from .jitted import register as _register

    _register()
