"""What the page's template shows of a trade-off: plain values, escaped by the template."""

from __future__ import annotations

from typing import Any

from certbench.leaderboard import sentences
from certbench.leaderboard.escape import printable
from certbench.leaderboard.page.charts import drawn, label, slot, staircases
from certbench.leaderboard.tradeoff import Tradeoff


def front(found: Tradeoff) -> dict[str, Any]:
    terms = found.terms
    at = f"radius {terms.decided_at}, " if terms.decided_at else ""
    fronts = sorted(found.fronts, key=lambda one: (-one.hypervolume, one.method))
    return {
        "title": printable(f"{terms.dataset}, {terms.norm}, {terms.model}"),
        "terms": printable(f"{at}cap {terms.cap:g}, verifier {terms.verifier}, {terms.guarantee}"),
        "legend": [
            (label(place), slot(place), printable(one.method))
            for place, one in enumerate(fronts)
            if drawn(one, fronts)
        ],
        "chart": staircases(fronts),
        "area_headers": sentences.AREAS,
        "areas": [_unbroken(line) for line in sentences.areas(found)],
        "claims": [sentences.claim(one, printable) for one in found.claims],
        "unclaimed": [sentences.no_claim(method, printable) for method in found.unclaimed],
        "point_headers": sentences.POINTS,
        "points": [list(map(printable, line)) for line in sentences.points(found)],
        "notes": sentences.notes(terms),
    }


def _unbroken(line: list[str]) -> list[str]:
    """The cells of a line, a seed and its figure kept together."""
    return [printable(cell).replace(": ", ":\N{NO-BREAK SPACE}") for cell in line]
