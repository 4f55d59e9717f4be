"""Batches for formulas that are written with the batch as the last axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
        trailing = jax.tree.map(
            lambda x, is_batched: jnp.moveaxis(x, 0, -1) if is_batched else x[..., None], arguments, tuple(in_batched)
        )
        result = jax.tree.map(
            lambda x: jnp.moveaxis(jnp.broadcast_to(x, (*x.shape[:-1], axis_size)), -1, 0), function(*trailing)
        )
        return result, jax.tree.map(lambda _: True, result)

    return alone


def in_chunks(function: Callable, size: int) -> Callable:
    """Applies a batched function to pieces of the leading axis in turn, so that its temporaries stay in the cache.

    Args:
      function: takes and returns pytrees with a leading batch axis.
      size: rows per piece, at most; the batch is split into equal pieces, so it should have a divisor near this size.

    Returns:
      A function of the same batch, for CPUs; on an accelerator one pass over the whole batch is faster.
    """

    def chunked(*arguments: Any) -> Any:
        rows = jax.tree.leaves(arguments)[0].shape[0]
        pieces = next(n for n in range(-(-rows // size), rows + 1) if rows % n == 0)
        split = jax.tree.map(lambda x: x.reshape(pieces, rows // pieces, *x.shape[1:]), arguments)
        result = jax.lax.map(lambda piece: function(*piece), split)
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), result)

    return chunked
