"""What a data set is: shapes, normalisation, augmentation, terms, and the files it is made of. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from certbench.errors import DataError, UsageError
from certbench.recipe import Augmentation

VALIDATION = "-validation"
"""Ends the names of data sets whose test images are held out of another's training images."""


@dataclass(frozen=True)
class FileInfo:
    """One file: name, size in bytes, and SHA-256 (or the publisher's MD5, where nobody states more).

    Size and digest are those of the *unpacked* content, and a ``.gz`` of it is as good as the file; unless the name
    itself is that of an archive, which is then checked as it is.
    """

    name: str
    size: int
    sha256: str = ""
    md5: str = ""

    @property
    def is_archive(self) -> bool:
        return self.name.endswith((".gz", ".zip", ".tar"))


@dataclass(frozen=True)
class DatasetInfo:
    """One data set. Plugins name theirs by the hook ``register_datasets``.

    ``shape`` is (channels, height, width); a pixel in [0, 1] is its stored integer divided by ``levels``. ``mean``
    and ``std``, per channel and in raw pixel units, are the normalisation inside the network. ``flip``,
    ``crop_padding`` and ``resized_crop`` are the published augmentation, see :attr:`augmentation`.

    ``folders`` are the places under the data folder where the files may lie, the first being where ``fetch`` puts
    them; ``unpacked`` those where the archives may lie unpacked. ``by_hand`` says which published files to put there
    where there is no network. ``digest`` is the :func:`certbench.data.dataset.dataset_digest` that the loaded data
    must have; empty where no copy was at hand to take it from, so that it is recorded and not compared.

    ``reader`` and ``fetcher`` name functions as entry points do, ``package.module:function``, so that naming a data
    set imports nothing. ``reader(info, root)`` returns the training and the test part, each a pair of arrays: uint8
    images (N, *shape) and integer labels (N,), in published order. ``fetcher(info, folder, wanted, reporter)`` puts
    verified files into ``folder``. ``validation_per_class`` images of each class can be held out of training.
    ``streamed``: too large for memory, decoded while training.
    """

    name: str
    title: str
    classes: int
    shape: tuple[int, int, int]
    levels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    class_names: tuple[str, ...]
    licence: str
    citation: str
    digest: str
    crop_padding: int = 0
    flip: bool = False
    folders: tuple[str, ...] = ()
    files: tuple[FileInfo, ...] = ()
    by_hand: str = ""
    reader: str = ""
    fetcher: str = ""
    unpacked: tuple[str, ...] = ()
    validation_per_class: int = 0
    resized_crop: tuple[float, float] | None = None
    streamed: bool = False
    whole: DatasetInfo | None = None
    """Of a data set with held-out images: the one they are held out of."""

    @property
    def augmentation(self) -> Augmentation:
        """The published one: flip, crop after repeating the edge, or a resized crop."""
        return Augmentation(flip=self.flip, crop_padding=self.crop_padding, resized_crop=self.resized_crop)

    def held_out(self) -> DatasetInfo:
        """The data set for choosing settings: its test images are held out of this one's training images.

        Raises:
            UsageError: this one holds none out.
        """
        size = self.validation_per_class * self.classes
        if not size:
            raise UsageError(f"{self.name} holds no validation images out of its training images")
        return replace(
            self,
            name=self.name + VALIDATION,
            title=f"{self.title}, images held out of training",
            train_size=self.train_size - size,
            test_size=size,
            digest="",
            validation_per_class=0,
            whole=self,
        )


def function(info: DatasetInfo, kind: str) -> Callable[..., Any]:
    """What the entry names as its ``reader`` or ``fetcher``.

    Raises:
        DataError: it cannot be imported.
    """
    path = getattr(info, kind)
    module, _, name = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"the {kind} {path!r} of {info.name} cannot be imported: {error}") from None
    return found
