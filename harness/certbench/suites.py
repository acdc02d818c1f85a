"""Suites: names for sets of runs. The core's are told by data set; plugins ship others, sweeps included, as TOML.

``suites/digits-kappa.toml`` of a method ``m`` is the suite ``m/digits-kappa``:

    summary = "digits over kappa"
    [[runs]]
    recipe = "m/digits-linf-0.1"
    sweep = { "method.kappa" = [0, 0.5, 1], "train.epochs" = [20] }

runs the recipe once for every combination, each with its settings in its name, as ``--set`` writes them.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from certbench.errors import UsageError
from certbench.plugins import Plugins
from certbench.recipe import Strict, changed_name, explain

DATASETS = ("mnist", "cifar10", "tinyimagenet", "imagenet")
Value = bool | int | float | str | list[int]


@dataclass(frozen=True)
class Member:
    """One run of a suite: a recipe, and ``key=value`` settings in place of its own."""

    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return changed_name(self.recipe, self.overrides)


@dataclass(frozen=True)
class Suite:
    """A set of runs."""

    name: str
    summary: str
    members: tuple[Member, ...]


class Runs(Strict):
    """``[[runs]]``: a recipe, and lists of values to go through, by the keys of ``--set``."""

    recipe: str
    sweep: dict[str, list[Value]] = Field(default={})

    def members(self) -> Iterator[Member]:
        for values in itertools.product(*self.sweep.values()):
            named = zip(self.sweep, values, strict=True)
            yield Member(self.recipe, tuple(f"{key}={_text(value)}" for key, value in named))


class SuiteFile(Strict):
    summary: str
    runs: tuple[Runs, ...] = Field(min_length=1)


def suites(plugins: Plugins) -> dict[str, Suite]:
    """Every suite by name: the core's, then those of the plugins.

    Raises:
        UsageError: a plugin's suite cannot be read; names the file.
    """
    recipes = list(plugins.recipes())
    found = [
        Suite("quickstart", "one digits recipe of every method, baselines left out", _quickstart(plugins)),
        Suite("quick", "every recipe on the built-in digits", _members(_on("digits", recipes))),
        *(Suite(name, f"every recipe on {name}", _members(_on(name, recipes))) for name in DATASETS),
        Suite("standard", "every recipe", _members(sorted(recipes))),
    ]
    for method, owned in sorted(plugins.methods().items()):
        if owned.card.suites is not None:
            for path in sorted(Path(str(owned.card.suites)).glob("*.toml")):
                found.append(load_suite(path, f"{method}/{path.stem}"))
    return {suite.name: suite for suite in found}


def load_suite(path: Path, name: str) -> Suite:
    """
    Raises:
        UsageError: unreadable file, broken TOML, unknown key or bad value.
    """
    try:
        content = SuiteFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"cannot read suite {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise UsageError(explain(error, SuiteFile, str(path))) from None
    members = tuple(itertools.chain.from_iterable(runs.members() for runs in content.runs))
    if not members:
        raise UsageError(f"{path}: a sweep over no values leaves nothing to run")
    return Suite(name, content.summary, members)


def _quickstart(plugins: Plugins) -> tuple[Member, ...]:
    flagships = sorted(name for name, owned in plugins.methods().items() if not owned.card.baseline)
    first = (next(iter(_on("digits", _of(name, plugins))), None) for name in flagships)
    return _members(recipe for recipe in first if recipe is not None)


def _of(method: str, plugins: Plugins) -> list[str]:
    return [name for name in plugins.recipes() if name.startswith(f"{method}/")]


def _on(dataset: str, recipes: Iterable[str]) -> list[str]:
    return sorted(name for name in recipes if name.partition("/")[2].startswith(f"{dataset}-"))


def _members(recipes: Iterable[str]) -> tuple[Member, ...]:
    return tuple(map(Member, recipes))


def _text(value: Value) -> str:
    """As it would be typed after ``--set key=``."""
    return value if isinstance(value, str) else json.dumps(value)
