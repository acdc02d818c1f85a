"""Per-image certified radii, searched in lockstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MarginFunction = Callable[[Tensor, Tensor], Tensor]
"""(which images, one radius each) -> smallest margin bound of each, all of shape (images,)."""


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

    Chandrupatla's method (1997), in lockstep: inverse quadratic steps where three points look smooth enough, bisection
    elsewhere. The margin of interval bounds is continuous, non-increasing and, for ReLU networks, piecewise linear in
    the radius, so steps inside the last piece are exact. Whatever the steps do, the returned radius is one at which
    ``margin`` itself was positive. Images leave the batch when they are done.
    """
    low, high = bracket.low.clone(), bracket.high.clone()
    x1, f1 = low.clone(), bracket.margin_low.clone()  # the newest point
    x2, f2 = high.clone(), bracket.margin_high.clone()  # the newest point on the other side of the root
    share = (f1 / (f1 - f2)).nan_to_num(0.5)  # of the way from x1 to x2: the first step is a secant
    newest_proved = torch.ones_like(
        low, dtype=torch.bool
    )  # whether x1 is; a margin that is not known cannot tell
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
        same_side = proved == newest_proved[active]
        newest_proved[active] = proved
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
