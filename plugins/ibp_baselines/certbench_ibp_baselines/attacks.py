"""SABR and MTL-IBP: an attack finds the point, bounds cover a small box or count little.

With the symbols of arXiv 2210.04871 (SABR) and 2305.13991 (MTL-IBP).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from certbench.bounds import Bounds, Box, input_box
from certbench.seeding import derive_seed
from certbench.training import Batch, IntervalObjective, projected_gradient
from certbench_ibp_baselines.settings import AttackSettings, MTLIBPSettings, SABRSettings


class Adversarial(IntervalObjective):
    """Base of the two; the attack sees the network with the batch statistics of the step's clean pass."""

    settings: AttackSettings

    def attacked(self, batch: Batch) -> Tensor:
        """x': points of the ball where the cross entropy is large."""
        fixed = {name: (mean.detach(), var.detach()) for name, (mean, var) in batch.clean.statistics.items()}
        return projected_gradient(
            lambda x: self.graph.run(x, fixed).logits,
            batch.images,
            batch.labels,
            batch.eps,
            self.settings.attack_steps,
            self.settings.step_size,
            derive_seed(self.task.seed, "attack", batch.step.batch),
        )


class SABR(Adversarial):
    """The robust loss of a small box of half-width ``tau = lambda eps`` around x', which lies inside the ball."""

    settings: SABRSettings

    def box(self, batch: Batch) -> Box:
        if batch.eps == 0:
            return input_box(batch.images, batch.floor)
        eps = max(batch.eps, batch.floor)  # the ball that is bounded: the regularisers need widths
        tau = max(self.settings.subselection_ratio * batch.eps, batch.floor)
        room = input_box(batch.images, eps - tau)  # centres whose small box stays inside the ball
        center = self.attacked(batch).maximum(room.lower).minimum(room.upper)
        return input_box(center, tau)


class MTLIBP(Adversarial):
    """``(1 - alpha) CE(f(x'), y) + alpha L_IBP(x, eps)``."""

    settings: MTLIBPSettings

    def robust_loss(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        alpha = self.settings.alpha
        logits = self.graph.run(self.attacked(batch), batch.clean.statistics).logits
        adversarial = F.cross_entropy(logits, batch.labels)
        return (1 - alpha) * adversarial + alpha * super().robust_loss(batch, box, bounds)
