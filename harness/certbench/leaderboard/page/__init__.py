"""The page: all boards in one HTML file that works from disk and asks for nothing else."""

from __future__ import annotations

from importlib.util import find_spec


def missing() -> str | None:
    """What to install before the page can be drawn; None where it can."""
    lacking = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if lacking:
        return f"its charts need {' and '.join(lacking)}; install them with `pip install 'certbench[page]'`"
    return None
