"""What interval bounds cost: one training step, and certifying 10,000 images.

    python benchmarks/bounds.py [--quick] [--steps N]

One training step (clean pass, bounds, margins, robust loss, gradients) of the small MNIST network and of CNN-7 on
CIFAR-10 shapes, by the engine, by the engine under ``torch.compile`` where a C++ compiler is there, and by a plain
interval pass written out here in three convolutions per layer. All variants take turns in one process; figures are
medians. The last figures are kept in ``bounds.md``.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import Graph, input_box, trace
from certbench.bounds.certifiers import find_certifier
from certbench.bounds.specification import merged_margins
from certbench.contract import CertifyTask
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Split
from certbench.models import build_network
from certbench.training import ibp_initialization, robust_cross_entropy

Step = Callable[[], None]
EPS = 0.1 / 255


class Plain:
    """Interval bounds of a sequential network, written out without the engine: clean, centre and radius passes.

    ``engine_like`` does the arithmetic of the engine's rules in the same order, to tell what its interpreter costs.
    """

    def __init__(self, network: nn.Sequential) -> None:
        self.layers = [m for m in network.modules() if not list(m.children())]

    def loss(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        clean, low, high = images, (images - eps).clamp_min(0.0), (images + eps).clamp_max(1.0)
        for layer in self.layers[:-1]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                clean = layer(clean)
                center, radius = (low + high) * 0.5, (high - low) * 0.5
                center, radius = layer(center), self._spread(layer, radius)
                low, high = center - radius, center + radius
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                clean, low, high = self._normalise(layer, clean, low, high)
            elif isinstance(layer, nn.ReLU):
                clean, low, high = torch.relu(clean), torch.relu(low), torch.relu(high)
            elif isinstance(layer, nn.Flatten):
                clean, low, high = clean.flatten(1), low.flatten(1), high.flatten(1)
            else:
                mean, std = layer.mean, layer.std
                clean, low, high = (clean - mean) / std, (low - mean) / std, (high - mean) / std
        last = self.layers[-1]
        last(clean)
        eye = torch.eye(last.out_features)
        C = (eye[labels][:, None] - eye)[~F.one_hot(labels, len(eye)).bool()].view(len(labels), -1, len(eye))
        W = C @ last.weight
        center, radius = (low + high) * 0.5, (high - low) * 0.5
        margins = (W @ center[..., None] - W.abs() @ radius[..., None])[..., 0] + C @ last.bias
        return robust_cross_entropy(margins)

    @staticmethod
    def _spread(layer: Any, radius: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(radius, layer.weight.abs())
        return F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)

    @staticmethod
    def _normalise(layer: Any, clean: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(clean.ndim) if d != 1]
        var, mean = torch.var_mean(clean, dims, correction=0)
        with torch.no_grad():
            count = clean.numel() // clean.shape[1]
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(var * (count / (count - 1)), layer.momentum)
        shape = (1, -1, *[1] * (clean.ndim - 2))
        scale = layer.weight * torch.rsqrt(var + layer.eps)
        shift = (layer.bias - mean * scale).view(shape)
        scale = scale.view(shape)
        center, radius = (low + high) * 0.5 * scale + shift, (high - low) * 0.5 * scale.abs()
        return clean * scale + shift, center - radius, center + radius


class Straight:
    """The engine's arithmetic in the engine's order, with every value resolved by hand: no interpreter."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def source(self) -> str:
        raise NotImplementedError


def engine_loss(graph: Graph, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    clean = graph.run(images)
    return robust_cross_entropy(graph.bound(input_box(images, eps), clean.statistics).margins(labels))


def step_of(network: nn.Module, loss: Callable[..., Tensor], *arguments: Any) -> Step:
    def step() -> None:
        network.zero_grad(set_to_none=True)
        loss(*arguments).backward()

    return step


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up, compile
        step()
    for turn in range(rounds):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds
