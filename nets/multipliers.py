"""How a chip forms the product of two integer operands: bit slices, look-up tables, or integers with a dequantiser.

All take the same levels, integers in floats, and give the product of the levels; only the FP16 dequantiser rounds.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nets.bitslice import (
    FLOAT32_LIMIT,
    BitSlices,
    Slicing,
    make_slicing,
    sliced_conv_general_dilated,
    sliced_dot_general,
)
from nets.decomposed import Decomposed, dequantise_fp16, enter_fp16, integer_part
from nets.jaxpr import Product
from nets.lookup import LookUp, binary_lookup_dot, lookup_dot

Multiplier = BitSlices | LookUp | Decomposed


def by_role(product: Product, first: Any, second: Any) -> tuple[Any, Any]:
    """(lhs, rhs) of a product to (weights, inputs), or back."""
    return (first, second) if product.weights_operand == 0 else (second, first)


def multiply(product: Product, weights: jax.Array, inputs: jax.Array) -> jax.Array:
    """The product itself, at full precision: TPUs multiply in bfloat16 and GPUs may in TF32 unless told.

    Args:
      product: which.
      weights, inputs: operands of its shapes, in one float dtype.

    Returns:
      Its result, in that dtype.
    """
    primitive = lax.dot_general if product.kind == "dot" else lax.conv_general_dilated
    params = {name: value for name, value in product.params.items() if value is not None}
    params |= {"precision": lax.Precision.HIGHEST, "preferred_element_type": None}
    return primitive(*by_role(product, weights, inputs), **params)


def multiply_levels(
    multiplier: Multiplier,
    product: Product,
    bits: tuple[int, int],
    signed: tuple[bool, bool],
    weights: jax.Array,
    inputs: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """`scale` times the product of integers, as a multiplier forms it.

    Args:
      multiplier: the multiplier.
      product: which product.
      bits: widths of weights and inputs; weights of one bit are -1 and 1, for look-up.
      signed: whether they have a sign.
      weights, inputs: integers in floats, of the product's shapes.
      scale: a power of two, shape ().

    Returns:
      The product in the operands' dtype: exact for slices and look-up, as long as that dtype holds the integers;
      rounded to FP16 by a dequantiser, or left to the one that `nets.merging` puts behind it.

    Raises:
      ValueError: if the operands do not fit the multiplier, or integers may overflow.
    """
    if isinstance(multiplier, BitSlices):
        return scale * _multiply_slices(multiplier, product, bits, signed, weights, inputs)
    if isinstance(multiplier, LookUp):
        return scale * _multiply_by_lookup(product, bits, weights, inputs).astype(weights.dtype)
    return _multiply_decomposed(multiplier, product, bits, signed, weights, inputs, scale)


def _multiply_slices(
    multiplier: BitSlices,
    product: Product,
    bits: tuple[int, int],
    signed: tuple[bool, bool],
    weights: jax.Array,
    inputs: jax.Array,
) -> jax.Array:
    def slicing(width: int, has_sign: bool) -> Slicing:
        return make_slicing(width, multiplier.width, multiplier.style, has_sign)

    lhs_slicing, rhs_slicing = by_role(product, *map(slicing, bits, signed))
    lhs, rhs = by_role(product, weights, inputs)
    if product.kind == "dot":
        return sliced_dot_general(lhs, rhs, product.params["dimension_numbers"], lhs_slicing, rhs_slicing)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    options = {name: product.params[name] for name in (*names, "feature_group_count", "batch_group_count")}
    return sliced_conv_general_dilated(lhs, rhs, lhs_slicing=lhs_slicing, rhs_slicing=rhs_slicing, **options)


def _multiply_by_lookup(product: Product, bits: tuple[int, int], weights: jax.Array, inputs: jax.Array) -> jax.Array:
    if product.kind == "dot":
        return _lookup_matrices(product, bits, weights, inputs)
    params = product.params
    numbers = params["dimension_numbers"]
    if params["feature_group_count"] * params["batch_group_count"] != 1 or product.weights_operand != 1:
        raise ValueError("expected a convolution without groups for look-up, got groups; multiply it as a whole")
    window = tuple(weights.shape[axis] for axis in numbers.rhs_spec[2:])
    patches = lax.conv_general_dilated_patches(
        inputs,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
    )
    # Patches have channels before places in the window.
    rows = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    out_features, *rest = numbers.rhs_spec
    columns = jnp.transpose(weights, (*rest, out_features)).reshape(-1, weights.shape[out_features])
    out = _look_up(rows.reshape(-1, rows.shape[-1]), columns, bits)
    return jnp.moveaxis(out.reshape(*rows.shape[:-1], -1), -1, numbers.out_spec[1])


def _lookup_matrices(product: Product, bits: tuple[int, int], weights: jax.Array, inputs: jax.Array) -> jax.Array:
    """A `dot_general` without batch axes as one matrix product by look-up."""
    contract, batch = product.params["dimension_numbers"]
    if batch[0]:
        raise ValueError("expected a matrix product without batch axes for look-up, got some; multiply it as a whole")
    weights_axes, inputs_axes = by_role(product, *contract)
    free = [
        [axis for axis in range(x.ndim) if axis not in axes]
        for x, axes in ((weights, weights_axes), (inputs, inputs_axes))
    ]
    columns = jnp.transpose(weights, (*weights_axes, *free[0])).reshape(
        math.prod(weights.shape[a] for a in weights_axes), -1
    )
    rows = jnp.transpose(inputs, (*free[1], *inputs_axes)).reshape(-1, columns.shape[0])
    out = _look_up(rows, columns, bits)
    return (out if product.weights_operand == 1 else out.T).reshape(product.out_shape)


def _look_up(rows: jax.Array, columns: jax.Array, bits: tuple[int, int]) -> jax.Array:
    """The matrix product of inputs (M, K) and weights (K, N)."""
    weight_bits, input_bits = bits
    if weight_bits == 1:
        return binary_lookup_dot(rows, columns, input_bits)
    return lookup_dot(rows, columns, weight_bits, input_bits)


def _multiply_decomposed(
    multiplier: Decomposed,
    product: Product,
    bits: tuple[int, int],
    signed: tuple[bool, bool],
    weights: jax.Array,
    inputs: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Unsigned inputs x_q = level + z, padded with z, times signed weights, and the FP16 dequantiser."""
    zero_point = 2 ** (bits[1] - 1) if signed[1] else 0
    plain = product
    if product.kind == "conv":
        params, numbers = product.params, product.params["dimension_numbers"]
        config = [(0, 0, 0)] * inputs.ndim
        for axis, (low, high), dilation in zip(
            numbers.lhs_spec[2:], params["padding"], params["lhs_dilation"], strict=True
        ):
            config[axis] = (low, high, dilation - 1)
        inputs = lax.pad(inputs, jnp.zeros((), inputs.dtype), config)
        unpadded = {"padding": ((0, 0),) * len(config[2:]), "lhs_dilation": (1,) * len(config[2:])}
        plain = dataclasses.replace(product, params={**params, **unpadded})
    shifted = inputs + jnp.asarray(zero_point, inputs.dtype)
    sums = integer_part(lambda x, w: multiply(plain, w, x), shifted, zero_point, weights)
    num_terms = weights.size // math.prod(weights.shape[axis] for axis in _free_weight_axes(product))
    largest = num_terms * 2.0 ** (bits[0] - 1) * 2.0 ** bits[1]
    if largest >= FLOAT32_LIMIT:
        raise ValueError(
            f"expected integer sums below 2**24 for a decomposed product, got a possible magnitude of {largest:.0f} "
            f"for {num_terms} terms of {bits[0]} x {bits[1]} bits; use narrower operands"
        )
    entered = enter_fp16(sums, multiplier.conversion, largest)
    # Exact where merged: the scale is a power of two.
    return scale * entered if multiplier.merge else dequantise_fp16(entered, scale).astype(weights.dtype)


def _free_weight_axes(product: Product) -> list[int]:
    """Axes of the weights that are not summed over."""
    shape = by_role(product, product.lhs_shape, product.rhs_shape)[0]
    if product.kind == "conv":
        return [product.params["dimension_numbers"].rhs_spec[0]]
    contract = by_role(product, *product.params["dimension_numbers"][0])[0]
    return [axis for axis in range(len(shape)) if axis not in contract]
