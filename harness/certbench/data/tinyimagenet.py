"""TinyImageNet from its published archive, from archives of some of its classes, or from the unpacked folder.

Every member is named as in the published layout: ``train/<wnid>/images/<wnid>_<n>.JPEG``, ``val/images/val_<n>.JPEG``
and ``val/val_annotations.txt``. Nothing is unpacked onto the disk. Published order: classes by their WordNet ids, which
also gives the labels, and images by their numbers.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from certbench.data.formats import Arrays, Parts
from certbench.data.images import decode_image
from certbench.data.info import DatasetInfo
from certbench.data.names import TINYIMAGENET_NAMES
from certbench.data.places import read_files, reads_unpacked, unpacked_folder
from certbench.errors import DataError

SIDE = 64
_TRAIN = re.compile(r"train/(n\d{8})/images/(n\d{8})_(\d+)\.JPEG")
_VAL = re.compile(r"val/images/(val_(\d+)\.JPEG)")
_ANNOTATIONS = "val/val_annotations.txt"
_LARGEST = 1 << 20
"""Bytes of a member; the published images have a few thousand."""


def read(info: DatasetInfo, root: Path) -> Parts:
    """The classes of ``info``, all 200 or the first of the published list.

    Raises:
        DataError: files are missing or damaged; a class has too few or too many images; an image is broken.
    """
    classes = {wnid: label for label, wnid in enumerate(sorted(list(TINYIMAGENET_NAMES)[: info.classes]))}
    train: dict[tuple[int, int], tuple[str, bytes]] = {}
    val: dict[int, tuple[str, bytes]] = {}
    annotations = ""
    for name, content in _members(info, root):
        if (match := _TRAIN.fullmatch(name)) and match[1] in classes:
            if match[2] != match[1]:
                raise DataError(f"{name} lies in the folder of another class; unpack the archive again")
            train[classes[match[1]], int(match[3])] = name, content
        elif match := _VAL.fullmatch(name):
            val[int(match[2])] = match[1], content
        elif name == _ANNOTATIONS:
            annotations = content.decode()
    labels = {n: classes[wnid] for n, wnid in _annotated(annotations).items() if wnid in classes}
    order = sorted(train)
    chosen = sorted(labels.keys() & val.keys())
    _check_counts(info, Counter(label for label, _ in order), info.train_size, "training")
    _check_counts(info, Counter(labels[n] for n in chosen), info.test_size, "validation")
    return (
        _decode([train[key] for key in order], [label for label, _ in order]),
        _decode([val[n] for n in chosen], [labels[n] for n in chosen]),
    )


def _annotated(text: str) -> dict[int, str]:
    """Number of a validation image -> WordNet id."""
    rows = (line.split("\t") for line in text.splitlines())
    return {int(row[0].removeprefix("val_").removesuffix(".JPEG")): row[1] for row in rows if len(row) > 1}


def _check_counts(info: DatasetInfo, counts: Counter[int], size: int, part: str) -> None:
    each = size // info.classes
    for label, name in enumerate(info.class_names):
        if counts[label] != each:
            raise DataError(
                f"{info.name}: class {name!r} has {counts[label]} {part} images where {each} were expected; "
                "unpack the archive again, or check that no other data set lies in its folder"
            )


def _decode(named: list[tuple[str, bytes]], labels: list[int]) -> Arrays:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding does not hold the interpreter's lock
        images = list(pool.map(lambda pair: decode_image(pair[0], pair[1], (SIDE, SIDE)), named))
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]), np.array(labels)


# Where members come from ---------------------------------------------------------------------------------------------


def _members(info: DatasetInfo, root: Path) -> Iterator[tuple[str, bytes]]:
    """(name inside the published folder, content) of all that may be of use."""
    folder = unpacked_folder(info, root)
    if folder is not None and reads_unpacked(info, root):
        yield from _folder_members(folder)
        return
    for name, content in read_files(info, root).items():
        try:
            if name.endswith(".zip"):
                yield from _zip_members(content)
            elif name.endswith(".tar.gz"):
                yield from _tar_members(content)
            else:
                yield f"val/{name}", bytes(content)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise DataError(f"{name} is not the published archive: {error}") from None


def _inside(name: str) -> str:
    """A member's name without the published folder in front of it."""
    return str(PurePosixPath(*PurePosixPath(name).parts[1:]))


def _zip_members(content: bytearray) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            if not member.is_dir() and member.file_size <= _LARGEST:
                yield _inside(member.filename), archive.read(member)


def _tar_members(content: bytearray) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() and member.size <= _LARGEST else None
            if stream is not None:
                yield _inside(member.name), stream.read()


def _folder_members(folder: Path) -> Iterator[tuple[str, bytes]]:
    try:
        for path in [
            *folder.glob("train/n*/images/*.JPEG"),
            *folder.glob("val/images/*.JPEG"),
            folder / _ANNOTATIONS,
        ]:
            yield path.relative_to(folder).as_posix(), path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; unpack the archive again") from None
