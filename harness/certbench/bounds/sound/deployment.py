"""One pass of float-sound bounds, and the registers of its rules.

The invariant of this package: a box holds the value of its node *before* it is written back in the storage type, for
every real input of the ball and every admissible evaluation. Each operation has up to two rules.

* A *sound rule* bounds the result by intervals; it covers the rounding of what it reads, of what it computes at
  deployment, and of its own float64 arithmetic:

      @sound_rule("aten.hardtanh.default")
      def hardtanh(run, x, low=-1.0, high=1.0):
          return run.stored(x).ends(lambda end: end.clamp(low, high))

* A *slack rule* says how far a deployed result may lie from where the operation's backward rule (a linear bound) puts
  it, per entry of the result: round-off at deployment, and ``own`` times the sizes of the terms that the backward rule
  adds in float64. It may return None for "not at all".

The first argument is the :class:`Deployment`, for slack rules followed by ``own``; the others are those of the
operation, boxes in place of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from certbench.bounds.box import Box
from certbench.bounds.graph import Graph, Node
from certbench.bounds.precision import Precision
from certbench.bounds.shapes import MOVES
from certbench.bounds.sound.rounding import FOUR_UNITS, SoundBox, down, up
from certbench.errors import UsageError

Rule = Callable[..., Any]
"""Gives a :class:`SoundBox`; a list of them, where the operation returns several values; or a plain value."""
SlackRule = Callable[..., Tensor | None]
SOUND_RULES: dict[str, Rule] = {}
SLACK_RULES: dict[str, SlackRule] = {}
R = TypeVar("R", bound=Callable[..., Any])


def sound_rule(*operations: str) -> Callable[[R], R]:
    """Register the rule that bounds operations by intervals, by canonical name.

    Raises:
        UsageError: an operation already has one.
    """
    return _register(SOUND_RULES, "float-sound", operations)


def slack_rule(*operations: str) -> Callable[[R], R]:
    """Register the rule that linear bounds of operations need besides their backward rule, by canonical name.

    Raises:
        UsageError: an operation already has one.
    """
    return _register(SLACK_RULES, "slack", operations)


def _register(rules: dict[str, Any], kind: str, operations: tuple[str, ...]) -> Callable[[R], R]:
    def register(rule: R) -> R:
        for operation in operations:
            if operation in rules:
                raise UsageError(f"operation {operation} already has a {kind} rule")
            rules[operation] = rule
        return rule

    return register


CONSTANT_MOVES = frozenset({*MOVES, "aten.lift_fresh_copy.default"})
"""Operations that may be applied to weights inside ``forward``: they only move numbers around."""


class Deployment:
    """One pass of bounds for one precision.

    ``unsafe``, (batch,): the images for which some number may overflow, or a bound is not a number. ``underflow``,
    (batch,): what may vanish below the smallest float64 while linear bounds are computed. ``longest``: no sum of a
    backward pass has more terms.
    """

    def __init__(self, precision: Precision, images: Tensor, longest: int = 0) -> None:
        self.precision, self.longest = precision, longest
        self.unsafe = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.underflow = images.new_full((len(images),), 4 * precision.unit_flush)

    # The rules of a pass, as Graph.bound asks for them

    def rule(self, graph: Graph, node: Node) -> Rule:
        if node.operation not in SOUND_RULES:
            raise UsageError(_no_rule(graph, node, "float-sound", "sound_rule"))
        return partial(SOUND_RULES[node.operation], self)

    def check_constant(self, graph: Graph, node: Node, values: list[Any]) -> None:
        """Weights computed inside ``forward`` are rounded at deployment, which the bounds of their users do not know."""
        computes = any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
        if node.operation not in CONSTANT_MOVES and computes:
            raise UsageError(
                f"node {node.name} ({node.operation}) of {type(graph.network).__name__} computes with weights alone; "
                'store its result as a parameter or buffer, or certify with guarantee = "real_arith"'
            )

    def slack(self, graph: Graph, node: Node, arguments: list[Any], options: dict[str, Any]) -> Tensor | None:
        """What a backward step through ``node`` costs per unit of ``|coefficient|``, shape (batch, ...) of the result.

        It is enlarged so that its product with the coefficients, computed in float64, is never too small.
        """
        if node.operation not in SLACK_RULES:
            raise UsageError(_no_rule(graph, node, "slack", "slack_rule"))
        found = SLACK_RULES[node.operation](self, self.own, *arguments, **options)
        if found is None:
            return None
        for value in (v for a in arguments for v in (a if isinstance(a, list) else [a])):
            if isinstance(value, SoundBox):
                self.underflow = self.underflow + self.precision.unit_flush * (1 + per_image(value.magnitude))
        return found * self.cover

    def adding(self, x: SoundBox) -> Tensor:
        """What adding two coefficients of ``x`` costs per unit of ``|their sum|``."""
        return x.magnitude * (self.precision.unit * self.cover)

    @property
    def own(self) -> float:
        """The relative round-off of a backward step in float64: its longest sum, and a few operations per term."""
        return self.precision.own(self.longest + 256)

    @property
    def cover(self) -> float:
        return self.precision.cover(2 * self.longest + 256)

    # What rules are made of

    def guard(self, largest: Tensor, limit: float) -> None:
        """Mark images for which ``largest`` (batch,) may exceed ``limit``, or is not a number."""
        self.unsafe |= ~(largest * FOUR_UNITS <= limit)

    def checked(self, box: SoundBox) -> SoundBox:
        """The box of a new result, which must not overflow."""
        self.guard(per_image(box.magnitude), self.precision.largest)
        return box

    def widened(self, lower: Tensor, upper: Tensor, error: Tensor) -> SoundBox:
        """``[lower, upper]`` with ``error`` more on both sides, rounded outward."""
        error = error * (1 + 16 * self.precision.unit)
        return self.checked(SoundBox(lower=down(lower - error), upper=up(upper + error)))

    def storing(self, magnitude: Tensor) -> Tensor:
        """How far writing back a value of at most ``magnitude`` in the storage type moves it."""
        return magnitude * self.precision.storage + self.precision.flush

    def stored(self, x: Box) -> SoundBox:
        """The box of a value after it was written back in the storage type."""
        x = as_sound(x)
        if not self.precision.storage and not self.precision.flush:
            return x
        return self.widened(x.lower, x.upper, self.storing(x.magnitude))

    def converting(self, constant: float) -> float:
        """How far a constant written in the network's code may move when it becomes a number of the deployed type."""
        if constant == int(constant) and abs(constant) <= 256:
            return 0.0  # a number of every type
        p = self.precision
        return abs(constant) * (p.storage + p.accumulator) * (1 + 2.0**-20) + p.flush


def _no_rule(graph: Graph, node: Node, kind: str, decorator: str) -> str:
    return (
        f"node {node.name} ({node.operation}) of {type(graph.network).__name__} has no {kind} rule; add one "
        f'with @certbench.bounds.{decorator}("{node.operation}"), or certify with guarantee = "real_arith"'
    )


def as_sound(value: Any) -> SoundBox:
    if not isinstance(value, SoundBox):
        raise UsageError("a float-sound rule must return a SoundBox")
    return value


def per_image(values: Tensor) -> Tensor:
    """The largest entry of each image, (batch,)."""
    return values.flatten(1).amax(1)


def refuse_boxes(what: str, *values: object) -> None:
    if any(isinstance(value, Box) for value in values):
        raise UsageError(
            f"no float-sound rule covers a {what} whose weights depend on the input; register one"
        )


def forbid(run: Deployment, x: SoundBox, possible: Tensor) -> None:
    """Mark all images unless ``possible``: one bool, about weights."""
    run.guard(torch.where(possible, 0.0, math.inf).expand(x.shape[0]), 0.0)
