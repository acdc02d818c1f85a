"""Boards: the numbers are those of the rows, the files are those of the boards, and hostile names do nothing."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner
from stores import REFERENCE, SETTINGS, C, M, T, U, add, time

from certbench.cli.leaderboard import command
from certbench.errors import DataError, FoundError, RunError, UsageError
from certbench.leaderboard import build as building
from certbench.leaderboard.board import Board, boards
from certbench.leaderboard.escape import csv_cell
from certbench.leaderboard.escape import markdown as escape_markdown
from certbench.leaderboard.metrics import measure
from certbench.leaderboard.records import records
from certbench.leaderboard.tables import markdown, plain
from certbench.leaderboard.terminal import show_board
from certbench.plugins import Plugins
from certbench.results.schema import CERTIFICATES
from certbench.results.store import ResultStore, certify_stage
from certbench.threat import round_up


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards of tests depend on no plugin that happens to be installed."""
    monkeypatch.setattr(building, "installed", lambda: Plugins([]))


def build(folder: Path) -> dict[str, str]:
    return building.build(folder, page=False).files


def check(folder: Path) -> list[str]:
    """What differs, of the tables: the page has tests of its own."""
    return building.check(folder, page=False).found


def write(folder: Path) -> list[str]:
    return sorted(building.write(folder, page=False).files)


def only(folder: Path) -> Board:
    (board,) = boards(ResultStore(folder / "results"))
    return board


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of one method and one of another, on one board."""
    add(tmp_path, "a", [C, C, C, U, M, C, U, C], seed=0, reference=REFERENCE)
    add(tmp_path, "b", [C, C, C, C, M, C, U, M], seed=1, reference=REFERENCE)
    add(tmp_path, "c", [C, U, U, U, U, U, U, U], method="crown", certifier="crown>ibp")
    time(tmp_path, "a", "train", 10.0)
    time(tmp_path, "a", "train", 5.0, second=1, device="cuda:0")
    time(tmp_path, "b", "train", 20.0)
    time(tmp_path, "a", certify_stage("ibp", SETTINGS), 1.0)
    time(tmp_path, "b", certify_stage("ibp", SETTINGS), 2.0)
    time(tmp_path, "a", certify_stage("crown>ibp", SETTINGS), 99.0)
    return tmp_path


# Numbers -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_computed_by_hand(folder: Path) -> None:
    board = only(folder)
    assert (board.name, board.protocol) == ("mnist-linf-0.1", "linf-1")
    first, second = board.rows
    assert (first.method, second.method) == ("fast-ibp", "crown")
    assert first.seeds == (0, 1) and first.images == first.expected == 8
    # seed 0: 7 of 8 correct, 5 certified; seed 1: 6 correct, 5 certified
    assert first.clean.mean == pytest.approx((87.5 + 75.0) / 2)
    assert first.clean.deviation == pytest.approx(math.sqrt(2 * 6.25**2))
    assert first.certified.mean == 62.5 and first.certified.deviation == 0.0
    acr = [(5 * 0.1 + 2 * 0.05) / 8, (5 * 0.1 + 1 * 0.05) / 8]
    assert first.acr is not None
    assert first.acr.mean == pytest.approx(sum(acr) / 2, rel=1e-12)
    assert first.acr.deviation == pytest.approx(abs(acr[0] - acr[1]) / math.sqrt(2), rel=1e-9)
    assert first.acr_of_cap == pytest.approx(sum(acr) / 2 / 0.1, rel=1e-12)
    assert first.verdicts[C] == 10 and first.verdicts[U] == 3 and first.verdicts[M] == 3
    assert (second.clean.mean, second.clean.deviation, second.certified.mean) == (100.0, None, 12.5)


def test_costs_are_summed_over_sessions_and_averaged_over_seeds(folder: Path) -> None:
    first, second = only(folder).rows
    assert (first.train_seconds, first.certify_seconds) == (17.5, 1.5)
    assert first.devices == ("cpu", "cuda:0")
    assert second.train_seconds is None and second.certify_seconds is None


def test_published_figures_stand_below_with_the_difference(folder: Path) -> None:
    first, second = only(folder).rows
    (published,) = first.published
    assert second.published == ()
    assert {"clean", "certified"} == set(published.figures)
    assert (published.figures["clean"].mean, published.figures["clean"].deviation) == (48.28, None)
    assert (published.figures["certified"].mean, published.figures["certified"].deviation) == (34.42, 0.4)
    assert published.difference("clean") == 32.97 and published.difference("certified") == 28.08
    text = markdown(only(folder)).splitlines()
    at = next(i for i, line in enumerate(text) if line.startswith("| fast-ibp"))
    assert "arXiv 2103.17268, Table 1" in text[at + 1] and "+28.08" in text[at + 1]
    assert text[at + 1].startswith("| published") and "34.42 ± 0.40" in text[at + 1]


def test_a_corrected_reference_shows_both_until_all_seeds_have_it(folder: Path) -> None:
    add(folder, "d", [C] * 8, seed=2, reference=REFERENCE | {"clean_error": 50.0})
    published = only(folder).rows[0].published
    assert sorted(p.figures["clean"].mean for p in published) == [48.28, 50.0]


def test_rows_rank_by_certified_then_clean_accuracy(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, U, M, M], method="low")
    add(tmp_path, "b", [C, C, M, M], method="tie-b")
    add(tmp_path, "c", [C, C, U, M], method="clean")
    add(tmp_path, "d", [C, C, M, M], method="tie-a")
    board = only(tmp_path)
    assert [row.method for row in board.rows] == ["clean", "tie-a", "tie-b", "low"]
    assert board.best("certified") == {0, 1, 2} and board.best("clean") == {0}


def test_an_unknown_radius_leaves_no_acr_and_a_failure_is_no_success(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, T, T, U])
    (row,) = only(tmp_path).rows
    assert row.acr is None and row.acr_of_cap is None and row.complete
    assert (row.certified.mean, row.clean.mean, row.verdicts[T]) == (25.0, 50.0, 2)
    line = next(line for line in markdown(only(tmp_path)).splitlines() if line.startswith("| fast-ibp"))
    assert "incomplete" in line


def test_a_run_with_fewer_images_is_marked_and_ranks_last(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C, C], method="partial")
    add(tmp_path, "b", [C, U, U, U, M], method="whole")
    board = only(tmp_path)
    assert [row.method for row in board.rows] == ["whole", "partial"]
    assert not board.rows[1].complete and board.best("certified") == {0}
    assert "3 of 5" in markdown(board) and "not comparable" in markdown(board)


def test_rows_that_say_certified_exceeds_clean_build_no_table() -> None:
    rows = [
        {
            "run_id": "a" * 16,
            "certifier": "ibp",
            "settings_digest": "f" * 8,
            "index": i,
            "image_digest": "",
            "label": 1,
        }
        | {"prediction": 2, "verdict": C, "radius": 0.1, "guarantee": "real_arith", "deploy": "", "passes": 1}
        | {"proved_by": ""}
        for i in range(2)
    ]
    import pyarrow as pa

    with pytest.raises(DataError, match="run aaaaaaaaaaaaaaaa.*2 images are certified but only 0"):
        measure(pa.Table.from_pylist(rows, schema=CERTIFICATES.schema))


def test_a_smoothed_classifier_is_right_where_it_is_certified_at_all() -> None:
    import pyarrow as pa

    base = {"run_id": "a" * 16, "certifier": "s", "settings_digest": "f" * 8, "image_digest": "", "label": 1}
    base |= {"prediction": 1, "guarantee": "statistical", "deploy": "", "proved_by": "", "passes": 1}
    rows = [
        base | {"index": 0, "verdict": C, "radius": 0.5},
        base | {"index": 1, "verdict": U, "radius": 0.2},
    ]
    rows += [base | {"index": 2, "verdict": "abstain", "radius": 0.0}]
    metrics = measure(pa.Table.from_pylist(rows, schema=CERTIFICATES.schema))
    assert (metrics.correct, metrics.certified) == (2, 1)


# What shares a table -----------------------------------------------------------------------------------------------


def test_boards_part_by_data_set_radius_and_protocol(folder: Path) -> None:
    add(folder, "d", [C, C], dataset="cifar10", radius="8/255")
    add(folder, "e", [C, U], protocol="linf-10")
    add(folder, "f", [C, U], protocol="linf-9")
    found = boards(ResultStore(folder / "results"))
    names = [(board.name, board.protocol, len(board.rows)) for board in found]
    assert names == [
        ("cifar10-linf-8-255", "linf-1", 1),
        ("mnist-linf-0.1", "linf-10", 1),
        ("mnist-linf-0.1--linf-1", "linf-1", 2),
        ("mnist-linf-0.1--linf-9", "linf-9", 1),
    ]


def test_one_recipe_name_with_two_contents_is_two_rows(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C])
    add(tmp_path, "b", [C, U], train={"epochs": 1})
    assert [(row.variant, row.certified.mean) for row in only(tmp_path).rows] == [
        ("train.epochs = 70", 100.0),
        ("train.epochs = 1", 50.0),
    ]


def test_a_board_says_which_bounds_search_no_radii(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C])
    assert "A bound marked" not in markdown(only(tmp_path))
    add(tmp_path, "b", [C, C], method="crown", certifier="ibp>crown@radius")
    assert "A bound marked @radius decides at the table's radius only" in markdown(only(tmp_path))


def test_caps_and_certifiers_are_not_mixed(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C], seed=0)
    add(tmp_path, "b", [C, C], seed=1, cap="1/5")
    add(tmp_path, "c", [C, C], seed=2, certifier="crown")
    assert sorted((row.certifier, row.cap, row.seeds) for row in only(tmp_path).rows) == [
        ("crown", Fraction(1, 10), (2,)),
        ("ibp", Fraction(1, 10), (0,)),
        ("ibp", Fraction(1, 5), (1,)),
    ]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C])
    add(tmp_path, "b", [C, U])
    with pytest.raises(DataError, match="aaaaaaaaaaaaaaaa and bbbbbbbbbbbbbbbb are both seed 0"):
        only(tmp_path)


def test_two_versions_of_a_data_set_share_no_table(tmp_path: Path) -> None:
    add(tmp_path, "a", [C, C])
    add(tmp_path, "b", [C, U], seed=1, dataset_digest="another")
    with pytest.raises(DataError, match="different versions of mnist"):
        only(tmp_path)


def test_two_boards_of_one_file_name_are_refused(tmp_path: Path) -> None:
    add(tmp_path, "a", [C], dataset="my data")
    add(tmp_path, "b", [C], dataset="my/data")
    with pytest.raises(DataError, match="would share the file my-data-linf-0.1.md"):
        build(tmp_path)


def test_rows_that_contradict_their_run_are_neither_recorded_nor_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "a", [C, U], cap="1/5")
    store = ResultStore(tmp_path / "results")
    rows = store.read("certificates").to_pylist()
    rows[0]["radius"] = math.nextafter(round_up(Fraction(1, 5)), 1)
    store.paths("certificates")[0].unlink()
    table = CERTIFICATES.schema.empty_table().from_pylist(rows, schema=CERTIFICATES.schema)
    with pytest.raises(DataError, match="not recorded: .*above the cap 1/5"):
        store.write_certificates("a" * 16, "ibp", SETTINGS, table)
    monkeypatch.setattr("certbench.results.store.CrossCheck.problems", lambda *_: [])
    store.write_certificates("a" * 16, "ibp", SETTINGS, table)  # as somebody else's tool might
    monkeypatch.undo()
    with pytest.raises(DataError, match="above the cap 1/5"):
        build(tmp_path)


def test_an_empty_store_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no folder results/"):
        build(tmp_path)
    (tmp_path / "results").mkdir()
    with pytest.raises(UsageError, match="no certificates in"):
        build(tmp_path)


# Files -------------------------------------------------------------------------------------------------------------


def test_building_twice_gives_the_same_bytes_and_check_is_content(folder: Path) -> None:
    names = write(folder)
    assert names == ["index.md", "mnist-linf-0.1.csv", "mnist-linf-0.1.md", "mnist-linf-0.1.tex"]
    before = {name: (folder / name).read_bytes() for name in names}
    stamps = {name: (folder / name).stat().st_mtime_ns for name in names}
    assert write(folder) == names and before == {name: (folder / name).read_bytes() for name in names}
    assert stamps == {name: (folder / name).stat().st_mtime_ns for name in names}
    assert check(folder) == []
    assert all(b"\r" not in content and content.endswith(b"\n") for content in before.values())


@pytest.mark.parametrize(
    "name", ["index.md", "mnist-linf-0.1.csv", "mnist-linf-0.1.md", "mnist-linf-0.1.tex"]
)
def test_check_finds_one_changed_byte_anywhere(folder: Path, name: str) -> None:
    write(folder)
    content = (folder / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        broken = bytearray(content)
        broken[place] ^= 1
        (folder / name).write_bytes(broken)
        assert check(folder) == [f"{name}: differs"]
    (folder / name).write_bytes(content + b"\n")
    assert check(folder) == [f"{name}: differs"]
    (folder / name).unlink()
    assert check(folder) == [f"{name}: missing"]


def test_check_finds_changed_rows(folder: Path) -> None:
    write(folder)
    time(folder, "c", "train", 3.0)
    assert check(folder) == [f"mnist-linf-0.1.{kind}: differs" for kind in ("csv", "md", "tex")]


def test_files_of_boards_that_are_gone_are_removed_and_hand_written_ones_kept(folder: Path) -> None:
    add(folder, "d", [C, C], dataset="cifar10", radius="8/255")
    write(folder)
    (folder / "notes.md").write_text("# by hand\n")
    (folder / "data.csv").write_text("a,b\n")
    for path in (folder / "results").rglob(f"{'d' * 16}*.parquet"):
        path.unlink()
    assert check(folder) == [
        "cifar10-linf-8-255.csv: no board",
        "cifar10-linf-8-255.md: no board",
        "cifar10-linf-8-255.tex: no board",
        "index.md: differs",
    ]
    write(folder)
    assert check(folder) == [] and not (folder / "cifar10-linf-8-255.md").exists()
    assert (folder / "notes.md").exists() and (folder / "data.csv").exists()


def test_a_hand_written_file_is_never_overwritten(folder: Path) -> None:
    (folder / "index.md").write_text("# mine\n")
    with pytest.raises(RunError, match="index.md was not written by"):
        write(folder)
    assert (folder / "index.md").read_text() == "# mine\n" and not (folder / "mnist-linf-0.1.md").exists()


def test_csv_reads_back_to_the_same_numbers(folder: Path) -> None:
    board = only(folder)
    rows = list(csv.DictReader(io.StringIO(build(folder)["mnist-linf-0.1.csv"])))
    assert [row["kind"] for row in rows] == ["measured", "published", "measured"]
    assert board.rows[0].acr is not None and float(rows[0]["acr"]) == board.rows[0].acr.mean
    assert rows[0]["seeds"] == "0 1" and rows[0]["cap"] == "1/10" and rows[0]["certified"] == "10"
    assert rows[1]["source"] == REFERENCE["source"] and rows[1]["certified_difference"] == "28.08"
    assert [list(record) for record in records(board)] == [list(rows[0])] * 3


def test_the_foot_says_how_the_table_was_made(folder: Path) -> None:
    text = markdown(only(folder))
    for words in (
        "# mnist, linf, radius 0.1",
        "Protocol: linf-1",
        "Cap of the radius search: 0.1",
        "settings feedc0de",
        "round-off of the computation is not covered",
        "fast-ibp/mnist 70",
        "Derived by `certbench leaderboard build`",
    ):
        assert words in text


# Hostile names -----------------------------------------------------------------------------------------------------

HOSTILE = "=cmd|' /C calc'!A0 <script>alert(1)</script>\n| x | [a](javascript:b) `c` **d** \x1b[31m\u202e"


def test_hostile_names_are_inert_in_every_form(tmp_path: Path) -> None:
    names = {"method": HOSTILE, "model": "@SUM(A1)", "dataset": "../../evil <b>"}
    add(tmp_path, "a", [C, C], **names, reference=REFERENCE | {"source": "-1+1|<img src=x>\r\n+x"})
    name = "..-..-evil-b-linf-0.1".strip("-.")
    files = build(tmp_path)
    assert sorted(files) == [f"{name}.csv", f"{name}.md", f"{name}.tex", "index.md"]
    for text in (files[f"{name}.md"], files["index.md"]):
        body = text.split("\n", 1)[1]  # after the marker, which is a comment
        assert not {"<", "\x1b", "\u202e", "\r"} & set(body)
        assert "](javascript" not in body.replace("\\]", "")
    table = [line for line in files[f"{name}.md"].splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in table}
    assert len(table) == 4 and len(bars) == 1
    rows = list(csv.reader(io.StringIO(files[f"{name}.csv"])))
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1
    numbers = {"+", "-"}
    for cell in (cell for row in rows for cell in row):
        assert cell[:1] not in {"=", "@", "\t"} and (cell[:1] not in numbers or float(cell) is not None)
        assert "\n" not in cell and "\r" not in cell and "\x1b" not in cell
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "results"])


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@x", "'@x"),
        ("+1-1", "'+1-1"),
        ("-cmd", "'-cmd"),
        ("\tx", "'\tx"),
        ("  =x", "'  =x"),
        ("-1.5", "-1.5"),
        ("+2e-3", "+2e-3"),
        ("plain", "plain"),
        ("", ""),
        (None, ""),
        (-0.25, "-0.25"),
        (7, "7"),
    ],
)
def test_csv_cells_are_never_formulas(value: str | float | None, cell: str) -> None:
    assert csv_cell(value) == cell


def test_markdown_escapes_what_acts() -> None:
    assert escape_markdown("a|b<c>&`d`") == "a\\|b&lt;c&gt;&amp;\\`d\\`"
    assert escape_markdown("a\nb\x00") == "a b "
    assert escape_markdown("fast-ibp/mnist-linf-0.1") == "fast-ibp/mnist-linf-0.1"


def test_a_terminal_gets_no_control_characters_and_no_markup(tmp_path: Path) -> None:
    from rich.console import Console

    add(tmp_path, "a", [C, C], method="[bold]x[/bold]\x1b]0;evil\x07")
    board = only(tmp_path)
    sink = io.StringIO()
    show_board(board, Console(file=sink, width=300, force_terminal=True, color_system=None))
    assert "\x1b]" not in sink.getvalue() and "[bold]x[/bold]" in sink.getvalue()
    assert "\x1b" not in plain(board) and "100.00 *" in plain(board)


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_a_narrow_terminal_drops_columns_and_says_which(folder: Path, width: int) -> None:
    from rich.console import Console

    sink = io.StringIO()
    show_board(only(folder), Console(file=sink, width=width, color_system=None))
    text = sink.getvalue()
    assert ("No room for" in text) == (width < 300)
    if width > 40:
        assert "62.50 ± 0.00 *" in text and all(len(line) <= width for line in text.splitlines())


# Command line ------------------------------------------------------------------------------------------------------


def test_the_commands_build_check_and_show(folder: Path) -> None:
    runner = CliRunner()
    built = runner.invoke(command, ["build", str(folder)], catch_exceptions=False)
    assert built.exit_code == 0 and "mnist-linf-0.1.md" in built.output
    assert runner.invoke(command, ["check", str(folder)], catch_exceptions=False).exit_code == 0
    (folder / "mnist-linf-0.1.md").write_text("x")
    failed = runner.invoke(command, ["check", str(folder)])
    assert isinstance(failed.exception, FoundError) and failed.exception.exit_code == 1
    assert "mnist-linf-0.1.md: differs" in str(failed.exception) and "\n" not in str(failed.exception)


def test_show_prints_text_json_and_one_board(folder: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(command, ["show", str(folder)], catch_exceptions=False)
    assert "62.50 ± 0.00 *" in shown.output and "100.00 *" in shown.output
    loaded = json.loads(
        runner.invoke(command, ["show", str(folder), "--json"], catch_exceptions=False).output
    )
    assert [record["kind"] for record in loaded] == ["measured", "published", "measured"]
    wrong = runner.invoke(command, ["show", str(folder), "--board", "mnist-linf-0.2"])
    assert isinstance(wrong.exception, UsageError) and "did you mean 'mnist-linf-0.1'" in str(wrong.exception)


def test_the_folder_defaults_to_where_runs_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (work / "certbench-out").mkdir(parents=True)
    (tmp_path / "results").rename(work / "certbench-out" / "results")
    monkeypatch.chdir(work)
    assert CliRunner().invoke(command, ["build"], catch_exceptions=False).exit_code == 0
    assert (work / "certbench-out" / "index.md").exists()


@pytest.mark.parametrize("name", [[], ["build"], ["check"], ["show"]])
def test_every_help_has_an_example(name: list[str]) -> None:
    shown = CliRunner().invoke(command, [*name, "--help"])
    assert shown.exit_code == 0 and "Example:\n    certbench leaderboard" in shown.output


def test_leaderboards_never_import_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from certbench.cli import leaderboard; "
        "from certbench.leaderboard import build, terminal; build.write(Path(sys.argv[1])); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
