"""The ``[method]`` tables of the smoothing baselines, with the symbols of their papers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from pydantic import Field, field_validator, model_validator

from certbench.recipe import Distance, Strict
from certbench.settings import refuse_alpha


class GaussianSettings(Strict):
    train_sigma: float | None = Field(default=None, gt=0)
    """Standard deviation of the training noise, where it differs from the one that is certified with."""


class StabilitySettings(Strict):
    weight: float = Field(default=2.0, ge=0)
    """lambda."""


class ConsistencySettings(Strict):
    noises: int = Field(default=2, ge=2)
    """m: noisy copies of each image, in one pass."""
    weight: float = Field(default=5.0, ge=0)
    """lambda."""
    entropy_weight: float = Field(default=0.5, ge=0)


class SmoothAdvSettings(Strict):
    noises: int = Field(default=4, ge=1)
    """m: noises of each image, and optimiser steps per batch."""
    attack_radius: Distance = Fraction(255, 256)
    """epsilon: L2, in raw pixel units."""
    attack_iterations: int = Field(default=10, ge=1)
    """T."""
    warm_up_epochs: int = Field(default=10, ge=0)
    """Over these epsilon rises to its value."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_alpha_that_is_meant(cls, table: Any) -> Any:
        return refuse_alpha(
            table, "the L2 length of a step of the attack follows from attack_radius and attack_iterations"
        )

    @field_validator("attack_radius")
    @classmethod
    def _above_zero(cls, radius: Fraction) -> Fraction:
        if not radius:
            raise ValueError("an attack needs a radius above 0")
        return radius


class MACERSettings(Strict):
    noises: int = Field(default=16, ge=1)
    """k: noisy copies of each image, in one pass."""
    beta: float = Field(default=16.0, gt=0)
    """Inverse temperature of the hinge's softmax."""
    gamma: float = Field(default=8.0, gt=0)
    """Gap from which on a radius is left alone."""
    weight: float = Field(default=16.0, ge=0)
    """lambda."""
    delay_epochs: int = Field(default=0, ge=0)
    """Epochs before the hinge joins; the release waits until the learning rate has fallen for the first time."""
