"""Suites: the core's by data set, those of plugins as data, sweeps through every combination."""

from __future__ import annotations

from pathlib import Path

import pytest

from certbench.errors import UsageError
from certbench.plugins import installed
from certbench.recipe import changed_name
from certbench.suites import Member, load_suite, suites


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.toml"
    path.write_text(text)
    return path


def test_a_sweep_goes_through_every_combination_in_order(tmp_path: Path) -> None:
    text = """
        summary = "all of them"
        [[runs]]
        recipe = "m/digits-linf-0.1"
        sweep = { "method.kappa" = [0, 0.5], "method.train_radius" = ["0.05", "8/255"] }
        [[runs]]
        recipe = "m/other"
        sweep = { "train.milestones" = [[3, 4]], "method.tightness" = [false] }
        [[runs]]
        recipe = "m/plain"
    """
    suite = load_suite(write(tmp_path, text), "m/all")
    assert (suite.name, suite.summary) == ("m/all", "all of them")
    assert [member.name for member in suite.members] == [
        "m/digits-linf-0.1 +method.kappa=0 +method.train_radius=0.05",
        "m/digits-linf-0.1 +method.kappa=0 +method.train_radius=8/255",
        "m/digits-linf-0.1 +method.kappa=0.5 +method.train_radius=0.05",
        "m/digits-linf-0.1 +method.kappa=0.5 +method.train_radius=8/255",
        "m/other +train.milestones=[3, 4] +method.tightness=false",
        "m/plain",
    ]
    assert suite.members[-1] == Member("m/plain")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("summary = ", "not valid TOML"),
        ('summary = "x"', "key 'runs' is missing"),
        ('summary = "x"\nruns = []', "runs"),
        ('summary = "x"\n[[runs]]\nrecipe = "r"\nsweeps = {}', "unknown key 'runs.0.sweeps'"),
        ('summary = "x"\n[[runs]]\nrecipe = "r"\nsweep = { k = [] }', "leaves nothing to run"),
        ('summary = "x"\n[[runs]]\nrecipe = "r"\nsweep = { k = 1 }', "runs.0.sweep.k = 1"),
    ],
)
def test_broken_suites_are_explained(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_suite(write(tmp_path, text), "m/x")
    assert "\n" not in str(caught.value) and "suite.toml" in str(caught.value)


def test_a_suite_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read suite .*absent.toml"):
        load_suite(tmp_path / "absent.toml", "m/absent")


def test_every_member_of_every_installed_suite_resolves() -> None:
    plugins = installed()
    seen = set()
    for suite in suites(plugins).values():
        for member in suite.members:
            if member not in seen:
                seen.add(member)
                assert plugins.find_recipe(member.recipe, member.overrides).name == member.name


def test_a_change_that_changes_nothing_leaves_a_recipe_its_name() -> None:
    plugins = installed()
    for name in list(plugins.recipes())[::20]:
        recipe = plugins.find_recipe(name)
        same = [f"train.epochs={recipe.train.epochs}", f"seed={recipe.seed}"]
        assert plugins.find_recipe(name, same) == recipe
        other = [*same, f"seed={recipe.seed + 1}"]
        assert plugins.find_recipe(name, other).name == changed_name(name, other)


def test_the_quickstart_has_one_digits_recipe_for_every_method_that_is_no_baseline() -> None:
    plugins = installed()
    found = [member.recipe.partition("/") for member in suites(plugins)["quickstart"].members]
    flagships = {name for name, owned in plugins.methods().items() if not owned.card.baseline}
    with_digits = {name.partition("/")[0] for name in plugins.recipes() if "/digits-" in name}
    assert {method for method, _, _ in found} == flagships & with_digits
    assert len(found) == len({method for method, _, _ in found})
    assert all(name.startswith("digits-") for _, _, name in found)
