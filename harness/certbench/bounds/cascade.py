"""A batch of images on its way through a cascade of bounds.

A cascade is a sequence of bounds, cheapest first. Each one sees only the images that those before it left open: at the
recipe's radius the correctly classified ones without a proof, in the radius search those not proved at the cap. A bound
may leave the search to the others, which for one that is not monotone and dear spares most of its cost.
``proved_by`` names the bound that proved the verdict. Where another one proved the radius that is reported, it follows
after a semicolon: ``ibp; radius crown``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from certbench.bounds.graph import Graph
from certbench.bounds.radius import MarginFunction, search_radii
from certbench.contract import Certificates, CertifyTask, Guarantee
from certbench.data.dataset import to_pixels
from certbench.errors import RunError
from certbench.recipe import VERDICT_ONLY
from certbench.threat import round_down, round_up

Margins = Callable[..., Tensor]
"""(graph, images, one radius each, labels) -> lower bounds of ``z_y - z_j`` over the balls around the images,
intersected with [0, 1], shape (batch, classes - 1); with a :class:`Precision` as a fifth argument, for every
evaluation at that deployment."""


@dataclass(frozen=True)
class Bound:
    """One way to bound margins, as certifiers use it.

    Args:
        margins: see :data:`Margins`.
        monotone: whether the bounds never increase with the radius; if not, the radius search scans first.
        chunk: images per pass. Part of the protocol: the shape of a batch decides the last bits of its results.
        tolerance: width of the final bracket of a radius, as a share of the cap.
        settings: whatever else its results depend on.
        guarantee: what a positive margin proves; ``deploy``: for which arithmetic, where it is ``float_sound``.
        searches: whether it takes part in the search for radii, or decides at the recipe's radius only.
    """

    name: str
    summary: str
    margins: Margins
    monotone: bool
    chunk: int
    tolerance: float
    settings: Mapping[str, object] = field(default_factory=dict)
    guarantee: Guarantee = "real_arith"
    deploy: str = "float32"
    searches: bool = True

    @property
    def part(self) -> str:
        """How a cascade names it."""
        return self.name if self.searches else f"{self.name}{VERDICT_ONLY}"

    def describe(self) -> dict[str, object]:
        """All that results depend on, for the digest of a row's settings."""
        return {
            "bound": self.name,
            "tolerance": self.tolerance,
            "monotone": self.monotone,
            "guarantee": self.guarantee,
            **({} if self.searches else {"searches": False}),
            **self.settings,
        }


def all_sound(bounds: Sequence[Bound]) -> bool:
    return all(bound.guarantee == "float_sound" for bound in bounds)


class Chunk:
    """Some images of a task, and what has been proved of each.

    Per image, shape (batch,): ``margin``: the best bound at the recipe's radius; ``verdict_by``: which bound proved it
    there, or -1; ``radius``: the largest proved one so far; ``radius_by``: by which bound, or -1; ``broken``: nothing
    can be said of it.
    """

    def __init__(
        self,
        bounds: Sequence[Bound],
        task: CertifyTask,
        graph: Graph,
        evaluate: Callable[[Tensor], Tensor],
        start: int,
        stop: int,
    ) -> None:
        self.bounds, self.task, self.graph, self.first = bounds, task, graph, task.start + start
        self.evaluate = evaluate
        part = task.split.slice(start, stop)
        images = to_pixels(part.images, task.levels, torch.float64)
        valid = ((images >= 0) & (images <= 1)).flatten(1).all(1)
        self.images = torch.where(valid.view(-1, 1, 1, 1), images, 0.0)
        self.logits = self._logits()
        classes = self.logits.shape[1]
        valid &= (part.labels >= 0) & (part.labels < classes)
        self.labels = torch.where(valid, part.labels, 0)
        self.broken = ~(valid & self.logits.isfinite().all(1))
        self.prediction = self.logits.argmax(1)
        self.correct = self.prediction == self.labels
        self.margin = torch.full_like(self.logits[:, 0], -torch.inf)
        self.radius = torch.zeros_like(self.margin)
        self.verdict_by = torch.full_like(self.labels, -1)
        self.radius_by = torch.full_like(self.labels, -1)
        self.passes = torch.zeros_like(self.labels, dtype=torch.int32)

    def certificates(self) -> Certificates:
        with torch.no_grad():
            at_radius = [self._decide(k) for k in range(len(self.bounds))]
            for k, bound in enumerate(self.bounds):
                if bound.searches:
                    self._extend(k, at_radius[k])
        return self._columns()

    def failure(self) -> Certificates:
        """Verdict ``error`` for all."""
        self.broken[:] = True
        return self._columns()

    def _logits(self) -> Tensor:
        with torch.no_grad():
            logits = self.evaluate(self.images)
        if logits.ndim != 2 or len(logits) != len(self.images) or logits.shape[1] < 2:
            raise RunError(
                f"{type(self.task.network).__name__} returns shape {tuple(logits.shape)} for {len(self.images)} "
                "images; it must return logits of shape (batch, classes) with two classes or more"
            )
        return logits

    def _margins(self, k: int) -> MarginFunction:
        """Smallest margin of some images at one radius each, by bound k; NaN is kept, so it proves nothing."""

        def margins(which: Tensor, eps: Tensor) -> Tensor:
            return self.bounds[k].margins(self.graph, self.images[which], eps, self.labels[which]).amin(1)

        return margins

    def _decide(self, k: int) -> Tensor:
        """Bound k at the recipe's radius on what is open; its margins, NaN where it was not asked."""
        result = torch.full_like(self.margin, torch.nan)
        asked = ~self.broken & (self.verdict_by < 0)
        if k:  # the first one is asked for wrong images too, whose margin is worth recording
            asked &= self.correct
        which = asked.nonzero().squeeze(1)
        if len(which):
            radius = round_up(self.task.radius)
            found = self._margins(k)(which, torch.full_like(self.margin[which], radius))
            self.passes[which] += 1
            sound = self.bounds[k].guarantee == "float_sound"  # where a number may overflow, it is -inf
            if not sound:
                self.broken[which] = ~found.isfinite()
            self.margin[which] = self.margin[which].maximum(found)
            result[which] = found
            if sound and ((found > 0) & ~self.correct[which]).any():
                raise RunError(
                    "a float-sound proof is contradicted by an evaluation of the network: a bound is wrong"
                )
            proved = which[(found > 0) & self.correct[which]]
            self.verdict_by[proved] = self.radius_by[proved] = k
            self.radius[proved] = radius
        return result

    def _extend(self, k: int, at_radius: Tensor) -> None:
        """Search larger radii by bound k for the images not proved at the cap yet."""
        own = self.logits.gather(1, self.labels[:, None]).squeeze(1)
        clean = own - self.logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
        cap = round_up(self.task.cap)
        open_ = self.correct & ~self.broken & (clean > 0) & (self.radius < cap)
        if self.bounds[k].monotone:  # what it failed to prove there, it cannot prove further out
            open_ &= ~((at_radius <= 0) & (self.radius >= round_up(self.task.radius)))
        which = open_.nonzero().squeeze(1)
        if not len(which):
            return
        low, radius, margins = self.radius[which], round_up(self.task.radius), self._margins(k)
        own_low = torch.where(self.radius_by[which] == k, at_radius[which], torch.nan)
        found, passes = search_radii(
            lambda some, eps: margins(which[some], eps),
            low=low,
            margin_low=torch.where(low > 0, own_low, clean[which]),
            radius=radius,
            margin_radius=at_radius[which],
            cap=cap,
            tolerance=self.bounds[k].tolerance * cap,
            monotone=self.bounds[k].monotone,
        )
        self.passes[which] += passes
        better = found > low
        self.radius[which] = found
        self.radius_by[which[better]] = k
        self._settle(which[better & (self.verdict_by[which] < 0) & (found >= radius)], k)

    def _settle(self, which: Tensor, k: int) -> None:
        """A proof on a larger ball covers the recipe's, where a bound that is not monotone may have failed."""
        if len(which):
            found = self._margins(k)(which, self.radius[which])
            # It was positive when it was proved; in a batch of another shape its last bit may round to 0.
            self.margin[which] = torch.where(found > 0, found, torch.finfo(found.dtype).tiny)
            self.passes[which] += 1
            self.verdict_by[which] = k

    def _columns(self) -> Certificates:
        proved = (self.verdict_by >= 0) & ~self.broken
        verdict = np.full(len(self.labels), "unknown", dtype=object)
        verdict[proved.numpy(force=True)] = "certified"
        verdict[(~self.correct).numpy(force=True)] = "misclassified"
        verdict[self.broken.numpy(force=True)] = "error"
        radius = self.radius.clamp_max(round_down(self.task.cap))
        return Certificates(
            index=np.arange(self.first, self.first + len(self.labels), dtype=np.int32),
            prediction=self.prediction.numpy(force=True),
            verdict=verdict,
            radius=torch.where(self.broken, torch.nan, radius).numpy(force=True),
            margin=torch.where(self.broken | self.margin.isinf(), torch.nan, self.margin).numpy(force=True),
            proved_by=np.array([self._proved_by(i) for i in range(len(self.labels))], dtype=object),
            passes=self.passes.numpy(force=True),
            guarantee="float_sound" if all_sound(self.bounds) else "real_arith",  # a cascade's weakest
            deploy=self.bounds[0].deploy,
        )

    def _proved_by(self, i: int) -> str:
        if self.broken[i] or self.radius_by[i] < 0:
            return ""
        verdict, radius = (int(by[i]) for by in (self.verdict_by, self.radius_by))
        name = self.bounds[radius].name
        return name if verdict in (-1, radius) else f"{self.bounds[verdict].name}; radius {name}"
