"""Charts of a board as inline SVG, drawn by Vega-Altair with equal bytes for equal rows.

A chart holds numbers and letters only: rows are called A, B, C as in the table beside it, so no text of strangers gets
in, and no size depends on the fonts of a machine. Colours are names of the page's own (``var(--s1)``), which differ in
light and dark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import vl_convert

from certbench.leaderboard.board import Board
from certbench.leaderboard.metrics import PA_BINS
from certbench.leaderboard.row import Row
from certbench.leaderboard.tradeoff import Front, Point
from certbench.stats.fronts import nondominated

SERIES = 8
"""Rows with a colour of their own; the ones below share grey."""
DRAWN = 40
"""Rows that are drawn at all: beyond these a chart is a blot."""
_WIDTH, _HEIGHT = 340, 230
_PADDING = {"left": 48, "top": 10, "right": 14, "bottom": 44}
_INK = {
    "#b00000": "var(--ink)",
    "#b00001": "var(--grid)",
    "#b00002": "var(--muted)",
    "#b00003": "var(--paper)",
}
_COLOURS = {f"#a0000{slot}": f"var(--s{slot})" for slot in range(SERIES + 1)}


@dataclass(frozen=True)
class Chart:
    """An SVG with what it shows in words, for its caption and for those who cannot see it."""

    title: str
    words: str
    svg: str


def label(place: int) -> str:
    """A, B, ... Z, AA, AB, ...: what a row is called in table and charts."""
    letters = ""
    place += 1
    while place:
        place, rest = divmod(place - 1, 26)
        letters = chr(65 + rest) + letters
    return letters


def slot(place: int) -> int:
    """The number of a row's colour; 0 is grey."""
    return place + 1 if place < SERIES else 0


def charts(board: Board) -> list[Chart]:
    """The charts of a board's complete rows; those that would show nothing are left out.

    What is drawn against ACR are the rows that ACR compares with one another, the largest such group.
    """
    rows = [(place, row) for place, row in enumerate(board.rows[:DRAWN]) if row.complete]
    unit = "ACR" if board.smoothed else "certified accuracy"
    rivals = rows
    if board.smoothed:
        group = next(iter(board.comparable()), [])
        rivals = [(place, row) for place, row in rows if place in group]
    found = [
        _curves(rows),
        _front(
            rivals,
            board,
            lambda row: row.clean.mean,
            "clean accuracy, %",
            f"Clean accuracy against {unit}",
            sense=1,
        ),
        _front(
            rivals, board, lambda row: row.train_seconds, "training, s", f"Cost of training against {unit}"
        ),
        _front(
            rivals,
            board,
            lambda row: row.certify_seconds,
            "certification, s",
            f"Cost of certification against {unit}",
        ),
        _hits(rows),
    ]
    return [chart for chart in found if chart is not None]


Placed = Sequence[tuple[int, Row]]


def _curves(rows: Placed) -> Chart | None:
    values = [
        {"x": _short(radius), "y": _short(percent), "row": place, "slot": slot(place)}
        for place, row in reversed(rows)  # the best on top
        for radius, percent in row.curve
    ]
    if not values:
        return None
    ends = [row.curve[-1][0] for _, row in rows if row.curve]
    return Chart(
        "Certified accuracy over radius",
        f"One line per row: the share of images whose certified radius is at least so large, up to {max(ends):.4g}.",
        _draw("line", ("certified radius", "certified accuracy, %"), values),
    )


def _front(
    rows: Placed,
    board: Board,
    measure: Callable[[Row], float | None],
    x_title: str,
    title: str,
    sense: int = -1,
) -> Chart | None:
    """``sense`` is 1 where a larger x is better. A dominated row is hollow; a line joins the others."""
    points = [
        (place, x, figure.mean)
        for place, row in rows
        if (x := measure(row)) and (figure := row.acr if board.smoothed else row.certified)
    ]
    if len(points) < 2:
        return None
    beaten = ~nondominated(np.array([(sense * x, y) for _, x, y in points]))
    values = [
        {
            "x": _short(x),
            "y": _short(y),
            "row": label(place),
            "slot": slot(place),
            "fill": -1 if worse else slot(place),
            "front": not worse,
        }
        for (place, x, y), worse in zip(points, beaten, strict=True)
    ]
    names = ", ".join(label(place) for (place, _, _), worse in zip(points, beaten, strict=True) if not worse)
    kind = "front" if sense > 0 else "cost"
    of = f" that may be compared by ACR with {label(points[0][0])}" if board.smoothed else ""
    y_title = "average certified radius" if board.smoothed else "certified accuracy, %"
    return Chart(
        title,
        f"One point per row{of}. No other row is better in both than {names}; the hollow ones are dominated.",
        _draw(kind, (x_title, y_title), values),
    )


def _hits(rows: Placed) -> Chart | None:
    """The distribution of k / n, how often the class that was tested was hit."""
    values = []
    for place, row in reversed(rows):
        if row.sampling is None:
            continue
        total = sum(row.sampling.hits)
        values += [
            {"x": _short(at / PA_BINS), "y": _short(100 * hits / total), "row": place, "slot": slot(place)}
            for at, hits in enumerate((*row.sampling.hits, row.sampling.hits[-1]))
        ]
    if not values:
        return None
    return Chart(
        "Hits of the class under noise",
        "One line per row: the share of images whose class is hit in so large a part k / n of the draws.",
        _draw("steps", ("hits, k / n", "images, %"), values),
    )


def drawn(front: Front, fronts: Sequence[Front]) -> list[Point]:
    """The points of a front that a chart shows: those more robust than a constant classifier, which would press the rest
    together; or all where none of any front is."""
    any_beyond = any(point.beyond_constant for one in fronts for point in one.points)
    return [point for point in front.points if point.beyond_constant or not any_beyond]


def staircases(fronts: Sequence[Front]) -> Chart:
    """The fronts of some methods, in the order of their letters."""
    values = [
        {
            "x": _short(100 * point.accuracy),
            "y": _short(100 * point.robustness),
            "of": place,
            "row": label(place) if point.on_front else "",
            "slot": slot(place),
            "fill": slot(place) if point.on_front else -1,
            "front": point.on_front,
        }
        for place, front in reversed(list(enumerate(fronts)))  # the largest area on top
        for point in drawn(front, fronts)
    ]
    left_out = len(values) < sum(len(front.points) for front in fronts)
    return Chart(
        "Clean accuracy against ACR",
        "One point per setting, the mean of its seeds; up and to the right is better. A step is what a method's front "
        "reaches at that accuracy or a higher one; hollow settings are dominated by others of their method."
        + (" Not drawn: what has no larger ACR than a constant classifier." if left_out else ""),
        _draw("staircase", ("clean accuracy, %", "ACR, % of the cap"), values),
    )


def _short(value: float) -> float:
    """Four significant digits: finer than a pixel."""
    return float(f"{value:.4g}")


# Drawing -----------------------------------------------------------------------------------------------------------


def _draw(kind: str, titles: tuple[str, str], values: list[dict[str, Any]]) -> str:
    specification = json.loads(_vega(kind, titles))
    (source,) = [data for data in specification["data"] if data["name"] == "rows"]
    source["values"] = values
    if kind == "cost":
        for axis in specification["axes"]:
            if axis["scale"] == "x":
                axis["values"] = _ticks([value["x"] for value in values])
    return _lean(vl_convert.vega_to_svg(specification))


def _ticks(values: Sequence[float]) -> list[float]:
    """Three round numbers or more within the values' range for a logarithmic axis, and otherwise its ends."""
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        inside = [float(f"{step}e{decade}") for decade in decades for step in steps]
        inside = [value for value in inside if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return sorted({low, high})


@cache
def _vega(kind: str, titles: tuple[str, str]) -> str:
    """The chart without its rows, as Vega: Altair's and Vega-Lite's part of the work is done once for all boards."""
    x_title, y_title = titles
    rows = alt.NamedData(name="rows")
    slots = list(range(SERIES + 1))
    colour = alt.Scale(domain=[-1, *slots], range=["#b00003", *_COLOURS])
    room = 0 if kind in ("line", "steps") else 18  # pixels between points and edge
    x_scale = alt.Scale(type="log" if kind == "cost" else "linear", zero=False, nice=False, padding=room)
    y_scale = alt.Scale(zero=False, nice=not room, padding=room)
    axis: dict[str, Any] = {"labelOverlap": False, "tickCount": 5}
    x = alt.X("x:Q", title=x_title, scale=x_scale, axis=alt.Axis(**axis, format=",.4~r"))
    y = alt.Y("y:Q", title=y_title, scale=y_scale, axis=alt.Axis(**axis, minExtent=30, maxExtent=30))
    base = alt.Chart(rows).encode(x=x, y=y)
    if kind in ("line", "steps"):
        shape: Any = "step-after" if kind == "steps" else "linear"
        drawn: Any = base.mark_line(strokeWidth=1.8, interpolate=shape, strokeJoin="round").encode(
            detail="row:N", color=alt.Color("slot:N", scale=colour, legend=None)
        )
    else:
        line = base.transform_filter("datum.front").encode(order="x:Q")
        if kind == "staircase":  # one of each method; what a point reaches holds to the left of it
            line = line.mark_line(strokeWidth=1.4, interpolate="step-before").encode(
                detail="of:N", color=alt.Color("slot:N", scale=colour, legend=None)
            )
        else:
            line = line.mark_line(strokeWidth=1.2, strokeDash=[4, 3], color="#b00002")
        points = base.mark_point(size=70, strokeWidth=1.8, filled=False).encode(
            stroke=alt.Stroke("slot:N", scale=colour, legend=None),
            fill=alt.Fill("fill:N", scale=colour, legend=None),
        )
        names = base.mark_text(dx=9, dy=-7, fontSize=11, color="#b00000").encode(text="row:N")
        drawn = line + points + names
    drawn = drawn.properties(width=_WIDTH, height=_HEIGHT, padding=_PADDING)
    drawn = drawn.properties(autosize=alt.AutoSizeParams(type="none"))
    return json.dumps(vl_convert.vegalite_to_vega(_configured(drawn).to_dict()))


def _configured(chart: Any) -> Any:
    return (
        chart.configure(aria=False, background="transparent", font="sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            domain=False,
            ticks=False,
            gridColor="#b00001",
            labelColor="#b00002",
            labelFontSize=11,
            labelPadding=6,
            titleColor="#b00002",
            titleFontSize=11,
            titleFontWeight="normal",
            titlePadding=8,
        )
    )


_NOISE = re.compile(
    r' (?:class|role|aria-[a-z]+|pointer-events|font-family|font-weight|stroke-miterlimit|xmlns:xlink|version)="[^"]*"'
    r'| opacity="1"| display="none"| fill-opacity="1"| transform="translate\(0,0\)"'
)
_NUMBER = re.compile(r"-?[0-9]+\.[0-9]+")
_EMPTY = re.compile(r'<path d="(?:M0,0h0v0h0Z)?"/>|<g></g>|<path[^>]* d=""/>|<g/>')


def _lean(svg: str) -> str:
    """The drawing with the page's colours, and without what only scripts of Vega would use: half the size."""
    svg = _NOISE.sub("", svg)
    svg = re.sub(
        r'(?<==")[^"]*', lambda value: _NUMBER.sub(_tenth, value.group()), svg
    )  # attributes, not labels
    before = ""
    while before != svg:
        before, svg = svg, _EMPTY.sub("", svg)
    for written, named in {**_INK, **_COLOURS}.items():
        svg = svg.replace(written, named)
    return re.sub(r'^<svg [^>]*?width="([0-9.]+)" height="([0-9.]+)" viewBox="[^"]*">', _opening, svg)


def _tenth(number: re.Match[str]) -> str:
    return f"{float(number.group()):.1f}".removesuffix(".0")


def _opening(found: re.Match[str]) -> str:
    width, height = found.groups()
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
