"""The ``[method]`` table of SmoothMix."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from certbench.recipe import Strict
from certbench.settings import refuse_alpha


class SmoothMixSettings(Strict):
    """Defaults are those of the published CIFAR-10 runs at sigma 0.5 (arXiv 2111.09277 and its released code)."""

    noises: int = Field(default=2, ge=1)
    """m: noises of each image, and optimiser steps per batch."""
    attack_iterations: int = Field(default=4, ge=1)
    """T."""
    attack_step: float = Field(default=1.0, gt=0)
    """alpha: the L2 length of each step of the attack, in raw pixel units."""
    attack_radius: float | None = Field(default=None, gt=0)
    """An L2 ball for the attack; none, as published."""
    mix_step: int = Field(default=0, ge=0)
    """Attack steps after which a point replaces the image: 0, or 1 for the one-step variant."""
    mix_weight: float = Field(default=5.0, ge=0)
    """eta."""
    warm_up_epochs: int = Field(default=10, ge=0)
    """Over these eta and the radius of the one-step adversary rise to their values; the attack does not change."""
    detach_target: bool = False
    """Whether the mixed target is a constant. The released code differentiates the loss through it."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_alpha_that_is_meant(cls, table: Any) -> Any:
        return refuse_alpha(table, "the L2 length of a step of the attack is attack_step")

    @model_validator(mode="after")
    def _mix_step_within_the_attack(self) -> SmoothMixSettings:
        if self.mix_step >= self.attack_iterations:
            raise ValueError(
                f"mix_step = {self.mix_step} asks for a point that an attack of {self.attack_iterations} iterations "
                "has only at its end, or never"
            )
        return self
