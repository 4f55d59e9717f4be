"""Batches for formulas that are written with the batch as the last axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def batch_last(function: Callable) -> Callable:
    """Turns a function of arrays with a trailing batch axis into one of arrays without, to be batched by `jax.vmap`.

    Wherever the mapped axis is, it becomes the last one: vectors then run over the batch, in one pass over memory.

    Args:
      function: takes pytrees of arrays whose last axis is the batch, or of size one where a value is shared; returns a
        pytree of such arrays.
    """

    @jax.custom_batching.custom_vmap
    def alone(*arguments: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[..., None], arguments))
        return jax.tree.map(lambda x: x[..., 0], result)

    @alone.def_vmap
    def batched(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        def trail(x: jax.Array, is_batched: bool) -> jax.Array:
            moved = jnp.moveaxis(x, 0, -1) if is_batched else x[..., None]
            # Else XLA relabels the axes and leaves the batch where it was in memory.
            return with_layout_constraint(moved, Layout(tuple(range(moved.ndim))))

        trailing = jax.tree.map(trail, arguments, tuple(in_batched))
        result = jax.tree.map(
            lambda x: jnp.moveaxis(jnp.broadcast_to(x, (*x.shape[:-1], axis_size)), -1, 0), function(*trailing)
        )
        return result, jax.tree.map(lambda _: True, result)

    return alone


def into_blocks(batch: Any, size: int) -> Any:
    """Lays a batch out in blocks, as a CPU evaluates it fastest: a block's temporaries stay in the cache of a core.

    Within a block the batch is the last axis, so that vectors run over it and nothing is transposed on the way.

    Args:
      batch: pytree of arrays with a leading batch axis, (B, ...).
      size: rows per block, at most; blocks are equal, so the batch should have a divisor near this size.

    Returns:
      The same rows as (blocks, ..., rows), for `jax.lax.map` of a function of a block.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    blocks = next(n for n in range(-(-rows // size), rows + 1) if rows % n == 0)
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(blocks, rows // blocks, *x.shape[1:]), 1, -1), batch)


def out_of_blocks(blocks: Any) -> Any:
    """Undoes `into_blocks`: (blocks, ..., rows) -> (B, ...)."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1]), blocks)
