"""Words moved between memory levels: what executing the loop nest would count, as a closed form.

The conventions, each with a worked example, are in docs/conventions.md. All formulas hold for one nest under one
mapping; batch them with `jax.vmap`. Factors may be real-valued: a loop is then present by a smooth gate from 1 to 2.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hw.mapping import Mapping
from hw.operation import LOOPS, RELEVANT, Operation

_OUTPUTS = slice(LOOPS.index("P"), LOOPS.index("Q") + 1)
_TAPS = slice(LOOPS.index("R"), LOOPS.index("S") + 1)
_SLIDING = np.array([loop in "PQRS" for loop in LOOPS])
_INPUTS = np.array([False, True, False])
_BOXED = RELEVANT & ~(_INPUTS[:, None] & _SLIDING)
"""Loops whose factor multiplies the words of a tile; those of the input window enter by its extents."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accesses:
    """Words per instance over the whole nest; the total is times `instances`. Operands in the order of `OPERANDS`.

    Attributes:
      reads: words read for the level below (or the MACs), and to add to partial sums, shape (L, 3).
      fills: words written from the level above, shape (L, 3).
      updates: words of the accumulated operand written from below, shape (L, 3).
      finals: those of `updates` that are complete sums, and so have the width of the stored operand, shape (L, 3).
      footprint: words of the largest tile, zero where the operand is not kept, shape (L, 3).
      keep: 1 where the operand is kept, shape (L, 3).
      fanout: instances fed below each level on the axes (X, Y), shape (L, 2).
      instances: utilised instances of each level, shape (L,).
      compute_cycles: iterations in time, the product slots of one MAC, shape ().
      macs: products of the nest over all MACs, shape (); never more than the nest has.
    """

    reads: jax.Array
    fills: jax.Array
    updates: jax.Array
    finals: jax.Array
    footprint: jax.Array
    keep: jax.Array
    fanout: jax.Array
    instances: jax.Array
    compute_cycles: jax.Array
    macs: jax.Array


def count(operation: Operation, mapping: Mapping) -> Accesses:
    """Counts what every level reads and writes while a nest runs under a mapping.

    Args:
      operation: the nest.
      mapping: its tiling, order and kept operands.

    Returns:
      Counts in words, exact for integer factors and continuous in real-valued ones.

    Source: the conventions are those of Timeloop (Parashar et al., ISPASS 2019), rederived and checked point by point.
    """
    fan_out = jnp.prod(mapping.spatial, axis=1)
    footprint, entering, first_entering = _tile_traffic(operation, mapping, fan_out)
    accessed = _accesses_from_below(operation, mapping, fan_out, entering)

    top = jnp.arange(mapping.num_levels)[:, None] == mapping.num_levels - 1
    summed = jnp.where(operation.accumulated[None] > 0.5, mapping.keep, 0.0)
    read_only = mapping.keep - summed
    copies = jnp.prod(jnp.where(RELEVANT[None], 1.0, _above(fan_out)[:, None]), axis=-1)
    return Accesses(
        reads=read_only * accessed + summed * (accessed - first_entering),
        fills=jnp.where(top, 0.0, read_only * entering + summed * (entering - first_entering)),
        updates=summed * accessed,
        finals=summed * first_entering * (1.0 - _present(copies)),
        footprint=mapping.keep * footprint,
        keep=mapping.keep,
        fanout=mapping.fan_out_used(),
        instances=jnp.prod(_above(fan_out), axis=-1),
        compute_cycles=jnp.prod(mapping.temporal),
        macs=operation.macs,
    )


def _tile_traffic(operation: Operation, mapping: Mapping, fan_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Words of one tile, words that enter one instance, and those of its first visit to each tile, each (L, 3)."""
    tiles = jnp.minimum(mapping.tiles(), operation.bounds[None])
    exists = operation.bounds[None] / (tiles * _above(mapping.temporal * fan_out))  # 1 if factors divide the bounds
    steps = mapping.tiles() / mapping.temporal
    loops = [_level_loops(t, o) for t, o in zip(mapping.temporal, mapping.order, strict=True)]
    footprint, entering, first_entering = [], [], []
    for l, tile in enumerate(tiles):
        extents = _extents(operation, tile)
        words = _product(_BOXED, tile) * jnp.where(_INPUTS, jnp.prod(extents), 1.0)
        credit = [_halo_credit(operation, extents, t, s) for t, s in zip(mapping.temporal, steps, strict=True)]
        visits, first_visits = _visits(loops[l + 1 :], credit[l + 1 :], words)
        words_moved = words * _product(RELEVANT, exists[l])
        footprint.append(words)
        entering.append(words_moved * visits)
        first_entering.append(words_moved * first_visits)
    return jnp.stack(footprint), jnp.stack(entering), jnp.stack(first_entering)


def _visits(loops: list, credit: list, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tiles that enter, and first visits among them, seen from below the given levels (innermost first), each (3,).

    Walks outwards: loops that do not move an operand cost nothing until one that does has been met; the first one that
    moves the inputs lets neighbouring windows share their halo.
    """
    waiting, inside = jnp.ones_like(like), jnp.ones_like(like)
    visits, first_share = jnp.zeros_like(like), jnp.zeros_like(like)
    for m, (level, shared) in enumerate(zip(loops, credit, strict=True)):
        met = jnp.sum(level.first * jnp.where(_INPUTS[:, None], shared[None], 1.0), axis=-1)
        outside = jnp.ones_like(like[0])
        for outer in loops[m + 1 :]:
            outside = outside * outer.cycles
        visits = visits + waiting * inside * met * level.entered * outside
        first_share = first_share + waiting * met
        waiting = waiting * (1.0 - jnp.sum(level.first, axis=-1))
        inside = inside * level.relevant
    return visits + waiting * inside, inside * (first_share + waiting)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _LevelLoops:
    """The temporal loops of one level as each operand sees them.

    Attributes:
      first: 1 at the innermost loop that moves the operand, shape (3, 8).
      entered: iterations, without the loops inside of that one, shape (3,).
      relevant: iterations of the loops that move the operand, shape (3,).
      cycles: all iterations, shape ().
    """

    first: jax.Array
    entered: jax.Array
    relevant: jax.Array
    cycles: jax.Array


def _level_loops(factors: jax.Array, rank: jax.Array) -> _LevelLoops:
    moving = jnp.where(RELEVANT, _present(factors)[None], 0.0)
    is_inside = rank[None, :] < rank[:, None]
    still = jnp.prod(jnp.where(is_inside[None], 1.0 - moving[:, None, :], 1.0), axis=-1)
    repeats = jnp.where(RELEVANT, factors[None], 1.0 + (1.0 - still) * (factors[None] - 1.0))
    return _LevelLoops(
        first=moving * still,
        entered=jnp.prod(repeats, axis=-1),
        relevant=_product(RELEVANT, factors),
        cycles=jnp.prod(factors),
    )


def _halo_credit(operation: Operation, extents: jax.Array, factors: jax.Array, steps: jax.Array) -> jax.Array:
    """Share of the input tiles that enters when a loop slides the window and the overlap stays in place, shape (8,)."""
    offset = jnp.concatenate([operation.stride * steps[_OUTPUTS], operation.dilation * steps[_TAPS]])
    new = jnp.minimum(1.0, offset / jnp.concatenate([extents, extents]))
    slides = factors[_OUTPUTS.start :]
    share = (1.0 + (slides - 1.0) * new) / slides
    return jnp.concatenate([jnp.ones_like(factors[: _OUTPUTS.start]), share])


def _accesses_from_below(operation: Operation, mapping: Mapping, fan_out: jax.Array, entering: jax.Array) -> jax.Array:
    """Words that the next level below that keeps an operand, or the MACs, ask of one instance, shape (L, 3).

    One access serves all instances below that want the same word, through levels that do not keep it as well.
    """
    steps = mapping.tiles() / (mapping.temporal * fan_out)
    demand = jnp.ones_like(entering[0]) * operation.macs / jnp.prod(fan_out)
    accessed = []
    for l in range(mapping.num_levels):
        windows = jnp.prod(_distinct_windows(operation, fan_out[l], steps[l]))
        demand = demand * _product(_BOXED, fan_out[l]) * jnp.where(_INPUTS, windows, 1.0)
        accessed.append(demand)
        demand = jnp.where(mapping.keep[l] > 0.5, entering[l], demand)
    return jnp.stack(accessed)


def _distinct_windows(operation: Operation, fan_out: jax.Array, steps: jax.Array) -> jax.Array:
    """Distinct input windows among m outputs x n taps side by side, along width and height, shape (2,).

    They start at ``i * a + j * b``, i < m, j < n. Two pairs start at the same input when they differ by a multiple of
    ``(b, -a) / gcd(a, b)``: the diagonals of the fan-out. Windows that overlap in part are each read in full.
    """
    m, n = fan_out[_OUTPUTS], fan_out[_TAPS]
    a, b = operation.stride * steps[_OUTPUTS], operation.dilation * steps[_TAPS]
    divisor = _common_divisor(a, b)
    return m * n - jnp.maximum(0.0, m - b / divisor) * jnp.maximum(0.0, n - a / divisor)


def _common_divisor(a: jax.Array, b: jax.Array) -> jax.Array:
    """Greatest common divisor by Euclid, unrolled: 12 divisions suffice while the smaller number is below 233."""
    a, b = jax.lax.stop_gradient((a, b))
    for _ in range(12):
        remainder = jnp.where(b > 0.5, a - b * jnp.floor(a / jnp.maximum(b, 1.0)), 0.0)
        a, b = jnp.where(b > 0.5, b, a), remainder
    return a


def _extents(operation: Operation, tile: jax.Array) -> jax.Array:
    """Inputs that a tile spans along width and height, shape (2,): the bounding box of its windows."""
    return (tile[_OUTPUTS] - 1.0) * operation.stride + (tile[_TAPS] - 1.0) * operation.dilation + 1.0


def _present(factor: jax.Array) -> jax.Array:
    """Gate of a loop: 0 at a factor of 1, 1 from 2 on, with a continuous slope between."""
    x = jnp.clip(factor - 1.0, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _product(mask: np.ndarray, factors: jax.Array) -> jax.Array:
    """Product of the factors in each row of a mask, shape (3,)."""
    return jnp.prod(jnp.where(mask, factors[None], 1.0), axis=-1)


def _above(factors: jax.Array) -> jax.Array:
    """Products of the factors of all levels above each level, (L, ...) -> (L, ...)."""
    inclusive = jnp.cumprod(factors[::-1], axis=0)[::-1]
    return jnp.concatenate([inclusive[1:], jnp.ones_like(inclusive[:1])])
