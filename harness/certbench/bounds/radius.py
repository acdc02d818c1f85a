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

    The margin of interval bounds is continuous, non-increasing and, for ReLU networks, piecewise linear in the
    radius, so secant steps end once they are inside the last piece; the Illinois rule keeps both ends moving, every
    fourth step bisects, and a step never lands nearer than half a tolerance to an end. Whatever the steps do, the
    returned radius is one at which ``margin`` itself was positive. Images leave the batch when they are done.
    """
    low, high = bracket.low.clone(), bracket.high.clone()
    f_low, f_high = bracket.margin_low.clone(), bracket.margin_high.clone()
    passes = torch.zeros_like(low, dtype=torch.int32)
    last_side = torch.zeros_like(low, dtype=torch.int8)
    for step in range(max_passes):
        active = (high - low > tolerance).nonzero().squeeze(1)
        if not len(active):
            break
        lo, hi = low[active], high[active]
        probe = _probe(lo, f_low[active], hi, f_high[active], tolerance, bisect=step % 4 == 3)
        value = margin(active, probe)
        proved = value > 0  # NaN counts as not proved
        passes[active] += 1
        # Illinois: an end that stays put twice in a row has its value halved, which pulls the next secant towards it
        side = torch.where(proved, 1, -1).to(torch.int8)
        repeated = side == last_side[active]
        f_low[active] = torch.where(proved, value, torch.where(repeated, f_low[active] * 0.5, f_low[active]))
        f_high[active] = torch.where(
            proved, torch.where(repeated, f_high[active] * 0.5, f_high[active]), value
        )
        low[active] = torch.where(proved, probe, lo)
        high[active] = torch.where(proved, hi, probe)
        last_side[active] = side
    return low, passes


def _probe(lo: Tensor, f_lo: Tensor, hi: Tensor, f_hi: Tensor, tolerance: float, bisect: bool) -> Tensor:
    middle = (lo + hi) * 0.5
    if bisect:
        return middle
    secant = lo + (hi - lo) * (f_lo / (f_lo - f_hi))
    secant = torch.where(secant.isfinite(), secant, middle)
    inset = 0.5 * tolerance
    return secant.maximum(lo + inset).minimum(hi - inset)
