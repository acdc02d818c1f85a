"""The ``[method]`` tables of ``abstraction`` and ``abstraction-ibp``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from certbench.recipe import Radius, Strict

Positive = Annotated[float, Field(gt=0)]


class Search(Strict):
    """``[method.search]``: try granularities from coarse to fine and keep the best on held-out training images."""

    radii: tuple[Positive, ...] = Field(min_length=1)
    """From large to small, on the [-1, 1] scale on which the released code reads them."""
    step: float = Field(default=0.01, gt=0)
    """Least difference between two widths that are tried, on the same scale."""
    held_out: int = Field(default=5000, ge=1)
    """How many of the last training images judge; the network of the run is then trained on all."""

    @model_validator(mode="after")
    def _radii_fall(self) -> Self:
        if list(self.radii) != sorted(set(self.radii), reverse=True):
            raise ValueError("radii fall from large to small, each once")
        return self


class Released(Strict):
    """``[method.released]``: habits of the released code that move its figures, for those who want them."""

    test_selection: bool = False
    """Granularity, and the epoch whose network is kept, chosen by accuracy on the test set."""
    floor_division: bool = False
    """``2 // d`` intervals in floating point, where ``2 / d`` are meant."""
    double_wave: bool = False
    """A cosine schedule of two full waves, which ends at its peak."""
    stopping_channels: bool = False
    """The stopping test on the channels that the code adds up, in place of lower and upper end points."""


class Ladder(Strict):
    """``[method.ladder]``: the steps of certification, each asked only about images that those before left open."""

    attack_steps: int = Field(default=20, ge=0)
    attack_restarts: int = Field(default=2, ge=1)
    linear: tuple[Literal["crown-ibp", "zonotope", "crown", "zonotope-crown"], ...] = ("crown-ibp",)
    """Linear bounds, one after the other; they have no float-sound form, so a float-sound run leaves them out.
    ``zonotope`` needs a network of convolutions, linear layers and ReLUs."""
    cap: int = Field(default=65536, ge=0)
    """Most abstract inputs of an image that are enumerated; 0 enumerates nothing."""
    search_cap: int = Field(default=64, ge=0)
    """The same within the radius search, for each radius it looks at."""
    branch_passes: int = Field(default=0, ge=0)
    """Bound passes that branching on straddling pixels may spend on an image; 0 never branches."""
    branch_seconds: float = Field(default=60.0, gt=0)
    """And seconds. An image that runs into this limit makes its row depend on the machine."""


class AbstractionSettings(Strict):
    """Defaults are the published ones (arXiv 2303.11552 and its released code)."""

    n: int | None = Field(default=None, ge=2)
    """Intervals per pixel."""
    search: Search | None = None
    initialization: Literal["xavier", "normal", "kaiming"] = "xavier"
    """Of weights; biases keep PyTorch's default. ``normal`` has deviation 0.01, ``kaiming`` is normal by fan-in."""
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps over which the rate of ``train.schedule = "cosine"`` first rises from 0."""
    augmentation: Literal["none", "cifar10"] = "none"
    """The published one: flip, erase, crop, filled with mid-grey. Set ``train.augment = false`` with it."""
    released: Released = Released()
    ladder: Ladder = Ladder()

    @model_validator(mode="after")
    def _one_way_to_a_granularity(self) -> Self:
        if (self.n is None) == (self.search is None):
            raise ValueError("needs n, the number of intervals, or a table search, and not both")
        return self


class AbstractionIBPSettings(AbstractionSettings):
    """``kappa CE(g(t)) + (1 - kappa) CE(worst logits over the reachable cells)``, the radius ramping up from 0."""

    train_radius: Radius | None = None
    """Where it differs from the radius that is certified."""
    kappa: float = Field(default=0.5, ge=0, le=1)
    """Weight of the clean loss at the end of the ramp; it falls from 1 as the radius rises."""
    ramp_start: int = Field(default=2, ge=1)
    """First epoch of the ramp, counted from 1."""
    ramp_epochs: int = Field(default=4, ge=1)
