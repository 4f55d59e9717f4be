"""Weight-update units: against optax, against integers of a master, and over many steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nets import weight_update
from nets.weight_update import LowBitUpdateState, low_bit_update, low_bit_weights, near_memory, scale_by_optc

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.array([0.3, -0.01])}


def gradients(step):
    keys = jax.random.split(jax.random.key(step), 2)
    return {"a": jax.random.normal(keys[0], (3, 4)), "b": 1e-3 * jax.random.normal(keys[1], (2,))}


def run(transformation, steps=5, params=PARAMS):
    """Updates and states of some steps, jitted."""
    state, history = transformation.init(params), []
    update = jax.jit(transformation.update)
    for step in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(gradients(step), state, params)
            params = optax.apply_updates(params, updates)
        history.append((updates, state, params))
    return history


def test_with_k_one_it_is_adam_and_with_k_zero_momentum():
    for ours, theirs in (
        (scale_by_optc(0.8, 0.99), optax.scale_by_adam(0.8, 0.99)),
        (scale_by_optc(0.8, adam=False), optax.trace(0.8)),
    ):
        for (actual, *_), (expected, *_) in zip(run(ours), run(theirs), strict=True):
            chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_recurrence_by_hand():
    updates, state = scale_by_optc(0.5, 0.75, eps=0.0, bias_correction=False).update(
        jnp.array([2.0]), weight_update.OptcState(jnp.zeros((), jnp.int32), jnp.array([4.0]), jnp.array([1.0]))
    )
    # m = 0.5 * 4 + 0.5 * 2 = 3, v = 0.75 * 1 + 0.25 * 4 = 1.75.
    np.testing.assert_allclose(updates, 3.0 / np.sqrt(1.75), rtol=1e-6)
    np.testing.assert_array_equal([state.first[0], state.second[0]], [3.0, 1.75])
    assert run(scale_by_optc(adam=False))[0][1].second == ()


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 2e-3), (8, 0.4)])
def test_low_bit_state_stays_close_and_small(bits, tolerance):
    (exact, *_), (actual, state, _) = (run(scale_by_optc(state_bits=b), steps=20)[-1] for b in (None, bits))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True):
        assert jnp.max(jnp.abs(x - y)) < tolerance * jnp.max(jnp.abs(y))
    moments = jax.tree.leaves((state.first, state.second))
    assert sum(x.nbytes for x in moments if x.ndim) == 2 * 14 * bits // 8


def test_low_bit_state_never_divides_by_zero():
    """A gradient of 1e-4 beside one of 1 lies below half a step of 8 bits: its second moment is rounded up."""
    transformation = scale_by_optc(state_bits=8)
    state = transformation.init(jnp.zeros(2))
    for _ in range(50):
        updates, state = jax.jit(transformation.update)(jnp.array([1.0, 1e-4]), state)
    assert jnp.all(jnp.abs(updates) < 1.5)


def master_of(state):
    return jax.tree.map(lambda w, r: (np.asarray(w, np.int64) << 8) + np.asarray(r), state.weights, state.residual)


def test_weights_and_residual_are_a_saturated_master_bit_for_bit():
    """Every residual, weights at both ends and in the middle, deltas from nothing to beyond the range."""
    residual, weights = np.meshgrid(np.arange(-128, 128), [-128, -127, -1, 0, 1, 126, 127], indexing="ij")
    for delta in (0, 1, -1, 127, 128, 129, -128, -129, 255, 256, 4000, -4000, 40_000, -40_000, 2**25):
        state = LowBitUpdateState(
            jnp.zeros((), jnp.int32), jnp.array(weights, jnp.int8), jnp.array(residual, jnp.int8),
            jnp.array(-3, jnp.int32), jnp.zeros((), jnp.int32),
        )  # fmt: skip
        params = low_bit_weights(state)
        update = jnp.full(params.shape, delta * 2.0**-11)  # steps of 2**-3 * 2**-8
        difference, new = jax.jit(low_bit_update().update)(update, state, params)
        exact = weights * 256 + residual + delta
        expected = np.clip(exact, -(2**15) - 2**7, 2**15 - 2**7 - 1)
        np.testing.assert_array_equal(master_of(new), expected)
        assert new.saturations == np.sum(exact != expected)
        # The published form, wherever nothing saturates.
        a = residual + delta
        d = (a + 128) >> 8
        inside = exact == expected
        np.testing.assert_array_equal(np.asarray(new.weights)[inside], (weights + d)[inside])
        np.testing.assert_array_equal(np.asarray(new.residual)[inside], (a - (d << 8))[inside])
        np.testing.assert_array_equal(params + difference, low_bit_weights(new))


def test_small_updates_are_not_lost():
    """An update of 1/200 step: 8 bits alone never move, the residual moves them, stochastic rounding on average."""
    params = {"w": jnp.full((512,), 0.5)}
    moves = {}
    for name, transformation in (("residual", low_bit_update()), ("stochastic", low_bit_update(stochastic_seed=0))):
        state = transformation.init(params)
        step = 2.0 ** float(state.exponent["w"])
        weights = low_bit_weights(state)
        for _ in range(400):
            updates, state = jax.jit(transformation.update)({"w": jnp.full((512,), step * 5 / 256)}, state, weights)
            weights = optax.apply_updates(weights, updates)
        chex.assert_trees_all_equal(weights, low_bit_weights(state))
        moves[name] = (weights["w"] - 0.5) / step
    np.testing.assert_array_equal(moves["residual"], np.full(512, 8.0))  # 400 * 5 / 256 = 7.8
    assert abs(float(jnp.mean(moves["stochastic"])) - 400 * 5 / 256) < 5 * np.sqrt(400 * (5 / 256) / 512)
    assert jnp.std(moves["stochastic"]) > 1.0


def test_weights_start_within_half_a_step_and_leave_headroom():
    for headroom in (0, 1, 3):
        state = low_bit_update(headroom).init(PARAMS)
        for weight, start, exponent in zip(
            *map(jax.tree.leaves, (PARAMS, low_bit_weights(state), state.exponent)), strict=True
        ):
            assert jnp.max(jnp.abs(weight - start)) <= 0.5 * 2.0 ** float(exponent)
        assert max(int(jnp.max(jnp.abs(w))) for w in jax.tree.leaves(state.weights)) <= 127 / 2**headroom


def test_near_memory_sends_few_bits_and_stays_unbiased():
    gradient = jnp.array([1.0, 0.011, -0.0031])
    sgd = near_memory(optax.scale(-1.0), gradient_bits=8)
    state, total = sgd.init(gradient), np.zeros(3)
    update = jax.jit(sgd.update)
    for _ in range(2000):
        updates, state = update(gradient, state)
        levels = np.asarray(updates) * 2**6  # the least power of two that holds 1.0 in 127 steps
        np.testing.assert_array_equal(levels, np.round(levels))
        total += np.asarray(updates)
    assert np.max(np.abs(total / 2000 + gradient)) < 5 * 2.0**-6 / np.sqrt(2000)
    nearest = near_memory(optax.scale(-1.0), gradient_bits=8, stochastic_seed=None)
    np.testing.assert_array_equal(nearest.update(gradient, nearest.init(gradient))[0], [-1.0, -0.015625, 0.0])


def test_traffic_by_hand():
    assert weight_update.update_traffic_bits(8, 8) == 16
    assert weight_update.update_traffic_bits(16, 16, (16, 16)) == 96
    assert weight_update.update_traffic_bits(16, 16, (16, 16), near_memory=True) == 16


@pytest.mark.parametrize(
    "transformation",
    [scale_by_optc(state_bits=8), low_bit_update(), low_bit_update(stochastic_seed=1), near_memory(optax.adam(0.1))],
)
def test_chains_jit_and_vmap(transformation):
    chained = optax.chain(optax.clip(1.0), transformation)
    state = chained.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        eager = chained.update(gradients(0), state, PARAMS)
        jitted = jax.jit(chained.update)(gradients(0), state, PARAMS)
        stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
        batched = jax.jit(jax.vmap(chained.update))(stack(gradients(0)), stack(state), stack(PARAMS))
    chex.assert_trees_all_close(eager, jitted, rtol=1e-6)
    chex.assert_trees_all_close(batched, stack(jitted), rtol=1e-6)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="expected a state of 8 or 16 bits, or None, got 4"):
        scale_by_optc(state_bits=4)
    with pytest.raises(ValueError, match="expected 0 to 6 bits of headroom, got 7"):
        low_bit_update(7)
    with pytest.raises(ValueError, match="expected gradients of 8 or 16 bits, got 12"):
        near_memory(optax.sgd(0.1), gradient_bits=12)
    update = low_bit_update()
    with pytest.raises(ValueError, match="expected parameters, got None"):
        update.update(PARAMS, update.init(PARAMS))
