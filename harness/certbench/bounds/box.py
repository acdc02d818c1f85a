"""Axis-aligned boxes, and the ball of a threat as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from certbench.errors import UsageError

Map = Callable[[Tensor], Tensor]


class Box:
    """All tensors h with ``lower <= h <= upper``, equally ``|h - center| <= radius``, elementwise.

    Affine rules want centre and radius, monotone rules the two ends; whichever pair a box was made from, the other
    is computed when first asked for. Both pairs describe one box up to rounding.
    """

    __slots__ = ("_center", "_lower", "_radius", "_upper")

    def __init__(
        self,
        *,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        center: Tensor | None = None,
        radius: Tensor | None = None,
    ) -> None:
        if (lower is None or upper is None) and (center is None or radius is None):
            raise TypeError("a box needs lower and upper, or center and radius")
        self._lower, self._upper, self._center, self._radius = lower, upper, center, radius

    @property
    def lower(self) -> Tensor:
        if self._lower is None:
            self._lower = self.center - self.radius
        return self._lower

    @property
    def upper(self) -> Tensor:
        if self._upper is None:
            self._upper = self.center + self.radius
        return self._upper

    @property
    def center(self) -> Tensor:
        if self._center is None:
            self._center = (self.lower + self.upper) * 0.5
        return self._center

    @property
    def radius(self) -> Tensor:
        if self._radius is None:
            self._radius = (self.upper - self.lower) * 0.5
        return self._radius

    @property
    def shape(self) -> torch.Size:
        known = self._lower if self._lower is not None else self._center
        assert known is not None  # one pair is always there
        return known.shape

    def ends(self, function: Map) -> Self:
        """The image under a non-decreasing elementwise map, or any map that acts on both ends alike."""
        return type(self)(lower=function(self.lower), upper=function(self.upper))

    def both(self, function: Map) -> Self:
        """The image under a map that only moves entries around, such as a reshape."""
        if self._center is not None and self._radius is not None:
            return type(self)(center=function(self._center), radius=function(self._radius))
        return self.ends(function)


def input_box(images: Tensor, eps: float | Tensor) -> Box:
    """The L-inf ball of radius ``eps`` around raw images, intersected with [0, 1].

    Args:
        images: (batch, ...) raw pixels in [0, 1].
        eps: one radius in raw pixel units, or one per image, shape (batch,).

    Raises:
        UsageError: an image leaves [0, 1], or a radius is negative; NaN is neither.
    """
    if not torch.compiler.is_compiling():
        _check(images, eps)
    if isinstance(eps, Tensor) and eps.ndim:
        eps = eps.reshape(-1, *[1] * (images.ndim - 1))
    return Box(lower=(images - eps).clamp_min(0.0), upper=(images + eps).clamp_max(1.0))


def _check(images: Tensor, eps: float | Tensor) -> None:
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UsageError("images must lie in [0, 1]; one has a pixel outside, or NaN")
    if not (bool((eps >= 0).all()) if isinstance(eps, Tensor) else eps >= 0):
        raise UsageError("a radius must be 0 or above, in raw pixel units; one is negative or NaN")
    if isinstance(eps, Tensor) and eps.ndim and eps.shape != images.shape[:1]:
        raise UsageError(
            f"radii of shape {tuple(eps.shape)} for {len(images)} images; give one, or one per image"
        )
