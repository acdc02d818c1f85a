"""The paired bootstrap over images, nested in seeds, equal to the bit on every machine.

All rows are resampled with the same images, so what two rows share cancels in their difference. Sums are taken over
whole numbers that float64 holds exactly, so neither the order of summation nor the number of threads can move them; the
draws come from PCG64's raw stream, which numpy keeps stable over versions.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
DRAWS = 1000
_BLOCK = 100


@dataclass(frozen=True)
class Sampled:
    """Rows that share their images: the means of their runs, and of each run in every resample of the images.

    ``means`` has one entry per run, ``draws`` one row per run and one column per resample.
    """

    means: Floats
    draws: Floats


def resample_images(values: Floats | NDArray[np.bool_], draws: int = DRAWS) -> Sampled:
    """Means over ``draws`` resamples of the images, with replacement; ``values`` has one row per run.

    Values other than yes and no are rounded to a multiple of a power of two that keeps all sums exact: to about 1e-11 of
    the largest one for 10,000 images.

    Raises:
        ValueError: no images, or a value that is negative or not finite.
    """
    images = values.shape[1]
    if images == 0 or not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError("a bootstrap needs images, and values that are finite and not negative")
    whole, scale = _whole_numbers(values, images)
    counts = _counts(images, draws)
    found = np.empty((len(values), draws))
    for start in range(0, draws, _BLOCK):
        found[:, start : start + _BLOCK] = whole @ counts[start : start + _BLOCK].T.astype(whole.dtype)
    divisor = scale * images
    return Sampled(whole.sum(axis=1, dtype=np.float64) / divisor, found / divisor)


def _whole_numbers(values: Floats | NDArray[np.bool_], images: int) -> tuple[NDArray[Any], float]:
    """Whole numbers of which every sum over a resample is exact in their type, and what they were multiplied by."""
    if values.dtype == np.bool_ and images < 2**24:
        return values.astype(np.float32), 1.0
    exponent = 52 - math.ceil(math.log2(max(float(values.max()), 1.0))) - math.ceil(math.log2(images))
    return np.rint(values * 2.0**exponent), 2.0**exponent


@lru_cache(maxsize=2)
def _counts(images: int, draws: int) -> NDArray[np.uint8]:
    """How often each image is drawn, one row per resample: the same for every table over so many images."""
    raw = np.random.PCG64(int.from_bytes(b"images", "big"))
    counts = np.empty((draws, images), dtype=np.uint8)  # a count of 256 has a probability below 1e-500
    for resample in counts:
        resample[:] = np.bincount(_below(raw, images, images), minlength=images)
    return counts


def _below(raw: np.random.PCG64, bound: int, size: int) -> NDArray[np.int64]:
    """Numbers from 0 to ``bound`` - 1; the bias is below ``bound`` / 2^32."""
    return ((raw.random_raw(size) >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def interval(draws: Floats, alpha: float = 0.05) -> tuple[float, float]:
    """The percentile interval of one row of resampled means: the order statistics that leave alpha / 2 on each side."""
    ordered = np.sort(draws)
    outside = int(np.floor(alpha / 2 * len(ordered)))
    return float(ordered[outside]), float(ordered[len(ordered) - 1 - outside])


@dataclass(frozen=True)
class Nested:
    """A row that is the mean of several seeds, resampled over images and seeds.

    ``draws`` resample both, ``images`` the images alone. ``seed_variance`` is the variance of the mean that comes from
    the seeds, ``degrees`` its degrees of freedom (0 for one seed, of whose variance nothing is known: the row then
    speaks of that network alone).
    """

    mean: float
    draws: Floats
    images: Floats
    seed_variance: float
    degrees: int


def nest(sampled: Sampled, runs: list[int], key: str) -> Nested:
    """The row whose seeds are the given runs; in every resample the seeds are drawn anew, one fewer than there are.

    One fewer (Rao and Wu 1988), since with replacement S of S seeds would understate their variance by the factor
    (S - 1) / S, which for two or three seeds is most of it. ``key`` names the row's own stream of draws, so that rows
    draw their seeds independently, and in any order of rows alike.
    """
    means, draws = sampled.means[runs], sampled.draws[runs]
    seeds = len(runs)
    if seeds == 1:
        return Nested(float(means[0]), draws[0], draws[0], 0.0, 0)
    digest = hashlib.sha256(f"seeds of {key}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest[:16], "big"))
    chosen = _below(raw, seeds, (seeds - 1) * draws.shape[1]).reshape(seeds - 1, -1)
    nested = np.take_along_axis(draws, chosen, axis=0).mean(axis=0)
    variance = float(means.var(ddof=1)) / seeds
    return Nested(float(means.mean()), nested, draws.mean(axis=0), variance, seeds - 1)


def p_values(rows: list[Nested]) -> Floats:
    """Two-sided p-values for every pair of rows having one mean, as a symmetric matrix with ones on its diagonal.

    The difference over its bootstrap standard error is compared with Student's t, whose degrees of freedom follow from
    how much of the variance rests on few seeds (Satterthwaite 1946); without seeds to speak of that is the normal law.
    """
    draws = np.stack([row.draws for row in rows])
    means = np.array([row.mean for row in rows])
    covariance = np.atleast_2d(np.cov(draws))
    spread = np.diag(covariance)
    variance = np.maximum(spread[:, None] + spread[None, :] - 2 * covariance, 0.0)
    difference = np.abs(means[:, None] - means[None, :])
    p = _tails(difference, variance, _degrees(rows, variance))
    np.fill_diagonal(p, 1.0)
    return p


def _degrees(rows: list[Nested], variance: Floats) -> Floats:
    parts = np.array([row.seed_variance**2 / row.degrees if row.degrees else 0.0 for row in rows])
    pairs = parts[:, None] + parts[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(pairs > 0, np.maximum(variance**2 / pairs, 1.0), np.inf))


def _tails(difference: Floats, variance: Floats, degrees: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.where(difference == 0, 0.0, difference / np.sqrt(variance))
    student = special.stdtr(np.where(np.isinf(degrees), 1.0, degrees), -size)
    tail = np.where(np.isinf(degrees), special.ndtr(-size), student)
    return np.asarray(np.minimum(2 * tail, 1.0))
