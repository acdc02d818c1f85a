"""What a network consists of: its layers, parameters and multiply-adds, without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Layer:
    """One module without modules inside, each time it is called; ``output`` is the shape for one image."""

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """``parameters`` and ``multiply_adds`` (of one image) are those of the whole network, functional operations included."""

    layers: list[Layer]
    parameters: int
    multiply_adds: int


def summarize(network: nn.Module, shape: tuple[int, ...]) -> Summary:
    """Pass one image of ``shape`` through the network in evaluation mode, on its own device; ``meta`` costs nothing."""
    layers: list[Layer] = []
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    before: list[int] = []

    def enter(_module: nn.Module, _inputs: Any) -> None:
        before.append(counter.get_total_flops())

    def leave(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        operations = counter.get_total_flops() - before.pop()
        found = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
        count = sum(p.numel() for p in module.parameters())
        layers.append(Layer(name, type(module).__name__, found, count, operations // 2))

    leaves = [(name, module) for name, module in network.named_modules() if not next(module.children(), None)]
    handles = [module.register_forward_pre_hook(enter) for _, module in leaves]
    handles += [module.register_forward_hook(partial(leave, name)) for name, module in leaves]
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad(), counter:
            network.eval()(torch.zeros(1, *shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return Summary(layers, sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
