"""``certbench list``."""

from __future__ import annotations

import json
from collections.abc import Callable

import click

Rows = list[dict[str, object]]


def _methods() -> Rows:
    from certbench.plugins import installed

    return [
        {
            "name": name,
            "summary": owned.card.summary,
            "norm": owned.card.norm,
            "guarantee": owned.card.guarantee,
            "certifier": owned.card.certifier,
            "paper": owned.card.paper,
            "limits": owned.card.limits,
            "distribution": owned.plugin.distribution,
        }
        for name, owned in sorted(installed().methods().items())
    ]


def _recipes() -> Rows:
    from certbench.plugins import installed
    from certbench.threat import format_radius

    plugins = installed()
    found: Rows = []
    for name in plugins.recipes():
        recipe = plugins.find_recipe(name)
        threat = recipe.threat
        found.append(
            {
                "name": name,
                "dataset": recipe.dataset,
                "model": recipe.model,
                "radius": format_radius(threat.radius) if threat.radius is not None else "",
                "sigma": threat.sigma if threat.sigma is not None else "",
                "epochs": recipe.train.epochs,
                "published": recipe.reference.source if recipe.reference else "",
            }
        )
    return found


def _suites() -> Rows:
    from certbench.plugins import installed
    from certbench.suites import SUITES, recipes_of

    names = installed().recipes()
    return [{"name": suite, "recipes": recipes_of(suite, names)} for suite in SUITES]


def _datasets() -> Rows:
    from certbench.data.catalog import DATASETS

    return [
        {
            "name": info.name,
            "title": info.title,
            "classes": info.classes,
            "shape": "x".join(map(str, info.shape)),
            "train": info.train_size,
            "test": info.test_size,
        }
        for info in DATASETS.values()
    ]


def _models() -> Rows:
    from certbench.models import MODELS

    return [
        {"name": name, "summary": (builder.__doc__ or "").strip().splitlines()[0]}
        for name, builder in sorted(MODELS.items())
    ]


def _certifiers() -> Rows:
    from certbench.bounds.certifiers import CERTIFIERS
    from certbench.smoothing import SMOOTHERS

    known = {c.name: c.summary for c in CERTIFIERS.values()} | {s.name: s.summary for s in SMOOTHERS.values()}
    return [{"name": name, "summary": summary} for name, summary in known.items()]


def _attacks() -> Rows:
    from certbench.audit.registry import ATTACKS

    return [{"name": attack.name, "summary": attack.summary} for attack in ATTACKS.values()]


def _plugins() -> Rows:
    from certbench.plugins import installed

    return [
        {"name": p.name, "distribution": p.distribution, "version": p.version, "error": p.error or ""}
        for p in installed().loaded
    ]


KINDS: dict[str, Callable[[], Rows]] = {
    "methods": _methods,
    "recipes": _recipes,
    "suites": _suites,
    "datasets": _datasets,
    "models": _models,
    "certifiers": _certifiers,
    "attacks": _attacks,
    "plugins": _plugins,
}


@click.command(name="list", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON list of objects.")
def command(kind: str, as_json: bool) -> None:
    """List methods, recipes, suites, data sets, models, certifiers, attacks or plugins.

    \b
    Example:
      certbench list recipes
      certbench list methods --json
    """
    rows = KINDS[kind]()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"no {kind}; plugins bring them, `certbench doctor` shows which are installed")
        return
    from rich.console import Console
    from rich.table import Table

    shown = {"methods": ["name", "norm", "guarantee", "certifier", "summary"]}.get(kind, list(rows[0]))
    table = Table(box=None, pad_edge=False)
    for column in shown:
        table.add_column(column, no_wrap=column == "name")
    for row in rows:
        table.add_row(*(_text(row[column]) for column in shown))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)


def _text(value: object) -> str:
    from rich.markup import escape

    return escape(", ".join(value) if isinstance(value, list) else str(value))
