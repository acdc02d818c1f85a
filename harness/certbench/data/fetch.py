"""Tell which data sets are there, check them, fetch them. Nothing that was not verified ever gets its final name.

The addresses are torchvision's or the publisher's; the downloads are checked against the catalogue. Imports no torch
unless needed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from certbench.contract import Reporter, SilentReporter
from certbench.data import imagenet_files
from certbench.data.archives import extract
from certbench.data.catalog import DATASETS, dataset_info
from certbench.data.download import DownloadError, download
from certbench.data.info import DatasetInfo, FileInfo, function
from certbench.data.places import (
    Found,
    check_md5,
    data_root,
    fetch_command,
    locate,
    missing_message,
    quick_size,
    read_content,
    read_verified,
    reads_unpacked,
    repair,
    require_space,
    unpacked_folder,
)
from certbench.errors import DataError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

State = Literal["complete", "incomplete", "damaged", "missing"]

_SLACK = 1 << 20
"""By how many bytes a compressed file or an archive may exceed its content."""
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class StatusRow:
    """Whether a data set is there, judged by names and sizes alone; ``next_step`` is empty where all is well."""

    name: str
    state: State
    where: str
    next_step: str


def status(root: Path | None = None, known: Mapping[str, DatasetInfo] = DATASETS) -> list[StatusRow]:
    """One row per data set, sorted by name.

    Raises:
        DataError: a folder cannot be searched.
    """
    folder = data_root(root)
    return [_status(known[name], folder) for name in sorted(known)]


def _status(info: DatasetInfo, root: Path) -> StatusRow:
    if info.streamed:
        return _streamed_status(info, root)
    if not info.files:
        return StatusRow(info.name, "complete", "comes with its package", "")
    found, next_step = locate(info, root), get_it(info, root)
    if reads_unpacked(info, root):
        return StatusRow(info.name, "complete", str(unpacked_folder(info, root)), "")
    if not found.count:
        return StatusRow(info.name, "missing", str(root), next_step)
    if not found.complete:
        return StatusRow(info.name, "incomplete", str(found.folder), next_step)
    state: State = "complete" if all(_has_right_size(*pair) for pair in _pairs(info, found)) else "damaged"
    return StatusRow(info.name, state, str(found.folder), "" if state == "complete" else next_step)


def _streamed_status(info: DatasetInfo, root: Path) -> StatusRow:
    folder = imagenet_files.place(info, root)
    if imagenet_files.is_ready(info, folder):
        return StatusRow(info.name, "complete", str(folder), "")
    prepare = fetch_command(info, root)
    if imagenet_files.has_any(folder):
        return StatusRow(info.name, "incomplete", str(folder), prepare)
    return StatusRow(info.name, "missing", str(root), f"put {info.by_hand} into {folder}, then {prepare}")


def get_it(info: DatasetInfo, root: Path) -> str:
    """The next step for a data set that is missing or damaged."""
    return fetch_command(info, root) if info.fetcher else f"put {info.by_hand} into {root / info.folders[0]}"


def _pairs(info: DatasetInfo, found: Found) -> Iterator[tuple[Path | None, FileInfo]]:
    return zip(found.paths, info.files, strict=True)


def _has_right_size(path: Path | None, file: FileInfo) -> bool:
    try:
        return path is not None and quick_size(path, file) == file.size
    except OSError:
        return False


def verify(data: str | DatasetInfo, root: Path | None = None) -> list[str]:
    """Check every byte; the problems found, one line each, none if the data set may be used.

    Raises:
        UsageError: no data set has this name.
    """
    info, root = _entry(data), data_root(root)
    try:
        if info.streamed:
            return _streamed_problems(info, root)
        if info.files and not reads_unpacked(info, root):
            return _problems(info, root, locate(info, root))
        from certbench.data.files import read_dataset

        read_dataset(info, root)
    except DataError as error:
        return [str(error)]
    return []


def _entry(data: str | DatasetInfo) -> DatasetInfo:
    """The data set whose files are meant: held-out images are in those of the whole."""
    info = dataset_info(data) if isinstance(data, str) else data
    return info.whole or info


def _streamed_problems(info: DatasetInfo, root: Path) -> list[str]:
    from certbench.data.manifest import problems

    folder = imagenet_files.place(info, root)
    if not imagenet_files.is_ready(info, folder):
        return [f"{info.name} is not ready in {folder}; run `{fetch_command(info, root)}`"]
    wrong = [
        line
        for name in imagenet_files.lists(info)
        for line in islice(problems(folder / name), _MOST_PROBLEMS)
    ]
    return wrong if len(wrong) < _MOST_PROBLEMS else [*wrong, "there may be more"]


def _problems(info: DatasetInfo, root: Path, found: Found) -> list[str]:
    problems = [] if found.complete else [missing_message(info, root, found)]
    for path, file in _pairs(info, found):
        if path is not None:
            try:
                read_verified(path, file, repair(info, root))
            except DataError as error:
                problems.append(str(error))
    return problems


def fetch(data: str | DatasetInfo, root: Path | None = None, reporter: Reporter | None = None) -> None:
    """Bring a data set into the data folder, or repair it; what is already there and whole is kept.

    An old file that a new one replaces stays beside it as ``<name>.replaced``. The reporter counts bytes.

    Raises:
        UsageError: no data set has this name.
        DataError: no network, a download that is not what the catalogue says, a folder that cannot be written or has no
            space; or nobody may hand the data set out, with what to do instead.
    """
    info, root, reporter = _entry(data), data_root(root), reporter or SilentReporter()
    if not info.files and not info.streamed:
        reporter.say(f"{info.name} comes with its package: nothing to fetch")
        return
    folder, wanted = _lacking(info, root)
    if folder is not None and not wanted:
        reporter.say(f"{info.name} is complete in {folder}: nothing to fetch")
        return
    if not info.fetcher:
        raise DataError(f"{info.name} cannot be fetched; {get_it(info, root)}")
    folder = folder or imagenet_files.place(info, root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        function(info, "fetcher")(info, folder, wanted, reporter)
    except DownloadError as error:
        raise DataError(
            f"cannot download {info.name} ({error}); check the network, or put {info.by_hand} into {folder} yourself"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot write {info.name} to {folder}: {error.strerror or error}; pass a writable folder with --data DIR"
        ) from None
    reporter.say(f"{info.name} is complete in {folder}")


def _lacking(info: DatasetInfo, root: Path) -> tuple[Path | None, list[FileInfo]]:
    """Where the data set is or should be, and which of its files are not whole there; None where it is not ready."""
    if info.streamed:
        folder = imagenet_files.place(info, root)
        return (folder if imagenet_files.is_ready(info, folder) else None), []
    if reads_unpacked(info, root):
        return unpacked_folder(info, root), []
    found = locate(info, root)
    return found.folder, [file for path, file in _pairs(info, found) if not _is_whole(path, file)]


def _is_whole(path: Path | None, file: FileInfo) -> bool:
    try:
        return path is not None and bool(read_verified(path, file, ""))
    except DataError:
        return False


# Fetchers ------------------------------------------------------------------------------------------------------------


def fetch_mnist(_info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    from torchvision.datasets import MNIST

    _fetch_files(MNIST.mirrors, folder, wanted, reporter)


def fetch_fashion_mnist(_info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    from torchvision.datasets import FashionMNIST

    _fetch_files(FashionMNIST.mirrors, folder, wanted, reporter)


def fetch_tinyimagenet(_info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    _fetch_files(["http://cs231n.stanford.edu/"], folder, wanted, reporter)


def fetch_cifar10(info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    from torchvision.datasets import CIFAR10

    _fetch_archive(info, CIFAR10, folder, wanted, reporter)


def fetch_cifar100(info: DatasetInfo, folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    from torchvision.datasets import CIFAR100

    _fetch_archive(info, CIFAR100, folder, wanted, reporter)


def _fetch_files(mirrors: list[str], folder: Path, wanted: list[FileInfo], reporter: Reporter) -> None:
    """Files that are published one by one, those that are not archives packed as ``.gz``."""
    require_space(folder, sum(file.size for file in wanted) + _SLACK)
    for file in wanted:
        target = folder / (file.name if file.is_archive else f"{file.name}.gz")
        urls = [f"{mirror}{target.name}" for mirror in mirrors]
        fetched = download(urls, target, file.size + _SLACK, partial(read_content, file=file), reporter)
        _install(fetched, target, folder / file.name)


def _fetch_archive(
    info: DatasetInfo, source: type[CIFAR10], folder: Path, wanted: list[FileInfo], reporter: Reporter
) -> None:
    """Files that are published as one archive, which goes when they are there."""
    limit = sum(file.size for file in info.files) + _SLACK
    require_space(folder, 2 * limit)
    archive = download(
        [source.url], folder / source.filename, limit, partial(check_md5, expected=source.tgz_md5), reporter
    )
    try:
        with _scratch(folder / "unpacked") as unpacked:
            unpacked.mkdir()
            extract(archive, unpacked, PurePosixPath(source.base_folder), wanted, limit)
            for file in wanted:
                read_verified(unpacked / file.name, file, f"{source.url} does not hold the published files")
            for file in wanted:
                _install(unpacked / file.name, folder / file.name, folder / f"{file.name}.gz")
    finally:
        archive.unlink()


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A name beside ``target`` for unfinished work, this process's own; whatever is left there is removed."""
    scratch = target.with_name(f"{os.getpid()}.partial.{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _install(verified: Path, target: Path, twin: Path) -> None:
    """Give a verified file its name; an old one there, or its packed or unpacked twin, is set aside."""
    for old in {target, twin}:
        if old.exists():
            old.replace(old.with_name(f"{old.name}.replaced"))
    with verified.open("rb") as stream:
        os.fsync(stream.fileno())
    verified.replace(target)
