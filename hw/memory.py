"""Memories: energy per access, area, leakage and bandwidth of register files, SRAM and DRAM."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hw.technology import Technology, leakage_scale, logic_energy_scale
from hw.units import KIB

PORTS = ("1RW", "1R1W")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryLevel:
    """One instance of a memory.

    Attributes:
      size_bits: capacity in bits, shape (); infinite for DRAM, 0 where there is no such memory.
      bandwidth_bits: bits per cycle, reads and writes each ("1RW": both together), shape ().
      banks: number of banks, shape (). One bank delivers bandwidth_bits / banks bits per access.
      kind: "register" (flip-flops), "sram" or "dram".
      ports: of a bank, "1RW" (one port for reads and writes) or "1R1W".
    """

    size_bits: jax.Array
    bandwidth_bits: jax.Array
    banks: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    ports: str = dataclasses.field(metadata={"static": True})

    @property
    def port_bits(self) -> jax.Array:
        """Width of one access in bits, shape ()."""
        return self.bandwidth_bits / self.banks

    @property
    def bank_bits(self) -> jax.Array:
        """Capacity of one bank in bits, shape ()."""
        return self.size_bits / self.banks


def access_energy(level: MemoryLevel, technology: Technology, vdd: jax.Array) -> jax.Array:
    """Energy in joules of one read and one write of a whole port width, shape (2,).

    Moving B bits takes B / port_bits accesses: words are packed into the port. Beyond 256 bits the SRAM law
    extrapolates. Per kind:
      "sram": k (node/65 nm)**a vdd**2 KiB**c (w0 + w**d) of a bank w bits wide, read and write alike (their geometric
        mean); the periphery counts as some more rows, and a second port adds the share f KiB**g / w**h.
      "register": multiplexers, u w d**2 / (d + d0) for a read of d words of w bits, and (a + b d) w for a write.
      "dram": energy per bit, independent of vdd.

    Source: hw/data/memory.yaml (fit to CACTI 7; DRAM kinds), hw/data/logic.yaml (synthesised register files).
    """
    if level.kind == "sram":
        energy = _sram_energy(level, technology, vdd)
        return jnp.stack([energy, energy])
    if level.kind == "register":
        depth = level.bank_bits / level.port_bits
        read = technology["register.energy.read"] * depth**2 / (depth + technology["register.energy.read_depth"])
        write = technology["register.energy.write"] + technology["register.energy.write_depth"] * depth
        unit = technology["gate.energy"] * logic_energy_scale(technology, vdd)
        return jnp.stack([read, write]) * level.port_bits * unit
    return jnp.full(2, technology["dram.energy"] * level.port_bits)


def area(level: MemoryLevel, technology: Technology) -> jax.Array:
    """Area of one instance in m2, all banks, shape (); DRAM is off the chip and counts nothing.

    Per SRAM bank: a (node/65 nm)**n (KiB**c + a0 + b w**2), times a factor for a second port.

    Source: fit to CACTI 7 (hw/data/memory.yaml); register files: transistors per bit (hw/data/logic.yaml).
    """
    if level.kind == "sram":
        cells = _cells(level, technology["sram.area.capacity"])
        periphery = technology["sram.area.periphery"] + technology["sram.area.width"] * level.port_bits**2
        bank = technology["sram.area.k"] * _node_ratio(technology) ** technology["sram.area.node"] * (cells + periphery)
        bank = bank * (technology["sram.area.dual_port"] if level.ports == "1R1W" else 1.0)
        return jnp.where(level.size_bits > 0.0, level.banks * bank, 0.0)
    if level.kind == "register":
        return _register_transistors(level, technology) * technology["logic.area"] * technology["node.area"]
    return jnp.zeros_like(level.banks)


def leakage_power(level: MemoryLevel, technology: Technology, vdd: jax.Array) -> jax.Array:
    """Leakage of one instance in watts at 300 K, shape (); 0 for DRAM, whose energy per bit includes its background.

    Per SRAM bank: l (KiB**c + p) of its transistor type and node, times a factor for a second port.

    Source: fit to CACTI 7 (hw/data/memory.yaml), registers per transistor (hw/data/logic.yaml).
    """
    if level.kind == "sram":
        kib = _cells(level, technology["sram.leakage.capacity"]) + technology["sram.leakage.periphery"]
        bank = technology["sram.leakage.k"] * kib * leakage_scale(technology, vdd, technology["sram.vdd"])
        bank = bank * (technology["sram.leakage.dual_port"] if level.ports == "1R1W" else 1.0)
        return jnp.where(level.size_bits > 0.0, level.banks * bank, 0.0)
    if level.kind == "register":
        scale = leakage_scale(technology, vdd, technology["supply.vdd"])
        return technology["logic.leakage"] * _register_transistors(level, technology) * scale
    return jnp.zeros_like(level.banks)


def bits_per_cycle(level: MemoryLevel, technology: Technology, frequency: jax.Array) -> jax.Array:
    """Bits one instance moves per cycle, shape (); a DRAM interface is capped by the peak of its kind."""
    if level.kind == "dram":
        return jnp.minimum(level.bandwidth_bits, technology["dram.bandwidth"] / frequency)
    return level.bandwidth_bits


def _sram_energy(level: MemoryLevel, technology: Technology, vdd: jax.Array) -> jax.Array:
    """Energy of one access to a bank, shape ()."""
    width = level.port_bits
    kib = (level.bank_bits + technology["sram.energy.rows"] * width) / KIB
    scale = technology["sram.energy.k"] * _node_ratio(technology) ** technology["sram.energy.node"] * vdd**2
    words = technology["sram.energy.width0"] + width ** technology["sram.energy.width"]
    energy = scale * kib ** technology["sram.energy.capacity"] * words
    if level.ports == "1RW":
        return energy
    growth = kib ** technology["sram.energy.dual_capacity"] / width ** technology["sram.energy.dual_width"]
    return energy * (1.0 + technology["sram.energy.dual_port"] * growth)


def _cells(level: MemoryLevel, power: jax.Array) -> jax.Array:
    """KiB of a bank to a power, shape (); of a bit at least, as a power below one has no slope at nothing."""
    return (jnp.maximum(level.bank_bits, 1.0) / KIB) ** power


def _node_ratio(technology: Technology) -> jax.Array:
    return technology["node.nm"] / 65.0


def _register_transistors(level: MemoryLevel, technology: Technology) -> jax.Array:
    return technology["register.area"] * level.size_bits
