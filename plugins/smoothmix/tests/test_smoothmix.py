"""SmoothMix against arrays of its released code, its parts against brute force, and its bad input."""

from __future__ import annotations

import copy
import re
import tomllib
from collections import OrderedDict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.contract import TrainTask
from certbench.data.dataset import Dataset, to_pixels
from certbench.data.files import load_dataset
from certbench.errors import UsageError
from certbench.models import build_network
from certbench.plugins import installed
from certbench.recipe import Augmentation
from certbench.suites import suites
from certbench.training import Step, climb, keep_near
from certbench_smoothmix.objective import SmoothMix, mixed_loss

ARRAYS = np.load(Path(__file__).parent / "data" / "smoothmix.npz", allow_pickle=False)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


@dataclass(frozen=True)
class Case:
    """One case of the released code's arrays: its settings by name, and its tensors by theirs."""

    name: str

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(ARRAYS[f"smix_{self.name}_{key}"])

    def __getattr__(self, key: str) -> float:
        names = [
            "m",
            "T",
            "alpha",
            "mix_step",
            "eta",
            "w",
            "sigma",
            "maxnorm",
            "lr",
            "momentum",
            "weight_decay",
        ]
        return float(self["hp"][names.index(key)])

    def network(self, prefix: str) -> nn.Module:
        """The README's tiny network with the weights before (``w0_``) or after (``w1_``) the batch."""
        start = f"smix_{self.name}_{prefix}"
        weights = {
            key.removeprefix(start): torch.from_numpy(ARRAYS[key]) for key in ARRAYS if key.startswith(start)
        }
        parts: list[tuple[str, nn.Module]] = [("conv", nn.Conv2d(1, 4, 3, padding=1))]
        parts += [("bn", nn.BatchNorm2d(4))] if "bn.weight" in weights else []
        parts += [
            ("relu", nn.ReLU()),
            ("pool", nn.AvgPool2d(2)),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(64, 5)),
        ]
        network = nn.Sequential(OrderedDict(parts)).double()
        network.load_state_dict(weights, strict=False)
        return network.train()


@pytest.mark.parametrize("name", "abcd")
def test_a_batch_as_the_released_code_takes_it(name: str) -> None:
    case = Case(name)
    network = case.network("w0_")
    optimizer = torch.optim.SGD(network.parameters(), case.lr, case.momentum, weight_decay=case.weight_decay)
    m, size = int(case.m), len(case["y"]) // int(case.m)
    radius = case.maxnorm if case.maxnorm >= 0 else None
    for k in range(m):
        x, y = case["x"][k * size : (k + 1) * size], case["y"][k * size : (k + 1) * size]
        delta, lam = case.sigma * case["z"][k], case["u"][k] / 2
        path = climb(network, x, y, delta, int(case.T), case.alpha, radius)
        s = keep_near(path[int(case.mix_step)], x, case.alpha * case.mix_step * case.w)
        torch.testing.assert_close(s, case["init"][k], **TOLERANCE)
        torch.testing.assert_close(path[-1], case["adv"][k], **TOLERANCE)
        loss, mask = mixed_loss(network, s, path[-1], y, delta, lam, case.eta * case.w)
        assert torch.equal(mask, case["mask"][k])
        torch.testing.assert_close(loss, case["loss"][k], **TOLERANCE)
        optimizer.zero_grad()
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in network.parameters()])
        torch.testing.assert_close(grad, case["grad"][k], **TOLERANCE)
        optimizer.step()
    for key, value in case.network("w1_").state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(network.state_dict()[key], value, **TOLERANCE)


def test_a_detached_target_is_another_method() -> None:
    case = Case("a")
    y, delta, lam = case["y"][:2], case.sigma * case["z"][0], case["u"][0] / 2
    grads = []
    for detached in (False, True):
        network = case.network("w0_")
        loss, _ = mixed_loss(
            network, case["init"][0], case["adv"][0], y, delta, lam, case.eta * case.w, detached
        )
        torch.testing.assert_close(loss, case["loss"][0], **TOLERANCE)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (grads[0] - grads[1]).abs().max() > 1e-2


def test_masked_images_add_nothing_and_still_divide_the_mean() -> None:
    case = Case("a")
    network, delta, lam = case.network("w0_"), case.sigma * case["z"][0], case["u"][0] / 2
    vote = network((case["init"][0] + delta).flatten(0, 1)).softmax(1).unflatten(0, (4, 2)).mean(0)
    wrong = (vote.argmax(1) + 1) % 5
    one_right = torch.stack([vote.argmax(1)[0], wrong[1]])
    parts = []
    for weight in (0.0, 1.0):
        for y in (wrong, one_right, vote.argmax(1)):
            loss, mask = mixed_loss(network, case["init"][0], case["adv"][0], y, delta, lam, weight)
            parts.append(loss)
            assert mask.tolist() == (vote.argmax(1) == y).tolist()
    none, one, both = (b - a for a, b in zip(parts[:3], parts[3:], strict=True))
    assert none == 0
    assert 0 < one < both


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", None)


def task(digits: Dataset, folder: Path, *overrides: str) -> TrainTask:
    recipe = installed().find_recipe("smoothmix/digits-l2-0.5", overrides)
    return TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=digits,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: build_network("cnn-small", digits.info, 0),
    )


@pytest.mark.parametrize("mix_step", [0, 1])
def test_a_step_on_digits_is_its_parts_put_together(digits: Dataset, tmp_path: Path, mix_step: int) -> None:
    objective = SmoothMix(task(digits, tmp_path, f"method.mix_step={mix_step}"))
    network = build_network("cnn-small", digits.info, 0).train()
    objective.prepare(network, 10)
    images, labels = to_pixels(digits.train.images[:16], 16), digits.train.labels[:16]
    step = Step(7, 2, 10)
    twin = copy.deepcopy(network)
    loss, figures = objective.loss(images, labels, step)
    assert figures["w"] == 2 / 5
    lam, delta = objective.shares(16, step), objective.noises(images, 2, step)
    assert ((lam > 0) & (lam <= 0.5)).all()
    path = climb(twin, images, labels, delta, 4, 0.5)
    s = images if mix_step == 0 else keep_near(path[1], images, 0.5 * 2 / 5)
    assert (s - images).flatten(1).norm(dim=1).max() <= 0.2 + 1e-5
    torch.testing.assert_close(loss, mixed_loss(twin, s, path[-1], labels, delta, lam, 2.0 * 2 / 5)[0])
    for name, value in twin.named_buffers():
        torch.testing.assert_close(
            dict(network.named_buffers())[name], value, msg=f"{name}: two updates, no more"
        )
    assert network.state_dict()["1.num_batches_tracked"] == 2


def test_a_vanishing_class_leaves_the_gradient_finite() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        network[1].weight.mul_(1e4)
    x = torch.rand(4, 1, 8, 8)
    lam = torch.full((4,), 2.0**-25)
    loss, _ = mixed_loss(network, x, x, network(x).argmax(1), torch.randn(2, 4, 1, 8, 8), lam, 5.0)
    loss.backward()
    assert loss.isfinite()
    assert network[1].weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "method.alpha=0.5",
            "attack is attack_step; the alpha of certification is certify.smoothing.failure_prob",
        ),
        ("method.failure_probability=0.5", "the alpha of certification"),
        ("method.attack_step=0", "method.attack_step = 0"),
        ("method.noises=0", "method.noises = 0"),
        ("method.mix_step=4", "mix_step = 4 asks for a point that an attack of 4"),
        ("method.attack_radius=-1", 'method.attack_radius = "-1"'),
        ("method.eta=5", "unknown key 'method.eta'"),
    ],
)
def test_bad_settings_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe("smoothmix/digits-l2-0.5", [override])


def test_more_noises_than_images_in_a_batch_are_refused_before_training(
    digits: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a batch of 4 images cannot be cut into 8 chunks"):
        installed().train(task(digits, tmp_path, "method.noises=8", "train.batch_size=4"))
    assert not list(tmp_path.iterdir())


def test_recipes_hold_the_released_settings() -> None:
    found = {}
    for name in installed().recipes():
        method, _, rest = name.partition("/")
        if (
            method == "smoothmix"
            and not rest.startswith(("digits", "imagenet"))
            and not re.search(r"-\d+ep", rest)
        ):
            recipe = installed().find_recipe(name)
            of = installed().settings(recipe)
            key = (recipe.dataset, recipe.model, recipe.sigma, of.mix_weight, of.mix_step)
            found[key] = (of.noises, of.attack_iterations, of.attack_step)
            epochs, rate = (90, 0.01) if recipe.dataset == "mnist" else (150, 0.1)
            train = recipe.train
            assert (train.epochs, train.learning_rate, train.batch_size, train.optimizer) == (
                epochs,
                rate,
                256,
                "sgd",
            )
            assert train.milestones == (epochs // 3, 2 * epochs // 3)
            assert (train.milestone_lag, train.decay, train.momentum, train.weight_decay) == (
                1,
                0.1,
                0.9,
                1e-4,
            )
            assert not train.gradient_clip
            crop = Augmentation(
                flip=True, crop_padding=4, crop_fill=0.0
            )  # as published; digits stay as they are
            assert train.augmentation == (None if recipe.dataset == "mnist" else crop)
    mnist = {(0.25, 1.0): 3, (0.25, 5.0): 2, (0.5, 1.0): 4, (0.5, 5.0): 4, (1.0, 1.0): 8, (1.0, 5.0): 8}
    expected = {("mnist", "lenet", *key, s): (4, T, 1.0) for key, T in mnist.items() for s in (0, 1)}
    for sigma, alpha in ((0.25, 0.5), (0.5, 1.0), (1.0, 2.0)):
        expected |= {("cifar10", "resnet110", sigma, 5.0, s): (2, 4, alpha) for s in (0, 1)}
        expected |= {("cifar10", "resnet20", sigma, 5.0, 0): (2, 4, alpha)}
    assert found == expected


def test_published_figures_speak_of_recipes_that_are_there() -> None:
    figures = [
        figure
        for path in (files("certbench_smoothmix") / "published").iterdir()
        for figure in tomllib.loads(path.read_text(encoding="utf-8"))["figures"]
    ]
    ablations = {member.name for member in suites(installed())["smoothmix/mnist-ablations"].members}
    assert len(figures) > 150
    for figure in figures:
        assert (figure["method"], figure["norm"], figure["basis"]) == ("smoothmix", "l2", "log")
        if "recipe" in figure:
            name, *changes = figure["recipe"].split(" +")
            recipe = installed().find_recipe(name, changes)
            assert not changes or recipe.name in ablations
            found = (recipe.dataset, recipe.model, recipe.sigma)
            assert found == (figure["dataset"], figure["model"], figure["sigma"])
