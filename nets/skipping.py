"""In-out skipping: the work that zeros leave of each pass, from measured tensors.

Forward skips zero inputs. weight_grad skips where either operand is zero. input_grad skips zero errors and, on the side
of its outputs, whatever the mask of the ReLU before the layer sets to zero anyway: those outputs are known beforehand,
and skipping them loses nothing.

Source: in-out skipping as published for HNPU (D. Han et al., JSSC 2021).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nets.jaxpr import Equation, Program, Value, flatten, interpret, is_relu
from nets.precision import QuantState

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


def pass_densities(quant_state: QuantState, mask_density: jax.Array) -> jax.Array:
    """Densities of the two operands that each pass reads, as a cost model takes them.

    The product of a pair is the share of work that is left: rho_x, rho_dy rho_mask and rho_x rho_dy.

    Args:
      quant_state: densities measured in training (`QuantState.density`): of weights, inputs and errors.
      mask_density: of `mask_densities`, shape (P,).

    Returns:
      Shape (P, 3, 2), for forward (1, inputs), input_grad (mask, error) and weight_grad (inputs, error). The mask
      takes the place of the weights in input_grad: it thins outputs, and every product belongs to one output. Zero
      weights are not skipped.
    """
    _, inputs, input_error, weight_error = quant_state.density.T
    ones = jnp.ones_like(inputs)
    pairs = [(ones, inputs), (mask_density.astype(inputs.dtype), input_error), (inputs, weight_error)]
    return jnp.stack([jnp.stack(pair, axis=-1) for pair in pairs], axis=1)


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
