"""Multiply-accumulate units (MACs): cycles per product, energy and area.

Styles:
  "fixed": an N x M bit integer multiplier; every product takes one cycle and the energy of the full widths.
  "slices": an s x s bit multiplier used over time: ceil(a/s) ceil(b/s) cycles per product of a and b bits.
  "serial": the first read operand enters bit by bit, the second (widths[1]) in parallel: a cycles per product.
  "fp32", "fp16", "bf16", "fp8": floating-point; fp16 and bf16 accumulate in fp32, fp8 in fp16.
No style computes operands wider than `widths`: that is a violation, reported by the cost.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hw.technology import Technology, logic_energy_scale, unknown

INTEGER_STYLES = ("fixed", "slices", "serial")
# Floating-point style: (width of the operands, width of the accumulator) in bits.
FLOAT_STYLES = {"fp32": (32.0, 32.0), "fp16": (16.0, 32.0), "bf16": (16.0, 32.0), "fp8": (8.0, 16.0)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mac:
    """One multiply-accumulate unit.

    Attributes:
      widths: widest first and second read operand in bits, shape (2,).
      slice_bits: width of a slice in bits, shape (); used by style "slices" only.
      accumulator_bits: width of the accumulator in bits, shape ().
      style: see the module.
    """

    widths: jax.Array
    slice_bits: jax.Array | float
    accumulator_bits: jax.Array | float
    style: str = dataclasses.field(metadata={"static": True})


def make_mac(
    style: str = "slices",
    widths: tuple[float, float] | None = None,
    slice_bits: float = 4.0,
    accumulator_bits: float | None = None,
) -> Mac:
    """A MAC with checked numbers.

    Args:
      style: one of `INTEGER_STYLES` or `FLOAT_STYLES`.
      widths: widest operands in bits; default 8 x 8 for "fixed", 16 x 16 for "slices" and "serial".
      slice_bits: width of a slice, at most the operands' widths.
      accumulator_bits: default the operands' widths and 16 bits of growth. A float style brings its own.

    Raises:
      ValueError: an unknown style, widths not positive or given for a float style, a slice wider than operands.
    """
    if style in FLOAT_STYLES:
        if widths is not None or accumulator_bits is not None:
            raise ValueError(f"expected no widths for the float style {style!r}; it brings its own")
        operand, accumulator = FLOAT_STYLES[style]
        return Mac(jnp.full(2, operand), operand, accumulator, style)
    if style not in INTEGER_STYLES:
        raise ValueError(unknown("MAC style", style, (*INTEGER_STYLES, *FLOAT_STYLES)))
    widths = widths or ((8.0, 8.0) if style == "fixed" else (16.0, 16.0))
    accumulator = sum(widths) + 16.0 if accumulator_bits is None else accumulator_bits
    if not (min(widths) > 0 and slice_bits > 0 and accumulator > 0):
        raise ValueError(f"expected positive widths, got widths={widths}, {slice_bits=}, {accumulator_bits=}")
    if style == "slices" and slice_bits > min(widths):
        raise ValueError(f"expected slice_bits of at most {min(widths)}, the operands' width, got {slice_bits}")
    return Mac(jnp.array(widths, dtype=float), float(slice_bits), float(accumulator), style)


def partial_sum_bits(mac: Mac, bits: jax.Array, reduction: jax.Array) -> jax.Array:
    """Width of a partial sum: both operands' bits and log2 of the number of products summed; fixed for float styles.

    Args:
      mac: the unit.
      bits: widths of the two read operands, shape (2,).
      reduction: number of products per result, shape ().

    Returns:
      Bits, shape (), real-valued.
    """
    if mac.style in FLOAT_STYLES:
        return jnp.asarray(mac.accumulator_bits, bits.dtype)
    return bits.sum() + jnp.log2(reduction)


def product_cycles(mac: Mac, bits: jax.Array) -> jax.Array:
    """Cycles (slice pairs) one product takes, shape (); integer in the forward, straight-through in the gradient.

    Args:
      mac: the unit.
      bits: widths of the two read operands, shape (2,).
    """
    if mac.style == "slices":
        slices = _straight_through_ceil(bits / mac.slice_bits)
        return slices[0] * slices[1]
    if mac.style == "serial":
        return _straight_through_ceil(bits[0])
    return jnp.ones((), bits.dtype)


def cycle_energy(mac: Mac, technology: Technology, vdd: jax.Array, sum_bits: jax.Array | float) -> jax.Array:
    """Dynamic energy in joules of one busy cycle of a MAC, uniform data, shape ().

    Integer: (e_p N M + e_o (N + M) + e_a acc) gate units, N x M the multiplier (the slice, or 1 x M when serial), and
    an additive overhead for shifting slices (per accumulator and slice-product bit) or for serial operation.

    Args:
      mac: the unit.
      technology: constants.
      vdd: supply in volts, shape ().
      sum_bits: width of the partial sums being accumulated, shape ().

    Source: switching counts of synthesised units (hw/data/logic.yaml), one unit anchored on Horowitz, ISSCC 2014.
    """
    scale = logic_energy_scale(technology, vdd)
    if mac.style in FLOAT_STYLES:
        return technology[f"mac.{mac.style}.energy"] * scale
    first, second = _multiplier_widths(mac)
    units = (
        technology["mac.energy.product"] * first * second
        + technology["mac.energy.operand"] * (first + second)
        + technology["mac.energy.accumulator"] * sum_bits
    )
    if mac.style == "slices":
        units += technology["mac.slices.energy"] * sum_bits
    elif mac.style == "serial":
        units += technology["mac.serial.energy"] * (second + sum_bits)
    return units * technology["gate.energy"] * scale


def transistors(mac: Mac, technology: Technology) -> jax.Array:
    """Number of transistors of an integer MAC, monotone in every width, shape ().

    Source: synthesised units (hw/data/logic.yaml): a_p N M + a_a acc, and the overhead of slices or serial operation.
    """
    first, second = _multiplier_widths(mac)
    count = technology["mac.area.product"] * first * second + technology["mac.area.accumulator"] * mac.accumulator_bits
    if mac.style == "slices":
        # n and m slices leave n + m - 1 distances to shift by; a shifter has log2 of that many multiplexers per bit.
        positions = mac.widths.sum() / mac.slice_bits - 1.0
        count += technology["mac.slices.area"] * mac.accumulator_bits * jnp.log2(1.0 + positions)
    elif mac.style == "serial":
        count += technology["mac.serial.area"] * (second + mac.accumulator_bits)
    return count


def mac_area(mac: Mac, technology: Technology) -> jax.Array:
    """Area of one MAC in m2, shape ()."""
    if mac.style in FLOAT_STYLES:
        return technology[f"mac.{mac.style}.area"] * technology["node.area"]
    return transistors(mac, technology) * technology["logic.area"] * technology["node.area"]


def _multiplier_widths(mac: Mac) -> tuple[jax.Array | float, jax.Array | float]:
    if mac.style == "slices":
        return mac.slice_bits, mac.slice_bits
    if mac.style == "serial":
        return 1.0, mac.widths[1]
    return mac.widths[0], mac.widths[1]


def _straight_through_ceil(x: jax.Array) -> jax.Array:
    """Rounds up; the gradient passes as if it did not, or a width would never feel what a whole slice costs."""
    return jnp.ceil(x) + (x - jax.lax.stop_gradient(x))
