"""Settings that several methods share, so that their recipes spell them alike. Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field

from certbench.errors import UsageError
from certbench.recipe import Radius, Recipe, Strict
from certbench.threat import format_radius


def refuse_alpha(table: Any, own: str) -> Any:
    """The table as it is, for a validator of mode ``before``: alpha means one thing in a method's paper and another in
    certification. ``own`` says which key has the method's.

    Raises:
        ValueError: the table has a key of that name, or that of the certification's.
    """
    if isinstance(table, dict) and {"alpha", "failure_probability"} & set(table):
        raise ValueError(f"{own}; the alpha of certification is certify.smoothing.failure_probability")
    return table


class RampSettings(Strict):
    """How the training radius rises; defaults as published for Fast IBP on MNIST (arXiv 2103.17268)."""

    train_radius: Radius | None = None
    """eps_max, where it differs from the radius that is certified; never above the cap of the certificates."""
    ramp: Literal["smoothed", "linear", "none"] = "smoothed"
    """``none`` trains at eps_max from the first batch of the ramp on."""
    ramp_start: int = Field(default=1, ge=1)
    """First epoch of the ramp, counted from 1; the epochs before it train on the clean loss."""
    ramp_epochs: int = Field(default=20, ge=1)

    def trained_radius(self, recipe: Recipe) -> Fraction:
        """eps_max."""
        return self.train_radius or recipe.radius

    def check_recipe(self, recipe: Recipe) -> None:
        """
        Raises:
            UsageError: the training radius exceeds the cap of the certificates, which would then not see it.
        """
        if recipe.threat.radius is None:  # refused elsewhere
            return
        radius = self.trained_radius(recipe)
        if radius > recipe.cap:
            raise UsageError(
                f"{recipe.name}: method.train_radius = {format_radius(radius)} lies above certify.cap = "
                f"{format_radius(recipe.cap)}, so no certificate would show what it trains for; raise the cap"
            )


class WarmUpSettings(RampSettings):
    """The ramp, and the parts of Fast IBP that make a short one work (arXiv 2103.17268), each with its switch."""

    regularizer_weight: float = Field(default=0.5, ge=0)
    """lambda_0 of both regularisers, multiplied by 1 - eps / eps_max."""
    tolerance: float = Field(default=0.5, gt=0, lt=1)
    """tau of both regularisers."""
    tightness: bool = True
    relu_balance: bool = True
    initialization: Literal["ibp", "default"] = "ibp"
    batch_norm: Literal["everywhere", "convolutions", "none"] = "everywhere"
    """Which of the network's batch norms stay: all, those after convolutions, or none."""

    later: ClassVar[frozenset[str]] = frozenset({"tightness", "relu_balance", "initialization", "batch_norm"})

    @property
    def regularizes(self) -> bool:
        return self.regularizer_weight > 0 and (self.tightness or self.relu_balance)
