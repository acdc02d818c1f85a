"""What the rows of one run by one certifier add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from certbench.errors import DataError
from certbench.results.rules import UNDECIDED, VERDICTS, distinct
from certbench.stats.smoothing import allowed_refutations

PA_BINS = 20
"""Bins of equal width in which the hits of a smoothed classifier, k of n, are counted."""


@dataclass(frozen=True)
class Images:
    """What boards compare image by image, in the order of ``index``: whether certified at the recipe's radius, and the
    radius, 0 where nothing is proved and NaN where it is unknown. Arrays of one entry per image."""

    index: NDArray[np.int32]
    certified: NDArray[np.bool_]
    radius: NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How a smoothed classifier was certified: noise, error probability of each image, draws (``n`` for the estimate,
    ``draws`` in all, a mean over images) and how many images have k of n in each of ``PA_BINS`` bins from 0 to 1."""

    sigma: float
    alpha: float
    n: tuple[int, ...]
    draws: float
    exact_noise: bool
    hits: tuple[int, ...]


@dataclass(frozen=True)
class Metrics:
    """Counts over the images of one run, decided by one certifier.

    ``images`` counts rows, and accuracies are shares of it: an image that failed counts as neither correct (unless
    its prediction is known) nor certified. ``acr`` is the mean radius over all images, a misclassified one counting
    as 0, and None where any radius is unknown. ``proofs`` counts the certified images by what proved them.
    """

    run_id: str
    certifier: str
    settings_digest: str
    guarantee: str
    deploy: str
    images: int
    correct: int
    verdicts: Mapping[str, int]
    acr: float | None
    each: Images = field(repr=False, compare=False)
    proofs: Mapping[str, int] = field(default_factory=dict)
    sampling: Sampling | None = None

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

    def certified_at(self, radius: float) -> Fraction:
        """The share of images with a proved radius of at least ``radius``, at 0 of any; in percent, exactly."""
        proved = self.each.radius >= radius if radius > 0 else self.each.radius > 0
        return Fraction(100 * int(proved.sum()), self.images)


def measure(shard: pa.Table) -> Metrics:
    """Add up the certificates of one run by one certifier.

    Raises:
        DataError: more images are certified than correct, or one set of certificates mixes sigmas or alphas; names
            the run.
    """
    first = shard.slice(0, 1).to_pylist()[0]
    radius = shard.column("radius")
    right = pc.fill_null(pc.equal(shard.column("prediction"), shard.column("label")), False)
    certified = pc.equal(shard.column("verdict"), "certified")
    proved = pc.fill_null(pc.greater(radius, 0.0), False)
    statistical = first["guarantee"] == "statistical"
    # a smoothed classifier is right where it is certified at some radius
    correct = pc.and_(right, proved) if statistical else right
    metrics = Metrics(
        run_id=first["run_id"],
        certifier=first["certifier"],
        settings_digest=first["settings_digest"],
        guarantee=first["guarantee"],
        deploy=first["deploy"],
        images=shard.num_rows,
        correct=int(pc.sum(correct).as_py()),
        verdicts=dict.fromkeys(VERDICTS, 0) | _counted(shard.column("verdict")),
        acr=None if radius.null_count else _mean_radius(radius, right, statistical),
        each=Images(
            index=shard.column("index").to_numpy(),
            certified=certified.to_numpy(),
            radius=pc.if_else(right, radius, 0.0).to_numpy() if statistical else radius.to_numpy(),
        ),
        proofs=_counted(shard.column("proved_by").filter(certified)),
        sampling=_sampling(shard) if statistical else None,
    )
    check_order(metrics)
    return metrics


def _mean_radius(radius: pa.ChunkedArray, right: Any, statistical: bool) -> float:
    """Summed exactly, so that no order of summation moves it. A smoothed class that is not the label counts as 0."""
    counted = pc.if_else(right, radius, 0.0) if statistical else radius
    return math.fsum(counted.to_numpy().tolist()) / len(radius)


def _counted(values: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(values)
    return dict(
        sorted(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
    )


def _sampling(shard: pa.Table) -> Sampling | None:
    """None where the certifier recorded no counts."""
    sigma, alpha = (_one(shard, name) for name in ("sigma", "alpha"))
    n, k = shard.column("n"), shard.column("k")
    if sigma is None or alpha is None or n.null_count == len(n):
        return None
    drawn = pc.fill_null(pc.greater(n, 0), False)  # what failed may have no draw
    share = pc.divide(*(pc.cast(each.filter(drawn), pa.float64()) for each in (k, n))).drop_null().to_numpy()
    hits = np.bincount(np.minimum((share * PA_BINS).astype(int), PA_BINS - 1), minlength=PA_BINS)
    draws = pc.mean(shard.column("draws")).as_py()
    return Sampling(
        sigma=sigma,
        alpha=alpha,
        n=_budget(n),
        draws=float(draws) if draws is not None else math.nan,
        exact_noise=bool(pc.all(pc.fill_null(shard.column("exact_noise"), False)).as_py()),
        hits=tuple(hits.tolist()),
    )


def _one(shard: pa.Table, name: str) -> float | None:
    values = distinct(shard.column(name).drop_null())
    if len(values) > 1:
        run_id = shard.column("run_id")[0].as_py()
        raise DataError(f"run {run_id}: its certificates mix {name} {' and '.join(map(str, sorted(values)))}")
    return values[0] if values else None


def _budget(n: pa.ChunkedArray) -> tuple[int, ...]:
    """The one number of draws of a fixed budget; the smallest and the largest of an adaptive one."""
    ends = pc.min_max(n).as_py()
    return tuple(sorted({ends["min"], ends["max"]}))


@dataclass(frozen=True)
class AuditCounts:
    """What all attacks on one certifier's certificates add up to, in images.

    ``claimed`` have a proved radius, ``tried`` of them were attacked at it. ``missing`` are correct but were not
    attacked at the recipe's radius; ``broken`` are correct and have a witness there. ``falsified`` of the broken were
    unknown to the certifier. ``refuted`` voids a proof; what only floating point flips is counted and voids nothing.
    ``allowed`` refutations void nothing either: statistical certificates may each err with probability alpha, and so may
    each audit of them.
    """

    attacks: tuple[tuple[str, str, str], ...]
    claimed: int
    tried: int
    refuted: int
    refuted_in_float: int
    missing: int
    broken: int
    falsified: int
    allowed: int = 0
    limits: tuple[str, ...] = ()


def count_audits(certificates: pa.Table, audits: pa.Table) -> AuditCounts | None:
    """Add up the audits of one run's certificates by one certifier; None where nothing of it was attacked."""
    audits = audits.filter(pc.invert(pc.is_in(audits.column("outcome"), pa.array(UNDECIDED))))
    if not audits.num_rows:
        return None
    order = certificates.column("index").to_numpy()
    places = np.searchsorted(order, audits.column("index").to_numpy())
    outcome, kind = audits.column("outcome"), audits.column("kind")

    def images(mask: Any) -> NDArray[np.bool_]:
        found = np.zeros(len(order), dtype=bool)
        found[places[mask.to_numpy()]] = True
        return found

    def verdict(name: str) -> NDArray[np.bool_]:
        return np.asarray(pc.equal(certificates.column("verdict"), name).to_numpy())

    def known(mask: Any) -> NDArray[np.bool_]:
        return np.asarray(pc.fill_null(mask, False).to_numpy())

    correct = known(pc.equal(certificates.column("prediction"), certificates.column("label")))
    claimed = known(pc.greater(certificates.column("radius"), 0.0))
    at_radius = pc.equal(kind, "recipe_radius")
    witnessed = images(pc.and_(at_radius, pc.is_in(outcome, pa.array(["falsified", "refuted"]))))
    refuted = images(pc.equal(outcome, "refuted"))
    tried = int((claimed & images(pc.equal(kind, "certified_radius"))).sum())
    return AuditCounts(
        attacks=_attacks(audits),
        limits=tuple(sorted(distinct(audits.column("attack_limit").drop_null()))),
        claimed=int(claimed.sum()),
        tried=tried,
        refuted=int(refuted.sum()),
        refuted_in_float=int((images(pc.equal(outcome, "refuted_in_float")) & ~refuted).sum()),
        missing=int((correct & ~images(at_radius)).sum()),
        broken=int((correct & (witnessed | verdict("falsified"))).sum()),
        falsified=int((witnessed & verdict("unknown")).sum()),
        allowed=_allowed(certificates, audits),
    )


def _attacks(audits: pa.Table) -> tuple[tuple[str, str, str], ...]:
    """Name, settings digest and summary of every attack."""
    names = ["attack", "attack_settings_digest", "attack_summary"]
    found = audits.select(names).group_by(names).aggregate([]).to_pylist()
    return tuple(sorted((row[names[0]], row[names[1]], row[names[2]] or "") for row in found))


def _allowed(certificates: pa.Table, audits: pa.Table) -> int:
    """Of all images, not of the certified ones alone: alpha bounds the chance to be certified *and* wrong."""
    alpha = _one(certificates, "alpha")
    if certificates.column("guarantee")[0].as_py() != "statistical" or not alpha:
        return 0
    names = ["attack", "attack_settings_digest"]
    return allowed_refutations(certificates.num_rows, alpha, audits.group_by(names).aggregate([]).num_rows)


def attacked_accuracy(metrics: Metrics, audit: AuditCounts | None) -> Fraction | None:
    """In percent, exactly: correct images without a witness; None unless every correct image was attacked, of
    statistical rows every certificate.

    Raises:
        DataError: more images are certified than withstood the attacks, though no certificate was refuted.
    """
    if audit is None:
        return None
    if metrics.guarantee == "statistical":
        if audit.tried < audit.claimed:
            return None
        return Fraction(100 * (metrics.correct - audit.refuted), metrics.images)
    if audit.missing:
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
