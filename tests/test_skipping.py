"""Work left by in-out skipping: from tensors, and that masking outputs of input_grad loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from nets import skipping
from nets.models import make_model
from nets.precision import LayerRule, PrecisionRules, init_precision
from nets.training import split_model
from nets.transform import quantize


def test_masks_are_found_behind_relu_pooling_and_flattening():
    for name, expected in (("lenet", [False, True, True, True]), ("mlp", [False, True, True])):
        forward, params, rest = split_model(make_model(name, (8, 8, 1), 10))
        images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
        found = skipping.mask_densities(lambda p, x, f=forward, r=rest: f(p, r, x, None, True), params, images)
        np.testing.assert_array_equal(found < 1.0, expected)
        hidden = jax.nn.relu(images.reshape(16, 64) @ params["dense1"]["kernel"]) if name == "mlp" else None
        if hidden is not None:
            np.testing.assert_allclose(found[1], np.mean(np.asarray(hidden) > 0), atol=0.01)


def test_shares_by_hand_and_that_masked_outputs_are_zero_anyway():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": {"kernel": jax.random.normal(keys[0], (6, 8))}, "b": {"kernel": jax.random.normal(keys[1], (8, 4))}}
    x = jax.random.normal(keys[2], (32, 6))
    rules = PrecisionRules({"*": LayerRule(8, 4, 4, 4, learn=False)})
    precision, state = init_precision(fn, rules, params, x, loss=lambda out: jnp.mean(out**2))
    loss = lambda s: jnp.mean(quantize(fn, stochastic=False)(params, precision, s, None, x) ** 2)  # noqa: E731
    state = state.updated(jax.grad(loss)(state))
    masks = skipping.mask_densities(fn, params, x)
    densities = skipping.pass_densities(state.density, masks)
    hidden = np.asarray(jax.nn.relu(x @ params["a"]["kernel"]))
    np.testing.assert_allclose(masks, [1.0, np.mean(hidden > 0)], rtol=1e-6)
    work = np.prod(densities, axis=-1)
    expected = np.stack(
        [state.density[:, 1], masks * state.density[:, 2], state.density[:, 1] * state.density[:, 3]], 1
    )
    np.testing.assert_allclose(work, expected, rtol=1e-6)
    # 4-bit inputs have zeros that the mask lets through: rounding adds to sparsity.
    assert 0.0 < densities[1, 0, 1] < masks[1]
    # What input_grad of b would give where the mask is zero is dropped by the ReLU.
    error = jax.random.normal(keys[0], (32, 4))
    dense = np.asarray(error @ params["b"]["kernel"].T) * (hidden > 0)
    skipped = np.zeros((32, 8), np.float32)
    for n, k in zip(*np.nonzero(hidden), strict=True):
        skipped[n, k] = np.dot(np.asarray(error)[n], np.asarray(params["b"]["kernel"])[k])
    np.testing.assert_allclose(skipped, dense, rtol=1e-5, atol=1e-5)


def test_slice_densities_are_those_of_the_digits():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": {"kernel": jax.random.normal(keys[0], (6, 8))}, "b": {"kernel": jax.random.normal(keys[1], (8, 4))}}
    x = jax.random.normal(keys[2], (32, 6))
    rules = {"a": LayerRule(10, 4, 7, 32, learn=False), "b": LayerRule("fp16", 8, 4, 4, learn=False)}
    loss = lambda out: jnp.mean(out**2)  # noqa: E731
    precision, state = init_precision(fn, PrecisionRules(rules), params, x, loss=loss)
    found = skipping.slice_densities(fn, loss, precision, state, params, x)
    np.testing.assert_array_equal(np.isnan(found), [[False, False, False, True], [True, False, False, False]])
    # 10 bits in signed slices of 4 are three radix-8 digits.
    step = float(precision.formats(state).step[0, 0])
    levels = np.clip(np.round(np.abs(params["a"]["kernel"]) / step), 0, 511).astype(int)
    digits = np.stack([levels % 8, levels // 8 % 8, levels // 64])
    np.testing.assert_allclose(found[0, 0], np.mean(digits != 0), rtol=1e-6)
    hidden = np.asarray(jax.nn.relu(x @ params["a"]["kernel"]))
    step = float(precision.formats(state).step[1, 1])
    levels = np.clip(np.round(hidden / step), 0, 255).astype(int)
    # Without a sign 8 bits are three digits, too.
    digits = np.stack([levels % 8, levels // 8 % 8, levels // 64])
    np.testing.assert_allclose(found[1, 1], np.mean(digits != 0), rtol=1e-6)
    # Word densities stay where slices are not counted; elsewhere slices are told over the whole ones that a MAC takes:
    # ten bits in slices of four are three either way, unsigned eight bits three signed slices in place of two.
    work = skipping.measured_densities(fn, loss, precision, state, params, x, slice_width=4, style="signed")
    masks = skipping.mask_densities(fn, params, x)
    np.testing.assert_allclose(work[1, 0], [1.0, found[1, 1] * 3 / 2], rtol=1e-6)
    np.testing.assert_allclose(work[1, 1], [masks[1], found[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(work[0, 2], [found[0, 1], state.density[0, 3]], rtol=1e-6)
    # Weights of 7 bits and more take more signed slices than whole ones, skipped or not.
    np.testing.assert_allclose(work[0, 0], [1.0, found[0, 1]], rtol=1e-6)
    words = skipping.measured_densities(fn, loss, precision, state, params, x)
    np.testing.assert_array_equal(words, skipping.pass_densities(state.density, masks))
