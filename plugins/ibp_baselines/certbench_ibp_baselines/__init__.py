"""What certified training is compared with: standard training, IBP, CROWN-IBP, SABR, MTL-IBP, and a constant.

Smallest real run: ``certbench run ibp/digits-linf-0.1``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from certbench.contract import MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench.recipe import Strict
from certbench_ibp_baselines.settings import (
    IBPSettings,
    MTLIBPSettings,
    NoSettings,
    SABRSettings,
    VanillaSettings,
)

if TYPE_CHECKING:
    from torch import nn

CASCADE = "ibp>crown-ibp"
"""For networks that are not made for interval bounds alone."""


def card(
    name: str,
    settings: type[Strict],
    summary: str,
    paper: str,
    certifier: str = "ibp",
    limits: str = "",
    numerics: int = 1,
) -> MethodCard:
    folder = files("certbench_ibp_baselines")
    return MethodCard(
        name=name,
        summary=summary,
        paper=paper,
        norm="linf",
        guarantee="float_sound" if certifier == "ibp" else "real_arith",
        settings=settings,
        recipes=folder / "recipes" / name,
        suites=folder / "suites" / name,
        published=folder / "published",
        baseline=True,
        certifier=certifier,
        limits=limits,
        numerics=numerics,
    )


@hookimpl
def register_methods() -> list[MethodCard]:
    return [
        card("standard", NoSettings, "cross entropy alone", "none", CASCADE),
        card(
            "ibp",
            IBPSettings,
            "IBP training at one radius, mixed with the clean loss by kappa",
            "Gowal et al.: On the Effectiveness of Interval Bound Propagation, arXiv 1810.12715",
        ),
        card(
            "crown-ibp",
            VanillaSettings,
            "training on linear bounds over interval bounds, then on interval bounds",
            "Zhang et al.: Towards Stable and Efficient Training of Verifiably Robust Neural Networks, arXiv 1906.06316",
        ),
        card(
            "sabr",
            SABRSettings,
            "IBP training on a small box around an attacked point of the ball",
            "Müller, Eckert, Fischer, Vechev: Certified Training: Small Boxes Are All You Need, arXiv 2210.04871",
            CASCADE,
            "Meant for complete verifiers; linear bounds show a part of its robustness, interval bounds little.",
            numerics=2,  # near the floor the small box left the ball
        ),
        card(
            "mtl-ibp",
            MTLIBPSettings,
            "adversarial loss and IBP loss, mixed by alpha",
            "De Palma et al.: Expressive Losses for Verified Robustness via Convex Combinations, arXiv 2305.13991",
            CASCADE,
            "Meant for complete verifiers; linear bounds show a part of its robustness, interval bounds little.",
        ),
        card(
            "constant",
            NoSettings,
            "always names the commonest class: what ACR is worth without accuracy",
            "none",
        ),
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_ibp_baselines import attacks, bounds, plain

    if task.recipe.method.name == "constant":
        return plain.constant_network(task)
    objectives: dict[str, Any] = {
        "ibp": bounds.IBP,
        "crown-ibp": bounds.CrownIBP,
        "sabr": attacks.SABR,
        "mtl-ibp": attacks.MTLIBP,
    }
    name = task.recipe.method.name
    return fit(task, objectives[name](task) if name in objectives else plain.Standard())
