"""Published chips as presets: public facts with their sources, and what is not public as assumptions with a range.

A preset holds inputs only. What the chip reports (efficiency, throughput, area) stands in `headlines.yaml`, which no
module here reads.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from hw.arithmetic import FLOAT_STYLES, GROWTH, INTEGER_STYLES, Mac, make_mac
from hw.chip import Chip, make_chip
from hw.chips.mechanisms import MECHANISMS
from hw.technology import Technology, make_technology, unknown


@dataclass(frozen=True)
class Fact:
    """A public number (or pairs of numbers) and where it stands."""

    value: Any
    source: str


@dataclass(frozen=True)
class Assumption:
    """What is not public: a value, the range that error bars draw from, and the reason."""

    value: float
    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class Mode:
    """One way to use the MAC array.

    Attributes:
      style: of the MACs, see `hw.arithmetic`.
      num_macs: MACs that work at once; None takes the assumption `num_macs`.
      bits: operands' widths (weights, inputs); None takes the assumption `operand_bits` for both.
      widths: widest operands of the MACs, default `bits`.
      source: where style, number and widths come from.
      slice_bits: width of a slice or brick, for the styles that have them.
    """

    style: str
    num_macs: float | None
    bits: tuple[float, float] | None
    source: str
    widths: tuple[float, float] | None = None
    slice_bits: float = 4.0


# Constants that are told for uniform random data, and what data a chip was measured with scales.
SWITCHING = ("gate.energy", "wire.energy", *(f"mac.{style}.energy" for style in FLOAT_STYLES))
# What no chip here tells. One value and one range for all chips: those of `make_chip` where it has one, each chosen
# before its effect on any chip was seen.
COMMON = {
    "register_bits": Assumption(256, 64, 1024, "registers beside each MAC; the default of make_chip"),
    "local_share": Assumption(0.25, 0.1, 0.5, "share of the SRAM in the buffers that feed the array"),
    "port_bits": Assumption(64, 32, 256, "width of an SRAM bank"),
    "tree": Assumption(4, 1, 16, "MACs that share an accumulator behind an adder tree; integer styles only"),
    "table_sharing": Assumption(16, 4, 64, "look-up units that read one table; the default of make_mac"),
    "kib_per_mac": Assumption(
        0.25, 0.06, 0.5, "SRAM where its size is not public; UNPU, LNPU and DNPU have 0.06 to 0.38"
    ),
    "cluster_macs": Assumption(
        256,
        64,
        2048,
        "MACs that one local memory feeds; UNPU, RaPiD, DNPU, Eyeriss and Envision have 48 to 2048, 344 in the geometric"
        " mean; the nearest power of two",
    ),
    "aspect": Assumption(
        1,
        0.25,
        4,
        "columns over rows of an array, as near as whole numbers allow; those of Eyeriss, Envision are 1.2, 1",
    ),
    "sum_bits": Assumption(
        32, 16, 48, "partial sums of integer MACs, rounded to so many bits; Eyeriss keeps 16, exact sums have up to 45"
    ),
    "activity": Assumption(
        0.68,
        0.48,
        1.0,
        "switching of a network's data over that of uniform data, not public: normal operands 0.87, rectified ones 0.53"
        " (mac.activity), their geometric mean; high is uniform data",
    ),
}
# Supplies of 1.1 V and above at 65 nm are those of a low-power process, whose nominal supply is 1.2 V.
PROCESSES = {65: "low_power", 45: "general", 28: "general", 7: "general"}


@dataclass(frozen=True)
class Preset:
    """A published chip.

    Attributes:
      title: name, venue and year.
      node_nm: feature size.
      clock: pairs of (vdd in V, clock in Hz), rising.
      modes: ways to use the array, by name.
      sram_kib: SRAM on the chip, None where it is not public.
      register_bits: registers beside each MAC, None where it is not public.
      clusters: arrays, each with a local memory of its own, that the MACs are split into, None where it is not public.
      aspect: columns over rows of an array, None where it is not public.
      sum_bits: bits that are kept of a partial sum, None where it is not public.
      memory_vdd: supply of the SRAM in volts where it is not that of the array.
      dram: kind of its external memory, None where it is not public.
      mechanisms: what the chip does beyond its MACs, by the names of `hw.chips.mechanisms`, and where that stands.
      assumptions: what this chip does not tell and others do, by name.
    """

    title: str
    node_nm: Fact
    clock: Fact
    modes: Mapping[str, Mode]
    sram_kib: Fact | None = None
    register_bits: Fact | None = None
    clusters: Fact | None = None
    aspect: Fact | None = None
    sum_bits: Fact | None = None
    memory_vdd: Fact | None = None
    dram: Fact | None = None
    mechanisms: Mapping[str, str] = field(default_factory=dict)
    assumptions: Mapping[str, Assumption] = field(default_factory=dict)

    def assumed(self) -> dict[str, Assumption]:
        """Everything assumed that this chip's cost depends on, by name."""
        styles = {mode.style for mode in self.modes.values()}
        idle = set() if styles & set(INTEGER_STYLES) else {"tree", "sum_bits"}
        idle |= set() if "lut" in styles else {"table_sharing"}
        told = {
            "kib_per_mac": self.sram_kib, "register_bits": self.register_bits, "cluster_macs": self.clusters,
            "aspect": self.aspect, "sum_bits": self.sum_bits,
        }  # fmt: skip
        idle |= {name for name, fact in told.items() if fact is not None}
        return {name: it for name, it in COMMON.items() if name not in idle} | dict(self.assumptions)

    def require_one(self, *mechanisms: str) -> None:
        """Checks that the chip has one of some mechanisms, before it is switched on.

        Raises:
          ValueError: it has none of them, or there is none of that name; says what it has.
        """
        for name in mechanisms:
            if name not in MECHANISMS:
                raise ValueError(unknown("mechanism", name, MECHANISMS))
        if mechanisms and not set(mechanisms) & set(self.mechanisms):
            has = ", ".join(self.mechanisms) or "none"
            raise ValueError(f"expected a chip with {' or '.join(mechanisms)}, got {self.title}; its mechanisms: {has}")

    def mode_for(self, bits: float) -> str:
        """The narrowest mode whose first operand holds so many bits, or the widest if none does."""
        widths = {mode: self.bits(mode)[0] for mode in self.modes}
        fits = [mode for mode, width in widths.items() if width >= bits]
        return min(fits, key=widths.__getitem__) if fits else max(widths, key=widths.__getitem__)

    def technology(self) -> Technology:
        """Constants of the chip's process."""
        dram = {"dram": self.dram.value} if self.dram else {}
        return make_technology(self.node_nm.value, process=PROCESSES[self.node_nm.value], **dram)

    def bits(self, mode: str, values: Mapping[str, float] | None = None) -> tuple[float, float]:
        """Widths of weights and inputs in a mode; `values` as for `make`."""
        return self._mode(mode).bits or (self._numbers(values)["operand_bits"],) * 2

    def make(
        self,
        mode: str,
        vdd: float | None = None,
        values: Mapping[str, float] | None = None,
        technology: Technology | None = None,
    ) -> Chip:
        """The chip in one of its modes: arrays of its MACs side by side, and four memory levels as in `make_chip`.

        MACs behind one adder tree share their registers, as they share the accumulator: a partial sum moves once for all.

        Args:
          mode: one of `modes`.
          vdd: supply in volts; default the assumption `vdd` where there is one, else the highest supply of `clock`.
          values: numbers in place of assumed ones, by name.
          technology: constants in place of those of the chip's process.

        Raises:
          ValueError: an unknown mode, or a number for what is not assumed.
        """
        choice, numbers = self._mode(mode), self._numbers(values)
        if choice.style in FLOAT_STYLES:
            numbers["tree"] = 1.0
        num_macs = choice.num_macs or numbers["num_macs"]
        clusters = self.clusters.value if self.clusters else max(1, round(num_macs / numbers["cluster_macs"]))
        sram_kib = self.sram_kib.value if self.sram_kib else numbers["kib_per_mac"] * num_macs
        local_kib, memory_vdd = sram_kib * numbers["local_share"], self.memory_vdd.value if self.memory_vdd else None
        columns, rows = _array(num_macs / clusters, numbers["tree"], numbers["aspect"])
        side, whole_side = math.sqrt(num_macs / clusters), math.sqrt(num_macs)
        chip = make_chip(
            rows=rows, columns=columns, clusters=_near_square(clusters),
            mac=self._mac(choice, choice.widths or self.bits(mode, values), numbers),
            register_bits=numbers["register_bits"],
            local_kib=local_kib / clusters, local_bandwidth_bits=64 * side, local_banks=64 * side / numbers["port_bits"],
            shared_kib=sram_kib - local_kib, shared_bandwidth_bits=16 * whole_side,
            shared_banks=16 * whole_side / numbers["port_bits"],
            technology=_with_activity(technology or self.technology(), numbers["activity"]),
            local_vdd=memory_vdd, shared_vdd=memory_vdd,
            vdd=vdd or numbers.get("vdd", self.clock.value[-1][0]), frequency_hz=self.clock.value, resident_fraction=0.0,
        )  # fmt: skip
        return _share_registers(chip, numbers["tree"])

    def _mac(self, mode: Mode, widths: tuple[float, float], numbers: Mapping[str, float]) -> Mac:
        gates = "zero gating" in self.mechanisms
        if mode.style in FLOAT_STYLES:
            return make_mac(mode.style, gates=gates)
        return make_mac(
            mode.style, widths, mode.slice_bits, min(numbers["sum_bits"], sum(widths) + GROWTH), rounds=True, gates=gates,
            tree=numbers["tree"], table_sharing=numbers.get("table_sharing", 1.0),
        )  # fmt: skip

    def _mode(self, mode: str) -> Mode:
        if mode not in self.modes:
            raise ValueError(unknown(f"mode of {self.title}", mode, self.modes))
        return self.modes[mode]

    def _numbers(self, values: Mapping[str, float] | None) -> dict[str, float]:
        """What is assumed, `values` in its place, and the facts that others assume, by name."""
        numbers = {name: assumption.value for name, assumption in self.assumed().items()}
        for name in values or {}:
            if name not in numbers:
                raise ValueError(unknown(f"assumption of {self.title}", name, numbers))
        facts = {name: fact.value for name in COMMON if (fact := getattr(self, name, None))}
        return numbers | dict(values or {}) | facts


def _array(num_macs: float, tree: float, aspect: float) -> tuple[float, float]:
    """Columns and rows of an array: whole, with whole trees along the rows, where the number of MACs divides so."""
    wanted = math.sqrt(num_macs / aspect)
    whole = float(num_macs).is_integer() and float(tree).is_integer()
    rows = [rows for rows in range(int(tree), int(num_macs) + 1, int(tree)) if num_macs % rows == 0] if whole else []
    nearest = min(rows, key=lambda rows: abs(math.log(rows / wanted)), default=wanted)
    return num_macs / nearest, nearest


def _near_square(number: int) -> tuple[int, int]:
    """Columns and rows, as near to a square as whole numbers allow, the columns no fewer."""
    rows = next(rows for rows in range(math.isqrt(number), 0, -1) if number % rows == 0)
    return number // rows, rows


def _with_activity(technology: Technology, activity: float) -> Technology:
    switching = {name: technology[name] * activity for name in SWITCHING}
    return dataclasses.replace(technology, values=technology.values | switching)


def _share_registers(chip: Chip, tree: float) -> Chip:
    """The registers of `tree` MACs along the rows as one file, and the array that much shorter."""
    columns, rows = chip.fanout[chip.array_level]
    fanout = chip.fanout.at[0].set(jnp.array([1.0, tree])).at[chip.array_level].set(jnp.stack([columns, rows / tree]))
    size, bandwidth = chip.size_bits.at[0].multiply(tree), chip.bandwidth_bits.at[0].multiply(tree)
    return dataclasses.replace(chip, fanout=fanout, size_bits=size, bandwidth_bits=bandwidth)
