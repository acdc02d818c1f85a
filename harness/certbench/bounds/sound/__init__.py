"""Float-sound bounds: they hold every activation that any deployed evaluation can compute.

What is proved, and why, stands in ``docs/float-soundness.md``. ``rounding`` has the boxes, ``deployment`` the pass and
the registers of its rules, ``affine``, ``arithmetic``, ``activations`` and ``selection`` the rules by family, and
``margins`` the interval bounds of the property. Linear bounds take a ``precision`` (``certbench.bounds.linear``).
"""

from certbench.bounds.sound import activations, affine, arithmetic, selection  # noqa: F401 - they register their rules
from certbench.bounds.sound.deployment import Deployment, slack_rule, sound_rule
from certbench.bounds.sound.margins import SoundBounds, sound_bounds, sound_margins
from certbench.bounds.sound.rounding import SoundBox, sound_input_box

__all__ = [
    "Deployment",
    "SoundBounds",
    "SoundBox",
    "slack_rule",
    "sound_bounds",
    "sound_input_box",
    "sound_margins",
    "sound_rule",
]
