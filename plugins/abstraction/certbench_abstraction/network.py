"""The deployed classifier ``g = f o alpha_n``, and f taken apart at its first affine layer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from certbench.bounds import Box
from certbench.bounds import interval as rules
from certbench.data.catalog import DatasetInfo
from certbench.errors import UsageError
from certbench.models import build_network
from certbench_abstraction.imagenet import IMAGENET
from certbench_abstraction.layer import Abstraction


def build_classifier(model: str, info: DatasetInfo, n: int, seed: int) -> nn.Sequential:
    """``abstraction`` then ``network``: raw pixels to logits; f is ``model`` for twice the channels, on [-1, 1].

    Raises:
        UsageError: an unknown model; n below 2, or more intervals than the pixels have values.
    """
    if n > info.levels:
        raise UsageError(
            f"method.n = {n}: pixels of {info.name} have {info.levels + 1} values, so {n} intervals would say no more "
            f"than the pixels do; choose at most {info.levels}"
        )
    channels, height, width = info.shape
    doubled = replace(
        info, shape=(2 * channels, height, width), mean=(0.0,) * 2 * channels, std=(1.0,) * 2 * channels
    )
    if model in IMAGENET:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = IMAGENET[model](doubled)
    else:
        network = build_network(model, doubled, seed)
    split(network)  # found out before training, not after
    return nn.Sequential(OrderedDict(abstraction=Abstraction(n), network=network))


@dataclass(frozen=True)
class Stem:
    """The first layer of f, which reads ``[U, L]``: a convolution, or a linear layer on the flattened image."""

    layer: nn.Conv2d | nn.Linear

    def __call__(self, z: Tensor) -> Tensor:
        out: Tensor = self.layer(self._shaped(z))
        return out

    def halves(self) -> tuple[Tensor, Tensor]:
        """The weights of upper and of lower ends, (out, C, ...) each."""
        upper, lower = self.layer.weight.chunk(2, 1)
        return upper, lower

    def coupled_weight(self) -> Tensor:
        """Weights that act on ``[U - L, L]`` as the layer's own act on ``[U, L]``."""
        upper, lower = self.halves()
        return torch.cat([upper, upper + lower], 1)

    def bound(self, box: Box, weight: Tensor) -> Box:
        """The box of the layer's result, by the core's interval rule, with ``weight`` in place of its own."""
        box = box.both(self._shaped)
        if isinstance(self.layer, nn.Linear):
            return rules.linear(box, weight, self.layer.bias)
        return rules.conv2d(box, weight, self.layer.bias, *self.geometry)

    def apply(self, h: Tensor, weight: Tensor) -> Tensor:
        """One half of the channels by one half of the weights, without bias."""
        if isinstance(self.layer, nn.Linear):
            return torch.nn.functional.linear(self._shaped(h), weight)
        return torch.conv2d(h, weight, None, *self.geometry)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        assert isinstance(self.layer, nn.Conv2d)
        return list(self.layer.stride), list(self.layer.padding), list(self.layer.dilation)  # type: ignore[arg-type]

    def _shaped(self, h: Tensor) -> Tensor:
        return h.flatten(1) if isinstance(self.layer, nn.Linear) else h


def split(network: nn.Module) -> tuple[Stem, nn.Sequential]:
    """f as its first affine layer and the rest, both sharing its weights.

    Raises:
        UsageError: f is not a ``Sequential`` that begins with a plain convolution or with ``Flatten`` and ``Linear``.
    """
    parts = list(network.children()) if type(network) is nn.Sequential else []
    if len(parts) > 1 and type(parts[0]) is nn.Conv2d and _is_plain(parts[0]):
        return Stem(parts[0]), nn.Sequential(*parts[1:])
    if len(parts) > 2 and type(parts[0]) is nn.Flatten and type(parts[1]) is nn.Linear:
        return Stem(parts[1]), nn.Sequential(*parts[2:])
    raise UsageError(
        f"abstraction needs a network that is a Sequential beginning with a convolution, or with Flatten and Linear; "
        f"{type(network).__name__} is not; choose another model"
    )


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
