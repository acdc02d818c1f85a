"""Where the files of a data set lie, and their verified content. Imports no torch."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shlex
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

from certbench.contract import Reporter
from certbench.data.info import DatasetInfo, FileInfo
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
    names = [file.name] if file.is_archive else [file.name, f"{file.name}.gz"]
    return next((path for path in (folder / name for name in names) if path.is_file()), None)


def unpacked_folder(info: DatasetInfo, root: Path) -> Path | None:
    """Where the data set's archives lie unpacked, if they do."""
    return next((root / folder for folder in info.unpacked if (root / folder).is_dir()), None)


def reads_unpacked(info: DatasetInfo, root: Path) -> bool:
    """Whether the unpacked folder is read, because the archives are not all there."""
    return unpacked_folder(info, root) is not None and not locate(info, root).complete


def read_files(info: DatasetInfo, root: Path) -> dict[str, bytearray]:
    """Verified content by file name.

    Raises:
        DataError: a file is missing, unreadable or damaged.
    """
    found = locate(info, root)
    contents = {}
    for file, path in zip(info.files, found.paths, strict=True):
        if path is None:
            raise DataError(missing_message(info, root, found))
        contents[file.name] = read_verified(path, file, repair(info, root))
    return contents


def fingerprint(info: DatasetInfo, root: Path) -> str:
    """Names the files that lie there by their sizes and times, for data sets whose content is not pinned."""
    folder = unpacked_folder(info, root)
    if folder is not None and reads_unpacked(info, root):
        paths = [path for path in folder.rglob("*") if path.is_file()]
    else:
        paths = [path for path in locate(info, root).paths if path is not None]
    stats = [path.stat() for path in paths]
    content = [
        len(stats),
        sum(stat.st_size for stat in stats),
        max((stat.st_mtime_ns for stat in stats), default=0),
    ]
    return hashlib.sha256(f"{info.name} {content}".encode()).hexdigest()


def fetch_command(info: DatasetInfo, root: Path) -> str:
    """What to type to get the data set, or a damaged part of it anew."""
    return f"certbench data fetch {info.name} --data {shlex.quote(str(root))}"


def repair(info: DatasetInfo, root: Path) -> str:
    """What to do about a damaged file."""
    if info.fetcher:
        return f"run `{fetch_command(info, root)}`"
    return f"put {info.by_hand} there again" if info.by_hand else "replace it"


def missing_message(info: DatasetInfo, root: Path, found: Found) -> str:
    """One line: what is missing, where it was looked for, what to do."""
    if found.count:
        names = [file.name for file, path in zip(info.files, found.paths, strict=True) if path is None]
        what = f"{info.name} is incomplete in {found.folder}: {', '.join(names)} missing"
    else:
        places = ", ".join(str(root / folder) for folder in info.folders)
        what = f"{info.name} was not found; looked in {places}"
    if info.fetcher or info.streamed:
        step = f"run `{fetch_command(info, root)}`"
    else:
        step = f"put {info.by_hand} into {root / info.folders[0]}"
    return f"{what}; {step}, or name the folder that holds it with --data DIR or {VARIABLE}"


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
        Damaged: not gzip where it should be, or another size or digest than the catalogue's.
        OSError: the file cannot be read.
    """
    with _open(path, unpacked=not file.is_archive) as stream:
        buffer = _bounded(stream, file.size)
    if len(buffer) != file.size:
        shown = f"more than {file.size:,}" if len(buffer) > file.size else f"{len(buffer):,}"
        raise Damaged(f"{shown} bytes where {file.size:,} were expected")
    kind, expected = ("SHA-256", file.sha256) if file.sha256 else ("MD5", file.md5)
    actual = (
        hashlib.sha256(buffer) if file.sha256 else hashlib.md5(buffer, usedforsecurity=False)
    ).hexdigest()
    if actual != expected:
        raise Damaged(f"{kind} {actual} where {expected} was expected")
    return buffer


def check_md5(path: Path, expected: str, reporter: Reporter | None = None) -> None:
    """
    Raises:
        Damaged: the file has another MD5 sum.
    """
    md5, done = hashlib.md5(usedforsecurity=False), 0
    if reporter is not None:
        reporter.stage(f"checking {path.name}", path.stat().st_size, "byte")
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            md5.update(chunk)
            done += len(chunk)
            if reporter is not None:
                reporter.advance(done)
    if md5.hexdigest() != expected:
        raise Damaged(f"MD5 {md5.hexdigest()} where {expected} was expected")


def require_space(folder: Path, needed: int) -> None:
    """
    Raises:
        DataError: the disk that the folder is on has fewer than ``needed`` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"no space in {folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make room, or pass "
            "another folder with --data DIR"
        )


def unpack(name: str, content: bytearray, limit: int) -> bytearray:
    """The content of a ``.gz`` file of at most ``limit`` bytes.

    Raises:
        DataError: it is broken or holds more.
    """
    try:
        buffer = _bounded(gzip.GzipFile(fileobj=io.BytesIO(content)), limit)
    except Damaged as damage:
        raise DataError(f"{name} is damaged: {damage}") from None
    if len(buffer) > limit:
        raise DataError(f"{name} unpacks to more than {limit:,} bytes")
    return buffer


def _bounded(stream: gzip.GzipFile | io.FileIO, size: int) -> bytearray:
    """What the stream holds, cut one byte behind ``size``."""
    buffer, filled = bytearray(size + 1), 0
    try:
        with memoryview(buffer) as view:
            while count := stream.readinto(view[filled : filled + _CHUNK]):
                filled += count
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(" ".join(str(error).split())) from None
    del buffer[filled:]
    return buffer


def _open(path: Path, unpacked: bool) -> gzip.GzipFile | io.FileIO:
    return gzip.open(path) if unpacked and path.suffix == ".gz" else path.open("rb", buffering=0)


def quick_size(path: Path, file: FileInfo) -> int:
    """The size as the catalogue counts it, without unpacking: of a packed file, the length in its last four bytes.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if file.is_archive or path.suffix != ".gz":
        return size
    with path.open("rb") as stream:
        stream.seek(max(0, size - 4))
        return int.from_bytes(stream.read(4), "little")
