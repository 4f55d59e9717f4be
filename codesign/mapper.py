"""Best mappings of a stack of operations on a chip: batched annealed local search, every candidate costed exactly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from codesign.annealing import (
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
from codesign.sharding import gathered, replicated, spread
from hw.accesses import Accesses, count_batch
from hw.chip import Chip
from hw.cost import Cost, price
from hw.mapping import Mapping
from hw.operation import Operation

__all__ = [
    "Candidates", "Freedom", "Slots", "Tables", "begin_search", "check_legal", "make_freedom", "make_slots", "make_tables",
    "replace_best", "score", "with_neighbours",
]  # fmt: skip


def make_slots(chip: Chip) -> Slots:
    """Slots of a concrete chip: spatial ones only where its fan-out exceeds one."""
    return Slots.of(np.asarray(chip.fanout))


def score(cost: Cost, prices: jax.Array) -> jax.Array:
    """log(prices[0] * energy + prices[1] * latency), plus a large offset growing with the violation where it does not fit.

    A network's EDP (sum of energies times sum of latencies) is minimised operation by operation with
    prices = (1 / total energy, 1 / total latency): the linearisation of its logarithm.
    """
    return jnp.log(prices[0] * cost.energy + prices[1] * cost.latency) + misfit_penalty(jnp.sum(cost.violation))


type Objective = Callable[[Cost, jax.Array], jax.Array]
"""Score () of a cost at prices (2,), lower is better."""


class Operands(NamedTuple):
    """Widths (n, 3), density (n, 2) and resident share (n, 3) of the operands, as `hw.cost.price` takes them."""

    bits: jax.Array
    density: jax.Array
    resident: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Mappings kept per operation, axes (n, K): the mapping, its exact counts, its score when it was found."""

    mapping: Mapping
    accesses: Accesses
    scores: jax.Array


def begin_search(
    key: jax.Array,
    operations: Operation,
    chip: Chip,
    bits: jax.Array,
    prices: jax.Array,
    *,
    slots: Slots,
    tables: Tables,
    density: jax.Array,
    resident: jax.Array,
    start: Mapping | None = None,
    num_chains: int = 32,
    iterations: int | jax.Array = 300,
    temperature: float = 0.3,
    num_best: int = 4,
    freedom: Freedom | None = None,
    objective: Objective = score,
    mesh: Mesh | None = None,
) -> Callable[[], Candidates]:
    """A search under way: what is returned waits for it and picks the best distinct mappings of every operation.

    Several that are begun before the first is waited for keep the device busy while mappings are picked.

    Args:
      operations: stacked, n on the leading axis.
      bits, density, resident: (n, 3), (n, 2), (n, 3) as `hw.cost.price` takes them.
      prices: (2,), of a joule and of a second; see `score`.
      start: mappings (n, any) to start chains from (a warm start), beside one with every loop in DRAM.
      num_chains, iterations: chains of each operation, and proposals of each chain; changing the latter compiles nothing.
      temperature: of the annealing at its start, in nats of score; 0 only descends.
      freedom: what the chip's wiring leaves open, by default everything but to keep words in memories of no size; a
        `start` must keep to it, but may keep such words.
      objective: what is minimised, in place of `score`; it must rank what does not fit behind all that does.
      mesh: devices to spread the chains over, see `codesign.sharding`; operations times chains must divide among them.
    """
    is_there = np.repeat(np.asarray(chip.size_bits)[:, None] > 0.0, 3, axis=1)
    freedom = make_freedom(slots, keep=is_there, toggles=is_there) if freedom is None else freedom
    starts = make_starts(start, bits.shape[0], num_chains, slots, bits.dtype, freedom.keep)
    starts = dataclasses.replace(starts, keep=starts.keep * is_there.astype(bits.dtype))
    genomes = to_genomes(starts, slots, np.asarray(chip.fanout))
    operations, tables = to_chains((operations, tables), num_chains)
    # Operands stay on the device, where they may still be under way.
    data = replicated(
        (key, chip, operations, Operands(bits, density, resident), tables, freedom, genomes, prices), mesh
    )
    found = _search(*data, iterations, temperature, slots, objective, mesh)

    def finish() -> Candidates:
        scores, mapping, accesses = best_of_chains(found, bits.shape[0], num_best)
        return Candidates(mapping, accesses, scores)

    return finish


@functools.partial(jax.jit, static_argnames=("slots", "objective", "mesh"))
def _search(
    key,
    chip: Chip,
    operations: Operation,
    operands: Operands,
    tables: Tables,
    freedom: Freedom,
    genomes: Genome,
    prices,
    iterations,
    temperature,
    slots: Slots,
    objective: Objective,
    mesh: Mesh | None,
) -> Found:
    def evaluate(operations: Operation, mappings: Mapping, own: Operands) -> tuple[jax.Array, Accesses]:
        def one(operation, accesses, own):
            return objective(price(chip, operation, accesses, *own), prices)

        accesses = count_batch(operations, mappings)
        return jax.vmap(one, in_axes=-1)(operations, accesses, own), accesses

    num_chains = genomes.factors.shape[-1] // operands.bits.shape[0]
    operands = jax.tree.map(lambda x: jnp.repeat(x, num_chains, axis=0).T, operands)
    operations, operands, tables, genomes = spread((operations, operands, tables, genomes), mesh)
    found = anneal(key, evaluate, operations, operands, tables, freedom, genomes, iterations, temperature, slots)
    return gathered(found, mesh)


@jax.jit
def with_neighbours(found: Sequence[Candidates]) -> Candidates:
    """All candidates of the first chip, then the single best of each of the others: (n, K + chips - 1)."""
    best = [jax.tree.map(lambda x: x[:, :1], other) for other in found[1:]]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), found[0], *best)


def replace_best(kept: Candidates, better: Candidates) -> Candidates:
    """Candidates (n, K) whose first entries are those of `better` (n, at most K)."""
    num = better.scores.shape[1]
    return jax.tree.map(lambda old, new: jnp.concatenate([new, old[:, num:]], axis=1), kept, better)


def check_legal(violation: jax.Array, chip: Chip, names: Sequence[str]) -> None:
    """Check the violations (n, V) of operations under their best mappings.

    Raises:
      ValueError: one does not fit; names the operation, the resource, its size and what the best mapping takes of it.
    """
    excess = np.asarray(violation)
    bad = np.flatnonzero(excess.sum(axis=-1) > 0)
    if bad.size:
        i, worst = int(bad[0]), int(np.argmax(excess[bad[0]]))
        limit = float(chip.limits()[worst])
        raise ValueError(
            f"no valid mapping for {names[i]}: expected a tile within {chip.limit_names()[worst]} of {limit:g}, got "
            f"{limit * (1 + excess[i, worst]):g}, {excess[i, worst]:.0%} too much at best; enlarge that resource or lower "
            f"the bits"
        )
