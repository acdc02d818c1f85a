"""Readers of published formats: from verified files to arrays, training part and test part."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from certbench.data.info import DatasetInfo
from certbench.data.places import read_files, unpack
from certbench.data.splits import choose_per_class
from certbench.errors import DataError

Arrays = tuple[np.ndarray, np.ndarray]
"""Images, uint8 (N, channels, height, width), and integer labels (N,) of one part."""
Parts = tuple[Arrays, Arrays]
"""Training part and test part."""

DIGITS_TEST_PER_CLASS = 36


# Digits


def read_digits(info: DatasetInfo, root: Path) -> Parts:
    """The copy that comes with scikit-learn; 36 images of each class, 20 % of all, are the test set.

    They are chosen by :func:`~certbench.data.splits.choose_per_class`. Both parts keep the file's order.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.asarray(bunch.images).astype(np.uint8)[:, None]
    labels = np.asarray(bunch.target).astype(np.int64)
    in_test = np.zeros(len(labels), dtype=bool)
    in_test[choose_per_class(labels, DIGITS_TEST_PER_CLASS)] = True
    return (images[~in_test], labels[~in_test]), (images[in_test], labels[in_test])


# MNIST and Fashion-MNIST


def read_idx(info: DatasetInfo, root: Path) -> Parts:
    """Four IDX files, in the catalogue's order: training images and labels, test images and labels."""
    largest = 16 + info.train_size * math.prod(info.shape)
    arrays = [
        parse_idx(name, unpack(name, content, largest) if name.endswith(".gz") else content)
        for name, content in read_files(info, root).items()
    ]
    train_images, train_labels, test_images, test_labels = arrays
    return (
        (train_images[:, None], train_labels.astype(np.int64)),
        (test_images[:, None], test_labels.astype(np.int64)),
    )


def parse_idx(name: str, content: bytearray) -> np.ndarray:
    """IDX of unsigned bytes: two zeros, type 8, number of dimensions, big-endian dimensions, then the bytes."""
    dimensions = int.from_bytes(content[3:4], "big") if content[:3] == b"\x00\x00\x08" else 0
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if not shape or header + int(np.prod(shape)) != len(content):
        raise DataError(f"{name} is not an IDX file of unsigned bytes; header {bytes(content[:16]).hex()}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# CIFAR


def read_cifar10(info: DatasetInfo, root: Path) -> Parts:
    """Five batches for training and one for testing."""
    contents = read_files(info, root)
    del contents["batches.meta"]
    batches = {name: parse_batch(info, name, content, b"labels") for name, content in contents.items()}
    test = batches.pop("test_batch")
    train_images, train_labels = zip(*batches.values(), strict=True)
    return (np.concatenate(train_images), np.concatenate(train_labels)), test


def read_cifar100(info: DatasetInfo, root: Path) -> Parts:
    """One batch for each part; the fine labels are used."""
    contents = read_files(info, root)
    train, test = (parse_batch(info, name, contents[name], b"fine_labels") for name in ("train", "test"))
    return train, test


def parse_batch(info: DatasetInfo, name: str, content: bytearray, key: bytes) -> Arrays:
    """A pickled batch of row-major planes, its digest verified before."""
    batch = restricted_unpickle(name, content)
    try:
        pixels, labels = batch[b"data"], np.array(batch[key], dtype=np.int64)
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
