"""The precision controller: its state machine by hand, its metrics against numpy, and a training step under it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nets import fixed_point, laps
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.rules import Laps
from nets.transform import quantize

KEY = jax.random.key(0)


def fn(params, x):
    return jax.nn.relu(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def setup(settings, bits=8, second=None):
    keys = jax.random.split(KEY, 3)
    shapes = {"first": (6, 16), "second": (16, 4)}
    params = {n: {"kernel": jax.random.normal(k, s)} for k, (n, s) in zip(keys[:2], shapes.items(), strict=True)}
    x = jax.random.normal(keys[2], (64, 6))
    rule = LayerRule(bits, bits, bits, bits, learn=False, laps=settings)
    rules = PrecisionRules({"first": rule, "second": second or rule})
    precision, state = init_precision(fn, rules, params, x, loss=lambda out: jnp.mean(out**2))
    return params, x, precision, state


def test_state_machine_by_hand():
    settings = Laps(upper=0.5, lower=0.1, patience=3, min_bits=4, max_bits=12)
    *_, precision, _ = setup(settings, second=LayerRule(8, 8, 8, 8, learn=False))
    state = laps.init_laps(precision)
    track = []
    #        high, between, low x 4 (K = 3), high after two lows, nothing counted, high to the bound
    for metric in [0.6, 0.3, 0.05, 0.05, 0.05, 0.05, 0.05, 0.6, np.nan, 0.6, 0.6]:
        state = laps.moved_bits(state, jnp.full((2, 2), metric), precision)
        track.append(float(state.bits[0, 0]))
        np.testing.assert_array_equal(state.bits[1], [8.0, 8.0])  # no controller
    assert track == [12.0, 12.0, 12.0, 12.0, 8.0, 8.0, 8.0, 12.0, 12.0, 12.0, 12.0]
    for _ in range(20):
        state = laps.moved_bits(state, jnp.zeros((2, 2)), precision)
    assert state.bits[0, 0] == 4.0
    unsure = laps.moved_bits(state, jnp.array([[0.6, 0.0], [0.0, 0.0]]), precision)
    np.testing.assert_array_equal(unsure.bits[0], [8.0, 4.0])  # stages move on their own


def test_start_is_the_next_multiple_of_the_slice():
    *_, precision, _ = setup(Laps(), bits=9)
    np.testing.assert_array_equal(laps.init_laps(precision).bits, np.full((2, 2), 12.0))


@pytest.mark.parametrize("metric", ["error", "top_slice"])
@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_formats_have_the_widths_wanted_and_keep_range_or_step(metric, bits):
    _, _, precision, state = setup(Laps(metric=metric))
    wanted = laps.LapsState(jnp.full((2, 2), float(bits)), jnp.zeros((2, 2), jnp.int32))
    moved = laps.with_bits(precision, wanted)
    np.testing.assert_array_equal(moved.bits(), np.full((2, 4), float(bits)))
    before, after = precision.formats(state), moved.formats(state)
    if metric == "top_slice":
        np.testing.assert_array_equal(after.step, before.step)
    else:
        np.testing.assert_allclose(after.top + after.step, before.top + before.step, rtol=2e-4)


@pytest.mark.parametrize("metric", ["error", "top_slice"])
def test_metrics_are_those_of_the_tensors(metric):
    params, x, precision, state = setup(Laps(metric=metric))
    loss = lambda s: jnp.mean(quantize(fn, stochastic=False)(params, precision, s, None, x) ** 2)  # noqa: E731
    found = laps.metrics(precision, jax.grad(loss)(state))
    formats = precision.formats(state)
    q = lambda x, i, j: fixed_point.quantise(x, formats.step[i, j], formats.top[i, j], precision.signed[i][j])  # noqa: E731
    hidden = jax.nn.relu(q(x, 0, 1) @ q(params["first"]["kernel"], 0, 0))
    out = q(hidden, 1, 1) @ q(params["second"]["kernel"], 1, 0)
    error = 2.0 * out / out.size
    q_error = fixed_point.quantise_error(error, formats.error_step[1, 0], formats.error_limit[1, 0], None)
    limits = formats.top[1, 1] + formats.step[1, 1], formats.error_step[1, 0] * formats.error_limit[1, 0]
    inside, inside_error = (np.abs(a) < limit for a, limit in zip((hidden, error), limits, strict=True))
    # 8 bits in slices of 4: the top slice is not zero from 16 steps on; of the 8 digits without sign likewise.
    expected = {
        "top_slice": [
            np.mean(np.abs(q(hidden, 1, 1) / formats.step[1, 1]) >= 16),
            np.mean(np.abs(q_error / formats.error_step[1, 0]) >= 16),
        ],
        "error": [
            np.sum((q(hidden, 1, 1) - hidden)[inside] ** 2) / np.sum(hidden[inside] ** 2),
            np.sum((q_error - error)[inside_error] ** 2) / np.sum(error[inside_error] ** 2),
        ],
    }
    assert precision.signed[1] == (True, False)
    np.testing.assert_allclose(found[1], expected[metric], rtol=1e-4)


@pytest.mark.parametrize("metric", ["error", "top_slice"])
def test_it_runs_in_a_training_step_and_settles(metric):
    settings = Laps(metric=metric, upper=0.03 if metric == "error" else 0.6, lower=1e-4, patience=5)
    params, x, precision, quant_state = setup(settings, bits=16)
    target = jax.random.normal(jax.random.key(5), (64, 4))
    qfn, optimizer = quantize(fn), optax.sgd(0.02)

    @chex.assert_max_traces(n=1)
    def step(params, precision, quant_state, state, opt_state, key):
        loss = lambda p, s: jnp.mean((qfn(p, precision, s, key, x) - target) ** 2)  # noqa: E731
        value, (gradient, cotangent) = jax.value_and_grad(loss, argnums=(0, 1))(params, quant_state)
        updates, opt_state = optimizer.update(gradient, opt_state)
        state, precision, quant_state = laps.step_laps(state, precision, quant_state, cotangent)
        return optax.apply_updates(params, updates), precision, quant_state, state, opt_state, value

    chex.clear_trace_counter()
    jitted, state, opt_state = jax.jit(step), laps.init_laps(precision), optimizer.init(params)
    values, bits = [], []
    for key in jax.random.split(KEY, 80):
        params, precision, quant_state, state, opt_state, value = jitted(
            params, precision, quant_state, state, opt_state, key
        )
        values.append(float(value))
        bits.append(np.asarray(precision.bits()))
    assert values[-1] < 0.7 * values[0]
    np.testing.assert_array_equal(bits[-1][:, 1:3], state.bits)
    assert np.mean(bits[-1]) < 16.0 and np.all(bits[-1] % 4 == 0)
    if metric == "error":
        np.testing.assert_array_equal(bits[-1], bits[-30])  # hysteresis: it rests


def test_settings_that_make_no_controller_are_errors():
    for settings, match in [
        (Laps(metric="range"), "expected a metric among error, top_slice"),
        (Laps(lower=0.1, upper=0.1), "without hysteresis the width would never rest"),
        (Laps(patience=0), "a patience of at least 1"),
        (Laps(min_bits=6), r"in slices of 4, got \(6, 16\)"),
        (Laps(max_bits=20), r"within 2 to 16 bits"),
    ]:
        with pytest.raises(ValueError, match=match + r".*layer 'first', rule 'first'"):
            setup(settings)
    with pytest.raises(ValueError, match="expected given widths for a precision controller"):
        setup(Laps(), second=dataclasses.replace(LayerRule(), laps=Laps()))
