"""Loop nests that Timeloop evaluated, one JSON object a line. Its conventions are ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reference_points import Case, Entry, FormatError, Record, parse, ranks
from hw import LOOPS, OPERANDS, TIMELOOP, Accesses, make_mapping, make_operation

HALF_DIGIT = 0.005  # energy_total_uJ is printed with two decimals
NAMES = {"Weights": "weights", "Inputs": "inputs", "Outputs": "outputs"}


@dataclass(frozen=True)
class TimeloopPoint:
    """One line of a Timeloop file; see the `Entry`s for what is compared."""

    name: str
    case: Case
    record: Record
    levels: tuple[Record, ...]

    conventions = TIMELOOP

    @property
    def cases(self) -> list[Case]:
        return [self.case]

    def entries(self, counts: list[Accesses]) -> Iterator[Entry]:
        accesses, result = counts[0], self.record.record("result")
        reliable = self.record.value.get("simple_rules_match", True)
        yield Entry("compute cycles", result.number("compute_cycles"), float(accesses.compute_cycles))
        for l, level in enumerate(self.levels):
            tensors = result.record("levels").record(level.get("name", str)).record("tensors")
            for tensor in tensors.value:
                if tensor not in NAMES:
                    raise tensors.error(f"unknown operand {tensor[:20]!r}")
                words, o = tensors.record(tensor), OPERANDS.index(NAMES[tensor])
                where = f"{level.value['name']} {tensor}"
                expected = [words.number(kind) for kind in ("reads", "fills", "updates")]
                yield Entry(f"{where} capacity", words.number("utilized_capacity"), float(accesses.footprint[l, o]))
                yield Entry(f"{where} instances", words.number("utilized_instances"), float(accesses.instances[l]))
                if tensor == "Inputs" and not reliable:
                    if "counts_no_extrapolation" not in self.record.value:
                        continue
                    truth = self.record.record("counts_no_extrapolation").record(level.value["name"])
                    expected = truth.get(tensor, list)
                counted = (accesses.reads[l, o], accesses.fills[l, o], accesses.updates[l, o])
                for kind, number, ours in zip(("reads", "fills", "updates"), expected, counted, strict=True):
                    yield Entry(f"{where} {kind}", number, float(ours))
                if reliable and "energy_pJ" in words.value:
                    energy = float(sum(counted) * accesses.instances[l]) * level.number("access_energy")
                    yield Entry(f"{where} energy pJ", words.number("energy_pJ"), energy, relative=1e-6)
        if reliable:
            yield Entry("cycles", result.number("cycles"), self._cycles(accesses), tolerance=1.0)
            yield Entry("energy uJ", result.number("energy_total_uJ"), self.energy(accesses), HALF_DIGIT, 1e-6)

    def _cycles(self, accesses: Accesses) -> float:
        """Compute cycles, or those of the level whose reads or writes take longest."""
        cycles = [float(accesses.compute_cycles)]
        for l, level in enumerate(self.levels):
            cycles.append(np.sum(accesses.reads[l]) / level.number("read_bw", positive=True))
            cycles.append(np.sum(accesses.fills[l] + accesses.updates[l]) / level.number("write_bw", positive=True))
        return max(cycles)

    def energy(self, accesses: Accesses) -> float:
        """Energy in microjoules, at the file's picojoules per access."""
        per_access = np.array([level.number("access_energy") for level in self.levels])
        words = np.sum(accesses.reads + accesses.fills + accesses.updates, axis=1) * accesses.instances
        mac = self.record.record("arch").record("mac").number("energy")
        return float(np.sum(words * per_access) + accesses.macs * mac) * 1e-6


def read_timeloop(path: Path) -> list[TimeloopPoint]:
    """One point per line.

    Raises:
      FormatError: a line is no JSON object, or lacks a field, with the line and the field; or there is none.
    """
    points = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            points.append(_timeloop_point(Record(parse(line, number), number)))
    if not points:
        raise FormatError("line 1, field (all): no points")
    return points


def _timeloop_point(record: Record) -> TimeloopPoint:
    rename = {"C": "G"} if record.get("depthwise", bool) else {}
    bounds: dict[str, Any] = {loop: int(bound) for loop, bound in record.record("dims").factors(rename).items()}
    stride, dilation = record.get("stride", int), record.get("dilation", int)
    levels, mapping = record.record("arch").records("levels"), record.records("mapping")
    if len(levels) != len(mapping):
        raise record.error(f"{len(levels)} levels in arch, {len(mapping)} in mapping")
    temporal, spatial = np.ones((len(levels), 8)), np.ones((len(levels), 2, 8))
    order, keep = np.zeros((len(levels), 8), int), np.zeros((len(levels), 3))
    for l, level in enumerate(mapping):
        for loop, factor in level.record("temporal").factors(rename).items():
            temporal[l, LOOPS.index(loop)] = factor
        for x, axis in enumerate("XY"):
            for loop, factor in level.record("spatial").record(axis).factors(rename).items():
                spatial[l, x, LOOPS.index(loop)] = factor
        order[l] = ranks([loop for loop, _ in level.pairs("loops_outer_to_inner", rename)][::-1])
        for tensor in level.get("keep", list):
            if tensor not in NAMES:
                raise level.error(f"unknown operand {str(tensor)[:20]!r} in keep")
            keep[l, OPERANDS.index(NAMES[tensor])] = 1.0
    with record.blamed():
        operation = make_operation(**bounds, stride=(stride, stride), dilation=(dilation, dilation))
        case = Case(operation, make_mapping(operation, temporal, spatial, order, keep))
    return TimeloopPoint(record.get("id", str), case, record, tuple(levels))
