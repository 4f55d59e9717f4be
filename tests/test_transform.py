"""The quantised twin of a function: exact integers, gradients, statistics, transformations, and a training step."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from nets import fixed_point, ops, rounding
from nets.jaxpr import find_products
from nets.ops import STATISTICS
from nets.precision import FLOAT, LayerRule, PrecisionRules, init_precision
from nets.training import apply_gradient, cross_entropy, split_model
from nets.transform import quantize

KEY = jax.random.key(3)


def conv(window_strides=(1, 1), padding="SAME", **options):
    def fn(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = params["layer"]["kernel"]
        return lax.conv_general_dilated(x, kernel, window_strides, padding, dimension_numbers=layout, **options)

    return fn


# name: (function, shape of the kernel, shape of the inputs)
PRODUCTS = {
    "dense": (lambda p, x: x @ p["layer"]["kernel"], (5, 3), (4, 5)),
    "weights on the left": (lambda p, x: p["layer"]["kernel"] @ x, (3, 5), (5, 4)),
    "batched": (lambda p, x: jnp.einsum("bij,bjk->bik", x, p["layer"]["kernel"]), (2, 5, 3), (2, 4, 5)),
    "conv": (conv(), (3, 3, 2, 4), (2, 6, 6, 2)),
    "strided": (conv(window_strides=(2, 1), padding="VALID"), (3, 2, 2, 4), (2, 6, 6, 2)),
    "dilated": (conv(rhs_dilation=(2, 2)), (3, 3, 2, 4), (2, 7, 6, 2)),
    "depthwise": (conv(feature_group_count=2), (3, 3, 1, 4), (2, 6, 6, 2)),
    "transposed": (conv(padding=((2, 1), (1, 2)), lhs_dilation=(2, 2)), (3, 3, 2, 4), (2, 4, 4, 2)),
}


def setup(name, rule=None):
    fn, kernel_shape, input_shape = PRODUCTS[name]
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(1), kernel_shape)}}
    x = jax.random.normal(jax.random.key(2), input_shape)
    precision, quant_state = init_precision(fn, PrecisionRules({"layer": rule or LayerRule(4, 5, 6, 3)}), params, x)
    return fn, params, x, precision, quant_state


def integers(x, step, top):
    """Quantised numbers as integers, in numpy."""
    limit = int(top / step)
    return np.clip(np.round(np.asarray(x, np.float64) / float(step)), -limit, limit).astype(np.int32)


@pytest.mark.parametrize("name", PRODUCTS)
def test_forward_equals_the_product_of_integers(name):
    fn, params, x, precision, quant_state = setup(name)
    step, top = (np.asarray(a)[0] for a in fixed_point.step_and_range(precision.log2_step, precision.log2_range))
    kernel = integers(params["layer"]["kernel"], step[0], top[0])
    expected = fn({"layer": {"kernel": jnp.array(kernel)}}, jnp.array(integers(x, step[1], top[1])))
    out = jax.jit(quantize(fn))(params, precision, quant_state, None, x)
    np.testing.assert_array_equal(np.asarray(out) / (step[0] * step[1]), expected)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_backward_is_the_transposed_product_with_quantised_errors(name, stochastic):
    fn, params, x, precision, quant_state = setup(name)
    (product,) = find_products(fn, params, x)
    formats = jax.tree.map(lambda a: a[0], precision.formats(quant_state))
    spec = ops.Spec(product, (True, True), (False, False), stochastic)
    seed = jnp.array([5, 6], jnp.uint32)
    kernel = params["layer"]["kernel"]
    operands = (kernel, x) if product.weights_operand == 0 else (x, kernel)
    probe = jnp.zeros(ops.NUM_STATISTICS)
    out, pullback = jax.vjp(lambda *a: ops.quantised_product(spec, *a, formats, seed, probe), *operands)
    error = 0.4 * jax.random.normal(jax.random.key(4), out.shape)
    gradients = pullback(error)
    d_kernel, d_x = gradients if product.weights_operand == 0 else gradients[::-1]

    words = rounding.random_words(seed, error.shape) if stochastic else None
    input_error, weight_error = (
        fixed_point.quantise_error(error, formats.error_step[i], formats.error_limit[i], words) for i in (0, 1)
    )
    q_kernel, q_x = (fixed_point.quantise(a, formats.step[i], formats.top[i], True) for i, a in enumerate((kernel, x)))
    _, exact = jax.vjp(lambda w, x: fn({"layer": {"kernel": w}}, x), q_kernel, q_x)
    inside = [np.abs(a) <= formats.top[i] for i, a in enumerate((kernel, x))]
    np.testing.assert_allclose(d_kernel, np.where(inside[0], exact(weight_error)[0], 0.0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(d_x, np.where(inside[1], exact(input_error)[1], 0.0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_goes_through_every_transformation(name):
    chex.clear_trace_counter()
    fn, params, x, precision, quant_state = setup(name)
    qfn = quantize(fn)

    @chex.assert_max_traces(n=1)
    def gradients(params, precision, quant_state, key, x):
        loss = lambda *trees: jnp.sum(jnp.sin(qfn(*trees, key, x)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(params, precision, quant_state)

    jitted = jax.jit(gradients)
    first = jitted(params, precision, quant_state, KEY, x)
    chex.assert_tree_all_finite(first)
    wider = dataclasses.replace(precision, log2_step=precision.log2_step - 3.0, error_bits=precision.error_bits + 2.0)
    second = jitted(params, wider, quant_state, jax.random.key(9), x)
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    keys = jnp.stack([KEY, jax.random.key(9)])
    unchecked = jax.jit(jax.vmap(gradients.__wrapped__, (None, 0, None, 0, None)))
    batched = unchecked(params, stack(precision, wider), quant_state, keys, x)
    chex.assert_trees_all_close(batched, stack(first, second), rtol=1e-4, atol=1e-5)


class Network(nnx.Module):
    """Convolution with batch normalisation, ReLU, dropout and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.dense = nnx.Linear(4 * 16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return self.dense(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def network():
    """(fn, params, rest, images, labels) with fn(params, rest, images, key) -> (logits, rest)."""
    forward, params, rest = split_model(Network(nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (32, 4, 4, 1))
    labels = jnp.argmax(images.reshape(32, 16)[:, :10], axis=1)

    def fn(params, rest, images, key):
        return forward(params, rest, images, key, True)

    return fn, params, rest, images, labels


def initialised(network, rule, fn=None):
    default, params, rest, images, labels = network
    rules = PrecisionRules({"*": rule})
    loss = lambda out: cross_entropy(out[0], labels)  # noqa: E731
    return init_precision(fn or default, rules, params, rest, images, KEY, loss=loss)


def network_loss(network, fn, quantised=True):
    """loss(params, precision, quant_state, key) -> (loss, batch statistics) of the function or its quantised twin."""
    _, _, rest, images, labels = network
    qfn = quantize(fn)

    def loss(params, precision, quant_state, key):
        args = (rest, images, KEY)
        logits, new_rest = qfn(params, precision, quant_state, key, *args) if quantised else fn(params, *args)
        return cross_entropy(logits, labels), new_rest

    return loss


def test_float_width_is_the_function_itself(network):
    fn, params, *_ = network
    precision, quant_state = initialised(network, FLOAT)
    both = [
        jax.jit(jax.value_and_grad(network_loss(network, fn, quantised), has_aux=True)) for quantised in (True, False)
    ]
    quantised, plain = (f(params, precision, quant_state, KEY) for f in both)
    chex.assert_trees_all_close(quantised, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpoints_change_nothing(network, where):
    fn, params, *_ = network
    precision, quant_state = initialised(network, LayerRule())
    plain = network_loss(network, fn)
    inside = network_loss(network, jax.checkpoint(fn))
    remat = inside if where == "inside" else jax.checkpoint(plain)
    gradients = [
        jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, precision, quant_state, KEY)
        for loss in (plain, remat)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-6)


def test_gradients_of_formats_are_those_of_quantised_operands_by_autodiff():
    """With errors in float32, the twin is the function with `fixed_point.quantise` written around its operands."""
    rule = LayerRule(3, 3, 32, 32)
    params = {"a": jax.random.normal(jax.random.key(1), (6, 5)), "b": jax.random.normal(jax.random.key(2), (5, 4))}
    x = jax.random.normal(jax.random.key(3), (20, 6))

    def fn(params, x, quantise=lambda operand, row, column: operand):
        h = jnp.tanh(quantise(x, 0, 1) @ quantise(params["a"], 0, 0))
        return quantise(h, 1, 1) @ quantise(params["b"], 1, 0)

    precision, quant_state = init_precision(fn, PrecisionRules({"*": rule}), params, x)

    def by_hand(params, precision):
        step, top = fixed_point.step_and_range(precision.log2_step, precision.log2_range)
        return jnp.sum(
            jnp.sin(fn(params, x, lambda operand, i, j: fixed_point.quantise(operand, step[i, j], top[i, j], True)))
        )

    def twin(params, precision):
        return jnp.sum(jnp.sin(quantize(fn)(params, precision, quant_state, KEY, x)))

    expected, actual = (jax.grad(f, argnums=(0, 1))(params, precision) for f in (by_hand, twin))
    # The inputs of the first layer depend on no parameter: not learned.
    data = np.array([[False, True], [False, False]])
    expected = expected[0], jax.tree.map(lambda x: jnp.where(data, 0.0, x), expected[1])
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_counts():
    fn, params, x, precision, quant_state = setup("dense", LayerRule(4, 4, 4, 3))
    quant_state = dataclasses.replace(quant_state, error_log2_range=jnp.array([[-1.0, 0.0]]))
    error = 0.8 * jax.random.normal(jax.random.key(5), (4, 3))
    loss = lambda s: jnp.sum(error * quantize(fn, stochastic=False)(params, precision, s, None, x))  # noqa: E731
    counts = np.asarray(jax.grad(loss)(quant_state).probes[0])
    formats = jax.tree.map(lambda a: a[0], precision.formats(quant_state))
    kernel = params["layer"]["kernel"]
    quantised = [fixed_point.quantise(a, formats.step[i], formats.top[i], True) for i, a in enumerate((kernel, x))]
    quantised += [
        fixed_point.quantise_error(error, formats.error_step[i], formats.error_limit[i], None) for i in (0, 1)
    ]
    np.testing.assert_array_equal(counts[STATISTICS["values"]], [15, 20, 12, 12])
    np.testing.assert_array_equal(counts[STATISTICS["nonzeros"]], [np.count_nonzero(a) for a in quantised])
    size = np.abs(error)
    np.testing.assert_array_equal(counts[STATISTICS["overflows"]], [np.sum(size >= 0.5), np.sum(size >= 1.0)])
    np.testing.assert_array_equal(counts[STATISTICS["overflows_below"]], [np.sum(size >= 0.25), np.sum(size >= 0.5)])


def test_statistics_add_over_a_batch_axis():
    fn, params, x, precision, quant_state = setup("dense")
    qfn = quantize(fn, stochastic=False)

    def total(quant_state):
        return jnp.sum(jax.vmap(lambda row: qfn(params, precision, quant_state, None, row[None]))(x) ** 2)

    values = jax.grad(total)(quant_state).probes[0][STATISTICS["values"]]
    np.testing.assert_array_equal(values, [4 * 15, 20, 12, 12])


def test_large_arrays_are_counted_by_a_sample():
    kernel, x = jnp.ones((100, 30)), jax.random.normal(jax.random.key(0), (3000, 100))
    fn = lambda w, x: x @ w  # noqa: E731
    precision, quant_state = init_precision(fn, PrecisionRules({"*": LayerRule(8, 2, 8, 8)}), kernel, x)
    loss = lambda s: jnp.sum(quantize(fn)(kernel, precision, s, KEY, x))  # noqa: E731
    updated = quant_state.updated(jax.grad(loss)(quant_state))
    step = 2.0 ** precision.log2_step[0, 1]
    assert abs(updated.density[0, 1] - np.mean(np.abs(x) > step / 2)) < 0.03


def test_stochastic_rounding_keeps_the_mean_of_small_gradients_and_nearest_loses_them():
    x = jax.random.normal(jax.random.key(0), (256, 4))
    w = jax.random.normal(jax.random.key(1), (4, 3))
    fn = lambda w, x: x @ w  # noqa: E731
    precision, quant_state = init_precision(fn, PrecisionRules({"*": LayerRule(32, 32, 3, 3)}), w, x)
    # Errors of at most 0.1 in steps of 1/4.
    error = 0.1 * jnp.tanh(jax.random.normal(jax.random.key(2), (256, 3)))

    def weight_gradient(key, stochastic):
        return jax.grad(
            lambda w: jnp.sum(error * quantize(fn, stochastic=stochastic)(w, precision, quant_state, key, x))
        )(w)

    np.testing.assert_array_equal(weight_gradient(KEY, False), np.zeros((4, 3)))
    draws = jax.jit(jax.vmap(lambda key: weight_gradient(key, True)))(jax.random.split(KEY, 400))
    standard_error = np.std(draws, axis=0) / np.sqrt(400)
    assert np.all(np.abs(np.mean(np.asarray(draws), axis=0) - x.T @ error) < 4.5 * standard_error)


def test_narrow_floats_compute_in_float32():
    fn, params, x, precision, quant_state = setup("dense")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    loss = lambda params, x: jnp.sum(quantize(fn)(params, precision, quant_state, KEY, x))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(*half)
    chex.assert_type([value, *jax.tree.leaves(gradient)], jnp.bfloat16)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a.astype(jnp.float32), gradient), jax.grad(loss)(*single), rtol=1e-2, atol=1e-2
    )


def test_double_precision(x64):
    fn, params, x, precision, quant_state = setup("conv")
    loss = lambda *trees: jnp.sum(quantize(fn)(*trees, KEY, x) ** 2)  # noqa: E731
    gradients = jax.grad(loss, argnums=(0, 1, 2))(params, precision, quant_state)
    chex.assert_type(jax.tree.leaves(gradients), jnp.float64)
    chex.assert_tree_all_finite(gradients)


def test_errors_say_what_to_do():
    fn, params, x, precision, quant_state = setup("dense")
    with pytest.raises(ValueError, match="whose products are layer, got one with a product 'layer_2'; call init_prec"):
        quantize(lambda p, x: fn(p, x).T @ fn(p, x))(params, precision, quant_state, KEY, x)
    with pytest.raises(ValueError, match="expected a random key to round errors stochastically, got None"):
        jax.grad(lambda p: jnp.sum(quantize(fn)(p, precision, quant_state, None, x)))(params)


def test_training_learns_weights_and_bits_together(network):
    fn, params, rest, images, labels = network
    precision, quant_state = initialised(network, LayerRule(8, 8, 8, 8))
    qfn, optimizer = quantize(fn), optax.adam(0.02)

    @jax.jit
    def step(trained, quant_state, rest, opt_state, key):
        def loss(trained, quant_state):
            params, precision = trained
            logits, new_rest = qfn(params, precision, quant_state, key, rest, images, key)
            task = cross_entropy(logits, labels)
            return task + 2e-3 * jnp.sum(precision.bits()), (task, new_rest)

        (_, (task, rest)), (gradient, statistics) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            trained, quant_state
        )
        trained, opt_state = apply_gradient(optimizer, gradient, opt_state, trained)
        trained = trained[0], trained[1].clamped(2, 16)
        return trained, quant_state.updated(statistics), rest, opt_state, task

    trained = params, precision
    opt_state = optimizer.init(trained)
    tasks = []
    for key in jax.random.split(KEY, 150):
        trained, quant_state, rest, opt_state, task = step(trained, quant_state, rest, opt_state, key)
        tasks.append(float(task))
    assert np.mean(tasks[-10:]) < 0.5 * tasks[0]
    bits = np.asarray(trained[1].bits())
    assert bits[0, 1] == 8.0  # the images' own format is not learned
    assert np.mean(bits[:, [0, 2, 3]]) < 7.0
    assert np.all((quant_state.density > 0.0) & (quant_state.density <= 1.0))
