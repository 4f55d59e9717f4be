"""ZigZag accelerator files as chips: their array and memories, which hold the operands that the file says, at our prices.

Every memory becomes a level, in an order that keeps those of fewer MACs below. Energies, areas and supplies follow from
the laws of a node, as for any chip here; the file's own (`r_cost`, `w_cost`, `area`, `unit_energy`, `unit_area`) are not read.

Source of the format: ZigZag's documentation of hardware and its inputs/hardware examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from codesign import mapper
from codesign.rundir import read_yaml
from hw.arithmetic import make_mac
from hw.chip import Chip
from hw.operation import OPERANDS, Operation
from hw.technology import make_technology

_OPERANDS = ("O", "I1", "I2")
_WEIGHTS, _INPUTS, _OUTPUTS = (OPERANDS.index(name) for name in ("weights", "inputs", "outputs"))
_PRICES = {"r_cost", "w_cost", "area", "auto_cost_extraction"}
_MEMORY_KEYS = {
    "size",
    "latency",
    "mem_type",
    "operands",
    "ports",
    "served_dimensions",
    "force_double_buffering",
} | _PRICES
_ARRAY_KEYS = {"dimensions", "sizes", "input_precision", "is_imc", "unit_energy", "unit_area"}
_LARGEST = 2**40
_REGISTER_BITS = 512  # smaller memories are flip-flops, whatever they serve
_PORT_BITS = 256  # of a bank, where the law of SRAM is known
_VECTOR_LANES = 8.0  # not in the file


class Accelerator(NamedTuple):
    """A chip whose memories hold chosen operands.

    Attributes:
      chip: one level per memory, DRAM last.
      holds: whether each level holds O, I1 and I2, bool, (L, 3).
    """

    chip: Chip
    holds: np.ndarray

    def freedom(self, operations: Operation) -> mapper.Freedom:
        """What mappings of n stacked operations may do: levels keep just what they hold.

        O is what a pass accumulates, I2 the weights or, where they are accumulated, the errors, I1 the rest.
        """
        accumulated = np.argmax(np.asarray(operations.accumulated), axis=-1)
        second = np.where(accumulated == _WEIGHTS, _OUTPUTS, _WEIGHTS)
        first = np.where(accumulated == _INPUTS, _OUTPUTS, _INPUTS)
        keep = np.zeros((len(accumulated), *self.holds.shape))
        for role, operand in enumerate((accumulated, first, second)):
            keep[np.arange(len(operand)), :, operand] = self.holds[:, role]
        freedom = mapper.make_freedom(mapper.make_slots(self.chip), keep=self.holds)
        return freedom._replace(keep=jnp.asarray(keep[:, None, :-1], freedom.keep.dtype))


class _Memory(NamedTuple):
    name: str
    size: int
    bandwidth: float
    ports: str
    kind: str
    holds: tuple[bool, ...]
    served: frozenset[str]


def read_zigzag_accelerator(path: Path, node_nm: float | None = None) -> Accelerator:
    """Read an accelerator file.

    Args:
      path: of the YAML file.
      node_nm: node whose laws price it; default that of `hw.chip.make_chip`, 28.

    Raises:
      ValueError: no such content, or something without counterpart: in-memory computing, memories that do not nest,
        no DRAM, accesses of several cycles; says what.
      FileNotFoundError: no such file.
    """
    content = read_yaml(path)
    try:
        _check_keys("the file", content, {"name", "memories", "operational_array"})
        return _accelerator(content["memories"], content["operational_array"], 28 if node_nm is None else node_nm)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: {' '.join(reason.split())[:240]}") from None


def _accelerator(memories: Any, array: Any, node_nm: float) -> Accelerator:
    if array.get("is_imc"):
        raise ValueError("expected an array of digital MACs, got is_imc, computing in memory, which no chip here does")
    _check_keys("operational_array", array, _ARRAY_KEYS)
    if len(array["dimensions"]) != len(array["sizes"]):
        raise ValueError(f"expected a size for each of the dimensions {array['dimensions']}, got {array['sizes']}")
    sizes = dict(zip(array["dimensions"], array["sizes"], strict=True))
    for name, size in sizes.items():
        _check_whole(f"the size of {name}", size)
    widths = array.get("input_precision", [8, 8])
    if not isinstance(widths, list) or len(widths) != 2 or any(type(width) is not int for width in widths):
        raise ValueError(f"expected two widths in bits as input_precision, got {widths!r}")
    if not isinstance(memories, Mapping) or len(memories) < 2:
        raise ValueError("expected memories by name, DRAM and at least one on the chip")
    listed = [_read_memory(str(name), memory, frozenset(sizes)) for name, memory in memories.items()]
    levels = sorted(listed, key=lambda level: len(level.served))
    _check_places(listed, levels, frozenset(sizes))
    technology = make_technology(int(node_nm))
    vdd = jnp.asarray(technology["supply.vdd"], float)
    fanout = _fanout(levels, sizes)
    bandwidth = np.array([level.bandwidth for level in levels])
    capacity = np.array([math.inf if level.kind == "dram" else level.size for level in levels])
    banks = [max(1.0, min(b / _PORT_BITS, s / _REGISTER_BITS)) for b, s in zip(bandwidth, capacity, strict=True)]
    is_sram = np.array([level.kind == "sram" for level in levels])
    chip = Chip(
        technology=technology, mac=make_mac("fixed", (float(widths[0]), float(widths[1]))), vector=make_mac("fp32"),
        fanout=jnp.asarray(fanout), size_bits=jnp.asarray(capacity, float), bandwidth_bits=jnp.asarray(bandwidth, float),
        banks=jnp.asarray(np.where(is_sram, banks, 1.0), float), vdd=vdd, relative_vdd=jnp.ones(len(levels)), clock=None,
        resident_fraction=jnp.zeros(()), vector_lanes=jnp.asarray(_VECTOR_LANES),
        kinds=tuple(level.kind for level in levels), ports=tuple(level.ports for level in levels),
        names=tuple(level.name for level in levels), array_level=int(np.argmax(fanout.prod(axis=1))),
    )  # fmt: skip
    return Accelerator(chip, np.array([level.holds for level in levels]))


def _read_memory(name: str, memory: Any, dimensions: frozenset[str]) -> _Memory:
    try:
        _check_keys("it", memory, _MEMORY_KEYS)
        _check_whole("size", memory["size"])
        if memory.get("latency", 1) not in (0, 1) or memory.get("force_double_buffering"):
            raise ValueError("expected accesses of one cycle and no forced double buffering, which no level here has")
        operands, served = set(memory["operands"]), frozenset(memory["served_dimensions"])
        if not operands or not operands <= set(_OPERANDS):
            raise ValueError(f"expected operands among {', '.join(_OPERANDS)}, got {memory['operands']!r}")
        if not served <= dimensions:
            raise ValueError(f"expected served_dimensions among {', '.join(sorted(dimensions))}, got {sorted(served)}")
        is_dram = name == "dram" or memory.get("mem_type") == "dram"
        kind = "dram" if is_dram else "register" if not served or memory["size"] < _REGISTER_BITS else "sram"
        bandwidth, ports = _read_ports(memory["ports"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"memory {name[:40]}: {reason}") from None
    return _Memory(name, memory["size"], bandwidth, ports, kind, tuple(o in operands for o in _OPERANDS), served)


def _read_ports(ports: Any) -> tuple[float, str]:
    """Bits per cycle in the slower direction, and the ports of its banks."""
    widths = {"read": 0, "write": 0, "read_write": 0}
    for port in ports:
        if port["type"] not in widths:
            raise ValueError(f"expected ports of the types {', '.join(widths)}, got {port['type']!r}")
        _check_whole("bandwidth_max", port["bandwidth_max"])
        widths[port["type"]] += port["bandwidth_max"]
    slower = min(widths["read"], widths["write"]) + widths["read_write"]
    if slower == 0:
        raise ValueError("expected ports to read and to write, got one direction alone")
    return float(slower), "1R1W" if widths["read"] else "1RW"


def _check_places(listed: list[_Memory], levels: list[_Memory], dimensions: frozenset[str]) -> None:
    """Each memory serves all that those below it serve; DRAM, which holds everything, comes last.

    The file lists the memories of an operand from inner to outer, which the order of the levels must not change.
    """
    for role, operand in enumerate(_OPERANDS):
        theirs, ours = ([level.name for level in order if level.holds[role]] for order in (listed, levels))
        if theirs != ours:
            raise ValueError(f"expected memories of {operand} from those of few MACs to those of many, got {theirs}")
    for lower, upper in itertools.pairwise(levels):
        if not lower.served <= upper.served:
            raise ValueError(
                f"expected memories that nest, got {lower.name}, which serves {sorted(lower.served)}, beside {upper.name}, which "
                f"serves {sorted(upper.served)}: no chip here has both"
            )
    top = levels[-1]
    if top.kind != "dram" or any(level.kind == "dram" for level in levels[:-1]):
        raise ValueError(f"expected the last memory alone to be DRAM (its name, or mem_type: dram), got {top.name}")
    if not all(top.holds) or top.served != dimensions:
        raise ValueError("expected DRAM to hold I1, I2 and O and to serve all dimensions")


def _fanout(levels: list[_Memory], sizes: Mapping[str, int]) -> np.ndarray:
    """Instances below each level along two axes, (L, 2)."""
    fanout, below = np.ones((len(levels), 2)), frozenset[str]()
    for l, level in enumerate(levels):
        added = sorted(level.served - below)
        if len(added) > 2:
            raise ValueError(f"expected at most two dimensions between two memories, got {added} below {level.name}")
        for axis, name in enumerate(added):
            fanout[l, axis] = sizes[name]
        below = level.served
    return fanout


def _check_keys(what: str, content: Any, known: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"expected {what} as ZigZag's accelerators have it, got {type(content).__name__}")
    if other := [str(key) for key in content if key not in known]:
        raise ValueError(
            f"expected of {what} {', '.join(sorted(known))}, got {other[0][:40]!r}, without counterpart here"
        )


def _check_whole(what: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"expected {what} to be a whole number from 1, got {value!r}")
