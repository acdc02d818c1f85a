"""Certifying images by intervals and by linear bounds; see ``bounds.py``."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from certbench.bounds import (
    PRECISIONS,
    Graph,
    crown_ibp_margins,
    crown_margins,
    input_box,
    trace,
)
from certbench.bounds.certifiers import BOUNDS, find_certifier
from certbench.bounds.linear import MEMORY_CAP
from certbench.contract import CertifyTask
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Split
from certbench.models import build_network
from certbench.models.fold import deployed_network
from certbench.training import ibp_initialization, robust_cross_entropy

RADIUS = Fraction(3, 20)
"""Half more than the network is trained for, so that it takes a bound to tell images apart."""


@dataclass(frozen=True)
class Settings:
    """How much is measured, and where."""

    device: torch.device
    rounds: int
    batch: int | None
    images: int
    with_compiler: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()


def trained(images: int, device: torch.device) -> tuple[nn.Module, Split]:
    """The small network after 200 steps of interval training on noisy patterns, and as many new images of them."""
    info = DATASETS["mnist"]
    torch.manual_seed(0)
    network = build_network("cnn-small", info, seed=0).to(device)
    graph = trace(network, info.shape)
    ibp_initialization(graph, seed=0)
    centers = (torch.rand(10, *info.shape) > 0.8).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,))
        pattern = 0.5 + 0.6 * (centers[labels] - 0.5)
        return (pattern + 0.25 * torch.randn(count, *info.shape)).clamp(0, 1), labels

    for step in range(200):
        noisy, labels = (part.to(device) for part in draw(100))
        optimizer.zero_grad()
        clean = graph.run(noisy)
        box = input_box(noisy, 0.1 * min(1, step / 150))
        robust_cross_entropy(graph.bound(box, clean.statistics).margins(labels)).backward()
        optimizer.step()
    noisy, labels = draw(images)
    return network.eval(), Split((noisy * 255).to(torch.uint8), labels)


def verdicts(settings: Settings) -> list[str]:
    return _certification("verdicts", RADIUS, settings)


def radii(settings: Settings) -> list[str]:
    return _certification("radii up to 1/2", Fraction(1, 2), settings)


def _certification(what: str, cap: Fraction, settings: Settings) -> list[str]:
    network, split = trained(settings.images, settings.device)
    lines = [
        "| guarantee | seconds | certified | mean radius | passes per image |",
        "|---|---:|---:|---:|---:|",
    ]
    for guarantee in ("real_arith", "float_sound"):
        task = CertifyTask(
            recipe=cast(Any, None), settings=None, network=network, split=split.to(settings.device), levels=255,
            start=0, radius=RADIUS, cap=cap, device=settings.device,
        )  # fmt: skip
        settings.wait()
        began = time.perf_counter()
        parts = list(find_certifier("ibp", guarantee).certify(task))
        seconds = time.perf_counter() - began
        certified = np.concatenate([p.verdict for p in parts]) == "certified"
        radius, passes = (np.concatenate([getattr(p, name) for p in parts]) for name in ("radius", "passes"))
        lines.append(
            f"| {guarantee} | {seconds:.1f} | {certified.mean():.1%} | {radius.mean():.4f} | {passes.mean():.1f} |"
        )
    return [f"### {what} of {settings.images} MNIST-like images, cnn-small, ibp, float64", "", *lines]


def crown_memory(settings: Settings) -> list[str]:
    """Both linear bounds on two chunks of 50 images; every further chunk needs the same memory again, not more.

    An untrained network leaves far more neurons open than a certified one, so the radius is small: each image still has
    some hundreds of rows in every layer, which is more than the cap admits at a time.
    """
    info, count = DATASETS["cifar10"], 100
    graph = _double(build_network("cnn7", info, seed=0), info.shape, settings)
    before = _peak(settings)
    torch.manual_seed(0)
    images = torch.rand(count, *info.shape, dtype=torch.float64, device=settings.device)
    labels = torch.randint(info.classes, (count,), device=settings.device)
    lines = ["| bound | eps | seconds per image | peak of the process |", "|---|---|---:|---:|"]
    for name, bound, eps, images_each in (
        ("crown-ibp", crown_ibp_margins, 2 / 255, 50),
        ("crown", crown_margins, 1e-8, 50 if settings.on_gpu else 1),
    ):
        settings.wait()
        began = time.perf_counter()
        for start in (0, 50):
            part = slice(start, start + images_each)
            with torch.no_grad():
                bound(graph, input_box(images[part], eps), labels[part])
        settings.wait()
        seconds = (time.perf_counter() - began) / (2 * images_each)
        lines.append(f"| {name} | {eps:.2g} | {seconds:.2f} | {_peak(settings):.2f} GiB |")
    cap = MEMORY_CAP / 2**30
    return [
        f"### linear bounds of cnn7, cifar10 shapes, float64: cap of {cap:.0f} GiB of coefficients per worker",
        "",
        *lines,
        "",
        f"Before: {before:.2f} GiB. With w workers: w times the cap above that; there is one worker per core.",
    ]


def _peak(settings: Settings) -> float:
    if settings.on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _double(network: nn.Module, shape: tuple[int, ...], settings: Settings) -> Graph:
    network = deployed_network(network.eval()).double().requires_grad_(False).to(settings.device)
    return trace(network, shape)


def soundness(settings: Settings) -> list[str]:
    """One pass of each bound at the recipe's radius, real and sound in turns; and what is certified at each deployment."""
    count = 200
    network, split = trained(count, settings.device)
    graph = _double(network, (1, 28, 28), settings)
    images = (split.images.float() / 255).double().to(settings.device)
    labels = split.labels.to(settings.device)
    lines = [
        "| bound | real_arith s | float_sound, times that | certified: real_arith, "
        + ", ".join(PRECISIONS)
        + " |"
    ]
    lines += ["|---|---:|---:|---|"]
    eps = torch.full((50,), float(RADIUS), dtype=torch.float64, device=settings.device)
    for name, batch, batches in (("ibp", 50, 4), ("crown-ibp", 50, 4), ("crown", 5, 3)):
        margins = BOUNDS[name].margins
        seconds: dict[str, list[float]] = {"real": [], "sound": []}
        certified: dict[str, int] = {}
        for start in range(0, batch * batches, batch):
            x, y = images[start : start + batch], labels[start : start + batch]
            for kind in ("real", *PRECISIONS):
                settings.wait()
                began = time.perf_counter()
                with torch.no_grad():
                    found = margins(graph, x, eps[:batch], y, PRECISIONS.get(kind))
                settings.wait()
                if kind in ("real", "float32"):
                    seconds["real" if kind == "real" else "sound"].append(time.perf_counter() - began)
                certified[kind] = certified.get(kind, 0) + int((found.amin(1) > 0).sum())
        real, sound = statistics.median(seconds["real"]), statistics.median(seconds["sound"])
        shares = ", ".join(f"{value / (batch * batches):.1%}" for value in certified.values())
        lines.append(f"| {name}, {batch} images | {real:.3f} | {sound / real:.2f} | {shares} |")
    return [f"### float soundness: MNIST-like images, cnn-small, radius {RADIUS}", "", *lines]
