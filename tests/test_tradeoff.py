"""Trade-off tables: from networks to fronts, claims and text, and from a store's rows."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from certbench.leaderboard import records
from certbench.leaderboard.sentences import markdown
from certbench.leaderboard.tradeoff import Measured, Terms, tradeoff

TERMS = Terms(
    dataset="digits",
    norm="linf",
    model="cnn-small",
    cap=0.2,
    verifier="ibp",
    guarantee="float_sound",
    tolerance=2.0**-20,
    decided_at=None,
    majority=0.1,
)
IMAGES = 200


def runs(
    method: str, points: dict[str, tuple[float, float]], seeds: tuple[int, ...] = (0, 1, 2)
) -> list[Measured]:
    """Networks whose settings have an accuracy, and an ACR as a share of the cap."""
    numbers = (np.arange(IMAGES) + 0.5) / IMAGES
    found = []
    for setting, (accuracy, robustness) in points.items():
        correct = numbers < accuracy
        radius = correct * (robustness * TERMS.cap / accuracy)
        found += [Measured(method, setting, 10, seed, correct, radius) for seed in seeds]
    return found


def example(seeds: tuple[int, ...] = (0, 1, 2)) -> list[Measured]:
    return [
        *runs(
            "ibp", {"ibp +kappa=0": (0.6, 0.5), "ibp +kappa=0.9": (0.9, 0.05), "ibp bad": (0.5, 0.41)}, seeds
        ),
        *runs("new", {"new +kappa=0": (0.7, 0.45), "new +kappa=0.9": (0.92, 0.15)}, seeds),
        *runs("constant", {"constant": (0.1, 0.1)}, seeds),
    ]


def test_fronts_hold_points_areas_and_what_a_constant_dominates() -> None:
    found = tradeoff(TERMS, example(), resamples=50)
    fronts = {front.method: front for front in found.fronts}
    assert [p.setting for p in fronts["ibp"].points] == ["ibp +kappa=0.9", "ibp +kappa=0", "ibp bad"]
    assert [p.on_front for p in fronts["ibp"].points] == [True, True, False]
    assert [p.beyond_constant for p in fronts["ibp"].points] == [False, True, True]
    assert fronts["ibp"].hypervolume == pytest.approx(0.5 * 0.5 + 0.3 * 0.05)
    assert fronts["new"].of_seeds == pytest.approx(dict.fromkeys(range(3), 0.6 * 0.45 + 0.22 * 0.15))
    assert fronts["constant"].hypervolume == 0


def test_a_claim_is_made_of_every_swept_method_against_the_baseline() -> None:
    found = tradeoff(TERMS, example(), resamples=50)
    (claim,) = found.claims
    assert (claim.challenger, claim.baseline, claim.seeds) == ("new", "ibp", (0, 1, 2))
    ratios = {claim.settings[r.setting]: r.ratio.value for r in claim.comparison.ratios}
    assert ratios == pytest.approx({"ibp +kappa=0": 0.9, "ibp +kappa=0.9": 3.0, "ibp bad": 0.45 / 0.41})
    assert claim.comparison.beyond_constant is not None
    assert claim.comparison.beyond_constant.value == pytest.approx(0.45 / 0.41)


def test_the_sentence_is_generated_with_every_figure_it_needs() -> None:
    text = markdown(tradeoff(TERMS, example(), resamples=50))
    assert "new against ibp, ACR at matched clean accuracy, 3 seeds: up to 3.00 [95% CI" in text
    assert "at baseline accuracy 90.00 %" in text
    assert "geometric mean 1.44 [95% CI" in text
    assert "over the 3 of 3 baseline points that it reaches" in text
    assert re.search(
        r"up to 3\.00 \[95% CI \d\.\d\d, \d\.\d\d\] over the points of the baseline's own front;", text
    )
    assert "up to 1.10 [95% CI" in text and "where the baseline beats a constant classifier" in text
    more = 0.6 * 0.45 + 0.22 * 0.15 - 0.5 * 0.5 - 0.3 * 0.05
    each = ", ".join(f"{seed}: {more:+.4f}" for seed in range(3))
    assert f"Hypervolume less the baseline's, of each seed: {each}; larger on 3 of 3." in text
    assert "|       10 |" in text  # epochs
    assert "9.5e-07" in text and " 0.2 |" in text and "10.00 †" in text and text.count("†") == 3
    assert text == markdown(tradeoff(TERMS, list(reversed(example())), resamples=50)), (
        "whatever the order of rows"
    )


def test_a_claim_from_a_bad_point_of_the_baseline_says_so() -> None:
    points = {"good": (0.6, 0.5), "bad": (0.5, 0.25)}
    measured = [*runs("ibp", points), *runs("new", {"a": (0.7, 0.45), "b": (0.5, 0.45)})]
    text = markdown(tradeoff(TERMS, measured, resamples=20))
    assert "at baseline accuracy 50.00 % (a point that another of the baseline's dominates);" in text
    assert re.search(
        r"up to 0\.90 \[95% CI \d\.\d\d, \d\.\d\d\] over the points of the baseline's own front;", text
    )
    assert "at baseline accuracy 60.00 % (good) the ratio is 0.90" in text
    assert (
        "at baseline accuracy 50.00 % (bad) (a point that another of the baseline's dominates) the ratio is"
        in text
    )


def test_every_seed_of_every_point_is_a_line_of_the_csv() -> None:
    found = [tradeoff(TERMS, example(seeds), resamples=20) for seeds in ((0, 1, 2), (3,))]
    lines = list(csv.DictReader(records.tradeoffs(found).splitlines()))
    assert len(lines) == 6 * (3 + 1)
    assert [line["seed"] for line in lines if line["setting"] == "new +kappa=0"] == ["0", "1", "2", "3"]
    (line,) = (one for one in lines if one["setting"] == "ibp bad" and one["seed"] == "3")
    assert (float(line["clean_accuracy"]), float(line["acr_of_cap"])) == pytest.approx((50, 0.41))
    assert (line["certbench_tradeoff"], line["mean_on_front"], line["verifier"]) == ("2", "False", "ibp")


def test_seeds_that_are_not_shared_are_left_out_of_a_claim() -> None:
    measured = [
        *runs("ibp", {"a": (0.6, 0.5)}, (0, 1)),
        *runs("new", {"b": (0.7, 0.4), "c": (0.8, 0.2)}, (1, 2)),
    ]
    (claim,) = tradeoff(TERMS, measured, resamples=20).claims
    assert claim.seeds == (1,)
    apart = [*runs("ibp", {"a": (0.6, 0.5)}, (0,)), *runs("new", {"b": (0.7, 0.4), "c": (0.8, 0.2)}, (1,))]
    found = tradeoff(TERMS, apart, resamples=20)
    assert found.claims == () and found.unclaimed == ("new",)
    assert "new against ibp: no seed in common, so nothing is claimed." in markdown(found)


@pytest.mark.parametrize("stray", [(0,), (7,)])
def test_a_setting_with_other_seeds_takes_nothing_from_the_rest(stray: tuple[int, ...]) -> None:
    more = [*example(), *runs("ibp", {"ibp stray": (0.7, 0.1)}, stray)]
    found, without = tradeoff(TERMS, more, resamples=20), tradeoff(TERMS, example(), resamples=20)
    (claim,), (expected,) = found.claims, without.claims
    assert claim.seeds == (0, 1, 2) and claim.left_out == ("ibp stray",)
    assert claim.comparison == expected.comparison
    areas = {front.method: front.of_seeds for front in found.fronts}
    assert areas == {front.method: front.of_seeds for front in without.fronts}
    assert "* left out, not run with all of seeds 0, 1, 2: ibp stray" in markdown(found)


def test_a_setting_with_many_seeds_takes_nothing_from_the_rest() -> None:
    many = [*runs("ibp", {"x": (0.7, 0.1)}, range(20)), *runs("new", {"x": (0.7, 0.1)}, range(20))]
    (claim,) = tradeoff(TERMS, [*example(), *many], resamples=20).claims
    assert claim.seeds == (0, 1, 2) and claim.left_out == () and len(claim.settings) == 4


def test_settings_that_share_seeds_only_all_together_are_kept_together() -> None:
    seeds = ((0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 3, 4), (0, 2, 3, 4))
    measured = [one for k, s in enumerate(seeds) for one in runs("ibp", {f"s{k}": (0.6, 0.1 + k / 50)}, s)]
    measured += runs("new", {"a": (0.8, 0.2), "s0": (0.7, 0.3)}, (0, 1, 2))
    (claim,) = tradeoff(TERMS, measured, resamples=20).claims
    assert (claim.settings, claim.seeds) == (("s0", "s1"), (0, 1, 2))
    assert claim.left_out == ("s2", "s3")


def test_seeds_that_three_settings_share_are_found() -> None:
    seeds = ((0, 1, 2, 3, 4), (0, 1, 2, 3, 5), (0, 1, 2, 4, 5))
    measured = [one for k, s in enumerate(seeds) for one in runs("ibp", {f"s{k}": (0.6, 0.2)}, s)]
    (front,) = tradeoff(TERMS, measured, resamples=20).fronts
    assert list(front.of_seeds) == [0, 1, 2]


def test_what_is_left_out_is_said_of_each_method() -> None:
    measured = [*example(), *runs("new", {"ibp bad": (0.7, 0.1)}, (9,))]
    (claim,) = tradeoff(TERMS, measured, resamples=20).claims
    assert "ibp bad" in claim.settings and claim.left_out == ("ibp bad",)


def test_a_point_without_robustness_is_reached_all_the_same() -> None:
    measured = [
        *runs("ibp", {"a": (0.9, 0.2), "b": (0.95, 0.1)}),
        *runs("new", {"x": (0.97, 0.0), "y": (0.5, 0.3)}),
    ]
    text = markdown(tradeoff(TERMS, measured, resamples=20))
    assert "has no point that accurate" not in text and "it reaches none" not in text
    assert "geometric mean 0.00 [95% CI 0.00, 0.00] over the 2 of 2 baseline points that it reaches" in text


def test_points_that_are_not_reached_are_said_to_be_so() -> None:
    measured = [*runs("ibp", {"a": (0.9, 0.2)}), *runs("new", {"b": (0.7, 0.4), "c": (0.8, 0.2)})]
    text = markdown(tradeoff(TERMS, measured, resamples=20))
    assert "it reaches none of 1 baseline point" in text and "it has no point that accurate" in text


def test_a_seed_counts_once() -> None:
    with pytest.raises(ValueError, match="seed 0 twice"):
        tradeoff(TERMS, [*runs("ibp", {"a": (0.9, 0.2)}), *runs("ibp", {"a": (0.9, 0.2)})])


def test_names_from_recipes_are_made_inert() -> None:
    text = markdown(tradeoff(TERMS, runs("ibp", {"a|b <script>": (0.9, 0.2), "c": (0.5, 0.3)}), resamples=20))
    assert "<script>" not in text and r"a\|b" in text
