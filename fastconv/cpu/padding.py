"""What a gradient of padding modes other than zeros needs: its elements added up where they stand in the input."""

from __future__ import annotations

import numpy as np
from numba import prange, types

from ..geometry import ConvGeometry
from .jit import array_of, kernel, output_of

_tables = types.UniTuple(array_of(types.int64, 1), 3)


def fold(
    geometry: ConvGeometry, padded: np.ndarray, bias: np.ndarray, relu: bool, accumulate: bool, out: np.ndarray
) -> None:
    """out (+)= sum over the places of each element in the padded sample (C, D, H, W), plus bias, through relu."""
    firsts, wheres = zip(*geometry.padded_coordinates, strict=True)
    fold_kernel[out.dtype](padded, bias, relu, accumulate, firsts, wheres, out)


# One loop for each dimension, and one for the places that an element of it has in the padding.
@kernel(
    lambda real: types.void(
        array_of(real, 4), array_of(real, 1), types.boolean, types.boolean, _tables, _tables, output_of(real, 4)
    )
)
def fold_kernel(padded, bias, relu, accumulate, firsts, wheres, dx):
    channels, in_d, in_h, in_w = dx.shape
    first_d, first_h, first_w = firsts
    where_d, where_h, where_w = wheres
    zero = padded.dtype.type(0)
    for c in prange(channels):
        for d in range(in_d):
            for h in range(in_h):
                for v in range(in_w):
                    total = zero
                    for a in range(first_d[d], first_d[d + 1]):
                        for b in range(first_h[h], first_h[h + 1]):
                            for e in range(first_w[v], first_w[v + 1]):
                                total += padded[c, where_d[a], where_h[b], where_w[e]]
                    if accumulate:
                        total += dx[c, d, h, v]
                    total += bias[c]
                    if relu and total < zero:
                        total = zero
                    dx[c, d, h, v] = total
