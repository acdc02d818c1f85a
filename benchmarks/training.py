"""Seconds an epoch of training by each method, relative to standard training.

``python benchmarks/training.py [--data DIR] [--dataset mnist] [--model cnn-small] [--rounds 120] [--device cpu]``. Every
method trains a network of its own from the first step on; in each round each takes one step, so that load on the machine
falls on all alike. The first half of the rounds is the ramp of the radius, regularisers included, the rest runs at the
full radius. Methods that share a step but not its inputs (radii found, attacks) are thus seen as they are in training.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from certbench.contract import TrainTask
from certbench.data.batches import Batches
from certbench.data.dataset import Dataset
from certbench.data.files import load_dataset
from certbench.models import build_network
from certbench.plugins import installed
from certbench.recipe import parse_recipe
from certbench.training import Step
from certbench.training.fit import build_optimizer
from certbench_adaptive_radii.objective import AdaptiveRadii
from certbench_fast_ibp.objective import FastIBP
from certbench_ibp_baselines.attacks import MTLIBP, SABR
from certbench_ibp_baselines.bounds import IBP, CrownIBP
from certbench_ibp_baselines.plain import Standard

RADII = {"digits": "0.1", "mnist": "0.1", "cifar10": "2/255"}
OBJECTIVES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "standard": ("standard", lambda task: Standard(), {}),
    "ibp": ("ibp", IBP, {}),
    "fast-ibp": ("fast-ibp", FastIBP, {}),
    "crown-ibp": ("crown-ibp", CrownIBP, {}),
    "sabr": ("sabr", SABR, {}),
    "mtl-ibp": ("mtl-ibp", MTLIBP, {}),
    "adaptive-radii": ("adaptive-radii", AdaptiveRadii, {"ramp_start": 1, "regularizer_weight": 0.0}),
    "adaptive-radii, regularised": ("adaptive-radii", AdaptiveRadii, {"ramp_start": 1}),
}
"""Line of the table -> method, objective, settings besides the ramp."""


@dataclass
class Contestant:
    """A method with its network, and the seconds of its steps."""

    objective: Any
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float]

    def step(self, images: torch.Tensor, labels: torch.Tensor, step: Step) -> None:
        began = time.perf_counter()
        loss, _ = self.objective.loss(images, labels, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)


def contestant(name: str, dataset: Dataset, arguments: argparse.Namespace) -> Contestant:
    method, objective, settings = OBJECTIVES[name]
    radius = RADII[arguments.dataset]
    ramp = {"ramp_epochs": 1, "ramp": "linear"} if method != "standard" else {}
    table = {
        "dataset": arguments.dataset,
        "model": arguments.model,
        "threat": {"radius": radius},
        "method": {"name": method, **ramp, **settings},
        "train": {"epochs": 2, "batch_size": arguments.batch, "learning_rate": 5e-3},
    }
    recipe = installed().resolve(parse_recipe(table, name))
    device = torch.device(arguments.device)
    network = build_network(arguments.model, dataset.info, 0).to(device).train()
    task = TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=dataset,
        device=device,
        folder=Path("unused"),
        build_network=lambda: network,
    )
    made = objective(task)
    made.prepare(network, arguments.rounds // 2)
    return Contestant(made, network, build_optimizer(network, recipe.train), [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--dataset", default="mnist", choices=RADII)
    parser.add_argument("--model", default="cnn-small")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.dataset, arguments.data)
    contestants = {name: contestant(name, dataset, arguments) for name in OBJECTIVES}
    batches = Batches(dataset.train, dataset.info, arguments.batch, 0, True, arguments.device)
    half, epoch, stream = arguments.rounds // 2, 0, iter(())
    for number in range(arguments.rounds):
        drawn = next(stream, None)
        if drawn is None:
            epoch += 1
            stream = iter(batches.epoch(epoch))
            drawn = next(stream)
        for one in contestants.values():
            one.step(*drawn, Step(number, number // half + 1, half))
    report(contestants, half, len(batches), arguments)


def report(
    contestants: dict[str, Contestant], half: int, batches: int, arguments: argparse.Namespace
) -> None:
    """Medians of the steps of each phase; the first two of a phase are left out."""
    median = {
        name: [statistics.median(c.seconds[2:half]), statistics.median(c.seconds[half + 2 :])]
        for name, c in contestants.items()
    }
    print(
        f"{arguments.model}, {arguments.dataset}, batch {arguments.batch}, {arguments.device}, "
        f"{torch.get_num_threads()} threads, {arguments.rounds} rounds\n"
    )
    print(
        "| method | ms a step, ramp | full radius | of standard, ramp | of standard, full | of ibp, ramp | of ibp, full "
        "| s an epoch, full |"
    )
    print("|---|---|---|---|---|---|---|---|")
    standard, ibp = median["standard"], median["ibp"]
    for name, (ramp, full) in median.items():
        print(
            f"| {name} | {1e3 * ramp:.1f} | {1e3 * full:.1f} | {ramp / standard[0]:.2f} | {full / standard[1]:.2f} "
            f"| {ramp / ibp[0]:.2f} | {full / ibp[1]:.2f} | {batches * full:.1f} |"
        )


main()
