"""The core's deterministic certifiers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from certbench.bounds import ibp
from certbench.contract import Certificates, CertifyTask
from certbench.errors import UsageError, nearest


@dataclass(frozen=True)
class Certifier:
    """A way to decide images; ``settings`` are what its results depend on, hashed into every row."""

    name: str
    summary: str
    certify: Callable[[CertifyTask], Iterable[Certificates]]
    settings: Mapping[str, object]


CERTIFIERS = {
    ibp.NAME: Certifier(
        ibp.NAME,
        "interval bounds, classification layer merged, float64, float-sound unless told otherwise",
        ibp.certify,
        ibp.SETTINGS,
    )
}


def find_certifier(name: str) -> Certifier:
    """
    Raises:
        UsageError: unknown name; says the nearest known one.
    """
    if name not in CERTIFIERS:
        raise UsageError(f"unknown certifier {name!r}; {nearest(name, CERTIFIERS)}")
    return CERTIFIERS[name]
