"""Rules, calibration, widths, and the state that follows statistics of the backward pass."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets import fixed_point
from nets.ops import NUM_STATISTICS, STATISTICS
from nets.precision import FLOAT, LayerRule, PrecisionRules, freeze, init_precision, unfreeze

NAMES = ("conv1", "conv2", "dense1")


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "dense1": {"kernel": jax.random.normal(keys[0], (6, 5)), "bias": jnp.zeros(5)},
        "dense2": {"kernel": jax.random.normal(keys[1], (5, 3))},
    }


def mlp(params, x):
    h = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"][None])
    return h @ params["dense2"]["kernel"]


def init(rules=None, params=None, x=None, **options):
    rules = PrecisionRules({"*": LayerRule()} if rules is None else rules)
    x = jax.random.normal(jax.random.key(7), (64, 6)) if x is None else x
    return init_precision(mlp, rules, make_params() if params is None else params, x, **options)


def test_the_first_rule_that_matches_counts():
    first, second = LayerRule(weights=4), LayerRule(weights=6)
    assert PrecisionRules({"conv2": first, "conv*": second}).assign(NAMES) == (second, first, FLOAT)


def test_a_rule_without_a_layer_is_an_error():
    with pytest.raises(ValueError, match=r"got 'fc\*', which is first for none of conv1, conv2, dense1"):
        PrecisionRules({"conv*": LayerRule(), "fc*": LayerRule()}).assign(NAMES)
    with pytest.raises(ValueError, match="got 'conv1'"):
        PrecisionRules({"*": LayerRule(), "conv1": LayerRule()}).assign(NAMES)


@pytest.mark.parametrize("bits", [0, 1, 4.5, 25, 31, 33])
def test_impossible_widths_are_an_error(bits):
    with pytest.raises(
        ValueError, match=r"expected whole widths of 2 to 24 bits, or 32 for float32, got .* in the rule '\*'"
    ):
        PrecisionRules({"*": LayerRule(inputs=bits)}).assign(NAMES)


@pytest.mark.parametrize("width", [2, 3, 8, 16, 24, 32])
def test_calibration_starts_with_the_bits_of_the_rules(width):
    precision, _ = init({"*": LayerRule(width, width, width, width)})
    np.testing.assert_array_equal(precision.bits(), np.full((2, 4), width))
    assert precision.names == ("dense1", "dense2")
    assert precision.param_paths == ("dense1/kernel", "dense2/kernel")


def test_calibration_detects_inputs_without_sign_but_never_parameters():
    params = jax.tree.map(jnp.abs, make_params())
    precision, _ = init(params=params)
    assert precision.signed == ((True, True), (True, False))
    precision, _ = init(params=params, x=jnp.ones((2, 6)))
    assert precision.signed == ((True, False), (True, False))


def test_calibration_finds_the_step_with_the_least_squared_error():
    params = make_params()
    precision, _ = init({"*": LayerRule(weights=4)}, params=params)
    kernel = np.asarray(params["dense1"]["kernel"])
    errors = {}
    for exponent in range(-8, 3):
        q = np.clip(np.round(kernel / 2.0**exponent), -7, 7) * 2.0**exponent
        errors[exponent] = np.sum((q - kernel) ** 2)
    assert precision.log2_step[0, 0] == min(errors, key=errors.get)


def test_a_layer_of_zeros_gets_a_finite_format():
    params = make_params()
    params["dense2"]["kernel"] *= 0.0
    precision, quant_state = init(params=params)
    chex.assert_tree_all_finite((precision, quant_state))
    np.testing.assert_array_equal(precision.bits(), np.full((2, 4), 8.0))


def test_calibration_needs_finite_numbers_and_products():
    with pytest.raises(ValueError, match="got NaN or infinity at 'dense1'"):
        init(x=jnp.full((2, 6), jnp.nan))
    with pytest.raises(ValueError, match="expected a function with a convolution or matrix product, got none"):
        init_precision(lambda p, x: p + x, PrecisionRules({}), jnp.ones(2), jnp.ones(2))


def test_a_loss_gives_errors_their_first_range():
    x = jax.random.normal(jax.random.key(7), (64, 6))
    _, quant_state = init(x=x, loss=lambda out: 0.01 * jnp.sum(out))
    # The gradient of the output is 0.01: below 2**-6 = 0.0156.
    np.testing.assert_array_equal(quant_state.error_log2_range[1], [-6.0, -6.0])
    _, quant_state = init(x=x)
    np.testing.assert_array_equal(quant_state.error_log2_range, np.zeros((2, 2)))


def test_inputs_that_depend_on_no_parameter_are_not_learned():
    precision, _ = init()
    assert precision.learned == ((True, False), (True, True))
    slopes = jax.grad(lambda p: jnp.sum(p.bits()))(precision)
    np.testing.assert_array_equal(slopes.log2_range != 0.0, precision.learned)
    np.testing.assert_array_equal(slopes.log2_range, -slopes.log2_step)
    np.testing.assert_array_equal(slopes.error_bits, np.ones((2, 2)))


def test_rules_that_do_not_learn_have_no_gradient():
    precision, _ = init({"dense1": LayerRule(learn=False), "*": LayerRule()})
    slopes = jax.grad(lambda p: jnp.sum(p.bits()))(precision)
    for leaf in jax.tree.leaves(slopes):
        assert np.all(np.asarray(leaf[0]) == 0.0) and np.all(np.asarray(leaf[1]) != 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_freezing_keeps_the_bits_and_fills_them(seed):
    precision, quant_state = init()
    noise = jax.random.normal(jax.random.key(seed), (3, 2, 2))
    precision = dataclasses.replace(
        precision,
        log2_step=precision.log2_step + noise[0],
        log2_range=precision.log2_range + noise[1],
        error_bits=precision.error_bits + noise[2],
    )
    frozen = freeze(precision)
    np.testing.assert_array_equal(frozen.bits(), precision.bits())
    formats = frozen.formats(quant_state)
    digits = np.asarray(frozen.bits()[:, :2]) - np.asarray(frozen.signed)
    np.testing.assert_array_equal(formats.top, (2.0**digits - 1.0) * np.asarray(formats.step))
    np.testing.assert_array_equal(formats.step, precision.formats(quant_state).step)
    assert all(np.all(np.asarray(x) == 0.0) for x in jax.tree.leaves(jax.grad(lambda p: jnp.sum(p.bits()))(frozen)))
    assert np.any(np.asarray(jax.grad(lambda p: jnp.sum(p.bits()))(unfreeze(frozen)).log2_step) != 0.0)


@pytest.mark.parametrize("limits", [(2, 4), (6, 6), (10, 16), (2, 24)])
def test_clamping_bounds_the_bits_and_keeps_ranges(limits):
    precision, _ = init()
    for seed in range(20):
        noise = 4.0 * jax.random.normal(jax.random.key(seed), (3, 2, 2))
        moved = dataclasses.replace(
            precision,
            log2_step=precision.log2_step + noise[0],
            log2_range=precision.log2_range + noise[1],
            error_bits=precision.error_bits + noise[2],
        )
        clamped = moved.clamped(*limits)
        bits, before = np.asarray(clamped.bits()), np.asarray(moved.bits())
        assert np.all((bits >= limits[0]) & (bits <= limits[1]))
        inside = (before >= limits[0]) & (before <= limits[1])
        np.testing.assert_array_equal(bits[inside], before[inside])
        np.testing.assert_array_equal(clamped.log2_range, moved.log2_range)


def test_clamping_leaves_float32_alone():
    precision, _ = init({"dense2": LayerRule()})
    np.testing.assert_array_equal(precision.clamped(2, 4).bits(), [[32.0] * 4, [4.0] * 4])


def statistics_of(**columns):
    row = np.zeros(NUM_STATISTICS)
    for name, values in columns.items():
        row[STATISTICS[name]] = values
    return row


def test_state_follows_statistics():
    _, quant_state = init()
    cotangent = dataclasses.replace(
        quant_state,
        probes=jnp.array(
            [
                # input_grad overflows too often: more range; weight_grad not even at half: less.
                statistics_of(values=100, nonzeros=[100, 50, 25, 0], overflows=[2, 0], overflows_below=[9, 1]),
                statistics_of(),  # did not run
            ],
            jnp.float32,
        ),
    )
    updated = quant_state.updated(cotangent, max_overflow=0.01)
    np.testing.assert_array_equal(updated.error_log2_range, [[1.0, -1.0], [0.0, 0.0]])
    np.testing.assert_allclose(updated.density, [[1.0, 0.5, 0.25, 0.0], [1.0] * 4])
    chex.assert_trees_all_equal(updated.probes, jnp.zeros_like(updated.probes))
    doubled = jax.tree.map(lambda x: 2.0 * x, cotangent)
    chex.assert_trees_all_equal(quant_state.updated(doubled, max_overflow=0.01), updated)


def test_formats_by_hand():
    precision, quant_state = init()
    precision = dataclasses.replace(
        precision,
        log2_step=jnp.full((2, 2), -3.0),
        log2_range=jnp.full((2, 2), math.log2(15 / 8)),
        error_bits=jnp.full((2, 2), 4.2),
    )
    formats = precision.formats(dataclasses.replace(quant_state, error_log2_range=jnp.full((2, 2), -6.0)))
    expected = {"step": 0.125, "top": 1.875, "error_step": 2.0**-10, "error_limit": 16.0, "error_range": 2.0**-6}
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(formats, name), np.full((2, 2), value))
    # 15 steps: four digits, and a sign where there is one.
    np.testing.assert_array_equal(precision.bits()[:, :2], [[5.0, 5.0], [5.0, 4.0]])


def test_populations_are_batched_by_vmap():
    precision, quant_state = init()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x - 1.0]), precision)
    batched = jax.jit(jax.vmap(lambda p: (p.bits(), p.formats(quant_state))))(stacked)
    for i, one in enumerate([precision, jax.tree.map(lambda x: x - 1.0, precision)]):
        single = one.bits(), one.formats(quant_state)
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], batched), single)


def test_double_precision(x64):
    precision, quant_state = init()
    chex.assert_type(jax.tree.leaves((precision, quant_state)), jnp.float64)
    np.testing.assert_array_equal(precision.bits(), np.full((2, 4), 8.0))
    chex.assert_tree_all_finite(precision.formats(quant_state))
    assert init({"dense1": LayerRule()})[0].bits()[1, 0] == fixed_point.FLOAT_BITS
