"""What the page and the card say is what rows, settings and files say."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from certbench.plugins import installed
from certbench.run import run_recipe
from certbench_abstraction.report import HEADERS, NONE, table
from certbench_abstraction.settings import AbstractionIBPSettings, Ladder, Released, Search

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "abstraction.md"
CARD = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="the plugin was taken out of its repository")
def test_the_measured_table_is_what_the_rows_say() -> None:
    block = re.search(
        r"<!-- measured -->\n(.*?)\n<!-- /measured -->", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert block is not None
    assert block.group(1) == table(ROOT / "leaderboards")


def test_the_report_splits_certified_accuracy_by_proof(tmp_path: Path) -> None:
    assert table(tmp_path) == NONE
    outcome = run_recipe(
        "abstraction/digits-linf-0.1", out=tmp_path, device="cpu", overrides=["train.epochs=3"]
    )
    header, rule, line = table(tmp_path).splitlines()
    cells = dict(zip(HEADERS, [cell.strip() for cell in line.strip("|").split("|")], strict=True))
    assert len(rule.split("|")) == len(header.split("|"))
    clean, attacked, certified = (float(cells[name]) for name in (HEADERS[7], "attacked %", "certified %"))
    assert certified <= attacked <= clean
    assert clean == pytest.approx(100 * outcome.clean_accuracy, abs=0.01)
    assert certified == pytest.approx(100 * outcome.certified_accuracy, abs=0.01)
    split = sum(
        float(cells[name]) for name in ("single-cell", "cell-ibp", "linear", "enumeration", "branching")
    )
    assert split == pytest.approx(certified, abs=0.03)
    assert clean == pytest.approx(
        certified + float(cells["falsified %"]) + float(cells["unknown %"]), abs=0.03
    )


def test_the_card_names_every_setting() -> None:
    text = CARD.read_text(encoding="utf-8")
    named = set(re.findall(r"`\.?([a-z_.]+)`", text))
    named |= {name.rpartition(".")[2] for name in named}
    for model in (AbstractionIBPSettings, Search, Ladder, Released):
        for key in model.model_fields:
            assert key in named or key in {"search", "released", "ladder"}, key


def test_published_figures_are_clean_accuracies_of_our_recipes() -> None:
    path = files("certbench_abstraction") / "published" / "abscert.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    assert content["source"]
    recipes = [
        installed().find_recipe(name) for name in installed().recipes() if name.startswith("abstraction/")
    ]
    known = {(r.dataset, r.model, str(r.threat.radius)) for r in recipes}
    for figure in content["figures"]:
        assert figure["metric"] == "clean_accuracy", "the release certifies nothing"
        assert "reported upstream as verified" in figure["differences"]
        radius = "1/10" if figure["radius"] == "0.1" else figure["radius"]
        assert (figure["dataset"], figure["model"], radius) in known or figure["model"] == "inception-v1"
