"""Words moved between memory levels: what executing the loop nest would count, as a closed form.

The conventions, each with a worked example, are in docs/conventions.md. All formulas hold for one nest under one
mapping; batch them with `jax.vmap`. Factors may be real-valued: a loop is then present by a smooth gate from 1 to 2.
"""

from dataclasses import dataclass
from typing import NamedTuple

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


class Conventions(NamedTuple):
    """What models differ in.

    Attributes:
      halo_reuse: a buffer keeps what neighbouring windows share while the innermost loop that moves them advances.
      gaps: a tile of inputs is the bounding box of its windows; without, inputs that no window touches are left out.
    """

    halo_reuse: bool = True
    gaps: bool = True


TIMELOOP = Conventions()
ZIGZAG = Conventions(halo_reuse=False, gaps=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accesses:
    """Words per instance over the whole nest; the total is times `instances`. Operands in the order of `OPERANDS`.

    Attributes:
      reads: words read for the level below (or the MACs), and to add to partial sums, shape (L, 3).
      fills: words written from the level above, shape (L, 3).
      updates: words of the accumulated operand written from below, shape (L, 3).
      entering: words of all tiles that pass through; an accumulated operand drains as many, shape (L, 3).
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
    entering: jax.Array
    finals: jax.Array
    footprint: jax.Array
    keep: jax.Array
    fanout: jax.Array
    instances: jax.Array
    compute_cycles: jax.Array
    macs: jax.Array


def count(operation: Operation, mapping: Mapping, conventions: Conventions = TIMELOOP) -> Accesses:
    """Counts what every level reads and writes while a nest runs under a mapping.

    Args:
      operation: the nest.
      mapping: its tiling, order and kept operands.
      conventions: what a tile of inputs holds and keeps; static.

    Returns:
      Counts in words, exact for integer factors and continuous in real-valued ones.

    Source: the conventions are those of Timeloop (Parashar et al., ISPASS 2019), rederived and checked point by point.
    """
    fan_out = jnp.prod(mapping.spatial, axis=1)
    traffic = _tile_traffic(operation, mapping, fan_out, conventions)
    accessed = _accesses_from_below(operation, mapping, fan_out, traffic.entering)

    top = jnp.arange(mapping.num_levels)[:, None] == mapping.num_levels - 1
    summed = jnp.where(operation.accumulated[None] > 0.5, mapping.keep, 0.0)
    read_only = mapping.keep - summed
    copies = jnp.prod(jnp.where(RELEVANT[None], 1.0, _above(fan_out)[:, None]), axis=-1)
    return Accesses(
        reads=read_only * accessed + summed * (accessed - traffic.first_touched),
        fills=jnp.where(top, 0.0, read_only * traffic.entering + summed * (traffic.entering - traffic.first_entering)),
        updates=summed * accessed,
        entering=mapping.keep * traffic.entering,
        finals=summed * traffic.first_touched * (1.0 - _present(copies)),
        footprint=mapping.keep * traffic.footprint,
        keep=mapping.keep,
        fanout=mapping.fan_out_used(),
        instances=jnp.prod(_above(fan_out), axis=-1),
        compute_cycles=jnp.prod(mapping.temporal),
        macs=operation.macs,
    )


class _Traffic(NamedTuple):
    """Words of one instance, each (L, 3): its tile, all that enter, those of first visits, and those then touched."""

    footprint: jax.Array
    entering: jax.Array
    first_entering: jax.Array
    first_touched: jax.Array


def _tile_traffic(operation: Operation, mapping: Mapping, fan_out: jax.Array, conventions: Conventions) -> _Traffic:
    tiles = jnp.minimum(mapping.tiles(), operation.bounds[None])
    exists = operation.bounds[None] / (tiles * _above(mapping.temporal * fan_out))  # 1 if factors divide the bounds
    steps = mapping.tiles() / mapping.temporal
    loops = [_level_loops(t, o) for t, o in zip(mapping.temporal, mapping.order, strict=True)]
    below = jnp.ones_like(tiles[0])
    levels = []
    for l, tile in enumerate(tiles):
        extents = (
            _extents(operation, tile) if conventions.gaps else _distinct_windows(operation, tile, jnp.ones_like(tile))
        )
        pattern = _pattern(operation, tile, below)
        below = jnp.where(mapping.keep[l, 1] > 0.5, tile, below)
        boxed = _product(_BOXED, tile)
        runs, touched_runs = [], []
        for factors, step in zip(mapping.temporal[l + 1 :], steps[l + 1 :], strict=True):
            offset = jnp.stack([operation.stride * step[_OUTPUTS], operation.dilation * step[_TAPS]])
            n = factors[_OUTPUTS.start :].reshape(2, 2)
            new = jnp.minimum(offset, extents[None]) if conventions.halo_reuse else extents[None]
            entered = extents[None] + (n - 1.0) * new
            runs.append(_runs(factors, extents, entered))
            touched = pattern.touched[None] + (n - 1.0) * pattern.last(offset)
            touched_runs.append(_runs(factors, pattern.touched, touched))
        visits, first_entering = _visits(loops[l + 1 :], runs, extents)
        _, first_touched = _visits(loops[l + 1 :], touched_runs, pattern.touched)
        boxed_moved = boxed * _product(RELEVANT, exists[l])
        levels.append(
            _Traffic(
                boxed * jnp.where(_INPUTS, jnp.prod(extents), 1.0),
                boxed_moved * visits,
                boxed_moved * first_entering,
                boxed_moved * first_touched,
            )
        )
    return _Traffic(*(jnp.stack(column) for column in zip(*levels, strict=True)))


def _visits(loops: list, runs: list, extents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tiles that enter, and first visits among them, seen from below the given levels (innermost first), each (3,).

    Walks outwards: loops that do not move an operand cost nothing until one that does has been met; the first one that
    moves the inputs lets neighbouring windows share their halo.
    """
    window = jnp.where(_INPUTS, jnp.prod(extents), 1.0)
    waiting, inside = jnp.ones_like(window), jnp.ones_like(window)
    visits, first = jnp.zeros_like(window), jnp.zeros_like(window)
    relevant_outside = [jnp.ones_like(window)]
    cycles_outside = [jnp.ones_like(window[0])]
    for level in loops[:0:-1]:
        relevant_outside.insert(0, relevant_outside[0] * level.relevant)
        cycles_outside.insert(0, cycles_outside[0] * level.cycles)
    for m, (level, run) in enumerate(zip(loops, runs, strict=True)):
        words = jnp.where(_INPUTS[:, None], run[None], level.factors[None])
        met = level.first * words
        others = level.entered[:, None] / level.factors[None]
        visits = visits + waiting * inside * cycles_outside[m] * jnp.sum(met * others, axis=-1)
        others = level.relevant[:, None] / level.factors[None]
        first = first + waiting * inside * relevant_outside[m] * jnp.sum(met * others, axis=-1)
        waiting = waiting * (1.0 - jnp.sum(level.first, axis=-1))
        inside = inside * level.relevant
    return visits + waiting * inside * window, first + waiting * inside * window


def _runs(factors: jax.Array, tile: jax.Array, slid: jax.Array) -> jax.Array:
    """Input words that enter over the run of each loop when it is the one that gets the credit, shape (8,)."""
    return jnp.concatenate([factors[: _OUTPUTS.start] * jnp.prod(tile), (slid * tile[::-1][None]).ravel()])


class _LevelLoops(NamedTuple):
    """The temporal loops of one level as each operand sees them.

    Attributes:
      factors: iterations, shape (8,).
      first: 1 at the innermost loop that moves the operand, shape (3, 8).
      entered: iterations, without the loops inside of that one, shape (3,).
      relevant: iterations of the loops that move the operand, shape (3,).
      cycles: all iterations, shape ().
    """

    factors: jax.Array
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
        factors=factors,
        first=moving * still,
        entered=jnp.prod(repeats, axis=-1),
        relevant=_product(RELEVANT, factors),
        cycles=jnp.prod(factors),
    )


class _Pattern(NamedTuple):
    """Inputs that products touch along width and height, each (2,): runs of `run` words, one every `period`."""

    run: jax.Array
    period: jax.Array
    touched: jax.Array

    def last(self, words: jax.Array) -> jax.Array:
        """Touched words among the last `words` of the box."""
        run, period = jnp.minimum(self.run, self.period)[None], self.period[None]
        whole = jnp.floor(words / period)
        return jnp.minimum(self.touched[None], whole * run + jnp.minimum(run, words - whole * period))


def _pattern(operation: Operation, tile: jax.Array, below: jax.Array) -> _Pattern:
    """What the boxes of the tiles `below` cover within a tile; exact unless stride and dilation both exceed one."""
    m, n = tile[_OUTPUTS] / below[_OUTPUTS], tile[_TAPS] / below[_TAPS]
    a, b = operation.stride * below[_OUTPUTS], operation.dilation * below[_TAPS]

    def slide(extent: jax.Array, number: jax.Array, step: jax.Array) -> jax.Array:
        return extent + (number - 1.0) * jnp.minimum(step, extent)

    run = slide(_extents(operation, below), jnp.where(a < b, m, n), jnp.minimum(a, b))
    period = jnp.maximum(a, b)
    return _Pattern(run, period, slide(run, jnp.where(a < b, n, m), period))


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
