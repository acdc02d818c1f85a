"""The ``[method]`` table of Fast IBP."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from certbench.recipe import Radius, Strict


class FastIBPSettings(Strict):
    """Defaults are the published ones for MNIST and CIFAR-10 (arXiv 2103.17268 and its released code)."""

    train_radius: Radius | None = None
    """eps_max, where it differs from the radius that is certified."""
    ramp: Literal["smoothed", "linear"] = "smoothed"
    ramp_start: int = Field(default=1, ge=1)
    """First epoch of the ramp, counted from 1; the epochs before it train on the clean loss."""
    ramp_epochs: int = Field(default=20, ge=1)
    regularizer_weight: float = Field(default=0.5, ge=0)
    """lambda_0, multiplied by 1 - eps / eps_max."""
    tolerance: float = Field(default=0.5, gt=0, lt=1)
    """tau of both regularisers."""
