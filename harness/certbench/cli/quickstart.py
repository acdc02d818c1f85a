"""``certbench quickstart``."""

from __future__ import annotations

import click

from certbench.cli.run import run_all


@click.command(name="quickstart", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out", default="certbench-out", show_default=True, metavar="DIR", help="Checkpoints, rows, tables."
)
def command(out: str) -> None:
    """Train, certify, audit and rank every method on the built-in digits.

    Baselines are left out; `certbench run quick` has them. Needs no download and no GPU. Prints the leaderboard and leaves its rows, tables and checkpoints in DIR.

    \b
    Example:
      certbench quickstart --out my-first-board
    """
    run_all(["quickstart"], None, [], "cpu", None, out)
