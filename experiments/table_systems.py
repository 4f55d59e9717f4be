"""The published systems S1 to S8 reproduced: what they report beside what we find, and each mechanism switched off in turn.

    python -m experiments.table_systems                       # all eight; some twenty minutes on two cores
    python -m experiments.table_systems --only S5 --json > s5.json
    python -m experiments.table_systems --measured s*.json    # those in the files as they are, the others measured now
    python -m experiments.table_systems --page docs/systems.md --plot docs/images   # renews the page's tables and pictures
    python -m experiments.table_systems --quick               # few samples, short training: only to see it work

Published figures stand in hw/chips/systems.yaml; a system's module under experiments/systems measures ours. Nothing is
fitted. Intervals are the central 90 % over drawn technologies, widened by each assumption moved to the ends of its range.
"""

import dataclasses
import importlib
import importlib.resources
import json
import sys
from collections.abc import Mapping as Map
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from rich.console import Console
from rich.table import Table

from codesign.rundir import read_json
from experiments import command_line
from experiments.silicon.page import replace_between
from experiments.systems.pictures import plot_ablations, plot_headlines, plot_ladder
from experiments.systems.record import Figure, System
from experiments.table_silicon import ROUNDING
from hw.technology import unknown

MODULES = {
    "S1": "s1_low_bit",
    "S2": "s2_in_situ",
    "S3": "s3_row_pipeline",
    "S4": "s4_ladder",
    "S5": "s5_hnpu",
    "S6": "s6_cnnp",
    "S7": "s7_unpu",
    "S8": "s8_stereo",
}
MARKS = ("<!-- table_systems -->", "<!-- end of table_systems -->")


def read_systems() -> dict[str, dict[str, Any]]:
    """What the systems report, by their short name."""
    return yaml.safe_load((importlib.resources.files("hw") / "chips" / "systems.yaml").read_text())


def join(told: Map[str, Any], system: System) -> dict[str, Any]:
    """Published headlines beside ours.

    Raises:
      ValueError: a headline that the system's module did not measure, or one that nobody publishes.
    """
    names = [row["name"] for row in told["headlines"]]
    if set(names) != set(system.figures):
        raise ValueError(f"expected figures for {names}, got {sorted(system.figures)}; make the two agree")
    headlines = []
    for row in told["headlines"]:
        figure, published = system.figures[row["name"]], row["published"]
        inside = is_inside(figure, published, is_limit=row.get("limit", False))
        headlines.append(
            {
                "name": row["name"], "published": published, "ours": figure.ours, "low": figure.low,
                "high": figure.high, "unit": row["unit"],
                "ratio": figure.ours / published if published else None,
                "inside": inside,
                "source": row["source"], "baseline": row.get("baseline"),
            }
        )  # fmt: skip
    return {
        "title": told["title"], "headlines": headlines, "workload": system.workload,
        "num_assumed": len(system.assumptions),
        "assumptions": {name: dataclasses.asdict(it) for name, it in system.assumptions.items()},
        "ablation": {name: dict(row) for name, row in system.ablation.items()},
        "accuracy": dict(system.accuracy), "notes": system.notes,
    }  # fmt: skip


def is_inside(figure: Figure, published: float | None, *, is_limit: bool) -> bool | None:
    """Whether what is published lies in our interval, up to its rounding, or ours below it where it is a limit; None
    where nothing is published."""
    if published is None:
        return None
    if is_limit:
        return figure.ours <= published
    return figure.low - ROUNDING * abs(figure.low) <= published <= figure.high + ROUNDING * abs(figure.high)


def tabulate(names: Sequence[str], quick: bool) -> dict[str, Any]:
    """All systems as one object for JSON."""
    told = read_systems()
    return {"systems": {name: join(told[name], measure_system(name, quick)) | {"quick": quick} for name in names}}


def measure_system(name: str, quick: bool) -> System:
    """What a system's module finds; modules are imported one at a time, as each brings its own training."""
    return importlib.import_module(f"experiments.systems.{MODULES[name]}").measure_system(quick)


def read_measured(paths: Sequence[Path]) -> dict[str, Any]:
    """Systems by their short name, from what earlier runs printed with --json.

    Raises:
      ValueError: a file that is not such JSON.
      OSError: no such file.
    """
    systems: dict[str, Any] = {}
    for path in paths:
        try:
            found = read_json(path)
            markdown(found)  # what a system lacks shows before the others are measured, not after
            systems |= found["systems"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected {path} to hold what --json printed, got {type(error).__name__}: {error}"
            ) from error
    if unfit := [name for name in systems if name not in MODULES]:
        raise ValueError(unknown("system", unfit[0], MODULES))
    return systems


def show(table: Map[str, Any]) -> None:
    """Print the table for people."""
    rich = Table(title="Published systems")
    for heading in ("system", "headline", "published", "ours", "interval", "ours / published", "inside"):
        rich.add_column(heading)
    for name, system in table["systems"].items():
        for row in system["headlines"]:
            rich.add_row(name, *_cells(row))
    console = Console(width=150)
    console.print(rich)
    for name, system in table["systems"].items():
        for mechanism, row in system["ablation"].items():
            console.print(f"{name} {mechanism}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
        if system["accuracy"]:
            told = ", ".join(f"{key} {value:.2f} %" for key, value in system["accuracy"].items())
            console.print(f"{name} accuracy: {told}")


def _cells(row: Map[str, Any]) -> tuple[str, ...]:
    star = "*" if row["baseline"] else ""
    inside = {True: "yes", False: "no", None: "–"}[row["inside"]]
    return (
        row["name"] + star,
        "–" if row["published"] is None else f"{row['published']:g} {row['unit']}",
        f"{row['ours']:.4g} {row['unit']}",
        f"{row['low']:.3g} to {row['high']:.3g}",
        "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
        inside,
    )


def markdown(table: Map[str, Any]) -> str:
    """Headlines, ablations, accuracies, workloads and assumptions of every system as Markdown."""
    lines = []
    for name, system in table["systems"].items():
        lines += [f"### {name}: {system['title']}", "", f"Workload: {system['workload']}. {system['notes']}", ""]
        lines += ["Made with `--quick`: few samples, few mappings, short training.", ""] if system["quick"] else []
        lines += ["| headline | published | ours | interval | ours / published | inside | source |", "|---" * 7 + "|"]
        lines += [f"| {' | '.join((*_cells(row), row['source']))} |" for row in system["headlines"]]
        if system["ablation"]:
            columns = list(dict.fromkeys(key for row in system["ablation"].values() for key in row))
            lines += ["", f"| without, or step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for mechanism, row in system["ablation"].items():
                lines.append(f"| {mechanism} | {' | '.join(_number(row.get(key)) for key in columns)} |")
        if system["accuracy"]:
            lines += ["", "| training scheme | test accuracy (%) |", "|---|---|"]
            lines += [f"| {scheme} | {value:.2f} |" for scheme, value in system["accuracy"].items()]
        if system["assumptions"]:
            lines += ["", "| assumed | value | range | why |", "|---|---|---|---|"]
            for key, it in system["assumptions"].items():
                lines.append(f"| {key} | {it['value']:g} | {it['low']:g} to {it['high']:g} | {it['reason']} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main(
    only: tuple[str, ...] = (),
    quick: bool = False,
    measured: tuple[Path, ...] = (),
    page: Path | None = None,
    plot: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compare and tabulate.

    Args:
      only: systems to measure, S1 to S8; by default all that are not in `measured`.
      quick: few samples and short training, to see it work.
      measured: files with the JSON of earlier runs, told beside what is measured now.
      page: Markdown file whose tables of systems are renewed, docs/systems.md.
      plot: folder for the pictures of headlines, ablations and the ladder.
      as_json: print one JSON object instead of the table.
    """
    for name in only:
        if name not in MODULES:
            raise ValueError(unknown("system", name, MODULES))
    known = read_measured(measured)
    names = only or tuple(name for name in MODULES if name not in known)
    systems = known | tabulate(names, quick)["systems"]
    table = {"systems": {name: systems[name] for name in sorted(systems)}}
    if plot is not None:
        plot_headlines(table, plot / "systems.svg")
        plot_ablations(table, plot / "systems_ablation.svg")
        plot_ladder(table, plot / "systems_ladder.svg")
    if page is not None:
        replace_between(page, MARKS, markdown(table))
    if as_json:
        print(json.dumps(table))
    else:
        show(table)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
