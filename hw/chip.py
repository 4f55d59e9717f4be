"""A chip: MAC array, memory hierarchy, vector unit, technology and supply, with its area, leakage and clock."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp

from hw import memory, network
from hw.arithmetic import Mac, cycle_energy, mac_area, make_mac
from hw.memory import MemoryLevel
from hw.technology import Technology, clock_frequency, leakage_scale, make_technology, measured_clock
from hw.units import KIB, MHZ, MILLIWATT, MM2

AXES = ("X", "Y")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Area:
    """Area in m2 by component.

    Attributes:
      macs: all MACs, shape ().
      memories: all instances of each level, shape (L,); 0 for DRAM.
      vector: the vector unit, shape ().
      control: control, clock tree and unused placement area, shape ().
    """

    macs: jax.Array
    memories: jax.Array
    vector: jax.Array
    control: jax.Array

    @property
    def total(self) -> jax.Array:
        """Sum of the components, shape ()."""
        return self.macs + self.memories.sum() + self.vector + self.control


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chip:
    """One core with L memory levels, 0 the innermost, L - 1 DRAM. Every array is real-valued while searching.

    Attributes:
      technology: constants of the process.
      mac: the unit of the MAC array.
      vector: the unit of a vector lane.
      fanout: instances below each level on the axes X and Y, shape (L, 2); that of `array_level` is (columns, rows).
      size_bits: capacity per instance, shape (L,); infinite for DRAM, 0 for a level that is not there.
      bandwidth_bits: bits per cycle and instance, reads and writes each ("1RW": both together), shape (L,).
      banks: banks per instance, shape (L,).
      vdd: supply of MACs, vector unit and control in volts, shape ().
      relative_vdd: supply of each level relative to `vdd`, shape (L,); 1 where it shares that domain. DRAM's own supply
        is part of its energy per bit.
      clock: measured pairs of `vdd` in volts and clock in Hz, both rising, shape (n, 2); None for the technology's law.
      resident_fraction: share of level L - 2 given to tensors that stay between operations, shape (), in [0, 1).
      vector_lanes: number of lanes, shape ().
      kinds: kind of each level, see `hw.memory`.
      ports: ports of each level's banks.
      names: name of each level.
      array_level: the level that feeds the MAC array.
    """

    technology: Technology
    mac: Mac
    vector: Mac
    fanout: jax.Array
    size_bits: jax.Array
    bandwidth_bits: jax.Array
    banks: jax.Array
    vdd: jax.Array
    relative_vdd: jax.Array
    clock: jax.Array | None
    resident_fraction: jax.Array
    vector_lanes: jax.Array
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    ports: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    array_level: int = dataclasses.field(metadata={"static": True})

    def levels(self) -> tuple[MemoryLevel, ...]:
        """One instance of each memory level, innermost first."""
        return tuple(
            MemoryLevel(self.size_bits[i], self.bandwidth_bits[i], self.banks[i], kind, ports)
            for i, (kind, ports) in enumerate(zip(self.kinds, self.ports, strict=True))
        )

    def instances(self) -> jax.Array:
        """Instances of each level, shape (L,)."""
        below = self.fanout.prod(axis=1)
        return jnp.stack([below[level + 1 :].prod() for level in range(len(self.kinds))])

    def num_macs(self) -> jax.Array:
        """Number of MACs, shape ()."""
        return self.fanout.prod()

    def level_vdd(self) -> jax.Array:
        """Supply of each level in volts, shape (L,)."""
        return self.vdd * self.relative_vdd

    def frequency(self) -> jax.Array:
        """Clock in Hz at this supply, shape (): as measured, or the law's in the slowest of the supply domains."""
        if self.clock is not None:
            return measured_clock(self.technology, self.vdd, self.clock)
        memories = self.vdd * jnp.min(self.relative_vdd[:-1])
        # Not a minimum: where all share one supply, to raise that of the memories alone does not speed up the chip.
        return clock_frequency(self.technology, jnp.where(memories < self.vdd, memories, self.vdd))

    def energy_per_bit(self) -> jax.Array:
        """Joules per bit read and written at each level, shape (L, 2); full port width, words packed."""
        supplies = self.level_vdd()
        return jnp.stack(
            [
                memory.access_energy(level, self.technology, supplies[i]) / level.port_bits
                for i, level in enumerate(self.levels())
            ]
        )

    def wire_energy_per_bit(self) -> jax.Array:
        """Joules to carry a bit between one instance of each level and what it feeds, shape (L,); see `hw.network`."""
        supplies, tile, energies = self.level_vdd(), mac_area(self.mac, self.technology), []
        for i, level in enumerate(self.levels()):
            energies.append(network.delivery_energy(self.technology, supplies[i], tile, self.fanout[i]))
            tile = self.fanout[i].prod() * tile + memory.area(level, self.technology)
        return jnp.stack(energies)

    def bits_per_cycle(self) -> jax.Array:
        """Bandwidth of one instance of each level, bits per cycle, shape (L,); DRAM capped by the peak of its kind."""
        frequency = self.frequency()
        return jnp.stack([memory.bits_per_cycle(level, self.technology, frequency) for level in self.levels()])

    def vector_energy(self) -> jax.Array:
        """Joules of one element operation (an addition, a multiplication, both) of a vector lane, shape ()."""
        return cycle_energy(self.vector, self.technology, self.vdd, self.vector.accumulator_bits)

    def limits(self) -> jax.Array:
        """What a mapping may use, shape (V,): capacities for tiles (bits), fan-outs, widths; see `limit_names`."""
        # Half a bit for a level that is not there: what it is asked to keep exceeds that, and by a finite share.
        capacity = jnp.maximum(self.size_bits, 0.5).at[-2].multiply(1.0 - self.resident_fraction)
        accumulator = jnp.asarray(self.mac.accumulator_bits, capacity.dtype)[None]
        return jnp.concatenate([capacity, self.fanout.ravel(), self.mac.widths, accumulator])

    def limit_names(self) -> tuple[str, ...]:
        """Names of the entries of `limits` and of `Cost.violation`."""
        capacities = [f"capacity {name}" for name in self.names]
        fanouts = [f"fan-out {name} {axis}" for name in self.names for axis in AXES]
        return (*capacities, *fanouts, "first operand width", "second operand width", "accumulator width")

    def area(self) -> Area:
        """Area by component."""
        macs = self.num_macs() * mac_area(self.mac, self.technology)
        memories = self.instances() * jnp.stack([memory.area(level, self.technology) for level in self.levels()])
        vector = self.vector_lanes * mac_area(self.vector, self.technology)
        control = self.technology["control.area"] * (macs + memories.sum() + vector)
        return Area(macs, memories, vector, control)

    def leakage_power(self) -> jax.Array:
        """Leakage of the whole chip in watts at 300 K, shape (): memories, and logic by its area in transistors."""
        technology, supplies = self.technology, self.level_vdd()
        memories = jnp.stack(
            [memory.leakage_power(level, technology, supplies[i]) for i, level in enumerate(self.levels())]
        )
        area = self.area()
        transistors = (area.macs + area.vector) / (technology["logic.area"] * technology["node.area"])
        scale = leakage_scale(technology, self.vdd, technology["supply.vdd"])
        return (self.instances() * memories).sum() + technology["logic.leakage"] * transistors * scale

    def _supplies(self) -> str:
        own = [
            f"{name} {float(supply):.3g} V"
            for name, supply, ratio in zip(self.names, self.level_vdd(), self.relative_vdd, strict=True)
            if float(ratio) != 1.0
        ]
        return f"{float(self.vdd):.3g} V" + (f" ({', '.join(own)})" if own else "")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{kind} {ports}</td><td>{float(self.size_bits[i]) / KIB:.4g}</td>"
            f"<td>{float(self.bandwidth_bits[i]):.4g}</td><td>{float(self.banks[i]):.3g}</td></tr>"
            for i, (name, kind, ports) in enumerate(zip(self.names, self.kinds, self.ports, strict=True))
        )
        columns, array_rows = (float(size) for size in self.fanout[self.array_level])
        return (
            f"<p>{array_rows:.3g} x {columns:.3g} MACs ({self.mac.style}), {self.technology.node_nm} nm, "
            f"{self._supplies()}, {float(self.frequency()) / MHZ:.4g} MHz, {float(self.area().total) / MM2:.3g} "
            f"mm<sup>2</sup>, leakage {float(self.leakage_power()) / MILLIWATT:.3g} mW</p>"
            "<table><tr><th>level</th><th>kind</th><th>KiB</th><th>bits/cycle</th><th>banks</th></tr>"
            f"{rows}</table>"
        )


def make_chip(
    *,
    rows: float = 16,
    columns: float = 16,
    register_bits: float = 256,
    local_kib: float = 32,
    shared_kib: float = 256,
    register_bandwidth_bits: float = 64,
    local_bandwidth_bits: float | None = None,
    shared_bandwidth_bits: float = 256,
    dram_bandwidth_bits: float = 64,
    local_banks: float = 16,
    shared_banks: float = 4,
    node_nm: float | None = None,
    technology: Technology | None = None,
    vdd: float | None = None,
    local_vdd: float | None = None,
    shared_vdd: float | None = None,
    frequency_hz: float | Sequence[tuple[float, float]] | None = None,
    mac: Mac | None = None,
    vector: Mac | None = None,
    vector_lanes: float = 8,
    resident_fraction: float = 0.5,
    clusters: tuple[float, float] = (1, 1),
) -> Chip:
    """A chip of four levels (register per MAC, local SRAM feeding an array, shared SRAM, DRAM), numbers checked.

    Args:
      rows: MACs of an array along Y.
      columns: MACs of an array along X.
      register_bits: register file of each MAC.
      local_kib: local SRAM of an array (a read and a write port).
      shared_kib: shared SRAM (one port).
      register_bandwidth_bits: width of a register file's ports.
      local_bandwidth_bits: bits per cycle of the local SRAM; default 32 for each row and column.
      shared_bandwidth_bits: bits per cycle of the shared SRAM.
      dram_bandwidth_bits: bits per cycle of the DRAM interface, besides the peak of the DRAM kind.
      local_banks: banks of the local SRAM, of 64 bytes at least.
      shared_banks: banks of the shared SRAM, of 64 bytes at least.
      node_nm: feature size, default 28; instead of a `technology`.
      technology: constants of the process.
      vdd: supply of the array in volts; default the nominal one.
      local_vdd: supply of the local SRAM; default that of the array. It keeps its ratio where `vdd` moves.
      shared_vdd: supply of the shared SRAM, likewise.
      frequency_hz: clock where it is known (measured chips), at `vdd` or as pairs of (vdd, frequency in Hz), both
        rising; the law carries it on to other supplies. Default the law alone.
      mac: unit of the array; default 4 bit slices for operands of up to 16 bits.
      vector: unit of a vector lane; default fp32, as master weights are float32.
      vector_lanes: lanes of the vector unit.
      resident_fraction: share of the shared SRAM for tensors that stay between operations.
      clusters: arrays along X and Y, each with a local SRAM of its own, one or more.

    Raises:
      ValueError: a number that is not positive and finite, a fraction outside [0, 1), an SRAM bank below 64 bytes, a
        node out of range, both a node and a technology, pairs of supply and frequency that do not rise.
    """
    if technology is not None and node_nm is not None:
        raise ValueError(f"expected either node_nm or technology, got both; drop {node_nm=}")
    technology = make_technology(28 if node_nm is None else node_nm) if technology is None else technology
    local_bandwidth_bits = 32 * (rows + columns) if local_bandwidth_bits is None else local_bandwidth_bits
    vdd = technology["supply.vdd"] if vdd is None else vdd
    _check_positive(
        rows=rows, columns=columns, register_bits=register_bits, local_kib=local_kib, shared_kib=shared_kib,
        register_bandwidth_bits=register_bandwidth_bits, local_bandwidth_bits=local_bandwidth_bits,
        shared_bandwidth_bits=shared_bandwidth_bits, dram_bandwidth_bits=dram_bandwidth_bits, local_banks=local_banks,
        shared_banks=shared_banks, vdd=vdd, local_vdd=local_vdd, shared_vdd=shared_vdd, vector_lanes=vector_lanes,
        clusters_along_x=clusters[0], clusters_along_y=clusters[1],
    )  # fmt: skip
    if not 0.0 <= resident_fraction < 1.0:
        raise ValueError(f"expected resident_fraction in [0, 1), got {resident_fraction}")
    _check_banks(local=local_kib / local_banks, shared=shared_kib / shared_banks)
    return Chip(
        technology=technology,
        mac=make_mac() if mac is None else mac,
        vector=make_mac("fp32") if vector is None else vector,
        fanout=jnp.array([[1, 1], [columns, rows], clusters, [1, 1]], dtype=float),
        size_bits=jnp.array([register_bits, local_kib * KIB, shared_kib * KIB, math.inf], dtype=float),
        bandwidth_bits=jnp.array(
            [register_bandwidth_bits, local_bandwidth_bits, shared_bandwidth_bits, dram_bandwidth_bits], dtype=float
        ),
        banks=jnp.array([1, local_banks, shared_banks, 1], dtype=float),
        vdd=jnp.asarray(vdd, dtype=float),
        relative_vdd=jnp.array([1.0, *(1.0 if own is None else own / vdd for own in (local_vdd, shared_vdd)), 1.0]),
        clock=None if frequency_hz is None else _clock_pairs(vdd, frequency_hz),
        resident_fraction=jnp.asarray(resident_fraction, dtype=float),
        vector_lanes=jnp.asarray(vector_lanes, dtype=float),
        kinds=("register", "sram", "sram", "dram"),
        ports=("1R1W", "1R1W", "1RW", "1RW"),
        names=("register", "local", "shared", "dram"),
        array_level=1,
    )


def _clock_pairs(vdd: float, frequency_hz: float | Sequence[tuple[float, float]]) -> jax.Array:
    pairs = frequency_hz if isinstance(frequency_hz, Sequence) else [(vdd, frequency_hz)]
    rising = all(lower < upper for pair in pairwise(pairs) for lower, upper in zip(*pair, strict=True))
    if not pairs or not rising or not all(0.0 < number < math.inf for pair in pairs for number in pair):
        raise ValueError(
            f"expected frequency_hz positive, or positive and rising pairs of (vdd, Hz), got {frequency_hz}"
        )
    return jnp.array(pairs, dtype=float)


def _check_banks(**kib: float) -> None:
    for name, size in kib.items():
        if size * 1024 < 64:
            raise ValueError(
                f"expected {name} banks of 64 bytes or more, got {size * 1024:.4g}; use fewer {name}_banks"
            )


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0.0 < number < math.inf:
            raise ValueError(f"expected {name} positive and finite, got {number}")
