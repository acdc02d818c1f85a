"""MACER: training that maximises the certified radius (Zhai et al. 2020, arXiv 2001.02378)."""

from __future__ import annotations

import torch
from torch import Tensor

from certbench.training import NoisyObjective, Step, noisy_logits, soft_vote


class MACER(NoisyObjective):
    """``-log Fbar(x)[y]`` plus ``lambda`` times a hinge on the soft certified radius of images that are right.

    The hinge is left out during the first ``delay_epochs``.
    """

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        of = self.settings
        logits = noisy_logits(self.network, images, self.noises(images, of.noises, step))
        hit = soft_vote(logits).gather(1, labels[:, None]).squeeze(1)
        natural = -(hit + 1e-10).log().mean()
        if step.epoch <= of.delay_epochs:
            return natural, {"natural": natural.detach()}
        hinge, active = radius_hinge(logits, labels, self.sigma, of.beta, of.gamma)
        return natural + of.weight * hinge.mean(), {
            "natural": natural.detach(),
            "active": active.float().mean(),
        }


def radius_hinge(
    logits: Tensor, labels: Tensor, sigma: float, beta: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """``sigma/2 (gamma - gap)`` of each image, gap = Phi^-1(z_1) - Phi^-1(z_2), and where it is active.

    z_1 and z_2 are the largest entries of the mean softmax of ``beta`` times the logits (m, batch, classes). An image
    counts where the first is its label and the gap is finite and at most ``gamma``; elsewhere its hinge is 0.
    """
    top, classes = soft_vote(beta * logits).topk(2)

    def gap(z: Tensor) -> Tensor:
        quantiles = torch.special.ndtri(z)
        return quantiles[:, 0] - quantiles[:, 1]

    with torch.no_grad():
        found = gap(top)
        active = (classes[:, 0] == labels) & found.isfinite() & (found <= gamma)
    safe = torch.where(active[:, None], top, 0.5)  # the others' infinite slopes must not meet the gradient
    return torch.where(active, sigma / 2 * (gamma - gap(safe)), 0.0), active
