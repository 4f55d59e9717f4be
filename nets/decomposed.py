"""Simulated quantisation taken apart: integer multiply-accumulates and one FP16 multiplication per output.

`sum s_x (x_q - z) s_w w_q = s_x s_w [sum x_q w_q - z sum w_q]`: what stands in brackets is integers, `sum w_q` is known
beforehand where weights are frozen, and the rest is a dequantiser. A frozen batch normalisation y = a x + c goes into
it: a into the factor, c into the bias. Padding is z, not 0, or `sum w_q` would be wrong at borders.

FP16 ends at 65504, which sums of 4 x 4 bits reach from 624 terms on (7 * 15 * 624). The dequantiser therefore converts a
sum in float32, or scales it down by a power of two first.

Source: R. Lu et al., A row-pipelined FXP4/FP16 training accelerator, ISCAS 2024 (abstract); how its sums enter FP16 is
not public, so both ways are offered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

FP16_MAX = 65504.0
CONVERSIONS = ("float32", "prescale")


@dataclass(frozen=True)
class Decomposed:
    """A multiplier of integers with an FP16 dequantiser, in rules.

    Attributes:
      conversion: how sums enter FP16, "float32" or "prescale".
      merge: whether the dequantiser also does what follows the product channel by channel: a bias, a batch
        normalisation with frozen statistics (`nets.merging`). With statistics of the batch nothing is merged: the
        backward pass needs the two batch means of the error and of its product with the normalised input.
    """

    conversion: str = "float32"
    merge: bool = False


def integer_part(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array,
    zero_point: int,
    weights: jax.Array,
    sum_of_weights: jax.Array | None = None,
) -> jax.Array:
    """sum x_q w_q - z sum w_q, in integers.

    Args:
      multiply: a product that is bilinear in (inputs, weights), without padding.
      inputs: x_q, unsigned integers or floats that hold them, padded with z.
      zero_point: z.
      weights: w_q, integers or floats that hold them.
      sum_of_weights: `multiply` of ones and the weights, precomputed where they are frozen; it broadcasts against the
        result.

    Returns:
      The result of `multiply`, integers as long as its dtype holds the sums.
    """
    if sum_of_weights is None:
        sum_of_weights = multiply(jnp.ones_like(inputs), weights)
    return multiply(inputs, weights) - jnp.asarray(zero_point, inputs.dtype) * sum_of_weights


def enter_fp16(sums: jax.Array, conversion: str, largest_sum: float) -> jax.Array:
    """Sums as an FP16 dequantiser reads them.

    Args:
      sums: integers of `integer_part`, of any shape.
      conversion: "float32" takes the sum itself; "prescale" rounds `sum * 2**-p` to FP16, with the least p for which
        `largest_sum` fits.
      largest_sum: largest magnitude of a sum.

    Returns:
      float32, shape of `sums`, in their scale.

    Raises:
      ValueError: for another conversion.
    """
    if conversion not in CONVERSIONS:
        raise ValueError(
            f"expected a conversion among {', '.join(CONVERSIONS)}, got {conversion!r}; choose one of them"
        )
    x = sums.astype(jnp.float32)
    if conversion == "float32":
        return x
    shift = prescale_bits(largest_sum)
    return jnp.ldexp(jnp.ldexp(x, -shift).astype(jnp.float16).astype(jnp.float32), shift)


def dequantise_fp16(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """The FP16 dequantiser: scale * x + bias, one multiplication and one addition per output, each rounded to FP16.

    Args:
      x: sums of `enter_fp16`, possibly times a power of two, of any shape.
      scale: s_x s_w, times a of a merged batch normalisation; rounded to FP16 with a power of two taken out, which
        costs no precision however small it is.
      bias: c, likewise in FP16, or None.

    Returns:
      float16, shape of `x`.
    """
    mantissa, exponent = jnp.frexp(scale.astype(jnp.float32))
    factor = mantissa.astype(jnp.float16).astype(jnp.float32)
    product = jnp.ldexp(x * factor, exponent).astype(jnp.float16)
    return product if bias is None else product + bias.astype(jnp.float16)


def prescale_bits(largest_sum: float) -> int:
    """The least power of two by which sums have to shrink to fit FP16.

    Args:
      largest_sum: their largest magnitude.

    Returns:
      p, at least 0.
    """
    shift = 0
    while largest_sum * 2.0**-shift > FP16_MAX:
        shift += 1
    return shift
