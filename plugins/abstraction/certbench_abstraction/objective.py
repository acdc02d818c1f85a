"""The two objectives, with the symbols of arXiv 2303.11552 where it has any."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import trace
from certbench.contract import TrainTask
from certbench.seeding import derive_seed
from certbench.training import LinearRamp, Step, robust_cross_entropy
from certbench.training.fit import learning_rate
from certbench_abstraction.augment import augment
from certbench_abstraction.bounds import coupled_box, interval_margins
from certbench_abstraction.cells import reachable
from certbench_abstraction.network import split

EpochEnd = Callable[[int, nn.Module], None]
"""(epoch, network): told when an epoch is over, before the next one begins."""


class Abscert:
    """``CE(f(alpha_n(t)))`` on clean images: the published training, in which no perturbation appears."""

    def __init__(self, task: TrainTask, epoch_over: EpochEnd | None = None) -> None:
        self.task, self.settings = task, task.settings
        self.epoch_over = epoch_over

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        self.network = network
        initialize(network, self.settings.initialization, derive_seed(self.task.seed, "initialization"))

    def learning_rate(self, step: Step) -> float:
        """The recipe's schedule; ``cosine`` rises first, and may be the released double wave."""
        train = self.task.recipe.train
        if train.schedule != "cosine":
            return learning_rate(train, step)
        steps = train.epochs * step.batches_per_epoch
        waves = 2.0 if self.settings.released.double_wave else 0.5
        return train.learning_rate * warm_cosine(step.batch, steps, self.settings.warm_up, waves)

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor | float]]:
        if self.epoch_over is not None and step.batch % step.batches_per_epoch == 0 and step.batch:
            self.epoch_over(step.epoch - 1, self.network)
        if self.settings.augmentation == "cifar10":
            seed = derive_seed(self.task.seed, "cifar10-augmentation", step.batch)
            images = augment(images, torch.Generator().manual_seed(seed))
        return self.objective(images, labels, step)

    def objective(
        self, images: Tensor, labels: Tensor, step: Step
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        return F.cross_entropy(self.network(images), labels), {}


class AbstractionIBP(Abscert):
    """``kappa CE(g(t)) + (1 - kappa) CE(worst logits over the cells that the ball reaches)``; ours, not published.

    The radius rises linearly from 0; kappa falls with it from 1 to its end, as in interval training on pixels (arXiv
    1810.12715).
    """

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        super().prepare(network, batches_per_epoch)
        settings = self.settings
        self.eps_max = float(settings.train_radius or self.task.recipe.threat.radius)
        self.eps_at = LinearRamp(self.eps_max, settings.ramp_start, settings.ramp_epochs, batches_per_epoch)
        self.abstraction = network[0]  # type: ignore[index]  # a Sequential, as build_classifier makes it
        self.stem, body = split(network[1])  # type: ignore[index]
        channels, height, width = self.task.dataset.info.shape
        with torch.no_grad():
            hidden = self.stem(torch.zeros(1, 2 * channels, height, width, device=self.task.device))
        self.graph = trace(body, tuple(hidden.shape[1:]))

    def objective(
        self, images: Tensor, labels: Tensor, step: Step
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        eps = self.eps_at(step.batch)
        clean = self.graph.run(self.stem(self.abstraction(images)))
        loss = F.cross_entropy(clean.logits, labels)
        figures: dict[str, Tensor | float] = {"eps": eps, "clean_loss": loss.detach()}
        kappa = 1 - (1 - self.settings.kappa) * eps / self.eps_max
        if eps > 0 and kappa < 1:
            pixels = images.double()
            cells = reachable(pixels, pixels.new_full((len(pixels),), eps), self.abstraction)
            box = coupled_box(cells, self.abstraction)
            margins = interval_margins(self.stem, self.graph, box, labels, clean.statistics)
            loss = kappa * loss + (1 - kappa) * robust_cross_entropy(margins)
        return loss, figures


def warm_cosine(step: int, steps: int, warm_up: float, waves: float) -> float:
    """The factor of a step: ``s / W`` for s < W = int(warm_up S), then ``(1 + cos(2 pi waves (s - W)/(S - W))) / 2``.

    Half a wave ends at 0. The released code has two whole ones and ends where it began (dossier of arXiv 2303.11552's
    code; the number of waves is a parameter of the scheduler it uses, whose default is a half).
    """
    warm = int(steps * warm_up)
    if step < warm:
        return step / warm
    share = (step - warm) / (steps - warm)
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * waves * share)))


def initialize(network: nn.Module, kind: str, seed: int) -> None:
    """Draw the weights of convolutions and linear layers; biases and batch norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = torch.empty(module.weight.shape)
            if kind == "xavier":
                nn.init.xavier_uniform_(weight, generator=generator)
            elif kind == "normal":
                nn.init.normal_(weight, 0.0, 0.01, generator=generator)
            else:
                nn.init.kaiming_normal_(weight, mode="fan_in", generator=generator)
            with torch.no_grad():
                module.weight.copy_(weight)
