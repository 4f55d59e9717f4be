"""Populations of chips: priced on mappings that are known already, and moved along the slopes of a goal, under `vmap`.

A population is a table of values (P, k), a column for each free quantity of a `DesignSpace`. To count a mapping is the
larger part of its cost and is done once; to price the counts on another chip is cheap, and exact for that chip.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from numpy.typing import NDArray

from codesign.annealing import ILLEGAL
from codesign.chip_boxes import Box, Work, settled, sram_bits
from codesign.design import DesignSpace, with_values
from codesign.evaluation import initial_prices
from codesign.objective import best_candidate, next_prices, price_candidates, step_cost
from codesign.sharding import gathered, spread
from codesign.uncertainty import QUICKLY_COMPILED
from hw.accesses import Accesses
from hw.chip import Chip
from hw.schedule import StepCost, join
from nets.training import apply_gradient

Array = NDArray[np.float64]
type Numbers = Any
"""An array: of numpy on the host, of JAX inside a compiled function."""
METRICS = ("energy", "latency", "area", "power", "sram")
"""What a budget may limit: joules, seconds, square metres, watts, and bits of all SRAM on the chip."""
_EXCESS = 20.0  # nats of the goal that a factor e above a budget costs
_SLOPE_STEPS, _SLOPE_RATE = 12, 0.1  # of Adam, on logarithms


class Goal(NamedTuple):
    """What is to be small: a product of powers of (energy, latency, area), (3,), within limits (5,) on `METRICS`."""

    powers: Numbers
    limits: Numbers

    def values(self, metrics: Array) -> Array:
        """The product, of metrics (..., 5)."""
        return np.exp(np.log(metrics[..., :3]) @ self.powers)

    def excesses(self, metrics: Array) -> Array:
        """log(metric / limit) where a limit is exceeded, else 0."""
        return np.maximum(np.log(metrics) - np.log(self.limits), 0.0)

    def prices(self, metrics: Array, leakage_power: Array) -> Array:
        """Of a joule and of a second, (..., 2): slopes of the logarithm of the product, leakage through the second included."""
        per_joule = self.powers[0] / metrics[..., 0]
        return np.stack([per_joule, self.powers[1] / metrics[..., 1] + per_joule * leakage_power], axis=-1)

    def merits(self, metrics: Array, misfit: Array) -> Array:
        """To be sorted by: what fits before what does not, exceeded limits priced in."""
        missed = np.where(misfit > 0, ILLEGAL + np.log1p(misfit), 0.0)
        return np.log(self.values(metrics)) + _EXCESS * self.excesses(metrics).sum(axis=-1) + missed

    def held(self, bounds: Array) -> Array:
        """Bounds (..., 5) on any chip of a box, power by leakage alone, raised to bounds on those within the limits.

        Power is that of leakage and what the work takes, dynamic / latency: to stay within a limit of power takes time, to
        stay within one of latency takes power.
        """
        energy, latency, area, leakage, sram = np.moveaxis(bounds, -1, 0)
        dynamic = energy - leakage * latency
        room = self.limits[METRICS.index("power")] - leakage
        with np.errstate(divide="ignore"):
            slowest = np.where(room > 0, dynamic / room, np.inf)
        latency = np.maximum(latency, slowest)
        power = leakage + dynamic / self.limits[METRICS.index("latency")]
        return np.stack([dynamic + leakage * latency, latency, area, power, sram], axis=-1)


class Priced(NamedTuple):
    """A population on known mappings.

    Attributes:
      metrics: (P, 5), in the order of `METRICS`.
      misfit: (P,), 0 where all mappings fit.
      leakage_power: (P,), in watts.
      picks: (P, n), the mapping of each operation.
    """

    metrics: Numbers
    misfit: Numbers
    leakage_power: Numbers
    picks: Numbers


@functools.partial(jax.jit, static_argnames=("names", "mesh"), compiler_options=QUICKLY_COMPILED)
def price_population(
    base: Chip,
    names: tuple[str, ...],
    values: jax.Array,
    hierarchies: jax.Array,
    work: Work,
    accesses: Accesses,
    powers: jax.Array,
    mesh: Mesh | None = None,
) -> Priced:
    """Each chip under the best of the candidate mappings for it.

    Args:
      base: the chip whose other quantities all have.
      names: of the columns of `values` (P, k).
      hierarchies: of each chip, (P,); see `codesign.chip_boxes.hierarchy`.
      work: what runs.
      accesses: counts of the candidates of each hierarchy, (hierarchies, n, K).
      powers: of energy and latency, (2,), which weigh the two for the choice of mappings.
      mesh: devices to spread the chips over, see `codesign.sharding`; they must divide among them.
    """

    def one(row: jax.Array, hierarchy: jax.Array) -> Priced:
        chip = with_values(base, dict(zip(names, row, strict=True)))
        costs, resident = price_candidates(chip, *work, _of_hierarchy(accesses, hierarchy))
        prices = initial_prices(chip, row.dtype)
        for _ in range(2):  # the product of sums is least at prices of its own sums
            picks = best_candidate(costs, prices)
            chosen = jax.tree.map(lambda x, picks=picks: x[jnp.arange(len(picks)), picks], costs)
            cost = join(chip, work.step, chosen, resident, work.tensor_bits)
            prices = next_prices(cost, powers)
        return Priced(_metrics(chip, cost), jnp.sum(cost.violation), cost.leakage_energy / cost.latency, picks)

    return gathered(jax.vmap(one)(*spread((values, hierarchies), mesh, axis=0)), mesh)


def _of_hierarchy(accesses: Accesses, hierarchy: jax.Array) -> Accesses:
    """Counts (n, K) out of (hierarchies, n, K); where there is one hierarchy the same for all chips, not a copy for each."""
    return jax.tree.map(lambda x: x[hierarchy] if len(x) > 1 else x[0], accesses)


def _metrics(chip: Chip, cost: StepCost) -> jax.Array:
    """Those of `METRICS`, (5,)."""
    return jnp.stack([cost.energy, cost.latency, cost.area, cost.power, sram_bits(chip)])


@functools.partial(jax.jit, static_argnames="names", compiler_options=QUICKLY_COMPILED)
def silicon(base: Chip, names: tuple[str, ...], values: jax.Array) -> jax.Array:
    """Area in m2 and bits of SRAM of chips (P, k), which depend on no mapping, (P, 2)."""

    def one(row: jax.Array) -> jax.Array:
        chip = with_values(base, dict(zip(names, row, strict=True)))
        return jnp.stack([chip.area().total, sram_bits(chip)])

    return jax.vmap(one)(values)


@functools.partial(jax.jit, static_argnames=("names", "sloped"), compiler_options=QUICKLY_COMPILED)
def follow_slopes(
    base: Chip,
    names: tuple[str, ...],
    sloped: tuple[str, ...],
    values: jax.Array,
    hierarchies: jax.Array,
    limits: tuple[jax.Array, jax.Array],
    work: Work,
    accesses: Accesses,
    prices: jax.Array,
    goal: Goal,
) -> jax.Array:
    """A population moved down the slope of its goal, through the soft minimum over known mappings (`step_cost`).

    Args:
      base, names, values, hierarchies, work, accesses: as `price_population`.
      sloped: the columns that move.
      limits: least and largest values, (k,) each.
      prices: (P, 2), which rank mappings.
      goal: what is minimised, and its limits.

    Returns:
      Values (P, k), between grains; what is 0 stays so.
    """
    columns = np.array([names.index(name) for name in sloped])

    def placed(moved: jax.Array, row: jax.Array) -> jax.Array:
        return row.at[columns].set(jnp.where(row[columns] > 0, jnp.exp(moved), 0.0))

    def loss(moved: jax.Array, row: jax.Array, hierarchy: jax.Array, prices: jax.Array) -> jax.Array:
        chip = with_values(base, dict(zip(names, placed(moved, row), strict=True)))
        cost = step_cost(chip, *work, _of_hierarchy(accesses, hierarchy), prices)
        metrics = jnp.log(_metrics(chip, cost))
        excess = jax.nn.relu(metrics - jnp.log(goal.limits))
        return metrics[:3] @ goal.powers + _EXCESS * jnp.sum(excess)

    slopes, optimizer = jax.vmap(jax.grad(loss)), optax.adam(_SLOPE_RATE)
    low, high = (jnp.log(limit[columns]) for limit in limits)

    def advance(state, _):
        moved, optimizer_state = state
        gradient = slopes(moved, values, hierarchies, prices)
        moved, optimizer_state = apply_gradient(optimizer, gradient, optimizer_state, moved)
        return (jnp.clip(moved, low[None], high[None]), optimizer_state), None

    moved = jnp.clip(jnp.log(values[:, columns]), low[None], high[None])
    (moved, _), _ = jax.lax.scan(advance, (moved, optimizer.init(moved)), length=_SLOPE_STEPS)
    return jax.vmap(placed)(moved, values)


def on_grains(space: DesignSpace, values: Array) -> Array:
    """Values (..., k) at the nearest grain inside their ranges; a memory less than half as large as the least is left out."""
    low, high, grain = (space.column(name) for name in ("low", "high", "grain"))
    built = np.clip(np.round(np.round(values / grain) * grain, 9), low, high)
    return settled(space, np.where(space.column("optional") & (values < low / 2), 0.0, built))


def inside(space: DesignSpace, box: Box, num: int, rng: np.random.Generator) -> Array:
    """Chips drawn in a box, each quantity uniformly on its own scale, (num, k)."""
    shares = rng.random((num, len(space.variables)))
    linear = box.low + shares * (box.high - box.low)
    some = np.maximum(box.low, 1e-12)  # what is left out is 0 at both ends
    return on_grains(space, np.where(space.column("logarithmic"), some * (box.high / some) ** shares, linear))


def changed(space: DesignSpace, parents: Array, num: int, rng: np.random.Generator) -> Array:
    """Chips with some quantities of another parent, and one to three of their own changed, (num, k).

    Four changes in five make a quantity a little larger or smaller, the others draw it anew: where only a jump helps, as
    from slices of four bits to the eight of the operands, small steps never arrive. A memory that may be left out is so in
    a third of those.
    """
    grain, count = space.column("grain"), len(space.variables)
    first, second = (parents[rng.integers(len(parents), size=num)] for _ in range(2))
    values = np.where(rng.random((num, count)) < 0.2, second, first)
    is_moved = rng.random((num, count)).argsort(axis=1) < rng.integers(1, 4, size=(num, 1))
    factor = np.exp(rng.normal(0.0, 0.35, (num, count)))
    moved = np.where(np.abs(values * (factor - 1)) < grain, values + np.sign(factor - 1) * grain, values * factor)
    drawn = inside(space, Box(space.column("low"), space.column("high")), num, rng)
    drawn = np.where(space.column("optional") & (rng.random((num, count)) < 1 / 3), 0.0, drawn)
    moved = np.where(rng.random((num, count)) < 0.2, drawn, moved)
    return on_grains(space, np.where(is_moved, moved, values))
