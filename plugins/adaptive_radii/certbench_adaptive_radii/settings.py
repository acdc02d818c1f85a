"""The ``[method]`` table of adaptive radii."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from certbench.settings import WarmUpSettings


class AdaptiveRadiiSettings(WarmUpSettings):
    """The ramp is that of the budget c; its end, e_max, is ``train_radius`` or the radius that is certified.

    Below ``max_passes`` stand the ablations; their defaults are the method.
    """

    ramp_start: int = Field(default=2, ge=1)
    kappa: float = Field(default=0.0, ge=0, le=1)
    """Weight of the clean loss; at 1 only it and the regularisers count."""
    l1: float = Field(default=0.0, ge=0)
    """Weight of the sum of the absolute weights of convolutions and linear layers."""
    radius_tolerance: float = Field(default=1e-4, gt=0, lt=1)
    """How far below the true one a radius may lie, as a share of the budget."""
    max_passes: int = Field(default=10, ge=0)
    """Bound passes of the root search in a step; an image that needs more takes the largest radius proved so far."""

    search: Literal["root", "none"] = "root"
    """``none``: the budget for every correct image, 0 for the others."""
    misclassified: Literal["clean", "dropped"] = "clean"
    """Whether a misclassified image's robust term is its cross entropy, or left out."""
    multiplier: float = Field(default=1.0, gt=0, le=1000)
    """Of the radii, which stay at most at the budget."""
    radius_gradient: Literal["stopped", "implicit"] = "stopped"
    """``implicit``: gradients flow through an interior radius, dr = -dm / (dm/de)."""
    bounds: Literal["ibp", "crown-ibp"] = "ibp"
