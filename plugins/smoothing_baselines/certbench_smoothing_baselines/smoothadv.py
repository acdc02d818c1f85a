"""SmoothAdv: adversarial training of the smoothed classifier (Salman et al. 2019, arXiv 1906.04584)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from certbench.training import NoisyObjective, Step, climb, noisy_logits, warm_up


class SmoothAdv(NoisyObjective):
    """Cross entropy under m noises at an adversary of the soft smoothed classifier, within L2 distance epsilon.

    epsilon rises during warm-up, and the attack's step with it: ``2 epsilon / T``.
    """

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        m, T = self.settings.noises, self.settings.attack_iterations
        delta = self.noises(images, m, step)
        epsilon = float(self.settings.attack_radius) * warm_up(step.epoch, self.settings.warm_up_epochs)
        adversary = climb(self.network, images, labels, delta, T, 2 * epsilon / T, epsilon)[-1]
        logits = noisy_logits(self.network, adversary, delta)
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(m)), {"epsilon": epsilon}
