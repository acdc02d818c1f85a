"""Rows handed on and taken in: what comes from elsewhere is checked to the last byte, labelled, and never mixed up."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import Lines, export, first_row, here, manifest, rewritten, take_in, with_rows
from click.testing import CliRunner
from stores import SETTINGS, C, M, U, add, identified

from certbench.cli.results import command
from certbench.errors import DataError, FoundError, UsageError
from certbench.leaderboard.board import boards, obstacles
from certbench.results import bundle
from certbench.results.bundle import Refused, export_runs, unpack
from certbench.results.checks import check_store
from certbench.results.joining import join
from certbench.results.store import ResultStore


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A bundle of two seeds."""
    return export(tmp_path, *(identified(tmp_path / "there", seed=seed) for seed in (0, 1)))


# There and back --------------------------------------------------------------------------------------------------------


def test_rows_arrive_as_they_left_and_say_who_sent_them(packed: Path, tmp_path: Path) -> None:
    done = take_in(packed, tmp_path)
    there = ResultStore(tmp_path / "there" / "results")
    assert len(done.new) == 2 and done.known == () and done.submitter == "A Lab"
    for table in ("runs", "certificates", "audits", "timings"):
        assert here(tmp_path).read(table).equals(there.read(table))
    labels = here(tmp_path).read("submissions").to_pylist()
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    assert [(x["submitter"], x["bundle_digest"], x["rechecked"]) for x in labels] == [
        ("A Lab", digest, 0)
    ] * 2
    assert check_store(here(tmp_path), identities=True) == []
    (board,) = boards(here(tmp_path))
    assert [row.submitter for row in board.rows] == ["A Lab"]


def test_equal_rows_make_equal_bundles(packed: Path, tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "there" / "results")
    runs = [row["run_id"] for row in store.read("runs").to_pylist()]
    export_runs(store, runs[::-1], tmp_path / "again.parquet", "A Lab")
    assert (tmp_path / "again.parquet").read_bytes() == packed.read_bytes()


def test_taking_in_twice_changes_nothing_and_own_rows_stay_own(packed: Path, tmp_path: Path) -> None:
    take_in(packed, tmp_path)
    before = {path: path.read_bytes() for path in here(tmp_path).folder.rglob("*.parquet")}
    assert take_in(packed, tmp_path, 1).new == {}
    assert before == {path: path.read_bytes() for path in here(tmp_path).folder.rglob("*.parquet")}
    own = ResultStore(tmp_path / "there" / "results")
    assert join(unpack(packed, tmp_path / "u2"), own, obstacles).new == {} and own.paths("submissions") == []


def test_what_others_submitted_is_not_handed_on(packed: Path, tmp_path: Path) -> None:
    done = take_in(packed, tmp_path)
    with pytest.raises(UsageError, match="submitted by 'A Lab'"):
        export_runs(here(tmp_path), list(done.new), tmp_path / "x.parquet", "me")
    with pytest.raises(UsageError, match="no run"):
        export_runs(here(tmp_path), ["f" * 16], tmp_path / "x.parquet", "me")
    with pytest.raises(UsageError, match="printable"):
        export_runs(here(tmp_path), [], tmp_path / "x.parquet", "two\nlines")


# Hostile bundles -------------------------------------------------------------------------------------------------------


def doubled(rows: Lines) -> Lines:
    return [rows[0], *rows]


def with_recipe(**changes: Any) -> Callable[[Lines], Lines]:
    """Rewrite the recorded recipe of the first run."""

    def changed(rows: Lines) -> Lines:
        recipe = json.loads(rows[0]["recipe"]) | changes
        text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
        return first_row(recipe=text)(rows)

    return changed


def certified_by(certifier: str) -> Callable[[Lines], dict[str, Any]]:
    """The first file of certificates once more, by another certifier."""
    again = with_rows("certificates", lambda rows: [row | {"certifier": certifier} for row in rows])
    return lambda lines: next(line for line in again(lines) if line["table"] == "certificates")


HOSTILE: list[tuple[Callable[[Lines], Lines], str]] = [
    (with_rows("certificates", first_row(radius=-0.1)), "radius is negative"),
    (with_rows("certificates", first_row(radius=math.nan)), "radius is not finite"),
    (with_rows("certificates", first_row(verdict="proved")), "verdict is none of"),
    (with_rows("certificates", doubled), "two rows of one"),
    (with_rows("certificates", lambda rows: rows[::-1]), "its rows in another order"),
    (with_rows("certificates", first_row(run_id="../../../../tmp/x")), "not a hexadecimal digest"),
    (with_rows("certificates", first_row(radius=0.11)), "above the cap"),
    (with_rows("certificates", first_row(k=5, n=3)), "k exceeds n"),
    (with_rows("certificates", first_row(proved_by="x" * 1000)), "a text of 1000 bytes in 'proved_by'"),
    (with_rows("certificates", lambda rows: []), "holds no row"),
    (with_rows("runs", first_row(epochs=71)), "its recipe says 70"),
    (with_rows("runs", first_row(dataset_digest="0" * 64)), "its id is not that of its recipe"),
    (with_rows("runs", first_row(numerics=7)), "its id is not that of its recipe"),
    (with_rows("runs", first_row(recipe='{"seed": 0}')), "not a canonical JSON object"),
    (with_rows("runs", first_row(recipe="[" * 60_000)), "recipe is not JSON"),
    (with_rows("runs", first_row(recipe='{"a":' * 25 + "0" + "}" * 25)), "recipe is nested too deeply"),
    (with_rows("runs", first_row(recipe="{}")), "key 'dataset' is missing"),
    (with_rows("runs", with_recipe(certifier="ibp")), "unknown key 'certifier'"),
    (with_rows("runs", with_recipe(threat={"norm": "linf", "radius": "0.1"})), "recipe says '0.1'"),
    (with_rows("runs", with_recipe(seed="0")), "recipe says '0'"),
    (with_rows("runs", with_recipe(certify={})), "is not the whole recipe"),
    (with_rows("runs", with_recipe(name="another")), "is not the whole recipe 'fast-ibp/mnist'"),
    (with_rows("runs", first_row(protocol="linf-1 ")), "is of protocol 'linf-1 '"),
    (with_rows("runs", first_row(method="x" * 400)), "a text of 400 bytes"),
    (lambda lines: [line for line in lines if line["table"] != "runs"], "files, but it holds"),
    (lambda lines: lines[1:], "has no manifest"),
    (lambda lines: [*lines, {"table": "pickles", "rows": 1, "content": b"x"}], "holds a table 'pickles'"),
    (lambda lines: [*lines, lines[-1]], "files, but it holds"),
    (manifest(format=9), "its format is not 1"),
    (manifest(submitter="\x1b[31m"), "printable"),
    (manifest(submitter="x" * 101), "printable"),
    (manifest(runs=["f" * 16]), "names other runs"),
    (manifest(runs=["f" * 16, 3]), "names a run by no run id"),
    (lambda lines: [line | {"rows": 7} for line in lines], "has 4 rows where the bundle says 7"),
    (lambda lines: manifest(files=2)([x for x in lines if x["table"] != "certificates"]), "no certificates"),
    (lambda lines: manifest(files=5)([*lines, certified_by("IBP")(lines)]), "is the second file named"),
    (
        lambda lines: manifest(files=6)([*lines, certified_by("a b")(lines), certified_by("a-b")(lines)]),
        "two files of one name",
    ),
    (manifest(files="many"), "its manifest lacks"),
]


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_a_hostile_bundle_is_refused_with_its_reason(
    packed: Path, tmp_path: Path, change: Callable[[Lines], Lines], reason: str
) -> None:
    with pytest.raises(Refused) as caught:
        take_in(rewritten(packed, change), tmp_path)
    assert any(reason in line for line in caught.value.reasons), caught.value.reasons
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    assert not here(tmp_path).folder.exists()


def test_every_reason_is_listed(packed: Path, tmp_path: Path) -> None:
    both = with_rows("certificates", first_row(radius=-0.1, passes=-3))
    with pytest.raises(Refused) as caught:
        take_in(rewritten(packed, lambda lines: with_rows("runs", first_row(seed=-1))(both(lines))), tmp_path)
    words = " ".join(caught.value.reasons)
    for reason in ("radius is negative", "passes is negative", "seed = -1"):
        assert reason in words


def test_any_changed_byte_is_refused(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 60)):
        broken = bytearray(content)
        broken[place] ^= 1
        packed.write_bytes(broken)
        with pytest.raises(Refused):
            unpack(packed, tmp_path / f"u{place}")
    for length in (0, 10, len(content) // 2, len(content) - 1):
        packed.write_bytes(content[:length])
        with pytest.raises(Refused):
            unpack(packed, tmp_path / f"v{length}")


def test_sizes_are_bounded_before_anything_unfolds(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_BUNDLE_BYTES", 100)
    with pytest.raises(Refused, match="is larger than"):
        unpack(packed, tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setitem(bundle.MAX_ROWS, "certificates", 3)
    with pytest.raises(Refused, match="unfolds to 4 rows"):
        unpack(packed, tmp_path / "b")
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "MAX_FILES", 3)
    with pytest.raises(Refused, match="more than the 3 of a bundle file"):
        unpack(packed, tmp_path / "c")
    with pytest.raises(UsageError, match="cannot read"):
        unpack(tmp_path / "nothing", tmp_path / "d")


def test_a_few_bytes_that_ask_for_gigabytes_are_not_unfolded(packed: Path, tmp_path: Path) -> None:
    """A text of a megabyte, named by every one of 100,000 rows, compresses to almost nothing."""
    bomb = with_rows(
        "certificates",
        lambda rows: [rows[0] | {"index": i, "proved_by": "x" * 100_000} for i in range(20_000)],
    )
    with pytest.raises(Refused, match="a text of 100000 bytes"):
        unpack(rewritten(packed, bomb), tmp_path / "a")


# Joining others' rows --------------------------------------------------------------------------------------------------


def test_other_rows_under_a_known_id_are_refused(packed: Path, tmp_path: Path) -> None:
    identified(tmp_path / "here", seed=0, verdicts=[C, U, U, M])
    with pytest.raises(Refused, match="is recorded here already, and its certificates differ"):
        take_in(packed, tmp_path)
    assert len(here(tmp_path).paths("runs")) == 1


def test_rows_that_would_spoil_the_boards_of_all_are_refused(packed: Path, tmp_path: Path) -> None:
    add(tmp_path / "here", "e", [C, C], seed=5, dataset_digest="another mnist")
    with pytest.raises(Refused, match="another version of mnist"):
        take_in(packed, tmp_path)


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    run = identified(tmp_path / "there", protocol="linf-999")
    with pytest.raises(Refused, match="of protocol 'linf-999'"):
        take_in(export(tmp_path, run), tmp_path)


def test_other_images_under_the_same_digest_are_refused(packed: Path, tmp_path: Path) -> None:
    identified(tmp_path / "here", seed=7)
    store = here(tmp_path)
    (path,) = store.paths("certificates")
    table = store.load("certificates", path)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    path.unlink()
    columns["image_digest"][1] = "another"
    store.write_certificates(columns["run_id"][0], "ibp", SETTINGS, columns)
    with pytest.raises(Refused, match="image 1 is another image"):
        take_in(packed, tmp_path)


def test_a_label_is_not_taken_over(packed: Path, tmp_path: Path) -> None:
    done = take_in(packed, tmp_path)
    row = {"run_id": next(iter(done.new)), "submitter": "Mallory", "bundle_digest": "ab" * 32, "rechecked": 0}
    with pytest.raises(DataError, match="submitted by 'A Lab' already"):
        here(tmp_path).write_submission(row)
    here(tmp_path).write_submission(row | {"submitter": "A Lab", "rechecked": 50})
    here(tmp_path).write_submission(row | {"submitter": "A Lab", "rechecked": 10})
    assert [r["rechecked"] for r in here(tmp_path).read("submissions").to_pylist()].count(50) == 1


# Command line ----------------------------------------------------------------------------------------------------------


def invoke(*words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_commands_do_the_round_trip(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "there"
    listed = json.loads(invoke("list", "--out", out, "--json").output)
    assert [run["seed"] for run in listed] == [0, 1] and listed[0]["certified_by"] == ["ibp"]
    assert "fast-ibp/mnist" in invoke("list", "--out", out).output
    shown = json.loads(invoke("show", listed[0]["run_id"][:6], "--out", out, "--json").output)
    assert shown["certificates"][0]["certified_accuracy"] == 50.0 and shown["recipe"]["seed"] == 0
    plain = invoke("show", listed[0]["run_id"][:6], "--out", out).output
    assert "certified 2, unknown 1, misclassified 1" in plain and "[threat]" in plain
    assert "every row keeps every rule" in invoke("verify", "--out", out).output
    exported = invoke("export", tmp_path / "b.parquet", "--submitter", "A Lab", "--out", out)
    assert "2 runs in 4 files" in exported.output
    done = invoke("import", tmp_path / "b.parquet", "--out", tmp_path / "here")
    assert done.exit_code == 0 and "2 runs by A Lab imported" in done.output
    assert "A Lab (0 re-checked)" in invoke("list", "--out", tmp_path / "here").output


def test_a_refusal_lists_its_reasons_and_exits_1(packed: Path, tmp_path: Path) -> None:
    rewritten(packed, with_rows("certificates", first_row(radius=-1.0, passes=-1)))
    done = invoke("import", packed, "--out", tmp_path / "here")
    assert isinstance(done.exception, FoundError) and done.exception.exit_code == 1
    assert done.stderr.count("refused: ") == 3 and not (tmp_path / "here").exists()


def test_verify_finds_a_changed_byte_and_a_foreign_id(tmp_path: Path) -> None:
    run = identified(tmp_path)
    store = ResultStore(tmp_path / "results")
    add(tmp_path, "e", [C, C], seed=3)
    done = invoke("verify", "--out", tmp_path)
    assert isinstance(done.exception, FoundError)
    assert "run eeeeeeeeeeeeeeee: its id is not that of its recipe" in done.stderr
    (path,) = [path for path in store.paths("certificates") if path.name.startswith(run)]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "was damaged or changed" in invoke("verify", "--out", tmp_path).stderr


def test_wrong_words_are_one_line(packed: Path, tmp_path: Path) -> None:
    for words, message in (
        (("list", "--out", tmp_path / "x"), "holds no folder results"),
        (("show", "ffff", "--out", tmp_path / "there"), "no run"),
        (("import", packed, "--recheck", 3, "--out", tmp_path), "belong together"),
    ):
        done = invoke(*words)
        assert isinstance(done.exception, UsageError) and message in str(done.exception)


def test_sql_reads_all_tables_old_files_included(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    out = tmp_path / "there"
    statement = (
        "select r.seed, count(*) n from certificates c join runs r using (run_id) group by 1 order by 1"
    )
    assert invoke("sql", statement, "--csv", "--out", out).output == "seed,n\n0,4\n1,4\n"
    assert "0" in invoke("sql", "select count(*) from audits", "--out", out).output
    done = invoke("sql", "select nonsense from runs", "--out", out)
    assert isinstance(done.exception, UsageError) and "DuckDB" in str(done.exception)
    committed = Path(__file__).parent.parent / "leaderboards"
    rows = invoke(
        "sql", "select outcome, attack_summary from audits limit 1", "--csv", "--out", committed
    ).output
    assert rows.startswith("outcome,attack_summary\n")


@pytest.mark.parametrize("name", ["list", "show", "export", "import", "verify", "sql"])
def test_every_help_has_an_example(name: str) -> None:
    shown = invoke(name, "--help")
    assert shown.exit_code == 0 and f"certbench results {name}" in shown.output


def test_the_documented_pandas_snippet_gives_what_the_board_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "docs/results.md").read_text(), re.DOTALL)
    *statements, last = snippet.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(statements), names)
    radii = eval(last, names)
    for board in boards(ResultStore(root / "leaderboards" / "results")):
        for row in board.rows:
            if row.acr is not None:
                assert radii[row.recipe, row.certifier] == pytest.approx(row.acr.mean, rel=1e-9)
