"""Published figures as data, and what methods say of themselves.

A plugin keeps the figures of its papers in ``published/*.toml`` (:class:`PublishedFile`). Boards are a function of rows
and repository alone, whatever plugins are installed; so a build copies cards and figures of the installed methods into
``methods.json`` beside the boards, and keeps those of methods that are not installed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from certbench.contract import Guarantee, MethodCard
from certbench.errors import DataError
from certbench.plugins import Plugins
from certbench.recipe import Strict, explain
from certbench.threat import format_radius, parse_radius

NOTES = "methods.json"
_DERIVED = "certbench: copied from the installed methods by `certbench leaderboard build`; do not edit"

Metric = Literal["clean_error", "certified_error", "clean_accuracy", "certified_accuracy", "acr"]


class PublishedFigure(Strict):
    """One cell of a published table. Errors and accuracies in percent; ``spread`` is a standard deviation over runs.

    ``radius`` is the L-inf radius, ``sigma`` the noise of an L2 board, where ``at`` is the radius that
    ``certified_accuracy`` is about. ``model`` is the name of the network here. ``recipe`` or ``epochs`` tells which rows
    the figure speaks of, where a paper has several for one network. ``basis``: read in the text, or computed from
    published logs. ``differences`` says what the paper did otherwise; where that is in the settings of training, or these
    are not known, ``other_settings`` is true, and a row beside the figure reproduces nothing.
    """

    table: str
    dataset: str
    norm: Literal["linf", "l2"]
    radius: str | None = None
    sigma: float | None = Field(default=None, gt=0)
    method: str
    model: str
    recipe: str | None = None
    epochs: int | None = Field(default=None, ge=0)
    metric: Metric
    at: str | None = None
    value: float = Field(ge=0)
    spread: float | None = Field(default=None, ge=0)
    basis: Literal["text", "log"] = "text"
    differences: str = ""
    other_settings: bool = False

    @model_validator(mode="after")
    def _is_one_cell(self) -> PublishedFigure:
        needed, other = ("radius", "sigma") if self.norm == "linf" else ("sigma", "radius")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f'a figure of norm "{self.norm}" has {needed} and no {other}')
        if self.radius is not None:
            parse_radius(self.radius)
        if (self.at is not None) != (self.norm == "l2" and self.metric == "certified_accuracy"):
            raise ValueError('"at" belongs to certified_accuracy of norm "l2", and to nothing else')
        if self.at is not None and not 0 <= float(self.at) < 1000:
            raise ValueError('"at" is a radius, such as "0.5"')
        if self.other_settings and not self.differences:
            raise ValueError("other_settings needs differences that say which")
        if self.metric != "acr" and self.value > 100:
            raise ValueError("errors and accuracies are percent")
        return self

    @property
    def size(self) -> str:
        """The board's radius or sigma, in the words of boards."""
        if self.radius is not None:
            return f"radius {format_radius(parse_radius(self.radius))}"
        return f"sigma {self.sigma!r}"


class PublishedFile(Strict):
    """The figures of one paper, ``published/<paper>.toml``."""

    source: str
    figures: tuple[PublishedFigure, ...]


class MethodNotes(Strict):
    """A method's card as boards show it, and the published figures its plugin brings."""

    summary: str
    paper: str
    norm: str
    guarantee: Guarantee
    limits: str = ""
    plugin: str = ""
    published: tuple[PublishedFile, ...] = ()


class Notes(Strict):
    """The content of ``methods.json``."""

    derived: str = _DERIVED
    methods: dict[str, MethodNotes] = Field(default_factory=dict)

    def figures(self) -> list[tuple[str, PublishedFigure]]:
        """Every published figure with its source, in a fixed order."""
        return [
            (file.source, figure)
            for _, notes in sorted(self.methods.items())
            for file in notes.published
            for figure in file.figures
        ]

    def text(self) -> str:
        content = self.model_dump(mode="json", exclude_defaults=True)
        content = {"derived": self.derived, "methods": content.get("methods", {})}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_notes(folder: Path) -> Notes:
    """What an earlier build left in ``methods.json``; nothing where there was none.

    Raises:
        DataError: the file is unreadable or was changed into something else.
    """
    path = folder / NOTES
    try:
        return Notes.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Notes()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    except ValidationError as error:
        raise DataError(f"{explain(error, Notes, str(path))}; remove the file and build again") from None


def refreshed(notes: Notes, plugins: Plugins) -> Notes:
    """The notes with those of installed methods made new; a method that is not installed keeps what it had.

    Raises:
        DataError: a plugin's published figures are not what they must be; names the file.
    """
    owned_by: dict[str, set[str]] = {}
    for name, owned in plugins.methods().items():
        owned_by.setdefault(owned.plugin.distribution, set()).add(name)
    installed = {
        name: MethodNotes(
            summary=owned.card.summary,
            paper=owned.card.paper,
            norm=owned.card.norm,
            guarantee=owned.card.guarantee,
            limits=owned.card.limits,
            plugin=owned.plugin.distribution,
            published=read_published(owned.card, owned_by[owned.plugin.distribution]),
        )
        for name, owned in plugins.methods().items()
    }
    return Notes(methods={**notes.methods, **installed})


def read_published(card: MethodCard, methods: Collection[str] = ()) -> tuple[PublishedFile, ...]:
    """The figures of a method in its plugin's files, in the order of their names.

    ``methods`` are all methods of the plugin: they may share files, and a figure of any other is an error.

    Raises:
        DataError: a file is not valid; names it, the key and what is wrong.
    """
    if card.published is None:
        return ()
    files = sorted(card.published.iterdir(), key=lambda file: file.name)
    found = []
    for file in files:
        if file.name.endswith(".toml"):
            content = _read_file(file, f"published figures of {card.name}, {file.name}")
            stray = sorted({figure.method for figure in content.figures} - {card.name, *methods})
            if stray:
                raise DataError(
                    f"{file.name}: no method {stray[0]!r} is in the plugin that brings {card.name}"
                )
            own = tuple(figure for figure in content.figures if figure.method == card.name)
            found.append(PublishedFile(source=content.source, figures=own))
    return tuple(content for content in found if content.figures)


def _read_file(file: Traversable, where: str) -> PublishedFile:
    try:
        return PublishedFile.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{where}: {error}") from None
    except ValidationError as error:
        raise DataError(explain(error, PublishedFile, where)) from None
