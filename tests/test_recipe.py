"""Recipes: exact radii, explained errors, overrides, run ids."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbench.errors import LISTED, UsageError, nearest
from certbench.recipe import Recipe, load_recipe, parse_recipe, run_id, validate
from certbench.seeding import derive_seed
from certbench.threat import format_radius, parse_radius, round_down, round_up

TABLE = {
    "dataset": "digits",
    "model": "cnn-small",
    "threat": {"norm": "linf", "radius": "8/255"},
    "method": {"name": "fast-ibp"},
    "train": {"epochs": 5},
}


def recipe(**changes: object) -> Recipe:
    return parse_recipe({**TABLE, **changes}, "test")


def test_radius_is_an_exact_fraction() -> None:
    assert recipe().threat.radius == Fraction(8, 255)
    assert parse_recipe(TABLE, "t", ["threat.radius=0.1"]).threat.radius == Fraction(1, 10)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8/0", "divides by zero"),
        ("-1/255", "above 0"),
        ("0", "above 0"),
        ("256/255", "at most at 1"),
        ("nan", "is not a fraction"),
        ("inf", "is not a fraction"),
        ("eight", "is not a fraction"),
        ("1e-400000000", "is not a fraction"),
        (0.1, "in quotes"),
        (True, "in quotes"),
    ],
)
def test_bad_radius_is_one_line_that_names_key_and_value(text: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        recipe(threat={"norm": "linf", "radius": text})
    assert "threat.radius" in str(caught.value) and "\n" not in str(caught.value)


@given(st.fractions(min_value=Fraction(1, 10**6), max_value=1, max_denominator=10**15))
def test_rounding_brackets_the_fraction_by_neighbouring_floats(radius: Fraction) -> None:
    up, down = round_up(radius), round_down(radius)
    assert Fraction(down) <= radius <= Fraction(up)
    assert up in (down, math.nextafter(down, math.inf))
    assert parse_radius(format_radius(radius)) == radius


@pytest.mark.parametrize(
    ("radius", "shown"),
    [("8/255", "8/255"), ("0.1", "0.1"), ("2/255", "2/255"), ("1/5", "0.2"), ("1", "1"), ("1/7", "1/7")],
)
def test_radii_are_shown_as_people_write_them(radius: str, shown: str) -> None:
    assert format_radius(Fraction(radius)) == shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modle": "cnn7"}, ["unknown key 'modle'", "did you mean 'model'"]),
        ({"train": {"epochs": 5, "epoch": 3}}, ["unknown key 'train.epoch'", "did you mean 'epochs'"]),
        ({"epochs": 5}, ["unknown key 'epochs'", "did you mean 'train.epochs'?"]),
        ({"train": {"epochs": 5, "sigma": 1}}, ["'train.sigma'", "did you mean 'threat.sigma'?"]),
        ({"radii": ["1"]}, ["unknown key 'radii'", "did you mean 'certify.smoothing.radii'?"]),
        ({"train": {}}, ["'train.epochs' is missing"]),
        ({"train": {"epochs": 0}}, ["train.epochs = 0"]),
        ({"train": {"epochs": 3, "learning_rate": float("nan")}}, ["train.learning_rate"]),
        ({"certify": {"cap": "1/255"}}, ["lies below threat.radius"]),
        ({"threat": {"norm": "l0", "radius": "0.1"}}, ["threat.norm", '"l0"']),
        ({"seed": -1}, ["seed = -1"]),
        ({"certify": {"certifier": ""}}, ["certify.certifier", '""']),
    ],
)
def test_errors_name_key_value_and_nearest_known_key(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(**changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_toml_and_missing_file_are_explained(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("dataset = ")
    with pytest.raises(UsageError, match="broken.toml is not valid TOML"):
        load_recipe(broken)
    with pytest.raises(UsageError, match="cannot read recipe"):
        load_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "[" + "a." * 5000 + "a]", "a." * 5000 + "a = 1"])
def test_tables_nested_without_end_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="deep.toml is (nested too deeply|not valid TOML)") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="nested too deeply|key=value"):
        parse_recipe(TABLE, "t", ["method.x=" + "[" * 5000])


def test_overrides_reach_nested_keys_and_refuse_nonsense() -> None:
    changed = parse_recipe(TABLE, "t", ["train.epochs=3", "method.ramp=linear", "train.milestones=[1,2]"])
    assert changed.train.epochs == 3
    assert changed.method.settings == {"ramp": "linear"}
    assert changed.train.milestones == (1, 2)
    for bad in ("train.epochs", "=3", "train..epochs=3", "train.epochs.deeper=3"):
        with pytest.raises(UsageError):
            parse_recipe(TABLE, "t", [bad])


def test_run_id_changes_with_all_that_moves_a_number_and_with_nothing_else() -> None:
    base = run_id(recipe(), "data", 1)
    assert len(base) == 16
    same = recipe(reference={"source": "a paper", "clean_error": 1.0})
    assert run_id(same, "data", 1) == base
    assert run_id(parse_recipe(TABLE, "another name"), "data", 1) == base
    assert run_id(recipe(threat={"radius": "16/510"}), "data", 1) == base, "equal fractions are one radius"
    others = [
        run_id(recipe(seed=1), "data", 1),
        run_id(recipe(train={"epochs": 6}), "data", 1),
        run_id(recipe(certify={"cap": "9/255"}), "data", 1),
        run_id(recipe(), "other data", 1),
        run_id(recipe(), "data", 2),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_seeds_are_fixed_for_good_and_differ_by_purpose() -> None:
    assert derive_seed(0, "shuffle", 1) == derive_seed(0, "shuffle", 1)
    assert len({derive_seed(s, p, e) for s in (0, 1) for p in ("shuffle", "augment") for e in (1, 2)}) == 8
    assert derive_seed(0, "network") == 715385884120655211


def test_keys_added_later_leave_the_run_ids_of_earlier_rows_alone() -> None:
    early = parse_recipe(TABLE, "t")
    assert "optimizer" not in early.canonical()["train"]
    late = parse_recipe(TABLE, "t", ["train.weight_decay=1e-4"])
    assert late.canonical()["train"]["weight_decay"] == 1e-4
    assert run_id(late, "d", 1) != run_id(early, "d", 1)
    assert validate(late.canonical(), "t") == late


def test_milestones_beside_another_schedule_are_refused() -> None:
    with pytest.raises(UsageError, match="milestones say nothing"):
        parse_recipe(TABLE, "t", ["train.schedule=cosine", "train.milestones=[1]"])


L2 = {**TABLE, "threat": {"norm": "l2", "sigma": 0.5}}


def test_an_l2_recipe_has_a_noise_level_and_no_radius() -> None:
    found = parse_recipe(
        L2, "t", ['certify.smoothing.radii=["0", "0.25", "1.5"]', "certify.smoothing.n=5000"]
    )
    assert (found.sigma, found.smoothing.n, found.smoothing.radii[2]) == (0.5, 5000, Fraction(3, 2))
    assert validate(found.canonical(), "t") == found
    with pytest.raises(UsageError, match="no radius"):
        _ = found.radius
    with pytest.raises(UsageError, match="only norm l2"):
        _ = recipe().sigma


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("threat.sigma=0", "threat.sigma = 0"),
        ("threat.sigma=nan", "threat.sigma"),
        ("threat.radius=0.1", "radius says nothing"),
        ("threat.norm=linf", "needs radius"),
        ("certify.cap=1", "certify.cap says nothing"),
        ("certify.guarantee=real_arith", "certify.guarantee says nothing"),
        ("certify.smoothing.failure_probability=0.5", "failure_probability = 0.5"),
        ("certify.smoothing.failure_probability=0", "failure_probability = 0"),
        ("certify.smoothing.n=0", "smoothing.n = 0"),
        ("certify.smoothing.batch=150", "batch = 150"),
        ('certify.smoothing.radii=["1","0.5"]', "each larger"),
        ('certify.smoothing.radii=["-1"]', "not negative"),
        ("certify.smoothing.subset=every-0", "subset"),
        ("certify.smoothing.budget=3", "unknown key 'certify.smoothing.budget'"),
    ],
)
def test_bad_l2_settings_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_recipe(L2, "t", [override])


def test_smoothing_settings_beside_an_linf_radius_are_refused() -> None:
    with pytest.raises(UsageError, match="certify.smoothing says nothing"):
        recipe(certify={"smoothing": {"n": 5}})


@pytest.mark.parametrize(
    ("certifier", "subset", "protocol"),
    [
        (None, "all", "l2-sequential-1"),
        ("smoothing", "all", "l2-fixed-1"),
        ("smoothing", "every-20", "l2-fixed-1-every-20"),
        ("smoothing-sequential-label", "all", "l2-sequential-1-label"),
        ("of-a-plugin", "all", "l2-of-a-plugin-1"),
    ],
)
def test_each_kind_of_l2_certificate_has_a_protocol_of_its_own(
    certifier: str | None, subset: str, protocol: str
) -> None:
    certify = {"certifier": certifier, "smoothing": {"subset": subset}}
    assert parse_recipe({**L2, "certify": certify}, "t").protocol == protocol


def test_run_ids_of_committed_rows_stay_what_they_are() -> None:
    from certbench.results.store import ResultStore

    folder = Path(__file__).parents[1] / "leaderboards" / "results"
    for row in ResultStore(folder).read("runs").to_pylist():
        found = validate(json.loads(row["recipe"]), "row")
        assert run_id(found, row["dataset_digest"], row["numerics"]) == row["run_id"]
        assert found.canonical_json() == row["recipe"]


def test_what_is_known_is_listed_where_the_list_can_be_read() -> None:
    few = [f"model-{number}" for number in range(LISTED)]
    assert nearest("model-99", few).startswith("did you mean 'model-")
    assert nearest("x", few) == f"known: {', '.join(sorted(few))}"
    assert nearest("x", [*few, "one more"]) == f"none of the {LISTED + 1} that are known is like it"
    assert nearest("x", []) == "none is known"
