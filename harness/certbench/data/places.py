"""Where the files of a data set lie, and their verified content. Imports no torch."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path

from certbench.data.catalog import DatasetInfo, FileInfo
from certbench.errors import DataError

VARIABLE = "CERTBENCH_DATA"
"""The environment variable that names the data folder."""

_CHUNK = 1 << 20


def data_root(root: Path | None) -> Path:
    """The data folder: the one given, else the one ``CERTBENCH_DATA`` names, else ``./data``."""
    return (root or Path(os.environ.get(VARIABLE) or "data")).expanduser()


@dataclass(frozen=True)
class Found:
    """The best place for a data set: its folder and, per file of the catalogue, the path or None."""

    folder: Path
    paths: tuple[Path | None, ...]

    @property
    def count(self) -> int:
        return sum(path is not None for path in self.paths)

    @property
    def complete(self) -> bool:
        return all(self.paths)


def locate(info: DatasetInfo, root: Path) -> Found:
    """The folder of ``info.folders`` under ``root`` that holds most of the files; the first one where none does.

    Raises:
        DataError: a folder cannot be searched.
    """
    return max((_look(info, root / folder) for folder in info.folders), key=lambda found: found.count)


def _look(info: DatasetInfo, folder: Path) -> Found:
    try:
        return Found(folder, tuple(_path_of(folder, file) for file in info.files))
    except OSError as error:
        raise DataError(
            f"cannot look for {info.name} in {folder}: {error.strerror}; make the folder readable, or pass another "
            f"one with --data DIR"
        ) from None


def _path_of(folder: Path, file: FileInfo) -> Path | None:
    candidates = (folder / file.name, folder / f"{file.name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def fetch_command(info: DatasetInfo, root: Path) -> str:
    """What to type to get the data set, or a damaged part of it anew."""
    return f"certbench data fetch {info.name} --data {shlex.quote(str(root))}"


def missing_message(info: DatasetInfo, root: Path, found: Found) -> str:
    """One line: what is missing, where it was looked for, what to do."""
    if found.count:
        names = [file.name for file, path in zip(info.files, found.paths, strict=True) if path is None]
        what = f"{info.name} is incomplete in {found.folder}: {', '.join(names)} missing"
    else:
        places = ", ".join(str(root / folder) for folder in info.folders)
        what = f"{info.name} was not found; looked in {places}"
    return f"{what}; run `{fetch_command(info, root)}`, or name the folder that holds it with --data DIR or {VARIABLE}"


class Damaged(Exception):
    """A file's content is not what the catalogue says; the text says how it differs."""


def read_verified(path: Path, file: FileInfo, next_step: str) -> bytearray:
    """The content of a file, unpacked where ``path`` ends in ``.gz``.

    Raises:
        DataError: unreadable or damaged. Names the path, what differs and ``next_step``.
    """
    try:
        return read_content(path, file)
    except Damaged as damage:
        raise DataError(f"{path} is damaged: {damage}; {next_step}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check its permissions") from None


def read_content(path: Path, file: FileInfo) -> bytearray:
    """As :func:`read_verified`; never unpacks more than one byte too many.

    Raises:
        Damaged: not gzip where it should be, or another size or SHA-256 than the catalogue's.
        OSError: the file cannot be read.
    """
    try:
        buffer, size = _read_bounded(path, file.size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(" ".join(str(error).split())) from None
    if size != file.size:
        shown = f"more than {file.size:,}" if size > file.size else f"{size:,}"
        raise Damaged(f"{shown} bytes where {file.size:,} were expected")
    del buffer[size:]
    actual = hashlib.sha256(buffer).hexdigest()
    if actual != file.sha256:
        raise Damaged(f"SHA-256 {actual} where {file.sha256} was expected")
    return buffer


def _read_bounded(path: Path, size: int) -> tuple[bytearray, int]:
    """A buffer of ``size + 1`` bytes, and how many of them the file filled."""
    buffer, filled = bytearray(size + 1), 0
    with _open(path) as stream, memoryview(buffer) as view:
        while count := stream.readinto(view[filled : filled + _CHUNK]):
            filled += count
    return buffer, filled


def _open(path: Path) -> gzip.GzipFile | io.FileIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb", buffering=0)


def quick_size(path: Path) -> int:
    """The unpacked size as the file claims it, without unpacking: of a ``.gz``, the length in its last four bytes.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if path.suffix != ".gz":
        return size
    with path.open("rb") as stream:
        stream.seek(max(0, size - 4))
        return int.from_bytes(stream.read(4), "little")
