"""Products by look-up: tables of sums of activations, addressed by the bits of the weights.

A table over three activations holds their eight partial sums, T[k] = sum_b k_b x_b. For bit t of the weights, y gains
s_t 2**t T[w0[t] + 2 w1[t] + 4 w2[t]], s = -1 at the sign bit of two's complement and 1 elsewhere. A table is built once
and read for all output channels. With weights of one bit, -1 or 1, eight entries serve four activations: the other
eight sums are theirs with the opposite sign.

Source: the look-up PE of J. Lee et al., UNPU, JSSC 2019.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from nets.bitslice import FLOAT32_LIMIT

GROUP = 3
BINARY_GROUP = 4


@dataclass(frozen=True)
class LookUp:
    """A multiplier of look-up tables, in rules."""


def lookup_dot(inputs: jax.Array, weights: jax.Array, weight_bits: int, input_bits: int) -> jax.Array:
    """A matrix product of integers by look-up, exact.

    All addresses of one table entry are one row of a selection matrix, whose elements are the weights s_t 2**t of the
    bits that address it: reading and shifting is a product with that matrix, in float32 where its sums are exact there,
    else in int32.

    Args:
      inputs: integers, or floats that hold integers, shape (M, K).
      weights: integers, or floats that hold integers, in two's complement of `weight_bits`, shape (K, N).
      weight_bits: 1 to 16; with 1 bit the weights are -1 and 0 (`binary_lookup_dot` has -1 and 1).
      input_bits: width of the inputs, 1 to 16.

    Returns:
      int32, shape (M, N).

    Raises:
      ValueError: for other widths, or if int32 may overflow.
    """
    _check(weight_bits, input_bits)
    num_terms = inputs.shape[1]
    dtype = _sum_dtype(num_terms, 2**weight_bits, 2**input_bits)
    tables = _contract(_grouped(inputs, GROUP).astype(dtype), _partial_bits(GROUP).astype(dtype))
    bits = _grouped(weights.astype(jnp.int32).T, GROUP)
    place = 2 ** jnp.arange(GROUP, dtype=jnp.int32)
    selection = jnp.zeros((weights.shape[1], bits.shape[1], 2**GROUP), jnp.int32)
    for t in range(weight_bits):
        address = _contract((bits >> t) & 1, place[None])[..., 0]
        sign = -1 if t == weight_bits - 1 else 1
        selection += sign * 2**t * jax.nn.one_hot(address, 2**GROUP, dtype=jnp.int32)
    return _read(tables, selection.astype(dtype))


def binary_lookup_dot(inputs: jax.Array, weights: jax.Array, input_bits: int) -> jax.Array:
    """A matrix product with weights of one bit, -1 or 1, by look-up, exact.

    Args:
      inputs: integers, or floats that hold integers, shape (M, K).
      weights: -1 or 1, shape (K, N).
      input_bits: width of the inputs, 1 to 16.

    Returns:
      int32, shape (M, N).

    Raises:
      ValueError: for another width, or if int32 may overflow.
    """
    _check(1, input_bits)
    num_terms = inputs.shape[1]
    dtype = _sum_dtype(num_terms, 2, 2**input_bits)
    # Entry k is the sum of +-x with the sign of the last activation positive: half of all sums.
    signs = 2 * _partial_bits(BINARY_GROUP - 1) - 1
    signs = jnp.concatenate([signs, jnp.ones((signs.shape[0], 1), jnp.int32)], axis=1)
    tables = _contract(_grouped(inputs, BINARY_GROUP).astype(dtype), signs.astype(dtype))
    # Activations beyond K are zero: their weights do not matter.
    codes = _grouped((weights > 0).astype(jnp.int32).T, BINARY_GROUP)
    last = codes[..., -1:]
    place = 2 ** jnp.arange(BINARY_GROUP - 1, dtype=jnp.int32)
    address = _contract(jnp.where(last == 1, codes, 1 - codes)[..., :-1], place[None])[..., 0]
    selection = (2 * last - 1) * jax.nn.one_hot(address, 2 ** (BINARY_GROUP - 1), dtype=jnp.int32)
    return _read(tables, selection.astype(dtype))


def _check(weight_bits: int, input_bits: int) -> None:
    if not (1 <= weight_bits <= 16 and 1 <= input_bits <= 16):
        raise ValueError(
            f"expected weights and inputs of 1 to 16 bits, got {weight_bits} and {input_bits}; change the widths"
        )


def _sum_dtype(num_terms: int, weights: int, inputs: int) -> jnp.dtype:
    """float32 while the sum of magnitudes of all that is read stays exact, else int32."""
    magnitude = num_terms * weights * inputs
    if magnitude > 2**31:
        raise ValueError(
            f"expected sums of {num_terms} products to fit int32, got a possible magnitude of {magnitude}; use narrower "
            f"operands"
        )
    return jnp.dtype(jnp.float32 if magnitude < FLOAT32_LIMIT else jnp.int32)


def _grouped(x: jax.Array, size: int) -> jax.Array:
    """(rows, K) as (rows, groups, size), filled up with zeros."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
    return padded.reshape(x.shape[0], -1, size)


def _partial_bits(size: int) -> jax.Array:
    """Bits of all numbers below 2**size, shape (2**size, size)."""
    return (jnp.arange(2**size, dtype=jnp.int32)[:, None] >> jnp.arange(size, dtype=jnp.int32)[None]) & 1


def _contract(groups: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums over the members of each group: (..., size) and (entries, size) to (..., entries)."""
    return lax.dot_general(
        groups, rows, (((2,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=groups.dtype
    )


def _read(tables: jax.Array, selection: jax.Array) -> jax.Array:
    """Sums of the selected entries: (M, groups, entries) and (N, groups, entries) to int32 (M, N)."""
    numbers = (((1, 2), (1, 2)), ((), ()))
    out = lax.dot_general(
        tables, selection, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=tables.dtype
    )
    return out.astype(jnp.int32)
