"""Price of one operation under one mapping on one chip: counts become joules, seconds and misfits."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hw.accesses import Accesses, count
from hw.arithmetic import Mac, partial_sum_bits, product_cycles, product_energy, sums_per_product
from hw.chip import Chip
from hw.explain import cost_html, cost_text
from hw.mapping import Mapping
from hw.operation import Operation

# Loops (G N K C P Q R S) summed over where weights, inputs or outputs are accumulated, shape (3, 8).
REDUCED = np.array([[0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1, 1]], dtype=bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cost:
    """Cost of one operation; leakage is added once per step, not here.

    Attributes:
      energy: mac_energy + access_energy.sum() + control_energy, joules, shape ().
      latency: cycles over the clock, seconds, shape ().
      cycles: the largest of compute_cycles and level_cycles, shape ().
      mac_energy: joules, shape ().
      access_energy: memory accesses and the wires to the level below, joules by level and operand, shape (L, 3).
      control_energy: clock tree and control, joules, shape ().
      mac_cycles: busy cycles summed over all MACs, slices and density included, shape (); over num_macs * cycles it
        is the utilisation.
      compute_cycles: cycles the MACs are busy, slices and density included, shape ().
      level_cycles: cycles each level needs for its traffic, shape (L,).
      macs: products, shape ().
      violation: relative excess per resource, 0 where it fits, shape (V,), in the order of `Chip.limit_names`.
    """

    energy: jax.Array
    latency: jax.Array
    cycles: jax.Array
    mac_energy: jax.Array
    access_energy: jax.Array
    control_energy: jax.Array
    mac_cycles: jax.Array
    compute_cycles: jax.Array
    level_cycles: jax.Array
    macs: jax.Array
    violation: jax.Array

    def explain(
        self,
        operation: Operation,
        mapping: Mapping,
        chip: Chip,
        bits: jax.Array,
        density: jax.Array | None = None,
        resident: jax.Array | None = None,
    ) -> str:
        """Text for people: loop nest, words and joules by level, direction and operand, latency, misfits, sources.

        Says which resource bounds latency, what lost utilisation, and for each component the constants that its joules
        scale with. All arguments are concrete and not batched.

        Args:
          operation: the nest that was costed.
          mapping: where its loops run.
          chip: the chip.
          bits, density, resident: as they were given to `evaluate`.
        """
        return cost_text(self, operation, mapping, chip, bits, *with_defaults(bits, density, resident))

    def _repr_html_(self) -> str:
        return cost_html(self)


def evaluate(
    chip: Chip,
    operation: Operation,
    mapping: Mapping,
    bits: jax.Array,
    density: jax.Array | None = None,
    resident: jax.Array | None = None,
) -> Cost:
    """Cost of one operation under one mapping: `price` of `count`; see `price` for the arguments.

    `density` defaults to 1 (every product is computed) and `resident` to 0 (all operands start and end in DRAM).

    Raises:
      ValueError: a mapping over other levels than the chip's; bits, density or resident of another shape; bits or
        capacities that are not positive, shares outside of [0, 1], or NaN, where they are concrete: inside `jax.jit`
        values are not known.
    """
    if mapping.num_levels != len(chip.kinds):
        raise ValueError(f"expected a mapping over the chip's {len(chip.kinds)} levels, got {mapping.num_levels}")
    for name, values, shape in (("bits", bits, (3,)), ("density", density, (2,)), ("resident", resident, (3,))):
        if values is not None and np.shape(values) != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {np.shape(values)}; batch with jax.vmap")
    check_concrete(bits=bits, density=density, resident=resident)
    _check_all("the chip's size_bits", chip.size_bits, "positive", lambda x: x > 0.0)
    return price(chip, operation, count(operation, mapping), bits, *with_defaults(bits, density, resident))


def check_concrete(*, bits: jax.Array, **shares: jax.Array | None) -> None:
    """Checks what `jax.jit` has not hidden: widths in bits are positive and finite, shares lie in [0, 1].

    Raises:
      ValueError: one does not.
    """
    _check_all("bits", bits, "positive and finite", lambda x: (x > 0.0) & np.isfinite(x))
    for name, values in shares.items():
        _check_all(name, values, "in [0, 1]", lambda x: (x >= 0.0) & (x <= 1.0))


def _check_all(name: str, values: jax.Array | None, rule: str, holds: Callable[[np.ndarray], np.ndarray]) -> None:
    if values is None or isinstance(values, jax.core.Tracer):
        return
    numbers = np.asarray(values, float)
    if not np.all(holds(numbers)):
        raise ValueError(f"expected {name} {rule}, got {numbers.tolist()}")


def with_defaults(
    bits: jax.Array, density: jax.Array | None, resident: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Density (2,), by default 1, and residency (3,), by default 0, in the dtype of bits (3,)."""
    return (
        jnp.ones(2, bits.dtype) if density is None else density,
        jnp.zeros(3, bits.dtype) if resident is None else resident,
    )


def price(
    chip: Chip, operation: Operation, accesses: Accesses, bits: jax.Array, density: jax.Array, resident: jax.Array
) -> Cost:
    """Cost of counted accesses.

    Latency is the largest of the MACs' cycles and each level's traffic over its bandwidth: perfect overlap. Its
    gradient flows to the resource that binds.

    Products that are added up before the accumulator reach the innermost level that holds the sum as one: those that
    share a cycle of bricks or a table, and those of the units behind an adder tree, as far as the mapping lays a sum
    over several units.

    Args:
      chip: the chip.
      operation: the loop nest; tells which operand is accumulated and over how many products.
      accesses: words moved, per instance, from `hw.accesses.count`.
      bits: stored width of weights, inputs, outputs, shape (3,). Partial sums travel at accumulator width.
      density: share of the products' work left for the two read operands, in the order of OPERANDS, shape (2,). It
        scales cycles and energy of the MACs, energy alone if they gate zeros; 1 where the chip skips nothing.
      resident: share of weights, inputs, outputs that stays in level L - 2, shape (3,): this share of the DRAM traffic
        vanishes, with its fills of L - 2 where that level keeps the operand, or else is served by L - 2.

    Returns:
      A `Cost`, differentiable in every float argument.
    """
    accumulated = operation.accumulated > 0.5
    read_bits = jnp.stack([jnp.where(accumulated[0], bits[1], bits[0]), jnp.where(accumulated[2], bits[1], bits[2])])
    sum_bits = partial_sum_bits(chip.mac, read_bits, _reduction(operation, accumulated))
    accesses = _reside(_join_sums(chip.mac, accesses, accumulated, read_bits), resident)
    reads, fills, drained = _traffic(accesses, accumulated, bits, sum_bits)
    writes = fills + drained
    memory_energy = (jnp.stack([reads, writes], axis=-1) * chip.energy_per_bit()[:, None]).sum(axis=-1)
    wire_energy = (reads + drained) * chip.wire_energy_per_bit()[:, None]
    access_energy = accesses.instances[:, None] * (memory_energy + wire_energy)
    work = density[0] * density[1]
    slots = product_cycles(chip.mac, read_bits) * (1.0 if chip.mac.gates else work)
    mac_cycles = accesses.macs * slots
    mac_energy = accesses.macs * work * product_energy(chip.mac, chip.technology, chip.vdd, read_bits, sum_bits)
    on_chip = mac_energy + access_energy[:-1].sum()
    control_energy = on_chip * (chip.technology["clock.energy"] + chip.technology["control.energy"])

    compute_cycles = accesses.compute_cycles * slots
    level_cycles = port_cycles(chip, reads.sum(axis=1), writes.sum(axis=1))
    cycles = jnp.maximum(compute_cycles, level_cycles.max())
    return Cost(
        energy=mac_energy + access_energy.sum() + control_energy,
        latency=cycles / chip.frequency(),
        cycles=cycles,
        mac_energy=mac_energy,
        access_energy=access_energy,
        control_energy=control_energy,
        mac_cycles=mac_cycles,
        compute_cycles=compute_cycles,
        level_cycles=level_cycles,
        macs=accesses.macs,
        violation=_violation(chip, accesses, accumulated, bits, read_bits, sum_bits),
    )


def port_cycles(chip: Chip, reads: jax.Array, writes: jax.Array) -> jax.Array:
    """Cycles each level takes to move its traffic: one port serves reads and writes in turn, two ports at once.

    Args:
      chip: the chip.
      reads: bits read per instance, shape (L,).
      writes: bits written per instance, shape (L,).

    Returns:
      Cycles, shape (L,).
    """
    one_port = np.array([ports == "1RW" for ports in chip.ports])
    return jnp.where(one_port, reads + writes, jnp.maximum(reads, writes)) / chip.bits_per_cycle()


def _reduction(operation: Operation, accumulated: jax.Array) -> jax.Array:
    """Products summed into one element of the accumulated operand (borders of an accumulated input have fewer)."""
    reduced = jnp.where(REDUCED, operation.bounds[None], 1.0).prod(axis=1)
    return jnp.where(accumulated, reduced, 0.0).sum()


def _join_sums(mac: Mac, accesses: Accesses, accumulated: jax.Array, read_bits: jax.Array) -> Accesses:
    """Accesses where products that are added up before the accumulator are one partial sum.

    Only the innermost level that holds the sum meets products. A unit joins those that follow each other in time, but
    every visit of a sum takes one access at least. A tree has one accumulator, so its units hold one copy of a sum.
    """
    keep = accesses.keep > 0.5
    innermost = keep & (jnp.cumsum(keep, axis=0, dtype=jnp.int32) == 1) & accumulated[None]
    joined = jnp.maximum(accesses.updates * sums_per_product(mac, read_bits), accesses.entering)
    updates = jnp.where(innermost, jnp.minimum(joined, accesses.updates), accesses.updates)
    reads = jnp.maximum(accesses.reads - (accesses.updates - updates), 0.0)
    first = (accesses.entering - accesses.fills) * accesses.instances[:, None]
    copies = first / jnp.where(first[-1:] > 0.0, first[-1:], 1.0)
    units = jnp.where(innermost, jnp.clip(copies, 1.0, mac.tree), 1.0)
    return dataclasses.replace(
        accesses,
        reads=reads / units,
        fills=accesses.fills / units,
        updates=updates / units,
        finals=accesses.finals / units,
    )


def _reside(accesses: Accesses, resident: jax.Array) -> Accesses:
    """Accesses where a share of each operand starts and ends in level L - 2 instead of DRAM."""
    top, shared = -1, -2
    kept = accesses.keep[shared]  # (3,)
    leaving = 1.0 - resident
    # Per instance of the shared level: what DRAM would have served where that level does not keep the operand.
    moved = resident * (1.0 - kept) * accesses.instances[top] / accesses.instances[shared]

    def move(words: jax.Array) -> jax.Array:
        return words.at[shared].add(moved * words[top]).at[top].multiply(leaving)

    return dataclasses.replace(
        accesses,
        reads=move(accesses.reads),
        updates=move(accesses.updates),
        finals=move(accesses.finals),
        fills=accesses.fills.at[shared].multiply(leaving * kept + 1.0 - kept),
    )


def _traffic(
    accesses: Accesses, accumulated: jax.Array, bits: jax.Array, sum_bits: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bits read, filled from above and written from below per instance, each (L, 3).

    Finished words have their stored width, partial sums that of the accumulator.
    """
    width = jnp.where(accumulated, sum_bits, bits)[None]
    partial = accesses.updates - accesses.finals
    return accesses.reads * width, accesses.fills * width, accesses.finals * bits[None] + partial * sum_bits


def _violation(
    chip: Chip, accesses: Accesses, accumulated: jax.Array, bits: jax.Array, read_bits: jax.Array, sum_bits: jax.Array
) -> jax.Array:
    # Counts are whole words on a legal mapping: half a word tells whether a level ever receives partial sums.
    partial = accumulated[None] & (accesses.updates - accesses.finals > 0.5)
    footprint = (accesses.footprint * jnp.where(partial, sum_bits, bits[None])).sum(axis=1)
    used = jnp.concatenate([footprint, accesses.fanout.ravel(), read_bits, sum_bits[None]])
    return excess(used, chip.limits())


def excess(used: jax.Array, limits: jax.Array) -> jax.Array:
    """Relative excess of what is used over its limit, exactly 0 where it fits; both of one shape, or broadcast.

    The difference comes before the quotient: where one limit serves many uses, XLA multiplies with its inverse, and 14 of
    14 rows would exceed it by a last bit. What just fits has half the slope of what does not.
    """
    return jnp.maximum(used - limits, 0.0) / limits
