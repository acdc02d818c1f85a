"""``certbench export``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certbench.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from certbench.data.dataset import Dataset
    from certbench.recipe import Recipe

CHECKED = 8
"""Images on which the ONNX file is compared with torch before it is written."""


@click.command(name="export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", metavar="RUN")
@click.option(
    "--onnx", type=click.Path(path_type=Path), metavar="FILE", help="Write the network alone into FILE."
)
@click.option(
    "--vnnlib",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write network, properties and instances.csv into DIR.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N images.")
@click.option("--indices", default=None, metavar="0,5,10-19", help="Of these images only.")
@click.option("--force", is_flag=True, help="Replace what a former export wrote there.")
@click.option(
    "--data", default=None, metavar="DIR", help="Folder of the data sets [default: $CERTBENCH_DATA]."
)
@click.option(
    "--out", default="certbench-out", show_default=True, metavar="DIR", help="Where the run was recorded."
)
def command(
    run: str,
    onnx: Path | None,
    vnnlib: Path | None,
    limit: int | None,
    indices: str | None,
    force: bool,
    data: str | None,
    out: str,
) -> None:
    """Write a recorded run for other verifiers: its network as ONNX, its images as VNN-LIB properties.

    RUN is a run id, or as much of its beginning as no other run under --out shares. A property asks whether an image
    is classified correctly in the whole ball of the recipe's radius; misclassified images have none. Without --onnx
    and --vnnlib, both go to exports/<run id> under --out. Needs pip install certbench[export].

    \b
    Example:
      certbench export 3fa9 --vnnlib properties --limit 100
      certbench export 3fa9 --onnx network.onnx
    """
    import torch

    from certbench.data.dataset import to_pixels
    from certbench.export import (
        check_target,
        choose_images,
        onnx_bytes,
        require_packages,
        write_benchmark,
        write_onnx,
    )
    from certbench.plugins import installed

    if onnx is not None and vnnlib is None and (limit is not None or indices is not None):
        raise UsageError("--limit and --indices choose images for --vnnlib; --onnx writes the network alone")
    wanted = parse_indices(indices)
    require_packages()
    for path, is_folder in ((onnx, False), (vnnlib, True)):
        if path is not None:
            check_target(path, force=force, folder=is_folder)
    recorded = _load_run(run, out, data, torch.device("cpu"), installed())
    network = (
        recorded.network
    )  # MAINTAINER: deployed_network(recorded.network), once models/fold.py is merged
    dataset, recipe = recorded.dataset, recorded.recipe
    if onnx is None and vnnlib is None:
        vnnlib = Path(out) / "exports" / recorded.run_id
        check_target(vnnlib, force=force, folder=True)
    chosen = choose_images(network, dataset.test, dataset.info, wanted, limit) if vnnlib is not None else None
    examples = list(chosen.indices if chosen else range(len(dataset.test)))[:CHECKED]
    images = to_pixels(dataset.test.images[examples], dataset.info.levels)
    notes = {"certbench.run": recorded.run_id, "certbench.recipe": recipe.name}
    content = onnx_bytes(network, images, notes)
    if vnnlib is not None and chosen is not None:
        head = [f"certbench run {recorded.run_id}, recipe {recipe.name}, seed {recipe.seed}."]
        write_benchmark(
            vnnlib,
            content,
            dataset.test,
            dataset.info,
            recipe.threat,
            chosen.indices,
            notes=head,
            force=force,
        )
        left_out = f"; {len(chosen.misclassified)} misclassified left out" if chosen.misclassified else ""
        click.echo(f"{vnnlib}: network and {len(chosen.indices)} properties{left_out}")
    if onnx is not None:
        write_onnx(onnx, content)
        click.echo(f"{onnx}: network")


def parse_indices(text: str | None) -> list[int] | None:
    """``0,5,10-12`` as image numbers, in the order given.

    Raises:
        UsageError: not a list of numbers and rising ranges.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first > 10**6:
            raise UsageError(
                f"--indices takes numbers and ranges with commas between, such as 0,5,10-19; got {text!r}"
            )
        found += range(first, last + 1)
    return found


# MAINTAINER: stand-in until certbench.recorded is merged; delete from here to the end of the file and write
# `from certbench.recorded import load_run` above.


@dataclass(frozen=True)
class _Recorded:
    run_id: str
    recipe: Recipe
    dataset: Dataset
    network: nn.Module


def _load_run(prefix: str, out: str, data: str | None, device: object, plugins: object) -> _Recorded:
    import hashlib

    from safetensors.torch import load

    from certbench.data.files import load_dataset
    from certbench.errors import DataError
    from certbench.models import build_network
    from certbench.recipe import Recipe
    from certbench.results.store import ResultStore

    rows = ResultStore(Path(out) / "results").read("runs").to_pylist()
    found = [row for row in rows if row["run_id"].startswith(prefix)]
    if len(found) != 1 or not prefix:
        known = ", ".join(row["run_id"] for row in (found or rows)[:10]) or "none"
        raise UsageError(f"{len(found)} runs under {out} begin with {prefix!r}, not one; recorded: {known}")
    row = found[0]
    recipe = Recipe.model_validate_json(row["recipe"])
    dataset = load_dataset(recipe.dataset, Path(data) if data is not None else None)
    path = Path(out) / "runs" / row["run_id"] / "network.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; run the recipe again") from None
    if hashlib.sha256(content).hexdigest() != row["checkpoint_digest"]:
        raise DataError(f"{path} is not the recorded network: its digest differs; run the recipe again")
    network = build_network(recipe.model, dataset.info, 0)
    network.load_state_dict(load(content))
    return _Recorded(row["run_id"], recipe, dataset, network.eval())
