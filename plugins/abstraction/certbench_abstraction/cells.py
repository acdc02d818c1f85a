"""Which abstract inputs a ball of raw images reaches, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certbench_abstraction.layer import Abstraction

TAU = 2.0**-20
"""Added to the radius of an image that is not on the grid of its data set, whose pixels come from a computation."""


@dataclass(frozen=True)
class Cells:
    """All abstract inputs with ``lo <= k <= hi`` in every pixel; int64, shape (batch, C, H, W)."""

    lo: Tensor
    hi: Tensor

    def __getitem__(self, which: Tensor) -> Cells:
        return Cells(self.lo[which], self.hi[which])

    @property
    def straddling(self) -> Tensor:
        """Pixels that reach more than one interval, (batch,)."""
        return (self.hi > self.lo).flatten(1).sum(1)

    @property
    def count(self) -> Tensor:
        """Abstract inputs, float64 (batch,): exact up to 2^53, infinite beyond 2^1023."""
        return (self.hi - self.lo + 1).double().flatten(1).prod(1)


def reachable(images: Tensor, eps: Tensor, abstraction: Abstraction) -> Cells:
    """The cells of all real images within ``eps`` of ``images``, clipped to [0, 1].

    The intervals of a pixel's ball are those from its lower to its upper end, since the map is monotone and pixels
    move independently; so these are exactly the abstract inputs that the ball reaches, no more and no fewer. Sums are
    rounded down, which does not move them across a border: a border is a float64, and so it is at most the sum exactly
    if it is at most the sum rounded down.

    Args:
        images: float64, (batch, C, H, W); eps: float64, (batch,).
    """
    e = eps.view(-1, *[1] * (images.ndim - 1))
    return Cells(abstraction.index(sum_down(images, -e)), abstraction.index(sum_down(images, e)))


def radius_until_change(images: Tensor, cells: Cells, abstraction: Abstraction) -> Tensor:
    """The largest float64 radius whose ball stays within ``cells``, (batch,); infinite where they are all.

    A lower border belongs to its interval and may be reached, an upper one does not.
    """
    borders = abstraction.borders.double()
    nothing = borders.new_full((1,), torch.inf)
    above = torch.take(torch.cat([borders, nothing]), cells.hi)
    below = torch.take(torch.cat([-nothing, borders]), cells.lo)
    d, error = two_sum(above, -images)
    # Strictly below the border: where the difference is exact, or was rounded up, one step less.
    up = torch.where(above.isinf() | (error > 0), d, torch.nextafter(d, -nothing))
    return torch.minimum(up, sum_down(images, -below)).flatten(1).amin(1).clamp_min(0.0)


def on_grid(images: Tensor, levels: int) -> Tensor:
    """Which float64 images hold nothing but ``integer / levels`` rounded to float32, bool (batch,)."""
    codes = (images * levels).round()
    stored = codes.float() / torch.tensor(float(levels), device=images.device)
    return (stored.double() == images).flatten(1).all(1)


def sum_down(a: Tensor, b: Tensor) -> Tensor:
    """The largest float64 that is not above ``a + b``."""
    s, error = two_sum(a, b)
    return torch.where(error < 0, torch.nextafter(s, s.new_full((), -torch.inf)), s)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The sum rounded to nearest and, exactly, what rounding left out (Knuth)."""
    s = a + b
    b_virtual = s - a
    return s, (a - (s - b_virtual)) + (b - b_virtual)


def pixels_of(k: Tensor, images: Tensor, abstraction: Abstraction) -> Tensor:
    """Float32 images in cells k that are nearest to ``images`` (float32): each pixel stays, or moves just over a border."""
    nothing = abstraction.borders.new_full((1,), torch.inf)
    start = torch.take(torch.cat([-nothing, abstraction.borders]), k)
    end = torch.take(torch.cat([abstraction.borders, nothing]), k)
    last = torch.where(end.isinf(), end, torch.nextafter(end, -nothing))
    return images.maximum(start).minimum(last)
