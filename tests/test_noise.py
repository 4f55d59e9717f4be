"""The noise budget of backward errors: its arithmetic by hand, its measurement against brute force."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets.noise import DEFAULT_BUDGET, NoiseModel, make_noise_measurement, no_noise
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.transform import quantize

KEY = jax.random.key(0)
MODEL = NoiseModel(
    energy=jnp.array([[[0.0, 2.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]),
    variance=jnp.array([10.0, 6.0]),
    bits=jnp.array([[8.0, 6.0], [8.0, 8.0]]),
)


def test_relative_noise_by_hand():
    np.testing.assert_allclose(MODEL.relative(MODEL.bits), [0.6, 0.5], rtol=1e-6)
    # One bit less in weight_grad of product 0 and in input_grad of product 1, one more in weight_grad of product 1.
    bits = MODEL.bits + jnp.array([[0.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(MODEL.relative(bits), [0.2 * 4 + 0.4 * 4, 0.5 / 4], rtol=1e-6)
    excess = (math.log(3.4) + math.log(1.125)) / 2 - math.log(1.1)
    np.testing.assert_allclose(MODEL.excess(bits), excess, rtol=1e-5)
    np.testing.assert_allclose(MODEL.excess(bits, budget=0.0), excess + DEFAULT_BUDGET, rtol=1e-5)


def test_excess_falls_with_every_width_that_matters():
    slopes = np.asarray(jax.grad(MODEL.excess)(MODEL.bits))
    np.testing.assert_array_equal(slopes < 0.0, [[False, True], [True, True]])
    # d mean(log(1 + r)) / d b = -ln 4 * (share of r) / (1 + r) / 2.
    np.testing.assert_allclose(slopes[0, 1], -math.log(4.0) * 0.2 / 1.6 / 2, rtol=1e-5)


def test_products_without_a_weight_gradient_do_not_count():
    without = NoiseModel(
        jnp.zeros((3, 3, 2)).at[:2, :2].set(MODEL.energy), jnp.append(MODEL.variance, 0.0), jnp.full((3, 2), 8.0)
    )
    without = dataclasses.replace(without, bits=without.bits.at[:2].set(MODEL.bits))
    np.testing.assert_allclose(without.excess(without.bits), MODEL.excess(MODEL.bits), rtol=1e-6)
    chex.assert_tree_all_finite(jax.grad(without.excess)(without.bits))
    assert without.relative(without.bits)[2] == 0.0


def test_before_the_first_measurement_every_width_is_inside_the_budget():
    assert no_noise(2).excess(jnp.full((2, 2), 2.0)) == -np.float32(DEFAULT_BUDGET)


@pytest.fixture(scope="module")
def problem():
    """(loss, params, precision, quant_state, batch) of two layers and a product without parameter, errors of 5 bits."""
    keys = jax.random.split(KEY, 4)
    params = {"a": {"kernel": jax.random.normal(keys[0], (8, 6))}, "b": {"kernel": jax.random.normal(keys[1], (6, 3))}}
    batch = jax.random.normal(keys[2], (64, 8)), jax.random.normal(keys[3], (64, 3))
    mixing = jnp.eye(6) + 0.1

    def fn(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ mixing @ params["b"]["kernel"]

    def loss_of(out, y):
        return jnp.mean((out - y) ** 2)

    rules = PrecisionRules({"*": LayerRule(8, 8, 5, 4)})
    precision, quant_state = init_precision(fn, rules, params, batch[0], loss=lambda out: loss_of(out, batch[1]))
    qfn = quantize(fn)

    def loss(params, precision, quant_state, key, x, y):
        return loss_of(qfn(params, precision, quant_state, key, x), y)

    return loss, params, precision, quant_state, batch


@pytest.fixture(scope="module")
def draws(problem):
    """Noise models from 200 keys."""
    loss, params, precision, quant_state, batch = problem
    measure = make_noise_measurement(loss)
    return jax.vmap(lambda key: measure(params, precision, quant_state, key, *batch))(jax.random.split(KEY, 200))


def test_noise_reaches_only_what_lies_before(problem, draws):
    assert problem[2].names == ("a", "a/dot", "b")
    energy = np.mean(np.asarray(draws.energy), axis=0)
    reached = energy > 1e-12
    # input_grad: of product 1 and 2 to product 0; product 1 has no parameter. weight_grad: to the product itself.
    np.testing.assert_array_equal(reached[..., 0], [[False, True, True], [False] * 3, [False] * 3])
    np.testing.assert_array_equal(reached[..., 1], np.diag([True, False, True]))
    np.testing.assert_array_equal(draws.bits[0], [[5.0, 4.0]] * 3)


def test_noise_of_all_quantisers_together_is_the_sum(problem, draws):
    loss, params, precision, quant_state, batch = problem
    exact = dataclasses.replace(precision, error_bits=jnp.full((3, 2), 32.0))

    def gradient(precision, key):
        return jax.grad(loss)(params, precision, quant_state, key, *batch)

    reference = gradient(exact, KEY)
    noisy = jax.jit(jax.vmap(lambda key: gradient(precision, key)))(jax.random.split(jax.random.key(1), 200))
    measured = jax.tree.map(lambda a, b: jnp.mean(jnp.sum((a - b[None]) ** 2, axis=(1, 2))), noisy, reference)
    predicted = np.mean(np.sum(np.asarray(draws.energy), axis=(2, 3)), axis=0)
    np.testing.assert_allclose([measured["a"]["kernel"], measured["b"]["kernel"]], predicted[[0, 2]], rtol=0.15)


def test_noise_falls_with_the_bits(problem, draws):
    loss, params, precision, quant_state, batch = problem
    wider = dataclasses.replace(precision, error_bits=precision.error_bits + 2.0)
    measure = make_noise_measurement(loss)
    models = jax.vmap(lambda key: measure(params, wider, quant_state, key, *batch))(jax.random.split(KEY, 200))
    energy = np.mean(np.asarray(models.energy), axis=0)
    expected = np.mean(np.asarray(draws.energy), axis=0) / 16
    np.testing.assert_allclose(energy[energy > 1e-12], expected[expected > 1e-12], rtol=0.2)


def test_variance_is_that_of_the_batch_gradient(problem):
    loss, params, precision, quant_state, batch = problem
    exact = dataclasses.replace(precision, error_bits=jnp.full((3, 2), 32.0))

    def one(x, y):
        return jax.grad(loss)(params, exact, quant_state, KEY, x[None], y[None])

    each = jax.jit(jax.vmap(one))(*batch)
    expected = jax.tree.map(lambda g: jnp.sum(jnp.var(g, axis=0, ddof=1)) / 64, each)

    measure = make_noise_measurement(loss)

    def variance(key):
        shuffled = [jax.random.permutation(key, x) for x in batch]
        return measure(params, precision, quant_state, KEY, *shuffled).variance

    measured = jnp.mean(jax.vmap(variance)(jax.random.split(KEY, 100)), axis=0)
    expected = [expected["a"]["kernel"], 0.0, expected["b"]["kernel"]]
    np.testing.assert_allclose(measured, expected, rtol=0.1)


def test_one_compilation_measures_any_number_of_products(problem):
    loss, params, precision, quant_state, batch = problem
    chex.clear_trace_counter()
    measure = make_noise_measurement(chex.assert_max_traces(loss, n=1))
    first = measure(params, precision, quant_state, KEY, *batch)
    wider = dataclasses.replace(precision, error_bits=precision.error_bits + 1.0)
    second = measure(params, wider, quant_state, KEY, *batch)
    assert np.sum(second.energy) < np.sum(first.energy)


def test_a_batch_must_split_into_halves(problem):
    loss, params, precision, quant_state, batch = problem
    odd = [x[:7] for x in batch]
    with pytest.raises(ValueError, match="expected arrays of one even batch size, got 7; drop a sample"):
        make_noise_measurement(loss)(params, precision, quant_state, KEY, *odd)
