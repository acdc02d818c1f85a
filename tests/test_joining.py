"""Rows from elsewhere join ours only where the boards of both together can be built and ours stay what they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bundles import export, here, rewritten, take_in, with_rows
from click.testing import CliRunner
from stores import REFERENCE, C, U, identified, time

from certbench.cli.results import command
from certbench.data.catalog import DATASETS, DatasetInfo
from certbench.errors import DataError, FoundError
from certbench.leaderboard.board import boards, obstacles
from certbench.leaderboard.tables import markdown
from certbench.plugins import Plugins
from certbench.results.bundle import Refused, export_runs, unpack
from certbench.results.joining import join
from certbench.results.store import ResultStore

EVERY_20 = {
    "certify": {"certifier": "smoothing", "smoothing": {"subset": "every-20"}},
    "protocol": "l2-fixed-1-every-20",
    "stride": 20,
}
SMOOTHING = {"certify": {"certifier": "smoothing"}}


def sent(tmp_path: Path, **changes: Any) -> Path:
    """A bundle of one run of a stranger's."""
    return export(tmp_path, identified(tmp_path / "there", **{"seed": 1, **changes}))


def reasons(path: Path, tmp_path: Path) -> str:
    """Why a bundle is refused; it left nothing behind."""
    before = sorted(here(tmp_path).folder.rglob("*"))
    with pytest.raises(Refused) as caught:
        take_in(path, tmp_path)
    assert sorted(here(tmp_path).folder.rglob("*")) == before
    assert str(tmp_path) not in " ".join(caught.value.reasons)
    return " ".join(caught.value.reasons)


# Images ---------------------------------------------------------------------------------------------------------------

VALIDATION = DATASETS["mnist"].held_out().test_size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"index": [0, 1, 2, 2**31 - 1]}, "image 2147483647 is none of the 10000 test images of mnist"),
        ({"index": [0, 1, 2, 10_000]}, "image 10000 is none of the 10000"),
        (
            {"dataset": "mnist-validation", "index": [0, 1, 2, VALIDATION]},
            f"image {VALIDATION} is none of the {VALIDATION} test images of mnist-validation",
        ),
        ({"hits": [900] * 3, "index": [0, 20, 10_000], **EVERY_20}, "image 10000 is none of the 10000"),
    ],
)
def test_an_image_that_the_data_set_does_not_have_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in reasons(sent(tmp_path, **changes), tmp_path)


def test_an_image_between_those_of_its_protocol_is_refused(tmp_path: Path) -> None:
    bundle = sent(tmp_path, hits=[900] * 3, index=[0, 20, 40], **EVERY_20)
    between = with_rows("certificates", lambda rows: [*rows[:2], rows[2] | {"index": 41}])
    assert "image 41 is not among every 20th" in reasons(rewritten(bundle, between), tmp_path)


UNTOUCHED = {"verdict": "not_run", "radius": None, "prediction": None, "margin": None, "proved_by": ""}


@pytest.mark.parametrize(
    "changes", [{"reference": REFERENCE, "radius": "2/255"}, {"hits": [900] * 3, **SMOOTHING}]
)
def test_a_run_of_which_nothing_was_certified_leaves_the_boards_buildable(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    bundle = sent(tmp_path, **changes)
    nothing = with_rows("certificates", lambda rows: [row | UNTOUCHED for row in rows])
    take_in(rewritten(bundle, nothing), tmp_path)
    (board,) = boards(here(tmp_path))
    assert board.rows[0].images == 0
    assert markdown(board)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"n": 0, "k": 0, "radius": 0.0, "verdict": "abstain", "proved_by": ""}, "decided without a draw"),
        ({"n": 2**62, "k": 2**62, "draws": 2**63 - 1}, "a count is larger than 2^53"),
        ({"radius": 1e308}, "radius is larger than 1e+09"),
    ],
)
def test_numbers_that_boards_cannot_reckon_with_are_refused(
    tmp_path: Path, counts: dict[str, Any], reason: str
) -> None:
    bundle = sent(tmp_path, hits=[900] * 3, **SMOOTHING)
    change = with_rows("certificates", lambda rows: [row | counts for row in rows])
    assert reason in reasons(rewritten(bundle, change), tmp_path)


def test_seconds_and_noise_that_boards_cannot_add_up_are_refused(tmp_path: Path) -> None:
    run_id = identified(tmp_path / "there", seed=1)
    time(tmp_path / "there", run_id[:1], "train", 1.0)
    timings = next((tmp_path / "there" / "results" / "timings").iterdir())
    rows = pq.read_table(timings).to_pylist()
    timings.unlink()
    ResultStore(tmp_path / "there" / "results").write_timing(rows[0] | {"run_id": run_id})
    bundle = export(tmp_path, run_id)
    endless = with_rows("timings", lambda rows: [row | {"seconds": 1e308} for row in rows])
    assert "seconds = 1e+308 is not a duration" in reasons(rewritten(bundle, endless), tmp_path)
    with pytest.raises(DataError, match=r"sigma = 1e\+300 is not a positive number up to"):
        identified(tmp_path / "there", hits=[900] * 3, sigma=1e300, **SMOOTHING)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": [0, 1, 2, 9999]},
        {"hits": [900] * 3, "index": [0, 20, 9980], **EVERY_20},
        {"hits": [900] * 3, **SMOOTHING},
    ],
)
def test_the_last_image_is_still_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert len(take_in(sent(tmp_path, **changes), tmp_path).new) == 1


class Registered(Plugins):
    """Knows one more data set, of four test images."""

    def datasets(self) -> dict[str, DatasetInfo]:
        return DATASETS | {"ours": replace(DATASETS["mnist"], name="ours", test_size=4, digest="")}


def test_the_data_sets_of_plugins_have_their_sizes_too(tmp_path: Path) -> None:
    unpacked = unpack(sent(tmp_path, dataset="ours", index=[0, 1, 2, 4]), tmp_path / "unpacked")
    with pytest.raises(Refused, match="image 4 is none of the 4 test images of ours"):
        join(unpacked, here(tmp_path), obstacles, plugins=Registered([]))
    assert len(join(unpacked, here(tmp_path), obstacles, plugins=Plugins([])).new) == 1


def test_an_index_into_an_unknown_data_set_leaves_our_rows_complete(tmp_path: Path) -> None:
    """How many images there are cannot be told there, so what is submitted counts for the submitted rows alone."""
    identified(tmp_path / "here", dataset="unheard-of")
    take_in(
        sent(tmp_path, dataset="unheard-of", verdicts=[C, C, U, U, U], index=[0, 1, 2, 3, 10**9]), tmp_path
    )
    (board,) = boards(here(tmp_path))
    assert [(row.submitter, row.expected, row.complete) for row in board.rows] == [
        (None, 4, True),
        ("A Lab", 4, False),
    ]


def test_our_rows_on_a_subset_say_nothing_of_the_whole(tmp_path: Path) -> None:
    """Every 20th image ends before the last one does."""
    identified(tmp_path / "here", hits=[900] * 2, dataset="unheard-of", **EVERY_20)
    take_in(sent(tmp_path, hits=[900] * 30, dataset="unheard-of", **SMOOTHING), tmp_path)
    assert {board.protocol: [row.complete for row in board.rows] for board in boards(here(tmp_path))} == {
        "l2-fixed-1": [True],
        "l2-fixed-1-every-20": [True],
    }


def test_complete_rows_about_other_images_are_refused(tmp_path: Path) -> None:
    identified(tmp_path / "here", dataset="unheard-of")
    bundle = sent(tmp_path, dataset="unheard-of", index=[0, 1, 2, 7])
    assert "are about different images" in reasons(bundle, tmp_path)


def test_another_version_than_the_known_one_is_refused(tmp_path: Path) -> None:
    bundle = sent(tmp_path, dataset_digest="0" * 64)
    assert "another version of mnist than certbench reads" in reasons(bundle, tmp_path)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "MNIST"}, "made on 'MNIST', a name that is not to be told from 'mnist'"),
        ({"dataset": "mnist "}, "has spaces around its dataset 'mnist '"),
        ({"dataset": "Mnist Validation"}, "not to be told from 'mnist-validation'"),
        ({"model": " cnn7"}, "has spaces around its model"),
        ({"protocol": "linf-1 "}, "is of protocol 'linf-1 ', and its recipe of 'linf-1'"),
        ({"hits": [900] * 3, **SMOOTHING, "protocol": "l2-fixed-1 "}, "is of protocol 'l2-fixed-1 '"),
        (
            {"hits": [900] * 3, **SMOOTHING, "protocol": "l2-fixed-1-every-20", "stride": 20},
            "its recipe of 'l2-fixed-1'",
        ),
        ({"dataset": "x" * 210}, "has a name too long for a file"),
    ],
)
def test_a_name_that_passes_for_another_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in reasons(sent(tmp_path, **changes), tmp_path)


@pytest.mark.parametrize(("ours", "theirs"), [("unheard-of", "Unheard-Of"), ("unheard-of", "unheard of")])
def test_boards_that_would_share_a_file_are_refused(tmp_path: Path, ours: str, theirs: str) -> None:
    """Each alone can be built; both together cannot."""
    identified(tmp_path / "here", dataset=ours)
    bundle = sent(tmp_path, dataset=theirs)
    assert obstacles(unpack(bundle, tmp_path / "alone").store) == [] == obstacles(here(tmp_path))
    assert "two boards would share the file" in reasons(bundle, tmp_path)


def test_every_reason_of_both_stores_is_listed(tmp_path: Path) -> None:
    identified(tmp_path / "here", dataset="unheard-of")
    runs = [
        identified(tmp_path / "there", dataset="MNIST"),
        identified(tmp_path / "there", index=[0, 1, 2, 20_000]),
        identified(tmp_path / "there", dataset="Unheard-of", model="cnn7 "),
        identified(tmp_path / "there", dataset="unheard-of", index=[0, 1, 2, 7], seed=1),
    ]
    found = reasons(export(tmp_path, *runs), tmp_path)
    for reason in (
        "not to be told from 'mnist'",
        "image 20000 is none",
        "spaces around its model",
        "would share the file",
        "are about different images",
    ):
        assert reason in found


def test_what_certbench_recorded_is_taken_in(tmp_path: Path) -> None:
    """The rows of the committed boards, recipes and sizes of real runs included."""
    committed = ResultStore(Path(__file__).parent.parent / "leaderboards" / "results")
    runs = [path.stem for path in committed.paths("runs")]
    export_runs(committed, runs, tmp_path / "rows.parquet", "A Lab")
    assert sorted(take_in(tmp_path / "rows.parquet", tmp_path).new) == runs
    assert [board.name for board in boards(here(tmp_path))] == [board.name for board in boards(committed)]


# What is asked in which order -----------------------------------------------------------------------------------------


def test_our_own_rows_are_not_held_against_a_bundle(tmp_path: Path) -> None:
    for name in ("unheard-of", "Unheard-of"):
        identified(tmp_path / "here", dataset=name)
    with pytest.raises(DataError, match="no boards can be built of the rows in .* as they are") as caught:
        take_in(sent(tmp_path), tmp_path)
    assert not isinstance(caught.value, Refused)


def test_certificates_are_made_again_last_and_counted(tmp_path: Path) -> None:
    run = identified(tmp_path / "there")
    unpacked = unpack(export(tmp_path, run), tmp_path / "unpacked")
    done = join(unpacked, here(tmp_path), obstacles, lambda: {run: 3})
    assert done.new == {run: 3}
    assert [row["rechecked"] for row in here(tmp_path).read("submissions").to_pylist()] == [3]

    def never() -> dict[str, int]:
        raise AssertionError("certificates of a refused bundle are not made again")

    refused = unpack(sent(tmp_path, index=[0, 1, 2, 10_000]), tmp_path / "refused")
    with pytest.raises(Refused):
        join(refused, here(tmp_path), obstacles, never)


def test_the_command_builds_the_boards_of_both(tmp_path: Path) -> None:
    identified(tmp_path / "here", dataset="unheard-of")
    bundle = sent(tmp_path, dataset="Unheard-of")
    done = CliRunner().invoke(command, ["import", str(bundle), "--out", str(tmp_path / "here")])
    assert isinstance(done.exception, FoundError) and done.stderr.count("refused: ") == 1
    assert "would share the file" in done.stderr and len(here(tmp_path).paths("runs")) == 1
