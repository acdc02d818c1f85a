"""How long the stages of a run take, and how much memory of the device."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from certbench.contract import Reporter
from certbench.results import provenance
from certbench.results.files import write_atomically
from certbench.results.store import ResultStore


class Timer:
    """Seconds and peak memory of a stage; a resumed stage has a row for each session.

    What a session has cost is kept in the run's folder whenever its work is saved, so that one that is broken off counts
    as far as another goes on from it. Nothing is recorded of a stage that is not finished.

    Args:
        folder: the run's.
        goes_on: what earlier sessions saved is there to go on from.
    """

    def __init__(
        self, store: ResultStore, run_id: str, stage: str, device: torch.device, folder: Path, goes_on: bool
    ) -> None:
        self.store, self.device = store, device
        self._session = {"run_id": run_id, "stage": stage, "started_at": provenance.now()}
        self._kept = folder / f".cost-{stage}.json"
        self._earlier = _sessions(self._kept, run_id, stage) if goes_on else []
        self.began = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def keep(self) -> None:
        """Write down in the run's folder what has passed since the timer was made."""
        on_gpu = self.device.type == "cuda"
        cpu = f"cpu, {torch.get_num_threads()} threads"
        now = {
            **self._session,
            "seconds": time.perf_counter() - self.began,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else cpu,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        }
        write_atomically(self._kept, json.dumps([*self._earlier, now]).encode())

    def record(self) -> None:
        """Record the stage as finished: this session, and those that it went on from."""
        self.keep()
        for session in json.loads(self._kept.read_text(encoding="utf-8")):
            self.store.write_timing(session)
        self._kept.unlink()


def _sessions(path: Path, run_id: str, stage: str) -> list[dict[str, Any]]:
    """What :meth:`Timer.keep` has left; nothing where it cannot be read, since a cost is no reason to stop."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [session for session in found if (session["run_id"], session["stage"]) == (run_id, stage)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


@dataclass(frozen=True)
class KeepsCost:
    """A reporter that keeps a timer whenever an epoch's checkpoint is written, and passes everything on."""

    inner: Reporter
    timer: Timer

    def stage(self, title: str, total: int, unit: str) -> None:
        self.inner.stage(title, total, unit)

    def advance(self, done: int, **figures: float) -> None:
        self.inner.advance(done, **figures)

    def epoch_done(self, epoch: int, epochs: int, seconds: float, figures: Mapping[str, float]) -> None:
        self.timer.keep()
        self.inner.epoch_done(epoch, epochs, seconds, figures)

    def say(self, line: str) -> None:
        self.inner.say(line)
