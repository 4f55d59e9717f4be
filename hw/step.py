"""A training step or inference as data: operations and vector work in order, the tensors between them, their lives.

A step is a list of *slots*; each is an operation on the MAC array or work of the vector unit (element-wise chains,
normalisation, pooling, optimiser). Tensors join them. Each tensor has a resident fraction rho of its bits in the shared
SRAM (level L-2) from its birth to its death: that share costs no DRAM traffic in the slots that write and read it.

What the backward pass needs again is a tensor of its own, the *kept copy*: it goes on holding the data of its origin
from the origin's death to its last reader. So data may be on chip while the forward pass runs and then *spill*: the
share that is resident in the origin but no longer in the copy is written to DRAM once, and its reader fetches it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      tensor_multiplicity: (m,), how often the data of each tensor are new: what spills or is external moves as often.
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
    tensor_multiplicity: jax.Array
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

    def used(self) -> jax.Array:
        """Which tensors some slot touches, shape (m,), bool."""
        return self.tensor_death >= self.tensor_birth

    def is_copy(self) -> jax.Array:
        """Which tensors are kept copies, shape (m,), bool."""
        return self.tensor_origin != jnp.arange(self.tensor_origin.shape[0], dtype=jnp.int32)

    def transfer_slot(self) -> jax.Array:
        """Slot with which each tensor moves between shared SRAM and DRAM, shape (m,).

        A kept copy spills at the end of the last slot of its origin, external data come or go with the first slot that
        touches them.
        """
        return jnp.where(self.is_copy(), self.tensor_death[self.tensor_origin], self.tensor_birth)


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
    tensor_multiplicity: Sequence[float] | None = None,
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
      persistent, origin, external, tensor_multiplicity: (m,); by default False, the tensor itself, 0, 1.
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
    _check_tensors(operands, origins, np.asarray(tensor_elements))
    touched = np.zeros((n + v, m), bool)
    touched[slots[:, None], operands] = True
    touched[work_slots] = (reads > 0) | (writes > 0)
    birth, death = _lifetimes(touched, np.zeros(m, bool) if persistent is None else np.asarray(persistent), origins)
    integers = {
        "operation_slot": slots,
        "operation_pass": _passes(operations) if operation_pass is None else operation_pass,
        "operand_tensor": operands,
        "tensor_birth": birth,
        "tensor_death": death,
        "tensor_origin": origins,
        "vector_slot": work_slots,
    }
    numbers = {
        "multiplicity": np.ones(n) if multiplicity is None else multiplicity,
        "tensor_elements": tensor_elements,
        "tensor_external": np.zeros(m) if external is None else external,
        "tensor_multiplicity": np.ones(m) if tensor_multiplicity is None else tensor_multiplicity,
        "vector_ops": vector_ops,
        "vector_reads": reads,
        "vector_writes": writes,
    }
    return Step(operations, **_placed(integers, jnp.int32), **_placed(numbers, jnp.result_type(float)))


def _check_tensors(operands: np.ndarray, origins: np.ndarray, elements: np.ndarray) -> None:
    """That the tensors named exist and have elements."""
    if not {*operands.flat, *origins} <= {*range(len(elements))}:
        known = f"tensor ids from 0 to {len(elements) - 1}"
        raise ValueError(f"expected {known}, got operands {operands.tolist()}, origins {origins}")
    if not np.all(np.isfinite(elements) & (elements > 0)):
        raise ValueError(f"expected tensors of one element or more, got {elements.tolist()}")


def _passes(operations: Operation) -> np.ndarray:
    """Index into `PASSES` of the pass whose operand each operation accumulates, (n,)."""
    columns = [OPERANDS.index(operand) for operand in PASSES.values()]
    return np.asarray(operations.accumulated)[:, columns].argmax(axis=1)


def padded(step: Step, like: Step) -> Step:
    """A step with the shapes of another, so that one compiled function costs both: what is added never runs.

    Args:
      step: with n operations and v pieces of vector work.
      like: over the same m tensors, with as many operations and as much vector work, or more.

    Returns:
      `step`, then operations n and up of `like` with multiplicity 0 and vector work on nothing, in slots after its last.

    Raises:
      ValueError: `like` has fewer operations, less vector work or other tensors.
    """
    (n, v), (rows, pieces) = ((len(s.operation_slot), len(s.vector_slot)) for s in (step, like))
    m = len(step.tensor_elements)
    if rows < n or pieces < v or len(like.tensor_elements) != m:
        raise ValueError(
            f"expected a step like another of at least {n} operations, {v} pieces of vector work and {m} tensors, got "
            f"{rows}, {pieces} and {len(like.tensor_elements)}"
        )
    first = step.num_slots
    slots = np.arange(first, first + rows - n + pieces - v, dtype=np.int32)
    added = {
        "operations": jax.tree.map(lambda x: x[n:], jax.device_get(like.operations)),
        "operation_slot": slots[: rows - n],
        "operation_pass": np.asarray(like.operation_pass)[n:],
        "multiplicity": np.zeros(rows - n),
        "operand_tensor": np.asarray(like.operand_tensor)[n:],
        "vector_slot": slots[rows - n :],
        "vector_ops": np.zeros(pieces - v),
        "vector_reads": np.zeros((pieces - v, m)),
        "vector_writes": np.zeros((pieces - v, m)),
    }

    def append(own: Any, more: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.asarray(np.concatenate([a, b]), a.dtype), own, more)

    return replace(step, **{name: append(getattr(step, name), more) for name, more in added.items()})


def _placed(values: dict[str, Any], dtype: Any) -> dict[str, jax.Array]:
    """Arrays of a type on the device, converted before: there, every shape would be a program to compile."""
    return jax.device_put({name: np.asarray(value, dtype) for name, value in values.items()})


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


def residency(
    step: Step, tensor_bits: jax.Array, capacity_bits: jax.Array, alive: jax.Array | None = None
) -> jax.Array:
    """Which share of each tensor stays in the shared SRAM.

    Greedy, shortest life first, each tensor as far as it fits through its whole life: rho = clip(min of the free
    capacity / bits of the tensor, 0, 1). Lives of what is kept from forward to backward are nested, so this is last in,
    first out: the last layers, needed first in the backward pass, stay, the first ones spill. What persists through the
    step comes last.

    Args:
      step: the step.
      tensor_bits: (m,), width of each tensor's elements in bits, > 0.
      capacity_bits: (), shared SRAM for resident tensors in bits.
      alive: (m, slots) bool, which tensors may live while a slot runs; by default `Step.alive`, slots in turn.

    Returns:
      Resident fractions (m,) in [0, 1], differentiable almost everywhere in `tensor_bits` and `capacity_bits`.
    """
    sizes = step.tensor_elements * tensor_bits
    alive = step.alive() if alive is None else alive
    order = jnp.argsort(jnp.sum(alive, axis=1), stable=True)

    def place(occupied: jax.Array, tensor: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        size, lives = tensor
        free = jnp.min(jnp.where(lives, capacity_bits - occupied, capacity_bits))
        share = jnp.clip(free / size, 0.0, 1.0)
        return occupied + jnp.where(lives, share * size, 0.0), share

    occupied = jnp.zeros(step.num_slots, sizes.dtype)
    _, shares = jax.lax.scan(place, occupied, (sizes[order], alive[order]))
    return jnp.zeros_like(shares).at[order].set(shares)
