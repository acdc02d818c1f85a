"""What is recorded of a run as a whole: its row in ``runs``, and the headlines of what the store holds for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from certbench.data.dataset import Dataset
from certbench.plugins import Owned
from certbench.recipe import Recipe
from certbench.results import provenance
from certbench.results.store import ResultStore
from certbench.stages.audit import refutations
from certbench.stages.certify import CertificateSet


def run_row(
    run_id: str, recipe: Recipe, owned: Owned, dataset: Dataset, network: nn.Module
) -> dict[str, Any]:
    """The row in ``runs`` but for the digests of the network, its structure and its teacher, which are the run's to add."""
    has_radius = recipe.threat.radius is not None
    return {
        "run_id": run_id,
        "protocol": recipe.protocol,
        "method": recipe.method.name,
        "plugin": owned.plugin.distribution,
        "plugin_version": owned.plugin.version,
        "numerics": owned.card.numerics,
        "dataset": recipe.dataset,
        "dataset_digest": dataset.digest,
        "model": recipe.model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "norm": recipe.threat.norm,
        "radius": str(recipe.radius) if has_radius else None,
        "sigma": recipe.threat.sigma,
        "cap": str(recipe.cap) if has_radius else None,
        "seed": recipe.seed,
        "recipe_name": recipe.name,
        "recipe": recipe.canonical_json(),
        "epochs": recipe.train.epochs,
        **provenance.versions(),
        "code_revision": provenance.code_revision(),
    }


@dataclass(frozen=True)
class RunOutcome:
    """What a run left behind: its id, the folder of its checkpoints, the store of its rows, and its headlines.

    ``refuted`` counts images whose certificate any recorded attack refuted; it is None where none was audited.
    ``void`` says whether that voids the row: one refuted proof does, and of statistical certificates more than chance
    allows. ``acr`` is the mean certified radius, None where one is unknown. Under norm l2 an image counts as certified where
    some radius above 0 is.
    """

    run_id: str
    recipe: Recipe
    folder: Path
    store: Path
    clean_accuracy: float
    certified_accuracy: float
    refuted: int | None = None
    acr: float | None = None
    void: bool = False


def outcome(store: ResultStore, of: CertificateSet, recipe: Recipe, folder: Path) -> RunOutcome:
    """The headlines of one set of certificates of a run."""
    rows = store.certificates(*of).to_pandas()
    certified = float((rows["verdict"] == "certified").mean())
    clean = float((rows["prediction"] == rows["label"]).mean())
    refuted, void = refutations(store, of)
    return RunOutcome(
        of[0],
        recipe,
        folder,
        store.folder,
        clean_accuracy=certified if recipe.threat.norm == "l2" else clean,
        certified_accuracy=certified,
        refuted=refuted,
        void=void,
        acr=None if rows["radius"].isna().any() else float(rows["radius"].mean()),
    )
