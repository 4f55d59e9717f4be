"""Costs in words: which loops run where, where the joules go, what bounds latency, what does not fit and why."""

from __future__ import annotations

import dataclasses
import functools
import html
import math
import textwrap
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hw.accesses import Accesses, count
from hw.chip import AXES, Chip
from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, PASSES, Operation, stack_operations
from hw.units import MM2, UNITS

if TYPE_CHECKING:
    from hw.cost import Cost
    from hw.schedule import StepCost

PREFIXES = {12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "u", -9: "n", -12: "p", -15: "f"}
# The counts behind each direction of traffic, in the words of `Accesses`.
DIRECTIONS = {"reads": ("reads",), "fills": ("fills",), "updates": ("updates", "finals")}
_LEAST_SHARE = 0.1  # of a component's joules, for a constant to be named


def cost_text(
    cost: Cost,
    operation: Operation,
    mapping: Mapping,
    chip: Chip,
    bits: jax.Array,
    density: jax.Array,
    resident: jax.Array,
) -> str:
    """Text for people; see `Cost.explain`."""
    accesses, joules, shares = _details(chip, operation, mapping, bits, density, resident)
    sections = [
        _operation_line(operation, bits),
        _loop_nest(mapping, chip),
        _energy_table(cost, chip, accesses, np.asarray(joules, float), np.asarray(resident, float)),
        _latency(cost, mapping, chip),
        _misfits(cost, chip),
        _sources(chip, {name: np.asarray(share, float) for name, share in shares.items()}),
    ]
    return "\n\n".join(sections)


def step_cost_html(cost: StepCost) -> str:
    """Table of a step's cost for notebooks: joules by component, utilisation, what does not fit."""
    energy = float(cost.energy)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{quantity(joules, 'J')}</td><td>{float(joules) / energy:.1%}</td></tr>"
        for name, joules in zip(cost.components, np.asarray(cost.breakdown), strict=True)
    )
    used = zip(PASSES, np.asarray(cost.utilisation, float), strict=True)
    utilisation = ", ".join(f"{name} {share:.1%}" for name, share in used if share > 0)
    misfits = int((np.asarray(cost.violation) > 0).any(axis=-1).sum())
    fits = "every operation fits" if misfits == 0 else f"{misfits} operations do not fit"
    return (
        f"<p>{quantity(energy, 'J')}, {quantity(cost.latency, 's')}, {float(cost.area) / MM2:.3g} mm<sup>2</sup>; "
        f"utilisation: {utilisation}; {fits}</p>"
        f"<table><tr><th>component</th><th>energy</th><th>share</th></tr>{rows}</table>"
    )


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


# It runs once, for people: without LLVM's optimisations it compiles in half the time.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _details(
    chip: Chip, operation: Operation, mapping: Mapping, bits: jax.Array, density: jax.Array, resident: jax.Array
) -> tuple[Accesses, jax.Array, dict[str, jax.Array]]:
    """Counts, joules (3, L, 3) by direction, level and operand, and constant -> share of each component's joules.

    Both come from the price itself: it is linear in the counts, so a direction's joules are the price of its counts
    alone; and the share of a component's joules that scales with a constant is their logarithmic derivative by it.
    """
    from hw.cost import price  # which imports this module

    accesses = count(operation, mapping)

    def only(names: tuple[str, ...]) -> Accesses:
        counts = {name: getattr(accesses, name) for group in DIRECTIONS.values() for name in group}
        return dataclasses.replace(
            accesses, **{name: words if name in names else jnp.zeros_like(words) for name, words in counts.items()}
        )

    def access_energy(accesses: Accesses) -> jax.Array:
        return price(chip, operation, accesses, bits, density, resident).access_energy

    def components(values: dict[str, Any]) -> jax.Array:
        drawn = dataclasses.replace(chip, technology=dataclasses.replace(chip.technology, values=values))
        cost = price(drawn, operation, accesses, bits, density, resident)
        return jnp.concatenate([cost.access_energy.sum(axis=1), jnp.stack([cost.mac_energy, cost.control_energy])])

    joules = jax.vmap(access_energy)(stack_operations([only(names) for names in DIRECTIONS.values()]))
    values = {name: jnp.asarray(value, bits.dtype) for name, value in chip.technology.values.items()}
    energy, slopes = components(values), jax.jacrev(components)(values)
    scale = jnp.where(energy > 0.0, energy, 1.0)
    return accesses, joules, {name: slopes[name] * value / scale for name, value in values.items()}


def _operation_line(operation: Operation, bits: jax.Array) -> str:
    bounds = " ".join(f"{loop}{bound:.0f}" for loop, bound in zip(LOOPS, np.asarray(operation.bounds), strict=True))
    operand = OPERANDS[int(np.argmax(np.asarray(operation.accumulated)))]
    widths = ", ".join(f"{name} {width:g}" for name, width in zip(OPERANDS, np.asarray(bits, float), strict=True))
    return f"{bounds}: {quantity(operation.macs, 'MACs')}, accumulates {operand}; bits: {widths}"


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


def _energy_table(cost: Cost, chip: Chip, accesses: Accesses, joules: np.ndarray, resident: np.ndarray) -> str:
    total, levels = float(cost.energy), np.asarray(cost.access_energy, float).sum(axis=1)
    lines = [
        f"energy {quantity(total, 'J')}; words and joules of every level, by direction and operand",
        f"{'':20}" + "".join(f"{operand:>20}" for operand in OPERANDS) + f"{'share':>9}",
    ]
    for level in reversed(range(len(chip.names))):
        lines.append(f"{chip.names[level]:10}{quantity(levels[level], 'J'):<70}{levels[level] / total:9.1%}")
        for direction, energy in zip(DIRECTIONS, joules[:, level], strict=True):
            words = np.asarray(getattr(accesses, direction)[level] * accesses.instances[level], float)
            if words.any():
                pairs = zip(words, energy, strict=True)
                cells = "".join(
                    f"{quantity(n, '').strip():>10}{quantity(j, 'J'):>10}" if n else f"{'-':>20}" for n, j in pairs
                )
                lines.append(f"{'':10}{direction:10}{cells}")
    for name, value in (("MACs", cost.mac_energy), ("control", cost.control_energy)):
        lines.append(f"{name:10}{quantity(value, 'J'):<70}{float(value) / total:9.1%}")
    if resident.any():
        kept = ", ".join(f"{name} {share:.0%}" for name, share in zip(OPERANDS, resident, strict=True) if share)
        lines += _wrapped(
            f"resident in {chip.names[-2]}: {kept}. Words are those of the mapping alone; of the {chip.names[-1]}'s, this "
            "share stays where it is and costs nothing"
        )
    return "\n".join(lines)


def _latency(cost: Cost, mapping: Mapping, chip: Chip) -> str:
    cycles = dict(zip(chip.names, np.asarray(cost.level_cycles, float), strict=True))
    cycles = {"MACs": float(cost.compute_cycles)} | cycles
    bound = max(cycles, key=lambda name: cycles[name])
    used = float(np.prod(np.asarray(mapping.spatial)))
    slots = float(np.prod(np.asarray(mapping.temporal)))
    shares = {
        f"spatial ({used:g} of {float(chip.num_macs()):g} MACs)": used / float(chip.num_macs()),
        "temporal (full tiles)": float(cost.macs) / (used * slots),
        "bandwidth (not waiting for a memory)": float(cost.compute_cycles) / float(cost.cycles),
    }
    return "\n".join(
        [
            f"latency {quantity(cost.latency, 's')}, {float(cost.cycles):.6g} cycles, bound by {bound}",
            "cycles: " + ", ".join(f"{name} {value:.6g}" for name, value in cycles.items()),
            f"utilisation {math.prod(shares.values()):.1%} = "
            + " x ".join(f"{share:.1%} {name}" for name, share in shares.items()),
            f"cycles per product {float(cost.compute_cycles) / slots:.3g}",
        ]
    )


def _misfits(cost: Cost, chip: Chip) -> str:
    limits = zip(chip.limit_names(), np.asarray(chip.limits(), float), np.asarray(cost.violation, float), strict=True)
    lines = [
        f"does not fit: {name} {limit:.6g}, too much by {limit * over:.4g}{'' if name.startswith('fan-out') else ' bits'}"
        for name, limit, over in limits
        if over
    ]
    return "\n".join(lines) or "fits"


def _sources(chip: Chip, shares: dict[str, np.ndarray]) -> str:
    """Which constants with error bars the joules of each component scale with, and where these come from."""
    technology, components = chip.technology, (*chip.names, "MACs", "control")
    constants = {name: technology.constant(name) for name in shares}
    doubted = [name for name, constant in constants.items() if constant.low < constant.high]
    lines = ["constants that the joules of each component scale with, and by how much"]
    named: dict[str, None] = {}
    for index, component in enumerate(components):
        mine = {name: shares[name][index] for name in doubted if abs(shares[name][index]) >= _LEAST_SHARE}
        ordered = sorted(mine, key=lambda name: -abs(mine[name]))
        named |= dict.fromkeys(ordered)
        lines += _wrapped(f"{component:10}" + (", ".join(f"{name} {mine[name]:.0%}" for name in ordered) or "-"))
    for name in named:
        constant = constants[name]
        value, low, high = (bound / UNITS[constant.unit] for bound in (constant.value, constant.low, constant.high))
        unit = "" if constant.unit == "1" else f" {constant.unit}"
        lines += _wrapped(f"{name} = {value:.4g}{unit} ({low:.3g} to {high:.3g}): {constant.source}")
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 110, subsequent_indent=" " * 10)
