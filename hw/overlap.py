"""Which core runs each slot of a step, which slot waits for which, and when they then run.

A slot starts as soon as its core is free and what it reads is there: slots overlap wherever nothing forbids it. The
shared memories serve slots in the order in which those start, so that no bandwidth is used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from hw.operation import PASSES
from hw.schedule import Timing
from hw.step import Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """Which core runs each slot of a step and what it waits for; data, so that `vmap` runs over assignments.

    Attributes:
      core: (slots,) int32.
      waits_for: (slots, slots) bool, [j, i]: slot j starts after slot i has ended, i < j.
      alive: (m, slots) bool, tensors that may live while a slot runs, however long each slot takes.
      num_cores: number of cores, static.
    """

    core: jax.Array
    waits_for: jax.Array
    alive: jax.Array
    num_cores: int = field(metadata={"static": True})


def assign_passes(
    step: Step, *, forward: int = 0, input_grad: int = 0, weight_grad: int = 0, vector: int = 0
) -> np.ndarray:
    """Assigns operations to cores by their pass, and all vector work to one.

    Args:
      step: the step, concrete.
      forward, input_grad, weight_grad, vector: core of each.

    Returns:
      The core of each slot, (slots,), for `make_schedule`.
    """
    core = np.full(step.num_slots, vector)
    core_of_pass = {"forward": forward, "input_grad": input_grad, "weight_grad": weight_grad}
    core[np.asarray(step.operation_slot)] = np.array([core_of_pass[name] for name in PASSES])[step.operation_pass]
    return core


def make_schedule(
    step: Step,
    core: Sequence[int] | np.ndarray,
    num_cores: int,
    queue: Sequence[int] | np.ndarray | None = None,
) -> Schedule:
    """Works out what each slot waits for, and which tensors may then live at the same time.

    A slot waits for those before it that write what it reads or writes, or read what it writes, kept copies and their
    origins being the same data; and for those before it in its queue.

    Args:
      step: the step, concrete.
      core: (slots,), core that runs each slot, numbered from 0.
      num_cores: number of cores.
      queue: (slots,), slots of one queue never overlap. By default a queue for each core. With one queue for all nothing
        overlaps; with one for the array and one for the vector unit of a core these two do.

    Raises:
      ValueError: `core` or `queue` is no integer for each slot; a core is not one of `num_cores`; the operations of a core,
        or its vector work, are in several queues.
    """
    queue = core if queue is None else queue
    for name, numbers in (("core", core), ("queue", queue)):
        if np.shape(numbers) != (step.num_slots,) or np.asarray(numbers).dtype.kind not in "iu":
            raise ValueError(f"expected {name} to be {step.num_slots} integers, one for each slot, got {numbers}")
    if not (np.min(core) >= 0 and np.max(core) < num_cores):
        raise ValueError(f"expected cores from 0 to {num_cores - 1}, got {np.min(core)} to {np.max(core)}")
    for slots in (np.asarray(step.operation_slot), np.asarray(step.vector_slot)):
        pairs = {(int(core[slot]), int(queue[slot])) for slot in slots}
        if len(pairs) > len({unit for unit, _ in pairs}):
            raise ValueError(f"expected one queue for each array and vector unit, got (core, queue) {sorted(pairs)}")
    reads, writes = _accesses_by_slot(step)
    data = np.asarray(step.tensor_origin)[:, None] == np.arange(len(step.tensor_origin))[None]
    data_reads, data_writes = reads @ data, writes @ data
    conflicts = (data_reads @ data_writes.T) | (data_writes @ data_reads.T) | (data_writes @ data_writes.T)
    in_queue = np.equal.outer(queue, queue)
    waits_for = np.tril(conflicts | in_queue, -1)
    return Schedule(
        core=jnp.asarray(core, jnp.int32),
        waits_for=jnp.asarray(waits_for),
        alive=jnp.asarray(_possible_lives(step, reads | writes, waits_for)),
        num_cores=num_cores,
    )


def _accesses_by_slot(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Which tensors each slot reads and writes, each (slots, m)."""
    reads, writes = np.zeros((2, step.num_slots, len(step.tensor_elements)), bool)
    work = np.asarray(step.vector_slot)
    reads[work], writes[work] = np.asarray(step.vector_reads) > 0, np.asarray(step.vector_writes) > 0
    accumulated = np.asarray(step.operations.accumulated) > 0
    for slot, tensors, is_sum in zip(
        *map(np.asarray, (step.operation_slot, step.operand_tensor, accumulated)), strict=True
    ):
        reads[slot, tensors[~is_sum]] = True
        writes[slot, tensors[is_sum]] = True
    return reads, writes


def _possible_lives(step: Step, touched: np.ndarray, waits_for: np.ndarray) -> np.ndarray:
    """Tensors (m, slots) of which some slot may have begun, and not all have ended, when a slot runs."""
    before = waits_for
    while (further := before | before @ before).sum() > before.sum():  # transitive closure
        before = further

    def alive(touched: np.ndarray) -> np.ndarray:
        unfinished, begun = touched.T @ ~before.T, touched.T @ ~before
        return unfinished & begun

    lives = alive(touched)
    origin, is_copy = np.asarray(step.tensor_origin), np.asarray(step.is_copy() & step.used())
    copies = alive(touched | touched[:, origin]) & ~lives[origin]
    lives[is_copy] = copies[is_copy]
    persistent = (np.asarray(step.tensor_birth) == 0) & (np.asarray(step.tensor_death) == step.num_slots - 1)
    lives[persistent] = True
    return lives


def list_schedule(waits_for: jax.Array, duration: jax.Array, memory_latency: jax.Array) -> Timing:
    """When slots run that start as soon as they may, on shared memories that serve them first come, first served.

    A slot that starts at s asks each memory for its seconds there at once; the memory grants them when those who asked
    before have had theirs. It ends when its duration is over and all memories have served it. The last end is therefore
    no earlier than the longest chain of slots, and than what any memory has to serve. With one queue it is the sum of
    durations, and no overlap is slower than that. Between two schedules that both overlap, fewer constraints may cost
    time where memories are contended, as in any list schedule.

    Source: Graham, SIAM J. Appl. Math. 17(2), 1969, for the anomalies of list schedules.

    Args:
      waits_for: (slots, slots) bool, [j, i]: slot j starts after slot i has ended, i < j.
      duration: (slots,), seconds that each slot takes if no other is there.
      memory_latency: (slots, r), seconds of it that each of r shared memories is busy for it, at most its duration.

    Returns:
      The timing, differentiable in both where no two events coincide. Of slots that may start at the same time the first
      of the step does.
    """
    num_slots = duration.shape[0]

    def start_next(state: tuple, _: None) -> tuple[tuple, tuple]:
        ready, missing, free = state
        slot = jnp.argmin(jnp.where(missing == 0, ready, jnp.inf))
        start, asked = ready[slot], memory_latency[slot]
        served = jnp.where(asked > 0.0, jnp.maximum(start, free) + asked, start)
        end = jnp.maximum(start + duration[slot], jnp.max(served))
        waiting = waits_for[:, slot]
        missing = jnp.where(waiting, missing - 1, missing).at[slot].set(num_slots)  # no slot starts twice
        ready = jnp.where(waiting, jnp.maximum(ready, end), ready)
        return (ready, missing, jnp.maximum(free, served)), (slot, start, end)

    missing = jnp.sum(waits_for, axis=1, dtype=jnp.int32)
    state = jnp.zeros_like(duration), missing, jnp.zeros_like(memory_latency[0])
    _, (order, start, end) = jax.lax.scan(start_next, state, length=num_slots)
    times = jnp.zeros((2, num_slots), duration.dtype).at[:, order].set(jnp.stack([start, end]))
    return Timing(times[0], times[1], jnp.max(end))
