"""The README's promises, executed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest

from certbench.cli import cli
from certbench.plugins import Plugins
from certbench.run import run_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The code block between two markers."""
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    assert found is not None, name
    return found.group(1)


class Point(EntryPoint):
    """An entry point that loads a file."""

    def load(self) -> Any:
        spec = importlib.util.spec_from_file_location("my_method", self.value)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_the_plugin_of_the_readme_trains_certifies_and_records(tmp_path: Path) -> None:
    source = block("plugin")
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 30
    (tmp_path / "my_method.py").write_text(source)
    (tmp_path / "my-method.toml").write_text(block("recipe"))
    plugins = Plugins([Point("my-method", str(tmp_path / "my_method.py"), "certbench")])
    outcome = run_recipe(tmp_path / "my-method.toml", out=tmp_path / "out", device="cpu", plugins=plugins)
    assert outcome.clean_accuracy > 0.8


def commands() -> list[str]:
    """Every command line of certbench in the documentation."""
    found = set()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("docs/*.md"),
    ]:
        for code in re.findall(
            r"```(?:\w*)\n(.*?)```|`([^`\n]+)`", path.read_text(encoding="utf-8"), re.DOTALL
        ):
            for line in "".join(code).splitlines():
                line = line.split("#")[0].strip().removeprefix("uv run ")
                if line.startswith("certbench ") and "…" not in line:
                    found.add(line)
    return sorted(found)


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_documentation_is_understood(line: str) -> None:
    """Parsed by the real command line: unknown commands, options and missing arguments are caught."""
    words = shlex.split(line)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="certbench")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        inner = command.get_command(context, name)
        assert inner is not None, f"no command {name!r}"
        command, context = inner, click.Context(inner, parent=context, info_name=name)
    if words and words[0] not in {"RECIPE..."}:
        command.make_context(command.name, words, parent=context.parent, resilient_parsing=False)


def test_recipes_named_in_the_documentation_exist() -> None:
    from certbench.plugins import installed

    if "fast-ibp" not in installed().methods():
        pytest.skip("certbench-fast-ibp is not installed")
    named = set(re.findall(r"\bfast-ibp/[a-z0-9.-]+\b", README))
    assert named
    assert named <= set(installed().recipes())


def quickstart_rows() -> dict[str, dict[str, str]]:
    """Method -> header -> cell, of both boards that the quickstart prints."""
    found, headers = {}, []
    lines = block("quickstart").splitlines()
    for place, line in enumerate(lines):
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] == "method":
            headers, widths = cells, [m.span() for m in re.finditer("-+", lines[place + 1])]
        elif headers and len(cells) > 5 and not line.startswith("-"):
            found[cells[0]] = dict(zip(headers, (line[a:b].strip() for a, b in widths), strict=True))
    return found


def test_the_quickstart_tables_have_the_columns_and_methods_that_are_printed() -> None:
    from certbench.leaderboard.board import Board
    from certbench.leaderboard.columns import columns

    rows = quickstart_rows()
    assert set(rows) == {"fast-ibp", "adaptive-radii", "abstraction", "abstraction-ibp", "smoothmix", "crt"}
    for method, norm in (("fast-ibp", "linf"), ("crt", "l2")):
        known = [column.header for column in columns(Board("", "", "", norm, "", ()))]
        shown = [header for header in rows[method] if not header.startswith((">", "≥", "proved by"))]
        assert [header for header in shown if header not in known] == []
        assert shown == sorted(shown, key=known.index)
    cells = rows["fast-ibp"]
    assert {"clean %", "attacked %", "certified %", "ACR", "audit"} <= set(cells)
    assert (cells["certifier"], cells["guarantee"]) == ("ibp", "float_sound")
    assert rows["crt"]["guarantee"] == "statistical"


@pytest.mark.parametrize(
    ("name", "mark", "recipe"),
    [
        ("mnist-linf-0.1", "mnist", ""),
        ("mnist-l2-sigma-0.5--sequential-1-every-20", "mnist-l2", "mnist-l2-0.5-lenet-10ep"),
    ],
)
def test_the_mnist_rows_of_the_readme_are_those_of_the_board(name: str, mark: str, recipe: str) -> None:
    board = (ROOT / "leaderboards" / f"{name}.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, re.DOTALL)
    assert shown is not None
    measured = [set(cells) for cells in table_rows(board) if recipe in cells[1]]
    rows = [cells for cells in table_rows(shown.group(1)) if cells[0] != "method"]
    assert len(rows) >= 3
    for cells in rows:
        assert any(set(cells) <= known for known in measured), cells[0]


def test_what_the_readme_says_of_a_trade_off_is_what_was_generated() -> None:
    text = (ROOT / "leaderboards" / "tradeoff.md").read_text(encoding="utf-8")
    found = next(
        part
        for part in text.split("\n## ")
        if part.startswith("mnist, linf, cnn-small, cap 0.2, verifier ibp\n")
    ).splitlines()
    shown = re.search(r"<!-- tradeoff -->\n> (.*)\n<!-- /tradeoff -->", README)
    assert shown is not None and shown.group(1) in found


def table_rows(text: str) -> list[list[str]]:
    """The cells of every line of the Markdown tables in a text."""
    lines = [
        line.replace("\\_", "_").replace("&gt;", ">") for line in text.splitlines() if line.startswith("| ")
    ]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
