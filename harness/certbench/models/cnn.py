"""Plain convolutional networks with batch norm after every hidden layer, as certified training uses them."""

from __future__ import annotations

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.models.registry import register_model


def convolution(c_in: int, c_out: int, kernel: int, stride: int) -> list[nn.Module]:
    """Convolution (padding 1), batch norm, ReLU."""
    return [nn.Conv2d(c_in, c_out, kernel, stride, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]


def head(features: int, hidden: int, classes: int) -> list[nn.Module]:
    """Flatten, hidden linear layer with batch norm and ReLU, classification layer."""
    return [
        nn.Flatten(),
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    ]


@register_model("cnn-small")
def cnn_small(info: DatasetInfo) -> nn.Module:
    """Convolutions 4x4 stride 2 with 16 and 32 channels, linear 100: two cores train it in minutes."""
    channels, height, width = info.shape
    return nn.Sequential(
        *convolution(channels, 16, 4, 2),
        *convolution(16, 32, 4, 2),
        *head(32 * (height // 4) * (width // 4), 100, info.classes),
    )


@register_model("cnn7")
def cnn7(info: DatasetInfo) -> nn.Module:
    """CNN-7 of arXiv 2103.17268: five 3x3 convolutions of width 64 and 128, linear 512.

    For images of 64 pixels and more the fifth convolution also has stride 2, as published for TinyImageNet.
    """
    channels, side, _ = info.shape
    last_stride = 2 if side >= 64 else 1
    reduced = -(-side // 2) if last_stride == 1 else -(-side // 4)
    return nn.Sequential(
        *convolution(channels, 64, 3, 1),
        *convolution(64, 64, 3, 1),
        *convolution(64, 128, 3, 2),
        *convolution(128, 128, 3, 1),
        *convolution(128, 128, 3, last_stride),
        *head(128 * reduced * reduced, 512, info.classes),
    )
