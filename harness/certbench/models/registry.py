"""The registry of architectures, and building one as a function of name, data set and seed alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from certbench.data.catalog import DatasetInfo
from certbench.errors import UsageError, nearest

Builder = Callable[[DatasetInfo], nn.Module]
MODELS: dict[str, Builder] = {}


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Register a builder: (data set) -> network for normalised images of that data set's shape."""

    def register(builder: Builder) -> Builder:
        if name in MODELS:
            raise UsageError(f"model {name!r} is registered twice")
        MODELS[name] = builder
        return builder

    return register


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, for raw pixels x of shape (batch, channels, height, width)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def build_network(name: str, info: DatasetInfo, seed: int) -> nn.Module:
    """The network on the CPU in training mode; its first weights depend on the arguments alone.

    Raises:
        UsageError: unknown model; names the nearest known one.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = MODELS[name](info)
    if all(m == 0 for m in info.mean) and all(s == 1 for s in info.std):
        return body
    return nn.Sequential(OrderedDict(normalize=Normalize(info.mean, info.std), body=body))
