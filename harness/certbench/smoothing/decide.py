"""From counts to certificates: whose draws come next, when they are saved, and what a finished image's row says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from certbench.contract import Certificates, CertifyTask
from certbench.data.dataset import to_pixels
from certbench.errors import RunError
from certbench.recipe import Smoothing
from certbench.smoothing.noise import ExactNoise, GaussianNoise, Noise, Purpose, Streams
from certbench.smoothing.sampler import Sampler, Work
from certbench.smoothing.stopping import BUDGET, OPEN, REASONS, FixedNumber, Sequential, Standing, Stopping
from certbench.stats.smoothing import RADII, predicted_class, two_sided_radius

TURN_SECONDS = 2.0
"""Between two looks at the counts, about. Which draws a turn takes has no influence on any result."""
SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Smoother:
    """One of the core's smoothed certifiers.

    ``sequential``: draws stop by a rule, else all are taken. ``label``: the label itself is under test, else a class
    that is selected from draws of its own. ``two_sided``: the rivals' probabilities are bounded as well.
    """

    name: str
    summary: str
    sequential: bool = False
    label: bool = False
    two_sided: bool = False


def certify(smoother: Smoother, task: CertifyTask) -> Iterator[Certificates]:
    """Certificates of ``task.split`` in order (Cohen, Rosenfeld, Kolter 2019, CERTIFY), all at once at the end.

    Work that is half done is saved in ``task.scratch``; images that were decided before are not drawn for again.

    Raises:
        RunError: no image, a label or pixel that cannot be, or a network that cannot be smoothed.
        DataError: exact noise, and an image off the grid.
    """
    with sampler_of(task).running() as sampler:
        loop = _Loop(smoother, task, sampler)
        loop.run()
    yield loop.certificates()


def sampler_of(task: CertifyTask) -> Sampler:
    """The sampler of a task's network, images and settings."""
    settings = task.recipe.smoothing
    if not len(task.split):
        raise RunError("there is no image to certify")
    pixels = to_pixels(task.split.images, task.levels)
    index = task.start + task.stride * np.arange(len(task.split))
    outside = ((pixels < 0) | (pixels > 1)).flatten(1).any(1).nonzero()
    if len(outside):
        raise RunError(f"image {index[int(outside[0])]} has pixels outside [0, 1]")
    return Sampler(
        task.network,
        pixels,
        index,
        noise_of(task, pixels),
        settings.batch,
        task.recipe.certify.deploy,
        settings.compile,
    )


def noise_of(task: CertifyTask, pixels: Tensor) -> Noise:
    """The noise that the recipe asks for, on the device of ``pixels``."""
    streams = Streams(task.run_id, pixels.device)
    if not task.recipe.smoothing.exact_noise:
        return GaussianNoise(streams, task.recipe.sigma)
    ExactNoise.check(pixels, task.levels)
    return ExactNoise(streams, task.recipe.sigma, task.levels)


class _Loop:
    """Turns of draws for the images whose draws have not ended, earlier images first."""

    def __init__(self, smoother: Smoother, task: CertifyTask, sampler: Sampler) -> None:
        self.smoother, self.task, self.sampler = smoother, task, sampler
        self.settings: Smoothing = task.recipe.smoothing
        self.labels = task.split.labels.numpy(force=True)
        wrong = ((self.labels < 0) | (self.labels >= sampler.classes)).nonzero()[0]
        if len(wrong):
            image = task.start + task.stride * wrong[0]
            raise RunError(
                f"image {image} has label {self.labels[wrong[0]]}, but the network gives {sampler.classes} classes"
            )
        self.stopping: Stopping = (
            Sequential(self.settings, task.recipe.sigma)
            if smoother.sequential
            else FixedNumber(self.settings)
        )
        self.key = sampler.key
        fresh = Standing.new(len(self.labels), sampler.classes, len(self.settings.radii))
        if smoother.label:
            fresh.candidate[:] = self.labels
        saved = task.scratch.load()
        self.standing = (Standing.decode(saved, self.key, fresh) if saved else None) or fresh
        self.began, self.drawn = time.perf_counter(), 0

    def run(self) -> None:
        standing, per_turn = self.standing, self.settings.batch
        saved = time.perf_counter()
        if done := int((standing.reason != OPEN).sum()):
            self.task.reporter.say(f"resumed: {done} of {len(self.labels)} images are decided already")
        while (standing.reason == OPEN).any():
            began, before = time.perf_counter(), self.drawn
            self._turn(per_turn)
            self._report()
            now = time.perf_counter()
            rate = (self.drawn - before) / (now - began)
            per_turn = int(min(rate * TURN_SECONDS, 4 * per_turn)) + 1
            if now - saved > SAVE_SECONDS:
                self.task.scratch.save(standing.encode(self.key))
                saved = now
        if self.sampler.broken:
            self.task.reporter.say(
                f"{self.sampler.broken} of {self.drawn} draws gave NaN logits; they count as wrong"
            )

    def _turn(self, draws: int) -> None:
        """About so many draws, for the first open images up to the next look at each."""
        standing = self.standing
        works: list[Work] = []
        n = standing.n
        next_look = self.stopping.next_look(n)
        for image in np.flatnonzero(standing.reason == OPEN).tolist():
            if standing.candidate[image] < 0:
                works.append(Work(image, Purpose.SELECTION, 0, self.settings.n0))
            else:
                works.append(Work(image, Purpose.ESTIMATION, int(n[image]), int(next_look[image])))
            draws -= works[-1].stop - works[-1].start
            if draws <= 0:
                break
        counts = self.sampler.counts(works)
        self.drawn += sum(work.stop - work.start for work in works)
        images = np.array([work.image for work in works])
        selects = np.array([work.purpose is Purpose.SELECTION for work in works])
        standing.candidate[images[selects]] = counts[selects, :-1].argmax(1)
        looked_at = images[~selects]
        standing.counts[looked_at] += counts[~selects]
        self.stopping.look(standing, looked_at)

    def _report(self) -> None:
        done = self.standing.reason != OPEN
        draws = self._draws()
        rate = self.drawn / (time.perf_counter() - self.began)
        figures = {"draws/s": rate}
        if done.any():
            mean = float(draws[done].mean())
            left = np.maximum(mean - draws[~done], 0.0).sum() / rate
            figures |= {"mean draws": mean, "s left": left}
        self.task.reporter.advance(int(done.sum()), **figures)

    def _draws(self) -> np.ndarray:
        """Draws of each image, those that selected its class included."""
        selected = 0 if self.smoother.label else self.settings.n0
        return self.standing.n + np.where(self.standing.candidate >= 0, selected, 0)

    # Rows ----------------------------------------------------------------------------------------------------------

    def certificates(self) -> Certificates:
        standing, task, count = self.standing, self.task, len(self.labels)
        alpha, sigma = self.settings.failure_probability, task.recipe.sigma
        radius, proved_by = self._radii(alpha, sigma)
        right = standing.candidate == self.labels
        verdict = np.full(count, "abstain", dtype=object)
        verdict[standing.reason == BUDGET] = "unknown"
        verdict[(radius > 0) & right] = "certified"
        verdict[(radius > 0) & ~right] = "misclassified"
        proved_by[radius == 0] = ""
        return Certificates(
            index=(task.start + task.stride * np.arange(count)).astype(np.int32),
            prediction=standing.candidate,
            verdict=verdict,
            radius=np.where(right, radius, 0.0),
            margin=np.full(count, np.nan),
            proved_by=proved_by,
            passes=np.zeros(count, dtype=np.int32),
            guarantee="statistical",
            deploy=task.recipe.certify.deploy,
            columns={
                "sigma": np.full(count, sigma),
                "alpha": np.full(count, alpha),
                "n0": np.full(count, 0 if self.smoother.label else self.settings.n0),
                "n": standing.best_n,
                "k": standing.best_k,
                "draws": self._draws(),
                "stop_reason": np.array([REASONS[code] for code in standing.reason], dtype=object),
                "generator_key": np.full(count, self.key, dtype=object),
                "exact_noise": np.full(count, self.settings.exact_noise),
            },
        )

    def _radii(self, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """The radius of each image's class under test, and by what it is proved."""
        standing = self.standing
        k, n = standing.best_k, standing.best_n
        if not self.smoother.two_sided:
            bound = "mixture e-value" if self.smoother.sequential else "clopper-pearson"
            return RADII[self.smoother.name](k, n, alpha, sigma), np.full(len(k), bound, dtype=object)
        others = standing.counts.copy()
        np.put_along_axis(others, standing.candidate[:, None], -1, 1)
        rival, rivals = others.max(1), self.sampler.classes  # draws without a class are one more rival
        how = np.array([f"clopper-pearson; rival {count} of {rivals}" for count in rival], dtype=object)
        return two_sided_radius(k, n, alpha, sigma, rival, rivals), how


def predict(task: CertifyTask, n: int) -> np.ndarray:
    """PREDICT: the smoothed network's class for each image from ``n`` draws, -1 to abstain.

    A class that is returned differs from the smoothed network's with probability at most the recipe's
    ``failure_probability``.
    """
    with sampler_of(task).running() as sampler:
        counts = sampler.counts([Work(i, Purpose.PREDICTION, 0, n) for i in range(len(task.split))])
    return predicted_class(counts[:, :-1], task.recipe.smoothing.failure_probability)
