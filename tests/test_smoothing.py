"""The smoothed certifiers: the published algorithm, where draws come from, and every input that must give no radius."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from certbench.contract import Certificates, CertifyTask, SilentReporter
from certbench.data.dataset import Split
from certbench.errors import DataError, RunError, UsageError
from certbench.recipe import Recipe, parse_recipe
from certbench.smoothing import (
    BLOCK,
    ExactNoise,
    GaussianNoise,
    Purpose,
    Sampler,
    Streams,
    Work,
    decide,
    find_smoother,
    predict,
)
from certbench.smoothing.stopping import Standing
from certbench.smoothing.thresholds import BITS, noise_thresholds, normal_probability
from certbench.stats.smoothing import RADII, fixed_radius

CPU = torch.device("cpu")
SIGMA = 0.5


def recipe(certifier: str = "smoothing-sequential", deploy: str = "float32", **smoothing: Any) -> Recipe:
    table = {
        "dataset": "digits",
        "model": "none",
        "threat": {"norm": "l2", "sigma": SIGMA},
        "method": {"name": "none"},
        "train": {"epochs": 1},
        "certify": {"certifier": certifier, "deploy": deploy, "smoothing": {"n": 1000, **smoothing}},
    }
    return parse_recipe(table, "test")


class Halfspace(nn.Module):
    """Class 1 where the first pixel exceeds ``at``, else class 0, of three: everything about it is known exactly."""

    def __init__(self, at: float = 0.5) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0] - self.at
        return torch.stack([-first, first, -first.abs() - 1], 1)


def images(count: int, value: int = 0, label: int = 0) -> Split:
    pixels = torch.full((count, 1, 2, 2), value, dtype=torch.uint8)
    return Split(pixels, torch.full((count,), label))


def task(split: Split, network: nn.Module | None = None, levels: int = 255, **changes: Any) -> CertifyTask:
    fields: dict[str, Any] = {
        "recipe": recipe(),
        "settings": None,
        "network": network or Halfspace(),
        "split": split,
        "levels": levels,
        "start": 0,
        "radius": 0,
        "cap": 0,
        "device": CPU,
        "run_id": "0123456789abcdef",
    }
    return CertifyTask(**(fields | changes))


def certificates(asked: CertifyTask) -> Certificates:
    name = asked.recipe.certify.certifier
    assert name is not None
    (found,) = find_smoother(name, asked.recipe).certify(asked)
    return found


# Against the published algorithm -----------------------------------------------------------------------------------


class Stored:
    """Noise from an array: the first draws select, the others estimate."""

    key = "stored"

    def __init__(self, normal: Tensor, sigma: float, n0: int) -> None:
        self.normal, self.sigma, self.n0 = normal, sigma, n0

    def draw(self, out: Tensor, image: Tensor, index: int, purpose: Purpose, block: int) -> bool:
        first = 0 if purpose is Purpose.SELECTION else self.n0 + block * BLOCK
        chosen = self.normal[first : first + BLOCK]
        out.zero_()
        out[: len(chosen)] = image + self.sigma * chosen.permute(0, 2, 3, 1)
        return True


@pytest.fixture(scope="module")
def oracle() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / "smoothing" / "core.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def tiny_network(oracle: dict[str, np.ndarray]) -> nn.Module:
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(1, 4, 3, padding=1))
    network.add_module("bn", nn.BatchNorm2d(4))
    network.add_module("rest", nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()))
    network.add_module("fc", nn.Linear(64, 5))
    weights = {
        k.removeprefix("cert_w_"): torch.tensor(v) for k, v in oracle.items() if k.startswith("cert_w")
    }
    network.load_state_dict(weights, strict=False)
    return network.eval()


def test_certify_is_the_published_algorithm(oracle: dict[str, np.ndarray]) -> None:
    n0, n, alpha = int(oracle["cert_hp"][0]), int(oracle["cert_hp"][1]), oracle["cert_hp"][3]
    for i, sigma in enumerate(oracle["cert_sigma"]):
        noise = Stored(torch.tensor(oracle["cert_z"][i]), float(sigma), n0)
        pixels = torch.tensor(oracle["cert_x"][i : i + 1])
        with Sampler(tiny_network(oracle), pixels, np.array([0]), noise, 200).running() as sampler:
            selection = Work(0, Purpose.SELECTION, 0, n0)
            estimation = [Work(0, Purpose.ESTIMATION, 0, 100), Work(0, Purpose.ESTIMATION, 100, n)]
            selected, *estimated = sampler.counts([selection, *estimation])
        counts = np.sum(estimated, 0)
        np.testing.assert_array_equal(selected, [*oracle["cert_counts0"][i], 0])
        np.testing.assert_array_equal(counts, [*oracle["cert_counts"][i], 0])
        radius = fixed_radius(counts[selected.argmax()], n, alpha, sigma)
        assert radius == pytest.approx(oracle["cert_radius"][i], abs=1e-8)
        assert (radius == 0) == (oracle["cert_class"][i] == -1)


@pytest.mark.parametrize("certifier", ["smoothing", "smoothing-two-sided", "smoothing-label"])
def test_a_fixed_number_of_draws_is_taken_and_counted(certifier: str) -> None:
    found = certificates(task(images(3, 0), recipe=recipe(certifier, n=1234, n0=150)))
    columns = found.columns
    label = certifier == "smoothing-label"
    assert set(columns["n"]) == {1234}
    assert set(columns["n0"]) == {0 if label else 150}
    assert set(columns["draws"]) == {1234 if label else 1384}
    assert set(columns["stop_reason"]) == {"fixed"}
    truth = stats.norm.cdf(0.5 / SIGMA)
    assert np.abs(columns["k"] / 1234 - truth).max() < 5 * np.sqrt(truth * (1 - truth) / 1234)
    assert len(set(columns["k"])) > 1, "each image has draws of its own"
    if certifier in RADII:
        expected = RADII[certifier](columns["k"], 1234, 0.001, SIGMA)
        np.testing.assert_array_equal(found.radius, expected)
    assert set(found.verdict) == {"certified"} and (found.radius < 0.5).all()


def test_wrong_classes_and_abstentions_have_no_radius() -> None:
    wrong = certificates(task(images(2, 255, label=0), recipe=recipe("smoothing")))
    assert set(wrong.verdict) == {"misclassified"} and not wrong.radius.any()
    assert set(wrong.prediction) == {1} and (wrong.columns["k"] > 700).all()
    torn = certificates(task(images(2), Halfspace(0.0), recipe=recipe("smoothing")))
    assert set(torn.verdict) == {"abstain"} and not torn.radius.any()
    assert set(torn.proved_by) == {""}
    undecided = certificates(task(images(2), Halfspace(0.02), recipe=recipe(n=500, radii=["0"])))
    assert set(undecided.verdict) == {"unknown"}, "undecided at the cap, by name"
    assert set(undecided.columns["stop_reason"]) == {"budget"}


def test_predict_returns_the_class_or_abstains() -> None:
    split = Split(torch.cat([images(1).images, images(1, 255).images]), torch.zeros(2, dtype=torch.int64))
    np.testing.assert_array_equal(predict(task(split), 250), [0, 1])
    np.testing.assert_array_equal(predict(task(images(2), Halfspace(0.0)), 250), [-1, -1])


# Soundness, from network to row ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certifier", "smoothing"),
    [
        ("smoothing", {"n": 400}),
        ("smoothing-two-sided", {"n": 400}),
        ("smoothing-sequential", {"n": 1000, "radii": ["0.25", "0.5"]}),
        ("smoothing-sequential-label", {"n": 1000, "goal": "tolerance"}),
        ("smoothing-sequential", {"n": 500, "goal": "budget"}),
        ("smoothing", {"n": 400, "exact_noise": True}),
    ],
)
def test_radii_exceed_the_true_distance_no_oftener_than_alpha(
    certifier: str, smoothing: dict[str, Any]
) -> None:
    """The boundary is a plane at distance 1/2, which the smoothed classifier keeps; alpha is 0.05."""
    count, alpha = 1000, 0.05
    asked = recipe(certifier, failure_probability=alpha, **smoothing)
    found = certificates(task(images(count), recipe=asked))
    # exact noise rounds noisy pixels to multiples of 1/255, which moves the plane by half of that at most
    excess = found.radius > 0.5 + (0.5 / 255 if asked.smoothing.exact_noise else 0)
    assert stats.binom.sf(int(excess.sum()) - 1, count, alpha) > 1e-6
    assert (found.verdict == "certified").mean() > 0.9


def test_sequential_draws_stop_early_and_decide_as_asked() -> None:
    # p = Phi(1): 0.25 is certified within few draws, 0.5 lies on the boundary, 1 is refuted
    settings = {"n": 100_000, "radii": ["0.25", "1"]}
    found = certificates(task(images(50), recipe=recipe(**settings)))
    draws, n, k = (found.columns[name] for name in ("draws", "n", "k"))
    assert set(found.columns["stop_reason"]) == {"decided"}
    assert draws.max() < 3000 and (found.radius >= 0.25).all() and (found.radius < 0.6).all()
    assert (n + 100 <= draws).all() and (draws % BLOCK == 0).all()
    np.testing.assert_array_equal(found.radius, RADII["smoothing-sequential"](k, n, 0.001, SIGMA))


def test_tolerance_stops_near_what_all_draws_would_give() -> None:
    asked = recipe(n=50_000, goal="tolerance", tolerance=0.1)
    found = certificates(task(images(20), recipe=asked))
    assert set(found.columns["stop_reason"]) == {"tolerance"}
    assert found.columns["draws"].max() < 20_000
    assert (found.radius > 0.38).all() and (found.radius < 0.55).all()


# Draws that depend on nothing but run and image --------------------------------------------------------------------


def same(one: Certificates, two: Certificates) -> None:
    for name in ("prediction", "verdict", "radius", "proved_by"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.columns.keys() == two.columns.keys()
    for name, column in one.columns.items():
        np.testing.assert_array_equal(column, two.columns[name], err_msg=name)


def varied() -> Split:
    """Images from far inside class 0 to far inside class 1."""
    values = torch.arange(0, 256, 17, dtype=torch.uint8)
    return Split(values[:, None, None, None].repeat(1, 1, 2, 2), (values > 127).long())


@pytest.mark.parametrize("exact", [False, True])
def test_two_runs_packing_threads_and_subsets_give_equal_counts(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"n": 3000, "exact_noise": exact}
    one = certificates(task(varied(), recipe=recipe(**settings)))
    same(one, certificates(task(varied(), recipe=recipe(**settings))))
    monkeypatch.setattr(decide, "TURN_SECONDS", 0.0)  # the smallest turns
    torch.set_num_threads(3)
    same(one, certificates(task(varied(), recipe=recipe(**settings, batch=700))))
    half = certificates(task(varied().every(2), recipe=recipe(**settings), stride=2))
    assert list(half.index) == list(range(0, 16, 2))
    np.testing.assert_array_equal(half.columns["k"], one.columns["k"][::2])
    np.testing.assert_array_equal(half.columns["draws"], one.columns["draws"][::2])
    other = certificates(task(varied(), recipe=recipe(**settings), run_id="fedcba9876543210"))
    assert (other.columns["k"] != one.columns["k"]).any()
    assert other.columns["generator_key"][0] != one.columns["generator_key"][0]


class Interrupted:
    """Scratch that is pulled away after some saves."""

    def __init__(self, after: int) -> None:
        self.content: bytes | None = None
        self.left = after

    def load(self) -> bytes | None:
        return self.content

    def save(self, content: bytes) -> None:
        self.content = content
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.figures: list[dict[str, float]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def advance(self, done: int, **figures: float) -> None:
        self.figures.append({"done": done, **figures})


def test_an_interrupted_certification_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = certificates(task(varied(), recipe=recipe(n=3000)))
    monkeypatch.setattr(decide, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(decide, "TURN_SECONDS", 0.0)
    scratch, listener = Interrupted(after=60), Listener()
    with pytest.raises(KeyboardInterrupt):
        certificates(task(varied(), recipe=recipe(n=3000), scratch=scratch))
    asked = task(varied(), recipe=recipe(n=3000), scratch=scratch, reporter=listener)
    same(whole, certificates(asked))
    assert any(line.startswith("resumed: ") and "resumed: 0" not in line for line in listener.lines)
    assert listener.figures[0]["done"] > 0
    assert {"draws/s", "mean draws", "s left"} < listener.figures[-1].keys()
    assert scratch.content is not None
    for damaged in (b"damaged", scratch.content[:-30], scratch.content[: len(scratch.content) // 2]):
        scratch.content = damaged
        with pytest.raises(RunError, match="cannot be read.*remove the run's .partial file"):
            certificates(asked)


def test_half_done_work_of_other_images_or_streams_is_not_taken_over() -> None:
    saved = Standing.new(4, 3, 2).encode("key")
    assert Standing.decode(saved, "another key", Standing.new(4, 3, 2)) is None
    assert Standing.decode(saved, "key", Standing.new(4, 3, 2)) is not None
    with pytest.raises(RunError, match="other images"):
        Standing.decode(saved, "key", Standing.new(5, 3, 2))


def test_streams_of_images_purposes_and_blocks_are_different() -> None:
    streams, out = Streams("run", CPU), torch.empty(4, BLOCK)
    places = [(0, Purpose.SELECTION, 0), (0, Purpose.ESTIMATION, 0), (0, Purpose.ESTIMATION, 1)]
    for row, place in enumerate([*places, (1, Purpose.ESTIMATION, 0)]):
        streams.normal(out[row], 1.0, *place)
    assert out.corrcoef().fill_diagonal_(0).abs().max() < 0.4
    again = torch.empty(BLOCK)
    streams.normal(again, 2.0, *places[1])
    torch.testing.assert_close(again, 2 * out[1])


# Noise -------------------------------------------------------------------------------------------------------------


def test_gaussian_noise_is_normal() -> None:
    noise, out = GaussianNoise(Streams("run", CPU), 0.5), torch.empty(BLOCK, 20, 20, 1)
    assert noise.draw(out, torch.full((20, 20, 1), 0.25), 3, Purpose.ESTIMATION, 0)
    assert stats.kstest((out.flatten().numpy() - 0.25) / 0.5, "norm").pvalue > 1e-3


def test_normal_probabilities_to_fifty_digits() -> None:
    from mpmath import mp, mpf, ncdf  # it comes with torch

    with mp.workdps(300), localcontext(Context(prec=60)):
        for z in ("0", "0.001", "0.7", "1", "3.3", "8.2", "10"):
            assert abs(mpf(str(normal_probability(Decimal(z)))) - ncdf(mpf(z))) < mpf(10) ** -45
        step = 2 * 255 * mpf(0.12)
        thresholds = noise_thresholds(0.12, 255, 700)
        for m in (-700, -311, -1, 0, 90, 699):
            assert int(thresholds[m + 700]) == int(mp.floor(mpf(2) ** BITS * ncdf((2 * m + 1) / step)))


def test_exact_noise_has_the_discrete_normal_distribution() -> None:
    levels, sigma, count = 16, 0.5, 200
    noise = ExactNoise(Streams("run", CPU), sigma, levels)
    out, values = torch.empty(BLOCK, 20, 20, 1), []
    for block in range(count // BLOCK * 10):
        assert noise.draw(out, torch.full((20, 20, 1), 5 / levels), 0, Purpose.ESTIMATION, block)
        values.append((out * levels - 5).flatten())
    drawn = torch.cat(values).round().long()
    torch.testing.assert_close(torch.cat(values), drawn.float(), atol=1e-5, rtol=0)
    bins = np.arange(-20, 22)
    edges = np.array([-np.inf, *(2 * bins[1:] - 1) / (2 * levels * sigma), np.inf])
    expected = np.diff(stats.norm.cdf(edges)) * len(drawn)
    observed = np.bincount(drawn.clamp(-20, 21).numpy() + 20, minlength=42)
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_exact_noise_is_clipped_and_its_guide_agrees_with_a_search() -> None:
    noise = ExactNoise(Streams("run", CPU), 0.5, 255)

    class Chosen:
        key = "chosen"

        def integers(self, shape: torch.Size, *place: object) -> Tensor:
            return self.bits.view(shape)

    chosen, out = Chosen(), torch.empty(BLOCK, 8, 8, 1)
    edges = noise._thresholds[torch.randperm(len(noise._thresholds))[: 32 * BLOCK]].repeat(2)[: 64 * BLOCK]
    noise._streams = chosen  # type: ignore[assignment]
    for offset, exact in ((-1, True), (1, True), (0, False)):
        bits = edges.repeat(-(-64 * BLOCK // len(edges)))[: 64 * BLOCK] + offset
        chosen.bits = bits
        assert noise.draw(out, torch.zeros(8, 8, 1), 0, Purpose.ESTIMATION, 0) is exact
        wanted = (torch.searchsorted(noise._thresholds, bits) - noise._most).clamp(-3 * 255, 4 * 255)
        torch.testing.assert_close(out.flatten() * 255, wanted.float())
    chosen.bits = torch.full((64 * BLOCK,), 2**60 - 1)
    noise.draw(out, torch.ones(8, 8, 1), 0, Purpose.ESTIMATION, 0)
    assert (out == 4.0).all()


def test_a_block_on_an_uncertain_threshold_hits_nothing() -> None:
    class Uncertain(Stored):
        def draw(self, out: Tensor, image: Tensor, index: int, purpose: Purpose, block: int) -> bool:
            out.copy_(image.expand_as(out))
            return block != 1

    sampler = Sampler(
        Halfspace(), torch.zeros(1, 1, 2, 2), np.array([0]), Uncertain(torch.empty(0), 1.0, 0), 200
    )
    with sampler.running():
        (counts,) = sampler.counts([Work(0, Purpose.ESTIMATION, 0, 300)])
    np.testing.assert_array_equal(counts, [200, 0, 0, 100])


# What must give no radius ------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A halfspace with a fault."""

    def __init__(self, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fault, self.plain = fault, Halfspace(0.8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(self.plain(x), x)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda z, x: z - z.mean(0), "depend on the other images"),
        (lambda z, x: z * x.abs().amax(), "depend on the other images"),
        (lambda z, x: z + torch.rand_like(z), "a second time"),
        (lambda z, x: nn.functional.dropout(z, training=True), "a second time"),
        (lambda z, x: z[:, :1], "shape"),
        (lambda z, x: z.sum(1), "shape"),
    ],
)
def test_networks_that_are_no_function_of_one_image_are_refused(
    fault: Callable[[Tensor, Tensor], Tensor], words: str
) -> None:
    with pytest.raises(RunError, match=words):
        certificates(task(images(3), Wrong(fault)))


def test_nan_counts_as_wrong_and_is_reported() -> None:
    def far(logits: Tensor, x: Tensor) -> Tensor:
        return torch.where(x[:, :1, 1, 1] > 1.0, torch.nan, logits)

    listener = Listener()
    asked = task(images(2), Wrong(far), recipe=recipe("smoothing", n=2000), reporter=listener)
    found = certificates(asked)
    truth = stats.norm.cdf(0.8 / SIGMA) * stats.norm.cdf(1.0 / SIGMA)
    assert np.abs(found.columns["k"] / 2000 - truth).max() < 0.03
    (line,) = listener.lines
    assert "NaN logits; they count as wrong" in line
    nothing = certificates(task(images(1), Wrong(lambda z, x: z * torch.nan), recipe=recipe("smoothing")))
    assert list(nothing.columns["k"]) == [0] and not nothing.radius.any()


def test_ties_hit_nothing() -> None:
    tied = Wrong(lambda z, x: torch.zeros_like(z))
    found = certificates(task(images(1), tied, recipe=recipe("smoothing-label")))
    assert list(found.columns["k"]) == [0] and list(found.verdict) == ["abstain"]


def test_labels_and_pixels_that_cannot_be_are_refused() -> None:
    with pytest.raises(RunError, match="image 40 has label 3, but the network gives 3 classes"):
        certificates(task(images(1, label=3), start=40))
    with pytest.raises(RunError, match="image 0 has pixels outside"):
        certificates(task(images(1, value=17), levels=16))
    with pytest.raises(RunError, match="no image"):
        certificates(
            task(Split(torch.empty(0, 1, 2, 2, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)))
        )
    with pytest.raises(DataError, match="image 1 does not lie on the grid of 1/255"):
        ExactNoise.check(torch.tensor([0.2, 0.2001]).view(2, 1, 1, 1), 255)


def test_unknown_certifiers_and_precisions_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'smoothing-label'"):
        find_smoother("smoothing-labels", recipe())
    with pytest.raises(UsageError, match="tf32"):
        find_smoother("smoothing", recipe(deploy="tf32"))


@pytest.mark.parametrize("deploy", ["float64", "bf16", "fp16"])
def test_the_network_may_run_in_another_precision_and_says_so(deploy: str) -> None:
    found = certificates(task(images(2), recipe=recipe("smoothing", deploy)))
    assert found.deploy == deploy and set(found.verdict) == {"certified"}


def test_settings_that_do_not_matter_leave_the_digest_alone() -> None:
    def settings(name: str, **changes: Any) -> object:
        return find_smoother(name, recipe(name, **changes)).settings

    assert settings("smoothing") == settings("smoothing", goal="budget")
    assert settings("smoothing-sequential") != settings("smoothing-sequential", goal="budget")
    assert settings("smoothing-label") == settings("smoothing-label", n0=7)
    assert settings("smoothing") != settings("smoothing", n=999)
