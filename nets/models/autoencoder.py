"""The fully connected autoencoder of MLPerf Tiny's anomaly detection."""

import jax
from flax import nnx


class AutoEncoder(nnx.Module):
    """Features to themselves through 128, 128, 128, 128, 8, 128, 128, 128, 128 units with batch normalisation and ReLU.

    Layers: dense1, norm1, ..., dense9, norm9, dense10. Only dense10 has a bias: the others', which those of MLPerf Tiny
    have, would be cancelled by the shift of the normalisation. It is no classifier, hence not among
    `nets.models.MODELS`: train it on the squared error.

    Source: Banbury et al., MLPerf Tiny benchmark, NeurIPS datasets and benchmarks 2021, and its reference model.
    """

    HIDDEN = (128, 128, 128, 128, 8, 128, 128, 128, 128)

    def __init__(self, num_features: int = 640, *, rngs: nnx.Rngs):
        """Build the layers.

        Args:
          num_features: of one sample; MLPerf Tiny joins five frames of 128 mel bands.
          rngs: random streams of the initialisation.
        """
        width = num_features
        for i, units in enumerate(self.HIDDEN):
            setattr(self, f"dense{i + 1}", nnx.Linear(width, units, use_bias=False, rngs=rngs))
            setattr(self, f"norm{i + 1}", nnx.BatchNorm(units, momentum=0.9, rngs=rngs))
            width = units
        self.dense10 = nnx.Linear(width, num_features, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Features of shape (batch, num_features) to their reconstruction of the same shape."""
        x = features
        for i in range(len(self.HIDDEN)):
            x = nnx.relu(getattr(self, f"norm{i + 1}")(getattr(self, f"dense{i + 1}")(x)))
        return self.dense10(x)
