"""A row of a board: one method with one recipe, network, certifier and cap, over its seeds.

Runs that share a recipe's name but not its content (an override, another ``numerics``) are different rows, told apart by
what differs; so are runs of different submitters.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from certbench.errors import DataError
from certbench.leaderboard.figures import Figure, figure, share
from certbench.leaderboard.gather import Entry
from certbench.leaderboard.metrics import Cost, Sampling
from certbench.recipe import SEQUENTIAL, Smoothing, split_name
from certbench.results.rules import VERDICTS, parse_fraction
from certbench.stats.smoothing import anytime_radius

if TYPE_CHECKING:
    from certbench.leaderboard.comparison import Published

CURVE_POINTS = 80
"""Radii, evenly spaced from 0, at which a row's certified accuracy is drawn."""


@dataclass(frozen=True)
class Audited:
    """What attacks on a row's certificates found, in images over its audited seeds.

    ``attacks`` are name, settings digest and summary. ``tried`` certificates were attacked at their own radius.
    ``refuted_runs`` are the runs with a refuted one, ``void`` says whether any of them has more than its guarantee
    allows. ``limits`` say why witnesses could not be confirmed.
    """

    seeds: int
    tried: int
    refuted: int
    refuted_in_float: int
    attacks: tuple[tuple[str, str, str], ...]
    refuted_runs: tuple[str, ...]
    void: bool
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing:
    """The range of ranks that the comparisons of a board leave a row, among ``of`` rows that were compared, itself one."""

    first: int
    last: int
    of: int

    @property
    def alone(self) -> bool:
        """Whether it was compared with none, so that its rank says nothing."""
        return self.of == 1


class Reach(NamedTuple):
    """Which radii the draws of a row decide that end before all n are drawn.

    ``listed``: those that are decided before, none where draws end within a tolerance of every radius; ``provable``: the
    largest radius that n draws could prove.
    """

    listed: frozenset[Fraction]
    provable: float

    @property
    def last(self) -> Fraction | None:
        """The largest listed radius that n draws can prove."""
        return max((radius for radius in self.listed if radius <= self.provable), default=None)

    def decides(self, radius: Fraction) -> bool:
        return radius in self.listed or radius > self.provable

    def stops_short(self, radius: Fraction) -> bool:
        """Whether it is above all that draws decide; an undecided one below has at least the images of the next one."""
        return self.last is not None and radius > self.last and not self.decides(radius)


@dataclass(frozen=True)
class Row:
    """One measured row. Accuracies in percent; ``verdicts`` counts over all seeds; seconds are means over seeds.

    ``attacked`` is None unless every correct image of every seed was attacked, ``audit`` where no seed was audited.
    In ``verdicts`` an image that the certifier left unknown and an attack broke counts as falsified.

    ``images`` is the number of images of the seed that has the fewest, ``expected`` the size of the test set as far
    as any run of it tells. ``at`` holds the certified accuracy at radii of a smoothed classifier, those left out that
    draws stopped short of (``reach``, None where something else ends them), ``curve`` (radius, percent) pairs for any row.
    ``entries`` are the runs themselves, by seed.
    """

    method: str
    recipe: str
    variant: str
    model: str
    certifier: str
    settings_digest: str
    guarantee: str
    deploy: str
    cap: Fraction | None
    submitter: str | None
    rechecked: int
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    run_ids: tuple[str, ...]
    images: int
    expected: int
    clean: Figure
    certified: Figure
    attacked: Figure | None
    audit: Audited | None
    acr: Figure | None
    at: Mapping[str, Figure]
    curve: tuple[tuple[float, float], ...]
    sampling: Sampling | None
    reach: Reach | None
    verdicts: Mapping[str, int]
    proofs: Mapping[str, int]
    train_seconds: float | None
    certify_seconds: float | None
    devices: tuple[str, ...]
    entries: tuple[Entry, ...]
    published: tuple[Published, ...] = ()
    standing: Standing | None = None
    acr_standing: Standing | None = None

    def is_at_least(self, radius: str) -> bool:
        """Whether more images may have that radius than are counted: draws of some ended before it was decided."""
        return radius in self.at and self.reach is not None and not self.reach.decides(Fraction(radius))

    @property
    def base(self) -> str:
        """The recipe's name without what ``--set`` changed."""
        return split_name(self.recipe)[0]

    @property
    def changed(self) -> bool:
        return self.base != self.recipe

    @property
    def complete(self) -> bool:
        return self.images == self.expected

    @property
    def void(self) -> bool:
        """One refuted proof voids the row; statistical certificates may err, so these need more than chance allows."""
        return self.audit is not None and self.audit.void

    @property
    def acr_of_cap(self) -> float | None:
        return self.acr.mean / float(self.cap) if self.acr and self.cap else None

    @cached_property
    def budget(self) -> tuple[object, ...]:
        """Rows of one budget may be compared by their ACR: one cap; for smoothing one rule by which draws end, one alpha."""
        if self.sampling is None:
            return self.cap, self.guarantee == "statistical"
        asked = (json.loads(self.run["recipe"]).get("certify") or {}).get("smoothing") or {}
        rule = tuple(str(asked.get(key)) for key in ("n", "goal", "radii", "tolerance"))
        return self.cap, self.sampling.alpha, rule if asked else self.sampling.n

    @property
    def run(self) -> Mapping[str, Any]:
        """The row in ``runs`` of the first seed."""
        return self.entries[0].run


def rows_of(members: Iterable[Entry], expected: int, radii: Collection[str]) -> list[Row]:
    """The rows that the entries of one board make up, in no order; ``radii`` are those of :attr:`Row.at`.

    Raises:
        DataError: one seed of a row is there twice.
    """
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in members:
        groups[(*_identity(entry), json.dumps(_content(entry.run), sort_keys=True))].append(entry)
    variants = _variants(groups)
    return [_row(group, variants[key], expected, radii) for key, group in groups.items()]


def _identity(entry: Entry) -> tuple[str, ...]:
    run, metrics = entry.run, entry.metrics
    return (
        *(_spelled(run[name]) for name in ("method", "recipe_name", "model")),
        metrics.certifier,
        metrics.settings_digest,
        metrics.guarantee,
        metrics.deploy,
        str(run["cap"]),
        entry.submission["submitter"] if entry.submission else "",
    )


def _spelled(name: str) -> str:
    """A name as far as it tells rows apart: a seed must not count twice because a name is spelled in another way."""
    return " ".join(name.split()).casefold()


def _content(run: Mapping[str, Any]) -> dict[str, Any]:
    """What two seeds of one row have in common: the recipe, flat, without seed, names and published figures."""
    flat = flatten(json.loads(run["recipe"]))
    names = ("seed", "name", "reference", "method.name", "model")
    kept = {
        key: value for key, value in flat.items() if key not in names and not key.startswith("reference.")
    }
    return {**kept, "numerics": run["numerics"]}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _variants(groups: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """For each group, the settings in which it differs from others of the same identity; mostly empty."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for key in groups:
        alike[key[:-1]].append(key)
    found = {}
    for keys in alike.values():
        contents = [json.loads(key[-1]) for key in keys]
        names = sorted(set().union(*contents))
        differing = [name for name in names if any(c.get(name) != contents[0].get(name) for c in contents)]
        for key, content in zip(keys, contents, strict=True):
            found[key] = ", ".join(f"{name} = {json.dumps(content.get(name))}" for name in differing)
    return found


def _row(members: Sequence[Entry], variant: str, expected: int, radii: Collection[str]) -> Row:
    group = tuple(sorted(members, key=lambda entry: int(entry.run["seed"])))
    _distinct_seeds(group)
    run, metrics, submission = group[0].run, group[0].metrics, group[0].submission
    images = min(entry.metrics.images for entry in group)
    attacked = [entry.attacked for entry in group if entry.attacked is not None]
    sampling = _sampling(group)
    reach = _reach(run, metrics.certifier, sampling)
    acr = [entry.metrics.acr for entry in group if entry.metrics.acr is not None]
    return Row(
        method=run["method"],
        recipe=run["recipe_name"],
        variant=variant,
        model=run["model"],
        certifier=metrics.certifier,
        settings_digest=metrics.settings_digest,
        guarantee=metrics.guarantee,
        deploy=metrics.deploy,
        cap=parse_fraction(run["cap"]) if run["cap"] is not None else None,
        submitter=submission["submitter"] if submission else None,
        rechecked=sum(entry.submission["rechecked"] for entry in group if entry.submission),
        epochs=tuple(sorted({entry.run["epochs"] for entry in group})),
        seeds=tuple(entry.run["seed"] for entry in group),
        run_ids=tuple(entry.run["run_id"] for entry in group),
        images=min(entry.metrics.decided for entry in group),
        expected=expected,
        clean=share([entry.metrics.clean_accuracy for entry in group], images),
        certified=share([entry.metrics.certified_accuracy for entry in group], images),
        attacked=share(attacked, images) if len(attacked) == len(group) else None,
        audit=_audited(group),
        acr=figure(acr) if len(acr) == len(group) else None,
        at={
            radius: share([entry.metrics.certified_at(float(radius)) for entry in group], images)
            for radius in radii
            if reach is None or not reach.stops_short(Fraction(radius))
        },
        curve=_curve(group),
        sampling=sampling,
        reach=reach,
        verdicts={verdict: sum(_verdicts(entry)[verdict] for entry in group) for verdict in VERDICTS},
        proofs=_proofs(group),
        train_seconds=_mean_seconds([entry.train for entry in group]),
        certify_seconds=_mean_seconds([entry.certify for entry in group]),
        devices=tuple(
            sorted({d for e in group for cost in (e.train, e.certify) if cost for d in cost.devices})
        ),
        entries=group,
    )


def _verdicts(entry: Entry) -> dict[str, int]:
    """The certifier's verdicts, less what attacks have decided since."""
    falsified = entry.audit.falsified if entry.audit else 0
    counts = dict(entry.metrics.verdicts)
    return counts | {
        "unknown": counts["unknown"] - falsified,
        "falsified": counts["falsified"] + falsified,
    }


def _proofs(group: Sequence[Entry]) -> dict[str, int]:
    total: dict[str, int] = defaultdict(int)
    for entry in group:
        for proof, count in entry.metrics.proofs.items():
            total[proof] += count
    return dict(sorted(total.items()))


def _audited(group: Sequence[Entry]) -> Audited | None:
    audits = {entry.run["run_id"]: entry.audit for entry in group if entry.audit is not None}
    if not audits:
        return None
    return Audited(
        seeds=len(audits),
        tried=sum(audit.tried for audit in audits.values()),
        refuted=sum(audit.refuted for audit in audits.values()),
        refuted_in_float=sum(audit.refuted_in_float for audit in audits.values()),
        attacks=tuple(sorted({attack for audit in audits.values() for attack in audit.attacks})),
        refuted_runs=tuple(sorted(run for run, audit in audits.items() if audit.refuted)),
        void=any(audit.refuted > audit.allowed for audit in audits.values()),
        limits=tuple(sorted({limit for audit in audits.values() for limit in audit.limits})),
    )


def _sampling(group: Sequence[Entry]) -> Sampling | None:
    """The sampling of all seeds together; None unless every one has it."""
    found = [entry.metrics.sampling for entry in group]
    if any(each is None for each in found):
        return None
    each = [sampling for sampling in found if sampling is not None]
    ends = sorted({n for sampling in each for n in sampling.n})
    return Sampling(
        sigma=each[0].sigma,
        alpha=max(sampling.alpha for sampling in each),
        n=tuple(sorted({ends[0], ends[-1]})),
        draws=statistics.fmean(sampling.draws for sampling in each),
        exact_noise=all(sampling.exact_noise for sampling in each),
        hits=tuple(map(sum, zip(*(sampling.hits for sampling in each), strict=True))),
    )


def _reach(run: Mapping[str, Any], certifier: str, sampling: Sampling | None) -> Reach | None:
    asked = (json.loads(run["recipe"]).get("certify") or {}).get("smoothing") or {}
    usual = Smoothing()
    goal = asked.get("goal", usual.goal)
    if sampling is None or not certifier.startswith(SEQUENTIAL) or goal == "budget":
        return None
    n = asked.get("n", usual.n)
    provable = float(anytime_radius(n, n, sampling.alpha, sampling.sigma))
    if goal == "tolerance":
        return Reach(frozenset(), provable)
    radii = frozenset(map(Fraction, asked.get("radii", usual.radii)))
    return Reach(radii, provable) if any(0 < radius <= provable for radius in radii) else None


def _curve(group: Sequence[Entry]) -> tuple[tuple[float, float], ...]:
    """Certified accuracy over radius, a mean over seeds; empty where a radius is unknown."""
    if any(entry.metrics.acr is None for entry in group):
        return ()
    end = max(float(entry.metrics.each.radius.max(initial=0.0)) for entry in group)
    if end <= 0:
        return ()
    ordered = [np.sort(entry.metrics.each.radius) for entry in group]
    total = sum(len(each) for each in ordered)
    curve = []
    for step in range(CURVE_POINTS + 1):
        radius = end * step / CURVE_POINTS
        side: Literal["left", "right"] = "left" if step else "right"  # at 0: with any radius above it
        proved = sum(len(each) - int(np.searchsorted(each, radius, side)) for each in ordered)
        curve.append((radius, 100 * proved / total))
    return tuple(curve)


def _distinct_seeds(group: Sequence[Entry]) -> None:
    for one, other in pairwise(group):
        if one.run["seed"] == other.run["seed"]:
            raise DataError(
                f"runs {one.run['run_id']} and {other.run['run_id']} are both seed {one.run['seed']} of "
                f"{one.run['recipe_name']}; a seed counts once, so remove one of them"
            )


def _mean_seconds(found: Sequence[Cost | None]) -> float | None:
    seconds = [cost.seconds for cost in found if cost is not None]
    return statistics.fmean(seconds) if seconds and len(seconds) == len(found) else None


def order(row: Row) -> tuple[Any, ...]:
    """Complete rows first, then by certified accuracy (of norm l2: by ACR), clean accuracy and names."""
    names = (row.method, row.recipe, row.variant, row.model, row.certifier, row.settings_digest)
    by_radius = row.run["norm"] == "l2"
    first = (row.acr.mean if row.acr else -math.inf) if by_radius else row.certified.mean
    return (
        not row.complete,
        -first,
        -row.clean.mean,
        *names,
        str(row.cap),
        row.guarantee,
        row.deploy,
        row.submitter or "",
    )
