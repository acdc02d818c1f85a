"""Sound bounds on the outputs of an ordinary ``torch.nn.Module`` over a box of inputs.

``trace`` turns a network into a :class:`Graph` of canonical operations; ``Graph.bound`` pushes a :class:`Box` through
it by the interval rules; ``Bounds.margins`` bounds (logit of the label) - (any other logit).
"""

from certbench.bounds import activations, shapes
from certbench.bounds.box import Box, input_box
from certbench.bounds.graph import RELU, Bounds, Clean, Graph
from certbench.bounds.interval import interval_rule
from certbench.bounds.trace import trace

__all__ = ["RELU", "Bounds", "Box", "Clean", "Graph", "input_box", "interval_rule", "trace"]
