"""CRT: certified robustness by transfer from a trained teacher (Vaishnavi et al., NeurIPS 2022, arXiv 2210.14283).

Smallest real run: ``certbench run crt/digits-l2-0.5``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from certbench.contract import MethodCard, TrainTask
from certbench.errors import RunError
from certbench.hookspecs import hookimpl
from certbench.recipe import SEQUENTIAL
from certbench_crt.settings import CRTSettings

if TYPE_CHECKING:
    from torch import nn


@hookimpl
def register_methods() -> list[MethodCard]:
    return [
        MethodCard(
            name="crt",
            summary="the outputs of a certifiably robust teacher on noisy images, without attacks and with one noise each",
            paper="Vaishnavi, Eykholt, Rahmati: Accelerating Certified Robustness Training via Knowledge Transfer, arXiv 2210.14283",
            norm="l2",
            guarantee="statistical",
            settings=CRTSettings,
            recipes=files("certbench_crt") / "recipes",
            certifier=SEQUENTIAL,
            numerics=2,
            limits="Its teacher's training is a cost of its own; an epoch of the student costs 1.4 times one of Gaussian "
            "noise where the teacher is as large (benchmarks/transfer.md). Students measured so far stay 1 to 2 percent below "
            "their teacher's ACR. Certificates hold with a probability.",
        )
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_crt.objective import CRT

    objective = CRT(task)
    try:
        return fit(task, objective)
    except (
        RunError
    ) as error:  # a loss that is not finite: no learning rate helps where the teacher is the cause
        if not objective.teacher_held:
            raise objective.useless_teacher("training images") from error
        raise
