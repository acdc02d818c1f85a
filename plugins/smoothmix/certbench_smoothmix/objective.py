"""The objective of SmoothMix, with the symbols of arXiv 2111.09277."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.seeding import derive_seed
from certbench.training import NoisyObjective, Step, climb, keep_near, noisy_logits, soft_vote, warm_up


class SmoothMix(NoisyObjective):
    """``CE(f(s + delta), y) + eta w KL(t_mix || F(x_mix + delta))`` where the smoothed classifier is right at s.

    s is the image, or the point after ``mix_step`` steps of the attack, drawn towards the image during warm-up.
    """

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        of = self.settings
        delta = self.noises(images, of.noises, step)
        w = warm_up(step.epoch, of.warm_up_epochs)
        path = climb(
            self.network, images, labels, delta, of.attack_iterations, of.attack_step, of.attack_radius
        )
        s = keep_near(path[of.mix_step], images, of.attack_step * of.mix_step * w)
        lam = self.shares(len(images), step)
        loss, mask = mixed_loss(
            self.network, s, path[-1], labels, delta, lam, of.mix_weight * w, of.detach_target
        )
        return loss, {"right": mask.float().mean(), "w": w}

    def shares(self, count: int, step: Step) -> Tensor:
        """lambda, uniform on (0, 1/2]. Never 0: the target of a class of vanishing probability has no gradient there."""
        generator = torch.Generator(self.task.device)
        generator.manual_seed(derive_seed(self.task.seed, "mix", step.batch))
        return (1 - torch.rand(count, generator=generator, device=self.task.device)) / 2


def mixed_loss(
    network: nn.Module,
    s: Tensor,
    adversary: Tensor,
    labels: Tensor,
    delta: Tensor,
    lam: Tensor,
    weight: float,
    detach_target: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of one chunk, and the mask of images at which the soft vote is right (arXiv 2111.09277, released code).

    Batch norms see two batches: that of s and that of the mixed points. The mean of the second term is over all images,
    masked ones included.

    Args:
        s: raw pixels, shape (B, channels, height, width), as ``adversary``.
        delta: m noises, shape (m, B, channels, height, width).
        lam: share of the adversary, shape (B,), in [0, 1/2].
        weight: eta w.
    """
    z_s = noisy_logits(network, s, delta)
    natural = F.cross_entropy(z_s.flatten(0, 1), labels.repeat(len(delta)))
    vote = soft_vote(z_s)
    mask = vote.argmax(1) == labels
    share = lam.view(-1, 1, 1, 1)
    z_mix = noisy_logits(network, (1 - share) * s + share * adversary, delta)
    uniform = 1 / vote.shape[1]
    t_mix = (1 - lam[:, None]) * (vote.detach() if detach_target else vote) + lam[:, None] * uniform
    kl = F.kl_div(z_mix.log_softmax(-1), t_mix.expand_as(z_mix), reduction="none").sum(-1)
    return natural + weight * (mask * kl).mean(), mask
