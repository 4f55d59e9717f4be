"""Contract of every mechanism of a rule: it goes through jit, vmap, grad, checkpoint, scan and cond, and compiles once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nets import BitSlices, Decomposed, Laps, LayerRule, LookUp, PrecisionRules, init_precision, make_local_format
from nets.transform import quantize

KEY = jax.random.key(0)

MECHANISMS = {
    "slices": LayerRule(learn=False, multiplier=BitSlices(4, "signed")),
    "look-up": LayerRule(learn=False, multiplier=LookUp()),
    "decomposed": LayerRule(4, 4, 8, 8, learn=False, multiplier=Decomposed("prescale", merge=True)),
    "masks": LayerRule(masks=True),
    "low-bit saved": LayerRule(saved=make_local_format(4, 8)),
    "linear scales": LayerRule(saved=make_local_format(3, (-1, 1), "linear")),
    "random bit": LayerRule(point="random_bit"),
    "controller": LayerRule(learn=False, laps=Laps()),
    "direct feedback": LayerRule(direct_feedback=True),
    **{name: LayerRule(name, name, name, name) for name in ("fp8_e5m2", "block8")},
}


def fn(params, x):
    """Convolution, ReLU, pooling, a normalisation and a matrix product."""
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    h = lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = h.reshape(h.shape[0], -1) @ params["dense"]["kernel"]
    h = (h - jnp.mean(h, axis=0, keepdims=True)) / (1.0 + jnp.std(h, axis=0, keepdims=True))
    return jax.nn.relu(h) @ params["out"]["kernel"]


FAST = ("slices", "controller")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MECHANISMS])
def test_every_mechanism_goes_through_every_transformation(name):
    rule = MECHANISMS[name]
    keys = jax.random.split(KEY, 4)
    shapes = {"conv": (3, 3, 2, 4), "dense": (16, 8), "out": (8, 4)}
    params = {n: {"kernel": jax.random.normal(k, s)} for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    x = jax.random.normal(keys[3], (16, 4, 4, 2))
    # One scale per channel of matrices; the inputs of the convolution have other axes.
    rules = PrecisionRules(({"conv": LayerRule()} if name == "linear scales" else {}) | {"*": rule})
    precision, state = init_precision(fn, rules, params, x, loss=lambda out: jnp.mean(out**2))
    qfn = quantize(fn)

    def loss(params, precision, state, key):
        return jnp.mean(jnp.sin(qfn(params, precision, state, key, x)) ** 2)

    def through(params, precision, state, key):
        """The loss as the only step of a scan, under a branch, recomputed in the backward pass."""

        def body(carry, key):
            taken = lax.cond(carry < 1.0, jax.checkpoint(loss), lambda *_: 0.0, params, precision, state, key)
            return carry + taken, None

        return lax.scan(body, 0.0, key[None])[0]

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def jitted(params, precision, state, key):
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, precision, state, key)

    first, second = (jitted(params, precision, state, key) for key in keys[:2])
    chex.assert_tree_all_finite(first)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(first[1][0]))
    inside = jax.jit(jax.value_and_grad(through, argnums=(0, 1, 2)))(params, precision, state, keys[0])
    chex.assert_trees_all_close(inside, first, rtol=1e-3, atol=1e-5)
    batched = jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)), (None, None, None, 0)))(
        params, precision, state, keys[:2]
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    chex.assert_trees_all_close(batched, stacked, rtol=1e-3, atol=1e-5)
