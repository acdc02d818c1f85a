"""What a reader copies to run a row again: its recipe as TOML, and the command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from certbench.leaderboard.row import Row
from certbench.recipe import split_name

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def recipe_toml(row: Row) -> str:
    """The resolved recipe of a row's first seed, every default written out; reads back to the same recipe."""
    recipe = json.loads(row.run["recipe"])
    recipe.pop("name", None)
    return to_toml(recipe)


def to_toml(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Plain JSON values as TOML; what is null is left out, since TOML has no word for it."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict) and value is not None}
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and plain else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    parts = ["\n".join(lines)] if lines else []
    parts += [to_toml(value, (*path, key)).rstrip("\n") for key, value in inner.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return re.sub(
            r"[\x7f-\x9f]", lambda c: f"\\u{ord(c.group()):04x}", json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)


def commands(row: Row) -> list[str]:
    """The command lines that make the row's figures again; a recipe that no plugin ships is saved as a file first."""
    name, changes = split_name(row.recipe)
    shipped = name.startswith(f"{row.method}/")
    words = ["certbench", "run", name if shipped else "recipe.toml"]
    if shipped:
        words += [word for change in changes for word in ("--set", change)]
    words += ["--seeds", ",".join(map(str, row.seeds))]
    lines = [shlex.join(words)]
    again = _certified_again(row)
    if again:
        lines.append(shlex.join(["certbench", "certify", *row.run_ids, *again]))
    return lines


def _certified_again(row: Row) -> list[str]:
    """The options with which a finished run was certified in another way than its recipe says."""
    asked = json.loads(row.run["recipe"]).get("certify") or {}
    words = []
    if row.certifier not in (asked.get("certifier") or row.certifier, row.method):
        words += ["--certifier", row.certifier]
    # Another certifier brings a guarantee of its own, so what the recipe asks for says nothing then.
    same = not words and asked.get("guarantee") in (None, row.guarantee)
    if row.guarantee in ("float_sound", "real_arith") and not same:
        words += ["--guarantee", row.guarantee]
    if asked.get("deploy") not in (None, row.deploy):
        words += ["--deploy", row.deploy]
    return words
