"""The noise budget of backward errors: what their widths cost in gradient noise.

The loss of a step does not depend on the widths of errors, so they have no task gradient. What they do is add noise
to the weight gradients, beside the noise that a batch, being a sample, has anyway. Per product, r = noise energy /
variance of the batch gradient; training on a batch smaller by the factor 1 / (1 + r) would be as noisy. The noise is
measured, one error quantiser at a time, and scaled as 4**-bits to other widths.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from nets.fixed_point import FLOAT_BITS, num_error_bits
from nets.jaxpr import parameter_paths
from nets.precision import Precision, QuantState

#: Permitted mean of log(1 + r): as noisy as a batch smaller by a tenth.
DEFAULT_BUDGET = math.log(1.1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoiseModel:
    """Gradient noise of P products as a function of the widths of errors.

    Attributes:
      energy: squared change of the weight gradient of product l, summed over its elements, by the error quantiser of
        product j in input_grad and in weight_grad, at index (l, j): shape (P, P, 2).
      variance: trace of the covariance of the batch gradient of each product's weights, shape (P,); zero for products
        without a parameter.
      bits: widths of errors at the measurement, shape (P, 2).
    """

    energy: jax.Array
    variance: jax.Array
    bits: jax.Array

    def relative(self, error_bits: jax.Array) -> jax.Array:
        """r of every product: noise energy by all error quantisers over the variance of the batch gradient.

        Noise of independent quantisers adds, and falls as 4**-bits.

        Args:
          error_bits: widths of errors in input_grad and weight_grad, shape (P, 2), differentiable.

        Returns:
          Shape (P,), zero where there is no weight gradient.
        """
        noise = jnp.sum(self.energy * 4.0 ** (self.bits - error_bits)[None], axis=(1, 2))
        has_gradient = self.variance > 0.0
        # The denominator of 1 keeps the unused quotient, and with it the gradient, finite.
        return jnp.where(has_gradient, noise / jnp.where(has_gradient, self.variance, 1.0), 0.0)

    def excess(self, error_bits: jax.Array, budget: float = DEFAULT_BUDGET) -> jax.Array:
        """By how much the widths of errors exceed the noise budget: mean of log(1 + r) - budget, at most 0 inside it.

        Args:
          error_bits: widths of errors in input_grad and weight_grad, shape (P, 2), differentiable.
          budget: permitted mean of log(1 + r) over the products that have a weight gradient.

        Returns:
          Shape ().
        """
        has_gradient = (self.variance > 0.0).astype(self.variance.dtype)
        total = jnp.sum(jnp.log1p(self.relative(error_bits)))
        return total / jnp.maximum(jnp.sum(has_gradient), 1.0) - budget


def no_noise(num_products: int) -> NoiseModel:
    """The model before a first measurement: every width is inside the budget."""
    shape = (num_products, num_products, 2)
    return NoiseModel(jnp.zeros(shape), jnp.ones(num_products), jnp.full((num_products, 2), float(FLOAT_BITS)))


def make_noise_measurement(loss_fn: Callable) -> Callable[..., NoiseModel]:
    """A function that measures gradient noise at present widths on one batch.

    Energy: the gradient with one product's error quantised in input_grad, all others not, against the gradient with
    none. Errors quantised in weight_grad reach no other product, so all of those are measured at once. Variance: a
    quarter of the squared difference of the gradients of two half batches, without quantised errors. That takes P + 4
    gradients, which are one compiled function: a loop on the device would be several times slower on CPUs.

    Args:
      loss_fn: `loss_fn(params, precision, quant_state, key, *batch)`, the mean loss over the batch of a quantised
        function, shape ().

    Returns:
      `measure(params, precision, quant_state, key, *batch) -> NoiseModel`, with arguments as of `loss_fn`; every
      array of `batch` has the batch as its leading axis.

    Raises:
      ValueError: when `measure` is called, if the batch does not split into two halves.
    """

    @jax.jit
    def gradients(
        error_bits: jax.Array, params: Any, precision: Precision, quant_state: QuantState, key: jax.Array, batch: Any
    ) -> list[jax.Array | None]:
        """Weight gradient of every product."""
        with_bits = dataclasses.replace(precision, error_bits=error_bits)
        gradient = jax.grad(loss_fn)(params, with_bits, quant_state, key, *batch)
        leaves = dict(zip(parameter_paths(params), jax.tree.leaves(gradient), strict=True))
        return [None if path is None else leaves[path] for path in precision.param_paths]

    def measure(params: Any, precision: Precision, quant_state: QuantState, key: jax.Array, *batch: Any) -> NoiseModel:
        state = params, precision, quant_state, key
        num_products = len(precision.names)
        bits = num_error_bits(precision.error_bits)
        exact = jnp.full_like(bits, FLOAT_BITS)
        reference = gradients(exact, *state, batch)

        def energy(error_bits: jax.Array) -> jax.Array:
            return _distance(gradients(error_bits, *state, batch), reference)

        input_grad = [energy(exact.at[j, 0].set(bits[j, 0])) for j in range(num_products)]
        weight_grad = energy(exact.at[:, 1].set(bits[:, 1]))
        first, second = (gradients(exact, *state, half) for half in _halves(batch))
        return NoiseModel(
            energy=jnp.stack([jnp.stack(input_grad, axis=1), jnp.diag(weight_grad)], axis=2),
            variance=0.25 * _distance(first, second),
            bits=bits,
        )

    return measure


def _halves(batch: Any) -> list[Any]:
    """Both halves of a batch, each taken twice: the same mean, in the shapes that are compiled already."""
    sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(batch)})
    if len(sizes) != 1 or sizes[0] % 2:
        raise ValueError(f"expected arrays of one even batch size, got {', '.join(map(str, sizes))}; drop a sample")
    return [jax.tree.map(lambda x, half=half: jnp.concatenate([jnp.split(x, 2)[half]] * 2), batch) for half in (0, 1)]


@jax.jit
def _distance(first: list[jax.Array | None], second: list[jax.Array | None]) -> jax.Array:
    """Squared Euclidean distances, shape (P,)."""
    return jnp.stack(
        [
            jnp.zeros(()) if a is None or b is None else jnp.sum((a - b) ** 2).astype(float)
            for a, b in zip(first, second, strict=True)
        ]
    )
