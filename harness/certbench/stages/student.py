"""What is kept of whom a student learnt from: a file in its folder, and the digest that its row carries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certbench.errors import RunError
from certbench.results.files import write_atomically
from certbench.results.store import ResultStore
from certbench.stages.train import TEACHER, Trained, has_checkpoints


def keep_teacher(folder: Path, teacher: Mapping[str, Any]) -> None:
    """Write down whom a student learns from, in its folder, before it does.

    Raises:
        RunError: the checkpoints there learnt from another network, or it is not known from which.
    """
    known = taught_by(folder)
    if known != teacher["digest"] and has_checkpoints(folder):
        raise RunError(
            f"the student in {folder} began to learn from {f'network {known[:16]}' if known else 'an unknown network'}, "
            f"teacher {teacher['teacher']} is now {teacher['digest'][:16]}; remove the folder to train the student again"
        )
    write_atomically(folder / TEACHER, json.dumps(teacher, indent=1, sort_keys=True).encode())


def taught_by(folder: Path) -> str | None:
    """The digest of the network that the student in this folder learnt from; None where nothing says it.

    Raises:
        RunError: what was written down cannot be read.
    """
    path = folder / TEACHER
    if not path.is_file():
        return None
    try:
        digest = json.loads(path.read_text(encoding="utf-8"))["digest"]
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            return str(digest)
        reason = "its digest is none"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = type(error).__name__
    raise RunError(f"{path} cannot be read ({reason}); remove its folder to train the student again")


def copy_teacher(trained: Trained, folder: Path) -> None:
    """Whom another run's network learnt from, written down for this one, whose network it is too."""
    if (path := trained.folder / TEACHER).is_file():
        write_atomically(folder / TEACHER, path.read_bytes())
    else:
        (folder / TEACHER).unlink(missing_ok=True)


def teacher_digest(store: ResultStore, run_id: str, name: str, folder: Path) -> str:
    """Which network a student learnt from: what is recorded of it, or else what its folder says.

    Raises:
        RunError: neither says it, or what the folder says cannot be read.
    """
    recorded = store.run(run_id)["teacher_digest"] if store.has_run(run_id) else None
    digest: str | None = recorded or taught_by(folder)
    if digest is None:
        raise RunError(
            f"{name}: nothing in {folder} says which network it learnt from; remove the folder to train it again"
        )
    return digest
