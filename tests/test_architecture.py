"""Imports go down only, as ``docs/architecture.md`` says."""

from __future__ import annotations

import ast
from pathlib import Path

import certbench

PACKAGE = Path(certbench.__file__).parent
GROUND = {"errors", "threat", "recipe", "seeding"}
CONTRACT = GROUND | {"contract", "hookspecs", "plugins", "suites"}
ALLOWED = {
    "errors": set(),
    "threat": set(),
    "seeding": set(),
    "recipe": {"errors", "threat"},
    "settings": {"errors", "recipe", "threat"},
    "contract": {"recipe", "data"},
    "hookspecs": {"contract", "data"},
    "plugins": GROUND | {"contract", "hookspecs", "data", "models"},
    "suites": {"errors", "recipe", "plugins"},
    "data": GROUND | {"contract"},
    "models": GROUND | {"data"},
    "stats": set(),
    "smoothing": CONTRACT | {"models", "data", "stats"},
    "results": CONTRACT | {"stats"},
    "bounds": CONTRACT | {"models", "data"},
    "audit": GROUND | {"contract", "data", "stats"},
    "training": CONTRACT | {"settings", "bounds", "data", "models"},
    "leaderboard": CONTRACT | {"results", "stats"},
    "export": CONTRACT | {"models", "data", "results"},
    "stages": CONTRACT | {"audit", "bounds", "smoothing", "models", "data", "results", "stats"},
    "run": CONTRACT | {"stages", "training", "audit", "bounds", "models", "data", "results"},
    "recorded": CONTRACT | {"run", "stages", "training", "results", "audit"},
    "recheck": CONTRACT | {"run", "stages", "training", "data", "results", "stats"},
}
"""Room -> rooms it may import. ``contract`` and ``hookspecs`` name types for annotations only; ``plugins`` joins what
is registered to the core's own data sets and networks."""


def imports_of(path: Path) -> set[str]:
    """The rooms that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (
                [node.module] if node.module != "certbench" else [f"certbench.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("certbench.")}
    return found


def test_imports_go_down_only() -> None:
    checked = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        room = parts[0]
        if room in ALLOWED:
            wrong = imports_of(path) - ALLOWED[room] - {room}
            assert not wrong, f"{'/'.join(parts)} imports {sorted(wrong)}"
            checked += 1
    assert checked > 20


def test_every_room_is_in_the_table() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - set(ALLOWED) == {"__init__", "__main__", "cli"}


def test_plugins_import_no_private_name_of_the_core() -> None:
    folder = PACKAGE.parent.parent / "plugins"
    for path in sorted(folder.rglob("certbench_*/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("certbench."):
                assert not [a.name for a in node.names if a.name.startswith("_")], path
