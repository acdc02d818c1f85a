"""Adaptive radii against the oracle arrays, and the invariants that the method promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import input_box, trace
from certbench.contract import TrainTask
from certbench.data.files import load_dataset
from certbench.errors import UsageError
from certbench.models import build_network
from certbench.models.registry import Normalize
from certbench.plugins import installed
from certbench.recorded import certify_again
from certbench.run import run_recipe
from certbench.training import (
    NATURAL_EPS,
    Batch,
    SmoothedRamp,
    Step,
    relu_balance,
    robust_cross_entropies,
    tightness,
)
from certbench_adaptive_radii.objective import AdaptiveRadii
from certbench_adaptive_radii.radii import Radii
from certbench_adaptive_radii.settings import AdaptiveRadiiSettings

ORACLE = Path(__file__).parents[3] / "tests" / "data" / "adaptive_radii" / "adaptive_radii.npz"
EXACT = {"radius_tolerance": 1e-12, "max_passes": 200}
Arrays = Mapping[str, np.ndarray]


class Schedule:
    """A budget per step, as listed; the warm-up lasts for as many epochs as it is told."""

    def __init__(self, caps: list[float], last_epoch: int = 0) -> None:
        self.caps, self.last_epoch = caps, last_epoch

    def __call__(self, batch: int) -> float:
        return self.caps[batch]


@pytest.fixture(scope="module")
def oracle() -> Arrays:
    return dict(np.load(ORACLE, allow_pickle=False))


def network_of(oracle: Arrays) -> nn.Module:
    network = nn.Sequential(
        Normalize(tuple(oracle["data_mean"]), tuple(oracle["data_std"])),
        nn.Conv2d(1, 4, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    ).double()
    with torch.no_grad():
        for number, layer in enumerate((network[1], network[3], network[6], network[8]), start=1):
            layer.weight.copy_(tensor(oracle, f"w{number}"))
            layer.bias.copy_(tensor(oracle, f"b{number}"))
        network[0].mean.copy_(tensor(oracle, "data_mean").view(1, 1, 1, 1))
        network[0].std.copy_(tensor(oracle, "data_std").view(1, 1, 1, 1))
    return network


def tensor(oracle: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(oracle[name]))


def objective_on(network: nn.Module, oracle: Arrays, **settings: Any) -> AdaptiveRadii:
    """The objective on the oracle's network, by radii solved to the last digits."""
    objective = AdaptiveRadii(task(**(EXACT | settings)))
    objective.eps_max = float(oracle["eps_max"])
    objective.graph = trace(network, (1, 8, 8))
    objective.std = tensor(oracle, "data_std").view(-1, 1, 1)
    objective.eps_at = Schedule([objective.eps_max])
    objective.weights = []
    return objective


def task(folder: Path = Path("unused"), **settings: Any) -> TrainTask:
    digits = load_dataset("digits", None)
    return TrainTask(
        recipe=installed().find_recipe("adaptive-radii/digits-linf-0.1"),
        settings=AdaptiveRadiiSettings(train_radius="0.2", **settings),
        dataset=digits,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", digits.info, 0),
    )


def gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def batch_of(objective: AdaptiveRadii, x: Tensor, y: Tensor, eps: float) -> Batch:
    """A step's batch under a budget, after the clean pass."""
    clean = objective.graph.run(x)
    loss = nn.functional.cross_entropy(clean.logits, y)
    return Batch(x, y, Step(0, 1, 1), eps, 0.0, clean, loss, {})


def radii_at(objective: AdaptiveRadii, oracle: Arrays, cap: float) -> Radii:
    return objective.radii(batch_of(objective, tensor(oracle, "x"), tensor(oracle, "y"), cap))


# The oracle ----------------------------------------------------------------------------------------------------------


def test_radii_and_statuses_are_the_oracles(oracle: Arrays) -> None:
    objective = objective_on(network_of(oracle), oracle)
    found = radii_at(objective, oracle, objective.eps_max)
    torch.testing.assert_close(found.radius, tensor(oracle, "radius_exact"), rtol=0, atol=1e-10)
    status = found.correct.long() + found.capped.long()
    assert torch.equal(status, tensor(oracle, "status"))
    assert (found.radius <= tensor(oracle, "radius_exact") + 1e-15).all(), "on the proved side"


def test_radii_at_the_tolerance_of_training_are_within_it_and_cheap(oracle: Arrays) -> None:
    objective = objective_on(network_of(oracle), oracle, radius_tolerance=1e-4, max_passes=10)
    found = radii_at(objective, oracle, objective.eps_max)
    short = tensor(oracle, "radius_exact") - found.radius
    assert (short >= -1e-15).all() and (short <= 1e-4 * objective.eps_max).all()
    assert found.passes < 6, "images that are done leave the search"


@pytest.mark.parametrize("number", range(5))
def test_the_loss_of_every_kappa(oracle: Arrays, number: int) -> None:
    kappa = float(oracle["kappas"][number])
    objective = objective_on(network_of(oracle), oracle, kappa=kappa, regularizer_weight=0)
    loss, _ = objective.loss(tensor(oracle, "x"), tensor(oracle, "y"), Step(0, 1, 1))
    torch.testing.assert_close(loss, tensor(oracle, "loss_kappa")[number], rtol=1e-9, atol=0)


def test_robust_losses_at_the_radii_and_at_one_for_all(oracle: Arrays) -> None:
    graph, x, y = trace(network_of(oracle), (1, 8, 8)), tensor(oracle, "x"), tensor(oracle, "y")

    def losses(eps: Tensor | float) -> Tensor:
        return robust_cross_entropies(graph.bound(input_box(x, eps), {}).margins(y))

    exact = losses(tensor(oracle, "radius_exact"))
    torch.testing.assert_close(exact, tensor(oracle, "adaptive_robust_ce"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact.mean(), tensor(oracle, "loss_rob"), rtol=1e-10, atol=0)
    fixed = losses(float(oracle["eps_max"])).mean()
    torch.testing.assert_close(fixed, tensor(oracle, "fixed_loss_rob"), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("at", "names"), [("reg_eps", "reg"), ("warm_eps", "warm_reg")])
def test_regularisers_at_radii_of_their_own(oracle: Arrays, at: str, names: str) -> None:
    graph = trace(network_of(oracle), (1, 8, 8))
    box = input_box(tensor(oracle, "x"), tensor(oracle, at))
    kept = graph.bound(box, {}, keep={"aten.relu.default"}).kept
    r_0 = box.radius / tensor(oracle, "data_std").view(-1, 1, 1)
    exact = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(tightness(r_0, kept), tensor(oracle, f"{names}_tight"), **exact)
    torch.testing.assert_close(relu_balance(kept), tensor(oracle, f"{names}_relu"), **exact)


def test_boxes_before_the_relus(oracle: Arrays) -> None:
    graph = trace(network_of(oracle), (1, 8, 8))
    box = input_box(tensor(oracle, "x")[:4], float(oracle["bounds_eps"]))
    kept = graph.bound(box, {}, keep={"aten.relu.default"}).kept
    for j, found in enumerate(kept, start=1):
        torch.testing.assert_close(found.lower, tensor(oracle, f"pre_lo_{j}"), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.upper, tensor(oracle, f"pre_hi_{j}"), rtol=1e-10, atol=1e-12)
    assert len(kept) == 3


def test_the_schedule_of_the_budget(oracle: Arrays) -> None:
    E, s, length = oracle["sched_args"].tolist()
    ramp = SmoothedRamp(float(oracle["eps_max"]), s, length, E)
    found = [ramp(int(step)) for step in oracle["sched_steps"]]
    np.testing.assert_allclose(found, oracle["sched_eps"], rtol=1e-12, atol=0)


def test_gradients_hold_the_radii_constant(oracle: Arrays) -> None:
    network = network_of(oracle)
    objective = objective_on(network, oracle, kappa=0.25, regularizer_weight=0)
    objective.loss(tensor(oracle, "x"), tensor(oracle, "y"), Step(0, 1, 1))[0].backward()
    torch.testing.assert_close(gradient(network), tensor(oracle, "grad_flat_kappa025"), rtol=1e-8, atol=1e-10)


def test_the_loss_of_the_warm_up(oracle: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's radii know the budget as a float32 and its regularisers as a float64, so the two meet here only."""
    objective = objective_on(network_of(oracle), oracle, kappa=0.25)
    warm = tensor(oracle, "warm_eps")
    radii = radii_at(objective, oracle, float(warm.max()))
    torch.testing.assert_close(radii.radius.clamp_min(NATURAL_EPS), warm, rtol=0, atol=1e-10)
    monkeypatch.setattr(objective, "radii", lambda *_: replace(radii, radius=warm))
    objective.eps_at = Schedule([float(oracle["reg_cap"])], last_epoch=1)
    loss, _ = objective.loss(tensor(oracle, "x"), tensor(oracle, "y"), Step(0, 1, 1))
    torch.testing.assert_close(loss, tensor(oracle, "warm_total"), rtol=1e-9, atol=0)


def test_eight_steps_of_gradient_descent(oracle: Arrays) -> None:
    network = network_of(oracle)
    kappa, rate = float(oracle["seq_kappa"]), float(oracle["seq_lr"])
    objective = objective_on(network, oracle, kappa=kappa, regularizer_weight=0)
    objective.eps_at = Schedule(oracle["seq_cap"].tolist())
    x, y = tensor(oracle, "x"), tensor(oracle, "y")
    for t, cap in enumerate(oracle["seq_cap"]):
        radius = radii_at(objective, oracle, float(cap)).radius
        torch.testing.assert_close(radius, tensor(oracle, "seq_radius")[t], rtol=0, atol=1e-9)
        network.zero_grad()
        loss, _ = objective.loss(x, y, Step(t, 1, 8))
        loss.backward()
        torch.testing.assert_close(loss, tensor(oracle, "seq_loss")[t], rtol=1e-6, atol=0)
        norm = gradient(network).norm()
        torch.testing.assert_close(norm, tensor(oracle, "seq_grad_norm")[t], rtol=1e-6, atol=0)
        with torch.no_grad():
            for p in network.parameters():
                p -= rate * p.grad
    final = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(final, tensor(oracle, "seq_final_params"), rtol=1e-6, atol=1e-9)
    radius = radii_at(objective, oracle, objective.eps_max).radius
    torch.testing.assert_close(radius, tensor(oracle, "seq_final_radius"), rtol=0, atol=1e-8)


# Invariants ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared() -> tuple[AdaptiveRadii, nn.Module, Tensor, Tensor]:
    return prepare()


def prepare(**settings: Any) -> tuple[AdaptiveRadii, nn.Module, Tensor, Tensor]:
    """A network with batch norms that knows its digits a little, in training mode, and a batch of them."""
    made = task(**settings)
    objective, network = AdaptiveRadii(made), made.build_network().train()
    objective.prepare(network, 10)
    x = made.dataset.train.images[:64].float() / 16
    y = made.dataset.train.labels[:64]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    y = torch.where(torch.arange(64) < 8, (y + 1) % 10, y)  # some misclassified ones
    return objective, network, x, y


Prepared = tuple[AdaptiveRadii, nn.Module, Tensor, Tensor]


def test_a_correct_image_never_costs_more_than_log_c_and_a_wrong_one_its_cross_entropy(
    prepared: Prepared,
) -> None:
    objective, _, x, y = prepared
    batch = batch_of(objective, x, y, 0.05)
    clean, radii = batch.clean, objective.radii(batch)
    R = robust_cross_entropies(objective.graph.bound(input_box(x, radii.radius), clean.statistics).margins(y))
    assert radii.correct.any() and (~radii.correct).any() and radii.interior.any()
    assert (R[radii.correct] <= math.log(10) + 1e-5).all()
    assert (R[radii.interior] >= math.log(2) - 2e-2).all(), "some class ties at an interior radius"
    assert (radii.radius[~radii.correct] == 0).all()
    assert torch.equal(radii.correct, clean.logits.argmax(1) == y)
    entropy = nn.functional.cross_entropy(clean.logits, y, reduction="none")
    torch.testing.assert_close(R[~radii.correct], entropy[~radii.correct], rtol=1e-4, atol=1e-4)


def test_a_step_updates_the_running_statistics_once(prepared: Prepared) -> None:
    objective, network, x, y = prepared
    twin = copy.deepcopy(network)
    objective.loss(x, y, Step(60, 7, 10))
    twin(x)
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(network.named_buffers())[name], value, msg=name)


def test_without_a_budget_the_loss_is_the_clean_one(prepared: Prepared) -> None:
    objective, network, x, y = prepared
    objective.eps_at = SmoothedRamp(0.2, 2, 4, 10)
    step = Step(5, 1, 10)
    entropy = nn.functional.cross_entropy(copy.deepcopy(network)(x), y)
    clean = objective.graph.run(x)
    box = input_box(x, NATURAL_EPS)
    bounds = objective.graph.bound(box, clean.statistics, keep={"aten.relu.default"})
    expected = entropy + objective.regularizers(0.0, box, bounds)
    torch.testing.assert_close(objective.loss(x, y, step)[0], expected)
    objective.settings = objective.settings.model_copy(update={"regularizer_weight": 0.0})
    torch.testing.assert_close(objective.loss(x, y, step)[0], entropy)


@pytest.mark.parametrize("bounds", ["ibp", "crown-ibp"])
def test_a_batch_without_a_correct_image_costs_its_cross_entropy(prepared: Prepared, bounds: str) -> None:
    objective, network, x, _ = prepared
    with torch.no_grad():
        wrong = (copy.deepcopy(network)(x).argmax(1) + 1) % 10
    objective.settings = objective.settings.model_copy(update={"bounds": bounds, "regularizer_weight": 0.0})
    loss, figures = objective.loss(x, wrong, Step(250, 26, 10))
    entropy = nn.functional.cross_entropy(copy.deepcopy(network)(x), wrong)
    torch.testing.assert_close(loss, entropy, rtol=1e-4, atol=1e-4)
    assert float(figures["wrong"]) == 1 and figures["passes"] == 0


def test_figures_tell_how_the_batch_is_shared_out(prepared: Prepared) -> None:
    objective, _, x, y = prepared
    _, figures = objective.loss(x, y, Step(250, 26, 10))
    assert figures["eps"] == pytest.approx(0.2)
    assert float(figures["wrong"] + figures["interior"] + figures["capped"]) == pytest.approx(1)
    assert 0 < float(figures["radius_of_budget"]) < 1 and 0 < float(figures["passes"]) < 10


# Ablations and bad input ---------------------------------------------------------------------------------------------


def change(ablation: Mapping[str, Any], c: float = 0.05) -> tuple[Radii, Tensor, Radii, Tensor]:
    """Radii and trained radii without and with an ablation, of one network."""
    objective, _, x, y = prepare()
    batch = batch_of(objective, x, y, c)
    found: list[Any] = []
    for settings in ({}, ablation):
        objective.settings = AdaptiveRadiiSettings(train_radius="0.2", **settings)
        radii = objective.radii(batch)
        found += [radii, objective.trained_radius(batch, radii)]
    return tuple(found)


def test_no_search_gives_every_correct_image_the_budget() -> None:
    radii, _, others, trained = change({"search": "none"})
    assert torch.equal(trained, 0.05 * radii.correct)
    assert others.passes == 0


def test_the_multiplier_scales_radii_up_to_the_budget() -> None:
    radii, plain, _, scaled = change({"multiplier": 1.2})
    torch.testing.assert_close(scaled, (1.2 * radii.radius).clamp_max(0.05))
    assert torch.equal(plain, radii.radius)


def test_the_implicit_gradient_moves_interior_radii_as_the_root_moves(oracle: Arrays) -> None:
    network = network_of(oracle)
    objective = objective_on(network, oracle, radius_gradient="implicit")
    x, y, cap = tensor(oracle, "x"), tensor(oracle, "y"), objective.eps_max
    radii = radii_at(objective, oracle, cap)
    r = objective.trained_radius(batch_of(objective, x, y, cap), radii)
    torch.testing.assert_close(r.detach(), radii.radius)
    (slope,) = torch.autograd.grad(r.sum(), network[8].bias)
    h, bias = 1e-6, network[8].bias
    with torch.no_grad():
        bias[3] += h
        moved = radii_at(objective, oracle, cap).radius.sum()
        bias[3] -= 2 * h
        moved = (moved - radii_at(objective, oracle, cap).radius.sum()) / (2 * h)
    assert float(slope[3]) == pytest.approx(float(moved), rel=1e-4)


def test_dropped_images_cost_nothing_and_linear_bounds_certify_at_least_as_far() -> None:
    objective, _, x, y = prepare(regularizer_weight=0)
    step = Step(250, 26, 10)
    plain, _ = objective.loss(x, y, step)
    objective.settings = objective.settings.model_copy(update={"misclassified": "dropped"})
    dropped, _ = objective.loss(x, y, step)
    assert dropped < plain
    objective.settings = objective.settings.model_copy(update={"bounds": "crown-ibp"})
    linear, figures = objective.loss(x, y, step)
    linear.backward()
    assert linear.isfinite() and float(figures["radius_of_budget"]) > 0


def test_l1_adds_the_weights_of_layers_alone() -> None:
    objective, network, x, y = prepare(l1=1e-3)
    step = Step(250, 26, 10)
    loss, _ = objective.loss(x, y, step)
    objective.settings = objective.settings.model_copy(update={"l1": 0.0})
    without, _ = objective.loss(x, y, step)
    total = sum(p.abs().sum() for p in network.parameters() if p.ndim > 1)
    torch.testing.assert_close(loss - without, 1e-3 * total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.kappa=1.5", "method.kappa = 1.5"),
        ("method.kappa=-0.1", "method.kappa = -0.1"),
        ("method.search=newton", "method.search"),
        ("method.radius_tolerance=0", "method.radius_tolerance"),
    ],
)
def test_bad_settings_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe("adaptive-radii/digits-linf-0.1", [override])


def test_a_finished_run_is_certified_again_below_its_training_radius(tmp_path: Path) -> None:
    changes = ["train.epochs=1", "method.ramp_epochs=1"]
    outcome = run_recipe(
        "adaptive-radii/digits-linf-0.1", out=tmp_path, overrides=changes, attack=None, device="cpu"
    )
    found = certify_again(outcome.run_id, {}, radius="0.01", out=tmp_path, device="cpu")
    assert found.certified_accuracy >= outcome.certified_accuracy
    with pytest.raises(UsageError, match="train_radius = 0.2 lies above certify.cap = 0.1"):
        installed().find_recipe("adaptive-radii/digits-linf-0.1", ["certify.cap=0.1"])
