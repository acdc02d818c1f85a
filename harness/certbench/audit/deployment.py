"""A network as it is deployed at a precision, so that it can be attacked here and its answers believed.

``float32``, ``float64``, ``bf16`` and ``fp16`` are the network cast to that type, run by PyTorch's kernels on this
device. ``tf32`` is emulated: both factors of every linear layer, convolution and matrix product are rounded to ten bits
of mantissa, then multiplied and summed up in float32, which is what tensor cores do but for the order of sums. All are
evaluations that a float-sound guarantee at that precision covers, so what they show counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class NotDeployableError(Exception):
    """The network cannot be run at this precision here; the message says why."""


class DeployedNetwork(nn.Module):
    """A frozen copy of a network at one precision: float32 images in, logits out in float32 or float64.

    Raises:
        NotDeployableError: no such precision, or an operation of the network does not exist in its type.
    """

    def __init__(self, network: nn.Module, deploy: str, device: torch.device, shape: Sequence[int]) -> None:
        super().__init__()
        if deploy not in TYPES:
            raise NotDeployableError(f"nobody has said here how a network is deployed in {deploy}")
        self.deploy, self.dtype = deploy, TYPES[deploy]
        self.network = copy.deepcopy(network).to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        try:
            self(torch.zeros(1, *shape, device=device))
        except NotImplementedError as error:
            line = str(error).splitlines()[0]
            raise NotDeployableError(f"a network deployed in {deploy} cannot be run here ({line})") from error

    def forward(self, images: Tensor) -> Tensor:
        if self.deploy == "tf32":
            with _RoundedFactors():
                return self._logits(images)
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(self.dtype))
        return logits.float() if self.dtype in (torch.bfloat16, torch.float16) else logits


class _RoundedFactors(TorchFunctionMode):
    """Rounds the first two arguments of every product to TF32; gradients pass as if nothing had been rounded."""

    PRODUCTS = frozenset(
        {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.mm, Tensor.matmul}
    )

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in self.PRODUCTS:
            args = (*(to_tf32(factor) for factor in args[:2]), *args[2:])
        return function(*args, **(kwargs or {}))


def to_tf32(values: Tensor) -> Tensor:
    """The nearest numbers of eight bits of exponent and ten of mantissa, ties away from zero, as float32."""
    bits = values.detach().contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    rounded = torch.where(values.isfinite(), rounded, values.detach())
    return values + (rounded - values.detach()) if values.requires_grad else rounded
