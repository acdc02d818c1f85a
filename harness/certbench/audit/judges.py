"""Does a flip hold at the level of the guarantee? One judge per kind of guarantee."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certbench.audit.bounded import UnsupportedError
from certbench.audit.enclosure import Enclosure
from certbench.audit.losses import smallest_margin

CHUNK = 32
"""Images evaluated at once with error bounds, which keeps unfolded images small."""


class RealJudge:
    """Confirms what is proved in real arithmetic, by a float64 evaluation with error bounds.

    Where the network has an operation without an error rule, nothing is confirmed and ``limit`` says why.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        self.limit = ""
        self._enclosure: Enclosure | None = None
        try:
            self._enclosure = Enclosure(network, shape)
        except UnsupportedError as error:
            self.limit = str(error).splitlines()[0]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._enclosure is None:
            return torch.zeros_like(labels, dtype=torch.bool)
        parts = zip(torch.split(images, CHUNK), torch.split(labels, CHUNK), strict=True)
        return torch.cat([self._enclosure.is_flipped(x, y) for x, y in parts]).to(labels.device)


class DeployedJudge:
    """Confirms what the deployed network computes: in the batch as it comes, or image by image."""

    limit = ""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            together = ~(smallest_margin(self._network(images), labels) > 0)
            alone = torch.cat([self._network(image) for image in torch.split(images, 1)])
            return together | ~(smallest_margin(alone, labels) > 0)
