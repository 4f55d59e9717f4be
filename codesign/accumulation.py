"""Gradient accumulation: the passes run once for each micro-batch, and the update once for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from codesign.passes import ProductSlot, Slot, VectorSlot
from codesign.tensors import Tensor


def accumulate(
    slots: Sequence[Slot], tensors: Sequence[Tensor], micro_batches: int
) -> tuple[list[Slot], list[Tensor], list[int]]:
    """Turns the slots of a training step on one micro-batch into those of several, each with its number of runs.

    The sum of the gradients so far is fetched before the first slot of a micro-batch that adds to it, with one addition
    an element, and stays until the update. Updates come last, when all micro-batches have given their gradients.

    Args:
      slots: of one micro-batch, in order, updates among them.
      tensors: what they touch.
      micro_batches: how many; with one, everything stays as it is.

    Returns:
      Slots in order, tensors, and how often each slot runs.
    """
    if micro_batches == 1:
        return list(slots), list(tensors), [1] * len(slots)
    updates = [slot for slot in slots if slot.pass_ == "update"]
    sums = {t: slot for slot in updates if isinstance(slot, VectorSlot) for t in slot.reads if _is_gradient(tensors[t])}
    timeline: list[Slot] = []
    fetched: set[int] = set()
    for slot in slots:
        if slot.pass_ == "update":
            continue
        for t in sorted((_written(slot) & sums.keys()) - fetched):
            size = sums[t].reads[t]
            timeline.append(VectorSlot(sums[t].name, "accumulate", size, reads=Counter({t: size})))
            fetched.add(t)
        timeline.append(slot)
    times = {"accumulate": micro_batches - 1, "update": 1}
    timeline += updates
    kept = [replace(tensor, persistent=True) if t in sums else tensor for t, tensor in enumerate(tensors)]
    return timeline, kept, [times.get(slot.pass_, micro_batches) for slot in timeline]


def _is_gradient(tensor: Tensor) -> bool:
    return tensor.kind == "weight_gradient"


def _written(slot: Slot) -> set[int]:
    """Tensors that a slot may write; what a product reads is no sum of gradients."""
    return set(slot.tensors) if isinstance(slot, ProductSlot) else set(slot.writes)
