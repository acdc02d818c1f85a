"""The baselines' objectives against their formulas, put together from the core's tested parts."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import Graph, crown_ibp_margins, input_box, trace
from certbench.contract import TrainTask
from certbench.data.files import load_dataset
from certbench.errors import UsageError
from certbench.models import build_network
from certbench.plugins import installed
from certbench.run import run_recipe
from certbench.training import (
    NATURAL_EPS,
    Batch,
    IntervalObjective,
    Step,
    projected_gradient,
    robust_cross_entropy,
)
from certbench_ibp_baselines.attacks import MTLIBP, SABR
from certbench_ibp_baselines.bounds import IBP, CrownIBP
from certbench_ibp_baselines.plain import constant_network

STEP = Step(30, 4, 10)
EPS = 0.05
"""The radius at STEP: half-way up a linear ramp of six epochs to 0.1."""
CLASSES = {"ibp": IBP, "crown-ibp": CrownIBP, "sabr": SABR, "mtl-ibp": MTLIBP}


def task(method: str, model: str = "cnn-small", **settings: Any) -> TrainTask:
    overrides = [f"method.{key}={value}" for key, value in settings.items()]
    recipe = installed().find_recipe(f"{method}/digits-linf-0.1", overrides)
    digits = load_dataset("digits", None)
    return TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=digits,
        device=torch.device("cpu"),
        folder=Path("unused"),
        build_network=lambda: build_network(model, digits.info, 0),
    )


class Case:
    """A method's objective on a network that knows its digits a little, and the clean pass of a batch of 32."""

    def __init__(self, method: str, **settings: Any) -> None:
        made = task(method, ramp="linear", ramp_epochs=6, **settings)
        self.network = made.build_network().train()
        self.objective: IntervalObjective = CLASSES[method](made)
        self.objective.prepare(self.network, 10)
        self.x = made.dataset.train.images[:32].float() / 16
        self.y = made.dataset.train.labels[:32]
        optimizer = torch.optim.Adam(self.network.parameters(), 0.01)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.network(self.x), self.y).backward()
            optimizer.step()
        self.twin: Graph = trace(copy.deepcopy(self.network), (1, 8, 8))
        self.clean = self.twin.run(self.x)
        self.entropy = nn.functional.cross_entropy(self.clean.logits, self.y)

    def loss(self) -> Tensor:
        found, figures = self.objective.loss(self.x, self.y, STEP)
        assert figures["eps"] == pytest.approx(EPS)
        return found

    def margins(self, x: Tensor, eps: float) -> Tensor:
        return self.twin.bound(input_box(x, eps), self.clean.statistics).margins(self.y)

    def batch(self) -> Batch:
        return Batch(self.x, self.y, STEP, EPS, 0.0, self.clean, self.entropy, {})


def test_ibp_mixes_the_robust_and_the_clean_loss() -> None:
    case = Case("ibp", kappa=0.3)
    expected = 0.7 * robust_cross_entropy(case.margins(case.x, EPS)) + 0.3 * case.entropy
    torch.testing.assert_close(case.loss(), expected)


def test_ibp_with_the_warm_up_of_fast_ibp_is_fast_ibp() -> None:
    plain, warm = Case("ibp"), Case("ibp", regularizer_weight=0.5)
    box = input_box(warm.x, EPS)
    bounds = warm.twin.bound(box, warm.clean.statistics, keep={"aten.relu.default"})
    torch.testing.assert_close(warm.loss() - plain.loss(), warm.objective.regularizers(EPS, box, bounds))


def test_crown_ibp_falls_back_to_interval_bounds_as_the_radius_rises() -> None:
    case = Case("crown-ibp")
    box = input_box(case.x, EPS)
    linear = crown_ibp_margins(case.twin, box, case.y, case.clean.statistics)
    expected = robust_cross_entropy(0.5 * linear + 0.5 * case.margins(case.x, EPS))
    torch.testing.assert_close(case.loss(), expected)
    case.objective.loss(case.x, case.y, Step(60, 7, 10))[0].backward()
    at_end = case.objective.margins(
        Batch(case.x, case.y, STEP, 0.1, 0.0, case.clean, case.entropy, {}),
        input_box(case.x, 0.1),
        case.twin.bound(input_box(case.x, 0.1), case.clean.statistics),
    )
    torch.testing.assert_close(at_end, case.margins(case.x, 0.1))


def test_the_mix_of_crown_ibp_is_the_oracles() -> None:
    """``robust_ce_crown_ibp_mix`` of the sequential oracle network, in training mode."""
    folder = Path(__file__).parents[3] / "tests" / "data" / "fast_ibp"
    with np.load(folder / "seq_cnn.npz", allow_pickle=False) as file:
        oracle = {
            key: torch.from_numpy(np.asarray(file[key])) for key in file.files if file[key].dtype.kind in "fi"
        }
        prefixes = [p for p in file["node_param"].tolist() if p]
    layers: list[nn.Module] = []
    for prefix in prefixes:
        weight = oracle[f"param/{prefix}.weight"]
        if weight.ndim == 4:
            layers.append(nn.Conv2d(weight.shape[1], weight.shape[0], 3, 1 + (len(layers) > 0), 1))
        elif weight.ndim == 1:
            kind = nn.BatchNorm2d if isinstance(layers[-1], nn.Conv2d) else nn.BatchNorm1d
            layers += [kind(len(weight)), nn.ReLU()]
        else:
            layers += [] if any(isinstance(m, nn.Flatten) for m in layers) else [nn.Flatten()]
            layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
    network = nn.Sequential(*layers).double().train()
    weighted = [m for m in layers if not isinstance(m, nn.ReLU | nn.Flatten)]
    with torch.no_grad():
        for module, prefix in zip(weighted, prefixes, strict=True):
            for key, value in module.state_dict().items():
                if f"param/{prefix}.{key}" in oracle:
                    value.copy_(oracle[f"param/{prefix}.{key}"])
    case = Case("crown-ibp")
    case.objective.graph = trace(network, (1, 10, 10))
    case.objective.eps_max = float(oracle["max_eps"])
    x, y, eps = oracle["x_raw"], oracle["y"], float(oracle["eps"])
    clean = case.objective.graph.run(x)
    box = input_box(x, eps)
    bounds = case.objective.graph.bound(box, clean.statistics)
    found = case.objective.robust_loss(Batch(x, y, STEP, eps, 0.0, clean, case.entropy, {}), box, bounds)
    torch.testing.assert_close(found, oracle["train/robust_ce_crown_ibp_mix"].squeeze(), rtol=1e-9, atol=0)


# The attack ----------------------------------------------------------------------------------------------------------


def test_the_attack_stays_in_the_ball_updates_nothing_and_does_harm() -> None:
    case = Case("mtl-ibp")
    before = copy.deepcopy(case.network.state_dict())
    points = case.objective.attacked(case.batch())
    assert all(torch.equal(before[name], value) for name, value in case.network.state_dict().items())
    assert ((points - case.x).abs() <= EPS + 1e-6).all() and (points >= 0).all() and (points <= 1).all()
    attacked = nn.functional.cross_entropy(case.twin.run(points, case.clean.statistics).logits, case.y)
    assert attacked > case.entropy
    assert torch.equal(points, case.objective.attacked(case.batch())), "the same step draws the same points"


def test_the_attack_begins_at_random_points_of_the_clipped_ball() -> None:
    x = torch.zeros(4, 1, 8, 8)
    y = torch.zeros(4, dtype=torch.long)
    start = projected_gradient(lambda z: z.flatten(1), x, y, 0.2, 0, 0.25, seed=1)
    assert start.min() >= 0 and 0.15 < start.max() <= 0.2


# SABR and MTL-IBP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_the_small_box_of_sabr_lies_inside_the_ball(ratio: float) -> None:
    case = Case("sabr", subselection_ratio=ratio)
    box, ball = case.objective.box(case.batch()), input_box(case.x, EPS)
    assert (box.lower >= ball.lower - 1e-6).all() and (box.upper <= ball.upper + 1e-6).all()
    inside = (case.x > EPS) & (case.x < 1 - EPS)
    torch.testing.assert_close(box.radius[inside], torch.full_like(box.radius[inside], ratio * EPS))


@pytest.mark.parametrize("eps", [2e-7, 2e-6, 2e-5])
def test_the_small_box_stays_inside_the_ball_where_the_radius_is_near_the_floor(eps: float) -> None:
    case = Case("sabr", subselection_ratio=0.2)
    batch = dataclasses.replace(case.batch(), eps=eps, floor=NATURAL_EPS)
    box, ball = case.objective.box(batch), input_box(case.x, max(eps, NATURAL_EPS))
    ulps = 2 * torch.finfo(torch.float32).eps  # of pixels up to 1
    assert (box.lower >= ball.lower - ulps).all() and (box.upper <= ball.upper + ulps).all()


def test_sabr_with_the_whole_ball_is_ibp() -> None:
    case = Case("sabr", subselection_ratio=1.0, regularizer_weight=0)
    torch.testing.assert_close(case.loss(), robust_cross_entropy(case.margins(case.x, EPS)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mtl_ibp_mixes_the_attacked_and_the_robust_loss(alpha: float) -> None:
    case = Case("mtl-ibp", alpha=alpha, regularizer_weight=0)
    points = case.objective.attacked(case.batch())
    attacked = nn.functional.cross_entropy(case.twin.run(points, case.clean.statistics).logits, case.y)
    expected = (1 - alpha) * attacked + alpha * robust_cross_entropy(case.margins(case.x, EPS))
    found = case.loss()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.network.parameters())


@pytest.mark.parametrize("method", sorted(CLASSES))
def test_at_radius_0_every_loss_is_the_clean_one_and_statistics_move_once(method: str) -> None:
    case = Case(method, regularizer_weight=0)
    found, _ = case.objective.loss(case.x, case.y, Step(0, 1, 10))
    torch.testing.assert_close(found, case.entropy)
    for name, value in case.twin.network.named_buffers():
        torch.testing.assert_close(dict(case.network.named_buffers())[name], value, msg=name)


# Constant ------------------------------------------------------------------------------------------------------------


def test_a_constant_is_certified_at_the_cap_wherever_it_is_right(tmp_path: Path) -> None:
    outcome = run_recipe("constant/digits-linf-0.1", out=tmp_path, device="cpu")
    labels = load_dataset("digits", None).train.labels
    commonest = int(labels.bincount().argmax())
    test = load_dataset("digits", None).test.labels
    assert outcome.clean_accuracy == outcome.certified_accuracy == int((test == commonest).sum()) / 360
    assert outcome.refuted == 0


def test_a_constant_needs_a_last_linear_layer() -> None:
    made = task("constant")
    with pytest.raises(UsageError, match="does not end in one; choose another model"):
        constant_network(
            TrainTask(**{**vars(made), "build_network": lambda: nn.Sequential(nn.Flatten(), nn.ReLU())})
        )


@pytest.mark.parametrize(
    ("recipe", "override", "words"),
    [
        ("ibp", "method.kappa=1.1", "method.kappa = 1.1"),
        ("sabr", "method.subselection_ratio=0", "method.subselection_ratio = 0"),
        ("mtl-ibp", "method.alpha=-1", "method.alpha = -1"),
        ("standard", "method.kappa=0.5", "unknown key 'method.kappa'"),
        ("crown-ibp", "method.ramp_epochs=0", "method.ramp_epochs = 0"),
    ],
)
def test_bad_settings_are_explained(recipe: str, override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe(f"{recipe}/digits-linf-0.1", [override])
