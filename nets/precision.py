"""Bits per layer and operand: rules a user writes, the precision that is trained, and the state that is tracked.

`PrecisionRules` say by layer name how many bits to start with. `init_precision` turns them, with a calibration batch,
into `Precision` (learned steps and ranges of weights and inputs, and widths of errors) and `QuantState` (ranges of
errors and densities, which follow statistics of the backward pass). Both are pytrees beside the model's own
parameters.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nets import dynamic_fixed_point, fixed_point
from nets.calibration import calibrate
from nets.fixed_point import FLOAT_BITS, SIGNIFICAND_BITS
from nets.jaxpr import Product, find_products, parameter_paths
from nets.ops import NUM_STATISTICS, STATISTICS, Formats, check_rule
from nets.rules import FLOAT as FLOAT
from nets.rules import LayerRule, PrecisionRules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantState:
    """What number formats track; not trained. P products.

    Attributes:
      error_log2_range: log2 of the magnitude that errors overflow at, integers as floats, shape (P, 2), for
        input_grad and weight_grad.
      density: latest share of values that are not zero after quantisation, shape (P, 4), of weights, inputs, and
        errors in input_grad and weight_grad.
      probes: zeros of shape (P, NUM_STATISTICS); their cotangents are the statistics of a backward pass
        (`ops.quantised_product`).
    """

    error_log2_range: jax.Array
    density: jax.Array
    probes: jax.Array

    def updated(self, cotangent: "QuantState", max_overflow: float | jax.Array = 1e-4) -> "QuantState":
        """The state after one backward pass, or several whose cotangents were added.

        Args:
          cotangent: gradient of the loss with respect to this state.
          max_overflow: permitted share of overflowing errors, a float or an array of shape (P, 2), such as
            `dynamic_fixed_point.random_overflow_rate` draws.

        Returns:
          Error ranges moved by at most one bit by the rule of `fixed_point.updated_log2_range`, and latest densities.
          Products whose backward pass did not run stay as they are.
        """
        values, nonzeros, overflows, overflows_below = (
            cotangent.probes[:, STATISTICS[name]] for name in ("values", "nonzeros", "overflows", "overflows_below")
        )
        ran = values > 0.0
        # Only to divide where nothing was counted; those quotients are not used.
        values = jnp.maximum(values, 1.0)
        moved = fixed_point.updated_log2_range(
            self.error_log2_range, overflows / values[:, 2:], overflows_below / values[:, 2:], max_overflow
        )
        return dataclasses.replace(
            self,
            error_log2_range=jnp.where(ran[:, 2:], moved, self.error_log2_range),
            density=jnp.where(ran, nonzeros / values, self.density),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Precision:
    """Number formats of P products, trained.

    Attributes:
      log2_step: of weights and inputs, shape (P, 2); the step is the nearest power of two.
      log2_range: of weights and inputs, shape (P, 2).
      error_bits: widths of the errors in input_grad and weight_grad, real-valued, shape (P, 2).
      names: names of the products.
      param_paths: paths of the parameters that feed them, None where there is none.
      signed: whether weights and inputs have a sign.
      learned: whether formats of weights and inputs are trained; widths of errors are where those of the weights are.
        Inputs that depend on no parameter are not: their gradient would take an input_grad pass that training has no
        other use for.
      frozen: whether nothing is trained at present, whatever `learned` says.
      rules: the rules that the products were initialised with.
      frozen_params: paths of the parameters that training leaves alone.
    """

    log2_step: jax.Array
    log2_range: jax.Array
    error_bits: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    param_paths: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})
    signed: tuple[tuple[bool, bool], ...] = dataclasses.field(metadata={"static": True})
    learned: tuple[tuple[bool, bool], ...] = dataclasses.field(metadata={"static": True})
    frozen: bool = dataclasses.field(default=False, metadata={"static": True})
    rules: tuple[LayerRule, ...] = dataclasses.field(default=(), metadata={"static": True})
    frozen_params: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def bits(self) -> jax.Array:
        """Widths in bits of weights, inputs, and errors in input_grad and weight_grad.

        Returns:
          Integers as floats, shape (P, 4), with straight-through gradients (`fixed_point.num_bits`, `num_error_bits`),
          zero in rows that are not learned.
        """
        held = self._held()
        signed = jnp.array(self.signed, held.log2_step.dtype)
        operand_bits = fixed_point.num_bits(held.log2_step, held.log2_range, signed)
        bits = jnp.concatenate([operand_bits, fixed_point.num_error_bits(held.error_bits)], axis=1)
        if not np.any(self._named()):
            return bits
        return jnp.where(self._named(), jnp.array([rule.bits for rule in self.rules], bits.dtype), bits)

    def formats(self, quant_state: QuantState, key: jax.Array | None = None) -> Formats:
        """Number formats of all products, fields with a leading axis P.

        Args:
          quant_state: ranges of errors.
          key: of the random bits by which the rules shorten ranges; None shortens none.
        """
        held = self._held()
        bits = fixed_point.num_error_bits(held.error_bits)
        return Formats(
            *fixed_point.step_and_range(held.log2_step, held.log2_range),
            *fixed_point.error_step_and_limit(self._used_log2_range(quant_state, key), bits),
            fixed_point.power_of_two(quant_state.error_log2_range),
        )

    def _used_log2_range(self, quant_state: QuantState, key: jax.Array | None) -> jax.Array:
        """Ranges of errors at this step; overflow is still counted at those that the state tracks."""
        safe = quant_state.error_log2_range
        is_random = np.array([[rule.point == "random_bit"] for rule in self.rules])
        if key is None or not np.any(is_random):
            return safe
        shorter = dynamic_fixed_point.random_bit(key, safe.shape).astype(safe.dtype)
        return safe - shorter * is_random.astype(safe.dtype)

    def clamped(self, min_bits: float, max_bits: float) -> "Precision":
        """The nearest formats of at least `min_bits` and at most `max_bits`: a projection after an optimiser's step.

        Ranges stay, steps move; float32 and named formats stay.

        Args:
          min_bits, max_bits: whole numbers, 2 <= min_bits <= max_bits <= 24.

        Returns:
          Precision whose `bits()` lie between the two, but for 32.
        """
        bits = self.bits()[:, :2]
        signed = jnp.array(self.signed, bits.dtype)
        # The limit, a rounded number of steps, has `bits - signed` binary digits.
        finest = jnp.ceil(self.log2_range - jnp.log2(2.0 ** (max_bits - signed) - 0.5))
        coarsest = jnp.floor(self.log2_range - jnp.log2(2.0 ** (min_bits - signed - 1.0) - 0.5))
        named = self._named()
        fits = ((bits >= min_bits) & (bits <= max_bits)) | (bits == FLOAT_BITS) | named[:, :2]
        is_float = (self.error_bits > SIGNIFICAND_BITS) | named[:, 2:]
        return dataclasses.replace(
            self,
            log2_step=jnp.where(fits, self.log2_step, jnp.clip(self.log2_step, finest, coarsest)),
            error_bits=jnp.where(is_float, self.error_bits, jnp.clip(self.error_bits, min_bits, max_bits)),
        )

    def rule(self, row: int) -> LayerRule:
        """The rule that a product was initialised with."""
        return self.rules[row] if self.rules else LayerRule()

    def trains(self, row: int) -> tuple[bool, bool]:
        """Whether the formats of weights and inputs of a product are trained at present."""
        return (False, False) if self.frozen else self.learned[row]

    def _named(self) -> np.ndarray:
        """Which operands and errors have a named format instead of fixed point, shape (P, 4)."""
        rows = [[x is not None for x in self.rule(row).formats] for row in range(len(self.names))]
        return np.array(rows)

    def _held(self) -> "Precision":
        """Without gradients of what is not trained."""
        trains = np.array([self.trains(row) for row in range(len(self.names))])

        def hold(x: jax.Array, trains: np.ndarray) -> jax.Array:
            return jnp.where(trains, x, jax.lax.stop_gradient(x))

        return dataclasses.replace(
            self,
            log2_step=hold(self.log2_step, trains),
            log2_range=hold(self.log2_range, trains),
            error_bits=hold(self.error_bits, trains[:, :1]),
        )


def freeze(precision: Precision) -> Precision:
    """Its formats as hardware has them, no longer trained.

    Steps become powers of two, ranges all that their bits can hold, widths of errors whole. `bits()` stays the same;
    values between a learned range and the largest number of its bits no longer saturate.
    """
    bits = precision.bits()
    log2_step = jnp.round(precision.log2_step)
    levels = 2.0 ** (bits[:, :2] - jnp.array(precision.signed, bits.dtype)) - 1.0
    is_float = (bits[:, :2] == FLOAT_BITS) | precision._named()[:, :2]
    return dataclasses.replace(
        precision,
        log2_step=log2_step,
        log2_range=jnp.where(is_float, precision.log2_range, log2_step + fixed_point.log2_levels(levels)),
        error_bits=bits[:, 2:],
        frozen=True,
    )


def narrowed(precision: Precision, bits: jax.Array, off_the_top: jax.Array) -> Precision:
    """Frozen formats of fewer bits.

    Args:
      precision: frozen formats, see `freeze`.
      bits: widths, whole numbers of at most those present, shape (P, 4); those of named formats and of float32 stay.
      off_the_top: how many of the lost bits shorten the range of weights and inputs, shape (P, 2), so that more values
        saturate; the others coarsen the step.

    Returns:
      Formats of `bits` bits; where nothing changes, the same numbers as before.
    """
    present = precision.bits()
    lost = present - bits
    log2_step = precision.log2_step + lost[:, :2] - off_the_top
    levels = 2.0 ** (bits[:, :2] - jnp.array(precision.signed, bits.dtype)) - 1.0
    log2_range = log2_step + fixed_point.log2_levels(levels)
    changed = lost > 0.0
    return dataclasses.replace(
        precision,
        log2_step=jnp.where(changed[:, :2], log2_step, precision.log2_step),
        log2_range=jnp.where(changed[:, :2], log2_range, precision.log2_range),
        error_bits=jnp.where(changed[:, 2:], bits[:, 2:], precision.error_bits),
    )


def unfreeze(precision: Precision) -> Precision:
    """The same formats, trained again."""
    return dataclasses.replace(precision, frozen=False)


def init_precision(
    fn: Callable, rules: PrecisionRules, params: Any, *args: Any, loss: Callable | None = None
) -> tuple[Precision, QuantState]:
    """Precision and state of `quantize(fn)`, from a calibration batch.

    Per operand, the step is the power of two with the least squared error on the batch among those that saturate
    nothing and three finer ones, and the range is all that the bits can hold. Inputs without a negative value get no
    sign.

    Args:
      fn: function of `(params, *args)`.
      rules: the bits to start with.
      params: its parameters, concrete arrays.
      *args: its further arguments, with a batch of data, concrete arrays.
      loss: maps the result of `fn` to a scalar, whose gradients give the errors their first range; without it they
        start at 1, and `QuantState.updated` moves them by one bit a step.

    Returns:
      (precision, quant_state).

    Raises:
      ValueError: if `fn` has no products, a rule is impossible or applies to no layer, or an operand is not finite;
        naming the layer and the rule.
    """
    frozen = rules.frozen_paths(parameter_paths(params))
    products = find_products(fn, params, *args, frozen=frozen)
    if not products:
        raise ValueError(
            "expected a function with a convolution or matrix product, got none; there is nothing to quantise"
        )
    assigned = rules.assign([product.name for product in products])
    # Named formats only take their range from the batch: that of the widest fixed-point numbers.
    bits = jnp.array([_calibrated_bits(rule) for rule in assigned], float)
    found = calibrate(fn, loss, products, bits, params, *args)
    for product, peaks in zip(products, np.asarray(found.peak), strict=True):
        if not np.all(np.isfinite(peaks)):
            raise ValueError(
                f"expected finite weights and inputs on the calibration batch, got NaN or infinity at "
                f"{product.name!r}; check data and parameters"
            )
    signed = tuple((bool(weights), bool(inputs)) for weights, inputs in np.asarray(found.signed))
    for product, rule, signs in zip(products, assigned, signed, strict=True):
        try:
            check_rule(product, rule, signs)
        except ValueError as error:
            raise ValueError(f"{error} (layer {product.name!r}, rule {rules.pattern(product.name)!r})") from error
    precision = Precision(
        log2_step=found.log2_step,
        log2_range=found.log2_range,
        error_bits=bits[:, 2:],
        names=tuple(product.name for product in products),
        param_paths=tuple(product.param_path for product in products),
        signed=signed,
        learned=tuple(map(_learned, assigned, products)),
        rules=assigned,
        frozen_params=frozen,
    )
    probes = jnp.zeros((len(products), NUM_STATISTICS), bits.dtype)
    return precision, QuantState(found.error_log2_range, jnp.ones_like(bits), probes)


def _learned(rule: LayerRule, product: Product) -> tuple[bool, bool]:
    """Whether formats of weights and inputs are trained."""
    weights, inputs, *_ = (rule.learn and named is None for named in rule.formats)
    return weights, inputs and product.needs_input_grad and rule.saved is None


def _calibrated_bits(rule: LayerRule) -> list[float]:
    """Widths to calibrate fixed-point numbers for."""
    return [bits if named is None else SIGNIFICAND_BITS for bits, named in zip(rule.bits, rule.formats, strict=True)]
