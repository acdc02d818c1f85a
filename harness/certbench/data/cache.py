"""Decoded data sets as memory-mapped files, trusted only as far as their digests.

A cache is a safetensors file ``cache/<name>.safetensors`` under the data folder, or in the folder that
``CERTBENCH_CACHE`` names. It says what it was made from and the digest of its content, which is compared each time it
is read: a stale or damaged cache is passed over and made anew.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from certbench.data.dataset import Split, dataset_digest
from certbench.errors import DataError

VARIABLE = "CERTBENCH_CACHE"
METADATA = "certbench"
"""One key, since safetensors writes several in any order."""


def cache_path(name: str, root: Path) -> Path:
    folder = os.environ.get(VARIABLE)
    return (Path(folder).expanduser() if folder else root / "cache") / f"{name}.safetensors"


def read_cache(name: str, root: Path, source: str) -> tuple[str, dict[str, Split]] | None:
    """The digest and the memory-mapped parts of a cache, or None where there is none made from ``source``.

    The digest is the :func:`~certbench.data.dataset.dataset_digest` of its parts, training before test.
    """
    try:
        with safe_open(cache_path(name, root), framework="pt") as file:
            said = json.loads((file.metadata() or {})[METADATA])
            if said["source"] != source:
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        names = sorted({key.partition(".")[0] for key in tensors}, reverse=True)
        parts = {part: Split(tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in names}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, DataError):
        return None
    digest = dataset_digest(name, *parts.values())
    return (digest, parts) if digest == said["digest"] else None


def write_cache(name: str, root: Path, source: str, digest: str, parts: dict[str, Split]) -> None:
    """Write parts, all or nothing. Where the folder cannot be written to or is full, there will be no cache."""
    path = cache_path(name, root)
    scratch = path.with_name(f"{os.getpid()}.partial.{path.name}")
    tensors: dict[str, torch.Tensor] = {}
    for part, split in parts.items():
        tensors |= {f"{part}.images": split.images.contiguous(), f"{part}.labels": split.labels}
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, scratch, {METADATA: json.dumps({"source": source, "digest": digest})})
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
