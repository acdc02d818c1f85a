"""ImageNet's training images scaled down once, so that decoding them costs a fraction in every epoch.

The shorter side becomes 256 pixels (smaller images stay), by the same filter that scales test images; the results are
JPEG files again, in plain tar archives that any program reads, and the list says where in them each image begins.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from PIL import Image

from certbench.contract import Reporter
from certbench.data.imagenet_files import PER_SHARD, QUALITY, RESIZED, SIDE, TRAIN
from certbench.data.images import decode_image
from certbench.data.manifest import Line, Manifest, read_manifest, write_manifest
from certbench.data.places import require_space

TYPICAL_SIZE = 60_000
"""Bytes of a scaled image, more than most have; for the question whether there is space."""


def write_shards(folder: Path, reporter: Reporter) -> None:
    """Write ``resized-256/train-<n>.tar`` and their list; the folder gets its name when everything is there.

    Raises:
        DataError: an image is missing or broken (names it), or there is no space.
    """
    manifest = read_manifest(folder / TRAIN)
    require_space(folder, TYPICAL_SIZE * len(manifest))
    scratch = folder / f"{RESIZED}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    reporter.stage("scaling images down", len(manifest), "image")
    write_manifest(scratch / TRAIN, _write(scratch, manifest, reporter))
    scratch.rename(folder / RESIZED)


def _write(folder: Path, manifest: Manifest, reporter: Reporter) -> Iterator[Line]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(manifest), PER_SHARD):
            name = f"train-{start // PER_SHARD:04}.tar"
            chosen = range(start, min(start + PER_SHARD, len(manifest)))
            contents = _ahead(pool, manifest, chosen)
            with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                for position, content in zip(chosen, contents, strict=True):
                    member = tarfile.TarInfo(manifest.files[position].decode())
                    member.size = len(content)
                    offset = tar.offset + tarfile.BLOCKSIZE  # behind the member's header
                    tar.addfile(member, io.BytesIO(content))
                    yield Line(hashlib.sha256(content).hexdigest(), len(content), name, offset, member.name)
                    reporter.advance(position + 1)


def _ahead(pool: ThreadPoolExecutor, manifest: Manifest, positions: range) -> Iterator[bytes]:
    """Scaled images in order, a few hundred of them ahead: all at once would not fit into memory."""
    rest = iter(positions)
    while some := list(islice(rest, 256)):
        yield from pool.map(lambda position: scaled(manifest, position), some)


def scaled(manifest: Manifest, position: int) -> bytes:
    """One image as a JPEG file with a shorter side of at most ``SIDE`` pixels."""
    image = decode_image(manifest.where(position), manifest.read(position))
    if min(image.size) > SIDE:
        factor = SIDE / min(image.size)
        size = (max(SIDE, round(image.width * factor)), max(SIDE, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
