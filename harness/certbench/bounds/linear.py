"""Linear (CROWN-type) bounds: margins as linear functions of the input, concretised on its box.

The margins ``C z`` are followed backward from the logits to the input, replacing each activation by its lines on the
interval that it can take (``relaxations``). The bounds differ in where those intervals come from:

* :func:`crown_ibp_margins`: interval bounds. One backward pass in all (arXiv 1906.06316).
* :func:`crown_margins`: for each neuron that interval bounds leave open, a backward pass of its own (arXiv 1811.00866).
* ``alpha.alpha_crown_margins``: as before, and the lower lines of the ReLUs optimised.

Interval bounds say which neurons are open; for those the linear bound is taken as it is, not intersected with the
interval, which is what the reference implementation does and what the oracle arrays of the tests hold. Everything is
differentiable in the network's parameters.

Memory: coefficients have one entry per image, row and neuron. Images and rows go through in parts such that those
alive at once stay under ``MEMORY_CAP``; a single row of a single image always goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from certbench.bounds.backward import BACKWARD, Activation, BackwardRule
from certbench.bounds.box import Box
from certbench.bounds.graph import Graph, Node, Statistics
from certbench.bounds.specification import difference_rows
from certbench.errors import UsageError

MEMORY_CAP = 2**30
"""Bytes of linear coefficients alive at once, in each worker."""
ALIVE = 6
"""Tensors of the largest layer's size that one step of a backward pass holds, residual branches included."""

Slopes = Mapping[str, Tensor]
"""Operation -> where its lower lines lie, in [0, 1], shape (batch, rows, ...)."""


MIXING = {"aten.linear.default", "aten.conv1d.default", "aten.conv2d.default"}
ONE_TO_ONE = {
    "aten.batch_norm.default", "aten.flatten.using_ints", "aten.view.default", "aten.reshape.default",
    *(f"aten.{name}.{kind}" for name in ("add", "sub", "mul", "div", "rsub") for kind in ("Tensor", "Scalar")),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One operation that a box entered: its rule, and its arguments with activations in place of boxes."""

    name: str
    operation: str
    rule: BackwardRule
    arguments: list[Any]
    options: dict[str, Any]


@dataclass
class Tape:
    """What an interval pass leaves for backward passes: the operations in order, and the box of the input."""

    source: Activation
    steps: list[Step] = field(default_factory=list)
    logits: torch.Size = field(default_factory=torch.Size)

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
        for step in reversed(self.steps):
            a_step = pending.pop(step.name, None)
            if a_step is None:
                continue
            options = step.options
            if slopes and step.name in slopes:
                options = {**options, "slopes": slopes[step.name]}
            terms = step.rule.rule(a_step, *step.arguments, **options)
            for activation, a_input in terms.coefficients:
                known = pending.get(activation.name)
                pending[activation.name] = a_input if known is None else known + a_input
            if terms.constant is not None:
                constant = constant + terms.constant
        return constant + self._concretise(pending.get(self.source.name))

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

    def _concretise(self, a: Tensor | None) -> Tensor | float:
        if a is None:
            return 0.0  # every path ended in constants
        flat, center, radius = a.flatten(2), self.box.center.flatten(1), self.box.radius.flatten(1)
        return (flat @ center.unsqueeze(2) - flat.abs() @ radius.unsqueeze(2)).squeeze(2)


def _activations(value: Any) -> list[Activation]:
    if isinstance(value, Activation):
        return [value]
    return [a for item in value for a in _activations(item)] if isinstance(value, list) else []


Refine = Callable[["Tape", Activation, Box, Callable[[Box], Tensor]], Box]
Tighten = Callable[[Box], Refine]
"""For a box of inputs: what is known besides interval bounds of the boxes that enter relaxed operations."""


def record(
    graph: Graph, box: Box, statistics: Statistics | None = None, refine: Refine | None = None
) -> Tape:
    """Push a box through the network and keep what backward passes need.

    Args:
        refine: tightens the box that enters a relaxed operation, given the tape so far.

    Raises:
        UsageError: an operation has no interval or no backward rule; names the node and how to add one.
    """
    tape = Tape(Activation(graph.source, box.shape, box))

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
        seen = [
            _seen(original, value, rule.needs is not None)
            for original, value in zip(node.arguments, arguments, strict=True)
        ]
        tape.steps.append(Step(node.name, node.operation, rule, seen, options))

    bounds = graph.bound(box, statistics, visit=visit)
    classes = bounds.features.shape[1] if bounds.weight is None else bounds.weight.shape[0]
    tape.logits = torch.Size((box.shape[0], classes))
    return tape


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


# The three bounds ----------------------------------------------------------------------------------------------------


def crown_ibp_margins(
    graph: Graph,
    box: Box,
    labels: Tensor,
    statistics: Statistics | None = None,
    memory: int = MEMORY_CAP,
    tighten: Tighten | None = None,
) -> Tensor:
    """Lower bounds of ``z_y - z_j`` for the wrong classes j in ascending order, shape (batch, classes - 1).

    The relaxed operations are enclosed on their interval bounds. Usually tighter than interval bounds, not always.

    Args:
        box: the inputs, shape (batch, channels, height, width) in raw pixels.
        labels: (batch,).
        statistics: what training-mode batch norms use: those of the clean pass of the same step.
        memory: bytes of coefficients alive at once. What autograd keeps for a backward pass comes on top.
        tighten: boxes from elsewhere, which must be sound.

    Raises:
        UsageError: an operation has no interval or no backward rule.
    """
    plan = Plan(graph, box, statistics, memory)
    return torch.cat([
        _margins(
            record(graph, part, statistics, tighten(part) if tighten else None),
            graph.result, part_labels, plan.rows(len(part_labels)),
        )
        for part, part_labels in plan.parts(box, labels)
    ])  # fmt: skip


def crown_margins(
    graph: Graph,
    box: Box,
    labels: Tensor,
    statistics: Statistics | None = None,
    memory: int = MEMORY_CAP,
    tighten: Tighten | None = None,
) -> Tensor:
    """As :func:`crown_ibp_margins`, with the open neurons of every layer bounded by a backward pass of their own."""
    plan = Plan(graph, box, statistics, memory)
    return torch.cat([
        _margins(
            refined(graph, part, statistics, plan, tighten),
            graph.result, part_labels, plan.rows(len(part_labels)),
        )
        for part, part_labels in plan.parts(box, labels)
    ])  # fmt: skip


class Plan:
    """How many images and rows go through at once, such that coefficients stay under ``memory`` bytes.

    ``alive`` counts the tensors held at once: of the largest layer's size, or with ``kept`` of the size of all layers
    together, because autograd keeps them.
    """

    def __init__(
        self, graph: Graph, box: Box, statistics: Statistics | None, memory: int, kept: bool = False
    ) -> None:
        with torch.no_grad():
            tape = record(graph, _images(box, 0, 1), statistics)
        neurons = tape.neurons()
        self.per_row = ALIVE * (sum(neurons) if kept else max(neurons)) * box.lower.element_size()
        self.margins = max(1, tape.logits[1] - 1)
        self.memory = memory

    def parts(self, box: Box, labels: Tensor) -> list[tuple[Box, Tensor]]:
        """The batch cut such that all margins of a part go through at once, if those of one image do."""
        count = max(1, self.memory // (self.per_row * self.margins))
        return [
            (_images(box, start, start + count), labels[start : start + count])
            for start in range(0, len(labels), count)
        ]

    def rows(self, images: int) -> int:
        return int(max(1, self.memory // (self.per_row * images)))


def _images(box: Box, start: int, stop: int) -> Box:
    return box.both(lambda part: part[start:stop])


def _margins(tape: Tape, result: str, labels: Tensor, rows: int) -> Tensor:
    return torch.cat(
        [tape.lower_bound(result, part) for part in torch.split(margin_rows(tape, labels), rows, 1)], 1
    )


def margin_rows(tape: Tape, labels: Tensor) -> Tensor:
    """C, shape (batch, classes - 1, classes)."""
    return difference_rows(labels, tape.logits[1], tape.box.lower.dtype)


def refined(
    graph: Graph, box: Box, statistics: Statistics | None, plan: Plan, tighten: Tighten | None = None
) -> Tape:
    """The tape with the boxes of open neurons tightened by backward passes."""
    first = tighten(box) if tighten else None

    def refine(tape: Tape, activation: Activation, known: Box, needs: Callable[[Box], Tensor]) -> Box:
        if first is not None:
            known = first(tape, activation, known, needs)
        if tape.interval_is_exact(activation.name):
            return known
        open_ = needs(known).flatten(1)
        most = int(open_.sum(1).max())
        if most == 0:
            return known
        chosen = open_.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        lower, upper = [], []
        for index in torch.split(chosen, plan.rows(len(chosen)), 1):
            unit = known.lower.new_zeros(*index.shape, open_.shape[1])
            unit = unit.scatter_(2, index.unsqueeze(2), 1.0).view(*index.shape, *known.shape[1:])
            lower.append(tape.lower_bound(activation.name, unit))
            upper.append(-tape.lower_bound(activation.name, -unit))

        def tightened(old: Tensor, new: list[Tensor]) -> Tensor:
            flat = old.flatten(1)
            return torch.where(open_, flat.scatter(1, chosen, torch.cat(new, 1)), flat).view_as(old)

        return Box(lower=tightened(known.lower, lower), upper=tightened(known.upper, upper))

    return record(graph, box, statistics, refine)
