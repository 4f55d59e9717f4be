"""Multilayer perceptron: the smallest reference network."""

import math
from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Two hidden layers of 64 ReLU units on flattened images.

    Layers: dense1, dense2, dense3, each with a bias.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: of one image, any number of axes.
          num_classes: width of the logits.
          rngs: random streams of the initialisation.
        """
        self.dense1 = nnx.Linear(math.prod(input_shape), 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 64, rngs=rngs)
        self.dense3 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of shape (batch, ...) to logits of shape (batch, num_classes)."""
        x = images.reshape(images.shape[0], -1)
        x = nnx.relu(self.dense1(x))
        x = nnx.relu(self.dense2(x))
        return self.dense3(x)
