"""Gaussian data augmentation (Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.training import NoisyObjective, Step


class Gaussian(NoisyObjective):
    """``CE(f(x + delta), y)``, one draw of ``delta ~ N(0, sigma^2 I)`` per image and step."""

    def __init__(self, task: TrainTask) -> None:
        super().__init__(task)
        self.sigma = task.settings.train_sigma or self.sigma

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        (delta,) = self.noises(images, 1, step)
        loss = F.cross_entropy(self.network(images + delta), labels)
        return loss, {"noisy_loss": loss.detach()}
