"""From bounds to certificates: verdicts at the recipe's radius, and radii, by a cascade of bounds.

A cascade is a sequence of bounds, cheapest first. Each one sees only the images that those before it left open: at the
recipe's radius the correctly classified ones without a proof, in the radius search those not proved at the cap.
``proved_by`` names the bound that proved the verdict. Where another one proved the radius that is reported, it follows
after a semicolon: ``ibp; radius crown``.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from certbench.bounds.box import input_box
from certbench.bounds.graph import Graph
from certbench.bounds.radius import MarginFunction, search_radii
from certbench.bounds.trace import trace
from certbench.contract import Certificates, CertifyTask, Guarantee
from certbench.data.dataset import to_pixels
from certbench.errors import RunError
from certbench.models.fold import deployed_network
from certbench.models.kernels import one_thread_each, plain_kernels
from certbench.threat import round_down, round_up

log = logging.getLogger(__name__)
_PROBE = 250
"""Images on which the folded network is compared with the trained one."""


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

    def describe(self) -> dict[str, object]:
        """All that results depend on, for the digest of a row's settings."""
        return {
            "bound": self.name,
            "tolerance": self.tolerance,
            "monotone": self.monotone,
            "guarantee": self.guarantee,
            **self.settings,
        }


def certify(bounds: Sequence[Bound], task: CertifyTask) -> Iterator[Certificates]:
    """Certificates of ``task.split`` in order, in batches.

    What is bounded, in float64 and around the float32 images that it sees, is the deployed network: batch norms folded.
    Under ``float_sound`` bounds the prediction is that of the deployed network in its own float32, otherwise that of
    real arithmetic (float64). An image outside [0, 1], with a label out of range, or with bounds that are not finite gets the verdict ``error``. Where memory runs
    out, the batch is halved and the log says so; a single image that does not fit gets the verdict ``error``.

    Raises:
        RunError: the task holds no image; the network is in training mode, has weights that are not finite or of a
            wrong type, or does not return logits of shape (batch, classes); an evaluation contradicts a proof.
        UsageError: the network cannot be traced, or an operation has no rule.
    """
    if not len(task.split):
        raise RunError("there is no image to certify")
    check_network(task.network)
    deployed = deployed_network(task.network)
    network = copy.deepcopy(deployed).double().requires_grad_(False)
    first = to_pixels(task.split.images[:_PROBE], task.levels)
    graph = trace(network, tuple(first.shape[1:]))
    _check_evaluations(task.network, network, graph, first.double())
    evaluate = _evaluation(bounds, deployed, graph)
    size = min(bound.chunk for bound in bounds)
    ranges = [(start, min(start + size, len(task.split))) for start in range(0, len(task.split), size)]

    def chunk(start: int, stop: int) -> _Chunk:
        return _Chunk(bounds, task, graph, evaluate, start, stop)

    with plain_kernels(), one_thread_each(task.device) as workers:
        for parts in workers.map(lambda ends: _in_halves(chunk, *ends), ranges):
            yield from parts


def check_network(network: nn.Module) -> None:
    """
    Raises:
        RunError: it is in training mode, or has weights that are not finite.
    """
    training = [name or "the network" for name, module in network.named_modules() if module.training]
    if training:
        raise RunError(f"cannot certify in training mode ({training[0]}); call eval() on the network first")
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"cannot certify: weight {name} holds NaN or infinity; train again")


def _check_evaluations(network: nn.Module, deployed: nn.Module, graph: Graph, images: Tensor) -> None:
    """
    Raises:
        RunError: the deployed network computes something else than the trained one, or the bounds at radius 0 enclose
            something else than the deployed network computes. Either would be a bug, caught before any certificate.
    """
    images = images.nan_to_num(0.0).clamp(0.0, 1.0)  # bad images are dealt with one by one, later
    zero = torch.zeros_like(images[:, 0, 0, 0])
    with torch.no_grad():
        trained, folded = copy.deepcopy(network).double()(images.clone()), deployed(images.clone())
        bounded = graph.bound(input_box(images, zero)).logits.center
    if not _agree(trained, folded):
        raise RunError(
            f"folding batch norms changed what {type(network).__name__} computes; it cannot be certified"
        )
    if not _agree(folded, bounded):
        raise RunError(
            f"the bounds of {type(network).__name__} at radius 0 are not what it computes; it cannot be certified"
        )


def _agree(one: Tensor, two: Tensor) -> bool:
    scale = float(one.abs().nan_to_num(0.0, 0.0).max()) if one.numel() else 0.0
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def _evaluation(bounds: Sequence[Bound], deployed: nn.Module, graph: Graph) -> Callable[[Tensor], Tensor]:
    """The logits that predictions are made from, in float64, for images in float64.

    Under a float-sound guarantee they come from the deployed network itself, in float32, which is one of the
    evaluations admitted at every precision but float64.

    Raises:
        RunError: weights that are deployed in float32 are stored in another type.
    """
    if not _all_sound(bounds) or any(bound.deploy == "float64" for bound in bounds):
        return lambda images: graph.run(images).logits
    for name, tensor in deployed.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise RunError(
                f"cannot certify for {bounds[0].deploy}: weight {name} is stored in {tensor.dtype}, not in float32"
            )

    def logits(images: Tensor) -> Tensor:
        found: Tensor = deployed(images.float())
        return found.double()

    return logits


def _all_sound(bounds: Sequence[Bound]) -> bool:
    return all(bound.guarantee == "float_sound" for bound in bounds)


def _in_halves(chunk: Callable[[int, int], _Chunk], start: int, stop: int) -> list[Certificates]:
    """Certificates of images start to stop, halved as often as memory asks for."""
    try:
        return [chunk(start, stop).certificates()]
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # does nothing where no GPU is in use
    if stop - start == 1:
        log.warning("out of memory on image %d of this part alone: verdict error", start)
        return [chunk(start, stop).failure()]
    middle = (start + stop) // 2
    log.warning(
        "out of memory on images %d to %d: going on with batches of %d", start, stop - 1, stop - middle
    )
    return [*_in_halves(chunk, start, middle), *_in_halves(chunk, middle, stop)]


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


class _Chunk:
    """A batch of images on its way through the cascade.

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
            for k in range(len(self.bounds)):
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
            guarantee="float_sound" if _all_sound(self.bounds) else "real_arith",  # a cascade's weakest
            deploy=self.bounds[0].deploy,
        )

    def _proved_by(self, i: int) -> str:
        if self.broken[i] or self.radius_by[i] < 0:
            return ""
        verdict, radius = (int(by[i]) for by in (self.verdict_by, self.radius_by))
        name = self.bounds[radius].name
        return name if verdict in (-1, radius) else f"{self.bounds[verdict].name}; radius {name}"
