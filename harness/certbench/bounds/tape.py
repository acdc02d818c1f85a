"""What an interval pass leaves for backward passes, and the backward pass itself.

Under a :class:`Deployment` every step also has a *slack*: how far the deployed result may lie from what the step's
backward rule says of it. A backward pass pays for it with one product of the coefficients' sizes per step, and rounds
every sum of its constant downward, so its bound holds for every deployed evaluation (``docs/float-soundness.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from certbench.bounds.backward import BACKWARD, Activation, BackwardRule
from certbench.bounds.box import Box
from certbench.bounds.graph import LINEAR, Bounds, Graph, Node, Statistics
from certbench.bounds.sound.deployment import SOUND_RULES, Deployment, as_sound
from certbench.bounds.sound.rounding import SoundBox, down
from certbench.errors import UsageError

Slopes = Mapping[str, Tensor]
"""Operation -> where its lower lines lie, in [0, 1], shape (batch, rows, ...)."""


MIXING = {"aten.linear.default", "aten.conv1d.default", "aten.conv2d.default"}
ONE_TO_ONE = {
    "aten.batch_norm.default", "aten.flatten.using_ints", "aten.view.default", "aten.reshape.default",
    *(f"aten.{name}.{kind}" for name in ("add", "sub", "mul", "div", "rsub") for kind in ("Tensor", "Scalar")),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One operation that a box entered: its rule, and its arguments with activations in place of boxes.

    ``slack``: shape (batch, ...) of the result, where round-off counts and there is any.
    """

    name: str
    operation: str
    rule: BackwardRule
    arguments: list[Any]
    options: dict[str, Any]
    slack: Tensor | None = None


@dataclass
class Tape:
    """The operations in order, and the box of the input.

    ``run`` is there where round-off counts; ``sums`` then says, for each value, what adding up its coefficients costs.
    """

    source: Activation
    run: Deployment | None = None
    steps: list[Step] = field(default_factory=list)
    logits: torch.Size = field(default_factory=torch.Size)
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def box(self) -> Box:
        return self.source.box

    def neurons(self) -> list[int]:
        """The number of entries per image of the value that enters each operation."""
        return [a.shape[1:].numel() for step in self.steps for a in _activations(step.arguments)]

    def lower_bound(self, name: str, a: Tensor, slopes: Slopes | None = None) -> Tensor:
        """The least value on the input box of linear bounds of ``sum(a * h)``, shape (batch, rows).

        Args:
            name: the operation whose output is h.
            a: shape (batch, rows, *shape of h).
            slopes: for the lower lines of ReLUs; those not named take the adaptive choice.
        """
        pending = {name: a}
        constant = a.new_zeros(a.shape[:2])
        if self.run is not None:
            constant = constant - self.run.underflow[:, None]
        for step in reversed(self.steps):
            a_step = pending.pop(step.name, None)
            if a_step is None:
                continue
            constant = self._less(constant, a_step, step.slack)
            options = step.options
            if slopes and step.name in slopes:
                options = {**options, "slopes": slopes[step.name]}
            terms = step.rule.rule(a_step, *step.arguments, **options)
            for activation, a_input in terms.coefficients:
                known = pending.get(activation.name)
                if known is not None:
                    a_input = known + a_input
                    constant = self._less(constant, a_input, self.sums.get(activation.name))
                pending[activation.name] = a_input
            if terms.constant is not None:
                constant = self._rounded(constant + terms.constant)
        return self._concretise(constant, pending.get(self.source.name))

    def proved(self, margins: Tensor) -> Tensor:
        """``margins`` (batch, rows), NaN for images whose numbers may overflow at deployment."""
        return margins if self.run is None else margins.masked_fill(self.run.unsafe[:, None], math.nan)

    def _less(self, constant: Tensor, a: Tensor, slack: Tensor | None) -> Tensor:
        """``constant - |a| slack``, rounded down."""
        if slack is None:
            return constant
        return self._rounded(constant - (a.abs().flatten(2) @ slack.flatten(1).unsqueeze(2)).squeeze(2))

    def _rounded(self, constant: Tensor) -> Tensor:
        return constant if self.run is None else down(constant)

    def _concretise(self, constant: Tensor, a: Tensor | None) -> Tensor:
        if a is None:
            return constant  # every path ended in constants
        flat, center, radius = a.flatten(2), self.box.center.flatten(1), self.box.radius.flatten(1)
        if self.run is not None:
            radius = (radius + self.run.own * center.abs()) * self.run.cover
        least = (flat @ center.unsqueeze(2) - flat.abs() @ radius.unsqueeze(2)).squeeze(2)
        return self._rounded(constant + self._rounded(least))

    def interval_is_exact(self, name: str) -> bool:
        """Whether every entry of a value is a linear form of the input that interval bounds lose nothing on."""
        producers = {step.name: step for step in self.steps}
        mixed = False
        while name in producers:
            step = producers[name]
            inputs = _activations(step.arguments)
            if (
                len(inputs) != 1
                or step.operation not in ONE_TO_ONE | MIXING
                or (step.operation in MIXING and mixed)
            ):
                return False
            mixed = mixed or step.operation in MIXING
            name = inputs[0].name
        return True


def _activations(value: Any) -> list[Activation]:
    if isinstance(value, Activation):
        return [value]
    return [a for item in value for a in _activations(item)] if isinstance(value, list) else []


def _boxes(value: Any) -> list[SoundBox]:
    if isinstance(value, SoundBox):
        return [value]
    return [box for item in value for box in _boxes(item)] if isinstance(value, list) else []


Refine = Callable[["Tape", Activation, Box, Callable[[Box], Tensor]], Box]


def record(
    graph: Graph,
    box: Box,
    statistics: Statistics | None = None,
    refine: Refine | None = None,
    run: Deployment | None = None,
) -> Tape:
    """Push a box through the network and keep what backward passes need.

    Args:
        box: a :class:`SoundBox` where there is a ``run``.
        refine: tightens the box that enters a relaxed operation, given the tape so far.
        run: the deployment whose round-off the bounds shall cover.

    Raises:
        UsageError: an operation has no interval or no backward rule, or no slack rule where one is needed; names the
            node and how to add one.
    """
    tape = Tape(Activation(graph.source, box.shape, box), run)

    def visit(node: Node, arguments: list[Any], options: dict[str, Any]) -> None:
        rule = BACKWARD.get(node.operation)
        if rule is None:
            if node.operation not in PLAIN:
                raise UsageError(_no_rule(graph, node))
            return
        if rule.needs is not None and refine is not None:
            arguments[0] = refine(
                tape, _seen(node.arguments[0], arguments[0], False), arguments[0], rule.needs
            )
            if run is not None:
                run.checked(as_sound(arguments[0]))  # a bound that is not a number proves nothing
        seen = [
            _seen(original, value, rule.needs is not None)
            for original, value in zip(node.arguments, arguments, strict=True)
        ]
        slack = None
        if run is not None:
            slack = run.slack(graph, node, arguments, options)
            tape.sums |= {
                a.name: run.adding(b) for a, b in zip(_activations(seen), _boxes(arguments), strict=True)
            }
        tape.steps.append(Step(node.name, node.operation, rule, seen, options, slack))

    bounds = graph.bound(box, statistics, visit=visit, rules=run)
    if run is not None:
        _store_logits(tape, run, bounds)
    classes = bounds.features.shape[1] if bounds.weight is None else bounds.weight.shape[0]
    tape.logits = torch.Size((box.shape[0], classes))
    return tape


def _store_logits(tape: Tape, run: Deployment, bounds: Bounds) -> None:
    """Logits are written back before they are compared, and must not overflow."""
    logits = as_sound(bounds.features)
    if bounds.weight is not None:
        logits = SOUND_RULES[LINEAR](run, logits, bounds.weight, bounds.bias)
    run.stored(logits)
    last = tape.steps[-1]
    storing = run.storing(logits.magnitude) * run.cover
    tape.steps[-1] = replace(last, slack=storing if last.slack is None else last.slack + storing)


PLAIN = {"aten.sym_size.int", "aten.zeros_like.default"}
"""Operations on a box whose result does not depend on the input."""


def _seen(original: Any, value: Any, with_box: bool) -> Any:
    if isinstance(value, Box):
        box = Box(lower=value.lower, upper=value.upper) if with_box else None
        return Activation(original.name, value.shape, box)
    if isinstance(value, Tensor) and not torch.is_grad_enabled():
        return value.detach()
    if isinstance(original, list):
        return [_seen(o, v, with_box) for o, v in zip(original, value, strict=True)]
    return value


def _no_rule(graph: Graph, node: Node) -> str:
    return (
        f"node {node.name} ({node.operation}) of {type(graph.network).__name__} has no backward rule for linear "
        f'bounds; add one with @certbench.bounds.backward_rule("{node.operation}"), or use the certifier ibp'
    )
