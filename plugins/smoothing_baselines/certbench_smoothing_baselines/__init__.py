"""Baselines of randomized smoothing: ``gaussian`` (Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918).

Smallest real run: ``certbench run gaussian/digits-l2-0.5``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from certbench.contract import MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench_smoothing_baselines.settings import GaussianSettings

if TYPE_CHECKING:
    from torch import nn


@hookimpl
def register_methods() -> list[MethodCard]:
    recipes = files("certbench_smoothing_baselines") / "recipes"
    return [
        MethodCard(
            name="gaussian",
            summary="cross-entropy on images with Gaussian noise",
            paper="Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing, arXiv 1902.02918",
            norm="l2",
            guarantee="statistical",
            settings=GaussianSettings,
            recipes=recipes / "gaussian",
            certifier="smoothing-sequential",
            limits="The plainest way to train for smoothing; every later method certifies more.",
        )
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_smoothing_baselines.gaussian import Gaussian

    return fit(task, Gaussian(task))
