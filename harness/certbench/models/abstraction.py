"""Small networks of the verification literature, without batch norm: DM, FC and LeNet5, one activation throughout.

Layers as in the released code of Zhang et al. 2023 (arXiv 2303.11552), which calls the first three DM. ``fc3`` and ``fc5``
count the input layer and have two and three linear layers. Every network is a plain ``nn.Sequential``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.models.registry import register_model

Activation = Callable[[], nn.Module]


def dm_small(info: DatasetInfo, activation: Activation) -> nn.Module:
    """Convolutions 4x4 with 16 (stride 2) and 32 channels, linear 100."""
    channels, side, _ = info.shape
    return nn.Sequential(
        *_convolution(channels, 16, 4, 2, 2, activation),
        *_convolution(16, 32, 4, 1, 2, activation),
        *_head(32 * (side // 2 + 2) ** 2, (100,), info.classes, activation),
    )


def dm_medium(info: DatasetInfo, activation: Activation) -> nn.Module:
    """Convolutions 3x3 and 4x4 (stride 2) with 32 channels, the same with 64, linear 512 and 512."""
    channels, side, _ = info.shape
    return nn.Sequential(
        *_convolution(channels, 32, 3, 1, 1, activation),
        *_convolution(32, 32, 4, 2, 2, activation),
        *_convolution(32, 64, 3, 1, 1, activation),
        *_convolution(64, 64, 4, 2, 2, activation),
        *_head(64 * (side // 4 + 1) ** 2, (512, 512), info.classes, activation),
    )


def dm_large(info: DatasetInfo, activation: Activation) -> nn.Module:
    """Five convolutions 3x3 with 64, 64, 128 (stride 2), 128 and 128 channels, linear 512."""
    channels, side, _ = info.shape
    return nn.Sequential(
        *_convolution(channels, 64, 3, 1, 1, activation),
        *_convolution(64, 64, 3, 1, 1, activation),
        *_convolution(64, 128, 3, 2, 1, activation),
        *_convolution(128, 128, 3, 1, 1, activation),
        *_convolution(128, 128, 3, 1, 1, activation),
        *_head(128 * ((side + 1) // 2) ** 2, (512,), info.classes, activation),
    )


def fc3(info: DatasetInfo, activation: Activation) -> nn.Module:
    """Linear 512."""
    channels, height, width = info.shape
    return nn.Sequential(*_head(channels * height * width, (512,), info.classes, activation))


def fc5(info: DatasetInfo, activation: Activation) -> nn.Module:
    """Linear 512 and 128."""
    channels, height, width = info.shape
    return nn.Sequential(*_head(channels * height * width, (512, 128), info.classes, activation))


@register_model("lenet5")
def lenet5(info: DatasetInfo) -> nn.Module:
    """Convolutions 5x5 with 6 and 16 channels, each with max pooling, linear 120 and 84."""
    channels, side, _ = info.shape
    return nn.Sequential(
        *_convolution(channels, 6, 5, 1, 2, nn.ReLU),
        nn.MaxPool2d(2),
        *_convolution(6, 16, 5, 1, 0, nn.ReLU),
        nn.MaxPool2d(2),
        *_head(16 * ((side // 2 - 4) // 2) ** 2, (120, 84), info.classes, nn.ReLU),
    )


def _convolution(
    c_in: int, c_out: int, kernel: int, stride: int, padding: int, activation: Activation
) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding), activation()]


def _head(features: int, hidden: tuple[int, ...], classes: int, activation: Activation) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(features, width), activation()]
        features = width
    return [*layers, nn.Linear(features, classes)]


ACTIVATIONS: dict[str, Activation] = {"": nn.ReLU, "-sigmoid": nn.Sigmoid, "-tanh": nn.Tanh}
"""What a model's name ends in."""

for _name, _builder in (
    ("dm-small", dm_small),
    ("dm-medium", dm_medium),
    ("dm-large", dm_large),
    ("fc3", fc3),
    ("fc5", fc5),
):
    for _ending, _activation in ACTIVATIONS.items():
        _build = partial(_builder, activation=_activation)
        _build.__doc__ = _builder.__doc__
        register_model(f"{_name}{_ending}")(_build)
