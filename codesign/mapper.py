"""Best mappings of a stack of operations on a chip: batched annealed local search, every candidate costed exactly.

A mapping is searched as integer factors in *slots* (temporal factors of every level below DRAM, spatial factors where the
chip has a fan-out); the DRAM factor is whatever is left, rounded up, so that every proposal covers its operation. One jitted
loop advances all chains of all operations (and of several chips) together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hw.accesses import Accesses, count
from hw.chip import Chip
from hw.cost import Cost, price
from hw.mapping import Mapping
from hw.operation import LOOPS, Operation

NUM_LOOPS = len(LOOPS)
_TABLE_SIZE = 24  # factor values offered per loop
_ILLEGAL = 100.0  # score offset (natural log) of a mapping that does not fit: legal ones always rank before it


class Slots(NamedTuple):
    """Static description of where factors can go: (level, axis) with axis -1 temporal, 0 spatial X, 1 spatial Y."""

    places: tuple[tuple[int, int], ...]
    num_levels: int


class Tables(NamedTuple):
    """Factor values worth trying, per operation and loop: values (n, 8, M), num_values (n, 8), prime (n, 8, 3)."""

    values: jax.Array
    num_values: jax.Array
    primes: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Genome:
    """What the search changes: factors (slots, 8), order (levels, 8) int32 ranks, keep (levels - 1, 3) 0/1."""

    factors: jax.Array
    order: jax.Array
    keep: jax.Array


def make_slots(chip: Chip) -> Slots:
    """Slots of a concrete chip: spatial ones only where its fan-out exceeds one."""
    fanout = np.asarray(chip.fanout)
    num_levels = fanout.shape[0]
    temporal = [(level, -1) for level in range(num_levels - 1)]
    spatial = [(level, axis) for level in range(num_levels) for axis in range(2) if fanout[level, axis] > 1]
    return Slots(tuple(temporal + spatial), num_levels)


def make_tables(operations: Operation) -> Tables:
    """Factor tables of stacked operations: all divisors first, then ceil(bound / k), which waste little."""
    bounds = np.asarray(operations.bounds).astype(int)
    values = np.ones((*bounds.shape, _TABLE_SIZE), np.float32)
    num_values = np.ones(bounds.shape, np.int32)
    primes = np.full((*bounds.shape, 3), 2.0, np.float32)
    for index, bound in np.ndenumerate(bounds):
        divisors = [d for d in range(1, bound + 1) if bound % d == 0] if bound < 100_000 else [1, bound]
        ceilings = sorted({-(-bound // k) for k in range(1, 65)} - set(divisors))
        row = (divisors[:: max(1, len(divisors) // 14)] + ceilings)[:_TABLE_SIZE]
        values[index][: len(row)] = row
        num_values[index] = len(row)
        found = [p for p in (2, 3, 5, 7, 11, 13) if bound % p == 0][:3]
        primes[index][: len(found)] = found
    return Tables(jnp.asarray(values), jnp.asarray(num_values), jnp.asarray(primes))


def to_mapping(genome: Genome, bounds: jax.Array, slots: Slots) -> Mapping:
    """The mapping of one genome; the DRAM's temporal factors are the ceiling of what the slots leave uncovered."""
    ones = jnp.ones((NUM_LOOPS,), bounds.dtype)
    row = {place: genome.factors[i] for i, place in enumerate(slots.places)}
    top = jnp.ceil(bounds / jnp.prod(genome.factors, axis=0))
    temporal = [row[(level, -1)] for level in range(slots.num_levels - 1)] + [top]
    spatial = [[row.get((level, axis), ones) for axis in range(2)] for level in range(slots.num_levels)]
    keep = jnp.concatenate([genome.keep, jnp.ones((1, 3), genome.keep.dtype)])
    return Mapping(jnp.stack(temporal), jnp.stack([jnp.stack(axes) for axes in spatial]), genome.order, keep)


def to_genome(mapping: Mapping, slots: Slots) -> Genome:
    """Inverse of `to_mapping`, for warm starts; leading axes are allowed."""
    factors = [
        mapping.temporal[..., level, :] if axis < 0 else mapping.spatial[..., level, axis, :]
        for level, axis in slots.places
    ]
    return Genome(jnp.stack(factors, axis=-2), mapping.order, mapping.keep[..., :-1, :])


def _outermost(slots: Slots, shape: tuple[int, ...], dtype) -> Genome:
    """All loops in DRAM, everything kept everywhere with tiles of one word: legal on any chip that holds three words."""
    order = jnp.broadcast_to(jnp.arange(NUM_LOOPS, dtype=jnp.int32), (*shape, slots.num_levels, NUM_LOOPS))
    factors = jnp.ones((*shape, len(slots.places), NUM_LOOPS), dtype)
    return Genome(factors, order, jnp.ones((*shape, slots.num_levels - 1, 3), dtype))


def _propose(key: jax.Array, genome: Genome, bounds: jax.Array, tables: Tables) -> Genome:
    """One random move of one chain of one operation: set, exchange or shift a factor, swap two loops, toggle a keep."""
    num_slots = genome.factors.shape[0]
    num_levels = genome.order.shape[0]
    bits = jax.random.bits(key, (9,), jnp.uint32)

    def pick(i: int, n: int) -> jax.Array:
        return (bits[i] % jnp.uint32(n)).astype(jnp.int32)

    live = jnp.cumsum(bounds > 1)  # loops with bound 1 cannot move: draw among the others
    loop = jnp.searchsorted(live, 1 + pick(0, NUM_LOOPS) % jnp.maximum(live[-1], 1)).clip(0, NUM_LOOPS - 1)
    here, there = pick(1, num_slots), pick(2, num_slots)
    at_here, at_there = genome.factors[here, loop], genome.factors[there, loop]
    value = tables.values[loop, pick(3, 1 << 20) % tables.num_values[loop]]
    prime = tables.primes[loop, pick(4, 3)]
    shift = jnp.where(jnp.mod(at_here, prime) == 0, prime, 1.0)

    move = pick(5, 16)
    is_set, is_swap, is_shift, is_halve = move < 5, move == 5, (move > 5) & (move < 9), move == 9
    new_here = jnp.select([is_set, is_swap, is_shift | is_halve], [value, at_there, at_here / shift], at_here)
    new_there = jnp.select([is_swap, is_shift], [at_here, at_there * shift], at_there)
    distinct = here != there
    factors = genome.factors.at[there, loop].set(jnp.where(distinct, new_there, at_there))
    factors = factors.at[here, loop].set(jnp.where(distinct | is_set, new_here, at_here))

    is_order = (move >= 10) & (move < 13)
    level, first = pick(6, num_levels), pick(7, NUM_LOOPS)
    second = jnp.where(is_order, pick(8, NUM_LOOPS), first)
    row = genome.order[level]
    order = genome.order.at[level].set(row.at[first].set(row[second]).at[second].set(row[first]))

    keep_level, operand = pick(6, num_levels - 1), pick(7, 3)
    old = genome.keep[keep_level, operand]
    keep = genome.keep.at[keep_level, operand].set(jnp.where(move >= 13, 1.0 - old, old))
    return Genome(factors, order, keep)


def score(cost: Cost, prices: jax.Array) -> jax.Array:
    """log(prices[0] * energy + prices[1] * latency), plus a large offset growing with the violation where it does not fit.

    A network's EDP (sum of energies times sum of latencies) is minimised operation by operation with
    prices = (1 / total energy, 1 / total latency): the linearisation of its logarithm.
    """
    violation = jnp.sum(cost.violation)
    penalty = jnp.where(violation > 0, _ILLEGAL + jnp.log1p(violation), 0.0)
    return jnp.log(prices[0] * cost.energy + prices[1] * cost.latency) + penalty


class Problem(NamedTuple):
    """One operation's search data: operation, bits (3,), density (2,), resident (3,), tables; stacked under vmap."""

    operation: Operation
    bits: jax.Array
    density: jax.Array
    resident: jax.Array
    tables: Tables


def _cost_of(chip: Chip, problem: Problem, genome: Genome, slots: Slots) -> Cost:
    accesses = count(problem.operation, to_mapping(genome, problem.operation.bounds, slots))
    return price(chip, problem.operation, accesses, problem.bits, problem.density, problem.resident)


def _anneal(key, chip, problem: Problem, start: Genome, prices, iterations: int, slots: Slots):
    """Anneal the chains (leading axis of `start`) of one operation; returns each chain's best genome and score."""
    bounds = problem.operation.bounds
    num_chains = start.factors.shape[0]

    def scores(genomes: Genome) -> jax.Array:
        return jax.vmap(lambda g: score(_cost_of(chip, problem, g, slots), prices))(genomes)

    def replace(better, new, old):
        return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(better, range(1, a.ndim)), a, b), new, old)

    def advance(i, carry):
        genomes, current, best, best_score = carry
        keys = jax.random.split(jax.random.fold_in(key, i), (2, num_chains))
        proposed = jax.vmap(_propose, (0, 0, None, None))(keys[0], genomes, bounds, problem.tables)
        # Every other chain makes a second move, so that compound moves (shrink here, grow there) can pass.
        again = jax.vmap(_propose, (0, 0, None, None))(keys[1], proposed, bounds, problem.tables)
        proposed = replace(jnp.arange(num_chains) % 2 == i % 2, again, proposed)
        new = scores(proposed)
        temperature = 0.3 * (1.0 - i / iterations) ** 2
        threshold = current - temperature * jnp.log(jax.random.uniform(keys[0][0], (num_chains,), minval=1e-6))
        accept = new <= threshold
        genomes, current = replace(accept, proposed, genomes), jnp.where(accept, new, current)
        better = new < best_score
        return genomes, current, replace(better, proposed, best), jnp.where(better, new, best_score)

    first = scores(start)
    _, _, best, best_score = jax.lax.fori_loop(0, iterations, advance, (start, first, start, first))
    return best, best_score


def _distinct_best(genomes: Genome, scores: jax.Array, num: int) -> tuple[Genome, jax.Array]:
    """The `num` lowest scores among the chains, repeats (equal scores) last."""
    order = jnp.argsort(scores)
    ranked = scores[order]
    repeat = jnp.concatenate([jnp.zeros((1,), bool), jnp.diff(ranked) <= 1e-6 * jnp.abs(ranked[1:])])
    chosen = order[jnp.argsort(jnp.where(repeat, ranked + 2 * _ILLEGAL, ranked))[:num]]
    return jax.tree.map(lambda x: x[chosen], genomes), scores[chosen]


@functools.partial(jax.jit, static_argnames=("iterations", "num_best", "slots"))
def _search(key, chips: Chip, problems: Problem, start: Genome, prices, iterations: int, num_best: int, slots: Slots):
    """Search all operations (axis 0 of problems) on all chips (axis 0 of chips): genomes (chips, n, num_best)."""

    def one(key, chip, problem, start):
        best, scores = _anneal(key, chip, problem, start, prices, iterations, slots)
        return _distinct_best(best, scores, num_best)

    num_chips, num_operations = chips.vdd.shape[0], problems.bits.shape[0]
    keys = jax.random.split(key, (num_chips, num_operations))
    over_operations = jax.vmap(one, (0, None, 0, 0))
    return jax.vmap(over_operations, (0, 0, None, None))(keys, chips, problems, start)


@functools.partial(jax.jit, static_argnames=("slots", "num_chains"))
def _starts(key, genomes: Genome, problems: Problem, num_chains: int, slots: Slots) -> Genome:
    """Start points (n, chains): the given genomes (n, any) repeated, all copies but the first shaken by eight moves."""
    given = genomes.factors.shape[1]
    repeated = jax.tree.map(lambda x: x[:, jnp.arange(num_chains) % given], genomes)

    def shake(key, genome, problem):
        def move(i, g):
            return _propose(jax.random.fold_in(key, i), g, problem.operation.bounds, problem.tables)

        return jax.lax.fori_loop(0, 8, move, genome)

    keys = jax.random.split(key, repeated.factors.shape[:2])
    shaken = jax.vmap(jax.vmap(shake, (0, 0, None)))(keys, repeated, problems)
    fresh = jnp.arange(num_chains) >= given
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(fresh, (0, *range(2, a.ndim))), a, b), shaken, repeated)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Mappings kept per operation, axes (n, K) (or (chips, n, K)): the mapping, its exact counts, its score when found."""

    mapping: Mapping
    accesses: Accesses
    scores: jax.Array


def search(
    key: jax.Array,
    operations: Operation,
    chips: Chip,
    bits: jax.Array,
    prices: jax.Array,
    *,
    slots: Slots,
    tables: Tables,
    density: jax.Array,
    resident: jax.Array,
    start: Mapping | None = None,
    num_chains: int = 32,
    iterations: int = 300,
    num_best: int = 4,
) -> Candidates:
    """The best distinct mappings found of every operation on every chip, axes (chips, n, num_best), best first.

    Args:
      operations: stacked, n on the leading axis.
      chips: stacked.
      bits, density, resident: (n, 3), (n, 2), (n, 3) as `hw.cost.price` takes them.
      prices: (2,), of a joule and of a second; see `score`.
      start: mappings (n, any) to start from (a warm start), beside every loop in DRAM.
    """
    problems = Problem(operations, bits, density, resident, tables)
    genomes = _outermost(slots, (bits.shape[0], 1), bits.dtype)
    if start is not None:
        genomes = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), to_genome(start, slots), genomes)
    shake_key, search_key = jax.random.split(key)
    starts = _starts(shake_key, genomes, problems, num_chains, slots)
    best, scores = _search(search_key, chips, problems, starts, prices, iterations, num_best, slots)
    return _count_candidates(best, scores, operations, slots)


@functools.partial(jax.jit, static_argnames="slots")
def _count_candidates(genomes: Genome, scores: jax.Array, operations: Operation, slots: Slots) -> Candidates:
    def one(genome: Genome, operation: Operation) -> tuple[Mapping, Accesses]:
        mapping = to_mapping(genome, operation.bounds, slots)
        return mapping, count(operation, mapping)

    over_best = jax.vmap(one, (0, None))
    mapping, accesses = jax.vmap(jax.vmap(over_best), (0, None))(genomes, operations)
    return Candidates(mapping, accesses, scores)


def with_neighbours(found: Candidates) -> Candidates:
    """Flatten (chips, n, K): all K of the first chip, then the single best of each of the others: (n, K + chips - 1)."""
    return jax.tree.map(lambda x: jnp.concatenate([x[0], jnp.moveaxis(x[1:, :, 0], 0, 1)], axis=1), found)


def replace_best(kept: Candidates, better: Candidates) -> Candidates:
    """Candidates (n, K) whose first entries are those of `better` (n, at most K)."""
    num = better.scores.shape[1]
    return jax.tree.map(lambda old, new: jnp.concatenate([new, old[:, num:]], axis=1), kept, better)


def check_legal(violation: jax.Array, chip: Chip, names: Sequence[str]) -> None:
    """Check the violations (n, V) of operations under their best mappings.

    Raises:
      ValueError: one does not fit; names the operation, the resource and by how much its best mapping exceeds it.
    """
    excess = np.asarray(violation)
    bad = np.flatnonzero(excess.sum(axis=-1) > 0)
    if bad.size:
        i, worst = int(bad[0]), int(np.argmax(excess[bad[0]]))
        raise ValueError(
            f"no valid mapping for {names[i]}: expected a tile within {chip.limit_names()[worst]}, got "
            f"{excess[i, worst]:.0%} too much at best; enlarge that resource or lower the bits"
        )
