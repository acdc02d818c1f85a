"""The registry of architectures, and building one as a function of name, data set and seed alone.

A new family is a module of its own with ``@register_model`` before each builder, imported by ``models/__init__``; a
plugin brings its own by the hook ``register_models``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from certbench.data.catalog import DatasetInfo
from certbench.errors import UsageError, nearest
from certbench.models.timm_networks import PREFIX, check_timm_name, timm_network

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


def find_builder(name: str, registered: Mapping[str, Builder]) -> Builder:
    """
    Raises:
        UsageError: unknown model; names the nearest known one.
    """
    if name.startswith(PREFIX):
        return partial(timm_network, name.removeprefix(PREFIX))
    if name not in registered:
        raise UsageError(f"unknown model {name!r}; {nearest(name, registered)} (or {PREFIX}<name>)")
    return registered[name]


def check_model_name(name: str, registered: Mapping[str, Builder]) -> None:
    """
    Raises:
        UsageError: unknown model; names the nearest known one.
    """
    if name.startswith(PREFIX):
        check_timm_name(name.removeprefix(PREFIX))
    else:
        find_builder(name, registered)


def build_network(
    name: str, info: DatasetInfo, seed: int, registered: Mapping[str, Builder] | None = None
) -> nn.Module:
    """The network on the CPU in training mode; its first weights depend on the arguments alone.

    Networks of torchvision, timm and plugins draw from torch's global generator; it is seeded for them and then put
    back as it was.

    Args:
        name: a name of the registry, or ``timm:<name>`` for a network of timm.
        registered: the registry, with what plugins bring; by default the core's own.

    Raises:
        UsageError: unknown model; names the nearest known one. Or the model does not fit the data set's images.
    """
    builder = find_builder(name, MODELS if registered is None else registered)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = builder(info)
    if all(m == 0 for m in info.mean) and all(s == 1 for s in info.std):
        return body
    return nn.Sequential(OrderedDict(normalize=Normalize(info.mean, info.std), body=body))
