"""Dynamic fixed point: a format whose point moves with the rate of overflow, and its stochastic variant SDFXP.

A number of N bits with fraction length f stands for integers in [-2**(N - 1), 2**(N - 1)) times 2**-f. A controller
counts overflows over a number of steps and moves f by at most one. It is the rule that `QuantState.updated` applies to
errors, there written for log2 of the range, N - 1 - f; here it stands alone, as a state machine over integers.

SDFXP lets the permitted overflow vary randomly. What varies is not public; both readings are offered: the permitted
*rate* (`random_overflow_rate`), or the permitted overflow *bit*, which shortens the range by one bit at random
(`random_bit`).

Source: M. Courbariaux et al., Training deep neural networks with low precision multiplications, 2014, section 5;
SDFXP reconstructs D. Han et al., HNPU, JSSC 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nets import fixed_point, rounding

POINTS = ("dynamic", "random_bit")


class PointState(NamedTuple):
    """State of the controller of one format, or of several; int32.

    Fields:
      fraction_length: f.
      steps: steps since it was last examined.
      values, overflows, overflows_finer: values counted since then, and how many of them overflow at f and at f + 1.
    """

    fraction_length: jax.Array
    steps: jax.Array
    values: jax.Array
    overflows: jax.Array
    overflows_finer: jax.Array


def init_point(fraction_length: jax.Array) -> PointState:
    """A controller that starts at given fraction lengths.

    Args:
      fraction_length: int32 of any shape.

    Returns:
      Its state, every field of that shape.
    """
    zero = jnp.zeros_like(fraction_length)
    return PointState(fraction_length, zero, zero, zero, zero)


def to_levels(x: jax.Array, fraction_length: jax.Array, num_bits: int, words: jax.Array | None = None) -> jax.Array:
    """Integers of the format: clip(round(x * 2**f), -2**(N - 1), 2**(N - 1) - 1).

    Args:
      x: floats of any shape.
      fraction_length: f, int32 of shape ().
      num_bits: N, 2 to 24.
      words: random words, uint32 of the shape of `x`, for stochastic rounding; None rounds to nearest.

    Returns:
      int32, shape of `x`.

    Raises:
      ValueError: for a width that float32 does not hold exactly.
    """
    if not 2 <= num_bits <= 24:
        raise ValueError(f"expected 2 to 24 bits, got {num_bits}; float32 holds no wider integers")
    scaled = jnp.ldexp(x, fraction_length)
    rounded = jnp.round(scaled) if words is None else rounding.stochastic(scaled, words)
    limit = 2.0 ** (num_bits - 1)
    return jnp.clip(rounded, -limit, limit - 1.0).astype(jnp.int32)


def from_levels(levels: jax.Array, fraction_length: jax.Array) -> jax.Array:
    """Floats that integers of the format stand for.

    Args:
      levels: int32 of any shape.
      fraction_length: f, int32 of shape ().

    Returns:
      float32, shape of `levels`.
    """
    return jnp.ldexp(levels.astype(jnp.float32), -fraction_length)


def count_overflows(x: jax.Array, fraction_length: jax.Array, num_bits: int) -> tuple[jax.Array, jax.Array]:
    """How many values overflow at f, and would at f + 1: magnitudes of 2**(N - 1 - f) and more.

    Args:
      x: floats of any shape.
      fraction_length: f, int32 of shape ().
      num_bits: N.

    Returns:
      Two counts, int32 of shape ().
    """
    magnitude = jnp.ldexp(jnp.abs(x), fraction_length)
    limit = 2.0 ** (num_bits - 1)
    return jnp.sum(magnitude >= limit, dtype=jnp.int32), jnp.sum(2.0 * magnitude >= limit, dtype=jnp.int32)


def step_point(
    state: PointState,
    values: jax.Array,
    overflows: jax.Array,
    overflows_finer: jax.Array,
    max_overflow: jax.Array | float,
    period: int = 1,
) -> PointState:
    """One step of the controller: it counts, and every `period` steps moves the point.

    With overflow rate o and permitted rate r: f - 1 if o(f) > r, else f + 1 if o(f + 1) <= r.

    Args:
      state: before.
      values, overflows, overflows_finer: of this step, int32 of the state's shape (`count_overflows`).
      max_overflow: r, a float or an array of that shape (`random_overflow_rate`).
      period: T, at least 1.

    Returns:
      The state after.

    Raises:
      ValueError: for a period below 1.
    """
    if period < 1:
        raise ValueError(f"expected a period of at least 1 step, got {period}; examine the rate every step with 1")
    steps = state.steps + 1
    counts = state.values + values, state.overflows + overflows, state.overflows_finer + overflows_finer
    permitted = max_overflow * counts[0].astype(jnp.float32)
    coarser = counts[1].astype(jnp.float32) > permitted
    finer = ~coarser & (counts[2].astype(jnp.float32) <= permitted)
    due = steps >= period
    moved = state.fraction_length + finer.astype(jnp.int32) - coarser.astype(jnp.int32)
    kept = (jnp.where(due, jnp.zeros_like(count), count) for count in (steps, *counts))
    return PointState(jnp.where(due & (counts[0] > 0), moved, state.fraction_length), *kept)


def random_overflow_rate(key: jax.Array, shape: tuple[int, ...], least: int = 8, most: int = 16) -> jax.Array:
    """Permitted overflow rates of SDFXP, first reading: r = 2**-u with a random integer u.

    Args:
      key: random key.
      shape: of the result.
      least, most: u is uniform in least..most; the bounds are ours.

    Returns:
      float32 of shape `shape`: `max_overflow` of `step_point` or of `QuantState.updated`.
    """
    return fixed_point.power_of_two(-jax.random.randint(key, shape, least, most + 1).astype(jnp.float32))


def random_bit(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """How many bits shorter a range is at this step in SDFXP, second reading: f = f_safe + delta, delta in {0, 1}.

    Args:
      key: random key.
      shape: of the result.

    Returns:
      Zeros and ones, each as likely, as float32 of shape `shape`.
    """
    return jax.random.bernoulli(key, 0.5, shape).astype(jnp.float32)
