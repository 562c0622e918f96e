"""The names of `implicit_gemm` under its name before, for the modules that still import it from here."""

from .implicit_gemm import (
    GROUP_BYTES,
    SLAB_BYTES,
    Axis,
    Blocks,
    Packing,
    Plan,
    Strides,
    Unpacked,
    can_stay_in_place,
    correlation,
    fold_batch,
    fold_strides,
    is_better_exchanged,
    is_flat,
    make_blocks,
    packing,
    plan_correlation,
    plan_packing,
    plan_phase_packing,
    plan_weight_gradient,
    weight_gradient,
    work,
)
from .implicit_gemm import TILE_BYTES as _TILE_BYTES
from .tasks import data_address as address

PADDED = "padded"  # the field of `Plan.parameters`

__all__ = [
    "GROUP_BYTES", "PADDED", "SLAB_BYTES", "_TILE_BYTES", "Axis", "Blocks", "Packing", "Plan", "Strides", "Unpacked",
    "address", "can_stay_in_place", "correlation", "fold_batch", "fold_strides", "is_better_exchanged", "is_flat",
    "make_blocks", "packing", "plan_correlation", "plan_packing", "plan_phase_packing", "plan_weight_gradient",
    "weight_gradient", "work",
]  # fmt: skip
