"""Where the iterations of a nest run: tiling factors in time and space, loop order, and what each level keeps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hw.operation import LOOPS, OPERANDS, Operation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mapping:
    """A loop nest over the memory levels, 0 innermost, L - 1 = DRAM.

    Outermost first: temporal[L-1], spatial[L-1], temporal[L-2], ..., temporal[0], spatial[0], MAC. The tile of a level
    is what its own loops and all below it span. Loops in the order of `hw.operation.LOOPS`.

    Attributes:
      temporal: iterations in time at each level, shape (L, 8), >= 1, real-valued while searching.
      spatial: fan-out below each level on the axes (X, Y), shape (L, 2, 8), >= 1.
      order: rank of each loop within its level, 0 = innermost, int32, shape (L, 8).
      keep: 1 where a level holds an operand and 0 where the operand passes it by, shape (L, 3).
    """

    temporal: jax.Array
    spatial: jax.Array
    order: jax.Array
    keep: jax.Array

    @property
    def num_levels(self) -> int:
        return self.temporal.shape[-2]

    def tiles(self) -> jax.Array:
        """Iterations of each loop within one tile of each level, shape (L, 8); an edge tile may hold fewer."""
        return jnp.cumprod(self.temporal * jnp.prod(self.spatial, axis=-2), axis=-2)


def make_mapping(operation: Operation, temporal, spatial=None, order=None, keep=None) -> Mapping:
    """Checks that concrete factors cover a nest and packs them.

    Args:
      operation: the nest, concrete.
      temporal: (L, 8) factors.
      spatial: (L, 2, 8) fan-out below each level; none by default.
      order: (L, 8) ranks, each level a permutation of 0..7, 0 innermost; by default S innermost, G outermost.
      keep: (L, 3) of 0 and 1; everything by default.

    Raises:
      ValueError: shapes disagree, a factor is below one or not finite, the factors of a loop do not cover its bound, an
        order is no permutation, or the outermost level does not keep every operand.
    """
    temporal = np.asarray(temporal, dtype=float)
    levels = len(temporal)
    spatial = np.ones((levels, 2, len(LOOPS))) if spatial is None else np.asarray(spatial, dtype=float)
    order = np.tile(np.arange(len(LOOPS))[::-1], (levels, 1)) if order is None else np.asarray(order)
    keep = np.ones((levels, len(OPERANDS))) if keep is None else np.asarray(keep, dtype=float)
    shapes = {
        "temporal": (levels, len(LOOPS)),
        "spatial": (levels, 2, len(LOOPS)),
        "order": (levels, len(LOOPS)),
        "keep": (levels, len(OPERANDS)),
    }
    for (name, shape), value in zip(shapes.items(), (temporal, spatial, order, keep), strict=True):
        if value.shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {value.shape}; levels come first, innermost = 0")
    for name, factors in (("temporal", temporal), ("spatial", spatial)):
        if not np.all(np.isfinite(factors) & (factors >= 1)):
            raise ValueError(f"expected {name} factors >= 1, got {factors.min()}; a loop that is absent has factor 1")
    covered = temporal.prod(0) * spatial.prod((0, 1))
    for loop, factors, bound in zip(LOOPS, covered, np.asarray(operation.bounds, float), strict=True):
        if factors < bound * (1 - 1e-6):  # float32 products of relaxed factors
            raise ValueError(f"expected the factors of {loop} to cover its bound {bound:g}, got {factors:g}; raise one")
    if not np.array_equal(np.sort(order, axis=1), np.tile(np.arange(len(LOOPS)), (levels, 1))):
        raise ValueError(f"expected each level's order to be a permutation of 0..7, got {order.tolist()}")
    if not (np.isin(keep, (0, 1)).all() and keep[-1].all()):
        raise ValueError(f"expected keep of 0 and 1 with ones at the outermost level, got {keep.tolist()}")
    dtype = operation.bounds.dtype
    return Mapping(
        temporal=jnp.asarray(temporal, dtype),
        spatial=jnp.asarray(spatial, dtype),
        order=jnp.asarray(order, jnp.int32),
        keep=jnp.asarray(keep, dtype),
    )


def outermost_mapping(operation: Operation, levels: int) -> Mapping:
    """The mapping that fits every chip: all loops run in time at the outermost level, every tile is one element."""
    ones = jnp.ones((levels, len(LOOPS)), operation.bounds.dtype)
    order = jnp.tile(jnp.arange(len(LOOPS), dtype=jnp.int32)[::-1], (levels, 1))
    return Mapping(
        temporal=ones.at[-1].set(operation.bounds),
        spatial=jnp.ones((levels, 2, len(LOOPS)), ones.dtype),
        order=order,
        keep=jnp.ones((levels, len(OPERANDS)), ones.dtype),
    )
