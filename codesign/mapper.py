"""Best mappings of a stack of operations on a chip: batched annealed local search, every candidate costed exactly.

A mapping is searched as integer factors in *slots* (temporal factors of every level below DRAM, spatial factors where the
chip has a fan-out); the DRAM factor is whatever is left, rounded up, so that every proposal covers its operation. One jitted
loop advances all chains of all operations together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def _fit_array(genomes: Genome, chip: Chip, slots: Slots) -> Genome:
    """Genomes, any leading axes, whose spatial factors fit the chip's fan-out: the largest of an axis gives way.

    A warm start from a chip with a row more would otherwise start from nothing that fits.
    """
    factors = genomes.factors
    for i, (level, axis) in enumerate(slots.places):
        if axis < 0:
            continue
        row = factors[..., i, :]
        used, largest = jnp.prod(row, axis=-1, keepdims=True), jnp.max(row, axis=-1, keepdims=True)
        fitting = jnp.maximum(jnp.floor(chip.fanout[level, axis] * largest / used), 1.0)
        is_largest = jax.nn.one_hot(jnp.argmax(row, axis=-1), NUM_LOOPS, dtype=bool)
        fits = used <= chip.fanout[level, axis]
        factors = factors.at[..., i, :].set(jnp.where(is_largest & ~fits, fitting, row))
    return dataclasses.replace(genomes, factors=factors)


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


class _Chains(NamedTuple):
    """State of the chains of one operation; leading axis: chains."""

    genomes: Genome
    scores: jax.Array
    best: Genome
    best_scores: jax.Array
    best_accesses: Accesses


def _anneal(key, chip: Chip, problem: Problem, start: Genome, prices, iterations, temperature, slots: Slots) -> _Chains:
    """Anneal the chains of one operation from `start`, which is scored in the first iteration."""
    bounds, num_chains = problem.operation.bounds, start.factors.shape[0]

    def evaluate(genome: Genome) -> tuple[jax.Array, Accesses]:
        accesses = count(problem.operation, to_mapping(genome, bounds, slots))
        cost = price(chip, problem.operation, accesses, problem.bits, problem.density, problem.resident)
        return score(cost, prices), accesses

    def moved(key: jax.Array, genome: Genome, num_moves: jax.Array) -> Genome:
        def move(i, genome):
            proposed = _propose(jax.random.fold_in(key, i), genome, bounds, problem.tables)
            return jax.tree.map(lambda new, old: jnp.where(i < num_moves, new, old), proposed, genome)

        return jax.lax.fori_loop(0, 2, move, genome)

    def replace(better: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(better, range(1, a.ndim)), a, b), new, old)

    def advance(i: jax.Array, chains: _Chains) -> _Chains:
        move_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
        # Every other chain makes two moves at once, so that compound moves (shrink here, grow there) can pass.
        num_moves = jnp.where(i == 0, 0, 1 + (jnp.arange(num_chains) + i) % 2)
        proposed = jax.vmap(moved)(jax.random.split(move_key, num_chains), chains.genomes, num_moves)
        scores, accesses = jax.vmap(evaluate)(proposed)
        cooled = temperature * (1.0 - i / iterations) ** 2
        luck = -jnp.log(jax.random.uniform(accept_key, (num_chains,), scores.dtype, minval=1e-6))
        accept = scores <= chains.scores + cooled * luck
        better = scores < chains.best_scores
        return _Chains(
            replace(accept, proposed, chains.genomes),
            jnp.where(accept, scores, chains.scores),
            replace(better, proposed, chains.best),
            jnp.where(better, scores, chains.best_scores),
            replace(better, accesses, chains.best_accesses),
        )

    shapes = jax.eval_shape(jax.vmap(evaluate), start)[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    unscored = jnp.full((num_chains,), jnp.inf, prices.dtype)
    return jax.lax.fori_loop(0, iterations, advance, _Chains(start, unscored, start, unscored, nothing))


def _distinct_best(scores: jax.Array, num: int) -> jax.Array:
    """Indices of the `num` lowest scores, repeats (equal scores) last."""
    order = jnp.argsort(scores)
    ranked = scores[order]
    repeat = jnp.concatenate([jnp.zeros((1,), bool), jnp.diff(ranked) <= 1e-6 * jnp.abs(ranked[1:])])
    return order[jnp.argsort(jnp.where(repeat, ranked + 2 * _ILLEGAL, ranked))[:num]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Mappings kept per operation, axes (n, K): the mapping, its exact counts, its score when it was found."""

    mapping: Mapping
    accesses: Accesses
    scores: jax.Array


def search(
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
) -> Candidates:
    """The best distinct mappings found of every operation, axes (n, num_best), best first.

    Args:
      operations: stacked, n on the leading axis.
      bits, density, resident: (n, 3), (n, 2), (n, 3) as `hw.cost.price` takes them.
      prices: (2,), of a joule and of a second; see `score`.
      start: mappings (n, any) to start chains from (a warm start), beside one with every loop in DRAM.
      num_chains, iterations: chains of each operation, and proposals of each chain; changing the latter compiles nothing.
      temperature: of the annealing at its start, in nats of score; 0 only descends.
    """
    problems = Problem(operations, bits, density, resident, tables)
    genomes = _outermost(slots, (bits.shape[0], 1), bits.dtype)
    if start is not None:
        genomes = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), to_genome(start, slots), genomes)
    given = genomes.factors.shape[1]
    starts = jax.tree.map(lambda x: x[:, np.arange(num_chains) % given], genomes)
    return _search(key, chip, problems, starts, prices, iterations, temperature, num_best, slots)


@functools.partial(jax.jit, static_argnames=("num_best", "slots"))
def _search(
    key, chip, problems: Problem, starts: Genome, prices, iterations, temperature, num_best: int, slots: Slots
) -> Candidates:
    starts = _fit_array(starts, chip, slots)

    def one(key: jax.Array, problem: Problem, start: Genome) -> Candidates:
        chains = _anneal(key, chip, problem, start, prices, iterations, temperature, slots)
        chosen = _distinct_best(chains.best_scores, num_best)
        genomes, accesses = jax.tree.map(lambda x: x[chosen], (chains.best, chains.best_accesses))
        mappings = jax.vmap(lambda genome: to_mapping(genome, problem.operation.bounds, slots))(genomes)
        return Candidates(mappings, accesses, chains.best_scores[chosen])

    return jax.vmap(one)(jax.random.split(key, problems.bits.shape[0]), problems, starts)


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
