"""Several cores on one die: what they share, and what a step costs on them.

A core is a `Chip` with its own array, private memories and vector unit; all share the SRAM at level L - 2 and DRAM. Which
core runs what, and what overlaps, is in `hw.overlap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from hw import memory
from hw.accesses import Accesses
from hw.chip import Chip
from hw.cost import price
from hw.overlap import Schedule, list_schedule
from hw.schedule import Die, StepCost, slot_sums, total, transfer_work, vector_work
from hw.step import Step, residency


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cores:
    """Cores that share level L - 2, DRAM and technology; see `make_cores`.

    Cores may differ in supply and clock. The shared SRAM has one supply; an access takes cycles of the core that makes it.

    Attributes:
      chips: the cores. What they share is the same in all. The `resident_fraction` of each is the part of the shared SRAM
        that is not for its own tiles; what none of them uses for tiles holds the resident tensors.
    """

    chips: tuple[Chip, ...]

    def resident_bits(self) -> jax.Array:
        """Bits of the shared SRAM for tensors that stay between slots, shape ()."""
        first = self.chips[0]
        tiles = sum((1.0 - chip.resident_fraction for chip in self.chips), jnp.zeros_like(first.resident_fraction))
        return first.size_bits[-2] * (1.0 - tiles)

    def area(self) -> jax.Array:
        """Area in m2 of all cores, the shared SRAM once, shape ()."""
        first, *others = self.chips
        shared = first.area().memories[-2:].sum() * (1.0 + first.technology["control.area"])
        return sum((chip.area().total - shared for chip in others), first.area().total)

    def leakage_power(self) -> jax.Array:
        """Leakage in watts of all cores, the shared SRAM once, shape ()."""
        first, *others = self.chips
        shared = memory.leakage_power(first.levels()[-2], first.technology, first.level_vdd()[-2])
        return sum((chip.leakage_power() - first.instances()[-2] * shared for chip in others), first.leakage_power())


def make_cores(chips: Sequence[Chip]) -> Cores:
    """Cores whose shared levels and technology are those of the first.

    The part of the shared SRAM that the first gives to tiles is split evenly, as all cores may run at once.

    Args:
      chips: the cores, each with array, private memories and vector unit as they are when it is alone.

    Raises:
      ValueError: no core, or cores with different numbers of memory levels.
    """
    depths = [len(chip.kinds) for chip in chips]
    if len(set(depths)) != 1:
        raise ValueError(f"expected one or more cores with equally many memory levels, got levels {depths}")
    first = chips[0]
    for_others = 1.0 - (1.0 - first.resident_fraction) / len(chips)

    def join_in(chip: Chip) -> Chip:
        numbers = {
            name: getattr(chip, name).at[-2:].set(getattr(first, name)[-2:])
            for name in ("size_bits", "bandwidth_bits", "banks")
        }
        labels = {name: getattr(chip, name)[:-2] + getattr(first, name)[-2:] for name in ("kinds", "ports", "names")}
        fanout = chip.fanout.at[-1].set(first.fanout[-1])  # instances of the shared SRAM
        supplies = chip.relative_vdd.at[-2:].set(first.level_vdd()[-2:] / chip.vdd)
        shared = numbers | labels | {"fanout": fanout, "relative_vdd": supplies, "technology": first.technology}
        return replace(chip, **shared, resident_fraction=for_others)

    return Cores((replace(first, resident_fraction=for_others), *map(join_in, chips[1:])))


def evaluate_cores(
    cores: Cores,
    step: Step,
    schedule: Schedule,
    accesses: Accesses,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    density: jax.Array,
) -> StepCost:
    """Cost of a step on several cores whose operations run under given mappings.

    Args:
      cores: the cores, from `make_cores`.
      step: the step.
      schedule: from `make_schedule`.
      accesses: counts of its operations under their mappings, each for its core, stacked (n, ...).
      operation_bits: (n, 3), widths of the operands as stored, in the order of `OPERANDS`.
      tensor_bits: (m,), width of each tensor's elements.
      density: (n, 2), share of the products left for the two operands that are read, see `price`.

    Returns:
      The cost, differentiable in every float input. `latency` is the end of the last slot, during which all cores leak;
      `occupancy` what may lie in the shared SRAM at most while a slot runs; `violation` that of each operation on its core.

    Raises:
      ValueError: the schedule is for another number of cores.
    """
    if schedule.num_cores != len(cores.chips):
        raise ValueError(f"expected a schedule for {len(cores.chips)} cores, got one for {schedule.num_cores}")
    resident = residency(step, tensor_bits, cores.resident_bits(), schedule.alive)
    prices = jax.vmap(price, (None, 0, 0, 0, 0, 0))
    operands = step.operations, accesses, operation_bits, density, resident[step.operand_tensor]
    core = schedule.core[step.operation_slot]
    costs = choose_core(core, [prices(chip, *operands) for chip in cores.chips])
    kinds_of_work = (vector_work, step.vector_slot), (transfer_work, step.transfer_slot())
    vector, transfers = (
        choose_core(schedule.core[slot], [work(chip, step, resident, tensor_bits) for chip in cores.chips])
        for work, slot in kinds_of_work
    )
    clock = jnp.stack([chip.frequency() for chip in cores.chips])[core]
    on_memories = (step.multiplicity / clock)[:, None] * costs.level_cycles[:, -2:]
    timing = list_schedule(
        schedule.waits_for,
        slot_sums(step, step.multiplicity * costs.latency, vector.latency, transfers.latency),
        slot_sums(step, on_memories, vector.memory_latency, transfers.memory_latency),
    )
    num_macs = jnp.stack([chip.num_macs() for chip in cores.chips])[core]
    die = Die(cores.chips[0].names, num_macs, cores.area(), cores.leakage_power())
    return total(die, step, costs, (vector, transfers), timing, resident, tensor_bits, schedule.alive)


def choose_core[Tree](core: jax.Array, by_core: Sequence[Tree]) -> Tree:
    """Takes each row from the tree of its core.

    Args:
      core: (k,), core of each row.
      by_core: a pytree for each core, of arrays (k, ...).

    Returns:
      The pytree of arrays (k, ...).
    """
    rows = jnp.arange(core.shape[0], dtype=core.dtype)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[core, rows], *by_core)
