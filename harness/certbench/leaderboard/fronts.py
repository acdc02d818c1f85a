"""Trade-offs between two figures of rows: which rows another one beats in both."""

from __future__ import annotations

from collections.abc import Sequence


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point, whether another is at least as good in both coordinates and better in one; larger is better.

    Linear but for the sort: by falling first coordinate, a point is beaten by what is above it so far.
    """
    order = sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1]))
    beaten = [False] * len(points)
    highest: tuple[float, float] | None = None
    for place in order:
        x, y = points[place]
        if highest is not None and (y < highest[1] or (y == highest[1] and x < highest[0])):
            beaten[place] = True
        else:
            highest = (x, y)
    return beaten
