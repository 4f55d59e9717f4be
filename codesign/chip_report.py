"""A search for chips as a user asks for it: from settings to a run directory with the best design, the front and a figure."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codesign import mapper, plots, rundir
from codesign.anytime import Effort, Progress
from codesign.chip_boxes import Work
from codesign.chip_front import Point
from codesign.chip_population import METRICS, Array
from codesign.chip_search import OBJECTIVES, ChipSearch, ChipsFound, Plan, UnmetBudgetError, check_budgets
from codesign.config import ChipConfig
from codesign.design import LEVELS, SEARCHED_VARIABLES, DesignSpace, physical_values
from codesign.evaluation import initial_prices
from codesign.inspection import model_workload
from codesign.objective import step_cost
from codesign.pareto import hypervolume, knee
from codesign.problem import free_variables, load_chip
from codesign.sharding import make_mesh
from codesign.summary import describe_bits, describe_chip, describe_mappings
from codesign.tracing import Workload
from hw.arithmetic import SLICED_STYLES
from hw.chip import Chip
from hw.units import KIB, MILLIWATT, MM2

type Runs = Literal["training_step", "inference"]
UNITS = {
    "energy": ("energy_uj", 1e-6),
    "latency": ("latency_ms", 1e-3),
    "area": ("area_mm2", MM2),
    "power": ("power_mw", MILLIWATT),
    "sram": ("sram_kib", KIB),
}
"""Name and unit of each of `METRICS` in settings and reports."""
FRONT_FILE, FIGURE, DESIGNS = "front.csv", "front.svg", "designs"


class Asked(NamedTuple):
    """What a user asks of a search.

    Attributes:
      model, data, batch_size, bits, chip: as `codesign.inspection.cost_model`.
      runs: what the chip is for.
      objective: one of `OBJECTIVES`.
      free: settings of `codesign.problem.free_variables`; None frees all that the chip has.
      budgets: limits by the names in `UNITS`; none: the area of the chip.
      effort, plan, seed: of the search.
    """

    model: str
    data: str
    batch_size: int
    bits: int
    chip: ChipConfig
    runs: Runs
    objective: str
    free: tuple[str, ...] | None
    budgets: dict[str, float]
    effort: Effort
    plan: Plan
    seed: int


def search_chips(
    asked: Asked, directory: Path, on_progress: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Searches, and writes design.yaml of the best, one of each design of the front, the front as a table and a figure.

    Returns:
      "best", "base" and "front": designs, each with its chip and metrics; "knee": index into the front; "hypervolume":
      share of the designs no worse than the base chip in energy, latency and area, all to scale, that the front beats;
      "value", "bound", "gap"; "chips", "evaluations"; "history".

    Raises:
      ValueError: no such model or chip, a chip that cannot run an operation at these bits, budgets that nothing was
        found to meet.
    """
    base, workload = load_chip(asked.chip), model_workload(asked.model, asked.data, asked.batch_size)
    bits = jnp.full((workload.num_products, 4), float(asked.bits))
    work, space = make_work(workload, asked.runs, bits), make_space(base, asked.free)
    budgets = {name: asked.budgets[key] * unit for name, (key, unit) in UNITS.items() if key in asked.budgets}
    try:
        search = ChipSearch(
            space,
            work,
            budgets or {"area": float(base.area().total)},
            OBJECTIVES[asked.objective],
            asked.plan,
            asked.seed,
            make_mesh() if jax.device_count() > 1 else None,
        )
        found = search.search(asked.effort, on_progress)
        check_runnable(search, found, workload.labels)
        check_budgets(found, search.goal)
    except UnmetBudgetError as error:
        raise ValueError(_unmet(error)) from None
    told = _tell(asked, search, found)
    write_designs(directory, asked.runs, workload, bits, search, found)
    directory.mkdir(parents=True, exist_ok=True)
    figure = plots.design_front(told["front"], told["best"], told["base"], told["knee"])
    rundir.write_atomic(directory / FIGURE, plots.to_svg(figure))
    rundir.write_result(directory, told)
    return told | {"directory": str(directory)}


def make_work(workload: Workload, runs: Runs, bits: jax.Array) -> Work:
    """The training step, or the inference of one batch, at the widths (P, 4) of its products."""
    operation_bits, tensor_bits = workload.operation_bits(bits), workload.tensor_bits(bits)
    if runs == "training_step":
        return Work(workload.step, operation_bits, tensor_bits)
    step = workload.inference
    return Work(step, operation_bits[: len(step.multiplicity)], tensor_bits)


def make_space(base: Chip, free: Sequence[str] | None) -> DesignSpace:
    """What is free of a chip, in ranges that hold the chip itself.

    Raises:
      ValueError: a chip of other levels than a `DesignSpace` has, or slices freed of a MAC without them.
    """
    if len(base.names) != 4:
        raise ValueError(f"expected a chip of four memory levels, got {', '.join(base.names)}; search another chip")
    has_slices = base.mac.style in SLICED_STYLES
    if free is not None and "slice_bits" in free and not has_slices:
        raise ValueError(f"expected MACs of slices or bricks to free slice_bits, got {base.mac.style!r}; leave it out")
    names = [name for name in SEARCHED_VARIABLES if name != "slice_bits" or has_slices]
    if free is not None:
        names = free_variables([name for name in free if name != "levels"])
    values = physical_values(base)
    variables = {name: SEARCHED_VARIABLES[name].holding(values[name]) for name in names}
    if "slice_bits" in variables:
        high = min(variables["slice_bits"].high, float(base.mac.widths.min()))
        variables["slice_bits"] = dataclasses.replace(variables["slice_bits"], high=high)
    for name in LEVELS if free is None or "levels" in free else ():
        fixed = dataclasses.replace(SEARCHED_VARIABLES[name], low=values[name], high=values[name])
        variables[name] = dataclasses.replace(variables.get(name, fixed), optional=True)
    if not variables:
        raise ValueError("expected at least one free quantity, got none; name some after --free")
    return DesignSpace(base, variables)


def check_runnable(search: ChipSearch, found: ChipsFound, labels: Sequence[str]) -> None:
    """Check that a search found mappings that fit.

    Raises:
      ValueError: not on any chip; names an operation and what does not fit.
    """
    if found.best.misfit > 0:
        chip, accesses = search.chip(found.best), found.best.mappings.accesses
        cost = step_cost(chip, *search.work, accesses, initial_prices(chip, search.work.operation_bits.dtype))
        mapper.check_legal(cost.violation, chip, labels)


def describe(search: ChipSearch, point: Point) -> dict[str, Any]:
    """Metrics and chip of a design in the units of reports."""
    return _in_units(point.metrics) | {"chip": describe_chip(search.chip(point))}


def write_designs(
    directory: Path, runs: Runs, workload: Workload, bits: jax.Array, search: ChipSearch, found: ChipsFound
) -> None:
    """design.yaml of the best design, and of each of the front in a directory of its own; the front as a table."""
    layers = list(dict.fromkeys(workload.names))

    def write(folder: Path, point: Point) -> None:
        chip = search.chip(point)
        labels = workload.labels[: len(search.work.operation_bits)]
        rundir.write_design(folder, {
            "chip": describe_chip(chip), "bits": describe_bits(workload, bits, layers), runs: _in_units(point.metrics),
            "mappings": describe_mappings(labels, point.mappings, chip.names),
        })  # fmt: skip

    write(directory, found.best)
    buffer = io.StringIO()
    rows = [_in_units(point.metrics) | dict(zip(search.names, point.values, strict=True)) for point in found.front]
    writer = csv.DictWriter(buffer, fieldnames=["design", *rows[0]], lineterminator="\n")
    writer.writeheader()
    for i, (row, point) in enumerate(zip(rows, found.front, strict=True)):
        folder = directory / DESIGNS / f"{i:03d}"
        write(folder, point)
        writer.writerow({"design": folder.relative_to(directory)} | {key: f"{value:.6g}" for key, value in row.items()})
    rundir.write_atomic(directory / FRONT_FILE, buffer.getvalue())


def _tell(asked: Asked, search: ChipSearch, found: ChipsFound) -> dict[str, Any]:
    front = np.array([point.metrics[:3] for point in found.front])
    base = found.base.metrics[:3]
    described = [describe(search, point) for point in found.front]
    return {
        "model": asked.model, "runs": asked.runs, "bits": asked.bits, "batch_size": asked.batch_size,
        "preset": asked.chip.preset, "objective": asked.objective, "value": found.value, "bound": found.bound,
        "gap": found.value / found.bound - 1.0, "best": describe(search, found.best),
        "base": describe(search, found.base), "front": described, "knee": knee(np.log(front)),
        "hypervolume": hypervolume(front / base, np.ones(3)), "chips": found.chips, "evaluations": found.evaluations,
        "history": found.history,
    }  # fmt: skip


def _in_units(metrics: Array) -> dict[str, float]:
    return {UNITS[name][0]: float(value / UNITS[name][1]) for name, value in zip(METRICS, metrics, strict=True)}


def _unmet(error: UnmetBudgetError) -> str:
    key, unit = UNITS[error.metric]
    limit, nearest = f"{error.limit / unit:.4g}", f"{error.nearest / unit:.4g}"
    if error.is_proven:
        return (
            f"{key}: expected budgets that a chip can meet, got {limit}; no chip in these ranges and budgets has less than "
            f"{nearest}, raise it at least to that"
        )
    return (
        f"{key}: expected a design within the budget of {limit}, found none; the nearest has {nearest}, search longer "
        "(--seconds, --rounds) or raise the budget to that"
    )
