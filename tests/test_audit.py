"""The audit: attacks that are strong, witnesses that are exact, and certificates that are refuted only when wrong."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator
from decimal import Decimal, localcontext
from fractions import Fraction
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import certbench
from certbench.audit.ball import ball, contains, contains_exactly, distance
from certbench.audit.bounded import UnsupportedError
from certbench.audit.certificates import AuditTask, audit
from certbench.audit.deployment import DeployedNetwork, to_tf32
from certbench.audit.enclosure import Enclosure
from certbench.audit.judges import RealJudge
from certbench.audit.losses import logits_ratio, smallest_margin
from certbench.audit.registry import ATTACKS, Attack, Phase, find_attack, register_attack
from certbench.audit.search import Found, checkpoints, hunt
from certbench.contract import Certificates, MethodCard
from certbench.data.catalog import DATASETS
from certbench.data.dataset import Split, to_pixels
from certbench.data.files import load_dataset
from certbench.errors import DataError, FoundError, RunError, UsageError
from certbench.hookspecs import hookimpl
from certbench.leaderboard.board import boards
from certbench.leaderboard.build import Built, build
from certbench.leaderboard.records import records
from certbench.leaderboard.tables import markdown, plain
from certbench.models import build_network
from certbench.plugins import Plugins
from certbench.recipe import Strict
from certbench.results.checks import check_store
from certbench.results.store import ResultStore
from certbench.threat import round_down

AWKWARD = [Fraction(8, 255), Fraction(1, 10**9), Fraction(1, 10), Fraction(1, 3), Fraction(1), Fraction(0)]


# Independence ------------------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("certbench")}


def test_the_audit_shares_no_code_with_what_it_audits() -> None:
    """Followed through everything that the room imports, and again through what that imports."""
    assert certbench.__file__ is not None
    package = Path(certbench.__file__).parent
    waiting = sorted((package / "audit").glob("*.py"))
    assert len(waiting) > 5
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for name in imported(path):
            assert name.split(".")[1:2] not in (["bounds"], ["smoothing"], ["training"]), (
                f"{path.name}: {name}"
            )
            inner = package.joinpath(*name.split(".")[1:])
            found = [inner.with_suffix(".py"), inner / "__init__.py"]
            waiting += [p for p in found if p.is_file() and p not in seen]
    assert package / "data" / "dataset.py" in seen, "the walk follows imports"


# Balls -------------------------------------------------------------------------------------------------------------

pixels = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 2.0**-149, 2.0**-126, 1 - 2.0**-24])
radii = st.sampled_from([round_down(r) for r in AWKWARD]) | st.floats(0, 1) | st.floats(0, 1e-6)


def stepped(values: Tensor, towards: float) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, towards))


@given(st.lists(pixels, min_size=1, max_size=6), radii)
@settings(max_examples=300, deadline=None)
def test_bounds_of_a_ball_are_the_widest_inside_it(values: list[float], radius: float) -> None:
    center = torch.tensor([values], dtype=torch.float32)
    found = ball(center, torch.tensor([radius], dtype=torch.float64))
    exact = Fraction(radius)
    for bound, outer in ((found.low, -1.0), (found.high, 2.0)):
        assert contains_exactly(center[0], exact, bound[0])
        assert contains(center, found.radius, bound).all()
        for place, beyond in enumerate(stepped(bound[0], outer).tolist()):
            gap = abs(Fraction(beyond) - Fraction(values[place]))
            assert gap > exact or not 0 <= beyond <= 1, "one step further is outside"


@given(st.lists(st.tuples(pixels, pixels), min_size=1, max_size=6), radii)
@settings(max_examples=300, deadline=None)
def test_membership_and_distance_are_exact(pairs: list[tuple[float, float]], radius: float) -> None:
    center, image = (torch.tensor([column], dtype=torch.float32) for column in zip(*pairs, strict=True))
    e = torch.tensor([radius], dtype=torch.float64)
    assert contains(center, e, image).item() == contains_exactly(center[0], Fraction(radius), image[0])
    far = distance(center, image).item()
    exact = max(abs(Fraction(a) - Fraction(b)) for a, b in pairs)
    assert Fraction(far) >= exact and (far == 0 or Fraction(math.nextafter(far, 0)) < exact)


def test_a_rounded_comparison_would_let_a_point_out() -> None:
    """The difference 1 - 2^-149 rounds to the radius 1, so only its exact rest tells."""
    tiny, just_below = 2.0**-149, math.nextafter(1.0, 0)
    center, image = torch.tensor([[1.0]]), torch.tensor([[tiny]])
    e = torch.tensor([just_below], dtype=torch.float64)
    assert not contains(center, e, image).item()
    assert contains(center, torch.ones(1, dtype=torch.float64), image).item()
    # here the rounded difference is the radius itself, and the point is outside
    center, image = torch.tensor([[2.0**-149]]), torch.tensor([[0.5 + 2.0**-24]])
    rounded = (image.double() - center.double())[0]
    assert not contains_exactly(torch.tensor([0.0]), Fraction(0.5), torch.tensor([0.5 + 2.0**-24]))
    assert contains(center, rounded, image).item() == contains_exactly(
        center[0], Fraction(rounded.item()), image[0]
    )


# Attacks -----------------------------------------------------------------------------------------------------------


def plain_network(name: str = "digits", steps: int = 150) -> tuple[nn.Module, Any]:
    """A plainly trained network and its data."""
    dataset = load_dataset(name)
    network = build_network("cnn-small", dataset.info, 0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(0, len(dataset.train), (128,), generator=generator)
        images = to_pixels(dataset.train.images[chosen], dataset.info.levels)
        loss = F.cross_entropy(network(images), dataset.train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval(), dataset


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Any]:
    torch.set_num_threads(1)
    return plain_network()


def never(images: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(labels, dtype=torch.bool)


def always(images: Tensor, labels: Tensor) -> Tensor:
    return torch.ones_like(labels, dtype=torch.bool)


def uniform(images: Tensor) -> Any:
    return lambda phase, restart: torch.rand(
        images.shape, generator=torch.Generator().manual_seed(100 * phase + restart)
    )


@pytest.mark.parametrize("radius", [0.03, 0.06, 0.1])
def test_attacks_are_at_least_as_strong_as_foolbox(trained: tuple[nn.Module, Any], radius: float) -> None:
    """Equal steps, equal images: plain PGD and the standard attack, each against foolbox's PGD."""
    foolbox = pytest.importorskip(
        "foolbox", reason="foolbox is needed to compare attacks; it is not installed"
    )
    network, dataset = trained
    images, labels = to_pixels(dataset.test.images, dataset.info.levels), dataset.test.labels
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    _, _, broken = foolbox.attacks.LinfPGD(steps=40)(model, images, labels, epsilons=radius)
    e = torch.full((len(labels),), radius, dtype=torch.float64)
    for name in ("pgd", "standard"):
        attack = find_attack(name)
        assert sum(phase.steps * phase.restarts for phase in attack.phases) == 40
        state = hunt(network, ball(images, e), labels, attack, always, uniform(images))
        assert int((state.found == Found.WITNESS).sum()) >= int(broken.sum()), name
    assert 0.02 < broken.float().mean() < 0.98, "the comparison means something"


def test_each_part_of_the_standard_attack_finds_something(trained: tuple[nn.Module, Any]) -> None:
    network, dataset = trained
    images, labels = to_pixels(dataset.test.images[:120], dataset.info.levels), dataset.test.labels[:120]
    balls = ball(images, torch.full((120,), 0.06, dtype=torch.float64))
    clean = int((network(images).argmax(1) != labels).sum())
    for phase in [*find_attack("standard").phases, Phase("pgd", "dlr", 20)]:
        state = hunt(network, balls, labels, Attack("one", (phase,)), always, uniform(images))
        assert int((state.found == Found.WITNESS).sum()) > clean + 5, phase
        witnesses = state.witness[state.found == Found.WITNESS]
        assert (smallest_margin(network(witnesses), labels[state.found == Found.WITNESS]) <= 1e-5).all()


@given(st.sampled_from(AWKWARD), st.integers(0, 2**31), st.sampled_from(sorted(ATTACKS)))
@settings(max_examples=40, deadline=None)
def test_every_point_an_attack_looks_at_is_inside(radius: Fraction, seed: int, name: str) -> None:
    """Not only witnesses: each image that the network is asked about, at pixels of 0, 1 and between."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 1, 2, 2), generator=generator).float() / 255
    images[0], images[1] = 0.0, 1.0
    labels = torch.tensor([0, 1, 2])
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    phases = tuple(Phase(p.search, p.loss, min(p.steps, 6)) for p in find_attack(name).phases)
    e = torch.full((3,), round_down(radius), dtype=torch.float64)
    hunt(network, ball(images, e), labels, Attack("short", phases), never, uniform(images))
    assert len(seen) > 6
    for points in seen[1:]:
        for point in points:  # balls leave the batch, so a point is matched to the ball it may be in
            assert any(contains_exactly(center, radius, point) for center in images)


def test_checkpoints_are_those_of_the_paper() -> None:
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_logits_ratio_ignores_shift_and_scale() -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    assert torch.allclose(logits_ratio(logits, labels), logits_ratio(1e3 * logits + 7, labels))
    assert torch.equal(logits_ratio(logits[:, :2], labels % 2), -smallest_margin(logits[:, :2], labels % 2))


def test_attacks_are_registered_once_and_named() -> None:
    with pytest.raises(UsageError, match="registered twice"):
        register_attack(Attack("standard", (Phase("pgd", "ce", 1),)))
    with pytest.raises(UsageError, match="did you mean 'standard'"):
        find_attack("standart")
    with pytest.raises(UsageError, match="has no phase"):
        register_attack(Attack("empty", ()))
    with pytest.raises(UsageError, match="at least one step"):
        Phase("pgd", "ce", 0)
    assert len({attack.settings_digest for attack in ATTACKS.values()}) == len(ATTACKS)


TENTH_OF_FORWARD = 0.1  # not a decimal tenth: the float64 number, exactly


# Error bounds ------------------------------------------------------------------------------------------------------


def exact_linear(layer: nn.Linear, x: list[Fraction]) -> list[Fraction]:
    rows = [[Fraction(w) for w in row] for row in layer.weight.tolist()]
    return [
        sum((w * v for w, v in zip(row, x, strict=True)), Fraction(b))
        for row, b in zip(rows, layer.bias.tolist(), strict=True)
    ]


def badly_scaled(*layers: nn.Module, seed: int) -> nn.Module:
    """Weights over many orders of magnitude, so that sums cancel."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in network.parameters():
            size = torch.randint(-12, 12, parameter.shape, generator=generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.0**size)
    return network.eval()


@pytest.mark.parametrize("seed", range(12))
def test_error_bounds_hold_against_rational_arithmetic(seed: int) -> None:
    network = badly_scaled(
        nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), seed=seed
    )
    image = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    found = Enclosure(network, (1, 2, 2)).logits(image)
    x = [Fraction(v) for v in image.flatten().tolist()]
    for layer in network.children():
        if isinstance(layer, nn.Linear):
            x = exact_linear(layer, x)
        elif isinstance(layer, nn.ReLU):
            x = [max(v, Fraction(0)) for v in x]
    gaps = [abs(Fraction(v) - t) for v, t in zip(found.value[0].tolist(), x, strict=True)]
    assert all(gap <= Fraction(e) for gap, e in zip(gaps, found.error[0].tolist(), strict=True))
    assert any(gap > 0 for gap in gaps), "float64 alone is not exact here, so the bound is needed"
    assert (found.error < 1e-6 * (1 + found.value.abs())).all(), "and it is not vacuous"


@pytest.mark.parametrize("seed", range(4))
def test_error_bounds_hold_for_convolution_batch_norm_and_branches(seed: int) -> None:
    """One 1x1 convolution with batch norm, added to its input, then a mean; against 60 decimal digits."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 2, 1)
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = ((self.norm(self.convolution(x)) + x) * 3 - TENTH_OF_FORWARD).mean((2, 3))
            return result

    network = Branches().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*network.parameters(), network.norm.running_mean]:
            assert isinstance(tensor, Tensor)
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1e4)
        assert network.norm.running_var is not None
        network.norm.running_var.copy_(torch.rand(2, generator=generator) * 1e-3)
    image = torch.rand(1, 2, 2, 2, generator=generator)
    found = Enclosure(network, (2, 2, 2)).logits(image)
    weights = {
        name: [Decimal(v) for v in t.double().flatten().tolist()] for name, t in network.state_dict().items()
    }
    x = [[Decimal(v) for v in channel] for channel in image[0].flatten(1).tolist()]
    with localcontext() as context:
        context.prec = 60
        for k in range(2):
            total = Decimal(0)
            scale = (
                weights["norm.weight"][k]
                / (weights["norm.running_var"][k] + Decimal(network.norm.eps)).sqrt()
            )
            for place in range(4):
                h = weights["convolution.bias"][k]
                h += sum(weights["convolution.weight"][2 * k + c] * x[c][place] for c in range(2))
                h = (h - weights["norm.running_mean"][k]) * scale + weights["norm.bias"][k]
                total += (h + x[k][place]) * 3 - Decimal(TENTH_OF_FORWARD)
            gap = abs(Decimal(found.value[0, k].item()) - total / 4)
            assert gap <= Decimal(found.error[0, k].item()) + Decimal("1e-40")
            assert gap > 0


@pytest.mark.parametrize("model", ["cnn-small", "wide-resnet-8", "resnext-2x32"])
def test_every_kind_of_layer_of_our_models_has_a_rule(model: str) -> None:
    info = DATASETS["cifar10"]  # which is normalised inside the network
    network = build_network(model, info, 0)
    images = torch.rand(2, *info.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(images)  # running statistics that are not 0 and 1
    network.eval()
    found = Enclosure(network, info.shape).logits(images)
    with torch.no_grad():
        expected = network.double()(images.double())
    assert (found.value - expected).abs().max() <= 2 * found.error.max() < 1e-2


def test_pooling_concatenation_and_in_place_operations_have_rules() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.pools = nn.ModuleList([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)])
            self.last = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x - 0.5
            z = self.relu(y)  # y is rectified too
            parts = torch.cat([pool(t) for pool, t in zip(self.pools, (y, z, y), strict=True)], 1)
            result: Tensor = self.last(parts.view(parts.size(0), -1) / 3.0)
            return result

    network = Mixed().eval()
    images = torch.rand(4, 1, 4, 4)
    found = Enclosure(network, (1, 4, 4)).logits(images)
    with torch.no_grad():
        assert (found.value - network.double()(images.double())).abs().max() <= 2 * found.error.max() < 1e-12


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softsign()), "no rule for module .*Softsign"),
        (Branching(), "cannot be traced"),
    ],
)
def test_an_operation_without_a_rule_is_named_and_confirms_nothing(network: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        Enclosure(network, (1, 2, 2))
    judge = RealJudge(network, (1, 2, 2))
    assert judge.limit and not judge(torch.rand(2, 1, 2, 2), torch.tensor([0, 1])).any()


def test_hooks_and_infinite_weights_are_not_overlooked() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    handle = network[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="has a hook"):
        Enclosure(network, (1, 2, 2))
    handle.remove()
    with torch.no_grad():
        network[1].weight[0, 0] = torch.inf
    with pytest.raises(UnsupportedError, match="not finite"):
        Enclosure(network, (1, 2, 2))


def test_a_tie_within_the_error_is_not_confirmed() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        network[1].weight[1] = network[1].weight[0]
        network[1].bias[1] = network[1].bias[0] = 5.0
    image = torch.rand(1, 1, 2, 2)
    enclosure = Enclosure(network, (1, 2, 2))
    assert not enclosure.is_flipped(image, torch.tensor([0])).item()
    assert enclosure.is_flipped(image, torch.tensor([2])).item()


# Outcomes ----------------------------------------------------------------------------------------------------------


def task(network: nn.Module, split: Split, levels: int = 255, **changes: Any) -> AuditTask:
    count = len(split)
    fields: dict[str, Any] = {
        "network": network,
        "split": split,
        "levels": levels,
        "index": np.arange(count),
        "prediction": split.labels.numpy(),
        "verdict": np.full(count, "certified", dtype=object),
        "radius": np.full(count, round_down(Fraction(1, 10))),
        "guarantee": "real_arith",
        "deploy": "float32",
        "recipe_radius": Fraction(1, 10),
        "attack": find_attack("standard"),
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return AuditTask(**(fields | changes))


def cancelling() -> tuple[nn.Module, Split]:
    """The margin is x2 > 0 in real arithmetic, and 0 in float32: ``(2^24 x1 + x2) - 2^24 x1``."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[2.0**24, 1.0], [2.0**24, 0.0]]))
        network[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        network[1].bias.zero_()
        network[2].bias.zero_()
    return network.eval(), Split(torch.tensor([[[[255, 100]]]], dtype=torch.uint8), torch.tensor([0]))


@pytest.mark.parametrize(
    ("guarantee", "outcome"), [("real_arith", "refuted_in_float"), ("float_sound", "refuted")]
)
def test_a_flip_of_float32_alone_refutes_only_what_covers_round_off(guarantee: str, outcome: str) -> None:
    network, split = cancelling()
    tiny = Fraction(1, 10**9)
    found = audit(task(network, split, radius=np.array([1e-9]), recipe_radius=tiny, guarantee=guarantee))
    assert found.limit == "" and list(found.columns["outcome"]) == [outcome] * 2
    assert found.columns["found"].all() and (found.columns["distance"] <= 1e-9).all()


def tied(weight: float) -> tuple[nn.Module, Split]:
    """The margin is ``weight x1 - x2`` with x1 = x2 = 1: positive, and lost where the weight is rounded to 1."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[weight, -1.0], [0.0, 0.0]]))
    return network.eval(), Split(torch.tensor([[[[255, 255]]]], dtype=torch.uint8), torch.tensor([0]))


@pytest.mark.parametrize(
    ("bits", "flips"),
    [(5, ()), (9, ("bf16",)), (12, ("bf16", "fp16", "tf32")), (22, ("bf16", "fp16", "tf32"))],
)
def test_a_deployment_is_attacked_as_it_computes(bits: int, flips: tuple[str, ...]) -> None:
    network, split = tied(1 + 2.0**-bits)
    for deploy in ("float32", "float64", "tf32", "bf16", "fp16"):
        claims = {"radius": np.array([1e-9]), "recipe_radius": Fraction(1, 10**9)}
        found = audit(task(network, split, guarantee="float_sound", deploy=deploy, **claims))
        assert found.limit == ""
        assert list(found.columns["outcome"]) == ["refuted" if deploy in flips else "held"] * 2, deploy


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False))
@settings(max_examples=200, deadline=None)
def test_tf32_keeps_ten_bits_and_rounds_to_the_nearest(value: float) -> None:
    rounded = to_tf32(torch.tensor([value]))
    assert rounded.view(torch.int32).item() & 0x1FFF == 0
    if rounded.isfinite().all():
        assert abs(Fraction(rounded.item()) - Fraction(value)) <= abs(Fraction(value)) / 2**11


def test_gradients_pass_the_rounding_to_tf32() -> None:
    network, split = tied(1 + 2.0**-12)
    image = to_pixels(split.images, 255).requires_grad_(True)
    deployed = DeployedNetwork(network, "tf32", torch.device("cpu"), (1, 1, 2))
    logits = deployed(image)
    assert logits.tolist() == [[0.0, 0.0]]
    assert torch.autograd.grad(logits[0, 0], image)[0].flatten().tolist() == [1.0, -1.0]


class OnlyWide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float16:
            raise NotImplementedError('"odd_kernel" not implemented for Half')
        return x.flatten(1)


def test_where_a_deployment_cannot_be_run_nothing_is_attacked_and_the_reason_is_said() -> None:
    split = Split(torch.tensor([[[[255, 100]]]], dtype=torch.uint8), torch.tensor([0]))
    found = audit(task(OnlyWide(), split, guarantee="float_sound", deploy="fp16"))
    assert set(found.columns["outcome"]) == {"not_attacked"} and "odd_kernel" in found.limit
    assert audit(task(OnlyWide(), split, guarantee="float_sound", deploy="bf16")).limit == ""


def test_a_flip_with_smooth_activations_is_refuted_too() -> None:
    """Their errors are bounded, so what float64 shows is proved."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        for layer in (network[1], network[3]):
            layer.weight.mul_(10)
    images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)
    labels = network.eval()(to_pixels(images, 255)).argmax(1)
    found = audit(task(network, Split(images, labels), radius=np.ones(10), recipe_radius=Fraction(1)))
    assert found.limit == "" and found.count("refuted") > 0 and found.count("refuted_in_float") == 0


def test_an_unconfirmable_witness_is_counted_and_said_never_dropped() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softsign()).eval()
    images = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)
    labels = network(to_pixels(images, 255)).argmax(1)
    claims = {"radius": np.ones(20), "recipe_radius": Fraction(1)}
    found = audit(task(network, Split(images, labels), **claims))
    assert "Softsign" in found.limit and found.count("refuted_in_float") > 0 and found.count("refuted") == 0
    assert audit(task(network, Split(images, labels), guarantee="float_sound", **claims)).count("refuted") > 0


def test_a_true_radius_holds_and_twice_of_it_is_refuted() -> None:
    """Two linear logits, whose radius is known: |margin| / |w|_1."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, -1.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0]]))
        network[1].bias.copy_(torch.tensor([-1.25, 0.0]))
    images = torch.randint(100, 150, (64, 1, 2, 2), dtype=torch.uint8)
    centers = to_pixels(images, 255, torch.float64)
    margin = (network.double()(centers)[:, 0]).detach()
    network.float()
    split = Split(images, (margin < 0).long())
    true = margin.abs().numpy() / 4.5
    held = audit(task(network, split, radius=true * 0.999, recipe_radius=Fraction(1, 10**6)))
    own = held.columns["kind"] == "certified_radius"
    assert set(held.columns["outcome"][own]) == {"held"} and not held.columns["found"][own].any()
    wrong = audit(task(network, split, radius=true * 2, recipe_radius=Fraction(1, 10**6)))
    assert wrong.count("refuted") == (true > 0).sum()
    near = audit(task(network, split, radius=true * 1.001, recipe_radius=Fraction(1, 10**6)))
    assert near.count("refuted") > 60, "and the attack is strong enough to see a thousandth"


def test_rows_cover_correct_images_and_claims_and_are_the_same_for_any_number_of_threads(
    trained: tuple[nn.Module, Any],
) -> None:
    network, dataset = trained
    split = dataset.test.slice(0, 60)
    prediction = split.labels.numpy().copy()
    prediction[:5] = (prediction[:5] + 1) % 10
    verdict = np.array(["misclassified"] * 5 + ["unknown"] * 25 + ["certified"] * 30, dtype=object)
    radius = np.array([0.0] * 5 + [0.0] * 10 + [0.01] * 15 + [round_down(Fraction(1, 10))] * 30)
    radius[5] = math.nan
    arguments = {"levels": 16, "prediction": prediction, "verdict": verdict, "radius": radius}
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(audit(task(network, split, **arguments)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    columns = results[0].columns
    assert all(np.array_equal(columns[n], results[1].columns[n], equal_nan=n == "distance") for n in columns)
    for kind, indices in (("recipe_radius", range(5, 60)), ("certified_radius", range(15, 60))):
        assert list(columns["index"][columns["kind"] == kind]) == list(indices)
    certified = (columns["index"] >= 30) | (columns["kind"] == "certified_radius")
    assert set(columns["outcome"][certified]) <= {"held", "refuted", "refuted_in_float"}
    assert set(columns["outcome"][~certified]) <= {"held", "falsified", "falsified_in_float"}
    assert {"falsified", "refuted", "held"} <= set(columns["outcome"])
    far, ball_radius = columns["distance"], columns["ball_radius"]
    assert np.array_equal(np.isfinite(far), columns["found"]) and (far <= ball_radius)[columns["found"]].all()


def test_an_audit_says_what_it_could_not_do(trained: tuple[nn.Module, Any]) -> None:
    network, dataset = trained
    split = dataset.test.slice(0, 3)
    other = audit(task(network, split, 16, deploy="bfloat16"))
    assert set(other.columns["outcome"]) == {"not_attacked"} and "bfloat16" in other.limit
    with pytest.raises(RunError, match="statistical certificates"):
        audit(task(network, split, 16, guarantee="statistical"))
    broken = nn.Sequential(network, nn.Identity())
    broken[1].forward = lambda x: x * torch.nan  # type: ignore[method-assign]
    assert set(audit(task(broken, split, 16)).columns["outcome"]) == {"error"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"levels": 8}, "pixels outside"),
        ({"network": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}, "labels . to . do not fit"),
        ({"network": nn.Flatten(2)}, "must give .images, classes."),
        ({"index": np.array([0, 1, 99])}, "not all in a split"),
        ({"prediction": np.array([-1, -1, -1])}, "misclassified, yet has a certified radius"),
        ({"radius": np.array([0.1, np.inf, 0.1])}, "no radius"),
    ],
)
def test_bad_input_is_a_clear_error(
    trained: tuple[nn.Module, Any], change: dict[str, Any], words: str
) -> None:
    network, dataset = trained
    split = Split(dataset.test.images[:3], torch.tensor([3, 4, 5]))
    with pytest.raises(RunError, match=words):
        audit(
            task(network, split, **({"levels": 16} | change))
            if "network" not in change
            else _with(split, change)
        )


def _with(split: Split, change: dict[str, Any]) -> AuditTask:
    return task(change["network"], split, 16)


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.5])
def test_a_ball_needs_pixels_and_a_radius(value: float) -> None:
    good = torch.zeros(1, 1, 1, 2)
    if not 0 <= value <= 1:
        with pytest.raises(RunError, match="outside"):
            ball(torch.full_like(good, value), torch.ones(1, dtype=torch.float64))
    if not value >= 0:
        with pytest.raises(RunError, match="no radius"):
            ball(good, torch.tensor([value], dtype=torch.float64))
    with pytest.raises(RunError, match="one float64 radius each"):
        ball(good, torch.ones(2, dtype=torch.float64))


# Rows and boards ---------------------------------------------------------------------------------------------------

RUN, SETTINGS, OTHER = "a" * 16, "feedc0de" * 2, "0123abcd"
TENTH = round_down(Fraction(1, 10))


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    """One run: image 0 certified, 1 and 2 unknown, the first of them proved at half the radius, 3 misclassified."""
    store = ResultStore(tmp_path / "results")
    record(store, RUN, 0)
    return store


def record(store: ResultStore, run: str, seed: int, method: str = "toy") -> None:
    store.write_run(
        {
            "run_id": run,
            "protocol": "linf-1",
            "method": method,
            "plugin": "toy",
            "plugin_version": "1",
            "numerics": 1,
            "dataset": "digits",
            "dataset_digest": "d",
            "model": "m",
            "parameters": 1,
            "norm": "linf",
            "radius": "1/10",
            "cap": "1/5",
            "seed": seed,
            "recipe_name": method,
            "recipe": "{}",
            "checkpoint_digest": "c",
            "epochs": 1,
            "torch_version": "2",
            "python_version": "3",
            "certbench_version": "0",
        }
    )
    store.write_certificates(
        run,
        "ibp",
        SETTINGS,
        {
            "index": [0, 1, 2, 3],
            "image_digest": ["0", "1", "2", "3"],
            "label": [0, 1, 2, 3],
            "prediction": [0, 1, 2, 9],
            "verdict": ["certified", "unknown", "unknown", "misclassified"],
            "radius": [0.15, 0.05, 0.0, 0.0],
            "margin": [1.0, -1.0, -1.0, -1.0],
            "guarantee": "real_arith",
            "deploy": "float32",
            "proved_by": ["ibp", "ibp", "", ""],
            "passes": 1,
        },
    )


def rows(**outcomes: str) -> dict[str, Any]:
    """Audit columns for the run above; outcomes by name such as ``r1`` (recipe's radius) or ``c0`` (its own)."""
    balls = {"r0": TENTH, "r1": TENTH, "r2": TENTH, "c0": 0.15, "c1": 0.05}
    said = {name: outcomes.get(name, "held") for name in balls}
    found = {name: outcome not in ("held", "error", "not_attacked") for name, outcome in said.items()}
    return {
        "index": [int(name[1]) for name in balls],
        "kind": ["recipe_radius" if name[0] == "r" else "certified_radius" for name in balls],
        "ball_radius": list(balls.values()),
        "found": list(found.values()),
        "distance": [balls[name] / 2 if found[name] else math.nan for name in balls],
        "outcome": list(said.values()),
    }


def put(store: ResultStore, run: str = RUN, attack: str = "standard", **outcomes: str) -> Path:
    return store.write_audits(run, "ibp", SETTINGS, attack, OTHER, rows(**outcomes))


def test_audits_come_back_and_never_touch_certificates(store: ResultStore) -> None:
    before = store.paths("certificates")[0].read_bytes()
    path = put(store, r1="falsified")
    put(store, attack="strong", r1="falsified", r2="falsified_in_float")
    assert path.name == f"{RUN}-ibp-feedc0de-standard-0123abcd.parquet"
    assert store.audits(RUN, "ibp", SETTINGS).num_rows == 10 and store.read("audits").num_rows == 10
    assert store.audits(RUN, "ib", SETTINGS).num_rows == 0
    assert store.has_audits(RUN, "ibp", SETTINGS, "standard", OTHER)
    assert not store.has_audits(RUN, "ibp", SETTINGS, "pgd", OTHER)
    assert check_store(store) == [] and store.paths("certificates")[0].read_bytes() == before


def test_a_recorded_outcome_never_changes_but_an_undecided_one_may(store: ResultStore) -> None:
    put(store, r1="error", c0="not_attacked", r2="falsified")
    put(store, r1="falsified", c0="held", r2="falsified")
    with pytest.raises(DataError, match="image 2 falsified before and held now"):
        put(store, r1="falsified")
    with pytest.raises(RunError, match="write_certificates comes before"):
        store.write_audits(RUN, "crown", SETTINGS, "standard", OTHER, rows())


@pytest.mark.parametrize(
    ("column", "place", "value", "words"),
    [
        ("outcome", 0, "fine", "outcome is none of"),
        ("kind", 0, "some_radius", "kind is none of"),
        ("index", 0, -1, "index is negative"),
        ("ball_radius", 0, 0.0, "not a positive number"),
        ("ball_radius", 0, math.inf, "not a positive number"),
        ("found", 0, True, "found contradicts"),
        ("distance", 0, 0.01, "though nothing was found"),
        ("outcome", 0, "refuted", "found contradicts"),
        ("outcome", 4, "falsified", "found contradicts|to be refuted"),
        ("index", 1, 0, "two rows of one"),
    ],
)
def test_wrong_audits_are_refused(
    store: ResultStore, column: str, place: int, value: Any, words: str
) -> None:
    columns = rows()
    columns[column][place] = value
    with pytest.raises(DataError, match=words):
        store.write_audits(RUN, "ibp", SETTINGS, "standard", OTHER, columns)
    assert store.paths("audits") == []


def test_a_distance_beyond_the_ball_is_refused(store: ResultStore) -> None:
    columns = rows(r1="falsified")
    columns["distance"][1] = math.nextafter(TENTH, 1)
    with pytest.raises(DataError, match="without a distance within the ball"):
        store.write_audits(RUN, "ibp", SETTINGS, "standard", OTHER, columns)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": [0, 1, 3, 0, 1]}, "image 3 was audited though its prediction is not the label"),
        ({"index": [0, 1, 7, 0, 1]}, "image 7 was audited but never certified"),
        (
            {"ball_radius": [TENTH, TENTH, TENTH, 0.14, 0.05]},
            "image 0 was not attacked at its certified radius",
        ),
        ({"ball_radius": [TENTH, 0.2, TENTH, 0.15, 0.05]}, "image 1 was not attacked at the recipe's radius"),
        (rows(r1="refuted"), "image 1 is refuted, but nothing was certified"),
        (rows(r0="falsified"), "image 0 is certified and falsified"),
    ],
)
def test_audits_that_contradict_their_certificates_build_no_table(
    store: ResultStore, change: dict[str, Any], words: str
) -> None:
    store.write_audits(RUN, "ibp", SETTINGS, "standard", OTHER, rows() | change)
    assert any(words in problem for problem in check_store(store))
    with pytest.raises(DataError, match=words):
        boards(store)


def test_a_board_shows_attacked_accuracy_and_the_audit(store: ResultStore) -> None:
    (board,) = boards(store)
    assert board.rows[0].attacked is None and "not audited" in plain(board)
    assert "see `certbench audit`" in markdown(board)
    put(store, r1="falsified", c1="refuted_in_float")
    (board,) = boards(store)
    (row,) = board.rows
    assert row.attacked is not None and row.attacked.mean == 50.0
    assert row.certified.mean <= row.attacked.mean <= row.clean.mean
    assert (row.verdicts["falsified"], row.verdicts["unknown"]) == (1, 1), (
        "unknown less by what was falsified"
    )
    assert not row.void and "refuted 0 (1 in float) of 2" in plain(board)
    assert "Attacked with standard (settings 0123abcd)" in markdown(board)
    (written,) = records(board)
    assert (written["attacked_accuracy"], written["refuted"], written["attacks"]) == (
        50.0,
        0,
        "standard:0123abcd",
    )
    put(store, attack="strong", r1="falsified", r2="falsified")
    assert boards(store)[0].rows[0].attacked.mean == 25.0  # type: ignore[union-attr]  # every attack counts


def test_attacked_accuracy_waits_for_every_correct_image(store: ResultStore) -> None:
    put(store, r2="error")
    assert boards(store)[0].rows[0].attacked is None and boards(store)[0].rows[0].audit is not None
    record(store, "b" * 16, 1)
    put(store, attack="strong")
    assert "refuted 0 of 2, 1 of 2 seeds" in plain(boards(store)[0])


@pytest.mark.parametrize(
    "outcomes", [{"c0": "refuted"}, {"c1": "refuted"}, {"r0": "refuted", "c0": "refuted"}]
)
def test_one_refuted_proof_voids_the_row_of_all_its_seeds(
    store: ResultStore, tmp_path: Path, outcomes: dict[str, str]
) -> None:
    record(store, "b" * 16, 1)
    record(store, "c" * 16, 0, method="honest")
    put(store)
    put(store, run="b" * 16, **outcomes)
    (board,) = boards(store)
    assert [row.method for row in board.rows] == ["honest"] and [row.method for row in board.voided] == [
        "toy"
    ]
    assert board.best("certified") == {0}
    text = build(tmp_path, page=False).files["digits-linf-0.1.md"]
    above, below = text.split("## Voided")
    assert (
        "| toy" not in above and "| toy" in below and "b" * 16 in below and "attacked with standard" in below
    )
    assert [record["kind"] for record in records(board)] == ["measured", "voided"]
    assert "Voided: toy" in plain(board)


def test_a_board_of_voided_rows_alone_is_still_built(store: ResultStore, tmp_path: Path) -> None:
    put(store, c0="refuted")
    assert "No row stands." in build(tmp_path, page=False).files[
        "digits-linf-0.1.md"
    ] and "No row stands." in plain(boards(store)[0])
    assert "voided" in build(tmp_path, page=False).files["digits-linf-0.1.csv"]


def test_a_board_whose_certified_exceeds_attacked_is_not_built() -> None:
    from certbench.leaderboard.metrics import AuditCounts, Metrics, attacked_accuracy

    metrics = Metrics("a", "ibp", "f", "real_arith", "float32", 10, 8, {"certified": 6}, None, None)  # type: ignore[arg-type]  # no images are asked for
    counts = {"attacks": (), "claimed": 6, "tried": 6, "refuted_in_float": 0, "missing": 0, "falsified": 0}
    assert attacked_accuracy(metrics, AuditCounts(refuted=0, broken=2, **counts)) == 60  # type: ignore[arg-type]
    with pytest.raises(DataError, match="6 images are certified but only 5 withstood"):
        attacked_accuracy(metrics, AuditCounts(refuted=0, broken=3, **counts))  # type: ignore[arg-type]
    assert attacked_accuracy(metrics, AuditCounts(refuted=1, broken=3, **counts)) == 50  # type: ignore[arg-type]


# A planted fault, from recipe to exit code -------------------------------------------------------------------------


class Settings(Strict):
    claim: float = 1.0
    """What the proved radius is multiplied by; anything above 1 is a lie."""


class Planted:
    """A linear network, for which interval bounds are exact but for clipping, and a certifier that may overstate."""

    @hookimpl
    def register_methods(self) -> list[MethodCard]:
        return [
            MethodCard(
                name="planted",
                summary="a toy",
                paper="none",
                norm="linf",
                guarantee="real_arith",
                settings=Settings,
                recipes=Path(__file__).parent / "no-recipes",
                certifier="ibp",
            )
        ]

    @hookimpl
    def train(self, task: Any) -> nn.Module:
        torch.manual_seed(task.seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(network.parameters(), 0.05)
        split = task.dataset.train
        for _ in range(40):
            loss = F.cross_entropy(network(to_pixels(split.images, 16)), split.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return network

    @hookimpl
    def certify(self, task: Any) -> Iterator[Certificates]:
        from dataclasses import replace

        from certbench.bounds.certifiers import find_certifier

        for part in find_certifier("ibp").certify(task):
            radius = np.minimum(part.radius * task.settings.claim, round_down(task.cap))
            claimed = (part.verdict == "unknown") & (radius >= round_down(task.radius))
            yield replace(
                part,
                radius=radius,
                verdict=np.where(claimed, "certified", part.verdict).astype(object),
                margin=np.where(claimed, 1.0, part.margin),
            )


class Named(Distribution):
    @property
    def metadata(self) -> Any:
        return {"Name": "toy-planted", "Version": "1.0"}

    def read_text(self, filename: str) -> None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path


class Point(EntryPoint):
    def load(self) -> Any:
        return Planted()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The planted plugin is the only one installed; a recipe for it lies in the folder."""
    point = Point("planted", "nowhere", "certbench")
    point._for(Named())  # type: ignore[attr-defined]  # how importlib.metadata ties the two
    plugins = Plugins([point])
    monkeypatch.setattr("certbench.plugins.installed", lambda: plugins)
    monkeypatch.setattr("certbench.run.installed", lambda: plugins)
    monkeypatch.setattr("certbench.recorded.installed", lambda: plugins)
    recipe = tmp_path / "planted.toml"
    recipe.write_text(
        'dataset = "digits"\nmodel = "cnn-small"\n[threat]\nradius = "0.02"\n[method]\nname = "planted"\n'
        '[train]\nepochs = 1\n[certify]\ncap = "0.2"\n'
    )
    return recipe


def command(*arguments: str) -> int:
    from certbench.cli import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_a_plugin_that_claims_twice_the_true_radius_is_caught(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    wrong = ("run", str(planted), "--out", str(out), "--device", "cpu", "--set", "method.claim=2.0")
    assert command(*wrong) == 1
    errors = capsys.readouterr().err
    assert "certificates refuted by attacks, and their rows voided: planted" in errors
    (board,) = boards(ResultStore(out / "results"))
    assert board.rows == () and board.voided[0].audit is not None and board.voided[0].audit.refuted > 100
    assert "## Voided" in (out / "digits-linf-0.02.md").read_text()
    assert command(*wrong) == 1, "it stays found, and nothing is done again"
    assert "is already recorded" in capsys.readouterr().err
    assert command("leaderboard", "check", str(out)) == 0
    assert check_store(ResultStore(out / "results")) == []


def test_an_honest_run_is_audited_once_and_again_on_request(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    honest = ("run", str(planted), "--out", str(out), "--device", "cpu")
    assert command(*honest, "--attack", "none") == 0
    store = ResultStore(out / "results")
    assert store.paths("audits") == [] and "not audited" in (out / "digits-linf-0.02.md").read_text()
    certificates = store.paths("certificates")[0].read_bytes()
    assert command(*honest) == 0
    run = store.paths("runs")[0].stem
    assert command("audit", run[:6], "--out", str(out), "--attack", "pgd", "--device", "cpu") == 0
    assert sorted(set(store.read("audits").column("attack").to_pylist())) == ["pgd", "standard"]
    assert store.paths("certificates")[0].read_bytes() == certificates and check_store(store) == []
    stages = set(store.read("timings").column("stage").to_pylist())
    assert any(stage.startswith("audit-planted-") and "-pgd-" in stage for stage in stages)
    (row,) = boards(store)[0].rows
    assert row.audit is not None and row.audit.refuted == 0 and len(row.audit.attacks) == 2
    assert row.attacked is not None and row.certified.mean <= row.attacked.mean <= row.clean.mean
    assert row.verdicts["falsified"] > 0
    capsys.readouterr()
    assert command("audit", "zzz", "--out", str(out)) == 2 and "begins with 'zzz'" in capsys.readouterr().err
    assert command("audit", run, "--out", str(out), "--attack", "pdg") == 2
    (out / "runs" / run / "network.safetensors").unlink()
    assert command("audit", run, "--out", str(out), "--attack", "pgd-dlr") == 3
    assert "left no network in" in capsys.readouterr().err


def test_a_failed_run_outweighs_a_refuted_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from certbench.cli import run as module
    from certbench.stages.record import RunOutcome

    refuted: Any = RunOutcome("a" * 16, None, tmp_path, tmp_path, 1.0, 1.0, refuted=3, void=True)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certbench.leaderboard.build.write", lambda folder: Built([], {}))
        with pytest.raises(FoundError, match="one: 3 refuted"):
            module.finish([refuted], ["one"], "out")
        with pytest.raises(SystemExit) as ended:
            module.finish([refuted, None], ["one", "two"], "out")
    assert ended.value.code == 3 and "one: 3 refuted" in capsys.readouterr().err


def test_the_registry_imports_no_torch() -> None:
    import subprocess

    code = "import sys, certbench.audit.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
