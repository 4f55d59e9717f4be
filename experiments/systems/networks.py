"""Networks of which only the shapes are needed: AlexNet, ResNet-18, the stereo pair of S8. No weights, no data."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

Shapes = dict[str, Any]


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """Images (N, H, W, C) with a kernel (R, S, C, K)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def max_pool(x: jax.Array, window: int, padding: str) -> jax.Array:
    """Maxima over square windows, two apart."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), padding)


def alexnet() -> tuple[Callable, Shapes]:
    """AlexNet (Krizhevsky et al., 2012), one tower, for images of 227 x 227: function and shapes of its parameters."""
    shapes: Shapes = {
        "conv1": (11, 11, 3, 96), "conv2": (5, 5, 96, 256), "conv3": (3, 3, 256, 384), "conv4": (3, 3, 384, 384),
        "conv5": (3, 3, 384, 256), "fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000),
    }  # fmt: skip

    def network(params: Any, images: jax.Array) -> jax.Array:
        x = max_pool(jax.nn.relu(conv(images, params["conv1"], 4, "VALID")), 3, "VALID")
        x = max_pool(jax.nn.relu(conv(x, params["conv2"])), 3, "VALID")
        x = jax.nn.relu(conv(jax.nn.relu(conv(x, params["conv3"])), params["conv4"]))
        x = max_pool(jax.nn.relu(conv(x, params["conv5"])), 3, "VALID")
        x = x.reshape(x.shape[0], -1)
        x = jax.nn.relu(jax.nn.relu(x @ params["fc6"]) @ params["fc7"])
        return x @ params["fc8"]

    return network, shapes


def resnet18() -> tuple[Callable, Shapes]:
    """ResNet-18 (He et al., 2016) with its batch normalisations merged into the convolutions."""
    shapes: Shapes = {"conv1": (7, 7, 3, 64), "fc": (512, 1000)}
    blocks, width = [], 64
    for stage in range(4):
        for place in range(2):
            name, out, stride = f"block{stage + 1}{'ab'[place]}", 64 * 2**stage, 2 if stage and not place else 1
            shapes |= {f"{name}_conv1": (3, 3, width, out), f"{name}_conv2": (3, 3, out, out)}
            if stride == 2:
                shapes[f"{name}_down"] = (1, 1, width, out)
            blocks.append((name, stride))
            width = out

    def network(params: Any, images: jax.Array) -> jax.Array:
        x = max_pool(jax.nn.relu(conv(images, params["conv1"], 2)), 3, "SAME")
        for name, stride in blocks:
            inner = conv(jax.nn.relu(conv(x, params[f"{name}_conv1"], stride)), params[f"{name}_conv2"])
            shortcut = conv(x, params[f"{name}_down"], stride) if stride == 2 else x
            x = jax.nn.relu(inner + shortcut)
        return x.mean(axis=(1, 2)) @ params["fc"]

    return network, shapes


def stereo_pair(channels: int) -> tuple[Callable, Shapes]:
    """One network of six 3 x 3 layers without pooling, applied to the left and to the right image as a batch of two."""
    widths = (1, *[channels] * 5, channels)
    shapes: Shapes = {f"conv{i + 1}": (3, 3, widths[i], widths[i + 1]) for i in range(6)}

    def network(params: Any, images: jax.Array) -> jax.Array:
        x = images
        for i in range(6):
            x = jax.nn.relu(conv(x, params[f"conv{i + 1}"]))
        return x

    return network, shapes
