"""Words moved between memory levels: what executing the loop nest would count, as a closed form.

The conventions, each with a worked example, are in docs/conventions.md. Everything is written for one nest under one
mapping, in scalars, unrolled over the few levels and loops: under `jax.vmap` each scalar becomes one vector over the
batch, and XLA fuses them; the same formulas over array axes of 8 loops run twenty times slower.

Factors may be real-valued: a loop is then present by a smooth gate between a factor of 1 and of 2.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, RELEVANT, Operation
from hw.windows import box_extent, distinct_offsets, touched_extent

_G, _N, _K, _C, _P, _Q, _R, _S = range(len(LOOPS))
_WEIGHTS, _INPUTS, _OUTPUTS = range(len(OPERANDS))
_MOVES = [tuple(int(d) for d in np.flatnonzero(row)) for row in RELEVANT]
_IDLE = [tuple(int(d) for d in np.flatnonzero(~row)) for row in RELEVANT]
"""Loops that move each operand, and those that do not."""
_BOXED = (_G, _N, _C)
"""Loops of the inputs that multiply the words of a tile; the others slide its window."""
_SLIDES = {_P: 0, _Q: 1, _R: 0, _S: 1}
"""Those that slide it, and along which axis: width or height."""

Scalars = tuple[jax.Array, ...]


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
    bounds = tuple(operation.bounds[d] for d in range(len(LOOPS)))
    # Without the barriers XLA's fusion on CPU recomputes each stage for every value that is taken from it.
    levels = jax.lax.optimization_barrier(_levels(bounds, mapping))
    words = jax.lax.optimization_barrier(
        (
            _tile_words(bounds, levels, _WEIGHTS),
            _window_words(operation, bounds, levels, conventions),
            _tile_words(bounds, levels, _OUTPUTS),
        )
    )
    counts = [
        [
            _level_accesses(of_operand[l], level, o, operation.accumulated[o], l == mapping.num_levels - 1)
            for o, of_operand in enumerate(words)
        ]
        for l, level in enumerate(levels)
    ]
    reads, fills, updates, entering, finals, footprint = (
        jnp.stack([jnp.stack([operand[kind] for operand in level]) for level in counts]) for kind in range(6)
    )
    return Accesses(
        reads=reads,
        fills=fills,
        updates=updates,
        entering=entering,
        finals=finals,
        footprint=footprint,
        keep=mapping.keep,
        fanout=mapping.fan_out_used(),
        instances=jnp.stack([_product(level.fan_out_above) for level in levels]),
        compute_cycles=_product(map(operator.mul, levels[0].temporal, levels[0].temporal_above)),
        macs=operation.macs,
    )


class _Sweep(NamedTuple):
    """The temporal loops of one level as one operand sees them.

    Attributes:
      still: 1 if none of them moves the operand.
      relevant: iterations of those that move it.
      repeats: iterations of those that do not, and run outside of one that does.
      first: for each loop that slides the input window, 1 if it is the innermost that moves the inputs.
    """

    still: jax.Array
    relevant: jax.Array
    repeats: jax.Array
    first: dict[int, jax.Array]


class _Level(NamedTuple):
    """One memory level and its loops; one scalar per loop, or per operand.

    Attributes:
      temporal, fan_out: factors of this level.
      branch: iterations of each loop between neighbouring branches below.
      step: iterations of each loop that one temporal iteration advances.
      tile: iterations within one tile, at most the bound.
      temporal_above, fan_out_above: products of the factors of the levels above.
      sweeps: this level's temporal loops as each operand sees them.
      keep: whether each operand is kept.
    """

    temporal: Scalars
    fan_out: Scalars
    branch: Scalars
    step: Scalars
    tile: Scalars
    temporal_above: Scalars
    fan_out_above: Scalars
    sweeps: tuple[_Sweep, ...]
    keep: Scalars


def _levels(bounds: Scalars, mapping: Mapping) -> list[_Level]:
    loops, num_levels = range(len(LOOPS)), mapping.num_levels
    temporal = [tuple(mapping.temporal[l, d] for d in loops) for l in range(num_levels)]
    fan_out = [tuple(mapping.spatial[l, 0, d] * mapping.spatial[l, 1, d] for d in loops) for l in range(num_levels)]
    ones = (jnp.ones_like(temporal[0][0]),) * len(LOOPS)
    temporal_above, fan_out_above = [ones], [ones]
    for l in range(num_levels - 1, 0, -1):
        temporal_above.insert(0, _multiply(temporal_above[0], temporal[l]))
        fan_out_above.insert(0, _multiply(fan_out_above[0], fan_out[l]))
    levels = []
    below = ones
    for l in range(num_levels):
        step = _multiply(below, fan_out[l])
        spanned = _multiply(step, temporal[l])
        rank = tuple(mapping.order[l, d] for d in loops)
        levels.append(
            _Level(
                temporal=temporal[l],
                fan_out=fan_out[l],
                branch=below,
                step=step,
                tile=tuple(map(jnp.minimum, spanned, bounds)),
                temporal_above=temporal_above[l],
                fan_out_above=fan_out_above[l],
                sweeps=tuple(_sweep(temporal[l], rank, moves) for moves in _MOVES),
                keep=tuple(mapping.keep[l, operand] for operand in range(len(OPERANDS))),
            )
        )
        below = spanned
    return levels


def _sweep(temporal: Scalars, rank: Scalars, moves: tuple[int, ...]) -> _Sweep:
    absent = {j: 1.0 - _present(temporal[j]) for j in moves}

    def still_inside(i: int) -> jax.Array:
        return _product(jnp.where(rank[j] < rank[i], absent[j], 1.0) for j in moves if j != i)

    idle = [i for i in range(len(LOOPS)) if i not in moves]
    return _Sweep(
        still=_product(absent.values()),
        relevant=_product(temporal[j] for j in moves),
        repeats=_product(1.0 + (1.0 - still_inside(i)) * (temporal[i] - 1.0) for i in idle),
        first={j: (1.0 - absent[j]) * still_inside(j) for j in _SLIDES} if moves == _MOVES[_INPUTS] else {},
    )


class _Words(NamedTuple):
    """Words of one operand at one level, per instance.

    Attributes:
      tile: of the largest tile.
      entering: of all tiles that enter.
      first: of the tiles that enter for the first time.
      blind: of those, how many the level below writes without a read, if the operand is accumulated.
      asked: by the next level below that keeps the operand, or by the MACs; one access serves all branches that want
        the same word, through levels that do not keep it as well.
    """

    tile: jax.Array
    entering: jax.Array
    first: jax.Array
    blind: jax.Array
    asked: jax.Array


def _tile_words(bounds: Scalars, levels: list[_Level], operand: int) -> list[_Words]:
    """Weights and outputs: every word enters once, and again whenever a loop that does not move it goes on outside."""
    moves, idle = _MOVES[operand], _IDLE[operand]
    elements = _product(bounds[j] for j in moves)
    first = [elements / _product(level.fan_out_above[j] for j in moves) for level in levels]
    repeats = [jnp.ones_like(first[0])]
    for outer in levels[:0:-1]:
        sweep = outer.sweeps[operand]
        afresh = sweep.repeats * _product(outer.temporal_above[i] for i in idle)
        repeats.insert(0, (1.0 - sweep.still) * afresh + sweep.still * repeats[0])
    instances = _product(levels[0].fan_out[i] * levels[0].fan_out_above[i] for i in idle)
    asked_repeats = _product(bounds[i] for i in idle) / instances
    words = []
    for l, level in enumerate(levels):
        tile = _product(level.tile[j] for j in moves)
        words.append(_Words(tile, first[l] * repeats[l], first[l], first[l], first[l] * asked_repeats))
        asked_repeats = jnp.where(level.keep[operand] > 0.5, repeats[l], asked_repeats)
    return words


def _window_words(
    operation: Operation, bounds: Scalars, levels: list[_Level], conventions: Conventions
) -> list[_Words]:
    """Inputs: as other operands, but the window that enters next may share its halo with the one before."""
    windows = _Windows(operation, conventions)
    moves = _MOVES[_INPUTS]
    below = (jnp.ones_like(bounds[0]),) * len(LOOPS)
    asked = _product(bounds) / _product(map(operator.mul, levels[0].fan_out, levels[0].fan_out_above))
    words = []
    for l, level in enumerate(levels):
        extents = windows.extents(level.tile)
        box = extents[0] * extents[1]
        touched = windows.touched(level.tile, below, box)
        above = _multiply(level.temporal_above, level.fan_out_above)
        # Padded extent over the bound, one where factors divide it: edge tiles move only the words that exist.
        padding = {j: level.tile[j] * above[j] / bounds[j] for j in _SLIDES}
        tiles = _product(bounds[j] / above[j] for j in _BOXED) / _product(padding.values())
        waiting, inside = jnp.ones_like(box), jnp.ones_like(box)
        entering, first, blind = jnp.zeros_like(box), jnp.zeros_like(box), jnp.zeros_like(box)
        for outer in levels[l + 1 :]:
            sweep = outer.sweeps[_INPUTS]
            slid, slid_blind = windows.slide(outer, extents, box, touched, padding)
            relevant_above = waiting * inside * _product(outer.temporal_above[j] for j in moves)
            entering = entering + relevant_above * sweep.repeats * outer.temporal_above[_K] * slid
            first = first + relevant_above * slid
            blind = blind + relevant_above * slid_blind
            waiting = waiting * sweep.still
            inside = inside * sweep.relevant
        entering, first, blind = (
            tiles * (total + waiting * inside * inputs)
            for total, inputs in ((entering, box), (first, box), (blind, touched))
        )
        asked = asked * _product(level.fan_out[j] for j in _BOXED) * windows.distinct(level)
        words.append(_Words(_product(level.tile[j] for j in _BOXED) * box, entering, first, blind, asked))
        keep = level.keep[_INPUTS] > 0.5
        asked = jnp.where(keep, entering, asked)
        below = tuple(jnp.where(keep, tile, b) for tile, b in zip(level.tile, below, strict=True))
    return words


class _Windows:
    """Input windows of one operation under given conventions."""

    def __init__(self, operation: Operation, conventions: Conventions):
        self.stride = (operation.stride[0], operation.stride[1])
        self.dilation = (operation.dilation[0], operation.dilation[1])
        self.conventions = conventions

    def extents(self, tile: Scalars) -> Scalars:
        """Inputs of a tile along width and height."""
        pairs = ((tile[_P], tile[_R]), (tile[_Q], tile[_S]))
        extent = box_extent if self.conventions.gaps else distinct_offsets
        return tuple(extent(*pair, self.stride[x], self.dilation[x]) for x, pair in enumerate(pairs))

    def touched(self, tile: Scalars, below: Scalars, box: jax.Array) -> jax.Array:
        """Inputs of a tile that the tiles below it reach."""
        if not self.conventions.gaps:
            return box
        width = touched_extent(tile[_P], tile[_R], below[_P], below[_R], self.stride[0], self.dilation[0])
        height = touched_extent(tile[_Q], tile[_S], below[_Q], below[_S], self.stride[1], self.dilation[1])
        return width * height

    def slide(
        self, outer: _Level, extents: Scalars, box: jax.Array, touched: jax.Array, padding: dict[int, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Inputs that enter over the loops of an outer level that move them, and those of them written blind.

        The innermost of these loops slides the window, and only what is new enters; the others start afresh. Of what
        enters, as much is written without a read as the tile's products touch, at most all.
        """
        sweep = outer.sweeps[_INPUTS]
        afresh = sweep.relevant * (1.0 - sweep.still - _add(sweep.first.values()))
        slid, slid_blind = afresh * box, afresh * touched
        for j, axis in _SLIDES.items():
            step = (self.stride if j in (_P, _Q) else self.dilation)[axis] * outer.step[j]
            new = jnp.minimum(step, extents[axis]) * extents[1 - axis] if self.conventions.halo_reuse else box
            others = sweep.first[j] * _product(outer.temporal[i] for i in _MOVES[_INPUTS] if i != j)
            steps = outer.temporal[j] - padding[j]
            slid = slid + others * (padding[j] * box + steps * new)
            slid_blind = slid_blind + others * (padding[j] * touched + steps * jnp.minimum(new, touched))
        return slid, slid_blind

    def distinct(self, level: _Level) -> jax.Array:
        """Different tiles among the branches below a level, along width and height."""
        fan_out, branch = level.fan_out, level.branch
        width = (fan_out[_P], fan_out[_R], self.stride[0] * branch[_P], self.dilation[0] * branch[_R])
        height = (fan_out[_Q], fan_out[_S], self.stride[1] * branch[_Q], self.dilation[1] * branch[_S])
        return distinct_offsets(*width) * distinct_offsets(*height)


def _level_accesses(words: _Words, level: _Level, operand: int, accumulated: jax.Array, is_top: bool) -> Scalars:
    """Reads, fills, updates, entering, finals and footprint of one operand at one level; `accumulated` is 0 or 1."""
    copies = _product(level.fan_out_above[i] for i in _IDLE[operand])
    counts = (
        words.asked - accumulated * words.blind,
        jnp.zeros_like(words.first) if is_top else words.entering - accumulated * words.first,
        accumulated * words.asked,
        words.entering,
        accumulated * words.blind * (1.0 - _present(copies)),
        words.tile,
    )
    return tuple(level.keep[operand] * number for number in counts)


def _present(factor: jax.Array) -> jax.Array:
    """Gate of a loop: 0 at a factor of 1, 1 from 2 on, with a continuous slope between."""
    x = jnp.clip(factor - 1.0, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _product(factors: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.mul, factors)


def _add(terms: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, terms)


def _multiply(a: Scalars, b: Scalars) -> Scalars:
    return tuple(map(operator.mul, a, b))
