"""One Fast IBP step (clean pass, bounds, margins, backward) against a plain functional one.

``python benchmarks/training.py``. The plain version is the shortest there is: three convolutions per layer, batch
norm by clean statistics, no graph. Both are interleaved in one process on images of MNIST's size and the small network.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from certbench.bounds import input_box, trace
from certbench.data.catalog import DATASETS
from certbench.models import build_network
from certbench.training import robust_cross_entropy

BATCH, EPS, ROUNDS, IMAGES = 256, 0.1, 40, 60_000


def plain_step(network: torch.nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """The same loss, written out for this one network."""
    h, lower, upper = x, (x - EPS).clamp_min(0), (x + EPS).clamp_max(1)
    c, r = (lower + upper) / 2, (upper - lower) / 2
    for affine, norm in ((0, 1), (3, 4), (7, 8)):
        layer, bn = network[affine], network[norm]
        if isinstance(layer, torch.nn.Linear):
            h, c, r = (t.flatten(1) for t in (h, c, r))
            h, c = F.linear(h, layer.weight, layer.bias), F.linear(c, layer.weight, layer.bias)
            r = F.linear(r, layer.weight.abs())
        else:
            h, c = (F.conv2d(t, layer.weight, layer.bias, 2, 1) for t in (h, c))
            r = F.conv2d(r, layer.weight.abs(), None, 2, 1)
        var, mean = torch.var_mean(h, [d for d in range(h.ndim) if d != 1], correction=0)
        scale = bn.weight * torch.rsqrt(var + bn.eps)
        shape = (1, -1, *[1] * (h.ndim - 2))
        scale, shift = scale.view(shape), (bn.bias - mean * scale).view(shape)
        h, c, r = torch.addcmul(shift, h, scale), torch.addcmul(shift, c, scale), r * scale.abs()
        h, lower, upper = h.relu(), (c - r).relu(), (c + r).relu()
        c, r = (lower + upper) / 2, (upper - lower) / 2
    eye = torch.eye(10)
    C = (eye[y][:, None] - eye)[~F.one_hot(y, 10).bool()].view(len(y), 9, 10)
    W = C @ network[10].weight
    margins = (W @ c[..., None] - W.abs() @ r[..., None]).squeeze(-1) + C @ network[10].bias
    return robust_cross_entropy(margins)


def main() -> None:
    network = build_network("cnn-small", DATASETS["mnist"], 0).train()
    assert isinstance(network, torch.nn.Sequential)
    graph = trace(network, (1, 28, 28))
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

    def engine() -> Tensor:
        clean = graph.run(x)
        return robust_cross_entropy(graph.bound(input_box(x, EPS), clean.statistics).margins(y))

    versions: dict[str, Callable[[], Tensor]] = {"plain": lambda: plain_step(network, x, y), "engine": engine}
    assert torch.allclose(versions["plain"](), versions["engine"](), rtol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(ROUNDS):
        for name, step in versions.items():
            began = time.perf_counter()
            step().backward()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{torch.get_num_threads()} threads, batch {BATCH}\n\n| version | ms a step | s per {IMAGES} images | of plain |"
    )
    print("|---|---|---|---|")
    for name, value in median.items():
        print(
            f"| {name} | {1e3 * value:.1f} | {value * IMAGES / BATCH:.1f} | {value / median['plain']:.2f} |"
        )


main()
