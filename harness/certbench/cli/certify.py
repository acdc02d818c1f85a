"""``certbench certify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certbench.cli.progress import reporter
from certbench.cli.run import finish, headline
from certbench.errors import CertbenchError

if TYPE_CHECKING:
    from certbench.stages.record import RunOutcome

EXIT_RUN_FAILED = 3


@click.command(name="certify", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--certifier", default=None, metavar="NAME", help="In place of the recipe's.")
@click.option(
    "--guarantee",
    type=click.Choice(["float_sound", "real_arith"]),
    default=None,
    help="What bounds prove: the deployed floating-point network, or real arithmetic.",
)
@click.option(
    "--deploy",
    type=click.Choice(["float32", "float64", "tf32", "bf16", "fp16"]),
    default=None,
    help="The arithmetic that the certificates cover, which makes them float-sound; or that a smoothed network runs in.",
)
@click.option(
    "--radius",
    default=None,
    metavar="R",
    help="Ask at this radius instead; shown, not recorded in the tables.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--data", default=None, metavar="DIR", help="Folder of the data sets [default: $CERTBENCH_DATA]."
)
@click.option("--out", default="certbench-out", show_default=True, metavar="DIR", help="Where the runs are.")
def command(
    runs: tuple[str, ...],
    certifier: str | None,
    guarantee: str | None,
    deploy: str | None,
    radius: str | None,
    device: str,
    data: str | None,
    out: str,
) -> None:
    """Certify finished runs again with other settings; nothing is trained.

    RUN is a run's id or the beginning of one. The new certificates are audited like the first. The new rows stand beside the old ones under a settings digest of their
    own. A table is about its recipe's radius, so the answer at another --radius is shown and not recorded.

    \b
    Example:
      certbench certify 7e2f --guarantee real_arith
      certbench certify 7e2f --deploy bf16
      certbench certify 7e2f --certifier "ibp>crown-ibp" --guarantee float_sound
      certbench leaderboard show
    """
    changes = {"certifier": certifier, "guarantee": guarantee, "deploy": deploy}
    if guarantee == "real_arith" and deploy is None:
        changes["deploy"] = "float32"
    chosen = {key: value for key, value in changes.items() if value is not None}
    from certbench.recorded import find_run

    for prefix in runs:
        find_run(prefix, Path(out))  # a wrong name is found before any work
    found = [_certify_one(prefix, chosen, radius, device, data, out) for prefix in runs]
    if radius is None:
        finish(found, list(runs), out)
    elif None in found:
        sys.exit(EXIT_RUN_FAILED)


def _certify_one(
    prefix: str, changes: dict[str, str], radius: str | None, device: str, data: str | None, out: str
) -> RunOutcome | None:
    """Certify one run and show its counts; an explained failure is one line and does not stop the others."""
    from certbench.recorded import certify_again

    try:
        with reporter(f"certify {prefix}") as progress:
            found = certify_again(
                prefix, changes, radius, out=out, data=data, device=device, reporter=progress
            )
    except CertbenchError as error:
        if error.exit_code == 2:  # a wrong setting is wrong for every run
            raise
        click.echo(f"certbench: {error}", err=True)
        return None
    asked = found.recipe.certify
    guarantee = asked.guarantee or "statistical"
    kind = guarantee if guarantee == "real_arith" else f"{guarantee} for {asked.deploy}"
    click.echo(
        f"{found.recipe.name} seed {found.recipe.seed}: {headline(found)} "
        f"({asked.certifier}, {kind}; run {found.run_id})"
    )
    return found
