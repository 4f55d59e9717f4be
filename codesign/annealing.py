"""Batched annealed local search over mappings, whatever they cost: slots, moves, and the loop over all chains.

A mapping is searched as integer factors in *slots* (temporal factors of every level below DRAM, spatial factors where the
chip has a fan-out); the DRAM factor is whatever is left, rounded up, so that every proposal covers its operation. One
loop advances all chains of all operations together. Arrays of the loop have the chains, written B, as their last axis:
chains of one operation lie side by side, and vectors run over all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hw.mapping import Mapping
from hw.operation import LOOPS, Operation
from nets.rounding import random_words

NUM_LOOPS = len(LOOPS)
ILLEGAL = 100.0  # score offset (natural log) of a mapping that does not fit: legal ones always rank before it
_TABLE_SIZE = 24  # factor values offered per loop
_MOVES = 2  # at most, of a chain in one iteration
_WORDS_PER_MOVE = 9


class Slots(NamedTuple):
    """Static description of where factors can go: (level, axis) with axis -1 temporal, 0 spatial X, 1 spatial Y."""

    places: tuple[tuple[int, int], ...]
    num_levels: int

    @classmethod
    def of(cls, fanout: np.ndarray) -> Slots:
        """Those of a concrete fan-out (L, 2): spatial ones only where it exceeds one."""
        num_levels = fanout.shape[0]
        temporal = [(level, -1) for level in range(num_levels - 1)]
        spatial = [(level, axis) for level in range(num_levels) for axis in range(2) if fanout[level, axis] > 1]
        return cls(tuple(temporal + spatial), num_levels)


class Freedom(NamedTuple):
    """What moves may change, as data. A chip that wires its array for some loops, or its buffers for some operands, is here.

    Attributes:
      places: slots open to each loop, first ones first and then any, int32, (8, slots).
      num_places: how many are open, int32, (8,).
      keep: what levels keep at the start, 0/1, (levels - 1, 3).
      toggles: where that may change, bool, (levels - 1, 3).
      perfect: whether factors must divide their bounds, bool, ().
    """

    places: jax.Array
    num_places: jax.Array
    keep: jax.Array
    toggles: jax.Array
    perfect: jax.Array


def make_freedom(slots: Slots, temporal=None, spatial=None, keep=None, toggles=None, perfect: bool = False) -> Freedom:
    """Everything free by default.

    Args:
      slots: of the chip.
      temporal, spatial: loops that may run in time at a level, (L, 8), and fan out below it along X and Y, (L, 2, 8).
        DRAM takes what the others leave, whatever is said of it.
      keep, toggles: operands that levels keep at the start and where that may change, (L, 3); without `toggles` a given
        `keep` is fixed.
      perfect: only factors that divide the bounds.

    Returns:
      The freedom, in numpy: on its way into a search an array costs less so than made on a device.
    """
    levels = slots.num_levels
    temporal = np.ones((levels, NUM_LOOPS), bool) if temporal is None else np.asarray(temporal, bool)
    spatial = np.ones((levels, 2, NUM_LOOPS), bool) if spatial is None else np.asarray(spatial, bool)
    toggles = np.full((levels, 3), keep is None) if toggles is None else np.asarray(toggles, bool)
    keep = np.ones((levels, 3)) if keep is None else np.asarray(keep, float)
    is_open = np.array([temporal[level] if axis < 0 else spatial[level, axis] for level, axis in slots.places])
    free: tuple[Any, ...] = (
        np.argsort(~is_open, axis=0, kind="stable").T.astype(np.int32),
        is_open.sum(axis=0, dtype=np.int32),
        keep[:-1].astype(jnp.result_type(float)),
        toggles[:-1],
        np.asarray(perfect),
    )
    return Freedom(*free)


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


def make_tables(operations: Operation, perfect: bool = False) -> Tables:
    """Factor tables of stacked operations: divisors, evenly thinned if there are many, then ceil(bound / k).

    The latter waste little; `perfect` leaves them out. In numpy.
    """
    bounds = np.asarray(operations.bounds).astype(int)
    values: Any = np.ones((*bounds.shape, _TABLE_SIZE), operations.bounds.dtype)
    num_values: Any = np.ones(bounds.shape, np.int32)
    primes: Any = np.full((*bounds.shape, 3), 2.0, operations.bounds.dtype)
    for index, bound in np.ndenumerate(bounds):
        divisors = [d for d in range(1, bound + 1) if bound % d == 0] if bound < 100_000 else [1, bound]
        ceilings = [] if perfect else sorted({-(-bound // k) for k in range(1, 65)} - set(divisors))
        row = (divisors[:: max(1, len(divisors) // (_TABLE_SIZE if perfect else 14))] + ceilings)[:_TABLE_SIZE]
        values[index][: len(row)] = row
        num_values[index] = len(row)
        found = [p for p in (2, 3, 5, 7, 11, 13) if bound % p == 0][:3]
        primes[index][: len(found)] = found
    return Tables(values, num_values, primes)


def to_mapping(genome: Genome, bounds: jax.Array, slots: Slots) -> Mapping:
    """The mappings of genomes over bounds (8, B); DRAM's temporal factors are the ceiling of what the slots leave."""
    ones = jnp.ones_like(bounds)
    row = {place: genome.factors[i] for i, place in enumerate(slots.places)}
    top = jnp.ceil(bounds / jnp.prod(genome.factors, axis=0))
    temporal = [row[(level, -1)] for level in range(slots.num_levels - 1)] + [top]
    spatial = [[row.get((level, axis), ones) for axis in range(2)] for level in range(slots.num_levels)]
    keep = jnp.concatenate([genome.keep, jnp.ones_like(genome.keep[:1])])
    return Mapping(jnp.stack(temporal), jnp.stack([jnp.stack(axes) for axes in spatial]), genome.order, keep)


def to_genomes(mappings: Mapping, slots: Slots, fanout: np.ndarray | None = None) -> Genome:
    """Genomes of mappings (n, chains, ...), inverse of `to_mapping`; in numpy, for which nothing has to be compiled.

    Args:
      mappings: in numpy.
      slots: of the chip.
      fanout: of the array, (L, 2). The largest spatial factor of an axis that it does not fit gives way: a warm start
        from a chip with a row more would otherwise start from nothing that fits.
    """
    mappings = jax.tree.map(_flat_chains, mappings)
    rows: list[Any] = [
        mappings.temporal[level] if axis < 0 else mappings.spatial[level, axis] for level, axis in slots.places
    ]
    for i, (level, axis) in enumerate(slots.places):
        if axis >= 0 and fanout is not None:
            used, largest = np.prod(rows[i], axis=0), np.max(rows[i], axis=0)
            fitting = np.maximum(np.floor(fanout[level, axis] * largest / used), 1.0)
            gives_way = np.arange(NUM_LOOPS)[:, None] == np.argmax(rows[i], axis=0)
            rows[i] = np.where(gives_way & (used > fanout[level, axis]), fitting, rows[i])
    factors: Any = np.stack(rows, dtype=mappings.temporal.dtype)
    return Genome(factors, mappings.order, mappings.keep[:-1])


def _one_hot(index: jax.Array, size: int) -> jax.Array:
    """Where an index (B,) points along an axis: (size, B), bool."""
    return jnp.arange(size, dtype=index.dtype)[:, None] == index[None]


def _entry(table: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """One entry of the table (rows, columns, B) of each chain, at indices (B,)."""
    flat = table.reshape(-1, table.shape[-1])
    return jnp.take_along_axis(flat, (row * table.shape[1] + column)[None], axis=0)[0]


def _propose(words: jax.Array, genome: Genome, bounds: jax.Array, tables: Tables, freedom: Freedom) -> Genome:
    """One random move of every chain: set, exchange or shift a factor, swap two loops, toggle a keep.

    Places are picked by masks, which fuse with the arithmetic; gathers and scatters would run chain by chain. `words` are
    random, uint32, (_WORDS_PER_MOVE, B).
    """
    num_slots, num_levels = genome.factors.shape[0], genome.order.shape[0]

    def pick(i: int, n: int | jax.Array) -> jax.Array:
        return (words[i] % jnp.asarray(n, jnp.uint32)).astype(jnp.int32)

    def at(mask: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, values, 0), axis=tuple(range(values.ndim - 1)), dtype=values.dtype)

    # Loops of one iteration, or of no slot, cannot move: draw among the others.
    can_move = (bounds > 1) & (freedom.num_places > 0)[:, None]
    nth = jnp.cumsum(can_move, axis=0, dtype=jnp.int32)
    is_loop = can_move & (nth == 1 + pick(0, NUM_LOOPS)[None] % jnp.maximum(nth[-1:], 1))
    loop = jnp.argmax(is_loop, axis=0).astype(jnp.int32)
    num_places = jnp.maximum(freedom.num_places[loop], 1)
    here, there = (freedom.places[loop, pick(i, num_places)] for i in (1, 2))
    is_here, is_there = (_one_hot(slot, num_slots)[:, None] & is_loop[None] for slot in (here, there))
    at_here, at_there = at(is_here, genome.factors), at(is_there, genome.factors)
    value = _entry(tables.values, loop, pick(3, at(is_loop, tables.num_values)))
    prime = _entry(tables.primes, loop, pick(4, 3))
    shift = jnp.where(jnp.mod(at_here, prime) == 0, prime, 1.0)

    move = pick(5, 16)
    is_set, is_swap, is_shift, is_halve = move < 5, move == 5, (move > 5) & (move < 9), move == 9
    is_toggle = (move >= 13) & jnp.any(freedom.toggles)
    is_shift |= (move >= 13) & ~is_toggle  # nothing to toggle: shift instead
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
    toggled &= freedom.toggles[..., None]
    return Genome(factors, order, _where(is_toggle, toggled, 1.0 - at(toggled, genome.keep), genome.keep))


def _where(chosen: jax.Array, mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` (B,) at the masked places (..., B) of the chosen chains (B,), else `old`."""
    chosen, new = (jnp.expand_dims(x, tuple(range(old.ndim - 1))) for x in (chosen, new))
    return jnp.where(mask & chosen, new, old)


type Evaluate = Callable[[Operation, Mapping, Any], tuple[jax.Array, Any]]
"""Scores (B,) of mappings of operations, and what else is to be kept of the best: all arrays have a trailing B.

The third argument is what a chain has of its own. Lower is better; `ILLEGAL` and more is for what does not fit.
"""


class Found(NamedTuple):
    """The best of every chain, trailing B: scores, mappings, and what `Evaluate` returned beside the score."""

    scores: jax.Array
    mappings: Mapping
    kept: Any


class _Chains(NamedTuple):
    """State of all chains; the last axis is B. `kept` are the mappings scored last, and what `Evaluate` returned of them."""

    genomes: Genome
    scores: jax.Array
    best: Genome
    best_scores: jax.Array
    kept: Any


def anneal(
    key: jax.Array,
    evaluate: Evaluate,
    operations: Operation,
    own: Any,
    tables: Tables,
    freedom: Freedom,
    start: Genome,
    iterations: int | jax.Array,
    temperature: float | jax.Array,
    slots: Slots,
) -> Found:
    """Anneal all chains from `start`, which is scored in the first iteration.

    Args:
      key: of the random moves.
      evaluate: what mappings cost; the joint price of a chip, constants per access, another tool's conventions.
      operations, own, tables: with a trailing axis B, see `to_chains`.
      freedom: what moves may change, the same for all chains.
      start: trailing B, see `to_genomes`.
      iterations: proposals of each chain.
      temperature: at the start, in nats of score; it falls to zero.
      slots: of the chip.
    """
    bounds, num = operations.bounds, start.factors.shape[-1]

    @jax.jit  # traced once, for its shapes and for the loop
    def scored(genomes: Genome) -> tuple[jax.Array, tuple[Mapping, Any]]:
        mappings = to_mapping(genomes, bounds, slots)
        scores, kept = evaluate(operations, mappings, own)
        covered = jnp.prod(mappings.temporal, axis=0) * jnp.prod(mappings.spatial, axis=(0, 1))
        is_imperfect = freedom.perfect & jnp.any(covered > bounds, axis=0)
        return jnp.where(is_imperfect, scores + ILLEGAL, scores), (mappings, kept)

    def moved(words: jax.Array, genomes: Genome, num_moves: jax.Array) -> Genome:
        def move(i, genomes):
            return _chosen(i < num_moves, _propose(words[i], genomes, bounds, tables, freedom), genomes)

        return jax.lax.fori_loop(0, _MOVES, move, genomes)

    # One hash an iteration: keys of its own for every move took half of the compilation.
    seed = jax.random.bits(key, (2,), jnp.uint32)

    def advance(i: jax.Array, chains: _Chains) -> _Chains:
        words = random_words(random_words(seed + i.astype(jnp.uint32), (2,)), (_MOVES * _WORDS_PER_MOVE + 1, num))
        # The last iteration scores the best again: what is kept of them need not be carried along before.
        is_last = i == iterations
        origin = jax.tree.map(functools.partial(jax.lax.select, is_last), chains.best, chains.genomes)
        # Every other chain makes two moves at once, so that compound moves (shrink here, grow there) can pass.
        num_moves = jnp.where((i == 0) | is_last, 0, 1 + (jnp.arange(num, dtype=jnp.int32) + i) % 2)
        proposed = moved(words[1:].reshape(_MOVES, _WORDS_PER_MOVE, num), origin, num_moves)
        scores, kept = scored(proposed)
        cooled = temperature * (1.0 - i / iterations) ** 2
        luck = -jnp.log(jnp.maximum(words[0].astype(scores.dtype) * 2.0**-32, 1e-6))
        accept = scores <= chains.scores + cooled * luck
        better = scores < chains.best_scores
        # A barrier: else XLA works both out again for each array that they choose from.
        scores, accept, better = jax.lax.optimization_barrier((scores, accept, better))
        return _Chains(
            _chosen(accept, proposed, chains.genomes),
            jnp.where(accept, scores, chains.scores),
            _chosen(better, proposed, chains.best),
            jnp.where(better, scores, chains.best_scores),
            kept,
        )

    chains = jax.lax.fori_loop(0, iterations + 1, advance, _unscored(start, *jax.eval_shape(scored, start)))
    return Found(chains.best_scores, *chains.kept)


def _unscored(start: Genome, scores: jax.ShapeDtypeStruct, kept: Any) -> _Chains:
    """Chains that any score improves; of `scores` and `kept` the shapes are taken."""
    worst = jnp.full(scores.shape, jnp.inf, scores.dtype)
    return _Chains(start, worst, start, worst, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept))


def _chosen(chosen: jax.Array, new: Any, old: Any) -> Any:
    """Trees of `new` for the chosen chains (B,), else of `old`; the last axis of every leaf is B."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(chosen, range(a.ndim - 1)), a, b), new, old)


def misfit_penalty(misfit: jax.Array) -> jax.Array:
    """What a mapping that does not fit pays on its score, growing with the misfit; 0 where it fits."""
    return jnp.where(misfit > 0, ILLEGAL + jnp.log1p(misfit), 0.0)


def to_chains(tree: Any, num_chains: int) -> Any:
    """What each operation has (n, ...), repeated for its chains: (..., n * num_chains); in numpy."""
    return jax.tree.map(lambda x: _flat_chains(np.repeat(np.asarray(x)[:, None], num_chains, axis=1)), tree)


def _flat_chains(x: np.ndarray) -> np.ndarray:
    """(n, chains, ...) -> (..., n * chains)."""
    return np.ascontiguousarray(np.moveaxis(x.reshape(-1, *x.shape[2:]), 0, -1))


def best_of_chains(found: Found, num_operations: int, num_best: int) -> Found:
    """The `num_best` lowest distinct scores of each operation and what belongs to them: (..., B) -> (n, num_best, ...).

    In numpy, on what a search returned; repeats (equal scores) come last.
    """
    scores = np.asarray(found.scores).reshape(num_operations, -1)
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    with np.errstate(invalid="ignore"):  # a misfit may be infinite
        is_repeat = np.diff(ranked, axis=1, prepend=-np.inf) <= 1e-6 * np.abs(ranked)
    again = np.argsort(np.where(is_repeat, ranked + 2 * ILLEGAL, ranked), axis=1, kind="stable")
    best = np.take_along_axis(order, again[:, :num_best], axis=1) + np.arange(num_operations)[:, None] * scores.shape[1]
    return jax.tree.map(lambda x: np.moveaxis(x, -1, 0)[best], jax.device_get(found))


def make_starts(
    given: Mapping | None,
    num: int,
    num_chains: int,
    slots: Slots,
    dtype: Any,
    keep: jax.Array | np.ndarray | None = None,
) -> Mapping:
    """Where chains start, (n, num_chains): in turn from each given mapping (n, any) and from all loops in DRAM.

    In numpy: one shape, and so one compilation of the search, whatever is given. All loops in DRAM come with what levels
    `keep` (L - 1, 3), by default everything.
    """
    levels = slots.num_levels
    shapes = {"temporal": (NUM_LOOPS,), "spatial": (2, NUM_LOOPS), "keep": (3,)}
    ones: dict[str, Any] = {name: np.ones((num, 1, levels, *shape), dtype) for name, shape in shapes.items()}
    if keep is not None:
        ones["keep"][..., :-1, :] = keep
    order: Any = np.broadcast_to(np.arange(NUM_LOOPS, dtype=np.int32), (num, 1, levels, NUM_LOOPS))
    starts = Mapping(**ones, order=order)  # tiles of one word, which fit any chip
    if given is not None:
        starts = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), jax.device_get(given), starts)
    chain = np.arange(num_chains) % starts.temporal.shape[1]
    return jax.tree.map(lambda x: x[:, chain], starts)
