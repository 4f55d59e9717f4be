"""Look-up tables and decomposed products against plain loops and wide integers, alone and switched on by a rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nets import decomposed, lookup
from nets.decomposed import Decomposed
from nets.lookup import LookUp
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.transform import quantize

KEY = jax.random.key(0)


def integers(shape, low, high, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape)


def unpu(x, w, bits):
    """The look-up PE step by step: tables over three activations, addressed by the bits of three weights."""
    y = np.zeros((x.shape[0], w.shape[1]), np.int64)
    pad = -x.shape[1] % 3
    x, w = np.pad(x, ((0, 0), (0, pad))), np.pad(w, ((0, pad), (0, 0)))
    for m, n in np.ndindex(*y.shape):
        for k in range(0, x.shape[1], 3):
            table = [sum(x[m, k + b] for b in range(3) if entry >> b & 1) for entry in range(8)]
            for t in range(bits):
                address = sum((int(w[k + b, n]) >> t & 1) << b for b in range(3))
                y[m, n] += (-1 if t == bits - 1 else 1) * 2**t * table[address]
    return y


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 16])
def test_look_up_is_the_published_procedure_and_the_product(bits):
    x, w = integers((3, 7), -128, 128), integers((7, 4), -(2 ** (bits - 1)), max(2 ** (bits - 1), 1), seed=1)
    actual = jax.jit(lambda x, w: lookup.lookup_dot(x, w, bits, 8))(jnp.array(x), jnp.array(w))
    np.testing.assert_array_equal(actual, unpu(x, w, bits))
    np.testing.assert_array_equal(actual, x @ w)


def test_look_up_of_all_pairs_and_long_sums():
    x, w = np.arange(-128, 128)[:, None], np.arange(-128, 128)[None, :]
    np.testing.assert_array_equal(lookup.lookup_dot(jnp.array(x), jnp.array(w), 8, 8), x @ w)
    x, w = integers((2, 8192), -128, 128), integers((8192, 2), -128, 128, seed=1)
    x[0], w[:, 0] = -128, -128
    np.testing.assert_array_equal(lookup.lookup_dot(jnp.array(x), jnp.array(w), 8, 8), x @ w)


def test_one_bit_weights_need_eight_entries_for_four_activations():
    x, w = integers((5, 11), -100, 100), 2 * integers((11, 6), 0, 2, seed=1) - 1
    np.testing.assert_array_equal(
        jax.jit(lambda x, w: lookup.binary_lookup_dot(x, w, 8))(jnp.array(x), jnp.array(w)), x @ w
    )


def test_look_up_refuses_what_may_overflow():
    with pytest.raises(ValueError, match="weights and inputs of 1 to 16 bits, got 17 and 8"):
        lookup.lookup_dot(jnp.ones((1, 1)), jnp.ones((1, 1)), 17, 8)
    with pytest.raises(ValueError, match="expected sums of 4 products to fit int32"):
        lookup.lookup_dot(jnp.ones((1, 4)), jnp.ones((4, 1)), 16, 16)


def conv(strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda p, x: lax.conv_general_dilated(
        x, p["layer"]["kernel"], strides, padding, dimension_numbers=numbers, **options
    )


NETWORKS = {
    "dense": (lambda p, x: x @ p["layer"]["kernel"], (7, 3), (4, 7)),
    "weights on the left": (lambda p, x: p["layer"]["kernel"] @ x, (3, 7), (7, 4)),
    "two contracted axes": (lambda p, x: jnp.einsum("nab,abk->nk", x, p["layer"]["kernel"]), (2, 5, 3), (4, 2, 5)),
    "conv": (conv(), (3, 3, 2, 4), (2, 6, 5, 2)),
    "strided": (conv(strides=(2, 1), rhs_dilation=(1, 2)), (3, 2, 2, 4), (2, 6, 7, 2)),
    "transposed": (conv(padding=((2, 1), (1, 2)), lhs_dilation=(2, 2)), (3, 3, 2, 4), (2, 4, 4, 2)),
}


def evaluate(name, multiplier, bits=(5, 6), positive=False):
    fn, kernel_shape, input_shape = NETWORKS[name]
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(1), kernel_shape)}}
    x = jax.random.normal(jax.random.key(2), input_shape)
    x = jnp.abs(x) if positive else x
    rule = LayerRule(*bits, 8, 8, learn=False, multiplier=multiplier)
    precision, state = init_precision(fn, PrecisionRules({"*": rule}), params, x)
    loss = lambda params: jnp.sum(jnp.sin(quantize(fn)(params, precision, state, KEY, x)))  # noqa: E731
    out = jax.jit(lambda params: quantize(fn)(params, precision, state, KEY, x))(params)
    return out, jax.grad(loss)(params), precision


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rule_switches_look_up_on_without_changing_a_bit(name, positive):
    plain, looked_up = (evaluate(name, multiplier, positive=positive)[:2] for multiplier in (None, LookUp()))
    chex.assert_trees_all_equal(plain, looked_up)


@pytest.mark.parametrize("name", ["weights on the left", "conv"])
def test_weights_of_one_bit_are_looked_up_without_changing_a_bit(name):
    plain, looked_up = (evaluate(name, multiplier, bits=("binary", 6)) for multiplier in (None, LookUp()))
    chex.assert_trees_all_equal(plain[:2], looked_up[:2])
    np.testing.assert_array_equal(plain[2].bits(), [[1.0, 6.0, 8.0, 8.0]])


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_decomposed_product_is_the_product_rounded_to_fp16(name, positive):
    """Power-of-two scales lose nothing: the integer part is exact at borders, too, and the result its nearest FP16."""
    plain, rounded = (evaluate(name, multiplier, positive=positive)[0] for multiplier in (None, Decomposed()))
    np.testing.assert_array_equal(rounded, np.float32(np.float16(plain)))


def test_integer_part_with_padding_by_the_zero_point_equals_the_float_convolution():
    x_q, w_q, z = integers((2, 5, 5, 3), 0, 16), integers((3, 3, 3, 4), -7, 8, seed=1), 9
    multiply = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    padded = jnp.array(np.pad(x_q, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=z))
    weights = jnp.array(w_q)
    known = jnp.array(w_q.sum((0, 1, 2)))[None, None, None]
    expected = multiply(jnp.array(np.pad(x_q - z, ((0, 0), (1, 1), (1, 1), (0, 0)))), weights)
    for sums in (None, known):
        np.testing.assert_array_equal(decomposed.integer_part(multiply, padded, z, weights, sums), expected)


def test_dequantiser_converts_sums_beyond_fp16():
    # 4 x 4 bits: 7 * 15 * 623 = 65415 fits FP16, 624 terms do not.
    assert decomposed.prescale_bits(7 * 15 * 623) == 0 and decomposed.prescale_bits(7 * 15 * 624) == 1
    sums = jnp.array([65536, -100_001, 3, 2047])
    scale = jnp.float32(0.001)
    exact = np.float16(np.float64(np.asarray(sums)) * np.float32(np.float16(0.001 * 512)) / 512)
    np.testing.assert_array_equal(decomposed.dequantise_fp16(sums, scale), exact)
    prescaled = decomposed.dequantise_fp16(sums, scale, conversion="prescale", largest_sum=131072.0)
    np.testing.assert_allclose(np.float32(prescaled), np.float32(exact), rtol=2e-3)
    assert np.all(np.isfinite(prescaled)) and not jnp.isfinite(jnp.array(-100_001.0).astype(jnp.float16))
    with pytest.raises(ValueError, match="expected a conversion among float32, prescale, got 'int'"):
        decomposed.dequantise_fp16(sums, scale, conversion="int")


def test_frozen_batch_norm_merges_into_the_dequantiser():
    keys = jax.random.split(KEY, 4)
    scale, bias, mean = (jax.random.normal(k, (3,)) for k in keys[:3])
    variance = jnp.array([0.5, 1.0, 2.0])
    sums = jnp.array(integers((6, 3), -2000, 2000))
    a, c = decomposed.merged_batch_norm(scale, bias, mean, variance)
    merged = decomposed.dequantise_fp16(sums, 0.01 * a[None], c[None])
    scale, bias, mean, variance = (np.asarray(v)[None] for v in (scale, bias, mean, variance))
    normalised = scale * (0.01 * np.asarray(sums, np.float32) - mean) / np.sqrt(variance + 1e-5) + bias
    np.testing.assert_allclose(merged, normalised, rtol=2e-3, atol=2e-2)


def test_rules_that_multipliers_cannot_follow_are_errors():
    with pytest.raises(
        ValueError, match=r"expected integer sums below 2\*\*24 for a decomposed product.*layer 'layer'"
    ):
        evaluate("dense", Decomposed(), bits=(12, 12))
    fn = lambda p, x: jnp.einsum("bij,bjk->bik", x, p["layer"]["kernel"])  # noqa: E731
    rules = PrecisionRules({"*": LayerRule(learn=False, multiplier=LookUp())})
    with pytest.raises(ValueError, match=r"without batch axes for look-up.*rule '\*'"):
        init_precision(fn, rules, {"layer": {"kernel": jnp.ones((2, 5, 3))}}, jnp.ones((2, 4, 5)))
    grouped = conv(feature_group_count=2)
    with pytest.raises(ValueError, match="without groups for look-up"):
        init_precision(grouped, rules, {"layer": {"kernel": jnp.ones((3, 3, 1, 4))}}, jnp.ones((2, 6, 6, 2)))
