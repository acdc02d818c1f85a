"""What a run does not train twice: a network that another run of the same store has trained in the same way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
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

_OWN = (NETWORK, CARD, STRUCTURE, TEACHER, "error.txt", "*.partial", "certify-*")
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


def find_trained(store: ResultStore, runs: Path, run_id: str, wanted: str) -> Trained | None:
    """Another run of this harness with that training id, whose checkpoints are still in the folder ``runs``."""
    foreign = set(store.read("submissions").column("run_id").to_pylist())
    for row in store.read("runs").to_pylist():
        folder = runs / row["run_id"]
        known = training_id(json.loads(row["recipe"]), row["dataset_digest"], row["numerics"])
        if known == wanted and row["run_id"] not in foreign | {run_id} and (folder / NETWORK).is_file():
            return Trained(row["run_id"], folder, row["checkpoint_digest"])
    return None


def adopt(trained: Trained, folder: Path) -> None:
    """Copy the checkpoints, or whatever else the method's plugin keeps there, into another run's folder.

    What says that a checkpoint is whole comes last, so that a copy that is broken off is none.

    Raises:
        RunError: a file cannot be copied.
    """
    sources = [path for path in trained.folder.rglob("*") if path.is_file() and not _is_own(path.name)]
    try:
        for source in sorted(sources, key=lambda path: (path.suffix == ".json", path)):
            target = folder / source.relative_to(trained.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            shutil.copyfile(source, partial)
            partial.replace(target)
    except OSError as error:
        raise RunError(f"cannot copy the checkpoints of run {trained.run_id} to {folder}: {error}") from None


def _is_own(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OWN)


def copy_cost(store: ResultStore, trained: Trained, run_id: str) -> None:
    """Record as the cost of a run's training what training that network did cost."""
    for row in store.read("timings").to_pylist():
        if row["run_id"] == trained.run_id and row["stage"] == "train":
            store.write_timing({**row, "run_id": run_id})
