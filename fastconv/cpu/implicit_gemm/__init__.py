"""The convolution engine: every pass of a convolution as the same blocked matrix product.

    out[i, j] += sum over r of A[i, r] * B[r, j]

    pass              rows i              reduction r                      columns j
    forward           output channels     (channel, tap)                   output pixels
    input gradient    input channels      (output channel, tap of phase)   input pixels of the phase
    weight gradient   (channel, tap)      output pixels                    output channels

Where the input has few channels, rows of the input gradient are phases of one dimension too: (phase, input channel).

`correlate` is the first two. Its columns are consecutive pixels of the flattened (batch, depth, height, width) index of
the output, so the ends of short rows cost nothing. A task is a range of pixels and of output channels. For one block of
channels at a time it copies the input rows its pixels read, with their halo, into the *slab* (this is where stride,
padding and any memory layout are absorbed: rows are split by phase of the stride, so that consecutive pixels are
consecutive in memory; a 1x1 kernel reads the image in place). For each channel and tap the values of `columns` pixels
are a row of a *panel* [r][columns], which is multiplied with the packed weights [r][rows] by the microkernel
`vector.gemm.contract`, for some output channels after the other. The first of these products writes the panel, where
its pixels come from few runs of memory: the arithmetic hides the copying, which took up to a fifth of the time. If it
is the only one, it reads the slab and writes no panel: two thirds of the time where there are 3 or 4 rows of weights
(AVX-512). There is no im2col of the image: slab and panels stay in the cache of the core.

    parameters.py  the records that Python fills and the bodies read
    blocks.py      axes, blocks of the reduction, the shape of the slab
    slab.py        from the image into the slab
    panels.py      from the slab into panels of pixels, and from accumulators into the output
    weights.py     weights into panels of rows
    correlate.py   forward pass and input gradient: the body
    plan.py        and its planning
    gradient.py    the weight gradient: the body and its planning

Where many products are with zeros around a small plane, `small_planes` computes the same sums without these. Where the
channels of a pixel are neighbours in memory, `channels_last` computes them without the transposes it takes to have
pixels along the vectors; the weight gradient reads such an image element by element, however far apart these are.

The reduction is cut into blocks whose size depends only on the number of channels and taps, and each block is one chain
of multiply-adds: an output element has the same bits for any split into tasks, any number of threads and any batch.
"""

from .blocks import (
    GROUP_BYTES,
    SLAB_BYTES,
    Axis,
    Blocks,
    Strides,
    can_stay_in_place,
    flatten,
    fold_batch,
    fold_strides,
    is_flat,
    make_blocks,
)
from .gradient import TILE_BYTES, is_better_exchanged, plan_weight_gradient, weight_gradient
from .plan import Plan, correlation, plan_correlation, work
from .weights import Packing, Unpacked, packing, plan_packing, plan_phase_packing

__all__ = [
    "GROUP_BYTES", "SLAB_BYTES", "TILE_BYTES", "Axis", "Blocks", "Packing", "Plan", "Strides", "Unpacked",
    "can_stay_in_place", "correlation", "flatten", "fold_batch", "fold_strides", "is_better_exchanged", "is_flat",
    "make_blocks", "packing", "plan_correlation", "plan_packing", "plan_phase_packing", "plan_weight_gradient",
    "weight_gradient", "work",
]  # fmt: skip
