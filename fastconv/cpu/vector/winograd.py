"""The transforms of Winograd convolution: of `lanes` tiles, kernels or channels at a time, one in each lane.

    input             B^T d B          d   (m + 2) x (m + 2) inputs of a tile
    weight            G w G^T          w   3 x 3 kernel
    output            A^T M A          M   (m + 2) x (m + 2) products of a tile
    output gradient   A dy A^T         dy  m x m output gradients of a tile
    weight gradient   G^T M G          M   (m + 2) x (m + 2) sums of products of a kernel

m, the outputs of a tile in each dimension, is 2 or 4. What is transformed has an index xi = row * (m + 2) + column.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from .call import vector_function
from .emit import Emitter, Int, Ptr, Vec, fma, interleave

TILES = (2, 4)  # what m may be


def matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T, G and B^T of F(m, 3): m outputs of a 3-tap filter by m + 2 multiplications.

    Lavin and Gray, Fast algorithms for convolutional neural networks (2016), from the Toom-Cook points 0, +-1, infinity
    for m = 2, and 0, +-2/3, +-3/2, infinity for m = 4: with the usual 0, +-1, +-2 the rms error of float32 is 3 times
    that of the direct sum, with these 1.4 times.
    """
    points = np.array({2: [0, 1, -1], 4: [0, 2 / 3, -2 / 3, 3 / 2, -3 / 2]}[m])
    n = m + 2
    at, g, bt = np.zeros((m, n)), np.zeros((n, 3)), np.zeros((n, n))
    for k, point in enumerate(points):
        others = np.delete(points, k)
        at[:, k] = point ** np.arange(m)
        g[k] = point ** np.arange(3) / np.prod(point - others)
        bt[k, : n - 1] = np.poly(others)[::-1]
    at[m - 1, n - 1] = g[n - 1, 2] = 1
    bt[n - 1] = np.poly(points)[::-1]
    bt[np.abs(bt) < 1e-12] = 0
    return at, g, bt


# ---------------------------------------------------------------------------------------------------------------------
# Linear combinations, with as few operations as the signs and zeros of the coefficients allow
# ---------------------------------------------------------------------------------------------------------------------


def _combine(coefficients: np.ndarray, values: Sequence[Vec]) -> Vec:
    terms = [(c, v) for c, v in zip(coefficients.tolist(), values, strict=True) if c]
    terms.sort(key=lambda term: abs(term[0]) != 1)
    c, total = terms[0]
    e = total.e
    if c != 1:
        total = e.constant(c) * total
    for c, v in terms[1:]:
        if c == 1:
            total = total + v
        elif c == -1:
            total = total - v
        else:
            total = fma(e.constant(c), v, total)
    return total


def _transform(matrix: np.ndarray, values: Sequence[Vec]) -> list[Vec]:
    """matrix @ values. Rows for points +p and -p differ in the sign of every second column: they share halves."""
    result: dict[int, Vec] = {}
    for i, row in enumerate(matrix):
        if i in result:
            continue
        signs = np.where(np.arange(len(row)) % 2, -1, 1)
        twin = next((j for j in range(i + 1, len(matrix)) if np.array_equal(matrix[j], row * signs)), None)
        if twin is None:
            result[i] = _combine(row, values)
            continue
        even, odd = _combine(row[0::2], values[0::2]), _combine(row[1::2], values[1::2])
        result[i], result[twin] = even + odd, even - odd
    return [result[i] for i in range(len(matrix))]


def _both_sides(matrix: np.ndarray, load: Callable[[int, int], Vec]) -> list[list[Vec]]:
    """matrix @ X @ matrix.T for X[i, j] = load(i, j)."""
    n = matrix.shape[1]
    columns = [_transform(matrix, [load(i, j) for i in range(n)]) for j in range(n)]
    return [_transform(matrix, [columns[j][i] for j in range(n)]) for i in range(len(matrix))]


def _one_by_one(source: Ptr, pitch: Int, columns: int) -> Callable[[int, int], Vec]:
    """Loads element (i, j) from ``source + (i * columns + j) * pitch``."""
    return lambda i, j: (source + pitch * (i * columns + j)).vector()


def _row_by_row(source: Ptr, pitch: Int) -> Callable[[int, int], Vec]:
    """Loads element (i, j) from ``source + i * pitch + j * lanes``."""
    return lambda i, j: (source + (pitch * i + j * source.e.lanes)).vector()


def _store(target: Ptr, pitch: Int, values: Sequence[Vec]) -> None:
    """Store vectors `pitch` elements apart: places are sums, since products take longer than what is stored there."""
    for value in values:
        target.store(value)
        target = target + pitch


def _flat(rows: Sequence[Sequence[Vec]]) -> list[Vec]:
    return list(itertools.chain.from_iterable(rows))


def _mark(suspect: Vec, value: Vec) -> Vec:
    """nan from here on if the value is infinite or nan."""
    return suspect + value * suspect.e.zero()


def _side_by_side(vectors: Sequence[Vec]) -> list[Vec]:
    """2 or 4 vectors, so that their elements at the same place lie side by side."""
    if len(vectors) == 1:
        return list(vectors)
    pairs = zip(_side_by_side(vectors[0::2]), _side_by_side(vectors[1::2]), strict=True)
    return [v for pair in pairs for v in interleave(*pair)]


# ---------------------------------------------------------------------------------------------------------------------
# The transforms
# ---------------------------------------------------------------------------------------------------------------------


@vector_function(restrict="target")
def transform_input(e: Emitter, m: Int, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int) -> None:
    """`lanes` tiles: target[xi * target_pitch] = (B^T d B)[xi], with d[xi] at source[xi * source_pitch]."""
    for outputs in e.switch(m, TILES):
        if outputs:
            _, _, bt = matrices(outputs)
            _store(target, target_pitch, _flat(_both_sides(bt, _one_by_one(source, source_pitch, outputs + 2))))


@vector_function(restrict="target")
def transform_pixels(e: Emitter, m: Int, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int) -> None:
    """`lanes` channels of a tile: target[xi * target_pitch] = (B^T d B)[xi].

    Element (i, j) of d is the vector at ``source + i * source_pitch + j * lanes``.
    """
    for outputs in e.switch(m, TILES):
        if outputs:
            _, _, bt = matrices(outputs)
            _store(target, target_pitch, _flat(_both_sides(bt, _row_by_row(source, source_pitch))))


@vector_function(restrict="target")
def transform_weight(e: Emitter, m: Int, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int) -> None:
    """`lanes` kernels: target[xi * target_pitch] = (G w G^T)[xi], tap 3 * i + j of w at source[tap * source_pitch].

    The pitch of the source may be negative.
    """
    for outputs in e.switch(m, TILES):
        if outputs:
            _, g, _ = matrices(outputs)
            _store(target, target_pitch, _flat(_both_sides(g, _one_by_one(source, source_pitch, 3))))


@vector_function(restrict="target")
def transform_output(
    e: Emitter, m: Int, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, bias: Ptr, relu: Int,
    suspect: Ptr,
) -> None:  # fmt: skip
    """`lanes` tiles: their m x m outputs A^T M A + bias[0], through max(0, .) if relu is not 0.

    M[xi] is read at ``source + xi * source_pitch``; row i of the outputs of all tiles, m values for each tile side by
    side, is written at ``target + i * target_pitch``. `suspect` (one vector) becomes nan in the lane of a tile that has
    an infinite or nan output.
    """
    for outputs in e.switch(m, TILES):
        if not outputs:
            continue
        at, _, _ = matrices(outputs)
        rows = _both_sides(at, _one_by_one(source, source_pitch, outputs + 2))
        each, is_relu, zero = bias[0].broadcast(), relu.differs(0).broadcast(), e.zero()
        total = suspect.vector()
        for i, row in enumerate(rows):
            finished = []
            for value in row:
                value = value + each
                total = _mark(total, value)
                finished.append((is_relu & (value < zero)).choose(zero, value))
            for k, value in enumerate(_side_by_side(finished)):
                (target + (target_pitch * i + k * e.lanes)).store(value)
        suspect.store(total)


@vector_function(restrict="target")
def transform_output_gradient(
    e: Emitter, m: Int, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int
) -> None:
    """`lanes` channels of a tile: target[xi * target_pitch] = (A dy A^T)[xi].

    Element (i, j) of dy is the vector at ``source + i * source_pitch + j * lanes``.
    """
    for outputs in e.switch(m, TILES):
        if outputs:
            at, _, _ = matrices(outputs)
            _store(target, target_pitch, _flat(_both_sides(at.T, _row_by_row(source, source_pitch))))


@vector_function(restrict="target")
def transform_weight_gradient(
    e: Emitter, m: Int, target: Ptr, target_pitch: Int, source: Ptr, source_pitch: Int, suspect: Ptr
) -> None:
    """`lanes` kernels: target[tap * target_pitch] = (G^T M G)[tap].

    M[xi] is read at ``source + xi * source_pitch``; `suspect` (one vector) becomes nan in the lane of a kernel that has
    an infinite or nan element.
    """
    for outputs in e.switch(m, TILES):
        if outputs:
            _, g, _ = matrices(outputs)
            values = _flat(_both_sides(g.T, _one_by_one(source, source_pitch, outputs + 2)))
            _store(target, target_pitch, values)
            total = suspect.vector()
            for value in values:
                total = _mark(total, value)
            suspect.store(total)


# ---------------------------------------------------------------------------------------------------------------------
# Their plain siblings
# ---------------------------------------------------------------------------------------------------------------------


def _both_sides_plain(matrix, x):
    """[lane][i][j] of matrix @ x @ matrix.T, by the definition."""
    rows, terms = matrix.shape
    result = [[[0.0] * rows for _ in range(rows)] for _ in x]
    for lane, tile in enumerate(x):
        for i in range(rows):
            for j in range(rows):
                for k in range(terms):
                    for n in range(terms):
                        result[lane][i][j] += matrix[i, k] * float(tile[k][n]) * matrix[j, n]
    return result


def _read_plain(source, pitch, n, lanes):
    """[lane][i][j], element (i, j) at (i * n + j) * pitch."""
    return [[[source[(i * n + j) * pitch + lane] for j in range(n)] for i in range(n)] for lane in range(lanes)]


def _read_rows_plain(source, pitch, n, lanes):
    return [[[source[i * pitch + j * lanes + lane] for j in range(n)] for i in range(n)] for lane in range(lanes)]


def _write_plain(target, pitch, results):
    for lane, rows in enumerate(results):
        for xi, value in enumerate(itertools.chain.from_iterable(rows)):
            target[xi * pitch + lane] = value


@transform_input.plain
def transform_input_plain(m, target, target_pitch, source, source_pitch, *, tile):
    d = _read_plain(source, source_pitch, m + 2, tile.lanes)
    _write_plain(target, target_pitch, _both_sides_plain(matrices(m)[2], d))


@transform_pixels.plain
def transform_pixels_plain(m, target, target_pitch, source, source_pitch, *, tile):
    d = _read_rows_plain(source, source_pitch, m + 2, tile.lanes)
    _write_plain(target, target_pitch, _both_sides_plain(matrices(m)[2], d))


@transform_weight.plain
def transform_weight_plain(m, target, target_pitch, source, source_pitch, *, tile):
    w = _read_plain(source, source_pitch, 3, tile.lanes)
    _write_plain(target, target_pitch, _both_sides_plain(matrices(m)[1], w))


@transform_output.plain
def transform_output_plain(m, target, target_pitch, source, source_pitch, bias, relu, suspect, *, tile):
    products = _read_plain(source, source_pitch, m + 2, tile.lanes)
    for lane, rows in enumerate(_both_sides_plain(matrices(m)[0], products)):
        for i in range(m):
            for j in range(m):
                value = rows[i][j] + bias[0]
                suspect[lane] += value * 0
                target[i * target_pitch + lane * m + j] = 0 if relu and value < 0 else value


@transform_output_gradient.plain
def transform_output_gradient_plain(m, target, target_pitch, source, source_pitch, *, tile):
    dy = _read_rows_plain(source, source_pitch, m, tile.lanes)
    _write_plain(target, target_pitch, _both_sides_plain(matrices(m)[0].T, dy))


@transform_weight_gradient.plain
def transform_weight_gradient_plain(m, target, target_pitch, source, source_pitch, suspect, *, tile):
    results = _both_sides_plain(matrices(m)[1].T, _read_plain(source, source_pitch, m + 2, tile.lanes))
    _write_plain(target, target_pitch, results)
    for lane, rows in enumerate(results):
        for value in itertools.chain.from_iterable(rows):
            suspect[lane] += value * 0
