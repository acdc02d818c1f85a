"""Boxes of float64 numbers whose every conversion is rounded outward, and the ball of a threat as one."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from certbench.bounds.box import Box
from certbench.errors import UsageError
from certbench.threat import round_up


def down(values: Tensor) -> Tensor:
    """One float64 below: never above the exact result of the one rounded operation that gave ``values``.

    As a step of the last place it leaves gradients alone.
    """
    plain = values.detach()
    step = torch.nextafter(plain, plain.new_full((), -math.inf))
    return values + (step - plain) if values.requires_grad else step


def up(values: Tensor) -> Tensor:
    """One float64 above."""
    return torch.nextafter(values, values.new_full((), math.inf))


FOUR_UNITS = 1 + 4 * 2.0**-53
"""Covers three roundings of non-negative numbers, this product's own included."""


class SoundBox(Box):
    """A box whose two forms each contain the other: every conversion is rounded outward."""

    __slots__ = ()

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = down(self.center - self.radius)
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = up(self.center + self.radius)
        return self._upper

    @property
    def center(self) -> Tensor:
        if self._center is None:
            self._center = (self.lower + self.upper) * 0.5
        return self._center

    @property
    def radius(self) -> Tensor:
        if self._radius is None:
            center = self.center
            self._radius = torch.maximum(self.upper - center, center - self.lower) * FOUR_UNITS
        return self._radius

    @property
    def magnitude(self) -> Tensor:
        """At least ``|h|`` for every h in the box, up to one rounding of a sum, which users cover."""
        if self._lower is not None and self._upper is not None:
            return torch.maximum(-self._lower, self._upper)
        return self.center.abs() + self.radius


def sound_input_box(images: Tensor, eps: Fraction | Tensor) -> SoundBox:
    """A box around the ball of radius ``eps`` intersected with [0, 1].

    Args:
        images: (batch, ...) in float64, each pixel the exact value of the deployed pixel.
        eps: one exact fraction, or one float64 per image that is not below the radius meant, shape (batch,).

    Raises:
        UsageError: a pixel outside [0, 1] or NaN, a negative or NaN radius, or numbers not in float64.
    """
    if isinstance(eps, Fraction):
        eps = images.new_full((len(images),), round_up(eps))
    if images.dtype != torch.float64 or eps.dtype != torch.float64:
        raise UsageError(f"float-sound bounds are computed in float64, not {images.dtype} and {eps.dtype}")
    if not ((images >= 0) & (images <= 1)).all():
        raise UsageError("cannot certify: a pixel lies outside [0, 1] or is not a number")
    if not (eps >= 0).all():
        raise UsageError("cannot certify: a radius is negative or not a number")
    eps = eps.reshape(-1, *[1] * (images.ndim - 1))
    return SoundBox(lower=down(images - eps).clamp_min(0.0), upper=up(images + eps).clamp_max(1.0))
