"""Geometry of sliding windows along one axis: which inputs a tile of outputs and taps meets.

An input lies at ``output * stride + tap * dilation``. All arguments are scalars, or vectors over a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_DIVISIONS = 6


def box_extent(outputs: jax.Array, taps: jax.Array, stride: jax.Array, dilation: jax.Array) -> jax.Array:
    """Inputs from the first to the last that a tile of outputs x taps meets, those in gaps included."""
    return (outputs - 1.0) * stride + (taps - 1.0) * dilation + 1.0


def tiles_along(bound: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tiles that a loop is cut into, the last one perhaps smaller, and their slope in `tile`.

    ceil(bound / tile), linear between whole tiles; at a whole one the slope is that towards the larger tile.
    """
    whole = jnp.floor(tile)
    number = jnp.ceil(bound / whole)
    slope = jnp.ceil(bound / (whole + 1.0)) - number
    return number + (tile - whole) * slope, slope


class Diagonals(NamedTuple):
    """Which sums ``i * a + j * b`` are the same: those whose pairs (i, j) differ by a multiple of (b, -a) / gcd(a, b).

    Attributes:
      apart_i, apart_j: b / gcd(a, b) and a / gcd(a, b).
      found: 1 where a and b are integers; between, blended smoothly towards 0, as if no sums were the same.
      slope_a, slope_b: of `found`.
    """

    apart_i: jax.Array
    apart_j: jax.Array
    found: jax.Array
    slope_a: jax.Array
    slope_b: jax.Array


def diagonals(a: jax.Array, b: jax.Array) -> Diagonals:
    """Of offsets a, b >= 1; found while the smaller term of the ratio a / b is below 21."""
    whole_a, whole_b = jnp.round(a), jnp.round(b)
    larger, divisor = whole_a, whole_b
    remainder = larger
    for _ in range(_DIVISIONS):
        remainder = larger - divisor * jnp.floor(larger / divisor)
        larger, divisor = divisor, jnp.where(remainder > 0.5, remainder, divisor)
    is_found = jnp.where(remainder > 0.5, 0.0, 1.0)
    (of_a, slope_a), (of_b, slope_b) = _wholeness(a - whole_a), _wholeness(b - whole_b)
    return Diagonals(
        whole_b / divisor,
        whole_a / divisor,
        is_found * of_a * of_b,
        is_found * slope_a * of_b,
        is_found * of_a * slope_b,
    )


def distinct_offsets(m: jax.Array, n: jax.Array, shared: Diagonals) -> jax.Array:
    """Distinct sums ``i * a + j * b`` with i < m and j < n: the windows of a fan-out that are not the same.

    Args:
      m, n: how many there are side by side, >= 1.
      shared: the diagonals of their offsets.

    Returns:
      The number of distinct sums, exact for integers, continuous in all arguments.
    """
    return m * n - jnp.maximum(0.0, m - shared.apart_i) * jnp.maximum(0.0, n - shared.apart_j) * shared.found


def touched_extent(
    outputs: jax.Array,
    taps: jax.Array,
    outputs_below: jax.Array,
    taps_below: jax.Array,
    stride: jax.Array,
    dilation: jax.Array,
) -> jax.Array:
    """Inputs of a tile that lie in the boxes of the tiles below it; exact unless stride and dilation both exceed one.

    The boxes slide over the tile by outputs and by taps; first by the smaller step, which joins them to runs.
    """
    a, b = stride * outputs_below, dilation * taps_below
    m, n = outputs / outputs_below, taps / taps_below
    run = slid_extent(
        box_extent(outputs_below, taps_below, stride, dilation), jnp.where(a < b, m, n), jnp.minimum(a, b)
    )
    return slid_extent(run, jnp.where(a < b, n, m), jnp.maximum(a, b))


def slid_extent(extent: jax.Array, number: jax.Array, step: jax.Array) -> jax.Array:
    """Inputs that a run of the given extent covers in a number of positions one step apart."""
    return extent + (number - 1.0) * jnp.minimum(step, extent)


def _wholeness(fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 at an integer and 0 halfway, flat at both; and its slope."""
    rest = 1.0 - 4.0 * fraction * fraction
    return rest * rest, -16.0 * fraction * rest
