"""Networks of depthwise-separable convolutions: DS-CNN and MobileNetV1, two of the four graphs of MLPerf Tiny; MobileNetV2.

The third, ResNet-8, is `nets.models.resnet.ResNet8`, the fourth `nets.models.autoencoder.AutoEncoder`. As everywhere here
convolutions before a batch normalisation have no bias, which those of MLPerf Tiny have: its shift would cancel it.

Source: Banbury et al., MLPerf Tiny benchmark, NeurIPS datasets and benchmarks 2021, and its reference models.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class SeparableBlock(nnx.Module):
    """A 3 x 3 convolution of each channel alone and a 1 x 1 convolution, each with batch normalisation and ReLU."""

    def __init__(self, in_features: int, features: int, stride: int, *, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            in_features, in_features, (3, 3), stride, feature_group_count=in_features, use_bias=False, rngs=rngs
        )
        self.norm1 = nnx.BatchNorm(in_features, momentum=0.9, rngs=rngs)
        self.pointwise = nnx.Conv(in_features, features, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.depthwise(x)))
        return nnx.relu(self.norm2(self.pointwise(x)))


class DSCNN(nnx.Module):
    """Keyword spotting: a 10 x 4 convolution of stride 2, four separable blocks of 64 features, a dense layer.

    Layers: conv1, norm1, block1/depthwise, block1/norm1, block1/pointwise, ..., dense1, with dropout after the first
    convolution and before the average pooling. MLPerf Tiny runs it on 49 x 10 x 1 spectral features and 12 words.

    Source: Zhang et al., Hello edge: keyword spotting on microcontrollers, 2017 (DS-CNN of small size).
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: (time, frequency, channels).
          num_classes: width of the logits.
          rngs: random streams of the initialisation and of dropout.
        """
        self.conv1 = nnx.Conv(input_shape[-1], 64, (10, 4), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.2, rngs=rngs)
        self.num_blocks = 4
        for i in range(self.num_blocks):
            setattr(self, f"block{i + 1}", SeparableBlock(64, 64, 1, rngs=rngs))
        self.dropout2 = nnx.Dropout(0.4, rngs=rngs)
        self.dense1 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features of shape (batch, time, frequency, channels) to logits of shape (batch, num_classes)."""
        x = self.dropout1(nnx.relu(self.norm1(self.conv1(images))))
        for i in range(self.num_blocks):
            x = getattr(self, f"block{i + 1}")(x)
        return self.dense1(jnp.mean(self.dropout2(x), axis=(1, 2)))


class MobileNetV1(nnx.Module):
    """A 3 x 3 convolution of stride 2, thirteen separable blocks, average pooling, a dense layer.

    Layers: conv1, norm1, block1/depthwise, block1/norm1, block1/pointwise, ..., block13/norm2, dense1.

    Source: Howard et al., MobileNets, 2017, table 1.
    """

    # Features at width 1 and stride of each block.
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, width: float = 1.0, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: (height, width, channels).
          num_classes: width of the logits.
          width: factor of all numbers of features, a multiple of 1/32.
          rngs: random streams of the initialisation.
        """
        features = round(32 * width)
        self.conv1 = nnx.Conv(input_shape[-1], features, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        for i, (full, stride) in enumerate(self.BLOCKS):
            in_features, features = features, round(full * width)
            setattr(self, f"block{i + 1}", SeparableBlock(in_features, features, stride, rngs=rngs))
        self.dense1 = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of shape (batch, height, width, channels) to logits of shape (batch, num_classes)."""
        x = nnx.relu(self.norm1(self.conv1(images)))
        for i in range(len(self.BLOCKS)):
            x = getattr(self, f"block{i + 1}")(x)
        return self.dense1(jnp.mean(x, axis=(1, 2)))


class MobileNetVWW(MobileNetV1):
    """MobileNetV1 of width 1/4; MLPerf Tiny runs it on 96 x 96 x 3 images and two classes (visual wake words)."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        super().__init__(input_shape, num_classes, width=0.25, rngs=rngs)


class InvertedBlock(nnx.Module):
    """A 1 x 1 convolution that widens, a 3 x 3 one of each channel alone, a 1 x 1 one that narrows, without ReLU after it.

    Each with batch normalisation; beside a shortcut where the shape stays.
    """

    def __init__(self, in_features: int, features: int, stride: int, expansion: int, *, rngs: nnx.Rngs):
        wide = expansion * in_features
        self.expands, self.adds = expansion > 1, stride == 1 and in_features == features
        if self.expands:
            self.expand = nnx.Conv(in_features, wide, (1, 1), use_bias=False, rngs=rngs)
            self.norm1 = nnx.BatchNorm(wide, momentum=0.9, rngs=rngs)
        self.depthwise = nnx.Conv(wide, wide, (3, 3), stride, feature_group_count=wide, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(wide, momentum=0.9, rngs=rngs)
        self.project = nnx.Conv(wide, features, (1, 1), use_bias=False, rngs=rngs)
        self.norm3 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu6(self.norm1(self.expand(x))) if self.expands else x
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """A 3 x 3 convolution of stride 2, seventeen inverted blocks, a 1 x 1 convolution, average pooling, a dense layer.

    Layers: conv1, norm1, block1/depthwise, ..., block17/norm3, conv2, norm2, dense1; 3 504 872 parameters at 1000 classes.

    Source: Sandler et al., MobileNetV2, CVPR 2018, table 2.
    """

    # Expansion, features, blocks, and stride of the first of them.
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: (height, width, channels), of ImageNet (224, 224, 3).
          num_classes: width of the logits.
          rngs: random streams of the initialisation.
        """
        self.conv1 = nnx.Conv(input_shape[-1], 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.num_blocks, in_features = 0, 32
        for expansion, features, blocks, first_stride in self.STAGES:
            for stride in (first_stride, *(blocks - 1) * (1,)):
                self.num_blocks += 1
                block = InvertedBlock(in_features, features, stride, expansion, rngs=rngs)
                setattr(self, f"block{self.num_blocks}", block)
                in_features = features
        self.conv2 = nnx.Conv(in_features, 1280, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(1280, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(1280, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of shape (batch, height, width, channels) to logits of shape (batch, num_classes)."""
        x = nnx.relu6(self.norm1(self.conv1(images)))
        for i in range(self.num_blocks):
            x = getattr(self, f"block{i + 1}")(x)
        x = nnx.relu6(self.norm2(self.conv2(x)))
        return self.dense1(jnp.mean(x, axis=(1, 2)))
