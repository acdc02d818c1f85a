"""Attacks by name: what is run, how often and for how long. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from certbench.errors import UsageError, nearest

NUMERICS = 1
"""Raised when a change of the attacks' code moves what they find; part of every settings digest."""

CHUNK = 500
"""Balls attacked at once. Part of the settings, because the shape of a batch decides the last bits of its results."""


@dataclass(frozen=True)
class Phase:
    """One search: ``restarts`` random starts of ``steps`` steps each.

    ``search`` is ``apgd`` (no step size to choose) or ``pgd``, whose steps are ``pgd_step / steps`` of the radius.
    ``loss`` is ``ce``, cross-entropy, or ``dlr``, the difference-of-logits ratio.
    """

    search: Literal["apgd", "pgd"]
    loss: Literal["ce", "dlr"]
    steps: int
    restarts: int = 1
    pgd_step: float = 2.5

    def __post_init__(self) -> None:
        if self.search not in ("apgd", "pgd") or self.loss not in ("ce", "dlr"):
            raise UsageError(
                f"no search {self.search!r} with loss {self.loss!r}; there are apgd, pgd and ce, dlr"
            )
        if self.steps < 1 or self.restarts < 1 or not 0 < self.pgd_step < float("inf"):
            raise UsageError(
                "a phase of an attack needs at least one step, one restart and a positive step size"
            )

    @property
    def words(self) -> str:
        restarts = "" if self.restarts == 1 else f", {self.restarts} restarts"
        return f"{self.search.upper()}-{self.loss.upper()} {self.steps} steps{restarts}"


@dataclass(frozen=True)
class Attack:
    """Phases one after the other; a later one only sees the balls that earlier ones left unbroken."""

    name: str
    phases: tuple[Phase, ...]

    @property
    def summary(self) -> str:
        return "; ".join(phase.words for phase in self.phases)

    @property
    def settings_digest(self) -> str:
        """Names all that the attack's findings depend on besides network, images, radii and seed."""
        content = {"numerics": NUMERICS, "chunk": CHUNK, "phases": [asdict(phase) for phase in self.phases]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SmoothedAttack:
    """How statistical certificates are audited: at most ``images`` of them, evenly spread.

    ``recount`` fresh draws at the image; ``steps`` of normalised gradient ascent through the average softmax of
    ``samples`` draws, of ``reach`` radii in all; a rival from ``selection`` draws, tested on ``test`` others.
    """

    name: str
    images: int
    recount: int
    steps: int
    samples: int
    selection: int
    test: int
    reach: float = 2.5

    @property
    def summary(self) -> str:
        return (
            f"recount of {self.recount} draws; PGD {self.steps} steps through {self.samples} draws, "
            f"tested on {self.test}; at most {self.images} images"
        )

    @property
    def settings_digest(self) -> str:
        """Names all that the findings depend on besides network, images, radii and seed."""
        content = {"numerics": NUMERICS, **asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


ATTACKS: dict[str, Attack] = {}
DEFAULT = "standard"


def register_attack(attack: Attack) -> Attack:
    """Make an attack known by its name.

    Raises:
        UsageError: the name is taken, or the attack has no phase.
    """
    if attack.name in ATTACKS:
        raise UsageError(f"attack {attack.name!r} is registered twice")
    if not attack.phases:
        raise UsageError(f"attack {attack.name!r} does nothing: it has no phase")
    ATTACKS[attack.name] = attack
    return attack


def find_attack(name: str) -> Attack:
    """
    Raises:
        UsageError: unknown name; says the nearest known one.
    """
    if name not in ATTACKS:
        raise UsageError(f"unknown attack {name!r}; {nearest(name, ATTACKS)}")
    return ATTACKS[name]


def find_smoothed_attack(name: str) -> SmoothedAttack:
    """The audit of statistical certificates that goes by an attack's name.

    Raises:
        UsageError: there is none.
    """
    if name not in SMOOTHED:
        raise UsageError(
            f"attack {name!r} cannot audit statistical certificates; {' and '.join(SMOOTHED)} can"
        )
    return SMOOTHED[name]


SMOOTHED = {
    attack.name: attack
    for attack in (
        SmoothedAttack(DEFAULT, images=200, recount=2_000, steps=10, samples=8, selection=100, test=1_000),
        SmoothedAttack(
            "strong", images=1_000, recount=10_000, steps=40, samples=32, selection=200, test=5_000
        ),
    )
}


register_attack(Attack(DEFAULT, (Phase("apgd", "ce", 20), Phase("apgd", "dlr", 20))))
register_attack(Attack("strong", (Phase("apgd", "ce", 100, 3), Phase("apgd", "dlr", 100, 3))))
register_attack(Attack("pgd", (Phase("pgd", "ce", 40),)))
register_attack(Attack("pgd-dlr", (Phase("pgd", "dlr", 40),)))
register_attack(Attack("apgd-ce", (Phase("apgd", "ce", 100),)))
register_attack(Attack("apgd-dlr", (Phase("apgd", "dlr", 100),)))
