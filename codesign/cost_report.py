"""What a step costs, as reports tell it: headline numbers with error bars and lower bounds, operation by operation."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from codesign.evaluation import Evaluated
from codesign.objective import full_density
from codesign.tracing import Workload
from codesign.uncertainty import QUICKLY_COMPILED, interval, sample_step
from hw.accesses import Accesses, no_accesses
from hw.bounds import LowerBound, lower_bound
from hw.chip import Chip
from hw.cost import Cost, price
from hw.mapping import Mapping
from hw.operation import Operation
from hw.schedule import StepCost
from hw.step import Step, padded
from hw.units import MILLIWATT, MM2

NUM_EXPLAINED = 4


class Costed(NamedTuple):
    """A step on a chip, each of its n operations under one mapping, and all there is to tell of its cost.

    Attributes:
      chip, step: what runs where.
      mappings, accesses: (n, ...).
      operation_bits, density: (n, 3), (n, 2).
      cost: at the constants' own values.
      drawn: the same under sampled technologies, see `codesign.uncertainty.sample_step`.
      bounds: what every operation costs at least under any mapping, run once, (n,).
      labels: of the operations that run; in an inference they are the first of those of the training step.
      batch: samples per step.
    """

    chip: Chip
    step: Step
    mappings: Mapping
    accesses: Accesses
    operation_bits: jax.Array
    density: jax.Array
    cost: StepCost
    drawn: StepCost
    bounds: LowerBound
    labels: tuple[str, ...]
    batch: int


def training_cost(workload: Workload, found: Evaluated, bits: jax.Array) -> Costed:
    """A training step under the mappings found for it; bits (P, 4)."""
    return _costed(workload, workload.step, found, found.cost, found.drawn, bits)


def inference_cost(single: Workload, found: Evaluated, bits: jax.Array) -> Costed:
    """One inference of one sample.

    Args:
      single: the workload of one sample.
      found: mappings of its training step; those of the forward pass, its first operations, are taken.
      bits: (P, 4).
    """
    step = padded(single.inference, like=single.step)
    best = jax.tree.map(lambda x: x[:, 0], jax.device_get(found.candidates.accesses))
    widths = single.operation_bits(bits), single.tensor_bits(bits)
    cost, drawn = sample_step(found.chip, step, best, *widths, found.density)
    return _costed(single, step, found, cost, drawn, bits)


def compile_costs(chip: Chip, workload: Workload, bits: jax.Array) -> None:
    """Compile what costs a training step or inference, by costing a step without accesses: in a thread beside a search."""
    step, operation_bits, tensor_bits = workload.step, workload.operation_bits(bits), workload.tensor_bits(bits)
    nothing = no_accesses(len(step.multiplicity), len(chip.names), operation_bits.dtype)
    cost, _ = sample_step(chip, step, nothing, operation_bits, tensor_bits)
    resident = cost.resident[np.asarray(step.operand_tensor)]
    _bounds(chip, step.operations, operation_bits, full_density(operation_bits), resident)


def describe_cost(costed: Costed) -> dict[str, Any]:
    """A step's cost as plain numbers.

    Returns:
      The headline numbers, "energy_per_sample_uj" and "energy_by_component_uj"; "intervals" with [low, high] of each of
      these; "energy_to_bound", "latency_to_bound" and "edp_to_bound", multiples of what the step costs at least under
      any mappings.
    """
    cost, drawn, batch = costed.cost, costed.drawn, costed.batch
    row = {name: float(value) for name, value in headline(cost).items()}
    intervals = {name: interval(samples) for name, samples in headline(drawn).items()}
    components = np.asarray(cost.breakdown, float) * 1e6
    lows, highs = interval(np.asarray(drawn.breakdown, float) * 1e6)
    energy_to_bound, latency_to_bound = _multiples(costed)
    return row | {
        "energy_per_sample_uj": row["energy_uj"] / batch,
        "energy_by_component_uj": dict(zip(cost.components, components.tolist(), strict=True)),
        "intervals": intervals
        | {
            "energy_per_sample_uj": [bound / batch for bound in intervals["energy_uj"]],
            "energy_by_component_uj": {
                name: [low, high] for name, low, high in zip(cost.components, lows, highs, strict=True)
            },
        },
        "energy_to_bound": energy_to_bound,
        "latency_to_bound": latency_to_bound,
        "edp_to_bound": energy_to_bound * latency_to_bound,
    }


def headline(cost: StepCost) -> dict[str, np.ndarray]:
    """Energy, latency, EDP, area and power in the units of reports, each of the shape of `cost.energy`.

    In double precision, in which the product of a tiny energy and latency survives.
    """
    energy, latency = np.asarray(cost.energy, float), np.asarray(cost.latency, float)
    return {
        "energy_uj": energy * 1e6,
        "latency_ms": latency * 1e3,
        "edp_js": energy * latency,
        "area_mm2": np.asarray(cost.area, float) / MM2,
        "power_mw": energy / latency / MILLIWATT,
    }


def describe_operations(costed: Costed) -> list[dict[str, Any]]:
    """Energy and latency of every operation, all its runs, with intervals and bounds, and what limits its speed."""
    cost, drawn, bounds, runs = costed.cost, costed.drawn, costed.bounds, np.asarray(costed.step.multiplicity)
    resources = ("MACs", *costed.chip.names)
    cycles = np.column_stack([cost.compute_cycles, cost.level_cycles])
    energies = np.transpose(interval(np.asarray(drawn.operation_energy, float) * 1e6)).tolist()
    latencies = np.transpose(interval(np.asarray(drawn.operation_latency, float) * 1e3)).tolist()
    return [
        {
            "operation": label,
            "energy_uj": float(cost.operation_energy[i]) * 1e6,
            "latency_ms": float(cost.operation_latency[i]) * 1e3,
            "intervals": {"energy_uj": energies[i], "latency_ms": latencies[i]},
            "energy_to_bound": float(cost.operation_energy[i] / (runs[i] * bounds.energy[i])),
            "latency_to_bound": float(cost.operation_latency[i] / (runs[i] * bounds.latency[i])),
            "limited_by": resources[int(cycles[i].argmax())],
        }
        for i, label in enumerate(costed.labels)
    ]


def explain_dearest(costed: Costed, num: int = NUM_EXPLAINED) -> list[dict[str, Any]]:
    """The `num` operations that take the most energy: "operation", its "share" of the step's, the "text" on it."""
    resident = costed.cost.resident[costed.step.operand_tensor]
    widths = costed.operation_bits, costed.density, resident
    costs = _price(costed.chip, costed.step.operations, costed.accesses, *widths)
    everything = (jax.device_get(costs), costed.step.operations, costed.mappings, widths)
    explained = []
    for i in np.argsort(-np.asarray(costed.cost.operation_energy))[:num].tolist():
        cost, operation, mapping, (bits, density, rho) = jax.tree.map(lambda x, i=i: x[i], everything)
        text = cost.explain(operation, mapping, costed.chip, bits, density, rho)
        share = float(costed.cost.operation_energy[i] / costed.cost.energy)
        explained.append({"operation": costed.labels[i], "share": share, "text": text})
    return explained


def _costed(
    workload: Workload, step: Step, found: Evaluated, cost: StepCost, drawn: StepCost, bits: jax.Array
) -> Costed:
    """A step of a workload, its operations under the first of the candidates found for the training step."""
    chip, operation_bits = found.chip, workload.operation_bits(bits)
    candidates = found.candidates.mapping, found.candidates.accesses
    mappings, accesses = jax.tree.map(lambda x: x[:, 0], jax.device_get(candidates))
    resident = cost.resident[np.asarray(step.operand_tensor)]
    bounds = jax.device_get(_bounds(chip, step.operations, operation_bits, found.density, resident))
    labels = workload.labels[: int(np.count_nonzero(step.multiplicity))]
    return Costed(
        chip, step, mappings, accesses, operation_bits, found.density, cost, drawn, bounds, labels, workload.batch
    )


@functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
def _bounds(
    chip: Chip, operations: Operation, operation_bits: jax.Array, density: jax.Array, resident: jax.Array
) -> LowerBound:
    return jax.vmap(lower_bound, (None, 0, 0, 0, 0))(chip, operations, operation_bits, density, resident)


@functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
def _price(
    chip: Chip,
    operations: Operation,
    accesses: Accesses,
    operation_bits: jax.Array,
    density: jax.Array,
    resident: jax.Array,
) -> Cost:
    return jax.vmap(price, (None, 0, 0, 0, 0, 0))(chip, operations, accesses, operation_bits, density, resident)


def _multiples(costed: Costed) -> tuple[float, float]:
    """Energy and latency of the step over those that no mappings of its operations go below.

    Vector work, transfers and residency do not depend on mappings; the chip leaks through the least latency, too.
    """
    cost, bounds, runs = costed.cost, costed.bounds, np.asarray(costed.step.multiplicity)
    latency = np.sum(runs * bounds.latency) + np.sum(cost.vector_latency) + np.sum(cost.transfer_latency)
    energy = np.sum(runs * bounds.energy) + np.sum(cost.vector_energy) + np.sum(cost.transfer_energy)
    energy += cost.leakage_energy / cost.latency * latency
    return float(cost.energy / energy), float(cost.latency / latency)
