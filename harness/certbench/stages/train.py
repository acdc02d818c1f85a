"""What a run does not train twice: a network that another run of the same store has trained in the same way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from certbench.errors import RunError
from certbench.recipe import CORE_NUMERICS, identify
from certbench.results.store import ResultStore

NETWORK = "network.safetensors"
"""The file of a run that holds the trained network alone."""
CARD = "network.json"
"""Beside it: what a student must know of it."""
STRUCTURE = "structure.txt"
"""The file of a run that names what was built, see :func:`certbench.bounds.applicability.structure_digest`."""
TEACHER = "teacher.json"
"""The file of a run that names whom its network learnt from."""

TAKEN = "taken.partial"
"""Where checkpoints of another run are put until they are known to hold its network."""

_OWN = (NETWORK, CARD, STRUCTURE, TEACHER, "error.txt", "*.partial", "certify-*", ".*")
"""What a run writes beside the checkpoints, and what is left of work that was broken off."""


@dataclass(frozen=True)
class Trained:
    """A recorded run, the folder of its checkpoints, and the digest of its network."""

    run_id: str
    folder: Path
    digest: str


def training_id(content: Mapping[str, Any], data_digest: str, numerics: int) -> str:
    """Names what a network is trained by: a canonical recipe but for ``[certify]``, the data, the numerics."""
    training = {key: value for key, value in content.items() if key != "certify"}
    return identify(training, data_digest, (CORE_NUMERICS, numerics), "")


def find_trained(store: ResultStore, runs: Path, run_id: str, wanted: str, structure: str) -> Trained | None:
    """Another run of this harness with that training id, whose checkpoints are still in the folder ``runs``.

    It was made with today's numerics, and its network was built as here: other libraries may build another one that
    takes the same weights.
    """
    foreign = set(store.read("submissions").column("run_id").to_pylist())
    for row in store.read("runs").to_pylist():
        folder = runs / row["run_id"]
        if row["run_id"] in foreign | {run_id} or not (folder / NETWORK).is_file():
            continue
        content, numerics = json.loads(row["recipe"]), row["numerics"]
        known = training_id(content, row["dataset_digest"], numerics)
        today = identify(content, row["dataset_digest"], (CORE_NUMERICS, numerics), row["protocol"])
        if known == wanted and today == row["run_id"] and _structure(row, folder) == structure:
            return Trained(row["run_id"], folder, row["checkpoint_digest"])
    return None


def _structure(row: Mapping[str, Any], folder: Path) -> str | None:
    """Rows that were made before it was recorded have it in a file."""
    path = folder / STRUCTURE
    known: str | None = row["structure"]
    return known or (path.read_text(encoding="utf-8") if path.is_file() else None)


def has_checkpoints(folder: Path) -> bool:
    """Whether training could go on from what lies there: anything but what the harness itself writes, and tensors that
    no sidecar says are whole."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    lone = {name for name in names if name.endswith(".safetensors") and f"{name[:-12]}.json" not in names}
    return any(not any(fnmatch(name, pattern) for pattern in _OWN) for name in names - lone)


def copy_checkpoints(trained: Trained, folder: Path) -> Path:
    """Copy the checkpoints, or whatever else the method's plugin keeps there, into a part of another run's folder.

    Raises:
        RunError: a file cannot be copied.
    """
    copied = folder / TAKEN
    try:
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(trained.folder, copied, ignore=shutil.ignore_patterns(*_OWN))
    except OSError as error:  # shutil.Error, of several files, is one too
        raise RunError(f"cannot copy the checkpoints of run {trained.run_id} to {folder}: {error}") from None
    return copied


def adopt(copied: Path, folder: Path) -> None:
    """Make what :func:`copy_checkpoints` has copied the run's own; what says that a checkpoint is whole comes last.

    Raises:
        RunError: a file cannot be moved.
    """
    sources = [path for path in copied.rglob("*") if path.is_file()]
    try:
        for source in sorted(sources, key=lambda path: (path.suffix == ".json", path)):
            target = folder / source.relative_to(copied)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
        shutil.rmtree(copied)
    except OSError as error:
        raise RunError(f"cannot move {copied} to {folder}: {error}") from None


def copy_cost(store: ResultStore, trained: Trained, run_id: str) -> None:
    """Record as the cost of a run's training what training that network did cost."""
    for row in store.read("timings").to_pylist():
        if row["run_id"] == trained.run_id and row["stage"] == "train":
            store.write_timing({**row, "run_id": run_id})
