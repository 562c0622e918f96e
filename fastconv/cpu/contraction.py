"""The names of `implicit_gemm` under its name before, for the modules that still import it from here."""

from .implicit_gemm import (
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
from .tasks import data_address as address

# Fields of `Plan.parameters`
PADDED, SPLITS, TILE_SIZE = "padded", "splits", "tile_elements"

__all__ = [
    "PADDED", "SPLITS", "TILE_SIZE", "Axis", "Blocks", "Packing", "Plan", "Strides", "Unpacked", "address",
    "can_stay_in_place", "correlation", "fold_batch", "fold_strides", "is_better_exchanged", "is_flat",
    "make_blocks", "packing", "plan_correlation", "plan_packing", "plan_phase_packing", "plan_weight_gradient",
    "weight_gradient", "work",
]  # fmt: skip
