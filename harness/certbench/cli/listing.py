"""``certbench list``."""

from __future__ import annotations

import json
from collections.abc import Callable

import click

from certbench.errors import UsageError

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
    from certbench.suites import suites

    return [
        {
            "name": suite.name,
            "size": len(suite.members),
            "summary": suite.summary,
            "runs": [member.name for member in suite.members],
        }
        for suite in suites(installed()).values()
    ]


def _datasets() -> Rows:
    from certbench.plugins import installed

    return [
        {
            "name": info.name,
            "title": info.title,
            "classes": info.classes,
            "shape": "x".join(map(str, info.shape)),
            "train": info.train_size,
            "test": info.test_size,
            "held out": info.validation_per_class * info.classes,
        }
        for info in installed().datasets().values()
    ]


def _models() -> Rows:
    from certbench.cli.models import overview

    return overview()


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
@click.argument("name", required=False)
@click.option(
    "--dataset",
    default=None,
    metavar="NAME",
    help="Of a model: the images it is built for. [default: cifar10]",
)
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON list of objects.")
def command(kind: str, name: str | None, dataset: str | None, as_json: bool) -> None:
    """List methods, recipes, suites, data sets, models, certifiers, attacks or plugins.

    With the NAME of a model (or timm:NAME): its layers, and what certifying it costs.

    \b
    Example:
      certbench list recipes
      certbench list models cnn7 --dataset mnist
      certbench list methods --json
    """
    if name is not None or dataset is not None:
        if kind != "models" or name is None:
            raise UsageError(
                "NAME and --dataset belong to models: certbench list models NAME [--dataset NAME]"
            )
        from certbench.cli.models import show_model

        show_model(name, dataset or "cifar10", as_json)
        return
    rows = KINDS[kind]()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"no {kind}; plugins bring them, `certbench doctor` shows which are installed")
        return
    from rich.console import Console
    from rich.table import Table

    columns = {
        "methods": ["name", "norm", "guarantee", "certifier", "summary"],
        "suites": ["name", "size", "summary"],
    }
    shown = columns.get(kind, list(rows[0]))
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
