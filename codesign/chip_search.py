"""The best chips for a fixed network: chip and mappings searched together, without training.

One round of the search

1. proposes a population: chips in the boxes that branch and bound has open, least bound first; changes of the best chips
   known; and those moved along the slopes of the goal in the quantities that have one (supply, bandwidths), which pass
   through the mapper's minimum by the envelope theorem;
2. prices the whole population on the mappings that are known already for chips of as many levels: a design that fits is a
   real one;
3. searches mappings for the most promising few, and further ones for the best known, which all later populations are
   priced on, too; where none of the known ones fits, a chip promises what its bound says;
4. cuts the boxes of the least bound where their bounds rise most.

Whatever ends it, there are a best design, the front of all that were priced, and a bound that no chip lies below.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from codesign import mapper
from codesign.anytime import Effort, Progress, keep_searching
from codesign.branching import OpenBoxes
from codesign.chip_boxes import Box, Work, bound_boxes, every_hierarchy, halves, hierarchy, whole_space
from codesign.chip_front import Front, Point
from codesign.chip_population import (
    METRICS,
    Array,
    Goal,
    Priced,
    changed,
    follow_slopes,
    inside,
    on_grains,
    price_population,
    silicon,
)
from codesign.design import DesignSpace, physical_values, with_values
from codesign.evaluation import NUM_CHAINS, begin_search, initial_prices
from codesign.sharding import replicated
from hw.accesses import Accesses
from hw.chip import Chip

OBJECTIVES = {"edp": (1.0, 1.0, 0.0), "ed2p": (1.0, 2.0, 0.0), "energy": (1.0, 0.0, 0.0), "latency": (0.0, 1.0, 0.0)}
"""Powers of energy, latency and area in what is minimised."""
SOURCES = ("changes", "boxes", "slopes")
"""Where populations come from; with none of them they are drawn from the whole space: random search."""
SLOPED = ("vdd", "local_bandwidth_bits", "shared_bandwidth_bits", "resident_fraction")
_FRONT_POWERS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0))
_POOL = 16  # mappings of each operation that populations are priced on, for each hierarchy
_FIRST_ROUNDS = 6  # of searches for the base chip, so that nothing is compared with one that was mapped in haste
_DRAWS = 4  # for each chip of a population
_ELITE = 6  # best designs that changes and slopes begin with


@dataclass(frozen=True)
class Plan:
    """What a round does.

    Attributes:
      population: chips priced; searched: how many get mappings of their own, the best known once more among them.
      evaluations: mappings tried for each operation of such a chip.
      boxes: cut in a round.
      sources: of the population, among `SOURCES`.
      sloped: quantities that move along slopes.
      whole_front: whether every other round is for another part of the front of energy, latency and area.
    """

    population: int = 64
    searched: int = 3
    evaluations: int = 800
    boxes: int = 2
    sources: tuple[str, ...] = SOURCES
    sloped: tuple[str, ...] = SLOPED
    whole_front: bool = True

    def effort(self, rounds: int, seconds: float = math.inf) -> Effort:
        """That of so many rounds: mappings tried for one operation."""
        return Effort(rounds * self.searched * self.evaluations, seconds)


class ChipsFound(NamedTuple):
    """What a search ended with.

    Attributes:
      best: the least value within the budgets; where nothing was within them or fitted, what comes nearest.
      value: of the objective; infinite where there is no such design.
      bound: no chip of the space within the budgets has a lower value.
      front: designs that no other beats in energy, latency and area, all within the budgets, by rising energy.
      base: the base chip itself, within the budgets or not.
      chips, evaluations: chips priced; mappings tried, over all chips and operations.
      history: (chips priced, seconds, value, bound) after each round.
    """

    best: Point
    value: float
    bound: float
    front: tuple[Point, ...]
    base: Point
    chips: int
    evaluations: int
    history: tuple[tuple[int, float, float, float], ...]


class ChipSearch:
    """Chips of a space for one piece of work.

    Args:
      space: the base chip and what is free.
      work: what runs, at which bits.
      budgets: limits in SI units on `METRICS`.
      powers: of energy, latency and area in what is minimised, see `OBJECTIVES`.
      plan: what a round does.
      seed: of everything drawn.
      mesh: devices to spread populations and chains over, see `codesign.sharding`; all processes search alike.

    Raises:
      ValueError: no chip of the space can be within the budgets, by their bounds; says which binds, and the nearest. Or
        populations, or chains, that do not divide among the devices.
    """

    def __init__(
        self,
        space: DesignSpace,
        work: Work,
        budgets: Mapping[str, float],
        powers: tuple[float, float, float] = OBJECTIVES["edp"],
        plan: Plan | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
    ):
        num = 1 if mesh is None else mesh.size
        plan = Plan() if plan is None else plan
        if plan.population % num or NUM_CHAINS % num:
            raise ValueError(
                f"expected devices among which {plan.population} chips and {NUM_CHAINS} chains divide, got {num}; use fewer"
            )
        self.space, self.work, self.plan, self.mesh = space, work, plan, mesh
        self.names = tuple(space.variables)
        limits = np.array([budgets.get(name, np.inf) for name in METRICS])
        self.goal = Goal(np.array(powers), limits)
        self.others = [Goal(np.array(p), limits) for p in _FRONT_POWERS] if self.plan.whole_front else []
        self._rng, self._key = np.random.default_rng(seed), jax.random.key(seed)
        self._slots = mapper.make_slots(self._chip(on_grains(space, space.column("high"))))
        self._tables = mapper.make_tables(work.step.operations)
        self._searched: set[bytes] = set()
        self._front = Front([self.goal, *self.others])
        self._base: Point | None = None
        self._pools: list[mapper.Candidates] = []  # of each hierarchy, see `codesign.chip_boxes`
        self._boxes = OpenBoxes[Box]()
        self._leading = whole_space(space)
        self._history: list[tuple[int, float, float, float]] = []
        self._chips = self._evaluations = 0
        self._open_whole_space()

    def search(self, effort: Effort, on_progress: Callable[[Progress], None] | None = None) -> ChipsFound:
        """Rounds until the effort is spent, evaluations being those of one operation; Ctrl-C returns the best so far."""
        begun = time.monotonic()

        def run_round(i: int, _: ChipsFound | None) -> ChipsFound:
            self._round(i)
            found = self.found(time.monotonic() - begun)
            self._history.append(found.history[-1])
            return found

        return keep_searching(
            run_round, self.plan.effort(1).evaluations, effort, lambda found: found.value, on_progress
        )

    def found(self, seconds: float = 0.0) -> ChipsFound:
        """The state of the search."""
        best, base, value = self._front.best(self.goal), self._base, self._front.value
        assert best is not None and base is not None  # a round has ended
        now = (self._chips, seconds, value, min(self._boxes.bound, value))
        front = tuple(sorted(self._front.points, key=lambda point: point.metrics[0]))
        return ChipsFound(best, value, now[3], front, base, self._chips, self._evaluations, (*self._history, now))

    def chip(self, point: Point) -> Chip:
        """The chip of a design."""
        return self._chip(point.values)

    def _chip(self, values: Array) -> Chip:
        return with_values(self.space.base, {n: jnp.asarray(v) for n, v in zip(self.names, values, strict=True)})

    def _round(self, i: int) -> None:
        goal = self.others[i // 2 % len(self.others)] if i % 2 and self.others else self.goal
        self.start()
        self.try_chips(self._propose(goal), goal)
        self._branch()

    def try_chips(self, chips: Array, goal: Goal) -> Array:
        """Prices a population, searches mappings of the most promising, prices it again; a proposer of one's own may call it.

        Args:
          chips: values (P, k) on their grains, always as many.
          goal: what promises are measured by.

        Returns:
          Merits (P,), lower is better.
        """
        priced, best = self._price(chips, goal), self._front.best(goal)
        assert best is not None  # something was priced
        merits = goal.merits(priced.metrics, priced.misfit)
        order = np.argsort(merits)
        fresh = self._fresh(chips, order, priced.misfit, goal)
        prices = goal.prices(priced.metrics, priced.leakage_power)
        for j in fresh:
            self._add_mappings(chips[j], prices[j])
        self._add_mappings(best.values, goal.prices(best.metrics, np.asarray(best.leakage_power)), best.mappings)
        again, last = chips.copy(), order[-1]
        again[last] = best.values  # in the place of the least promising
        priced = self._price(again, goal)
        return np.where(np.arange(len(chips)) == last, merits, goal.merits(priced.metrics, priced.misfit))

    def _fresh(self, chips: Array, order: NDArray[np.intp], misfit: Array, goal: Goal) -> list[int]:
        """Which chips get mappings of their own: in turn the most promising on known mappings, and by its bound.

        Known mappings say nothing about a chip that they do not fit, as where it has fewer MACs: its bound does.
        """
        unknown = np.flatnonzero(misfit > 0)[: 2 * len(self.names)]
        bounds = self._bounds([Box(chips[j], chips[j]) for j in unknown], goal)
        by_bound = unknown[np.argsort(bounds)]
        ranked = [j for pair in itertools.zip_longest(order, by_bound) for j in pair if j is not None]
        new = dict.fromkeys(int(j) for j in ranked if chips[j].tobytes() not in self._searched)
        return list(new)[: self.plan.searched - 1]

    def start(self) -> None:
        """Mappings from scratch, which all else begins with, for the base chip and for it without each set of memories that
        may be left out; only the first call does anything."""
        if self._pools:
            return
        values = physical_values(self.space.base)
        base = on_grains(self.space, np.array([values[name] for name in self.names]))
        chips = every_hierarchy(self.space, base)
        first = [np.asarray(initial_prices(self._chip(chip), self.work.operation_bits.dtype)) for chip in chips]
        found = [self._search_mappings(chip, prices, None) for chip, prices in zip(chips, first, strict=True)]
        self._pools = [_joined(*[best] * (_POOL // 2)) for best in found]
        population, own = np.resize(chips, (self.plan.population, len(base))), int(hierarchy(self.space, base))
        for i in range(_FIRST_ROUNDS):
            priced = self._price(population, self.goal)
            prices = self.goal.prices(priced.metrics, priced.leakage_power)
            for j in range(len(chips)) if i == 0 else (own,):
                self._add_mappings(chips[j], prices[j])
        self._base = self._point(population, self._price(population, self.goal), own)

    def _add_mappings(self, values: Array, prices: Array, own: mapper.Candidates | None = None) -> None:
        """Mappings of a chip into its pool, in place of the oldest; begins with the pool, and with its `own` before it."""
        which = int(hierarchy(self.space, values))
        pool = self._pools[which]
        found = self._search_mappings(values, prices, pool if own is None else _joined(own, pool))
        self._pools[which] = _joined(found, pool)

    def _search_mappings(self, values: Array, prices: Array, start: mapper.Candidates | None) -> mapper.Candidates:
        """The two best mappings found for a chip."""
        self._key, key = jax.random.split(self._key)
        self._searched.add(values.tobytes())
        self._evaluations += self.plan.evaluations * len(self.work.operation_bits)
        return jax.device_get(begin_search(
            self._chip(values), *self.work, jnp.asarray(prices, self.work.operation_bits.dtype), key,
            slots=self._slots, tables=self._tables, start=start, evaluations=self.plan.evaluations, num_best=2,
            mesh=self.mesh,
        )())  # fmt: skip

    def _known(self, chips: Array) -> tuple[jax.Array, jax.Array, Work, Accesses]:
        """Chips, their hierarchies, the work, and the counts of all mappings in the pools, as populations take them."""
        counts = [pool.accesses for pool in self._pools]
        stacked = jax.tree.map(lambda *x: np.stack(x), *counts)
        return jnp.asarray(chips, jnp.float32), jnp.asarray(hierarchy(self.space, chips)), self.work, stacked

    def _price(self, chips: Array, goal: Goal) -> Priced:
        """Prices a population, and takes what improves the front."""
        base, *known = replicated((self.space.base, *self._known(chips), self._weights(goal)), self.mesh)
        found = price_population(base, self.names, *known, mesh=self.mesh)
        priced = Priced(*(np.asarray(x) for x in found))
        priced = priced._replace(metrics=np.asarray(priced.metrics, np.float64))
        self._chips += len(chips)
        self._front.take(priced, functools.partial(self._point, chips, priced))
        return priced

    @staticmethod
    def _weights(goal: Goal) -> jax.Array:
        """Powers of energy and latency, for the choice of mappings."""
        return jnp.asarray(goal.powers[:2], jnp.float32)

    def _point(self, chips: Array, priced: Priced, j: int) -> Point:
        rows = np.arange(priced.picks.shape[1])
        pool = self._pools[int(hierarchy(self.space, chips[j]))]
        mappings = jax.tree.map(lambda x: x[rows, priced.picks[j]][:, None], pool)
        return Point(chips[j], priced.metrics[j], mappings, float(priced.misfit[j]), float(priced.leakage_power[j]))

    def _propose(self, goal: Goal) -> Array:
        """A population (P, k) from the plan's sources, in equal shares."""
        sources, num = self.plan.sources, self.plan.population
        if not sources:
            return self._drawn(whole_space(self.space), num)
        shares = np.diff(np.linspace(0, num, len(sources) + 1).astype(int))
        elite = np.array([point.values for point in self._front.ranked(goal)[:_ELITE]])
        parts = []
        for source, share in zip(sources, shares, strict=True):
            if source == "boxes":
                parts.append(self._drawn(self._leading, share))
            elif source == "changes":
                parts.append(self._smallest(changed(self.space, elite, _DRAWS * share, self._rng), share))
            else:
                parts.append(self._slide(elite, share, goal))
        return np.concatenate(parts)

    def _drawn(self, boxes: list[Box], num: int) -> Array:
        """Chips in boxes drawn for each, (num, k)."""
        which = self._rng.integers(len(boxes), size=_DRAWS * num)
        return self._smallest(np.concatenate([inside(self.space, boxes[j], 1, self._rng) for j in which]), num)

    def _smallest(self, chips: Array, num: int) -> Array:
        """The first of many draws whose area and SRAM are within the budgets, which no mapping is needed to tell."""
        known = [METRICS.index("area"), METRICS.index("sram")]
        sizes = np.asarray(silicon(self.space.base, self.names, jnp.asarray(chips, jnp.float32)), np.float64)
        excess = np.maximum(sizes / self.goal.limits[known], 1.0).prod(axis=1)
        return chips[np.argsort(excess, kind="stable")[:num]]

    def _slide(self, elite: Array, num: int, goal: Goal) -> Array:
        """Best chips, and changes of them beside, moved along the slopes of a goal."""
        sloped = tuple(name for name in self.plan.sloped if name in self.names)
        starts = np.concatenate([elite, changed(self.space, elite, num, self._rng)])[:num]
        if not sloped:
            return starts
        values, hierarchies, work, accesses = self._known(starts)
        priced = price_population(self.space.base, self.names, values, hierarchies, work, accesses, self._weights(goal))
        prices = goal.prices(np.asarray(priced.metrics, np.float64), np.asarray(priced.leakage_power))
        limits = tuple(jnp.asarray(end, jnp.float32) for end in (self.space.column("low"), self.space.column("high")))
        floats = Goal(*(jnp.asarray(x, jnp.float32) for x in goal))
        moved = follow_slopes(
            self.space.base,
            self.names,
            sloped,
            values,
            hierarchies,
            limits,
            work,
            accesses,
            jnp.asarray(prices, jnp.float32),
            floats,
        )
        return on_grains(self.space, np.asarray(moved, np.float64))

    def _open_whole_space(self) -> None:
        """Bounds the whole space, and refuses budgets that no chip in it can meet."""
        bounds = np.stack(bound_boxes(self.space, self._leading, self.work), axis=-1)
        values = self._bound_values(bounds, self.goal)
        if not np.isfinite(values).any():
            self._refuse(bounds)
        for box, value in zip(self._leading, values, strict=True):
            self._boxes.add(float(value), box)

    def _refuse(self, bounds: Array) -> None:
        """Says which budget cannot be met: one that no box meets by itself, or the one that, raised least, leaves a box.

        Where more than one has to be raised nothing is said, and the search ends with what comes nearest.
        """
        limits = self.goal.limits
        nearest = bounds.min(axis=(0, 1))
        worst = int(np.argmax(nearest / limits))
        if nearest[worst] <= limits[worst]:
            asked = [int(i) for i in np.flatnonzero(np.isfinite(limits))]
            for i in asked:
                others = self.goal._replace(limits=np.where(np.arange(len(METRICS)) == i, np.inf, limits))
                held = others.held(bounds).reshape(-1, len(METRICS))
                nearest[i] = held[(held <= others.limits).all(axis=1), i].min(initial=np.inf)
            worst = min(asked, key=lambda i: nearest[i] / limits[i])
        if np.isfinite(nearest[worst]):
            raise UnmetBudgetError(METRICS[worst], limits[worst], float(nearest[worst]), is_proven=True)

    def _bounds(self, boxes: list[Box], goal: Goal) -> Array:
        """Least value of a goal in each of at most twice as many boxes as there are free quantities."""
        if not boxes:
            return np.zeros(0)
        padded = boxes + [boxes[0]] * (2 * len(self.names) - len(boxes))  # one shape, compiled once
        bounds = np.stack(bound_boxes(self.space, padded, self.work), axis=-1)
        return self._bound_values(bounds[: len(boxes)], goal)

    def _bound_values(self, bounds: Array, goal: Goal) -> Array:
        """Least value of a goal in each box, bounded (boxes, parts, 5); infinite where budgets rule the box out."""
        held = self.goal.held(bounds)  # (boxes, parts, 5)
        ruled_out = (held > self.goal.limits).any(axis=-1)
        return np.where(ruled_out, np.inf, goal.values(held)).min(axis=1)

    def _branch(self) -> None:
        """Cuts the boxes of the least bound, each along the quantity that raises the lesser bound of its halves most."""
        leading = []
        for _ in range(min(self.plan.boxes, len(self._boxes))):
            bound, box = self._boxes.pop()
            cuts = list(halves(self.space, box))
            if not cuts:
                self._boxes.close(bound)
                continue
            values = self._bounds([half for cut in cuts for half in cut], self.goal).reshape(-1, 2)
            chosen = int(np.argmax(values.min(axis=1)))
            for half, own in zip(cuts[chosen], values[chosen], strict=True):
                if np.isfinite(own):
                    self._boxes.add(max(bound, float(own)), half, self._front.value)
                    leading.append(half)
        self._leading = leading or self._leading


def _joined(*candidates: mapper.Candidates) -> mapper.Candidates:
    """The first `_POOL` candidates of each operation."""
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :_POOL], *candidates)


class UnmetBudgetError(ValueError):
    """A budget that nothing was found to meet.

    Attributes:
      metric: which, of `METRICS`; limit and nearest: in SI units.
      is_proven: whether `nearest` is a bound that no chip lies below; else it is the nearest that was found.
    """

    def __init__(self, metric: str, limit: float, nearest: float, is_proven: bool):
        self.metric, self.limit, self.nearest, self.is_proven = metric, limit, nearest, is_proven
        super().__init__(f"expected a budget of {metric} that a chip can meet, got {limit:.4g}; nearest {nearest:.4g}")


def check_budgets(found: ChipsFound, goal: Goal) -> None:
    """Check that a search ended within its budgets.

    Raises:
      UnmetBudgetError: nothing was; names the budget that the nearest design exceeds most.
    """
    excesses = goal.excesses(found.best.metrics)
    worst = int(np.argmax(excesses))
    if excesses[worst] > 0:
        raise UnmetBudgetError(METRICS[worst], goal.limits[worst], float(found.best.metrics[worst]), is_proven=False)
