"""constraints.txt and the pins in pyproject.toml are written by one script and must not drift apart."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_constraints_and_pyproject_hold_the_same_pins() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["uv"]["constraint-dependencies"] == pins
    names = [re.split(r"[ =;]", pin)[0].lower() for pin in pins]
    assert {"torch", "numpy", "pyarrow", "pydantic", "foolbox", "onnx"} <= set(names)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = {
        re.split(r"[ =;]", pin)[0].lower()
        for pin in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["test"]]
    for requirement in wanted:
        assert re.split(r"[ <>=]", requirement)[0].lower() in pins, requirement


def test_nothing_names_a_package_registry() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not (ROOT / "uv.lock").exists() or "uv.lock" in (ROOT / ".gitignore").read_text()
