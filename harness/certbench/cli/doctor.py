"""``certbench doctor``."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

PACKAGES = (
    "certbench",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "pyarrow",
    "pandas",
    "pluggy",
    "pydantic",
)
EXIT_FOUND = 1


@click.command(name="doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data", default=None, metavar="DIR", help="Folder of the data sets [default: $CERTBENCH_DATA]."
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object.")
def command(data: str | None, as_json: bool) -> None:
    """Show versions, devices, data and plugins, and what is wrong with them.

    Exits with 1 when a plugin failed to load or two claim one method.

    \b
    Example:
      certbench doctor --data DIR
    """
    report, problems = examine(data)
    if as_json:
        click.echo(json.dumps({**report, "problems": problems}, indent=1))
    else:
        for title, lines in report.items():
            click.echo(title)
            for name, value in lines.items():
                click.echo(f"  {name:<14} {value}")
        for problem in problems:
            click.echo(f"problem: {problem}")
    sys.exit(EXIT_FOUND if problems else 0)


def examine(data: str | None) -> tuple[dict[str, dict[str, str]], list[str]]:
    """What there is, by section, and one line per problem."""
    from certbench.data.catalog import DATASETS
    from certbench.data.fetch import status
    from certbench.errors import PluginError
    from certbench.plugins import installed

    plugins = installed()
    problems = [f"plugin {p.name} of {p.distribution}: {p.error}" for p in plugins.loaded if p.error]
    try:
        owners = {name: owned.plugin.distribution for name, owned in sorted(plugins.methods().items())}
    except PluginError as error:
        owners = {}
        problems.append(str(error))
    try:
        datasets = plugins.datasets()
    except PluginError as error:
        datasets = DATASETS
        problems.append(str(error))
    report = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": _device(),
        "data": {
            row.name: f"{row.state} ({row.where})" for row in status(Path(data) if data else None, datasets)
        },
        "methods": owners,
    }
    return report, problems


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> dict[str, str]:
    import torch

    found = {"cpu threads": str(torch.get_num_threads())}
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["TF32"] = "off in every run" + (" (on by default here)" if torch.backends.cudnn.allow_tf32 else "")
    return found
