"""From a task to a trained classifier: choose the granularity, train, keep the epoch that is to be kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from certbench.contract import TrainTask
from certbench.data.dataset import Split, to_pixels
from certbench.errors import RunError, UsageError
from certbench.results.files import write_atomically
from certbench.seeding import derive_seed
from certbench.training import fit
from certbench.training.checkpoint import save_network
from certbench_abstraction.granularity import candidates, end_point_gradients, refine_further
from certbench_abstraction.network import build_classifier
from certbench_abstraction.objective import Abscert, AbstractionIBP

OBJECTIVES = {"abstraction": Abscert, "abstraction-ibp": AbstractionIBP}
BATCH = 500
"""Images classified at a time."""


def train_abstraction(task: TrainTask) -> nn.Module:
    """The classifier ``g = f o alpha_n`` on raw pixels, in evaluation mode.

    Raises:
        UsageError: a granularity or model that does not fit, or too few images to hold some out.
    """
    n = task.settings.n or choose_granularity(task)
    return train_one(task, n, task.dataset.test if task.settings.released.test_selection else None)


def train_one(task: TrainTask, n: int, judge: Split | None) -> nn.Module:
    """The network after the last epoch, or with a ``judge`` the one of the epoch that does best on it."""

    def build() -> nn.Module:
        info = task.dataset.info
        return build_classifier(task.recipe.model, info, n, derive_seed(task.seed, "network")).to(task.device)

    best = BestEpoch(task, judge) if judge is not None else None
    objective = OBJECTIVES[task.recipe.method.name](task, best.look if best else None)
    network = fit(replace(task, build_network=build), objective)
    if best is not None:
        best.look(task.recipe.train.epochs, network)
        best.restore(network)
    return network.eval()


class BestEpoch:
    """Keeps the network of the epoch with the most correct images; looking at an epoch twice changes nothing."""

    def __init__(self, task: TrainTask, judge: Split) -> None:
        self.task, self.judge = task, judge
        self.weights = task.folder / "best.safetensors"
        self.notes = task.folder / "best.json"

    def look(self, epoch: int, network: nn.Module) -> None:
        known = json.loads(self.notes.read_text()) if self.notes.is_file() else {"accuracy": -1.0}
        reached = accuracy(network, self.judge, self.task)
        if reached > known["accuracy"]:
            save_network(self.weights, network)
            write_json(self.notes, {"epoch": epoch, "accuracy": reached})

    def restore(self, network: nn.Module) -> None:
        network.load_state_dict(load_file(self.weights))


def choose_granularity(task: TrainTask) -> int:
    """Train with one number of intervals after another, coarse to fine, and return the one that did best.

    What judges is held out of training: the last training images. With ``released.test_selection`` it is the test set.
    The search ends where the stopping test says that smaller intervals are not wanted. Its findings stay in
    ``search.json``, so that a finished run knows its granularity without training.

    Raises:
        UsageError: fewer training images than are to be held out, or no candidate.
        RunError: only loading was asked for and the search is not finished.
    """
    notes = task.folder / "search.json"
    if notes.is_file():
        return int(json.loads(notes.read_text())["n"])
    if task.only_load:
        raise RunError(f"no finished search in {task.folder}; run the recipe again")
    settings, dataset = task.settings, task.dataset
    search, released = settings.search, settings.released
    rest = len(dataset.train) - search.held_out
    if rest < 2:
        raise UsageError(
            f"method.search.held_out = {search.held_out} of {len(dataset.train)} training images leaves none to train on"
        )
    judge = dataset.test if released.test_selection else dataset.train.slice(rest, len(dataset.train))
    part = dataset if released.test_selection else replace(dataset, train=dataset.train.slice(0, rest))
    tried: dict[int, float] = {}
    for n in candidates(search, released.floor_division, dataset.info.levels):
        folder = task.folder / "search" / f"n-{n:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        own = replace(task, dataset=part, folder=folder)
        network = train_one(own, n, judge if released.test_selection else None)
        tried[n] = accuracy(network, judge, task)
        task.reporter.say(f"{task.recipe.name}: n = {n}: {100 * tried[n]:.2f} % on {len(judge)} images")
        if not wants_refinement(network, own):
            break
    if not tried:
        raise UsageError("method.search: no number of intervals lies between 2 and the values of a pixel")
    best = max(tried, key=lambda n: tried[n])  # the coarsest of equals, which certifies more
    write_json(notes, {"n": best, "tried": tried})
    return best


def wants_refinement(network: nn.Module, task: TrainTask) -> bool:
    """The stopping test over the training images, in evaluation mode."""
    assert isinstance(network, nn.Sequential)  # what build_classifier returns
    sums = end_point_gradients(network, pixel_batches(task.dataset.train, task))
    return refine_further(sums, task.settings.released.stopping_channels)


def accuracy(network: nn.Module, split: Split, task: TrainTask) -> float:
    """The share of images whose label has the largest logit; the network's mode is left as it was."""
    mode = network.training
    network.eval()
    with torch.no_grad():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in pixel_batches(split, task))
    network.train(mode)
    return right / len(split)


def pixel_batches(split: Split, task: TrainTask) -> Iterator[tuple[Tensor, Tensor]]:
    """Raw pixels and labels on the task's device."""
    for at in range(0, len(split), BATCH):
        part = split.slice(at, at + BATCH).to(task.device)
        yield to_pixels(part.images, task.dataset.info.levels), part.labels


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True).encode())
