"""Folders that are either whole or absent, and never overwritten unasked."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from certbench.errors import RunError, UsageError

EXPORTED = re.compile(r"instances\.csv|onnx/network\.onnx|vnnlib/image-[0-9]{1,12}\.vnnlib")
"""Every file of an exported folder, relative to it. No other is written, and no folder with another is replaced."""


def check_target(path: Path, *, force: bool, folder: bool) -> None:
    """Find out before the work, not after, whether ``path`` may be written; ``write_folder`` asks again.

    Raises:
        UsageError: something is there that may not be replaced, with the way on.
    """
    if not Path(os.path.abspath(path)).name or path.is_symlink():
        raise UsageError(f"{path} is a link or no name for an export; choose another")
    if not path.exists():
        return
    if path.is_dir() != folder:
        raise UsageError(f"{path} is a {'file' if folder else 'folder'}; choose another name")
    if folder and not any(path.iterdir()):
        return
    if not force:
        raise UsageError(f"{path} exists; --force replaces it")
    strange = _strangers(path) if folder else []
    if strange:
        raise UsageError(
            f"{path} holds {strange[0]}, which no export wrote; --force replaces only exported folders"
        )


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]], *, force: bool = False) -> None:
    """Write all files, by their names in ``folder``; a reader or a crash never meets a part of them.

    Raises:
        UsageError: ``folder`` may not be replaced, or a name is none of an exported folder.
        RunError: the folder cannot be made or written; what was there stays.
    """
    check_target(folder, force=force, folder=True)
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        try:
            for name, content in files:
                _write(temporary, name, content)
            _swap(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}") from None


def _strangers(folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [name for name in names if not EXPORTED.fullmatch(name)]


def _write(folder: Path, name: str, content: bytes) -> None:
    if not EXPORTED.fullmatch(name):
        raise UsageError(f"{name!r} is no name of an exported file")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; a folder that is not empty steps aside and comes back on failure."""
    if not folder.exists() or not any(folder.iterdir()):
        new.replace(folder)
        return
    aside = folder.with_name(f"{new.name}.old")
    folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
