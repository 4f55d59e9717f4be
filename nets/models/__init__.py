"""Reference networks in plain Flax NNX: nothing in them knows about quantisation or chips."""

from nets.models.autoencoder import AutoEncoder
from nets.models.lenet import LeNet
from nets.models.mlp import MLP
from nets.models.registry import MODELS, make_model
from nets.models.resnet import ResNet, ResNet8, ResNet18, ResNet20
from nets.models.separable import DSCNN, MobileNetV1, MobileNetV2, MobileNetVWW

__all__ = [
    "DSCNN",
    "MLP",
    "MODELS",
    "AutoEncoder",
    "LeNet",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetVWW",
    "ResNet",
    "ResNet8",
    "ResNet18",
    "ResNet20",
    "make_model",
]
