"""The command line. One module per command; each is imported when it is called, so ``--help`` stays fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from certbench import __version__
from certbench.errors import CertbenchError

COMMANDS = {
    "quickstart": "Train, certify, audit and rank every method on the built-in digits.",
    "run": "Run recipes or suites: train, certify, audit, record, rank.",
    "certify": "Certify finished runs again with other settings; nothing is trained.",
    "audit": "Attack the certificates of recorded runs again, with any attack.",
    "leaderboard": "Derive the leaderboards from their rows, check or show them.",
    "results": "List and show runs, hand them on and take them in, verify them, query them.",
    "export": "Write a recorded run for other verifiers: ONNX and VNN-LIB.",
    "list": "List methods, recipes, suites, data sets, models, certifiers, attacks or plugins.",
    "data": "Look for data sets, fetch them, and check them.",
    "doctor": "Show versions, devices, data and plugins, and what is wrong with them.",
}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that knows its commands' names and first lines without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"certbench.cli.{name if name != 'list' else 'listing'}")
        command = module.command
        assert isinstance(command, click.Command)  # every module of this folder names its command so
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="certbench")
def cli() -> None:
    """Benchmark certified robust training: every certificate recorded, every table derived from rows.

    \b
    Example:
      certbench quickstart
      certbench run fast-ibp/mnist-linf-0.1-cnn-small-10ep --data DIR --seeds 0,1,2
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``certbench`` command. Explained failures end in one line and their exit code."""
    try:
        code = cli.main(arguments, prog_name="certbench", standalone_mode=False)
    except CertbenchError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(2)
    except click.ClickException as error:
        hint = (
            f"; try `{error.ctx.command_path} --help`"
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        _fail(error.format_message() + hint, 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command resumes from the last checkpoint", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    from certbench.leaderboard.escape import printable

    click.echo(f"certbench: {printable(message)}", err=True)
    sys.exit(code)
