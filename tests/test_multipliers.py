"""Look-up tables and decomposed products against plain loops and wide integers, alone and switched on by a rule."""

import functools

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
    direct, prescaled = (
        decomposed.dequantise_fp16(decomposed.enter_fp16(sums, conversion, 131072.0), scale)
        for conversion in decomposed.CONVERSIONS
    )
    np.testing.assert_array_equal(direct, exact)
    np.testing.assert_allclose(np.float32(prescaled), np.float32(exact), rtol=2e-3)
    assert np.all(np.isfinite(prescaled)) and not jnp.isfinite(jnp.array(-100_001.0).astype(jnp.float16))
    with pytest.raises(ValueError, match="expected a conversion among float32, prescale, got 'int'"):
        decomposed.enter_fp16(sums, "int", 1.0)


def convolved(params, x):
    return lax.conv_general_dilated(
        x, params["layer"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalised(params, x, *, of_the_batch=False, checkpointed=False):
    """A convolution with a bias, a minus sign, and a batch normalisation."""
    biased = lambda params, x: 1.0 - (convolved(params, x) + params["layer"]["bias"])  # noqa: E731
    y = (jax.checkpoint(biased) if checkpointed else biased)(params, x)
    norm = params["norm"]
    mean, variance = (
        (jnp.mean(y, (0, 1, 2), keepdims=True), jnp.var(y, (0, 1, 2), keepdims=True))
        if of_the_batch
        else (norm["mean"], norm["var"])
    )
    return (y - mean) * (lax.rsqrt(variance + 1e-5) * norm["scale"]) + norm["bias"]


CHANNELS = (1, 1, 1, 5)
NORMALISED = {
    "layer": {"kernel": integers((3, 3, 4, 5), -30, 30) / 32.0, "bias": np.linspace(-1.0, 1.0, 5).reshape(CHANNELS)},
    "norm": {
        "scale": np.array([1.0, -0.7, 1.3, 0.2, 2.0]).reshape(CHANNELS),
        "bias": np.linspace(0.5, -2.0, 5).reshape(CHANNELS),
        "mean": np.linspace(-0.3, 0.7, 5).reshape(CHANNELS),
        "var": np.array([0.5, 1.0, 2.0, 4.0, 0.1]).reshape(CHANNELS),
    },
}


def evaluate_normalised(multiplier, fn=normalised):
    """Result and gradient of 6-bit operands under a loss that is linear in the result."""
    params, x = jax.tree.map(jnp.float32, NORMALISED), jax.random.normal(KEY, (2, 6, 6, 4))
    rule = LayerRule(6, 6, 8, 8, learn=False, multiplier=multiplier)
    precision, state = init_precision(fn, PrecisionRules({"*": rule}), params, x)

    def loss(params):
        out = quantize(fn)(params, precision, state, KEY, x)
        return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, gradient


@pytest.mark.parametrize("conversion", decomposed.CONVERSIONS)
def test_bias_and_frozen_batch_norm_merge_into_the_dequantiser(conversion):
    """All that is done channel by channel is one multiplication and one addition in FP16; gradients are unrounded."""
    merged, gradient = evaluate_normalised(Decomposed(conversion, merge=True))
    simulated, expected = evaluate_normalised(None)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(merged, simulated, rtol=2e-3, atol=2e-2)
    if conversion == "float32":
        norm, bias = NORMALISED["norm"], NORMALISED["layer"]["bias"]
        a = norm["scale"] / np.sqrt(norm["var"] + 1e-5)
        mantissa, exponent = np.frexp(-a)
        c = np.float16(norm["bias"] + a * (1.0 - bias - norm["mean"]))
        sums, _ = evaluate_normalised(None, convolved)
        product = np.float16(np.ldexp(np.float64(sums) * np.float16(mantissa), exponent))
        np.testing.assert_array_equal(np.float16(merged), product + c)


def test_what_is_merged_within_a_checkpoint_stays_within():
    merged, apart = (
        evaluate_normalised(multiplier, functools.partial(normalised, checkpointed=True))
        for multiplier in (Decomposed(merge=True), None)
    )
    chex.assert_trees_all_close(merged[1], apart[1], rtol=2e-3, atol=1e-1)
    np.testing.assert_allclose(merged[0], apart[0], rtol=2e-3, atol=2e-2)
    assert np.any(merged[0] != apart[0])


def test_statistics_of_the_batch_are_not_merged():
    """Bias and sign are, up to what the mean reads; what comes after it is done in float32."""
    of_the_batch = functools.partial(normalised, of_the_batch=True)
    merged, simulated = (evaluate_normalised(m, of_the_batch)[0] for m in (Decomposed(merge=True), None))
    np.testing.assert_allclose(merged, simulated, rtol=1e-2, atol=1e-2)
    assert np.any(np.float32(np.float16(merged)) != merged)


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
