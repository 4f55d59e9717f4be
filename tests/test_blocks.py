"""The walker on blocks beyond the reference networks: multi-head attention and an LSTM; and a batch over two devices."""

import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nets.precision import FLOAT, LayerRule, PrecisionRules, init_precision
from nets.saved_activations import make_local_format, residual_bytes
from nets.transform import quantize

KEY = jax.random.key(0)


class Attention(nnx.Module):
    """Multi-head self-attention with layer normalisation and a residual connection."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, rngs=rngs)
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.dense(nnx.gelu(x))


class LSTM(nnx.Module):
    """An LSTM cell over a few steps, as a Python loop; `tests/test_unrolling.py` has one under `scan`."""

    def __init__(self, rngs):
        self.cell = nnx.LSTMCell(16, 16, rngs=rngs)

    def __call__(self, x):
        carry, outputs = (jnp.zeros((x.shape[0], 16)), jnp.zeros((x.shape[0], 16))), []
        for t in range(3):
            carry, out = self.cell(carry, x[:, t])
            outputs.append(out)
        return jnp.stack(outputs, axis=1)


def setup(network, rule):
    graph, params = nnx.split(network(nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(params)
    x = jax.random.normal(KEY, (8, 12, 16))
    fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)  # noqa: E731
    loss = lambda out: jnp.mean(jnp.sin(out) ** 2)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        precision, state = init_precision(fn, PrecisionRules({"*": rule}), params, x, loss=loss)
        qloss = lambda params: loss(quantize(fn)(params, precision, state, KEY, x))  # noqa: E731
        plain = lambda params: loss(fn(params, x))  # noqa: E731
        gradients = [jax.jit(jax.value_and_grad(f))(params) for f in (qloss, plain)]
        return precision, params, qloss, plain, gradients


@pytest.mark.parametrize("network", [Attention, LSTM])
def test_float_widths_change_nothing(network):
    precision, *_, (quantised, plain) = setup(network, FLOAT)
    chex.assert_trees_all_close(quantised, plain, rtol=1e-4, atol=1e-6)
    names = " ".join(precision.names)
    assert ("query" in names and "/dot" in names) if network is Attention else "cell" in names


@pytest.mark.parametrize("network", [Attention, LSTM])
def test_eight_bits_and_low_bit_residuals_stay_close(network):
    rule = LayerRule(12, 12, 12, 12, learn=False, saved=make_local_format(8, 16))
    _, params, qloss, plain, (quantised, exact) = setup(network, rule)
    for got, want in zip(*(jax.tree.leaves(g[1]) for g in (quantised, exact)), strict=True):
        scale = jnp.linalg.norm(want)
        # The key's bias has no gradient: softmax does not see it.
        assert float(jnp.linalg.norm(got - want)) <= 0.1 * float(scale) + 1e-4
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # Rows of 16 values fill half a word, so that little is left to save in the small LSTM.
        share = 0.6 if network is Attention else 1.0
        assert residual_bytes(qloss, params) < share * residual_bytes(plain, params)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from nets import LayerRule, PrecisionRules, init_precision, make_local_format, quantize
from nets.models import make_model
from nets.training import cross_entropy, split_model
from nets.weight_update import low_bit_update, scale_by_optc

assert jax.device_count() == 2
forward, params, rest = split_model(make_model("mlp", (8, 8, 1), 10))
images, labels = jax.random.normal(jax.random.key(1), (32, 8, 8, 1)), jnp.arange(32) % 10
fn = lambda params, images: forward(params, rest, images, None, True)[0]
rule = LayerRule(8, 8, 8, 8, learn=False, saved=make_local_format(4, 16))
loss_of = lambda out, labels: cross_entropy(out, labels)
precision, state = init_precision(fn, PrecisionRules({"*": rule}), params, images, loss=lambda out: loss_of(out, labels))
optimizer = optax.chain(scale_by_optc(state_bits=8), optax.scale(-0.01), low_bit_update())

def step(params, opt_state, images, labels):
    loss = lambda params: loss_of(quantize(fn)(params, precision, state, jax.random.key(0), images), labels)
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return value, gradient, optax.apply_updates(params, updates), opt_state

opt_state = optimizer.init(params)
alone = jax.jit(step)(params, opt_state, images, labels)
split = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))
sharded = jax.jit(step)(params, opt_state, *jax.device_put((images, labels), split))
for a, b in zip(jax.tree.leaves(alone[:2]), jax.tree.leaves(sharded[:2]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
"""


def test_a_batch_sharded_over_two_devices_gives_the_same_step():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
