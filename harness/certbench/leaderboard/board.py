"""Boards: measured rows of one protocol, data set, norm and radius, ranked, with published figures beside them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from certbench.errors import DataError
from certbench.leaderboard.comparison import beside
from certbench.leaderboard.gather import Entry, gather
from certbench.leaderboard.published import Notes
from certbench.leaderboard.ranking import check_images, estimated, ranked
from certbench.leaderboard.row import Row, Standing, order, rows_of
from certbench.recipe import protocol_of, stride_of
from certbench.results.rules import parse_fraction
from certbench.results.store import ResultStore
from certbench.threat import format_radius

RADII = ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "2", "2.25", "2.5", "3", "3.5")
"""Radii at which boards of smoothed classifiers give the certified accuracy, as far as any row reaches: all that recipes
ask for or published figures are about."""
LONGEST_NAME = 200
"""Characters of a board's name: file systems take 255, some of which go to endings."""


@dataclass(frozen=True)
class Board:
    """Rows that may be compared: complete ones first, each group by certified accuracy, then clean, then names.

    ``voided`` rows have a refuted certificate: they stand below the table and take no part in any ranking. Nor do
    ``swept`` rows, which change by ``--set`` a recipe that is itself on the board: forty settings of one method would hide
    the others and widen everybody's range of ranks; those of deterministic certificates are compared as trade-offs. A board of norm l2, where every image has a radius of its own, has ``radii`` at which the certified accuracy is given, and is
    ordered by ACR, whatever guarantee its rows have.
    """

    name: str
    protocol: str
    dataset: str
    norm: str
    radius: str
    rows: tuple[Row, ...]
    swept: tuple[Row, ...] = ()
    voided: tuple[Row, ...] = ()
    radii: tuple[str, ...] = ()

    @property
    def standing_rows(self) -> tuple[Row, ...]:
        """The rows that are not voided, ranked or not."""
        return *self.rows, *self.swept

    @property
    def all_rows(self) -> tuple[Row, ...]:
        return *self.standing_rows, *self.voided

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.norm}, {self.radius}"

    @property
    def smoothed(self) -> bool:
        return self.norm == "l2"

    @cached_property
    def ranked(self) -> int:
        """How many rows have a rank."""
        return sum(self.standing(row) is not None for row in self.rows)

    def best(self, column: str) -> set[int]:
        """Places of the complete rows with the best ``clean``, ``certified`` or ``acr`` mean; by ACR those of each group
        that :meth:`comparable` names."""
        groups = self.comparable() if column == "acr" else [[*range(len(self.rows))]]
        found: set[int] = set()
        for group in groups:
            figures = {place: getattr(self.rows[place], column) for place in group}
            values = {
                place: figure.mean
                for place, figure in figures.items()
                if self.rows[place].complete and figure is not None
            }
            most = max(values.values(), default=0.0)
            found |= {place for place, value in values.items() if value == most}
        return found

    def comparable(self) -> list[list[int]]:
        """Groups of places that may be compared by ACR, the largest first: complete rows of one budget.

        A row that is alone in its budget is in no group, unless it is the only one on the board.
        """
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for place, row in enumerate(self.rows):
            if row.complete and row.acr is not None:
                groups[row.budget].append(place)
        found = sorted(groups.values(), key=len, reverse=True)
        return found if len(found) == 1 else [group for group in found if len(group) > 1]

    def tied(self) -> set[int]:
        """Places of the rows that share the first rank among those they were compared with."""
        groups: dict[tuple[object, ...], set[int]] = defaultdict(set)
        for place, row in enumerate(self.rows):
            if (standing := self.standing(row)) and standing.first == 1:
                groups[row.budget if self.smoothed else ()].add(place)
        return {place for places in groups.values() if len(places) > 1 for place in places}

    def standing(self, row: Row) -> Standing | None:
        """The row's range of ranks by what the board is ordered by; None for an incomplete or voided row."""
        return row.acr_standing if self.smoothed else row.standing


def boards(store: ResultStore, notes: Notes | None = None) -> list[Board]:
    """All boards of a store, sorted by name.

    Raises:
        UsageError: the store holds no certificates.
        DataError: a file is damaged, a row contradicts another, or rows that must not share a table would.
    """
    found, problems = _built(store, notes or Notes())
    if problems:
        raise DataError(problems[0])
    return sorted(found, key=lambda board: _natural(board.name))


def obstacles(store: ResultStore, notes: Notes | None = None) -> list[str]:
    """All that keeps the boards of a store from being built, one line each; empty where :func:`boards` builds them.

    Raises:
        UsageError: the store holds no certificates.
        DataError: a file is damaged.
    """
    return _built(store, notes or Notes())[1]


def _built(store: ResultStore, notes: Notes) -> tuple[list[Board], list[str]]:
    """The boards that can be built, and what is wrong with the others."""
    entries, problems = gather(store)
    told: dict[str, list[_Told]] = defaultdict(list)
    settings: dict[tuple[str, str, str], dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        run, protocol = entry.run, _protocol(entry)
        size = int(entry.metrics.each.index.max()) + 1
        told[run["dataset_digest"]].append(_Told(size, stride_of(protocol), entry.submission is None))
        settings[run["dataset"], run["norm"], _size(run)][protocol].append(entry)
    found = []
    for setting, protocols in settings.items():
        for protocol, members in protocols.items():
            name = _name(setting, protocol, protocols)
            try:
                _one_data_digest(members)
                expected = _expected(told[members[0].run["dataset_digest"]], stride_of(protocol))
                found.append(_board(name, setting, protocol, members, expected, notes))
            except DataError as error:
                problems.append(str(error))
    return found, [*problems, *_name_problems(found)]


def _board(
    name: str,
    setting: tuple[str, str, str],
    protocol: str,
    members: Sequence[Entry],
    expected: int,
    notes: Notes,
) -> Board:
    dataset, norm, size = setting
    radii = _radii(norm, members)
    published = {
        f"{float(figure.at):g}"
        for _, figure in notes.figures()
        if figure.at is not None and (figure.dataset, figure.norm, figure.size) == setting
    }
    rows = rows_of(members, expected, dict.fromkeys([*radii, *sorted(published)]))
    void, stand = _parted(rows, lambda row: row.void)
    check_images(stand)
    shipped = {_recipe(row, row.recipe) for row in stand if row.complete}
    swept, rest = _parted(stand, lambda row: row.changed and _recipe(row, row.base) in shipped)

    def shown(part: Iterable[Row]) -> tuple[Row, ...]:
        return tuple(sorted((replace(row, published=beside(row, size, notes)) for row in part), key=order))

    return Board(
        name, protocol, dataset, norm, size, shown(ranked(rest)), shown(estimated(swept)), shown(void), radii
    )


def _parted(rows: Iterable[Row], test: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
    """Those that pass the test, and the others."""
    found: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        found[not test(row)].append(row)
    return found


def _recipe(row: Row, name: str) -> tuple[object, ...]:
    """A recipe of that name as the row's own maker and certifier have it."""
    return row.method, name, row.model, row.certifier, row.guarantee, row.deploy, row.submitter


def _radii(norm: str, members: Sequence[Entry]) -> tuple[str, ...]:
    """The columns of a board of norm l2: 0, and all radii that any row reaches."""
    if norm != "l2":
        return ()
    largest = max(float(np.nanmax(entry.metrics.each.radius, initial=0.0)) for entry in members)
    return tuple(radius for radius in RADII if float(radius) <= largest or radius == "0")


class _Told(NamedTuple):
    """What one run tells of its data set: that there are at least ``size`` images, of which it has every ``stride``-th."""

    size: int
    stride: int
    own: bool


def _expected(told: Sequence[_Told], stride: int) -> int:
    """The number of images of a complete row about every ``stride``-th one, as far as runs on this data set tell.

    Those that this harness recorded itself decide, where there are any about these images: what somebody submits says
    nothing of whether our rows are complete.
    """
    own = [each for each in told if each.own and stride % each.stride == 0]
    return len(range(0, max(each.size for each in own or told), stride))


def _protocol(entry: Entry) -> str:
    """The run's, unless its certificates are by another L2 certifier than its recipe's: each has rules of its own."""
    protocol: str = entry.run["protocol"]
    certifier = entry.metrics.certifier
    asked = (json.loads(entry.run["recipe"]).get("certify") or {}).get("certifier", certifier)
    if entry.run["norm"] != "l2" or certifier == asked:
        return protocol
    stride = stride_of(protocol)
    return protocol_of("l2", certifier, "all" if stride == 1 else f"every-{stride}")


def _size(run: Mapping[str, Any]) -> str:
    if run["radius"] is not None:
        return f"radius {format_radius(parse_fraction(run['radius']))}"
    return f"sigma {run['sigma']!r}"


def _name(setting: tuple[str, str, str], protocol: str, protocols: Iterable[str]) -> str:
    """The board's file name. An L2 board always names its protocol; for L-inf the newest goes without saying."""
    dataset, norm, size = setting
    name = slug(f"{dataset}-{norm}-{size.removeprefix('radius ').replace(' ', '-')}")
    if norm == "linf" and protocol == max(protocols, key=_natural):
        return name
    return f"{name}--{slug(protocol.removeprefix(f'{norm}-') if norm != 'linf' else protocol)}"


def _one_data_digest(members: Sequence[Entry]) -> None:
    by_digest = {entry.run["dataset_digest"]: entry.run for entry in members}
    if len(by_digest) > 1:
        names = " and ".join(sorted(run["run_id"] for run in by_digest.values()))
        raise DataError(f"runs {names} were made on different versions of {members[0].run['dataset']}")


def _name_problems(found: Sequence[Board]) -> Iterator[str]:
    """Boards that cannot have files of their own: two of one name, on file systems that know no case, or a long one."""
    seen: dict[str, Board] = {}
    for board in found:
        other = seen.setdefault(board.name.lower(), board)
        if other is not board:
            yield (
                f"two boards would share the file {board.name}.md: {other.title!r} ({other.protocol}) and "
                f"{board.title!r} ({board.protocol})"
            )
        if len(board.name) > LONGEST_NAME:
            yield f"the board {board.title!r} ({board.protocol}) has a name too long for a file"


def slug(text: str) -> str:
    """A file name without surprises; a radius keeps its point, ``8/255`` becomes ``8-255``."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "board"


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key under which linf-10 follows linf-9, and 0.5 follows 0.25."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", text)
    return [(1, float(part), "") if place % 2 else (0, 0.0, part) for place, part in enumerate(parts)]
