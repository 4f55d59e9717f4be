"""The table of published chips for people: on the console, as Markdown, as a picture."""

from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.silicon.peak import PARTS_OF_ENERGY

STATISTICS = ("n", "median_error", "worst_ratio", "inside_interval", "median_interval_ratio")
PARTS = {
    "ratios": "ratios inside a chip",
    "throughput": "throughput",
    "speedups": "throughput over that of wider operands",
    "look_up_tables": "energy of look-up MACs over plain ones",
    "uncalibrated": "efficiency, uncalibrated",
    "calibrated": "efficiency, one factor per node and kind of arithmetic, fitted on other chips",
    "power": "power",
    "frames": "frames per second",
    "area": "area",
    "dram": "DRAM accesses of a MAC",
}


def show(table: Map[str, Any]) -> None:
    """Print the table for people."""
    rich = Table(title="Published chips, uncalibrated")
    for heading in ("chip", "figure", "published", "ours", "interval", "ours / published", "inside"):
        rich.add_column(heading)
    for chip in table["chips"].values():
        for row in chip["rows"]:
            rich.add_row(chip["title"], *_cells(row))
    console = Console(width=150)
    console.print(rich)
    for part in PARTS:
        if table[part]["n"]:
            console.print(f"{PARTS[part]}: " + ", ".join(f"{key} {value:.3g}" for key, value in table[part].items()))
    for name, row in table["clock"].items():
        console.print(f"clock of {name}: {row['published']:.3g}x measured, {row['ours']:.3g}x by the law")


def _cells(row: Map[str, Any]) -> tuple[str, ...]:
    inside = ("yes" if row["inside"] else "no") if row["compared"] else "not compared"
    interval = f"{row['low']:.3g} to {row['high']:.3g}"
    return (
        row["name"],
        f"{row['published']:g} {row['unit']}",
        f"{row['ours']:.3g}",
        interval,
        f"{row['ratio']:.2f}",
        inside,
    )


def markdown(table: Map[str, Any]) -> str:
    """Statistics, figures, clocks and assumptions as Markdown."""
    lines = ["| | n | median error | worst factor | inside | width of interval |", "|---|---|---|---|---|---|"]
    for part in (part for part in PARTS if table[part]["n"]):
        n, error, worst, inside, width = (table[part][key] for key in STATISTICS)
        lines.append(f"| {PARTS[part]} | {n} | {error:.1%} | {worst:.2f}x | {inside:.0%} | {width:.2f}x |")
    lines += ["", "| chip | figure | published | ours | interval | ours / published | inside | confidence, source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for chip in table["chips"].values():
        for row in chip["rows"]:
            cells = chip["title"], *_cells(row), f"{row['confidence']}; {row['source']}"
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| pJ per product | published | {' | '.join(PARTS_OF_ENERGY)} |", "|---" * 8 + "|"]
    for chip in table["chips"].values():
        for row in (row for row in chip["rows"] if row["kind"] == "efficiency"):
            parts = " | ".join(f"{part:.3g}" for part in row["energy_pj"].values())
            lines.append(f"| {chip['title']}, {row['name']} | {2.0 / row['published']:.3g} | {parts} |")
    lines += [
        "",
        "| clock at the highest over the lowest supply | measured | by the law | interval |",
        "|---|---|---|---|",
    ]
    for name, row in table["clock"].items():
        supplies = f"{table['chips'][name]['title']}, {row['vdd'][1]} V over {row['vdd'][0]} V"
        interval = f"{row['low']:.3g}x to {row['high']:.3g}x"
        lines.append(f"| {supplies} | {row['published']:.3g}x | {row['ours']:.3g}x | {interval} |")
    lines += ["", "| assumed | for | value | range | why |", "|---|---|---|---|---|"]
    for (name, value, low, high, reason), titles in _assumptions(table).items():
        who = "all that do not tell it" if len(titles) > 2 else ", ".join(titles)
        lines.append(f"| {name} | {who} | {value:g} | {low:g} to {high:g} | {reason} |")
    return "\n".join(lines)


def _assumptions(table: Map[str, Any]) -> dict[tuple[Any, ...], list[str]]:
    """Titles of the chips by (name, value, low, high, reason)."""
    assumptions: dict[tuple[Any, ...], list[str]] = {}
    for chip in table["chips"].values():
        for name, it in chip["assumptions"].items():
            key = name, it["value"], it["low"], it["high"], it["reason"]
            assumptions.setdefault(key, []).append(chip["title"])
    return assumptions


def replace_between(page: Path, marks: tuple[str, str], content: str) -> None:
    """Replaces what stands between two marks of a page.

    Raises:
      ValueError: the page has not these marks.
    """
    text = page.read_text()
    if any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"expected {page} to hold the lines {marks[0]} and {marks[1]} once each; add them")
    before, rest = text.split(marks[0])
    after = rest.split(marks[1])[1]
    page.write_text(f"{before}{marks[0]}\n\n{content}\n\n{marks[1]}{after}")


def plot_efficiency(table: Map[str, Any], path: Path) -> None:
    """Ours against published efficiency with intervals; the line is equality, the band a factor of 2.5."""
    import matplotlib.pyplot as plt  # half a second to import: only who plots pays for it

    figure, axis = plt.subplots(figsize=(7, 5))
    for chip in table["chips"].values():
        rows = [row for row in chip["rows"] if row["kind"] == "efficiency" and row["compared"]]
        if not rows:
            continue
        published, ours = ([row[key] for row in rows] for key in ("published", "ours"))
        for row in rows:
            axis.plot([row["published"]] * 2, [row["low"], row["high"]], color="0.7", zorder=1)
        axis.scatter(published, ours, label=chip["title"], zorder=2)
    ends = np.array([0.1, 200.0])
    axis.plot(ends, ends, color="black", linewidth=1)
    axis.fill_between(ends, ends / 2.5, ends * 2.5, color="0.93", zorder=0)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published TOPS/W", ylabel="ours, TOPS/W")
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
