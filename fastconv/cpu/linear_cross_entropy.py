"""What the chunked linear cross-entropy needs of the CPU besides convolution and softmax cross-entropy.

`fastconv.linear_loss` has the algorithm; `cuda_kernels.linear_cross_entropy` has the same functions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import tasks
from .records import Integer, Reals
from .tasks import data_address
from .vector import tile as machine
from .vector.memory import offset
from .vector.move import PREFETCH, transpose

# Bytes of the logits that exist at one time. For each chunk the weight is read twice and its whole gradient is read and
# written, so fewer rows are slower: with 1024 features and 32000 classes 144 by 2 to 4 % against 160. With all else
# that is allocated, about 3 MiB, these 160 stay below a tenth of the logits of 2048 rows.
CHUNK_BYTES = 20 * 1024 * 1024
LEAST_ROWS = 128
MOST_ROWS = 512  # by then that traffic is nothing, and what is read again is better read from a cache
# Bytes of an operand that are packed at one time, small enough to stay in the L3 cache until they are used. 1.5 MiB
# took 2 % longer, 3 and 4 MiB as long.
BLOCK_BYTES = 2 * 1024 * 1024


def chunk_sizes(classes: int, features: int, dtype: np.dtype) -> tuple[int, int, int]:
    """Most rows of a chunk, most classes of a block of the logits, and of a block of their gradient.

    Nothing else may decide them: they decide the bits.
    """
    itemsize = max(dtype.itemsize, 4)  # of what is computed in
    rows = min(MOST_ROWS, max(LEAST_ROWS, CHUNK_BYTES // (max(classes, features) * itemsize)))
    block = BLOCK_BYTES // itemsize
    # the gradient's block is packed, and the weight's is converted where its type is not computed in
    return rows, max(1, block // features), max(1, block // (rows if dtype.itemsize >= 4 else max(rows, features)))


def flattened(array: np.ndarray, lead: int) -> np.ndarray:
    """The first `lead` axes as one: a view where the strides allow it."""
    return array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:])


def empty(shape: tuple[int, ...], dtype: np.dtype, like: np.ndarray) -> np.ndarray:
    return np.empty(shape, dtype)


def computable(array: np.ndarray) -> np.ndarray:
    """The array in C order and in the type that is computed in: a copy where it is not."""
    return np.require(array, np.float32 if array.itemsize == 2 else array.dtype, ["C", "A"])


def columns(rows: np.ndarray) -> np.ndarray:
    """The transposed matrix of one in C order, also in C order: the kernels read consecutive rows side by side."""
    count, features = rows.shape
    out = np.empty((features, count), rows.dtype)
    parameters = _Matrix.of(source=data_address(rows), target=data_address(out), rows=count, features=features)
    # counted as 16 operations an element, since reading and writing is all of the work
    tasks.run(_transpose, rows.dtype, -(-features // _STRIP), parameters, 64, 16 * rows.size)
    return out


_STRIP = 64  # features of a task: some cache lines of each row, since a line on its own is not fetched ahead


class _Matrix(tasks.Parameters):
    source: Reals  # [rows][features]
    target: Reals  # [features][rows]
    rows: Integer
    features: Integer


@tasks.body(_Matrix)
def _transpose(task, worker, p, real):
    """to[feature, row] = from[row, feature] for the features of a strip. NumPy takes ten times as long."""
    source, target, rows, features = p.source, p.target, p.rows, p.features
    lanes = machine.lanes(real)
    begin, end = task * _STRIP, min((task + 1) * _STRIP, features)
    whole = begin + (end - begin) // lanes * lanes if rows >= lanes else begin
    if whole > begin:
        for r in range(0, rows, lanes):
            row = min(r, rows - lanes)  # the last block overlaps the one before
            for f in range(begin, whole, lanes):
                block = offset(source, row * features + f)
                transpose(offset(target, f * rows + row), rows, block, features, lanes, PREFETCH * lanes)
    for f in range(whole, end):
        for row in range(rows):
            target[f * rows + row] = source[row * features + f]


def deliver(source: np.ndarray, out: np.ndarray) -> None:
    """out = source, which has the same number of elements in C order, rounded to the type of `out`."""
    with np.errstate(over="ignore"):  # what float16 cannot hold is infinite
        out[...] = source.reshape(out.shape)


def judge(
    target: np.ndarray, weight: np.ndarray | None, ignore_index: int, classes: int, mean: bool, like: np.ndarray
) -> tuple[tuple[int, int] | None, Any, Any]:
    """Look at the flat target before anything is computed.

    Returns (position and label of the first class index out of range, what the loss is divided by, what the gradient is
    multiplied with), None for what there is not.
    """
    total = float(len(target))
    if target.dtype.kind in "iu":
        counts = target != ignore_index
        wrong = counts & ((target < 0) | (target >= classes))
        if wrong.any():
            position = int(wrong.argmax())
            return (position, int(target[position])), None, None
        total = float(counts.sum() if weight is None else weight[target[counts]].sum(dtype=np.float64))
    return None, *((total, 1.0 / total if total else math.inf) if mean else (None, None))


def reduce(losses: np.ndarray, divisor: float | None, out: np.ndarray) -> None:
    """out = sum of the losses, divided by `divisor` unless that is None; nan where that is 0."""
    total = float(losses.sum(dtype=np.float64))
    if divisor is not None:
        total = total / divisor if divisor else math.nan
    with np.errstate(over="ignore"):
        out[...] = total
