"""SmoothMix: training of confidence-calibrated smoothed classifiers (Jeong et al., NeurIPS 2021, arXiv 2111.09277).

Smallest real run: ``certbench run smoothmix/digits-l2-0.5``.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from certbench.contract import MethodCard, TrainTask
from certbench.hookspecs import hookimpl
from certbench.recipe import SEQUENTIAL
from certbench_smoothmix.settings import SmoothMixSettings

if TYPE_CHECKING:
    from torch import nn


@hookimpl
def register_methods() -> list[MethodCard]:
    return [
        MethodCard(
            name="smoothmix",
            summary="Gaussian noise and self-mixup along unrestricted attacks on the smoothed classifier",
            paper="Jeong, Park, Kim, Lee, Kim, Shin: SmoothMix: Training Confidence-calibrated Smoothed Classifiers "
            "for Certified Robustness, arXiv 2111.09277",
            norm="l2",
            guarantee="statistical",
            settings=SmoothMixSettings,
            recipes=files("certbench_smoothmix") / "recipes",
            suites=files("certbench_smoothmix") / "suites",
            published=files("certbench_smoothmix") / "published",
            certifier=SEQUENTIAL,
            numerics=2,
            limits="Dear to train: 14 times an epoch of Gaussian noise as measured (LeNet on MNIST, m 2, T 4, one CPU "
            "thread; benchmarks/transfer.md), 5 times standard training as published in arXiv 2210.14283 (ResNet-110 on "
            "CIFAR-10, a GPU). Certificates hold with a probability.",
        )
    ]


@hookimpl
def train(task: TrainTask) -> nn.Module:
    from certbench.training import fit
    from certbench_smoothmix.objective import SmoothMix

    return fit(task, SmoothMix(task), chunks=task.settings.noises)
