"""Bit slices: exact codes, exact products against wide integers, exact counts of zeros."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nets import bitslice
from nets.bitslice import FLOAT32_LIMIT, STYLES, BitSlices, Slicing, make_slicing, sum_dtype
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.transform import quantize

MATRIX = (((1,), (0,)), ((), ()))


def legal_slicings(widths, signs=(True, False)):
    return [
        make_slicing(num_bits, width, style, has_sign)
        for style in STYLES
        for has_sign in signs
        for num_bits in widths
        for width in range(2 if style == "signed" else 1, min(8, num_bits) + 1)
    ]


def every_value(slicing):
    low, high = (
        (-(2 ** (slicing.num_bits - 1)), 2 ** (slicing.num_bits - 1)) if slicing.has_sign else (0, 2**slicing.num_bits)
    )
    return np.arange(low, high)


def random_values(slicing, shape, seed=0):
    values = every_value(slicing)
    return np.random.default_rng(seed).integers(values[0], values[-1] + 1, shape)


@pytest.mark.parametrize("style", STYLES)
def test_slices_of_every_value_sum_to_it_and_stay_in_range(style):
    for slicing in (s for s in legal_slicings(range(1, 17)) if s.style == style):
        x = every_value(slicing)
        digits = np.asarray(bitslice.slices(jnp.array(x), slicing), np.int64)
        radix = 2 ** (slicing.width if style == "twos_complement" else slicing.width - 1)
        np.testing.assert_array_equal(sum(d * radix**i for i, d in enumerate(digits)), x, err_msg=str(slicing))
        np.testing.assert_array_equal(bitslice.join(jnp.array(digits, jnp.int32), slicing), x)
        np.testing.assert_array_equal(np.max(np.abs(digits), axis=1), slicing.largest_digits, err_msg=str(slicing))
        # What a slice multiplier of this width can hold: lower slices unsigned, or signed ones with a sign of their own.
        lower = digits[:-1]
        assert np.all(np.abs(lower) < radix) and (style == "signed" or np.all(lower >= 0))
        limit = 2 ** (slicing.width - 1) if slicing.has_sign or style == "signed" else 2**slicing.width
        assert np.all((digits[-1] >= -limit) & (digits[-1] < limit)), slicing


def test_codes_by_hand():
    # -3 in 8 bits: 1111 1101 in two's complement, that is -1 * 16 + 13; signed: no radix-8 digit but the lowest, -3.
    three = jnp.array([-3])
    np.testing.assert_array_equal(bitslice.slices(three, make_slicing(8, 4, "twos_complement"))[:, 0], [13, -1])
    np.testing.assert_array_equal(bitslice.slices(three, make_slicing(7, 4, "signed"))[:, 0], [-3, 0])
    # The most negative 7-bit value has the top digit -8, unreduced; 100 = 1 * 64 + 4 * 8 + 4.
    np.testing.assert_array_equal(bitslice.slices(jnp.array([-64]), make_slicing(7, 4, "signed"))[:, 0], [0, -8])
    np.testing.assert_array_equal(bitslice.slices(jnp.array([100]), make_slicing(10, 4, "signed"))[:, 0], [4, 4, 1])


@pytest.mark.parametrize("num_bits", range(1, 11))
def test_products_of_all_pairs_of_values_are_exact(num_bits):
    """One representative of every (style, sign, width), both operands of the same width in bits."""
    for slicing in legal_slicings([num_bits]):
        x = every_value(slicing)
        product = bitslice.sliced_dot_general(jnp.array(x)[:, None], jnp.array(x)[None, :], MATRIX, slicing, slicing)
        np.testing.assert_array_equal(product, np.outer(x, x), err_msg=str(slicing))


@pytest.mark.parametrize(
    "lhs", [(16, 4, "signed"), (13, 4, "signed"), (11, 8, "twos_complement"), (8, 4, "signed", False)]
)
@pytest.mark.parametrize("rhs", [(4, 2, "twos_complement"), (8, 4, "twos_complement"), (8, 3, "signed")])
@pytest.mark.parametrize("num_terms", [1, 1000, 8192])
def test_long_sums_are_exact_in_float32_or_integers(lhs, rhs, num_terms):
    lhs, rhs = make_slicing(*lhs), make_slicing(*rhs)
    a, b = random_values(lhs, (3, num_terms)), random_values(rhs, (num_terms, 2), seed=1)
    # The largest sums that the formats allow are among them.
    a[0], b[:, 0] = every_value(lhs)[0] if lhs.has_sign else every_value(lhs)[-1], every_value(rhs)[0]
    expected = a.astype(np.int64) @ b
    if num_terms * lhs.largest * rhs.largest > 2**31 - 1:
        with pytest.raises(ValueError, match="to fit int32, got a possible magnitude of"):
            bitslice.sliced_dot_general(jnp.array(a), jnp.array(b), MATRIX, lhs, rhs)
    else:
        product = jax.jit(lambda a, b: bitslice.sliced_dot_general(a, b, MATRIX, lhs, rhs))(jnp.array(a), jnp.array(b))
        np.testing.assert_array_equal(product, expected)


def test_double_precision_holds_the_widest_sums(x64):
    slicing = make_slicing(16, 4, "signed")
    a, b = random_values(slicing, (2, 8192)), random_values(slicing, (8192, 2), seed=1)
    a[0], b[:, 0] = -(2**15), -(2**15)
    product = bitslice.sliced_dot_general(jnp.array(a), jnp.array(b), MATRIX, slicing, slicing)
    np.testing.assert_array_equal(product, a @ b)


def test_float32_ends_where_partial_sums_could_round():
    eight = make_slicing(8, 4, "twos_complement")
    # The sum of magnitudes of the slices is largest for -128 + 15: 128 + 15 = 143. 820 * 143**2 < 2**24 <= 821 * 143**2.
    assert sum_dtype(820, eight, eight) == jnp.float32 and sum_dtype(821, eight, eight) == jnp.int32
    assert FLOAT32_LIMIT == 2**24 and np.float32(2**24) + np.float32(1) == np.float32(2**24)


CONVOLUTIONS = {
    "same": {"padding": "SAME"},
    "strided": {"padding": "VALID", "window_strides": (2, 1)},
    "dilated": {"padding": "SAME", "rhs_dilation": (2, 2)},
    "transposed": {"padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 2)},
    "grouped": {"padding": "SAME", "feature_group_count": 2},
    "channels first": {"padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
}


@pytest.mark.parametrize("bits", [(8, 8), (13, 10)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_exact_with_the_gradient_of_the_convolution(name, bits):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | CONVOLUTIONS[name]
    groups = options.get("feature_group_count", 1)
    lhs, rhs = make_slicing(bits[0], 4, "signed"), make_slicing(bits[1], 4, "twos_complement")
    x, w = random_values(lhs, (2, 7, 6, 4)), random_values(rhs, (3, 3, 4 // groups, 6), seed=1)
    if name == "channels first":
        x, w = np.moveaxis(x, -1, 1), np.transpose(w, (3, 2, 0, 1))
    x, w = jnp.array(x, jnp.float32), jnp.array(w, jnp.float32)
    sliced = lambda x, w: bitslice.sliced_conv_general_dilated(x, w, lhs_slicing=lhs, rhs_slicing=rhs, **options)  # noqa: E731
    exact = lambda x, w: lax.conv_general_dilated(x, w, **options)  # noqa: E731
    integers = exact(x.astype(jnp.int32), w.astype(jnp.int32))
    np.testing.assert_array_equal(sliced(x.astype(jnp.int32), w.astype(jnp.int32)), integers)
    np.testing.assert_array_equal(jax.jit(sliced)(x, w), integers.astype(jnp.float32))
    error = jnp.array(np.random.default_rng(2).integers(-3, 4, integers.shape), jnp.float32)
    actual, expected = (jax.vjp(f, x, w)[1](error) for f in (sliced, exact))
    chex.assert_trees_all_equal(actual, expected)


def test_batched_products_and_transformations():
    slicing = make_slicing(8, 4)
    a, b = random_values(slicing, (5, 3, 4)).astype(np.float32), random_values(slicing, (5, 4, 2), 1).astype(np.float32)
    batched = bitslice.sliced_dot_general(jnp.array(a), jnp.array(b), (((2,), (1,)), ((0,), (0,))), slicing, slicing)
    np.testing.assert_array_equal(batched, a @ b)
    one = lambda a, b: bitslice.sliced_dot_general(a, b, MATRIX, slicing, slicing)  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(one)(jnp.array(a), jnp.array(b)), a @ b)
    gradient = jax.vmap(jax.grad(lambda a, b: jnp.sum(one(a, b)), argnums=(0, 1)))(jnp.array(a), jnp.array(b))
    np.testing.assert_array_equal(gradient[0], np.broadcast_to(b.sum(2)[:, None, :], a.shape))


def test_no_product_of_a_slice_pair_is_kept():
    """16 slice pairs of 13-bit numbers compile to two sums, not 16 products: they and the operands are all there is."""
    slicing = make_slicing(13, 4)
    a, b = jnp.zeros((512, 8), jnp.int32), jnp.zeros((8, 512), jnp.int32)
    compiled = jax.jit(lambda a, b: bitslice.sliced_dot_general(a, b, MATRIX, slicing, slicing)).lower(a, b).compile()
    operands, result = 16 * (a.nbytes + b.nbytes), 4 * 512 * 512
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * operands + 3 * result


def counted(x, slicing, lanes):
    """Groups along the last axis with a non-zero slice, in plain loops."""
    digits = np.asarray(bitslice.slices(jnp.array(x), slicing))
    rows = digits.reshape(slicing.num_slices, -1, x.shape[-1])
    return [
        sum(any(row[k : k + lanes]) for row in rows[i] for k in range(0, x.shape[-1], lanes))
        for i in range(slicing.num_slices)
    ]


@pytest.mark.parametrize("lanes", [1, 3, 4, 16])
@pytest.mark.parametrize("style", STYLES)
def test_counts_equal_loops(style, lanes):
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(3, 10)) * 6).astype(int) * (rng.random((3, 10)) < 0.6)
    b = (rng.normal(size=(10, 2)) * 20).astype(int)
    lhs, rhs = make_slicing(8, 4, style), make_slicing(10, 4, style)
    np.testing.assert_array_equal(bitslice.nonzero_slices(jnp.array(a), lhs, lanes), counted(a, lhs, lanes))
    p, q = np.asarray(bitslice.slices(jnp.array(a), lhs)), np.asarray(bitslice.slices(jnp.array(b), rhs))
    expected = np.zeros((lhs.num_slices, rhs.num_slices))
    for i, j in np.ndindex(*expected.shape):
        for m, n in np.ndindex(3, 2):
            for k in range(0, 10, lanes):
                expected[i, j] += np.any(p[i, m, k : k + lanes] * q[j, k : k + lanes, n])
    actual = bitslice.nonzero_pairs(jnp.array(a), jnp.array(b), lhs, rhs, lanes)
    np.testing.assert_array_equal(actual, expected)


def test_surrogate_becomes_the_indicator_and_has_a_gradient():
    slicing = make_slicing(10, 4)
    x = np.arange(-512, 512)
    digits = np.asarray(bitslice.slices(jnp.array(x), slicing))
    above = [np.any(digits[i:] != 0, axis=0) for i in range(3)]
    sharp = bitslice.nonzero_probability(jnp.array(x, jnp.float32), slicing, temperature=1e-3)
    np.testing.assert_allclose(sharp, above, atol=1e-6)
    slope = jax.grad(lambda x: bitslice.nonzero_probability(x, slicing)[1])(jnp.float32(7.5))
    np.testing.assert_allclose(slope, 0.25)  # the middle of a logistic


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 1, "twos_complement"), "expected operands of 1 to 16 bits, got 0"),
        ((17, 4, "signed"), "expected operands of 1 to 16 bits, got 17"),
        ((4, 5, "twos_complement"), "slices of 1 to 4 bits for an operand of 4 bits, got 5"),
        ((16, 9, "twos_complement"), "slices of 1 to 8 bits"),
        ((8, 1, "signed"), "signed slices of 2 to 8 bits"),
        ((8, 4, "booth"), "expected a style among twos_complement, signed, got 'booth'"),
    ],
)
def test_impossible_slicings_are_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        make_slicing(*arguments)


def test_other_errors_say_what_to_do():
    two = Slicing(8, 4, "twos_complement")
    with pytest.raises(ValueError, match="expected signed slices"):
        bitslice.nonzero_probability(jnp.ones(2), two)
    with pytest.raises(ValueError, match="count in smaller batches"):
        jax.eval_shape(
            lambda a, b: bitslice.nonzero_pairs(a, b, two, two), jnp.zeros((2**16, 1)), jnp.zeros((1, 2**16))
        )
    with pytest.raises(ValueError, match="without batch groups"):
        bitslice.sliced_conv_general_dilated(
            jnp.ones((2, 1, 4, 4)), jnp.ones((2, 1, 3, 3)), (1, 1), "SAME", two, two, batch_group_count=2
        )


@pytest.mark.parametrize("bits", [(8, 8), (13, 8)])
@pytest.mark.parametrize("style", STYLES)
def test_a_rule_switches_slices_on_without_changing_a_bit(style, bits):
    """In a network of a convolution and a matrix product, with inputs of both kinds of sign."""

    def fn(params, x):
        kernel, numbers = params["conv"]["kernel"], ("NHWC", "HWIO", "NHWC")
        h = jax.nn.relu(lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers))
        return h.reshape(h.shape[0], -1) @ params["dense"]["kernel"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"conv": (3, 3, 2, 4), "dense": (36, 3)}
    params = {n: {"kernel": jax.random.normal(k, s)} for k, (n, s) in zip(keys[:2], shapes.items(), strict=True)}
    x = jax.random.normal(keys[2], (5, 6, 6, 2))

    def gradients(multiplier):
        rule = LayerRule(*bits, 8, 8, learn=False, multiplier=multiplier)
        precision, state = init_precision(fn, PrecisionRules({"*": rule}), params, x)
        loss = lambda params, state: jnp.sum(jnp.sin(quantize(fn)(params, precision, state, keys[0], x)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, state)

    chex.assert_trees_all_equal(gradients(BitSlices(4, style)), gradients(None))


def test_rules_that_slices_cannot_follow_name_layer_and_rule():
    fn = lambda params, x: x @ params["dense"]["kernel"]  # noqa: E731
    params, x = {"dense": {"kernel": jnp.ones((64, 2))}}, -jnp.ones((3, 64))

    def refused(match, *bits, multiplier, **options):
        rules = PrecisionRules({"d*": LayerRule(*bits, multiplier=multiplier, **options)})
        with pytest.raises(ValueError, match=match + r".*layer 'dense', rule 'd\*'"):
            init_precision(fn, rules, params, x)

    refused("expected given widths", multiplier=BitSlices(4))
    refused("slices of 2 to 3 bits", 3, 3, multiplier=BitSlices(4), learn=False)
    refused("expected operands of 1 to 16 bits, got 20", 20, 8, multiplier=BitSlices(4), learn=False)
    refused("to fit int32, got a possible magnitude of 68719476736", 16, 16, multiplier=BitSlices(4), learn=False)
