"""The lines under a table that say how to read it. Plain text: whoever shows them escapes them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from certbench.leaderboard.board import Board
from certbench.leaderboard.columns import AT_LEAST, several_steps
from certbench.leaderboard.row import Audited, Row
from certbench.recipe import VERDICT_ONLY
from certbench.stats.binomial import quantile
from certbench.stats.ranks import LEVEL
from certbench.stats.smoothing import VOID_LEVEL
from certbench.threat import format_radius

GUARANTEES = {
    "real_arith": "proved in real arithmetic, computed in floating point; round-off of the computation is not covered",
    "float_sound": "proved for every evaluation of the deployed network at the stated precision; assumed: dot products "
    "are sums of products in any order (no Winograd, Fourier or Strassen kernels; cuDNN, NNPACK and reduced-precision "
    "reductions off), round to nearest in the bounds' own float64; see docs/float-soundness.md",
    "statistical": "holds with probability 1 - alpha over the certifier's sampling, for each image on its own",
}
DERIVED = "Derived by `certbench leaderboard build` from the rows in `results/`; do not edit."
_BUDGET = "; by ACR only rows of one alpha and one rule by which draws end are compared"
SWEPT = "Recipes that stand above, changed by --set as their names say; not ranked."
VOIDED = "Attacks refuted more proofs of these rows than their guarantee allows, so no figure of theirs counts and they are not ranked."


def foot(board: Board) -> list[str]:
    """How to read the board's table, one line each."""
    rows = board.all_rows
    return [
        f"Protocol: {board.protocol}.",
        *_settings(rows),
        *_meaning(board),
        *_ranks(board),
        *_audits(rows),
        *_counts(board),
        *_seconds(rows),
        DERIVED,
    ]


def _settings(rows: Sequence[Row]) -> Iterable[str]:
    caps = sorted({row.cap for row in rows if row.cap is not None})
    if caps:
        yield f"Cap of the radius search: {', '.join(map(format_radius, caps))}."
    certifiers = sorted({(row.certifier, row.settings_digest[:8], row.deploy) for row in rows})
    named = (f"{certifier} (settings {digest}, {deploy})" for certifier, digest, deploy in certifiers)
    yield f"Certifier: {', '.join(named)}."
    if any(VERDICT_ONLY in certifier for certifier, _, _ in certifiers):
        yield (
            f"A bound marked {VERDICT_ONLY} decides at the table's radius only and proves no other, so the ACR of such a "
            "row is mostly that of its other bounds."
        )
    for guarantee in sorted({row.guarantee for row in rows}):
        yield f"Guarantee {guarantee}: {GUARANTEES[guarantee]}."
    yield from _sampling(rows)
    epochs = sorted({(row.method, row.recipe, row.variant, row.epochs) for row in rows})
    yield f"Epochs: {'; '.join(_epochs(*entry) for entry in epochs)}."


def _sampling(rows: Sequence[Row]) -> Iterable[str]:
    sampled = [row for row in rows if row.sampling is not None and row.images]
    for alpha in sorted({row.sampling.alpha for row in sampled if row.sampling}):
        images = max(row.images for row in sampled if row.sampling and row.sampling.alpha == alpha)
        wrong = quantile(images, alpha, 1 - VOID_LEVEL)
        yield (
            f"alpha = {alpha:g} for each image. Over all {images} images of a run together, at most {wrong} certificates "
            f"({100 * wrong / images:.2f} points) are wrong with probability {1 - VOID_LEVEL:g}."
        )
    if any(row.sampling and row.sampling.exact_noise for row in sampled):
        yield "Noise was drawn exactly on the grid of pixel values where the recipe says exact_noise."


def _meaning(board: Board) -> Iterable[str]:
    if board.smoothed:
        yield (
            "> 0 and ≥ r: images that are right with a certified radius above 0, or of at least r, percent; mean over "
            "seeds ± sample standard deviation. ACR: mean certified radius over all images, wrong and abstained ones "
            "counting 0. n: draws behind a certificate; no radius exceeds what n draws can prove, so ACRs of different "
            "n are not compared. alpha of all: the probability that any certificate of a run is wrong is at most that. "
            "mean draws: all draws of an image."
        )
        yield from _cut(board.all_rows)
        yield from _undecided(board)
        return
    yield (
        "clean and certified: mean over seeds ± sample standard deviation, percent of images. ACR: mean certified "
        "radius over all images, up to the cap, misclassified ones counting 0; incomplete where a radius is unknown."
        + (" proved by: the shares of certified that each step proved." if several_steps(board) else "")
    )


def _cut(rows: Iterable[Row]) -> Iterable[str]:
    """Where draws end once the radii that were asked for are decided, more draws would have proved larger ones."""
    found: dict[Fraction, float] = defaultdict(float)
    for row in rows:
        last = row.reach.last if row.reach else None
        if last is None:
            continue
        most = max(float(np.nanmax(entry.metrics.each.radius, initial=0.0)) for entry in row.entries)
        if most >= last:  # else no image's draws ended for having proved them all
            found[last] = max(found[last], most)
    if found:
        ends = (  # rounded up, so that the sentence holds
            f"{math.ceil(1000 * most) / 1000:g} where the largest is {float(last):g}"
            for last, most in sorted(found.items())
        )
        yield (
            'Where a recipe\'s goal is "radii", draws of an image end once the radii asked for that n draws can prove are decided, '
            f"so no radius exceeds {', '.join(ends)}: ACR, and differences of ACR, are cut there."
        )


def _undecided(board: Board) -> Iterable[str]:
    """What cells say at radii that draws ended before deciding."""
    rows = [row for row in board.all_rows if row.reach is not None]
    if any(row.is_at_least(radius) for row in rows for radius in board.radii):
        yield (
            f"{AT_LEAST.strip()}: at least; that radius was not asked for, or only within a tolerance, and draws of some images ended "
            "before it was decided."
        )
    if any(radius not in row.at for row in rows for radius in board.radii):
        yield "Empty at r: draws ended before any radius that large was decided."


def _seconds(rows: Sequence[Row]) -> Iterable[str]:
    if any(row.train_seconds is not None or row.certify_seconds is not None for row in rows):
        yield "train s and certify s: means over seeds, of machines under the load they had then; no measure of what a method costs."


def _ranks(board: Board) -> Iterable[str]:
    standings = [(row, found) for row in board.rows if (found := board.standing(row))]
    if any(standing.alone for _, standing in standings):
        yield f"rank alone: no other row of this board may be compared with it{_BUDGET if board.smoothed else ''}."
    compared = [row for row, standing in standings if not standing.alone]
    if not compared:
        return
    if any(1 < standing.of < board.ranked for _, standing in standings):
        yield f"rank k of m: compared with m - 1 others{_BUDGET}."
    several = any(len(row.seeds) > 1 for row in compared)
    by = "ACR" if board.smoothed else "certified accuracy"
    test = (
        "the paired bootstrap over images nested in seeds"
        if several or board.smoothed
        else "McNemar's exact test"
    )
    yield (
        f"rank: by {by}, 1 + the number of rows that are significantly better, to the number of rows less those that "
        f"are significantly worse; all pairs compared on the same images by {test}, Holm-corrected at {LEVEL:g}."
    )


def _audits(rows: Sequence[Row]) -> Iterable[str]:
    audited = [row.audit for row in rows if row.audit]
    if audited:
        yield f"Attacked with {attacks(audited)}."
        if any(row.guarantee != "statistical" for row in rows):
            yield (
                "attacked: images that are correct and withstood every attack at the table's radius, percent; empty unless "
                "all correct ones were attacked. certified is at most attacked, and attacked at most clean."
            )
        if any(row.guarantee == "statistical" for row in rows):
            yield (
                "attacked, of statistical rows: images that are right and whose certificate no audit refuted, percent; "
                "empty unless every certificate was audited."
            )
        yield (
            "audit: refuted k of n, n certificates attacked at their own radius. A witness counts if it holds at the "
            "level of the guarantee; one that only floating point sees is counted as in float and voids nothing. What "
            "was not refuted is not proved by that."
        )
        yield "An image that the certifier left unknown and an attack broke counts as falsified."
    for limit in sorted({limit for audit in audited for limit in audit.limits}):
        yield f"none can be confirmed: {limit}; a flip that an attack found there counts as in float."
    if any(row.guarantee == "statistical" for row in rows):
        yield (
            "A statistical row is voided when more certificates are refuted than sound ones are with probability "
            f"{VOID_LEVEL:g}, each image erring with probability alpha, and all tests of one attack together as well."
        )
    if any(row.audit is None for row in rows):
        yield "not audited: no attack on this row's certificates is recorded; see `certbench audit`."


def attacks(audited: Iterable[Audited]) -> str:
    """The attacks by name, what they do and the digest of their settings."""
    found = sorted({attack for audit in audited for attack in audit.attacks})
    return ", ".join(
        f"{name} ({summary}; settings {digest[:8]})" if summary else f"{name} (settings {digest[:8]})"
        for name, digest, summary in found
    )


def _counts(board: Board) -> Iterable[str]:
    rows = board.all_rows
    if board.smoothed:
        yield "failed (timeout or error) counts images over all seeds."
    else:
        yield "unknown (abstained included), falsified and failed (timeout or error) count images over all seeds."
    if not all(row.complete for row in rows):
        yield "A row with n of N images is incomplete: it stands below all complete rows and is not comparable to them."
    if any(row.submitter is not None for row in rows):
        yield (
            "submitted by: rows of another harness, imported; re-checked are the certificates, drawn at random, that "
            "this harness made again from the checkpoint and found equal."
        )
    if any(row.published for row in rows):
        yield "Δ: measured minus published, in percentage points, and in published standard deviations (sd) where there are any."
    if any(published.because for row in rows for published in row.published):
        yield (
            "beside, no reproduction: only rows of this harness, made by the certifier, guarantee and draws that their "
            "recipe asks for, count as reproductions, and none of a figure of other settings."
        )
    for note in sorted({note for row in rows for published in row.published for note in published.notes}):
        yield f"Published under another protocol: {note}"


def voided(row: Row) -> str:
    """Why a row is voided."""
    assert row.audit is not None  # a row is voided by its audit
    return (
        f"{row.method}, {row.recipe}: {row.audit.refuted} refuted of {row.audit.tried} certificates, in run "
        f"{', '.join(row.audit.refuted_runs)}, attacked with {attacks([row.audit])}."
    )


def _epochs(method: str, recipe: str, variant: str, epochs: Sequence[int]) -> str:
    shown = f"{recipe} ({variant})" if variant else recipe
    return f"{method} {shown} {', '.join(map(str, epochs))}"
