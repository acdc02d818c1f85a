"""Training on interval abstractions (Zhang et al., CVPR 2023, arXiv 2303.11552), certified soundly on raw pixels.

Smallest real run: ``certbench run abstraction/digits-linf-0.1``.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING

from certbench.contract import Certificates, CertifyTask, MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench_abstraction.settings import AbstractionIBPSettings, AbstractionSettings

if TYPE_CHECKING:
    from torch import nn

RECIPES = files("certbench_abstraction") / "recipes"
PAPER = (
    "Zhang, Xue, Chen, Liu, Zhang, Liu, Zhang: Boosting Verified Training for Robust Image Classifications via "
    "Abstraction, arXiv 2303.11552"
)


@hookimpl
def register_methods() -> list[MethodCard]:
    return [
        MethodCard(
            name="abstraction",
            summary="clean training on the end points of quantised pixels; certified over all reachable cells",
            paper=PAPER,
            norm="linf",
            guarantee="real_arith",
            settings=AbstractionSettings,
            recipes=RECIPES / "abstraction",
            certifier="cells",
            limits="The published verification is clean accuracy; sound certificates are few.",
        ),
        MethodCard(
            name="abstraction-ibp",
            summary="the same network, trained on interval bounds over the reachable cells (ours, not published)",
            paper=PAPER,
            norm="linf",
            guarantee="real_arith",
            settings=AbstractionIBPSettings,
            recipes=RECIPES / "abstraction-ibp",
            certifier="cells",
            limits="Trained for interval bounds: the other steps of the certifier gain little.",
        ),
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench_abstraction.training import train_abstraction

    return train_abstraction(task)


@hookimpl
def certify(task: CertifyTask) -> Iterable[Certificates]:
    from certbench_abstraction.ladder import certify_cells

    return certify_cells(task)
