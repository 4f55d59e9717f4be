"""Dynamic fixed point: integers by hand, the controller as a state machine, and both readings of SDFXP in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets import dynamic_fixed_point as dfx
from nets import fixed_point, rounding
from nets.ops import NUM_STATISTICS, STATISTICS
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.transform import quantize

KEY = jax.random.key(0)


def test_levels_by_hand():
    x = jnp.array([0.0, 0.3, -0.3, 1.9, 5.0, -5.0])
    np.testing.assert_array_equal(dfx.to_levels(x, jnp.int32(2), 4), [0, 1, -1, 7, 7, -8])  # quarters in -8..7
    np.testing.assert_array_equal(dfx.from_levels(jnp.array([7, -8]), jnp.int32(2)), [1.75, -2.0])
    np.testing.assert_array_equal(dfx.from_levels(jnp.array([3]), jnp.int32(-4)), [48.0])


@pytest.mark.parametrize("num_bits", [2, 5, 8])
def test_every_level_is_a_fixed_point_at_every_point(num_bits):
    levels = jnp.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1))
    words = rounding.random_words(jnp.array([1, 2], jnp.uint32), levels.shape)
    for f in (-20, -1, 0, 7, 40):
        x = dfx.from_levels(levels, jnp.int32(f))
        for w in (None, words):
            np.testing.assert_array_equal(dfx.to_levels(x, jnp.int32(f), num_bits, w), levels)


def test_it_is_the_format_of_errors():
    """Fraction length N - 1 - log2_range, as the quantised product has it."""
    x = 3.0 * jax.random.normal(KEY, (500,))
    step, limit = fixed_point.error_step_and_limit(jnp.array(1.0), jnp.array(6.0))
    levels = dfx.to_levels(x, jnp.int32(6 - 1 - 1), 6)
    np.testing.assert_array_equal(
        dfx.from_levels(levels, jnp.int32(4)), fixed_point.quantise_error(x, step, limit, None)
    )


def reference_controller(f, batches, num_bits, rate, period):
    """The rule in plain Python: after every `period` batches the rates over all of them move f."""
    track, seen = [], []
    for batch in batches:
        seen += list(np.abs(batch))
        if len(track) % period == period - 1:
            limit = 2.0 ** (num_bits - 1)
            overflow, finer = (np.mean(np.array(seen) * 2.0**g >= limit) for g in (f, f + 1))
            f, seen = (f - 1 if overflow > rate else f + 1 if finer <= rate else f), []
        track.append(f)
    return track


@pytest.mark.parametrize("period", [1, 3])
def test_the_point_follows_the_rate_of_overflow(period):
    rng = np.random.default_rng(0)
    scales = np.repeat([1.0, 30.0, 0.02], 24)
    batches = [np.float32(s * rng.normal(size=64)) for s in scales]

    @jax.jit
    def step(state, batch):
        return dfx.step_point(state, 64, *dfx.count_overflows(batch, state.fraction_length, 8), 0.02, period)

    state, track = dfx.init_point(jnp.int32(0)), []
    for batch in batches:
        state = step(state, jnp.array(batch))
        track.append(int(state.fraction_length))
    assert track == reference_controller(0, batches, 8, 0.02, period)
    assert min(track) < 2 and max(track) >= 8


def test_nothing_counted_moves_nothing_and_periods_are_positive():
    state = dfx.init_point(jnp.array([3, 4], jnp.int32))
    zero = jnp.zeros(2, jnp.int32)
    np.testing.assert_array_equal(dfx.step_point(state, zero, zero, zero, 0.1).fraction_length, [3, 4])
    with pytest.raises(ValueError, match="expected a period of at least 1 step, got 0"):
        dfx.step_point(state, zero, zero, zero, 0.1, period=0)
    with pytest.raises(ValueError, match="expected 2 to 24 bits, got 25"):
        dfx.to_levels(jnp.ones(2), jnp.int32(0), 25)


def test_random_rates_are_powers_of_two_of_uniform_exponents():
    exponents = -np.log2(dfx.random_overflow_rate(KEY, (9000,), 8, 16))
    values, counts = np.unique(exponents, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(8, 17))
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000))


def setup(point):
    fn = lambda params, x: x @ params["layer"]["kernel"]  # noqa: E731
    params, x = {"layer": {"kernel": jnp.eye(6)}}, jnp.ones((8, 6))
    rules = PrecisionRules({"*": LayerRule(32, 32, 4, 4, learn=False, point=point)})
    precision, state = init_precision(fn, rules, params, x)
    return quantize(fn, stochastic=False), params, x, precision, state


def test_random_bit_shortens_the_range_of_errors_at_random_and_counts_at_the_safe_one():
    """Errors of 0.9 in 4 bits: at the safe range of 1 they are 7/8, at half the range they saturate at 7/16."""
    qfn, params, x, precision, state = setup("random_bit")

    def gradients(key):
        return jax.grad(lambda p, s: 0.9 * jnp.sum(qfn(p, precision, s, key, x)), argnums=(0, 1))(params, state)

    weights, states = jax.jit(jax.vmap(gradients))(jax.random.split(KEY, 200))
    errors = np.asarray(weights["layer"]["kernel"])[:, 0, 0] / 8
    assert set(np.unique(errors)) == {7 / 16, 7 / 8}
    assert abs(np.mean(errors == 7 / 8) - 0.5) < 5 * 0.5 / np.sqrt(200)
    np.testing.assert_array_equal(states.probes[:, 0, STATISTICS["overflows"]], 0.0)
    np.testing.assert_array_equal(states.probes[:, 0, STATISTICS["overflows_below"]], 48.0)
    always = setup("dynamic")
    assert (
        jax.grad(lambda p: 0.9 * jnp.sum(always[0](p, always[3], state, KEY, x)))(params)["layer"]["kernel"][0, 0]
        == 7.0
    )


def test_random_rate_moves_each_range_by_its_own_rate():
    *_, state = setup("dynamic")
    row = np.zeros((1, NUM_STATISTICS), np.float32)
    row[0, STATISTICS["values"]] = 1000
    row[0, STATISTICS["overflows"]] = row[0, STATISTICS["overflows_below"]] = 2
    cotangent = dataclasses.replace(state, probes=jnp.array(row))
    moved = state.updated(cotangent, jnp.array([[2.0**-8, 2.0**-10]]))
    # 2 of 1000 are fewer than one in 256 and more than one in 1024.
    np.testing.assert_array_equal(moved.error_log2_range - state.error_log2_range, [[-1.0, 1.0]])


def test_an_unknown_point_names_layer_and_rule():
    with pytest.raises(
        ValueError, match=r"expected a point among dynamic, random_bit, got 'static'.*layer 'layer', rule"
    ):
        setup("static")


@pytest.mark.parametrize("generator", ["hash", "jax"])
def test_both_generators_keep_the_mean_of_errors(generator):
    fn = lambda w, x: x @ w  # noqa: E731
    w, x = jnp.eye(4), jnp.ones((512, 4))
    precision, state = init_precision(fn, PrecisionRules({"*": LayerRule(32, 32, 3, 3)}), w, x)
    qfn = quantize(fn, generator=generator)
    gradient = jax.jit(jax.grad(lambda w: 0.03 * jnp.sum(qfn(w, precision, state, KEY, x))))(w)
    # Steps of 1/4, each taken with probability 0.12, 512 of them summed.
    assert np.max(np.abs(gradient / 512 - 0.03)) < 5 * 0.25 * np.sqrt(0.12 / 512)
    with pytest.raises(ValueError, match="expected a generator among hash, jax, got 'rng'"):
        quantize(fn, generator="rng")
