"""Download data sets, and tell which are there. Nothing that was not verified ever gets its final name.

The addresses are torchvision's; the downloads are checked against the catalogue. Imports no torch unless needed.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from certbench.contract import Reporter, SilentReporter
from certbench.data.catalog import DATASETS, DatasetInfo, FileInfo, dataset_info
from certbench.data.places import (
    Damaged,
    Found,
    data_root,
    fetch_command,
    locate,
    missing_message,
    quick_size,
    read_content,
    read_verified,
)
from certbench.errors import DataError

State = Literal["complete", "incomplete", "damaged", "missing"]

_TIMEOUT = 30.0
_CHUNK = 1 << 16
_SLACK = 1 << 20
"""By how many bytes a compressed file or an archive may exceed its content."""


@dataclass(frozen=True)
class StatusRow:
    """Whether a data set is there, judged by names and sizes alone; ``next_step`` is empty where all is well."""

    name: str
    state: State
    where: str
    next_step: str


def status(root: Path | None = None) -> list[StatusRow]:
    """One row per data set, sorted by name.

    Raises:
        DataError: a folder cannot be searched.
    """
    folder = data_root(root)
    return [_status(DATASETS[name], folder) for name in sorted(DATASETS)]


def _status(info: DatasetInfo, root: Path) -> StatusRow:
    if not info.files:
        return StatusRow(info.name, "complete", "comes with scikit-learn", "")
    found = locate(info, root)
    fetch_it = fetch_command(info, root)
    if not found.count:
        return StatusRow(info.name, "missing", str(root), fetch_it)
    if not found.complete:
        return StatusRow(info.name, "incomplete", str(found.folder), fetch_it)
    state: State = "complete" if all(_has_right_size(*pair) for pair in _pairs(info, found)) else "damaged"
    return StatusRow(info.name, state, str(found.folder), "" if state == "complete" else fetch_it)


def _pairs(info: DatasetInfo, found: Found) -> Iterator[tuple[Path | None, FileInfo]]:
    return zip(found.paths, info.files, strict=True)


def _has_right_size(path: Path | None, file: FileInfo) -> bool:
    try:
        return path is not None and quick_size(path) == file.size
    except OSError:
        return False


def verify(name: str, root: Path | None = None) -> list[str]:
    """Check every byte; the problems found, one line each, none if the data set may be used.

    Raises:
        UsageError: no data set has this name.
    """
    info, root = dataset_info(name), data_root(root)
    try:
        if info.files:
            return _problems(info, root, locate(info, root))
        from certbench.data.files import load_dataset

        load_dataset(name, root)
    except DataError as error:
        return [str(error)]
    return []


def _problems(info: DatasetInfo, root: Path, found: Found) -> list[str]:
    problems = [] if found.complete else [missing_message(info, root, found)]
    for path, file in _pairs(info, found):
        if path is not None:
            try:
                read_verified(path, file, f"run `{fetch_command(info, root)}`")
            except DataError as error:
                problems.append(str(error))
    return problems


def fetch(name: str, root: Path | None = None, reporter: Reporter | None = None) -> None:
    """Bring a data set into the data folder, or repair it; what is already there and whole is kept.

    An old file that a new one replaces stays beside it as ``<name>.replaced``. The reporter counts bytes.

    Raises:
        UsageError: no data set has this name.
        DataError: no network, a download that is not what the catalogue says, or a folder that cannot be written.
    """
    info, root, reporter = dataset_info(name), data_root(root), reporter or SilentReporter()
    if not info.files:
        reporter.say(f"{name} comes with scikit-learn: nothing to fetch")
        return
    found = locate(info, root)
    wanted = [file for path, file in _pairs(info, found) if not _is_whole(path, file)]
    if not wanted:
        reporter.say(f"{name} is complete in {found.folder}: nothing to fetch")
        return
    try:
        found.folder.mkdir(parents=True, exist_ok=True)
        _FETCHERS[name](info, found.folder, wanted, reporter)
    except _DownloadError as error:
        raise DataError(
            f"cannot download {name} ({error}); check the network, or put {info.by_hand} into {found.folder} yourself"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot write {name} to {found.folder}: {error.strerror or error}; pass a writable folder with --data DIR"
        ) from None
    reporter.say(f"{name} is complete in {found.folder}")


def _is_whole(path: Path | None, file: FileInfo) -> bool:
    try:
        return path is not None and bool(read_verified(path, file, ""))
    except DataError:
        return False


def _fetch_mnist(info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    from torchvision.datasets import MNIST

    for file in wanted:
        target = folder / f"{file.name}.gz"
        urls = [f"{mirror}{target.name}" for mirror in MNIST.mirrors]
        with _scratch(target) as scratch:
            _download(urls, scratch, file.size + _SLACK, partial(read_content, file=file), reporter)
            _install(scratch, target, folder / file.name)


def _fetch_cifar10(info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    from torchvision.datasets import CIFAR10

    limit = sum(file.size for file in info.files) + _SLACK
    with _scratch(folder / "archive.tar") as archive, _scratch(folder / "unpacked") as unpacked:
        _download([CIFAR10.url], archive, limit, lambda path: _check_md5(path, CIFAR10.tgz_md5), reporter)
        unpacked.mkdir()
        extract(archive, unpacked, PurePosixPath(CIFAR10.base_folder), wanted, limit)
        for file in wanted:
            read_verified(unpacked / file.name, file, f"{CIFAR10.url} does not hold the published files")
        for file in wanted:
            _install(unpacked / file.name, folder / file.name, folder / f"{file.name}.gz")


_FETCHERS: dict[str, Callable[[DatasetInfo, Path, list[FileInfo], Reporter], None]] = {
    "mnist": _fetch_mnist,
    "cifar10": _fetch_cifar10,
}


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A name beside ``target`` for unfinished work, this process's own; whatever is left there is removed."""
    # The ending stays, since it says how the content is packed.
    scratch = target.with_name(f"{os.getpid()}.partial.{target.name}")
    _remove(scratch)
    try:
        yield scratch
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _install(verified: Path, target: Path, twin: Path) -> None:
    """Give a verified file its name; an old one there, or its packed or unpacked twin, is set aside."""
    for old in (target, twin):
        if old.exists():
            old.replace(old.with_name(f"{old.name}.replaced"))
    with verified.open("rb") as stream:
        os.fsync(stream.fileno())
    verified.replace(target)


class _DownloadError(Exception):
    """Why no address, or the one tried, gave what was wanted."""


def _download(
    urls: list[str], target: Path, limit: int, check: Callable[[Path], object], reporter: Reporter
) -> None:
    """Write to ``target`` what the first address serves that passes ``check`` and has at most ``limit`` bytes."""
    failures = []
    for url in urls:
        try:
            _download_one(url, target, limit, reporter)
            check(target)
            return
        except Damaged as damage:
            failures.append(f"{url}: serves something else, {damage}")
        except _DownloadError as error:
            failures.append(f"{url}: {error}")
    raise _DownloadError("; ".join(failures))


def _download_one(url: str, target: Path, limit: int, reporter: Reporter) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "certbench"})
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise _DownloadError(f"HTTP status {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _DownloadError(_reason(error)) from None
    with response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else 0
        if total > limit:
            raise _DownloadError(f"{total:,} bytes offered, more than the {limit:,} it may have")
        reporter.stage(f"fetching {url.rsplit('/', 1)[-1]}", total, "byte")
        done = _copy_bounded(_reading(response), target, limit, reporter)
    if done != total > 0:
        raise _DownloadError(f"broke off after {done:,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _reading(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Chunks of a response, its failures kept apart from those of the disk they are written to."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _DownloadError(f"broke off: {_reason(error)}") from None
        if not chunk:
            return
        yield chunk


def _copy_bounded(chunks: Iterator[bytes], target: Path, limit: int, reporter: Reporter) -> int:
    done = 0
    with target.open("wb") as stream:
        for chunk in chunks:
            done += len(chunk)
            if done > limit:
                raise _DownloadError(f"sends more than the {limit:,} bytes it may have")
            stream.write(chunk)
            reporter.advance(done)
    return done


def _check_md5(archive: Path, expected: str) -> None:
    with archive.open("rb") as stream:
        actual = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if actual != expected:
        raise Damaged(f"MD5 {actual} where {expected} was expected")


def extract(archive: Path, target: Path, folder: PurePosixPath, files: list[FileInfo], limit: int) -> None:
    """Copy the named files out of ``folder`` in a ``.tar.gz`` archive into ``target``.

    Names come from the catalogue, never from the archive; other files in it are passed over.

    Raises:
        DataError: a member that is a link or a device, or has an absolute name or ``..`` in it; members of more than
            ``limit`` bytes together; a file that is missing or has another size; or no readable archive.
    """
    wanted = {str(folder / file.name): file for file in files}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            unpacked = 0
            for member in tar:
                _refuse_unsafe(member)
                unpacked += member.size
                if unpacked > limit:
                    raise DataError(f"refused the archive: it unpacks to more than {limit:,} bytes")
                file = wanted.pop(member.name, None)
                if file is not None:
                    _extract_one(tar, member, target / file.name, file)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"the downloaded archive is damaged: {error}; try again later") from None
    if wanted:
        raise DataError(f"the downloaded archive lacks {', '.join(sorted(wanted))}; try again later")


def _refuse_unsafe(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"refused the archive: member {member.name!r} points outside it")
    if not (member.isreg() or member.isdir()):
        raise DataError(f"refused the archive: member {member.name!r} is neither a file nor a folder")


def _extract_one(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, file: FileInfo) -> None:
    source = tar.extractfile(member) if member.isreg() else None
    if source is None or member.size != file.size:
        raise DataError(f"refused the archive: {member.name!r} is not a file of {file.size:,} bytes")
    with source, target.open("xb") as stream:
        shutil.copyfileobj(source, stream)
