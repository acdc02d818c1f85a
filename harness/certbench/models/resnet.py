"""The thin residual networks for CIFAR of arXiv 1512.03385, section 4.2, as randomized smoothing uses them.

Three groups of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers. Where the shape changes the shortcut is a
1x1 convolution with batch norm, as in the networks that Cohen et al. (arXiv 1902.02918) and their followers train.
"""

from __future__ import annotations

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.models.registry import register_model
from certbench.models.residual import Residual

WIDTHS = (16, 32, 64)


def thin_resnet(depth: int, info: DatasetInfo) -> nn.Module:
    """The network of ``depth`` = 6n + 2 layers; convolutions without biases, drawn from N(0, 2 / (k k channels out))."""
    blocks = (depth - 2) // 6
    layers: list[nn.Module] = [_convolution(info.shape[0], 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for group, next_width in enumerate(WIDTHS):
        for block in range(blocks):
            stride = 2 if group and not block else 1
            layers.append(_block(width, next_width, stride))
            width = next_width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, info.classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _convolution(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def _block(c_in: int, c_out: int, stride: int) -> Residual:
    branch = nn.Sequential(
        _convolution(c_in, c_out, 3, stride),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
        _convolution(c_out, c_out, 3),
        nn.BatchNorm2d(c_out),
    )
    changes = stride != 1 or c_in != c_out
    shortcut = nn.Sequential(_convolution(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out)) if changes else None
    return Residual(branch, shortcut)


def _register(depth: int) -> None:
    def build(info: DatasetInfo) -> nn.Module:
        return thin_resnet(depth, info)

    build.__doc__ = (
        f"ResNet-{depth} for CIFAR (arXiv 1512.03385): {(depth - 2) // 2} basic blocks, widths 16 to 64."
    )
    register_model(f"resnet{depth}")(build)


for _depth in (20, 32, 44, 56, 110):
    _register(_depth)
