"""All mappings of one operation, searched to the end: the cheapest, the K cheapest or the whole front.

The order of the loops is fixed as far as it matters by a `Skeleton`. Under it every count is a product over independent
groups of loops (width P R, height Q S, and G, N, K, C alone), so that

1. an option of a group (its factors at all levels) that another undercuts in every count is never needed: *dominance*;
2. a choice for some groups, completed with the least of every count over the others, costs no more than any of its
   completions: *bounds*.

docs/search.md has the argument in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from codesign.mapspace import IDLE, INPUTS, Array, Counts, G, Limits, Nest, Price, R, S, Space, make_options, make_rows
from codesign.skeletons import Group, Skeleton, Sweep, make_skeletons
from hw.operation import LOOPS


def undominated(columns: Array, times: int = 1) -> NDArray[np.intp]:
    """Indices of the columns of (m, n) that fewer than `times` others undercut in every row; of equal ones the first.

    A part in 1e12 counts as equal: products of the same factors in another order.
    """
    varying = columns[np.ptp(columns, axis=1) > 1e-12 * columns.max(axis=1)]
    n = columns.shape[1]
    if not len(varying):
        return np.arange(min(n, times))
    ahead = np.ones((n, n), bool)
    for row in varying:
        ahead &= row[:, None] <= row[None] * (1 + 1e-12)
    ahead &= ~ahead.T | np.triu(np.ones((n, n), bool), 1)
    return np.flatnonzero(ahead.sum(axis=0) < times)


class Front:
    """The best costs found so far: the `num_best` lowest, or the Pareto set if a mapping has several costs.

    Attributes:
      costs: (m, n), lowest first, in the first row.
      counts: of the mappings they belong to, (rows, n).
      origin: number of the skeleton and of the option of each group, (n, 1 + groups).
    """

    def __init__(self, num_costs: int, num_rows: int, num_groups: int, num_best: int):
        self.num_best = num_best
        self.costs, self.counts = np.empty((num_costs, 0)), np.empty((num_rows, 0))
        self.origin = np.empty((0, 1 + num_groups), np.intp)

    def covers(self, costs: Array) -> NDArray[np.bool_]:
        """Which of (m, n) cannot improve the front: enough of what is known is as good in everything."""
        if self.costs.shape[1] < self.num_best:
            return np.zeros(costs.shape[1], bool)
        if len(costs) == 1:
            return costs[0] >= self.costs[0, self.num_best - 1]
        if len(costs) == 2 and self.num_best == 1:  # a staircase: the first falls as the second grows
            before = np.searchsorted(self.costs[0], costs[0], side="right") - 1
            return (before >= 0) & (self.costs[1, before] <= costs[1])
        return np.concatenate([
            (self.costs[:, :, None] <= part[:, None]).all(axis=0).sum(axis=0) >= self.num_best
            for part in np.array_split(costs, -(-costs.shape[1] * self.costs.shape[1] // 2_000_000), axis=1)
        ])  # fmt: skip

    def add(self, costs: Array, counts: Array, origin: NDArray[np.intp]) -> None:
        """Takes in what improves the front."""
        new = ~self.covers(costs)
        if not new.any():
            return
        costs = np.concatenate([self.costs, costs[:, new]], axis=1)
        counts = np.concatenate([self.counts, counts[:, new]], axis=1)
        origin = np.concatenate([self.origin, origin[new]])
        order = np.lexsort(costs[::-1])
        if len(costs) == 1:
            order = order[: self.num_best]
        elif len(costs) == 2 and self.num_best == 1:
            lowest = np.minimum.accumulate(costs[1, order])
            order = order[np.concatenate([[True], costs[1, order[1:]] < lowest[:-1]])]
        else:
            order = order[undominated(costs[:, order], self.num_best)]
        self.costs, self.counts, self.origin = costs[:, order], counts[:, order], origin[order]


_PART = 1 << 18
"""Combinations held at once."""


class _Branch(NamedTuple):
    """A skeleton with its options: for each of its groups, in turn, their indices (n,) and counts (rows, n)."""

    number: int
    groups: list[int]
    indices: list[NDArray[np.intp]]
    counts: list[Array]

    def least_above(self) -> list[Array]:
        """The least counts of all groups from each on, (rows, 1); ones at the end."""
        least = [np.ones((len(self.counts[0]), 1))]
        for counts in self.counts[::-1]:
            least.insert(0, least[0] * counts.min(axis=1, keepdims=True))
        return least

    def alone(self) -> Array:
        """The least counts of all completions of each option of each group, in turn, (rows, n)."""
        lowest = [counts.min(axis=1, keepdims=True) for counts in self.counts]
        others = [np.prod([*lowest[:g], *lowest[g + 1 :]], axis=0) for g in range(len(lowest))]
        return np.concatenate([counts * other for counts, other in zip(self.counts, others, strict=True)], axis=1)

    def keep(self, kept: NDArray[np.bool_]) -> _Branch:
        """Without the options of `alone` that are not kept."""
        ends = np.cumsum([len(i) for i in self.indices])
        parts = [kept[end - len(i) : end] for i, end in zip(self.indices, ends, strict=True)]
        return _Branch(
            self.number,
            self.groups,
            [i[part] for i, part in zip(self.indices, parts, strict=True)],
            [c[:, part] for c, part in zip(self.counts, parts, strict=True)],
        )


class _Branches(NamedTuple):
    """All skeletons, and side by side, to be looked at in one go: the least counts of each, and `alone` of each."""

    each: list[_Branch]
    least: Array
    alone: Array
    ends: NDArray[np.intp]


class Found(NamedTuple):
    """What a search ended with.

    Attributes:
      costs: (m, n), lowest first, in the first row.
      counts: of the mappings, (rows, n): the `known` of another search.
      origin: how `Enumerator.mapping` rebuilds them, (n, 1 + groups).
      open_costs: nothing that was left unsearched costs less than one of these, (m, any); empty after a complete search.
      evaluations: mappings and parts of mappings that were costed.
    """

    costs: Array
    counts: Array
    origin: NDArray[np.intp]
    open_costs: Array
    evaluations: int

    @property
    def complete(self) -> bool:
        return not self.open_costs.size


class NoMappingError(ValueError):
    """No mapping fits; says which level, and the smallest tiles."""


class Enumerator:
    """All mappings of one nest in a space, for any number of searches with other prices and limits.

    Args:
      nest: the operation.
      space: mappings allowed; its limits are the widest of all searches.
      num_best: how many of the cheapest mappings every search is to find; 1 for a Pareto set.

    Raises:
      ValueError: the accumulated operand is the inputs of a sliding window, or a loop has nowhere to run.
    """

    def __init__(self, nest: Nest, space: Space, num_best: int = 1):
        if nest.accumulated == INPUTS and (nest.bounds[R] > 1 or nest.bounds[S] > 1):
            raise ValueError(
                "expected an operation that accumulates weights or outputs, got accumulated inputs of a window; "
                "enumerate hw.operation.transposed(operation) instead"
            )
        self.nest, self.space, self.num_best = nest, space, num_best
        self.rows = make_rows(nest, space)
        self.groups = [Group(options, nest, space) for options in make_options(nest, space)]
        self.skeletons = list(make_skeletons(nest, space))
        self._tables: dict[tuple, tuple[NDArray[np.intp], Array]] = {}
        self._branches: dict[bytes, _Branches] = {}

    def counts(self, values: Array) -> Counts:
        """Named access to counts (rows, n)."""
        return Counts(self.rows, values, self.nest.accumulated)

    def search(
        self,
        price: Price,
        limits: Limits | None = None,
        known: Found | None = None,
        deadline: float = np.inf,
        on_improvement: Callable[[Array], None] | None = None,
        *,
        evaluations: float = np.inf,
        keep_on_interrupt: bool = True,
    ) -> Found:
        """The cheapest mappings under a price, or all that no other undercuts in every cost.

        From the first mapping that fits on, the search may end at any time with the best so far: at its limits, or by Ctrl-C.

        Args:
          price: m costs, each growing with every count.
          limits: capacities and fan-outs, at most those of the space, which are the default.
          known: mappings of an earlier search of this enumerator, to begin with.
          deadline: `time.process_time()` to stop at.
          on_improvement: called with the costs (m, n) so far.
          evaluations: to stop at, mappings and parts of mappings.
          keep_on_interrupt: whether Ctrl-C ends the search with what was found; else it goes on to the caller.

        Raises:
          NoMappingError: none fits.
        """
        limits = Limits(self.space.capacity, self.space.fanout) if limits is None else limits
        ending = (_SpentError, KeyboardInterrupt) if keep_on_interrupt else _SpentError
        return _Search(self, price, limits, on_improvement, deadline, evaluations).run(known, ending)

    def branches(self, fanout: Array) -> _Branches:
        """Every skeleton under a limit of the fan-out, with undominated options."""
        key = fanout.tobytes()
        if key not in self._branches:
            each = []
            fits = [(g.options.spatial.prod(axis=-1) <= fanout).all(axis=(1, 2)) for g in self.groups]
            for number, skeleton in enumerate(self.skeletons):
                tables = [self._table(g, skeleton) for g in range(len(self.groups))]
                kept = [np.flatnonzero(fit[indices]) for fit, (indices, _) in zip(fits, tables, strict=True)]
                if all(map(len, kept)):
                    # Few options first: a bound that cuts then cuts whole products of the groups to come.
                    groups = sorted(range(len(tables)), key=lambda g, kept=kept: len(kept[g]))  # type: ignore[misc]
                    indices = [tables[g][0][kept[g]] for g in groups]
                    each.append(_Branch(number, groups, indices, [tables[g][1][:, kept[g]] for g in groups]))
            if not each:
                raise NoMappingError(
                    "expected a mapping that fits, got none: a loop has nowhere to run; enlarge a fan-out"
                )
            least = np.concatenate([branch.least_above()[0] for branch in each], axis=1)
            alone = [branch.alone() for branch in each]
            ends = np.cumsum([a.shape[1] for a in alone])
            self._branches[key] = _Branches(each, least, np.concatenate(alone, axis=1), ends)
        return self._branches[key]

    def _table(self, g: int, skeleton: Skeleton) -> tuple[NDArray[np.intp], Array]:
        """Undominated options of a group and their counts, worked out once for skeletons that look alike to it."""
        loops = self.groups[g].options.loops
        seen = (
            g,
            tuple((key, v) for key, v in sorted(skeleton.visits.items()) if set(loops) & set(IDLE[key[1]])),
            tuple((l, s) for l, s in sorted(skeleton.slides.items()) if s[1] in loops),
            tuple((s.resting if s.only else None, s.empty) for s in skeleton.sweeps),
        )
        if seen not in self._tables:
            allowed = np.flatnonzero(self.groups[g].allowed(skeleton))
            counts = np.stack([self.groups[g].count(row, skeleton) for row in self.rows])[:, allowed]
            chosen = undominated(counts, self.num_best) if len(allowed) else allowed
            self._tables[seen] = allowed[chosen], counts[:, chosen]
        return self._tables[seen]

    def mapping(self, origin: NDArray[np.intp]) -> tuple[Array, Array, NDArray[np.int32]]:
        """Temporal factors (L, 8), spatial factors (L, 2, 8) and loop order (L, 8) of `hw.mapping.Mapping`."""
        levels = self.space.num_levels
        temporal, spatial = np.ones((levels, len(LOOPS))), np.ones((levels, 2, len(LOOPS)))
        for group, chosen in zip(self.groups, origin[1:], strict=True):
            loops = list(group.options.loops)
            temporal[:, loops], spatial[..., loops] = group.options.temporal[chosen], group.options.spatial[chosen]
        order = [_ranks(sweep) for sweep in self.skeletons[origin[0]].sweeps]
        return temporal, spatial, np.array(order, np.int32)


def _ranks(sweep: Sweep) -> list[int]:
    """Rank of each loop within a level: what rests does so over its idle loops, the sliding one as far in as it may."""
    idle = () if sweep.resting is None else IDLE[sweep.resting]
    inner_first = sorted(range(len(LOOPS)), key=lambda d: (d == G, d not in idle, d != sweep.sliding, d))
    return [inner_first.index(d) for d in range(len(LOOPS))]


class _SpentError(Exception):
    """A limit of a search was reached, and it has a mapping to end with."""


class _Search:
    """One run of `Enumerator.search`."""

    def __init__(
        self, enumerator: Enumerator, price: Price, limits: Limits, on_improvement, deadline: float, most: float
    ):
        self.enumerator, self.price, self.limits, self.on_improvement = enumerator, price, limits, on_improvement
        self.deadline, self.most = deadline, most
        self.evaluations = 0
        self.front: Front | None = None

    def run(self, known: Found | None, ending: type[BaseException] | tuple[type[BaseException], ...]) -> Found:
        """Begin with what is known or, failing that, narrowly; then go through the branches, cheapest bound first."""
        branches = self.enumerator.branches(self.limits.fanout)
        if known is not None:
            self._add(known.counts, known.origin)
        is_ended = False
        try:
            for branch in branches.each if self.front is None else ():
                self._narrow(branch)
        except ending:
            if self.front is None:
                raise
            is_ended = True
        kept = np.zeros(branches.alone.shape[1], bool)
        kept[self._open(branches.alone)] = True
        bounds = self._cost(branches.least)
        open_ = []
        for i in np.argsort(np.log(bounds).sum(axis=0)):
            branch, end = branches.each[i], branches.ends[i]
            pruned = branch.keep(kept[end - sum(map(len, branch.indices)) : end])
            if all(map(len, pruned.indices)):
                open_.append((bounds[:, [i]], pruned))
        try:
            while open_ and not is_ended:
                self._complete(open_[0][1])
                open_.pop(0)
        except ending:
            if self.front is None:
                raise
        if self.front is None:
            raise NoMappingError(self._reason(branches.least))
        left = [bound for bound, _ in open_ if not self.front.covers(bound)[0]]
        open_costs = np.concatenate(left, axis=1) if left else np.empty((len(self.front.costs), 0))
        return Found(self.front.costs, self.front.counts, self.front.origin, open_costs, self.evaluations)

    def _reason(self, least: Array) -> str:
        counts, space = self.enumerator.counts(least), self.enumerator.space
        for l, widths in space.limited.items():
            smallest = float(np.min(sum(width * counts.tile(l, o) for o, width in widths)))
            if smallest > self.limits.capacity[l]:
                return (
                    f"expected a mapping that fits, got none: level {l} holds {self.limits.capacity[l]:g} and the smallest "
                    f"tiles take {smallest:g}; enlarge it"
                )
        return "expected a mapping that fits, got none: no tiles fit all levels at once; enlarge one, or a fan-out"

    def _add(self, values: Array, origin: NDArray[np.intp]) -> None:
        fits = self._fits(values)
        if not fits.any():
            return
        costs = self._cost(values[:, fits])
        if self.front is None:
            self.front = Front(len(costs), len(values), origin.shape[1] - 1, self.enumerator.num_best)
        before = self.front.costs
        self.front.add(costs, values[:, fits], origin[fits])
        if self.on_improvement is not None and self.front.costs is not before:
            self.on_improvement(self.front.costs)

    def _cost(self, values: Array) -> Array:
        self.evaluations += values.shape[1]
        return self.price(self.enumerator.counts(values))

    def _fits(self, values: Array) -> NDArray[np.bool_]:
        return self.limits.fit(self.enumerator.counts(values), self.enumerator.space)

    def _open(self, least: Array) -> NDArray[np.intp]:
        """Which partial mappings with these least counts may be completed to one that fits and improves the front."""
        fitting = np.flatnonzero(self._fits(least))
        if self.front is None or not len(fitting):
            return fitting
        return fitting[~self.front.covers(self._cost(least[:, fitting]))]

    def _narrow(self, branch: _Branch) -> None:
        """Completes a few of the cheapest choices of a branch, for something to measure others by."""
        self._grow(
            branch, branch.least_above(), np.ones((len(branch.counts[0]), 1)), np.full((1, 1), branch.number), beam=32
        )

    def _complete(self, branch: _Branch) -> None:
        """Completes all of a branch that may improve the front."""
        self._grow(branch, branch.least_above(), np.ones((len(branch.counts[0]), 1)), np.full((1, 1), branch.number))

    def _grow(
        self,
        branch: _Branch,
        least_above: list[Array],
        values: Array,
        chosen: NDArray[np.intp],
        beam: int | None = None,
    ) -> None:
        """Combines choices (rows, n) with the options of the next group, drops what cannot end well, and goes on.

        Cheapest bound first and a part at a time, so that what one part finds cuts the next.
        """
        g = chosen.shape[1] - 1
        indices, counts = branch.indices[g], branch.counts[g]
        k, is_last = counts.shape[1], g + 1 == len(branch.counts)
        for start in range(0, values.shape[1], max(1, _PART // k)):
            if self.front is not None and (self.evaluations >= self.most or time.process_time() >= self.deadline):
                raise _SpentError
            part = slice(start, start + max(1, _PART // k))
            grown = (values[:, part, None] * counts[:, None]).reshape(len(values), -1)
            least = grown * least_above[g + 1]
            left = self._open(least)
            if not len(left):
                continue
            if not is_last:
                left = left[np.argsort(np.log(self._cost(least[:, left])).sum(axis=0))[:beam]]
            origin = np.column_stack([chosen[part][left // k], indices[left % k]])
            if is_last:
                self._add(grown[:, left], origin[:, [0, *(1 + np.argsort(branch.groups))]])
            else:
                self._grow(branch, least_above, grown[:, left], origin, beam)
