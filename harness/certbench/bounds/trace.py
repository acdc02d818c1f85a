"""From a module to a graph of canonical operations.

``torch.export`` is used rather than ``torch.fx``: it sees through any Python in ``forward`` and reduces every
spelling of an operation (``nn.ReLU``, ``F.relu``, ``x.relu_()``) to one name, so one rule per operation is enough.
The graph keeps references to the module's parameters and buffers, never copies: training changes what it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node as FxNode

from certbench.bounds.graph import Graph, Node, Ref
from certbench.errors import UsageError

FRESH = frozenset(
    f"aten.{name}"
    for name in (
        *(
            "conv1d",
            "conv2d",
            "conv3d",
            "linear",
            "matmul",
            "batch_norm",
            "layer_norm",
            "group_norm",
            "instance_norm",
        ),
        *("max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d"),
        *("relu6", "selu", "silu", "mish", "softmax", "log_softmax", "pad", "avg_pool1d"),
    )
)
"""Composite operations whose result never shares memory with an argument; their schemas do not tell."""


def trace(network: nn.Module, shape: tuple[int, ...]) -> Graph:
    """The graph of ``network`` for inputs of shape (batch, *shape) with any batch size.

    Raises:
        UsageError: the network cannot be traced (for instance it branches on the values of its input).
    """
    parameter = next(network.parameters(), torch.empty(0))
    example = torch.zeros(2, *shape, dtype=parameter.dtype, device=parameter.device)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        program = torch.export.export(
            network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**20)},)
        )
    except Exception as error:  # export raises many types; each means that this network cannot be traced
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"cannot trace {type(network).__name__}: {reason}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _Converter(network, program).graph()


class _Converter:
    """Turns an exported program into a :class:`Graph`: in-place operations become their pure form."""

    def __init__(self, network: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.network, self.program = network, program
        self.renamed: dict[str, str] = {}
        """Where an in-place operation wrote to a value, later readers of it get the result."""
        self.shared: set[str] = set()
        """Values that may share memory with another value: inputs, weights, views and what was viewed."""

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {
            name: self.program.constants[target]
            for name, target in signature.inputs_to_lifted_tensor_constants.items()
        }
        nodes: list[Node] = []
        for fx in self.program.graph.nodes:
            if fx.op == "call_function":
                nodes.append(self._node(fx))
            elif fx.op == "placeholder":
                self.shared.add(fx.name)
        if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
            raise UsageError(
                f"{type(self.network).__name__} must take one tensor and return one tensor of logits; it has "
                f"{len(signature.user_inputs)} inputs and {len(signature.user_outputs)} outputs"
            )
        source, result = str(signature.user_inputs[0]), str(signature.user_outputs[0])
        result = self.renamed.get(result, result)
        return Graph(self.network, _reachable(nodes, result), source, result, tensors, constants)

    def _node(self, fx: FxNode) -> Node:
        operation = (
            str(fx.target) if "." in str(fx.target) else getattr(fx.target, "__name__", str(fx.target))
        )
        family, _, overload = operation.rpartition(".")
        in_place = family.endswith("_") and not family.endswith("__")
        if in_place:
            operation = f"{family.removesuffix('_')}.{overload}"
        arguments = tuple(self._argument(a) for a in fx.args)
        options = {key: self._argument(value) for key, value in fx.kwargs.items()}
        if in_place:
            self._write(fx, operation)
        elif _may_share(fx):
            self.shared.update([fx.name, *(node.name for node in fx.all_input_nodes)])
        return Node(fx.name, operation, fx.target, arguments, options)

    def _write(self, fx: FxNode, operation: str) -> None:
        """
        Raises:
            UsageError: what is written to may be seen through another value, which the graph would not notice.
        """
        written = fx.args[0]
        assert isinstance(written, FxNode)  # an in-place operation writes to a tensor
        if written.name in self.shared:
            raise UsageError(
                f"node {fx.name} of {type(self.network).__name__} writes in place ({operation}) into a tensor that shares "
                "its memory with another (an input, a weight, a view or a slice); use the pure form of the operation"
            )
        self._rename(written.name, fx.name)

    def _rename(self, old: str, new: str) -> None:
        for name, current in self.renamed.items():
            if current == old:
                self.renamed[name] = new
        self.renamed[old] = new

    def _argument(self, value: Any) -> Any:
        if isinstance(value, FxNode):
            return Ref(self.renamed.get(value.name, value.name))
        if isinstance(value, list | tuple):
            return [self._argument(item) for item in value]
        return value


def _may_share(fx: FxNode) -> bool:
    """Whether the result may share memory with an argument, as far as the schema tells; if in doubt, yes."""
    operation = fx.target
    if not isinstance(operation, torch._ops.OpOverload):
        return True
    if operation._schema.is_mutable:
        raise UsageError(f"node {fx.name} ({operation}) writes to one of its arguments; use a pure operation")
    if any(result.alias_info is not None for result in operation._schema.returns):
        return True
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    name = str(operation).rpartition(".")[0]
    return operation.has_kernel_for_dispatch_key(composite) and name not in FRESH


def _reachable(nodes: list[Node], result: str) -> list[Node]:
    """The nodes that the result depends on, in order; assertions and dead code drop out."""
    needed = {result}
    kept = []
    for node in reversed(nodes):
        if node.name in needed:
            kept.append(node)
            needed.update(node.inputs())
    return kept[::-1]
