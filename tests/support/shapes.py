"""The table of convolutions that every operation is tested on, each with the reason why it is here.

Shapes are (N, C, *S) and (O, C/groups, *K); a test turns them into the channels-last layouts itself. Cases of few
multiplications also run in the CUDA simulator, which is slow; the others cover tails of register blocks, reductions
that are cut into several blocks, and real layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SIMULATOR_MACS = 1500  # the simulator does some ten thousand multiplications a second


def _each(value: Any, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class Case:
    """One convolution. `padding` is what the caller writes, `pairs` what it means."""

    name: str
    why: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: str = "zeros"

    def __str__(self) -> str:
        return self.name

    @property
    def ndim(self) -> int:
        return len(self.input) - 2

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The padding as (before, after) per dimension."""
        padding, ndim = self.padding, self.ndim
        reach = [d * (k - 1) for d, k in zip(_each(self.dilation, ndim), self.weight[2:], strict=True)]
        if padding == "valid":
            return ((0, 0),) * ndim
        if padding == "full":
            return tuple((r, r) for r in reach)
        if padding == "same":
            totals = (
                max((math.ceil(n / s) - 1) * s + 1 + r - n, 0)
                for n, s, r in zip(self.input[2:], _each(self.stride, ndim), reach, strict=True)
            )
            return tuple((t // 2, math.ceil(t / 2)) for t in totals)
        if isinstance(padding, int):
            return ((padding, padding),) * ndim
        return tuple((p, p) if isinstance(p, int) else p for p in padding)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the public functions.

        Of the direct sum: what it computes on whole numbers is exact, and its error budget that of a plain sum.
        """
        return {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            "padding_mode": self.padding_mode, "algorithm": "direct",
        }  # fmt: skip

    @property
    def plain_options(self) -> dict[str, Any]:
        """The same, spelled out, for the oracles."""
        return {
            "stride": _each(self.stride, self.ndim), "padding": self.pairs, "dilation": _each(self.dilation, self.ndim),
            "groups": self.groups, "padding_mode": self.padding_mode,
        }  # fmt: skip

    @cached_property
    def output(self) -> tuple[int, ...]:
        """The shape (N, O, *P) of the result."""
        plain = self.plain_options
        positions = (
            (n + a + b - d * (k - 1) - 1) // s + 1
            for n, k, s, d, (a, b) in zip(
                self.input[2:], self.weight[2:], plain["stride"], plain["dilation"], self.pairs, strict=True
            )
        )
        return (self.input[0], self.weight[0], *positions)

    @property
    def macs(self) -> int:
        """Multiplications of one pass."""
        return math.prod(self.output) * math.prod(self.weight[1:])


SMALL = [
    # 1-D
    Case("1d_one", "the smallest convolution there is", (1, 1, 1), (1, 1, 1)),
    Case("1d_k3", "the ordinary case in one dimension", (2, 3, 7), (4, 3, 3), padding=1),
    Case("1d_dilated_same", "same padding of a dilated kernel", (1, 2, 11), (3, 2, 3), padding="same", dilation=3),
    Case("1d_stride_over_kernel", "elements between the windows that no window reads", (2, 2, 10), (2, 2, 2), stride=3),
    Case("1d_causal", "depthwise, all of the padding before", (1, 6, 9), (6, 1, 4), padding=((3, 0),), groups=6),
    Case("1d_long_kernel", "few windows of many taps", (1, 1, 97), (2, 1, 41), stride=16),
    Case("1d_row_end", "the last elements do not fill a stride", (1, 2, 12), (2, 2, 3), stride=(4,), padding=(1,)),
    # 1x1
    Case("1x1", "no neighbours: a matrix product", (2, 3, 4, 5), (5, 3, 1, 1)),
    Case("1x1_stride2", "a downsampling shortcut: most elements are never read", (1, 3, 7, 5), (4, 3, 1, 1), stride=2),
    Case("1x1_padded", "a border of outputs that are bias alone", (1, 2, 3, 4), (3, 2, 1, 1), padding=1),
    # 3x3 and the words
    Case("3x3_valid", "no padding", (2, 2, 5, 6), (3, 2, 3, 3), padding="valid"),
    Case("3x3_same", "the most common layer", (1, 3, 5, 6), (4, 3, 3, 3), padding="same"),
    Case("3x3_full", "every element meets every tap", (1, 2, 3, 4), (2, 2, 3, 3), padding="full"),
    Case("3x3_stride2", "the common downsampling layer, odd size", (1, 2, 7, 9), (3, 2, 3, 3), stride=2, padding=1),
    Case("textbook_valid", "the derivation's toy example", (1, 1, 3, 3), (1, 1, 2, 2)),
    Case("textbook_full", "the same with zeros around", (1, 1, 3, 3), (1, 1, 2, 2), padding="full"),
    Case("2x2_same", "an even kernel pads one more after", (1, 2, 4, 5), (3, 2, 2, 2), padding="same"),
    Case("4x4_same_stride2", "even kernel, even total", (1, 2, 7, 6), (2, 2, 4, 4), stride=2, padding="same"),
    Case("3x3_same_stride3", "a stride as long as the kernel", (1, 2, 8, 7), (2, 2, 3, 3), stride=3, padding="same"),
    Case("2x2_same_stride5", "same needs no padding: less than none must not crop", (1, 2, 7, 6), (2, 2, 2, 2),
         stride=5, padding="same"),
    Case("even_full_dilated", "full of an even, dilated kernel", (1, 1, 3, 4), (2, 1, 2, 4), padding="full",
         dilation=(3, 1)),
    # rectangles
    Case("3x1", "a column kernel", (1, 2, 6, 5), (3, 2, 3, 1), padding=(1, 0)),
    Case("1x5", "a row kernel", (1, 2, 4, 9), (3, 2, 1, 5), padding=(0, 2)),
    Case("one_row", "a plane of one row", (2, 2, 1, 11), (3, 2, 1, 4)),
    Case("one_column", "a plane of one column", (2, 2, 11, 1), (3, 2, 4, 1)),
    Case("one_pixel", "only the middle tap meets a value", (1, 3, 1, 1), (4, 3, 3, 3), padding=1),
    Case("one_window", "the kernel is as large as the input", (2, 2, 4, 5), (3, 2, 4, 5)),
    Case("one_window_padded", "the dilated kernel spans exactly the padded input", (1, 2, 4, 5), (3, 2, 3, 3),
         padding=1, dilation=(2, 3)),
    # strides, padding, dilation apart and together
    Case("stride_over_kernel", "gaps in both dimensions", (1, 2, 8, 9), (3, 2, 2, 2), stride=3),
    Case("stride_2x3", "different strides, neither dividing the size", (1, 2, 8, 9), (2, 2, 3, 2), stride=(2, 3),
         padding=1),
    Case("padding_over_kernel", "windows that lie in the padding alone", (1, 2, 3, 3), (2, 2, 2, 2), padding=4),
    Case("padding_alone", "no window meets a column of the input", (1, 2, 12, 1), (3, 2, 2, 1), stride=3,
         padding=((3, 2), (4, 0))),
    Case("padding_over_input", "more padding than input, strided", (1, 1, 2, 3), (2, 1, 3, 3), padding=7, stride=2),
    Case("padding_uneven", "a pair per dimension", (1, 2, 5, 4), (2, 2, 3, 3), padding=((0, 2), (3, 1))),
    Case("padding_per_dim", "one number per dimension", (1, 2, 5, 4), (2, 2, 3, 3), padding=(2, 0)),
    Case("dilated", "a different dilation per dimension", (1, 2, 7, 9), (2, 2, 2, 3), dilation=(3, 2), padding=2),
    Case("dilated_strided", "stride and dilation with a common factor: taps that share phases", (1, 2, 9, 10),
         (2, 2, 3, 3), stride=2, dilation=2, padding=2),
    Case("dilated_strided_coprime", "stride and dilation without one", (1, 2, 9, 10), (2, 2, 3, 3), stride=3,
         dilation=2, padding=3),
    # groups
    Case("groups2", "two groups", (1, 4, 5, 4), (6, 2, 3, 3), padding=1, groups=2),
    Case("groups3_odd", "groups of one input and three output channels", (1, 3, 4, 5), (9, 1, 2, 2), groups=3),
    Case("groups_shrink", "more input than output channels per group", (1, 6, 4, 4), (2, 3, 3, 3), groups=2, stride=2,
         padding=1),
    Case("depthwise", "one filter per channel", (1, 5, 6, 5), (5, 1, 3, 3), padding=1, groups=5),
    Case("depthwise_strided", "the same, strided and dilated", (1, 3, 9, 8), (3, 1, 3, 3), stride=2, dilation=2,
         padding=2, groups=3),
    Case("depthwise_multiplier2", "two filters per channel", (1, 3, 5, 5), (6, 1, 3, 3), padding=1, groups=3),
    # padding modes
    Case("reflect", "the edge is not repeated", (1, 2, 4, 5), (2, 2, 3, 3), padding=1, padding_mode="reflect"),
    Case("reflect_most", "as much as can be reflected, strided", (1, 1, 4, 3), (2, 1, 3, 3), padding=(3, 2), stride=2,
         padding_mode="reflect"),
    Case("reflect_uneven", "pairs and dilation", (1, 1, 5, 6), (2, 1, 3, 2), padding=((4, 1), (0, 3)), dilation=2,
         padding_mode="reflect"),
    Case("replicate", "the edge is repeated", (1, 2, 4, 5), (2, 2, 3, 3), padding=1, padding_mode="replicate"),
    Case("replicate_far", "more padding than input: one element has many images", (1, 1, 2, 3), (2, 1, 3, 3), padding=5,
         stride=2, padding_mode="replicate"),
    Case("circular", "the plane is a torus", (1, 2, 4, 5), (2, 2, 3, 3), padding=1, padding_mode="circular"),
    Case("circular_once_around", "padding as large as the input", (1, 1, 3, 2), (2, 1, 3, 3), padding=((3, 2), (2, 1)),
         padding_mode="circular"),
    Case("circular_same_even", "same padding, one more after, wrapped", (1, 2, 4, 6), (2, 2, 2, 4), padding="same",
         stride=(1, 2), padding_mode="circular"),
    Case("reflect_depthwise", "a mode with groups", (1, 3, 4, 4), (3, 1, 3, 3), padding=2, groups=3,
         padding_mode="reflect"),
    Case("circular_1d", "a mode in one dimension", (1, 2, 6), (2, 2, 4), padding="same", padding_mode="circular"),
    # 3-D
    Case("3d_2x2x2", "even kernel in three dimensions", (1, 2, 3, 4, 3), (2, 2, 2, 2, 2), padding="same"),
    Case("3d_strided", "a different stride per dimension", (1, 1, 5, 4, 6), (2, 1, 3, 2, 2), stride=(2, 1, 3),
         padding=(1, 0, 2)),
    Case("3d_dilated", "a different dilation per dimension", (1, 1, 4, 5, 5), (2, 1, 2, 2, 3), dilation=(3, 2, 1)),
    Case("3d_depthwise", "one filter per channel", (1, 3, 3, 3, 4), (3, 1, 2, 2, 2), groups=3, padding=((1, 0),) * 3),
    Case("3d_replicate", "a mode in three dimensions", (1, 1, 2, 3, 3), (1, 1, 3, 3, 2), padding=1,
         padding_mode="replicate"),
    Case("3d_1x1x1", "no neighbours", (2, 2, 2, 3, 2), (3, 2, 1, 1, 1)),
]  # fmt: skip

# Tails of register blocks: one more and one less than the widths and multiples of 4, 6, 8, 14, 16 and 32.
_TAILS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 22, 28, 29, 31, 32, 33, 47, 48, 49)

TAILS = [
    *(
        Case(f"rows_{n}", f"{n} output channels: rows of the forward pass; 35 pixels", (1, 3, 5, 7), (n, 3, 3, 3),
             padding=1)
        for n in _TAILS
    ),
    *(
        Case(f"channels_{n}", f"{n} input channels: rows of the input gradient, columns of the weight gradient",
             (1, n, 5, 7), (3, n, 3, 3), padding=1)
        for n in _TAILS
    ),
    *(
        Case(f"pixels_{n}", f"{n} pixels: columns of the forward pass", (1, 2, n), (5, 2, 3), padding=1)
        for n in _TAILS
    ),
    *(
        Case(f"depthwise_width_{n}", f"rows of {n} pixels, one filter per channel", (2, 3, 4, n), (3, 1, 3, 3),
             padding=1, groups=3)
        for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 65)
    ),
    *(
        Case(f"group_of_{n}", f"{n} channels a group, in and out", (2, 3 * n, 5, 6), (3 * n, n, 3, 3), padding=1,
             groups=3)
        for n in (2, 3, 4, 5, 6, 7, 8, 17)
    ),
    Case("straddle", "blocks of pixels that belong to two samples", (5, 3, 7, 7), (7, 3, 3, 3), padding=1),
    Case("straddle_1x1", "the same without neighbours", (7, 5, 3, 3), (6, 5, 1, 1)),
    Case("straddle_one_pixel", "a block of pixels of sixteen and more samples", (35, 4, 3, 3), (5, 4, 3, 3)),
    Case("planes_of_one_pixel", "a sample is one column", (35, 20, 1, 1), (9, 20, 1, 1)),
    Case("planes_of_one_pixel_groups", "the same with groups", (3, 6, 1, 1), (4, 3, 1, 1), groups=2),
    Case("planes_of_one_pixel_many", "so many samples that a task has a part of them", (1030, 3, 1, 1), (4, 3, 1, 1)),
    Case("one_pixel_left", "strided down to one pixel", (3, 4, 2, 2), (5, 4, 1, 1), stride=2),
    Case("primes", "no size divides another", (3, 5, 7, 11), (7, 5, 3, 2), padding=(1, 2), stride=(1, 2)),
    Case("primes_large", "the same with several blocks", (3, 13, 17, 19), (23, 13, 3, 3), padding=1),
]  # fmt: skip

# Reductions cut into several blocks (a block is some 300 terms), with tails.
REDUCTIONS = [
    *(
        Case(f"terms_1x1_{c}", f"{c} terms of one tap each", (1, c, 4, 5), (7, c, 1, 1))
        for c in (255, 256, 257, 319, 320, 321, 383, 385, 511, 512, 513, 640, 769, 1031)
    ),
    *(
        Case(f"terms_3x3_{9 * c}", f"{9 * c} terms of nine taps", (2, c, 5, 5), (7, c, 3, 3), padding=1)
        for c in (35, 36, 37, 72, 80, 115)
    ),
    *(
        Case(f"terms_back_{9 * o}", f"{9 * o} terms in the input gradient", (2, 7, 5, 5), (o, 7, 3, 3), padding=1)
        for o in (35, 37, 80)
    ),
    *(
        Case(f"terms_pixels_{2 * h * w}", f"{2 * h * w} terms in the weight gradient", (2, 5, h, w), (7, 5, 3, 3),
             padding=1)
        for h, w in ((16, 10), (17, 19), (23, 31), (40, 41))
    ),
    Case("terms_1d", "one dimension, long kernel, many channels", (2, 13, 70), (9, 13, 31), padding="same"),
    Case("terms_3d", "three dimensions: 27 taps times 13", (1, 13, 4, 5, 6), (9, 13, 3, 3, 3), padding=1),
    Case("both_channels", "many channels in and out", (2, 33, 9, 10), (34, 33, 3, 3), padding=1),
    Case("wide_1x1", "many channels in and out, no neighbours", (2, 130, 6, 7), (67, 130, 1, 1)),
]  # fmt: skip

KERNELS = [
    *(
        Case(f"kernel_{k}x{k}", "kernel sizes in use, odd and even", (1, 2, 17, 19), (3, 2, k, k), padding="same")
        for k in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15)
    ),
    *(
        Case(f"depthwise_{k}x{k}", "the same, one filter per channel", (1, 4, 16, 18), (4, 1, k, k), padding="same",
             groups=4)
        for k in (2, 3, 4, 5, 7, 9, 11, 15)
    ),
    *(
        Case(f"depthwise_{k}x{k}_stride2", "the same, strided", (1, 4, 17, 21), (4, 1, k, k), stride=2, padding=k // 2,
             groups=4)
        for k in (3, 5, 7)
    ),
    Case("depthwise_multiplier3", "three filters per channel", (2, 5, 9, 17), (15, 1, 3, 3), padding=1, groups=5),
    Case("plane_15x15", "one plane, large kernel", (1, 1, 31, 37), (1, 1, 15, 15)),
]  # fmt: skip

LAYERS = [
    Case("stem_7x7", "ResNet's first layer, smaller", (2, 3, 33, 37), (18, 3, 7, 7), stride=2, padding=3),
    Case("resnet_3x3", "a residual block", (2, 16, 14, 14), (16, 16, 3, 3), padding=1),
    Case("resnet_3x3_stride2", "between two stages", (2, 16, 15, 14), (32, 16, 3, 3), stride=2, padding=1),
    Case("resnet_shortcut", "1x1 with stride", (2, 16, 15, 14), (32, 16, 1, 1), stride=2),
    Case("groups_of_eight", "and the last of them no whole vector", (2, 40, 11, 13), (40, 8, 3, 3), padding=1,
         stride=2, groups=5),
    Case("groups_of_two", "with taps apart", (1, 10, 9, 7), (10, 2, 3, 3), padding=2, dilation=2, groups=5),
    Case("resnext", "groups of four channels", (1, 32, 9, 9), (32, 4, 3, 3), padding=1, groups=8),
    Case("mobilenet_5x5", "depthwise, strided, uneven same padding", (2, 24, 14, 14), (24, 1, 5, 5), stride=2,
         padding="same", groups=24),
    Case("patch_embedding", "stride equal to the kernel", (1, 3, 32, 32), (20, 3, 8, 8), stride=8),
    Case("deeplab", "dilation as in segmentation", (1, 16, 13, 13), (16, 16, 3, 3), dilation=4, padding=4),
    Case("long_rows", "rows in several pieces, for tiles of any width", (1, 3, 3, 1100), (4, 3, 3, 3), padding=1),
    Case("long_rows_stride2", "the same, strided", (1, 3, 4, 1501), (5, 3, 3, 3), stride=2, padding=1),
    Case("long_rows_1x1", "the same without neighbours", (1, 3, 2, 1100), (4, 3, 1, 1)),
    Case("long_signal", "one long row", (2, 2, 2100), (3, 2, 5), padding=2),
    Case("to_three_channels", "the last layer of a decoder", (1, 32, 11, 12), (3, 32, 3, 3), padding=1),
    Case("speech_1d", "a waveform's first layer", (2, 1, 800), (16, 1, 80), stride=16),
    Case("speech_1d_uneven", "phases of two and three taps, a part of a stride at the end", (2, 1, 803), (16, 1, 50),
         stride=20, padding=30),
    Case("speech_1d_dilated", "phases with neighbouring taps are three apart", (1, 1, 700), (9, 1, 30), stride=16,
         dilation=3, padding=7),
    Case("spectrogram_patches", "one channel, overlapping patches", (2, 1, 33, 50), (9, 1, 8, 8), stride=(8, 7)),
    Case("patches_groups", "patches of three channels a group", (1, 6, 17, 16), (8, 3, 4, 4), stride=4, groups=2),
    Case("patches_3d", "patches of a volume", (1, 1, 8, 9, 10), (6, 1, 2, 3, 5), stride=(2, 3, 5)),
    Case("mamba_1d", "causal depthwise over a sequence", (2, 40, 37), (40, 1, 4), padding=((3, 0),), groups=40),
    Case("video_3d", "a spatiotemporal layer", (1, 6, 6, 9, 9), (8, 6, 3, 3, 3), stride=(1, 2, 2), padding=1),
    Case("reflect_layer", "image to image", (1, 8, 17, 18), (8, 8, 3, 3), padding=1, padding_mode="reflect"),
    Case("replicate_layer", "kernel 5, stride 2", (1, 4, 17, 18), (6, 4, 5, 5), stride=2, padding=2,
         padding_mode="replicate"),
    Case("circular_layer", "a periodic simulation", (1, 8, 16, 16), (8, 8, 3, 3), padding="same", dilation=2,
         padding_mode="circular"),
]  # fmt: skip

CASES = SMALL + TAILS + REDUCTIONS + KERNELS + LAYERS


@dataclass(frozen=True)
class TransposedCase:
    """One transposed convolution: input (N, C, *S), weight (C, O/groups, *K)."""

    name: str
    why: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    output_padding: Any = 0
    groups: int = 1
    dilation: Any = 1
    padding_mode: str = "zeros"

    def __str__(self) -> str:
        return self.name

    @property
    def ndim(self) -> int:
        return len(self.input) - 2

    @property
    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride, "padding": self.padding, "output_padding": self.output_padding,
            "groups": self.groups, "dilation": self.dilation, "padding_mode": self.padding_mode,
            "algorithm": "direct",
        }  # fmt: skip

    @cached_property
    def convolution(self) -> Case:
        """The convolution whose input gradient this is, with pairs of padding.

        `after` is what the result's size says: output_padding shows elements that the full result has, or that
        no window reaches (a negative padding).
        """
        ndim = self.ndim
        stride, dilation, extra = (_each(v, ndim) for v in (self.stride, self.dilation, self.output_padding))
        spans = [
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(self.input[2:], stride, dilation, self.weight[2:], strict=True)
        ]
        if self.padding == "same":  # of the convolution from size * stride to size
            sizes = [n * s for n, s in zip(self.input[2:], stride, strict=True)]
        else:
            sizes = [0] * ndim
        shape = (self.input[0], self.weight[1] * self.groups, *sizes)
        padding = Case("", "", shape, self.weight, self.stride, self.padding, self.dilation).pairs
        if self.padding != "same" or any(extra):
            sizes = [span - a - b + e for span, (a, b), e in zip(spans, padding, extra, strict=True)]
        pairs = tuple((a, span - n - a) for span, n, (a, _) in zip(spans, sizes, padding, strict=True))
        return Case(
            self.name, self.why, (*shape[:2], *sizes), self.weight, stride, pairs, dilation, self.groups,
            self.padding_mode,
        )  # fmt: skip

    @property
    def output(self) -> tuple[int, ...]:
        return self.convolution.input

    @property
    def macs(self) -> int:
        return math.prod(self.input) * math.prod(self.weight[1:])


TRANSPOSED = [
    TransposedCase("1d_one", "the smallest there is", (1, 1, 1), (1, 1, 1)),
    TransposedCase("1d_stride2", "one dimension, doubled", (2, 3, 5), (3, 2, 4), stride=2, padding=1),
    TransposedCase("2x2_stride2", "U-Net: windows that touch, none overlap", (1, 3, 3, 4), (3, 2, 2, 2), stride=2),
    TransposedCase("4x4_stride2", "DCGAN: windows overlap evenly", (1, 2, 3, 4), (2, 3, 4, 4), stride=2, padding=1),
    TransposedCase("3x3_stride2", "output_padding shows the last row and column", (1, 2, 3, 4), (2, 3, 3, 3), stride=2,
                   padding=1, output_padding=1),
    TransposedCase("gaps", "stride over kernel: results that are bias alone", (1, 2, 3, 2), (2, 2, 2, 1), stride=3),
    TransposedCase("gaps_after", "output_padding that no window reaches", (1, 2, 3, 2), (2, 2, 2, 2), stride=(3, 4),
                   output_padding=(2, 3)),
    TransposedCase("dilated", "output_padding below the dilation, above the stride", (1, 2, 3, 3), (2, 2, 2, 3),
                   dilation=(3, 2), output_padding=(2, 1)),
    TransposedCase("pairs", "a pair per dimension", (1, 2, 4, 4), (2, 2, 3, 3), padding=((0, 2), (1, 0)), stride=2),
    TransposedCase("same", "grown to size * stride", (1, 2, 3, 4), (2, 2, 3, 4), stride=(2, 3), padding="same"),
    TransposedCase("same_stride_over_kernel", "the same with gaps", (1, 2, 3, 2), (2, 1, 2, 2), stride=3,
                   padding="same"),
    TransposedCase("full", "crops all but what every tap reaches", (1, 2, 5, 6), (2, 2, 3, 3), padding="full"),
    TransposedCase("valid", "no cropping", (1, 2, 3, 3), (2, 2, 3, 3), padding="valid"),
    TransposedCase("groups", "two groups", (1, 4, 3, 3), (4, 3, 2, 2), groups=2, stride=2),
    TransposedCase("depthwise", "bilinear upsampling's form", (1, 3, 3, 4), (3, 1, 4, 4), groups=3, stride=2,
                   padding=1),
    TransposedCase("3d", "three dimensions", (1, 2, 2, 3, 2), (2, 1, 2, 2, 3), stride=(2, 1, 2), padding=(0, 1, 1)),
    TransposedCase("circular", "a mode other than zeros folds what it would crop", (1, 2, 4, 5), (2, 2, 3, 3),
                   padding=1, padding_mode="circular"),
    TransposedCase("replicate", "the same at the edges", (1, 2, 4, 5), (2, 2, 3, 3), padding=1, stride=2,
                   padding_mode="replicate"),
    TransposedCase("decoder", "a layer of several register blocks", (2, 17, 7, 9), (17, 13, 4, 4), stride=2, padding=1),
    TransposedCase("vocoder", "many channels to one waveform", (2, 17, 50), (17, 1, 16), stride=8, padding=4),
    TransposedCase("patches_to_pixels", "tokens to an image of three channels", (1, 20, 5, 4), (20, 3, 8, 8), stride=8),
    TransposedCase("many_terms", "400 terms and more", (1, 103, 4, 5), (103, 7, 4, 4), stride=2, padding=1),
]  # fmt: skip
