"""Words that enter the memory levels while a loop nest runs, per operand: the closed forms behind `hw.accesses.count`.

All arrays have the batch, written B, as their last axis, of size one where a value is shared: vectors run over the
batch, and the short axes of levels and loops are unrolled, since a compiler vectorises neither reductions over eight
loops nor a leading batch. The conventions are in docs/conventions.md.
"""

import operator
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, RELEVANT, Operation
from hw.windows import Diagonals, box_extent, diagonals, distinct_offsets, tiles_along, touched_extent

WEIGHTS, INPUTS, OUTPUTS = range(len(OPERANDS))
ALL = tuple(range(len(LOOPS)))
MOVING = tuple(tuple(np.flatnonzero(moves).tolist()) for moves in RELEVANT)
"""For each operand, the loops that move it."""
IDLE = tuple(tuple(np.flatnonzero(~moves).tolist()) for moves in RELEVANT)
"""And those that do not: N P Q the weights, K the inputs, C R S the outputs; G moves all three."""
K = LOOPS.index("K")
BOXED = tuple(map(LOOPS.index, "GNC"))
"""Loops that multiply the words of an input tile."""
SLIDING = tuple(map(LOOPS.index, "PQRS"))
"""Loops that slide the window of an input tile: outputs along width and height, then taps."""
PLACED = (IDLE[WEIGHTS], (K, *SLIDING), IDLE[OUTPUTS])
"""For each operand, the loops of which it matters whether one that moves the operand runs inside of them."""

settle = jax.lax.optimization_barrier
"""Ends a stage: without it XLA's fusion on CPU recomputes the stage for every value that is taken from it."""


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


class Nest(NamedTuple):
    """A mapped loop nest, loops in the order `LOOPS`.

    Attributes:
      bounds: (8, B).
      offset: inputs between the windows of neighbouring iterations of each sliding loop: strides along width and
        height, then dilations, (4, B).
      keep: (L, 3, B).
      rank: of each loop within its level, 0 = innermost, (L, 8, B).
      temporal, fan_out: factors, (L, 8, B).
      absent: 1 where a loop is absent from a level in time, 0 where it is present, (L, 8, B).
      branch: iterations between neighbouring branches below each level, (L, 8, B).
      step: iterations that one temporal iteration advances, (L, 8, B).
      spanned: iterations within one tile, (L, 8, B).
      temporal_above, fan_out_above: products of the factors of the levels above, (L, 8, B).
    """

    bounds: jax.Array
    offset: jax.Array
    keep: jax.Array
    rank: jax.Array
    temporal: jax.Array
    fan_out: jax.Array
    absent: jax.Array
    branch: jax.Array
    step: jax.Array
    spanned: jax.Array
    temporal_above: jax.Array
    fan_out_above: jax.Array

    @property
    def num_levels(self) -> int:
        return self.temporal.shape[0]

    @property
    def window_step(self) -> jax.Array:
        """Inputs that one iteration of each sliding loop moves the window by, (L, 4, B)."""
        return self.offset[None] * pick(self.step, SLIDING)


class Sweep(NamedTuple):
    """The temporal loops of every level as one operand sees them.

    Attributes:
      still_inside: for each of the `PLACED` loops, 1 if none that moves the operand runs inside of it, (L, n, B).
      still: 1 if none moves the operand, (L, B).
      relevant: iterations of those that move it, (L, B).
      repeats: iterations of those that do not, and run outside of one that does, (L, B).
    """

    still_inside: jax.Array
    still: jax.Array
    relevant: jax.Array
    repeats: jax.Array


class Words(NamedTuple):
    """Words of one operand per instance of every level, (L, B) each.

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


class Window(NamedTuple):
    """The input tile of every level, and how the sliding loops move it.

    Where the factors of a sliding loop do not divide its bound, the last tile is smaller. Extents are linear in the
    iterations of a tile, so the words of all tiles together are their number times those of the mean tile.

    Attributes:
      largest: inputs of the largest tile, (L, B).
      tile: iterations of the sliding loops in the largest tile, at most the bound, (L, 4, B).
      below: the same of the next level below that keeps inputs, or of a MAC, (L, 4, B).
      number: tiles along each sliding loop, (L, 4, B).
      number_slope: of `number` in `tile`, (L, 4, B).
      mean: iterations in the mean tile, (L, 4, B).
      extents: inputs of the mean tile along width and height, (L, 2, B).
      reach: extent along the axis of each sliding loop, of a whole tile of that loop and the mean of its partner,
        (L, 4, B).
      box: inputs of the bounding box of the mean tile, (L, B).
      touched: those of them that the tiles below reach, (L, B).
      tiles: what multiplies the words of a mean tile, and how many of the iterations above meet a tile, (L, B).
      step: inputs that an iteration moves the window by, (L, 4, B).
      first: 1 for a sliding loop that is the innermost to move the inputs, (L, 4, B).
    """

    largest: jax.Array
    tile: jax.Array
    below: jax.Array
    number: jax.Array
    number_slope: jax.Array
    mean: jax.Array
    extents: jax.Array
    reach: jax.Array
    box: jax.Array
    touched: jax.Array
    tiles: jax.Array
    step: jax.Array
    first: jax.Array


class Slide(NamedTuple):
    """What enters the window of one level while the M levels above move it.

    Attributes:
      starts: iterations within tiles that begin a run: a sequence of tiles, in any instance, along which a loop slides,
        (M, 4, B).
      follows: of the iterations that move the inputs, those in which a tile follows another of its run, (M, 4, B).
      strip: extent that enters per step, along the axis a loop slides, if halos are kept, (M, 4, B).
      halo: inputs shared with the tile before, (M, 4, B).
      touched_halo: of what the tile's products touch, how much was written before, (M, 4, B).
      inputs: that enter over all loops of a level: the innermost that moves the inputs slides, others start afresh,
        (M, B).
      blind: of those, how many are written without a read: as many as the tile's products touch, at most all, (M, B).
    """

    starts: jax.Array
    follows: jax.Array
    strip: jax.Array
    halo: jax.Array
    touched_halo: jax.Array
    inputs: jax.Array
    blind: jax.Array


class Branches(NamedTuple):
    """The windows of the branches below each level: those along a sliding loop, and which of them are the same.

    Attributes:
      number_below: tiles of the level below along each sliding loop, (L, 4, B).
      passes: over the branches that it takes to visit them all, (L, 4, B).
      passes_slope: of `passes` in the iterations that all branches hold, at most the bound, (L, 4, B).
      busy: branches that have a tile, in the mean over the passes, (L, 4, B).
      shared: the diagonals along width and height, (L, 2, B).
      different: windows of the busy branches along width and height, (L, 2, B).
    """

    number_below: jax.Array
    passes: jax.Array
    passes_slope: jax.Array
    busy: jax.Array
    shared: Diagonals
    different: jax.Array


class Traffic(NamedTuple):
    """A nest, its sweeps and words by operand, the windows of the inputs, and how they slide and fan out."""

    nest: Nest
    sweeps: tuple[Sweep, ...]
    words: tuple[Words, ...]
    window: Window
    slides: list[Slide]
    branches: Branches


def count_traffic(operation: Operation, mapping: Mapping, conventions: Conventions) -> Traffic:
    """Works out what enters every level; as `hw.accesses.count`, but with a trailing batch axis."""
    nest = settle(_make_nest(operation, mapping))
    sweeps = settle(tuple(_sweep(nest, operand) for operand in range(len(OPERANDS))))
    window = settle(make_window(nest, sweeps[INPUTS], conventions))
    slides = settle([slide(nest, sweeps[INPUTS], window, l, conventions) for l in range(nest.num_levels - 1)])
    branches = _make_branches(nest, window)
    words = (
        _tile_words(nest, sweeps[WEIGHTS], WEIGHTS),
        _window_words(nest, sweeps[INPUTS], window, slides, branches),
        _tile_words(nest, sweeps[OUTPUTS], OUTPUTS),
    )
    return Traffic(nest, sweeps, settle(words), window, slides, branches)


def _make_nest(operation: Operation, mapping: Mapping) -> Nest:
    temporal, fan_out = mapping.temporal, mapping.spatial[:, 0] * mapping.spatial[:, 1]
    ones = jnp.ones_like(temporal[0] * fan_out[0])
    branch, step, spanned, temporal_above, fan_out_above = [ones], [], [], [ones], [ones]
    for l in range(len(temporal)):
        step.append(branch[l] * fan_out[l])
        spanned.append(step[l] * temporal[l])
        branch.append(spanned[l])
    for l in range(len(temporal) - 1, 0, -1):
        temporal_above.insert(0, temporal_above[0] * temporal[l])
        fan_out_above.insert(0, fan_out_above[0] * fan_out[l])
    return Nest(
        bounds=operation.bounds,
        offset=jnp.concatenate([operation.stride, operation.dilation]),
        keep=mapping.keep,
        rank=mapping.order,
        temporal=temporal,
        fan_out=fan_out,
        absent=1.0 - present(temporal),
        branch=jnp.stack(branch[:-1]),
        step=jnp.stack(step),
        spanned=jnp.stack(spanned),
        temporal_above=jnp.stack(temporal_above),
        fan_out_above=jnp.stack(fan_out_above),
    )


def _sweep(nest: Nest, operand: int) -> Sweep:
    rank = pick(nest.rank, PLACED[operand])
    still_inside = product_of(
        jnp.where(nest.rank[:, j, None] < rank, nest.absent[:, j, None], 1.0) for j in MOVING[operand]
    )
    idle = pick(nest.temporal, IDLE[operand])
    repeats = 1.0 + (1.0 - still_inside[:, : idle.shape[1]]) * (idle - 1.0)
    return Sweep(
        still_inside=still_inside,
        still=over(nest.absent, MOVING[operand]),
        relevant=over(nest.temporal, MOVING[operand]),
        repeats=over(repeats, range(idle.shape[1])),
    )


def _tile_words(nest: Nest, sweep: Sweep, operand: int) -> Words:
    """Weights and outputs: every word enters once, and again whenever a loop that does not move it goes on outside."""
    moving, idle = MOVING[operand], IDLE[operand]
    first = over(nest.bounds, moving)[None] / over(nest.fan_out_above, moving)
    afresh = sweep.repeats * over(nest.temporal_above, idle)
    repeats = [jnp.ones_like(first[0])]
    for m in range(nest.num_levels - 1, 0, -1):
        repeats.insert(0, (1.0 - sweep.still[m]) * afresh[m] + sweep.still[m] * repeats[0])
    asked = [over(nest.temporal[0] * nest.temporal_above[0], idle)]
    for l in range(nest.num_levels - 1):
        asked.append(jnp.where(nest.keep[l, operand] > 0.5, repeats[l], asked[l]))
    tile = over(jnp.minimum(nest.spanned, nest.bounds[None]), moving)
    return Words(tile, first * jnp.stack(repeats), first, first, first * jnp.stack(asked))


def make_window(nest: Nest, sweep: Sweep, conventions: Conventions) -> Window:
    """Input tiles from a nest and the inputs' sweep."""
    bounds = pick(nest.bounds, SLIDING)[None]
    tile = jnp.minimum(pick(nest.spanned, SLIDING), bounds)
    number, number_slope = tiles_along(bounds, tile)
    mean = bounds / number
    extent = box_extent if conventions.gaps else _touched_only
    steps = nest.offset[None, :2], nest.offset[None, 2:]
    extents, whole = extent(mean[:, :2], mean[:, 2:], *steps), extent(tile[:, :2], tile[:, 2:], *steps)
    box = extents[:, 0] * extents[:, 1]
    below = [jnp.ones_like(tile[0])]
    for l in range(nest.num_levels - 1):
        below.append(jnp.where(nest.keep[l, INPUTS, None] > 0.5, tile[l], below[l]))
    above = nest.temporal_above * nest.fan_out_above
    return Window(
        largest=over(jnp.minimum(nest.spanned, nest.bounds[None]), BOXED) * whole[:, 0] * whole[:, 1],
        tile=tile,
        below=jnp.stack(below),
        number=number,
        number_slope=number_slope,
        mean=mean,
        extents=extents,
        reach=jnp.concatenate(
            [extent(tile[:, :2], mean[:, 2:], *steps), extent(mean[:, :2], tile[:, 2:], *steps)], axis=1
        ),
        box=box,
        touched=touched_inputs(nest, mean, jnp.stack(below)) if conventions.gaps else box,
        tiles=over(nest.bounds, BOXED)[None] * over(number, range(4)) / over(above, (*BOXED, *SLIDING)),
        step=nest.window_step,
        first=(1.0 - pick(nest.absent, SLIDING)) * sweep.still_inside[:, 1:],
    )


def _touched_only(outputs: jax.Array, taps: jax.Array, stride: jax.Array, dilation: jax.Array) -> jax.Array:
    """As `hw.windows.box_extent`, without the inputs in gaps."""
    return distinct_offsets(outputs, taps, diagonals(stride, dilation))


def touched_inputs(nest: Nest, tile: jax.Array, below: jax.Array) -> jax.Array:
    """Inputs of tiles that the tiles below them reach, (L, 4, B) twice -> (L, B)."""
    touched = touched_extent(
        tile[:, :2], tile[:, 2:], below[:, :2], below[:, 2:], nest.offset[None, :2], nest.offset[None, 2:]
    )
    return touched[:, 0] * touched[:, 1]


def slide(nest: Nest, sweep: Sweep, window: Window, l: int, conventions: Conventions) -> Slide:
    """Slides the window of level l by the temporal loops of the levels above."""
    box, touched = window.box[l, None], window.touched[l, None]
    relevant, moved = sweep.relevant[l + 1 :], 1.0 - sweep.still[l + 1 :]
    held, starts = held_and_starts(nest, window, l)
    follows = relevant[:, None] * (held - starts) / held
    across = twice(window.extents[l][::-1])
    strip = jnp.minimum(window.step[l + 1 :], window.reach[l][None])
    halo = (window.reach[l][None] - strip) * across if conventions.halo_reuse else jnp.zeros_like(strip)
    touched_halo = jnp.maximum(touched[:, None] - strip * across, 0.0) if conventions.halo_reuse else halo
    slid = window.first[l + 1 :] * follows
    return Slide(
        starts=starts,
        follows=follows,
        strip=strip,
        halo=halo,
        touched_halo=touched_halo,
        inputs=relevant * moved * box - total(slid * halo),
        blind=relevant * moved * touched - total(slid * touched_halo),
    )


def held_and_starts(nest: Nest, window: Window, l: int) -> tuple[jax.Array, jax.Array]:
    """Iterations of each sliding loop within the tiles of level l, (1, 4, B), and within those that begin a run, (M, 4, B).

    Where a sliding loop is the innermost to move the inputs, no temporal iterations of it lie between: each branch below
    a level above begins a run, but in the last run along the loop only some branches may hold a tile.
    """
    held = (window.number[l] * pick(nest.spanned[l], SLIDING))[None]
    whole, step = window.number[l + 1 :] - 1.0, pick(nest.step[l + 1 :], SLIDING)
    return held, whole * step + jnp.minimum(step, held - whole * pick(nest.spanned[l + 1 :], SLIDING))


def _window_words(nest: Nest, sweep: Sweep, window: Window, slides: list[Slide], branches: Branches) -> Words:
    """Inputs: as other operands, but the window that enters next may share its halo with the one before."""
    outside = over(nest.temporal_above, MOVING[INPUTS])
    repeats = sweep.repeats * nest.temporal_above[:, K]
    inputs = []
    for l in range(nest.num_levels):
        waiting = jnp.ones_like(window.box[l])
        entering, first, blind = jnp.zeros_like(waiting), jnp.zeros_like(waiting), jnp.zeros_like(waiting)
        for i, m in enumerate(range(l + 1, nest.num_levels)):
            reach = waiting * outside[m]
            entering = entering + reach * slides[l].inputs[i] * repeats[m]
            first = first + reach * slides[l].inputs[i]
            blind = blind + reach * slides[l].blind[i]
            waiting = waiting * sweep.still[m] * sweep.relevant[m]
        afresh = waiting * window.box[l]
        inputs.append((entering + afresh, first + afresh, blind + waiting * window.touched[l]))
    entering, first, blind = (window.tiles * jnp.stack(kind) for kind in zip(*inputs, strict=True))
    multicast = count_multicast(nest, branches)
    moving, slots = MOVING[INPUTS], nest.temporal[0, K] * nest.temporal_above[0, K]
    products = over(nest.bounds, moving) / over(nest.fan_out[0] * nest.fan_out_above[0], moving)
    asked = [slots * products * multicast[0]]
    for l in range(nest.num_levels - 1):
        asked.append(jnp.where(nest.keep[l, INPUTS] > 0.5, entering[l], asked[l]) * multicast[l + 1])
    return Words(window.largest, entering, first, blind, jnp.stack(asked))


def _make_branches(nest: Nest, window: Window) -> Branches:
    bounds, branch = pick(nest.bounds, SLIDING)[None], pick(nest.branch, SLIDING)
    number_below = jnp.concatenate([jnp.broadcast_to(bounds, window.number[:1].shape), window.number[:-1]])
    passes, passes_slope = tiles_along(bounds, jnp.minimum(pick(nest.step, SLIDING), bounds))
    busy = number_below / passes
    shared = diagonals(nest.offset[None, :2] * branch[:, :2], nest.offset[None, 2:] * branch[:, 2:])
    different = distinct_offsets(busy[:, :2], busy[:, 2:], shared)
    return Branches(number_below, passes, passes_slope, busy, shared, different)


def count_multicast(nest: Nest, branches: Branches) -> jax.Array:
    """Different input tiles among the branches below each level, (L, B).

    The last pass over a loop may leave branches idle: what the mean number of busy ones want, per branch there is.
    """
    idle = over(pick(nest.fan_out, SLIDING), range(4)) / over(branches.busy, range(4))
    return over(nest.fan_out, BOXED) * branches.different[:, 0] * branches.different[:, 1] * idle


def present(factor: jax.Array) -> jax.Array:
    """Gate of a loop: 0 at a factor of 1, 1 from 2 on, with a continuous slope between."""
    x = jnp.clip(factor - 1.0, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def pick(x: jax.Array, loops: Iterable[int]) -> jax.Array:
    """Some of the loops: (..., 8, B) -> (..., n, B)."""
    chosen = list(loops)
    if chosen == list(range(chosen[0], chosen[-1] + 1)):  # a slice is no copy
        return x[..., chosen[0] : chosen[-1] + 1, :]
    return jnp.stack([x[..., d, :] for d in chosen], axis=-2)


def over(x: jax.Array, loops: Iterable[int]) -> jax.Array:
    """Product over some of the loops: (..., n, B) -> (..., B)."""
    return product_of(x[..., d, :] for d in loops)


def total(x: jax.Array) -> jax.Array:
    """Sum over the loops: (..., n, B) -> (..., B)."""
    return reduce(operator.add, (x[..., d, :] for d in range(x.shape[-2])))


def product_of(factors: Iterable[jax.Array]) -> jax.Array:
    """Product of arrays of one shape, at least one."""
    return reduce(operator.mul, factors)


def twice(axes: jax.Array) -> jax.Array:
    """Of width and height, for outputs and for taps: (2, B) -> (1, 4, B)."""
    return jnp.concatenate([axes, axes])[None]
