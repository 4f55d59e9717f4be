"""Direct feedback alignment against its definition, and learning with it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nets import feedback
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.transform import quantize

KEY = jax.random.key(0)
RULE = LayerRule(32, 32, 32, 32, learn=False, direct_feedback=True)


def network(params, x):
    h = jax.nn.tanh(x @ params["a"]["kernel"])
    h = jax.nn.tanh(h @ params["b"]["kernel"])
    return h @ params["c"]["kernel"]


def setup(fn=network):
    keys = jax.random.split(KEY, 4)
    shapes = {"a": (6, 12), "b": (12, 10), "c": (10, 3)}
    params = {n: {"kernel": jax.random.normal(k, s) / 3} for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    x = jax.random.normal(keys[3], (64, 6))
    precision, state = init_precision(fn, PrecisionRules({"*": RULE}), params, x)
    return params, x, precision, state


def test_gradients_are_those_of_projected_errors():
    params, x, precision, state = setup()
    target = jax.random.normal(jax.random.key(9), (64, 3))
    loss = lambda p: jnp.sum((quantize(network)(p, precision, state, KEY, x) - target) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    a, b, c = (params[n]["kernel"] for n in "abc")
    h1 = jnp.tanh(x @ a)
    h2 = jnp.tanh(h1 @ b)
    error = 2.0 * (h2 @ c - target)
    sent = [error @ feedback.projection(zlib.crc32(n.encode()), 3, k) for n, k in (("b", 12), ("c", 10))]
    np.testing.assert_allclose(gradient["c"]["kernel"], h2.T @ error, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient["b"]["kernel"], h1.T @ (sent[1] * (1 - h2**2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient["a"]["kernel"], x.T @ (sent[0] * (1 - h1**2)), rtol=1e-4, atol=1e-4)


def test_no_transposed_weights_are_read():
    params, x, precision, state = setup()
    loss = lambda p: jnp.sum(quantize(network)(p, precision, state, KEY, x) ** 2)  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    # Three forward products, three weight gradients, two projections; backpropagation has two input gradients instead.
    assert text.count(" dot(") + text.count("__onednn$matmul") + text.count("__cpu$dot") == 8


def test_it_learns():
    params, x, precision, state = setup()
    target = jnp.stack([x[:, 0] * x[:, 1], jnp.sin(x[:, 2]), x[:, 3]], axis=1)
    optimizer = optax.adam(0.01)

    def loss(params):
        return jnp.mean((quantize(network)(params, precision, state, KEY, x) - target) ** 2)

    @jax.jit
    def step(params, opt_state):
        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state)
            return optax.apply_updates(params, updates), opt_state, value

    opt_state, values = optimizer.init(params), []
    for _ in range(300):
        params, opt_state, value = step(params, opt_state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]


def test_projections_are_fixed_and_of_unit_scale():
    matrix = np.asarray(feedback.projection(5, 16, 5000))
    np.testing.assert_array_equal(matrix, feedback.projection(5, 16, 5000))
    assert np.max(np.abs(matrix)) <= 0.25 and abs(np.mean(matrix)) < 0.005
    assert np.std(matrix) == pytest.approx(0.25 / np.sqrt(3), rel=0.02)
    assert abs(np.corrcoef(matrix.ravel(), np.asarray(feedback.projection(6, 16, 5000)).ravel())[0, 1]) < 0.02


def test_networks_that_cannot_have_it_are_errors():
    params, x, precision, state = setup()
    with pytest.raises(ValueError, match=r"without jax.checkpoint for direct feedback"):
        quantize(jax.checkpoint(network))(params, precision, state, KEY, x)
    fn = lambda p, x: (x @ p["a"]["kernel"]).T @ jnp.ones((64, 3))  # noqa: E731
    precision, state = init_precision(fn, PrecisionRules({"*": RULE}), {"a": params["a"]}, x)
    with pytest.raises(ValueError, match=r"the batch axis of the output \(12, 3\) for direct feedback, got \(64, 6\)"):
        quantize(fn)({"a": params["a"]}, precision, state, KEY, x)
