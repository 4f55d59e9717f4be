"""Mappings and chips for four networks on DOSA's accelerator: the optimum, how close to a bound, and what chance finds.

    python -m experiments.search_benchmark                        # all networks: minutes
    python -m experiments.search_benchmark --workload bert        # one network
    python -m experiments.search_benchmark --quick                # only to see it work

`fixed`: the default chip, every mapping found or ruled out. `equal_area`: the best chip of at most the default's area.
`free`: the best chip in the ranges that DOSA draws from, whatever its area; not to be quoted without it. Each beside
random mappings (and chips) and local search, and written as Timeloop inputs. docs/search.md says what is counted and what was measured.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from codesign.anytime import Effort as SearchEffort
from codesign.config import Between, Count, Positive
from codesign.family_search import Chip, Design, FamilySearch, Progress
from codesign.flat import map_network, map_operations
from codesign.lagrangian import least_product
from codesign.mapspace import Space
from codesign.random_mappings import sample
from experiments import command_line
from experiments.gemmini import DEFAULT, WORKLOADS, Gemmini, Workload, read_workload
from experiments.timeloop_inputs import timeloop_input, write_timeloop_inputs
from hw.mapping import Mapping

NETWORKS = ("resnet50", "bert", "unet", "retinanet")
MODES = ("fixed", "equal_area", "free")
_CHECKPOINTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Effort:
    """How much each search may do: CPU seconds, gap to stop at, valid random mappings per layer and chip, chips, seeds,
    mappings per layer of local search (0 leaves it out)."""

    time_limit: float = 120.0
    tolerance: float = 0.0
    draws: int = 1000
    chips: int = 10
    seeds: int = 5
    local_evaluations: int = 10_000


QUICK = Effort(time_limit=20.0, tolerance=0.05, draws=100, chips=2, seeds=1, local_evaluations=2000)


@dataclass(frozen=True)
class Answer:
    """One mode of one network.

    Attributes:
      edp: microjoule cycles; energy_uj, cycles: what it is the product of.
      edp_over_bound: over the least that any design of this mode can have.
      proven: whether it is the optimum: every design was found or ruled out.
      evaluations: mappings and parts of mappings that were costed.
      cpu_s: of this search, counts of all layers included; compile_s: of it, compiling: nothing is compiled.
      random_edp: what random search found, one per seed; random_widest_edp: with fan-outs as wide as they fit.
      local_edp: what local search alone finds on the chip of the answer, one per seed.
      imperfect_edp: local search from the answer's mappings on, with factors that need not divide the bounds.
      convergence: (evaluations, cpu_s, edp, bound); random_convergence: (valid draws per layer and chip, edp), first seed.
    """

    chip: dict[str, int]
    area_mm2: float
    edp: float
    energy_uj: float
    cycles: float
    edp_over_bound: float
    proven: bool
    evaluations: int
    cpu_s: float
    compile_s: float
    random_edp: list[float]
    random_widest_edp: list[float]
    local_edp: list[float]
    imperfect_edp: float
    convergence: list[tuple[int, float, float, float]]
    random_convergence: list[tuple[int, float]]


def search(workload: Workload, mode: str, effort: Effort) -> tuple[Answer, FamilySearch, Design]:
    """Searches one mode; the answer has no random figures yet."""
    family, begun = Gemmini(), time.process_time()
    chips = FamilySearch(family, workload.nests, workload.counts)
    deadline = begun + effort.time_limit
    if mode == "fixed":
        design, bound = chips.map_chip(DEFAULT, deadline=deadline)
        spent = time.process_time()
        history = [Progress(chips.evaluations, spent, design.choice.value, bound, 1)]
    else:
        area = family.area(DEFAULT) if mode == "equal_area" else np.inf
        found = chips.search(area=area, tolerance=effort.tolerance, deadline=deadline, start=DEFAULT)
        design, bound, history = found.design, found.bound, found.history
        spent = time.process_time()
    choice = design.choice
    answer = Answer(
        chip=dict(zip(family.parameters, design.chip, strict=True)),
        area_mm2=family.area(design.chip),
        edp=choice.value,
        energy_uj=choice.energy,
        cycles=choice.latency,
        edp_over_bound=choice.value / bound,
        proven=choice.value <= bound * (1 + 1e-12),
        evaluations=chips.evaluations,
        cpu_s=spent - begun,
        compile_s=0.0,
        random_edp=[],
        random_widest_edp=[],
        local_edp=[],
        imperfect_edp=np.nan,
        convergence=[(p.evaluations, p.cpu_s - begun, p.value, p.bound) for p in history],
        random_convergence=[],
    )
    return answer, chips, design


def random_chips(mode: str, number: int, rng: np.random.Generator) -> list[Chip]:
    """Chips as DOSA draws them, powers of two; for equal area those within it. The default alone where it is fixed."""
    family = Gemmini()
    area = family.area(DEFAULT) if mode == "equal_area" else np.inf
    chips: list[Chip] = [DEFAULT] if mode == "fixed" else []
    while len(chips) < number and mode != "fixed":
        exponents = [
            rng.integers(*np.log2((low, 2 * high)).astype(int))
            for low, high in zip(family.low, family.high, strict=True)
        ]
        chip = tuple(int(2**e) for e in exponents)
        if family.area(chip) <= area:
            chips.append(chip)
    return chips


def random_search(workload: Workload, mode: str, effort: Effort, seed: int, widest: bool) -> NDArray[np.float64]:
    """Best EDP of random chips and mappings after each number of valid draws, (checkpoints,).

    Of the draws of a layer the best combination over the layers is taken, as the search does. A chip on which some layer
    has no valid draw is left out.
    """
    rng, family = np.random.default_rng(seed), Gemmini()
    points = [n for n in _CHECKPOINTS if n <= effort.draws]
    best = np.full(len(points), np.inf)
    for chip in random_chips(mode, effort.chips, rng):
        limits = family.limits(chip, chip)
        costs = [
            sample(nest, family.space, family.price(chip, chip, nest), limits, rng, effort.draws, widest=widest).costs
            for nest in workload.nests
        ]
        if all(c.shape[1] for c in costs):
            edp = [least_product([c[:, :n] for c in costs], workload.counts).value for n in points]
            best = np.minimum(best, edp)
    return best


def local_search(workload: Workload, chip: Chip, effort: Effort, seed: int) -> float:
    """Best EDP of local search alone on a chip, from nothing, at `effort.local_evaluations` mappings a layer."""
    space, prices = Gemmini().flat(chip)
    found, _ = map_network(
        jax.random.key(seed), workload.nests, workload.counts, space, prices, SearchEffort(effort.local_evaluations)
    )
    return found.value


def to_mapping(space: Space, factors: tuple) -> Mapping:
    """What an enumerator found as a mapping of `hw`."""
    return Mapping(*(jnp.asarray(x) for x in (*factors, space.keep * 1.0)))


def imperfect_search(workload: Workload, design: Design, mappings: list[Mapping], effort: Effort) -> float:
    """Best EDP of local search around the mappings of a design, factors free to exceed what the bounds divide into."""
    space, prices = Gemmini().flat(design.chip)
    start = jax.tree.map(lambda *x: np.stack(x)[:, None], *mappings)
    weights = np.tile([1 / design.choice.energy, 1 / design.choice.latency], (len(mappings), 1))
    mapped = map_operations(
        jax.random.key(0), workload.nests, space, prices, jnp.asarray(weights, float), start=start, perfect=False,
        num_chains=8, iterations=effort.local_evaluations // 8, temperature=0.05, num_best=8,
    )  # fmt: skip
    return min(design.choice.value, least_product(mapped.costs(), workload.counts).value)


def run(name: str, modes: Sequence[str], effort: Effort, workloads: Path, out: Path) -> dict[str, Answer]:
    """All modes of one network; Timeloop inputs and the figure go to `out`."""
    workload, answers = read_workload(workloads, name), {}
    local_seeds = range(effort.seeds if effort.local_evaluations else 0)
    for mode in modes:
        answer, chips, design = search(workload, mode, effort)
        chosen = zip(chips.enumerators, design.found, design.choice.picks, strict=True)
        mappings = [
            to_mapping(chips.family.space, enumerator.mapping(found.origin[pick])) for enumerator, found, pick in chosen
        ]
        inputs = [timeloop_input(design.chip, n, m) for n, m in zip(workload.nests, mappings, strict=True)]
        write_timeloop_inputs(out / name / mode, inputs)
        curves = {
            widest: [random_search(workload, mode, effort, seed, widest) for seed in range(effort.seeds)]
            for widest in (False, True)
        }
        answers[mode] = Answer(**asdict(answer) | {
            "random_edp": [float(c[-1]) for c in curves[False]],
            "random_widest_edp": [float(c[-1]) for c in curves[True]],
            "local_edp": [local_search(workload, design.chip, effort, seed) for seed in local_seeds],
            "imperfect_edp": imperfect_search(workload, design, mappings, effort) if local_seeds else np.nan,
            "random_convergence": [(n, float(c)) for n, c in zip(_CHECKPOINTS, curves[False][0], strict=False)],
        })  # fmt: skip
    draw_convergence(name, answers).savefig(out / f"{name}.png", dpi=150)
    return answers


def draw_convergence(name: str, answers: dict[str, Answer]) -> Figure:
    """EDP against work: the search and its bound by CPU seconds, random search by valid draws."""
    figure = Figure(figsize=(7.0, 2.6 * len(answers)), layout="constrained")
    axes = figure.subplots(len(answers), 2, squeeze=False)
    for (mode, answer), (left, right) in zip(answers.items(), axes, strict=True):
        seconds, edp, bound = (np.array([point[i] for point in answer.convergence], float) for i in (1, 2, 3))
        bound[bound == 0] = np.nan
        left.set_visible(len(seconds) > 1)  # one chip is searched in one go
        left.plot(seconds, edp, label="found", drawstyle="steps-post")
        left.plot(seconds, bound, "--", label="bound", drawstyle="steps-post")
        draws, values = zip(*answer.random_convergence, strict=True)
        right.plot(draws, values, "-^", markersize=3, color="C2", label="random")
        right.axhline(answer.edp, color="C0", label="found")
        left.set(title=f"{name}, {mode}", xlabel="CPU seconds", ylabel="EDP (µJ cycles)", yscale="log")
        right.set(xlabel="valid draws per layer and chip", xscale="log", yscale="log")
        left.legend()
        right.legend()
    return figure


def show(name: str, answers: dict[str, Answer], console: Console) -> None:
    """Print a table for people."""
    table = Table(title=name)
    for heading in (
        "mode",
        "chip",
        "mm2",
        "EDP",
        "over bound",
        "proven",
        "random / EDP",
        "widest / EDP",
        "local / EDP",
        "CPU s",
    ):
        table.add_column(heading)
    for mode, a in answers.items():
        ratios = [
            f"{min(r) / a.edp:.3g} to {max(r) / a.edp:.3g}" for r in (a.random_edp, a.random_widest_edp, a.local_edp)
        ]
        chip = " ".join(map(str, a.chip.values()))
        row = (f"{a.area_mm2:.3f}", f"{a.edp:.4g}", f"{a.edp_over_bound:.4f}", str(a.proven), *ratios, f"{a.cpu_s:.1f}")
        table.add_row(mode, chip, *row)
    console.print(table)


def main(
    workload: Literal["resnet50", "bert", "unet", "retinanet", "all"] = "all",
    seeds: Count = Effort.seeds,
    time_limit: Positive = Effort.time_limit,
    tolerance: Annotated[float, Between(0.0, 10.0)] = Effort.tolerance,
    workloads: Path = WORKLOADS,
    out: Path = Path("runs/search_benchmark"),
    quick: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Run and tabulate.

    Args:
      workload: one network, or all of them.
      seeds: of the random searches.
      time_limit: CPU seconds for each search.
      tolerance: the searches for chips end when none can be better by more than this fraction.
      workloads: file of layer tables.
      out: directory for Timeloop inputs and figures.
      quick: few draws and a wide tolerance, to see it work.
      as_json: print one JSON object on the last line.
    """
    effort = QUICK if quick else Effort(time_limit=time_limit, tolerance=tolerance, seeds=seeds)
    console, results = Console(width=130, stderr=as_json), {}
    for name in ("bert",) if quick and workload == "all" else NETWORKS if workload == "all" else (workload,):
        answers = run(name, MODES, effort, workloads, out)
        results[name] = {mode: asdict(answer) for mode, answer in answers.items()}
        show(name, answers, console)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
