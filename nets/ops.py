"""The quantised product: fixed-point operands, and errors quantised separately for input_grad and weight_grad.

All three passes of a product are here in one `custom_vjp`, which keeps each operand once, as it came, for the backward
pass. Quantised values travel as integers times a power of two in float32: their products and sums are exact below 2**24
steps. Statistics of the backward pass leave it as the cotangent of a zero-valued argument, the probe.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nets import fixed_point, rounding
from nets.dynamic_fixed_point import POINTS
from nets.formats import BinaryFormat, Format
from nets.formats import quantise as quantise_in
from nets.jaxpr import Product
from nets.lookup import LookUp
from nets.multipliers import by_role, multiply, multiply_levels
from nets.rules import LayerRule
from nets.saved_activations import Absent, decode, encode, pack, saved_bytes, unpack, when_needed

# Columns of the statistics of a backward pass.
STATISTICS = {
    "values": slice(0, 4),
    "nonzeros": slice(4, 8),
    "overflows": slice(8, 10),
    "overflows_below": slice(10, 12),
    "top_slices": slice(12, 14),
    "squared_errors": slice(14, 16),
    "squares": slice(16, 18),
}
NUM_STATISTICS = 18
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
      rule: how it multiplies and what it saves.
      frozen: whether its weights are not trained: no weight_grad, and no inputs kept for it.
      generator: of random words: "hash" or "jax".
    """

    product: Product
    signed: tuple[bool, bool]
    learned: tuple[bool, bool]
    stochastic: bool
    rule: LayerRule = field(default_factory=LayerRule)
    frozen: bool = False
    generator: str = "hash"


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
        errors how many values reach their range, and half their range; for a precision controller, of inputs and of
        errors in input_grad how many have a non-zero top slice, and, of those that do not saturate, the energies of
        their quantisation errors and of themselves. They are counts of a sample of the values, and
        add over batches, devices and repeated uses.

    Returns:
      The product, in its shape and dtype.

    Raises:
      ValueError: when differentiated, if errors are to be rounded stochastically without a seed.
    """
    product = spec.product
    operands = by_role(product, lhs, rhs)
    q_weights, q_inputs = map(_quantise, operands, formats.step, formats.top, spec.signed, spec.rule.formats[:2])
    return _forward(spec, q_weights, q_inputs, formats.step).astype(product.dtype)


def _product_fwd(spec, lhs, rhs, formats, seed, probe):
    weights, inputs = by_role(spec.product, lhs, rhs)
    kept = _kept_inputs(spec, inputs, formats.step[1], formats.top[1])
    return quantised_product(spec, lhs, rhs, formats, seed, probe), (weights, kept, formats, seed)


def _product_bwd(spec, residuals, error):
    weights, kept, formats, seed = residuals
    product = spec.product
    if isinstance(kept, _Kept):
        kept, error = when_needed(kept, error)
    quantise = partial(_quantise, signed=spec.signed[0], number_format=spec.rule.formats[0])
    q_weights, pull_weights = jax.vjp(quantise, weights, formats.step[0], formats.top[0])
    q_inputs, pull_inputs = _restored_inputs(spec, kept, formats.step[1], formats.top[1])
    like_inputs = jax.ShapeDtypeStruct(by_role(product, product.lhs_shape, product.rhs_shape)[1], q_weights.dtype)
    error = error.astype(q_weights.dtype)
    errors = input_error, weight_error = _quantise_errors(spec, error, formats, seed)
    (input_grad,) = jax.linear_transpose(lambda x: multiply(product, q_weights, x), like_inputs)(input_error)
    if q_inputs is None:
        weight_grad = jnp.zeros_like(q_weights)
    else:
        (weight_grad,) = jax.linear_transpose(lambda w: multiply(product, w, q_inputs), q_weights)(weight_error)

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
    inputs = kept if q_inputs is not None and not isinstance(kept, _Kept) else q_inputs
    statistics = jnp.concatenate([statistics, _laps_statistics(spec, formats, inputs, q_inputs, error, input_error)])
    return *by_role(product, d_weights, d_inputs), d_formats, None, statistics


quantised_product.defvjp(_product_fwd, _product_bwd)


def _quantise(
    x: jax.Array, step: jax.Array, top: jax.Array, signed: bool, number_format: Format | None = None
) -> jax.Array:
    """An operand in its format, in float32 or wider."""
    x = x.astype(rounding.float32_or_wider(x.dtype))
    if number_format is None:
        return fixed_point.quantise(x, step, top, signed)
    return quantise_in(x, top, number_format)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Kept:
    """Inputs that are not kept as they came: at low bits or not at all, with a packed mask of those within range."""

    values: Any
    inside: jax.Array


def _kept_inputs(spec: Spec, x: jax.Array, step: jax.Array, top: jax.Array) -> Any:
    """What the backward pass needs of the inputs."""
    saved = spec.rule.saved
    if saved is None and not spec.frozen:
        return x
    inside = (x <= top.astype(x.dtype)) & (x >= (-top.astype(x.dtype) if spec.signed[1] else jnp.zeros_like(x)))
    if saved is None or spec.frozen:
        return _Kept(Absent.like(x), pack(inside, 1))
    try:
        values = encode(_quantise(x, step, top, spec.signed[1], spec.rule.formats[1]), saved)
    except ValueError as error:
        raise ValueError(f"{error} (in what is saved of the inputs of {spec.product.name})") from error
    return _Kept(dataclasses.replace(values, dtype=x.dtype), pack(inside, 1))


def _restored_inputs(spec: Spec, kept: Any, step: jax.Array, top: jax.Array) -> tuple[jax.Array | None, Callable]:
    """Quantised inputs for weight_grad, None if there is none, and the pullback of their quantisation."""
    if not isinstance(kept, _Kept):
        quantise = partial(_quantise, signed=spec.signed[1], number_format=spec.rule.formats[1])
        return jax.vjp(quantise, kept, step, top)

    def pull(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        inside = unpack(kept.inside, kept.values.shape) == 1
        return (
            jnp.where(inside, g, jnp.zeros_like(g)).astype(kept.values.dtype),
            jnp.zeros_like(step),
            jnp.zeros_like(top),
        )

    if isinstance(kept.values, Absent):
        return None, pull
    return decode(kept.values).astype(rounding.float32_or_wider(kept.values.dtype)), pull


def _forward(spec: Spec, weights: jax.Array, inputs: jax.Array, step: jax.Array) -> jax.Array:
    """The product of quantised operands, formed as the rule says."""
    if spec.rule.multiplier is None:
        return multiply(spec.product, weights, inputs)
    # Exact: steps are powers of two.
    step = step.astype(weights.dtype)
    if isinstance(spec.rule.formats[0], BinaryFormat):
        step = step.at[0].set(jnp.max(jnp.abs(weights)))
    weights, inputs, scale = weights * (1.0 / step[0]), inputs * (1.0 / step[1]), step[0] * step[1]
    return multiply_levels(
        spec.rule.multiplier, spec.product, integer_bits(spec.rule), spec.signed, weights, inputs, scale
    )


def integer_bits(rule: LayerRule) -> tuple[int, int]:
    """Widths of weights and inputs of a rule whose multiplier takes integers."""
    return int(rule.bits[0]), int(rule.bits[1])


def check_rule(product: Product, rule: LayerRule, signed: tuple[bool, bool]) -> None:
    """Refuses a rule that a product cannot be trained with.

    Args:
      product: the product.
      rule: its rule.
      signed: whether its weights and inputs have a sign.

    Raises:
      ValueError: if a multiplier cannot hold the operands, its sums may overflow or its widths are to be trained; if a
        region does not divide the inputs; if mechanisms exclude each other.
    """
    if rule.point not in POINTS:
        raise ValueError(f"expected a point among {', '.join(POINTS)}, got {rule.point!r}; choose one of them")
    if rule.learn and (rule.multiplier or rule.laps):
        mechanism = "a multiplier of integers" if rule.multiplier else "a precision controller"
        raise ValueError(f"expected given widths for {mechanism}, got learned ones; set learn=False")
    is_binary = isinstance(rule.formats[0], BinaryFormat) and isinstance(rule.multiplier, LookUp)
    multiplied = rule.formats[1:2] if is_binary else rule.formats[:2]
    if (rule.laps and any(rule.formats)) or (rule.multiplier and any(multiplied)):
        raise ValueError(
            "expected operands in bits for a multiplier of integers, and all widths in bits for a controller, got a "
            'named format; give bits (or "binary" weights for look-up), or drop the mechanism'
        )
    if rule.saved:
        saved_bytes(by_role(product, product.lhs_shape, product.rhs_shape)[1], rule.saved)
    if rule.laps:
        rule.laps.check()
        if rule.multiplier or (rule.saved and rule.laps.metric == "error"):
            raise ValueError(
                "expected a precision controller without a multiplier, and without low-bit saved inputs if it looks at "
                "their error; drop one of them"
            )
    if rule.multiplier:
        values = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (product.lhs_shape, product.rhs_shape)]
        trial = partial(multiply_levels, rule.multiplier, product, integer_bits(rule), signed)
        jax.eval_shape(trial, *by_role(product, *values), jax.ShapeDtypeStruct((), jnp.float32))


def _quantise_errors(spec: Spec, error: jax.Array, formats: Formats, seed: jax.Array | None) -> list[jax.Array]:
    """The error in the formats of input_grad and weight_grad, rounded with the same random words."""
    words = None
    if spec.stochastic:
        if seed is None:
            raise ValueError(
                "expected a random key to round errors stochastically, got None; pass jax.random.key(...), or quantize "
                "with stochastic=False"
            )
        words = rounding.GENERATORS[spec.generator](seed, error.shape)
    step, limit, top = (x.astype(error.dtype) for x in (formats.error_step, formats.error_limit, formats.error_range))
    return [
        fixed_point.quantise_error(error, step[i], limit[i], words)
        if number_format is None
        else quantise_in(error, top[i], number_format, words)
        for i, number_format in enumerate(spec.rule.formats[2:])
    ]


def _statistics(
    weights: jax.Array, inputs: jax.Array | None, errors: list[jax.Array], error: jax.Array, error_range: jax.Array
) -> jax.Array:
    """Counts of a backward pass, over a sample, in the order of `STATISTICS`; none of inputs that are not there."""
    inputs = jnp.zeros(0, weights.dtype) if inputs is None else _sample(inputs)
    weights, magnitude = _sample(weights), jnp.abs(_sample(error))
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


def _laps_statistics(
    spec: Spec,
    formats: Formats,
    inputs: jax.Array | None,
    q_inputs: jax.Array | None,
    error: jax.Array,
    q_error: jax.Array,
) -> jax.Array:
    """What a precision controller looks at, over a sample: top slices, squared errors and squares of both stages."""
    laps = spec.rule.laps
    dtype = formats.error_range.dtype
    if laps is None or inputs is None or q_inputs is None:
        return jnp.zeros(6, dtype)
    # The range of a format, as 2**digits steps, and how many digits a number with a zero top slice lacks.
    ranges = formats.top[1] + formats.step[1], formats.error_step[0] * formats.error_limit[0]
    missing = laps.slice_width - spec.signed[1], laps.slice_width - 1
    counts = []
    for x, q, limit, digits in zip((inputs, error), (q_inputs, q_error), ranges, missing, strict=True):
        x, q, limit = _sample(x.astype(q.dtype)), _sample(q), limit.astype(q.dtype)
        above = (jnp.abs(q) >= limit * 2.0**-digits).astype(q.dtype)
        # More bits would not bring back what saturates.
        x, q = (jnp.where(jnp.abs(x) < limit, y, jnp.zeros_like(y)) for y in (x, q))
        counts.append(jnp.stack([jnp.sum(above), jnp.sum((q - x) ** 2), jnp.sum(x**2)]))
    return jnp.stack(counts, axis=1).reshape(-1).astype(dtype)
