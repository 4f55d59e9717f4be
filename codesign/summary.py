"""What a finished method reached, as plain numbers: rows of the summary, data of the figures, design.yaml and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingABC
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codesign import mapper
from codesign.cost_report import describe_cost, describe_operations, explain_dearest, headline, training_cost
from codesign.design import LEVELS, SEARCHED_VARIABLES, physical_values
from codesign.evaluation import Evaluated
from codesign.tracing import Workload
from codesign.uncertainty import interval
from hw.arithmetic import product_cycles
from hw.chip import Chip
from hw.mapping import Mapping
from hw.operation import LOOPS, OPERANDS, PASSES
from hw.schedule import StepCost
from hw.units import BYTE, MHZ, MM2

OPERAND_BITS = ("weights", "inputs", "input_grad", "weight_grad")
_REST = ("vector unit and I/O", "leakage")  # rows of the energy figure that belong to no layer
_UNIT_KEYS = {"vdd": "vdd_v"}


def summarise(workload: Workload, found: Evaluated, bits: jax.Array, layers: Sequence[str]) -> dict[str, Any]:
    """Cost and design of one method, JSON-like.

    Args:
      workload: what runs.
      found: the chip with its mappings and cost.
      bits: (P, 4).
      layers: names of the P products.

    Returns:
      What `describe_cost` tells of the training step, its "operations", and "explanations" of the dearest; "samples" of
      its headline numbers, for comparisons with other designs; "bits", "chip", "mappings", "figures".
    """
    costed, described = training_cost(workload, found, bits), describe_bits(workload, bits, layers)
    cost = costed.cost
    utilisation = zip(PASSES, np.asarray(cost.utilisation), strict=True)
    return describe_cost(costed) | {
        "bits_mean": mean_bits(described),
        "utilisation": {name: float(share) for name, share in utilisation if share > 0},
        "spilled_kib": float(cost.spilled_bits.sum()) / BYTE / 1024,
        "peak_resident_kib": float(cost.occupancy.max()) / BYTE / 1024,
        "samples": {name: samples.tolist() for name, samples in headline(costed.drawn).items()},
        "bits": described,
        "chip": describe_chip(found.chip),
        "mappings": describe_mappings(workload.labels, found.candidates, found.chip.names),
        "operations": describe_operations(costed),
        "explanations": explain_dearest(costed),
        "figures": {
            "energy_breakdown": energy_table(workload, cost, layers)
            | {"intervals_j": energy_intervals(workload, costed.drawn, layers)},
            "roofline": roofline_data(workload, found.chip, cost),
            "area": area_parts(found.chip),
        },
    }


def describe_bits(workload: Workload, bits: jax.Array, layers: Sequence[str]) -> dict[str, dict[str, float | int]]:
    """Layer -> operand -> bits, without the errors of passes that training does not need."""
    passes = {(int(product), name) for product, name in zip(workload.product, workload.passes, strict=True)}
    return {
        layer: {
            operand: whole(width)
            for operand, width in zip(OPERAND_BITS, row, strict=True)
            if operand not in PASSES or (i, operand) in passes
        }
        for i, (layer, row) in enumerate(zip(layers, np.asarray(bits, float).tolist(), strict=True))
    }


def mean_bits(described: MappingABC[str, MappingABC[str, float]]) -> float:
    """Mean over the widths of `describe_bits`."""
    return float(np.mean([width for row in described.values() for width in row.values()]))


def read_bits(described: MappingABC[str, MappingABC[str, float]]) -> jax.Array:
    """The table of bits (P, 4) of `describe_bits`; NaN where no pass reads it.

    Raises:
      ValueError: it is none, or a width is no number from 1 to 32.
    """
    with _as_described("bits by layer and operand"):
        errors = dict.fromkeys(PASSES, np.nan)
        bits = np.array([[(errors | dict(row))[name] for name in OPERAND_BITS] for row in described.values()], float)
        if not np.all(np.isnan(bits) | ((bits >= 1) & (bits <= 32))):
            raise ValueError("a width outside 1 to 32")
    return jnp.asarray(bits, jnp.float32)


def whole(value: float) -> float | int:
    """A whole number as an integer, which is how people write it."""
    return int(value) if float(value).is_integer() else value


def describe_chip(chip: Chip) -> dict[str, Any]:
    """A chip's quantities for people and for `codesign.design.with_values`, units in the key names."""
    values = {_UNIT_KEYS.get(name, name): whole(round(value, 6)) for name, value in physical_values(chip).items()}
    return values | {
        "mac": chip.mac.style,
        "node_nm": whole(chip.technology.node_nm),
        "frequency_mhz": float(chip.frequency()) / MHZ,
        "area_mm2": float(chip.area().total) / MM2,
    }


def chip_values(described: MappingABC[str, Any]) -> dict[str, jax.Array]:
    """The free quantities of a described chip, as `codesign.design.with_values` takes them.

    Raises:
      ValueError: there are none, or one is no number that a chip can have.
    """
    keys = {name: _UNIT_KEYS.get(name, name) for name in SEARCHED_VARIABLES}
    with _as_described("quantities of the chip"):
        values = {name: float(described[key]) for name, key in keys.items() if key in described}
        if not values:
            raise ValueError("none")
        for name, value in values.items():
            least = 0.0 if name in (*LEVELS, "resident_fraction") else np.nextafter(0.0, 1.0)
            if not least <= value < (1.0 if name == "resident_fraction" else np.inf):
                raise ValueError(f"{value} for {name}")
    return {name: jnp.asarray(value) for name, value in values.items()}


def describe_mappings(labels: Sequence[str], candidates: mapper.Candidates, levels: Sequence[str]) -> dict[str, Any]:
    """The first candidate of every operation: per level, outermost first, its loops in order and what it keeps.

    Temporal loops are listed inner to outer; absent loops have factor 1.
    """
    best = jax.tree.map(lambda x: np.asarray(x[:, 0]), candidates.mapping)
    described = {}
    for i, label in enumerate(labels):
        described[label] = {
            levels[l]: {
                "temporal": [
                    [LOOPS[d], round(float(best.temporal[i, l, d]))]
                    for d in np.argsort(best.order[i, l])
                    if best.temporal[i, l, d] > 1
                ],
                "columns": _factors(best.spatial[i, l, 0]),
                "rows": _factors(best.spatial[i, l, 1]),
                "keeps": [name for name, kept in zip(OPERANDS, best.keep[i, l], strict=True) if kept],
            }
            for l in reversed(range(len(levels)))
        }
    return described


def _factors(row: np.ndarray) -> dict[str, int]:
    return {loop: round(float(n)) for loop, n in zip(LOOPS, row, strict=True) if n > 1}


def read_mapping(described: MappingABC[str, Any], levels: Sequence[str]) -> Mapping:
    """The mapping of one operation from `describe_mappings`; absent loops keep their place outside the listed ones.

    Raises:
      ValueError: it is none.
    """
    with _as_described("a mapping by level"):
        return _read_mapping(described, levels)


def _read_mapping(described: MappingABC[str, Any], levels: Sequence[str]) -> Mapping:
    shape = (len(levels), len(LOOPS))
    temporal, order = np.ones(shape, np.float32), np.zeros(shape, np.int32)
    spatial, keep = np.ones((len(levels), 2, len(LOOPS)), np.float32), np.zeros((len(levels), 3), np.float32)
    for l, name in enumerate(levels):
        level = described[name]
        listed = [LOOPS.index(loop) for loop, _ in level["temporal"]]
        order[l, listed + [d for d in range(len(LOOPS)) if d not in listed]] = np.arange(len(LOOPS))
        temporal[l, listed] = [factor for _, factor in level["temporal"]]
        for axis, key in enumerate(("columns", "rows")):
            for loop, factor in level[key].items():
                spatial[l, axis, LOOPS.index(loop)] = factor
        keep[l, [OPERANDS.index(operand) for operand in level["keeps"]]] = 1
    return Mapping(jnp.asarray(temporal), jnp.asarray(spatial), jnp.asarray(order), jnp.asarray(keep))


@contextlib.contextmanager
def _as_described(what: str) -> Iterator[None]:
    """Whatever goes wrong with what a file says is told in one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected {what} as a run writes them, got {type(error).__name__}: {error}") from None


def energy_table(workload: Workload, cost: StepCost, layers: Sequence[str]) -> dict[str, Any]:
    """Arguments of `codesign.plots.energy_breakdown`: joules by layer, pass and component; they add up to the total.

    What belongs to no layer's products is in two rows of their own: vector work with spills and external data, and leakage.
    """
    levels, components = cost.access_energy.shape[1], cost.components
    passes = (*PASSES, "other")
    energy = np.zeros((len(layers) + len(_REST), len(passes), len(components)))
    mac, access = np.asarray(cost.mac_energy, float), np.asarray(cost.access_energy, float).sum(axis=2)
    control = np.asarray(cost.operation_energy, float) - mac - access.sum(axis=1)
    for i, (product, pass_) in enumerate(zip(np.asarray(workload.product), workload.passes, strict=True)):
        energy[product, passes.index(pass_), : levels + 2] += [mac[i], *access[i], control[i]]
    rest = np.asarray(cost.breakdown, float) - energy.sum(axis=(0, 1))
    leakage = components.index("leakage")
    energy[-1, -1, leakage], rest[leakage] = rest[leakage], 0.0
    energy[-2, -1] = rest.clip(min=0.0)  # float32: a component without vector work may come out below zero
    return {"energy_j": energy, "layers": [*layers, *_REST], "passes": list(passes), "components": list(components)}


def energy_intervals(workload: Workload, drawn: StepCost, layers: Sequence[str]) -> list[Any]:
    """[low, high] of the bars of `energy_table`, each (layers, passes) in joules, from samples of the cost."""
    passes = (*PASSES, "other")
    operation_energy = np.asarray(drawn.operation_energy, float)
    energy = np.zeros((len(operation_energy), len(layers) + len(_REST), len(passes)))
    for i, (product, pass_) in enumerate(zip(np.asarray(workload.product), workload.passes, strict=True)):
        energy[:, product, passes.index(pass_)] += operation_energy[:, i]
    energy[:, -1, -1] = drawn.leakage_energy
    energy[:, -2, -1] = np.asarray(drawn.energy, float) - energy.sum(axis=(1, 2))
    return interval(energy)


def roofline_data(workload: Workload, chip: Chip, cost: StepCost) -> dict[str, Any]:
    """Arguments of `codesign.plots.roofline`, for the traffic of the shared SRAM, which every operation passes through."""
    macs = 2.0 * np.asarray(workload.step.operations.macs) * np.asarray(workload.step.multiplicity)
    frequency = float(chip.frequency())
    per_bit = float(chip.energy_per_bit()[-2].mean() + chip.wire_energy_per_bit()[-2])
    shared = np.asarray(cost.access_energy, float)[:, -2].sum(axis=1)
    num_bytes = np.maximum(shared / per_bit / BYTE, 1.0)  # an operation that bypasses it all would lie at infinity
    points = [
        {"name": name, "pass": pass_, "operations_per_byte": n / b, "operations_per_second": n / t}
        for name, pass_, n, b, t in zip(
            workload.names, workload.passes, macs, num_bytes, np.asarray(cost.operation_latency, float), strict=True
        )
    ]
    array = 2.0 * float(chip.num_macs()) * frequency
    widths = (4, 8) if chip.mac.style in ("slices", "serial") else (int(chip.mac.widths[0]),)
    peaks = {f"{b} x {b} bits": array / float(product_cycles(chip.mac, jnp.full(2, float(b)))) for b in widths}
    bandwidths = {"shared SRAM": float(chip.bits_per_cycle()[-2]) * frequency / BYTE}
    return {"points": points, "peaks": peaks, "bandwidths": bandwidths}


def area_parts(chip: Chip) -> dict[str, float]:
    """Area in mm2 by component, the memories on chip by name."""
    area = chip.area()
    memories = {
        name: float(part) / MM2 for name, part in zip(chip.names, area.memories, strict=True) if float(part) > 0
    }
    return {
        "mac": float(area.macs) / MM2,
        **memories,
        "vector": float(area.vector) / MM2,
        "control": float(area.control) / MM2,
    }
