"""Networks by name. Each takes raw pixels in [0, 1]; the data set's normalisation is its first layer."""

from certbench.models import abstraction, cnn, lenet, residual, resnet, resnext, torchvision_networks
from certbench.models.registry import MODELS, Builder, build_network, register_model

__all__ = [
    "MODELS",
    "Builder",
    "abstraction",
    "build_network",
    "cnn",
    "lenet",
    "register_model",
    "residual",
    "resnet",
    "resnext",
    "torchvision_networks",
]
