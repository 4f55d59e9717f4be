"""The command `search` of the command line: its options, its progress and its tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from codesign import rundir
from codesign.config import Between, ChipConfig, Count, Positive, Seed

Free = Literal[
    "rows", "columns", "levels", "register_bytes", "local_kib", "shared_kib", "bandwidth", "banks", "vdd", "slice_bits"
]


@dataclass(frozen=True)
class NetworkOptions:
    """The network that a command is about."""

    model: str = "lenet"
    """lenet, mlp, resnet8, resnet20, ds_cnn, mobilenet_vww, module:function of your own factory, or an ONNX or ZigZag file
    (docs/exchange.md)."""
    data: str = "digits"
    """digits, the path of a dataset (docs/own-data.md), or module:function; decides the shape of the input."""
    batch_size: Count = 128
    """Samples per training step; per inference where a chip is searched for that."""


@dataclass(frozen=True)
class QuantisedNetworkOptions(NetworkOptions):
    """The same at uniform widths."""

    bits: Annotated[int, Between(1, 32)] = 8
    """Bits of weights, inputs and backward errors, in every layer."""


@dataclass(frozen=True)
class SearchCommand(QuantisedNetworkOptions):
    """Find the best chip and mappings for a network as it is, without training: best design, front, figure.

    Every design found is written as design.yaml. Ctrl-C ends the search with the best so far.
    """

    runs: Literal["training_step", "inference"] = "training_step"
    """What the chip is for."""
    chip: str = "edge_trainer"
    """Name of a chip in hw/chips, which the search begins with and keeps where nothing is free."""
    node_nm: Positive | None = None
    """Technology node in nanometres instead of the chip's own."""
    free: tuple[Free, ...] | None = None
    """What may change; None: all of them, slice_bits where the MACs have slices. levels: whether there are registers, and
    a local SRAM."""
    objective: Literal["edp", "ed2p", "energy", "latency"] = "edp"
    """What is minimised: energy times latency (squared), or one of the two."""
    area_mm2: Positive | None = None
    """Largest chip area in mm2; without any budget, that of the chip the search begins with."""
    latency_ms: Positive | None = None
    """Longest run in ms."""
    energy_uj: Positive | None = None
    """Most energy of a run in uJ."""
    power_mw: Positive | None = None
    """Highest average power of a run in mW."""
    sram_kib: Positive | None = None
    """Most SRAM on the chip in KiB, local and shared together."""
    seconds: Positive = 120.0
    """Time limit; a round that has begun, the first with its compilations, is not cut short."""
    rounds: Count = 100
    """Most rounds; what they find does not depend on the machine's speed, as a time limit does."""
    evaluations: Count = 800
    """Mappings tried per operation and chip."""
    seed: Seed = 0
    """Of everything drawn."""
    out: str | None = None
    """Directory to create; None makes the next free runs/search-MODEL-NUMBER."""
    as_json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")] = False
    """Print one JSON object as the last line of the output; tables and progress go to the error stream."""


def search(command: SearchCommand) -> tuple[list[Table], dict[str, Any]]:
    """Runs the command; tables for people, the same as plain values.

    Raises:
      ValueError: as `codesign.chip_report.search_chips`.
    """
    from codesign.anytime import Progress
    from codesign.chip_report import UNITS, Asked, search_chips
    from codesign.chip_search import Plan

    limits = {key: getattr(command, key) for key, _ in UNITS.values() if getattr(command, key) is not None}
    plan = Plan(evaluations=command.evaluations)
    effort = plan.effort(command.rounds, command.seconds)
    asked = Asked(
        command.model, command.data, command.batch_size, command.bits, ChipConfig(command.chip, node_nm=command.node_nm),
        command.runs, command.objective, command.free, limits, effort, plan, command.seed,
    )  # fmt: skip
    stem = f"search-{Path(command.model).stem}".replace(":", ".")
    waiting = Console(stderr=True).status("first mappings, and compiling")
    with rundir.new_run(command.out, stem) as directory, waiting as status:

        def show(progress: Progress) -> None:
            status.update(f"{progress.seconds:.0f} s, best {command.objective} {progress.value:.4g}")

        told = search_chips(asked, directory, show)
    return [_designs(told), _outcome(told)], told


def _designs(told: dict[str, Any]) -> Table:
    """The best design beside the base chip and the knee."""
    table = Table(
        title=f"{told['runs'].replace('_', ' ')} of {told['model']}, {told['bits']} bit, least {told['objective']}"
    )
    designs = {"base chip": told["base"], "best": told["best"], "knee of the front": told["front"][told["knee"]]}
    table.add_column("")
    for name in designs:
        table.add_column(name, justify="right")
    rows = [
        {key: value for key, value in design.items() if key != "chip"} | design["chip"] for design in designs.values()
    ]
    for key in rows[0]:
        cells = (f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for row in rows)
        table.add_row(key.replace("_", " "), *cells)
    return table


def _outcome(told: dict[str, Any]) -> Table:
    """What the search did and how far the best may be from the optimum."""
    from codesign.chip_search import OBJECTIVES

    table = Table(caption=f"designs, front.csv, front.svg: {told['directory']}", show_header=False)
    base = told["base"]
    gain, (*powers, _) = 1.0, OBJECTIVES[told["objective"]]
    for key, power in zip(("energy_uj", "latency_ms"), powers, strict=True):
        gain *= (base[key] / told["best"][key]) ** power
    for name, text in {
        f"{told['objective']} of the base chip over the best": f"{gain:.3g}",
        "best over the bound on all chips": f"{told['gap'] + 1:.3g}",
        "designs on the front": str(len(told["front"])),
        "of the designs no worse than the base chip, beaten": f"{100 * told['hypervolume']:.1f} %",
        "chips priced, mappings tried": f"{told['chips']:,}, {told['evaluations']:,}",
        "seconds": f"{told['history'][-1][1]:.0f}",
    }.items():
        table.add_row(name, text)
    return table
