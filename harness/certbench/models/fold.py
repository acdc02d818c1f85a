"""The deployed form of a trained network: evaluation mode, batch norms folded into the layers before them.

This is the network that is certified, audited and exported, so that all three speak of the same numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
"""Modules between a layer and its batch norm that do nothing in evaluation mode."""


def deployed_network(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in evaluation mode in which every batch norm that can be folded is folded.

    A batch norm is folded where it alone reads the result of one convolution or linear layer, each called once. The
    new weights are computed in float64 and rounded once to the layer's own type. What cannot be folded stays as it
    is, and so does a network whose ``forward`` cannot be followed symbolically. Folding twice changes nothing.
    """
    deployed = copy.deepcopy(network).eval()
    for layer_name, norm_name in _pairs(deployed):
        layer, norm = deployed.get_submodule(layer_name), deployed.get_submodule(norm_name)
        _fold(layer, norm)
        parent, _, child = norm_name.rpartition(".")
        setattr(deployed.get_submodule(parent), child, nn.Identity())
    return deployed.requires_grad_(False)


def _fold(layer: Any, norm: Any) -> None:
    """Rewrite ``norm(layer(x))`` as one affine layer with weight (out, ...) and bias (out,)."""
    kind = layer.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight.double() * scale
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
    bias = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(weight.detach().to(kind))
    layer.bias = nn.Parameter(bias.detach().to(kind))


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """(layer, batch norm) by module path, where the norm can be folded into the layer."""
    try:
        graph = _Tracer().trace(network)
    except Exception:  # symbolic tracing raises many types; such a network keeps its batch norms
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    found = []
    for node in graph.nodes:
        norm = _module(network, node)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or calls[node.target] != 1:
            continue
        source = _layer_before(network, node)
        layer = _module(network, source) if source is not None else None
        if source is None or not isinstance(layer, AFFINE) or calls[source.target] != 1:
            continue
        own = [layer.weight, norm.weight, *([layer.bias] if layer.bias is not None else [])]
        if _same_channels(layer, norm) and all(owners[id(p)] <= 1 for p in own):
            found.append((str(source.target), str(node.target)))
    return found


class _Tracer(fx.Tracer):
    """Stops at layers and batch norms, those of users' own subclasses included."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, (*AFFINE, _BatchNorm)) or super().is_leaf_module(module, path)


def _module(network: nn.Module, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _layer_before(network: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose value reaches ``node`` unchanged and goes nowhere else."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    while isinstance(source, fx.Node) and len(source.users) == 1:
        if not isinstance(_module(network, source), _TRANSPARENT):
            return source
        source = source.args[0] if len(source.args) == 1 else None
    return None


def _same_channels(layer: nn.Module, norm: Any) -> bool:
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.shape[0] != norm.num_features:
        return False  # a parametrised weight is computed anew in every pass
    return _plain(layer) and _plain(norm)


def _plain(module: nn.Module) -> bool:
    """Whether a module computes what its kind says: no forward of its own, no hooks."""
    usual = {kind.forward for kind in (*AFFINE, _BatchNorm)}
    return type(module).forward in usual and not (module._forward_hooks or module._forward_pre_hooks)
