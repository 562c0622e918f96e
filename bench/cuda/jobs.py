"""What a run does, in the order of what is wanted most."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import cases
from ..cases import Case, ConvolutionCase
from .arrays import TF32
from .checks import CHECKED, EVERY_TILE
from .run import Bench, DeviceLost, name_of_check

DEPTHWISE = "mobilenet_v2,efficientnet_b0,convnext_tiny,audio,cliffs"
GRADIENTS = ("weight_grad", "input_grad")
# In the order of what is wanted most, should the time not suffice: (networks, layers of few channels per group only?,
# passes, arithmetic).
STEPS: list[tuple[str, bool, tuple[str, ...], str]] = [
    ("resnet50,vgg16", False, ("forward",), "float32"),
    (DEPTHWISE, True, ("forward",), "float32"),
    ("cross_entropy", False, ("forward", "with_grad"), "float32"),
    ("resnet50,vgg16", False, ("forward",), "bfloat16"),
    ("resnet50,vgg16", False, ("forward",), TF32),
    ("cross_entropy", False, ("with_grad",), "bfloat16"),
    ("resnet50,vgg16", False, GRADIENTS, "float32"),
    (DEPTHWISE, True, GRADIENTS, "float32"),
    (DEPTHWISE, True, ("forward", *GRADIENTS), "bfloat16"),
    ("resnet50,vgg16", False, GRADIENTS, "bfloat16"),
    ("audio,cliffs,medical,planes,unet", False, ("forward", *GRADIENTS), "float32"),
    ("resnet50,vgg16", False, GRADIENTS, TF32),
    ("mobilenet_v2,efficientnet_b0", False, ("forward", *GRADIENTS), "float32"),
    ("cliffs", False, ("forward",), "float64"),
]


def plan(
    steps: Sequence[tuple[str, bool, tuple[str, ...], str]], only: str | None = None
) -> list[tuple[Case, str, str]]:
    """(layer, pass, arithmetic) in order, each once."""
    found: dict[tuple[Case, str, str], None] = {}
    for networks, narrow, passes, dtype in steps:
        for name in networks.split(","):
            for case in cases.network(name):
                if narrow and (not isinstance(case, ConvolutionCase) or case.groups == 1):
                    continue
                if only and not re.search(only, f"{name} {case.name}"):
                    continue
                for which in passes:
                    if which in case.passes:
                        found[case, which, dtype] = None
    return list(found)


class Job(NamedTuple):
    name: str
    do: Callable[[], object]


def checks(
    bench: Bench, dtypes: Sequence[str], chosen: Sequence[Case] = tuple(CHECKED),
    in_every_tile: Sequence[Case] = tuple(EVERY_TILE),
) -> list[Job]:  # fmt: skip
    """Small odd shapes in both layouts: first those of every arithmetic, then those in every tile."""
    from fastconv.cuda_kernels.tiles import ARITHMETIC

    every: list[tuple[Case, str, int | None]] = [(c, d, None) for d in dtypes for c in chosen]
    every += [(c, d, tile) for d in dtypes for c in in_every_tile for tile in range(len(ARITHMETIC[d].tiles))]
    jobs = []
    for case, dtype, tile in every:
        for which, peer in itertools.product(case.passes, ("fastconv", "fastconv channels-last")):
            job = functools.partial(bench.check, case, which, dtype, peer, tile)
            jobs.append(Job(name_of_check(case, which, dtype, peer, tile), job))
    return [*jobs, Job("sum of the checks", bench.tell_checks)]


def measurements(bench: Bench, dtypes: Sequence[str], planned: Sequence[tuple[Case, str, str]]) -> list[Job]:
    return [
        Job("peaks", lambda: bench.measure_peaks(dtypes)),
        Job("launches", bench.measure_launches),
        *(
            Job(f"{case.network} {case.name} {which} {dtype}", functools.partial(bench.measure, case, which, dtype))
            for case, which, dtype in planned
        ),
    ]


def run(bench: Bench, jobs: Sequence[Job], start: int = 0, begun: Callable[[int], object] = abs) -> None:
    """Do the jobs from `start` on until the time is up; `begun` hears the number of each. Raises DeviceLost."""
    for number, job in enumerate(jobs[start:], start):
        if bench.left < 0:
            bench.tell(f"SKIPPED {len(jobs) - number} of {len(jobs)} jobs: out of time, the first of them {job.name}")
            break
        begun(number)
        try:
            job.do()
        except DeviceLost as error:
            bench.tell(f"FAILED {job.name}: the device is lost ({error})")
            raise
