"""Per-image certified radii, searched in lockstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MarginFunction = Callable[[Tensor, Tensor], Tensor]
"""(which images, one radius each) -> smallest margin bound of each, all of shape (images,)."""


@dataclass(frozen=True)
class Bracket:
    """Per image: a proved radius with its margin (> 0), and an unproved radius with its margin (not > 0)."""

    low: Tensor
    margin_low: Tensor
    high: Tensor
    margin_high: Tensor


def largest_proved_radius(
    margin: MarginFunction, bracket: Bracket, tolerance: float, max_passes: int = 60
) -> tuple[Tensor, Tensor]:
    """Narrow every bracket below ``tolerance`` and return (proved radii, bound passes spent), both (images,).

    Chandrupatla's method (1997), in lockstep: inverse quadratic steps where three points look smooth enough, bisection
    elsewhere. The margin of interval bounds is continuous, non-increasing and, for ReLU networks, piecewise linear in
    the radius, so steps inside the last piece are exact. Whatever the steps do, the returned radius is one at which
    ``margin`` itself was positive. Images leave the batch when they are done.
    """
    low, high = bracket.low.clone(), bracket.high.clone()
    x1, f1 = low.clone(), bracket.margin_low.clone()  # the newest point
    x2, f2 = high.clone(), bracket.margin_high.clone()  # the newest point on the other side of the root
    share = (f1 / (f1 - f2)).nan_to_num(0.5)  # of the way from x1 to x2: the first step is a secant
    passes = torch.zeros_like(low, dtype=torch.int32)
    for _ in range(max_passes):
        active = (high - low > tolerance).nonzero().squeeze(1)
        if not len(active):
            break
        a, b, fa, fb = x1[active], x2[active], f1[active], f2[active]
        inset = 0.5 * tolerance / (b - a).abs()
        x = a + share[active].maximum(inset).minimum(1 - inset) * (b - a)
        fx = margin(active, x)
        proved = fx > 0  # NaN counts as not proved
        passes[active] += 1
        low[active] = torch.where(proved, x, low[active])
        high[active] = torch.where(proved, high[active], x)
        same_side = proved == (fa > 0)
        x3, f3 = torch.where(same_side, a, b), torch.where(same_side, fa, fb)
        x2[active], f2[active] = torch.where(same_side, b, a), torch.where(same_side, fb, fa)
        x1[active], f1[active] = x, fx
        share[active] = _next_share(x, fx, x2[active], f2[active], x3, f3)
    return low, passes


def _next_share(x1: Tensor, f1: Tensor, x2: Tensor, f2: Tensor, x3: Tensor, f3: Tensor) -> Tensor:
    """How far from x1 towards x2 the next point lies; 0.5 unless inverse quadratic interpolation is trustworthy."""
    xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
    smooth = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
    quadratic = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
    return torch.where(smooth & quadratic.isfinite(), quadratic, 0.5)
