"""The losses of the baselines against their formulas written out image by image, and their recipes and bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.data.dataset import Dataset, to_pixels
from certbench.data.files import load_dataset
from certbench.errors import UsageError
from certbench.models import build_network
from certbench.plugins import installed
from certbench.training import Step, climb
from certbench_smoothing_baselines.consistency import Consistency, spread
from certbench_smoothing_baselines.gaussian import Gaussian
from certbench_smoothing_baselines.macer import MACER, radius_hinge
from certbench_smoothing_baselines.smoothadv import SmoothAdv
from certbench_smoothing_baselines.stability import Stability

OBJECTIVES = {
    "gaussian": Gaussian,
    "stability": Stability,
    "consistency": Consistency,
    "smoothadv": SmoothAdv,
    "macer": MACER,
}
STEP = Step(40, 12, 10)
DIGITS = load_dataset("digits", None)
IMAGES, LABELS = to_pixels(DIGITS.train.images[:12], DIGITS.info.levels), DIGITS.train.labels[:12]


def prepared(
    method: str, folder: Path, *overrides: str, digits: Dataset = DIGITS
) -> tuple[object, nn.Module]:
    """The objective on a fresh network in training mode, and a twin of that network."""
    recipe = installed().find_recipe(f"{method}/digits-l2-0.5", overrides)
    task = TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=digits,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", digits.info, 0),
    )
    objective, network = OBJECTIVES[method](task), build_network("cnn-small", digits.info, 0).train()
    objective.prepare(network, 10)
    return objective, copy.deepcopy(network)


def by_hand(method: str, twin: nn.Module, noises: Tensor, of: object) -> Tensor:
    """The loss as the papers write it: sums over images and noises, one term after the other."""
    images, labels = IMAGES, LABELS
    if method == "smoothadv":
        epsilon = float(of.attack_radius)
        path = climb(
            twin, images, labels, noises, of.attack_iterations, 2 * epsilon / of.attack_iterations, epsilon
        )
        images = path[-1]
        assert ((images - IMAGES).flatten(1).norm(dim=1) <= epsilon + 1e-5).all()
    if method == "stability":
        clean, noisy = twin(images), twin(images + noises[0])
        stable = -(clean.softmax(1) * noisy.softmax(1).log()).sum(1).mean()
        return F.cross_entropy(clean, labels) + of.weight * stable
    m = len(noises)
    F_all = twin(torch.cat([images + noise for noise in noises])).softmax(1).view(m, len(images), -1)
    natural = torch.stack([-F_all[j, i, y].log() for j in range(m) for i, y in enumerate(labels)]).mean()
    if method in {"gaussian", "smoothadv"}:
        return natural
    terms = []
    for i, y in enumerate(labels):
        mean = F_all[:, i].mean(0)
        if method == "consistency":
            kl = sum((mean * (mean.log() - F_all[j, i].log())).sum() for j in range(m)) / m
            terms.append(of.weight * kl - of.entropy_weight * (mean * mean.log()).sum())
        else:
            terms.append(-(mean[y] + 1e-10).log())
    return torch.stack(terms).mean() + (natural if method == "consistency" else 0)


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_losses_are_their_formulas(method: str, tmp_path: Path) -> None:
    overrides = ["method.delay_epochs=12"] if method == "macer" else []
    objective, twin = prepared(method, tmp_path, *overrides)
    loss, _ = objective.loss(IMAGES, LABELS, STEP)
    noises = objective.noises(IMAGES, getattr(objective.settings, "noises", 1), STEP)
    torch.testing.assert_close(loss, by_hand(method, twin, noises, objective.settings))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.network.parameters())
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(objective.network.named_buffers())[name], value, msg=name)


def test_gaussian_noise_of_another_level(tmp_path: Path) -> None:
    objective, _ = prepared("gaussian", tmp_path, "method.train_sigma=0.25")
    usual, _ = prepared("gaussian", tmp_path)
    torch.testing.assert_close(2 * objective.noises(IMAGES, 1, STEP), usual.noises(IMAGES, 1, STEP))


def test_smoothadv_starts_with_a_small_ball(tmp_path: Path) -> None:
    objective, _ = prepared("smoothadv", tmp_path)
    _, early = objective.loss(IMAGES, LABELS, Step(0, 1, 10))
    _, late = objective.loss(IMAGES, LABELS, STEP)
    assert early["epsilon"] == pytest.approx(0.1)
    assert late["epsilon"] == 0.5


def test_consistency_of_equal_predictions_costs_their_entropy_alone() -> None:
    logits = torch.randn(1, 5, 4).double().expand(3, 5, 4)
    kl, entropy = spread(logits)
    torch.testing.assert_close(kl, torch.zeros(5).double())
    p = logits[0].softmax(1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1))
    far = torch.tensor([[[400.0, 0.0]], [[400.0, 0.0]]], requires_grad=True)
    kl, entropy = spread(far)
    (kl + entropy).sum().backward()
    assert far.grad.isfinite().all(), "a class of vanishing probability"


def test_the_hinge_of_macer_against_the_normal_quantiles() -> None:
    sigma, beta, gamma = 0.5, 16.0, 8.0
    logits = (0.3 * torch.randn(16, 200, 10)).double().requires_grad_()
    labels = torch.arange(200) % 10
    hinge, active = radius_hinge(logits, labels, sigma, beta, gamma)
    mean = (beta * logits).softmax(-1).mean(0).detach()
    for i in range(200):
        z, order = mean[i].sort(descending=True)
        gap = norm.ppf(float(z[0])) - norm.ppf(float(z[1]))
        counts = int(order[0]) == int(labels[i]) and abs(gap) <= gamma
        assert bool(active[i]) == counts
        expected = sigma / 2 * (gamma - gap) if counts else 0.0
        assert hinge[i].item() == pytest.approx(expected, rel=1e-9)
    assert 0 < int(active.sum()) < 200
    hinge.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs().amax((0, 2)) > 0).tolist() == active.tolist()


def test_the_hinge_drops_infinite_gaps_without_harming_the_gradient() -> None:
    logits = torch.tensor([[[100.0, 0.0, 0.0], [0.0, 0.1, 0.0]]]).repeat(2, 1, 1).requires_grad_()
    hinge, active = radius_hinge(logits, torch.tensor([0, 1]), 0.5, 16.0, 8.0)
    assert active.tolist() == [False, True]
    assert hinge[0].item() == 0
    hinge.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 0] == 0).all()


def test_the_hinge_waits_for_its_epoch(tmp_path: Path) -> None:
    objective, _ = prepared("macer", tmp_path, "method.delay_epochs=3", "method.weight=1.0")
    early, figures = objective.loss(IMAGES, LABELS, Step(0, 3, 10))
    assert "active" not in figures
    late, figures = objective.loss(IMAGES, LABELS, Step(0, 4, 10))
    assert "active" in figures
    assert late >= early


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("gaussian", "method.train_sigma=0", "method.train_sigma = 0"),
        ("stability", "method.weight=-1", "method.weight = -1"),
        ("consistency", "method.noises=1", "method.noises = 1"),
        ("smoothadv", 'method.attack_radius="0"', "a radius above 0"),
        ("smoothadv", "method.alpha=1", "attack_radius and attack_iterations; the alpha of certification is"),
        ("macer", "method.beta=0", "method.beta = 0"),
        ("macer", "method.k=4", "unknown key 'method.k'"),
    ],
)
def test_bad_settings_are_explained(method: str, override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe(f"{method}/digits-l2-0.5", [override])


def test_published_recipes_hold_the_released_settings() -> None:
    for method in OBJECTIVES:
        for sigma in (0.25, 0.5, 1.0):
            recipe = installed().find_recipe(f"{method}/mnist-l2-{sigma:g}-lenet")
            train, of = recipe.train, installed().settings(recipe)
            assert (recipe.sigma, train.epochs, train.learning_rate, train.batch_size) == (
                sigma,
                90,
                0.01,
                256,
            )
            assert (train.milestones, train.milestone_lag, train.decay) == ((30, 60), 1, 0.1)
            if method == "consistency":
                assert of.weight == (10 if sigma == 0.25 else 5)
            if method == "macer":
                assert (of.weight, of.delay_epochs) == (6 if sigma == 1.0 else 16, 31)
