"""Direct feedback alignment: the error of a layer is a fixed random projection of the error at the output.

No transposed weights are read, and no layer waits for another one's error: what a layer passes back is dropped, and its
predecessor gets B e instead, with e the error of the last product and B random and never trained.

Source: A. Nøkland, Direct Feedback Alignment Provides Learning in Deep Neural Networks, NeurIPS 2016.
"""

import math
import zlib
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from nets import rounding
from nets.jaxpr import Product, Program


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def direct_feedback(seed: int, x: jax.Array, error_bus: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Its arguments; the backward pass gives `x` the projection of the error that arrives at `error_bus`.

    Add the second result, which is zero, to the output of the network: then its error is that of the output, and the
    error that arrives at the first result is dropped.

    Args:
      seed: of the projection.
      x: what a layer hands to the next, shape (batch, ...).
      error_bus: zeros, shape of the output, (batch, ...).

    Returns:
      (x, error_bus).
    """
    return x, error_bus


def _direct_feedback_fwd(seed, x, error_bus):
    # An array without elements carries the shape and dtype of x.
    return (x, error_bus), jnp.zeros((*x.shape, 0), x.dtype)


def _direct_feedback_bwd(seed, like, cotangents):
    error = cotangents[1]
    shape = like.shape[:-1]
    flat = error.reshape(error.shape[0], -1)
    weights = projection(seed, flat.shape[1], math.prod(shape[1:])).astype(error.dtype)
    projected = lax.dot(flat, weights, precision=lax.Precision.HIGHEST)
    return projected.reshape(shape).astype(like.dtype), error


direct_feedback.defvjp(_direct_feedback_fwd, _direct_feedback_bwd)


class ErrorBus:
    """Hands the error of a network's last product to the layers that ask for it, during one evaluation."""

    def __init__(self) -> None:
        self._received: list[jax.Array] = []
        self._last: Product | None = None

    def connect(self, program: Program) -> None:
        """Finds the last product of the program that is evaluated.

        Args:
          program: the program.

        Raises:
          ValueError: if a product lies under `jax.checkpoint`, whose values cannot leave it.
        """
        if any(equation.body for equation in program.equations):
            raise ValueError(
                "expected a network without jax.checkpoint for direct feedback, got one; keep what its backward pass "
                "needs, which is little here"
            )
        self._last = program.products[-1]

    def receive(self, product: Product, x: jax.Array) -> jax.Array:
        """The inputs of a product, whose error will be the projection of the error at the output.

        Args:
          product: the product.
          x: its inputs, shape (batch, ...).

        Returns:
          `x`.

        Raises:
          ValueError: if it does not share its leading axis with the output.
        """
        assert self._last is not None
        zeros = jnp.zeros(self._last.out_shape, self._last.dtype)
        if min(x.ndim, zeros.ndim) < 2 or x.shape[0] != zeros.shape[0]:
            raise ValueError(
                f"expected inputs with the batch axis of the output {zeros.shape} for direct feedback, got {x.shape} "
                f"at {product.name!r}; drop direct_feedback from its rule"
            )
        # The name, not the place, gives the seed: a layer keeps its matrix when another one is added.
        x, zeros = direct_feedback(zlib.crc32(product.name.encode()), x, zeros)
        self._received.append(zeros)
        return x

    def send(self, product: Product, out: jax.Array) -> jax.Array:
        """A product's result as it is; of the last one with all zeros that were handed out added.

        Args:
          product: the product.
          out: its result.

        Returns:
          `out`.
        """
        return sum(self._received, out) if product == self._last else out


def projection(seed: int, num_outputs: int, num_values: int) -> jax.Array:
    """The fixed random matrix B of one layer, computed anew whenever it is used.

    Args:
      seed: equal seeds give equal matrices.
      num_outputs: elements of the output of one example.
      num_values: elements of the layer's activation of one example.

    Returns:
      float32, shape (num_outputs, num_values), uniform in +-1 / sqrt(num_outputs).
    """
    words = rounding.random_words(jnp.array([seed, ~seed & 0xFFFFFFFF], jnp.uint32), (num_outputs, num_values))
    unit = (words >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
    return unit / math.sqrt(num_outputs)
