"""Stability training (Li, Chen, Wang, Carin 2019, arXiv 1809.03113)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from certbench.training import NoisyObjective, Step


class Stability(NoisyObjective):
    """``CE(f(x), y) + lambda CE(softmax(f(x)), f(x + delta))``, the gradient flowing through both sides."""

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        (delta,) = self.noises(images, 1, step)
        clean, noisy = self.network(images), self.network(images + delta)
        natural = F.cross_entropy(clean, labels)
        stable = F.cross_entropy(noisy, clean.softmax(1))
        return natural + self.settings.weight * stable, {
            "natural": natural.detach(),
            "stable": stable.detach(),
        }
