"""From the last iterate to the chip that is built: pin it to its grain, search mappings anew, polish grain by grain."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC

import jax
import jax.numpy as jnp

from codesign.design import Design, DesignSpace, physical_values, with_values
from codesign.evaluation import Evaluated, evaluate
from hw.chip import Chip
from hw.schedule import Step, StepCost


def legal_chip(space: DesignSpace, design: Design) -> Chip:
    """The concrete chip of a design, every free quantity exactly on its grain."""
    values = {}
    for name, raw in design.items():
        variable = space.variables[name]
        built = round(round(float(variable.value(raw)) / variable.grain) * variable.grain, 9)
        values[name] = jnp.asarray(min(max(built, variable.low), variable.high))
    return with_values(space.base, values)


def polish(
    space: DesignSpace,
    legal: Evaluated,
    step: Step,
    operation_bits: jax.Array,
    tensor_bits: jax.Array,
    budgets: MappingABC[str, float],
    key: jax.Array,
    max_rounds: int = 6,
    **options,
) -> Evaluated:
    """Coordinate descent over the grains: move to the best neighbour inside the budgets until none is better.

    Neighbours differ in one quantity by one grain or by about an eighth, whichever is larger. A chip outside its budgets
    first moves to whichever neighbour exceeds them least.
    """
    evaluations = legal.evaluations
    for i in range(max_rounds):
        found = [
            evaluate(
                chip, step, operation_bits, tensor_bits, jax.random.fold_in(key, i),
                start=legal.candidates, prices=legal.prices, rounds=1, **options,
            )
            for chip in _grid_neighbours(space, legal.chip)
        ]  # fmt: skip
        evaluations += sum(other.evaluations for other in found)
        best = min([legal, *found], key=lambda other: preference(other.cost, budgets))
        if best is legal:
            break
        legal = best
    return legal._replace(evaluations=evaluations)


def preference(cost: StepCost, budgets: MappingABC[str, float]) -> tuple[float, float]:
    """Sort key of designs: least excess over the budgets (and misfit of mappings) first, then least EDP."""
    excess = [max(0.0, float(getattr(cost, name)) / limit - 1.0) for name, limit in budgets.items()]
    return sum(excess) + float(jnp.sum(cost.violation)), float(cost.edp)


def _grid_neighbours(space: DesignSpace, chip: Chip) -> list[Chip]:
    """Chips that differ in one free quantity by one notch, inside its bounds."""
    values = physical_values(chip)
    chips = []
    for name, variable in space.variables.items():
        notch = max(variable.grain, round(values[name] / 8 / variable.grain) * variable.grain)
        for changed in (values[name] - notch, values[name] + notch):
            if variable.low <= changed <= variable.high:
                chips.append(with_values(chip, {name: jnp.asarray(round(changed, 9))}))
    return chips
