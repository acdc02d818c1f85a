"""Boards beyond one table: ranks, smoothed classifiers, published figures, audits and their limits, hostile text."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import tomllib
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import special, stats
from stores import REFERENCE, SETTINGS, C, M, U, add, refute, smoothed, time

from certbench.contract import MethodCard
from certbench.errors import DataError, UsageError
from certbench.hookspecs import hookimpl
from certbench.leaderboard import build as building
from certbench.leaderboard import records, tables
from certbench.leaderboard.board import Board, boards
from certbench.leaderboard.comparison import reproduction
from certbench.leaderboard.escape import latex
from certbench.leaderboard.page.recipes import commands, recipe_toml
from certbench.leaderboard.published import Notes, PublishedFile, read_notes, read_published
from certbench.leaderboard.row import flatten
from certbench.plugins import Plugins
from certbench.recipe import Strict, split_name, validate
from certbench.results.migrations import STEPS
from certbench.results.schema import TABLES
from certbench.results.store import ResultStore
from certbench.stats.smoothing import allowed_refutations


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "installed", lambda: Plugins([]))


def only(folder: Path, notes: Notes | None = None) -> Board:
    (board,) = boards(ResultStore(folder / "results"), notes)
    return board


def wide(count: int, certified: int) -> list[str]:
    return [C] * certified + [U] * (count - certified)


@pytest.fixture
def many_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stores.LABELS", [i % 10 for i in range(1000)])


# Ranks and intervals ---------------------------------------------------------------------------------------------------


def test_ranks_are_ranges_from_paired_tests(tmp_path: Path, many_labels: None) -> None:
    add(tmp_path, "a", wide(400, 300), method="first")
    add(tmp_path, "b", wide(400, 298), method="tied")  # two images apart: no test can tell
    add(tmp_path, "c", wide(400, 200), method="last")
    board = only(tmp_path)
    assert [(row.standing.first, row.standing.last) for row in board.rows if row.standing] == [
        (1, 2),
        (1, 2),
        (3, 3),
    ]
    assert board.tied() == {0, 1}
    text = tables.plain(board)
    assert (
        text.count("1–2 =") == 2 and "= tied with the first" in text and "McNemar" in tables.markdown(board)
    )
    found = list(csv.DictReader(io.StringIO(records.comma_separated(board))))
    assert [(row["rank_first"], row["rank_last"]) for row in found] == [("1", "2"), ("1", "2"), ("3", "3")]


def test_several_seeds_are_compared_by_the_bootstrap_and_any_order_gives_the_same(
    tmp_path: Path, many_labels: None
) -> None:
    for seed, run in enumerate("abc"):
        add(tmp_path / "one", run, wide(400, 300 + 20 * seed), method="wild", seed=seed)
    add(tmp_path / "one", "d", wide(400, 290), method="single")
    for run, method, seed in (("d", "single", 0), ("c", "wild", 2), ("a", "wild", 0), ("b", "wild", 1)):
        count = 290 if method == "single" else 300 + 20 * seed
        add(tmp_path / "two", run, wide(400, count), method=method, seed=seed)
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    assert tables.markdown(one) == tables.markdown(two) and "nested in seeds" in tables.markdown(one)
    # 30 images apart would be decided for one network; seeds 20 images apart from each other leave it open
    assert [(r.standing.first, r.standing.last) for r in one.rows if r.standing] == [(1, 2), (1, 2)]


def test_acr_is_ranked_within_one_cap_only(tmp_path: Path, many_labels: None) -> None:
    add(tmp_path, "a", wide(400, 300), method="one")
    add(tmp_path, "b", wide(400, 100), method="two")
    add(tmp_path, "c", wide(400, 350), method="other", cap="1/5")
    standings = {row.method: row.acr_standing for row in only(tmp_path).rows}
    assert {name: (s.first, s.last, s.of) for name, s in standings.items() if s} == {
        "one": (1, 1, 2),
        "two": (2, 2, 2),
        "other": (1, 1, 1),
    }


def test_intervals_over_images_stand_apart_from_spreads_over_seeds(tmp_path: Path, many_labels: None) -> None:
    add(tmp_path, "a", wide(400, 300), seed=0)
    add(tmp_path, "b", wide(400, 301), seed=1)
    (row,) = only(tmp_path).rows
    low, high = row.certified.interval or (0, 0)
    # the mean count is 300.5: rounded outward, Clopper-Pearson at 95 percent
    assert low == pytest.approx(100 * stats.beta.ppf(0.025, 300, 101), abs=2e-6)
    assert high == pytest.approx(100 * stats.beta.isf(0.025, 302, 99), abs=2e-6)
    assert row.certified.deviation == pytest.approx(math.sqrt(2 * 0.125**2))
    assert row.acr is not None and row.acr.interval is not None
    assert row.acr.interval[0] < row.acr.mean < row.acr.interval[1]


def test_a_board_says_what_proved_its_certificates_where_several_steps_did(tmp_path: Path) -> None:
    verdicts = [C, C, C, C, U, M, C, C]
    proofs = ["ibp", "ibp; crown", "crown", "ibp", "", "", "ibp", "=cmd"]
    add(tmp_path, "a", verdicts, proofs=proofs)
    board = only(tmp_path)
    assert "proved by %" in tables.plain(board)
    assert "ibp 50.00, =cmd 12.50, crown 12.50" in tables.markdown(board)
    (row,) = csv.DictReader(io.StringIO(records.comma_separated(board)))
    assert row["proved_by"] == "ibp 50.00, =cmd 12.50, crown 12.50"
    add(tmp_path / "one", "a", verdicts)
    assert "proved by" not in tables.markdown(only(tmp_path / "one"))
    add(tmp_path / "many", "a", [C] * 8, proofs=[f"step {i}" for i in range(8)])
    assert "step 5 12.50, others 25.00" in tables.markdown(only(tmp_path / "many"))


# Smoothed classifiers --------------------------------------------------------------------------------------------------


def test_a_smoothed_board_says_how_likely_all_certificates_hold_together(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000, 990, 950, 800, 600, 400])
    (row,) = csv.DictReader(io.StringIO(records.comma_separated(only(tmp_path))))
    assert float(row["alpha_of_all"]) == pytest.approx(6 * float(row["alpha"]))
    assert "alpha of all" in tables.markdown(only(tmp_path))


def test_of_seeds_with_fewer_images_the_run_with_most_counts_for_alpha_of_all(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 6)
    smoothed(tmp_path, "b", [1000] * 4, seed=1)
    (row,) = csv.DictReader(io.StringIO(records.comma_separated(only(tmp_path))))
    assert float(row["alpha_of_all"]) == pytest.approx(6 * float(row["alpha"]))


def test_attacked_accuracy_of_smoothed_rows_waits_for_an_audit_of_every_certificate(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000, 990, 950, 800, 600, 400])
    refute(tmp_path, "a", [], "smoothing")
    (row,) = only(tmp_path).rows
    assert row.attacked is not None
    store = ResultStore(tmp_path / "results")
    (path,) = store.paths("audits")
    table = store.load("audits", path)
    path.unlink()
    own = {name: table.column(name).to_pylist()[1:] for name in table.column_names}
    store.write_audits(*(own.pop(name)[0] for name in table.column_names[:3]), own.pop("attack")[0],
                       own.pop("attack_settings_digest")[0], own)  # fmt: skip
    (row,) = only(tmp_path).rows
    assert row.audit is not None
    assert row.attacked is None


def test_smoothed_rows_have_boards_of_their_own_with_radii_and_budget(tmp_path: Path) -> None:
    hits = [1000, 990, 950, 800, 600, 400]
    smoothed(tmp_path, "a", hits)
    smoothed(tmp_path, "b", hits, protocol="l2-sequential-1", method="other")
    smoothed(tmp_path, "c", hits, sigma=0.25, method="third")
    add(tmp_path, "d", [C, U], dataset="cifar10", dataset_digest="digest of cifar10", radius="8/255")
    for path in (tmp_path / "results/certificates").glob("d*"):
        path.unlink()  # another board of the same data would compare images
    found = {board.name: board for board in boards(ResultStore(tmp_path / "results"))}
    assert list(found) == [
        "cifar10-l2-sigma-0.25--fixed-1",
        "cifar10-l2-sigma-0.5--fixed-1",
        "cifar10-l2-sigma-0.5--sequential-1",
    ]
    board = found["cifar10-l2-sigma-0.5--fixed-1"]
    (row,) = board.rows
    radii = [0.5 * special.ndtri(stats.beta.ppf(0.001, k, 1001 - k)) if k > 500 else 0 for k in hits[1:]]
    radii = [0.5 * special.ndtri(0.001 ** (1 / 1000)), *radii]
    expected = [
        100 * sum(r > 0 for r in radii) / 6,
        *(100 * sum(r >= at for r in radii) / 6 for at in (0.25, 0.5, 0.75, 1)),
    ]
    assert [row.at[r].mean for r in board.radii] == pytest.approx(expected)
    assert board.radii == ("0", "0.25", "0.5", "0.75", "1")
    assert row.acr is not None and row.acr.mean == pytest.approx(sum(max(r, 0) for r in radii) / 6, rel=1e-6)
    assert row.sampling is not None
    assert (row.sampling.n, row.sampling.draws, sum(row.sampling.hits)) == ((1000,), 1100.0, 6)
    text = tables.markdown(board)
    for words in (
        "alpha = 0.001",
        "at most 1 certificates",
        "no radius exceeds what n draws can prove",
        "1,000",
    ):
        assert words in text


def test_acr_of_different_budgets_is_not_compared(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 40, method="small")
    smoothed(tmp_path, "b", [10_000] * 40, n=10_000, method="large")
    assert [(r.acr_standing.first, r.acr_standing.of) for r in only(tmp_path).rows if r.acr_standing] == [
        (1, 1),
        (1, 1),
    ]


def test_a_named_subset_is_complete_with_its_own_images(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 5, stride=20, protocol="l2-fixed-1-every-20")
    smoothed(tmp_path, "b", [1000] * 4, stride=20, protocol="l2-fixed-1-every-20", method="fewer")
    rows = only(tmp_path).rows
    assert [(row.images, row.expected, row.complete) for row in rows] == [(5, 5, True), (4, 5, False)]


@pytest.mark.parametrize(("refuted", "void"), [(3, False), (4, True)])
def test_a_statistical_row_is_void_beyond_what_chance_allows(
    tmp_path: Path, refuted: int, void: bool
) -> None:
    assert stats.binom.ppf(0.999, 300, 0.001) == 3
    smoothed(tmp_path, "a", [1000] * 300)
    refute(tmp_path, "a", list(range(refuted)), certifier="smoothing")
    board = only(tmp_path)
    (row,) = board.voided if void else board.rows
    assert row.void is void and row.attacked is not None
    assert row.attacked.mean == pytest.approx(row.clean.mean - 100 * refuted / 300)


@pytest.mark.parametrize(("attacks", "void"), [(1, True), (2, False)])
def test_every_attack_on_a_statistical_row_may_err_by_itself(
    tmp_path: Path, attacks: int, void: bool
) -> None:
    """Of 44 images one may be refuted where one attack may be wrong, and two where two may."""
    assert [allowed_refutations(44, 0.001, audits) for audits in (1, 2)] == [1, 2]
    smoothed(tmp_path, "a", [1000] * 44)
    for attack in ("standard", "strong")[:attacks]:
        refute(tmp_path, "a", [0, 1], certifier="smoothing", attack=attack)
    board = only(tmp_path)
    (row,) = board.voided if void else board.rows
    assert row.audit is not None and row.audit.refuted == 2
    assert "all tests of one attack together" in tables.markdown(board)


def test_certificates_that_mix_noise_levels_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothed(tmp_path, "a", [1000] * 4)
    store = ResultStore(tmp_path / "results")
    table = store.read("certificates")
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    store.paths("certificates")[0].unlink()
    with pytest.raises(DataError, match="image 2 has another sigma than its run's 0.5"):
        store.write_certificates("a" * 16, "smoothing", SETTINGS, columns | {"sigma": [0.5, 0.5, 1.0, 0.5]})


# Audits ----------------------------------------------------------------------------------------------------------------


def test_a_voided_row_stands_below_and_takes_no_rank(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C, C, U], method="broken")
    add(tmp_path, "b", [C, U, U, U], method="sound")
    refute(tmp_path, "a", [1])
    board = only(tmp_path)
    assert [row.method for row in board.rows] == ["sound"] and [r.method for r in board.voided] == ["broken"]
    assert board.voided[0].standing is None and board.rows[0].standing is not None
    for text in (tables.markdown(board), tables.latex(board), tables.plain(board)):
        assert "Voided" in text and "1 refuted of 4" in text
    assert "APGD-CE 20 steps; APGD-DLR 20 steps" in tables.plain(board)  # the settings of the attack


def test_what_kept_an_audit_from_confirming_is_said(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U])
    store = ResultStore(tmp_path / "results")
    store.write_audits(
        "a" * 16,
        "ibp",
        SETTINGS,
        "standard",
        "feed" * 4,
        {
            "index": [0],
            "ball_radius": [store.read("certificates").column("radius")[0].as_py()],
            "kind": "certified_radius",
            "found": [False],
            "distance": [math.nan],
            "outcome": "held",
            "attack_limit": "no error rule for gelu",
        },
    )
    text = tables.markdown(only(tmp_path))
    assert "none can be confirmed" in text and "no error rule for gelu" in text


def test_version_1_of_audits_says_what_the_attacks_did() -> None:
    from certbench.audit.registry import ATTACKS
    from certbench.results.migrations import _SUMMARIES, migrated

    for attack in ATTACKS.values():
        assert _SUMMARIES.get(attack.settings_digest, attack.summary) == attack.summary
    new = ("attack_summary", "attack_limit")
    names = [name for name in TABLES["audits"].schema.names if name not in new]
    schema = TABLES["audits"].schema
    row = {name: "x" if str(schema.field(name).type) == "string" else None for name in names}
    import pyarrow as pa

    old = pa.Table.from_pylist(
        [row | {"index": 0, "ball_radius": 0.1, "found": False, "attack_settings_digest": digest}
         for digest in ("b809aa7507b33669", "0" * 16)],
        schema=pa.schema([schema.field(name) for name in names]),
    )  # fmt: skip
    found = migrated(old, TABLES["audits"], 1)
    assert found.schema.equals(schema)
    assert found.column("attack_summary").to_pylist() == ["APGD-CE 20 steps; APGD-DLR 20 steps", None]


@pytest.mark.parametrize(
    ("version", "unknown"), [(1, ["structure", "teacher_digest"]), (2, ["teacher_digest"])]
)
def test_older_runs_know_no_structure_and_no_teacher(
    tmp_path: Path, version: int, unknown: list[str]
) -> None:
    from certbench.results.migrations import migrated

    add(tmp_path, "a", wide(4, 2))
    new = ResultStore(tmp_path / "results").read("runs")
    found = migrated(new.drop_columns(unknown), TABLES["runs"], version)
    assert found.schema.equals(TABLES["runs"].schema)
    assert all(set(found.column(name).to_pylist()) == {None} for name in unknown)


def test_every_step_of_every_table_is_there() -> None:
    assert set(STEPS) == {(s.name, version) for s in TABLES.values() for version in range(1, s.version)}


# Published figures -----------------------------------------------------------------------------------------------------

FIGURE: dict[str, Any] = {
    "table": "Table 1",
    "dataset": "mnist",
    "norm": "linf",
    "radius": "0.1",
    "method": "fast-ibp",
    "model": "cnn7",
    "metric": "certified_error",
    "value": 40.0,
    "spread": 1.0,
}


def notes_of(*figures: dict[str, Any]) -> Notes:
    card = {"summary": "s", "paper": "p", "norm": "linf", "guarantee": "real_arith"}
    file = {"source": "Somebody 2021", "figures": [FIGURE | figure for figure in figures]}
    return Notes.model_validate({"methods": {"fast-ibp": card | {"published": [file]}}})


def test_published_cells_are_reproduced_off_or_not_run(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C, C, C, C, U, U, M])
    notes = notes_of(
        {"value": 38.5},  # certified 62.5 against 61.5 ± 1.0
        {"value": 34.0},  # against 66.0 ± 1.0
        {"metric": "clean_error", "value": 12.5, "spread": None},
        {"model": "resnext"},
        {"recipe": "fast-ibp/another"},
        {"epochs": 70, "value": 37.5, "spread": None, "metric": "certified_error"},
        {"epochs": 160},
    )
    board = only(tmp_path, notes)
    cells = reproduction([(board.radius, row) for row in board.rows], notes)
    assert [cell.state for cell in cells] == [
        "reproduced",
        "off",
        "reproduced",
        "not run",
        "not run",
        "reproduced",
        "not run",
    ]
    first = cells[0].compared
    assert first is not None and (first.difference, first.deviations, first.scale) == (1.0, 1.0, "published")
    third = cells[2].compared
    assert third is not None and (third.difference, third.scale) == (0.0, "images")
    text = tables.reproduction(cells)
    assert "3 reproduced, 1 off, 3 not run" in text and "-3.5" in text
    rows = list(csv.DictReader(io.StringIO(records.reproduction(cells))))
    assert [row["certbench_state"] for row in rows] == [cell.state for cell in cells]


def test_a_shortened_run_is_nobodys_reproduction(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U], recipe_name="fast-ibp/mnist +train.epochs=1")
    notes = notes_of({})
    board = only(tmp_path, notes)
    assert board.rows[0].published == ()
    assert reproduction([(board.radius, row) for row in board.rows], notes)[0].state == "not run"


def test_smoothed_figures_are_compared_at_their_radius(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 6 + [600] * 4, method="fast-ibp")
    shared = {"dataset": "cifar10", "norm": "l2", "radius": None, "sigma": 0.5, "model": "resnet110"}
    notes = notes_of(
        shared | {"metric": "certified_accuracy", "at": "0.6", "value": 58.0, "spread": 1.5},
        shared | {"metric": "acr", "value": 0.7, "spread": 0.1},
    )
    (row,) = only(tmp_path, notes).rows
    (published,) = row.published
    assert row.at["0.6"].mean == 60.0 and published.difference("0.6") == 2.0
    assert published.difference("acr") is not None


def test_a_reference_that_says_the_same_is_shown_once(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C, U, U], reference=REFERENCE)
    notes = notes_of(
        {"metric": "clean_error", "value": 51.72, "spread": 0.4}, {"value": 65.58, "spread": 0.4}
    )
    assert [each.source for each in only(tmp_path, notes).rows[0].published] == [
        "Somebody 2021, Table 1 (text)"
    ]
    other = notes_of({"metric": "clean_error", "value": 50.0})
    assert len(only(tmp_path, other).rows[0].published) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 140.0}, "percent"),
        ({"radius": "nine"}, "is not a fraction"),
        ({"sigma": 0.5}, "has radius and no sigma"),
        ({"at": "0.5"}, '"at" belongs to'),
        ({"metric": "accuracy"}, "metric"),
        ({"epohcs": 3}, "unknown key 'figures.0.epohcs'; did you mean 'epochs'?"),
        ({"spread": -1.0}, "spread"),
    ],
)
def test_published_files_are_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in (FIGURE | change).items()]
    (tmp_path / "x.toml").write_text('source = "s"\n[[figures]]\n' + "\n".join(lines))
    with pytest.raises(DataError, match=re.escape(message)):
        read_published(card(tmp_path))


def test_a_figure_of_an_unknown_method_is_an_error_and_others_of_the_plugin_are_left(tmp_path: Path) -> None:
    lines = "\n".join(f"{k} = {json.dumps(v)}" for k, v in (FIGURE | {"method": "other"}).items())
    (tmp_path / "x.toml").write_text(f'source = "s"\n[[figures]]\n{lines}')
    with pytest.raises(DataError, match="no method 'other'"):
        read_published(card(tmp_path))
    assert read_published(card(tmp_path), ["fast-ibp", "other"]) == ()
    (tmp_path / "x.toml").write_text("source = ")
    with pytest.raises(DataError, match=r"x\.toml"):
        read_published(card(tmp_path))


class NoSettings(Strict):
    pass


def card(published: Path) -> MethodCard:
    return MethodCard(
        name="fast-ibp",
        summary="s",
        paper="p",
        norm="linf",
        guarantee="real_arith",
        settings=NoSettings,
        certifier="ibp",
        published=published,
    )


def test_boards_stay_what_they_are_where_a_plugin_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "x.toml").write_text(
        'source = "s"\n[[figures]]\n' + "\n".join(f"{k} = {json.dumps(v)}" for k, v in FIGURE.items())
    )

    class Point(EntryPoint):
        def load(self) -> Any:
            module = ModuleType("plugin")
            module.register_methods = hookimpl(lambda: [card(folder)])  # type: ignore[attr-defined]  # set here
            return module

    add(tmp_path, "a", [C, U])
    with_it = Plugins([Point("fast-ibp", "x", "certbench")])
    monkeypatch.setattr(building, "installed", lambda: with_it)
    building.write(tmp_path, page=False)
    assert len(read_notes(tmp_path).figures()) == 1 and (tmp_path / "reproduction.md").exists()
    assert building.check(tmp_path, page=False).found == []
    monkeypatch.setattr(building, "installed", lambda: Plugins([]))
    assert building.check(tmp_path, page=False).found == []  # the same bytes without the plugin
    (folder / "x.toml").write_text((folder / "x.toml").read_text().replace("40.0", "41.0"))
    monkeypatch.setattr(building, "installed", lambda: with_it)
    assert "methods.json: differs" in building.check(tmp_path, page=False).found  # and with a newer one, seen
    (tmp_path / "methods.json").write_text('{"derived": "certbench: x", "methods": {"a": 3}}')
    with pytest.raises(DataError, match=r"methods\.json.*remove the file"):
        building.check(tmp_path, page=False)


def test_the_published_data_of_the_repository_is_valid() -> None:
    found = sorted(Path(__file__).parent.parent.glob("plugins/*/certbench_*/published/*.toml"))
    for path in found:
        PublishedFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    assert found


# Recipes to copy -------------------------------------------------------------------------------------------------------


def test_the_recipe_to_copy_is_the_recipe_that_ran() -> None:
    folder = Path(__file__).parent.parent / "leaderboards"
    for board in boards(ResultStore(folder / "results")):
        for row in board.all_rows:
            written = tomllib.loads(recipe_toml(row)) | {"name": row.recipe}
            validate(written, "copied")
            ran = json.loads(row.run["recipe"])
            assert flatten(written) == {key: v for key, v in flatten(ran).items() if v is not None}
            name, changes = split_name(row.recipe)
            first, *again = commands(row)
            assert first.startswith(" ".join(["certbench run", name, *(f"--set {c}" for c in changes)]))
            assert first.endswith(f" --seeds {','.join(map(str, row.seeds))}")
            if row.certifier not in (ran["certify"]["certifier"], row.method):
                options = ["--certifier", row.certifier, "--guarantee", row.guarantee]
                assert shlex.split(again[0]) == ["certbench", "certify", *row.run_ids, *options]


def test_the_command_to_copy_survives_a_shell(tmp_path: Path) -> None:
    add(tmp_path, "a", [C], recipe_name="fast-ibp/x +train.epochs=1 +a.b=$(rm -rf ~)")
    add(tmp_path, "b", [C], method="mine", recipe_name="mine; rm -rf /")
    by_method = {row.method: commands(row) for row in only(tmp_path).rows}
    assert shlex.split(by_method["fast-ibp"][0])[3:] == [
        *("--set", "train.epochs=1", "--set", "a.b=$(rm -rf ~)", "--seeds", "0"),
    ]
    assert shlex.split(by_method["mine"][0]) == ["certbench", "run", "recipe.toml", "--seeds", "0"]


# Hostile text ----------------------------------------------------------------------------------------------------------


def test_latex_prints_what_it_would_act_on(tmp_path: Path) -> None:
    hostile = r"\input{/etc/passwd} $x^2$ % #1 ~ & _ {} ^^41 \write18{rm}"
    shown = latex(hostile)
    bare = re.sub(r"\\(text[a-z]+\{\}|ensuremath\{\\[a-z]+\}|[&%$#_{}])", "", shown)
    assert not set(bare) & set("\\$%#~&_{}^")
    add(tmp_path, "a", [C, C], method=hostile, model="}\n\\end{tabular}", dataset="{")
    text = tables.latex(only(tmp_path))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert r"\input{" not in text and r"\write18" not in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert len(re.findall(r"(?<!\\)&", body)) == len(re.findall(r"(?<!\\)&", text.split(r"\midrule")[0]))


# Reading -------------------------------------------------------------------------------------------------------------


def test_thousands_of_tiny_files_are_read_once_each(tmp_path: Path) -> None:
    for seed in range(40):
        add(tmp_path, "a", [C, U], method=f"m{seed}")
        for path in list((tmp_path / "results").rglob("a*.parquet")):
            data = path.read_bytes()
            del data
        store = ResultStore(tmp_path / "results")
        row = store.run("a" * 16)
        table = store.read("certificates")
        identity = f"{seed:016x}"
        fresh = ResultStore(tmp_path / "many" / "results")
        fresh.write_run(row | {"run_id": identity})
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        fresh.write_certificates(identity, "ibp", SETTINGS, columns | {"run_id": identity})
        for path in list((tmp_path / "results").rglob("a*.parquet")):
            path.unlink()
    board = only(tmp_path / "many")
    assert len(board.rows) == 40 and all(row.standing and row.standing.last == 40 for row in board.rows)


def test_a_store_that_grows_meanwhile_gives_a_board_of_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "a", [C, U])
    store = ResultStore(tmp_path / "results")
    listed = store.paths

    def paths(table: str) -> list[Path]:
        found = listed(table)
        if table == "certificates":  # a whole run arrives just after its certificates would have been listed
            add(tmp_path, "b", [C, C], method="late")
        return found

    monkeypatch.setattr(store, "paths", paths)
    (board,) = boards(store)
    assert [row.method for row in board.rows] == ["fast-ibp"]
    assert [row.method for row in only(tmp_path).rows] == ["late", "fast-ibp"]


def test_a_missing_folder_and_an_unreadable_file_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no folder"):
        building.read_boards(tmp_path / "nowhere")
    add(tmp_path, "a", [C, U])
    (path,) = ResultStore(tmp_path / "results").paths("certificates")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="truncated"):
        only(tmp_path)


# Submitters ------------------------------------------------------------------------------------------------------------


def test_a_contradiction_is_the_submission_s_and_never_ours(tmp_path: Path) -> None:
    """Whichever file comes first by name."""
    add(tmp_path, "a", [C, U])
    store = ResultStore(tmp_path / "results")
    store.write_submission(
        {"run_id": "a" * 16, "submitter": "A Lab", "bundle_digest": "0" * 64, "rechecked": 0}
    )
    add(tmp_path, "b", [C, U])
    path = next(path for path in store.paths("certificates") if path.name.startswith("a"))
    rows = store.load("certificates", path).to_pylist()
    path.unlink()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    store.write_certificates("a" * 16, "ibp", SETTINGS, columns | {"image_digest": ["f0", "f1"]})
    with pytest.raises(DataError, match="run aaaaaaaaaaaaaaaa.*is another image than in other runs"):
        boards(store)


def test_rows_of_a_submitter_stand_apart_and_say_so(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U], seed=0)
    add(tmp_path, "b", [C, C], seed=1)
    store = ResultStore(tmp_path / "results")
    store.write_submission(
        {"run_id": "b" * 16, "submitter": "A <b>Lab</b>", "bundle_digest": "ab" * 32, "rechecked": 20}
    )
    board = only(tmp_path)
    assert [(row.seeds, row.submitter, row.rechecked) for row in board.rows] == [
        ((1,), "A <b>Lab</b>", 20),
        ((0,), None, 0),
    ]
    text = tables.markdown(board)
    assert "submitted by" in text and "20 re-checked" in text and "<b>" not in text


def test_costs_and_times_do_not_move_ranks(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U])
    before = only(tmp_path).rows[0].standing
    time(tmp_path, "a", "train", 10.0)
    row = only(tmp_path).rows[0]
    assert row.standing == before and row.train_seconds == 10.0
    assert replace(row, cap=Fraction(1, 5)).budget != row.budget


# Protocols -----------------------------------------------------------------------------------------------------------


def test_certificates_by_another_certifier_than_the_recipes_have_a_board_of_their_own(tmp_path: Path) -> None:
    asked = {"seed": 0, "threat": {"norm": "l2", "sigma": 0.5}, "certify": {"certifier": "smoothing"}}
    smoothed(tmp_path, "a", [1000] * 4, recipe=json.dumps(asked, sort_keys=True, separators=(",", ":")))
    store = ResultStore(tmp_path / "results")
    table = store.read("certificates")
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    columns |= {"certifier": ["smoothing-label"] * 4, "n0": [0] * 4}
    store.write_certificates("a" * 16, "smoothing-label", SETTINGS, columns)
    assert sorted(board.protocol for board in boards(store)) == ["l2-fixed-1", "l2-fixed-1-label"]


def test_another_failure_probability_is_another_budget(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 4)
    row = boards(ResultStore(tmp_path / "results"))[0].rows[0]
    assert row.sampling is not None
    assert replace(row, sampling=replace(row.sampling, alpha=0.01)).budget != row.budget


def test_refutations_are_allowed_for_by_all_images_not_by_the_certified_ones() -> None:
    wanted = [stats.binom.ppf(0.999, images, 0.001) for images in (4, 400, 2000)]
    assert [allowed_refutations(images, 0.001) for images in (4, 400, 2000)] == wanted
