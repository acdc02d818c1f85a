"""The ImageNet networks of arXiv 2303.11552's released code, as plain ``Sequential`` networks of any input channels.

VGG11 and VGG16 are torchvision's. AlexNet is wider than torchvision's, and the residual networks have biased
convolutions and shortcuts without batch norm, so both are written out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from certbench.data.catalog import DatasetInfo


def alexnet(info: DatasetInfo) -> nn.Sequential:
    """Convolutions 96, 256, 384, 384, 256, linear 4096 and 4096 with dropout."""
    convolutions = nn.Sequential(
        *_relu(nn.Conv2d(info.shape[0], 96, 11, 4, 1)),
        nn.MaxPool2d(3, 2),
        *_relu(nn.Conv2d(96, 256, 5, 1, 2)),
        nn.MaxPool2d(3, 2),
        *_relu(nn.Conv2d(256, 384, 3, 1, 1)),
        *_relu(nn.Conv2d(384, 384, 3, 1, 1)),
        *_relu(nn.Conv2d(384, 256, 3, 1, 1)),
        nn.MaxPool2d(3, 2),
    )
    with torch.no_grad():
        features = convolutions(torch.zeros(1, *info.shape)).numel()
    return nn.Sequential(
        *convolutions,
        nn.Flatten(),
        *_relu(nn.Linear(features, 4096)),
        nn.Dropout(),
        *_relu(nn.Linear(4096, 4096)),
        nn.Dropout(),
        nn.Linear(4096, info.classes),
    )


def vgg(depth: int) -> Callable[[DatasetInfo], nn.Sequential]:
    def build(info: DatasetInfo) -> nn.Sequential:
        import torchvision

        network = getattr(torchvision.models, f"vgg{depth}")(num_classes=info.classes, init_weights=False)
        first = nn.Conv2d(info.shape[0], 64, 3, 1, 1)
        return nn.Sequential(first, *network.features[1:], network.avgpool, nn.Flatten(), *network.classifier)

    return build


def resnet(*blocks: int) -> Callable[[DatasetInfo], nn.Sequential]:
    """Basic blocks of 64, 128, 256 and 512 channels, ``blocks`` of each."""

    def build(info: DatasetInfo) -> nn.Sequential:
        layers: list[nn.Module] = []
        c_in = 64
        for stage, count in enumerate(blocks):
            c_out = 64 * 2**stage
            for place in range(count):
                layers.append(BasicBlock(c_in, c_out, 2 if stage and not place else 1))
                c_in = c_out
        return nn.Sequential(
            nn.Conv2d(info.shape[0], 64, 7, 2, 3),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c_in, info.classes),
        )

    return build


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the shortcut is a biased 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


def _relu(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer, nn.ReLU()


IMAGENET: dict[str, Callable[[DatasetInfo], nn.Sequential]] = {
    "alexnet-96": alexnet,
    "vgg11": vgg(11),
    "vgg16": vgg(16),
    "resnet18-biased": resnet(2, 2, 2, 2),
    "resnet34-biased": resnet(3, 4, 6, 3),
}
"""Names that say where they differ from the networks that everybody means."""
