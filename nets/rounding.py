"""Rounding to integers: to nearest with a straight-through gradient, and stochastic from a counter-based hash.

Stochastic rounding is unbiased, so a sum of rounded gradients keeps its mean where rounding to nearest would set every
small gradient to zero. Its random words are an integer hash of the element's position and a seed, and only seeds come
from a key: for half a million values on a CPU, words of `jax.random` take 1.7 ms, the hash with the rounding 0.12 ms.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Random fractions keep this many bits of a word: with half a unit added they are exact in float32.
_FRACTION_BITS = 23


@jax.custom_jvp
def nearest(x: jax.Array) -> jax.Array:
    """Nearest integer, ties to even, with the gradient of the identity (straight-through estimator).

    Args:
      x: floats of any shape.

    Returns:
      Integers as floats, shape and dtype of `x`.
    """
    return jnp.round(x)


@nearest.defjvp
def _nearest_jvp(primals, tangents):
    return nearest(*primals), tangents[0]


def float32_or_wider(dtype: Any) -> Any:
    """The dtype to compute in: narrower floats hold neither random fractions nor sums of products exactly."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def random_words(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words of 32 bits: a hash of each element's position, with 64 bits of seed.

    Args:
      seed: uint32 of shape (2,), for example from `jax.random.bits`; equal seeds give equal words.
      shape: shape of the result, of at most 2**32 elements.

    Returns:
      uint32 of shape `shape`.

    Source: the 32-bit integer hash `lowbias32` of C. Wellons, hash-prospector (2018, public domain); here its input is
    the position plus the first word of the seed, and the second word is added between its two multiplications.
    """
    word = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + seed[0]
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D) + seed[1]
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def threefry_words(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words of 32 bits from JAX's own generator, Threefry.

    Args:
      seed: uint32 of shape (2,).
      shape: shape of the result.

    Returns:
      uint32 of shape `shape`.
    """
    return jax.random.bits(jax.random.wrap_key_data(seed, impl="threefry2x32"), shape, jnp.uint32)


#: Sources of random words, by name.
GENERATORS = {"hash": random_words, "jax": threefry_words}


def shift_stochastically(v: jax.Array, words: jax.Array, shift: int) -> jax.Array:
    """`v / 2**shift` of integers rounded stochastically in integers: (v + u) >> shift, u the top bits of a random word.

    Unbiased over all u, exactly; equal, bit for bit, to `stochastic(v / 2**shift, words)`.

    Args:
      v: int32 of any shape, below 2**31 - 2**shift.
      words: uint32, shape of `v`, uniformly distributed: of `random_words` or of `jax.random.bits`.
      shift: bits that are dropped, 1 to 23.

    Returns:
      int32, shape of `v`.

    Raises:
      ValueError: for another shift.
    """
    if not 1 <= shift <= _FRACTION_BITS:
        raise ValueError(f"expected a shift of 1 to {_FRACTION_BITS} bits, got {shift}; shift in two steps")
    return (v + (words >> (32 - shift)).astype(v.dtype)) >> shift


def stochastic(x: jax.Array, words: jax.Array) -> jax.Array:
    """One of the two integers next to `x`, the upper one with a probability equal to the fraction of `x`.

    With u = (word // 2**9 + 1/2) / 2**23, `x` is rounded up where its fraction and u together reach 1. For words of k
    random high bits and `x = v / 2**k` that is bit for bit the integer form `(v + word_k) >> k`, unbiased over all
    words; integers stay as they are. In general the expectation differs from `x` by at most 2**-24.

    Args:
      x: floats of any shape.
      words: uint32, shape of `x`, uniformly distributed.

    Returns:
      Integers as floats, shape and dtype of `x`. Not differentiable: it serves inside backward rules.
    """
    dtype = float32_or_wider(x.dtype)
    unit = (words >> (32 - _FRACTION_BITS)).astype(dtype)
    threshold = 1.0 - (unit + 0.5) * 2.0**-_FRACTION_BITS
    below = jnp.floor(x)
    return below + ((x - below).astype(dtype) > threshold).astype(x.dtype)
