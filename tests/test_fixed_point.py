"""Fixed-point formats: exact values and widths, gradients against their definition, dynamic ranges."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets import fixed_point, rounding

LN2 = math.log(2.0)


def test_step_and_range_by_hand():
    log2_step = jnp.array([-2.4, -2.6, 0.0, -3.0, 5.0])
    log2_range = jnp.array([0.0, 0.0, math.log2(6.4), -4.0, math.log2(127.0) + 5.0])
    step, top = fixed_point.step_and_range(log2_step, log2_range)
    np.testing.assert_array_equal(step, [0.25, 0.125, 1.0, 0.125, 32.0])
    # 6.4 steps are 6; half a step is one step; 127 steps of 32.
    np.testing.assert_array_equal(top, [1.0, 1.0, 6.0, 0.125, 4064.0])


def test_step_and_range_are_straight_through():
    at = jnp.array([-2.4]), jnp.array([0.3])
    step, top = fixed_point.step_and_range(*at)
    for index, value in ((0, step), (1, top)):
        gradients = jax.grad(lambda *a, i=index: jnp.sum(fixed_point.step_and_range(*a)[i]), argnums=(0, 1))(*at)
        np.testing.assert_allclose(gradients[index], LN2 * value, rtol=1e-6)
        np.testing.assert_array_equal(gradients[1 - index], [0.0])


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("exponent", [-20, 0, 9])
def test_num_bits_changes_exactly_at_powers_of_two(signed, exponent):
    widths = np.arange(1, 12)
    largest = 2.0**widths - 1  # most steps that so many digits hold
    limits = np.concatenate([largest, largest + 1])
    expected = np.concatenate([widths, widths + 1]) + signed
    step = jnp.full(limits.shape, float(exponent))
    bits = fixed_point.num_bits(step, jnp.log2(jnp.array(limits)) + step, jnp.full(limits.shape, float(signed)))
    np.testing.assert_array_equal(bits, expected)


def test_num_bits_of_formats_wider_than_the_significand_is_float32_without_gradient():
    def bits(log2_range):
        return jnp.sum(fixed_point.num_bits(jnp.zeros(2), log2_range, jnp.ones(2)))

    log2_range = jnp.array([22.5, 23.5])
    assert bits(log2_range) == 24 + fixed_point.FLOAT_BITS
    slope = jax.grad(bits)(log2_range)
    np.testing.assert_allclose(slope, [1.0, 0.0], atol=1e-6)


def test_num_bits_gradient_is_that_of_the_real_valued_width():
    def real_valued(log2_step, log2_range):
        return jnp.log2(2.0**log2_range / 2.0**log2_step + 1.0)

    at = jnp.float32(-4.3), jnp.float32(-2.1)
    expected = jax.grad(real_valued, argnums=(0, 1))(*at)
    actual = jax.grad(fixed_point.num_bits, argnums=(0, 1))(*at, jnp.float32(1.0))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_num_error_bits():
    bits = jnp.array([0.3, 2.0, 7.01, 24.0, 24.5])
    np.testing.assert_array_equal(fixed_point.num_error_bits(bits), [2.0, 2.0, 8.0, 24.0, 32.0])
    slope = jax.grad(lambda b: jnp.sum(fixed_point.num_error_bits(b)))(bits)
    np.testing.assert_array_equal(slope, [1.0, 1.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (16383,), (16385,), (5, 4000)])
def test_quantise_equals_numpy_integers_eager_jitted_and_batched(signed, shape):
    x = 3.0 * jax.random.normal(jax.random.key(1), shape)
    step, top = jnp.float32(0.25), jnp.float32(7 * 0.25)
    levels = np.clip(np.round(np.asarray(x, np.float64) / 0.25).astype(int), -7 if signed else 0, 7)
    quantise = lambda x: fixed_point.quantise(x, step, top, signed)  # noqa: E731
    for form in (quantise, jax.jit(quantise), jax.vmap(quantise)):
        np.testing.assert_array_equal(form(x), levels * 0.25)


@pytest.mark.parametrize("signed", [True, False])
def test_quantise_gradients_are_those_of_their_definition(signed):
    x = 3.0 * jax.random.normal(jax.random.key(2), (200,))
    weight = jax.random.normal(jax.random.key(3), (200,))
    step, top = jnp.float32(0.5), jnp.float32(1.5)
    q = np.asarray(fixed_point.quantise(x, step, top, signed))
    above, below = x > 1.5, x < (-1.5 if signed else 0.0)
    inside = ~above & ~below
    sign = np.where(above, 1.0, np.where(below & signed, -1.0, 0.0))

    def total(x, step, top):
        return jnp.sum(weight * fixed_point.quantise(x, step, top, signed))

    d_x, d_step, d_top = jax.grad(total, argnums=(0, 1, 2))(x, step, top)
    np.testing.assert_array_equal(d_x, np.where(inside, weight, 0.0))
    np.testing.assert_allclose(d_step, np.sum(np.where(inside, weight * (q - x) / 0.5, 0.0)), rtol=1e-5)
    np.testing.assert_allclose(d_top, np.sum(weight * sign), rtol=1e-5)


def test_quantise_gradient_of_the_range_is_the_true_derivative(x64):
    # Of saturated numbers the result is the range itself; of others it does not change with the range.
    x = jnp.array([-9.0, -2.0, 0.6, 1.9, 7.0, 8.0])
    step = jnp.float64(0.5)
    at = lambda top: jnp.sum(fixed_point.quantise(x, step, top, True) ** 2)  # noqa: E731
    difference = (at(jnp.float64(3.5)) - at(jnp.float64(2.5))) / 1.0  # of a quadratic: exact
    assert jax.grad(at)(jnp.float64(3.0)) == difference


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("stochastic", [True, False])
def test_quantise_error_equals_twos_complement_integers(bits, stochastic):
    log2_range = -3
    step, limit = fixed_point.error_step_and_limit(jnp.float32(log2_range), jnp.float32(bits))
    assert step == 2.0 ** (log2_range - bits + 1) and limit == 2 ** (bits - 1)
    # Multiples of 2**-6 step, so that six random bits decide, from twice below to twice above the range.
    v = np.arange(-(2 ** (bits + 6)), 2 ** (bits + 6), dtype=np.int64)
    words = np.asarray(jax.random.bits(jax.random.key(0), v.shape, jnp.uint32)) >> 26
    rounded = (v + words) >> 6 if stochastic else np.round(v / 64).astype(int)
    expected = np.clip(rounded, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * float(step)
    x = jnp.array(v / 64 * float(step), jnp.float32)
    np.testing.assert_array_equal(
        fixed_point.quantise_error(x, step, limit, jnp.array(words << 26) if stochastic else None), expected
    )


def test_error_format_of_float_width_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (1000,)) * 10.0 ** jnp.linspace(-6.0, 6.0, 1000)
    step, limit = fixed_point.error_step_and_limit(jnp.float32(0.0), jnp.float32(fixed_point.FLOAT_BITS))
    words = rounding.random_words(jnp.array([1, 2], jnp.uint32), x.shape)
    np.testing.assert_array_equal(fixed_point.quantise_error(x, step, limit, words), x)


def test_range_moves_by_the_rule_of_two_rates():
    overflow = jnp.array([0.02, 0.0, 0.0, 0.01])
    below = jnp.array([0.05, 0.005, 0.03, 0.02])
    moved = fixed_point.updated_log2_range(jnp.full(4, -5.0), overflow, below, max_overflow=0.01)
    # Too many overflow: more; few even at half the range: less; few, but not at half the range: stay; at it: stay.
    np.testing.assert_array_equal(moved, [-4.0, -6.0, -5.0, -5.0])


def test_range_settles_where_the_overflow_rate_is_permitted():
    x = np.abs(np.random.default_rng(0).normal(size=100_000)) * 2.0**-9
    log2_range = jnp.float32(0.0)
    for _ in range(30):
        rates = [jnp.float32(np.mean(x >= 2.0 ** (float(log2_range) - less))) for less in (0, 1)]
        log2_range = fixed_point.updated_log2_range(log2_range, *rates, max_overflow=0.01)
    # |N(0, 1)| exceeds 2 with probability 0.046, 4 with 0.00006.
    assert log2_range == -9 + 2


def test_range_of_errors_that_are_all_zero_stays_a_normal_float():
    log2_range = jnp.float32(0.0)
    for _ in range(200):
        log2_range = fixed_point.updated_log2_range(log2_range, jnp.float32(0.0), jnp.float32(0.0), max_overflow=0.01)
    assert log2_range == -fixed_point.MAX_ERROR_LOG2_RANGE
    for bits in (24.0, 32.0):
        step, limit = fixed_point.error_step_and_limit(log2_range, jnp.float32(bits))
        assert fixed_point.quantise_error(jnp.float32(0.0), step, limit, None) == 0.0


def test_dtype_follows_the_input():
    step, top = jnp.float32(0.25), jnp.float32(1.0)
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jnp.linspace(-2.0, 2.0, 9).astype(dtype)
        chex.assert_type(fixed_point.quantise(x, step, top, True), dtype)
        chex.assert_type(jax.grad(lambda x: jnp.sum(fixed_point.quantise(x, step, top, True)))(x), dtype)


def test_powers_of_two_are_exact():
    exponents = np.arange(-126, 128)
    np.testing.assert_array_equal(fixed_point.power_of_two(jnp.array(exponents, jnp.float32)), 2.0**exponents)
