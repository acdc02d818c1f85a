"""Fitting networks that were drawn for 224 x 224 photographs to images of 28 to 64 pixels.

Their stems shrink an image to a quarter before anything is learnt from it. For small images the first convolution
becomes 3x3 with stride 1 and the pooling behind it goes, as is customary on CIFAR; the rest stays as it was drawn.
"""

from __future__ import annotations

import torch
from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.errors import UsageError

SMALL = 128
"""Images with a side below this get the small stem."""


def is_small(info: DatasetInfo) -> bool:
    return min(info.shape[1:]) < SMALL


def full_resolution(network: nn.Module, convolution: str, pooling: str = "") -> None:
    """Let the named convolution keep the resolution of its input, and take the named pooling out.

    A kernel larger than 3x3 becomes 3x3, with weights of the network's own kind (Kaiming, by fan-out); a smaller one
    keeps its weights and loses its stride alone.
    """
    old = network.get_submodule(convolution)
    if not isinstance(old, nn.Conv2d):
        raise UsageError(f"the stem {convolution} of {type(network).__name__} is not a convolution")
    if max(old.kernel_size) > 3:
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        _replace(network, convolution, new)
    else:
        old.stride = (1, 1)
    if pooling:
        _replace(network, pooling, nn.Identity())


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def output_shape(network: nn.Module, name: str, info: DatasetInfo) -> tuple[int, ...]:
    """What the network makes of one image of the data set, in evaluation mode.

    Raises:
        UsageError: it fails; says why.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    training = network.training
    try:
        with torch.no_grad():
            return tuple(network.eval()(torch.zeros(1, *info.shape, device=device)).shape)
    except Exception as error:  # networks of others fail in their own ways on images they were not drawn for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(_misfit(name, info, reason)) from error
    finally:
        network.train(training)


def fitted(network: nn.Module, name: str, info: DatasetInfo) -> nn.Module:
    """The network itself, once it has been seen to map images of this data set to one logit per class.

    Raises:
        UsageError: it does not; says why.
    """
    found = output_shape(network, name, info)
    if found != (1, info.classes):
        raise UsageError(_misfit(name, info, f"for one of them it returns {found}"))
    return network


def _misfit(name: str, info: DatasetInfo, reason: str) -> str:
    size = "x".join(map(str, info.shape))
    return f"model {name!r} does not fit images of {size} in {info.classes} classes ({reason}); choose another model"
