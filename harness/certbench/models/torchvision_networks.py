"""Networks of torchvision as they are, for ImageNet; with a small stem for small images (``small_images``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.models.registry import register_model
from certbench.models.small_images import fitted, full_resolution, is_small, output_shape


def _resnet(name: str) -> None:
    def build(info: DatasetInfo) -> nn.Module:
        network = _torchvision(name)(num_classes=info.classes)
        _take_channels(network, "conv1", info)
        if is_small(info):
            full_resolution(network, "conv1", "maxpool")
        return fitted(network, name, info)

    build.__doc__ = f"torchvision's {name}; for small images its stem is a 3x3 convolution without pooling."
    register_model(name)(build)


def _with_linear_head(name: str) -> None:
    """AlexNet and VGG. For small images the features are flattened as they come, not averaged to a fixed grid."""

    def build(info: DatasetInfo) -> nn.Module:
        network = _torchvision(name)(num_classes=info.classes)
        _take_channels(network, "features.0", info)
        if is_small(info):
            if name == "alexnet":
                full_resolution(network, "features.0")
            _flatten_features(network, name, info)
        return fitted(network, name, info)

    build.__doc__ = f"torchvision's {name}; for small images its features are flattened as they come."
    register_model(name)(build)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models  # takes a second to import

    builder: Callable[..., nn.Module] = getattr(models, name)
    return builder


def _take_channels(network: nn.Module, first: str, info: DatasetInfo) -> None:
    """Give the first convolution the number of channels that the images have."""
    old = network.get_submodule(first)
    assert isinstance(old, nn.Conv2d)  # each of the networks named below begins with one
    if old.in_channels == info.shape[0]:
        return
    parent, _, child = first.rpartition(".")
    geometry: Any = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = nn.Conv2d(info.shape[0], old.out_channels, **geometry, bias=old.bias is not None)
    setattr(network.get_submodule(parent), child, new)


def _flatten_features(network: nn.Module, name: str, info: DatasetInfo) -> None:
    network.avgpool = nn.Identity()
    features, classifier = network.features, network.classifier
    assert isinstance(features, nn.Sequential)  # in both families
    assert isinstance(classifier, nn.Sequential)
    position = next(i for i, layer in enumerate(classifier) if isinstance(layer, nn.Linear))
    incoming = math.prod(output_shape(features, name, info))
    hidden: Any = classifier[position].out_features
    classifier[position] = nn.Linear(incoming, hidden)


for _name in ("resnet18", "resnet34", "resnet50"):
    _resnet(_name)
for _name in ("alexnet", "vgg11", "vgg16"):
    _with_linear_head(_name)
