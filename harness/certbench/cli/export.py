"""``certbench export``."""

from __future__ import annotations

import re
from pathlib import Path

import click

from certbench.errors import UsageError

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
    """Write a recorded run for other verifiers: ONNX and VNN-LIB.

    RUN is a run id, or as much of its beginning as no other run under --out shares. A property asks whether an image
    is classified correctly in the whole ball of the recipe's radius; misclassified images have none. Without --onnx
    and --vnnlib, both go to exports/<run id> under --out. Needs pip install certbench[export].

    \b
    Example:
      certbench export 3fa9 --vnnlib properties --limit 100
      certbench export 3fa9 --onnx network.onnx
    """
    from certbench.data.dataset import to_pixels
    from certbench.export import (
        check_target,
        choose_images,
        onnx_bytes,
        require_packages,
        write_benchmark,
        write_onnx,
    )
    from certbench.models.fold import deployed_network
    from certbench.recorded import load_run

    if onnx is not None and vnnlib is None and (limit is not None or indices is not None):
        raise UsageError("--limit and --indices choose images for --vnnlib; --onnx writes the network alone")
    wanted = parse_indices(indices)
    require_packages()
    for path, is_folder in ((onnx, False), (vnnlib, True)):
        if path is not None:
            check_target(path, force=force, folder=is_folder)
    recorded = load_run(run, out, data, device="cpu")
    network = deployed_network(recorded.network)  # what was certified and audited
    identity, dataset, recipe = recorded.run.id, recorded.run.dataset, recorded.run.recipe
    if onnx is None and vnnlib is None:
        vnnlib = Path(out) / "exports" / identity
        check_target(vnnlib, force=force, folder=True)
    chosen = choose_images(network, dataset.test, dataset.info, wanted, limit) if vnnlib is not None else None
    examples = list(chosen.indices if chosen else range(len(dataset.test)))[:CHECKED]
    images = to_pixels(dataset.test.images[examples], dataset.info.levels)
    notes = {"certbench.run": identity, "certbench.recipe": recipe.name}
    content = onnx_bytes(network, images, notes)
    if vnnlib is not None and chosen is not None:
        head = [f"certbench run {identity}, recipe {recipe.name}, seed {recipe.seed}."]
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
