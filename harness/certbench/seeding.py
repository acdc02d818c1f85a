"""Seeds derived from what should vary, so that reordering, resuming or skipping work changes no random number."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for instance ``derive_seed(0, "shuffle", epoch)``.

    Different purposes give unrelated streams; the same arguments give the same seed on every machine.
    """
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
