"""What `trace` and `cost` tell about a model before anything is trained, as plain dicts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign.config import ChipConfig
from codesign.evaluation import Evaluated, evaluate_chip
from codesign.objective import step_cost
from codesign.problem import load_chip, load_model
from codesign.tracing import Workload, trace
from hw.operation import LOOPS
from hw.schedule import StepCost
from hw.units import MILLIWATT, MM2
from nets.dataset_files import load_dataset
from nets.training import split_model


def trace_model(model: str, data: str, batch_size: int) -> dict[str, Any]:
    """Operations of one training step.

    Args:
      model, data: as the settings `model.name` and `data.name`; of the data only the shapes matter.
      batch_size: samples per step.

    Returns:
      "operations": list of {"name", "pass", "loops", "stride", "macs", "macs_with_padding"}; and the totals of both
      counts of MACs: with and without the products of which one factor is padding.

    Raises:
      ValueError: no such model or data, or a model without any convolution or product.
    """
    workload = _workload(model, data, batch_size)
    operations = workload.step.operations
    bounds = np.asarray(operations.bounds).round().astype(np.int64)
    taps = np.asarray(operations.taps, np.float64).prod(1).round().astype(np.int64)
    runs = np.asarray(workload.step.multiplicity).round().astype(np.int64)
    rows = [
        {
            "name": workload.names[i],
            "pass": workload.passes[i],
            "loops": dict(zip(LOOPS, bounds[i].tolist(), strict=True)),
            "stride": [int(step) for step in np.asarray(operations.stride)[i]],
            "macs": int(runs[i] * bounds[i, :4].prod() * taps[i]),
            "macs_with_padding": int(runs[i] * bounds[i].prod()),
        }
        for i in range(len(workload.names))
    ]
    totals = {name: sum(row[name] for row in rows) for name in ("macs", "macs_with_padding")}
    return {"model": model, "data": data, "batch_size": batch_size, "operations": rows} | totals


def cost_model(model: str, data: str, batch_size: int, bits: int, chip: ChipConfig, evaluations: int) -> dict[str, Any]:
    """Cost of one training step, and of one inference of a single sample, with the same bits everywhere.

    Args:
      model, data, batch_size: as `trace_model`.
      bits: of weights, inputs and backward errors.
      chip: preset and what differs from it.
      evaluations: mappings tried per operation.

    Returns:
      "training_step" and "inference", each with "energy_uj", "energy_per_sample_uj", "latency_ms", "edp_js",
      "area_mm2", "power_mw" and "energy_by_component_uj".

    Raises:
      ValueError: as `trace_model`; or the chip cannot run an operation, such as with these bits.
    """
    built, key = load_chip(chip), jax.random.key(0)
    training, single = _workload(model, data, batch_size), _workload(model, data, 1)
    uniform = jnp.full((max(training.product) + 1, 4), float(bits))

    def searched(workload: Workload) -> Evaluated:
        widths = workload.operation_bits(uniform), workload.tensor_bits(uniform)
        return evaluate_chip(built, workload.step, *widths, key, workload.labels, evaluations=evaluations)

    # Searching a whole training step of one sample, of the same shapes, costs less than compiling the search again.
    found, forward = searched(single), np.array([name == "forward" for name in single.passes])
    accesses = jax.tree.map(lambda x: x[forward], found.candidates.accesses)
    step = single.inference
    widths = (jnp.full(shape, float(bits)) for shape in (step.operand_tensor.shape, step.tensor_elements.shape))
    inference = jax.jit(step_cost)(built, step, *widths, accesses, found.prices)
    return {
        "model": model,
        "chip": chip.preset,
        "bits": bits,
        "batch_size": batch_size,
        "training_step": _costs(searched(training).cost, batch_size),
        "inference": _costs(inference, 1),
    }


def _costs(cost: StepCost, batch_size: int) -> dict[str, Any]:
    """A cost in the units people use."""
    energy_uj = 1e6 * float(cost.energy)
    return {
        "energy_uj": energy_uj,
        "energy_per_sample_uj": energy_uj / batch_size,
        "latency_ms": 1e3 * float(cost.latency),
        "edp_js": float(cost.energy) * float(cost.latency),
        "area_mm2": float(cost.area) / MM2,
        "power_mw": float(cost.power) / MILLIWATT,
        "energy_by_component_uj": {
            name: 1e6 * energy for name, energy in zip(cost.components, cost.breakdown.tolist(), strict=True)
        },
    }


def _workload(model: str, data: str, batch_size: int) -> Workload:
    dataset = load_dataset(data)
    forward, params, rest = split_model(load_model(model, dataset, seed=0))

    def network(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        return forward(params, rest, images, None, True)[0]

    return trace(network, params, rest, jnp.zeros((batch_size, *dataset.input_shape)))
