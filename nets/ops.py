"""The quantised product: fixed-point operands, and errors quantised separately for input_grad and weight_grad.

All three passes of a product are here in one `custom_vjp`, which keeps each operand once, as it came, for the backward
pass. Quantised values travel as integers times a power of two in float32: their products and sums are exact below 2**24
steps. Statistics of the backward pass leave it as the cotangent of a zero-valued argument, the probe.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nets import fixed_point, rounding
from nets.jaxpr import Product

# Columns of the statistics of a backward pass.
STATISTICS = {
    "values": slice(0, 4),
    "nonzeros": slice(4, 8),
    "overflows": slice(8, 10),
    "overflows_below": slice(10, 12),
}
NUM_STATISTICS = 12
# They count about so many values of an array: counting all would take a fifth of a small training step.
_SAMPLE_SIZE = 2**12


@dataclass(frozen=True)
class Spec:
    """What is static about a quantised product.

    Attributes:
      product: the product.
      signed: whether weights and inputs have a sign.
      learned: whether step and range of weights and inputs get a gradient, else it is zero.
      stochastic: whether errors are rounded stochastically, else to nearest.
    """

    product: Product
    signed: tuple[bool, bool]
    learned: tuple[bool, bool]
    stochastic: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Formats:
    """Number formats of a product; of several, with a leading axis.

    Attributes:
      step: powers of two, shape (2,), of weights and inputs.
      top: largest magnitudes, multiples of the step, shape (2,), of weights and inputs.
      error_step: powers of two, shape (2,), of the errors in input_grad and weight_grad.
      error_limit: saturation in steps, shape (2,), likewise.
      error_range: magnitude from which errors overflow, shape (2,), likewise.
    """

    step: jax.Array
    top: jax.Array
    error_step: jax.Array
    error_limit: jax.Array
    error_range: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantised_product(
    spec: Spec, lhs: jax.Array, rhs: jax.Array, formats: Formats, seed: jax.Array | None, probe: jax.Array
) -> jax.Array:
    """A product of quantised operands, whose backward pass quantises the error.

    Forward: product(q(lhs), q(rhs)) with q of `fixed_point.quantise`. Backward, for the error e of the result:
    input_grad is the transposed product of q_0(e) and the quantised weights, weight_grad that of q_1(e) and the
    quantised inputs, with the dynamic fixed-point formats q_0, q_1 of `fixed_point.quantise_error`; both then pass
    the gradient of q, which also gives the gradients of `formats.step` and `formats.top`. The formats of errors get
    none: no loss depends on them.

    Args:
      spec: what is static.
      lhs, rhs: float operands, of the product's shapes.
      formats: number formats, shapes (2,).
      seed: uint32 of shape (2,), of the random words that both errors are rounded with; None where no gradient is
        taken or rounding is to nearest.
      probe: shape (NUM_STATISTICS,), unused; its cotangent are the statistics of the backward pass: of weights, inputs,
        and errors in input_grad and weight_grad the number of values counted and how many of them are not zero; of both
        errors how many values reach their range, and half their range. They are counts of a sample of the values, and
        add over batches, devices and repeated uses.

    Returns:
      The product, in its shape and dtype.

    Raises:
      ValueError: when differentiated, if errors are to be rounded stochastically without a seed.
    """
    product = spec.product
    q_weights, q_inputs = map(_quantise, _by_role(product, lhs, rhs), formats.step, formats.top, spec.signed)
    return _multiply(product, q_weights, q_inputs).astype(product.dtype)


def _product_fwd(spec, lhs, rhs, formats, seed, probe):
    return quantised_product(spec, lhs, rhs, formats, seed, probe), (lhs, rhs, formats, seed)


def _product_bwd(spec, residuals, error):
    lhs, rhs, formats, seed = residuals
    product = spec.product
    (q_weights, pull_weights), (q_inputs, pull_inputs) = (
        jax.vjp(partial(_quantise, signed=signed), x, step, top)
        for x, step, top, signed in zip(
            _by_role(product, lhs, rhs), formats.step, formats.top, spec.signed, strict=True
        )
    )
    error = error.astype(q_inputs.dtype)
    errors = input_error, weight_error = _quantise_errors(spec, error, formats, seed)
    (input_grad,) = jax.linear_transpose(lambda x: _multiply(product, q_weights, x), q_inputs)(input_error)
    (weight_grad,) = jax.linear_transpose(lambda w: _multiply(product, w, q_inputs), q_weights)(weight_error)

    d_weights, *d_weights_format = pull_weights(weight_grad)
    d_inputs, *d_inputs_format = pull_inputs(input_grad)
    zero = jnp.zeros_like(formats.error_step)
    d_format = [
        jnp.stack(d) if learned else zero
        for d, learned in zip((d_weights_format, d_inputs_format), spec.learned, strict=True)
    ]
    d_step, d_top = jnp.stack(d_format, axis=1)
    d_formats = Formats(d_step, d_top, zero, zero, zero)
    statistics = _statistics(q_weights, q_inputs, errors, error, formats.error_range)
    return *_by_role(product, d_weights, d_inputs), d_formats, None, statistics


quantised_product.defvjp(_product_fwd, _product_bwd)


def _by_role(product: Product, first: Any, second: Any) -> tuple[Any, Any]:
    """(lhs, rhs) to (weights, inputs), or back."""
    return (first, second) if product.weights_operand == 0 else (second, first)


def _quantise(x: jax.Array, step: jax.Array, top: jax.Array, signed: bool) -> jax.Array:
    """An operand in its format, in float32 or wider."""
    return fixed_point.quantise(x.astype(rounding.float32_or_wider(x.dtype)), step, top, signed)


def _quantise_errors(spec: Spec, error: jax.Array, formats: Formats, seed: jax.Array | None) -> list[jax.Array]:
    """The error in the formats of input_grad and weight_grad, rounded with the same random words."""
    words = None
    if spec.stochastic:
        if seed is None:
            raise ValueError(
                "expected a random key to round errors stochastically, got None; pass jax.random.key(...), or quantize "
                "with stochastic=False"
            )
        words = rounding.random_words(seed, error.shape)
    return [
        fixed_point.quantise_error(error, step.astype(error.dtype), limit.astype(error.dtype), words)
        for step, limit in zip(formats.error_step, formats.error_limit, strict=True)
    ]


def _multiply(product: Product, weights: jax.Array, inputs: jax.Array) -> jax.Array:
    """The product itself, at full precision: TPUs multiply in bfloat16 and GPUs may in TF32 unless told."""
    multiply = lax.dot_general if product.kind == "dot" else lax.conv_general_dilated
    params = {name: value for name, value in product.params.items() if value is not None}
    params |= {"precision": lax.Precision.HIGHEST, "preferred_element_type": None}
    return multiply(*_by_role(product, weights, inputs), **params)


def _statistics(
    weights: jax.Array, inputs: jax.Array, errors: list[jax.Array], error: jax.Array, error_range: jax.Array
) -> jax.Array:
    """Counts of a backward pass, over a sample, in the order of `STATISTICS`."""
    weights, inputs, magnitude = _sample(weights), _sample(inputs), jnp.abs(_sample(error))
    limits = error_range.astype(error.dtype)
    masks = [_sample(e) != 0.0 for e in errors]
    masks += [
        magnitude >= limits[0],
        magnitude >= limits[1],
        magnitude >= 0.5 * limits[0],
        magnitude >= 0.5 * limits[1],
    ]
    values = [weights.size, inputs.size, magnitude.size, magnitude.size]
    counts = [jnp.sum((x != 0.0).astype(x.dtype), keepdims=True) for x in (weights, inputs)]
    counts += [jnp.sum(jnp.stack(masks).astype(error.dtype), axis=1)]
    return jnp.concatenate([jnp.array(values, error.dtype), *counts]).astype(error_range.dtype)


def _sample(x: jax.Array) -> jax.Array:
    """Every n-th row of an array, n odd so that it meets every position of an image; shape (size,)."""
    stride = max(1, x.size // _SAMPLE_SIZE) | 1
    return x.reshape(-1, x.shape[-1])[::stride].reshape(-1)
