"""The best chip of a family for a network: bound-ordered branch and bound over whole-number parameters.

A box of chips is bounded by a chip that does not exist: the lowest price and the widest limits of any in the box. Its
best mappings, enumerated, cost no more than those of any chip in the box. The same mappings need a chip of a certain
size; if the budget allows it, that chip is a candidate. What lies between bound and candidate is the difference between
the lowest price and the price at that size, so the box is split there, along the parameter that matters most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from codesign.branching import OpenBoxes
from codesign.enumeration import Enumerator, Found, NoMappingError
from codesign.lagrangian import Choice, least_product
from codesign.mapspace import Counts, Limits, Nest, Price, Space

Chip = tuple[int, ...]
"""Parameters of a chip, in the order of its family."""


class Family(Protocol):
    """Chips that differ in whole-number parameters, each of them costing area.

    Attributes:
      parameters: their names.
      low, high: ranges, both ends included.
      is_capacity: parameters that let larger tiles fit and make an access dearer; of the others, more is cheaper.
      space: mappings of the largest.
    """

    @property
    def parameters(self) -> tuple[str, ...]: ...

    @property
    def low(self) -> Chip: ...

    @property
    def high(self) -> Chip: ...

    @property
    def is_capacity(self) -> tuple[bool, ...]: ...

    @property
    def space(self) -> Space: ...

    def limits(self, low: Chip, high: Chip) -> Limits:
        """The widest of a box."""

    def price(self, low: Chip, high: Chip, nest: Nest) -> Price:
        """Energy and latency, (2, n), at most those of any chip in a box; exact if it holds one chip."""

    def needed(self, counts: Counts, low: Chip, high: Chip) -> NDArray[np.int64]:
        """The chip of a box that mappings cost least on, (n, parameters); it may exceed the box."""

    def area(self, chip: Chip) -> float:
        """Grows with every parameter."""


class Design(NamedTuple):
    """A chip and what a network costs on it.

    Attributes:
      chip: its parameters.
      choice: the mapping of every operation, an index into `found`, and the sums.
      found: mappings of every operation.
    """

    chip: Chip
    choice: Choice
    found: tuple[Found, ...]


class Progress(NamedTuple):
    """The state of a search after so many evaluations: best value, the bound on all values, boxes looked at."""

    evaluations: int
    cpu_s: float
    value: float
    bound: float
    boxes: int


class FamilyFound(NamedTuple):
    """What a search ended with.

    Attributes:
      design: the best.
      bound: no chip of the family within the budget has a lower value.
      history: one entry whenever value or bound moved.
      evaluations: mappings and parts of mappings that were costed.
    """

    design: Design
    bound: float
    history: list[Progress]
    evaluations: int

    @property
    def gap(self) -> float:
        """Value over bound, minus one."""
        return self.design.choice.value / self.bound - 1.0


class _Box(NamedTuple):
    bound: float
    low: Chip
    high: Chip
    choice: Choice
    found: tuple[Found, ...]


class FamilySearch:
    """Mappings of a network on the chips of a family; reuses what any of its searches finds.

    Args:
      family: the chips.
      nests: the operations.
      counts: how often each runs.
      powers: of energy and latency in the value to be minimised; (1, 1) is EDP.
    """

    def __init__(
        self,
        family: Family,
        nests: Sequence[Nest],
        counts: Sequence[float],
        powers: tuple[float, float] = (1.0, 1.0),
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.family, self.nests, self.counts, self.powers = family, tuple(nests), tuple(counts), powers
        self.enumerators = [Enumerator(nest, family.space) for nest in self.nests]
        self.pool: list[Found | None] = [None] * len(self.nests)
        self.on_progress = on_progress
        self.history: list[Progress] = []
        self.evaluations = self.boxes = 0
        self.best: Design | None = None

    def map_chip(self, chip: Chip, deadline: float = np.inf) -> tuple[Design, float]:
        """The best mappings on one chip, and a bound on the value of all: the same, if there was time to look at all."""
        box = self._bound(chip, chip, None, deadline)
        choice = least_product([found.costs for found in box.found], self.counts, self.powers)
        return Design(chip, choice, box.found), box.bound

    def search(
        self,
        low: Chip | None = None,
        high: Chip | None = None,
        area: float = np.inf,
        tolerance: float = 0.0,
        deadline: float = np.inf,
        start: Chip | None = None,
    ) -> FamilyFound:
        """The best chip between `low` and `high` with at most this area; Ctrl-C ends the search with the best so far.

        Args:
          low, high: corners of the box to search; the family's by default.
          area: budget.
          tolerance: stop when no chip can be better by more than this fraction; 0 finds and proves the optimum.
          deadline: `time.process_time()` to stop at; the bound then tells how far the best may be from the optimum.
          start: a chip to begin with, within the area: the best is never worse.

        Raises:
          ValueError: even the smallest chip exceeds the area, or no mapping of an operation fits the largest.
        """
        low, high = self.family.low if low is None else low, self.family.high if high is None else high
        if self.family.area(low) > area:
            raise ValueError(
                f"expected an area of at least {self.family.area(low):.4g} for the smallest chip {low}, got {area:.4g}; "
                "raise the budget"
            )
        self.best, boxes = None, OpenBoxes[_Box](tolerance)
        if start is not None and self.family.area(start) <= area:
            self.best, _ = self.map_chip(start)
            self._report(0.0)
        root = self._visit(low, self._clip(low, high, area), None, area)
        boxes.add(root.bound, root)
        while not boxes.is_done(self._value_of_best()):
            if self.best is not None and time.process_time() > deadline:
                break
            try:
                self._branch(boxes, area)
            except KeyboardInterrupt:
                if self.best is None:
                    raise
                break
            self._report(min(boxes.bound, self._value_of_best()))
        assert self.best is not None  # the last box of a branch is one chip
        design, _ = self.map_chip(self.best.chip)
        bound = min(boxes.bound, design.choice.value)
        return FamilyFound(design, bound, self.history, self.evaluations)

    def _branch(self, boxes: OpenBoxes[_Box], area: float) -> None:
        """Splits the box of the least bound."""
        bound, box = boxes.pop()
        for low, high in self._split(box):
            if self.family.area(low) > area:
                continue
            try:
                child = self._visit(low, self._clip(low, high, area), box, area)
            except NoMappingError:
                continue
            except KeyboardInterrupt:
                boxes.close(bound)
                raise
            boxes.add(child.bound, child, self._value_of_best())

    def _value_of_best(self) -> float:
        return np.inf if self.best is None else self.best.choice.value

    def _visit(self, low: Chip, high: Chip, parent: _Box | None, area: float) -> _Box:
        """Bounds a box, and tries the chip that its mappings need."""
        box = self._bound(low, high, parent)
        chip = self._needed(box)
        if self.family.area(chip) <= area and all(a <= b for a, b in zip(chip, self.family.high, strict=True)):
            self._try(chip)
        return box

    def _bound(self, low: Chip, high: Chip, parent: _Box | None, deadline: float = np.inf) -> _Box:
        limits = self.family.limits(low, high)
        found = []
        for i, (nest, enumerator) in enumerate(zip(self.nests, self.enumerators, strict=True)):
            price = self.family.price(low, high, nest)
            old = None if parent is None else parent.found[i]
            if old is None or not self._still_best(enumerator, old, price, limits):
                old = enumerator.search(price, limits, self.pool[i], deadline, keep_on_interrupt=False)
                self.evaluations += old.evaluations
                self.pool[i] = _merge(self.pool[i], old)
            found.append(old)
        choice = least_product(
            [np.concatenate([f.costs, f.open_costs], axis=1) for f in found], self.counts, self.powers
        )
        return _Box(choice.value, low, high, choice, tuple(found))

    def _still_best(self, enumerator: Enumerator, found: Found, price: Price, limits: Limits) -> bool:
        """Whether a front of a larger box is that of a smaller one: it fits, and at the same cost; all else costs no less."""
        counts = enumerator.counts(found.counts)
        return bool(limits.fit(counts, enumerator.space).all()) and np.array_equal(price(counts), found.costs)

    def _needed(self, box: _Box) -> Chip:
        """The chip on which the chosen mappings of a box cost least."""
        needed = [
            self.family.needed(enumerator.counts(found.counts[:, [pick]]), box.low, box.high)[0]
            for enumerator, found, pick in zip(self.enumerators, box.found, box.choice.picks, strict=True)
        ]
        return tuple(int(v) for v in np.max([box.low, *needed], axis=0))

    def _try(self, chip: Chip) -> None:
        """Prices all known mappings on a chip."""
        found, limits = [], self.family.limits(chip, chip)
        for nest, enumerator, known in zip(self.nests, self.enumerators, self.pool, strict=True):
            assert known is not None
            fits = limits.fit(enumerator.counts(known.counts), enumerator.space)
            if not fits.any():
                return
            costs = self.family.price(chip, chip, nest)(enumerator.counts(known.counts[:, fits]))
            found.append(known._replace(costs=costs, counts=known.counts[:, fits], origin=known.origin[fits]))
        choice = least_product([f.costs for f in found], self.counts, self.powers)
        if self.best is None or choice.value < self.best.choice.value:
            self.best = Design(chip, choice, tuple(found))

    def _split(self, box: _Box) -> list[tuple[Chip, Chip]]:
        """Two parts of a box along one parameter; none if its bound is the cost of its smallest chip."""
        open_ = [i for i, (a, b) in enumerate(zip(box.low, box.high, strict=True)) if a < b]
        halved = [i for i in open_ if not self.family.is_capacity[i]]
        if halved:
            i = halved[0]
            at = int((box.low[i] * box.high[i]) ** 0.5) + 1
        else:
            needed = self._needed(box)
            rises = {i: self._value(box, i, needed[i]) for i in open_ if needed[i] > box.low[i]}
            if not rises:
                return []
            i = max(rises, key=rises.__getitem__)
            at = (box.low[i] + needed[i] + 1) // 2
        below, above = list(box.high), list(box.low)
        below[i], above[i] = at - 1, at
        return [(box.low, tuple(below)), (tuple(above), box.high)]

    def _value(self, box: _Box, parameter: int, needed: int) -> float:
        """What the chosen mappings of a box cost at the price of chips from the needed size on."""
        low = list(box.low)
        low[parameter] = needed
        costs = [
            self.family.price(tuple(low), box.high, nest)(enumerator.counts(found.counts[:, [pick]]))
            for nest, enumerator, found, pick in zip(
                self.nests, self.enumerators, box.found, box.choice.picks, strict=True
            )
        ]
        return least_product(costs, self.counts, self.powers).value

    def _clip(self, low: Chip, high: Chip, area: float) -> Chip:
        """The corner of a box without what exceeds the area even if all else is smallest."""
        clipped = list(high)
        for i in range(len(low)):
            first, last = low[i], high[i]
            while first < last:
                middle = (first + last + 1) // 2
                fits = self.family.area((*low[:i], middle, *low[i + 1 :])) <= area
                first, last = (middle, last) if fits else (first, middle - 1)
            clipped[i] = first
        return tuple(clipped)

    def _report(self, bound: float) -> None:
        self.boxes += 1
        value = self._value_of_best()
        if self.history and (value, bound) == (self.history[-1].value, self.history[-1].bound):
            return
        self.history.append(Progress(self.evaluations, time.process_time(), value, bound, self.boxes))
        if self.on_progress is not None:
            self.on_progress(self.history[-1])


def _merge(one: Found | None, other: Found) -> Found:
    """The distinct mappings of two searches; their costs are of no more use."""
    if one is None:
        return other
    origin, chosen = np.unique(np.concatenate([one.origin, other.origin]), axis=0, return_index=True)
    counts = np.concatenate([one.counts, other.counts], axis=1)[:, chosen]
    return Found(np.empty((0, len(chosen))), counts, origin, np.empty((0, 0)), 0)
