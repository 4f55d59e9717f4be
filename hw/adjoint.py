"""Pull-back of `hw.accesses.count`: from cotangents of counts to cotangents of tiling factors.

Written by hand because autodiff of the counts takes half a minute to compile and runs a tenth as fast
(docs/performance.md). Almost every count is a product of factors, so most of it adds up *shares*: the share of a value is
its cotangent times the value; that of a product goes to each of its factors, and is divided by the factor only at the end.

Where autodiff would split a tie, the side of the smaller factor is taken: a tile that just reaches the bound still
grows with its factors. Gates are flat at factors of one and of two. Away from ties it equals autodiff (a test).
"""

import operator
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hw.operation import LOOPS
from hw.traffic import (
    BOXED,
    GROUPED,
    IDLE,
    INPUTS,
    MOVING,
    OUTPUTS,
    PLACED,
    SLIDING,
    WEIGHTS,
    K,
    Nest,
    Slide,
    Sweep,
    Traffic,
    Window,
    Words,
    distinct_windows,
    over,
    pick,
    present,
    settle,
    total,
    touched_inputs,
    twice,
    window_fan_out,
)

ALL = tuple(range(len(GROUPED)))
TO_LOOPS = tuple(GROUPED.index(loop) for loop in LOOPS)
Sum = jax.Array | float


class Rows:
    """Sums of shares or cotangents by loop, each (L, B)."""

    def __init__(self) -> None:
        self.sums: list[Sum] = [0.0] * len(GROUPED)

    def add(self, loops: Iterable[int], share: jax.Array) -> None:
        """Adds the same (L, B) to each of the loops."""
        for j in loops:
            self.sums[j] = self.sums[j] + share

    def add_each(self, loops: Iterable[int], shares: jax.Array) -> None:
        """Adds (L, n, B), one for each of the loops."""
        for x, j in enumerate(loops):
            self.sums[j] = self.sums[j] + shares[:, x]

    def stack(self, like: jax.Array) -> jax.Array:
        """(L, 8, B)."""
        return jnp.stack([jnp.broadcast_to(row, like.shape) for row in self.sums], axis=1)


class Shares:
    """Shares of the values of a `Nest`, of its tiles as they end at the bounds, and cotangents of temporal factors."""

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.temporal, self.fan_out = Rows(), Rows()
        self.branch, self.step, self.tile = Rows(), Rows(), Rows()
        self.temporal_above, self.fan_out_above = Rows(), Rows()
        self.slope = Rows()

    def add_to_all_fan_outs(self, loops: Iterable[int], share: jax.Array) -> None:
        """Adds the share (B,) of a product over the fan-outs of all levels: that of the lowest, and those above it."""
        lowest = jnp.stack([share, *[jnp.zeros_like(share)] * (self.num_levels - 1)])
        self.fan_out.add(loops, lowest)
        self.fan_out_above.add(loops, lowest)


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
    shares = Shares(nest.num_levels)
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
    shares.add_to_all_fan_outs(idle, -of_asked[0] * words.asked[0] / words.first[0])
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
    fan_out, branch = window_fan_out(nest)
    different, pull = jax.vjp(lambda *x: distinct_windows(nest, *x), fan_out, branch)
    multicast = different * over(nest.fan_out, BOXED)
    of_entering, of_asked = settle(_pull_asked(nest.keep[:, INPUTS], given.entering, given.asked, multicast))
    of_asked = of_asked * words.asked
    of_fan_out, of_branch = pull(of_asked / different)
    shares.fan_out.add(BOXED, of_asked)
    shares.fan_out.add_each(SLIDING, of_fan_out * fan_out)
    shares.branch.add_each(SLIDING, of_branch * branch)
    shares.add_to_all_fan_outs(ALL, -of_asked[0])
    of_tiles = of_entering * words.entering + given.first * words.first + given.blind * words.blind
    shares.temporal_above.add(BOXED, -of_tiles)
    shares.fan_out_above.add(BOXED, -of_tiles)

    given = given._replace(entering=of_entering * window.tiles, first=given.first * window.tiles)
    given = settle(given._replace(blind=given.blind * window.tiles))
    sums = _OuterSums(nest.num_levels, window)
    pieces = [_pull_level(traffic, given, l, sums) for l in range(nest.num_levels)]
    of_extents, of_touched, of_padding = (jnp.stack(piece) for piece in zip(*pieces, strict=True))
    outer = sums.stack()
    shares.temporal_above.add((K,), outer.repeats)
    shares.temporal_above.add(MOVING[INPUTS], outer.outside)
    of_run = total(outer.runs)
    shares.temporal.add(BOXED, of_run)
    shares.temporal.add_each(SLIDING, of_run[:, None] - outer.runs)
    shares.slope.add_each(SLIDING, outer.advance)
    shares.step.add_each(SLIDING, outer.step)
    of_padding = of_padding - of_tiles[:, None]
    shares.temporal_above.add_each(SLIDING, of_padding)
    shares.fan_out_above.add_each(SLIDING, of_padding)
    shares.tile.add(BOXED, given.tile * words.tile)
    shares.tile.add_each(SLIDING, of_padding + _pull_extents(nest, window, of_extents, of_touched))
    return SweepShares(outer.still, outer.repeats, outer.relevant, outer.first)


class _OuterSums:
    """What the windows of inner levels give to the loops of each level, summed level by level."""

    class Stacked(NamedTuple):
        """Shares of the sweep and of `outside`, (L, B); of each loop's run, and of its step; cotangents of being first
        and of the factor by which a window advances, (L, 4, B)."""

        still: jax.Array
        relevant: jax.Array
        repeats: jax.Array
        outside: jax.Array
        runs: jax.Array
        step: jax.Array
        first: jax.Array
        advance: jax.Array

    def __init__(self, num_levels: int, window: Window) -> None:
        level, loops = jnp.zeros_like(window.box[0]), jnp.zeros_like(window.tile[0])
        self.levels = [self.Stacked(*[level] * 4, *[loops] * 4) for _ in range(num_levels)]

    def add(self, m: int, **sums: jax.Array) -> None:
        """Adds to level m."""
        level = self.levels[m]
        self.levels[m] = level._replace(**{name: getattr(level, name) + value for name, value in sums.items()})

    def stack(self) -> Stacked:
        return self.Stacked(*(jnp.stack(kind) for kind in zip(*self.levels, strict=True)))


def _pull_level(traffic: Traffic, given: Words, l: int, sums: _OuterSums) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of extents (2, B) and touched inputs (B,), shares of padding (4, B), of the window of level l.

    `given` holds cotangents of inputs that enter, before `Window.tiles` multiplies them.
    """
    nest, sweep, window = traffic.nest, traffic.sweeps[INPUTS], traffic.window
    outers = range(l + 1, nest.num_levels)
    entering, first, blind = given.entering[l], given.first[l], given.blind[l]
    waiting = [jnp.ones_like(entering)]
    for m in outers:
        waiting.append(waiting[-1] * sweep.still[m] * sweep.relevant[m])
    of_box = waiting[-1] * (entering + first) + given.tile[l] * window.boxed[l]
    of_touched = waiting[-1] * blind
    of_extents, of_padding = jnp.zeros_like(window.extents[l]), jnp.zeros_like(window.padding[l])
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
        pulled = _pull_slide(nest, sweep, window, slid, inputs, writes, l, sums)
        of_box, of_touched = of_box + pulled[0], of_touched + pulled[1]
        of_extents, of_padding = of_extents + pulled[2], of_padding + pulled[3]
    of_extents = of_extents + of_box[None] * window.extents[l][::-1]
    sums.levels, of_extents, of_touched, of_padding = settle((sums.levels, of_extents, of_touched, of_padding))
    return of_extents, of_touched, of_padding


def _pull_slide(
    nest: Nest, sweep: Sweep, window: Window, slid: Slide, of_inputs: jax.Array, of_blind: jax.Array, l: int, sums
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Pulls back `hw.traffic.slide`: cotangents of box, touched and extents, and shares of padding, of level l."""
    box, touched, padding = window.box[l, None, None], window.touched[l, None, None], window.padding[l][None]
    relevant, afresh = sweep.relevant[l + 1 :], window.afresh[l + 1 :]
    fresh = of_inputs * box[0] + of_blind * touched[0]
    slope, slope_blind = of_inputs[:, None], of_blind[:, None]
    new_blind, is_new = jnp.minimum(slid.new, touched), slid.new <= touched
    run = slope * (padding * box + slid.advance * slid.new)
    run = run + slope_blind * (padding * touched + slid.advance * new_blind)
    runs = window.first[l + 1 :] * window.others[l + 1 :]
    of_first = window.others[l + 1 :] * run - (relevant * fresh)[:, None]
    slope, slope_blind = runs * slope, runs * slope_blind
    of_padding = padding * (slope * (box - slid.new) + slope_blind * (touched - new_blind))
    of_new = slid.advance * (slope + jnp.where(is_new, slope_blind, 0.0))
    is_step = window.step[l + 1 :] <= twice(window.extents[l])
    across = twice(window.extents[l][::-1])
    of_extent = of_new * jnp.where(is_step, 0.0, across)
    of_across = of_new * slid.strip
    of_step = jnp.where(is_step, of_new * slid.new, 0.0)
    of_advance = slope * slid.new + slope_blind * new_blind
    for i, m in enumerate(range(l + 1, nest.num_levels)):
        of_still = -relevant[i] * sweep.still[m] * fresh[i]
        sums.add(m, still=of_still, relevant=afresh[i] * fresh[i])
        sums.add(m, runs=runs[i] * run[i], step=of_step[i], first=of_first[i], advance=of_advance[i])
    of_box = afresh * of_inputs + total(slope * padding)
    of_touched = afresh * of_blind + total(slope_blind * (padding + jnp.where(is_new, 0.0, slid.advance)))
    of_extent, of_across = _add(of_extent), _add(of_across)
    of_extents = of_extent[:2] + of_extent[2:] + (of_across[:2] + of_across[2:])[::-1]
    return _add(of_box), _add(of_touched), of_extents, _add(of_padding)


def _add(levels: jax.Array) -> jax.Array:
    """Sum over levels: (M, ..., B) -> (..., B)."""
    return reduce(operator.add, levels)


def _pull_extents(nest: Nest, window: Window, of_extents: jax.Array, of_touched: jax.Array) -> jax.Array:
    """Shares (L, 4, B) of the sliding loops' tile, from extents and touched inputs, also as the tile below others."""
    of_tile = jnp.concatenate([of_extents * nest.stride[None], of_extents * nest.dilation[None]], axis=1)
    _, pull = jax.vjp(lambda *x: touched_inputs(nest, *x), window.tile, window.below)
    of_touching, of_below = pull(of_touched)
    as_below: list[jax.Array] = []
    from_above = jnp.zeros_like(of_below[0])
    for l in reversed(range(nest.num_levels)):
        kept = nest.keep[l, INPUTS, None] > 0.5
        as_below.insert(0, jnp.where(kept, from_above, 0.0))
        from_above = of_below[l] + jnp.where(kept, 0.0, from_above)
    return (of_tile + of_touching + jnp.stack(as_below)) * window.tile


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
        of_still = jnp.concatenate([of_still, given.first * still * present(sliding)], axis=1)
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
    names = ("temporal", "fan_out", "branch", "step", "tile", "temporal_above", "fan_out_above", "slope")
    of = settle({name: getattr(shares, name).stack(nest.temporal[:, 0]) for name in names})
    spanned = jnp.where(nest.spanned <= nest.bounds[None], of["tile"], 0.0)
    spanned_by = [jnp.zeros_like(spanned[0])]
    for l in range(nest.num_levels - 1, 0, -1):
        spanned_by.insert(0, spanned_by[0] + of["branch"][l] + of["step"][l] + spanned[l])
    temporal, fan_out = [], []
    of_temporal_above, of_fan_out_above = of_cycles[None], jnp.zeros_like(spanned[0])
    for l in range(nest.num_levels):
        of_tile = spanned[l] + spanned_by[l]
        temporal.append((of["temporal"][l] + of_tile + of_temporal_above) / nest.temporal[l] + of["slope"][l])
        fan_out.append(of["fan_out"][l] + of["step"][l] + of_tile + of_fan_out_above)
        of_temporal_above = of_temporal_above + of["temporal_above"][l]
        of_fan_out_above = of_fan_out_above + of["fan_out_above"][l]
    of_axes = pick(jnp.stack(fan_out), TO_LOOPS)[:, None] + (fanout * over(spatial, ALL))[:, :, None]
    return pick(jnp.stack(temporal), TO_LOOPS), of_axes / spatial
