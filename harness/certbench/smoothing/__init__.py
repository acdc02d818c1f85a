"""Randomized smoothing: class counts of noisy images, and the L2 radii they certify.

``find_smoother`` gives a certifier by name; ``predict`` is PREDICT. ``docs/smoothing.md`` says what is guaranteed.
"""

from certbench.smoothing.certifiers import SMOOTHERS, find_smoother
from certbench.smoothing.decide import Smoother, certify, predict, sampler_of
from certbench.smoothing.noise import BLOCK, ExactNoise, GaussianNoise, Noise, Purpose, Streams
from certbench.smoothing.sampler import Sampler, Work

__all__ = [
    "BLOCK",
    "SMOOTHERS",
    "ExactNoise",
    "GaussianNoise",
    "Noise",
    "Purpose",
    "Sampler",
    "Smoother",
    "Streams",
    "Work",
    "certify",
    "find_smoother",
    "predict",
    "sampler_of",
]
