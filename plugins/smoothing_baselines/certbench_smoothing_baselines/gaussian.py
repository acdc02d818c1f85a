"""Gaussian data augmentation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.training import Step, gaussian_noise


class Gaussian:
    """``CE(f(x + delta), y)``, one draw of ``delta ~ N(0, sigma^2 I)`` per image and step."""

    def __init__(self, task: TrainTask) -> None:
        self.seed = task.seed
        self.sigma = task.settings.train_sigma or task.recipe.sigma

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        self.network = network

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        (delta,) = gaussian_noise(images, self.sigma, self.seed, step)
        loss = F.cross_entropy(self.network(images + delta), labels)
        return loss, {"noisy_loss": loss.detach()}
