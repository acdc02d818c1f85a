"""One interval loss in three forms: by the engine, by its rules alone, and written out without either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.bounds import Graph, input_box, interval
from certbench.bounds.specification import merged_margins
from certbench.training import robust_cross_entropy


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
        eye = torch.eye(last.out_features, device=labels.device)
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
