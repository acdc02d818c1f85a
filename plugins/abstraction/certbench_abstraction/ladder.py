"""From cells to certificates: each step is asked about the images that those before left open.

    wrong                   the deployed classifier errs on the image itself                      misclassified
    single-cell             no pixel can leave its interval: the image itself is all there is      certified
    cell-ibp                coupled interval bounds over the reachable cells                       certified
    cell-attack             a reachable abstract input that is misclassified, shown on pixels      falsified
    crown-ibp, zonotope ... linear bounds over the same cells (real arithmetic only)               certified
    enumeration             every reachable abstract input, where they are few                     certified or falsified
    branching               halving the cells of one pixel after another, within limits            certified or falsified

Interval bounds come before the attack because they cost less; a proof and a witness exclude each other, so the order
changes no verdict. Under a float-sound guarantee interval bounds, enumeration and branching cover the round-off of
every admitted evaluation; an image whose margin is smaller than that stays unknown.

A radius is searched for with the same bounds and then raised to the end of its cells, up to which the ball reaches no
other abstract input, until the bounds fail at the next float beyond it. For bounds that are monotone, as these are, it is
exactly the largest radius that they prove.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from certbench.audit.ball import ball
from certbench.bounds.decide import check_network, one_thread_each
from certbench.bounds.precision import find_precision
from certbench.bounds.radius import search_radii
from certbench.contract import Certificates, CertifyTask
from certbench.data.dataset import to_pixels
from certbench.errors import RunError, UsageError
from certbench.models.fold import deployed_network
from certbench.models.kernels import plain_kernels
from certbench.seeding import derive_seed
from certbench.threat import round_down, round_up
from certbench_abstraction.attack import cell_attack
from certbench_abstraction.bounds import CellBounds, smallest_margin
from certbench_abstraction.cells import TAU, Cells, on_grid, pixels_of, radius_until_change, reachable
from certbench_abstraction.complete import branch, enumerate_cells
from certbench_abstraction.layer import Abstraction
from certbench_abstraction.settings import Ladder

CHUNK = 250
"""Images at a time, where they are small."""
CHUNK_ENTRIES = CHUNK * 3072
"""Pixels at a time, where they are not."""
TOLERANCE = 2.0**-10
"""Width of the final bracket of a radius, as a share of the cap; the cells' own end is found exactly after it."""


def certify_cells(task: CertifyTask) -> Iterator[Certificates]:
    """Certificates of ``task.split`` in order, in batches.

    Raises:
        RunError: no image, a network in training mode or with weights that are not finite, or a proof that an
            evaluation contradicts.
        UsageError: the network cannot be traced, has no rule for an operation, or is to be certified for float16 or
            bfloat16, which would store rounded pixels.
    """
    if not len(task.split):
        raise RunError("there is no image to certify")
    check_network(task.network)
    ladder = CellLadder(deployed_network(task.network), task)
    size = max(1, min(CHUNK, CHUNK_ENTRIES // task.split.images[0].numel()))
    starts = range(0, len(task.split), size)

    def chunk(start: int) -> Certificates:
        part = task.split.slice(start, start + size)
        pixels = to_pixels(part.images, task.levels)
        return Chunk(ladder, pixels, part.labels, task.start + start).certificates()

    with plain_kernels(), one_thread_each(task.device) as workers:
        yield from workers.map(chunk, starts)


class CellLadder:
    """What all chunks share: the deployed classifier, its bounds, and the settings."""

    def __init__(self, deployed: nn.Module, task: CertifyTask) -> None:
        self.task = task
        self.settings: Ladder = task.settings.ladder
        self.sound = task.recipe.certify.guarantee == "float_sound"
        self.deploy = task.recipe.certify.deploy
        precision = find_precision(self.deploy) if self.sound else None
        if precision is not None and precision.storage:
            raise UsageError(
                f"intervals of pixels stored in {self.deploy} are not those of the images; certify for float32, "
                "float64 or tf32"
            )
        shape = tuple(task.split.images.shape[1:])
        assert isinstance(deployed, nn.Sequential)  # what build_classifier returns
        assert isinstance(deployed[0], Abstraction)
        self.network, self.abstraction = deployed, deployed[0]
        self.bounds = CellBounds(deployed, shape, precision)
        self.double = copy.deepcopy(deployed).double()
        self.linear = () if self.sound else self.settings.linear

    def evaluate(self, images: Tensor) -> Tensor:
        """Logits, float64, that predictions are made from and witnesses confirmed by, for float32 images."""
        with torch.no_grad():
            if self.sound and self.deploy != "float64":
                return self.network(images).double()
            return self.double(images.double())


class Chunk:
    """A batch of images on its way through the ladder; every attribute has one entry per image.

    Args:
        pixels: float32, (batch, C, H, W), any number in [0, 1]; labels: (batch,).
        first: the index of the first image.
    """

    def __init__(self, ladder: CellLadder, pixels: Tensor, labels: Tensor, first: int) -> None:
        self.ladder, self.first = ladder, first
        task = ladder.task
        valid = ((pixels >= 0) & (pixels <= 1)).flatten(1).all(1)
        self.pixels = torch.where(valid.view(-1, 1, 1, 1), pixels, 0.0)
        self.images = self.pixels.double()
        self.logits = ladder.evaluate(self.pixels)
        valid &= (labels >= 0) & (labels < self.logits.shape[1])
        self.labels = torch.where(valid, labels, 0)
        self.broken = ~(valid & self.logits.isfinite().all(1))
        self.prediction = self.logits.argmax(1)
        self.correct = (self.prediction == self.labels) & ~self.broken
        # Images off the grid come from a computation, which another machine may round differently.
        self.tau = torch.where(on_grid(self.images, task.levels), 0.0, TAU).double()
        self.eps = torch.full_like(self.tau, round_up(task.radius))
        self.cells = self.reach(torch.arange(len(labels), device=self.tau.device), self.eps)
        self.verdict = np.full(len(labels), "unknown", dtype=object)
        self.proved_by = np.full(len(labels), "", dtype=object)
        self.radius_by = np.full(len(labels), "", dtype=object)
        self.margin = torch.full_like(self.tau, -torch.inf)
        self.radius = torch.zeros_like(self.tau)
        self.passes = torch.ones_like(self.labels)
        self.enumerated = torch.zeros_like(self.labels)

    def reach(self, which: Tensor, eps: Tensor) -> Cells:
        return reachable(self.images[which], eps + self.tau[which], self.ladder.abstraction)

    def certificates(self) -> Certificates:
        self.verdict[(~self.correct).numpy(force=True)] = "misclassified"
        self.verdict[self.broken.numpy(force=True)] = "error"
        with torch.no_grad():
            for step in (self.interval, self.attack, self.linear, self.enumeration, self.branching):
                which = self.open()
                if len(which):
                    step(which)
            self.extend()
        return self.columns()

    def open(self) -> Tensor:
        """Correct images without a verdict, as indices."""
        undecided = torch.from_numpy(self.verdict == "unknown").to(self.correct.device)
        return (self.correct & undecided).nonzero().squeeze(1)

    # Steps ---------------------------------------------------------------------------------------------------------

    def interval(self, which: Tensor) -> None:
        self.passes[which] += 1
        cells = self.cells[which]
        self.prove(which, self.ladder.bounds.interval(cells, self.labels[which]), interval_names(cells))

    def attack(self, which: Tensor) -> None:
        settings, seed = self.ladder.settings, self.ladder.task.recipe.seed
        generator = torch.Generator().manual_seed(derive_seed(seed, "cell-attack", self.first))
        found, k, passes = cell_attack(
            self.ladder.network,
            self.ladder.abstraction.index(self.pixels[which]),
            self.cells[which],
            self.labels[which],
            settings.attack_steps,
            settings.attack_restarts,
            generator,
        )
        self.passes[which] += passes
        self.falsify(which[found], k[found], "cell-attack")

    def linear(self, which: Tensor) -> None:
        for kind in self.ladder.linear:
            self.passes[which] += 1
            self.prove(which, self.ladder.bounds.linear(self.cells[which], self.labels[which], kind), kind)
            which = self.open()
            if not len(which):
                return

    def enumeration(self, which: Tensor) -> None:
        which = which[self.cells[which].count <= self.ladder.settings.cap]
        if len(which):
            result = enumerate_cells(self.ladder.bounds, self.cells[which], self.labels[which])
            self.passes[which] += result.evaluated
            self.enumerated[which] += result.evaluated
            self.prove(which, result.margin, "enumeration")
            failed = ~(result.margin > 0)
            self.falsify(which[failed], result.worst[failed], "enumeration")

    def branching(self, which: Tensor) -> None:
        settings = self.ladder.settings
        if not settings.branch_passes:
            return
        for image in which.split(1):
            found = branch(
                self.ladder.bounds,
                self.cells[image],
                self.labels[image],
                settings.branch_passes,
                settings.branch_seconds,
            )
            self.passes[image] += found.passes
            if found.margin is not None:
                self.prove(image, self.margin.new_tensor([found.margin]), "branching")
            elif found.worst is not None:
                self.falsify(image, found.worst, "branching")

    # Verdicts ------------------------------------------------------------------------------------------------------

    def prove(self, which: Tensor, margins: Tensor, step: str | np.ndarray) -> None:
        """Note margins at the recipe's radius; positive ones are proofs, by one step or one each."""
        margins = margins.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        self.margin[which] = self.margin[which].maximum(margins)
        proved = which[margins > 0]
        self.radius[proved] = self.eps[proved]
        places = proved.numpy(force=True)
        names = step if isinstance(step, str) else step[(margins > 0).numpy(force=True)]
        self.verdict[places], self.proved_by[places], self.radius_by[places] = "certified", names, names

    def falsify(self, which: Tensor, k: Tensor, step: str) -> None:
        """Turn misclassified abstract inputs into pixels; those that hold there, inside the ball, are witnesses."""
        if not len(which):
            return
        radius = torch.full_like(self.eps[which], round_down(self.ladder.task.radius))
        inside = ball(self.pixels[which], radius)
        witness = inside.project(pixels_of(k, self.pixels[which], self.ladder.abstraction))
        holds = ~(smallest_margin(self.ladder.evaluate(witness), self.labels[which]) > 0)
        self.passes[which] += 1
        places = which[holds].numpy(force=True)
        if (self.verdict[places] == "certified").any():
            raise RunError("a proof is contradicted by an evaluation of the network: a bound is wrong")
        self.verdict[places], self.proved_by[places] = "falsified", step

    # Radii ---------------------------------------------------------------------------------------------------------

    def extend(self) -> None:
        """The largest radius that the bounds prove for each correct image, up to the cap."""
        cap, radius = round_up(self.ladder.task.cap), round_up(self.ladder.task.radius)
        which = self.stay_in_cell(self.correct.nonzero().squeeze(1), cap)
        which = which[self.radius[which] < cap]
        if not len(which):
            return
        low, margin = self.radius[which], self.margin[which]
        open_ = low < radius
        found, passes = search_radii(
            lambda some, eps: self.proof(which[some], eps),
            low=low,
            margin_low=torch.full_like(low, torch.nan),
            radius=radius,
            margin_radius=torch.where(open_, torch.where(margin.isinf(), -1.0, margin), torch.nan),
            cap=cap,
            tolerance=TOLERANCE * cap,
            monotone=True,
        )
        self.passes[which] += passes
        self.radius[which] = found
        below = torch.nextafter(self.eps[which], torch.zeros_like(found))
        self.climb(which, torch.where(open_, below, cap))

    def stay_in_cell(self, which: Tensor, cap: float) -> Tensor:
        """Prove the radius up to which no pixel leaves its interval, where it is not proved yet; returns what stands.

        It is 0 where a pixel lies on a border, and then worth a proof too: of the image alone.
        """
        own = self.reach(which, torch.zeros_like(self.eps[which]))
        radius = self.until_change(which, own).clamp_max(cap)
        more = self.radius[which] <= radius
        asked, radius = which[more], radius[more]
        if len(asked):
            proved = self.proof(asked, radius) > 0
            self.passes[asked] += 1
            self.radius[asked[proved]] = radius[proved]
            more[more.clone()] = ~proved  # neither this nor a larger radius stands
        return which[~more | (self.radius[which] > 0)]

    def climb(self, which: Tensor, limit: Tensor) -> None:
        """Raise proved radii to the end of their cells, and on as long as the next float beyond is proved too."""
        while len(which):
            cells = self.reach(which, self.radius[which])
            end = self.until_change(which, cells).maximum(self.radius[which]).minimum(limit)
            self.radius[which] = end
            beyond = torch.nextafter(end, torch.full_like(end, torch.inf))
            inside = beyond <= limit
            which, limit, beyond = which[inside], limit[inside], beyond[inside]
            if len(which):
                self.passes[which] += 1
                proved = self.proof(which, beyond) > 0
                which, limit, beyond = which[proved], limit[proved], beyond[proved]
                self.radius[which] = beyond

    def until_change(self, which: Tensor, cells: Cells) -> Tensor:
        """The largest radius at which the ball reaches no more than ``cells``; for images off the grid a little less."""
        end = radius_until_change(self.images[which], cells, self.ladder.abstraction)
        return (end - 2 * self.tau[which]).clamp_min(0.0)

    def proof(self, which: Tensor, eps: Tensor) -> Tensor:
        """Margins at one radius each, by interval bounds, or by enumeration where these fail and cells are few."""
        cells, labels = self.reach(which, eps), self.labels[which]
        margins = self.ladder.bounds.interval(cells, labels)
        few = (~(margins > 0) & (cells.count <= self.ladder.settings.search_cap)).nonzero().squeeze(1)
        step = interval_names(cells)
        if len(few):
            result = enumerate_cells(self.ladder.bounds, cells[few], labels[few])
            self.passes[which[few]] += result.evaluated
            self.enumerated[which[few]] += result.evaluated
            margins[few] = result.margin
            step[few.numpy(force=True)] = "enumeration"
        proved = (margins > 0).numpy(force=True)
        self.radius_by[which.numpy(force=True)[proved]] = step[proved]
        return margins

    # Rows ----------------------------------------------------------------------------------------------------------

    def columns(self) -> Certificates:
        task = self.ladder.task
        unknown = self.broken | self.margin.isinf()
        radius_by = np.where((self.radius > 0).numpy(force=True), self.radius_by, "")
        return Certificates(
            index=np.arange(self.first, self.first + len(self.labels), dtype=np.int32),
            prediction=self.prediction.numpy(force=True),
            verdict=self.verdict,
            radius=torch.where(self.broken, torch.nan, self.radius.clamp_max(round_down(task.cap))).numpy(
                force=True
            ),
            margin=torch.where(unknown, torch.nan, self.margin).numpy(force=True),
            proved_by=np.array([*map(_both, self.proved_by, radius_by)], dtype=object),
            passes=self.passes.numpy(force=True).astype(np.int32),
            guarantee="float_sound" if self.ladder.sound else "real_arith",
            deploy=self.ladder.deploy,
            columns={
                "straddling": self.cells.straddling.numpy(force=True).astype(np.int32),
                "enumerated": self.enumerated.numpy(force=True).astype(np.int32),
            },
        )


def interval_names(cells: Cells) -> np.ndarray:
    """What interval bounds over these cells are called: over a single abstract input they are its evaluation."""
    return np.where((cells.straddling > 0).numpy(force=True), "cell-ibp", "single-cell").astype(object)


def _both(verdict: str, radius: str) -> str:
    """What decided the verdict, and after it what proved the radius, where that is another step."""
    if verdict in ("", radius) or not radius:
        return radius or verdict
    return f"{verdict}; radius {radius}"
