"""IBP initialisation (arXiv 2103.17268, section 3.1): the mean interval width stays constant from layer to layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certbench.bounds.graph import Graph, Node, Ref

ADDITIONS = ("aten.add.Tensor",)
WEIGHTED = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default")


def ibp_initialization(graph: Graph, seed: int) -> None:
    """Draw every weight with more than one dimension but the last one from ``N(0, (sqrt(2 pi) / fan_in)^2)``.

    The last weight in parameter order (the classification layer), all biases and batch norms keep PyTorch's default.
    A convolution or linear layer whose input is an operation applied directly to a sum of branches, in practice the
    ReLU of a residual sum, gets half of that, since the sum doubles the width.
    """
    generator = torch.Generator().manual_seed(seed)
    halved = _weights_after_sums(graph)
    weights = [(name, p) for name, p in graph.network.named_parameters() if p.ndim > 1]
    with torch.no_grad():
        for name, weight in weights[:-1]:
            factor = 0.5 if name in halved else 1.0
            weight.copy_(factor * ibp_sigma(weight) * torch.randn(weight.shape, generator=generator))


def ibp_sigma(weight: Tensor) -> float:
    """``sqrt(2 pi) / fan_in`` of a weight (outputs, inputs per group, *kernel)."""
    return math.sqrt(2 * math.pi) / weight[0].numel()


def _weights_after_sums(graph: Graph) -> set[str]:
    """Names of the weights whose layer reads an operation that reads a sum."""
    nodes = {node.name: node for node in graph.nodes}

    def producer(node: Node) -> Node | None:
        first = node.arguments[0]
        return nodes.get(first.name) if isinstance(first, Ref) else None

    found = set()
    for node in graph.nodes:
        weight = node.arguments[1] if node.operation in WEIGHTED else None
        before = producer(node) if weight is not None else None
        beyond = producer(before) if before is not None and before.arguments else None
        if beyond is not None and beyond.operation in ADDITIONS and isinstance(weight, Ref):
            found.add(graph.tensor_name(weight))
    return found
