"""The walker of jaxprs: finding, naming and re-evaluating products."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from nets.jaxpr import find_products, flatten, interpret, parameter_paths
from nets.training import split_model


def names(fn, *args):
    return [product.name for product in find_products(fn, *args)]


def ones(*shape):
    return jnp.ones(shape)


DENSE = {"dense1": {"kernel": ones(3, 4), "bias": ones(4)}, "dense2": {"kernel": ones(4, 2)}}


def mlp(params, x):
    h = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"][None])
    return h @ params["dense2"]["kernel"]


class Network(nnx.Module):
    """Convolution, batch normalisation, ReLU, dropout, attention: what a walker has to get around."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.depthwise(self.conv(x)))))
        return self.head(self.attention(x.reshape(x.shape[0], -1, 4)))


@pytest.fixture(scope="module")
def network():
    forward, params, rest = split_model(Network(nnx.Rngs(0)))

    def fn(params, rest, x, key):
        return forward(params, rest, x, key, True)

    return fn, params, rest, jax.random.normal(jax.random.key(0), (2, 8, 8, 2)), jax.random.key(1)


def test_products_of_a_network_by_name(network):
    assert names(*network) == [
        "conv",
        "depthwise",
        *(f"attention/{part}" for part in ("query", "key", "value", "dot", "dot_2", "out")),
        "head",
    ]


def test_product_fields(network):
    conv = find_products(*network)[0]
    assert (conv.kind, conv.param_path, conv.weights_operand) == ("conv", "conv/kernel", 1)
    assert (conv.lhs_shape, conv.rhs_shape, conv.out_shape) == ((2, 8, 8, 2), (3, 3, 2, 4), (2, 4, 4, 4))
    assert conv.params["window_strides"] == (2, 2) and conv.dtype == jnp.float32
    assert hash(conv) == hash(find_products(*network)[0]) and conv == find_products(*network)[0]


def test_only_what_depends_on_parameters_needs_an_input_grad(network):
    assert [product.needs_input_grad for product in find_products(*network)] == [False] + [True] * 8
    scaled = {"scale": ones(3), "kernel": ones(3, 2)}
    assert find_products(lambda p, x: (x * p["scale"]) @ p["kernel"], scaled, ones(3))[0].needs_input_grad


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda p, x: x @ p["a"]["kernel"].T, [("a", "a/kernel", 1)]),
        (lambda p, x: p["a"]["kernel"] @ x.T, [("a", "a/kernel", 0)]),
        (lambda p, x: x @ (p["a"]["kernel"] / jnp.linalg.norm(p["a"]["kernel"])), [("a", "a/kernel", 1)]),
        (lambda p, x: x @ p["a"]["kernel"].reshape(2, 8).astype(jnp.float32).reshape(4, 4), [("a", "a/kernel", 1)]),
        (lambda p, x: x @ p["a"]["kernel"] @ p["a"]["kernel"], [("a", "a/kernel", 1), ("a_2", "a/kernel", 1)]),
        (lambda p, x: x @ x.T, [("dot", None, 1)]),
        (lambda p, x: jnp.eye(4) @ x.T, [("dot", None, 0)]),
        (lambda p, x: jnp.square(x @ p["a"]["kernel"]) @ x.T, [("a", "a/kernel", 1), ("a/dot", None, 1)]),
    ],
)
def test_names_follow_the_parameter(fn, expected):
    products = find_products(fn, {"a": {"kernel": ones(4, 4)}}, ones(4, 4))
    assert [(p.name, p.param_path, p.weights_operand) for p in products] == expected


def test_names_stay_unique_where_a_layer_is_called_like_a_repeated_one():
    params = {"a": {"kernel": ones(2, 2)}, "a_2": {"kernel": ones(2, 2)}}
    fn = lambda p, x: x @ p["a"]["kernel"] @ p["a_2"]["kernel"] @ p["a"]["kernel"]  # noqa: E731
    assert names(fn, params, ones(2, 2)) == ["a", "a_2", "a_3"]


def test_paths_of_any_pytree_of_parameters():
    assert parameter_paths(DENSE) == ("dense1/bias", "dense1/kernel", "dense2/kernel")
    assert parameter_paths([ones(1), (ones(1),)]) == ("0", "1/0")
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert parameter_paths({"layer": state}) == ("layer/bias", "layer/kernel")
    assert names(lambda w, x: x @ w, ones(2, 2), ones(1, 2)) == ["param"]


def test_products_of_integers_are_not_ours():
    counts = jnp.ones((2, 2), jnp.int32)
    assert names(lambda p, x: (x @ counts) @ p, jnp.ones((2, 2), jnp.int32), counts) == []


def test_shapes_are_enough_to_find_products():
    shapes = jax.eval_shape(lambda: (DENSE, ones(5, 3)))
    assert names(mlp, *shapes) == ["dense1", "dense2"]


def with_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return wrapped


def with_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *args: jax.vjp(f, *args), lambda pullback, g: pullback(g))
    return wrapped


CALLS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "nested": lambda f: jax.checkpoint(jax.jit(jax.checkpoint(f))),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_hold_products_are_entered(call):
    wrapped = CALLS[call](mlp)
    args = DENSE, jax.random.normal(jax.random.key(0), (5, 3))
    assert names(wrapped, *args) == ["dense1", "dense2"]
    doubled = interpret(wrapped, lambda index, product, lhs, rhs, default_fn: 2.0 * default_fn(lhs, rhs))
    expected = 4.0 * jax.nn.relu(args[1] @ DENSE["dense1"]["kernel"] + 0.5) @ DENSE["dense2"]["kernel"]
    chex.assert_trees_all_close(doubled(*args), expected, rtol=1e-6)


def test_checkpoints_still_recompute():
    args = DENSE, ones(5, 3)
    keep = interpret(jax.checkpoint(mlp), lambda i, p, lhs, rhs, default_fn: default_fn(lhs, rhs))
    gradient = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(keep(*args))))(*args)
    assert [eqn.params["differentiated"] for eqn in gradient.eqns if "differentiated" in eqn.params] == [True]
    seen = []

    def record(index, product, lhs, rhs, default_fn):
        seen.append(lhs)
        return default_fn(lhs, rhs)

    interpret(jax.checkpoint(mlp), record, keep_checkpoints=False)(*args)
    chex.assert_shape(seen, [(5, 3), (5, 4)])
    assert np.all(np.asarray(seen[1]) == 4.0)


def test_a_product_inside_a_loop_of_unknown_length_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="got one inside 'while'; write it as a Python loop"):
        find_products(lambda w, x: lax.fori_loop(0, jnp.int32(x[0, 0]), lambda i, x: x @ w, x), ones(2, 2), ones(2, 2))


def test_loops_without_products_stay_as_they_are():
    def fn(w, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x @ w)

    args = ones(2, 2), ones(2, 2)
    same = interpret(fn, lambda i, p, lhs, rhs, default_fn: default_fn(lhs, rhs))
    chex.assert_trees_all_equal(same(*args), fn(*args))


def test_interpretation_is_the_identity_under_every_transformation(network):
    fn, params, rest, x, key = network
    same = interpret(fn, lambda index, product, lhs, rhs, default_fn: default_fn(lhs, rhs))
    expected = jax.jit(fn)(params, rest, x, key)
    chex.assert_trees_all_close(same(params, rest, x, key), expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(jax.jit(same)(params, rest, x, key), expected, rtol=1e-5, atol=1e-6)
    batched = jax.jit(jax.vmap(same, (None, None, 0, None)))(params, rest, jnp.stack([x, x]), key)
    chex.assert_trees_all_close(batched, jax.tree.map(lambda a: jnp.stack([a, a]), expected), rtol=1e-4, atol=1e-6)

    def loss(f):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, rest, x, key)[0]))))

    chex.assert_trees_all_close(loss(same)(params), loss(fn)(params), rtol=1e-4, atol=1e-6)


def test_a_relu_keeps_its_own_gradient():
    # max(x, 0) has the gradient 1/2 at a tie; the rule of jax.nn.relu says 0.
    same = interpret(lambda w, x: jax.nn.relu(x @ w), lambda i, p, lhs, rhs, default_fn: default_fn(lhs, rhs))
    assert jax.grad(lambda w: jnp.sum(same(w, jnp.ones((1, 1)))))(jnp.zeros((1, 1))) == 0.0


def test_values_flow_from_equation_to_equation(network):
    for enter_calls in (False, True):
        program = flatten(*network, enter_calls=enter_calls)
        known = set(program.parameters + program.arguments)
        for equation in program.walk():
            assert all(value in known or value.constant is not None for value in equation.inputs)
            known |= set(equation.outputs)
        assert all(value in known or value.constant is not None for value in program.outputs)
        primitives = {equation.primitive for equation in program.walk()}
        assert ("custom_jvp_call" in primitives) is not enter_calls
        assert "max" in primitives or not enter_calls
    kernel = next(value for value in program.parameters if value.path == "conv/kernel")
    users = [equation for equation in program.walk() if kernel in equation.inputs]
    assert [program.products[equation.product].name for equation in users] == ["conv"]
