"""Local search over ZigZag's mappings: one order of loops for all operands, and for each operand its own places of memories.

ZigZag cuts the loops of a layer, from inner to outer, where a memory is full, and each operand has its own cuts. Here every
cut of every operand is a level that keeps this operand alone, in every order of the cuts (a chain of the search has one of
them), between a level of one element at the MACs and DRAM. Fan-outs sit, for each operand, below the innermost loops of the
first memory that serves them. Counts and energies are those of `experiments.zigzag_points`, whose `linear_energy_total_pJ`
is what is minimised.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
from experiments.check_accesses import count_all
from experiments.reference_points import Record
from experiments.zigzag_points import DIRECTIONS, NAMES, WIRES, ZigzagPoint, zigzag_point
from hw.accesses import ZIGZAG, count_batch
from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, RELEVANT, Operation, stack_operations

_MEMORIES = 2  # below DRAM, at most, of an operand
_BEST = 16  # nests that a round goes on from


class ZigzagChip(NamedTuple):
    """What a point says of chip and layer, by ZigZag's operand (O, W, I) and memory, DRAM last, those absent first.

    Attributes:
      energy: picojoules per bit, by direction of `DIRECTIONS`, (3, M, 4).
      fan: which memory of each operand serves each axis of the array first, int32, (3, 2).
      holds: which SRAM or register file each memory of an operand is, one-hot, (3, M, memories).
      size: bits of each, (memories,).
      bits: of words as they are read and of unfinished outputs; and of finished ones, (3,), ().
      mac: picojoules of a product, ().
      across: fan-out of the loops along the axes, (2, 8).
    """

    energy: jax.Array
    fan: jax.Array
    holds: jax.Array
    size: jax.Array
    bits: jax.Array
    final_bits: jax.Array
    mac: jax.Array
    across: jax.Array


def chip_of(point: ZigzagPoint) -> ZigzagChip:
    """The chip of a point, with the layer's widths and the point's fan-out."""
    memories = point.arch.record("memories")
    names = [name for name in memories.value if name != "dram"]
    energy, holds = np.zeros((3, _MEMORIES + 1, 4)), np.zeros((3, _MEMORIES + 1, len(names)))
    fan = np.zeros((3, 2), np.int32)
    dimensions = sorted(point.record.record("spatial_mapping").value)
    for o, operand in enumerate(WIRES):
        absent = _MEMORIES + 1 - len(point.memories[operand])
        for i, name in enumerate(point.memories[operand], start=absent):
            energy[o, i] = [point.energy_per_bit(name, operand, kind) for kind in DIRECTIONS]
            holds[o, i] = [name == other for other in names]
        served = [memories.record(name).get("served_dimensions", list) for name in point.memories[operand]]
        fan[o] = [absent + next(i for i, those in enumerate(served) if d in those) for d in dimensions]
    across = np.ones((2, len(LOOPS)))
    for axis, dimension in enumerate(dimensions):
        for loop, factor in point.record.record("spatial_mapping").record(dimension).factors(NAMES).items():
            across[axis, LOOPS.index(loop)] = factor
    size = [memories.record(name).number("size") for name in names]
    precision = point.layer.record("operand_precision")
    return ZigzagChip(
        energy=jnp.asarray(energy, float),
        fan=jnp.asarray(fan),
        holds=jnp.asarray(holds, float),
        size=jnp.asarray(size, float),
        bits=jnp.asarray([precision.number(operand) for operand in WIRES], float),
        final_bits=jnp.asarray(precision.number("O_final"), float),
        mac=jnp.asarray(point.arch.record("operational_array").number("unit_energy"), float),
        across=jnp.asarray(across, float),
    )


def cuts(point: ZigzagPoint) -> np.ndarray:
    """Every order of the cuts of all operands, as levels that keep one operand each: (orders, levels - 1, 3)."""
    numbers = [len(point.memories[operand]) - 1 for operand in WIRES]
    sequence = [o for o, number in enumerate(numbers) for _ in range(number)]
    orders = sorted(set(itertools.permutations(sequence)))
    keep = np.zeros((len(orders), 1 + len(sequence), 3))
    for i, order in enumerate(orders):
        for level, o in enumerate(order, start=1):
            keep[i, level, _role(point, o)] = 1.0
    keep[:, 0] = 1.0
    keep[:, 0, _role(point, 0)] = 0.0  # sums do not rest at the MACs
    return keep


def _role(point: ZigzagPoint, o: int) -> int:
    """Our operand of one of ZigZag's."""
    return OPERANDS.index(point.roles[list(WIRES)[o]])


def search_layer(key: jax.Array, point: ZigzagPoint, iterations: int = 500, rounds: int = 8) -> tuple[float, Mapping]:
    """The least linear energy found, in picojoules, and its nest without the fan-out, (L, ...).

    Two chains begin with each order of the cuts; every further round of as many proposals goes on from the best of them.

    Raises:
      ValueError: nothing was found that fits.
    """
    chip, orders = chip_of(point), cuts(point)
    levels = orders.shape[1] + 1
    operation = point.cases[0].operation
    across = np.asarray(chip.across).prod(axis=0)
    in_time = stack_operations([dataclasses.replace(operation, bounds=jnp.ceil(operation.bounds / across))])
    slots = Slots.of(np.ones((levels, 2)))
    temporal = np.arange(levels)[:, None] > np.zeros(len(LOOPS))
    first = np.concatenate([orders[0], np.ones((1, 3))])
    freedom = make_freedom(slots, temporal, keep=first, perfect=True)
    operations, tables = to_chains((in_time, make_tables(in_time, perfect=True)), 2 * len(orders))
    roles = tuple(_role(point, o) for o in range(3))
    mappings = make_starts(None, 1, len(orders), slots, operation.bounds.dtype)
    mappings.keep[0, :, :-1] = orders
    for i in range(rounds):
        starts = make_starts(mappings, 1, 2 * len(orders), slots, operation.bounds.dtype, freedom.keep)
        round_key, temperature = jax.random.fold_in(key, i), 0.3 if i == 0 else 0.15
        found = _search(
            round_key,
            chip,
            operations,
            tables,
            freedom,
            to_genomes(starts, slots),
            iterations,
            temperature,
            slots,
            roles,
        )
        scores, mappings, _ = best_of_chains(found, 1, _BEST)
    if scores[0, 0] >= ILLEGAL / 2:
        raise ValueError(f"expected a mapping that fits for {point.name}, found none; enlarge a memory")
    return float(np.exp(scores[0, 0])), jax.tree.map(lambda x: np.asarray(x[0, 0]), mappings)


@functools.partial(jax.jit, static_argnames=("slots", "roles"))
def _search(
    key, chip: ZigzagChip, operations: Operation, tables: Tables, freedom: Freedom, genomes: Genome, iterations, temperature,
    slots: Slots, roles: tuple[int, ...],
) -> Found:  # fmt: skip
    def evaluate(operations: Operation, mappings: Mapping, _: Any) -> tuple[jax.Array, tuple[()]]:
        energy, used = _energy(operations, mappings, chip, roles)
        misfit = jnp.sum(jax.nn.relu(used / chip.size[:, None] - 1.0), axis=0)
        return jnp.log(energy) + misfit_penalty(misfit), ()

    return anneal(key, evaluate, operations, (), tables, freedom, genomes, iterations, temperature, slots)


def _energy(
    operations: Operation, mappings: Mapping, chip: ZigzagChip, roles: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Picojoules (B,) of nests in time, and the bits (memories, B) that their tiles take."""
    across = jnp.prod(chip.across, axis=0)[:, None]
    whole = dataclasses.replace(operations, bounds=operations.bounds * across)
    energy = used = jnp.zeros(())
    for o, role in enumerate(roles):
        is_memory = _memories(mappings.keep[1:, role])  # (M, L - 1, B)
        accesses = count_batch(whole, _fanned(mappings, chip, o, is_memory), ZIGZAG)
        total = {
            kind: jnp.sum(is_memory * (getattr(accesses, kind)[1:, role] * accesses.instances[1:])[None], axis=1)
            for kind in ("reads", "fills", "updates", "entering")
        }
        tile = jnp.sum(is_memory * accesses.footprint[1:, role][None], axis=1)
        below = jnp.broadcast_to(chip.bits[o], tile.shape)  # bits of a word between each memory and what is below it
        if o == 0:
            below = _sum_bits(mappings, role, chip, is_memory)
        above = jnp.concatenate([below[1:], below[-1:]])
        moves = _moves(o == 0, total, tile[-1])
        for direction, words in enumerate(moves):
            width = below if direction < 2 else above
            energy = energy + jnp.sum(words * width * chip.energy[o, :, direction, None], axis=0)
        used = used + jnp.einsum("ib,im->mb", tile * below, chip.holds[o])
        if o == 0:
            energy = energy + accesses.macs * chip.mac
    return energy, used


def _memories(keep: jax.Array) -> jax.Array:
    """Which level is which memory of an operand that levels keep (L - 1, B): (M, L - 1, B). Those absent are inner ones."""
    number = jnp.cumsum(keep[::-1], axis=0)[::-1]  # 1 at DRAM
    return jnp.stack([jnp.where(number == n, keep, 0.0) for n in range(_MEMORIES + 1, 0, -1)])


def _fanned(mappings: Mapping, chip: ZigzagChip, o: int, is_memory: jax.Array) -> Mapping:
    """The nest with the fan-out where an operand sees it: below the first loops of the memory that serves it."""
    levels = mappings.temporal.shape[0]
    spatial = []
    for axis in range(2):
        inner = jnp.where(chip.fan[o, axis] > 0, is_memory[chip.fan[o, axis] - 1], 0.0)  # (L - 1, B), the memory below
        place = jnp.sum(inner * jnp.arange(2.0, levels + 1)[:, None], axis=0)  # one level above it
        place = jnp.where(place > 0, place, 1)
        here = jnp.arange(float(levels))[:, None] == place[None]
        spatial.append(jnp.where(here[:, None], chip.across[axis][None, :, None], 1.0))
    return dataclasses.replace(mappings, spatial=jnp.stack(spatial, axis=1))


def _sum_bits(mappings: Mapping, role: int, chip: ZigzagChip, is_memory: jax.Array) -> jax.Array:
    """Bits of an output between each memory and what is below it, (M, B): final ones where no loop above sums."""
    sums = jnp.asarray(~RELEVANT[role])[None, :, None] & (mappings.temporal > 1)
    summing = jnp.any(sums, axis=1)  # (L, B)
    from_above = jnp.cumsum(summing[::-1], axis=0)[::-1] > 0  # at this level or above
    after = jnp.concatenate([from_above[2:], jnp.zeros_like(from_above[:1])])  # above levels 1 to L - 1
    unfinished = jnp.sum(jnp.where(after[None], is_memory, 0.0), axis=1) > 0  # leaving each memory
    bits = jnp.where(unfinished, chip.bits[0], chip.final_bits)
    return jnp.concatenate([jnp.broadcast_to(chip.bits[0], bits[:1].shape), bits[:-1]])


def _moves(is_output: bool, total: dict[str, jax.Array], size: jax.Array) -> tuple[jax.Array, ...]:
    """Words by direction, in the order of `DIRECTIONS`, (M, B) each; as in `ZigzagPoint`."""
    zero = jnp.zeros_like(total["reads"])
    if not is_output:
        return total["reads"], zero, zero, total["fills"]
    to_high = jnp.concatenate([total["entering"][:-1], zero[:1]])
    size = size[None]
    from_above = jnp.concatenate([total["updates"][1:], size]) - size
    return total["updates"] - size, total["updates"], to_high, from_above


def nested_loops(point: ZigzagPoint, mapping: Mapping) -> dict[str, Any]:
    """A mapping that was found as ZigZag writes it: for every operand, the loops below each of its memories' cuts."""
    temporal, order, keep = (np.asarray(x) for x in (mapping.temporal, mapping.order, mapping.keep))
    theirs = {ours: name for name, ours in NAMES.items()}
    written: dict[str, Any] = {}
    for o, operand in enumerate(WIRES):
        runs: list[list[Any]] = [[]]
        for level in range(1, len(temporal)):
            inner_first = np.argsort(order[level])
            runs[-1] += [[theirs[LOOPS[d]], int(temporal[level, d])] for d in inner_first if temporal[level, d] > 1]
            if keep[level, _role(point, o)] and level < len(temporal) - 1:
                runs.append([])
        written[operand] = runs
    return written


def recount(point: ZigzagPoint, mapping: Mapping) -> float:
    """Linear energy in picojoules of a mapping that was found, from ZigZag's own way to write it, in double precision."""
    loops = nested_loops(point, mapping)
    record = Record(point.record.value | {"temporal_mapping_inner_to_outer": loops}, point.record.line)
    rewritten = zigzag_point(record, point.layer, point.arch)
    with jax.enable_x64(True):
        counts = count_all(rewritten.cases, ZIGZAG)
    return rewritten.energy(counts, _widths(rewritten, loops))


def _widths(point: ZigzagPoint, loops: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Bits of the words by operand, memory and direction: of outputs the final ones where no loop further out sums."""
    precision, widths = point.layer.record("operand_precision"), {}
    for o, operand in enumerate(WIRES):
        edges = [precision.number(operand)]  # below each memory
        for i in range(len(loops[operand])):
            above = [LOOPS.index(NAMES[name]) for run in loops[operand][i + 1 :] for name, _ in run]
            is_final = operand == "O" and RELEVANT[_role(point, o), above].all()
            edges.append(precision.number("O_final" if is_final else operand))
        for i, memory in enumerate(point.memories[operand]):
            for direction in DIRECTIONS:
                widths[operand, memory, direction] = edges[i + direction.endswith("high")]
    return widths
