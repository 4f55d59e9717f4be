"""A training step on a chip under the cheapest mappings found, its cost under drawn technologies as well."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codesign import Workload, trace
from codesign.evaluation import evaluate
from codesign.mapper import check_legal
from codesign.objective import full_density
from codesign.problem import RESIDENT, trace_network
from codesign.uncertainty import own_and_drawn, step_under_each
from hw.chip import Chip
from hw.cores import Cores, choose_core, evaluate_cores, make_cores
from hw.overlap import make_schedule
from hw.schedule import StepCost
from hw.sparse import store_sparse
from hw.technology import Technology
from nets.dataset_files import load_dataset
from nets.models import make_model
from nets.training import split_model

KEY = jax.random.key(0)


class Variant(NamedTuple):
    """A step on a chip with its mechanisms switched on or off. P products, n operations, m tensors.

    Attributes:
      chip, workload: what runs where.
      bits: widths of weights, inputs and both errors, (P, 4).
      density: work left of each operation for its two operands, (n, 2); None: nothing is skipped.
      stored: share of its bits that each operand takes in the memories, (n, 3); None: all.
      tensor_bits: width of each tensor where it is not that of the workload, (m,).
      runs: factor on how often each operation runs, (n,); None: 1.
    """

    chip: Chip
    workload: Workload
    bits: jax.Array
    density: jax.Array | None = None
    stored: jax.Array | None = None
    tensor_bits: jax.Array | None = None
    runs: jax.Array | None = None


def uniform(workload: Workload, width: float) -> jax.Array:
    """A table of bits (P, 4) of one width."""
    return jnp.full((1 + int(workload.product.max()), 4), float(width))


def digits_step(batch: int, model: str = "lenet", optimizer: str = "momentum", **options: Any) -> Workload:
    """A training step of a network on digits."""
    dataset = load_dataset("digits")
    network = split_model(make_model(model, dataset.input_shape, dataset.num_classes))
    return trace_network(*network, dataset, batch, optimizer, **options)


def trace_shapes(network: Callable, params: Any, *shapes: Sequence[int], **options: Any) -> Workload:
    """The workload of a network of which only shapes are known."""
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return trace(
        network, jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, tuple)), *map(leaf, shapes), **options
    )


def bits_without_masks(workload: Workload, tensor_bits: jax.Array, width: float) -> jax.Array:
    """Widths of tensors (m,) where the values before an activation are kept in place of its mask."""
    step, widths = workload.step, np.array(tensor_bits)
    reads = np.asarray(step.vector_reads)
    is_result = np.array([name.endswith("/outputs") for name in workload.tensor_names])
    forward = {
        name: float(reads[row, is_result].sum())
        for row, (name, pass_) in enumerate(zip(workload.vector_names, workload.vector_passes, strict=True))
        if pass_ == "forward"
    }
    for i, name in enumerate(workload.tensor_names):
        if name.endswith(" mask") and forward.get(name.removesuffix(" mask")):
            widths[i] = width * forward[name.removesuffix(" mask")] / float(step.tensor_elements[i])
    return jnp.asarray(widths)


def cost_variant(variant: Variant, evaluations: int, samples: int = 0) -> StepCost:
    """Cost of a step under the mappings found for it; with a leading axis: as it is, then under drawn technologies.

    Raises:
      ValueError: an operation that the chip cannot run; names it and what does not fit.
    """
    workload, chip = variant.workload, dataclasses.replace(variant.chip, resident_fraction=jnp.asarray(RESIDENT))
    step, widths = workload.step, workload.operation_bits(variant.bits)
    if variant.runs is not None:
        step = dataclasses.replace(step, multiplicity=step.multiplicity * variant.runs)
    tensor_bits = workload.tensor_bits(variant.bits) if variant.tensor_bits is None else variant.tensor_bits
    found = evaluate(chip, step, widths, tensor_bits, KEY, evaluations=evaluations, num_best=1)
    check_legal(found.cost.violation, chip, workload.labels)
    accesses = jax.tree.map(lambda x: x[:, 0], found.candidates.accesses)
    if variant.stored is not None:
        accesses = jax.vmap(store_sparse)(accesses, variant.stored)
    density = full_density(widths) if variant.density is None else variant.density
    technologies = own_and_drawn(chip.technology, samples)
    return step_under_each(technologies, chip, step, accesses, widths, tensor_bits, density)


def cost_cores(
    chips: Sequence[Chip],
    workload: Workload,
    bits: jax.Array,
    core: np.ndarray,
    evaluations: int,
    samples: int = 0,
    tensor_bits: jax.Array | None = None,
) -> StepCost:
    """As `cost_variant`, on several cores; `core` is that of each slot, (slots,)."""
    step, widths = workload.step, workload.operation_bits(bits)
    tensor_bits = workload.tensor_bits(bits) if tensor_bits is None else tensor_bits
    cores = make_cores([dataclasses.replace(chip, resident_fraction=jnp.asarray(RESIDENT)) for chip in chips])
    schedule = make_schedule(step, core, len(chips))
    found = [
        evaluate(chip, step, widths, tensor_bits, KEY, evaluations=evaluations, num_best=1) for chip in cores.chips
    ]
    mapped = [jax.tree.map(lambda x: x[:, 0], each.candidates.accesses) for each in found]
    accesses = choose_core(schedule.core[step.operation_slot], mapped)
    density = full_density(widths)

    @jax.jit
    @jax.vmap
    def under_each(technology: Technology) -> StepCost:
        drawn_chips = tuple(dataclasses.replace(chip, technology=technology) for chip in cores.chips)
        return evaluate_cores(Cores(drawn_chips), step, schedule, accesses, widths, tensor_bits, density)

    costs = under_each(own_and_drawn(chips[0].technology, samples))
    core_of_operation = np.asarray(schedule.core)[np.asarray(step.operation_slot)]
    for number, chip in enumerate(cores.chips):
        rows = np.flatnonzero(core_of_operation == number)
        check_legal(costs.violation[0][rows], chip, [workload.labels[row] for row in rows])
    return costs
