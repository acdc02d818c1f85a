"""What SmoothMix and CRT are compared with: Gaussian noise, stability, consistency, SmoothAdv and MACER.

Smallest real run: ``certbench run gaussian/digits-l2-0.5``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from certbench.contract import MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench.recipe import SEQUENTIAL, Strict
from certbench_smoothing_baselines.settings import (
    ConsistencySettings,
    GaussianSettings,
    MACERSettings,
    SmoothAdvSettings,
    StabilitySettings,
)

if TYPE_CHECKING:
    from torch import nn


def card(name: str, settings: type[Strict], summary: str, paper: str, limits: str) -> MethodCard:
    folder = files("certbench_smoothing_baselines")
    return MethodCard(
        name=name,
        summary=summary,
        paper=paper,
        norm="l2",
        guarantee="statistical",
        settings=settings,
        recipes=folder / "recipes" / name,
        published=folder / "published",
        baseline=True,
        certifier=SEQUENTIAL,
        limits=limits,
        numerics=2,
    )


@hookimpl
def register_methods() -> list[MethodCard]:
    return [
        card(
            "gaussian",
            GaussianSettings,
            "cross entropy on images with Gaussian noise",
            "Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing, arXiv 1902.02918",
            "The plainest way to train for smoothing; every later method certifies more.",
        ),
        card(
            "stability",
            StabilitySettings,
            "clean cross entropy, and noisy predictions drawn to the clean ones",
            "Li, Chen, Wang, Carin: Certified Adversarial Robustness with Additive Noise, arXiv 1809.03113",
            "Gains little over Gaussian noise.",
        ),
        card(
            "consistency",
            ConsistencySettings,
            "cross entropy of several noisy copies, and their predictions drawn together",
            "Jeong, Shin: Consistency Regularization for Certified Robustness of Smoothed Classifiers, "
            "arXiv 2006.04062",
            "Its weight depends on the noise level.",
        ),
        card(
            "smoothadv",
            SmoothAdvSettings,
            "cross entropy at adversaries of the smoothed classifier",
            "Salman et al.: Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers, "
            "arXiv 1906.04584",
            "The dearest to train; its epsilon depends on data and noise level.",
        ),
        card(
            "macer",
            MACERSettings,
            "cross entropy of the soft vote, and a hinge on its certified radius",
            "Zhai et al.: MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius, "
            "arXiv 2001.02378",
            "Sixteen noisy copies of each image make it dear.",
        ),
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_smoothing_baselines.consistency import Consistency
    from certbench_smoothing_baselines.gaussian import Gaussian
    from certbench_smoothing_baselines.macer import MACER
    from certbench_smoothing_baselines.smoothadv import SmoothAdv
    from certbench_smoothing_baselines.stability import Stability

    name = task.recipe.method.name
    objectives: dict[str, Any] = {
        "gaussian": Gaussian,
        "stability": Stability,
        "consistency": Consistency,
        "smoothadv": SmoothAdv,
        "macer": MACER,
    }
    chunks = (
        task.settings.noises if name == "smoothadv" else 1
    )  # as released: m steps per batch, m noises each
    return fit(task, objectives[name](task), chunks)
