"""Fits the constants of the SRAM laws to a table of CACTI results; prints them as hw/data/memory.yaml names them.

    python -m experiments.fit_sram sweep.csv

Least squares on log(law / CACTI) with a soft-l1 loss (scale 0.05), so that the staircase of CACTI's choices of
subarrays does not pull the laws; single- and dual-ported rows together, leakage on the rows at 300 K. The laws are
those of `hw.memory` themselves, started from the constants as they stand. Takes ten seconds.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.optimize import least_squares

from codesign.rundir import blaming
from experiments import command_line
from experiments.check_sram import LEAKAGE_TEMPERATURE, Sweep, read_sweep
from hw import memory
from hw.memory import PORTS, MemoryLevel
from hw.technology import Technology, make_technology
from hw.units import UNITS

Law = Callable[[MemoryLevel, Technology, jax.Array], jax.Array]

ENERGY = [
    f"sram.energy.{name}"
    for name in ("node", "rows", "capacity", "width0", "width", "dual_port", "dual_capacity", "dual_width")
]
AREA = [f"sram.area.{name}" for name in ("k", "node", "capacity", "periphery", "width", "dual_port")]
LEAKAGE = [f"sram.leakage.{name}" for name in ("capacity", "periphery", "dual_port")]


def fit(
    sweep: Sweep, law: Law, answer: str, shared: list[str], grouped: str = "", groups: np.ndarray | None = None
) -> dict[str, float]:
    """Fits constants of one law.

    Args:
      sweep: the table.
      law: the function of `hw.memory`.
      answer: field of the sweep that the law predicts.
      shared: constants with one value for all rows.
      grouped: constant with one value per group of rows, if any.
      groups: label of each row's group, shape (n,).

    Returns:
      The constants by name, those of groups with the label appended.
    """
    groups = np.zeros(len(sweep.energy)) if groups is None else groups
    labels, group = np.unique(groups, return_inverse=True)
    one_kind = [sweep.ports == ports for ports in PORTS if ports in sweep.ports]
    parts = [(sweep.rows(part), sweep.rows(part).technology(), group[part]) for part in one_kind]

    def residuals(logarithms: jax.Array) -> jax.Array:
        values = jnp.exp(logarithms)
        errors = []
        for rows, technology, index in parts:
            fitted: dict[str, jax.Array | float] = dict(zip(shared, values[: len(shared)], strict=True))
            if grouped:
                fitted[grouped] = values[len(shared) :][index]
            candidate = dataclasses.replace(technology, values=technology.values | fitted)
            errors.append(jnp.log(law(rows.level(), candidate, candidate["sram.vdd"]) / getattr(rows, answer)))
        return jnp.concatenate(errors)

    present = make_technology()
    start = [present[name] for name in shared]
    if grouped:
        start += [present[grouped]] * len(labels)
    solution = least_squares(
        jax.jit(residuals), np.log(start), jac=jax.jit(jax.jacfwd(residuals)), loss="soft_l1", f_scale=0.05
    )
    names = shared + ([f"{grouped} {label}" for label in labels] if grouped else [])
    return dict(zip(names, np.exp(solution.x), strict=True))


def main(file: tyro.conf.Positional[Path]) -> None:
    """Fit the constants of the SRAM laws.

    Args:
      file: table in the CSV format of experiments/check_sram.py.
    """
    with blaming(file):
        sweep = read_sweep(file)
    cool = sweep.rows(sweep.temperature == LEAKAGE_TEMPERATURE)
    processes = np.array([f"{device} {node:g}" for device, node in zip(cool.device, cool.node_nm, strict=True)])
    # float64: the finite curvature of nearly collinear exponents is lost in float32.
    with jax.enable_x64(True):
        constants = (
            fit(sweep, _energy, "energy", ENERGY, "sram.energy.k", sweep.device)
            | fit(sweep, _area, "area", AREA)
            | fit(cool, memory.leakage_power, "leakage", LEAKAGE, "sram.leakage.k", processes)
        )
    for name, value in constants.items():
        unit = make_technology().constant(name.split()[0]).unit
        print(f"{name:28}{value / UNITS[unit]:.4g} {unit}")


def _energy(level: MemoryLevel, technology: Technology, vdd: jax.Array) -> jax.Array:
    return memory.access_energy(level, technology, vdd)[0]


def _area(level: MemoryLevel, technology: Technology, vdd: jax.Array) -> jax.Array:
    return memory.area(level, technology)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
