"""The training loop: epochs over device-resident batches, clipping, schedules, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from certbench.contract import TrainTask
from certbench.data.batches import Epochs, training_batches
from certbench.errors import RunError, UsageError
from certbench.recipe import Train
from certbench.training.checkpoint import load_latest, restore_optimizer, save_checkpoint

REPORT_EVERY = 0.5
"""Seconds between looks at the loss; each look waits for the device."""


@dataclass(frozen=True)
class Step:
    """Where training stands: ``batch`` counts optimiser steps from 0, chunks of a loaded batch one by one; ``epoch``
    counts from 1."""

    batch: int
    epoch: int
    batches_per_epoch: int


class Objective(Protocol):
    """A method's training objective: how it prepares a network, and the loss of a batch."""

    def prepare(self, network: nn.Module, batches_per_epoch: int) -> None:
        """Called once before the first step and again on resume, before the saved weights are loaded."""

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The loss of a batch (raw pixels (batch, channels, height, width); labels (batch,)) and figures to show.

        A figure that is a tensor was measured on the batch and is averaged over an epoch's steps; a float is what a
        schedule has reached.
        """


@runtime_checkable
class OwnSchedule(Protocol):
    """An objective that sets the learning rate itself, in place of the recipe's schedule."""

    def learning_rate(self, step: Step) -> float: ...


def fit(task: TrainTask, objective: Objective, chunks: int = 1) -> nn.Module:
    """Train a fresh network on the task's training images and return it in evaluation mode.

    With ``chunks`` above 1 every loaded batch is cut into so many consecutive chunks of equal size, one optimiser step
    each; images left over, fewer than ``chunks`` in a batch, are not used in that epoch.

    Every random number is derived from the seed and the epoch, so a run that was interrupted and resumed from its
    last checkpoint ends in the same bits as one that was not. Called after the last epoch, it returns the finished
    network.

    Raises:
        UsageError: a batch has fewer images than chunks.
        RunError: the loss or the gradient is not finite (names the step and the last checkpoint), or a checkpoint is
            damaged or cannot be written.
    """
    settings = task.recipe.train
    if chunks > min(settings.batch_size, len(task.dataset.train)):
        raise UsageError(
            f"{task.recipe.name}: a batch of {settings.batch_size} images cannot be cut into {chunks} chunks; raise "
            "train.batch_size"
        )
    augment = settings.augmentation or settings.augment
    batches = training_batches(task.dataset, settings.batch_size, task.seed, augment, task.device)
    network = task.build_network()
    steps = len(batches) * chunks
    objective.prepare(network, steps)
    optimizer = build_optimizer(network, settings)
    loop = _Loop(task, objective, network, optimizer, batches, chunks, history=[], checkpoint=None)
    loop.resume()
    first = len(loop.history) + 1
    if first <= settings.epochs:
        if task.only_load:
            raise RunError(
                f"no finished checkpoint in {task.folder}: {first - 1} of {settings.epochs} epochs; run the recipe again"
            )
        task.reporter.stage("train", settings.epochs * steps, "step")
    for epoch in range(first, settings.epochs + 1):
        loop.run_epoch(epoch)
    return network.eval()


@dataclass
class _Means:
    """Means of figures over the steps that have them; the sums stay on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, figures: Mapping[str, Tensor | float]) -> None:
        for key, value in figures.items():
            if isinstance(value, Tensor):
                self.sums[key] = self.sums[key] + value if key in self.sums else value.double()
                self.counts[key] += 1

    def of(self, key: str, last: Tensor | float) -> float:
        return float(self.sums[key]) / self.counts[key] if key in self.sums else float(last)


@dataclass
class _Loop:
    task: TrainTask
    objective: Objective
    network: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Epochs
    chunks: int
    history: list[dict[str, float]]
    checkpoint: Path | None

    def resume(self) -> None:
        saved = load_latest(self.task.folder)
        if saved is None:
            return
        self.network.load_state_dict(saved.network)
        restore_optimizer(self.optimizer, saved.optimizer)
        self.history, self.checkpoint = list(saved.history), saved.path
        if saved.epoch < self.task.recipe.train.epochs:
            self.task.reporter.say(f"resumed after epoch {saved.epoch} from {saved.path}")

    def run_epoch(self, epoch: int) -> None:
        self.network.train()
        began = last_look = time.perf_counter()
        means, figures = _Means(), dict[str, Tensor | float]()
        first_bad = torch.full((), -1, dtype=torch.long, device=self.task.device)
        length = len(self.batches) * self.chunks
        for number, (images, labels) in enumerate(self._chunks_of(epoch)):
            step = Step((epoch - 1) * length + number, epoch, length)
            loss, latest = self._update(images, labels, step, first_bad)
            figures = {"loss": loss.detach(), **latest}
            means.add(figures)
            if time.perf_counter() - last_look > REPORT_EVERY:
                self._stop_if_bad(first_bad, epoch)
                shown = {key: float(value) for key, value in figures.items()}
                self.task.reporter.advance(step.batch + 1, epoch=epoch, **shown)
                last_look = time.perf_counter()
        self._stop_if_bad(first_bad, epoch)
        summary = {key: means.of(key, value) for key, value in figures.items()}
        self.history.append(summary)
        self.checkpoint = save_checkpoint(self.task.folder, epoch, self.network, self.optimizer, self.history)
        self.task.reporter.advance(epoch * length, epoch=epoch, **summary)
        seconds = time.perf_counter() - began
        self.task.reporter.epoch_done(epoch, self.task.recipe.train.epochs, seconds, summary)

    def _chunks_of(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches.epoch(epoch):
            size = len(labels) // self.chunks
            for k in range(self.chunks if size else 0):  # the last batch may hold fewer images than chunks
                yield images[k * size : (k + 1) * size], labels[k * size : (k + 1) * size]

    def _update(
        self, images: Tensor, labels: Tensor, step: Step, first_bad: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        own = self.objective.learning_rate if isinstance(self.objective, OwnSchedule) else None
        rate = own(step) if own is not None else learning_rate(self.task.recipe.train, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, figures = self.objective.loss(images, labels, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        limit = self.task.recipe.train.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        bad = ~(loss.detach().isfinite() & norm.isfinite()) & (first_bad < 0)
        first_bad.masked_fill_(bad, step.batch)  # kept on the device: looking at every step would stall it
        self.optimizer.step()
        return loss, figures

    def _stop_if_bad(self, first_bad: Tensor, epoch: int) -> None:
        if (batch := int(first_bad)) >= 0:
            kept = (
                f"the last good checkpoint is {self.checkpoint}"
                if self.checkpoint
                else "there is no checkpoint yet"
            )
            raise RunError(
                f"loss or gradient is NaN or infinite at step {batch} (epoch {epoch}); {kept}; "
                "lower train.learning_rate or lengthen the ramp"
            )


def build_optimizer(network: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.Adam(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def learning_rate(settings: Train, step: Step) -> float:
    """The rate of one step; milestone M means that epochs M+1 onward use the lower rate, with a lag of 1 M+2 onward."""
    if settings.schedule == "milestones":
        passed = sum(step.epoch > milestone + settings.milestone_lag for milestone in settings.milestones)
        return settings.learning_rate * settings.decay**passed
    last = settings.epochs * step.batches_per_epoch - 1
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step.batch / (last + 1)))
    return settings.learning_rate * one_cycle(step.batch, last, settings.final_division)


def one_cycle(step: int, last: int, final_division: float) -> float:
    """The factor of a linear three-phase cycle at ``step`` of 0 to ``last`` (Smith and Topin, arXiv 1708.07120)."""
    top = 0.3 * (last + 1) - 1  # the step that has the full rate; torch's own rule for three phases
    start, end = 1 / 25, 1 / 25 / final_division
    at = [0.0, top, 2 * top, float(last)]
    return float(np.interp(step, at, [start, 1.0, start, end]))
