"""Networks by name. Each takes raw pixels in [0, 1]; the data set's normalisation is its first layer."""

from certbench.models import cnn, lenet, residual
from certbench.models.registry import MODELS, build_network, register_model

__all__ = ["MODELS", "build_network", "cnn", "lenet", "register_model", "residual"]
