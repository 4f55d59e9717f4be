"""Chains and populations of a search as a sharded axis of a device mesh: several devices, of one process or of many."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "searched"


def make_mesh() -> Mesh:
    """All devices of all processes along one axis; `jax.distributed.initialize` comes before where there are several."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """The same values, which every process has, on every device; unchanged without a mesh."""
    if mesh is None:
        return tree

    def put(x: Any) -> jax.Array:
        is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        numbers = np.asarray(jax.random.key_data(x) if is_key else x)
        # Processes compare what they were given with what they hold: a double would not equal the float made of it.
        numbers = numbers.astype(jax.dtypes.canonicalize_dtype(numbers.dtype))
        placed = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec()))
        return jax.random.wrap_key_data(placed) if is_key else placed

    return jax.tree.map(put, tree)


def spread(tree: Any, mesh: Mesh | None, axis: int = -1) -> Any:
    """In a jitted function: arrays split along one axis, that of the chains or the chips."""
    if mesh is None:
        return tree

    def sharding(x: jax.Array) -> NamedSharding:
        names: list[str | None] = [None] * x.ndim
        names[axis] = AXIS
        return NamedSharding(mesh, PartitionSpec(*names))

    specs = jax.tree.map(sharding, tree)
    return jax.lax.with_sharding_constraint(tree, specs)


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """In a jitted function: arrays that every device has in full."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
