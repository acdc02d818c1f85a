"""Boards: measured rows of one protocol, data set, norm and radius, aggregated over seeds, with published figures.

A row is one method with one recipe, network, certifier and cap. Runs that share a recipe's name but not its content
(an override, another ``numerics``) are different rows, told apart by what differs.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pyarrow as pa

from certbench.errors import DataError, UsageError
from certbench.leaderboard.metrics import (
    AuditCounts,
    Cost,
    Metrics,
    attacked_accuracy,
    costs,
    count_audits,
    measure,
)
from certbench.results.checks import CrossCheck, audit_problems
from certbench.results.rules import VERDICTS, parse_fraction
from certbench.results.store import ResultStore, certify_stage
from certbench.threat import format_radius


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, with the sample standard deviation where there are two seeds or more."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Published:
    """Published figures for a row's setting, as accuracies in percent; differences are measured minus published."""

    source: str
    clean: Figure | None
    certified: Figure | None
    clean_difference: float | None
    certified_difference: float | None


@dataclass(frozen=True)
class Audited:
    """What attacks on a row's certificates found, in images over its audited seeds.

    ``tried`` certificates were attacked at their own radius. ``refuted_runs`` are the runs with a refuted one.
    """

    seeds: int
    tried: int
    refuted: int
    refuted_in_float: int
    attacks: tuple[tuple[str, str], ...]
    refuted_runs: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One measured row. Accuracies in percent; ``verdicts`` counts over all seeds; seconds are means over seeds.

    ``attacked`` is None unless every correct image of every seed was attacked, ``audit`` where no seed was audited.
    In ``verdicts`` an image that the certifier left unknown and an attack broke counts as falsified.

    ``images`` is the number of images of the seed that has the fewest, ``expected`` the size of the test set as far
    as any run of it tells.
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
    verdicts: Mapping[str, int]
    train_seconds: float | None
    certify_seconds: float | None
    devices: tuple[str, ...]
    published: tuple[Published, ...]

    @property
    def complete(self) -> bool:
        return self.images == self.expected

    @property
    def void(self) -> bool:
        """One refuted proof voids the row; statistical certificates may err, each with probability alpha."""
        return self.guarantee != "statistical" and self.audit is not None and self.audit.refuted > 0

    @property
    def acr_of_cap(self) -> float | None:
        return self.acr.mean / float(self.cap) if self.acr and self.cap else None


@dataclass(frozen=True)
class Board:
    """Rows that may be compared: complete ones first, each group by certified accuracy, then clean, then names.

    ``voided`` rows have a refuted certificate: they stand below the table and take no part in any ranking.
    """

    name: str
    protocol: str
    dataset: str
    norm: str
    radius: str
    rows: tuple[Row, ...]
    voided: tuple[Row, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.norm}, {self.radius}"

    def best(self, column: str) -> set[int]:
        """Places of the rows with the best ``clean`` or ``certified`` mean among the complete ones."""
        values = {place: getattr(row, column).mean for place, row in enumerate(self.rows) if row.complete}
        return {place for place, value in values.items() if value == max(values.values())}


@dataclass(frozen=True)
class _Entry:
    """One run by one certifier: its row, what its certificates and their audits add up to, and its cost."""

    run: Mapping[str, Any]
    metrics: Metrics
    train: Cost | None
    certify: Cost | None
    audit: AuditCounts | None
    attacked: Fraction | None


def boards(store: ResultStore) -> list[Board]:
    """All boards of a store, sorted by name.

    Raises:
        UsageError: the store holds no certificates.
        DataError: a file is damaged, a row contradicts another, or rows that must not share a table would.
    """
    entries = _entries(store)
    expected: dict[str, int] = defaultdict(int)
    for entry in entries:
        digest = entry.run["dataset_digest"]
        expected[digest] = max(expected[digest], entry.metrics.reach)
    settings: dict[tuple[str, str, str], dict[str, list[_Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        run = entry.run
        settings[run["dataset"], run["norm"], _radius(run)][run["protocol"]].append(entry)
    found = []
    for (dataset, norm, radius), protocols in settings.items():
        for protocol, members in protocols.items():
            _one_data_digest(members)
            name = _slug(f"{dataset}-{norm}-{radius.removeprefix('radius ').replace(' ', '-')}")
            if protocol != max(protocols, key=_natural):
                name += f"--{_slug(protocol)}"
            rows = _rows(members, expected)
            ranked, voided = (tuple(r for r in rows if r.void is void) for void in (False, True))
            found.append(Board(name, protocol, dataset, norm, radius, ranked, voided))
    _distinct_names(found)
    return sorted(found, key=lambda board: _natural(board.name))


def _entries(store: ResultStore) -> list[_Entry]:
    paths = store.paths("certificates")  # listed before the runs, which are always written first
    if not paths:
        raise UsageError(
            f"no certificates in {store.folder}; record some first, for instance with `certbench run`"
        )
    runs = {row["run_id"]: row for row in store.read("runs").to_pylist()}
    cost = costs(store.read("timings"))
    check = CrossCheck(runs)
    entries = []
    for path in paths:
        shard = store.load("certificates", path)
        problems = check.problems(shard)
        if problems:
            raise DataError(f"{path}: {problems[0]}")
        metrics = measure(shard)
        stage = certify_stage(metrics.certifier, metrics.settings_digest)
        run_id = metrics.run_id
        audit = _audit(store, runs[run_id], metrics, shard)
        entries.append(
            _Entry(
                runs[run_id],
                metrics,
                cost.get((run_id, "train")),
                cost.get((run_id, stage)),
                audit,
                attacked_accuracy(metrics, audit),
            )
        )
    return entries


def _audit(
    store: ResultStore, run: Mapping[str, Any], metrics: Metrics, certificates: pa.Table
) -> AuditCounts | None:
    audits = store.audits(metrics.run_id, metrics.certifier, metrics.settings_digest)
    if not audits.num_rows:
        return None
    problems = audit_problems(audits, certificates, run)
    if problems:
        raise DataError(f"{store.folder / 'audits'}: {problems[0]}")
    return count_audits(certificates, audits)


def _radius(run: Mapping[str, Any]) -> str:
    if run["radius"] is not None:
        return f"radius {format_radius(parse_fraction(run['radius']))}"
    return f"sigma {run['sigma']!r}"


def _one_data_digest(members: Sequence[_Entry]) -> None:
    by_digest = {entry.run["dataset_digest"]: entry.run for entry in members}
    if len(by_digest) > 1:
        names = " and ".join(sorted(run["run_id"] for run in by_digest.values()))
        raise DataError(f"runs {names} were made on different versions of {members[0].run['dataset']}")


def _distinct_names(found: Sequence[Board]) -> None:
    seen: dict[str, Board] = {}
    for board in found:
        other = seen.setdefault(board.name.lower(), board)
        if other is not board:
            raise DataError(
                f"two boards would share the file {board.name}.md: {other.title!r} ({other.protocol}) and "
                f"{board.title!r} ({board.protocol})"
            )


def _slug(text: str) -> str:
    """A file name without surprises; a radius keeps its point, ``8/255`` becomes ``8-255``."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "board"


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key under which linf-10 follows linf-9."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"([0-9]+)", text)]


# Rows --------------------------------------------------------------------------------------------------------------


def _rows(members: Iterable[_Entry], expected: Mapping[str, int]) -> tuple[Row, ...]:
    groups: dict[tuple[str, ...], list[_Entry]] = defaultdict(list)
    for entry in members:
        groups[(*_identity(entry), json.dumps(_content(entry.run), sort_keys=True))].append(entry)
    variants = _variants(groups)
    rows = [_row(group, variants[key], expected) for key, group in groups.items()]
    return tuple(sorted(rows, key=_order))


def _order(row: Row) -> tuple[Any, ...]:
    names = (row.method, row.recipe, row.variant, row.model, row.certifier, row.settings_digest)
    return (
        not row.complete,
        -row.certified.mean,
        -row.clean.mean,
        *names,
        str(row.cap),
        row.guarantee,
        row.deploy,
    )


def _identity(entry: _Entry) -> tuple[str, ...]:
    run, metrics = entry.run, entry.metrics
    return (
        run["method"],
        run["recipe_name"],
        run["model"],
        metrics.certifier,
        metrics.settings_digest,
        metrics.guarantee,
        metrics.deploy,
        str(run["cap"]),
    )


def _content(run: Mapping[str, Any]) -> dict[str, Any]:
    """What two seeds of one row have in common: the recipe, flat, without seed, name and published figures."""
    recipe = json.loads(run["recipe"])
    flat = _flatten({key: value for key, value in recipe.items() if key not in {"seed", "name", "reference"}})
    return {**flat, "numerics": run["numerics"]}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
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


def _row(group: Sequence[_Entry], variant: str, expected: Mapping[str, int]) -> Row:
    group = sorted(group, key=lambda entry: int(entry.run["seed"]))
    run, metrics = group[0].run, group[0].metrics
    _distinct_seeds(group)
    clean = _figure([entry.metrics.clean_accuracy for entry in group])
    certified = _figure([entry.metrics.certified_accuracy for entry in group])
    attacked = [entry.attacked for entry in group if entry.attacked is not None]
    radii = [entry.metrics.acr for entry in group if entry.metrics.acr is not None]
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
        epochs=tuple(sorted({entry.run["epochs"] for entry in group})),
        seeds=tuple(entry.run["seed"] for entry in group),
        run_ids=tuple(entry.run["run_id"] for entry in group),
        images=min(entry.metrics.decided for entry in group),
        expected=expected[run["dataset_digest"]],
        clean=clean,
        certified=certified,
        attacked=_figure(attacked) if len(attacked) == len(group) else None,
        audit=_audited(group),
        acr=_figure(radii) if len(radii) == len(group) else None,
        verdicts={verdict: sum(_verdicts(entry)[verdict] for entry in group) for verdict in VERDICTS},
        train_seconds=_mean_seconds([entry.train for entry in group]),
        certify_seconds=_mean_seconds([entry.certify for entry in group]),
        devices=tuple(
            sorted({d for e in group for cost in (e.train, e.certify) if cost for d in cost.devices})
        ),
        published=_published(group, clean, certified),
    )


def _verdicts(entry: _Entry) -> dict[str, int]:
    """The certifier's verdicts, less what attacks have decided since."""
    falsified = entry.audit.falsified if entry.audit else 0
    counts = dict(entry.metrics.verdicts)
    return counts | {
        "unknown": counts["unknown"] - falsified,
        "falsified": counts["falsified"] + falsified,
    }


def _audited(group: Sequence[_Entry]) -> Audited | None:
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
    )


def _distinct_seeds(group: Sequence[_Entry]) -> None:
    for one, other in pairwise(group):
        if one.run["seed"] == other.run["seed"]:
            raise DataError(
                f"runs {one.run['run_id']} and {other.run['run_id']} are both seed {one.run['seed']} of "
                f"{one.run['recipe_name']}; a seed counts once, so remove one of them"
            )


def _figure(values: Sequence[float] | Sequence[Fraction]) -> Figure:
    mean = float(sum(map(Fraction, values)) / len(values))
    return Figure(mean, float(statistics.stdev(map(Fraction, values))) if len(values) > 1 else None)


def _mean_seconds(found: Sequence[Cost | None]) -> float | None:
    seconds = [cost.seconds for cost in found if cost is not None]
    return statistics.fmean(seconds) if seconds and len(seconds) == len(found) else None


# Published figures -------------------------------------------------------------------------------------------------


def _published(group: Sequence[_Entry], clean: Figure, certified: Figure) -> tuple[Published, ...]:
    """The figures that the recipes bring along; each distinct set once, since a correction may reach only some runs."""
    references = {
        json.dumps(reference, sort_keys=True): reference
        for entry in group
        if (reference := json.loads(entry.run["recipe"]).get("reference"))
    }
    return tuple(
        Published(
            source=str(reference.get("source", "")),
            clean=(published_clean := _accuracy(reference, "clean_error", group[0].run)),
            certified=(published_certified := _accuracy(reference, "certified_error", group[0].run)),
            clean_difference=_difference(clean, published_clean),
            certified_difference=_difference(certified, published_certified),
        )
        for _, reference in sorted(references.items())
    )


def _accuracy(reference: Mapping[str, Any], name: str, run: Mapping[str, Any]) -> Figure | None:
    error, spread = reference.get(name), reference.get(f"{name}_spread")
    if error is None:
        return None
    if not all(isinstance(v, int | float) and 0 <= v <= 100 for v in (error, spread) if v is not None):
        raise DataError(f"run {run['run_id']}: the published {name} in its recipe is not a percentage")
    return Figure(float(100 - _decimal(error)), None if spread is None else float(spread))


def _difference(measured: Figure, published: Figure | None) -> float | None:
    return None if published is None else float(_decimal(measured.mean) - _decimal(published.mean))


def _decimal(value: float) -> Fraction:
    """The number as it is written, so that 100 - 51.72 is 48.28."""
    return Fraction(repr(value))
