"""Mistakes planted in every kernel whose threads work together, one at a time: the block simulator finds each of them.

A mutation is a kernel's source with one piece of text replaced. It counts as found when the simulator raises an error,
or the result differs from the reference, on the case that the unchanged kernel gets right. The kinds:

- barrier: one is left out, or a part of shared memory is used again before one;
- wait: a thread uses what it has copied asynchronously without waiting for the copies, or copies over what is in use;
- fragment: an operand or a sum in the wrong register, lane, warp, row or column;
- alignment: a copy, or a load or store of 128 bits, at an address that is no multiple of its size;
- bounds: what is beyond the end of an array is read, stored or counted.

`test_every_family_has_every_kind` says which kinds a family of kernels cannot have.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_cuda_depthwise as depthwise_tests
import test_implicit_gemm as product_tests
import test_softmax_rows as row_tests
from test_cuda_channel_sums import run as run_sums  # noqa: F401
from test_cuda_depthwise import run as run_depthwise  # noqa: F401
from test_cuda_depthwise import threads  # noqa: F401
from test_implicit_gemm import run as run_product  # noqa: F401

from block_simulator import SCHEDULES, SimulationError
from fastconv import reference
from fastconv.cuda_kernels import (
    _cuda,
    channel_sums,
    depthwise,
    depthwise_kernels,
    implicit_gemm,
    implicit_gemm_weight_grad,
    row_groups,
    softmax_rows,
    tiles,
)
from helpers import integers
from shapes import Case
from simulation import device, simulated

pytestmark = pytest.mark.skipif(not _cuda.SIMULATOR, reason="kernels of the block simulator, on arrays of the host")

# ---------------------------------------------------------------------------------------------------------------------
# The kernels, each on a case that exercises all of it
# ---------------------------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """Kernels made of the same source, and how they are run: ``check()`` fails if the result is wrong."""

    operation: str
    options: dict[str, Any]


TALL = tiles.Tile(32, 64, 4, 8)  # two warps, two groups of columns for each thread
TENSOR = {"tile": product_tests.SMALL}
PRODUCTS = {
    "tiles, gather": Family("forward", {"dtype": "float32", "tile": TALL}),
    "tiles, weight gradient": Family("weight_grad", {"dtype": "float32", "tile": TALL}),
    "tensor tiles, copied": Family("forward", TENSOR | {"dtype": "float16", "last": True}),
    "tensor tiles, through registers": Family("forward", TENSOR | {"dtype": "float16"}),
    "tensor tiles, tf32": Family("forward", TENSOR | {"dtype": "float32", "last": True, "precision": "tf32"}),
    "tensor tiles, weight gradient": Family("weight_grad", TENSOR | {"dtype": "bfloat16"}),
}
ROWS = {
    "rows, read once": Family("cross_entropy", {"group": row_groups.Group(128, 2)}),
    "rows, read twice": Family("cross_entropy", {"group": row_groups.Group(128, 0), "label_smoothing": 0.25}),
    "rows, softmax": Family("softmax", {"group": row_groups.Group(128, 2)}),
    "rows, softmax read twice": Family("softmax", {"group": row_groups.Group(128, 0)}),
}
DEPTHWISE = {
    "depthwise, forward": Family("forward", {}),
    "depthwise, input gradient": Family("input_grad", {}),
    "depthwise, weight gradient": Family("weight_grad", {}),
}

SUMS = {
    "channel sums, channels first": Family("bias_grad", {"last": False}),
    "channel sums, channels last": Family("bias_grad", {"last": True}),
}

# six steps of 32 terms, which is twice around the stages; a last tile that is not full, pads, 16 channels that lie in
# whole chunks
STEPS = Case("steps", "", (1, 16, 7, 8), (40, 16, 4, 3), padding=1, dilation=(1, 2))
POSITIONS = Case("positions", "", (3, 8, 5, 6), (36, 8, 3, 3), padding=1)


def multiply(run, rng, operation, dtype, schedule, **options):
    case = STEPS if operation == "forward" else POSITIONS
    arrays = product_tests.operands(operation, case, lambda shape: integers(rng, shape, dtype))
    exact = product_tests.reference(operation, case)(*(a.astype(np.float64) for a in arrays))
    actual = run(operation, case, *arrays, schedule=schedule, **options)
    np.testing.assert_array_equal(actual.astype(np.float64), exact.astype(actual.dtype).astype(np.float64))


def filtered(run, rng, operation, schedule):
    case = depthwise_tests.NAMED["vectors"]
    arrays = depthwise_tests.operands(operation, case, lambda shape: integers(rng, shape, "float32"))
    actual = run(operation, case, *arrays, order=schedule[0])
    np.testing.assert_array_equal(actual, depthwise_tests.reference(operation, case)(*arrays))


def sum_channels(run, rng, schedule, **options):
    dy = integers(rng, (2, 35, 9, 17), "float32")
    np.testing.assert_array_equal(run(dy, order=schedule[0], **options), dy.sum((0, 2, 3)))


def rows_of_classes(monkeypatch, rng, operation, schedule, group, **options):
    """Rows that begin at different places of a vector, with edges on both sides, and two vectors of some threads."""
    logits = row_tests.aligned((3, 701), np.float32)
    logits[...] = 3 * rng.standard_normal(logits.shape)
    labels = np.array([0, 700, 348])
    if operation == "cross_entropy":
        loss, grad, lse = row_tests.cross_entropy(monkeypatch, logits, labels, schedule, group, **options)
        expected = reference.softmax_cross_entropy(logits, labels, reduction="none", **options)
        row_tests.check(loss, expected[0], "float32")
        row_tests.check(grad, expected[1], "float32")
        row_tests.check(lse, [reference.log_sum_exp(z) for z in logits.astype(np.float64)], "float32")
        return
    monkeypatch.setattr(softmax_rows, "launch_blocks", simulated(schedule))
    monkeypatch.setattr(softmax_rows, "group_for", lambda dtype, classes, once: group)
    out = row_tests.aligned(logits.shape, np.float32)
    softmax_rows.softmax_rows(device(logits)[..., None, None, None], False, device(out)[..., None, None, None])
    row_tests.check(out, [reference.softmax(z) for z in logits.astype(np.float64)], "float32")


@pytest.fixture
def check(run_product, run_depthwise, run_sums, monkeypatch, rng):  # noqa: F811
    """``check(family, schedule)``: an AssertionError or SimulationError unless the family's kernel is right."""

    def check(name, schedule=("forward", "late")):
        with np.errstate(all="ignore"):
            if name in PRODUCTS:
                family = PRODUCTS[name]
                multiply(run_product, rng, family.operation, schedule=schedule, **family.options)
            elif name in ROWS:
                family = ROWS[name]
                rows_of_classes(monkeypatch, rng, family.operation, schedule, **family.options)
            elif name in SUMS:
                sum_channels(run_sums, rng, schedule, **SUMS[name].options)
            else:
                filtered(run_depthwise, rng, DEPTHWISE[name].operation, schedule)

    return check


# ---------------------------------------------------------------------------------------------------------------------
# The mutations
# ---------------------------------------------------------------------------------------------------------------------

GATHERS = [name for name, family in PRODUCTS.items() if family.operation == "forward"]
TENSORS = [name for name in PRODUCTS if name.startswith("tensor")]
TENSOR_GATHERS = [name for name in TENSORS if name in GATHERS]
TILES = [name for name in PRODUCTS if name not in TENSORS]
WEIGHTS = [name for name in PRODUCTS if name not in GATHERS]
COPIED = ["tensor tiles, copied", "tensor tiles, tf32"]
FETCHED = [name for name in PRODUCTS if name not in COPIED]
CROSS_ENTROPIES = [name for name, family in ROWS.items() if family.operation == "cross_entropy"]
READ_ONCE = ["rows, read once", "rows, softmax"]
READ_TWICE = [name for name in ROWS if name not in READ_ONCE]
SUMMED = ["depthwise, weight gradient"]
GATHERED = [name for name in DEPTHWISE if name not in SUMMED]


class Mutation(NamedTuple):
    kind: str
    module: Any
    families: list[str]
    old: str
    new: str


LOOP_END = "u32(stage * a_stage + a_at), u32(stage * b_stage + b_at), next_a, next_b)\n"
BARRIER = "            cuda.syncthreads()\n"
FIRST_STEP = "        row_of_thread, column_of_thread, from_a, from_b = origin(t)"
FIRST_STEP_OF_GATHER = "    " + FIRST_STEP
AFTER_WAIT = "                cuda.syncthreads()  # all have waited"
STORED = "                    partial[u32(at + channel * channel_step + j * column_taps + k)] = total\n"
READ_SUMS = "            for i in range(t, column_taps * lanes, THREADS):\n"
TO_STORE = " * row_spacing)\n                        if r < rows:\n"
OF_COLUMN = "                    n = u32(column // positions)"
COMMIT = "                    if tensor:\n                        copy_commit()\n"
WAIT = "                copy_wait_all_but_one()\n"
ROUND = "                round_stage(a, b, u32(stage * a_stage + a_at), u32(stage * b_stage + b_at))\n"
WRITE_SCRATCH = "            scratch[place + t // 32] = x\n"
MUTATIONS = {
    # -- barriers
    "no barrier after a stage is stored": Mutation(
        "barrier", implicit_gemm, [name for name in FETCHED if name in GATHERS], LOOP_END + "    " + BARRIER, LOOP_END
    ),
    "no barrier after a stage of weights is stored": Mutation(
        "barrier", implicit_gemm_weight_grad, WEIGHTS, LOOP_END + BARRIER, LOOP_END
    ),
    "no barrier before the first step": Mutation(
        "barrier", implicit_gemm, [name for name in FETCHED if name in GATHERS], BARRIER + FIRST_STEP_OF_GATHER,
        FIRST_STEP_OF_GATHER,
    ),
    "no barrier before the first step of weights": Mutation(
        "barrier", implicit_gemm_weight_grad, WEIGHTS, BARRIER[4:] + FIRST_STEP, FIRST_STEP
    ),
    "a stage stored over the one in use": Mutation(
        "barrier", implicit_gemm, [name for name in FETCHED if name in GATHERS], "stage = u32(1 - stage)",
        "stage = u32(stage)",
    ),
    "a stage of weights stored over the one in use": Mutation(
        "barrier", implicit_gemm_weight_grad, WEIGHTS, "stage = u32(1 - stage)", "stage = u32(stage)"
    ),
    "no barrier after the wait for copies": Mutation(
        "barrier", implicit_gemm, COPIED, AFTER_WAIT, AFTER_WAIT.replace("cuda.syncthreads()", "pass")
    ),
    "the wait after the barrier": Mutation(
        "barrier", implicit_gemm, COPIED, WAIT + ROUND + AFTER_WAIT, f"{AFTER_WAIT}\n{WAIT}{ROUND}  #"
    ),
    "no barrier before the sums of the warps are read": Mutation(
        "barrier", row_groups, [*ROWS], WRITE_SCRATCH + "        cuda.syncthreads()\n", WRITE_SCRATCH
    ),
    "two reductions in one place": Mutation("barrier", row_groups, [*ROWS], "scratch[place + t", "scratch[t"),
    "a barrier that some warps do not reach": Mutation(
        "barrier", row_groups, [*ROWS], "        cuda.syncthreads()\n        x = scratch",
        "        if t < 32:\n            cuda.syncthreads()\n        x = scratch",
    ),
    "no barrier before the sums of the block are read": Mutation(
        "barrier", depthwise_kernels, SUMMED, BARRIER + READ_SUMS, READ_SUMS
    ),
    "no barrier before they are stored over": Mutation("barrier", depthwise_kernels, SUMMED, STORED + BARRIER, STORED),
    "no barrier before the sums of the warps are added": Mutation(
        "barrier", channel_sums, [*SUMS], "        cuda.syncthreads()\n", ""
    ),
    # -- asynchronous copies
    "no wait for the copies of weights": Mutation(
        "wait", implicit_gemm, ["tensor tiles, through registers"], "            copy_wait_all()\n", ""
    ),
    "copies of weights are never committed": Mutation(
        "wait", implicit_gemm, ["tensor tiles, through registers"], COMMIT, ""
    ),
    "weights copied into the stage in use": Mutation(
        "wait", implicit_gemm, ["tensor tiles, through registers"], "u32((1 - stage) * a_stage", "u32(stage * a_stage"
    ),
    "no wait for the copies": Mutation("wait", implicit_gemm, COPIED, WAIT, ""),
    "one more group than there are others is waited for": Mutation(
        "wait", implicit_gemm, COPIED, "# fmt: skip\n                copy_commit()\n                step(",
        "# fmt: skip\n                if later < last:\n                    copy_commit()\n                step(",
    ),
    "the first copies are never committed": Mutation(
        "wait", implicit_gemm, COPIED, "                copy_commit()\n" + FIRST_STEP_OF_GATHER, FIRST_STEP_OF_GATHER
    ),
    "weights copied into the stage that is multiplied": Mutation(
        "wait", implicit_gemm, COPIED, "u32(before * a_stage", "u32(stage * a_stage"
    ),
    "a source copied into the stage that is multiplied": Mutation(
        "wait", implicit_gemm, COPIED, "u32(before * b_stage", "u32(stage * b_stage"
    ),
    "copied into the stage after": Mutation(
        "wait", implicit_gemm, COPIED, "if stage == 0 else u32(stage - 1)", "if stage == 0 else u32(0)"
    ),
    "rounded before it has landed": Mutation(
        "wait", implicit_gemm, ["tensor tiles, tf32"], WAIT + ROUND, ROUND + WAIT
    ),
    "rounded after others may read it": Mutation(
        "barrier", implicit_gemm, ["tensor tiles, tf32"], ROUND + AFTER_WAIT, f"{AFTER_WAIT}\n{ROUND}  #"
    ),
    # -- operands and sums in their places
    "terms that no one fetched": Mutation(
        "fragment", implicit_gemm, ["tiles, gather", "tensor tiles, through registers"],
        "column, k_b = u32(t % columns_of_tile), u32(t", "column, k_b = u32(t % columns_of_tile), u32(1 + t",
    ),
    "a chunk of the next column": Mutation(
        "fragment", implicit_gemm, COPIED, "i * columns_apart * row_of_stage), source",
        "i * columns_apart * row_of_stage + row_of_stage), source",
    ),
    "the wrong columns of a fragment": Mutation(
        "fragment", tiles, TILES, "load4(b, place(at_b + g * column_jump))", "load4(b, place(at_b + g * 4))"
    ),
    "a fragment in another order": Mutation(
        "fragment", tiles, TILES, "rb[4 * g + i] = x[i]", "rb[4 * g + i] = x[i ^ 1]"
    ),
    "a term twice": Mutation("fragment", tiles, TILES, "place(at_a + 5 * row_pitch)", "place(at_a + 4 * row_pitch)"),
    "a fragment of the wrong lane": Mutation(
        "fragment", tiles, TENSORS, "first_tall + lane % 16)", "first_tall + lane % 8)"
    ),
    "the words of a fragment in another order": Mutation(
        "fragment", tiles, TENSORS, "words[4 * i + j] = x[j]", "words[4 * i + j] = x[j ^ 1]"
    ),
    "the first words for the second": Mutation(
        "fragment", tiles, TENSORS, "short_words[2 * j + 1]", "short_words[2 * j]"
    ),
    "half of the terms twice": Mutation(
        "fragment", tiles, [name for name in TENSORS if name not in COPIED],
        "part(a, b, u32(ahead(at_a, 2)), u32(ahead(at_b, 2))", "part(a, b, at_a, at_b",
    ),
    "half of the terms twice, rows together": Mutation(
        "fragment", tiles, COPIED, "u32(ahead(at_b, 2)), u32(ahead(at_a, 2))", "at_b, at_a"
    ),
    "a sum in the place of its neighbour": Mutation("fragment", tiles, TENSORS, "new[0], new[1]", "new[1], new[0]"),
    "the sums of another warp": Mutation("fragment", tiles, TENSORS, "warp // warps * of_short", "0"),
    "the wrong row": Mutation(
        "fragment", implicit_gemm, ["tiles, gather"], "i // row_run * row_jump + i % row_run" + TO_STORE,
        "i // row_run * row_jump + i % 3" + TO_STORE,
    ),
    "sums of the wrong rows": Mutation(
        "fragment", implicit_gemm, COPIED, "first_row + g * row_jump", "first_row + g * 4"
    ),
    "a step of the warp's reduction left out": Mutation("fragment", row_groups, [*ROWS], "16 >> i", "(16 >> i) & 30"),
    "the sum of one warp for all": Mutation(
        "fragment", row_groups, [*ROWS], "scratch[place + t % 32]", "scratch[place]"
    ),
    "vectors of the neighbour": Mutation(
        "fragment", softmax_rows, READ_ONCE, "t + v * threads", "t + v * (threads - 1)"
    ),
    "the label at another place of its vector": Mutation(
        "fragment", softmax_rows, ["rows, read once"], "if i == label_place", "if i == label_place ^ 1"
    ),
    "classes of the neighbour": Mutation(
        "fragment", softmax_rows, ["rows, read twice"], "before + place * width, sums", "place * width, sums"
    ),
    "a step of the warp's sum left out": Mutation(
        "fragment", depthwise_kernels, SUMMED, "x += cuda.shfl_xor_sync(0xFFFFFFFF, x, 4)", "pass"
    ),
    "the sums of one warp left out": Mutation(
        "fragment", depthwise_kernels, SUMMED, "for w in range(WARPS)", "for w in range(1, WARPS)"
    ),
    "the wrong tap": Mutation(
        "fragment", depthwise_kernels, [*DEPTHWISE], "place = tap_step * k + result_step",
        "place = tap_step * k - result_step",
    ),
    "a step of the sum of a warp left out": Mutation(
        "fragment", channel_sums, ["channel sums, channels first"], "16 >> i", "(16 >> i) & 30"
    ),
    "the sums of the last warp left out": Mutation(
        "fragment", channel_sums, [*SUMS], "range(1, warps)", "range(1, warps - 1)"
    ),
    "the sum of another channel": Mutation(
        "fragment", channel_sums, ["channel sums, channels last"], "sums[u32(w * lanes + t)]", "sums[u32(w * lanes)]"
    ),
    # -- alignment
    "a misaligned load of a fragment": Mutation(
        "alignment", tiles, TILES, "load4(a, place(at_a + g * row_jump))", "load4(a, place(at_a + g * row_jump + 1))"
    ),
    "rows of a stage that are not aligned": Mutation(
        "alignment", tiles, TILES, "row_pitch, column_pitch = tile.rows + 4", "row_pitch, column_pitch = tile.rows + 3"
    ),
    "a misaligned copy of weights": Mutation(
        "alignment", implicit_gemm, TENSOR_GATHERS, "r * weight_row + k * chunk)", "r * weight_row + k * chunk + 1)"
    ),
    "a misaligned copy of a source": Mutation(
        "alignment", implicit_gemm, COPIED, "u32(columns[i, 0] + e[0]), inside)",
        "u32(columns[i, 0] + e[0] + 1), inside)",
    ),
    "a misaligned row of a matrix": Mutation("alignment", tiles, COPIED, "% CHUNKS)) * 4)", "% CHUNKS)) * 3)"),
    "a misaligned chunk": Mutation(
        "alignment", tiles, [name for name in TENSORS if name not in COPIED], "pitch + chunk * 4)", "pitch + chunk * 3)"
    ),
    "rows of a matrix that are not aligned": Mutation("alignment", tiles, TENSORS, "ROW = 4 * CHUNKS", "ROW = 18"),
    "a misaligned row of the table": Mutation(
        "alignment", implicit_gemm_weight_grad, WEIGHTS, "load4(table, u32(4 * min(", "load4(table, u32(2 + 4 * min("
    ),
    "a misaligned load of logits": Mutation(
        "alignment", row_groups, [*ROWS], "load4(words, np.uint64(vector * 4))",
        "load4(words, np.uint64(vector * 4 + 1))",
    ),
    "a misaligned store of a gradient": Mutation(
        "alignment", row_groups, [*ROWS], "words, np.uint64(vector * 4), registers",
        "words, np.uint64(vector * 4 + 2), registers",
    ),
    "a vector at the wrong column": Mutation(
        "alignment", depthwise_kernels, [*DEPTHWISE], "meetings) // vector * vector", "meetings)"
    ),
    # -- bounds
    "columns beyond the last are stored": Mutation(
        "bounds", implicit_gemm, ["tiles, gather"], "if column < columns:\n" + OF_COLUMN, "if True:\n" + OF_COLUMN,
    ),
    "columns of weights beyond the last are stored": Mutation(
        "bounds", implicit_gemm_weight_grad, WEIGHTS,
        "                    if column < columns:\n                        partial",
        "                    if True:\n                        partial",
    ),
    "positions beyond the last are summed": Mutation(
        "bounds", implicit_gemm_weight_grad, WEIGHTS, "u32(first + v) < last, n", "True, n"
    ),
    "chunks outside of the source are read": Mutation(
        "bounds", implicit_gemm, COPIED, "u32(columns[i, 0] + e[0]), inside)", "u32(columns[i, 0] + e[0]), True)"
    ),
    "terms outside of the source are read": Mutation(
        "bounds", implicit_gemm, ["tiles, gather", "tensor tiles, through registers"],
        "source[u32(columns[0, 0] + e[0])] if inside else nothing", "source[u32(columns[0, 0] + e[0])]",
    ),
    "vectors beyond the row": Mutation("bounds", softmax_rows, READ_ONCE, "if place < whole:", "if place <= whole:"),
    "vectors beyond the row, one after the other": Mutation(
        "bounds", softmax_rows, READ_TWICE, "in range(t, whole, threads)", "in range(t, whole + 1, threads)"
    ),
    "the edges of a row left out": Mutation(
        "bounds", row_groups, [*ROWS], "edge < classes)", "edge + 1 < classes)"
    ),
    "columns of the padding are read": Mutation(
        "bounds", depthwise_kernels, [*DEPTHWISE], "valid and u32(column + i) < width", "valid"
    ),
    "rows of the padding are read": Mutation(
        "bounds", depthwise_kernels, [*DEPTHWISE], "inside and u32(row + r) < sizes[0]", "inside"
    ),
    "channels beyond the last are summed": Mutation(
        "bounds", channel_sums, ["channel sums, channels last"], "if channel < channels:", "if True:"
    ),
    "positions of the next part are summed": Mutation(
        "bounds", channel_sums, [*SUMS], "last = min(u32(first + part), count)", "last = u32(first + part + 1)"
    ),
    "rows beyond the last are stored": Mutation(
        "bounds", depthwise_kernels, GATHERED, "if u32(row + t) < height:", "if True:"
    ),
}  # fmt: skip

FAMILIES = [*PRODUCTS, *ROWS, *SUMS, *DEPTHWISE]
PLANTED = [(name, family) for name, mutation in MUTATIONS.items() for family in mutation.families]
KINDS = {"barrier", "wait", "fragment", "alignment", "bounds"}
# Only products on the tensor cores copy asynchronously (but not the weight gradient's operands, which are transposed on
# the way and go through registers); the threads of a depthwise gather never meet; sums of channels have no vectors.
IMPOSSIBLE = {
    "wait": [*TILES, *WEIGHTS, *ROWS, *SUMS, *DEPTHWISE],
    "barrier": GATHERED,
    "alignment": [*SUMS],
}


PRODUCT_KERNELS = [(implicit_gemm, "gather_kernel"), (implicit_gemm_weight_grad, "weight_kernel")]
ROW_KERNELS = [(softmax_rows, "cross_entropy_row_kernel"), (softmax_rows, "softmax_row_kernel")]
# The names of a module that others have imported, and where: what is changed in it takes their place.
NAMES = {
    **{module: [(module, name)] for module, name in PRODUCT_KERNELS},
    tiles: [(module, "product") for module, _ in PRODUCT_KERNELS],
    depthwise_kernels: [(depthwise, name) for name in ("gather_kernel", "weight_kernel", "Axis")],
    softmax_rows: ROW_KERNELS,
    row_groups: [
        (softmax_rows, name) for name in ("VECTORS", "over_group", "row_parts_of", "warp_max", "warp_sum")
    ],
    channel_sums: [(channel_sums, "bias_grad_kernel")],
}  # fmt: skip
# Kernels made of parts from another module.
MADE_OF = {tiles: PRODUCT_KERNELS, row_groups: ROW_KERNELS}


def plant(monkeypatch, mutation):
    """Put kernels made of the changed source in the place of those that the entry functions launch."""
    source = inspect.getsource(mutation.module)
    assert mutation.old in source, "the mutation is of text that is there"
    scope = {"__name__": mutation.module.__name__, "__package__": mutation.module.__package__}
    exec(compile(source.replace(mutation.old, mutation.new), "mutant", "exec"), scope)
    if mutation.module is depthwise_kernels:
        scope.update(THREADS=64, WARPS=2)
    for module, name in NAMES[mutation.module]:
        monkeypatch.setattr(module, name, scope[name])
    for module, name in MADE_OF.get(mutation.module, []):  # without the cache of the kernels that are right
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[-1]], ids="-".join)
def test_the_kernel_without_a_mistake(family, schedule, check):
    check(family, schedule)


@pytest.mark.parametrize(("mutation", "family"), PLANTED, ids=[": ".join(planted[::-1]) for planted in PLANTED])
def test_a_mistake_is_found(mutation, family, check, monkeypatch):
    plant(monkeypatch, MUTATIONS[mutation])
    with pytest.raises((SimulationError, AssertionError, OverflowError, IndexError)):
        check(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_kind(family):
    planted = {MUTATIONS[name].kind for name, of in PLANTED if of == family}
    assert planted == {kind for kind in KINDS if family not in IMPOSSIBLE.get(kind, [])}
