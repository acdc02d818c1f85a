"""The objective of adaptive certified radii, with the symbols of arXiv 2307.13078."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from certbench.bounds import Bounds, Box, crown_ibp_margins, input_box
from certbench.training import Batch, IntervalObjective, Step, robust_cross_entropies
from certbench_adaptive_radii.radii import Radii, adaptive_radii, smallest_clean_margin
from certbench_adaptive_radii.settings import AdaptiveRadiiSettings


class AdaptiveRadii(IntervalObjective):
    """``(1 - kappa) mean R(x, y, r) + kappa mean CE(f(x), y)``, each image at its own radius r(x, y) <= c.

    The budget c is what the ramp gives, e_max its end. No gradient flows through r.
    """

    settings: AdaptiveRadiiSettings

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        super().prepare(network, batches_per_epoch)
        self.weights = [p for p in network.parameters() if p.ndim > 1]

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, figures = super().loss(images, labels, step)
        if self.settings.l1:
            loss = loss + self.settings.l1 * torch.stack([w.abs().sum() for w in self.weights]).sum()
        return loss, figures

    def box(self, batch: Batch) -> Box:
        if batch.eps == 0:
            return input_box(batch.images, batch.floor)
        r = self.trained_radius(batch, self.radii(batch))
        return input_box(batch.images, r.clamp_min(batch.floor))

    def robust_loss(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        kappa = self.settings.kappa
        R = robust_cross_entropies(self.margins(batch, box, bounds))
        if self.settings.misclassified == "dropped":
            R = R * (smallest_clean_margin(batch.clean.logits.detach(), batch.labels) > 0)
        return (1 - kappa) * R.mean() + kappa * batch.clean_loss

    def margins(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        """``m_t(e)`` by the bound that the settings name."""
        if self.settings.bounds == "crown-ibp":
            return crown_ibp_margins(self.graph, box, batch.labels, batch.clean.statistics)
        return super().margins(batch, box, bounds)

    def radii(self, batch: Batch) -> Radii:
        """r(x, y) under the budget c, with the weights as they are."""
        c, settings = batch.eps, self.settings
        m_0 = smallest_clean_margin(batch.clean.logits.detach(), batch.labels)
        if settings.search == "none":
            return Radii(c * (m_0 > 0), correct=m_0 > 0, capped=m_0 > 0, passes=0.0)

        def m(which: Tensor, e: Tensor) -> Tensor:
            some = replace(batch, images=batch.images[which], labels=batch.labels[which])
            return self.smallest_margin(some, e)

        found = adaptive_radii(m, m_0, c, c * settings.radius_tolerance, settings.max_passes)
        batch.figures.update(found.summary(c))
        return found

    def smallest_margin(self, batch: Batch, e: Tensor) -> Tensor:
        """m(e) of each image, shape (batch,)."""
        box = input_box(batch.images, e)
        return self.margins(batch, box, self.graph.bound(box, batch.clean.statistics)).amin(1)

    def trained_radius(self, batch: Batch, found: Radii) -> Tensor:
        """The radius of the robust term: r(x, y) itself, unless an ablation asks for another."""
        r = found.radius
        if self.settings.radius_gradient == "implicit":
            r = self.differentiable(batch, found)
        return (self.settings.multiplier * r).clamp_max(batch.eps)

    def differentiable(self, batch: Batch, found: Radii) -> Tensor:
        """Interior radii as functions of the weights, by the derivative of a root: ``dr = -dm / (dm/de)``."""
        e = found.radius.clone().requires_grad_()
        m = self.smallest_margin(batch, e)
        (slope,) = torch.autograd.grad(m.sum(), e, retain_graph=True)
        moves = found.interior & (slope < 0)
        change = (m - m.detach()) / torch.where(moves, slope, -1.0)
        return found.radius - torch.where(moves, change, 0.0)
