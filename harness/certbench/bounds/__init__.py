"""Sound bounds on the outputs of an ordinary ``torch.nn.Module`` over a box of inputs.

``trace`` turns a network into a :class:`Graph` of canonical operations; ``Graph.bound`` pushes a :class:`Box` through
it by the interval rules; ``Bounds.margins`` bounds (logit of the label) - (any other logit). ``sound_margins`` does the
same for every floating-point evaluation of the deployed network at a stated :class:`Precision`.
"""

from certbench.bounds.box import Box, input_box
from certbench.bounds.graph import RELU, Bounds, Clean, Graph
from certbench.bounds.interval import interval_rule
from certbench.bounds.precision import PRECISIONS, Precision
from certbench.bounds.sound import SoundBox, sound_margins, sound_rule
from certbench.bounds.trace import trace

__all__ = [
    "PRECISIONS",
    "RELU",
    "Bounds",
    "Box",
    "Clean",
    "Graph",
    "Precision",
    "SoundBox",
    "input_box",
    "interval_rule",
    "sound_margins",
    "sound_rule",
    "trace",
]
