"""Adaptive certified radii: every image trains at the radius that it can be certified at (arXiv 2307.13078).

Smallest real run: ``certbench run adaptive-radii/digits-linf-0.1``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from certbench.contract import MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench_adaptive_radii.settings import AdaptiveRadiiSettings

if TYPE_CHECKING:
    from torch import nn


@hookimpl
def register_methods() -> list[MethodCard]:
    folder = files("certbench_adaptive_radii")
    return [
        MethodCard(
            name="adaptive-radii",
            summary="IBP training of every image at its own certified radius, mixed with the clean loss",
            paper="Nurlanov, Schmidt, Bernard: Adaptive Certified Training: Towards Better Accuracy-Robustness "
            "Tradeoffs, arXiv 2307.13078",
            norm="linf",
            guarantee="float_sound",
            settings=AdaptiveRadiiSettings,
            recipes=folder / "recipes",
            suites=folder / "suites",
            published=folder / "published",
            certifier="ibp",
            limits="Trained for interval bounds: other certifiers gain little on its networks.",
        )
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_adaptive_radii.objective import AdaptiveRadii

    return fit(task, AdaptiveRadii(task))
