"""Pull-back of `hw.accesses.count`: from cotangents of counts to cotangents of tiling factors.

Written by hand because autodiff transposes every index to a padded array and every product to a chain of others. Almost
every count is a product of factors, so most of it adds up *shares*: the share of a value is its cotangent times the
value; that of a product goes to each of its factors, and is divided by the factor only at the end.

Gates are flat at factors of one and of two. Away from ties it equals autodiff (a test); docs/conventions.md says which
side is taken at ties.
"""

import operator
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hw.operation import LOOPS
from hw.traffic import (
    ALL,
    BOXED,
    IDLE,
    INPUTS,
    MOVING,
    OUTPUTS,
    PLACED,
    SLIDING,
    WEIGHTS,
    Branches,
    K,
    Nest,
    Sweep,
    Traffic,
    Window,
    Words,
    count_multicast,
    held_and_starts,
    over,
    pick,
    settle,
    total,
    touched_inputs,
    twice,
)
from hw.windows import box_extent


class Rows:
    """Sums of shares or cotangents by loop, each (L, B)."""

    def __init__(self, zeros: jax.Array) -> None:
        self.sums = [zeros] * len(LOOPS)

    def add(self, loops: Iterable[int], share: jax.Array) -> None:
        """Adds the same (L, B) to each of the loops."""
        for j in loops:
            self.sums[j] = self.sums[j] + share

    def add_each(self, loops: Iterable[int], shares: jax.Array) -> None:
        """Adds (L, n, B), one for each of the loops."""
        for x, j in enumerate(loops):
            self.sums[j] = self.sums[j] + shares[:, x]


class Shares:
    """Shares of the values of a `Nest`, of its tiles as they end at the bounds, and cotangents of temporal factors."""

    def __init__(self, nest: Nest) -> None:
        zeros = jnp.zeros_like(nest.temporal[:, 0])
        self.temporal, self.fan_out = Rows(zeros), Rows(zeros)
        self.branch, self.step, self.spanned, self.tile = Rows(zeros), Rows(zeros), Rows(zeros), Rows(zeros)
        self.temporal_above, self.fan_out_above = Rows(zeros), Rows(zeros)
        self.slope = Rows(zeros)
        self.num_levels = nest.num_levels

    def add_to_all_fan_outs(self, loops: Iterable[int], share: jax.Array) -> None:
        """Adds the share (B,) of a product over the fan-outs of all levels: that of the lowest, and those above it."""
        lowest = self._of_lowest(share)
        self.fan_out.add(loops, lowest)
        self.fan_out_above.add(loops, lowest)

    def add_to_all_times(self, loops: Iterable[int], share: jax.Array) -> None:
        """Likewise of a product over the temporal factors of all levels."""
        lowest = self._of_lowest(share)
        self.temporal.add(loops, lowest)
        self.temporal_above.add(loops, lowest)

    def _of_lowest(self, share: jax.Array) -> jax.Array:
        return jnp.stack([share, *[jnp.zeros_like(share)] * (self.num_levels - 1)])


class SweepShares(NamedTuple):
    """Shares of a `Sweep`, (L, B); for the inputs also cotangents of `Window.first`, (L, 4, B), else (L, 0, B)."""

    still: jax.Array
    repeats: jax.Array
    relevant: jax.Array
    first: jax.Array


def pull_back(
    traffic: Traffic,
    spatial: jax.Array,
    words: tuple[Words, ...],
    copies: tuple[jax.Array, ...],
    fanout: jax.Array,
    instances: jax.Array,
    cycles: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of the temporal (L, 8, B) and spatial (L, 2, 8, B) factors, loops in the order of `LOOPS`.

    Args:
      traffic: what `hw.traffic.count_traffic` returned.
      spatial: the spatial factors.
      words: cotangents of `traffic.words`.
      copies: by operand, of the product of the fan-outs above each level that do not move it, (L, B).
      fanout: of the fan-out per axis, (L, 2, B).
      instances: of the instances of each level, (L, B).
      cycles: of the compute cycles, (B,).
    """
    nest = traffic.nest
    shares = Shares(nest)
    of_sweeps = (
        _pull_tiles(traffic, WEIGHTS, words[WEIGHTS], shares),
        _pull_windows(traffic, words[INPUTS], shares),
        _pull_tiles(traffic, OUTPUTS, words[OUTPUTS], shares),
    )
    shares.fan_out_above.add(ALL, instances * over(nest.fan_out_above, ALL))
    for operand, (sweep, of_sweep) in enumerate(zip(traffic.sweeps, settle(of_sweeps), strict=True)):
        idle = IDLE[operand]
        shares.fan_out_above.add(idle, copies[operand] * over(nest.fan_out_above, idle))
        _pull_sweep(nest, sweep, operand, of_sweep, shares)
    of_cycles = cycles * over(nest.temporal[0] * nest.temporal_above[0], ALL)
    return _collect(nest, spatial, shares, of_cycles, fanout)


def _pull_tiles(traffic: Traffic, operand: int, given: Words, shares: Shares) -> SweepShares:
    """Weights and outputs."""
    nest, sweep, words = traffic.nest, traffic.sweeps[operand], traffic.words[operand]
    moving, idle = MOVING[operand], IDLE[operand]
    repeats = words.entering / words.first
    of_repeats, of_asked = _pull_asked(
        nest.keep[:, operand], given.entering * words.first, given.asked * words.first, jnp.ones_like(repeats)
    )
    of_elements = given.entering * words.entering + given.asked * words.asked
    shares.fan_out_above.add(moving, -(of_elements + (given.first + given.blind) * words.first))
    shares.tile.add(moving, given.tile * words.tile)
    shares.add_to_all_times(idle, of_asked[0] * words.asked[0] / words.first[0])
    inner = [jnp.zeros_like(of_repeats[0])]
    for m in range(1, nest.num_levels):
        inner.append(of_repeats[m - 1] + inner[m - 1] * sweep.still[m - 1])
    of_repeats = settle(jnp.stack(inner))
    afresh = sweep.repeats * over(nest.temporal_above, idle)
    of_afresh = of_repeats * (1.0 - sweep.still) * afresh
    shares.temporal_above.add(idle, of_afresh)
    return SweepShares(
        still=of_repeats * sweep.still * (repeats - afresh),
        repeats=of_afresh,
        relevant=jnp.zeros_like(of_afresh),
        first=jnp.zeros_like(sweep.still_inside[:, len(idle) :]),
    )


def _pull_asked(
    keep: jax.Array, entering: jax.Array, asked: jax.Array, multicast: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of what enters each level and of what each is asked for, (L, B), once the one feeds the other.

    A level is asked for `multicast` times what enters the next one below that keeps the operand.
    """
    of_entering: list[jax.Array] = []
    of_asked: list[jax.Array] = []
    from_above = jnp.zeros_like(asked[0])
    for l in reversed(range(len(keep))):
        kept = keep[l] > 0.5
        of_entering.insert(0, entering[l] + jnp.where(kept, from_above, 0.0))
        of_asked.insert(0, asked[l] + jnp.where(kept, 0.0, from_above))
        from_above = of_asked[0] * multicast[l]
    return jnp.stack(of_entering), jnp.stack(of_asked)


def _pull_windows(traffic: Traffic, given: Words, shares: Shares) -> SweepShares:
    """Inputs."""
    nest, words, window = traffic.nest, traffic.words[INPUTS], traffic.window
    multicast = count_multicast(nest, traffic.branches)
    of_entering, of_asked = settle(_pull_asked(nest.keep[:, INPUTS], given.entering, given.asked, multicast))
    of_asked = of_asked * words.asked
    of_number_below = _pull_branches(nest, traffic.branches, of_asked, shares)
    shares.add_to_all_fan_outs(MOVING[INPUTS], -of_asked[0])
    shares.add_to_all_times((K,), of_asked[0])
    of_tiles = of_entering * words.entering + given.first * words.first + given.blind * words.blind
    shares.temporal_above.add((*BOXED, *SLIDING), -of_tiles)
    shares.fan_out_above.add((*BOXED, *SLIDING), -of_tiles)

    of_largest = given.tile * words.tile
    given = given._replace(entering=of_entering * window.tiles, first=given.first * window.tiles)
    given = settle(given._replace(blind=given.blind * window.tiles))
    sums = _OuterSums(nest.num_levels, window)
    pulled = [_pull_level(traffic, given, l, sums) for l in range(nest.num_levels)]
    inner, outer = WindowShares(*(jnp.stack(kind) for kind in zip(*pulled, strict=True))), sums.stack()
    shares.temporal_above.add((K,), outer.repeats)
    shares.temporal_above.add(MOVING[INPUTS], outer.outside)
    shares.step.add_each(SLIDING, outer.step)
    shares.spanned.add_each(SLIDING, outer.spanned + inner.held)
    shares.tile.add(BOXED, of_largest)
    of_below = jnp.concatenate([of_number_below[1:], jnp.zeros_like(of_number_below[:1])])
    of_number = of_tiles[:, None] + inner.held + of_below
    shares.tile.add_each(SLIDING, _pull_tile(nest, window, inner, of_number, outer.number, of_largest))
    return SweepShares(outer.still, outer.repeats, outer.relevant, outer.first)


def _pull_branches(nest: Nest, branches: Branches, of_multicast: jax.Array, shares: Shares) -> jax.Array:
    """Pulls back shares (L, B) of `hw.traffic.count_multicast`; returns those of `Branches.number_below`, (L, 4, B)."""
    shares.fan_out.add((*BOXED, *SLIDING), of_multicast)
    outputs, taps, shared = branches.busy[:, :2], branches.busy[:, 2:], branches.shared
    of_different = of_multicast[:, None] / branches.different
    more_outputs, more_taps = jnp.maximum(0.0, outputs - shared.apart_i), jnp.maximum(0.0, taps - shared.apart_j)
    of_found = -of_different * more_outputs * more_taps
    of_outputs = of_different * outputs * (taps - jnp.where(more_outputs > 0.0, more_taps * shared.found, 0.0))
    of_taps = of_different * taps * (outputs - jnp.where(more_taps > 0.0, more_outputs * shared.found, 0.0))
    slopes = jnp.concatenate([of_found * shared.slope_a, of_found * shared.slope_b], axis=1)
    shares.branch.add_each(SLIDING, slopes * nest.offset[None] * pick(nest.branch, SLIDING))
    of_busy = jnp.concatenate([of_outputs, of_taps], axis=1) - of_multicast[:, None]
    step = pick(nest.step, SLIDING)
    of_step = of_busy * branches.passes_slope * step / branches.passes
    shares.step.add_each(SLIDING, jnp.where(step <= pick(nest.bounds, SLIDING)[None], -of_step, 0.0))
    return of_busy


class WindowShares(NamedTuple):
    """Of a `Window`: shares of the iterations within all its tiles, (4, B), which are their number times what one spans;
    cotangents of extents (2, B), reach (4, B) and touched (B,)."""

    held: jax.Array
    extents: jax.Array
    reach: jax.Array
    touched: jax.Array


class _OuterSums:
    """What the windows of inner levels give to the loops of each level, summed level by level."""

    class Stacked(NamedTuple):
        """Shares of the sweep and of `outside`, (L, B); shares of each loop's step and span, cotangents of its number
        of tiles and of being first, (L, 4, B)."""

        still: jax.Array
        relevant: jax.Array
        repeats: jax.Array
        outside: jax.Array
        step: jax.Array
        spanned: jax.Array
        number: jax.Array
        first: jax.Array

    def __init__(self, num_levels: int, window: Window) -> None:
        level, loops = jnp.zeros_like(window.box[0]), jnp.zeros_like(window.tile[0])
        self.levels = [self.Stacked(*[level] * 4, *[loops] * 4) for _ in range(num_levels)]

    def add(self, m: int, **sums: jax.Array) -> None:
        """Adds to level m."""
        level = self.levels[m]
        self.levels[m] = level._replace(**{name: getattr(level, name) + value for name, value in sums.items()})

    def stack(self) -> Stacked:
        return self.Stacked(*(jnp.stack(kind) for kind in zip(*self.levels, strict=True)))


def _pull_level(traffic: Traffic, given: Words, l: int, sums: _OuterSums) -> WindowShares:
    """Pulls back what enters level l.

    `given` holds cotangents of inputs that enter, before `Window.tiles` multiplies them.
    """
    nest, sweep, window = traffic.nest, traffic.sweeps[INPUTS], traffic.window
    outers = range(l + 1, nest.num_levels)
    entering, first, blind = given.entering[l], given.first[l], given.blind[l]
    waiting = [jnp.ones_like(entering)]
    for m in outers:
        waiting.append(waiting[-1] * sweep.still[m] * sweep.relevant[m])
    of_box, of_touched = waiting[-1] * (entering + first), waiting[-1] * blind
    loops = jnp.zeros_like(window.tile[l])
    pulled = WindowShares(loops, jnp.zeros_like(window.extents[l]), loops, of_touched)
    if outers:
        slid = traffic.slides[l]
        share = waiting[-1] * ((entering + first) * window.box[l] + blind * window.touched[l])
        of_inputs: list[jax.Array] = []
        of_blind: list[jax.Array] = []
        for i, m in reversed(list(enumerate(outers))):
            reach = waiting[i] * over(nest.temporal_above[m], MOVING[INPUTS])
            repeats = sweep.repeats[m] * nest.temporal_above[m, K]
            of_repeats = reach * entering * repeats * slid.inputs[i]
            of_reach = of_repeats + reach * (first * slid.inputs[i] + blind * slid.blind[i])
            sums.add(m, still=share, relevant=share, repeats=of_repeats, outside=of_reach)
            share = share + of_reach
            of_inputs.insert(0, reach * (entering * repeats + first))
            of_blind.insert(0, reach * blind)
        inputs, writes = settle((jnp.stack(of_inputs), jnp.stack(of_blind)))
        of_slide, pulled = _pull_slide(traffic, inputs, writes, l, sums)
        of_box, of_touched = of_box + of_slide, of_touched + pulled.touched
    of_extents = pulled.extents + of_box[None] * window.extents[l][::-1]
    sums.levels, pulled = settle((sums.levels, pulled._replace(extents=of_extents, touched=of_touched)))
    return pulled


def _pull_slide(
    traffic: Traffic, of_inputs: jax.Array, of_blind: jax.Array, l: int, sums: _OuterSums
) -> tuple[jax.Array, WindowShares]:
    """Pulls back `hw.traffic.slide`: the cotangent of the box (B,), and all others of the window of level l."""
    sweep, window, slid = traffic.sweeps[INPUTS], traffic.window, traffic.slides[l]
    relevant, still, first = sweep.relevant[l + 1 :], sweep.still[l + 1 :], window.first[l + 1 :]
    of_moved = of_inputs * window.box[l, None] + of_blind * window.touched[l, None]
    of_slid = -(of_inputs[:, None] * slid.halo + of_blind[:, None] * slid.touched_halo)
    of_follows = of_slid * first * slid.follows
    slope = -first * slid.follows
    of_halo = slope * of_inputs[:, None]
    of_touched_halo = jnp.where(slid.touched_halo > 0.0, slope * of_blind[:, None], 0.0)
    across = twice(window.extents[l][::-1])
    of_across = of_halo * (window.reach[l][None] - slid.strip) - of_touched_halo * slid.strip
    of_strip = -(of_halo + of_touched_halo) * across
    is_step = window.step[l + 1 :] <= window.reach[l][None]
    of_reach = of_halo * across + jnp.where(is_step, 0.0, of_strip)
    of_step = jnp.where(is_step, of_strip * slid.strip, 0.0)
    of_runs = _pull_follows(traffic, of_follows, l)
    for i, m in enumerate(range(l + 1, traffic.nest.num_levels)):
        of_still = -relevant[i] * still[i] * of_moved[i]
        of_relevant = relevant[i] * (1.0 - still[i]) * of_moved[i] + total(of_follows[i])
        sums.add(m, still=of_still, relevant=of_relevant, first=of_slid[i] * slid.follows[i])
        sums.add(m, step=of_step[i] + of_runs.step[i], spanned=of_runs.spanned[i], number=of_runs.number_above[i])
    moved = relevant * (1.0 - still)
    of_across = _add(of_across)
    return _add(moved * of_inputs), WindowShares(
        held=_add(of_runs.held),
        extents=(of_across[:2] + of_across[2:])[::-1],
        reach=_add(of_reach),
        touched=_add(moved * of_blind) + _add(total(of_touched_halo)),
    )


class RunShares(NamedTuple):
    """Of the runs of one level: shares of `held_and_starts` and of step and span above, and cotangents of the number of
    tiles above, (M, 4, B)."""

    held: jax.Array
    number_above: jax.Array
    step: jax.Array
    spanned: jax.Array


def _pull_follows(traffic: Traffic, of_follows: jax.Array, l: int) -> RunShares:
    """Pulls back shares of `Slide.follows`."""
    nest, window = traffic.nest, traffic.window
    held, starts = held_and_starts(nest, window, l)
    step, spanned = pick(nest.step[l + 1 :], SLIDING), pick(nest.spanned[l + 1 :], SLIDING)
    following = held - starts
    of_start = jnp.where(following > 0.0, -of_follows / jnp.where(following > 0.0, following, 1.0), 0.0)
    whole = window.number[l + 1 :] - 1.0
    is_whole = step <= held - whole * spanned
    return RunShares(
        held=of_start * (jnp.where(is_whole, 0.0, held) - starts),
        number_above=of_start * jnp.where(is_whole, step, step - spanned),
        step=of_start * step * jnp.where(is_whole, whole + 1.0, whole),
        spanned=jnp.where(is_whole, 0.0, -of_start * whole * spanned),
    )


def _add(levels: jax.Array) -> jax.Array:
    """Sum over levels: (M, ..., B) -> (..., B)."""
    return reduce(operator.add, levels)


def _pull_tile(
    nest: Nest,
    window: Window,
    given: WindowShares,
    of_number: jax.Array,
    of_number_above: jax.Array,
    of_largest: jax.Array,
) -> jax.Array:
    """Shares (L, 4, B) of the sliding loops' tile: through the number of tiles, whole and mean extents, and as the tile
    below others."""
    steps = nest.offset[None]
    whole = box_extent(window.tile[:, :2], window.tile[:, 2:], steps[:, :2], steps[:, 2:])
    of_extents = jnp.concatenate([given.extents, given.extents], axis=1)
    partner = jnp.concatenate([given.reach[:, 2:], given.reach[:, :2]], axis=1)
    _, pull = jax.vjp(lambda *x: touched_inputs(nest, *x), window.mean, window.below)
    of_touching, of_below = pull(given.touched)
    of_mean = (of_extents + partner) * steps + of_touching
    of_number = (of_number - of_mean * window.mean) / window.number + of_number_above
    of_tile = of_number * window.number_slope
    of_whole = of_largest[:, None] / whole
    of_tile = of_tile + (given.reach + jnp.concatenate([of_whole, of_whole], axis=1)) * steps
    as_below: list[jax.Array] = []
    from_above = jnp.zeros_like(of_below[0])
    for l in reversed(range(nest.num_levels)):
        kept = nest.keep[l, INPUTS, None] > 0.5
        as_below.insert(0, jnp.where(kept, from_above, 0.0))
        from_above = of_below[l] + jnp.where(kept, 0.0, from_above)
    return (of_tile + jnp.stack(as_below)) * window.tile


def _pull_sweep(nest: Nest, sweep: Sweep, operand: int, given: SweepShares, shares: Shares) -> None:
    """From a sweep to the temporal factors: as iterations, and through the gates of loops that are partly present."""
    idle = pick(nest.temporal, IDLE[operand])
    still = sweep.still_inside[:, : idle.shape[1]]
    of_idle = given.repeats[:, None] / (1.0 + (1.0 - still) * (idle - 1.0))
    shares.slope.add_each(IDLE[operand], of_idle * (1.0 - still))
    of_still = -of_idle * (idle - 1.0) * still
    if operand == INPUTS:
        shares.temporal.add(MOVING[operand], given.relevant)
        sliding, still = pick(nest.temporal, SLIDING), sweep.still_inside[:, 1:]
        shares.slope.add_each(SLIDING, given.first * still * present_slope(sliding))
        of_still = jnp.concatenate([of_still, given.first * still * (1.0 - pick(nest.absent, SLIDING))], axis=1)
    of_still = settle(of_still)
    rank = pick(nest.rank, PLACED[operand])
    x = jnp.clip(nest.temporal - 1.0, 0.0, 1.0)
    partly = jnp.where(x < 1.0, x, 0.0)
    # Slope over value of 1 - present = (1 - x)^2 (1 + 2 x); nothing is still where a loop is wholly present.
    slope = -6.0 * partly / ((1.0 - partly) * (1.0 + 2.0 * partly))
    for j in MOVING[operand]:
        inside = total(jnp.where(nest.rank[:, j, None] < rank, of_still, 0.0))
        shares.slope.add((j,), slope[:, j] * (given.still + inside))


def present_slope(factor: jax.Array) -> jax.Array:
    """Slope of `hw.traffic.present`."""
    x = jnp.clip(factor - 1.0, 0.0, 1.0)
    return 6.0 * x * (1.0 - x)


def _collect(
    nest: Nest, spatial: jax.Array, shares: Shares, of_cycles: jax.Array, fanout: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """From shares of products over levels to cotangents of the factors of each level."""
    of = settle({name: rows.sums for name, rows in vars(shares).items() if isinstance(rows, Rows)})
    temporal, fan_out = [], []
    for j in range(len(LOOPS)):
        inside = of["spanned"][j] + jnp.where(nest.spanned[:, j] <= nest.bounds[None, j], of["tile"][j], 0.0)
        below = of["branch"][j] + of["step"][j]
        # A factor spans its own tile and those of the levels above, and repeats what lies below.
        of_tiles, of_times, of_fan_outs = [inside[-1]], [of_cycles], [jnp.zeros_like(of_cycles)]
        for l in range(nest.num_levels - 1):
            of_tiles.insert(0, of_tiles[0] + below[-1 - l] + inside[-2 - l])
            of_times.append(of_times[l] + of["temporal_above"][j][l])
            of_fan_outs.append(of_fan_outs[l] + of["fan_out_above"][j][l])
        tiles, times, fan_outs = (jnp.stack(levels) for levels in (of_tiles, of_times, of_fan_outs))
        temporal.append(of["temporal"][j] + tiles + times)
        fan_out.append(of["fan_out"][j] + of["step"][j] + tiles + fan_outs)
    # Loop by loop up to here: a stack earlier on would copy every sum.
    of_slope, of_temporal, of_fan_out = (jnp.stack(rows, 1) for rows in settle((of["slope"], temporal, fan_out)))
    of_axes = of_fan_out[:, None] + (fanout * over(spatial, ALL))[:, :, None]
    # Shares become cotangents; 1 / x = y / (x y) makes one division of two.
    inverse = settle(1.0 / nest.fan_out)[:, None]
    return of_temporal / nest.temporal + of_slope, of_axes * spatial[:, ::-1] * inverse
