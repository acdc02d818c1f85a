"""Seeds derived from what should vary, so that reordering, resuming or skipping work changes no random number."""

from __future__ import annotations

import hashlib
import re


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for instance ``derive_seed(0, "shuffle", epoch)``.

    Different purposes give unrelated streams; the same arguments give the same seed on every machine.
    """
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def noise_words(run_id: str) -> bytes:
    """The 16 bytes that key all noise of one run; image, purpose and block are counted within them."""
    return hashlib.sha256(f"certbench noise/{run_id}".encode()).digest()[:16]


def noise_key(run_id: str, device_type: str) -> str:
    """What rows call a run's noise: the generator, which differs between kinds of device, and its key."""
    kind = "philox4x64-10" if device_type == "cpu" else f"torch-{device_type}-philox4x32-10"
    return f"{kind}:{noise_words(run_id).hex()}"


def noise_device(key: str, run_id: str) -> str | None:
    """The kind of device (``cpu``, ``cuda``) whose noise a row's key names; None where it is not that run's noise."""
    kind = re.match(r"torch-([a-z]{1,20})-", key)
    device = kind[1] if kind else "cpu"
    return device if key == noise_key(run_id, device) else None
