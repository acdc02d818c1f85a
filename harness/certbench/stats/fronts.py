"""Trade-off fronts: points (accuracy, robustness), both to be maximised; which points count, and how two fronts compare.

Points are rows of an array (points, 2) of shares in [0, 1], the robustness being ACR / cap. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STEPS = 2.0**32
"""Radii enter a bootstrap as whole numbers of ``cap / STEPS``, rounded down, so that sums are exact in any order."""
CHUNK = 64
"""Resamples that are drawn at a time."""


def nondominated(points: Floats) -> NDArray[np.bool_]:
    """True where no other point is at least as good in both and better in one; equal points stand together.

    By falling first coordinate, a point stands if it raises the second, or equals the last one that did.
    """
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    second = points[order, 1]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(second)[:-1]])
    last = np.maximum.accumulate(np.where(second > before, np.arange(len(order)), 0))
    stands = np.empty(len(order), dtype=bool)
    stands[order] = np.all(points[order] == points[order[last]], axis=1)
    return stands


def hypervolume(points: Floats, reference: tuple[float, float]) -> float:
    """The area that is dominated by the points and lies above the reference in both."""
    area, height = 0.0, reference[1]
    for accuracy, robustness in points[np.argsort(-points[:, 0], kind="stable")]:
        if accuracy > reference[0] and robustness > height:
            area += (accuracy - reference[0]) * (robustness - height)
            height = robustness
    return float(area)


def staircase(points: Floats, accuracy: float) -> float:
    """The best robustness of a point at least that accurate, NaN where there is none."""
    reached = points[points[:, 0] >= accuracy, 1]
    return float(reached.max()) if len(reached) else float("nan")


def hull(points: Floats, accuracy: float) -> float:
    """The best robustness, in expectation, of choosing at random between two points; NaN where none is accurate enough.

    The upper concave hull at that accuracy, never below :func:`staircase`.
    """
    best = staircase(points, accuracy)
    above, below = points[points[:, 0] >= accuracy], points[points[:, 0] < accuracy]
    if len(above) and len(below):
        a, b = above[:, None], below[None]
        share = (accuracy - b[..., 0]) / (a[..., 0] - b[..., 0])
        best = max(best, float((b[..., 1] + share * (a[..., 1] - b[..., 1])).max()))
    return best


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """A challenger's robustness over a baseline's, at the accuracy of one of the baseline's points.

    ``ratio`` is by the staircase rule, 0 where the challenger has no point that accurate (``reached`` is false);
    ``hull`` by the concave hull. ``on_front``: no other of the baseline's points dominates this one. ``beyond_constant``: the
    baseline is more robust there than a constant classifier.
    """

    setting: int
    accuracy: float
    robustness: float
    ratio: Estimate
    hull: float
    reached: bool
    on_front: bool
    beyond_constant: bool


@dataclass(frozen=True)
class Comparison:
    """Ratios at every baseline point that has any robustness, and what they add up to; None where no point qualifies.

    ``largest`` is over all of them, ``on_front`` over those on the baseline's own front, ``beyond_constant`` over those where
    the baseline is more robust than a constant classifier, ``mean`` the geometric mean over those that the challenger
    reaches, in a resample over those that it reaches there.
    """

    ratios: tuple[Ratio, ...]
    largest: Estimate | None
    on_front: Estimate | None
    beyond_constant: Estimate | None
    mean: Estimate | None


@dataclass(frozen=True)
class Sweep:
    """A method's settings: whether each image is classified correctly, and its radius as a share of the cap.

    Both have shape (settings, seeds, images); a misclassified image has radius 0.
    """

    correct: NDArray[np.bool_]
    radius: Floats

    def points(self) -> Floats:
        """(accuracy, ACR / cap) of each setting, means over seeds and images."""
        _, seeds, images = self.correct.shape
        once = np.ones((1, images)), np.ones((1, seeds))
        return np.asarray(self.resampled(*once)[0])

    def resampled(self, images: Floats, seeds: Floats) -> Floats:
        """The points when images and seeds count as often as given, (resamples, ...): (resamples, settings, 2).

        Every resample draws equally many.
        """
        settings, S, N = self.correct.shape
        whole = np.floor(self.radius * STEPS)
        flat = np.stack([self.correct.astype(np.float64), whole], -1).transpose(0, 1, 3, 2).reshape(-1, N)
        sums = (flat @ images.T).reshape(settings, S, 2, len(images))
        total = np.einsum("psmb,bs->bpm", sums, seeds)
        return np.asarray(total / (seeds[0].sum() * N) / np.array([1.0, STEPS]))


def compare(challenger: Sweep, baseline: Sweep, constant: float, resamples: int = 1000) -> Comparison:
    """ACR at matched clean accuracy by the staircase rule, with a paired bootstrap over test images nested in seeds.

    A resample draws images, and seeds, with replacement, of these one fewer than there are (see
    :func:`certbench.stats.bootstrap.nest`); the draws are the same for all settings of both methods, which must have the
    same seeds and images. The largest ratio and the mean are taken inside the bootstrap. The
    baseline is never interpolated.

    Args:
        constant: the share of the commonest class, which is what a constant classifier has as ACR / cap.
    """
    ours, theirs = baseline.points(), challenger.points()
    kept = np.flatnonzero(ours[:, 1] > 0)
    observed = _ratios(theirs[None], ours[None])[:, kept]
    drawn = np.concatenate([
        _ratios(challenger.resampled(images, seeds), baseline.resampled(images, seeds))[:, kept]
        for images, seeds in _resamples(baseline.correct.shape[1:], resamples)
    ])  # fmt: skip
    reached, on_front, beyond = ~np.isnan(observed[0]), nondominated(ours)[kept], ours[kept, 1] > constant
    ratios = tuple(
        Ratio(
            setting=int(j),
            accuracy=float(ours[j, 0]),
            robustness=float(ours[j, 1]),
            ratio=_largest(observed[:, [k]], drawn[:, [k]]),
            hull=hull(theirs, float(ours[j, 0])) / float(ours[j, 1]),
            reached=bool(reached[k]),
            on_front=bool(on_front[k]),
            beyond_constant=bool(beyond[k]),
        )
        for k, j in enumerate(kept)
    )
    return Comparison(
        ratios,
        largest=_largest(observed, drawn) if len(kept) else None,
        on_front=_largest(observed[:, on_front], drawn[:, on_front]) if on_front.any() else None,
        beyond_constant=_largest(observed[:, beyond], drawn[:, beyond]) if beyond.any() else None,
        mean=_estimate(_mean(observed), _mean(drawn)) if reached.any() else None,
    )


def _ratios(challenger: Floats, baseline: Floats) -> Floats:
    """Staircase values over the baseline's, (resamples, baseline settings); NaN where no point is accurate enough.

    Equal ones have ratio 1, also where both are 0, as may happen in a resample.
    """
    reached = challenger[:, :, None, 0] >= baseline[:, None, :, 0]
    best = np.where(reached, challenger[:, :, None, 1], 0.0).max(1)
    both_none = (best == 0) & (baseline[..., 1] == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(both_none, 1.0, best / baseline[..., 1])
    return np.asarray(np.where(reached.any(1), ratios, np.nan))


def _largest(observed: Floats, drawn: Floats) -> Estimate:
    """The largest ratio of each line, one that is not reached counting 0."""
    return _estimate(*(np.where(np.isnan(ratios), 0.0, ratios).max(1) for ratios in (observed, drawn)))


def _mean(ratios: Floats) -> Floats:
    """The geometric mean of what is reached in each line, NaN where nothing is; 0 where one ratio is 0, whatever the others.

    Rounded to where no two mathematical libraries differ.
    """
    reached = ~np.isnan(ratios)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(np.where(reached & (ratios > 0), ratios, 1.0)).sum(1)
        means = np.exp(logarithms / reached.sum(1)).round(12)
    return np.asarray(np.where((ratios == 0).any(1), 0.0, means))


def _estimate(observed: Floats, drawn: Floats) -> Estimate:
    """With the middle 95 % of the resamples that have a value; nothing is known where none has one."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Estimate(float(observed[0]), 0.0, float("inf"))
    levels = [0.025, 0.975]
    low, high = np.quantile(drawn, levels, method="inverted_cdf")  # no interpolation: some are infinite
    return Estimate(float(observed[0]), float(low), float(high))


def _resamples(shape: tuple[int, ...], count: int) -> Iterator[tuple[Floats, Floats]]:
    """How often each image and each seed is drawn, (resamples, images) and (resamples, seeds), some at a time.

    The legacy generator's stream is frozen for good, so that tables can be rebuilt with any numpy.
    """
    seeds, images = shape
    source = np.random.RandomState(2307)
    for start in range(0, count, CHUNK):
        many = min(CHUNK, count - start)
        yield _draws(source, many, images, images), _draws(source, many, seeds, max(1, seeds - 1))


def _draws(source: np.random.RandomState, resamples: int, size: int, count: int) -> Floats:
    drawn = source.randint(0, size, (resamples, count)) + size * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size).astype(np.float64)
