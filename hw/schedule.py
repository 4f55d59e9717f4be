"""A whole training step or inference: work in order, what stays on chip between operations, and what it all costs.

A step is a list of *slots*, run one after the other; each is an operation on the MAC array or work of the vector unit
(element-wise chains, normalisation, pooling, optimiser). Tensors join them. Each tensor has a resident fraction rho of
its bits in the shared SRAM (level L-2) from its birth to its death: that share costs no DRAM traffic in the slots that
write and read it. With rho = 0 everywhere, a step is the sum of its stand-alone operations and vector work.

What the backward pass needs again is a tensor of its own, the *kept copy*: it goes on holding the data of its origin
from the origin's death to its last reader. So data may be on chip while the forward pass runs and then *spill*: the
share that is resident in the origin but no longer in the copy is written to DRAM once, and its reader fetches it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hw.accesses import Accesses
from hw.chip import Chip
from hw.cost import Cost, port_cycles, price
from hw.operation import OPERANDS, PASSES, Operation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """Operations, vector work and tensors of one training step or inference.

    Slots number operations and vector work together in order of execution, 0 to n + v - 1.

    Attributes:
      operations: stacked, (n, ...).
      operation_slot: (n,) int32.
      operation_pass: (n,) int32, index into `PASSES`.
      multiplicity: (n,), how often each operation runs.
      operand_tensor: (n, 3) int32, tensor of each operand in the order of `OPERANDS`.
      tensor_elements: (m,).
      tensor_birth, tensor_death: (m,) int32, first and last slot of its life, both included; death < birth: unused.
      tensor_origin: (m,) int32, tensor whose data it goes on holding; itself where its data are new.
      tensor_external: (m,), 1 where data cross the chip's boundary even if resident (the batch, the result), else 0.
      vector_slot: (v,) int32.
      vector_ops: (v,), operations on single elements.
      vector_reads, vector_writes: (v, m), elements of each tensor that are read and written.
    """

    operations: Operation
    operation_slot: jax.Array
    operation_pass: jax.Array
    multiplicity: jax.Array
    operand_tensor: jax.Array
    tensor_elements: jax.Array
    tensor_birth: jax.Array
    tensor_death: jax.Array
    tensor_origin: jax.Array
    tensor_external: jax.Array
    vector_slot: jax.Array
    vector_ops: jax.Array
    vector_reads: jax.Array
    vector_writes: jax.Array

    @property
    def num_slots(self) -> int:
        """Operations and vector work together."""
        return self.operation_slot.shape[0] + self.vector_slot.shape[0]

    def alive(self) -> jax.Array:
        """Which tensors live in which slots, shape (m, slots), bool."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)[None]
        return (slots >= self.tensor_birth[:, None]) & (slots <= self.tensor_death[:, None])


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
      vector_energy, vector_latency: (v,), arithmetic, memory and control.
      transfer_energy, transfer_latency: (m,), spills and external data moved between shared SRAM and DRAM.
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
    vector_energy: jax.Array
    vector_latency: jax.Array
    transfer_energy: jax.Array
    transfer_latency: jax.Array
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


def make_step(
    operations: Operation,
    operand_tensor: Sequence[Sequence[int]],
    tensor_elements: Sequence[float],
    *,
    operation_slot: Sequence[int] | None = None,
    operation_pass: Sequence[int] | None = None,
    multiplicity: Sequence[float] | None = None,
    persistent: Sequence[bool] | None = None,
    origin: Sequence[int] | None = None,
    external: Sequence[float] | None = None,
    vector_slot: Sequence[int] = (),
    vector_ops: Sequence[float] = (),
    vector_reads: Sequence[Sequence[float]] | np.ndarray = (),
    vector_writes: Sequence[Sequence[float]] | np.ndarray = (),
) -> Step:
    """Builds a step and works out when its tensors live.

    A tensor lives from the first to the last slot that touches it; a persistent one (weights, optimiser state), if it
    is touched at all, through the whole step; a kept copy from the slot after the death of its origin.

    Args:
      operations: stacked, n of them.
      operand_tensor: (n, 3) tensor ids.
      tensor_elements: (m,), > 0.
      operation_slot: (n,); by default 0 to n - 1.
      operation_pass: (n,), indices into `PASSES`; by default the pass whose operand is accumulated.
      multiplicity: (n,), by default 1.
      persistent, origin, external: (m,); by default False, the tensor itself, 0.
      vector_slot, vector_ops, vector_reads, vector_writes: (v,), (v,), (v, m), (v, m); by default no vector work.

    Returns:
      The step; integers as int32, all else in JAX's default float type.

    Raises:
      ValueError: no operation; operands for another number of operations; slots that are not 0 to n + v - 1, each once;
        unknown tensor ids; a tensor without elements; a kept copy that is needed before its origin has died.
    """
    n, m, v = len(operand_tensor), len(tensor_elements), len(vector_slot)
    slots = np.arange(n) if operation_slot is None else np.asarray(operation_slot)
    work_slots = np.asarray(vector_slot, np.int64)
    operands = np.asarray(operand_tensor, np.int64).reshape(n, 3)
    origins = np.arange(m) if origin is None else np.asarray(origin)
    reads, writes = (np.asarray(x, np.float64).reshape(v, m) for x in (vector_reads, vector_writes))
    if n == 0 or operations.bounds.shape[0] != n:
        raise ValueError(f"expected operations with operands for each, got {operations.bounds.shape[0]} and {n}")
    if sorted([*slots, *work_slots]) != list(range(n + v)):
        raise ValueError(f"expected every slot from 0 to {n + v - 1} once, got {sorted([*slots, *work_slots])}")
    if not {*operands.flat, *origins} <= {*range(m)}:
        raise ValueError(f"expected tensor ids from 0 to {m - 1}, got operands {operands.tolist()}, origins {origins}")
    if min(tensor_elements) <= 0:
        raise ValueError(f"expected tensors of one element or more, got {min(tensor_elements)}")

    touched = np.zeros((n + v, m), bool)
    touched[slots[:, None], operands] = True
    touched[work_slots] = (reads > 0) | (writes > 0)
    birth, death = _lifetimes(touched, np.zeros(m, bool) if persistent is None else np.asarray(persistent), origins)
    pass_names = [OPERANDS.index(operand) for operand in PASSES.values()]
    default_pass = np.asarray(operations.accumulated)[:, pass_names].argmax(axis=1)
    return Step(
        operations=operations,
        operation_slot=jnp.asarray(slots, jnp.int32),
        operation_pass=jnp.asarray(default_pass if operation_pass is None else operation_pass, jnp.int32),
        multiplicity=_floats(np.ones(n) if multiplicity is None else multiplicity),
        operand_tensor=jnp.asarray(operands, jnp.int32),
        tensor_elements=_floats(tensor_elements),
        tensor_birth=jnp.asarray(birth, jnp.int32),
        tensor_death=jnp.asarray(death, jnp.int32),
        tensor_origin=jnp.asarray(origins, jnp.int32),
        tensor_external=_floats(np.zeros(m) if external is None else external),
        vector_slot=jnp.asarray(work_slots, jnp.int32),
        vector_ops=_floats(vector_ops),
        vector_reads=_floats(reads),
        vector_writes=_floats(writes),
    )


def _floats(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.result_type(float))


def _lifetimes(touched: np.ndarray, persistent: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last slot (m,) of each tensor's life, from the slots (slots, m) that touch it."""
    used = touched.any(0)
    last = touched.shape[0] - 1
    birth = np.where(persistent, 0, touched.argmax(0))
    death = np.where(persistent, last, last - touched[::-1].argmax(0))
    copy = origin != np.arange(len(origin))
    if (copy & used & (birth <= death[origin])).any():
        early = np.flatnonzero(copy & used & (birth <= death[origin]))[0]
        raise ValueError(f"expected kept copy {early} to be read after slot {death[origin[early]]}, got {birth[early]}")
    birth = np.where(copy, death[origin] + 1, birth)
    return np.where(used, birth, 0), np.where(used, death, -1)


def residency(step: Step, tensor_bits: jax.Array, capacity_bits: jax.Array) -> jax.Array:
    """Which share of each tensor stays in the shared SRAM.

    Greedy, shortest life first, each tensor as far as it fits through its whole life: rho = clip(min of the free
    capacity / bits of the tensor, 0, 1). Lives of what is kept from forward to backward are nested, so this is last in,
    first out: the last layers, needed first in the backward pass, stay, the first ones spill. What persists through the
    step comes last.

    Args:
      step: the step.
      tensor_bits: (m,), width of each tensor's elements in bits, > 0.
      capacity_bits: (), shared SRAM for resident tensors in bits.

    Returns:
      Resident fractions (m,) in [0, 1], differentiable almost everywhere in `tensor_bits` and `capacity_bits`.
    """
    sizes = step.tensor_elements * tensor_bits
    order = jnp.argsort(step.tensor_death - step.tensor_birth, stable=True)

    def place(occupied: jax.Array, tensor: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        size, alive = tensor
        free = jnp.min(jnp.where(alive, capacity_bits - occupied, capacity_bits))
        share = jnp.clip(free / size, 0.0, 1.0)
        return occupied + jnp.where(alive, share * size, 0.0), share

    occupied = jnp.zeros(step.num_slots, sizes.dtype)
    _, shares = jax.lax.scan(place, occupied, (sizes[order], step.alive()[order]))
    return jnp.zeros_like(shares).at[order].set(shares)


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
    """
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
    times = step.multiplicity
    operation_energy, operation_latency = times * costs.energy, times * costs.latency
    mac_energy, access_energy = times * costs.mac_energy, times[:, None, None] * costs.access_energy
    vector, transfers = _vector_work(chip, step, resident, tensor_bits), _transfers(chip, step, resident, tensor_bits)
    latency = jnp.sum(operation_latency) + jnp.sum(vector.latency) + jnp.sum(transfers.latency)
    leakage_energy = chip.leakage_power() * latency
    levels = jnp.sum(access_energy, axis=(0, 2)).at[-2:].add(jnp.sum(vector.access, 0) + jnp.sum(transfers.access, 0))
    control = jnp.sum(times * costs.control_energy) + jnp.sum(vector.control) + jnp.sum(transfers.control)
    breakdown = [jnp.sum(mac_energy)[None], levels, jnp.stack([control, jnp.sum(vector.arithmetic), leakage_energy])]
    size, alive = step.tensor_elements * tensor_bits, step.alive()
    kept = jnp.any(alive, axis=1) & (step.tensor_origin != jnp.arange(size.shape[0], dtype=jnp.int32))
    return StepCost(
        energy=jnp.sum(operation_energy) + jnp.sum(vector.energy) + jnp.sum(transfers.energy) + leakage_energy,
        latency=latency,
        area=chip.area().total,
        leakage_energy=leakage_energy,
        operation_energy=operation_energy,
        operation_latency=operation_latency,
        mac_energy=mac_energy,
        access_energy=access_energy,
        vector_energy=vector.energy,
        vector_latency=vector.latency,
        transfer_energy=transfers.energy,
        transfer_latency=transfers.latency,
        breakdown=jnp.concatenate(breakdown),
        resident=resident,
        spilled_bits=jnp.where(kept, (1.0 - resident) * size, 0.0),
        occupancy=jnp.sum(jnp.where(alive, (resident * size)[:, None], 0.0), axis=0),
        utilisation=_utilisation(chip, step, costs),
        violation=costs.violation,
        components=("mac", *chip.names, "control", "vector", "leakage"),
    )


class _Work(NamedTuple):
    """Work outside the MAC array: energy (k,) of arithmetic, (k, 2) of (shared SRAM, DRAM) accesses; latency (k,)."""

    arithmetic: jax.Array
    access: jax.Array
    control: jax.Array
    latency: jax.Array

    @property
    def energy(self) -> jax.Array:
        return self.arithmetic + jnp.sum(self.access, axis=-1) + self.control


def _vector_work(chip: Chip, step: Step, resident: jax.Array, tensor_bits: jax.Array) -> _Work:
    """Vector work, (v,): on what is resident in the shared SRAM, with the rest streamed from and to DRAM."""
    split = jnp.stack([resident, 1.0 - resident], axis=-1) * tensor_bits[:, None]  # (m, 2)
    read, written = step.vector_reads @ split, step.vector_writes @ split  # (v, 2)
    read_energy, write_energy = (chip.energy_per_bit() + chip.wire_energy_per_bit()[:, None])[-2:].T
    inner = jnp.zeros((read.shape[0], len(chip.names) - 2), read.dtype)
    at_levels = [jnp.concatenate([inner, bits], axis=1) for bits in (read, written)]
    level_cycles = jax.vmap(port_cycles, (None, 0, 0))(chip, *at_levels)
    cycles = jnp.maximum(step.vector_ops / chip.vector_lanes, jnp.max(level_cycles, axis=1))
    arithmetic = step.vector_ops * chip.vector_energy()
    access = read * read_energy[None] + written * write_energy[None]
    return _Work(arithmetic, access, _control_share(chip) * (arithmetic + access[:, 0]), cycles / chip.frequency())


def _transfers(chip: Chip, step: Step, resident: jax.Array, tensor_bits: jax.Array) -> _Work:
    """Moves between shared SRAM and DRAM outside of any slot, (m,): spills and the resident share of external data.

    The directions are not told apart: an access is priced as the mean of a read and a write.
    """
    size = step.tensor_elements * tensor_bits
    used = step.tensor_death >= step.tensor_birth
    spilled = jnp.maximum(resident[step.tensor_origin] - resident, 0.0)
    moved = jnp.where(used, (spilled + step.tensor_external * resident) * size, 0.0)
    per_bit = jnp.mean(chip.energy_per_bit()[-2:], axis=-1).at[-1].add(chip.wire_energy_per_bit()[-1])
    access = moved[:, None] * per_bit[None]
    latency = moved / jnp.min(chip.bits_per_cycle()[-2:]) / chip.frequency()
    return _Work(jnp.zeros_like(moved), access, _control_share(chip) * access[:, 0], latency)


def _control_share(chip: Chip) -> jax.Array:
    """Clock tree and control, per joule spent elsewhere on the chip."""
    return chip.technology["clock.energy"] + chip.technology["control.energy"]


def _utilisation(chip: Chip, step: Step, costs: Cost) -> jax.Array:
    """Busy cycles of all MACs over those there are in each pass, (3,)."""
    in_pass = step.operation_pass[:, None] == jnp.arange(len(PASSES), dtype=jnp.int32)[None]
    times = jnp.where(in_pass, step.multiplicity[:, None], 0.0)
    busy, available = costs.mac_cycles @ times, costs.cycles @ times * chip.num_macs()
    present = available > 0.0
    return jnp.where(present, busy / jnp.where(present, available, 1.0), 0.0)
