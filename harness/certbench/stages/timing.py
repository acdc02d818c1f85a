"""How long the stages of a run take, and how much memory of the device."""

from __future__ import annotations

import time

import torch

from certbench.results import provenance
from certbench.results.store import ResultStore


class Timer:
    """Seconds and peak memory of a stage; a resumed stage adds a row for each session."""

    def __init__(self, store: ResultStore, run_id: str, stage: str, device: torch.device) -> None:
        self.store, self.run_id, self.stage, self.device = store, run_id, stage, device
        self.started_at = provenance.now()
        self.began = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def record(self) -> None:
        """Write what has passed since the timer was made."""
        on_gpu = self.device.type == "cuda"
        cpu = f"cpu, {torch.get_num_threads()} threads"
        self.store.write_timing(
            {
                "run_id": self.run_id,
                "stage": self.stage,
                "seconds": time.perf_counter() - self.began,
                "device": torch.cuda.get_device_name(self.device) if on_gpu else cpu,
                "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
                "started_at": self.started_at,
            }
        )
