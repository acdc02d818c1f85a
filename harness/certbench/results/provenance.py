"""Where rows come from: versions, code and files. Never imports torch, and never fails for want of git."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from certbench.errors import DataError

_GIT_SECONDS = 10


def versions() -> dict[str, str]:
    """The version columns of a run row, from what is installed."""
    return {
        "torch_version": _installed("torch"),
        "python_version": platform.python_version(),
        "certbench_version": _installed("certbench"),
    }


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def code_revision(source: Path | None = None) -> str | None:
    """The git revision of the checkout that tracks ``source`` (this package), or None where there is none.

    ``-dirty`` is added while ``harness/`` or ``plugins/`` differ from the revision, new files included. An installed
    package that merely lies inside somebody's checkout is not tracked by it and has no revision.
    """
    source = source or Path(__file__)
    folder = source.resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", "--", source.name) is None:
        return None
    top, revision = _git(folder, "rev-parse", "--show-toplevel"), _git(folder, "rev-parse", "HEAD")
    if not top or not revision:
        return None
    changes = _git(Path(top), "status", "--porcelain", "--untracked-files=normal", "--", "harness", "plugins")
    return revision if changes == "" else f"{revision}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where it fails; variables that point git at another repository are not passed on."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=clean, capture_output=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        DataError: the file cannot be read; names it.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def now() -> str:
    """This moment in UTC, as timings write it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
