"""The vectors of the machine that Numba compiles for, and how the kernels use its registers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@dataclass(frozen=True)
class Tile:
    """How the kernels use the vector registers for one element type."""

    lanes: int  # elements in a vector
    vectors: int  # vectors in a row of the panel: `lanes * vectors` columns
    rows: int  # most rows of accumulators: rows * vectors + vectors + 1 registers
    gradient_vectors: int  # the same two for `gemm.weight_gradient_kernel`, whose rows have an address each
    gradient_rows: int
    fma: bool  # without the instruction, llvm.fma is a library call, hundreds of times slower
    packs: bool  # can the microkernel pack the panel as it multiplies? That takes masks, and registers to spare
    masks: bool = False  # are vectors loaded and stored as fast with a mask as without?
    narrow_columns: int = 0  # so many columns or fewer are faster with rows in the lanes (`gemm.contract_narrow`)
    pixels: int = 0  # most pixels of an output row that `gemm.contract_pixels` takes; 0: it is not used

    @property
    def columns(self) -> int:
        return self.lanes * self.vectors

    @property
    def narrow_pitch(self) -> int:
        """Elements between the columns of `gemm.contract_narrow`'s sums: the rows of a tile in whole vectors."""
        return -(-self.rows // self.lanes) * self.lanes

    @property
    def registers(self) -> int:
        return 32 if self.rows > 6 else 16


@functools.cache
def features() -> tuple[str, frozenset[str]]:
    """Architecture and features that Numba compiles for (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included)."""
    from numba.core.registry import cpu_target

    triple, _, names = cpu_target.target_context.codegen().magic_tuple()
    return triple.partition("-")[0], frozenset(f[1:] for f in names.split(",") if f.startswith("+"))


@functools.cache
def tile(bits: int) -> Tile:
    """The tile of this machine for elements of 32 or 64 bits.

    14 x 2 vectors of AVX-512 take 28 + 2 + 1 of 32 registers, 6 x 2 of AVX and SSE 12 + 2 + 1 of 16, 8 x 3 of NEON
    24 + 3 + 1 of 32. A multiply-add has a latency of 4 and two are started a cycle, so 8 accumulators would do; more
    rows and columns mean fewer loads for each. Up to 4 columns take as long by `contract_narrow` as 4 of 14 rows of a
    vector: an image of 7 x 7 has 49 pixels, three vectors and one pixel. The tile of `contract_pixels` is of the same
    rows and vectors.
    """
    architecture, names = features()
    if architecture in ("aarch64", "arm64"):
        return Tile(128 // bits, 3, 8, 3, 6, True, False)
    if "avx512f" in names:
        return Tile(512 // bits, 2, 14, 4, 6, True, True, True, 4, 14)
    if "avx" in names:
        return Tile(256 // bits, 2, 6, 2, 6, "fma" in names, False, pixels=6)
    return Tile(128 // bits, 2, 6, 2, 6, "fma" in names, False)


def tile_of(pointer: types.CPointer) -> Tile:
    """The tile for what a typed pointer of compiled code points to."""
    return tile(pointer.dtype.bitwidth)


def _constant(name: str):
    """``name(pointer)`` in compiled code: this number of the tile for what `pointer` points to."""

    @intrinsic
    def constant(typingctx, like):
        def codegen(context, builder, sig, args):
            return ir.Constant(ir.IntType(64), int(getattr(tile_of(sig.args[0]), name)))

        return types.int64(like), codegen

    return constant


lanes = _constant("lanes")
packs = _constant("packs")
narrow_columns = _constant("narrow_columns")
narrow_pitch = _constant("narrow_pitch")
columns = _constant("columns")
tile_rows = _constant("rows")
gradient_rows = _constant("gradient_rows")
gradient_vectors = _constant("gradient_vectors")
