"""The objective of adaptive certified radii, with the symbols of arXiv 2307.13078."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import RELU, Bounds, Box, Clean, crown_ibp_margins, input_box
from certbench.training import NATURAL_EPS, IntervalObjective, Step, robust_cross_entropies
from certbench_adaptive_radii.radii import Radii, adaptive_radii, smallest_clean_margin
from certbench_adaptive_radii.settings import AdaptiveRadiiSettings


class AdaptiveRadii(IntervalObjective):
    """``(1 - kappa) mean R(x, y, r) + kappa mean CE(f(x), y)``, each image at its own radius r(x, y) <= c.

    While the budget c ramps up to e_max the regularisers of Fast IBP are added, and c = 0 trains on the clean loss.
    All bound passes of a step use the batch statistics of its one clean pass and update nothing.
    """

    settings: AdaptiveRadiiSettings

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        super().prepare(network, batches_per_epoch)
        self.weights = [p for p in network.parameters() if p.ndim > 1]

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        c, warm_up, kappa = self.eps_at(step.batch), self.warms_up(step), self.settings.kappa
        clean = self.graph.run(images)
        loss = F.cross_entropy(clean.logits, labels)
        figures: dict[str, Tensor | float] = {"eps": c, "clean_loss": loss.detach()}
        if c > 0 or warm_up:
            r = torch.zeros_like(clean.logits[:, 0])
            if c > 0:
                radii = self.radii(images, labels, clean, c)
                r = self.trained_radius(radii, images, labels, clean, c)
                figures |= _summary(radii, c)
            box = input_box(images, r.clamp_min(NATURAL_EPS) if warm_up else r)
            bounds = self.graph.bound(box, clean.statistics, keep={RELU} if warm_up else ())
            if c > 0:
                R = robust_cross_entropies(self.margins(box, bounds, labels, clean))
                if self.settings.misclassified == "dropped":
                    R = R * radii.correct
                loss = (1 - kappa) * R.mean() + kappa * loss
            if warm_up:
                loss = loss + self.regularizers(c, box, bounds)
        if self.settings.l1:
            loss = loss + self.settings.l1 * torch.stack([w.abs().sum() for w in self.weights]).sum()
        return loss, figures

    def radii(self, images: Tensor, labels: Tensor, clean: Clean, c: float) -> Radii:
        """r(x, y) under the budget c, with the weights as they are."""

        def margin(which: Tensor, eps: Tensor) -> Tensor:
            return self.smallest_margin(images[which], labels[which], clean, eps)

        m_0 = smallest_clean_margin(clean.logits.detach(), labels)
        if self.settings.search == "none":
            correct = m_0 > 0
            return Radii(c * correct, correct, correct, 0.0)
        return adaptive_radii(margin, m_0, c, c * self.settings.radius_tolerance, self.settings.max_passes)

    def trained_radius(
        self, radii: Radii, images: Tensor, labels: Tensor, clean: Clean, c: float
    ) -> Tensor:
        """The radius of the robust term: r(x, y) itself, unless an ablation asks for another."""
        r = radii.radius
        if self.settings.radius_gradient == "implicit":
            r = self._as_a_function_of_the_weights(radii, images, labels, clean)
        return (self.settings.multiplier * r).clamp_max(c)

    def _as_a_function_of_the_weights(
        self, radii: Radii, images: Tensor, labels: Tensor, clean: Clean
    ) -> Tensor:
        """Interior radii with the derivative of the root of m: ``dr = -dm / (dm/de)``."""
        e = radii.radius.clone().requires_grad_()
        m = self.smallest_margin(images, labels, clean, e)
        (slope,) = torch.autograd.grad(m.sum(), e, retain_graph=True)
        moves = radii.interior & (slope < 0)
        change = (m - m.detach()) / torch.where(moves, slope, -1.0)
        return radii.radius - torch.where(moves, change, 0.0)

    def smallest_margin(self, images: Tensor, labels: Tensor, clean: Clean, eps: Tensor) -> Tensor:
        """m(e) of each image, shape (batch,)."""
        box = input_box(images, eps)
        bounds = self.graph.bound(box, clean.statistics)
        return self.margins(box, bounds, labels, clean).amin(1)

    def margins(self, box: Box, bounds: Bounds, labels: Tensor, clean: Clean) -> Tensor:
        """``m_t(e)`` by the bound that the settings name, shape (batch, classes - 1)."""
        if self.settings.bounds == "crown-ibp":
            return crown_ibp_margins(self.graph, box, labels, clean.statistics)
        return bounds.margins(labels)


def _summary(radii: Radii, c: float) -> dict[str, Tensor | float]:
    return {
        "radius_of_budget": radii.radius.mean() / c,
        "wrong": 1 - radii.correct.float().mean(),
        "interior": radii.interior.float().mean(),
        "capped": radii.capped.float().mean(),
        "passes": radii.passes,
    }
