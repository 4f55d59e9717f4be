"""Costs in words: which loops run where, where the joules go, what bounds latency, what does not fit and why."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from hw.arithmetic import FLOAT_STYLES
from hw.chip import AXES, Chip
from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, Operation
from hw.units import UNITS

if TYPE_CHECKING:
    from hw.cost import Cost

PREFIXES = {12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "u", -9: "n", -12: "p", -15: "f"}
# The constant that scales the energy of each kind of memory.
PRICED_BY = {"register": "register.energy.read", "sram": "sram.energy.k", "dram": "dram.energy"}


def cost_text(cost: Cost, operation: Operation, mapping: Mapping, chip: Chip) -> str:
    """Text for people; see `Cost.explain`."""
    sections = [
        _operation_line(operation),
        _loop_nest(mapping, chip),
        _energy_table(cost, chip),
        _latency(cost, mapping, chip),
        _misfits(cost, chip),
        _sources(chip),
    ]
    return "\n\n".join(sections)


def cost_html(cost: Cost) -> str:
    """Table of a cost for notebooks: joules by level and operand."""
    energy = np.asarray(cost.access_energy)
    head = "".join(f"<th>{operand}</th>" for operand in OPERANDS)
    rows = "".join(
        f"<tr><td>level {level}</td>"
        + "".join(f"<td>{quantity(joules, 'J')}</td>" for joules in energy[level])
        + "</tr>"
        for level in reversed(range(len(energy)))
    )
    excess = float(np.max(np.asarray(cost.violation)))
    fits = "fits" if excess == 0.0 else f"does not fit: {excess:.3g} too much of a resource"
    return (
        f"<p>{quantity(cost.energy, 'J')}, {quantity(cost.latency, 's')}, {html.escape(fits)}</p>"
        f"<table><tr><th></th>{head}</tr>{rows}"
        f"<tr><td>MACs</td><td>{quantity(cost.mac_energy, 'J')}</td></tr>"
        f"<tr><td>clock and control</td><td>{quantity(cost.control_energy, 'J')}</td></tr></table>"
    )


def quantity(value: object, unit: str) -> str:
    """A number with an SI prefix, three digits: quantity(3.1e-9, "J") is "3.1 nJ"."""
    number = float(np.asarray(value))
    if number == 0.0 or not math.isfinite(number):
        return f"{number:g} {unit}"
    power = min(max(3 * math.floor(math.log10(abs(number)) / 3), min(PREFIXES)), max(PREFIXES))
    return f"{number / 10.0**power:.3g} {PREFIXES[power]}{unit}"


def _operation_line(operation: Operation) -> str:
    bounds = " ".join(f"{loop}{bound:.0f}" for loop, bound in zip(LOOPS, np.asarray(operation.bounds), strict=True))
    operand = OPERANDS[int(np.argmax(np.asarray(operation.accumulated)))]
    return f"{bounds}: {quantity(operation.macs, 'MACs')}, accumulates {operand}"


def _loop_nest(mapping: Mapping, chip: Chip) -> str:
    lines, indent = [], ""
    for level in reversed(range(len(chip.names))):
        kept = np.flatnonzero(np.asarray(mapping.keep[level]))
        held = ", ".join(OPERANDS[operand] for operand in kept) or "nothing"
        lines.append(f"{chip.names[level]:10}{indent}[{held}]")
        temporal, order = np.asarray(mapping.temporal[level]), np.asarray(mapping.order[level])
        for loop in sorted(range(len(LOOPS)), key=lambda loop: -order[loop]):
            if temporal[loop] > 1:
                lines.append(f"{'':10}{indent}for {LOOPS[loop]} in {temporal[loop]:g}")
                indent += "  "
        spatial = np.asarray(mapping.spatial[level])
        for axis, loop in zip(*np.nonzero(spatial > 1), strict=True):
            lines.append(f"{'':10}{indent}parallel {LOOPS[loop]} in {spatial[axis, loop]:g} on {AXES[axis]}")
            indent += "  "
    return "\n".join(lines)


def _energy_table(cost: Cost, chip: Chip) -> str:
    energy, total = np.asarray(cost.access_energy, float), float(cost.energy)
    lines = [f"energy {quantity(total, 'J')}", f"{'':10}" + "".join(f"{operand:>12}" for operand in OPERANDS)]
    for level in reversed(range(len(chip.names))):
        joules = "".join(f"{quantity(value, 'J'):>12}" for value in energy[level])
        lines.append(f"{chip.names[level]:10}{joules}{energy[level].sum() / total:8.1%}")
    for name, value in (("MACs", cost.mac_energy), ("control", cost.control_energy)):
        lines.append(f"{name:10}{quantity(value, 'J'):>36}{float(value) / total:8.1%}")
    return "\n".join(lines)


def _latency(cost: Cost, mapping: Mapping, chip: Chip) -> str:
    cycles = dict(zip(chip.names, np.asarray(cost.level_cycles, float), strict=True))
    cycles = {"MACs": float(cost.compute_cycles)} | cycles
    bound = max(cycles, key=lambda name: cycles[name])
    used = float(np.prod(np.asarray(mapping.spatial)))
    slots = float(np.prod(np.asarray(mapping.temporal)))
    shares = {
        "spatial": used / float(chip.num_macs()),
        "temporal": float(cost.macs) / (used * slots),
        "bandwidth": float(cost.compute_cycles) / float(cost.cycles),
    }
    return "\n".join(
        [
            f"latency {quantity(cost.latency, 's')}, {float(cost.cycles):.6g} cycles, bound by {bound}",
            "cycles: " + ", ".join(f"{name} {value:.6g}" for name, value in cycles.items()),
            f"utilisation {math.prod(shares.values()):.1%} = "
            + " x ".join(f"{name} {share:.1%}" for name, share in shares.items()),
            f"cycles per product {float(cost.compute_cycles) / slots:.3g}",
        ]
    )


def _misfits(cost: Cost, chip: Chip) -> str:
    limits = zip(chip.limit_names(), np.asarray(chip.limits(), float), np.asarray(cost.violation, float), strict=True)
    lines = [
        f"does not fit: {name} {limit:.6g}, too much by {limit * over:.4g}" for name, limit, over in limits if over
    ]
    return "\n".join(lines) or "fits"


def _sources(chip: Chip) -> str:
    technology, style = chip.technology, chip.mac.style
    mac = f"mac.{style}.energy" if style in FLOAT_STYLES else "gate.energy"
    names = {name: PRICED_BY[kind] for name, kind in zip(chip.names, chip.kinds, strict=True)}
    lines = []
    for component, name in (
        names | {"MACs": mac, "wires": "wire.energy", "control": "control.energy", "clock": "clock.energy"}
    ).items():
        constant = technology.constant(name)
        value, low, high = (bound / UNITS[constant.unit] for bound in (constant.value, constant.low, constant.high))
        unit = "" if constant.unit == "1" else f" {constant.unit}"
        lines.append(f"{component:10}{name} = {value:.4g}{unit} ({low:.3g} to {high:.3g}): {constant.source}")
    return "\n".join(lines)
