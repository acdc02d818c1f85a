"""The deployed network and its float-sound certificates: folding, rows, switches."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certbench.bounds import (
    PRECISIONS,
    SoundBox,
    certifiers,
    crown_ibp_margins,
    crown_margins,
    input_box,
    sound_input_box,
    sound_margins,
    trace,
)
from certbench.bounds.certifiers import find_certifier
from certbench.bounds.sound import Deployment
from certbench.bounds.sound.deployment import SOUND_RULES
from certbench.contract import Certificates, Certifier, CertifyTask
from certbench.data.dataset import Split
from certbench.errors import RunError, UsageError
from certbench.models.fold import deployed_network
from certbench.models.kernels import plain_kernels
from certbench.models.registry import Normalize
from certbench.models.residual import basic_block
from certbench.recipe import parse_recipe
from certbench.stages.certify import certify_settings, digest_settings

NAMES = list(PRECISIONS)

# Folding -------------------------------------------------------------------------------------------------------------


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights drawn from the seed; batch norms with statistics and signs worth folding."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter[0].numel() ** -0.5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                for values in (module.weight, module.bias, module.running_mean):
                    values.copy_(torch.randn(values.shape, generator=draw))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=draw) + 0.1)
    return network


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())


def residual_network() -> nn.Module:
    return nn.Sequential(
        Normalize((0.1, 0.2), (0.3, 0.4)),
        nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        basic_block(4, 6, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Dropout(),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def test_the_folded_network_computes_the_same_and_has_no_batch_norm() -> None:
    network = shaken(residual_network())
    x = torch.rand(50, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    before = {name: values.clone() for name, values in network.state_dict().items()}
    folded = deployed_network(network)
    assert norms(network) == 5
    assert norms(folded) == 0
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], values) for name, values in network.state_dict().items())
    assert {t.dtype for t in folded.state_dict().values()} == {torch.float32}
    again = deployed_network(folded).state_dict()
    assert all(torch.equal(values, again[name]) for name, values in folded.state_dict().items())


class Twice(nn.Module):
    """A convolution that two branches read, one through a batch norm; and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.norm_a, self.norm_b, self.last = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.norm_a(x)
        x = self.norm_b(self.b(self.b(x)))
        return self.last(x.flatten(1))


def test_batch_norms_that_cannot_be_folded_stay_and_are_certified() -> None:
    network = shaken(Twice())
    folded = deployed_network(network)
    assert norms(folded) == 2
    x = torch.rand(5, 2, 4, 4)
    torch.testing.assert_close(folded(x), network.eval()(x))
    graph = trace(folded.double(), (2, 4, 4))
    margins = sound_margins(
        graph, x.double(), torch.zeros(5).double(), torch.zeros(5).long(), PRECISIONS["float32"]
    )
    assert margins.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_a_residual_network_hold_its_evaluations_and_never_grow_with_the_radius(name: str) -> None:
    deployed = deployed_network(shaken(residual_network()))
    images = torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    graph = trace(deployed_network(deployed).double(), (2, 8, 8))
    labels, last = torch.tensor([0, 1, 2, 0, 1, 2]), None
    for eps in (0.0, 1e-6, 1e-3, 0.01):
        radius = torch.full((6,), eps, dtype=torch.float64)
        margins = sound_margins(graph, images.double(), radius, labels, PRECISIONS[name])
        plain = graph.bound(input_box(images.double(), radius)).margins(labels)
        assert (margins < plain).all()
        assert last is None or (margins <= last + 1e-9).all()
        last = margins
        noise = (torch.rand(40, *images.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1).sign()
        points = (images + eps * noise).clamp(0, 1)
        inside = ((points.double() - images.double()).abs() <= eps).flatten(2).all(2)
        with plain_kernels():
            logits = deployed(points.flatten(0, 1)).view(40, 6, 3).double()
        wrong = ~nn.functional.one_hot(labels, 3).bool()
        gaps = (logits.gather(2, labels.view(1, 6, 1).expand(40, 6, 1)) - logits)[:, wrong].view(40, 6, 2)
        if name != "float64":  # float32 is no float64 evaluation
            assert (gaps >= margins)[inside].all()


# The certifier -----------------------------------------------------------------------------------------------------


def task(network: nn.Module, count: int = 12, **certify: str) -> CertifyTask:
    table = {
        "dataset": "digits",
        "model": "cnn-small",
        "threat": {"norm": "linf", "radius": "0.001"},
        "method": {"name": "fast-ibp"},
        "train": {"epochs": 1},
        "certify": {"cap": "0.2", **certify},
    }
    draw = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, 2, 8, 8), generator=draw, dtype=torch.uint8)
    with torch.no_grad():
        labels = deployed_network(network)(images.float() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    recipe = parse_recipe(table, "test")
    return CertifyTask(
        recipe,
        None,
        network,
        Split(images, labels),
        255,
        0,
        recipe.threat.radius,
        recipe.cap,
        torch.device("cpu"),
    )


def certified(task: CertifyTask) -> Certificates:
    task.network.eval()
    (found,) = certifier(task).certify(task)
    return found


def certifier(task: CertifyTask) -> Certifier:
    asked = task.recipe.certify
    return find_certifier("ibp", asked.guarantee or "float_sound", asked.deploy)


def test_rows_say_what_is_guaranteed_for_which_deployment_and_repeat_to_the_bit() -> None:
    network = shaken(residual_network())
    rows = {name: certified(task(network, deploy=name)) for name in ("float32", "bf16")}
    real = certified(task(network, guarantee="real_arith"))
    assert (real.guarantee, real.deploy) == ("real_arith", "float32")
    for name, found in rows.items():
        assert (found.guarantee, found.deploy) == ("float_sound", name)
        assert found.verdict[0] == "misclassified"
        assert (found.radius <= real.radius + 1e-9).all()
        again = certified(task(network, deploy=name))
        assert np.array_equal(found.margin, again.margin)
        assert np.array_equal(found.radius, again.radius)
    assert rows["bf16"].radius.sum() < 0.99 * rows["float32"].radius.sum() < real.radius.sum()


def test_a_reported_radius_was_itself_proved() -> None:
    network = shaken(residual_network())
    asked = task(network)
    found = certified(asked)
    graph = trace(deployed_network(network).double(), (2, 8, 8))
    images = (asked.split.images.float() / 255).double()
    radius = torch.tensor(found.radius)
    margins = sound_margins(graph, images, radius, asked.split.labels, PRECISIONS["float32"]).amin(1)
    assert (margins[radius > 0] > 0).all()
    assert (radius > 0).sum() > 5
    above = sound_margins(graph, images, radius + 1e-5, asked.split.labels, PRECISIONS["float32"]).amin(1)
    assert (above[(radius > 0) & (radius < 0.19)] <= 0).all()


def test_a_cascade_of_linear_bounds_is_float_sound_when_asked() -> None:
    """Real arithmetic allows larger radii, and every reported one was itself proved for the deployment."""
    network = shaken(residual_network()).eval()
    asked = task(network, count=5)
    names, found = ("ibp", "ibp>crown-ibp>crown"), {}
    for name, deploy in product(names, ("float32", "tf32")):
        (found[name, deploy],) = find_certifier(name, "float_sound", deploy).certify(asked)
    (real,) = find_certifier(names[1]).certify(asked)
    graph = trace(deployed_network(network).double(), (2, 8, 8))
    images = (asked.split.images.float() / 255).double()
    for deploy in ("float32", "tf32"):
        alone, cascade = found[names[0], deploy], found[names[1], deploy]
        assert (cascade.guarantee, cascade.deploy) == ("float_sound", deploy)
        assert (cascade.radius >= alone.radius).all() and cascade.radius.sum() > 1.1 * alone.radius.sum()
        assert (cascade.radius <= real.radius + 2.0**-10 * 0.2).all()
        box = sound_input_box(images, torch.tensor(cascade.radius))
        bounds = [crown_ibp_margins, crown_margins]
        proved = [
            bound(graph, box, asked.split.labels, precision=PRECISIONS[deploy]).amin(1) > 0
            for bound in bounds
        ]
        by = [name.split("radius ")[-1] for name in cascade.proved_by]
        assert set(by) & {"crown-ibp", "crown"}
        for i, name in enumerate(by):
            assert name in ("", "ibp") or proved[["crown-ibp", "crown"].index(name)][i]
    assert found[names[1], "tf32"].radius.sum() < found[names[1], "float32"].radius.sum()


def test_overflow_gives_unknown_and_not_error() -> None:
    network = shaken(residual_network())
    with torch.no_grad():
        network[-1].weight.mul_(1e7)
    found = certified(task(network, deploy="fp16"))
    assert set(found.verdict[1:]) == {"unknown"}
    assert np.isnan(found.margin).all()
    assert (found.radius == 0).all()


def test_a_proof_that_an_evaluation_contradicts_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        certifiers, "sound_margins", lambda graph, images, *_: images.new_ones(len(images), 2)
    )
    with pytest.raises(RunError, match="contradicted"):
        certified(task(shaken(residual_network())))


def test_settings_and_switches_are_part_of_the_settings_digest() -> None:
    network = residual_network()
    tasks = [
        task(network, **settings)
        for settings in ({}, {"deploy": "bf16"}, {"deploy": "float64"}, {"guarantee": "real_arith"})
    ]
    assert len({digest_settings(certifier(t), t.recipe) for t in tasks}) == 4
    assert "'cudnn': 'off'" in str(certify_settings(certifier(tasks[0]), tasks[0].recipe))
    with pytest.raises(UsageError, match="says nothing unless"):
        task(network, guarantee="real_arith", deploy="bf16")


def test_kernels_are_plain_while_it_lasts_and_as_before_afterwards() -> None:
    before = torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()
    with plain_kernels():
        assert not torch.backends.cudnn.enabled
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert (torch.backends.cudnn.enabled, torch.get_float32_matmul_precision()) == before


# Where numbers are near the ends of their range ----------------------------------------------------------------------


def test_a_variance_near_the_smallest_numbers_is_covered_or_refused() -> None:
    norm = nn.BatchNorm1d(1, eps=1e-6).eval()
    norm.running_var = torch.full((1,), 2e-7)  # stored in fp16 with an error of 15 percent
    network = nn.Sequential(nn.Flatten(), norm, nn.ReLU(), nn.Linear(1, 2)).requires_grad_(False)
    image = torch.full((1, 1, 1, 1), 0.02, dtype=torch.float16)
    graph = trace(copy.deepcopy(network).double(), (1, 1, 1))
    run = Deployment(PRECISIONS["fp16"], image.double())
    point = sound_input_box(image.double(), torch.zeros(1, dtype=torch.float64))
    box = graph.bound(point, rules=run).features
    computed = copy.deepcopy(network).half()[:3](image).double()
    inside = bool(((box.lower <= computed) & (computed <= box.upper)).all())
    assert inside or bool(run.unsafe.all())


def test_what_overflows_on_the_way_to_a_small_result_is_marked() -> None:
    x = torch.tensor([[1e38]])
    assert torch.nn.functional.hardswish(x).isinf().all()
    run = Deployment(PRECISIONS["float32"], x.double())
    SOUND_RULES["aten.hardswish.default"](run, SoundBox(lower=x.double(), upper=x.double()))
    assert run.unsafe.all()


def test_celu_that_is_no_contraction_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.CELU(-0.5), nn.Linear(1, 2))
    with pytest.raises(UsageError, match="CELU with alpha -0.5 has no interval rule"):
        trace(network, (1, 1, 1)).bound(input_box(torch.zeros(1, 1, 1, 1), 0.1))
