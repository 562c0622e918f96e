"""The block simulator runs a right kernel right, and finds every kind of mistake that it is there for."""

from __future__ import annotations

import inspect
import textwrap

import numpy as np
import pytest
from numba import types

from block_simulator import SCHEDULES, BlockSimulator, SimulationError
from fastconv.cuda_kernels._cuda import cuda
from fastconv.cuda_kernels.intrinsics import (
    copy16_async,
    copy_commit,
    copy_wait_all,
    copy_wait_all_but_one,
    load4,
    load_matrices,
    load_matrices_transposed,
    mma_bfloat16,
    mma_float16,
    mma_tf32,
    pack_bfloat16,
    pack_float16,
    store4,
    u32,
    unpack_bfloat16,
    unpack_float16,
)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)


def product(a, b, c, depth):
    """c = a b for a (16, depth), b (depth, 16) given as its transpose: two warps, two stages of asynchronous copies."""
    stages = cuda.shared.array(512, types.uint32, alignment=16)
    t = u32(cuda.threadIdx.x)
    lane, warp = u32(t % 32), u32(t // 32)
    row, half = u32(t % 32 // 2), u32(t % 2)
    sums = (types.float32(0), types.float32(0), types.float32(0), types.float32(0))
    here = u32(warp * 128 + row * 8 + half * 4)  # the first warp copies a, the second b
    there = u32(row * depth + half * 4)
    source = a if warp == 0 else b
    copy16_async(stages, here, source, there, True)
    copy_commit()
    for k in range(0, depth, 8):
        stage = u32(k // 8 % 2 * 256)
        if k + 8 < depth:
            copy16_async(stages, u32((256 - stage) + here), source, u32(there + k + 8), True)
            copy_commit()
            copy_wait_all_but_one()
        else:
            copy_wait_all()
        cuda.syncthreads()
        fragment_a = load_matrices(stages, u32(stage + (lane % 16) * 8 + lane // 16 * 4))
        at_b = u32(stage + 128 + warp * 64 + lane // 4 * 8 + lane % 4)
        fragment_b = (stages[at_b], stages[u32(at_b + 4)])
        sums = mma_tf32(fragment_a, fragment_b, sums)
        cuda.syncthreads()
    at = u32(lane // 4 * 16 + warp * 8 + lane % 4 * 2)
    c[at], c[u32(at + 1)] = sums[0], sums[1]
    c[u32(at + 128)], c[u32(at + 129)] = sums[2], sums[3]


def run_product(kernel, order, landing):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (16, 24)).astype(np.float32) for _ in range(2))
    c = np.full(256, np.nan, np.float32)
    BlockSimulator(order, landing).launch(
        kernel, 1, 64, a.reshape(-1).view(np.uint32), b.reshape(-1).view(np.uint32), c, 24
    )
    return c.reshape(16, 16), a @ b.T


@every_schedule
def test_a_right_kernel_is_right(schedule):
    actual, expected = run_product(product, *schedule)
    np.testing.assert_array_equal(actual, expected)


def mutant(old, new):
    source = textwrap.dedent(inspect.getsource(product))
    assert source.count(old) == 1, "the mutation is of one place"
    scope = dict(globals())
    exec(compile(source.replace(old, new), "mutant", "exec"), scope)
    return scope["product"]


LOOP_BARRIER = "        cuda.syncthreads()\n"
READ = "        fragment_a = load_matrices(stages, "
SUM = "sums = mma_tf32(fragment_a, fragment_b, sums)"
MISTAKES = {
    "no barrier before the fragments are read": (LOOP_BARRIER + READ, READ),
    "no barrier after the fragments are read": (SUM + "\n" + LOOP_BARRIER, SUM + "\n"),
    "no wait for the copies": ("            copy_wait_all_but_one()\n", ""),
    "a wait for too few copies": ("copy_wait_all()", "copy_wait_all_but_one()"),
    "copies are never committed": ("True)\n            copy_commit()", "True)"),
    "both stages are one": ("(256 - stage)", "stage"),
    "a misaligned copy": ("+ row * 8 + half * 4)", "+ row * 8 + half * 5)"),
    "a misaligned matrix row": ("(lane % 16) * 8 + lane // 16 * 4", "(lane % 16) * 9 + lane // 16 * 4"),
    "a copy out of bounds": ("there + k + 8)", "there + k + 360)"),
    "a store out of bounds": ("c[u32(at + 129)]", "c[u32(at + 249)]"),
    "a warp that skips a barrier": (LOOP_BARRIER + READ, "        _ = warp or cuda.syncthreads()\n" + READ),
    "half a warp that skips an instruction": (SUM, SUM + " if lane < 16 else sums"),
}
WRONG = {
    "a fragment index off by one": ("lane // 4 * 8 + lane % 4)", "lane // 4 * 8 + (lane + 1) % 4)"),
    "a fragment of the wrong half": ("at_b + 4", "at_b + 3"),
    "a step of the loop twice": ("there + k + 8)", "there + k)"),
    "a sum in the wrong place": ("c[u32(at + 128)], c[u32(at + 129)]", "c[u32(at + 129)], c[u32(at + 128)]"),
}


@every_schedule
@pytest.mark.parametrize("mutation", MISTAKES)
def test_a_mistake_is_found_under_every_schedule(mutation, schedule):
    """A race is found from what the threads touched, not from a result that happened to go wrong."""
    kernel = mutant(*MISTAKES[mutation])
    try:
        actual, expected = run_product(kernel, *schedule)
    except SimulationError:
        return
    assert not np.array_equal(actual, expected)


@pytest.mark.parametrize("mutation", WRONG)
def test_a_wrong_index_gives_a_wrong_result(mutation):
    actual, expected = run_product(mutant(*WRONG[mutation]), "forward", "late")
    assert not np.array_equal(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Races that no schedule would show in the result
# ---------------------------------------------------------------------------------------------------------------------


def launch(kernel, threads, *arguments, order="forward"):
    BlockSimulator(order).launch(kernel, 1, threads, *arguments)


def test_a_read_of_what_another_warp_wrote():
    def kernel(out):
        shared = cuda.shared.array(64, types.float32)
        t = cuda.threadIdx.x
        shared[t] = t
        out[t] = shared[63 - t] if t >= 32 else 0

    with pytest.raises(SimulationError, match="race at element"):
        launch(kernel, 64, np.zeros(64, np.float32))


def test_lanes_of_a_warp_need_a_warp_barrier():
    def racy(out):
        shared = cuda.shared.array(32, types.float32)
        t = cuda.threadIdx.x
        shared[t] = t
        out[t] = shared[t ^ 1]

    def ordered(out):
        shared = cuda.shared.array(32, types.float32)
        t = cuda.threadIdx.x
        shared[t] = t
        cuda.syncwarp()
        out[t] = shared[t ^ 1]

    out = np.zeros(32, np.float32)
    launch(ordered, 32, out)
    np.testing.assert_array_equal(out, np.arange(32) ^ 1)
    with pytest.raises(SimulationError, match="race"):
        launch(racy, 32, out)


def test_what_was_never_written_is_nan():
    def kernel(out):
        shared, local = cuda.shared.array(32, types.float32), cuda.local.array(1, types.float32)
        words = cuda.shared.array(32, types.uint32)
        out[0], out[1] = shared[0], local[0]
        out[2], out[3] = unpack_float16(words[0])

    out = np.zeros(4, np.float32)
    launch(kernel, 1, out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_out_of_bounds(index):
    def kernel(x):
        x[index] = x[0]

    with pytest.raises(SimulationError, match="out of bounds"):
        launch(kernel, 1, np.zeros(4))


def test_a_misaligned_vector():
    def kernel(x):
        store4(x, 4, *load4(x, 2))

    with pytest.raises(SimulationError, match="misaligned"):
        launch(kernel, 1, np.zeros(8, np.float32))


@pytest.mark.parametrize("elements", [1, 2])
def test_a_copy_from_an_array_that_is_not_aligned(elements):
    """At a multiple of 16 bytes from the array's beginning, which is none."""

    def kernel(x):
        shared = cuda.shared.array(4, types.uint32, alignment=16)
        copy16_async(shared, 0, x, 8, True)
        copy_commit()
        copy_wait_all()

    x = np.zeros(32, np.float16)
    x = x[-(x.ctypes.data // 2) % 8 :]
    launch(kernel, 1, x)
    with pytest.raises(SimulationError, match="misaligned"):
        launch(kernel, 1, x[elements:])


def test_a_barrier_that_some_threads_never_reach():
    def kernel(x):
        if cuda.threadIdx.x < 16:
            cuda.syncthreads()

    with pytest.raises(SimulationError, match="wait for different things"):
        launch(kernel, 32, np.zeros(1))


def test_copies_that_nobody_waits_for():
    def kernel(x):
        shared = cuda.shared.array(4, types.float32, alignment=16)
        copy16_async(shared, 0, x, 0, True)

    with pytest.raises(SimulationError, match="under way"):
        launch(kernel, 1, np.zeros(4, np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Emulations
# ---------------------------------------------------------------------------------------------------------------------


def test_shuffles_and_votes():
    def kernel(out, votes):
        t = cuda.laneid
        out[0, t] = cuda.shfl_xor_sync(0xFFFFFFFF, t, 5)
        out[1, t] = cuda.shfl_down_sync(0xFFFFFFFF, t, 3)
        out[2, t] = cuda.shfl_up_sync(0xFFFFFFFF, t, 3)
        out[3, t] = cuda.shfl_sync(0xFFFFFFFF, t, 7)
        votes[t] = cuda.ballot_sync(0xFFFFFFFF, t % 3 == 0)

    out, votes, lane = np.zeros((4, 32), int), np.zeros(32, np.uint64), np.arange(32)
    launch(kernel, 32, out, votes, order="shuffled")
    np.testing.assert_array_equal(out[0], lane ^ 5)
    np.testing.assert_array_equal(out[1], np.where(lane < 29, lane + 3, lane))
    np.testing.assert_array_equal(out[2], np.where(lane >= 3, lane - 3, lane))
    np.testing.assert_array_equal(out[3], 7)
    assert set(votes) == {sum(1 << i for i in range(0, 32, 3))}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_product_by_matrix_loads(dtype):
    """a (16, 16) row by row, b (16, 8) row by row through the transposed load: the layouts agree with each other."""
    import ml_dtypes

    mma = mma_float16 if dtype == "float16" else mma_bfloat16
    kind = np.dtype(dtype if dtype == "float16" else ml_dtypes.bfloat16)

    def kernel(a, b, c):
        shared = cuda.shared.array(256, types.uint32, alignment=16)
        lane = cuda.threadIdx.x
        for i in range(lane, 128, 32):
            shared[i] = a[i]
        for i in range(lane, 64, 32):
            shared[128 + i] = b[i]
            shared[192 + i] = 0
        cuda.syncwarp()
        left = load_matrices(shared, lane % 16 * 8 + lane // 16 * 4)
        right = load_matrices_transposed(shared, 128 + lane * 4)
        c[lane // 4, 2 * (lane % 4)], c[lane // 4, 2 * (lane % 4) + 1], *_ = (
            sums := mma(left, (right[0], right[1]), (np.float32(0),) * 4)
        )
        c[lane // 4 + 8, 2 * (lane % 4)], c[lane // 4 + 8, 2 * (lane % 4) + 1] = sums[2], sums[3]

    rng = np.random.default_rng(1)
    a, b = (rng.integers(-8, 9, shape).astype(kind) for shape in [(16, 16), (16, 8)])
    c = np.full((16, 8), np.nan, np.float32)
    launch(kernel, 32, a.reshape(-1).view(np.uint32), b.reshape(-1).view(np.uint32), c)
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packing_rounds_as_numpy_does(dtype, rng):
    import ml_dtypes

    kind = np.dtype(dtype if dtype == "float16" else ml_dtypes.bfloat16)
    pack, unpack = (pack_float16, unpack_float16) if dtype == "float16" else (pack_bfloat16, unpack_bfloat16)
    special = [0.0, -0.0, np.inf, -np.inf, 1.0, 65504, 70000, 1e-7, 3e-39, 1 + 2**-9, 1 + 3 * 2**-9, -1 - 2**-12]
    values = np.concatenate([np.array(special, np.float32), rng.standard_normal(100).astype(np.float32)])

    def kernel(x, words, y):
        for i in range(0, x.size, 2):
            words[i // 2] = pack(x[i], x[i + 1])
            y[i], y[i + 1] = unpack(words[i // 2])

    words, y = np.zeros(len(values) // 2, np.uint32), np.zeros(len(values), np.float32)
    launch(kernel, 1, values, words, y)
    with np.errstate(over="ignore"):
        expected = values.astype(kind)
    np.testing.assert_array_equal(words.view(kind), expected)
    np.testing.assert_array_equal(y, expected.astype(np.float32))
