"""The LeNet that smoothed networks for MNIST are trained on (SmoothMix, arXiv 2111.09277)."""

from __future__ import annotations

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.errors import UsageError
from certbench.models.registry import register_model


@register_model("lenet")
def lenet(info: DatasetInfo) -> nn.Module:
    """Two 5x5 convolutions of 20 and 50 channels, each max-pooled by 2, linear 500: 431,080 parameters on MNIST.

    Raises:
        UsageError: images of less than 16 pixels, of which the unpadded convolutions leave nothing.
    """
    channels, height, width = info.shape
    if min(height, width) < 16:
        raise UsageError(f"lenet needs images of 16 pixels or more; {info.name} has {height}x{width}")
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * rows * columns, 500),
        nn.ReLU(),
        nn.Linear(500, info.classes),
    )
