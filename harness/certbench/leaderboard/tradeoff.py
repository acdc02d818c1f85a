"""Accuracy against robustness: each method as the set of points of its sweep, and what one front says of another.

The robustness of a point is ACR / cap, so recipes of different radii share a front as long as cap, verifier and its
tolerance are equal; but where bounds of the verifier decide at the recipe's radius alone, that is part of the verifier. Never ranked by ACR alone: a classifier that always names the commonest class has some.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from certbench.leaderboard.board import Board
from certbench.leaderboard.row import Row
from certbench.recipe import RADIUS_TOLERANCE, cascade_parts
from certbench.results.store import ResultStore
from certbench.stats.fronts import Comparison, Floats, Sweep, compare, hypervolume, nondominated

BASELINE = "ibp"
"""The method whose points others are held against; its sweep goes over kappa and over the training radius."""
ENOUGH = 3
"""Seeds of which a claim should rest on no fewer; more are welcome, but no setting is left out for them."""


@dataclass(frozen=True)
class Measured:
    """One network certified on a whole test set: what was decided of each image, in published order.

    ``setting`` names the recipe with what it changes, ``epochs`` is how long it was trained. ``correct`` and ``radius`` (pixel
    units, rounded down, 0 for a misclassified image) have shape (images,).
    """

    method: str
    setting: str
    epochs: int
    seed: int
    correct: Floats
    radius: Floats
    run_id: str = ""


Settings = dict[str, dict[int, Measured]]
"""The runs of one method, by setting and seed."""


@dataclass(frozen=True)
class Terms:
    """What all points of one trade-off table have in common; ``tolerance`` is a share of the cap.

    ``decided_at`` is the radius at which some bounds of the verifier decide without searching others, None where all search:
    such a radius is a part of what the verifier proves.
    """

    dataset: str
    norm: str
    model: str
    cap: float
    verifier: str
    guarantee: str
    tolerance: float | None
    decided_at: str | None
    majority: float
    """The share of the commonest class in the test set."""


@dataclass(frozen=True)
class OneSeed:
    """The point of one network, as shares of 1."""

    run_id: str
    seed: int
    accuracy: float
    robustness: float


@dataclass(frozen=True)
class Point:
    """The mean of one setting over its seeds, as shares of 1."""

    setting: str
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracy: float
    robustness: float
    on_front: bool
    beyond_constant: bool
    of_seeds: tuple[OneSeed, ...]


@dataclass(frozen=True)
class Front:
    """A method's points, the most accurate first, and the area under them: of seed means, and of every seed that most
    settings have, over those settings alone."""

    method: str
    points: tuple[Point, ...]
    hypervolume: float
    of_seeds: dict[int, float]


@dataclass(frozen=True)
class Claim:
    """A method held against the baseline's points, over seeds that all ``settings`` of the baseline and all of the
    challenger's have but those ``left_out``; ``areas`` is by how much its hypervolume exceeds the baseline's on each seed.
    """

    challenger: str
    baseline: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    comparison: Comparison
    areas: dict[int, float]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tradeoff:
    """One table: the fronts of all methods under common terms, and what may be claimed from them."""

    terms: Terms
    fronts: tuple[Front, ...]
    claims: tuple[Claim, ...]
    unclaimed: tuple[str, ...] = ()
    """Methods of which nothing can be said beside the baseline: they share no seed with it."""


def tradeoff(terms: Terms, measured: Iterable[Measured], resamples: int = 1000) -> Tradeoff:
    """The fronts of every method, and a claim for each with two settings or more against the baseline.

    Raises:
        ValueError: networks were certified on different numbers of images, or one setting has a seed twice.
    """
    sweeps: dict[str, dict[str, dict[int, Measured]]] = defaultdict(lambda: defaultdict(dict))
    for one in measured:
        if one.seed in sweeps[one.method][one.setting]:
            raise ValueError(f"{one.setting} has seed {one.seed} twice")
        sweeps[one.method][one.setting][one.seed] = one
    fronts = tuple(_front(method, settings, terms) for method, settings in sorted(sweeps.items()))
    claims = {
        method: _claim(method, settings, sweeps[BASELINE], terms, resamples)
        for method, settings in sorted(sweeps.items())
        if BASELINE in sweeps and method != BASELINE and len(settings) > 1
    }
    made = tuple(claim for claim in claims.values() if claim is not None)
    return Tradeoff(terms, fronts, made, tuple(method for method, claim in claims.items() if claim is None))


def _front(method: str, settings: dict[str, dict[int, Measured]], terms: Terms) -> Front:
    names = list(settings)
    means = np.array([_mean(list(settings[name].values()), terms) for name in names])
    on_front = nondominated(means)
    order = sorted(range(len(names)), key=lambda k: (-means[k, 0], -means[k, 1], names[k]))
    points = tuple(
        Point(
            setting=names[k],
            epochs=tuple(sorted({run.epochs for run in settings[names[k]].values()})),
            seeds=tuple(sorted(settings[names[k]])),
            accuracy=float(means[k, 0]),
            robustness=float(means[k, 1]),
            on_front=bool(on_front[k]),
            beyond_constant=bool(means[k, 1] > terms.majority),
            of_seeds=tuple(_one_seed(run, terms) for _, run in sorted(settings[names[k]].items())),
        )
        for k in order
    )
    seeds, (kept,) = _shared_seeds([settings])
    of_seeds = {seed: _area(kept, seed, terms) for seed in seeds}
    return Front(method, points, hypervolume(means, (terms.majority, 0.0)), of_seeds)


def _area(settings: Settings, seed: int, terms: Terms) -> float:
    """The hypervolume of one seed."""
    points = np.array([_mean([runs[seed]], terms) for runs in settings.values()])
    return hypervolume(points, (terms.majority, 0.0))


def _mean(runs: Sequence[Measured], terms: Terms) -> Floats:
    """(accuracy, ACR / cap) over seeds and images."""
    correct, radius = np.array([run.correct for run in runs]), np.array([run.radius for run in runs])
    return np.asarray(Sweep(correct[None], radius[None] / terms.cap).points()[0])


def _one_seed(run: Measured, terms: Terms) -> OneSeed:
    return OneSeed(run.run_id, run.seed, *map(float, _mean([run], terms)))


def _shared_seeds(sweeps: Sequence[Settings]) -> tuple[list[int], list[Settings]]:
    """Seeds, and the settings of every method that have all of them: as many settings as there can be, and as many seeds
    up to :data:`ENOUGH`, one as dear as the other.

    So a setting that was run with a seed of its own, or with many more than the rest, takes nothing from the others. No
    seeds, and nothing kept, where some method has none in common with the rest.
    """
    shared = {frozenset(runs) for settings in sweeps for runs in settings.values()}
    while more := {one & other for one in shared for other in shared} - shared:
        shared |= more
    best: tuple[list[int], list[Settings]] = [], [{} for _ in sweeps]
    most = (0, 0)
    for seeds in sorted(shared, key=sorted):
        kept = [{name: runs for name, runs in s.items() if seeds <= runs.keys()} for s in sweeps]
        count = min(len(seeds), ENOUGH) * sum(map(len, kept)), len(seeds)
        if all(kept) and count > most:
            most, best = count, (sorted(seeds), kept)
    return best


def _claim(
    method: str,
    challenger: Settings,
    baseline: Settings,
    terms: Terms,
    resamples: int,
) -> Claim | None:
    seeds, (ours, theirs) = _shared_seeds([challenger, baseline])
    if not seeds:
        return None
    compared = compare(_sweep(ours, seeds, terms), _sweep(theirs, seeds, terms), terms.majority, resamples)
    areas = {seed: _area(ours, seed, terms) - _area(theirs, seed, terms) for seed in seeds}
    left_out = [name for name in challenger if name not in ours]
    left_out += [name for name in baseline if name not in theirs]
    return Claim(method, BASELINE, tuple(theirs), tuple(seeds), compared, areas, tuple(left_out))


def _sweep(settings: Settings, seeds: Sequence[int], terms: Terms) -> Sweep:
    def stacked(column: str) -> Floats:
        return np.array([[getattr(runs[seed], column) for seed in seeds] for runs in settings.values()])

    return Sweep(stacked("correct").astype(bool), stacked("radius") / terms.cap)


# From the rows -------------------------------------------------------------------------------------------------------


def tradeoffs(boards: Iterable[Board], store: ResultStore) -> list[Tradeoff]:
    """A trade-off for every set of terms under which some method has two settings or more.

    Voided, incomplete and submitted rows and rows with an unknown radius take no part, nor do statistical guarantees.
    """
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for board in boards:
        for row in board.standing_rows:
            is_proved = row.complete and row.acr is not None and row.guarantee != "statistical"
            if is_proved and row.cap and not row.submitter:
                common = board.protocol, board.dataset, board.norm, row.model, row.cap, row.certifier
                groups[(*common, row.guarantee, row.deploy, _decided_at(row, board))].append(row)
    found = []
    for key, rows in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        swept = Counter(method for method, _ in {(row.method, row.recipe) for row in rows})
        if max(swept.values()) > 1:  # other certificates of one recipe, or somebody's copy, are no sweep
            _, dataset, norm, *_ = key
            terms = _terms(str(dataset), str(norm), rows[0], str(key[-1]), store)
            measured = (
                one
                for row, name in zip(rows, _names(rows), strict=True)
                for one in _measured(row, name, store)
            )
            found.append(tradeoff(terms, measured))
    return found


def _decided_at(row: Row, board: Board) -> str:
    """See :class:`Terms`; empty for None."""
    searching = all(searches for _, searches in cascade_parts(row.certifier))
    return "" if searching else board.radius.removeprefix("radius ")


def _terms(dataset: str, norm: str, row: Row, decided_at: str, store: ResultStore) -> Terms:
    assert row.cap is not None  # rows without one take no part
    labels = store.certificates(row.run_ids[0], row.certifier, row.settings_digest).column("label")
    tolerances = [RADIUS_TOLERANCE.get(bound) for bound, searches in cascade_parts(row.certifier) if searches]
    return Terms(
        dataset=dataset,
        norm=norm,
        model=row.model,
        cap=float(row.cap),
        verifier=row.certifier,
        guarantee=row.guarantee if row.deploy == "float32" else f"{row.guarantee} ({row.deploy})",
        tolerance=None if None in tolerances else max((t for t in tolerances if t is not None), default=None),
        decided_at=decided_at or None,
        majority=float(np.bincount(labels.to_numpy()).max() / len(labels)),
    )


def _names(rows: Sequence[Row]) -> list[str]:
    """What each row is called among its method's: the recipe, and what else tells it from another row of that name."""
    names = [f"{row.recipe} ({row.variant})" if row.variant else row.recipe for row in rows]
    known = Counter(zip((row.method for row in rows), names, strict=True))
    return [
        name if known[row.method, name] == 1 else f"{name}, settings {row.settings_digest[:8]}"
        for row, name in zip(rows, names, strict=True)
    ]


def _measured(row: Row, setting: str, store: ResultStore) -> Iterator[Measured]:
    for entry, seed in zip(row.entries, row.seeds, strict=True):
        run_id, epochs = entry.run["run_id"], entry.run["epochs"]
        table = store.certificates(run_id, row.certifier, row.settings_digest)
        label, prediction = (table.column(name).to_numpy() for name in ("label", "prediction"))
        radius = table.column("radius").to_numpy()
        yield Measured(row.method, setting, epochs, seed, prediction == label, radius, run_id)
