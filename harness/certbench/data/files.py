"""From verified files to a :class:`~certbench.data.dataset.Dataset`: one reader per published format."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from certbench.data.catalog import DatasetInfo, dataset_info
from certbench.data.dataset import Dataset, Split, dataset_digest
from certbench.data.places import data_root, fetch_command, locate, missing_message, read_verified
from certbench.errors import DataError

Arrays = tuple[np.ndarray, np.ndarray]
"""Images and labels of one part, not yet checked."""

DIGITS_TEST_PER_CLASS = 36


def load_dataset(name: str, root: Path | None = None) -> Dataset:
    """Find, verify and read a data set; ``root`` defaults as :func:`~certbench.data.places.data_root` says.

    Raises:
        UsageError: no data set has this name.
        DataError: files are missing, unreadable or damaged, or do not hold what the catalogue says.
    """
    info = dataset_info(name)
    train, test = _READERS[name](info, data_root(root))
    dataset = _assemble(info, train, test)
    if dataset.digest != info.digest:
        raise DataError(
            f"{name}: the loaded images and labels have digest {dataset.digest} where {info.digest} was expected; "
            f"results would not be comparable, so check the installed {_origin(info)}"
        )
    return dataset


def _origin(info: DatasetInfo) -> str:
    return "certbench and its data files" if info.files else "scikit-learn, whose bundled copy is read"


def _assemble(info: DatasetInfo, train: Arrays, test: Arrays) -> Dataset:
    train_split = _checked(info, "training", train, info.train_size)
    test_split = _checked(info, "test", test, info.test_size)
    return Dataset(info, train_split, test_split, dataset_digest(info.name, train_split, test_split))


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


def _read_files(info: DatasetInfo, root: Path) -> dict[str, bytearray]:
    """Verified content by file name."""
    found = locate(info, root)
    contents = {}
    for file, path in zip(info.files, found.paths, strict=True):
        if path is None:
            raise DataError(missing_message(info, root, found))
        contents[file.name] = read_verified(path, file, f"run `{fetch_command(info, root)}`")
    return contents


# Digits


def _read_digits(info: DatasetInfo, root: Path) -> tuple[Arrays, Arrays]:
    """The copy that comes with scikit-learn, divided by :func:`digits_test_indices`."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.asarray(bunch.images).astype(np.uint8)[:, None]
    labels = np.asarray(bunch.target).astype(np.int64)
    in_test = np.zeros(len(labels), dtype=bool)
    in_test[digits_test_indices(labels)] = True
    return (images[~in_test], labels[~in_test]), (images[in_test], labels[in_test])


def digits_test_indices(labels: np.ndarray) -> list[int]:
    """Which digits are the test set: per class, the 36 whose position in the file has the smallest SHA-256.

    The position is hashed as decimal text. No library's random generator takes part, so that the split stays the
    same for good; 36 of each class are 20 % of the 1797 images. Both parts keep the file's order.
    """
    chosen: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda position: hashlib.sha256(str(position).encode()).digest())
        chosen.extend(members[:DIGITS_TEST_PER_CLASS])
    return sorted(chosen)


# MNIST


def _read_mnist(info: DatasetInfo, root: Path) -> tuple[Arrays, Arrays]:
    """Four IDX files, in the catalogue's order: training images and labels, test images and labels."""
    arrays = [_parse_idx(name, content) for name, content in _read_files(info, root).items()]
    train_images, train_labels, test_images, test_labels = arrays
    return (
        (train_images[:, None], train_labels.astype(np.int64)),
        (test_images[:, None], test_labels.astype(np.int64)),
    )


def _parse_idx(name: str, content: bytearray) -> np.ndarray:
    """IDX of unsigned bytes: two zeros, type 8, number of dimensions, big-endian dimensions, then the bytes."""
    dimensions = int.from_bytes(content[3:4], "big") if content[:3] == b"\x00\x00\x08" else 0
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if not shape or header + int(np.prod(shape)) != len(content):
        raise DataError(f"{name} is not an IDX file of unsigned bytes; header {bytes(content[:16]).hex()}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# CIFAR-10


def _read_cifar10(info: DatasetInfo, root: Path) -> tuple[Arrays, Arrays]:
    """Pickled batches of row-major planes, read only after their digests were verified."""
    batches = {
        name: _parse_batch(info, name, content)
        for name, content in _read_files(info, root).items()
        if name != "batches.meta"
    }
    test = batches.pop("test_batch")
    train_images, train_labels = zip(*batches.values(), strict=True)
    return (np.concatenate(train_images), np.concatenate(train_labels)), test


def _parse_batch(info: DatasetInfo, name: str, content: bytearray) -> Arrays:
    batch = restricted_unpickle(name, content)
    try:
        pixels, labels = batch[b"data"], np.array(batch[b"labels"], dtype=np.int64)
        return np.array(pixels.reshape(len(labels), *info.shape), dtype=np.uint8), labels
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name} does not hold the images and labels of a CIFAR batch: {error!r}") from None


def restricted_unpickle(name: str, content: bytes | bytearray) -> Any:
    """The object in a pickle that needs nothing but plain values and NumPy arrays of bytes.

    Raises:
        DataError: the pickle asks for anything else, which is named, or is broken.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a broken pickle may raise anything at all
        raise DataError(f"{name} is not a readable pickle: {error!r}") from None


def _byte_dtype(code: object, *_: object) -> np.dtype[np.uint8]:
    """Stands in for ``numpy.dtype``: old pickles call it in a way that current NumPy warns of, and need only bytes."""
    if code not in (b"u1", "u1"):
        raise DataError(f"refused NumPy type {code!r}")
    return np.dtype(np.uint8, copy=True)  # a copy, since the pickle goes on to set the state of what it gets


# Taken from a live array, because the module that defines it moved between NumPy versions.
_rebuild_array = np.empty(0, np.uint8).__reduce__()[0]

_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _rebuild_array,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _byte_dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(f"refused to load {module}.{name} from a pickle") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError("refused a persistent reference in a pickle")


_READERS: dict[str, Callable[[DatasetInfo, Path], tuple[Arrays, Arrays]]] = {
    "digits": _read_digits,
    "mnist": _read_mnist,
    "cifar10": _read_cifar10,
}
