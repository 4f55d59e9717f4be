"""Reference networks by name."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from nets.models.lenet import LeNet
from nets.models.mlp import MLP
from nets.models.resnet import ResNet8, ResNet20
from nets.models.separable import DSCNN, MobileNetVWW

MODELS: Mapping[str, Callable[..., Any]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "resnet8": ResNet8,
    "resnet20": ResNet20,
    "ds_cnn": DSCNN,
    "mobilenet_vww": MobileNetVWW,
}


def make_model(name: str, input_shape: Sequence[int], num_classes: int, seed: int = 0) -> nnx.Module:
    """Build a reference network with initial weights drawn from a seed.

    Args:
      name: a key of `MODELS`.
      input_shape: (height, width, channels) of one image.
      num_classes: number of labels, the width of the logits.
      seed: of the initial weights; the same seed gives the same weights.

    Returns:
      An NNX module that maps images of shape (batch, height, width, channels) to logits of shape (batch, num_classes).

    Raises:
      ValueError: unknown name, images below 4 x 4 pixels or not (height, width, channels), fewer than two classes.
    """
    if name not in MODELS:
        nearest = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"expected a model among {', '.join(MODELS)}, got {name!r}; did you mean {nearest!r}?")
    if len(input_shape) != 3 or min(input_shape[:2]) < 4 or input_shape[2] < 1:
        raise ValueError(
            f"expected input_shape (height, width, channels) of at least 4 x 4 pixels, got {tuple(input_shape)}; "
            "grey images have channels = 1"
        )
    if num_classes < 2:
        raise ValueError(f"expected num_classes >= 2, got {num_classes}; count the distinct labels of the data")
    return MODELS[name](input_shape, num_classes, rngs=nnx.Rngs(seed))
