"""Residual networks of He et al.: the CIFAR variants for 32 x 32 images, and ResNet-18 for ImageNet."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class ResidualBlock(nnx.Module):
    """Two 3 x 3 convolutions with batch normalisation beside a shortcut, 1 x 1 convolved where shapes change."""

    def __init__(self, in_features: int, features: int, stride: int, *, rngs: nnx.Rngs):
        # No bias before a batch normalisation: its own shift would cancel it.
        self.conv1 = nnx.Conv(in_features, features, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.projects = stride != 1 or in_features != features
        if self.projects:
            self.shortcut = nnx.Conv(in_features, features, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            self.shortcut_norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.projects else x))


class ResNet(nnx.Module):
    """A 3 x 3 convolution, three stages of residual blocks of 16, 32 and 64 features, average pooling, a dense layer.

    Layers: conv1, norm1, block1/conv1, block1/norm1, block1/conv2, ..., dense1. The shortcut of a block that changes
    shape is a 1 x 1 convolution with batch normalisation (option B of the paper). Only dense1 has a bias.

    Source: He et al., Deep residual learning for image recognition, CVPR 2016, section 4.2.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, blocks_per_stage: int, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: (height, width, channels).
          num_classes: width of the logits.
          blocks_per_stage: blocks in each of the three stages; the network has 6 * blocks_per_stage + 2 layers.
          rngs: random streams of the initialisation.
        """
        self.conv1 = nnx.Conv(input_shape[-1], 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.num_blocks = 3 * blocks_per_stage
        self.dense1 = nnx.Linear(_add_blocks(self, 16, blocks_per_stage, rngs), num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of shape (batch, height, width, channels) to logits of shape (batch, num_classes)."""
        x = nnx.relu(self.norm1(self.conv1(images)))
        for i in range(self.num_blocks):
            x = getattr(self, f"block{i + 1}")(x)
        return self.dense1(jnp.mean(x, axis=(1, 2)))


class ResNet8(ResNet):
    """ResNet with one block per stage (78 042 parameters at 32 x 32 x 3 and 10 classes)."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        super().__init__(input_shape, num_classes, blocks_per_stage=1, rngs=rngs)


class ResNet20(ResNet):
    """ResNet with three blocks per stage (272 474 parameters at 32 x 32 x 3 and 10 classes)."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        super().__init__(input_shape, num_classes, blocks_per_stage=3, rngs=rngs)


class ResNet18(nnx.Module):
    """A 7 x 7 convolution of stride 2, max pooling, four stages of two residual blocks, average pooling, a dense layer.

    Layers: conv1, norm1, block1/conv1, ..., block8/norm2, dense1; 11 689 512 parameters at 1000 classes.

    Source: He et al., Deep residual learning for image recognition, CVPR 2016, table 1, with projection shortcuts.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: (height, width, channels), of ImageNet (224, 224, 3).
          num_classes: width of the logits.
          rngs: random streams of the initialisation.
        """
        self.conv1 = nnx.Conv(input_shape[-1], 64, (7, 7), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.num_blocks = 8
        self.dense1 = nnx.Linear(_add_blocks(self, 64, 2, rngs), num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of shape (batch, height, width, channels) to logits of shape (batch, num_classes)."""
        x = nnx.relu(self.norm1(self.conv1(images)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i in range(self.num_blocks):
            x = getattr(self, f"block{i + 1}")(x)
        return self.dense1(jnp.mean(x, axis=(1, 2)))


def _add_blocks(network: ResNet | ResNet18, features: int, blocks_per_stage: int, rngs: nnx.Rngs) -> int:
    """Gives a network its `num_blocks` blocks, twice the features and half the size from stage to stage; last features."""
    in_features = features
    for i in range(network.num_blocks):
        stage, place = divmod(i, blocks_per_stage)
        out_features, stride = features * 2**stage, 2 if stage > 0 and place == 0 else 1
        setattr(network, f"block{i + 1}", ResidualBlock(in_features, out_features, stride, rngs=rngs))
        in_features = out_features
    return in_features
