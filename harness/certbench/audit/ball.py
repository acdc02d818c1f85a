"""The float32 images inside a ball, decided in exact arithmetic.

A centre is the stored float32 image taken as the rational number that it is; a radius is a float64, exact too. The
difference of two float32 pixels need not be a float64, so it is computed as a sum of two float64 numbers that is
exact (Knuth's two-sum); comparing it with the radius is then comparing rationals.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from certbench.errors import RunError


@dataclass(frozen=True)
class Ball:
    """All float32 images within ``radius`` of ``center``, every pixel in [0, 1].

    ``center``, ``low``, ``high``: float32, shape (batch, *image); ``radius``: float64, shape (batch,). An image is
    in the ball exactly if ``low <= image <= high``.
    """

    center: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor

    def project(self, images: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """The nearest images inside the balls ``which``."""
        return images.maximum(self.low[which]).minimum(self.high[which])


def ball(center: Tensor, radius: Tensor) -> Ball:
    """The ball of every image, one radius each, with the widest float32 bounds that lie inside it.

    Raises:
        RunError: a centre that is not float32 in [0, 1], or a radius that is NaN, infinite or negative; names the first.
    """
    _check(center, radius)
    e = broadcast(radius, center)
    wide = center.to(torch.float64)
    # rounded to nearest, then one step outwards: from there the widest bound inside is at most three steps inwards
    high = torch.nextafter((wide + e).clamp(max=1).to(torch.float32), torch.full_like(center, 2)).clamp(max=1)
    low = torch.nextafter((wide - e).clamp(min=0).to(torch.float32), torch.full_like(center, -1)).clamp(min=0)
    return Ball(center, radius, _inwards(low, center, e), _inwards(high, center, e))


def _check(center: Tensor, radius: Tensor) -> None:
    if center.dtype != torch.float32 or radius.dtype != torch.float64 or radius.shape != center.shape[:1]:
        raise RunError(
            f"a ball takes float32 images and one float64 radius each, not {center.dtype} {tuple(center.shape)} and "
            f"{radius.dtype} {tuple(radius.shape)}"
        )
    wrong = ~((center >= 0) & (center <= 1)).flatten(1).all(1)
    if wrong.any():
        raise RunError(f"image {int(wrong.nonzero()[0])} of the batch has pixels outside [0, 1], or NaN")
    wrong = ~(radius.isfinite() & (radius >= 0))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise RunError(
            f"image {place} of the batch has the radius {float(radius[place])}, which is no radius"
        )


def _inwards(bound: Tensor, center: Tensor, e: Tensor) -> Tensor:
    """``bound`` moved towards ``center`` until it is within ``e`` of it; the centre itself always is."""
    while (outside := ~_within(bound, center, e)).any():
        bound = torch.where(outside, torch.nextafter(bound, center), bound)
    return bound


def contains(center: Tensor, radius: Tensor, images: Tensor) -> Tensor:
    """Which images lie in their ball and in [0, 1], exactly; bool, shape (batch,)."""
    inside = _within(images, center, broadcast(radius, center)) & (images >= 0) & (images <= 1)
    return inside.flatten(1).all(1)


def distance(center: Tensor, images: Tensor) -> Tensor:
    """L-inf distances as float64, shape (batch,): the smallest float64 that is not below the exact one."""
    difference, rest = _exact_difference(center, images)
    above = torch.nextafter(difference, torch.full_like(difference, torch.inf))
    return torch.where(rest > 0, above, difference).flatten(1).amax(1)


def contains_exactly(center: Tensor, radius: Fraction, image: Tensor) -> bool:
    """The same for one image by rational numbers throughout; slow, and independent of the above."""
    pairs = zip(center.flatten().tolist(), image.flatten().tolist(), strict=True)
    return all(0 <= x <= 1 and abs(Fraction(x) - Fraction(c)) <= radius for c, x in pairs)


def broadcast(values: Tensor, images: Tensor) -> Tensor:
    """One value per image, shaped so that it meets every pixel."""
    return values.view(-1, *([1] * (images.ndim - 1)))


def _within(one: Tensor, other: Tensor, e: Tensor) -> Tensor:
    difference, rest = _exact_difference(one, other)
    return (difference < e) | ((difference == e) & (rest <= 0))


def _exact_difference(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """``|one - other|`` of float32 tensors as float64 numbers ``d + r``, exactly; d is the sum rounded to nearest."""
    a, b = one.maximum(other).to(torch.float64), one.minimum(other).to(torch.float64)
    d = a - b
    b_virtual = a - d
    return d, (a - (d + b_virtual)) + (b_virtual - b)
