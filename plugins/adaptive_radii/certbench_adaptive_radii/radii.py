"""The adaptive radius: how far the network, as it is now, can be certified around each image of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certbench.bounds.radius import Bracket, MarginFunction, largest_proved_radius


@dataclass(frozen=True)
class Radii:
    """One radius per image, shape (batch,), in raw pixels, without gradient.

    ``correct`` and ``capped`` say which images are classified correctly and which of these are certified at the whole
    budget; the other correct ones have an interior radius. ``passes`` counts bound passes, in whole batches.
    """

    radius: Tensor
    correct: Tensor
    capped: Tensor
    passes: float

    @property
    def interior(self) -> Tensor:
        return self.correct & ~self.capped

    def summary(self, c: float) -> dict[str, Tensor | float]:
        """The mean radius as a share of the budget, the shares of the three kinds of images, and the passes."""
        return {
            "radius_of_budget": self.radius.mean() / c,
            "wrong": 1 - self.correct.float().mean(),
            "interior": self.interior.float().mean(),
            "capped": self.capped.float().mean(),
            "passes": torch.tensor(self.passes),  # differs between batches: to be averaged
        }


@torch.no_grad()
def adaptive_radii(
    margin: MarginFunction, clean_margin: Tensor, c: float, tolerance: float, max_passes: int
) -> Radii:
    """The root of the smallest margin on (0, c); 0 where the image is misclassified, c where it is certified there.

    Every image leaves the batch as soon as it is done. An interior radius lies on the proved side of the root, at
    most ``tolerance`` below it if ``max_passes`` sufficed.

    Args:
        margin: smallest margin bounds of some images at radii of their own.
        clean_margin: those at radius 0, shape (batch,).
        c: the budget, in raw pixels.
    """
    correct = clean_margin > 0
    some = correct.nonzero().squeeze(1)
    at_c = torch.full_like(clean_margin, -torch.inf)
    if len(some):  # linear bounds are of one image at least
        at_c[some] = margin(some, torch.full_like(clean_margin[some], c))
    capped = correct & (at_c >= 0)
    rest = (correct & ~capped).nonzero().squeeze(1)
    zero = torch.zeros_like(clean_margin[rest])
    bracket = Bracket(zero, clean_margin[rest], zero + c, at_c[rest])
    found, spent = largest_proved_radius(
        lambda which, eps: margin(rest[which], eps), bracket, tolerance, max_passes
    )
    radius = torch.where(capped, c, torch.zeros_like(clean_margin)).index_put((rest,), found)
    passes = (len(some) + int(spent.sum())) / max(len(clean_margin), 1)
    return Radii(radius, correct, capped, passes)


def smallest_clean_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``min_t f_y - f_t`` of logits (batch, classes), shape (batch,)."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own.squeeze(1) - others.amax(1)
