"""Checkpoints: one safetensors file and one JSON sidecar per epoch, the sidecar written last.

A checkpoint counts only when its sidecar is there and the tensors match the size and digest it names, so a crash at
any moment leaves either the previous checkpoint or the new one. Nothing is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from certbench.errors import RunError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """State after ``epoch`` finished epochs: network, optimiser, and figures of each epoch so far."""

    epoch: int
    network: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: list[dict[str, float]]
    path: Path


def save_checkpoint(
    folder: Path,
    epoch: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
) -> Path:
    """Write the checkpoint of an epoch, then remove the one before it.

    Raises:
        RunError: the folder cannot be written; the previous checkpoint stays.
    """
    tensors = {f"network/{name}": _plain(t) for name, t in network.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": _plain(t) for key, t in values.items()}
    path = folder / f"epoch-{epoch:04d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = write_tensors(path, tensors)
        sidecar = {
            "format": FORMAT,
            "epoch": epoch,
            "sha256": digest,
            "bytes": path.stat().st_size,
            "history": history,
        }
        _replace(path.with_suffix(".json"), json.dumps(sidecar, indent=1, allow_nan=False).encode())
        for old in folder.glob("epoch-*"):
            if old.stem != path.stem:
                old.unlink()
    except OSError as error:
        raise RunError(f"cannot write checkpoint {path}: {error.strerror or error}") from error
    return path


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None where there is none.

    Raises:
        RunError: the newest checkpoint is damaged; names the file and how to go on.
    """
    sidecars = sorted(folder.glob("epoch-*.json"))
    return _load(sidecars[-1]) if sidecars else None


def _load(sidecar: Path) -> Checkpoint:
    path = sidecar.with_suffix(".safetensors")
    hint = f"delete {path.with_suffix('').name}.* in {path.parent} to train again from the start"
    try:
        notes = json.loads(sidecar.read_text())
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise RunError(f"checkpoint {sidecar} cannot be read ({type(error).__name__}); {hint}") from None
    if not _is_sidecar(notes):
        raise RunError(f"checkpoint {sidecar} is not a checkpoint of format {FORMAT}; {hint}")
    if len(content) != notes["bytes"]:
        raise RunError(f"checkpoint {path} is cut short: {len(content)} of {notes['bytes']} bytes; {hint}")
    if hashlib.sha256(content).hexdigest() != notes["sha256"]:
        raise RunError(f"checkpoint {path} is damaged: its digest does not match its sidecar; {hint}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise RunError(f"checkpoint {path} is damaged: {error}; {hint}") from None
    return Checkpoint(
        notes["epoch"], _part(tensors, "network/"), _part(tensors, "optimizer/"), notes["history"], path
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved moments and step counts back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def network_digest(network: nn.Module) -> str:
    """The SHA-256 that the file of :func:`save_network` has."""
    return hashlib.sha256(save(_tensors(network))).hexdigest()


def save_network(path: Path, network: nn.Module) -> None:
    """Write the trained network alone.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        _replace(path, save(_tensors(network)))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file whole or not at all; returns its SHA-256."""
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    content = partial.read_bytes()
    _flush(partial)
    os.replace(partial, path)
    return hashlib.sha256(content).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _plain(tensor: Tensor) -> Tensor:
    """safetensors refuses shared memory and layouts other than the default one."""
    return tensor.detach().cpu().contiguous().clone()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: _plain(tensor) for name, tensor in network.state_dict().items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _is_sidecar(notes: Any) -> bool:
    kinds = {"format": int, "epoch": int, "bytes": int, "sha256": str, "history": list}
    return (
        isinstance(notes, dict)
        and all(isinstance(notes.get(key), kind) for key, kind in kinds.items())
        and notes["format"] == FORMAT
        and notes["epoch"] == len(notes["history"]) > 0
    )
