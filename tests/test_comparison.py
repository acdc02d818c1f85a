"""What may be compared with what: ranks among comparable rows, boards by norm, reproductions, and seeds that count once."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from stores import SETTINGS, C, M, U, add, refute, smoothed, time

from certbench.errors import DataError
from certbench.leaderboard import records, sentences, tables
from certbench.leaderboard.board import RADII, Board, boards
from certbench.leaderboard.columns import rank
from certbench.leaderboard.comparison import Cell, hindrance, reproduction
from certbench.leaderboard.foot import foot
from certbench.leaderboard.page.charts import charts
from certbench.leaderboard.published import Notes, PublishedFigure, PublishedFile, refreshed
from certbench.leaderboard.tradeoff import tradeoffs
from certbench.plugins import installed
from certbench.results.files import encode
from certbench.results.schema import CERTIFICATES
from certbench.results.store import ResultStore
from certbench.stats.smoothing import anytime_radius
from certbench.suites import load_suite


def only(folder: Path, notes: Notes | None = None) -> Board:
    (board,) = boards(ResultStore(folder / "results"), notes)
    return board


# Ranks -----------------------------------------------------------------------------------------------------------------


def test_rows_of_budgets_of_their_own_have_no_rank(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 40, method="small")
    smoothed(tmp_path, "b", [10_000] * 40, n=10_000, method="large")
    board = only(tmp_path)
    text = tables.markdown(board)
    assert text.count(" alone |") == 2 and "rank alone: no other row" in text and "rank: by" not in text
    assert board.tied() == set()  # neither is first, and neither is tied with the other
    assert board.best("acr") == set() and tables.leader(board) == ""
    rows = records.records(board)
    assert [(row["rank_first"], row["rank_last"], row["rank_of"]) for row in rows] == [(None, None, 1)] * 2


def test_a_rank_says_among_how_many_it_is_one(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 40, method="one")
    smoothed(tmp_path, "b", [1000] * 40, method="two")
    smoothed(tmp_path, "c", [10_000] * 40, n=10_000, method="large")
    board = only(tmp_path)
    assert {row.method: rank(board.standing(row), board.ranked) for row in board.rows} == {
        "one": "1–2 of 2",
        "two": "1–2 of 2",
        "large": "alone",
    }
    tied = {board.rows[place].method for place in board.tied()}
    best = {board.rows[place].method for place in board.best("acr")}
    assert tied == {"one", "two"} and best == {"one", "two"}
    assert "large" not in tables.leader(board)
    drawn = {chart.title: chart.svg for chart in charts(board)}
    front, curves = drawn["Clean accuracy against ACR"], drawn["Certified accuracy over radius"]
    assert all("compared by ACR with B" in c.words for c in charts(board) if " against " in c.title)
    assert [letter in front for letter in (">A<", ">B<", ">C<")] == [False, True, True]  # A is large
    assert len(re.findall(r"var\(--s[123]\)", curves)) == 3
    text = tables.markdown(board)
    assert "rank k of m" in text and "rank alone" in text and "rank: by ACR" in text


def test_the_only_row_of_a_smoothed_board_is_its_best(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 40, method="one")
    assert only(tmp_path).best("acr") == {0}


def test_a_row_that_is_alone_on_its_board_has_no_rank(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U])
    text = tables.markdown(only(tmp_path))
    assert " alone |" in text and "rank alone: no other row" in text and "by ACR" not in text
    add(tmp_path, "b", [C, U], method="other")
    text = tables.markdown(only(tmp_path))
    assert "alone" not in text and "rank: by certified accuracy" in text and "rank k of m" not in text


# Boards of norm l2 -----------------------------------------------------------------------------------------------------


def by_lipschitz(folder: Path, run: str, **changes: Any) -> None:
    """Give a smoothed run's certificates to a plugin's certifier, with changed columns."""
    made_by(folder, run, "lipschitz", **changes)


def made_by(folder: Path, run: str, certifier: str, **changes: Any) -> None:
    """Give a smoothed run's certificates to another certifier, with changed columns."""
    store = ResultStore(folder / "results")
    table = store.certificates(run * 16, "smoothing", SETTINGS)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    (path,) = [path for path in store.paths("certificates") if path.name.startswith(run * 16)]
    path.unlink()
    for name, value in (changes | {"certifier": certifier}).items():
        columns[name] = value if isinstance(value, list) else [value] * table.num_rows
    store.write_certificates(run * 16, certifier, SETTINGS, columns)


def test_a_board_of_norm_l2_is_one_whatever_guarantee_its_rows_have(tmp_path: Path) -> None:
    """Radii and order belong to the norm: no row looks different because another one is statistical."""
    radii = [0.6, 0.3, 0.0, 0.0]
    drawn = ("sigma", "alpha", "n0", "n", "k", "draws", "stop_reason", "generator_key", "exact_noise")
    smoothed(tmp_path, "a", [1000] * 4, method="proved", protocol="l2-lipschitz-1")
    proved: dict[str, Any] = {"guarantee": "real_arith", "radius": radii, "margin": radii, "prediction": 1}
    verdicts = ["certified" if radius else "unknown" for radius in radii]
    by_lipschitz(tmp_path, "a", **dict.fromkeys(drawn), **proved, verdict=verdicts)
    alone = only(tmp_path)
    assert alone.smoothed and alone.radii == ("0", "0.25", "0.5")
    smoothed(tmp_path, "b", [1000, 1000, 900, 900], protocol="l2-lipschitz-1", method="drawn")
    by_lipschitz(tmp_path, "b")
    both = only(tmp_path)
    assert [row.method for row in both.rows] == ["drawn", "proved"]
    for row in (alone.rows[0], both.rows[1]):
        assert [row.at[radius].mean for radius in alone.radii] == [50.0, 50.0, 25.0]
    standings = [both.standing(row) for row in both.rows]
    assert [standing.of for standing in standings if standing] == [1, 1]  # proofs and draws are not compared


def test_statistical_certificates_that_count_no_draws_are_not_recorded(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 4, protocol="l2-lipschitz-1")
    with pytest.raises(DataError, match="lacks n, k, and a statistical certificate is judged by its draws"):
        by_lipschitz(tmp_path, "a", n=None, k=None)


def test_every_radius_of_recipes_and_published_figures_is_a_column() -> None:
    plugins = installed()
    recipes = [plugins.find_recipe(name) for name in plugins.recipes()]
    asked = {float(r) for recipe in recipes if recipe.threat.norm == "l2" for r in recipe.smoothing.radii}
    figures = [figure for _, figure in refreshed(Notes(), plugins).figures() if figure.norm == "l2"]
    asked |= {float(figure.at) for figure in figures if figure.at is not None}
    assert asked <= {*map(float, RADII)}
    assert list(RADII) == [f"{radius:g}" for radius in sorted(map(float, RADII))]


@pytest.mark.parametrize(
    ("asked", "last"),
    [
        ({"radii": ["1/4", "3/4", "1"], "n": 10_000}, "1"),
        ({"radii": ["1/2", "9"], "n": 10_000}, "0.5"),  # no n of 10,000 draws proves 9
        ({"n": 10_000}, "1.5"),  # the default radii, as far as n draws go
        ({"radii": ["7/4"], "n": 100_000}, None),  # no image has come so far
        ({"radii": ["9"], "n": 10_000}, None),
        ({"radii": ["1"], "n": 10_000, "goal": "budget"}, None),
    ],
)
def test_an_acr_that_is_cut_where_draws_stop_is_called_so(
    tmp_path: Path, asked: dict[str, Any], last: str | None
) -> None:
    hits = [10_000, 9000, 8000, 300]
    smoothed(tmp_path, "a", hits, n=10_000, recipe=asking(smoothing=asked), protocol="l2-sequential-1")
    radius = [float(anytime_radius(k, 10_000, 0.001, 0.5)) * (1 - 1e-9) for k in hits]
    made_by(tmp_path, "a", "smoothing-sequential", radius=radius, proved_by=["e-value"] * 3 + [""])
    found = [line for line in foot(only(tmp_path)) if "are cut there" in line]
    wanted = f"no radius exceeds {math.ceil(1000 * radius[0]) / 1000:g} where the largest is {last}: ACR, and differences"
    assert [wanted in line for line in found] == ([True] if last else [])


def test_nothing_is_said_of_radii_that_draws_stopped_short_of(tmp_path: Path) -> None:
    """Zero percent would be read as none certified; only what n draws cannot prove is known to be that."""
    smoothed(tmp_path, "a", [10_000] * 4, n=10_000, recipe=asking(smoothing={"radii": ["1"], "n": 10_000}),
             protocol="l2-sequential-1", method="short")  # fmt: skip
    smoothed(tmp_path, "b", [100_000] * 4, n=100_000, recipe=asking(smoothing={}), protocol="l2-sequential-1")
    for run, n in (("a", 10_000), ("b", 100_000)):
        proved = float(anytime_radius(n, n, 0.001, 0.5)) * (1 - 1e-9)
        radius = [min(1.01, proved) if run == "a" else proved] * 4
        made_by(tmp_path, run, "smoothing-sequential", radius=radius, proved_by="e-value")
    board = only(tmp_path)
    assert board.radii[-1] == "1.75"
    short, long = sorted(board.rows, key=lambda row: row.method)
    assert (short.method, long.method) == ("short", "smoothing")
    assert {*board.radii} - {*short.at} == {"1.25", "1.5"}  # 1.75 is more than 10,000 draws can prove
    assert short.at["1"].mean == 100 and short.at["1.75"].mean == 0
    assert long.at["1.75"].mean == 100
    line = next(line for line in tables.markdown(board).split("\n") if line.startswith("| short"))
    text = tables.markdown(board)
    assert (
        "Empty at r: draws ended before any radius that large was decided." in text
        and "|            |" in line
    )
    assert [short.is_at_least(radius) for radius in ("0", "0.5", "1", "1.75")] == [True, True, False, False]
    assert [long.is_at_least(radius) for radius in ("0", "0.5", "1.75")] == [False, False, False]
    assert line.count("100.00 +") == 4 and "+: at least" in text, (
        "> 0 and the quarters below 1 were not asked for"
    )


def test_a_radius_that_is_no_binary_fraction_is_decided_where_it_was_asked_for(tmp_path: Path) -> None:
    smoothed(
        tmp_path, "a", [1000] * 4, recipe=asking(smoothing={"radii": ["1/10"]}), protocol="l2-sequential-1"
    )
    made_by(tmp_path, "a", "smoothing-sequential", radius=[0.1] * 4, proved_by="e-value")
    (row,) = only(tmp_path).rows
    assert (
        row.reach is not None
        and row.reach.decides(Fraction("0.1"))
        and not row.reach.stops_short(Fraction("0.1"))
    )
    assert row.reach.stops_short(Fraction("0.25"))


def test_where_draws_end_is_said_of_the_rows_that_it_holds_for(tmp_path: Path) -> None:
    for run, goal, radius in (("a", "radii", 1.01), ("b", "budget", 1.5)):
        wanted = {"radii": ["1"], "n": 100_000, "goal": goal}
        smoothed(tmp_path, run, [100_000] * 4, n=100_000, recipe=asking(smoothing=wanted), protocol="l2-sequential-1",
                 method=goal)  # fmt: skip
        made_by(tmp_path, run, "smoothing-sequential", radius=[radius] * 4, proved_by="e-value")
    (line,) = (line for line in foot(only(tmp_path)) if "are cut there" in line)
    assert line.startswith('Where a recipe\'s goal is "radii",')
    assert "no radius exceeds 1.01 where the largest is 1:" in line


def test_within_a_tolerance_every_radius_that_could_be_proved_is_a_lower_bound(tmp_path: Path) -> None:
    wanted = {"n": 10_000, "goal": "tolerance"}
    smoothed(
        tmp_path, "a", [10_000] * 4, n=10_000, recipe=asking(smoothing=wanted), protocol="l2-sequential-1"
    )
    made_by(tmp_path, "a", "smoothing-sequential", radius=[1.5] * 4, proved_by="e-value")
    board = only(tmp_path)
    (row,) = board.rows
    assert [row.is_at_least(radius) for radius in ("0", "1.5")] == [True, True] and "0" in row.at
    (record,) = records.records(board)
    assert record["lower_bounds_at"] == " ".join(board.radii)
    text = tables.markdown(board)
    assert "+: at least" in text and "are cut there" not in text


def test_a_lower_bound_is_no_failed_reproduction(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [10_000] * 4, n=10_000, recipe=asking(smoothing={"radii": ["1"], "n": 10_000}),
             protocol="l2-sequential-1")  # fmt: skip
    made_by(tmp_path, "a", "smoothing-sequential", radius=[1.01] * 4, proved_by="e-value")
    (row,) = only(tmp_path).rows
    of_l2 = {k: v for k, v in FIGURE.items() if k != "radius"}
    of_l2 |= {"norm": "l2", "sigma": 0.5, "metric": "certified_accuracy", "value": 60.0}
    figures = {at: PublishedFigure.model_validate(of_l2 | {"at": at}) for at in ("0.5", "1")}
    assert hindrance(row, figures["0.5"]) == "its draws ended before that radius was decided"
    assert hindrance(row, figures["1"]) == ""


def test_an_acr_of_all_draws_is_not_cut(tmp_path: Path) -> None:
    smoothed(tmp_path, "a", [1000] * 4, recipe=asking(smoothing={"radii": ["1/4"]}))
    assert "are cut there" not in tables.markdown(only(tmp_path))


def test_boards_say_what_their_seconds_are(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U])
    assert "no measure of what a method costs" not in tables.markdown(only(tmp_path))
    time(tmp_path, "a", "train", 3.0)
    assert "no measure of what a method costs" in tables.markdown(only(tmp_path))


# Reproductions ---------------------------------------------------------------------------------------------------------

FIGURE: dict[str, Any] = {
    "table": "Table 1",
    "dataset": "mnist",
    "norm": "linf",
    "radius": "0.1",
    "method": "fast-ibp",
    "model": "cnn7",
    "metric": "certified_error",
    "value": 38.5,
    "spread": 1.0,
}
"""Certified accuracy 61.5; :data:`VERDICTS` have 62.5."""
VERDICTS = [C, C, C, C, C, U, U, M]


def notes_of(*figures: dict[str, Any]) -> Notes:
    card = {"summary": "s", "paper": "p", "norm": "linf", "guarantee": "real_arith"}
    file = {"source": "Somebody 2021", "figures": [FIGURE | figure for figure in figures]}
    return Notes.model_validate({"methods": {"fast-ibp": card | {"published": [file]}}})


def cells_of(board: Board, notes: Notes) -> list[Cell]:
    return reproduction([(board.radius, row) for row in board.rows], notes)


def asking(**certify: Any) -> str:
    """A recipe of which rules see only the [certify] table."""
    return json.dumps({"certify": certify}, sort_keys=True, separators=(",", ":"))


def test_an_ablation_is_spoken_of_by_its_own_figures_in_any_order_of_its_settings(tmp_path: Path) -> None:
    name = "fast-ibp/mnist +method.tightness=false +method.initialization=default"
    add(tmp_path, "a", VERDICTS, recipe_name=name)
    notes = notes_of(
        {"recipe": "fast-ibp/mnist +method.initialization=default +method.tightness=false"},
        {"recipe": "fast-ibp/mnist +method.tightness=false"},
        {"recipe": "fast-ibp/mnist"},
        {},
    )
    board = only(tmp_path, notes)
    assert [cell.state for cell in cells_of(board, notes)] == ["reproduced", *["not run"] * 3]
    assert [len(row.published) for row in board.rows] == [1]


def test_every_figure_of_an_ablation_speaks_of_a_run_that_a_suite_makes() -> None:
    folder = Path(__file__).parent.parent / "plugins/fast_ibp/certbench_fast_ibp"
    text = (folder / "published/shi-2021.toml").read_text(encoding="utf-8")
    named = {figure.recipe for figure in PublishedFile.model_validate(tomllib.loads(text)).figures}
    ablations = {recipe for recipe in named if recipe and " +" in recipe}
    suites = [load_suite(path, path.stem) for path in sorted((folder / "suites").glob("table-4-*.toml"))]
    assert len(ablations) == 14
    assert ablations <= {member.name for suite in suites for member in suite.members}


@pytest.mark.parametrize(
    ("asked", "because"),
    [
        ({}, ""),
        ({"certifier": "ibp", "guarantee": "real_arith", "deploy": "float32"}, ""),
        ({"certifier": "crown"}, "certified by ibp, where its recipe asks for crown"),
        ({"guarantee": "float_sound"}, "its guarantee is real_arith, where its recipe asks for float_sound"),
        ({"deploy": "bf16"}, "its deploy is float32, where its recipe asks for bf16"),
    ],
)
def test_only_what_the_recipe_asks_for_reproduces(
    tmp_path: Path, asked: dict[str, Any], because: str
) -> None:
    add(tmp_path, "a", VERDICTS, recipe=asking(**asked))
    notes = notes_of({})
    board = only(tmp_path, notes)
    cells = cells_of(board, notes)
    wanted = [("not run", ""), ("beside", because)] if because else [("reproduced", "")]
    assert [(cell.state, cell.because) for cell in cells] == wanted
    (published,) = board.rows[0].published
    assert published.because == because and published.difference("certified") == 1.0
    assert ("count as reproductions" in tables.markdown(board)) == bool(because)
    assert ("beside, no reproduction" in tables.plain(board)) == bool(because)
    assert ("1 beside" in tables.reproduction(cells)) == bool(because)


def test_a_figure_of_other_settings_is_reproduced_by_no_row(tmp_path: Path) -> None:
    """Of one table, so that the figures of both kinds must stand apart under the row."""
    add(tmp_path, "a", VERDICTS)
    other = {"differences": "4 noises for each image", "other_settings": True}
    notes = notes_of(other, {"metric": "clean_error", "value": 12.0, "differences": "mean of 5 runs"})
    board = only(tmp_path, notes)
    cells = cells_of(board, notes)
    assert [(cell.state, cell.because) for cell in cells] == [
        ("not run", ""),
        ("beside", "4 noises for each image"),
        ("reproduced", ""),
    ]
    (row,) = board.rows
    assert [(each.because, *each.figures) for each in row.published] == [
        ("", "clean"),
        ("4 noises for each image", "certified"),
    ]
    assert "beside, no reproduction: 4 noises" in tables.markdown(board)
    with pytest.raises(ValueError, match="other_settings needs differences that say which"):
        notes_of({"other_settings": True})


def test_what_others_submitted_stands_beside(tmp_path: Path) -> None:
    add(tmp_path, "a", VERDICTS)
    add(tmp_path, "b", VERDICTS, seed=1)
    label = {"run_id": "b" * 16, "submitter": "A <b>Lab</b>", "bundle_digest": "ab" * 32, "rechecked": 20}
    ResultStore(tmp_path / "results").write_submission(label)
    notes = notes_of({})
    cells = cells_of(only(tmp_path, notes), notes)
    assert [cell.state for cell in cells] == ["reproduced", "beside"]
    text = tables.reproduction(cells)
    assert "1 reproduced, 0 off, 0 not run, 1 beside" in text
    assert "submitted by A" in text and "<b>" not in text
    rows = list(csv.DictReader(io.StringIO(records.reproduction(cells))))
    assert [row["because"] for row in rows] == ["", "submitted by A <b>Lab</b>"]


@pytest.mark.parametrize(
    ("n", "alpha", "beside"), [(1000, 0.001, False), (100_000, 0.001, True), (1000, 0.01, True)]
)
def test_other_draws_than_the_recipes_reproduce_nothing(
    tmp_path: Path, n: int, alpha: float, beside: bool
) -> None:
    asked = {"certifier": "smoothing", "smoothing": {"n": n, "failure_probability": alpha}}
    smoothed(tmp_path, "a", [1000] * 6 + [600] * 4, method="fast-ibp", recipe=asking(**asked))
    of_l2 = {"dataset": "cifar10", "norm": "l2", "radius": None, "sigma": 0.5, "model": "resnet110"}
    notes = notes_of(of_l2 | {"metric": "certified_accuracy", "at": "0.6", "value": 60.0})
    (row,) = only(tmp_path, notes).rows
    assert bool(row.published[0].because) is beside


# Seeds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelled",
    [
        {"recipe_name": "Fast-IBP/MNIST"},
        {"recipe_name": "fast-ibp/mnist "},
        {"recipe_name": "\tfast-ibp/mnist\n"},
        {"method": "FAST-IBP", "recipe_name": "fast-ibp/mnist"},
        {"model": " CNN7"},
    ],
)
def test_a_seed_counts_once_however_its_names_are_spelled(tmp_path: Path, spelled: dict[str, str]) -> None:
    add(tmp_path, "a", [C, U])
    add(tmp_path, "b", [C, C], **spelled)
    with pytest.raises(DataError, match="are both seed 0 of .*a seed counts once"):
        only(tmp_path)


def test_seeds_of_one_row_are_found_under_every_spelling_and_other_names_stay_apart(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U])
    add(tmp_path, "b", [C, C], seed=1, recipe_name="Fast-IBP/mnist")
    add(tmp_path, "c", [C, C], recipe_name="fast-ibp/mnist 2")
    assert sorted((row.recipe, row.seeds) for row in only(tmp_path).rows) == [
        ("fast-ibp/mnist", (0, 1)),
        ("fast-ibp/mnist 2", (0,)),
    ]


CHANGED = "fast-ibp/mnist +method.kappa=0.5"


def test_settings_of_a_recipe_stand_below_it_and_have_no_rank(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C, U, M])
    add(tmp_path, "b", [C, C, C, M], recipe_name=CHANGED)
    add(tmp_path, "c", [C, U, U, M], method="other")
    board = only(tmp_path)
    assert [row.recipe for row in board.rows] == ["fast-ibp/mnist", "other/mnist"]
    assert [row.recipe for row in board.swept] == [CHANGED] and board.ranked == 2
    assert "fast-ibp 50.00 certified %" in tables.index([board])  # the best of those that are ranked
    above, below = tables.markdown(board).split("## Settings")
    assert CHANGED not in above and CHANGED in below and "| rank" not in below
    assert r"Settings:" in tables.latex(board)
    assert [(row["kind"], row["recipe"], row["rank_of"]) for row in records.records(board)] == [
        ("measured", "fast-ibp/mnist", 2),
        ("measured", "other/mnist", 2),
        ("swept", CHANGED, None),
    ]
    assert "Not shown: 1 setting of these recipes" in tables.plain(board)
    (found,) = tradeoffs([board], ResultStore(tmp_path / "results"))
    assert {point.setting for front in found.fronts for point in front.points} >= {CHANGED, "fast-ibp/mnist"}


def test_settings_have_intervals_and_reproduce_figures_as_ranked_rows_do(tmp_path: Path) -> None:
    """An ablation's ACR is held against its published figure whether or not its recipe stands beside it."""
    changed = "smoothing/cifar10-l2-0.5 +method.eta=1"
    figure = {
        **FIGURE,
        "norm": "l2",
        "sigma": 0.5,
        "dataset": "cifar10",
        "method": "smoothing",
        "model": "resnet110",
    }
    figure |= {"metric": "acr", "recipe": changed, "value": 1.0}
    del figure["radius"], figure["spread"]
    card = {"summary": "s", "paper": "p", "norm": "l2", "guarantee": "statistical"}
    notes = Notes.model_validate(
        {"methods": {"smoothing": card | {"published": [{"source": "Somebody 2021", "figures": [figure]}]}}}
    )
    smoothed(tmp_path, "a", [1000, 990, 900, 700], recipe_name=changed)
    (ranked,) = only(tmp_path, notes).rows
    smoothed(tmp_path, "b", [1000, 1000, 900, 700])
    board = only(tmp_path, notes)
    (swept,) = board.swept
    assert swept.acr == ranked.acr and swept.acr is not None and swept.acr.interval is not None
    assert swept.published == ranked.published and len(swept.published) == 1


def test_settings_are_about_the_same_images_as_their_board(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C, U, M], method="ours")
    add(tmp_path, "b", [C, C, U, M])
    add(tmp_path, "c", [C, C, U, M], recipe_name=CHANGED)
    store = ResultStore(tmp_path / "results")
    for run in "bc":
        label = {"run_id": run * 16, "submitter": "A Lab", "bundle_digest": "ab" * 32, "rechecked": 20}
        store.write_submission(label)
    assert [row.recipe for row in only(tmp_path).swept] == [CHANGED]
    at = store.paths("certificates")[2]
    rows = store.load("certificates", at)
    index = pa.array([0, 1, 2, 9], pa.int32())
    at.write_bytes(encode(rows.set_column(3, rows.schema.field(3), index), CERTIFICATES))
    with pytest.raises(DataError, match="different images"):
        only(tmp_path)


@pytest.mark.parametrize("base", ["none", "incomplete", "voided", "submitted", "certifier", "model"])
def test_a_changed_recipe_is_ranked_where_its_own_is_not(tmp_path: Path, base: str) -> None:
    add(tmp_path, "a", [C, C, U, M], recipe_name=CHANGED)
    add(tmp_path, "b", [C, C, C, M], method="other")
    if base != "none":
        verdicts = [C, C] if base == "incomplete" else [C, C, C, M]
        more = {"certifier": {"certifier": "crown"}, "model": {"model": "cnn-small"}}.get(base, {})
        add(tmp_path, "c", verdicts, **more)
    if base == "voided":
        refute(tmp_path, "c", [0])
    if base == "submitted":
        label = {"run_id": "c" * 16, "submitter": "A Lab", "bundle_digest": "ab" * 32, "rechecked": 20}
        ResultStore(tmp_path / "results").write_submission(label)
    board = only(tmp_path)
    assert CHANGED in [row.recipe for row in board.rows] and board.swept == ()


def test_bounds_that_decide_at_one_radius_share_no_front_with_those_at_another(tmp_path: Path) -> None:
    for run, radius, name in (("a", "1/10", "x"), ("b", "1/10", "y"), ("c", "1/20", "x"), ("d", "1/20", "y")):
        common = {"radius": radius, "cap": "1/5", "recipe_name": f"fast-ibp/{radius}-{name}"}
        add(tmp_path, run, [C, C, U, M], **common, certifier="ibp>crown@radius")
    store = ResultStore(tmp_path / "results")
    found = tradeoffs(boards(store), store)
    assert [one.terms.decided_at for one in found] == ["0.05", "0.1"]
    text = sentences.page(found)
    assert "radius 0.05, cap 0.2" in text and "decides at radius 0.1 and proves no other" in text
    assert [one.terms.tolerance for one in found] == [2.0**-20] * 2


def test_rows_that_others_submitted_take_no_part_in_fronts(tmp_path: Path) -> None:
    """The same recipe and seed, made by somebody else with another library, is no sweep; nor do our claims rest on it."""
    add(tmp_path, "a", [C, C, U, M])
    add(tmp_path, "b", [C, U, U, M], numerics=2)
    label = {"run_id": "b" * 16, "submitter": "A Lab", "bundle_digest": "ab" * 32, "rechecked": 20}
    store = ResultStore(tmp_path / "results")
    store.write_submission(label)
    assert tradeoffs(boards(store), store) == []
    add(tmp_path, "c", [C, C, C, M], recipe_name="fast-ibp/another")
    text = sentences.page(tradeoffs(boards(store), store))
    assert "fast-ibp/another" in text and "A Lab" not in text
    assert len([line for line in text.splitlines() if line.startswith("| fast-ibp | fast-ibp/")]) == 2
