"""Schedules of the training radius, one value per batch (arXiv 2103.17268 and its reference implementation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Ramp(Protocol):
    """A radius per global training batch."""

    @property
    def last_epoch(self) -> int: ...

    def __call__(self, batch: int) -> float: ...


@dataclass(frozen=True)
class SmoothedRamp:
    """0 before the ramp, a polynomial of degree ``beta`` for its first part, then linear with matching slope.

    Args:
        target: the radius at the end of the ramp.
        start: first epoch of the ramp, counted from 1; its very first batch still has radius 0.
        length: epochs of the ramp.
        batches_per_epoch: L.
        mid: share of the ramp that is polynomial.
    """

    target: float
    start: int
    length: int
    batches_per_epoch: int
    beta: float = 4.0
    mid: float = 0.25

    @property
    def last_epoch(self) -> int:
        return self.start + self.length - 1

    def __call__(self, batch: int) -> float:
        """The radius of global batch ``batch`` = 0, 1, ..."""
        k0 = (self.start - 1) * self.batches_per_epoch
        k1 = k0 + self.length * self.batches_per_epoch
        km = k0 + int(self.mid * (k1 - k0))
        if batch <= k0:
            return 0.0
        if batch >= k1:
            return self.target
        if km == k0:  # a ramp of a few batches has no polynomial part
            return self.target * (batch - k0) / (k1 - k0)
        beta = self.beta
        A = self.target / ((k1 - km) * beta * (km - k0) ** (beta - 1) + (km - k0) ** beta)
        if batch < km:
            return float(A * (batch - k0) ** beta)
        e_m = A * (km - k0) ** beta
        return float(min(e_m + (self.target - e_m) * (batch - km) / (k1 - km), self.target))


@dataclass(frozen=True)
class LinearRamp:
    """Linear within the ramp, the first batch of each epoch at its lower end; 0 before, ``target`` after."""

    target: float
    start: int
    length: int
    batches_per_epoch: int

    @property
    def last_epoch(self) -> int:
        return self.start + self.length - 1

    def __call__(self, batch: int) -> float:
        done = batch - (self.start - 1) * self.batches_per_epoch
        return self.target * min(max(done / (self.length * self.batches_per_epoch), 0.0), 1.0)


@dataclass(frozen=True)
class NoRamp:
    """0 before epoch ``start``, ``target`` from its first batch on; ``length`` says only how long a warm-up lasts."""

    target: float
    start: int
    length: int
    batches_per_epoch: int

    @property
    def last_epoch(self) -> int:
        return self.start + self.length - 1

    def __call__(self, batch: int) -> float:
        return self.target if batch >= (self.start - 1) * self.batches_per_epoch else 0.0


RAMPS: dict[str, Callable[[float, int, int, int], Ramp]] = {
    "smoothed": SmoothedRamp,
    "linear": LinearRamp,
    "none": NoRamp,
}
"""By the names of ``[method] ramp``; each takes target, start, length and batches per epoch."""
