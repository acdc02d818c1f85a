"""``certbench list models``: which certifiers apply to each network, and what one network consists of."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import nn

    from certbench.data.info import DatasetInfo

SHOWN_ON = "cifar10"
"""The data set whose images the overview builds networks for."""


def overview() -> list[dict[str, object]]:
    """One row per network, traced for images of ``SHOWN_ON``; a line on a terminal's stderr tells how far it is."""
    from certbench.bounds.applicability import applicability
    from certbench.errors import UsageError
    from certbench.plugins import installed

    models, info = installed().models(), installed().dataset(SHOWN_ON)
    rows: list[dict[str, object]] = []
    for done, (name, builder) in enumerate(sorted(models.items())):
        _tell(f"tracing {name} ({done} of {len(models)})")
        try:
            network = _on_meta(name, info)
            certifiers, parameters = applicability(network, info.shape).applies, _count(network)
        except UsageError:
            certifiers, parameters = [f"none: does not fit {SHOWN_ON}"], 0
        summary = (builder.__doc__ or "").strip().splitlines()
        rows.append(
            {
                "name": name,
                "parameters": parameters,
                "certifiers": certifiers,
                "summary": summary[0] if summary else "",
            }
        )
    _tell("")
    return [
        *rows,
        {"name": "timm:<name>", "parameters": "", "certifiers": "", "summary": "any network of timm"},
    ]


def show_model(name: str, dataset: str, as_json: bool) -> None:
    """Print layers, totals and certifiers of one network.

    Raises:
        UsageError: unknown model or data set, or the two do not fit.
    """
    from certbench.bounds.applicability import applicability
    from certbench.models.summary import summarize
    from certbench.plugins import installed

    info = installed().dataset(dataset)
    network = _on_meta(name, info)
    summary, bounds = summarize(network, info.shape), applicability(network, info.shape)
    certifiers = [
        {"certifier": bound, "cost": bounds.cost.get(bound), "refused": reason or None}
        for bound, reason in bounds.refusals.items()
    ]
    if as_json:
        content = {**asdict(summary), "structure": bounds.structure, "certifiers": certifiers}
        click.echo(json.dumps({"name": name, "dataset": dataset, **content}, indent=1))
        return
    from tabulate import tabulate

    headers = {"name": "layer", "kind": "kind", "output": "output", "parameters": "parameters"}
    headers["multiply_adds"] = "multiply-adds"
    rows = [{**asdict(layer), "output": "x".join(map(str, layer.output))} for layer in summary.layers]
    click.echo(tabulate(rows, headers=headers, tablefmt="simple", intfmt=","))
    click.echo(
        f"\n{name} on {dataset}: {summary.parameters:,} parameters, {summary.multiply_adds:,} multiply-adds an image, "
        f"structure {bounds.structure}"
    )
    for bound, reason in bounds.refusals.items():
        cost = f", at most {bounds.cost[bound]:,.0f} clean passes an image" if bound in bounds.cost else ""
        click.echo(f"  {bound}: {reason or 'applies' + cost}")


def _on_meta(name: str, info: DatasetInfo) -> nn.Module:
    """The network without memory for its weights."""
    import torch

    from certbench.models import build_network
    from certbench.plugins import installed

    with torch.device("meta"):
        return build_network(name, info, 0, installed().models())


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{line}", err=True, nl=False)
