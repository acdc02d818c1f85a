"""Sound bounds on the outputs of an ordinary ``torch.nn.Module`` over a box of inputs.

``trace`` turns a network into a :class:`Graph` of canonical operations; ``Graph.bound`` pushes a :class:`Box` through
it by the interval rules; ``Bounds.margins`` bounds (logit of the label) - (any other logit). ``crown_ibp_margins``,
``crown_margins`` and ``alpha_crown_margins`` bound the same by linear functions of the input. ``sound_margins``, and
linear bounds with a :class:`Precision`, hold for every floating-point evaluation of the deployed network.
"""

from certbench.bounds import activations, relaxations, shapes  # noqa: F401 - they register their rules
from certbench.bounds.alpha import alpha_crown_margins
from certbench.bounds.backward import Activation, Terms, backward_rule
from certbench.bounds.box import Box, input_box
from certbench.bounds.graph import RELU, Bounds, Clean, Graph
from certbench.bounds.interval import interval_rule
from certbench.bounds.linear import crown_ibp_margins, crown_margins
from certbench.bounds.precision import PRECISIONS, Precision
from certbench.bounds.sound import SoundBox, slack_rule, sound_input_box, sound_margins, sound_rule
from certbench.bounds.trace import trace

__all__ = [
    "PRECISIONS",
    "RELU",
    "Activation",
    "Bounds",
    "Box",
    "Clean",
    "Graph",
    "Precision",
    "SoundBox",
    "Terms",
    "alpha_crown_margins",
    "backward_rule",
    "crown_ibp_margins",
    "crown_margins",
    "input_box",
    "interval_rule",
    "slack_rule",
    "sound_input_box",
    "sound_margins",
    "sound_rule",
    "trace",
]
