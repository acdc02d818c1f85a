"""The ``[method]`` tables of the baselines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from certbench.recipe import Strict
from certbench.settings import WarmUpSettings


class NoSettings(Strict):
    """Of ``standard`` and ``constant``."""


class VanillaSettings(WarmUpSettings):
    """Interval bounds without the additions of Fast IBP, which may be switched on one by one; of ``crown-ibp``."""

    regularizer_weight: float = Field(default=0.0, ge=0)
    initialization: Literal["ibp", "default"] = "default"


class IBPSettings(VanillaSettings):
    kappa: float = Field(default=0.0, ge=0, le=1)
    """Weight of the clean loss; at 1 only it and the regularisers count."""


class AttackSettings(WarmUpSettings):
    """The attack of a training step."""

    attack_steps: int = Field(default=8, ge=1)
    step_size: float = Field(default=0.25, gt=0)
    """Of one step, as a share of the radius."""


class SABRSettings(AttackSettings):
    subselection_ratio: float = Field(default=0.2, gt=0, le=1)
    """lambda: the half-width of the small box as a share of the radius; 1 is IBP."""


class MTLIBPSettings(AttackSettings):
    alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight of the IBP loss; 1 is IBP, 0 adversarial training."""
