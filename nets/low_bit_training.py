"""Training with rules instead of a co-design: given formats or a precision controller, one jitted step, one loop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nets.data import Dataset, Examples, batches
from nets.laps import LapsState, init_laps, step_laps
from nets.precision import Precision, QuantState, init_precision
from nets.rules import PrecisionRules
from nets.skipping import measured_densities
from nets.training import Forward, apply_gradient, cross_entropy
from nets.transform import quantize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowBitState:
    """What a step of low-bit training changes.

    Attributes:
      params, rest, opt_state: as in `nets.training.TrainState`.
      precision, quant_state: the formats.
      laps: the precision controller, None without one.
    """

    params: Any
    rest: Any
    opt_state: Any
    precision: Precision
    quant_state: QuantState
    laps: LapsState | None


def init_low_bit(
    forward: Forward, params: Any, rest: Any, rules: PrecisionRules, optimizer: optax.GradientTransformation, batch: Any
) -> LowBitState:
    """The state before the first step.

    Args:
      forward, params, rest: the network, from `nets.training.split_model`.
      rules: formats and mechanisms of its layers, of given widths (`learn=False`), or moved by a controller.
      optimizer: of the parameters.
      batch: images (n, height, width, channels) and labels (n,) to calibrate the formats on.

    Raises:
      ValueError: as `nets.init_precision`.
    """
    images, labels = batch
    precision, quant_state = init_precision(
        _network(forward),
        rules,
        params,
        rest,
        images,
        jax.random.key(0),
        loss=lambda out: cross_entropy(out[0], labels),
    )
    laps = init_laps(precision) if any(rule.laps for rule in precision.rules) else None
    return LowBitState(params, rest, optimizer.init(params), precision, quant_state, laps)


def make_low_bit_loss(forward: Forward, *, stochastic: bool = True, quantised: bool = True) -> Callable:
    """Build `(params, quant_state, state, images, labels, key) -> (loss, rest)`: the mean cross-entropy of a batch.

    Args:
      forward: the network.
      stochastic: how backward errors are rounded, see `nets.quantize`.
      quantised: without, the network itself is trained, as a yardstick for its quantised twin.
    """
    qfn = quantize(_network(forward), stochastic=stochastic)

    def loss(params: Any, quant_state: QuantState, state: LowBitState, images: Any, labels: Any, key: jax.Array) -> Any:
        inputs = state.rest, images, key
        out = (
            qfn(params, state.precision, quant_state, key, *inputs) if quantised else _network(forward)(params, *inputs)
        )
        logits, rest = out
        return cross_entropy(logits, labels), rest

    return loss


def make_low_bit_step(
    loss: Callable, optimizer: optax.GradientTransformation
) -> Callable[[LowBitState, Any, Any, jax.Array], LowBitState]:
    """Build the jitted step `(state, images, labels, key) -> state`; formats and widths compile nothing anew.

    Args:
      loss: of `make_low_bit_loss`.
      optimizer: of the parameters.
    """

    @jax.jit
    def step(state: LowBitState, images: Any, labels: Any, key: jax.Array) -> LowBitState:
        differentiate = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (gradient, cotangent), rest = differentiate(state.params, state.quant_state, state, images, labels, key)
        params, opt_state = apply_gradient(optimizer, gradient, state.opt_state, state.params)
        laps, precision = state.laps, state.precision
        if laps is None:
            quant_state = state.quant_state.updated(cotangent)
        else:
            laps, precision, quant_state = step_laps(laps, precision, state.quant_state, cotangent)
        return LowBitState(params, rest, opt_state, precision, quant_state, laps)

    return step


def train_low_bit(
    step: Callable[[LowBitState, Any, Any, jax.Array], LowBitState],
    state: LowBitState,
    epochs: Iterable[Iterable[Examples]],
    seed: int = 0,
) -> tuple[LowBitState, jax.Array]:
    """Train over given batches.

    Args:
      step: of `make_low_bit_step`.
      state: before.
      epochs: batches, epoch by epoch.
      seed: of stochastic rounding and dropout.

    Returns:
      The state after, and all widths (`Precision.bits`) at the end of every epoch, shape (epochs, P, 4).
    """
    key, count, history = jax.random.key(seed), 0, []
    for examples in epochs:
        for images, labels in examples:
            state = step(state, images, labels, jax.random.fold_in(key, count))
            count += 1
        history.append(state.precision.bits())
    return state, jnp.stack(history)


def fit_low_bit(
    forward: Forward,
    params: Any,
    rest: Any,
    dataset: Dataset,
    rules: PrecisionRules,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> tuple[LowBitState, jax.Array]:
    """Train a network under rules, as `nets.training.fit` trains it in float32.

    SDFXP with LAPS, for example, is `LayerRule(16, 16, 16, 16, learn=False, point="random_bit", laps=Laps())`.

    Args:
      forward, params, rest: the network, from `nets.training.split_model`.
      dataset: trains on its training split.
      rules: as for `init_low_bit`.
      epochs: passes over the training split, 1 or more.
      batch_size: examples per step.
      learning_rate: of Adam's first step; falls to zero along a cosine.
      seed: of order, stochastic rounding and dropout.

    Returns:
      As `train_low_bit`.

    Raises:
      ValueError: epochs below one; as `nets.data.batches` and `nets.init_precision`.
    """
    if epochs < 1:
        raise ValueError(f"expected epochs >= 1, got {epochs}")
    steps = epochs * (len(dataset.train.labels) // batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))
    first = next(iter(batches(dataset, batch_size, seed, 0)))
    state = init_low_bit(forward, params, rest, rules, optimizer, first)
    order = (batches(dataset, batch_size, seed, epoch) for epoch in range(epochs))
    step = make_low_bit_step(make_low_bit_loss(forward), optimizer)
    return train_low_bit(step, state, order, seed)


def left_work(
    forward: Forward,
    state: LowBitState,
    batch: Any,
    slice_width: int | None = None,
    style: str = "twos_complement",
    lanes: int = 1,
) -> jax.Array:
    """What in-out skipping leaves of each pass at a state of training: `nets.skipping.measured_densities` on a batch.

    Args:
      forward: the network.
      state: its parameters and formats.
      batch: images and labels.
      slice_width: bits of the slices that a chip skips; None for whole words.
      style: of the slices, "twos_complement" or "signed".
      lanes: slices that a chip skips together.

    Returns:
      Shape (P, 3, 2).
    """
    images, labels = batch
    return measured_densities(
        lambda params, images: forward(params, state.rest, images, jax.random.key(0), True),
        lambda out: cross_entropy(out[0], labels),
        state.precision,
        state.quant_state,
        state.params,
        images,
        slice_width=slice_width,
        style=style,
        lanes=lanes,
    )


def _network(forward: Forward) -> Callable:
    return lambda params, rest, images, key: forward(params, rest, images, key, True)
