"""Where each image stands, and when its draws stop: after a fixed number, or by what they have shown."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, fields
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from certbench.errors import RunError
from certbench.recipe import Smoothing
from certbench.smoothing.noise import BLOCK
from certbench.stats.evalue import anytime_lower_bound, log_e_above, log_e_below, threshold
from certbench.stats.smoothing import anytime_radius, probability_of, radius_of

Ints = NDArray[np.int64]

GIVE_UP = 0.01
"""Level at which a radius counts as out of reach. Giving up early costs accuracy, never soundness."""

REASONS = ("", "fixed", "decided", "tolerance", "budget")
"""Why draws ended: not yet; all were taken; every radius is decided; the radius is within tolerance; the draws that are
allowed cannot decide more."""
OPEN, FIXED, DECIDED, TOLERANCE, BUDGET = range(len(REASONS))

_HINT = "remove the run's .partial file to start again"


@dataclass
class Standing:
    """All that is known of each image, one array entry each.

    ``candidate``: the class under test, -1 before it is selected. ``counts`` (images, classes + 1): estimation draws by
    class. ``lower``: the largest lower bound on the candidate's probability so far; ``best_k``, ``best_n``: the counts
    that prove it. ``reached``: the place of the
    largest radius of the list that is certified, -1 for none; ``refuted``: that of the smallest one that the draws
    speak against; ``given_up``: the same, or one that the draws left cannot reach. ``reason``: a place in :data:`REASONS`.
    """

    candidate: Ints
    counts: Ints
    lower: NDArray[np.float64]
    best_k: Ints
    best_n: Ints
    reached: Ints
    refuted: Ints
    given_up: Ints
    reason: Ints

    @classmethod
    def new(cls, images: int, classes: int, radii: int) -> Standing:
        def full(value: int) -> Ints:
            return np.full(images, value, dtype=np.int64)

        counts = np.zeros((images, classes + 1), dtype=np.int64)
        return cls(
            full(-1),
            counts,
            np.zeros(images),
            full(0),
            full(0),
            full(-1),
            full(radii),
            full(radii),
            full(OPEN),
        )

    @property
    def n(self) -> Ints:
        """Estimation draws of each image."""
        return np.asarray(self.counts.sum(1), dtype=np.int64)

    def hits(self, rows: Ints) -> Ints:
        """Estimation draws that gave the class under test."""
        return np.asarray(self.counts[rows, self.candidate[rows]], dtype=np.int64)

    def prove(self, rows: Ints, k: Ints, n: Ints, lower: NDArray[np.float64]) -> None:
        """Keep a bound, and the counts behind it, where it is no smaller than the one before."""
        kept = lower >= self.lower[rows]
        rows = rows[kept]
        self.lower[rows], self.best_k[rows], self.best_n[rows] = lower[kept], k[kept], n[kept]

    def encode(self, key: str) -> bytes:
        """For the scratch file; ``key`` names the streams that the counts were drawn from."""
        buffer = io.BytesIO()
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez_compressed(buffer, key=np.array(key), **arrays)
        return buffer.getvalue()

    @classmethod
    def decode(cls, content: bytes, key: str, like: Standing) -> Standing | None:
        """What :meth:`encode` wrote, or None where it was drawn from other streams.

        Raises:
            RunError: it is damaged, or not about these images.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                if str(arrays["key"]) != key:
                    return None
                found = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise RunError(
                f"half-done certificates cannot be read ({type(error).__name__}); {_HINT}"
            ) from None
        for field in fields(cls):
            one, two = getattr(found, field.name), getattr(like, field.name)
            if one.shape != two.shape or one.dtype != two.dtype:
                raise RunError(f"half-done certificates are about other images; {_HINT}")
        return found


class Stopping(Protocol):
    """When to look at an image, and whether its draws end there."""

    def next_look(self, n: Ints) -> Ints:
        """The number of draws after which images with ``n`` of them are looked at again."""

    def look(self, standing: Standing, rows: Ints) -> None:
        """Note what the images ``rows`` have shown, and the reason where their draws end."""


@dataclass(frozen=True)
class FixedNumber:
    """All ``n`` draws; what is seen on the way changes nothing."""

    settings: Smoothing

    def next_look(self, n: Ints) -> Ints:
        return np.asarray(np.minimum(n + 100 * BLOCK, self.settings.n), dtype=np.int64)

    def look(self, standing: Standing, rows: Ints) -> None:
        finished = rows[standing.n[rows] >= self.settings.n]
        standing.reason[finished] = FIXED
        standing.best_k[finished], standing.best_n[finished] = standing.hits(finished), self.settings.n


class Sequential:
    """Draws end as soon as the recipe's goal is met, judged by bounds that hold after every draw."""

    def __init__(self, settings: Smoothing, sigma: float) -> None:
        self.settings, self.sigma = settings, sigma
        self._p0 = probability_of([float(radius) for radius in settings.radii], sigma)
        self._enough = threshold(settings.failure_probability)
        goals = {"radii": self._decide_radii, "tolerance": self._approach, "budget": self._improve}
        self._pursue = goals[settings.goal]

    def next_look(self, n: Ints) -> Ints:
        """The grid of looks: every 100 draws up to 4,000, then about every twentieth more. Part of the protocol."""
        step = BLOCK * np.maximum(1, n // (20 * BLOCK))
        return np.asarray(np.minimum(n + step, self.settings.n), dtype=np.int64)

    def look(self, standing: Standing, rows: Ints) -> None:
        reason = self._pursue(standing, rows)
        spent = standing.n[rows] >= self.settings.n
        reason[spent & (reason == OPEN)] = BUDGET
        standing.reason[rows] = reason
        self._improve(standing, rows[reason != OPEN])

    def _improve(self, standing: Standing, rows: Ints) -> Ints:
        """Keep the counts that prove most, which may be earlier ones."""
        k, n = standing.hits(rows), standing.n[rows]
        standing.prove(rows, k, n, anytime_lower_bound(k, n, self.settings.failure_probability))
        return np.full(len(rows), OPEN)

    def _approach(self, standing: Standing, rows: Ints) -> Ints:
        """Compare the radius with the one that all draws would give at the present share of hits."""
        reason = self._improve(standing, rows)
        k, n, most = standing.hits(rows), standing.n[rows], self.settings.n
        hoped = anytime_radius(np.floor(k * (most / n)), most, self.settings.failure_probability, self.sigma)
        reached = radius_of(standing.lower[rows], self.sigma)
        reason[(reached > 0) & (reached >= (1 - self.settings.tolerance) * hoped)] = TOLERANCE
        reason[(reached == 0) & (log_e_below(k, n, 0.5) >= threshold(GIVE_UP))] = DECIDED
        return reason

    def _decide_radii(self, standing: Standing, rows: Ints) -> Ints:
        """Look at the radii that are still open; draws end where none is left.

        An image is decided where its smallest uncertified radius is refuted, not where draws for it are too few.
        """
        places = np.arange(len(self._p0))
        is_open = (places > standing.reached[rows, None]) & (places < standing.given_up[rows, None])
        row, place = is_open.nonzero()
        hits, draws, most = standing.hits(rows), standing.n[rows], self.settings.n
        k, n, p0 = hits[row], draws[row], self._p0[place]
        certified = log_e_above(k, n, p0) >= self._enough
        refuted = log_e_below(k, n, p0) >= threshold(GIVE_UP)
        hopeless = log_e_above(k + most - n, most, p0) < self._enough  # even if all draws to come were hits
        np.maximum.at(standing.reached, rows[row[certified]], place[certified])
        np.minimum.at(standing.refuted, rows[row[refuted]], place[refuted])
        np.minimum.at(standing.given_up, rows[row[refuted | hopeless]], place[refuted | hopeless])
        has = standing.reached[rows] >= 0
        lower = np.where(has, self._p0[standing.reached[rows]], 0.0)
        better = lower > standing.lower[rows]
        standing.prove(rows[better], hits[better], draws[better], lower[better])
        reached = standing.reached[rows] + 1
        ended = np.where(standing.given_up[rows] <= reached, BUDGET, OPEN)
        return np.where(standing.refuted[rows] <= reached, DECIDED, ended)
