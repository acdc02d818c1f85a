"""``certbench run``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from certbench.cli.progress import reporter
from certbench.errors import CertbenchError, UsageError

EXIT_RUN_FAILED = 3


@click.command(name="run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE|SUITE|FILE...")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting, e.g. train.epochs=3."
)
@click.option(
    "--seeds", default=None, metavar="0,1,2", help="Run once per seed, in place of the recipe's own seed."
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
    device: str,
    data: str | None,
    out: str,
) -> None:
    """Run recipes or suites: train, certify, record, rank.

    A recipe is a name from `certbench list recipes` or a TOML file; a suite is a name from `certbench list suites`.
    What is finished is not done again; what was interrupted goes on from its last checkpoint. When one run fails,
    the others still finish, and the exit code is 3.

    \b
    Example:
      certbench run fast-ibp/mnist-linf-0.1-cnn-small-10ep --data DIR --seeds 0,1,2
      certbench run quick --set train.epochs=3
    """
    run_all(list(recipes), parse_seeds(seeds), list(overrides), device, data, out)


def run_all(
    names: list[str], seeds: list[int] | None, overrides: list[str], device: str, data: str | None, out: str
) -> None:
    """Run everything named, then build and show the boards.

    Raises:
        UsageError: a name, key or value is wrong; nothing has been run then.
    """
    from certbench.cli.leaderboard import print_boards
    from certbench.leaderboard.build import read_boards, write
    from certbench.plugins import installed
    from certbench.recipe import Recipe
    from certbench.suites import SUITES, recipes_of

    plugins = installed()
    jobs: list[Recipe] = []
    for name in names:
        members = recipes_of(name, plugins.recipes()) if name in SUITES else [name]
        if not members:
            raise UsageError(f"suite {name!r} is empty: no installed plugin has a recipe for it")
        for member in members:
            recipe = plugins.find_recipe(member, overrides)
            jobs += [recipe.with_seed(s) for s in seeds] if seeds is not None else [recipe]
    failed = [recipe for recipe in jobs if not _run_one(recipe, device, data, out)]
    if len(failed) < len(jobs):
        write(Path(out))
        print_boards(read_boards(Path(out)))
    if failed:
        shown = ", ".join(f"{recipe.name} (seed {recipe.seed})" for recipe in failed)
        click.echo(f"certbench: {len(failed)} of {len(jobs)} runs failed: {shown}", err=True)
        sys.exit(EXIT_RUN_FAILED)


def _run_one(recipe: object, device: str, data: str | None, out: str) -> bool:
    """Run one recipe; an explained failure is shown in one line and does not stop the others."""
    from certbench.recipe import Recipe
    from certbench.run import run_recipe

    assert isinstance(recipe, Recipe)
    title = f"{recipe.name} seed {recipe.seed}"
    try:
        with reporter(title) as progress:
            outcome = run_recipe(recipe, out=out, data=data, device=device, reporter=progress)
    except CertbenchError as error:
        click.echo(f"certbench: {error}", err=True)
        return False
    click.echo(
        f"{title}: clean {100 * outcome.clean_accuracy:.2f}%, certified {100 * outcome.certified_accuracy:.2f}% "
        f"at {recipe.threat.radius} (run {outcome.run_id})",
        err=True,
    )
    return True


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
