"""Consistency regularisation (Jeong and Shin 2020, arXiv 2006.04062)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from certbench.training import NoisyObjective, Step, noisy_logits


class Consistency(NoisyObjective):
    """Cross entropy of m noisy copies, plus what pulls their predictions F_j to their mean Fbar, and its entropy."""

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        m = self.settings.noises
        logits = noisy_logits(self.network, images, self.noises(images, m, step))
        natural = F.cross_entropy(logits.flatten(0, 1), labels.repeat(m))
        kl, entropy = spread(logits)
        loss = natural + self.settings.weight * kl.mean() + self.settings.entropy_weight * entropy.mean()
        return loss, {"natural": natural.detach(), "kl": kl.detach().mean()}


def spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(1/m) sum_j KL(Fbar || F_j)`` and the entropy of Fbar for each image, of logits (m, batch, classes).

    Computed from logarithms, so that a class of vanishing probability has a finite gradient.
    """
    log_F = logits.log_softmax(-1)
    log_mean = log_F.logsumexp(0) - math.log(len(logits))
    mean = log_mean.exp()
    kl = (mean * (log_mean - log_F)).sum(-1).mean(0)
    return kl, -(mean * log_mean).sum(-1)
