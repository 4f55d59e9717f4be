"""The mappings that hardware allows of an operation, as data, and the counts that their costs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hw.accesses import Accesses
from hw.operation import LOOPS, OPERANDS, PASSES, RELEVANT, Operation, make_operation

Array = NDArray[np.float64]
G, N, K, C, P, Q, R, S = range(len(LOOPS))
INPUTS = OPERANDS.index("inputs")
IDLE = tuple(tuple(d for d in range(len(LOOPS)) if not RELEVANT[o, d]) for o in range(len(OPERANDS)))
"""For each operand, the loops that do not move it."""
GROUPS = ((P, R), (Q, S), (K,), (C,), (N,), (G,))
"""Loops whose factors enter a count together: a window joins outputs and taps of one axis."""


@dataclass(frozen=True)
class Space:
    """The mappings that hardware allows, as data; level 0 innermost, the last level DRAM.

    Attributes:
      keep: levels that hold an operand, bool, (L, 3).
      temporal: loops that may iterate in time at a level, bool, (L, 8).
      spatial: loops that may fan out below a level along the axes (X, Y), bool, (L, 2, 8).
      fanout: instances below a level along (X, Y), (L, 2).
      capacity: of one instance of a level, in units of `width`, (L,); infinite where nothing limits it.
      width: of a word of each operand at a level, in units of the capacity, (L, 3).
    """

    keep: NDArray[np.bool_]
    temporal: NDArray[np.bool_]
    spatial: NDArray[np.bool_]
    fanout: Array
    capacity: Array
    width: Array

    @property
    def num_levels(self) -> int:
        return len(self.keep)

    @cached_property
    def limited(self) -> dict[int, list[tuple[int, float]]]:
        """Levels of limited capacity, and for each the operands it keeps with the width of their words."""
        levels = [int(l) for l in np.flatnonzero(np.isfinite(self.capacity))]
        return {l: [(int(o), float(self.width[l, o])) for o in np.flatnonzero(self.keep[l])] for l in levels}

    @cached_property
    def fans(self) -> list[tuple[int, int]]:
        """Levels and axes along which loops may fan out."""
        return [(int(l), int(axis)) for l, axis in zip(*np.nonzero(self.spatial.any(axis=-1)), strict=True)]


class Limits(NamedTuple):
    """What a mapping must fit: `capacity` (L,) and `fanout` (L, 2), as in `Space`."""

    capacity: Array
    fanout: Array

    def fit(self, counts: Counts, space: Space) -> NDArray[np.bool_]:
        """Which of n counts fit, (n,)."""
        fits = np.ones(len(counts.cycles), bool)
        for l, widths in space.limited.items():
            fits &= sum(width * counts.tile(l, o) for o, width in widths) <= self.capacity[l]
        for l, axis in space.fans:
            fits &= counts.fan_out(l, axis) <= self.fanout[l, axis]
        return fits


class Nest(NamedTuple):
    """One operation in plain numbers: `bounds` (8,), `stride` and `dilation` (2,), index of the accumulated operand."""

    bounds: tuple[int, ...]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    accumulated: int = OPERANDS.index("outputs")

    @property
    def macs(self) -> int:
        return int(np.prod([int(b) for b in self.bounds], dtype=object))

    def operation(self) -> Operation:
        """The same for `hw.accesses.count`; every tap is on data."""
        sizes: dict[str, Any] = dict(zip(LOOPS, self.bounds, strict=True))
        pass_ = next(p for p, operand in PASSES.items() if operand == OPERANDS[self.accumulated])
        return make_operation(**sizes, stride=self.stride, dilation=self.dilation, pass_=pass_)


class Row(NamedTuple):
    """One count, a product over groups of loops that every cost grows with.

    Attributes:
      kind: "asked" words that the level below asks for, "entering" words that enter, over all instances; for the
        accumulated operand also "asked_visits" and "entering_visits", the same over the words that come for the first
        time; "tile" words of one instance, "share" one over the instances, "cycles" iterations in time, "fan" fan-out.
      level, operand: of what; the axis of a fan-out in place of the operand.
    """

    kind: str
    level: int = 0
    operand: int = 0


class Counts:
    """Words of many mappings: vectors over them, by level and operand, summed over all instances of the level."""

    def __init__(self, rows: dict[Row, int], values: Array, accumulated: int):
        self._rows, self._values, self._accumulated = rows, values, accumulated

    @classmethod
    def of(cls, accesses: Accesses, nest: Nest, space: Space) -> Counts:
        """Counts of mappings that `hw.accesses.count` has counted: fields with a leading axis, in numpy."""
        fields = {name: np.moveaxis(np.asarray(value, float), 0, -1) for name, value in vars(accesses).items()}
        instances = fields["instances"]
        rows, values = make_rows(nest, space), []
        for kind, l, o in rows:
            if kind == "cycles":
                values.append(fields["compute_cycles"])
            elif kind == "share":
                values.append(1.0 / instances[l])
            elif kind == "fan":
                values.append(fields["fanout"][l, o])
            elif kind == "tile":
                values.append(fields["footprint"][l, o])
            else:  # the words that come for the first time are those that need no read and no fill
                asked, accumulated = kind.startswith("asked"), o == nest.accumulated
                again = fields["reads" if asked else "fills"][l, o]
                moved = fields["updates" if asked else "entering"][l, o] if accumulated else again
                values.append(moved / (moved - again) if kind.endswith("visits") else moved * instances[l])
        return cls(rows, np.stack(values), nest.accumulated)

    def _row(self, kind: str, level: int = 0, operand: int = 0) -> Array | None:
        index = self._rows.get(Row(kind, level, operand))
        return None if index is None else self._values[index]

    def reads(self, level: int, operand: int) -> Array | float:
        """Words read for the level below or the MACs, and to add to partial sums."""
        asked = self._row("asked", level, operand)
        visits = self._row("asked_visits", level, operand)
        return 0.0 if asked is None else asked if visits is None else asked - asked / visits

    def fills(self, level: int, operand: int) -> Array | float:
        """Words written from the level above."""
        entering = self._row("entering", level, operand)
        visits = self._row("entering_visits", level, operand)
        return 0.0 if entering is None else entering if visits is None else entering - entering / visits

    def updates(self, level: int, operand: int) -> Array | float:
        """Words of the accumulated operand written from below."""
        asked = self._row("asked", level, operand)
        return 0.0 if asked is None or operand != self._accumulated else asked

    def accesses(self, level: int) -> Array:
        """Reads, fills and updates of all operands."""
        words = []
        for operand in range(len(OPERANDS)):
            if Row("asked", level, operand) in self._rows:
                words += [self.reads(level, operand), self.fills(level, operand), self.updates(level, operand)]
        return np.sum([w for w in words if not isinstance(w, float)], axis=0)

    def share(self, level: int) -> Array:
        """One over the utilised instances of a level; times a total it is what one instance does."""
        return self._values[self._rows[Row("share", level)]]

    @property
    def cycles(self) -> Array:
        """Iterations in time: product slots of one MAC."""
        return self._values[self._rows[Row("cycles")]]

    def tile(self, level: int, operand: int) -> Array | float:
        """Words of the largest tile of one instance of a level with a limited capacity, zero if it is not kept."""
        row = self._row("tile", level, operand)
        return 0.0 if row is None else row

    def fan_out(self, level: int, axis: int) -> Array:
        """Instances fed below a level along an axis."""
        return self._values[self._rows[Row("fan", level, axis)]]


Price = Callable[[Counts], Array]
"""Costs to be minimised, (m, n), from counts of n mappings: any function that never falls when a count grows."""


class Options(NamedTuple):
    """Every way to split the bounds of a group of loops over the levels.

    Attributes:
      loops: of the group.
      temporal: factors, (n, L, loops).
      spatial: factors along the axes, (n, L, 2, loops).
    """

    loops: tuple[int, ...]
    temporal: Array
    spatial: Array


@lru_cache(maxsize=4096)
def factorisations(bound: int, places: int) -> Array:
    """All ordered factorisations of a number into a number of factors, (n, places).

    >>> factorisations(4, 2).tolist()
    [[1.0, 4.0], [2.0, 2.0], [4.0, 1.0]]
    """
    if places == 1:
        return np.array([[float(bound)]])
    divisors = [d for d in range(1, bound + 1) if bound % d == 0]
    tails = [(d, factorisations(bound // d, places - 1)) for d in divisors]
    return np.concatenate([np.column_stack([np.full(len(tail), float(d)), tail]) for d, tail in tails])


def split_loop(loop: int, bound: int, space: Space) -> Options:
    """Every way to split one loop over the levels and axes where it may run, fan-outs within their limits."""
    levels = space.num_levels
    places: list[tuple[int, int | None]] = [(l, None) for l in range(levels) if space.temporal[l, loop]]
    places += [(l, a) for l in range(levels) for a in range(2) if space.spatial[l, a, loop]]
    factors = factorisations(bound, len(places)) if places else np.ones((int(bound == 1), 0))
    temporal, spatial = np.ones((len(factors), levels, 1)), np.ones((len(factors), levels, 2, 1))
    for column, (l, axis) in enumerate(places):
        if axis is None:
            temporal[:, l, 0] = factors[:, column]
        else:
            spatial[:, l, axis, 0] = factors[:, column]
    fits = (spatial[..., 0] <= space.fanout).all(axis=(1, 2))
    return Options((loop,), temporal[fits], spatial[fits])


def _pair(one: Options, other: Options) -> Options:
    i, j = (x.ravel() for x in np.indices((len(one.temporal), len(other.temporal))))
    return Options(
        one.loops + other.loops,
        np.concatenate([one.temporal[i], other.temporal[j]], axis=-1),
        np.concatenate([one.spatial[i], other.spatial[j]], axis=-1),
    )


def make_options(nest: Nest, space: Space) -> list[Options]:
    """Options of every group that has a loop of more than one iteration, and at least one group."""
    groups = []
    for loops in GROUPS:
        if all(nest.bounds[d] == 1 for d in loops) and loops != (G,):
            continue
        options = split_loop(loops[0], nest.bounds[loops[0]], space)
        for d in loops[1:]:
            options = _pair(options, split_loop(d, nest.bounds[d], space))
        groups.append(options)
    return groups


def make_rows(nest: Nest, space: Space) -> dict[Row, int]:
    """The counts that costs are made of, in a fixed order."""
    top, rows = space.num_levels - 1, []
    for l in range(top + 1):
        for o in range(len(OPERANDS)):
            if not space.keep[l, o]:
                continue
            kinds = ["asked"] + ["entering"] * (l < top)
            rows += [Row(kind, l, o) for kind in kinds]
            rows += [Row(f"{kind}_visits", l, o) for kind in kinds if o == nest.accumulated]
            rows += [Row("tile", l, o)] if np.isfinite(space.capacity[l]) else []
        rows.append(Row("share", l))
        rows += [Row("fan", l, a) for a in range(2) if space.spatial[l, a].any()]
    return {row: i for i, row in enumerate([*rows, Row("cycles")])}
