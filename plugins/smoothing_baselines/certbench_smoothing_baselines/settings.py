"""The ``[method]`` tables of the smoothing baselines."""

from __future__ import annotations

from pydantic import Field

from certbench.recipe import Strict


class GaussianSettings(Strict):
    train_sigma: float | None = Field(default=None, gt=0)
    """Standard deviation of the training noise, where it differs from the one that is certified with."""
