"""ImageNet as a data set: the training images streamed, the test images scaled once and memory-mapped.

Labels are the ranks of the 1,000 WordNet ids. The test set is the published validation set. Images are in the order of
torchvision's ImageFolder, by class and then by file name, which is also the order that published logs count in.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from certbench.data.cache import read_cache, write_cache
from certbench.data.dataset import Dataset, Split, dataset_digest
from certbench.data.imagenet_files import RESIZED, TRAIN, VAL, place
from certbench.data.info import DatasetInfo
from certbench.data.manifest import Manifest, read_manifest
from certbench.data.places import fetch_command
from certbench.data.stream import Stream
from certbench.errors import DataError


def load(info: DatasetInfo, root: Path) -> Dataset:
    """ImageNet, its training images as they were published.

    Raises:
        DataError: it is not there, not prepared, or not what the catalogue says.
    """
    folder = place(info, root)
    return _load(info, root, folder, folder / TRAIN)


def load_resized(info: DatasetInfo, root: Path) -> Dataset:
    """ImageNet with training images from the shards that ``fetch`` wrote."""
    folder = place(info, root)
    return _load(info, root, folder, folder / RESIZED / TRAIN)


def _load(info: DatasetInfo, root: Path, folder: Path, train: Path) -> Dataset:
    for path in (train, folder / VAL):
        if not path.is_file():
            raise DataError(
                f"{info.name} is not ready in {folder}: no {path.relative_to(folder)}; put {info.by_hand} there and "
                f"run `{fetch_command(info, root)}`"
            )
    parts = [read_manifest(train), read_manifest(folder / VAL)]
    for part, size, name in zip(parts, (info.train_size, info.test_size), ("training", "test"), strict=True):
        if len(part) != size or len(part.wnids) != info.classes:
            raise DataError(
                f"{info.name}: {len(part):,} {name} images of {len(part.wnids):,} classes where {size:,} of "
                f"{info.classes:,} were expected; remove {TRAIN} and {VAL} in {folder} and run "
                f"`{fetch_command(info, root)}`"
            )
    if parts[0].wnids != parts[1].wnids:
        raise DataError(f"{info.name}: {folder / 'train'} and {folder / 'val'} have different classes")
    digest = hashlib.sha256("\n".join([info.name, *(part.digest for part in parts)]).encode()).hexdigest()
    return Dataset(
        info, _stream(info, parts[0]), test_images(_stream(info, parts[1]), "imagenet-test", root), digest
    )


def _stream(info: DatasetInfo, manifest: Manifest) -> Stream:
    return Stream(manifest, np.arange(len(manifest)), info.shape[1])


def hold_out(info: DatasetInfo, whole: Dataset, root: Path) -> Dataset:
    """``whole`` with the images that it holds out of training as its test images."""
    assert isinstance(whole.train, Stream)  # as load made it
    train, test = whole.train.hold_out(whole.validation)
    digest = hashlib.sha256(f"{info.name}\n{whole.digest}".encode()).hexdigest()
    return Dataset(info, train, test_images(test, f"{info.name}-test", root), digest)


def test_images(stream: Stream, name: str, root: Path) -> Split:
    """The decoded images of a stream, from a memory-mapped cache after the first time."""
    source = hashlib.sha256(
        f"{stream.manifest.digest} {stream.side}".encode() + stream.positions.tobytes()
    ).hexdigest()
    found = read_cache(name, root, source)
    if found is not None:
        return found[1]["test"]
    split = stream.test_split()
    write_cache(name, root, source, dataset_digest(name, split), {"test": split})
    return split
