"""From a name to a verified :class:`~certbench.data.dataset.Dataset`, by way of the cache where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from certbench.data.cache import read_cache, write_cache
from certbench.data.catalog import dataset_info
from certbench.data.dataset import Dataset, Split, dataset_digest
from certbench.data.formats import Arrays
from certbench.data.info import DatasetInfo, function
from certbench.data.places import data_root, fingerprint
from certbench.errors import DataError


def load_dataset(data: str | DatasetInfo, root: Path | None = None) -> Dataset:
    """Find, verify and read a data set; ``root`` defaults as :func:`~certbench.data.places.data_root` says.

    Args:
        data: a built-in data set's name, or the entry of any other.

    Raises:
        UsageError: no data set has this name.
        DataError: files are missing, unreadable or damaged, or do not hold what the catalogue says.
    """
    info = dataset_info(data) if isinstance(data, str) else data
    root = data_root(root)
    if info.whole is not None:
        return _held_out(info, load_dataset(info.whole, root), root)
    if info.streamed:
        dataset: Dataset = function(info, "reader")(info, root)
        return dataset
    return _cached(info, root) or read_dataset(info, root)


def _held_out(info: DatasetInfo, whole: Dataset, root: Path) -> Dataset:
    if not isinstance(whole.train, Split):
        from certbench.data.imagenet import hold_out

        return hold_out(info, whole, root)
    rest = np.setdiff1d(np.arange(len(whole.train)), whole.validation)
    train, test = whole.train.take(rest), whole.train.take(whole.validation)
    info = replace(info, train_size=len(train), test_size=len(test))
    return Dataset(info, train, test, dataset_digest(info.name, train, test))


def _cached(info: DatasetInfo, root: Path) -> Dataset | None:
    """The data set from a cache of the pinned content, or, where none is pinned, of the files that are there."""
    found = read_cache(info.name, root, _source(info, root)) if info.files else None
    if found is None:
        return None
    digest, parts = found
    if parts.keys() != {"train", "test"} or digest != (info.digest or digest):
        return None
    return Dataset(info, parts["train"], parts["test"], digest)


def _source(info: DatasetInfo, root: Path) -> str:
    return info.digest or fingerprint(info, root)


def read_dataset(info: DatasetInfo, root: Path) -> Dataset:
    """As :func:`load_dataset`, from the published files whether or not there is a cache, which is written anew."""
    train, test = function(info, "reader")(info, root)
    parts = {
        "train": _checked(info, "training", train, info.train_size),
        "test": _checked(info, "test", test, info.test_size),
    }
    dataset = Dataset(info, parts["train"], parts["test"], dataset_digest(info.name, *parts.values()))
    if info.digest and dataset.digest != info.digest:
        raise DataError(
            f"{info.name}: the loaded images and labels have digest {dataset.digest} where {info.digest} was expected; "
            f"results would not be comparable, so check the installed {_origin(info)}"
        )
    if info.files:
        write_cache(info.name, root, _source(info, root), dataset.digest, parts)
    return dataset


def _origin(info: DatasetInfo) -> str:
    return "certbench, Pillow and data files" if info.files else "scikit-learn, whose bundled copy is read"


def _checked(info: DatasetInfo, part: str, arrays: Arrays, size: int) -> Split:
    images, labels = arrays
    if images.shape != (size, *info.shape) or labels.shape != (size,):
        raise DataError(
            f"{info.name}: {part} images {images.shape} and labels {labels.shape} where {(size, *info.shape)} and "
            f"{(size,)} were expected"
        )
    if labels.min() < 0 or labels.max() >= info.classes:
        raise DataError(
            f"{info.name}: {part} labels reach {labels.min()} to {labels.max()}; classes: {info.classes}"
        )
    if images.max() > info.levels:
        raise DataError(f"{info.name}: a {part} pixel is {images.max()}, above {info.levels}")
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
