"""One IBP training step in several variants, interleaved; see ``bounds.py``."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from certified_images import Settings
from ibp_losses import Plain, engine_loss, straight_loss
from torch import Tensor, nn

from certbench.bounds import trace
from certbench.data.catalog import DATASETS
from certbench.models import build_network
from certbench.training import ibp_initialization

Step = Callable[[], None]
VARIANTS = (
    "plain",
    "rules alone",
    "engine",
    "engine, channels last",
    "compiled",
    "compiled, channels last",
)


def table(dataset: str, model: str, batch: int, eps: float, rounds: int, settings: Settings) -> list[str]:
    names = [name for name in VARIANTS if settings.with_compiler or not name.startswith("compiled")]
    made = [variant(name, dataset, model, batch, eps, settings.device) for name in names]
    losses = [loss for _, loss in made]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    seconds = interleaved({name: step for name, (step, _) in zip(names, made, strict=True)}, rounds, settings)
    plain = statistics.median(seconds["plain"])
    work = operations_per_step(model, dataset, batch)
    share = work / convolution_peak(rounds, settings)
    lines = [f"### {model}, {dataset}, batch {batch}: {work / 1e9:.2f} G operations per step", ""]
    lines += [
        "| variant | samples/s | times plain | share of convolution peak | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        median = statistics.median(times)
        peak = peak_memory(name, dataset, model, batch, eps, settings.device)
        lines.append(
            f"| {name} | {batch / median:.0f} | {plain / median:.2f} | {share / median:.0%} | {peak:.2f} GiB |"
        )
    pairs = zip(seconds["engine"], seconds["rules alone"], strict=True)
    overhead = statistics.median(e / r for e, r in pairs) - 1
    return [*lines, "", f"Engine against its rules alone: {overhead:+.1%}."]


def variant(
    name: str, dataset: str, model: str, batch: int, eps: float, device: torch.device
) -> tuple[Step, float]:
    """A step that leaves gradients, and the loss that it differentiates."""
    info = DATASETS[dataset]
    torch.manual_seed(0)
    images, labels = torch.rand(batch, *info.shape), torch.randint(info.classes, (batch,))
    network = cast(nn.Sequential, build_network(model, info, seed=0))
    graph = trace(network, info.shape)
    ibp_initialization(graph, seed=0)
    network.train().to(device)
    images, labels = images.to(device), labels.to(device)
    if name.endswith("channels last"):
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    loss: Callable[..., Tensor] = engine_loss
    first: Any = graph
    if name == "plain":
        loss, first = Plain.loss, Plain(network)
    elif name == "rules alone":
        loss, first = straight_loss, network
    elif name.startswith("compiled"):
        loss = torch.compile(engine_loss)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        loss(first, images, labels, eps).backward()

    return step, float(engine_loss(graph, images, labels, eps).detach())


def interleaved(steps: dict[str, Step], rounds: int, settings: Settings) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up, compile
        step()
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            settings.wait()
            began = time.perf_counter()
            steps[name]()
            settings.wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory(name: str, dataset: str, model: str, batch: int, eps: float, device: torch.device) -> float:
    """GiB that a process of its own needs for two steps: resident on the CPU, allocated on a GPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, dataset, model, batch, eps, device))


def _peak(name: str, dataset: str, model: str, batch: int, eps: float, device: torch.device) -> float:
    step, _ = variant(name, dataset, model, batch, eps, device)
    step()
    step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def operations_per_step(model: str, dataset: str, batch: int) -> float:
    """Multiplications and additions of one step: three passes (clean, centre, radius), each with its backward pass.

    A backward pass costs twice its forward pass, except in the first layer, whose input needs no gradient.
    """
    info = DATASETS[dataset]
    network = build_network(model, info, seed=0)
    counts: list[float] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = cast(Tensor, module.weight)
        counts.append(2.0 * output.numel() * weight[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.rand(batch, *info.shape))
    return 3 * (3 * sum(counts) - counts[0])


def convolution_peak(rounds: int, settings: Settings) -> float:
    """Operations per second of a large convolution alone, forward, float32."""
    batch = 256 if settings.on_gpu else 16
    x = torch.rand(batch, 128, 16, 16, device=settings.device)
    conv = nn.Conv2d(128, 128, 3, padding=1).to(settings.device)
    seconds = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            settings.wait()
            began = time.perf_counter()
            out = conv(x)
            settings.wait()
            seconds.append(time.perf_counter() - began)
    return 2.0 * out.numel() * conv.weight[0].numel() / min(seconds)
