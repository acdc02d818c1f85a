"""The store: what is written is read back, equal rows are equal bytes, and nothing broken gets in or out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from certbench.errors import DataError, RunError, UsageError
from certbench.results import files, provenance
from certbench.results.checks import check_store, round_down
from certbench.results.rules import check_table
from certbench.results.schema import CERTIFICATES, RUNS, TABLES
from certbench.results.store import ResultStore, certify_stage
from certbench.threat import round_up

RUN = "0123456789abcdef"
SETTINGS = "feedc0de" * 8
RADIUS = Fraction(8, 255)


def run_row(**changes: Any) -> dict[str, Any]:
    recipe = {
        "name": "fast-ibp/digits-linf-8-255",
        "seed": 0,
        "dataset": "digits",
        "model": "cnn3",
        "method": {"name": "fast-ibp"},
        "threat": {"norm": "linf", "radius": "8/255"},
    }
    row = {
        "run_id": RUN,
        "protocol": "linf-1",
        "method": "fast-ibp",
        "plugin": "certbench-fast-ibp",
        "plugin_version": "0.1.0",
        "numerics": 1,
        "dataset": "digits",
        "dataset_digest": "d" * 64,
        "model": "cnn3",
        "parameters": 1234,
        "norm": "linf",
        "radius": RADIUS,
        "cap": RADIUS,
        "seed": 0,
        "recipe_name": recipe["name"],
        "recipe": json.dumps(recipe, sort_keys=True, separators=(",", ":")),
        "checkpoint_digest": "c" * 64,
        "epochs": 3,
        "torch_version": "2.11.0",
        "python_version": "3.11.9",
        "certbench_version": "0.1.0",
    }
    return row | changes


def columns(**changes: Any) -> dict[str, Any]:
    """Five images: certified, unknown, misclassified, falsified, and one that ran out of time."""
    below = round_down(RADIUS)
    good: dict[str, Any] = {
        "index": np.array([0, 1, 2, 3, 4]),
        "image_digest": [f"{i:064x}" for i in range(5)],
        "label": np.array([7, 7, 1, 2, 3]),
        "prediction": np.array([7, 7, 4, 2, -1]),
        "verdict": np.array(["certified", "unknown", "misclassified", "falsified", "timeout"]),
        "radius": np.array([below, 0.01, 0.0, 0.02, math.nan]),
        "margin": np.array([0.5, -0.25, math.nan, -1.0, math.nan]),
        "guarantee": "real_arith",
        "deploy": "float32",
        "proved_by": np.array(["ibp", "", "", "", ""]),
        "passes": np.array([3, 3, 1, 3, 0], dtype=np.int64),
    }
    return good | changes


def timing(**changes: Any) -> dict[str, Any]:
    row = {
        "run_id": RUN,
        "stage": "train",
        "seconds": 1.5,
        "device": "cpu",
        "started_at": "2026-01-01T00:00:00+00:00",
    }
    return row | changes


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    store = ResultStore(tmp_path / "results")
    store.write_run(run_row())
    return store


def put(store: ResultStore, **changes: Any) -> Path:
    return store.write_certificates(RUN, "ibp", SETTINGS, columns(**changes))


def at(place: int, value: Any, name: str) -> dict[str, Any]:
    """One column with one entry changed."""
    values = list(columns()[name])
    values[place] = value
    return {name: values}


# Reading back ------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_went_in(store: ResultStore) -> None:
    put(store)
    store.write_timing(timing(peak_memory_bytes=7))
    run = store.run(RUN)
    assert run == run_row(
        radius="8/255", cap="8/255", sigma=None, code_revision=None, structure=None, teacher_digest=None
    )
    rows = store.read("certificates").to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["radius"] == round_down(RADIUS) and rows[0]["margin"] == 0.5
    assert rows[4]["radius"] is None and rows[4]["margin"] is None and rows[4]["prediction"] is None
    assert rows[2]["prediction"] == 4 and {row["certifier"] for row in rows} == {"ibp"}
    assert rows[0]["alpha"] is None
    assert store.read("timings").to_pylist() == [{**timing(peak_memory_bytes=7), "shard": 0}]
    assert store.certificates(RUN, "ibp", SETTINGS).equals(store.read("certificates"))
    assert check_store(store) == []


def test_an_empty_store_has_empty_tables_with_their_columns(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "nowhere")
    for name, spec in TABLES.items():
        assert store.read(name).schema.equals(spec.schema) and store.read(name).num_rows == 0
    assert not store.has_run(RUN) and not store.has_certificates(RUN, "ibp", SETTINGS)
    assert store.certificates(RUN, "ibp", SETTINGS).num_rows == 0
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UsageError, match="did you mean 'timings'"):
        store.read("timing")


def test_files_have_the_documented_names(store: ResultStore) -> None:
    put(store)
    store.write_certificates(RUN, "crown>ibp", "abcdef0123", columns())
    store.write_timing(timing(stage=certify_stage("crown>ibp", "abcdef0123")))
    found = sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())
    assert found == [
        f"certificates/{RUN}-crown-ibp-abcdef01.parquet",
        f"certificates/{RUN}-ibp-feedc0de.parquet",
        f"runs/{RUN}.parquet",
        f"timings/{RUN}-certify-crown-ibp-abcdef01.parquet",
    ]
    assert store.has_certificates(RUN, "crown>ibp", "abcdef0123")
    assert store.has_timing(RUN, certify_stage("crown>ibp", "abcdef0123")) and not store.has_timing(
        RUN, "train"
    )
    assert store.read("certificates").num_rows == 10


def test_certifiers_whose_names_share_a_file_are_refused(store: ResultStore) -> None:
    store.write_certificates(RUN, "crown>ibp", SETTINGS, columns())
    before = store.read("certificates")
    with pytest.raises(DataError, match="several"):
        store.write_certificates(RUN, "crown ibp", SETTINGS, columns(index=np.arange(5, 10)))
    assert store.read("certificates").equals(before)


# Bytes -------------------------------------------------------------------------------------------------------------


def test_equal_rows_are_equal_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    contents = []
    for number, order in enumerate([[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]]):
        store = ResultStore(tmp_path / str(number))
        store.write_run(dict(sorted(run_row().items(), reverse=bool(number))))
        mixed = {
            name: [list(value)[i] for i in order] if not isinstance(value, str) else value
            for name, value in columns().items()
        }
        put(store, **mixed)
        contents.append({path.name: path.read_bytes() for path in store.folder.rglob("*.parquet")})
    assert contents[0] == contents[1] and len(contents[0]) == 2


def test_rows_written_in_parts_equal_rows_written_at_once(store: ResultStore, tmp_path: Path) -> None:
    whole = put(store).read_bytes()
    other = ResultStore(tmp_path / "other")
    other.write_run(run_row())
    for part in (slice(3, 5), slice(0, 3)):
        path = put(other, **{k: v[part] for k, v in columns().items() if not isinstance(v, str)})
    assert path.read_bytes() == whole


def test_every_single_changed_byte_is_caught(store: ResultStore) -> None:
    path = put(store)
    content = path.read_bytes()
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 1
        with pytest.raises(DataError):
            files.decode(bytes(broken), CERTIFICATES, str(path))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for read in (lambda: store.read("certificates"), lambda: store.certificates(RUN, "ibp", SETTINGS)):
        with pytest.raises(DataError, match=path.name):
            read()
    assert len(check_store(store)) == 1


@pytest.mark.parametrize("length", [0, 3, 100, -1, -8])
def test_a_truncated_file_is_named(store: ResultStore, length: int) -> None:
    path = put(store)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError) as caught:
        store.read("certificates")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def resealed(spec: Any, table: pa.Table, **changes: Any) -> bytes:
    """A file whose digest is right and whose content need not be."""
    import dataclasses

    return files.encode(table, dataclasses.replace(spec, schema=table.schema, **changes))


def test_another_version_or_table_or_column_is_refused(store: ResultStore) -> None:
    path = put(store)
    good = store.read("certificates")
    path.write_bytes(resealed(CERTIFICATES, good, version=2))
    with pytest.raises(DataError, match="version '2'.*reads version 1"):
        store.read("certificates")
    path.write_bytes(resealed(CERTIFICATES, good, name="runs"))
    with pytest.raises(DataError, match="holds the table 'runs'"):
        store.read("certificates")
    path.write_bytes(resealed(CERTIFICATES, good.drop_columns(["alpha"])))
    with pytest.raises(DataError, match="lacks alpha"):
        store.read("certificates")
    at = good.schema.get_field_index("passes")
    path.write_bytes(
        resealed(CERTIFICATES, good.set_column(at, "passes", good.column("passes").cast("int64")))
    )
    with pytest.raises(DataError, match="'passes' of a wrong type"):
        store.read("certificates")
    pq.write_table(good, path)
    with pytest.raises(DataError, match="not written by certbench"):
        store.read("certificates")


def test_values_that_rarely_repeat_are_written_as_they_are(store: ResultStore) -> None:
    path = put(store)
    rows = store.read("certificates")
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    without = {chunk.path_in_schema for chunk in chunks if not chunk.has_dictionary_page}
    assert without == {*CERTIFICATES.plain, "exact_noise"}  # Parquet knows no dictionary of booleans
    path.write_bytes(resealed(CERTIFICATES, rows, plain=()))  # as files were written before
    assert store.read("certificates").equals(rows)


def test_a_file_under_another_name_is_refused(store: ResultStore) -> None:
    path = put(store)
    copy = path.with_name(f"{RUN}-ibp-00000000.parquet")
    copy.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="is not the name of the rows inside"):
        store.read("certificates")


def test_a_reader_ignores_a_file_that_is_being_written(store: ResultStore) -> None:
    path = put(store)
    path.with_name(f".{path.name}.1234.tmp").write_bytes(b"half")
    assert store.read("certificates").num_rows == 5


def test_a_failed_write_leaves_the_old_file_and_no_other(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.folder / "runs" / f"{RUN}.parquet"
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=f"{RUN}.parquet: No space left"):
        store.write_run(run_row(epochs=4))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write .*file"):
        ResultStore(tmp_path / "file").write_run(run_row())


# Rules -------------------------------------------------------------------------------------------------------------

BAD_CERTIFICATES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown verdict": (at(1, "refuted", "verdict"), "verdict is none of"),
    "unknown guarantee": ({"guarantee": "promised"}, "guarantee is none of"),
    "negative radius": (at(1, -0.01, "radius"), "radius is negative"),
    "infinite radius": (at(1, math.inf, "radius"), "radius is not finite"),
    "NaN radius of a decided image": (at(1, math.nan, "radius"), "radius is null"),
    "NaN radius of a certified image": (at(0, math.nan, "radius"), "null|positive radius"),
    "certified at radius 0": (at(0, 0.0, "radius"), "without a positive radius"),
    "certified wrong prediction": (at(0, 6, "prediction"), "not the label"),
    "certified tie": (at(0, 0.0, "margin"), "without a positive margin"),
    "certified without a margin": (at(0, math.nan, "margin"), "without a positive margin"),
    "misclassified right prediction": (at(2, 1, "prediction"), "though the prediction is the label"),
    "misclassified with a radius": (at(2, 0.01, "radius"), "yet has a radius"),
    "wrong prediction called unknown": (at(1, 3, "prediction"), "not misclassified"),
    "no prediction called unknown": (at(1, -1, "prediction"), "without a prediction"),
    "negative index": (at(0, -1, "index"), "index is negative"),
    "negative label": (at(4, -3, "label"), "label is negative"),
    "two rows of one image": (at(1, 0, "index"), "holds two rows of one"),
    "k above n": ({"k": 11, "n": 10}, "k exceeds n"),
    "alpha of one": ({"alpha": 1.0}, "alpha is not between"),
    "alpha NaN": ({"alpha": math.nan}, "alpha is not between"),
    "negative draws": ({"draws": -1}, "a count is negative"),
    "unknown column": ({"raduis": 0.0}, "did you mean 'radius'"),
    "missing digests": ({"image_digest": None}, "'image_digest' holds a null"),
    "index too large": (at(0, 2**40, "index"), "column 'index'"),
    "different lengths": ({"label": np.array([1])}, "different lengths"),
    "fraction for a count": (at(0, 2.5, "passes"), "column 'passes'"),
    "number for a text": ({"proved_by": 3}, "holds int64, not string"),
    "text for a number": ({"passes": "many"}, "column 'passes'"),
}


@pytest.mark.parametrize("case", BAD_CERTIFICATES)
def test_a_wrong_certificate_is_refused_and_nothing_is_written(store: ResultStore, case: str) -> None:
    changes, message = BAD_CERTIFICATES[case]
    with pytest.raises(DataError, match=message):
        put(store, **changes)
    assert store.paths("certificates") == []


def tampered(name: str, place: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[place][name] = value
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tampered("verdict", 1, "proved"), "verdict is none of"),
        (tampered("radius", 1, math.nan), "radius is not finite"),
        (tampered("radius", 1, -1e-9), "radius is negative"),
        (tampered("margin", 1, math.nan), "margin is not a number"),
        (tampered("index", 1, 0), "two rows of one"),
        (tampered("run_id", 1, "f" * 16), "several"),
        (tampered("run_id", 1, "../../../etc"), "not a hexadecimal digest"),
        (lambda table: table.slice(0, 0), "holds no row"),
    ],
)
def test_reading_checks_as_writing_does(
    store: ResultStore, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    path = put(store)
    path.write_bytes(files.encode(change(store.read("certificates")), CERTIFICATES))
    with pytest.raises(DataError, match=message) as caught:
        store.read("certificates")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": "../../evil"}, "sixteen hexadecimal digits"),
        ({"radius": "0.1"}, "not a reduced fraction"),
        ({"radius": "2/20"}, "not a reduced fraction"),
        ({"radius": "1/0"}, "not a reduced fraction"),
        ({"radius": "9" * 5000}, "not a reduced fraction"),
        ({"radius": Fraction(0)}, "above 0"),
        ({"cap": Fraction(1, 255)}, "below radius"),
        ({"radius": None, "cap": None}, "neither radius nor sigma"),
        ({"sigma": math.nan}, "sigma"),
        ({"recipe": "{"}, "not JSON"),
        ({"recipe": "[" * 100_000}, "not JSON"),
        ({"recipe": '{"b":1, "a":2}'}, "canonical"),
        ({"seed": 1}, "seed is 1, but its recipe says 0"),
        ({"teacher_digest": "<b>"}, "teacher_digest is not 64 hexadecimal digits"),
        (
            {"radius": Fraction(1, 10), "cap": Fraction(1, 10)},
            "radius is '1/10', but its recipe says '8/255'",
        ),
        ({"parameters": -1}, "parameters = -1"),
        ({"method": None}, "'method' holds a null"),
        ({"epochs": 2.5}, "column 'epochs'"),
        ({"gpu": "yes"}, "no column 'gpu'"),
    ],
)
def test_a_wrong_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    store = ResultStore(tmp_path)
    with pytest.raises(DataError, match=message):
        store.write_run(run_row(**changes))
    assert list(tmp_path.rglob("*.parquet")) == []


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    row = run_row()
    del row["checkpoint_digest"]
    with pytest.raises(DataError, match="lack the column 'checkpoint_digest'"):
        ResultStore(tmp_path).write_run(row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": -1.0}, "not a duration"),
        ({"seconds": math.nan}, "not a duration"),
        ({"stage": "certify"}, "a stage is train"),
        ({"stage": "../x"}, "a stage is train"),
        ({"started_at": "yesterday"}, "not an ISO 8601"),
        ({"started_at": "2026-01-01T00:00:00"}, "not an ISO 8601"),
        ({"started_at": "2026-01-01T00:00:00+02:00"}, "not an ISO 8601"),
        ({"shard": -1}, "shard is negative"),
        ({"peak_memory_bytes": -1}, "peak_memory_bytes is negative"),
        ({"device": ""}, "device is empty"),
    ],
)
def test_a_wrong_timing_is_refused(store: ResultStore, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        store.write_timing(timing(**changes))


def test_statistical_certificates_follow_their_own_rules(store: ResultStore) -> None:
    smoothed = columns(
        guarantee="statistical",
        verdict=["certified", "abstain", "misclassified", "unknown", "not_run"],
        prediction=[7, -1, 4, 2, -1],
        radius=[round_down(RADIUS), 0.0, 0.0, 0.01, math.nan],
        margin=[math.nan] * 5,
        sigma=0.5,
        alpha=0.001,
        n0=100,
        n=1000,
        k=[990, 600, 900, 800, 0],
        exact_noise=True,
    )
    smooth = "5" * 16
    recipe = '{"seed":0,"threat":{"norm":"l2","sigma":0.5}}'
    of_l2 = {"norm": "l2", "sigma": 0.5, "radius": None, "cap": None, "recipe": recipe}
    store.write_run(run_row(run_id=smooth, protocol="l2-another-1", **of_l2))
    store.write_certificates(smooth, "smooth", SETTINGS, smoothed)
    rows = store.read("certificates").to_pylist()
    assert rows[0]["sigma"] == 0.5 and rows[0]["exact_noise"] is True and rows[1]["prediction"] is None
    with pytest.raises(DataError, match="yet has a radius"):
        changed = smoothed | {"radius": [round_down(RADIUS), 0.1, 0.0, 0.01, math.nan]}
        store.write_certificates(smooth, "smooth", "0" * 64, changed)


# Rewriting ---------------------------------------------------------------------------------------------------------


def test_a_decided_image_never_changes_but_a_failure_may(store: ResultStore) -> None:
    put(store)
    solved = {
        "verdict": at(4, "unknown", "verdict")["verdict"],
        "radius": at(4, 0.01, "radius")["radius"],
        "prediction": at(4, 3, "prediction")["prediction"],
    }
    put(store, **solved)
    assert store.read("certificates").to_pylist()[4]["verdict"] == "unknown"
    with pytest.raises(DataError, match="never rewritten"):
        put(store)
    with pytest.raises(DataError, match="never rewritten"):
        put(store, **solved, **at(0, 0.75, "margin"))
    assert store.read("certificates").to_pylist()[0]["margin"] == 0.5


def test_certificates_need_their_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="write_run comes before"):
        put(ResultStore(tmp_path))


def test_a_run_may_be_corrected_but_not_given_another_network(store: ResultStore) -> None:
    store.write_run(run_row(checkpoint_digest="e" * 64))
    store.write_run(run_row())
    put(store)
    store.write_run(run_row(code_revision="abc"))
    assert store.run(RUN)["code_revision"] == "abc"
    with pytest.raises(DataError, match="has certificates of checkpoint cccc"):
        store.write_run(run_row(checkpoint_digest="e" * 64))
    assert store.run(RUN)["checkpoint_digest"] == "c" * 64


def test_timings_of_sessions_accumulate(store: ResultStore) -> None:
    store.write_timing(timing())
    store.write_timing(timing())  # the same session again
    store.write_timing(timing(seconds=2.0, started_at="2026-01-02T00:00:00+00:00"))
    store.write_timing(timing(shard=1))
    assert store.read("timings").column("seconds").to_pylist() == [1.5, 2.0, 1.5]
    with pytest.raises(DataError, match="two rows of one"):
        store.write_timing(timing(seconds=9.0))


def test_new_rows_may_come_as_a_table(store: ResultStore, tmp_path: Path) -> None:
    put(store)
    other = ResultStore(tmp_path / "other")
    other.write_run(run_row())
    path = other.write_certificates(RUN, "ibp", SETTINGS, store.read("certificates"))
    assert path.read_bytes() == store.paths("certificates")[0].read_bytes()
    with pytest.raises(DataError, match="no rows"):
        other.write_certificates(RUN, "ibp", SETTINGS, CERTIFICATES.schema.empty_table())


@contextmanager
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows as somebody else's tool might write them, past the check that :meth:`write_certificates` makes."""
    with monkeypatch.context() as patch:
        patch.setattr("certbench.results.store.CrossCheck.problems", lambda *_: [])
        yield


# Between tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "radius", "message"),
    [
        (0, math.nextafter(round_down(RADIUS), 0), "is certified, but with a radius below 8/255"),
        (0, math.nextafter(round_up(RADIUS), 1), "has a radius above the cap 8/255"),
        (3, round_up(RADIUS), "is falsified, but with a radius above 8/255"),
    ],
)
def test_a_radius_that_contradicts_the_verdict_is_found(
    store: ResultStore, place: int, radius: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=f"not recorded: .*{message}"):
        put(store, **at(place, radius, "radius"))
    with unchecked(monkeypatch):
        put(store, **at(place, radius, "radius"))
    assert check_store(store) == [f"run {RUN}, certifier ibp: image {place} {message}"]


def test_radii_at_the_rounded_ends_are_right(store: ResultStore) -> None:
    put(store, **at(0, round_up(RADIUS), "radius"))
    assert check_store(store) == []


@pytest.mark.parametrize(
    "exact", [Fraction(1, 10), Fraction(1, 3), Fraction(8, 255), Fraction(1, 255), Fraction(1, 2)]
)
def test_rounding_down_gives_the_nearest_float_below(exact: Fraction) -> None:
    below = round_down(exact)
    assert Fraction(below) <= exact < Fraction(math.nextafter(below, 1))


def test_certificates_without_a_run_are_found(store: ResultStore) -> None:
    put(store)
    (store.folder / "runs" / f"{RUN}.parquet").unlink()
    assert check_store(store) == [f"run {RUN}: has certificates but no row in runs"]


def test_runs_on_the_same_data_see_the_same_images(store: ResultStore) -> None:
    put(store)
    other = "f" * 16
    store.write_run(run_row(run_id=other))
    more = columns(index=np.array([3, 4, 5, 6, 7]))
    digests = [f"{i:064x}" for i in range(3, 8)]
    store.write_certificates(
        other,
        "ibp",
        SETTINGS,
        more | {"image_digest": digests, "label": [2, 3, 1, 2, 3], "prediction": [2, 3, 4, 2, -1]},
    )
    assert check_store(store) == []
    third = "e" * 16
    store.write_run(run_row(run_id=third))
    store.write_certificates(third, "ibp", SETTINGS, columns(**at(1, "0" * 64, "image_digest")))
    problems = check_store(store)
    # whichever run comes first in the folder counts as the one that knows
    assert problems and all("image 1 is another image" in problem for problem in problems)


def test_one_certifier_gives_one_kind_of_guarantee(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unchecked(monkeypatch):
        put(store, guarantee=["real_arith", "float_sound", "real_arith", "real_arith", "real_arith"])
    assert check_store(store) == [f"run {RUN}, certifier ibp: mixes guarantee 'float_sound' and 'real_arith'"]


def test_check_store_lists_every_damaged_file(store: ResultStore) -> None:
    paths = [put(store), store.write_timing(timing()), store.folder / "runs" / f"{RUN}.parquet"]
    for path in paths:
        path.write_bytes(b"")
    problems = check_store(store)
    assert len(problems) == 3 and all(any(str(path) in problem for problem in problems) for path in paths)


def test_check_table_wants_the_schema_of_the_table() -> None:
    with pytest.raises(DataError, match="here: has wrong columns"):
        check_table(pa.table({"run_id": ["a"]}), "runs", "here")
    check_table(RUNS.schema.empty_table(), "runs", "here")


# Provenance --------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    source = tmp_path / "harness" / "package.py"
    source.parent.mkdir()
    source.write_text("1\n")
    (tmp_path / "notes.txt").write_text("1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    yield source


def test_the_revision_says_whether_the_code_was_changed(checkout: Path) -> None:
    clean = provenance.code_revision(checkout)
    assert clean is not None and len(clean) == 40
    checkout.parent.parent.joinpath("notes.txt").write_text("2\n")
    assert provenance.code_revision(checkout) == clean
    checkout.with_name("new.py").write_text("")
    assert provenance.code_revision(checkout) == f"{clean}-dirty"
    assert (
        provenance.code_revision(checkout.with_name("new.py")) is None
    )  # not tracked: somebody else's checkout


def test_no_git_means_no_revision(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert provenance.code_revision(tmp_path.parent / "elsewhere.py") is None
    monkeypatch.setenv("PATH", "")
    assert provenance.code_revision(checkout) is None


def test_versions_and_digests(tmp_path: Path) -> None:
    assert set(provenance.versions()) == {"torch_version", "python_version", "certbench_version"}
    assert "unknown" not in provenance.versions().values()
    (tmp_path / "file").write_bytes(b"abc")
    assert provenance.digest_file(tmp_path / "file").startswith("ba7816bf")
    with pytest.raises(DataError, match="missing"):
        provenance.digest_file(tmp_path / "missing")


def test_now_is_what_timings_take(store: ResultStore) -> None:
    moment = provenance.now()
    store.write_timing(timing(started_at=moment))
    assert store.read("timings").column("started_at").to_pylist() == [moment]


def test_results_never_import_torch() -> None:
    code = (
        "import sys; import certbench.results.store, certbench.results.checks, certbench.results.provenance as p; "
        "p.versions(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
