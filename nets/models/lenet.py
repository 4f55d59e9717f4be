"""LeNet-like convolutional networks for small grey images."""

from collections.abc import Sequence

import jax
from flax import nnx


class LeNet(nnx.Module):
    """Two convolutions, each with ReLU and 2 x 2 max pooling, then fully connected layers; every layer has a bias.

    From 20 x 20 pixels on it is LeNet-5 with ReLU and max pooling (28 x 28: 61 706 parameters):
    conv1 5x5x6 padded, conv2 5x5x16 unpadded, dense1 120, dense2 84, dense3. Below, that would leave no pixels, so
    conv1 3x3x16, conv2 3x3x32, both padded, dense1 64, dense2 (8 x 8: 13 706 parameters).

    Source: LeCun et al., Gradient-based learning applied to document recognition, Proc. IEEE 86(11), 1998.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          input_shape: (height, width, channels), at least 4 x 4 pixels.
          num_classes: width of the logits.
          rngs: random streams of the initialisation.
        """
        height, width, channels = input_shape
        if min(height, width) >= 20:
            self.conv1 = nnx.Conv(channels, 6, (5, 5), padding="SAME", rngs=rngs)
            self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
            features = ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2) * 16
            hidden: tuple[int, ...] = (120, 84)
        else:
            self.conv1 = nnx.Conv(channels, 16, (3, 3), padding="SAME", rngs=rngs)
            self.conv2 = nnx.Conv(16, 32, (3, 3), padding="SAME", rngs=rngs)
            features = (height // 4) * (width // 4) * 32
            hidden = (64,)
        widths = (features, *hidden, num_classes)
        self.num_dense = len(widths) - 1
        for i in range(self.num_dense):
            setattr(self, f"dense{i + 1}", nnx.Linear(widths[i], widths[i + 1], rngs=rngs))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images of shape (batch, height, width, channels) to logits of shape (batch, num_classes)."""
        x = images
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.num_dense):
            x = nnx.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.num_dense}")(x)
