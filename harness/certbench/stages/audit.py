"""What a run does to audit: the attack on its kind of certificate, asked over its rows, and what was refuted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from certbench.audit.certificates import Audit, AuditTask, audit
from certbench.audit.registry import Attack, SmoothedAttack, find_attack, find_smoothed_attack
from certbench.audit.statistical import SmoothedAuditTask, audit_smoothed
from certbench.contract import Reporter
from certbench.data.dataset import Dataset
from certbench.models.kernels import plain_kernels
from certbench.recipe import Recipe
from certbench.results.rules import UNDECIDED
from certbench.results.store import ResultStore
from certbench.stages.certify import CertificateSet
from certbench.stats.smoothing import RADII, allowed_refutations

if TYPE_CHECKING:
    import pandas as pd

AnyAttack = Attack | SmoothedAttack


def choose_attack(name: str, recipe: Recipe) -> AnyAttack:
    """What goes by that name against the recipe's kind of certificate.

    Raises:
        UsageError: nothing does.
    """
    return find_smoothed_attack(name) if recipe.threat.norm == "l2" else find_attack(name)


@dataclass(frozen=True)
class Auditor:
    """Attacks certificates of one recipe's ``network``, the deployed one: the one that was certified."""

    recipe: Recipe
    dataset: Dataset
    network: nn.Module
    device: torch.device
    reporter: Reporter

    def audit(self, attack: AnyAttack, rows: pd.DataFrame) -> Audit:
        """Attack every correct image at the recipe's radius and every certificate at its own.

        Statistical certificates, of which ``rows`` has certificates only, are recounted and attacked.
        """
        if isinstance(attack, SmoothedAttack):
            return audit_smoothed(self._smoothed(attack, rows))
        with plain_kernels():  # the evaluations that a float-sound guarantee speaks of
            return audit(self._deterministic(attack, rows))

    def _deterministic(self, attack: Attack, rows: pd.DataFrame) -> AuditTask:
        return AuditTask(
            network=self.network,
            split=self.dataset.test,
            levels=self.dataset.info.levels,
            index=rows["index"].to_numpy(),
            prediction=rows["prediction"].fillna(-1).to_numpy(),
            verdict=rows["verdict"].to_numpy(),
            radius=rows["radius"].to_numpy(),
            guarantee=rows["guarantee"].iloc[0],
            deploy=rows["deploy"].iloc[0],
            recipe_radius=self.recipe.radius,
            attack=attack,
            seed=self.recipe.seed,
            device=self.device,
            begin=lambda balls: self.reporter.stage(f"audit ({attack.name})", balls, "ball"),
            progress=self.reporter.advance,
        )

    def _smoothed(self, attack: SmoothedAttack, rows: pd.DataFrame) -> SmoothedAuditTask:
        return SmoothedAuditTask(
            network=self.network,
            split=self.dataset.test,
            levels=self.dataset.info.levels,
            index=rows["index"].to_numpy(),
            radius=rows["radius"].where(rows["prediction"] == rows["label"], 0.0).to_numpy(),
            sigma=rows["sigma"].iloc[0],
            alpha=rows["alpha"].iloc[0],
            one_sided=rows["certifier"].iloc[0] in RADII,
            exact_noise=bool(rows["exact_noise"].iloc[0]),
            deploy=rows["deploy"].iloc[0],
            attack=attack,
            seed=self.recipe.seed,
            device=self.device,
            begin=lambda images: self.reporter.stage(f"audit ({attack.name})", images, "image"),
            progress=self.reporter.advance,
        )


def can_be_audited(attack: AnyAttack, rows: pd.DataFrame) -> bool:
    """Whether there is a ball to attack: that of a correct image, or of a statistical certificate."""
    right = rows["prediction"] == rows["label"]
    return bool((right & (rows["radius"] > 0) if isinstance(attack, SmoothedAttack) else right).any())


def refutations(store: ResultStore, of: CertificateSet) -> tuple[int | None, bool]:
    """How many images have a refuted certificate, None where none was audited, and whether that voids them all."""
    audits = store.audits(*of).to_pandas()
    if audits.empty:
        return None, False
    refuted = audits.loc[audits["outcome"] == "refuted", "index"].nunique()
    decided = audits[~audits["outcome"].isin(UNDECIDED)]
    attacks = len(decided[["attack", "attack_settings_digest"]].drop_duplicates())
    certificates = store.certificates(*of)
    first = certificates.slice(0, 1).to_pylist()[0]
    if first["guarantee"] != "statistical":
        return refuted, refuted > 0
    return refuted, refuted > allowed_refutations(certificates.num_rows, first["alpha"], attacks)
