"""Which bounds a network admits, and what it is made of, from its trace alone: no weight is needed.

The network may live on the ``meta`` device, where building and tracing cost no memory and no arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from certbench.bounds.backward import BACKWARD
from certbench.bounds.box import Box
from certbench.bounds.graph import Graph, Node, Ref
from certbench.bounds.sound.deployment import SLACK_RULES, SOUND_RULES
from certbench.bounds.tape import PLAIN
from certbench.bounds.trace import trace
from certbench.errors import UsageError
from certbench.models.fold import deployed_network
from certbench.recipe import cascade_parts

LINEAR = ("crown-ibp", "crown", "alpha-crown")


def float_sound(bound: str) -> str:
    """The name of a bound that covers the round-off of the deployed network."""
    return f"{bound} (float-sound)"


BOUNDS = tuple(name for bound in ("ibp", *LINEAR) for name in (float_sound(bound), bound))


@dataclass(frozen=True)
class Applicability:
    """What a trace tells of a network.

    ``refusals``: bound -> why it does not apply, empty where it does. ``structure``: a hash of what was built.
    ``cost``: bound -> multiply-adds of the margins of one image at one radius, in clean passes, at most.
    """

    refusals: Mapping[str, str]
    structure: str
    cost: Mapping[str, float] = field(default_factory=dict)

    def refusal(self, certifier: str, guarantee: str | None) -> str:
        """Why a certifier, or one of a cascade, does not apply; empty where nothing is known against it."""
        for name, _ in cascade_parts(certifier):
            reason = self.refusals.get(float_sound(name) if guarantee == "float_sound" else name)
            if reason:
                return reason
        return ""

    @property
    def applies(self) -> list[str]:
        return [name for name, reason in self.refusals.items() if not reason]


def applicability(network: nn.Module, shape: tuple[int, ...]) -> Applicability:
    """Trace the deployed form of a network for images of ``shape`` and look up a rule for each operation on its input.

    A rule may still refuse the values that an operation gets when bounds are computed; that an operation has none is
    found here, before any training.
    """
    deployed = deployed_network(network)
    try:
        graph = trace(deployed, shape)
        found = _box_pass(graph, shape)
    except UsageError as error:
        return Applicability(dict.fromkeys(BOUNDS, str(error)), structure_digest(network, None))
    sound = _first_without(found.nodes, set(SOUND_RULES), "float-sound rule")
    linear = _first_without(found.nodes, BACKWARD.keys() | PLAIN, "rule for linear bounds")
    slack = _first_without(
        found.nodes, SLACK_RULES.keys() | PLAIN, "slack rule for float-sound linear bounds"
    )
    refusals = {float_sound("ibp"): sound, "ibp": ""}
    for bound in LINEAR:
        refusals |= {float_sound(bound): sound or linear or slack, bound: linear}
    cost = found.cost()
    applies = {name: cost[name] for name in cost if not refusals[name]}
    return Applicability(refusals, structure_digest(network, graph), applies)


@dataclass
class _BoxPass:
    """The operations that a box enters; for each relaxed one, its neurons and the operations spent before it."""

    nodes: list[Node] = field(default_factory=list)
    relaxed: list[tuple[int, int]] = field(default_factory=list)
    clean: int = 0
    rows: int = 0

    def cost(self) -> dict[str, float]:
        """An interval pass does everything twice, for centre and radius. A row of a linear bound goes back once."""
        intermediate = sum(neurons * spent / 2 for neurons, spent in self.relaxed) / max(self.clean, 1)
        return {"ibp": 2.0, "crown-ibp": 2.0 + self.rows, "crown": 2.0 + self.rows + intermediate}


def _box_pass(graph: Graph, shape: tuple[int, ...]) -> _BoxPass:
    """
    Raises:
        UsageError: an operation has no interval rule.
    """
    found = _BoxPass()
    device = next((p.device for p in graph.network.parameters()), torch.device("cpu"))
    point = torch.zeros(1, *shape, device=device)

    def visit(node: Node, arguments: list[Any], _options: dict[str, Any]) -> None:
        if not node.operation.startswith("aten._assert"):
            found.nodes.append(node)
        rule = BACKWARD.get(node.operation)
        if rule is not None and rule.needs is not None:
            found.relaxed.append((arguments[0].shape[1:].numel(), counter.get_total_flops()))

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph.bound(Box(lower=point, upper=point), visit=visit)
    with torch.no_grad(), FlopCounterMode(display=False) as clean:
        logits = graph.run(point).logits
    found.clean, found.rows = clean.get_total_flops(), logits.shape[1] - 1
    return found


def _first_without(operations: list[Node], known: set[str], what: str) -> str:
    missing = next((node for node in operations if node.operation not in known), None)
    return f"node {missing.name} ({missing.operation}) has no {what}" if missing else ""


def structure_digest(network: nn.Module, graph: Graph | None) -> str:
    """Sixteen hexadecimal digits over what a network computes, whatever its weights.

    Hashed: name, shape and number type of every parameter and buffer, and the traced operations with their plain
    arguments, or the tree of modules where it cannot be traced. Another version of a library that builds or computes
    the network otherwise gives another digest; so may another version of torch, whose operations these are.
    """
    lines = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(network.state_dict().items())]
    if graph is None:
        lines += [
            f"{name} {type(module).__qualname__} {module.extra_repr()}"
            for name, module in network.named_modules()
        ]
    else:
        numbers = {node.name: str(position) for position, node in enumerate(graph.nodes)}
        lines += [_line(graph, node, numbers) for node in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _line(graph: Graph, node: Node, numbers: Mapping[str, str]) -> str:
    """An operation with its arguments; values are named by their place, since tracing counts their names as it likes."""

    def shown(value: object) -> str:
        if isinstance(value, Ref):
            return f"#{numbers[value.name]}" if value.name in numbers else _leaf(graph, value)
        if isinstance(value, list):
            return f"[{', '.join(map(shown, value))}]"
        return repr(value)

    options = (f"{key}={shown(value)}" for key, value in sorted(node.options.items()))
    return f"{node.operation}({', '.join([*map(shown, node.arguments), *options])})"


def _leaf(graph: Graph, value: Ref) -> str:
    try:
        return graph.tensor_name(value)
    except KeyError:
        return "input" if value.name == graph.source else "constant"
