"""What a whole training step or inference costs on one core: its slots one after the other.

With rho = 0 everywhere, a step is the sum of its stand-alone operations and vector work. Steps, tensors and what stays
on chip are in `hw.step`, several cores in `hw.cores`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hw.accesses import Accesses
from hw.chip import Chip
from hw.cost import Cost, check_concrete, port_cycles, price
from hw.explain import step_cost_html
from hw.operation import PASSES
from hw.step import Step, make_step, residency

__all__ = [
    "Die", "Step", "StepCost", "Timing", "Work", "evaluate_step", "join", "make_step", "residency", "slot_sums", "total",
    "transfer_work", "vector_work",
]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepCost:
    """What a step costs on a chip.

    Attributes:
      energy, latency, area: (), joules, seconds, square metres.
      leakage_energy: (), leakage power times latency.
      operation_energy, operation_latency: (n,), all runs of each operation, without leakage.
      mac_energy: (n,), of which in the MAC array.
      access_energy: (n, L, 3), of which in each memory level for each operand.
      compute_cycles: (n,), cycles that the MACs are busy in all runs of each operation.
      level_cycles: (n, L), cycles that each memory level needs for the traffic of all runs of each operation. Where one
        port serves reads and writes (shared SRAM, DRAM), times the level's bits per cycle these are the bits moved.
      vector_energy, vector_latency: (v,), arithmetic, memory and control.
      transfer_energy, transfer_latency: (m,), spills and external data moved between shared SRAM and DRAM.
      slot_start, slot_end: (slots,), seconds from the start of the step. A spill belongs to the last slot of its
        tensor's origin, external data to the first slot that touches them.
      breakdown: (c,), energy of each component; its sum is `energy`.
      components: their c names, static: "mac", the memory levels, "control", "vector" (its arithmetic), "leakage".
      resident: (m,), resident fraction of each tensor.
      spilled_bits: (m,), what does not fit of the tensors kept for the backward pass.
      occupancy: (slots,), bits of shared SRAM that hold resident tensors.
      utilisation: (3,), share of MAC-cycles that do work in each pass, in the order of `PASSES`; 0 for an absent pass.
      violation: (n, V), relative excess of every resource, see `Cost`.
    """

    energy: jax.Array
    latency: jax.Array
    area: jax.Array
    leakage_energy: jax.Array
    operation_energy: jax.Array
    operation_latency: jax.Array
    mac_energy: jax.Array
    access_energy: jax.Array
    compute_cycles: jax.Array
    level_cycles: jax.Array
    vector_energy: jax.Array
    vector_latency: jax.Array
    transfer_energy: jax.Array
    transfer_latency: jax.Array
    slot_start: jax.Array
    slot_end: jax.Array
    breakdown: jax.Array
    resident: jax.Array
    spilled_bits: jax.Array
    occupancy: jax.Array
    utilisation: jax.Array
    violation: jax.Array
    components: tuple[str, ...] = field(metadata={"static": True})

    @property
    def edp(self) -> jax.Array:
        """Energy-delay product, energy times latency, in J s, shape ()."""
        return self.energy * self.latency

    @property
    def power(self) -> jax.Array:
        """Mean power in watts, shape ()."""
        return self.energy / self.latency

    @property
    def dram_energy(self) -> jax.Array:
        """Energy of all DRAM traffic in joules, shape (): operations, vector work, spills and external data."""
        return self.breakdown[..., self.access_energy.shape[-2]]

    def _repr_html_(self) -> str:
        return step_cost_html(self)


def evaluate_step(
    chip: Chip, step: Step, accesses: Accesses, operation_bits: jax.Array, tensor_bits: jax.Array, density: jax.Array
) -> StepCost:
    """Cost of a step whose operations run under given mappings.

    Args:
      chip: the chip.
      step: the step.
      accesses: counts of its operations under their mappings, stacked (n, ...).
      operation_bits: (n, 3), widths of the operands as stored, in the order of `OPERANDS`.
      tensor_bits: (m,), width of each tensor's elements.
      density: (n, 2), share of the products left for the two operands that are read, see `price`.

    Returns:
      The cost, differentiable in every float input.

    Raises:
      ValueError: bits that are not positive, a density outside of [0, 1], or NaN, where they are concrete.
    """
    check_concrete(bits=operation_bits, density=density)
    check_concrete(bits=tensor_bits)
    resident = residency(step, tensor_bits, chip.size_bits[-2] * chip.resident_fraction)
    prices = jax.vmap(price, (None, 0, 0, 0, 0, 0))
    costs = prices(chip, step.operations, accesses, operation_bits, density, resident[step.operand_tensor])
    return join(chip, step, costs, resident, tensor_bits)


def join(chip: Chip, step: Step, costs: Cost, resident: jax.Array, tensor_bits: jax.Array) -> StepCost:
    """Cost of a step from the costs of its operations.

    Slots run one after the other, so latencies add up; leakage runs through all of it.

    Args:
      chip: the chip.
      step: the step.
      costs: of its operations, stacked (n, ...), priced at the resident fractions of their operands.
      resident: (m,), from `residency`.
      tensor_bits: (m,), width of each tensor's elements.

    Returns:
      The cost, differentiable in every float input.
    """
    work = vector_work(chip, step, resident, tensor_bits), transfer_work(chip, step, resident, tensor_bits)
    latencies = step.multiplicity * costs.latency, work[0].latency, work[1].latency
    duration = slot_sums(step, *latencies)
    end = jnp.cumsum(duration)
    operations, vector, transfers = map(jnp.sum, latencies)
    timing = Timing(end - duration, end, operations + vector + transfers)
    die = Die(chip.names, chip.num_macs(), chip.area().total, chip.leakage_power())
    return total(die, step, costs, work, timing, resident, tensor_bits, step.alive())


class Die(NamedTuple):
    """What all cores together are: names of the memory levels, MACs that serve each operation, () or (n,), area and
    leakage power, ()."""

    names: tuple[str, ...]
    num_macs: jax.Array
    area: jax.Array
    leakage_power: jax.Array


class Timing(NamedTuple):
    """When slots run: start and end (slots,), and the latency of the step, (), in seconds."""

    start: jax.Array
    end: jax.Array
    latency: jax.Array


class Work(NamedTuple):
    """Work outside the MAC array: joules of arithmetic, (k,), of (shared SRAM, DRAM) accesses, (k, 2), and of control,
    (k,); seconds that it takes, (k,), and that it occupies (shared SRAM, DRAM), (k, 2)."""

    arithmetic: jax.Array
    access: jax.Array
    control: jax.Array
    latency: jax.Array
    memory_latency: jax.Array

    @property
    def energy(self) -> jax.Array:
        return self.arithmetic + jnp.sum(self.access, axis=-1) + self.control


def total(
    die: Die,
    step: Step,
    costs: Cost,
    work: tuple[Work, Work],
    timing: Timing,
    resident: jax.Array,
    tensor_bits: jax.Array,
    alive: jax.Array,
) -> StepCost:
    """Cost of a step from those of its parts, however they were scheduled.

    Args:
      die: all cores.
      step: the step.
      costs: of its operations on their cores, stacked (n, ...).
      work: vector work and transfers.
      timing: when slots run.
      resident: (m,), from `residency`.
      tensor_bits: (m,), width of each tensor's elements.
      alive: (m, slots), which tensors may live while a slot runs.

    Returns:
      The cost, differentiable in every float input.
    """
    times, (vector, transfers) = step.multiplicity, work
    operation_energy = times * costs.energy
    mac_energy, access_energy = times * costs.mac_energy, times[:, None, None] * costs.access_energy
    leakage_energy = die.leakage_power * timing.latency
    levels = jnp.sum(access_energy, axis=(0, 2)).at[-2:].add(jnp.sum(vector.access, 0) + jnp.sum(transfers.access, 0))
    control = jnp.sum(times * costs.control_energy) + jnp.sum(vector.control) + jnp.sum(transfers.control)
    breakdown = [jnp.sum(mac_energy)[None], levels, jnp.stack([control, jnp.sum(vector.arithmetic), leakage_energy])]
    size = step.tensor_elements * tensor_bits
    return StepCost(
        energy=jnp.sum(operation_energy) + jnp.sum(vector.energy) + jnp.sum(transfers.energy) + leakage_energy,
        latency=timing.latency,
        area=die.area,
        leakage_energy=leakage_energy,
        operation_energy=operation_energy,
        operation_latency=times * costs.latency,
        mac_energy=mac_energy,
        access_energy=access_energy,
        compute_cycles=times * costs.compute_cycles,
        level_cycles=times[:, None] * costs.level_cycles,
        vector_energy=vector.energy,
        vector_latency=vector.latency,
        transfer_energy=transfers.energy,
        transfer_latency=transfers.latency,
        slot_start=timing.start,
        slot_end=timing.end,
        breakdown=jnp.concatenate(breakdown),
        resident=resident,
        spilled_bits=jnp.where(step.used() & step.is_copy(), (1.0 - resident) * size, 0.0),
        occupancy=jnp.sum(jnp.where(alive, (resident * size)[:, None], 0.0), axis=0),
        utilisation=_utilisation(die.num_macs, step, costs),
        violation=costs.violation,
        components=("mac", *die.names, "control", "vector", "leakage"),
    )


def vector_work(chip: Chip, step: Step, resident: jax.Array, tensor_bits: jax.Array) -> Work:
    """Vector work, (v,): on what is resident in the shared SRAM, with the rest streamed from and to DRAM.

    Args:
      chip: the core whose vector unit does it.
      step: the step.
      resident: (m,), from `residency`.
      tensor_bits: (m,), width of each tensor's elements.
    """
    split = jnp.stack([resident, 1.0 - resident], axis=-1) * tensor_bits[:, None]  # (m, 2)
    read, written = step.vector_reads @ split, step.vector_writes @ split  # (v, 2)
    read_energy, write_energy = (chip.energy_per_bit() + chip.wire_energy_per_bit()[:, None])[-2:].T
    inner = jnp.zeros((read.shape[0], len(chip.names) - 2), read.dtype)
    at_levels = [jnp.concatenate([inner, bits], axis=1) for bits in (read, written)]
    level_cycles = jax.vmap(port_cycles, (None, 0, 0))(chip, *at_levels)
    cycles = jnp.maximum(step.vector_ops / chip.vector_lanes, jnp.max(level_cycles, axis=1))
    arithmetic = step.vector_ops * chip.vector_energy()
    access = read * read_energy[None] + written * write_energy[None]
    control = _control_share(chip) * (arithmetic + access[:, 0])
    return Work(arithmetic, access, control, cycles / chip.frequency(), level_cycles[:, -2:] / chip.frequency())


def transfer_work(chip: Chip, step: Step, resident: jax.Array, tensor_bits: jax.Array) -> Work:
    """Moves between shared SRAM and DRAM beside what slots read and write, (m,): spills, resident external data.

    The directions are not told apart: an access is priced as the mean of a read and a write.

    Args:
      chip: the core that moves them.
      step: the step.
      resident: (m,), from `residency`.
      tensor_bits: (m,), width of each tensor's elements.
    """
    size = step.tensor_elements * tensor_bits
    spilled = jnp.maximum(resident[step.tensor_origin] - resident, 0.0)
    share = step.tensor_multiplicity * (spilled + step.tensor_external * resident)
    moved = jnp.where(step.used(), share * size, 0.0)
    per_bit = jnp.mean(chip.energy_per_bit()[-2:], axis=-1).at[-1].add(chip.wire_energy_per_bit()[-1])
    access = moved[:, None] * per_bit[None]
    bandwidth = chip.bits_per_cycle()[-2:]
    latency = moved / jnp.min(bandwidth) / chip.frequency()
    memory_latency = moved[:, None] / bandwidth[None] / chip.frequency()
    return Work(jnp.zeros_like(moved), access, _control_share(chip) * access[:, 0], latency, memory_latency)


def slot_sums(step: Step, operations: jax.Array, vector: jax.Array, transfers: jax.Array) -> jax.Array:
    """Sums over what each slot does: (n, ...) of operations, (v, ...) of vector work, (m, ...) of transfers.

    Returns:
      (slots, ...).
    """
    zeros = jnp.zeros((step.num_slots, *operations.shape[1:]), operations.dtype)
    done = zeros.at[step.operation_slot].add(operations).at[step.vector_slot].add(vector)
    return done.at[step.transfer_slot()].add(transfers)


def _control_share(chip: Chip) -> jax.Array:
    """Clock tree and control, per joule spent elsewhere on the chip."""
    return chip.technology["clock.energy"] + chip.technology["control.energy"]


def _utilisation(num_macs: jax.Array, step: Step, costs: Cost) -> jax.Array:
    """Busy cycles of all MACs over those there are in each pass, (3,)."""
    in_pass = step.operation_pass[:, None] == jnp.arange(len(PASSES), dtype=jnp.int32)[None]
    times = jnp.where(in_pass, step.multiplicity[:, None], 0.0)
    busy, available = costs.mac_cycles @ times, (costs.cycles * num_macs) @ times
    present = available > 0.0
    return jnp.where(present, busy / jnp.where(present, available, 1.0), 0.0)
