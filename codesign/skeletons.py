"""The order of loops as far as a cost can tell, and the counts of tiling factors under it.

A loop order enters a cost through little: which operand rests while the innermost loops of a level run, and which loop
slides the window of the inputs. A `Skeleton` fixes that for every level; then every count is a product over groups of
loops. What it assumes holds by construction or, where a loop it relies on has factor one, only overstates the cost, and
another skeleton tells the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from codesign.mapspace import IDLE, INPUTS, Array, Nest, Options, P, Q, R, Row, S, Space
from hw.operation import OPERANDS

MAC = -1
"""The level below level 0."""


class Sweep(NamedTuple):
    """How the temporal loops of one level run.

    Attributes:
      resting: operand whose idle loops are innermost, or None if it does not matter.
      sliding: loop that slides the window, the innermost of those that move the inputs, or None.
      only: whether no other loop than the resting operand's idle ones iterates here, so that it goes on resting above.
      empty: whether no loop iterates here at all, so that everything goes on resting.
    """

    resting: int | None = None
    sliding: int | None = None
    only: bool = False
    empty: bool = False


class Skeleton(NamedTuple):
    """The order of the loops as far as it matters.

    Attributes:
      sweeps: one per level.
      resting: (level, operand) whose tile still rests above the outermost sweep; nothing once all levels have one.
      visits: for every (level, operand), the levels whose iterations of its idle loops bring its tiles anew.
      slides: level and loop that slide the input window of a level, by level, where one does.
    """

    sweeps: tuple[Sweep, ...] = ()
    resting: frozenset[tuple[int, int]] = frozenset()
    visits: Mapping[tuple[int, int], tuple[int, ...]] = {}
    slides: Mapping[int, tuple[int, int]] = {}

    def below(self, sweep: Sweep, space: Space) -> Skeleton:
        """The skeleton with a sweep of the next level around it."""
        m = len(self.sweeps)
        goes_on = {key for key in self.resting if sweep.empty or (sweep.only and key[1] == sweep.resting)}
        ends = self.resting - goes_on
        rested = goes_on | {key for key in ends if key[1] == sweep.resting}
        visits = {key: levels if key in rested else (*levels, m) for key, levels in self.visits.items()}
        slides = dict(self.slides)
        if sweep.sliding is not None:
            slides |= {level: (m, sweep.sliding) for level, operand in ends if operand == INPUTS}
        kept = {(m, o) for o in range(len(OPERANDS)) if space.keep[m, o] and m + 1 < space.num_levels}
        return Skeleton((*self.sweeps, sweep), frozenset(goes_on | kept), visits | dict.fromkeys(kept, ()), slides)


def make_skeletons(nest: Nest, space: Space) -> list[Skeleton]:
    """Every way of resting and sliding that can pay."""
    skeletons = [Skeleton()]
    for _ in range(space.num_levels):
        skeletons = [inner.below(sweep, space) for inner in skeletons for sweep in _sweeps(inner, nest, space)]
    return skeletons


def _sweeps(inner: Skeleton, nest: Nest, space: Space) -> Iterator[Sweep]:
    """What the level around a skeleton may do: let one of the operands rest that rest below; for a window, slide."""
    m, operands = len(inner.sweeps), sorted({operand for _, operand in inner.resting})
    is_top = m + 1 == space.num_levels
    if not space.temporal[m].any():
        yield Sweep(empty=True)
        return
    if not operands:
        yield Sweep()
    windows = [
        d
        for d in (P, Q, R, S)
        if space.temporal[m, d] and nest.bounds[d] > 1 and nest.bounds[R if d in (P, R) else S] > 1
    ]
    if _interchangeable(nest, space) and all(sweep.sliding is None for sweep in inner.sweeps):
        windows = [d for d in windows if d in (P, R)]
    for resting in operands:
        inner_first = [d for d in windows if resting == INPUTS or d in IDLE[resting]]
        sliding: list[int | None] = [*inner_first] if INPUTS in operands and inner_first else [None]
        yield from (Sweep(resting, d) for d in sliding)
        if not is_top:
            yield from (Sweep(resting, d, only=True) for d in ([None] if resting == INPUTS else sliding))
    # Only a window gains from resting with another operand at once: what goes on resting alone is said by `only`.
    if not is_top and INPUTS in operands and windows and len(operands) > 1:
        yield Sweep(empty=True)


def _interchangeable(nest: Nest, space: Space) -> bool:
    """Whether width and height may change places, so that only one of each two skeletons is needed."""
    wide, high = [P, R], [Q, S]
    return (
        all(nest.bounds[a] == nest.bounds[b] for a, b in zip(wide, high, strict=True))
        and nest.stride[0] == nest.stride[1]
        and nest.dilation[0] == nest.dilation[1]
        and np.array_equal(space.temporal[:, wide], space.temporal[:, high])
        and np.array_equal(space.spatial[..., wide], space.spatial[..., high])
    )


class Group:
    """Counts of the options of one group of loops, under any skeleton."""

    def __init__(self, options: Options, nest: Nest, space: Space):
        self.options, self.nest, self.space = options, nest, space
        fan = options.spatial.prod(axis=2)  # (n, L, loops)
        self.spanned = np.cumprod(options.temporal * fan, axis=1)
        self.branch = np.concatenate([np.ones_like(fan[:, :1]), self.spanned[:, :-1]], axis=1)
        self.fan = fan
        self.fan_above = np.concatenate([np.cumprod(fan[:, :0:-1], axis=1)[:, ::-1], np.ones_like(fan[:, :1])], axis=1)
        self.bounds = np.array([nest.bounds[d] for d in options.loops], float)
        self.slides = options.loops[0] in (P, Q)
        if self.slides:
            axis = options.loops[0] - P
            self.window_step = np.array([nest.stride[axis], nest.dilation[axis]], float)
            self.box = ((self.spanned - 1.0) * self.window_step).sum(axis=-1) + 1.0  # inputs of a tile, (n, L)

    def _idle(self, operand: int) -> list[int]:
        return [i for i, d in enumerate(self.options.loops) if d in IDLE[operand]]

    def _visits(self, operand: int, levels: Sequence[int]) -> Array:
        idle = self._idle(operand)
        return self.options.temporal[:, list(levels)][:, :, idle].prod(axis=(1, 2))

    def _words(self, level: int, operand: int, slide: tuple[int, int] | None) -> Array:
        """Words that enter a level in one visit, over all instances."""
        if operand != INPUTS or not self.slides:
            moving = [i for i, d in enumerate(self.options.loops) if d not in IDLE[operand]]
            copies = self.fan_above[:, level][:, self._idle(operand)].prod(axis=1)
            return self.bounds[moving].prod() * copies
        tiles = (self.bounds / self.spanned[:, level]).prod(axis=1)
        box = self.box[:, level]
        if slide is None or slide[1] not in self.options.loops:
            return box * tiles
        m, i = slide[0], self.options.loops.index(slide[1])
        number = self.options.temporal[:, m, i]
        strip = np.minimum(self.window_step[i] * self.branch[:, m, i] * self.fan[:, m, i], box)
        return (box + (number - 1.0) * strip) * tiles / number

    def _merged(self, below: int, level: int, operand: int) -> Array:
        """Share of the accesses left where the network of the levels in between serves equal words once."""
        between = slice(below + 1, level + 1)
        idle = self._idle(operand)
        if operand != INPUTS or not self.slides:
            return 1.0 / self.fan[:, between][:, :, idle].prod(axis=(1, 2))
        m, n = self.fan[:, between, 0], self.fan[:, between, 1]
        steps = self.branch[:, between] * self.window_step
        common = np.gcd(steps[..., 0].astype(np.int64), steps[..., 1].astype(np.int64))
        repeated = np.maximum(0, m - steps[..., 1] / common) * np.maximum(0, n - steps[..., 0] / common)
        return ((m * n - repeated) / (m * n)).prod(axis=1)

    def tile(self, level: int, operand: int) -> Array:
        """Words of the largest tile of a level."""
        if operand == INPUTS and self.slides:
            return self.box[:, level]
        moving = [i for i, d in enumerate(self.options.loops) if d not in IDLE[operand]]
        return self.spanned[:, level][:, moving].prod(axis=1)

    def allowed(self, skeleton: Skeleton) -> NDArray[np.bool_]:
        """Options that iterate only where the skeleton lets them."""
        allowed = np.ones(len(self.options.temporal), bool)
        for m, sweep in enumerate(skeleton.sweeps):
            idle = IDLE[sweep.resting] if sweep.only and sweep.resting is not None else ()
            if sweep.only or sweep.empty:
                barred = [i for i, d in enumerate(self.options.loops) if d not in idle]
                allowed &= (self.options.temporal[:, m, barred] == 1).all(axis=1)
        return allowed

    def count(self, row: Row, skeleton: Skeleton) -> Array:
        """This group's factor of a count, (n,)."""
        kind, level, operand = row
        if kind == "cycles":
            return self.options.temporal.prod(axis=(1, 2))
        if kind == "fan":
            return self.options.spatial[:, level, operand].prod(axis=1)
        if kind == "share":
            return 1.0 / self.fan_above[:, level].prod(axis=1)
        if kind == "tile":
            return self.tile(level, operand)
        if kind == "entering_visits":
            return self._visits(operand, skeleton.visits[level, operand])
        slide = skeleton.slides.get(level)
        if kind == "entering":
            return self._visits(operand, skeleton.visits[level, operand]) * self._words(level, operand, slide)
        below = max((l for l in range(level) if self.space.keep[l, operand]), default=MAC)
        if below == MAC:
            asked = self.bounds.prod() * self._merged(MAC, level, operand)
        else:
            asked = self.count(Row("entering", below, operand), skeleton) * self._merged(below, level, operand)
        return asked if kind == "asked" else asked / self._words(level, operand, slide)
