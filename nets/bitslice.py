"""Bit slices: integers cut into narrow digits, products of digits that sum to the exact product, and their zeros.

Chips with bit-slice multipliers build a wide product from narrow ones and skip those with a zero slice. Two codes are
offered. In *two's complement* the lower slices are unsigned and the top one is signed, so a small negative number has
the top slice -1. *Signed bit slices* are the sign times the digits of the magnitude in radix 2**(width - 1): a small
number of either sign has zero top slices.

Sums of slice products stay exact: in float32 below 2**24 (`FLOAT32_LIMIT`), beyond that in integers.

Source: signed bit slices are those of D. Im et al., Sibia: Signed Bit-slice Architecture for Dense DNN Acceleration
with Slice-level Sparsity Exploitation, HPCA 2023.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

STYLES = ("twos_complement", "signed")
MAX_BITS = 16
MAX_WIDTH = 8
#: Sums of integers in float32 are exact while no partial sum reaches this magnitude.
FLOAT32_LIMIT = 2**24


@dataclass(frozen=True)
class Slicing:
    """How an integer operand is cut; made by `make_slicing`.

    Attributes:
      num_bits: width of the operand.
      width: width of a slice.
      style: "twos_complement" or "signed".
      has_sign: whether the operand may be negative: it spans [-2**(num_bits - 1), 2**(num_bits - 1)), else
        [0, 2**num_bits).
    """

    num_bits: int
    width: int
    style: str
    has_sign: bool = True

    @property
    def shift(self) -> int:
        """log2 of the weight of a slice over that of the one below."""
        return self.width if self.style == "twos_complement" else self.width - 1

    @property
    def num_slices(self) -> int:
        """Slices of an operand, the top one possibly with room to spare."""
        digits = self.num_bits - (self.has_sign and self.style == "signed")
        return max(1, -(-digits // self.shift))

    @property
    def largest(self) -> int:
        """Largest magnitude of the operand."""
        return 2 ** (self.num_bits - 1) if self.has_sign else 2**self.num_bits - 1

    @property
    def largest_digits(self) -> tuple[int, ...]:
        """Largest magnitude of each slice, lowest first."""
        top = max(1, self.largest >> self.shift * (self.num_slices - 1))
        return (2**self.shift - 1,) * (self.num_slices - 1) + (top,)


@dataclass(frozen=True)
class BitSlices:
    """A multiplier of bit slices, in rules: the width of a slice and the style of the code."""

    width: int = 4
    style: str = "signed"


def make_slicing(num_bits: int, width: int, style: str = "signed", has_sign: bool = True) -> Slicing:
    """A slicing, checked.

    A width that does not divide the operand leaves the top slice with room to spare: 8 bits in signed slices of 4 are
    3 + 3 + 1 digits.

    Args:
      num_bits: width of the operand, 1 to 16.
      width: width of a slice, 1 to 8, at most `num_bits`; signed slices need 2.
      style: "twos_complement" or "signed".
      has_sign: whether the operand may be negative.

    Returns:
      The slicing.

    Raises:
      ValueError: for anything outside these limits.
    """
    if style not in STYLES:
        raise ValueError(f"expected a style among {', '.join(STYLES)}, got {style!r}; choose one of them")
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"expected operands of 1 to {MAX_BITS} bits, got {num_bits}; change the operand's width")
    least = 2 if style == "signed" else 1
    if not least <= width <= min(MAX_WIDTH, num_bits):
        raise ValueError(
            f"expected {style} slices of {least} to {min(MAX_WIDTH, num_bits)} bits for an operand of {num_bits} bits, "
            f"got {width}; change the slice width"
        )
    return Slicing(num_bits, width, style, has_sign)


def slices(x: jax.Array, slicing: Slicing) -> jax.Array:
    """The slices d_i of integers x = sum_i d_i * 2**(shift * i).

    Args:
      x: integers, or floats that hold integers, in the range of `slicing`, of any shape.
      slicing: how to cut.

    Returns:
      int32 of shape (num_slices, *x.shape), lowest slice first.
    """
    x = x.astype(jnp.int32)
    signed = slicing.style == "signed"
    # Magnitude and sign apart for signed slices; an arithmetic shift keeps the sign in the top slice otherwise.
    value = jnp.abs(x) if signed else x
    mask, top = 2**slicing.shift - 1, slicing.num_slices - 1
    digits = jnp.stack([(value >> slicing.shift * i) & mask for i in range(top)] + [value >> slicing.shift * top])
    return digits * jnp.sign(x)[None] if signed else digits


def join(digits: jax.Array, slicing: Slicing) -> jax.Array:
    """The integers that slices stand for: the inverse of `slices`.

    Args:
      digits: integers of shape (num_slices, ...).
      slicing: how they were cut.

    Returns:
      int32 of shape `digits.shape[1:]`.
    """
    return sum(digits[i].astype(jnp.int32) << slicing.shift * i for i in range(slicing.num_slices))  # type: ignore


def sum_dtype(num_terms: int, lhs: Slicing, rhs: Slicing) -> Any:
    """The narrowest dtype that holds every sum of products of two sliced operands.

    Args:
      num_terms: products that are added, the K of a matrix product.
      lhs, rhs: the operands.

    Returns:
      `float32` while sums of magnitudes of scaled slice products stay below 2**24, then `int32`, then `int64` under
      double precision. With 8 x 8 bits in signed slices float32 ends at K = 1023.

    Raises:
      ValueError: if integers may overflow.
    """
    magnitude = num_terms * _sum_of_digits(lhs) * _sum_of_digits(rhs)
    if magnitude < FLOAT32_LIMIT:
        return jnp.float32
    if num_terms * lhs.largest * rhs.largest <= 2**31 - 1:
        return jnp.int32
    if jax.dtypes.canonicalize_dtype("int64") == jnp.int64:
        return jnp.int64
    raise ValueError(
        f"expected sums of {num_terms} products of {lhs.num_bits} x {rhs.num_bits} bits to fit int32, got a possible "
        f"magnitude of {num_terms * lhs.largest * rhs.largest}; use narrower operands, or jax_enable_x64"
    )


def sliced_dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, lhs_slicing: Slicing, rhs_slicing: Slicing
) -> jax.Array:
    """`lax.dot_general` of integers as a sum of slice products, exact.

    Slice pairs are one more contracted dimension: no product of a pair alone exists in memory. Where float32 does not
    hold the sum of all pairs, it is made of several sums, as few as are exact in float32 (or integers, where float32
    does not even hold those of one pair), which are joined as integers. The gradient is that of the product of
    integers.

    Args:
      lhs, rhs: integers, or floats that hold integers.
      dimension_numbers: of `lax.dot_general`.
      lhs_slicing, rhs_slicing: how to cut them.

    Returns:
      The product: in the operands' dtype if that is a float (exact integers while the dtype holds them), else int32,
      or int64 where needed and enabled.

    Raises:
      ValueError: if integers may overflow (`sum_dtype`).
    """
    (contract, _), _ = dimension_numbers
    num_terms = math.prod(lhs.shape[axis] for axis in contract)
    multiply = partial(_dot, dimension_numbers)
    return _sliced(multiply, num_terms, lhs_slicing, rhs_slicing, lhs, rhs)


def sliced_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_slicing: Slicing,
    rhs_slicing: Slicing,
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` of integers as a sum of slice products, exact.

    Slice pairs are further input channels of one convolution; the rest is as for `sliced_dot_general`.

    Args:
      lhs, rhs: integers, or floats that hold integers.
      window_strides, padding: of `lax.conv_general_dilated`.
      lhs_slicing, rhs_slicing: how to cut them.
      **options: `lhs_dilation`, `rhs_dilation`, `dimension_numbers`, `feature_group_count`.

    Returns:
      As `sliced_dot_general`.

    Raises:
      ValueError: if integers may overflow (`sum_dtype`), or for a convolution with batch groups.
    """
    if options.get("batch_group_count", 1) != 1:
        raise ValueError("expected a convolution without batch groups, got some; multiply its groups one by one")
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
    num_terms = rhs.size // rhs.shape[numbers.rhs_spec[0]]
    options = options | {"dimension_numbers": numbers, "window_strides": window_strides, "padding": padding}
    multiply = partial(_conv, tuple((name, value) for name, value in options.items() if value is not None))
    return _sliced(multiply, num_terms, lhs_slicing, rhs_slicing, lhs, rhs)


def nonzero_slices(x: jax.Array, slicing: Slicing, lanes: int = 1) -> jax.Array:
    """Groups of slices that cannot be skipped, counted exactly.

    Args:
      x: integers, or floats that hold integers, of any shape.
      slicing: how to cut.
      lanes: neighbours along the last axis that work in lock-step: a group is skipped only if all its slices are
        zero. A last group that is not full counts as one.

    Returns:
      int32 of shape (num_slices,), lowest slice first; of ceil(last / lanes) groups per row each.
    """
    return jnp.sum(_any_lane(slices(x, slicing) != 0, lanes), axis=tuple(range(1, x.ndim + 1)), dtype=jnp.int32)


def nonzero_pairs(lhs: jax.Array, rhs: jax.Array, lhs_slicing: Slicing, rhs_slicing: Slicing, lanes: int = 1) -> Any:
    """Groups of slice pairs of a matrix product that cannot be skipped, counted exactly.

    A pair is skipped if either slice is zero; with `lanes` neighbours along K in lock-step, a group of pairs only if
    all of them are. No independence of the operands is assumed.

    Args:
      lhs: integers, shape (M, K). A convolution takes this form by `lax.conv_general_dilated_patches`.
      rhs: integers, shape (K, N).
      lhs_slicing, rhs_slicing: how to cut them.
      lanes: products of neighbouring k that work in lock-step.

    Returns:
      int32 of shape (num_slices of lhs, num_slices of rhs); of M * N * ceil(K / lanes) groups each.

    Raises:
      ValueError: if the count of groups may overflow int32.
    """
    groups = -(-lhs.shape[1] // lanes)
    if lhs.shape[0] * rhs.shape[1] * groups > 2**31 - 1:
        raise ValueError(
            f"expected at most 2**31 - 1 groups, got {lhs.shape[0]} x {rhs.shape[1]} x {groups}; count in smaller batches"
        )

    def cut(x: jax.Array, slicing: Slicing) -> jax.Array:
        """(rows, K) to (groups, slices, rows, lanes), as float32 zeros and ones."""
        nonzero = jnp.pad(slices(x, slicing) != 0, ((0, 0), (0, 0), (0, groups * lanes - x.shape[1])))
        return jnp.moveaxis(nonzero.reshape(*nonzero.shape[:2], groups, lanes), 2, 0).astype(jnp.float32)

    def of_group(group: tuple[jax.Array, jax.Array]) -> jax.Array:
        meets = jnp.einsum("imk,jnk->ijmn", *group, precision=lax.Precision.HIGHEST)
        return jnp.sum(meets > 0.0, axis=(2, 3), dtype=jnp.int32)

    return jnp.sum(lax.map(of_group, (cut(lhs, lhs_slicing), cut(rhs.T, rhs_slicing))), axis=0, dtype=jnp.int32)


def nonzero_probability(x: jax.Array, slicing: Slicing, temperature: float = 1.0) -> jax.Array:
    """Differentiable stand-in for "some slice at or above i is not zero": an upper bound for slice i.

    A logistic in (|x| - radix**i + 1/2) / temperature, for signed slices only: in two's complement a small negative
    number has no zero slice.

    Args:
      x: floats in steps of the operand's format, of any shape.
      slicing: how to cut.
      temperature: of the logistic, > 0; at 0 it would be the exact indicator of integers.

    Returns:
      Shape (num_slices, *x.shape), dtype of `x`.

    Raises:
      ValueError: for slices in two's complement.
    """
    if slicing.style != "signed":
        raise ValueError("expected signed slices, got two's complement; use the measured densities of `nonzero_slices`")
    magnitude = jnp.abs(x)
    return jnp.stack(
        [
            jax.nn.sigmoid((magnitude - 2.0 ** (slicing.shift * i) + 0.5) / temperature)
            for i in range(slicing.num_slices)
        ]
    )


def _sum_of_digits(slicing: Slicing) -> int:
    """Largest sum of magnitudes of the scaled slices of one operand."""
    return sum(digit << slicing.shift * i for i, digit in enumerate(slicing.largest_digits))


def _any_lane(mask: jax.Array, lanes: int) -> jax.Array:
    """Whether any of `lanes` neighbours along the last axis is set."""
    if lanes == 1:
        return mask
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % lanes)])
    return jnp.any(mask.reshape(*mask.shape[:-1], -1, lanes), axis=-1)


def _dot(numbers: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Sum over the leading axis of products of both operands."""
    contract, batch = ([[axis + 1 for axis in axes] for axes in pair] for pair in numbers)
    numbers = (([0, *contract[0]], [0, *contract[1]]), (batch[0], batch[1]))
    return lax.dot_general(lhs, rhs, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=lhs.dtype)


def _conv(options: tuple[tuple[str, Any], ...], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Sum over the leading axis of convolutions: that axis joins the input channels of each feature group."""
    params = dict(options)
    numbers, groups = params["dimension_numbers"], params.get("feature_group_count", 1)

    def into_channels(x: jax.Array, axis: int, groups: int) -> jax.Array:
        shape = x.shape[1:]
        split = x.reshape(x.shape[0], *shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
        return jnp.moveaxis(split, 0, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])

    params |= {"precision": lax.Precision.HIGHEST, "preferred_element_type": lhs.dtype}
    return lax.conv_general_dilated(
        into_channels(lhs, numbers.lhs_spec[1], groups), into_channels(rhs, numbers.rhs_spec[1], 1), **params
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sliced(multiply, num_terms, lhs_slicing, rhs_slicing, lhs, rhs):
    dtype = sum_dtype(num_terms, lhs_slicing, rhs_slicing)
    lhs_digits, rhs_digits = slices(lhs, lhs_slicing), slices(rhs, rhs_slicing)
    total: Any = 0
    for lowest, part_dtype, pairs in _parts(num_terms, dtype, lhs_slicing, rhs_slicing):
        # The weight of a pair relative to the lowest of its part goes to the operand on the left.
        scaled = jnp.stack([lhs_digits[i] << weight - lowest for weight, i, _ in pairs])
        picked = jnp.stack([rhs_digits[j] for _, _, j in pairs])
        product = multiply(scaled.astype(part_dtype), picked.astype(part_dtype))
        total = product if dtype == jnp.float32 else total + (product.astype(dtype) << lowest)
    is_float = jnp.issubdtype(lhs.dtype, jnp.floating)
    return total.astype(lhs.dtype if is_float else jnp.int32 if dtype == jnp.float32 else dtype)


def _sliced_fwd(multiply, num_terms, lhs_slicing, rhs_slicing, lhs, rhs):
    return _sliced(multiply, num_terms, lhs_slicing, rhs_slicing, lhs, rhs), (lhs, rhs)


def _sliced_bwd(multiply, num_terms, lhs_slicing, rhs_slicing, residuals, g):
    _, pullback = jax.vjp(lambda lhs, rhs: multiply(lhs[None], rhs[None]), *residuals)
    return pullback(g)


_sliced.defvjp(_sliced_fwd, _sliced_bwd)


def _parts(num_terms: int, dtype: Any, lhs: Slicing, rhs: Slicing) -> list[tuple[int, Any, list[tuple[int, int, int]]]]:
    """Slice pairs (weight, i, j) in as few parts as can be summed exactly: (lowest weight, dtype of the sum, pairs).

    A part takes pairs in the order of their weights while float32 holds its sum. A pair that float32 cannot sum alone
    is a part in integers.
    """
    pairs = sorted((lhs.shift * i + rhs.shift * j, i, j) for i in range(lhs.num_slices) for j in range(rhs.num_slices))
    parts: list[tuple[int, Any, list[tuple[int, int, int]]]] = []
    magnitude = 0
    for weight, i, j in pairs:
        term = num_terms * lhs.largest_digits[i] * rhs.largest_digits[j]
        if parts and magnitude + (term << weight - parts[-1][0]) < FLOAT32_LIMIT:
            parts[-1][2].append((weight, i, j))
            magnitude += term << weight - parts[-1][0]
        else:
            parts.append((weight, jnp.float32 if term < FLOAT32_LIMIT else dtype, [(weight, i, j)]))
            magnitude = term
    return parts
