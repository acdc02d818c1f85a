"""Certificates against brute force: every step of the ladder, at radii on, just below and just above borders."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.contract import Certificates, CertifyTask
from certbench.data.dataset import Split, to_pixels
from certbench.errors import RunError, UsageError
from certbench.plugins import installed
from certbench.threat import round_down
from certbench_abstraction import bounds as bounds_module
from certbench_abstraction.ladder import CellLadder, Chunk, certify_cells
from certbench_abstraction.layer import Abstraction
from certbench_abstraction.settings import Ladder

N, LEVELS, SHAPE, CLASSES = 4, 16, (1, 2, 3), 3
NOTHING = {"attack_steps": 0, "linear": (), "cap": 0, "search_cap": 0, "branch_passes": 0}
STEPS = {
    "cell-ibp": {},
    "cell-attack": {"attack_steps": 10, "attack_restarts": 4},
    "crown-ibp": {"linear": ("crown-ibp",)},
    "zonotope": {"linear": ("zonotope",)},
    "crown": {"linear": ("crown",)},
    "zonotope-crown": {"linear": ("zonotope-crown",)},
    "enumeration": {"cap": 4**6, "search_cap": 4**6},
    "branching": {"branch_passes": 10_000},
}
RADII = ["1/8", "1249/10000", "1251/10000", "1/16", "0.1", "1"]
"""On a border for pixels that are multiples of 1/16, just below it, just above it, and other places."""


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    return nn.Sequential(Abstraction(N), f).eval()


def images(count: int = 60) -> Split:
    """Codes of 0 to 16, most of them off the borders; labels are the network's own, a few of them wrong."""
    codes = torch.randint(0, LEVELS + 1, (count, *SHAPE), dtype=torch.uint8)
    labels = network()(to_pixels(codes, LEVELS)).argmax(1)
    labels[::15] = (labels[::15] + 1) % CLASSES
    return Split(codes, labels)


def task(
    split: Split, radius: str, guarantee: str = "real_arith", g: nn.Module | None = None, **ladder: object
) -> CertifyTask:
    recipe = installed().find_recipe(
        "abstraction/digits-linf-0.1",
        [f"threat.radius={radius}", f"certify.cap={radius}", f"certify.guarantee={guarantee}"],
    )
    settings = installed().settings(recipe).model_copy(update={"ladder": Ladder(**{**NOTHING, **ladder})})  # type: ignore[arg-type]
    return CertifyTask(
        recipe=recipe,
        settings=settings,
        network=g or network(),
        split=split,
        levels=LEVELS,
        start=0,
        radius=recipe.threat.radius,
        cap=recipe.cap,
        device=torch.device("cpu"),
    )


def certified(asked: CertifyTask) -> Certificates:
    (found,) = certify_cells(asked)
    return found


def brute_force(g: nn.Module, pixels: Tensor, label: int, radius: Fraction) -> tuple[float, int, int]:
    """The smallest margin over all abstract inputs that exact rational arithmetic reaches; their number; straddling."""
    g = g.double()
    borders = [Fraction(float(b)) for b in g[0].borders]  # type: ignore[index]
    ranges = []
    for value in pixels.double().flatten().tolist():
        low, high = max(Fraction(value) - radius, Fraction(0)), min(Fraction(value) + radius, Fraction(1))
        ranges.append(range(sum(b <= low for b in borders), sum(b <= high for b in borders) + 1))
    k = torch.tensor(list(itertools.product(*ranges))).view(-1, *SHAPE)
    with torch.no_grad():
        logits = g[1](g[0].encode(k))  # type: ignore[index]
    others = logits.clone()
    others[:, label] = -torch.inf
    margin = float((logits[:, label] - others.amax(1)).min())
    return margin, len(k), sum(len(r) > 1 for r in ranges)


@pytest.mark.parametrize("guarantee", ["real_arith", "float_sound"])
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("step", STEPS)
def test_each_step_agrees_with_brute_force(step: str, radius: str, guarantee: str) -> None:
    split = images()
    rows = certified(task(split, radius, guarantee, **STEPS[step]))
    decided = 0
    for i in range(len(split)):
        pixels = to_pixels(split.images[i : i + 1], LEVELS)
        margin, count, straddling = brute_force(network(), pixels, int(split.labels[i]), Fraction(radius))
        verdict = rows.verdict[i]
        assert rows.columns["straddling"][i] == straddling
        assert (verdict == "misclassified") == (rows.prediction[i] != int(split.labels[i]))
        if verdict == "certified":
            assert margin > 0
            assert 0 < rows.margin[i] <= margin + 1e-9
            assert rows.proved_by[i].split(";")[0] in {"single-cell", "cell-ibp", step}
        elif verdict == "falsified":
            assert margin <= 0
            assert rows.proved_by[i].split(";")[0] in {"cell-attack", step}
        elif step in {"enumeration", "branching"} and verdict == "unknown":
            assert abs(margin) < 1e-5, "a complete step leaves only what round-off could turn"
        if step == "enumeration" and rows.proved_by[i] == "enumeration":
            assert rows.columns["enumerated"][i] >= count or verdict == "falsified"
        decided += verdict in {"certified", "falsified"}
        if rows.radius[i] > 0:
            inside, _, _ = brute_force(
                network(), pixels, int(split.labels[i]), Fraction(float(rows.radius[i]))
            )
            assert inside > 0, "the reported radius is proved"
        assert Fraction(float(rows.radius[i])) <= Fraction(radius)
    assert decided > 0 or radius == "1"
    assert rows.guarantee == guarantee
    assert (rows.passes >= 1).all()


def test_complete_steps_find_the_exact_radius() -> None:
    """The next float beyond a radius reaches an abstract input that is misclassified."""
    split = images(40)
    rows = certified(task(split, "0.4", **STEPS["enumeration"]))
    looked = 0
    for i in range(len(split)):
        radius = float(rows.radius[i])
        if rows.verdict[i] in {"falsified", "unknown"}:
            pixels = to_pixels(split.images[i : i + 1], LEVELS)
            beyond = Fraction(np.nextafter(radius, 1.0))
            margin, _, _ = brute_force(network(), pixels, int(split.labels[i]), beyond)
            assert margin <= 0
            looked += 1
    assert looked > 5


def test_images_that_stay_in_their_cells_get_the_single_cell_radius() -> None:
    split = images(30)
    found = certified(task(split, "0.05"))
    assert any("single-cell" in name for name in found.proved_by)
    for i in np.flatnonzero(["single-cell" in name for name in found.proved_by]):
        pixels = to_pixels(split.images[i : i + 1], LEVELS)
        _, count, _ = brute_force(network(), pixels, int(split.labels[i]), Fraction(float(found.radius[i])))
        assert count == 1
        assert (
            found.radius[i] == round_down(Fraction(1, 20))
            or brute_force(
                network(), pixels, int(split.labels[i]), Fraction(np.nextafter(found.radius[i], 1.0))
            )[1]
            > 1
        )


def test_a_witness_is_shown_on_pixels_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that lies gets nowhere: what it claims is evaluated by the deployed classifier."""

    def lie(g: nn.Module, start: Tensor, cells: object, labels: Tensor, *rest: object) -> tuple[Tensor, ...]:
        return torch.ones_like(labels, dtype=torch.bool), start, torch.ones_like(labels)

    monkeypatch.setattr("certbench_abstraction.ladder.cell_attack", lie)
    rows = certified(task(images(), "0.1", attack_steps=5))
    assert "falsified" not in rows.verdict


def test_a_bound_that_is_too_high_is_caught_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the width of a cell forgotten. The exhaustive comparison above must see it."""
    honest = bounds_module.coupled_box

    def narrow(cells: object, abstraction: object) -> object:
        box = honest(cells, abstraction)  # type: ignore[arg-type]
        return bounds_module.Box(lower=box.center, upper=box.center)

    monkeypatch.setattr(bounds_module, "coupled_box", narrow)
    with pytest.raises(AssertionError):
        test_each_step_agrees_with_brute_force("cell-ibp", "0.1", "real_arith")


def test_a_float_sound_margin_below_round_off_proves_nothing() -> None:
    """Two logits that differ in the last bits: real arithmetic decides, a deployed evaluation could go either way."""
    g = network()
    last = g[1][3]
    with torch.no_grad():
        last.weight[1] = last.weight[0]
        last.bias[1] = torch.nextafter(last.bias[0], torch.tensor(-1.0))
        last.weight[2], last.bias[2] = 0.0, -100.0
    split = Split(images().images, torch.zeros(60, dtype=torch.int64))
    complete = STEPS["enumeration"]
    real = certified(task(split, "0.1", g=g, **complete))
    sound = certified(task(split, "0.1", "float_sound", g=g, **complete))
    assert (real.verdict == "certified").any()
    assert not (sound.verdict == "certified").any()
    assert (sound.radius == 0).all()


def test_images_off_the_grid_get_wider_balls() -> None:
    """A pixel just below a border, from a computation that might have put it just above."""
    border = float(Abstraction(N).borders[0])
    pixels = torch.full((1, *SHAPE), 0.6)
    pixels[0, 0, 0, 0] = border - 2.0**-22
    asked = task(images(1), "1/1000000000")
    labels = network()(pixels).argmax(1)
    chunk = Chunk(CellLadder(network(), asked), pixels, labels, 0)
    assert int(chunk.cells.straddling) == 1
    rows = chunk.certificates()
    assert rows.verdict[0] in {"certified", "falsified", "unknown"}
    on_grid = Chunk(CellLadder(network(), asked), torch.full((1, *SHAPE), 5 / 16), labels, 0)
    assert int(on_grid.cells.straddling) == 0


def test_bad_images_and_labels_are_errors_not_zeros() -> None:
    asked = task(images(3), "0.1")
    pixels = torch.rand(3, *SHAPE)
    pixels[0, 0, 0, 0], pixels[1, 0, 0, 0] = 1.5, torch.nan
    rows = Chunk(CellLadder(network(), asked), pixels, torch.tensor([0, 0, 7]), 0).certificates()
    assert rows.verdict.tolist() == ["error"] * 3
    assert np.isnan(rows.radius).all()
    assert np.isnan(rows.margin).all()


def test_networks_that_cannot_be_certified_are_refused() -> None:
    split = images(3)
    with pytest.raises(RunError, match="training mode"):
        list(certify_cells(task(split, "0.1", g=network().train())))
    broken = network()
    with torch.no_grad():
        broken[1][1].weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="NaN or infinity"):
        list(certify_cells(task(split, "0.1", g=broken)))
    asked = task(split, "0.1", "float_sound")
    reduced = replace(
        asked,
        recipe=asked.recipe.model_copy(
            update={"certify": asked.recipe.certify.model_copy(update={"deploy": "bf16"})}
        ),
    )
    with pytest.raises(UsageError, match="stored in bf16"):
        list(certify_cells(reduced))


def test_chunks_do_not_change_what_is_found() -> None:
    split = images(60)
    whole = certified(task(split, "0.1", **STEPS["enumeration"]))
    parts = [certified(task(split.slice(a, a + 20), "0.1", **STEPS["enumeration"])) for a in (0, 20, 40)]
    for name in ("verdict", "radius"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
