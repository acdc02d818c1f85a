"""A figure of a board: a mean with its two spreads, over seeds and over images, which are never mixed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from certbench.stats import binomial


@dataclass(frozen=True)
class Figure:
    """A mean over seeds; ``deviation`` is the sample standard deviation over seeds, where there are two or more.

    ``interval`` is where the mean of these very networks over all images like the tested ones lies, at 95 percent: it
    speaks of images, and says nothing of other seeds.
    """

    mean: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None


def figure(values: Sequence[float] | Sequence[Fraction]) -> Figure:
    """Mean and standard deviation, exact until they are rounded once."""
    exact = [Fraction(value) for value in values]
    mean = float(sum(exact) / len(exact))
    return Figure(mean, float(statistics.stdev(exact)) if len(exact) > 1 else None)


def share(percents: Sequence[Fraction], images: int) -> Figure:
    """The figure of a share of ``images`` images, in percent, with its Clopper-Pearson interval.

    Seeds share the images, so their counts are not added up: the interval is that of the mean count, rounded outward.
    """
    found = figure(percents)
    count = sum(percents) / len(percents) * images / 100
    low = binomial.lower_bound(math.floor(count), images, 0.025)
    high = binomial.upper_bound(math.ceil(count), images, 0.025)
    # Six decimals, outward: the last bits of the beta quantile differ between versions of scipy.
    interval = (math.floor(float(low) * 1e8) / 1e6, math.ceil(float(high) * 1e8) / 1e6)
    return Figure(found.mean, found.deviation, interval)


def decimal(value: float) -> Fraction:
    """The number as it is written, so that 100 - 51.72 is 48.28."""
    return Fraction(repr(value))
