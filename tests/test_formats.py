"""Named formats: every number of the small ones, JAX's own conversions, unbiased rounding, and training with them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nets import formats
from nets.bitslice import BitSlices
from nets.formats import FORMATS
from nets.precision import LayerRule, PrecisionRules, freeze, init_precision
from nets.transform import quantize

KEY = jax.random.key(0)
ANY_OPERAND = [name for name in FORMATS if name != "binary"]  # which is for weights
DTYPES = {"fp16": jnp.float16, "bf16": jnp.bfloat16, "fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}


def every_number(name):
    """All finite numbers of a float format, from their bit patterns."""
    dtype = DTYPES[name]
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=f"uint{8 * np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):
        numbers = bits.view(dtype).astype(np.float32)
    return np.unique(numbers[np.isfinite(numbers)])


@pytest.mark.parametrize("name", DTYPES)
def test_floats_round_as_jax_converts_and_keep_every_number(name):
    fmt, numbers = FORMATS[name], every_number(name)
    assert fmt.largest == numbers.max() and fmt.width == 8 * np.dtype(DTYPES[name]).itemsize
    # Below 2**-119 a step of bfloat16 is no normal float32.
    normal = numbers[(np.abs(numbers) >= 2.0**-119) | (numbers == 0)]
    np.testing.assert_array_equal(formats.round_to_float(jnp.array(normal), fmt), normal)
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000).astype(np.float32) * np.float32(2.0) ** rng.integers(-30, 8, 20_000)
    middles = (normal[1:].astype(np.float64) + normal[:-1]) / 2
    x = np.concatenate([x, middles[np.abs(middles) >= 2.0**-119].astype(np.float32)])
    x = x[np.abs(x) <= fmt.largest]
    expected = x.astype(DTYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(formats.round_to_float(jnp.array(x), fmt), expected)
    far = jnp.array([3e38, -3e38])
    np.testing.assert_array_equal(
        formats.round_to_float(far, fmt),
        np.clip(far, -fmt.largest, fmt.largest).astype(DTYPES[name]).astype(np.float32),
    )


@pytest.mark.parametrize("name", ANY_OPERAND)
def test_stochastic_rounding_is_unbiased(name):
    words = jnp.arange(2**14, dtype=jnp.uint32) << 18
    fmt = FORMATS[name]
    for value in (0.7123, -0.0213):
        x = jnp.full(words.shape, value)
        x = x.at[::32].set(1.0) if isinstance(fmt, formats.BlockFormat) else x
        rounded = formats.quantise(x, jnp.array(1.0), fmt, words)
        chosen = np.asarray(rounded)[np.asarray(x) == x[1]]
        assert len(np.unique(chosen)) == 2
        spread = chosen.max() - chosen.min()
        assert abs(chosen.mean(dtype=np.float64) - float(x[1])) < 0.02 * spread


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_blocks_share_the_exponent_of_their_peak(bits):
    fmt = FORMATS[f"block{bits}"]
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * np.array(
        [[1], [1e-3], [50], [0]], np.float32
    )
    got = np.asarray(formats.round_to_block(jnp.array(x), fmt)).reshape(-1, 32)
    limit = 2 ** (bits - 1) - 1
    for block, row in zip(x.reshape(-1, 32), got, strict=True):
        peak = np.max(np.abs(block))
        step = 2.0 ** np.ceil(np.log2(peak / limit)) if peak > 0 else 1.0
        np.testing.assert_array_equal(row, np.clip(np.round(block / step), -limit, limit) * step)
    assert fmt.width == bits + 0.25
    np.testing.assert_array_equal(formats.round_to_block(jnp.array(got), fmt), got)


def test_range_lies_at_the_upper_end_of_narrow_floats():
    fmt = FORMATS["fp8_e4m3"]
    x = jnp.array([1e-4, -0.8e-4, 1e-6])
    rounded = formats.quantise(x, jnp.array(1e-4), fmt)
    np.testing.assert_allclose(rounded, x, rtol=2.0**-4)
    # Without the shift all of them are below the least number of the format.
    np.testing.assert_array_equal(formats.round_to_float(x, fmt), np.zeros(3))
    slope = jax.grad(lambda x: jnp.sum(formats.quantise(x, jnp.array(1.0), fmt)))(jnp.array([0.3, -0.9, 100.0]))
    np.testing.assert_array_equal(slope, [1.0, 1.0, 0.0])


def test_signs_by_hand():
    x, top = jnp.array([0.3, -0.9, 0.0, 1.0]), jnp.array(0.5)
    binary = FORMATS["binary"]
    np.testing.assert_array_equal(formats.quantise(x, top, binary), [0.5, -0.5, 0.5, 0.5])  # 2**round(log2(0.55))
    slope = jax.grad(lambda x: jnp.sum(formats.quantise(x, top, binary)))(x)
    np.testing.assert_array_equal(slope, [1.0, 0.0, 1.0, 0.0])
    assert bool(jnp.all(jnp.isfinite(formats.quantise(jnp.zeros(3), top, binary))))


def fn(params, x):
    return jax.nn.relu(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def setup(rule):
    keys = jax.random.split(KEY, 3)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (32, 64))},
        "second": {"kernel": jax.random.normal(keys[1], (64, 32))},
    }
    x = jax.random.normal(keys[2], (16, 32))
    precision, state = init_precision(fn, PrecisionRules({"*": rule}), params, x, loss=lambda out: jnp.mean(out**2))
    return params, x, precision, state


@pytest.mark.parametrize("name", ANY_OPERAND)
def test_a_rule_names_the_format_of_each_operand_and_error(name):
    params, x, precision, state = setup(LayerRule(name, 8, name, 6))
    width = FORMATS[name].width
    np.testing.assert_array_equal(precision.bits(), [[width, 8.0, width, 6.0]] * 2)
    assert precision.learned == ((False, False), (False, True))
    chex.assert_trees_all_equal(freeze(precision).bits(), precision.bits(), precision.clamped(2, 8).bits())
    chex.assert_trees_all_equal(freeze(precision).formats(state).top[:, 0], precision.formats(state).top[:, 0])

    def loss(params, precision, state, key):
        return jnp.mean(quantize(fn)(params, precision, state, key, x) ** 2)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    jitted = jax.jit(gradient)(params, precision, state, KEY)
    batched = jax.jit(jax.vmap(gradient, (None, None, None, 0)))(params, precision, state, jnp.stack([KEY, KEY]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), jitted, rtol=1e-4, atol=1e-5)
    exact = jax.grad(lambda p: jnp.mean(fn(p, x) ** 2))(params)
    for got, want in zip(jax.tree.leaves(jitted[0]), jax.tree.leaves(exact), strict=True):
        cosine = jnp.vdot(got, want) / jnp.linalg.norm(got) / jnp.linalg.norm(want)
        assert cosine > 0.9


def test_unknown_names_and_impossible_combinations_are_errors():
    with pytest.raises(
        ValueError, match=r"expected a format among fp16, bf16, .*, got 'fp4'; or give a width in bits .rule"
    ):
        setup(LayerRule("fp4"))
    for name in ("fp16", "binary"):
        with pytest.raises(ValueError, match=r"expected operands in bits for a multiplier of integers.*layer 'first'"):
            setup(LayerRule(name, learn=False, multiplier=BitSlices()))
    with pytest.raises(ValueError, match=r"got binary inputs or errors in the rule '\*'; give them a width"):
        setup(LayerRule("binary", "binary"))


def test_the_last_block_may_be_shorter():
    x = jax.random.normal(KEY, (5, 9))
    rounded = formats.round_to_block(x, FORMATS["block8"])
    np.testing.assert_array_equal(rounded.ravel()[32:], formats.round_to_block(x.ravel()[32:], FORMATS["block8"]))
