"""Training as published: schedules, steps, augmentation, choice of the granularity; and the objective that is ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certbench.contract import TrainTask
from certbench.data.dataset import Dataset, to_pixels
from certbench.data.files import load_dataset
from certbench.errors import RunError, UsageError
from certbench.plugins import installed
from certbench.recipe import Train
from certbench.training import LinearRamp, Step, robust_cross_entropy
from certbench.training.fit import build_optimizer
from certbench_abstraction.augment import FILL, augment
from certbench_abstraction.bounds import CellBounds, coupled_box, interval_margins
from certbench_abstraction.cells import reachable
from certbench_abstraction.granularity import (
    candidates,
    end_point_gradients,
    intervals,
    pull,
    refine_further,
    widths,
)
from certbench_abstraction.layer import Abstraction
from certbench_abstraction.network import build_classifier, split
from certbench_abstraction.objective import Abscert, AbstractionIBP, initialize, warm_cosine
from certbench_abstraction.settings import Search
from certbench_abstraction.training import BestEpoch, accuracy, train_abstraction

Load = Callable[[str], dict[str, Tensor]]
Weights = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    full = load_dataset("digits", None)
    return replace(full, train=full.train.slice(0, 400), test=full.test.slice(0, 100))


def task_of(digits: Dataset, folder: Path, *overrides: str, method: str = "abstraction") -> TrainTask:
    recipe = installed().find_recipe(f"{method}/digits-linf-0.1", ["train.epochs=2", *overrides])
    return TrainTask(
        recipe=recipe,
        settings=installed().settings(recipe),
        dataset=digits,
        device=torch.device("cpu"),
        folder=folder,
        build_network=lambda: pytest.fail("the plugin builds its own network"),
    )


# Granularity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_the_schedule_of_widths_is_the_released_one(oracle: Load, case: str) -> None:
    arrays = oracle("granularity")
    tried, finest = widths(arrays[f"{case}_eps"].tolist(), float(arrays[f"{case}_dstep"]))
    torch.testing.assert_close(torch.tensor(tried).double(), arrays[f"{case}_d_list"], atol=1e-7, rtol=0)
    assert tried == pytest.approx(arrays[f"{case}_d_list"].tolist(), abs=1e-12)
    assert finest == pytest.approx(arrays[f"{case}_d_threshold"].tolist(), abs=1e-12)
    assert [intervals(d, True) for d in tried] == arrays[f"{case}_n_used"].int().tolist()
    meant = [intervals(d, False) for d in tried]
    assert [2 / n for n in meant] == pytest.approx(tried, abs=1e-12)


def test_floor_division_loses_an_interval_for_91_of_254_widths() -> None:
    lost = [i for i in range(2, 256) if intervals(2 / i, True) == i - 1]
    assert len(lost) == 91
    assert {5, 10, 11, 13, 44, 80} <= set(lost)


def test_candidates_are_the_published_ones() -> None:
    mnist = Search(radii=(0.4, 0.3, 0.2, 0.1))
    assert candidates(mnist, False, 255) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert candidates(mnist, True, 255) == [2, 3, 4, 6, 7, 8, 9]
    assert candidates(mnist, False, 6) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", range(6))
def test_the_stopping_test_as_coded_and_as_intended(oracle: Load, number: int, with_weights: Weights) -> None:
    arrays = oracle("tuning")
    images, labels = arrays[f"t{number}_x"].double(), arrays[f"t{number}_y"].long()
    channels = images.shape[1]
    f = nn.Sequential(nn.Flatten(), nn.Linear(32 * channels, 6), nn.ReLU(), nn.Linear(6, 10)).double()
    classifier = nn.Sequential(
        Abstraction(int(arrays["n"])).double(), with_weights(f, arrays, f"t{number}_w__")
    )
    batches = zip(((images + 1) / 2).split(8), labels.split(8), strict=True)
    gradients = end_point_gradients(classifier, batches)
    wanted = arrays["sums"][number].tolist()
    places = [
        slice(0, channels),
        slice(0, 2 * channels, 2),
        slice(channels, 2 * channels),
        slice(0, channels),
    ]
    for place, (rises, falls) in zip(places, zip(wanted[::2], wanted[1::2], strict=True), strict=True):
        found = pull(gradients, place)
        assert (found.rises, found.falls) == pytest.approx((rises, falls), rel=1e-5)
    assert refine_further(gradients, released_channels=True) == bool(arrays["official_continue"][number])
    assert refine_further(gradients, released_channels=False) == bool(arrays["intended_continue"][number])


def test_the_granularity_is_chosen_on_held_out_training_images(digits: Dataset, tmp_path: Path) -> None:
    recipe_task = task_of(digits, tmp_path)
    search = Search(radii=(0.5, 0.3), held_out=100)
    own = replace(recipe_task, settings=recipe_task.settings.model_copy(update={"n": None, "search": search}))
    blind = replace(own, dataset=replace(digits, test=digits.test.slice(0, 1)))
    network = train_abstraction(blind)
    notes = json.loads((tmp_path / "search.json").read_text())
    assert notes["n"] == network[0].n
    assert set(map(int, notes["tried"])) <= {2, 3}
    assert all(round(share * 100) == pytest.approx(share * 100) for share in notes["tried"].values()), (
        "of 100 images"
    )
    again = train_abstraction(replace(blind, only_load=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(RunError, match="no finished search"):
        train_abstraction(replace(blind, only_load=True, folder=tmp_path / "elsewhere"))
    greedy = own.settings.model_copy(update={"search": search.model_copy(update={"held_out": 399})})
    with pytest.raises(UsageError, match="leaves none to train on"):
        train_abstraction(replace(own, settings=greedy, folder=tmp_path / "greedy"))


def test_released_selection_keeps_the_best_epoch_of_the_test_set(digits: Dataset, tmp_path: Path) -> None:
    task = task_of(digits, tmp_path, "method.released.test_selection=true", "train.epochs=3")
    network = train_abstraction(task)
    notes = json.loads((tmp_path / "best.json").read_text())
    assert accuracy(network, digits.test, task) == notes["accuracy"]
    assert 1 <= notes["epoch"] <= 3
    before = (tmp_path / "best.safetensors").stat().st_mtime_ns
    BestEpoch(task, digits.test).look(9, network)
    assert (tmp_path / "best.safetensors").stat().st_mtime_ns == before, "an equal epoch changes nothing"
    plain = train_abstraction(task_of(digits, tmp_path / "plain", "train.epochs=3"))
    assert not (tmp_path / "plain" / "best.json").exists()
    assert plain[0].n == network[0].n


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.n=1", "method.n = 1"),
        ("method.n=0", "method.n = 0"),
        ("method.ladder.cap=-1", "method.ladder.cap"),
        ("method.warm_up=1.0", "method.warm_up = 1.0"),
        ("method.released.everything=true", "unknown key 'method.released.everything'"),
        ("method.search.radii=[0.1, 0.2]", "radii fall from large to small"),
        ("method.search.radii=[0.2, 0.1]", "and not both"),
    ],
)
def test_bad_settings_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        installed().find_recipe("abstraction/digits-linf-0.1", [override])


def test_more_intervals_than_pixel_values_are_refused_before_training(
    digits: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="method.n = 17: pixels of digits have 17 values"):
        train_abstraction(task_of(digits, tmp_path, "method.n=17"))


def test_a_cap_of_zero_is_a_setting() -> None:
    recipe = installed().find_recipe("abstraction/digits-linf-0.1", ["method.ladder.cap=0"])
    assert installed().settings(recipe).ladder.cap == 0


# Steps -----------------------------------------------------------------------------------------------------------------


def sequential(arrays: dict[str, Tensor], with_weights: Weights) -> nn.Sequential:
    hidden = len(arrays["i__fc__1__bias"])
    pixels = arrays["x_train"][0].numel()
    f = nn.Sequential(nn.Flatten(), nn.Linear(2 * pixels, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    layer = Abstraction(int(arrays["n"])).double()
    ends = 2 * torch.arange(layer.n + 1, dtype=torch.float64) / layer.n - 1
    layer.upper, layer.lower = ends[1:], ends[:-1]
    return nn.Sequential(layer, with_weights(f.double(), arrays, "i__"))


@pytest.mark.parametrize("name", ["train_adam_cosine", "train_sgd_step"])
def test_a_whole_training_run_is_the_released_one(
    oracle: Load, name: str, digits: Dataset, tmp_path: Path, with_weights: Weights
) -> None:
    arrays = oracle(name)
    adam = name == "train_adam_cosine"
    epochs, batch, rate = int(arrays["epochs"]), int(arrays["batch_size"]), float(arrays["base_lr"])
    every = -(-epochs // 5)
    train = Train(
        epochs=epochs,
        batch_size=batch,
        learning_rate=rate,
        gradient_clip=0.0,
        weight_decay=2e-4 if adam else 5e-4,
        optimizer="adam" if adam else "sgd",
        schedule="cosine" if adam else "milestones",
        milestones=() if adam else tuple(range(every, epochs, every)),
        decay=0.1,
    )
    task = task_of(digits, tmp_path, "method.released.double_wave=true")
    objective = Abscert(replace(task, recipe=task.recipe.model_copy(update={"train": train})))
    network = sequential(arrays, with_weights)
    objective.network = network
    optimizer = build_optimizer(network[1], train)
    images, labels = (arrays["x_train"].double() + 1) / 2, arrays["y_train"].long()
    test = (arrays["x_test"].double() + 1) / 2
    per_epoch = len(images) // batch
    for t in range(epochs * per_epoch):
        step = Step(t, t // per_epoch + 1, per_epoch)
        place = slice(t % per_epoch * batch, (t % per_epoch + 1) * batch)
        for group in optimizer.param_groups:
            group["lr"] = objective.learning_rate(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(arrays["step_lr"][t]), abs=1e-12)
        loss, _ = objective.loss(images[place], labels[place], step)
        assert float(loss.detach()) == pytest.approx(float(arrays["step_loss"][t]), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (t + 1) % per_epoch == 0:
            right = (network(test).argmax(1) == arrays["y_test"].long()).double().mean()
            assert float(right) == pytest.approx(float(arrays["epoch_test_acc"][t // per_epoch]))
    torch.testing.assert_close(network[1][3].bias.detach(), arrays["f__last_bias"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network[1][1].weight.detach(), arrays["f__first_weight"], rtol=1e-4, atol=1e-5)


def test_the_intended_wave_ends_at_zero_and_the_released_one_at_its_peak() -> None:
    assert warm_cosine(0, 1000, 0.1, 0.5) == 0.0
    assert warm_cosine(100, 1000, 0.1, 0.5) == 1.0
    assert warm_cosine(999, 1000, 0.1, 0.5) < 1e-5
    assert warm_cosine(999, 1000, 0.1, 2.0) > 0.999
    assert warm_cosine(325, 1000, 0.1, 2.0) == pytest.approx(0.0, abs=1e-12)
    assert warm_cosine(3, 5, 0.1, 0.5) > 0, "too short a run for a warm-up has none"


@pytest.mark.parametrize(
    ("kind", "spread"),
    [("xavier", (6 / 1200) ** 0.5 / 3**0.5), ("normal", 0.01), ("kaiming", (2 / 800) ** 0.5)],
)
def test_weights_are_drawn_as_published_and_biases_left_alone(kind: str, spread: float) -> None:
    layer = nn.Linear(800, 400)
    bias = layer.bias.clone()
    initialize(layer, kind, 1)
    assert float(layer.weight.detach().std()) == pytest.approx(spread, rel=0.02)
    assert torch.equal(layer.bias, bias)
    first = layer.weight.clone()
    initialize(layer, kind, 1)
    assert torch.equal(layer.weight, first)


def test_the_augmentation_flips_erases_and_shifts() -> None:
    images = torch.rand(400, 3, 32, 32)
    found = augment(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert torch.equal(found, augment(images, torch.Generator().manual_seed(0)))
    grey = (found == FILL).all(1).flatten(1).float().mean(1)
    erased = grey[grey > 0]
    assert len(erased) / 400 > 0.5
    assert float(grey.max()) < 0.2 + 0.3
    flat = torch.zeros(4000, 1, 32, 32)
    shares = (augment(flat, torch.Generator().manual_seed(1)) == FILL)[:, 0, 12:20, 12:20].flatten(1).any(1)
    assert 0.1 < float(shares.float().mean()) < 0.45, (
        "about half have a rectangle, not all of them in the middle"
    )
    marked = torch.arange(32.0).expand(1000, 1, 32, 32)
    rising = (augment(marked, torch.Generator().manual_seed(2)).diff(dim=3)[:, 0, 16] == 1).sum(1)
    assert 0.4 < float((rising > 5).float().mean()) < 0.6, "half are mirrored"


# Ours ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 3, 8, 30])
def test_the_loss_of_each_phase(digits: Dataset, tmp_path: Path, batch: int) -> None:
    task = task_of(
        digits,
        tmp_path,
        "method.ramp_start=1",
        "method.ramp_epochs=2",
        "method.kappa=0.25",
        method="abstraction-ibp",
    )
    objective = AbstractionIBP(task)
    network = build_classifier("dm-small", digits.info, 4, 0)
    objective.prepare(network, 5)
    images, labels = to_pixels(digits.train.images[:16], 16), digits.train.labels[:16]
    loss, figures = objective.loss(images, labels, Step(batch, batch // 5 + 1, 5))
    eps = LinearRamp(0.1, 1, 2, 5)(batch)
    assert figures["eps"] == eps
    clean = F.cross_entropy(network(images), labels)
    cells = reachable(images.double(), torch.full((16,), eps, dtype=torch.float64), network[0])
    stem, _ = split(network[1])
    margins = interval_margins(stem, objective.graph, coupled_box(cells, network[0]), labels)
    kappa = 1 - 0.75 * eps / 0.1
    wanted = clean if eps == 0 else kappa * clean + (1 - kappa) * robust_cross_entropy(margins)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    certifier = CellBounds(network.eval(), digits.info.shape, None)
    torch.testing.assert_close(
        margins.amin(1).double(), certifier.interval(cells, labels), rtol=1e-4, atol=1e-4
    )


def test_networks_with_batch_norm_train_too(digits: Dataset, tmp_path: Path) -> None:
    task = task_of(digits, tmp_path, "model=cnn-small", "method.ramp_start=1", method="abstraction-ibp")
    network = train_abstraction(task)
    assert accuracy(network, digits.test, task) > 0.2
