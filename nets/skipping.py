"""In-out skipping: the work that zeros leave of each pass, from measured tensors.

Forward skips zero inputs. weight_grad skips where either operand is zero. input_grad skips zero errors and, on the side
of its outputs, whatever the mask of the ReLU before the layer sets to zero anyway: those outputs are known beforehand,
and skipping them loses nothing.

Source: in-out skipping as published for HNPU (D. Han et al., JSSC 2021).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nets import fixed_point
from nets.bitslice import MAX_BITS, Slicing, make_slicing, nonzero_slices
from nets.calibration import operands_and_errors
from nets.jaxpr import Equation, Program, Value, find_products, flatten, interpret, is_relu
from nets.precision import Precision, QuantState

_PASSES_MASKS_ON = ("reshape", "reduce_window_max", "transpose", "squeeze", "copy", "convert_element_type")


def mask_densities(fn: Callable, params: Any, *args: Any) -> jax.Array:
    """Share of each product's inputs that the mask of the ReLU before it lets through.

    Args:
      fn: function of `(params, *args)`, as for `quantize`.
      params, args: arrays to measure on.

    Returns:
      Shape (P,); 1 where no ReLU, with at most a max pooling or a change of shape behind it, gives the inputs.
    """
    program = flatten(fn, params, *args)
    masked = _masked_products(program)

    @jax.jit
    def measure(params: Any, *args: Any) -> list[jax.Array]:
        found = []

        def on_product(index: int, product: Any, lhs: jax.Array, rhs: jax.Array, default_fn: Callable) -> jax.Array:
            inputs = (rhs, lhs)[product.weights_operand]
            alive = jnp.mean((inputs > 0).astype(jnp.float32))
            found.append(alive if masked[index] else jnp.ones(()))
            return default_fn(lhs, rhs)

        interpret(fn, on_product, keep_checkpoints=False)(params, *args)
        return found

    return jnp.stack(measure(params, *args))


def pass_densities(density: jax.Array, mask_density: jax.Array) -> jax.Array:
    """Densities of the two operands that each pass reads, as a cost model takes them.

    The product of a pair is the share of work that is left: rho_x, rho_dy rho_mask and rho_x rho_dy.

    Args:
      density: of weights, inputs, and errors in input_grad and weight_grad, shape (P, 4): of words, as training
        measures them (`QuantState.density`), or of slices (`slice_densities`).
      mask_density: of `mask_densities`, shape (P,).

    Returns:
      Shape (P, 3, 2), for forward (1, inputs), input_grad (mask, error) and weight_grad (inputs, error). The mask
      takes the place of the weights in input_grad: it thins outputs, and every product belongs to one output. Zero
      weights are not skipped.
    """
    _, inputs, input_error, weight_error = density.T
    ones = jnp.ones_like(inputs)
    pairs = [(ones, inputs), (mask_density.astype(inputs.dtype), input_error), (inputs, weight_error)]
    return jnp.stack([jnp.stack(pair, axis=-1) for pair in pairs], axis=1)


def measured_densities(
    fn: Callable,
    loss: Callable,
    precision: Precision,
    quant_state: QuantState,
    params: Any,
    *args: Any,
    slice_width: int | None = None,
    style: str = "twos_complement",
    lanes: int = 1,
) -> jax.Array:
    """The work that in-out skipping leaves of each pass in the formats of a training run, as a cost model takes it.

    Args:
      fn, loss, precision, quant_state, params, args, style, lanes: as for `slice_densities`.
      slice_width: bits of the slices that are skipped; None skips whole words, for which the densities are those that
        `quant_state` tracked in training. Words of other formats than fixed point are skipped as a whole.

    Returns:
      Shape (P, 3, 2), see `pass_densities`. `codesign.Workload.operation_density` takes it to operations. Slices are
      told over the ceil(bits / slice_width) that a MAC of `hw` takes for an operand. Signed slices of 4 are three of 8
      bits in place of two, and may exceed 1; in return small negative numbers have zero slices.
    """
    masks = mask_densities(fn, params, *args)
    if slice_width is None:
        return pass_densities(quant_state.density, masks)
    sliced = slice_densities(
        fn, loss, precision, quant_state, params, *args, width=slice_width, style=style, lanes=lanes
    )
    over = _slices_over_whole(precision, slice_width, style)
    work = pass_densities(jnp.where(jnp.isnan(sliced), quant_state.density, sliced * over), masks)
    # Weights are not skipped, but take part with all their slices in forward and input_grad.
    return work.at[:, :2, 0].multiply(over[:, :1].astype(work.dtype))


def slice_densities(
    fn: Callable,
    loss: Callable,
    precision: Precision,
    quant_state: QuantState,
    params: Any,
    *args: Any,
    width: int = 4,
    style: str = "signed",
    lanes: int = 1,
) -> jax.Array:
    """Shares of slices that are not zero, counted exactly on one batch, in the formats of a precision.

    The tensors are those of the function without quantisation, each rounded to nearest in its format.

    Args:
      fn: function of `(params, *args)`, as for `quantize`.
      loss: maps its result to a scalar.
      precision, quant_state: formats; operands in fixed point of at most 16 bits are counted.
      params, args: arrays to measure on.
      width, style, lanes: of the slices, see `bitslice`; lanes are neighbours along the last axis.

    Returns:
      Shape (P, 4), of weights, inputs, and errors in input_grad and weight_grad; NaN for other formats.
    """
    products = find_products(fn, params, *args)
    operands, errors = jax.jit(partial(operands_and_errors, fn, loss, products))(params, *args)
    bits, formats = np.asarray(precision.bits()), precision.formats(quant_state)
    densities = np.full(bits.shape, np.nan)
    for row, column in np.ndindex(*bits.shape):
        if precision.rule(row).formats[column] is not None or bits[row, column] > MAX_BITS:
            continue
        if column < 2:
            x, has_sign = operands[row][column], precision.signed[row][column]
            step = formats.step[row, column]
            x = fixed_point.quantise(x, step, formats.top[row, column], has_sign)
        else:
            x, has_sign, step = errors[row], True, formats.error_step[row, column - 2]
            x = fixed_point.quantise_error(x, step, formats.error_limit[row, column - 2], None)
        slicing = _slicing(int(bits[row, column]), width, style, has_sign)
        groups = x.size // x.shape[-1] * -(-x.shape[-1] // lanes) * slicing.num_slices
        densities[row, column] = np.asarray(nonzero_slices(x / step, slicing, lanes)).sum() / groups
    return jnp.array(densities)


def _slicing(num_bits: int, width: int, style: str, has_sign: bool) -> Slicing:
    """Operands narrower than a slice are one slice."""
    return make_slicing(num_bits, min(width, num_bits), style, has_sign)


def _slices_over_whole(precision: Precision, width: int, style: str) -> np.ndarray:
    """Slices of each operand and error over the least that hold its bits, shape (P, 4); 1 where none are counted."""
    bits = np.asarray(precision.bits()).astype(int)
    over = np.ones(bits.shape)
    for row, column in np.argwhere(bits <= MAX_BITS):
        if precision.rule(row).formats[column] is not None:
            continue
        has_sign = precision.signed[row][column] if column < 2 else True
        num_bits = int(bits[row, column])
        over[row, column] = _slicing(num_bits, width, style, has_sign).num_slices / -(-num_bits // width)
    return over


def _masked_products(program: Program) -> list[bool]:
    """Whether a ReLU gives the inputs of each product."""
    writer: dict[Value, Equation] = {value: e for e in program.walk() for value in e.outputs}
    masked = [False] * len(program.products)
    for equation in program.walk():
        if equation.product is None:
            continue
        value = equation.inputs[1 - program.products[equation.product].weights_operand]
        while value in writer and writer[value].primitive in _PASSES_MASKS_ON:
            value = writer[value].inputs[0]
        masked[equation.product] = value in writer and is_relu(writer[value])
    return masked
