"""Tiles of a float32 matrix product in registers and shared memory: what the kernels of `implicit_gemm` have in common.

A block computes `rows` x `columns` sums in steps of DEPTH terms. Each thread holds `thread_rows` x `thread_columns` of
them in registers, in groups of four rows and four columns, and reads its operands from shared memory 128 bits at a
time. Shared memory has two stages: while the block multiplies one, its threads fetch the next into registers and then
store it into the other, so that one barrier per step is enough.

Every sum is one chain of multiply-adds over the terms in their order, whatever the tile: the result does not depend on
the choice of tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .intrinsics import load4, u32
from .jit import inlined

__all__ = ["DEPTH", "TILES", "Tile", "choose_tile", "stepper"]

DEPTH = 8


class Tile(NamedTuple):
    """Sizes of a tile, all multiples of four."""

    rows: int
    columns: int
    thread_rows: int
    thread_columns: int

    @property
    def threads(self) -> int:
        return self.rows // self.thread_rows * (self.columns // self.thread_columns)

    @property
    def row_pitch(self) -> int:
        """Elements between terms of the rows' operand: eight terms of four rows then lie in different banks."""
        return self.rows + 4

    @property
    def column_pitch(self) -> int:
        return self.columns + 4


# In order of preference, the largest first: it reads the least memory for each multiplication. 8 x 8 sums of a thread
# take 128 registers and 4 loads of 128 bits for 64 multiply-adds; 4 x 4 take 2 loads for 16.
TILES = [Tile(128, 128, 8, 8), Tile(64, 128, 8, 8), Tile(32, 128, 4, 8), Tile(64, 64, 4, 4), Tile(32, 64, 4, 4)]

# Blocks that keep every multiprocessor of a large GPU busy (the H200 has 132).
ENOUGH_BLOCKS = 132


def choose_tile(rows: int, columns: int, groups: int) -> Tile:
    """The largest tile that the rows more than half fill and that gives enough blocks, or else the smallest."""
    filled = [tile for tile in TILES if 2 * rows > tile.rows] or TILES[-1:]
    for tile in filled:
        if -(-rows // tile.rows) * -(-columns // tile.columns) * groups >= ENOUGH_BLOCKS:
            return tile
    return filled[-1]


def stepper(tile: Tile) -> Callable[..., None]:
    """``(a, b, at_a, at_b, sums, ra, rb)``: one step, from the stages of shared memory that begin at at_a and at_b.

    Term k of row r is ``a[at_a + k * row_pitch + r]``; at_a and at_b include the thread's own first row and column. The
    terms are written out because the compiler does not unroll a loop of that size.
    """
    thread_rows, thread_columns = tile.thread_rows, tile.thread_columns
    row_groups, column_groups = thread_rows // 4, thread_columns // 4
    row_jump, column_jump = tile.rows // row_groups, tile.columns // column_groups
    row_pitch, column_pitch = tile.row_pitch, tile.column_pitch

    @inlined
    def term(a, b, at_a, at_b, sums, ra, rb):
        for g in range(row_groups):
            x = load4(a, u32(at_a + g * row_jump))
            for i in range(4):
                ra[4 * g + i] = x[i]
        for g in range(column_groups):
            x = load4(b, u32(at_b + g * column_jump))
            for i in range(4):
                rb[4 * g + i] = x[i]
        for i in range(thread_rows):
            for j in range(thread_columns):
                sums[i, j] += ra[i] * rb[j]

    @inlined
    def step(a, b, at_a, at_b, sums, ra, rb):
        term(a, b, at_a, at_b, sums, ra, rb)
        term(a, b, u32(at_a + row_pitch), u32(at_b + column_pitch), sums, ra, rb)
        term(a, b, u32(at_a + 2 * row_pitch), u32(at_b + 2 * column_pitch), sums, ra, rb)
        term(a, b, u32(at_a + 3 * row_pitch), u32(at_b + 3 * column_pitch), sums, ra, rb)
        term(a, b, u32(at_a + 4 * row_pitch), u32(at_b + 4 * column_pitch), sums, ra, rb)
        term(a, b, u32(at_a + 5 * row_pitch), u32(at_b + 5 * column_pitch), sums, ra, rb)
        term(a, b, u32(at_a + 6 * row_pitch), u32(at_b + 6 * column_pitch), sums, ra, rb)
        term(a, b, u32(at_a + 7 * row_pitch), u32(at_b + 7 * column_pitch), sums, ra, rb)

    return step
