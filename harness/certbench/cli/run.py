"""``certbench run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certbench.audit.registry import DEFAULT, find_attack
from certbench.cli.progress import reporter
from certbench.errors import CertbenchError, FoundError, UsageError

if TYPE_CHECKING:
    from certbench.plugins import Plugins
    from certbench.recipe import Recipe
    from certbench.stages.record import RunOutcome

EXIT_RUN_FAILED = 3


@click.command(name="run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE|SUITE|FILE...")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, e.g. train.epochs=3."
)
@click.option(
    "--seeds", default=None, metavar="0,1,2", help="Run once per seed, in place of the recipe's own seed."
)
@click.option(
    "--attack",
    default=DEFAULT,
    show_default=True,
    metavar="NAME",
    help="What certificates are audited with, from `certbench list attacks`; none leaves them unaudited.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--data", default=None, metavar="DIR", help="Folder of the data sets [default: $CERTBENCH_DATA]."
)
@click.option(
    "--out", default="certbench-out", show_default=True, metavar="DIR", help="Checkpoints, rows, tables."
)
def command(
    recipes: tuple[str, ...],
    overrides: tuple[str, ...],
    seeds: str | None,
    attack: str,
    device: str,
    data: str | None,
    out: str,
) -> None:
    """Run recipes or suites: train, certify, audit, record, rank.

    A recipe is a name from `certbench list recipes` or a TOML file; a suite is a name from `certbench list suites`.
    What is finished is not done again; what was interrupted goes on from its last checkpoint. When one run fails,
    the others still finish, and the exit code is 3. It is 1 when none fails and an attack voids certificates.

    \b
    Example:
      certbench run fast-ibp/mnist-linf-0.1-cnn-small-10ep --data DIR --seeds 0,1,2
      certbench run quick --set train.epochs=3
      certbench run adaptive-radii/mnist-kappa --data DIR --seeds 0,1,2
    """
    run_all(list(recipes), parse_seeds(seeds), list(overrides), device, data, out, attack)


def run_all(
    names: list[str],
    seeds: list[int] | None,
    overrides: list[str],
    device: str,
    data: str | None,
    out: str,
    attack: str = DEFAULT,
) -> None:
    """Run everything named, then build and show the boards.

    Raises:
        UsageError: a name, key or value is wrong; nothing has been run then.
        FoundError: an attack voided certificates; everything has been run and recorded then.
    """
    from certbench.plugins import installed
    from certbench.suites import Member, suites

    chosen = find_attack(attack).name if attack != "none" else None
    plugins = installed()
    known = suites(plugins)
    jobs: list[Recipe] = []
    for name in names:
        members = known[name].members if name in known else (Member(name),)
        if not members:
            raise UsageError(f"suite {name!r} is empty: no installed plugin has a recipe for it")
        for member in members:
            recipe = plugins.find_recipe(member.recipe, [*member.overrides, *overrides])
            jobs += [recipe.with_seed(s) for s in seeds] if seeds is not None else [recipe]
    for recipe in jobs:
        _check_names(recipe, plugins)
    done = [_run_one(recipe, chosen, device, data, out) for recipe in jobs]
    finish(done, [f"{recipe.name} (seed {recipe.seed})" for recipe in jobs], out)


def _check_names(recipe: Recipe, plugins: Plugins) -> None:
    """What a recipe names must be there, which should not come to light after hours of other runs.

    A teacher's file may yet come out of one of these.

    Raises:
        UsageError: unknown data set, model, certifier or teacher's recipe.
    """
    from certbench.contract import TeacherSettings
    from certbench.models.registry import check_model_name
    from certbench.stages.certify import choose_certifier
    from certbench.training.teacher import NetworkFile, find_teacher, is_file

    try:
        plugins.dataset(recipe.dataset)
        check_model_name(recipe.model, plugins.models())
        choose_certifier(recipe, plugins.owner(recipe.method.name), plugins)
        settings = plugins.settings(recipe)
        if isinstance(settings, TeacherSettings) and not is_file(settings.teacher):
            teacher = find_teacher(recipe, plugins)
            if not isinstance(teacher, NetworkFile):
                _check_names(teacher, plugins)
    except UsageError as error:
        named = str(error).startswith(f"{recipe.name}: ")
        raise error if named else UsageError(f"{recipe.name}: {error}") from None


def finish(outcomes: Sequence[RunOutcome | None], names: Sequence[str], out: str) -> None:
    """Build and show the boards, then say by the exit code what became of the runs; None stands for one that failed.

    Raises:
        FoundError: no run failed, and an attack voided certificates.
    """
    from certbench.cli.leaderboard import print_boards
    from certbench.leaderboard.build import write

    if any(outcome is not None for outcome in outcomes):
        print_boards(write(Path(out)).boards)
    named = list(zip(outcomes, names, strict=True))
    refuted = [
        f"{name}: {o.refuted} refuted in run {o.run_id}" for o, name in named if o is not None and o.void
    ]
    found = f"certificates refuted by attacks, and their rows voided: {'; '.join(refuted)}"
    failed = [name for outcome, name in named if outcome is None]
    if failed:
        if refuted:
            click.echo(f"certbench: {found}", err=True)
        click.echo(f"certbench: {len(failed)} of {len(named)} runs failed: {', '.join(failed)}", err=True)
        sys.exit(EXIT_RUN_FAILED)
    if refuted:
        raise FoundError(found)


def _run_one(
    recipe: Recipe, attack: str | None, device: str, data: str | None, out: str
) -> RunOutcome | None:
    """Run one recipe; an explained failure is shown in one line and does not stop the others."""
    from certbench.run import run_recipe

    title = f"{recipe.name} seed {recipe.seed}"
    try:
        with reporter(title) as progress:
            outcome = run_recipe(recipe, out=out, data=data, device=device, attack=attack, reporter=progress)
    except CertbenchError as error:
        click.echo(f"certbench: {error}", err=True)
        return None
    click.echo(f"{title}: {headline(outcome)} (run {outcome.run_id})", err=True)
    return outcome


def headline(outcome: RunOutcome) -> str:
    """The figures of a run in a few words; what they are about depends on the norm."""
    from certbench.threat import format_radius

    certified, threat = f"certified {100 * outcome.certified_accuracy:.2f}%", outcome.recipe.threat
    if threat.radius is None:
        acr = "unknown" if outcome.acr is None else f"{outcome.acr:.4f}"
        return f"{certified} at some radius, ACR {acr}, sigma {threat.sigma}"
    return f"clean {100 * outcome.clean_accuracy:.2f}%, {certified} at {format_radius(threat.radius)}"


def parse_seeds(text: str | None) -> list[int] | None:
    """``0,1,2`` as numbers, each once.

    Raises:
        UsageError: not a list of different non-negative numbers.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UsageError(f"--seeds takes different numbers with commas between, such as 0,1,2; got {text!r}")
    return [int(part) for part in parts]
