"""Per-image certified radii, searched in lockstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MarginFunction = Callable[[Tensor, Tensor], Tensor]
"""(which images, one radius each) -> smallest margin bound of each, all of shape (images,)."""


PATIENCE = 12
"""Secant steps before bisection takes turns with them."""
GRID = 8
"""Points of the downward scan for bounds that are not monotone in the radius."""


@dataclass(frozen=True)
class Bracket:
    """Per image: a proved radius with its margin, and an unproved radius with its margin, NaN where not known."""

    low: Tensor
    margin_low: Tensor
    high: Tensor
    margin_high: Tensor


def search_radii(
    margin: MarginFunction,
    *,
    low: Tensor,
    margin_low: Tensor,
    radius: float,
    margin_radius: Tensor,
    cap: float,
    tolerance: float,
    monotone: bool,
) -> tuple[Tensor, Tensor]:
    """Radii in [low, cap], each ``low`` or one at which ``margin`` was positive, and the passes spent, both (images,).

    Args:
        low: proved radii, by whatever bound, below the cap; 0 for a correct image.
        margin_low: this bound's margin there, or NaN where it is not known.
        margin_radius: its margins at ``radius``, or NaN.
        monotone: if the margin never increases with the radius, one pass at the cap or ``margin_radius`` gives the
            bracket. If not, the true robust radius may still be any proved one, so a scan goes down from the cap over
            ``GRID`` points, and the bracket lies above the largest proved one.
    """
    refuted = ~(margin_radius > 0) & ~margin_radius.isnan() & (low < radius) if monotone else None
    bracket, spent = _scan(margin, low, margin_low, cap, 1 if monotone else GRID, skip=refuted)
    if refuted is not None:
        high = torch.where(refuted, radius, bracket.high)
        f_high = torch.where(refuted, margin_radius, bracket.margin_high)
        bracket = Bracket(bracket.low, bracket.margin_low, high, f_high)
    found, passes = largest_proved_radius(margin, bracket, tolerance)
    return found, spent + passes


def _scan(
    margin: MarginFunction, low: Tensor, margin_low: Tensor, cap: float, points: int, skip: Tensor | None
) -> tuple[Bracket, Tensor]:
    """Down from the cap over equally spaced points to the first that is proved; the bracket is the cell above it."""
    low, f_low = low.clone(), margin_low.clone()
    high, f_high = torch.full_like(low, cap), torch.full_like(low, torch.nan)
    spent = torch.zeros_like(low, dtype=torch.int32)
    open_ = torch.ones_like(low, dtype=torch.bool) if skip is None else ~skip
    for k in range(points, 0, -1):
        point = cap * k / points
        which = (open_ & (low < point)).nonzero().squeeze(1)
        if not len(which):
            break
        value = margin(which, torch.full_like(low[which], point))
        spent[which] += 1
        proved, others = which[value > 0], which[~(value > 0)]
        low[proved], f_low[proved] = point, value[value > 0]
        open_[proved] = False
        high[others], f_high[others] = point, value[~(value > 0)]
    return Bracket(low, f_low, high, f_high), spent


def largest_proved_radius(
    margin: MarginFunction, bracket: Bracket, tolerance: float, max_passes: int = 60
) -> tuple[Tensor, Tensor]:
    """Narrow every bracket below ``tolerance`` and return (proved radii, bound passes spent), both (images,).

    The margin of interval bounds is continuous, non-increasing and, for ReLU networks, piecewise linear in the
    radius, so secant steps end once they are inside the last piece. The rule of Anderson and Bjorck (BIT 13, 1973)
    keeps both ends moving, a step never lands nearer than half a tolerance to an end, and after ``PATIENCE`` steps
    every other one bisects, which bounds the passes whatever the margin does. The returned radius is one at which
    ``margin`` itself was positive. Images leave the batch when they are done.
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
        probe = _probe(
            lo, f_low[active], hi, f_high[active], tolerance, bisect=step >= PATIENCE and step % 2 == 0
        )
        value = margin(active, probe)
        proved = value > 0  # NaN counts as not proved
        passes[active] += 1
        # An end that stays put twice in a row has its value reduced, which pulls the next secant towards it.
        side = torch.where(proved, 1, -1).to(torch.int8)
        repeated = side == last_side[active]
        kept_low = torch.where(repeated, f_low[active] * _reduction(value, f_high[active]), f_low[active])
        kept_high = torch.where(repeated, f_high[active] * _reduction(value, f_low[active]), f_high[active])
        f_low[active] = torch.where(proved, value, kept_low)
        f_high[active] = torch.where(proved, kept_high, value)
        low[active] = torch.where(proved, probe, lo)
        high[active] = torch.where(proved, hi, probe)
        last_side[active] = side
    return low, passes


def _reduction(value: Tensor, replaced: Tensor) -> Tensor:
    """By what the end that stayed is scaled, when ``value`` takes the place of the other one."""
    factor = 1 - value / replaced
    return torch.where(factor > 0, factor, 0.5)


def _probe(lo: Tensor, f_lo: Tensor, hi: Tensor, f_hi: Tensor, tolerance: float, bisect: bool) -> Tensor:
    middle = (lo + hi) * 0.5
    if bisect:
        return middle
    secant = lo + (hi - lo) * (f_lo / (f_lo - f_hi))
    secant = torch.where(secant.isfinite(), secant, middle)
    inset = 0.5 * tolerance
    # Just below the root, not on it: there the sign of the margin would be decided by the last bit of a sum.
    return (secant - 0.5 * inset).maximum(lo + inset).minimum(hi - inset)
