"""The ``[method]`` table of CRT."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from certbench.contract import TeacherSettings
from certbench.settings import refuse_alpha


class CRTSettings(TeacherSettings):
    """Defaults are those of the released code (arXiv 2210.14283); the keys of the teacher come from the core."""

    transfer_weight: float = Field(default=1.0, ge=0, le=1)
    """a: share of the transfer term; the rest is cross entropy. At 1 no label is used."""
    space: Literal["logits", "probs"] = "logits"
    """What is brought together: logits, as released, or their softmaxes."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_alpha_that_is_meant(cls, table: Any) -> Any:
        return refuse_alpha(table, "the share of the transfer term is transfer_weight")
