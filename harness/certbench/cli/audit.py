"""``certbench audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from certbench.audit.registry import DEFAULT, find_attack
from certbench.cli.progress import reporter
from certbench.cli.run import finish
from certbench.errors import CertbenchError

if TYPE_CHECKING:
    from certbench.stages.record import RunOutcome


@click.command(name="audit", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--attack",
    default=DEFAULT,
    show_default=True,
    metavar="NAME",
    help="A name from `certbench list attacks`.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--data", default=None, metavar="DIR", help="Folder of the data sets [default: $CERTBENCH_DATA]."
)
@click.option(
    "--out", default="certbench-out", show_default=True, metavar="DIR", help="Where the runs were recorded."
)
def command(runs: tuple[str, ...], attack: str, device: str, data: str | None, out: str) -> None:
    """Attack the certificates of recorded runs again, with any attack.

    RUN is the id of a run in DIR, or its beginning. Certificates never change: an audit adds rows, and the boards are
    built anew. A proof that is refuted voids its row. The exit code is then 1, or 3 where a run could not be audited.

    \b
    Example:
      certbench audit 4f2a --attack strong
    """
    from certbench.recorded import find_run

    find_attack(attack)
    for run in runs:
        find_run(run, Path(out))  # a wrong name is found before any work
    finish([_audit_one(run, attack, device, data, out) for run in runs], list(runs), out)


def _audit_one(run: str, attack: str, device: str, data: str | None, out: str) -> RunOutcome | None:
    """Audit one run; an explained failure is shown in one line and does not stop the others."""
    from certbench.recorded import audit_again

    try:
        with reporter(run) as progress:
            return audit_again(run, attack, out=out, data=data, device=device, reporter=progress)
    except CertbenchError as error:
        click.echo(f"certbench: {error}", err=True)
        return None
