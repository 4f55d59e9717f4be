"""Operands stored without their zeros: what a bitmap costs, and what it saves in every memory."""

import dataclasses

import jax
import jax.numpy as jnp

from hw.accesses import Accesses


def stored_share(density: jax.Array, unit_bits: jax.Array | float) -> jax.Array:
    """Bits that are stored over those of the dense operand: those that are not zero and a bitmap, or all if that is less.

    Args:
      density: share of words or slices that are not zero, of any shape.
      unit_bits: width of what one bit of the map stands for.

    Returns:
      Share in (0, 1], of the shape of `density`.

    Source: one bit per unit, as in HNPU's and other zero-skipping cores; a run length never counts less than a bitmap
    above a density of some tenth.
    """
    return jnp.minimum(density + 1.0 / unit_bits, 1.0)


def store_sparse(accesses: Accesses, share: jax.Array) -> Accesses:
    """Accesses where each operand takes only a share of its bits, everywhere.

    Args:
      accesses: of `hw.accesses.count`.
      share: of weights, inputs and outputs, shape (3,), see `stored_share`; 1 where an operand is stored dense. That of
        an accumulated operand is 1: partial sums have no zeros to speak of.

    Returns:
      Accesses with fewer words of the stored width; MACs and cycles are as before, `density` of `hw.cost.price` thins
      those.
    """
    fields = ("reads", "fills", "updates", "finals", "footprint")
    return dataclasses.replace(accesses, **{name: getattr(accesses, name) * share[None] for name in fields})
