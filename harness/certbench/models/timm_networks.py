"""``timm:<name>``: any network of timm, untrained, with the data set's channels, classes and image size.

For small images: a network that cuts images into patches gets patches such that there are 8 x 8 of them where it takes
an image size, and patches of one pixel where it does not; any other network's first convolution keeps the resolution
(``small_images``). timm's registry says which convolution is the first.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from certbench.data.catalog import DatasetInfo
from certbench.errors import UsageError, nearest
from certbench.models.small_images import fitted, full_resolution, is_small

PREFIX = "timm:"
PATCHES = 8
"""Along each side of a small image."""


def check_timm_name(name: str) -> None:
    """
    Raises:
        UsageError: timm has no network of that name (without the prefix).
    """
    import timm  # takes seconds to import

    if not timm.is_model(name):
        raise UsageError(f"unknown model {PREFIX + name!r}; {nearest(name, timm.list_models())}")


def timm_network(name: str, info: DatasetInfo) -> nn.Module:
    """The network that timm calls ``name`` (without the prefix).

    Raises:
        UsageError: timm has no such network, or it does not fit the data set's images.
    """
    import timm

    check_timm_name(name)
    options: dict[str, Any] = {"pretrained": False, "num_classes": info.classes, "in_chans": info.shape[0]}
    try:
        drawn = timm.create_model(name, **options)
        resized = _size_options(drawn, info)
        network = timm.create_model(name, **options, **resized) if resized else drawn
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"timm cannot build {name!r} for {info.name}: {reason}; choose another model"
        ) from None
    if is_small(info) and "patch_size" not in resized:
        published: Any = timm.get_pretrained_cfg(name)
        first = published.first_conv
        pooling = "maxpool" if hasattr(network, "maxpool") else ""
        full_resolution(network, first if isinstance(first, str) else first[0], pooling)
    return fitted(network, PREFIX + name, info)


def _size_options(network: nn.Module, info: DatasetInfo) -> dict[str, Any]:
    """What the network's own class is to be told of the size of images."""
    known = inspect.signature(type(network)).parameters
    options: dict[str, Any] = {}
    if "img_size" in known:
        options["img_size"] = info.shape[1:]
    if is_small(info) and "patch_size" in known:
        options["patch_size"] = max(1, info.shape[1] // PATCHES) if "img_size" in known else 1
    return options
