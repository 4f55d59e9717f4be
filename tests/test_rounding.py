"""Rounding: straight-through gradient, exhaustive unbiasedness, and the hash that random words come from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets import rounding

SEED = jnp.array([123, 456], jnp.uint32)


def reference_words(seed, size):
    """The hash in numpy integers of 64 bits, reduced modulo 2**32 after every operation."""
    mask = np.uint64(0xFFFFFFFF)
    word = (np.arange(size, dtype=np.uint64) + np.uint64(seed[0])) & mask
    word = ((word ^ (word >> np.uint64(16))) * np.uint64(0x7FEB352D) + np.uint64(seed[1])) & mask
    word = ((word ^ (word >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
    return (word ^ (word >> np.uint64(16))).astype(np.uint32)


def test_nearest_rounds_ties_to_even_with_the_gradient_of_the_identity():
    x = jnp.array([-1.5, -0.4, 0.5, 1.5, 2.6])
    np.testing.assert_array_equal(rounding.nearest(x), [-2.0, 0.0, 0.0, 2.0, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(rounding.nearest(x) * x**0))(x), jnp.ones(5))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_stochastic_is_the_integer_form_and_unbiased_over_all_words(k):
    words = np.arange(2**k, dtype=np.uint32)
    values = np.arange(-3 * 2**k, 3 * 2**k + 1)
    rounded = jax.vmap(lambda w: rounding.stochastic(jnp.array(values / 2**k), jnp.full(values.shape, w)))(
        jnp.array(words << (32 - k))
    )
    np.testing.assert_array_equal(rounded, (values[None, :] + words[:, None].astype(np.int64)) >> k)
    np.testing.assert_array_equal(np.mean(np.asarray(rounded), axis=0), values / 2**k)


def test_stochastic_leaves_integers_alone():
    integers = jnp.array([-128.0, -1.0, 0.0, 1.0, 127.0, 2.0**24, -(2.0**30)])
    for word in (0, 1, 2**31, 2**32 - 1):
        words = jnp.full(integers.shape, word, jnp.uint32)
        np.testing.assert_array_equal(rounding.stochastic(integers, words), integers)


@pytest.mark.parametrize("x", [1e-3, -1e-3, 0.3, 100.7, -100.7])
def test_stochastic_keeps_the_mean_of_small_and_large_numbers(x):
    words = jnp.arange(2**16, dtype=jnp.uint32) << 16
    rounded = rounding.stochastic(jnp.full(words.shape, x), words)
    assert set(np.unique(rounded)) <= {np.floor(x), np.ceil(x)}
    # The words are 2**-16 apart, and x itself is a float32.
    assert abs(np.mean(np.asarray(rounded, np.float64)) - np.float32(x)) <= 2.0**-16


@pytest.mark.parametrize("size", [1, 3, 16383, 16385, 20000])
def test_words_agree_with_numpy_jitted_and_batched(size):
    expected = reference_words(SEED, size)
    shape = (size,)
    np.testing.assert_array_equal(rounding.random_words(SEED, shape), expected)
    np.testing.assert_array_equal(jax.jit(lambda s: rounding.random_words(s, shape))(SEED), expected)
    other = SEED + jnp.uint32(7)
    batched = jax.vmap(lambda s: rounding.random_words(s, shape))(jnp.stack([SEED, other]))
    np.testing.assert_array_equal(batched, np.stack([expected, reference_words(other, size)]))


def test_words_look_random():
    seeds = jax.random.bits(jax.random.key(0), (2, 2), jnp.uint32)
    words = np.stack([rounding.random_words(seed, (64, 1024)).ravel() for seed in seeds])
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    centred = bits - 0.5
    limit = 5 * 0.5 / np.sqrt(words.shape[1])  # five standard deviations of the mean of fair bits
    assert np.max(np.abs(centred.mean(axis=1))) < limit
    products = {
        "neighbours": centred[:, 1:] * centred[:, :-1],
        "seeds": centred[0] * centred[1],
        "bits of a word": centred[..., 1:] * centred[..., :-1],
    }
    for name, product in products.items():
        assert np.max(np.abs(product.mean(axis=-2))) < limit / 2, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_follows_the_input(dtype):
    x = jnp.linspace(-3.0, 3.0, 50).astype(dtype)
    rounded = rounding.stochastic(x, rounding.random_words(SEED, x.shape))
    chex.assert_type([rounded, rounding.nearest(x)], dtype)
    assert np.max(np.abs(np.asarray(rounded - x, np.float32))) < 1.0


def test_double_precision(x64):
    x = jnp.linspace(-3.0, 3.0, 50)
    rounded = rounding.stochastic(x, rounding.random_words(SEED, x.shape))
    chex.assert_type(rounded, jnp.float64)
    single = rounding.stochastic(x.astype(jnp.float32), rounding.random_words(SEED, x.shape))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), single)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_shifting_is_unbiased_over_all_words_and_equals_the_float_form(k):
    words = jnp.arange(2**k, dtype=jnp.uint32) << (32 - k)
    values = jnp.arange(-5 * 2**k, 5 * 2**k + 1, dtype=jnp.int32)
    shifted = jax.vmap(lambda w: rounding.shift_stochastically(values, jnp.full(values.shape, w), k))(words)
    np.testing.assert_array_equal(np.sum(shifted, axis=0), values)
    floats = jax.vmap(lambda w: rounding.stochastic(values.astype(jnp.float32) / 2.0**k, jnp.full(values.shape, w)))(
        words
    )
    np.testing.assert_array_equal(shifted, floats)
    with pytest.raises(ValueError, match="expected a shift of 1 to 23 bits, got 24"):
        rounding.shift_stochastically(values, words, 24)


def test_words_of_jax_are_those_of_its_generator():
    key = jax.random.key(7)
    words = rounding.threefry_words(jax.random.key_data(key), (3, 5))
    np.testing.assert_array_equal(words, jax.random.bits(key, (3, 5), jnp.uint32))
