"""Statistical rows after they are made: their radii follow from their counts, and an audit finds inflated ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from certbench.audit.registry import SmoothedAttack, find_smoothed_attack
from certbench.audit.statistical import SmoothedAuditTask, audit_smoothed
from certbench.data.dataset import Split
from certbench.errors import RunError, UsageError
from certbench.results.smoothed import smoothed_problems
from certbench.seeding import noise_device, noise_key
from certbench.stats.smoothing import anytime_radius, fixed_radius, two_sided_radius

SIGMA, ALPHA = 0.5, 0.001
RUN_ID = "0123456789abcdef"

# Rows and their counts ---------------------------------------------------------------------------------------------


def shard(certifier: str, /, **changes: Any) -> pa.Table:
    k, n = np.array([950, 800, 300]), np.array([1000, 1000, 1000])
    radius = {
        "smoothing": lambda: fixed_radius(k, n, ALPHA, SIGMA),
        "smoothing-sequential": lambda: anytime_radius(k, n, ALPHA, SIGMA),
        "smoothing-two-sided": lambda: two_sided_radius(k, n, ALPHA, SIGMA, [20, 100, 600], 10),
    }[certifier]()
    columns = {
        "certifier": [certifier] * 3,
        "guarantee": ["statistical"] * 3,
        "index": [0, 20, 40],
        "sigma": [SIGMA] * 3,
        "alpha": [ALPHA] * 3,
        "n0": [100] * 3,
        "n": n,
        "k": k,
        "draws": [1100, 1100, 1500],
        "radius": radius,
        "proved_by": [f"clopper-pearson; rival {c} of 10" for c in (20, 100, 600)],
        "stop_reason": ["fixed"] * 3,
        "generator_key": [noise_key(RUN_ID, "cpu")] * 3,
        "exact_noise": [False] * 3,
    }
    return pa.table(columns | changes)


RUN = {"run_id": RUN_ID, "norm": "l2", "sigma": SIGMA, "protocol": "l2-another-1"}
CERTIFIERS = ["smoothing", "smoothing-sequential", "smoothing-two-sided"]


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_rows_that_follow_from_their_counts_are_in_order(certifier: str) -> None:
    assert list(smoothed_problems(shard(certifier), RUN)) == []


@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_a_radius_a_little_too_large_is_reported(certifier: str) -> None:
    radius = shard(certifier).column("radius").to_numpy().copy()
    radius[1] += 1e-8
    (problem,) = smoothed_problems(shard(certifier, radius=radius), RUN)
    assert problem == "image 20 has a radius that its counts do not prove"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"k": pa.array([950, None, 300])}, "lacks k"),
        ({"generator_key": pa.array([None, "a", "b"])}, "lacks generator_key"),
        ({"k": [950, 790, 300]}, "image 20 has a radius that its counts do not prove"),
        ({"draws": [1000, 1100, 1500]}, "image 0 counts more draws"),
        ({"sigma": [SIGMA, SIGMA, 1.0]}, "image 40 has another sigma"),
        ({"alpha": [ALPHA, ALPHA, 0.01]}, "image 40 has an alpha of its own"),
        ({"generator_key": [noise_key("f" * 16, "cpu")] * 3}, "counts draws of the noise 'philox4x64-10:"),
        ({"generator_key": ["torch-cuda-philox4x32-10:"] * 3}, "counts draws of the noise 'torch-cuda"),
    ],
)
def test_rows_that_do_not_follow_are_reported(changes: dict[str, Any], problem: str) -> None:
    (found,) = smoothed_problems(shard("smoothing", **changes), RUN)
    assert found.startswith(problem)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_noise_of_the_run_is_known_on_every_kind_of_device(device: str) -> None:
    key = noise_key(RUN_ID, device)
    assert noise_device(key, RUN_ID) == device and noise_device(key, "f" * 16) is None
    assert list(smoothed_problems(shard("smoothing", generator_key=[key] * 3), RUN)) == []


def test_images_between_those_of_the_protocol_are_reported() -> None:
    every = RUN | {"protocol": "l2-fixed-1-every-20"}
    assert list(smoothed_problems(shard("smoothing"), every)) == []
    (problem,) = smoothed_problems(shard("smoothing", index=[0, 20, 41]), every)
    assert problem.startswith("image 41 is not among every 20th")


def test_radii_of_plugins_certifiers_are_left_to_them_but_not_without_counts() -> None:
    theirs: dict[str, Any] = {"certifier": ["of-a-plugin"] * 3, "generator_key": pa.nulls(3, pa.string())}
    assert list(smoothed_problems(shard("smoothing", **theirs, radius=[2.0, 1.0, 0.5]), RUN)) == []
    for name in ("k", "n", "alpha", "sigma"):
        kind = pa.float64() if name in ("alpha", "sigma") else pa.int64()
        (problem,) = smoothed_problems(shard("smoothing", **theirs, **{name: pa.nulls(3, kind)}), RUN)
        assert problem.startswith(f"lacks {name}, and a statistical certificate is judged by its draws")
    failed = {"k": pa.array([1, None, 1]), "radius": pa.array([0.0, None, 0.0])}
    assert list(smoothed_problems(shard("smoothing", **theirs, **failed), RUN)) == []
    (problem,) = smoothed_problems(shard("smoothing", **theirs, alpha=[ALPHA, 0.4, ALPHA]), RUN)
    assert problem == "image 20 has an alpha of its own"


def test_a_guarantee_that_does_not_fit_its_protocol_is_reported() -> None:
    stranger = shard("smoothing", certifier=["of-a-plugin"] * 3)
    (problem,) = smoothed_problems(stranger, RUN | {"protocol": "l2-fixed-1"})
    assert "is none of its certifiers" in problem
    assert "no L-inf protocol" in next(iter(smoothed_problems(stranger, RUN | {"norm": "linf"})))
    (problem,) = smoothed_problems(shard("smoothing", guarantee=["float_sound"] * 3), RUN)
    assert "is statistical and not float_sound" in problem


def test_a_rival_that_cannot_hold_the_missing_draws_is_reported() -> None:
    k, n = np.array([500] * 3), np.array([1000] * 3)
    radius = two_sided_radius(k, n, ALPHA, SIGMA, [0, 0, 0], 1)
    assert (radius > 0).all()
    table = shard("smoothing-two-sided", k=k, n=n, radius=radius, proved_by=["rival 0 of 1"] * 3)
    (problem,) = smoothed_problems(table, RUN)
    assert "counts do not prove" in problem


# Audit -------------------------------------------------------------------------------------------------------------

QUICK = SmoothedAttack("quick", images=30, recount=2_000, steps=4, samples=8, selection=50, test=1_000)


class Halfspace(nn.Module):
    """Class 0 below 1/2 of the first pixel, class 1 above; images of zeros lie at distance 1/2 of the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        first = (x[:, 0, 0, 0] - 0.5) * self.scale
        return torch.stack([-first, first, first * 0 - 5], 1)


def asked(radius: float, count: int = 40, /, **changes: Any) -> SmoothedAuditTask:
    fields: dict[str, Any] = {
        "network": Halfspace(),
        "split": Split(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)),
        "levels": 255,
        "index": np.arange(count),
        "radius": np.full(count, radius),
        "sigma": SIGMA,
        "alpha": ALPHA,
        "one_sided": True,
        "exact_noise": False,
        "deploy": "float32",
        "attack": QUICK,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return SmoothedAuditTask(**(fields | changes))


@pytest.mark.parametrize("exact", [False, True])
def test_sound_certificates_hold(exact: bool) -> None:
    found = audit_smoothed(asked(0.49, exact_noise=exact))
    columns = found.columns
    assert len(columns["index"]) == 60 and columns["index"][0] == 0 and columns["index"][-1] == 39
    assert set(columns["kind"]) == {"certified_radius", "recount"}
    assert set(columns["outcome"]) == {"held"} and not columns["found"].any()
    assert np.isnan(columns["distance"]).all()


@pytest.mark.parametrize("changes", [{}, {"exact_noise": True}, {"deploy": "bf16"}])
def test_inflated_radii_are_refuted_at_the_image_and_in_the_ball(changes: dict[str, Any]) -> None:
    columns = audit_smoothed(asked(0.65, **changes)).columns
    attack, recount = columns["kind"] == "certified_radius", columns["kind"] == "recount"
    assert (columns["outcome"][attack] == "refuted").mean() > 0.9
    assert (columns["outcome"][recount] == "refuted").mean() > 0.9
    far = columns["distance"][attack & columns["found"]]
    assert (far > 0.5).all() and (far < 0.65).all()
    assert (columns["distance"][recount & columns["found"]] == 0).all()


def test_an_attack_refutes_where_no_count_was_claimed() -> None:
    columns = audit_smoothed(asked(0.65, one_sided=False)).columns
    recount = columns["kind"] == "recount"
    assert set(columns["outcome"][recount]) == {"not_attacked"}
    assert (columns["outcome"][~recount] == "refuted").all()


def test_an_audit_is_a_function_of_its_seed() -> None:
    one, two, other = (audit_smoothed(asked(0.58, seed=seed)).columns for seed in (0, 0, 1))
    for name, column in one.items():
        np.testing.assert_array_equal(column, two[name])
    assert any(
        (column != other[name]).any() for name, column in one.items() if name in ("distance", "outcome")
    )


def test_what_claims_nothing_is_not_attacked_and_bad_labels_are_refused() -> None:
    radius = np.where(np.arange(40) < 3, 0.4, 0.0)
    columns = audit_smoothed(asked(0.0, radius=radius)).columns
    assert set(columns["index"]) == {0, 1, 2}
    wrong = Split(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 7]))
    with pytest.raises(RunError, match="label 7"):
        audit_smoothed(asked(0.4, 2, split=wrong))
    with pytest.raises(RunError, match="tf32"):
        audit_smoothed(asked(0.4, deploy="tf32"))
    with pytest.raises(UsageError, match="standard and strong can"):
        find_smoothed_attack("pgd")
