"""Mappings on chips whose accesses have constant prices, as Timeloop's and DOSA's have: any `Space`, by local search.

Where enumeration is quick its answer is proven; this one is not, but takes the same short time on every space.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from codesign.annealing import (
    ILLEGAL,
    Found,
    Freedom,
    Genome,
    Slots,
    Tables,
    anneal,
    best_of_chains,
    make_freedom,
    make_starts,
    make_tables,
    misfit_penalty,
    to_chains,
    to_genomes,
)
from codesign.anytime import Effort, Progress, keep_searching
from codesign.lagrangian import Choice, least_product
from codesign.mapspace import Nest, Space
from codesign.sharding import gathered, replicated, spread
from hw.accesses import Accesses, count_batch
from hw.cost import excess
from hw.mapping import Mapping
from hw.operation import Operation, stack_operations


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatPrices:
    """Prices per word and limits of L levels, level 0 innermost; in any units of energy.

    Attributes:
      access: energy of one read, fill or update of a word, (L,).
      mac: energy of a product, ().
      bandwidth: words that a level reads, fills and updates per cycle, (L,); infinite where nothing waits for it.
      pooled: 1 where that is for all instances together and 0 where for each, (L,).
    """

    access: jax.Array
    mac: jax.Array
    bandwidth: jax.Array
    pooled: jax.Array

    def cost(self, accesses: Accesses) -> tuple[jax.Array, jax.Array]:
        """Energy and cycles (B,) of accesses with a trailing batch axis."""
        words = jnp.sum(accesses.reads + accesses.fills + accesses.updates, axis=1)
        total = words * accesses.instances
        energy = jnp.sum(total * self.access[:, None], axis=0) + self.mac * accesses.macs
        waiting = jnp.where(self.pooled[:, None] > 0, total, words) / self.bandwidth[:, None]
        return energy, jnp.maximum(accesses.compute_cycles, jnp.max(waiting, axis=0))


class Mapped(NamedTuple):
    """Mappings found of n operations, best first: `mapping` (n, K, ...), score, energy and cycles (n, K)."""

    mapping: Mapping
    scores: jax.Array
    energy: jax.Array
    cycles: jax.Array

    def costs(self) -> list[np.ndarray]:
        """(energy, cycles) of those mappings of each operation that fit, (2, at most K)."""
        both, fits = np.stack([self.energy, self.cycles], axis=1), np.asarray(self.scores) < ILLEGAL / 2
        return [np.asarray(c, np.float64)[:, fit] for c, fit in zip(both, fits, strict=True)]

    def check(self, nests: Sequence[Nest], space: Space) -> None:
        """Check that every operation has a mapping that fits.

        Raises:
          ValueError: one has none; names the level and its smallest tiles.
        """
        for i in np.flatnonzero(np.asarray(self.scores[:, 0]) >= ILLEGAL / 2).tolist():
            raise ValueError(
                f"expected a mapping that fits for operation {i} ({nests[i].bounds}), found none; "
                + smallest_tiles(nests[i], space)
            )


def smallest_tiles(nest: Nest, space: Space) -> str:
    """Which level cannot even hold one word of every operand that it keeps."""
    for l, widths in space.limited.items():
        smallest = sum(width for _, width in widths)
        if smallest > space.capacity[l]:
            return f"level {l} holds {space.capacity[l]:g} and the smallest tiles take {smallest:g}; enlarge it"
    return "one word of every operand fits every level: allow more evaluations"


def map_operations(
    key: jax.Array,
    nests: Sequence[Nest],
    space: Space,
    prices: FlatPrices,
    weights: jax.Array,
    *,
    start: Mapping | None = None,
    perfect: bool = True,
    toggles: Any = None,
    num_chains: int = 32,
    iterations: int = 300,
    temperature: float = 0.3,
    num_best: int = 4,
    mesh: Mesh | None = None,
) -> Mapped:
    """The best distinct mappings found of every operation.

    Args:
      nests: the operations.
      space: what hardware allows.
      weights: of energy and of cycles, (n, 2); each operation's product of both where they are zero.
      start: mappings (n, any) to start from, beside all loops at the last level.
      perfect: only factors that divide the bounds.
      toggles: operands that a level may also not keep, (L, 3); none by default.
      num_chains, iterations: chains of each operation, and proposals of each.
      temperature: at the start, in nats of score.
      num_best: mappings of each operation to return.
      mesh: devices to spread the chains over, see `codesign.sharding`; operations times chains must divide among them.
    """
    operations = stack_operations([nest.operation() for nest in nests])
    slots = Slots.of(space.fanout)
    free = np.zeros_like(space.keep) if toggles is None else toggles
    freedom = make_freedom(slots, space.temporal, space.spatial, space.keep, free, perfect)
    starts = make_starts(start, len(nests), num_chains, slots, operations.bounds.dtype, freedom.keep)
    genomes = to_genomes(starts, slots, space.fanout)
    chains = to_chains((operations, weights, make_tables(operations, perfect)), num_chains)
    limits = tuple(jnp.asarray(x, float) for x in (space.capacity, space.width, space.fanout))
    data = replicated((key, prices, limits, *chains, freedom, genomes), mesh)
    found = _search(*data, iterations, temperature, slots, mesh)
    scores, mapping, (energy, cycles) = best_of_chains(found, len(nests), num_best)
    return Mapped(mapping, scores, energy, cycles)


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _search(
    key,
    prices: FlatPrices,
    limits: tuple[jax.Array, jax.Array, jax.Array],
    operations: Operation,
    weights: jax.Array,
    tables: Tables,
    freedom: Freedom,
    genomes: Genome,
    iterations,
    temperature,
    slots: Slots,
    mesh: Mesh | None,
) -> Found:
    capacity, width, fanout = limits

    def evaluate(operations: Operation, mappings: Mapping, weights: jax.Array) -> tuple[jax.Array, Any]:
        accesses = count_batch(operations, mappings)
        energy, cycles = prices.cost(accesses)
        footprint = jnp.sum(accesses.footprint * width[..., None], axis=1)
        misfit = jnp.sum(excess(footprint, capacity[:, None]), axis=0)
        misfit += jnp.sum(excess(accesses.fanout, fanout[..., None]), axis=(0, 1))
        weighed = jnp.log(jnp.sum(weights * jnp.stack([energy, cycles]), axis=0))
        scores = jnp.where(jnp.sum(weights, axis=0) > 0, weighed, jnp.log(energy) + jnp.log(cycles))
        return scores + misfit_penalty(misfit), (energy, cycles)

    operations, weights, tables, genomes = spread((operations, weights, tables, genomes), mesh)
    found = anneal(key, evaluate, operations, weights, tables, freedom, genomes, iterations, temperature, slots)
    return gathered(found, mesh)


def map_network(
    key: jax.Array,
    nests: Sequence[Nest],
    times: Sequence[float],
    space: Space,
    prices: FlatPrices,
    effort: Effort,
    *,
    rounds: int = 10,
    num_chains: int = 8,
    powers: tuple[float, float] = (1.0, 1.0),
    perfect: bool = True,
    mesh: Mesh | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Choice, Mapped]:
    """One mapping of every operation, least EDP (by default) of their sums; each runs `times` often.

    The first round minimises each operation's own product; the others the linearised product of the network, at the
    energy and cycles that the round before ended with.

    Raises:
      ValueError: an operation for which no mapping that fits was found.
    """
    iterations = max(1, effort.evaluations // (rounds * num_chains))

    def step(i: int, before: tuple[Choice, Mapped] | None) -> tuple[Choice, Mapped]:
        weights, start = np.zeros((len(nests), 2)), None
        if before is not None:
            choice, mapped = before
            weights += np.array(powers) / [choice.energy, choice.latency]
            start = mapped.mapping
        found = map_operations(
            jax.random.fold_in(key, i), nests, space, prices, jnp.asarray(weights, float), start=start, perfect=perfect,
            num_chains=num_chains, iterations=iterations, temperature=0.3 if before is None else 0.15, num_best=8,
            mesh=mesh,
        )  # fmt: skip
        found.check(nests, space)
        choice = least_product(found.costs(), times, powers)
        return (choice, found) if before is None or choice.value < before[0].value else before

    return keep_searching(step, iterations * num_chains, effort, lambda best: best[0].value, on_progress)
