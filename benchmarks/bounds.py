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

from certbench.bounds import Graph, input_box, interval, trace
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
    """Interval bounds of a sequential network, written out without the engine: clean, centre and radius passes."""

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


def straight_loss(network: nn.Sequential, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """The engine's rules, called layer by layer without its graph: the same arithmetic, no interpreter."""
    clean, box = images, input_box(images, eps)
    layers = [m for m in network.modules() if not list(m.children())]
    for layer in layers[:-1]:
        if isinstance(layer, nn.Conv2d):
            clean = layer(clean)
            box = interval.conv2d(box, layer.weight, layer.bias, layer.stride, layer.padding)
        elif isinstance(layer, nn.Linear):
            clean, box = layer(clean), interval.linear(box, layer.weight, layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            clean, mean, var = _train_norm(layer, clean)
            box = interval.batch_norm(box, layer.weight, layer.bias, mean, var, False, 0.1, layer.eps)
        elif isinstance(layer, nn.Flatten):
            clean, box = clean.flatten(1), box.both(lambda part: part.flatten(1))
        elif isinstance(layer, nn.ReLU):
            clean, box = torch.relu(clean), box.ends(torch.relu)
        else:
            clean = layer(clean)
            box = interval.div(interval.sub(box, layer.mean), layer.std)
    last = layers[-1]
    last(clean)
    return robust_cross_entropy(merged_margins(box, last.weight, last.bias, labels))


def _train_norm(layer: Any, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(clean, [d for d in range(clean.ndim) if d != 1], correction=0)
    with torch.no_grad():
        count = clean.numel() // clean.shape[1]
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * (count / (count - 1)), layer.momentum)
    scale, shift = interval.scale_and_shift(layer.weight, layer.bias, mean, var, layer.eps)
    scale, shift = (interval.per_channel(v, clean.shape) for v in (scale, shift))
    return torch.addcmul(shift, clean, scale), mean, var


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


# What one step computes, and how fast convolutions go here ------------------------------------------------------------


def operations_per_step(network: nn.Module, images: Tensor) -> float:
    """Multiplications and additions of one step: three passes (clean, centre, radius), each with its backward pass.

    A backward pass costs twice its forward pass, except in the first layer, whose input needs no gradient.
    """
    counts: list[float] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = cast(Tensor, module.weight)
        counts.append(2.0 * output.numel() * weight[0].numel())

    handles = [
        m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return 3 * (3 * sum(counts) - counts[0])


def convolution_peak(rounds: int) -> float:
    """Operations per second of a large convolution alone, forward, float32."""
    x, conv = torch.rand(16, 128, 16, 16), nn.Conv2d(128, 128, 3, padding=1)
    seconds = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            began = time.perf_counter()
            out = conv(x)
            seconds.append(time.perf_counter() - began)
    return 2.0 * out.numel() * conv.weight[0].numel() / min(seconds)


# The two parts --------------------------------------------------------------------------------------------------------


def training_steps(dataset: str, model: str, batch: int, rounds: int, with_compiler: bool) -> list[str]:
    info = DATASETS[dataset]
    torch.manual_seed(0)
    images, labels = torch.rand(batch, *info.shape), torch.randint(info.classes, (batch,))
    steps: dict[str, Step] = {}
    losses = []
    for name in (
        "plain",
        "engine",
        "rules alone",
        "engine, channels last",
        "compiled",
        "compiled, channels last",
    ):
        if name.startswith("compiled") and not with_compiler:
            continue
        network = cast(nn.Sequential, build_network(model, info, seed=0))
        graph = trace(network, info.shape)
        ibp_initialization(graph, seed=0)
        network.train()
        inputs = images
        if name.endswith("channels last"):
            network, inputs = (
                network.to(memory_format=torch.channels_last),
                images.contiguous(memory_format=torch.channels_last),
            )
        loss: Callable[..., Tensor] = engine_loss
        first: Any = graph
        if name == "plain":
            loss, first = Plain.loss, Plain(network)
        elif name == "rules alone":
            loss, first = straight_loss, network
        elif name.startswith("compiled"):
            loss = torch.compile(engine_loss)
        steps[name] = step_of(network, loss, first, inputs, labels, EPS)
        losses.append(float(engine_loss(graph, inputs, labels, EPS).detach()))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    seconds = interleaved(steps, rounds)
    plain = statistics.median(seconds["plain"])
    work = operations_per_step(build_network(model, info, seed=0), images)
    share = work / convolution_peak(rounds)
    lines = [f"### {model}, {dataset}, batch {batch}: {work / 1e9:.2f} G operations per step", ""]
    lines += ["| variant | samples/s | times plain | share of convolution peak |", "|---|---:|---:|---:|"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"| {name} | {batch / median:.0f} | {plain / median:.2f} | {share / median:.0%} |")
    pairs = zip(seconds["engine"], seconds["rules alone"], strict=True)
    overhead = statistics.median(e / r for e, r in pairs) - 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        *lines,
        "",
        f"Engine against its rules alone: {overhead:+.1%}. Peak memory so far: {peak:.2f} GiB.",
        "",
    ]


def certification(count: int) -> list[str]:
    """Verdicts, and radii, of MNIST-like images by a small network trained for a few steps, float64, two cores."""
    info = DATASETS["mnist"]
    torch.manual_seed(0)
    network = build_network("cnn-small", info, seed=0)
    graph = trace(network, info.shape)
    ibp_initialization(graph, seed=0)
    centers = (torch.rand(10, *info.shape) > 0.8).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(120):
        labels = torch.randint(10, (100,))
        noisy = (centers[labels] + 0.2 * torch.randn(100, *info.shape)).clamp(0, 1)
        optimizer.zero_grad()
        engine_loss(graph, noisy, labels, 0.1 * min(1, step / 100)).backward()
        optimizer.step()
    labels = torch.randint(10, (count,))
    noisy = (centers[labels] + 0.2 * torch.randn(count, *info.shape)).clamp(0, 1)
    split = Split((noisy * 255).to(torch.uint8), labels)
    lines = ["| what | seconds | certified | passes per image |", "|---|---:|---:|---:|"]
    for what, cap in (("verdicts", "1/10"), ("radii up to 1/2", "1/2")):
        task = CertifyTask(
            recipe=cast(Any, None), settings=None, network=network.eval(), split=split, levels=255, start=0,
            radius=Fraction(1, 10), cap=Fraction(cap), device=torch.device("cpu"),
        )  # fmt: skip
        began = time.perf_counter()
        parts = list(find_certifier("ibp").certify(task))
        seconds = time.perf_counter() - began
        verdicts = np.concatenate([p.verdict for p in parts])
        passes = np.concatenate([p.passes for p in parts])
        lines.append(
            f"| {what} | {seconds:.1f} | {(verdicts == 'certified').mean():.0%} | {passes.mean():.1f} |"
        )
    return [f"### {count} MNIST-like images, cnn-small, ibp, float64", "", *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds, no compiler")
    parser.add_argument("--steps", type=int, default=15, help="rounds of the interleaved variants")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads() if arguments.quick else 2))
    with_compiler = shutil.which("g++") is not None and not arguments.quick
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32 training", ""]
    lines += training_steps("mnist", "cnn-small", 256, arguments.steps * 2, with_compiler)
    if not arguments.quick:
        lines += training_steps("cifar10", "cnn7", 16, arguments.steps, with_compiler)
    lines += certification(1_000 if arguments.quick else 10_000)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
