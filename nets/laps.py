"""Layer-wise adaptive precision: a controller that moves the widths of each layer by slices while it trains.

State per product and stage (forward, input_grad): a width, a multiple of the slice, and how long its metric has been
low. Above an upper threshold the stage gets one slice more at once; below a lower one for `patience` steps one slice
less. Both metrics come from the statistics of the backward pass (`ops.STATISTICS`).

Source: reconstruction of layer-wise adaptive bit-precision scaling of D. Han et al., HNPU, JSSC 2021, whose exact rule
and thresholds are not public.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nets import fixed_point
from nets.ops import STATISTICS
from nets.precision import Precision, QuantState
from nets.rules import Laps


class LapsState(NamedTuple):
    """State of the controller.

    Fields:
      bits: widths in forward and input_grad, multiples of the slice as floats, shape (P, 2).
      low_steps: steps in a row that the metric was below its lower threshold, int32, shape (P, 2).
    """

    bits: jax.Array
    low_steps: jax.Array


def init_laps(precision: Precision) -> LapsState:
    """The controller at the widths that the rules start with.

    Args:
      precision: of `init_precision`.

    Returns:
      The state; a width is the next multiple of the slice above the rule's inputs and input_grad. Rows of products
      without a controller never move.
    """
    start = np.array([[rule.bits[1], rule.bits[2]] for rule in precision.rules], float)
    width = _column(precision, "slice_width")
    whole = np.clip(np.ceil(start / width) * width, _column(precision, "min_bits"), _column(precision, "max_bits"))
    bits = np.where(_active(precision), whole, start)
    return LapsState(jnp.array(bits, precision.error_bits.dtype), jnp.zeros(bits.shape, jnp.int32))


def step_laps(
    state: LapsState,
    precision: Precision,
    quant_state: QuantState,
    cotangent: QuantState,
    max_overflow: float | jax.Array = 1e-4,
) -> tuple[LapsState, Precision, QuantState]:
    """One step of all controllers, after a backward pass; in place of `QuantState.updated`.

    With the metric "error" a stage keeps its range (that of errors follows their overflow) and more bits are a finer
    step; with "top_slice" it keeps its step, and more bits are more range.

    Args:
      state: before.
      precision, quant_state: before.
      cotangent: gradient of the loss with respect to `quant_state`.
      max_overflow: as for `QuantState.updated`.

    Returns:
      (state, precision, quant_state) after. Weights and inputs take the width of forward, errors in both backward
      passes that of input_grad.
    """
    moved = moved_bits(state, metrics(precision, cotangent), precision)
    updated = quant_state.updated(cotangent, max_overflow)
    more = (moved.bits - state.bits)[:, 1:]
    stays = _active(precision) & _holds_step(precision)
    error_log2_range = jnp.where(stays, quant_state.error_log2_range + more, updated.error_log2_range)
    return moved, with_bits(precision, moved), dataclasses.replace(updated, error_log2_range=error_log2_range)


def metrics(precision: Precision, cotangent: QuantState) -> jax.Array:
    """What the controllers look at, from one backward pass.

    Args:
      precision: its rules say which metric.
      cotangent: gradient of the loss with respect to the state of formats.

    Returns:
      Shape (P, 2), of inputs and of errors in input_grad: the share of values with a non-zero top slice, or the energy
      of the quantisation error over that of the values, of those that do not saturate. NaN where nothing was counted.
    """
    column = {name: cotangent.probes[:, columns] for name, columns in STATISTICS.items()}
    values = column["values"][:, 1:3]
    share = column["top_slices"] / jnp.where(values > 0.0, values, jnp.nan)
    energy = column["squares"]
    error = column["squared_errors"] / jnp.where(energy > 0.0, energy, jnp.nan)
    return jnp.where(_holds_step(precision), share, error)


def moved_bits(state: LapsState, metric: jax.Array, precision: Precision) -> LapsState:
    """Widths after one step with given metrics: the state machine itself.

    Args:
      state: before.
      metric: shape (P, 2); a stage whose metric is NaN stays as it is.
      precision: its rules hold slice widths, thresholds, patience and bounds.

    Returns:
      The state after.
    """
    width = _column(precision, "slice_width")
    low = metric < _column(precision, "lower")
    counted = jnp.where(low, state.low_steps + 1, jnp.zeros_like(state.low_steps))
    low_steps = jnp.where(jnp.isnan(metric), state.low_steps, counted)
    is_less = low & (low_steps >= _column(precision, "patience").astype(jnp.int32))
    step = width * ((metric > _column(precision, "upper")).astype(width.dtype) - is_less.astype(width.dtype))
    bits = jnp.clip(state.bits + step, _column(precision, "min_bits"), _column(precision, "max_bits"))
    active = _active(precision)
    return LapsState(
        jnp.where(active, bits, state.bits), jnp.where(active & ~is_less, low_steps, jnp.zeros_like(low_steps))
    )


def with_bits(precision: Precision, state: LapsState) -> Precision:
    """Formats of the controllers' widths.

    Args:
      precision: before; its ranges stay, or its steps with the metric "top_slice".
      state: the widths wanted.

    Returns:
      The precision after; rows of products without a controller stay as they are.
    """
    signed = jnp.array(precision.signed, precision.log2_step.dtype)
    digits = state.bits[:, :1] - signed
    step = jnp.round(precision.log2_step)
    old_digits = precision.bits()[:, :2] - signed
    step = jnp.where(_holds_step(precision), step, step + old_digits - digits)
    log2_range = step + fixed_point.log2_levels(2.0**digits - 1.0)
    active = _active(precision)
    return dataclasses.replace(
        precision,
        log2_step=jnp.where(active, step, precision.log2_step),
        log2_range=jnp.where(active, log2_range, precision.log2_range),
        error_bits=jnp.where(active, state.bits[:, 1:], precision.error_bits),
    )


def _column(precision: Precision, name: str) -> jax.Array:
    """A setting of all products, shape (P, 1)."""
    values = [[getattr(rule.laps or Laps(), name)] for rule in precision.rules]
    return jnp.array(values, precision.error_bits.dtype)


def _active(precision: Precision) -> np.ndarray:
    return np.array([[rule.laps is not None] for rule in precision.rules])


def _holds_step(precision: Precision) -> np.ndarray:
    return np.array([[rule.laps is not None and rule.laps.metric == "top_slice"] for rule in precision.rules])
