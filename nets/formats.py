"""Number formats by name beside fixed point: floats of 16 and 8 bits, blocks with a shared exponent, signs.

The exponents of a float with fewer than 8 bits for them are shifted so that its largest number lies at the operand's
range (or, for errors, at the range that follows their overflow): what a chip does by scaling a tensor by a power of
two. A block shares the exponent of its peak. Weights of one bit are their signs, times one power of two.

Source: FP8 as in P. Micikevicius et al., FP8 Formats for Deep Learning, 2022 (e4m3 without infinities); shared exponents
of 8 bits as in the OCP Microscaling specification 1.0, with blocks of 32; signs scaled by the mean magnitude as in M.
Rastegari et al., XNOR-Net, 2016 (there by any number, here by the nearest power of two).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from nets import fixed_point, rounding

_EXPONENT_BITS = 8


@dataclass(frozen=True)
class FloatFormat:
    """A binary float with a sign and subnormal numbers.

    Attributes:
      exponent_bits, mantissa_bits: stored bits of each.
      min_exponent: of normal numbers.
      largest: largest finite number; beyond it the format saturates.
    """

    exponent_bits: int
    mantissa_bits: int
    min_exponent: int
    largest: float

    @property
    def width(self) -> float:
        """Bits per value."""
        return 1 + self.exponent_bits + self.mantissa_bits


@dataclass(frozen=True)
class BlockFormat:
    """Signed integers that share a power of two with their neighbours in memory.

    Attributes:
      bits: width of an integer, 2 to 8.
      size: values that share an exponent of 8 bits.
    """

    bits: int
    size: int = 32

    @property
    def width(self) -> float:
        """Bits per value, its share of the exponent included."""
        return self.bits + _EXPONENT_BITS / self.size


@dataclass(frozen=True)
class BinaryFormat:
    """One bit: -1 or 1, times a power of two near the mean magnitude of the array. For weights only."""

    @property
    def width(self) -> float:
        """Bits per value."""
        return 1


Format = FloatFormat | BlockFormat | BinaryFormat

FORMATS: Mapping[str, Format] = {
    "fp16": FloatFormat(5, 10, -14, 65504.0),
    "bf16": FloatFormat(8, 7, -126, 255 * 2.0**120),
    "fp8_e4m3": FloatFormat(4, 3, -6, 448.0),
    "fp8_e5m2": FloatFormat(5, 2, -14, 57344.0),
    "block8": BlockFormat(8),
    "block6": BlockFormat(6),
    "block4": BlockFormat(4),
    "binary": BinaryFormat(),
}


def find_format(name: str) -> Format:
    """A format by its name.

    Args:
      name: a key of `FORMATS`.

    Returns:
      The format.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in FORMATS:
        raise ValueError(f"expected a format among {', '.join(FORMATS)}, got {name!r}; or give a width in bits")
    return FORMATS[name]


def round_to_float(x: jax.Array, float_format: FloatFormat, words: jax.Array | None = None) -> jax.Array:
    """Nearest number of a float format, ties to even, saturated at its largest.

    Args:
      x: floats of any shape, float32 or wider.
      float_format: the format.
      words: random words, uint32 of the shape of `x`, for stochastic rounding; None rounds to nearest.

    Returns:
      Shape and dtype of `x`. Not differentiable.
    """
    _, exponent = jnp.frexp(x)
    # A step below 2**-126 would be no normal float32: bfloat16 below 2**-119 becomes multiples of that.
    least = max(float_format.min_exponent - float_format.mantissa_bits, -126)
    exponent = jnp.maximum(exponent - 1 - float_format.mantissa_bits, least).astype(x.dtype)
    scaled = x * fixed_point.power_of_two(-exponent)
    levels = jnp.round(scaled) if words is None else rounding.stochastic(scaled, words)
    return jnp.clip(levels * fixed_point.power_of_two(exponent), -float_format.largest, float_format.largest)


def round_to_block(x: jax.Array, block_format: BlockFormat, words: jax.Array | None = None) -> jax.Array:
    """Nearest multiples of each block's step, the least power of two at which its peak does not saturate.

    The last block of an array may be shorter.

    Args:
      x: floats of any shape, float32 or wider.
      block_format: the format.
      words: as for `round_to_float`.

    Returns:
      Shape and dtype of `x`. Not differentiable.
    """
    limit = 2.0 ** (block_format.bits - 1) - 1.0

    def blocks(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1)
        return jnp.pad(flat, (0, -flat.size % block_format.size)).reshape(-1, block_format.size)

    mantissa, exponent = jnp.frexp(jnp.max(jnp.abs(blocks(x)), axis=1, keepdims=True) / limit)
    # A power of two itself has the mantissa 1/2. Steps and their reciprocals stay normal floats.
    exponent = jnp.clip(exponent - (mantissa == 0.5).astype(exponent.dtype), -120, 120).astype(x.dtype)
    scaled = blocks(x) * fixed_point.power_of_two(-exponent)
    levels = jnp.round(scaled) if words is None else rounding.stochastic(scaled, blocks(words))
    rounded = jnp.clip(levels, -limit, limit) * fixed_point.power_of_two(exponent)
    return rounded.reshape(-1)[: x.size].reshape(x.shape)


def round_to_sign(x: jax.Array) -> jax.Array:
    """Signs of values, zero counted as positive, times the power of two nearest the mean magnitude on a logarithmic scale.

    Args:
      x: floats of any shape, float32 or wider.

    Returns:
      Shape and dtype of `x`. Not differentiable.
    """
    exponent = jnp.clip(jnp.round(jnp.log2(jnp.mean(jnp.abs(x)))), -120, 120)
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype) * fixed_point.power_of_two(exponent)


def quantise(x: jax.Array, top: jax.Array, number_format: Format, words: jax.Array | None = None) -> jax.Array:
    """Nearest number of a format.

    The gradient is that of the identity where a float does not saturate, within the range for signs, and everywhere for
    blocks; `top` has none.

    Args:
      x: floats of any shape, float32 or wider.
      top: range of the values, > 0, shape (): floats of fewer than 8 exponent bits are shifted by a power of two so
        that it lies at the upper end of theirs; blocks have their own.
      number_format: the format.
      words: as for `round_to_float`; signs are not rounded stochastically.

    Returns:
      Shape and dtype of `x`.
    """
    top = jax.lax.stop_gradient(top.astype(x.dtype))
    if isinstance(number_format, BlockFormat):
        return _straight_through(x, round_to_block(x, number_format, words), jnp.ones_like(x, bool))
    if isinstance(number_format, BinaryFormat):
        return _straight_through(x, round_to_sign(x), jnp.abs(x) <= top)
    # The range, rounded up to a power of two, meets the power of two within the format's largest binade.
    _, range_exponent = jnp.frexp(top)
    shift = (range_exponent - math.frexp(number_format.largest)[1] + 1).astype(x.dtype)
    if number_format.exponent_bits >= 8:
        # As many exponents as float32 has: a shift gains nothing, and would leave its range.
        shift = jnp.zeros_like(shift)
    scale, largest = fixed_point.power_of_two(shift), number_format.largest
    scaled = x * fixed_point.power_of_two(-shift)
    return _straight_through(x, round_to_float(scaled, number_format, words) * scale, jnp.abs(scaled) <= largest)


@jax.custom_vjp
def _straight_through(x: jax.Array, rounded: jax.Array, inside: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `x` where `inside`."""
    return rounded


def _straight_through_fwd(x, rounded, inside):
    return rounded, inside


def _straight_through_bwd(inside, g):
    return jnp.where(inside, g, jnp.zeros_like(g)), jnp.zeros_like(g), None


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)
