"""What a trade-off says in words: tables of points and areas, and claims made by a template, never typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tabulate import tabulate

from certbench.leaderboard import escape
from certbench.leaderboard.tables import MARKER
from certbench.leaderboard.tradeoff import BASELINE, Claim, Front, Point, Terms, Tradeoff
from certbench.recipe import VERDICT_ONLY
from certbench.stats.fronts import Estimate, Ratio

Escape = Callable[[str], str]
"""Makes the name of a method or setting inert for the place that it is shown in."""

POINTS = (
    "method",
    "setting",
    "epochs",
    "seeds",
    "clean %",
    "ACR/cap %",
    "front",
    "cap",
    "verifier",
    "tolerance",
)
AREAS = ("method", "settings", "hypervolume", "of each seed")


def page(found: Sequence[Tradeoff]) -> str:
    """All trade-offs of a store as one Markdown page."""
    parts = [MARKER, "# Accuracy against robustness", *map(markdown, found)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def markdown(found: Tradeoff) -> str:
    """The table of points, the areas, and the sentences, as Markdown."""
    claims = [claim(one, escape.markdown) for one in found.claims]
    parts = [
        f"## {escape.markdown(title(found.terms))}",
        _table(POINTS, points(found), ("left", "left", *("right",) * 4, "left", "right", "left", "right")),
        _table(AREAS, areas(found), ("left", "right", "right", "left")),
        *(part for sentence, lines in claims for part in (sentence, _bullets(lines)) if part),
        *(no_claim(method, escape.markdown) for method in found.unclaimed),
        _bullets(notes(found.terms)),
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]], align: Sequence[str]) -> str:
    cells = [[escape.markdown(cell) for cell in line] for line in lines]
    return tabulate(cells, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def title(terms: Terms) -> str:
    at = [f"radius {terms.decided_at}"] if terms.decided_at else []
    return ", ".join(
        [terms.dataset, terms.norm, terms.model, *at, f"cap {terms.cap:g}", f"verifier {terms.verifier}"]
    )


def points(found: Tradeoff) -> list[list[str]]:
    """A line for every setting, in the columns :data:`POINTS`."""
    return [_point(front, point, found.terms) for front in found.fronts for point in front.points]


def _point(front: Front, point: Point, terms: Terms) -> list[str]:
    return [
        front.method,
        point.setting,
        ", ".join(map(str, point.epochs)),
        str(len(point.seeds)),
        f"{100 * point.accuracy:.2f}",
        f"{100 * point.robustness:.2f}" + ("" if point.beyond_constant else " †"),
        "yes" if point.on_front else "",
        f"{terms.cap:g}",
        terms.verifier,
        "" if terms.tolerance is None else f"{terms.tolerance:.1e}",
    ]


def areas(found: Tradeoff) -> list[list[str]]:
    """A line for every method, the largest area first, in the columns :data:`AREAS`."""
    return [
        [
            front.method,
            str(len(front.points)),
            f"{front.hypervolume:.4f}",
            ", ".join(f"{seed}: {area:.4f}" for seed, area in front.of_seeds.items()),
        ]
        for front in sorted(found.fronts, key=lambda front: -front.hypervolume)
    ]


def claim(of: Claim, inert: Escape) -> tuple[str, list[str]]:
    """The claim of one method, which says which ratio, where, and how sure; and a line for each baseline point."""
    comparison = of.comparison
    who = f"{inert(of.challenger)} against {inert(of.baseline)}"
    if comparison.largest is None:
        return f"{who}: the baseline has no point with any robustness, so there is no ratio.", []
    at = max(comparison.ratios, key=lambda ratio: ratio.ratio.value)
    reached = sum(ratio.reached for ratio in comparison.ratios)
    words = [
        f"{who}, ACR at matched clean accuracy, {_count(len(of.seeds), 'seed')}:",
        f"up to {_times(comparison.largest)}, at baseline accuracy {100 * at.accuracy:.2f} %{_dominated(at)};",
        f"up to {_times(comparison.on_front)} over the points of the baseline's own front;"
        if comparison.on_front
        else "",
        f"geometric mean {_times(comparison.mean)} over the {reached} of "
        f"{_count(len(comparison.ratios), 'baseline point')} that it reaches;"
        if comparison.mean
        else f"it reaches none of {_count(len(comparison.ratios), 'baseline point')};",
        f"up to {_times(comparison.beyond_constant)} where the baseline beats a constant classifier."
        if comparison.beyond_constant
        else "the baseline beats a constant classifier nowhere.",
        _areas(of),
    ]
    lines = [
        f"at baseline accuracy {100 * r.accuracy:.2f} % ({inert(of.settings[r.setting])}){_dominated(r)} the ratio is "
        f"{_times(r.ratio)}, by the concave hull {r.hull:.2f}"
        if r.reached
        else f"at baseline accuracy {100 * r.accuracy:.2f} % ({inert(of.settings[r.setting])}) it has no "
        "point that accurate"
        for r in sorted(comparison.ratios, key=lambda r: -r.accuracy)
    ]
    if of.left_out:
        names = ", ".join(map(inert, of.left_out))
        lines.append(f"left out, not run with all of seeds {', '.join(map(str, of.seeds))}: {names}")
    return " ".join(word for word in words if word), lines


def _dominated(ratio: Ratio) -> str:
    return "" if ratio.on_front else " (a point that another of the baseline's dominates)"


def _areas(of: Claim) -> str:
    """Whether the hypervolume is larger, seed by seed."""
    larger = sum(area > 0 for area in of.areas.values())
    listed = ", ".join(f"{seed}: {area:+.4f}" for seed, area in of.areas.items())
    return f"Hypervolume less the baseline's, of each seed: {listed}; larger on {larger} of {len(of.areas)}."


def no_claim(method: str, inert: Escape) -> str:
    return f"{inert(method)} against {BASELINE}: no seed in common, so nothing is claimed."


def _times(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [95% CI {estimate.low:.2f}, {estimate.high:.2f}]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notes(terms: Terms) -> list[str]:
    """How to read the tables and the claims."""
    constant = f"{100 * terms.majority:.2f} %"
    decided = (
        f"A bound marked {VERDICT_ONLY} decides at radius {terms.decided_at} and proves no other, so an image that it alone "
        "proves counts with that radius; tolerance is that of the other bounds."
    )
    return [
        *([decided] if terms.decided_at else []),
        "tolerance: the width to which the radius search closes in on the end of what it proves, as a share of the cap; "
        "where bounds are not monotone, as linear ones, it may miss a larger radius beyond a gap.",
        f"Points are means over seeds and all test images; radii are {terms.guarantee} certificates, a misclassified "
        "image counting 0.",
        f"†: at most what a constant classifier has, {constant} of the cap.",
        f"Hypervolume: area above ({constant}, 0), the commonest class and no robustness, as shares of 1; "
        "of each seed: over the settings that have all the seeds shown.",
        "Ratios: the best ACR among a method's points at least as accurate as the baseline's point (staircase rule), over "
        "the baseline's, over the seeds that are named; 0 where there is none so accurate; the baseline is never interpolated. "
        "Intervals: paired bootstrap over test images nested in seeds (one seed fewer than there are, as in the boards), 1,000 "
        "resamples, the maximum and the mean inside, the mean over all baseline points that are reached in the resample (one that reaches "
        "none has no mean).",
    ]
