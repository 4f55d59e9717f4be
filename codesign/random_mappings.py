"""Random mappings of a space: the control that a search has to beat.

The sampler gives every prime factor of every loop bound to one of the places where the loop may run (a level in time, or
an axis of a fan-out), each equally likely and independently, and orders the loops of every level uniformly. A draw that
exceeds a fan-out or a capacity is thrown away and not counted.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from codesign.mapspace import IDLE, INPUTS, Array, C, Counts, G, Limits, N, Nest, P, Price, Q, R, S, Space, make_rows
from hw.accesses import Accesses, count
from hw.mapping import Mapping
from hw.operation import LOOPS

_BLOCK = 4096
"""Mappings drawn at once, and counted at once: one shape, one compilation."""


class Draws(NamedTuple):
    """Mappings, not yet known to fit: factors (n, L, 8) and (n, L, 2, 8), ranks (n, L, 8)."""

    temporal: Array
    spatial: Array
    order: NDArray[np.int32]

    def take(self, chosen: NDArray[np.intp]) -> Draws:
        return Draws(self.temporal[chosen], self.spatial[chosen], self.order[chosen])


def draw(nest: Nest, space: Space, limits: Limits, rng: np.random.Generator, number: int, widest: bool) -> Draws:
    """Random mappings; `widest` gives fan-outs the largest divisor that fits first, and draws the rest."""
    levels = space.num_levels
    temporal, spatial = np.ones((number, levels, len(LOOPS))), np.ones((number, levels, 2, len(LOOPS)))
    for d, bound in enumerate(nest.bounds):
        rest = bound
        axes = [(l, a) for l in range(levels) for a in range(2) if space.spatial[l, a, d]]
        places: list[tuple[int, int | None]] = [(l, None) for l in range(levels) if space.temporal[l, d]]
        if widest:
            for l, a in axes:
                largest = max(f for f in range(1, int(limits.fanout[l, a]) + 1) if rest % f == 0)
                spatial[:, l, a, d], rest = largest, rest // largest
        else:
            places += axes
        for prime in prime_factors(rest):
            chosen = rng.integers(len(places), size=number)
            for i, (l, axis) in enumerate(places):
                factor = np.where(chosen == i, prime, 1)
                if axis is None:
                    temporal[:, l, d] *= factor
                else:
                    spatial[:, l, axis, d] *= factor
    order = np.argsort(rng.random((number, levels, len(LOOPS))), axis=-1).astype(np.int32)
    return Draws(temporal, spatial, order)


def fitting(nest: Nest, space: Space, limits: Limits, draws: Draws) -> NDArray[np.intp]:
    """Indices of the draws that exceed neither a fan-out nor a capacity."""
    fits = (draws.spatial.prod(axis=-1) <= limits.fanout).all(axis=(1, 2))
    spanned = np.cumprod(draws.temporal * draws.spatial.prod(axis=2), axis=1)
    for l, widths in space.limited.items():
        used = sum(width * _tile(nest, spanned[:, l], operand) for operand, width in widths)
        fits &= used <= limits.capacity[l]
    return np.flatnonzero(fits)


def _tile(nest: Nest, spanned: Array, operand: int) -> Array:
    """Words of tiles that span (n, 8) iterations."""
    if operand != INPUTS:
        return spanned[:, [d for d in range(len(LOOPS)) if d not in IDLE[operand]]].prod(axis=-1)
    extents = (spanned[:, [P, Q]] - 1) * nest.stride + (spanned[:, [R, S]] - 1) * nest.dilation + 1
    return spanned[:, [G, N, C]].prod(axis=-1) * extents.prod(axis=-1)


class Sampled(NamedTuple):
    """Valid mappings in the order they were drawn.

    Attributes:
      costs: (m, n).
      draws: the mappings.
      drawn: how many it took, those that do not fit included.
    """

    costs: Array
    draws: Draws
    drawn: int


def sample(
    nest: Nest,
    space: Space,
    price: Price,
    limits: Limits,
    rng: np.random.Generator,
    number: int,
    *,
    widest: bool = False,
    most: int = 50 * _BLOCK,
) -> Sampled:
    """Draws until `number` mappings fit, or `most` were drawn; there may be none."""
    kept: list[Draws] = []
    drawn = 0
    while sum(len(d.temporal) for d in kept) < number and drawn < most:
        draws = draw(nest, space, limits, rng, _BLOCK, widest)
        kept.append(draws.take(fitting(nest, space, limits, draws)))
        drawn += _BLOCK
    draws = Draws(*(np.concatenate(parts)[:number] for parts in zip(*kept, strict=True)))
    return Sampled(price(count_draws(nest, space, draws)), draws, drawn)


def count_draws(nest: Nest, space: Space, draws: Draws) -> Counts:
    """Exact counts of mappings, in blocks of one shape."""
    number, blocks = len(draws.temporal), []
    if not number:
        rows = make_rows(nest, space)
        return Counts(rows, np.empty((len(rows), 0)), nest.accumulated)
    with jax.enable_x64(True):
        operation = nest.operation()
        keep = jnp.broadcast_to(jnp.asarray(space.keep, float), (_BLOCK, *space.keep.shape))
        for start in range(0, number, _BLOCK):
            part = draws.take(np.arange(start, start + _BLOCK) % number)
            mapping = Mapping(jnp.asarray(part.temporal), jnp.asarray(part.spatial), jnp.asarray(part.order), keep)
            blocks.append(jax.tree.map(np.asarray, _counted()(operation, mapping)))
    accesses: Accesses = jax.tree.map(lambda *x: np.concatenate(x)[:number], *blocks)
    return Counts.of(accesses, nest, space)


def prime_factors(number: int) -> list[int]:
    """In rising order.

    >>> prime_factors(360)
    [2, 2, 2, 3, 3, 5]
    """
    factors, p = [], 2
    while p * p <= number:
        while number % p == 0:
            factors.append(p)
            number //= p
        p += 1
    return factors + [number] * (number > 1)


@functools.cache
def _counted():
    return jax.jit(jax.vmap(count, in_axes=(None, 0)))
