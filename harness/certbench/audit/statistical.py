"""The audit of statistical certificates: fresh draws at the image, and an attack on the smoothed classifier.

A witness against a smoothed classifier is itself found by sampling. So whatever was chosen (the point, the rival class)
is fixed before the draws that test it, and every test has the level alpha over the number of tests: an audit of sound
certificates refutes one with probability alpha at most. Noise comes from streams of the audit's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor, nn

from certbench.audit.certificates import Audit, _one_thread_each
from certbench.audit.registry import SmoothedAttack
from certbench.contract import Outcome
from certbench.data.dataset import Split, to_pixels
from certbench.errors import RunError
from certbench.seeding import derive_seed
from certbench.stats.binomial import upper_bound

CHUNK = 20
"""Images that are audited together; with :data:`DRAWS` of each, the shape of a batch."""
DRAWS = 20
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_INSIDE = 1 - 1e-6
"""Witnesses stay this far inside the open ball, so that rounding cannot carry them out of it."""


@dataclass(frozen=True)
class SmoothedAuditTask:
    """Statistical certificates of one network, one array entry each, and how to attack them.

    ``split`` holds all images that ``index`` points into. ``radius`` is what is claimed for each image, 0 where nothing
    is. ``one_sided``: the claim is that the label has probability Phi(radius / sigma) or more at the image, which fresh
    draws can refute. ``exact_noise``: the classifier sees noisy images rounded to multiples of 1 / ``levels``.
    """

    network: nn.Module
    split: Split
    levels: int
    index: np.ndarray
    radius: np.ndarray
    sigma: float
    alpha: float
    one_sided: bool
    exact_noise: bool
    deploy: str
    attack: SmoothedAttack
    seed: int
    device: torch.device
    begin: Callable[[int], None] = lambda images: None
    progress: Callable[[int], None] = lambda done: None


def audit_smoothed(task: SmoothedAuditTask) -> Audit:
    """Audit at most ``task.attack.images`` certificates, evenly spread over those that claim a radius.

    Rows come in two kinds: ``recount`` at the image itself, ``certified_radius`` for the attack.

    Raises:
        RunError: a label that the network does not have, or a precision that it cannot be run in.
    """
    if task.deploy not in DTYPES:
        raise RunError(f"a smoothed network deployed in {task.deploy} cannot be audited here")
    claimed = np.flatnonzero(task.radius > 0)
    if len(claimed) > task.attack.images:
        claimed = claimed[np.linspace(0, len(claimed) - 1, task.attack.images).round().astype(int)]
    starts = range(0, len(claimed), CHUNK)
    level = task.alpha / max(1, 2 * len(claimed))
    network = copy.deepcopy(task.network).to(task.device, DTYPES[task.deploy]).eval().requires_grad_(False)

    def work(start: int) -> dict[str, np.ndarray]:
        return _Chunk(task, network, claimed[start : start + CHUNK], start // CHUNK).rows(level)

    task.begin(len(claimed))
    parts = []
    with _one_thread_each(task.device) as workers:
        for part in workers.map(work, starts):
            parts.append(part)
            task.progress(sum(len(p["index"]) for p in parts) // 2)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    return Audit(columns, "")


class _Chunk:
    """A few images on their way through the audit; all per image, shape (batch,)."""

    def __init__(self, task: SmoothedAuditTask, network: nn.Module, places: np.ndarray, number: int) -> None:
        self.task, self.network = task, network
        self.index = task.index[places]
        where = torch.from_numpy(self.index.astype(np.int64))
        self.images = to_pixels(task.split.images[where], task.levels).to(task.device)
        self.labels = task.split.labels[where].to(task.device)
        self.radius = torch.from_numpy(task.radius[places].copy()).to(task.device)
        seed = derive_seed(task.seed, "audit-smoothed", task.attack.name, number)
        self.generator = torch.Generator(task.device).manual_seed(seed)

    def rows(self, level: float) -> dict[str, np.ndarray]:
        attack = self.task.attack
        recounted = self._recount(attack.recount, level)
        witness = self._attack()
        # Chosen on draws of its own, tested on others.
        rival = self._without_label(self._counts(witness, attack.selection)).argmax(1)
        flipped = self._is_flipped(self._counts(witness, attack.test), rival, level)
        far = (witness - self.images).double().flatten(1).norm(dim=1).numpy(force=True)
        found = np.stack([flipped, recounted == "refuted"], 1)
        distance = np.where(found, np.stack([np.nextafter(far, np.inf), np.zeros_like(far)], 1), np.nan)
        names = np.array(["certified_radius", "recount"], dtype=object)
        outcome = np.stack([np.where(flipped, "refuted", "held").astype(object), recounted], 1)
        return {
            "index": self.index.repeat(2),
            "kind": np.tile(names, len(self.index)),
            "ball_radius": self.radius.numpy(force=True).repeat(2),
            "found": found.ravel(),
            "distance": distance.ravel(),
            "outcome": outcome.ravel(),
        }

    def _recount(self, draws: int, level: float) -> np.ndarray:
        """Whether fresh draws at the image leave room for the probability that the certificate claims."""
        found: np.ndarray = np.full(len(self.index), "held", dtype=object)
        if not self.task.one_sided:
            not_tested: Outcome = "not_attacked"
            found[:] = not_tested
            return found
        counts = self._counts(self.images, draws)
        hits = counts.gather(1, self.labels[:, None]).squeeze(1).numpy(force=True)
        claimed = special.ndtr(self.radius.numpy(force=True) / self.task.sigma)
        found[upper_bound(hits, draws, level) < claimed] = "refuted"
        return found

    def _attack(self) -> Tensor:
        """Ascent on ``-log mean softmax`` of the label, by normalised steps, projected to the ball."""
        attack = self.task.attack
        point, length = self.images.clone(), self.radius.float().view(-1, 1, 1, 1)
        for _ in range(attack.steps):
            point.requires_grad_()
            share = self._logits(point, attack.samples).softmax(2).mean(1)
            loss = -share.gather(1, self.labels[:, None]).clamp_min(1e-20).log().sum()
            (slope,) = torch.autograd.grad(loss, point)
            step = slope / (slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-12)
            moved = point.detach() + step * length * (attack.reach / attack.steps) - self.images
            norm = moved.double().flatten(1).norm(dim=1)
            inside = (self.radius * _INSIDE / norm.clamp_min(1e-30)).clamp_max(1.0).float()
            point = self.images + moved * inside.view(-1, 1, 1, 1)
        return point

    def _is_flipped(self, counts: Tensor, rival: Tensor, level: float) -> np.ndarray:
        """Whether the rival beats the label in a one-sided test of the two counts at 1/2."""
        own = counts.gather(1, self.labels[:, None]).squeeze(1).numpy(force=True)
        other = counts.gather(1, rival[:, None]).squeeze(1).numpy(force=True)
        flipped: np.ndarray = stats.binom.sf(other - 1, own + other, 0.5) <= level
        return flipped & (other > own)

    def _without_label(self, counts: Tensor) -> Tensor:
        return counts.scatter(1, self.labels[:, None], -1)

    def _counts(self, points: Tensor, draws: int) -> Tensor:
        """Class counts of noisy copies, shape (batch, classes); a draw with NaN logits counts for no class."""
        total: Tensor | None = None
        with torch.no_grad():
            for some in _parts(draws):
                logits = self._logits(points, some)
                classes = logits.shape[2]
                if int(self.labels.max()) >= classes:
                    raise RunError(
                        f"label {int(self.labels.max())} does not fit a network of {classes} classes"
                    )
                named = torch.where(logits.isnan().any(2), classes, logits.argmax(2))
                counts = nn.functional.one_hot(named, classes + 1).sum(1)[:, :classes]
                total = counts if total is None else total + counts
        assert total is not None, "an attack takes at least one draw"
        return total

    def _logits(self, points: Tensor, draws: int) -> Tensor:
        """Logits of noisy copies, shape (batch, draws, classes)."""
        shape = (len(points), draws, *points.shape[1:])
        noise = torch.randn(shape, generator=self.generator, device=points.device)
        noisy = points[:, None] + self.task.sigma * noise
        if self.task.exact_noise:
            reach = max(1, int(6 * self.task.sigma))
            levels = self.task.levels
            rounded = (noisy.detach().clamp(-reach, reach + 1) * levels).round() / levels
            noisy = (
                noisy + (rounded - noisy).detach()
            )  # the attack's gradient passes the rounding as if it were none
        logits: Tensor = self.network(noisy.flatten(0, 1).to(DTYPES[self.task.deploy]))
        return logits.float().view(len(points), draws, -1)


def _parts(draws: int) -> Iterator[int]:
    """As many draws as fit a batch at a time."""
    for first in range(0, draws, DRAWS):
        yield min(DRAWS, draws - first)
