"""Products in scan and cond: the same numbers as plain code, each step with formats of its own, in nets and in tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from codesign import trace
from nets import LayerRule, PrecisionRules, find_products, init_precision, interpret, quantize

KEY = jax.random.key(0)
PARAMS = {"layers": {"kernel": jax.random.normal(KEY, (3, 5, 5)) / 2.0}, "out": jax.random.normal(KEY, (5, 2))}
X = jax.random.normal(jax.random.key(1), (8, 5))
RULES = PrecisionRules({"layers_2": LayerRule(4, 4, 4, 4, learn=False), "*": LayerRule()})


def layer(x, kernel):
    return jnp.tanh(x @ kernel), jnp.mean(x)


def scanned(params, x):
    x, means = lax.scan(layer, x, params["layers"]["kernel"])
    return x @ params["out"], means


def backwards(params, x):
    x, means = lax.scan(jax.checkpoint(layer), x, params["layers"]["kernel"][::-1], reverse=True)
    return x @ params["out"], means[::-1]


def looped(params, x):
    means = []
    for kernel in params["layers"]["kernel"]:
        x, mean = layer(x, kernel)
        means.append(mean)
    return x @ params["out"], jnp.stack(means)


def branching(params, x):
    kernel = params["layers"]["kernel"]
    x = lax.cond(x[0, 0] > 0.0, lambda x: x @ kernel[0], lambda x: jnp.sin(x @ kernel[1]), x)
    return lax.switch(2, [lambda x: x, lambda x: -x, lambda x: x @ params["out"] @ params["out"].T], x)


def as_it_stands(index, product, lhs, rhs, default_fn):
    return default_fn(lhs, rhs)


def train(fn):
    """Result and all gradients of the quantised function."""
    loss = lambda out: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))  # noqa: E731
    precision, state = init_precision(fn, RULES, PARAMS, X, loss=loss)
    gradient = jax.jit(jax.value_and_grad(lambda *trees: loss(quantize(fn)(*trees, KEY, X)), argnums=(0, 1, 2)))
    return precision, gradient(PARAMS, precision, state)


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fn", [scanned, backwards, branching])
def test_plain_code_gives_the_same_numbers(fn):
    plain = interpret(fn, as_it_stands)
    assert_close(plain(PARAMS, X), fn(PARAMS, X))
    assert_close(jax.jit(plain)(PARAMS, -X), fn(PARAMS, -X))
    batched = jnp.stack([X, -X])
    assert_close(jax.vmap(plain, (None, 0))(PARAMS, batched), jax.vmap(fn, (None, 0))(PARAMS, batched))
    slope = lambda fn: jax.grad(lambda params: jnp.sum(jax.tree.leaves(fn(params, X))[0] ** 2))(PARAMS)  # noqa: E731
    assert_close(slope(plain), slope(fn))


def test_each_step_of_a_scan_trains_with_formats_of_its_own_as_in_a_loop():
    assert [product.name for product in find_products(scanned, PARAMS, X)] == ["layers", "layers_2", "layers_3", "out"]
    (precision, values), (_, expected) = train(scanned), train(looped)
    np.testing.assert_array_equal(precision.bits()[:, 0], [8.0, 4.0, 8.0, 8.0])
    assert_close(values, expected)
    _, recomputed = train(backwards)
    assert_close(recomputed[1][0], values[1][0])


def test_the_workload_of_a_scan_is_that_of_the_loop():
    rows, expected = trace(scanned, PARAMS, X).table(), trace(looped, PARAMS, X).table()
    assert rows == expected and len(rows) == 3 * 4 - 1


def test_an_lstm_over_a_sequence():
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(4, 4, rngs=rngs))

        def __call__(self, x):
            return self.rnn(x)

    graph, params, rest = nnx.split(Recurrent(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)  # noqa: E731
    x = jax.random.normal(KEY, (8, 3, 4))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = nnx.to_pure_dict(params)
        precision, state = init_precision(fn, PrecisionRules({"*": LayerRule(12, 12, 12, 12)}), params, x)
        assert len(precision.names) % 3 == 0 and any("cell" in name for name in precision.names)
        out = quantize(fn)(params, precision, state, KEY, x)
        np.testing.assert_allclose(out, fn(params, x), atol=5e-3)


def test_a_long_scan_is_refused():
    fn = lambda w, x: lax.scan(lambda x, _: (x @ w, None), x, None, length=257)[0]  # noqa: E731
    with pytest.raises(ValueError, match="scan with products of at most 256 steps, got 257"):
        find_products(fn, jnp.eye(2), jnp.ones((2, 2)))
