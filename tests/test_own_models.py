"""Models as people write them, none made for this project: each is traced, trained for a step with few bits, and costed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from codesign import evaluate_chip, trace
from hw.chips import CHIPS
from nets import LayerRule, PrecisionRules, init_precision, quantize
from nets.rules import FLOAT
from nets.training import split_model

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (8, 6, 6, 3))
TOKENS = jax.random.normal(jax.random.key(2), (4, 6, 16))
VECTORS = jax.random.normal(jax.random.key(3), (9, 5))


class Case(NamedTuple):
    """A function, its parameters and arguments, and the MACs of its forward pass by layer, worked out by hand.

    The result of `fn` is (predictions, further state).
    """

    fn: Callable
    params: Any
    args: tuple
    macs: dict[str, int]


def nnx_case(model: nnx.Module, inputs: jax.Array, macs: dict[str, int]) -> Case:
    forward, params, rest = split_model(model)
    return Case(lambda params, rest, x, key: forward(params, rest, x, key, True), params, (rest, inputs, KEY), macs)


class BatchNormAndDropout(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.dense = nnx.Linear(4 * 36, 5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.dense(x.reshape(x.shape[0], -1))


class LinenNetwork(linen.Module):
    """The same network in Linen, its layers named by Linen."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3))(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        x = linen.Dropout(0.25, deterministic=not train)(x)
        return linen.Dense(5)(x.reshape(x.shape[0], -1))


class Transformer(nnx.Module):
    """One block, layer norms before attention and feed-forward."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, dropout_rate=0.1, rngs=rngs)
        self.norm2 = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class DepthwiseSeparable(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(3, 3, (3, 3), strides=2, padding="VALID", feature_group_count=3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.pointwise = nnx.Conv(3, 8, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.pointwise(nnx.relu(self.norm(self.depthwise(x)))).mean(axis=(1, 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PureNetwork:
    """As Equinox has it: a pytree that is called on one sample, its activation static."""

    layers: list[Dense]
    activation: Callable = dataclasses.field(metadata={"static": True})

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def linen_case() -> Case:
    model = LinenNetwork()
    variables = model.init(KEY, IMAGES, False)

    def fn(params, batch_stats, images, key):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, True, rngs={"dropout": key}, mutable=["batch_stats"])

    macs = {"Conv_0": CONV_MACS, "Dense_0": 8 * 36 * 4 * 5}
    return Case(fn, variables["params"], (variables["batch_stats"], IMAGES, KEY), macs)


def pure_case() -> Case:
    keys = jax.random.split(KEY)
    layers = [
        Dense(jax.random.normal(key, (outputs, inputs)) / inputs**0.5, jnp.zeros(outputs))
        for key, inputs, outputs in zip(keys, (5, 7), (7, 3), strict=True)
    ]
    model = PureNetwork(layers, jax.nn.relu)
    macs = {"layers/0": 9 * 5 * 7, "layers/1": 9 * 7 * 3}
    return Case(lambda model, x: (jax.vmap(model)(x), ()), model, (VECTORS,), macs)


def loop_case(remat: bool) -> Case:
    """Stacked weights of equal layers, used one after the other in a Python loop."""
    params = {"layers": {"kernel": jax.random.normal(KEY, (3, 5, 5)) / 5**0.5}}

    def layer(x, kernel):
        return jnp.tanh(x @ kernel)

    step = jax.checkpoint(layer) if remat else layer
    return Case(
        lambda params, x: (functools.reduce(step, list(params["layers"]["kernel"]), x), ()),
        params,
        (VECTORS,),
        {"layers": 9 * 25, "layers_2": 9 * 25, "layers_3": 9 * 25},
    )


# Of a padded row of 6 the middle 4 pixels have three taps, the outer two have two.
CONV_MACS = 8 * (3 * 4 + 2 * 2) ** 2 * 3 * 4
PROJECTION_MACS = 4 * 6 * 16 * 16
SCORE_MACS = 4 * 6 * 6 * 16
CASES = {
    "NNX, BatchNorm and dropout": lambda: nnx_case(
        BatchNormAndDropout(nnx.Rngs(0)), IMAGES, {"conv": CONV_MACS, "dense": 8 * 36 * 4 * 5}
    ),
    "Linen": linen_case,
    "pure function": pure_case,
    "transformer block": lambda: nnx_case(
        Transformer(nnx.Rngs(0)),
        TOKENS,
        {f"attention/{name}": PROJECTION_MACS for name in ("query", "key", "value", "out")}
        | {"attention/dot": SCORE_MACS, "attention/dot_2": SCORE_MACS}
        | {"up": 4 * 6 * 16 * 32, "down": 4 * 6 * 16 * 32},
    ),
    "depthwise-separable": lambda: nnx_case(
        DepthwiseSeparable(nnx.Rngs(0)), IMAGES, {"depthwise": 8 * 2 * 2 * 9 * 3, "pointwise": 8 * 2 * 2 * 3 * 8}
    ),
    "loop over layers": lambda: loop_case(remat=False),
    "remat": lambda: loop_case(remat=True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


def test_trace_names_and_counts_every_product(case):
    workload = trace(case.fn, case.params, *case.args)
    macs = {row["layer"]: row["effective_macs"] for row in workload.table() if row["pass"] == "forward"}
    assert macs == case.macs
    assert {row["layer"] for row in workload.table() if row["pass"] == "weight_grad"} >= {
        layer for layer in case.macs if not layer.startswith("attention/dot")
    }
    assert workload.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(case.params))


def test_a_step_with_few_bits(case):
    """In float32 the twin is the model itself, state and gradients included; with 8 bits its gradient descends."""
    quantised = quantize(case.fn)

    def loss(results):
        return jnp.mean(results[0] ** 2)

    def step(apply, params):
        def value_and_results(params):
            results = apply(params)
            return loss(results), results

        return jax.value_and_grad(value_and_results, has_aux=True)(params)

    formats = [
        init_precision(case.fn, PrecisionRules({"*": rule}), case.params, *case.args, loss=loss)
        for rule in (FLOAT, LayerRule())
    ]

    @jax.jit
    def steps(params, formats):
        plain = step(lambda params: case.fn(params, *case.args), params)
        return plain, *(step(lambda params, f=f: quantised(params, *f, KEY, *case.args), params) for f in formats)

    plain, in_float, in_8_bits = steps(case.params, formats)
    chex.assert_trees_all_close(in_float, plain, rtol=1e-5, atol=1e-6)
    exact, rough = (
        jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)]) for _, gradient in (plain, in_8_bits)
    )
    assert not jnp.array_equal(exact, rough)
    assert exact @ rough > 0.98 * jnp.linalg.norm(exact) * jnp.linalg.norm(rough)


def test_cost_of_a_training_step(case):
    """No step is faster than one product per MAC unit and cycle, and fewer bits take less energy."""
    chip = CHIPS["edge_trainer"]()
    workload = trace(case.fn, case.params, *case.args)

    def cost(width):
        bits = jnp.full((len(case.macs), 4), width)
        widths = workload.operation_bits(bits), workload.tensor_bits(bits)
        return evaluate_chip(chip, workload.step, *widths, KEY, workload.labels, evaluations=64).cost

    wide, narrow = cost(8.0), cost(4.0)
    macs = sum(row["effective_macs"] for row in workload.table())
    assert float(wide.latency) >= macs / float(chip.num_macs() * chip.frequency())
    assert 0.0 < float(narrow.energy) < float(wide.energy) < 1e-3


def scan_over_layers(params, x):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, params["layers"]["kernel"])[0]


class NnxScan(nnx.Module):
    """Equal layers made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(5, 5, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


@pytest.mark.parametrize("library", ["lax", "nnx"])
def test_steps_of_a_scan_are_layers(library):
    if library == "nnx":
        case = nnx_case(NnxScan(nnx.Rngs(0)), VECTORS, {})
    else:
        case = Case(scan_over_layers, {"layers": {"kernel": jnp.zeros((3, 5, 5))}}, (VECTORS,), {})
    names = ("layers", "layers_2", "layers_3")
    assert set(trace(case.fn, case.params, *case.args).names) == set(names)
    precision, _ = init_precision(case.fn, PrecisionRules({"*": LayerRule()}), case.params, *case.args)
    assert precision.names == names
