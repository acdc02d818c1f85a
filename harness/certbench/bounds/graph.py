"""A traced network: run it on clean images, or push a box of images through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from certbench.bounds.box import Box
from certbench.bounds.interval import RULES, linear, per_channel, scale_and_shift
from certbench.bounds.specification import merged_margins, separate_margins
from certbench.errors import UsageError

BATCH_NORM = "aten.batch_norm.default"
LINEAR = "aten.linear.default"
RELU = "aten.relu.default"


@dataclass(frozen=True)
class Ref:
    """The value of another node, parameter or buffer."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operation. ``operation`` is its canonical pure name; ``function`` computes it on plain values."""

    name: str
    operation: str
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def inputs(self) -> Iterator[str]:
        yield from _names([*self.arguments, *self.options.values()])


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Batch norm node -> (mean, biased variance), each (channels,), of a clean batch."""


Visit = Callable[[Node, list[Any], dict[str, Any]], None]
"""Called before each operation on a box, with its resolved arguments, which it may replace, and its options."""


@dataclass(frozen=True)
class Clean:
    """The result of a clean pass: logits (batch, classes), and the statistics that training-mode batch norms saw."""

    logits: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class Bounds:
    """Bounds of a network over a box of inputs.

    ``features`` is the box that enters the classification layer, where the network ends in one; ``kept`` holds the
    boxes that enter the operations asked for, in the order of the graph.
    """

    features: Box
    weight: Tensor | None
    bias: Tensor | None
    kept: list[Box] = field(default_factory=list)

    @property
    def logits(self) -> Box:
        """The box of the logits, each bounded by itself."""
        return self.features if self.weight is None else linear(self.features, self.weight, self.bias)

    def margins(self, labels: Tensor) -> Tensor:
        """Lower bounds of ``z_y - z_j`` for the wrong classes j in ascending order, shape (batch, classes - 1).

        The classification layer is merged with the difference before absolute values are taken, which is tighter
        than the difference of logit bounds (arXiv 1810.12715).
        """
        if self.weight is None:
            return separate_margins(self.features, labels)
        return merged_margins(self.features, self.weight, self.bias, labels)


class Rules(Protocol):
    """How a pass bounds one operation after the other."""

    def rule(self, graph: Graph, node: Node) -> Callable[..., Any]:
        """What bounds an operation that a box enters, with the operation's own signature.

        Raises:
            UsageError: there is none; names the node and how to add one.
        """

    def check_constant(self, graph: Graph, node: Node, values: list[Any]) -> None:
        """An operation on ``values`` that do not depend on the input is about to be computed as it stands.

        Raises:
            UsageError: that would not be sound.
        """


class IntervalRules:
    """The rules of interval arithmetic, which know nothing of rounding."""

    def rule(self, graph: Graph, node: Node) -> Callable[..., Any]:
        if node.operation not in RULES:
            raise UsageError(
                f"node {node.name} ({node.operation}) of {type(graph.network).__name__} has no interval rule; add one "
                f'with @certbench.bounds.interval_rule("{node.operation}"), or choose another model'
            )
        return RULES[node.operation]

    def check_constant(self, graph: Graph, node: Node, values: list[Any]) -> None: ...


class Graph:
    """A network as canonical operations, sharing the module's parameters, buffers and modes."""

    def __init__(
        self,
        network: nn.Module,
        nodes: list[Node],
        source: str,
        result: str,
        tensors: Mapping[str, str],
        constants: Mapping[str, Tensor],
    ) -> None:
        self.network, self.nodes, self.source, self.result = network, nodes, source, result
        self._tensors, self._constants = dict(tensors), dict(constants)
        self._norms = {
            node.name: network.get_submodule(self._tensors[node.arguments[3].name].rpartition(".")[0])
            for node in nodes
            if node.operation == BATCH_NORM and isinstance(node.arguments[3], Ref)
        }
        for node in nodes:
            if node.operation == BATCH_NORM and (node.arguments[5] or node.name not in self._norms):
                raise UsageError(
                    f"batch norm {node.name} of {type(network).__name__} normalises by the batch it is in, even in "
                    "evaluation mode, so its outputs depend on other images; give it running statistics"
                )
        self._last_use: dict[str, list[str]] = {}
        last = {name: node.name for node in nodes for name in node.inputs()}
        for name, user in last.items():
            self._last_use.setdefault(user, []).append(name)

    def run(self, images: Tensor, statistics: Statistics | None = None) -> Clean:
        """A clean forward pass, shape (batch, channels, height, width) in raw pixels.

        Batch norms in training mode normalise by the statistics of this batch, gradients flowing through them, and
        update their running statistics once, as PyTorch does (momentum on the unbiased variance). With ``statistics``,
        those of another clean pass of the same step, they normalise by these and update nothing.
        """
        values = self._start(images)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for node in self.nodes:
            arguments = [_resolve(a, values) for a in node.arguments]
            norm = self._norms.get(node.name)
            if norm is not None and norm.training:
                if statistics is None:
                    seen[node.name] = _batch_statistics(node.name, arguments[0], norm)
                mean, var = self._frozen_statistics(
                    node, arguments, seen if statistics is None else statistics
                )
                values[node.name] = _batch_norm(arguments, mean, var)
            else:
                values[node.name] = node.function(*arguments, **_resolve_options(node, values))
            self._forget(node, values)
        return Clean(values[self.result], seen if statistics is None else statistics)

    def bound(
        self,
        box: Box,
        statistics: Statistics | None = None,
        keep: Collection[str] = (),
        visit: Visit | None = None,
        rules: Rules | None = None,
    ) -> Bounds:
        """Push a box of raw images through the network.

        Args:
            box: the inputs, shape (batch, channels, height, width) in raw pixels.
            statistics: what training-mode batch norms use: those of the clean pass of the same step. Evaluation-mode
                batch norms use their running statistics. Nothing is updated.
            keep: operations, such as ``RELU``, whose input boxes are wanted.
            visit: sees every operation that a box enters, the last one included, and may tighten that box.
            rules: by which operations are bounded; the interval rules by default.

        Raises:
            UsageError: an operation has no rule; names the node and how to add one.
        """
        rules = rules or IntervalRules()
        values = self._start(box)
        kept: list[Box] = []
        for node in self.nodes:
            if node.name == self.result and node.operation == LINEAR:
                features, weight, *bias = arguments = [_resolve(a, values) for a in node.arguments]
                if isinstance(features, Box):
                    if visit is not None:
                        visit(node, arguments, {})
                    return Bounds(features, weight, bias[0] if bias else None, kept)
            arguments, options = [_resolve(a, values) for a in node.arguments], _resolve_options(node, values)
            if not _has_box([*arguments, *options.values()]):
                rules.check_constant(self, node, [*arguments, *options.values()])
                values[node.name] = node.function(*arguments, **options)
                continue
            if node.operation.startswith("aten._assert"):
                continue  # checked when the network was traced
            if node.operation in keep:
                kept.append(arguments[0])
            if node.name in self._norms:
                arguments[3:5] = self._frozen_statistics(node, arguments, statistics)
            rule = rules.rule(self, node)
            if visit is not None:
                visit(node, arguments, options)
            values[node.name] = rule(*arguments, **options)
            self._forget(node, values)
        output = values[self.result]
        if not isinstance(output, Box):
            raise UsageError(f"the output of {type(self.network).__name__} does not depend on its input")
        return Bounds(output, None, None, kept)

    def tensor_name(self, ref: Ref) -> str:
        """The path of a parameter or buffer in the module."""
        return self._tensors[ref.name]

    def _start(self, value: Tensor | Box) -> dict[str, Any]:
        values: dict[str, Any] = {self.source: value, **self._constants}
        for name, path in self._tensors.items():
            owner, _, attribute = path.rpartition(".")
            values[name] = getattr(self.network.get_submodule(owner), attribute)
        return values

    def _forget(self, node: Node, values: dict[str, Any]) -> None:
        for name in self._last_use.get(node.name, ()):
            if name != self.result:
                del values[name]

    def _frozen_statistics(
        self, node: Node, arguments: list[Any], statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        if not self._norms[node.name].training:
            return arguments[3], arguments[4]
        if statistics is None or node.name not in statistics:
            raise UsageError(
                f"batch norm {node.name} is in training mode: pass the statistics of a clean run, or call eval()"
            )
        return statistics[node.name]


def _batch_statistics(name: str, x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of a clean batch; the running statistics follow them."""
    var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    count = x.numel() // x.shape[1]
    if count < 2:
        raise UsageError(
            f"batch norm {name} needs more than one value per channel to train; use a larger batch"
        )
    with torch.no_grad():
        norm.num_batches_tracked += 1
        momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), momentum)
    return mean, var


def _batch_norm(arguments: list[Any], mean: Tensor, var: Tensor) -> Tensor:
    """By given statistics, gradients flowing through them; torch's own function drops those."""
    x, weight, bias, *_ = arguments
    scale, shift = scale_and_shift(weight, bias, mean, var, arguments[7])
    return torch.addcmul(per_channel(shift, x.shape), x, per_channel(scale, x.shape))


def _resolve(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, list):
        return [_resolve(item, values) for item in value]
    return value


def _resolve_options(node: Node, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _resolve(value, values) for key, value in node.options.items()}


def _has_box(values: list[Any]) -> bool:
    return any(isinstance(v, Box) or (isinstance(v, list) and _has_box(v)) for v in values)
