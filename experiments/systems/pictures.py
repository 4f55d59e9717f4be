"""The pictures of the table of systems: headlines, ablations, and the ladder of S4."""

from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any

import numpy as np

LADDER = "S4"
PARTS = ("dataflow", "external memory", "computation")


def plot_headlines(table: Map[str, Any], path: Path) -> None:
    """Ours over published for every headline that is published and not zero, with intervals; the line is equality."""
    import matplotlib.pyplot as plt

    rows = [
        (f"{name} {row['name']}", row)
        for name, system in table["systems"].items()
        for row in system["headlines"]
        if row["ratio"] and row["low"] > 0
    ]
    figure, axis = plt.subplots(figsize=(8, 0.26 * len(rows) + 1))
    for place, (_, row) in enumerate(rows):
        published = row["published"]
        axis.plot([row["low"] / published, row["high"] / published], [place] * 2, color="0.6", linewidth=2)
        axis.scatter(row["ratio"], place, color="C0" if row["inside"] else "C3", zorder=2, s=18)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="ours / published", yticks=range(len(rows)))
    axis.set_yticklabels([label for label, _ in rows], fontsize="x-small")
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_ablations(table: Map[str, Any], path: Path) -> None:
    """Every number of every ablation but the ladder as a bar, a panel for each system."""
    import matplotlib.pyplot as plt

    systems = {
        name: system["ablation"] for name, system in table["systems"].items() if system["ablation"] and name != LADDER
    }
    if not systems:
        return
    heights = [1 + sum(map(len, ablation.values())) for ablation in systems.values()]
    figure, axes = plt.subplots(
        len(systems), 1, figsize=(8, 0.24 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for axis, (name, ablation) in zip(axes[:, 0], systems.items(), strict=True):
        bars = [(f"{what}: {key}", value) for what, row in ablation.items() for key, value in row.items()]
        axis.barh([label for label, _ in bars], [value for _, value in bars], color="C0")
        axis.tick_params(labelsize="x-small")
        axis.set_title(name, fontsize="small", loc="left")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_ladder(table: Map[str, Any], path: Path) -> None:
    """Energy of a training step on each rung of the ladder, split into its parts, a panel for each network."""
    import matplotlib.pyplot as plt

    if LADDER not in table["systems"]:
        return
    rungs = table["systems"][LADDER]["ablation"]
    networks = dict.fromkeys(key.split(",")[0] for key in next(iter(rungs.values())))
    figure, axes = plt.subplots(1, len(networks), figsize=(9, 3.2), sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        whole = next(iter(rungs.values()))[f"{network}, energy (uJ)"]
        left = np.zeros(len(rungs))
        for part in PARTS:
            share = 100.0 * np.array([row[f"{network}, {part} (uJ)"] for row in rungs.values()]) / whole
            axis.barh(list(rungs), share, left=left, label=part)
            left += share
        for place, total in enumerate(left):
            axis.text(total, place, f" {total:.3g}", va="center", fontsize="x-small")
        axis.set(title=network, xlabel="energy of a training step, % of float32", xlim=(0, 1.12 * left.max()))
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
