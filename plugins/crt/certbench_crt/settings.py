"""The ``[method]`` table of CRT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from certbench.contract import TeacherSettings


class CRTSettings(TeacherSettings):
    """Defaults are those of the released code (arXiv 2210.14283); the keys of the teacher come from the core."""

    transfer_weight: float = Field(default=1.0, ge=0, le=1)
    """a: share of the transfer term; the rest is cross entropy. At 1 no label is used."""
    space: Literal["logits", "probs"] = "logits"
    """What is brought together: logits, as released, or their softmaxes."""
