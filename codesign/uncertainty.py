"""Error bars: what the doubt about a technology's constants does to the cost of a step, and to the order of two designs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping as MappingABC
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from codesign.objective import full_density
from hw.accesses import Accesses
from hw.chip import Chip
from hw.schedule import Step, StepCost, evaluate_step
from hw.technology import Technology, make_technology, sample_technologies

NUM_SAMPLES = 256
QUANTILES = (0.05, 0.95)
# Of programs that run in milliseconds, a few times, compiling is nearly all the time: without LLVM's optimisations.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}
_SEED = 0  # one for all: designs are compared under the same draws


def sample_step(
    chip: Chip,
    step: Step,
    accesses: Accesses,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    density: jax.Array | None = None,
) -> tuple[StepCost, StepCost]:
    """The cost of a step, and the same under `NUM_SAMPLES` technologies drawn around the chip's own, mappings held.

    A draw sets all constants at once, and it is the same draw for every chip: what two chips, or two components of one,
    have in common moves together.

    Args:
      accesses: counts of the operations under the mapping of each, (n, ...).
      operation_bits, tensor_bits: (n, 3), (m,).
      density: (n, 2), see `hw.cost.price`; by default nothing is skipped.

    Returns:
      The cost under the chip's own technology, and a `StepCost` with a leading axis of samples; numpy arrays.
    """
    density = full_density(operation_bits) if density is None else density
    technologies = own_and_drawn(chip.technology, NUM_SAMPLES)
    costs = jax.device_get(step_under_each(technologies, chip, step, accesses, operation_bits, tensor_bits, density))
    return jax.tree.map(lambda x: x[0], costs), jax.tree.map(lambda x: x[1:], costs)


def own_and_drawn(technology: Technology, num: int) -> Technology:
    """A technology, then `num` drawn around it, along a leading axis of 1 + num; the same draws for every chip of a process."""
    factors = _factors(technology.node_nm, technology.process, technology.device, technology.dram, num)
    values: dict[str, Any] = {name: value * factors[name] for name, value in technology.values.items()}
    return dataclasses.replace(technology, values=values)


@functools.cache
def _factors(node_nm: float, process: str, device: str, dram: str, num: int) -> dict[str, np.ndarray]:
    """Constant -> 1, then its samples over its value, (1 + num,)."""
    technology = make_technology(node_nm, process=process, device=device, dram=dram)
    drawn = jax.device_get(sample_technologies(jax.random.key(_SEED), num, technology).values)
    return {name: np.insert(samples / technology[name], 0, 1.0) for name, samples in drawn.items()}


@functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
@functools.partial(jax.vmap, in_axes=(0, None, None, None, None, None, None))
def step_under_each(
    technology: Technology,
    chip: Chip,
    step: Step,
    accesses: Accesses,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    density: jax.Array,
) -> StepCost:
    """Cost of a step under technologies with a leading axis, mappings held; otherwise as `hw.schedule.evaluate_step`."""
    drawn = dataclasses.replace(chip, technology=technology)
    return evaluate_step(drawn, step, accesses, operation_bits, tensor_bits, density)


def interval(samples: ArrayLike) -> list[Any]:
    """[low, high]: the quantiles `QUANTILES` along the first axis."""
    return np.quantile(np.asarray(samples, float), QUANTILES, axis=0).tolist()


def compare(row: MappingABC[str, Any], reference: MappingABC[str, Any]) -> dict[str, dict[str, Any]]:
    """One design against another, metric by metric.

    Args:
      row, reference: metric -> value, and "samples": metric -> its samples, the same draws for both.

    Returns:
      metric -> "ratio" of the values, its "interval", and "holds": the share of samples in which the two stand in the
      order of their values (one lower, or both equal).
    """
    compared = {}
    for name, samples in row["samples"].items():
        ratio = row[name] / reference[name]
        ratios = np.asarray(samples, float) / np.asarray(reference["samples"][name], float)
        holds = np.mean(np.sign(ratios - 1.0) == np.sign(ratio - 1.0))
        compared[name] = {"ratio": ratio, "interval": interval(ratios), "holds": float(holds)}
    return compared
