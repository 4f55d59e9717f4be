"""Joint co-design against doing one thing after the other, over paired seeds, on real digits.

    python -m experiments.table_joint            # 5 seeds, all baselines and ablations: slow
    python -m experiments.table_joint --quick    # 2 seeds, few epochs: only to see it work

Every seed is one complete run in its own directory (resumed or skipped if it is there already), so that all methods of a
seed share data order, pretrained weights, budgets and final evaluation. Reports, with 95 % intervals over seeds: accuracy of
joint; its paired difference to float32; training-step EDP of every method relative to joint (geometric means); the gap that
legalising cost. Aim: accuracy of joint at least 97 %, difference above -1 point, sequential / joint 2x at equal accuracy
(within half a point) and area budget, gap within 3 %.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from codesign.config import BaselinesConfig, Config, Count, ObjectiveConfig, TrainConfig
from codesign.progress import TerminalProgress
from codesign.rundir import RESULT, read_result
from codesign.runner import run
from experiments import command_line

ALL_BASELINES = BaselinesConfig(
    include=("float32", "uniform8", "sequential", "random", "joint_without_bits", "joint_without_chip")
)


def configs(seeds: int, quick: bool) -> list[Config]:
    """One config per seed: the demo's settings with every baseline."""
    train, objective, baselines = TrainConfig(), ObjectiveConfig(), ALL_BASELINES
    if quick:
        train, seeds = TrainConfig(pretrain_epochs=2, epochs=3, finetune_epochs=1), min(seeds, 2)
        objective, baselines = ObjectiveConfig(cost_weights=(0.3,)), replace(ALL_BASELINES, sequential_weights=(0.3,))
    return [Config(train=replace(train, seed=seed), objective=objective, baselines=baselines) for seed in range(seeds)]


def run_seed(config: Config, directory: Path) -> dict[str, Any]:
    """The result of one seed: read if it is there, else run, or resumed if it was begun."""
    if (directory / RESULT).exists():
        return read_result(directory)
    begun = directory.exists() and any(directory.iterdir())
    directory.mkdir(parents=True, exist_ok=True)
    return run(config, directory, resume=begun, progress=TerminalProgress())


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % interval (Student) of paired values, one per seed."""
    mean, n = float(values.mean()), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half}


def tabulate(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics over seeds of what the runs reached.

    Returns:
      "methods": name -> accuracy and EDP relative to joint, both with interval, and the values of every seed;
      "accuracy_difference_to_float32", "gap", "gap_polished": intervals; "equal_accuracy": share of seeds in which
      sequential and joint are within half a point.
    """
    rows = [{row["method"]: row for row in result["summary"]} for result in results]
    methods = [method for method in rows[0] if all(method in row for row in rows)]

    def column(method: str, key: str) -> np.ndarray:
        return np.array([row[method][key] for row in rows], float)

    table: dict[str, Any] = {"seeds": len(rows), "methods": {}}
    for method in methods:
        entry: dict[str, Any] = {
            "edp_js": column(method, "edp_js").tolist(),
            "bits_mean": column(method, "bits_mean").tolist(),
        }
        logs = interval(np.log(column(method, "edp_js") / column("joint", "edp_js")))
        entry["edp_to_joint"] = {name: float(np.exp(value)) for name, value in logs.items()}
        accuracy = column(method, "accuracy")
        entry["accuracy"] = interval(accuracy) | {"values": accuracy.tolist()}
        table["methods"][method] = entry
    joint = column("joint", "accuracy")
    if "float32" in methods:
        table["accuracy_difference_to_float32"] = interval(joint - column("float32", "accuracy"))
    if "sequential" in methods:
        table["equal_accuracy"] = float(np.mean(np.abs(joint - column("sequential", "accuracy")) <= 0.005))
    for name in ("gap", "gap_polished"):
        table[name] = interval(column("joint", name))
    return table


def show(table: dict[str, Any]) -> None:
    """Print the table for people."""
    rich = Table(title=f"Digits, {table['seeds']} paired seeds, 95 % intervals")
    for heading in ("method", "test accuracy (%)", "EDP relative to joint", "mean bits"):
        rich.add_column(heading)
    for method, entry in table["methods"].items():
        accuracy, ratio = entry["accuracy"], entry["edp_to_joint"]
        rich.add_row(
            method,
            f"{100 * accuracy['mean']:.2f} [{100 * accuracy['low']:.2f}, {100 * accuracy['high']:.2f}]",
            f"{ratio['mean']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]",
            f"{np.mean(entry['bits_mean']):.2f}",
        )
    console = Console(width=110)
    console.print(rich)
    for name in ("accuracy_difference_to_float32", "gap", "gap_polished"):
        if name in table:
            value = table[name]
            console.print(
                f"{name}: {100 * value['mean']:+.2f} % [{100 * value['low']:+.2f}, {100 * value['high']:+.2f}]"
            )
    if "equal_accuracy" in table:
        console.print(f"seeds in which sequential and joint are within half a point: {table['equal_accuracy']:.0%}")


def main(
    seeds: Count = 5,
    out: Path = Path("runs/table_joint"),
    quick: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Run and tabulate.

    Args:
      seeds: paired runs.
      out: directory that holds one run per seed.
      quick: two seeds and few epochs, to see it work.
      as_json: print one JSON object instead of the table.
    """
    out = out / "quick" if quick else out
    chosen = configs(seeds, quick)
    results = [run_seed(config, out / f"seed-{config.train.seed}") for config in chosen]
    table = tabulate(results)
    if as_json:
        print(json.dumps(table))
    else:
        show(table)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
