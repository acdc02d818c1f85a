"""Networks by name. Each takes raw pixels in [0, 1]; the data set's normalisation is its first layer."""

from certbench.models import abstraction, cnn, residual
from certbench.models.registry import MODELS, build_network, register_model

__all__ = ["MODELS", "abstraction", "build_network", "cnn", "register_model", "residual"]
