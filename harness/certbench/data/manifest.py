"""Lists of encoded images with their digests: what a large data set consists of, in published order.

One line per image: SHA-256, size in bytes, file and, where several images lie in one file, the place of the first byte
and the image's name. The list is written last, when everything in it is there, and its own digest names the content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certbench.errors import DataError


@dataclass(frozen=True)
class Line:
    """One image: ``file`` relative to the list; ``name`` is the file itself unless it holds several images."""

    sha256: str
    size: int
    file: str
    offset: int = 0
    name: str = ""

    @property
    def wnid(self) -> str:
        """The class: the name of the folder that the image is, or was, in."""
        return (self.name or self.file).split("/")[-2]

    def __str__(self) -> str:
        inside = f"\t{self.offset}\t{self.name}" if self.name else ""
        return f"{self.sha256}\t{self.size}\t{self.file}{inside}"


@dataclass(frozen=True, eq=False)
class Manifest:
    """A list as arrays of N entries; ``labels`` are the ranks of the classes' WordNet ids. Kept compact: N is large."""

    folder: Path
    files: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    wnids: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, position: int) -> str:
        """What to call an image in messages: its path, and where in it."""
        offset = int(self.offsets[position])
        return f"{self._path(position)}{f' (at byte {offset})' if offset else ''}"

    def read(self, position: int) -> bytes:
        """The bytes of one image.

        Raises:
            DataError: its file is missing, unreadable or too short.
        """
        offset, size = int(self.offsets[position]), int(self.sizes[position])
        try:
            with self._path(position).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise DataError(
                f"cannot read image {self.where(position)}: {error.strerror}; get the file again"
            ) from None
        if len(content) != size:
            raise DataError(
                f"image {self.where(position)} is cut off after {len(content):,} of {size:,} bytes; get the file again"
            )
        return content

    def _path(self, position: int) -> Path:
        name: bytes = self.files[position]
        return self.folder / name.decode()


def read_manifest(path: Path) -> Manifest:
    """The list of that name.

    Raises:
        DataError: it cannot be read, is broken or names a file outside its folder.
    """
    try:
        content = path.read_bytes()
        lines = list(_parse(content.decode()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise DataError(f"{path} is broken; remove it and run `certbench data fetch` again") from None
    wnids = tuple(sorted({line.wnid for line in lines}))
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    return Manifest(
        folder=path.parent,
        files=np.array([line.file.encode() for line in lines]),
        offsets=np.array([line.offset for line in lines], dtype=np.int64),
        sizes=np.array([line.size for line in lines], dtype=np.int64),
        labels=np.array([rank[line.wnid] for line in lines], dtype=np.int64),
        wnids=wnids,
        digest=hashlib.sha256(content).hexdigest(),
    )


def _parse(text: str) -> Iterator[Line]:
    for row in text.splitlines():
        sha256, size, file, *inside = row.split("\t")
        if ".." in file.split("/") or file.startswith("/"):
            raise ValueError(file)
        yield Line(sha256, int(size), file, int(inside[0]) if inside else 0, inside[1] if inside else "")


def write_manifest(path: Path, lines: Iterable[Line]) -> None:
    """Write the list, all or nothing."""
    scratch = path.with_name(f"{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)


def problems(path: Path) -> Iterator[str]:
    """Every byte against the list: one line for each image that is not what it says."""
    manifest = read_manifest(path)
    for position, line in enumerate(_parse(path.read_text(encoding="utf-8"))):
        try:
            if hashlib.sha256(manifest.read(position)).hexdigest() != line.sha256:
                yield f"image {manifest.where(position)} is damaged: another SHA-256 than {path.name} says"
        except DataError as error:
            yield str(error)
