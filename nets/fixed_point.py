"""Fixed-point formats with power-of-two steps: learned ones for weights and inputs, dynamic ones for backward errors.

A fixed-point number is an integer times a step. Weights and inputs are rounded to nearest and saturate at a learned
range; their width in bits follows from step and range. Errors (gradients with respect to the outputs of products)
have a given width, stochastic rounding, and a range that follows their overflow rate.

A format wider than the significand of float32 rounds nothing: it stands for float32 itself and counts `FLOAT_BITS`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from nets import rounding

FLOAT_BITS = 32
SIGNIFICAND_BITS = 24
# Where nothing is to be rounded the step lies so many powers of two below the range, and saturation so many above it.
FLOAT_LOG2_BELOW = 60.0
FLOAT_LOG2_ABOVE = 30.0
# Ranges of errors lie between 2**-60 and 2**60.
MAX_ERROR_LOG2_RANGE = 60.0
_LN2 = math.log(2.0)


@jax.custom_jvp
def step_and_range(log2_step: jax.Array, log2_range: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step and largest magnitude of a fixed-point format.

    step = 2**round(log2_step) and range = step * max(1, round(2**log2_range / step)). Both roundings are
    straight-through: d step = step ln 2 d log2_step, d range = range ln 2 d log2_range.

    Args:
      log2_step: real-valued, of any shape.
      log2_range: real-valued, same shape.

    Returns:
      (step, range), same shape and dtype.
    """
    exponent = jnp.round(log2_step)
    step = power_of_two(exponent)
    return step, step * _limit(exponent, log2_range)


@step_and_range.defjvp
def _step_and_range_jvp(primals, tangents):
    step, top = step_and_range(*primals)
    return (step, top), (step * _LN2 * tangents[0], top * _LN2 * tangents[1])


@jax.custom_jvp
def num_bits(log2_step: jax.Array, log2_range: jax.Array, signed: jax.Array) -> jax.Array:
    """Width of a fixed-point format in bits.

    b = ceil(log2(range / step + 1)) + signed, with step and range of `step_and_range`, or `FLOAT_BITS` if that is
    wider than the significand of float32. Straight-through: the gradient is that of log2(2**log2_range / 2**log2_step
    + 1), zero for `FLOAT_BITS`.

    Args:
      log2_step: real-valued, of any shape.
      log2_range: real-valued, same shape.
      signed: 1 with a sign, 0 without, same shape and dtype.

    Returns:
      Integers as floats, same shape and dtype, at least 1 + signed.

    Source: S. Uhlich et al., Mixed Precision DNNs: All you need is a good parametrization, ICLR 2020.
    """
    # The exponent of an integer is its bit length, exactly; a float logarithm is off by one at some powers of two.
    _, length = jnp.frexp(_limit(jnp.round(log2_step), log2_range))
    bits = length.astype(log2_step.dtype) + signed
    return jnp.where(bits > SIGNIFICAND_BITS, jnp.full_like(bits, FLOAT_BITS), bits)


@num_bits.defjvp
def _num_bits_jvp(primals, tangents):
    log2_step, log2_range, _ = primals
    bits = num_bits(*primals)
    slope = jnp.where(bits == FLOAT_BITS, jnp.zeros_like(bits), jax.nn.sigmoid((log2_range - log2_step) * _LN2))
    return bits, slope * (tangents[1] - tangents[0])


def quantise(x: jax.Array, step: jax.Array, top: jax.Array, signed: bool) -> jax.Array:
    """Nearest fixed-point number: q(x) = clip(round(x / step), -top / step if signed else 0, top / step) * step.

    Gradients: dq/dx is 1 where x lies within the range, else 0; dq/dstep is (q(x) - x) / step where x lies within the
    range, else 0; dq/dtop is the sign of x where x lies beyond, else 0. The range of an unsigned format ends at 0
    below, and beyond that all three are 0.

    Args:
      x: floats of any shape.
      step: a power of two, shape ().
      top: the range, a multiple of the step, shape ().
      signed: whether the format has a sign.

    Returns:
      Shape and dtype of `x`.

    Source: S. Uhlich et al., Mixed Precision DNNs: All you need is a good parametrization, ICLR 2020 (their
    parametrisation by step and range).
    """
    return _quantise(signed, x, step.astype(x.dtype), top.astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantise(signed, x, step, top):
    # The reciprocal of a power of two is exact, and a product cheaper than a quotient.
    return jnp.clip(jnp.round(x * (1.0 / step)) * step, -top if signed else 0.0, top)


def _quantise_fwd(signed, x, step, top):
    return _quantise(signed, x, step, top), (x, step, top)


def _quantise_bwd(signed, residuals, g):
    x, step, top = residuals
    above, below, zero = x > top, x < (-top if signed else 0.0), jnp.zeros_like(g)
    inside = ~(above | below)
    d_step = jnp.sum(jnp.where(inside, g * (_quantise(signed, x, step, top) - x), zero)) / step
    d_top = jnp.sum(jnp.where(above, g, jnp.where(below, -g, zero) if signed else zero))
    return jnp.where(inside, g, zero), d_step, d_top


_quantise.defvjp(_quantise_fwd, _quantise_bwd)


@jax.custom_jvp
def num_error_bits(bits: jax.Array) -> jax.Array:
    """Width of an error format in whole bits: ceil(bits), at least 2, `FLOAT_BITS` beyond the significand of float32.

    Straight-through: the gradient is that of the identity (also below 2, so that a width can come back), zero for
    `FLOAT_BITS`.

    Args:
      bits: real-valued, of any shape.

    Returns:
      Integers as floats, same shape and dtype.
    """
    whole = jnp.maximum(jnp.ceil(bits), 2.0)
    return jnp.where(whole > SIGNIFICAND_BITS, jnp.full_like(bits, FLOAT_BITS), whole)


@num_error_bits.defjvp
def _num_error_bits_jvp(primals, tangents):
    bits = num_error_bits(*primals)
    return bits, jnp.where(bits == FLOAT_BITS, jnp.zeros_like(bits), tangents[0])


def error_step_and_limit(log2_range: jax.Array, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step and saturation of the dynamic fixed-point format of errors.

    `bits` bits in two's complement that reach from -2**log2_range to 2**log2_range - step: step = 2**(log2_range -
    bits + 1) and limit = 2**(bits - 1) steps, that is a fraction length of bits - 1 - log2_range. Formats wider than
    the significand of float32 stand for float32: their step is 2**(log2_range - 60), and they saturate at 2**30 steps
    beyond.

    Args:
      log2_range: integers as floats, of any shape.
      bits: integers as floats, same shape, at least 1.

    Returns:
      (step, limit), same shape and dtype.
    """
    is_float = bits > SIGNIFICAND_BITS
    log2_limit = bits - 1.0
    below = jnp.where(is_float, jnp.full_like(bits, FLOAT_LOG2_BELOW), log2_limit)
    above = jnp.where(is_float, jnp.full_like(bits, FLOAT_LOG2_BELOW + FLOAT_LOG2_ABOVE), log2_limit)
    return power_of_two(log2_range - below), power_of_two(above)


def quantise_error(x: jax.Array, step: jax.Array, limit: jax.Array, words: jax.Array | None) -> jax.Array:
    """Error in dynamic fixed point: clip(round(x / step), -limit, limit - 1) * step.

    Args:
      x: floats of any shape.
      step, limit: of `error_step_and_limit`, shape ().
      words: random words, uint32 of the shape of `x`, for stochastic rounding; None rounds to nearest.

    Returns:
      Shape and dtype of `x`. Not differentiable: it serves inside backward rules.
    """
    scaled = x * (1.0 / step)
    level = rounding.nearest(scaled) if words is None else rounding.stochastic(scaled, words)
    return jnp.clip(level, -limit, limit - 1.0) * step


def updated_log2_range(
    log2_range: jax.Array, overflow: jax.Array, overflow_below: jax.Array, max_overflow: float | jax.Array
) -> jax.Array:
    """Next range of a dynamic fixed-point format: it follows the rate of overflow.

    One bit more range (one bit less fraction) if the overflow rate is above `max_overflow`; one bit less if it would
    be at most `max_overflow` at half the range.

    Args:
      log2_range: integers as floats, of any shape.
      overflow: share of values of magnitude 2**log2_range and more, same shape.
      overflow_below: share of values of magnitude 2**(log2_range - 1) and more, same shape.
      max_overflow: permitted overflow rate.

    Returns:
      Integers as floats, same shape, at most `MAX_ERROR_LOG2_RANGE` in magnitude.

    Source: M. Courbariaux et al., Training deep neural networks with low precision multiplications, 2014, section 5
    (their rule halves or doubles the scaling factor by the same two rates).
    """
    grow = (overflow > max_overflow).astype(log2_range.dtype)
    shrink = (overflow_below <= max_overflow).astype(log2_range.dtype)
    # Within these bounds steps and their reciprocals are normal floats, even where all errors of a product are zero.
    return jnp.clip(log2_range + grow - shrink, -MAX_ERROR_LOG2_RANGE, MAX_ERROR_LOG2_RANGE)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent for integers as floats, exactly (`exp2` is not), in their dtype."""
    return jnp.ldexp(jnp.ones_like(exponent), exponent.astype(jnp.int32))


def log2_levels(levels: jax.Array) -> jax.Array:
    """log2 of a number of steps, a little less: a float logarithm may be too large, and cost one more bit."""
    return jnp.log2(levels) - 2.0**-13


def _limit(exponent: jax.Array, log2_range: jax.Array) -> jax.Array:
    """Largest magnitude in steps, an integer, at least 1."""
    return jnp.maximum(jnp.round(jnp.exp2(log2_range - exponent)), 1.0)
