"""What is kept between forward and backward pass: exact masks, low-bit activations, freezing, and the memory they save."""

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nets import saved_activations as kept
from nets.models import make_model
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.saved_activations import make_local_format
from nets.training import cross_entropy, split_model
from nets.transform import quantize

KEY = jax.random.key(3)


def uniform(shape, seed=0):
    """Values with ties, zeros of both signs and negative numbers."""
    values = np.random.default_rng(seed).integers(-4, 5, shape) / 4
    return jnp.array(np.where(values == 0.25, -0.0, values), jnp.float32)


def residuals(fn, *args):
    """The arrays that the backward pass of `fn` keeps."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], *args))


def num_bytes(arrays):
    return sum(x.size * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(), (5,), (32,), (3, 7), (2, 4, 9, 3)])
def test_packing_loses_nothing_and_wastes_nothing_but_whole_words(shape, bits):
    values = jnp.array(np.random.default_rng(0).integers(0, 2**bits, shape), jnp.uint32)
    words = kept.pack(values, bits)
    np.testing.assert_array_equal(kept.unpack(words, shape), values)
    leading = shape[0] if len(shape) > 1 else 1
    assert words.shape == (leading, bits, -(-(values.size // leading) // 32))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 6, 6, 3)])
def test_masked_relu_is_relu_with_one_bit_kept_per_value(shape):
    x, g = uniform(shape), uniform(shape, seed=1)
    expected, actual = (jax.vjp(f, x) for f in (jax.nn.relu, kept.masked_relu))
    chex.assert_trees_all_equal(actual[0], expected[0])
    chex.assert_trees_all_equal(actual[1](g), expected[1](g))
    (mask,) = residuals(kept.masked_relu, jax.ShapeDtypeStruct((128, 640), jnp.float32))
    assert num_bytes([mask]) == 128 * 640 // 8


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((2, 6, 6, 3), (1, 2, 2, 1)), ((2, 7, 5, 3), (1, 2, 2, 1)), ((1, 6, 6, 2), (1, 3, 2, 1)), ((12, 8), (2, 4))],
)
def test_masked_max_pool_is_max_pool(shape, window, relu):
    def pool(x):
        return lax.reduce_window(jax.nn.relu(x) if relu else x, -jnp.inf, lax.max, window, window, "VALID")

    for seed in range(3):
        x = uniform(shape, seed)
        expected, actual = (jax.vjp(f, x) for f in (pool, lambda x: kept.masked_max_pool(x, window, relu)))
        chex.assert_trees_all_equal(actual[0], expected[0])
        g = uniform(actual[0].shape, seed + 10)
        chex.assert_trees_all_equal(actual[1](g), expected[1](g))


def test_masked_pool_keeps_three_bits_per_window():
    x = jax.ShapeDtypeStruct((128, 16, 16, 32), jnp.float32)
    pool = lambda x: kept.masked_max_pool(x, (1, 2, 2, 1), True)  # noqa: E731
    assert num_bytes(residuals(pool, x)) == 3 * (128 * 8 * 8 * 32) // 8


def reference_levels(x, bits, scale):
    """Levels and scale of one region, in numpy."""
    levels = 2 ** (bits - 1) - 1
    peak = np.max(np.abs(x))
    step = peak / np.float32(levels) if scale == "linear" else 2.0 ** np.ceil(np.log2(np.float64(peak) / levels))
    return np.clip(np.round(x / step), -levels, levels), step


@pytest.mark.parametrize("scale", ["linear", "power_of_two"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_regions_are_rounded_to_their_own_scale(bits, scale):
    x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    x[2] *= 1e-3
    for region, tiles in ((16, x.reshape(-1, 16)), ((-1, -1, 1), np.moveaxis(x, 2, 1)), ((2, 4), None)):
        decoded = np.asarray(kept.decode(kept.encode(jnp.array(x), make_local_format(bits, region, scale))))
        if region == 16:
            blocks, got = tiles, decoded.reshape(-1, 16)
        elif region == (-1, -1, 1):
            blocks, got = (np.moveaxis(a, 2, 0).reshape(8, -1) for a in (x, decoded))
        else:
            blocks, got = (a.reshape(4, 3, 2, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 8) for a in (x, decoded))
        for block, row in zip(blocks, got, strict=True):
            level, step = reference_levels(block, bits, scale)
            np.testing.assert_allclose(row, level * step, rtol=1e-6)


@pytest.mark.parametrize("scale", ["linear", "power_of_two"])
def test_what_is_representable_stays_and_zeros_and_extremes_are_finite(scale):
    x = jnp.array([[-7.0, 3.0, 0.0, 7.0], [0.0] * 4, [7e-30, 1e-30, 0.0, -3e-30], [3e38, -3e38, 1e38, 0.0]]) * 0.5
    once = kept.decode(kept.encode(x, make_local_format(4, 4, scale)))
    np.testing.assert_array_equal(once[:2], x[:2])
    chex.assert_tree_all_finite(once)
    # A linear scale is rounded itself.
    rtol = 0.0 if scale == "power_of_two" else 1e-6
    np.testing.assert_allclose(kept.decode(kept.encode(once, make_local_format(4, 4, scale))), once, rtol=rtol)


def test_bytes_by_hand():
    # 128 x 196 values of 4 bits in words of 32: 196 values take 7 words a plane; one exponent per 28 values.
    assert kept.saved_bytes((128, 14, 14), make_local_format(4, 28)) == 128 * 4 * 7 * 4 + 128 * 7
    assert kept.saved_bytes((128, 64), make_local_format(8, 64, "linear")) == 128 * 64 + 128 * 4


def test_low_bit_gradients_are_those_at_the_kept_arguments():
    def fn(x, shift, gain):
        return jnp.tanh(x) * gain + shift

    x, shift, gain = (jax.random.normal(key, (4, 32)) for key in jax.random.split(KEY, 3))
    fmt = make_local_format(4)
    wrapped = kept.keep_low_bit(fn, [fmt, fmt, None])
    out, pullback = jax.vjp(wrapped, x, shift, gain)
    np.testing.assert_array_equal(out, fn(x, shift, gain))
    rounded = kept.decode(kept.encode(x, fmt))
    chex.assert_trees_all_equal(pullback(out), jax.vjp(fn, rounded, shift, gain)[1](out))
    # The gradient does not depend on the shift: four bits and a scale of x, and the gain.
    assert num_bytes(residuals(wrapped, x, shift, gain)) == 4 * (16 + 1) + 4 * 128


def setup(name, rule, frozen=(), batch=16):
    shape = (8, 8, 1) if name == "lenet" else (16, 16, 3)
    forward, params, rest = split_model(make_model(name, shape, 10))
    images = jax.random.normal(jax.random.key(1), (batch, *shape))
    labels = jnp.arange(batch) % 10
    fn = lambda params, rest, images: forward(params, rest, images, None, True)  # noqa: E731
    rules = PrecisionRules({"*": rule}, frozen=frozen)
    loss_of = lambda out: cross_entropy(out[0], labels)  # noqa: E731
    precision, state = init_precision(fn, rules, params, rest, images, loss=loss_of)
    qfn = quantize(fn)

    def loss(params, state):
        return loss_of(qfn(params, precision, state, KEY, rest, images))

    return loss, params, state


@pytest.mark.parametrize("name", ["lenet", pytest.param("resnet8", marks=pytest.mark.slow)])
def test_masks_change_no_gradient_and_keep_less(name):
    plain, masked = (setup(name, LayerRule(learn=False, masks=masks)) for masks in (False, True))
    results = [
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, state) for loss, params, state in (plain, masked)
    ]
    chex.assert_trees_all_equal(*results)
    before, after = ([x.dtype for x in residuals(loss, params, state)] for loss, params, state in (plain, masked))
    assert before.count(jnp.bool_) > after.count(jnp.bool_) == 1  # that of the loss
    bytes_before, bytes_after = (num_bytes(residuals(*args)) for args in (plain, masked))
    assert bytes_after < bytes_before


def packed_bytes(shape, bits):
    return 4 * bits * shape[0] * -(-int(np.prod(shape[1:])) // 32)


@pytest.mark.slow
def test_low_bit_activations_shrink_residuals_and_compiled_memory_as_predicted():
    fmt, batch = make_local_format(4), 64
    loss, params, state = setup("resnet8", LayerRule(learn=False, saved=fmt), batch=batch)
    whole = setup("resnet8", LayerRule(learn=False), batch=batch)[0]
    np.testing.assert_allclose(loss(params, state), whole(params, state), rtol=1e-6)
    wide, middle, narrow = (batch, 16, 16, 16), (batch, 8, 8, 32), (batch, 4, 4, 64)
    outputs = [wide] * 3 + [middle] * 3 + [narrow] * 3  # of convolutions, shortcuts included: inputs of normalisations
    relus = [wide] * 3 + [middle] * 2 + [narrow] * 2
    inputs = [(batch, 16, 16, 3)] + [wide] * 4 + [middle] * 3 + [narrow, (batch, 64)]  # two layers read a block's input
    predicted = sum(kept.saved_bytes(shape, fmt) for shape in outputs + inputs)
    predicted += sum(packed_bytes(shape, 1) for shape in relus + inputs)  # of inputs: which lie within range
    found = residuals(loss, params, state)
    assert num_bytes(x for x in found if x.dtype in (jnp.uint32, jnp.int8) and x.size > 2) == predicted
    rest = num_bytes(found) - predicted  # parameters, formats, the loss
    assert rest < 2 * num_bytes(jax.tree.leaves(params)) + 20_000
    gradients = [jax.jit(jax.grad(f)) for f in (loss, whole)]
    temporary = [g.lower(params, state).compile().memory_analysis().temp_size_in_bytes for g in gradients]
    assert temporary[0] < 0.5 * temporary[1]


def test_low_bit_gradients_of_a_network_come_closer_with_more_bits():
    def gradient(saved):
        loss, params, state = setup("lenet", LayerRule(learn=False, saved=saved))
        return jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(params, state))[0]

    exact = gradient(None)
    errors = [jnp.linalg.norm(gradient(make_local_format(b, 16)) - exact) / jnp.linalg.norm(exact) for b in (2, 4, 8)]
    assert 0.2 > errors[1] > 4 * errors[2] and errors[0] > 2 * errors[1]


def test_frozen_layers_keep_no_inputs_and_stop_errors():
    rule = LayerRule(learn=False, masks=True)
    free, frozen = setup("lenet", rule), setup("lenet", rule, frozen=("conv*", "dense1/*"))
    gradients = jax.jit(jax.grad(frozen[0]))(*frozen[1:])
    exact = jax.jit(jax.grad(free[0]))(*free[1:])
    for name in ("conv1", "conv2", "dense1"):
        chex.assert_trees_all_equal(gradients[name], jax.tree.map(jnp.zeros_like, gradients[name]))
    chex.assert_trees_all_equal(gradients["dense2"], exact["dense2"])
    # Nothing below dense2 is kept: its input, and what belongs to the loss.
    assert num_bytes(residuals(*frozen)) < 0.1 * num_bytes(residuals(*free))
    hlo = [jax.jit(jax.grad(f)).lower(p, s).compile().as_text() for f, p, s in (free, frozen)]
    assert [text.count(" convolution(") + text.count('custom_call_target="__onednn$conv') for text in hlo][1] == 2


def test_a_frozen_layer_above_a_trained_one_passes_errors_on_exactly():
    rule = LayerRule(learn=False)
    free, frozen = setup("lenet", rule), setup("lenet", rule, frozen=("conv2/kernel",))
    exact, gradients = (jax.jit(jax.grad(f))(p, s) for f, p, s in (free, frozen))
    chex.assert_trees_all_equal(gradients["conv1"], exact["conv1"])
    chex.assert_trees_all_equal(gradients["conv2"]["bias"], exact["conv2"]["bias"])
    assert not np.any(gradients["conv2"]["kernel"])
    # Its input, 16 x 4 x 4 x 16 floats, gives way to a bit per value: which lie within range.
    assert num_bytes(residuals(*free)) - num_bytes(residuals(*frozen)) == 16 * 256 * 4 - packed_bytes((16, 256), 1)


def test_statistics_of_frozen_weights_leave_inputs_as_they_are():
    loss, params, state = setup("lenet", LayerRule(learn=False), frozen=("conv2/kernel",))
    updated = state.updated(jax.jit(jax.grad(loss, argnums=1))(params, state))
    assert updated.density[1, 1] == 1.0 and updated.density[1, 0] < 1.0


@pytest.mark.parametrize("where", ["scan and cond", "vmap and checkpoint"])
def test_mechanisms_work_inside_other_transformations(where):
    loss, params, state = setup("lenet", LayerRule(learn=False, saved=make_local_format(4, 16)))
    expected = jax.jit(jax.grad(loss))(params, state)

    def inside(params, state):
        if where == "vmap and checkpoint":
            stacked = jax.tree.map(lambda x: x[None], params)
            return jnp.sum(jax.vmap(jax.checkpoint(loss), in_axes=(0, None))(stacked, state))

        def body(carry, _):
            return carry + lax.cond(carry < 1.0, loss, lambda params, state: 0.0, params, state), None

        return lax.scan(body, 0.0, None, length=1)[0]

    chex.assert_trees_all_close(jax.jit(jax.grad(inside))(params, state), expected, rtol=1e-4, atol=1e-5)


def test_errors_name_the_layer():
    with pytest.raises(ValueError, match="saved activations of 2 to 8 bits, got 1"):
        make_local_format(1)
    with pytest.raises(ValueError, match="expected a scale among power_of_two, linear, got 'log'"):
        make_local_format(4, scale="log")
    with pytest.raises(ValueError, match="region of at least one value, got 0"):
        make_local_format(4, 0)
    for saved, match in [
        (make_local_format(4, 37), r"expected a region that divides .* got 37.*layer 'conv1', rule '\*'"),
        (make_local_format(4, (3,)), r"tile that divides a tensor of shape \(16, 8, 8, 1\), got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            setup("lenet", LayerRule(learn=False, saved=saved))
    # A batch of another size is looked at when it comes.
    fn = lambda params, x: jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]  # noqa: E731
    params, x = {"a": {"kernel": jnp.ones((8, 3))}, "b": {"kernel": jnp.ones((3, 8))}}, jnp.ones((16, 8))
    rules = PrecisionRules({"*": LayerRule(learn=False, saved=make_local_format(4, 8))})
    precision, state = init_precision(fn, rules, params, x)
    with pytest.raises(ValueError, match=r"in what is saved of the (inputs of b|output of a)"):
        jax.grad(lambda p: jnp.sum(quantize(fn)(p, precision, state, KEY, x[:9])))(params)
    with pytest.raises(ValueError, match=r"got 'fc/\*', which matches none of conv1/bias"):
        setup("lenet", LayerRule(), frozen=("fc/*",))
