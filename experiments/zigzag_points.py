"""Loop nests that ZigZag evaluated, one JSON document. Its conventions differ from ours and are met as follows.

- Each operand has its own loops per memory: one case per operand, of which only that operand is used.
- A memory may run the same loop twice: it becomes several levels, of which the outermost keeps the operand.
- Operands rest at the MAC while they do not change: a level of one element below all others keeps the read operands.
- Windows never share their halo, and inputs that no window touches are not counted: `hw.accesses.ZIGZAG`.
- Partial sums are read only where a sum continues: reads of the whole chip are updates less one per output, and a
  refill goes to one of the copies that are reduced.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.reference_points import Case, Entry, Record, parse, ranks
from hw import LOOPS, OPERANDS, PASSES, ZIGZAG, Accesses, Mapping, Operation, make_mapping, make_operation

NAMES = {"B": "N", "K": "K", "C": "C", "OX": "P", "OY": "Q", "FX": "R", "FY": "S", "G": "G"}
WIRES = {"O": "O", "W": "I2", "I": "I1"}
WINDOW = re.compile(r"i[xy]=(\d+)\*o[xy]\+(\d+)\*f[xy]")


@dataclass(frozen=True)
class ZigzagPoint:
    """One point of a ZigZag file.

    Attributes:
      roles: our operand of each of ZigZag's (a weight gradient is an output O that is our `weights`).
      memories: names of the memories of each of ZigZag's operands, innermost first.
      kept: index of the level that stands for each of them.
    """

    name: str
    cases: list[Case]
    record: Record
    layer: Record
    arch: Record
    roles: dict[str, str]
    memories: dict[str, list[str]]
    kept: dict[str, list[int]]

    conventions = ZIGZAG

    def entries(self, counts: list[Accesses]) -> Iterator[Entry]:
        widths = {}
        for operand, accesses in zip(WIRES, counts, strict=True):
            expected = self.record.record("element_moves").record(operand)
            bits = self.record.record("move_precision_bits").record(operand)
            for memory, moves in self._moves(operand, accesses).items():
                for kind, number in moves.items():
                    yield Entry(f"{memory} {operand} {kind}", expected.record(memory).number(kind), number)
                    widths[operand, memory, kind] = bits.record(memory).number(kind)
        expected_energy = self.record.number("linear_energy_total_pJ")
        yield Entry("linear energy pJ", expected_energy, self.energy(counts, widths), relative=1e-9)
        cycles = self.record.number("ideal_temporal_cycle")
        yield Entry("ideal temporal cycles", cycles, float(counts[0].compute_cycles))

    def energy(self, counts: list[Accesses], widths: dict[tuple[str, str, str], float]) -> float:
        """Linear energy in picojoules, with bits of the words by operand, memory and direction."""
        energy = float(counts[0].macs) * self.arch.record("operational_array").number("unit_energy")
        for operand, accesses in zip(WIRES, counts, strict=True):
            for memory, moves in self._moves(operand, accesses).items():
                for kind, number in moves.items():
                    energy += number * widths[operand, memory, kind] * self.energy_per_bit(memory, operand, kind)
        return energy

    def _moves(self, operand: str, accesses: Accesses) -> dict[str, dict[str, float]]:
        """Words of the whole chip by memory and direction."""
        o = OPERANDS.index(self.roles[operand])
        kept = self.kept[operand]
        total = {
            kind: [float(getattr(accesses, kind)[l, o] * accesses.instances[l]) for l in kept]
            for kind in ("reads", "fills", "updates", "entering")
        }
        moves = {}
        for i, memory in enumerate(self.memories[operand]):
            is_top = i == len(kept) - 1
            if operand == "O":
                size = float(accesses.footprint[kept[-1], o])
                parent_updates = size if is_top else total["updates"][i + 1]
                moves[memory] = {
                    "rd_out_to_low": total["updates"][i] - size,
                    "wr_in_by_low": total["updates"][i],
                    "rd_out_to_high": 0.0 if is_top else total["entering"][i],
                    "wr_in_by_high": parent_updates - size,
                }
            else:
                moves[memory] = {"rd_out_to_low": total["reads"][i], "wr_in_by_high": total["fills"][i]}
        return moves

    def energy_per_bit(self, memory: str, operand: str, kind: str) -> float:
        """Picojoules per bit through the port that serves a direction; DRAM refills cost nothing."""
        record = self.arch.record("memories").record(memory)
        cost = record.number("r_cost" if kind.startswith("rd") else "w_cost")
        served = f"{WIRES[operand]}, {DIRECTIONS[kind]}"
        for port in record.records("ports"):
            if served in port.get("allocation", list):
                return cost / port.number("bandwidth_max", positive=True)
        return 0.0


DIRECTIONS = {"rd_out_to_low": "tl", "wr_in_by_low": "fl", "rd_out_to_high": "th", "wr_in_by_high": "fh"}


def read_zigzag(path: Path) -> list[ZigzagPoint]:
    """All points of a document.

    Raises:
      FormatError: the document is no JSON, or lacks a field, with the line and the field; or it has no points.
    """
    document = Record(parse(path.read_text(), 1), 1)
    layers = {layer.get("name", str): layer for layer in document.records("layers")}
    points = []
    for record in document.records("points"):
        name = record.get("layer", str)
        if name not in layers:
            raise record.error(f"unknown layer {name[:40]!r}")
        arch = document.record("archs").record(record.get("arch", str))
        with record.blamed():
            points.append(zigzag_point(record, layers[name], arch))
    if not points:
        raise document.error("no points", "points")
    return points


def zigzag_point(record: Record, layer: Record, arch: Record) -> ZigzagPoint:
    """One point: a mapping of a layer on a chip."""
    roles = _roles(layer.get("equation", str))
    window = {"x": (1, 1), "y": (1, 1)}
    for relation in layer.get("dimension_relations", list):
        found = WINDOW.fullmatch(relation)
        if not found:
            raise layer.error(f"unknown relation {relation!r}")
        window[relation[1]] = (int(found[1]), int(found[2]))
    names = [layer.loop(name, NAMES) for name in layer.get("loop_dims", list)]
    bounds = dict(zip(names, layer.get("loop_sizes", list), strict=True))
    operation = make_operation(
        **bounds,
        stride=(window["x"][0], window["y"][0]),
        dilation=(window["x"][1], window["y"][1]),
        pass_=next(name for name, operand in PASSES.items() if operand == roles["O"]),
    )
    cases, memories, kept = [], {}, {}
    for operand, wire in WIRES.items():
        memory = {n: arch.record("memories").record(n) for n in arch.record("memories").value}
        memory = {n: m for n, m in memory.items() if wire in m.get("operands", list)}
        memories[operand] = list(memory)
        served = [m.get("served_dimensions", list) for m in memory.values()]
        levels = record.record("temporal_mapping_inner_to_outer")
        loops = [levels.as_pairs(run, operand, NAMES) for run in levels.get(operand, list)]
        if len(loops) != len(memory):
            raise levels.error(f"{len(loops)} levels, {len(memory)} memories hold the operand", operand)
        mapping, kept[operand] = _split_levels(operation, record, loops, served, latched=operand != "O")
        cases.append(Case(operation, mapping))
    name = " ".join(str(record.value.get(key, "")) for key in ("arch", "layer", "which"))
    return ZigzagPoint(name, cases, record, layer, arch, roles, memories, kept)


def _split_levels(
    operation: Operation, record: Record, loops: list, served: list, latched: bool
) -> tuple[Mapping, list[int]]:
    """One level per run of distinct loops, above one that holds a single element; and which of them are memories."""
    temporal, spatial, order, keep = [np.ones(8)], [np.ones((2, 8))], [ranks([])], [float(latched)]
    kept, placed = [], set()
    for run, dimensions in zip(loops, served, strict=True):
        names = [name for name, _ in run]
        starts = [0] + [i for i in range(1, len(run)) if names[i] in names[_run_start(names, i) : i]]
        across = np.ones((2, 8))
        for axis, dimension in enumerate(sorted(record.record("spatial_mapping").value)):
            if dimension in dimensions and dimension not in placed:
                placed.add(dimension)
                for loop, factor in record.record("spatial_mapping").record(dimension).factors(NAMES).items():
                    across[axis, LOOPS.index(loop)] *= factor
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(run)], strict=True)):
            factors = np.ones(8)
            for name, factor in run[start:end]:
                factors[LOOPS.index(name)] = factor
            temporal.append(factors)
            spatial.append(across if i == 0 else np.ones((2, 8)))
            order.append(ranks(names[start:end]))
            keep.append(float(end == len(run)))
        kept.append(len(temporal) - 1)
    return make_mapping(operation, temporal, spatial, order, np.tile(np.array(keep)[:, None], 3)), kept


def _run_start(names: list[str], end: int) -> int:
    """Where the run of distinct loops that reaches `end` began."""
    start = 0
    for i in range(end):
        if names[i] in names[start:i]:
            start = i
    return start


def _roles(equation: str) -> dict[str, str]:
    """Our operand for each tensor of an equation, by which of batch, output and input channels it lacks."""
    lacking = {"b": "weights", "k": "inputs", "c": "outputs"}
    roles = {}
    for tensor, indices in re.findall(r"([OWI])((?:\[\w+\])+)", equation):
        missing = [operand for index, operand in lacking.items() if f"[{index}]" not in indices]
        roles[tensor] = missing[0] if len(missing) == 1 else ""
    if sorted(roles) != ["I", "O", "W"] or sorted(roles.values()) != sorted(OPERANDS):
        raise ValueError(f"equation {equation!r} is no convolution or matrix product")
    return roles
