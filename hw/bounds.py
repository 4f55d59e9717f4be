"""Lower bounds: no legal mapping of an operation on a chip, or on any chip of a box, costs less energy or time."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from hw.arithmetic import partial_sum_bits, product_cycles, product_energy, sums_per_product
from hw.chip import Chip
from hw.cost import REDUCED, with_defaults
from hw.operation import LOOPS, RELEVANT, Operation
from hw.step import Step
from hw.windows import diagonals, distinct_offsets

_ABSENT = 1e-3  # joules per bit
_G, _N, _K, _C, _P, _Q, _R, _S = range(len(LOOPS))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowerBound:
    """What an operation costs at least, under any mapping that fits the chip.

    Attributes:
      energy: joules, shape ().
      latency: seconds, shape ().
      cycles: clock cycles, shape ().
      dram_words: words that DRAM reads for the chip or receives from it, shape ().
    """

    energy: jax.Array
    latency: jax.Array
    cycles: jax.Array
    dram_words: jax.Array


class Corners(NamedTuple):
    """Two chips between which all chips of a box lie, and the least that an access costs on any of them.

    Attributes:
      small: of least area, leakage, fan-outs and supply: what products, wires and logic cost.
      large: of the largest capacities, fan-outs, bandwidths and supply: what fits, and how fast.
      energy_per_bit: at least that of each level's reads and writes, joules, shape (L, 2); see `Chip.energy_per_bit`.
    """

    small: Chip
    large: Chip
    energy_per_bit: jax.Array

    @classmethod
    def of(cls, chip: Chip) -> Self:
        """Those of a box of one chip."""
        return cls(chip, chip, chip.energy_per_bit())


def compulsory_words(operation: Operation) -> jax.Array:
    """Elements of weights, inputs and outputs that products touch, shape (3,): each crosses every boundary once."""
    bounds = operation.bounds
    width = distinct_offsets(bounds[_P], bounds[_R], diagonals(operation.stride[0], operation.dilation[0]))
    height = distinct_offsets(bounds[_Q], bounds[_S], diagonals(operation.stride[1], operation.dilation[1]))
    boxed = jnp.prod(jnp.where(RELEVANT, bounds[None], 1.0), axis=-1)
    return boxed.at[1].set(bounds[_G] * bounds[_N] * bounds[_C] * width * height)


def capacity_product(operation: Operation, capacity: jax.Array) -> jax.Array:
    """The least product y z of the words of two operands that enter a memory, if the third rests there longest.

    Walk outwards from the positions in the nest where the three operands are held, each moved past the loops that do
    not move it. Let X be held outermost; its tile fits the memory, so the loops that move X span at most `capacity`
    iterations inside of its position. A word of Y, or of Z, is used while the loops that do not move it run inside of its
    own position, which is further in: those of Y and those of Z are together loops of X. A word of the inputs is used
    R S times as often. Hence (macs / y)(macs / z) <= R S capacity, and y + z >= 2 macs / sqrt(R S capacity).

    Args:
      operation: the nest.
      capacity: words of X that the memory holds, all levels and copies within.

    Returns:
      Words squared, of the shape of `capacity`.

    Source: the bound 2 m n k / sqrt(M) of matrix products (Smith et al., arXiv:1702.02017), here for tiled nests with
    windows.
    """
    return operation.macs**2 / (operation.bounds[_R] * operation.bounds[_S] * capacity)


def lower_bound(
    chip: Chip,
    operation: Operation,
    bits: jax.Array,
    density: jax.Array | None = None,
    resident: jax.Array | None = None,
) -> LowerBound:
    """Bounds energy and cycles from below; the arguments are those of `hw.cost.evaluate`.

    Energy: the MACs, and the least over all keep sets of what the levels that keep an operand must serve: the
    lowest of them every product, at the widest multicast that fan-outs and loops allow; all of them every element once;
    and those that keep all three operands what the memory below cannot hold (`capacity_product`). Reads that add to
    partial sums on chip are left out. Cycles: products over MACs, or DRAM traffic over its bandwidth.

    On the small operations of tests/test_bounds.py the cheapest of all mappings costs 1.00 to 2.1 times the bound.

    Returns:
      The bound, differentiable almost everywhere.
    """
    return lower_bound_of_box(Corners.of(chip), operation, bits, *with_defaults(bits, density, resident))


def lower_bound_of_box(
    corners: Corners, operation: Operation, bits: jax.Array, density: jax.Array, resident: jax.Array
) -> LowerBound:
    """As `lower_bound`, for every chip of a box; cycles are those of the fastest.

    Args:
      corners: of the box.
      operation, bits, density: as `lower_bound`.
      resident: at least the resident share of each operand on any of the chips, shape (3,).
    """
    small, large = corners.small, corners.large
    accumulated = operation.accumulated > 0.5
    read_bits = jnp.stack([jnp.where(accumulated[0], bits[1], bits[0]), jnp.where(accumulated[2], bits[1], bits[2])])
    summed = jnp.prod(jnp.where(REDUCED, operation.bounds[None], 1.0), axis=1)
    sum_bits = partial_sum_bits(small.mac, read_bits, jnp.sum(jnp.where(accumulated, summed, 0.0)))
    moved_bits = jnp.where(accumulated, jnp.minimum(bits, sum_bits), bits)
    work = operation.macs * density[0] * density[1]
    cycles_per_product = product_cycles(small.mac, read_bits)
    leaving = 1.0 - resident

    mac_energy = work * product_energy(small.mac, small.technology, small.vdd, read_bits, sum_bits)
    control = 1.0 + small.technology["clock.energy"] + small.technology["control.energy"]
    sums = sums_per_product(small.mac, read_bits) / small.mac.tree
    on_chip, dram = _least_access_energy(corners, operation, accumulated, moved_bits, leaving, sums)
    energy = jnp.min(control * (mac_energy + on_chip) + dram)

    capacity = _capacities(large, moved_bits)[-1] / sums
    least = compulsory_words(operation)
    dram_bits = moved_bits * leaving
    moved = jnp.maximum(jnp.sum(least * dram_bits), _capacity_cost(operation, capacity, least, dram_bits))
    read = jnp.sum(jnp.where(accumulated, 0.0, least * dram_bits))
    written = jnp.sum(jnp.where(accumulated, least * dram_bits, 0.0))
    serial = moved if large.ports[-1] == "1RW" else jnp.maximum(jnp.maximum(read, written), moved / 2.0)
    slots = cycles_per_product * (1.0 if small.mac.gates else density[0] * density[1])
    compute_cycles = slots * jnp.maximum(operation.macs / large.num_macs(), 1.0)
    cycles = jnp.maximum(compute_cycles, serial / large.bits_per_cycle()[-1])
    words = jnp.maximum(jnp.sum(least), _capacity_cost(operation, capacity, least, jnp.ones_like(least)))
    return LowerBound(energy=energy, latency=cycles / large.frequency(), cycles=cycles, dram_words=words)


class StepBound(NamedTuple):
    """What a step costs at least on any chip of a box: joules, seconds, square metres, watts of leakage, each ()."""

    energy: jax.Array
    latency: jax.Array
    area: jax.Array
    leakage_power: jax.Array


def step_bound(corners: Corners, step: Step, operation_bits: jax.Array, tensor_bits: jax.Array) -> StepBound:
    """Bounds a step under any mappings; the arguments are those of `hw.schedule.evaluate_step`, at full density.

    A tensor is resident by no more than what it alone would be if nothing else were on the largest chip. Moves between
    shared SRAM and DRAM beside what operations and vector work read and write are left out, and so is the time that
    vector work spends at the shared SRAM.
    """
    small, large = corners.small, corners.large
    capacity = large.size_bits[-2] * large.resident_fraction
    resident = jnp.clip(capacity / (step.tensor_elements * tensor_bits), 0.0, 1.0)
    full = jnp.ones((*operation_bits.shape[:-1], 2), operation_bits.dtype)
    bounds = jax.vmap(lower_bound_of_box, (None, 0, 0, 0, 0))(
        corners, step.operations, operation_bits, full, resident[step.operand_tensor]
    )
    split = jnp.stack([resident, 1.0 - resident], axis=-1) * tensor_bits[:, None]  # (m, 2)
    read, written = step.vector_reads @ split, step.vector_writes @ split  # (v, 2), at shared SRAM and DRAM
    per_bit = (corners.energy_per_bit + small.wire_energy_per_bit()[:, None])[-2:]
    per_bit = per_bit.at[0].min(per_bit[1])  # where SRAM is the dearer, nothing needs to be resident
    accessed = jnp.sum(read * per_bit[None, :, 0] + written * per_bit[None, :, 1], axis=0)
    arithmetic = jnp.sum(step.vector_ops) * small.vector_energy()
    moved = jnp.maximum(read[:, 1], written[:, 1]) if large.ports[-1] != "1RW" else read[:, 1] + written[:, 1]
    vector_cycles = jnp.maximum(step.vector_ops / large.vector_lanes, moved / large.bits_per_cycle()[-1])
    control = 1.0 + small.technology["clock.energy"] + small.technology["control.energy"]
    energy = jnp.sum(step.multiplicity * bounds.energy) + accessed[1] + control * (arithmetic + accessed[0])
    latency = jnp.sum(step.multiplicity * bounds.latency) + jnp.sum(vector_cycles) / large.frequency()
    leakage = small.leakage_power()
    return StepBound(energy + leakage * latency, latency, small.area().total, leakage)


def _least_access_energy(
    corners: Corners, operation: Operation, accumulated: jax.Array, bits: jax.Array, leaving: jax.Array, sums: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joules of the levels on chip and of DRAM, by the keep sets of weights, inputs and outputs, each (k, k, k).

    `sums` partial sums per product leave the array. As fewer words of one operand enter a memory, `capacity_product` is
    less by as much, as if the memory held more.
    """
    num_levels = len(corners.small.kinds)
    # (k, L): all sets of levels that an operand can be kept at; DRAM is in each.
    keep = np.array([(*kept, True) for kept in product((False, True), repeat=num_levels - 1)])
    lowest = keep & (np.cumsum(keep, axis=1) == 1)
    energy, wire = corners.energy_per_bit, corners.small.wire_energy_per_bit()[:, None]
    # A level that is on none of the chips keeps nothing: dearer than all that is there.
    energy = jnp.where(corners.large.size_bits[:, None] > 0.0, energy, _ABSENT)
    asked_cost = (jnp.where(accumulated[None], energy[:, 1:], energy[:, :1]) + wire) * bits[None]
    asked_cost = asked_cost.at[-1].multiply(leaving)
    least = compulsory_words(operation)
    products = jnp.where(accumulated, operation.macs * sums, operation.macs)
    of_macs = jnp.maximum(products[None] / _widest_multicast(corners.large, operation), least[None])
    asked = jnp.where(lowest[:, :, None], of_macs[None], jnp.where(keep[:, :, None], least[None, None], 0.0))
    fills = jnp.where(keep[:, :-1, None] & ~accumulated[None, None], least[None, None], 0.0)
    fill_cost = (energy[:-1, 1:] * bits[None]).at[-1].multiply(leaving)

    served = asked * asked_cost[None]
    w, i, o = served[..., 0], served[..., 1], served[..., 2]
    together = w[:, None, None] + i[None, :, None] + o[None, None, :]
    all_kept = keep[:, None, None] & keep[None, :, None] & keep[None, None, :]
    capacity_cost = jax.vmap(_capacity_cost, in_axes=(None, 0, None, 0))(
        operation, _capacities(corners.large, bits) / sums, least, asked_cost
    )
    together = jnp.maximum(together, jnp.where(all_kept, capacity_cost[None, None, None], 0.0))
    filled = jnp.sum(fills * fill_cost[None], axis=1)
    w, i, o = filled[:, 0], filled[:, 1], filled[:, 2]
    filled = w[:, None, None] + i[None, :, None] + o[None, None, :]
    return jnp.sum(together[..., :-1], axis=-1) + filled, together[..., -1]


def _capacity_cost(operation: Operation, capacity: jax.Array, least: jax.Array, cost: jax.Array) -> jax.Array:
    """Least sum of cost times words over the operands, given capacities in words of each (3,) and costs (3,)."""
    held = [
        cost[x] * least[x] + 2.0 * jnp.sqrt(cost[y] * cost[z] * capacity_product(operation, capacity[x]))
        for x, y, z in ((0, 1, 2), (1, 0, 2), (2, 0, 1))
    ]
    return jnp.min(jnp.stack(held))


def _capacities(chip: Chip, bits: jax.Array) -> jax.Array:
    """Words of each operand that fit one level below one instance of each level, or its MACs, shape (L, 3)."""
    fanout = jnp.prod(chip.fanout, axis=1)
    capacities = []
    for level in range(len(chip.kinds)):
        words = jnp.broadcast_to(jnp.prod(fanout[: level + 1]), bits.shape)
        for below in range(level):
            words = jnp.maximum(words, chip.size_bits[below] * jnp.prod(fanout[below + 1 : level + 1]) / bits)
        capacities.append(words)
    return jnp.stack(capacities)


def _widest_multicast(chip: Chip, operation: Operation) -> jax.Array:
    """MACs that one access of each level can serve, shape (L, 3): all below it, or all that want the same word."""
    bounds = operation.bounds
    idle = jnp.prod(jnp.where(RELEVANT, 1.0, bounds[None]), axis=-1)
    diagonals = jnp.minimum(bounds[_P], bounds[_R]) * jnp.minimum(bounds[_Q], bounds[_S])
    idle = idle.at[1].multiply(diagonals)
    return jnp.minimum(jnp.cumprod(jnp.prod(chip.fanout, axis=1))[:, None], idle[None])
