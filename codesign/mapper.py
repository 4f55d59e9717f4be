"""Best mappings of a stack of operations on a chip: batched annealed local search, every candidate costed exactly.

A mapping is searched as integer factors in *slots* (temporal factors of every level below DRAM, spatial factors where the
chip has a fan-out); the DRAM factor is whatever is left, rounded up, so that every proposal covers its operation. One jitted
loop advances all chains of all operations together. Arrays of the loop have the chains, written B, as their last axis:
chains of one operation lie side by side, and vectors run over all of them.
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

from hw.accesses import Accesses, count_batch
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
    """Factor values worth trying, per operation and loop: values (n, 8, M), num_values (n, 8), primes (n, 8, 3)."""

    values: jax.Array
    num_values: jax.Array
    primes: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Genome:
    """What the search changes: factors (slots, 8, B), order (levels, 8, B) int32 ranks, keep (levels - 1, 3, B) 0/1."""

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
    """The mappings of genomes over bounds (8, B); DRAM's temporal factors are the ceiling of what the slots leave."""
    ones = jnp.ones_like(bounds)
    row = {place: genome.factors[i] for i, place in enumerate(slots.places)}
    top = jnp.ceil(bounds / jnp.prod(genome.factors, axis=0))
    temporal = [row[(level, -1)] for level in range(slots.num_levels - 1)] + [top]
    spatial = [[row.get((level, axis), ones) for axis in range(2)] for level in range(slots.num_levels)]
    keep = jnp.concatenate([genome.keep, jnp.ones_like(genome.keep[:1])])
    return Mapping(jnp.stack(temporal), jnp.stack([jnp.stack(axes) for axes in spatial]), genome.order, keep)


def to_genome(mapping: Mapping, slots: Slots) -> Genome:
    """Inverse of `to_mapping`, for warm starts."""
    factors = [mapping.temporal[level] if axis < 0 else mapping.spatial[level, axis] for level, axis in slots.places]
    return Genome(jnp.stack(factors), mapping.order, mapping.keep[:-1])


def _fit_array(genomes: Genome, chip: Chip, slots: Slots) -> Genome:
    """Genomes whose spatial factors fit the chip's fan-out: the largest of an axis gives way.

    A warm start from a chip with a row more would otherwise start from nothing that fits.
    """
    factors = genomes.factors
    for i, (level, axis) in enumerate(slots.places):
        if axis < 0:
            continue
        row = factors[i]
        used, largest = jnp.prod(row, axis=0), jnp.max(row, axis=0)
        fitting = jnp.maximum(jnp.floor(chip.fanout[level, axis] * largest / used), 1.0)
        gives_way = _one_hot(jnp.argmax(row, axis=0), NUM_LOOPS) & (used > chip.fanout[level, axis])[None]
        factors = factors.at[i].set(jnp.where(gives_way, fitting[None], row))
    return dataclasses.replace(genomes, factors=factors)


def _one_hot(index: jax.Array, size: int) -> jax.Array:
    """Where an index (B,) points along an axis: (size, B), bool."""
    return jnp.arange(size, dtype=index.dtype)[:, None] == index[None]


def _entry(table: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """One entry of the table (rows, columns, B) of each chain, at indices (B,)."""
    flat = table.reshape(-1, table.shape[-1])
    return jnp.take_along_axis(flat, (row * table.shape[1] + column)[None], axis=0)[0]


def _propose(key: jax.Array, genome: Genome, bounds: jax.Array, tables: Tables) -> Genome:
    """One random move of every chain: set, exchange or shift a factor, swap two loops, toggle a keep.

    Places are picked by masks, which fuse with the arithmetic; gathers and scatters would run chain by chain.
    """
    (num_slots, _, num), num_levels = genome.factors.shape, genome.order.shape[0]
    bits = jax.random.bits(key, (9, num), jnp.uint32)

    def pick(i: int, n: int | jax.Array) -> jax.Array:
        return (bits[i] % jnp.asarray(n, jnp.uint32)).astype(jnp.int32)

    def at(mask: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, values, 0), axis=tuple(range(values.ndim - 1)))

    can_move = bounds > 1  # loops of one iteration cannot: draw among the others
    nth = jnp.cumsum(can_move, axis=0, dtype=jnp.int32)
    is_loop = can_move & (nth == 1 + pick(0, NUM_LOOPS)[None] % jnp.maximum(nth[-1:], 1))
    loop = jnp.argmax(is_loop, axis=0).astype(jnp.int32)
    here, there = pick(1, num_slots), pick(2, num_slots)
    is_here, is_there = (_one_hot(slot, num_slots)[:, None] & is_loop[None] for slot in (here, there))
    at_here, at_there = at(is_here, genome.factors), at(is_there, genome.factors)
    value = _entry(tables.values, loop, pick(3, at(is_loop, tables.num_values)))
    prime = _entry(tables.primes, loop, pick(4, 3))
    shift = jnp.where(jnp.mod(at_here, prime) == 0, prime, 1.0)

    move = pick(5, 16)
    is_set, is_swap, is_shift, is_halve = move < 5, move == 5, (move > 5) & (move < 9), move == 9
    new_here = jnp.select([is_set, is_swap, is_shift | is_halve], [value, at_there, at_here / shift], at_here)
    new_there = jnp.select([is_swap, is_shift], [at_here, at_there * shift], at_there)
    distinct = here != there
    factors = _where(distinct, is_there, new_there, genome.factors)
    factors = _where(distinct | is_set, is_here, new_here, factors)

    is_order, level = (move >= 10) & (move < 13), _one_hot(pick(6, num_levels), num_levels)[:, None]
    first, second = (level & _one_hot(pick(i, NUM_LOOPS), NUM_LOOPS)[None] for i in (7, 8))
    order = _where(is_order, first, at(second, genome.order), genome.order)
    order = _where(is_order, second, at(first, genome.order), order)

    toggled = _one_hot(pick(6, num_levels - 1), num_levels - 1)[:, None] & _one_hot(pick(7, 3), 3)[None]
    return Genome(factors, order, _where(move >= 13, toggled, 1.0 - at(toggled, genome.keep), genome.keep))


def _where(chosen: jax.Array, mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` (B,) at the masked places (..., B) of the chosen chains (B,), else `old`."""
    chosen, new = (jnp.expand_dims(x, tuple(range(old.ndim - 1))) for x in (chosen, new))
    return jnp.where(mask & chosen, new, old)


def score(cost: Cost, prices: jax.Array) -> jax.Array:
    """log(prices[0] * energy + prices[1] * latency), plus a large offset growing with the violation where it does not fit.

    A network's EDP (sum of energies times sum of latencies) is minimised operation by operation with
    prices = (1 / total energy, 1 / total latency): the linearisation of its logarithm.
    """
    violation = jnp.sum(cost.violation)
    penalty = jnp.where(violation > 0, _ILLEGAL + jnp.log1p(violation), 0.0)
    return jnp.log(prices[0] * cost.energy + prices[1] * cost.latency) + penalty


class Problem(NamedTuple):
    """What a chain searches: operation, bits (3, B), density (2, B), resident (3, B), tables; the last axis is B."""

    operation: Operation
    bits: jax.Array
    density: jax.Array
    resident: jax.Array
    tables: Tables


class _Chains(NamedTuple):
    """State of all chains; the last axis is B."""

    genomes: Genome
    scores: jax.Array
    best: Genome
    best_scores: jax.Array
    best_accesses: Accesses


def _anneal(
    key, chip: Chip, problems: Problem, start: Genome, prices, iterations, temperature, slots: Slots
) -> _Chains:
    """Anneal all chains from `start`, which is scored in the first iteration."""
    bounds, num = problems.operation.bounds, start.factors.shape[-1]

    def evaluate(genomes: Genome) -> tuple[jax.Array, Accesses]:
        def one(operation, accesses, bits, density, resident):
            return score(price(chip, operation, accesses, bits, density, resident), prices)

        accesses = count_batch(problems.operation, to_mapping(genomes, bounds, slots))
        widths, density, resident = problems.bits, problems.density, problems.resident
        return jax.vmap(one, in_axes=-1)(problems.operation, accesses, widths, density, resident), accesses

    def moved(key: jax.Array, genomes: Genome, num_moves: jax.Array) -> Genome:
        def move(i, genomes):
            proposed = _propose(jax.random.fold_in(key, i), genomes, bounds, problems.tables)
            return replace(i < num_moves, proposed, genomes)

        return jax.lax.fori_loop(0, 2, move, genomes)

    def replace(better: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(better, range(a.ndim - 1)), a, b), new, old)

    def advance(i: jax.Array, chains: _Chains) -> _Chains:
        move_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
        # Every other chain makes two moves at once, so that compound moves (shrink here, grow there) can pass.
        num_moves = jnp.where(i == 0, 0, 1 + (jnp.arange(num, dtype=jnp.int32) + i) % 2)
        proposed = moved(move_key, chains.genomes, num_moves)
        scores, accesses = evaluate(proposed)
        cooled = temperature * (1.0 - i / iterations) ** 2
        luck = -jnp.log(jax.random.uniform(accept_key, (num,), scores.dtype, minval=1e-6))
        accept = scores <= chains.scores + cooled * luck
        better = scores < chains.best_scores
        return _Chains(
            replace(accept, proposed, chains.genomes),
            jnp.where(accept, scores, chains.scores),
            replace(better, proposed, chains.best),
            jnp.where(better, scores, chains.best_scores),
            replace(better, accesses, chains.best_accesses),
        )

    unscored = jnp.full((num,), jnp.inf, prices.dtype)
    nothing = no_accesses(slots.num_levels, num, prices.dtype)
    return jax.lax.fori_loop(0, iterations, advance, _Chains(start, unscored, start, unscored, nothing))


def no_accesses(num_levels: int, num: int, dtype) -> Accesses:
    """Counts of nothing, of the shape that `count_batch` returns; numpy arrays."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("reads", "fills", "updates", "entering", "finals", "footprint", "keep"), (num_levels, 3)
    )
    shapes |= {"fanout": (num_levels, 2), "instances": (num_levels,), "compute_cycles": (), "macs": ()}
    nothing: dict[str, Any] = {name: np.zeros((*shape, num), dtype) for name, shape in shapes.items()}
    return Accesses(**nothing)


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
    problems, starts = Problem(operations, bits, density, resident, tables), _starts(start, bits, num_chains, slots)
    return _search(key, chip, problems, starts, prices, iterations, temperature, num_best, slots)


def _starts(given: Mapping | None, bits: jax.Array, num_chains: int, slots: Slots) -> Mapping:
    """Where chains start, (n, num_chains): in turn from each given mapping (n, any) and from all loops in DRAM.

    In numpy: one shape, and so one compilation of the search, whatever is given.
    """
    num, levels, dtype = bits.shape[0], slots.num_levels, bits.dtype
    shapes = {"temporal": (NUM_LOOPS,), "spatial": (2, NUM_LOOPS), "keep": (3,)}
    ones: dict[str, Any] = {name: np.ones((num, 1, levels, *shape), dtype) for name, shape in shapes.items()}
    order: Any = np.broadcast_to(np.arange(NUM_LOOPS, dtype=np.int32), (num, 1, levels, NUM_LOOPS))
    starts = Mapping(**ones, order=order)  # tiles of one word, which fit any chip
    if given is not None:
        starts = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), jax.device_get(given), starts)
    chain = np.arange(num_chains) % starts.temporal.shape[1]
    return jax.tree.map(lambda x: x[:, chain], starts)


@functools.partial(jax.jit, static_argnames=("num_best", "slots"))
def _search(
    key, chip, problems: Problem, starts: Mapping, prices, iterations, temperature, num_best: int, slots: Slots
) -> Candidates:
    num, num_chains = starts.temporal.shape[:2]

    def last(x: jax.Array) -> jax.Array:
        """(n, chains, ...) -> (..., B)."""
        return jnp.moveaxis(x.reshape(num * num_chains, *x.shape[2:]), 0, -1)

    def chains_of(x: jax.Array) -> jax.Array:
        return last(jnp.broadcast_to(x[:, None], (num, num_chains, *x.shape[1:])))

    all_problems = jax.tree.map(chains_of, problems)
    genomes = _fit_array(to_genome(jax.tree.map(last, starts), slots), chip, slots)
    chains = _anneal(key, chip, all_problems, genomes, prices, iterations, temperature, slots)
    mappings = to_mapping(chains.best, all_problems.operation.bounds, slots)

    def chosen(scores: jax.Array, *trees: Any) -> Any:
        best = _distinct_best(scores, num_best)
        return jax.tree.map(lambda x: x[best], (*trees, scores))

    found = jax.tree.map(
        lambda x: jnp.moveaxis(x, -1, 0).reshape(num, num_chains, *x.shape[:-1]),
        (chains.best_scores, mappings, chains.best_accesses),
    )
    return Candidates(*jax.vmap(chosen)(*found))


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
