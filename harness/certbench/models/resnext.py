"""ResNeXt-29 for CIFAR (arXiv 1611.05431, section 5.3): three stages of three grouped bottleneck blocks."""

from __future__ import annotations

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.models.registry import register_model
from certbench.models.residual import Residual


def resnext29(cardinality: int, base_width: int, info: DatasetInfo) -> nn.Module:
    """``cardinality`` groups of ``base_width`` channels, doubled from stage to stage; 256, 512, 1024 channels out."""
    layers: list[nn.Module] = [*_unit(info.shape[0], 64, 3), nn.ReLU()]
    c_in = 64
    for stage in range(3):
        width, c_out = cardinality * base_width * 2**stage, 256 * 2**stage
        for block in range(3):
            layers.append(_block(c_in, width, c_out, 2 if stage and not block else 1, cardinality))
            c_in = c_out
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, info.classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _unit(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(c_out)]


def _block(c_in: int, width: int, c_out: int, stride: int, cardinality: int) -> Residual:
    branch = nn.Sequential(
        *_unit(c_in, width, 1),
        nn.ReLU(),
        *_unit(width, width, 3, stride, cardinality),
        nn.ReLU(),
        *_unit(width, c_out, 1),
    )
    return Residual(branch, nn.Sequential(*_unit(c_in, c_out, 1, stride)) if c_in != c_out else None)


def _register(name: str, cardinality: int, base_width: int) -> None:
    def build(info: DatasetInfo) -> nn.Module:
        return resnext29(cardinality, base_width, info)

    build.__doc__ = f"ResNeXt-29 {cardinality}x{base_width}d for CIFAR (arXiv 1611.05431)."
    register_model(name)(build)


_register("resnext29", 8, 64)
for _cardinality, _width in ((2, 64), (4, 64), (32, 4)):
    _register(f"resnext29-{_cardinality}x{_width}d", _cardinality, _width)
