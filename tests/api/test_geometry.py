"""Sizes and coordinate tables, against values by hand, numpy.pad and a window that is slid by one."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest

from fastconv import geometry
from fastconv.geometry import ConvGeometry, input_to_padded, output_size, padded_to_input

NUMPY = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def test_output_size_counts_the_windows_that_fit():
    for size, kernel, stride, dilation, before, after in itertools.product(
        range(1, 9), range(1, 5), range(1, 5), range(1, 4), range(3), range(3)
    ):
        first, last, count = -before, dilation * (kernel - 1), 0
        while first + last < size + after:
            first, count = first + stride, count + 1
        if count:
            assert output_size(size, kernel, stride, dilation, before, after) == count
        else:
            assert output_size(size, kernel, stride, dilation, before, after) < 1


@pytest.mark.parametrize(
    ("mode", "table"),
    [
        ("zeros", [-1, -1, 0, 1, 2, -1]),
        ("reflect", [2, 1, 0, 1, 2, 1]),
        ("replicate", [0, 0, 0, 1, 2, 2]),
        ("circular", [1, 2, 0, 1, 2, 0]),
    ],
)
def test_tables_by_hand(mode, table):
    assert padded_to_input(3, 2, 1, mode).tolist() == table


@pytest.mark.parametrize("mode", geometry.PADDING_MODES)
def test_tables_are_those_of_numpy(mode):
    for size, before, after in itertools.product(range(1, 6), range(7), range(7)):
        most = {"reflect": size - 1, "circular": size}.get(mode, 99)
        if max(before, after) > most:
            continue
        table = padded_to_input(size, before, after, mode)
        if mode == "zeros":
            expected = np.pad(np.arange(size), (before, after), constant_values=-1)
        else:
            expected = np.pad(np.arange(size), (before, after), mode=NUMPY[mode])
        assert table.tolist() == expected.tolist(), (size, before, after)


def test_negative_padding_after_ends_the_table_early():
    """What no window of a transposed convolution reaches."""
    assert padded_to_input(4, 1, -2, "zeros").tolist() == [-1, 0, 1]


@pytest.mark.parametrize("mode", geometry.PADDING_MODES)
def test_inverse_tables(mode):
    for size, before, after in itertools.product(range(1, 6), range(6), range(-2, 6)):
        most = {"reflect": size - 1, "circular": size}.get(mode, 99)
        if max(before, after) > most or size + after < 1:
            continue
        table = padded_to_input(size, before, after, mode)
        first, where = input_to_padded(table, size)
        assert len(first) == size + 1
        for i in range(size):
            assert where[first[i] : first[i + 1]].tolist() == np.flatnonzero(table == i).tolist()


def test_derived_sizes():
    g = ConvGeometry(
        batch=2, in_channels=6, out_channels=4, groups=2, input_size=(1, 5, 7), kernel_size=(1, 3, 2),
        stride=(1, 2, 1), dilation=(1, 1, 3), pad_before=(0, 1, 0), pad_after=(0, 2, 0), padding_mode="zeros",
    )  # fmt: skip
    assert g.output_size == (1, 3, 4)
    assert (g.in_channels_per_group, g.out_channels_per_group) == (3, 2)
    assert g.flops == 2 * (2 * 4 * 12) * (3 * 6)
    assert [len(table) for table in g.input_coordinates] == [1, 8, 7]
    assert [len(first) for first, _ in g.padded_coordinates] == [2, 6, 8]


def test_flops_do_not_overflow():
    huge = (10**6, 10**6, 10**6)
    g = ConvGeometry(10**3, 10**3, 10**3, 1, huge, (1,) * 3, (1,) * 3, (1,) * 3, (0,) * 3, (0,) * 3, "zeros")
    assert g.flops == 2 * 10**27


def test_examples():
    assert doctest.testmod(geometry).failed == 0
