"""The residual networks of arXiv 2103.17268: batch norm after every convolution, no pooling, a hidden linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from certbench.data.catalog import DatasetInfo
from certbench.models.cnn import head
from certbench.models.registry import register_model


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``; without a ``shortcut``, x itself is added."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Sequential | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.branch(x) + self.shortcut(x))
        return result


def projection(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution with batch norm where the shape changes."""
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


def basic_block(c_in: int, c_out: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    branch = nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, padding=1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
        nn.Conv2d(c_out, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
    )
    return Residual(branch, projection(c_in, c_out, stride))


def grouped_block(c_in: int, width: int, stride: int, groups: int = 2) -> Residual:
    """1x1 to ``width``, grouped 3x3, 1x1 to twice the width."""
    branch = nn.Sequential(
        nn.Conv2d(c_in, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride, padding=1, groups=groups),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 1),
        nn.BatchNorm2d(2 * width),
    )
    return Residual(branch, projection(c_in, 2 * width, stride))


def stem(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]


@register_model("wide-resnet-8")
def wide_resnet_8(info: DatasetInfo) -> nn.Module:
    """Wide-ResNet of arXiv 2103.17268: three basic blocks of width 128, 256, 512, linear 512.

    For images of 64 pixels and more the widths are 160, 320, 640, as published for TinyImageNet.
    """
    channels, side, _ = info.shape
    width = 160 if side >= 64 else 128
    return nn.Sequential(
        *stem(channels, 16),
        basic_block(16, width, 1),
        basic_block(width, 2 * width, 2),
        basic_block(2 * width, 4 * width, 2),
        *head(4 * width * (-(-side // 4)) ** 2, 512, info.classes),
    )


@register_model("resnext-2x32")
def resnext(info: DatasetInfo) -> nn.Module:
    """ResNeXt of arXiv 2103.17268: three blocks of two groups, widths 128, 256, 512, linear 512.

    For images of 64 pixels and more: six blocks, two each of widths 32, 64, 128, as published for TinyImageNet.
    """
    channels, side, _ = info.shape
    if side >= 64:
        return nn.Sequential(
            *stem(channels, 16),
            grouped_block(16, 16, 1),
            grouped_block(32, 16, 1),
            grouped_block(32, 32, 2),
            grouped_block(64, 32, 1),
            grouped_block(64, 64, 2),
            grouped_block(128, 64, 1),
            *head(128 * (-(-side // 4)) ** 2, 512, info.classes),
        )
    return nn.Sequential(
        *stem(channels, 64),
        grouped_block(64, 64, 1),
        grouped_block(128, 128, 2),
        grouped_block(256, 256, 2),
        *head(512 * (-(-side // 4)) ** 2, 512, info.classes),
    )
