"""Multiply-accumulate units (MACs): cycles per product, energy and area.

Styles:
  "fixed": an N x M bit integer multiplier; every product takes one cycle and the energy of the full widths.
  "slices": an s x s bit multiplier used over time: ceil(a/s) ceil(b/s) cycles per product of a and b bits.
  "fusion": an N x M bit multiplier cut into s x s bit bricks side by side: narrow products share a cycle, and are
    summed into the one accumulator.
  "subwords": an N x M bit multiplier cut along both operands at once: n narrow products share a cycle, on the diagonal of
    its n x n parts, each with an accumulator of its own; the parts off the diagonal rest.
  "serial": the first read operand enters bit by bit, the second (widths[1]) in parallel: a cycles per product.
  "lut": the first read operand enters bit by bit, for three products at once, and its bits look up the sum of the
    second operands in a table of 2**3: a/3 cycles per product. Of a single bit, +1 or -1, four at once: 1/4 cycle.
  "fp32", "fp16", "bf16", "fp8": floating-point; fp16 and bf16 accumulate in fp32, fp8 in fp16.
No style computes operands wider than `widths`: that is a violation, reported by the cost. Units that take several
products in a cycle are kept busy only by as many products of one result; the cost does not check that there are.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hw.technology import Technology, logic_energy_scale, unknown

INTEGER_STYLES = ("fixed", "slices", "fusion", "subwords", "serial", "lut")
# Styles whose units are made of parts of `slice_bits`.
SLICED_STYLES = ("slices", "fusion", "subwords")
# Floating-point style: (width of the operands, width of the accumulator) in bits.
FLOAT_STYLES = {"fp32": (32.0, 32.0), "fp16": (16.0, 32.0), "bf16": (16.0, 32.0), "fp8": (8.0, 16.0)}
# Kinds of data whose switching was measured, on parallel multipliers only; see mac.activity in hw/data/logic.yaml.
DATA = ("uniform", "gaussian", "relu", "stationary")
PARALLEL_STYLES = ("fixed", "fusion")
# Bits that an accumulator has beyond a product, where nothing else is said.
GROWTH = 16.0
# A look-up table of "lut": entries, and the additions and writes that fill it and the products it serves, by mode.
TABLE_ENTRIES = 8.0
TABLE_MULTIBIT = {"additions": 4.0, "writes": 7.0, "products": 3.0}
TABLE_SIGN = {"additions": 12.0, "writes": 8.0, "products": 4.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mac:
    """One multiply-accumulate unit.

    Attributes:
      widths: widest first and second read operand in bits, shape (2,).
      slice_bits: width of a slice, brick or narrowest subword in bits, shape (); used by `SLICED_STYLES` only.
      accumulator_bits: width of the accumulator in bits, shape ().
      tree: units whose products an adder tree sums before the one accumulator they share, shape ().
      table_sharing: units that read one table, each for another output channel, shape (); used by style "lut" only.
      style: see the module.
      data: kind of operands that energy is told for, one of `DATA`.
      rounds: whether a sum wider than the accumulator loses its lowest bits; else it is a violation.
      gates: whether products of zeros that a chip does not compute take their cycles all the same, so save energy alone.
    """

    widths: jax.Array
    slice_bits: jax.Array | float
    accumulator_bits: jax.Array | float
    tree: jax.Array | float
    table_sharing: jax.Array | float
    style: str = dataclasses.field(metadata={"static": True})
    data: str = dataclasses.field(metadata={"static": True})
    rounds: bool = dataclasses.field(default=False, metadata={"static": True})
    gates: bool = dataclasses.field(default=False, metadata={"static": True})


def make_mac(
    style: str = "slices",
    widths: tuple[float, float] | None = None,
    slice_bits: float = 4.0,
    accumulator_bits: float | None = None,
    *,
    tree: float = 1.0,
    table_sharing: float = 16.0,
    data: str = "uniform",
    rounds: bool = False,
    gates: bool = False,
) -> Mac:
    """A MAC with checked numbers.

    Args:
      style: one of `INTEGER_STYLES` or `FLOAT_STYLES`.
      widths: widest operands in bits, 1 or more; default 8 x 8 for "fixed" and "fusion", 16 x 16 for the others.
      slice_bits: width of a slice, brick or narrowest subword, at most the operands' widths.
      accumulator_bits: default the operands' widths and `GROWTH`. A float style brings its own.
      tree: units that share an accumulator behind an adder tree, 1 or more; integer styles only.
      table_sharing: units that share a table, 1 or more. The default is an assumption: UNPU, which has such tables,
        shares them over output channels, of how many is not public.
      data: kind of operands; other than "uniform" for "fixed" and "fusion" only, whose switching was measured.
      rounds: whether sums wider than the accumulator lose their lowest bits; else they are a violation.
      gates: whether zeros that are not computed take their cycles all the same.

    Raises:
      ValueError: an unknown style or kind of data, one that was not measured for this style, widths below one bit or
        given for a float style, a slice wider than operands, a tree or sharing below 1.
    """
    if style not in INTEGER_STYLES and style not in FLOAT_STYLES:
        raise ValueError(unknown("MAC style", style, (*INTEGER_STYLES, *FLOAT_STYLES)))
    if data not in DATA:
        raise ValueError(unknown("kind of data", data, DATA))
    if data != "uniform" and style not in PARALLEL_STYLES:
        raise ValueError(f"expected uniform data for the style {style!r}, got {data!r}; nothing else was measured")
    if not (tree >= 1.0 and table_sharing >= 1.0):
        raise ValueError(f"expected tree and table_sharing of 1 or more, got {tree=}, {table_sharing=}")
    if style in FLOAT_STYLES:
        if widths is not None or accumulator_bits is not None or tree != 1.0:
            raise ValueError(f"expected no widths and no tree for the float style {style!r}; it brings its own")
        operand, accumulator = FLOAT_STYLES[style]
        return Mac(jnp.full(2, operand), operand, accumulator, 1.0, float(table_sharing), style, data, gates=gates)
    widths = widths or ((8.0, 8.0) if style in PARALLEL_STYLES else (16.0, 16.0))
    accumulator = sum(widths) + GROWTH if accumulator_bits is None else accumulator_bits
    if not (min(widths) >= 1.0 and slice_bits >= 1.0 and accumulator >= 1.0):
        raise ValueError(f"expected widths of 1 bit or more, got {widths=}, {slice_bits=}, {accumulator_bits=}")
    if style in SLICED_STYLES and slice_bits > min(widths):
        raise ValueError(f"expected slice_bits of at most {min(widths)}, the operands' width, got {slice_bits}")
    # An array, as designs that search for it have: with a Python number every function would be compiled once more.
    slice_width = jnp.asarray(slice_bits, dtype=float)
    numbers = float(accumulator), float(tree), float(table_sharing)
    return Mac(jnp.array(widths, dtype=float), slice_width, *numbers, style, data, rounds, gates)


def partial_sum_bits(mac: Mac, bits: jax.Array, reduction: jax.Array) -> jax.Array:
    """Width of a partial sum: both operands' bits and log2 of the number of products summed; fixed for float styles.

    A MAC that `rounds` keeps no more bits than its accumulator has.

    Args:
      mac: the unit.
      bits: widths of the two read operands, shape (2,).
      reduction: number of products per result, shape ().

    Returns:
      Bits, shape (), real-valued.
    """
    if mac.style in FLOAT_STYLES:
        return jnp.asarray(mac.accumulator_bits, bits.dtype)
    exact = bits.sum() + jnp.log2(reduction)
    return jnp.minimum(exact, mac.accumulator_bits) if mac.rounds else exact


def product_cycles(mac: Mac, bits: jax.Array) -> jax.Array:
    """Cycles one product takes, shape (): slice pairs, bits, or the share of a cycle where products run side by side.

    Whole slices, bricks and bits in the forward pass. The gradient is the slope of the chord to the next width that takes
    fewer cycles, per operand: what a narrower width saves, over the bits that it takes to get there. So five bits in
    slices of four feel all of the second slice, eight a quarter of it, and one slice has nothing left to lose. Bricks
    serve whole products per axis: of four, three are one product and an idle brick.

    Args:
      mac: the unit.
      bits: widths of the two read operands, shape (2,).

    Source: Bit Fusion (ISCA 2018) for "fusion", Envision (ISSCC 2017) for "subwords", Stripes (MICRO 2016) for "serial",
    UNPU (JSSC 2019) for "lut".
    """
    if mac.style == "slices":
        slices = _parts(bits, mac)
        return _with_chord(slices, bits, slices - 1.0, mac.slice_bits * (slices - 1.0)).prod()
    if mac.style == "fusion":
        copies = _parallel_products(mac, bits)
        narrower = mac.slice_bits * jnp.floor(_bricks(mac) / (copies + 1.0))
        lower = 1.0 / _parallel_products(mac, jnp.maximum(narrower, 1.0))
        return _with_chord(1.0 / copies, bits, lower, narrower).prod()
    if mac.style == "subwords":
        copies = _subwords(mac, bits)
        narrower = mac.slice_bits * jnp.floor(_bricks(mac).min() / (copies + 1.0))
        lower = 1.0 / _subwords(mac, jnp.full(2, jnp.maximum(narrower, 1.0)))
        return _with_chord(1.0 / copies, bits.max(), lower, narrower)
    if mac.style in ("serial", "lut"):
        serial = jnp.ceil(bits[0])
        cycles = _with_chord(serial, bits[0], serial - 1.0, serial - 1.0)
        return cycles if mac.style == "serial" else cycles / _table(bits, "products")
    return jnp.ones((), bits.dtype)


def sums_per_product(mac: Mac, bits: jax.Array) -> jax.Array:
    """Partial sums that leave a unit per product, shape (): 1, or less where it adds products up before it accumulates.

    Bricks side by side add all products of a cycle, a table serves three or four in one. An adder tree joins several
    units, which a mapping tells apart; see `hw.cost.price`.

    Args:
      mac: the unit.
      bits: widths of the two read operands, shape (2,).

    Source: Bit Fusion (ISCA 2018) for "fusion", UNPU (JSSC 2019) for "lut".
    """
    if mac.style == "fusion":
        return product_cycles(mac, bits)
    return 1.0 / _table(bits, "products") if mac.style == "lut" else jnp.ones((), bits.dtype)


def product_energy(
    mac: Mac, technology: Technology, vdd: jax.Array, bits: jax.Array, sum_bits: jax.Array | float
) -> jax.Array:
    """Dynamic energy in joules of one product, shape (): its cycles, and its share of filling a table for "lut".

    A table costs additions and register writes as wide as the sum of three or four operands. It is filled once for all
    bits of the first operand and for all `table_sharing` units: the part that does not fall with those bits.

    Args:
      mac: the unit.
      technology: constants.
      vdd: supply in volts, shape ().
      bits: widths of the two read operands, shape (2,).
      sum_bits: width of the partial sums being accumulated, shape ().

    Source: as `cycle_energy`; numbers of additions and writes by counting those that eight sums take.
    """
    copies = jax.lax.stop_gradient(_subwords(mac, bits)) if mac.style == "subwords" else 1.0
    energy = product_cycles(mac, bits) * cycle_energy(mac, technology, vdd, sum_bits, copies)
    if mac.style != "lut":
        return energy
    write = technology["register.energy.write"] + technology["register.energy.write_depth"] * TABLE_ENTRIES
    fill = _table(bits, "additions") * technology["mac.energy.operand"] + _table(bits, "writes") * write
    share = _entry_bits(mac) / (mac.table_sharing * _table(bits, "products"))
    return energy + fill * share * technology["gate.energy"] * logic_energy_scale(technology, vdd)


def cycle_energy(
    mac: Mac, technology: Technology, vdd: jax.Array, sum_bits: jax.Array | float, subwords: jax.Array | float = 1.0
) -> jax.Array:
    """Dynamic energy in joules of one busy cycle of a MAC, shape ().

    Integer: (activity (e_p N M + e_o p) + e_a acc / n) gate units. N x M is the multiplier (the slice, 1 x M when
    serial), p = N + M the width of what is added, acc the partial sum, shared by n units behind an adder tree: n
    products take n additions with or without a tree, those of the tree wider by (n - 1)/n bit on average. A table is
    read like a register file of its depth. Of n subwords a share 1/n of the multiplier works, and n sums are accumulated.
    To these come an additive overhead for shifting slices, for cutting bricks or subwords apart, or for serial operation.

    Args:
      mac: the unit.
      technology: constants.
      vdd: supply in volts, shape ().
      sum_bits: width of the partial sums being accumulated, shape ().
      subwords: narrow products that share the cycle of a multiplier of this style, shape ().

    Source: switching counts of synthesised units (hw/data/logic.yaml), one unit anchored on Horowitz, ISSCC 2014.
    """
    scale = logic_energy_scale(technology, vdd)
    if mac.style in FLOAT_STYLES:
        return technology[f"mac.{mac.style}.energy"] * scale
    first, second = _multiplier_widths(mac)
    added, product = first + second, technology["mac.energy.product"] * first * second
    if mac.style == "lut":
        added, product = second, _table_read(technology) * second
    elif mac.style == "subwords":
        product = product * (1.0 + technology["mac.subwords.energy"]) / subwords
    addition = technology["mac.energy.operand"] * (added + (mac.tree - 1.0) / mac.tree)
    accumulated = sum_bits * subwords / mac.tree
    units = technology[f"mac.activity.{mac.data}"] * (product + addition)
    units += technology["mac.energy.accumulator"] * accumulated
    if mac.style == "slices":
        units += technology["mac.slices.energy"] * accumulated
    elif mac.style == "fusion":
        units += technology["mac.fusion.energy"] * _cut_bits(mac)
    elif mac.style in ("serial", "lut"):
        units += technology["mac.serial.energy"] * (second + accumulated)
    return units * technology["gate.energy"] * scale


def transistors(mac: Mac, technology: Technology) -> jax.Array:
    """Number of transistors of an integer MAC, monotone in every width, shape ().

    a (N - 1/2)(M - 1/2) + c (acc - 1) / n, the adder tree's share, and the overhead of slices, bricks, serial
    operation or a table. A tree over n products of p bits holds (n - 1)(p + 1) - log2(n) bits of adders, one bit wider
    from stage to stage. Subwords share the bits of one accumulator.

    Source: synthesised units (hw/data/logic.yaml).
    """
    first, second = _multiplier_widths(mac)
    added, accumulator = first + second, mac.accumulator_bits / mac.tree
    count = technology["mac.area.accumulator"] * (mac.accumulator_bits - 1.0) / mac.tree
    if mac.style == "lut":
        added = second
        table = TABLE_ENTRIES * technology["register.area"] + TABLE_SIGN["additions"] * technology["mac.area.adder"]
        count += (TABLE_ENTRIES * technology["mac.lut.port"] + table / mac.table_sharing) * second
    else:
        count += technology["mac.area.product"] * (first - 0.5) * (second - 0.5)
    tree_bits = (mac.tree - 1.0) * (added + 1.0) - jnp.log2(mac.tree)
    count += technology["mac.area.adder"] * tree_bits / mac.tree
    if mac.style == "slices":
        # n and m slices leave n + m - 1 distances to shift by; a shifter has log2 of that many multiplexers per bit.
        positions = mac.widths.sum() / mac.slice_bits - 1.0
        count += technology["mac.slices.area"] * accumulator * jnp.log2(1.0 + positions)
    elif mac.style == "fusion":
        count += technology["mac.fusion.area"] * _cut_bits(mac)
    elif mac.style == "subwords":
        count += technology["mac.subwords.area"] * technology["mac.area.product"] * first * second
    elif mac.style in ("serial", "lut"):
        count += technology["mac.serial.area"] * (second + accumulator)
    return count


def mac_area(mac: Mac, technology: Technology) -> jax.Array:
    """Area of one MAC in m2, shape ()."""
    if mac.style in FLOAT_STYLES:
        return technology[f"mac.{mac.style}.area"] * technology["node.area"]
    return transistors(mac, technology) * technology["logic.area"] * technology["node.area"]


def _multiplier_widths(mac: Mac) -> tuple[Any, Any]:
    if mac.style == "slices":
        return mac.slice_bits, mac.slice_bits
    if mac.style == "serial":
        return 1.0, mac.widths[1]
    if mac.style == "lut":
        return 1.0, _entry_bits(mac)
    return mac.widths[0], mac.widths[1]


def _parts(bits: jax.Array, mac: Mac) -> jax.Array:
    """Slices or bricks that so many bits take, of the shape of `bits`."""
    # XLA multiplies with the inverse of a shared divisor: 21 / 7 is 3 and a last bit, which is no fourth slice.
    return jnp.ceil(bits / mac.slice_bits * (1.0 - 1e-6))


def _bricks(mac: Mac) -> jax.Array:
    """Bricks along each axis, shape (2,)."""
    return _parts(mac.widths, mac)


def _parallel_products(mac: Mac, bits: jax.Array) -> jax.Array:
    """Products side by side along each axis of the bricks, shape (2,)."""
    # Operands too wide, which is a violation, still take all bricks.
    return jnp.maximum(jnp.floor(_bricks(mac) / _parts(bits, mac)), 1.0)


def _subwords(mac: Mac, bits: jax.Array) -> jax.Array:
    """Products side by side on the diagonal of a multiplier cut into parts, shape ()."""
    return _parallel_products(mac, bits).min()


def _cut_bits(mac: Mac) -> jax.Array:
    """Bits of partial products at the edges of bricks, times log2 of the distances they may have to be shifted by."""
    return mac.widths.prod() / mac.slice_bits * jnp.log2(mac.widths.sum())


def _entry_bits(mac: Mac) -> jax.Array:
    """Width of a table entry, the sum of three or four second operands."""
    return mac.widths[1] + 2.0


def _table(bits: jax.Array, what: str) -> jax.Array:
    """What a table takes or serves in the mode for a first operand of this many bits, shape ()."""
    return jnp.where(bits[0] <= 1.0, TABLE_SIGN[what], TABLE_MULTIBIT[what]).astype(bits.dtype)


def _table_read(technology: Technology) -> jax.Array:
    """Gate units to read one bit of a table: the multiplexers of a register file as deep, see `hw.memory`."""
    depth = TABLE_ENTRIES
    return technology["register.energy.read"] * depth**2 / (depth + technology["register.energy.read_depth"])


def _with_chord(value: jax.Array, bits: jax.Array, lower: jax.Array, narrower: jax.Array) -> jax.Array:
    """A staircase's value at whole `bits`, with the slope of the chord to its next lower step.

    Args:
      value: at `bits`.
      bits: widths, real-valued; whole ones are meant.
      lower: value of the next lower step.
      narrower: widest width on that step; below one bit there is none, and the slope is zero.
    """
    distance = jnp.ceil(bits) - narrower  # at least 1 wherever it is used
    slope = jnp.where(narrower >= 1.0, (value - lower) / jnp.maximum(distance, 1.0), 0.0)
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + slope * (bits - jax.lax.stop_gradient(bits))
