"""The page: all boards in one HTML file that works from disk and asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from certbench.leaderboard.board import Board
    from certbench.leaderboard.comparison import Cell
    from certbench.leaderboard.published import Notes
    from certbench.leaderboard.tradeoff import Tradeoff

MARKER = "<!doctype html>\n<!-- certbench: derived from rows; do not edit -->\n"
"""How the page begins."""


def missing() -> str | None:
    """What to install before the page can be drawn; None where it can."""
    lacking = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if lacking:
        return f"its charts need {' and '.join(lacking)}; install them with `pip install 'certbench[page]'`"
    return None


def render(
    boards: Sequence[Board], tradeoffs: Sequence[Tradeoff], cells: Sequence[Cell], notes: Notes
) -> str:
    """The page of some boards and of the trade-offs between their rows. Every string is escaped by the template engine; its one script is named by its digest
    in the page's own content policy, so that nothing else could run or be fetched."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    from certbench.leaderboard.page.context import page

    folder = files(__package__)
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html.j2").render(
        **page(boards, tradeoffs, cells, notes),
        script=Markup(script),
        style=Markup(style),
        script_digest=digest,
    )
    return MARKER + text.rstrip() + "\n"
