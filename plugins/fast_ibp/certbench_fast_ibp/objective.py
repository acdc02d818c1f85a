"""The objective of Fast IBP, with the symbols of arXiv 2103.17268."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import RELU, input_box, trace
from certbench.contract import TrainTask
from certbench.seeding import derive_seed
from certbench.training import (
    LinearRamp,
    SmoothedRamp,
    Step,
    ibp_initialization,
    relu_balance,
    robust_cross_entropy,
    tightness,
)

NATURAL_EPS = 1e-6
"""The radius at which the regularisers see the bounds while the schedule is still at 0 (released code)."""


class FastIBP:
    """``L_rob + lambda (L_tight + L_relu)``, lambda = lambda_0 (1 - eps / eps_max); the clean loss while eps is 0."""

    def __init__(self, task: TrainTask) -> None:
        self.task = task
        self.settings = task.settings
        self.eps_max = float(task.settings.train_radius or task.recipe.threat.radius)

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        ramp = {"smoothed": SmoothedRamp, "linear": LinearRamp}[self.settings.ramp]
        self.eps_at = ramp(
            self.eps_max, self.settings.ramp_start, self.settings.ramp_epochs, batches_per_epoch
        )
        info = self.task.dataset.info
        self.graph = trace(network, info.shape)
        self.std = torch.tensor(info.std, device=self.task.device).view(-1, 1, 1)
        ibp_initialization(self.graph, derive_seed(self.task.seed, "ibp-initialization"))

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        eps = self.eps_at(step.batch)
        warm_up = step.epoch <= self.eps_at.last_epoch
        clean = self.graph.run(images)
        loss = F.cross_entropy(clean.logits, labels)
        figures: dict[str, Tensor | float] = {"eps": eps, "clean_loss": loss.detach()}
        if eps > 0 or warm_up:
            box = input_box(images, max(eps, NATURAL_EPS))
            bounds = self.graph.bound(box, clean.statistics, keep={RELU} if warm_up else ())
            if eps > 0:
                loss = robust_cross_entropy(bounds.margins(labels))
            if warm_up:
                lam = self.settings.regularizer_weight * (1 - eps / self.eps_max)
                tau = self.settings.tolerance
                loss = loss + lam * (
                    tightness(box.radius / self.std, bounds.kept, tau) + relu_balance(bounds.kept, tau)
                )
        return loss, figures
