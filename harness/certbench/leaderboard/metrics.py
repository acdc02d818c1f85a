"""What the rows of one run by one certifier add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from certbench.errors import DataError
from certbench.results.rules import UNDECIDED, VERDICTS


@dataclass(frozen=True)
class Metrics:
    """Counts over the images of one run, decided by one certifier.

    ``images`` counts rows, and accuracies are shares of it: an image that failed counts as neither correct (unless
    its prediction is known) nor certified. ``acr`` is the mean radius over all images, a misclassified one counting
    as 0, and None where any radius is unknown. ``reach`` is the largest index plus one.
    """

    run_id: str
    certifier: str
    settings_digest: str
    guarantee: str
    deploy: str
    images: int
    reach: int
    correct: int
    verdicts: Mapping[str, int]
    acr: float | None

    @property
    def certified(self) -> int:
        return self.verdicts["certified"]

    @property
    def decided(self) -> int:
        """Images that the certifier was run on."""
        return self.images - self.verdicts["not_run"]

    @property
    def clean_accuracy(self) -> Fraction:
        """In percent, exactly."""
        return Fraction(100 * self.correct, self.images)

    @property
    def certified_accuracy(self) -> Fraction:
        """In percent, exactly."""
        return Fraction(100 * self.certified, self.images)


def measure(shard: pa.Table) -> Metrics:
    """Add up the certificates of one run by one certifier.

    Raises:
        DataError: more images are certified than correct; names the run.
    """
    first = shard.slice(0, 1).to_pylist()[0]
    counted = {
        entry["values"]: entry["counts"] for entry in pc.value_counts(shard.column("verdict")).to_pylist()
    }
    radius = shard.column("radius")
    correct = pc.equal(shard.column("prediction"), shard.column("label"))
    if (
        first["guarantee"] == "statistical"
    ):  # a smoothed classifier is right where it is certified at some radius
        correct = pc.and_(correct, pc.greater(radius, 0.0))
    metrics = Metrics(
        run_id=first["run_id"],
        certifier=first["certifier"],
        settings_digest=first["settings_digest"],
        guarantee=first["guarantee"],
        deploy=first["deploy"],
        images=shard.num_rows,
        reach=int(pc.max(shard.column("index")).as_py()) + 1,
        correct=int(pc.sum(correct).as_py() or 0),
        verdicts={verdict: counted.get(verdict, 0) for verdict in VERDICTS},
        acr=None if radius.null_count else math.fsum(radius.to_pylist()) / shard.num_rows,
    )
    check_order(metrics)
    return metrics


@dataclass(frozen=True)
class AuditCounts:
    """What all attacks on one certifier's certificates add up to, in images.

    ``claimed`` have a proved radius, ``tried`` of them were attacked at it. ``missing`` are correct but were not
    attacked at the recipe's radius; ``broken`` are correct and have a witness there. ``falsified`` of the broken were
    unknown to the certifier. ``refuted`` voids a proof; what only floating point flips is counted and voids nothing.
    """

    attacks: tuple[tuple[str, str], ...]
    claimed: int
    tried: int
    refuted: int
    refuted_in_float: int
    missing: int
    broken: int
    falsified: int


def count_audits(certificates: pa.Table, audits: pa.Table) -> AuditCounts | None:
    """Add up the audits of one run's certificates by one certifier; None where nothing of it was attacked."""
    rows = [row for row in audits.to_pylist() if row["outcome"] not in UNDECIDED]
    if not rows:
        return None

    def images(kind: str | None, *outcomes: str) -> set[int]:
        return {
            row["index"]
            for row in rows
            if kind in (None, row["kind"]) and (not outcomes or row["outcome"] in outcomes)
        }

    decided = certificates.select(["index", "label", "prediction", "verdict", "radius"]).to_pylist()
    correct = {row["index"] for row in decided if row["prediction"] == row["label"]}
    claimed = {row["index"] for row in decided if (row["radius"] or 0) > 0}
    named = {verdict: {row["index"] for row in decided if row["verdict"] == verdict} for verdict in VERDICTS}
    at_radius = images("recipe_radius", "falsified", "refuted")
    refuted = images(None, "refuted")
    return AuditCounts(
        attacks=tuple(sorted({(row["attack"], row["attack_settings_digest"]) for row in rows})),
        claimed=len(claimed),
        tried=len(claimed & images("certified_radius")),
        refuted=len(refuted),
        refuted_in_float=len(images(None, "refuted_in_float") - refuted),
        missing=len(correct - images("recipe_radius")),
        broken=len(correct & (at_radius | named["falsified"])),
        falsified=len(at_radius & named["unknown"]),
    )


def attacked_accuracy(metrics: Metrics, audit: AuditCounts | None) -> Fraction | None:
    """In percent, exactly: correct images without a witness; None unless every correct image was attacked.

    Raises:
        DataError: more images are certified than withstood the attacks, though no certificate was refuted.
    """
    if audit is None or audit.missing:
        return None
    withstood = metrics.correct - audit.broken
    if metrics.certified > withstood and not audit.refuted:
        raise DataError(
            f"run {metrics.run_id}, certifier {metrics.certifier}: {metrics.certified} images are certified but only "
            f"{withstood} withstood the attacks, and none is refuted; its rows are wrong and no table is built"
        )
    return Fraction(100 * withstood, metrics.images)


def check_order(metrics: Metrics) -> None:
    """Certified accuracy cannot exceed clean accuracy; a table that says so is not built."""
    if metrics.certified > metrics.correct:
        raise DataError(
            f"run {metrics.run_id}, certifier {metrics.certifier}: {metrics.certified} images are certified but only "
            f"{metrics.correct} are classified correctly; its rows are wrong and no table is built"
        )


@dataclass(frozen=True)
class Cost:
    """Seconds of one stage of one run, summed over its sessions, and the devices they ran on."""

    seconds: float
    devices: tuple[str, ...]


def costs(timings: pa.Table) -> dict[tuple[str, str], Cost]:
    """The cost of every (run id, stage)."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in timings.to_pylist():
        rows.setdefault((row["run_id"], row["stage"]), []).append(row)
    return {
        key: Cost(math.fsum(row["seconds"] for row in group), tuple(sorted({row["device"] for row in group})))
        for key, group in rows.items()
    }
