"""First number formats of a function's products, from one forward and backward pass over a calibration batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nets import fixed_point
from nets.fixed_point import FLOAT_LOG2_ABOVE, FLOAT_LOG2_BELOW, SIGNIFICAND_BITS
from nets.jaxpr import Product, interpret


class Calibration(NamedTuple):
    """What a calibration batch says about P products; each of shape (P, 2).

    Attributes:
      log2_step, log2_range: formats of weights and inputs.
      signed: 1 where weights or inputs have a sign, else 0.
      peak: largest magnitude of weights and inputs.
      error_log2_range: log2 of the least power of two above all errors, in input_grad and weight_grad; 0 where there
        are none.
    """

    log2_step: jax.Array
    log2_range: jax.Array
    signed: jax.Array
    peak: jax.Array
    error_log2_range: jax.Array


def calibrate(
    fn: Callable, loss: Callable | None, products: tuple[Product, ...], bits: jax.Array, params: Any, *args: Any
) -> Calibration:
    """Formats that suit the operands and errors of one batch.

    Per operand, the step is the power of two with the least squared error among the coarsest that saturates nothing
    and three finer ones; the range is all that the bits can hold. What comes from a parameter has a sign, everything
    else if it has a negative value.

    Args:
      fn: function of `(params, *args)`.
      loss: maps its result to a scalar, or None: no errors.
      products: of `find_products(fn, params, *args)`.
      bits: widths of weights, inputs, and errors in input_grad and weight_grad, shape (P, 4).
      params, args: arrays to calibrate on.

    Returns:
      The calibration.
    """

    @jax.jit
    def run(bits: jax.Array, params: Any, *args: Any) -> Calibration:
        operands, errors = operands_and_errors(fn, loss, products, params, *args)
        fits = [
            _fit(x, bits[row, i], is_parameter=i == 0 and products[row].param_path is not None)
            for row, pair in enumerate(operands)
            for i, x in enumerate(pair)
        ]
        log2_step, log2_range, signed, peak = jnp.stack(fits, axis=1).reshape(4, len(products), 2)
        error_peak = jnp.stack([jnp.max(jnp.abs(error)).astype(bits.dtype) for error in errors])
        # Errors are zero without a loss, and where it does not depend on the product: start at 1.
        error_log2_range = jnp.where(error_peak > 0.0, jnp.floor(jnp.log2(error_peak)) + 1.0, 0.0)
        return Calibration(log2_step, log2_range, signed, peak, jnp.stack([error_log2_range] * 2, axis=1))

    return run(bits, params, *args)


def operands_and_errors(
    fn: Callable, loss: Callable | None, products: tuple[Product, ...], params: Any, *args: Any
) -> tuple[list[tuple[jax.Array, jax.Array]], list[jax.Array]]:
    """Tensors of one forward and backward pass, not quantised.

    Args:
      fn, loss, products, params, args: as for `calibrate`.

    Returns:
      (weights, inputs) of every product, and its error, the gradient with respect to its result.
    """

    def forward(probes: list[jax.Array]) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        operands = []

        def on_product(index: int, product: Product, lhs: jax.Array, rhs: jax.Array, default_fn: Callable) -> jax.Array:
            operands.append((lhs, rhs) if product.weights_operand == 0 else (rhs, lhs))
            return default_fn(lhs, rhs) + probes[index]

        out = interpret(fn, on_product, keep_checkpoints=False)(params, *args)
        return jnp.zeros(()) if loss is None else loss(out), operands

    errors, operands = jax.grad(forward, has_aux=True)([jnp.zeros(p.out_shape, p.dtype) for p in products])
    return operands, errors


def _fit(x: jax.Array, bits: jax.Array, is_parameter: bool) -> jax.Array:
    """(log2_step, log2_range, signed, peak) of an operand on the calibration batch, shape (4,)."""
    x = x.astype(bits.dtype)
    peak = jnp.max(jnp.abs(x))
    # A layer that starts at zero has no scale yet: take 1.
    scale = jnp.where(peak == 0.0, jnp.ones_like(peak), peak)
    signed = jnp.ones_like(peak) if is_parameter else jnp.any(x < 0.0).astype(peak.dtype)
    levels = 2.0 ** (bits - signed) - 1.0

    def squared_error(exponent: jax.Array) -> jax.Array:
        step = fixed_point.power_of_two(exponent)
        return jnp.sum((fixed_point.quantise(x, step, step * levels, signed=True) - x) ** 2)

    exponents = jnp.ceil(jnp.log2(scale / levels)) - jnp.arange(4, dtype=x.dtype)
    exponent = exponents[jnp.argmin(jax.lax.map(squared_error, exponents))]
    fixed = jnp.stack([exponent, exponent + fixed_point.log2_levels(levels)])
    floating = jnp.ceil(jnp.log2(scale)) + jnp.array([-FLOAT_LOG2_BELOW, FLOAT_LOG2_ABOVE], x.dtype)
    log2_step, log2_range = jnp.where(bits > SIGNIFICAND_BITS, floating, fixed)
    return jnp.stack([log2_step, log2_range, signed, peak])
