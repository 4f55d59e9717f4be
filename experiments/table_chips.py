"""What each part of the chip search contributes, and controls: random, local search, slopes alone, evolution by a library.

    python -m experiments.table_chips                       # LeNet on digits, one training step: minutes
    python -m experiments.table_chips --model resnet8
    python -m experiments.table_chips --quick               # few rounds, to see it work

All price as many chips and search mappings for as many, under the area of the base chip, from the same base chip and by
the same code; they differ in where populations come from. Evolution is `scipy.optimize.differential_evolution`, with a
generation in place of a round.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy.optimize import differential_evolution

from codesign.chip_boxes import Work
from codesign.chip_population import on_grains
from codesign.chip_report import make_space, make_work
from codesign.chip_search import ChipSearch, ChipsFound, Plan
from codesign.config import Between, Count
from codesign.design import DesignSpace
from codesign.inspection import model_workload
from experiments import command_line
from hw.chips import CHIPS

PLAN = Plan(whole_front=False)
VARIANTS = {
    "all": PLAN,
    "without boxes": dataclasses.replace(PLAN, sources=("changes", "slopes")),
    "without changes": dataclasses.replace(PLAN, sources=("boxes", "slopes")),
    "without slopes": dataclasses.replace(PLAN, sources=("boxes", "changes")),
    "changes alone (local search)": dataclasses.replace(PLAN, sources=("changes",)),
    "slopes alone": dataclasses.replace(PLAN, sources=("slopes",)),
    "random chips": dataclasses.replace(PLAN, sources=()),
}
EVOLUTION = "evolution (SciPy)"


@dataclass(frozen=True)
class Row:
    """A variant: EDP of the best in J s by seed, chips priced, CPU seconds of all seeds, compilation of the first included."""

    variant: str
    edp: list[float]
    chips: int
    cpu_s: float


def rounds(search: ChipSearch, num: int) -> ChipsFound:
    """The search as it is."""
    return search.search(search.plan.effort(num))


def evolve(search: ChipSearch, num: int, seed: int) -> ChipsFound:
    """Populations by differential evolution on the quantities' own scales, a generation for a round."""
    search.start()
    variables, rng = list(search.space.variables.values()), np.random.default_rng(seed)
    logarithmic = np.array([v.logarithmic for v in variables])
    ends = np.array([(np.log([v.low, v.high]) if v.logarithmic else [v.low, v.high]) for v in variables])

    def merits(columns: np.ndarray) -> np.ndarray:
        values = np.where(logarithmic, np.exp(columns.T), columns.T)
        return search.try_chips(on_grains(search.space, values), search.goal)

    drawn = ends[:, 0] + rng.random((search.plan.population, len(ends))) * (ends[:, 1] - ends[:, 0])
    differential_evolution(
        merits, ends, init=drawn, maxiter=num - 1, vectorized=True, updating="deferred", polish=False, tol=0, rng=rng
    )
    return search.found()


def run(space: DesignSpace, work: Work, num_rounds: int, seeds: int, told: Callable[[str], None]) -> list[Row]:
    """All variants, evolution last."""
    budget, rows = {"area": float(space.base.area().total)}, []
    for variant, plan in (VARIANTS | {EVOLUTION: PLAN}).items():
        begun, values, chips = time.process_time(), [], 0
        sloped = tuple(space.variables) if plan.sources == ("slopes",) else plan.sloped
        plan = dataclasses.replace(plan, sloped=sloped)
        for seed in range(seeds):
            search = ChipSearch(space, work, budget, plan=plan, seed=seed)
            found = evolve(search, num_rounds, seed) if variant == EVOLUTION else rounds(search, num_rounds)
            values.append(found.value)
            chips = found.chips
        rows.append(Row(variant, values, chips, time.process_time() - begun))
        told(f"{variant}: {min(values):.4g} to {max(values):.4g} J s")
    return rows


def show(rows: list[Row], console: Console) -> None:
    """One line for each variant, as multiples of the best of all."""
    table = Table()
    for heading in ("populations from", "EDP / best of all, by seed", "median", "chips priced", "CPU s"):
        table.add_column(heading, justify="left" if heading == "populations from" else "right")
    best = min(value for row in rows for value in row.edp)
    for row in rows:
        ratios = np.array(row.edp) / best
        shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
        table.add_row(row.variant, shown, f"{np.median(ratios):.2f}", f"{row.chips:,}", f"{row.cpu_s:.0f}")
    console.print(table)


def main(
    model: str = "lenet",
    data: str = "digits",
    batch_size: Count = 128,
    chip: str = "edge_trainer",
    bits: Annotated[float, Between(1, 32)] = 8.0,
    num_rounds: Count = 25,
    seeds: Count = 5,
    quick: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Run and tabulate.

    Args:
      model, data, batch_size: of the training step.
      chip: a preset of `hw.chips`, whose area is the budget.
      bits: of every operand.
      num_rounds: of each search.
      seeds: of each variant.
      quick: two rounds and one seed.
      as_json: print one JSON object on the last line.
    """
    if chip not in CHIPS:
        raise ValueError(f"expected a chip among {', '.join(CHIPS)}, got {chip!r}")
    num_rounds, seeds = (2, 1) if quick else (num_rounds, seeds)
    workload = model_workload(model, data, batch_size)
    work = make_work(workload, "training_step", jnp.full((workload.num_products, 4), bits))
    console = Console(stderr=True, width=130)
    rows = run(make_space(CHIPS[chip](), None), work, num_rounds, seeds, console.print)
    show(rows, Console(stderr=as_json, width=130))
    if as_json:
        print(json.dumps([row.__dict__ for row in rows]))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
