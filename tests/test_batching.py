"""Layouts of batches: whatever the layout, every row has the result that it has alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hw.batching import batch_last, into_blocks, out_of_blocks


def batch(rows):
    numbers = np.arange(rows * 12, dtype=np.float32).reshape(rows, 4, 3)
    return {"matrix": jnp.asarray(numbers), "scalar": jnp.asarray(numbers[:, 0, 0])}


@pytest.mark.parametrize(
    ("rows", "size", "shape"), [(12, 4, (3, 4)), (12, 5, (3, 4)), (7, 3, (7, 1)), (5, 128, (1, 5))]
)
def test_blocks_are_equal_and_hold_all_rows(rows, size, shape):
    given = batch(rows)
    blocks = into_blocks(given, size)
    assert blocks["scalar"].shape == shape and blocks["matrix"].shape == (shape[0], 4, 3, shape[1])
    jax.tree.map(np.testing.assert_array_equal, out_of_blocks(blocks), given)
    np.testing.assert_array_equal(blocks["matrix"][1 % shape[0], ..., 0], given["matrix"][shape[1] % rows])


def test_blocks_are_mapped_row_by_row():
    def row(tree):
        return {"product": tree["matrix"] @ jnp.ones(3) * tree["scalar"], "sum": tree["matrix"].sum()}

    given = batch(12)
    expected = jax.vmap(row)(given)
    of_a_block = jax.vmap(row, in_axes=-1, out_axes=-1)
    found = out_of_blocks(jax.lax.map(of_a_block, into_blocks(given, 4)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_function_of_a_trailing_batch_is_one_of_any_axis():
    @batch_last
    def scaled(matrix, factor):
        assert matrix.shape[:2] == (4, 3) and factor.ndim == 1
        return matrix * factor[None, None]

    tree = batch(5)
    expected = np.asarray(tree["matrix"]) * np.asarray(tree["scalar"])[:, None, None]
    np.testing.assert_array_equal(scaled(tree["matrix"][2], tree["scalar"][2]), expected[2])
    np.testing.assert_array_equal(jax.jit(jax.vmap(scaled))(tree["matrix"], tree["scalar"]), expected)
    trailing = jax.vmap(scaled, in_axes=(-1, 0), out_axes=-1)(jnp.moveaxis(tree["matrix"], 0, -1), tree["scalar"])
    np.testing.assert_array_equal(jnp.moveaxis(trailing, -1, 0), expected)
    # One vmap in the other, and a value that is shared.
    twice = jax.vmap(jax.vmap(scaled, in_axes=(0, None)), in_axes=(None, 0))(tree["matrix"], tree["scalar"])
    np.testing.assert_array_equal(twice[3], np.asarray(tree["matrix"]) * float(tree["scalar"][3]))
