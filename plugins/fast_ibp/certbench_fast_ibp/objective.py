"""The objective of Fast IBP, with the symbols of arXiv 2103.17268."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from certbench.bounds import RELU, input_box
from certbench.training import NATURAL_EPS, IntervalObjective, Step, robust_cross_entropy


class FastIBP(IntervalObjective):
    """``L_rob + lambda (L_tight + L_relu)``, lambda = lambda_0 (1 - eps / eps_max); the clean loss while eps is 0."""

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        eps, warm_up = self.eps_at(step.batch), self.warms_up(step)
        clean = self.graph.run(images)
        loss = F.cross_entropy(clean.logits, labels)
        figures: dict[str, Tensor | float] = {"eps": eps, "clean_loss": loss.detach()}
        if eps > 0 or warm_up:
            box = input_box(images, max(eps, NATURAL_EPS))
            bounds = self.graph.bound(box, clean.statistics, keep={RELU} if warm_up else ())
            if eps > 0:
                loss = robust_cross_entropy(bounds.margins(labels))
            if warm_up:
                loss = loss + self.regularizers(eps, box, bounds)
        return loss, figures
