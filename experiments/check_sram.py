"""Compares the SRAM laws with a table of CACTI results: energy, area, leakage.

    python -m experiments.check_sram sweep.csv --json

The table has the columns node_nm, device, ports, capacity_bytes, width_bits, temp_K, read_energy_pJ, write_energy_pJ,
leak_subthreshold_mW, leak_gate_mW, area_mm2. Energy is the geometric mean of read and write; leakage is compared at
300 K only, where its law holds. Takes two seconds.
"""

import csv
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from codesign.rundir import blaming
from experiments import command_line
from hw import memory
from hw.memory import PORTS, MemoryLevel
from hw.technology import DEVICES, NODE_RANGE_NM, Technology, make_technology
from hw.units import BYTE, MILLIWATT, MM2, PJ

NUMBERS = (
    "node_nm", "capacity_bytes", "width_bits", "temp_K", "read_energy_pJ", "write_energy_pJ", "leak_subthreshold_mW",
    "leak_gate_mW", "area_mm2",
)  # fmt: skip
CHOICES = {"device": tuple(f"itrs-{device}" for device in DEVICES), "ports": PORTS}
LEAKAGE_TEMPERATURE = 300.0


@dataclass(frozen=True)
class Sweep:
    """Rows of a table as arrays of shape (n,): what was asked of CACTI and what it answered, in SI units and bits."""

    node_nm: np.ndarray
    device: np.ndarray
    ports: np.ndarray
    size_bits: np.ndarray
    port_bits: np.ndarray
    temperature: np.ndarray
    energy: np.ndarray
    area: np.ndarray
    leakage: np.ndarray

    def rows(self, index: np.ndarray) -> "Sweep":
        """The rows where `index` is true."""
        return Sweep(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def level(self) -> MemoryLevel:
        """All rows as one memory level of a single bank; they must have the same ports."""
        size = jnp.asarray(self.size_bits)
        return MemoryLevel(size, jnp.asarray(self.port_bits), jnp.ones_like(size), "sram", str(self.ports[0]))

    def technology(self) -> Technology:
        """One technology for all rows: every constant an array of shape (n,)."""
        processes = zip(self.node_nm, self.device, strict=True)
        technologies = [make_technology(float(node), device=str(device)) for node, device in processes]
        values: dict[str, jax.Array | float] = {
            name: jnp.array([technology[name] for technology in technologies]) for name in technologies[0].values
        }
        return dataclasses.replace(technologies[0], values=values)


def read_sweep(path: Path) -> Sweep:
    """Reads a table.

    Raises:
      ValueError: a row or the header is malformed; the message starts with the line and names the field.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            missing = [name for name in (*NUMBERS, *CHOICES) if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"line 1: field {missing[0]} is missing; expected the columns of a CACTI table")
            records = [(reader.line_num, record) for record in reader]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num + 1}: {error}; expected a CACTI table") from None
    if not records:
        raise ValueError("line 2: field node_nm is missing; expected at least one row")
    numbers = {name: np.array([_number(name, record[name], line) for line, record in records]) for name in NUMBERS}
    choices = {name: np.array([_choice(name, record[name], line) for line, record in records]) for name in CHOICES}
    return Sweep(
        node_nm=numbers["node_nm"],
        device=np.array([device.removeprefix("itrs-") for device in choices["device"]]),
        ports=choices["ports"],
        size_bits=numbers["capacity_bytes"] * BYTE,
        port_bits=numbers["width_bits"],
        temperature=numbers["temp_K"],
        energy=np.sqrt(numbers["read_energy_pJ"] * numbers["write_energy_pJ"]) * PJ,
        area=numbers["area_mm2"] * MM2,
        leakage=(numbers["leak_subthreshold_mW"] + numbers["leak_gate_mW"]) * MILLIWATT,
    )


def relative_errors(sweep: Sweep) -> dict[str, np.ndarray]:
    """|law / CACTI - 1| of energy, area and leakage for every row, shape (n,) each."""
    errors = {name: np.empty(len(sweep.energy)) for name in ("energy", "area", "leakage")}
    for ports in sorted(set(sweep.ports)):
        index = sweep.ports == ports
        rows = sweep.rows(index)
        level, technology = rows.level(), rows.technology()
        vdd = technology["sram.vdd"]
        errors["energy"][index] = memory.access_energy(level, technology, vdd)[0] / rows.energy - 1.0
        errors["area"][index] = memory.area(level, technology) / rows.area - 1.0
        errors["leakage"][index] = memory.leakage_power(level, technology, vdd) / rows.leakage - 1.0
    return {name: np.abs(error) for name, error in errors.items()}


def summarise(sweep: Sweep) -> dict[str, dict[str, float]]:
    """Median, 90th percentile and maximum of the relative errors; leakage also per device type."""
    errors = relative_errors(sweep)
    cool = sweep.temperature == LEAKAGE_TEMPERATURE
    summary = {"energy": _spread(errors["energy"]), "area": _spread(errors["area"])}
    summary["leakage"] = _spread(errors["leakage"][cool])
    for device in sorted(set(sweep.device)):
        summary[f"leakage_{device}"] = _spread(errors["leakage"][cool & (sweep.device == device)])
    return summary


def main(file: tyro.conf.Positional[Path], as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Compare the SRAM laws with a table of CACTI results.

    Args:
      file: table in the CSV format described above.
      as_json: print one JSON object instead of a table.
    """
    with blaming(file):
        sweep = read_sweep(file)
    summary = summarise(sweep)
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{'relative error':16}{'rows':>6}{'median':>9}{'p90':>9}{'max':>9}")
    for name, spread in summary.items():
        print(f"{name:16}{spread['rows']:6}" + "".join(f"{spread[key]:9.3f}" for key in ("median", "p90", "max")))


def _number(name: str, text: str | None, line: int) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf or (number == 0.0 and not name.startswith("leak_")):
        raise ValueError(f"line {line}: field {name}: expected a positive number, got {text!r}")
    smallest, largest = NODE_RANGE_NM
    if name == "node_nm" and not smallest <= number <= largest:
        raise ValueError(f"line {line}: field node_nm: expected {smallest} to {largest}, got {text}")
    return number


def _choice(name: str, text: str | None, line: int) -> str:
    if text not in CHOICES[name]:
        raise ValueError(f"line {line}: field {name}: expected one of {', '.join(CHOICES[name])}, got {text!r}")
    return text


def _spread(error: np.ndarray) -> dict[str, float]:
    if not error.size:
        return {"rows": 0, "median": math.nan, "p90": math.nan, "max": math.nan}
    return {
        "rows": int(error.size),
        "median": float(np.median(error)),
        "p90": float(np.percentile(error, 90)),
        "max": float(error.max()),
    }


if __name__ == "__main__":
    sys.exit(command_line.run(main))
