"""What a search for chips has found so far: the designs that no other beats, and until there is one, what comes nearest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from codesign import mapper
from codesign.chip_population import Array, Goal, Priced
from codesign.pareto import non_dominated

_FRONT = 200  # designs that are kept


class Point(NamedTuple):
    """A design: values of its chip's free quantities (k,), metrics (5,), mappings of its operations, (n, 1), their misfit; watts."""

    values: Array
    metrics: Array
    mappings: mapper.Candidates
    misfit: float
    leakage_power: float


class Front:
    """Designs within the budgets that no other beats in energy, latency and area.

    Args:
      goals: whose best designs are always kept; they share their limits, and the first is that of the search.
    """

    def __init__(self, goals: Sequence[Goal]):
        self.points: list[Point] = []
        self._goals = tuple(goals)
        self._nearest: Point | None = None
        self._distance = math.inf

    @property
    def value(self) -> float:
        """The least of the search's goal; infinite while nothing is within the budgets."""
        return min((float(self._goals[0].values(point.metrics)) for point in self.points), default=math.inf)

    def best(self, goal: Goal) -> Point | None:
        """The least value of a goal; what comes nearest to fitting the limits if nothing does; None before anything is taken."""
        return min(self.points, key=lambda point: goal.values(point.metrics)) if self.points else self._nearest

    def ranked(self, goal: Goal) -> list[Point]:
        """Designs by their value of a goal, least first; where none is within the budgets, what comes nearest."""
        if self.points or self._nearest is None:
            return sorted(self.points, key=lambda point: goal.values(point.metrics))
        return [self._nearest]

    def take(self, priced: Priced, point: Callable[[int], Point]) -> None:
        """Takes what improves the front out of a population.

        Args:
          priced: the population, P chips.
          point: makes the design of one of them, by its place.
        """
        excess = self._goals[0].excesses(priced.metrics).sum(axis=1)
        distances = excess + np.where(priced.misfit > 0, 1e6 + priced.misfit, 0.0)
        within = np.flatnonzero(distances == 0)
        old = np.array([other.metrics[:3] for other in self.points]).reshape(-1, 3)
        table = np.concatenate([old, np.asarray(priced.metrics)[within, :3]])
        _, first = np.unique(table, axis=0, return_index=True)
        kept = np.zeros(len(table), bool)
        kept[first] = non_dominated(table[first])
        points = [other for other, keep in zip(self.points, kept[: len(old)], strict=True) if keep]
        self.points = self._thinned(points + [point(int(j)) for j in within[kept[len(old) :]]])
        nearest = int(np.argmin(distances))
        if not self.points and (self._nearest is None or distances[nearest] < self._distance):
            self._nearest, self._distance = point(nearest), distances[nearest]

    def _thinned(self, points: list[Point]) -> list[Point]:
        """At most `_FRONT`: the best of every goal, and of each of so many stretches of the front the first."""
        if len(points) <= _FRONT:
            return points
        table = np.array([point.metrics[:3] for point in points])
        best = {int(np.argmin(goal.values(table))) for goal in self._goals}
        order = np.argsort(table[:, 0])
        spread = order[np.linspace(0, len(points) - 1, _FRONT - len(best)).astype(int)]
        return [points[j] for j in sorted({*best, *spread.tolist()})]
