"""What training objectives on bounds share: the traced network, the ramped radius, Fast IBP's warm-up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import RELU, Bounds, Box, Clean, Graph, input_box, trace
from certbench.contract import TrainTask
from certbench.errors import UsageError
from certbench.seeding import derive_seed
from certbench.settings import WarmUpSettings
from certbench.training.fit import Step
from certbench.training.initialization import ibp_initialization
from certbench.training.losses import robust_cross_entropy
from certbench.training.regularizers import relu_balance, tightness
from certbench.training.schedules import RAMPS

NATURAL_EPS = 1e-6
"""The radius at which the regularisers see the bounds while the schedule is still at 0 (released code of Fast IBP)."""


@dataclass(frozen=True)
class Batch:
    """What a step knows before its bound pass.

    ``images`` are raw pixels (batch, channels, height, width), ``clean`` is their pass, ``clean_loss`` the mean cross
    entropy of its logits, ``eps`` the schedule's radius in raw pixel units. ``floor`` is the least radius at which the
    regularisers see bounds, 0 where they are off. ``figures`` are shown; a method may add its own.
    """

    images: Tensor
    labels: Tensor
    step: Step
    eps: float
    floor: float
    clean: Clean
    clean_loss: Tensor
    figures: dict[str, Tensor | float]


class IntervalObjective:
    """Training on the bounds of a network over a box whose radius ramps up: IBP, until a method overrides a part.

    The loss is ``robust_loss``, or the clean loss while eps is 0, plus the regularisers while eps ramps up. A method
    may change the ``box`` that is bounded, the ``margins`` taken from it, and the ``robust_loss`` made of them. All
    bound passes of a step use the batch statistics of its one clean pass and update nothing.

    ``eps_max`` is the radius at the end of the ramp, in raw pixel units; ``eps_at`` gives that of a batch. The task's
    settings are a :class:`certbench.settings.WarmUpSettings`.

    Raises:
        UsageError: the training radius exceeds the cap of the certificates, which would then not see it.
    """

    graph: Graph

    def __init__(self, task: TrainTask) -> None:
        self.task = task
        self.settings: WarmUpSettings = task.settings
        self.settings.check_recipe(task.recipe)
        self.eps_max = float(self.settings.trained_radius(task.recipe))

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        """Take out the batch norms that the settings leave out, trace the network, and draw its weights.

        Raises:
            UsageError: the settings ask for regularisers on ReLUs and the network has none.
        """
        settings, info = self.settings, self.task.dataset.info
        self.eps_at = RAMPS[settings.ramp](
            self.eps_max, settings.ramp_start, settings.ramp_epochs, batches_per_epoch
        )
        length = 1 if settings.ramp == "none" else settings.ramp_epochs
        last, epochs = settings.ramp_start - 1 + length, self.task.recipe.train.epochs
        if last > epochs and not self.task.only_load:
            self.task.reporter.say(
                f"{self.task.recipe.name}: the ramp would end with epoch {last}, training ends with epoch {epochs}: it "
                "never comes to the full radius"
            )
        remove_batch_norms(network, keep=settings.batch_norm)
        self.graph = trace(network, info.shape)
        if settings.regularizes and all(node.operation != RELU for node in self.graph.nodes):
            raise UsageError(
                f"{self.task.recipe.name}: the warm-up regularisers look at ReLUs, and model "
                f"{self.task.recipe.model!r} has none; set method.regularizer_weight = 0 or choose another model"
            )
        if settings.initialization == "ibp":
            ibp_initialization(self.graph, derive_seed(self.task.seed, "ibp-initialization"))
        self.std = torch.tensor(info.std, device=self.task.device).view(-1, 1, 1)

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a batch; see :class:`certbench.training.Objective`."""
        eps, warm_up = self.eps_at(step.batch), self.warms_up(step)
        clean = self.graph.run(images)
        loss = F.cross_entropy(clean.logits, labels)
        figures: dict[str, Tensor | float] = {"eps": eps, "clean_loss": loss.detach()}
        if eps > 0 or warm_up:
            floor = NATURAL_EPS if warm_up else 0.0
            batch = Batch(images, labels, step, eps, floor, clean, loss, figures)
            box = self.box(batch)
            bounds = self.graph.bound(box, clean.statistics, keep={RELU} if warm_up else ())
            if eps > 0:
                loss = self.robust_loss(batch, box, bounds)
            if warm_up:
                loss = loss + self.regularizers(eps, box, bounds)
        return loss, figures

    def box(self, batch: Batch) -> Box:
        """The inputs that are bounded: the ball of radius eps, in raw pixels."""
        return input_box(batch.images, max(batch.eps, batch.floor))

    def margins(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        """Lower bounds of ``z_y - z_j`` on the box, shape (batch, classes - 1)."""
        return bounds.margins(batch.labels)

    def robust_loss(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        """``L_rob``, the mean over the batch."""
        return robust_cross_entropy(self.margins(batch, box, bounds))

    def warms_up(self, step: Step) -> bool:
        """Whether the regularisers are on: until the ramp ends."""
        return self.settings.regularizes and step.epoch <= self.eps_at.last_epoch

    def regularizers(self, eps: float, box: Box, bounds: Bounds) -> Tensor:
        """``lambda (L_tight + L_relu)``, lambda = lambda_0 (1 - eps / eps_max), on ``bounds`` that kept the ReLUs' boxes.

        Args:
            eps: what the schedule says, whatever radii the box has.
            box: the inputs, in raw pixels.
        """
        tau, lam = self.settings.tolerance, self.settings.regularizer_weight * (1 - eps / self.eps_max)
        terms = []
        if self.settings.tightness:
            terms.append(tightness(box.radius / self.std, bounds.kept, tau))
        if self.settings.relu_balance:
            terms.append(relu_balance(bounds.kept, tau))
        return lam * torch.stack(terms).sum()


def remove_batch_norms(network: nn.Module, keep: str) -> None:
    """Leave ``everywhere``, ``convolutions`` (two-dimensional ones alone) or ``none`` of a network's batch norms.

    The ablation of arXiv 2103.17268, Table 4. What is taken out becomes the identity, in place.
    """
    gone: tuple[type[nn.Module], ...] = {
        "everywhere": (),
        "convolutions": (nn.BatchNorm1d,),
        "none": (nn.BatchNorm1d, nn.BatchNorm2d),
    }[keep]
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, gone):
                setattr(parent, name, nn.Identity())
