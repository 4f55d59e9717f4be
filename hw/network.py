"""The on-chip network: wires between a memory and the tiles that it feeds, as long as the areas between them ask.

A level's tiles, each with all that lies below it, are squares side by side in columns and rows, the memory at a corner.
A hop leads from one tile to the next. There are no routers: words travel on buses, as in published arrays of MACs.
"""

import jax
import jax.numpy as jnp

from hw.technology import Technology


def hop_length(tile_area: jax.Array) -> jax.Array:
    """Metres from one tile to the next, the side of a square of `tile_area` in m2; both of shape ()."""
    return jnp.sqrt(tile_area)


def hop_energy(technology: Technology, vdd: jax.Array, tile_area: jax.Array) -> jax.Array:
    """Joules per bit and hop, shape (): energy per length of wire times the length of a hop.

    Args:
      technology: constants.
      vdd: supply of the wires' drivers in volts, shape ().
      tile_area: area of a tile in m2, shape ().

    Source: Keckler et al., IEEE Micro 2011, for the energy per length (hw/data/logic.yaml); lengths by geometry.
    """
    return technology["wire.energy"] * vdd**2 * hop_length(tile_area)


def mean_hops(fanout: jax.Array) -> jax.Array:
    """Hops from the memory to a tile along columns and rows, the mean over all tiles, shape ().

    A single tile is one hop away. A word that several tiles share counts as one that goes to one of them: they are
    taken to lie on its way. So a broadcast over both axes is told too cheap, a row or column of receivers is not by much.

    Args:
      fanout: tiles per axis (columns, rows), shape (2,), real-valued while searching.
    """
    return 0.5 * fanout.sum()


def delivery_energy(technology: Technology, vdd: jax.Array, tile_area: jax.Array, fanout: jax.Array) -> jax.Array:
    """Joules to carry one bit between a memory and a tile, shape (): energy per hop times the mean number of hops.

    Args:
      technology: constants.
      vdd: supply of the wires' drivers in volts, shape ().
      tile_area: area of a tile in m2, shape ().
      fanout: tiles per axis (columns, rows), shape (2,).
    """
    return hop_energy(technology, vdd, tile_area) * mean_hops(fanout)
